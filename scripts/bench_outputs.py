"""What pruning costs a model that is no classifier: an encoder with real weights, and a feature backbone.

    python scripts/bench_outputs.py encoder --root /usr/share/tuxpaint/stamps --out results/outputs.jsonl
    python scripts/bench_outputs.py backbone --root FASHION_MNIST --weights resnet50.pth --out results/outputs.jsonl

``encoder``: the packaged EfficientNet-Lite0 without its classifier on crops of the photographs in a folder, ranked by
several criteria; also how far its old classifier decides on the pruned embedding as on the dense one. Criteria that
need labels are not possible. ``backbone``: the feature maps of a ResNet-50 on Fashion-MNIST, with and without repair.
One JSON line per criterion and share of MACs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import append, describe_call, exit_on_error, make_parser, use_threads
from sources import SMALL, open_source

from baselines import CRITERIA
from jbrprune import sweep
from jbrprune.criteria.relevance import Relevance
from jbrprune.data.batches import attach_reference
from jbrprune.demo import lite0
from jbrprune.evaluation.agreement import agreement_on, compute_logits
from jbrprune.models import timm_models
from jbrprune.report.records import plain

ENCODER = {
    "jbr": CRITERIA["jbr"],
    "l1": CRITERIA["l1"],
    "published, by projection": Relevance("projection", site="layers", statistic="batched"),
}
"""``jbr_published_code`` itself looks at confident predictions, of which an embedding has none."""


def compare_encoder(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of the encoder: its embedding, and what its old classifier makes of it."""
    model = lite0().eval()
    classifier = model.get_classifier()
    source = open_source("photographs/0", args.root, model)
    calibration, test = source.calibration(args.images, args.seed), source.measured(args.eval_images)
    model.reset_classifier(0)
    dense = attach_reference(test, compute_logits(torch.nn.Sequential(model, classifier), test))
    for name, criterion in ENCODER.items():
        how: dict[str, Any] = {"criterion": criterion, "eval_data": test, "seed": args.seed, "steps": args.steps}
        for result in sweep(model, calibration, args.shares or (0.9, 0.8, 0.7, 0.6), images=None, **how):
            found = agreement_on(torch.nn.Sequential(result.model, classifier), dense)
            old = {"classifier_top1": found.top1, "classifier_top5": found.top5, "classifier_kl": found.kl}
            yield {"criterion": name, **old} | measure(result.report)


def compare_backbone(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of the backbone: relative errors of its levels."""
    whole = timm_models.create("resnet50", checkpoint=args.weights, **SMALL["fashion_mnist"])
    model = timm_models.create("resnet50", pretrained=False, features_only=True, in_chans=1)
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")})
    source = open_source("fashion_mnist", args.root, whole)
    calibration, test = source.calibration(args.images, args.seed), source.measured(args.eval_images)
    for repair in ("auto", None):
        how: dict[str, Any] = {"repair": repair, "eval_data": test, "seed": args.seed, "steps": args.steps}
        for result in sweep(model.eval(), calibration, args.shares or (0.7, 0.5, 0.3), images=None, **how):
            yield {"criterion": "jbr"} | measure(result.report)


def measure(report: Any) -> dict[str, Any]:
    """What a report says of an output that is not logits."""
    final = report.final
    names = ("images", "cosine", "neighbours", "interval", "error", "errors")
    facts = {name: getattr(final, name) for name in names} | {"unrepaired_error": report.unrepaired.error}
    kept = {"budget": next(iter(report.budget.values())), "macs": report.kept, "seconds": report.seconds["total"]}
    settings = {name: report.settings[name] for name in ("repair", "images", "steps", "output")}
    return {**kept, **facts, "settings": settings, "hardware": report.provenance["hardware"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("encoder", "backbone"))
    parser.add_argument("--root", required=True, help="folder of photographs, or of the IDX files of Fashion-MNIST")
    parser.add_argument("--weights", help="backbone: of a resnet50 with in_chans=1, num_classes=10")
    parser.add_argument("--shares", type=float, nargs="+", help="of MACs; default 0.9 to 0.6, or 0.7, 0.5, 0.3")
    parser.add_argument("--images", type=int, default=400, help="to calibrate on")
    parser.add_argument("--eval-images", type=int, help="to measure on; default all")
    parser.add_argument("--steps", type=int, default=2, help="from one share to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    with exit_on_error("bench_outputs.py"):
        for line in (compare_encoder if args.what == "encoder" else compare_backbone)(args):
            append(args.out, [plain({"what": args.what, **line, "seed": args.seed} | describe_call())])
            print({name: line[name] for name in ("criterion", "budget", "cosine", "neighbours", "error")}, flush=True)


if __name__ == "__main__":
    main()
