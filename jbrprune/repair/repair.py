"""Repair after a removal, without labels and without training.

One forward of the pruned model over the repair images, in a single batch, layer by layer: when a layer is
reached, everything before it is already repaired.

* ``batch_norm``: the stored statistics follow the change that the removal made on the same images,
  mean += mean_pruned - mean_dense and var *= var_pruned / var_dense. Unlike a recalibration from scratch this is
  the identity when nothing was removed, however few or narrow the images are.
* ``least_squares``: the kept weights of a consumer reproduce the dense model's output, against a ridge, and its bias
  takes over the mean; see `jbrprune.repair.least_squares.refit`. A consumer without bias needs ``batch_norm`` beside
  it: the norm behind it takes over the mean. Where single weights are masked, every row is fitted on its support.
* ``mean_shift``: the same without a change of the weights.

A repair is kept only if it lowers the divergence from the dense model on images held back for this purpose.

Sources: mean shift as in variance-based pruning (arXiv 2507.12988), closed-form compensation as in CORP (arXiv
2602.05243) and channel pruning by He, Zhang and Sun (ICCV 2017); here every layer sees the repaired inputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import NonFiniteError
from jbrprune.evaluation.agreement import Agreement, agreement_on
from jbrprune.models import layers, preserve
from jbrprune.repair.least_squares import can_refit, flatten_positions, gather_inputs, refit
from jbrprune.structure.groups import Axis

METHODS = ("batch_norm", "mean_shift", "least_squares")
RIDGE = 0.1
"""Ridge of ``least_squares``, relative to the mean square of the inputs."""
MOST_VALUES = 256 * 3 * 224 * 224
"""Repair images go through the model in one batch: as many as have this many values together."""
ROWS = 4096
"""Output positions, over all images, that a least-squares problem looks at."""
LARGEST_RATIO = 16.0
"""A stored variance changes by at most this factor: a channel that is constant on few images says little."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance per channel of a batch norm's input, and what the norm has stored."""

    mean: Tensor
    var: Tensor
    stored_mean: Tensor
    stored_var: Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """What the dense model did on the repair images.

    Attributes:
        positions: Consumer -> ``[p]`` flat output positions that are looked at in every image.
        outputs: Consumer -> ``[n * p, C_out]`` its outputs there, on the CPU; on several ranks, of the own images.
        fan_in: Consumer -> input channels of the dense layer.
        norms: Batch norm -> moments of its input.
        dealt: Whether every rank has images of its own; False: all have all of them, as they are fewer than ranks.
    """

    positions: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    fan_in: Mapping[str, int]
    norms: Mapping[str, Moments]
    dealt: bool


@dataclass(frozen=True)
class Outcome:
    """What a repair did.

    Attributes:
        kept: The methods that were kept, joined by ``+``, or ``none``.
        before: Agreement on the held-back images before the repair.
        after: The same after it.
    """

    kept: str
    before: Agreement
    after: Agreement


