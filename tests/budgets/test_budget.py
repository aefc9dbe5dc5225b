"""Budgets: one share of one kind, a schedule of steps, a price that is the measured one."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import timm
import torch

from jbrprune.budgets.budget import COUNTED, STEP, as_share, check_least, schedule
from jbrprune.budgets.cost import cost_model, count_macs
from jbrprune.errors import BudgetError
from jbrprune.evaluation.agreement import parameters_of
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import remove_units


def test_milliseconds_are_a_share_of_what_the_dense_model_takes() -> None:
    assert as_share((6.0, 3.0), 10.0) == (0.6, 0.3)
    for dense_ms in (6.0, 3.0):
        with pytest.raises(BudgetError, match=rf"latency_ms=6 is met by the dense model, which takes {dense_ms:g} ms"):
            as_share((6.0, 2.0), dense_ms)


def test_what_the_floors_do_not_allow_is_refused() -> None:
    check_least("macs", 0.3, 0.3)
    message = r"params=0\.3 cannot be reached: .* 0\.312 of the dense model's params are left\. Ask for at least 0\.313"
    with pytest.raises(BudgetError, match=message):
        check_least("params", 0.3, 0.312)


@pytest.mark.parametrize("start", [1.0, 0.83])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.333, 0.05])
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
def test_a_schedule_falls_evenly_to_the_share(share: float, steps: int | None, start: float) -> None:
    shares = schedule(share, steps, start=start)
    assert shares[-1] == share
    heights = np.array([start, *shares])
    np.testing.assert_allclose(-np.diff(heights), (start - share) / len(shares))
    if steps is None:
        assert (start - share) / len(shares) <= STEP + 1e-9
        assert len(shares) == 1 or (start - share) / (len(shares) - 1) > STEP - 1e-9
    else:
        assert len(shares) == steps


def test_a_share_on_a_multiple_of_the_step_needs_no_step_more() -> None:
    assert len(schedule(0.9)) == 2
    assert len(schedule(0.8, start=0.9)) == 2
    assert len(schedule(0.7)) == 6  # 0.3 / 0.05 is 6.000000000000001
    assert len(schedule(0.99)) == 1


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_price_of_a_plan_is_what_is_measured_once_it_is_carried_out(name: str, kind: str) -> None:
    model = timm.create_model(name, num_classes=5, **({"img_size": 32, "depth": 2} if name == "test_vit" else {}))
    images = cases.images(2, 32).float()
    groups = find_groups(model, images).groups

    def measured() -> float:
        if kind == "macs":
            return sum(count_macs(model, images).values())
        if kind == "params":
            return parameters_of(model)
        return sum(g.size * g.channels_per_unit()[g.members[0].axis] for g in groups)

    cost = cost_model(kind, model, images, groups)
    assert cost.total == pytest.approx(measured(), rel=1e-12)
    gone = {g.name: torch.arange(0, g.size - 1, 2 + i % 3) for i, g in enumerate(groups)}
    for group, units in gone.items():
        cost.remove(group, len(units))
    groups = remove_units(model, groups, gone)
    assert cost.total == pytest.approx(measured(), rel=1e-12)
    assert cost_model(kind, model, images, groups).total == pytest.approx(measured(), rel=1e-12)
