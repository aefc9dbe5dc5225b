"""Removal as a perturbation: dw = -w_S, one fixed change of rank one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError
from jbrprune.structure.groups import Group, Selection, removed_channels
from jbrprune.structure.slicing import masked_units
from jbrprune.tpv.covariances import Change, FiniteRank


@dataclass(frozen=True, eq=False)
class Removed(FiniteRank):
    """C = w_S w_S^T, and how the model really computes without S.

    Attributes:
        mask: Model -> context in which it computes without S; None where w + dw is just that.
    """

    mask: Callable[[nn.Module], AbstractContextManager[object]] | None = None

    def applied(self, model: nn.Module) -> AbstractContextManager[object] | None:
        """The context, if there is one."""
        return None if self.mask is None else self.mask(model)


@dataclass(frozen=True, eq=False)
class Removal:
    r"""Pruning as a perturbation: dw = -w_S; TPV = E_x \|J(x) w_S\|^2, C = w_S w_S^T has rank one.

    Units go with what their consumers read of them (the columns of the next layers' weights): counting the same unit
    in every layer that holds a part of it would count its effect several times. Then f(w + dw) is the model without the
    units, but for norms over channels, which the empirical form computes over those that stay.

    Args:
        what: Parameter name -> mask of its shape (False: removed); or, with ``groups``, group name -> units that go;
            or a report (or result) of `jbrprune.prune` that removed units.
        groups: The units of the dense model, from `jbrprune.structure.discovery.find_groups`.

    Raises:
        ArgumentError: Nothing is removed; units without ``groups``; when it meets a model: masks or units that are not
            the model's.

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
        removed = self._removed()
        if not isinstance(removed, Mapping) or not removed:
            raise ArgumentError(
                f"There is nothing to remove in {type(self.what).__name__}: pass name -> mask, or group -> units with "
                "`groups`, or a report of prune() that removed channels or heads."
            )
        if self.groups is None and not all(isinstance(m, Tensor) and m.dim() for m in removed.values()):
            raise ArgumentError(
                "Units need `groups=`, the units of the dense model (jbrprune.structure.discovery.find_groups)."
            )

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Removed:
        """The covariance of these weights."""
        removed = self._removed()
        if self.groups is None:
            return Removed([_masked_change(removed, weights)], fixed=True)
        selection = _checked_units(removed, self.groups)
        change = _columns_change(model, weights, self.groups, selection)
        return Removed([change], True, partial(masked_units, groups=self.groups, selection=selection))

    def _removed(self) -> Any:
        report = getattr(self.what, "report", self.what)
        return getattr(report, "removed", report)


def _masked_change(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Change:
    for name, mask in masks.items():
        if name not in weights or mask.shape != weights[name].shape:
            there = (
                f"is {list(weights[name].shape)}" if name in weights else "is not a parameter that is perturbed here"
            )
            raise ArgumentError(f"The mask of {name} has shape {list(mask.shape)}, but {name} {there}.")
    return {name: -(weights[name] * (mask == 0).to(weights[name])) for name, mask in masks.items()}


def _checked_units(removed: Mapping[str, object], groups: Sequence[Group]) -> Selection:
    sizes = {group.name: group.size for group in groups}
    units = {name: torch.as_tensor(u, dtype=torch.long).flatten().unique() for name, u in removed.items()}
    for name, some in units.items():
        if name not in sizes:
            raise ArgumentError(f"There is no group {name!r}; the groups are {', '.join(sizes)}.")
        if some.numel() and not 0 <= int(some.min()) <= int(some.max()) < sizes[name]:
            raise ArgumentError(f"{name} has units 0 to {sizes[name] - 1}, got {int(some.min())} to {int(some.max())}.")
    return units


def _columns_change(
    model: nn.Module, weights: Mapping[str, Tensor], groups: Sequence[Group], selection: Selection
) -> Change:
    """Minus what the consumers' weights read of the channels that go."""
    unread = [g.name for g in groups if g.name in selection and len(selection[g.name]) and not g.side("in")]
    if unread:
        raise ArgumentError(f"No layer reads the units of {unread[0]}: their removal is not a change of weights.")
    names = {id(p): name for name, p in model.named_parameters()}
    change: dict[str, Tensor] = {}
    for (name, side, _), channels in removed_channels(groups, selection).items():
        if side != "in":
            continue
        module = model.get_submodule(name)
        own = names.get(id(module.weight))
        if own is None or own not in weights:
            raise ArgumentError(
                f"{name}.weight is not a plain parameter that is perturbed here, but the units that go are read by it."
            )
        change[own] = change.get(own, torch.zeros_like(weights[own])) - _read(module, weights[own], channels)
    return change


def _read(module: nn.Module, weight: Tensor, channels: Tensor) -> Tensor:
    """The weight where it reads these input channels, zero elsewhere."""
    keep = torch.zeros_like(weight)
    channels = channels.to(weight.device)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        keep[channels] = 1
    elif isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        each = module.in_channels // module.groups
        keep.unflatten(0, (module.groups, -1))[channels // each, :, channels % each] = 1
    else:
        keep[:, channels] = 1
    return weight * keep
