"""A measured number with what is not known about it; parts of the data add up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, variance
from typing import Any, Literal

from torch import Tensor

from jbrprune.errors import ArgumentError
from jbrprune.tpv.validity import TPVWarning, Validity

LEAST_HALF = 4
"""Draws of a half of a trajectory from which it is compared with the other."""
LEAST_BLOCKS = 24
"""Blocks of dependent samples from which their variance is taken; with fewer, samples count as independent."""


@dataclass(frozen=True)
class Moments:
    """Sums of what counts as one observation: a sample, or the mean of a block of samples that depend on each other.

    Attributes:
        count: Observations.
        total: Their sum.
        squares: The sum of their squares.
    """

    count: int
    total: float
    squares: float

    @staticmethod
    def of(values: Tensor) -> Moments:
        """Moments of ``[n]`` values."""
        return Moments(len(values), float(values.sum()), float(values.square().sum()))

    def __add__(self, other: Moments) -> Moments:
        """Of both."""
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def variance(self) -> float:
        """Of one observation; NaN where there is one only."""
        if self.count < 2:
            return math.nan
        return max(0.0, self.squares - self.total**2 / self.count) / (self.count - 1)


@dataclass(frozen=True)
class Sums:
    """Sums over N samples and R draws of v_nr; those of disjoint sets of samples add up.

    Attributes:
        samples: N.
        by_draw: For every draw, the sum over samples.
        means: Moments of the samples' means over draws.
        blocks: Moments of the means of whole blocks of ``block`` samples.
        squares: Sum over samples and draws of v_nr^2.
        shared: All samples see the same random draws, so that the draws have a variance of their own.
        block: Samples whose signs depend on each other; 1: all are independent.
        walked: Every draw follows from the one before, so that neighbours are alike.
    """

    samples: int
    by_draw: tuple[float, ...]
    means: Moments
    blocks: Moments
    squares: float
    shared: bool
    block: int
    walked: bool = False

    @staticmethod
    def of(values: Tensor, *, shared: bool, block: int = 1, first: int = 0, walked: bool = False) -> Sums:
        """Sums of ``[N, R]`` values; blocks are counted from sample 0, the values begin with sample ``first``."""
        values = values.cpu().double()
        means = values.mean(1)
        whole = means[-first % block :]
        whole = whole[: len(whole) // block * block].view(-1, block).mean(1)
        by_draw = tuple(values.sum(0).tolist())
        squares = float(values.square().sum())
        return Sums(len(values), by_draw, Moments.of(means), Moments.of(whole), squares, shared, block, walked)

    def __add__(self, other: Sums) -> Sums:
        """Sums over both sets of samples, which have seen the same draws."""
        mine, others = ((len(s.by_draw), s.shared, s.block, s.walked) for s in (self, other))
        if mine != others:
            raise ArgumentError(
                f"Cannot add estimates made with {mine[0]} and {others[0]} draws: every shard must see the same draws. "
                "Give all of them the same seed, `signs` and number of draws, and rtol=0."
            )
        return Sums(
            self.samples + other.samples,
            tuple(a + b for a, b in zip(self.by_draw, other.by_draw)),
            self.means + other.means,
            self.blocks + other.blocks,
            self.squares + other.squares,
            self.shared,
            self.block,
            self.walked,
        )

    @property
    def mean(self) -> float:
        """The mean over samples and draws."""
        return sum(self.by_draw) / (self.samples * len(self.by_draw))

    @property
    def standard_error(self) -> float:
        r"""Of the mean, over other samples and other draws; NaN where there is one sample, or one random draw.

        Samples and draws are crossed: s_n^2/N + s_r^2/R - s_nr^2/(N R), with the variances s_n^2 of the samples' means,
        s_r^2 of the draws' means, and s_nr^2 of what neither explains, which both of the first contain.
        """
        if self.samples < 2 or (self.shared and len(self.by_draw) < 2):
            return math.nan
        return math.sqrt(max(0.0, self.over_samples + self.over_draws))

    @property
    def over_samples(self) -> float:
        """Variance of the mean over other samples; it holds what depends on sample and draw together."""
        enough = self.blocks.count >= LEAST_BLOCKS
        return (self.blocks.variance * self.block if enough else self.means.variance) / self.samples

    @property
    def over_draws(self) -> float:
        """Variance of the mean over other draws, without what depends on the sample as well; 0 for nothing random.

        Of a walk the draws count as `Sums.effective_draws`.
        """
        if not self.shared:
            return 0.0
        n, draws, mean = self.samples, len(self.by_draw), self.mean
        spread = sum((total / n - mean) ** 2 for total in self.by_draw)
        rest = max(0.0, self.squares - draws * self.means.squares - n * spread)
        mixed = rest / ((n - 1) * (draws - 1)) / (n * draws)
        return spread / (draws - 1) / self.effective_draws - mixed

    @property
    def effective_draws(self) -> float:
        """R (1 - c) / (1 + c): independent draws that say as much, c the correlation of a draw with the one before."""
        draws = len(self.by_draw)
        if not self.walked or draws < 3:
            return float(draws)
        apart = [total / self.samples - self.mean for total in self.by_draw]
        whole = sum(a * a for a in apart)
        c = sum(a * b for a, b in pairwise(apart)) / whole if whole > 0 else 0.0
        c = min(max(0.0, c), 1 - 1 / draws)
        return draws * (1 - c) / (1 + c)


@dataclass(frozen=True)
class Estimate:
    """A TPV: mean over samples of the sum over outputs of squared changes.

    Attributes:
        value: The estimate.
        standard_error: Of the value, over samples and over what was drawn at random; NaN where it is not known (one
            sample, or one random draw).
        samples: Samples N.
        seconds: Wall time.
        unit: What the value is measured in.
        method: ``exact``, ``projection``, ``jvp`` or ``empirical``.
        draws: Sign vectors per sample, or draws of the perturbation; 1 for what is not random.
        seed: Of signs or draws: estimates with the same seed have seen the same ones.
        stopped: ``rtol``: the relative standard error was reached; ``budget``: the data or the draws came to an end.
        validity: How far first order holds along the perturbation; None where it was not asked for.
        sums: What estimates on other samples can be added to.
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
        return _relative(self.value, self.standard_error)

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
        sums = self.sums + other.sums
        stopped = "rtol" if "rtol" in (self.stopped, other.stopped) else "budget"
        return replace(
            self,
            value=sums.mean,
            standard_error=sums.standard_error,
            samples=sums.samples,
            seconds=self.seconds + other.seconds,
            stopped=stopped,
            sums=sums,
        )

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


