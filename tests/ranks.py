"""Several ranks of ``torch.distributed`` as forks of the test process, with gloo."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jbrprune.data import distributed

PATIENCE = 120.0


def on_ranks(size: int, work: Callable[[], Any], *, timeout: float = 60.0) -> list[Any]:
    """What ``work`` gives on every rank: its result, the exception that it raised, or None of a rank that died."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(size)]
        children = [_started(rank, size, port, work, path, timeout) for rank, path in enumerate(files)]
        _wait_for(children)
        return [torch.load(path, weights_only=False) if path.exists() else None for path in files]


def _started(rank: int, size: int, port: int, work: Callable[[], Any], path: Path, timeout: float) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; there are none that work
        child = os.fork()
    if child:
        return child
    try:
        tqdm.set_lock(threading.RLock())
        place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        distributed._accelerated = lambda: False  # a fork cannot use CUDA
        try:
            with distributed.joined(timeout=timeout):
                found = work()
        except Exception as error:
            traceback.print_exc()
            found = error.with_traceback(None)
            found.__cause__ = found.__context__ = None
        torch.save(found, path)
    finally:
        os._exit(0)


def _wait_for(children: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    waiting = set(children)
    while waiting:
        waiting -= {child for child in waiting if os.waitpid(child, os.WNOHANG)[0]}
        if waiting and time.monotonic() > end:
            for child in waiting:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"{len(waiting)} ranks hang")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
