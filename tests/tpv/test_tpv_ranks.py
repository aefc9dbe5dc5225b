"""TPV on several ranks is that of one process: value, standard error, where it stops, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tpv_nets import estimated, measured, mlp, pixels

from jbrprune.errors import DataError, NonFiniteError
from jbrprune.tpv import Estimate, Isotropic, Quantization, Removal, SGDNoise

IMAGES = pixels(90)
MASK = {"1.weight": mlp().get_parameter("1.weight").detach().abs() > 0.01}
NOISE = Isotropic(1e-3)
SHARED: dict[str, Any] = {"batch_size": 4, "rtol": 0, "validity": True}
CASES: dict[str, Callable[[object], Estimate]] = {
    "exact": lambda data: estimated(mlp(), data, NOISE, method="exact", **SHARED),
    "projection": lambda data: estimated(mlp(), data, NOISE, method="projection", seed=3, **SHARED),
    "draws": lambda data: estimated(mlp(), data, NOISE, method="jvp", draws=3, **SHARED),
    "finite rank": lambda data: estimated(mlp(), data, Removal(MASK), **SHARED),
    "gradient noise": lambda data: estimated(mlp(), data, SGDNoise(1e-3, 4, pixels(8)), draws=2, **SHARED),
    "measured": lambda data: measured(mlp(), data, NOISE, draws=3, **SHARED),
    "rounding, measured": lambda data: measured(mlp(), data, Quantization(12, rounding=True), **SHARED),
    "some images": lambda data: estimated(mlp(), data, NOISE, method="projection", samples=6, **SHARED),
    "some images, measured": lambda data: measured(mlp(), data, NOISE, draws=2, samples=6, **SHARED),
}
FACTS = ("samples", "method", "draws", "stopped", "unit")


def assert_as_one(work: Callable[[], Estimate], ranks: int) -> Estimate:
    one = work()
    for found in on_ranks(ranks, work):
        assert isinstance(found, Estimate), found
        assert {name: getattr(found, name) for name in FACTS} == {name: getattr(one, name) for name in FACTS}
        assert found.value == pytest.approx(one.value, rel=1e-12)
        assert found.standard_error == pytest.approx(one.standard_error, rel=1e-9, nan_ok=True)
        assert found.validity == one.validity
    return one


@pytest.mark.parametrize("case", CASES)
def test_uneven_shares(case: str) -> None:
    """23 images in batches of four, on three ranks."""
    found = assert_as_one(lambda: CASES[case](IMAGES[:23]), 3)
    assert found.value > 0
    assert found.validity is not None


@pytest.mark.parametrize("images", [1, 4, 7])
def test_ranks_without_images(images: int) -> None:
    """One batch, or two, of three ranks; what an empty rank has not seen it is told."""
    for case in ("exact", "projection", "measured"):
        assert_as_one(lambda case=case: CASES[case](IMAGES[:images]), 3)


DATA: dict[str, Callable[[Tensor], object]] = {
    "loader": lambda images: DataLoader(TensorDataset(images), batch_size=5),
    "list": lambda images: list(images.split(4)),
    "uneven batches": lambda images: list(images.split([1, 7, 2, 9, 4])),
}


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data(kind: str) -> None:
    """Every sample keeps its own signs, and counts once."""
    for case in ("projection", "measured", "some images", "some images, measured"):
        assert_as_one(lambda case=case: CASES[case](DATA[kind](IMAGES[:23])), 2)


def test_all_ranks_stop_where_one_process_stops() -> None:
    """After the same batch, or draw: what other ranks have done beyond it does not count."""
    options: dict[str, Any] = {"batch_size": 4, "rtol": 0.3, "validity": False}
    for work in (
        lambda: estimated(mlp(), IMAGES, NOISE, method="projection", **options),
        lambda: measured(mlp(), IMAGES, Removal(MASK), **options),
        lambda: measured(mlp(), IMAGES, NOISE, draws=60, **options),
    ):
        assert assert_as_one(work, 3).stopped == "rtol"


def test_an_error_on_one_rank_is_an_error_on_all() -> None:
    images = IMAGES[:23].clone()
    images[5] = torch.nan
    first, second = on_ranks(2, lambda: CASES["projection"](images))
    assert isinstance(first, NonFiniteError)
    assert str(first).startswith("On rank 1: ")
    assert isinstance(second, NonFiniteError)


class Augmented(TensorDataset):
    """Other images every time."""

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        return (self.tensors[0][position] + torch.rand(()),)


def test_images_that_change_between_passes() -> None:
    for error in on_ranks(2, lambda: CASES["measured"](Augmented(IMAGES[:23]))):
        assert isinstance(error, DataError)
        assert "are not those of the first pass" in str(error)


def test_no_image_at_all() -> None:
    for error in on_ranks(2, lambda: CASES["projection"](IMAGES[:0])):
        assert isinstance(error, DataError)
