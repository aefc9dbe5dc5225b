"""How much a pruned model lost, on images that decide about it, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import binomtest, norm
from torch import Tensor

from jbrprune.evaluation.agreement import agreement


@dataclass(frozen=True)
class Drop:
    """A measured loss.

    Attributes:
        of: ``accuracy`` where there are labels, else ``agreement`` with the dense model.
        images: Number of samples N.
        lost: Share of samples, the fall of the accuracy or of the agreement; an accuracy may rise.
        low: Lower end of its 95 % interval.
        high: Upper end.
        models: Measured on the same images, to choose this one of them: the interval is that of Bonferroni, so that
            those of all of them together are right with 95 %.
    """

    of: str
    images: int
    lost: float
    low: float
    high: float
    models: int = 1

    def within(self, allowed: float) -> bool:
        """Whether no more than the allowed share is lost, as counts: 0.01 of 100 images is one image."""
        return round(self.lost * self.images) <= math.floor(allowed * self.images + 1e-9)


def measured_drop(logits: Tensor, reference: Tensor, labels: Tensor | None = None, *, models: int = 1) -> Drop:
    r"""The fall of accuracy, or of agreement without labels, from the dense model to a pruned one.

    With labels, (n10 - n01) / N, where n10 samples only the dense model gets right and n01 only the pruned one; the
    interval is the adjusted one for paired shares (half a sample added to each of the four cells). Without,
    1 - top-1 agreement with Wilson's interval.

    Args:
        logits: ``[N, K]`` of the pruned model.
        reference: ``[N, K]`` of the dense model on the same samples.
        labels: ``[N]`` class indices, or None.
        models: See `Drop`.

    Raises:
        DataError: No samples, or shapes or labels that do not fit.
        NonFiniteError: NaN or Inf.

    Example:
        >>> import torch
        >>> measured_drop(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).lost
        0.5

    Source:
        Agresti and Min, Statistics in Medicine 24 (2005), 729-740; Wilson, JASA 22 (1927).
    """
    found = agreement(logits, reference, labels)
    level = 1 - 0.05 / models
    if labels is None:
        kept = binomtest(round(found.top1 * found.images), found.images).proportion_ci(level, method="wilson")
        return Drop("agreement", found.images, 1 - found.top1, 1 - float(kept.high), 1 - float(kept.low), models)
    dense, pruned = (values.argmax(1) == labels.to(values.device) for values in (reference, logits))
    lost, won, n = int((dense & ~pruned).sum()), int((~dense & pruned).sum()), found.images
    return Drop("accuracy", n, (lost - won) / n, *paired_interval(lost, won, n, level), models)


def paired_interval(one: int, other: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two shares of the same n samples.

    Args:
        one: Samples that count for the first share alone.
        other: Samples that count for the second alone.
        n: All samples.
        level: Confidence.

    Source:
        Agresti and Min, Statistics in Medicine 24 (2005), 729-740.
    """
    difference = (one - other) / (n + 2)
    width = float(norm.ppf((1 + level) / 2)) * math.sqrt((one + other + 1) / (n + 2) - difference**2) / math.sqrt(n + 2)
    return difference - width, difference + width
