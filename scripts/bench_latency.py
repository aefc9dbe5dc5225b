"""How much faster pruned models are: dense and pruned models timed in turns, one JSON line per measurement.

    python scripts/bench_latency.py --out results/latency.jsonl                 # measure
    python scripts/bench_latency.py --device cuda --half --batch-sizes 1 32 128 --out results/latency.jsonl
    python scripts/bench_latency.py --out results/latency.jsonl --table         # a Markdown table of what was measured

Weights and images are random: they say nothing about accuracy, and time does not depend on them. Channels are ranked
by magnitude, directions by singular values, so that a model is pruned in seconds. ``2:4`` is single weights in the
layout of the kernels for them, which only a GPU has; what fails is a line with the reason.

Every line compares one pruned model with the dense one in the same process, in turns; `speedup` is the median of the
ratios of the rounds, `spread` half their interquartile range. Times of different machines and numbers of threads are
never put beside each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from common import append, describe_call, lines, make_parser, markdown
from timm.data import resolve_data_config
from torch import nn

from baselines.low_rank import svd
from baselines.single_weights import magnitude
from baselines.weights_only import l1
from jbrprune import prune, sparsify, to_semi_structured
from jbrprune.budgets.budget import Floors
from jbrprune.evaluation.latency import describe_hardware, time_in_turns

MODELS = ("resnet50", "vit_small_patch16_224", "efficientnet_lite0", "mobilenetv2_100")
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"macs=0.5, round_to={n}": {"macs": 0.5, "floors": Floors(round_to=n)} for n in (1, 8, 32)},
    "directions, macs=0.5": {"criterion": svd, "macs": 0.5, "structure": "directions"},
    "latency=0.5": {"latency": 0.5, "steps": None},
    "2:4": {"criterion": magnitude, "pattern": "2:4"},
}
PLACE, CELL = ("device", "hardware", "threads", "torch"), ("model", "setting", "mode", "batch")


def prune_once(dense: nn.Module, images: torch.Tensor, setting: str) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned model, and what is known of it."""
    how = {"criterion": l1, "steps": 1} | SETTINGS[setting]
    result = (sparsify if "pattern" in how else prune)(dense, images, **how, repair=None, progress=False)
    report = result.report
    facts = {"round_to": how.get("floors", Floors()).round_to, "planned": report.steps[-1].relative_latency}
    return result.model, facts | {"macs": report.kept, "params": report.pruned.params / report.dense.params}


def measure(dense: nn.Module, model: nn.Module, images: torch.Tensor, mode: str, args: argparse.Namespace) -> dict:
    """Both models in turns, in eager mode or compiled."""
    models = [torch.compile(one, dynamic=False) if mode == "compile" else one for one in (model, dense)]
    found = time_in_turns(models, images, seconds=args.seconds, threads=args.threads)
    after, before = found.latencies
    times = {"dense_ms": before.median_ms, "pruned_ms": after.median_ms, "clock": after.clock}
    return times | {"speedup": found.ratios[1], "spread": found.spreads[1]}


def describe_place(device: torch.device, threads: int, half: bool = False) -> dict[str, Any]:
    hardware = describe_hardware(device) + ", float16, channels last" * half
    return {"device": device.type, "hardware": hardware, "threads": threads, "torch": torch.__version__}


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per model, setting, mode and batch that is not there yet, or one that says what failed."""
    device = torch.device(args.device)
    here = describe_place(device, args.threads, args.half)
    form = {"dtype": torch.float16, "memory_format": torch.channels_last}
    done = [{name: line[name] for name in (*PLACE, *CELL)} for line in lines(args.out) if "failed" not in line]
    for name, setting in itertools.product(args.models, args.settings):
        pairs = itertools.product(args.batch_sizes, args.modes)
        cells = [{**here, **dict(zip(CELL, (name, setting, mode, batch)))} for batch, mode in pairs]
        cells = [cell for cell in cells if cell not in done]
        if not cells:
            continue
        torch.manual_seed(0)
        dense = timm.create_model(name).to(device).eval()
        images = torch.randn(max(args.batch_sizes), *resolve_data_config(model=dense)["input_size"], device=device)
        try:
            model, facts = prune_once(dense, images[:2], setting)
            if args.half:
                images, dense, model = (one.to(**form) for one in (images, dense, model))
            if setting == "2:4":
                to_semi_structured(model)
            for cell in cells:
                yield {**cell, **facts, **measure(dense, model, images[: cell["batch"]], cell["mode"], args)}
                torch.compiler.reset()
        except Exception as error:  # whatever a GPU or a compiler cannot do: the rest is measured all the same
            reason = f"{type(error).__name__}: {error}"
            yield {**here, "model": name, "setting": setting, "modes": args.modes, "failed": reason}


def table(rows: list[dict]) -> str:
    """Speed-up and spread by batch and mode, one table for every machine and number of threads."""
    failed = [f"{row['model']}, {row['setting']}: {row['failed']}" for row in rows if "failed" in row]
    made = pd.DataFrame([row for row in rows if "failed" not in row]).round({"macs": 2})
    made["text"] = [f"{row.speedup:.2f} ± {row.spread:.2f}" for row in made.itertuples()]
    parts = []
    for place, own in made.groupby(list(PLACE)) if len(made) else ():
        grid = own.pivot_table("text", ["model", "setting", "round_to", "macs"], ["batch", "mode"], "last").fillna("")
        head = ["model", "setting", "round_to", "MACs", *(f"batch {batch}, {mode}" for batch, mode in grid)]
        parts.append("{}, {}, threads: {}, torch {}\n\n".format(*place) + markdown(head, grid.reset_index().to_numpy()))
    return "\n\n".join([*parts, *failed])


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="time that one measurement takes at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", action="store_true", help="float16 and channels last")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    args = parser.parse_args(argv)
    if args.table:
        print(table(lines(args.out)))
        return
    warnings.filterwarnings("ignore", message=".*No CUDA runtime is found.*")
    for line in run(args):
        append(args.out, [line | describe_call()])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
