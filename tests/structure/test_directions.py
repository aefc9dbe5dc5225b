"""Directions against slow twins: moments, relevance, removal, and the choice of ranks, each once more in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from jbrprune.budgets.budget import Floors, select_ranks
from jbrprune.budgets.cost import CostModel, Term
from jbrprune.criteria.relevance import Relevance
from jbrprune.data.batches import Batch, rebatch
from jbrprune.models import layers
from jbrprune.structure.directions import (
    ends_of,
    find_directions,
    fold_bias,
    make_pair,
    measure_moments,
    rotate,
    rotate_all,
    rotate_heads,
)
from jbrprune.structure.groups import Group, Member
from jbrprune.structure.slicing import remove_units
from jbrprune.structure.verification import verify_groups

IMAGES = cases.images(6, 32).double()


def vit(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    return cases.randomised(timm.create_model("vit_tiny_patch16_224", **arguments | more))


def turned(model: nn.Module, images: Tensor) -> tuple[nn.Module, tuple[Group, ...], dict[str, Any]]:
    """The model with two layers for each, in the basis of the outputs; its groups and moments."""
    two, found = find_directions(model, images)
    moments = measure_moments(two, rebatch([Batch(images)], 4), [end for g in found.groups for end in ends_of(g)])
    rotate_all(two, rebatch([Batch(images)], 4), found.groups)
    return two, found.groups, moments


def outputs(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """``[N, positions, C]`` what a layer gives."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(images)
    handle.remove()
    return seen[0].flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else seen[0].flatten(1, -2)


