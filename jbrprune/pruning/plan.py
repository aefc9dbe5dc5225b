"""What would go, if everything went at once: cuts of a dense model to several budgets, from one scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from jbrprune.budgets.cost import cost_model
from jbrprune.budgets.selection import select
from jbrprune.pruning.loop import Settings, State
from jbrprune.structure.groups import Selection


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


def planned_cuts(state: State, scores: Mapping[str, Tensor], settings: Settings, shares: Sequence[float]) -> list[Cut]:
    """The units that one step of `jbrprune.pruning.loop` would remove from the dense model to reach each share.

    The same ranking, floors and multiples; but all in one step, whereas a run scores what is left again after every
    step, which cannot be foreseen.

    Args:
        state: From `jbrprune.pruning.loop.start`, before any step.
        scores: Group -> ``[units]``.
        settings: How to prune.
        shares: Of the budget's kind.

    Raises:
        BudgetError: A share lies below what the floors allow.
    """
    return [_cut(state, scores, settings, share) for share in shares]


def _cut(state: State, scores: Mapping[str, Tensor], settings: Settings, share: float) -> Cut:
    units = select(
        scores,
        state.groups,
        state.price(state.model, state.groups),
        share * state.whole,
        floors=settings.floors,
        dense_sizes=state.dense_sizes,
        per_cost=settings.budget.per_cost,
    )
    return Cut(share, units, *(_kept(state, units, kind) for kind in ("macs", "params")))


def _kept(state: State, units: Selection, kind: str) -> float:
    cost = cost_model(kind, state.model, state.example, state.groups)
    whole = cost.total
    for group, gone in units.items():
        cost.remove(group, len(gone))
    return cost.total / whole