def reached(sums: Sums, rtol: float, least: int) -> bool:
    """Whether the relative standard error is at most ``rtol``, from ``least`` samples on."""
    return rtol > 0 and sums.samples >= least and _relative(sums.mean, sums.standard_error) <= rtol


def _relative(value: float, error: float) -> float:
    if value == 0:
        return 0.0 if error == 0 else math.nan
    return error / abs(value)


def warn_of_sums(sums: Sums) -> None:
    """Warn of what the values themselves give away: nothing changes; a walk that has not arrived."""
    if sums.mean == 0:
        _warn(
            "The perturbation changes nothing: the TPV is exactly 0. Is its variance zero (weights that are all equal "
            "have no range to quantize), or do the outputs not depend on what is perturbed?"
        )
    elif sums.walked and _drifts(sums.by_draw):
        half = len(sums.by_draw) // 2
        early, late = sum(sums.by_draw[:half]), sum(sums.by_draw[-half:])
        _warn(
            f"The trajectory drifts: the TPV of its second half is {late / early:.3g} times that of the first. The "
            "burn-in is too short (a direction without curvature needs (1 - momentum) / (2 lr proximity) steps: raise "
            "burn_in, or proximity), or the draws are too close (raise every)."
        )


def _warn(text: str) -> None:
    warnings.warn(text, TPVWarning, stacklevel=4)


def _drifts(by_draw: Sequence[float]) -> bool:
    """Whether the halves of a series differ by more than three standard errors, as if its values were independent."""
    half = len(by_draw) // 2
    if half < LEAST_HALF:
        return False
    early, late = by_draw[:half], by_draw[-half:]
    error = math.sqrt((variance(early) + variance(late)) / half)
    return abs(fmean(late) - fmean(early)) > 3 * error
