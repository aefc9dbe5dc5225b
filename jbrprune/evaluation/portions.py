"""Batches that do not fit into memory go through in smaller portions; what is summed over samples does not change."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from jbrprune.data.batches import Batch
from jbrprune.errors import MemoryLimitError

log = logging.getLogger(__name__)

T = TypeVar("T")

_CPU_MESSAGES = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|could not (create|execute) a primitive(?! desc)"
)
"""Of the allocator, of C++, and of oneDNN, which says no more when its scratch memory cannot be had."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: of an accelerator, of the CPU (a plain RuntimeError), or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGES.search(str(error)) is not None


class Portions:
    """How many samples go through a model at once: all, until memory runs out, then half as many, and so on."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self._proven = 0

    def run(
        self,
        batch: Batch,
        work: Callable[[Batch, int], T],
        mark: Callable[[], Callable[[], None]] | None = None,
    ) -> list[T]:
        """What ``work(portion, number of samples before it)`` gives for every portion of a batch.

        Args:
            batch: The samples.
            work: May run out of memory.
            mark: For work that leaves something behind: called before a portion that is larger than any that went
                through; what it returns undoes a portion that was begun.

        Raises:
            MemoryLimitError: Not even one sample fits.
        """
        results: list[T] = []
        start = 0
        while start < len(batch):
            stop = min(len(batch), start + (self.limit or len(batch)))
            part = batch.map(lambda tensor, start=start, stop=stop: tensor[start:stop])
            undo = mark() if mark is not None and len(part) > self._proven else None
            problem = None
            try:
                results.append(work(part, start))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).strip().partition("\n")[0] or type(error).__name__
            if problem is None:
                self._proven = max(self._proven, len(part))
                start = stop
                continue
            # Not before here: the exception kept the frames, and so the activations, alive.
            if undo is not None:
                undo()
            self._halve(len(part), problem, possible=mark is None or undo is not None)
        return results

    def _halve(self, samples: int, problem: str, *, possible: bool) -> None:
        if samples == 1:
            raise MemoryLimitError(
                f"Memory ran out with a single image: {problem}. Use smaller images, a device with more memory, or "
                "autocast=torch.bfloat16; other programs may hold memory as well."
            )
        if not possible:
            raise MemoryLimitError(
                f"Memory ran out with {samples} images although as many went through before: {problem}. Other programs "
                f"may hold memory. Begin again with batch_size={samples // 2}."
            )
        self.limit = samples // 2
        log.warning("Memory ran out with %d images at once (%s); going on with %d.", samples, problem, self.limit)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
