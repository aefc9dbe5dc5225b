"""Criteria to compare with, each against a slow twin: slices of tensors written out by hand, loops over units."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import cases
import nets
import numpy as np
import pytest
import reference
import timm
import torch
from reference import layer_groups
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import jbrprune
from baselines import CRITERIA, LABELS, LOW_RANK, WEIGHT_CRITERIA, activations, describe_departure, weights_only
from baselines.common import parts
from baselines.torch_pruning_shipped import KNOWN_FAULTS
from jbrprune.budgets.budget import Floors
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, ModelError, UnsupportedModelError
from jbrprune.structure.directions import find_directions
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Member

Values = dict[str, Tensor]
SHIPPED = tuple(name for name in CRITERIA if name.startswith("tp_"))
NEEDS_NORM = ("bn_scale", "tp_bn_scale")

# Group -> layer -> the tensors of a unit: parameter and the dimension that holds the unit. Consumers are marked.
PRODUCERS = {"a": ("a", "c"), "b": ("b",), "fc": ("fc",)}
CONSUMERS = {"a": ("b", "fc"), "b": ("c",), "fc": ("head",)}
SLICES: dict[str, dict[str, list[tuple[str, int]]]] = {
    "a": {
        "a out": [("a.weight", 0)],
        "bn_a": [("bn_a.weight", 0), ("bn_a.bias", 0)],
        "b in": [("b.weight", 1)],
        "c out": [("c.weight", 0)],
        "bn_c": [("bn_c.weight", 0), ("bn_c.bias", 0)],
        "fc in": [("fc.weight", 1)],
    },
    "b": {
        "b out": [("b.weight", 0), ("b.bias", 0)],
        "bn_b": [("bn_b.weight", 0), ("bn_b.bias", 0)],
        "c in": [("c.weight", 1)],
    },
    "fc": {"fc out": [("fc.weight", 0), ("fc.bias", 0)], "head in": [("head.weight", 1)]},
}
SIZES = {"a": 4, "b": 3, "fc": 5}
SEED = 3
IMAGES = cases.images(6, size=7) * torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None, None, None]
CLASSES = torch.tensor([0, 1, 2, 3, 1, 0])


class Tiny(nn.Module):
    """conv-bn-relu, a residual block of two convolutions, pool, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.c, self.bn_c = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc, self.head = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)[-1]

    def steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """What b, c, fc and head read, and the logits."""
        one = F.relu(self.bn_a(self.a(x)))
        two = F.relu(self.bn_b(self.b(one)))
        pooled = F.relu(self.bn_c(self.c(two)) + one).mean((2, 3))
        hidden = F.relu(self.fc(pooled))
        return one, two, pooled, hidden, self.head(hidden)


def tiny(sharp: float = 1.0) -> nn.Module:
    """Generic parameters, but centred, so that images differ in what they switch on and in their class."""
    torch.manual_seed(SEED)
    model = cases.randomised(Tiny(), SEED)
    model.fc.weight.data *= 3  # type: ignore[union-attr, operator]
    for norm in (model.bn_a, model.bn_b, model.bn_c):
        norm.momentum = 1.0  # type: ignore[union-attr]
        model.train()(IMAGES)
    for layer, x in ((model.fc, 2), (model.head, 3)):
        layer.bias.data -= layer(model.eval().steps(IMAGES)[x]).detach().mean(0)  # type: ignore[union-attr, operator]
    for tensor in (model.head.weight, model.head.bias):  # type: ignore[union-attr]
        tensor.data *= 4 * sharp  # type: ignore[union-attr, operator]
    return model.eval()


def batches(*sizes: int, labels: bool = True, images: Tensor = IMAGES, classes: Tensor = CLASSES) -> list[Batch]:
    parts = zip(images.split(sizes or len(images)), classes.split(sizes or len(images)))  # type: ignore[arg-type]
    return [Batch(x, y if labels else None) for x, y in parts]


def groups_of(model: nn.Module, images: Tensor = IMAGES) -> tuple[Group, ...]:
    return find_groups(model, images[:2]).groups


def scored(name: str, model: nn.Module, data: list[Batch] | None = None, **options: int) -> Values:
    data = batches() if data is None else data
    criterion = replace(CRITERIA[name], **options) if options else CRITERIA[name]  # type: ignore[type-var]
    return values_of(criterion(model, data, groups_for(name, model)))


def values_of(scores: Scores | Values) -> Values:
    return scores.values() if isinstance(scores, Scores) else scores


