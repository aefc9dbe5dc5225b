"""Repair after a removal, without labels and without training.

One forward of the pruned model over the repair images, in a single batch, layer by layer: when a layer is
reached, everything before it is already repaired.

* ``batch_norm``: the stored statistics follow the change that the removal made on the same images,
  mean += mean_pruned - mean_dense and var *= var_pruned / var_dense. Unlike a recalibration from scratch this is
  the identity when nothing was removed, however few or narrow the images are.
* ``mean_shift``: the bias of a consumer takes over the mean of what it no longer reads.
* ``least_squares``: the kept weights of a consumer reproduce the dense model's output, against a ridge,
  W' = argmin ||(Y_dense - mean) - (A_kept - mean) W'^T||^2 + lambda ||W' - W_kept||^2, and its bias takes over the
  mean. A consumer without bias needs ``batch_norm`` beside it: the norm behind it takes over the mean. Where single
  weights are masked, every row of W' has its own support and is fitted on it.

Sources: mean shift as in variance-based pruning (arXiv 2507.12988), closed-form compensation as in CORP (arXiv
2602.05243) and channel pruning by He, Zhang and Sun (ICCV 2017); here every layer sees the repaired inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import NonFiniteError
from jbrprune.evaluation.agreement import Agreement, agreement_on
from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Axis

METHODS = ("batch_norm", "mean_shift", "least_squares")
MOST_VALUES = 256 * 3 * 224 * 224
"""Repair images go through the model in one batch: as many as have this many values together."""
ROWS = 4096
"""Output positions, over all images, that a least-squares problem looks at."""
ITERATIONS = 50
"""Conjugate gradients on masked weights stop here at the latest ..."""
CONVERGED = 1e-3
"""... or when the gradient of every row has fallen to this share of what it was."""
LARGEST_RATIO = 16.0
"""A stored variance changes by at most this factor: a channel that is constant on few images says little."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance per channel of a norm's input, and what the norm has stored."""

    mean: Tensor
    var: Tensor
    stored_mean: Tensor
    stored_var: Tensor


@dataclass(frozen=True)
class Outcome:
    """Which repair was kept (names joined by ``+``, or ``none``), and the agreement on held-back images around it."""

    kept: str
    before: Agreement
    after: Agreement


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


