"""Channels, directions or both, from lines of benchmark.py --structure: tables at equal MACs and equal time, a figure.

python scripts/structures.py results/directions.jsonl --model vit_tiny_patch16_224 --images 512 --figure FILE.png
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import lines, make_parser, markdown
from matplotlib.figure import Figure

TIMES = {"relative_latency": "time of 1 image", "relative_latency_64": "time of 64 images"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--criterion", default="jbr")
    parser.add_argument("--model", help="lines of this one; default: of all")
    parser.add_argument("--images", type=int, help="lines of so many for calibration; default: of any")
    parser.add_argument("--figure", type=Path, help="write it here")
    args = parser.parse_args(argv)
    found: dict[tuple[str, str], dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in (line for path in args.paths for line in lines(path)):
        own = (args.model or line["model"], args.criterion, args.images or line["images"])
        if "failed" not in line and (line["model"], line["criterion"], line["images"]) == own:
            found[line["model"], line["options"].get("structure", "channels")][line["budget"]].append(line)
    rows = []
    for (model, structure), budgets in found.items():
        for budget, same in sorted(budgets.items(), reverse=True):
            accuracy = 100 * np.array([line["accuracy"] for line in same])
            shown = f"{accuracy.mean():.2f} ({accuracy.min():.2f} to {accuracy.max():.2f}, {len(same)})"
            params = np.mean([line["params"] / line["dense_params"] for line in same])
            times = [f"{np.mean([line[name] for line in same]):.2f}" for name in TIMES]
            dense = f"{100 * same[0]['dense_accuracy']:.2f}"
            rows.append((model, dense, structure, budget, shown, f"{params:.3f}", *times))
    heads = ("model", "dense", "structure", "MACs", "accuracy (least to most, runs)", "parameters", *TIMES.values())
    print(markdown(heads, rows))
    if args.figure:
        names = {"macs": "multiply-accumulates", **TIMES}
        drawn = Figure(figsize=(11, 3.6), layout="constrained")
        axes = drawn.subplots(1, 3, sharey=True)
        for (_, structure), budgets in found.items():
            points = [[{**li, "macs": li["macs"] / li["dense_macs"]} for li in same] for same in budgets.values()]
            for axis, name in zip(axes, names):
                x = [np.mean([line[name] for line in same]) for same in points]
                y = [100 * np.mean([line["accuracy"] for line in same]) for same in points]
                axis.plot(x, y, "o-", label=structure)
                axis.set_xlabel(f"{names[name]}, share of the dense model's")
        axes[0].set_ylabel("accuracy, %")
        axes[0].legend()
        drawn.savefig(args.figure, dpi=110)


if __name__ == "__main__":
    main()
