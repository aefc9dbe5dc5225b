"""Calibration images: read once, every image used for one purpose, the dense model's logits beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import timm
import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch, concatenate, count
from jbrprune.errors import DataError, NonFiniteError
from jbrprune.pruning.prepare import FEWEST_TO_HOLD_BACK, Calibration


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def images(n: int, seed: int = 0) -> Tensor:
    """Image i can be told by its first pixel."""
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    x[:, 0, 0, 0] = torch.arange(n)
    return x


def numbers(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.images[:, 0, 0, 0]]


def sizes(parts: Calibration) -> tuple[int, int, int, int]:
    return count(parts.score), count(parts.repair), count(parts.gate), count(parts.heldout)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, (1, 1, 0, 0)), (9, (9, 9, 0, 0)), (10, (8, 6, 2, 2)), (14, (12, 10, 2, 2)), (40, (32, 24, 8, 8))],
)
def test_a_fifth_is_held_out_and_a_fifth_gates(n: int, expected: tuple[int, ...]) -> None:
    parts = cases.calibration(net().eval(), images(n))
    assert sizes(parts) == expected
    assert parts.described == f"{expected[3]} calibration images that were used for nothing else"
    assert sorted(numbers(parts.score) + numbers(parts.heldout)) == list(range(n))
    assert numbers(parts.repair) + numbers(parts.gate) == numbers(parts.score)


@pytest.mark.parametrize(("n", "expected"), [(9, (9, 9, 0, 7)), (40, (40, 32, 8, 7))])
def test_images_of_their_own_for_the_report(n: int, expected: tuple[int, ...]) -> None:
    parts = cases.calibration(net().eval(), images(n), eval_data=images(7, seed=1))
    assert sizes(parts) == expected
    assert parts.described == "7 images of eval_data"
    assert numbers(parts.heldout) == list(range(7))


def test_the_split_is_random_and_the_same_for_a_seed() -> None:
    one, same, other = (numbers(cases.calibration(net().eval(), images(40), seed=s).score) for s in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != sorted(one)


def test_every_image_keeps_its_label_and_the_logits_of_the_dense_model() -> None:
    model = net().eval()
    data = [(images(25), torch.arange(25) % 3)]
    parts = cases.calibration(model, data, eval_data=data, batch_size=4)
    for batches in (parts.score, parts.repair, parts.gate, parts.heldout):
        whole = concatenate(batches)
        assert whole.labels is not None
        assert whole.reference is not None
        assert torch.equal(whole.labels, whole.images[:, 0, 0, 0].long() % 3)
        with torch.no_grad():
            torch.testing.assert_close(whole.reference, model(whole.images))
        assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)


def test_no_more_is_read_than_was_asked_for() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield images(8)

    parts = cases.calibration(net().eval(), endless(), images=20)
    assert len(read) == 3
    assert count(parts.score) + count(parts.heldout) == 20


def test_images_take_the_precision_of_the_model() -> None:
    parts = cases.calibration(net().double().eval(), images(3))
    assert parts.score[0].images.dtype == parts.score[0].reference.dtype == torch.float64  # type: ignore[union-attr]


def test_the_model_and_the_random_state_are_left_as_they_were(fingerprint: Callable[[nn.Module], dict]) -> None:
    model = net()
    before = fingerprint(model)
    cases.calibration(model, images(12), seed=3)
    assert fingerprint(model) == before


class Picky(nn.Module):
    """Refuses images in its own way."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.fc, self.error = nn.Linear(192, 2), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3)


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=3, img_size=32, depth=1)


BAD: dict[str, tuple[Callable[[], nn.Module], object, dict, type[Exception], str]] = {
    "nothing there": (net, [], {}, DataError, "list.* yielded no batch"),
    "exhausted": (net, iter(()), {}, DataError, "exhausted generator"),
    "no eval data": (net, images(9), {"eval_data": []}, DataError, "yielded no batch"),
    "channels": (resnet, torch.zeros(2, 1, 32, 32), {}, DataError, r"does not run on.*made for 3 x 160 x 160"),
    "size": (
        vit,
        torch.zeros(2, 3, 40, 40),
        {},
        DataError,
        r"does not run on float32 images of shape \(2, 3, 40, 40\).*3 x 32 x 32",
    ),
    "own model": (
        net,
        torch.zeros(2, 3, 9, 9),
        {},
        DataError,
        r"Sequential does not run on float32 images of shape \(2, 3, 9, 9\)",
    ),
    "raises": (lambda: Picky(IndexError("no row")), images(2), {}, DataError, "Picky does not run on.*no row"),
    "mixed sizes": (net, [images(1), torch.zeros(1, 3, 9, 9)], {}, DataError, "different shapes"),
    "not finite": (net, images(2) / 0, {}, NonFiniteError, "image 0 contains NaN or Inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_images_that_cannot_be_used(case: str, fingerprint: Callable[[nn.Module], dict]) -> None:
    make, data, options, error, message = BAD[case]
    model = make()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        cases.calibration(model, data, **options)
    assert fingerprint(model) == before


def test_few_images_hold_nothing_back() -> None:
    assert FEWEST_TO_HOLD_BACK == 10


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2] * 4) + 1, torch.tensor([0, 1, -1] * 4)])
def test_labels_of_other_classes_are_left_out(labels: Tensor) -> None:
    found = cases.calibration(net(), [(images(12), labels)])
    assert all(batch.labels is None for batch in (*found.score, *found.heldout))
    known = cases.calibration(net(), [(images(12), torch.tensor([0, 1, 2] * 4))])
    assert all(batch.labels is not None for batch in (*known.score, *known.heldout))
