"""A few mutated checkpoints of every kind; that the judge can find fault as well."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import fuzz_checkpoints as fuzz

from jbrprune.errors import CheckpointError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fuzz.make_bases(tmp_path_factory.mktemp("bases"))


def test_mutated_checkpoints_are_refused_or_load_right(
    bases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "make_bases", lambda folder: bases)
    found = fuzz.run(2 * len(fuzz.ALL), 10_000, tmp_path)
    assert [(trial, outcome) for trial, outcome in found if outcome.why] == []
    by_kind = {kind: [o.what for t, o in found if t.kind == kind] for kind in fuzz.ALL}
    assert {kind: len(outcomes) for kind, outcomes in by_kind.items()} == dict.fromkeys(fuzz.ALL, 2)
    assert by_kind["nothing"] == ["right"] * 2
    assert {*by_kind["flip"], *by_kind["truncate"], *by_kind["huge_shapes"]} == {"refused"}


class Last(random.Random):
    """Chooses the last possibility."""

    def randrange(self, count: int) -> int:  # type: ignore[override]
        return count - 1


def test_tensors_that_hold_nothing_can_be_mutated(bases: list[Path], tmp_path: Path) -> None:
    """All of their weights are masked, or zero."""
    case = fuzz.Case(bases[2], Last())
    empty = [name for name, tensor in case.tensors().items() if not tensor.numel()]
    case.some = lambda items: empty[0]
    fuzz.tensors(case)
    case.write(tmp_path)
    assert fuzz.find_difference(fuzz.load(tmp_path), tmp_path) == ""


def enlarged(base: Path, directory: Path, arguments: dict[str, int]) -> Path:
    """A copy with other arguments in its recipe."""
    case = fuzz.Case(base, random.Random(0))
    case.body["recipe"]["arguments"].update(arguments)
    case.sum_anew()
    directory.mkdir()
    case.write(directory)
    return directory


def test_a_deep_recipe_is_refused_before_it_is_made(bases: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has far more modules than what is stored"):
        fuzz.load(enlarged(bases[0], tmp_path / "m", {"depth": 10**5}))


@pytest.mark.parametrize(
    ("base", "arguments"),
    [(3, {"window_size": 64, "img_size": 256}), (0, {"embed_dim": 2**20}), (0, {"num_classes": 2**20})],
    ids=["a table of all pairs of positions", "a wide model", "many classes"],
)
def test_a_large_recipe_takes_no_memory(
    base: int, arguments: dict[str, int], bases: list[Path], tmp_path: Path
) -> None:
    """The dense model would take up to 26 TB; the child process has 1 GB."""
    directory = enlarged(bases[base], tmp_path / "base", arguments)
    assert fuzz.try_guarded(directory, tmp_path, [fuzz.Trial(0, "nothing", 0)])[0].why == ""


def test_the_judge_finds_fault(bases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, real = fuzz.Trial(0, "nothing", 0), fuzz.load

    def outcome(load: object) -> fuzz.Outcome:
        monkeypatch.setattr(fuzz, "load", load)
        return fuzz.try_guarded(bases[0], tmp_path, [trial])[0]

    def changed(directory: Path) -> nn.Module:
        model = real(directory)
        with torch.no_grad():
            model.norm.bias[0] += 1
        return model

    def writing(directory: Path) -> None:
        (tmp_path.parent / "outside").write_text("")

    def fails(error: BaseException) -> object:
        def load(directory: Path) -> None:
            raise error

        return load

    assert outcome(real).what == "right"
    assert (outcome(changed).what, outcome(changed).why) == ("wrong", "norm.bias has other values than in the file")
    assert "ZeroDivisionError: zero" in outcome(fails(ZeroDivisionError("zero"))).why
    assert outcome(fails(CheckpointError("no"))).why == "says only no"
    greedy = CheckpointError("could not be created")
    greedy.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert outcome(fails(greedy)).why == "asked for too much memory: could not be created"
    assert outcome(writing).why.endswith("opened a file for writing")
    assert outcome(lambda directory: fuzz.os._exit(3)).why == "the process ended with code 3"
    assert outcome(lambda directory: nn.Module()).what == "wrong"
    monkeypatch.setattr(fuzz, "mutate", fails(KeyError("mine")))
    assert outcome(real).what == "unaccounted"
