"""Repair after a removal, without labels and without training.

The pruned model runs over the repair images, chunk by chunk and layer by layer: when a layer is reached, everything
before it is already repaired, by sums over all chunks so far; memory does not grow with the images. What the dense
model does on a quarter of the images is recorded once, which is enough between stops; at a stop it runs on all. Between
stops consumers without bias are left to the batch norms behind them, where the model has any.

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

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import NonFiniteError
from jbrprune.evaluation.agreement import Agreement, agreement_on
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.models import layers, preserve
from jbrprune.repair.least_squares import Moments, can_refit, flatten_positions, gather_inputs, refit, sum_products
from jbrprune.structure.groups import Axis

METHODS = ("batch_norm", "mean_shift", "least_squares")
Methods = tuple[str, ...]
"""Some of them, applied together."""
RIDGE = 0.1
"""Ridge of ``least_squares``, relative to the mean square of the inputs."""
CHUNK = 64 * 3 * 224 * 224
"""Images go through the models in chunks of at most this many values."""
QUICK, LEAST = 4, 16
"""Between stops one of so many images is enough, at least so many of them and at most a chunk."""
GATE = 16
"""Between stops at most so many of the first batch of the images held back decide."""
MOST_VALUES = 2**16
"""Inputs, or outputs, of a consumer that are looked at in one image: of larger ones a sample of the positions."""
LARGEST_RATIO = 16.0
"""A stored variance changes by at most this factor: a channel that is constant on few images says little."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What the dense model did on a chunk of the repair images.

    Attributes:
        images: The chunk; on several ranks, the own part of it.
        outputs: Consumer -> ``[p]`` flat output positions that are looked at in every image (None: all of them), and
            ``[n * p, C_out]`` its outputs there.
        norms: Batch norm -> moments of its input.
    """

    images: Tensor
    outputs: Mapping[str, tuple[Tensor | None, Tensor]]
    norms: Mapping[str, Moments]


@dataclass(frozen=True, eq=False)
class Targets:
    """What a repair aims at; `record_targets` makes it.

    Attributes:
        dense: The dense model.
        consumers: Layers that may lose inputs.
        chunks: The repair images.
        first: What the dense model did on the images that are enough between stops; all are recorded at a stop.
        shared: Whether every rank has images of its own in a chunk; False: all have all of them, as they are fewer.
    """

    dense: nn.Module
    consumers: Collection[str]
    chunks: Sequence[Tensor]
    first: Recording
    shared: bool

    def notes(self, methods: Sequence[str]) -> list[str]:
        """Which layers are fitted to a sample of their positions."""
        found = [name for name, (positions, _) in self.first.outputs.items() if positions is not None]
        if not found or not {"auto", "least_squares"} & set(methods):
            return []
        shown = f"{', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"
        return [f"In {shown}, least squares looks at a sample of the positions of every image."]


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


def record_targets(dense: nn.Module, batches: Sequence[Batch], consumers: Collection[str]) -> Targets:
    """Record what the dense model does on the repair images that are enough between stops.

    Args:
        dense: The dense model; left as it was.
        batches: The repair images.
        consumers: Layers that may lose inputs.
    """
    images = torch.cat([batch.images for batch in batches])
    chunks = images.tensor_split(min(len(images), math.ceil(images.numel() / CHUNK)))
    first = chunks[0][: max(LEAST, math.ceil(len(images) / QUICK))]
    shared = min(len(first), len(chunks[-1])) >= distributed.size()
    return Targets(dense, consumers, chunks, record_chunk(dense, first, consumers, 0, shared), shared)


def record_chunk(
    dense: nn.Module, chunk: Tensor, consumers: Collection[str], seed: int, shared: bool = False
) -> Recording:
    """Record what the dense model does on images, or on this rank's part of them; ``seed`` draws positions."""
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, tuple[Tensor | None, Tensor]] = {}
    norms: dict[str, Moments] = {}
    calls: Counter[str] = Counter()

    def record_consumer(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            calls[name] += 1
            flat, positions = flatten_positions(ends[name], output), None
            most = max(1, MOST_VALUES // max(flat.shape[2], ends[name].weight[0].numel()))  # type: ignore[union-attr, index, operator]
            if flat.shape[1] > most:
                positions = torch.randperm(flat.shape[1], generator=generator)[:most].to(flat.device)
            outputs[name] = positions, (flat.clone() if positions is None else flat[:, positions]).flatten(0, 1)

        return hook

    def record_norm(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[name] += 1
            norms[name] = measure_moments(preserve.input_of(args, kwargs))

        return hook

    images = (distributed.own_share(chunk) if shared else chunk).to(preserve.device_of(dense))
    ends = {name: dense.get_submodule(layers.end_of(dense, name, "out")) for name in consumers}
    after = {name: record_consumer(name) for name, module in ends.items() if can_refit(module)}
    before = {name: record_norm(name) for name, m in dense.named_modules() if layers.has_running_statistics(m)}
    with preserve.inference_state(dense), preserve.hooked(dense, after, before):
        dense(images)
    for name in [name for name, count in calls.items() if count > 1]:  # one correction cannot serve several inputs
        outputs.pop(name, None)
        norms.pop(name, None)
    return Recording(images, outputs, norms)


def repair_model(
    model: nn.Module,
    targets: Targets,
    gate: Sequence[Batch],
    kept: Mapping[Axis, Tensor],
    methods: Sequence[str],
    *,
    output: Output = LOGITS,
    masks: Mapping[str, Tensor] | None = None,
    quick: bool = False,
) -> Outcome:
    """Repair a pruned model in place, if that brings it closer to the dense model on images held back.

    Args:
        model: The pruned model.
        targets: From `record_targets`.
        gate: Other images, with the dense model's logits as reference.
        kept: Axis -> channels of the dense model that are left.
        methods: Some of `METHODS` to apply together, or ``("auto",)`` to choose among combinations; none: only measure.
        output: What of the model's output counts.
        masks: Name of a weight or bias -> boolean mask, False where the model's value is zero and stays so.
        quick: Look at the first images only, let at most `GATE` images decide, take the first combination that helps,
            and leave consumers without bias to the batch norms behind them, where the model has any.

    Returns:
        What was kept, and the agreement on ``gate`` before and after. The divergence KL(dense || repaired) decides (of
        what is not logits, the relative error): on a hundred images it resolves differences that top-1 cannot.
    """
    gate = [gate[0].map(lambda tensor: tensor[:GATE])] if quick else gate
    before = agreement_on(model, gate, output)
    if not methods:
        return Outcome("none", before, before)
    combinations = [tuple(methods)]
    if combinations == [("auto",)]:
        with_norms = [("batch_norm", "least_squares"), ("batch_norm",)]
        combinations = with_norms if targets.first.norms else [("least_squares",), ("mean_shift",)]
    best, best_model = Outcome("none", before, before), model
    for together in [[one] for one in combinations] if quick else [combinations]:
        models = {combination: preserve.copy_model(model) for combination in together}
        for combination in apply_methods(models, targets, kept, masks or {}, quick=quick):
            try:
                after = agreement_on(models[combination], gate, output)
            except NonFiniteError:  # a repair that breaks the model is not a repair
                continue
            if after.distance < best.after.distance:
                best, best_model = Outcome("+".join(combination), before, after), models[combination]
        if best_model is not model:
            break
    model.load_state_dict(best_model.state_dict())
    distributed.broadcast_tensors(model.state_dict())
    return best


def apply_methods(
    models: Mapping[Methods, nn.Module],
    targets: Targets,
    kept: Mapping[Axis, Tensor],
    masks: Mapping[str, Tensor],
    *,
    quick: bool,
) -> list[Methods]:
    """Repair copies of a pruned model in place, each by its methods, whether they help or not; see `repair_model`.

    In the first, second, fourth, eighth ... and last chunk every consumer is fitted, when it is reached, to all images
    so far; batch norms follow in every chunk.

    Returns:
        Methods whose equations could be solved.
    """
    fits = {methods: Fit(model, targets, kept, methods, masks, quick) for methods, model in models.items()}
    dense, consumers, last = targets.dense, targets.consumers, 1 if quick else len(targets.chunks)
    recorded = (record_chunk(dense, images, consumers, n, targets.shared) for n, images in enumerate(targets.chunks))
    for number, chunk in enumerate([targets.first] if quick else recorded, 1):
        solved = {}
        for methods, fit in fits.items():
            with suppress(torch.linalg.LinAlgError):
                fit.look(chunk, refitting=number == last or number & (number - 1) == 0)
                solved[methods] = fit
        fits = solved
    return list(fits)


@dataclass(eq=False)
class Fit:
    """One model under repair, and the sums over what it was shown so far.

    Attributes:
        model: A pruned model; changed.
        targets: What it aims at.
        kept: Axis -> channels of the dense model that are left.
        methods: What is repaired.
        masks: Name of a weight or bias -> where it is not zero.
        quick: Consumers without bias are left to the batch norms behind them, where the model has any.
        weights: Consumer that is fitted -> its last layer, and the weight before the repair.
        sums: Consumer or batch norm -> moments of all chunks so far.
    """

    model: nn.Module
    targets: Targets
    kept: Mapping[Axis, Tensor]
    methods: Methods
    masks: Mapping[str, Tensor]
    quick: bool
    weights: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    sums: dict[str, tuple[Moments, Moments]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.masks = {name: mask for name, mask in self.masks.items() if not bool(mask.all())}
        turned = {
            f"{name}.qkv" for name, side, _ in self.kept if side == "head_dim"
        }  # their outputs changed their basis
        recorded, refits = self.targets.first.outputs.keys(), {"least_squares", "mean_shift"} & set(self.methods)
        for name in sorted(recorded - turned) if refits else ():
            end, dense = layers.end_of(self.model, name, "out"), self.targets.dense
            wide: Any = dense.get_submodule(layers.end_of(dense, name, "out"))
            module: Any = self.model.get_submodule(end)
            full = wide.weight.shape[1] if end == name else len(module.weight)
            left = self.quick and module.bias is None and self.targets.first.norms
            if not left and (f"{name}.weight" in self.masks or module.weight.shape[1] < full):
                self.weights[name] = end, module.weight.clone()

    def look(self, chunk: Recording, *, refitting: bool) -> None:
        """Repair layer by layer on a chunk; consumers are refitted, or only their sums are taken."""
        hooks = {
            self.weights[name][0]: self.refit_consumer(name, *chunk.outputs[name], refitting) for name in self.weights
        }
        if "batch_norm" in self.methods:
            hooks |= {name: self.follow_change(name, moments) for name, moments in chunk.norms.items()}
        with preserve.inference_state(self.model), preserve.hooked(self.model, forward_pre=hooks):
            self.model(chunk.images)

    def add(self, name: str, found: tuple[Moments, Moments]) -> tuple[Moments, Moments]:
        """Add moments of a chunk, of all ranks, to those of the chunks before."""
        for pair in distributed.gather(found) if self.targets.shared else [found]:
            sums = self.sums.get(name)
            self.sums[name] = (sums[0] + pair[0], sums[1] + pair[1]) if sums else pair
        return self.sums[name]

    def follow_change(self, name: str, wide: Moments) -> preserve.Hook:
        """Let the statistics of a batch norm follow the change of its input."""
        stored: Any = self.targets.dense.get_submodule(name)

        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            stays = self.kept.get((name, "out", 0), torch.arange(len(wide.a)))
            then = Moments(wide.count, wide.a[stays], wide.y[stays], wide.products[stays])
            before, after = self.add(name, (then, measure_moments(preserve.input_of(args, kwargs))))
            floor = torch.finfo(torch.float64).tiny
            ratio = ((after.products + floor) / (before.products + floor)).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
            change = (after.a - before.a).to(module.running_mean)
            module.running_mean.copy_(stored.running_mean[stays.to(change.device)] + change)
            module.running_var.copy_(stored.running_var[stays.to(change.device)] * ratio.to(change))

        return hook

    def refit_consumer(self, name: str, positions: Tensor | None, outputs: Tensor, refitting: bool) -> preserve.Hook:
        """Let a consumer reproduce what the dense one gives."""
        ridge = RIDGE if "least_squares" in self.methods else None

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            left = self.kept.get((layers.end_of(self.targets.dense, name, "out"), "out", 0))
            inputs = gather_inputs(module, preserve.input_of(args, kwargs), positions)
            wanted = outputs if left is None else outputs[:, left.to(outputs.device)]
            found = self.add(name, sum_products(inputs, wanted, means=ridge is None))
            if refitting:
                masks = (self.masks.get(f"{name}.{parameter}") for parameter in ("weight", "bias"))
                refit(module, self.weights[name][1], *found, ridge, *masks)

        return hook


def measure_moments(x: Tensor) -> Moments:
    """Moments per channel of ``[n, C, ...]``."""
    if x.is_cpu and x.dtype == torch.float32 and x.dim() > 2:  # the same numbers in a quarter of the time
        mean, var = torch.batch_norm_update_stats(x.contiguous(), None, None, 0.0)
    else:
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    count, mean = x.numel() // x.shape[1], mean.cpu().double()
    return Moments(count, mean, mean, var.cpu().double() * count)
