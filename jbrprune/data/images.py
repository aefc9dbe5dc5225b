"""Images from folders, from timm's data sets and from data sets of pictures, prepared the way the model wants them.

What comes out is read by `jbrprune.data.batches.iterate`.
"""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from jbrprune.data.batches import IMAGE_KEYS, LABEL_KEYS
from jbrprune.errors import ArgumentError, DataError, ModelError
from jbrprune.models.preserve import same_randomness
from jbrprune.models.timm_models import data_config, image_size

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
"""What counts as an image in a folder, in upper or lower case."""

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
"""Kinds of data set that ``timm.data.create_dataset`` finds by name: ``torch/cifar10``."""

FASHION_MEAN, FASHION_STD = 0.2860, 0.3530

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
_BROKEN_NAME = (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError)
_BROKEN_FILE = (OSError, EOFError, zlib.error)
_RAW_FOLDERS = ("", "raw", "FashionMNIST/raw")
"""Where below a folder IDX files are looked for; the last is torchvision's layout."""
_IDX_MAGIC = {1: 0x00000801, 3: 0x00000803}


def open_data(
    data: object,
    model: nn.Module,
    *,
    batch_size: int = 32,
    workers: int = 0,
    labels: bool = True,
    root: str | Path | None = None,
    split: str = "validation",
    skip_corrupt: bool = False,
) -> object:
    """Turn what a user calls data into something that `jbrprune.data.batches.iterate` reads.

    - A folder: every image below it, in an order that is random and always the same, so that the first few hundred
      are a fair sample; prepared by timm's evaluation transform for this model. Its first-level folders are the
      classes, in natural order, if every image is inside one.
    - A name that begins with one of `PREFIXES`, for ``timm.data.create_dataset``: the same.
    - A data set of PIL images (a ``Dataset``, a Hugging Face data set, a list): in its own order, with that transform.
    - Anything else is returned as it is.

    Labels that cannot mean the model's classes, because their number differs, are dropped and that is logged.

    Args:
        data: See above.
        model: Its preprocessing and its number of classes are used.
        batch_size: Images per batch, where the data do not say.
        workers: Processes that read images, 0 for none; streams are read in this process.
        labels: Use labels where there are any; has no effect on data returned as they are.
        root: Where a named data set is stored.
        split: Which part of a named data set.
        skip_corrupt: Leave out images that cannot be read, and log their names, instead of stopping at the first.
            (timm's own readers, of ``hfds/`` and the like, replace such an image by the next and log it.)

    Returns:
        A `DataLoader` or another iterable.

    Raises:
        ArgumentError: ``batch_size`` or ``workers`` out of range.
        DataError: No such folder, no images in it, a named data set that cannot be opened; while reading, an
            unreadable image.
        ModelError: Images need a transform, but nothing says which one this model wants.
    """
    if batch_size < 1 or workers < 0:
        raise ArgumentError(f"batch_size must be >= 1 and workers >= 0, got {batch_size} and {workers}.")
    by_name = isinstance(data, str | Path)
    stored = pictures(str(data), model, root=root, split=split) if by_name else data
    if not by_name and not _needs_transform(data, model):
        return data
    prepare = _Prepare(model, labels=labels and _labels_fit(stored, model))
    if isinstance(stored, IterableDataset):
        return _Stream(stored, prepare)
    source = cast("Sequence[object]", stored)
    order = _shuffled(len(source)) if by_name else range(len(source))
    # A generator of its own: iterating must not advance the user's random state.
    loader = DataLoader(
        _Indexed(source, order, prepare, skip_corrupt),
        batch_size,
        num_workers=workers,
        generator=torch.Generator(),
        collate_fn=_intact if skip_corrupt else None,
    )
    return _Intact(loader) if skip_corrupt else loader


def pictures(name: str, model: nn.Module, *, root: str | Path | None = None, split: str = "validation") -> object:
    """The stored pictures of a folder or a named data set as they are, with class indices where there are any.

    Args:
        name: A folder, or a name that begins with one of `PREFIXES`.
        model: Its number of channels is what named data are asked for.
        root: Where a named data set is stored.
        split: Which part of a named data set.

    Returns:
        A sequence or a stream of items that `picture_of` and `label_of` understand.

    Raises:
        DataError: No such folder, no images in it, or a named data set that cannot be opened.
    """
    folder = Path(name).expanduser()
    if name.partition("/")[0].lower() not in PREFIXES or "/" not in name or folder.is_dir():
        return _Folder(_checked(folder))
    size = image_size(model)
    mode = _MODES.get(size[0], "RGB") if size else "RGB"
    place = None if root is None else str(Path(root).expanduser())
    try:
        return create_dataset(name, root=place, split=split, input_img_mode=mode)  # type: ignore[arg-type]
    except _BROKEN_NAME as error:
        raise DataError(
            f"timm cannot open the data set {name!r} (root={place!r}, split={split!r}): {type(error).__name__}: {error}"
        ) from error


