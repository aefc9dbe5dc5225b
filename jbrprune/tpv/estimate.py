"""An estimated TPV with its standard error; estimates on disjoint samples add up, and compare."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import covariance, fmean, variance
from typing import Any, Literal

from torch import Tensor

from jbrprune.errors import ArgumentError
from jbrprune.tpv.validity import TPVWarning, Validity

LEAST_HALF = 4
"""Draws in half of a trajectory from which both halves are compared."""


@dataclass(frozen=True)
class Sums:
    """Sums over N samples and R draws of the values v_nr; those of disjoint sets of samples add up.

    Attributes:
        samples: N.
        by_draw: For every draw, the sum over samples.
        mean_squares: Sum over samples of the square of the sample's mean over draws.
        squares: Sum over samples and draws of v_nr^2.
        shared: All samples see the same random draws, so that the draws have a variance of their own.
        walked: Every draw follows from the one before, so that neighbours are alike.
    """

    samples: int
    by_draw: tuple[float, ...]
    mean_squares: float
    squares: float
    shared: bool
    walked: bool = False

    @staticmethod
    def of(values: Tensor, *, shared: bool, walked: bool = False) -> Sums:
        """Sums of ``[N, R]`` values."""
        values = values.cpu().double()
        by_draw, mean_squares = tuple(values.sum(0).tolist()), float(values.mean(1).square().sum())
        return Sums(len(values), by_draw, mean_squares, float(values.square().sum()), shared, walked)

    def __add__(self, other: Sums) -> Sums:
        """Sums over both sets of samples, which have seen the same draws."""
        mine, others = ((len(s.by_draw), s.shared, s.walked) for s in (self, other))
        if mine != others:
            raise ArgumentError(
                f"Cannot add estimates made with {mine[0]} and {others[0]} draws: every shard must see the same draws. "
                "Give all of them the same seed, `signs` and number of draws, and rtol=0."
            )
        return replace(
            self,
            samples=self.samples + other.samples,
            by_draw=tuple(a + b for a, b in zip(self.by_draw, other.by_draw)),
            mean_squares=self.mean_squares + other.mean_squares,
            squares=self.squares + other.squares,
        )

    @property
    def mean(self) -> float:
        """Mean over samples and draws."""
        return sum(self.by_draw) / (self.samples * len(self.by_draw))

    @property
    def standard_error(self) -> float:
        r"""Standard error of the mean over other samples and other draws; NaN with one sample, or one random draw.

        Samples and draws are crossed: s_n^2/N + s_r^2/R - s_nr^2/(N R), with the variances s_n^2 of the samples' means,
        s_r^2 of the draws' means, and s_nr^2 of the rest, which both of the first contain.
        """
        if self.samples < 2 or (self.shared and len(self.by_draw) < 2):
            return math.nan
        return math.sqrt(max(0.0, self.over_samples + self.over_draws))

    @property
    def over_samples(self) -> float:
        """Variance of the mean over other samples, s_n^2/N; it includes the rest."""
        return max(0.0, self.mean_squares - self.samples * self.mean**2) / (self.samples - 1) / self.samples

    @property
    def over_draws(self) -> float:
        """Variance of the mean over other draws without the rest, s_r^2/R - s_nr^2/(N R); 0 if nothing is random.

        The draws of a walk count as `effective_draws`.
        """
        if not self.shared:
            return 0.0
        n, draws, mean = self.samples, len(self.by_draw), self.mean
        spread = sum((total / n - mean) ** 2 for total in self.by_draw)
        rest = max(0.0, self.squares - draws * self.mean_squares - n * spread) / ((n - 1) * (draws - 1))
        return spread / (draws - 1) / self.effective_draws - rest / (n * draws)

    @property
    def effective_draws(self) -> float:
        """R (1 - c) / (1 + c), the number of independent draws that say as much; c: correlation of neighbours."""
        draws = len(self.by_draw)
        if not self.walked or draws < 3:
            return float(draws)
        apart = [total / self.samples - self.mean for total in self.by_draw]
        whole = sum(a * a for a in apart)
        c = sum(a * b for a, b in pairwise(apart)) / whole if whole > 0 else 0.0
        c = min(max(0.0, c), 1 - 1 / draws)
        return draws * (1 - c) / (1 + c)

    def reached(self, rtol: float, least: int) -> bool:
        """Whether the relative standard error is at most ``rtol``, with at least ``least`` samples."""
        return rtol > 0 and self.samples >= least and relative_error(self.mean, self.standard_error) <= rtol

    def warn(self) -> None:
        """Warn if nothing changes, or if the two halves of a walk differ by more than three standard errors."""
        if self.mean == 0:
            warnings.warn(
                "The perturbation changes nothing: the TPV is exactly 0. Is its variance zero (weights that are all "
                "equal have no range to quantize), or do the outputs not depend on what is perturbed?",
                TPVWarning,
                stacklevel=4,
            )
        half = len(self.by_draw) // 2
        if not self.walked or half < LEAST_HALF:
            return
        early, late = self.by_draw[:half], self.by_draw[-half:]
        if abs(fmean(late) - fmean(early)) > 3 * math.sqrt((variance(early) + variance(late)) / half):
            warnings.warn(
                f"The trajectory drifts: the TPV of its second half is {fmean(late) / fmean(early):.3g} times that of "
                "the first. The burn-in is too short (a direction without curvature needs (1 - momentum) / (2 lr "
                "proximity) steps: raise burn_in, or proximity), or the draws are too close (raise every).",
                TPVWarning,
                stacklevel=4,
            )


def relative_error(value: float, error: float) -> float:
    """Standard error over value; 0 where both are 0, NaN where the standard error is not known."""
    if value == 0:
        return 0.0 if error == 0 else math.nan
    return error / abs(value)


@dataclass(frozen=True)
class Estimate:
    """A TPV: mean over samples of the sum over outputs of squared changes.

    Attributes:
        value: The estimate, in ``unit``.
        standard_error: Of the value, over samples and over what was drawn at random; NaN where it is not known (one
            sample, or one random draw).
        samples: Number of samples N.
        seconds: Wall time.
        unit: ``squared logits``, or ``squared outputs`` where ``output`` was given.
        method: ``exact``, ``projection``, ``jvp`` or ``empirical``.
        draws: Sign vectors per sample, or draws of the perturbation; 1 if nothing is random.
        seed: Seed of signs or draws: estimates with the same seed have seen the same ones.
        stopped: ``rtol``: the relative standard error was reached; ``budget``: the data or the draws came to an end.
        validity: Error of first order along the perturbation; None where it was not asked for.
        sums: The sums that estimates on other samples are added to.
    """

    value: float
    standard_error: float
    samples: int
    seconds: float
    unit: str
    method: str
    draws: int
    seed: int
    stopped: Literal["rtol", "budget"]
    validity: Validity | None
    sums: Sums

    @staticmethod
    def from_sums(sums: Sums, **facts: Any) -> Estimate:
        """Value and standard error from the sums, the rest as given."""
        return Estimate(value=sums.mean, standard_error=sums.standard_error, samples=sums.samples, sums=sums, **facts)

    @property
    def relative_error(self) -> float:
        """Standard error over value; 0 where both are 0, NaN where the standard error is not known."""
        return relative_error(self.value, self.standard_error)

    def __add__(self, other: Estimate) -> Estimate:
        """The estimate on two disjoint sets of samples; the same number as one run on both.

        Raises:
            ArgumentError: They were made by other methods, or with other draws.
        """
        if not isinstance(other, Estimate):
            return NotImplemented
        mine, others = ((e.method, e.draws, e.unit) for e in (self, other))
        if mine != others:
            raise ArgumentError(f"Cannot add estimates made as {mine} and as {others} (method, draws, unit).")
        facts = {name: getattr(self, name) for name in ("unit", "method", "draws", "seed", "validity")}
        facts["stopped"] = "rtol" if "rtol" in (self.stopped, other.stopped) else "budget"
        return Estimate.from_sums(self.sums + other.sums, seconds=self.seconds + other.seconds, **facts)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types, without the sums; what is not known is None."""
        facts = {name: value for name, value in vars(self).items() if name not in ("sums", "validity")}
        facts["standard_error"] = None if math.isnan(self.standard_error) else self.standard_error
        return facts | {"validity": self.validity and self.validity.to_dict()}

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.value:.4g} +- {self.standard_error:.2g} {self.unit} ({self.method}, {self.samples} samples, "
            f"{self.draws} draws, {self.seconds:.1f} s, stopped by {self.stopped})"
        )


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
        raise ArgumentError(
            f"Cannot compare estimates made as {train.method} in {train.unit} and {test.method} in {test.unit}."
        )
    if test.value == 0 or train.value == 0:
        raise ArgumentError("The TPV is zero: nothing is perturbed, so there is no ratio.")
    value = train.value / test.value
    both = (train.sums, test.sums)
    if train.seed == test.seed and all(s.shared and len(s.by_draw) > 1 and s.samples > 1 for s in both):
        apart = sum((sums.over_samples + sums.over_draws) / sums.mean**2 for sums in both)
        error = value * math.sqrt(max(0.0, apart - 2 * _common_variance(both)))
    else:
        error = value * math.hypot(train.relative_error, test.relative_error)
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


def _common_variance(both: Sequence[Sums]) -> float:
    """Covariance of both means over draws, relative to the means; the first draws of both are the same."""
    series = [[total / (s.samples * s.mean) for total in s.by_draw] for s in both]
    common = min(map(len, series))
    shared = covariance(series[0][:common], series[1][:common])
    return shared * common / (both[0].effective_draws * both[1].effective_draws)
