"""How long each layer takes at each width: timed by itself on its real input, cut to a few widths, interpolated.

A layer of w channels takes no longer than a wider one, to which it could be padded, so every time is the least over
the widths from w on. Between the timed widths it is linear. One that lies above the line between its neighbours is
brought down to it: then every channel that goes saves something, and a stair that several channels take together is
spread over them.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jbrprune.budgets import timing_cache
from jbrprune.budgets.layer_calls import Call, calls, full_widths, narrowed, quantum
from jbrprune.budgets.timing import Laps, race
from jbrprune.errors import ModelError
from jbrprune.evaluation.agreement import bytes_of
from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Axis

log = logging.getLogger(__name__)

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of a width at which a layer is timed."""
ROUNDS = 3
BLOCK_SECONDS = 0.004
MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Multiples that widths may be rounded to."""
FLAT = 0.03
"""A larger multiple is as good as the best one if it takes no more than this share longer."""
HEAVIEST = 3
"""Kinds of layers, the most expensive ones, on which multiples are compared."""
MOST_BYTES = 2**29
"""Copies of a layer that are held at a time."""

Timer = Callable[..., list[Laps]]


def _key(call: Call, widths: Sequence[int]) -> str:
    """What the time of a run depends on, beside the machine."""
    tensor: Tensor = preserve.input_of(call.args, call.kwargs)
    kind = f"{type(call.module).__module__}.{type(call.module).__qualname__}"
    shape = f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"
    weight = preserve.first_tensor(call.module)
    own = None if weight is None else (weight.dtype, weight.stride())
    # what the text of a module leaves out: its number of heads, whether its attention is fused
    flags = {name: value for name, value in sorted(vars(call.module).items()) if isinstance(value, bool | int | float)}
    cut = dict(zip(call.sides, widths))
    return f"{kind} {call.module!r} {flags} {own} on {shape} cut to {cut}".replace("\n", " ")


@dataclass(eq=False)
class Stopwatch:
    """Times layers, and remembers what was timed.

    Attributes:
        device: Where the layers are.
        known: Layer at a width -> seconds, from earlier runs and this one.
        timer: As `jbrprune.budgets.timing.race`.
    """

    device: torch.device
    known: dict[str, float]
    timer: Timer = race
    new: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device) -> Stopwatch:
        """With what is known from earlier runs on this machine."""
        return cls(device, timing_cache.read(device))

    def seconds(self, call: Call, points: Sequence[tuple[int, ...]]) -> list[float]:
        """Least time of a layer at each of some widths: whatever else the machine does only adds to it."""
        keys = [_key(call, widths) for widths in points]
        missing = [(key, widths) for key, widths in zip(keys, points) if key not in self.known]
        at_once = max(1, MOST_BYTES // max(1, bytes_of(call.module)))
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            runs = [narrowed(call, widths) for _, widths in some]
            times = self.timer(runs, self.device, rounds=ROUNDS, block_seconds=BLOCK_SECONDS)
            self.new |= {key: min(laps.seconds) for (key, _), laps in zip(some, times)}
        self.known |= self.new
        return [self.known[key] for key in keys]

    def keep(self) -> None:
        """Write what is new to disk."""
        timing_cache.add(self.device, self.new)
        self.new = {}


# --- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """Seconds of one run of a layer over the shares of its axes.

    Attributes:
        axes: The axes.
        shares: For every axis, the timed shares of the dense width, ascending, from 0 to 1.
        seconds: ``[len(shares[0]), ...]``.
    """

    axes: tuple[Axis, ...]
    shares: tuple[tuple[float, ...], ...]
    seconds: np.ndarray

    def price(self, shares: Sequence[float]) -> float:
        """Seconds with these shares of the dense widths, linear between what was timed."""
        return _interpolated(self.seconds, self.shares, shares)


def _interpolated(values: Any, grids: Sequence[Sequence[float]], at: Sequence[float]) -> float:
    if not grids:
        return float(values)
    grid, x = grids[0], min(max(at[0], grids[0][0]), grids[0][-1])
    left = min(bisect_right(grid, x), len(grid) - 1) - 1
    weight = (x - grid[left]) / (grid[left + 1] - grid[left])
    low, high = (_interpolated(values[k], grids[1:], at[1:]) for k in (left, left + 1))
    return (1 - weight) * low + weight * high


def tables(model: nn.Module, images: Tensor, axes: Sequence[Axis], watch: Stopwatch, *, round_to: int) -> list[Table]:
    """One table for every run of a layer that has one of the axes.

    Args:
        model: The dense model; left as it was.
        images: ``[B, C, H, W]``; only the first is used.
        axes: Axes that can become narrower.
        watch: Times the layers.
        round_to: Widths are timed as pruning leaves them: at multiples of this and of no larger power of two.
    """
    wanted, found = set(axes), []
    with preserve.inference_state(model):
        for call in calls(model, images):
            own = tuple(number for number, axis in enumerate(call.axes) if axis in wanted)
            if not own:
                continue
            try:
                found.append(_table(call, own, watch, round_to))
            except (ModelError, RuntimeError) as error:
                log.warning("%s cannot be timed by itself (%s): its time counts as fixed.", call.name, error)
    watch.keep()
    return found


def _table(call: Call, own: tuple[int, ...], watch: Stopwatch, round_to: int) -> Table:
    full = full_widths(call)
    grids = [
        _widths(full[number], quantum(call, number), 1 if side == "heads" else round_to)
        if number in own
        else [full[number]]
        for number, side in enumerate(call.sides)
    ]
    points = list(itertools.product(*grids))
    seconds = np.array(watch.seconds(call, points)).reshape([len(grids[number]) for number in own])
    shares = [tuple(width / full[number] for width in grids[number]) for number in own]
    seconds = convex(monotone(extended(monotone(seconds), shares)), [(0.0, *grid) for grid in shares])
    return Table(tuple(call.axes[number] for number in own), tuple((0.0, *grid) for grid in shares), seconds)


def _widths(full: int, quantum: int, round_to: int) -> list[int]:
    """Widths to time, ascending; the last is the full one."""
    step = max(quantum, round_to) if max(quantum, round_to) < full else 1
    below = {max(step, _odd_multiple(share * full, step)) for share in SHARES[:-1]}
    return [*sorted(width for width in below if width < full), full]


def _odd_multiple(width: float, step: int) -> int:
    return step * (2 * int(width / step / 2) + 1)


def monotone(seconds: np.ndarray) -> np.ndarray:
    """The least time over all larger widths, along every dimension.

    Example:
        >>> monotone(np.array([3.0, 1.0, 2.0])).tolist()
        [1.0, 1.0, 2.0]
    """
    for dim in range(seconds.ndim):
        seconds = np.flip(np.minimum.accumulate(np.flip(seconds, dim), dim), dim)
    return seconds


def extended(seconds: np.ndarray, grids: Sequence[Sequence[float]]) -> np.ndarray:
    """With a share of nothing in front of every grid: on the line through the first two, between 0 and the first."""
    for dim, grid in enumerate(grids):
        first = seconds.take(0, dim)
        if len(grid) > 1:
            slope = (seconds.take(1, dim) - first) / (grid[1] - grid[0])
            first = np.clip(first - slope * grid[0], 0, first)
        seconds = np.concatenate([np.expand_dims(first, dim), seconds], dim)
    return seconds


def convex(seconds: np.ndarray, grids: Sequence[Sequence[float]]) -> np.ndarray:
    """The greatest convex function below, along one dimension after the other: the lowest chord over every point.

    The times at both ends of a dimension stay, so that of the whole layer does.

    Example:
        >>> convex(np.array([0.0, 2.0, 2.0]), [(0.0, 0.5, 1.0)]).tolist()
        [0.0, 1.0, 2.0]
    """
    for dim, grid in enumerate(grids):
        seconds = np.apply_along_axis(functools.partial(_lowest_chords, np.array(grid)), dim, seconds)
    return seconds


def _lowest_chords(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lowest = y.copy()
    for left, right in itertools.combinations(range(len(x)), 2):
        inside = slice(left, right + 1)
        chord = y[left] + (y[right] - y[left]) * (x[inside] - x[left]) / (x[right] - x[left])
        lowest[inside] = np.minimum(lowest[inside], chord)
    return lowest


# --- multiples -------------------------------------------------------------------------------------


def best_multiple(model: nn.Module, images: Tensor, watch: Stopwatch) -> int:
    """What widths should be multiples of on this machine; 1 if no layer is wide enough to tell.

    The layers that take longest are timed at every width in a range; for a multiple m, the mean time when each width is
    rounded up to the next multiple of m. The largest m that is within `FLAT` of the best is chosen: where time falls in
    stairs of 16, a model loses nothing by keeping the rest of every 16 channels.

    Args:
        model: The dense model; left as it was.
        images: ``[B, C, H, W]``; only the first is used.
        watch: Times the layers.
    """
    costs = collections.Counter[int]()
    with preserve.inference_state(model):
        for call, uses in _heaviest(calls(model, images), watch):
            full = full_widths(call)
            for number in range(len(full)):
                for multiple, seconds in _rounded_up(call, number, watch).items():
                    costs[multiple] += uses * seconds  # type: ignore[assignment]
    watch.keep()
    best = min(costs.values(), default=0.0)
    return max((multiple for multiple, cost in costs.items() if cost <= (1 + FLAT) * best), default=1)


def _heaviest(found: Sequence[Call], watch: Stopwatch) -> list[tuple[Call, int]]:
    """The kinds of mixing layers that take longest in all, wide enough to be compared, and how often each runs."""
    kinds: dict[str, list[Call]] = {}
    for call in found:
        wide = layers.is_consumer(call.module) and not layers.is_grouped(call.module)
        if wide and min(full_widths(call)) >= 2 * MULTIPLES[-1]:
            kinds.setdefault(_key(call, full_widths(call)), []).append(call)
    ordered = sorted(kinds.values(), key=lambda kind: -len(kind) * watch.seconds(kind[0], [full_widths(kind[0])])[0])
    return [(kind[0], len(kind)) for kind in ordered[:HEAVIEST]]


def _rounded_up(call: Call, number: int, watch: Stopwatch) -> dict[int, float]:
    """Multiple -> mean seconds with one width rounded up to it, over a range of widths around the half."""
    full, largest = full_widths(call), MULTIPLES[-1]
    start = full[number] // 2 // largest * largest
    widths = range(start + 1, start + largest + 1)
    points = [(*full[:number], width, *full[number + 1 :]) for width in widths]
    seconds = dict(zip(widths, watch.seconds(call, points)))
    return {m: sum(seconds[-(-width // m) * m] for width in widths) / len(widths) for m in MULTIPLES}
