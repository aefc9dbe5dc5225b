r"""Perturbations of the weights, each by its covariance C, which answers two questions.

``quadratic(gradients)`` -> ``[B]`` g^T C g of every sample: the trace form E_x sum_k J_k C J_k^T is made of these.
``sample(generator)`` -> one draw of dw, name -> tensor: the empirical form E \|f(w + dw) - f(w)\|^2 is made of these.
An object with these two methods is a covariance:

    class Half:
        def quadratic(self, gradients):
            return square_norms(gradients, {"head.weight": 0.25})

        def sample(self, generator):
            return {"head.weight": 0.5 * torch.randn(10, 192, generator=generator)}

`Isotropic`, `Quantization`, `Removal` and the perturbations of `jbrprune.tpv.noise` do not know a model yet: their
``of(model, weights)`` returns the covariance. A covariance may have further attributes: ``directions``, a finite list
of d with C = sum d d^T, for which J C J^T is exact by Jacobian-vector products; ``fixed``, True if every draw is the
same; ``by_draws``, True if drawing is cheaper than ``quadratic``; ``walked``, True if each draw follows from the one
before; ``applied(model)``, a context in which the model is perturbed, where that is not f(w + dw).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, check_known, unknown
from jbrprune.models import layers
from jbrprune.structure.groups import Group, removed_channels
from jbrprune.structure.slicing import masked_units

Change = Mapping[str, Tensor]
"""Parameter name -> dw of the parameter's shape; parameters without a name stay as they are."""
Gradients = Mapping[str, Tensor]
"""Parameter name -> ``[B, *shape]`` gradients g_n = J(x_n)^T m_n of a batch."""
Granularity = Literal["tensor", "channel", "global"]
"""Which weights share a range of quantization; see `Quantization`."""


@runtime_checkable
class Covariance(Protocol):
    """C of a perturbation dw of the weights."""

    def quadratic(self, gradients: Gradients) -> Tensor:
        """``[B]`` g^T C g of every sample."""
        ...

    def sample(self, generator: torch.Generator) -> Change:
        """One draw of dw."""
        ...


class Perturbation(Protocol):
    """A covariance that has not been given its model yet."""

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Covariance:
        """The covariance of the weights that are perturbed, given by name and without a graph."""
        ...


def square_norms(gradients: Gradients, variances: Mapping[str, float | Tensor]) -> Tensor:
    """``[B]`` sum over names and entries of c_j g_j^2, in float64.

    Args:
        gradients: Name -> ``[B, *shape]``.
        variances: Name -> c: a number, or a tensor that broadcasts to ``shape``. Parameters without a name do not vary.

    Raises:
        ArgumentError: The gradients have no such name, or c does not broadcast to the parameter's shape.

    Example:
        >>> square_norms({"w": torch.tensor([[3.0, 4.0]])}, {"w": 2.0})
        tensor([50.], dtype=torch.float64)
    """
    total = torch.zeros(len(next(iter(gradients.values()))), dtype=torch.float64)
    for name, variance in variances.items():
        if name not in gradients:
            raise unknown("parameter", name, gradients)
        g = gradients[name]
        c = torch.as_tensor(variance, dtype=torch.float64)
        try:
            c.expand(g.shape[1:])
        except RuntimeError as error:
            shapes = f"shape {list(c.shape)} for {name}, which is {list(g.shape[1:])}"
            raise ArgumentError(f"The covariance has variances of {shapes}: it is of another model.") from error
        c = c.reshape((1,) * (g.dim() - 1 - c.dim()) + c.shape)
        alike = [dim for dim, size in enumerate(c.shape, 1) if size == 1 and dim > 1]  # float32 is enough for one row
        wide = torch.promote_types(g.dtype, torch.float32)
        squares = (torch.linalg.vector_norm(g, dim=alike, keepdim=True, dtype=wide) if alike else g.to(wide)).square()
        total = total + (squares.double().cpu() * c.cpu()).reshape(len(g), -1).sum(1)
    return total


def inner(gradients: Gradients, change: Change) -> Tensor:
    """``[B]`` g^T d, in float64.

    Raises:
        ArgumentError: A name or shape is not that of a gradient.
    """
    check_change(change, {name: g[0] for name, g in gradients.items()})
    products = [(gradients[name].double() * d.double()).flatten(1).sum(1) for name, d in change.items()]
    return torch.stack(products).sum(0).cpu()


def check_change(change: Change, weights: Mapping[str, Tensor]) -> None:
    """Refuse a change of weights that was made for another model.

    Raises:
        ArgumentError: A name or shape is not that of a weight.
    """
    for name, d in change.items():
        if name not in weights:
            raise unknown("parameter", name, weights)
        if d.shape != weights[name].shape:
            shapes = f"shape {list(d.shape)} for {name}, which is {list(weights[name].shape)}"
            raise ArgumentError(f"The change of weights has {shapes}: it is of another model.")