def test_moments_are_those_of_numpy_and_two_layers_compute_the_same() -> None:
    model = vit(qk_norm=True)
    two, groups, moments = turned(model, IMAGES)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert [group.name for group in groups] == [name for name in names if name != "head"]
    torch.testing.assert_close(two(IMAGES), model(IMAGES), rtol=0, atol=1e-10)
    for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        rows = outputs(model, name, IMAGES).flatten(0, 1).numpy()
        covariance = np.cov(rows.T, bias=True)
        np.testing.assert_allclose(moments[name, "out"].mean, rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(moments[name, "out"].covariance, covariance, atol=1e-10)
        values, vectors = np.linalg.eigh(covariance)
        first = two.get_submodule(f"{name}.1").weight.detach().flatten(1)[:, :3].numpy()
        np.testing.assert_allclose(np.abs(first.T @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-6)
        hidden = outputs(two, f"{name}.0", IMAGES).flatten(0, 1)
        np.testing.assert_allclose(hidden.mean(0), 0, atol=1e-10)
        np.testing.assert_allclose(hidden.square().mean(0), values[::-1], atol=1e-9)


def test_a_large_mean_does_not_cost_small_variances_their_digits() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    layer.weight.data, layer.bias.data = torch.diag(torch.tensor([1.0, 1e-2, 1e-3])), torch.tensor([100.0, 300.0, 50.0])
    images = torch.randn(400, 3, 4, 4)
    model = nn.Sequential(nn.Flatten(2), Transpose(), layer, Transpose(), nn.Flatten(), nn.Linear(48, 2))
    found = measure_moments(model, rebatch([Batch(images)], 100), [("2", "out")])["2", "out"].covariance
    expected = torch.cov(layer.weight.double() @ images.double().transpose(0, 1).flatten(1), correction=0)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-6)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("objective", ["pseudo_label", "margin"])
def test_relevance_is_the_derivative_along_a_direction_sample_by_sample(objective: str) -> None:
    """v_k(x) = m^T d f(x; W - t v v^T W, b - t v v^T (b - mu)) / dt up to its sign, by vmap(grad)."""
    model = vit(qk_norm=True)
    two, groups, moments = turned(model, IMAGES)
    scores = Relevance(objective)(two, rebatch([Batch(IMAGES)], 4), groups)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    logits = model(IMAGES).detach()
    top = logits.topk(2).indices
    one_hot = nn.functional.one_hot(top, logits.shape[1]).double()
    m = {"pseudo_label": logits.softmax(1) - one_hot[:, 0], "margin": one_hot[:, 0] - one_hot[:, 1]}[objective]
    for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1"):
        basis = two.get_submodule(f"{name}.1").weight.detach().flatten(1)
        weight, bias, mean = parameters[f"{name}.weight"], parameters[f"{name}.bias"], moments[name, "out"].mean
        for k in (0, 1, basis.shape[1] // 2):
            project = torch.outer(basis[:, k], basis[:, k])

            def along(t: Tensor, image: Tensor, direction: Tensor) -> Tensor:
                changed = {f"{name}.weight": weight - t * (project @ weight.flatten(1)).view_as(weight)}  # noqa: B023
                changed[f"{name}.bias"] = bias - t * project @ (bias - mean)  # noqa: B023
                return (functional_call(model, parameters | changed, (image[None],))[0] * direction).sum()

            with sdpa_kernel(SDPBackend.MATH):
                v = vmap(grad(along), (None, 0, 0))(torch.tensor(0.0, dtype=torch.float64), IMAGES, m)
            torch.testing.assert_close(scores[name][k], v.square().mean(), rtol=1e-7, atol=1e-18)


def test_relevance_of_a_direction_of_heads_is_the_derivative_without_it_sample_by_sample() -> None:
    """v_j(x) = m^T d f / dt where the queries' rows and the output's columns of j in all heads shrink by 1 - t."""
    model, groups, _ = turned(vit(num_heads=3), IMAGES)
    scores = Relevance("pseudo_label")(model, rebatch([Batch(IMAGES)], 4), groups)
    everywhere = Relevance("pseudo_label", site="all")(model, rebatch([Batch(IMAGES)], 4), groups)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    logits = model(IMAGES).detach()
    m = logits.softmax(1) - nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()
    at = "blocks.0.attn"
    for parts, found in ((1, scores), (3, everywhere)):  # queries alone, or queries, keys and values
        for j in (0, 5, 7):
            gone = torch.arange(j, 24, 8)  # of three heads of eight
            rows = torch.cat([gone + 24 * part for part in range(parts)])

            def along(t: Tensor, image: Tensor, direction: Tensor) -> Tensor:
                less = 1 - t * torch.zeros(72).double().index_fill(0, rows, 1)  # noqa: B023
                read = 1 - t * torch.zeros(24).double().index_fill(0, gone, 1)  # noqa: B023
                changed = {
                    f"{at}.qkv.weight": parameters[f"{at}.qkv.weight"] * less[:, None],
                    f"{at}.qkv.bias": parameters[f"{at}.qkv.bias"] * less,
                    f"{at}.proj.weight": parameters[f"{at}.proj.weight"] * read,
                }
                return (functional_call(model, parameters | changed, (image[None],))[0] * direction).sum()

            with sdpa_kernel(SDPBackend.MATH):
                v = vmap(grad(along), (None, 0, 0))(torch.tensor(0.0, dtype=torch.float64), IMAGES, m)
            torch.testing.assert_close(found[at][j], v.square().mean(), rtol=1e-7, atol=1e-18)


def test_directions_of_heads_are_uncorrelated_and_hold_what_numpy_says() -> None:
    model = vit(num_heads=3)
    two, found = find_directions(model, IMAGES)
    assert {(g.name, g.kind, g.size) for g in found.groups if "attn" in g.name} == {
        ("blocks.0.attn", "head_dim", 8),
        ("blocks.1.attn", "head_dim", 8),
    }
    ends = [("blocks.0.attn.qkv", "out"), ("blocks.0.attn.proj", "in")]
    batches = [Batch(IMAGES)]

    def seen(net: nn.Module) -> tuple[Any, Any]:
        """``[3, rows, heads, 8]`` queries, keys, values; ``[rows, heads, 8]`` what the output reads."""
        inputs: list[Tensor] = []
        handle = net.get_submodule(ends[1][0]).register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].detach())
        )
        given = outputs(net, ends[0][0], IMAGES).flatten(0, 1).unflatten(1, (3, 3, 8)).movedim(1, 0)
        handle.remove()
        return given.numpy(), inputs[0].flatten(0, 1).unflatten(1, (3, 8)).numpy()

    (q, k, _), z = seen(two)
    out = two.blocks[0].attn.proj.weight.detach().clone().numpy().T.reshape(3, 8, -1)
    moments = measure_moments(two, batches, ends)
    energies = rotate_heads(two.blocks[0].attn, *(moments[end] for end in ends)).numpy()
    torch.testing.assert_close(two(IMAGES), model(IMAGES), rtol=0, atol=1e-10)
    (new_q, new_k, _), new_z = seen(two)
    new_out = two.blocks[0].attn.proj.weight.detach().numpy().T.reshape(3, 8, -1)
    held, energy = np.zeros(8), np.zeros(8)
    for h in range(3):
        second, spread = q[:, h].T @ q[:, h] / len(q), np.cov(k[:, h].T, bias=True)
        values = np.sqrt(np.linalg.eigvals(second @ spread).real)  # E (q^T k)^2 over independent q, k, by direction
        held += np.sort(values)[::-1] ** 2
        energy += np.linalg.eigvalsh(out[h].T @ np.cov(z[:, h].T, bias=True) @ out[h])[::-1][:8]
        np.testing.assert_allclose(new_q[:, h].T @ new_q[:, h] / len(q), np.diag(np.sort(values)[::-1]), atol=1e-9)
        np.testing.assert_allclose(np.cov(new_k[:, h].T, bias=True), np.diag(np.sort(values)[::-1]), atol=1e-9)
        np.testing.assert_allclose(np.cov(new_z[:, h].T, bias=True), np.eye(8), atol=1e-7)
        np.testing.assert_allclose(new_z[:, h].mean(0), 0, atol=1e-8)
        np.testing.assert_allclose(new_k[:, h].mean(0), 0, atol=1e-9)
        gram = new_out[h] @ new_out[h].T
        np.testing.assert_allclose(gram, np.diag(gram.diagonal()), atol=1e-9)
    np.testing.assert_allclose(energies, [held, energy], rtol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_narrower_heads_keep_the_old_scale_of_the_softmax(fused: bool) -> None:
    model, groups, _ = turned(vit(num_heads=3), IMAGES)
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(4, 17, 24, dtype=torch.float64)
    attention = model.blocks[1].attn
    q, k, v = attention.qkv(x).unflatten(2, (3, 3, 8))[..., :2].permute(2, 0, 3, 1, 4)  # the first two of eight
    z = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    weight = attention.proj.weight.unflatten(1, (3, 8))[..., :2]
    expected = torch.einsum("bhnr,ohr->bno", z, weight) + attention.proj.bias
    remove_units(model, groups, {"blocks.1.attn": torch.arange(2, 8)})
    assert (attention.head_dim, attention.attn_dim, attention.num_heads) == (2, 6, 3)
    torch.testing.assert_close(attention(x), expected)
    again, found = find_directions(model, IMAGES)  # once more, of the narrower one
    rotate_all(again, [Batch(IMAGES)], found.groups)
    torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=0, atol=1e-10)


