"""Prune as far as max_drop allows, and see what was lost on images that no decision has seen; one JSON line per run.

    python scripts/bench_max_drop.py resnet50 --checkpoint resnet50.safetensors --model-arg in_chans=1 \
        --model-arg num_classes=10 --fashion-mnist FOLDER --drops 0.01 0.03 --seeds 0 1 2 --out results/max_drop.jsonl

A run that is in the output file already is skipped. `--table` prints the file instead.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from bench_prediction import net_parser
from common import append, commit, keywords, lines
from protocols import name_weights as weights_named
from sources import fashion_mnist

from jbrprune import prune
from jbrprune.models import timm_models
from jbrprune.report.records import plain

KEY = ("model", "weights", "model_args", "max_drop", "seed", "images", "labels", "eval_images")
"""A run that agrees in these has been made."""


def arguments() -> argparse.Namespace:
    parser = net_parser(__doc__)
    parser.add_argument("--drops", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--labels", action="store_true", help="let the accuracy decide instead of the agreement")
    parser.add_argument("--eval-images", type=int, default=10_000, help="test images, which decide nothing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def described(args: argparse.Namespace, drop: float, seed: int) -> dict:
    """What `KEY` looks at."""
    given = {
        "model": args.model,
        "weights": weights_named(str(args.checkpoint)),
        "model_args": keywords(args.model_arg),
    }
    given |= {"max_drop": drop, "seed": seed, "images": args.images, "labels": args.labels}
    return given | {"eval_images": args.eval_images}


def run(args: argparse.Namespace, drop: float, seed: int, train: tuple, test: tuple) -> dict:
    """One search; its record."""
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[: args.images]
    model = timm_models.create(args.model, checkpoint=args.checkpoint, pretrained=False, **keywords(args.model_arg))
    data = [(train[0][chosen], train[1][chosen])] if args.labels else train[0][chosen]
    began = time.process_time()
    result = prune(model, data, max_drop=drop, eval_data=[test], seed=seed, batch_size=64, progress=False)
    report = result.report
    assert report.search is not None
    assert report.final is not None
    return described(args, drop, seed) | {
        "data": "fashion_mnist",
        "kept": round(report.kept, 5),
        "params": report.pruned.params,
        "evaluations": len(report.search.trials),
        "steps": len(report.steps),
        "search": plain(report.search),
        "test": plain(report.final),
        "cpu_seconds": round(time.process_time() - began, 1),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": report.provenance["versions"],
    }


def table(path: Path) -> str:
    rows = [
        "| model | decided by | max_drop | seed | MACs kept | evaluations | drop where it was decided (95 %; corrected "
        "for choosing among the evaluated models) | "
        "agreement drop, test | accuracy drop, test |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in sorted(lines(path), key=lambda line: [str(line.get(name)) for name in KEY]):
        drop, test = line["search"]["drop"], line["test"]
        rows.append(
            f"| {line['model']} | {drop['of']} | {line['max_drop']} | {line['seed']} | {line['kept']:.3f} | "
            f"{line['evaluations']} | "
            f"{drop['lost']:.4f} ({drop['low']:.3f} to {drop['high']:.3f}; "
            f"{'corrected' if 'models' in drop else 'not corrected'}) of {drop['images']} | "
            f"{1 - test['top1']:.4f} | {test['dense_accuracy'] - test['accuracy']:+.4f} |"
        )
    return "\n".join(rows)


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.out))
        return
    train = fashion_mnist(args.fashion_mnist, train=True)
    images, labels = fashion_mnist(args.fashion_mnist, train=False)
    test = images[: args.eval_images], labels[: args.eval_images]
    for seed in args.seeds:
        for drop in args.drops:
            if described(args, drop, seed) in [{name: line.get(name) for name in KEY} for line in lines(args.out)]:
                continue
            append(args.out, [run(args, drop, seed, train, test)])
            print(f"{args.model} max_drop={drop} seed {seed} done", flush=True)


if __name__ == "__main__":
    main()
