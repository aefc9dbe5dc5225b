"""Compare pruning criteria: model x data x protocol x criterion x repair x steps x seed; one JSON line per budget.

    python scripts/benchmark.py --model resnet10t --data digits --weights trained --protocol budget \
        --criterion jbr l1 taylor random --seeds 0 1 2 --out results/digits.jsonl
    python scripts/benchmark.py --config scripts/configs/resnet50_imagenet.yaml --data IMAGENET --out imagenet.jsonl

A protocol (see protocols.py) says what is compared and how; whatever else is given replaces its part. A configuration
is a YAML file of the same names (with ``model_args`` and ``prune_args``); the command line goes before it. Budgets that
are in the output file already are skipped, so an interrupted benchmark goes on where it stopped. What is impossible
(names, files, numbers) is refused before the first run. A run that fails leaves lines that say why, is tried again by
the next call, and makes the exit code 1; the others go on. ``--shard 1/4`` makes every fourth run, from the first;
shards may share an output file. tables.py shows what came out.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import append, describe_call, done, exit_on_error, keywords, make_parser, mend, use_threads
from protocols import MANY, OPTIONS, PROTOCOLS, Run, Setup, configure, list_runs, shard
from sources import Source, open_source
from torch import nn

from baselines import LABELS
from jbrprune import PruneResult, prune, sparsify, sweep
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch, attach_reference
from jbrprune.demo import lite0, train_digits
from jbrprune.errors import NonFiniteError
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.evaluation.latency import time_in_turns
from jbrprune.models import timm_models
from jbrprune.report.records import Report, plain


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense model, and what it says about the images to measure on."""

    model: nn.Module
    source: Source
    test: list[Batch]


@functools.lru_cache(maxsize=1)
def load(setup: Setup) -> tuple[nn.Module, Source]:
    """The dense model and the images for it, none read yet."""
    model = create(setup).eval().to(setup.device)
    return model, open_source(setup.data, setup.root, model)


@functools.lru_cache(maxsize=1)
def load_dense(setup: Setup) -> Dense:
    """The dense model with the images to measure on."""
    model, source = load(setup)
    test = source.measured(setup.eval_images, setup.workers)
    return Dense(model, source, attach_reference(test, compute_logits(model, test)))


@functools.lru_cache(maxsize=1)
def load_calibration(setup: Setup, images: int, seed: int) -> list[Batch]:
    """Calibration images with their labels."""
    return load(setup)[1].calibration(images, seed, setup.workers)


def create(setup: Setup) -> nn.Module:
    """The model with its weights.

    Raises:
        ArgumentError: The model does not take these arguments.
        CheckpointError: The file does not fit.
        ModelError: Weights that cannot be fetched.
    """
    arguments = dict(setup.model_args)
    if setup.weights == "packaged":
        return lite0()
    if setup.weights == "trained":
        return train_digits(name=setup.model, **arguments)
    if setup.weights == "random":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm_models.create(setup.model, pretrained=False, **arguments)
    checkpoint = None if setup.weights == "pretrained" else setup.weights
    return timm_models.create(setup.model, checkpoint=checkpoint, **arguments)


def choose_criterion(known: Any, name: str, seed: int, batch: int = 128) -> Any:
    """The criterion of a name; what draws random numbers gets the seed, a relevance the batch that it squares."""
    criterion = known[name]
    own = {"batch": batch} if isinstance(criterion, Relevance) else {}
    return replace(criterion, seed=seed, **own) if is_dataclass(criterion) else criterion


def show_labels(name: str, batches: Sequence[Batch]) -> list[Batch]:
    """The batches, with their labels for criteria that need them."""
    return list(batches) if name in LABELS else [Batch(batch.images) for batch in batches]


def make_results(run: Run) -> Iterator[PruneResult]:
    """Prune to all budgets, the largest model first; only criteria that need labels are shown any."""
    protocol = run.protocol
    if run.criterion in LABELS:
        load(run.setup)[1].check_labels(f"criterion {run.criterion!r}")
    dense = load_dense(run.setup)
    batches = show_labels(run.criterion, load_calibration(run.setup, protocol.images, run.seed))
    criterion = choose_criterion(protocol.known, run.criterion, run.seed, protocol.batch)
    sparse = protocol.kind == "sparsity"
    how: dict[str, Any] = {
        **({} if sparse else {"structure": "channels"}),
        **{"steps": protocol.steps, "repair": protocol.repair, "seed": run.seed, "batch_size": run.batch_size},
        **{"images": None, "eval_data": dense.test, "progress": False, **protocol.options},
    }
    if not protocol.from_dense:
        yield from sweep(dense.model, batches, protocol.budgets, budget=protocol.kind, criterion=criterion, **how)
        return
    if protocol.steps == 1 and protocol.options.get("structure") != "mixed":  # which asks for channels, then directions
        criterion = ask_once(criterion, sparse)
    for budget in protocol.budgets:
        call = sparsify if sparse else prune
        yield call(dense.model, batches, criterion=criterion, **{protocol.kind: budget}, **how)


def ask_once(criterion: Any, sparse: bool) -> Callable[..., Any]:
    """The criterion, for several cuts of one model with the same images: it is asked the first time only."""
    found: list[Any] = []

    def remembered(model: nn.Module, batches: Sequence[Batch], units: Sequence[Any]) -> Any:
        if not found:
            weights = sparse and isinstance(criterion, Relevance)
            found.append(weight_scores(model, batches, criterion) if weights else criterion(model, batches, units))
        return found[0]

    return remembered


