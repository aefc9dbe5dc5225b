"""Prune a trained model to several shares of its MACs with several settings and seeds; one JSON line per run and share.

    python scripts/bench_pruning.py resnet50 --checkpoint resnet50.safetensors --model-arg in_chans=1 \
        --model-arg num_classes=10 --fashion-mnist FOLDER \
        --setting default --setting objective=projection --seeds 0 1 2 --out results/pruning.jsonl

A run that is in the output file already is skipped, so an interrupted benchmark goes on where it stopped.
`--table` prints the mean and the range over seeds from the file instead of running anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from common import commit, keywords, lines, net_parser, parsed
from fashion_mnist import fashion_mnist

from jbrprune import sweep
from jbrprune.models import timm_models

KEY = ("model", "setting", "seed", "images", "eval_images", "shares")
"""A run that agrees in these has been made."""


def arguments() -> argparse.Namespace:
    parser = net_parser(__doc__)
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE]",
        help="`default` or arguments of prune()",
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="unlabelled calibration images")
    parser.add_argument("--eval-images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def run(
    args: argparse.Namespace, setting: str, seed: int, train: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor]
) -> list[dict]:
    """One sweep; one record per share."""
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.images]
    model = timm_models.create(
        args.model,
        checkpoint=args.checkpoint,
        pretrained=False,
        **keywords(args.model_arg),
    )
    began = time.perf_counter()
    results = sweep(
        model,
        train[chosen],
        args.shares,
        eval_data=[test],
        seed=seed,
        batch_size=64,
        measure_latency=False,
        **parsed(setting),
    )
    shared = {
        "shares": sorted(args.shares, reverse=True),
        "model": args.model,
        "data": "fashion_mnist",
        "setting": setting,
        "seed": seed,
        "images": args.images,
        "eval_images": args.eval_images,
        "seconds": round(time.perf_counter() - began, 1),
        "threads": args.threads,
        "commit": commit(),
    }
    return [
        shared | record(result.report, share)
        for share, result in zip(sorted(args.shares, reverse=True), results, strict=True)
    ]


def record(report, share: float) -> dict:
    final = report.final
    return {
        "budget": share,
        "kept": round(report.kept, 5),
        "macs": report.pruned.macs,
        "params": report.pruned.params,
        "accuracy": final.accuracy,
        "dense_accuracy": final.dense_accuracy,
        "agreement": final.top1,
        "kl": final.kl,
        "agreement_before_last_repair": report.unrepaired.top1,
        "repair": report.steps[-1].repair,
        "versions": report.provenance["versions"],
    }


def table(path: Path) -> str:
    """Accuracy per model, setting and budget: mean and range over seeds."""
    groups: dict[tuple, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines(path):
        groups[line["model"], line["images"], line["eval_images"], line["setting"]][line["budget"]].append(
            line["accuracy"]
        )
    budgets = sorted({line["budget"] for line in lines(path)}, reverse=True)
    rows = [
        "| model | images | setting | seeds | " + " | ".join(map(str, budgets)) + " |",
        "|---" * (4 + len(budgets)) + "|",
    ]
    for (model, images, _, setting), found in groups.items():
        cells = [
            f"{mean(found[b]):.4f} ({min(found[b]):.3f}-{max(found[b]):.3f})" if b in found else "" for b in budgets
        ]
        rows.append(f"| {model} | {images} | {setting} | {max(map(len, found.values()))} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.out))
        return
    torch.set_num_threads(args.threads)
    train, _ = fashion_mnist(args.fashion_mnist, train=True)
    images, labels = fashion_mnist(args.fashion_mnist, train=False)
    test = images[: args.eval_images], labels[: args.eval_images]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for setting in args.setting or ["default"]:
        for seed in args.seeds:
            key = (args.model, setting, seed, args.images, args.eval_images, sorted(args.shares, reverse=True))
            if key in [tuple(line[name] for name in KEY) for line in lines(args.out)]:
                continue
            with args.out.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in run(args, setting, seed, train, test)))
            print(f"{args.model} {setting} seed {seed} done", flush=True)


if __name__ == "__main__":
    main()
