"""Saving and loading: the same outputs, nothing but the two files, every damage refused, nothing half-written."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from torch import Tensor, nn

import jbrprune
from jbrprune.checkpoint import checkpoint
from jbrprune.checkpoint.checkpoint import DESCRIPTION, WEIGHTS, describe, load, save
from jbrprune.checkpoint.description import checksum
from jbrprune.errors import CheckpointError
from jbrprune.models import timm_models
from jbrprune.structure.slicing import remove_channels

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "crop_pct": 0.9,
    "crop_mode": "squash",
}
TINY = timm_models.Recipe("test_vit", {"img_size": [32, 32], "num_classes": 3})


def _made(name: str, **arguments: Any) -> tuple[nn.Module, timm_models.Recipe]:
    """A timm model without any value that initialisation would give it again."""
    recipe = timm_models.Recipe(name, {"num_classes": 7, **arguments})
    model = timm_models.build(recipe).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.01)
    return model, recipe


def _cut(model: nn.Module, gone: Tensor, out: tuple[str, ...], into: tuple[str, ...]) -> None:
    outs = {(name, "out", 0): gone for name in out}
    remove_channels(model, outs | {(name, "in", 0): gone for name in into})  # type: ignore[arg-type]


def _resnet() -> tuple[nn.Module, timm_models.Recipe]:
    model, recipe = _made("resnet18")
    _cut(model, torch.arange(0, 64, 3), ("layer1.0.conv1", "layer1.0.bn1"), ("layer1.0.conv2",))
    _cut(model, torch.arange(500), ("layer4.1.conv1", "layer4.1.bn1"), ("layer4.1.conv2",))
    return model, recipe


def _vit() -> tuple[nn.Module, timm_models.Recipe]:
    """The middle of three heads goes in the first block, hidden channels in the second."""
    model, recipe = _made("vit_tiny_patch16_224", img_size=[32, 32], depth=2)
    rows = (torch.arange(3)[:, None] * 192 + torch.arange(64, 128)).flatten()
    remove_channels(
        model,
        {("blocks.0.attn.qkv", "out", 0): rows, ("blocks.0.attn.proj", "in", 0): torch.arange(64, 128)},
    )
    attention = model.get_submodule("blocks.0.attn")
    attention.num_heads, attention.attn_dim = 2, 128  # type: ignore[assignment]
    _cut(model, torch.arange(700), ("blocks.1.mlp.fc1",), ("blocks.1.mlp.fc2",))
    return model, recipe


def _mobilenet() -> tuple[nn.Module, timm_models.Recipe]:
    """Hidden channels of an inverted residual: pointwise, depthwise, squeeze-excite, pointwise."""
    model, recipe = _made("mobilenetv3_small_050")
    block = "blocks.2.1."
    out = ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_expand")
    into = ("se.conv_reduce", "conv_pwl")
    gone = torch.tensor([0, 5, 17])
    _cut(model, gone, tuple(block + name for name in out), tuple(block + name for name in into))
    return model, recipe


def _convnext() -> tuple[nn.Module, timm_models.Recipe]:
    model, recipe = _made("convnext_atto", depths=[1, 1, 1, 1])
    _cut(model, torch.arange(100), ("stages.1.blocks.0.mlp.fc1",), ("stages.1.blocks.0.mlp.fc2",))
    return model, recipe


def _blur() -> tuple[nn.Module, timm_models.Recipe]:
    """A non-persistent buffer shrinks."""
    model, recipe = _made("resnetblur18")
    _cut(model, torch.arange(9), ("layer2.0.conv1", "layer2.0.bn1", "layer2.0.aa"), ("layer2.0.conv2",))
    return model, recipe


@pytest.mark.parametrize("make", [_resnet, _vit, _mobilenet, _convnext, _blur])
@torch.no_grad()
def test_outputs_are_bit_equal(make: Callable[[], tuple[nn.Module, timm_models.Recipe]], tmp_path: Path) -> None:
    model, _ = make()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    save(model, tmp_path / "new" / "pruned")
    assert sorted(os.listdir(tmp_path / "new")) == ["pruned"]
    assert sorted(os.listdir(tmp_path / "new" / "pruned")) == [DESCRIPTION, WEIGHTS]
    loaded = load(tmp_path / "new" / "pruned")
    assert not any(module.training for module in loaded.modules())
    assert torch.isfinite(expected).all()
    assert expected.std() > 0
    assert torch.equal(loaded(x), expected)
    assert [str(m) for m in loaded.modules()] == [str(m) for m in model.modules()]


def _tiny() -> nn.Module:
    model = timm_models.build(TINY).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, **CONFIG}  # type: ignore[dict-item]
    _cut(model, torch.arange(100), ("blocks.1.mlp.fc1",), ("blocks.1.mlp.fc2",))
    return model


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return _tiny()


@pytest.fixture(scope="module")
def _saved(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "saved"
    save(tiny, directory, report={"macs": [1, 2.5], "provenance": {"seed": 1}})
    return directory


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A copy for each test."""
    return shutil.copytree(_saved, tmp_path / "saved")


