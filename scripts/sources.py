"""Images to calibrate on and others to measure on, by name."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from fashion_mnist import FASHION_MEAN, FASHION_STD, fashion_mnist, idx_file, unpacked
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from jbrprune.data.batches import Batch, materialise
from jbrprune.data.images import PREFIXES, images_below, open_data
from jbrprune.demo import DIGITS_MEAN, DIGITS_STD, LITE0_MEAN, LITE0_STD, crops, digits
from jbrprune.errors import ArgumentError, DataError, unknown

_CIFAR = {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "crop_pct": 1.0}
SMALL: dict[str, dict[str, Any]] = {
    "digits": {"in_chans": 1, "num_classes": 10},
    "fashion_mnist": {"in_chans": 1, "num_classes": 10},
    "cifar10": {"num_classes": 10, "pretrained_cfg_overlay": _CIFAR},
    "cifar100": {"num_classes": 100, "pretrained_cfg_overlay": _CIFAR},
}
"""Data of small images -> what a timm model needs to be told for them."""
NORMALISED = {"digits": (DIGITS_MEAN, DIGITS_STD), "fashion_mnist": (FASHION_MEAN, FASHION_STD)}
"""Data that are held as tensors -> mean and standard deviation that are taken out of them."""
ALIASES = {"cifar10": "torch/cifar10", "cifar100": "torch/cifar100"}
IMAGENET = "imagenet"
"""A folder, given as root, that is called so in lines wherever it is."""
PHOTOGRAPHS = "photographs"
"""Crops of the photographs inside scikit-image and scikit-learn, without labels."""
CROPS = 1024
"""Of the photographs to calibrate on; half as many of the others to measure on."""
STREAMED = 10
"""Of a stream, images are drawn from the first so many times as many."""
IDX = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
"""Files of Fashion-MNIST."""
MEASURED = ("val", "validation", "test")
"""Folders beside ``train`` that images to measure on are in, the first that is there."""


@dataclass(frozen=True, eq=False)
class Source:
    """Images and labels; items of both are ``(image, label)``, or the image alone.

    Attributes:
        name: What it is called.
        train: Calibration images are drawn from these.
        test: Agreement and accuracy are measured on these.
    """

    name: str
    train: Dataset
    test: Dataset

    @functools.cached_property
    def labelled(self) -> bool:
        """Whether the images to calibrate on come with labels; one is read."""
        first = next(iter(self.train), None)
        return isinstance(first, tuple | list) and len(first) > 1

    def check_labels(self, what: str) -> None:
        """Refuse images without labels, before they are read.

        Raises:
            DataError: There are none; the message says what needs them.
        """
        if not self.labelled:
            raise DataError(f"The data {self.name!r} have no labels, which {what} needs.")

    def calibration(self, count: int, seed: int, workers: int) -> list[Batch]:
        """So many images at random, the same for the same seed."""
        if isinstance(self.train, IterableDataset):
            return materialise(_drawn(self.train, count, seed), images=None, batch_size=64)
        self.check_counts(count, None)
        order = torch.randperm(_count(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return self._read(self.train, order, count, workers)

    def measured(self, count: int | None, workers: int) -> list[Batch]:
        """The first images to measure on; None: all."""
        if isinstance(self.test, IterableDataset):
            return materialise(self.test, images=count, batch_size=64)
        self.check_counts(None, count)
        return self._read(self.test, range(_count(self.test)), count, workers)

    def check_counts(self, calibration: int | None, measured: int | None) -> None:
        """Refuse numbers of images that there are not; how many a stream has is not known before it is read.

        Raises:
            ArgumentError: There are fewer.
        """
        for data, what, count in ((self.train, "calibration", calibration), (self.test, "evaluation", measured)):
            if count is not None and not isinstance(data, IterableDataset) and not 1 <= count <= _count(data):
                raise ArgumentError(f"{self.name} has {_count(data)} images for {what}, {count} were asked for.")

    def _read(self, data: Dataset, order: Sequence[int], count: int | None, workers: int) -> list[Batch]:
        chosen = Subset(data, list(order[:count]))
        loader = DataLoader(chosen, 64, num_workers=workers, generator=torch.Generator())
        return materialise(loader, images=None, batch_size=64)


def check_source(name: str) -> None:
    """Refuse what is no name of data, before a model is made.

    Raises:
        ArgumentError: Neither a known name nor a folder.
    """
    prefixes = [f"{prefix}/" for prefix in PREFIXES]
    known = {*SMALL, *ALIASES, IMAGENET, PHOTOGRAPHS}
    if name in known or name.startswith(tuple(prefixes)) or Path(name).expanduser().is_dir():
        return
    error = unknown("data", name, [*SMALL, IMAGENET, PHOTOGRAPHS])
    raise ArgumentError(f"{error} A folder, or a name after one of {', '.join(prefixes)}, is taken as well.")


def open_source(name: str, root: str | None, model: nn.Module) -> Source:
    """Find data by name.

    A folder is read as ``train`` and ``val`` (or ``validation``, ``test``) below it; without these, half of its
    images are for calibration.

    Args:
        name: ``digits``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``imagenet``, ``photographs``, a folder, or
            what `jbrprune.data.images.open_data` takes.
        root: Where the files are; of ``fashion_mnist`` the folder with the IDX files, of ``imagenet`` the folder with
            ``train`` and ``val``.
        model: Pictures are prepared for it.

    Raises:
        ArgumentError: No such data.
        DataError: They cannot be read.
    """
    check_source(name)
    if name == "digits":
        images, labels, test_images, test_labels = digits()
        return Source(name, TensorDataset(images, labels), TensorDataset(test_images, test_labels))
    if name == PHOTOGRAPHS:
        return Source(name, _crops("calibration", CROPS, model), _crops("heldout", CROPS // 2, model))
    if name == "fashion_mnist":
        return Source(name, *(TensorDataset(*fashion_mnist(idx_folder(root), train=part)) for part in (True, False)))
    folder = folder_of(name, root)
    if folder is not None and (below := _below(folder)) is not None:
        return Source(name, *(_pictures(str(folder / part), model) for part in ("train", below)))
    if folder is not None:
        both = _pictures(str(folder), model)
        order = range(_count(both))
        return Source(name, *(Subset(both, order[start::2]) for start in (0, 1)))
    full = ALIASES.get(name, name)
    return Source(name, *(_pictures(full, model, root=root, split=part) for part in ("train", "validation")))


def idx_folder(root: str | None) -> str:
    """The root, which ``fashion_mnist`` needs.

    Raises:
        ArgumentError: There is none.
    """
    if root is None:
        raise ArgumentError("fashion_mnist is read from its IDX files: pass their folder as root.")
    return root


def folder_of(name: str, root: str | None) -> Path | None:
    """The folder that is meant by a name; None for other names, and for data sets that are called like a folder here.

    Raises:
        ArgumentError: ``imagenet`` without a folder as root.
    """
    if name == IMAGENET and (root is None or not Path(root).expanduser().is_dir()):
        raise ArgumentError(f"imagenet is read from a folder with train/ and val/: pass it as root, got {root!r}.")
    if name in {*SMALL, PHOTOGRAPHS}:
        return None
    folder = Path(root if name == IMAGENET else name).expanduser()  # type: ignore[arg-type]
    return folder if folder.is_dir() else None


def data_digest(name: str, root: str | None) -> str | None:
    """What tells apart data that are called alike; None for packaged ones.

    Of folders the names and sizes of images (their content takes hours to read), of IDX files the content, of stored
    data sets their place: what is stored there goes by its name.

    Raises:
        ArgumentError: No place is given, but needed.
        DataError: There are no images, or no files.
    """
    if name == "fashion_mnist":
        found = hashlib.sha256()
        for file in IDX:
            found.update(unpacked(idx_file(idx_folder(root), file)))
        return f"content:{found.hexdigest()[:16]}"
    folder = folder_of(name, root)
    if folder is not None:
        below = _below(folder)
        return names_digest(folder) if below is None else names_digest(folder, "train", below)
    if root is None or name in (*NORMALISED, PHOTOGRAPHS):
        return None
    return f"place:{_sha256(str(Path(root).expanduser().resolve()))}"


def names_digest(folder: Path, *parts: str) -> str:
    """Of names and sizes of the images in a folder, or in some parts of it.

    Raises:
        DataError: There are none.
    """
    paths = [path for part in parts or ("",) for path in images_below(folder / part)]
    return f"names:{_sha256(chr(10).join(sorted(f'{p.relative_to(folder)} {p.stat().st_size}' for p in paths)))}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_folder(name: str, root: str | None) -> Path | None:
    """Where pictures to train on are: in ``train`` beside ``val``; None for a name that is no folder's.

    Raises:
        DataError: Nothing is apart, so that accuracy would be measured on what was trained on.
    """
    folder = folder_of(name, root)
    if folder is not None and _below(folder) is None:
        raise DataError(f"{folder} has no train/ beside val/, so nothing could be measured that was not trained on.")
    return None if folder is None else folder / "train"


def _below(folder: Path) -> str | None:
    """The folder to measure on beside ``train``."""
    found = next((part for part in MEASURED if (folder / part).is_dir()), None)
    return found if (folder / "train").is_dir() else None


def _crops(kind: Literal["calibration", "heldout"], count: int, model: nn.Module) -> Dataset:
    """Crops of 160 x 160 pixels, normalised as the model wants it."""
    wanted = resolve_data_config(model=model)
    mean, std = (torch.tensor(wanted[key])[:, None, None] for key in ("mean", "std"))
    images = crops(kind, count=count) * LITE0_STD + LITE0_MEAN
    return list((images - mean) / std)  # type: ignore[return-value]


def _pictures(name: str, model: nn.Module, **where: Any) -> Dataset:
    opened = open_data(name, model, **where)
    return opened.dataset if isinstance(opened, DataLoader) else opened  # type: ignore[return-value]


def _drawn(stream: Iterable[Any], count: int, seed: int) -> list[Any]:
    """So many items at random from the beginning of a stream (reservoir sampling: Vitter, ACM TOMS 1985)."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Any] = []
    for number, item in enumerate(itertools.islice(stream, STREAMED * count)):
        if number < count:
            kept.append(item)
            continue
        place = int(torch.randint(number + 1, (), generator=generator))
        if place < count:
            kept[place] = item
    if len(kept) < count:
        raise DataError(f"The stream has {len(kept)} images for calibration, {count} were asked for.")
    return kept


def _count(data: Dataset) -> int:
    return len(data)  # type: ignore[arg-type]
