"""Repairs against slow twins: layer by layer, every position, statistics by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import cases
import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.data.batches import Batch, attach_reference, rebatch
from jbrprune.evaluation.agreement import agreement_on, compute_logits
from jbrprune.repair import least_squares, repair
from jbrprune.repair.repair import Targets, apply_methods, record_chunk, record_targets, repair_model
from jbrprune.sparsity.masks import weights_of
from jbrprune.structure.groups import Axis
from jbrprune.structure.slicing import remove_channels

METHODS = (("batch_norm",), ("mean_shift",), ("least_squares",), ("batch_norm", "least_squares"), ("auto",))
RIDGE = 0.1

Cut = dict[Axis, list[int]]


def plain() -> nn.Sequential:
    """No norm; a strided, a dilated and a plain convolution, then linear layers; activations work in place."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=(2, 1)),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, (3, 2), dilation=(1, 2), padding=1),
        nn.LeakyReLU(inplace=True),
        nn.Conv2d(5, 7, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(28, 9),
        nn.GELU(),
        nn.Linear(9, 4),
    )


PLAIN: Cut = {
    ("0", "out", 0): [1, 4],
    ("2", "in", 0): [1, 4],
    ("2", "out", 0): [0],
    ("4", "in", 0): [0],
    ("4", "out", 0): [2, 3, 6],
    ("8", "in", 0): [i for c in (2, 3, 6) for i in range(4 * c, 4 * c + 4)],
    ("8", "out", 0): [8],
    ("10", "in", 0): [8],
}


def normed() -> nn.Sequential:
    """Batch norms behind a plain, a depthwise and a pointwise convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


NORMED: Cut = {
    **{(name, "out", 0): [0, 3] for name in ("0", "1", "3", "4")},
    ("6", "in", 0): [0, 3],
    ("6", "out", 0): [1, 2, 7],
    ("7", "out", 0): [1, 2, 7],
    ("9", "in", 0): [i for c in (1, 2, 7) for i in range(9 * c, 9 * c + 9)],
}


def pruned(dense: nn.Module, cut: Cut) -> tuple[nn.Module, dict[Axis, Tensor]]:
    """A smaller copy, and which channels of the dense model are left."""
    smaller = copy.deepcopy(dense)
    remove_channels(smaller, {axis: torch.tensor(gone) for axis, gone in cut.items()})
    return smaller, {axis: kept_of(dense, axis, gone) for axis, gone in cut.items()}


def kept_of(dense: nn.Module, axis: Axis, gone: list[int]) -> Tensor:
    module = dense.get_submodule(axis[0])
    side = 1 if axis[1] == "in" else 0
    return torch.tensor([c for c in range(module.weight.shape[side]) if c not in gone])  # type: ignore[union-attr, index, arg-type]


def batches(model: nn.Module, n: int = 12, seed: int = 1, size: int = 8) -> list[Batch]:
    """Images with the model's logits as reference, in batches of 5."""
    images = [Batch(part) for part in cases.images(n, size, seed).split(5)]
    return attach_reference(images, compute_logits(model, images))


def consumers(cut: Cut) -> list[str]:
    return [axis[0] for axis in cut if axis[1] == "in"]


def applied(
    dense: nn.Module, smaller: nn.Module, kept: dict[Axis, Tensor], cut: Cut, *methods: str, n: int = 12
) -> tuple[nn.Module, Targets]:
    """The smaller model repaired without being asked whether it helps."""
    targets = record_targets(dense, batches(dense, n), consumers(cut))
    apply_methods({methods: smaller}, targets, kept, {}, quick=False)
    return smaller, targets


# --- identity ------------------------------------------------------------------------------------


def timm_resnet() -> nn.Module:
    return cases.randomised(timm.create_model("test_resnet", num_classes=5))


def timm_vit() -> nn.Module:
    return cases.randomised(timm.create_model("test_vit", num_classes=5, img_size=32, depth=2))


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("make", [plain, normed, cases.Twice, timm_resnet, timm_vit])
def test_nothing_changes_when_nothing_was_removed(make: Callable[[], nn.Module], methods: Sequence[str]) -> None:
    model = cases.randomised(make())
    same = copy.deepcopy(model)
    images = batches(model, size=32 if make in (timm_resnet, timm_vit) else 8)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    targets = record_targets(model, images[:2], linear)
    assert repair_model(same, targets, images[2:], {}, methods).kept == "none"
    assert_same_bits(same, model)


