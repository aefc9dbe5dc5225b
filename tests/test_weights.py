from __future__ import annotations

import copy
import importlib
import json
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from reference import batched, directions, signs
from safetensors.torch import save_file
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from jbrprune import weights
from jbrprune.batches import Batch
from jbrprune.errors import ArgumentError, CheckpointError, DataError, ModelError, NonFiniteError
from jbrprune.scores import Settings
from jbrprune.weights import WeightScores, weight_scores

# --- slow twins ------------------------------------------------------------------------------------------------------


def products(model: nn.Module, images: Tensor, m: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> ``[N, *shape]`` w_j g_j(x_n), g from vmap(grad)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def scalar(some: dict[str, Tensor], image: Tensor, direction: Tensor) -> Tensor:
        logits = functional_call(model, (parameters | some, buffers), (image[None],))
        return (logits[0] * direction).sum()

    some = {name: parameters[name] for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention has no batching rule and is slow under vmap
        found = vmap(grad(scalar), in_dims=(None, 0, 0))(some, images, m)
    return {name: found[name] * parameters[name] for name in names}


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the largest score of each parameter; one whose gradient is zero but for rounding must stay so."""
    assert set(found) == set(expected)
    largest = max(float(e.max()) for e in expected.values())
    for name, e in expected.items():
        scale = float(e.max()) + 1e-18 * largest
        assert found[name].shape == e.shape
        assert float((found[name] - e).abs().max()) <= tolerance * scale, name


def scored(model: nn.Module, images: object, **options: Any) -> WeightScores:
    return weight_scores(model, images, progress=False, **options)


def compare(model: nn.Module, images: Tensor, **options: Any) -> WeightScores:
    """Score, compare with vmap(grad), and give back the scores."""
    scores = scored(model, images, **options)
    with torch.no_grad():
        m = signs(len(images), model(images).shape[1], 0).to(images)
    v = products(model, images, m, list(scores.sums))
    assert_exact(scores.values(), {name: value.square().mean(0) for name, value in v.items()})
    return scores


# --- nets of this file -----------------------------------------------------------------------------------------------


class Volumes(nn.Module):
    """[B, C, H, W] -> [B, width, D, H, W / D]."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv3d(3, 6, (2, 3, 1), padding=(0, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.unflatten(3, (2, 4)).movedim(4, 2))


class Borrowed(nn.Module):
    """A weight that another function reads (as in BEiT), one that two modules share, one called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lent = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.conv, self.unused = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)
        self.head = nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv(F.avg_pool2d(F.gelu(self.conv(self.stem(x))), 2)))
        x = x.flatten(2).transpose(1, 2)
        x = F.linear(x, self.lent.weight, torch.ones(6, dtype=x.dtype))
        self.lent(x)  # without any part in the logits
        x = torch.tanh(self.one(x)).mean(1)
        return self.head(torch.tanh(self.two(x)))


class PerImage(nn.Module):
    """Frames of an image share one convolution: its first dimension is the batch times four."""

    def __init__(self, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 6, kernel, groups=groups, padding=kernel // 2)
        self.head = nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        frames = x.unflatten(2, (4, -1)).transpose(1, 2).flatten(0, 1)
        return self.head(torch.tanh(self.conv(frames)).unflatten(0, (len(x), 4)).mean((1, 3, 4)))


def small(layer: nn.Module, width: int = 5, size: int = 2) -> nn.Module:
    """The layer on a map of ``size`` x ``size``."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(size),
        nn.Tanh(),
        layer,
        nn.GELU(),
        nn.Flatten(),
        nn.LazyLinear(cases.CLASSES),
    )


def _transposed(**options: Any) -> nn.Module:
    return cases._chain(nn.ConvTranspose2d(6, 5, 3, **options), 5)


OWN: dict[str, Callable[[], nn.Module]] = {
    "conv3d": lambda: cases.Chain(nn.Conv3d(6, 5, (1, 3, 2), stride=(1, 2, 1)), Volumes(), 5),
    "conv3d depthwise": lambda: cases.Chain(nn.Conv3d(6, 6, 3, padding=1, groups=6), Volumes(), 6),
    "conv3d transposed": lambda: cases.Chain(nn.ConvTranspose3d(6, 5, 2, stride=2), Volumes(), 5),
    "conv1d transposed": lambda: cases.Chain(nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), cases.Lines(), 4),
    "conv2d same, even kernel": lambda: cases._chain(nn.Conv2d(6, 5, 4, padding="same"), 5),
    "conv2d valid": lambda: cases._chain(nn.Conv2d(6, 5, 3, padding="valid"), 5),
    "conv2d circular": lambda: cases._chain(nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), 5),
    "conv2d pointwise, strided": lambda: cases._chain(nn.Conv2d(6, 5, 1, stride=3), 5),
    "conv2d pointwise, padded": lambda: cases._chain(nn.Conv2d(6, 5, 1, padding=2), 5),
    "conv2d pointwise, grouped": lambda: cases._chain(nn.Conv2d(6, 4, 1, groups=2), 4),
    "conv2d one long kernel": lambda: cases._chain(nn.Conv2d(6, 5, (1, 7), padding=(0, 3)), 5),
    "conv2d of timm, same": lambda: cases._chain(Conv2dSame(6, 5, 4, stride=3), 5),
    "transposed, output padding": lambda: _transposed(stride=3, padding=1, output_padding=2),
    "transposed, dilated": lambda: _transposed(stride=2, dilation=3, output_padding=2),
    "transposed, cropped": lambda: _transposed(stride=1, padding=2, dilation=2, output_padding=1),
    "transposed, pointwise": lambda: cases._chain(nn.ConvTranspose2d(6, 5, 1), 5),
    "transposed, depthwise": lambda: cases._chain(nn.ConvTranspose2d(6, 6, 3, groups=6)),
    "instance norm": lambda: cases._chain(nn.InstanceNorm2d(6, affine=True)),
    "rms norm of torch": lambda: cases._tokens(nn.RMSNorm(6)),
    "linear on vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Tanh(), nn.Linear(7, 4)),
    "map of one position": lambda: small(nn.Conv2d(6, 5, 3, padding=1), size=1),
    "map of four positions": lambda: small(nn.Conv2d(6, 5, 3, padding=1)),
    "map of four positions, pointwise": lambda: small(nn.Conv2d(6, 5, 1)),
    "map of four positions, grouped": lambda: small(nn.Conv2d(6, 6, 3, padding=1, groups=2)),
    "map of nine positions": lambda: small(nn.Conv2d(6, 5, 3, padding=1), size=3),
    "borrowed and shared": Borrowed,
    "four frames an image": lambda: PerImage(3),
    "four frames an image, pointwise": lambda: PerImage(1),
    "four frames an image, grouped": lambda: PerImage(3, groups=3),
}

