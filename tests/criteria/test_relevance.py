"""Relevances against one weight gradient per sample; statistics against their formulas; refusals; guests."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cases
import pytest
import reference
import timm
import torch
from reference import layer_groups
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from jbrprune.criteria import relevance as criterion
from jbrprune.criteria.objectives import OBJECTIVES, Target
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch, iterate
from jbrprune.data.distributed import number_batches
from jbrprune.errors import ArgumentError, DataError, MemoryLimitError, ModelError, NonFiniteError
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Member

Fingerprint = Callable[[nn.Module], dict[str, Any]]
SEED = 3


def curved(logits: Tensor, target: Target) -> Tensor:
    """An objective whose direction depends on the logits, without small numbers: m = (1, -4 f_1, 0, ...)."""
    return logits[:, 0] - 2 * logits[:, 1] ** 2


def curved_direction(logits: Tensor) -> Tensor:
    m = torch.zeros_like(logits)
    m[:, 0], m[:, 1] = 1, -4 * logits[:, 1]
    return m


def relevances(model: nn.Module, images: Tensor, groups: tuple[Group, ...], **options: Any) -> dict[str, Tensor]:
    """Of all images, in one batch."""
    options = {"site": "all"} | options
    objective = options.pop("objective", curved)
    return next(stream(model, [Batch(images)], groups, Relevance(**options), objective=objective))[0]


def stream(
    model: nn.Module, batches: Iterable[Batch], groups: tuple[Group, ...], *how: Any, **options: Any
) -> Iterator:
    return criterion.relevances(model, number_batches(batches), groups, *how, **options)


def along(m: Tensor, by_output: dict[str, Tensor]) -> dict[str, Tensor]:
    """``[N, units]``: m(x)^T J_u(x) w_u."""
    return {name: torch.einsum("nk,nku->nu", m, J) for name, J in by_output.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the largest entry of each group; every group that is off is named, with the ratio."""
    assert found.keys() == expected.keys()
    off = {}
    for name, value in expected.items():
        error = float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-300))
        if not error <= tolerance:
            off[name] = error, (found[name] / value).flatten()[:4].tolist()
    assert not off, off


def site_groups(model: nn.Module, site: str) -> tuple[Group, ...]:
    groups = layer_groups(model)
    return groups if site == "all" else tuple(g for g in groups if g.name.endswith(":in"))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(make())


# Exactness, layer by layer -------------------------------------------------------------------------------------------