def record_targets(model: nn.Module, batches: Sequence[Batch], consumers: Iterable[str], *, seed: int = 0) -> Targets:
    """Record what the dense model does on the repair images.

    Args:
        model: The dense model; left as it was.
        batches: The repair images; as many as `MOST_VALUES` allows are used.
        consumers: Layers that may lose inputs.
        seed: Seeds the choice of output positions.
    """
    images, number = _own_images(model, batches)
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, ROWS // number)
    positions: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    fan_in: dict[str, int] = {}
    norms: dict[str, Moments] = {}
    calls: Counter[str] = Counter()

    def record_consumer(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            calls[name] += 1
            flat = flatten_positions(ends[name], output)
            chosen = torch.randperm(flat.shape[1], generator=generator)[:per_image].sort().values
            positions[name], fan_in[name] = chosen, ends[name].weight.shape[1]  # type: ignore[union-attr, index, assignment]
            outputs[name] = flat[:, chosen.to(flat.device)].flatten(0, 1).cpu()

        return hook

    def record_norm(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[name] += 1
            stored = module.running_mean.clone(), module.running_var.clone()  # type: ignore[union-attr, operator]
            norms[name] = Moments(*_moments(preserve.input_of(args, kwargs)), *stored)

        return hook

    ends = {name: model.get_submodule(layers.end_of(model, name, "out")) for name in consumers}
    after = {name: record_consumer(name) for name, module in ends.items() if can_refit(module)}
    before = {name: record_norm(name) for name, m in model.named_modules() if layers.has_running_statistics(m)}
    with preserve.inference_state(model), preserve.hooked(model, after, before):
        model(images)
    for name in [name for name, count in calls.items() if count > 1]:  # one correction cannot serve several inputs
        for recorded in (positions, outputs, fan_in, norms):
            recorded.pop(name, None)
    return Targets(positions, outputs, fan_in, norms, number >= distributed.size())


def repair_model(
    model: nn.Module,
    batches: Sequence[Batch],
    gate: Sequence[Batch],
    targets: Targets,
    kept: Mapping[Axis, Tensor],
    methods: Sequence[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Repair a pruned model in place, if that brings it closer to the dense model on images held back.

    Args:
        model: The pruned model.
        batches: The images that `record_targets` saw.
        gate: Other images, with the dense model's logits as reference.
        targets: From `record_targets`.
        kept: Axis -> channels of the dense model that are left.
        methods: Some of `METHODS` to apply together, or ``("auto",)`` to choose among combinations; none: only measure.
        masks: Name of a weight or bias -> boolean mask, False where the model's value is zero and stays so.

    Returns:
        What was kept, and the agreement on ``gate`` before and after. The divergence KL(dense || repaired) decides: on
        a hundred images it resolves differences that top-1 cannot.
    """
    before = agreement_on(model, gate)
    if not methods:
        return Outcome("none", before, before)
    combinations = [tuple(methods)]
    if combinations == [("auto",)]:
        with_norms = [("batch_norm",), ("batch_norm", "least_squares")]
        combinations = with_norms if targets.norms else [("mean_shift",), ("least_squares",)]
    images, _ = _own_images(model, batches)
    original = copy.deepcopy(model.state_dict())
    best, best_state = Outcome("none", before, before), original
    for combination in combinations:
        model.load_state_dict(original)
        try:
            apply_methods(model, images, targets, kept, combination, masks or {})
            after = agreement_on(model, gate)
        except (NonFiniteError, torch.linalg.LinAlgError):  # a repair that breaks the model is not a repair
            continue
        if after.kl < best.after.kl:
            best, best_state = Outcome("+".join(combination), before, after), copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    distributed.broadcast_tensors(model.state_dict())
    return best


def apply_methods(
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    kept: Mapping[Axis, Tensor],
    methods: Sequence[str],
    masks: Mapping[str, Tensor],
) -> None:
    """Apply methods together, in one forward over this rank's images, whether they help or not; see `repair_model`."""

    def follow_change(name: str) -> preserve.Hook:
        dense = targets.norms[name]

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            mean, var = _moments(preserve.input_of(args, kwargs))
            stays = kept.get((name, "out", 0), torch.arange(len(dense.mean))).to(mean.device)
            floor = torch.finfo(var.dtype).tiny
            ratio = ((var + floor) / (dense.var[stays] + floor)).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
            module.running_mean.copy_(dense.stored_mean[stays] + (mean - dense.mean[stays]))  # type: ignore[union-attr, operator]
            module.running_var.copy_(dense.stored_var[stays] * ratio)  # type: ignore[union-attr, operator]

        return hook

    def refit_consumer(name: str, ridge: float | None, mask: Tensor | None) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = preserve.input_of(args, kwargs)
            outputs = targets.outputs[name].to(x)
            if (name, "out", 0) in kept:
                outputs = outputs[:, kept[name, "out", 0].to(x.device)]
            inputs = gather_inputs(module, x, targets.positions[name].to(x.device))
            if targets.dealt:  # all ranks solve the same problem
                inputs, outputs = distributed.concatenate(inputs), distributed.concatenate(outputs)
            refit(module, inputs, outputs, ridge, mask, masks.get(f"{name}.bias"))

        return hook

    before: dict[str, preserve.Hook] = {}
    if "least_squares" in methods or "mean_shift" in methods:
        for name, full in targets.fan_in.items():
            mask, end = masks.get(f"{name}.weight"), layers.end_of(model, name, "out")
            mask = None if mask is None or bool(mask.all()) else mask
            weight: Tensor = model.get_submodule(end).weight  # type: ignore[assignment]
            if mask is not None or weight.shape[1] < (full if end == name else len(weight)):
                before[end] = refit_consumer(name, RIDGE if "least_squares" in methods else None, mask)
    if "batch_norm" in methods:
        before |= {name: follow_change(name) for name in targets.norms}
    with preserve.inference_state(model), preserve.hooked(model, forward_pre=before):
        model(images)


def _own_images(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, int]:
    """This rank's share of the images (all of them, if there are fewer than ranks), and the number of all."""
    images = torch.cat([batch.images for batch in batches])
    images = images[: max(1, MOST_VALUES // images[0].numel())]
    return distributed.own_share(images).to(preserve.device_of(model)), len(images)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel of ``[n, C, ...]``, over all ranks."""
    if x.is_cpu and x.dtype == torch.float32 and x.dim() > 2:  # the same numbers in a quarter of the time
        mean, var = torch.batch_norm_update_stats(x.contiguous(), None, None, 0.0)
    else:
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    if distributed.size() == 1:
        return mean, var
    own_mean, own_var, n = mean.cpu().double(), var.cpu().double(), x.numel() // x.shape[1]
    count = torch.tensor(float(n), dtype=torch.float64)
    sums = distributed.all_sum({"mean": n * own_mean, "n": count})
    whole = sums["mean"] / sums["n"]
    squares = distributed.all_sum({"var": n * (own_var + (own_mean - whole).square())})
    return whole.to(mean), (squares["var"] / sums["n"]).to(var)
