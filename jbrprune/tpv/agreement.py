"""Whether the TPV on training images stands for that on others."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from statistics import covariance

from jbrprune.errors import ArgumentError
from jbrprune.tpv.estimate import Estimate, Sums
from jbrprune.tpv.validity import TPVWarning


@dataclass(frozen=True)
class Ratio:
    """A ratio of two estimates on disjoint samples.

    Attributes:
        value: Training over test.
        standard_error: To first order, from the standard errors of both. Draws of the perturbation that both have seen
            move both: only that they move them differently counts.
        agrees: Whether it is within the tolerance, or within three standard errors, of 1.
    """

    value: float
    standard_error: float
    agrees: bool


def train_test_ratio(train: Estimate, test: Estimate, *, tolerance: float = 0.2) -> Ratio:
    """TPV on training images over that on test images; warns where they disagree.

    The theory says that they agree for wide networks and small perturbations, whatever the test error is. They
    disagree where the ratio is further from 1 than the tolerance and than three standard errors.

    Args:
        train: On training images.
        test: On other images, of the same perturbation, by the same method; with the same seed, as by default, it
            has seen the same draws.
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
    error = value * _relative_error(train, test)
    agrees = abs(value - 1) <= max(tolerance, 3 * error)
    if not agrees:
        warnings.warn(
            f"The TPV on training and test images disagree: their ratio is {value:.3g} +- {error:.2g}. There are too "
            "few training samples for this model, or the perturbation is too large for first order: the value on "
            "training images does not stand for that on others.",
            TPVWarning,
            stacklevel=2,
        )
    return Ratio(value, error, agrees)


def _relative_error(train: Estimate, test: Estimate) -> float:
    """sqrt(Var(a / E a - b / E b)): samples are others, draws the same where both come from one seed."""
    both = (train.sums, test.sums)
    known = all(sums.shared and len(sums.by_draw) > 1 and sums.samples > 1 for sums in both)
    if train.seed != test.seed or not known:
        return math.hypot(train.relative_error, test.relative_error)
    alone = sum((sums.over_samples + sums.over_draws) / sums.mean**2 for sums in both)
    return math.sqrt(max(0.0, alone - 2 * _covariance(*both)))


def _covariance(one: Sums, other: Sums) -> float:
    """Of both means over draws, relative to them: the first R draws of both are the same."""
    series = [[total / (s.samples * s.mean) for total in s.by_draw] for s in (one, other)]
    common = min(map(len, series))
    if common < 2:
        return 0.0
    value = covariance(series[0][:common], series[1][:common])
    return value * common / (one.effective_draws * other.effective_draws)
