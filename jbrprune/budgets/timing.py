"""Wall time on a machine that does other things as well: what is compared takes turns.

All timing is by ``torch.utils.benchmark``, which waits for CUDA and sets the number of threads. With one thread on the
CPU the clock is that of the thread: what other programs do meanwhile does not count, and on an idle machine it is wall
time. Otherwise, and where the clock of a thread is a coarse one, it is wall time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from types import ModuleType

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError
from jbrprune.evaluation.latency import Latency
from jbrprune.models import preserve

BLOCK_SECONDS = 0.02
"""Passes are timed in blocks of at least this long, so that the clock's own cost does not count."""
COARSEST = 1e-6
"""A clock with longer ticks (in seconds) cannot say how often a short call has to be repeated."""


@dataclass(frozen=True)
class Ratio:
    """How long one thing takes, relative to another.

    Attributes:
        median: Median over rounds of the ratio of the two times in the same round.
        spread: Half the interquartile range of these ratios.
        rounds: Number of rounds.
    """

    median: float
    spread: float
    rounds: int


@dataclass(frozen=True)
class Laps:
    """What was timed of one call.

    Attributes:
        seconds: Seconds per pass in each round.
        passes: Passes in each round.
    """

    seconds: tuple[float, ...]
    passes: int


def race(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    block_seconds: float = BLOCK_SECONDS,
) -> list[Laps]:
    """Time several calls in turns, so that a busy moment of the machine meets all of them.

    In every round each of them is timed over one block, after some passes to warm up; every other round goes backwards.

    Args:
        calls: What to time.
        device: Where they work.
        rounds: Number of rounds.
        block_seconds: Calls are repeated until a block takes about this long.

    Raises:
        ArgumentError: No rounds.
    """
    if rounds < 1:
        raise ArgumentError(f"rounds must be at least 1, got {rounds}.")
    clock = {"timer": time.thread_time} if clock_of(device) == "thread" else {}
    timer_of = functools.partial(benchmark().Timer, "call()", num_threads=torch.get_num_threads(), **clock)
    timers = [timer_of(globals={"call": call}) for call in calls]
    numbers = [max(1, round(block_seconds / timer.timeit(1).mean)) for timer in timers]
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for number in order:
            seconds[number].append(timers[number].timeit(numbers[number]).mean)
    return [Laps(tuple(row), number) for row, number in zip(seconds, numbers)]


def clock_of(device: torch.device) -> str:
    """``thread`` or ``wall``: which clock `race` uses."""
    own = torch.get_num_threads() == 1 and device.type == "cpu"
    return "thread" if own and _tick() <= COARSEST else "wall"


def _tick() -> float:
    """The least step of the thread's clock that was seen; measured, as Windows reports less than is true."""
    seen = [time.thread_time() for _ in range(1000)]
    return min((later - now for now, later in itertools.pairwise(seen) if later > now), default=math.inf)


def ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """The seconds of one call relative to those of another, round by round.

    Example:
        >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 4.0])
        Ratio(median=0.5, spread=0.0625, rounds=3)
    """
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return Ratio(median(ratios), _half_range(ratios), len(ratios))


def relative_latency(model: nn.Module, dense: nn.Module, images: Tensor, *, rounds: int = 9) -> Ratio:
    """Time of a forward pass of a model relative to that of the dense one, in eval mode, without gradients.

    Args:
        model: The model; left as it was, like the dense one.
        dense: The dense model.
        images: ``[B, C, H, W]`` as both take them.
        rounds: See `race`.
    """
    one, other = _laps((model, dense), images, rounds)
    return ratio(one.seconds, other.seconds)


def latencies(models: Sequence[nn.Module], images: Tensor, *, rounds: int = 15) -> list[Latency]:
    """Time the forward passes of several models on the same images, in turns, in eval mode, without gradients.

    Args:
        models: The models, on one device; left as they were.
        images: ``[B, C, H, W]`` as all of them take them.
        rounds: See `race`.
    """
    device = preserve.device_of(models[0])
    return [
        Latency(
            median_ms=1e3 * median(laps.seconds),
            iqr_ms=2e3 * _half_range(laps.seconds),
            runs=laps.passes * len(laps.seconds),
            batch=len(images),
            threads=torch.get_num_threads(),
            device=str(device),
            clock=clock_of(device),
        )
        for laps in _laps(models, images, rounds)
    ]


def _laps(models: Sequence[nn.Module], images: Tensor, rounds: int) -> list[Laps]:
    images = images.to(preserve.device_of(models[0]))
    with contextlib.ExitStack() as visits:
        for model in models:
            visits.enter_context(preserve.inference_state(model))
        return race([functools.partial(model, images) for model in models], images.device, rounds=rounds)


def _half_range(values: Sequence[float]) -> float:
    """Half the interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def benchmark() -> ModuleType:
    """``torch.utils.benchmark``: it looks for compilers when it is imported, and would warn that it found none."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("torch.utils.benchmark")
    finally:
        logger.setLevel(level)
