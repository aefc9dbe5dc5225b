"""The consumer score is the true effect of removing a unit where the net is linear in it: nothing is counted twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jbrprune.criteria.objectives import OBJECTIVES
from jbrprune.criteria.relevance import Relevance, relevances
from jbrprune.data.batches import Batch
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import masked_units


class Net(nn.Module):
    """Linear in its activations, whatever stands in the middle."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.middle = nn.Sequential(*middle)
        self.head = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.head(self.middle(self.stem(x))).mean((2, 3)))


# No residual nets: there a unit is cut at several places in a row, which is of second order.
MIDDLES = {
    "plain": lambda: [nn.Conv2d(16, 16, 3, padding=1)],
    "grouped": lambda: [nn.Conv2d(16, 16, 3, padding=1, groups=4)],
    "two grouped": lambda: [nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 1, groups=8)],
    "depthwise": lambda: [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)],
}


@pytest.mark.parametrize("middle", MIDDLES)
def test_the_score_is_the_change_that_removal_makes(middle: str) -> None:
    torch.manual_seed(0)
    model = Net(*MIDDLES[middle]()).double().eval()
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    groups = find_groups(model, images).groups
    assert groups
    objective = OBJECTIVES["predicted_logit"]
    ((relevance, _),) = relevances(model, [(0, Batch(images))], groups, Relevance(), objective=objective)
    with torch.no_grad():
        dense = model(images)
        predicted = dense.argmax(1, keepdim=True)
        for group in groups:
            for unit in range(group.size):
                with masked_units(model, groups, {group.name: torch.tensor([unit])}):
                    change = (dense - model(images)).gather(1, predicted)[:, 0]
                torch.testing.assert_close(relevance[group.name][:, unit], change, rtol=1e-9, atol=1e-11)
