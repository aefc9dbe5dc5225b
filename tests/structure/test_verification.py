"""Mask == removal on whole models; the trial finds every wrong coupling, names it and keeps the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cases
import nets
import pytest
import timm
import torch
from torch import Tensor, nn

from jbrprune.criteria.relevance import Relevance
from jbrprune.errors import UnsupportedModelError
from jbrprune.structure import verification
from jbrprune.structure.discovery import Found, find_groups
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.slicing import masked_units, remove_units
from jbrprune.structure.verification import verify_groups

Fingerprint = Callable[[nn.Module], dict[str, Any]]

SMALL_VIT = {"img_size": 32, "depth": 2, "embed_dim": 48}
SMALL_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (12, 16, 20, 24)}
# name, arguments of timm, size of the images, width=True
MODELS: dict[str, tuple[str, dict, int, bool]] = {
    "resnet18": ("resnet18", {"channels": (16, 24, 32, 40)}, 32, False),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32, False),
    "vit, normalised queries, scaled": (
        "vit_tiny_patch16_224",
        SMALL_VIT | {"qk_norm": True, "init_values": 0.1},
        32,
        False,
    ),
    "vit, width": ("vit_tiny_patch16_224", SMALL_VIT, 32, True),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL_VIT, 32, False),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2, "embed_dim": 96}, 28, True),
    "parallel blocks": (
        "vit_tiny_patch16_224",
        SMALL_VIT | {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
        32,
        False,
    ),
    "gated mlp": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, 28, False),
    "mobilenetv2": ("mobilenetv2_035", {}, 32, False),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 32, False),
    "convnext": ("convnext_atto", SMALL_CONVNEXT, 32, False),
    "convnext, width": ("convnext_atto", SMALL_CONVNEXT, 32, True),
    "convnextv2": ("convnextv2_atto", SMALL_CONVNEXT, 32, True),
    "seresnet": ("seresnet18", {"channels": (16, 32, 48, 64)}, 32, False),
    "regnety": ("regnety_002", {}, 32, False),
    "resnext": ("resnext26ts", {}, 32, False),
    "ghostnet": ("ghostnet_050", {}, 32, False),
    "mobilevit": ("mobilevit_xxs", {}, 64, True),
}
LARGE: dict[str, tuple[str, dict, int, bool]] = {
    "resnet50": ("resnet50", {}, 64, False),
    "vit_small": ("vit_small_patch16_224", {"img_size": 64}, 64, False),
    "seresnet50": ("seresnet50", {}, 64, False),
    "regnety_004": ("regnety_004", {}, 64, False),
    "resnext50": ("resnext50_32x4d", {}, 64, False),
    "densenet121": ("densenet121", {}, 64, False),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 64, False),
}


def made(case: str) -> tuple[nn.Module, Tensor, bool]:
    name, options, size, width = (MODELS | LARGE)[case]
    model = timm.create_model(name, num_classes=cases.CLASSES, **options)
    return cases.randomised(model), cases.images(2, size), width


def some(groups: Sequence[Group], keep: float, seed: int = 0, least: int = 1) -> Selection:
    """Random units to remove; a share of ``keep`` stays, ``least`` of them at least."""
    generator = torch.Generator().manual_seed(seed)
    stay = {group.name: max(least, round(keep * group.size)) for group in groups}
    return {g.name: torch.randperm(g.size, generator=generator)[stay[g.name] :].sort().values for g in groups}


@torch.no_grad()
def difference(model: nn.Module, images: Tensor, groups: Sequence[Group], selection: Selection) -> float:
    with masked_units(model, groups, selection):
        expected = model(images)
    smaller = copy.deepcopy(model)
    remove_units(smaller, groups, selection)
    return float((expected - smaller(images)).abs().max() / expected.abs().max())


def differences(case: str) -> list[float]:
    """Where a tenth of the units stays, three, and seven."""
    model, images, width = made(case)
    groups = find_groups(model, images, width=width).groups
    return [difference(model, images, groups, some(groups, keep)) for keep in (0.1, 0.3, 0.7)] if groups else [1.0]


@pytest.mark.parametrize("case", MODELS)
def test_mask_equals_removal(case: str) -> None:
    assert max(differences(case)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_mask_equals_removal_in_large_models(case: str) -> None:
    assert max(differences(case)) < 1e-8


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7])
def test_heads_go_in_both_forms_of_attention(keep: float) -> None:
    model, images, _ = made("vit")
    groups = [g for g in find_groups(model, images).groups if g.kind == "head"]
    selection = some(groups, keep)
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        assert difference(model, images, groups, selection) < 1e-8


def test_a_mask_changes_the_function_and_is_gone_afterwards(fingerprint: Fingerprint) -> None:
    model, images, _ = made("vit")
    groups = find_groups(model, images).groups
    before = fingerprint(model)
    with torch.no_grad():
        whole = model(images)
        with masked_units(model, groups, some(groups, 0.7)):
            assert not torch.allclose(model(images), whole)
        assert torch.equal(model(images), whole)
    assert fingerprint(model) == before


@pytest.mark.parametrize("case", ["resnet18", "vit, width", "regnety", "ghostnet", "convnextv2", "gated mlp"])
def test_the_groups_that_are_left_are_those_of_the_smaller_model(case: str) -> None:
    model, images, width = made(case)
    groups: Sequence[Group] = find_groups(model, images, width=width).groups
    for seed in range(2):
        groups = remove_units(model, groups, some(groups, 0.6, seed, least=2))  # a single unit is not offered
    for left, new in zip(groups, find_groups(model, images, width=width).groups, strict=True):
        assert (left.name, left.size) == (new.name, new.size)
        for member, other in zip(left.members, new.members, strict=True):
            assert member.axis == other.axis
            assert member.channel.equal(other.channel)
            assert member.unit.equal(other.unit)


def test_attributes_of_attention_after_a_removal() -> None:
    model, images, _ = made("vit")
    groups = find_groups(model, images).groups
    remove_units(model, groups, {"blocks.1.attn": torch.tensor([0, 2])})
    attn = model.blocks[1].attn
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale) == (1, 64, 64, 64**-0.5)
    assert (attn.qkv.out_features, attn.proj.in_features) == (192, 64)
    assert model.blocks[0].attn.num_heads == 3


def test_a_new_classifier_fits_the_smaller_model() -> None:
    for case, name in (
        ("vit, width", "patch_embed.proj"),
        ("resnet18", "layer4.0.conv2"),
        ("mobilenetv3", "conv_head"),
    ):
        model, images, width = made(case)
        groups = find_groups(model, images, width=width).groups
        size = next(group.size for group in groups if group.name == name)
        remove_units(model, groups, {name: torch.arange(size // 4)})
        model.reset_classifier(7)
        assert model.double()(images).shape == (2, 7)
        if case == "vit, width":
            assert model.embed_dim == model.num_features == size - size // 4


def test_removing_nothing_changes_nothing() -> None:
    model = cases.randomised(nets.TwoBlocks())
    groups = find_groups(model, nets.example().double()).groups
    before = copy.deepcopy(model.state_dict())
    left = remove_units(model, groups, {})
    assert [g.size for g in left] == [g.size for g in groups]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", nets.CASES)
def test_what_passes_the_trial_is_right_and_the_rest_is_named(name: str) -> None:
    case = nets.CASES[name]
    model = case.make().eval()
    result = verify_groups(model, nets.example(), find_groups(model, nets.example()))
    assert {group.name: group.size for group in result.groups} == case.groups
    assert set(case.refused) <= set(result.skipped)
    model, images = cases.randomised(model), nets.example().double()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        gone = {g.name: int(torch.randint(0, g.size, (), generator=generator)) for g in result.groups}
        selection = {
            g.name: torch.randperm(g.size, generator=generator)[: gone[g.name]].sort().values for g in result.groups
        }
        assert difference(model, images, result.groups, selection) < 1e-8


def wrong(found: Found, name: str) -> Found:
    """The same couplings, but the last member of one group is off by one channel."""

    def shifted(group: Group) -> Group:
        last = group.members[-1]
        return replace(group, members=(*group.members[:-1], replace(last, unit=last.unit.roll(1))))

    return Found(tuple(shifted(group) if group.name == name else group for group in found.groups), found.skipped)


@pytest.mark.parametrize("name", ["stem", "one.conv1", "two.conv1", "two.conv2"])
def test_a_wrong_coupling_is_found_and_the_rest_stays(name: str) -> None:
    model, images = nets.TwoBlocks().eval(), nets.example()
    found = find_groups(model, images)
    result = verify_groups(model, images, wrong(found, name))
    assert [g.name for g in result.groups] == [g.name for g in found.groups if g.name != name]
    assert result.skipped[name].startswith("removal does not equal the mask here: the outputs differ by ")


@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_a_small_scale_or_constant_images_do_not_hide_a_wrong_coupling(value: float) -> None:
    model = nets.TwoBlocks().eval()
    nn.init.constant_(model.two.bn2.weight, value)
    nn.init.constant_(model.two.conv2.weight, value)
    images = torch.zeros(2, 3, 12, 12)
    result = verify_groups(model, images, wrong(find_groups(model, images), "two.conv1"))
    assert "two.conv1" in result.skipped


def test_widths_tied_unknown_to_the_graph_do_not_fit_by_chance() -> None:
    case = nets.CASES["halves to two layers"]
    model = case.make().eval()
    found = find_groups(model, nets.example())
    assert {"a", "a'"} <= {group.name for group in found.groups}
    for seed in range(10):
        assert {group.name for group in verify_groups(model, nets.example(), found, seed=seed).groups} == {"b"}


def _equally_wide(net: nets.Net, x: Tensor) -> Tensor:
    p, q = net.a(x).relu(), net.b(x).relu()  # type: ignore[operator]
    if p.shape != q.shape:
        raise ValueError("branches of other widths")
    return nets.pooled(net, net.c(p) + net.d(q))  # type: ignore[operator]


def test_equal_shares_do_not_hide_that_two_branches_must_be_equally_wide() -> None:
    """Where every second draw takes equally many of both, only all but one here and one there tells."""
    parts = {"a": nets.conv(3, 3), "b": nets.conv(3, 3), "c": nets.conv(3, 5), "d": nets.conv(3, 5)}
    model = nets.Net(_equally_wide, **parts, fc=nets.linear(5)).eval()
    found = find_groups(model, nets.example())
    assert {group.name: group.size for group in found.groups} == {"a": 3, "b": 3, "c": 5}
    for seed in range(8):
        result = verify_groups(model, nets.example(), found, seed=seed)
        assert [group.name for group in result.groups] == ["c"]
        assert "ValueError: branches of other widths" in result.skipped["a"]


def test_an_error_of_the_smaller_model_is_the_reason() -> None:
    model = nets.mapped(lambda x: x * torch.ones(16, 1, 1).to(x)).make().eval()
    result = verify_groups(model, nets.example(), find_groups(model, nets.example()))
    assert "RuntimeError: The size of tensor" in result.skipped["a"]


@pytest.mark.parametrize("name", ["normalised", "products of features"])
def test_nothing_to_remove_is_an_error_that_says_why(name: str) -> None:
    model = nets.CASES[name].make().eval()
    with pytest.raises(
        UnsupportedModelError,
        match=r"Net: nothing can be removed safely: .* Why layers are kept: .*b: ignored on request",
    ):
        verify_groups(
            model,
            nets.example(),
            find_groups(model, nets.example(), ignore=["b"] if name == "normalised" else ["a", "b"]),
        )


def test_what_fails_only_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "find_culprits", lambda groups, failure: {groups[0].name: "for a test"})
    monkeypatch.setattr(verification, "_find_failure", lambda *_, **__: "together")
    model = nets.TwoBlocks().eval()
    with pytest.raises(UnsupportedModelError, match="one by one fails together: together"):
        verify_groups(model, nets.example(), find_groups(model, nets.example()))


def test_culprits_by_halving() -> None:
    groups = [replace(group, name=f"g{i}") for i, group in enumerate([Group("", "channel", 2, ())] * 11)]
    calls = []

    def failure(subset: Sequence[Group]) -> str | None:
        calls.append(len(subset))
        bad = [g.name for g in subset if g.name in ("g3", "g10")]
        return "bad" if bad else None

    assert verification.find_culprits(groups, failure) == {"g3": "bad", "g10": "bad"}
    assert len(calls) < 21  # the ends of what is alike are tried first
    assert verification.find_culprits([], failure) == {}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, fingerprint: Fingerprint) -> None:
    model = nets.TwoBlocks().train()
    model.stem.weight.requires_grad_(False)
    model.fc(torch.randn(2, 10)).sum().backward()
    images = nets.example()
    found = find_groups(model, images)
    before = fingerprint(model)
    if fails:
        with pytest.raises(UnsupportedModelError, match="nothing can be removed"):
            verify_groups(model, torch.zeros(2, 4, 12, 12), found)
    else:
        verify_groups(model, images, found)
    assert fingerprint(model) == before


def test_the_same_trial_every_time() -> None:
    model = nets.CASES["flipped"].make().eval()
    found = find_groups(model, nets.example())
    first, second = (verify_groups(model, nets.example(), found, seed=3) for _ in range(2))
    assert first.skipped == second.skipped


class PositionBias(nn.Module):
    """A network that sees no batch gives a bias to every position: its hidden width could go, but has no relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2)
        self.hidden, self.bias = nn.Linear(2, 7), nn.Linear(7, 8)
        self.mix, self.head = nn.Conv2d(6, 8, 1), nn.Linear(8, 4)
        self.register_buffer("places", torch.rand(9, 2))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(self.hidden(self.places).relu())
        x = self.mix(self.stem(x).relu()).flatten(2).mT + bias
        return self.head(x.relu().mean(1))


