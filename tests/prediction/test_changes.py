"""First-order changes, what a repair leaves, damage, and the corrected curve: each against a slow twin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import cases
import pytest
import torch
from test_api import Own, resnet, vit
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from jbrprune.data.batches import Batch, rebatch
from jbrprune.errors import ModelError
from jbrprune.models.preserve import copy_model
from jbrprune.prediction.changes import (
    Changes,
    cut_masks,
    find_unexplained,
    predict_changes,
)
from jbrprune.prediction.damage import Correction, damage, measure_damage, saturation
from jbrprune.repair.repair import RIDGE
from jbrprune.structure.directions import Moments, measure_moments
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.slicing import masked_units

IMAGES = cases.images(6, 32).double()


def own64() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(Own())


MODELS = {"own": own64, "resnet": lambda: resnet().double(), "vit": lambda: vit().double()}


def groups_of(model: nn.Module) -> tuple[Group, ...]:
    return find_groups(copy_model(model), IMAGES[:2].to(next(model.parameters()).dtype)).groups


def some_cuts(groups: tuple[Group, ...]) -> list[Selection]:
    """One unit of the first group; the odd units of all; a third of all."""
    return [
        {groups[0].name: torch.tensor([1])},
        {g.name: torch.arange(1, g.size, 2) for g in groups if g.size > 1},
        {g.name: torch.arange(0, g.size, 3)[: g.size - 1] for g in groups if g.size > 1},
    ]


def weights_of(model: nn.Module, masks: Mapping[tuple[str, str], Tensor], cut: int) -> dict[str, Tensor]:
    """dw: minus the weights that read what goes, zero elsewhere."""
    change = {}
    for (name, _), mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        gone = mask[:, cut].to(weight).reshape(1, -1, *[1] * (weight.dim() - 2))
        change[f"{name}.weight"] = -weight.detach() * gone
    return change


@pytest.mark.parametrize("name", MODELS)
def test_changes_are_the_jacobian_times_the_weights_that_go(name: str) -> None:
    model = MODELS[name]()
    groups = groups_of(model)
    cuts = some_cuts(groups)
    masks = cut_masks(model, groups, cuts)
    found = predict_changes(model, rebatch([Batch(IMAGES)], 4), groups, cuts)
    for cut in range(len(cuts)):
        tangent = weights_of(model, masks, cut)
        primal = {key: model.get_parameter(key).detach() for key in tangent}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            logits, expected = jvp(lambda weights: functional_call(model, weights, (IMAGES,)), (primal,), (tangent,))
        torch.testing.assert_close(found.zeroed[cut], expected.gather(1, found.classes), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.top, logits.gather(1, found.classes))
        tpv = replace(found, saturate=False).damage(cut).tpv
        assert tpv == pytest.approx(float(expected.square().sum() / len(IMAGES)), rel=1e-9)  # sum over K, mean over N


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return net.double().eval()


def test_a_linear_net_is_predicted_exactly() -> None:
    """Layers in one cut interact, so each cut takes from one layer only."""
    model = linear()
    groups = groups_of(model)
    cuts: list[Selection] = [{groups[0].name: torch.tensor([0, 3])}, {groups[1].name: torch.tensor([1, 2])}]
    predicted = replace(predict_changes(model, [Batch(IMAGES)], groups, cuts), saturate=False)
    dense = model(IMAGES).detach()
    for number, cut in enumerate(cuts):
        with masked_units(model, groups, cut), torch.no_grad():
            real = measure_damage(dense, model(IMAGES))
        found = predicted.damage(number)
        assert found.tpv == pytest.approx(real.tpv, rel=1e-9)
        assert found.flips == real.flips


@pytest.mark.parametrize("refits", [True, False])
def test_the_repaired_change_by_hand(refits: bool) -> None:
    """f = V a, a = W x: the mean of what goes stays; of the rest the share of the *amplitude* that a refit leaves.

    The share of the squares comes from the ridge regression that `find_unexplained` stands for, here as one augmented
    least squares over all samples; its square root scales the change.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 6), nn.Linear(6, 4)).double().eval()
    images = torch.randn(40, 3, 4, 4, dtype=torch.float64)
    groups = find_groups(copy_model(model), images[:2]).groups
    gone, stays = torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5])
    hidden = model[1](images.flatten(1)).detach()
    found = predict_changes(model, [Batch(images)], groups, [{groups[0].name: gone}], refits=refits)
    weight, centred = model[2].weight.detach(), hidden - hidden.mean(0)
    lost, kept = centred[:, gone] @ weight[:, gone].t(), centred[:, stays]
    penalty = math.sqrt(RIDGE * float(kept.square().mean(0).mean()) * 40)
    ridge = torch.linalg.lstsq(
        torch.cat([kept, penalty * torch.eye(4, dtype=torch.float64)]),
        torch.cat([lost, torch.zeros(4, 4, dtype=torch.float64)]),
    ).solution
    share = float((lost - kept @ ridge).square().sum() / lost.square().sum())
    assert 0.05 < share < 0.95  # else the root could not be told from the share
    expected = -lost * (math.sqrt(share) if refits else 1)
    torch.testing.assert_close(found.repaired[0], expected.gather(1, found.classes))


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_batches_and_order_change_nothing(batch_size: int) -> None:
    model = own64()
    groups = groups_of(model)
    cuts = some_cuts(groups)
    whole = predict_changes(model, [Batch(IMAGES)], groups, cuts)
    other = predict_changes(model, rebatch([Batch(IMAGES.flip(0))], batch_size), groups, cuts)
    for repaired in (False, True):
        for cut in range(len(cuts)):
            one, two = (each.damage(cut, repaired=repaired) for each in (whole, other))
            assert one.flips == two.flips
            assert one.tpv == pytest.approx(two.tpv, rel=1e-6)
    halves = [predict_changes(model, [Batch(part)], groups, cuts).damage(1).tpv for part in IMAGES.split(3)]
    assert sum(halves) / 2 == pytest.approx(whole.damage(1).tpv, rel=1e-9)