# Every way to form the squares, on every layer that allows it: FEW_POSITIONS, UNFOLDED_POSITIONS, CACHE_BYTES
ROUTES = {
    "as it is": {},
    "pairs": {"FEW_POSITIONS": 64},
    "products": {"FEW_POSITIONS": 0, "UNFOLDED_POSITIONS": 10**6},
    "kernels": {"FEW_POSITIONS": 0, "UNFOLDED_POSITIONS": 0},
    "small blocks": {"FEW_POSITIONS": 0, "CACHE_BYTES": 200},
    "small blocks of kernels": {"FEW_POSITIONS": 0, "UNFOLDED_POSITIONS": 0, "CACHE_BYTES": 700},
}


def made(table: dict[str, Callable[[], nn.Module]], case: str) -> nn.Module:
    model = table[case]().eval()
    if any(isinstance(module, nn.LazyLinear) for module in model.modules()):
        model(cases.images(1).float())
    return cases.randomised(model)


# --- against vmap(grad) ----------------------------------------------------------------------------------------------

UNKNOWN = ("simple norm", "global response norm", "rms norm 2d")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", OWN)
def test_every_layer_by_every_route(case: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ROUTES[route].items():
        monkeypatch.setattr(weights, name, value)
    compare(made(OWN, case), cases.images(3), parameters="all", batch_size=2)


@pytest.mark.parametrize("route", ["as it is", "small blocks of kernels"])
@pytest.mark.parametrize("case", [case for case in cases.LAYERS if not case.startswith(UNKNOWN)])
def test_layers(case: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ROUTES[route].items():
        monkeypatch.setattr(weights, name, value)
    compare(made(cases.LAYERS, case), cases.images(3), parameters="all")


@pytest.mark.parametrize("case", cases.RESIDUAL)
def test_residual(case: str) -> None:
    compare(made(cases.RESIDUAL, case), cases.images(3), parameters="all")


@pytest.mark.parametrize("case", cases.NETS)
def test_nets(case: str) -> None:
    compare(made(cases.NETS, case), cases.images(3), parameters="all")


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
    compare(model, cases.images(2, 32))


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


def line(weight: list[list[float]]) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    model[1].weight.data = torch.tensor(weight)
    model[1].bias.data = torch.tensor([9.0, 0.0])  # class 0 is predicted
    return model


PIXELS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 0.0]]).view(3, 1, 1, 2)


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
    some = scored(model, list(images.split(2)), confidence=threshold, statistic=statistic, batch=2, objective="margin")
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


