"""The commands as a user starts them on several ranks: the same numbers as one process, and one rank that speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jbrprune import Scores

pytestmark = pytest.mark.slow

ONE = [sys.executable, "-m", "jbrprune"]
TWO = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "-m", "jbrprune"]
MODEL = ["test_resnet", "--checkpoint", "weights.safetensors", "--model-arg", "num_classes=4"]
DATA = ["--data", "photos", "--batch-size", "4", "--device", "cpu"]

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and 22 pictures in four classes."""
    folder = tmp_path_factory.mktemp("run")
    model = cases.randomised(timm.create_model("test_resnet", num_classes=4)).float()
    save_file(model.state_dict(), folder / "weights.safetensors")
    for number, values in enumerate(cases.images(22, 40)):
        picture = Image.fromarray((values.permute(1, 2, 0) * 60 + 128).clamp(0, 255).byte().numpy())
        (folder / "photos" / str(number % 4)).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "photos" / str(number % 4) / f"{number}.png")
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    """What a command says as JSON."""

    def started(start: list[str], *arguments: str) -> Any:
        done = subprocess.run(
            [*start, *arguments, "--json"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},  # there may be one GPU only
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # one object: the other rank says nothing

    return started


def test_score(run: Run, folder: Path) -> None:
    arguments = ["score", *MODEL, *DATA, "--objective", "projection", "--out"]
    one, two = run(ONE, *arguments, "one.safetensors"), run(TWO, *arguments, "two.safetensors")
    assert one["samples"] == two["samples"] == 22
    expected, found = (Scores.load(folder / f"{name}.safetensors") for name in ("one", "two"))
    for name, value in expected.values().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6 * float(value.max()))


def test_prune_then_eval(run: Run, folder: Path) -> None:
    """Twenty-two images: the two ranks score, repair and evaluate unequal shares."""
    arguments = ["prune", *MODEL, *DATA, "--macs", "0.7", "--steps", "2", "--min-channels", "2", "--out"]
    one, two = run(ONE, *arguments, "one"), run(TWO, *arguments, "two")
    assert two["removed"] == one["removed"]
    assert two["pruned"]["macs"] == one["pruned"]["macs"] <= 0.7 * one["dense"]["macs"]
    assert two["repaired"]["top1"] == one["repaired"]["top1"]
    assert two["repaired"]["kl"] == pytest.approx(one["repaired"]["kl"], rel=1e-3, abs=1e-6)
    expected, found = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)

    arguments = ["eval", "one", "--data", "photos", "--batch-size", "4", "--device", "cpu"]
    one, two = run(ONE, *arguments), run(TWO, *arguments)
    assert one["images"] == two["images"] == 22
    assert two["accuracy"] == one["accuracy"]
    assert two["macs"] == one["macs"]


def test_tpv(run: Run) -> None:
    arguments = ["tpv", *MODEL, *DATA, "--sigma", "1e-4", "--draws", "2", "--measure", "--rtol", "0"]
    one, two = run(ONE, *arguments), run(TWO, *arguments)
    for form in ("trace_form", "empirical"):
        assert two[form]["samples"] == one[form]["samples"] == 22
        assert two[form]["value"] == pytest.approx(one[form]["value"], rel=1e-5)
        assert two[form]["standard_error"] == pytest.approx(one[form]["standard_error"], rel=1e-5)
