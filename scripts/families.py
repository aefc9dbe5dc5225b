"""What is done to one model in the check of compatibility: jbrprune's way, and torch-pruning's example recipe."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

import jbrprune
from jbrprune.budgets.cost import cost_model, count_macs
from jbrprune.budgets.selection import Floors, select
from jbrprune.errors import JBRError
from jbrprune.models import timm_models
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.pruning.api import Info
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.slicing import masked_units, remove_units
from jbrprune.structure.verification import TOLERANCE

SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
CLASSES = 10
TARGET = 0.7
FLOOR = 1
"""Channels of every group that stay: small nets have layers of few channels."""

SATURATED = 1e4
"""Logits beyond it have a softmax without gradient."""

Stage = Callable[[str], None]


def smallest(module: str) -> str:
    """The model of a timm module with the fewest parameters."""
    return min(timm.list_models(module=module), key=lambda name: (_parameters(name), name))


def _parameters(name: str) -> int:
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES)
    except Exception:  # some compute with values while they are made
        model = timm.create_model(name, num_classes=CLASSES)
    return sum(parameter.numel() for parameter in model.parameters())


def made(name: str) -> tuple[nn.Module, int]:
    """A model in eval mode with perturbed parameters, for the smallest images that it accepts; their size."""
    why = []
    for size in SIZES:
        for options in ({"img_size": size}, {}):
            arguments: dict[str, Any] = {"pretrained": False, "num_classes": CLASSES, **options}
            try:
                torch.manual_seed(0)
                model = timm_models.create(name, **arguments).eval()
                with torch.no_grad():
                    model(torch.zeros(2, 3, size, size))
            except Exception as error:  # whatever a foreign constructor or forward raises: not this size
                why.append(f"{size} px: {type(error).__name__}: {error}"[:120])
                continue
            perturb(model)
            _scale(model, images_of(size))
            return model, size
    raise RuntimeError(f"{name} accepts no input: {'; '.join(why[-2:])}")


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Norms, scales, biases and statistics apart from ones and zeros; nothing is all but zero."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator) - 0.5

    for parameter in model.parameters():
        if parameter.dim() <= 1:
            parameter.add_(0.4 * noise(parameter))
        elif parameter.abs().max() < 1e-2:
            parameter.add_(0.2 * noise(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1 + noise(buffer))
        elif name.endswith("running_mean"):
            buffer.add_(0.2 * noise(buffer))


@torch.no_grad()
def _scale(model: nn.Module, images: Tensor) -> None:
    """Bring logits that random weights have made huge, which saturate any softmax, to a size of 1."""
    largest = float(logits_of(model(images)).abs().max())
    if largest > SATURATED:
        for parameter in model.get_classifier().parameters():
            parameter.div_(largest)


def images_of(size: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- jbrprune ------------------------------------------------------------------------------------


def pruned(name: str, stage: Stage) -> dict:
    """Everything a user does with a model, checked on the way."""
    walk = _Walk(stage)
    walk.to("make")
    try:
        model, size = made(name)
    except Exception as error:  # whatever a foreign constructor raises
        return walk.outcome("failed", f"make: {type(error).__name__}: {error}")
    walk.known["pixels"] = size
    return checked(model, images_of(size), walk)


def checked(model: nn.Module, images: Tensor, walk: _Walk | None = None) -> dict:
    """The same for any model."""
    walk = walk or _Walk(lambda name: None)
    try:
        return _walked(model, images, walk)
    except _Wrong as error:
        return walk.outcome("wrong", str(error))
    except JBRError as error:
        early = walk.current == "info"
        return walk.outcome("refused" if early else "failed", f"{walk.current}: {type(error).__name__}: {error}")
    except Exception as error:  # it is this that is looked for
        return walk.outcome("failed", f"{walk.current}: {type(error).__name__}: {error}")


class _Wrong(Exception):
    """A result that is not what it should be."""


class _Walk:
    """Where we are, what is known, how long each stage took."""

    def __init__(self, stage: Stage) -> None:
        self.say, self.current, self.began = stage, "", time.perf_counter()
        self.known: dict[str, object] = {}
        self.stages: dict[str, float] = {}

    def to(self, stage: str) -> None:
        self._settle()
        self.current = stage
        self.say(stage)

    def outcome(self, status: str, reason: str) -> dict:
        self._settle()
        return {"status": status, "stage": self.current, "reason": reason[:600], **self.known, "stages": self.stages}

    def _settle(self) -> None:
        now = time.perf_counter()
        if self.current:
            self.stages[self.current] = round(now - self.began, 1)
        self.began = now


def _walked(model: nn.Module, images: Tensor, walk: _Walk) -> dict:
    walk.to("info")
    listed = jbrprune.info(model, images[:2], floors=Floors(channels=FLOOR))
    share = max(TARGET, listed.least_macs + 0.002)
    walk.known |= {"least": round(listed.least_macs, 4), "groups": len(listed.rows), "kept": _why_kept(listed)}
    if share >= 1:
        return walk.outcome("refused", f"what can be removed costs no more than 0.2 % of the MACs. {_shown(listed)}")
    walk.to("score")
    scores = jbrprune.score(model, images, batch_size=4, progress=False)
    assert isinstance(scores, jbrprune.Scores)
    _check(all(bool(values.isfinite().all()) for values in scores.values().values()), "scores are not finite")
    _check(any(float(values.max()) > 0 for values in scores.values().values()), "every score is zero")
    walk.to("prune")
    options: dict = {"macs": share, "floors": Floors(channels=FLOOR), "batch_size": 4, "progress": False}
    result = jbrprune.prune(model, images, criterion=scores, repair=None, **options)
    before, after = (sum(count_macs(m, images[:1]).values()) for m in (model, result.model))
    walk.known["reached"] = round(after / before, 4)
    _check(after <= share * before * 1.0001, f"asked for {share:.4f} of the MACs, {after / before:.4f} are left")
    walk.to("mask")
    _check_mask(model, result.model, images[:2], scores.groups, _chosen(model, images, scores, share))
    walk.to("backward")
    _check_backward(model, result.model, images[:2])
    walk.to("load")
    _check_load(model, result, images[:2])
    walk.to("export")
    walk.known["export"] = _exported(model, result.model, images[:2])
    walk.to("defaults")
    _check_defaults(model, images, options)
    met = listed.least_macs <= TARGET
    return walk.outcome("budget" if met else "deepest", "" if met else _shown(listed))


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


def _chosen(model: nn.Module, images: Tensor, scores: jbrprune.Scores, share: float) -> Selection:
    """The choice that `prune` makes in one step with these scores, made again."""
    groups = scores.groups
    cost = cost_model("macs", model, images[:2], groups)
    sizes = {group.name: group.size for group in groups}
    floors = Floors(channels=FLOOR)
    return select(scores.values(), groups, cost, share * cost.total, floors=floors, dense_sizes=sizes)


def _check_mask(
    dense: nn.Module, smaller: nn.Module, images: Tensor, groups: tuple[Group, ...], chosen: Selection
) -> None:
    """What came out is the dense model without the chosen units, and computes what the masked dense model computes."""
    twin = copy_model(dense)
    remove_units(twin, groups, chosen)
    _check_same_tensors(twin, smaller, "prune() and the removal of the same units")
    dense, twin, images = copy_model(dense).double(), twin.double(), images.double()
    with torch.no_grad():
        removed = logits_of(twin(images))
        with masked_units(dense, groups, chosen):
            masked = logits_of(dense(images))
    apart = float((masked - removed).abs().max() / masked.abs().max())
    _check(apart <= TOLERANCE, f"mask and removal differ by {apart:.1e}")


def _check_same_tensors(one: nn.Module, other: nn.Module, what: str) -> None:
    first, second = one.state_dict(), other.state_dict()
    _check(first.keys() == second.keys(), f"{what}: other tensors")
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    _check(not unequal, f"{what}: {', '.join(unequal[:3])} differ")


def _check_backward(dense: nn.Module, smaller: nn.Module, images: Tensor) -> None:
    missing = []
    for model in (copy_model(dense), copy_model(smaller)):
        logits_of(model(images)).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        _check(all(g is None or bool(g.isfinite().all()) for g in gradients.values()), "a gradient is not finite")
        missing.append({name for name, gradient in gradients.items() if gradient is None})
    _check(missing[0] == missing[1], f"no gradient reaches {sorted(missing[1] - missing[0])[:3]}")


@torch.no_grad()
def _check_load(dense: nn.Module, result: jbrprune.PruneResult, images: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "model")
        loaded = jbrprune.load(Path(folder) / "model", model=None if result.recipe else dense)
    _check_same_tensors(loaded, result.model, "saved and loaded")
    same = torch.equal(logits_of(loaded(images)), logits_of(result.model(images)))
    _check(same, "the outputs of the loaded model differ")


@torch.no_grad()
def _exported(dense: nn.Module, smaller: nn.Module, images: Tensor) -> str:
    """``equal``, or why the dense model cannot be exported either."""
    try:
        program = torch.export.export(smaller, (images,))
    except Exception as error:  # if the dense model fails as well, pruning has no part in it
        try:
            torch.export.export(copy_model(dense), (images,))
        except Exception:
            return f"the dense model cannot be exported either: {type(error).__name__}"
        raise
    expected, got = logits_of(smaller(images)), logits_of(program.module()(images))
    apart = float((expected - got).abs().max() / expected.abs().max())
    _check(apart < 1e-4, f"the exported program differs by {apart:.1e}")
    return "equal"


@torch.no_grad()
def _check_defaults(model: nn.Module, images: Tensor, options: dict) -> None:
    """Steps and repairs as they come."""
    result = jbrprune.prune(model, images, steps=2, **options)
    _check(bool(logits_of(result.model(images[:2])).isfinite().all()), "repaired: the logits are not finite")
    _check(result.report.kept <= options["macs"] * 1.0001, f"in steps: {result.report.kept:.4f} of the MACs are left")


def _why_kept(listed: Info) -> dict[str, int]:
    """Reason -> how many groups of channels it keeps; numbers and names left out."""
    plain = (re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", reason)) for reason in listed.skipped.values())
    return dict(Counter(reason[:160] for reason in plain).most_common())


def _shown(listed: Info) -> str:
    expected = ("the classifier", "reaches the model's output")
    reasons = [f"{why} ({n})" for why, n in _why_kept(listed).items() if why not in expected]
    can = f"{len(listed.rows)} groups can shrink, which leaves {listed.least_macs:.3f} of the MACs"
    return f"{can}; kept: {'; '.join(reasons[:3]) or 'what they cannot reach'}"


# --- torch-pruning -------------------------------------------------------------------------------

RATIO = 0.3


def _unfused(name: str) -> tuple[nn.Module, int]:
    """The model with attention by plain products, as in the examples; timm's switch is global and is put back."""
    fused = bool(timm.layers.use_fused_attn())
    timm.layers.set_fused_attn(False)
    try:
        return made(name)
    finally:
        timm.layers.set_fused_attn(fused)


