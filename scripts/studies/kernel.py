"""Label noise in closed form at any width: through the ``N x N`` tangent kernel instead of the ``N x P`` Jacobian.

A net f that learns ``f(x) + noise`` by squared error (summed over outputs, averaged over n samples) with a proximity
penalty ``lambda ||w - w*||^2`` moves, to first order, by

    dw = (J^T J / n + lambda)^-1 J^T noise / n = J^T (J J^T + n lambda)^-1 noise

so that its output at x changes by ``k(x) (K + n lambda)^-1 noise``, with ``K = J J^T`` on the training inputs and
``k(x) = J(x) J^T``. With ``K = sum_i s_i v_i v_i^T`` and noise of variance 1 the prediction variance is

    TPV = mean_x ||(K + n lambda)^-1 k(x)||^2 = sum_i G_i / (s_i + n lambda)^2,    G_i = mean_x (k(x) v_i)^2

On the training inputs ``G_i = s_i^2 / n``: without penalty TPV is the rank of K over n times the variance of the noise,
for any net. That is the variance itself where there are more parameters than samples and the net repeats the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError

PENALTIES = {"label_noise": 1e-2, "repeated_noise": 0.0}
"""Label noise: penalty as a multiple of the mean squared norm of a gradient."""


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
    """Eigenvalues of K, and how sets of points to predict at see its eigenvectors.

    Attributes:
        values: ``s_i``, ``[n]``, ascending.
        vectors: ``v_i`` as columns, ``[n, n]``.
        seen: ``k(x) v_i`` for each set of points, ``[M, n]``.
    """

    values: Tensor
    vectors: Tensor
    seen: tuple[Tensor, ...]

    def label_noise(self, penalty: float) -> list[float]:
        """TPV for noise of variance 1, on each set of points.

        Args:
            penalty: ``lambda``.
        """
        return [(points * self._inverse(penalty)).square().sum(1).mean().item() for points in self.seen]

    def response(self, noise: Tensor, penalty: float) -> list[Tensor]:
        """First-order change of the outputs, ``[M]`` for each set of points.

        Args:
            noise: Of the training targets, ``[n]``.
            penalty: ``lambda``.
        """
        parts = (self.vectors.T @ noise.double()) * self._inverse(penalty)
        return [points @ parts for points in self.seen]

    def dimension(self, penalty: float) -> float:
        """How many directions of the noise are learnt: ``sum_i s_i / (s_i + n lambda)``."""
        return (self.values * self._inverse(penalty)).sum().item()

    def _inverse(self, penalty: float) -> Tensor:
        """``1 / (s_i + n lambda)``; 0 where the net cannot move at all (``s_i = 0``)."""
        return torch.where(self.values > 0, 1 / (self.values + len(self.values) * penalty), 0.0)


def spectrum(model: nn.Sequential, train: Tensor, points: Sequence[Tensor]) -> Spectrum:
    """Of the net's kernel on the training inputs, seen from each set of points; eigenvalues of rounding size are 0."""
    values, vectors = torch.linalg.eigh(kernel(model, train, train))
    values = torch.where(values > 1e-12 * values[-1], values, 0.0)
    return Spectrum(values, vectors, tuple(kernel(model, one, train) @ vectors for one in points))


def label_noise(model: nn.Sequential, sides: Mapping[str, Tensor]) -> dict[str, float]:
    """TPV for label noise of variance 1 at each of `PENALTIES`, as ``NAME_train`` and ``NAME_test``."""
    seen = spectrum(model, sides["train"], tuple(sides.values()))
    found = {}
    for name, penalty in PENALTIES.items():
        values = seen.label_noise(penalty * seen.values.mean().item())
        found |= {f"{name}_{side}": value for side, value in zip(sides, values, strict=True)}
    return found
