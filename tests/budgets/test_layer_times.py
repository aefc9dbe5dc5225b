"""Layers by themselves at other widths; tables between the widths; the multiple that loses no time."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jbrprune.budgets import layer_times
from jbrprune.budgets.cost import axis_widths
from jbrprune.budgets.layer_calls import calls, full_widths, narrowed, quantum
from jbrprune.budgets.layer_times import Stopwatch, Table, best_multiple, convex, extended, monotone, tables
from jbrprune.budgets.timing import Laps
from jbrprune.structure.discovery import find_groups

CPU = torch.device("cpu")
Fingerprint = Callable[[nn.Module], dict[str, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JBRPRUNE_CACHE", str(tmp_path))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=3, num_classes=4)


def test_runs_of_a_residual_net() -> None:
    model = nets.TwoBlocks().eval()
    found = {call.name: call for call in calls(model, torch.randn(2, 3, 12, 12))}
    assert found["one.conv1"].axes == (("one.conv1", "out", 0), ("one.conv1", "in", 0))
    assert found["one.bn1"].axes == (("one.bn1", "out", 0),)
    assert found["one.act1"].axes == (("one.bn1", "out", 0),)  # behind its norm
    assert found["one.act2"].axes == (("one.bn2", "out", 0),)  # the shortcut is added in place
    assert found["two.downsample.0"].args[0].shape == (1, 6, 12, 12)


def test_attention_is_one_run_on_its_heads() -> None:
    found = {call.name: call for call in calls(vit().eval(), torch.randn(1, 3, 32, 32))}
    assert found["blocks.0.attn"].sides == ("heads",)
    assert not any(name.startswith("blocks.0.attn.") for name in found)
    assert found["blocks.0.mlp.act"].axes == (("blocks.0.mlp.fc1", "out", 0),)


def test_a_layer_that_runs_twice_is_there_twice() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    net = nets.Net(lambda s, x: s.a(s.a(x)[..., ::2]), a=layer)
    assert [tuple(call.args[0].shape[2:]) for call in calls(net, torch.randn(2, 3, 8, 8))] == [(8, 8), (8, 4)]


def test_the_model_is_left_as_it_was(fingerprint: Fingerprint) -> None:
    model, images = vit().train(), torch.randn(2, 3, 32, 32)
    before = fingerprint(model)
    for call in calls(model, images):
        with torch.no_grad():
            narrowed(call, [max(quantum(call, n), w // 2) for n, w in enumerate(full_widths(call))])()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("layer", "shape", "widths", "weight", "out"),
    [
        (nn.Conv2d(8, 6, 3, padding=1), (1, 8, 5, 5), (4, 3), (4, 3, 3, 3), (1, 4, 5, 5)),
        (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 5, 5), (5,), (5, 1, 3, 3), (1, 5, 3, 3)),
        (nn.Conv2d(8, 12, 3, groups=4), (1, 8, 5, 5), (6,), (6, 2, 3, 3), (1, 6, 3, 3)),
        (nn.Linear(8, 6), (1, 7, 8), (2, 5), (2, 5), (1, 7, 2)),
        (nn.BatchNorm2d(8), (1, 8, 5, 5), (3,), (3,), (1, 3, 5, 5)),
        (nn.LayerNorm(8), (1, 7, 8), (3,), (3,), (1, 7, 3)),
        (nn.GroupNorm(4, 8), (1, 8, 5, 5), (4,), (4,), (1, 4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_narrower_run_computes_with_the_first_channels(
    layer: nn.Module, shape: tuple[int, ...], widths: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]
) -> None:
    net = nn.Sequential(layer.eval())
    (call,) = calls(net, torch.randn(shape))
    run: Any = narrowed(call, widths)
    assert (tuple(run.func.weight.shape), tuple(run().shape)) == (weight, out)
    assert torch.equal(run.func.weight, layer.weight[tuple(slice(n) for n in weight)])
    assert run.args[0].is_contiguous()


def test_a_narrower_activation_and_attention() -> None:
    found = {call.name: call for call in calls(vit().eval(), torch.randn(1, 3, 32, 32))}
    assert narrowed(found["blocks.0.mlp.act"], (10,))().shape == (1, 5, 10)
    run: Any = narrowed(found["blocks.0.attn"], (2,))
    assert (run.func.qkv.weight.shape, run.func.num_heads, run().shape) == ((48, 24), 2, (1, 5, 24))
    rows = found["blocks.0.attn"].module.qkv.weight.unflatten(0, (3, 3, 8))[:, :2].flatten(0, 2)
    assert torch.equal(run.func.qkv.weight, rows)


def test_channels_last_stays() -> None:
    net = nn.Sequential(nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    (call,) = calls(net, torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last))
    run: Any = narrowed(call, (4, 3))
    assert run.args[0].is_contiguous(memory_format=torch.channels_last)
    assert run.func.weight.is_contiguous(memory_format=torch.channels_last)


# --- tables --------------------------------------------------------------------------------------


def brute_minorant(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """The largest line below all points, at each point: over a fine fan of slopes."""
    slopes = {(y[j] - y[i]) / (x[j] - x[i]) for i, j in itertools.combinations(range(len(x)), 2)}
    return [max(min(yj - s * (xj - xk) for xj, yj in zip(x, y)) for s in slopes) for xk in x]


@given(st.lists(st.floats(0, 10), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_convex_is_the_greatest_convex_function_below(y: list[float]) -> None:
    x = [k**1.5 for k in range(len(y))]
    np.testing.assert_allclose(convex(np.array(y), [x]), brute_minorant(x, y), atol=1e-9)


@given(st.lists(st.floats(0, 10), min_size=9, max_size=9))
@settings(max_examples=30, deadline=None)
def test_cleaned_times_grow_with_both_widths_and_keep_the_full_one(values: list[float]) -> None:
    grid = (0.25, 0.5, 1.0)
    seconds = np.array(values).reshape(3, 3)
    clean = convex(monotone(extended(monotone(seconds), [grid, grid])), [(0.0, *grid)] * 2)
    assert clean.shape == (4, 4)
    assert clean[-1, -1] == pytest.approx(seconds[-1, -1], rel=1e-12)
    assert (np.diff(clean, axis=0) >= -1e-9).all()
    assert (np.diff(clean, axis=1) >= -1e-9).all()
    assert (clean >= -1e-9).all()


def test_monotone_by_hand() -> None:
    assert monotone(np.array([[5.0, 4.0], [1.0, 9.0]])).tolist() == [[1.0, 4.0], [1.0, 9.0]]


def test_extended_by_hand() -> None:
    assert extended(np.array([3.0, 4.0, 9.0]), [(0.25, 0.5, 1.0)]).tolist() == [2.0, 3.0, 4.0, 9.0]
    assert extended(np.array([1.0, 9.0]), [(0.5, 1.0)]).tolist() == [0.0, 1.0, 9.0]  # below zero is not
    assert extended(np.array([3.0]), [(1.0,)]).tolist() == [3.0, 3.0]


def test_a_table_is_linear_between_what_was_timed() -> None:
    axes = (("a", "out", 0), ("a", "in", 0))
    grid = np.array([0.0, 0.25, 1.0])
    table = Table(axes, (tuple(grid), tuple(grid)), 2 + np.outer(grid**2, grid**2))  # type: ignore[arg-type]

    def slow(x: float, y: float) -> float:
        rows = [float(np.interp(y, grid, row)) for row in table.seconds]
        return float(np.interp(x, grid, rows))

    for x, y in itertools.product([0.0, 0.1, 0.25, 0.6, 1.0], repeat=2):
        assert table.price([x, y]) == pytest.approx(slow(x, y), rel=1e-12)


def clock(seconds: Callable[[nn.Module, Tensor], float]) -> Callable[..., list[Laps]]:
    """A race in which the time of a run is a function of its layer and input; the first round is disturbed."""

    def timed(runs: Sequence[Any], device: torch.device, **_: object) -> list[Laps]:
        times = [seconds(run.func, run.args[0]) for run in runs]
        return [Laps((2 * t, t, 1.5 * t), 1) for t in times]

    return timed


def work(layer: nn.Module, images: Tensor) -> float:
    """Proportional to its weights."""
    weight = getattr(layer, "weight", None)
    return 1e-6 * (1 if weight is None or weight.dim() < 2 else weight.numel())


def test_tables_of_a_model_are_those_of_its_layers() -> None:
    model = nets.TwoBlocks().eval()
    images = torch.randn(2, 3, 12, 12)
    axes = list(axis_widths(model, find_groups(model, images).groups))
    found = {t.axes: t for t in tables(model, images, axes, Stopwatch(CPU, {}, clock(work)), round_to=1)}
    conv = found[("one.conv1", "out", 0), ("one.conv1", "in", 0)]
    assert conv.price([1.0, 1.0]) == pytest.approx(1e-6 * 6 * 6 * 9)
    assert conv.price([1 / 6, 0.5]) == pytest.approx(1e-6 * 1 * 3 * 9)  # linear in each, so exact between the widths
    assert found[(("stem", "out", 0),)].price([0.5]) == pytest.approx(1e-6 * 3 * 3 * 9)  # the images keep their width
    assert all(set(t.axes) <= set(axes) for t in found.values())


def test_what_was_timed_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def counted(calls: Sequence[Any], device: torch.device, **_: object) -> list[Laps]:
        runs.append(len(calls))
        return [Laps((1e-3,), 1) for _ in calls]

    model = nets.TwoBlocks().eval()
    images = torch.randn(2, 3, 12, 12)
    axes = list(axis_widths(model, find_groups(model, images).groups))
    first = Stopwatch.of(CPU)
    first.timer = counted
    tables(model, images, axes, first, round_to=1)
    once = sum(runs)
    assert once > 0
    second = Stopwatch.of(CPU)  # from disk
    second.timer = counted
    tables(copy.deepcopy(model), images, axes, second, round_to=1)
    assert sum(runs) == once
    tables(model, torch.randn(2, 3, 16, 16), axes, second, round_to=1)  # other inputs
    assert sum(runs) > once


@pytest.mark.parametrize("change", ["heads", "fused"])
def test_attentions_that_print_alike_are_timed_apart(change: str) -> None:
    """Six heads of twelve take another time than six of six, though both print the same linear layers."""
    timed: list[int] = []

    def counted(calls: Sequence[Any], device: torch.device, **_: object) -> list[Laps]:
        timed.append(len(calls))
        return [Laps((1e-3,), 1) for _ in calls]

    watch = Stopwatch(CPU, {}, counted)
    for number in range(2):
        heads = 6 if change == "heads" and number else 12
        options = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": heads, "num_classes": 4}
        model = timm.create_model("vit_tiny_patch16_224", **options).eval()
        model.blocks[0].attn.fused_attn = not (change == "fused" and number)
        (call,) = [call for call in calls(model, torch.randn(1, 3, 32, 32)) if call.sides == ("heads",)]
        watch.seconds(call, [(6,)])
    assert timed == [1, 1]


def test_large_layers_are_copied_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noting(calls: Sequence[Any], device: torch.device, **_: object) -> list[Laps]:
        sizes.append(len(calls))
        return [Laps((1e-3,), 1) for _ in calls]

    (call,) = calls(nn.Sequential(nn.Linear(16, 16, bias=False)), torch.randn(1, 16))
    monkeypatch.setattr(layer_times, "MOST_BYTES", 3 * 16 * 16 * 4)
    assert len(Stopwatch(CPU, {}, noting).seconds(call, [(n, 16) for n in range(1, 9)])) == 8
    assert sizes == [3, 3, 2]


# --- multiples -----------------------------------------------------------------------------------


def stairs(step: int) -> Callable[[nn.Module, Tensor], float]:
    def seconds(layer: nn.Module, images: Tensor) -> float:
        out, into = layer.weight.shape[:2]  # type: ignore[union-attr, index]
        return 1e-6 * math.ceil(out / step) * step * math.ceil(into / step) * step

    return seconds


def slow_if_odd(layer: nn.Module, images: Tensor) -> float:
    """Widths that are no multiples of 8 take twice as long."""
    out, into = layer.weight.shape[:2]  # type: ignore[union-attr, index]
    return 1e-6 * out * into * (1 if out % 8 == into % 8 == 0 else 2)


@pytest.mark.parametrize(
    ("seconds", "multiple"),
    [(stairs(1), 4), (stairs(16), 16), (stairs(32), 32), (slow_if_odd, 8)],
    ids=["proportional", "16", "32", "odd is slow"],
)
def test_the_multiple_is_the_largest_that_loses_no_time(seconds: Any, multiple: int) -> None:
    """Proportional time: 4 costs one and a half channels of eighty on average, which is within the tolerance."""
    layer = nn.Conv2d(128, 128, 1)
    net = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(128, 128, 1))
    assert best_multiple(net, torch.randn(2, 128, 4, 4), Stopwatch(CPU, {}, clock(seconds))) == multiple


def test_layers_that_are_too_narrow_say_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1))
    assert best_multiple(net, torch.randn(2, 3, 4, 4), Stopwatch(CPU, {}, clock(stairs(8)))) == 1