def picture_of(item: object) -> Image.Image | None:
    """The PIL image in an item; None where there is none."""
    return next((part for part in _parts(item, IMAGE_KEYS, 0) if isinstance(part, Image.Image)), None)


def label_of(item: object) -> int | None:
    """The class index of an item; None where it has none (timm marks that by -1)."""
    labels = [int(part) for part in _parts(item, LABEL_KEYS, 1) if isinstance(part, int | np.integer)]
    return labels[0] if labels and labels[0] >= 0 else None


def fashion_mnist(folder: str | Path, train: bool, *, size: int = 32) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST from its IDX files, gzipped or not.

    Images are scaled to [0, 1] and padded with the background value 0, then ``(x - 0.2860) / 0.3530``.

    Args:
        folder: Where the files are, or the root of torchvision's layout (``FashionMNIST/raw`` below it).
        train: The 60,000 training images, else the 10,000 test images.
        size: Height and width after padding, at least 28.

    Returns:
        Images ``[N, 1, size, size]``, float32, and labels ``[N]``, int64.

    Raises:
        ArgumentError: ``size`` is smaller than the stored images.
        DataError: A file is missing, damaged or not of this format, or images and labels differ in number.

    Source:
        Xiao, Rasul and Vollgraf, arXiv 1708.07747.
    """
    part = "train" if train else "t10k"
    images, labels = (
        _idx(idx_file(folder, f"{part}-{what}-ubyte"), dimensions)
        for what, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels.")
    height, width = images.shape[1:]
    if size < max(height, width):
        raise ArgumentError(f"size must be at least {max(height, width)}, the stored size, got {size}.")
    padded = nn.functional.pad(images, (*_halves(size - width), *_halves(size - height)))
    return padded[:, None].float().div_(255).sub_(FASHION_MEAN).div_(FASHION_STD), labels.long()


class _Folder(Sequence[tuple[Image.Image, int | None]]):
    """Images below a folder, each with the index of its first-level folder."""

    def __init__(self, folder: Path) -> None:
        self._paths = images_below(folder)
        tops = [path.relative_to(folder).parts[0] for path in self._paths]
        flat = any(path.parent == folder for path in self._paths)
        self.classes = [] if flat else sorted(set(tops), key=_natural)
        index = {name: number for number, name in enumerate(self.classes)}
        self._labels = [index.get(top) for top in tops]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> tuple[Image.Image, int | None]:  # type: ignore[override]
        path = self._paths[position]
        try:
            with Image.open(path) as image:
                image.load()
                return image, self._labels[position]
        except _BROKEN_IMAGE as error:
            raise _CorruptImage(
                f"{path} cannot be read as an image ({type(error).__name__}: {error}). Repair it or take it out, or "
                "pass skip_corrupt=True (--skip-corrupt)."
            ) from error


class _Prepare:
    """An item with a PIL image -> ``(tensor, label)``, or the tensor alone; other items stay as they are.

    The image is converted to the model's number of channels, then goes through timm's evaluation transform.
    """

    def __init__(self, model: nn.Module, *, labels: bool) -> None:
        config = data_config(model)
        channels = config["input_size"][0]
        if channels not in _MODES:
            raise ModelError(
                f"{type(model).__name__} takes images of {channels} channels, pictures have one of {sorted(_MODES)}. "
                "Pass tensors, or a Dataset with its own transform."
            )
        self._mode = _MODES[channels]
        self._transform = cast("Callable[[Image.Image], Tensor]", create_transform(**config, is_training=False))
        self._labels = labels

    def __call__(self, item: object) -> object:
        image = picture_of(item)
        if image is None:
            return item
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"An image has pixels of mode {image.mode}, which have no agreed range. Scale them to 8 bits first."
            )
        tensor = self._transform(image.convert(self._mode))
        label = label_of(item) if self._labels else None
        return tensor if label is None else (tensor, label)


class _CorruptImage(DataError):
    """An image that cannot be read."""


class _Indexed(Dataset):
    """Prepared images in an order; with ``skip_corrupt``, an error in the place of one that cannot be read."""

    def __init__(
        self, source: Sequence[object], order: Sequence[int], prepare: _Prepare, skip_corrupt: bool = False
    ) -> None:
        self._source, self._order, self._prepare, self._skip = source, order, prepare, skip_corrupt

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> object:
        try:
            return self._read(self._order[position])
        except _CorruptImage as error:
            if self._skip:
                return error
            raise

    def _read(self, index: int) -> object:
        try:
            return self._prepare(self._source[index])
        except DataError:
            raise
        except _BROKEN_IMAGE as error:
            raise _CorruptImage(
                f"Item {index} of {type(self._source).__name__} cannot be read as an image ({type(error).__name__}: "
                f"{error}). Repair it or take it out, or pass skip_corrupt=True (--skip-corrupt)."
            ) from error


def _intact(items: list[object]) -> tuple[object, list[str]]:
    """The batch of what could be read (None: nothing), and what is wrong with the rest."""
    good = [item for item in items if not isinstance(item, _CorruptImage)]
    messages = [str(item) for item in items if isinstance(item, _CorruptImage)]
    return default_collate(good) if good else None, messages


class _Intact(Iterable[object]):
    """The batches of a loader without the images that cannot be read, which are logged where the reader is."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[object]:
        left_out = read = 0
        for batch, messages in self._loader:
            for message in messages:
                logger.warning("Left out: %s", message)
            left_out += len(messages)
            if batch is not None:
                read += 1
                yield batch
        if not read:
            raise DataError(f"None of {left_out} images could be read; their names are in the log.")


