"""Dead channels go, what is left computes the same, and nothing goes that an image could wake."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cases
import nets
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.errors import ModelError
from jbrprune.sparsity.dead_channels import Shrunk, shrink

Fingerprint = Callable[[nn.Module], dict[str, Any]]


def zeroed(*tensors: Tensor) -> None:
    """Zeros in parameters, or in views of them."""
    with torch.no_grad():
        for tensor in tensors:
            assert tensor._is_view() or tensor.is_leaf, "a copy"
            tensor.zero_()


@torch.no_grad()
def shrunk_alike(model: nn.Module, images: Tensor, **options: Any) -> Shrunk:
    """Shrink; the outputs are those of before, also on images that `shrink` has not seen."""
    dense = copy.deepcopy(model)
    result = shrink(model, images, **options)
    other = torch.randn(4, *images.shape[1:], dtype=images.dtype) * 3
    for batch in (images, other, -other):
        expected, got = dense(batch), model(batch)
        assert (expected - got).abs().max() <= 1e-10 * max(1, float(expected.abs().max()))
    return result


def basic() -> nn.Module:
    return cases.randomised(nets.TwoBlocks())


def model_of(name: str, **options: Any) -> nn.Module:
    return cases.randomised(timm.create_model(name, num_classes=cases.CLASSES, **options))


def sparse(model: nn.Module, share: float, seed: int = 0) -> None:
    """Random single weights of convolutions and linear layers become zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) >= share


# --- nobody reads it ------------------------------------------------------------------------------


def test_channels_that_nobody_reads_go() -> None:
    model = basic()
    zeroed(model.one.conv2.weight[:, 1::3], model.two.conv2.weight[:, 0])
    kept = model.one.conv1.weight[[0, 2, 3, 5]].clone()
    result = shrunk_alike(model, cases.images(2))
    assert result.removed == {"one.conv1": 2, "two.conv1": 1}
    assert (model.one.conv1.out_channels, model.two.conv1.out_channels) == (4, 9)
    assert torch.equal(model.one.conv1.weight, kept)
    assert model.one.bn1.num_features == 4


def test_a_residual_channel_goes_if_all_its_readers_ignore_it() -> None:
    model = basic()
    readers = [model.one.conv1.weight, model.two.conv1.weight, model.two.downsample[0].weight]
    zeroed(*(weight[:, 2] for weight in readers[:-1]))
    assert shrunk_alike(copy.deepcopy(model), cases.images(2)).removed == {}
    zeroed(readers[-1][:, 2])
    assert shrunk_alike(model, cases.images(2)).removed == {"stem": 1}
    assert model.one.conv2.out_channels == 5


def test_one_removal_makes_others_possible() -> None:
    """c2 alone reads a's channel 3 and b's channel 1 reads only that: backwards; and forwards from a dead row."""
    a, b, c, fc = nets.conv(3, 6), nets.conv(6, 5), nets.conv(5, 4), nets.linear(4)
    zeroed(fc.weight[:, 2])  # c 2 is not read
    zeroed(*(c.weight[o, 1] for o in (0, 1, 3)))  # b 1 is read by c 2 only
    zeroed(*(b.weight[o, 3] for o in (0, 2, 3, 4)))  # a 3 is read by b 1 only
    zeroed(a.weight[0], a.bias[:1])  # a 0 sends nothing
    zeroed(*(b.weight[4, i] for i in range(1, 6)), b.bias[4:])  # b 4 reads a 0 only
    model = nets.Net(lambda s, x: nets.pooled(s, s.c(s.b(s.a(x).relu()).relu()).relu()), a=a, b=b, c=c, fc=fc)
    result = shrunk_alike(model.double().eval(), nets.example().double())
    assert result.removed == {"a": 2, "b": 2, "c": 1}
    assert [layer.out_channels for layer in (model.a, model.b, model.c)] == [4, 3, 3]


