from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import cases
import pytest
import timm
import torch
from reference import batched, directions, signs
from single import OWN, PIXELS, assert_exact, compare, line, made, products, scored
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from jbrprune.criteria import weight_relevance
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError
from jbrprune.models.preserve import inference_state

# --- against one backward per sample ---------------------------------------------------------------------------------


@pytest.fixture(params=["mapped", "one by one"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one by one":

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError("no batching rule")

        monkeypatch.setattr(weight_relevance, "vmap", refuse)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", OWN)
def test_every_layer(case: str, route: None) -> None:
    assert compare(made(OWN, case), cases.images(3), parameters="all", batch_size=2).sums


@pytest.mark.parametrize("case", cases.LAYERS)
def test_layers(case: str) -> None:
    assert compare(made(cases.LAYERS, case), cases.images(3), parameters="all").sums


@pytest.mark.parametrize("case", cases.RESIDUAL)
def test_residual(case: str) -> None:
    assert compare(made(cases.RESIDUAL, case), cases.images(3), parameters="all").sums


@pytest.mark.parametrize("case", cases.NETS)
def test_nets(case: str) -> None:
    assert compare(made(cases.NETS, case), cases.images(3), parameters="all").sums


@pytest.mark.parametrize("case", ["resnet18", "resnext", "mobilenetv3", "regnety", "convnext", "vit", "deit distilled"])
def test_models(case: str) -> None:
    model, images = cases.timm_model(case)
    scores = compare(model, images[:2], parameters="all")
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) <= len(scores.sums)


@pytest.mark.parametrize(
    "name, options",
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (2,), "embed_dim": 12}),
        ("tf_efficientnet_b0", {}),
    ],
)
def test_more_models(name: str, options: dict[str, Any]) -> None:
    """Weights read by F.linear, shifted windows, padding inside of forward."""
    model = cases.randomised(timm.create_model(name, num_classes=cases.CLASSES, **options))
    assert compare(model, cases.images(2, 32)).sums


@pytest.mark.parametrize("objective", ["pseudo_label", "predicted_logit", "margin", "label", "projection"])
def test_objectives(objective: str) -> None:
    model, images, labels = made(cases.NETS, "concatenation, flattened"), cases.images(5), torch.tensor([0, 3, 1, 1, 2])
    scores = scored(model, [Batch(images, labels)], objective=objective, seed=3)
    with torch.no_grad():
        m = directions(objective, model(images), labels, signs(5, cases.CLASSES, 3))
    v = products(model, images, m.to(images), list(scores.sums))
    assert_exact(scores.values(), {name: value.square().mean(0) for name, value in v.items()})


