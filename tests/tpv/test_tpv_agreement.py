"""The ratio of training to test TPV: what its standard error is, and when it is called off."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from tpv_nets import estimated, linear, measured, mlp, pixels

from jbrprune.errors import ArgumentError
from jbrprune.tpv import Isotropic, TPVWarning, train_test_ratio


@pytest.mark.parametrize("same", [True, False])
def test_the_standard_error_is_the_spread_of_the_ratio(same: bool) -> None:
    """With the same draws most of what moves one side moves the other as well; with others nothing does."""
    net, images, found = mlp(), pixels(24_000), []
    for seed, some in enumerate(images.split(200)):
        train = measured(net, some[:100], Isotropic(1e-3), draws=6, seed=seed, batch_size=100)
        test = measured(net, some[100:], Isotropic(1e-3), draws=6, seed=seed if same else seed + 1000, batch_size=100)
        found.append(train_test_ratio(train, test, tolerance=1.0))
    spread = statistics.stdev((ratio.value - 1) / ratio.standard_error for ratio in found)
    assert spread == pytest.approx(1, abs=0.2)
    assert (statistics.stdev(ratio.value for ratio in found) < 0.1) is same


def test_draws_that_move_both_sides_alike_say_nothing_against_the_ratio() -> None:
    """One weight: the TPV of every draw is dw^2 x^2, and the ratio that of the mean x^2, whatever dw is."""
    net = linear(torch.ones(1, 1))
    one, other = (torch.tensor(x).double().view(-1, 1, 1, 1) for x in ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]))
    train, test = (measured(net, side, Isotropic(0.1), draws=6) for side in (one, other))
    assert train.relative_error > 0.1
    with pytest.warns(TPVWarning, match="disagree"):
        found = train_test_ratio(train, test)
    assert found.value == pytest.approx(0.25)
    assert found.standard_error < 1e-6
    assert not found.agrees
    longer = measured(net, other, Isotropic(0.1), draws=12)  # six of its draws are the same
    independent = found.value * math.hypot(train.relative_error, longer.relative_error)
    assert train_test_ratio(train, longer, tolerance=5).standard_error < independent


def test_estimates_of_different_kinds_are_refused() -> None:
    net, images = mlp(), pixels(6)
    with pytest.raises(ArgumentError, match="Cannot compare"):
        train_test_ratio(estimated(net, images, Isotropic(1.0)), measured(net, images, Isotropic(1.0)))
    same = estimated(net, images, Isotropic(1.0))
    assert train_test_ratio(same, same).agrees
    one = [measured(net, images[n : n + 1], Isotropic(0.1), draws=4) for n in range(2)]
    assert math.isnan(train_test_ratio(*one, tolerance=1e6).standard_error)
