"""What is read from torch-pruning's graph, and what happens where it says nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping

from jbrprune.errors import UnsupportedModelError
from jbrprune.structure import tracing
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.verification import verify_groups


def as_listed(rule: Any, channel: list[int], source: list[int]) -> list[tuple[int, int]]:
    """torch-pruning's own rule, on its own lists."""
    pairs = rule([_HybridIndex(idx=i, root_idx=r) for i, r in zip(channel, source, strict=True)])
    return [(pair.idx, pair.root_idx) for pair in pairs]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [index_mapping._SplitIndexMapping, index_mapping._ConcatIndexMapping])
def test_rules_on_arrays_say_what_the_rules_on_lists_say(kind: type, reverse: bool) -> None:
    rule = kind(offset=[3, 7], reverse=reverse)
    channel, source = [1, 3, 4, 6, 7, 9], [5, 0, 2, 2, 8, 1]
    got = tracing._map_channels(SimpleNamespace(index_mapping=[rule]), np.array(channel), np.array(source))
    assert list(zip(*(side.tolist() for side in got), strict=True)) == as_listed(rule, channel, source)


@pytest.mark.parametrize("stride", [3, 0, -2])
def test_flattening_on_arrays_says_what_the_rule_on_lists_says(stride: int) -> None:
    """A stride that is not positive comes from a wrong width, as in the ResNets of CLIP: no channel is followed."""
    rule, channel, source = index_mapping._FlattenIndexMapping(stride=stride), [1, 4, 4], [5, 0, 2]
    got = tracing._map_channels(SimpleNamespace(index_mapping=[rule]), np.array(channel), np.array(source))
    assert list(zip(*(side.tolist() for side in got), strict=True)) == as_listed(rule, channel, source)


@pytest.mark.parametrize("kind", [index_mapping._SplitIndexMapping, index_mapping._ConcatIndexMapping])
def test_a_part_without_an_end_is_lost(kind: type) -> None:
    with pytest.raises(tracing._Lost):
        tracing._map_channels(SimpleNamespace(index_mapping=[kind(offset=[3])]), np.arange(4), np.arange(4))


class Tangled(nn.Module):
    """Something in the middle that fails in torch-pruning's graph must lose the middle only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.left, self.right = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 7, 1)
        self.first, self.second = nn.Conv2d(12, 9, 1), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.second(self.first(x).relu().mean((2, 3)))


@pytest.fixture
def no_concatenations(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: object, node: Any) -> None:
        if node.type == tracing.OPTYPE.CONCAT:
            raise TypeError("unsupported operand type(s) for +: 'int' and 'NoneType'")

    monkeypatch.setattr(index_mapping, "update_concat_index_mapping", fail)


@pytest.mark.usefixtures("no_concatenations")
def test_an_operation_that_cannot_be_mapped_loses_what_leads_through_it_only() -> None:
    model = Tangled().eval()
    images = torch.randn(2, 3, 8, 8)
    found = verify_groups(model, images, find_groups(model, images))
    assert {group.name: group.size for group in found.groups} == {"stem": 6, "first": 9}
    assert all("does not follow" in found.skipped[name] for name in ("left", "right"))


def test_without_the_fault_everything_is_found() -> None:
    model = Tangled().eval()
    images = torch.randn(2, 3, 8, 8)
    found = verify_groups(model, images, find_groups(model, images))
    assert {group.name: group.size for group in found.groups} == {"stem": 6, "left": 5, "right": 7, "first": 9}


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(2, 3, 2, 2\).*Check that the model runs on this input"):
        find_groups(Tangled(), torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize("name", ["cs3darknet_focus_s", "dpn48b"])
def test_concatenations_of_splits_of_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=4)
    images = torch.randn(2, 3, 64, 64)
    assert len(verify_groups(model, images, find_groups(model, images)).groups) > 10
