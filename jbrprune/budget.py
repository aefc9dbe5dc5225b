"""What a user asks for: one budget, as a share of the dense model to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor, nn

from jbrprune.cost import Account, Term, axis_widths, channel_terms, mac_terms, parameter_terms
from jbrprune.errors import BudgetError
from jbrprune.groups import Group

KINDS = ("macs", "params", "channels")
STEP = 0.05
"""Default size of a step: this share of the dense cost goes between two scorings."""


@dataclass(frozen=True)
class Budget:
    """Keep at most ``share`` of the dense model's ``kind`` (``macs``, ``params`` or ``channels``)."""

    kind: str
    share: float

    @staticmethod
    def of(**shares: float | None) -> Budget:
        """The one budget that is given.

        Raises:
            BudgetError: None or several are given, or the share is not in (0, 1).
        """
        given = {kind: share for kind, share in shares.items() if share is not None}
        if len(given) != 1:
            got = " and ".join(f"{kind}={share}" for kind, share in given.items()) or "none"
            raise BudgetError(
                f"Give exactly one budget of {', '.join(f'{k}=' for k in KINDS)} (a share to keep); got {got}."
            )
        kind, share = given.popitem()
        if not isinstance(share, Real) or not 0 < share < 1:  # neither is NaN nor a boolean
            raise BudgetError(
                f"{kind} must satisfy 0 < {kind} < 1 (the share of the dense model to keep), got {share!r}."
            )
        return Budget(kind, float(share))

    @property
    def per_cost(self) -> bool:
        """Whether units are ranked by score per cost; a channel budget ranks by score alone."""
        return self.kind != "channels"

    def account(self, model: nn.Module, images: Tensor, groups: Sequence[Group]) -> Account:
        """The cost of the model as it is now, in the unit of this budget."""
        terms: dict[str, Sequence[Term]] = {
            "macs": mac_terms(model, images) if self.kind == "macs" else (),
            "params": parameter_terms(model) if self.kind == "params" else (),
            "channels": channel_terms(groups),
        }
        return Account(terms[self.kind], groups, axis_widths(model, groups))

    def schedule(self, steps: int | None = None, *, start: float = 1.0) -> list[float]:
        """Shares to reach, step by step, at equal distances from ``start``; the last one is the budget's."""
        if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1):
            raise BudgetError(f"steps must be a whole number of at least 1, got {steps!r}.")
        count = steps or math.ceil((start - self.share) / STEP - 1e-9)
        return [start - (start - self.share) * (i + 1) / count for i in range(count - 1)] + [self.share]
