"""Memory that the squares of single weights take."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import torch
from single import assert_exact, made, scored
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jbrprune.criteria import collectors, squares
from jbrprune.errors import ArgumentError


class _Live(TorchDispatchMode):
    """Largest number of bytes in tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.size: dict[int, int] = {}
        self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.known |= {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)} - set(self.size)
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return output

    def _track(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage().data_ptr()
        if key in self.known:
            return
        self.users[key] += 1
        self.size[key] = tensor.untyped_storage().nbytes()
        weakref.finalize(tensor, self._gone, key)
        self.peak = max(self.peak, sum(self.size.values()))

    def _gone(self, key: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.size.pop(key, None)


@contextmanager
def _watching_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[squares._Plan, int]]]:
    """Plans, and the bytes that were really in use under each of them."""
    plans: list[squares._Plan] = []
    peaks: list[tuple[squares._Plan, int]] = []
    plan, adding = squares._plan, squares.add_squares

    def planning(*args: Any) -> squares._Plan:
        plans.append(plan(*args))
        return plans[-1]

    def watched(*args: Any) -> None:
        plans.clear()
        with _Live() as live:
            adding(*args)
        peaks.append((max(plans, key=lambda p: p.bytes), live.peak))

    with monkeypatch.context() as patch:
        patch.setattr(squares, "_plan", planning)
        patch.setattr(collectors, "add_squares", watched)
        yield peaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", [1 << 18, 1 << 20, 1 << 24])
def test_memory_stays_under_the_cap(cap: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 24, 1), nn.Conv2d(24, 96, 3, 2, 1, groups=2)),
        *(nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.AdaptiveAvgPool2d(2), nn.Conv2d(96, 64, 3, padding=1)),
        *(nn.ConvTranspose2d(64, 16, 3, 2, 1, 1), nn.BatchNorm2d(16), nn.Flatten(1), nn.Linear(256, 4)),
    )
    model, images = cases.randomised(model).to(dtype), cases.images(24, 8).to(dtype)
    with _watching_plans(monkeypatch) as peaks:
        scores = scored(model, images, max_memory=cap, parameters="all", objective="margin")
    assert len(peaks) > 20
    assert all(used <= plan.bytes <= cap for plan, used in peaks)
    assert len({plan.chunk for plan, _ in peaks}) > 1
    expected = scored(model, images, parameters="all", objective="margin")
    assert_exact(scores.values(), expected.values(), 1e-10 if dtype == torch.float64 else 1e-4)


def test_blocks_are_no_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []
    plan = squares._plan

    def planning(*args: Any) -> squares._Plan:
        found = plan(*args)
        blocks.append(found.samples * found.rows * args[4])
        return found

    monkeypatch.setattr(squares, "_plan", planning)
    monkeypatch.setattr(squares, "CACHE_BYTES", 5000)
    scored(made(cases.NETS, "called twice"), cases.images(9))
    assert 2500 < max(blocks) <= 5000


def test_too_little_memory_is_said() -> None:
    with pytest.raises(ArgumentError, match=r"max_memory=1000 is too small: .*weight needs \d+ bytes"):
        scored(made(cases.NETS, "called twice"), cases.images(2), max_memory=1000)
