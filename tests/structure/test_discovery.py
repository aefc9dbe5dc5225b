"""Removable units of nets whose couplings are listed by hand; what is kept, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import timm
import torch
from reference import layer_groups
from timm.models.densenet import DenseNet
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, ModelError, UnsupportedModelError
from jbrprune.structure import tracing
from jbrprune.structure.discovery import Found, find_groups
from jbrprune.structure.groups import Axis, Group
from jbrprune.structure.verification import verify_groups

Fingerprint = Callable[[nn.Module], dict[str, Any]]


def found(model: nn.Module, size: int = 32, **options: Any) -> Found:
    return find_groups(model.eval(), torch.randn(2, 3, size, size), **options)


def axes(group: Group) -> tuple[set[str], set[str], set[str]]:
    """Names on the sides out, in and param."""
    out, into, param = ({m.axis[0] for m in group.side(side)} for side in ("out", "in", "param"))  # type: ignore[arg-type]
    return out, into, param


def by_name(found: Found) -> dict[str, Group]:
    return {group.name: group for group in found.groups}


def channels(group: Group, axis: Axis, unit: int) -> list[int]:
    (member,) = (m for m in group.members if m.axis == axis)
    return member.channel[member.unit == unit].tolist()


def vit(**options: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=4, **options
    )


def test_couplings_of_two_residual_blocks() -> None:
    result = found(nets.TwoBlocks(), 12)
    assert {group.name: (group.size, *axes(group)) for group in result.groups} == {
        "stem": (6, {"stem", "bn", "one.conv2", "one.bn2"}, {"one.conv1", "two.conv1", "two.downsample.0"}, set()),
        "one.conv1": (6, {"one.conv1", "one.bn1"}, {"one.conv2"}, set()),
        "two.conv1": (10, {"two.conv1", "two.bn1"}, {"two.conv2"}, set()),
        "two.conv2": (10, {"two.conv2", "two.bn2", "two.downsample.0", "two.downsample.1"}, {"fc"}, set()),
    }
    assert {group.kind for group in result.groups} == {"channel"}
    for group in result.groups:
        for member in group.members:
            assert member.channel.tolist() == member.unit.tolist() == list(range(group.size))
    assert result.skipped == {"fc": "no layer that could shrink reads it"}


def test_the_axis_that_names_a_group_comes_first() -> None:
    for group in (*found(nets.TwoBlocks(), 12).groups, *found(vit()).groups):
        assert group.members[0].axis[0] == group.name


def test_heads_and_hidden_widths_of_a_vit() -> None:
    groups = by_name(found(vit()))
    assert list(groups) == ["blocks.0.attn", "blocks.0.mlp.fc1", "blocks.1.attn", "blocks.1.mlp.fc1"]
    head = groups["blocks.1.attn"]
    assert (head.kind, head.size) == ("head", 3)
    assert {m.axis for m in head.members} == {
        ("blocks.1.attn", "heads", 0),
        ("blocks.1.attn.qkv", "out", 0),
        ("blocks.1.attn.proj", "in", 0),
    }
    assert channels(head, ("blocks.1.attn.qkv", "out", 0), 1) == [*range(8, 16), *range(32, 40), *range(56, 64)]
    assert channels(head, ("blocks.1.attn.proj", "in", 0), 1) == list(range(8, 16))
    hidden = groups["blocks.0.mlp.fc1"]
    assert (hidden.kind, hidden.size, axes(hidden)) == (
        "channel",
        96,
        ({"blocks.0.mlp.fc1"}, {"blocks.0.mlp.fc2"}, set()),
    )


def test_width_of_a_vit_only_on_request() -> None:
    kept = found(vit()).skipped
    assert kept == {
        "patch_embed.proj": "a LayerNorm normalises over it; pass width=True to offer it",
        "head": "the classifier",
    }
    rms = found(vit(norm_layer="rmsnorm")).skipped
    assert rms["patch_embed.proj"] == "an RMSNorm normalises over it; pass width=True to offer it"
    group = by_name(found(vit(init_values=0.1), width=True))["patch_embed.proj"]
    blocks = [f"blocks.{i}" for i in range(2)]
    out = {f"{b}.{part}" for b in blocks for part in ("norm1", "attn.proj", "ls1", "norm2", "mlp.fc2", "ls2")}
    into = {f"{b}.{part}" for b in blocks for part in ("attn.qkv", "mlp.fc1")}
    assert (group.kind, group.size) == ("width", 24)
    assert axes(group) == (out | {"patch_embed.proj", "norm"}, into | {"head"}, {"cls_token", "pos_embed"})


def test_normalised_queries_do_not_keep_heads() -> None:
    groups = by_name(found(vit(qk_norm=True)))
    assert groups["blocks.0.attn"].kind == "head"
    assert "blocks.0.attn.q_norm" not in {m.axis[0] for g in groups.values() for m in g.members}


def test_a_norm_over_all_heads_keeps_them() -> None:
    groups = by_name(found(vit(scale_attn_norm=True)))
    assert list(groups) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


@pytest.mark.parametrize("fused", [True, False])
def test_fused_attention_does_not_matter(fused: bool) -> None:
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert len(found(model).groups) == 4


def test_groups_of_a_grouped_convolution() -> None:
    group = by_name(found(nets.CASES["grouped"].make(), 12))["a"]
    assert (group.kind, group.size) == ("group", 6)
    assert channels(group, ("a", "out", 0), 2) == channels(group, ("n", "in", 0), 2) == [8, 9, 10, 11]
    assert channels(group, ("n", "out", 0), 2) == channels(group, ("b", "in", 0), 2) == [4, 5]


def test_a_depthwise_convolution_has_one_side() -> None:
    group = by_name(found(nets.CASES["depthwise"].make(), 12))["a"]
    assert (group.kind, axes(group)) == ("channel", ({"a", "n"}, {"b"}, set()))
    group = by_name(found(nets.CASES["depthwise, three outputs each"].make(), 12))["a"]
    assert axes(group) == ({"a", "n"}, {"b"}, set())
    assert channels(group, ("n", "out", 0), 2) == channels(group, ("b", "in", 0), 2) == [6, 7, 8]


def test_offsets_of_dense_concatenations() -> None:
    groups = by_name(found(nets.CASES["dense"].make(), 12))
    assert axes(groups["b"]) == ({"b"}, {"c", "fc"}, set())
    assert channels(groups["a"], ("fc", "in", 0), 5) == [5]
    assert channels(groups["b"], ("c", "in", 0), 3) == channels(groups["b"], ("fc", "in", 0), 3) == [9]
    assert channels(groups["c"], ("fc", "in", 0), 0) == [10]


def test_concatenations_of_densenet() -> None:
    model = DenseNet(growth_rate=4, block_config=(2, 1), bn_size=2, num_classes=4)
    result = by_name(found(model))
    one, two = (f"features.denseblock1.denselayer{i}" for i in (1, 2))
    assert axes(result["features.conv0"]) == (
        {"features.conv0", "features.norm0", f"{one}.norm1", f"{two}.norm1", "features.transition1.norm"},
        {f"{one}.conv1", f"{two}.conv1", "features.transition1.conv"},
        set(),
    )
    assert channels(result[f"{one}.conv2"], ("features.transition1.norm", "out", 0), 1) == [9]
    assert channels(result[f"{two}.conv2"], ("features.transition1.conv", "in", 0), 1) == [13]


def test_a_flattened_channel_owns_all_its_positions() -> None:
    group = by_name(found(nets.CASES["flattened"].make(), 12))["a"]
    assert channels(group, ("fc", "in", 0), 3) == list(range(27, 36))
    assert group.members[0].axis == ("a", "out", 0)


def test_halves_that_meet_are_one_unit() -> None:
    group = by_name(found(nets.CASES["halves added"].make(), 12))["a"]
    assert channels(group, ("a", "out", 0), 3) == [3, 11]
    assert channels(group, ("b", "in", 0), 3) == [3]


def test_gates_of_tokens() -> None:
    group = by_name(found(nets.CASES["gated tokens behind positions"].make(), 12))["b"]
    assert channels(group, ("b", "out", 0), 3) == [3, 11]
    assert channels(group, ("c", "in", 0), 3) == [3]


def test_a_layer_called_twice_couples_both_calls() -> None:
    group = by_name(found(nets.CASES["called twice"].make(), 12))["a"]
    assert axes(group) == ({"a", "b"}, {"b", "c"}, set())
    group = by_name(found(nets.CASES["called in two branches"].make(), 12))["a"]
    assert axes(group) == ({"a", "b"}, {"c"}, set())


def test_squeeze_and_excite() -> None:
    model = timm.create_model("seresnet18", num_classes=4)
    groups = by_name(found(model))
    assert axes(groups["layer1.0.se.fc1"]) == ({"layer1.0.se.fc1"}, {"layer1.0.se.fc2"}, set())
    out, into, _ = axes(groups["conv1"])
    assert {"layer1.0.conv2", "layer1.0.se.fc2", "layer1.1.se.fc2"} <= out
    assert {"layer1.0.se.fc1", "layer1.1.se.fc1", "layer2.0.downsample.0"} <= into


def test_per_channel_layers_that_the_graph_does_not_know() -> None:
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=4)
    group = by_name(found(model))["stages.0.blocks.0.mlp.fc1"]
    assert axes(group)[0] == {"stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.mlp.grn"}
    wide = by_name(found(model, width=True))
    assert wide["stem.0"].kind == "width"
    assert {"stem.1", "stages.0.blocks.0.conv_dw", "stages.0.blocks.0.norm"} <= axes(wide["stem.0"])[0]


def test_weights_of_a_prelu_and_bare_parameters_are_parameters() -> None:
    assert axes(by_name(found(nets.CASES["prelu"].make(), 12))["a"])[2] == {"n.weight"}
    assert axes(by_name(found(nets.CASES["bare scale"].make(), 12))["a"])[2] == {"w"}


@pytest.mark.parametrize(
    "name", ["halves swapped", "pixels from channels", "repeated one by one", "products of features"]
)
def test_a_graph_that_does_not_fit_the_widths_is_not_believed(name: str) -> None:
    case = nets.CASES[name]
    result = found(case.make(), 12)
    assert set(case.refused) <= set(result.skipped)
    assert not set(case.refused) & set(by_name(result))


def test_a_walk_through_many_partial_shortcuts_ends() -> None:
    result = found(timm.create_model("rexnet_100", num_classes=4))
    assert len(result.groups) == 31
    assert result.skipped["features.14.conv_pwl.conv"].startswith("the dependency graph does not follow its channels")


@pytest.mark.parametrize(
    ("name", "layer"), [("products of features", "b"), ("shortcuts over some channels", "layers.8")]
)
def test_a_walk_that_finds_ever_new_channels_ends(name: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, mapped = [0], tracing._map_channels

    def counted(*arguments: Any) -> Any:
        steps[0] += 1
        return mapped(*arguments)

    monkeypatch.setattr(tracing, "_map_channels", counted)
    result = found(nets.CASES[name].make(), 12)
    assert result.skipped[layer].startswith("the dependency graph does not follow its channels")
    assert steps[0] < 2_000


def test_reasons_to_keep() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 1, 1)
            self.d, self.one = nn.Conv2d(1, 5, 1), nn.GroupNorm(1, 5)
            self.attn, self.fc = nn.MultiheadAttention(5, 1, batch_first=True), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.one(self.d(self.c(self.b(y)))).flatten(2).transpose(1, 2)
            z = self.fc(self.attn(z, z, z, need_weights=False)[0]).mean(1)
            return (y.mean((2, 3)) + z).relu()

    kept = found(Tail(), 4).skipped
    assert kept["a"] == "reaches the model's output"
    assert kept["d"] == "attn (MultiheadAttention) is of a class that cannot be shrunk"


def test_one_group_norm_over_everything_ties_all_channels() -> None:
    result = found(nets.layered(nn.GroupNorm(1, 8), 8), 12)
    assert result.skipped["a"] == "its channels can only go all together"


def test_the_classifier_is_kept_by_what_timm_says() -> None:
    assert found(timm.create_model("resnet10t", num_classes=4)).skipped == {"fc": "the classifier"}


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ((), ["stem", "one.conv1", "two.conv1", "two.conv2"]),
        (["two"], ["one.conv1"]),
        (["one.*"], ["two.conv1", "two.conv2"]),
        (["*.conv1"], ["two.conv2"]),
        (["two.downsample.1"], ["stem", "one.conv1", "two.conv1"]),
        (["two.conv1"], ["one.conv1", "two.conv2"]),
    ],
)
def test_ignored_layers_stay_on_both_sides(ignore: list[str], left: list[str]) -> None:
    result = found(nets.TwoBlocks(), 12, ignore=ignore)
    assert [group.name for group in result.groups] == left
    gone = {"stem", "one.conv1", "two.conv1", "two.conv2"} - set(left)
    assert all(result.skipped[name] == "ignored on request" for name in gone)


@pytest.mark.parametrize("function", [lambda m, i: found(m, 12, ignore=i), lambda m, i: layer_groups(m, ignore=i)])
def test_bad_globs_are_refused(function: Callable[[nn.Module, object], object]) -> None:
    with pytest.raises(ArgumentError, match=r"ignore: 'layer9\.\*' matches no module\. Names look like stem, bn"):
        function(nets.TwoBlocks(), ["stem", "layer9.*"])
    with pytest.raises(ArgumentError, match=r"got the string 'stem': write \['stem'\]"):
        function(nets.TwoBlocks(), "stem")


def test_single_layers_as_groups() -> None:
    groups = {group.name: group for group in layer_groups(nets.TwoBlocks(), ignore=["one", "two"])}
    assert {name: group.size for name, group in groups.items()} == {
        "stem:out": 6,
        "stem:in": 3,
        "bn:out": 6,
        "fc:out": 4,
        "fc:in": 10,
    }
    assert [m.axis for m in groups["stem:in"].members] == [("stem", "in", 0)]


def test_a_model_that_does_not_run_is_named() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"TwoBlocks cannot be traced .*\(2, 4, 12, 12\).*Check that the model runs"
    ):
        find_groups(nets.TwoBlocks().eval(), torch.randn(2, 4, 12, 12))


def test_a_model_that_only_torch_pruning_cannot_follow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("no size")

    monkeypatch.setattr("torch_pruning.DependencyGraph._trace_computational_graph", broken)
    with pytest.raises(UnsupportedModelError, match=r"no size\. The model runs, but torch-pruning does not understand"):
        found(nets.TwoBlocks(), 12)


def test_a_model_without_layers_has_no_units() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) * self.scale

    assert found(Mean(), 4) == Found((), {})


def test_frozen_models_have_units_too() -> None:
    model = nets.TwoBlocks().requires_grad_(False)
    assert len(found(model, 12).groups) == 4


def test_under_inference_mode() -> None:
    model = nets.TwoBlocks().eval()
    with torch.inference_mode():
        assert len(find_groups(model, torch.randn(2, 3, 12, 12)).groups) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, fingerprint: Fingerprint) -> None:
    model = nets.TwoBlocks().train()
    model.bn.eval()
    model.stem.weight.requires_grad_(False)
    model.fc(torch.randn(2, 10)).sum().backward()
    before = fingerprint(model)
    if fails:
        with pytest.raises(UnsupportedModelError):
            find_groups(model, torch.zeros(2, 4, 12, 12))
    else:
        find_groups(model, nets.example())
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "regnety_002"])
def test_the_same_units_every_time(name: str) -> None:
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {}))
    first, second = found(model), found(model)
    for one, other in zip(first.groups, second.groups, strict=True):
        assert (one.name, one.kind, one.size) == (other.name, other.kind, other.size)
        for m, n in zip(one.members, other.members, strict=True):
            assert m.axis == n.axis
            assert m.channel.equal(n.channel)
            assert m.unit.equal(n.unit)
    assert first.skipped == second.skipped


class Caching(nn.Module):
    """Keeps what it computed from a parameter in eval mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.cache = nn.Parameter(torch.ones(8, 1, 1)), {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale.exp()
        return x * self.cache["scale"]


def test_nothing_is_left_in_the_caches_of_modules() -> None:
    model = nets.layered(Caching(), 8).eval()
    found(model, 12)
    assert model.n.cache == {}


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = nets.layered(Caching(), 8).eval()
    model(nets.example())
    with pytest.raises(ModelError, match=r"Net cannot be copied: RuntimeError: .*caches what it computed"):
        found(model, 12)


def test_what_standardised_weights_read_is_kept_with_the_reason() -> None:
    model = timm.create_model("test_nfnet", num_classes=4)
    images = torch.randn(2, 3, 64, 64)
    offered = find_groups(model, images)
    squeezed = [f"stages.{stage}.0.attn_last.fc1" for stage in range(4)]
    assert [group.name for group in offered.groups] == [*squeezed, "final_conv"]
    assert "standardises its weights" in offered.skipped["stages.0.0.conv2b"]
    assert verify_groups(model, images, offered).groups == offered.groups  # what is kept is not more than it has to be