def test_nothing_dead_nothing_removed(fingerprint: Fingerprint) -> None:
    model = basic()
    model.train()
    before = fingerprint(model)
    result = shrink(model, cases.images(2))
    assert fingerprint(model) == before
    assert (result.removed, result.notes) == ({}, ())


def test_a_layer_keeps_one_unit() -> None:
    model = basic()
    zeroed(model.one.conv2.weight)
    result = shrunk_alike(model, cases.images(2))
    assert result.removed == {"one.conv1": 5}
    assert any(note.startswith("one.conv1: ") for note in result.notes)


def test_ignored_layers_stay() -> None:
    model = basic()
    zeroed(model.one.conv2.weight[:, 1], model.two.conv2.weight[:, 1])
    result = shrunk_alike(model, cases.images(2), ignore=["one"])
    assert result.removed == {"two.conv1": 1}


# --- it sends nothing -----------------------------------------------------------------------------


def silent(model: nn.Module, channel: int, shift: float) -> None:
    """one.conv1 sends nothing in a channel, and the batch norm makes a constant of it."""
    zeroed(model.one.conv1.weight[channel], model.one.bn1.running_mean[channel])
    with torch.no_grad():
        model.one.bn1.bias[channel] = shift


@pytest.mark.parametrize(("shift", "removed"), [(0.0, 1), (-0.3, 1), (0.3, 0)])
def test_a_constant_goes_only_if_it_is_zero(shift: float, removed: int) -> None:
    model = basic()
    silent(model, 3, shift)
    result = shrunk_alike(model, cases.images(2))
    assert result.removed.get("one.conv1", 0) == removed


def test_a_channel_that_is_dark_on_the_example_only_stays() -> None:
    model = basic()
    with torch.no_grad():
        model.one.bn1.bias[3] = -1e3
    images = cases.images(2)
    assert model.one.act1(model.one.bn1(model.one.conv1(F.relu(model.bn(model.stem(images))))))[:, 3].max() == 0
    result = shrunk_alike(model, images)
    assert result.removed == {}


@pytest.mark.parametrize("relu", [F.relu, lambda x: torch.where(x > 0, x, 0)], ids=["relu", "where"])
def test_what_an_image_adds_to_all_channels_wakes_a_dead_one(relu: Callable[[Tensor], Tensor]) -> None:
    """a 2 sends nothing and is dark on the example, but the mean of the image is added behind it."""
    model = nets.Net(
        lambda s, x: nets.pooled(s, s.b(relu(s.a(x) + x[..., 2:, 2:].mean(1, keepdim=True)))),
        a=nets.conv(3, 6),
        b=nets.conv(6, 5),
        fc=nets.linear(5),
    )
    model.double().eval()
    zeroed(model.a.weight[2], model.a.bias[2])
    example = -nets.example().double().abs()
    assert relu(model.a(example) + example[..., 2:, 2:].mean(1, keepdim=True))[:, 2].max() == 0
    assert "a" not in shrunk_alike(model, example).removed


def test_what_only_the_example_shows_counts() -> None:
    """NaN and noise do not pass this threshold, but the example does."""
    model = nets.Net(
        lambda s, x: nets.pooled(s, s.b((y := s.a(x) + x.mean(1, keepdim=True)).where(y > 100, 0))),
        a=nets.conv(3, 6, padding=1),
        b=nets.conv(6, 5),
        fc=nets.linear(5),
    )
    zeroed(model.a.weight[2], model.a.bias[2])
    example = nets.example().double() * 1000
    assert "a" not in shrunk_alike(model.double().eval(), example).removed


@pytest.mark.parametrize("dead", ["a", "b", "ab"])
def test_every_call_of_a_shared_layer_counts(dead: str) -> None:
    model = nets.CASES["called in two branches"].make().double().eval()
    for name in dead:
        layer = model.get_submodule(name)
        zeroed(layer.weight[2], layer.bias[2])
    assert shrunk_alike(model, nets.example().double()).removed == ({"a": 1} if dead == "ab" else {})