@pytest.mark.parametrize("methods", [("batch_norm",), ("mean_shift",), ("least_squares",)])
@pytest.mark.parametrize("make", [plain, normed, cases.Twice, timm_resnet])
def test_it_is_the_identity_even_before_the_gate(make: Callable[[], nn.Module], methods: Sequence[str]) -> None:
    model = cases.randomised(make())
    same = copy.deepcopy(model)
    images = cases.images(6, 32 if make is timm_resnet else 8)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "CHUNK", 4 * images[0].numel())
        targets = record_targets(model, [Batch(images)], linear)
        apply_methods({methods: same}, targets, {}, {}, quick=False)
    assert_same_bits(same, model)


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name


# --- batch norm ----------------------------------------------------------------------------------


@torch.no_grad()
def batch_norm_twin(dense: nn.Sequential, smaller: nn.Sequential, images: Tensor, kept: dict[Axis, Tensor]) -> None:
    """Move the stored statistics of each norm in turn, by loops over channels."""
    whole = part = images
    for name, layer in smaller.named_children():
        wide = dense.get_submodule(name)
        if isinstance(layer, nn.BatchNorm2d):
            for new, old in enumerate(kept[name, "out", 0].tolist()):
                before, after = whole[:, old].flatten(), part[:, new].flatten()
                ratio = (variance(after) + 1e-300) / (variance(before) + 1e-300)  # a dead channel stays as it is
                layer.running_mean[new] = wide.running_mean[old] + after.sum() / len(after) - before.sum() / len(before)
                layer.running_var[new] = wide.running_var[old] * min(16.0, max(1 / 16, ratio))
        whole, part = wide(whole.clone()), layer(part.clone())


def variance(values: Tensor) -> float:
    mean = float(values.sum()) / len(values)
    return sum((float(v) - mean) ** 2 for v in values) / len(values)


def test_batch_norm_against_its_twin() -> None:
    dense = cases.randomised(normed())
    smaller, kept = pruned(dense, NORMED)
    expected = copy.deepcopy(smaller)
    batch_norm_twin(dense, expected, cases.images(12), kept)  # type: ignore[arg-type]
    got, _ = applied(dense, smaller, kept, NORMED, "batch_norm")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[7].running_mean, dense[7].running_mean[kept["7", "out", 0]])  # type: ignore[index, union-attr]


