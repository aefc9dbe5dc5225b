"""Recurrent layers lose inputs: found, scored, priced and removed as those of a linear layer; their states stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import jbrprune
from jbrprune.criteria.relevance import Relevance
from jbrprune.structure.discovery import find_groups

STEPS = 4


class Recurrent(nn.Module):
    """Columns of a feature map are read one after the other, all rows at once or their mean."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, *, flat: bool = True, **options: Any) -> None:
        super().__init__()
        self.first, self.second, self.flat = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 10, 3, 2, 1), flat
        self.reader = kind(10 * (STEPS if flat else 1), 16, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = x.permute(0, 3, 1, 2).flatten(2) if self.flat else x.mean(2).transpose(1, 2)
        return self.head(self.reader(x)[0][:, -1])

    def count(self) -> int:
        """Multiply-accumulates by hand, for 16 x 16 pixels: every matrix is applied at every step."""
        convolutions = self.first.weight.numel() * 64 + self.second.weight.numel() * 16
        matrices = sum(w.numel() for name, w in self.reader.named_parameters() if "weight" in name)
        return convolutions + STEPS * matrices + self.head.weight.numel()


def make(*options: Any, **more: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(*options, **more).double().eval()


def test_relevance_is_that_of_a_slow_twin() -> None:
    net, x = make(), cases.images(5, 16)
    (group,) = (group for group in find_groups(net, x[:2]).groups if group.name == "second")
    (reads,) = group.side("in")
    assert reads.axis == ("reader", "in", 0)
    expected = torch.zeros(10, dtype=torch.float64)
    for image in x:
        net.zero_grad()
        net(image[None]).max().backward()
        weight = net.reader.weight_ih_l0
        relevance = (weight * weight.grad).detach().sum(0)
        expected += torch.stack([relevance[4 * c : 4 * c + 4].sum() for c in range(10)]) ** 2
    scores = Relevance("predicted_logit")(net, x, [group])
    torch.testing.assert_close(scores["second"], expected / 5, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"num_layers": 2, "bias": False}),
        (nn.LSTM, {"flat": False, "bidirectional": True}),
        (nn.GRU, {}),
        (nn.RNN, {"flat": False}),
    ],
)
def test_the_budget_is_met_really(kind: type[nn.RNNBase], options: dict[str, Any], tmp_path: Path) -> None:
    net, x = make(kind, **options), cases.images(12, 16)
    how: dict[str, Any] = {"macs": 0.7, "floors": jbrprune.Floors(channels=1), "progress": False}
    result = jbrprune.prune(net, x, **how)
    assert result.report.dense.macs == net.count()
    assert result.report.kept == pytest.approx(result.model.count() / net.count())
    assert 0.6 < result.report.kept <= 0.7
    assert result.model.reader.input_size < net.reader.input_size
    with torch.no_grad():
        expected = result.model(x)
        result.save(tmp_path / "m")
        assert torch.equal(jbrprune.load(tmp_path / "m", model=make(kind, **options))(x), expected)
        assert torch.equal(jbrprune.prune(copy.deepcopy(net), x, inplace=True, **how).model(x), expected)


def test_inputs_that_nobody_reads_are_found() -> None:
    net, x = make(bidirectional=True, flat=False), cases.images(12, 16)
    with torch.no_grad():
        net.reader.weight_ih_l0[:, :3] = 0
        net.reader.weight_ih_l0_reverse[:, :2] = 0
    result = jbrprune.sparsify(net, x, sparsity=0.01, repair=None, shrink=True, progress=False)
    assert result.model.reader.input_size == 8


def test_the_variance_under_removal_is_that_of_the_weights_that_read() -> None:
    net, x = make(bidirectional=True), cases.images(4, 16).double()
    (group,) = (group for group in find_groups(net, x[:2]).groups if group.name == "second")
    expected = torch.zeros((), dtype=torch.float64)
    weights = (net.reader.weight_ih_l0, net.reader.weight_ih_l0_reverse)
    for image in x:
        for output in net(image[None])[0]:
            gradients = torch.autograd.grad(output, weights, retain_graph=True)
            change = sum(-(weight * slope)[:, 4 * 3 : 4 * 4].sum() for weight, slope in zip(weights, gradients))
            expected += change.detach() ** 2 / len(x)
    removal = jbrprune.tpv.Removal({"second": [3]}, (group,))
    how: Any = {"method": "projection", "validity": False, "rtol": 0.05, "progress": False}
    found = jbrprune.tpv.trace_form(net, x, removal, **how)
    assert found.value == pytest.approx(float(expected), rel=0.2)
    exact = jbrprune.tpv.trace_form(net, x, removal, **how | {"method": "exact", "rtol": 0.0})
    assert exact.value == pytest.approx(float(expected), rel=1e-8)
