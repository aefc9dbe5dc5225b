"""Which single weights go: exact numbers, ties, floors, patterns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.sparsity.patterns import Pattern, at_floor, keep_most_important, keep_pattern, schedule, smallest

Named = dict[str, Tensor]


def whole(scores: Named) -> Named:
    return {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}


def zeros(masks: Named) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def slow_masks(scores: Named, masks: Named, count: int, floor: float) -> Named:
    """One weight after the other, the least important first, never below a floor."""
    kept = {name: mask.clone().flatten() for name, mask in masks.items()}
    least = {name: max(1, math.ceil(floor * mask.numel())) for name, mask in masks.items()}
    order = sorted(
        (float(score.flatten()[i]), position, i, name)
        for position, (name, score) in enumerate(scores.items())
        for i in range(score.numel())
        if kept[name][i]
    )
    left = count - sum(int((~mask).sum()) for mask in kept.values())
    for _, _, i, name in order:
        if left and int(kept[name].sum()) > least[name]:
            kept[name][i] = False
            left -= 1
    assert left == 0
    return {name: kept[name].view(masks[name].shape) for name in masks}


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.integers(0, 2**32),
)
def test_it_is_what_a_sort_gives(values: list[list[int]], share: float, floor: float, seed: int) -> None:
    """Few different scores: ties everywhere. A tenth of the weights are masked before."""
    scores = {str(i): torch.tensor(row, dtype=torch.float64) for i, row in enumerate(values)}
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(score.shape, generator=generator) > 0.1 for name, score in scores.items()}
    total = sum(mask.numel() for mask in masks.values())
    free = sum(max(0, int(m.sum()) - max(1, math.ceil(floor * m.numel()))) for m in masks.values())
    count = zeros(masks) + round(share * free)
    found = keep_most_important(scores, masks, count / total, floor=floor)
    assert zeros(found) == count
    expected = slow_masks(scores, masks, count, floor)
    assert all(torch.equal(found[name], expected[name]) for name in scores)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_number_is_exact_where_all_scores_are_equal(sparsity: float, value: float) -> None:
    scores = {"a": torch.full((10, 7), value), "b": torch.full((3, 11, 3), value)}
    found = keep_most_important(scores, whole(scores), sparsity)
    assert zeros(found) == round(sparsity * 169)
    assert all(mask.any() for mask in found.values())


def test_global_and_by_layer() -> None:
    scores = {"small": torch.arange(1.0, 11), "large": torch.arange(101.0, 111)}
    together = keep_most_important(scores, whole(scores), 0.4)
    assert (zeros({"": together["small"]}), zeros({"": together["large"]})) == (8, 0)
    apart = keep_most_important(scores, whole(scores), 0.4, scope="layer")
    assert (zeros({"": apart["small"]}), zeros({"": apart["large"]})) == (4, 4)
    assert not apart["large"][:4].any()


def test_what_is_masked_stays_masked_even_if_it_scores_high() -> None:
    scores, masks = {"a": torch.arange(10.0)}, {"a": torch.ones(10, dtype=torch.bool)}
    masks["a"][9] = False
    found = keep_most_important(scores, masks, 0.3)["a"]
    assert found.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_the_floor_keeps_the_most_important_and_is_named() -> None:
    scores = {"dull": torch.arange(10.0) / 100, "bright": torch.arange(10.0) + 1}
    found = keep_most_important(scores, whole(scores), 0.75, floor=0.2)
    assert found["dull"].nonzero().flatten().tolist() == [8, 9]
    assert found["bright"].nonzero().flatten().tolist() == [7, 8, 9]
    assert at_floor(found, 0.2) == ["dull"]
    assert keep_most_important(scores, whole(scores), 0.45)["dull"].sum() == 1  # at least one, without a floor


def test_goals_that_cannot_be_met() -> None:
    scores = {"a": torch.arange(10.0)}
    with pytest.raises(BudgetError, match=r"sparsity=0.95 cannot be reached: with floor=0 .* 1 of 10 weights of a"):
        keep_most_important(scores, whole(scores), 0.95)
    masks = {"a": torch.arange(10) < 5}
    with pytest.raises(BudgetError, match=r"sparsity=0.3 is reached already: 5 of 10 weights of a are masked"):
        keep_most_important(scores, masks, 0.3)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_smallest(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert smallest(torch.tensor(values, dtype=torch.float64), count).nonzero().flatten().tolist() == sorted(order)


def slow_pattern(score: Tensor, mask: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Group by group and tap by tap; the last group may be short."""
    kept = torch.zeros_like(mask)
    others = [range(n) for d, n in enumerate(score.shape) if d != dim]
    for place in itertools.product(*others):
        for start in range(0, score.shape[dim], pattern.of):
            group = range(start, min(start + pattern.of, score.shape[dim]))
            at = [(*place[:dim], i, *place[dim:]) for i in group]
            alive = sorted((i for i in at if mask[i]), key=lambda i: (-float(score[i]), i[dim]))
            for i in alive[: pattern.keep]:
                kept[i] = True
    return kept


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2", "3:5"])
@pytest.mark.parametrize(("shape", "dim"), [((6, 40), 1), ((5, 40, 3, 2), 1), ((40, 3, 2), 0), ((2, 43), 1)])
def test_patterns(text: str, shape: tuple[int, ...], dim: int) -> None:
    pattern, score = Pattern.of_text(text), torch.randint(0, 4, shape).double()
    mask = torch.rand(shape) > 0.2
    found = keep_pattern(score, mask, pattern, dim)
    assert (found is None) == bool(shape[dim] % pattern.of)
    assert found is None or torch.equal(found, slow_pattern(score, mask, pattern, dim))


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2-4", "2:4:8", ":4", "n:m", "", "-1:4"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ArgumentError, match="A pattern is written N:M"):
        Pattern.of_text(text)


def test_steps() -> None:
    assert schedule(0.9, 1) == [0.9]
    assert schedule(0.99, 2) == pytest.approx([0.9, 0.99])
    assert schedule(0.99, 2, start=0.9) == pytest.approx([1 - 0.1 * 0.1**0.5, 0.99])
    assert [str(p) for p in Pattern(2, 4).schedule(1)] == ["2:4"]
    assert [str(p) for p in Pattern(2, 8).schedule(3)] == ["6:8", "4:8", "2:8"]
    assert [str(p) for p in Pattern(1, 2).schedule(5)] == ["1:2"]