def assert_exact(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        m = curved_direction(copy.deepcopy(model)(images.clone()))
    for site in ("all", "consumer"):
        groups = site_groups(model, site)
        found = relevances(model, images, groups, site=site)
        assert_close(found, along(m, reference.outputs_by_unit(copy.deepcopy(model), images, groups, site)))


@pytest.mark.parametrize("case", cases.LAYERS)
def test_layers_in_a_chain(case: str) -> None:
    assert_exact(built(cases.LAYERS[case]), cases.images(3))


@pytest.mark.parametrize("case", cases.RESIDUAL)
def test_layers_whose_input_is_read_by_others(case: str) -> None:
    assert_exact(built(cases.RESIDUAL[case]), cases.images(3))


@pytest.mark.parametrize("case", cases.NETS)
def test_nets(case: str) -> None:
    assert_exact(built(cases.NETS[case]), cases.images(3))


def test_batch_of_one_channels_last_and_training_mode() -> None:
    model = built(cases.Concat).train()
    images = cases.images(1).to(memory_format=torch.channels_last)
    expected = reference.outputs_by_unit(copy.deepcopy(model), images, site_groups(model, "all"), "all")
    with torch.no_grad():
        m = curved_direction(copy.deepcopy(model).eval()(images))
    assert_close(relevances(model, images, site_groups(model, "all")), along(m, expected))
    assert model.training


def test_inputs_overwritten_in_place_after_a_layer_has_read_them() -> None:
    model, images = built(cases.Overwritten), cases.images(3)
    twin = copy.deepcopy(model)
    twin.in_place = False  # type: ignore[assignment]
    groups = site_groups(model, "all")
    assert_close(relevances(model, images, groups), relevances(twin, images, groups), 1e-14)
    expected = reference.outputs_by_unit(twin, images, groups, "all")
    with torch.no_grad():
        m = curved_direction(twin(images))
    assert_close(relevances(model, images, groups), along(m, expected))


def test_input_given_by_keyword() -> None:
    class Named(cases.Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(input=self.stem(input=x))
            return self.head(input=x.mean((2, 3)))

    model = built(lambda: Named(nn.BatchNorm2d(6), nn.Conv2d(3, 6, 3), 6))
    assert_exact(model, cases.images(2))
    groups = site_groups(model, "consumer")
    assert Relevance(statistic="mean_replaced")(model, cases.images(2), groups).samples == 2


def test_parameterised_and_masked_weights() -> None:
    model = built(cases.Concat)
    parametrizations.weight_norm(model.mix)
    prune.random_unstructured(model.fc, "weight", 0.5)
    groups = site_groups(model, "all")
    plain = built(cases.Concat)
    plain.fc.weight.data = model.fc.weight.detach()  # type: ignore[union-attr]
    assert_close(relevances(model, cases.images(2), groups), relevances(plain, cases.images(2), groups), 1e-12)


def test_standardised_weights_count_as_the_layer_applies_them() -> None:
    model = built(lambda: cases.Chain(StdConv2d(6, 5, 3, bias=True), nn.Conv2d(3, 6, 3, padding=1), 5))
    plain = copy.deepcopy(model)
    conv = model.layer
    weight = F.batch_norm(conv.weight.reshape(1, 5, -1), None, None, training=True, momentum=0.0, eps=conv.eps)  # type: ignore[union-attr, operator, arg-type]
    plain.layer = nn.Conv2d(6, 5, 3, padding=1).double()
    plain.layer.weight.data, plain.layer.bias.data = weight.reshape(5, 6, 3, 3).detach(), conv.bias.data  # type: ignore[union-attr, assignment]
    groups, images = site_groups(model, "all"), cases.images(2)
    assert_close(relevances(model, images, groups), relevances(plain, images, groups))


# Exactness, whole models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.MODELS)
def test_timm_models_for_every_objective_and_both_sites(case: str) -> None:
    model, images = cases.timm_model(case)
    images, labels = images[:2], torch.tensor([0, 3])
    groups = find_groups(model, images, width=True).groups
    signs = reference.signs(len(images), cases.CLASSES, SEED)
    with torch.no_grad():
        logits = model(images)
    for site in ("consumer", "all"):
        by_output = reference.outputs_by_unit(copy.deepcopy(model), images, groups, site)
        for name in OBJECTIVES:
            expected = along(reference.directions(name, logits, labels, signs), by_output)
            batches = [Batch(images, labels)]
            found, stays = next(stream(model, batches, groups, Relevance(name, site, seed=SEED)))  # type: ignore[arg-type]
            assert stays.all()
            assert_close(found, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_fused_and_unfused(fused: bool) -> None:
    model, images = cases.timm_model("vit")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    groups = find_groups(model, images).groups
    assert {group.kind for group in groups} == {"head", "channel"}
    with torch.no_grad():
        m = curved_direction(model(images))
    expected = along(m, reference.outputs_by_unit(copy.deepcopy(model), images, groups, "all"))
    assert_close(relevances(model, images, groups), expected)


def test_activation_checkpointing_is_switched_off_and_on_again() -> None:
    model, images = cases.timm_model("vit")
    groups = find_groups(model, images).groups
    expected = relevances(model, images, groups)
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    assert_close(relevances(model, images, groups), expected, 1e-14)
    assert model.grad_checkpointing is True


def test_units_of_several_and_of_scattered_channels() -> None:
    model, images = built(cases.Concat), cases.images(3)
    whole = relevances(model, images, layer_groups(model))
    scattered = Member(("mix", "in", 0), torch.tensor([1, 2, 4, 5]), torch.tensor([1, 0, 0, 1]))
    prefix = Member(("mix", "out", 0), torch.tensor([0, 1]), torch.tensor([0, 1]))
    found = relevances(model, images, (Group("mixed", "channel", 2, (scattered, prefix)),))["mixed"]
    inside, outside = whole["mix:in"], whole["mix:out"]
    expected = torch.stack([inside[:, 2] + inside[:, 4], inside[:, 1] + inside[:, 5]], 1) + outside[:, :2]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_removal_is_predicted_to_first_order() -> None:
    """Really move the weights: the logit changes by -t v_u when the consumer's columns shrink by a share t."""
    model, images = built(cases.Concat), cases.images(4)
    groups = site_groups(model, "consumer")
    step = 1e-6
    found = relevances(model, images, groups, objective=lambda logits, target: logits[:, 2], site="consumer")
    with torch.no_grad():
        before = model(images)[:, 2]
        for unit in range(6):
            moved = copy.deepcopy(model)
            moved.mix.weight[:, unit] *= 1 - step  # type: ignore[index, union-attr]
            change = (moved(images)[:, 2] - before) / step
            torch.testing.assert_close(change, -found["mix:in"][:, unit], rtol=1e-4, atol=1e-7)


# By hand -------------------------------------------------------------------------------------------------------------


class TwoUnits(nn.Module):
    """relu([[1, .5], [-1, 1]] x), then [[3, -1], [1, 2]]; on (1, 2): hidden (2, 1), logits (5, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.one.weight.data = torch.tensor([[1.0, 0.5], [-1.0, 1.0]])
        self.two.weight.data = torch.tensor([[3.0, -1.0], [1.0, 2.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x.flatten(1))))


HAND_IMAGES = torch.tensor([[1.0, 2.0], [2.0, -1.0]]).reshape(2, 2, 1, 1)
"""Hidden (2, 1) and (1.5, 0); logits (5, 4) and (4.5, 1.5): class 0 both times."""
HAND_GROUP = Group(
    "hidden",
    "channel",
    2,
    tuple(Member((name, side, 0), torch.arange(2), torch.arange(2)) for name, side in (("one", "out"), ("two", "in"))),
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # v = W2[0, u] h_u: (6, -1) and (4.5, 0)
        ({"objective": "predicted_logit"}, [(36 + 20.25) / 2, 0.5]),
        ({"objective": "predicted_logit", "statistic": "batched", "batch": 2}, [5.25**2, 0.25]),
        ({"objective": "predicted_logit", "statistic": "batched", "batch": 1}, [(36 + 20.25) / 2, 0.5]),
        # producer and consumer scale the same signal: twice the relevance
        ({"objective": "predicted_logit", "site": "all"}, [2 * (36 + 20.25), 2.0]),
        # (W2[0, u] - W2[1, u]) h_u: (4, -3) and (3, 0)
        ({"objective": "margin"}, [(16 + 9) / 2, 4.5]),
        # means of hidden: 1.75 and 0.5, so v = 3 (+-0.25) and -1 (+-0.5)
        ({"objective": "predicted_logit", "statistic": "mean_replaced"}, [0.5625, 0.25]),
        # p - onehot = (1 - p_0) (-1, 1), p_0 = sigmoid(margin 1 and 3)
        (
            {"objective": "pseudo_label"},
            [(0.26894142**2 * 16 + 0.04742587**2 * 9) / 2, 0.26894142**2 * 9 / 2],
        ),
        # labels 1 and 0: m = p_0 (1, -1) and (1 - p_0) (-1, 1)
        ({"objective": "label"}, [(0.73105858**2 * 16 + 0.04742587**2 * 9) / 2, 0.73105858**2 * 9 / 2]),
        # only the second sample's largest probability, 0.953, exceeds 0.9
        ({"objective": "predicted_logit", "threshold": 0.9}, [20.25, 0.0]),
    ],
)
def test_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    data = [Batch(HAND_IMAGES, torch.tensor([1, 0]))]
    scores = Relevance(**options)(TwoUnits(), data, (HAND_GROUP,))
    torch.testing.assert_close(scores["hidden"], torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    assert (scores.samples, scores.skipped) == ((1, 1) if "threshold" in options else (2, 0))


def test_projection_estimates_the_sum_over_all_outputs() -> None:
    # Sum over k of (W2[k, u] h_u)^2 on the first image: 6^2 + 2^2 and 1 + 2^2
    data = HAND_IMAGES[:1].expand(4000, -1, -1, -1)
    scores = Relevance(objective="projection")(TwoUnits(), data, (HAND_GROUP,), batch_size=500)
    torch.testing.assert_close(scores["hidden"], torch.tensor([40.0, 5.0]).double(), rtol=0.03, atol=0)


# Statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["consumer", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_against_stored_relevances(objective: str, site: str) -> None:
    model, images, labels = built(cases.Concat), cases.images(11), torch.arange(11) % cases.CLASSES
    groups = site_groups(model, site)
    data = [Batch(images[:5], labels[:5]), Batch(images[5:], labels[5:])]
    options: dict[str, Any] = {"objective": objective, "site": site, "seed": SEED}
    with torch.no_grad():
        logits = model(images)
    m = reference.directions(objective, logits, labels, reference.signs(11, cases.CLASSES, SEED))
    v = along(m, reference.outputs_by_unit(copy.deepcopy(model), images, groups, site))
    scores = Relevance(statistic="second_moment", **options)(model, data, groups)
    assert_close(scores.values(), {name: sum(row * row for row in rows) / 11 for name, rows in v.items()})
    for batch in (1, 3, 11, 128):
        scores = Relevance(statistic="batched", batch=batch, **options)(model, data, groups)
        assert_close(scores.values(), {name: reference.batched(rows, batch) for name, rows in v.items()})
    if site == "consumer":
        scores = Relevance(statistic="mean_replaced", **options)(model, data, groups)
        v = reference.mean_replaced(copy.deepcopy(model), images, groups, m)
        assert_close(scores.values(), {name: sum(row * row for row in rows) / 11 for name, rows in v.items()})


def test_mean_replaced_on_a_transformer() -> None:
    model, images = cases.timm_model("vit")
    groups = find_groups(model, images).groups
    with torch.no_grad():
        m = reference.directions("margin", model(images))
    v = reference.mean_replaced(copy.deepcopy(model), images, groups, m)
    scores = Relevance(objective="margin", statistic="mean_replaced")(model, images, groups, batch_size=2)
    assert_close(scores.values(), {name: rows.square().mean(0) for name, rows in v.items()})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("statistic", ["second_moment", "mean_replaced"])
def test_batch_size_and_order_do_not_matter(statistic: str, dtype: torch.dtype, tolerance: float) -> None:
    model = built(lambda: cases.LAYERS["bottleneck"]()).to(dtype)
    images = cases.images(64).to(dtype)
    groups = site_groups(model, "consumer")

    def scores(data: object, batch_size: int) -> dict[str, Tensor]:
        return Relevance("margin", statistic=statistic)(model, data, groups, batch_size=batch_size).values()

    expected = scores(images, 64)
    assert_close(scores(images, 1), expected, tolerance)
    assert_close(scores(images, 7), expected, tolerance)
    assert_close(scores(images[torch.randperm(64)], 7), expected, tolerance)


@pytest.mark.parametrize("objective", ["pseudo_label", "projection"])
def test_batched_does_not_depend_on_the_loaders_batches(objective: str) -> None:
    model, images = built(cases.Concat), cases.images(20)
    groups = site_groups(model, "consumer")
    options: dict[str, Any] = {"statistic": "batched", "batch": 6, "objective": objective}
    expected = Relevance(**options)(model, images, groups, batch_size=20)
    for size in (1, 4, 6, 7):
        found = Relevance(**options)(model, images, groups, batch_size=size)
        assert_close(found.values(), expected.values(), 1e-12)


def test_batched_and_second_moment_are_not_the_same_number() -> None:
    """Random signs have mean zero, so that the mean of eight keeps about an eighth."""
    model, images = built(cases.Concat), cases.images(64)
    groups = site_groups(model, "consumer")
    options: dict[str, Any] = {"objective": "projection"}
    per_sample = Relevance(**options)(model, images, groups)
    by_batch = Relevance(statistic="batched", batch=8, **options)(model, images, groups)
    for group in groups:
        assert 0.03 < by_batch[group.name].sum() / per_sample[group.name].sum() < 0.4


def test_shards_add_up_to_the_whole() -> None:
    model, images = built(cases.Concat), cases.images(10)
    groups = site_groups(model, "all")
    with torch.no_grad():
        middle = float(model(images).softmax(1).amax(1).median())
    options: dict[str, Any] = {"site": "all", "threshold": middle}
    whole = Relevance(**options)(model, images, groups)
    merged = Relevance(**options)(model, images[:3], groups) + Relevance(**options)(model, images[3:], groups)
    assert (merged.samples, merged.skipped) == (whole.samples, whole.skipped)
    assert (whole.samples, whole.skipped) == (5, 5)
    assert_close(merged.values(), whole.values(), 1e-12)


def test_a_reference_of_the_dense_model_is_used() -> None:
    model, images = built(cases.Concat), cases.images(4)
    groups = site_groups(model, "consumer")
    other = torch.tensor([[0.0, 1.0, 0.0, 9.0]]).expand(4, -1).double()
    found = Relevance(objective="pseudo_label")(model, [Batch(images, None, other)], groups)
    labelled = [Batch(images, torch.full((4,), 3))]
    expected = Relevance(objective="label")(model, labelled, groups)
    assert_close(found.values(), expected.values(), 1e-14)


def test_bfloat16_autocast_ranks_alike() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=False).eval()
    images = torch.randn(8, 3, 64, 64)
    groups = find_groups(model, images[:2]).groups
    for site in ("consumer", "all"):
        options: dict[str, Any] = {"site": site, "objective": "predicted_logit"}
        exact = Relevance(**options)(model, images, groups)
        rough = Relevance(autocast=torch.bfloat16, **options)(model, images, groups)
        for group in groups:
            pair = torch.stack([exact[group.name], rough[group.name]])
            # eight bits of mantissa through eighteen layers; how products are rounded is up to the CPU's kernels
            assert float(torch.corrcoef(pair)[0, 1]) > 0.95, (site, group.name)


def test_an_outer_autocast_does_not_leak_in() -> None:
    model, images = built(cases.Concat).float(), cases.images(3).float()
    groups = site_groups(model, "all")
    expected = relevances(model, images, groups)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(relevances(model, images, groups), expected, 0)


def test_under_inference_mode_and_without_gradients() -> None:
    model, images = built(cases.Concat), cases.images(3)
    groups = site_groups(model, "all")
    expected = Relevance(site="all")(model, images, groups).values()
    with torch.no_grad():
        assert_close(Relevance(site="all")(model, images, groups).values(), expected, 0)
    with torch.inference_mode():
        data = [Batch(images.clone(), torch.zeros(3, dtype=torch.int64), model(images))]
        assert_close(Relevance(site="all")(model, data, groups).values(), expected, 0)
        Relevance(site="all", objective="label")(model, data, groups)


def test_half_precision_model() -> None:
    model, images = built(cases.Concat).bfloat16(), cases.images(3).bfloat16()
    groups = site_groups(model, "all")
    scores = Relevance(site="all")(model, images, groups)
    assert all(s.dtype == torch.float64 and s.isfinite().all() for s in scores.values().values())


# Refusals ------------------------------------------------------------------------------------------------------------


class Interacting(nn.Module):
    """A linear net with a layer in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.fc, self.middle, self.out = nn.Linear(12, 6), middle, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.fc(x.flatten(1))))


class Centre(nn.Module):
    """Subtracts the mean over the batch, or adds noise."""

    def __init__(self, noise: bool) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) if self.noise else x - x.mean(0)


