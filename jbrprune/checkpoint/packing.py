"""Sparse tensors as the values that are kept and one bit per entry that says where they are.

Exact, whatever the dtype: what counts as zero is a tensor's bits, so -0.0 and NaN are values like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jbrprune.errors import ArgumentError

# Integers of the same size, through which the bits of a floating tensor are read.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def packed(tensor: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values that are kept, and where they are.

    Args:
        tensor: Any tensor; a floating one if there is no mask.
        mask: Of its shape, not zero where the value is kept; default: where a bit of the value is set.

    Returns:
        The values in row-major order ``[kept]``, of the tensor's dtype, and a bitmap ``[ceil(entries / 8)]`` of
        uint8, entry 0 in the lowest bit of byte 0, zero beyond the last entry. Both on the CPU.

    Example:
        >>> values, bitmap = packed(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> values.tolist(), bitmap.tolist()
        ([2.0, 3.0], [6])
    """
    flat = tensor.detach().cpu().flatten()
    kept = (set_bits(tensor) if mask is None else mask.detach().bool()).cpu().flatten()
    return flat[kept], torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))


def unpacked(values: Tensor, bitmap: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that was `packed`, zero where no value was kept.

    Args:
        values: ``[kept]``.
        bitmap: ``[ceil(entries / 8)]``.
        shape: Of the tensor.
        dtype: Of the tensor and the values.

    Raises:
        ArgumentError: The parts do not belong together; nothing was allocated then.

    Example:
        >>> unpacked(torch.tensor([2.0, 3.0]), torch.tensor([6], dtype=torch.uint8), (2, 2), torch.float32)
        tensor([[0., 2.],
                [3., 0.]])
    """
    if values.dim() != 1 or values.dtype != dtype:
        raise ArgumentError(f"the values are {values.dtype} of shape {tuple(values.shape)}, expected a row of {dtype}")
    check_bitmap(bitmap, math.prod(shape), len(values))
    # Assigning a single value by index goes through a Python number, which loses the payload of a NaN.
    return torch.zeros(tuple(shape), dtype=dtype).masked_scatter_(unpacked_mask(bitmap, shape), values)


def unpacked_mask(bitmap: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask of this shape that a bitmap, accepted by `check_bitmap`, stands for."""
    bits = np.unpackbits(bitmap.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))


def check_bitmap(bitmap: Tensor, entries: int, kept: int) -> None:
    """See that a bitmap marks so many of so many entries, without unpacking it.

    Raises:
        ArgumentError: Its length, the number of its ones, or the bits beyond the last entry are wrong.
    """
    expected = bitmap_bytes(entries)
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != (expected,):
        raise ArgumentError(
            f"the bitmap is {bitmap.dtype} of shape {tuple(bitmap.shape)}, {entries} entries need {expected} bytes"
        )
    if entries % 8 and int(bitmap[-1]) >> entries % 8:
        raise ArgumentError(f"the bitmap has ones beyond its {entries} entries")
    ones = int(_ONES[bitmap.numpy()].sum(dtype=np.int64))
    if ones != kept:
        raise ArgumentError(f"the bitmap marks {ones} entries, but there are {kept} values")


def set_bits(tensor: Tensor) -> Tensor:
    """Where any bit of a floating tensor is set: everywhere but at +0.0."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()]) != 0


def bitmap_bytes(entries: int) -> int:
    """Bytes of one bit per entry."""
    return -(-entries // 8)


def packed_bytes(tensor: Tensor, kept: int) -> int:
    """Bytes of a tensor of which so many entries are kept: packed, or dense where that is not larger.

    Formula: min(entries * itemsize, kept * itemsize + ceil(entries / 8)). A saved mask costs its bit per entry in
    any case.

    Example:
        >>> packed_bytes(torch.empty(64, 100), 640), packed_bytes(torch.empty(64, 100), 6400)
        (3360, 25600)
    """
    size = tensor.element_size()
    return min(tensor.numel() * size, kept * size + bitmap_bytes(tensor.numel()))
