"""Label noise in closed form at any width: through the ``N x N`` tangent kernel instead of the ``N x P`` Jacobian.

A net that learns ``f(x) + noise`` by squared error (summed over outputs, averaged over n samples) with a proximity
penalty ``lambda ||w - w*||^2`` moves, to first order, by

    dw = (J^T J / n + lambda)^-1 J^T noise / n = J^T (J J^T + n lambda)^-1 noise

so that its output at x changes by ``k(x) (K + n lambda)^-1 noise``, with ``K = J J^T`` on the training inputs and
``k(x) = J(x) J^T``. For noise of variance sigma^2 the prediction variance is

    TPV = sigma^2 mean_x ||(K + n lambda)^-1 k(x)||^2

Without penalty and with more parameters than samples the net repeats the noise: on the training inputs TPV is
sigma^2, whatever the net.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError


def kernel(model: nn.Sequential, first: Tensor, second: Tensor) -> Tensor:
    """``J(first) J(second)^T`` of a fully connected net with one output, ``[N, M]``, float64.

    The gradient of a linear layer's weight at one sample is ``delta a^T`` with ``delta`` the gradient of its output
    and ``a`` its input, that of its bias ``delta``: ``K = sum_layers (delta delta'^T) * (a a'^T + 1)``.

    Raises:
        ArgumentError: More than one output.
    """
    rows, columns = _factors(model, first), _factors(model, second)
    return sum(
        (delta @ other_delta.T) * (a @ other_a.T + 1)
        for (a, delta), (other_a, other_delta) in zip(rows, columns, strict=True)
    )  # type: ignore[return-value]


def _factors(model: nn.Sequential, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and gradient of the output of every linear layer, at every sample, float64."""
    kept: list[tuple[Tensor, Tensor]] = []
    x = inputs.requires_grad_(False)
    for layer in model:
        before, x = x, layer(x)
        if isinstance(layer, nn.Linear):
            kept.append((before, x))
    if x.shape[1] != 1:
        raise ArgumentError(f"The kernel is for nets with one output, this one has {x.shape[1]}.")
    deltas = torch.autograd.grad(x.sum(), [output for _, output in kept])  # samples do not meet: one row each
    return [(a.detach().double(), delta.double()) for (a, _), delta in zip(kept, deltas, strict=True)]


def label_noise(train: Tensor, points: Tensor, penalty: float) -> float:
    """TPV for noise of variance 1: ``mean_x ||(K + n penalty)^-1 k(x)||^2``.

    Args:
        train: ``K``, ``[n, n]``.
        points: ``k(x)`` as rows, ``[M, n]``; ``K`` itself for TPV on the training inputs.
        penalty: ``lambda``.
    """
    moved = torch.linalg.solve(train + len(train) * penalty * torch.eye(len(train), dtype=train.dtype), points.T)
    return moved.square().sum(0).mean().item()


def dimension(train: Tensor, penalty: float) -> float:
    """How many directions of the noise are learnt: ``trace K (K + n lambda)^-1``; n without a penalty."""
    values = torch.linalg.eigvalsh(train).clamp_min(0)
    return (values / (values + len(train) * penalty)).sum().item()
