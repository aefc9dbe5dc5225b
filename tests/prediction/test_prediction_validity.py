"""When a prediction is called valid, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jbrprune.prediction.changes import Changes
from jbrprune.prediction.damage import Check, check

LOGITS = torch.tensor([[3.0, 0.0], [4.0, 1.0], [9.0, 2.0]]).repeat(40, 1).double()
"""Two classes, the first one ahead by 3, 3 and 7; spread 3 / sqrt 2 and so on."""


def foretold(change: Tensor, *, saturate: bool = False) -> Changes:
    n = len(change)
    spread = (LOGITS[:n] - LOGITS[:n].mean(1, keepdim=True)).norm(dim=1)
    classes = torch.tensor([[0, 1]]).expand(n, 2)
    rest = torch.zeros(2, 1, n).double()
    return Changes(LOGITS[:n], classes, change[None], change[None], rest, spread, saturate)


def seen(predicted: Tensor, real: Tensor, **options: float) -> Check:
    saturate = bool(options.pop("saturate", False))
    return check(foretold(predicted, saturate=saturate), 0, LOGITS[: len(real)] + real, LOGITS, **options)


def by(first: float, second: float = 0.0, images: int = 40) -> Tensor:
    return torch.tensor([[first, second]]).double().repeat(images, 1)


def test_the_error_is_that_of_what_is_shown_not_of_the_plain_first_order() -> None:
    real = by(-2.5)
    plain, saturating = seen(real, real), seen(real, real, saturate=True)
    assert plain.taylor_error == saturating.taylor_error == 0
    assert (plain.prediction_error, plain.valid) == (0, True)
    n = 2.5 / saturating_spread(real)
    lost = (1 - (1 - (-n).exp()) / n) * 2.5
    assert saturating.prediction_error == pytest.approx(float(lost.square().mean().sqrt()) / 2.5, rel=1e-9)
    assert saturating.prediction_error > 0.3
    assert not saturating.valid


def saturating_spread(change: Tensor) -> Tensor:
    return (LOGITS[: len(change), 0] - LOGITS[: len(change), 1]) / 2**0.5


def test_what_a_correction_makes_of_it_is_what_counts() -> None:
    assert not seen(by(-1.0), by(-2.0)).valid
    corrected = seen(by(-1.0), by(-2.0), scale=2.0)
    assert (corrected.taylor_error, corrected.prediction_error, corrected.valid) == (0.5, 0, True)
    assert corrected.predicted.tpv == corrected.masked.tpv == pytest.approx(4)


@pytest.mark.parametrize(
    ("predicted", "valid"),
    [(1.0, True), (0.9, True), (1.13, True), (0.85, False), (1.15, False)],  # squares: .81, 1.28; .72, 1.32
)
def test_the_tpv_must_agree_within_a_factor_of_one_and_the_tolerance(predicted: float, valid: bool) -> None:
    found = seen(by(predicted), by(1.0))
    assert found.prediction_error == pytest.approx(abs(predicted - 1))
    assert found.valid is valid


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_flips_that_are_missed(wrong: int) -> None:
    """Half an image is added to each of the four cells: 42 images, wrong + 1 of which count once."""
    real = by(-2.9)
    real[: 3 * wrong : 3] = by(-3.1, images=wrong)
    found = seen(by(-2.9), real)
    assert (found.predicted.flips, found.masked.flips) == (0, wrong / 40)
    d = wrong / 42
    apart = d + 1.959964 * ((wrong + 1) / 42 - d**2) ** 0.5 / 42**0.5
    assert found.flips_apart == pytest.approx(apart, rel=1e-6)
    assert found.valid is (wrong < 2)
    assert found.valid is (apart < 0.1)


@pytest.mark.parametrize(
    ("predicted", "real", "valid"),
    [
        (6, 7, True),
        (7, 6, True),
        (6, 8, False),
        (8, 6, False),
        (7, 9, True),
        (1, 2, True),
        (1, 3, False),
        (0, 2, False),
    ],
)
def test_flips_must_agree_within_the_tolerance_or_a_point(predicted: int, real: int, valid: bool) -> None:
    """Of 120: 9 is less than 1.3 times 7, 8 more than 1.3 times 6; one image is less than a point, two are more."""
    changes = [by(-2.9, images=120), by(-2.9, images=120)]
    for change, flips in zip(changes, (predicted, real)):
        change[: 3 * flips : 3] = by(-3.1, images=flips)
    found = seen(*changes)
    assert (found.predicted.flips, found.masked.flips) == pytest.approx((predicted / 120, real / 120))
    assert found.flips_apart < 0.1
    assert found.valid is valid


def test_flips_of_other_images_do_not_make_up_for_those_that_are_missed() -> None:
    """As many, but not the same: the share agrees, and the interval says how little that is known."""
    predicted, real = by(-2.9), by(-2.9)
    predicted[0:12:3], real[12:24:3] = by(-3.1, images=4), by(-3.1, images=4)
    found = seen(predicted, real)
    assert found.predicted.flips == found.masked.flips == 0.1
    assert not found.valid


def test_too_few_images_to_know() -> None:
    assert not seen(by(-1.0, images=17), by(-1.0, images=17)).valid
    assert seen(by(-1.0, images=18), by(-1.0, images=18)).valid


def test_no_change_is_right_where_the_model_tells_images_apart_and_nothing_where_it_does_not() -> None:
    assert seen(by(0.0), by(0.0)).valid
    assert not seen(by(1e-3), by(0.0)).valid
    same = LOGITS[:1].expand(40, 2)
    found = check(foretold(by(0.0)), 0, same.clone(), same)
    assert not found.valid
