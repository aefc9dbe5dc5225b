"""What `jbrprune info` lists, against removing units one by one."""

from __future__ import annotations

import json
from collections.abc import Callable

import cases
import pytest
import timm
import torch
from torch import nn

from jbrprune import info, prune
from jbrprune.budgets.budget import Floors
from jbrprune.budgets.cost import count_macs
from jbrprune.errors import ArgumentError, UnsupportedModelError
from jbrprune.evaluation.agreement import parameters_of
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import remove_units

IMAGES = cases.images(2, 32).float()


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=4, img_size=32, depth=2)


@pytest.mark.parametrize("make", [resnet, vit])
def test_a_unit_costs_what_goes_with_it(make: Callable[[], nn.Module]) -> None:
    found = info(make(), IMAGES)
    assert found.macs == sum(count_macs(make(), IMAGES).values())
    assert found.params == parameters_of(make())
    assert found.input_size == (3, 32, 32)
    groups = find_groups(make(), IMAGES).groups
    assert [(row.group, row.kind, row.units) for row in found.rows] == [(g.name, g.kind, g.size) for g in groups]
    for row, group in zip(found.rows, groups, strict=True):
        model = make()
        layers = {name for name, module in model.named_modules() if any(m.axis[0] == name for m in group.members)}
        assert row.layers == len(layers)
        remove_units(model, groups, {group.name: torch.tensor([0])})
        assert row.macs_per_unit == found.macs - sum(count_macs(model, IMAGES).values())
        assert row.params_per_unit == found.params - parameters_of(model)


@pytest.mark.parametrize("min_channels", [1, 8, 24])
def test_how_far_it_can_go(min_channels: int) -> None:
    model = vit()
    found = info(model, IMAGES, floors=Floors(channels=min_channels))
    groups = find_groups(model, IMAGES).groups
    left = {group.name: 1 if group.kind == "head" else min_channels for group in groups}
    remove_units(model, groups, {g.name: torch.arange(left[g.name], g.size) for g in groups})
    assert found.least_macs == pytest.approx(sum(count_macs(model, IMAGES).values()) / found.macs)
    assert found.least_params == pytest.approx(parameters_of(model) / found.params)


def test_it_can_really_go_that_far_and_no_further() -> None:
    least = info(vit(), IMAGES).least_macs
    images = cases.images(12, 32).float()
    options = {"progress": False, "steps": 1, "repair": None}
    assert prune(vit(), images, macs=least + 1e-9, **options).report.kept == pytest.approx(least)
    with pytest.raises(ArgumentError, match=f"at its floor {least:.3f}"):
        prune(vit(), images, macs=least - 1e-3, **options)


def test_what_keeps_its_width_and_why() -> None:
    found = info(vit(), IMAGES, ignore=["blocks.1.*"])
    assert found.skipped["head"] == "the classifier"
    assert found.skipped["blocks.1.mlp.fc1"] == "ignored on request"
    assert "width=True" in info(vit(), IMAGES).skipped["patch_embed.proj"]
    assert {row.group for row in found.rows} == {"blocks.0.attn", "blocks.0.mlp.fc1"}
    wide = info(vit(), IMAGES, floors=Floors(width=True))
    assert {row.kind for row in wide.rows} == {"channel", "head", "width"}


def test_a_timm_model_says_which_images_it_wants() -> None:
    assert info(vit()).input_size == (3, 32, 32)
    assert info(timm.create_model("test_resnet", in_chans=1)).input_size == (1, 160, 160)


def test_another_model_has_to_be_told() -> None:
    with pytest.raises(ArgumentError, match="Concat does not say which images it wants: pass images="):
        info(cases.Concat())
    assert info(cases.Concat(), cases.images(2).float()).rows


def test_nothing_to_remove() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing can be removed safely"):
        info(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), cases.images(2).float())


def test_the_model_is_left_as_it_was(fingerprint: Callable[[nn.Module], dict]) -> None:
    model = resnet().train()
    before = fingerprint(model)
    info(model, IMAGES)
    info(model)
    assert fingerprint(model) == before


def test_it_is_json() -> None:
    found = info(vit())
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["rows"][0]["group"] == found.rows[0].group
    assert facts["skipped"] == found.skipped
    assert facts["macs"] == found.macs
