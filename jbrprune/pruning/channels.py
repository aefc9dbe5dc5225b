"""Channels and heads as the structure of a run: what can go, what it costs, and the model that shrinks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import STEP, TIMED, Budget, check_reachable
from jbrprune.budgets.cost import CostModel, Term, axis_widths, cost_model, mac_terms
from jbrprune.budgets.selection import Floors, reduce_to_floors, select
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores, check_some
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.evaluation.agreement import bytes_of, parameters_of
from jbrprune.evaluation.latency import time_in_turns
from jbrprune.models import layers, preserve
from jbrprune.pruning.loop import Delivery, Structure
from jbrprune.pruning.options import ChannelOptions, RunOptions
from jbrprune.pruning.prepare import Problem
from jbrprune.report.records import LayerRow, Size
from jbrprune.structure.discovery import Found, find_groups
from jbrprune.structure.groups import Axis, Group, Selection, removed_channels
from jbrprune.structure.slicing import remove_units
from jbrprune.structure.verification import verify_groups

logger = logging.getLogger(__name__)

Criterion = Callable[[nn.Module, Sequence[Batch], Sequence[Group]], Mapping[str, Any] | Scores]
"""``criterion(model, batches, groups)`` -> group name -> scores of its units; the lowest goes first."""
_EXPECTED = ("the classifier", "reaches the model's output", "ignored on request")


@dataclass(frozen=True, eq=False)
class Cut:
    """Units that go together, and what is left.

    Attributes:
        target: Share of the dense model's cost that was asked for.
        units: Group -> units that go.
        macs: Share of the multiply-accumulates that stays.
        params: Share of the parameters that stays.
    """

    target: float
    units: Selection
    macs: float
    params: float


@dataclass(eq=False, kw_only=True)
class Channels(Structure):
    """The removable units of a model, and the model on its way; `find_channels` makes it.

    Attributes:
        dense: The dense model; only read.
        kind: What the budget is of; the stops are shares of it.
        unit: What one dense model is in the numbers of the user: 1, or its milliseconds.
        per_stop: Steps to each stop; None: one for every 5 % of the dense cost.
        floors: How narrow groups may become.
        found: The units of the dense model.
        groups: The units that are left.
        full: Axis -> width in the dense model.
        terms: Multiply-accumulates of the model as it is now.
        whole: Cost of the dense model: of latency, its multiply-accumulates.
        least: Share of it that is left with every group at its floor.
    """

    dense: nn.Module
    kind: str
    unit: float
    per_stop: int | None
    floors: Floors
    found: Found
    groups: tuple[Group, ...]
    full: dict[Axis, int]
    terms: list[Term]
    whole: float = 1.0
    least: float = 1.0
    _stop: float | None = None
    _foreseen: float | None = None

    def copy(self) -> Channels:
        """The same on a model of its own, for `restore`; the clock is shared."""
        return replace(self, model=preserve.copy_model(self.model), kept=dict(self.kept), steps=list(self.steps))

    def restore(self, saved: Channels) -> None:
        """Go back to a copy, which stays as it is."""
        vars(self).update(vars(saved.copy()))

    def goals(self) -> Iterator[float]:
        """Shares of the dense cost to reach: known from the start where the cost is counted."""
        starts = (1.0, *self.stops[:-1])
        for start, stop in zip(starts, self.stops):
            self._stop = stop
            if self.kind not in TIMED:
                yield from Budget(self.kind, stop).schedule(self.per_stop, start=start)
                continue
            reached = False
            while not reached:
                share = self._next_share()
                yield share
                reached = self.is_stop(share)

    def _next_share(self) -> float:
        """Share of MACs at which the latency is expected to meet the stop, at most one step away.

        A line through the last two measured models; from the dense model, time is expected to fall as MACs do.
        """
        points = [(1.0, 1.0)] + [(row.macs / self.whole, row.relative_latency or 1.0) for row in self.steps]
        macs, ratio = points[-1]
        slope = 1.0
        if len(points) > 1 and ratio < points[-2][1]:
            slope = (points[-2][0] - macs) / (points[-2][1] - ratio)
        away = max(STEP / 10, min(STEP, (ratio - self._stop) * slope)) if ratio > self._stop else 0.0
        return max(macs - away, self.least)

    def share(self, goal: float) -> float:
        """The goal itself."""
        return goal

    def is_stop(self, goal: float) -> bool:
        """Whether the budget is met: as counted, or as timed after the last removal."""
        if self.kind not in TIMED:
            return goal in self.stops
        ratio = self.timings.ratios[1] if self.timings else self.steps[-1].relative_latency
        if ratio <= self._stop:
            return True
        floored = goal <= self.least
        if floored and distributed.rank() == 0:
            logger.warning(
                "%s=%g is missed: with every group at its floor %.3f of the dense model's time are left.",
                *(self.kind, self._stop * self.unit, ratio),
            )
        return floored

    def score(self, batches: Sequence[Batch], options: RunOptions, number: int) -> Mapping[str, Tensor]:
        """Score every unit that is left: group -> ``[units]``."""
        criterion = options.ranking
        if isinstance(criterion, Relevance):
            criterion = replace(criterion, seed=options.seed + number)
            scores = criterion(self.model, batches, self.groups, progress=options.progress)
        else:
            scores = criterion if isinstance(criterion, Scores) else criterion(self.model, batches, self.groups)
        return check_scores(scores, self.groups)

    def cost(self, kind: str | None = None) -> CostModel:
        """What the model costs as it is now; ``kind``: of something else than the budget."""
        kind = self.kind if kind is None else kind
        if kind in ("params", "channels"):
            return cost_model(kind, self.model, self.example, self.groups)
        return CostModel(self.terms, self.groups, axis_widths(self.model, self.groups))

    def select(self, scores: Mapping[str, Tensor], goal: float) -> Selection:
        """The units to remove so that the share of the dense cost is reached."""
        cost = self.cost()
        chosen = select(
            scores,
            self.groups,
            cost,
            goal * self.whole,
            floors=self.floors,
            dense_sizes={group.name: group.size for group in self.found.groups},
            per_cost=self.kind != "channels",
        )
        self._foreseen = cost.total
        return chosen

    def apply(self, chosen: Selection) -> None:
        """Remove units, count what is left, and time it where the budget is one of time."""
        for axis, gone in removed_channels(self.groups, chosen).items():
            stays = torch.ones(len(self.kept[axis]), dtype=torch.bool)
            stays[gone] = False
            self.kept[axis] = self.kept[axis][stays]
        self.groups = remove_units(self.model, self.groups, chosen)
        self.terms = mac_terms(self.model, self.example)
        if self._foreseen is not None:  # not so where a finished step is done again
            self.overshoot = max(self.overshoot, self._foreseen / self.cost().total - 1)
            self._foreseen = None
            if self.kind in TIMED:
                self.timings = distributed.broadcast(time_in_turns([self.dense, self.model], self.example[:1]))

    def plan(self, scores: Mapping[str, Tensor], share: float) -> Cut:
        """What one step would remove to reach a share of the dense cost.

        A run scores what is left again after every step, which cannot be foreseen.

        Raises:
            BudgetError: The share lies below what the floors allow.
        """
        units = self.select(scores, share)
        costs = {kind: self.cost(kind) for kind in ("macs", "params")}
        whole = {kind: cost.total for kind, cost in costs.items()}
        for cost in costs.values():
            for group, gone in units.items():
                cost.remove(group, len(gone))
        return Cut(share, units, **{kind: cost.total / whole[kind] for kind, cost in costs.items()})

    def size(self) -> Size:
        """What the model costs, time apart."""
        macs = round(sum(term.amount for term in self.terms))
        return Size(macs, parameters_of(self.model), bytes_of(self.model))

    def consumers(self) -> list[str]:
        """Layers that may lose inputs."""
        return [axis[0] for axis in self.full if axis[1] == "in"]

    def deliver(self) -> Delivery:
        """The model; a copy where it shrinks further."""
        reached = self.steps[-1].target if self.steps else 1.0
        stop = reached if self._stop is None else self._stop
        model = preserve.copy_model(self.model) if len(self.stops) > 1 else self.model
        return Delivery(model, {self.kind: stop * self.unit}, self.size())

    def layers(self) -> tuple[LayerRow, ...]:
        """One row per layer whose output is as wide as its units say: producers, and the heads of attentions."""
        kinds = {member.axis: group.kind for group in self.found.groups for member in group.members}
        rows: list[LayerRow] = []
        for name, module in self.model.named_modules():
            heads: Axis = (name, "heads", 0)
            out: Axis = (name, "out", 0)
            axes = (heads,) if layers.is_normalisation(module) else (heads, out)
            rows += [
                LayerRow(name, type(module).__name__, kinds[axis], self.full[axis], len(self.kept[axis]))
                for axis in axes
                if axis in kinds
            ]
        return tuple(rows)

    def removed(self) -> dict[str, list[int]]:
        """Group -> units of the dense model that are gone; groups that lost nothing are absent."""
        gone = {}
        for group in self.found.groups:
            member = group.members[0]
            lost = ~torch.isin(member.channel, self.kept[member.axis])
            if bool(lost.any()):
                gone[group.name] = member.unit[lost].unique().tolist()
        return gone

    def notes(self) -> list[str]:
        """What keeps its width, and how the budget was met."""
        skipped = self.found.skipped.items()
        notes = [f"{name} keeps its width: {reason}." for name, reason in skipped if reason not in _EXPECTED]
        if any(group.kind == "width" for group in self.groups):
            notes.append(
                "Residual width under a LayerNorm was offered: removing a channel there changes the norm's statistics."
            )
        if self.kind in TIMED and self.timings:
            ratio, spread = self.timings.ratios[1], self.timings.spreads[1]
            verdict = "met" if ratio <= self._stop else f"missed by {ratio - self._stop:.3f}"
            dense = f" ({self.unit:.3g} ms)" if self.kind == "latency_ms" else ""
            notes.append(
                f"One image takes {ratio:.3f} ± {spread:.3f} of the dense model's time{dense}: median and half the "
                f"interquartile range of ratios, timed in turns. The budget of {self._stop:.3f} is {verdict}."
            )
        elif self.overshoot > 1e-6:
            notes.append(
                f"The budget is overshot by up to {self.overshoot:.1%}: products of activations outside of known "
                "layers shrank as well, which the plan did not foresee."
            )
        return notes


def find_channels(problem: Problem, options: ChannelOptions, stops: Sequence[float]) -> Channels:
    """Find the units of a model, and see that the budget can be reached.

    Args:
        problem: The dense model; left as it was.
        options: How to prune.
        stops: Shares of the dense model (of ``latency_ms``: milliseconds) at which a model is handed over, falling.

    Raises:
        ArgumentError: A glob in ``ignore`` matches nothing.
        BudgetError: The budget lies below what the floors allow, or the dense model meets it.
        UnsupportedModelError: Nothing can be removed safely.
    """
    model, found = find_units(problem.dense, problem.example, options.ignore, options.floors.width, options.seed)
    kind, unit = next(iter(options.budgets), "macs"), 1.0
    if kind == "latency_ms":
        unit = distributed.broadcast(time_in_turns([problem.dense], problem.example[:1]).latencies[0].median_ms)
        stops = [Budget(kind, stop).as_share(unit).share for stop in stops]
    full = axis_widths(model, found.groups)
    channels = Channels(
        model=model,
        example=problem.example,
        stops=tuple(stops),
        kept={axis: torch.arange(width) for axis, width in full.items()},
        dense=problem.dense,
        kind=kind,
        unit=unit,
        per_stop=1 if isinstance(options.criterion, Scores) else options.steps,
        floors=options.floors,
        found=found,
        groups=found.groups,
        full=full,
        terms=mac_terms(model, problem.example),
    )
    channels.whole = channels.cost().total
    sizes = {group.name: group.size for group in found.groups}
    channels.least = reduce_to_floors(channels.cost(), found.groups, options.floors, sizes) / channels.whole
    if isinstance(options.criterion, Scores):
        check_scores(options.criterion, found.groups)
    if stops and kind not in TIMED:
        check_reachable(Budget(kind, stops[-1]), channels.least)
    return channels


def find_units(
    dense: nn.Module, example: Tensor, ignore: Sequence[str], width: bool, seed: int = 0
) -> tuple[nn.Module, Found]:
    """A copy of a model in eval mode, and its units that can be removed safely; see `find_groups`."""
    model = preserve.copy_model(dense).eval()
    return model, verify_groups(model, example, find_groups(model, example, ignore=ignore, width=width), seed=seed)


def check_scores(scores: object, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Refuse scores that are not of these units; group name -> ``[units]``.

    Raises:
        ArgumentError: Not scores of units, or of other ones.
        NonFiniteError: NaN or Inf in them.
        DataError: All are zero.
    """
    values = scores.values() if isinstance(scores, Scores) else scores
    if not isinstance(values, Mapping):
        raise ArgumentError(
            f"criterion gave {type(scores).__name__}; channels need a mapping from the name of each group to the "
            "scores of its units, or scores made with granularity='unit'."
        )
    checked = {name: torch.as_tensor(value) for name, value in values.items()}
    for group in groups:
        found = len(checked[group.name]) if group.name in checked else "no"
        if found != group.size:
            raise ArgumentError(
                f"{group.name} has {group.size} units, but {found} scores: they are of another model, or made with "
                "another `ignore` or `width`. Score this model."
            )
        if not torch.isfinite(checked[group.name]).all():
            raise NonFiniteError(f"The scores of {group.name} contain NaN or Inf: nothing can be ranked by them.")
    check_some(checked[group.name] for group in groups)
    return checked
