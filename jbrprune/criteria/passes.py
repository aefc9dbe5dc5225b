"""What every pass over the data has in common: the question put to a batch, its answer, and the checks around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jbrprune.criteria.objectives import Objective, Target
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, ModelError
from jbrprune.evaluation.agreement import raise_nonfinite


class Draws:
    """Random numbers that depend on a seed and the position of a sample in the data, whoever works on it, and when.

    They are those that one generator draws sample by sample. To go back means to begin anew, to go on to let pass
    what lies between, which is cheap beside a forward pass.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._position = 0
        self._generator = torch.Generator().manual_seed(seed)

    def at(self, start: int, count: int, each: int) -> torch.Generator:
        """A generator for ``each`` numbers of each of ``count`` samples from ``start`` on; all of them are drawn."""
        if start < self._position:
            self._generator.manual_seed(self._seed)
            self._position = 0
        for first in range(self._position, start, _PASSING):
            torch.randint(0, 2, (min(_PASSING, start - first), each), generator=self._generator, dtype=torch.int8)
        self._position = start + count
        return self._generator


_PASSING = 1024


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of every batch."""

    objective: Objective
    confidence: float
    autocast: torch.dtype | None
    draws: Draws


def losses_of(batch: Batch, logits: Tensor, question: Question, start: int) -> tuple[Tensor, Tensor | None]:
    """``[kept]`` the objective on every sample that the dense model is confident about, with its graph.

    Args:
        batch: The samples.
        logits: ``[B, K]`` of the model on them.
        question: What is asked.
        start: Position of the first of them in the data.

    Returns:
        The objective, and ``[B]`` which samples are kept (None: all).

    Raises:
        ModelError: Nothing that is scored takes part in the logits.
    """
    with torch.enable_grad():
        # A sample's scalar is formed in float32 at least: a cross-entropy of half precision loses confident samples.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        reference = logits.detach() if batch.reference is None else batch.reference
        generator = question.draws.at(start, len(logits), logits.shape[1])
        losses = question.objective(logits, Target(reference, batch.labels, generator))
        keep = reference.softmax(1).amax(1) > question.confidence if question.confidence > 0 else None
        losses = losses if keep is None else losses[keep]
    if not losses.requires_grad:
        raise ModelError("No scored layer takes part in the logits: there is nothing to differentiate.")
    return losses, keep


def check_logits(model: nn.Module, batch: Batch, number: int, logits: Tensor, autocast: torch.dtype | None) -> None:
    """Refuse logits that do not belong to the images, or are not finite."""
    if len(logits) != len(batch):
        raise ModelError(f"Batch {number}: {len(batch)} images went in, {len(logits)} rows of logits came out.")
    if not torch.isfinite(logits).all():
        raise_nonfinite(model, batch.images, f"Batch {number}: the logits", autocast_dtype=autocast)


def own(tensor: Tensor) -> Tensor:
    """Apart from any graph of the user's; a tensor of inference mode cannot enter a graph at all."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def check_samples(samples: int, skipped: int, confidence: float) -> None:
    """Refuse to average over nothing.

    Raises:
        DataError: No sample was left.
    """
    if samples == 0:
        raise DataError(
            f"No sample was left: the dense model's largest probability exceeds confidence={confidence} on none "
            f"of {skipped} images. Lower the threshold."
        )