def _same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_timm_and_the_next_save_need(saved: Path, tiny: nn.Module, tmp_path: Path) -> None:
    model = load(saved)
    assert timm.data.resolve_data_config(model=model) == CONFIG
    assert timm.data.resolve_data_config(model=model, use_test_size=True) == CONFIG
    save(model, tmp_path / "again")
    assert _same(load(tmp_path / "again"), tiny)


def test_describe(saved: Path, tiny: nn.Module) -> None:
    description = describe(saved)
    assert description.recipe == timm_models.recipe(tiny)
    assert description.report == {"macs": [1, 2.5], "provenance": {"seed": 1}}
    assert description.data_config == CONFIG
    assert description.tensors["blocks.1.mlp.fc2.weight"].shape[1] == 92
    assert description.attributes["blocks.1.mlp.fc1"] == {"in_features": 64, "out_features": 92}
    assert description.weights["bytes"] == (saved / WEIGHTS).stat().st_size
    assert description.versions.keys() >= {"torch", "timm"}


def test_loading_leaves_the_random_state(saved: Path) -> None:
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_both_files_obey_the_umask(saved: Path) -> None:
    modes = {(saved / name).stat().st_mode & 0o777 for name in (WEIGHTS, DESCRIPTION)}
    assert len(modes) == 1


def test_dtype_layout_and_sharing_come_back(tmp_path: Path) -> None:
    model = _Own().to(torch.float64)
    model.conv.to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.b.weight = model.a.weight
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", model=_Own())
    assert isinstance(loaded, _Own)
    assert loaded.a.weight is loaded.b.weight
    assert loaded.conv.weight.dtype == torch.bfloat16
    assert loaded.a.weight.dtype == torch.float64
    assert loaded.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not loaded.conv.weight.is_contiguous()
    assert torch.equal(loaded.table, model.table)
    assert "table" not in loaded.state_dict()
    assert _same(loaded, model)


def test_tensors_that_were_tied_only_before_pruning_come_back_apart(tmp_path: Path) -> None:
    model = _Own()
    save(model, tmp_path / "m")
    fresh = _Own()
    fresh.b.weight = fresh.a.weight
    loaded = load(tmp_path / "m", model=fresh)
    assert not torch.equal(model.a.weight, model.b.weight)
    assert _same(loaded, model)
    assert fresh.a.weight is fresh.b.weight, "the given model is not changed"
    assert fresh.training


def test_overlapping_views_of_one_storage_are_saved(tmp_path: Path) -> None:
    model = _Own()
    both = torch.randn(6, 4)
    model.a.weight, model.b.weight = nn.Parameter(both[:4]), nn.Parameter(both[2:6])
    save(model, tmp_path / "m")
    assert _same(load(tmp_path / "m", model=_Own()), model)


