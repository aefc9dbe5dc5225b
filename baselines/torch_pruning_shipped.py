"""torch-pruning's own importances as shipped in 1.6.1, for parity: on our units, with the faults they have.

And its example recipe for models of timm, on its own units.

The only file here that imports torch_pruning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from baselines.common import Values, check_images, check_labels, label_losses, sum_members
from jbrprune.data.batches import Batch
from jbrprune.errors import UnsupportedModelError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.structure.groups import Group

KNOWN_FAULTS: dict[str, str] = {
    "tp_magnitude": (
        "Weights of depthwise convolutions do not count (nor for the other tp_ criteria). Inputs of a grouped "
        "convolution: weights are summed over the outputs of all groups and repeated, so that the same channel of each "
        "group gets the same importance."
    ),
    "tp_taylor": (
        "Scales and biases of batch norms do not count (the branch compares with the pruner of group norms); indices "
        "are sorted in place but their roots are not, so that scores may land on other channels behind a "
        "concatenation; a parameter without gradient is an error."
    ),
    "tp_hessian": (
        "Only the last sample counts: the accumulator looks a name up in a dictionary that is keyed by parameters, so "
        "it overwrites what it has."
    ),
    "tp_bn_scale": "Groups without batch norm get no importance at all; torch-pruning leaves them as they are.",
    "tp_lamp": "A group of zeros gives NaN (0 / 0); equal units are told apart by their order.",
    "tp_fpgm": (
        "Distances are between powers of weights (squares by default), not between filters; inputs of grouped "
        "convolutions are an error."
    ),
    "tp_random": "Draws from the global generator, once per group and call, so that a seed is the caller's business.",
}
"""Name of a criterion -> what is wrong with it in torch-pruning 1.6.1."""

Importance = Callable[[tp.dependency.Group], Tensor | None]
Criterion = Callable[[nn.Module, Sequence[Batch], Sequence[Group]], Values]


def _ask(
    name: str,
    importance: Importance,
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    prepare: Callable[[nn.Module], None] = lambda work: None,
) -> Values:
    """Ask an importance about every group, on a copy: torch-pruning leaves gradients and hooks behind.

    The score of a unit is the mean over its channels on the axis that is asked about, as torch-pruning ranks heads.
    """
    check_images(name, batches)
    work = copy_model(model)
    values = {}
    with preserve.inference_state(work, gradients=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = batches[0].images[:1].to(preserve.device_of(work)).repeat(2, 1, 1, 1)  # a batch of one is taken apart
        graph = tp.DependencyGraph().build_dependency(
            work, example_inputs=(images,), forward_fn=lambda model, inputs: logits_of(model(*inputs)), verbose=False
        )
        prepare(work)
        for group in groups:
            member = next(m for m in group.side("out") if layers.is_consumer(work.get_submodule(m.axis[0])))
            module = work.get_submodule(member.axis[0])
            prune = graph.get_pruner_of_module(module).prune_out_channels
            width: int = layers.width_of(module, "out")
            try:
                found = importance(graph.get_pruning_group(module, prune, list(range(width))))
            except Exception as error:  # whatever torch-pruning stumbles over
                raise UnsupportedModelError(
                    f"Criterion {name!r}: torch-pruning fails on group {group.name}: {type(error).__name__}: {error}. "
                    f"{KNOWN_FAULTS[name]}"
                ) from error
            if found is None:
                raise UnsupportedModelError(
                    f"Criterion {name!r}: torch-pruning has no importance for group {group.name}. {KNOWN_FAULTS[name]}"
                )
            of_channel = found.detach()[member.channel] * group.size / len(member.channel)
            values[group.name] = sum_members(group, [(member, of_channel)])
    return values


def _ship(name: str, make: Callable[[], Importance]) -> Criterion:
    """A criterion that reads weights only."""

    def criterion(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
        return _ask(name, make(), model, batches, groups)

    criterion.__name__ = name
    return criterion


tp_magnitude = _ship("tp_magnitude", tp.importance.GroupMagnitudeImportance)
"""``GroupMagnitudeImportance()``: mean of squares, over the mean of the group (arXiv 2301.12900); as shipped."""
tp_bn_scale = _ship("tp_bn_scale", tp.importance.BNScaleImportance)
"""``BNScaleImportance()`` (Liu et al., ICCV 2017, arXiv 1708.06519); as shipped."""
tp_lamp = _ship("tp_lamp", tp.importance.LAMPImportance)
"""``LAMPImportance()`` (Lee et al., ICLR 2021, arXiv 2010.07611); as shipped."""
tp_fpgm = _ship("tp_fpgm", tp.importance.FPGMImportance)
"""``FPGMImportance()`` (He et al., CVPR 2019, arXiv 1811.00250); as shipped."""


@dataclass(frozen=True)
class ShippedRandom:
    """``RandomImportance()``; as shipped, from a seeded global generator that is put back."""

    seed: int = 0

    def __call__(self, model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
        """Draw a number for every unit."""
        with preserve.same_randomness(torch.device("cpu")):
            torch.manual_seed(self.seed)
            return _ask("tp_random", tp.importance.RandomImportance(), model, batches, groups)


def tp_taylor(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""``GroupTaylorImportance()``: sum of \|w g\|, g summed over all images (Molchanov et al., CVPR 2019); as shipped.

    Raises:
        DataError: The batches have no labels.
    """
    check_labels("tp_taylor", batches)
    count = sum(map(len, batches))

    def prepare(work: nn.Module) -> None:
        for batch in batches:
            (label_losses(work, batch).sum() / count).backward()

    return _ask("tp_taylor", tp.importance.GroupTaylorImportance(), model, batches, groups, prepare)


