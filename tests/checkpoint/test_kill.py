"""kill -9 at every operation on files and at random times: the old file or the new, never half.

Every trial is a fork of this process that kills itself, or is killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import IMAGES, QUICK, assert_same, own
from torch import nn
from tqdm import tqdm

from jbrprune import prune, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint.checkpoint import describe, load, save
from jbrprune.data.files import tensor_file, write_tensors

FILES = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "os.listdir",
    "os.scandir",
)
"""Audit events, which Python raises just before it does what they say; a rename is also a replace."""
OPTIONS: dict[str, Any] = {"macs": 0.6, "steps": 3, "floors": Floors(channels=2), **QUICK}


def forked(work: Callable[[], object], death: Callable[[], object]) -> int:
    """Id of a process of its own that prepares its death, works, and ends with 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; there are none that work
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and a dead one does not give it back
        death()
        work()
        status = 0
    finally:
        os._exit(status)


def died(child: int) -> bool:
    """Wait for it; whether it was killed. It may not fail in any other way."""
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL if killed else os.WEXITSTATUS(status) == 0
    return killed


def at_operation(number: int, below: Path) -> Callable[[], None]:
    """Die just before the operation of this number on something below a folder, also between fsync and rename."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in FILES and any(isinstance(a, str | Path) and str(below) in str(a) for a in arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def every_operation(work: Callable[[], object], below: Path, check: Callable[[], None]) -> int:
    """Kill it at its first, second, ... operation until it is done; check after every death. The number of deaths."""
    number = 1
    while died(forked(work, at_operation(number, below))):
        check()
        number += 1
    check()
    return number - 1


def _models() -> tuple[nn.Module, nn.Module]:
    old, new = own(), own()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 1
    return old, new


def _value(directory: Path) -> float:
    """Which model is stored there; that it can be read shows that it is whole."""
    return float(load(directory, model=own()).get_parameter("fc.bias")[0].detach())


def test_save_killed_at_every_operation_on_files(tmp_path: Path) -> None:
    old, new = _models()
    target = tmp_path / "models" / "m"
    known = [float(model.get_parameter("fc.bias")[0].detach()) for model in (old, new)]
    found = []

    def check() -> None:
        found.append(known.index(_value(target)))
        save(old, target, overwrite=True)  # whatever was left does not disturb the next one
        assert _value(target) == known[0]

    save(old, target)
    deaths = every_operation(lambda: save(new, target, overwrite=True), tmp_path, check)
    assert deaths >= 10
    assert set(found) == {0, 1}
    assert found == sorted(found)  # old before the rename, new from then on


def test_save_of_the_first_model_killed_leaves_nothing_or_all(tmp_path: Path) -> None:
    target = tmp_path / "m"
    found = []

    def check() -> None:
        found.append(target.exists() and describe(target).recipe is None)
        if found[-1]:
            assert _value(target) == float(own().get_parameter("fc.bias")[0].detach())

    every_operation(lambda: save(own(), target, overwrite=True), tmp_path, check)
    assert found[0] is False
    assert found[-1] is True


def test_scores_killed_at_every_operation_on_files(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    written = [{"sums/a": torch.full((1000,), float(value))} for value in range(2)]
    found = []

    def check() -> None:
        with tensor_file(path, "units") as (header, tensors):
            assert torch.equal(tensors["sums/a"], written[header["value"]]["sums/a"])
            found.append(header["value"])
        write_tensors(path, "units", {"value": 0}, written[0])

    write_tensors(path, "units", {"value": 0}, written[0])
    every_operation(lambda: write_tensors(path, "units", {"value": 1}, written[1]), tmp_path, check)
    assert set(found) == {0, 1}


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_prune_killed_at_operations_on_files_goes_on_to_the_same_result(stride: int, tmp_path: Path) -> None:
    whole = prune(own(), IMAGES, **OPTIONS)
    directory = tmp_path / "run"

    def work() -> object:
        return prune(own(), IMAGES, **OPTIONS, resume=directory)

    deaths = 0
    while died(forked(work, at_operation(1 + deaths * stride, tmp_path))):
        deaths += 1
        assert_same(prune(own(), IMAGES, **OPTIONS, resume=directory), whole)
        shutil.rmtree(directory)
    assert deaths >= 30 // stride


@pytest.mark.slow
def test_killed_at_random_times(tmp_path: Path) -> None:
    """Dozens of deaths of a sweep and of a save, wherever they are just then, also in the middle of a write."""
    source = random.Random(0)
    shares = [0.85, 0.7]
    options = {"steps": 2, "floors": Floors(channels=2), **QUICK}
    whole = sweep(own(), IMAGES, shares, **options)
    large = nn.Sequential(nn.Flatten(), nn.Linear(3000, 1500))
    target = tmp_path / "large"
    save(large, target)
    deaths, longest = 0, 0.0
    for trial in range(60):
        directory = tmp_path / f"sweep-{trial}"

        def work(directory: Path = directory, trial: int = trial) -> None:
            sweep(own(), IMAGES, shares, **options, resume=directory)
            with torch.no_grad():
                large.get_parameter("1.weight").fill_(trial)
            save(large, target, overwrite=True)

        began = time.monotonic()
        child = forked(work, lambda: None)
        if trial == 0:  # undisturbed: how long it takes on this machine
            assert not died(child)
            longest = time.monotonic() - began
            continue
        time.sleep(source.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        deaths += died(child)
        stored = load(target, model=large).get_parameter("1.weight")
        assert stored.eq(stored.flatten()[0]).all()
        if trial % 4 == 0:
            for again, result in zip(sweep(own(), IMAGES, shares, **options, resume=directory), whole, strict=True):
                assert_same(again, result)
    assert deaths > 30
