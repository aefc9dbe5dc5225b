"""Channels, heads and directions as the structure of a run: what can go, what it costs, and the model that shrinks."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import STEP, TIMED, as_share, check_least, reduce_to_floors, schedule, select, select_ranks
from jbrprune.budgets.cost import CostModel, Term, axis_widths, cost_model, count_macs, mac_terms
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import UnsupportedModelError
from jbrprune.evaluation.agreement import bytes_of, parameters_of
from jbrprune.evaluation.latency import time_in_turns
from jbrprune.models import layers, preserve
from jbrprune.pruning.loop import Structure, check_scores
from jbrprune.pruning.options import ChannelOptions
from jbrprune.pruning.prepare import Problem
from jbrprune.report.records import LayerRow, Size
from jbrprune.structure.directions import find_directions, fold_bias, replace_module, rotate_all
from jbrprune.structure.discovery import Found, find_groups
from jbrprune.structure.groups import Axis, Group, Selection, removed_channels
from jbrprune.structure.slicing import remove_units
from jbrprune.structure.verification import verify_groups

logger = logging.getLogger(__name__)

Criterion = Callable[[nn.Module, Sequence[Batch], Sequence[Group]], Mapping[str, Any] | Scores]
"""``criterion(model, batches, groups)`` -> group name -> scores of its units; the lowest goes first."""
CHANNELS_FIRST = 0.3
"""Of a mixed budget, channels and heads go to the share to this power, directions the rest of the way."""
DEEP = 0.5
"""Below this share of a model of tokens ``structure="auto"`` is ``mixed``: docs/directions.md has the measurements."""
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
        found: The units of the dense model.
        groups: The units that are left.
        full: Axis -> width in the dense model.
        terms: Multiply-accumulates of the model as it is now.
        kind: What the budget is of; the stops are shares of it.
        whole: Cost of the dense model; of a latency, its multiply-accumulates.
        least: Share of it that is left with every group at its floor.
        whole_layers: The model before two layers stood in the place of each, to lose directions; None: they do not.
        foreseen: What `select` expects the smaller model to cost.
        why: Why this structure, where none was asked for.
    """

    found: Found
    groups: tuple[Group, ...]
    full: dict[Axis, int]
    terms: list[Term]
    kind: str
    whole: float = 1.0
    least: float = 1.0
    whole_layers: nn.Module | None = None
    foreseen: float | None = None
    why: str = ""

    def copy(self) -> Channels:
        """The same on a model of its own, for `restore`; the times are shared."""
        return replace(self, model=preserve.copy_model(self.model), kept=dict(self.kept), steps=list(self.steps))

    def restore(self, saved: Channels) -> None:
        """Go back to a copy, which stays as it is."""
        vars(self).update(vars(saved.copy()))

    def goals(self) -> Iterator[float]:
        """Shares of the dense cost to reach: known from the start where the cost is counted."""
        for start, stop in zip((1.0, *self.stops), self.stops):
            if self.options.structure == "mixed" and self.whole_layers is None:
                narrowest = self.least + 1e-3
                part = max(stop**CHANNELS_FIRST, narrowest)
                yield from self.walk(start, part)
                whole = self.copy()
                self.split()
                while self.kind not in TIMED and self.least > stop and part > narrowest:  # directions do not suffice
                    start, part = part, max(part * min(0.9, stop / self.least), narrowest)
                    self.restore(whole)
                    yield from self.walk(start, part)
                    whole = self.copy()
                    self.split()
                start = part
            yield from self.walk(start, stop)
            if self.kind in TIMED and self.ratio > stop and distributed.rank() == 0:
                logger.warning(
                    "%s=%g is missed: with every group at its floor %.3f of the dense model's time are left.",
                    *(self.kind, stop * self.unit, self.ratio),
                )

    def walk(self, start: float, stop: float) -> Iterator[float]:
        """Shares on the way from one to another; directions go in one step unless more are asked for."""
        self.stop, share = stop, None
        if self.kind not in TIMED:
            once = isinstance(self.options.criterion, Scores) or self.whole_layers is not None
            steps = self.options.steps or (1 if once else None)
            yield from schedule(stop, steps, start=start)
            return
        while share is None or not self.has_reached(share):
            share = self.next_share()
            yield share

    @property
    def ratio(self) -> float:
        """Time of the model relative to the dense one's, as measured after the last removal."""
        if self.timings is not None:
            return self.timings.ratios[1]
        return self.steps[-1].relative_latency or 1.0 if self.steps else 1.0

    def next_share(self) -> float:
        """Share of MACs at which the latency is expected to meet the stop, at most one step away.

        A line through the last two measured models; from the dense model, time is expected to fall as MACs do.
        """
        points = [(1.0, 1.0)] + [(row.macs / self.whole, row.relative_latency or 1.0) for row in self.steps]
        (before, was), (macs, ratio) = points[-2:] if len(points) > 1 else ((2.0, 2.0), points[0])
        slope = (before - macs) / (was - ratio) if ratio < was else 1.0
        away = max(STEP / 10, min(STEP, (ratio - self.stop) * slope)) if ratio > self.stop else 0.0
        return max(macs - away, self.least)

    def share(self, goal: float) -> float:
        """The goal itself."""
        return goal

    def has_reached(self, goal: float) -> bool:
        """Whether the walk is over: as counted, or as timed; a latency also where every group is at its floor."""
        return self.ratio <= self.stop or goal <= self.least if self.kind in TIMED else goal == self.stop

    def is_stop(self, goal: float) -> bool:
        """Whether the budget is met by all that is to go."""
        return self.has_reached(goal) and (self.options.structure != "mixed" or self.whole_layers is not None)

    def score(self, batches: Sequence[Batch], number: int) -> dict[str, Tensor]:
        """Score every unit that is left: group -> ``[units]``; of directions, those of what the layers give now."""
        criterion = self.options.ranking
        if self.whole_layers is not None:
            rotate_all(self.model, batches, self.groups)
            distributed.broadcast_tensors(self.model.state_dict())
        if isinstance(criterion, Relevance):
            criterion = replace(criterion, seed=criterion.seed + self.options.seed + number, output=self.output)
            scores = criterion(self.model, batches, self.groups, progress=self.options.progress)
        else:
            scores = criterion if isinstance(criterion, Scores) else criterion(self.model, batches, self.groups)
        return check_scores(scores, {group.name: (group.size,) for group in self.groups})

    def cost(self, kind: str) -> CostModel:
        """What the model costs as it is now."""
        if kind in ("params", "channels"):
            return cost_model(kind, self.model, self.problem.example, self.groups)
        return CostModel(self.terms, self.groups, axis_widths(self.model, self.groups))

    def select(self, scores: Mapping[str, Tensor], goal: float) -> Selection:
        """The units to remove so that the share of the dense cost is reached."""
        cost = self.cost(self.kind)
        sizes = {group.name: group.size for group in self.found.groups}
        how: dict[str, Any] = {"floors": self.options.floors, "dense_sizes": sizes}
        scope = "raw" if (self.options.scope, self.kind) == ("global", "channels") else self.options.scope
        choose = partial(select, scope=scope) if self.whole_layers is None else select_ranks
        chosen = choose(scores, self.groups, cost, goal * self.whole, **how)
        self.foreseen = cost.total
        return chosen

    def apply(self, chosen: Selection) -> None:
        """Remove units, count what is left, and time it where the budget is one of time."""
        for axis, gone in removed_channels(self.groups, chosen).items():
            stays = torch.ones(len(self.kept[axis]), dtype=torch.bool)
            stays[gone] = False
            self.kept[axis] = self.kept[axis][stays]
        self.groups = remove_units(self.model, self.groups, chosen)
        self.terms = mac_terms(self.model, self.problem.example, self.groups)
        if self.foreseen is not None:  # it is None where a finished step is done again
            self.overshoot = max(self.overshoot, self.foreseen / self.cost(self.kind).total - 1)
            self.foreseen = None
            if self.kind in TIMED:
                models = [self.problem.dense, self.finish()]
                self.timings = distributed.broadcast(time_in_turns(models, self.problem.example[:1]))

    def plan(self, scores: Mapping[str, Tensor], share: float) -> Cut:
        """What one step would remove to reach a share of the dense cost.

        A run scores what is left again after every step, which cannot be foreseen.

        Raises:
            BudgetError: The share lies below what the floors allow.
        """
        units, left = self.select(scores, share), []
        for kind in ("macs", "params"):
            cost = self.cost(kind)
            whole = cost.total
            for group, gone in units.items():
                cost.remove(group, len(gone))
            left.append(cost.total / whole)
        return Cut(share, units, *left)

    def split(self) -> None:
        """Go on with the directions of linear layers: two layers stand in the place of each."""
        where, options = (self.model, self.problem.example), self.options
        self.whole_layers = self.model
        self.model, found = find_units(*where, options.ignore, False, options.seed, structure="directions")
        self.groups, full = found.groups, axis_widths(self.model, found.groups)
        self.found = Found((*self.found.groups, *found.groups), self.found.skipped | found.skipped)
        self.full, self.kept = full | self.full, self.kept | {axis: torch.arange(n) for axis, n in full.items()}
        self.terms = mac_terms(self.model, self.problem.example, self.groups)
        self.find_least()

    def find_least(self) -> CostModel:
        """Set the share of the dense cost that is left with every group at its floor; return what that costs."""
        cost, sizes = self.cost(self.kind), {group.name: group.size for group in self.groups}
        self.least = reduce_to_floors(cost, self.groups, self.options.floors, sizes) / self.whole
        return cost

    def finish(self) -> nn.Module:
        """The model as it would be handed over now: one layer, as it was, wherever two are no gain."""
        if self.whole_layers is None:
            return self.model
        model = preserve.copy_model(self.model)
        for group in self.groups:
            layer: Any = model.get_submodule(group.name)
            if group.kind == "head_dim":
                gain = group.size < self.full[group.members[0].axis]
            else:
                inputs, outputs = layer[0].weight[0].numel(), len(layer[1].weight)
                gain = group.size * (inputs + outputs) < inputs * outputs
            if gain and group.kind == "direction":
                fold_bias(layer)
            elif not gain:
                replace_module(model, group.name, copy.deepcopy(self.whole_layers.get_submodule(group.name)))
        return model

    def size(self) -> Size:
        """What the model costs, time apart."""
        model = self.finish()
        if model is self.model:
            macs = round(sum(term.amount for term in self.terms))
        else:
            macs = sum(count_macs(model, self.problem.example).values())
        return Size(macs, parameters_of(model), bytes_of(model))

    def deliver(self) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
        """The model, a copy where it shrinks further; widths of the layers whose outputs are as wide as their units."""
        reached = self.steps[-1].target if self.steps else 1.0
        model, rows = self.finish(), []
        owners = {
            member.axis: g for g in self.found.groups for member in g.members[: 1 if g.kind == "head_dim" else None]
        }
        for name, module in model.named_modules():
            axes: list[Axis] = [(name, "heads", 0), (name, "head_dim", 0), (name, "out", 0), (f"{name}.0", "out", 0)]
            for axis in axes[: 2 if layers.is_normalisation(module) else 4]:
                kind = owners[axis].kind if axis in owners else ""
                if kind and (kind == "direction") == (axis is axes[3]):
                    rows.append(LayerRow(name, type(module).__name__, kind, self.full[axis], len(self.kept[axis])))
        removed = {}
        for group in self.found.groups if self.options.structure == "channels" else ():
            member = group.members[0]
            gone = ~torch.isin(member.channel, self.kept[member.axis])
            if bool(gone.any()):
                removed[group.name] = member.unit[gone].unique().tolist()
        budget = {self.kind: (reached if self.stop is None else self.stop) * self.unit}
        facts = {"budget": budget, "pruned": self.size(), "layers": tuple(rows), "removed": removed}
        model = preserve.copy_model(model) if len(self.stops) > 1 and model is self.model else model
        return model, {}, facts | {"notes": tuple(self.notes())}

    def notes(self) -> Iterator[str]:
        """Why this structure, what keeps its width, and how the budget was met."""
        if self.why:
            yield f"structure={self.options.structure!r} was chosen: {self.why}."
        for name, reason in self.found.skipped.items():
            if reason not in _EXPECTED:
                yield f"{name} keeps its width: {reason}."
        if any(group.kind == "width" for group in self.groups):
            yield "Residual width under a LayerNorm was offered: what is removed there changes the norm's statistics."
        if self.timings is not None:
            ratio, spread = self.timings.ratios[1], self.timings.spreads[1]
            verdict = "met" if ratio <= self.stop else f"missed by {ratio - self.stop:.3f}"
            dense = f" ({self.unit:.3g} ms)" if self.kind == "latency_ms" else ""
            yield (
                f"One image takes {ratio:.3f} ± {spread:.3f} of the dense model's time{dense}: median and half the "
                f"interquartile range of ratios, timed in turns. The budget of {self.stop:.3f} is {verdict}."
            )
        elif self.overshoot > 1e-6:
            yield (
                f"The budget is overshot by up to {self.overshoot:.1%}: products of activations outside of known "
                "layers shrank as well, which the plan did not foresee."
            )