class _Own(nn.Module):
    """No timm model."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.register_buffer("table", torch.rand(3), persistent=False)


class _Extra(nn.Linear):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        pass


# --- refusals of save -----------------------------------------------------------------------------


def _with_another_head() -> nn.Module:
    model = _tiny()
    model.head = nn.Sequential(nn.Linear(64, 5))
    return model


UNSAVABLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "extra": (lambda: _Extra(2, 2), {}, r"_extra_state: this entry of state_dict\(\)"),
    "report": (_Own, {"report": {"x": float("nan")}}, "JSON cannot hold config, report"),
    "provenance": (_Own, {"report": {"provenance": {"x": {1, 2}}}}, "JSON cannot hold config, report"),
    "size": (_tiny, {"size": (4, 32, 32)}, r"does not run on images of size \(4, 32, 32\).*size=\(channels"),
}
RECIPES: dict[str, tuple[Callable[[], nn.Module], timm_models.Recipe, str]] = {
    "changed": (
        _with_another_head,
        TINY,
        r"lacks 2 tensors of the dense model \['head.bias', 'head.weight'\]",
    ),
    "larger": (
        lambda: timm_models.build(timm_models.Recipe("test_vit", {"img_size": 32, "num_classes": 4})),
        TINY,
        r"head\.weight: stored as .*shape=\(4, 64\)",
    ),
    "unknown name": (_tiny, timm_models.Recipe("test_vot", {}), "'test_vot' with {} could not be created"),
    "hub": (_tiny, timm_models.Recipe("hf-hub:timm/test_vit", {}), "recipe.name makes no sense"),
    "reads files": (_tiny, timm_models.Recipe("test_vit", {"checkpoint_path": "x"}), "recipe.arguments makes no sense"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_does_not_lead_to_the_model_is_left_out(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, recipe, message = RECIPES[case]
    model = make()
    monkeypatch.setattr(timm_models, "recipe", lambda model: recipe)
    save(model, tmp_path / "m")
    assert re.search(rf"load\(\) will need model=: the recipe .*{message}", caplog.text)
    assert describe(tmp_path / "m").recipe is None
    with pytest.raises(CheckpointError, match=r"saved without a recipe.*load\(path, model=\.\.\.\)"):
        load(tmp_path / "m")
    assert _same(load(tmp_path / "m", model=model), model)


@pytest.mark.parametrize("case", UNSAVABLE)
def test_save_refuses(case: str, tmp_path: Path) -> None:
    make, arguments, message = UNSAVABLE[case]
    with pytest.raises(CheckpointError, match=message):
        save(make(), tmp_path / "m", **arguments)
    assert os.listdir(tmp_path) == []


def test_existing_target(saved: Path) -> None:
    before = load(saved)
    with pytest.raises(CheckpointError, match=r"saved exists already\. .*overwrite=True"):
        save(_Own(), saved)
    assert _same(load(saved), before)
    save(_Own(), saved, overwrite=True)
    assert describe(saved).recipe is None
    assert os.listdir(saved.parent) == ["saved"]


def test_an_empty_directory_may_be_the_target(tmp_path: Path) -> None:
    save(_Own(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [DESCRIPTION, WEIGHTS]


def test_other_files_are_never_replaced(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds other files, such as 'notes\.txt'"):
        save(_Own(), saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_link_to_a_directory_stays_a_link(saved: Path) -> None:
    link = saved.with_name("link")
    link.symlink_to(saved, target_is_directory=True)
    save(_Own(), link, overwrite=True)
    assert link.is_symlink()
    assert describe(saved).recipe is None


@pytest.mark.parametrize("target", ["file", "file/sub"])
def test_a_file_in_the_way(target: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"this is a file|not a directory that can be written"):
        save(_Own(), tmp_path / target, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_failed_writes_leave_the_old_model(saved: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> int:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(CheckpointError, match=r"saved: could not be written: .*No space left on device"):
        save(_Own(), saved, overwrite=True)
    assert os.listdir(saved.parent) == ["saved"]
    assert _same(load(saved), tiny)


def test_a_file_system_that_takes_no_more(saved: Path, tiny: nn.Module) -> None:
    """A real failing write, by the limit of the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tiny, saved, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(saved.parent) == ["saved"]
    assert _same(load(saved), tiny)


