"""The seam to torch.nn.utils.prune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from jbrprune import JBRUnstructured
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def scored(model: nn.Module) -> WeightScores:
    return weight_scores(model, torch.randn(6, 3, 8, 8))


def pairs(model: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(model[0], "weight"), (model[3], "weight")]


def least(scores: Tensor, count: int) -> list[int]:
    """Flat places of the smallest, by a plain sort."""
    values = scores.flatten().tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def gone(mask: Tensor) -> list[int]:
    return (mask.flatten() == 0).nonzero().flatten().tolist()


def test_one_parameter_loses_its_least_relevant_weights() -> None:
    model = net()
    scores = scored(model)
    JBRUnstructured.apply(model[0], "weight", 0.25, scores["0.weight"])
    assert gone(model[0].weight_mask) == least(scores["0.weight"], 27)
    JBRUnstructured.apply(model[3], "weight", 100, scores["3.weight"])
    assert gone(model[3].weight_mask) == least(scores["3.weight"], 100)


@pytest.mark.parametrize("amount", [0, 1, 17, 0.0, 0.3, 0.999])
def test_magnitudes_as_scores_give_the_masks_of_l1_unstructured(amount: float | int) -> None:
    one, other = nn.Linear(13, 7), nn.Linear(13, 7)
    other.load_state_dict(one.state_dict())
    JBRUnstructured.apply(one, "weight", amount, one.weight.detach().abs())
    prune.l1_unstructured(other, "weight", amount)
    assert torch.equal(one.weight_mask, other.weight_mask)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("method", [prune.L1Unstructured, JBRUnstructured])
def test_global_unstructured_takes_the_scores(method: Any) -> None:
    model = net()
    scores = scored(model)
    prune.global_unstructured(pairs(model), method, scores.importance_scores(model), amount=0.6)
    together = torch.cat([scores["0.weight"].flatten(), scores["3.weight"].flatten()])
    masks = torch.cat([model[0].weight_mask.flatten(), model[3].weight_mask.flatten()])
    assert gone(masks) == least(together, round(0.6 * len(together)))


def test_ties_do_not_change_the_number() -> None:
    layer = nn.Linear(10, 10)
    JBRUnstructured.apply(layer, "weight", 0.37, torch.zeros(10, 10))
    assert gone(layer.weight_mask) == list(range(37))


def test_iterative_pruning_on_top_of_masks() -> None:
    """The amount counts what is left, as in PyTorch; what is gone stays gone."""
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    first = gone(model[0].weight_mask)
    scores = scored(model)
    assert (scores["0.weight"].flatten()[first] == 0).all()
    JBRUnstructured.apply(model[0], "weight", 0.5, scores["0.weight"])
    assert len(gone(model[0].weight_mask)) == 54 + 27
    assert set(first) < set(gone(model[0].weight_mask))
    left = scores["0.weight"].flatten()[[i for i in range(108) if i not in first]]
    kept = scores["0.weight"].flatten()[model[0].weight_mask.flatten() == 1]
    assert kept.min() >= left.sort().values[27]
    prune.global_unstructured(pairs(model), JBRUnstructured, scored(model).importance_scores(model), amount=0.5)
    total = sum(int(mask.sum()) for name, mask in model.named_buffers() if name.endswith("mask"))
    assert total == (27 + 720) - round(0.5 * (27 + 720))
    assert prune.is_pruned(model)


def test_what_follows_is_pytorch() -> None:
    model = net()
    JBRUnstructured.apply(model[0], "weight", 0.5, scored(model)["0.weight"])
    state = model.state_dict()
    assert {"0.weight_orig", "0.weight_mask"} <= state.keys()
    again = net()
    prune.identity(again[0], "weight")
    again.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    assert torch.equal(again(images), expected)
    prune.remove(model[0], "weight")
    assert not prune.is_pruned(model)
    assert torch.equal(model(images), expected)
    assert int((model[0].weight == 0).sum()) == 54
    third = net()
    prune.custom_from_mask(third[0], "weight", state["0.weight_mask"])
    assert gone(third[0].weight_mask) == gone(state["0.weight_mask"])


LAYER = nn.Linear(4, 3)
SCORES = torch.rand(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("weight", 1.0, SCORES), ArgumentError, r"amount must be a share in \[0, 1\) or a number .*, got 1.0"),
        (("weight", -0.1, SCORES), ArgumentError, "got -0.1"),
        (("weight", -1, SCORES), ArgumentError, "got -1"),
        (("weight", True, SCORES), ArgumentError, "got True"),
        (("weight", "half", SCORES), ArgumentError, "got 'half'"),
        (("weight", 13, SCORES), ArgumentError, "amount=13 is more than the 12 weights of weight that are left"),
        (("weight", 0.5, SCORES.T), ArgumentError, r"The scores of weight have shape \(4, 3\), but it has \(3, 4\)"),
        (
            ("gain", 0.5, SCORES),
            ArgumentError,
            r"no parameter 'gain' of its own to prune; it has \['bias', 'weight'\]",
        ),
        (("weight", 0.5, SCORES.log() * 0 / 0), NonFiniteError, "The scores of weight contain NaN or Inf"),
        (("weight", 0.5, -SCORES), ArgumentError, "The scores of weight are negative in places"),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        JBRUnstructured.apply(LAYER, *arguments)
    assert not prune.is_pruned(LAYER)


def test_nothing_is_left() -> None:
    layer = nn.Linear(4, 3)
    prune.custom_from_mask(layer, "weight", torch.zeros(3, 4))
    with pytest.raises(ModelError, match="weight: fully pruned already"):
        JBRUnstructured.apply(layer, "weight", 0.5, SCORES)


def test_weights_in_the_place_of_scores_are_refused() -> None:
    """What torch hands over where importance_scores is forgotten."""
    with pytest.raises(ArgumentError, match="without it torch hands over the weights themselves"):
        prune.global_unstructured([(nn.Linear(8, 8), "weight")], JBRUnstructured, amount=0.5)


@pytest.mark.parametrize(
    "arguments",
    [(0.5,), (0.5, torch.full((3, 4), torch.nan)), (13, SCORES), (1.5, SCORES)],
    ids=["no scores", "NaN", "too many", "too much"],
)
def test_a_refusal_leaves_the_mask_that_was_there(arguments: tuple) -> None:
    """torch takes the earlier hook away before it asks for the new mask."""
    layer = nn.Linear(4, 3)
    layer.weight.data.abs_().neg_()
    prune.l1_unstructured(layer, "weight", 0.25)
    with pytest.raises((ArgumentError, NonFiniteError)):
        JBRUnstructured.apply(layer, "weight", *arguments)
    assert prune.is_pruned(layer)
    assert len(gone(layer.weight_mask)) == 3
