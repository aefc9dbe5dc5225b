"""How much faster pruned models are: dense and pruned models timed in turns, one JSON line per measurement.

    python scripts/bench_latency.py --out results/latency.jsonl                 # measure
    python scripts/bench_latency.py --out results/latency.jsonl --table         # a Markdown table of what was measured

Weights and images are random: they say nothing about accuracy, and time does not depend on them. Channels are ranked
by magnitude, so that a model is pruned in seconds. Every line compares one pruned model with the dense one in the same
process, in turns; `speedup` is the median of the ratios of the rounds, `spread` half their interquartile range.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import common
import timm
import torch
from torch import nn

from baselines.magnitude import l1
from jbrprune import prune
from jbrprune.budgets.selection import Floors
from jbrprune.evaluation.latency import describe_hardware, time_in_turns

MODELS = ("resnet50", "vit_small_patch16_224", "efficientnet_lite0", "mobilenetv2_100")
SETTINGS: dict[str, dict[str, object]] = {
    "macs=0.5, round_to=1": {"macs": 0.5},
    "macs=0.5, round_to=8": {"macs": 0.5, "floors": Floors(round_to=8)},
    "latency=0.5": {"latency": 0.5},
}


def machine(device: torch.device) -> dict[str, object]:
    """What timings depend on, beside the models."""
    threads, hardware = torch.get_num_threads(), describe_hardware(device)
    return {"device": device.type, "hardware": hardware, "threads": threads, "torch": torch.__version__}


def pruned(dense: nn.Module, images: torch.Tensor, setting: str, steps: int) -> tuple[nn.Module, dict[str, object]]:
    """The pruned model, and what is known of it."""
    began = time.perf_counter()
    options = {"repair": None, "progress": False, "steps": None if "latency" in SETTINGS[setting] else steps}
    result = prune(dense, images, criterion=l1, **SETTINGS[setting], **options)  # type: ignore[arg-type]
    report = result.report
    facts = {
        "round_to": report.settings["round_to"],
        "macs": round(report.kept, 4),
        "params": round(report.pruned.params / report.dense.params, 4),
        "planned": report.steps[-1].relative_latency,
        "prune_seconds": round(time.perf_counter() - began, 1),
    }
    return result.model, facts


def measured(
    dense: nn.Module, model: nn.Module, images: torch.Tensor, mode: str, seconds: float
) -> dict[str, float | int | str]:
    """Both models in turns, in eager mode or compiled."""
    if mode == "compile":
        dense, model = (torch.compile(m, dynamic=False) for m in (dense, model))  # type: ignore[assignment]
    found = time_in_turns([model, dense], images, seconds=seconds, threads=torch.get_num_threads())
    after, before = found.latencies
    return {
        "dense_ms": round(before.median_ms, 3),
        "pruned_ms": round(after.median_ms, 3),
        "speedup": round(found.ratios[1], 3),
        "spread": round(found.spreads[1], 3),
        "clock": before.clock,
    }


def run(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One line per model, setting, mode and batch that is not there yet."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    here = _place(machine(device))
    done = {(*_place(row), *_what(row)) for row in common.lines(arguments.out)}
    for name in arguments.models:
        torch.manual_seed(0)
        dense = timm.create_model(name).to(device).eval()
        images = torch.randn(max(arguments.batch_sizes), 3, 224, 224, device=device)
        for setting in arguments.settings:
            wanted = [(mode, batch) for batch in arguments.batch_sizes for mode in arguments.modes]
            wanted = [(mode, batch) for mode, batch in wanted if (*here, name, setting, mode, batch) not in done]
            if not wanted:
                continue
            model, facts = pruned(dense, images[:2], setting, arguments.steps)
            for mode, batch in wanted:
                yield {
                    **{"model": name, "setting": setting, "mode": mode, "batch": batch, **facts},
                    **measured(dense, model, images[:batch], mode, arguments.seconds),
                    **{**machine(device), "timm": version("timm")},
                    **{"commit": common.commit(), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")},
                }
                torch.compiler.reset()


def _place(row: Mapping[str, object]) -> tuple:
    """Where it was measured: times of different places are never put beside each other."""
    return row["device"], row["hardware"], row["threads"], row["torch"]


def _what(row: Mapping[str, object]) -> tuple:
    return row["model"], row["setting"], row["mode"], row["batch"]


def table(rows: list[dict]) -> str:
    """Speed-up and spread by batch and mode, one table for every machine and number of threads."""
    places = dict.fromkeys(_place(row) for row in rows)
    tables = {place: _table([row for row in rows if _place(row) == place]) for place in places}
    return "\n\n".join(
        f"{d}, {hardware}, threads: {threads}, torch {version}\n\n{t}"
        for (d, hardware, threads, version), t in tables.items()
    )


def _table(rows: list[dict]) -> str:
    columns = sorted({(row["batch"], row["mode"]) for row in rows}, key=lambda c: (c[0], c[1] != "eager"))
    head = "| model | setting | round_to | MACs | " + " | ".join(f"batch {b}, {m}" for b, m in columns) + " |"
    lines = [head, "|" + "---|" * (4 + len(columns))]
    for name, setting in dict.fromkeys((row["model"], row["setting"]) for row in rows):
        own = {(r["batch"], r["mode"]): r for r in rows if (r["model"], r["setting"]) == (name, setting)}
        first = next(iter(own.values()))
        cells = [f"{own[c]['speedup']:.2f} ± {own[c]['spread']:.2f}" if c in own else "" for c in columns]
        lines.append(f"| {name} | {setting} | {first['round_to']} | {first['macs']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=30, help="time for all rounds of one measurement")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(common.lines(arguments.out)))
        return
    warnings.filterwarnings("ignore", message=".*No CUDA runtime is found.*")
    for line in run(arguments):
        common.append(arguments.out, [line])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