class _Crash(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError("crash"), _Crash()])
@pytest.mark.parametrize("failing", [{1}, {2}, {2, 3}])
def test_a_crash_leaves_the_old_model(
    failing: set[int], error: BaseException, saved: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renames 1 and 2 put old and new in place, 3 would undo the first; a dead process does not undo anything."""
    calls = 0
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise error
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises((CheckpointError, _Crash)):
            save(_Own(), saved, overwrite=True)
    assert calls == max(failing) + (failing == {2})
    assert not [name for name in os.listdir(saved.parent) if name.endswith(".tmp")]
    assert _same(load(saved), tiny)
    save(_Own(), saved, overwrite=True)
    assert describe(saved).recipe is None
    assert os.listdir(saved.parent) == ["saved"]


def test_a_crash_before_the_old_model_is_deleted_leaves_the_new_one(saved: Path, tiny: nn.Module) -> None:
    aside = checkpoint._aside(saved)
    save(_Own(), aside)
    assert _same(load(saved), tiny)
    save(tiny, saved, overwrite=True)
    assert os.listdir(saved.parent) == ["saved"]


def test_a_crash_after_the_old_model_stepped_aside_still_counts_as_existing(saved: Path) -> None:
    os.replace(saved, checkpoint._aside(saved))
    with pytest.raises(CheckpointError, match="exists already"):
        save(_Own(), saved)


# --- refusals of load -----------------------------------------------------------------------------


def _rewritten(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the JSON as somebody would who knows how to compute the sum anew."""
    body = json.loads((directory / DESCRIPTION).read_text())
    change(body)
    body.pop("sha256")
    (directory / DESCRIPTION).write_text(json.dumps({**body, "sha256": checksum(body)}))


def _set(*keys: str, to: Any) -> Callable[[Mapping[str, Any]], None]:
    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = to

    return change


def _resized(*shape: int) -> Callable[[dict[str, Any]], None]:
    """Another shape of the same number of elements is not noticed by a sum that was computed anew."""
    return _set("tensors", "head.weight", "shape", to=list(shape))


WILD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (_set("format", to="jbrprune 2"), "is not of the format 'jbrprune 1'"),
    "format": (_set("format", to=["jbrprune 1"]), "is not of the format 'jbrprune 1'"),
    "no_format": (lambda body: body.pop("format"), "is not of the format 'jbrprune 1'"),
    "negative": (_resized(-3, -64), "tensors.head.weight.shape makes no sense"),
    "huge": (_resized(2**40, 4), "names, shapes or dtypes are not those"),
    "huger": (_resized(2**62, 4), "names, shapes or dtypes are not those"),
    "huge_but_empty": (_resized(0, 2**63), "names, shapes or dtypes are not those"),
    "deep": (_resized(*[1] * 9, 192), "names, shapes or dtypes are not those"),
    "shape_type": (_set("tensors", "head.weight", "shape", to="3,64"), "shape makes no sense"),
    "shape_float": (_set("tensors", "head.weight", "shape", to=[3.0, 64]), "shape makes no sense"),
    "shape_bool": (_set("tensors", "head.bias", "shape", to=[True]), "shape makes no sense"),
    "transposed": (_resized(64, 3), "names, shapes or dtypes are not those"),
    "dtype": (_set("tensors", "head.weight", "dtype", to="object"), "dtype makes no sense"),
    "other_dtype": (_set("tensors", "head.weight", "dtype", to="int32"), "names, shapes or dtypes are not those"),
    "flag": (_set("tensors", "head.weight", "persistent", to=1), "persistent makes no sense"),
    "layout": (_set("tensors", "head.weight", "channels_last", to=3), "channels_last makes no sense"),
    "unknown_key": (
        _set("tensors", "head.weight", "loader", to="x"),
        "weight makes no sense: 'loader' is unknown",
    ),
    "unknown_part": (_set("hooks", to={}), "makes no sense: 'hooks' is unknown"),
    "not_persistent": (_set("tensors", "head.weight", "persistent", to=False), "this is not the model"),
    "tensor": (_set("tensors", "head.weight", to=None), "tensors.head.weight makes no sense"),
    "tensors": (_set("tensors", to=[]), "tensors makes no sense"),
    "unknown_tensor": (
        lambda body: body["tensors"].__setitem__("x.weight", body["tensors"]["head.weight"]),
        "names, shapes or dtypes are not those",
    ),
    "alias": (_set("aliases", to={"head.weight2": "nothing"}), "aliases.head.weight2 makes no sense"),
    "alias_type": (_set("aliases", to={"x": ["head.weight"]}), "aliases.x makes no sense"),
    "alias_unknown": (_set("aliases", to={"x": "head.weight"}), r"the dense model 1 of the file \['x'\]"),
    "module": (
        _set("attributes", "nowhere", to={"groups": 1}),
        "nowhere.groups: stored as 1, but .* has None",
    ),
    "attribute": (
        _set("attributes", "head", "forward", to=1),
        "head.forward: stored as 1, but .* has None",
    ),
    "dunder": (
        _set("attributes", "head", "__class__", to=1),
        "head.__class__: stored as 1, but .* has None",
    ),
    "attribute_none": (_set("attributes", "head", "groups", to=1), "head.groups: stored as 1, but .* has None"),
    "attribute_value": (_set("attributes", "head", "in_features", to=-1), "in_features makes no sense"),
    "attribute_huge": (
        _set("attributes", "head", "in_features", to=2**40),
        "Pruning only makes tensors and layers smaller",
    ),
    "attribute_type": (_set("attributes", "head", "in_features", to="64"), "in_features makes no sense"),
    "attribute_tuple": (_set("attributes", "head", "in_features", to=[64]), "stored as .64,., but the dense model"),
    "recipe": (_set("recipe", to="test_vit"), "recipe makes no sense"),
    "path": (_set("recipe", "name", to="local-dir:/etc"), "recipe.name makes no sense"),
    "hub": (_set("recipe", "name", to="hf-hub:a/b"), "recipe.name makes no sense"),
    "dots": (_set("recipe", "name", to="../test_vit"), "recipe.name makes no sense"),
    "other_model": (_set("recipe", "name", to="vit_tiny_patch16_224"), r"not the architecture .*'blocks\.10\."),
    "no_model": (_set("recipe", "name", to="test_vot"), "'test_vot' .*could not be created: .*installed is timm"),
    "larger_model": (
        _set("recipe", "arguments", "num_classes", to=2),
        r"head\.bias: stored as .*shape=\(3,\)",
    ),
    "huge_model": (_set("recipe", "arguments", "num_classes", to=10**12), "recipe.arguments makes no sense"),
    "nested_huge": (_set("recipe", "arguments", "img_size", to=[32, 10**9]), "recipe.arguments makes no sense"),
    "bad_argument": (_set("recipe", "arguments", "nonsense", to=1), "could not be created"),
    "checkpoint": (_set("recipe", "arguments", "checkpoint", to="/x.pth"), "recipe.arguments makes no sense"),
    "checkpoint_path": (_set("recipe", "arguments", "checkpoint_path", to="/x"), "recipe.arguments makes no sense"),
    "pretrained": (_set("recipe", "arguments", "pretrained", to=True), "recipe.arguments makes no sense"),
    "overlay": (
        _set("recipe", "arguments", "pretrained_cfg_overlay", to={"file": "/x.pth"}),
        "recipe.arguments makes no sense",
    ),
    "config_key": (_set("data_config", "url", to="x"), "data_config makes no sense: 'url' is unknown"),
    "config_size": (_set("data_config", "input_size", to=[3, -1, 5]), "data_config.input_size makes no sense"),
    "config_mean": (_set("data_config", "mean", to="a"), "data_config.mean makes no sense"),
    "config_word": (_set("data_config", "crop_mode", to=1), "data_config.crop_mode makes no sense"),
    "config_share": (_set("data_config", "crop_pct", to=True), "data_config.crop_pct makes no sense"),
    "weights": (_set("weights", to=None), "weights makes no sense"),
    "size": (_set("weights", "bytes", to=-1), "weights.bytes makes no sense"),
    "size_less": (_set("weights", "bytes", to=7), "truncated or tampered with: .* expected at most 7"),
    "size_more": (_set("weights", "bytes", to=2**40), "truncated or tampered with: its size or its SHA-256"),
    "sum": (_set("weights", "sha256", to="0" * 64), "truncated or tampered with: its size or its SHA-256"),
    "report": (lambda body: body.pop("report"), "makes no sense: 'report' is missing"),
}


