"""One job on several ranks of ``torch.distributed``: which rank reads which data, and how their results are combined.

Every rank runs the same program on the same model and the same data. Scores, moments and agreements are sums over
samples: each rank works on its part, the sums are added up, and all ranks go on with the same numbers. Outside of
`joined` there is one rank, and these functions return what they are given.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from jbrprune.data.batches import Batch, iterate
from jbrprune.errors import ArgumentError, JBRError, RankError
from jbrprune.models.preserve import same_randomness

T = TypeVar("T")

_joined: ContextVar[bool] = ContextVar("joined", default=False)

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others at most; longer than their parts of the data may differ."""


@contextlib.contextmanager
def joined(*, timeout: float = TIMEOUT) -> Iterator[None]:
    """Let jbrprune share its work among the ranks that ``torchrun`` started.

    Joins the process group, or uses the one that is initialised already. When one rank fails or dies, the others end
    with a `RankError` as soon as they need it. Inside, every rank must call the same functions in the same order.

    Args:
        timeout: Seconds that a rank waits for the others at most (for a group that is made here).

    Raises:
        RankError: The group cannot be joined.

    Example:
        In a script that is started by ``torchrun --nproc-per-node 2 script.py``::

            with jbrprune.distributed.joined():
                scores = jbrprune.score("resnet50", "photos/")
                if jbrprune.distributed.rank() == 0:
                    scores.save("scores.safetensors")
    """
    own = not dist.is_initialized()
    if own:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise RankError(f"{missing[0]} is not set: start the program with torchrun, or leave joined() out.")
        if _accelerated():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _watched("joining"):
            dist.init_process_group("nccl" if _accelerated() else "gloo", timeout=timedelta(seconds=timeout))
    token = _joined.set(True)
    try:
        yield
    finally:
        _joined.reset(token)
        if own:
            dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run the block as if there were one rank only."""
    token = _joined.set(False)
    try:
        yield
    finally:
        _joined.reset(token)


def rank() -> int:
    """Number of this process, from 0; 0 outside of `joined`."""
    return dist.get_rank() if _joined.get() else 0


def size() -> int:
    """Number of ranks; 1 outside of `joined`."""
    return dist.get_world_size() if _joined.get() else 1


def launched() -> bool:
    """Whether this process was started by ``torchrun`` as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


# --- parts of the data ----------------------------------------------------------------------------


class Parts:
    """This rank's part of the data: batches with the position of their first sample in the whole.

    Samples are dealt out in blocks of consecutive ones: block b goes to rank b mod size. Of a tensor, a data set or a
    `DataLoader` over one, only the own part is read; of anything else, all of it, and the rest is dropped.
    Construction and `check` are collective; iteration is not.

    Args:
        data: As for `jbrprune.data.batches.iterate`; the same on every rank.
        batch_size: Images per batch where the data do not say.
        block: Samples that stay together on one rank; default: a batch.

    Raises:
        ArgumentError: A `DataLoader` whose sampler shards by itself: such samplers repeat samples.
        DataError, NonFiniteError: As for `iterate`. A rank without any samples is no error.
    """

    def __init__(self, data: object, *, batch_size: int, block: int | None = None) -> None:
        self.data, self.batch_size, self.block = data, batch_size, block
        self.seen = 0
        self.order: list[int] | None = None
        if size() == 1:
            return
        if isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler):
            raise ArgumentError(
                "The DataLoader has a DistributedSampler, which repeats samples until all ranks have equally many. "
                "Pass a DataLoader over all of the data: every rank reads its own part of it."
            )
        self.order = _order(data)
        if isinstance(data, DataLoader) and data.batch_size:
            self.batch_size = data.batch_size

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        if size() == 1:
            yield from number_batches(iterate(self.data, batch_size=self.batch_size))
        elif self.order is None:
            yield from self._dropping()
        else:
            count, block = len(self.order), self.block or self.batch_size
            mine = [
                (start, min(start + self.batch_size, first + block, count))
                for first in range(rank() * block, count, size() * block)
                for start in range(first, min(first + block, count), self.batch_size)
            ]
            picked = _pick(self.data, [self.order[start:stop] for start, stop in mine])
            yield from zip((start for start, _ in mine), picked)

    def check(self) -> None:
        """Check that all ranks have read the same data, where every rank reads all of them.

        Raises:
            RankError: They have read different data.
        """
        if size() > 1 and self.order is None and len(set(gather(self.seen))) > 1:
            raise RankError(
                "The ranks read different images, or in another order, but each must see the same data to leave out "
                "what is not its part. Do not shuffle, and do not shard the data yourself."
            )

    def _dropping(self) -> Iterator[tuple[int, Batch]]:
        """Read everything, yield the own blocks; a block is as long as the first batch unless ``block`` is set."""
        block = self.block
        for start, batch in number_batches(iterate(self.data, batch_size=self.batch_size)):
            values = batch.images.detach().cpu().contiguous().view(torch.uint8).numpy()
            self.seen = zlib.crc32(values.tobytes(), self.seen)
            block = block or len(batch)
            stop = start + len(batch)
            for first in range(start - start % block, stop, block):
                if first // block % size() == rank():
                    low, high = max(first, start) - start, min(first + block, stop) - start
                    yield start + low, batch.map(lambda tensor, low=low, high=high: tensor[low:high])