# --- importance scores -----------------------------------------------------------------------------------------------


def test_global_unstructured_takes_the_scores() -> None:
    model = made(cases.NETS, "concatenation, flattened")
    scores = scored(model, cases.images(4))
    importance = scores.importance_scores(model)
    parameters = [(model.get_submodule(name), "weight") for name in ("one", "mix", "fc")]
    assert all(key in importance for key in parameters)
    prune.global_unstructured(parameters, prune.L1Unstructured, importance, amount=0.5)
    values = torch.cat([scores[f"{name}.weight"].flatten() for name in ("one", "mix", "fc")])
    kept = torch.cat([module.weight_mask.flatten() for module, _ in parameters]).bool()
    assert int(kept.sum()) == round(len(values) / 2)
    assert values[kept].min() >= values[~kept].max()
    # once more, on top of the masks
    again = scored(model, cases.images(4)).importance_scores(model)
    prune.global_unstructured(parameters, prune.L1Unstructured, again, amount=0.5)
    zeros = sum(int((module.weight == 0).sum()) for module, _ in parameters)
    assert zeros == pytest.approx(0.75 * len(values), abs=1)


def test_shared_weights_are_scored_for_every_module() -> None:
    model = made(OWN, "borrowed and shared")
    scores = scored(model, cases.images(2))
    assert "two.weight" not in scores.sums
    importance = scores.importance_scores(model)
    assert torch.equal(importance[model.two, "weight"], importance[model.one, "weight"])


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), r"1.weight has shape \(2, 3\), but its scores \(2, 2\)"),
        (lambda: nn.Sequential(nn.Flatten()), "no parameter '1.weight'"),
    ],
)
def test_scores_of_another_model(other: Callable[[], nn.Module], message: str) -> None:
    scores = scored(line([[1.0, 1.0], [1.0, 1.0]]), PIXELS)
    with pytest.raises(ArgumentError, match=message):
        scores.importance_scores(other())


# --- sums and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["second_moment", "batched", "signed"])
def test_shards_add_up(statistic: Any) -> None:
    model, images = made(cases.NETS, "called twice"), cases.images(6)
    options = {"statistic": statistic, "batch": 2, "objective": "margin"}
    parts = [scored(model, part, **options) for part in images.split([2, 4])]
    whole = scored(model, images, **options)
    total = parts[0] + parts[1]
    assert total.samples == 6
    assert_exact(total.values(), whole.values())


def _scores(shape: tuple[int, ...] = (2, 3), name: str = "a.weight", **settings: Any) -> WeightScores:
    return WeightScores({name: torch.rand(shape).double()}, 4, 1, Settings("margin", "weight", "signed", **settings))


@pytest.mark.parametrize(
    "other, message",
    [
        (_scores(confidence=0.9), "made with"),
        (_scores((3, 2)), r"a.weight has shapes \(2, 3\) and \(3, 2\)"),
        (_scores(name="b.weight"), "different parameters"),
    ],
)
def test_unlike_scores_do_not_add(other: WeightScores, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        _scores() + other


def test_files(tmp_path: Path) -> None:
    scores = _scores(batch=7, confidence=0.5)
    scores.save(tmp_path / "scores.safetensors")
    loaded = WeightScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.sums["a.weight"], scores.sums["a.weight"])
    assert (loaded.samples, loaded.skipped, loaded.settings) == (4, 1, scores.settings)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="not a file of weight scores"):
        WeightScores.load(tmp_path / "none")
    (tmp_path / "torn").write_bytes(b"\x10torn")
    with pytest.raises(CheckpointError, match="not a file of weight scores"):
        WeightScores.load(tmp_path / "torn")
    save_file({}, tmp_path / "units", metadata={"jbrprune": json.dumps({"format": 1})})
    with pytest.raises(CheckpointError, match="scores of units"):
        WeightScores.load(tmp_path / "units")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        _scores().save(tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


# --- memory ----------------------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Largest number of bytes in tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.size: dict[int, int] = {}
        self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.known |= {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)} - set(self.size)
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return output

    def _track(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage().data_ptr()
        if key in self.known:
            return
        self.users[key] += 1
        self.size[key] = tensor.untyped_storage().nbytes()
        weakref.finalize(tensor, self._gone, key)
        self.peak = max(self.peak, sum(self.size.values()))

    def _gone(self, key: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.size.pop(key, None)


@contextmanager
def _watching_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[weights._Plan, int]]]:
    """Plans, and the bytes that were really in use under each of them."""
    plans: list[weights._Plan] = []
    peaks: list[tuple[weights._Plan, int]] = []
    plan, adding = weights._plan, weights._add_squares

    def planning(*args: Any) -> weights._Plan:
        plans.append(plan(*args))
        return plans[-1]

    def watched(*args: Any) -> None:
        plans.clear()
        with _Live() as live:
            adding(*args)
        peaks.append((max(plans, key=lambda p: p.bytes), live.peak))

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_plan", planning)
        patch.setattr(weights, "_add_squares", watched)
        yield peaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", [1 << 18, 1 << 20, 1 << 24])
