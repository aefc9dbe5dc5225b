"""From a model to its removable units: the dependency graph, and the facts it does not know.

torch-pruning's dependency graph says which channels are coupled. Its answers become edges between *atoms* (one channel
of one axis); heads and grouped convolutions add theirs; the connected components are the units. Whether a unit can
really go is not believed but tried: see `jbrprune.structure.verification.verify_groups`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from jbrprune.models import layers
from jbrprune.models.preserve import copy_model
from jbrprune.structure.groups import Axis, Group, Kind, Member, match_names, module_of
from jbrprune.structure.tracing import trace_model


@dataclass(frozen=True)
class Found:
    """The units of a model.

    Attributes:
        groups: What can be removed.
        skipped: Name of a layer -> why it stays as wide as it is.
        kept_with: Name of a layer -> that of the skipped one with which it keeps its width.
    """

    groups: tuple[Group, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    kept_with: dict[str, str] = field(default_factory=dict)

    def reason(self, layer: str) -> str:
        """Why a layer costs what it costs where every group is at its floor."""
        other = self.kept_with.get(layer, layer)
        if other in self.skipped:
            return self.skipped[other] if other == layer else f"as wide as {other}: {self.skipped[other]}"
        known = any(layer in (group.name, *group.layers()) for group in self.groups)
        return "at its floor" if known else "nothing of it can go"


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
    model = copy_model(model, share=True)  # a forward with gradients may leave a graph in caches of the modules
    atoms = _Atoms()
    fixed = _couple_layers(atoms, model, images)
    _couple_parts(atoms, model)
    fixed |= {(name, "out", 0): "the classifier" for name in layers.classifiers(model)}
    fixed |= {axis: "ignored on request" for axis in atoms.first if module_of(axis) in ignored}
    return _make_groups(model, atoms, fixed, width)


class _Atoms:
    """Channels of axes, numbered through, and the edges between them."""

    def __init__(self) -> None:
        self.first: dict[Axis, int] = {}
        self.widths: dict[Axis, int] = {}
        self.edges: list[tuple[np.ndarray, np.ndarray]] = [(np.arange(0), np.arange(0))]

    def numbers(self, axis: Axis, width: int) -> np.ndarray:
        """``[width]`` the numbers of the channels of an axis, which is made if it is new."""
        if axis not in self.first:
            self.first[axis], self.widths[axis] = sum(self.widths.values()), width
        return self.first[axis] + np.arange(width)

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Let channels go together, pair by pair."""
        self.edges.append((one, other))

    def units(self) -> list[dict[Axis, list[int]]]:
        """What goes together: axis -> channels, ascending."""
        one, other = (np.concatenate(side) for side in zip(*self.edges, strict=True))
        total = sum(self.widths.values())
        matrix = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(total, total))
        labels = connected_components(matrix, directed=False)[1] if total else np.arange(0)
        units: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
        for axis, first in self.first.items():
            for channel, label in enumerate(labels[first : first + self.widths[axis]].tolist()):
                units[label].setdefault(axis, []).append(channel)
        return list(units.values())


def _couple_layers(atoms: _Atoms, model: nn.Module, images: Tensor) -> dict[Axis, str]:
    """Add the couplings by heads, and those that torch-pruning sees; return the axes that must stay, and why."""
    heads: list[tuple[str, int, int, list[tuple[Axis, int]]]] = []
    for name, module in model.named_modules():
        layout = layers.head_layout(module)
        if layout is not None:
            prefix = f"{name}." if name else ""
            parts: list[tuple[Axis, int]] = [((prefix + layers.end_of(module, layout.consumer, "in"), "in", 0), 1)]
            makers = [(part, blocks) for part, blocks in layout.producers if getattr(module, part) is not None]
            parts += [((prefix + layers.end_of(module, part, "out"), "out", 0), blocks) for part, blocks in makers]  # type: ignore[assignment]
            heads.append((name, getattr(module, layout.count), getattr(module, layout.size), parts))
    owned = {axis for *_, parts in heads for axis, _ in parts}
    fixed: dict[Axis, str] = {}
    covered = set(owned)
    graph = trace_model(model, images)
    for root in graph.roots():
        axis: Axis = (graph.names[root], "out", 0)
        if axis in covered:
            continue
        width: int = layers.width_of(root, "out")  # type: ignore[assignment]
        start = atoms.numbers(axis, width)
        couplings, why = graph.coupled_axes(root, width)
        for coupling in couplings:
            if coupling.whole:  # what can be reached from there has been reached from here
                covered.add(coupling.axis)
            if coupling.axis not in owned:
                there = atoms.numbers(coupling.axis, coupling.width)
                atoms.join(start[coupling.root], there[coupling.channel])
            if why:
                fixed.setdefault(coupling.axis, why)
    for name, side, dim in list(atoms.first):  # norms inside of a norm, as those that run in training only
        outer, width = model.get_submodule(name) if side == "out" else model, atoms.widths[name, side, dim]
        for part, module in outer.named_modules() if side == "out" and layers.is_normalisation(outer) else ():
            if part and layers.width_of(module, "out") == width and layers.is_normalisation(module):
                inner = atoms.numbers((f"{name}.{part}", "out", 0), width)
                atoms.join(atoms.numbers((name, side, dim), width), inner)
    for name, count, size, parts in heads:
        of_channel = np.repeat(atoms.numbers((name, "heads", 0), count), size)
        for axis, blocks in parts:
            atoms.join(np.tile(of_channel, blocks), atoms.numbers(axis, blocks * len(of_channel)))
    return fixed


