"""The runs of a model's layers in one forward pass, each of which can be repeated by itself at another width."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.budgets.cost import mixing_axes
from jbrprune.models import layers, preserve
from jbrprune.structure import slicing
from jbrprune.structure.groups import Axis

_PART = "part"


@dataclass(frozen=True, eq=False)
class Call:
    """One run of one layer in a forward pass.

    Attributes:
        name: Qualified name of the layer.
        module: The layer.
        axes: What can become narrower: the axes of its channels, or of the layer whose channels it passes on.
        args: What went in.
        kwargs: The same, by name.
        dim: Dimension of the input that holds channels; None where they are not cut (attention).
    """

    name: str
    module: nn.Module
    axes: tuple[Axis, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dim: int | None

    @property
    def sides(self) -> tuple[str, ...]:
        """Which side of the layer each axis is."""
        return tuple(side for _, side, _ in self.axes)


def calls(model: nn.Module, images: Tensor) -> list[Call]:
    """The runs of the layers whose time depends on a width, in one forward pass of the first image.

    They are convolutions, linear layers, norms and scales, attentions whose heads can go (as a whole), and activations
    without parameters that directly follow one of them.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]``.
    """
    found: list[Call] = []
    alive: list[object] = []  # or the id of a tensor could be that of an earlier one
    origin: dict[int, Call] = {}

    def entering(name: str, module: nn.Module) -> preserve.Hook:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            call = _call(name, module, args, kwargs, origin)
            if call is not None:
                found.append(call)

        return hook

    def leaving(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        alive.append(output)
        if found and found[-1].module is module:
            origin[id(output)] = found[-1]

    parts = dict(_parts(model))
    before = {name: entering(name, module) for name, module in parts.items()}
    with preserve.inference_state(model), preserve.hooked(model, dict.fromkeys(parts, leaving), before):
        model(images[:1].to(preserve.device_of(model)))
    return found


def _parts(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that are timed as a whole: known layers, and leaves without parameters."""
    known = layers.head_layout(model) or layers.channel_dim(model) is not None
    leaf = not any(True for _ in model.children())
    if name and (known or (leaf and not any(True for _ in model.parameters()))):
        yield name, model
        return
    for own, child in model.named_children():
        yield from _parts(child, f"{name}.{own}" if name else own)


def _call(name: str, module: nn.Module, args: tuple, kwargs: dict, origin: Mapping[int, Call]) -> Call | None:
    axes = mixing_axes(name, module)
    if layers.head_layout(module):
        return Call(name, module, axes, args, kwargs, None)
    if axes or layers.channel_dim(module) is not None:
        return Call(name, module, axes or ((name, "out", 0),), args, kwargs, layers.channel_dim(module))
    source = origin.get(id(preserve.input_of(args, kwargs))) if args or kwargs else None
    if source is None or source.dim is None or type(module) is nn.Identity:
        return None
    passed_on = tuple(axis for axis in source.axes if axis[1] == "out")
    return Call(name, module, passed_on, args, kwargs, source.dim)


# --- one layer at some width -----------------------------------------------------------------------


def full_widths(call: Call) -> tuple[int, ...]:
    """Width of the layer on each of its axes."""
    return tuple(_full_width(call, side) for side in call.sides)


def _full_width(call: Call, side: str) -> int:
    if layers.channel_dim(call.module) is None and side != "heads":
        assert call.dim is not None, call.name
        return preserve.input_of(call.args, call.kwargs).shape[call.dim]
    width = layers.width_of(call.module, side)
    assert width is not None, call.name
    return width


def quantum(call: Call, number: int) -> int:
    """Channels that can go only together on an axis: those of a group of a convolution or a norm."""
    groups = getattr(call.module, "groups", getattr(call.module, "num_groups", 1))
    return full_widths(call)[number] // groups if call.sides[number] == "out" and groups > 1 else 1


def narrowed(call: Call, widths: Sequence[int]) -> Callable[[], object]:
    """The same run with a copy of the layer, and its input, cut to other widths.

    Raises:
        ModelError: The layer cannot be cut to them.
    """
    part = copy.deepcopy(call.module)
    holder = nn.ModuleDict({_PART: part})
    gone: dict[Axis, Tensor] = {}
    for side, width, full in zip(call.sides, widths, full_widths(call)):
        indices = torch.arange(width, full)
        if not len(indices) or (layers.channel_dim(part) is None and side != "heads"):
            continue  # nothing goes, or only the input shrinks
        gone |= _head_axes(holder, indices) if side == "heads" else {(_PART, side, 0): indices}  # type: ignore[dict-item]
        if side == "heads":
            layers.set_heads(part, width)
    slicing.remove_channels(holder, gone)
    if call.dim is None:
        return functools.partial(part, *call.args, **call.kwargs)
    into = layers.width_of(part, "in")
    arguments = _cut(call, widths[-1] if into is None else into)
    return functools.partial(part, *arguments, **(call.kwargs if call.args else {}))


def _head_axes(holder: nn.Module, gone: Tensor) -> dict[Axis, Tensor]:
    axes: dict[Axis, Tensor] = {}
    for heads in layers.attention_heads(holder):
        channels = (gone[:, None] * heads.head_dim + torch.arange(heads.head_dim)).flatten()
        axes[heads.consumer, "in", 0] = channels
        for name, blocks in heads.producers:
            offsets = torch.arange(blocks) * heads.count * heads.head_dim
            axes[name, "out", 0] = (offsets[:, None] + channels).flatten()
    return axes


def _cut(call: Call, width: int) -> tuple[Any, ...]:
    """The arguments of a call with fewer channels in the first, in the same memory layout."""
    tensor: Tensor = preserve.input_of(call.args, call.kwargs)
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    assert call.dim is not None
    return tensor.narrow(call.dim, 0, width).clone(memory_format=layout), *call.args[1:]
