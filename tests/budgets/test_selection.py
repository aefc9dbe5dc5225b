"""Budgets are met and not overshot by a unit; order, floors, ties and refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jbrprune.budgets import budget
from jbrprune.budgets.budget import Floors, reduce_to_floors
from jbrprune.budgets.cost import CostModel, Term
from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.structure.groups import Axis, Group, Member, Selection


def group(name: str, size: int, kind: str = "channel") -> Group:
    index = torch.arange(size)
    return Group(name, kind, size, (Member((name, "out", 0), index, index),))  # type: ignore[arg-type]


def plan_cost(groups: Sequence[Group], costs: Mapping[str, float]) -> CostModel:
    """Every unit of a group costs the same, whatever else goes."""
    terms = [Term(costs[g.name] * g.size, ((g.name, "out", 0),)) for g in groups]
    return CostModel(terms, groups, {(g.name, "out", 0): g.size for g in groups})


def floors_of(share: float = 0.0, channels: int = 1, round_to: int = 1) -> Floors:
    """Floors that let everything go but one channel, unless more is said."""
    return Floors(share, channels, round_to)


def select(
    scores: Mapping[str, Tensor], groups: Sequence[Group], cost: CostModel, target: float, **options: Any
) -> Selection:
    """The function of this name, with the floors of `floors_of`."""
    return budget.select(scores, groups, cost, target, **{"floors": floors_of(), **options})


def plain(chosen: Selection) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in chosen.items()}


GROUPS = [group("a", 4), group("b", 3)]
SCORES = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([10.0, 5.0, 20.0])}


def test_by_hand_score_alone() -> None:
    budget = plan_cost(GROUPS, {"a": 1, "b": 10})  # 34 in all
    assert plain(select(SCORES, GROUPS, budget, 32, scope="raw")) == {"a": [1, 3]}
    assert budget.total == 32


def test_by_hand_score_per_cost() -> None:
    budget = plan_cost(GROUPS, {"a": 1, "b": 10})  # a: 4 1 3 2 per unit of cost, b: 1 .5 2
    assert plain(select(SCORES, GROUPS, budget, 32)) == {"b": [1]}
    assert budget.total == pytest.approx(24)
    budget = plan_cost(GROUPS, {"a": 1, "b": 10})  # then a's 1 before b's 1, because a comes first
    assert plain(select(SCORES, GROUPS, budget, 23)) == {"a": [1], "b": [1]}
    budget = plan_cost(GROUPS, {"a": 1, "b": 10})
    assert plain(select(SCORES, GROUPS, budget, 12)) == {"a": [1, 3], "b": [0, 1]}
    assert budget.total == pytest.approx(12)


def test_by_hand_the_same_share_of_every_layer() -> None:
    """Of 20 and 10 units a fifth goes, whatever the scores say of the layers; shares are of the dense width."""
    groups, scores = [group("a", 20), group("b", 10)], {"a": 100 + torch.arange(20.0), "b": torch.arange(10.0)}
    assert plain(select(scores, groups, plan_cost(groups, {"a": 1, "b": 7}), 72, scope="layer")) == {
        "a": [0, 1, 2, 3],
        "b": [0, 1],
    }
    smaller = [group("a", 20), group("b", 8)]  # of ten: it has lost its fifth before
    sizes, scores["b"] = {"a": 20, "b": 10}, scores["b"][2:]
    cost = plan_cost(smaller, {"a": 1, "b": 7})
    assert plain(select(scores, smaller, cost, 72, scope="layer", dense_sizes=sizes)) == {"a": [0, 1, 2, 3]}


def test_the_price_falls_with_what_has_gone_already() -> None:
    """Two layers in a row: c's inputs are a's outputs."""
    axes: tuple[Axis, Axis] = (("a", "out", 0), ("b", "out", 0))
    budget = CostModel([Term(4 * 3, axes)], GROUPS, {axes[0]: 4, axes[1]: 3})
    scores = {"a": torch.tensor([0.0, 0.0, 9.0, 9.0]), "b": torch.tensor([1.0, 9.0, 9.0])}
    assert plain(select(scores, GROUPS, budget, 4)) == {"a": [0, 1], "b": [0]}
    assert budget.total == pytest.approx(4)


def test_nothing_goes_when_the_budget_is_met_already() -> None:
    assert select(SCORES, GROUPS, plan_cost(GROUPS, {"a": 1, "b": 1}), 7) == {}


def test_what_saves_nothing_stays_even_at_score_zero() -> None:
    budget = plan_cost(GROUPS, {"a": 0, "b": 1})
    scores = {"a": torch.zeros(4), "b": torch.ones(3)}
    for scope in ("global", "raw"):
        assert plain(select(scores, GROUPS, plan_cost(GROUPS, {"a": 0, "b": 1}), 2, scope=scope)) == {"b": [0]}
    with pytest.raises(BudgetError, match=r"0\.333 of the present cost are left"):
        select(scores, GROUPS, budget, 0.5)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("target", [9, 8.5, 5, 3])
def test_ties_do_not_overshoot(value: float, target: float) -> None:
    groups = [group("a", 5), group("b", 5)]
    budget = plan_cost(groups, {"a": 1, "b": 1})
    chosen = select({g.name: torch.full((5,), value) for g in groups}, groups, budget, target)
    assert budget.total == pytest.approx(math.floor(target))
    taken = plain(chosen)
    assert taken["a"] == list(range(min(4, 10 - math.floor(target))))  # ties: in the order of groups and units


@pytest.mark.parametrize(
    ("floors", "kept"),
    [
        (floors_of(), 1),
        (floors_of(share=0.25), 3),
        (floors_of(share=0.3), 3),
        (floors_of(share=0.1), 1),
        (floors_of(channels=4), 4),
        (floors_of(channels=40), 10),
        (floors_of(round_to=4), 4),
        (floors_of(share=0.5, round_to=4), 8),
        (floors_of(share=0.9, round_to=4), 10),
        (floors_of(share=0.3, channels=2, round_to=2), 4),
        (floors_of(round_to=16), 10),
    ],
)
def test_floors_of_ten_channels(floors: Floors, kept: int) -> None:
    assert floors.of(group("a", 10), 10) == kept
    budget = plan_cost([group("a", 10)], {"a": 1})
    assert reduce_to_floors(budget, [group("a", 10)], floors, {"a": 10}) == pytest.approx(kept)
    if kept < 10:
        budget = plan_cost([group("a", 10)], {"a": 1})
        chosen = select({"a": torch.rand(10)}, [group("a", 10)], budget, kept, floors=floors)
        assert len(chosen["a"]) == 10 - kept
    with pytest.raises(
        BudgetError, match=f"with every group at its floor {kept / 10:.3f} of the present cost are left, "
    ):
        select(
            {"a": torch.rand(10)}, [group("a", 10)], plan_cost([group("a", 10)], {"a": 1}), kept - 0.9, floors=floors
        )


def test_heads_are_not_channels() -> None:
    assert floors_of(channels=8, round_to=8).of(group("a", 6, "head"), 6) == 1
    assert floors_of(share=0.5, channels=8).of(group("a", 6, "head"), 6) == 3


@pytest.mark.parametrize(("wide", "kept"), [(1, 8), (3, 3), (4, 2), (16, 1)])
def test_as_many_channels_stay_in_whole_groups(wide: int, kept: int) -> None:
    units = torch.arange(10).repeat_interleave(wide)
    members = (Member(("a", "out", 0), torch.arange(10 * wide), units),)
    assert floors_of(channels=8, round_to=8).of(Group("a", "group", 10, members), 10) == kept


@pytest.mark.parametrize(("share", "size", "kept"), [(0.07, 100, 7), (0.28, 25, 7), (0.55, 100, 55), (0.1, 25, 3)])
def test_shares_are_not_rounded_up_by_a_hair(share: float, size: int, kept: int) -> None:
    assert floors_of(share=share).of(group("a", size), size) == kept


def test_floors_refer_to_the_dense_width() -> None:
    budget = plan_cost([group("a", 6)], {"a": 1})
    chosen = select(
        {"a": torch.arange(6.0)}, [group("a", 6)], budget, 5, floors=floors_of(share=0.5), dense_sizes={"a": 10}
    )
    assert plain(chosen) == {"a": [0]}
    with pytest.raises(BudgetError, match=r"0\.833 of the present cost are left"):
        select(
            {"a": torch.arange(6.0)},
            [group("a", 6)],
            plan_cost([group("a", 6)], {"a": 1}),
            4,
            floors=floors_of(share=0.5),
            dense_sizes={"a": 10},
        )


def test_widths_fall_to_multiples() -> None:
    groups = [group("a", 19), group("h", 5, "head")]
    scores = {"a": torch.arange(19.0), "h": torch.full((5,), 100.0)}
    for target, kept in ((23, 16), (21, 16), (20, 8)):
        chosen = select(scores, groups, plan_cost(groups, {"a": 1, "h": 1}), target, floors=floors_of(round_to=8))
        assert 19 - len(chosen["a"]) == kept
        assert "h" not in chosen


def test_a_block_is_ranked_by_the_mean_of_its_units() -> None:
    """By their sum, four channels worth 1 each would seem dearer than a head worth 2."""
    groups = [group("a", 8), group("h", 4, "head")]
    scores = {"a": torch.ones(8), "h": torch.full((4,), 2.0)}
    for scope in ("global", "raw"):
        cost = plan_cost(groups, {"a": 1, "h": 1})
        assert plain(select(scores, groups, cost, 8, floors=floors_of(round_to=4), scope=scope)) == {"a": [0, 1, 2, 3]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_block_never_goes_before_an_earlier_one(dtype: torch.dtype) -> None:
    """Rounding makes the mean of three equal scores less than the score: width 10 falls to 9, not to 7."""
    score = torch.tensor(0.4900934100151062 if dtype == torch.float32 else 0.45938294312745087, dtype=dtype)
    assert score.repeat(3).mean() < score
    scores, groups = {"a": score.repeat(10)}, [group("a", 10)]
    chosen = select(scores, groups, plan_cost(groups, {"a": 1}), 9.5, floors=floors_of(round_to=3))
    assert plain(chosen) == {"a": [0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"0 <= share < 1 .*got 1\.0"),
        ({"share": -0.1}, r"0 <= share < 1"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"round_to": 0}, "round_to must be a whole number of at least 1, got 0"),
    ],
)
def test_floors_without_meaning(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        floors_of(**options)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Group], dict[str, Tensor], Floors, float, str]:
    sizes = draw(st.lists(st.integers(2, 20), min_size=1, max_size=4))
    kinds = [draw(st.sampled_from(["channel", "channel", "head"])) for _ in sizes]
    groups = [group(f"g{i}", size, kind) for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True))]
    value = st.sampled_from([0.0, 0.0, 1.0, 2.0, 1e-12, 3.5])
    scores = {
        g.name: torch.tensor(draw(st.lists(value, min_size=g.size, max_size=g.size)), dtype=torch.float64)
        for g in groups
    }
    floors = floors_of(draw(st.sampled_from([0, 0.2, 0.5])), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4])))
    return groups, scores, floors, draw(st.floats(0.0, 1.0)), draw(st.sampled_from(["global", "raw", "layer"]))


def products(groups: Sequence[Group]) -> CostModel:
    """A chain of layers: each cost is proportional to two neighbouring groups."""
    axes = [(g.name, "out", 0) for g in groups]
    terms = [
        Term(7.0 * math.prod(g.size for g in groups[i : i + 2]), tuple(axes[i : i + 2])) for i in range(len(groups))
    ]  # type: ignore[arg-type]
    return CostModel(terms, groups, {axis: g.size for axis, g in zip(axes, groups, strict=True)})  # type: ignore[misc]


@settings(max_examples=150, deadline=None)
@given(plans())
def test_any_plan(plan: tuple[list[Group], dict[str, Tensor], Floors, float, str]) -> None:
    groups, scores, floors, share, scope = plan
    sizes = {g.name: g.size for g in groups}
    least = reduce_to_floors(products(groups), groups, floors, sizes)
    whole = products(groups).total
    target = least + share * (whole - least)
    budget = products(groups)
    chosen = select(scores, groups, budget, target, floors=floors, scope=scope)
    assert plain(chosen) == plain(select(scores, groups, products(groups), target, floors=floors, scope=scope))
    priced = products(groups)
    for name, units in chosen.items():
        assert units.tolist() == sorted(set(units.tolist()))
        priced.remove(name, len(units))
    assert priced.total == pytest.approx(budget.total)
    assert budget.total <= target * (1 + 1e-9)
    if chosen:
        assert _least_overshoot(groups, chosen, floors) > target
    for g in groups:
        _check_group(g, scores[g.name], chosen.get(g.name), floors)


def _least_overshoot(groups: Sequence[Group], chosen: Selection, floors: Floors) -> float:
    """The highest total with one block put back: it must miss the target."""
    totals = []
    for back in chosen:
        account = products(groups)
        for g in groups:
            gone = len(chosen.get(g.name, ()))
            if g.name == back:
                step = floors.round_to if g.kind == "channel" else 1
                first = g.size % step or step
                gone -= first if gone == first else step
            account.remove(g.name, gone)
        totals.append(account.total)
    return max(totals)


def _check_group(g: Group, score: Tensor, gone: Tensor | None, floors: Floors) -> None:
    """Floors, multiples, and no unit stays that is worth less than one that goes."""
    if gone is None:
        return
    kept = g.size - len(gone)
    assert kept >= floors.of(g, g.size)
    if g.kind == "channel":
        assert kept % floors.round_to == 0
    stays = torch.ones(g.size, dtype=torch.bool)
    stays[gone] = False
    assert score[gone].max() <= score[stays].min()


@settings(max_examples=60, deadline=None)
@given(plans())
def test_units_go_in_the_order_of_score_per_cost(
    plan: tuple[list[Group], dict[str, Tensor], Floors, float, str],
) -> None:
    groups, scores, _, share, _ = plan
    costs = {g.name: float(i + 1) for i, g in enumerate(groups)}
    whole = sum(costs[g.name] * g.size for g in groups)
    least = sum(costs.values())
    chosen = select(scores, groups, plan_cost(groups, costs), least + share * (whole - least))
    gone, stay = [], []
    for g in groups:
        units = chosen.get(g.name, torch.tensor([], dtype=torch.long)).tolist()
        keys = [float(scores[g.name][u]) / costs[g.name] for u in range(g.size)]
        gone += [keys[u] for u in units]
        if len(units) < g.size - 1:  # not at its floor
            stay += [keys[u] for u in range(g.size) if u not in units]
    if gone and stay:
        assert max(gone) <= min(stay) * (1 + 1e-9)


def test_a_budget_below_the_floors_says_how_far_it_can_go() -> None:
    groups = [group("a", 1000), group("b", 1000)]
    budget = plan_cost(groups, {"a": 1000, "b": 1})
    message = (
        r"with every group at its floor 0\.500 of the present cost are left, 0\.100 were asked for\. Lower the floors"
    )
    with pytest.raises(BudgetError, match=message):
        select({g.name: torch.rand(1000) for g in groups}, groups, budget, 100_100, floors=floors_of(share=0.5))
