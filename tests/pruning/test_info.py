"""What `jbrprune info` lists, against removing units one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import cases
import pytest
import timm
import torch
from torch import Tensor, nn

from jbrprune import info, prune
from jbrprune.budgets.budget import Floors
from jbrprune.budgets.cost import count_macs
from jbrprune.errors import ArgumentError, BudgetError, UnsupportedModelError
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
    options: dict[str, Any] = {"progress": False, "steps": 1, "repair": None, "structure": "channels"}
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


def test_a_budget_out_of_reach_names_what_holds_the_width() -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, 2, 1)
    held = nn.utils.parametrizations.weight_norm(nn.Conv2d(24, 24, 3, 1, 1))
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
    model = nn.Sequential(first, nn.ReLU(), held, nn.ReLU(), last, nn.ReLU(), *pool)
    with pytest.raises(BudgetError, match=r"Most of it stays in 2 \(8\d% of it\): .*parametrize.*; 0 \(1\d% of it\): "):
        prune(model, torch.randn(12, 3, 32, 32), macs=0.5, floors=Floors(channels=1), progress=False)


class Reader(nn.Module):
    """Images are read row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.rnn, self.fc, self.head = nn.LSTM(16 * 8, 64, batch_first=True), nn.Linear(64, 400), nn.Linear(400, 5)

    def forward(self, x: Tensor) -> Tensor:
        f = self.b(self.a(x).relu()).relu().permute(0, 3, 1, 2).flatten(2)
        return self.head(self.fc(self.rnn(f)[0][:, -1]).relu())


def test_the_share_that_is_left_counts_recurrent_layers() -> None:
    torch.manual_seed(0)
    with pytest.raises(BudgetError, match=r"Most of it stays in rnn \(7\d% of it\): at its floor"):
        prune(Reader(), torch.randn(12, 3, 32, 32), macs=0.5, progress=False)
    result = prune(Reader(), torch.randn(12, 3, 32, 32), macs=0.9, steps=1, progress=False)
    macs = []
    for net in (result.model, Reader()):
        a, b, fc = net.a.out_channels, net.b.out_channels, net.fc.out_features  # type: ignore[union-attr]
        matrices = sum(weight.numel() for weight in net.rnn.parameters() if weight.dim() > 1)  # type: ignore[union-attr]
        macs.append(8 * matrices + 256 * 27 * a + 64 * 9 * a * b + 69 * fc)
    assert result.report.pruned.macs == macs[0]
    assert macs[0] / macs[1] <= 0.9


def test_operators_of_unknown_cost_are_said_by_info_and_in_the_report() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(x).abs()

    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    model = nn.Sequential(Spectrum(), nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), *pool)
    images = torch.randn(12, 3, 16, 16)
    assert info(model, images).uncounted == {"aten._fft_r2c": "0"}
    report = prune(model, images, macs=0.8, steps=1, progress=False).report
    assert "0: the multiply-accumulates of aten._fft_r2c are not counted." in report.notes


class Branches(nn.Module):
    """Dark images go one way, light ones another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.fc = nn.Conv2d(3, 24, 3, 1, 1), nn.Conv2d(24, 24, 3, 2, 1), nn.Linear(24, 5)
        self.dark, self.light = nn.Conv2d(24, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        way = self.light if x.mean() > 0 else self.dark
        return self.fc(way(self.a(self.first(x).relu()).relu()).relu().mean((2, 3)))


def test_what_some_batches_run_only_keeps_its_width_and_is_named() -> None:
    torch.manual_seed(0)
    light = torch.rand(20, 3, 16, 16)
    how: dict[str, Any] = {"macs": 0.8, "steps": 1, "batch_size": 10, "progress": False}
    result = prune(Branches(), [light[:10], -light[10:]], **how)
    assert result.model(light).shape == result.model(-light).shape == (20, 5)
    assert result.report.removed.keys() == {"first"}
    notes = " ".join(result.report.notes)
    assert "light runs for some of the images only" in notes
    alone = prune(Branches(), light, **how)
    assert [note for note in alone.report.notes if note.startswith("dark keeps its width: it ran for none")]
    held = prune(Branches(), light, eval_data=-light, **how)  # on images of the report as well
    assert held.model(-light).shape == (20, 5)
