"""Per-sample weight gradients G_n = D_n A_n^T, formed, squared and added up in blocks that stay in the cache.

===================================  ===================================================================
one position (linear on vectors)     G_n^2 = d_n^2 (a_n^2)^T: summed over samples, one product of squared factors
up to `FEW_POSITIONS`                the same over pairs of positions: (sum_t d_t a_t)^2 = sum_ts (d_t d_s)(a_t a_s)
tokens, 1x1 convolutions             one matrix product per sample and block of rows
other convolutions, small maps       the same, on unfolded inputs
other convolutions                   PyTorch's own weight gradient, one sample and a block of rows at a time
norm scales, biases                  sums over positions
===================================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jbrprune.criteria.factors import (
    Factors,
    bytes_per_sample,
    copied_bytes,
    evenly_padded,
    factors_of,
    kernel_gradients,
    matrices,
    over_positions,
    taken,
    width_of,
)
from jbrprune.criteria.functions import Call
from jbrprune.errors import ArgumentError

CACHE_BYTES = 1 << 21
"""A block of per-sample gradients is about this large on a CPU, so that it is squared where it was formed."""
FEW_POSITIONS = 4
"""Up to here pairs of positions are cheaper than one matrix product per sample."""
SMALL_ELEMENTS = 1 << 15
"""Below, squares of many samples are summed by one call; above, one call per sample moves less memory."""
UNFOLDED_POSITIONS = 64
"""Up to here the inputs of a k x k convolution are unfolded; above, the copy costs more than it brings."""


@dataclass(frozen=True)
class Place:
    """For whom memory is planned, and how much there is."""

    name: str
    max_memory: int


def add_squares(
    sums: Tensor, calls: Sequence[tuple[Call, Tensor]], kinds: Sequence[str], samples: int, place: Place
) -> None:
    """``sums += sum_n G_n^2``, G_n the gradient of one parameter on sample n, summed over all calls that read it.

    Args:
        sums: The parameter's shape; added to in place.
        calls: The calls, each with the gradient of its output.
        kinds: What the parameter is to each call: ``weight`` or ``bias``.
        samples: Samples in the batch.
        place: Name of the parameter, and the memory there is.

    Raises:
        ArgumentError: Not even one row of the gradient of one sample fits into the memory.
    """
    if "bias" in kinds or any(call.plain for call, _ in calls):
        _add_vector_squares(sums, calls, kinds, samples, place)
        return
    for part, factors in _by_group(sums, [factors_of(*call, samples) for call in calls], place):
        add_matrix_squares(part, factors, samples, place)


@dataclass(frozen=True)
class _Plan:
    """Block sizes: ``chunk`` samples are copied, ``samples`` of them form ``rows`` rows of G_n at once."""

    chunk: int
    samples: int
    rows: int
    bytes: int


def _plan(place: Place, samples: int, rows: int, sample_bytes: int, row_bytes: int, cache: int, together: int) -> _Plan:
    """Choose block sizes.

    Scratch memory is chunk * sample_bytes + (samples + 3) * rows * row_bytes: the copies, the block, its sum over
    samples, and that sum in float64.

    Args:
        place: Name of the parameter, and the cap.
        samples: Samples in the batch.
        rows: Rows of G_n.
        sample_bytes: Copies made of one sample's activations and gradients, at most.
        row_bytes: One row of one G_n.
        cache: Wanted size of a block.
        together: Samples in one block, at most.

    Raises:
        ArgumentError: Not even one row of one sample fits.
    """
    free = place.max_memory - sample_bytes
    fitting = free // (4 * row_bytes)
    if fitting < 1:
        raise ArgumentError(
            f"max_memory={place.max_memory} is too small: {place.name} needs {sample_bytes + 4 * row_bytes} bytes for "
            "one row of the gradient of one sample. Raise max_memory, or put this parameter into `ignore`."
        )
    taken = max(1, min(rows, cache // row_bytes, fitting))
    taken = taken // 16 * 16 if 16 < taken < rows else taken  # vector kernels like whole multiples
    block = taken * row_bytes
    most = min(samples, together, cache // block, (free - 3 * block) // (block + sample_bytes))
    block_samples = max(1, most) if taken == rows else 1
    copies = min(32 * cache, place.max_memory - (block_samples + 3) * block)
    chunk = max(block_samples, min(samples, copies // max(1, sample_bytes)))
    return _Plan(chunk, block_samples, taken, chunk * sample_bytes + (block_samples + 3) * block)


def _add_vector_squares(
    sums: Tensor, calls: Sequence[tuple[Call, Tensor]], kinds: Sequence[str], samples: int, place: Place
) -> None:
    """Norm scales and biases: a parameter's gradient is a sum over positions."""
    sample_bytes = 4 * max(bytes_per_sample(gradient, samples) for _, gradient in calls)
    plan = _plan(place, samples, 1, sample_bytes, 8 * sums.numel(), _cache(sums, place), samples)
    for start in range(0, samples, plan.chunk):
        stop = min(samples, start + plan.chunk)
        total = sums.new_zeros(stop - start, *sums.shape)
        for (call, gradient), kind in zip(calls, kinds):
            values = taken(gradient, samples, start, stop)
            if kind == "weight":
                values = values * call.plain(taken(call.input, samples, start, stop)).to(values.dtype)  # type: ignore[misc]
            total += over_positions(values, stop - start, sums.shape, call.channels_first)
        sums += total.square_().sum(0)