@pytest.mark.parametrize("number", [3, 2000])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_moments_are_those_of_the_images_themselves(
    dtype: torch.dtype, tolerance: float, layout: torch.memory_format, number: int
) -> None:
    """Divided by n, not by n - 1: with 3 images of 2 x 2 these are 9 % apart."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).to(dtype).eval()
    images = (5 + 3 * cases.images(number, 2)).to(dtype)
    with torch.no_grad():
        inputs = {"0": images.to(memory_format=layout), "3": model[:3](images)}
    for x in inputs.values():
        parts = [repair.measure_moments(part) for part in x.tensor_split([1, number // 2 + 1])]
        found = parts[0] + parts[1] + parts[2]
        for channel, values in enumerate(x.transpose(0, 1).flatten(1)):
            assert float(found.a[channel]) == pytest.approx(float(values.double().mean()), rel=tolerance)
            assert float(found.products[channel]) / found.count == pytest.approx(variance(values), rel=tolerance)


def test_every_norm_of_a_residual_net_follows_the_change_of_its_input() -> None:
    """Stored mean - mean of the input is as it was in the dense model, for the inputs that the repaired model makes."""
    dense = timm_resnet()
    gone = [0, 5, 6, 20]
    cut: Cut = {(f"layer1.0.{name}", "out", 0): gone for name in ("conv1", "bn1")}
    cut["layer1.0.conv2", "in", 0] = gone
    smaller, kept = pruned(dense, cut)
    images = cases.images(8, 32)
    targets = record_targets(dense, [Batch(images)], [])
    apply_methods({("batch_norm",): smaller}, targets, kept, {}, quick=False)
    before, after = offsets(dense, images), offsets(smaller, images)
    before["layer1.0.bn1"] = before["layer1.0.bn1"][kept["layer1.0.bn1", "out", 0]]
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=1e-9, msg=name)


@torch.no_grad()
def offsets(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    norms = {m: name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}

    def hook(module: nn.Module, args: tuple) -> None:
        found[norms[module]] = module.running_mean - args[0].mean((0, 2, 3))  # type: ignore[operator, index]

    handles = [module.register_forward_pre_hook(hook) for module in norms]
    model(images)
    for handle in handles:
        handle.remove()
    return found


def test_a_channel_that_became_constant_keeps_a_sixteenth_of_its_variance() -> None:
    dense = cases.randomised(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten()))
    with torch.no_grad():
        dense[1].weight[0, 1] = 0  # type: ignore[union-attr, index]
    cut: Cut = {("0", "out", 0): [0], ("1", "in", 0): [0]}
    smaller, kept = pruned(dense, cut)
    applied(dense, smaller, kept, cut, "batch_norm")
    assert torch.isclose(smaller[2].running_var[0], dense[2].running_var[0] / 16)  # type: ignore[index, union-attr]


# --- mean shift and least squares ----------------------------------------------------------------


@torch.no_grad()
def refit_twin(
    dense: nn.Sequential, smaller: nn.Sequential, images: Tensor, kept: dict[Axis, Tensor], ridge: float | None
) -> None:
    """Refit each consumer that lost inputs, in order, on all positions; everything before it is repaired by then."""
    whole = part = images
    for name, layer in smaller.named_children():
        wide = dense.get_submodule(name)
        wanted = wide(whole.clone())
        if (name, "in", 0) in kept:
            a, y = unfolded(layer, part), by_position(wanted)
            if (name, "out", 0) in kept:
                y = y[:, kept[name, "out", 0].numpy()]
            w = layer.weight.flatten(1).T.numpy()
            shifted, target = a - a.mean(0), y - y.mean(0)
            if ridge is not None:
                penalty = ridge * np.trace(shifted.T @ shifted) / shifted.shape[1]
                w = w + augmented_lstsq(shifted, target - shifted @ w, penalty)
            layer.weight.copy_(torch.from_numpy(w.T.copy()).view_as(layer.weight))
            layer.bias.copy_(torch.from_numpy(y.mean(0) - a.mean(0) @ w))
        whole, part = wanted, layer(part.clone())


def augmented_lstsq(a: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """argmin ||y - a d||^2 + penalty ||d||^2, by a plain least-squares problem with more rows."""
    width = a.shape[1]
    rows = np.concatenate([a, np.sqrt(penalty) * np.eye(width)])
    return np.linalg.lstsq(rows, np.concatenate([y, np.zeros((width, y.shape[1]))]), rcond=None)[0]


def unfolded(layer: nn.Module, x: Tensor) -> np.ndarray:
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).numpy()
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1]).numpy()


def by_position(y: Tensor) -> np.ndarray:
    return (y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1]) if y.dim() == 4 else y).numpy()


@pytest.mark.parametrize(("method", "ridge"), [("mean_shift", None), ("least_squares", RIDGE)])
def test_refits_against_their_twin(method: str, ridge: float | None) -> None:
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    expected = copy.deepcopy(smaller)
    refit_twin(dense, expected, cases.images(12), kept, ridge)  # type: ignore[arg-type]
    got, _ = applied(dense, smaller, kept, PLAIN, method)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=1e-8, atol=1e-9, msg=f"{name}")


@pytest.mark.parametrize("method", ["mean_shift", "least_squares"])
def test_after_a_refit_every_consumer_has_the_dense_mean(method: str) -> None:
    """True only if each layer was fitted to inputs that were repaired already, as the final model makes them."""
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    unrepaired = copy.deepcopy(smaller)
    applied(dense, smaller, kept, PLAIN, method)
    images = cases.images(12)
    for name in consumers(PLAIN):
        expected = mean_at(dense, name, images)
        if (name, "out", 0) in kept:
            expected = expected[kept[name, "out", 0]]
        torch.testing.assert_close(mean_at(smaller, name, images), expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(mean_at(unrepaired, name, images), expected, atol=1e-3)


@torch.no_grad()
def mean_at(model: nn.Module, name: str, images: Tensor) -> Tensor:
    out = model[: int(name) + 1](images.clone())  # type: ignore[index]
    return out.mean((0, 2, 3)) if out.dim() == 4 else out.mean(0)


def test_least_squares_leaves_less_error_than_a_mean_shift_and_that_less_than_nothing() -> None:
    dense = cases.randomised(plain())
    logits = compute_logits(dense, batches(dense))
    errors = []
    for methods in ((), ("mean_shift",), ("least_squares",)):
        smaller, kept = pruned(dense, PLAIN)
        applied(dense, smaller, kept, PLAIN, *methods)
        got = compute_logits(smaller, batches(dense))
        errors.append(float((torch.cat(got) - torch.cat(logits)).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_a_refit_of_a_transformer_block_reproduces_the_mean_of_every_token() -> None:
    dense = timm_vit()
    gone = list(range(0, 192, 3))
    cut: Cut = {("blocks.0.mlp.fc1", "out", 0): gone, ("blocks.0.mlp.fc2", "in", 0): gone}
    smaller, kept = pruned(dense, cut)
    images = cases.images(6, 32)
    targets = record_targets(dense, [Batch(images)], ["blocks.0.mlp.fc2"])
    apply_methods({("mean_shift",): smaller}, targets, kept, {}, quick=False)
    outputs = []
    for model in (dense, smaller):
        with torch.no_grad():
            handle = model.get_submodule("blocks.0.mlp.fc2").register_forward_hook(
                lambda module, args, out: outputs.append(out.mean((0, 1)))
            )
            model(images)
            handle.remove()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


def test_fewer_positions_are_drawn_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others in every chunk; the sums are those of the rows that were drawn, and the layer is named."""
    monkeypatch.setattr(repair, "MOST_VALUES", 5 * 36)
    monkeypatch.setattr(repair, "CHUNK", 6 * 3 * 8 * 8)
    drawn, rows = [], []

    def gather(module: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
        drawn.append((module.weight[0].numel(), positions))
        rows.append(least_squares.gather_inputs(module, x, positions))
        return rows[-1]

    monkeypatch.setattr(repair, "gather_inputs", gather)
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    _, targets = applied(dense, smaller, kept, PLAIN, "mean_shift")
    assert targets.notes(["auto"]) == ["In 2, least squares looks at a sample of the positions of every image."]
    assert targets.notes(["batch_norm"]) == []
    first, second = (positions for width, positions in drawn if width == 24)
    assert len(first.unique()) == len(second.unique()) == 5
    assert set(first.tolist()) != set(second.tolist())
    assert all(positions is None for width, positions in drawn if width != 24)
    with torch.no_grad():
        chunks = zip(cases.images(12).split(6), (first, second))
        whole = torch.cat([dense[:3](images).flatten(2)[..., at] for images, at in chunks]).mean((0, 2))
    inputs = torch.cat([part for part in rows if part.shape[1] == 24]).mean(0)
    bias = whole[kept["2", "out", 0]] - smaller[2].weight.detach().flatten(1) @ inputs  # type: ignore[index, union-attr]
    torch.testing.assert_close(smaller[2].bias.detach(), bias, rtol=1e-9, atol=1e-12)  # type: ignore[index, union-attr]


@torch.no_grad()
def chunked_twin(
    dense: nn.Sequential,
    smaller: nn.Sequential,
    images: Sequence[Tensor],
    kept: dict[Axis, Tensor],
    fits: Sequence[int],
) -> None:
    """Each consumer on the stacked rows of all chunks so far, as it saw them; fitted in some chunks, float64."""
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    first = {
        name: layer.weight.detach().flatten(1).T.numpy().copy()
        for name, layer in smaller.named_children()
        if hasattr(layer, "weight")
    }
    for number, chunk in enumerate(images, 1):
        whole = part = chunk
        for name, layer in smaller.named_children():
            wanted = dense.get_submodule(name)(whole.clone())
            if (name, "in", 0) in kept:
                y = by_position(wanted)
                y = y[:, kept[name, "out", 0].numpy()] if (name, "out", 0) in kept else y
                seen.setdefault(name, []).append((unfolded(layer, part), y))
                if number in fits:
                    a, y = (np.concatenate(rows) for rows in zip(*seen[name]))
                    shifted, target, w = a - a.mean(0), y - y.mean(0), first[name]
                    penalty = RIDGE * np.trace(shifted.T @ shifted) / shifted.shape[1]
                    w = w + augmented_lstsq(shifted, target - shifted @ w, penalty)
                    layer.weight.copy_(torch.from_numpy(w.T.copy()).view_as(layer.weight))
                    layer.bias.copy_(torch.from_numpy(y.mean(0) - a.mean(0) @ w))
            whole, part = wanted, layer(part.clone())


def test_chunks_against_their_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted in chunks 1, 2, 4 and the last, to everything that was seen until then."""
    monkeypatch.setattr(repair, "CHUNK", 3 * 3 * 8 * 8)
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    expected = copy.deepcopy(smaller)
    chunked_twin(dense, expected, cases.images(15).split(3), kept, (1, 2, 4, 5))  # type: ignore[arg-type]
    applied(dense, smaller, kept, PLAIN, "least_squares", n=15)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(smaller.state_dict()[name], tensor, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize(("images", "first"), [(200, 50), (129, 33), (100, 25), (40, 16), (12, 12), (400, 67)])
def test_between_stops_a_quarter_of_the_images_is_enough(
    images: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "CHUNK", 68 * 3 * 8 * 8)  # 400 images go in six chunks, of 67 or 66
    dense = cases.randomised(plain())
    targets = record_targets(dense, batches(dense, images), consumers(PLAIN))
    assert len(targets.first.images) == first
    assert max(map(len, targets.chunks)) <= 68
    assert sum(map(len, targets.chunks)) == images


def test_between_stops_the_dense_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first images; at a stop on all of them; a batch of the gate decides; one chunk at a time."""
    monkeypatch.setattr(repair, "CHUNK", 4 * 3 * 8 * 8)
    dense = cases.randomised(plain())
    images, gate = batches(dense, 10), batches(dense, 9, seed=3)
    smaller, kept = pruned(dense, PLAIN)
    seen: list[str] = []
    for name, model in (("dense ", dense), ("", smaller)):
        model[0].register_forward_pre_hook(lambda module, args, name=name: seen.append(f"{name}{len(args[0])}"))  # type: ignore[index, union-attr, misc]
    targets = record_targets(dense, images, consumers(PLAIN))
    models = copy.deepcopy(smaller), smaller
    outcomes = [repair_model(m, targets, gate, kept, ("auto",), quick=quick) for m, quick in zip(models, (True, False))]
    first = ["dense 4", "5", "4", "5"]  # a batch of the gate before, the repair, a batch of the gate after
    assert seen[:4] == first
    together = ["dense 4", "4", "4", "dense 3", "3", "3", "dense 3", "3", "3"]  # both combinations
    assert seen[4:] == ["5", "4", *together, "5", "4", "5", "4"]
    assert outcomes[0].kept == "least_squares"


def test_between_stops_sixteen_of_the_images_held_back_decide() -> None:
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    targets = record_targets(dense, batches(dense), consumers(PLAIN))
    gate = rebatch(batches(dense, 20, seed=3), 20)
    outcomes = [repair_model(copy.deepcopy(smaller), targets, gate, kept, (), quick=quick) for quick in (True, False)]
    assert [outcome.before.images for outcome in outcomes] == [16, 20]


def test_what_was_recorded_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activation that works in place follows the layer, whose outputs are a view where they are linear."""
    net = cases.randomised(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU(inplace=True)))
    images = cases.images(3, 4)[:, :, 0]
    _, outputs = record_chunk(net, images, ["1"], 0).outputs["1"]
    with torch.no_grad():
        assert torch.equal(outputs, net[:2](images).flatten(0, 1))
    assert (outputs < 0).any()


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (7, 40), (9, 9), (20, 9)])
@pytest.mark.parametrize("parts", [1, 3])
def test_sums_over_parts_agree_with_plain_least_squares(rows: int, columns: int, parts: int) -> None:
    a = 5 + torch.randn(rows, columns, dtype=torch.float64)
    y = torch.randn(rows, 3, dtype=torch.float64) - 2
    found = [least_squares.sum_products(*pair) for pair in zip(a.tensor_split(parts), y.tensor_split(parts))]
    (gram, cross), *others = found
    for more in others:
        gram, cross = gram + more[0], cross + more[1]
    torch.testing.assert_close((gram.a, cross.y), (a.mean(0), y.mean(0)))
    a, y = a - a.mean(0), y - y.mean(0)
    penalty = RIDGE * float(a.square().sum()) / columns
    torch.testing.assert_close(gram.whole.diagonal().mean() * RIDGE, torch.tensor(penalty).double())
    expected = augmented_lstsq(a.numpy(), y.numpy(), penalty)
    assert gram.factored == (columns == 40)
    assert gram.products.shape == ((rows + parts - 1, columns) if gram.factored else (columns, columns))
    solved = least_squares.solve_ridge(gram, cross.products, penalty)
    np.testing.assert_allclose(solved.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_inputs_that_are_constant_do_not_break_the_solution() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        sums = least_squares.sum_products(torch.full((8, 3), 7.0), torch.randn(8, 2))
        least_squares.refit(layer, layer.weight.clone(), *sums, RIDGE)
    assert torch.equal(layer.weight, before)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": (2, 1)},
    "strided": {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1},
    "dilated": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (0, 2)},
    "everything": {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1), "padding": (1, 2)},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_rows_of_a_convolution_are_those_of_unfold(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 3, **options).double()
    x = torch.randn(5, 4, 9, 11, dtype=torch.float64)
    out = conv(x).flatten(2)
    positions = torch.randperm(out.shape[2])[:6].sort().values
    rows = least_squares.gather_inputs(conv, x, positions)
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    assert torch.equal(rows, patches[:, :, positions].transpose(1, 2).reshape(len(rows), -1))
    with torch.no_grad():
        made = rows @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(made, out[:, :, positions].transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4), (5, 2, 3, 4)])
def test_rows_of_a_linear_layer_are_its_inputs(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    flat = x.reshape(5, -1, 4)
    positions = torch.arange(0, flat.shape[1], 2)
    assert torch.equal(least_squares.gather_inputs(nn.Linear(4, 3), x, positions), flat[:, ::2].reshape(-1, 4))


def test_layers_whose_inputs_cannot_be_laid_out_are_not_refitted() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 6, 2),
        nn.Flatten(),
        Scaled(294, 4),
    )
    smaller = copy.deepcopy(model)
    masks = {f"{name}.weight": torch.zeros_like(model[int(name)].weight, dtype=torch.bool) for name in "01235"}
    targets = record_targets(model, [Batch(torch.randn(2, 3, 8, 8))], list("01235"))
    assert not targets.first.outputs
    apply_methods({("least_squares",): smaller}, targets, {}, masks, quick=False)
    assert_same_bits(smaller, model)


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize(("make", "cut"), [(plain, PLAIN), (normed, NORMED)])
def test_a_repair_that_harms_is_not_kept(
    make: Callable[[], nn.Module], cut: Cut, methods: Sequence[str], fingerprint: Callable[[nn.Module], dict]
) -> None:
    """The images held back say that the pruned model is perfect as it is."""
    dense = cases.randomised(make())
    smaller, kept = pruned(dense, cut)
    before = fingerprint(smaller)
    targets = record_targets(dense, batches(dense), consumers(cut))
    outcome = repair_model(smaller, targets, batches(smaller, seed=2), kept, methods)
    assert outcome.kept == "none"
    assert outcome.before == outcome.after
    after = fingerprint(smaller)
    for part in ("values", "training", "hooks", "flags", "requires_grad", "random"):
        assert after[part] == before[part], part


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize(("make", "cut"), [(plain, PLAIN), (normed, NORMED)])
def test_the_divergence_on_images_held_back_never_rises(
    make: Callable[[], nn.Module], cut: Cut, methods: Sequence[str], seed: int
) -> None:
    dense = cases.randomised(make(), seed)
    smaller, kept = pruned(dense, cut)
    gate = batches(dense, seed=7 + seed)
    before = agreement_on(smaller, gate)
    targets = record_targets(dense, batches(dense, seed=seed), consumers(cut))
    outcome = repair_model(smaller, targets, gate, kept, methods)
    after = agreement_on(smaller, gate)
    assert (outcome.before, outcome.after) == (before, after)
    assert after == before if outcome.kept == "none" else after.kl < before.kl


def test_auto_takes_the_best_combination() -> None:
    dense = cases.randomised(plain())
    gate = batches(dense, 40, seed=5)
    targets = record_targets(dense, batches(dense, 40), consumers(PLAIN))
    found = {}
    for methods in (("mean_shift",), ("least_squares",), ("auto",)):
        smaller, kept = pruned(dense, PLAIN)
        outcome = repair_model(smaller, targets, gate, kept, methods)
        found[methods[0]] = outcome.kept, agreement_on(smaller, gate).kl
    assert found["least_squares"][0] == "least_squares"
    assert found["auto"] == min(found["mean_shift"], found["least_squares"], key=lambda pair: pair[1])


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    ("make", "expected"),
    [(plain, [("least_squares",), ("mean_shift",)]), (normed, [("batch_norm", "least_squares"), ("batch_norm",)])],
)
def test_auto_tries_what_applies(
    make: Callable[[], nn.Module], expected: list[tuple[str, ...]], quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = cases.randomised(make())
    tried = []
    monkeypatch.setattr(repair, "apply_methods", lambda models, *_, quick: tried.extend(models) or ())
    images = batches(dense)
    repair_model(copy.deepcopy(dense), record_targets(dense, images, []), images, {}, ("auto",), quick=quick)
    assert tried == expected


@pytest.mark.parametrize("norms", [True, False])
def test_between_stops_consumers_without_bias_are_left_to_batch_norms(norms: bool) -> None:
    """Where the model has any; at a stop every consumer is refitted."""
    linear = nn.Linear(192, 5, bias=False), nn.GELU(), nn.Linear(5, 4)
    dense = cases.randomised(nn.Sequential(*[nn.BatchNorm2d(3)] * norms, nn.Flatten(), *linear))
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)]
    targets = record_targets(dense, batches(dense), names)
    masks = {f"{name}.weight": dense.get_submodule(name).weight > 0 for name in names}  # type: ignore[operator]
    quick, whole = (repair.Fit(dense, targets, {}, ("least_squares",), masks, quick) for quick in (True, False))
    assert list(whole.weights) == names
    assert list(quick.weights) == names[norms:]


def test_without_methods_the_agreement_is_measured_and_nothing_else() -> None:
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    before = copy.deepcopy(smaller)
    images = batches(dense)
    outcome = repair_model(smaller, record_targets(dense, images, []), images, kept, ())
    assert outcome == repair.Outcome("none", agreement_on(before, images), agreement_on(before, images))
    assert_same_bits(smaller, before)


def test_a_repair_that_breaks_the_model_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = cases.randomised(plain())
    smaller, kept = pruned(dense, PLAIN)
    before = copy.deepcopy(smaller)

    def breaks(models: dict[tuple[str, ...], nn.Module], *_: object, quick: bool) -> list[tuple[str, ...]]:
        for model in models.values():
            model[2].bias.data.fill_(torch.nan)  # type: ignore[index]
        return list(models)

    monkeypatch.setattr(repair, "apply_methods", breaks)
    images = batches(dense)
    targets = record_targets(dense, images, consumers(PLAIN))
    assert repair_model(smaller, targets, images, kept, ("auto",)).kept == "none"
    assert_same_bits(smaller, before)


def test_what_one_repair_breaks_does_not_reach_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be solved in the second of three chunks."""
    monkeypatch.setattr(repair, "CHUNK", 4 * 3 * 8 * 8)
    dense = cases.randomised(plain())
    (one, kept), (other, _) = pruned(dense, PLAIN), pruned(dense, PLAIN)
    images = batches(dense)
    targets = record_targets(dense, images, consumers(PLAIN))
    repair_model(one, targets, images, kept, ("mean_shift",))
    look, seen = repair.Fit.look, []

    def breaks(fit: repair.Fit, *rest: Any, refitting: bool) -> None:
        seen.append(fit.methods)
        if fit.methods == ("least_squares",) and seen.count(fit.methods) == 2:
            fit.model[2].weight.data.fill_(torch.nan)  # type: ignore[index]
            raise torch.linalg.LinAlgError("not positive definite")
        look(fit, *rest, refitting=refitting)

    monkeypatch.setattr(repair.Fit, "look", breaks)
    assert repair_model(other, targets, images, kept, ("auto",)).kept == "mean_shift"
    assert [seen.count((method,)) for method in ("least_squares", "mean_shift")] == [2, 3]
    assert_same_bits(other, one)


def test_a_repair_leaves_the_dense_model_as_it_was(fingerprint: Callable[[nn.Module], dict]) -> None:
    dense = cases.randomised(normed()).train()
    before = fingerprint(dense)
    smaller, kept = pruned(dense, NORMED)
    applied(dense, smaller, kept, NORMED, "batch_norm", "least_squares")
    assert fingerprint(dense) == before


def test_modes_and_frozen_parameters_survive_a_repair() -> None:
    dense = cases.randomised(normed())
    smaller, kept = pruned(dense, NORMED)
    smaller[9].requires_grad_(False)  # type: ignore[index]
    smaller[1].train()  # type: ignore[index]
    targets = record_targets(dense, batches(dense), consumers(NORMED))
    outcome = repair_model(smaller, targets, batches(dense), kept, ("auto",))
    assert outcome.kept != "none"
    assert not smaller[9].weight.requires_grad  # type: ignore[index, union-attr]
    assert smaller[0].weight.requires_grad  # type: ignore[index, union-attr]
    assert smaller[1].training  # type: ignore[index]
    assert not any(module._forward_pre_hooks for module in smaller.modules())


# --- masks of single weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "inputs"), [(60, 12), (9, 12), (40, 40)])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 2.0])
def test_masked_least_squares_solves_every_row_on_its_support(
    positions: int, inputs: int, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row: (a_S^T a_S + lambda) d_S = a_S^T r, lambda = ridge * mean square of a column's sum."""
    monkeypatch.setattr(least_squares, "ITERATIONS", 500)
    monkeypatch.setattr(least_squares, "CONVERGED", 1e-13)
    a, residual = torch.randn(positions, inputs).double(), torch.randn(positions, 7).double()
    mask = torch.rand(7, inputs) > 0.5
    mask[0], mask[1] = False, True
    penalty = ridge * float((a * a).sum()) / inputs
    found = least_squares.solve_masked_ridge(a.t() @ a, residual.t() @ a, penalty, mask.double())
    for row in range(7):
        support = mask[row].nonzero().flatten()
        part = a[:, support]
        normal = part.t() @ part + penalty * torch.eye(len(support)).double()
        expected = torch.zeros(inputs).double()
        expected[support] = torch.linalg.solve(normal, part.t() @ residual[:, row])
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-11)
    assert (found[~mask] == 0).all()


def test_masked_least_squares_as_it_is_used_is_close_to_the_solution() -> None:
    """Correlated inputs, as activations are: three iterations leave half of the gradient, fifty a thousandth."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator).double() * torch.logspace(0, -1.5, 40).double()
    a, residual = torch.randn(300, 40, generator=generator).double() @ mix, torch.randn(300, 6, generator=generator)
    residual = residual.double()
    mask = torch.rand(6, 40, generator=generator) > 0.3
    penalty = 1e-4 * float(a.square().sum()) / 40
    found = least_squares.solve_masked_ridge(a.t() @ a, residual.t() @ a, penalty, mask.double())
    gradient = ((residual - a @ found.t()).t() @ a - penalty * found) * mask
    first = (residual.t() @ a) * mask
    assert (gradient.norm(dim=1) <= 1.001e-3 * first.norm(dim=1)).all()


def test_stopping_early_never_fits_worse() -> None:
    a, residual = torch.randn(50, 30).double(), torch.randn(50, 5).double()
    mask = (torch.rand(5, 30) > 0.3).double()
    penalty = 0.1 * float((a * a).sum()) / 30

    def loss(d: Tensor) -> float:
        return float((residual - a @ d.t()).square().sum() + penalty * d.square().sum())

    losses = [loss(torch.zeros(5, 30).double())]
    for iterations in range(1, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(least_squares, "ITERATIONS", iterations)
            losses.append(loss(least_squares.solve_masked_ridge(a.t() @ a, residual.t() @ a, penalty, mask)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", [plain, normed])
def test_masked_weights_stay_zero_and_the_rest_makes_up_for_them(make: Callable[[], nn.Module]) -> None:
    dense = cases.randomised(make())
    images = batches(dense)
    slots = weights_of(dense)
    masks = {name: torch.rand(slot.stored.shape) > 0.5 for name, slot in slots.items()}
    targets = record_targets(dense, images, [name.rpartition(".")[0] for name in masks])
    thinned = copy.deepcopy(dense)
    for name, slot in weights_of(thinned).items():
        slot.stored.data.mul_(masks[name])
    outcome = repair_model(thinned, targets, images, {}, ("auto",), masks=masks)
    assert "least_squares" in outcome.kept
    assert outcome.after.kl < 0.5 * outcome.before.kl
    for name, slot in weights_of(thinned).items():
        assert (slot.stored[~masks[name]] == 0).all()
        assert (slot.stored[masks[name]] != 0).all()


def test_a_masked_bias_stays_zero() -> None:
    dense = cases.randomised(plain())
    images = batches(dense)
    last = list(weights_of(dense))[-1].removesuffix(".weight")
    masks = {f"{last}.weight": torch.rand(dense.get_submodule(last).weight.shape) > 0.5}  # type: ignore[union-attr, arg-type]
    bias = torch.arange(len(dense.get_submodule(last).bias)) % 2 == 0  # type: ignore[arg-type]
    targets = record_targets(dense, images, [last])
    for given, zeros in (({}, 0), ({f"{last}.bias": bias}, int((~bias).sum()))):
        thinned = copy.deepcopy(dense)
        layer = thinned.get_submodule(last)
        layer.weight.data.mul_(masks[f"{last}.weight"])
        apply_methods({("least_squares",): thinned}, targets, {}, masks | given, quick=False)
        assert int((layer.bias == 0).sum()) == zeros
        assert not torch.equal(layer.bias, dense.get_submodule(last).bias)
