"""Renumbering after a removal against lists of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jbrprune.structure.groups import Axis, Group, Member, Selection, after_removal, removed_channels

Named = dict[Axis, list[str]]


def member(axis: Axis, channel: Sequence[int], unit: Sequence[int]) -> Member:
    return Member(axis, torch.tensor(channel), torch.tensor(unit))


def two_groups() -> tuple[Group, Group]:
    """A concatenation: conv p has 3 channels and q has 2; layer b reads q's channels first, each of p's twice."""
    p = Group(
        "p",
        "channel",
        3,
        (member(("p", "out", 0), [0, 1, 2], [0, 1, 2]), member(("b", "in", 0), range(2, 8), [0, 0, 1, 1, 2, 2])),
    )
    q = Group("q", "channel", 2, (member(("q", "out", 0), [0, 1], [1, 0]), member(("b", "in", 0), [0, 1], [1, 0])))
    return p, q


def test_channels_that_go() -> None:
    gone = removed_channels(two_groups(), {"p": torch.tensor([0, 2]), "q": torch.tensor([0])})
    assert {axis: channels.tolist() for axis, channels in gone.items()} == {
        ("p", "out", 0): [0, 2],
        ("b", "in", 0): [1, 2, 3, 6, 7],
        ("q", "out", 0): [1],
    }


def test_what_is_left_is_renumbered() -> None:
    p, q = after_removal(two_groups(), {"p": torch.tensor([0, 2]), "q": torch.tensor([0])})
    assert (p.size, p.name, p.kind, q.size) == (1, "p", "channel", 1)
    assert [(m.axis, m.channel.tolist(), m.unit.tolist()) for m in (*p.members, *q.members)] == [
        (("p", "out", 0), [0], [0]),
        (("b", "in", 0), [1, 2], [0, 0]),
        (("q", "out", 0), [0], [0]),
        (("b", "in", 0), [0], [0]),
    ]


@pytest.mark.parametrize(
    "selection", [{}, {"p": torch.tensor([], dtype=torch.long)}], ids=["nothing", "an empty tensor"]
)
def test_removing_nothing_changes_nothing(selection: Selection) -> None:
    before = two_groups()
    assert removed_channels(before, selection) == {}
    for old, new in zip(before, after_removal(before, selection), strict=True):
        assert [(m.channel.tolist(), m.unit.tolist()) for m in old.members] == [
            (m.channel.tolist(), m.unit.tolist()) for m in new.members
        ]


def test_channels_per_unit_and_sides() -> None:
    p, _ = two_groups()
    assert p.channels_per_unit() == Counter({("p", "out", 0): 1, ("b", "in", 0): 2})
    assert [m.axis for m in p.side("in")] == [("b", "in", 0)]
    assert p.side("heads") == ()


def test_channels_of_units() -> None:
    assert two_groups()[0].members[1].channels_of(torch.tensor([2, 0])).tolist() == [2, 3, 6, 7]


@st.composite
def groups_and_removals(draw: st.DrawFn) -> tuple[list[Group], list[Selection]]:
    """Up to four groups that share axes at random, and two removals, one after the other."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    axes: list[Axis] = [(f"layer{i}", "in", 0) for i in range(3)]
    owners: dict[Axis, list[tuple[int, int]]] = {axis: [] for axis in axes}
    for number, size in enumerate(sizes):
        for axis in draw(st.sets(st.sampled_from(axes), min_size=1)):
            owners[axis] += [(number, unit) for unit in range(size) for _ in range(draw(st.integers(1, 2)))]
        owners["own", "out", number] = [(number, unit) for unit in range(size)]
    members: list[list[Member]] = [[] for _ in sizes]
    for axis, channels in owners.items():
        order = draw(st.permutations([*channels, (-1, 0)]))  # one channel belongs to nobody
        for number in range(len(sizes)):
            mine = [(c, unit) for c, (owner, unit) in enumerate(order) if owner == number]
            if mine:
                members[number].append(member(axis, [c for c, _ in mine], [u for _, u in mine]))
    groups = [Group(f"g{i}", "channel", size, tuple(members[i])) for i, size in enumerate(sizes)]
    removals, left = [], list(sizes)
    for _ in range(2):
        selection = {}
        for i, size in enumerate(left):
            gone = sorted(draw(st.sets(st.integers(0, size - 1), max_size=size - 1)))
            selection[f"g{i}"] = torch.tensor(gone, dtype=torch.long)
            left[i] -= len(gone)
        removals.append(selection)
    return groups, removals


@settings(max_examples=100, deadline=None)
@given(groups_and_removals())
def test_renumbering_twice_against_names(case: tuple[list[Group], list[Selection]]) -> None:
    groups, removals = case
    width = {
        m.axis: 1 + max(int(o.channel.max()) for g in groups for o in g.members if o.axis == m.axis)
        for g in groups
        for m in g.members
    }
    names: Named = {axis: [f"{axis} {c}" for c in range(n)] for axis, n in width.items()}
    owned = {
        (g.name, f"{g.name} {u}"): {m.axis: [names[m.axis][c] for c in m.channel[m.unit == u]] for m in g.members}
        for g in groups
        for u in range(g.size)
    }
    units = {g.name: [f"{g.name} {u}" for u in range(g.size)] for g in groups}
    left = {g.name: g.size - sum(len(selection[g.name]) for selection in removals) for g in groups}
    for selection in removals:
        groups = _checked_step(groups, selection, names, owned, units)
    assert {g.name: g.size for g in groups} == left


def _checked_step(
    groups: Sequence[Group], selection: Selection, names: Named, owned: dict, units: dict[str, list[str]]
) -> Sequence[Group]:
    gone = {
        name
        for g, index in selection.items()
        for u in index.tolist()
        for channels in owned[g, units[g][u]].values()
        for name in channels
    }
    for axis, channels in removed_channels(groups, selection).items():
        assert [names[axis][c] for c in channels] == [name for name in names[axis] if name in gone]
    after = after_removal(groups, selection)
    for axis in names:
        names[axis] = [name for name in names[axis] if name not in gone]
    for group in after:
        removed = set(selection[group.name].tolist())
        units[group.name] = [unit for u, unit in enumerate(units[group.name]) if u not in removed]
        assert group.size == len(units[group.name])
        for m in group.members:
            assert m.channel.tolist() == sorted(m.channel.tolist())
            for u, unit in enumerate(units[group.name]):
                assert [names[m.axis][c] for c in m.channel[m.unit == u]] == owned[group.name, unit][m.axis]
    return after
