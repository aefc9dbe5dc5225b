"""Removing channels of modules for good, and the same function without removing anything.

`remove_channels` makes a model physically smaller: it replaces parameters and buffers by what is left of
them, always in ascending order, and sets the attributes that tell how wide a layer is. `masked` makes the
un-shrunk model behave as the smaller one would, so that the two can be compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from jbrprune.errors import ModelError
from jbrprune.groups import Axis, Side
from jbrprune.guest import Hook, hooked

_Sides = Mapping[Side, Tensor]
_Cuts = Mapping[tuple[str, int], Tensor]
"""(own tensor of a module, dimension) -> indices that go."""

_WIDTHS = ("num_features", "num_channels", "channels", "num_parameters")
"""Attributes by which modules of other libraries say how many channels they have."""


def remove_channels(model: nn.Module, gone: Mapping[Axis, Tensor]) -> None:
    """Remove channels in place.

    What stays keeps its order. Parameters are replaced by new ones of the same dtype, device and
    ``requires_grad``, without gradient; a tensor that several modules share stays shared. Everything is
    checked, and every smaller tensor is made, before the first one is put into the model.

    Args:
        model: The model to shrink.
        gone: Axis -> ``[k]`` integer indices that go, without repetition. ``out`` of a grouped convolution
            takes whole groups together with their inputs; an ``in`` axis named as well must agree.

    Raises:
        ModelError: A name does not exist, a module has no such side, indices are out of range, repeated or
            all there are, part of a group would go, or two places that share a tensor disagree. The model
            is unchanged.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> remove_channels(net, {("0", "out", 0): torch.tensor([1]), ("1", "in", 0): torch.tensor([1])})
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    plan = _planned(model, gone)
    smaller = {key: _shrunk(plan.tensor[key], dims) for key, dims in plan.gone.items()}
    touched = _replace(model, smaller)
    for name, sides in plan.sides.items():
        module = model.get_submodule(name)
        touched.discard(module)
        refresh(module, width=_left(module, sides))
    for module in touched:
        if not _is_generic(module):
            refresh(module)


@contextlib.contextmanager
def masked(model: nn.Module, gone: Mapping[Axis, Tensor]) -> Iterator[None]:
    """Let the same, un-shrunk model compute what it would compute without the channels.

    Consumers (``in`` axes) see zeros in these channels; a norm over channels (``out`` of LayerNorm, RMSNorm,
    GroupNorm and their relatives) is computed over the channels that stay and gives zeros elsewhere. Nothing
    is removed, and the hooks are gone afterwards.

    Args:
        model: The model; its parameters are not changed.
        gone: As for `remove_channels`.

    Raises:
        ModelError: As for `remove_channels`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        >>> _ = [torch.nn.init.ones_(weight) for weight in net.parameters()]
        >>> with torch.no_grad(), masked(net, {("0", "out", 0): torch.tensor([0]), ("1", "in", 0): torch.tensor([0])}):
        ...     print(net(torch.tensor([[3.0]])))
        tensor([[3.]])
    """
    plan = _planned(model, gone)
    before: dict[str, Hook] = {}
    after: dict[str, Hook] = {}
    for name, sides in plan.sides.items():
        module = model.get_submodule(name)
        if "in" in sides:
            before[name] = partial(_zero_input, gone=sides["in"], dim=1 - module.weight.dim())  # type: ignore[union-attr]
        if "out" in sides and _mixes_channels(module):
            after[name] = partial(_norm_over_kept, gone=sides["out"], smaller=_smaller_copy(module, sides, name))
    with hooked(model, forward=after, forward_pre=before):
        yield


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


@singledispatch
def _axes(module: nn.Module) -> dict[Side, dict[str, int]]:
    """Side -> own tensor -> dimension that holds the channels of this side."""
    return {"out": _generic_axes(module)}


@_axes.register
def _(module: _ConvNd) -> dict[Side, dict[str, int]]:
    return {"out": {"weight": 0, "bias": 0, "gain": 0}, "in": {"weight": 1}}


@_axes.register
def _(module: _ConvTransposeNd) -> dict[Side, dict[str, int]]:
    return {"out": {"weight": 1, "bias": 0}, "in": {"weight": 0}}