def close(found: Values, expected: Values, rtol: float = 1e-9) -> bool:
    pairs = [(found[group].double(), expected[group].double()) for group in expected.keys() & found.keys()]
    return found.keys() == expected.keys() and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=rtol, atol=0) for one, other in pairs
    )


def groups_for(name: str, model: nn.Module) -> tuple[Group, ...]:
    """All groups; torch-pruning refuses one without batch norm."""
    return tuple(group for group in groups_of(model) if name != "tp_bn_scale" or group.name != "fc")


# --- slow twins ------------------------------------------------------------------------------------


def by_unit(
    number: Callable[[str, int, int], float], layers: Callable[[str, str], bool] = lambda g, layer: True
) -> Values:
    """For every unit the sum of ``number(parameter, dim, unit)`` over its slices in the layers that are meant."""
    return {
        group: torch.tensor(
            [
                sum(number(*where, unit) for layer, own in slices.items() if layers(group, layer) for where in own)
                for unit in range(SIZES[group])
            ],
            dtype=torch.float64,
        )
        for group, slices in SLICES.items()
    }


def weights(model: nn.Module) -> Values:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module, image: Tensor, m: Callable[[Tensor], Tensor]) -> Values:
    """Gradient of a scalar of the logits of one image."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(m(model(image[None])[0]), list(named.values()))
    return dict(zip(named, found, strict=True))


def of_labels(model: nn.Module, labels: Tensor = CLASSES) -> list[Values]:
    return [gradients(model, x, lambda f, y=y: f.logsumexp(0) - f[y]) for x, y in zip(IMAGES, labels)]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)  # type: ignore[return-value]


def relevances(model: nn.Module, samples: list[Values], side: str = "") -> list[Values]:
    """Per sample, the sum of w g over all slices of a unit, or over the layers whose name ends on ``side``."""
    w = weights(model)
    return [
        by_unit(
            lambda name, dim, u, g=g: float((w[name] * g[name]).select(dim, u).sum()), lambda _, lay: lay.endswith(side)
        )
        for g in samples
    ]


def over(samples: list[Values], function: Callable[[list[Tensor]], Tensor]) -> Values:
    return {group: function([v[group] for v in samples]) for group in SIZES}


def by_layer(model: nn.Module, samples: list[Values]) -> Values:
    """The sum over layers of the squared mean over samples of w g."""
    w = weights(model)
    total = {}
    for group, slices in SLICES.items():
        values = []
        for unit in range(SIZES[group]):
            squares = 0.0
            for own in slices.values():
                v = [sum(float((w[n] * g[n]).select(d, unit).sum()) for n, d in own) for g in samples]
                squares += (sum(v) / len(v)) ** 2
            values.append(squares)
        total[group] = torch.tensor(values, dtype=torch.float64)
    return total


def kernels(model: nn.Module, group: str) -> list[Tensor]:
    """``[units, n]`` the filters of every producer."""
    return [model.get_submodule(name).weight.detach().flatten(1) for name in PRODUCERS[group]]  # type: ignore[operator]


def about(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Note which criterion a test is about."""
    TESTED.add(name)
    return lambda test: test


TESTED: set[str] = set()


# --- from weights ----------------------------------------------------------------------------------


@about("l1")
def test_l1_is_the_norm_of_the_filters() -> None:
    model = tiny()
    expected = {g: mean([k.abs().sum(1) for k in kernels(model, g)]) * len(PRODUCERS[g]) for g in SIZES}
    assert close(scored("l1", model), expected)


@about("l2")
def test_l2_takes_the_filters_of_all_producers_as_one_vector() -> None:
    model = tiny()
    assert close(scored("l2", model), {g: torch.cat(kernels(model, g), 1).norm(dim=1) for g in SIZES})


@about("l1_grouped")
@about("l2_grouped")
@about("l2_normalised")
@about("lamp")
def test_grouped_magnitudes_count_everything_but_biases() -> None:
    model = tiny()
    w = weights(model)

    def power(p: int) -> Values:
        return by_unit(lambda n, d, u: 0.0 if "bias" in n else float(w[n].select(d, u).abs().pow(p).sum()))

    assert close(scored("l1_grouped", model), power(1))
    assert close(scored("l2_grouped", model), power(2))
    assert close(scored("l2_normalised", model), {g: v / v.mean() for g, v in power(2).items()})
    lamp = {g: torch.stack([x / v[v >= x].sum() for x in v]) for g, v in power(2).items()}
    assert close(scored("lamp", model), lamp)


