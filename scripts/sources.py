"""Images to calibrate on and others to measure on, by name."""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from jbrprune.data.batches import Batch, materialise
from jbrprune.data.images import PREFIXES, images_below, open_data
from jbrprune.demo import DIGITS_MEAN, DIGITS_STD, LITE0_MEAN, LITE0_STD, crops, cut_crop, digits
from jbrprune.errors import ArgumentError, DataError, unknown

FASHION_MEAN, FASHION_STD = 0.2860, 0.3530
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
SPLITS = tuple(f"{PHOTOGRAPHS}/{number}" for number in range(3))
"""Crops of the photographs in a folder, given as root, in three choices of what is measured on, without labels."""
DRAWINGS = ("symbols", "seasonal", "people", "space", "cartoon", "flags", "roadsigns")
"""Folders below it that are left out: those of Debian's ``tuxpaint-stamps-default`` with drawings, or of few things."""
ROOTED = (IMAGENET, *SPLITS)
"""Names that stand for a folder that is given as root."""
GROUNDS = ("white", "grey", "green", "blue")
"""What is put behind a transparent photograph."""
CROPS = 1024
"""Crops of the photographs to calibrate on; half as many of the others to measure on."""
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

    def calibration(self, count: int, seed: int, workers: int = 0) -> list[Batch]:
        """So many images at random, the same for the same seed."""
        if isinstance(self.train, IterableDataset):
            return materialise(_draw(self.train, count, seed), images=None, batch_size=64)
        self.check_counts(count, None)
        order = torch.randperm(_count(self.train), generator=torch.Generator().manual_seed(seed))
        return _read(self.train, order[:count].tolist(), workers)

    def measured(self, count: int | None = None, workers: int = 0) -> list[Batch]:
        """The first images to measure on; None: all."""
        if isinstance(self.test, IterableDataset):
            return materialise(self.test, images=count, batch_size=64)
        self.check_counts(None, count)
        return _read(self.test, range(_count(self.test))[:count], workers)

    def check_counts(self, calibration: int | None, measured: int | None) -> None:
        """Refuse numbers of images that there are not; how many a stream has is not known before it is read.

        Raises:
            ArgumentError: There are fewer.
        """
        for data, what, count in ((self.train, "calibration", calibration), (self.test, "evaluation", measured)):
            if count is not None and not isinstance(data, IterableDataset) and not 1 <= count <= _count(data):
                raise ArgumentError(f"{self.name} has {_count(data)} images for {what}, {count} were asked for.")


def check_source(name: str) -> None:
    """Refuse what is no name of data, before a model is made.

    Raises:
        ArgumentError: Neither a known name nor a folder.
    """
    prefixes = [f"{prefix}/" for prefix in PREFIXES]
    known = [*SMALL, IMAGENET, PHOTOGRAPHS, *SPLITS]
    if name not in known and not name.startswith(tuple(prefixes)) and not Path(name).expanduser().is_dir():
        error = unknown("data", name, known)
        raise ArgumentError(f"{error} A folder, or a name after one of {', '.join(prefixes)}, is taken as well.")


