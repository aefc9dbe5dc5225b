"""The guides run: every block of Python of a page in order, in one namespace, and every `jbrprune` command."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jbrprune import PruneResult, Report, cli
from jbrprune.budgets import budget

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (
    "choose-a-ratio",
    "detection-and-segmentation",
    "directions",
    "encoders",
    "faster",
    "interrupted",
    "own-criterion",
    "own-model",
    "prune-resnet50",
    "prune-vit",
    "share",
    "single-weights",
)
SMALLER = {"resnet50": "test_resnet", "resnet10t": "test_resnet", "vit_small_patch16_224": "test_vit"}
"""What runs in the place of a model that a page speaks of."""


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and code of every block."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        yield text[: found.start()].count("\n") + 2, found[1], found[2]


def smaller(code: str) -> str:
    """With small models; names of files keep theirs."""
    for large, small in SMALLER.items():
        code = re.sub(rf"(?<![\w-]){large}(?![\w-])", small, code)
    return code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with some photographs, as the pages assume."""
    (tmp_path / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "STEP", 0.25)  # fewer steps than a user's
    return tmp_path


LONG = ("detection-and-segmentation", "interrupted", "prune-resnet50", "prune-vit", "single-weights")
"""Pages that take more than a few seconds."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in PAGES])
@pytest.mark.filterwarnings("ignore")
def test_a_guide_runs(name: str, folder: Path) -> None:
    """And what it makes is what it says: budgets are met, files are there and load."""
    page = DOCS / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, language, code in blocks(text):
        if language == "python":
            exec(compile("\n" * (line - 1) + smaller(code), str(page), "exec"), namespace)
        elif language == "bash":
            for command in code.splitlines():
                run(smaller(command))
    results = [value for value in namespace.values() if isinstance(value, PruneResult)]
    assert results
    for result in results:
        assert_met(result.report)
    said = "".join(code for _, language, code in blocks(text) if language != "text")
    for single, option in re.findall(r'\.save\("(.+?)"|--out (\S+)', said):
        path = folder / (single or option)
        if path.suffix in (".pt2", ".onnx"):
            assert path.is_file()
        else:
            assert_saved(path)
    for single, option in re.findall(r'\.to_html\("(.+?)"|--report (\S+)', said):
        assert "<h2>Widths</h2>" in (folder / (single or option)).read_text(encoding="utf-8")


def assert_met(report: Report) -> None:
    """A counted budget is met; a timed one has made the model smaller."""
    ((kind, share),) = report.budget.items()
    if kind == "macs":
        assert report.kept <= share
        assert report.pruned.macs < report.dense.macs or share == 1
    elif kind == "sparsity":
        assert report.sparsity == pytest.approx(share, abs=1e-4)
    else:
        assert kind == "latency"
        assert report.pruned.macs < report.dense.macs


def assert_saved(directory: Path) -> None:
    """The weights take less than the dense model's, and the description says what was asked for."""
    said = json.loads((directory / "jbrprune.json").read_text(encoding="utf-8"))["report"]
    assert (directory / "model.safetensors").stat().st_size < said["dense"]["bytes"]
    assert said["budget"]


def run(command: str) -> None:
    name, *arguments = shlex.split(command)
    assert name == "jbrprune"
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, f"{command}: {result.output}\n{result.exception!r}"
    assert result.output.strip(), command


def test_every_guide_is_listed_and_links_lead_somewhere() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or os.path.exists(DOCS / target), f"{page.name}: {target}"


def test_languages_are_known() -> None:
    """A block in a language that nobody runs would never be checked."""
    for name in (*PAGES, "many-gpus"):
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert {language for _, language, _ in blocks(text)} <= {"python", "bash", "text"}, name