@pytest.mark.parametrize(
    "middle", [nn.BatchNorm1d(6, track_running_stats=False), Centre(noise=False), Centre(noise=True)]
)
def test_samples_that_influence_each_other_are_refused(middle: nn.Module) -> None:
    model = Interacting(middle)
    with pytest.raises(ModelError, match=r"out: the first dimension .* samples influence each other"):
        Relevance()(model, torch.randn(4, 3, 2, 2), site_groups(model, "consumer"))


def test_logits_that_depend_on_other_samples_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(ModelError, match=r"the logits: .*samples influence each other"):
        Relevance()(model, torch.randn(4, 3, 2, 2), site_groups(model, "consumer"))


def test_sequence_first_and_window_first_layers_are_refused_by_name() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).permute(2, 0, 1)
            return self.head(torch.tanh(self.fc(x)).mean(0))

    for model, name in ((SequenceFirst(), "fc"), (cases.Windows(merge=True), "norm|qkv|proj")):
        with pytest.raises(ModelError, match=rf"^({name}): the first dimension .*Put this layer into `ignore`"):
            relevances(model.eval(), torch.randn(2, 3, 8, 8), layer_groups(model))


class ReadDirectly(nn.Module):
    """The linear layer is never called; its weight may be used all the same."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.fc, self.odd, self.out = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.flatten(1))
        return self.out(F.linear(x, self.odd.weight) if self.used else x)


def test_a_layer_that_is_never_called() -> None:
    model, images = ReadDirectly(used=True), torch.randn(4, 3, 2, 2)
    with pytest.raises(ModelError, match=r"odd \(Linear\): its weights take part .* never called"):
        relevances(model, images, layer_groups(model))
    model.used = False
    assert (relevances(model, images, layer_groups(model))["odd:in"] == 0).all()


@pytest.mark.parametrize("how", ["no_grad", "reentrant checkpoint"])
def test_a_layer_that_runs_without_gradients(how: str) -> None:
    class Frozen(Interacting):
        def forward(self, x: Tensor) -> Tensor:
            if how == "no_grad":
                with torch.no_grad():
                    x = self.fc(x.flatten(1))
            else:
                x = checkpoint(self.fc, x.flatten(1).requires_grad_(), use_reentrant=True)
            return self.out(x)

    model = Frozen(nn.Identity())
    with pytest.raises(ModelError, match="fc runs without gradients"):
        relevances(model, torch.randn(4, 3, 2, 2), layer_groups(model))


def test_attention_of_torch_is_refused_where_it_reads_weights_directly() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attn, self.head = (
                cases.ToTokens(6),
                nn.MultiheadAttention(6, 2, batch_first=True),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.attn(x, x, x, need_weights=False)[0].mean(1))

    model = Attending()
    with pytest.raises(ModelError, match=r"attn.out_proj .*never called"):
        relevances(model, torch.randn(2, 3, 8, 8), layer_groups(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "loss"}, "objective must be one of pseudo_label, .* got 'loss'"),
        ({"site": "producer"}, "site must be one of consumer, all, layers, got 'producer'"),
        ({"statistic": "mean"}, "statistic must be one of second_moment, .* got 'mean'"),
        ({"statistic": "mean_replaced", "site": "all"}, "'mean_replaced' is defined at site 'consumer' only"),
        ({"statistic": "mean_replaced", "threshold": 0.5}, "threshold= has no meaning for 'mean_replaced'"),
        ({"statistic": "batched", "batch": 0}, "batch must be at least 1, got 0"),
        ({"statistic": "signed"}, "'signed' is not defined for units"),
        ({"autocast": "bfloat16"}, "autocast must be a torch.dtype such as torch.bfloat16, got 'bfloat16'"),
        ({"threshold": 1.0}, "0 <= threshold < 1, got 1.0"),
        ({"threshold": -0.1}, "0 <= threshold < 1, got -0.1"),
    ],
)
def test_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Relevance(**options)(TwoUnits(), HAND_IMAGES, (HAND_GROUP,))


def test_groups_are_refused() -> None:
    model, index = TwoUnits(), torch.arange(2)
    with pytest.raises(ArgumentError, match="groups is empty"):
        Relevance()(model, HAND_IMAGES, ())
    with pytest.raises(ArgumentError, match="the same name"):
        Relevance()(model, HAND_IMAGES, (HAND_GROUP, HAND_GROUP))
    elsewhere = Group("g", "channel", 2, (Member(("three", "in", 0), index, index),))
    with pytest.raises(ArgumentError, match="Group g: the model has no channel 1 on side 'in' of 'three'"):
        Relevance()(model, HAND_IMAGES, (elsewhere,))
    beyond = Group("g", "channel", 2, (Member(("two", "in", 0), index + 1, index),))
    with pytest.raises(ArgumentError, match="Group g: the model has no channel 2 on side 'in' of 'two'"):
        Relevance()(model, HAND_IMAGES, (beyond,))
    producers = Group("g", "channel", 2, (Member(("one", "out", 0), index, index),))
    with pytest.raises(ModelError, match="Group g has no layer to score at site 'consumer'"):
        Relevance()(model, HAND_IMAGES, (producers,))


@pytest.mark.parametrize("objective", ["pseudo_label", "margin", "label"])
def test_one_class_is_refused(objective: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 1))
    data = [Batch(torch.randn(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(ArgumentError, match=f"objective '{objective}' needs at least two classes"):
        Relevance(objective=objective)(model, data, site_groups(model, "consumer"))


def test_data_are_refused() -> None:
    model, groups = TwoUnits(), (HAND_GROUP,)
    with pytest.raises(DataError, match=r"threshold=0\.99 on none of 2 images"):
        Relevance(threshold=0.99)(model, HAND_IMAGES, groups)
    with pytest.raises(DataError, match="reads the data twice"):
        Relevance(statistic="mean_replaced")(model, iter([HAND_IMAGES]), groups)
    with pytest.raises(DataError, match="objective 'label' needs labels"):
        Relevance(objective="label")(model, HAND_IMAGES, groups)
    with pytest.raises(DataError, match=r"Labels must be below 2.*got 2"):
        Relevance(objective="label")(model, [Batch(HAND_IMAGES, torch.tensor([0, 2]))], groups)
    with pytest.raises(DataError, match=r"Image 0 .*: the reference logits are \[2, 3\], the model's are \[2, 2\]"):
        Relevance()(model, [Batch(HAND_IMAGES, None, torch.zeros(2, 3))], groups)
    with pytest.raises(DataError, match="yielded no batch"):
        Relevance()(model, [], groups)


def test_gradients_that_are_not_finite_are_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two((self.one(x.flatten(1)) * 0).sqrt()) + self.one(x.flatten(1))

    model = Root()
    with pytest.raises(NonFiniteError, match="Batch 0: the relevances of group one:in contain NaN or Inf"):
        relevances(model, HAND_IMAGES, site_groups(model, "consumer"), site="consumer")


def test_memory_that_runs_out_is_explained() -> None:
    class Large(TwoUnits):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 3:  # the check that samples are apart sees three
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(x)

    images = HAND_IMAGES.repeat(2, 1, 1, 1)
    for work in (
        lambda **how: Relevance()(Large(), images, (HAND_GROUP,), **how),
        lambda **how: weight_scores(Large(), images, **how),
    ):
        with pytest.raises(MemoryLimitError, match=r"ran out with 4 images at once .*Pass a smaller batch_size="):
            work()
        assert work(batch_size=2).samples == 4


def test_logits_without_scored_layers_are_refused() -> None:
    class Cut(TwoUnits):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ModelError, match="nothing to differentiate"):
        Relevance()(Cut(), HAND_IMAGES, (HAND_GROUP,))


# The user's model is a guest -----------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised in the middle of a forward pass."""


