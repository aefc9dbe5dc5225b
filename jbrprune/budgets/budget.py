"""What a user asks for: one budget, as a share of the dense model to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from jbrprune.errors import BudgetError

KINDS = ("macs", "params", "channels")
"""What is counted."""
TIMED = ("latency", "latency_ms")
"""What is timed on the whole model; units are ranked and priced by MACs."""
BUDGETS = KINDS + TIMED
STEP = 0.05
"""Default size of a step: this share of the dense cost goes between two scorings."""


@dataclass(frozen=True)
class Budget:
    """Keep at most ``share`` of the dense model's ``kind``.

    Attributes:
        kind: ``macs``, ``params``, ``channels``, ``latency`` or ``latency_ms``.
        share: The share; of ``latency_ms`` the milliseconds for one image.
    """

    kind: str
    share: float

    @staticmethod
    def of(**shares: float | None) -> Budget:
        """The one budget that is given.

        Raises:
            BudgetError: None or several are given, the share is not in (0, 1), or the milliseconds are not positive.

        Example:
            >>> Budget.of(macs=0.5, params=None)
            Budget(kind='macs', share=0.5)
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

    def as_share(self, dense_ms: float) -> Budget:
        """A budget of ``latency_ms`` as the share that it is of the dense model's latency.

        Args:
            dense_ms: Milliseconds that the dense model takes for one image.

        Raises:
            BudgetError: The dense model is within the budget.
        """
        if self.share >= dense_ms:
            raise BudgetError(
                f"latency_ms={self.share:g} is met by the dense model, which takes {dense_ms:.3g} ms here for one "
                "image. Ask for less, or prune to another budget."
            )
        return Budget("latency", self.share / dense_ms)

    def schedule(self, steps: int | None = None, *, start: float = 1.0) -> list[float]:
        """Shares to reach, step by step, at equal distances from ``start``; the last one is the budget's.

        Args:
            steps: Number of steps; None: as many as leave no distance greater than `STEP`.
            start: Share where the first step begins.

        Raises:
            BudgetError: No step, or not a whole number of them.

        Example:
            >>> Budget("macs", 0.5).schedule(2)
            [0.75, 0.5]
        """
        if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1):
            raise BudgetError(f"steps must be a whole number of at least 1, got {steps!r}.")
        count = steps or math.ceil((start - self.share) / STEP - 1e-9)
        return [start - (start - self.share) * (i + 1) / count for i in range(count - 1)] + [self.share]


def check_reachable(budget: Budget, least: float) -> None:
    """Refuse a budget below what the floors allow.

    Args:
        budget: A budget of what is counted.
        least: Share of the dense cost with every group at its floor.

    Raises:
        BudgetError: Says how far it can go.
    """
    if least > budget.share:
        raise BudgetError(
            f"{budget.kind}={budget.share:g} cannot be reached: with every group at its floor {least:.3f} of the dense "
            f"model's {budget.kind} are left. Ask for at least {least + 0.001:.3f}, lower the floors, or ignore less."
        )
