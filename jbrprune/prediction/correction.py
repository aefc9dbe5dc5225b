"""Bending a predicted curve through measured points.

With x the predicted amplitude, sqrt(TPV), the corrected one is x / (1 + c x), or x (1 + c x) where more was measured
than predicted: both grow with x, and small changes, for which first order is right, stay as they are. One measured
point gives one strength c; between several points c is interpolated, below them it stays. Above them the ratio of the
last point stays: a strength found at a small change says nothing about one a thousand times as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Correction:
    """Strengths c at predicted amplitudes; negative ones mean that more was measured than predicted.

    Attributes:
        amplitudes: Ascending.
        strengths: One for each; none: nothing is corrected.
    """

    amplitudes: tuple[float, ...] = ()
    strengths: tuple[float, ...] = ()

    def scale(self, tpv: float) -> float:
        """What to multiply a change with whose predicted TPV this is."""
        if not self.amplitudes:
            return 1.0
        x = min(math.sqrt(tpv), self.amplitudes[-1])
        strength = float(np.interp(x, self.amplitudes, self.strengths))
        return 1 / (1 + strength * x) if strength >= 0 else 1 - strength * x


def corrected(points: Iterable[tuple[float, float]]) -> Correction:
    """The correction through (predicted TPV, measured TPV); points where either is zero say nothing.

    Example:
        >>> corrected([(4.0, 1.0)]).scale(4.0)
        0.5
        >>> corrected([(1.0, 9.0)]).scale(1.0)
        3.0
    """
    found = sorted({math.sqrt(p): math.sqrt(m) for p, m in points if p > 0 and m > 0}.items())
    strengths = [(x / y - 1) / x if y <= x else (1 - y / x) / x for x, y in found]
    return Correction(tuple(x for x, _ in found), tuple(strengths))
