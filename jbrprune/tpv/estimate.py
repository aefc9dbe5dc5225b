"""An estimated TPV with its standard error; estimates on disjoint samples compare."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from jbrprune.errors import ArgumentError
from jbrprune.tpv.validity import TPVWarning, Validity

LEAST_HALF = 4
"""Draws in half of a trajectory from which both halves are compared."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A TPV: mean over samples of the sum over outputs of squared changes.

    Attributes:
        values: ``[N, R]`` float64, the squared change v_nr of every sample under every draw.
        shared: All samples see the same random draws, so that the draws have a variance of their own.
        walked: Every draw follows from the one before, so that neighbours are alike.
        method: ``exact``, ``projection``, ``jvp`` or ``empirical``.
        draws: Sign vectors per sample, or draws of the perturbation; 1 if nothing is random.
        seed: Seed of signs or draws: estimates with the same seed have seen the same ones.
        unit: Unit of the value: ``squared logits``, or ``squared outputs`` where ``output`` was given.
        seconds: Wall time.
        stopped: ``rtol``: the relative standard error was reached; ``budget``: the data or the draws came to an end.
        validity: Error of first order along the perturbation; None where it was not asked for.
    """

    values: Tensor
    shared: bool
    walked: bool
    method: str
    draws: int
    seed: int
    unit: str
    seconds: float = 0.0
    stopped: Literal["rtol", "budget"] = "budget"
    validity: Validity | None = None

    @property
    def value(self) -> float:
        """The estimate, in ``unit``: the mean over samples and draws."""
        return float(self.values.mean())

    @property
    def samples(self) -> int:
        """Number of samples N."""
        return len(self.values)

    @property
    def standard_error(self) -> float:
        r"""Standard error of the value over other samples and other draws; NaN with one sample, or one random draw.

        Samples and draws are crossed: s_n^2/N + s_r^2/R - s_nr^2/(N R), with the variances s_n^2 of the samples' means,
        s_r^2 of the draws' means, and s_nr^2 of the rest, which both of the first contain. The draws of a walk count as
        `effective_draws`.
        """
        (n, draws), means = self.values.shape, self.values.mean(1)
        if n < 2 or (self.shared and draws < 2):
            return math.nan
        variance = float(means.var()) / n
        if self.shared:
            by_draw = self.values.mean(0)
            rest = (self.values - means[:, None] - by_draw + self.value).square().sum() / ((n - 1) * (draws - 1))
            variance += float(by_draw.var() / self.effective_draws - rest / (n * draws))
        return math.sqrt(max(0.0, variance))

    @property
    def relative_error(self) -> float:
        """Standard error over value; 0 where both are 0, NaN where the standard error is not known."""
        if self.value == 0:
            return 0.0 if self.standard_error == 0 else math.nan
        return self.standard_error / self.value

    @property
    def effective_draws(self) -> float:
        """R (1 - c) / (1 + c), the number of independent draws that say as much; c: correlation of neighbours."""
        draws = self.values.shape[1]
        if not self.walked or draws < 3:
            return float(draws)
        apart = self.values.mean(0) - self.value
        c = float((apart[1:] * apart[:-1]).sum() / apart.square().sum().clamp_min(1e-300))
        c = min(max(0.0, c), 1 - 1 / draws)
        return draws * (1 - c) / (1 + c)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types, without the values of single samples; what is not known is None."""
        names = ("value", "standard_error", "samples", "seconds", "unit", "method", "draws", "seed", "stopped")
        facts: dict[str, Any] = {name: getattr(self, name) for name in names}
        facts["standard_error"] = None if math.isnan(self.standard_error) else self.standard_error
        return facts | {"validity": self.validity and self.validity.to_dict()}

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.value:.4g} +- {self.standard_error:.2g} {self.unit} ({self.method}, {self.samples} samples, "
            f"{self.draws} draws, {self.seconds:.1f} s, stopped by {self.stopped})"
        )

    def warn(self) -> None:
        """Warn where nothing changes, where a walk drifts, and where first order is not valid."""
        half, by_draw = self.values.shape[1] // 2, self.values.mean(0)
        early, late = by_draw[:half], by_draw[half : 2 * half]
        if self.value == 0:
            text = (
                "The perturbation changes nothing: the TPV is exactly 0. Is its variance zero (equal weights have no "
                "range to quantize), or do the outputs not depend on what is perturbed?"
            )
            warnings.warn(text, TPVWarning, stacklevel=4)
        error = ((early.var() + late.var()) / half).sqrt() if half > 1 else 0.0
        if self.walked and half >= LEAST_HALF and (late.mean() - early.mean()).abs() > 3 * error:
            text = (
                f"The trajectory drifts: the TPV of its second half is {late.mean() / early.mean():.3g} times that of "
                "the first. The burn-in is too short (a direction without curvature needs (1 - momentum) / (2 lr "
                "proximity) steps: raise burn_in, or proximity), or the draws are too close (raise every)."
            )
            warnings.warn(text, TPVWarning, stacklevel=4)
        if self.validity is not None:
            self.validity.warn()


@dataclass(frozen=True)
class Ratio:
    """Ratio of two estimates on disjoint samples.

    Attributes:
        value: Training over test.
        standard_error: To first order, from the standard errors of both. Draws that both have seen move both estimates:
            only the difference counts.
        agrees: Whether the value is within the tolerance, or within three standard errors, of 1.
    """

    value: float
    standard_error: float
    agrees: bool


def train_test_ratio(train: Estimate, test: Estimate, *, tolerance: float = 0.2) -> Ratio:
    """TPV on training images over TPV on test images; warns where they disagree.

    The theory says that they agree for wide networks and small perturbations, whatever the test error is. They
    disagree where the ratio is further from 1 than the tolerance and than three standard errors.

    Args:
        train: Estimate on training images.
        test: Estimate on other images, of the same perturbation, by the same method; with the same seed (the default),
            it has seen the same draws.
        tolerance: Distance from 1 that is not worth a warning.

    Raises:
        ArgumentError: The estimates are of different kinds, or one of them is zero.

    Source:
        Arpit, arXiv 2512.11089, theorem 3.1 (stability).
    """
    if (train.method, train.unit) != (test.method, test.unit):
        raise ArgumentError(f"Cannot compare estimates made as {train.method} and {test.method}, or in other units.")
    if test.value == 0 or train.value == 0:
        raise ArgumentError("The TPV is zero: nothing is perturbed, so there is no ratio.")
    both, value = (train, test), train.value / test.value
    variance = train.relative_error**2 + test.relative_error**2
    common = min(found.values.shape[1] for found in both)  # of these draws both are the same
    if train.seed == test.seed and train.shared and test.shared and common > 1:
        series = torch.stack([found.values[:, :common].mean(0) / found.value for found in both])
        shared = float(torch.cov(series)[0, 1]) * common
        variance -= 2 * shared / (train.effective_draws * test.effective_draws)
    error = value * math.sqrt(max(variance, 0.0))
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
