"""The damage of any number of cuts, predicted from one pass over the dense model: without and with repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch
from jbrprune.prediction.changes import ROWS, Changes, cut_masks, logit_changes
from jbrprune.prediction.damage import Damage, damage, saturation
from jbrprune.prediction.residual import input_moments, unexplained
from jbrprune.structure.groups import Group, Selection


@dataclass(frozen=True, eq=False)
class Forecast:
    """Predicted changes of the logits of N samples by several cuts.

    Attributes:
        changes: To first order.
        saturate: Whether changes saturate (`jbrprune.prediction.damage`).
    """

    changes: Changes
    saturate: bool = True

    def first(self, number: int) -> Forecast:
        """Of the first samples alone."""
        return replace(self, changes=self.changes.first(number))

    def change(self, cut: int, *, repaired: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """``[N, R]`` change of the largest logits and ``[N]`` of the rest under random signs, times ``scale``."""
        change = (self.changes.repaired if repaired else self.changes.zeroed)[cut]
        rest = self.changes.rest[int(repaired), cut]
        if self.saturate:
            factor = saturation(change, rest, self.changes.spread)
            change, rest = change * factor[:, None], rest * factor
        return change * scale, rest * scale

    def damage(self, cut: int, *, repaired: bool = False, scale: float = 1.0) -> Damage:
        """Predicted TPV and flips of one cut."""
        return damage(self.changes.top, *self.change(cut, repaired=repaired, scale=scale))


def forecast(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    cuts: Sequence[Selection],
    *,
    refits: bool = True,
    ridge: float = 0.1,
    saturate: bool = True,
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> Forecast:
    """Predict what cuts do to the logits of a model that stays whole.

    One forward pass for the moments of what is read, then one forward and ``min(K, rows)`` backward passes (one more
    where K > ``rows``), whatever the number of cuts. With repair, the mean of what is gone is taken over, and of the
    rest each layer keeps the share of the amplitude that least squares cannot reproduce
    (`jbrprune.prediction.residual`).

    Args:
        model: The dense model; left as it was.
        batches: Images.
        groups: The units of this very model.
        cuts: Group -> units that go, one mapping per cut.
        refits: Whether the repair refits weights by least squares, or only takes over means.
        ridge: Ridge of the refit.
        saturate: Let changes saturate; False: plain first order.
        rows: Logits of every sample that are followed one by one.
        seed: Seeds the random signs.
        progress: Show a progress bar.

    Raises:
        ArgumentError: No cuts, or less than two rows.
        ModelError: Samples influence each other, or no unit takes part in the logits.
        NonFiniteError: NaN or Inf.
    """
    masks = cut_masks(model, groups, cuts)
    moments = input_moments(model, batches, masks)
    means, left = {}, {}
    for name, mask in masks.items():
        found = moments.get(name)
        means[name] = torch.zeros(len(mask)) if found is None else found.mean
        if refits and found is not None:
            left[name] = unexplained(found, model.get_submodule(name), mask, ridge).sqrt()
    changes = logit_changes(
        model, batches, groups, cuts, means=means, left=left, rows=rows, seed=seed, progress=progress
    )
    return Forecast(changes, saturate)
