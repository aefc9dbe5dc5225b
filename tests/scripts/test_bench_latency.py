"""scripts/bench_latency.py: what was measured elsewhere is neither mixed in nor taken for done."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path

import bench_latency
import common
import pytest
import torch
from torch import nn

SETTING = "macs=0.5, round_to=1"
OPTIONS = {
    **{"models": ["net"], "settings": [SETTING], "modes": ["eager"], "batch_sizes": [1], "seconds": 1.0},
    **{"threads": 1, "device": "cpu"},
}


def row(threads: int, speedup: float) -> dict:
    facts = {"model": "net", "setting": SETTING, "mode": "eager", "batch": 1, "round_to": 1, "macs": 0.5, "spread": 0.0}
    return {**bench_latency.describe_place(torch.device("cpu"), threads), **facts, "speedup": speedup}


def test_every_number_of_threads_has_a_table_of_its_own() -> None:
    one, two = bench_latency.table([row(1, 1.5), row(2, 2.5)]).split("threads: 2")
    assert "| 1.50 ± 0.00 |" in one
    assert "2.50" not in one
    assert "| 2.50 ± 0.00 |" in two


@pytest.mark.parametrize(("threads", "left"), [(1, 0), (2, 1)])
def test_only_what_was_measured_here_is_done(
    threads: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lines.jsonl"
    common.append(out, [row(threads, 1.5)])
    monkeypatch.setattr(bench_latency.timm, "create_model", lambda name: nn.Conv2d(3, 4, 1))
    monkeypatch.setattr(bench_latency, "prune_once", lambda dense, *_: (dense, {}))
    monkeypatch.setattr(bench_latency, "measure", lambda *_: {})
    found = list(bench_latency.run(Namespace(**OPTIONS, half=False, out=out)))
    assert len(found) == left


def test_half_precision_is_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(bench_latency.timm, "create_model", lambda name: nn.Conv2d(3, 4, 1))
    monkeypatch.setattr(bench_latency, "prune_once", lambda dense, *_: (copy.deepcopy(dense), {}))
    monkeypatch.setattr(bench_latency, "measure", lambda *given: seen.append(given) or {})
    (found,) = bench_latency.run(Namespace(**OPTIONS, half=True, out=tmp_path / "out"))
    dense, model, images, *_ = seen[0]
    assert found["hardware"].endswith(", float16, channels last")
    for tensor in (dense.weight, model.weight, images):
        assert tensor.dtype == torch.float16
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_what_fails_is_said_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    few = ["--models", "test_vit", "--modes", "eager", "--batch-sizes", "1", "--out", str(out)]
    for _ in range(2):
        bench_latency.main([*few, "--settings", "2:4"])  # no such kernels here
    assert [line["failed"][:10] for line in common.lines(out)] == ["ModelError"] * 2
    bench_latency.main([*few, "--settings", "directions, macs=0.5"])
    capsys.readouterr()
    bench_latency.main([*few, "--table"])
    text = capsys.readouterr().out
    assert "| test_vit | directions, macs=0.5 | 1 | 0.5 |" in text
    assert "test_vit, 2:4: ModelError: The model is on cpu" in text