def test_factored_outputs_by_hand() -> None:
    layer = nn.Linear(3, 4).double()
    weight = torch.tensor([[1.0, 0, 2], [0, 1, 1], [3, 0, 0], [0, 0, 1]], dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight, torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Identity())})
    pair = nn.Sequential(*make_pair(layer, 4, bias=True).double())
    pair[0].load_state_dict(layer.state_dict())
    pair[1].weight.data, pair[1].bias.data = torch.eye(4).double(), torch.zeros(4).double()
    x = torch.tensor([[1.0, 2, 3], [0, 1, 0], [2, 2, 2], [1, 0, 1], [0, 0, 5]], dtype=torch.float64)
    y = x @ weight.t() + layer.bias.detach()
    mean = y.mean(0)
    covariance = sum(torch.outer(row - mean, row - mean) for row in y) / len(y)
    model["a"] = pair
    rotate(pair, type("M", (), {"mean": mean, "covariance": covariance}))
    group = Group(
        "a",
        "direction",
        4,
        tuple(Member((f"a.{i}", s, 0), torch.arange(4), torch.arange(4)) for i, s in enumerate(("out", "in"))),
    )
    remove_units(model, [group], {"a": torch.tensor([1, 3])})
    before = pair(x)
    fold_bias(pair)
    torch.testing.assert_close(pair(x), before)
    vectors = np.linalg.eigh(covariance.numpy())[1]
    largest, third = (torch.from_numpy(np.ascontiguousarray(vectors[:, i])) for i in (3, 1))
    expected = torch.stack([mean + largest * (largest @ (row - mean)) + third * (third @ (row - mean)) for row in y])
    torch.testing.assert_close(pair(x), expected)
    assert pair[0].bias is None


