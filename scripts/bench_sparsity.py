"""Prune single weights of a trained model by several criteria to several sparsities; one JSON line per cell.

    python scripts/bench_sparsity.py resnet50 --checkpoint resnet50.safetensors --model-arg in_chans=1 \
        --model-arg num_classes=10 --fashion-mnist FOLDER --criterion projection magnitude snip random \
        --goals 0.9 0.95 2:4 --repairs none batch_norm --seeds 0 1 2 --out results/sparsity.jsonl

One shot: a criterion scores the dense model once per seed, and each sparsity is cut from the dense model. With
``--steps`` it scores again after every step. A cell that is in the output file already is skipped, so an interrupted
benchmark goes on where it stopped. `--table` prints the mean and the range over seeds from the file instead.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from common import commit, keywords, lines, net_parser
from fashion_mnist import fashion_mnist
from torch import Tensor, nn

from baselines.weights import WEIGHT_CRITERIA
from jbrprune import prune, score
from jbrprune.criteria.objectives import OBJECTIVES
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.data.batches import Batch, attach_reference
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.models import timm_models

KEY = ("model", "criterion", "draws", "scope", "goal", "repair", "steps", "images", "eval_images", "seed")
"""A cell that agrees in these has been made."""
REPAIRS = {"none": None, "batch_norm": "batch_norm", "least_squares": "least_squares", "auto": "auto"}
REPAIRS["both"] = ("batch_norm", "least_squares")  # type: ignore[assignment]


@dataclass(frozen=True)
class Images:
    """Calibration images of one seed, and the test images with the dense model's logits."""

    calibration: list[Batch]
    test: list[Batch]
    seed: int


def arguments() -> argparse.Namespace:
    parser = net_parser(__doc__)
    known = ", ".join([*OBJECTIVES, *WEIGHT_CRITERIA])
    parser.add_argument("--criterion", nargs="+", default=["projection"], help=f"some of {known}; `x@layer`: layerwise")
    parser.add_argument("--goals", nargs="+", default=["0.5", "0.7", "0.8", "0.9", "0.95", "0.98"])
    parser.add_argument(
        "--repairs",
        nargs="+",
        choices=REPAIRS,
        help="the accuracy before it is recorded as well",
        default=["batch_norm"],
    )
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--draws", type=int, default=1, help="sign vectors per image of `projection`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--eval-images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def scorer(name: str, draws: int) -> Callable[..., WeightScores]:
    """The function that `prune(criterion=)` takes."""
    if name in WEIGHT_CRITERIA:
        return WEIGHT_CRITERIA[name]

    def relevance(model: nn.Module, batches: list[Batch], *, seed: int, ignore=(), progress=False) -> WeightScores:
        one = functools.partial(
            score, model, batches, granularity="weight", objective=name, ignore=ignore, progress=progress
        )
        made = [one(seed=1000 * seed + draw) for draw in range(draws)]
        return functools.reduce(WeightScores.__add__, made)

    relevance.__name__ = name
    return relevance


def cells(args: argparse.Namespace) -> Iterator[dict]:
    """Criterion by criterion, so that each scores once."""
    for name in args.criterion:
        kind, _, scope = name.partition("@")
        for goal in args.goals:
            for repair in args.repairs:
                yield {
                    "model": args.model,
                    "criterion": kind,
                    "draws": args.draws,
                    "scope": scope or "global",
                    "goal": goal,
                    "repair": repair,
                    "steps": args.steps,
                    "images": args.images,
                    "eval_images": args.eval_images,
                }


def run(model: nn.Module, cell: dict, criterion: Callable[..., WeightScores] | WeightScores, images: Images) -> dict:
    """Prune a copy, and measure."""
    goal = (
        {"structure": cell["goal"]}
        if ":" in cell["goal"]
        else {"sparsity": float(cell["goal"]), "scope": cell["scope"]}
    )
    began = time.perf_counter()
    result = prune(
        model,
        images.calibration,
        criterion=criterion,
        repair=REPAIRS[cell["repair"]],
        steps=cell["steps"],
        eval_data=images.test,
        seed=images.seed,
        images=None,
        batch_size=64,
        measure_latency=False,
        progress=False,
        **goal,
    )
    report = result.report
    return {
        "sparsity": report.sparsity,
        "nonzero": report.pruned.nonzero,
        "packed_bytes": report.pruned.packed,
        "accuracy": report.final.accuracy,
        "unrepaired_accuracy": report.unrepaired.accuracy,
        "dense_accuracy": report.final.dense_accuracy,
        "agreement": report.final.top1,
        "kl": report.final.kl,
        "repaired_by": report.steps[-1].repair,
        "least_density": min(row.kept for row in report.layers),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": report.provenance["versions"],
    }


def table(path: Path) -> str:
    """Accuracy per model, criterion, repair and goal: mean and range over seeds."""
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines(path):
        name = line["criterion"] + ("" if line["scope"] == "global" else " (by layer)")
        how = (line["model"], line["images"], line["draws"], line["steps"])
        found[(*how, line["repair"], name)][line["goal"]].append(line["accuracy"])
        if line["steps"] == 1 and line["repair"] != "none":
            found[(*how, "none", name)][line["goal"]].append(line["unrepaired_accuracy"])
    goals = sorted({line["goal"] for line in lines(path)})
    rows = [
        "| model | images | steps | repair | criterion | " + " | ".join(goals) + " |",
        "|---" * (5 + len(goals)) + "|",
    ]
    for key, by_goal in sorted(found.items()):
        shown = [
            f"{mean(by_goal[goal]):.3f} ({min(by_goal[goal]):.3f}-{max(by_goal[goal]):.3f})" if by_goal[goal] else ""
            for goal in goals
        ]
        rows.append("| " + " | ".join([*map(str, key), *shown]) + " |")
    return "\n".join(rows)


def calibrated(train: tuple[Tensor, Tensor], number: int, seed: int) -> list[Batch]:
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:number]
    return [Batch(train[0][part], train[1][part]) for part in chosen.split(64)]


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.out))
        return
    torch.set_num_threads(args.threads)
    options = keywords(args.model_arg)
    model = timm_models.create(args.model, checkpoint=args.checkpoint, pretrained=False, **options).eval()
    model = model.to(memory_format=torch.channels_last)
    train, test = (fashion_mnist(args.fashion_mnist, train=part) for part in (True, False))
    pairs = zip(*(values[: args.eval_images].split(250) for values in test), strict=True)
    tests = [Batch(images, labels) for images, labels in pairs]
    tests = attach_reference(tests, compute_logits(model, tests))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(line[name] for name in KEY) for line in lines(args.out)}
    for seed in args.seeds:
        images = Images(calibrated(train, args.images, seed), tests, seed)
        scores: dict[str, WeightScores] = {}
        for cell in cells(args):
            record = cell | {"data": "fashion_mnist", "seed": seed}
            if tuple(record[name] for name in KEY) in done:
                continue
            criterion = scorer(cell["criterion"], args.draws)
            if args.steps == 1:
                if cell["criterion"] not in scores:
                    scores = {cell["criterion"]: criterion(model, images.calibration, seed=seed)}
                criterion = scores[cell["criterion"]]
            record |= run(model, cell, criterion, images) | {"threads": args.threads, "commit": commit()}
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{cell['criterion']} {cell['scope']} {cell['goal']} {cell['repair']} seed {seed}: "
                f"{record['accuracy']:.4f} in {record['seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
