"""The two factors of a layer's gradient on one sample, G_n = left_n right_n, and how they are multiplied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from jbrprune.criteria.functions import Call, Convolution


def wide(device: torch.device) -> torch.dtype:
    """The widest dtype for sums that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


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
        left, right = (taken(t, self.samples, start, stop) for t in (self.left, self.right))
        return replace(self, left=left, right=right, samples=stop - start)

    def group(self, index: int) -> Factors:
        """One group of a grouped convolution, as an ungrouped one."""
        left, right = (t.chunk(self.groups, 1)[index] for t in (self.left, self.right))
        return replace(self, left=left, right=right, geometry=replace(self.geometry, groups=1))  # type: ignore[type-var]


def factors_of(call: Call, gradient: Tensor, samples: int) -> Factors:
    """The factors of a call of a linear layer or a convolution, with the gradient of its output."""
    swapped = call.convolution is not None and call.convolution.transposed
    left, right = (call.input, gradient) if swapped else (gradient, call.input)
    return Factors(left, right, call.convolution, samples)


def over_positions(values: Tensor, samples: int, shape: torch.Size, channels_first: bool) -> Tensor:
    """``[samples, *shape]`` sums over positions."""
    if channels_first:
        return values.reshape(samples, len(values) // samples, shape[0], -1).sum((1, 3))
    return values.reshape(samples, -1, *shape).sum(1)


_KERNEL_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def kernel_gradients(factors: Factors, start: int, stop: int) -> Tensor:
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


def matrices(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
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


def evenly_padded(factors: Factors) -> Factors:
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


def taken(tensor: Tensor, samples: int, start: int, stop: int) -> Tensor:
    """The rows of some samples, in the dtype of the arithmetic: float64 stays, all else becomes float32."""
    rows = len(tensor) // samples
    return tensor[start * rows : stop * rows].to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def copied_bytes(factors: Factors, flat: bool) -> int:
    """Bytes of copies per sample, at most: in another dtype, in another layout, padded, unfolded."""
    left, right = (bytes_per_sample(t, factors.samples) for t in (factors.left, factors.right))
    if factors.geometry is None or factors.pointwise:
        return 2 * (left + right)
    sizes = factors.right.shape[2:]
    padded = math.prod(n + sum(p) for n, p in zip(sizes, factors.geometry.padding)) * right // math.prod(sizes)
    unfolded = factors.right.shape[1] * width_of(factors.right) * factors.taps * factors.positions
    return 2 * (left + right + unfolded) + padded if flat else 3 * left + 2 * right + padded


def width_of(tensor: Tensor) -> int:
    """Bytes of a number in the dtype of the arithmetic."""
    return 8 if tensor.dtype == torch.float64 else 4


def bytes_per_sample(tensor: Tensor, samples: int) -> int:
    """Bytes of one sample's part of a tensor, in the dtype of the arithmetic."""
    return tensor.numel() // samples * width_of(tensor)
