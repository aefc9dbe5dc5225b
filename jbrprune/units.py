"""From a model to its removable units: the dependency graph, and the facts it does not know.

torch-pruning's dependency graph says which channels are coupled. Its answers become edges between
*atoms* (one channel of one axis); heads and grouped convolutions add theirs; the connected components are
the units. Whether a unit can really go is not believed but tried: see `jbrprune.preflight`.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch_pruning as tp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from jbrprune import architectures, guest, layers
from jbrprune.errors import ArgumentError, UnsupportedModelError
from jbrprune.groups import Axis, Group, Member
from jbrprune.measure import logits_of


UNSHRINKABLE = (nn.MultiheadAttention, nn.RNNBase, nn.Embedding)


@dataclass(frozen=True)
class Found:
    """The units of a model.

    Attributes:
        groups: What can be removed.
        kept: Name of a layer -> why it stays as wide as it is.
    """

    groups: tuple[Group, ...]
    kept: dict[str, str] = field(default_factory=dict)


def find_groups(
    model: nn.Module, images: Tensor, *, ignore: Sequence[str] = (), width: bool = False
) -> Found:
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
        UnsupportedModelError: The graph cannot be traced.
    """
    ignored = _ignored(model, ignore)
    atoms = _Atoms()
    graph = _trace(model, images)
    heads = tuple(architectures.attention_heads(model))
    owned: set[Axis] = {(name, "out", 0) for h in heads for name, _ in h.producers}
    owned |= {(h.consumer, "in", 0) for h in heads}
    outputs = _add_graph(atoms, graph, model, owned)
    _add_heads(atoms, model, heads)
    _add_joint_channels(atoms, model)
    fixed = {axis: "reaches the model's output" for axis in outputs}
    fixed |= {(name, "out", 0): "the classifier" for name in architectures.classifiers(model)}
    for axis in atoms.axes:
        if _module_name(axis) in ignored:
            fixed[axis] = "ignored on request"
    return _grouped(model, atoms, fixed, width)


def layer_groups(model: nn.Module) -> tuple[Group, ...]:
    """One group per layer and side, uncoupled: each channel of each known layer is its own unit.

    For scoring layer by layer, of any module whatever its graph; not for removal. Names are
    ``<layer>:in`` and ``<layer>:out``.
    """
    groups = []
    for name, module in model.named_modules():
        if layers.channel_dim(module) is None:
            continue
        widths = {"out": layers.out_channels(module)}
        if layers.is_consumer(module):
            widths["in"] = layers.in_channels(module)
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
        one, other = (np.concatenate(side) for side in zip(*self.edges, strict=True))
        matrix = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(self.total, self.total))
        return connected_components(matrix, directed=False)[1]


def _trace(model: nn.Module, images: Tensor) -> tp.DependencyGraph:
    inputs = images.detach()
    with guest.evaluating(model), guest.requiring_grad(model, True), guest.no_new_hooks(model), torch.enable_grad():
        try:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs=(inputs,),
                forward_fn=lambda m, x: logits_of(m(*x)),
                verbose=False,
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"The dependency graph of {type(model).__name__} cannot be traced with an input of shape "
                f"{tuple(inputs.shape)}: {type(error).__name__}: {error}. Check that the model runs on this input."
            ) from error


def _add_graph(atoms: _Atoms, graph: tp.DependencyGraph, model: nn.Module, owned: set[Axis]) -> set[Axis]:
    """Add the couplings torch-pruning sees; return the axes that reach the output."""
    names = {module: name for name, module in model.named_modules()}
    outputs: set[Axis] = set()
    covered: set[Axis] = set()
    for root in [m for m in graph.module2node if m in names and isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]:
        axis: Axis = (names[root], "out", 0)
        if axis in covered or axis in owned:
            continue
        width = layers.out_channels(root)
        pruner = graph.get_pruner_of_module(root)
        group = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(width)))  # type: ignore[arg-type]
        first = atoms.add(axis, width)  # type: ignore[arg-type]
        reached = [axis]
        ends = False
        for item in group:
            target = item.dep.target.module
            ends |= isinstance(target, tp.ops._OutputOp)
            found = _axis(graph, item.dep, names)
            if found is None or found[0] in owned:
                continue
            other, other_width = found
            number = atoms.add(other, other_width)
            index = np.asarray(item.idxs, dtype=np.int64)
            if len(index) and index.max() < other_width:
                atoms.join(first + np.asarray(item.root_idxs, dtype=np.int64), number + index)
            reached.append(other)
            if len(index) == other_width:
                covered.add(other)
        if ends:
            outputs.update(reached)
    return outputs


def _axis(graph: tp.DependencyGraph, dependency: tp.dependency.Dependency, names: dict) -> tuple[Axis, int] | None:
    node = dependency.target
    if isinstance(node.module, nn.Parameter):
        name = graph._param_to_name[node.module]
        owner = name.rpartition(".")[0]
        scale = {n: m for m, n in names.items()}[owner]
        if layers.channel_dim(scale) is not None:  # a per-channel layer that torch-pruning does not know
            return (owner, "out", 0), node.module.shape[node.pruning_dim]
        return (name, "param", node.pruning_dim), node.module.shape[node.pruning_dim]
    if node.module not in names:
        return None
    out = graph.is_out_channel_pruning_fn(dependency.handler)
    width = layers.out_channels(node.module) if out else layers.in_channels(node.module)
    return None if width is None else ((names[node.module], "out" if out else "in", 0), width)


