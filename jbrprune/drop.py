"""How much a pruned model lost, on images that decide about it, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from jbrprune.measure import agreement

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True)
class Drop:
    """A measured loss.

    Attributes:
        of: ``accuracy`` where there are labels, else ``agreement`` with the dense model.
        images: Number of samples N.
        lost: Share of samples, the fall of the accuracy or of the agreement; an accuracy may rise.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    of: str
    images: int
    lost: float
    low: float
    high: float

    def within(self, allowed: float) -> bool:
        """Whether no more than the allowed share is lost, as counts: 0.01 of 100 images is one image."""
        return round(self.lost * self.images) <= math.floor(allowed * self.images + 1e-9)


def measured_drop(logits: Tensor, reference: Tensor, labels: Tensor | None = None) -> Drop:
    r"""The fall of accuracy, or of agreement without labels, from the dense model to a pruned one.

    With labels, (n10 - n01) / N, where n10 samples only the dense model gets right and n01 only the pruned one; the
    interval is the adjusted one for paired shares (half a sample added to each of the four cells). Without,
    1 - top-1 agreement with Wilson's interval.

    Args:
        logits: ``[N, K]`` of the pruned model.
        reference: ``[N, K]`` of the dense model on the same samples.
        labels: ``[N]`` class indices, or None.

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
    if labels is None:
        low, high = found.top1_interval
        return Drop("agreement", found.images, 1 - found.top1, 1 - high, 1 - low)
    dense, pruned = (values.argmax(1) == labels.to(values.device) for values in (reference, logits))
    lost, won, n = int((dense & ~pruned).sum()), int((~dense & pruned).sum()), found.images
    difference = (lost - won) / (n + 2)
    width = Z * math.sqrt((lost + won + 1) / (n + 2) - difference**2) / math.sqrt(n + 2)
    return Drop("accuracy", n, (lost - won) / n, difference - width, difference + width)
