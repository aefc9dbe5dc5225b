"""2:4 sparse linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from jbrprune.errors import ModelError
from jbrprune.integrations import is_two_to_four, to_semi_structured

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def sparse_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    for layer in (net[0], net[2]):
        layer.weight.data.view(64, 16, 4)[..., 1:3] = 0
    return net


def test_the_pattern() -> None:
    weight = torch.ones(2, 8)
    weight[:, [0, 1, 4, 7]] = 0
    assert is_two_to_four(weight)
    weight[1, 7] = 1  # three of the last four
    assert not is_two_to_four(weight)
    weight = torch.ones(2, 8)
    weight[:, :4] = 0  # half of all, but not of every four
    assert not is_two_to_four(weight)
    assert not is_two_to_four(torch.zeros(2, 6))


def test_a_device_without_kernels_is_refused() -> None:
    net = sparse_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match=r"is on cpu .*, which has no 2:4 sparse kernels"):
        to_semi_structured(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def play_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model seem to be on a device with sparse kernels."""
    monkeypatch.setattr("jbrprune.models.preserve.device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_what_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device's part played: which layers are handed to torch, and what is said of the others."""
    play_device(monkeypatch)
    handed = []

    def converted(weight: torch.Tensor) -> torch.Tensor:
        if handed:
            raise RuntimeError("shape is not supported\nmore")
        handed.append(weight)
        return weight.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", converted)
    net = sparse_net()
    first = net[0].weight
    assert to_semi_structured(net) == {"2": "shape is not supported", "3": "its weight is not 2:4 sparse"}
    assert net[0].weight is not first
    assert torch.equal(handed[0], first)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    play_device(monkeypatch)
    with pytest.raises(ModelError, match="None of 1 linear layers is 2:4 sparse"):
        to_semi_structured(nn.Sequential(nn.Linear(8, 8)))
    net = sparse_net()
    prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(ModelError, match=r"0\.weight .* is masked by torch"):
        to_semi_structured(net)


@pytest.mark.skipif(not CAPABLE, reason="needs a CUDA device of compute capability 8.0")
def test_the_outputs_stay() -> None:
    net = sparse_net().half().cuda()
    images = torch.randn(64, 64).half().cuda()
    expected = net(images)
    assert to_semi_structured(net) == {"3": "its weight is not 2:4 sparse"}
    torch.testing.assert_close(net(images), expected, rtol=1e-2, atol=1e-2)
