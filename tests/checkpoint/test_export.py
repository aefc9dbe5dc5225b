"""Exports are verified, and what cannot be written or is wrong leaves nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from typer.testing import CliRunner

import jbrprune
from jbrprune.cli import app
from jbrprune.errors import ArgumentError, CheckpointError, ModelError

IMAGES = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(1))
"""Neither traced nor verified with so many."""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "pruned"
    model = jbrprune.create("test_resnet", pretrained=False, num_classes=4)
    jbrprune.prune(model, IMAGES, macs=0.8, steps=1, repair=None, progress=False).save(path)
    return path


def call(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_a_program_gives_the_outputs_of_the_model(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    said = call(pruned, "--out", path)
    assert said == {"model": str(pruned), "out": str(path), "bytes": path.stat().st_size}
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.pt2"]
    found = torch.export.load(path).module()(IMAGES)
    torch.testing.assert_close(found, jbrprune.load(pruned)(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_onnx_gives_the_outputs_of_the_model(pruned: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, images = tmp_path / "net.onnx", torch.randn(5, 3, 64, 48)
    jbrprune.export(jbrprune.load(pruned), path, size=(3, 64, 48))
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), jbrprune.load(pruned)(images), rtol=1e-4, atol=1e-4)


class Several(nn.Module):
    """Returns a dictionary and a tensor that does not depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 2, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.drop(self.conv(x))
        return {"maps": [x, x[..., ::2, ::2]], "mean": x.mean((2, 3))}


def test_several_outputs_of_a_model_in_training(tmp_path: Path, fingerprint: Callable[[nn.Module], Any]) -> None:
    model = Several().train()
    before = fingerprint(model)
    jbrprune.export(model, tmp_path / "net.pt2", size=(1, 4, 4))
    assert fingerprint(model) == before
    images = torch.randn(4, 1, 4, 4)
    found = torch.export.load(tmp_path / "net.pt2").module()(images)
    for one, other in zip(
        (*found["maps"], found["mean"]), (lambda out: (*out["maps"], out["mean"]))(model.eval()(images))
    ):
        torch.testing.assert_close(one, other)


class Read:
    """What is read back from a file, as a program."""

    def __init__(self, run: Callable[[Tensor], object]) -> None:
        self.module = lambda: run


NET = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
RUNS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "wrong": (lambda images: NET(images) * 1.001, "Tensor-likes are not close"),
    "misshapen": (lambda images: NET(images[:2]), "shape"),  # as if the batch size were fixed
    "broken": (lambda images: {}["aten.what"], r"KeyError: 'aten\.what'"),  # type: ignore[index]
    "nan": (lambda images: NET(images) * float("nan"), "not close"),
    "fewer outputs": (lambda images: [], "ValueError"),
}


@pytest.mark.parametrize("case", RUNS)
def test_an_export_that_is_wrong_leaves_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, words = RUNS[case]
    monkeypatch.setattr(torch.export, "load", lambda path: Read(run))
    with pytest.raises(
        ModelError, match=rf"(?s)a\.pt2: the model cannot be exported, nothing was written: .*({words})"
    ):
        jbrprune.export(NET, tmp_path / "a.pt2", size=(1, 2, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("share", "right"), [(0.9e-4, True), (1.1e-4, False)])
def test_the_tolerance_is_relative_to_the_largest_output(
    share: float, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(images: Tensor) -> Tensor:
        outputs = NET(images)
        outputs.view(-1)[outputs.abs().argmin()] += share * outputs.abs().max()
        return outputs

    monkeypatch.setattr(torch.export, "load", lambda path: Read(run))
    with contextlib.nullcontext() if right else pytest.raises(ModelError, match="not close"):
        jbrprune.export(NET, tmp_path / "a.pt2", size=(1, 2, 2))
    assert (tmp_path / "a.pt2").exists() == right


def test_what_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    for name, error, words in (
        ("a.pt", ArgumentError, r"must end in \.onnx, or in \.pt2"),
        ("nowhere/a.pt2", CheckpointError, "cannot be written: expected a file in a directory"),
    ):
        with pytest.raises(error, match=words):
            jbrprune.export(net, tmp_path / name, size=(1, 2, 2))
    with pytest.raises(ArgumentError, match=r"Sequential does not say which images it takes: pass size="):
        jbrprune.export(net, tmp_path / "a.pt2")
    torch_prune.l1_unstructured(net[1], "weight", 0.5)
    with pytest.raises(ModelError, match=r"1\.weight .* is masked by"):
        jbrprune.export(net, tmp_path / "a.pt2", size=(1, 2, 2))
    with pytest.raises(CheckpointError, match="cannot be written"):
        call("nothing", "--out", "no/a.pt2")
    assert list(tmp_path.iterdir()) == []