@dataclass(frozen=True, eq=False)
class Diagonal:
    """C = diag(c): independent weights.

    Attributes:
        variances: Name -> c, a tensor that broadcasts to the weight.
        weights: Name -> the weight, for its shape, dtype and device.
        law: Distribution of the draws: normal, or uniform with the same variance.

    Raises:
        ArgumentError: A variance is negative or NaN.
    """

    variances: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    law: Literal["normal", "uniform"] = "normal"

    def __post_init__(self) -> None:
        for name, variance in self.variances.items():
            if not bool((variance >= 0).all()):
                raise ArgumentError(f"The covariance has negative (or NaN) variances for {name}.")

    def quadratic(self, gradients: Gradients) -> Tensor:
        """``[B]`` sum_j c_j g_j^2."""
        return square_norms(gradients, self.variances)

    def sample(self, generator: torch.Generator) -> Change:
        """dw_j with mean 0 and variance c_j."""
        change = {}
        for name, variance in self.variances.items():
            weight = self.weights[name]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if self.law == "normal":
                unit = torch.randn(weight.shape, generator=generator, dtype=dtype)
            else:
                unit = (torch.rand(weight.shape, generator=generator, dtype=dtype) - 0.5) * 12**0.5
            change[name] = (unit.to(weight.device) * variance.sqrt().to(weight.device, dtype)).to(weight.dtype)
        return change


@dataclass(frozen=True, eq=False)
class FiniteRank:
    """C = sum_r d_r d_r^T.

    Attributes:
        directions: d_1, d_2, ...
        fixed: There is one direction, and it is the perturbation itself: every draw is d_1, without a sign.
        applied: Model -> context in which the model is perturbed, where that is not f(w + d_1).
    """

    directions: Sequence[Change]
    fixed: bool = False
    applied: Callable[[nn.Module], AbstractContextManager[object]] | None = None

    def quadratic(self, gradients: Gradients) -> Tensor:
        """``[B]`` sum_r (g^T d_r)^2."""
        return torch.stack([inner(gradients, d).square() for d in self.directions]).sum(0)

    def sample(self, generator: torch.Generator) -> Change:
        """sum_r e_r d_r with standard normal e; d_1 where the perturbation is fixed."""
        if self.fixed:
            return self.directions[0]
        change: dict[str, Tensor] = {}
        for e, direction in zip(torch.randn(len(self.directions), generator=generator).tolist(), self.directions):
            for name, d in direction.items():
                change[name] = change[name] + e * d if name in change else e * d
        return change


@dataclass(frozen=True)
class Isotropic:
    r"""C = sigma^2 I: Gaussian noise on every weight; TPV = sigma^2 E_x \|J(x)\|_F^2.

    Args:
        sigma: Standard deviation, in units of the weights.

    Raises:
        ArgumentError: sigma is not a positive number.

    Example:
        >>> Isotropic(0.01)
        Isotropic(sigma=0.01)
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ArgumentError(f"sigma must be a positive number, got {self.sigma}.")

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Diagonal:
        """The covariance of these weights."""
        return Diagonal(dict.fromkeys(weights, torch.tensor(self.sigma, dtype=torch.float64).square()), weights)


@dataclass(frozen=True)
class Quantization:
    r"""Uniform quantization to ``bits`` bits with the step delta = (max w - min w) / (2^bits - 1).

    By default noise: dw uniform in [-delta/2, delta/2], C = delta^2/12 I over the weights that share a range. With
    ``rounding`` the fixed change dw = round(w) - w on the grid min w + k delta, of rank one.

    Args:
        bits: Bits of a weight, 1 to 24.
        granularity: The weights that share a range: those of a ``tensor``; those of a ``channel`` (dimension 0, the
            outputs; a tensor of one dimension has one range); or all perturbed weights (``global``, as in the published
            code).
        rounding: Round, instead of adding the noise that models rounding.

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
        check_known("granularity", self.granularity, get_args(Granularity))
        if not 1 <= self.bits <= 24 or self.bits != int(self.bits):
            raise ArgumentError(f"bits must be a whole number from 1 to 24, got {self.bits}.")

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Covariance:
        """The covariance of these weights."""

        def span(weight: Tensor) -> list[Tensor]:
            dims = tuple(range(1, weight.dim())) if self.granularity == "channel" else ()  # (): all
            return [f(weight, dims, keepdim=bool(dims)).double() for f in (torch.amin, torch.amax)]

        whole = span(torch.cat([w.flatten() for w in weights.values()])) if self.granularity == "global" else None
        variances, change = {}, {}
        for name, weight in weights.items():
            low, high = whole or span(weight)
            step, exact = (high - low) / (2**self.bits - 1), weight.double()
            variances[name] = step.square() / 12
            grid = torch.where(step > 0, low + torch.round((exact - low) / step) * step, exact)
            change[name] = grid.to(weight.dtype) - weight
        return FiniteRank([change], fixed=True) if self.rounding else Diagonal(variances, weights, "uniform")


