"""Removing channels: mask == removal, attributes, order, sharing, and calls that must change nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

import pytest
import timm.layers
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from jbrprune.errors import ModelError
from jbrprune.models.layers import refresh
from jbrprune.structure.groups import Axis
from jbrprune.structure.slicing import masked, remove_channels

KEEPS = (0.1, 0.3, 0.7)
Gone = Mapping[Axis, Tensor]
Case = tuple[nn.Module, Tensor, Gone]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def _some(width: int, keep: float, seed: int = 0) -> Tensor:
    """Random channels to remove, ascending; at least one stays and one goes."""
    stays = min(max(1, round(width * keep)), width - 1)
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))[stays:].sort().values


def _expanded(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()


def _seq(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class _Residual(nn.Module):
    """Two producers of one sum, a bare scale on it, one consumer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.branch = nn.Conv2d(width, width, 3, padding=1)
        self.gamma = nn.Parameter(torch.randn(width))
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.bn(x + self.gamma[:, None, None] * self.branch(x)))


class _Concat(nn.Module):
    """Two producers side by side."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, left, 3)
        self.right = nn.Conv2d(3, right, 3)
        self.head = nn.Conv2d(left + right, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1).relu())


def _plain(keep: float) -> Case:
    net = _seq(a=nn.Conv2d(3, 20, 3), bn=nn.BatchNorm2d(20), act=nn.ReLU(), b=nn.Conv2d(20, 5, 3))
    gone = _some(20, keep)
    return net, torch.randn(2, 3, 9, 9), {("a", "out", 0): gone, ("bn", "out", 0): gone, ("b", "in", 0): gone}


def _residual(keep: float) -> Case:
    gone = _some(20, keep)
    outs: dict[Axis, Tensor] = {(name, "out", 0): gone for name in ("stem", "branch", "bn")}
    ins: dict[Axis, Tensor] = {(name, "in", 0): gone for name in ("branch", "head")}
    gamma: Gone = {("gamma", "param", 0): gone}
    return _Residual(20), torch.randn(2, 3, 7, 7), {**outs, **ins, **gamma}


def _grouped(keep: float) -> Case:
    """4 channels in and 6 out for each of ten groups."""
    net = _seq(a=nn.Conv2d(3, 40, 1), g=nn.Conv2d(40, 60, 3, groups=10), act=nn.GELU(), b=nn.Conv2d(60, 5, 1))
    groups = _some(10, keep)
    into, out = _expanded(groups, 4), _expanded(groups, 6)
    axes: Gone = {("a", "out", 0): into, ("g", "in", 0): into, ("g", "out", 0): out, ("b", "in", 0): out}
    return net, torch.randn(2, 3, 6, 6), axes


def _depthwise(keep: float) -> Case:
    """Three outputs per input."""
    net = _seq(a=nn.Conv2d(3, 10, 1), d=nn.Conv2d(10, 30, 3, groups=10), act=nn.SiLU(), b=nn.Conv2d(30, 5, 1))
    into = _some(10, keep)
    out = _expanded(into, 3)
    return net, torch.randn(2, 3, 6, 6), {("a", "out", 0): into, ("d", "out", 0): out, ("b", "in", 0): out}


def _transposed(keep: float) -> Case:
    net = _seq(
        a=nn.ConvTranspose2d(3, 20, 2, stride=2),
        bn=nn.BatchNorm2d(20),
        b=nn.ConvTranspose2d(20, 5, 3),
    )
    gone = _some(20, keep)
    return net, torch.randn(2, 3, 4, 4), {("a", "out", 0): gone, ("bn", "out", 0): gone, ("b", "in", 0): gone}


def _transposed_groups(keep: float) -> Case:
    net = _seq(a=nn.Conv2d(3, 30, 1), t=nn.ConvTranspose2d(30, 20, 3, groups=10), b=nn.Conv2d(20, 5, 1))
    groups = _some(10, keep)
    into, out = _expanded(groups, 3), _expanded(groups, 2)
    return net, torch.randn(2, 3, 4, 4), {("a", "out", 0): into, ("t", "out", 0): out, ("b", "in", 0): out}


def _tokens(norm: Callable[[int], nn.Module], width: int, keep: float) -> Case:
    net = _seq(a=nn.Linear(6, width), norm=norm(width), act=nn.GELU(), b=nn.Linear(width, 4))
    gone = _some(width, keep)
    return net, torch.randn(2, 5, 6), {("a", "out", 0): gone, ("norm", "out", 0): gone, ("b", "in", 0): gone}


def _images(norm: Callable[[int], nn.Module], width: int, keep: float, size: int = 1) -> Case:
    net = _seq(a=nn.Conv2d(3, width, 3), norm=norm(width), b=nn.Conv2d(width, 4, 1))
    gone = _expanded(_some(width // size, keep), size)
    return net, torch.randn(2, 3, 6, 6), {("a", "out", 0): gone, ("norm", "out", 0): gone, ("b", "in", 0): gone}


def _images_last(norm: Callable[[int], nn.Module], width: int, keep: float) -> Case:
    """``[B, H, W, C]``."""
    net, _, gone = _tokens(norm, width, keep)
    return net, torch.randn(2, 5, 5, 6), gone


def _flattened(keep: float) -> Case:
    """Nine inputs of the linear layer belong to each channel."""
    net = _seq(a=nn.Conv2d(3, 20, 3), act=nn.ReLU(), flat=nn.Flatten(), b=nn.Linear(180, 5))
    gone = _some(20, keep)
    return net, torch.randn(2, 3, 5, 5), {("a", "out", 0): gone, ("b", "in", 0): _expanded(gone, 9)}


def _concatenated(keep: float) -> Case:
    left, right = _some(10, keep), _some(20, keep, seed=1)
    axes: Gone = {
        ("left", "out", 0): left,
        ("right", "out", 0): right,
        ("head", "in", 0): torch.cat([left, right + 10]),
    }
    return _Concat(10, 20), torch.randn(2, 3, 5, 5), axes


CASES: dict[str, Callable[[float], Case]] = {
    "plain": _plain,
    "residual": _residual,
    "grouped": _grouped,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "transposed_groups": _transposed_groups,
    "layernorm": lambda keep: _tokens(nn.LayerNorm, 384, keep),
    "layernorm_plain": lambda keep: _tokens(lambda n: nn.LayerNorm(n, elementwise_affine=False), 20, keep),
    "layernorm_of_two_dimensions": lambda keep: _tokens(lambda n: nn.LayerNorm([5, n]), 20, keep),
    "rmsnorm": lambda keep: _tokens(nn.RMSNorm, 20, keep),
    "timm_rmsnorm": lambda keep: _tokens(timm.layers.RmsNorm, 20, keep),
    "timm_simplenorm": lambda keep: _tokens(timm.layers.SimpleNorm, 20, keep),
    "layer_scale": lambda keep: _tokens(timm.layers.LayerScale, 20, keep),
    "layernorm2d": lambda keep: _images(timm.layers.LayerNorm2d, 20, keep),
    "simplenorm2d": lambda keep: _images(timm.layers.SimpleNorm2dFp32, 20, keep),
    "batchnorm_act": lambda keep: _images(timm.layers.BatchNormAct2d, 20, keep),
    "frozen_batchnorm_act": lambda keep: _images(FrozenBatchNormAct2d, 20, keep),
    "groupnorm": lambda keep: _images(lambda n: nn.GroupNorm(10, n), 40, keep, size=4),
    "groupnorm1": lambda keep: _images(lambda n: nn.GroupNorm(1, n), 20, keep),
    "response_norm_of_tokens": lambda keep: _images_last(GlobalResponseNorm, 20, keep),
    "response_norm": lambda keep: _images(lambda n: GlobalResponseNorm(n, channels_last=False), 20, keep),
    "blur": lambda keep: _images(timm.layers.BlurPool2d, 20, keep),
    "flattened": _flattened,
    "concat": _concatenated,
}


def _randomised(net: nn.Module) -> nn.Module:
    """Eval mode and no parameter or statistic at a value that would hide a mistake."""
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and "filt" not in name:
                tensor.normal_()
    return net.eval()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_mask_is_removal(case: str, keep: float) -> None:
    net, x, gone = CASES[case](keep)
    dense = _randomised(net)(x)
    with masked(net, gone):
        expected = net(x)
    assert torch.equal(net(x), dense), "the mask must leave nothing behind"
    smaller = copy.deepcopy(net)
    remove_channels(smaller, gone)
    torch.testing.assert_close(smaller(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, dense, rtol=1e-3, atol=1e-3), "the case would hide a mistake"


@torch.no_grad()
def test_order_stays_when_few_of_many_stay() -> None:
    """70 of 384: a set of indices of this kind does not come back in ascending order."""
    kept = _some(384, 1 - 70 / 384, seed=3)
    assert len(kept) == 70
    gone = torch.tensor([c for c in range(384) if c not in set(kept.tolist())])
    norm = nn.LayerNorm(384)
    norm.weight.copy_(torch.arange(384.0))
    remove_channels(norm, {("", "out", 0): gone.flip(0)})
    assert torch.equal(norm.weight, kept.double())
    assert norm.normalized_shape == (70,)


@torch.no_grad()
def test_masked_consumer_ignores_infinity() -> None:
    net = _seq(a=nn.Linear(2, 3), b=nn.Linear(3, 2))
    net.get_parameter("a.weight")[1] = torch.inf
    gone = torch.tensor([1])
    with masked(net, {("a", "out", 0): gone, ("b", "in", 0): gone}):
        assert torch.isfinite(net(torch.ones(1, 2))).all()


@torch.no_grad()
def test_masked_accepts_keyword_input_and_unbatched_images() -> None:
    net = nn.Conv2d(3, 2, 1, bias=False)
    x = torch.randn(3, 4, 4)
    with masked(net, {("", "in", 0): torch.tensor([0, 2])}):
        torch.testing.assert_close(net(input=x), net.weight[:, 1] * x[1])


def test_masked_leaves_no_hook_after_an_exception() -> None:
    net, _, gone = _plain(0.3)
    with pytest.raises(RuntimeError, match="stop"), masked(net, gone):
        raise RuntimeError("stop")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@torch.no_grad()
def test_masked_norm_calls_no_foreign_hook_twice() -> None:
    net, x, gone = _tokens(nn.LayerNorm, 8, 0.5)
    calls = []
    net.norm.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    with masked(net, gone):
        net(x)
    assert len(calls) == 1


ATTRIBUTES: dict[str, tuple[nn.Module, Gone, dict[str, object]]] = {
    "conv": (
        nn.Conv2d(6, 8, 3),
        {("", "out", 0): torch.tensor([0, 7]), ("", "in", 0): torch.tensor([1])},
        {"in_channels": 5, "out_channels": 6, "groups": 1},
    ),
    "conv1d": (nn.Conv1d(6, 8, 3), {("", "out", 0): torch.tensor([3])}, {"out_channels": 7, "in_channels": 6}),
    "conv3d": (nn.Conv3d(6, 8, 3), {("", "in", 0): torch.tensor([3])}, {"out_channels": 8, "in_channels": 5}),
    "grouped": (
        nn.Conv2d(8, 12, 3, groups=4),
        {("", "out", 0): torch.arange(3, 9)},
        {"in_channels": 4, "out_channels": 6, "groups": 2},
    ),
    "depthwise": (
        nn.Conv2d(4, 8, 3, groups=4),
        {("", "out", 0): torch.tensor([2, 3])},
        {"in_channels": 3, "out_channels": 6, "groups": 3},
    ),
    "transposed": (
        nn.ConvTranspose2d(8, 12, 3, groups=4),
        {("", "out", 0): torch.arange(3, 9), ("", "in", 0): torch.arange(2, 6)},
        {"in_channels": 4, "out_channels": 6, "groups": 2},
    ),
    "linear": (
        nn.Linear(6, 8, bias=False),
        {("", "out", 0): torch.tensor([0, 7]), ("", "in", 0): torch.tensor([1])},
        {"in_features": 5, "out_features": 6},
    ),
    "batchnorm": (nn.BatchNorm2d(6), {("", "out", 0): torch.tensor([1])}, {"num_features": 5}),
    "batchnorm_bare": (
        nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        {("", "out", 0): torch.tensor([1])},
        {"num_features": 5},
    ),
    "batchnorm_statistics": (nn.BatchNorm2d(6, affine=False), {("", "out", 0): torch.tensor([1])}, {"num_features": 5}),
    "layernorm": (nn.LayerNorm([3, 6]), {("", "out", 0): torch.tensor([1])}, {"normalized_shape": (3, 5)}),
    "groupnorm": (
        nn.GroupNorm(3, 6, affine=False),
        {("", "out", 0): torch.tensor([2, 3])},
        {"num_channels": 4, "num_groups": 2},
    ),
    "simplenorm": (
        timm.layers.SimpleNorm(6, affine=False),
        {("", "out", 0): torch.tensor([1])},
        {"normalized_shape": (5,)},
    ),
    "blur": (timm.layers.BlurPool2d(6), {("", "out", 0): torch.tensor([1])}, {"channels": 5}),
    "prelu": (nn.PReLU(6), {("", "out", 0): torch.tensor([1])}, {"num_parameters": 5}),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_attributes(case: str) -> None:
    module, gone, expected = ATTRIBUTES[case]
    module = copy.deepcopy(module)
    remove_channels(module, gone)
    assert {name: getattr(module, name) for name in expected} == expected
    refresh(module)
    assert {name: getattr(module, name) for name in expected} == expected, "refresh must be idempotent"
    assert all(tensor.is_contiguous() for tensor in module.state_dict().values())


def test_gain_of_a_standardised_convolution_shrinks_too() -> None:
    conv = timm.layers.ScaledStdConv2d(3, 4, 3)
    remove_channels(conv, {("", "out", 0): torch.tensor([1])})
    assert conv.gain.shape == (3, 1, 1, 1)
    assert conv(torch.randn(1, 3, 5, 5)).shape[1] == 3


def test_parameters_keep_dtype_and_flag_and_lose_the_gradient() -> None:
    layer = nn.Linear(4, 3, dtype=torch.float16)
    layer.bias.requires_grad_(False)
    layer.weight.grad = torch.zeros_like(layer.weight)
    remove_channels(layer, {("", "out", 0): torch.tensor([1], dtype=torch.int32)})
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.is_leaf
    assert (layer.weight.dtype, layer.weight.requires_grad, layer.weight.grad) == (torch.float16, True, None)
    assert not layer.bias.requires_grad


def test_channels_last_stays() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    remove_channels(conv, {("", "in", 0): torch.tensor([1])})
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("both", [True, False])
def test_shared_parameters_stay_shared(both: bool) -> None:
    a, b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    b.weight = a.weight
    remove_channels(_seq(a=a, b=b), _axes("a", "out", 1) | (_axes("b", "out", 1) if both else {}))
    assert a.weight is b.weight
    assert (a.out_features, b.out_features) == (2, 2)


def test_a_module_under_two_names_shrinks_once() -> None:
    layer = nn.Linear(4, 4)
    net = _seq(a=layer, b=layer)
    gone = torch.tensor([2])
    remove_channels(net, {("a", "out", 0): gone, ("b", "in", 0): gone})
    assert layer.weight.shape == (3, 3)
    assert (layer.in_features, layer.out_features) == (3, 3)
    again: Gone = {("a", "out", 0): gone, ("b", "out", 0): gone, ("a", "in", 0): gone, ("b", "in", 0): gone}
    remove_channels(net, again)
    assert layer.weight.shape == (2, 2)
    assert layer.out_features == 2


def test_param_side_takes_buffers_and_negative_dimensions() -> None:
    net = nn.Module()
    net.register_parameter("pos", nn.Parameter(torch.arange(24.0).reshape(2, 3, 4)))
    net.register_buffer("table", torch.arange(5))
    remove_channels(net, {("pos", "param", -1): torch.tensor([0, 2]), ("table", "param", 0): torch.tensor([4])})
    assert torch.equal(net.get_parameter("pos"), torch.arange(24.0).reshape(2, 3, 4)[..., [1, 3]])
    assert torch.equal(net.get_buffer("table"), torch.arange(4))


def test_empty_selection_changes_nothing() -> None:
    net = nn.Linear(3, 2)
    weight = net.weight
    remove_channels(net, {("", "out", 0): torch.tensor([], dtype=torch.long)})
    assert net.weight is weight


def _small() -> nn.Sequential:
    net = _seq(
        conv=nn.Conv2d(3, 8, 1),
        grouped=nn.Conv2d(8, 8, 1, groups=4),
        norm=nn.GroupNorm(2, 8),
        act=nn.ReLU(),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 3),
    )
    net.b.weight = net.a.weight  # type: ignore[union-attr]
    return net


def _axes(name: str, side: str, *indices: int, dim: int = 0) -> dict[Axis, Tensor]:
    return {(name, side, dim): torch.tensor(indices)}  # type: ignore[dict-item]


BAD: dict[str, tuple[Gone, str]] = {
    "side": (_axes("norm", "in", 0), r"norm \(GroupNorm\), side 'in': .*no channels of its own"),
    "no_channels": (_axes("act", "out", 0), r"act \(ReLU\), side 'out'"),
    "range": (_axes("conv", "out", 8), r"there are 8 channels, indices \[8\] are out of range"),
    "negative": (_axes("conv", "out", -1), "are out of range"),
    "all": (_axes("conv", "in", 0, 1, 2), "all 3 channels would go"),
    "group": (_axes("grouped", "out", 0, 1, 2), r"grouped \(Conv2d, groups=4\), side 'out': a group goes as a whole"),
    "group_in": (_axes("grouped", "in", 0, 1), "side 'in': a group goes as a whole, .* together with its outputs"),
    "groups_differ": (_axes("grouped", "out", 0, 1) | _axes("grouped", "in", 2, 3), r"of groups \[1\]"),
    "norm_group": (_axes("norm", "out", 0), r"norm \(GroupNorm, groups=2\), side 'out': a group goes as a whole"),
    "shared_differ": (_axes("a", "out", 0) | _axes("b", "out", 1), "named twice"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [remove_channels, lambda *a: masked(*a).__enter__()])
def test_bad_input_changes_nothing(case: str, call: Callable[..., object]) -> None:
    gone, message = BAD[case]
    net = _small()
    before = dict(net.named_parameters())
    with pytest.raises(ModelError, match=message):
        call(net, gone if "conv" in {axis[0] for axis in gone} else {**_axes("conv", "out", 5), **gone})
    after = dict(net.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert net.get_submodule("conv").out_channels == 8
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    "change", [lambda m: prune.random_unstructured(m, "weight", 0.5), parametrizations.weight_norm]
)
def test_computed_weights_are_refused(change: Callable[[nn.Module], object]) -> None:
    net = _seq(a=nn.Linear(4, 3))
    change(net.get_submodule("a"))
    with pytest.raises(ModelError, match="'weight' is computed from other tensors"):
        remove_channels(net, _axes("a", "out", 0))
