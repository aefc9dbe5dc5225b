"""The README's code runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner

import jbrprune
from jbrprune import cli
from jbrprune.budgets import budget
from jbrprune.models import timm_models

README = Path(__file__).parents[1] / "README.md"


def snippet(word: str) -> str:
    """The one Python block that holds a word."""
    found = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if word in block]
    assert len(found) == 1, word
    return found[0]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(*layers)


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.named_buffers() if name.endswith("_mask")]


def test_the_change_of_an_existing_call() -> None:
    """Half of the weights go, and not those that the call went for before."""
    model, before = net().eval(), net().eval()
    pairs = [(m, "weight") for m in before.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.8)
    names: dict[str, Any] = {"model": model, "images": torch.randn(16, 3, 8, 8)}
    exec(snippet("global_unstructured"), names)
    total = sum(mask.numel() for mask in masks(model))
    assert sum(int(mask.sum()) for mask in masks(model)) == total - round(0.8 * total)
    assert any(not torch.equal(one, other) for one, other in zip(masks(model), masks(before), strict=True))


def test_single_weights_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"jbrprune": jbrprune, "model": net().eval(), "images": torch.randn(40, 3, 8, 8)}
    exec(snippet("sparsity=0.9"), names)
    assert names["result"].report.sparsity == pytest.approx(0.9, abs=0.01)
    assert names["pattern"].report.sparsity == pytest.approx(0.5 * 40 / (40 + 216), abs=1e-9)  # 3 inputs: not the conv


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that the page speaks of, and a small net in the place of ResNet-50."""
    generator = torch.Generator().manual_seed(0)
    for folder in (tmp_path / "path/to/images", tmp_path / "path/to/validation"):
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "STEP", 0.25)  # fewer steps than a user's
    create = timm_models.create

    def create_small(name: str, **arguments: Any) -> nn.Module:
        torch.manual_seed(0)
        small = ("test_resnet", {"pretrained": False, "num_classes": 4})
        name, arguments = small if name == "resnet50" else (name, arguments)
        return create(name, **arguments)

    monkeypatch.setattr(timm_models, "create", create_small)
    monkeypatch.setattr(cli, "create", create_small)


@pytest.mark.usefixtures("photographs")
def test_the_one_call() -> None:
    names: dict[str, Any] = {}
    exec(snippet('result.save("pruned/")'), names)
    report = names["result"].report
    assert report.kept <= 0.5
    assert sum(parameter.numel() for parameter in names["model"].parameters()) == report.pruned.params


@pytest.mark.usefixtures("photographs")
def test_the_same_from_a_shell() -> None:
    commands = re.findall(r"^    jbrprune (.*?)(?: +#.*)?$", README.read_text(), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["info", "predict", "prune", "prune", "eval"]
    for command in commands:
        done = CliRunner().invoke(cli.app, shlex.split(command))
        if "--max-drop" in command:  # takes more than 12 images, and says how many
            assert "cannot be seen on" in str(done.exception)
        else:
            assert done.exit_code == 0, (command, done.output, done.exception)
            assert done.output.strip(), command