def _couple_parts(atoms: _Atoms, model: nn.Module) -> None:
    """Join the channels that can go only together: those of one group of a grouped convolution or group norm."""
    for name in dict.fromkeys(name for name, side, _ in atoms.first if side in ("in", "out")):
        module = model.get_submodule(name)
        parts = layers.group_count(module)
        if parts == 1 and not isinstance(module, nn.GroupNorm):
            continue
        leaders = []
        for side in ("out", "in") if layers.is_grouped(module) else ("out",):
            width: int = layers.width_of(module, side)  # type: ignore[assignment]
            channels = atoms.numbers((name, side, 0), width).reshape(parts, -1)
            atoms.join(channels.flatten(), np.repeat(channels[:, 0], width // parts))
            leaders.append(channels[:, 0])
        atoms.join(leaders[0], leaders[-1])


def _make_groups(model: nn.Module, atoms: _Atoms, fixed: dict[Axis, str], width: bool) -> Found:
    """Units that own equally many channels on the same axes become one group, in the order of the modules."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    alike: dict[tuple, list[dict[Axis, list[int]]]] = defaultdict(list)
    for unit in atoms.units():
        alike[tuple((axis, len(channels)) for axis, channels in unit.items())].append(unit)

    def place(name: str) -> int:
        return order.get(name, len(order))

    groups: dict[str, Group] = {}
    skipped: dict[str, str] = {}
    kept_with: dict[str, str] = {}
    for units in alike.values():
        first = min(units[0], key=lambda axis: (_SIDES.index(axis[1]), place(axis[0]), axis))
        others = sorted(units[0].keys() - {first}, key=lambda axis: (place(module_of(axis)), axis))
        name, axes = first[0], [first, *others]
        modules = [(side, model.get_submodule(name)) for name, side, _ in axes if side != "param"]
        norms = [module for side, module in modules if side == "out" and hasattr(module, "normalized_shape")]
        reason = next((fixed[axis] for axis in axes if axis in fixed), None) or _reason_to_keep(modules, len(units))
        if norms and not width and not reason:
            norm = "an RMSNorm" if "rms" in type(norms[0]).__name__.lower() else "a LayerNorm"
            reason = f"{norm} normalises over it; pass width=True to offer it"
        if reason:
            skipped.setdefault(name, reason)
            kept_with |= {axis[0]: name for axis in axes if axis[1] == "out"}
            continue
        while name in groups:
            name += "'"
        units.sort(key=lambda unit: unit[first][0])
        members = []
        for axis in axes:
            channel = torch.tensor([unit[axis] for unit in units])
            unit = torch.arange(len(units))[:, None].expand_as(channel).flatten()
            ascending = channel.flatten().argsort()
            members.append(Member(axis, channel.flatten()[ascending], unit[ascending]))
        grouped = any(layers.is_grouped(module) for _, module in modules)
        kind: Kind = "head" if first[1] == "heads" else "width" if norms else "group" if grouped else "channel"
        groups[name] = Group(name, kind, len(units), tuple(members))
    return Found(
        tuple(groups[name] for name in sorted(groups, key=lambda name: place(name.rstrip("'")))),
        {name: skipped[name] for name in sorted(skipped, key=place)},
        kept_with,
    )


_SIDES = ("heads", "out", "in", "param")


def _reason_to_keep(modules: Sequence[tuple[str, nn.Module]], units: int) -> str | None:
    """Why channels cannot go whose modules, by side, are these."""
    readers, producers = ([module for own, module in modules if own == side] for side in ("in", "out"))
    if not any(map(layers.is_consumer, readers)):
        return "no layer that could shrink reads it"
    if not any(map(layers.is_consumer, producers)):
        return "no layer that could shrink produces it"
    if any(map(layers.standardises_inputs, readers)):
        return "a convolution that reads it standardises its weights over the inputs: with fewer, all would change"
    return "its channels can only go all together" if units < 2 else None
