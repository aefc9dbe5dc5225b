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

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from jbrprune.errors import ArgumentError
from jbrprune.functions import Call, Convolution

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
    for part, factors in _by_group(sums, [_factors(*call, samples) for call in calls], place):
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
    sample_bytes = 4 * max(_bytes(gradient, samples) for _, gradient in calls)
    plan = _plan(place, samples, 1, sample_bytes, 8 * sums.numel(), _cache(sums, place), samples)
    for start in range(0, samples, plan.chunk):
        stop = min(samples, start + plan.chunk)
        total = sums.new_zeros(stop - start, *sums.shape)
        for (call, gradient), kind in zip(calls, kinds):
            values = _taken(gradient, samples, start, stop)
            if kind == "weight":
                values = values * call.plain(_taken(call.input, samples, start, stop)).to(values.dtype)  # type: ignore[misc]
            total += _over_positions(values, stop - start, sums.shape, call.channels_first)
        sums += total.square_().sum(0)


def _over_positions(values: Tensor, samples: int, shape: torch.Size, channels_first: bool) -> Tensor:
    """``[samples, *shape]`` sums over positions."""
    if channels_first:
        return values.reshape(samples, len(values) // samples, shape[0], -1).sum((1, 3))
    return values.reshape(samples, -1, *shape).sum(1)


@dataclass(frozen=True, eq=False)
class Factors:
    """What the gradients G_n of ``samples`` samples are made from: gradient and input of the function, or vice versa.

    Attributes:
        left: ``[samples * q, rows, *positions]``; for a linear layer ``[samples * q, *positions, rows]``.
        right: ``[samples * q, columns, *positions]``; for a linear layer with channels last.
        geometry: None for a linear layer.
        samples: Samples in both.
    """

    left: Tensor
    right: Tensor
    geometry: Convolution | None
    samples: int

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for a linear layer."""
        return 1 if self.geometry is None else self.geometry.groups

    @property
    def taps(self) -> int:
        """Places of the kernel; 1 for a linear layer."""
        return 1 if self.geometry is None else math.prod(self.geometry.kernel)

    @property
    def positions(self) -> int:
        """Positions per sample over which a product of factors is summed."""
        return self.left.numel() // self.left.shape[1 if self.geometry else -1] // self.samples

    @property
    def pointwise(self) -> bool:
        """Every position of the output reads one position of the input."""
        return self.geometry is None or (self.taps == 1 and not any(map(any, self.geometry.padding)))

    def part(self, start: int, stop: int) -> Factors:
        """Some of the samples, in the dtype of the arithmetic."""
        left, right = (_taken(t, self.samples, start, stop) for t in (self.left, self.right))
        return replace(self, left=left, right=right, samples=stop - start)

    def group(self, index: int) -> Factors:
        """One group of a grouped convolution, as an ungrouped one."""
        left, right = (t.chunk(self.groups, 1)[index] for t in (self.left, self.right))
        return replace(self, left=left, right=right, geometry=replace(self.geometry, groups=1))  # type: ignore[type-var]


def _factors(call: Call, gradient: Tensor, samples: int) -> Factors:
    swapped = call.convolution is not None and call.convolution.transposed
    left, right = (call.input, gradient) if swapped else (gradient, call.input)
    return Factors(left, right, call.convolution, samples)


def _by_group(sums: Tensor, factors: Sequence[Factors], place: Place) -> Iterable[tuple[Tensor, Sequence[Factors]]]:
    """The sums as a matrix: its rows are those of the weight, or the groups of a grouped convolution.

    A convolution with large groups is taken apart, group by group.
    """
    groups = factors[0].groups
    if groups == 1:
        return [(sums.view(len(sums), -1), factors)]
    each = sums.view(groups, -1)
    if each.shape[1] * _width(factors[0].left) <= _cache(sums, place) // 4:
        return [(each, factors)]
    rows = len(sums) // groups
    return [(each[i].view(rows, -1), [f.group(i) for f in factors]) for i in range(groups)]


def add_matrix_squares(sums: Tensor, factors: Sequence[Factors], samples: int, place: Place) -> None:
    """``sums [rows, columns] += sum_n G_n^2``, G_n the sum over ``factors``, in blocks."""
    width, cache = _width(factors[0].left), _cache(sums, place)
    flat = all(f.groups == 1 and (f.pointwise or f.positions <= UNFOLDED_POSITIONS) for f in factors)
    positions = sum(f.positions for f in factors)
    few = flat and positions <= FEW_POSITIONS
    sample_bytes = sum(_copied(f, flat) for f in factors) * min(2, len(factors))  # twice where several are joined
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
        left, right = _matrices(factors)
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
        self.left, self.right = _matrices(factors)
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
        self.factors = [_evenly_padded(f) for f in factors]  # and contiguous, so that the gradients are
        self.together = plan.samples

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows (or groups)."""
        total: Tensor | None = None
        samples = self.factors[0].samples
        for n in range(0, samples, self.together):
            first, *others = (f.part(n, min(samples, n + self.together)) for f in self.factors)
            block = _kernel_gradients(first, start, stop)
            for other in others:
                block += _kernel_gradients(other, start, stop)
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


_KERNEL_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def _kernel_gradients(factors: Factors, start: int, stop: int) -> Tensor:
    """``[samples, stop - start, columns]`` some rows (or groups, where there are several) of every G_n."""
    geometry: Convolution = factors.geometry  # type: ignore[assignment]
    samples, small, big, running = factors.samples, factors.left, factors.right, 1
    if geometry.groups == 1:
        small = small[:, start:stop]
    else:
        small, big = (_groups_of(t, geometry.groups, start, stop) for t in (small, big))
        running = stop - start
    small, big = (t.unflatten(0, (samples, -1)).transpose(0, 1).flatten(1, 2) for t in (small, big))
    shape = (small.shape[1], big.shape[1] // (samples * running), *geometry.kernel)
    padding = [before for before, _ in geometry.padding]
    gradient = _KERNEL_GRADIENTS[len(geometry.kernel)]
    found = gradient(big, shape, small, geometry.stride, padding, geometry.dilation, samples * running)  # type: ignore[arg-type]
    return found.reshape(samples, stop - start, -1)


def _groups_of(tensor: Tensor, groups: int, start: int, stop: int) -> Tensor:
    each = tensor.shape[1] // groups
    return tensor[:, start * each : stop * each]


def _matrices(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """``[n, rows, K]`` and ``[n, K, columns]`` with G_n their product; several uses lie side by side in K."""
    left, right = zip(*map(_matrix_pair, factors))
    return (left[0], right[0]) if len(factors) == 1 else (torch.cat(left, 2), torch.cat(right, 1))


def _matrix_pair(factors: Factors) -> tuple[Tensor, Tensor]:
    n, left, right = factors.samples, factors.left, factors.right
    if factors.geometry is None:
        return left.reshape(n, -1, left.shape[-1]).mT, right.reshape(n, -1, right.shape[-1])
    right = _unfolded(right, factors.geometry, tuple(left.shape[2:]))
    left, right = (t.unflatten(0, (n, -1)).transpose(1, 2).flatten(2) for t in (left, right))
    return left, right.mT


def _unfolded(big: Tensor, geometry: Convolution, positions: tuple[int, ...]) -> Tensor:
    """``[N, C * taps, *positions]`` what the kernel reads at every position."""
    big = _padded(big, geometry.padding)
    steps = list(zip(geometry.stride, geometry.dilation, positions))
    taps = [
        big[(..., *(slice(o * d, o * d + s * (p - 1) + 1, s) for o, (s, d, p) in zip(offsets, steps)))]
        for offsets in itertools.product(*map(range, geometry.kernel))
    ]
    return taps[0] if len(taps) == 1 else torch.stack(taps, 2).flatten(1, 2)


def _evenly_padded(factors: Factors) -> Factors:
    """Pad here what PyTorch's gradient cannot: it pads both sides alike."""
    geometry: Convolution = factors.geometry  # type: ignore[assignment]
    right = factors.right
    if any(before != behind for before, behind in geometry.padding):
        right = _padded(right, geometry.padding)
        geometry = replace(geometry, padding=tuple((0, 0) for _ in geometry.padding))
    return replace(factors, left=factors.left.contiguous(), right=right.contiguous(), geometry=geometry)


def _padded(big: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    """Zeros around the map; negative padding crops."""
    return F.pad(big, [p for pair in padding[::-1] for p in pair]) if any(map(any, padding)) else big


def _taken(tensor: Tensor, samples: int, start: int, stop: int) -> Tensor:
    """The rows of some samples, in the dtype of the arithmetic: float64 stays, all else becomes float32."""
    rows = len(tensor) // samples
    return tensor[start * rows : stop * rows].to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _copied(factors: Factors, flat: bool) -> int:
    """Bytes of copies per sample, at most: in another dtype, in another layout, padded, unfolded."""
    left, right = (_bytes(t, factors.samples) for t in (factors.left, factors.right))
    if factors.geometry is None or factors.pointwise:
        return 2 * (left + right)
    sizes = factors.right.shape[2:]
    padded = math.prod(n + sum(p) for n, p in zip(sizes, factors.geometry.padding)) * right // math.prod(sizes)
    unfolded = factors.right.shape[1] * _width(factors.right) * factors.taps * factors.positions
    return 2 * (left + right + unfolded) + padded if flat else 3 * left + 2 * right + padded


def _width(tensor: Tensor) -> int:
    """Bytes of a number in the dtype of the arithmetic."""
    return 8 if tensor.dtype == torch.float64 else 4


def _bytes(tensor: Tensor, samples: int) -> int:
    return tensor.numel() // samples * _width(tensor)


def _cache(tensor: Tensor, place: Place) -> int:
    """Wanted size of a block: what stays in the cache of a CPU; elsewhere, fewer and larger calls."""
    return CACHE_BYTES if tensor.device.type == "cpu" else max(CACHE_BYTES, place.max_memory // 16)
