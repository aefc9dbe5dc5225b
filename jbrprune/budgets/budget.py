"""What a user asks for, a share of the dense model to keep and floors, and the choice of what to remove for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from jbrprune.budgets.cost import CostModel
from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.structure.groups import Group, Selection

COUNTED = ("macs", "params", "channels")
"""What is counted."""
TIMED = ("latency", "latency_ms")
"""What is timed on the whole model; units are ranked and priced by MACs."""
BUDGETS = COUNTED + TIMED
Ranking = Literal["global", "raw", "layer"]
"""How units are ranked; see `select`."""
STEP = 0.05
"""Default size of a step: this share of the dense cost goes between two scorings."""


def schedule(share: float, steps: int | None = None, *, start: float = 1.0) -> list[float]:
    """Shares of the dense cost to reach, step by step, at equal distances from ``start``; the last one is ``share``.

    Args:
        share: What is to be left in the end.
        steps: Number of steps; None: as many as leave no distance greater than `STEP`.
        start: Share where the first step begins.

    Example:
        >>> schedule(0.5, 2)
        [0.75, 0.5]
    """
    count = steps or math.ceil((start - share) / STEP - 1e-9)
    return [start - (start - share) * (i + 1) / count for i in range(count - 1)] + [share]


def as_share(milliseconds: Sequence[float], dense_ms: float) -> tuple[float, ...]:
    """Budgets of ``latency_ms`` as shares of the milliseconds that the dense model takes for one image.

    Raises:
        BudgetError: The dense model is within one of them.
    """
    if max(milliseconds) >= dense_ms:
        raise BudgetError(
            f"latency_ms={max(milliseconds):g} is met by the dense model, which takes {dense_ms:.3g} ms here for one "
            "image. Ask for less, or prune to another budget."
        )
    return tuple(budget / dense_ms for budget in milliseconds)


def check_least(kind: str, share: float, least: float, holds: str = "") -> None:
    """Refuse a budget below what the floors allow.

    Args:
        kind: ``macs``, ``params`` or ``channels``.
        share: Share of the dense cost to keep.
        least: Share of the dense cost with every group at its floor.
        holds: Which layers cost most then, and why.

    Raises:
        BudgetError: Says how far it can go.
    """
    if least > share:
        raise BudgetError(
            f"{kind}={share:g} cannot be reached: with every group at its floor {least:.3f} of the dense model's "
            f"{kind} are left. Ask for at least {least + 0.001:.3f}, lower floors=, ignore less, or change structure=."
            + (f" Most of it stays in {holds}." if holds else "")
        )


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text, "panel": "Budget"})


@dataclass(frozen=True)
class Floors:
    """How narrow a group may become.

    Attributes:
        share: Share of the dense width that stays at least.
        channels: Channels that stay at least, where the dense group has as many; of heads and directions, one stays.
        round_to: Kept widths and ranks are multiples of this, as far as the dense width allows.
        width: Whether the residual width under LayerNorms is offered for removal at all.
    """

    share: float = _option(0.0, "Share of every group's dense width that stays at least.")
    channels: int = _option(8, "Channels of every group that stay, where it has as many; of heads and directions, one.")
    round_to: int = _option(1, "Keep widths at multiples of this number.")
    width: bool = _option(False, "Also offer the residual width under LayerNorms, whose statistics then change.")

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ArgumentError(
                f"Floors: share must satisfy 0 <= share < 1 (a share of the dense width), got {self.share!r}."
            )
        for name, value in (("channels", self.channels), ("round_to", self.round_to)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"Floors: {name} must be a whole number of at least 1, got {value!r}.")

    def of(self, group: Group, dense_size: int) -> int:
        """Units of a group that must stay.

        Args:
            group: The group, at its present or dense size.
            dense_size: Its units in the dense model.
        """
        share = math.ceil(self.share * dense_size - 1e-9)
        if group.kind == "head":
            return max(1, share)
        if group.kind == "group":  # as many channels, in whole groups of the convolution
            wide = group.channels_per_unit()[group.members[0].axis]
            return min(dense_size, max(1, share, math.ceil(self.channels / wide)))
        least = max(1, share, min(self.channels, dense_size) if group.kind not in ("direction", "head_dim") else 1)
        return min(dense_size, math.ceil(least / self.round_to) * self.round_to)


def select(
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    cost: CostModel,
    target: float,
    *,
    floors: Floors,
    dense_sizes: Mapping[str, int] | None = None,
    scope: Ranking = "global",
) -> Selection:
    """Choose the units to remove so that the total of the cost model falls to the target.

    Units are taken in the order of score / cost (or as ``scope`` says), lowest first, ties in the order of
    groups and units; the last one is the one that meets the target, so it is overshot by less than one
    unit (one block of ``round_to`` units, which is ranked by the mean of its scores).

    Args:
        scores: Group name -> ``[units]``.
        groups: The units.
        cost: Prices the plan; it is left at the price of the selection.
        target: Total to reach, in the unit of the cost model.
        floors: How narrow groups may become.
        dense_sizes: Group name -> units in the dense model, for the floors; default: the groups' sizes.
        scope: ``global`` ranks all units together by score per cost, ``raw`` by score alone; ``layer`` ranks the
            units of each group by themselves and leaves the same share of the dense width of every group.

    Returns:
        Group name -> units to remove, ascending; groups that lose nothing are absent.

    Raises:
        BudgetError: The target lies below what the floors allow (says how far it can go).
    """
    if cost.total <= target:
        return {}
    blocks: list[tuple[float, int, Tensor]] = []  # key, number of the group, units that go together
    for number, group in enumerate(groups):
        saved = cost.saving(group.name)
        if saved <= 0:  # what saves nothing would be lost for nothing
            continue
        score, step = scores[group.name], floors.round_to if group.kind in ("channel", "width") else 1
        order = torch.sort(score, stable=True).indices
        size = (dense_sizes or {}).get(group.name, group.size)
        removable = group.size - floors.of(group, size)
        start, stop, key = 0, group.size % step or step, -math.inf  # the first block leaves a multiple
        while stop <= removable:
            units = order[start:stop]
            # rounding must not rank a later block of a group before an earlier one
            if scope == "layer":
                key = (size - group.size + stop) / size
            else:
                key = max(key, float(score[units].mean()) / (saved if scope == "global" else 1.0))
            blocks.append((key, number, units))
            start, stop = stop, stop + step
    before = cost.total
    taken: dict[str, list[Tensor]] = {}
    for _, number, units in sorted(blocks, key=lambda block: block[:2]):
        name = groups[number].name
        cost.remove(name, len(units))
        taken.setdefault(name, []).append(units)
        if cost.total <= target * (1 + 1e-12):
            return {name: torch.cat(units).sort().values for name, units in taken.items()}
    raise BudgetError(
        f"The budget cannot be reached: with every group at its floor {cost.total / before:.3f} of the present cost "
        f"are left, {target / before:.3f} were asked for. Lower the floors, ignore fewer layers, or ask for less."
    )


def select_ranks(
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    cost: CostModel,
    target: float,
    *,
    floors: Floors,
    dense_sizes: Mapping[str, int],
) -> Selection:
    """Choose the units to remove where the first ones of a group may save nothing, as directions do.

    The smallest sum of the scores that go plus price * cost is found group by group, and the price by bisection, so
    that the cost meets the target. The room that is left is given back to the units with the most score per cost, until
    none fits: the target is overshot by less than one block.

    Args:
        scores: Group name -> ``[units]``.
        groups: The units.
        cost: Prices the plan; it is left at the price of the selection.
        target: Total to reach, in the unit of the cost model.
        floors: How narrow groups may become.
        dense_sizes: Group name -> units in the dense model, for the floors.

    Returns:
        Group name -> units to remove, ascending; groups that lose nothing are absent.

    Raises:
        BudgetError: The target lies below what the floors allow.
    """
    whole, orders, gone, lost, saved = cost.total, {}, {}, {}, {}
    for group in groups:
        name, score = group.name, scores[group.name].double()
        orders[name] = torch.sort(score, stable=True).indices
        counts, savings = [0], [0.0]
        removable = group.size - floors.of(group, dense_sizes[name])
        for count in range(1, removable + 1):
            cost.remove(name)
            if whole - cost.total > savings[-1] + 1e-12 * whole and (group.size - count) % floors.round_to == 0:
                counts.append(count)
                savings.append(whole - cost.total)
        cost.remove(name, -removable)
        cost.total = whole
        gone[name], saved[name] = torch.tensor(counts), score.new_tensor(savings)
        lost[name] = torch.cat([score.new_zeros(1), score[orders[name]].cumsum(0)])[counts]
    scale = whole / max(1e-300, sum(float(each[-1]) for each in lost.values()))

    def choose(price: float) -> dict[str, int]:
        return {name: int((scale * lost[name] - price * saved[name]).argmin()) for name in orders}

    def price_of(chosen: Mapping[str, int]) -> float:
        return whole - sum(float(saved[name][number]) for name, number in chosen.items())

    low, high = -700.0, 700.0  # logarithms
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if price_of(choose(math.exp(middle))) <= target else (middle, high)
    chosen = choose(math.exp(high))
    left = price_of(chosen)
    if left > target * (1 + 1e-12):
        raise BudgetError(
            f"The budget cannot be reached: with every group at its floor {left / whole:.3f} of the present cost are "
            f"left, {target / whole:.3f} were asked for. Lower the floors, ignore fewer layers, or ask for less."
        )
    while True:  # what is left of the room
        backs = []
        for name, number in chosen.items():
            dearer = saved[name][number] - saved[name][:number]
            rates = (lost[name][number] - lost[name][:number]) / dearer
            rates[dearer > target - price_of(chosen)] = -1
            if number and rates.max() >= 0:
                backs.append((float(rates.max()), name, int(rates.argmax())))
        if not backs:
            break
        chosen[max(backs)[1]] = max(backs)[2]
    for name, number in chosen.items():
        cost.remove(name, int(gone[name][number]))
    return {name: orders[name][: gone[name][n]].sort().values for name, n in chosen.items() if n}


def reduce_to_floors(cost: CostModel, groups: Sequence[Group], floors: Floors, dense_sizes: Mapping[str, int]) -> float:
    """Remove every unit above the floors from a cost model; return its total, the least that can be reached.

    Args:
        cost: The cost of the model as it is; it is left at the floors.
        groups: The units that are left.
        floors: How narrow groups may become.
        dense_sizes: Group name -> units in the dense model.
    """
    for group in groups:
        cost.remove(group.name, max(0, group.size - floors.of(group, dense_sizes[group.name])))
    return cost.total
