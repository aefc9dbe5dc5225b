"""How much faster pruned models are: dense and pruned models timed in turns, one JSON line per measurement.

    python scripts/bench_latency.py --out results/latency.jsonl                 # measure
    python scripts/bench_latency.py --out results/latency.jsonl --table         # a Markdown table of what was measured

Weights and images are random: they say nothing about accuracy, and time does not depend on them. Channels are ranked
by magnitude, so that a model is pruned in seconds. Every line compares one pruned model with the dense one in the same
process, in turns; `speedup` is the median of the ratios of the rounds, `spread` half their interquartile range. Times
of different machines and numbers of threads are never put beside each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from common import append, describe_call, lines, make_parser, markdown
from torch import nn

from baselines.weights_only import l1
from jbrprune import prune
from jbrprune.budgets.budget import Floors
from jbrprune.evaluation.latency import describe_hardware, time_in_turns

MODELS = ("resnet50", "vit_small_patch16_224", "efficientnet_lite0", "mobilenetv2_100")
SETTINGS: dict[str, tuple[dict[str, float], int]] = {
    "macs=0.5, round_to=1": ({"macs": 0.5}, 1),
    "macs=0.5, round_to=8": ({"macs": 0.5}, 8),
    "macs=0.5, round_to=16": ({"macs": 0.5}, 16),
    "latency=0.5": ({"latency": 0.5}, 1),
}
PLACE, CELL = ("device", "hardware", "threads", "torch"), ("model", "setting", "mode", "batch")


def prune_once(dense: nn.Module, images: torch.Tensor, setting: str) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned model, and what is known of it."""
    budget, round_to = SETTINGS[setting]
    how = {"criterion": l1, "floors": Floors(round_to=round_to), "repair": None, "progress": False}
    result = prune(dense, images, **budget, **how)
    report = result.report
    facts = {"round_to": round_to, "planned": report.steps[-1].relative_latency}
    return result.model, facts | {"macs": report.kept, "params": report.pruned.params / report.dense.params}


def measure(dense: nn.Module, model: nn.Module, images: torch.Tensor, mode: str, args: argparse.Namespace) -> dict:
    """Both models in turns, in eager mode or compiled."""
    models = [torch.compile(one, dynamic=False) if mode == "compile" else one for one in (model, dense)]
    found = time_in_turns(models, images, seconds=args.seconds, threads=args.threads)
    after, before = found.latencies
    times = {"dense_ms": before.median_ms, "pruned_ms": after.median_ms, "clock": after.clock}
    return times | {"speedup": found.ratios[1], "spread": found.spreads[1]}


def describe_place(device: torch.device, threads: int) -> dict[str, Any]:
    hardware = describe_hardware(device)
    return {"device": device.type, "hardware": hardware, "threads": threads, "torch": torch.__version__}


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per model, setting, mode and batch that is not there yet."""
    device = torch.device(args.device)
    here = describe_place(device, args.threads)

    def key(row: Mapping[str, Any]) -> tuple:
        return tuple(row[name] for name in (*PLACE, *CELL))

    done = set(map(key, lines(args.out)))
    for name, setting in itertools.product(args.models, args.settings):
        pairs = itertools.product(args.batch_sizes, args.modes)
        cells = [{**here, **dict(zip(CELL, (name, setting, mode, batch)))} for batch, mode in pairs]
        cells = [cell for cell in cells if key(cell) not in done]
        if cells:
            torch.manual_seed(0)
            dense = timm.create_model(name).to(device).eval()
            images = torch.randn(max(args.batch_sizes), 3, 224, 224, device=device)
            model, facts = prune_once(dense, images[:2], setting)
        for cell in cells:
            yield {**cell, **facts, **measure(dense, model, images[: cell["batch"]], cell["mode"], args)}
            torch.compiler.reset()


def table(rows: list[dict]) -> str:
    """Speed-up and spread by batch and mode, one table for every machine and number of threads."""
    parts = []
    for place, own in itertools.groupby(sorted(rows, key=_place), _place):
        found: dict[tuple, dict[tuple, dict]] = {}
        for row in own:
            found.setdefault((row["model"], row["setting"]), {})[row["batch"], row["mode"]] = row
        columns = sorted(
            {column for cells in found.values() for column in cells}, key=lambda c: (c[0], c[1] != "eager")
        )
        grid = []
        for (name, setting), cells in found.items():
            first = next(iter(cells.values()))
            shown = [f"{cells[c]['speedup']:.2f} ± {cells[c]['spread']:.2f}" if c in cells else "" for c in columns]
            grid.append([name, setting, first["round_to"], f"{first['macs']:.2f}", *shown])
        head = ["model", "setting", "round_to", "MACs", *(f"batch {batch}, {mode}" for batch, mode in columns)]
        parts.append("{}, {}, threads: {}, torch {}\n\n".format(*place) + markdown(head, grid))
    return "\n\n".join(parts)


def _place(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in PLACE)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="time that one measurement takes at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(lines(args.out)))
        return
    warnings.filterwarnings("ignore", message=".*No CUDA runtime is found.*")
    for line in run(args):
        append(args.out, [line | describe_call()])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
