"""How the logits of every sample change when units go, to first order: any number of cuts from one pass.

Every consumer reads its input a through two gates that hold still, a (1 + z) + y with z = y = 0, one of each for every
sample and channel. For a logit f_k, df_k/dz = sum over positions of a * df_k/da is what the channel contributes through
this layer, df_k/dy = sum of df_k/da what a constant in its place would. A cut S then changes the logit by

* ``zeroed``:   -sum of df_k/dz over the channels of S: the units are gone, = -J_k w_S;
* ``repaired``: -sum of (df_k/dz - mean(a) df_k/dy): their mean stays, times the share of the rest that a repair
  leaves in this layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.relevance import scored_members
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.verification import check_samples_apart

ROWS = 10
"""Logits that are followed one by one, the largest of every sample; all others together through random signs."""


@dataclass(frozen=True, eq=False)
class Changes:
    """First-order changes of N samples by B cuts.

    Attributes:
        top: ``[N, R]`` the R largest logits of the dense model, falling.
        classes: ``[N, R]`` which classes they are of.
        zeroed: ``[B, N, R]`` their changes when the units are gone.
        repaired: ``[B, N, R]`` when the rest of the model makes up for them.
        rest: ``[2, B, N]`` the change (zeroed, repaired) of the other logits under random signs: its square is an
            unbiased estimate of the sum of their squares. Zero where there are no others.
        spread: ``[N]`` Euclidean norm of all K logits about their mean.
    """

    top: Tensor
    classes: Tensor
    zeroed: Tensor
    repaired: Tensor
    rest: Tensor
    spread: Tensor

    def first(self, number: int) -> Changes:
        """Of the first samples alone."""
        return Changes(
            self.top[:number], self.classes[:number], self.zeroed[:, :number], self.repaired[:, :number],
            self.rest[:, :, :number], self.spread[:number],
        )  # fmt: skip


def logit_changes(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    cuts: Sequence[Selection],
    *,
    means: Mapping[str, Tensor],
    left: Mapping[str, Tensor] | None = None,
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> Changes:
    r"""First-order changes of the logits of every sample, -J(x) w_S, for every cut S at once.

    Exact for all K logits where K <= ``rows``; otherwise for the largest ``rows`` of every sample. One forward and
    ``min(K, rows)`` backward passes to the activations (one more where K > ``rows``), however many cuts there are.

    Args:
        model: The dense model; left as it was.
        batches: Images ``[B, C, H, W]``.
        groups: The units of this very model.
        cuts: Group name -> units that go, one mapping per cut.
        means: Consumer -> ``[C_in]`` means of what it reads (`jbrprune.prediction.residual.input_moments`).
        left: Consumer -> ``[cuts]`` share of an amplitude that a repair leaves beyond the mean; None: all of it.
        rows: Logits of every sample that are followed one by one.
        seed: Seeds the signs, which are drawn sample by sample in the order of the data.
        progress: Show a progress bar.

    Raises:
        ArgumentError: ``rows`` below 2, or no cuts.
        ModelError: Samples influence each other, or no consumer takes part in the logits.
        NonFiniteError: NaN or Inf in the changes.

    Source:
        Arpit, arXiv 2512.11089 (the linear response to dw = -w_S).
    """
    if rows < 2 or not cuts:
        raise ArgumentError(f"Changes need at least 2 rows and 1 cut, got rows={rows} and {len(cuts)} cuts.")
    device = preserve.device_of(model)
    masks = cut_masks(model, groups, cuts)
    bare = {name: torch.ones(len(cuts)) for name in masks} | dict(left or {})
    lost = {name: _Lost(mask.to(device), means[name].to(device), bare[name].to(device)) for name, mask in masks.items()}
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with ExitStack() as visit:
        shown = tqdm(batches, "predicting", unit="batch", disable=None if progress else True, leave=False)
        for number, batch in enumerate(shown):
            visit.enter_context(preserve.inference_state(model))
            images = batch.to(device).images
            if number == 0:
                check_samples_apart(model, images, list(masks))
            parts.append(_changes(model, images, lost, rows, generator, number))
            visit.close()
    top, classes, zeroed, repaired, rest, spread = zip(*parts, strict=True)
    return Changes(
        torch.cat(top), torch.cat(classes), torch.cat(zeroed, 1), torch.cat(repaired, 1), torch.cat(rest, 2),
        torch.cat(spread),
    )  # fmt: skip


def cut_masks(model: nn.Module, groups: Sequence[Group], cuts: Sequence[Selection]) -> dict[str, Tensor]:
    """Consumer -> ``[C_in, cuts]``, one where a channel of its input goes."""
    masks: dict[str, Tensor] = {}
    for (name, _), members in scored_members(model, groups, "consumer").items():
        mask = torch.zeros(layers.width_of(model.get_submodule(name), "in") or 0, len(cuts))
        for group, member in members:
            for number, cut in enumerate(cuts):
                if group in cut:
                    mask[member.without(cut[group])[0], number] = 1
        masks[name] = mask
    return masks


@dataclass(frozen=True, eq=False)
class _Lost:
    """Of a consumer: ``[C_in, cuts]`` where channels go, ``[C_in]`` their means, ``[cuts]`` what a repair leaves."""

    mask: Tensor
    mean: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class _Gates:
    """``[n, C]`` zeros that a consumer's input is multiplied with (after adding one), and that are added to it."""

    scale: Tensor
    shift: Tensor