def residual(dead: list[str]) -> nn.Module:
    model = basic()
    convs = {"stem": (model.stem, model.bn), "branch": (model.one.conv2, model.one.bn2)}
    for name in dead:
        conv, norm = convs[name]
        zeroed(conv.weight[4], norm.running_mean[4], norm.bias[4])
    return model


def test_a_residual_channel_goes_if_all_that_is_added_is_zero() -> None:
    assert shrunk_alike(residual(["stem"]), cases.images(2)).removed == {}
    assert shrunk_alike(residual(["branch"]), cases.images(2)).removed == {}
    assert shrunk_alike(residual(["stem", "branch"]), cases.images(2)).removed == {"stem": 1}


# --- depthwise, grouped, squeeze and excite, attention --------------------------------------------


def depthwise() -> nn.Module:
    model = cases.randomised(
        nets.Net(
            lambda s, x: nets.pooled(s, s.b(F.relu(s.m(s.d(F.relu(s.n(s.a(x)))))))),
            a=nets.conv(3, 8, bias=False),
            n=nn.BatchNorm2d(8),
            d=nets.conv(8, 8, groups=8, padding=1, bias=False),
            m=nn.BatchNorm2d(8),
            b=nets.conv(8, 5, 1),
            fc=nets.linear(5),
        )
    )
    for norm in (model.n, model.m):
        zeroed(norm.running_mean, norm.bias)
    return model


def test_a_depthwise_channel_goes_with_either_dead_filter() -> None:
    model = depthwise()
    zeroed(model.a.weight[1], model.d.weight[6])
    result = shrunk_alike(model, nets.example().double())
    assert result.removed == {"a": 2}
    assert model.d.groups == model.d.in_channels == model.d.out_channels == 6


def test_a_constant_through_a_live_depthwise_filter_depends_on_the_size() -> None:
    """With one position, only the middle of the filter is seen: zero there, and not on larger images."""
    model = depthwise()
    zeroed(model.a.weight[1])
    with torch.no_grad():
        model.n.bias[1], model.m.weight[1] = 1.0, 1.0
        model.d.weight[1] = 1.0
        model.d.weight[1, 0, 1, 1] = -1.0
    small, large = (torch.randn(2, 3, size, size).double() for size in (3, 9))
    dark = F.relu(model.m(model.d(F.relu(model.n(model.a(small))))))[:, 1]
    assert dark.max() == 0
    expected = model(large)
    result = shrunk_alike(model, small)
    assert result.removed == {}
    assert torch.equal(model(large), expected)


def test_a_constant_behind_a_depthwise_filter_stays() -> None:
    model = depthwise()
    zeroed(model.d.weight[6])
    with torch.no_grad():
        model.m.bias[6] = 0.5
    result = shrunk_alike(model, nets.example().double())
    assert result.removed == {}


def test_whole_groups_of_a_grouped_convolution_go() -> None:
    model = nets.layered(nets.conv(24, 12, groups=6), 24, 12).double().eval()
    zeroed(model.b.weight[:, 4:6])  # nobody reads group 2
    zeroed(model.b.weight[:, 6])  # half of group 3
    zeroed(model.n.weight[0:2], model.n.bias[0:2])  # group 0 sends nothing, whatever it is sent
    result = shrunk_alike(model, nets.example().double())
    assert result.removed == {"a": 2}
    assert (model.n.groups, model.n.in_channels, model.n.out_channels) == (4, 16, 8)


@pytest.mark.parametrize(
    ("transposed", "grouped"), [(False, False), (True, False), (True, True)], ids=["conv", "transposed", "both"]
)
def test_rows_and_columns_of_all_convolutions(transposed: bool, grouped: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 12, 2, 2, groups=2 if grouped else 1)
    model = nets.layered(layer, 8, 12).double().eval()
    if not grouped:
        zeroed(layer.weight[5] if transposed else layer.weight[:, 5])  # a 5 is not read
        zeroed(layer.weight[:, 7] if transposed else layer.weight[7], layer.bias[7])  # n 7 sends nothing
        expected = {"a": 1, "n": 1}
    else:
        zeroed(layer.weight[4:], layer.bias[6:])  # the second group
        expected = {"a": 1}
    assert shrunk_alike(model, nets.example().double()).removed == expected


