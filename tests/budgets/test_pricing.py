"""Budgets of time with a clock that is a known function of the model: what is planned, what is met, what is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from torch import Tensor, nn

from jbrprune import prune, sweep
from jbrprune.budgets import pricing
from jbrprune.budgets.budget import Budget
from jbrprune.budgets.cost import cost_model, count_macs
from jbrprune.budgets.selection import Floors
from jbrprune.budgets.timing import Laps, Ratio
from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.evaluation.latency import Latency
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import remove_units

IMAGES = cases.images(40, 32).float()
QUICK: dict[str, Any] = {"progress": False, "measure_latency": False, "steps": 2, "repair": None, "min_channels": 1}
OVERHEAD = 0.2
"""Share of the dense model's time that no layer explains."""


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(timm.create_model("test_resnet", num_classes=4)).float()


def macs_of(model: nn.Module) -> float:
    return float(sum(count_macs(model, IMAGES[:1]).values()))


def true_share(model: nn.Module, dense: nn.Module) -> float:
    """The machine of these tests: a fixed part, and one that is proportional to MACs."""
    return OVERHEAD + (1 - OVERHEAD) * macs_of(model) / macs_of(dense)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JBRPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pricing, "relative_latency", lambda m, d, images: Ratio(true_share(m, d), 0.01, 9))
    monkeypatch.setattr(
        pricing, "latencies", lambda models, images: [Latency(10.0, 0.1, 9, 1, 1, "cpu") for _ in models]
    )
    monkeypatch.setattr(pricing.Stopwatch, "of", classmethod(lambda cls, device: cls(device, {}, by_macs)))


def by_macs(runs: list[Any], device: torch.device, **_: object) -> list[Laps]:
    """A layer takes as long as it has MACs; the rest takes next to nothing."""
    return [Laps((1e-9 * (1 + _macs(run.func, run.args[0])),), 1) for run in runs]


def _macs(layer: nn.Module, images: Tensor) -> float:
    mixes = isinstance(layer, nn.Conv2d | nn.Linear)
    return float(sum(count_macs(nn.Sequential(layer), images).values())) if mixes else 0.0


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_measured_time_decides(share: float) -> None:
    model = resnet()
    result = prune(model, IMAGES, latency=share, round_to=1, **QUICK)
    reached = true_share(result.model, model)
    assert share - 0.05 < reached <= share
    row = result.report.steps[-1]
    assert (row.target, row.relative_latency) == (share, pytest.approx(reached))
    assert result.report.budget == {"latency": share}
    (note,) = [note for note in result.report.notes if note.startswith("Latency")]
    assert f"{reached:.3f} ± 0.010 of the dense model's" in note
    assert f"the budget of {share:.3f} is met. Widths are multiples of 1." in note


