"""How much faster pruned models are: dense and pruned models timed in turns, one JSON line per measurement.

    python scripts/bench_latency.py --out results/latency.jsonl                 # measure
    python scripts/bench_latency.py --out results/latency.jsonl --table         # a Markdown table of what was measured

Weights and images are random: they say nothing about accuracy, and time does not depend on them. Channels are ranked
by magnitude, so that a model is pruned in seconds. Every line compares one pruned model with the dense one in the same
process, in turns; `speedup` is the median of the ratios of the rounds, `spread` half their interquartile range.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from common import append, commit, lines, make_parser, markdown
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


def prune_once(dense: nn.Module, images: torch.Tensor, setting: str) -> tuple[nn.Module, dict[str, object]]:
    """The pruned model, and what is known of it."""
    began = time.perf_counter()
    budget, round_to = SETTINGS[setting]
    result = prune(dense, images, **budget, criterion=l1, floors=Floors(round_to=round_to), repair=None, progress=False)
    report = result.report
    return result.model, {
        "round_to": round_to,
        "macs": round(report.kept, 4),
        "params": round(report.pruned.params / report.dense.params, 4),
        "planned": report.steps[-1].relative_latency,
        "prune_seconds": round(time.perf_counter() - began, 1),
    }


def measure(dense: nn.Module, model: nn.Module, images: torch.Tensor, mode: str, args: argparse.Namespace) -> dict:
    """Both models in turns, in eager mode or compiled."""
    models = [model, dense]
    if mode == "compile":
        models = [torch.compile(one, dynamic=False) for one in models]
    found = time_in_turns(models, images, seconds=args.seconds, threads=args.threads)
    after, before = found.latencies
    return {
        "dense_ms": round(before.median_ms, 3),
        "pruned_ms": round(after.median_ms, 3),
        "speedup": round(found.ratios[1], 3),
        "spread": round(found.spreads[1], 3),
        "clock": after.clock,
    }


def describe_place(device: torch.device, threads: int) -> dict[str, object]:
    """Where it is measured: times of different places are never put beside each other."""
    hardware = describe_hardware(device)
    return {"device": device.type, "hardware": hardware, "threads": threads, "torch": torch.__version__}


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One line per model, setting, mode and batch that is not there yet."""
    device = torch.device(args.device)
    here = describe_place(device, args.threads)
    done = {(*_place(row), *_what(row)) for row in lines(args.out)}
    for name in args.models:
        torch.manual_seed(0)
        dense = timm.create_model(name).to(device).eval()
        images = torch.randn(max(args.batch_sizes), 3, 224, 224, device=device)
        for setting in args.settings:
            pairs = itertools.product(args.batch_sizes, args.modes)
            cells = [{"model": name, "setting": setting, "mode": mode, "batch": batch} for batch, mode in pairs]
            cells = [cell for cell in cells if (*_place(here), *_what(cell)) not in done]
            if not cells:
                continue
            model, facts = prune_once(dense, images[:2], setting)
            for cell in cells:
                found = measure(dense, model, images[: cell["batch"]], cell["mode"], args)
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                yield {**cell, **facts, **found, **here, "timm": version("timm"), "commit": commit(), "time": now}
                torch.compiler.reset()


def _place(row: Mapping[str, object]) -> tuple:
    return row["device"], row["hardware"], row["threads"], row["torch"]


def _what(row: Mapping[str, object]) -> tuple:
    return row["model"], row["setting"], row["mode"], row["batch"]


def table(rows: list[dict]) -> str:
    """Speed-up and spread by batch and mode, one table for every machine and number of threads."""
    parts = []
    for place in dict.fromkeys(map(_place, rows)):
        own = [row for row in rows if _place(row) == place]
        columns = sorted({(row["batch"], row["mode"]) for row in own}, key=lambda c: (c[0], c[1] != "eager"))
        grid = []
        for name, setting in dict.fromkeys((row["model"], row["setting"]) for row in own):
            found = {(r["batch"], r["mode"]): r for r in own if (r["model"], r["setting"]) == (name, setting)}
            first = next(iter(found.values()))
            cells = [f"{found[c]['speedup']:.2f} ± {found[c]['spread']:.2f}" if c in found else "" for c in columns]
            grid.append([name, setting, first["round_to"], f"{first['macs']:.2f}", *cells])
        device, hardware, threads, torch_version = place
        head = ["model", "setting", "round_to", "MACs", *(f"batch {batch}, {mode}" for batch, mode in columns)]
        title = f"{device}, {hardware}, threads: {threads}, torch {torch_version}"
        parts.append(f"{title}\n\n{markdown(head, grid)}")
    return "\n\n".join(parts)


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
        append(args.out, [line])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