def test_squeeze_and_excite_reads_and_scales() -> None:
    model = model_of("mobilenetv3_small_100")
    block = model.blocks[2][0]
    zeroed(block.conv_pwl.weight[:, 3], block.conv_pwl.weight[:, 9])
    zeroed(block.se.conv_reduce.weight[:, 3])  # 9 is read by the gate still
    zeroed(block.se.conv_expand.weight[:, 1])  # a channel inside of the gate
    result = shrunk_alike(model, cases.images(2, 64))
    assert result.removed == {"blocks.2.0.conv_pw": 1, "blocks.2.0.se.conv_reduce": 1}


def test_what_a_dead_gate_lets_through_goes() -> None:
    """sigmoid(0) is no zero, but half of nothing is; a dead gate before a live channel keeps it."""
    model = model_of("seresnet18")
    block = model.layer1[0]
    zeroed(block.conv1.weight[5], block.bn1.running_mean[5])
    with torch.no_grad():
        block.bn1.bias[5] = -1.0
    zeroed(block.se.fc2.weight[7])
    assert shrunk_alike(model, cases.images(2, 64)).removed == {"layer1.0.conv1": 1}


def vit() -> nn.Module:
    return model_of("vit_tiny_patch16_224", img_size=32, depth=2)


def test_heads_and_hidden_units_of_a_transformer() -> None:
    model = vit()
    one, two = model.blocks
    zeroed(one.attn.proj.weight[:, 64:128])  # nobody reads head 1
    zeroed(one.mlp.fc2.weight[:, 5:7], one.mlp.fc2.weight[:, 700])
    rows = torch.cat([torch.arange(64) + 192 * part for part in range(3)])
    for parameter in (two.attn.qkv.weight, two.attn.qkv.bias):
        parameter.data[rows] = 0  # head 0 sends nothing
    two.mlp.fc1.weight.data[[1, 2]] = 0
    two.mlp.fc1.bias.data[1] = 0  # GELU(0) = 0; the other one is constant
    result = shrunk_alike(model, cases.images(2, 32))
    expected = {"blocks.0.attn": 1, "blocks.0.mlp.fc1": 3, "blocks.1.attn": 1, "blocks.1.mlp.fc1": 1}
    assert result.removed == expected
    assert (one.attn.num_heads, two.attn.num_heads) == (2, 2)


def test_a_head_of_constant_values_stays() -> None:
    model = vit()
    attention = model.blocks[1].attn
    rows = torch.cat([torch.arange(64) + 192 * part for part in range(3)])
    attention.qkv.weight.data[rows] = 0
    result = shrunk_alike(model, cases.images(2, 32))
    assert result.removed == {}


def test_the_stream_under_layer_norms_stays() -> None:
    model = vit()
    for block in model.blocks:
        zeroed(block.attn.qkv.weight[:, 3], block.mlp.fc1.weight[:, 3])
    zeroed(model.head.weight[:, 3])
    result = shrunk_alike(model, cases.images(2, 32))
    assert result.removed == {}


def test_response_normalisation_compares_with_channels_that_nobody_reads() -> None:
    model = model_of("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    zeroed(model.get_submodule("stages.0.blocks.0.mlp.fc2").weight[:, 3])
    result = shrunk_alike(model, cases.images(2, 64))
    assert result.removed == {}


# --- the outputs never change ---------------------------------------------------------------------

SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "two blocks": (basic, 8),
    "depthwise": (depthwise, 9),
    "resnet10t": (lambda: model_of("resnet10t"), 64),
    "mobilenetv3": (lambda: model_of("mobilenetv3_small_050"), 64),
    "vit": (vit, 32),
}


