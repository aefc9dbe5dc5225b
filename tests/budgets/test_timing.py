"""Timing in turns, and the timings that are kept on disk. What time it takes is never asserted."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jbrprune.budgets import timing, timing_cache
from jbrprune.errors import ArgumentError

CPU = torch.device("cpu")
Fingerprint = Callable[[nn.Module], dict[str, Any]]


def test_calls_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    laps = timing.race(calls, CPU, rounds=3, block_seconds=1e-12)
    assert [lap.passes for lap in laps] == [1, 1, 1]
    assert all(len(lap.seconds) == 3 and min(lap.seconds) > 0 for lap in laps)
    turns = "".join(name for name, before in zip(order, ["", *order]) if name != before)
    assert turns == "abc" + "abc" + "ba" + "bc"  # how often to repeat, and three rounds


def test_short_calls_are_repeated() -> None:
    (laps,) = timing.race([lambda: None], CPU, rounds=2, block_seconds=0.02)
    assert laps.passes > 10
    with pytest.raises(ArgumentError, match="rounds must be at least 1, got 0"):
        timing.race([lambda: None], CPU, rounds=0)


def test_one_thread_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "_tick", lambda: 0.0)
    monkeypatch.setattr(timing.time, "thread_time", lambda: float(next(ticks)))
    (laps,) = timing.race([lambda: None], CPU, rounds=4, block_seconds=1e-3)
    assert (laps.seconds, laps.passes) == ((1.0,) * 4, 1)
    torch.set_num_threads(2)
    assert (timing.clock_of(CPU), timing.clock_of(torch.device("cuda"))) == ("wall", "wall")


def test_a_coarse_clock_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a thread on Windows, which ticks 64 times a second: most calls take no time by it."""
    assert timing.clock_of(CPU) == "thread"
    monkeypatch.setattr(timing.time, "thread_time", lambda: time.perf_counter() // (1 / 64) / 64)
    assert timing.clock_of(CPU) == "wall"
    (laps,) = timing.race([lambda: None], CPU, rounds=2, block_seconds=1e-6)
    assert min(laps.seconds) > 0


def test_a_ratio_is_of_the_same_round() -> None:
    one, other = [3.0, 10.0, 2.0, 6.0], [2.0, 5.0, 4.0, 6.0]
    ratios = np.array(one) / np.array(other)
    found = timing.ratio(one, other)
    low, high = np.quantile(ratios, [0.25, 0.75])
    assert found == timing.Ratio(float(np.median(ratios)), pytest.approx((high - low) / 2), 4)
    assert timing.ratio([1.0], [4.0]) == timing.Ratio(0.25, 0.0, 1)


def test_models_are_left_as_they_were(fingerprint: Fingerprint) -> None:
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train() for _ in range(2)]
    images = torch.randn(2, 3, 8, 8)
    before = [fingerprint(model) for model in models]
    slow, fast = timing.latencies(models, images, rounds=2)
    assert timing.relative_latency(*models, images, rounds=2).rounds == 2
    assert [fingerprint(model) for model in models] == before
    assert (slow.batch, slow.threads, slow.device, slow.clock) == (2, 1, "cpu", timing.clock_of(CPU))
    assert fast.median_ms > 0
    assert fast.runs % 2 == 0


# --- on disk -------------------------------------------------------------------------------------


def test_timings_are_kept_and_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JBRPRUNE_CACHE", str(tmp_path / "cache"))
    assert timing_cache.read(CPU) == {}
    timing_cache.add(CPU, {})
    assert not (tmp_path / "cache").exists()
    timing_cache.add(CPU, {"a": 1.0, "b": 2.0})
    timing_cache.add(CPU, {"b": 3.0})
    assert timing_cache.read(CPU) == {"a": 1.0, "b": 3.0}
    torch.set_num_threads(2)
    assert timing_cache.read(CPU) == {}
    torch.set_num_threads(1)
    assert timing_cache.read(CPU) == {"a": 1.0, "b": 3.0}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if before != "highest" else "high")
    try:
        assert timing_cache.read(CPU) == {}
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    assert timing_cache.read(CPU) == {}


def test_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JBRPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache.cache_directory() == tmp_path / "jbrprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert timing_cache.cache_directory() == tmp_path / ".cache" / "jbrprune"


GOOD = {"machine": timing_cache.machine(CPU), "seconds": {"a": 1.0}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        json.dumps({**GOOD, "seconds": {"a": -1.0}}),
        json.dumps({**GOOD, "seconds": {"a": "1"}}),
        json.dumps({**GOOD, "seconds": [1]}),
        json.dumps({**GOOD, "machine": {}}),
        '{"seconds": {"a": NaN}}',
    ],
    ids=range(9),
)
def test_a_file_that_says_something_else_is_not_believed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JBRPRUNE_CACHE", str(tmp_path))
    timing_cache.add(CPU, {"a": 1.0})
    (path,) = tmp_path.rglob("*.json")
    path.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert timing_cache.read(CPU) == {}
    assert "layers are timed again" in caplog.text
    timing_cache.add(CPU, {"b": 2.0})
    assert timing_cache.read(CPU) == {"b": 2.0}


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_directory_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JBRPRUNE_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        timing_cache.add(CPU, {"a": 1.0})
    assert "cannot be written" in caplog.text
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