def _add_heads(atoms: _Atoms, model: nn.Module, heads: Iterable[architectures.Heads]) -> None:
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
    for (name, side, dim), first in list(atoms.axes.items()):
        module = model.get_submodule(name) if side in ("in", "out") else None
        parts = getattr(module, "groups", None) if layers.is_grouped(module) or layers.is_depthwise(module) else None  # type: ignore[arg-type]
        parts = module.num_groups if isinstance(module, nn.GroupNorm) else parts
        if parts is None or side == "in" and layers.is_depthwise(module):  # type: ignore[arg-type]
            continue
        width = atoms.widths[name, side, dim]
        part = np.arange(width) // (width // parts)
        leader = part * (width // parts)
        atoms.join(first + np.arange(width), first + leader)
        if side == "in":
            other_width = layers.out_channels(module)  # type: ignore[arg-type]
            other = atoms.add((name, "out", 0), other_width)  # type: ignore[arg-type]
            atoms.join(first + np.arange(parts) * (width // parts), other + np.arange(parts) * (other_width // parts))


def _grouped(model: nn.Module, atoms: _Atoms, fixed: dict[Axis, str], width: bool) -> Found:
    component = atoms.components()
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    on_axes: dict[int, dict[Axis, list[int]]] = defaultdict(lambda: defaultdict(list))
    for axis, first in atoms.axes.items():
        for channel, label in enumerate(component[first : first + atoms.widths[axis]]):
            on_axes[int(label)][axis].append(channel)
    alike: dict[tuple, list[dict[Axis, list[int]]]] = defaultdict(list)
    for places in on_axes.values():
        alike[tuple(sorted((axis, len(channels)) for axis, channels in places.items()))].append(places)
    kept: dict[str, str] = {}
    groups: list[Group] = []
    for signature, units in alike.items():
        axes = [axis for axis, _ in signature]
        name = _group_name(axes, order)
        reason = _reason_to_keep(model, axes, units, fixed, width)
        if reason:
            kept[name] = reason
            continue
        while any(group.name == name for group in groups):
            name += "'"
        groups.append(_group(model, name, axes, units))
    groups.sort(key=lambda group: order.get(group.name.rstrip("'"), len(order)))
    return Found(tuple(groups), {name: kept[name] for name in sorted(kept, key=lambda n: order.get(n, len(order)))})


def _reason_to_keep(
    model: nn.Module, axes: list[Axis], units: list, fixed: dict[Axis, str], width: bool
) -> str | None:
    for axis in axes:
        if axis in fixed:
            return fixed[axis]
    if not any(side == "in" and layers.is_consumer(model.get_submodule(name)) for name, side, _ in axes):
        return "no layer that could shrink reads it"
    for name, side, _ in axes:
        if side != "param" and isinstance(model.get_submodule(name), UNSHRINKABLE):
            return f"{name} ({type(model.get_submodule(name)).__name__}) is of a class that cannot be shrunk"
    if len(units) < 2:
        return "its channels can only go all together"
    if not width and _normalised(model, axes):
        return "a LayerNorm normalises over it; pass width=True to offer it"
    return None


def _normalised(model: nn.Module, axes: list[Axis]) -> bool:
    return any(side == "out" and _is_layer_norm(model.get_submodule(name)) for name, side, _ in axes)


def _is_layer_norm(module: nn.Module) -> bool:
    return hasattr(module, "normalized_shape")


def _group(model: nn.Module, name: str, axes: list[Axis], units: list[dict[Axis, list[int]]]) -> Group:
    units = sorted(units, key=lambda places: min(places[axes[0]]))
    members = []
    for axis in axes:
        channel = torch.tensor([c for places in units for c in places[axis]])
        unit = torch.tensor([u for u, places in enumerate(units) for _ in places[axis]])
        ascending = channel.argsort()
        members.append(Member(axis, channel[ascending], unit[ascending]))
    kind = "channel"
    if any(side == "heads" for _, side, _ in axes):
        kind = "head"
    elif _normalised(model, axes):
        kind = "width"
    elif max(len(places[axes[0]]) for places in units) > 1 and any(
        side != "param" and layers.is_grouped(model.get_submodule(n)) for n, side, _ in axes
    ):
        kind = "group"
    return Group(name, kind, len(units), tuple(members))  # type: ignore[arg-type]


def _group_name(axes: list[Axis], order: dict[str, int]) -> str:
    heads = [name for name, side, _ in axes if side == "heads"]
    producers = heads or [name for name, side, _ in axes if side == "out"] or [name for name, _, _ in axes]
    return min(producers, key=lambda name: order.get(name, len(order)))


def _module_name(axis: Axis) -> str:
    name, side, _ = axis
    return name.rpartition(".")[0] if side == "param" else name


def _ignored(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise ArgumentError(f"ignore must be a list of globs, got the string {patterns!r}: write [{patterns!r}].")
    names = [name for name, _ in model.named_modules() if name]
    ignored: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise ArgumentError(
                f"ignore: {pattern!r} matches no module. Names look like {', '.join(names[:3])}; "
                "list them with `[name for name, _ in model.named_modules()]`."
            )
        ignored |= hits | {name for name in names if any(name.startswith(hit + ".") for hit in hits)}
    return ignored