def test_a_plan_is_priced_as_the_smaller_model_is_measured() -> None:
    """Layers and whole model have the same cost here, so the two points fix the line exactly."""
    model = resnet()
    groups = find_groups(model, IMAGES[:2]).groups
    price = pricing.pricer(Budget("latency", 0.5), model, IMAGES[:2], groups, Floors(channels=1))
    smaller, left, account = copy.deepcopy(model), groups, price(model, groups)
    assert account.total == 1
    for step in (3, 2):
        gone = {g.name: torch.arange(g.size // step) for g in left}
        for name, units in gone.items():
            account.remove(name, len(units))
        left = remove_units(smaller, left, gone)
        assert account.total == pytest.approx(true_share(smaller, model), abs=2e-3)
        account = price(smaller, left)
        assert account.total == pytest.approx(true_share(smaller, model), rel=1e-12)
        assert account.spread == 0.01


def test_units_are_ranked_by_score_per_time() -> None:
    model = resnet()
    groups = find_groups(model, IMAGES[:2]).groups
    account = pricing.pricer(Budget("latency", 0.5), model, IMAGES[:2], groups, Floors(channels=1))(model, groups)
    macs = cost_model("macs", model, IMAGES[:2], groups)
    for group in groups:
        expected = (1 - OVERHEAD) * macs.saving(group.name) / macs.total
        assert account.saving(group.name) == pytest.approx(expected, rel=2e-2)


def test_a_plan_that_is_too_slow_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which widths that are no multiples of 16 save nothing, and nobody said so."""

    def stubborn(model: nn.Module, dense: nn.Module, images: Tensor) -> Ratio:
        share = true_share(model, dense)
        narrow = any(m.out_channels % 16 for m in model.modules() if isinstance(m, nn.Conv2d))
        return Ratio(min(1.0, share * (1.15 if narrow else 1)), 0.02, 9)

    monkeypatch.setattr(pricing, "relative_latency", stubborn)
    model = resnet()
    result = prune(model, IMAGES, latency=0.7, round_to=1, **QUICK)
    assert stubborn(result.model, model, IMAGES).median <= 0.7


def test_what_is_never_fast_enough_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pricing, "ATTEMPTS", 1)
    floor = iter([0.3])
    monkeypatch.setattr(pricing, "relative_latency", lambda *_: Ratio(next(floor, 0.9), 0.02, 9))
    report = prune(resnet(), IMAGES, latency=0.7, round_to=1, **{**QUICK, "steps": 1}).report
    (note,) = [note for note in report.notes if note.startswith("Latency")]
    assert "missed by 0.200" in note
    assert "The budget of latency=0.7 is missed: 0.900 of the dense model's time are left." in caplog.text


def test_a_budget_below_the_floors_is_refused_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jbrprune.criteria.relevance.Relevance.__call__", None)
    with pytest.raises(BudgetError, match=r"latency=0\.15 cannot be reached.*0\.2\d\d of the dense model's latency"):
        prune(resnet(), IMAGES, latency=0.15, round_to=1, **QUICK)
    with pytest.raises(BudgetError, match=r"latency_ms=1\.5 cannot be reached.*Ask for at least 2\.\d"):
        prune(resnet(), IMAGES, latency_ms=1.5, round_to=1, **QUICK)


def test_milliseconds_are_shares_of_what_the_dense_model_takes() -> None:
    model = resnet()
    by_share = prune(model, IMAGES, latency=0.6, round_to=1, **QUICK)
    by_time = prune(model, IMAGES, latency_ms=6.0, round_to=1, **QUICK)
    assert by_time.report.budget == {"latency_ms": pytest.approx(6.0)}
    assert [row.after for row in by_time.report.layers] == [row.after for row in by_share.report.layers]
    assert any("which took 10 ms" in note for note in by_time.report.notes)
    with pytest.raises(BudgetError, match=r"latency_ms=10 is met by the dense model, which takes 10 ms"):
        prune(model, IMAGES, latency_ms=10, **QUICK)


def test_sweeps_over_time() -> None:
    model = resnet()
    results = sweep(model, IMAGES, [0.8, 0.6], budget="latency", round_to=1, **QUICK)
    assert all(true_share(r.model, model) <= share for r, share in zip(results, [0.8, 0.6]))
    results = sweep(model, IMAGES, [6.0, 8.0], budget="latency_ms", round_to=1, **QUICK)
    assert [r.report.budget["latency_ms"] for r in results] == pytest.approx([8.0, 6.0])


def test_the_multiple_is_chosen_where_nobody_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "best_multiple", lambda *_: 8)
    model = resnet()
    for options in ({"latency": 0.6}, {"macs": 0.5, "round_to": "auto"}):
        report = prune(model, IMAGES, **options, **QUICK).report
        assert report.settings["round_to"] == 8
        assert all(row.after % 8 == 0 for row in report.layers)
    assert prune(model, IMAGES, macs=0.5, **QUICK).report.settings["round_to"] == 1
    with pytest.raises(ArgumentError, match="round_to must be a whole number or 'auto', got 'fast'"):
        prune(model, IMAGES, macs=0.5, round_to="fast", **QUICK)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "3"])
def test_milliseconds_are_positive(value: object) -> None:
    with pytest.raises(BudgetError, match=r"latency_ms must satisfy 0 < latency_ms.*milliseconds"):
        Budget.of(latency_ms=value)  # type: ignore[arg-type]


def test_a_vit_loses_heads_and_hidden_channels() -> None:
    torch.manual_seed(0)
    model = cases.randomised(timm.create_model("test_vit", num_classes=4, img_size=32, depth=2)).float()
    report = prune(model, IMAGES, latency=0.85, round_to=1, **QUICK).report
    assert report.steps[-1].relative_latency <= 0.85


Fingerprint = Callable[[nn.Module], dict[str, Any]]


def test_the_model_is_left_as_it_was(fingerprint: Fingerprint) -> None:
    model = resnet()
    before = fingerprint(model)
    prune(model, IMAGES, latency=0.8, round_to=1, **QUICK)
    assert fingerprint(model) == before
