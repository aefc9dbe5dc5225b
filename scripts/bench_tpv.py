"""Test prediction variance of 8-bit quantization: trace form, empirical with noise, empirical with real rounding.

    python scripts/bench_tpv.py --model resnet50 --weights resnet50.safetensors --data fashion_mnist --root FOLDER \
        --out results/tpv_quantization.jsonl
    python scripts/bench_tpv.py --out results/tpv_quantization.jsonl --table

The weights are rounded to 8 bits over one range for every tensor. One line per estimator: training images, test
images, and the ratio of both (`jbrprune.tpv.train_test_ratio`). Lines that are there are not measured again. What the
trace form costs beside the published estimator is in bench_cost.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark import load
from common import append, describe_call, done, exit_on_error, key_of, lines, make_parser, markdown
from protocols import add_setup_arguments, read_setup
from torch import Tensor, nn

from jbrprune.report.records import plain
from jbrprune.tpv import Estimate, Quantization, empirical, trace_form, train_test_ratio

ESTIMATORS = ("trace", "noise", "rounding")


def estimate(net: nn.Module, images: Tensor, estimator: str, how: dict) -> Estimate:
    """TPV on some images; the empirical estimators read some of them."""
    perturbation = Quantization(8, "global", rounding=estimator == "rounding")
    shared = {name: how[name] for name in ("rtol", "seed", "batch_size")} | {"progress": False}
    if estimator == "trace":
        return trace_form(net, images, perturbation, **shared)
    return empirical(net, images[: how["empirical_images"]], perturbation, draws=how["draws"], **shared)


def show(path: Path) -> str:
    """Values with standard errors, of lines that have a ratio."""
    rows = []
    for line in (line for line in lines(path) if "ratio" in line):
        cells = [f"{r['value']:.4g} +- {r['standard_error']:.2g}" for r in (line["train"], line["test"])]
        rows.append([line["model"], line["estimator"], *cells, f"{line['ratio']:.3f} +- {line['ratio_error']:.3f}"])
    return markdown(["model", "estimator", "training images", "test images", "training / test"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_setup_arguments(parser)
    parser.add_argument("--estimators", nargs="+", default=ESTIMATORS, choices=ESTIMATORS)
    parser.add_argument("--images", type=int, default=10_000, help="images of a split that may be read")
    parser.add_argument("--empirical-images", type=int, default=2000, help="most images of the empirical estimators")
    parser.add_argument("--draws", type=int, default=8, help="most draws of the empirical estimators")
    parser.add_argument("--rtol", type=float, default=0.02, help="relative error to stop at")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    args = parser.parse_args(argv)
    with exit_on_error("bench_tpv.py"):
        if args.table:
            print(show(args.out))
            return
        setup = read_setup(args)
        how = {n: getattr(args, n) for n in ("images", "empirical_images", "draws", "rtol", "batch_size", "seed")}
        for estimator in args.estimators:
            line = setup.described() | how | {"estimator": estimator}
            key = key_of(line)
            if key in done(args.out, "estimator"):
                continue
            net, source = load(setup)
            parts = {"train": source.calibration(args.images, args.seed), "test": source.measured(args.images)}
            images = {split: torch.cat([batch.images for batch in batches]) for split, batches in parts.items()}
            found = {split: estimate(net, own, estimator, how) for split, own in images.items()}
            ratio = train_test_ratio(**found)
            line |= {split: one.to_dict() for split, one in found.items()}
            line |= {"key": key, "ratio": ratio.value, "ratio_error": ratio.standard_error, **describe_call()}
            append(args.out, [plain(line)])
            print(estimator, ratio, *found.values(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
