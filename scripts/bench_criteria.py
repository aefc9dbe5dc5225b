"""What a criterion costs: its processor time as a ratio to one forward and backward over the same images.

    python scripts/bench_criteria.py --model resnet50 --weights random --data fashion_mnist --root FOLDER \
        --images 256 --threads 1 --out results/criteria.jsonl
    python scripts/bench_criteria.py --out results/criteria.jsonl --table

The yardstick is one pass in eval mode, forward and a backward that makes the gradient of every parameter. In a round
it is timed first and last, and each criterion in between, in one process (ABC...A, so that what disturbs the machine
disturbs all); a round's ratio is to the mean of its two yardsticks. Given are median and quartiles over the rounds. One
untimed round goes before. With ``--device cuda`` it is wall time, until the GPU has done the work. Units are found
beforehand: all criteria need them. Weights do not matter to the time, but to ``jbr_published``, which leaves images
out: its images still go forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import calibrated, described_here, loaded, opened
from common import append, done, keywords, lines, mend, use_threads
from plan import Setup, digest, setup_named
from protocols import PROTOCOLS
from torch import nn
from torch.nn import functional as F

from baselines import CRITERIA, LABELS
from jbrprune.data.batches import Batch
from jbrprune.errors import JBRError, unknown
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.pruning.prepare import provenance
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group


def training(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Forward and backward to all parameters over all images."""
    with preserve.inference_state(model, gradients=True):
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for batch in (batch.to(preserve.device_of(model)) for batch in batches):
            loss = F.cross_entropy(logits_of(model(batch.images)), batch.labels)  # type: ignore[arg-type]
            torch.autograd.grad(loss, leaves, allow_unused=True)


def clock() -> str:
    """``process_time``, or ``wall`` where work is done on a GPU, whose time is not the processor's."""
    return "wall" if torch.cuda.is_initialized() else "process_time"


def timed(step: Callable[[], object]) -> float:
    """Seconds by the `clock`; of a GPU, until it has done the work."""
    if clock() == "process_time":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], names: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Criterion -> for every round, its ratio and its seconds; what fails has a reason instead."""
    steps: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name in names:
        shown = batches if name in LABELS else [Batch(batch.images) for batch in batches]
        step = lambda c=CRITERIA[name], b=shown: c(model, b, groups)  # noqa: E731
        try:
            step()
            steps[name] = step
        except JBRError as error:
            failed[name] = f"{type(error).__name__}: {error}"
    training(model, batches)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    yardsticks = []
    for _ in range(rounds):
        first = timed(lambda: training(model, batches))
        seconds = {name: timed(step) for name, step in steps.items()}
        yardstick = (first + timed(lambda: training(model, batches))) / 2
        yardsticks.append(yardstick)
        for name, spent in seconds.items():
            found[name].append((spent / yardstick, spent))
    return {"found": found, "failed": failed, "training": statistics.median(yardsticks)}


def records(args: argparse.Namespace, setup: Setup) -> list[dict[str, Any]]:
    """One line per criterion."""
    loaded(setup)[1].check_labels("the yardstick")
    dense, batches = opened(setup), calibrated(setup, args.images, 0)
    groups = find_groups(copy_model(dense.model), batches[0].images[:2]).groups
    result = measured(dense.model, batches, groups, args.criterion, args.rounds)
    shared = {
        **setup_named(setup),
        **{"images": args.images, "batch_size": len(batches[0]), "rounds": args.rounds, "clock": clock()},
        "training_seconds": result["training"],
        **described_here(),
        **{name: value for name, value in provenance(0, torch.device(setup.device)).items() if name != "seed"},
    }
    keys = keys_of(args, setup)
    made = []
    for name, pairs in result["found"].items():
        ratios, seconds = zip(*pairs, strict=True)
        quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else [*ratios, *ratios]
        numbers = {"ratio": statistics.median(ratios), "quartiles": quartiles, "seconds": statistics.median(seconds)}
        made.append({"key": keys[name], "criterion": name, "labels": name in LABELS, **numbers, **shared})
    failed = result["failed"].items()
    return made + [{"key": keys[name], "criterion": name, "failed": reason, **shared} for name, reason in failed]


def keys_of(args: argparse.Namespace, setup: Setup) -> dict[str, str]:
    """Criterion -> what its line is recognised by."""
    own = [setup_named(setup), args.images, args.rounds, torch.get_num_threads()]
    return {name: digest([own, name]) for name in args.criterion}


def table(path: Path) -> str:
    """Criteria by their ratios, the cheapest first, as Markdown."""
    found: dict[str, Mapping[str, Any]] = {line["key"]: line for line in lines(path)}
    rows = ["| model | images | criterion | labels | ratio (quartiles) |", "|---|---|---|---|---|"]
    made = [line for line in found.values() if "failed" not in line]
    for line in sorted(made, key=lambda line: (line["model"], line["images"], line["ratio"])):
        low, high = line["quartiles"]
        cells = [line["model"], line["images"], line["criterion"], "yes" if line["labels"] else ""]
        rows.append("| " + " | ".join(map(str, cells)) + f" | {line['ratio']:.2f} ({low:.2f}-{high:.2f}) |")
    rows += [f"\n{line['criterion']}: {line['failed']}" for line in found.values() if "failed" in line]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="timm name")
    parser.add_argument("--weights", default="random", help="pretrained, random, trained (on digits) or a file")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", help="as for benchmark.py")
    parser.add_argument("--root")
    parser.add_argument("--criterion", nargs="+", default=list(PROTOCOLS["budget"].criteria))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    args = parser.parse_args(argv)
    try:
        if not args.table:
            use_threads(args.threads)
            run(args)
        print(table(args.out))
    except JBRError as error:
        sys.exit(f"bench_criteria.py: {error}")


def run(args: argparse.Namespace) -> None:
    """Measure what is not in the file yet: all of it in one run, or it would not compare."""
    given = keywords(args.model_arg)
    for name in args.criterion:
        if name not in CRITERIA:
            raise unknown("criterion", name, CRITERIA)
    setup = Setup.of(args.model, args.data, weights=args.weights, root=args.root, device=args.device, given=given)
    there = done(args.out, "rounds")
    mend(args.out)
    if not there.issuperset(keys_of(args, setup).values()):
        append(args.out, records(args, setup))


if __name__ == "__main__":
    main()