def test_equal_units_share_their_lamp_score() -> None:
    model = tiny()
    for name, parameter in model.named_parameters():
        if name.startswith(("fc", "head")):
            parameter.data.fill_(0.5)
    assert scored("lamp", model)["fc"].tolist() == pytest.approx([1 / 5] * 5)


@about("l2_isomorphic")
def test_isomorphic_groups_are_ranked_together() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)], nn.Flatten(), nn.Linear(12, 2)).double()
    groups = find_groups(model, torch.randn(2, 3, 2, 2).double()).groups
    normalised = weights_only.l2_normalised(model, (), groups)
    found = weights_only.l2_isomorphic(model, (), groups)
    for names in (("0", "1", "2"), ("3",)):  # the last is read by a linear layer
        everything = [float(x) for name in names for x in normalised[name]]
        for name in names:
            expected = [sum(y <= float(x) for y in everything) / len(everything) for x in normalised[name]]
            assert found[name].tolist() == pytest.approx(expected)


@about("random")
def test_random_comes_from_its_seed() -> None:
    model = tiny()
    first, again, other = (scored("random", model, seed=seed) for seed in (0, 0, 1))
    assert close(first, again)
    assert all((first[g] != other[g]).all() and len(first[g].unique()) == SIZES[g] for g in SIZES)


@about("bn_scale")
def test_bn_scale_averages_norms_and_knows_nothing_of_the_rest() -> None:
    model = tiny()
    a, b, c = (weights(model)[f"bn_{x}.weight"].abs() for x in "abc")
    known = torch.cat([(a + c) / 2, b])
    assert close(scored("bn_scale", model), {"a": (a + c) / 2, "b": b, "fc": known.mean().expand(5)})


@about("fpgm")
def test_fpgm_adds_up_distances() -> None:
    model = tiny()
    expected = {}
    for group, size in SIZES.items():
        total = torch.zeros(size, dtype=torch.float64)
        for k in kernels(model, group):
            for u in range(size):
                total[u] += sum(math.dist(k[u].tolist(), k[i].tolist()) for i in range(size))
        expected[group] = total
    assert close(scored("fpgm", model), expected, rtol=1e-6)


@about("whc")
def test_whc_weights_norms_by_dissimilarity() -> None:
    model = tiny()
    expected = {}
    for group, size in SIZES.items():
        total = torch.zeros(size, dtype=torch.float64)
        for k in kernels(model, group):
            for u in range(size):
                for i in range(size):
                    norms = float(k[u].norm() * k[i].norm())
                    total[u] += norms - abs(float(k[u] @ k[i])) if i != u else 0.0
        expected[group] = total
    assert close(scored("whc", model), expected)


@about("synflow")
def test_synflow_is_what_the_flow_loses_with_each_weight() -> None:
    """The flow is affine in every single weight, so w dR/dw is the difference to w = 0."""
    model = tiny()
    work = copy.deepcopy(model)
    for parameter in work.parameters():
        parameter.data.abs_()
    for norm in (work.bn_a, work.bn_b, work.bn_c):
        norm.running_mean.zero_()  # type: ignore[union-attr, operator]
    ones = torch.ones(1, 3, 7, 7, dtype=torch.float64)
    work.requires_grad_(False)
    whole, lost = float(work(ones).sum()), {}
    for name, parameter in work.named_parameters():
        lost[name] = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            flat = parameter.data.view(-1)
            before = float(flat[i])
            flat[i] = 0
            lost[name].data.view(-1)[i] = whole - float(work(ones).sum())
            flat[i] = before
    assert close(scored("synflow", model), by_unit(lambda n, d, u: float(lost[n].select(d, u).sum())), rtol=1e-8)