def _by_group(sums: Tensor, factors: Sequence[Factors], place: Place) -> Iterable[tuple[Tensor, Sequence[Factors]]]:
    """The sums as a matrix: its rows are those of the weight, or the groups of a grouped convolution.

    A convolution with large groups is taken apart, group by group.
    """
    groups = factors[0].groups
    if groups == 1:
        return [(sums.view(len(sums), -1), factors)]
    each = sums.view(groups, -1)
    if each.shape[1] * width_of(factors[0].left) <= _cache(sums, place) // 4:
        return [(each, factors)]
    rows = len(sums) // groups
    return [(each[i].view(rows, -1), [f.group(i) for f in factors]) for i in range(groups)]


def add_matrix_squares(sums: Tensor, factors: Sequence[Factors], samples: int, place: Place) -> None:
    """``sums [rows, columns] += sum_n G_n^2``, G_n the sum over ``factors``, in blocks."""
    width, cache = width_of(factors[0].left), _cache(sums, place)
    flat = all(f.groups == 1 and (f.pointwise or f.positions <= UNFOLDED_POSITIONS) for f in factors)
    positions = sum(f.positions for f in factors)
    few = flat and positions <= FEW_POSITIONS
    sample_bytes = sum(copied_bytes(f, flat) for f in factors) * min(2, len(factors))  # twice where several are joined
    together = samples
    if few:
        sample_bytes += positions * (positions + 1) * sum(sums.shape) * width
    elif not flat:  # samples become groups of one convolution; worth it only while their maps stay in the cache
        together = cache // sample_bytes if factors[0].groups > 1 else 1
    plan = _plan(place, samples, len(sums), sample_bytes, sums.shape[1] * width, cache, together)
    for start in range(0, samples, plan.chunk):
        parts = [f.part(start, min(samples, start + plan.chunk)) for f in factors]
        blocks = (_Pairs if few else _Products if flat else _Kernels)(parts, plan)
        for row in range(0, len(sums), plan.rows):
            some = sums[row : row + plan.rows]
            some += blocks.squares(row, row + len(some))


class _Pairs:
    """Few positions: (sum_t d_t a_t)^2 = sum_ts (d_t d_s)(a_t a_s), one product over samples and pairs."""

    def __init__(self, factors: Sequence[Factors], plan: _Plan) -> None:
        left, right = matrices(factors)
        t, s = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
        times = torch.where(t == s, 1, 2).to(left)
        self.left = left[:, :, t].mul_(left[:, :, s]).mul_(times).permute(1, 0, 2).flatten(1)
        self.right = right[:, t].mul_(right[:, s]).flatten(0, 1)

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows."""
        return torch.mm(self.left[start:stop], self.right).clamp_min_(0)  # rounding may fall below zero


class _Products:
    """Matrix products G_n = left_n right_n."""

    def __init__(self, factors: Sequence[Factors], plan: _Plan) -> None:
        self.left, self.right = matrices(factors)
        self.together = plan.samples
        self.scratch = self.left.new_empty(plan.samples * plan.rows * self.right.shape[2])

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows."""
        left = self.left[:, start:stop]
        total = left.new_zeros(stop - start, self.right.shape[2])
        for d, a in zip(left.split(self.together), self.right.split(self.together)):
            out = self.scratch[: len(d) * total.numel()].view(len(d), *total.shape)
            _accumulate(total, torch.bmm(d, a, out=out))
        return total


class _Kernels:
    """Weight gradients of convolutions; the samples of a block become groups of one call."""

    def __init__(self, factors: Sequence[Factors], plan: _Plan) -> None:
        self.factors = [evenly_padded(f) for f in factors]  # and contiguous, so that the gradients are
        self.together = plan.samples

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows (or groups)."""
        total: Tensor | None = None
        samples = self.factors[0].samples
        for n in range(0, samples, self.together):
            first, *others = (f.part(n, min(samples, n + self.together)) for f in self.factors)
            block = kernel_gradients(first, start, stop)
            for other in others:
                block += kernel_gradients(other, start, stop)
            total = block.new_zeros(block.shape[1:]) if total is None else total
            _accumulate(total, block)
        return total  # type: ignore[return-value]


def _accumulate(total: Tensor, block: Tensor) -> None:
    """``total += sum_n block_n^2``; the block is overwritten."""
    if total.numel() < SMALL_ELEMENTS < block.numel():
        total += block.square_().sum(0)
        return
    for gradient in block.unbind():
        total.addcmul_(gradient, gradient)


def _cache(tensor: Tensor, place: Place) -> int:
    """Wanted size of a block: what stays in the cache of a CPU; elsewhere, fewer and larger calls."""
    return CACHE_BYTES if tensor.device.type == "cpu" else max(CACHE_BYTES, place.max_memory // 16)
