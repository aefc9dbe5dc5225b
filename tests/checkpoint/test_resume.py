"""Runs that were interrupted go on behind the last finished step, to the same weights and numbers."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from jbrprune import PruneResult, Scores, prune, score, sparsify, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint.resume import check_directory, fingerprint_run, hash_tensors, open_log
from jbrprune.criteria.relevance import Relevance
from jbrprune.data.batches import Batch
from jbrprune.errors import CheckpointError
from jbrprune.pruning import loop

IMAGES = cases.images(40, 16).float()
QUICK: dict[str, Any] = {"progress": False}


class Own(nn.Module):
    """A residual block with batch norms, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24)
        self.a, self.bn1 = nn.Conv2d(24, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 24, 1)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.b(F.relu(self.bn1(self.a(x))))
        return self.fc(F.relu(x).mean((2, 3)))


def own() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(Own()).float()


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """The directory of a run to 0.7 in two steps, a copy for each test."""
    return shutil.copytree(_finished, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prune(own(), IMAGES, macs=0.7, steps=2, **QUICK, resume=(directory := tmp_path_factory.mktemp("finished") / "run"))
    return directory


class _Killed(BaseException):
    """Nothing catches it."""


KINDS: dict[str, Any] = {
    "channels": (prune, {"macs": 0.6, "steps": 4, "floors": Floors(channels=2)}),
    "random signs": (prune, {"macs": 0.6, "steps": 4, "floors": Floors(channels=2), "criterion": "jbr_projection"}),
    "latency": (prune, {"latency": 0.85, "floors": Floors(channels=2)}),
    "weights": (sparsify, {"sparsity": 0.8, "steps": 4}),
    "pattern": (sparsify, {"pattern": "1:4", "steps": 3}),
    "masks": (sparsify, {"sparsity": 0.8, "steps": 4, "permanent": False}),
}


@functools.cache
def undisturbed(kind: str) -> PruneResult:
    call, options = KINDS[kind]
    return call(own(), IMAGES, **options, **QUICK)


def interrupted(after: int, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Die in the middle of the step behind ``after`` finished ones."""
    real, calls = loop.repair_and_evaluate, 0

    def step(*arguments: Any) -> object:
        nonlocal calls
        calls += 1
        found = real(*arguments)
        if calls > after:
            raise _Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop, "repair_and_evaluate", step)
        with pytest.raises(_Killed):
            call()


def assert_same(one: PruneResult, other: PruneResult) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert list(first) == list(second)
    assert hash_tensors(first) == hash_tensors(second)
    for kept in ("layers", "unrepaired", "repaired", "budget", "settings", "notes"):
        assert getattr(one.report, kept) == getattr(other.report, kept), kept
    rows = [[replace(row, seconds=0.0) for row in result.report.steps] for result in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, options = KINDS[kind]
    whole = undisturbed(kind)
    interrupted(after, lambda: call(own(), IMAGES, **options, **QUICK, resume=tmp_path / "run"), monkeypatch)
    assert sum(name.startswith("step") for name in os.listdir(tmp_path / "run")) == after
    steps = counted(monkeypatch)
    resumed = call(own(), IMAGES, **options, **QUICK, resume=tmp_path / "run")
    assert_same(resumed, whole)
    assert steps == list(range(after + 1, len(whole.report.steps) + 1))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are really made from now on."""
    made: list[int] = []
    real = loop.repair_and_evaluate

    def step(structure: loop.Structure, *arguments: Any) -> object:
        made.append(len(structure.steps) + 1)
        return real(structure, *arguments)

    monkeypatch.setattr(loop, "repair_and_evaluate", step)
    return made


@pytest.mark.parametrize(("budget", "shares"), [("macs", [0.85, 0.7, 0.6]), ("sparsity", [0.5, 0.7, 0.9])])
def test_sweeps_hand_over_every_model_again(
    budget: str, shares: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"budget": budget, "steps": 2, **QUICK} | ({"floors": Floors(channels=2)} if budget == "macs" else {})
    whole = sweep(own(), IMAGES, shares, **options)
    for after in (1, 3, 5):
        run = tmp_path / str(after)
        interrupted(after, lambda: sweep(own(), IMAGES, shares, **options, resume=run), monkeypatch)  # noqa: B023
        for again, result in zip(sweep(own(), IMAGES, shares, **options, resume=run), whole, strict=True):
            assert_same(again, result)
        kept = sorted(name for name in os.listdir(run) if name.startswith("model"))
        assert kept == [f"model-{number:04}.safetensors" for number in (2, 4, 6)]


def test_a_finished_run_is_handed_over_without_another_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prune(own(), IMAGES, macs=0.7, steps=2, **QUICK, resume=tmp_path)
    steps = counted(monkeypatch)
    assert_same(prune(own(), IMAGES, macs=0.7, steps=2, **QUICK, resume=tmp_path), first)
    assert not steps
    assert sorted(os.listdir(tmp_path)) == [
        "model-0002.safetensors",
        "step-0001.safetensors",
        "step-0002.safetensors",
    ]


def _other_weights() -> nn.Module:
    model = own()
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] += 1e-3
    return model


OTHERS: dict[str, tuple[Any, str]] = {
    "model": ({"model": _other_weights()}, r"the model \(SHA-256 of its tensors\) was"),
    "images": ({"data": IMAGES.flip(0)}, r"the images \(SHA-256, with labels and reference\) was"),
    "seed": ({"seed": 1}, r"seed was 0 there and is 1 now"),
    "objective": ({"criterion": "jbr_margin"}, r"criterion was 'jbr' there and is 'jbr_margin' now"),
    "budget": ({"macs": 0.69}, r"macs was 0\.7 there and is 0\.69 now"),
    "steps": ({"steps": 3}, r"steps was 2 there and is 3 now"),
    "repair": ({"repair": None}, r"repair was 'auto' there and is None now"),
    "criterion": ({"criterion": "scores", "steps": 1}, r"(criterion|steps) was"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_runs_are_refused_with_words(case: str, finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    changed, message = OTHERS[case]
    options = {"model": own(), "data": IMAGES, "macs": 0.7, "steps": 2, **QUICK, **changed}
    if options.get("criterion") == "scores":
        options["criterion"] = score(own(), IMAGES, progress=False)
    with pytest.raises(CheckpointError, match=message):
        prune(**options, resume=finished)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@dataclass(frozen=True)
class _Scaled:
    """Relevance times a number, which changes nothing but is another criterion."""

    by: float

    def __call__(self, model: nn.Module, batches: Any, groups: Any) -> Scores:
        return _scaled(self.by, model, batches, groups)


def _scaled(by: float, model: nn.Module, batches: Any, groups: Any) -> Scores:
    found = Relevance()(model, batches, groups)
    return replace(found, sums={name: by * values for name, values in found.sums.items()})


def _once_scaled(*args: Any) -> Scores:
    return _scaled(1.0, *args)


def _other_scaled(*args: Any) -> Scores:
    return _scaled(2.0, *args)


CRITERIA: dict[str, list[Callable[..., Scores]]] = {
    "arguments": [functools.partial(_scaled, 1.0), functools.partial(_scaled, 2.0)],
    "attributes": [_Scaled(1.0), _Scaled(2.0)],
    "names": [_once_scaled, _other_scaled],
}


@pytest.mark.parametrize("kind", CRITERIA)
def test_other_criteria_are_refused(kind: str, tmp_path: Path) -> None:
    first, second = CRITERIA[kind]
    options: dict[str, Any] = {"macs": 0.7, "steps": 2, **QUICK, "resume": tmp_path}
    whole = prune(own(), IMAGES, criterion=first, **options)
    assert_same(prune(own(), IMAGES, criterion=first, **options), whole)
    with pytest.raises(CheckpointError, match=r"criterion was"):
        prune(own(), IMAGES, criterion=second, **options)


def test_the_code_of_a_function_is_not_compared_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = own(), [Batch(IMAGES)]
    assert fingerprint_run({"seed": 1, "criterion": _Scaled(1.0)}, model, batches)["seed"] == 1
    assert not caplog.records
    found = fingerprint_run({"criterion": functools.partial(_scaled, 1.0)}, model, batches)
    assert found["criterion"] == ["_scaled", [1.0], {}]
    assert "resume= compares criterion=_scaled by its name alone" in caplog.text


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import test_resume; print(test_resume._fingerprint())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == _fingerprint()


def _fingerprint() -> str:
    options = {"criterion": _Scaled(2.0), "other": functools.partial(_scaled, 1.0), "path": Path("a"), "steps": None}
    return json.dumps(fingerprint_run(options, own(), [Batch(IMAGES, torch.arange(len(IMAGES)))]))


def test_masks_of_the_given_model_count(tmp_path: Path) -> None:
    model = own()
    torch_prune.random_unstructured(model.get_submodule("a"), "weight", 0.2)
    sparsify(model, IMAGES, sparsity=0.6, **QUICK, resume=tmp_path)
    with pytest.raises(CheckpointError, match=r"the model \(SHA-256 of its tensors\) was"):
        sparsify(own(), IMAGES, sparsity=0.6, **QUICK, resume=tmp_path)


def test_other_versions_are_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jbrprune.checkpoint.resume.version", lambda package: "0")
    with pytest.raises(CheckpointError, match=r"the version of jbrprune was '\d+\.\d.*' there and is '0' now"):
        prune(own(), IMAGES, macs=0.7, steps=2, **QUICK, resume=finished)


def _flip(path: Path) -> None:
    """One bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


def _renamed(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({f"{name}x": tensor for name, tensor in tensors.items()}, path, metadata)


def _other_kind(path: Path) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["jbrprune"])
    save_file(load_file(path), path, {"jbrprune": json.dumps(header | {"kind": "units"})})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "renamed": _renamed,
    "another kind": _other_kind,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: torch.save({"x": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("file", ["step-0001", "step-0002", "model-0002"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage: str, file: str, finished: Path) -> None:
    DAMAGES[damage](finished / f"{file}.safetensors")
    with pytest.raises(CheckpointError, match=f"{file}.*(damaged|expected a)"):
        prune(own(), IMAGES, macs=0.7, steps=2, **QUICK, resume=finished)


def test_the_log_alone(tmp_path: Path) -> None:
    """What every step wrote is read again; the tensors of the last step, and of those that are kept."""
    units = {"a": torch.tensor([1, 2])}
    log = open_log(tmp_path, {"seed": 1})
    assert log.finished == 0
    for number in (1, 2, 3):
        log.write(number, {"n": number}, units, {"w": number * torch.ones(2)}, keep=number == 1)
    log = open_log(tmp_path, {"seed": 1})
    read = [log.read(number) for number in range(1, 1 + log.finished)]
    assert [facts["n"] for facts, _, _ in read] == [1, 2, 3]
    assert all(torch.equal(found["a"], units["a"]) for _, found, _ in read)
    assert [None if found is None else found["w"].tolist() for _, _, found in read] == [[1, 1], None, [3, 3]]
    with pytest.raises(CheckpointError, match="seed was 1 there and is 2 now"):
        open_log(tmp_path, {"seed": 2})


def test_what_a_dead_process_was_writing_is_passed_over(tmp_path: Path) -> None:
    """Under a temporary name of ours, or of safetensors."""
    for name in (".step-0001.safetensors.0123.part", ".tmpgcohX4"):
        (tmp_path / name).write_bytes(b"half")
    assert check_directory(tmp_path) == tmp_path


def test_directories_are_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be used as a directory"):
        prune(own(), IMAGES, macs=0.7, **QUICK, resume=tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"holds other files, such as 'file'. Choose a directory for this run"):
        prune(own(), IMAGES, macs=0.7, **QUICK, resume=tmp_path)


def test_a_full_disk_ends_the_run_and_leaves_the_finished_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"macs": 0.6, "steps": 4, "floors": Floors(channels=2), **QUICK}
    real, written = save_file, []

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append(path)
        if len(written) == 5:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("jbrprune.data.files.save_file", full)
        with pytest.raises(CheckpointError, match=r"model-0003.*could not be written.*No space left on device"):
            prune(own(), IMAGES, **options, resume=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model-0002.safetensors", "step-0001.safetensors", "step-0002.safetensors"]
    assert_same(prune(own(), IMAGES, **options, resume=tmp_path), prune(own(), IMAGES, **options))
