"""Saving and loading sparse and masked models: bit-equal outputs, small files, every disagreement refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from jbrprune.checkpoint import checkpoint
from jbrprune.checkpoint.checkpoint import DESCRIPTION, WEIGHTS, describe, load, save
from jbrprune.checkpoint.description import checksum
from jbrprune.errors import CheckpointError, ModelError
from jbrprune.models import timm_models
from jbrprune.sparsity.masks import make_permanent
from jbrprune.structure.slicing import remove_channels

TINY = timm_models.Recipe("test_vit", {"img_size": [32, 32], "num_classes": 3})


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.conv(x).mean((2, 3)))))


def _same(left: nn.Module, right: nn.Module) -> bool:
    """All bits but those under a mask."""
    a, b = left.state_dict(), right.state_dict()
    masks = {key.removesuffix("_mask") + "_orig": mask.bool() for key, mask in b.items() if key.endswith("_mask")}
    kept = {key: torch.where(masks[key], value, 0) if key in masks else value for key, value in b.items()}
    return a.keys() == b.keys() and all(a[key].dtype == kept[key].dtype and _equal(a[key], kept[key]) for key in a)


def _equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit."""
    a, b = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return torch.equal(a, b)


def _masked_everywhere(net: nn.Module, amount: float) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            prune.random_unstructured(module, "weight", amount)
    return net


def _half(net: _Net) -> nn.Module:
    return _masked_everywhere(net, 0.5)


def _sparse(net: _Net) -> nn.Module:
    return _permanent(_masked_everywhere(net, 0.9))


@torch.no_grad()
def _permanent(net: nn.Module) -> nn.Module:
    """A weight times a mask is -0.0 where the weight is negative; here it is 0.0."""
    for parameter in make_permanent(net).parameters():
        parameter.add_(0.0)
    return net


def _signed_zeros(net: _Net) -> nn.Module:
    return make_permanent(_masked_everywhere(net, 0.9))


def _mixed(net: _Net) -> nn.Module:
    """Masked twice, in several ways, with a masked bias; zeros that are not masked; -0.0 and a frozen weight."""
    prune.l1_unstructured(net.conv, "weight", 0.3)
    prune.ln_structured(net.conv, "weight", 0.5, n=1, dim=0)
    prune.random_unstructured(net.a, "bias", 0.5)
    with torch.no_grad():
        net.b.weight.copy_(torch.where(net.b.weight.abs() < 0.3, 0.0, net.b.weight))
        net.b.weight[0, 0] = -0.0
        net.conv.weight_orig.view(-1)[:5] = 0.0  # type: ignore[operator, union-attr]
    return net


def _all(net: _Net) -> nn.Module:
    prune.random_unstructured(net.b, "weight", 1.0)
    with torch.no_grad():
        net.a.weight.zero_()
    return net


def _none(net: _Net) -> nn.Module:
    return _masked_everywhere(net, 0.0)


def _bfloat16(net: _Net) -> nn.Module:
    return _half(net.to(torch.bfloat16))


def _double(net: _Net) -> nn.Module:
    return _mixed(net.to(torch.float64))


def _channels_last(net: _Net) -> nn.Module:
    return _half(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _shared(net: _Net) -> nn.Module:
    """One parameter of two layers, masked alike; and one layer of two names."""
    net.b.weight = net.a.weight
    prune.random_unstructured(net.a, "weight", 0.5)
    prune.custom_from_mask(net.b, "weight", net.a.weight_mask)  # type: ignore[arg-type]
    net.again = net.a
    return net


MODELS = (_half, _sparse, _signed_zeros, _mixed, _all, _none, _bfloat16, _double, _channels_last, _shared)


@pytest.mark.parametrize("make", MODELS)
def test_outputs_are_bit_equal(
    make: Callable[[_Net], nn.Module], tmp_path: Path, fingerprint: Callable[[nn.Module], dict[str, Any]]
) -> None:
    model = make(_Net()).eval()
    dense = _shared_names(_Net()) if make is _shared else _Net()
    x = torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)
    expected = model(x)
    before = fingerprint(model)
    save(model, tmp_path / "m")
    assert fingerprint(model) == before
    loaded = load(tmp_path / "m", model=dense)
    assert torch.equal(loaded(x), expected)
    assert torch.isfinite(expected).all()
    assert _same(loaded, model)
    assert not any(module.training for module in loaded.modules())
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "m" / WEIGHTS).read_bytes()