def dense_targets(model: nn.Module, batches: Sequence[Batch], consumers: Iterable[str], *, seed: int = 0) -> Targets:
    """Record what the dense model does on the repair images.

    Args:
        model: The dense model; left as it was.
        batches: The repair images; as many as `MOST_VALUES` allows are used.
        consumers: Layers that may lose inputs.
        seed: Seeds the choice of output positions.
    """
    images, number = _images(model, batches)
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, ROWS // number)
    positions: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    fan_in: dict[str, int] = {}
    norms: dict[str, Moments] = {}
    calls: Counter[str] = Counter()

    def consumer(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            calls[name] += 1
            flat = _by_position(module, output)
            chosen = torch.randperm(flat.shape[1], generator=generator)[:per_image].sort().values
            positions[name], fan_in[name] = chosen, module.weight.shape[1]  # type: ignore[union-attr, index, assignment]
            outputs[name] = flat[:, chosen.to(flat.device)].flatten(0, 1).cpu()

        return hook

    def norm(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[name] += 1
            stored = module.running_mean.clone(), module.running_var.clone()  # type: ignore[union-attr, operator]
            norms[name] = Moments(*_moments(preserve.input_of(args, kwargs)), *stored)

        return hook

    able = {name for name in consumers if can_refit(model.get_submodule(name))}
    with (
        preserve.inference_state(model),
        preserve.hooked(model, {name: consumer(name) for name in able}, {name: norm(name) for name in _norms(model)}),
    ):
        model(images)
    for name in [name for name, count in calls.items() if count > 1]:  # one correction cannot serve several inputs
        for recorded in (positions, outputs, fan_in, norms):
            recorded.pop(name, None)
    return Targets(positions, outputs, fan_in, norms, number >= distributed.size())


def repaired(
    model: nn.Module,
    batches: Sequence[Batch],
    gate: Sequence[Batch],
    targets: Targets,
    kept: Mapping[Axis, Tensor],
    methods: Sequence[str],
    *,
    ridge: float,
    masks: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Repair a pruned model in place, if that raises the agreement on images held back.

    Args:
        model: The pruned model.
        batches: The images that `dense_targets` saw.
        gate: Other images, with the dense model's logits as reference.
        targets: From `dense_targets`.
        kept: Axis -> channels of the dense model that are left.
        methods: Some of `METHODS` to apply together, or ``("auto",)`` to choose among combinations; none: only measure.
        ridge: Ridge of ``least_squares``, relative to the mean square of the inputs.
        masks: Name of a weight or bias -> boolean mask, False where the model's value is zero and stays so.

    Returns:
        What was kept, and the agreement on ``gate`` before and after. The divergence KL(dense || repaired) decides: on
        a hundred images it resolves differences that top-1 cannot.
    """
    before = agreement_on(model, gate)
    if not methods:
        return Outcome("none", before, before)
    images, _ = _images(model, batches)
    original = _snapshot(model)
    best, best_state = Outcome("none", before, before), original
    for combination in _combinations(methods, bool(targets.norms)):
        model.load_state_dict(original)
        try:
            _apply(model, images, targets, kept, combination, ridge, masks)
            after = agreement_on(model, gate)
        except (NonFiniteError, torch.linalg.LinAlgError):  # a repair that breaks the model is not a repair
            continue
        if after.kl < best.after.kl:
            best, best_state = Outcome("+".join(combination), before, after), _snapshot(model)
    model.load_state_dict(best_state)
    distributed.same_tensors(model.state_dict())
    return best


def _combinations(methods: Sequence[str], has_norms: bool) -> list[tuple[str, ...]]:
    if tuple(methods) != ("auto",):
        return [tuple(methods)]
    if has_norms:
        return [("batch_norm",), ("batch_norm", "least_squares")]
    return [("mean_shift",), ("least_squares",)]


def _apply(
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    kept: Mapping[Axis, Tensor],
    methods: Sequence[str],
    ridge: float,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    before: dict[str, preserve.Hook] = {}
    if "least_squares" in methods or "mean_shift" in methods:
        for name, full in targets.fan_in.items():
            mask = (masks or {}).get(f"{name}.weight")
            thinned = mask is not None and not bool(mask.all())
            if thinned or model.get_submodule(name).weight.shape[1] < full:  # type: ignore[union-attr, index]
                strength = ridge if "least_squares" in methods else None
                before[name] = _refitting(
                    name, targets, kept, strength, mask if thinned else None, (masks or {}).get(f"{name}.bias")
                )
    if "batch_norm" in methods:
        for name, dense in targets.norms.items():
            before[name] = _following(dense, kept.get((name, "out", 0)))
    with preserve.inference_state(model), preserve.hooked(model, forward_pre=before):
        model(images)


def _following(dense: Moments, kept: Tensor | None) -> preserve.Hook:
    """Move the stored statistics of a batch norm by the change of its input."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        mean, var = _moments(preserve.input_of(args, kwargs))
        was_mean, was_var, stored_mean, stored_var = (
            t if kept is None else t[kept.to(t.device)]
            for t in (dense.mean, dense.var, dense.stored_mean, dense.stored_var)
        )
        floor = torch.finfo(var.dtype).tiny
        ratio = ((var + floor) / (was_var + floor)).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        module.running_mean.copy_(stored_mean + (mean - was_mean))  # type: ignore[union-attr, operator]
        module.running_var.copy_(stored_var * ratio)  # type: ignore[union-attr, operator]

    return hook


def _refitting(
    name: str,
    targets: Targets,
    kept: Mapping[Axis, Tensor],
    ridge: float | None,
    mask: Tensor | None = None,
    bias_mask: Tensor | None = None,
) -> preserve.Hook:
    """Fit a consumer's kept weights (with a ridge) and bias to the dense model's outputs."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = preserve.input_of(args, kwargs)
        wanted = targets.outputs[name].to(inputs)
        if (name, "out", 0) in kept:
            wanted = wanted[:, kept[name, "out", 0].to(wanted.device)]
        rows = _rows(module, inputs, targets.positions[name].to(wanted.device))
        if targets.dealt:  # all solve the same problem
            rows, wanted = distributed.concatenate(rows), distributed.concatenate(wanted)
        weight = module.weight.flatten(1)  # type: ignore[union-attr, operator]
        row_mean, wanted_mean = rows.mean(0), wanted.mean(0)
        if ridge is not None:
            centred = rows - row_mean
            residual = (wanted - wanted_mean) - centred @ weight.t()
            if mask is None:
                weight = weight + _ridge_solution(centred, residual, ridge).t()
            else:
                weight = weight + _masked_ridge_solution(centred, residual, ridge, mask.flatten(1).to(weight))
            module.weight.copy_(weight.view_as(module.weight))  # type: ignore[union-attr, operator, arg-type]
        if module.bias is not None:
            bias = wanted_mean - weight @ row_mean
            module.bias.copy_(bias if bias_mask is None else bias * bias_mask.to(bias))  # type: ignore[union-attr, operator]

    return hook


def _ridge_solution(a: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """argmin_D ||residual - a D||^2 + lambda ||D||^2, lambda = ridge * mean diagonal of a^T a.

    Through the smaller of the two normal equations: (a^T a + lambda)^-1 a^T r = a^T (a a^T + lambda)^-1 r.
    """
    n, d = a.shape
    penalty = ridge * float(a.square().sum()) / d + torch.finfo(a.dtype).tiny
    # in double precision on the CPU: not every accelerator has it
    small = (a.t() @ a if d <= n else a @ a.t()).cpu().double()
    small.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(small)
    if d <= n:
        return torch.cholesky_solve((a.t() @ residual).cpu().double(), factor).to(a)
    return a.t() @ torch.cholesky_solve(residual.cpu().double(), factor).to(a)


def _masked_ridge_solution(a: Tensor, residual: Tensor, ridge: float, mask: Tensor) -> Tensor:
    """argmin_D ||residual - a D^T||^2 + lambda ||D||^2 over ``[outputs, inputs]`` D that are zero where the mask is.

    Every row is a problem of its own, because its support is; all are solved together by conjugate gradients on
    (a^T a + lambda) restricted to the supports. Each iteration is one matrix product (two thin ones where there are
    fewer rows than inputs), and none makes the fit worse.
    """
    n, d = a.shape
    penalty = ridge * float(a.square().sum()) / d + torch.finfo(a.dtype).tiny
    gram = a.t() @ a if d <= n else None
    solution = torch.zeros_like(mask)
    left = (residual.t() @ a) * mask
    direction = left.clone()
    square = left.square().sum(1, keepdim=True)
    enough = square * CONVERGED**2
    for _ in range(ITERATIONS):
        product = (direction @ a.t()) @ a if gram is None else direction @ gram
        image = product.add_(direction, alpha=penalty).mul_(mask)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, square / curvature.clamp_min(torch.finfo(a.dtype).tiny), 0)
        solution.addcmul_(step, direction)
        left.addcmul_(step, image, value=-1)
        after = left.square().sum(1, keepdim=True)
        if bool((after <= enough).all()):
            break
        direction = left + direction * torch.where(square > 0, after / square.clamp_min(torch.finfo(a.dtype).tiny), 0)
        square = after
    return solution


def _images(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, int]:
    """This rank's share of the images (all of them, if there are fewer than ranks), and the number of all."""
    images = torch.cat([batch.images for batch in batches])
    images = images[: max(1, MOST_VALUES // images[0].numel())]
    return distributed.own_share(images).to(preserve.device_of(model)), len(images)


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if layers.has_running_statistics(module)]


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel of ``[n, C, ...]``, over all ranks."""
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    if distributed.size() == 1:
        return mean, var
    own_mean, own_var, n = mean.cpu().double(), var.cpu().double(), x.numel() // x.shape[1]
    count = torch.tensor(float(n), dtype=torch.float64)
    sums = distributed.all_sum({"mean": n * own_mean, "n": count})
    whole = sums["mean"] / sums["n"]
    squares = distributed.all_sum({"var": n * (own_var + (own_mean - whole).square())})
    return whole.to(mean), (squares["var"] / sums["n"]).to(var)


def _by_position(module: nn.Module, output: Tensor) -> Tensor:
    """``[n, positions, C]``."""
    if layers.channel_dim(module) == 1:
        return output.flatten(2).transpose(1, 2)
    return output.reshape(output.shape[0], -1, output.shape[-1])


def can_refit(module: nn.Module) -> bool:
    """Exact layer types only: a subclass may pad or scale in ways that `_rows` does not know."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _rows(module: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """``[n * p, fan_in]``: what the consumer reads at the given output positions."""
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].flatten(0, 1)
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = module.kernel_size, module.stride, module.dilation, module.padding  # type: ignore[misc]
    width = (x.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1  # type: ignore[operator]
    padded = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x  # type: ignore[arg-type]
    top = positions.div(width, rounding_mode="floor") * sh
    left = positions % width * sw
    taps_y = (torch.arange(kh, device=x.device) * dh).repeat_interleave(kw)  # type: ignore[arg-type]
    taps_x = (torch.arange(kw, device=x.device) * dw).repeat(kh)  # type: ignore[arg-type]
    patches = padded[:, :, top[:, None] + taps_y, left[:, None] + taps_x]
    return patches.permute(0, 2, 1, 3).reshape(len(x) * len(positions), -1)
