"""Whether the TPV on training images stands for that on others."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from jbrprune.errors import ArgumentError
from jbrprune.tpv.estimate import Estimate
from jbrprune.tpv.validity import TPVWarning


@dataclass(frozen=True)
class Ratio:
    """A ratio of two independent estimates.

    Attributes:
        value: Training over test.
        standard_error: To first order, from the standard errors of both.
    """

    value: float
    standard_error: float


def train_test_ratio(train: Estimate, test: Estimate, *, tolerance: float = 0.2) -> Ratio:
    """TPV on training images over that on test images; warns where they disagree.

    The theory says that they agree for wide networks and small perturbations, whatever the test error is. They
    disagree where the ratio is further from 1 than the tolerance and than three standard errors.

    Args:
        train: On training images.
        test: On other images, of the same perturbation, by the same method.
        tolerance: Distance from 1 that is not worth a warning.

    Raises:
        ArgumentError: The estimates are of different kinds, or the TPV on the test images is zero.

    Source:
        Arpit, arXiv 2512.11089, theorem 3.1 (stability).
    """
    if (train.method, train.unit) != (test.method, test.unit):
        raise ArgumentError(
            f"Cannot compare estimates made as {train.method} in {train.unit} and {test.method} in {test.unit}."
        )
    if test.value == 0 or train.value == 0:
        raise ArgumentError("The TPV is zero: nothing is perturbed, so there is no ratio.")
    value = train.value / test.value
    error = value * math.hypot(train.relative_error, test.relative_error)
    if abs(value - 1) > tolerance and not abs(value - 1) <= 3 * error:
        warnings.warn(
            f"The TPV on training and test images disagree: their ratio is {value:.3g} +- {error:.2g}. There are too "
            "few training samples for this model, or the perturbation is too large for first order: the value on "
            "training images does not stand for that on others.",
            TPVWarning,
            stacklevel=2,
        )
    return Ratio(value, error)
