"""The table of layer classes: what it says, and that no width is lost between pruning, saving and loading."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from jbrprune import prune
from jbrprune.checkpoint.checkpoint import load, save
from jbrprune.models import layers, preserve, timm_models
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import remove_units

NETS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "resnext26ts": {},  # groups, fused activations
    "regnety_002": {},
    "nf_regnet_b0": {},  # standardised convolutions
    "mobilenetv3_small_050": {},  # its classifier does not read num_features
    "mobilenetv4_conv_small_035": {},
    "mobileone_s0": {},  # blocks that repeat the widths of their branches
    "convnextv2_atto": {"width": True},
    "poolformer_s12": {},  # group norm of one group
    "inception_next_atto": {},
    "mixer_s32_224": {"width": True, "img_size": 64},
    "vit_tiny_patch16_224": {"width": True, "depth": 2, "img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "img_size": 64, "window_size": 4},
}
OTHERS: dict[str, dict[str, Any]] = {"densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)}}


def pruned(name: str) -> tuple[nn.Module, timm_models.Recipe, torch.Tensor]:
    """A net that has lost every other unit of every group."""
    model, recipe, images = _pruned_once(name)
    return copy.deepcopy(model), recipe, images


@functools.cache
def _pruned_once(name: str) -> tuple[nn.Module, timm_models.Recipe, torch.Tensor]:
    torch.manual_seed(0)
    arguments = dict((NETS | OTHERS).get(name, {}))
    width = arguments.pop("width", False)
    recipe = timm_models.Recipe(name, {"num_classes": 5, **arguments})
    model, images = timm_models.build(recipe).eval(), torch.randn(2, 3, 64, 64)
    groups = find_groups(model, images, width=width).groups
    remove_units(model, groups, {group.name: torch.arange(0, group.size - 1, 2) for group in groups})
    return model, recipe, images


def sizes(model: nn.Module) -> dict[str, object]:
    """Every attribute of every module that is an integer or a tuple of integers, whether the table knows it or not."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if layers.is_size(value)
    }


@pytest.mark.parametrize("name", NETS)
def test_every_width_that_pruning_changes_is_restored(name: str, tmp_path: Path) -> None:
    model, recipe, images = pruned(name)
    dense = sizes(timm_models.build(recipe))
    assert len([key for key, value in sizes(model).items() if dense[key] != value]) >= 8
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert sizes(loaded) == sizes(model)
    assert loaded.feature_info == model.feature_info
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


HEADS = ("test_resnet", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "dla46x_c", "repvit_m0_9", "hgnetv2_b0")
HEADS += ("ghostnet_050", "convnextv2_atto", "vit_tiny_patch16_224")


@pytest.mark.parametrize("name", HEADS)
def test_a_pruned_model_takes_a_new_classifier(name: str, tmp_path: Path) -> None:
    """Larger, smaller or none; it trains, and is saved and loaded."""
    model, _, images = pruned(name)
    for classes in (9, 2, 0):
        model.reset_classifier(classes)  # type: ignore[operator]
        model.train()(images).square().sum().backward()
        with torch.no_grad():
            expected = model.eval()(images)
            assert expected.shape == (2, classes or model.head_hidden_size)
            save(model, tmp_path / str(classes), size=images.shape[1:])
            loaded = load(tmp_path / str(classes))
            assert loaded.num_classes == classes
            assert torch.equal(loaded(images), expected)


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m0_9", "repghostnet_050"])
def test_the_branches_of_a_pruned_block_still_merge(name: str) -> None:
    model, _, images = pruned(name)
    with torch.no_grad():
        expected = model(images)
        merged = timm.utils.model.reparameterize_model(model)
        assert len(list(merged.modules())) < len(list(model.modules()))
        torch.testing.assert_close(merged(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "dim", "out", "into"),
    [
        (nn.Conv2d(4, 6, 3), 1, 6, 4),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), 1, 6, 4),
        (nn.Linear(4, 6), -1, 6, 4),
        (nn.BatchNorm1d(6), 1, 6, None),
        (nn.GroupNorm(2, 6), 1, 6, None),
        (nn.LayerNorm(6), -1, 6, None),
        (nn.LayerNorm([3, 6]), None, 6, None),
        (nn.RMSNorm(6), -1, 6, None),
        (timm.layers.RmsNorm(6), -1, 6, None),
        (timm.layers.LayerNorm2d(6), 1, 6, None),
        (timm.layers.LayerNormAct2d(6), 1, 6, None),
        (timm.layers.BatchNormAct2d(6), 1, 6, None),
        (timm.layers.SimpleNorm2d(6, affine=False), 1, 6, None),
        (timm.layers.LayerScale(6), -1, 6, None),
        (GlobalResponseNorm(6), -1, 6, None),
        (GlobalResponseNorm(6, channels_last=False), 1, 6, None),
        (nn.ReLU(), None, None, None),
        (nn.MultiheadAttention(6, 2), None, None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_the_table_says(module: nn.Module, dim: int | None, out: int | None, into: int | None) -> None:
    assert layers.channel_dim(module) == dim
    assert layers.width_of(module, "out") == out
    assert layers.width_of(module, "in") == into


def test_size_attributes_go_from_one_module_to_another() -> None:
    one, other = nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4)
    layers.set_size_attributes(other, layers.size_attributes(one))
    assert layers.size_attributes(other) == {"groups": 2, "in_channels": 4, "out_channels": 8}


@pytest.mark.parametrize("name", ["test_resnet", "densenet121", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_feature_info_says_the_widths_of_the_pruned_model(name: str) -> None:
    model, _, images = pruned(name)
    said = [feature["num_chs"] for feature in model.feature_info]  # type: ignore[union-attr]
    got: dict[str, int] = {}

    def record(name: str):
        return lambda module, args, kwargs, output: got.update({name: output.shape[1 if output.dim() == 4 else -1]})

    names = [feature["module"] for feature in model.feature_info]  # type: ignore[union-attr]
    with preserve.hooked(model, {name: record(name) for name in names}):
        model(images)
    assert said == [got[name] for name in names]


def test_feature_info_of_a_model_that_is_pruned_in_place() -> None:
    model, images = (
        timm.create_model("resnet10t", num_classes=4, zero_init_last=False, channels=(16, 24, 32, 48)).eval(),
        torch.randn(20, 3, 32, 32),
    )
    expected = prune(model, images, macs=0.5, steps=1, repair=None, progress=False).model.feature_info
    assert [feature["num_chs"] for feature in expected] != [feature["num_chs"] for feature in model.feature_info]
    prune(model, images, macs=0.5, steps=1, repair=None, progress=False, inplace=True)
    assert model.feature_info == expected


def test_a_smaller_head_has_the_scale_of_its_size_and_a_stored_zero_does_not_divide() -> None:
    attention = timm.layers.Attention(24, num_heads=3)
    layers.set_size_attributes(attention, {"attn_dim": 6, "head_dim": 2})
    assert (attention.attn_dim, attention.head_dim) == (6, 2)
    assert attention.scale == pytest.approx(2**-0.5)
    layers.set_size_attributes(attention, {"head_dim": 0})  # of a damaged file, which is refused where it is run
    assert attention.head_dim == 0
