"""What criteria and a whole pruning cost: time and memory as ratios to one training pass over the same images.

    python scripts/bench_cost.py --model resnet50 --weights random --data fashion_mnist --root FOLDER \
        --images 256 --threads 1 --what jbr taylor weights/jbr_projection published prune --out results/criteria.jsonl
    python scripts/bench_cost.py --out results/criteria.jsonl --table

What is measured: a criterion of `baselines.CRITERIA`; one of single weights (``weights/NAME``); ``published``, the
method of the published code (arXiv 2512.11089: gradient of the mean cross-entropy over a batch, then (sum of w g)^2 for
every input and output channel); ``tpv`` and ``tpv_published``, one draw per image of sigma^2 E_x |J(x)|^2 by
`jbrprune.tpv.trace_form` and by the published code, which makes the gradient of one image and one vector of random
signs per backward (draws of both have the same deviation); ``prune``, a whole `jbrprune.prune` to ``--macs`` with its
repairs, with the shares of its parts and the ratio of all to its scoring passes; ``tp_prune``, torch-pruning's own
pruner by its Taylor importance (with labels) in as many steps, batch norms recalibrated after each, to that share by
removing 1 - sqrt(macs) of the channels of every layer. ``--autocast`` runs passes, the yardstick's as well, in
bfloat16. The yardstick is one pass in eval mode, forward and a backward that makes the gradient of every parameter.
Images without labels all get the first one.

    python scripts/bench_cost.py --device cuda --all --out gpu.jsonl

measures `PASSES` on each of `MODELS` in float32 and in bfloat16 (batches of 64), whole prunes on the first two, once,
and the latency of these two before and after (`bench_latency.py`; on a GPU in float16, channels last; compiled with 32
images only) in gpu_latency.jsonl. Images are crops of photographs at 224 x 224 (``--size``), unless ``--data`` is
given.

Time: in a round the yardstick is timed first and last, and everything else in between, in one process, so that what
disturbs the machine disturbs all; a round's ratio is to the mean of its two yardsticks. Given are median and quartiles
over the rounds; an untimed round, but of whole prunes, goes before. The clock is processor time; with ``--device cuda``
wall time, until the GPU has done the work. Units are found beforehand: all criteria need them.

Memory (``--memory``): each in a process of its own, the highest memory in use above what was in use before (model and
images loaded, one image gone forward and backward), as a ratio to that of the yardstick. Called with several numbers of
images it shows whether memory grows with them. On Linux the peak is reset through /proc/self/clear_refs, and malloc is
told to give memory back at once; on CUDA it is ``max_memory_allocated``.

Weights do not matter to the time, but to ``jbr_published``, which leaves images out: its images still go forward and
backward.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import bench_latency
import torch
from benchmark import load, load_calibration, show_labels
from common import append, describe_call, done, exit_on_error, key_of, lines, make_parser, markdown
from protocols import PROTOCOLS, Setup, add_setup_arguments, read_setup
from torch import nn
from torch.nn import functional as F

from baselines import CRITERIA, LABELS, WEIGHT_CRITERIA
from baselines.published import draw_as_published, square_channels
from baselines.torch_pruning_shipped import prune_by_taylor
from jbrprune import prune
from jbrprune.budgets.budget import schedule
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import JBRError
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.pruning.prepare import provenance
from jbrprune.sparsity.masks import weights_of
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group
from jbrprune.tpv import Isotropic, trace_form

WHOLE = ("prune", "tp_prune")
KNOWN = (*CRITERIA, *(f"weights/{n}" for n in WEIGHT_CRITERIA), "published", *WHOLE, "tpv", "tpv_published")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
YARDSTICK = "training"
MODELS = ("resnet50", "vit_small_patch16_224", "vit_base_patch16_224", "convnext_tiny")
PASSES = ("jbr", "taylor", "weights/jbr_projection", "published")
Step, Batches, Groups = Callable[[], object], Sequence[Batch], Sequence[Group]


# --- what is measured ------------------------------------------------------------------------------


def make_step(name: str, model: nn.Module, batches: Batches, groups: Groups, macs=0.5, autocast=None) -> Step:
    """One of `KNOWN`, or the yardstick, over all images; whole prunes to a share of the MACs."""
    images = torch.cat([batch.images for batch in batches])
    if name in (YARDSTICK, "published"):
        return lambda: train_once(model, batches, square_channels if name == "published" else None, autocast)
    if name == "prune":
        return lambda: prune(model, show_labels("jbr", batches), macs=macs, images=None, progress=False)
    if name == "tp_prune":
        return lambda: prune_by_taylor(model, batches, 1 - macs**0.5, len(schedule(macs)))
    if name == "tpv":
        how = {"method": "projection", "rtol": 0.0, "validity": False, "progress": False}
        return lambda: trace_form(model, images, Isotropic(1.0), batch_size=len(batches[0]), **how)
    if name == "tpv_published":
        return lambda: draw_as_published(model, images)
    kind, _, own = name.rpartition("/")
    shown, criterion = show_labels(own, batches), (WEIGHT_CRITERIA if kind else CRITERIA)[own]
    if isinstance(criterion, Relevance):
        criterion = replace(criterion, autocast=autocast)
    if kind and isinstance(criterion, Relevance):
        return lambda: weight_scores(model, shown, criterion)
    return lambda: criterion(model, shown, list(weights_of(model)) if kind else groups)


def train_once(model: nn.Module, batches: Batches, use=None, autocast=None) -> None:
    """Forward and backward to all parameters over all images; ``use`` is shown the gradients of every batch."""
    with preserve.inference_state(model, gradients=True):
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = preserve.device_of(model)
        for batch in (batch.to(device) for batch in batches):
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                loss = F.cross_entropy(logits_of(model(batch.images)), batch.labels)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            if use:
                use(model, dict(zip(leaves, gradients)))


# --- time ------------------------------------------------------------------------------------------


def clock() -> str:
    """``process_time``, or ``wall`` where work is done on a GPU, whose time is not the processor's."""
    return "wall" if torch.cuda.is_initialized() else "process_time"