class _Stream(IterableDataset):
    def __init__(self, source: Iterable[object], prepare: _Prepare) -> None:
        self._source, self._prepare = source, prepare

    def __iter__(self) -> Iterator[object]:
        return map(self._prepare, self._source)


def _needs_transform(data: object, model: nn.Module) -> bool:
    """Whether it yields PIL images; a stream is not read to find out, its items are looked at as they come."""
    if isinstance(data, IterableDataset):
        return image_size(model) is not None
    return picture_of(_first(data)) is not None


def _first(data: object) -> object:
    if isinstance(data, Tensor | Mapping) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return None
    source = cast("Sequence[object]", data)
    try:
        with same_randomness(torch.device("cpu")):
            return source[0] if len(source) else None
    except LookupError:
        return None


def _parts(item: object, keys: Sequence[str], position: int) -> list[object]:
    """What an item holds under one of the keys, or at the position."""
    if isinstance(item, Mapping):
        return [item[key] for key in keys if key in item]
    parts = item if isinstance(item, tuple | list) else (item,)
    return list(parts[position : position + 1])


def _labels_fit(pictures: object, model: nn.Module) -> bool:
    """Whether class indices of these data can be class indices of the model: the same number of classes."""
    found, wanted = _class_count(pictures), getattr(model, "num_classes", None)
    if found is None or wanted is None or found == wanted:
        return True
    logger.warning("%d classes of data, %d of the model: the labels mean something else, not used.", found, wanted)
    return False


def _class_count(pictures: object) -> int | None:
    """From ``classes`` (torchvision's data sets) or ``class_to_idx`` (timm's readers), where there is one."""
    for place, name in ((pictures, "classes"), (getattr(pictures, "reader", None), "class_to_idx")):
        classes = getattr(place, name, None)
        if isinstance(classes, Sequence | Mapping) and classes:
            return len(classes)
    return None


def _checked(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{folder} is a file; expected a folder of images.")
    raise DataError(
        f"There is no folder {folder}. Expected a folder of images, or a name that begins with one of "
        f"{', '.join(prefix + '/' for prefix in PREFIXES)}."
    )


def images_below(folder: Path) -> list[Path]:
    """Paths of images in natural order; links are followed, hidden files and folders are not looked at.

    Raises:
        DataError: There are none.
    """
    found, visited = [], set()
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        if os.path.realpath(place) in visited:
            below.clear()
            continue
        visited.add(os.path.realpath(place))
        found += [Path(place, name) for name in files if not name.startswith(".")]
    images = sorted((path for path in found if path.suffix.lower() in EXTENSIONS), key=lambda path: _natural(str(path)))
    if not images:
        raise DataError(f"No images in {folder} or below: {len(found)} files, none ending in {', '.join(EXTENSIONS)}.")
    return images


def _natural(name: str) -> tuple[list[str | int], str]:
    """Order of class folders in timm (2 before 10), made total."""
    return natural_key(name), name


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def _halves(pixels: int) -> tuple[int, int]:
    return pixels // 2, pixels - pixels // 2


def idx_file(folder: str | Path, name: str) -> Path:
    """Where an IDX file is in a folder: there, or where torchvision puts it, gzipped or not.

    Raises:
        DataError: It is nowhere.
    """
    folder = Path(folder).expanduser()
    candidates = [folder / below / (name + ending) for below in _RAW_FOLDERS for ending in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{folder} holds no {name} or {name}.gz, nor do {' and '.join(_RAW_FOLDERS[1:])} below it.")


def unpacked(path: Path) -> bytes:
    """What a file holds, gzipped or not.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _BROKEN_FILE as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error


def _idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of bytes: a magic number, the sizes (32 bits, big-endian), the values."""
    stored = unpacked(path)
    start = 4 * (1 + dimensions)
    header = [int.from_bytes(stored[at : at + 4], "big") for at in range(0, start, 4)]
    if header[0] != _IDX_MAGIC[dimensions]:
        raise DataError(f"{path} begins with {header[0]:#010x}, expected {_IDX_MAGIC[dimensions]:#010x} (IDX).")
    shape, values = header[1:], np.frombuffer(stored[start:], np.uint8)
    if len(stored) < start or values.size != np.prod(shape):
        raise DataError(f"{path} says {' x '.join(map(str, shape))} values and holds {values.size}.")
    return torch.from_numpy(values.reshape(shape).copy())
