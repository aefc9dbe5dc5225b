"""Predicted damage: from first-order changes of the logits to test prediction variance (TPV) and flips.

TPV = E_x sum_k (change of f_k)^2, a flip is a sample whose top-1 is another one after the change. A first-order change
knows no end: twice the channels, twice the change, until it is larger than the logits themselves. In a deep net what is
removed later acts on what is left, so the change *saturates*:

    change' = change * (1 - exp(-n)) / n,    n = ||change|| / ||f - mean f||

This is the change by 1 at the end of d(left)/dt = -n left. For small changes it is the first order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor


@dataclass(frozen=True)
class Damage:
    """What a cut does, over N samples.

    Attributes:
        tpv: Mean over samples of the summed squares of the logits' changes.
        tpv_se: Its standard error over samples.
        flips: Share of samples whose top-1 changes.
        flips_low: Lower end of its 95 % Wilson interval.
        flips_high: Upper end.
    """

    tpv: float
    tpv_se: float
    flips: float
    flips_low: float
    flips_high: float


def damage(top: Tensor, change: Tensor, rest: Tensor | None = None) -> Damage:
    """TPV and flips of one cut.

    Args:
        top: ``[N, R]`` logits of the dense model, the largest first.
        change: ``[N, R]`` their changes.
        rest: ``[N]`` change of all other logits under random signs, or None.

    Returns:
        Errors come from the choice of the samples alone. With one sample the standard error is NaN.
    """
    squares = change.double().square().sum(1)
    if rest is not None:
        squares = squares + rest.double().square()
    n = len(squares)
    flipped = int(((top + change).argmax(1) != top.argmax(1)).sum())
    interval = binomtest(flipped, n).proportion_ci(0.95, method="wilson")
    error = float(squares.std()) / math.sqrt(n) if n > 1 else math.nan
    return Damage(float(squares.mean()), error, flipped / n, float(interval.low), float(interval.high))


def measure_damage(dense: Tensor, pruned: Tensor) -> Damage:
    """TPV and flips between two ``[N, K]`` logits of the same samples."""
    return damage(dense, pruned - dense)


def saturation(change: Tensor, rest: Tensor, spread: Tensor) -> Tensor:
    """``[N]`` the factor (1 - exp(-n)) / n, in (0, 1]; 1 where the logits have no spread to compare a change with.

    Args:
        change: ``[N, R]`` changes of the largest logits.
        rest: ``[N]`` change of the others under random signs.
        spread: ``[N]`` norm of all logits about their mean.
    """
    length = (change.square().sum(1) + rest.square()).sqrt()
    n = length / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    return torch.where((n > 1e-6) & (spread > 0), -torch.expm1(-n) / n.clamp_min(1e-6), torch.ones_like(n))


@dataclass(frozen=True)
class Correction:
    """Bends a predicted curve through one measured point.

    With x the predicted amplitude, sqrt(TPV), the corrected one is x / (1 + c x), or x (1 - c x) with a negative c
    where more was measured than predicted: both grow with x, and small changes, for which first order is right, stay
    as they are. Above the measured point its ratio stays: a strength found at a small change says nothing about a
    large one.

    Attributes:
        amplitude: Predicted amplitude of the measured point.
        strength: c; 0: nothing is corrected.
    """

    amplitude: float = 0.0
    strength: float = 0.0

    @staticmethod
    def through(predicted: float, measured: float) -> Correction:
        """The correction through a predicted and a measured TPV; a point where either is zero says nothing.

        Example:
            >>> Correction.through(4.0, 1.0).scale(4.0)
            0.5
            >>> Correction.through(1.0, 9.0).scale(1.0)
            3.0
        """
        if predicted <= 0 or measured <= 0:
            return Correction()
        x, y = math.sqrt(predicted), math.sqrt(measured)
        return Correction(x, (x / y - 1) / x if y <= x else (1 - y / x) / x)

    def scale(self, tpv: float) -> float:
        """What to multiply a change with whose predicted TPV this is."""
        x = min(math.sqrt(tpv), self.amplitude)
        return 1 / (1 + self.strength * x) if self.strength >= 0 else 1 - self.strength * x
