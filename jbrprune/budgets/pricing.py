"""What a model costs in the unit of a budget, now and after each plan: counted, or timed.

Counted costs are sums of terms. A latency is *measured* on the whole model, in turns with the dense one, and its
account says how it would change: by the layers' times over their widths, mapped linearly so that the account is right
at two measured models, the present one and the one with every group at its floor. What layers do not explain
(overheads, additions, what does not shrink) thereby finds its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import Budget
from jbrprune.budgets.cost import CostModel, Priced, Term, axis_widths, cost_model
from jbrprune.budgets.layer_times import Stopwatch, Table, best_multiple, tables
from jbrprune.budgets.selection import Floors, reduce_to_floors, select
from jbrprune.budgets.timing import Ratio, latencies, relative_latency
from jbrprune.data import distributed
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model
from jbrprune.structure.groups import Axis, Group, Selection
from jbrprune.structure.slicing import remove_units

ATTEMPTS = 8
"""Plans that are tried for one step until the measured cost is low enough."""

Pricer = Callable[[nn.Module, Sequence[Group]], CostModel]
"""The account of the model as it is now."""


def pricer(budget: Budget, dense: nn.Module, example: Tensor, groups: Sequence[Group], floors: Floors) -> Pricer:
    """How models on the way from a dense one are priced.

    Args:
        budget: Its kind is what counts.
        dense: The dense model; left as it was.
        example: Two images on its device.
        groups: The units of the dense model.
        floors: How narrow groups may become.
    """
    if not budget.timed:
        return lambda model, left: cost_model(budget.kind, model, example, left)
    return _latency_pricer(dense, example[:1], tuple(groups), floors)


def settled(budget: Budget, floors: Floors, choose: bool, dense: nn.Module, example: Tensor) -> tuple[Budget, Floors]:
    """What has to be timed before a run can be planned: what widths are multiples of, and what a millisecond is.

    Args:
        budget: The budget.
        floors: How narrow groups may become.
        choose: Choose ``round_to`` for this machine.
        dense: The dense model; left as it was.
        example: Two images on its device.

    Raises:
        BudgetError: As many milliseconds as the dense model takes, or more.
    """
    if choose:
        watch = Stopwatch.of(preserve.device_of(dense))
        floors = replace(floors, round_to=best_multiple(dense, example, watch))
    if budget.kind == "latency_ms":
        budget = budget.of_dense(latencies([dense], example[:1])[0].median_ms)
    return distributed.same((budget, floors))  # every rank has its own clock


@dataclass(frozen=True, eq=False)
class Plan:
    """What a step removes.

    Attributes:
        selection: Group -> units.
        foreseen: What the smaller model was expected to cost.
        after: The account of the smaller model, as it was measured.
    """

    selection: Selection
    foreseen: float
    after: CostModel


def planned(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    price: Pricer,
    target: float,
    *,
    floors: Floors,
    dense_sizes: Mapping[str, int],
    per_cost: bool,
) -> Plan:
    """Select units until the smaller model, measured, costs at most the target.

    What is counted fits at once. What is timed may not: then more is asked for, by the share that was missed, at most
    until every group is at its floor.

    Args:
        model: The model; left as it was.
        groups: Its units.
        scores: Group name -> ``[units]``.
        price: From `pricer`.
        target: What it may cost.
        floors: How narrow groups may become.
        dense_sizes: Group name -> units in the dense model.
        per_cost: See `jbrprune.budgets.selection.select`.
    """

    def tried(aim: float) -> Plan:
        account = price(model, groups)
        selection = select(scores, groups, account, aim, floors=floors, dense_sizes=dense_sizes, per_cost=per_cost)
        smaller = copy_model(model, share=True)  # removal replaces tensors, it does not change them
        return Plan(selection, account.total, price(smaller, remove_units(smaller, groups, selection)))

    plan, aim, least = tried(target), target, -math.inf
    for _ in range(ATTEMPTS):
        if plan.after.total <= target * (1 + 1e-9) or aim <= least:
            break
        least = reduce_to_floors(price(model, groups), groups, floors, dense_sizes)
        aim = max(least, aim * target / plan.after.total)
        plan = tried(aim)
    return plan


@dataclass(frozen=True)
class _Scaled:
    """A table of a dense layer, seen from a model in which parts of its axes are gone already."""

    table: Table
    left: tuple[float, ...]
    factor: float

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of the table."""
        return self.table.axes

    def price(self, shares: Sequence[float]) -> float:
        """The table's at the product of what was left and what would be."""
        return self.factor * self.table.price([left * share for left, share in zip(self.left, shares)])


def _latency_pricer(dense: nn.Module, image: Tensor, groups: tuple[Group, ...], floors: Floors) -> Pricer:
    full = axis_widths(dense, groups)
    sizes = {group.name: group.size for group in groups}
    watch = Stopwatch.of(preserve.device_of(dense))
    found = distributed.same(tables(dense, image, list(full), watch, round_to=floors.round_to))

    def timed(model: nn.Module) -> Ratio:
        return distributed.same(relative_latency(model, dense, image))

    smallest, least = _at_floors(dense, groups, floors)
    known = {tuple(sizes.values()): Ratio(1.0, 0.0, 0)}
    lowest = known.setdefault(tuple(g.size for g in least), timed(smallest))

    def price(model: nn.Module, left: Sequence[Group]) -> CostModel:
        key = tuple(group.size for group in left)
        now = known[key] = known.get(key) or timed(model)
        widths = axis_widths(model, left)
        shares = [tuple(widths[axis] / full[axis] for axis in table.axes) for table in found]

        def terms(factor: float) -> list[Priced]:
            return [_Scaled(table, share, factor) for table, share in zip(found, shares)]

        unscaled = CostModel(terms(1.0), left, widths)
        slope, fixed = _line(unscaled.total, reduce_to_floors(unscaled, left, floors, sizes), now.median, lowest.median)
        return CostModel([Term(fixed, ()), *terms(slope)], left, widths, spread=now.spread)

    return price


def _line(now: float, floor: float, measured_now: float, measured_floor: float) -> tuple[float, float]:
    """Slope and offset of the line through two points; through the first and zero, where noise allows no other."""
    if now > floor and measured_now > measured_floor:
        slope = (measured_now - measured_floor) / (now - floor)
        return slope, measured_now - slope * now
    return (measured_now / now, 0.0) if now > 0 else (0.0, measured_now)


def _at_floors(dense: nn.Module, groups: Sequence[Group], floors: Floors) -> tuple[nn.Module, tuple[Group, ...]]:
    """The smallest model that may come out, whatever it computes."""
    smallest = copy_model(dense)
    gone = {group.name: torch.arange(floors.of(group, group.size), group.size) for group in groups}
    return smallest, remove_units(smallest, groups, {name: units for name, units in gone.items() if len(units)})


def note(budget: Budget, after: CostModel, floors: Floors) -> str:
    """How far a budget of time was met, for a report."""
    text = f"Latency of one image: {after.total:.3f} ± {after.spread:.3f} of the dense model's"
    if budget.unit != 1:
        text += f", which took {budget.unit:.3g} ms"
    verdict = "met" if after.total <= budget.share * (1 + 1e-9) else f"missed by {after.total - budget.share:.3f}"
    return (
        f"{text} (median and half the interquartile range of ratios, the two timed in turns); the budget of "
        f"{budget.share:.3f} is {verdict}. Widths are multiples of {floors.round_to}."
    )
