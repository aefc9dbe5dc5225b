"""What a least-squares repair can put back: how much of a consumer's lost input the kept channels explain.

With C the covariance of the channels that a consumer reads (over samples and positions), S those that go and K those
that stay, what no linear combination of the kept ones reproduces is C_SS - C_SK (C_KK + lambda I)^-1 C_KS. The share
of the lost *output* that is left is tr(W_S . W_S^T) of it over tr(W_S C_SS W_S^T), W_S being the weights that read S.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch
from jbrprune.models import layers, preserve


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Mean ``[C]`` and covariance ``[C, C]`` of what a layer reads, over samples and positions (float64, CPU)."""

    mean: Tensor
    covariance: Tensor


def input_moments(model: nn.Module, batches: Iterable[Batch], names: Iterable[str]) -> dict[str, InputMoments]:
    """Layer -> moments of its input channels, from one forward pass in eval mode; the model is left as it was."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def record(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = preserve.input_of(args, kwargs)
            rows = x.flatten(2).transpose(1, 2) if layers.channel_dim(module) == 1 and x.dim() > 2 else x
            rows = rows.reshape(-1, rows.shape[-1])
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            sums[name] = sums.get(name, 0) + rows.sum(0).cpu().double()
            squares[name] = squares.get(name, 0) + (rows.t() @ rows).cpu().double()
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    device = preserve.device_of(model)
    with ExitStack() as visit:
        for batch in batches:
            visit.enter_context(preserve.inference_state(model))
            visit.enter_context(preserve.hooked(model, forward_pre={name: record(name) for name in names}))
            model(batch.to(device).images.clone())
            visit.close()
    means = {name: total / counts[name] for name, total in sums.items()}
    return {
        name: InputMoments(mean, squares[name] / counts[name] - torch.outer(mean, mean)) for name, mean in means.items()
    }


def unexplained(moments: InputMoments, layer: nn.Module, masks: Tensor, ridge: float) -> Tensor:
    """``[cuts]`` share of the variance of a layer's lost output that its kept inputs cannot reproduce, in [0, 1].

    Args:
        moments: Of the layer's input.
        layer: A linear layer or an ungrouped convolution; of any other, all is left.
        masks: ``[C, cuts]``, one where a channel goes.
        ridge: lambda, relative to the mean variance of the kept channels.

    Returns:
        1 where nothing goes, or nothing stays.
    """
    shares = torch.ones(masks.shape[1], dtype=torch.float64)
    if not _reads_all(layer) or layers.width_of(layer, "in") != len(masks):
        return shares
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows = weight.detach().cpu().double().reshape(*weight.shape[:2], -1).transpose(1, 2).flatten(0, 1)
    for number, mask in enumerate(masks.t().bool().cpu()):
        if bool(mask.any()) and not bool(mask.all()):
            shares[number] = _left(moments.covariance, rows.t() @ rows, mask, ridge)
    return shares


def _reads_all(layer: nn.Module) -> bool:
    """Whether the weight is ``[outputs, inputs, ...]`` over all inputs."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return layers.is_consumer(layer) and not layers.is_grouped(layer) and not transposed


def _left(covariance: Tensor, energy: Tensor, gone: Tensor, ridge: float) -> float:
    """tr(E_SS C_S|K) / tr(E_SS C_SS), E = W^T W summed over kernel positions."""
    lost, kept, across = covariance[gone][:, gone], covariance[~gone][:, ~gone], covariance[~gone][:, gone]
    penalty = ridge * float(kept.diagonal().mean()) + torch.finfo(kept.dtype).tiny
    factor, failed = torch.linalg.cholesky_ex(kept + penalty * torch.eye(len(kept), dtype=kept.dtype))
    read = energy[gone][:, gone]
    whole = float((read * lost).sum())
    if whole <= 0 or int(failed):
        return 1.0
    solved = torch.cholesky_solve(across, factor)
    error = lost - across.t() @ solved - solved.t() @ across + solved.t() @ kept @ solved  # of the ridge solution
    return min(1.0, max(0.0, float((read * error).sum()) / whole))
