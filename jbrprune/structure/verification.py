"""The trial: units go from a copy, and what is left must compute what the masked model does, sample by sample."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from jbrprune.errors import ModelError, UnsupportedModelError
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model, flatten_returned
from jbrprune.structure.discovery import Found
from jbrprune.structure.groups import Group
from jbrprune.structure.slicing import masked_units, remove_units

TOLERANCE = 1e-8
"""Largest difference between mask and removal in float64, relative to the largest logit."""

FEWEST_PIXELS = 64
"""The trial uses no smaller images than these, in which a stride of 32 leaves attention several positions."""


def verify_groups(model: nn.Module, images: Tensor | Sequence[Tensor], found: Found, *, seed: int = 0) -> Found:
    """Remove random units from a copy and keep the groups for which removal equals the mask.

    The copy is in float64; its norms, scales and biases are perturbed, and weights that are all but zero, so that
    a tiny factor cannot hide a wrong coupling. Every group loses another share of its units, so that widths which are
    tied without the graph knowing it do not fit by chance. The smaller copy must also run in training mode if the
    whole one does: auxiliary heads read nothing in eval mode.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` example input, or several of which some lead through other modules. Noise is added,
            and every second row and column is left out as long as the same modules run.
        found: What `find_groups` found.
        seed: Seeds the choice of units, the perturbation and the noise.

    Returns:
        The groups that passed, and whose relevance can be computed; the others are skipped, with what went wrong, and
        so are modules that did not run.

    Raises:
        ModelError: The model cannot be copied.
        UnsupportedModelError: There was nothing to try, nothing passed, or what passed one by one fails together.
    """
    generator = torch.Generator().manual_seed(seed)
    trial = _perturb_copy(model, generator)
    examples, calls = [], []
    for example in [images] if isinstance(images, Tensor) else images:
        example = example.to(preserve.device_of(trial), torch.float64)
        noise = torch.randn(example.shape, generator=generator, dtype=torch.float64)
        smaller, called = _leave_pixels_out(trial, example + noise.to(example.device))
        examples.append(smaller)
        calls.append(set(called))
    sometimes = set.union(*calls) - set.intersection(*calls)

    def failure(groups: Sequence[Group]) -> str | None:
        return _find_failure(trial, examples, groups, generator)

    unfit = {}
    for group in found.groups:
        for name in sometimes.intersection(group.layers()):
            unfit[group.name] = f"{name} runs for some of the images only"
    offered = [group for group in found.groups if group.name not in unfit]
    failed = find_culprits(offered, failure)
    unfit |= {name: f"removal does not equal the mask here: {why}" for name, why in failed.items()}
    passed = tuple(group for group in found.groups if group.name not in unfit)
    together = failure(passed) if passed else None
    if passed and not together:
        unfit |= unscorable(trial, examples[0], passed)
        passed = tuple(group for group in passed if group.name not in unfit)
    skipped = found.skipped | unfit | _find_idle(trial, examples, set.union(*calls))
    if together or not passed:
        what = "no group of channels passed the trial"
        if together:
            what = f"what can go one by one fails together: {together}"
        why = "It has no channels that one layer makes and another reads"
        if skipped:
            reasons = [f"{name}: {reason}" for name, reason in skipped.items()]
            why = f"Why layers are kept: {'; '.join(reasons[:5])}"
        raise UnsupportedModelError(f"{type(model).__name__}: nothing can be removed safely: {what}. {why}.")
    kept_with = {layer: group.name for group in found.groups if group.name in unfit for layer in group.layers()}
    return Found(passed, skipped, found.kept_with | kept_with)


def find_culprits(groups: Sequence[Group], failure: Callable[[Sequence[Group]], str | None]) -> dict[str, str]:
    """The groups that fail, and why, by halving the set as long as it fails.

    Groups whose names differ in numbers only fail together in most models, block by block. They are tried side by
    side, and all of them are said to fail where the first and the last one do, so that the trial costs few passes.
    """
    alike = {group.name: re.sub(r"\d+", "#", group.name) for group in groups}
    groups = sorted(groups, key=lambda group: alike[group.name])
    why = failure(groups) if groups else None
    if why is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: why}
    if len(groups) > 2 and len(set(alike.values())) == 1:
        first = failure(groups[:1])
        last = first and failure(groups[-1:])
        if first and last:
            others = {group.name: f"as in {groups[0].name}: {first}" for group in groups[1:-1]}
            return {groups[0].name: first, **others, groups[-1].name: last}
    middle = len(groups) // 2
    return find_culprits(groups[:middle], failure) | find_culprits(groups[middle:], failure)


# --- which modules run ----------------------------------------------------------------------------


@torch.no_grad()
def find_called(model: nn.Module, images: Tensor) -> list[str]:
    """Qualified names of the modules that a pass calls, in order."""
    with preserve.recorded_calls(model) as called:
        model(images)
    return called


def _leave_pixels_out(trial: nn.Module, images: Tensor) -> tuple[Tensor, list[str]]:
    """Images of half the size, or of a quarter, on which the same modules run and training works as before."""
    try:
        called = find_called(trial, images)
    except Exception as error:  # whatever a foreign forward raises
        raise UnsupportedModelError(
            f"{type(trial).__name__}: nothing can be removed safely: it does not run in float64, in which removal is "
            f"tried: {type(error).__name__}: {error}."
        ) from error
    while min(images.shape[-2:]) >= 2 * FEWEST_PIXELS:
        smaller = images[..., ::2, ::2].contiguous()
        try:
            fails = _train(trial, smaller) and not _train(trial, images)  # as where an auxiliary head wants more pixels
            if fails or find_called(trial, smaller) != called:
                break
        except Exception:  # whatever a foreign forward raises: it does not take this size
            break
        images = smaller
    return images, called


def _find_idle(trial: nn.Module, examples: Sequence[Tensor], called: set[str]) -> dict[str, str]:
    """Modules with parameters that never ran, not in training mode either, nor lent a parameter to one that did."""
    called = {parent for name in called for parent in itertools.accumulate(name.split("."), "{}.{}".format)}
    own = {name: list(m.parameters(recurse=False)) for name, m in trial.named_modules() if name not in called}
    own = {name: parameters for name, parameters in own.items() if name and parameters}
    with preserve.recorded_calls(trial) as ran:
        error = _train(trial, examples[0]) if own else None
    own = {name: parameters for name, parameters in own.items() if error or name not in ran}
    idle = {}
    for example in examples if own else ():
        with preserve.inference_state(trial, gradients=True):
            output = sum(leaf.sum() for leaf in tree_leaves(trial(example)) if isinstance(leaf, Tensor))
            flat = [parameter for parameters in own.values() for parameter in parameters]
            used = dict(zip(flat, torch.autograd.grad(output, flat, allow_unused=True)))  # type: ignore[arg-type]
        own = {name: parameters for name, parameters in own.items() if all(used[one] is None for one in parameters)}
    for name in own:
        top = next(p for p in itertools.accumulate(name.split("."), "{}.{}".format) if p not in called)
        idle[top] = "it ran for none of the images; what leads there may not fit the layers before it any more"
    return idle


# --- the trial ------------------------------------------------------------------------------------


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
            if parameter.dim() <= 1 or bool((parameter.abs() < 0.01 / math.sqrt(fan_in)).all()):
                parameter.add_((0.6 * noise(parameter) - 0.3) / math.sqrt(fan_in))
        for name, buffer in trial.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(0.5 + noise(buffer))
            elif name.endswith("running_mean"):
                buffer.add_(0.2 * noise(buffer) - 0.1)
    return trial


@torch.no_grad()
def _find_failure(
    trial: nn.Module, examples: Sequence[Tensor], groups: Sequence[Group], generator: torch.Generator
) -> str | None:
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
            for images in examples:
                got = flatten_returned(smaller(images), len(images))
                with masked_units(trial, groups, selection):
                    expected = flatten_returned(trial(images), len(images))
                difference = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))
                if not difference <= TOLERANCE:
                    return f"the outputs differ by {difference:.1e}"
        except Exception as error:  # whatever a foreign forward raises is the answer
            return f"{type(error).__name__}: {error}"
        if some and (error := _train(smaller, examples[0])) and not _train(trial, examples[0]):
            return f"in training mode, {type(error).__name__}: {error}"
    return None


def _train(model: nn.Module, images: Tensor) -> Exception | None:
    """What a pass in training mode raises; a whole model may want more images, or targets."""
    try:
        with preserve.same_randomness(preserve.device_of(model)), torch.no_grad():
            model.train()(images)
    except Exception as error:  # whatever a foreign forward raises
        return error
    finally:
        model.eval()
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
        note("the logits", flatten_returned(model(images), len(images)))
    return sums


def _rows_apart(first: Tensor, second: Tensor) -> bool:
    third = len(first) // 3
    if len(first) != len(second) or len(first) % 3:
        return False
    changed = (first - second).abs() > 1e-3 * first.abs().clamp_min(1e-12)
    return not (changed[:third].any() or changed[2 * third :].any())