class Breaking(nn.Module):
    """Raises, or makes NaN, in one of its calls."""

    def __init__(self, at: int, error: BaseException | None) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        if next(self.calls) < self.at:
            return x
        if self.error is not None:
            raise self.error
        return x + float("nan")


def lived_in(model: nn.Module) -> nn.Module:
    """A model with a history: mixed modes, frozen parameters, gradients, a hook, an in-place flag."""
    modules = list(model.modules())
    model.train()
    modules[len(modules) // 2].eval()
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    for parameter in parameters[1::3]:
        parameter.grad = torch.full_like(parameter, 0.5)
    modules[-1].register_forward_hook(lambda module, args, output: None)
    modules[1].register_forward_pre_hook(lambda module, args: None)
    return model


def failing(kind: str, images: Tensor) -> tuple[object, Breaking | None]:
    """Data and a module in the middle of the model, one of which fails while the second batch is scored."""
    in_the_middle = 3  # two passes check that samples are apart, one is the first batch
    if kind == "nan in a batch":
        return [images, torch.full_like(images, float("nan"))], None
    if kind == "interrupted data":

        def data() -> Iterator[Tensor]:
            yield images
            raise KeyboardInterrupt

        return data(), None
    if kind == "nan in the logits":
        return [images, images], Breaking(in_the_middle, None)
    if kind == "exception in forward":
        return [images, images], Breaking(in_the_middle, Stop())
    if kind == "exception in the first forward":
        return [images, images], Breaking(1, Stop())
    if kind == "interrupted forward":
        return [images, images], Breaking(in_the_middle, KeyboardInterrupt())
    return [images, images], None


FAILURES: dict[str, type[BaseException] | None] = {
    "nothing": None,
    "nan in a batch": NonFiniteError,
    "nan in a weight": NonFiniteError,
    "nan in the logits": NonFiniteError,
    "exception in forward": Stop,
    "exception in the first forward": Stop,
    "interrupted forward": KeyboardInterrupt,
    "interrupted data": KeyboardInterrupt,
}


def guest_model(name: str) -> tuple[nn.Module, Tensor, str]:
    """A model, images, and the name of a module after which it can break."""
    if name == "tiny":
        return built(cases.InPlaceSum).float(), cases.images(2).float(), "conv2"
    if name == "overwriting":
        return built(cases.VGG).float(), cases.images(2).float(), "6"
    options, middle = GUESTS[name]
    return timm.create_model(name, num_classes=3, **options), torch.randn(2, 3, 32, 32), middle


GUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "mobilenetv2_035": ({}, "blocks.3.1"),
    "resnet50": ({"layers": (1, 1, 2, 1), "channels": (16, 24, 32, 40)}, "layer3.1"),
    "vit_small_patch16_224": ({"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3}, "blocks.1.mlp.act"),
}
"""Arguments, and a module in the middle."""


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["tiny", "overwriting", *GUESTS])
def test_the_model_is_left_as_it_was(name: str, failure: str, fingerprint: Fingerprint) -> None:
    model, images, middle = guest_model(name)
    groups = tuple(g for g in layer_groups(model) if not g.name.startswith("conv_stem"))
    data, breaking = failing(failure, images)
    if breaking is not None:
        # a user's hook that breaks: it is part of the model's state, and must stay
        model.get_submodule(middle).register_forward_hook(lambda module, args, output: breaking(output))
    lived_in(model)
    if failure == "nan in a weight":
        next(iter(model.parameters())).data.view(-1)[0] = float("nan")
    before = fingerprint(model)
    expected = FAILURES[failure]
    if expected is None:
        Relevance(site="all")(model, data, groups)
    else:
        with pytest.raises(expected):
            Relevance(site="all")(model, data, groups)
    assert fingerprint(model) == before


@pytest.mark.parametrize("failure", FAILURES)
def test_the_model_is_left_as_it_was_by_mean_replaced(failure: str, fingerprint: Fingerprint) -> None:
    model, images, middle = guest_model("tiny")
    data, breaking = failing(failure, images)
    data = data if isinstance(data, list) else torch.utils.data.DataLoader(_Interrupted(), batch_size=2)  # type: ignore[arg-type]
    if breaking is not None:
        model.get_submodule(middle).register_forward_hook(lambda module, args, output: breaking(output))
    lived_in(model)
    if failure == "nan in a weight":
        next(iter(model.parameters())).data.view(-1)[0] = float("nan")
    before = fingerprint(model)
    expected = FAILURES[failure]
    groups = site_groups(model, "consumer")
    if expected is None:
        Relevance(statistic="mean_replaced")(model, data, groups)
    else:
        with pytest.raises(expected):
            Relevance(statistic="mean_replaced")(model, data, groups)
    if failure != "interrupted data":  # a DataLoader draws its own seed from the global generator
        assert fingerprint(model) == before
    else:
        assert fingerprint(model) | {"random": None} == before | {"random": None}


class _Interrupted(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        if index == 3:
            raise KeyboardInterrupt
        return torch.randn(3, 8, 8)


def test_a_generator_that_is_not_read_to_its_end(fingerprint: Fingerprint) -> None:
    model = lived_in(built(cases.Concat))
    before = fingerprint(model)
    batches = iterate(cases.images(6), batch_size=2)
    found = stream(model, batches, site_groups(model, "all"), Relevance(site="all"), objective=curved)
    next(found)
    assert fingerprint(model) == before
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert fingerprint(model) == before


def test_the_users_images_are_left_as_they_were() -> None:
    class Scaling(TwoUnits):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    images = HAND_IMAGES.clone().requires_grad_()
    Relevance(site="all")(TwoUnits(), [images], (HAND_GROUP,))
    assert images.grad is None
    images = HAND_IMAGES.clone()
    Relevance(statistic="mean_replaced")(Scaling(), images, (HAND_GROUP,))
    assert torch.equal(images, HAND_IMAGES)


def test_nothing_is_kept_alive() -> None:
    model, images = built(cases.Concat), cases.images(4)
    activations: list[weakref.ref] = []
    handle = model.mix.register_forward_hook(lambda module, args, out: activations.append(weakref.ref(out)))  # type: ignore[union-attr]
    batches = iterate(images, batch_size=2)
    found = stream(model, batches, site_groups(model, "all"), Relevance(site="all"), objective=curved)
    gc.disable()  # no cycles either: activations go with the batch, not when the collector happens to run
    try:
        for _ in range(2):
            next(found)
            assert activations
            assert all(reference() is None for reference in activations)
    finally:
        gc.enable()
        handle.remove()


def test_an_in_place_activation_costs_one_more_forward_once() -> None:
    model, images = built(cases.VGG), cases.images(6)
    calls = itertools.count()
    model.register_forward_pre_hook(lambda module, args: (next(calls), None)[1])
    list(stream(model, iterate(images, batch_size=2), layer_groups(model), Relevance(site="all"), objective=curved))
    assert next(calls) == 2 + 3 + 1  # samples apart, batches, the repetition
