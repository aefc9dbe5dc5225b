"""Objectives: their gradient is m(x), one sample does not see another."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from jbrprune.criteria.objectives import (
    OBJECTIVES,
    Target,
    confident,
    label,
    margin,
    predicted_logit,
    projection,
    pseudo_label,
)
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


def test_confident() -> None:
    assert confident(LOGITS, 0.9).tolist() == [False, False, True]
    assert confident(LOGITS, 0.5).tolist() == [True, True, True]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    assert torch.equal(label(LOGITS, target(labels=LABELS.to(dtype))), label(LOGITS, target()))


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3, 1]), torch.tensor([-1, 0, 1]), torch.zeros(3, 1, dtype=torch.long)]
)
def test_labels_are_refused(labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"0 <= label < 3 .*got shape"):
        label(LOGITS, target(labels=labels))


def test_missing_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"needs labels, .*choose a label-free objective"):
        label(LOGITS, target(labels=None))


@pytest.mark.parametrize("objective", [pseudo_label, margin, label])
def test_one_class_is_refused(objective: object) -> None:
    one = torch.zeros(3, 1)
    with pytest.raises(ArgumentError, match="needs at least two classes, the model has 1"):
        objective(one, target(one, torch.zeros(3, dtype=torch.long)))  # type: ignore[operator]
