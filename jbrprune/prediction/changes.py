"""First-order changes of the logits of every sample when units are removed: any number of cuts from one pass.

Every consumer reads its input a through a gate (`jbrprune.criteria.gates`). For a logit f_k, df_k/dz = sum over
positions of a * df_k/da is the contribution of the channel through this layer, df_k/dy = sum of df_k/da that of a
constant 1 in its place. A cut S changes the logit by

* ``zeroed``:   -sum of df_k/dz over the channels of S: the units are removed, = -J_k w_S;
* ``repaired``: -r sum of (df_k/dz - mean(a) df_k/dy): the repair keeps the mean of the removed channels, and a least
  squares refit of this layer reproduces their variation except for the share r of its amplitude.

Let C be the covariance of the channels that a consumer reads (over samples and positions), S the removed and K the kept
ones, and W_S the weights that read S. The ridge regression B = (C_KK + lambda I)^-1 C_KS of S on K has the residual
covariance E = C_SS - C_SK B - B^T C_KS + B^T C_KK B, and r^2 = tr(W_S E W_S^T) / tr(W_S C_SS W_S^T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.gates import differentiate, effects, gated_logits
from jbrprune.criteria.relevance import scored_members
from jbrprune.data.batches import Batch
from jbrprune.errors import NonFiniteError
from jbrprune.evaluation.agreement import explain_out_of_memory
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.models import layers, preserve
from jbrprune.prediction.damage import Damage, damage, saturation
from jbrprune.repair.repair import RIDGE
from jbrprune.structure.directions import End, Moments, measure_moments
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.verification import check_samples_apart

FOLLOWED = 10
"""Logits that are followed one by one, the largest of every sample; all others together through random signs."""


@dataclass(frozen=True, eq=False)
class Changes:
    """First-order changes of N samples by B cuts.

    Attributes:
        top: ``[N, R]`` the R largest logits of the dense model, falling.
        classes: ``[N, R]`` which classes they are of.
        zeroed: ``[B, N, R]`` their changes when the units are removed.
        repaired: ``[B, N, R]`` their changes when the units are removed and the model is repaired.
        rest: ``[2, B, N]`` the change (zeroed, repaired) of the other logits under random signs: its square is an
            unbiased estimate of the sum of their squares. Zero where there are no others.
        spread: ``[N]`` Euclidean norm of all K logits about their mean; of other rows about zero.
        saturate: Whether `change` saturates (`jbrprune.prediction.damage`).
        output: What made the rows. Of dense logits the largest are those of one position, drawn for every sample.
    """

    top: Tensor
    classes: Tensor
    zeroed: Tensor
    repaired: Tensor
    rest: Tensor
    spread: Tensor
    saturate: bool = True
    output: Output = LOGITS

    def first(self, number: int) -> Changes:
        """The changes of the first samples only."""
        return replace(
            self,
            top=self.top[:number],
            classes=self.classes[:number],
            zeroed=self.zeroed[:, :number],
            repaired=self.repaired[:, :number],
            rest=self.rest[:, :, :number],
            spread=self.spread[:number],
        )

    def change(self, cut: int, *, repaired: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """``[N, R]`` change of the largest logits and ``[N]`` of the rest under random signs, times ``scale``."""
        change, rest = (self.repaired if repaired else self.zeroed)[cut], self.rest[int(repaired), cut]
        if self.saturate:
            factor = saturation(change, rest, self.spread)
            change, rest = change * factor[:, None], rest * factor
        return change * scale, rest * scale

    def damage(self, cut: int, *, repaired: bool = False, scale: float = 1.0) -> Damage:
        """Predicted TPV and flips of one cut."""
        return damage(self.top, *self.change(cut, repaired=repaired, scale=scale), self.output)

    def lost(self, cut: int, *, repaired: bool = False, scale: float = 1.0) -> float:
        """Predicted flips; where there are no classes the relative error, as a mean over tensors of squares."""
        found = self.damage(cut, repaired=repaired, scale=scale)
        return found.flips if self.output.decides else math.sqrt(found.tpv / len(self.output.names))


def predict_changes(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    cuts: Sequence[Selection],
    output: Output = LOGITS,
    *,
    refits: bool = True,
    followed: int = FOLLOWED,
    seed: int = 0,
    progress: bool = False,
) -> Changes:
    """Predict how cuts change the logits, without cutting: -J(x) w_S for every sample and every cut S.

    One forward pass for the moments of what is read, then one forward and ``min(K, followed)`` backward passes (one
    more where K > ``followed``), whatever the number of cuts. Exact for all K logits where K <= ``followed``; otherwise
    for the largest ones of every sample.

    Args:
        model: The dense model; left as it was.
        batches: Images ``[B, C, H, W]``.
        groups: The units of this very model.
        cuts: Group name -> units that go, one mapping per cut.
        output: What of the model's output counts.
        refits: Whether the repair refits weights by least squares, or only takes over means.
        followed: Logits of every sample that are followed one by one, at least two.
        seed: Seeds the signs, which are drawn sample by sample in the order of the data.
        progress: Show a progress bar.

    Raises:
        ModelError: Samples influence each other, or no unit takes part in the logits.
        NonFiniteError: NaN or Inf.

    Source:
        Arpit, arXiv 2512.11089 (the linear response to dw = -w_S).
    """
    device = preserve.device_of(model)
    masks = cut_masks(model, groups, cuts)
    moments = measure_moments(model, batches, [key for key in masks if key[1] == "in"])
    amplitudes = {key: torch.ones(len(cuts)) for key in masks}  # of what a repair leaves beyond the mean
    if refits:
        for key, found in moments.items():
            amplitudes[key] = find_unexplained(found, model.get_submodule(key[0]), masks[key], RIDGE).sqrt()
    generator = torch.Generator().manual_seed(seed)
    parts, copying = [], False
    shown = tqdm(batches, "predicting", unit="batch", disable=None if progress else True, leave=False)
    for number, batch in enumerate(shown):
        with preserve.inference_state(model), explain_out_of_memory(len(batch)):
            images, drawn = batch.to(device).images, generator.get_state()
            if number == 0:
                check_samples_apart(model, images, [name for name, _ in masks])

            def run(images: Tensor = images, drawn: Tensor = drawn) -> tuple[Tensor, ...]:
                logits, gates = gated_logits(model, images, masks, output, constants=True)
                generator.set_state(drawn)  # the same signs where the batch is run again
                top, classes = output.follow(logits, followed, generator)
                single, answers = classes.shape[1], []
                asked = single + (single < logits.shape[1])
                for number in range(asked):
                    if number < single:
                        direction = torch.zeros_like(logits).scatter(1, classes[:, number, None], 1)
                    else:
                        signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8).to(device)
                        direction = (2 * signs - 1).to(logits).scatter(1, classes, 0)
                    contributed = 0
                    for key, (z, y) in effects(logits, direction, gates, again=number + 1 < asked).items():
                        mask = masks[key].to(z)
                        beyond = z - y * moments[key].mean.to(z) if key in moments else z  # nothing mends queries
                        remains = mask * amplitudes[key].to(z)
                        contributed = contributed + torch.stack([(z @ mask).t(), (beyond @ remains).t()])
                    answers.append(contributed)
                changes = -torch.stack(answers, 3)  # [2, cuts, n, directions]
                if not torch.isfinite(changes).all():
                    raise NonFiniteError("The predicted changes contain NaN or Inf: the gradient is not finite.")
                rest = changes[..., -1] if asked > single else torch.zeros_like(changes[..., 0])
                spread = output.centre(logits).detach().norm(dim=1)
                return top, classes, *changes[..., :single], rest, spread

            found, copying = differentiate(run, copying)
            wide = torch.promote_types(found[0].dtype, torch.float32)
            parts.append([part.cpu().to(wide) if part.is_floating_point() else part.cpu() for part in found])
    whole: list[Any] = [torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (0, 0, 1, 1, 2, 0))]
    return Changes(*whole, output=output)


def cut_masks(model: nn.Module, groups: Sequence[Group], cuts: Sequence[Selection]) -> dict[End, Tensor]:
    """Consumer -> ``[C_in, cuts]``, one where a channel of its input goes; and of queries, where one of them goes."""
    masks: dict[Any, Tensor] = {}
    for key, members in scored_members(model, groups, "consumer").items():
        mask = torch.zeros(layers.width_of(model.get_submodule(key[0]), key[1]) or 0, len(cuts))
        for group, member in members:
            for number, cut in enumerate(cuts):
                if group in cut:
                    mask[member.channels_of(cut[group]), number] = 1
        masks[key] = mask
    return masks


def find_unexplained(moments: Moments, layer: nn.Module, masks: Tensor, ridge: float) -> Tensor:
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
    other = isinstance(layer, nn.modules.conv._ConvTransposeNd | nn.RNNBase)
    if other or not layers.is_consumer(layer) or layers.is_grouped(layer):
        return shares
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows = weight.detach().cpu().double().reshape(*weight.shape[:2], -1).transpose(1, 2).flatten(0, 1)
    energy, covariance = rows.t() @ rows, moments.covariance  # W^T W summed over kernel positions
    for number, gone in enumerate(masks.t().bool().cpu()):
        lost, kept, across = covariance[gone][:, gone], covariance[~gone][:, ~gone], covariance[~gone][:, gone]
        penalty = ridge * float(kept.diagonal().mean()) + torch.finfo(kept.dtype).tiny
        factor, failed = torch.linalg.cholesky_ex(kept + penalty * torch.eye(len(kept), dtype=kept.dtype))
        read = energy[gone][:, gone]
        whole = float((read * lost).sum())
        if whole > 0 and not int(failed):
            solved = torch.cholesky_solve(across, factor)
            error = lost - across.t() @ solved - solved.t() @ across + solved.t() @ kept @ solved  # of the ridge fit
            shares[number] = min(1.0, max(0.0, float((read * error).sum()) / whole))
    return shares
