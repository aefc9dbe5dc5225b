"""Predicted damage and its check by measurement: test prediction variance (TPV) and flips from first-order changes.

TPV = E_x sum_k (change of f_k)^2, a flip is a sample whose top-1 is another one after the change. A first-order change
knows no end: twice the channels, twice the change, until it is larger than the logits themselves. In a deep net what is
removed later acts on what is left, so the change *saturates*:

    change' = change * (1 - exp(-n)) / n,    n = ||change|| / ||f - mean f||

This is the change by 1 at the end of d(left)/dt = -n left. For small changes it is the first order.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jbrprune.evaluation.agreement import paired_interval, wilson_interval
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.tpv.validity import TPVWarning

if TYPE_CHECKING:
    from jbrprune.prediction.changes import Changes


@dataclass(frozen=True)
class Damage:
    """The damage of a cut over N samples.

    Attributes:
        tpv: Mean over samples of the summed squares of the logits' changes; of what is not logits, the sum over tensors
            of relative squared errors.
        tpv_se: Its standard error over samples.
        flips: Share of samples, or of positions, whose top-1 changes; NaN where there are no classes.
        flips_low: Lower end of its 95 % Wilson interval.
        flips_high: Upper end.
    """

    tpv: float
    tpv_se: float
    flips: float
    flips_low: float
    flips_high: float


def damage(top: Tensor, change: Tensor, rest: Tensor | None = None, output: Output = LOGITS) -> Damage:
    """TPV and flips of one cut.

    Args:
        top: ``[N, R]`` logits of the dense model, the largest first.
        change: ``[N, R]`` their changes.
        rest: ``[N]`` change of all other logits under random signs, or None.
        output: What made the rows.

    Returns:
        Errors come from the choice of the samples alone. With one sample the standard error is NaN.
    """
    squares = change.double().square().sum(1)
    if rest is not None:
        squares = squares + rest.double().square()
    return _summarise(squares, (top + change).argmax(1) != top.argmax(1) if output.decides else None)


def measure_damage(dense: Tensor, pruned: Tensor, output: Output = LOGITS) -> Damage:
    """TPV and flips between two ``[N, V]`` logits, or other rows, of the same samples."""
    flipped = output.by_class(pruned).argmax(1) != output.by_class(dense).argmax(1) if output.decides else None
    return _summarise((pruned - dense).double().square().sum(1), flipped)


def _summarise(squares: Tensor, flipped: Tensor | None) -> Damage:
    n, nan = len(squares), math.nan
    tpv, error = float(squares.mean()), float(squares.std()) / math.sqrt(n) if n > 1 else nan
    if flipped is None:
        return Damage(tpv, error, nan, nan, nan)
    share = int(flipped.sum()) / flipped.numel()
    return Damage(tpv, error, share, *wilson_interval(share, n))


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
        """Factor for a change with this predicted TPV."""
        x = min(math.sqrt(tpv), self.amplitude)
        return 1 / (1 + self.strength * x) if self.strength >= 0 else 1 - self.strength * x


LARGEST_ERROR = 0.3
"""Relative error of a predicted change, and of its TPV, up to which a prediction is called valid."""
FLIPS = 0.1
"""Distance from the real share of flips that a valid prediction is known not to exceed."""
POINT = 0.01
"""Distance between the shares of flips that are seen up to which they count as equal, as does a single image."""


@dataclass(frozen=True)
class Check:
    r"""A prediction compared with the effect of masking the units, on n images.

    Attributes:
        taylor_error: sqrt(sum \|real - d\|^2 / sum \|real\|^2) of the plain first-order change d, over images and the
            logits that are followed.
        prediction_error: The same of the change that is predicted: saturated, and corrected.
        predicted: Damage that is predicted for these images.
        masked: The real one.
        flips_apart: The end of the 95 % interval of predicted minus real flips that is farther from 0; NaN where there
            are no classes.
        valid: Whether the change, its TPV and the flips (or these up to a `POINT`) are right up to `LARGEST_ERROR`, and
            the flips known to be up to `FLIPS`; False where the dense model tells no image from another: then there is
            nothing to be right about.
    """

    taylor_error: float
    prediction_error: float
    predicted: Damage
    masked: Damage
    flips_apart: float
    valid: bool


def check(predicted: Changes, cut: int, masked: Tensor, reference: Tensor, *, scale: float = 1.0) -> Check:
    """Compare the predicted with the measured effect of a cut.

    Args:
        predicted: Changes of at least as many samples.
        cut: Which cut.
        masked: ``[n, K]`` logits with the units masked.
        reference: ``[N, K]`` those of the dense model.
        scale: What the prediction is multiplied with.
    """
    n = len(masked)
    reference, predicted = reference[:n], predicted.first(n)
    change, rest = predicted.change(cut, scale=scale)
    top, classes, output = predicted.top, predicted.classes, predicted.output
    real = (masked - reference).gather(1, classes)
    flips = (top + change).argmax(1) != top.argmax(1)
    now, before = (output.at(output.by_class(x), classes[:, :1] % output.positions) for x in (masked, reference))
    flipped = now.argmax(1) != before.argmax(1)
    one, other = int((flips & ~flipped).sum()), int((~flips & flipped).sum())
    apart = max(map(abs, paired_interval(one, other, n))) if output.decides else math.nan
    error, foretold = _relative(change, real), damage(top, change, rest, output)
    measured = measure_damage(reference, masked, output)
    low, high = sorted((foretold.tpv, measured.tpv))
    right = error <= LARGEST_ERROR and high <= (1 + LARGEST_ERROR) * low and not apart > FLIPS
    few, many = sorted((foretold.flips, measured.flips))
    right &= not many > max((1 + LARGEST_ERROR) * few, few + max(POINT, 1 / n) + 1e-9)  # NaN where there are no classes
    valid = right and not (n > 1 and is_constant(reference))
    return Check(_relative(predicted.zeroed[cut], real), error, foretold, measured, apart, valid)


def is_constant(logits: Tensor) -> bool:
    """Whether ``[N, K]`` logits are the same for every sample, up to rounding."""
    return float((logits - logits[0]).abs().max()) <= 1e-5 * float(logits.abs().max())


def _relative(change: Tensor, real: Tensor) -> float:
    wrong = float((real.double() - change).square().sum())
    whole = float(real.double().square().sum())
    return math.sqrt(wrong / whole) if whole > 0 else (0.0 if wrong == 0 else math.inf)


def warn_if_constant(logits: Tensor) -> None:
    """Warn if the dense model gives all images the same logits: then nothing can be learnt about damage."""
    if len(logits) > 1 and is_constant(logits):
        warnings.warn(
            "All images have the same logits: nothing can be learnt from them about what removal does, and nothing is "
            "called valid. Are the images all alike, or is the head zero?",
            TPVWarning,
            stacklevel=3,
        )
