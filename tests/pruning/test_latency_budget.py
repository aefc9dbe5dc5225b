"""Budgets of time with a clock that is a known function of the model: what is met, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune import prune, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.budgets.cost import count_macs
from jbrprune.errors import BudgetError
from jbrprune.evaluation import latency
from jbrprune.evaluation.agreement import parameters_of
from jbrprune.pruning import loop
from jbrprune.pruning.channels import Channels

IMAGES = cases.images(20, 16).float()
QUICK: dict[str, Any] = {"progress": False, "repair": None, "floors": Floors(channels=1)}
OVERHEAD = 0.2
"""Share of the dense model's time that no layer explains."""


class Block(nn.Module):
    """A residual block of two convolutions, wide enough that one unit is a small part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 64, 3, stride=2, bias=False), nn.BatchNorm2d(64)
        self.a, self.b = nn.Conv2d(64, 96, 3, padding=1), nn.Conv2d(96, 64, 1)
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(F.relu(x + self.b(F.relu(self.a(x)))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(Block()).float()


def macs_of(model: nn.Module) -> float:
    return float(sum(count_macs(model, IMAGES[:1]).values()))


@pytest.fixture(scope="module")
def dense_macs() -> float:
    return macs_of(net())


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, dense_macs: float) -> Callable[[nn.Module], float]:
    """Share of the dense model's 10 ms: a fixed part, and one that is proportional to MACs."""

    def share(model: nn.Module) -> float:
        return OVERHEAD + (1 - OVERHEAD) * macs_of(model) / dense_macs

    known: dict[tuple[int, ...], float] = {}

    def time_pass(model: nn.Module, images: Tensor, passes: int = 1) -> float:
        key = tuple(parameter.numel() for parameter in model.parameters())
        if key not in known:
            known[key] = 0.01 * share(model)
        return known[key]

    monkeypatch.setattr(latency, "time_pass", time_pass)
    return share


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_measured_time_decides(share: float, machine: Callable[[nn.Module], float]) -> None:
    result = prune(net(), IMAGES, latency=share, **QUICK)
    reached = machine(result.model)
    assert share - 0.03 < reached <= share
    steps = result.report.steps
    assert [row.relative_latency for row in steps[:-1]] == sorted(
        (r.relative_latency for r in steps[:-1]), reverse=True
    )
    assert all(row.relative_latency > share for row in steps[:-1])
    assert steps[-1].relative_latency == pytest.approx(reached)
    assert result.report.budget == {"latency": share}
    assert result.report.timings is not None
    assert result.report.timings.ratios[1] == pytest.approx(reached)
    assert any(f"{reached:.3f} ± 0.000 of the dense model's time" in note for note in result.report.notes)
    assert any(f"The budget of {share:.3f} is met." in note for note in result.report.notes)


def test_no_step_takes_more_than_five_percent_of_the_macs_and_the_last_one_aims() -> None:
    report = prune(net(), IMAGES, latency=0.7, **QUICK).report
    shares = [1.0, *(row.macs / report.dense.macs for row in report.steps)]
    targets = [row.target for row in report.steps]
    assert all(before - target <= 0.05 + 1e-9 for before, target in zip(shares, targets, strict=False))
    assert targets[-1] == pytest.approx((0.7 - OVERHEAD) / (1 - OVERHEAD), abs=0.01)  # the line is exact here


def test_what_is_never_fast_enough_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(latency, "time_pass", lambda *_: 0.01)
    report = prune(net(), IMAGES, latency=0.9, progress=False, repair=None, floors=Floors(0.9)).report
    assert any("The budget of 0.900 is missed by 0.100." in note for note in report.notes)
    assert (
        "latency=0.9 is missed: with every group at its floor 1.000 of the dense model's time are left" in caplog.text
    )
    assert report.kept < 1


def test_milliseconds_are_shares_of_what_the_dense_model_takes() -> None:
    model = net()
    by_share = prune(model, IMAGES, latency=0.6, **QUICK)
    by_time = prune(model, IMAGES, latency_ms=6.0, **QUICK)
    assert by_time.report.budget == {"latency_ms": pytest.approx(6.0)}
    assert [row.after for row in by_time.report.layers] == [row.after for row in by_share.report.layers]
    assert any("of the dense model's time (10 ms)" in note for note in by_time.report.notes)
    with pytest.raises(BudgetError, match=r"latency_ms=10 is met by the dense model, which takes 10 ms"):
        prune(model, IMAGES, latency_ms=10, **QUICK)