def test_other_logits_are_followed_through_signs_without_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 6), nn.ReLU(), nn.Linear(6, 40)).double().eval()
    images = torch.randn(400, 3, 4, 4, dtype=torch.float64)
    groups = find_groups(copy_model(model), images[:2]).groups
    cuts: list[Selection] = [{groups[0].name: torch.tensor([0, 4])}]
    exact = replace(predict_changes(model, [Batch(images)], groups, cuts, followed=40), saturate=False).damage(0)
    found = (predict_changes(model, [Batch(images)], groups, cuts, followed=3, seed=seed) for seed in range(8))
    some = [replace(each, saturate=False).damage(0) for each in found]
    mean = sum(each.tpv for each in some) / 8
    assert abs(mean - exact.tpv) < 3 * sum(each.tpv_se for each in some) / 8 / math.sqrt(8) + 1e-9
    assert mean == pytest.approx(exact.tpv, rel=0.1)


def test_the_model_is_a_guest_also_after_an_exception() -> None:
    model = vit().train()
    model.requires_grad_(False)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    images = IMAGES.float()
    groups = groups_of(model)
    state = torch.get_rng_state()
    predict_changes(model, [Batch(images)], groups, some_cuts(groups))
    with pytest.raises(RuntimeError):
        predict_changes(model, [Batch(images), Batch(images[:, :1])], groups, some_cuts(groups))
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_samples_that_influence_each_other_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu().mean((2, 3))
            return self.last(x - x.mean(0))

    model = Mixing().double().eval()
    with pytest.raises(ModelError, match="samples influence each other"):
        predict_changes(model, [Batch(IMAGES)], groups_of(model), [{"first": torch.tensor([0])}])


@pytest.mark.parametrize("ridge", [1e-9, 0.5])
def test_what_least_squares_leaves(ridge: float) -> None:
    """The ridge regression of every lost channel on the kept ones, solved by augmented least squares."""
    torch.manual_seed(0)
    rows = torch.randn(50, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    layer = nn.Linear(7, 3).double()
    mask = torch.zeros(7, 1)
    mask[[1, 5]] = 1
    gone = mask[:, 0].bool()
    mean = rows.mean(0)
    centred = rows - mean
    moments = Moments(mean, centred.t() @ centred / 50)
    kept, lost = centred[:, ~gone], centred[:, gone]
    penalty = math.sqrt(ridge * float(kept.square().sum()) / 5)
    solution = torch.linalg.lstsq(
        torch.cat([kept, penalty * torch.eye(5, dtype=torch.float64)]),
        torch.cat([lost, torch.zeros(5, 2, dtype=torch.float64)]),
    ).solution
    weight = layer.weight.detach()[:, gone]
    left, whole = (lost - kept @ solution) @ weight.t(), lost @ weight.t()
    expected = float(left.square().sum() / whole.square().sum())
    assert float(find_unexplained(moments, layer, mask, ridge)[0]) == pytest.approx(expected, rel=1e-6)


def test_a_copy_of_a_channel_leaves_nothing_and_independent_ones_all() -> None:
    covariance = torch.eye(3, dtype=torch.float64)
    covariance[0, 1] = covariance[1, 0] = 1.0
    moments = Moments(torch.zeros(3), covariance)
    masks = torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    assert find_unexplained(moments, nn.Linear(3, 2), masks, 1e-9).tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_of_layers_that_do_not_read_all_inputs_everything_is_left(layer: nn.Module) -> None:
    covariance = torch.ones(4, 4, dtype=torch.float64)  # every channel is a copy of the others
    masks = torch.tensor([[1.0, 0, 0, 0]]).T
    moments = Moments(torch.zeros(4), covariance)
    assert find_unexplained(moments, layer, masks, 1e-9).tolist() == [1.0]
    assert find_unexplained(moments, nn.Conv2d(4, 4, 1), masks, 1e-9).tolist() == pytest.approx([0.0], abs=1e-6)


def test_moments_of_what_a_layer_reads() -> None:
    model = own64()
    seen: list[Tensor] = []
    handle = model.get_submodule("b").register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(IMAGES)
    handle.remove()
    rows = seen[0].permute(0, 2, 3, 1).reshape(-1, seen[0].shape[1])
    found = measure_moments(model, rebatch([Batch(IMAGES)], 4), [("b", "in")])["b", "in"]
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(rows.t(), correction=0))