def test_groups_without_relevance_are_kept_before_anything_is_scored(fingerprint: Fingerprint) -> None:
    model = PositionBias().eval()
    images = torch.randn(2, 3, 8, 8)
    before = fingerprint(model)
    found = verify_groups(model, images, find_groups(model, images))
    assert fingerprint(model) == before
    assert "hidden: the first dimension (9 rows for 3 images)" in found.skipped["hidden"].replace("bias:", "hidden:")
    scores = Relevance()(model, images, found.groups)
    assert set(scores.sums) == {group.name for group in found.groups} == {"stem", "bias"}


def test_a_model_without_removable_layers_says_so() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
    images = torch.randn(2, 3, 2, 2)
    with pytest.raises(UnsupportedModelError, match=r"passed the trial\. It has no channels that one layer makes"):
        verify_groups(model, images, find_groups(model, images))


def _with_auxiliary_head(net: nets.Net, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    features = net.a(x).relu()  # type: ignore[operator]
    logits = nets.pooled(net, net.b(features).relu())  # type: ignore[operator]
    return (logits, net.aux(features.mean((2, 3)))) if net.training else logits  # type: ignore[operator]


def test_what_is_read_in_training_mode_only_stays(fingerprint: Fingerprint) -> None:
    parts = {"a": nets.conv(3, 6), "b": nets.conv(6, 8), "aux": nets.linear(6), "fc": nets.linear(8)}
    model = nets.Net(_with_auxiliary_head, **parts).eval()
    found, before = find_groups(model, nets.example()), fingerprint(model)
    result = verify_groups(model, nets.example(), found)
    assert [group.name for group in result.groups] == ["b"]
    assert result.skipped["a"].startswith("removal does not equal the mask here: in training mode, RuntimeError")
    assert "aux" not in result.skipped
    assert fingerprint(model) == before


class Detector(nn.Module):
    """In training mode it wants targets, so that it cannot be tried there."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.TwoBlocks()

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets")
        return self.net(x)


def test_an_attribute_that_holds_no_width_is_not_taken_for_one() -> None:
    model = nets.TwoBlocks().eval()
    model.out_features = None  # as of CoaT
    assert verify_groups(model, nets.example(), find_groups(model, nets.example())).groups


def test_a_model_that_does_not_train_by_itself_is_not_tried_in_training_mode() -> None:
    plain, model = nets.TwoBlocks().eval(), Detector().eval()
    expected = [f"net.{group.name}" for group in find_groups(plain, nets.example()).groups]
    found = verify_groups(model, nets.example(), find_groups(model, nets.example()))
    assert [group.name for group in found.groups] == expected


class Narrow(nn.Module):
    """One layer is read on the second kind of images only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nets.conv(3, 6), nets.conv(3, 6), nets.conv(6, 8), nets.linear(8)
        self.other = nets.linear(6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).relu()
        logits = nets.pooled(self, self.c(a).relu())
        return logits + self.other(b.mean((2, 3))) if x.mean() < 0 else logits + b.mean((1, 2, 3))[:, None]


def test_what_only_other_images_read_is_found_with_such_images() -> None:
    model, images = Narrow().eval(), nets.example().abs()
    found = verify_groups(model, [images, -images], find_groups(model, images))
    assert [group.name for group in found.groups] == ["a", "c"]


class Branches(nn.Module):
    """Dark images go one way, light ones another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.pre = nets.conv(3, 6), nets.linear(8), nets.conv(3, 3)
        self.ways = nn.ModuleDict({"dark": nets.conv(6, 8), "light": nets.conv(6, 8)})

    def forward(self, x: Tensor) -> Tensor:
        way = self.ways["light" if x.mean() > 0 else "dark"]
        return nets.pooled(self, way(self.a(self.pre(x)).relu()).relu())


def test_a_module_that_does_not_run_is_named() -> None:
    model, images = Branches().eval(), nets.example().abs()
    found = verify_groups(model, images, find_groups(model, images))
    assert "a" in [group.name for group in found.groups]
    assert found.skipped["ways.dark"].startswith("it ran for none of the images")
    assert "ways.light" not in found.skipped


def test_what_runs_for_some_of_the_images_keeps_its_width_and_so_does_what_it_reads() -> None:
    model, images = Branches().eval(), nets.example().abs()
    found = verify_groups(model, [images, -images], find_groups(model, images))
    assert [group.name for group in found.groups] == ["pre"]
    assert found.skipped["ways.light"] == "ways.light runs for some of the images only"
    assert found.skipped["a"] == "ways.light runs for some of the images only"
    assert "ways.dark" not in found.skipped


class Borrowed(nn.Module):
    """The weight of a layer is used, the layer is never called; another layer is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mix, self.spare = (
            nets.TwoBlocks(),
            nn.Linear(4, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y + nn.functional.linear(y[:, :4], self.mix.weight).mean(1, keepdim=True)


def test_layers_that_lend_their_weights_are_not_idle() -> None:
    model = Borrowed().eval()
    found = verify_groups(model, nets.example(), find_groups(model, nets.example()))
    idle = [name for name, why in found.skipped.items() if "ran for none" in why]
    assert idle == ["spare"]


class Strided(nn.Module):
    """Another module runs where images are small."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.large, self.small = nets.TwoBlocks(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((self.large if x.shape[-1] >= 128 else self.small)(x))


@pytest.mark.parametrize(("model", "size"), [(nets.TwoBlocks, 64), (Strided, 128)])
def test_the_trial_leaves_pixels_out_as_long_as_the_same_modules_run(model: Callable[[], nn.Module], size: int) -> None:
    images, called = verification._leave_pixels_out(model().eval(), torch.zeros(2, 3, 256, 300))
    assert images.shape[2] == size
    assert "" in called


def test_groups_that_are_alike_are_tried_at_both_ends() -> None:
    groups = [Group(f"blocks.{i}.{part}", "channel", 2, ()) for i in range(50) for part in ("a", "b", "c")]
    calls = []

    def failure(subset: Sequence[Group]) -> str | None:
        calls.append(len(subset))
        bad = [g.name for g in subset if g.name.endswith(".b") or g.name == "blocks.7.c"]
        return "bad" if bad else None

    found = verification.find_culprits(groups, failure)
    assert found.keys() == {*(f"blocks.{i}.b" for i in range(50)), "blocks.7.c"}
    assert found["blocks.3.b"].startswith("as in blocks.")
    assert len(calls) < 50


def _frozen_as_in_transformers(model: nn.Module) -> nn.Module:
    class DetrFrozenBatchNorm2d(nn.Module):
        def __init__(self, norm: nn.BatchNorm2d) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, getattr(norm, name).detach().clone())
            self.act = norm.act

        def forward(self, x: Tensor) -> Tensor:
            scale = (self.weight * (self.running_var + 1e-5).rsqrt())[:, None, None]
            return self.act(x * scale + (self.bias - self.running_mean * scale[:, 0, 0])[:, None, None])

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                child.act = getattr(child, "act", nn.Identity())
                setattr(module, name, DetrFrozenBatchNorm2d(child))
    return model


def test_norms_that_run_in_training_only_shrink_with_the_norm_they_are_in() -> None:
    model = timm.layers.convert_splitbn_model(timm.create_model("test_resnet", num_classes=4), 2).eval()
    images = torch.randn(2, 3, 64, 64)
    found = verify_groups(model, images, find_groups(model, images))
    plain = find_groups(timm.create_model("test_resnet", num_classes=4).eval(), images)
    assert [group.name for group in found.groups] == [group.name for group in plain.groups]
    remove_units(model, found.groups, some(found.groups, 0.5))
    assert model.bn1.aux_bn[0].num_features == model.bn1.num_features == model.conv1[-1].out_channels
    assert model.train()(images).shape == (2, 4)


CHANGES = {
    "frozen": timm.layers.freeze_batch_norm_2d,
    "transformers": _frozen_as_in_transformers,
    "blurred": lambda m: m,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_keep_their_channels_in_buffers_can_shrink(change: Callable[[nn.Module], nn.Module]) -> None:
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    model = change(timm.create_model("test_resnet", num_classes=4, aa_layer=timm.layers.BlurPool2d)).eval()
    images = torch.randn(2, 3, 64, 64)
    found = verify_groups(model, images, find_groups(model, images))
    assert [(group.name, group.size) for group in found.groups] == [
        (group.name, group.size) for group in find_groups(plain, images).groups
    ]


class FailsTogether(nn.Module):
    """Removal equals the mask for each of two layers, not for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))
        return logits * (2 if self.a.out_channels < 6 and self.c.out_channels < 6 else 1)


@pytest.mark.parametrize("seed", range(3))
def test_what_halving_does_not_find_is_refused(seed: int) -> None:
    model, images = FailsTogether().eval(), torch.randn(2, 3, 12, 12)
    with pytest.raises(UnsupportedModelError, match="one by one fails together: the outputs differ"):
        verify_groups(model, images, find_groups(model, images), seed=seed)


def test_a_parameter_without_entries_is_no_obstacle() -> None:
    """As DINOv3 of transformers has one."""
    model = nets.TwoBlocks().eval()
    model.register_parameter("none", nn.Parameter(torch.zeros(1, 0, 4)))
    assert verify_groups(model, nets.example(), find_groups(model, nets.example())).groups


class WideAuxiliary(nn.Module):
    """The auxiliary head, in training mode, reads more pixels than there are in a smaller image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head, self.aux = nn.Linear(8, 4), nn.Conv2d(8, 4, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        out = self.head(self.b(x).relu().mean((2, 3)))
        return (out, self.aux(x)) if self.training else out


def test_images_stay_as_large_as_training_needs_them() -> None:
    model, images = WideAuxiliary().eval(), torch.randn(2, 3, 128, 128)
    found = verify_groups(model, images, find_groups(model, images))
    assert [group.name for group in found.groups] == ["b"]
    assert "in training mode" in found.skipped["a"]
