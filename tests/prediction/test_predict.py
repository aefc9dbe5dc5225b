"""predict() and degradation(): the table, what is measured in it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import pandas
import pytest
import torch
from test_api import own, resnet, vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import jbrprune
from jbrprune import Scores, degradation, predict, prune, score
from jbrprune.budgets.budget import Floors
from jbrprune.cli import app
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, BudgetError, DataError, NonFiniteError
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.models.preserve import copy_model
from jbrprune.prediction import damage
from jbrprune.pruning.channels import Channels
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import remove_units
from jbrprune.tpv import TPVWarning

IMAGES = cases.images(40, 32).float()
QUICK: dict[str, Any] = {"progress": False, "floors": Floors(channels=1)}
SHARES = [0.5, 0.9, 0.7]


def heldout(model: nn.Module) -> list[Batch]:
    """What predict() measures the pruned models on."""
    return cases.calibration(model.eval(), IMAGES).heldout


def rows(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")


def test_one_row_per_budget_and_more_damage_for_less() -> None:
    model = resnet()
    frame = predict(model, IMAGES, macs=SHARES, **QUICK)
    assert list(frame.target) == sorted(SHARES, reverse=True)
    assert all(abs(row["macs"] - row["target"]) < 0.05 and row["macs"] <= row["target"] for row in rows(frame))
    assert list(frame.predicted_tpv) == sorted(frame.predicted_tpv)
    assert list(frame.params) == sorted(frame.params, reverse=True)
    for row in rows(frame):
        for suffix in ("", "_repaired"):
            low, flips, high = (row[f"predicted_flips{end}{suffix}"] for end in ("_low", "", "_high"))
            assert 0 <= low <= flips <= high <= 1
            assert row[f"predicted_tpv_se{suffix}"] >= 0
        assert not row["valid"] or row["prediction_error"] <= 0.3
    assert frame.measured_tpv.isna().all()


def test_the_cut_is_the_one_that_one_step_of_prune_makes() -> None:
    """Masked flips and TPV, measured without a cut, are those of the pruned model."""
    model = own()
    row = rows(predict(model, IMAGES, macs=[0.7], checked=None, **QUICK))[0]
    result = prune(model, IMAGES, macs=0.7, steps=1, repair=None, **QUICK)
    dense, pruned = (torch.cat(compute_logits(each.eval(), [Batch(IMAGES)])) for each in (model, result.model))
    assert row["masked_tpv"] == pytest.approx(float((pruned - dense).square().sum(1).mean()), rel=1e-4)
    assert row["masked_flips"] == float((pruned.argmax(1) != dense.argmax(1)).double().mean())
    assert row["macs"] == pytest.approx(result.report.kept)
    assert row["params"] == pytest.approx(result.report.pruned.params / result.report.dense.params)


def test_small_cuts_are_predicted_and_flagged_valid_large_ones_not(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = predict(vit(), IMAGES, macs=[0.99, 0.47], checked=None, **QUICK)
    small, large = frame.taylor_error
    assert small < 0.3 * large
    assert frame.predicted_tpv[0] == pytest.approx(frame.masked_tpv[0], rel=0.2)
    assert frame.prediction_error[0] < 0.3 * frame.prediction_error[1]
    monkeypatch.setattr(damage, "LARGEST_ERROR", float(frame.prediction_error.mean()))
    strict = predict(vit(), IMAGES, macs=[0.99, 0.47], checked=None, **QUICK)
    assert list(strict.valid) == [True, False]


def test_calibration_really_prunes_and_bends_the_curve_through_what_it_measured() -> None:
    model = own()
    frame = predict(model, IMAGES, macs=SHARES, calibrate=True, **QUICK)
    (row,) = (row for row in rows(frame) if row["measured_tpv"] == row["measured_tpv"])
    assert row["predicted_tpv"] == pytest.approx(row["measured_tpv"], rel=1e-5)
    images = heldout(model)
    dense = torch.cat([batch.reference for batch in images if batch.reference is not None])
    result = prune(model, IMAGES, macs=row["target"], **QUICK)
    real = torch.cat(compute_logits(result.model, images))
    assert row["measured_tpv_repaired"] == pytest.approx(float((real - dense).square().sum(1).mean()), rel=1e-4)


def test_one_output_is_a_regression_without_flips() -> None:
    """The largest of one stays the largest, whatever goes: what counts is how far it moves."""
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 1))
    (row,) = rows(predict(net, IMAGES, macs=[0.8], **QUICK))
    assert row["predicted_tpv"] > 0
    assert row["masked_flips"] != row["masked_flips"]
    found = degradation(net, {"0": [0]}, IMAGES, progress=False)
    assert found.measured.tpv > 0
    assert found.measured.flips != found.measured.flips


def test_images_that_the_model_does_not_tell_apart() -> None:
    blind, model = own(), own()
    nn.init.zeros_(blind.fc.weight)
    same = IMAGES[:1].expand(40, -1, -1, -1)
    with pytest.warns(TPVWarning, match="All images have the same logits"):
        assert not predict(model, same, macs=[0.8], **QUICK).valid.any()
    for net, images in ((blind, IMAGES), (model, same)):
        with pytest.warns(TPVWarning, match="All images have the same logits"):
            assert not degradation(net, {"a": [0]}, images, progress=False).valid


@pytest.mark.parametrize("kind", ["params", "channels"])
def test_other_budgets(kind: str) -> None:
    row = rows(predict(own(), IMAGES, **{kind: [0.8]}, **QUICK))[0]
    assert kind == "channels" or row["params"] <= 0.8


def test_without_budgets_it_goes_as_far_as_the_floors_allow() -> None:
    frame = predict(own(), IMAGES, progress=False, floors=Floors(channels=8))
    assert list(frame.target) == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]


def test_without_repair_there_is_nothing_to_say_of_it() -> None:
    frame = predict(own(), IMAGES, macs=[0.8], repair=None, **QUICK)
    assert frame.predicted_flips_repaired.isna().all()
    assert frame.predicted_flips.notna().all()


def test_a_loader_that_shuffles_is_read_once() -> None:
    """All passes see the same images: nothing is predicted of one sample and measured on another."""
    model = own()
    frame = predict(model, IMAGES, macs=[0.9], checked=None, **QUICK)
    loader = DataLoader(TensorDataset(IMAGES), 7, shuffle=True)
    other = predict(model, loader, macs=[0.9], checked=None, **QUICK)
    assert other.taylor_error[0] < 2 * frame.taylor_error[0] + 0.1


def test_one_image_and_many_classes() -> None:
    row = rows(predict(own(), IMAGES[:1], macs=[0.9], **QUICK))[0]
    assert row["predicted_flips"] in (0.0, 1.0)
    assert row["predicted_tpv_se"] != row["predicted_tpv_se"]  # NaN: one sample has no spread
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 20_000))
    assert rows(predict(wide, IMAGES[:12], macs=[0.8], **QUICK))[0]["predicted_tpv"] > 0


def test_the_model_is_untouched() -> None:
    model = resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict(model, IMAGES, macs=[0.8], calibrate=True, **QUICK)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("extra", "error", "match"),
    [
        ({"macs": [0.5, 0.5]}, BudgetError, "different shares"),
        ({"macs": []}, BudgetError, "one or more different shares"),
        ({"macs": [1.5]}, BudgetError, "macs must satisfy"),
        ({"macs": [0.5], "params": [0.5]}, BudgetError, "shares of one kind"),
        ({"macs": [0.0001], "floors": Floors(channels=8)}, BudgetError, "cannot be reached"),
        ({"checked": 0}, ArgumentError, "checked must be a whole number of at least 1, got 0"),
        ({"criterion": "jbr_nonsense"}, ArgumentError, "Unknown criterion"),
        ({"criterion": "jbr_label"}, DataError, "needs labels"),
    ],
)
def test_refuses_nonsense(extra: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        predict(own(), IMAGES[:12], progress=False, **extra)


def test_refuses_to_calibrate_on_too_few_images() -> None:
    with pytest.raises(DataError, match="too few"):
        predict(own(), IMAGES[:9], macs=[0.9], calibrate=True, **QUICK)


def test_errors_come_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Channels, "score", lambda *_: pytest.fail("scored"))
    broken = own()
    broken.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"fc\.weight"):
        predict(broken, IMAGES, macs=[0.9], **QUICK)


def test_degradation_of_units_is_that_of_the_model_without_them() -> None:
    model = own()
    groups = find_groups(copy_model(model), IMAGES[:2]).groups
    units = {groups[0].name: torch.tensor([2, 0]), groups[1].name: torch.tensor([1])}
    found = degradation(model, units, IMAGES, progress=False)
    smaller = copy_model(model).eval()
    with torch.no_grad():
        remove_units(smaller, groups, {name: gone.sort().values for name, gone in units.items()})
        real = smaller(IMAGES) - model.eval()(IMAGES)
    assert found.measured.tpv == pytest.approx(float(real.square().sum(1).mean()), rel=1e-4)
    assert found.measured_repaired is None
    assert found.images == 40


@pytest.mark.parametrize("repair", [None, "auto"])
def test_degradation_of_a_result_measures_its_model(repair: str | None) -> None:
    model = resnet()
    result = prune(model, IMAGES, macs=0.8, steps=2, repair=repair, **QUICK)
    found = degradation(model, result, IMAGES, progress=False)
    assert found.measured_repaired is not None
    real = torch.cat(compute_logits(result.model, [Batch(IMAGES)])) - torch.cat(
        compute_logits(model.eval(), [Batch(IMAGES)])
    )
    assert found.measured_repaired.tpv == pytest.approx(float(real.square().sum(1).mean()), rel=1e-4)
    if repair is None:  # then the units of the report are all there is to the pruned model
        assert found.measured.tpv == pytest.approx(found.measured_repaired.tpv, rel=1e-4)
    by_report = degradation(model, result.report, IMAGES, progress=False)
    assert by_report.measured == found.measured
    assert jbrprune.Report.from_dict(result.report.to_dict()).removed == result.report.removed


def test_removed_units_of_a_report_add_up_to_the_widths() -> None:
    result = prune(vit(), IMAGES, macs=0.7, steps=2, **QUICK)
    assert sum(map(len, result.report.removed.values())) == sum(
        layer.before - layer.after for layer in result.report.layers if layer.name in result.report.removed
    )


@pytest.mark.parametrize(
    ("units", "match"),
    [
        ({}, "names no channel or head"),
        ({"nowhere": [0]}, "Unknown group 'nowhere'"),
        ({"a": [99]}, "a has units 0 to 19"),
    ],
)
def test_degradation_refuses_units_that_are_not_there(units: dict[str, list[int]], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        degradation(own(), units, IMAGES, progress=False)


def test_scores_made_before_are_what_is_ranked() -> None:
    model = resnet()
    scores = score(model, IMAGES, progress=False)
    upside_down = replace(scores, sums={name: -total for name, total in scores.sums.items()})
    best, worst = (
        predict(model, IMAGES, macs=[0.8], criterion=each, **QUICK).predicted_tpv[0] for each in (scores, upside_down)
    )
    assert best < worst


def test_scores_made_before_can_be_calibrated() -> None:
    model = own()
    scores = score(model, IMAGES, progress=False)
    assert isinstance(scores, Scores)
    frame = predict(model, IMAGES, macs=[0.8, 0.7], criterion=scores, calibrate=True, **QUICK)
    assert frame.measured_tpv_repaired.notna().sum() == 1


def test_the_command_line(tmp_path: Any) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.effect_noise((40, 40), 60 + number).convert("RGB").save(folder / f"{number}.png")
    out = tmp_path / "table.csv"
    net = ["test_vit", "--model-arg", "img_size=32", "--model-arg", "depth=2", "--random"]
    wanted = ["predict", *net, "--data", str(folder), "--macs", "0.9", "--macs", "0.7"]
    done = CliRunner().invoke(app, [*wanted, "--out", str(out), "--min-channels", "1"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "masked flips are measured" in done.stdout
    assert list(pandas.read_csv(out).target) == [0.9, 0.7]
