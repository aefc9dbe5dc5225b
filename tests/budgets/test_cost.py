"""MACs against numbers by hand; the price of a plan against the model that is really smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nets
import pytest
import timm
import torch
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor, nn

from jbrprune.budgets.cost import (
    CostModel,
    Term,
    channel_terms,
    cost_model,
    count_macs,
    find_uncounted,
    parameter_terms,
    recurrent_flops,
)
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Member
from jbrprune.structure.slicing import remove_units

Fingerprint = Callable[[nn.Module], dict[str, Any]]

MODELS: dict[str, tuple[str, dict, bool]] = {
    "resnet": ("resnet18", {}, False),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48}, False),
    "vit, width": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "init_values": 0.1}, True),
    "efficientnet": ("efficientnet_lite0", {}, False),
    "regnety": ("regnety_002", {}, False),
    "convnextv2": ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (12, 16, 20, 24)}, True),
    "densenet": ("densenet121", {"growth_rate": 4, "block_config": (2, 2)}, False),
    "ghostnet": ("ghostnet_050", {}, False),
}


def macs_of(model: nn.Module, images: Tensor) -> int:
    return sum(count_macs(model, images).values())


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def made(case: str) -> tuple[nn.Module, Tensor, tuple[Group, ...]]:
    if case in nets.CASES:
        model, images, width = nets.CASES[case].make().eval(), nets.example(), False
    else:
        name, options, width = MODELS[case]
        model, images = timm.create_model(name, num_classes=4, **options).eval(), torch.randn(2, 3, 32, 32)
    return model, images, find_groups(model, images, width=width).groups


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(5, 7), (1, 4, 5), 4 * 5 * 7),
        (nn.Conv2d(3, 4, (2, 3)), (1, 3, 6, 6), 3 * 4 * 6 * 5 * 4),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (1, 3, 6, 6), 3 * 4 * 9 * 9),
        (nn.Conv2d(6, 4, 3, groups=2), (1, 6, 5, 5), 3 * 4 * 9 * 9),
        (nn.Conv2d(6, 12, 3, groups=6), (1, 6, 5, 5), 12 * 9 * 9),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), (1, 3, 5, 5), 3 * 4 * 4 * 25),
        (nn.BatchNorm2d(3), (1, 3, 5, 5), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_macs_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert macs_of(layer.eval(), torch.randn(shape)) == macs


def test_macs_are_of_one_image() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert count_macs(net, torch.zeros(5, 3, 2, 2)) == {"": 0, "0": 48}


def attention_by_hand(tokens: int, heads: int, head_dim: int) -> int:
    return 2 * heads * tokens * tokens * head_dim


@pytest.mark.parametrize("fused", [True, False])
def test_macs_of_attention_by_hand(fused: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=3, num_classes=4)
    model.blocks[0].attn.fused_attn = fused
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == {
        "": 0,
        "patch_embed.proj": 4 * 24 * 3 * 256,
        "blocks.0.attn": attention_by_hand(5, 3, 8),
        "blocks.0.attn.qkv": 5 * 24 * 72,
        "blocks.0.attn.proj": 5 * 24 * 24,
        "blocks.0.mlp.fc1": 5 * 24 * 96,
        "blocks.0.mlp.fc2": 5 * 96 * 24,
        "head": 24 * 4,
    }


@pytest.mark.parametrize("frozen", [True, False])
def test_fast_paths_of_torch_are_counted(frozen: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(not frozen)
    macs = count_macs(layer, torch.randn(2, 5, 8))
    assert sum(macs.values()) == 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + attention_by_hand(5, 2, 4)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("name", "gmacs"), [("resnet50", 4.089), ("deit_tiny_patch16_224", 1.254)])
def test_macs_of_whole_models(name: str, gmacs: float) -> None:
    model = timm.create_model(name).eval()
    assert macs_of(model, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=6e-4)


def test_modules_in_lists_shared_modules_and_functions_are_counted() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])
            self.again = self.layers[0]
            self.weight = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.again(self.layers[0](x))) @ self.weight

    assert count_macs(Odd(), torch.zeros(1, 4)) == {"": 12, "layers.0": 32, "layers.1": 24}


@pytest.mark.parametrize(
    "case",
    [
        *MODELS,
        "grouped",
        "depthwise, three outputs each",
        "flattened",
        "halves added",
        "dense",
        "prelu",
        "bare scale",
        "called in two branches",
        "transposed",
    ],
)
def test_the_price_of_a_plan_is_the_cost_of_the_smaller_model(case: str) -> None:
    model, images, groups = made(case)
    generator = torch.Generator().manual_seed(5)
    macs, parameters = (cost_model(kind, model, images, groups) for kind in ("macs", "params"))
    assert (macs.total, parameters.total) == (macs_of(model, images), parameters_of(model))
    smaller, left, struck = copy.deepcopy(model), groups, {}
    for _ in range(2):
        selection = {g.name: torch.arange(int(torch.randint(0, g.size, (), generator=generator))) for g in left}
        for name, units in selection.items():
            for cost in (macs, parameters):
                cost.remove(name, len(units))
            struck[name] = struck.get(name, 0) + len(units)
        left = remove_units(smaller, left, selection)
        assert macs.total == pytest.approx(macs_of(smaller, images), rel=1e-12)
        assert parameters.total == pytest.approx(parameters_of(smaller), rel=1e-12)
    assert sum(struck.values())


def test_savings_are_those_of_one_unit_now() -> None:
    model, images, groups = made("vit, width")
    cost = cost_model("macs", model, images, groups)
    for group in groups:
        before, saved = cost.total, cost.saving(group.name)
        assert cost.total == before
        smaller = copy.deepcopy(model)
        remove_units(smaller, groups, {group.name: torch.tensor([1])})
        assert saved == pytest.approx(before - macs_of(smaller, images), rel=1e-9)
    whole = cost.saving("blocks.0.mlp.fc1")
    cost.remove("patch_embed.proj", 24)  # half of the width
    assert cost.saving("blocks.0.mlp.fc1") == pytest.approx(whole / 2)


@pytest.mark.parametrize("kind", ["latency", "latency_ms"])
def test_time_is_priced_by_macs(kind: str) -> None:
    model, images, groups = made("resnet")
    time, macs = (cost_model(name, model, images, groups) for name in (kind, "macs"))
    assert time.total == macs.total == macs_of(model, images)
    assert [time.saving(g.name) for g in groups] == [macs.saving(g.name) for g in groups]


def test_removing_and_putting_back_is_the_identity() -> None:
    model, images, groups = made("resnet")
    cost = cost_model("macs", model, images, groups)
    before = cost.total
    for step in (7, -7):
        for group in groups:
            cost.remove(group.name, step)
    assert cost.total == pytest.approx(before, rel=1e-13)


def test_channels_are_counted_where_a_group_has_its_name() -> None:
    model, _, groups = made("flattened")  # nine columns of the linear layer go with one channel
    cost = cost_model("channels", model, nets.example(), groups)
    assert (cost.total, cost.saving("a")) == (8, 1)
    model, _, groups = made("halves added")  # two channels go together
    cost = cost_model("channels", model, nets.example(), groups)
    assert (cost.total, cost.saving("a"), cost.saving("b")) == (16 + 12, 2, 1)


def test_channels_of_a_layer_that_only_partly_belongs_to_units() -> None:
    index = torch.arange(4)
    groups = [
        Group(name, "channel", 4, (Member(("a", "out", 0), index + offset, index),))
        for name, offset in (("a", 0), ("a'", 8))
    ]
    cost = CostModel(channel_terms(groups), groups, {("a", "out", 0): 16})
    cost.remove("a", 3)
    assert cost.total == 5


def test_a_shared_parameter_counts_once() -> None:
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    assert sum(term.amount for term in parameter_terms(nn.Sequential(one, two))) == 16


def test_parameters_that_are_no_weights_of_a_mixing_layer_go_with_its_outputs() -> None:
    layer = ScaledStdConv2d(4, 6, 3)
    terms = {term.amount: term.axes for term in parameter_terms(nn.Sequential(layer))}
    assert terms[6 * 4 * 9] == (("0", "out", 0), ("0", "in", 0))
    assert terms[6] == (("0", "out", 0),)  # bias and gain


def test_terms_of_axes_that_nobody_owns_are_constant() -> None:
    cost = CostModel([Term(10.0, (("x", "out", 0), ("y", "in", 0)))], [], {})
    assert cost.total == 10


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, fingerprint: Fingerprint) -> None:
    model = nets.TwoBlocks().train()
    model.fc(torch.randn(2, 10)).sum().backward()
    before = fingerprint(model)
    if fails:
        with pytest.raises(RuntimeError):
            count_macs(model, torch.zeros(1, 4, 12, 12))
    else:
        count_macs(model, torch.zeros(1, 3, 12, 12))
    assert fingerprint(model) == before


# --- what torch has no formula for ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [True, False])
def test_recurrent_layers_are_counted(kind: type[nn.RNNBase], first: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(6, 5, num_layers=2, bidirectional=True, batch_first=first)

        def forward(self, x: Tensor) -> Tensor:  # [1, 3, 7, 6]: a sequence of 21 vectors
            x = x.flatten(1, 2)
            return self.rnn(x if first else x.transpose(0, 1))[0].sum((0, 1))[None]

    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    by_hand = 21 * 2 * gates * 5 * ((6 + 5) + (2 * 5 + 5))
    assert sum(count_macs(Reader(), torch.randn(1, 3, 7, 6)).values()) == by_hand
    assert find_uncounted(Reader(), torch.randn(1, 3, 7, 6)) == {}


def test_recurrent_layers_on_an_accelerator_are_counted_from_the_list_of_weights() -> None:
    shapes = [[20, 6], [20, 5], [20], [20]]
    assert recurrent_flops([7, 1, 6], shapes, 4) == 2 * 7 * 20 * (6 + 5)


def test_deformable_convolutions_are_counted_as_plain_ones() -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset, self.conv = nn.Conv2d(4, 18, 3, padding=1), ops.DeformConv2d(4, 6, 3, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x, self.offset(x)).mean((2, 3))

    macs = count_macs(Net(), torch.randn(2, 4, 5, 5))
    assert macs["conv"] == 25 * 6 * (4 // 2) * 9
    assert macs["offset"] == 25 * 18 * 4 * 9
    assert find_uncounted(Net(), torch.randn(2, 4, 5, 5)) == {}


def test_operators_of_unknown_cost_are_named_with_the_module_that_calls_them() -> None:
    @torch.library.custom_op("jbrprune_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(double(x)).abs()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Doubled(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    found = find_uncounted(model, torch.randn(2, 3, 5, 5))
    assert found == {"jbrprune_test.double": "1", "aten._fft_r2c": "1"}


def test_shares_of_what_is_left_add_up() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False))
    model = cost_model("params", net, torch.zeros(1, 4), [])
    assert model.shares() == pytest.approx({"0": 30 / 42, "1": 12 / 42})
