"""Which layers the relevance of a unit is read from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from jbrprune.errors import ArgumentError, ModelError
from jbrprune.models import layers
from jbrprune.structure.groups import Group, Member, Side

Site = Literal["consumer", "all"]


def scored_members(
    model: nn.Module, groups: Sequence[Group], site: Site
) -> dict[tuple[str, str], list[tuple[str, Member, bool]]]:
    """(module, side) -> the members there: name of the group, member, whether its channels are its units in order."""
    modules = dict(model.named_modules())
    wanted: tuple[Side, ...] = ("in",) if site == "consumer" else ("in", "out")
    found: dict[tuple[str, str], list[tuple[str, Member, bool]]] = defaultdict(list)
    for group in groups:
        members = [member for side in wanted for member in group.side(side)]
        for member in members:
            _check_member(modules.get(member.axis[0]), group, member)
        members = [m for m in members if _is_scored(modules[m.axis[0]])]
        if site == "consumer":
            members = _cut_once(group, members, modules)
        if not members:
            raise ModelError(
                f"Group {group.name} has no layer to score at site {site!r}. Score it at site 'all', or leave it out."
            )
        for member in members:
            in_order = torch.equal(member.unit.cpu(), torch.arange(group.size))
            found[member.axis[0], member.axis[1]].append((group.name, member, in_order))
    return found


def single_members(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Group name -> groups of the same units with one scored member each, to square layer by layer."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        members = [m for side in ("in", "out") for m in group.side(side) if _is_scored(model.get_submodule(m.axis[0]))]
        found[group.name] = [
            replace(group, name=f"{group.name}: {m.axis[1]} {m.axis[0]}", members=(m,)) for m in members
        ]
    return found


def _cut_once(group: Group, members: list[Member], modules: Mapping[str, nn.Module]) -> list[Member]:
    """Leave out grouped convolutions whose outputs go with the unit: what reads those outputs is the same cut again."""
    produced = {member.axis[0] for member in group.side("out")}
    again = {name for name in produced if layers.is_grouped(modules[name])}
    return [member for member in members if member.axis[0] not in again] or members


def _is_scored(module: nn.Module) -> bool:
    return layers.channel_dim(module) is not None and layers.has_parameters(module)


def _check_member(module: nn.Module | None, group: Group, member: Member) -> None:
    name, side, _ = member.axis
    if module is None:
        raise ArgumentError(
            f"Group {group.name}: the model has no module {name!r}. Find the groups of this very model."
        )
    width = layers.width_of(module, side)
    if width is not None and len(member.channel) and int(member.channel.max()) >= width:
        raise ArgumentError(
            f"Group {group.name}: {name} has {width} channels on side {side!r}, the group names channel "
            f"{int(member.channel.max())}. Find the groups again after every change of the model."
        )
