"""Test prediction variance: time to a relative error of 2 %, and 8-bit quantization by three estimators.

    python scripts/bench_tpv.py time --model resnet50 --weights resnet50.safetensors --data fashion_mnist \
        --root FOLDER --out results/tpv.jsonl
    python scripts/bench_tpv.py quantization --model resnet50 --weights resnet50.safetensors --data fashion_mnist \
        --root FOLDER --out results/tpv_quantization.jsonl
    python scripts/bench_tpv.py quantization --out results/tpv_quantization.jsonl --table

``time``: the trace form beside the published code's estimator, in one run. Both estimate sigma^2 E_x |J(x)|^2 over all
parameters. ``published`` takes one image and one vector of random signs per backward, makes the gradient of every
parameter and adds up the squares; ``ours`` is `jbrprune.tpv.trace_form`. Each is also timed under autocast to bfloat16.
Seconds per draw: processor time of this process, in turn in every round (what disturbs the machine disturbs all), the
median of the rounds. A draw of both is a random image with random signs, so that both need (relative standard deviation
of a draw / 0.02)^2 draws to 2 %. Of random weights the time per draw says something, the variance little.

``quantization``: TPV of rounding the weights to 8 bits over one range, by the trace form, empirically with noise and
with real rounding. One line per estimator: training images, test images, and the ratio of both
(`jbrprune.tpv.train_test_ratio`). Lines that are there are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import load
from common import append, describe_call, exit_on_error, key_of, lines, make_parser, markdown
from protocols import Setup, add_setup_arguments, read_setup
from torch import Tensor, nn

from jbrprune.report.records import plain
from jbrprune.tpv import Estimate, Isotropic, Quantization, empirical, trace_form, train_test_ratio

GOAL = 0.02
ESTIMATORS = ("trace", "noise", "rounding")


# --- time ------------------------------------------------------------------------------------------


def compare_times(args: argparse.Namespace, setup: Setup) -> Iterator[dict[str, Any]]:
    """One line per method."""
    net, source = load(setup)
    images = torch.cat([batch.images for batch in source.calibration(args.images, args.seed)])
    spread = estimate_trace(net, images, args, None).relative_error * len(images) ** 0.5
    draws = (spread / GOAL) ** 2
    seconds = time_methods(net, images, args)
    for method, each in seconds.items():
        yield {
            **{"method": method, "cpu_seconds_per_draw": each, "seconds_to_2_percent": draws * each},
            **{"draws_to_2_percent": draws, "relative_deviation": spread},
            "times_faster": seconds["published"] / each,
        }


def time_methods(net: nn.Module, images: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Method -> processor seconds per draw, the median of the rounds."""
    few, batch, low = images[: args.draws], images[: args.batch_size], torch.bfloat16
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "published": (lambda: estimate_published(net, few, None), len(few)),
        "ours": (lambda: estimate_trace(net, batch, args, None), len(batch)),
        "published_bf16": (lambda: estimate_published(net, few, low), len(few)),
        "ours_bf16": (lambda: estimate_trace(net, batch, args, low), len(batch)),
    }
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(args.rounds + 1):
        for method, (step, draws) in steps.items():
            start = time.process_time()
            step()
            if number:  # the first round is a warm-up
                seconds[method].append((time.process_time() - start) / draws)
    return {method: statistics.median(each) for method, each in seconds.items()}


def estimate_published(net: nn.Module, images: Tensor, low: torch.dtype | None) -> float:
    """One image and one vector of signs per backward; all gradients are made, squared and added up."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    total = 0.0
    for image in images:
        with torch.autocast("cpu", low, enabled=low is not None):
            outputs = net(image[None])[0]
        v = torch.randint(0, 2, outputs.shape).float() * 2 - 1
        gradients = torch.autograd.grad((v * outputs).sum(), parameters)
        total += sum(g.pow(2).sum().item() for g in gradients)
    return total / len(images)


def estimate_trace(net: nn.Module, images: Tensor, args: argparse.Namespace, low: torch.dtype | None) -> Estimate:
    """The trace form of all images."""
    how = {"method": "projection", "rtol": 0.0, "validity": False, "progress": False, "autocast": low}
    return trace_form(net, images, Isotropic(1.0), batch_size=args.batch_size, seed=args.seed, **how)


# --- quantization ----------------------------------------------------------------------------------


def compare_quantizations(args: argparse.Namespace, setup: Setup) -> Iterator[dict[str, Any]]:
    """One line per estimator."""
    net, source = load(setup)
    parts = {"train": source.calibration(args.images, args.seed), "test": source.measured(args.images)}
    splits = {split: torch.cat([batch.images for batch in batches]) for split, batches in parts.items()}
    for estimator in ESTIMATORS:
        perturbation = Quantization(8, "global", rounding=estimator == "rounding")
        how: dict[str, Any] = {"rtol": args.rtol, "seed": args.seed, "batch_size": args.batch_size, "progress": False}
        if estimator == "trace":
            found = {split: trace_form(net, images, perturbation, **how) for split, images in splits.items()}
        else:
            how |= {"draws": args.draws}
            few = {split: images[: args.empirical_images] for split, images in splits.items()}
            found = {split: empirical(net, images, perturbation, **how) for split, images in few.items()}
        ratio = train_test_ratio(**found)
        line = {"bits": 8, "granularity": "global", "estimator": estimator}
        line |= {split: one.to_dict() for split, one in found.items()}
        yield line | {"ratio": ratio.value, "ratio_error": ratio.standard_error}


def show(path: Path) -> str:
    """Values with standard errors, of lines that have a ratio."""
    rows = []
    for line in (line for line in lines(path) if "ratio" in line):
        cells = [f"{r['value']:.4g} +- {r['standard_error']:.2g}" for r in (line["train"], line["test"])]
        cells.append(f"{line['ratio']:.3f} +- {line['ratio_error']:.3f}")
        rows.append([f"{line['bits']}, {line['granularity']}", line["estimator"], *cells])
    return markdown(["bits, range", "estimator", "training images", "test images", "training / test"], rows)


WHAT = {"time": compare_times, "quantization": compare_quantizations}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=WHAT)
    add_setup_arguments(parser, weights="random")
    parser.add_argument("--images", type=int, default=1024, help="of a split, that may be read")
    parser.add_argument("--empirical-images", type=int, default=2000, help="most images of the empirical estimators")
    parser.add_argument("--draws", type=int, default=8, help="of the published estimator in a round; of noise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rtol", type=float, default=0.02, help="relative error to stop at")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the lines of quantization, run nothing")
    args = parser.parse_args(argv)
    with exit_on_error("bench_tpv.py"):
        if args.table:
            print(show(args.out))
            return
        setup = read_setup(args)
        names = ("what", "images", "empirical_images", "draws", "rounds", "rtol", "batch_size", "seed")
        shared = setup.described() | {name: getattr(args, name) for name in names}
        shared |= {"threads": torch.get_num_threads()}
        if key_of(shared) in {line.get("run") for line in lines(args.out)}:
            return
        for line in WHAT[args.what](args, setup):
            line = plain(shared | line | {"run": key_of(shared), "torch": torch.__version__, **describe_call()})
            append(args.out, [line])
            print(line, flush=True)


if __name__ == "__main__":
    main()
