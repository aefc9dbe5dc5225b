"""The loop of every run: score, select, remove, repair, measure, until the budget is met.

What is removed is a *structure*: channels and heads (`jbrprune.pruning.channels`) or single weights
(`jbrprune.pruning.weights`). It holds the model on its way.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.budgets.cost import find_uncounted
from jbrprune.checkpoint.resume import ResumeLog
from jbrprune.criteria.scores import Scores, check_some
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.data import distributed
from jbrprune.data.batches import Batch, count
from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.evaluation.agreement import Agreement, agreement_on
from jbrprune.evaluation.latency import Timings, time_in_turns
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.models import preserve
from jbrprune.pruning.prepare import Calibration, Problem, provenance
from jbrprune.repair.repair import Outcome, Targets, record_targets, repair_model
from jbrprune.report.records import Report, Size, StepRow, plain, record
from jbrprune.structure.groups import Axis

Agreed = tuple[Agreement | None, Agreement | None]
"""Held-out agreement at a stop, before and after the repair."""


@dataclass(frozen=True, eq=False)
class Stop:
    """What is handed over at a stop.

    Attributes:
        model: The model.
        masks: Parameter name -> boolean mask in the model's shapes, where single weights were pruned.
        report: What was done and what it cost.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    report: Report


@dataclass(eq=False)
class Structure(ABC):
    """What can be removed from a model, and the model on its way.

    Attributes:
        problem: The dense model, which is only read.
        options: How to prune.
        model: Loses something in every step.
        stops: Goals at which a model is handed over, in order.
        consumers: Layers that may lose inputs.
        output: What of the model's output counts, with its scales.
        stop: The stop that is aimed at.
        steps: The steps that led here.
        kept: Axis -> channels of the dense model that are left.
        masks: Parameter name -> boolean mask on the CPU, False where the model's value is zero and stays so.
        timings: Of the dense model and this one, where they were timed after the last step.
        unit: What one dense model is in the numbers of the user: 1, or its milliseconds.
        overshoot: How much more than the truth a step expected the model to cost, as a share; the largest of all steps.
        seconds: Part of the work -> time spent on it.
    """

    problem: Problem
    options: Any
    model: nn.Module
    stops: tuple[Any, ...]
    consumers: list[str]
    output: Output = LOGITS
    stop: Any = None
    steps: list[StepRow] = field(default_factory=list)
    kept: dict[Axis, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    timings: Timings | None = None
    unit: float = 1.0
    overshoot: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part of the work."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    @abstractmethod
    def goals(self) -> Iterator[Any]:
        """What each step is to reach; the next one is asked for when a step is done."""

    @abstractmethod
    def share(self, goal: Any) -> float:
        """The share that a goal keeps."""

    @abstractmethod
    def is_stop(self, goal: Any) -> bool:
        """Whether the model is handed over; asked after the removal."""

    @abstractmethod
    def score(self, batches: Sequence[Batch], number: int) -> Mapping[str, Tensor]:
        """Score what is left in the model; ``number`` is that of the step."""

    @abstractmethod
    def select(self, scores: Mapping[str, Tensor], goal: Any) -> Mapping[str, Tensor]:
        """Choose what goes, or what stays, to reach a goal."""

    @abstractmethod
    def apply(self, chosen: Mapping[str, Tensor]) -> None:
        """Carry out what `select` chose."""

    @abstractmethod
    def size(self) -> Size:
        """What the model costs, time apart."""

    @abstractmethod
    def deliver(self) -> tuple[nn.Module, Mapping[str, Tensor], dict[str, Any]]:
        """The model, its masks, and what the report says of them."""


def run(
    structure: Structure, images: Calibration, *, goals: Iterable[Any] | None = None, log: ResumeLog | None = None
) -> Iterator[Stop]:
    """Prune step by step; yield what is handed over at every stop.

    Args:
        structure: What to remove, and how; changed.
        images: What to score, repair and report on.
        goals: Goals instead of those of the structure. Each is asked for when the step before is done, and the
            structure may be restored meanwhile; when there are no more, what is left is handed over.
        log: Steps that are finished already; the others are added.

    Raises:
        CheckpointError: A finished step cannot be read, or a new one not be written.
        DataError: The objective needs labels, or no image is left to score.
        NonFiniteError: NaN or Inf on the way.
    """
    began, timed, options, targets = time.perf_counter(), structure.timed, structure.options, None
    dense, structure.output = structure.size(), images.output
    if images.gate and options.methods:
        with timed("repair"):
            targets = record_targets(structure.problem.dense, images.repair, structure.consumers)

    unit = log.read(1)[0]["unit"] if log is not None and log.finished else structure.unit
    if unit != structure.unit:  # the dense model took so many milliseconds when the run began
        structure.stops, structure.unit = tuple(stop * structure.unit / unit for stop in structure.stops), unit
    planned = structure.goals() if goals is None else goals
    for goal in tqdm(planned, "pruning", unit="step", disable=None if options.progress else True, leave=False):
        number, start = len(structure.steps) + 1, time.perf_counter()
        if log is not None and number <= log.finished:
            stops, agreed = replay(structure, log, number)
        else:
            with timed("scoring"):
                scores = structure.score(images.score, number)
            with timed("selection"):
                chosen = distributed.broadcast(structure.select(scores, goal))
            with timed("removal"):
                structure.apply(chosen)
            stops = goals is None and structure.is_stop(goal)
            quick = goals is None and not stops
            outcome, agreed = repair_and_evaluate(structure, images, targets, stops, quick)
            size, took = structure.size(), time.perf_counter() - start
            row = StepRow(number, structure.share(goal), size.macs, size.params, took, nonzero=size.nonzero)
            if outcome is not None:
                row = replace(row, unrepaired=outcome.before, repaired=outcome.after, repair=outcome.kept)
            if structure.timings is not None:
                row = replace(row, relative_latency=structure.timings.ratios[1])
            structure.steps.append(row)
            if log is not None:
                facts = {"row": row, "stops": stops, "agreed": agreed, "overshoot": structure.overshoot}
                facts |= {"timings": structure.timings, "unit": structure.unit}
                state = structure.model.state_dict()
                log.write(number, plain(facts | {"seconds": structure.seconds}), chosen, state, keep=stops)
        if stops:
            yield hand_over(structure, images, targets, dense, agreed, began)
    if goals is not None:
        with timed("evaluation"):
            final = agreement_on(structure.model, images.heldout, images.output) if images.heldout else None
        yield hand_over(structure, images, targets, dense, (None, final), began)


def repair_and_evaluate(
    structure: Structure, images: Calibration, targets: Targets | None, stops: bool, quick: bool
) -> tuple[Outcome | None, Agreed]:
    """Repair the model; at a stop, measure on the held-out images before and after."""
    measured, outcome, model = stops and bool(images.heldout), None, structure.model
    with structure.timed("evaluation"):
        before = after = agreement_on(model, images.heldout, images.output) if measured else None
    if targets is not None:
        how = structure.kept, structure.options.methods
        what: Any = {"output": images.output, "masks": structure.masks, "quick": quick}
        with structure.timed("repair"):
            outcome = repair_model(model, targets, images.gate, *how, **what)
    if measured and outcome is not None and outcome.kept != "none":
        with structure.timed("evaluation"):
            after = agreement_on(model, images.heldout, images.output)
    return outcome, (before, after)


def replay(structure: Structure, log: ResumeLog, number: int) -> tuple[bool, Agreed]:
    """Do what a finished step did; whether it was a stop, and what was measured there."""
    facts, chosen, tensors = log.read(number)
    structure.apply(chosen)
    if tensors is not None:
        structure.model.load_state_dict(tensors)
    structure.steps.append(record(StepRow, facts["row"]))
    structure.overshoot = facts["overshoot"]
    structure.timings = facts["timings"] and record(Timings, facts["timings"])
    structure.seconds.update(facts["seconds"])
    before, after = (None if found is None else record(Agreement, found) for found in facts["agreed"])
    return facts["stops"], (before, after)


def hand_over(
    structure: Structure, images: Calibration, targets: Targets | None, dense: Size, agreed: Agreed, began: float
) -> Stop:
    """The model at a stop, and what there is to say of it."""
    problem, options = structure.problem, structure.options
    seconds = {**structure.seconds, "total": time.perf_counter() - began}
    model, masks, facts = structure.deliver()
    output = images.output
    said = [output.said] * (output.guessed or output.kind != "logits")
    if problem.wrapper:
        said.append(f"The model was wrapped in {problem.wrapper}; what is inside was pruned: wrap it again.")
    for operator, name in find_uncounted(problem.dense, problem.example).items():
        said.append(f"{name or problem.name}: the multiply-accumulates of {operator} are not counted.")
    fitted = targets.notes(options.methods) if targets else []
    facts["notes"] = (*said, *facts["notes"], *fitted, *images.notes(bool(options.methods)))
    settings = options.settings | {"output": output.kind, "steps": len(structure.steps)}
    timings = structure.timings or time_in_turns([problem.dense, model], problem.example[:1])
    report = Report(
        model=problem.name,
        settings=settings | {"images": count(images.score)},
        dense=dense,
        steps=tuple(structure.steps),
        unrepaired=agreed[0],
        repaired=agreed[1],
        heldout=images.described,
        seconds=seconds,
        provenance=provenance(options.seed, preserve.device_of(model)),
        timings=timings,
        **facts,
    )
    return Stop(model, masks, report)


def check_scores(scores: object, shapes: Mapping[str, Sequence[int]], *, least: float = -math.inf) -> dict[str, Tensor]:
    """Refuse scores that are not of these units or weights, or rank nothing; name -> scores on the CPU.

    Args:
        scores: What a criterion gave.
        shapes: Name of a group or a weight -> shape of its scores.
        least: No score may be below this.

    Raises:
        ArgumentError: Not scores, or of another model, or too low.
        NonFiniteError: NaN or Inf in them.
        DataError: All are zero.
    """
    values = scores.values() if isinstance(scores, Scores | WeightScores) else scores
    if not isinstance(values, Mapping):
        raise ArgumentError(f"criterion gave {type(scores).__name__}, not a mapping from names to scores.")
    checked = {}
    for name, shape in shapes.items():
        found = torch.as_tensor(values[name]).cpu() if name in values else None
        found = found.double() if found is not None and not found.is_floating_point() else found
        if found is None or found.shape != tuple(shape):
            got = "none" if found is None else tuple(found.shape)
            raise ArgumentError(
                f"{name} needs scores of shape {tuple(shape)}, got {got}: they are of another model, or were made with "
                "another `ignore` or `width`. Score this model."
            )
        if not torch.isfinite(found).all():
            raise NonFiniteError(f"The scores of {name} contain NaN or Inf: nothing can be ranked by them.")
        if (found < least).any():
            raise ArgumentError(f"The scores of {name} are negative in places: the least important weight has 0.")
        checked[name] = found
    check_some(checked.values())
    return checked
