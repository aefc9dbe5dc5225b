"""Channels and units go by explicit indices: physically, in ascending order, or as a mask that computes the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from jbrprune.errors import ModelError
from jbrprune.models import layers
from jbrprune.models.preserve import Hook, hooked, input_of
from jbrprune.structure.groups import Axis, Group, Selection, Side, after_removal, removed_channels

OF_HEADS = ("heads", "head_dim")
"""Sides that hold no tensor of their own."""


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
        ModelError: A module has no such side, indices are out of range or all there are,
            part of a group would go, or two places that share a tensor disagree. The model is unchanged.

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
    cuts = plan_cuts(model, gone)
    smaller = {key: shrink_tensor(cuts.tensors[key], dims) for key, dims in cuts.gone.items()}
    widths: dict[nn.Module, int | None] = {}
    for name, sides in cuts.sides.items():
        module = model.get_submodule(name)
        whole = layers.width_of(module, "out")
        widths[module] = whole and whole - len(sides.get("out", ()))
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name in [name for name, tensor in owned.items() if id(tensor) in smaller]:
                setattr(module, name, smaller[id(owned[name])])  # recurrent layers keep a list of their weights
                widths.setdefault(module, None)
    for module, width in widths.items():
        layers.refresh(module, width=width)


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
    before: dict[str, Hook] = {}
    after: dict[str, Hook] = {}
    for name, sides in plan_cuts(model, gone).sides.items():
        module = model.get_submodule(name)
        if "in" in sides:
            dim = -1 if layers.channel_dim(module) == -1 else 1 - module.weight.dim()  # type: ignore[union-attr,operator]
            before[name] = partial(_zero_input, gone=sides["in"], dim=dim)
        if "out" in sides and layers.mixes_channels(module):
            smaller = copy.copy(module)  # the original keeps its own tensors
            smaller.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
            remove_channels(smaller, {("", "out", 0): sides["out"]})
            after[name] = partial(_normalise_kept, gone=sides["out"], smaller=smaller)
    with hooked(model, forward=after, forward_pre=before):
        yield


def _zero_input(module: nn.Module, args: tuple, kwargs: dict, *, gone: Tensor, dim: int) -> tuple[tuple, dict]:
    """Zeros in the channels that are gone; exact also where they hold Inf."""
    if args:
        return (args[0].index_fill(dim, gone.to(args[0].device), 0), *args[1:]), kwargs
    return args, kwargs | {"input": kwargs["input"].index_fill(dim, gone.to(kwargs["input"].device), 0)}


def _normalise_kept(
    module: nn.Module, args: tuple, kwargs: dict, output: Tensor, *, gone: Tensor, smaller: nn.Module
) -> Tensor:
    """The norm over the channels that stay, scattered back among zeros."""
    inputs = input_of(args, kwargs)
    dim = layers.channel_dim(module) or -1  # unknown where several dimensions are normalised: then the last
    stays = kept_indices(inputs.shape[dim], gone).to(inputs.device)
    return torch.zeros_like(output).index_copy(dim, stays, smaller.forward(inputs.index_select(dim, stays)))


def remove_units(model: nn.Module, groups: Sequence[Group], selection: Selection) -> tuple[Group, ...]:
    """Remove the selected units in place; return the groups of the smaller model."""
    gone = removed_channels(groups, selection)
    streams = [group.name.rstrip("'") for group in groups if group.kind == "width"]
    repeated = layers.repeated_widths(model, streams)
    remove_channels(model, {axis: channels for axis, channels in gone.items() if axis[1] not in OF_HEADS})
    for name, side, _ in gone:
        if side in OF_HEADS:
            (layers.refresh if side == "heads" else layers.narrow_heads)(model.get_submodule(name))
    for set_width, layer, attribute in repeated:
        set_width(getattr(layer, attribute))
    return after_removal(groups, selection)


@contextlib.contextmanager
def masked_units(model: nn.Module, groups: Sequence[Group], selection: Selection) -> Iterator[None]:
    """Let the un-shrunk model compute what it would without the selected units."""
    gone = removed_channels(groups, selection)
    products = {m.axis for group in groups if group.kind == "head_dim" for m in group.side("out")} & gone.keys()
    zeros = {axis[0]: partial(_zero_output, gone=gone[axis]) for axis in products}  # queries and keys have no consumer
    axes = {axis: channels for axis, channels in gone.items() if axis[1] not in OF_HEADS}
    with hooked(model, forward=zeros), masked(model, axes):
        yield


def _zero_output(module: nn.Module, args: tuple, kwargs: dict, output: Tensor, *, gone: Tensor) -> Tensor:
    return output.index_fill(-1, gone.to(output.device), 0)


# --- which indices of which tensors go ------------------------------------------------------------


@dataclass
class Cuts:
    """What goes where.

    Attributes:
        tensors: id of a tensor -> the tensor.
        gone: id of a tensor -> dimension -> indices that go, ascending.
        sides: Name of a module -> side -> channels that go, ascending.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)
    gone: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    sides: dict[str, dict[Side, Tensor]] = field(default_factory=dict)

    def add(self, tensor: Tensor, dim: int, gone: Tensor, where: str) -> None:
        """Note that indices of a tensor go; another place may say the same, but nothing else."""
        dims = self.gone.setdefault(id(tensor), {})
        if dim in dims and not torch.equal(dims[dim], gone):
            raise ModelError(
                f"{where}: dimension {dim} of this tensor is named twice (it is shared, or given by module and by "
                "parameter) with different indices. Remove the same indices everywhere."
            )
        dims[dim] = gone
        self.tensors[id(tensor)] = tensor