CASES: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit, normalised queries": lambda: vit(qk_norm=True),
    "vit, scaled, no bias": lambda: vit(init_values=0.1, qkv_bias=False),
    "swin": lambda: small(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    ),
    "eva": lambda: small("eva02_tiny_patch14_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2),
    "mixer": lambda: cases.randomised(MlpMixer(5, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)),
    "convnext": lambda: small("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), conv_mlp=False),
    "dinov2": lambda: small(
        "vit_small_patch14_reg4_dinov2", img_size=28, depth=2, embed_dim=24, num_heads=2, num_classes=5
    ),
}


def small(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(timm.create_model(name, **{"num_classes": 5} | arguments))


@pytest.mark.parametrize("case", CASES)
def test_projected_equals_factored_at_a_tenth_of_the_directions(case: str, fingerprint: Callable) -> None:
    model = CASES[case]()
    images = cases.images(3, 28 if case == "dinov2" else 32).double()
    before = fingerprint(model)
    two, found = find_directions(model, images)
    assert found.groups
    assert fingerprint(model) == before
    passed = verify_groups(two, images, found)
    assert len(passed.groups) == len(found.groups), passed.skipped
    two, groups, moments = turned(model, images)
    stays = {group.name: max(1, round(0.1 * group.size)) for group in groups}
    pairs = [group.name for group in groups if group.kind == "direction"]
    assert (len(pairs) < len(groups)) == (case in ("vit", "dinov2"))
    bases = {n: two.get_submodule(f"{n}.1").weight.detach().flatten(1)[:, : stays[n]] for n in pairs}
    whole = {n: copy.deepcopy(two.get_submodule(n)) for n in stays.keys() - set(pairs)}
    remove_units(two, groups, {group.name: torch.arange(stays[group.name], group.size) for group in groups})
    for name in pairs:
        fold_bias(two.get_submodule(name))

    def project(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
            dim, mean, basis = layers.channel_dim(module) or -1, moments[name, "out"].mean, bases[name]
            y = y.movedim(dim, -1)
            return (mean + (y - mean) @ basis @ basis.t()).movedim(-1, dim)

        return hook

    def narrow(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, _: Tensor) -> Tensor:
            own, shape = whole[name], (whole[name].num_heads, whole[name].head_dim)
            q, k, v = own.qkv(args[0]).unflatten(2, (3, *shape))[..., : stays[name]].permute(2, 0, 3, 1, 4)
            z = (q @ k.mT * own.scale).softmax(-1) @ v
            return (
                torch.einsum("bhnr,ohr->bno", z, own.proj.weight.unflatten(1, shape)[..., : stays[name]])
                + own.proj.bias
            )

        return hook

    handles = [model.get_submodule(name).register_forward_hook(project(name)) for name in pairs]
    handles += [model.get_submodule(name).register_forward_hook(narrow(name)) for name in whole]
    expected = model(images)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(two(images), expected, rtol=0, atol=1e-9)


def test_what_cannot_be_two_layers_stays_whole_with_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.read, self.tied, self.same = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.same.weight = self.tied.weight
            self.peeked = nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)

        def get_classifier(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            x = self.attention(x, x, x)[0]
            x = nn.functional.linear(x, self.read.weight) + self.tied(x) + self.same(x)
            return self.head((self.peeked(x) * self.peeked.weight.sum()).mean(1))

    _, found = find_directions(Net().double(), IMAGES)
    assert [group.name for group in found.groups] == ["stem"]
    reads = "another module reads its weights"
    assert found.skipped["attention.out_proj"] == found.skipped["read"] == reads
    assert found.skipped["tied"] == found.skipped["same"] == "its weights are shared"
    assert found.skipped["head"] == "the classifier"
    assert "has no attribute 'weight'" in found.skipped["peeked"]


def tiny(sizes: list[tuple[int, int, int]]) -> tuple[tuple[Group, ...], Callable[[], CostModel]]:
    """Groups of (in, out, directions), and their cost: the whole layer, or two where that is less."""
    groups, terms, full = [], [Term(7.0, ())], {}
    for number, (inputs, width, size) in enumerate(sizes):
        first, second, index = (f"{number}.0", "out", 0), (f"{number}.1", "in", 0), torch.arange(size)
        groups.append(
            Group(str(number), "direction", size, (Member(first, index, index), Member(second, index, index)))
        )
        terms.append(Term(inputs * width, (), (Term(inputs * size, (first,)), Term(size * width, (second,)))))
        full |= {first: size, second: size}
    return tuple(groups), lambda: CostModel(terms, groups, full)


@pytest.mark.parametrize("seed", range(12))
def test_ranks_against_all_choices(seed: int) -> None:
    """The budget holds, is overshot by less than one direction, and no choice at least as cheap is far better."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(6, 8, 8), (8, 4, 4), (5, 5, 5)]
    groups, cost = tiny(sizes)
    scores = {group.name: torch.rand(group.size, generator=generator).double() ** 3 for group in groups}
    target = cost().total * float(0.35 + 0.6 * torch.rand((), generator=generator))
    left = cost()
    chosen = select_ranks(scores, groups, left, target, floors=Floors(), dense_sizes={g.name: g.size for g in groups})
    ranks = [group.size - len(chosen.get(group.name, ())) for group in groups]

    def price(ranks: tuple[int, ...] | list[int]) -> int:
        return 7 + sum(min(i * o, r * (i + o)) for (i, o, _), r in zip(sizes, ranks))

    def loss(ranks: tuple[int, ...] | list[int]) -> float:
        return sum(float(scores[g.name].sort().values[: g.size - r].sum()) for g, r in zip(groups, ranks))

    assert left.total == pytest.approx(price(ranks))
    assert price(ranks) <= target
    assert loss(ranks) == pytest.approx(sum(float(scores[name][gone].sum()) for name, gone in chosen.items()))
    for number in range(3):  # nothing fits any more
        more = [r + (n == number) for n, r in enumerate(ranks)]
        assert ranks[number] == sizes[number][2] or price(more) > target or price(more) == price(ranks)
    every = list(itertools.product(*(range(1, size + 1) for *_, size in sizes)))
    best = min(loss(each) for each in every if price(each) <= target)
    jump = max(inputs * width for inputs, width, _ in sizes)  # what one price cannot divide
    worst = min((loss(each) for each in every if price(each) <= target - jump), default=math.inf)
    assert best <= loss(ranks) + 1e-12
    assert loss(ranks) <= worst + 1e-12


def test_ranks_are_multiples_and_never_cost_more_than_the_layer() -> None:
    groups, cost = tiny([(64, 64, 64), (64, 128, 128), (64, 64, 64)])
    scores = {group.name: torch.arange(group.size, 0, -1).double() for group in groups}
    floors, dense = Floors(round_to=8), {group.name: group.size for group in groups}
    for share in (0.9, 0.6, 0.3):
        left = cost()
        chosen = select_ranks(scores, groups, left, share * left.total, floors=floors, dense_sizes=dense)
        ranks = [group.size - len(chosen.get(group.name, ())) for group in groups]
        assert all(r % 8 == 0 for r in ranks)
        assert all(r == full or r < most for r, full, most in zip(ranks, (64, 128, 64), (32, 43, 32)))
        assert left.total <= share * cost().total
        assert share * cost().total - left.total < 8 * 192