def tp_hessian(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """``GroupHessianImportance()``: w^2 g^2, of the last sample (LeCun et al., NeurIPS 1989); as shipped.

    Raises:
        DataError: The batches have no labels.
    """
    check_labels("tp_hessian", batches)
    importance = tp.importance.GroupHessianImportance()

    def prepare(work: nn.Module) -> None:
        for batch in batches:
            for loss in label_losses(work, batch):
                work.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(work)

    return _ask("tp_hessian", importance, model, batches, groups, prepare)


def prune_by_recipe(
    model: nn.Module,
    images: Tensor,
    ratio: float = 0.3,
    importance: Importance = tp.importance.MagnitudeImportance(p=2),  # noqa: B008
    steps: int = 1,
) -> Iterator[None]:
    """Remove a share of all channels of a timm model in place, by torch-pruning's example for such models.

    The same share of every layer; the classifier is ignored; heads are counted, and ``num_heads``, ``head_dim`` and
    ``attn_dim`` set after every step, as its examples mean to. Yields after every step.
    """
    heads = {}
    for module in model.modules():
        queries = getattr(module, "qkv", None) or getattr(module, "qkv_proj", None)
        if hasattr(module, "num_heads") and isinstance(queries, nn.Module):
            heads[queries] = module
    classifier = model.get_classifier()
    how = {
        "importance": importance,
        "pruning_ratio": ratio,
        "iterative_steps": steps,
        "ignored_layers": list(classifier) if isinstance(classifier, tuple | list) else [classifier],
        "num_heads": {queries: module.num_heads for queries, module in heads.items()},
        "root_module_types": [nn.modules.conv._ConvNd, nn.Linear],
    }
    pruner = tp.pruner.MetaPruner(model, images, pruning_ratio_dict={}, customized_pruners={}, **how)
    for _ in range(steps):
        pruner.step()
        for queries, module in heads.items():
            count = int(pruner.num_heads.get(queries, module.num_heads))
            width = getattr(queries, "out_features", None) or queries.out_channels
            sizes = {"num_heads": count, "head_dim": width // (3 * count), "attn_dim": width // 3}
            for attribute in sizes.keys() & set(dir(module)):
                setattr(module, attribute, sizes[attribute])
        yield


def prune_by_taylor(model: nn.Module, batches: Sequence[Batch], ratio: float, steps: int) -> nn.Module:
    """A copy without a share of its channels by `prune_by_recipe` and ``GroupTaylorImportance``.

    Before every step its gradients are summed over all images, after it the batch norms are recalibrated on them.
    """
    work, count = copy_model(model), sum(map(len, batches))
    batches = [batch.to(preserve.device_of(work)) for batch in batches]
    norms = [module for module in work.modules() if layers.has_running_statistics(module)]
    with preserve.inference_state(work, gradients=True):
        pruner = prune_by_recipe(work, batches[0].images[:2], ratio, tp.importance.GroupTaylorImportance(), steps)
        for _ in range(steps):
            for batch in batches:
                (label_losses(work, batch).sum() / count).backward()
            next(pruner)
            work.zero_grad()
            for norm in norms:
                norm.reset_running_stats()  # type: ignore[operator]
                norm.train().momentum = None  # type: ignore[assignment]
            for batch in batches if norms else ():
                with torch.no_grad():
                    work(batch.images)
            work.eval()
    return work


def find_permuted(dense: nn.Module, smaller: nn.Module) -> list[str]:
    """Weights of norms that are not a part of the dense ones in the same order."""
    found = []
    for name, part in smaller.named_parameters():
        whole = dense.get_parameter(name)
        if part.dim() == 1 and len(part) < len(whole):
            rest = iter(whole.tolist())
            found += [] if all(value in rest for value in part.tolist()) else [name]
    return found
