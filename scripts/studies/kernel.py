"""Label noise in closed form at any width: through the ``N x N`` tangent kernel instead of the ``N x P`` Jacobian.

A net f that learns ``f(x) + noise`` by squared error (summed over outputs, averaged over n samples) with a proximity
penalty ``lambda ||w - w*||^2`` moves, to first order, by

    dw = (J^T J / n + lambda)^-1 J^T noise / n = J^T (J J^T + n lambda)^-1 noise

so that its output at x changes by ``k(x) (K + n lambda)^-1 noise``, with ``K = J J^T`` on the training inputs and
``k(x) = J(x) J^T``. With ``K = sum_i s_i v_i v_i^T`` and noise of variance 1 the prediction variance is

    TPV = mean_x ||(K + n lambda)^-1 k(x)||^2 = sum_i G_i / (s_i + n lambda)^2,    G_i = mean_x (k(x) v_i)^2

On the training inputs ``G_i = s_i^2 / n``: without penalty, and with more parameters than samples, the net repeats the
noise and TPV is the variance of the noise, whatever the net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    parts = [
        (delta @ other_delta.T) * (a @ other_a.T + 1)
        for (a, delta), (other_a, other_delta) in zip(rows, columns, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _factors(model: nn.Sequential, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and gradient of the output of every linear layer, at every sample, float64."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.enable_grad():
        x = inputs
        for layer in model:
            before, x = x, layer(x)
            if isinstance(layer, nn.Linear):
                kept.append((before, x))
        if x.shape[1] != 1:
            raise ArgumentError(f"The kernel is for nets with one output, this one has {x.shape[1]}.")
        deltas = torch.autograd.grad(x.sum(), [found for _, found in kept])  # samples do not meet: one row each
    return [(a.detach().double(), delta.double()) for (a, _), delta in zip(kept, deltas, strict=True)]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of K, and what the points to predict at see of its eigenvectors.

    Attributes:
        values: ``s_i``, ``[n]``.
        seen: ``G_i`` of each set of points, ``[n]``.
    """

    values: Tensor
    seen: tuple[Tensor, ...]

    def label_noise(self, penalty: float) -> list[float]:
        """TPV for noise of variance 1, of each set of points.

        Args:
            penalty: ``lambda``.
        """
        shrunk = (self.values + len(self.values) * penalty).square()
        return [(seen / shrunk).sum().item() for seen in self.seen]

    def dimension(self, penalty: float) -> float:
        """How many directions of the noise are learnt: ``sum_i s_i / (s_i + n lambda)``."""
        return (self.values / (self.values + len(self.values) * penalty)).sum().item()


def spectrum(model: nn.Sequential, train: Tensor, points: Sequence[Tensor]) -> Spectrum:
    """Of the net's kernel on the training inputs, seen from each set of points."""
    values, vectors = torch.linalg.eigh(kernel(model, train, train))
    seen = tuple((kernel(model, one, train) @ vectors).square().mean(0) for one in points)
    return Spectrum(values.clamp_min(0), seen)
