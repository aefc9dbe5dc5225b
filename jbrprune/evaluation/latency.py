"""Time of a forward pass, on a machine that does other things as well: models that are compared are timed in turns."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError
from jbrprune.models import preserve

BLOCK_SECONDS = 0.02
"""A model is timed in blocks of passes of about this length, so that the clock's own cost does not count."""
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15
"""Rounds that are timed at least, however slow a pass is, and at most, however much time is left."""
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median_ms: Median over rounds, milliseconds per forward pass.
        iqr_ms: Interquartile range over rounds, milliseconds.
        runs: Number of timed forward passes.
        batch: Images per forward pass.
        threads: CPU threads.
        device: Device of the model.
        clock: ``wall``, or ``thread`` for the time that the one CPU thread was at work.
    """

    median_ms: float
    iqr_ms: float
    runs: int
    batch: int
    threads: int
    device: str
    clock: str = "wall"


@dataclass(frozen=True)
class Timings:
    """Times of several models that were timed in turns, in the order of the models.

    Attributes:
        latencies: Time of each model.
        ratios: Median over rounds of the time relative to the first model's in the same round; that of the first is 1.
        spreads: Half the interquartile range of these ratios.
    """

    latencies: tuple[Latency, ...]
    ratios: tuple[float, ...]
    spreads: tuple[float, ...]


def time_in_turns(models: Sequence[nn.Module], images: Tensor, *, seconds: float = 5.0, threads: int = 1) -> Timings:
    """Time the forward passes of several models in turns, in eval mode, without gradients.

    In every round each model is timed over one block of passes, so that a busy moment of the machine meets all of
    them; every other round goes backwards. A ratio is one of times of the same round.

    Args:
        models: The models, on one device; left as they were.
        images: ``[B, C, H, W]`` as all of them take them.
        seconds: Time that all rounds together take at most, where three rounds of one pass each fit into it.
        threads: CPU threads.

    Raises:
        ArgumentError: No time, or no thread.

    Example:
        >>> wide, narrow = torch.nn.Linear(512, 512), torch.nn.Linear(512, 4)
        >>> time_in_turns([wide, narrow], torch.zeros(8, 512), seconds=0.5).ratios[0]
        1.0
    """
    if not seconds > 0 or threads < 1:
        raise ArgumentError(f"seconds must be positive and threads at least 1, got {seconds} and {threads}.")
    images = images.to(preserve.device_of(models[0]))
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        for model in models:
            stack.enter_context(preserve.inference_state(model))
        for model in models:  # lazy initialisation and the choice of kernels are not part of a forward pass
            time_pass(model, images)
        one = [time_pass(model, images) for model in models]
        passes = [max(1, round(BLOCK_SECONDS / each)) for each in one]
        round_seconds = sum(each * number for each, number in zip(one, passes))
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / round_seconds)))
        times: list[list[float]] = [[] for _ in models]
        for turn in range(rounds):
            order = range(len(models))
            for number in order if turn % 2 == 0 else reversed(order):
                times[number].append(time_pass(models[number], images, passes[number]))
        device, clock = str(images.device), clock_of(images.device)
    ratios = [[own / first for own, first in zip(row, times[0])] for row in times]
    return Timings(
        tuple(
            Latency(1e3 * median(row), 1e3 * _iqr(row), number * rounds, len(images), threads, device, clock)
            for row, number in zip(times, passes)
        ),
        tuple(median(row) for row in ratios),
        tuple(_iqr(row) / 2 for row in ratios),
    )


def time_pass(model: nn.Module, images: Tensor, passes: int = 1) -> float:
    """Seconds per forward pass over so many passes. Everything that is timed is timed by this function.

    With one thread on the CPU the clock is that of the thread: what other programs do meanwhile does not count, and on
    an idle machine it is wall time.
    """
    clock = time.thread_time if clock_of(images.device) == "thread" else time.perf_counter
    _wait(images.device)
    start = clock()
    for _ in range(passes):
        model(images)
    _wait(images.device)
    return max(clock() - start, 1e-9) / passes  # a clock may tick more slowly than the model runs


def clock_of(device: torch.device) -> str:
    """``thread`` or ``wall``: the clock of `time_pass`. That of a thread ticks 64 times a second on Windows."""
    own = device.type == "cpu" and torch.get_num_threads() == 1 and platform.system() != "Windows"
    return "thread" if own else "wall"


def describe_hardware(device: torch.device) -> str:
    """The model name of the accelerator, or of the CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # platform.processor() is empty or "x86_64" on Linux
    return names[0] if names else platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _iqr(values: Sequence[float]) -> float:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low
