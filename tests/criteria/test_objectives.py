"""Objectives: their gradient is m(x), one sample does not see another."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

from jbrprune.criteria.objectives import (
    OBJECTIVES,
    Directions,
    Target,
    label,
    margin,
    predicted_logit,
    projection,
    pseudo_label,
)
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, DataError

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 2.9], [-4.0, -5.0, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 1, 0])


def target(logits: Tensor = LOGITS, labels: Tensor | None = LABELS, seed: int = 5) -> Target:
    return Target(logits, labels, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_direction(name: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    values = OBJECTIVES[name](logits, target())
    assert values.shape == (3,)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    expected = reference.directions(name, LOGITS, LABELS, reference.signs(3, 3, 5))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_values_by_hand() -> None:
    assert predicted_logit(LOGITS, target()).tolist() == [2.0, 3.0, 1.0]
    torch.testing.assert_close(margin(LOGITS, target()), torch.tensor([1.5, 0.1, 5.0]).double())
    two = torch.tensor([[0.0, 0.0]])
    torch.testing.assert_close(pseudo_label(two, target(two)), torch.tensor([0.6931472]))
    torch.testing.assert_close(
        label(torch.tensor([[1.0, 0.0]]), target(two, torch.tensor([1]))), torch.tensor([1.3132617])
    )


def test_the_reference_decides_not_the_logits() -> None:
    dense = LOGITS.flip(1)  # classes 2, 1, 0 instead of 0, 1, 2
    assert predicted_logit(LOGITS, target(dense)).tolist() == [0.5, 3.0, -4.0]
    torch.testing.assert_close(margin(LOGITS, target(dense)), torch.tensor([-1.5, 3.0, -5.0]).double())


def test_signs_do_not_depend_on_the_batch_size() -> None:
    logits = torch.eye(4).repeat(16, 1)
    whole = projection(logits, target(logits, None))
    for size in (1, 7):
        shared = target(logits, None)
        assert torch.equal(torch.cat([projection(part, shared) for part in logits.split(size)]), whole)
    assert set(whole.tolist()) == {-1.0, 1.0}


def test_signs_are_balanced_and_independent() -> None:
    signs = reference.signs(20_000, 2, 0).double()
    assert signs.mean(0).abs().max() < 0.03
    assert (signs[:, 0] * signs[:, 1]).mean().abs() < 0.03


@pytest.mark.parametrize("gap", [-200.0, 0.0, 15.0, 60.0, 200.0])
def test_the_gradient_of_a_confident_sample_is_not_lost(gap: float) -> None:
    """In float32: p - 1 would be zero from a gap of 17 on."""
    logits = torch.tensor([[gap, 0.0]], requires_grad=True)
    value = label(logits, target(logits.detach(), torch.tensor([0])))
    value.sum().backward()
    p_other = torch.tensor(-gap).double().sigmoid().float()
    torch.testing.assert_close(logits.grad, torch.stack([-p_other, p_other])[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(value, torch.nn.functional.softplus(torch.tensor([-gap]).double()).float())


@pytest.mark.parametrize("gap", [-21.0, -25.0, -30.0])
def test_a_confident_error_keeps_the_digits_of_float64(gap: float) -> None:
    """p - 1 = -1 / (1 + exp(gap)) differs from -1 by more than rounding: by 8e-10, 1e-11, 9e-14."""
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(label(logits, target(logits.detach(), torch.tensor([0]))).sum(), logits)
    missing = math.exp(gap) / (1 + math.exp(gap))
    torch.testing.assert_close(1 + gradient[0, 0].item(), missing, rtol=0, atol=3e-16)
    torch.testing.assert_close(1 - gradient[0, 1].item(), missing, rtol=0, atol=3e-16)


# --- directions ------------------------------------------------------------------------------------------------------


def batch(labels: Tensor | None = None, reference: Tensor | None = None) -> Batch:
    return Batch(torch.zeros(3, 3, 2, 2), labels, reference)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_directions_are_gradients_of_the_objective(name: str) -> None:
    m, stays = Directions(OBJECTIVES[name], seed=5)(LOGITS, batch(LABELS), 0)
    expected = reference.directions(name, LOGITS, LABELS, reference.signs(3, 3, 5))
    torch.testing.assert_close(m, expected, rtol=1e-12, atol=1e-15)
    assert stays.all()


def test_half_precision_logits_reach_the_objective_in_float32() -> None:
    """A bfloat16 cross-entropy of a confident sample has an error of a percent."""
    seen: list[Tensor] = []

    def objective(logits: Tensor, target: Target) -> Tensor:
        seen.extend((logits, target.reference))
        return pseudo_label(logits, target)

    logits = torch.tensor([[9.0, 0.0], [0.0, 0.5], [1.0, 6.0]])
    m, _ = Directions(objective)(logits.bfloat16(), batch(), 0)
    assert [tensor.dtype for tensor in (*seen, m)] == [torch.float32] * 3
    expected = reference.directions("pseudo_label", logits.double()).float()
    torch.testing.assert_close(m, expected, rtol=1e-5, atol=0)


def test_unsure_samples_are_left_out() -> None:
    """Of the dense model: its largest probabilities are .79, .51 and .99."""
    m, stays = Directions(margin, 0.9)(LOGITS.flip(0), batch(reference=LOGITS), 0)
    assert stays.tolist() == [False, False, True]
    assert m.any(1).tolist() == [False, False, True]
    assert Directions(margin, 0.5)(LOGITS, batch(), 0)[1].all()


def test_random_signs_belong_to_the_sample() -> None:
    """In any order and portion, forwards and backwards, what one generator draws in order."""
    whole = 2 * torch.randint(0, 2, (3000, 7), generator=torch.Generator().manual_seed(5), dtype=torch.int8) - 1
    directions = Directions(projection, seed=5)
    for start, count in ((0, 3), (3, 1), (2500, 20), (2520, 5), (10, 4), (0, 1), (2999, 1)):
        m, _ = directions(torch.zeros(count, 7), Batch(torch.zeros(count, 1, 1, 1)), start)
        assert torch.equal(m, whole[start : start + count].float()), start


def test_a_label_of_no_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be below 3, .*; got 3"):
        label(LOGITS, target(labels=torch.tensor([0, 3, 1])))


def test_missing_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"needs labels, .*choose a label-free objective"):
        label(LOGITS, target(labels=None))


@pytest.mark.parametrize("objective", [pseudo_label, margin, label])
def test_one_class_is_refused(objective: object) -> None:
    one = torch.zeros(3, 1)
    with pytest.raises(ArgumentError, match="needs at least two classes, the model has 1"):
        objective(one, target(one, torch.zeros(3, dtype=torch.long)))  # type: ignore[operator]