def number_batches(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Yield every batch with the position of its first sample."""
    start = 0
    for batch in batches:
        yield start, batch
        start += len(batch)


def _order(data: object) -> list[int] | None:
    """Indices in the order in which all ranks read them; None if only reading shows the order."""
    if isinstance(data, Tensor):
        return list(range(len(data))) if data.dim() == 4 else None
    if type(data) is DataLoader:
        if isinstance(data.dataset, IterableDataset) or data.batch_sampler is None:
            return None
        with same_randomness(torch.device("cpu")):
            return broadcast([index for batch in data.batch_sampler for index in batch])
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return list(range(len(data)))  # type: ignore[arg-type]
    return None


def _pick(data: Any, ranges: list[list[int]]) -> Iterator[Batch]:
    """One batch for each list of indices."""
    if not ranges:
        return
    if not isinstance(data, DataLoader):
        for indices in ranges:
            part = data[indices[0] : indices[-1] + 1] if isinstance(data, Tensor) else Subset(data, indices)
            yield next(iterate(part, batch_size=len(indices)))
        return
    loader = DataLoader(
        data.dataset,
        batch_sampler=ranges,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        generator=torch.Generator(),
    )
    yield from iterate(loader)


# --- making one of the parts ----------------------------------------------------------------------


def all_sum(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Add up tensors of the same name over all ranks; every rank gets the same bits. A rank may lack some names.

    Raises:
        RankError: The shapes differ, or another rank has ended.
    """
    if size() == 1:
        return dict(tensors)
    forms = gather({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    known = {name: form for found in forms for name, form in found.items()}
    found = dict(tensors)
    for name, (shape, dtype) in sorted(known.items()):
        if any(form.get(name, known[name]) != known[name] for form in forms):
            raise RankError(f"{name} is not the same on every rank: {[form.get(name) for form in forms]}.")
        own = tensors.get(name, torch.zeros(shape, dtype=dtype))
        total = own.detach().clone().to(_place())
        with _watched("adding up"):
            dist.all_reduce(total)
            dist.broadcast(total, src=0)  # the very same bits everywhere, in whatever order a backend adds
        found[name] = total.to(own.device)
    return found


def own_share(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that all ranks have, in the order of the ranks; all of them if too few."""
    shared = size() > 1 and len(tensor) >= size()
    return tensor.tensor_split(size())[rank()] if shared else tensor


def broadcast(value: T) -> T:
    """Return the value of rank 0 on every rank."""
    if size() == 1:
        return value
    held = [value]
    with _watched("receiving from rank 0"):
        dist.broadcast_object_list(held, src=0)
    return held[0]


@torch.no_grad()
def broadcast_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors in place with those of rank 0."""
    if size() > 1:
        for name, value in broadcast({name: tensor.detach().cpu() for name, tensor in tensors.items()}).items():
            tensors[name].copy_(value)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Run a block that needs no other rank; if it fails on one rank, fail on all.

    Raises:
        JBRError: The error itself on the rank that failed; an error of the same class, with its number, on the others.
    """
    if size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    kind = type(error) if isinstance(error, JBRError) else RankError
    failures = gather(None if error is None else (kind, str(error)))
    if error is not None:
        raise error
    for number, failure in enumerate(failures):
        if failure is not None:
            raise failure[0](f"On rank {number}: {failure[1]}")


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with _watched("gathering"):
        dist.all_gather_object(found, value)
    return found


def _accelerated() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _place() -> torch.device:
    """The device on which the backend needs tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


@contextlib.contextmanager
def _watched(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place = f"Rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "This rank"
        raise RankError(
            f"{place} lost the others while {what}: one has ended, or did not answer in time. Its own output says why. "
            f"({str(error).splitlines()[0]})"
        ) from error
