"""What a relevance pass costs: time and memory beside a training step, memory over many batches.

    python scripts/bench_relevance.py --models resnet50 vit_small_patch16_224 --batch-sizes 8 --threads 1

Four methods see the same batch, in eval mode, with random weights:

* ``consumer``, ``all``: one batch through `jbrprune.criteria.relevance`, at that site, added to the sums; what is done
  once per call (the check on the first batch) is not in it.
* ``training``: forward, and a backward that makes the gradient of every parameter: the yardstick of cost.
* ``published``: the method of the published code (arXiv 2512.11089): gradient of the mean cross-entropy over the batch
  by all weights, then (sum of w * g)^2 for every output and input channel of every convolution and linear layer.

Time: all methods in one process, in turn (ABCDABCD...), so that what disturbs the machine disturbs all of them; the
median of the rounds, and the ratio to ``training`` as the median (and quartiles) of the ratios within a round.
``--clock cpu`` counts processor time instead of wall time, for a machine that is shared with others (one thread).
Memory: every method in a process of its own, the highest resident set during one batch above the resident set
before (model and images loaded, one batch of one image done). The peak is reset through /proc/self/clear_refs, and
malloc is told to give memory back at once (``MALLOC_MMAP_THRESHOLD_``), so that the resident set is what is in use; on
CUDA, ``max_memory_allocated``. Growth: the resident set after 2 and after 20 batches of two images.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.criteria.relevance import Relevance, relevances
from jbrprune.criteria.scores import Accumulator
from jbrprune.data.batches import Batch
from jbrprune.data.distributed import numbered
from jbrprune.structure.discovery import find_groups

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
METHODS = ("training", "published", "consumer", "all")
MEMORY_METHODS = ("training", "consumer", "all")
QUIET_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    arguments = _parsed()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments)))
        return
    rows = []
    for name, size in itertools.product(arguments.models, arguments.batch_sizes):
        arguments.model, arguments.batch_size = name, size
        times = _in_child(arguments, "time") if "time" in arguments.what else {}
        peaks = {}
        if "memory" in arguments.what:
            peaks = {m: _in_child(arguments, "memory", m, QUIET_MALLOC)["peak_mib"] for m in MEMORY_METHODS}
        growth = _in_child(arguments, "growth", "consumer", QUIET_MALLOC) if "growth" in arguments.what else {}
        rows += [_row(arguments, method, times, peaks, growth) for method in METHODS]
        _table(rows[-len(METHODS) :])
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        Path(arguments.out).write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed(arguments: argparse.Namespace) -> dict:
    """Method -> seconds per round."""
    model, images = _prepared(arguments)
    steps = {method: _step(method, model, images) for method in METHODS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(arguments.repeats):
        for method, step in steps.items():
            start = CLOCKS[arguments.clock]()
            step()
            _wait(images)
            seconds[method].append(CLOCKS[arguments.clock]() - start)
    return seconds


def peak_memory(arguments: argparse.Namespace) -> dict:
    """The highest memory during one batch above what was there before, in MiB."""
    model, images = _prepared(arguments)
    _step(arguments.method, model, images[:1])()
    step = _step(arguments.method, model, images, first=images[:1])
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    gc.collect()  # the dependency graph of find_groups leaves cycles behind
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _resident("VmRSS")
    step()
    return {"peak_mib": _resident("VmHWM") - before}


def growth(arguments: argparse.Namespace) -> dict:
    """Resident memory after 2 and after 20 batches, in MiB."""
    model, images = _prepared(arguments)
    step = _step(arguments.method, model, images[:2])
    gc.collect()
    after = {}
    for number in range(1, 21):
        step()
        after[number] = torch.cuda.memory_allocated() / 2**20 if images.is_cuda else _resident("VmRSS")
    return {"after_2_mib": after[2], "after_20_mib": after[20]}


CHILDREN: dict[str, Callable[[argparse.Namespace], dict]] = {"time": timed, "memory": peak_memory, "growth": growth}


def _step(method: str, model: nn.Module, images: Tensor, first: Tensor | None = None) -> Callable[[], object]:
    """One batch of a method. Of a relevance pass, the first batch is gone through here, as it is checked once."""
    if method == "training":
        return lambda: _training(model, images)
    if method == "published":
        return lambda: _published(model, images)
    groups = find_groups(model, images[:2].repeat(2, 1, 1, 1)[:2]).groups
    accumulator = Accumulator(groups, None)

    def batches() -> Iterator[Batch]:
        yield Batch(images[:1] if first is None else first)
        yield from itertools.repeat(Batch(images))

    stream = relevances(model, numbered(batches()), groups, Relevance(site=method))  # type: ignore[arg-type]
    next(stream)
    return lambda: accumulator.add(next(stream)[0])


def _training(model: nn.Module, images: Tensor) -> None:
    logits = model(images)
    F.cross_entropy(logits, logits.detach().argmax(1)).backward()
    model.zero_grad(set_to_none=True)


def _published(model: nn.Module, images: Tensor) -> list[Tensor]:
    logits = model(images)
    F.cross_entropy(logits, logits.detach().argmax(1)).backward()
    squares = []
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                products = (module.weight * module.weight.grad).flatten(2).sum(-1) if module.weight.dim() > 2 else None
                products = module.weight * module.weight.grad if products is None else products
                squares += [products.sum(1).square(), products.sum(0).square()]
    model.zero_grad(set_to_none=True)
    return squares


def _prepared(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval().to(arguments.device)
    size = model.default_cfg["input_size"]  # type: ignore[index]
    return model, torch.randn(arguments.batch_size, *size, device=arguments.device)  # type: ignore[misc]


def _in_child(arguments: argparse.Namespace, what: str, method: str = "", environment: dict | None = None) -> dict:
    command = [sys.executable, __file__, "--child", what, "--method", method, "--model", arguments.model]
    for name in ("batch_size", "threads", "repeats", "device", "clock"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, env=os.environ | (environment or {}), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _row(arguments: argparse.Namespace, method: str, times: dict, peaks: dict, growth: dict) -> dict:
    row = {"model": arguments.model, "batch_size": arguments.batch_size, "threads": arguments.threads}
    row |= {"device": arguments.device, "clock": arguments.clock, "method": method}
    if times:
        row["seconds"] = statistics.median(times[method])
        for other in ("training", "published"):
            ratios = [a / b for a, b in zip(times[method], times[other], strict=True)]
            row[f"to_{other}"] = statistics.median(ratios)
            row[f"to_{other}_quartiles"] = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
        row["rounds"] = len(times[method])
    if method in peaks:
        row |= {"peak_mib": peaks[method], "peak_to_training": peaks[method] / peaks["training"]}
    return row | (growth if method == "consumer" else {})


def _table(rows: list[dict]) -> None:
    for row in rows:
        cells = [f"{row['model']:24} batch {row['batch_size']:3} {row['method']:10}"]
        if "seconds" in row:
            cells.append(f"{1e3 * row['seconds']:8.1f} ms")
            for other in ("training", "published"):
                low, high = row[f"to_{other}_quartiles"]
                cells.append(f"/{other} {row[f'to_{other}']:.3f} [{low:.3f}, {high:.3f}]")
        if "peak_mib" in row:
            cells.append(f"peak {row['peak_mib']:7.1f} MiB, {row['peak_to_training']:.3f} of training")
        if "after_2_mib" in row:
            cells.append(f"after 2 / 20 batches {row['after_2_mib']:.1f} / {row['after_20_mib']:.1f} MiB")
        print("  ".join(cells), file=sys.stderr, flush=True)


def _resident(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--what", nargs="+", default=["time", "memory", "growth"], choices=list(CHILDREN))
    parser.add_argument("--out", help="also write the JSON lines here")
    for name, kind in (("--child", str), ("--method", str), ("--model", str), ("--batch-size", int)):
        parser.add_argument(name, type=kind, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
