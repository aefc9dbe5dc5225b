"""WeightScores: merging, files, and what torch.nn.utils.prune takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from safetensors.torch import save_file
from single import OWN, PIXELS, assert_exact, line, made, scored
from torch import nn
from torch.nn.utils import prune

from jbrprune.criteria.scores import Settings
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.data import files
from jbrprune.errors import ArgumentError, CheckpointError

# --- importance scores -----------------------------------------------------------------------------------------------


def test_global_unstructured_takes_the_scores() -> None:
    model = made(cases.NETS, "concatenation, flattened")
    scores = scored(model, cases.images(4))
    importance = scores.importance_scores(model)
    parameters = [(model.get_submodule(name), "weight") for name in ("one", "mix", "fc")]
    assert all(key in importance for key in parameters)
    prune.global_unstructured(parameters, prune.L1Unstructured, importance, amount=0.5)
    values = torch.cat([scores[f"{name}.weight"].flatten() for name in ("one", "mix", "fc")])
    kept = torch.cat([module.weight_mask.flatten() for module, _ in parameters]).bool()
    assert int(kept.sum()) == round(len(values) / 2)
    assert values[kept].min() >= values[~kept].max()
    # once more, on top of the masks
    again = scored(model, cases.images(4)).importance_scores(model)
    prune.global_unstructured(parameters, prune.L1Unstructured, again, amount=0.5)
    zeros = sum(int((module.weight == 0).sum()) for module, _ in parameters)
    assert zeros == pytest.approx(0.75 * len(values), abs=1)


def test_shared_weights_are_scored_for_every_module() -> None:
    model = made(OWN, "borrowed and shared")
    scores = scored(model, cases.images(2))
    assert "two.weight" not in scores.sums
    importance = scores.importance_scores(model)
    assert torch.equal(importance[model.two, "weight"], importance[model.one, "weight"])


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
            r"1.weight has shape \(2, 3\) in the model, but \(2, 2\)",
        ),
        (lambda: nn.Sequential(nn.Flatten()), "1.weight has shape None in the model"),
    ],
)
def test_scores_of_another_model(other: Callable[[], nn.Module], message: str) -> None:
    scores = scored(line([[1.0, 1.0], [1.0, 1.0]]), PIXELS)
    with pytest.raises(ArgumentError, match=message):
        scores.importance_scores(other())


# --- sums and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["second_moment", "batched", "signed"])
def test_shards_add_up(statistic: Any) -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(6)
    options = {"statistic": statistic, "batch": 2, "objective": "margin"}
    parts = [scored(model, part, **options) for part in images.split([2, 4])]
    whole = scored(model, images, **options)
    total = parts[0] + parts[1]
    assert total.samples == 6
    assert_exact(total.values(), whole.values())


def _scores(shape: tuple[int, ...] = (2, 3), name: str = "a.weight", **settings: Any) -> WeightScores:
    return WeightScores({name: torch.rand(shape).double()}, 4, 1, Settings("margin", "weight", "signed", **settings))


@pytest.mark.parametrize(
    "other, message",
    [
        (_scores(threshold=0.9), "made with"),
        (_scores((3, 2)), "different weights: they differ in a.weight"),
        (_scores(name="b.weight"), "different weights: they differ in a.weight"),
    ],
)
def test_unlike_scores_do_not_add(other: WeightScores, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        _scores() + other


def test_files(tmp_path: Path) -> None:
    scores = _scores(batch=7, threshold=0.5)
    scores.save(tmp_path / "scores.safetensors")
    loaded = WeightScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.sums["a.weight"], scores.sums["a.weight"])
    assert (loaded.samples, loaded.skipped, loaded.settings) == (4, 1, scores.settings)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="not a file of scores of weights"):
        WeightScores.load(tmp_path / "none")
    (tmp_path / "torn").write_bytes(b"\x10torn")
    with pytest.raises(CheckpointError, match="not a file of scores of weights"):
        WeightScores.load(tmp_path / "torn")
    save_file({}, tmp_path / "units", metadata={"jbrprune": json.dumps({"format": 1})})
    with pytest.raises(CheckpointError, match="scores of units"):
        WeightScores.load(tmp_path / "units")

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left on device"):
        _scores().save(tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