def recipe(name: str, stage: Stage) -> dict:
    """torch-pruning's example for timm models, with the attributes set that its examples mean to set."""
    walk = _Walk(stage)
    try:
        walk.to("make")
        model, size = _unfused(name)
        images = images_of(size, 2)
        before = sum(count_macs(model, images[:1]).values())
        dense = copy.deepcopy(model)
        walk.to("prune")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _prune_by_recipe(model, images)
        walk.to("forward")
        logits = logits_of(model(images))
        walk.to("backward")
        logits.square().sum().backward()
        walk.to("count")
        walk.known["reached"] = round(sum(count_macs(model, images[:1]).values()) / before, 4)
        permuted = _permuted(dense, model)
        if permuted:
            return walk.outcome("wrong", f"the weights of {permuted[0]} (and {len(permuted) - 1} more) are permuted")
        return walk.outcome("works" if walk.known["reached"] < 1 else "unchanged", "")
    except Exception as error:  # it is this that is counted
        return walk.outcome("fails", f"{walk.current}: {type(error).__name__}: {error}"[:300])


def _prune_by_recipe(model: nn.Module, images: Tensor) -> None:
    heads: dict = {}
    attentions = []
    for module in model.modules():
        queries = getattr(module, "qkv", None) or getattr(module, "qkv_proj", None)
        if hasattr(module, "num_heads") and isinstance(queries, nn.Module):
            heads[queries] = module.num_heads
            attentions.append((module, queries))
    classifier = model.get_classifier()
    pruner = tp.pruner.MetaPruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        pruning_ratio_dict={},
        ignored_layers=list(classifier) if isinstance(classifier, tuple | list) else [classifier],
        num_heads=heads,
        customized_pruners={},
        root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
    )
    pruner.step()
    for module, queries in attentions:
        count: Any = pruner.num_heads.get(queries, module.num_heads)
        width: Any = getattr(queries, "out_features", None) or queries.out_channels
        for attribute, value in (
            ("num_heads", count),
            ("head_dim", width // (3 * int(count))),
            ("attn_dim", width // 3),
        ):
            if hasattr(module, attribute):
                setattr(module, attribute, value)


def _permuted(dense: nn.Module, smaller: nn.Module) -> list[str]:
    """Weights of norms that are not a part of the dense ones in the same order."""
    pairs = ((name, dense.get_parameter(name).detach(), part.detach()) for name, part in smaller.named_parameters())
    shrunk = [(name, whole, part) for name, whole, part in pairs if part.dim() == 1 and len(part) < len(whole)]
    return [name for name, whole, part in shrunk if not _in_order(part.tolist(), whole.tolist())]


def _in_order(part: list[float], whole: list[float]) -> bool:
    """Whether the values are found in the others, one after the other."""
    rest = iter(whole)
    return all(value in rest for value in part)
