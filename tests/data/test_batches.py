"""Everything that yields images comes out as the same batches."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from jbrprune.data import batches as batches_module
from jbrprune.data.batches import (
    Batch,
    attach_reference,
    class_indices,
    concatenate,
    count,
    iterate,
    materialise,
    rebatch,
)
from jbrprune.errors import DataError, NonFiniteError

IMAGES = torch.arange(5 * 3 * 4 * 4, dtype=torch.float32).reshape(5, 3, 4, 4)
LABELS = torch.tensor([3, 1, 4, 1, 5])


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return zip(IMAGES, LABELS.tolist(), strict=True)


class Indexed(Dataset):
    """Has no ``__iter__`` and does not raise IndexError: only its length says where it ends."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return IMAGES[position % 5], int(LABELS[position % 5])


SOURCES: dict[str, tuple[Callable[[], object], bool]] = {
    "tensor": (lambda: IMAGES, False),
    "list of images": (lambda: list(IMAGES), False),
    "generator of images": (lambda: (image for image in IMAGES), False),
    "list of tensor batches": (lambda: list(IMAGES.split(2)), False),
    "list of pairs": (lambda: list(zip(IMAGES, LABELS, strict=True)), True),
    "list of pairs, int labels": (lambda: list(zip(IMAGES, LABELS.tolist(), strict=True)), True),
    "list of lists": (lambda: [[IMAGES[:3], LABELS[:3]], [IMAGES[3:], LABELS[3:]]], True),
    "dicts": (lambda: [{"pixel_values": i, "label": n} for i, n in zip(IMAGES, LABELS.tolist(), strict=True)], True),
    "dicts without labels": (lambda: [{"image": image, "path": "x"} for image in IMAGES], False),
    "batches": (lambda: [Batch(IMAGES, LABELS)], True),
    "data set": (lambda: TensorDataset(IMAGES, LABELS), True),
    "data set of images": (lambda: TensorDataset(IMAGES), False),
    "data set without an end": (Indexed, True),
    "stream": (Stream, True),
    "loader": (lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3), True),
    "captions": (lambda: [(image, "a cat") for image in IMAGES], False),
    "soft labels": (lambda: [(IMAGES, torch.rand(5, 10))], False),
    "targets in dicts": (lambda: [(image, {"boxes": [1, 2]}) for image in IMAGES], False),
    "img and fine_label": (lambda: [{"img": i, "fine_label": n} for i, n in zip(IMAGES, LABELS, strict=True)], True),
    "processor's batch": (lambda: [UserDict(pixel_values=IMAGES, labels=LABELS)], True),
    "webdataset": (lambda: [{"__key__": "a", "jpg": i, "cls": int(n)} for i, n in zip(IMAGES, LABELS)], True),
    "webdataset tuples, batched": (lambda: [(IMAGES, LABELS.numpy(), ["a", "b", "c", "d", "e"])], True),
    "8-bit labels": (lambda: [(IMAGES, LABELS.to(torch.uint8))], True),
    "images with a graph": (lambda: [(IMAGES.clone().requires_grad_() * 1, LABELS)], True),
    "unread images with a graph": (lambda: IMAGES.clone().requires_grad_(), False),
}
LEFT_OUT: dict[str, object] = {
    "masks": torch.zeros(5, 4, 4, dtype=torch.long),
    "a column": LABELS[:, None],
    "one-hot": torch.eye(6, dtype=torch.long)[LABELS],
    "soft": torch.rand(5, 6),
    "numbers with a fraction": LABELS.float(),
    "strings": ["a", "b", "c", "d", "e"],
    "unlabelled": torch.full((5,), -1),
    "partly labelled": torch.tensor([3, 1, -1, 1, 5]),
    "too few": LABELS[:4],
    "one for all": 3,
    "boxes": [{"boxes": torch.zeros(2, 4)}] * 5,
    "ragged": [[1, 2], [3], [], [4], [5]],
    "multi-task": {"age": LABELS, "kind": LABELS},
    "complex": torch.zeros(5, dtype=torch.complex64),
}


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    batches_module.warn_of_labels.cache_clear()