def test_backpack() -> None:
    """A second reference, written by others: SumGradSquared."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backpack = importlib.import_module("backpack")
            extensions = importlib.import_module("backpack.extensions")
    except ImportError as error:
        pytest.skip(f"backpack-for-pytorch is not installed: {error}")
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(32, 5)),
    )
    model, images = cases.randomised(model), cases.images(7)
    scores = scored(model, images, objective="pseudo_label", parameters="all", batch_size=3)
    labels = model(images).argmax(1)
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with warnings.catch_warnings(), backpack.backpack(extensions.SumGradSquared()):
        warnings.simplefilter("ignore")
        loss(backpack.extend(model)(images), labels).backward()
    expected = {name: p.sum_grad_squared * p.detach() ** 2 for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    assert_exact(dict(scores.sums), expected)


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"statistic": "second_moment"}, [4 * (1 + 9 + 25) / 3, 0.25 * (4 + 1) / 3]),
        ({"statistic": "batched", "batch": 2}, [4 * (2 * 2.0**2 + 5.0**2) / 3, 0.25 * (2 * 0.5**2 + 0) / 3]),
        ({"statistic": "batched", "batch": 99}, [4 * 9.0, 0.25 / 9]),
        ({"statistic": "signed"}, [2 * 3.0, 0.5 / 3]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_by_hand(options: dict[str, Any], expected: list[float], batch_size: int) -> None:
    model = line([[2.0, -0.5], [1.0, 1.0]])
    scores = scored(model, PIXELS, objective="predicted_logit", batch_size=batch_size, **options)
    torch.testing.assert_close(scores["1.weight"], torch.tensor([expected, [0.0, 0.0]]).double())
    assert (scores.samples, scores.skipped) == (3, 0)


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7, [2, 5]])
@pytest.mark.parametrize("statistic", ["second_moment", "batched", "signed"])
def test_statistics_whatever_the_batch_size(statistic: Any, sizes: list[int]) -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(7)
    scores = scored(model, list(images.split(sizes)), statistic=statistic, batch=3, parameters="all")
    v = products(model, images, signs(7, cases.CLASSES, 0).double(), list(scores.sums))
    form: dict[str, Callable[[Tensor], Tensor]] = {
        "second_moment": lambda value: value.square().mean(0),
        "batched": lambda value: batched(value.flatten(1), 3).view(value.shape[1:]),
        "signed": lambda value: value.mean(0).abs(),
    }
    assert_exact(scores.values(), {name: form[statistic](value) for name, value in v.items()})


@pytest.mark.parametrize("statistic", ["second_moment", "batched", "signed"])
def test_unsure_samples_are_left_out(statistic: Any) -> None:
    model, images = made(cases.NETS, "concatenation, flattened"), cases.images(9)
    sure = model(images).softmax(1).amax(1).detach()
    threshold = float(sure.sort().values[3:5].mean())
    some = scored(model, list(images.split(2)), threshold=threshold, statistic=statistic, batch=2, objective="margin")
    alone = scored(model, images[sure > threshold], statistic=statistic, batch=2, objective="margin")
    assert (some.samples, some.skipped) == (5, 4)
    assert_exact(some.values(), alone.values())


def test_the_dense_models_logits_decide() -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(4)
    reference = F.one_hot(torch.tensor([2, 0, 1, 3])).double()
    scores = scored(model, [Batch(images, reference=reference)], objective="predicted_logit")
    v = products(model, images, reference, list(scores.sums))
    assert_exact(scores.values(), {name: value.square().mean(0) for name, value in v.items()})


# --- masked models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["second_moment", "batched", "signed"])
def test_masked_weights_score_zero(statistic: Any) -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(5)
    twin = copy.deepcopy(model)
    for name in ("stem", "conv", "fc"):
        prune.random_unstructured(model.get_submodule(name), "weight", 0.4)
        prune.random_unstructured(model.get_submodule(name), "weight", 0.3)  # a container of two masks
        twin.get_submodule(name).weight.data = model.get_submodule(name).weight.detach().clone()
    scores = scored(model, images, statistic=statistic, batch=2)
    expected = scored(twin, images, statistic=statistic, batch=2)
    assert_exact(scores.values(), expected.values())
    for name in ("stem", "conv", "fc"):
        gone = model.get_submodule(name).weight_mask == 0
        assert gone.any()
        assert (scores[f"{name}.weight"][gone] == 0).all()
        assert (scores[f"{name}.weight"][~gone] > 0).any()


def test_masked_weight_read_by_another_function() -> None:
    model = made(OWN, "borrowed and shared")
    twin = copy.deepcopy(model)
    mask = torch.rand(6, 6) > 0.5
    prune.custom_from_mask(model.lent, "weight", mask)
    twin.lent.weight.data *= mask
    effective = model.lent.weight
    assert_exact(scored(model, cases.images(3)).values(), scored(twin, cases.images(3)).values())
    assert model.lent.weight is effective
    assert model.lent.weight_orig.grad is None


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["called twice", "windows", "channels last"])
def test_float32_and_autocast_are_near(case: str) -> None:
    model, images = made(cases.NETS, case), cases.images(6)
    exact = scored(model, images, objective="margin", parameters="all").values()
    single = scored(model.float(), images.float(), objective="margin", parameters="all").values()
    half = scored(model, images.float(), objective="margin", parameters="all", autocast=torch.bfloat16).values()
    assert all(value.dtype == torch.float64 for value in single.values())
    assert_exact(single, exact, 1e-4)
    assert_exact(half, exact, 0.5)


def test_many_batches_do_not_lose_digits() -> None:
    """Sums over batches are float64: in float32, equal summands would stop to count."""
    model = line([[1.0, 1.0], [1.0, 1.0]])
    pixels = torch.full((1, 1, 1, 2), 3.0)
    pixels[..., 1] = 1e-3
    big = [torch.full((1, 1, 1, 2), 4096.0)] + [pixels] * 64
    scores = scored(model, big, objective="predicted_logit")
    expected = torch.tensor([4096.0**2 + 64 * 9, 4096.0**2 + 64e-6], dtype=torch.float64)
    torch.testing.assert_close(scores.sums["1.weight"][0], expected, rtol=1e-12, atol=0)


# --- the user's model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["second_moment", "batched"])
def test_the_model_is_left_as_it_was(statistic: Any, fingerprint: Callable[[nn.Module], dict[str, Any]]) -> None:
    model = made(cases.NETS, "called twice").train()
    model.stem.eval()
    model.fc.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = fingerprint(model)
    scored(model, cases.images(3), statistic=statistic)
    assert fingerprint(model) == before
    with pytest.raises(NonFiniteError):
        scored(model, cases.images(3) * 1e308, statistic=statistic)
    assert fingerprint(model) == before


def test_under_inference_mode() -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(3)
    expected = scored(model, images).values()
    with torch.inference_mode():
        found = scored(model, images.clone()).values()
    assert_exact(found, expected)


def test_ignored() -> None:
    model = made(cases.NETS, "called twice")
    names = set(scored(model, cases.images(2), ignore=["f*", "head.weight"], parameters="all").sums)
    assert names == {"stem.weight", "stem.bias", "conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.bias"}


# --- refusals --------------------------------------------------------------------------------------------------------


class Moved(cases.Windows):
    """Batch statistics in eval mode: samples influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.bn(x))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(torch.tanh(self.conv(x)), 0.5, True).mean((2, 3)))


