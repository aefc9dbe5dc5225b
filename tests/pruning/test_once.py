"""Every fact is computed once: one model, few copies, one removal and one count of multiply-accumulates a step."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import cases
import pytest
import timm
import torch
from torch import nn

from jbrprune import prune, sparsify
from jbrprune.budgets import cost
from jbrprune.models import timm_models
from jbrprune.pruning import channels

IMAGES = cases.images(16, 32).float()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often things happened; copies that share all tensors cost nothing and are counted apart."""
    found: Counter[str] = Counter()

    def watch(place: Any, name: str, what: str) -> None:
        original = getattr(place, name)

        def counted(*args: Any, **options: Any) -> Any:
            found[what] += 1
            return original(*args, **options)

        monkeypatch.setattr(place, name, counted)

    original = copy.deepcopy

    def deepcopy(thing: Any, memo: dict | None = None, *rest: Any) -> Any:
        if isinstance(thing, nn.Module) and not found["inside"]:
            found["inside"] += 1
            found["copies that share" if memo else "copies"] += 1
            made = original(thing, memo, *rest)
            found["inside"] -= 1
            return made
        return original(thing, memo, *rest)

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    watch(timm_models.timm, "create_model", "models")
    watch(cost, "FlopCounterMode", "counts")
    watch(channels, "remove_units", "removals")
    return found


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(timm.create_model("test_resnet", num_classes=4)).float()


def test_a_run_on_channels(counts: Counter[str]) -> None:
    model = resnet()
    counts.clear()
    prune(model, IMAGES, macs=0.7, steps=3, progress=False)
    # the model that shrinks, the one on which removal is tried, and in each step one for each of two ways to repair
    assert counts["copies"] <= 2 + 3 * 2
    assert counts["copies that share"] <= 6  # on trial
    assert (counts["models"], counts["removals"], counts["counts"]) == (0, 3, 1 + 3)


def test_a_model_by_name_is_made_once(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm_models.create
    monkeypatch.setattr(timm_models, "create", lambda name: made(name, pretrained=False, num_classes=4))
    prune("test_resnet", IMAGES, macs=0.9, steps=1, criterion="jbr_margin", repair=None, progress=False)
    assert counts["models"] == 1


def test_a_run_on_single_weights(counts: Counter[str]) -> None:
    model = resnet()
    counts.clear()
    sparsify(model, IMAGES, sparsity=0.7, steps=3, progress=False)
    assert counts["copies"] <= 1 + 3 * 2
    assert (counts["models"], counts["counts"]) == (0, 1)
