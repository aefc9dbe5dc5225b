r"""Norms of per-sample weight gradients G_n = D_n A_n^T, without keeping the gradients.

==============================  ======================================================================================
few positions T                 \|sum_t d_t a_t^T\|^2 = sum_ts (d_t . d_s)(a_t . a_s), two products of T x T per sample
many positions                  G_n itself, in blocks that stay in the cache; of convolutions PyTorch's weight gradient
norm scales, biases             sums over positions
==============================  ======================================================================================

The first two cost T^2 (d + a) and T d a multiplications; the cheaper one is taken (Goodfellow, arXiv 1510.01799; Li et
al., ICLR 2022; Bu et al., NeurIPS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jbrprune.criteria.factors import (
    Factors,
    copied_bytes,
    evenly_padded,
    factors_of,
    kernel_gradients,
    matrices,
    over_positions,
    taken,
    wide,
    width_of,
)
from jbrprune.criteria.functions import Call

CACHE_BYTES = 1 << 21
"""A block of per-sample gradients is about this large on a CPU, so that it is summed where it was formed."""
COPY_BYTES = 1 << 26
"""Copies of activations and gradients of one layer, at most, unless one sample takes more."""
UNFOLDED_POSITIONS = 64
"""Up to here the inputs of a k x k convolution are unfolded; above, the copy costs more than it brings."""
GRAM_OVERHEAD = 1.0
"""How much dearer a multiplication in the T x T products is than one in the gradient itself."""


@dataclass(frozen=True, eq=False)
class Used:
    """One use of a parameter.

    Attributes:
        call: The call that reads it; None for ``bare``.
        kind: What the parameter is to the call: ``weight`` or ``bias``; ``bare``: the gradient is the parameter's own.
        gradient: Of the call's output; for ``bare``, ``[samples, *shape]``.
    """

    call: Call | None
    kind: str
    gradient: Tensor


def square_norms(uses: Sequence[Used], samples: int, variance: Tensor, shape: torch.Size) -> Tensor:
    r"""``[samples]`` sum_j c_j G_nj^2, G_n the gradient of one parameter on sample n, summed over its uses.

    Args:
        uses: All calls that read the parameter.
        samples: Samples in the batch.
        variance: c, of a shape that broadcasts to the parameter's. One number, or one per row (dimension 0), costs no
            more than the norm; a full tensor needs the gradients themselves.
        shape: The parameter's shape.
    """
    matrix = all(map(_is_matrix, uses))
    rows = variance.numel() == 1 or variance.shape == (shape[0], *(1 for _ in shape[1:]))
    if matrix and rows:
        factors = [factors_of(use.call, use.gradient, samples) for use in uses]  # type: ignore[arg-type]
        if variance.numel() > 1:
            scale = variance.flatten().sqrt()
            return _matrix_norms([_scaled(f, scale) for f in factors], samples, shape)
        return _matrix_norms(factors, samples, shape) * variance.reshape(())
    each = max(math.prod(shape), *(use.gradient.numel() // samples for use in uses))
    step = max(1, _cache(uses[0].gradient) // (8 * each))
    parts = []
    for start in range(0, samples, step):
        gradients = per_sample(uses, samples, shape, start, min(samples, start + step))
        parts.append((gradients.square_() * variance).flatten(1).sum(1, dtype=wide(gradients.device)))
    return torch.cat(parts)


def per_sample(uses: Sequence[Used], samples: int, shape: torch.Size, start: int, stop: int) -> Tensor:
    """``[stop - start, *shape]`` the gradient of one parameter on some samples, summed over its uses."""
    total: Tensor | None = None
    for use in uses:
        found = _gradients(use, samples, shape, start, stop)
        total = found if total is None else total.add_(found)
    return total  # type: ignore[return-value]


def _gradients(use: Used, samples: int, shape: torch.Size, start: int, stop: int) -> Tensor:
    call = use.call
    if call is None:
        return use.gradient[start:stop].clone()
    if _is_matrix(use):
        factors = factors_of(call, use.gradient, samples).part(start, stop)
        if factors.groups == 1 and factors.pointwise:
            left, right = matrices([factors])
            return torch.bmm(left, right).view(-1, *shape)
        even = evenly_padded(factors)
        every = factors.groups if factors.groups > 1 else shape[0]
        parts = [kernel_gradients(even.part(n, n + 1), 0, every) for n in range(stop - start)]
        return torch.cat(parts).view(-1, *shape)
    values = taken(use.gradient, samples, start, stop)
    if use.kind == "weight":
        seen = taken(call.input, samples, start, stop).to(call.input.dtype)  # that of the norm's statistics
        values = values * call.plain(seen).to(values.dtype)  # type: ignore[misc]
    return over_positions(values, stop - start, shape, call.channels_first)


def _is_matrix(use: Used) -> bool:
    return use.call is not None and use.kind == "weight" and use.call.plain is None


def _scaled(factors: Factors, scale: Tensor) -> Factors:
    """The rows of G_n times a number each."""
    trailing = (1,) * (factors.left.dim() - 2) if factors.geometry else ()
    return replace(factors, left=factors.left * scale.to(factors.left).view(-1, *trailing))


def _matrix_norms(factors: Sequence[Factors], samples: int, shape: torch.Size) -> Tensor:
    """``[samples]`` squared norms of G_n, in chunks whose copies stay small."""
    rows, columns = shape[0], math.prod(shape[1:])
    positions = sum(f.positions for f in factors)
    whole = all(f.groups == 1 for f in factors)
    gram = whole and GRAM_OVERHEAD * positions * (rows + columns) < rows * columns
    flat = whole and (gram or all(f.pointwise or f.positions <= UNFOLDED_POSITIONS for f in factors))
    copies = sum(copied_bytes(f, flat) for f in factors) * min(2, len(factors))
    chunk = max(1, min(samples, COPY_BYTES // max(1, copies)))
    form = _grams if gram else _products if flat else _kernels
    parts = [[f.part(n, min(samples, n + chunk)) for f in factors] for n in range(0, samples, chunk)]
    return torch.cat([form(part) for part in parts])


def _grams(factors: Sequence[Factors]) -> Tensor:
    left, right = matrices(factors)
    if left.shape[2] == 1:
        return left.square().sum((1, 2), dtype=wide(left.device)) * right.square().sum((1, 2), dtype=wide(left.device))
    product = torch.bmm(left.mT, left).mul_(torch.bmm(right, right.mT))
    return product.sum((1, 2), dtype=wide(left.device)).clamp_min_(0)  # rounding may fall below zero


def _products(factors: Sequence[Factors]) -> Tensor:
    left, right = matrices(factors)
    samples, rows, columns = len(left), left.shape[1], right.shape[2]
    cache = _cache(left)
    step = max(1, min(rows, cache // (columns * width_of(left))))
    together = max(1, cache // (step * columns * width_of(left)))
    total = left.new_zeros(samples, dtype=wide(left.device))
    for n in range(0, samples, together):
        some = slice(n, n + together)
        for row in range(0, rows, step):
            total[some] += _summed(torch.bmm(left[some, row : row + step], right[some]))
    return total


def _kernels(factors: Sequence[Factors]) -> Tensor:
    factors = [evenly_padded(f) for f in factors]  # and contiguous, so that the gradients are
    first = factors[0]
    every = first.groups if first.groups > 1 else first.left.shape[1]
    # Samples become groups of one convolution; worth it only while their maps stay in the cache.
    together = max(1, _cache(first.left) // max(1, copied_bytes(first, False))) if first.groups > 1 else 1
    parts = []
    for n in range(0, first.samples, together):
        some = [f.part(n, min(first.samples, n + together)) for f in factors]
        block = kernel_gradients(some[0], 0, every)
        for other in some[1:]:
            block += kernel_gradients(other, 0, every)
        parts.append(_summed(block))
    return torch.cat(parts)


def _summed(block: Tensor) -> Tensor:
    """``[n]`` sums of squares of ``[n, ...]``; every row in the arithmetic's dtype, their sum in the widest."""
    return torch.linalg.vector_norm(block, dim=tuple(range(2, block.dim()))).to(wide(block.device)).square_().sum(1)


def _cache(tensor: Tensor) -> int:
    """Wanted size of a block: what stays in the cache of a CPU; elsewhere, fewer and larger calls."""
    return CACHE_BYTES if tensor.device.type == "cpu" else 16 * CACHE_BYTES