def open_source(name: str, root: str | None, model: nn.Module) -> Source:
    """Find data by name.

    A folder is read as ``train`` and ``val`` (or ``validation``, ``test``) below it; without these, half of its
    images are for calibration.

    Args:
        name: ``digits``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``imagenet``, ``photographs``,
            ``photographs/0`` (or 1, 2), a folder, or what `jbrprune.data.images.open_data` takes.
        root: Where the files are; of ``fashion_mnist`` the folder with the IDX files, of ``imagenet`` the folder with
            ``train`` and ``val``, of ``photographs/0`` a folder of photographs.
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
    if name in SPLITS:
        return Source(name, *split_photographs(folder_of(name, root), SPLITS.index(name), model))
    if name == "fashion_mnist":
        return Source(name, *(TensorDataset(*fashion_mnist(idx_folder(root), train=part)) for part in (True, False)))
    folder = folder_of(name, root)
    if folder is None:
        full = ALIASES.get(name, name)
        return Source(name, *(_pictures(full, model, root=root, split=part) for part in ("train", "validation")))
    if below := measured_folder(folder):
        return Source(name, *(_pictures(str(part), model) for part in (folder / "train", below)))
    both = _pictures(str(folder), model)
    return Source(name, *(Subset(both, range(_count(both))[start::2]) for start in (0, 1)))


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
        ArgumentError: ``imagenet`` or ``photographs/0`` without a folder as root.
    """
    if name in ROOTED and (root is None or not Path(root).expanduser().is_dir()):
        what = "with train/ and val/" if name == IMAGENET else "of photographs"
        raise ArgumentError(f"{name} is read from a folder {what}: pass it as root, got {root!r}.")
    if name in {*SMALL, PHOTOGRAPHS}:
        return None
    folder = Path(root if name in ROOTED else name).expanduser()
    return folder if folder.is_dir() else None


def measured_folder(folder: Path) -> Path | None:
    """The folder to measure on beside ``train``; None: there is no such pair."""
    found = next((folder / part for part in MEASURED if (folder / part).is_dir()), None)
    return found if (folder / "train").is_dir() else None


def data_digest(name: str, root: str | None) -> str | None:
    """What tells apart data that are called alike; None for packaged ones.

    Of folders the names and sizes of images (their content takes hours to read), of IDX files the content, of stored
    data sets their place: what is stored there goes by its name.

    Raises:
        ArgumentError: No place is given, but needed.
        DataError: There are no images, or no files.
    """
    if name == "fashion_mnist":
        content = hashlib.sha256()
        for file in IDX:
            content.update(_unpack(_idx_file(Path(idx_folder(root)), file)))
        return f"content:{content.hexdigest()[:16]}"
    if folder := folder_of(name, root):
        below = measured_folder(folder)
        paths = [path for part in ((folder / "train", below) if below else (folder,)) for path in images_below(part)]
        listed = sorted(f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths)
        return f"names:{hashlib.sha256(chr(10).join(listed).encode()).hexdigest()[:16]}"
    if root is None or name in (*NORMALISED, PHOTOGRAPHS):
        return None
    return f"place:{hashlib.sha256(str(Path(root).expanduser().resolve()).encode()).hexdigest()[:16]}"


