"""From a model to its removable units: the dependency graph, and the facts it does not know.

torch-pruning's dependency graph says which channels are coupled. Its answers become edges between
*atoms* (one channel of one axis); heads and grouped convolutions add theirs; the connected components are
the units. Whether a unit can really go is not believed but tried: see `jbrprune.structure.verification.verify_groups`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from jbrprune.models import layers
from jbrprune.models.preserve import copy_model
from jbrprune.structure.groups import Axis, Group, Member, match_names
from jbrprune.structure.tracing import CouplingGraph, coupled_axes, trace_model


@dataclass(frozen=True)
class Found:
    """The units of a model.

    Attributes:
        groups: What can be removed.
        skipped: Name of a layer -> why it stays as wide as it is.
    """

    groups: tuple[Group, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def find_groups(model: nn.Module, images: Tensor, *, ignore: Sequence[str] = (), width: bool = False) -> Found:
    """Find the removable units of a model.

    Args:
        model: The model; left as it was.
        images: ``[B >= 2, C, H, W]`` an example input on the model's device.
        ignore: Globs of module names that stay as wide as they are (a name covers its submodules).
        width: Also offer the channels of residual streams that a LayerNorm normalises over. Removing
            one changes the mean and variance of the norm, so it is not the same as setting it to zero.

    Returns:
        Groups in the order of the model's modules, and what is kept with the reason.

    Raises:
        ArgumentError: A glob in ``ignore`` matches no module.
        ModelError: The model cannot be copied.
        UnsupportedModelError: The graph cannot be traced.
    """
    ignored = match_names([name for name, _ in model.named_modules() if name], ignore, "module")
    model = copy_model(
        model, share=True
    )  # a forward with gradients may leave tensors with a graph in caches of the modules
    atoms = _Atoms()
    graph = trace_model(model, images)
    heads = tuple(layers.attention_heads(model))
    owned: set[Axis] = {(name, "out", 0) for h in heads for name, _ in h.producers}
    owned |= {(h.consumer, "in", 0) for h in heads}
    fixed = _add_graph(atoms, graph, owned)
    _add_heads(atoms, model, heads)
    _add_joint_channels(atoms, model)
    fixed |= {(name, "out", 0): "the classifier" for name in layers.classifiers(model)}
    for axis in atoms.axes:
        if _module_name(axis) in ignored:
            fixed[axis] = "ignored on request"
    return _grouped(model, atoms, fixed, width)


def layer_groups(model: nn.Module, *, ignore: Sequence[str] = ()) -> tuple[Group, ...]:
    """One group per layer and side, uncoupled: each channel of each known layer is its own unit.

    For scoring layer by layer, of any module whatever its graph; not for removal. Names are
    ``<layer>:in`` and ``<layer>:out``.

    Args:
        model: The model.
        ignore: Globs of module names that are left out (a name covers its submodules).

    Raises:
        ArgumentError: A glob in ``ignore`` matches no module.
    """
    ignored = match_names([name for name, _ in model.named_modules() if name], ignore, "module")
    groups = []
    for name, module in model.named_modules():
        if name in ignored or layers.channel_dim(module) is None or not layers.has_parameters(module):
            continue
        widths = {"out": layers.width_of(module, "out")}
        if layers.is_consumer(module):
            widths["in"] = layers.width_of(module, "in")
        for side, width in widths.items():
            if width:
                index = torch.arange(width)
                groups.append(Group(f"{name}:{side}", "channel", width, (Member((name, side, 0), index, index),)))  # type: ignore[arg-type]
    return tuple(groups)


class _Atoms:
    """Channels of axes, numbered through, and the edges between them."""

    def __init__(self) -> None:
        self.axes: dict[Axis, int] = {}
        self.widths: dict[Axis, int] = {}
        self.total = 0
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, axis: Axis, width: int) -> int:
        """First number of an axis, which is made if it is new."""
        if axis not in self.axes:
            self.axes[axis], self.widths[axis] = self.total, width
            self.total += width
        return self.axes[axis]

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        self.edges.append((one, other))

    def components(self) -> np.ndarray:
        """``[total]`` which atoms are connected: the same number, the same component."""
        if not self.edges:
            return np.arange(self.total)
        one, other = (np.concatenate(side) for side in zip(*self.edges, strict=True))
        matrix = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(self.total, self.total))
        return connected_components(matrix, directed=False)[1]


def _add_graph(atoms: _Atoms, graph: CouplingGraph, owned: set[Axis]) -> dict[Axis, str]:
    """Add the couplings torch-pruning sees; return the axes that must stay, and why."""
    stays: dict[Axis, str] = {}
    covered = set(owned)
    for root in graph.roots():
        axis: Axis = (graph.names[root], "out", 0)
        width = layers.width_of(root, "out")
        if axis in covered or width is None:
            continue
        first = atoms.add(axis, width)
        reached, why = coupled_axes(graph, root, width)
        for place in reached:
            if place.whole:  # what can be reached from there has been reached from here
                covered.add(place.axis)
            if place.axis not in owned:
                start = atoms.add(place.axis, place.width)
                atoms.join(first + place.root, start + place.channel)
            if why:
                stays.setdefault(place.axis, why)
    return stays


def _add_heads(atoms: _Atoms, model: nn.Module, heads: Iterable[layers.Heads]) -> None:
    for head in heads:
        axis = atoms.add((head.name, "heads", 0), head.count)
        of_channel = np.repeat(np.arange(head.count), head.head_dim)
        width = head.count * head.head_dim
        places = [((head.consumer, "in", 0), 1)] + [((name, "out", 0), blocks) for name, blocks in head.producers]
        for place, blocks in places:
            first = atoms.add(place, width * blocks)  # type: ignore[arg-type]
            atoms.join(axis + np.tile(of_channel, blocks), first + np.arange(width * blocks))


def _add_joint_channels(atoms: _Atoms, model: nn.Module) -> None:
    """Channels that can go only together: those of one group of a grouped convolution or group norm."""
    modules = {name: model.get_submodule(name) for name, side, _ in atoms.axes if side in ("in", "out")}
    for name, module in modules.items():
        if layers.is_grouped(module) or layers.is_depthwise(module):
            parts: int = module.groups  # type: ignore[assignment]
            leaders = _join_parts(atoms, (name, "out", 0), layers.width_of(module, "out"), parts)  # type: ignore[arg-type]
            if layers.is_grouped(module):
                atoms.join(leaders, _join_parts(atoms, (name, "in", 0), layers.width_of(module, "in"), parts))  # type: ignore[arg-type]
        elif isinstance(module, nn.GroupNorm):
            _join_parts(atoms, (name, "out", 0), module.num_channels, module.num_groups)


def _join_parts(atoms: _Atoms, axis: Axis, width: int, parts: int) -> np.ndarray:
    """Join the channels of each of ``parts`` equal parts; return the first channel of each."""
    channels = (atoms.add(axis, width) + np.arange(width)).reshape(parts, -1)
    atoms.join(channels.flatten(), channels[:, :1].repeat(width // parts, 1).flatten())
    return channels[:, 0]


def _grouped(model: nn.Module, atoms: _Atoms, fixed: dict[Axis, str], width: bool) -> Found:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    kept: dict[str, str] = {}
    groups: dict[str, Group] = {}
    for channels in _alike(atoms):
        name, axes = _named(list(channels), order)
        reason = _reason_to_keep(model, axes, len(channels[axes[0]]), fixed, width)
        if reason:
            kept.setdefault(name, reason)
            continue
        while name in groups:
            name += "'"
        groups[name] = _group(model, name, {axis: channels[axis] for axis in axes})

    def place(name: str) -> int:
        return order.get(name.rstrip("'"), len(order))

    return Found(
        tuple(groups[name] for name in sorted(groups, key=place)),
        {name: kept[name] for name in sorted(kept, key=place)},
    )


def _alike(atoms: _Atoms) -> list[dict[Axis, np.ndarray]]:
    """Components that own equally many channels on the same axes: axis -> ``[units, n]`` channels."""
    axes = list(atoms.axes)
    widths = np.array([atoms.widths[axis] for axis in axes], dtype=np.int64)
    axis, channel = np.repeat(np.arange(len(axes)), widths), np.concatenate([np.arange(0), *map(np.arange, widths)])
    component = atoms.components()
    order = np.lexsort((axis, component))  # stable: channels stay ascending
    axis, channel, component = axis[order], channel[order], component[order]
    starts = np.flatnonzero(np.diff(component * len(axes) + axis, prepend=-1))  # of a component's channels on one axis
    counts = np.diff(starts, append=len(axis))
    units: dict[tuple, list[np.ndarray]] = defaultdict(list)
    for runs in np.split(np.arange(len(starts)), np.flatnonzero(np.diff(component[starts])) + 1):
        if len(runs):
            units[tuple(axis[starts[runs]]), tuple(counts[runs])].append(starts[runs])
    return [
        {
            axes[a]: channel[np.stack(first)[:, i, None] + np.arange(n)]
            for i, (a, n) in enumerate(zip(*key, strict=True))
        }
        for key, first in units.items()
    ]


def _named(axes: list[Axis], order: dict[str, int]) -> tuple[str, list[Axis]]:
    """The name of a group, then its axes: the one that names it first, the others as in the model."""
    sides = {side: rank for rank, side in enumerate(("heads", "out", "in", "param"))}
    first, *others = sorted(axes, key=lambda axis: (sides[axis[1]], order.get(axis[0], len(order)), axis))
    return first[0], [first, *sorted(others, key=lambda axis: (order.get(_module_name(axis), len(order)), axis))]


def _reason_to_keep(model: nn.Module, axes: list[Axis], units: int, fixed: dict[Axis, str], width: bool) -> str | None:
    for axis in axes:
        if axis in fixed:
            return fixed[axis]
    if not any(side == "in" and layers.is_consumer(model.get_submodule(name)) for name, side, _ in axes):
        return "no layer that could shrink reads it"
    if not any(side == "out" and layers.is_consumer(model.get_submodule(name)) for name, side, _ in axes):
        return "no layer that could shrink produces it"
    readers = [name for name, side, _ in axes if side == "in"]
    if any(layers.standardises_inputs(model.get_submodule(name)) for name in readers):
        return "a convolution that reads it standardises its weights over the inputs: with fewer, all would change"
    if units < 2:
        return "its channels can only go all together"
    norms = _normalising(model, axes)
    if norms and not width:
        return f"{_called(norms[0])} normalises over it; pass width=True to offer it"
    return None


def _normalising(model: nn.Module, axes: Iterable[Axis]) -> list[nn.Module]:
    """The norms that take their statistics over the channels."""
    modules = [model.get_submodule(name) for name, side, _ in axes if side == "out"]
    return [module for module in modules if hasattr(module, "normalized_shape")]


def _called(norm: nn.Module) -> str:
    return "an RMSNorm" if "rms" in type(norm).__name__.lower() else "a LayerNorm"


def _group(model: nn.Module, name: str, channels: dict[Axis, np.ndarray]) -> Group:
    """A group of units that are in the order of their first channels on the axis that names the group."""
    first = next(iter(channels.values()))
    units = np.argsort(first[:, 0], kind="stable")
    members = []
    for axis, table in channels.items():
        channel = torch.from_numpy(table[units].flatten())
        unit = torch.arange(len(units)).repeat_interleave(table.shape[1])
        ascending = channel.argsort()
        members.append(Member(axis, channel[ascending], unit[ascending]))
    return Group(name, _kind(model, channels), len(units), tuple(members))


def _kind(model: nn.Module, channels: dict[Axis, np.ndarray]) -> Literal["channel", "head", "group", "width"]:
    if any(side == "heads" for _, side, _ in channels):
        return "head"
    if _normalising(model, channels):
        return "width"
    grouped = [side != "param" and layers.is_grouped(model.get_submodule(name)) for name, side, _ in channels]
    return "group" if any(grouped) else "channel"


def _module_name(axis: Axis) -> str:
    name, side, _ = axis
    return name.rpartition(".")[0] if side == "param" else name