def _shared_names(net: _Net) -> _Net:
    net.again = net.a
    return net


def test_sharing_comes_back(tmp_path: Path) -> None:
    save(_shared(_Net()), tmp_path / "m")
    loaded = load(tmp_path / "m", model=_shared_names(_Net()))
    assert isinstance(loaded, _Net)
    assert loaded.a.weight_orig is loaded.b.weight_orig
    assert loaded.again is loaded.a


def test_pruning_goes_on_and_masks_can_be_made_permanent(tmp_path: Path) -> None:
    model = _half(_Net()).eval()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", model=_Net())
    assert isinstance(loaded, _Net)
    assert isinstance(model, _Net)
    for net in (loaded, model):
        prune.l1_unstructured(net.a, "weight", 6)
        prune.remove(net.b, "weight")
    assert int(loaded.a.weight_mask.sum()) == 36 - 18 - 6  # type: ignore[operator, union-attr]
    assert torch.equal(loaded.a.weight_mask, model.a.weight_mask)  # type: ignore[arg-type]
    assert torch.equal(loaded.a.weight, model.a.weight)
    assert torch.equal(loaded.b.weight, model.b.weight)
    assert type(loaded.b.weight) is nn.Parameter


def test_a_loaded_model_trains_where_it_is_not_masked(tmp_path: Path) -> None:
    save(_half(_Net()), tmp_path / "m")
    loaded = load(tmp_path / "m", model=_Net())
    assert isinstance(loaded, _Net)
    loaded(torch.randn(4, 3, 8, 8)).square().sum().backward()
    gradient, mask = loaded.b.weight_orig.grad, loaded.b.weight_mask  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert isinstance(mask, Tensor)
    assert gradient[mask == 0].abs().sum() == 0
    assert gradient[mask == 1].abs().sum() > 0