def fashion_mnist(folder: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST from its IDX files, gzipped or not, in the folder or where torchvision puts them below it.

    Images are scaled to [0, 1] and padded with the background value 0 to 32 x 32, then ``(x - 0.2860) / 0.3530``.

    Args:
        folder: Where the files are, or the root of torchvision's layout (``FashionMNIST/raw`` below it).
        train: The 60,000 training images, else the 10,000 test images.

    Returns:
        Images ``[N, 1, 32, 32]``, float32, and labels ``[N]``, int64.

    Raises:
        DataError: A file is missing, damaged or not of this format, or images and labels differ in number.

    Source:
        Xiao, Rasul and Vollgraf, arXiv 1708.07747.
    """
    names = IDX[:2] if train else IDX[2:]
    images, labels = (_read_idx(_idx_file(Path(folder), name), size) for name, size in zip(names, ((28, 28), ())))
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {names[0].split('-')[0]} images but {len(labels)} labels.")
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    return padded[:, None].float().div_(255).sub_(FASHION_MEAN).div_(FASHION_STD), labels.long()


def _idx_file(folder: Path, name: str) -> Path:
    below = ("", "raw", "FashionMNIST/raw")
    for path in (folder.expanduser() / part / (name + ending) for part in below for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise DataError(f"{folder} holds no {name} or {name}.gz, nor do {' and '.join(below[1:])} below it.")


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error


def _read_idx(path: Path, size: tuple[int, ...]) -> Tensor:
    """Read an IDX file of bytes: a magic number, the number of items and their size (32 bits, big-endian), values."""
    stored = _unpack(path)
    start = 4 * (2 + len(size))
    magic, count, *shape = (int.from_bytes(stored[at : at + 4], "big") for at in range(0, start, 4))
    if (magic, *shape) != (0x801 + len(size), *size) or len(stored) != start + count * int(np.prod(size)):
        raise DataError(f"{path} is no IDX file of {'images of 28 x 28 bytes' if size else 'labels'}, or is damaged.")
    return torch.from_numpy(np.frombuffer(stored[start:], np.uint8).reshape(count, *size).copy())


class Crops(Dataset):
    """Random-resized crops of 160 x 160 pixels, normalised as the model wants it; the photographs take turns.

    Args:
        paths: Files of photographs; transparent ones are pasted on one of `GROUNDS`.
        each: Crops of every photograph.
        model: What they are prepared for.
    """

    def __init__(self, paths: Sequence[Path], each: int, model: nn.Module) -> None:
        self.paths, self.count = paths, each * len(paths)
        wanted = resolve_data_config(model=model)
        self.mean, self.std = (torch.tensor(wanted[key])[:, None, None] for key in ("mean", "std"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        with Image.open(self.paths[number % len(self.paths)]) as image:
            above = image.convert("RGBA")
        ground = GROUNDS[int(torch.randint(len(GROUNDS), (), generator=generator))]
        whole = Image.alpha_composite(Image.new("RGBA", above.size, ground), above).convert("RGB")
        pixels = torch.from_numpy(cut_crop(whole, 160, generator).copy()).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


def split_photographs(folder: Path, split: int, model: nn.Module) -> tuple[Crops, Crops]:
    """Crops of eight thirteenths of the photographs in a folder, six of each, and three of each of the others.

    Args:
        folder: `DRAWINGS` below it are left out, and files whose name says that they are another one mirrored.
        split: Seed of the choice of photographs.
        model: What they are prepared for.
    """
    found = [path for path in images_below(folder) if not path.stem.endswith(("_mirror", "_flip"))]
    paths = [path for path in found if not set(path.relative_to(folder).parts) & set(DRAWINGS)]
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(split)).tolist()
    cut = len(paths) * 8 // 13
    return Crops([paths[i] for i in order[:cut]], 6, model), Crops([paths[i] for i in order[cut:]], 3, model)


def _crops(kind: Literal["calibration", "heldout"], count: int, model: nn.Module) -> Dataset:
    """Crops of 160 x 160 pixels, normalised as the model wants it."""
    wanted = resolve_data_config(model=model)
    mean, std = (torch.tensor(wanted[key])[:, None, None] for key in ("mean", "std"))
    images = crops(kind, count=count) * LITE0_STD + LITE0_MEAN
    return list((images - mean) / std)


def _pictures(name: str, model: nn.Module, **where: Any) -> Dataset:
    opened = open_data(name, model, **where)
    return opened.dataset if isinstance(opened, DataLoader) else opened


def _read(data: Dataset, order: Sequence[int], workers: int) -> list[Batch]:
    loader = DataLoader(Subset(data, order), 64, num_workers=workers, generator=torch.Generator())
    return materialise(loader, images=None, batch_size=64)


def _draw(stream: Iterable[Any], count: int, seed: int) -> list[Any]:
    """So many items at random from the beginning of a stream (reservoir sampling: Vitter, ACM TOMS 1985)."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Any] = []
    for number, item in enumerate(itertools.islice(stream, STREAMED * count)):
        place = number if number < count else int(torch.randint(number + 1, (), generator=generator))
        kept[place : place + 1] = [item] if place < count else []
    if len(kept) < count:
        raise DataError(f"The stream has {len(kept)} images for calibration, {count} were asked for.")
    return kept


def _count(data: Dataset) -> int:
    return len(data)