def find_channels(
    problem: Problem, options: ChannelOptions, stops: Sequence[float], ways: Sequence[Tensor] = ()
) -> Channels:
    """Find the units of a model, and see that the budget can be reached.

    Args:
        problem: The dense model; left as it was.
        options: How to prune.
        stops: Shares of the dense model (of ``latency_ms``: milliseconds) at which a model is handed over, falling.
        ways: Other images on which removal is tried too: they lead through other modules than the example.

    Raises:
        ArgumentError: A glob in ``ignore`` matches nothing.
        BudgetError: The budget lies below what the floors allow, or the dense model meets it.
        UnsupportedModelError: Nothing can be removed safely.
    """
    example = problem.example
    if options.structure == "directions":
        model, found = preserve.copy_model(problem.dense).eval(), Found(())
    else:
        where = problem.dense, example, options.ignore, options.floors.width, options.seed
        model, found = find_units(*where, ways=ways)
    full = axis_widths(model, found.groups)
    consumers = [axis[0] for axis in full if axis[1] == "in"]
    channels = Channels(
        *(problem, options, model, tuple(stops), consumers),
        kept={axis: torch.arange(width) for axis, width in full.items()},
        found=found,
        groups=found.groups,
        full=full,
        terms=mac_terms(model, example),
        kind=next(iter(options.budgets), "macs"),
    )
    if isinstance(options.criterion, Scores):
        check_scores(options.criterion, {group.name: (group.size,) for group in found.groups})
    channels.whole = channels.cost(channels.kind).total
    if options.structure == "auto":
        structure, channels.why = choose_structure(channels, stops)
        options = channels.options = replace(options, structure=structure)
    if options.structure != "channels":
        consumers += [name for name, module in model.named_modules() if layers.is_factorable(module)]
    if options.structure == "directions":
        channels.split()
    cost, last = channels.find_least(), channels
    if options.structure == "mixed":  # with both as narrow as they get: also, whether there are directions
        last = channels.copy()
        lowest = {group.name: torch.zeros(group.size) for group in last.groups}
        units = last.select(lowest, last.least + 1e-3)
        last.foreseen = None
        last.apply(units)
        try:
            last.split()
        except UnsupportedModelError:
            if not channels.why:  # it was asked for
                raise
            channels.why, last = "no layer of this model can lose directions", channels
            channels.options = replace(options, structure="channels")
        cost = last.find_least()
    if channels.kind == "latency_ms":
        timings = distributed.broadcast(time_in_turns([problem.dense], example[:1]))
        channels.unit = timings.latencies[0].median_ms
        channels.stops = as_share(stops, channels.unit)
    elif stops and channels.kind != "latency":
        most = [(name, share) for name, share in cost.shares().items() if name][:3]
        holds = "; ".join(f"{name} ({share:.0%} of it): {last.found.reason(name)}" for name, share in most)
        check_least(channels.kind, stops[-1], last.least, holds)
    return channels


