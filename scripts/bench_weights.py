"""What scores of single weights cost: time and memory beside a training step and beside vmap(grad).

    python scripts/bench_weights.py --models resnet50 vit_small_patch16_224 --batch-sizes 4 8 --threads 2

Four methods see the same batch, in eval mode (batch norms with stored statistics), with random weights:

* ``second_moment``: one batch through `weight_scores`, added to the sums; what is done once
  per call (the comparison with autograd on two images) is not in its time, but in a field of its own,
  ``check_to_training``.
* ``batched``: the same call with ``statistic="batched"``, which needs no gradient per sample.
* ``training``: forward, a backward that makes the gradient of every parameter, a step of SGD: the yardstick of cost.
* ``vmap``: squares of per-sample gradients by ``torch.func.vmap(grad)``, ``--chunk`` samples at a time, attention
  unfused because the fused one has no batching rule.

Time: all methods in one process, in turn (ABCDABCD...), so that what disturbs the machine disturbs all of them; the
median of the rounds, and the ratio to ``training`` and to ``vmap`` as the median (and quartiles) of the ratios within
a round; by wall clock, and in processor time of all threads, which is steadier on a machine that is shared.
Memory: every method in a process of its own, the highest resident set during the whole call (with its check and its
sums) or step above the resident set before (model and images loaded). The peak is reset through
/proc/self/clear_refs, and malloc is told to give memory back at once. ``--what layers`` lists how long each kind of
layer takes, as share of the pass and in 10^9 multiply-accumulates per second.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from jbrprune.criteria import squares
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Seconds = dict[str, float]
METHODS = ("training", "second_moment", "batched", "vmap")
# Threads that wait sleep instead of spinning: on a shared machine, spinning takes time from those that work.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive"}
QUIET_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    arguments = _parsed()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments)))
        return
    for name, size in itertools.product(arguments.models, arguments.batch_sizes):
        arguments.model, arguments.batch_size = name, size
        times = _in_child(arguments, "time") if "time" in arguments.what else {}
        peaks = {}
        if "memory" in arguments.what:
            peaks = {m: _in_child(arguments, "memory", m, QUIET_MALLOC)["peak_mib"] for m in arguments.methods}
        rows = [_row(arguments, method, times, peaks) for method in arguments.methods] if times or peaks else []
        rows += _in_child(arguments, "layers")["rows"] if "layers" in arguments.what else []
        for row in rows:
            print(json.dumps(row), flush=True)
            if arguments.out:
                with Path(arguments.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")


def timed(arguments: argparse.Namespace) -> dict:
    """Method -> seconds per round by every clock; ``check`` -> those of what is done once per call."""
    model, images = _prepared(arguments)
    seconds: dict[str, list[Seconds]] = defaultdict(list)
    for number in range(arguments.repeats + 1):
        for method in arguments.methods:
            found = STEPS[method](model, images, arguments)
            for name, value in found.items() if number else ():  # the first round is a warm-up
                seconds[name].append(value)
    return seconds


def peak_memory(arguments: argparse.Namespace) -> dict:
    """The highest memory during a whole call above what was there before, in MiB."""
    model, images = _prepared(arguments)
    with torch.no_grad():
        model(images[:1])  # loads kernels
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _resident("VmRSS")
    STEPS[arguments.method](model, images, arguments)
    return {"peak_mib": _resident("VmHWM") - before}


def by_layer(arguments: argparse.Namespace) -> dict:
    """Time of the squares for every kind of layer, largest first, and of all else."""
    model, images = _prepared(arguments)
    spent: dict[tuple, list[float]] = defaultdict(list)
    adding = squares.add_matrix_squares

    def watched(sums: Tensor, factors: Any, samples: int, place: Any) -> None:
        start = _now()
        adding(sums, factors, samples, place)
        if samples == len(images):
            f = factors[0]
            spent[tuple(sums.shape), f.positions, f.taps, f.groups].append(_since(start)["cpu"])

    squares.add_matrix_squares = watched
    _squares(model, images[:2], arguments)
    spent.clear()
    total = [_squares(model, images, arguments)["second_moment"]["cpu"] for _ in range(arguments.repeats)]
    rows = []
    for (shape, positions, taps, groups), times in spent.items():
        macs = shape[0] * shape[1] * positions * len(images)
        rows.append(
            {
                "model": arguments.model,
                "batch_size": len(images),
                "threads": arguments.threads,
                "method": "layers",
            }
            | {"weight": shape, "positions": positions, "taps": taps, "groups": groups}
            | {"layers": len(times) // arguments.repeats}
            | {"cpu_seconds": round(sum(times) / arguments.repeats, 5), "cpu_share": round(sum(times) / sum(total), 4)}
            | {"gmacs_per_second": round(macs / statistics.median(times) / 1e9, 1)}
        )
    return {"rows": sorted(rows, key=lambda row: -row["cpu_share"])}


CHILDREN: dict[str, Callable[[argparse.Namespace], dict]] = {"time": timed, "memory": peak_memory, "layers": by_layer}


def _now() -> Seconds:
    return {name: clock() for name, clock in CLOCKS.items()}


def _since(start: Seconds) -> Seconds:
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def _training(model: nn.Module, images: Tensor, arguments: argparse.Namespace) -> dict[str, Seconds]:
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-12)
    start = _now()
    logits = model(images)
    F.cross_entropy(logits, logits.detach().argmax(1)).backward()
    optimiser.step()
    seconds = _since(start)
    optimiser.zero_grad()
    return {"training": seconds}


def _squares(
    model: nn.Module, images: Tensor, arguments: argparse.Namespace, statistic: str = "second_moment"
) -> dict[str, Seconds]:
    took: list[Seconds] = []

    def data() -> Iterator[Tensor]:
        for batch in (images[:1], images):
            start = _now()
            yield batch
            took.append(_since(start))

    how = Relevance(statistic=statistic)  # type: ignore[arg-type]
    weight_scores(model, data(), how, max_memory=arguments.max_memory << 20)
    return {statistic: took[1]} | ({"check": took[0]} if statistic == "second_moment" else {})


def _vmap(model: nn.Module, images: Tensor, arguments: argparse.Namespace) -> dict[str, Seconds]:
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        logits = functional_call(model, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, logits.detach().argmax(1))

    start = _now()
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for some in images.split(arguments.chunk):
        for name, gradient in vmap(grad(loss), in_dims=(None, 0))(parameters, some).items():
            sums[name] += gradient.square_().sum(0)
    seconds = _since(start)
    for module in fused:
        module.fused_attn = True  # type: ignore[assignment]
    return {"vmap": seconds}


STEPS: dict[str, Callable[[nn.Module, Tensor, argparse.Namespace], dict[str, Seconds]]] = {
    "training": _training,
    "second_moment": _squares,
    "batched": lambda model, images, arguments: _squares(model, images, arguments, "batched"),
    "vmap": _vmap,
}


def _prepared(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    warnings.filterwarnings("ignore", message="There is a performance drop")
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    size = arguments.image_size or model.default_cfg["input_size"][-1]  # type: ignore[index]
    return model, torch.randn(arguments.batch_size, 3, size, size)


def _in_child(arguments: argparse.Namespace, what: str, method: str = "", environment: dict | None = None) -> dict:
    command = [sys.executable, __file__, "--child", what, "--method", method, "--model", arguments.model]
    for name in ("batch_size", "threads", "repeats", "chunk", "max_memory", "image_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--methods", *arguments.methods]
    environment = os.environ | QUIET_THREADS | (environment or {})
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _row(arguments: argparse.Namespace, method: str, times: dict, peaks: dict) -> dict:
    row = {"model": arguments.model, "batch_size": arguments.batch_size, "threads": arguments.threads}
    row |= {"method": method, "max_memory_mib": arguments.max_memory}
    row |= {"chunk": arguments.chunk} if method == "vmap" else {}
    for clock in CLOCKS if times else ():
        own, yard = ([t[clock] for t in times.get(name, ())] for name in (method, "training"))
        row |= {f"{clock}_seconds": round(statistics.median(own), 4), "rounds": len(own)}
        row |= _ratio(f"{clock}_to_training", own, yard)
        row |= _ratio(f"{clock}_to_vmap", own, [t[clock] for t in times.get("vmap", ())])
        if method == "second_moment":
            row |= _ratio(f"{clock}_check_to_training", [t[clock] for t in times["check"]], yard)
    if peaks:
        row["peak_mib"] = round(peaks[method], 1)
        row |= {f"peak_to_{o}": round(peaks[method] / peaks[o], 3) for o in ("training", "vmap") if o in peaks}
    return row


def _ratio(name: str, numerator: list[float], denominator: list[float]) -> dict:
    if not denominator:
        return {}
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
    return {name: round(statistics.median(ratios), 3), f"{name}_quartiles": [round(q, 3) for q in quartiles]}


def _resident(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=2, help="samples per call of vmap")
    parser.add_argument("--max-memory", type=int, default=256, help="cap of weight_scores, in MiB")
    parser.add_argument("--image-size", type=int, default=0, help="0: the model's own")
    parser.add_argument("--what", nargs="+", default=["time", "memory"], choices=list(CHILDREN))
    parser.add_argument("--out", help="append the JSON lines to this file as well")
    for name, kind in (("--child", str), ("--method", str), ("--model", str), ("--batch-size", int)):
        parser.add_argument(name, type=kind, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
