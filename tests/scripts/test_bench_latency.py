"""scripts/bench_latency.py: what was measured elsewhere is neither mixed in nor taken for done."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import bench_latency
import common
import pytest
import torch
from torch import nn

SETTING = "macs=0.5, round_to=1"


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
    options = {"models": ["net"], "settings": [SETTING], "modes": ["eager"], "batch_sizes": [1], "seconds": 1.0}
    found = list(bench_latency.run(Namespace(**options, threads=1, device="cpu", out=out)))
    assert len(found) == left
