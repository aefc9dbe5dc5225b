"""Packing: exact for every bit pattern, against a loop over entries; every disagreement of the parts refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jbrprune.checkpoint.description import pack, packed_bytes, set_bits, unpack
from jbrprune.errors import CheckpointError

FLOATS = {torch.float16: np.int16, torch.bfloat16: np.int16, torch.float32: np.int32, torch.float64: np.int64}
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def _bytes(tensor: Tensor) -> bytes:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()]).numpy().tobytes()


def _slow(tensor: Tensor, mask: Tensor | None) -> tuple[bytes, list[int]]:
    """Entry by entry, bit by bit."""
    size, data = tensor.element_size(), _bytes(tensor)
    entries = [data[at : at + size] for at in range(0, len(data), size)]
    keep = [any(entry) for entry in entries] if mask is None else [bool(item) for item in mask.flatten().tolist()]
    bitmap = [0] * math.ceil(len(entries) / 8)
    for at, kept in enumerate(keep):
        bitmap[at // 8] += kept * 2 ** (at % 8)
    return b"".join(entry for entry, kept in zip(entries, keep, strict=True) if kept), bitmap


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bit patterns, NaN with payload and subnormal numbers among them; many zeros."""
    dtype = draw(st.sampled_from(list(FLOATS)))
    shape, integer = draw(SHAPES), np.iinfo(FLOATS[dtype])
    count = math.prod(shape)
    special = st.sampled_from([0, 0, 0, integer.min, 1])
    bits = draw(st.lists(special | st.integers(integer.min, integer.max), min_size=count, max_size=count))
    return torch.from_numpy(np.array(bits, dtype=integer.dtype)).view(dtype).reshape(shape)


@settings(deadline=None, max_examples=200)
@given(tensor=tensors(), masked=st.booleans(), seed=st.integers(0, 9))
def test_packing_is_exact(tensor: Tensor, masked: bool, seed: int) -> None:
    mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.4 if masked else None
    values, bitmap = pack(tensor, set_bits(tensor) if mask is None else mask)
    assert (_bytes(values), bitmap.tolist()) == _slow(tensor, mask)
    assert (values.dtype, bitmap.dtype) == (tensor.dtype, torch.uint8)
    back, kept = unpack(values, bitmap, tensor.shape)
    expected = tensor if mask is None else torch.where(mask, tensor, 0)
    assert back.shape == tensor.shape
    assert _bytes(back) == _bytes(expected)
    assert torch.equal(kept, set_bits(tensor) if mask is None else mask)


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_and_nan_are_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, math.nan, -math.inf, 0.0], dtype=dtype)
    values, bitmap = pack(tensor, set_bits(tensor))
    assert bitmap.tolist() == [0b01110]
    assert _bytes(unpack(values, bitmap, (5,))[0]) == _bytes(tensor)


def test_any_layout_is_read_row_by_row() -> None:
    tensor = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = (tensor % 3 == 0).contiguous()
    for strided, keep in ((tensor, mask), (tensor[:, 1:], mask[:, 1:]), (tensor.mT, mask.mT)):
        values, bitmap = pack(strided, keep)
        assert values.tolist() == [value for value in strided.flatten().tolist() if value % 3 == 0]
        assert torch.equal(unpack(values, bitmap, strided.shape)[0], torch.where(keep, strided, 0))


def test_a_parameter_on_the_way_of_gradients_is_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    values, _ = pack(weight * 2, torch.ones(3, dtype=torch.bool))
    values += 1
    assert weight.tolist() == [1, 1, 1]
    assert not values.requires_grad


VALUES = torch.ones(3)
WRONG = {
    "more values": (torch.ones(4), [0b0111, 0], "marks 3 entries, but there are 10 entries and 4 values"),
    "one value": (torch.ones(1), [0b0111, 0], "marks 3 entries, but there are 10 entries and 1 values"),
    "no value": (torch.ones(0), [0, 0b10], "marks 1 entries, but there are 10 entries and 0 values"),
    "shorter": (VALUES, [0b0111], "w: the bitmap marks 3 entries, but there are 10 entries"),
    "beyond": (VALUES, [0b0011, 0b100], "marks 3 entries, but there are 10 entries and 3 values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unpacking_refuses_parts_that_do_not_belong_together(case: str) -> None:
    values, bitmap, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        unpack(values, torch.tensor(bitmap, dtype=torch.uint8), (2, 5), "w")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kept", [0, 1, 40, 99, 100])
def test_packed_bytes_are_those_of_the_parts_or_of_the_tensor(dtype: torch.dtype, kept: int) -> None:
    tensor = torch.zeros(10, 10, dtype=dtype)
    tensor.view(-1)[:kept] = 1
    parts = sum(len(_bytes(part)) for part in pack(tensor, set_bits(tensor)))
    assert packed_bytes(tensor, kept) == min(parts, len(_bytes(tensor)))
