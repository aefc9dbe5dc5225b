"""Whether a predicted change is what happens: against the masked model, on the same images."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from jbrprune.evaluation.agreement import paired_interval
from jbrprune.prediction.changes import Changes
from jbrprune.prediction.damage import Damage, damage, measure_damage
from jbrprune.tpv.validity import TPVWarning

TOLERANCE = 0.3
"""Relative error of a predicted change up to which a prediction is called valid."""
FLIPS = 0.1
"""Distance from the real share of flips that a valid prediction is known not to exceed."""


@dataclass(frozen=True)
class Check:
    r"""A prediction beside what the masked units do, on n images.

    Attributes:
        taylor_error: sqrt(sum \|real - d\|^2 / sum \|real\|^2) of the plain first-order change d, over images and the
            logits that are followed.
        prediction_error: The same of the change that is predicted: saturated, and corrected.
        predicted: Damage that is predicted for these images.
        masked: The real one.
        flips_apart: The end of the 95 % interval of predicted minus real flips that is farther from 0.
        tolerance: What `valid` goes by.
        constant: Whether the dense model tells no image from another: then there is nothing to be right about.
    """

    taylor_error: float
    prediction_error: float
    predicted: Damage
    masked: Damage
    flips_apart: float
    tolerance: float
    constant: bool

    @property
    def valid(self) -> bool:
        """Whether the change and its TPV are right up to the tolerance, and the flips known to be up to `FLIPS`."""
        return (
            not self.constant
            and self.prediction_error <= self.tolerance
            and tpvs_agree(self.predicted.tpv, self.masked.tpv, self.tolerance)
            and self.flips_apart <= FLIPS
        )


def check(
    predicted: Changes,
    cut: int,
    masked: Tensor,
    reference: Tensor,
    *,
    scale: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Check:
    """Compare what is predicted for a cut with what it does.

    Args:
        predicted: Changes of at least as many samples.
        cut: Which cut.
        masked: ``[n, K]`` logits with the units masked.
        reference: ``[N, K]`` those of the dense model.
        scale: What the prediction is multiplied with.
        tolerance: See `Check`.
    """
    n = len(masked)
    reference, predicted = reference[:n], predicted.first(n)
    change, rest = predicted.change(cut, scale=scale)
    top, classes = predicted.top, predicted.classes
    real = (masked - reference).gather(1, classes)
    foretold = (top + change).argmax(1) != top.argmax(1)
    flipped = masked.argmax(1) != reference.argmax(1)
    one, other = int((foretold & ~flipped).sum()), int((~foretold & flipped).sum())
    return Check(
        taylor_error=_relative(predicted.zeroed[cut], real),
        prediction_error=_relative(change, real),
        predicted=damage(top, change, rest),
        masked=measure_damage(reference, masked),
        flips_apart=max(map(abs, paired_interval(one, other, n))),
        tolerance=tolerance,
        constant=n > 1 and is_constant(reference),
    )


def is_constant(logits: Tensor) -> bool:
    """Whether ``[N, K]`` logits are the same for every sample, up to rounding."""
    return float((logits - logits[0]).abs().max()) <= 1e-5 * float(logits.abs().max())


def tpvs_agree(one: float, other: float, tolerance: float) -> bool:
    """Whether neither is more than 1 + tolerance times the other."""
    return max(one, other) <= (1 + tolerance) * min(one, other)


def _relative(change: Tensor, real: Tensor) -> float:
    wrong = float((real.double() - change).square().sum())
    whole = float(real.double().square().sum())
    return math.sqrt(wrong / whole) if whole > 0 else (0.0 if wrong == 0 else math.inf)


def warn_if_constant(logits: Tensor) -> None:
    """Warn where the dense model tells no image from another: whatever is removed, that is no damage to go by."""
    if len(logits) > 1 and is_constant(logits):
        warnings.warn(
            "All images have the same logits: nothing can be learnt from them about what removal does, and nothing is "
            "called valid. Are the images all alike, or is the head zero?",
            TPVWarning,
            stacklevel=3,
        )