def plan_cuts(model: nn.Module, gone: Mapping[Axis, Tensor]) -> Cuts:
    """Check what `remove_channels` is asked for; change nothing.

    Args:
        model: The model.
        gone: As for `remove_channels`.

    Raises:
        ModelError: As there.
    """
    cuts = Cuts()
    for (name, side, dim), indices in gone.items():
        if indices.numel() == 0:
            continue
        owner, _, own = name.rpartition(".") if side == "param" else (name, "", "")
        module = model.get_submodule(owner)
        tensors = layers.own_tensors(module)
        if side == "param":
            tensor = tensors[own]
            indices = _sort_indices(indices, tensor.shape[dim], f"{name}, dimension {dim}")
            cuts.add(tensor, dim % tensor.dim(), indices, name)
            continue
        where = f"{name} ({type(module).__name__}), side {side!r}"
        width = layers.width_of(module, side)
        if width is None:
            raise ModelError(f"{where}: this module has no channels of its own on that side.")
        for tensor in layers.channel_tensors(module, side).keys() - tensors.keys():
            if isinstance(getattr(module, tensor, None), Tensor):
                raise ModelError(
                    f"{where}: {tensor!r} is computed from other tensors (parametrized, or masked by "
                    "torch.nn.utils.prune). Make it permanent first: torch.nn.utils.prune.remove or "
                    "torch.nn.utils.parametrize.remove_parametrizations."
                )
        cuts.sides.setdefault(name, {})[side] = _sort_indices(indices, width, where)
    for name, sides in cuts.sides.items():
        tensors = layers.own_tensors(model.get_submodule(name))
        for (own, dim), indices in _cut_tensors(model.get_submodule(name), sides, name).items():
            cuts.add(tensors[own], dim, indices, f"{name}.{own}")
    return cuts


def _sort_indices(indices: Tensor, size: int, where: str) -> Tensor:
    """Indices in ascending order on the CPU."""
    ordered = indices.cpu().unique()
    if ordered[0] < 0 or ordered[-1] >= size:
        raise ModelError(f"{where}: there are {size} channels, indices {ordered.tolist()} are out of range.")
    if len(ordered) == size:
        raise ModelError(f"{where}: all {size} channels would go. At least one must stay.")
    return ordered


def _cut_tensors(module: nn.Module, sides: Mapping[Side, Tensor], name: str) -> dict[tuple[str, int], Tensor]:
    """(own tensor, dimension) -> indices that go with channels; whole groups where the channels come in groups."""
    own, count = layers.own_tensors(module), layers.group_count(module)
    cuts = {
        (tensor, dim % own[tensor].dim()): indices
        for side, indices in sides.items()
        for tensor, dim in layers.channel_tensors(module, side).items()
        if tensor in own
    }
    if count == 1:
        return cuts
    whole = []
    for side, indices in sides.items():
        size = layers.width_of(module, side) // count  # type: ignore[operator]
        groups, numbers = torch.unique(indices // size, return_counts=True)
        whole.append(groups)
        if "out" not in sides or (numbers != size).any() or not torch.equal(groups, whole[0]):
            raise ModelError(
                f"{name} ({type(module).__name__}, groups={count}), side {side!r}: a group goes as a whole, {size} "
                f"channels on this side together with its outputs; got channels {indices.tolist()} of groups "
                f"{groups.tolist()}."
            )
    if "weight" in own:  # its rows are those of the groups, of either side
        cuts = {key: indices for key, indices in cuts.items() if key[0] != "weight"}
        rows = len(own["weight"]) // count
        cuts["weight", 0] = (whole[0][:, None] * rows + torch.arange(rows)).flatten()
    return cuts


def shrink_tensor(tensor: Tensor, gone: Mapping[int, Tensor]) -> Tensor:
    """What is left of a tensor without the indices of each dimension; a parameter stays a parameter."""
    left = tensor.detach()
    for dim, indices in gone.items():
        left = left.index_select(dim, kept_indices(left.shape[dim], indices).to(left.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        left = left.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def kept_indices(size: int, gone: Tensor) -> Tensor:
    """Indices below ``size`` that stay, ascending.

    Example:
        >>> kept_indices(4, torch.tensor([0, 2])).tolist()
        [1, 3]
    """
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()