class Tied(nn.Module):
    """A weight that is read as it is, and once more transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :6]
        return self.head(torch.tanh(self.fc(x)) @ self.fc.weight)


class Changing(nn.Module):
    """Overwrites what a convolution has read, where there are several images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        large = len(x) > 1
        x = self.stem(x)
        y = self.conv(x)
        x = x.mul_(2) if large else x * 2
        return self.head((x + y).mean((2, 3)))


class Branching(Tied):
    """Looks at its input before it decides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.mean() > 0 else x)


def _attention() -> nn.Module:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.attention = cases.ToTokens(6), nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, cases.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.tokens(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    return Attending()


def _computed(net: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(net.attention, "in_proj_weight", nn.Identity())  # type: ignore[arg-type]
    return net


@pytest.mark.parametrize(
    "net, message",
    [
        (Moved, "samples influence each other"),
        (Noisy, "random in eval mode"),
        (lambda: cases._chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3))), "not a plain parameter"),
        (lambda: _computed(_attention()), r"attention.in_proj_weight \(.*\) is not a plain parameter"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "no convolution or linear layer left"),
    ],
)
def test_what_has_no_meaning_is_refused(net: Callable[[], nn.Module], message: str) -> None:
    model = cases.randomised(net())
    with pytest.raises(ModelError, match=message):
        scored(model, cases.images(4), parameters="all")


@pytest.mark.parametrize(
    "net",
    [
        lambda: cases._chain(StdConv2d(6, 6, 3)),
        lambda: cases._chain(ScaledStdConv2d(6, 6, 3)),
        lambda: cases.Windows(merge=True),
        Tied,
        Branching,
        Changing,
        _attention,
    ],
)
def test_any_use_of_a_weight_is_known(net: Callable[[], nn.Module]) -> None:
    """Standardised, read by other functions, more than once, behind branches on values, in samples that are merged."""
    assert compare(cases.randomised(net()), cases.images(4), parameters="all").sums


def test_inputs_that_are_overwritten_in_place_after_a_layer_has_read_them(caplog: pytest.LogCaptureFixture) -> None:
    model, images = made({"": cases.Overwritten}, ""), cases.images(3)
    twin = copy.deepcopy(model)
    twin.in_place = False  # type: ignore[assignment]
    with caplog.at_level(logging.INFO):
        found = scored(model, images, parameters="all")
    assert_exact(found.values(), scored(twin, images, parameters="all").values())
    assert "one by one" in caplog.text


def test_ignored_layers_have_no_scores() -> None:
    model = made({"": lambda: cases._chain(StdConv2d(6, 6, 3))}, "")
    assert set(scored(model, cases.images(3), ignore=["layer"]).sums) == {"stem.weight", "head.weight"}


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_memory_does_not_change_the_scores(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(5)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    monkeypatch.setattr(weight_relevance, "CHUNK_NUMBERS", chunk * sum(w.numel() for w in weights.values()) + 1)

    def logits(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(weights), (images,))

    with inference_state(model):
        m = signs(5, cases.CLASSES, 0).double()
        gradients, outputs = zip(*weight_relevance.sample_gradients(logits, weights, images, m))
        torch.testing.assert_close(torch.cat(outputs), model(images))
    assert max(map(len, outputs)) == chunk
    v = products(model, images, m, list(weights))
    for name, weight in weights.items():
        torch.testing.assert_close(torch.cat([g[name] for g in gradients]) * weight, v[name], rtol=1e-9, atol=1e-12)


def test_weights_without_a_part_are_refused() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)).detach()

    for statistic in ("signed", "batched"):
        with pytest.raises(ModelError, match="nothing to differentiate"):
            scored(Cut(), torch.randn(2, 3, 2, 2), statistic=statistic)


def test_means_need_no_layer_that_is_known() -> None:
    """Autograd sees every use of a parameter."""
    model = made({"": lambda: cases._chain(StdConv2d(6, 6, 3))}, "")
    scores = scored(model, cases.images(3), statistic="signed")
    v = products(model, cases.images(3), signs(3, cases.CLASSES, 0).double(), list(scores.sums))
    assert_exact(scores.values(), {name: value.mean(0).abs() for name, value in v.items()})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "loss"}, "objective must be one of"),
        ({"statistic": "mean_replaced"}, "'mean_replaced' is not defined for weights"),
        ({"statistic": "batched", "batch": 0}, "batch must be at least 1"),
        ({"parameters": "biases"}, "parameters must be one of weights, all"),
        ({"threshold": 1.0}, "threshold must satisfy"),
        ({"ignore": ["body.*"]}, "'body.*' matches no module and no parameter"),
        ({"ignore": "fc"}, "write"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        scored(made(cases.NETS, "called twice"), cases.images(2), **options)


def test_bad_data() -> None:
    model = made(cases.NETS, "called twice")
    with pytest.raises(DataError, match="No sample was left"):
        scored(model, cases.images(2), threshold=0.999)
    with pytest.raises(DataError, match="no batch"):
        scored(model, iter(()))
    with pytest.raises(DataError, match="needs labels"):
        scored(model, cases.images(2), objective="label")
    with pytest.raises(NonFiniteError, match="image 1"):
        scored(model, cases.images(2).index_fill(0, torch.tensor([1]), float("nan")))


class Root(nn.Module):
    """A square root whose gradient is infinite where an image is black."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1, bias=False), nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).abs().sqrt().mean((2, 3)))


def test_infinite_gradients_are_named() -> None:
    images = torch.cat([cases.images(2), torch.zeros_like(cases.images(1))])
    with pytest.raises(NonFiniteError, match=r"scores of conv.weight contain NaN or Inf"):
        scored(made({"": Root}, ""), images)


def test_weights_that_are_not_finite() -> None:
    model = made(cases.NETS, "called twice")
    model.fc.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"fc.weight"):
        scored(model, cases.images(2))
