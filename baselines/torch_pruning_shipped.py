"""torch-pruning's own importances as shipped in 1.6.1, for parity: on our units, with the faults they have.

The only file here that imports torch_pruning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from baselines.common import check_labels, label_losses, made, shown, summed
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, UnsupportedModelError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.structure.groups import Group, Member

KNOWN_FAULTS: dict[str, str] = {
    "tp_magnitude": (
        "Inputs of a grouped convolution: weights are summed over the outputs of all groups and repeated, so that the "
        "same channel of each group gets the same importance."
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


def tp_magnitude(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """``GroupMagnitudeImportance()``: mean of squares, over the mean of the group (arXiv 2301.12900); as shipped."""
    return _shipped("tp_magnitude", tp.importance.GroupMagnitudeImportance(), model, batches, groups)


def tp_bn_scale(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """``BNScaleImportance()`` (Liu et al., ICCV 2017, arXiv 1708.06519); as shipped."""
    return _shipped("tp_bn_scale", tp.importance.BNScaleImportance(), model, batches, groups)


def tp_lamp(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """``LAMPImportance()`` (Lee et al., ICLR 2021, arXiv 2010.07611); as shipped."""
    return _shipped("tp_lamp", tp.importance.LAMPImportance(), model, batches, groups)


def tp_fpgm(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """``FPGMImportance()`` (He et al., CVPR 2019, arXiv 1811.00250); as shipped."""
    return _shipped("tp_fpgm", tp.importance.FPGMImportance(), model, batches, groups)


def tp_random(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """``RandomImportance()``; as shipped, from a seeded global generator that is put back."""
    with preserve.same_randomness(torch.device("cpu")):
        torch.manual_seed(seed)
        return _shipped("tp_random", tp.importance.RandomImportance(), model, batches, groups)


def tp_taylor(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    r"""``GroupTaylorImportance()``: sum of \|w g\|, g summed over all images (Molchanov et al., CVPR 2019); as shipped.

    Raises:
        DataError: The batches have no labels.
    """
    check_labels("tp_taylor", batches)
    count = sum(map(len, batches))

    def prepare(work: nn.Module, importance: object) -> None:
        for batch in shown(batches, "tp_taylor", progress):
            (label_losses(work, batch).sum() / count).backward()

    return _shipped("tp_taylor", tp.importance.GroupTaylorImportance(), model, batches, groups, prepare)


def tp_hessian(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """``GroupHessianImportance()``: w^2 g^2, of the last sample (LeCun et al., NeurIPS 1989); as shipped.

    Raises:
        DataError: The batches have no labels.
    """
    check_labels("tp_hessian", batches)

    def prepare(work: nn.Module, importance: tp.importance.GroupHessianImportance) -> None:
        for batch in shown(batches, "tp_hessian", progress):
            for loss in label_losses(work, batch):
                work.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(work)

    return _shipped("tp_hessian", tp.importance.GroupHessianImportance(), model, batches, groups, prepare)


def _shipped(
    name: str,
    importance: Importance,
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    prepare: Callable[..., None] = lambda work, importance: None,
) -> Scores:
    """Ask an importance about every group, on a copy: torch-pruning leaves gradients and hooks behind.

    The score of a unit is the mean over its channels on the axis that is asked about, as torch-pruning ranks heads.
    """
    if not batches:
        raise DataError(f"Criterion {name!r} traces the model with images, but there is no batch.")
    work = copy_model(model)
    values = {}
    with preserve.inference_state(work, gradients=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = batches[0].images[:1].to(preserve.device_of(work)).repeat(2, 1, 1, 1)  # a batch of one is taken apart
        graph = tp.DependencyGraph().build_dependency(
            work, example_inputs=(images,), forward_fn=lambda model, inputs: logits_of(model(*inputs)), verbose=False
        )
        prepare(work, importance)
        for group in groups:
            member = _root(work, group)
            found = _asked(name, importance, group, _traced(graph, work, member))
            if found is None:
                raise UnsupportedModelError(
                    f"Criterion {name!r}: torch-pruning has no importance for group {group.name}. {KNOWN_FAULTS[name]}"
                )
            of_channel = found.detach()[member.channel] * group.size / len(member.channel)
            values[group.name] = summed(group, [(member, of_channel)])
    return made(name, values, groups, site="torch-pruning", statistic="as shipped")


def _asked(name: str, importance: Importance, group: Group, traced: tp.dependency.Group) -> Tensor | None:
    try:
        return importance(traced)
    except Exception as error:  # whatever torch-pruning stumbles over
        raise UnsupportedModelError(
            f"Criterion {name!r}: torch-pruning fails on group {group.name}: {type(error).__name__}: {error}. "
            f"{KNOWN_FAULTS[name]}"
        ) from error


def _root(model: nn.Module, group: Group) -> Member:
    """The first layer that makes the group's channels."""
    return next(m for m in group.side("out") if layers.is_consumer(model.get_submodule(m.axis[0])))


def _traced(graph: tp.DependencyGraph, model: nn.Module, member: Member) -> tp.dependency.Group:
    """torch-pruning's group of all output channels of a layer."""
    module = model.get_submodule(member.axis[0])
    pruner = graph.get_pruner_of_module(module)
    width: int = layers.width_of(module, "out")  # type: ignore[assignment]
    return graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))  # type: ignore[union-attr]