@torch.no_grad()
def test_masked_and_shrunk_by_its_recipe(tmp_path: Path) -> None:
    model = timm_models.build(TINY).eval()
    gone = torch.arange(100)
    remove_channels(model, {("blocks.1.mlp.fc1", "out", 0): gone, ("blocks.1.mlp.fc2", "in", 0): gone})
    _masked_everywhere(model, 0.7)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert torch.equal(loaded(x), expected)
    assert _same(loaded, model)
    info = describe(tmp_path / "m").tensors["blocks.1.mlp.fc2.weight"]
    assert (info.shape, info.values, info.masked) == ((64, 92), 64 * 92 - round(0.7 * 64 * 92), True)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_file_is_small(masked: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = nn.Linear(512, 512, dtype=dtype)
    prune.random_unstructured(layer, "weight", 0.9)
    save(layer if masked else _permanent(layer), tmp_path / "m")
    entries, size = 512 * 512, layer.bias.element_size()
    expected = round(0.1 * entries) * size + entries // 8 + 512 * size
    assert 0 <= (tmp_path / "m" / WEIGHTS).stat().st_size - expected < 500


def test_only_parameters_that_become_smaller_are_packed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with torch.no_grad():
        net.get_parameter("0.weight").fill_(1).view(-1)[:2] = 0  # 2 * 4 bytes are saved, the bitmap takes 64 / 8
        net.get_parameter("0.bias").fill_(1)[0] = 0  # 4 bytes are saved, the bitmap takes 1
    save(net, tmp_path / "m")
    values = {name: info.values for name, info in describe(tmp_path / "m").tensors.items()}
    assert {name: count for name, count in values.items() if count is not None} == {"0.bias": 7, "1.bias": 0}
    assert not any(info.masked for info in describe(tmp_path / "m").tensors.values())
    assert _same(load(tmp_path / "m", model=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), net)


def test_values_under_a_mask_are_not_kept(tmp_path: Path) -> None:
    net = _half(_Net())
    save(net, tmp_path / "m")
    loaded = load(tmp_path / "m", model=_Net()).state_dict()
    assert net.state_dict()["a.weight_orig"].all()
    assert torch.equal(loaded["a.weight_orig"] != 0, loaded["a.weight_mask"] != 0)


# --- refusals of save -----------------------------------------------------------------------------


def _other_parameter() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    prune.random_unstructured(attention, "bias_k", 0.5)
    return attention


def _masked_in_one_place() -> nn.Module:
    net = _Net()
    net.b.weight = net.a.weight
    prune.random_unstructured(net.a, "weight", 0.5)
    return net


def _masked_differently() -> nn.Module:
    net = _masked_in_one_place()
    prune.custom_from_mask(net.b, "weight", 1 - net.a.weight_mask)  # type: ignore[arg-type, union-attr, operator]
    return net


def _soft() -> nn.Module:
    net = _Net()
    prune.custom_from_mask(net.a, "weight", torch.full((6, 6), 0.5))
    return net


UNSAVABLE = {
    "soft": (_soft, r"a\.weight: its mask must hold nothing but 0 and 1"),
    "other": (_other_parameter, r"bias_k is masked .* neither a weight nor a bias.*prune\.remove"),
    "one place": (_masked_in_one_place, r"a\.weight and b\.weight are one shared parameter, but their masks differ"),
    "differently": (_masked_differently, r"a\.weight and b\.weight are one shared parameter, but their masks differ"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_save_refuses(case: str, tmp_path: Path) -> None:
    make, message = UNSAVABLE[case]
    with pytest.raises(ModelError, match=message):
        save(make(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_a_masked_model_to_fill(tmp_path: Path) -> None:
    save(_Net(), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"load needs a model without masks.*make_permanent"):
        load(tmp_path / "m", model=_half(_Net()))


# --- refusals of load -----------------------------------------------------------------------------


def _rewritten(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the JSON as somebody would who knows how to compute the sum anew."""
    body = json.loads((directory / DESCRIPTION).read_text())
    change(body)
    body.pop("sha256")
    (directory / DESCRIPTION).write_text(json.dumps({**body, "sha256": checksum(body)}))


def _repacked(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the weights likewise."""
    state = safetensors.torch.load_file(directory / WEIGHTS)
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    safetensors.torch.save_file(state, directory / WEIGHTS)
    sums = checkpoint.describe_bytes((directory / WEIGHTS).read_bytes())
    _rewritten(directory, lambda body: body.__setitem__("weights", sums))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """``a.weight`` [6, 6] keeps 18 values and has a bitmap of 5 bytes; ``a.bias`` is dense."""
    save(_half(_Net()), tmp_path / "saved")
    return tmp_path / "saved"


def _info(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["tensors"][name].update(changes)


def _alias(body: dict[str, Any]) -> None:
    del body["tensors"]["b.bias"]
    body["aliases"]["table"] = "a.weight"


def _bitmap_entry(body: dict[str, Any]) -> None:
    entry = {"shape": [5], "dtype": "uint8", "persistent": True, "channels_last": False, "values": None}
    body["tensors"]["a.weight.bitmap"] = entry | {"masked": False}


def _masked_table(body: dict[str, Any]) -> None:
    body["tensors"]["table"] = body["tensors"].pop("a.weight")


WILD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "negative": (_info("a.weight", values=-1), "a.weight.values makes no sense: '-1'"),
    "more than entries": (_info("a.weight", values=37), "names, shapes or dtypes are not those"),
    "huge": (_info("a.weight", values=2**70), "names, shapes or dtypes are not those"),
    "float": (_info("a.weight", values=18.0), "a.weight.values makes no sense"),
    "bool": (_info("a.weight", values=True), "a.weight.values makes no sense"),
    "text": (_info("a.weight", values="18"), "a.weight.values makes no sense"),
    "fewer": (_info("a.weight", values=17), "names, shapes or dtypes are not those"),
    "dense": (_info("a.weight", values=None, masked=False), "names, shapes or dtypes are not those"),
    "packed": (_info("a.bias", values=6), "names, shapes or dtypes are not those"),
    "flag": (_info("a.weight", masked=1), "a.weight.masked makes no sense"),
    "no flag": (_info("a.weight", masked=None), "a.weight.masked makes no sense"),
    "masked table": (_masked_table, "names, shapes or dtypes are not those"),
    "masked alias": (_alias, "names, shapes or dtypes are not those"),
    "its own bitmap": (_bitmap_entry, r"the dense model 1 of the file \['a.weight.bitmap'\]"),
    "other dtype": (_info("a.weight", dtype="float64"), "names, shapes or dtypes are not those"),
    "larger shape": (_info("a.weight", shape=[6, 2**20]), "names, shapes or dtypes are not those"),
    "huge shape": (_info("a.weight", shape=[2**61, 1]), "names, shapes or dtypes are not those"),
    "deep shape": (_info("a.weight", shape=[1] * 8 + [36]), r"a\.weight: stored as .*only makes tensors"),
    "same number of bytes": (
        _info("a.weight", shape=[5, 8]),
        r"a\.weight: stored as .*\(5, 8\).*only makes tensors",
    ),
}


@pytest.mark.parametrize("case", WILD)
def test_load_refuses_wild_values(case: str, saved: Path) -> None:
    change, message = WILD[case]
    _rewritten(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved, model=_Net())


def _moved_bit(state: dict[str, Tensor]) -> None:
    """As many ones as before, one of them beyond the last entry."""
    bitmap = state["a.weight.bitmap"]
    at = int(bitmap[:4].nonzero()[0])
    bitmap[at] &= bitmap[at] - 1
    bitmap[-1] |= 1 << 4


def _more_ones(state: dict[str, Tensor]) -> None:
    state["a.weight.bitmap"][:4] = 255


def _longer(state: dict[str, Tensor]) -> None:
    state["a.weight.bitmap"] = torch.cat([state["a.weight.bitmap"], torch.zeros(1, dtype=torch.uint8)])


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "beyond the end": (_moved_bit, r"a\.weight: the bitmap marks 18 entries, but there are 36 entries and 18 values"),
    "more ones": (_more_ones, r"a\.weight: the bitmap marks 3\d entries, but there are 36 entries and 18 values"),
    "no ones": (lambda state: state["a.weight.bitmap"].zero_(), r"a\.weight: the bitmap marks 0 entries, but there"),
    "longer": (_longer, "names, shapes or dtypes are not those"),
    "shorter": (
        lambda state: state.update({"a.weight.bitmap": state["a.weight.bitmap"][:4].clone()}),
        "names, shapes or dtypes are not those",
    ),
    "no bitmap": (lambda state: state.pop("a.weight.bitmap"), "names, shapes or dtypes are not those"),
    "bitmap of numbers": (
        lambda state: state.update({"a.weight.bitmap": state["a.weight.bitmap"].short()}),
        "names, shapes or dtypes are not those",
    ),
    "fewer values": (
        lambda state: state.update({"a.weight": state["a.weight"][:17].clone()}),
        "names, shapes or dtypes are not those",
    ),
    "a bitmap too many": (
        lambda state: state.update({"a.bias.bitmap": torch.zeros(1, dtype=torch.uint8)}),
        "names, shapes or dtypes are not those",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_load_refuses_parts_that_do_not_belong_together(case: str, saved: Path) -> None:
    change, message = DAMAGES[case]
    _repacked(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved, model=_Net())


def test_nothing_larger_than_the_dense_tensor_is_made(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of zeros would become 32 times as many: the shape is compared first."""

    def big(state: dict[str, Tensor]) -> None:
        state["a.weight"] = torch.zeros(0)
        state["a.weight.bitmap"] = torch.zeros(2**10, dtype=torch.uint8)

    def unpack(*arguments: object) -> Tensor:
        raise AssertionError(arguments)

    _rewritten(saved, _info("a.weight", shape=[2**6, 2**7], values=0))
    _repacked(saved, big)
    monkeypatch.setattr("jbrprune.checkpoint.description.unpack", unpack)
    with pytest.raises(CheckpointError, match=r"a\.weight: stored as .*only makes tensors"):
        load(saved, model=_Net())


class _Buffer(nn.Module):
    """Its weight is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(6, 6))
        self.bias = nn.Parameter(torch.ones(6))


def test_a_mask_needs_a_parameter(saved: Path) -> None:
    dense = _Net()
    dense.a = _Buffer()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"a\.weight: stored as .*masked=True.*but the dense model has a Tensor"):
        load(saved, model=dense)


def test_the_given_model_stays_plain(saved: Path) -> None:
    dense = _Net()
    before = copy.deepcopy(dense.state_dict())
    load(saved, model=dense)
    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(dense.state_dict()[key], before[key]) for key in before)
