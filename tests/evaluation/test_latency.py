"""Timing in turns. No real time is asserted: `time_pass` is replaced, and so are the clocks under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jbrprune.errors import ArgumentError
from jbrprune.evaluation import latency
from jbrprune.evaluation.latency import Timings, time_in_turns, time_pass

CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 3, 8, 8)


class Timer:
    """Says what each model took, call by call, and notes the order and the passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *times: Sequence[float]) -> None:
        self.models = [nn.Identity() for _ in times]
        self.left = [iter(row) for row in times]
        self.calls: list[tuple[int, int]] = []
        monkeypatch.setattr(latency, "time_pass", self)

    def __call__(self, model: nn.Module, images: torch.Tensor, passes: int = 1) -> float:
        number = next(i for i, own in enumerate(self.models) if own is model)
        self.calls.append((number, passes))
        return next(self.left[number])

    def run(self, **options: Any) -> Timings:
        return time_in_turns(self.models, IMAGES, **options)


def test_models_take_turns_and_every_other_round_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, *[[1.0] * 5] * 3)
    timer.run()
    assert [number for number, _ in timer.calls] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]


def test_medians_and_quartiles_are_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes to warm up, which do not count; the mean of what counts is not the median."""
    slow, fast = [1.0, 1.0, 4.0, 2.0, 24.0, 6.0, 3.0], [9.0, 1.0, 2.0, 1.0, 3.0, 6.0, 2.4]
    found = Timer(monkeypatch, slow, fast).run(seconds=10)
    for own, row in zip(found.latencies, np.array([slow, fast])[:, 2:]):
        low, middle, high = np.quantile(row, [0.25, 0.5, 0.75])
        assert (own.median_ms, own.iqr_ms) == pytest.approx((1e3 * middle, 1e3 * (high - low)))
        assert (own.runs, own.batch, own.threads, own.device) == (5, 2, 1, "cpu")
    assert found.latencies[0].median_ms == 4000


def test_a_ratio_is_of_times_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = [1.0, 1.0, 4.0, 2.0, 24.0, 6.0, 3.0], [9.0, 1.0, 2.0, 1.0, 3.0, 6.0, 2.4]
    found = Timer(monkeypatch, slow, fast).run(seconds=10)
    ratios = np.array(fast[2:]) / np.array(slow[2:])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    assert found.ratios == pytest.approx((1, middle))
    assert found.spreads == pytest.approx((0, (high - low) / 2))
    assert middle not in (ratios.mean(), np.median(fast[2:]) / np.median(slow[2:]))


@pytest.mark.parametrize(
    ("seconds", "pass_seconds", "passes", "rounds"),
    [(5.0, 1e-3, 20, 15), (5.0, 5e-3, 4, 15), (5.0, 0.5, 1, 5), (5.0, 3.0, 1, 3), (0.1, 1e-3, 20, 3), (60, 1, 1, 15)],
)
def test_time_is_bounded(
    seconds: float, pass_seconds: float, passes: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of about 20 ms; as many rounds as fit, at least three and at most fifteen."""
    timer = Timer(monkeypatch, [pass_seconds] * 17, [pass_seconds] * 17)
    assert [own.runs for own in timer.run(seconds=seconds).latencies] == [passes * rounds] * 2
    assert timer.calls[4:] == [(number, passes) for turn in range(rounds) for number in ((0, 1), (1, 0))[turn % 2]]


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"seconds": float("nan")}, {"threads": 0}])
def test_no_time_and_no_thread_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="seconds must be positive and threads at least 1"):
        time_in_turns([nn.Identity()], IMAGES, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_models_and_threads_are_left_as_they_were(
    fails: bool, monkeypatch: pytest.MonkeyPatch, fingerprint: Callable[[nn.Module], dict[str, Any]]
) -> None:
    seen = set()

    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
            if fails and len(x) == 2:
                raise KeyboardInterrupt
            return x

    monkeypatch.setattr(latency, "time_pass", lambda model, images, passes=1: bool(model(images).sum()) + 1.0)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), Seen()).train() for _ in range(2)]
    before = [fingerprint(model) for model in models]
    torch.set_num_threads(2)
    try:
        time_in_turns(models, IMAGES, threads=1)
    except KeyboardInterrupt:
        assert fails
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert [fingerprint(model) for model in models] == before
    assert seen == {(False, False, 1)}


@pytest.mark.parametrize(("threads", "clock"), [(1, "thread_time"), (2, "perf_counter")])
def test_seconds_are_per_pass_and_one_thread_has_its_own_clock(
    threads: int, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks, passed = iter([10.0, 16.0]), []
    monkeypatch.setattr(latency.time, clock, lambda: next(ticks))
    monkeypatch.setattr(latency.platform, "system", lambda: "Linux")
    model = nn.Identity()
    model.register_forward_hook(lambda *_: passed.append(None))
    torch.set_num_threads(threads)
    assert time_pass(model, IMAGES, 4) == 1.5
    assert len(passed) == 4


def test_the_clock_of_a_thread_is_not_used_where_it_ticks_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.platform, "system", lambda: "Linux")
    assert (latency.clock_of(CPU), latency.clock_of(torch.device("cuda"))) == ("thread", "wall")
    monkeypatch.setattr(latency.platform, "system", lambda: "Windows")
    assert latency.clock_of(CPU) == "wall"
