"""Where each type of module keeps its channels: which of its own tensors, along which dimension, in which groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from jbrprune.errors import ModelError
from jbrprune.structure.groups import Side

Sides = Mapping[Side, Tensor]
"""Side -> channels that go, ascending."""

_WIDTHS = ("num_features", "num_channels", "channels", "num_parameters")
"""Attributes by which modules of other libraries say how many channels they have."""


@dataclass(frozen=True)
class Channels:
    """The channels on one side of a module.

    Attributes:
        width: How many there are; None where the module does not say.
        dims: Own tensor -> dimension that holds them. Not every module of a type has all of these tensors.
    """

    width: int | None
    dims: Mapping[str, int]


@singledispatch
def channels(module: nn.Module) -> dict[Side, Channels]:
    """The sides on which a module has channels.

    Example:
        >>> sorted(channels(nn.Linear(4, 3)))
        ['in', 'out']
    """
    return {"out": Channels(_generic_width(module), _generic_dims(module))}


@channels.register
def _(module: _ConvNd) -> dict[Side, Channels]:
    out = Channels(module.out_channels, {"weight": 0, "bias": 0, "gain": 0})
    return {"out": out, "in": Channels(module.in_channels, {"weight": 1})}


@channels.register
def _(module: _ConvTransposeNd) -> dict[Side, Channels]:
    out = Channels(module.out_channels, {"weight": 1, "bias": 0})
    return {"out": out, "in": Channels(module.in_channels, {"weight": 0})}


@channels.register
def _(module: nn.Linear) -> dict[Side, Channels]:
    out = Channels(module.out_features, {"weight": 0, "bias": 0})
    return {"out": out, "in": Channels(module.in_features, {"weight": 1})}


@channels.register
def _(module: nn.Embedding) -> dict[Side, Channels]:
    return {"out": Channels(module.embedding_dim, {"weight": 1})}


@channels.register
def _(module: _NormBase) -> dict[Side, Channels]:
    return {"out": Channels(module.num_features, {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0})}


@channels.register
def _(module: nn.GroupNorm) -> dict[Side, Channels]:
    return {"out": Channels(module.num_channels, {"weight": 0, "bias": 0})}


@channels.register(nn.LayerNorm)
@channels.register(nn.RMSNorm)
def _(module: nn.LayerNorm | nn.RMSNorm) -> dict[Side, Channels]:
    last = len(module.normalized_shape) - 1
    return {"out": Channels(module.normalized_shape[-1], {"weight": last, "bias": last})}


def is_generic(module: nn.Module) -> bool:
    """Whether its type is not in the table, so that only the shapes of its tensors are known."""
    return channels.dispatch(type(module)) is channels.dispatch(nn.Module)


def _generic_dims(module: nn.Module) -> dict[str, int]:
    """Tensors with one value per channel, or one filter ``[channels, 1, ...]`` per channel."""
    dims = {}
    for name, tensor in own_tensors(module).items():
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if len(long) == 1:
            dims[name] = long[0]
        elif len(long) > 1 and tensor.dim() > 2 and tensor.shape[1] == 1:
            dims[name] = 0
        elif long:
            return {}
    return dims


def _generic_width(module: nn.Module) -> int | None:
    """Channels of a module of an unknown type; None where its tensors do not agree on one number."""
    own = own_tensors(module)
    sizes = {own[name].shape[dim] for name, dim in _generic_dims(module).items()}
    shape = getattr(module, "normalized_shape", None)
    if not own and isinstance(shape, tuple):
        return shape[-1]
    return sizes.pop() if len(sizes) == 1 else None


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself, by their own names."""
    pairs: Iterable[tuple[str, Tensor | None]] = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in pairs if tensor is not None}


# --- what goes with channels ----------------------------------------------------------------------


@singledispatch
def tensor_cuts(module: nn.Module, sides: Sides, where: str) -> dict[tuple[str, int], Tensor]:
    """Which indices of which own tensors go with channels.

    Args:
        module: The module.
        sides: Side -> channels that go, ascending.
        where: Name of the module, for messages.

    Returns:
        (own tensor, dimension) -> indices.

    Raises:
        ModelError: Part of a group would go, or the inputs of a group without its outputs.
    """
    return _cuts_of_dims(module, sides)


def _cuts_of_dims(module: nn.Module, sides: Sides) -> dict[tuple[str, int], Tensor]:
    known, own = channels(module), own_tensors(module)
    return {(name, dim): sides[side] for side in sides for name, dim in known[side].dims.items() if name in own}