def test_memory_stays_under_the_cap(cap: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 24, 1), nn.Conv2d(24, 96, 3, 2, 1, groups=2)),
        *(nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.AdaptiveAvgPool2d(2), nn.Conv2d(96, 64, 3, padding=1)),
        *(nn.ConvTranspose2d(64, 16, 3, 2, 1, 1), nn.BatchNorm2d(16), nn.Flatten(1), nn.Linear(256, 4)),
    )
    model, images = cases.randomised(model).to(dtype), cases.images(24, 8).to(dtype)
    with _watching_plans(monkeypatch) as peaks:
        scores = scored(model, images, max_memory=cap, parameters="all", objective="margin")
    assert len(peaks) > 20
    assert all(used <= plan.bytes <= cap for plan, used in peaks)
    assert len({plan.chunk for plan, _ in peaks}) > 1
    expected = scored(model, images, parameters="all", objective="margin")
    assert_exact(scores.values(), expected.values(), 1e-10 if dtype == torch.float64 else 1e-4)


def test_blocks_are_no_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []
    plan = weights._plan

    def planning(*args: Any) -> weights._Plan:
        found = plan(*args)
        blocks.append(found.samples * found.rows * args[4])
        return found

    monkeypatch.setattr(weights, "_plan", planning)
    monkeypatch.setattr(weights, "CACHE_BYTES", 5000)
    scored(made(cases.NETS, "called twice"), cases.images(9))
    assert 2500 < max(blocks) <= 5000


def test_too_little_memory_is_said() -> None:
    with pytest.raises(ArgumentError, match=r"max_memory=1000 is too small: .*weight needs \d+ bytes"):
        scored(made(cases.NETS, "called twice"), cases.images(2), max_memory=1000)


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
    """Overwrites what a convolution has read, from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        large = len(x) > 2
        x = self.stem(x)
        y = self.conv(x)
        x = x.mul_(2) if large else x * 2
        return self.head((x + y).mean((2, 3)))


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


@pytest.mark.parametrize(
    "net, message",
    [
        (lambda: cases._chain(StdConv2d(6, 6, 3)), r"layer.weight \(StdConv2d\): .*transforms it first"),
        (lambda: cases._chain(ScaledStdConv2d(6, 6, 3)), r"\(ScaledStdConv2d\).*Put it into `ignore`"),
        (lambda: cases.Windows(merge=True), r"norm.weight \(LayerNorm\).* and \d+ more: squares per sample differ"),
        (Moved, "samples influence each other"),
        (Noisy, "random in eval mode"),
        (Tied, r"fc.weight \(Linear\).*used a second time in another way"),
        (Changing, "conv.weight: the input of this layer is changed in place"),
        (_attention, r"attention.out_proj.weight \(NonDynamicallyQuantizableLinear\)"),
        (lambda: cases.Overwritten(), "fc.weight: the input of this layer is changed in place"),
        (lambda: cases._chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3))), "not a plain parameter"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "no convolution or linear layer left"),
    ],
)
def test_what_is_not_exact_is_refused(net: Callable[[], nn.Module], message: str) -> None:
    model = cases.randomised(net())
    with pytest.raises(ModelError, match=message):
        scored(model, cases.images(4), parameters="all")


def test_ignored_layers_are_no_obstacle() -> None:
    model = made({"": lambda: cases._chain(StdConv2d(6, 6, 3))}, "")
    with torch.no_grad():
        m = signs(3, cases.CLASSES, 0).double()
    scores = scored(model, cases.images(3), ignore=["layer"])
    v = products(model, cases.images(3), m, ["stem.weight", "head.weight"])
    assert_exact(scores.values(), {name: value.square().mean(0) for name, value in v.items()})


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
        ({"statistic": "mean_replaced"}, "statistic must be one of second_moment, batched, signed"),
        ({"statistic": "batched", "batch": 0}, "batch must be at least 1"),
        ({"parameters": "biases"}, "parameters must be one of weights, all"),
        ({"confidence": 1.0}, "confidence must satisfy"),
        ({"max_memory": 0}, "max_memory must be a positive number"),
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
        scored(model, cases.images(2), confidence=0.999)
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
