"""What ranks really say to each other: every collective call of a run, counted where torch.distributed is called."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from network import Message
from torch.distributed import distributed_c10d

from jbrprune.data import distributed


@contextlib.contextmanager
def counting() -> Iterator[list[Message]]:
    """Note every all-reduce, all-gather and broadcast of this process.

    Collectives of Python objects appear as what they consist of: a call for the lengths, and one for the bytes.
    """
    found: list[Message] = []

    def noting(kind: Any, sized: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        original = getattr(distributed_c10d, kind)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = sized(*args)
            found.append(Message(kind, tensor.numel() * tensor.element_size()))
            return original(*args, **kwargs)

        return call

    wrapped = {
        "all_reduce": noting("all_reduce", lambda tensor, *_: tensor),
        "broadcast": noting("broadcast", lambda tensor, *_: tensor),
        "all_gather": noting("all_gather", lambda tensors, tensor, *_: tensor),
    }
    with contextlib.ExitStack() as stack:
        for module in (dist, distributed_c10d):
            for kind, call in wrapped.items():
                stack.enter_context(mock.patch.object(module, kind, call))
        yield found


def on_ranks(size: int, work: Callable[[], Any]) -> list[tuple[list[Message], Any]]:
    """Run something on several ranks, as processes of this machine with gloo: what each said, and its result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _one, (size, port, work, folder), nprocs=size, start_method="fork"
        )  # fails where one fails
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(size)]


def _one(rank: int, size: int, port: int, work: Callable[[], Any], folder: str) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with distributed.joined(timeout=60.0), counting() as found:
        result = work()
        distributed.same(None)  # nobody leaves before all have ended
    torch.save((found[:-2], result), Path(folder, str(rank)))