@_axes.register
def _(module: nn.Linear) -> dict[Side, dict[str, int]]:
    return {"out": {"weight": 0, "bias": 0}, "in": {"weight": 1}}


@_axes.register
def _(module: nn.Embedding) -> dict[Side, dict[str, int]]:
    return {"out": {"weight": 1}}


@_axes.register(_NormBase)
@_axes.register(nn.GroupNorm)
def _(module: _NormBase | nn.GroupNorm) -> dict[Side, dict[str, int]]:
    return {"out": {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}}


@_axes.register(nn.LayerNorm)
@_axes.register(nn.RMSNorm)
def _(module: nn.LayerNorm | nn.RMSNorm) -> dict[Side, dict[str, int]]:
    last = len(module.normalized_shape) - 1
    return {"out": {"weight": last, "bias": last}}


@singledispatch
def _widths(module: nn.Module) -> dict[Side, int | None]:
    """Side -> number of channels; None where the module does not say."""
    return {"out": _generic_width(module)}


@_widths.register
def _(module: _ConvNd) -> dict[Side, int | None]:
    return {"out": module.out_channels, "in": module.in_channels}


@_widths.register
def _(module: nn.Linear) -> dict[Side, int | None]:
    return {"out": module.out_features, "in": module.in_features}


@_widths.register
def _(module: nn.Embedding) -> dict[Side, int | None]:
    return {"out": module.embedding_dim}


@_widths.register
def _(module: _NormBase) -> dict[Side, int | None]:
    return {"out": module.num_features}


@_widths.register
def _(module: nn.GroupNorm) -> dict[Side, int | None]:
    return {"out": module.num_channels}


@_widths.register(nn.LayerNorm)
@_widths.register(nn.RMSNorm)
def _(module: nn.LayerNorm | nn.RMSNorm) -> dict[Side, int | None]:
    return {"out": module.normalized_shape[-1]}


@singledispatch
def _cuts(module: nn.Module, sides: _Sides, where: str) -> _Cuts:
    """Which indices of which own tensors go."""
    axes = _axes(module)
    return {(name, dim): sides[side] for side in sides for name, dim in axes[side].items() if _has(module, name)}


