"""scripts/export.py: what it writes is verified, and what cannot be written is refused before anything is traced."""

from __future__ import annotations

import json
from pathlib import Path

import export
import pytest
import torch

import jbrprune


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "pruned"
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = jbrprune.create("test_resnet", pretrained=False, num_classes=4)
    jbrprune.prune(model, images, macs=0.8, steps=1, repair=None, progress=False).save(path)
    return path


def test_a_program_gives_the_outputs_of_the_model(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.main([str(pruned), "--program", str(tmp_path / "net.pt2"), "--size", "3", "32", "32"])
    said = json.loads(capsys.readouterr().out)
    assert said["largest_difference"] < 1e-4
    images = torch.randn(5, 3, 32, 32)
    found = torch.export.load(tmp_path / "net.pt2").module()(images)
    torch.testing.assert_close(found, jbrprune.load(pruned)(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to write"),
        (["--onnx", "{}/net", "--program", "{}/net"], "net: give each format a file of its own"),
        (["--onnx", "{}/net", "--program", "{}/../{name}/net"], "give each format a file of its own"),
        (["--program", "{}/nowhere/net.pt2"], "nowhere/net.pt2 cannot be written: expected a file in a directory"),
        (["--onnx", "{}"], "cannot be written: expected a file"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load", lambda path: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=message):
        export.main(["pruned", *(text.format(tmp_path, name=tmp_path.name) for text in arguments)])
    assert list(tmp_path.iterdir()) == []
