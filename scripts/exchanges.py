"""The messages of jbrprune's phases, call by call: what `jbrprune.distributed` says, without saying it.

Every function here is the twin of one there; `simulate_scale.py --measure` and the tests compare them with what real
ranks send.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from network import Message
from workload import Workload

from jbrprune.data.batches import Batch
from jbrprune.repair.repair import MOST_VALUES, ROWS

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""
LARGEST_CRC = 2**32 - 1


def pickled(value: object) -> int:
    """Bytes of an object on the wire."""
    return len(pickle.dumps(value))


def gathered(*values: object) -> list[Message]:
    """``distributed.gathered``: the longest of the ranks' objects counts."""
    return [Message("all_gather", 8), Message("all_gather", max(pickled(value) for value in values))]


def checksum(batches: Iterable[Batch]) -> int:
    """``distributed.Parts``: the CRC of all images that were read."""
    seen = 0
    for batch in batches:
        seen = zlib.crc32(batch.images.contiguous().numpy().tobytes(), seen)
    return seen


def told(size: int) -> list[Message]:
    """``distributed.same`` of an object of so many bytes."""
    return [Message("broadcast", 8), Message("broadcast", size)]


def all_sum(forms: Mapping[str, Form]) -> list[Message]:
    """``distributed.all_sum``: the forms, then every tensor added up and told once more, for equal bits."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in forms.values()]
    return gathered(dict(forms)) + [Message(kind, size) for size in sizes for kind in ("all_reduce", "broadcast")]


def concatenated(lengths: Sequence[int], width: int) -> list[Message]:
    """``distributed.concatenated`` of ``[length, width]`` tensors in single precision."""
    return gathered(*lengths) + all_sum({"": ((sum(lengths), width), torch.float32)})


def scoring(units: Mapping[str, int], *, seen: int | None = LARGEST_CRC) -> list[Message]:
    """A scoring of a list of batches, whose CRC the ranks compare; None: of a tensor, they do not."""
    found = gathered(None)
    found += gathered(seen) if seen is not None else []
    found += all_sum({"numbers": ((2,), torch.int64)})
    return found + all_sum({name: ((size,), torch.float64) for name, size in units.items()})


def evaluation(images: int, classes: int) -> list[Message]:
    """``measure.predict``: the logits of all images on all ranks."""
    return gathered(None) + all_sum({"logits": ((images, classes), torch.float32)})


def tpv(images: int, batch: int, ranks: int, *, seen: int = LARGEST_CRC) -> list[Message]:
    """`trace_form` by random signs: after every round of batches all know all values, and may stop.

    Without a look at how far first order holds.
    """
    starts = list(range(0, images, batch))
    found = []
    for first in range(0, len(starts), ranks):
        own = starts[first : first + ranks]
        values = [(start, torch.zeros(min(batch, images - start), dtype=torch.float64)) for start in own]
        found += gathered(None) + gathered(*values)
    found += told(pickled(("projection", 1)))
    found += gathered(None) + gathered(None) + gathered(seen)  # nobody has any more
    return found + gathered(None) + told(pickled(None))


def repair_images(images: int, image: tuple[int, int, int]) -> int:
    """Images that the repair really looks at."""
    return min(images, max(1, MOST_VALUES // math.prod(image)))


def rows_by_rank(images: int, positions: int, ranks: int) -> list[int]:
    """Rows of a least-squares problem that every rank has of its own; none where images are fewer than ranks."""
    per_image = min(positions, max(1, ROWS // images))
    return [per_image * (images // ranks + (rank < images % ranks)) for rank in range(ranks if images >= ranks else 0)]


def combinations(norms: bool) -> list[tuple[str, ...]]:
    """What ``repair="auto"`` tries, of a model with batch norms or without."""
    return [("batch_norm",), ("batch_norm", "least_squares")] if norms else [("mean_shift",), ("least_squares",)]


def repair(work: Workload, images: int, gate: int, ranks: int) -> list[Message]:
    """``record_targets`` and ``repaired`` of one step, with ``repair="auto"``."""
    images = repair_images(images, work.image)
    found = [m for before, _ in work.norms for m in _moments(before)]
    found += evaluation(gate, work.classes)
    for methods in combinations(bool(work.norms)):
        found += [m for _, after in work.norms for m in _moments(after)] if "batch_norm" in methods else []
        for consumer in work.consumers if methods != ("batch_norm",) else ():
            rows = rows_by_rank(images, consumer.positions, ranks)
            found += concatenated(rows, consumer.fan_in) + concatenated(rows, consumer.outputs) if rows else []
        found += evaluation(gate, work.classes)
    return found + [Message("broadcast", size) for size in work.pruned_state]


def _moments(channels: int) -> list[Message]:
    """``repair._moments``: sums, then squares about the mean of all."""
    wide = torch.float64
    return all_sum({"mean": ((channels,), wide), "n": ((), wide)}) + all_sum({"var": ((channels,), wide)})


def parameter_gathers(parameters: Iterable[int], shards: int, wire: int, passes: int) -> list[Message]:
    """Of sharded parameters: an all-gather for every block and pass."""
    return [Message("all_gather", math.ceil(count * wire / shards)) for count in parameters for _ in range(passes)]
