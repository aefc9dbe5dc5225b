"""Criteria for single weights against loops and autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import jbrprune
from baselines import WEIGHT_CRITERIA
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError
from jbrprune.sparsity.masks import weights_of

IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [Batch(IMAGES[:4], LABELS[:4]), Batch(IMAGES[4:], LABELS[4:])]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double().eval()


def scored(name: str, model: nn.Module, data: list[Batch] = BATCHES, **options: int) -> dict[str, Tensor]:
    criterion = replace(WEIGHT_CRITERIA[name], **options) if options else WEIGHT_CRITERIA[name]  # type: ignore[type-var]
    if isinstance(criterion, Relevance):
        return weight_scores(model, data, criterion).values()
    return criterion(model, data, list(weights_of(model)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> ``[images, *shape]``, image by image."""
    found: dict[str, list[Tensor]] = {"0.weight": [], "3.weight": []}
    for image, label in zip(IMAGES, LABELS, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for name, each in found.items():
            each.append(model.get_parameter(name).grad.clone())  # type: ignore[union-attr]
    return {name: torch.stack(each) for name, each in found.items()}


def lamp(weight: Tensor) -> Tensor:
    """One weight after the other."""
    score = torch.zeros_like(weight).flatten()
    values = weight.flatten().tolist()
    for i, value in enumerate(values):
        score[i] = value**2 / sum(other**2 for other in values if abs(other) >= abs(value))
    return score.view_as(weight)


@pytest.mark.parametrize("name", ["magnitude", "lamp", "snip", "fisher"])
def test_against_a_twin(name: str) -> None:
    model = net()
    scores = scored(name, model)
    g = gradients(net())
    assert scores.keys() == g.keys()
    for key, value in scores.items():
        weight = model.get_parameter(key).detach()
        expected = {
            "magnitude": lambda w, key=key: w.abs(),
            "lamp": lamp,
            "snip": lambda w, key=key: (w * g[key].mean(0)).abs(),
            "fisher": lambda w, key=key: w.square() * g[key].square().mean(0),
        }[name](weight)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-15)


def test_equal_weights_share_the_score_of_lamp() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -1.0, 2.0, 0.0]])
    found = scored("lamp", model)["0.weight"]
    assert found.tolist() == [[1 / 6, 1 / 6, 1.0, 0.0]]
    model[0].weight.data.zero_()
    assert not scored("lamp", model)["0.weight"].any()


def test_random_is_uniform_and_follows_the_seed() -> None:
    model = nn.Sequential(nn.Linear(100, 50))
    one, same, other = (scored("random", model, seed=seed)["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < 0.01 < 0.99 < one.max() < 1
    assert one.mean() == pytest.approx(0.5, abs=0.02)


def test_masked_weights_have_the_least_magnitude() -> None:
    model = net()
    prune.custom_from_mask(model[3], "weight", torch.rand(3, 16) > 0.5)  # type: ignore[index]
    for name in ("magnitude", "lamp"):
        found = scored(name, model)["3.weight"]
        assert torch.equal(found == 0, model[3].weight_mask == 0)  # type: ignore[index]


@pytest.mark.parametrize("name", WEIGHT_CRITERIA)
def test_all_prune(name: str) -> None:
    """Ignored layers keep their weights."""
    options = {"sparsity": 0.5, "ignore": ["0"], "repair": None, "progress": False, "batch_size": 4}
    result = jbrprune.sparsify(net(), BATCHES, criterion=WEIGHT_CRITERIA[name], **options)  # type: ignore[arg-type]
    zeros = {key: (parameter == 0).double().mean() for key, parameter in result.model.named_parameters()}
    assert (zeros["0.weight"], zeros["3.weight"]) == (0, 0.5)


@pytest.mark.parametrize("name", ["snip", "fisher"])
def test_labels_are_needed(name: str) -> None:
    with pytest.raises(DataError, match="needs labels"):
        scored(name, net(), [Batch(IMAGES)])