@tensor_cuts.register
def _(module: nn.GroupNorm, sides: Sides, where: str) -> dict[tuple[str, int], Tensor]:
    if module.num_groups > 1:
        _whole_groups(sides["out"], module.num_channels // module.num_groups, f"{where} (GroupNorm), side 'out'")
    return _cuts_of_dims(module, sides)


@tensor_cuts.register
def _(module: _ConvNd, sides: Sides, where: str) -> dict[tuple[str, int], Tensor]:
    if module.groups == 1:
        return _cuts_of_dims(module, sides)
    groups = _groups_gone(module, sides, where)
    rows = module.weight.shape[0] // module.groups
    into = {("weight", 0): (groups[:, None] * rows + torch.arange(rows)).flatten()}
    return into | {(name, 0): sides["out"] for name in ("bias", "gain") if name in own_tensors(module)}


def _groups_gone(module: _ConvNd, sides: Sides, where: str) -> Tensor:
    """Groups of a grouped convolution that go, after checking that both sides say the same."""
    where = f"{where} ({type(module).__name__}, groups={module.groups})"
    if "out" not in sides:
        raise ModelError(
            f"{where}: only side 'in' was given; a group's inputs can go only together with its outputs. "
            "Name the 'out' channels of the same groups."
        )
    groups = _whole_groups(sides["out"], module.out_channels // module.groups, f"{where}, side 'out'")
    if "in" in sides:
        into = _whole_groups(sides["in"], module.in_channels // module.groups, f"{where}, side 'in'")
        if not torch.equal(groups, into):
            raise ModelError(
                f"{where}: side 'out' removes groups {groups.tolist()} but side 'in' removes {into.tolist()}. "
                "Both must name the same groups."
            )
    return groups


def _whole_groups(gone: Tensor, size: int, where: str) -> Tensor:
    """The groups of ``size`` channels that `gone` consists of."""
    groups, counts = torch.unique(gone // size, return_counts=True)
    if (counts != size).any():
        part = int(groups[counts != size][0])
        raise ModelError(
            f"{where}: group {part} would lose some of its {size} channels. Remove whole groups: channels "
            f"{part * size} to {part * size + size - 1} together."
        )
    return groups


# --- attributes -----------------------------------------------------------------------------------


@singledispatch
def refresh(module: nn.Module, *, width: int | None = None) -> None:
    """Set the attributes that say how wide a module is from the shapes of its tensors.

    Grouped convolutions and GroupNorm keep the number of channels per group they had.

    Args:
        module: The module, its tensors already replaced.
        width: Number of channels of a norm that has no tensors.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 3)
        >>> layer.weight = torch.nn.Parameter(torch.zeros(3, 2))
        >>> refresh(layer)
        >>> layer.in_features
        2
    """
    width = _generic_width(module) if width is None else width
    if width is None:
        return
    for name in _WIDTHS:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, width)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple):
        module.normalized_shape = (*shape[:-1], width)  # type: ignore[assignment]


@refresh.register
def _(module: _ConvNd, *, width: int | None = None) -> None:
    """Weight ``[out, in / groups, ...]``."""
    out, per_group = module.weight.shape[:2]
    groups = _new_groups(module.groups, module.out_channels, out)
    module.out_channels, module.in_channels, module.groups = out, groups * per_group, groups


@refresh.register
def _(module: _ConvTransposeNd, *, width: int | None = None) -> None:
    """Weight ``[in, out / groups, ...]``."""
    into, per_group = module.weight.shape[:2]
    groups = _new_groups(module.groups, module.in_channels, into)
    module.in_channels, module.out_channels, module.groups = into, groups * per_group, groups


@refresh.register
def _(module: nn.Linear, *, width: int | None = None) -> None:
    module.out_features, module.in_features = module.weight.shape


@refresh.register
def _(module: nn.Embedding, *, width: int | None = None) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


@refresh.register
def _(module: _NormBase, *, width: int | None = None) -> None:
    tensor = module.weight if module.weight is not None else module.running_mean
    if tensor is not None or width is not None:
        module.num_features = width if tensor is None else len(tensor)  # type: ignore[assignment]


@refresh.register(nn.LayerNorm)
@refresh.register(nn.RMSNorm)
def _(module: nn.LayerNorm | nn.RMSNorm, *, width: int | None = None) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif width is not None:
        module.normalized_shape = (*module.normalized_shape[:-1], width)


@refresh.register
def _(module: nn.GroupNorm, *, width: int | None = None) -> None:
    channels = len(module.weight) if module.weight is not None else width
    if channels is not None:
        module.num_groups = _new_groups(module.num_groups, module.num_channels, channels)
        module.num_channels = channels


def width_after(module: nn.Module, sides: Sides) -> int | None:
    """The ``width`` to `refresh` a module with: channels that stay, while its attributes are still the old ones.

    None where they did not change, or where the tensors of a module of an unknown type will tell.
    """
    out = channels(module)["out"]
    if "out" not in sides or out.width is None or (is_generic(module) and out.dims):
        return None
    return out.width - len(sides["out"])


def _new_groups(groups: int, channels: int, left: int) -> int:
    """Number of groups of the same size that are left; a single group stays one."""
    return 1 if groups == 1 else left // (channels // groups)
