"""The trial: units go from a copy, and what is left must compute what the masked model does, sample by sample."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jbrprune.errors import ModelError, UnsupportedModelError
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.structure.discovery import Found
from jbrprune.structure.groups import Group
from jbrprune.structure.slicing import masked_units, remove_units

TOLERANCE = 1e-8
"""Largest difference between mask and removal in float64, relative to the largest logit."""


def verify_groups(model: nn.Module, images: Tensor, found: Found, *, seed: int = 0) -> Found:
    """Remove random units from a copy and keep the groups for which removal equals the mask.

    The copy is in float64; its norms, scales and biases are perturbed, and weights that are all but zero, so that
    a tiny factor cannot hide a wrong coupling. Every group loses another share of its units, so that widths which are
    tied without the graph knowing it do not fit by chance.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` example input; noise is added to it.
        found: What `find_groups` found.
        seed: Seeds the choice of units, the perturbation and the noise.

    Returns:
        The groups that passed, and whose relevance can be computed; the others are kept, with what went wrong.

    Raises:
        ModelError: The model cannot be copied.
        UnsupportedModelError: There was nothing to try, nothing passed, or what passed one by one fails together.
    """
    generator = torch.Generator().manual_seed(seed)
    trial = _perturb_copy(model, generator)
    images = images.to(preserve.device_of(trial), torch.float64)
    images = images + torch.randn(images.shape, generator=generator, dtype=torch.float64).to(images.device)

    def failure(groups: Sequence[Group]) -> str | None:
        return _find_failure(trial, images, groups, generator)

    failed = find_culprits(found.groups, failure)
    skipped = found.skipped | {name: f"removal does not equal the mask here: {why}" for name, why in failed.items()}
    passed = tuple(group for group in found.groups if group.name not in failed)
    together = failure(passed) if passed and failed else None
    if passed and not together:
        unknown = unscorable(trial, images, passed)
        skipped |= unknown
        passed = tuple(group for group in passed if group.name not in unknown)
    if together or not passed:
        what = "no group of channels passed the trial"
        if together:
            what = f"what can go one by one fails together: {together}"
        why = "It has no channels that one layer makes and another reads"
        if skipped:
            reasons = [f"{name}: {reason}" for name, reason in skipped.items()]
            why = f"Why layers are kept: {'; '.join(reasons[:5])}"
        raise UnsupportedModelError(f"{type(model).__name__}: nothing can be removed safely: {what}. {why}.")
    return Found(passed, skipped)


def find_culprits(groups: Sequence[Group], failure: Callable[[Sequence[Group]], str | None]) -> dict[str, str]:
    """The groups that fail, and why, by halving the set as long as it fails."""
    why = failure(groups) if groups else None
    if why is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: why}
    middle = len(groups) // 2
    return find_culprits(groups[:middle], failure) | find_culprits(groups[middle:], failure)


def _perturb_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64 and eval mode without weights, scales and statistics that would hide a wrong coupling."""
    trial = copy_model(model)
    if preserve.device_of(trial).type == "mps":  # no float64 there
        trial = trial.cpu()
    trial = trial.double().eval()

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)

    with torch.no_grad():
        for parameter in trial.parameters():
            fan_in = max(1, parameter[:1].numel()) if parameter.dim() > 1 else 1
            if parameter.dim() <= 1 or parameter.abs().max() < 0.01 / math.sqrt(fan_in):
                parameter.add_((0.6 * noise(parameter) - 0.3) / math.sqrt(fan_in))
        for name, buffer in trial.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.5 + noise(buffer))
            elif name.endswith("running_mean"):
                buffer.add_(0.2 * noise(buffer) - 0.1)
    return trial


@torch.no_grad()
def _find_failure(trial: nn.Module, images: Tensor, groups: Sequence[Group], generator: torch.Generator) -> str | None:
    """What goes wrong when units of these groups go, or None: some of each, then by turns all but one and one."""
    for some in (True, False):
        selection = {}
        for number, group in enumerate(groups):
            if group.size > 1:
                drawn = int(torch.randint(1, group.size, (), generator=generator)) if some else 0
                count = drawn or (1 if number % 2 else group.size - 1)
                selection[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values
        try:
            smaller = copy_model(trial, share=True)  # removal replaces tensors, it does not change them
            remove_units(smaller, groups, selection)
            got = logits_of(smaller(images))
            with masked_units(trial, groups, selection):
                expected = logits_of(trial(images))
            difference = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))
        except Exception as error:  # whatever a foreign forward raises is the answer
            return f"{type(error).__name__}: {error}"
        if not difference <= TOLERANCE:
            return f"the logits differ by {difference:.1e}"
    return None


# --- samples apart --------------------------------------------------------------------------------


def unscorable(model: nn.Module, images: Tensor, groups: Sequence[Group]) -> dict[str, str]:
    """Groups whose channels could go, but whose relevance is not defined per sample.

    Their consumers see no batch, as in a network that computes a position bias.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` example input; only the first image is used.
        groups: The groups.

    Returns:
        Name of a group -> why. Empty where not even the logits of samples are apart: then the criterion says so.
    """
    readers = {group.name: [member.axis[0] for member in group.side("in")] for group in groups}
    with preserve.inference_state(model):
        _, reasons = find_mixed_rows(model, images[:1], sorted({name for names in readers.values() for name in names}))
    if "the logits" in reasons:
        return {}
    return {group: reasons[name] for group, names in readers.items() for name in names if name in reasons}


def check_samples_apart(model: nn.Module, images: Tensor, names: Sequence[str]) -> set[str]:
    """Refuse a model in which a layer's rows do not belong to the samples, in order.

    Returns:
        The names of the modules that were called.

    Raises:
        ModelError: Names the first such layer, or the logits.
    """
    called, mixed = find_mixed_rows(model, images, names)
    for why in mixed.values():
        raise ModelError(why)
    return called


def find_mixed_rows(model: nn.Module, images: Tensor, names: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """Change one of three samples: only its rows may change, in the middle third of every activation.

    Returns:
        The names of the modules that were called; and those (and ``the logits``) where other rows change, with why.
    """
    one = images[:1]
    other = one.flip(-1) + one.std(correction=0).clamp_min(1e-3) * torch.linspace(-1, 1, one.shape[-1]).to(one)
    first, second = (_row_sums(model, torch.cat([one, middle, one]), names) for middle in (one, other))
    calls = {name: list(zip(rows, second.get(name, ()), strict=True)) for name, rows in first.items()}
    still = [name for name, pairs in calls.items() if any(len(b) and torch.equal(b, a) for b, a in pairs)]
    alone = _row_sums(model, images[:1], [name for name in still if name != "the logits"]) if still else {}
    mixed = {}
    for name, pairs in calls.items():
        # Where nothing changes there need not be samples at all: then the rows are as many for one image.
        fixed = name in alone and any(3 * len(a) != len(b) for (b, _), a in zip(pairs, alone[name], strict=True))
        if fixed or not all(_rows_apart(before, after) for before, after in pairs):
            mixed[name] = (
                f"{name}: the first dimension ({len(pairs[0][0])} rows for 3 images) is not the batch, or samples "
                "influence each other (a batch norm without stored statistics?), or the forward pass is random in "
                "eval mode. Per-sample relevances are not defined there. Put this layer into `ignore`, or make the "
                "model treat samples apart."
            )
    return set(first), mixed


def _row_sums(model: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """Name -> per call, the sum of absolute values of each row of the module's input; and of the logits."""
    sums: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        sums[name].append(x.detach().reshape(len(x), -1).abs().sum(1, dtype=wide).cpu())

    def record(name: str) -> preserve.Hook:
        return lambda module, args, kwargs: note(name, preserve.input_of(args, kwargs))

    with torch.no_grad(), preserve.hooked(model, forward_pre={name: record(name) for name in names}):
        note("the logits", logits_of(model(images)))
    return sums


def _rows_apart(first: Tensor, second: Tensor) -> bool:
    third = len(first) // 3
    if len(first) != len(second) or len(first) % 3:
        return False
    changed = (first - second).abs() > 1e-3 * first.abs().clamp_min(1e-12)
    return not (changed[:third].any() or changed[2 * third :].any())
