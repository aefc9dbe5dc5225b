"""Plain and masked parameters."""

from __future__ import annotations

import copy

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from jbrprune.errors import ArgumentError, ModelError
from jbrprune.sparsity.masks import find_ignored, fresh, make_permanent, masks_of, put_masks, slots, weights_of
from jbrprune.structure.groups import match_names


class Net(nn.Module):
    """Plain and shared weights, a norm, a parameter that is no weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        self.body[1].weight = self.body[0].weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images() -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def random_mask(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(2)) > 0.5


PLAIN = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "body.0.weight", "body.0.bias", "body.1.weight"]


def test_slots_have_the_same_names_with_and_without_masks() -> None:
    model = net()
    assert [slot.name for slot in slots(model)] == PLAIN
    prune.random_unstructured(model.conv, "weight", 0.5)
    prune.random_unstructured(model.norm, "bias", 0.5)
    assert [slot.name for slot in slots(model)] == PLAIN
    assert [slot.name for slot in slots(model) if slot.masked] == ["conv.weight", "norm.bias"]


def test_a_slot_of_a_plain_parameter() -> None:
    model = net()
    slot = slots(model)[0]
    assert slot.stored is model.conv.weight
    assert slot.used is model.conv.weight
    assert slot.mask is None
    assert torch.equal(cases.effective(slot), model.conv.weight)
    assert not cases.effective(slot).requires_grad


def test_a_slot_of_a_masked_parameter() -> None:
    model = net()
    parameter, mask = model.conv.weight, random_mask(model.conv.weight)
    prune.custom_from_mask(model.conv, "weight", mask)
    slot = slots(model)[0]
    assert slot.stored is parameter
    assert slot.used is model.conv.weight
    assert slot.mask is not None
    assert torch.equal(slot.mask.bool(), mask)
    with torch.no_grad():
        parameter[~mask] = float("inf")  # what is pruned does not count, whatever it is
        parameter[mask] = 3.0
    assert torch.equal(cases.effective(slot), 3.0 * mask)


def test_the_root_module_gives_bare_names() -> None:
    assert [slot.name for slot in slots(nn.Linear(2, 2))] == ["weight", "bias"]


def test_shared_weights_have_several_slots_and_one_name() -> None:
    model = net()
    found = {slot.name: slot for slot in slots(model)}
    assert found["body.0.weight"].stored is found["body.1.weight"].stored
    assert list(weights_of(model)) == ["conv.weight", "body.0.weight"]


@pytest.mark.parametrize(
    "ignore, left",
    [
        (["conv"], ["body.0.weight"]),
        (["conv.weight"], ["body.0.weight"]),
        (["conv.bias"], ["conv.weight", "body.0.weight"]),
        (["body"], ["conv.weight"]),
        (["body.0"], ["conv.weight"]),  # one tensor: what stays in one place stays in both
        (["b*", "c*"], []),
    ],
)
def test_weights_that_are_not_ignored(ignore: list[str], left: list[str]) -> None:
    model = net()
    assert list(weights_of(model, ignore)) == left
    prune.random_unstructured(model.conv, "weight", 0.5)
    assert list(weights_of(model, ignore)) == left


def test_ignored_covers_what_is_inside() -> None:
    names = {"body", "body.0", "body.1", "body.0.weight", "body.0.bias", "body.1.weight"}
    assert find_ignored(net(), ["body"]) == names


def test_globs_that_match_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'fc\*' matches no module and no parameter. Names look like conv, norm"):
        weights_of(net(), ["conv", "fc*"])
    with pytest.raises(ArgumentError, match=r"got the string 'conv': write \['conv'\]"):
        weights_of(net(), "conv")
    with pytest.raises(ArgumentError, match=r"'x' matches no module. Names look like a, b"):
        match_names(["a", "b"], ["x"], "module")


def test_a_glob_that_starts_a_name_is_not_inside_of_it() -> None:
    assert match_names(["a", "a.b", "ab"], ["a"], "module") == {"a", "a.b"}


def test_masks_are_read_as_they_were_put() -> None:
    model = net()
    masks = {"conv.weight": random_mask(model.conv.weight), "norm.bias": random_mask(model.norm.bias)}
    assert masks_of(model) == {}
    put_masks(model, masks)
    found = masks_of(model)
    assert set(found) == set(masks)
    assert all(mask.dtype == torch.bool and torch.equal(mask, masks[name]) for name, mask in found.items())


def test_originals_stay_under_the_mask() -> None:
    model = net()
    parameter, before, mask = model.conv.weight, model.conv.weight.detach().clone(), random_mask(model.conv.weight)
    put_masks(model, {"conv.weight": mask})
    assert model.conv.weight_orig is parameter
    assert torch.equal(parameter, before)
    assert torch.equal(model.conv.weight, torch.where(mask, before, 0))


def test_originals_can_be_given_for_what_is_pruned() -> None:
    model = net()
    before, mask = model.conv.weight.detach().clone(), random_mask(model.conv.weight)
    put_masks(model, {"conv.weight": mask}, {"conv.weight": torch.full_like(before, 7.0)})
    assert torch.equal(model.conv.weight_orig, torch.where(mask, before, 7.0))
    assert torch.equal(model.conv.weight, torch.where(mask, before, 0))


def masked() -> Net:
    """A net in train mode, after a forward pass: its effective weights belong to a graph."""
    model = net().train()
    for module, kind in ((model.conv, "weight"), (model.norm, "bias"), (model.body[0], "weight")):
        prune.custom_from_mask(module, kind, random_mask(getattr(module, kind)))
    prune.custom_from_mask(model.body[1], "weight", model.body[0].weight_mask)
    model(images())
    return model


def test_masks_become_permanent() -> None:
    model = masked()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    parameters = {slot.name: slot.stored for slot in slots(model)}
    masks = masks_of(model)
    expected = model.eval()(images())
    assert make_permanent(model) is model
    assert masks_of(model) == {}
    assert not [name for name in model.state_dict() if name.endswith(("_orig", "_mask"))]
    assert all(slot.stored is parameters[slot.name] for slot in slots(model))
    assert all((parameters[name][~mask] == 0).all() for name, mask in masks.items())
    assert model.body[0].weight is model.body[1].weight
    assert torch.equal(model(images()), expected)
    model.train()(images())
    assert torch.equal(copy.deepcopy(model).eval()(images()), model.eval()(images()))


def test_a_foreign_mask_is_refused() -> None:
    model = net()
    prune.custom_from_mask(model, "scale", torch.tensor([1, 0, 1, 1]))
    with pytest.raises(ModelError, match=r"scale is masked by .* neither a weight nor a bias"):
        make_permanent(model)


def test_a_buffer_that_is_only_named_like_a_mask_is_no_mask() -> None:
    model = net()
    model.register_buffer("attention_mask", torch.ones(2))
    assert "attention_mask" in make_permanent(model).state_dict()


def test_fresh_weights_follow_their_parameter() -> None:
    model = net()
    mask = random_mask(model.conv.weight)
    prune.custom_from_mask(model.conv, "weight", mask)
    old = model.conv.weight
    with torch.no_grad():
        model.conv.weight_orig.fill_(2.0)
    with fresh(model):
        assert torch.equal(model.conv.weight, 2.0 * mask)
        (gradient,) = torch.autograd.grad(model.conv.weight.sum(), model.conv.weight_orig)
        assert torch.equal(gradient, mask.float())
    assert model.conv.weight is old
    with pytest.raises(KeyError), fresh(model):
        raise KeyError
    assert model.conv.weight is old