@_cuts.register
def _(module: nn.GroupNorm, sides: _Sides, where: str) -> _Cuts:
    if module.num_groups > 1:
        _whole_groups(sides["out"], module.num_channels // module.num_groups, f"{where} (GroupNorm), side 'out'")
    return _cuts.dispatch(nn.Module)(module, sides, where)


@_cuts.register
def _(module: _ConvNd, sides: _Sides, where: str) -> _Cuts:
    if module.groups == 1:
        return _cuts.dispatch(nn.Module)(module, sides, where)
    groups = _groups_gone(module, sides, where)
    rows = module.weight.shape[0] // module.groups
    into = {("weight", 0): (groups[:, None] * rows + torch.arange(rows)).flatten()}
    return into | {(name, 0): sides["out"] for name in ("bias", "gain") if _has(module, name)}


def _groups_gone(module: _ConvNd, sides: _Sides, where: str) -> Tensor:
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


@dataclass
class _Plan:
    """What goes where.

    Attributes:
        tensor: id of a tensor -> the tensor.
        gone: id of a tensor -> dimension -> indices that go, ascending.
        sides: Name of a module -> side -> channels that go, ascending.
    """

    tensor: dict[int, Tensor] = field(default_factory=dict)
    gone: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    sides: dict[str, dict[Side, Tensor]] = field(default_factory=dict)

    def cut(self, tensor: Tensor, dim: int, gone: Tensor, where: str) -> None:
        """Note that indices of a tensor go; another place may say the same, but nothing else."""
        dims = self.gone.setdefault(id(tensor), {})
        if dim in dims and not torch.equal(dims[dim], gone):
            raise ModelError(
                f"{where}: dimension {dim} of this tensor is named twice (it is shared, or given by module and by "
                "parameter) with different indices. Remove the same indices everywhere."
            )
        dims[dim] = gone
        self.tensor[id(tensor)] = tensor

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape after the removal."""
        dims = self.gone.get(id(tensor), {})
        return tuple(size - (len(dims[dim]) if dim in dims else 0) for dim, size in enumerate(tensor.shape))


def _planned(model: nn.Module, gone: Mapping[Axis, Tensor]) -> _Plan:
    """Check everything; change nothing."""
    plan = _Plan()
    for (name, side, dim), indices in gone.items():
        if indices.numel() == 0:
            continue
        if side == "param":
            _plan_tensor(plan, model, name, dim, indices)
        else:
            _plan_side(plan, model, name, side, indices)
    for name, sides in plan.sides.items():
        module = model.get_submodule(name)
        for (tensor, dim), indices in _cuts(module, sides, name).items():
            plan.cut(_own_tensors(module)[tensor], dim, indices, f"{name}.{tensor}")
    _check_agreement(plan, model)
    return plan


def _plan_tensor(plan: _Plan, model: nn.Module, name: str, dim: int, indices: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    tensor = _own_tensors(_submodule(model, owner, name)).get(own)
    if tensor is None:
        raise ModelError(f"{name}: the model has no parameter or buffer of this name.")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ModelError(f"{name}: there is no dimension {dim}, the shape is {tuple(tensor.shape)}.")
    dim %= tensor.dim()
    plan.cut(tensor, dim, _checked(indices, tensor.shape[dim], f"{name}, dimension {dim}"), name)


def _plan_side(plan: _Plan, model: nn.Module, name: str, side: Side, indices: Tensor) -> None:
    module = _submodule(model, name, name)
    where = f"{name} ({type(module).__name__}), side {side!r}"
    axes = _axes(module)
    widths = _widths(module)
    if side not in widths or (not axes[side] and widths[side] is None):
        raise ModelError(f"{where}: this module has no channels of its own on that side.")
    for tensor in ("weight", "bias"):
        if tensor in axes[side] and not _has(module, tensor) and isinstance(getattr(module, tensor, None), Tensor):
            raise ModelError(
                f"{where}: {tensor!r} is computed from other tensors (parametrized, or masked by "
                "torch.nn.utils.prune). Make it permanent first: torch.nn.utils.prune.remove or "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
    plan.sides.setdefault(name, {})[side] = _checked(indices, widths[side], where)


def _checked(indices: Tensor, size: int | None, where: str) -> Tensor:
    """Indices in ascending order on the CPU."""
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ModelError(
            f"{where}: indices must be a one-dimensional integer tensor, got {indices.dtype} of shape "
            f"{tuple(indices.shape)}."
        )
    ordered = indices.detach().cpu().long().sort().values
    if (ordered[1:] == ordered[:-1]).any():
        twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        raise ModelError(f"{where}: index {twice} is given more than once.")
    if ordered[0] < 0 or (size is not None and ordered[-1] >= size):
        wrong = int(ordered[0] if ordered[0] < 0 else ordered[-1])
        raise ModelError(f"{where}: index {wrong} is out of range, there are {size} channels.")
    if len(ordered) == size:
        raise ModelError(f"{where}: all {size} channels would go. At least one must stay.")
    return ordered


def _check_agreement(plan: _Plan, model: nn.Module) -> None:
    """Tensors of one module still fit together, also where only some of them are shared."""
    for name, module in model.named_modules():
        own = _own_tensors(module)
        touched = any(id(tensor) in plan.gone for tensor in own.values())
        if not touched or _is_generic(module) or getattr(module, "groups", 1) != 1:
            continue
        for side, axes in _axes(module).items():
            sizes = {tensor: plan.shape(own[tensor])[dim] for tensor, dim in axes.items() if tensor in own}
            if len(set(sizes.values())) > 1:
                raise ModelError(
                    f"{name} ({type(module).__name__}), side {side!r}: its tensors would no longer fit "
                    f"together: {sizes}. It shares a tensor that shrinks; name its channels as well."
                )


def _shrunk(tensor: Tensor, gone: Mapping[int, Tensor]) -> Tensor:
    """What is left of a tensor, in ascending order; a parameter stays a parameter."""
    left = tensor.detach()
    for dim, indices in gone.items():
        left = left.index_select(dim, _kept(left.shape[dim], indices).to(left.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        left = left.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def _kept(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def _replace(model: nn.Module, smaller: Mapping[int, Tensor]) -> set[nn.Module]:
    """Put the new tensors wherever the old ones are; returns the modules that own one."""
    places = [
        (module, owned, name, smaller[id(tensor)])
        for module in model.modules()
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if id(tensor) in smaller
    ]
    for _, owned, name, tensor in places:
        owned[name] = tensor  # type: ignore[assignment]
    return {module for module, *_ in places}


def _left(module: nn.Module, sides: _Sides) -> int | None:
    """Channels on side ``out`` of a module whose attributes are still the old ones."""
    width = _widths(module).get("out")
    if _is_generic(module) and _generic_axes(module):
        return None
    return None if width is None or "out" not in sides else width - len(sides["out"])


def _new_groups(groups: int, channels: int, left: int) -> int:
    """Number of groups of the same size that are left; a single group stays one."""
    return 1 if groups == 1 else left // (channels // groups)


def _smaller_copy(module: nn.Module, sides: _Sides, where: str) -> nn.Module:
    """A shallow copy with smaller tensors; the original keeps its own."""
    smaller = copy.copy(module)
    cuts = _cuts(module, sides, where)
    for attribute in ("_parameters", "_buffers"):
        owned = dict(getattr(module, attribute))
        for (name, dim), gone in cuts.items():
            if owned.get(name) is not None:
                owned[name] = _shrunk(owned[name], {dim: gone})
        smaller.__dict__[attribute] = owned
    refresh(smaller, width=_left(module, sides))
    return smaller


def _zero_input(module: nn.Module, args: tuple, kwargs: dict, *, gone: Tensor, dim: int) -> tuple[tuple, dict]:
    """Zeros in the channels that are gone; exact also where they hold Inf."""
    if args:
        return (args[0].index_fill(dim, gone.to(args[0].device), 0), *args[1:]), kwargs
    return args, kwargs | {"input": kwargs["input"].index_fill(dim, gone.to(kwargs["input"].device), 0)}


def _norm_over_kept(
    module: nn.Module, args: tuple, kwargs: dict, output: Tensor, *, gone: Tensor, smaller: nn.Module
) -> Tensor:
    """The norm over the channels that stay, scattered back among zeros."""
    inputs = args[0] if args else next(iter(kwargs.values()))
    dim = _channel_dim(module)
    kept = _kept(inputs.shape[dim], gone).to(inputs.device)
    return torch.zeros_like(output).index_copy(dim, kept, smaller.forward(inputs.index_select(dim, kept)))


def _mixes_channels(module: nn.Module) -> bool:
    """Does a channel of the output depend on the other channels of the input?

    Known by their attributes: a norm over ``normalized_shape``, and global response normalisation.
    """
    return isinstance(module, nn.GroupNorm) or hasattr(module, "normalized_shape") or hasattr(module, "channel_dim")


def _channel_dim(module: nn.Module) -> int:
    """Dimension of the channels in a norm's input; by convention ``2d`` in a name means ``[B, C, H, W]``."""
    by_name = 1 if isinstance(module, nn.GroupNorm) or "2d" in type(module).__name__ else -1
    return getattr(module, "channel_dim", by_name)


def _is_generic(module: nn.Module) -> bool:
    """Is this a type that the tables do not know?"""
    return _axes.dispatch(type(module)) is _axes.dispatch(nn.Module)


def _generic_axes(module: nn.Module) -> dict[str, int]:
    """Tensors with one value per channel, or one filter ``[channels, 1, ...]`` per channel."""
    axes = {}
    for name, tensor in _own_tensors(module).items():
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if len(long) == 1:
            axes[name] = long[0]
        elif len(long) > 1 and tensor.dim() > 2 and tensor.shape[1] == 1:
            axes[name] = 0
        elif long:
            return {}
    return axes


def _generic_width(module: nn.Module) -> int | None:
    """Channels of a module of an unknown type; None where its tensors do not agree on one number."""
    own = _own_tensors(module)
    sizes = {own[name].shape[dim] for name, dim in _generic_axes(module).items()}
    shape = getattr(module, "normalized_shape", None)
    if not own and isinstance(shape, tuple):
        return shape[-1]
    return sizes.pop() if len(sizes) == 1 else None


def _submodule(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{where}: the model has no module {name!r}. Names are those of named_modules().") from None


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    pairs: Iterable[tuple[str, Tensor | None]] = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _has(module: nn.Module, name: str) -> bool:
    return name in _own_tensors(module)