def test_damage_by_hand() -> None:
    top = torch.tensor([[2.0, 1.0], [5.0, 1.0]])
    change = torch.tensor([[-2.0, 0.0], [3.0, 0.0]])
    found = damage(top, change, torch.tensor([1.0, 0.0]))
    assert (found.tpv, found.flips) == ((4 + 1 + 9) / 2, 0.5)
    assert found.tpv_se == pytest.approx(torch.tensor([5.0, 9.0]).std().item() / math.sqrt(2))
    assert found.flips_low < 0.5 < found.flips_high
    assert math.isnan(damage(top[:1], change[:1]).tpv_se)


def test_saturation_is_first_order_for_small_changes_and_bounded_by_the_logits() -> None:
    change = torch.tensor([[1e-9, 0.0], [3.0, 4.0], [3e4, 4e4]], dtype=torch.float64)
    factor = saturation(change, torch.zeros(3, dtype=torch.float64), torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64))
    assert factor.tolist() == pytest.approx([1.0, 1 - math.exp(-1), 1e-4])
    assert ((change * factor[:, None]).norm(dim=1) <= 5 + 1e-9).all()


def test_the_corrected_curve_goes_through_its_point_and_rises() -> None:
    for predicted, measured in ((4.0, 1.0), (4.0, 25.0)):
        curve = Correction.through(predicted, measured)
        assert predicted * curve.scale(predicted) ** 2 == pytest.approx(measured)
        values = [tpv * curve.scale(tpv) ** 2 for tpv in torch.linspace(0.01, 30, 200).tolist()]
        assert values == sorted(values)
        assert curve.scale(1e-12) == pytest.approx(1, abs=1e-4)
        assert curve.scale(4e6) == curve.scale(4.0)  # beyond what was measured its ratio stays
    assert Correction().scale(3.0) == 1.0
    assert Correction.through(0.0, 1.0) == Correction.through(1.0, 0.0) == Correction()


def test_the_rest_saturates_with_the_change() -> None:
    """Top (3, 4), rest 12 under signs, spread 13: n = 1 for both, TPV = (9 + 16 + 144) (1 - 1/e)^2."""
    change = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    rest = torch.tensor([[[12.0]], [[12.0]]], dtype=torch.float64)
    top, classes = torch.tensor([[9.0, 1.0]]), torch.tensor([[0, 1]])
    found = Changes(top, classes, change, change, rest, torch.tensor([13.0], dtype=torch.float64))
    assert found.damage(0).tpv == pytest.approx(169 * (1 - math.exp(-1)) ** 2)
    assert found.damage(0, scale=2.0).tpv == pytest.approx(4 * 169 * (1 - math.exp(-1)) ** 2)
    assert replace(found, saturate=False).damage(0).tpv == pytest.approx(169)


def test_the_first_samples_alone() -> None:
    model = own64()
    groups = groups_of(model)
    cuts = some_cuts(groups)
    whole = predict_changes(model, [Batch(IMAGES)], groups, cuts)
    part = predict_changes(model, [Batch(IMAGES[:2])], groups, cuts)
    for name, tensor in vars(whole.first(2)).items():
        if name not in ("saturate", "repaired", "rest"):  # whose means are those of all samples
            torch.testing.assert_close(tensor, getattr(part, name))
    assert torch.equal(whole.first(2).repaired, whole.repaired[:, :2])
    assert isinstance(part, Changes)
