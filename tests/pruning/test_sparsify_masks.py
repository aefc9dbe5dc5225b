"""Single weights of models that are masked already, that share weights, or whose inputs are split into groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import single
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as masking

from baselines.single_weights import magnitude
from jbrprune import WeightScores, sparsify, sweep
from jbrprune.criteria.scores import Settings
from jbrprune.errors import ArgumentError, ModelError
from jbrprune.sparsity.masks import masks_of

QUICK: dict[str, Any] = {"progress": False}
IMAGES = cases.images(12, 8).float()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    return cases.randomised(nn.Sequential(*layers)).float()  # type: ignore[return-value]


TOTAL = 8 * 27 + 4 * 288


def half_masked() -> nn.Sequential:
    model = net()
    masking.global_unstructured([(model[0], "weight"), (model[4], "weight")], masking.L1Unstructured, amount=0.5)
    return model


def zeros(model: nn.Module) -> int:
    return sum(int((model.get_submodule(name).weight == 0).sum()) for name in ("0", "4"))  # type: ignore[operator]


# --- steps and stops from where the masks are ------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.9])
def test_steps_start_where_the_masks_are(sparsity: float) -> None:
    """Every step keeps the same share of what is left; a goal that is met already takes one step."""
    model = half_masked()
    before = masks_of(model)
    result = sparsify(model, IMAGES, sparsity=sparsity, steps=2, **QUICK)
    assert zeros(result.model) == round(sparsity * TOTAL)
    gone = [TOTAL + 4 + 16 + 8 - row.nonzero for row in result.report.steps]  # type: ignore[operator]
    middle = round((1 - (0.5 * (1 - sparsity)) ** 0.5) * TOTAL)
    assert gone == ([middle, round(sparsity * TOTAL)] if sparsity > 0.5 else [TOTAL // 2])
    for name, mask in before.items():
        assert not result.model.state_dict()[name][~mask].any()


def test_a_layer_that_is_ahead_waits_for_the_others() -> None:
    model = net()
    masking.l1_unstructured(model[0], "weight", 0.55)
    result = sparsify(model, IMAGES, sparsity=0.6, steps=3, scope="layer", **QUICK)
    assert [int((result.model[i].weight == 0).sum()) for i in (0, 4)] == [round(0.6 * 216), round(0.6 * 1152)]  # type: ignore[index]
    assert len(result.report.steps) == 3


def test_a_sweep_from_masks() -> None:
    results = sweep(half_masked(), IMAGES, [0.9, 0.5, 0.7], budget="sparsity", steps=2, permanent=False, **QUICK)
    assert [zeros(result.model) for result in results] == [round(share * TOTAL) for share in (0.5, 0.7, 0.9)]
    masks = [masks_of(result.model) for result in results]
    for wide, narrow in itertools.pairwise(masks):
        assert all(not (narrow[name] & ~wide[name]).any() for name in wide)
    original = half_masked()
    for result in results:
        gone = ~masks_of(result.model)["4.weight"]
        assert torch.equal(result.model[4].weight_orig[gone], original[4].weight_orig[gone])  # type: ignore[index]


def test_a_masked_model_after_a_forward_in_train_mode(fingerprint: Callable[[nn.Module], dict]) -> None:
    """Its weights have a graph then, which a copy cannot have."""
    model = half_masked().train()
    model(IMAGES).sum().backward()
    before = fingerprint(model)
    result = sparsify(model, IMAGES, sparsity=0.7, **QUICK)
    assert fingerprint(model) == before
    assert masking.is_pruned(model)
    assert zeros(result.model) == round(0.7 * TOTAL)
    with torch.inference_mode():
        again = sparsify(model, IMAGES, sparsity=0.7, **QUICK)
    expected = result.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


# --- shared weights --------------------------------------------------------------------------------------------------


def tied(*masked: str) -> nn.Module:
    model = cases.randomised(single.Borrowed()).float()
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    for name in masked:
        masking.custom_from_mask(model.get_submodule(name), "weight", mask)
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_weight_that_is_masked_counts_once(inplace: bool) -> None:
    model = tied("one", "two")
    mask = masks_of(model)
    assert list(mask) == ["one.weight"]
    whole = sum(p.numel() for p in model.parameters())
    result = sparsify(model, IMAGES, sparsity=0.6, permanent=False, inplace=inplace, **QUICK)
    assert result.report.dense.params == whole
    assert result.report.dense.nonzero == whole - int((~mask["one.weight"]).sum())
    found = result.model
    assert found.one.weight_orig is found.two.weight_orig
    assert torch.equal(found.one.weight_mask, found.two.weight_mask)  # type: ignore[arg-type]
    assert not found.one.weight_mask[~mask["one.weight"]].any()  # type: ignore[index, union-attr]
    gone = sum(int((~m).sum()) for m in masks_of(found).values())
    assert gone == round(0.6 * sum(row.before for row in result.report.layers))


def test_a_shared_weight_that_is_ignored_in_one_place_stays() -> None:
    model = tied()
    result = sparsify(model, IMAGES, sparsity=0.6, ignore=["one"], repair=None, **QUICK)
    assert not {"one", "two"} & {row.name for row in result.report.layers}
    assert torch.equal(result.model.one.weight, model.one.weight)  # type: ignore[arg-type]
    assert result.model.one.weight is result.model.two.weight


def test_a_shared_weight_with_two_masks_is_refused(fingerprint: Callable[[nn.Module], dict]) -> None:
    model = tied("one")
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"one.weight and two.weight are one shared parameter, but their masks differ"):
        sparsify(model, IMAGES, sparsity=0.6, inplace=True, **QUICK)
    assert fingerprint(model) == before


# --- patterns along the inputs ---------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A grouped convolution, and a grouped transposed one of 12 inputs, 6 in each group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.conv = nn.Conv2d(16, 12, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 4, 2, groups=2)
        self.fc = nn.Linear(4, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(torch.relu(self.conv(torch.relu(self.stem(x))))).mean((2, 3)))


def inputs_of(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """The weights of one output at one tap, over its inputs in order; every output and every tap."""
    if isinstance(module, nn.ConvTranspose2d):
        each = module.in_channels // module.groups
        weight = torch.cat([part.transpose(0, 1) for part in weight.split(each)])  # [out, in of its group, ...]
    return [*weight.flatten(2).transpose(1, 2).flatten(0, 1)] if weight.dim() > 2 else [*weight]


def assert_largest(weight: Tensor, dense: Tensor, module: nn.Module, keep: int, of: int) -> None:
    for left, whole in zip(inputs_of(module, weight), inputs_of(module, dense), strict=True):
        for start in range(0, len(whole), of):
            group = whole[start : start + of].abs().tolist()
            largest = sorted(range(len(group)), key=lambda i: -group[i])[:keep]
            assert left[start : start + of].nonzero().flatten().tolist() == sorted(largest)


@pytest.mark.parametrize(
    ("structure", "fitting"), [("2:4", {"conv", "fc"}), ("1:3", {"stem", "up"}), ("1:2", {"conv", "up", "fc"})]
)
def test_of_every_m_inputs_the_n_largest_stay(structure: str, fitting: set[str]) -> None:
    model = cases.randomised(Grouped()).float()
    result = sparsify(model, IMAGES, pattern=structure, criterion=magnitude, repair=None, **QUICK)
    keep, of = map(int, structure.split(":"))
    for name, module in model.named_children():
        found = result.model.get_submodule(name).weight
        if name in fitting:
            assert_largest(found, module.weight, module, keep, of)  # type: ignore[arg-type]
        else:
            assert torch.equal(found, module.weight)  # type: ignore[arg-type]
    skipped = [name for name in ("stem", "conv", "up", "fc") if name not in fitting]
    notes = [note for note in result.report.notes if note.startswith(f"Not pruned, because {structure}")]
    assert [note.rpartition(": ")[2] for note in notes] == ([", ".join(skipped) + "."] if skipped else [])


def test_a_pattern_over_masks_keeps_no_more_than_it_says() -> None:
    model = cases.randomised(Grouped()).float()
    masking.random_unstructured(model.conv, "weight", 0.5)
    mask = masks_of(model)["conv.weight"]
    result = sparsify(model, IMAGES, pattern="2:4", permanent=False, **QUICK)
    found = masks_of(result.model)["conv.weight"]
    assert not (found & ~mask).any()
    left, was = (m.unflatten(1, (-1, 4)).sum(2) for m in (found, mask))
    assert torch.equal(left, was.clamp_max(2))


# --- what has no meaning ---------------------------------------------------------------------------------------------


def negative(*_: object) -> WeightScores:
    sums = {"0.weight": -torch.ones(8, 3, 3, 3), "4.weight": torch.ones(4, 288)}
    return WeightScores(sums, 1, 0, Settings("own", "weight", "own"))


@pytest.mark.parametrize("criterion", [negative, negative()], ids=["function", "scores"])
def test_negative_scores_are_refused(criterion: Any, fingerprint: Callable[[nn.Module], dict]) -> None:
    model = half_masked()
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=r"The scores of 0\.weight are negative in places"):
        sparsify(model, IMAGES, sparsity=0.5, criterion=criterion, inplace=True, **QUICK)
    assert fingerprint(model) == before