@pytest.mark.parametrize("case", LEFT_OUT)
def test_labels_that_are_no_classes_are_left_out_and_that_is_said_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        batches = list(iterate([(IMAGES, LEFT_OUT[case])] * 3))
        assert all(batch.labels is None for batch in batches)
        assert torch.equal(concatenate(batches).images, IMAGES.repeat(3, 1, 1, 1))
    assert caplog.text.count("The labels are left out: they are") == 1


@pytest.mark.parametrize("case", ["masks", "a column", "one-hot", "soft", "strings", "unlabelled", "boxes"])
def test_so_are_labels_of_single_images(case: str, caplog: pytest.LogCaptureFixture) -> None:
    labels = LEFT_OUT[case]
    batches = list(iterate([(image, labels[k]) for k, image in enumerate(IMAGES)], batch_size=2))  # type: ignore[index]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(batch.labels is None for batch in batches)
    assert caplog.text.count("The labels are left out: they are") == 1


def test_classes_that_the_model_does_not_have() -> None:
    assert class_indices(LABELS, (5,), 6) is not None
    assert class_indices(LABELS, (5,), 5) is None


def test_images_come_apart_from_their_graph() -> None:
    source = IMAGES.clone().requires_grad_()
    for data in (source, [source * 2], [(source, LABELS)], list(source), [Batch(source, LABELS)]):
        assert not any(batch.images.requires_grad for batch in iterate(data, batch_size=2))
    assert source.requires_grad


@pytest.mark.parametrize(("source", "labelled"), SOURCES.values(), ids=SOURCES.keys())
def test_same_images_in_the_same_order(source: Callable[[], object], labelled: bool) -> None:
    batches = list(iterate(source(), batch_size=2))
    assert torch.equal(torch.cat([batch.images for batch in batches]), IMAGES)
    assert count(batches) == 5
    assert all((batch.labels is not None) == labelled for batch in batches)
    if labelled:
        assert torch.equal(torch.cat([batch.labels for batch in batches]), LABELS)  # type: ignore[misc]


@pytest.mark.parametrize("source", [IMAGES, list(IMAGES), TensorDataset(IMAGES)], ids=["tensor", "list", "data set"])
def test_single_images_are_gathered_and_none_is_dropped(source: object) -> None:
    assert [len(batch) for batch in iterate(source, batch_size=2)] == [2, 2, 1]


def test_batches_keep_their_own_size() -> None:
    loader = DataLoader(TensorDataset(IMAGES), batch_size=3)
    assert [len(batch) for batch in iterate(loader, batch_size=2)] == [3, 2]


def test_a_short_last_batch_of_single_images_keeps_labels() -> None:
    last = list(iterate(Indexed(), batch_size=3))[-1]
    assert last.labels is not None
    assert last.labels.tolist() == [1, 5]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_materialise_cuts_to_the_number_of_images(batch_size: int) -> None:
    batches = materialise([(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])], images=3, batch_size=batch_size)
    whole = concatenate(batches)
    assert torch.equal(whole.images, IMAGES[:3])
    assert torch.equal(whole.labels, LABELS[:3])  # type: ignore[arg-type]
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_materialise_stops_reading_when_it_has_enough() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield IMAGES

    assert count(materialise(endless(), images=7)) == 7


def test_materialise_takes_what_there_is() -> None:
    assert count(materialise(IMAGES, images=None)) == count(materialise(IMAGES, images=99)) == 5


def test_rebatched_is_the_identity_up_to_the_cuts() -> None:
    batches = rebatch(iter([Batch(IMAGES[:1]), Batch(IMAGES[1:])]), 2)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(concatenate(batches).images, IMAGES)


def test_labels_survive_only_if_every_batch_has_them() -> None:
    assert concatenate([Batch(IMAGES, LABELS), Batch(IMAGES)]).labels is None