def test_sweeps_over_time(machine: Callable[[nn.Module], float]) -> None:
    results = sweep(net(), IMAGES, [0.8, 0.6], budget="latency", **QUICK)
    assert all(machine(r.model) <= share for r, share in zip(results, [0.8, 0.6], strict=True))
    results = sweep(net(), IMAGES, [6.0, 8.0], budget="latency_ms", **QUICK)
    assert [r.report.budget["latency_ms"] for r in results] == pytest.approx([8.0, 6.0])


def test_a_stop_that_is_met_already_is_handed_over_as_it_is() -> None:
    one, other = sweep(net(), IMAGES, [0.8, 0.7999], budget="latency", **QUICK)
    assert len(other.report.steps) == len(one.report.steps) + 1
    assert other.report.steps[-1].relative_latency <= 0.7999


def test_a_vit_loses_heads_and_hidden_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = cases.randomised(timm.create_model("test_vit", num_classes=4, img_size=32, depth=2)).float()
    monkeypatch.setattr(latency, "time_pass", lambda net, images, passes=1: 1e-9 * parameters_of(net))
    report = prune(model, cases.images(12, 32).float(), latency=0.6, **QUICK).report
    assert report.steps[-1].relative_latency <= 0.6
    assert {row.kind for row in report.layers if row.after < row.before} == {"channel", "head"}


def test_the_model_is_left_as_it_was(fingerprint: Callable[[nn.Module], dict[str, Any]]) -> None:
    model = net()
    before = fingerprint(model)
    prune(model, IMAGES, latency=0.8, **QUICK)
    assert fingerprint(model) == before


class Interrupted(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("budget", [{"latency": 0.6}, {"latency_ms": 6.0}])
@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_run_that_goes_on_keeps_the_dense_time_of_its_beginning(
    budget: dict[str, float], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prune(net(), IMAGES, **budget, **QUICK)
    measured, calls = loop.repair_and_evaluate, []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise Interrupted
        return measured(*args)

    monkeypatch.setattr(loop, "repair_and_evaluate", interrupt)
    with pytest.raises(Interrupted):
        prune(net(), IMAGES, **budget, **QUICK, resume=tmp_path)
    monkeypatch.setattr(loop, "repair_and_evaluate", measured)
    timed = latency.time_pass
    monkeypatch.setattr(latency, "time_pass", lambda *args: factor * timed(*args))
    for _ in range(2):  # goes on, then hands over again
        found = prune(net(), IMAGES, **budget, **QUICK, resume=tmp_path)
        assert found.report.kept == expected.report.kept
        assert [row.target for row in found.report.steps] == pytest.approx(
            [row.target for row in expected.report.steps]
        )
        assert found.report.budget == pytest.approx(budget)
        assert found.report.notes == expected.report.notes


@pytest.mark.parametrize(
    ("rows", "stop", "least", "expected"),
    [
        ([], 0.5, 0.1, 0.95),  # time falls as MACs do: .5 away, but one step at most
        ([], 0.97, 0.1, 0.97),
        ([], 0.998, 0.1, 0.995),  # a tenth of a step at least: rounded widths must change
        ([(0.8, 0.9)], 0.88, 0.1, 0.76),  # a line through (1, 1) and (.8, .9): .02 of time are .04 of MACs
        ([(0.8, 0.9), (0.7, 0.89)], 0.885, 0.1, 0.65),  # .005 of time are .05 of MACs
        ([(0.8, 0.9), (0.7, 0.95)], 0.94, 0.1, 0.69),  # slower than before: as if time fell as MACs do
        ([(0.8, 0.9), (0.7, 0.81)], 0.809, 0.1, 0.695),
        ([(0.8, 0.9)], 0.2, 0.78, 0.78),  # never below the floors
        ([(0.8, 0.3)], 0.4, 0.1, 0.8),  # met
    ],
)
def test_the_next_share_by_hand(rows: list[tuple[float, float]], stop: float, least: float, expected: float) -> None:
    steps = [SimpleNamespace(macs=1000 * macs, relative_latency=ratio) for macs, ratio in rows]
    state: Any = SimpleNamespace(whole=1000, steps=steps, stop=stop, least=least)
    assert Channels.next_share(state) == pytest.approx(expected)
