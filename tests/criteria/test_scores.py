"""Scores: means, merging, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jbrprune.criteria.scores import Accumulator, Scores, Settings
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, CheckpointError
from jbrprune.structure.groups import Group, Member

INDEX = torch.arange(3)
# Channel and unit share memory, as in `layer_groups`.
GROUPS = (
    Group("conv", "channel", 3, (Member(("conv", "out", 0), INDEX, INDEX), Member(("next", "in", 0), INDEX, INDEX))),
    Group("attn", "head", 2, (Member(("proj", "in", 0), torch.arange(4), torch.tensor([0, 0, 1, 1])),)),
)
SETTINGS = Settings("margin", "consumer", "batched", 128, 0.9)


def scores(samples: int = 4, factor: float = 1.0) -> Scores:
    sums = {"conv": factor * torch.tensor([4.0, 8.0, 2.0]).double(), "attn": factor * torch.tensor([1.0, 3.0]).double()}
    return Scores(sums, GROUPS, samples, skipped=1, settings=SETTINGS)


def test_a_score_is_the_mean_over_samples() -> None:
    assert scores()["conv"].tolist() == [1.0, 2.0, 0.5]
    assert {name: value.tolist() for name, value in scores().values().items()} == {
        "conv": [1.0, 2.0, 0.5],
        "attn": [0.25, 0.75],
    }


def test_adding_merges_samples() -> None:
    merged = scores(4) + scores(12, factor=7.0)
    assert (merged.samples, merged.skipped, merged.settings) == (16, 2, SETTINGS)
    assert merged["conv"].tolist() == [2.0, 4.0, 1.0]  # not the mean of the means
    assert scores()["conv"].tolist() == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    "change", [{"objective": "label"}, {"site": "all"}, {"statistic": "mean"}, {"batch": 1}, {"threshold": 0.0}]
)
def test_other_settings_are_not_added(change: dict) -> None:
    with pytest.raises(ArgumentError, match="Cannot add scores made with Settings"):
        scores() + replace(scores(), settings=replace(SETTINGS, **change))


def _other_groups() -> dict[str, tuple[Group, ...]]:
    conv, attn = GROUPS
    moved = Member(("next", "in", 0), INDEX + 1, INDEX)
    return {
        "fewer": (conv,),
        "another name": (replace(conv, name="other"), attn),
        "another member": (replace(conv, members=(conv.members[0], moved)), attn),
        "another order": (attn, conv),
    }


@pytest.mark.parametrize("other", _other_groups())
def test_other_units_are_not_added(other: str) -> None:
    with pytest.raises(ArgumentError, match="different units"):
        scores() + replace(scores(), groups=_other_groups()[other])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    scores().save(str(path))  # a second time, over the first
    loaded = Scores.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]
    assert (loaded.samples, loaded.skipped, loaded.settings) == (4, 1, SETTINGS)
    assert list(loaded.sums) == ["conv", "attn"]
    assert all(torch.equal(loaded.sums[name], total) for name, total in scores().sums.items())
    assert (loaded + scores())["conv"].tolist() == [1.0, 2.0, 0.5]  # so the groups are the same, members and all


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    before = path.read_bytes()

    def fail(tensors: object, name: Path, metadata: object) -> None:
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("jbrprune.data.files.save_file", fail)
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left on device"):
        replace(scores(), samples=5).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]
    assert path.read_bytes() == before


def _damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "scores.safetensors"
    if kind == "missing":
        return path
    scores().save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "text":
        path.write_text("not a scores file")
    elif kind == "without header":
        save_file(load_file(path), path)
    elif kind == "header is no JSON":
        save_file(load_file(path), path, metadata={"jbrprune": "{"})
    elif kind == "header is incomplete":
        save_file(load_file(path), path, metadata={"jbrprune": json.dumps({"format": 1})})
    elif kind == "header is a list":
        save_file(load_file(path), path, metadata={"jbrprune": "[]"})
    else:
        tensors = load_file(path)
        del tensors[kind]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "text",
        "without header",
        "header is no JSON",
        "header is incomplete",
        "header is a list",
        "attn",
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match="is not a file of scores of units, or is damaged"):
        Scores.load(_damaged(tmp_path, kind))


def test_a_future_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"jbrprune": json.dumps({"format": 2})})
    with pytest.raises(CheckpointError, match="units in format 2; expected scores of units in format 1"):
        Scores.load(path)


def test_a_file_of_weight_scores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    WeightScores({"fc.weight": torch.ones(2, 3)}, 4, 0, Settings("margin", "weight", "signed")).save(path)
    with pytest.raises(CheckpointError, match=r"holds scores of weights in format 1; expected scores of units"):
        Scores.load(path)


ZEROS = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in GROUPS}


def relevances(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.randn(n, group.size, generator=generator) for group in GROUPS}


@pytest.mark.parametrize("batch", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("pieces", [1, 2, 5, 13])
def test_accumulator(batch: int | None, pieces: int) -> None:
    v = relevances(13)
    accumulator = Accumulator(ZEROS, batch)
    for start in range(0, 13, pieces):
        some = {name: rows[start : start + pieces].double() for name, rows in v.items()}
        accumulator.add(len(some["conv"]), lambda part, some=some: [{name: v[part].sum(0) for name, v in some.items()}])
    for name, total in accumulator.finish().items():
        expected = v[name].double().sum(0)
        if batch:
            expected = sum(len(part) * part.mean(0) ** 2 for part in v[name].double().split(batch))
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)


def test_sums_do_not_lose_small_samples() -> None:
    """float64 sums: ten thousand squares of 1e-4 beside one of 1e8."""
    accumulator = Accumulator({"conv": ZEROS["conv"]}, None)
    accumulator.add(1, lambda _: [{"conv": torch.full((3,), 1e8)}])
    for _ in range(100):
        accumulator.add(100, lambda _: [{"conv": torch.full((3,), 1e-2)}])
    torch.testing.assert_close(accumulator.finish()["conv"] - 1e8, torch.ones(3).double(), rtol=1e-5, atol=0)
