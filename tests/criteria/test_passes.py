"""What every pass over the data has in common."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jbrprune.criteria.objectives import OBJECTIVES, Target
from jbrprune.criteria.passes import Draws, Question, losses_of
from jbrprune.data.batches import Batch
from jbrprune.errors import ModelError

LOGITS = torch.tensor([[9.0, 0.0], [0.0, 0.5], [1.0, 6.0]])


def batch() -> Batch:
    return Batch(torch.zeros(3, 3, 2, 2))


def question(confidence: float = 0.0) -> Question:
    return Question(OBJECTIVES["pseudo_label"], confidence, None, Draws(0))


def test_half_precision_logits_reach_the_objective_in_float32_with_their_graph() -> None:
    """A bfloat16 cross-entropy of a confident sample has an error of a percent."""
    logits = LOGITS.bfloat16().requires_grad_()
    seen: list[Tensor] = []

    def objective(values: Tensor, target: Target) -> Tensor:
        seen.extend((values, target.reference))
        return OBJECTIVES["pseudo_label"](values, target)

    with torch.no_grad():
        losses, keep = losses_of(batch(), logits, Question(objective, 0.0, torch.bfloat16, Draws(0)), 0)
    assert [tensor.dtype for tensor in seen] == [torch.float32, torch.float32]
    assert keep is None
    double = LOGITS.double()
    expected = double.logsumexp(1) - double.amax(1)
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.dtype == torch.bfloat16
    assert (gradient[0] != 0).all()


def test_float64_stays() -> None:
    losses, _ = losses_of(batch(), LOGITS.double().requires_grad_(), question(), 0)
    assert losses.dtype == torch.float64


def test_unsure_samples_are_left_out() -> None:
    logits = LOGITS.clone().requires_grad_()
    every, _ = losses_of(batch(), logits, question(), 0)
    some, keep = losses_of(batch(), logits, question(0.9), 0)
    assert keep is not None
    assert keep.tolist() == [True, False, True]
    assert torch.equal(some, every[[0, 2]])


def test_logits_without_a_graph_are_refused() -> None:
    with pytest.raises(ModelError, match="nothing to differentiate"):
        losses_of(batch(), LOGITS, question(), 0)
