"""Which single weights go: an exact number of the least important ones, or N of every M."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jbrprune.errors import ArgumentError, BudgetError

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every ``of`` consecutive inputs of an output, at every place of a kernel, ``keep`` stay.

    Attributes:
        keep: N.
        of: M.
    """

    keep: int
    of: int

    @staticmethod
    def of_text(text: str) -> Pattern:
        """Read ``"2:4"``.

        Raises:
            ArgumentError: Not of the form N:M with 0 < N < M.
        """
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ArgumentError(f"A pattern is written N:M with 0 < N < M such as '2:4', got {text!r}.")
        return Pattern(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """``2:4``."""
        return f"{self.keep}:{self.of}"

    def schedule(self, steps: int) -> list[Pattern]:
        """From M of M down to N of M in at most this many steps."""
        stages = (self.of - (self.of - self.keep) * step // steps for step in range(1, steps + 1))
        return [Pattern(keep, self.of) for keep in dict.fromkeys(stages) if keep < self.of]


def keep_most_important(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: Scope = "global",
    floor: float = 0.0,
    passed: bool = False,
) -> dict[str, Tensor]:
    """Masks with exactly ``round(sparsity * n)`` zeros, at the least important weights; n over all, or per parameter.

    What is masked stays masked. Among equal scores the earlier weight goes first, so that the number is exact.

    Args:
        scores: Parameter name -> scores >= 0 in its shape.
        masks: Parameter name -> boolean mask, True where a weight is still there.
        sparsity: Share of zeros to reach, in [0, 1).
        scope: ``global``: rank all weights together. ``layer``: every parameter by itself.
        floor: Share of every parameter that stays, at least one weight: no layer collapses.
        passed: Let be what is past the sparsity already, which is an error otherwise.

    Returns:
        Parameter name -> boolean mask.

    Raises:
        BudgetError: The floors do not allow it, or more is masked already.

    Example:
        >>> scores = {"fc.weight": torch.tensor([[3.0, 1.0, 1.0, 2.0]])}
        >>> keep_most_important(scores, {"fc.weight": torch.ones(1, 4, dtype=torch.bool)}, 0.5)["fc.weight"]
        tensor([[ True, False, False,  True]])
    """
    if scope == "layer":
        alone = ({name: tensor} for name, tensor in scores.items())
        parts = (keep_most_important(one, masks, sparsity, floor=floor, passed=passed) for one in alone)
        return {name: mask for part in parts for name, mask in part.items()}
    total = sum(score.numel() for score in scores.values())
    count = round(sparsity * total)
    keys = torch.cat([_make_keys(score, masks[name], floor).flatten() for name, score in scores.items()])
    free = int((keys < math.inf).sum())
    gone = int((keys < 0).sum())
    where = next(iter(scores)) if len(scores) == 1 else f"{len(scores)} parameters"
    if count > free:
        raise BudgetError(
            f"sparsity={sparsity:g} cannot be reached: with floor={floor:g} (at least one weight) {total - free:,} of "
            f"{total:,} weights of {where} stay, {free / total:.4f} can go. Ask for less, or lower floor=."
        )
    if count < gone and passed:
        return {name: masks[name] for name in scores}
    if count < gone:
        raise BudgetError(
            f"sparsity={sparsity:g} is reached already: {gone:,} of {total:,} weights of {where} are masked "
            f"({gone / total:.4f}). Ask for more."
        )
    parts = smallest(keys, count).split([score.numel() for score in scores.values()])
    return {name: ~part.view(score.shape) for (name, score), part in zip(scores.items(), parts)}


def keep_pattern(score: Tensor, mask: Tensor, pattern: Pattern, dim: int) -> Tensor | None:
    """The N most important of every M consecutive weights along the inputs; None where M does not divide them.

    Args:
        score: Scores in the parameter's shape.
        mask: True where a weight is still there.
        pattern: N and M.
        dim: Dimension of the inputs.

    Example:
        >>> score = torch.tensor([[4.0, 3.0, 2.0, 5.0]])
        >>> keep_pattern(score, torch.ones_like(score, dtype=torch.bool), Pattern(1, 2), 1)
        tensor([[ True, False, False,  True]])
    """
    if score.shape[dim] % pattern.of:
        return None
    keyed = torch.where(mask, score, -1.0).movedim(dim, -1).unflatten(-1, (-1, pattern.of))
    order = keyed.argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(keyed, dtype=torch.bool).scatter_(-1, order[..., : pattern.keep], True)
    return best.flatten(-2).movedim(-1, dim) & mask


def at_floor(masks: Mapping[str, Tensor], floor: float) -> list[str]:
    """Names of the parameters that are pruned down to the floor."""
    return [name for name, mask in masks.items() if int(mask.sum()) <= _count_kept(mask.numel(), floor)]


def schedule(sparsity: float, steps: int, start: float = 0.0) -> list[float]:
    """Sparsities to reach, step by step; every step keeps the same share of what is left."""
    ratio = (1 - sparsity) / (1 - start)
    return [*(1 - (1 - start) * ratio ** (step / steps) for step in range(1, steps)), sparsity]


def _count_kept(size: int, floor: float) -> int:
    """Number of weights that the floor keeps."""
    return max(1, math.ceil(floor * size - 1e-9))


def _make_keys(score: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Scores as keys to sort by: pruned weights below all others, weights that the floor keeps above."""
    keys = torch.where(mask, score.double(), -1.0).flatten()
    stays = min(_count_kept(keys.numel(), floor), int(mask.sum()))
    if stays:
        protected = ~smallest(keys, keys.numel() - stays)
        keys[protected] = math.inf
    return keys.view(score.shape)


def smallest(keys: Tensor, count: int) -> Tensor:
    """``[n]`` True at exactly ``count`` smallest keys; among equal ones the earlier first.

    Through the k-th value: sorting tens of millions of numbers would cost more than scoring them.
    """
    chosen = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    if count == 0:
        return chosen
    threshold = keys.kthvalue(count).values
    torch.lt(keys, threshold, out=chosen)
    equal = (keys == threshold).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen
