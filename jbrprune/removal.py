"""Removing units by explicit indices: physically, or as a mask that computes the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from jbrprune import architectures, guest, slicing
from jbrprune.errors import UnsupportedModelError
from jbrprune.groups import Axis, Group, Selection, after_removal, removed_channels
from jbrprune.measure import logits_of
from jbrprune.units import Found

TOLERANCE = 1e-8
"""Largest difference between mask and removal in float64, relative to the largest logit."""


def remove_units(model: nn.Module, groups: Sequence[Group], selection: Selection) -> tuple[Group, ...]:
    """Remove the selected units in place; return the groups of the smaller model."""
    tensors, heads = _split(removed_channels(groups, selection))
    before = architectures.classifier_width(model)
    slicing.remove_channels(model, tensors)
    for (name, _, _), gone in heads.items():
        module = model.get_submodule(name)
        architectures.set_heads(module, architectures.heads_of(module) - len(gone))
    left = after_removal(groups, selection)
    architectures.update_widths(model, before, _token_widths(groups, left))
    return left


@contextlib.contextmanager
def masked_units(model: nn.Module, groups: Sequence[Group], selection: Selection) -> Iterator[None]:
    """Let the un-shrunk model compute what it would without the selected units."""
    with slicing.masked(model, _split(removed_channels(groups, selection))[0]):
        yield


def tried(model: nn.Module, images: Tensor, found: Found, *, seed: int = 0) -> Found:
    """Remove random units from a copy and keep the groups for which removal equals the mask.

    The copy is in float64 and its norms, scales and biases are perturbed, so that a zero or tiny scale
    cannot hide a wrong coupling.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` example input.
        found: What `find_groups` found.
        seed: Seeds the choice of units and the perturbation.

    Returns:
        The groups that passed; the others are kept, with what went wrong.

    Raises:
        UnsupportedModelError: Nothing passed, or what passed one by one fails together.
    """
    generator = torch.Generator().manual_seed(seed)
    trial = _perturbed(model, generator)
    images = images.to(guest.device_of(trial), torch.float64)
    if _failure(trial, images, found.groups, generator) is None:
        return found
    kept, passed = dict(found.kept), []
    for group in found.groups:
        why = _failure(trial, images, (group,), generator)
        if why is None:
            passed.append(group)
        else:
            kept[group.name] = f"removal does not equal the mask here: {why}"
    why = _failure(trial, images, tuple(passed), generator) if passed else "no group passed"
    if why is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: nothing can be removed safely: {why}. Kept layers: "
            + "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:5])
        )
    return Found(tuple(passed), kept)


def _split(gone: Mapping[Axis, Tensor]) -> tuple[dict[Axis, Tensor], dict[Axis, Tensor]]:
    """Axes that hold tensors, and axes that count heads."""
    tensors = {axis: channels for axis, channels in gone.items() if axis[1] != "heads"}
    return tensors, {axis: channels for axis, channels in gone.items() if axis[1] == "heads"}


def _token_widths(groups: Sequence[Group], left: Sequence[Group]) -> dict[int, int]:
    return {before.size: after.size for before, after in zip(groups, left, strict=True) if before.kind == "width"}


def _perturbed(model: nn.Module, generator: torch.Generator) -> nn.Module:
    trial = copy.deepcopy(model)
    if guest.device_of(trial).type == "mps":  # no float64 there
        trial = trial.cpu()
    trial = trial.double().eval()

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)

    with torch.no_grad():
        for parameter in trial.parameters():
            if parameter.dim() <= 1 or not parameter.any():
                parameter.add_(0.6 * noise(parameter) - 0.3)
        for name, buffer in trial.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.5 + noise(buffer))
            elif name.endswith("running_mean"):
                buffer.add_(0.2 * noise(buffer) - 0.1)
    return trial


def _failure(
    trial: nn.Module, images: Tensor, groups: Sequence[Group], generator: torch.Generator
) -> str | None:
    """What goes wrong when half of the units of these groups go, or None."""
    selection = {
        g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 2)].sort().values for g in groups
    }
    with torch.no_grad():
        try:
            with masked_units(trial, groups, selection):
                expected = logits_of(trial(images))
            smaller = copy.deepcopy(trial)
            remove_units(smaller, groups, selection)
            got = logits_of(smaller(images))
        except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises is the answer
            return f"{type(error).__name__}: {error}"
    difference = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))
    return None if difference <= TOLERANCE else f"the logits differ by {difference:.1e}"
