"""Removable units: which channels of which modules go together.

A *unit* is the smallest thing that can be removed: one channel of a coupled group of layers, one
attention head, one group of a grouped convolution. Units of the same shape form a `Group`.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jbrprune.errors import ArgumentError

Side = Literal["in", "out", "param", "heads", "head_dim"]
Kind = Literal["channel", "head", "group", "width", "direction", "head_dim"]
Axis = tuple[str, Side, int]
"""(qualified name, side, dimension): ``in``/``out`` of a module (dimension 0, unused), one dimension of a
bare parameter (``param``), or the heads of an attention module (``heads``) or the size of each (``head_dim``), which
hold no tensor of their own.
A depthwise convolution and a norm have ``out`` only."""


def module_of(axis: Axis) -> str:
    """Qualified name of the module that owns an axis."""
    name, side, _ = axis
    return name.rpartition(".")[0] if side == "param" else name


@dataclass(frozen=True, eq=False)
class Member:
    """The channels that a group owns on one axis.

    Attributes:
        axis: Where the channels are.
        channel: ``[c]`` positions along the axis, ascending.
        unit: ``[c]`` the unit each of these channels belongs to, in ``[0, size)``.
    """

    axis: Axis
    channel: Tensor
    unit: Tensor

    def channels_of(self, units: Tensor) -> Tensor:
        """Channels of the given units."""
        return self.channel[torch.isin(self.unit, units)]


@dataclass(frozen=True, eq=False)
class Group:
    """``size`` interchangeable units with their members.

    Attributes:
        name: Qualified name of the module that gives the group its name (its first producer).
        kind: ``channel``, ``head``, ``group`` (of a grouped convolution), ``width`` (channels of a
            residual stream that a LayerNorm normalises over: removal also changes the statistics), ``direction`` (a
            channel between the two layers that stand in the place of one) or ``head_dim`` (one direction of the queries
            and keys, and one of the values, in every head of an attention).
        size: Number of units.
        members: Every axis that shrinks when a unit goes.
    """

    name: str
    kind: Kind
    size: int
    members: tuple[Member, ...]

    def channels_per_unit(self) -> Counter[Axis]:
        """Axis -> channels that go with one unit (the same for every unit of a group)."""
        return Counter({member.axis: len(member.channel) // self.size for member in self.members})

    def layers(self) -> set[str]:
        """Qualified names of the modules that own its axes."""
        return {module_of(member.axis) for member in self.members}

    def side(self, side: Side) -> tuple[Member, ...]:
        """Members on one side."""
        return tuple(member for member in self.members if member.axis[1] == side)


Selection = Mapping[str, Tensor]
"""Group name -> ``[k]`` units to remove, ascending."""


def removed_channels(groups: Iterable[Group], selection: Selection) -> dict[Axis, Tensor]:
    """Axis -> sorted channels that go when the selected units go."""
    gone: dict[Axis, list[Tensor]] = {}
    for group in groups:
        units = selection.get(group.name)
        if units is None or units.numel() == 0:
            continue
        for member in group.members:
            gone.setdefault(member.axis, []).append(member.channels_of(units))
    return {axis: torch.cat(parts).sort().values for axis, parts in gone.items()}


def after_removal(groups: Iterable[Group], selection: Selection) -> tuple[Group, ...]:
    """The groups of the smaller model: removed units dropped, channels and units renumbered."""
    groups = tuple(groups)
    gone = removed_channels(groups, selection)
    smaller = []
    for group in groups:
        kept = torch.ones(group.size, dtype=torch.bool)
        kept[selection.get(group.name, torch.arange(0))] = False
        renumber = torch.cumsum(kept, 0) - 1
        members = []
        for member in group.members:
            stays = kept[member.unit]
            channel = member.channel[stays]
            if member.axis in gone:
                channel = channel - torch.searchsorted(gone[member.axis], channel)
            members.append(Member(member.axis, channel, renumber[member.unit[stays]]))
        smaller.append(Group(group.name, group.kind, int(kept.sum()), tuple(members)))
    return tuple(smaller)


def match_names(names: Sequence[str], patterns: Sequence[str], what: str) -> set[str]:
    """Names that a glob matches, with everything inside of them; ``what`` they are is said in the error.

    Raises:
        ArgumentError: A string instead of a list, or a glob that matches nothing.
    """
    if isinstance(patterns, str):
        raise ArgumentError(f"ignore must be a list of globs, got the string {patterns!r}: write [{patterns!r}].")
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise ArgumentError(
                f"ignore: {pattern!r} matches no {what}. Names look like {', '.join(names[:3])}; list them with "
                "`[name for name, _ in model.named_modules()]`."
            )
        found |= hits | {name for name in names if any(name.startswith(hit + ".") for hit in hits)}
    return found
