r"""What a perturbation of the weights is: a covariance C that answers two questions.

``quadratic(gradients)`` -> ``[B]`` g^T C g of every sample, which the trace form E_x sum_k J_k C J_k^T is made of;
``sample(generator)`` -> one draw of dw, name -> tensor, which the empirical form E \|f(w + dw) - f(w)\|^2 is made of.
Anything with these two methods is a covariance:

    class Half:
        def quadratic(self, gradients):
            return gradients.square_norms({"head.weight": 0.25})

        def sample(self, generator):
            return {"head.weight": 0.5 * torch.randn(10, 192, generator=generator)}

`Isotropic`, `Quantization` and the others do not know a model yet: their ``of(model, weights)`` gives the covariance.
A covariance may say more: ``directions``, a finite list of d with C = sum d d^T, for which J C J^T is computed exactly
by Jacobian-vector products; ``fixed``, that every draw is the same; ``applied(model)``, a context in which the model is
really perturbed, where w + dw is not the perturbation itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from jbrprune.criteria.passes import check_known
from jbrprune.errors import ArgumentError
from jbrprune.tpv.gradients import Gradients

Change = Mapping[str, Tensor]
"""Parameter name -> dw of the parameter's shape; parameters without a name stay as they are."""
Granularity = Literal["tensor", "channel", "global"]
GRANULARITIES = ("tensor", "channel", "global")


@runtime_checkable
class Covariance(Protocol):
    """C of a perturbation dw of the weights."""

    def quadratic(self, gradients: Gradients) -> Tensor:
        """``[B]`` g^T C g of every sample."""
        ...

    def sample(self, generator: torch.Generator) -> Change:
        """One draw of dw."""
        ...


@runtime_checkable
class Perturbation(Protocol):
    """A covariance that does not know its model yet."""

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Covariance:
        """The covariance of these weights: those that are perturbed, by name, without a graph."""
        ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    """C = diag(c): every weight by itself.

    Attributes:
        variances: Name -> c, a number or a tensor that broadcasts to the weight.
        weights: Name -> the weight, for its shape, dtype and device.
        law: Distribution of the draws: normal, or uniform with the same variance.
    """

    variances: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    law: Literal["normal", "uniform"] = "normal"

    def quadratic(self, gradients: Gradients) -> Tensor:
        """``[B]`` sum_j c_j g_j^2."""
        return gradients.square_norms(self.variances)

    def sample(self, generator: torch.Generator) -> Change:
        """dw_j with mean 0 and variance c_j."""
        return {name: self._drawn(self.weights[name], c, generator) for name, c in self.variances.items()}

    def _drawn(self, weight: Tensor, variance: Tensor, generator: torch.Generator) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self.law == "normal":
            unit = torch.randn(weight.shape, generator=generator, dtype=dtype)
        else:
            unit = (torch.rand(weight.shape, generator=generator, dtype=dtype) - 0.5) * 12**0.5
        return (unit.to(weight.device) * variance.sqrt().to(weight.device, dtype)).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class FiniteRank:
    """C = sum_r d_r d_r^T.

    Attributes:
        directions: d_1, d_2, ...
        fixed: There is one direction, and it is the perturbation itself: every draw is d_1, without a sign.
    """

    directions: Sequence[Change]
    fixed: bool = False

    def quadratic(self, gradients: Gradients) -> Tensor:
        """``[B]`` sum_r (g^T d_r)^2."""
        return torch.stack([gradients.inner(d).square() for d in self.directions]).sum(0)

    def sample(self, generator: torch.Generator) -> Change:
        """sum_r e_r d_r with standard normal e; d_1 where the perturbation is fixed."""
        if self.fixed:
            return self.directions[0]
        factors = torch.randn(len(self.directions), generator=generator).tolist()
        names = dict.fromkeys(name for d in self.directions for name in d)
        return {
            name: sum(e * d[name] for e, d in zip(factors, self.directions) if name in d)  # type: ignore[misc]
            for name in names
        }


@dataclass(frozen=True)
class Isotropic:
    r"""C = sigma^2 I: Gaussian noise on every weight; TPV = sigma^2 E_x \|J(x)\|_F^2.

    Args:
        sigma: Standard deviation.

    Raises:
        ArgumentError: It is not a positive number.

    Example:
        >>> Isotropic(0.01)
        Isotropic(sigma=0.01)
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ArgumentError(
                f"sigma must be a positive number, got {self.sigma}: a perturbation without variance changes nothing."
            )

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Diagonal:
        """The covariance of these weights."""
        return Diagonal(dict.fromkeys(weights, torch.tensor(self.sigma, dtype=torch.float64).square()), weights)


@dataclass(frozen=True)
class Quantization:
    r"""Uniform quantization to ``bits`` bits with the step delta = (max w - min w) / (2^bits - 1).

    As noise (default): dw uniform in [-delta/2, delta/2], C = delta^2/12 I within what shares a range. With
    ``rounding``: dw = round(w) - w on the grid min w + k delta, which is one fixed change of rank one.

    Args:
        bits: Bits of a weight, 1 to 24.
        granularity: What shares a range: every ``tensor``; every ``channel`` (output, dimension 0; tensors of one
            dimension as a whole); or all that is perturbed (``global``, as in the published code).
        rounding: Really round, in the place of the noise that models it.

    Raises:
        ArgumentError: Bits out of range, or an unknown granularity.

    Source:
        Arpit, arXiv 2512.11089, section on finite precision.

    Example:
        >>> covariance = Quantization(1).of(nn.Identity(), {"w": torch.tensor([0.0, 3.0])})
        >>> covariance.variances["w"]  # 3^2 / 12
        tensor(0.7500, dtype=torch.float64)
    """

    bits: int
    granularity: Granularity = "tensor"
    rounding: bool = False

    def __post_init__(self) -> None:
        check_known("granularity", self.granularity, GRANULARITIES)
        if not 1 <= self.bits <= 24 or self.bits != int(self.bits):
            raise ArgumentError(f"bits must be a whole number from 1 to 24, got {self.bits}.")

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Covariance:
        """The covariance of these weights."""
        ranges = {name: self._range(weight, weights) for name, weight in weights.items()}
        steps = {name: (high - low) / (2**self.bits - 1) for name, (low, high) in ranges.items()}
        if not self.rounding:
            return Diagonal({name: step.square() / 12 for name, step in steps.items()}, weights, "uniform")
        change = {name: _rounded(w, ranges[name][0], steps[name]) - w for name, w in weights.items()}
        return FiniteRank([change], fixed=True)

    def _range(self, weight: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Least and largest weight, in float64; for channels ``[out, 1, ...]``."""
        if self.granularity == "global":
            every = [torch.stack(w.aminmax()).double().cpu() for w in weights.values()]
            return torch.stack(every).min(), torch.stack(every).max()
        if self.granularity == "channel" and weight.dim() > 1:
            dims = tuple(range(1, weight.dim()))
            return weight.amin(dims, keepdim=True).double(), weight.amax(dims, keepdim=True).double()
        low, high = weight.aminmax()
        return low.double(), high.double()


def _rounded(weight: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """The nearest point of the grid low + k step; the weight itself where all weights are equal."""
    low, step = low.to(weight.device), step.to(weight.device)
    grid = low + torch.round((weight.double() - low) / step) * step
    return torch.where(step > 0, grid, weight.double()).to(weight.dtype)