@pytest.mark.parametrize("share", [0.9, 0.98])
@pytest.mark.parametrize("case", SMALL)
def test_random_zeros(case: str, share: float) -> None:
    make, size = SMALL[case]
    model = make()
    sparse(model, share)
    before = sum(parameter.numel() for parameter in model.parameters())
    removed = shrunk_alike(model, cases.images(2, size)).removed
    assert bool(removed) == (sum(parameter.numel() for parameter in model.parameters()) < before)
    if case in ("two blocks", "mobilenetv3") and share == 0.98:
        assert removed


@pytest.mark.parametrize("case", nets.CASES)
def test_random_zeros_in_odd_nets(case: str) -> None:
    model = nets.CASES[case].make().double().eval()
    sparse(model, 0.9)
    removed = shrunk_alike(model, nets.example().double()).removed
    assert set(removed) <= set(nets.CASES[case].groups)


def test_a_second_time_there_is_nothing_left() -> None:
    model = basic()
    sparse(model, 0.95)
    assert shrink(model, cases.images(2)).removed
    assert shrink(model, cases.images(2)).removed == {}


# --- masks and arguments --------------------------------------------------------------------------


def test_masks_are_cut_as_their_parameters_are() -> None:
    """The mask is told from the weight: a kept weight of 0.0 stays one."""
    model = basic()
    generator = torch.Generator().manual_seed(3)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    masks = {n: torch.rand(model.get_parameter(n).shape, generator=generator) > 0.2 for n in names}
    masks["one.conv2.weight"][:, [1, 4]] = False
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    model.get_parameter("one.conv1.weight").data[0, 0] = 0.0  # zeros, whether masked or not
    result = shrunk_alike(model, cases.images(2), masks=masks)
    assert result.removed["one.conv1"] == 2
    stay = torch.tensor([0, 2, 3, 5])
    assert torch.equal(result.masks["one.conv1.weight"], masks["one.conv1.weight"][stay])
    assert torch.equal(result.masks["one.conv2.weight"], masks["one.conv2.weight"][:, stay])
    assert torch.equal(result.masks["fc.weight"], masks["fc.weight"])
    assert masks["one.conv1.weight"].shape[0] == 6
    assert set(result.masks) == set(masks)


def test_masks_of_heads() -> None:
    model = vit()
    zeroed(model.blocks[0].attn.proj.weight[:, 64:128])
    mask = torch.rand(576, 192, generator=torch.Generator().manual_seed(0)) > 0.5
    result = shrunk_alike(model, cases.images(2, 32), masks={"blocks.0.attn.qkv.weight": mask})
    expected = torch.cat([part[[*range(64), *range(128, 192)]] for part in mask.split(192)])
    assert torch.equal(result.masks["blocks.0.attn.qkv.weight"], expected)


def test_a_masked_model_is_refused() -> None:
    model = basic()
    torch.nn.utils.prune.l1_unstructured(model.fc, "weight", amount=0.5)
    with pytest.raises(ModelError, match=r"fc\.weight"):
        shrink(model, cases.images(2))


def test_a_net_in_which_nothing_can_go_is_left_alone(fingerprint: Fingerprint) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().eval()
    zeroed(model[1].weight)
    masks, images = {"1.weight": torch.zeros(2, 12).bool()}, cases.images(2, 2)
    before = fingerprint(model)
    result = shrink(model, images, masks=masks)
    assert fingerprint(model) == before
    assert result.removed == {}
    assert "nothing can be removed safely" in result.notes[0]
    assert torch.equal(result.masks["1.weight"], masks["1.weight"])


def test_the_mode_and_the_random_state_stay(fingerprint: Fingerprint) -> None:
    model = basic()
    model.train()
    zeroed(model.one.conv2.weight[:, 1])
    state = torch.get_rng_state()
    assert shrink(model, cases.images(2)).removed == {"one.conv1": 1}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(any(hooks) for hooks in fingerprint(model)["hooks"].values())