# --- from activations ------------------------------------------------------------------------------


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Consumer -> ``[C, N * positions]`` what it reads."""
    with torch.no_grad():
        *steps, _ = model.steps(IMAGES)  # type: ignore[operator]
    return {n: x.transpose(0, 1).flatten(1) for n, x in zip(("b", "c", "fc", "head"), steps, strict=True)}


@about("wanda")
def test_wanda_multiplies_weights_by_the_norm_of_what_they_read() -> None:
    model = tiny()
    x = inputs(model)
    expected = {}
    for group, size in SIZES.items():
        total = torch.zeros(size, dtype=torch.float64)
        for name in CONSUMERS[group]:
            w = weights(model)[f"{name}.weight"]
            for u in range(size):
                total[u] += float(w[:, u].abs().sum()) * math.sqrt(float(x[name][u].square().mean()))
        expected[group] = total
    assert close(scored("wanda", model), expected)


@about("variance")
def test_variance_of_what_consumers_read() -> None:
    model = tiny()
    x = inputs(model)
    assert close(scored("variance", model), {g: mean([x[n].var(1, correction=0) for n in CONSUMERS[g]]) for g in SIZES})


@about("hrank")
def test_hrank_is_the_share_of_full_rank() -> None:
    model = tiny()
    with torch.no_grad():
        one, two, pooled, hidden, _ = model.steps(IMAGES)  # type: ignore[operator]

    def ranks(x: Tensor) -> Tensor:
        x = x if x.dim() == 4 else x[:, :, None, None]
        singular = torch.linalg.svdvals(x)
        return (singular > 1e-12).sum(-1).double().mean(0) / x.shape[-1]

    expected = {"a": (ranks(one) + ranks(pooled)) / 2, "b": ranks(two), "fc": ranks(hidden)}
    assert len(set(torch.cat(list(expected.values())).tolist())) > 5
    assert close(scored("hrank", model), expected)


def test_hrank_folds_tokens_and_reads_few_images() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_classes=4).eval()
    images = torch.randn(2 * activations.IMAGES, 3, 32, 32)
    found = find_groups(model, images[:2]).groups
    read: list[int] = []
    model.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    activations.hrank(model, [Batch(images)], found)
    assert sum(read) == activations.IMAGES
    tokens = torch.zeros(1, 2, 5)  # one token in front, then a map of 2 x 2
    tokens[0, 0] = torch.tensor([9.0, 1, 0, 0, 1])
    tokens[0, 1] = torch.tensor([9.0, 1, 1, 1, 1])
    assert torch.linalg.matrix_rank(activations.fold_maps(tokens)).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("degree", "names"),
    [
        (2, ("l2_grouped", "whc")),
        (1, ("l1", "l2", "l1_grouped", "bn_scale", "fpgm")),
        (
            0,
            (
                "random",
                "lamp",
                "l2_normalised",
                "l2_isomorphic",
                "tp_magnitude",
                "tp_bn_scale",
                "tp_lamp",
                "tp_fpgm",
                "tp_random",
            ),
        ),
    ],
)
def test_degrees_in_the_weights(degree: int, names: tuple[str, ...]) -> None:
    """What the list in baselines says of criteria that read weights only."""
    model, larger = tiny(), tiny()
    for parameter in larger.parameters():
        parameter.data *= 3
    for name in names:
        assert close(
            scored(name, larger), {group: 3**degree * v for group, v in scored(name, model).items()}, rtol=1e-5
        )


# --- from labels -----------------------------------------------------------------------------------


@about("taylor")
@about("taylor_abs")
@about("taylor_per_sample")
@about("group_fisher")
@about("jacobian")
def test_first_order_criteria() -> None:
    model = tiny()
    samples = of_labels(model)
    everything, read = relevances(model, samples), relevances(model, samples, " in")
    pairs = lambda v: mean([mean(v[i : i + 2]) ** 2 for i in (0, 2, 4)])  # noqa: E731
    assert close(scored("taylor", model, batch=2), over(everything, pairs))
    assert close(scored("taylor_abs", model), over(everything, lambda v: mean(v).abs()))
    assert close(scored("taylor_per_sample", model), over(everything, lambda v: mean([x.abs() for x in v])))
    assert close(scored("group_fisher", model), over(read, lambda v: mean([x * x for x in v])))
    assert close(scored("jacobian", model), by_layer(model, samples))


@about("fisher")
@about("snip")
def test_criteria_of_single_weights_that_are_added_up() -> None:
    model = tiny()
    w, samples = weights(model), of_labels(model)
    squares = {n: mean([(w[n] * g[n]).square() for g in samples]) for n in w}
    assert close(scored("fisher", model), by_unit(lambda n, d, u: float(squares[n].select(d, u).sum())))
    absolutes = {n: (w[n] * mean([g[n] for g in samples])).abs() for n in w}
    assert close(scored("snip", model), by_unit(lambda n, d, u: float(absolutes[n].select(d, u).sum())))


@about("grasp")
def test_grasp_is_w_times_h_times_g() -> None:
    model = tiny()
    w = weights(model)
    flat, sizes = torch.cat([t.flatten() for t in w.values()]), [t.numel() for t in w.values()]

    def loss(flat: Tensor) -> Tensor:
        named = {n: part.view_as(t) for (n, t), part in zip(w.items(), flat.split(sizes))}
        return F.cross_entropy(functional_call(model, named, IMAGES), CLASSES)

    g = torch.autograd.functional.jacobian(loss, flat)
    h = torch.autograd.functional.hessian(loss, flat)
    product = dict(zip(w, (flat * (h @ g)).split(sizes)))  # type: ignore[operator]
    signed = by_unit(lambda n, d, u: float(product[n].view_as(w[n]).select(d, u).sum()))
    lowest = min(float(v.min()) for v in signed.values())
    assert lowest < 0
    found = scored("grasp", model)
    for group, value in signed.items():
        torch.testing.assert_close(found[group], value - lowest, rtol=1e-8, atol=1e-10)


# --- relevance -------------------------------------------------------------------------------------


@about("jbr")
@about("jbr_predicted_logit")
@about("jbr_margin")
@about("jbr_projection")
@about("jbr_mean_replaced")
@about("jbr_batched")
def test_variants_of_relevance() -> None:
    model = tiny()
    logits = model(IMAGES).detach()
    square = lambda v: mean([x * x for x in v])  # noqa: E731
    for name, objective in (("jbr", "pseudo_label"), *((f"jbr_{o}", o) for o in ("predicted_logit", "margin"))):
        m = reference.directions(objective, logits)
        read = relevances(model, [gradients(model, x, lambda f, d=d: f @ d) for x, d in zip(IMAGES, m)], " in")
        assert close(scored(name, model), over(read, square))
    m = reference.signs(6, 4, seed=3).double()
    read = relevances(model, [gradients(model, x, lambda f, d=d: f @ d) for x, d in zip(IMAGES, m)], " in")
    assert close(scored("jbr_projection", model, seed=3), over(read, square))
    read = relevances(model, of_labels(model, logits.argmax(1)), " in")
    assert close(scored("jbr_batched", model), over(read, lambda v: mean(v) ** 2))
    m = reference.directions("pseudo_label", logits)
    replaced = reference.mean_replaced(copy.deepcopy(model), IMAGES, groups_of(model), m)
    assert close(scored("jbr_mean_replaced", model), {g: v.square().mean(0) for g, v in replaced.items()})


@about("jbr_published")
@about("jbr_published_code")
def test_published_relevance_looks_at_confident_samples_only() -> None:
    model = tiny(sharp=5.0)
    logits = model(IMAGES).detach()
    sure = logits.softmax(1).amax(1) > 0.9
    assert 1 < int(sure.sum()) < 6
    samples = [g for g, keep in zip(of_labels(model, logits.argmax(1)), sure) if keep]
    assert close(scored("jbr_published", model), over(relevances(model, samples), lambda v: mean(v) ** 2))
    assert close(scored("jbr_published_code", model), by_layer(model, samples))


@pytest.mark.parametrize("name", ["jbr_batched", "jbr_published", "jbr_published_code", "jacobian", "taylor"])
def test_the_order_of_images_matters_to_means_over_128(name: str) -> None:
    model = tiny(sharp=50.0)
    images, classes = cases.images(200, size=5), torch.arange(200) % 4
    there = batches(100, 100, images=images, classes=classes)
    apart = batches(7, 193, images=images, classes=classes)
    back = batches(100, 100, images=images.flip(0), classes=classes.flip(0))
    first, split, turned = (scored(name, model, data)["b"] for data in (there, apart, back))
    torch.testing.assert_close(first, split, rtol=1e-9, atol=0)
    assert not torch.allclose(first, turned, rtol=1e-3, atol=0)


# --- torch-pruning's own ---------------------------------------------------------------------------


@about("tp_magnitude")
@about("tp_lamp")
@about("tp_bn_scale")
def test_parity_with_torch_pruning_where_it_has_no_fault() -> None:
    model = tiny()
    assert close(scored("tp_magnitude", model), scored("l2_normalised", model), rtol=1e-5)  # it sums in float32
    assert close(scored("tp_lamp", model), scored("lamp", model), rtol=1e-5)
    ours, theirs = scored("bn_scale", model), scored("tp_bn_scale", model)
    assert set(theirs) == {"a", "b"}
    assert close(theirs, {name: ours[name] / ours[name].mean() for name in theirs}, rtol=1e-5)


class Separable(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.d(self.a(x)).relu()).mean((2, 3))


def test_torch_pruning_forgets_depthwise_weights() -> None:
    torch.manual_seed(0)
    model = Separable().eval()
    groups = find_groups(model, torch.randn(2, 3, 5, 5)).groups
    batches = [Batch(torch.randn(2, 3, 5, 5), torch.tensor([0, 1]))]
    square = model.a.weight.flatten(1).square().sum(1) + model.b.weight.square().sum((0, 2, 3))
    whole = square + model.d.weight.flatten(1).square().sum(1)
    for name, expected in (("tp_magnitude", square), ("l2_normalised", whole)):
        (found,) = CRITERIA[name](model, batches, groups).values()  # type: ignore[operator]
        assert close({"a": found}, {"a": (expected / expected.mean()).detach().double()}, rtol=1e-5)


@about("tp_taylor")
def test_shipped_taylor_forgets_batch_norms() -> None:
    model = tiny()
    w, samples = weights(model), of_labels(model)
    products = {n: (w[n] * mean([g[n] for g in samples])).abs() for n in w}
    of_layers = by_unit(
        lambda n, d, u: 0.0 if n.startswith("bn") or "bias" in n else float(products[n].select(d, u).sum())
    )
    assert close(scored("tp_taylor", model), {g: v / v.mean() for g, v in of_layers.items()}, rtol=1e-5)


@about("tp_hessian")
def test_shipped_hessian_sees_the_last_sample_only() -> None:
    model = tiny()
    w, last = weights(model), of_labels(model)[-1]
    squares = by_unit(lambda n, d, u: 0.0 if "bias" in n else float((w[n] * last[n]).select(d, u).square().sum()))
    assert close(scored("tp_hessian", model), {g: v / v.mean() for g, v in squares.items()}, rtol=1e-5)


@about("tp_fpgm")
def test_shipped_fpgm_measures_between_squares() -> None:
    model = tiny()
    squares = (model.b.weight.detach().flatten(1), model.c.weight.detach().transpose(0, 1).flatten(1))  # type: ignore[union-attr, operator]
    total = torch.zeros(3, dtype=torch.float64)
    for k in squares:
        for u in range(3):
            total[u] += sum(math.dist((k[u] ** 2).tolist(), (k[i] ** 2).tolist()) for i in range(3))
    torch.testing.assert_close(scored("tp_fpgm", model)["b"], total / total.mean(), rtol=1e-5, atol=0)


@about("tp_random")
def test_shipped_random_from_a_seed() -> None:
    model = tiny()
    assert close(scored("tp_random", model, seed=5), scored("tp_random", model, seed=5))
    assert not torch.equal(scored("tp_random", model, seed=5)["a"], scored("tp_random", model, seed=6)["a"])


def test_departures_are_named() -> None:
    assert set(KNOWN_FAULTS) == set(SHIPPED)
    nothing = {name for name in CRITERIA if not describe_departure(name)}
    assert nothing == {"random", *(name for name in CRITERIA if name.startswith("jbr"))}
    assert {name for name in WEIGHT_CRITERIA if not describe_departure(name, weights=True)} == {
        *("random", "magnitude"),
        *(name for name in WEIGHT_CRITERIA if name.startswith("jbr")),
    }


# --- all of them -----------------------------------------------------------------------------------


def test_every_criterion_has_a_twin() -> None:
    assert set(CRITERIA) == TESTED


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in ("tp_hessian", "jbr_projection")])
def test_neither_batch_size_nor_order_matters(name: str) -> None:
    model = tiny(sharp=5.0)
    whole = scored(name, model)
    assert close(scored(name, model, batches(1, 3, 2)), whole, rtol=1e-5 if name in SHIPPED else 1e-8)
    turned = batches(4, 2, images=IMAGES.flip(0), classes=CLASSES.flip(0))
    assert close(scored(name, model, turned), whole, rtol=1e-5 if name in SHIPPED else 1e-8)


@pytest.mark.parametrize("name", ["tp_hessian", "jbr_projection"])
def test_order_matters_to_the_last_sample_and_to_drawn_signs(name: str) -> None:
    model = tiny()
    assert close(scored(name, model, batches(1, 3, 2)), scored(name, model), rtol=1e-5)
    turned = scored(name, model, batches(6, images=IMAGES.flip(0), classes=CLASSES.flip(0)))
    assert not torch.allclose(turned["b"], scored(name, model)["b"], rtol=1e-3)


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_asked_for(name: str) -> None:
    with pytest.raises(DataError, match=rf"'({name}|label)' needs labels"):
        scored(name, tiny(), [*batches(), *batches(labels=False)])
    with pytest.raises(DataError, match="no batch"):
        CRITERIA[name](tiny(), [], groups_of(tiny()))


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in LABELS])
def test_labels_are_not_asked_for(name: str) -> None:
    model = tiny(sharp=5.0)
    assert close(scored(name, model, batches(labels=False)), scored(name, model))


@pytest.mark.parametrize("name", CRITERIA)
def test_the_model_is_left_as_it_was(name: str, fingerprint: Callable) -> None:
    model = tiny(sharp=5.0)
    groups = groups_for(name, model)
    model.train()
    model.bn_b.eval()  # type: ignore[union-attr, operator]
    model.c.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    model.fc.weight.grad = torch.ones(5, 4, dtype=torch.float64)  # type: ignore[union-attr]
    model.head.register_forward_hook(lambda *args: None)  # type: ignore[union-attr, operator]
    before = fingerprint(model)
    scores = values_of(CRITERIA[name](model, batches(), groups))
    assert fingerprint(model) == before
    assert list(scores) == [group.name for group in groups]


def check_all(
    model: nn.Module, images: Tensor, classes: int, refuses: tuple[str, ...] = (), width: bool = False
) -> None:
    groups = find_groups(model, images, width=width).groups
    data = [Batch(images, torch.arange(len(images)) % classes)]
    for name, criterion in CRITERIA.items():
        if name in refuses:
            with pytest.raises((ModelError, UnsupportedModelError), match=r"no importance|batch norm"):
                criterion(model, data, groups)
            continue
        values = values_of(criterion(model, data, groups))
        assert {n: tuple(v.shape) for n, v in values.items()} == {g.name: (g.size,) for g in groups}, name
        whole = torch.cat(list(values.values()))
        assert whole.dtype == torch.float64, name
        assert whole.isfinite().all(), name
        assert (whole >= 0).all(), name
        assert whole.max() > 0, name


def sharpened(model: nn.Module) -> nn.Module:
    """So sure of itself that there are confident samples."""
    model.get_classifier().weight.data *= 1e3  # type: ignore[operator]
    return model.double().eval()


def test_all_criteria_run_on_a_resnet() -> None:
    narrow = {"num_classes": 4, "zero_init_last": False, "channels": (16, 24, 32, 48)}
    check_all(sharpened(timm.create_model("resnet10t", **narrow)), cases.images(2, 32), 4)


def test_all_criteria_run_on_a_vit() -> None:
    shape = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 4}
    model = sharpened(timm.create_model("vit_tiny_patch16_224", **shape))
    assert {group.kind for group in groups_of(model, cases.images(2, 32))} == {"head", "channel"}
    check_all(model, cases.images(2, 32), 4, NEEDS_NORM)


def test_all_criteria_run_on_the_width_under_a_layer_norm() -> None:
    model, images = cases.timm_model("convnextv2")
    model.get_classifier().weight.data *= 50  # type: ignore[operator]
    assert any(group.kind == "width" for group in find_groups(model, images, width=True).groups)
    check_all(model, images, 4, NEEDS_NORM, width=True)


def test_what_cannot_be_done_is_said() -> None:
    model = nets.CASES["grouped"].make().double().eval()
    groups = groups_of(model, nets.example().double())
    data = [Batch(nets.example().double(), torch.tensor([0, 1]))]
    with pytest.raises(UnsupportedModelError, match=r"torch-pruning fails on group a: RuntimeError: .*grouped"):
        CRITERIA["tp_fpgm"](model, data, groups)
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 2), nn.Flatten())
    units = torch.arange(4)
    group = Group("0", "channel", 4, (Member(("0", "out", 0), units, units), Member(("2", "in", 0), units, units)))
    with pytest.raises(ModelError, match=r"second derivatives.*hardsigmoid"):
        CRITERIA["grasp"](model, [Batch(torch.randn(2, 1, 1, 3), torch.tensor([0, 1]))], (group,))


NETS = ("grouped", "depthwise", "transposed", "flattened", "two pools", "prelu", "dense", "called twice")


@pytest.mark.parametrize("case", NETS)
def test_our_criteria_run_on_every_kind_of_layer(case: str) -> None:
    model = nets.CASES[case].make().double().eval()
    model.fc.weight.data *= 1e3  # type: ignore[union-attr, operator]
    check_ours(model, nets.example(3).double())


def check_ours(model: nn.Module, images: Tensor) -> None:
    groups = groups_of(model, images)
    data = [Batch(images, torch.arange(len(images)) % 4)]
    for name in [name for name in CRITERIA if name not in (*SHIPPED, *NEEDS_NORM)]:
        values = values_of(CRITERIA[name](model, data, groups))
        assert {n: tuple(v.shape) for n, v in values.items()} == {g.name: (g.size,) for g in groups}, name
        assert all(v.isfinite().all() and (v >= 0).all() for v in values.values()), name


def test_a_criterion_prunes() -> None:
    """The unit that a criterion puts last goes first."""
    model = tiny().float()
    lowest = int(scored("l2_grouped", tiny())["fc"].argmin())
    options = {"ignore": ("a", "b", "c"), "floors": Floors(channels=1), "repair": None, "progress": False}
    result = jbrprune.prune(model, IMAGES.float(), channels=0.95, criterion=CRITERIA["l2_grouped"], **options)  # type: ignore[arg-type]
    kept = [u for u in range(5) if u != lowest]
    torch.testing.assert_close(result.model.fc.weight, model.fc.weight[kept])  # type: ignore[union-attr, index]


# --- the tensors of a unit -------------------------------------------------------------------------


LAYERS = {
    "conv": nn.Conv2d(6, 4, 3),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "transposed": nn.ConvTranspose2d(6, 4, 3),
    "transposed, grouped": nn.ConvTranspose2d(6, 4, 3, groups=2),
    "linear": nn.Linear(6, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_weights_that_move_a_channel(name: str) -> None:
    """A weight belongs to an output channel that it changes, and to an input channel through which it does so."""
    model = nn.Sequential(copy.deepcopy(LAYERS[name]).double())
    layer = model[0]
    groups = {"out" if group.side("out") else "in": group for group in layer_groups(model)}
    shape = (6,) if isinstance(layer, nn.Linear) else (6, 5, 5)
    numbers = torch.arange(1.0, layer.weight.numel() + 1, dtype=torch.float64)
    layer.weight.data = numbers.view_as(layer.weight)  # type: ignore[arg-type]
    for side, width in (("in", 6), ("out", 4)):
        part = next(p for p in parts(model, groups[side]) if p.kind == "weight")
        assert part.produces == (side == "out")
        assert part.consumes == (side == "in")
        for c in range(width):
            x = torch.ones(1, *shape, dtype=torch.float64)
            if side == "in":
                x.zero_()[0, c] = 1
            out = layer(x)
            total = out.sum() if side == "in" else out[:, c].sum()
            gradient = torch.autograd.grad(total, layer.weight)[0]  # type: ignore[arg-type]
            assert sorted(part.rows()[c].tolist()) == numbers[gradient.flatten() != 0].tolist()


def test_units_of_several_channels_are_whole_vectors() -> None:
    model = nn.Sequential(nn.Linear(2, 6, bias=False))
    model[0].weight.data = torch.arange(12.0).view(6, 2)
    member = Member(("0", "out", 0), torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1]))
    part = parts(model, Group("0", "head", 2, (member,)))[0]
    assert part.vectors(2).tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_baselines_are_truncated_singular_value_decompositions(name: str) -> None:
    """The first directions give the best matrix of their rank, in the norm that E[x x^T] makes for BALF."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)).double()
    images = torch.randn(40, 1, 3, 4, dtype=torch.double) + 1
    weight, x = dense[1].weight.detach().numpy(), images.flatten(1).numpy()
    root = np.linalg.cholesky(x.T @ x / len(x)) if name == "balf" else np.eye(12)
    left, values, right = np.linalg.svd(weight @ root)
    expected = left[:, :2] @ np.diag(values[:2]) @ right[:2] @ np.linalg.inv(root)
    model, found = find_directions(dense, images)
    scores = LOW_RANK[name](model, [Batch(images, torch.zeros(40, 3))], found.groups)
    torch.testing.assert_close(model(images), dense(images))
    first, second = (layer.weight.detach().numpy() for layer in model.get_submodule("1"))
    np.testing.assert_allclose(second[:, :2] @ first[:2], expected, atol=1e-10)
    np.testing.assert_allclose(scores["1"], values**2 / (values**2).sum(), atol=1e-10)