def make_records(run: Run) -> Iterator[dict[str, Any]]:
    """One line per budget."""
    protocol, keys, shared = run.protocol, run.keys(), describe(run)
    once, first = protocol.from_dense and protocol.steps == 1, None
    for budget, result in zip(protocol.budgets, make_results(run), strict=True):
        report, dense = result.report, load_dense(run.setup)
        scoring, total = report.seconds["scoring"], report.seconds["total"]
        first = scoring if first is None or not once else first
        seconds = {"seconds": total - scoring + first, "scoring_seconds": first}
        record = {"key": keys[budget], **shared, "budget": budget, **measure(report), **seconds}
        if "structure" in protocol.options:
            timings = time_in_turns([dense.model, result.model], dense.test[0].images)
            record["relative_latency_64"] = timings.ratios[1]
        bad = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:  # `plain` would write null
            raise NonFiniteError(f"{bad[0]} is {record[bad[0]]} at budget {record['budget']}.")
        yield plain(record)


def describe_failure(error: Exception) -> str:
    """What failed lines say."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def describe(run: Run) -> dict[str, Any]:
    """What all lines of a run begin with."""
    return run.described() | {"labels": run.criterion in LABELS} | describe_call()


def measure(report: Report) -> dict[str, Any]:
    """What a report says about cost and agreement."""
    final, before = report.final, report.unrepaired
    times = report.timings.latencies if report.timings else (None, None)
    return {
        "dense_macs": report.dense.macs,
        "macs": report.pruned.macs,
        "dense_params": report.dense.params,
        "params": report.pruned.params,
        "nonzero": report.pruned.nonzero,
        **{f"{of}latency_ms": time and time.median_ms for of, time in zip(("dense_", ""), times)},
        "relative_latency": report.timings and report.timings.ratios[1],
        "sparsity": report.sparsity,
        "accuracy": final.accuracy,
        "dense_accuracy": final.dense_accuracy,
        "agreement": final.top1,
        "kl": final.kl,
        "unrepaired_accuracy": before.accuracy,
        "unrepaired_agreement": before.top1,
        "repaired_by": report.steps[-1].repair,
        "scorings": len(report.steps),
        "eval_images": final.images,
        **{name: report.provenance[name] for name in ("versions", "hardware", "device", "threads", "time")},
    }


def is_done(run: Run, out: Path) -> bool:
    """Whether all its lines are there."""
    return done(out, "protocol").issuperset(run.keys().values())


def check(wanted: Sequence[Run]) -> None:
    """Refuse what no run of a model can do, before the first run of the first model.

    Raises:
        ArgumentError: A model does not take its arguments, or the data do not have so many images.
        DataError: The data cannot be opened.
    """
    images = {}
    for run in wanted:
        images[run.setup] = max(run.protocol.images, images.get(run.setup, 0))
    for setup, most in images.items():
        untrained = timm_models.create(setup.model, pretrained=False, **dict(setup.model_args))
        open_source(setup.data, setup.root, untrained).check_counts(most, setup.eval_images)


def benchmark(wanted: Sequence[Run], out: Path) -> int:
    """Run what is not in the file yet, and what failed there; return how many runs failed.

    Raises:
        ArgumentError: The data do not have so many images, or a model does not take its arguments.
        DataError: The file is not one of lines of this script; data cannot be opened.
    """
    failed = 0
    check([run for run in wanted if not is_done(run, out)])
    mend(out)
    for number, run in enumerate(wanted, 1):
        if is_done(run, out):
            continue
        label = f"{number}/{len(wanted)} {run.setup.model} {run.setup.data} {run.name} {run.criterion} seed {run.seed}"
        try:
            for record in make_records(run):
                append(out, [record])
        except Exception as error:  # whatever a model holds, or a criterion does on it: the others go on
            failed += 1
            line = describe(run) | {"failed": describe_failure(error)}
            append(out, [plain({"key": key, **line, "budget": budget}) for budget, key in run.keys().items()])
            print(f"{label}: {line['failed']}", file=sys.stderr, flush=True)
            continue
        print(f"{label}: {record['seconds']:.1f} s", flush=True)
    return failed


# --- the command line ------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.epilog = "protocols:\n" + "\n".join(f"  {name}: {protocol.about}" for name, protocol in PROTOCOLS.items())
    parser.add_argument("--config", type=Path, help="YAML file with the names below")
    for name, (_, kind, text) in OPTIONS.items():
        how = {"nargs": "+" if name in MANY else None, "default": argparse.SUPPRESS}
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text, **how)
    for name, what in (("--model-arg", "timm"), ("--prune-arg", "prune(), Floors() or sparsify()")):
        parser.add_argument(name, action="append", default=[], metavar="KEY=VALUE", help=f"for {what}; repeatable")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of all runs")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    with exit_on_error("benchmark.py"):
        wanted = configure(args.config, given)
        for name, pairs in (("model_args", args.model_arg), ("prune_args", args.prune_arg)):
            wanted[name] = wanted[name] | keywords(pairs)
        chosen = shard(list_runs(wanted), args.shard)
        if args.dry_run:
            print("\n".join(f"{run.setup.model} {run.name} {run.criterion} seed {run.seed}" for run in chosen))
            return
        use_threads(wanted["threads"])
        failed = benchmark(chosen, args.out)
    if failed:
        raise SystemExit(f"benchmark.py: {failed} of {len(chosen)} runs failed.")


if __name__ == "__main__":
    main()
