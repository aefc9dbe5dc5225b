"""The seam to torch.nn.utils.prune."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from jbrprune.criteria.weight_relevance import WeightScores, weight_scores


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
    prune.l1_unstructured(model[0], "weight", 0.25, scores["0.weight"])
    assert gone(model[0].weight_mask) == least(scores["0.weight"], 27)
    prune.l1_unstructured(model[3], "weight", 100, scores["3.weight"])
    assert gone(model[3].weight_mask) == least(scores["3.weight"], 100)


def test_global_unstructured_takes_the_scores() -> None:
    model = net()
    scores = scored(model)
    prune.global_unstructured(pairs(model), prune.L1Unstructured, scores.importance_scores(model), amount=0.6)
    together = torch.cat([scores["0.weight"].flatten(), scores["3.weight"].flatten()])
    masks = torch.cat([model[0].weight_mask.flatten(), model[3].weight_mask.flatten()])
    assert gone(masks) == least(together, round(0.6 * len(together)))


def test_iterative_pruning_on_top_of_masks() -> None:
    """The amount counts what is left, as in PyTorch; what is gone stays gone."""
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    first = gone(model[0].weight_mask)
    scores = scored(model)
    assert (scores["0.weight"].flatten()[first] == 0).all()
    prune.l1_unstructured(model[0], "weight", 0.5, scores["0.weight"])
    assert len(gone(model[0].weight_mask)) == 54 + 27
    assert set(first) < set(gone(model[0].weight_mask))
    left = scores["0.weight"].flatten()[[i for i in range(108) if i not in first]]
    kept = scores["0.weight"].flatten()[model[0].weight_mask.flatten() == 1]
    assert kept.min() >= left.sort().values[27]
    prune.global_unstructured(pairs(model), prune.L1Unstructured, scored(model).importance_scores(model), amount=0.5)
    total = sum(int(mask.sum()) for name, mask in model.named_buffers() if name.endswith("mask"))
    assert total == (27 + 720) - round(0.5 * (27 + 720))
    assert prune.is_pruned(model)


def test_what_follows_is_pytorch() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5, scored(model)["0.weight"])
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