def _changes(
    model: nn.Module,
    images: Tensor,
    lost: Mapping[str, _Lost],
    rows: int,
    generator: torch.Generator,
    number: int,
) -> tuple[Tensor, ...]:
    """The attributes of `Changes` for one batch."""
    gates: dict[str, _Gates] = {}
    with (
        torch.enable_grad(),
        preserve.hooked(model, forward_pre={name: _gated(name, gates, len(images)) for name in lost}),
    ):
        logits = logits_of(model(images.clone()))
    if not gates or not logits.requires_grad:
        raise ModelError(
            "No layer that reads removable channels takes part in the logits: there is nothing to predict."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, classes = logits.detach().sort(dim=1, descending=True, stable=True)
    top, classes = top[:, :rows], classes[:, :rows]
    with torch.enable_grad():
        questions = [*logits.gather(1, classes).sum(0)]
        others = _others(logits, classes, generator)
        questions += [] if others is None else [others]
    answers = []
    for asked, question in enumerate(questions, 1):
        answers.append(_answer(question, gates, lost, last=asked == len(questions)))
    changes = -torch.stack(answers, 3)  # [2, cuts, n, questions]
    if not torch.isfinite(changes).all():
        raise NonFiniteError(f"Batch {number}: the predicted changes contain NaN or Inf: the gradient is not finite.")
    both = changes[..., : classes.shape[1]]
    rest = torch.zeros_like(changes[..., 0]) if others is None else changes[..., -1]
    spread = (logits - logits.mean(1, keepdim=True)).detach().norm(dim=1)
    return tuple(part.cpu() for part in (top, classes, both[0], both[1], rest, spread))


def _gated(name: str, gates: dict[str, _Gates], samples: int) -> preserve.Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = preserve.input_of(args, kwargs)
        channels = x.shape[1 if layers.channel_dim(module) == 1 else -1]
        if not torch.is_grad_enabled():
            raise ModelError(f"{name} runs without gradients inside the model's forward: its units cannot be followed.")
        if x.shape[0] % samples:
            raise ModelError(
                f"{name}: the first dimension of its input {tuple(x.shape)} is not a multiple of the batch, {samples}."
            )
        if name not in gates:  # a layer that is called twice has the same gates twice
            both = (x.new_zeros(samples, channels, requires_grad=True) for _ in range(2))
            gates[name] = _Gates(*both)
        mine = (gates[name].scale, gates[name].shift)
        scale, shift = (_spread(gate, x, layers.channel_dim(module) == 1) for gate in mine)
        seen = torch.addcmul(x + shift, x.clone(), scale)
        return ((seen, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): seen})

    return hook


def _spread(gate: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """A gate in the shape of an input, whose first dimension may hold several rows of one sample."""
    gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], 0)
    ones = [1] * (x.dim() - 2)
    return gate.view(*gate.shape, *ones) if channels_first else gate.view(gate.shape[0], *ones, gate.shape[1])


def _others(logits: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor | None:
    """The logits of all other classes under random signs, added up over samples; None where there are none."""
    if classes.shape[1] == logits.shape[1]:
        return None
    signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8).to(logits.device)
    signs = (2 * signs - 1).to(logits).scatter(1, classes, 0)
    return (logits * signs).sum()


def _answer(question: Tensor, gates: Mapping[str, _Gates], lost: Mapping[str, _Lost], last: bool) -> Tensor:
    """``[2, cuts, n]`` what the channels of every cut contribute, and what is left of it after a repair."""
    asked = [gate for both in gates.values() for gate in (both.scale, both.shift)]
    found = torch.autograd.grad(question, asked, retain_graph=not last, allow_unused=True)
    wide = torch.promote_types(question.dtype, torch.float32)
    cuts = next(iter(lost.values())).mask.shape[1]
    total = question.new_zeros(2, cuts, len(asked[0]), dtype=wide)
    for name, scale, shift in zip(gates, found[::2], found[1::2], strict=True):
        if scale is None or shift is None:
            continue
        mask, mean, left = (tensor.to(wide) for tensor in vars(lost[name]).values())
        contributed = scale.to(wide)
        total[0] += (contributed @ mask).t()
        total[1] += ((contributed - shift.to(wide) * mean) @ (mask * left)).t()
    return total