@pytest.mark.parametrize("case", WILD)
def test_load_refuses_wild_values(case: str, saved: Path) -> None:
    change, message = WILD[case]
    _rewritten(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


TEXTS = {
    "edited": (lambda text: text.replace('"seed": 1', '"seed": 2'), "do not match its own SHA-256"),
    "cut": (lambda text: text[: len(text) // 2], "truncated or tampered with: not valid JSON"),
    "empty": (lambda text: "", "truncated or tampered with: not valid JSON"),
    "list": (lambda text: "[1]", "truncated or tampered with: not valid JSON"),
    "deep": (lambda text: "[" * 200_000, "truncated or tampered with: not valid JSON"),
    "constant": (lambda text: text.replace('"seed": 1', '"seed": NaN'), "truncated or tampered with: not valid JSON"),
    "twice": (lambda text: text.replace('"seed": 1', '"seed": 1, "seed": 2'), "do not match its own SHA-256"),
    "digits": (lambda text: text.replace('"seed": 1', '"seed": ' + "1" * 5000), "truncated or tampered with"),
    "pickle": (lambda text: "\x80\x04" + text, "truncated or tampered with"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_load_refuses_broken_json(case: str, saved: Path) -> None:
    change, message = TEXTS[case]
    path = saved / DESCRIPTION
    path.write_bytes(change(path.read_text()).encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_load_refuses_damaged_weights(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for data, message in (
        (whole[:-1], "truncated or tampered with: its size"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "its SHA-256 is not the one"),
        (whole + b"x", "truncated or tampered with: .* expected at most"),
        (b"PK\x03\x04" + whole[4:], "its SHA-256 is not the one"),
    ):
        (saved / WEIGHTS).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            load(saved)


def test_load_refuses_other_weights_with_the_right_sum(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(b"not safetensors")
    _rewritten(saved, _set("weights", to=checkpoint.describe_bytes(b"not safetensors")))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(saved)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_load_refuses_missing_files_directories_and_pipes(name: str, saved: Path, tiny: nn.Module) -> None:
    path, elsewhere = saved / name, saved.with_name("elsewhere")
    path.rename(elsewhere)
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(saved)
    path.symlink_to(elsewhere)
    assert _same(load(saved), tiny)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(saved)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(saved)


def test_load_refuses_a_pickle_unread(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(saved / "boom"),)

    for old in (True, False):
        pickle = saved.parent / f"m{old}.pth"
        torch.save(Bomb(), pickle, _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=r"no such directory.*create\(name, checkpoint=file\)"):
            load(pickle)
        for name in (WEIGHTS, DESCRIPTION):
            (saved / name).write_bytes(pickle.read_bytes())
            with pytest.raises(CheckpointError, match="truncated or tampered with"):
                load(saved)
    assert not (saved / "boom").exists()


def test_load_refuses_files_and_what_is_not_there(saved: Path) -> None:
    for path in (saved / WEIGHTS, saved / "nothing"):
        with pytest.raises(CheckpointError, match=r"there is no such directory\. Pass the directory that save wrote"):
            load(path)


def test_load_without_recipe_needs_a_model_of_the_architecture(tmp_path: Path) -> None:
    save(_Own(), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"saved without a recipe.*load\(path, model=\.\.\.\)"):
        load(tmp_path / "m")
    with pytest.raises(
        CheckpointError,
        match=r"lacks 2 tensors .*'bias', 'weight'.* 7 of the file \['a\.bias'",
    ):
        load(tmp_path / "m", model=nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("seed", range(5))
def test_fuzz(seed: int, saved: Path, tiny: nn.Module) -> None:
    """Each of 30 random damages is refused, or changes nothing (such as one space for another)."""
    source = random.Random(seed)
    originals = {name: (saved / name).read_bytes() for name in (WEIGHTS, DESCRIPTION)}
    refused = 0
    for _ in range(30):
        name = source.choice((WEIGHTS, DESCRIPTION))
        (saved / name).write_bytes(source.choice(DAMAGES)(originals[name], source))
        try:
            loaded = load(saved)
        except CheckpointError:
            refused += 1
        else:
            assert _same(loaded, tiny)
        (saved / name).write_bytes(originals[name])
    assert refused > 20


def _flipped(data: bytes, source: random.Random) -> bytes:
    at = source.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]


def _early_flipped(data: bytes, source: random.Random) -> bytes:
    return _flipped(data[:200], source) + data[200:]


def _truncated(data: bytes, source: random.Random) -> bytes:
    return data[: source.randrange(len(data))]


def _doubled(data: bytes, source: random.Random) -> bytes:
    start, stop = sorted(source.sample(range(len(data)), 2))
    return data[:stop] + data[start:]


def _digit(data: bytes, source: random.Random) -> bytes:
    """Another digit somewhere: valid JSON with another value."""
    places = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
    at = source.choice(places)
    return data[:at] + bytes([48 + (data[at] - 48 + source.randrange(1, 10)) % 10]) + data[at + 1 :]


DAMAGES = (_flipped, _early_flipped, _truncated, _doubled, _digit)


class _Positions(nn.Module):
    """Makes a table for the size of the images, as ConViT does, and keeps it in a buffer that is not stored."""

    table: Tensor

    def __init__(self, *, persistent: bool = False, size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("table", torch.zeros(size, size), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[2]:
            self.table = torch.arange(float(x.shape[2] * x.shape[3])).view(x.shape[2], x.shape[3])
        return (self.conv(x + self.table)).mean((2, 3))


@torch.no_grad()
def test_a_table_that_a_forward_has_made(tmp_path: Path) -> None:
    model, x = _Positions().eval(), torch.randn(2, 3, 9, 9)
    expected = model(x)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", model=_Positions())
    assert torch.equal(loaded.table, model.table)
    assert torch.equal(loaded(x), expected)
    stored = _Positions(persistent=True).eval()
    stored(x)
    save(stored, tmp_path / "stored")
    with pytest.raises(CheckpointError, match=r"table: stored as .*shape=\(9, 9\)"):
        load(tmp_path / "stored", model=_Positions(persistent=True))


def test_a_table_of_another_size_is_not_put_in_the_place_of_one(tmp_path: Path) -> None:
    """Made for another size of images when the model was created, as Swin's masks are: another architecture."""
    save(_Positions(size=9), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"table: stored as .*shape=\(9, 9\)"):
        load(tmp_path / "model", model=_Positions(size=4))


def test_a_model_that_stepped_aside_is_seen_before_anything_expensive(saved: Path) -> None:
    os.replace(saved, checkpoint._aside(saved))
    with pytest.raises(CheckpointError, match=r"saved exists already"):
        checkpoint.check_target(saved)
    checkpoint.check_target(saved, overwrite=True)


# --- the same function ----------------------------------------------------------------------------


def _stride(model: nn.Module) -> None:
    model.get_submodule("conv1.0").stride = (1, 1)  # type: ignore[assignment]


def _pooling(model: nn.Module) -> None:
    model.maxpool = nn.AvgPool2d(3, 2, 1)  # type: ignore[assignment]


def _clipping(model: nn.Module) -> None:
    model.act1 = nn.Hardtanh(0, 1)  # type: ignore[index, assignment]


def _epsilon(model: nn.Module) -> None:
    model.bn1.eps = 1e-3  # type: ignore[assignment]


def _small_resnet(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm_models.create("test_resnet", pretrained=False, num_classes=5, **arguments).eval()


@torch.no_grad()
@pytest.mark.parametrize("change", [_stride, _pooling, _clipping, _epsilon])
def test_what_no_tensor_tells_demands_the_model(
    change: Callable[[nn.Module], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, unchanged, images = _small_resnet(), _small_resnet(), torch.randn(2, 3, 32, 32)
    change(model)
    save(model, tmp_path / "m", size=(3, 32, 32))
    assert "load() will need model=" in caplog.text
    assert re.search(
        r"test_resnet\.\w+ was changed by hand.*computes something else", describe(tmp_path / "m").no_recipe
    )  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"load\(path, model=\.\.\.\).*was changed by hand.*something else"):
        load(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"Every tensor fits, but the outputs .* \(3, 32, 32\) differ by"):
        load(tmp_path / "m", model=unchanged)
    assert torch.equal(load(tmp_path / "m", model=model)(images), model(images))


class _Twice(nn.Module):
    """Returns a dictionary, and may double what it returns."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.conv(x)
        return {"features": [features, features.mean((2, 3))], "scaled": features[:, :1] * self.factor, "n": 3}


def test_a_model_of_ones_own_is_compared_where_the_size_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _Twice(1.0)
    save(model, tmp_path / "unknown")
    assert "load() will not compare outputs: pass size=" in caplog.text
    load(tmp_path / "unknown", model=_Twice(1.1))
    save(model, tmp_path / "known", size=(3, 8, 8))
    load(tmp_path / "known", model=_Twice(1.0))
    with pytest.raises(CheckpointError, match="computes something else"):
        load(tmp_path / "known", model=_Twice(1.1))


def test_the_stored_outputs_are_the_models(tmp_path: Path) -> None:
    """Computed here by other means, in float64."""
    model = _small_resnet(output_stride=16)
    save(model, tmp_path / "m", size=(3, 40, 40))
    example = describe(tmp_path / "m").example
    assert example is not None
    assert example.size == (3, 40, 40)
    generator = np.random.RandomState(0)
    images = [generator.standard_normal((3, 40, 40)), 4 * generator.standard_normal((3, 40, 40))]
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(torch.tensor(np.array(images)))
    assert torch.allclose(torch.tensor(example.outputs, dtype=torch.float64), wanted.flatten(), rtol=1e-4, atol=1e-6)


def test_the_difference_is_relative(tmp_path: Path) -> None:
    """A change of every output by a share of itself: refused above the tolerance, accepted below."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 700))
    save(model, tmp_path / "m", size=(3, 2, 2))
    path = tmp_path / "m" / DESCRIPTION
    body = json.loads(path.read_text())
    assert len(body["example"]["outputs"]) == 234  # every sixth of 1400
    for share, refused in ((0.9e-4, False), (1.1e-4, True)):
        changed = copy.deepcopy(body)
        changed["example"]["outputs"] = [value * (1 + share) for value in body["example"]["outputs"]]
        changed.pop("sha256")
        path.write_text(json.dumps({**changed, "sha256": checksum(changed)}))
        with pytest.raises(CheckpointError, match=r"differ by 0\.00011") if refused else contextlib.nullcontext():
            load(tmp_path / "m", model=nn.Sequential(nn.Flatten(), nn.Linear(12, 700)))


@torch.no_grad()
@pytest.mark.parametrize("classes", [9, 2, 0])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_another_head(name: str, classes: int, tmp_path: Path) -> None:
    model, images = timm_models.create(name, pretrained=False, num_classes=5).eval(), torch.randn(2, 3, 160, 160)
    save(model, tmp_path / "dense")
    model = load(tmp_path / "dense")
    model.reset_classifier(classes)  # type: ignore[operator]
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.num_classes == classes
    assert torch.equal(loaded(images), model(images))


def test_a_head_that_was_replaced_by_hand(tmp_path: Path) -> None:
    """The model itself still tells the old number of classes."""
    model = _small_resnet()
    model.fc = nn.Linear(model.fc.in_features, 8)  # type: ignore[union-attr, arg-type, assignment]
    save(model, tmp_path / "m")
    assert load(tmp_path / "m").num_classes == 8
    model.fc = nn.Linear(model.fc.in_features, 3)  # type: ignore[union-attr, arg-type, assignment]
    save(model, tmp_path / "smaller")
    assert load(tmp_path / "smaller", model=_small_resnet()).num_classes == 3


def test_a_loaded_model_is_trained_and_saved_again(tmp_path: Path) -> None:
    model = _small_resnet()
    _cut(model, torch.arange(9), ("layer2.0.conv1", "layer2.0.bn1"), ("layer2.0.conv2",))
    jbrprune.save(model, tmp_path / "first", report={"macs": 1})
    trained = jbrprune.load(tmp_path / "first").train()
    optimiser = torch.optim.SGD(trained.parameters(), 0.1)
    trained(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimiser.step()
    jbrprune.save(trained, tmp_path / "second", report=describe(tmp_path / "first").report)
    assert trained.training
    assert _same(load(tmp_path / "second"), trained)
    assert not _same(load(tmp_path / "second"), model)
    assert describe(tmp_path / "second").report == {"macs": 1}


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_the_model_inside_of_a_wrapper_is_saved(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = _small_resnet()
    save(wrap(model), tmp_path / "m", size=(3, 32, 32))
    assert _same(load(tmp_path / "m"), model)
