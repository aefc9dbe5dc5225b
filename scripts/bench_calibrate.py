"""Predicted curves with repair against what pruning came to: `jbrprune.predict` with 0 to 3 points really pruned.

    python scripts/bench_calibrate.py resnet50 --checkpoint resnet50.safetensors --model-arg in_chans=1 \
        --model-arg num_classes=10 --fashion-mnist FOLDER --macs 0.7 0.5 0.4 0.3 0.2 0.1 --out results/calibrate.jsonl
    python scripts/bench_calibrate.py any --out results/calibrate.jsonl --table results/criteria_fashion_mnist.jsonl

One line per number of points and budget; what is there is not made again (the same points of other budgets are another
curve). ``--table`` takes the measured agreement on
all test images from lines of `benchmark.py` (criterion ``jbr``, repair ``auto``, same model, seed, images and budget).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bench_prediction import net_parser
from common import append, commit, keywords, lines
from protocols import name_weights as weights_named
from sources import fashion_mnist

import jbrprune
from jbrprune.models import timm_models
from jbrprune.report.records import plain

COLUMNS = (
    *("macs", "predicted_flips_repaired", "predicted_flips", "masked_flips", "measured_flips_repaired"),
    *("prediction_error", "valid", "valid_repaired"),
)
SAME = ("model", "seed", "images")


def arguments() -> argparse.Namespace:
    parser = net_parser(__doc__)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.4, 0.3, 0.2, 0.1])
    parser.add_argument("--points", type=int, nargs="+", default=[0, 1, 2, 3], help="budgets that are really pruned to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, metavar="LINES", help="print predicted beside measured instead")
    return parser.parse_args()


def table(path: Path, measured: Path) -> str:
    """Model -> rows by budget: flips predicted with 0 to 3 points, and measured on the test images."""
    real = {
        (*(line[key] for key in SAME), line["budget"]): 1 - line["agreement"]
        for line in lines(measured)
        if (line["criterion"], line["repair"], line["steps"]) == ("jbr", "auto", None) and "failed" not in line
    }
    rows: dict[tuple, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines(path):
        rows[(*(line[key] for key in SAME), line["target"])][line["points"]] = line
    points = sorted({line["points"] for line in lines(path)})
    texts = ["| model, seed | MACs | " + " | ".join(f"{n} points" for n in points) + " | measured, test |"]
    texts.append("|---|--:|" + "--:|" * (len(points) + 1))
    for key in sorted(rows, key=lambda key: (key[:-1], -key[-1])):
        cells = [_shown(rows[key].get(n)) for n in points]
        found = f"{100 * real[key]:.1f}" if key in real else ""
        texts.append(f"| {key[0]}, {key[1]} | {key[-1]} | " + " | ".join(cells) + f" | {found} |")
    return "\n".join(texts)


def _shown(line: dict[str, Any] | None) -> str:
    """Flips in percent; ``*`` where the budget is one of the points."""
    if line is None:
        return ""
    star = "*" if line["measured_flips_repaired"] is not None else ""
    return f"{100 * line['predicted_flips_repaired']:.1f}{star}"


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.out, args.table))
        return
    train, _ = fashion_mnist(args.fashion_mnist, train=True)
    own = keywords(args.model_arg)
    model = timm_models.create(args.model, checkpoint=args.checkpoint, pretrained=False, **own).eval()
    for seed in args.seeds:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.images]
        for points in args.points:
            shared = {"model": args.model, "data": "fashion_mnist", "seed": seed, "images": args.images}
            shared |= {"weights": weights_named(str(args.checkpoint)), "model_args": own}
            shared |= {"points": points, "asked": sorted(args.macs, reverse=True)}
            if any(all(line.get(name) == value for name, value in shared.items()) for line in lines(args.out)):
                continue
            began = time.process_time()
            found = jbrprune.predict(model, train[chosen], macs=args.macs, calibrate=points, seed=seed, progress=False)
            facts = shared | {"cpu_seconds": round(time.process_time() - began, 1), "commit": commit()}
            rows = [{name: row[name] for name in ("target", *COLUMNS)} for row in found.to_dict("records")]
            append(args.out, [plain(facts | row) for row in rows])
            print(f"{args.model} seed {seed}, {points} points: {facts['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
