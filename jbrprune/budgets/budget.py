"""What a user asks for: one budget, as a share of the dense model to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from torch import Tensor, nn

from jbrprune.budgets.cost import Account, Term, axis_widths, channel_terms, mac_terms, parameter_terms
from jbrprune.errors import BudgetError
from jbrprune.structure.groups import Group

KINDS = ("macs", "params", "channels")
"""What is counted."""
TIMED = ("latency", "latency_ms")
"""What is timed."""
BUDGETS = KINDS + TIMED
STEP = 0.05
"""Default size of a step: this share of the dense cost goes between two scorings."""


@dataclass(frozen=True)
class Budget:
    """Keep at most ``share`` of the dense model's ``kind``.

    Attributes:
        kind: ``macs``, ``params``, ``channels``, ``latency`` or ``latency_ms``.
        share: The share; of ``latency_ms`` the milliseconds, until `of_dense` makes it a share.
        unit: What one dense model is in the numbers that the user gives: 1, or its milliseconds.
    """

    kind: str
    share: float
    unit: float = 1.0

    @staticmethod
    def of(**shares: float | None) -> Budget:
        """The one budget that is given.

        Raises:
            BudgetError: None or several are given, the share is not in (0, 1), or the milliseconds are not positive.
        """
        given = {kind: share for kind, share in shares.items() if share is not None}
        if len(given) != 1:
            got = " and ".join(f"{kind}={share}" for kind, share in given.items()) or "none"
            raise BudgetError(
                f"Give exactly one budget of {', '.join(f'{k}=' for k in BUDGETS)} (a share to keep, or milliseconds); "
                f"got {got}."
            )
        kind, share = given.popitem()
        most, what = (math.inf, "milliseconds") if kind == "latency_ms" else (1, "the share of the dense model to keep")
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share < most:  # nor is NaN
            raise BudgetError(f"{kind} must satisfy 0 < {kind} < {most} ({what}), got {share!r}.")
        return Budget(kind, float(share))

    @property
    def asked(self) -> float:
        """The share in the unit of the user."""
        return self.share * self.unit

    @property
    def timed(self) -> bool:
        """Whether its cost is timed; else it is counted."""
        return self.kind in TIMED

    @property
    def per_cost(self) -> bool:
        """Whether units are ranked by score per cost; a channel budget ranks by score alone."""
        return self.kind != "channels"

    def of_dense(self, milliseconds: float) -> Budget:
        """A budget in milliseconds as a share of what the dense model takes.

        Raises:
            BudgetError: The dense model is within the budget.
        """
        if self.share >= milliseconds:
            raise BudgetError(
                f"latency_ms={self.share:g} is met by the dense model, which takes {milliseconds:.3g} ms here for one "
                "image. Ask for less, or prune to another budget."
            )
        return replace(self, share=self.share / milliseconds, unit=milliseconds)

    def account(self, model: nn.Module, images: Tensor, groups: Sequence[Group]) -> Account:
        """The cost of the model as it is now, in the unit of this budget; see `jbrprune.budgets.pricing`."""
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