def time_step(step: Step) -> float:
    """Seconds by the `clock`, by which reports go meanwhile; of a GPU, until it has done the work."""
    now, wait = time.process_time, lambda: None
    if clock() == "wall":
        now, wait = time.perf_counter, torch.cuda.synchronize
    wait()
    start = now()
    with mock.patch("time.perf_counter", now):
        step()
    wait()
    return now() - start


def time_in_rounds(steps: Mapping[str, Step], yardstick: Step, rounds: int) -> tuple[dict[str, list[tuple]], float]:
    """Name -> ratio and seconds of every round, and the median of the yardsticks."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    yardsticks = []
    for _ in range(rounds):
        first = time_step(yardstick)
        seconds = {name: time_step(step) for name, step in steps.items()}
        yardsticks.append((first + time_step(yardstick)) / 2)
        for name, spent in seconds.items():
            found[name].append((spent / yardsticks[-1], spent))
    return found, statistics.median(yardsticks)


# --- memory ----------------------------------------------------------------------------------------


def measure_apart(name: str, *shown: Any) -> float:
    """`measure_peak` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")  # MALLOC is read when a process starts
    with mock.patch.dict(os.environ, MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(measure_peak, name, torch.get_num_threads(), *shown).result()


def measure_peak(name: str, threads: int, *shown: Any) -> float:
    """The highest memory during a step above what was in use before, in MiB; of what `load_all` loads."""
    torch.set_num_threads(threads)
    model, batches, groups = load_all(*shown)
    step = make_step(name, model, batches, groups)
    train_once(model, [batches[0].map(lambda tensor: tensor[:1])])  # loads kernels
    gc.collect()  # the dependency graph of find_groups leaves cycles behind
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@lru_cache(maxsize=1)
def load_all(setup: Setup, images: int, size: int | None) -> tuple[nn.Module, list[Batch], Sequence[Group]]:
    """The dense model, images with labels, resized where a size is given, and the units."""
    model, batches = load(setup)[0], load_calibration(setup, images, 0)
    batches = [replace(b, labels=torch.zeros(len(b)).long()) if b.labels is None else b for b in batches]
    if size:
        batches = [replace(b, images=F.interpolate(b.images, (size, size), mode="bilinear")) for b in batches]
    example = batches[0].images[:2].to(preserve.device_of(model))
    return model, batches, find_groups(copy_model(model), example).groups


# --- lines -----------------------------------------------------------------------------------------


def make_records(args: argparse.Namespace, setup: Setup) -> list[dict[str, Any]]:
    """One line each; what fails has a reason instead of numbers."""
    shown = setup, args.images, args.size
    model, batches, groups = load_all(*shown)
    steps, failed, parts, autocast = {}, {}, {}, torch.bfloat16 if args.autocast else None
    for name in args.what:
        steps[name] = make_step(name, model, batches, groups, args.macs, autocast)
        if name == "prune":
            steps[name] = lambda step=steps[name]: parts.update(prune=step().report.seconds)
        try:
            if name not in WHOLE:
                steps[name]()
        except JBRError as error:
            failed[name] = f"{type(error).__name__}: {error}"
            del steps[name]
    yardstick = make_step(YARDSTICK, model, batches, groups, autocast=autocast)
    yardstick()
    found, training = time_in_rounds(steps, yardstick, args.rounds)
    peaks = {name: measure_apart(name, *shown) for name in (YARDSTICK, *steps)} if args.memory else {}
    shared = {
        **{"macs": args.macs, "autocast": args.autocast, "size": args.size, **setup.described()},
        **{"images": args.images, "batch_size": len(batches[0]), "rounds": args.rounds, "clock": clock()},
        **{"training_seconds": training, "training_peak_mib": peaks.get(YARDSTICK), **describe_call()},
        **{name: value for name, value in provenance(0, torch.device(setup.device)).items() if name != "seed"},
    }
    keys, made = list_keys(args, setup), []
    for name, pairs in found.items():
        ratios, seconds = zip(*pairs, strict=True)
        quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else [*ratios, *ratios]
        line = {"key": keys[name], "criterion": name, "labels": name.rpartition("/")[2] in LABELS}
        line |= {"ratio": statistics.median(ratios), "quartiles": quartiles, "seconds": statistics.median(seconds)}
        line |= {"parts": parts[name]} if name in parts else {}
        line |= {"peak_mib": peaks[name], "peak_ratio": peaks[name] / peaks[YARDSTICK]} if peaks else {}
        made.append(line | shared)
    made += [{"key": keys[name], "criterion": name, "failed": reason, **shared} for name, reason in failed.items()]
    return made


def list_keys(args: argparse.Namespace, setup: Setup) -> dict[str, str]:
    """What is measured -> what its line is recognised by."""
    own = [setup.described(), args.images, args.rounds, torch.get_num_threads()]
    own += [name for name in ("memory", "autocast") if getattr(args, name)] + [args.size] * bool(args.size)
    return {name: key_of([own, name, *([args.macs] if name in WHOLE else [])]) for name in args.what}


def show(path: Path) -> str:
    """Everything by its ratio, the cheapest first, as Markdown."""
    found = {line["key"]: line for line in lines(path)}.values()
    rows = []
    made = (line for line in found if "failed" not in line)
    for line in sorted(made, key=lambda line: (line["model"], line["images"], line["ratio"])):
        name, (low, high) = line["criterion"] + ", bfloat16" * line.get("autocast", False), line["quartiles"]
        cells = [line["model"], line["images"], name, "yes" if line["labels"] else ""]
        peak = f"{line['peak_mib']:.0f} ({line['peak_ratio']:.2f})" if "peak_mib" in line else ""
        rows.append([*cells, f"{line['ratio']:.2f} ({low:.2f}-{high:.2f})", peak])
    head = ["model", "images", "criterion", "labels", "ratio of time (quartiles)", "peak in MiB (ratio)"]
    for line in (line for line in found if "parts" in line):
        parts, whole = line["parts"], line["parts"]["total"]
        shares = ", ".join(f"{name} {seconds / whole:.2f}" for name, seconds in parts.items() if name != "total")
        ratio = f"{whole / parts['scoring']:.2f} times its scoring"
        rows.append([line["model"], line["images"], f"of {line['criterion']}: {shares}", "", ratio, ""])
    failed = [f"\n{line['criterion']}: {line['failed']}" for line in found if "failed" in line]
    return "\n".join([markdown(head, rows), *failed])


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_setup_arguments(parser, weights="random")
    default = list(PROTOCOLS["budget"].criteria)
    parser.add_argument("--what", nargs="+", default=default, choices=KNOWN, metavar="NAME", help="see above")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, help="resize the images to so many pixels; default: as the data are")
    parser.add_argument("--macs", type=float, default=0.5, help="share that whole prunes keep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure peaks of memory as well")
    parser.add_argument("--autocast", action="store_true", help="passes in bfloat16")
    parser.add_argument("--all", action="store_true", help="everything on several models; see above")
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    args = parser.parse_args(argv)
    with exit_on_error("bench_cost.py"):
        if not args.table:
            for own in plan(args) if args.all else [args]:
                run(own)
        print(show(args.out))
    if args.all and not args.table:
        on_gpu = ["--device", args.device, *["--half"] * (args.device != "cpu")]
        shared = [*on_gpu, "--models", *MODELS[:2], "--out", str(args.out.with_stem(f"{args.out.stem}_latency"))]
        shared += ["--settings", *(name for name in bench_latency.SETTINGS if name != "latency=0.5")]
        bench_latency.main([*shared, "--modes", "eager", "--batch-sizes", "1", "32", "128"])
        bench_latency.main([*shared, "--modes", "compile", "--batch-sizes", "32"])
        bench_latency.main([*shared, "--table"])


def plan(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """What ``--all`` measures, a run each; whole prunes once."""
    given = vars(args) | {"data": args.data or "photographs", "size": args.size or 224}
    for number, model in enumerate(MODELS):
        for what, other in ((PASSES, {}), (PASSES, {"autocast": True}), *[(WHOLE, {"rounds": 1})] * (number < 2)):
            yield argparse.Namespace(**given | {"model": model, "what": list(what)} | other)


def run(args: argparse.Namespace) -> None:
    """Measure what is not in the file yet: all of it in one run, or it would not compare."""
    setup = read_setup(args)
    if not done(args.out, "rounds").issuperset(list_keys(args, setup).values()):
        append(args.out, make_records(args, setup))


if __name__ == "__main__":
    main()
