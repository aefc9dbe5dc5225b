"""The scripts can be imported; pictures in folders, and lines of a small benchmark."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import benchmark
import runs


@pytest.fixture(scope="session", autouse=True)
def _trained_once() -> Iterator[None]:
    """Nets that the scripts train here and now; everyone gets a copy."""
    real, made = benchmark.train_digits, {}

    def train(**arguments: Any) -> nn.Module:
        key = json.dumps(arguments, sort_keys=True)
        if key not in made:
            made[key] = real(**arguments)
        return copy.deepcopy(made[key])

    benchmark.train_digits = train
    yield
    benchmark.train_digits = real


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout: train and val, a folder per class; pixels say which class and which part."""
    root = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                grey = 40 + 60 * label + 20 * (part == "val") + number
                Image.new("RGB", (40, 48), (grey, grey, grey)).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of two criteria, two budgets, two seeds."""
    out = tmp_path_factory.mktemp("benchmark") / "lines.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs.run(out, *runs.MEASURED)
    torch.set_num_threads(threads)
    return out