def test_references_stay_with_their_images() -> None:
    logits = [torch.randn(2, 7), torch.randn(3, 7)]
    batches = attach_reference([Batch(IMAGES[:2], LABELS[:2]), Batch(IMAGES[2:], LABELS[2:])], logits)
    assert torch.equal(concatenate(batches).reference, torch.cat(logits))  # type: ignore[arg-type]
    assert all(batch.labels is not None for batch in batches)


def test_a_batch_moves_as_a_whole() -> None:
    moved = Batch(IMAGES, LABELS, torch.zeros(5, 7)).to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved._tensors() if tensor is not None} == {"meta"}


def test_an_exhausted_generator_is_named() -> None:
    spent = (image for image in IMAGES)
    list(spent)
    with pytest.raises(DataError, match=r"generator.*yielded no batch.*exhausted"):
        list(iterate(spent))


BAD: dict[str, tuple[object, type[Exception], str]] = {
    "nothing": ([], DataError, "yielded no batch"),
    "empty tensor": (torch.zeros(0, 3, 4, 4), DataError, "yielded no batch"),
    "empty batch": ([IMAGES[:0]], DataError, r"Batch 0 is empty: shape \(0, 3, 4, 4\)"),
    "one image as data": (IMAGES[0], DataError, r"\[N, C, H, W\], got shape \(3, 4, 4\)"),
    "no iterable": (7, DataError, "Cannot read images from int"),
    "a path": ("images", DataError, "Cannot read images from str: pass a folder"),
    "a dict": ({"image": IMAGES}, DataError, "Cannot read images from dict"),
    "numbers": ([1.0], DataError, "yielded a float; expected a tensor"),
    "unknown keys": ([{"tiff": IMAGES}], DataError, r"a dict with the keys \['tiff'\]; expected .* of the keys image"),
    "integers": (
        [IMAGES.to(torch.uint8)],
        DataError,
        r"got torch.uint8 of shape \(5, 3, 4, 4\)\. Of 8-bit images write .* / std.*resolve_data_config",
    ),
    "integers in dicts": (
        [{"image": i.byte(), "label": 1} for i in IMAGES],
        DataError,
        r"\(images / 255 - mean\) / std",
    ),
    "arrays": ([{"image": IMAGES[0].numpy()}], DataError, r"from_numpy\(array\)\.permute\(2, 0, 1\) / 255"),
    "lists of images": ([(list(IMAGES), [1] * 5)], DataError, r"a tuple of 2 \(a list of .*torch\.stack\(images\)"),
    "keys before images": ([("key", IMAGES[0], 1)], DataError, r"a tuple of 3 \(a str, .*to_tuple\('jpg', 'cls'\)"),
    "undecoded": ([{"jpg": b"\xff\xd8", "cls": b"3"}], DataError, r"\.decode\('pil'\)"),
    "splits": ({"train": [], "test": []}, DataError, r"of one dict, a value: .*data\['train'\]"),
    "vectors": ([torch.zeros(3)], DataError, r"floating point \[B, C, H, W\]"),
    "different sizes": ([IMAGES[0], IMAGES[0, :, :2]], DataError, r"\(3, 2, 4\), \(3, 4, 4\).*Resize"),
}


@pytest.mark.parametrize(("data", "error", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_used_is_named(data: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(iterate(data, batch_size=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_located(value: float) -> None:
    broken = IMAGES.clone()
    broken[3, 2, 1, 0] = value
    with pytest.raises(NonFiniteError, match=r"Batch 1: image 1 contains NaN or Inf"):
        list(iterate(broken, batch_size=2))


def test_no_batch_size_below_one() -> None:
    with pytest.raises(DataError, match=r"batch_size must be at least 1, got 0"):
        list(iterate(IMAGES, batch_size=0))


@pytest.mark.parametrize("images", [0, -3])
def test_no_fewer_images_than_one(images: int) -> None:
    with pytest.raises(DataError, match=f"at least 1, got {images}"):
        materialise(IMAGES, images=images)