@dataclass(frozen=True, eq=False)
class Removal:
    r"""Pruning as a perturbation: dw = -w_S; TPV = E_x \|J(x) w_S\|^2, C = w_S w_S^T has rank one.

    The w_S of a unit are the weights with which its consumers read it: adding every layer that holds a part of the unit
    would count one effect several times. f(w + dw) is then the model without the units, except for norms over channels,
    which the empirical form computes over the channels that stay.

    Args:
        what: Parameter name -> mask of its shape (False: removed); or, with ``groups``, group name -> units that go;
            or a report (or result) of `jbrprune.prune` that removed units.
        groups: The units of the dense model, from `jbrprune.structure.discovery.find_groups`.

    Raises:
        ArgumentError: Nothing is removed; units without ``groups``; in ``of``: masks or units of another model.

    Source:
        Arpit, arXiv 2512.11089, section on pruning.

    Example:
        >>> keep = torch.tensor([[True, False], [True, True]])
        >>> covariance = Removal({"weight": keep}).of(nn.Linear(2, 2), {"weight": torch.ones(2, 2)})
        >>> covariance.sample(torch.Generator())["weight"]
        tensor([[-0., -1.],
                [-0., -0.]])
    """

    what: object
    groups: Sequence[Group] | None = None

    def __post_init__(self) -> None:
        removed = self.removed
        named = isinstance(removed, Mapping) and len(removed) > 0
        if not named or (self.groups is None and not all(map(torch.is_tensor, removed.values()))):
            raise ArgumentError(
                "Removal needs parameter name -> mask; or group -> units (or a report of prune() that removed any) and "
                f"`groups=` of the dense model. There is nothing to remove in {type(self.what).__name__}, or no groups."
            )

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> FiniteRank:
        """The covariance of these weights."""
        removed = self.removed
        if self.groups is None:
            check_change(removed, weights)
            masked = {name: -(weights[name] * (mask == 0).to(weights[name])) for name, mask in removed.items()}
            return FiniteRank([masked], fixed=True)
        selection = check_units(removed, self.groups)
        for group in self.groups:
            if group.name in selection and not group.side("in"):
                raise ArgumentError(f"No layer reads {group.name}: its removal is not a change of weights.")
        names = {id(p): name for name, p in model.named_parameters()}
        masks: dict[str, Tensor] = {}  # several layers may share a weight
        for (layer, side, _), channels in removed_channels(self.groups, selection).items():
            if side != "in":
                continue
            module = model.get_submodule(layer)
            for tensor in (tensor for tensor in layers.channel_tensors(module, "in") if hasattr(module, tensor)):
                name = names.get(id(getattr(module, tensor)), "")
                if name not in weights:
                    raise ArgumentError(
                        f"{layer}.{tensor} reads the units that go, and is no parameter that is perturbed here."
                    )
                weight = weights[name]
                rows, columns = torch.arange(len(weight))[:, None], torch.arange(weight.shape[1])
                if isinstance(module, nn.modules.conv._ConvTransposeNd):
                    read = rows  # the input channel of every entry
                else:
                    read = rows // (len(weight) // getattr(module, "groups", 1)) * len(columns) + columns
                gone = torch.isin(read, channels.cpu()).view(*read.shape, *(1,) * (weight.dim() - 2))
                masks[name] = masks[name] | gone.expand_as(weight) if name in masks else gone.expand_as(weight)
        change = {name: -(gone.to(weights[name]) * weights[name]) for name, gone in masks.items()}
        return FiniteRank([change], True, partial(masked_units, groups=self.groups, selection=selection))

    @property
    def removed(self) -> Any:
        """Masks or units; those of the report, if a report or a result was given."""
        report = getattr(self.what, "report", self.what)
        return getattr(report, "removed", report)


def check_units(units: Mapping[str, Sequence[int] | Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
    """Group -> units, ascending, which must be units of these groups; groups without any are left out.

    Raises:
        ArgumentError: An unknown group, or a unit that a group does not have.
    """
    sizes, checked = {group.name: group.size for group in groups}, {}
    for name, given in units.items():
        if name not in sizes:
            raise unknown("group", name, sizes)
        chosen = torch.as_tensor(given, dtype=torch.long).flatten().unique()
        if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < sizes[name]:
            raise ArgumentError(
                f"{name} has units 0 to {sizes[name] - 1}, got {chosen.tolist()}. Units are counted in the dense model."
            )
        checked |= {name: chosen} if len(chosen) else {}
    return checked