def choose_structure(channels: Channels, stops: Sequence[float]) -> tuple[Any, str]:
    """What ``structure="auto"`` stands for, and why, in the words of a report; nothing where channels are all there is.

    Directions were measured where one budget of a model of tokens is scored by relevance: there they keep more below
    `DEEP`. Tokens are what linear layers read at more than one position.
    """
    options, model = channels.options, channels.model
    plain = isinstance(options.ranking, Relevance) and options.scope == "global" and options.max_drop is None
    if not plain or len(stops) != 1 or channels.kind not in ("macs", "params"):
        return "channels", ""
    linear = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tokens = sum(term.amount for term in channels.terms if term.amount > linear.get(term.name, math.inf))
    share = tokens / sum(term.amount for term in channels.terms)
    if share <= 0.5:
        return "channels", ""
    if stops[0] < DEEP:
        return "mixed", f"{share:.0%} of the multiply-accumulates are linear layers of tokens, and less than half stay"
    return "channels", "down to half of the cost channels and heads keep as much as directions do, and are faster"


def find_units(
    dense: nn.Module,
    example: Tensor,
    ignore: Sequence[str],
    width: bool,
    seed: int = 0,
    structure: str = "channels",
    ways: Sequence[Tensor] = (),
) -> tuple[nn.Module, Found]:
    """A copy of a model in eval mode, and its units that can be removed safely.

    Of channels it has the layers of the model (see `find_groups`), of directions two for each (see `find_directions`).
    """
    model = preserve.copy_model(dense).eval()
    if structure == "directions":
        model, found = find_directions(model, example, ignore=ignore)
    else:
        found = find_groups(model, example, ignore=ignore, width=width)
    return model, verify_groups(model, [example, *ways], found, seed=seed)
