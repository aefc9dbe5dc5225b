"""Images from folders, from timm's data sets and from data sets of pictures, prepared the way the model wants them.

What comes out is read by `jbrprune.data.batches.iterate`.
"""

from __future__ import annotations

import logging
import os
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

from jbrprune.data.batches import split_item
from jbrprune.errors import DataError, ModelError
from jbrprune.models.preserve import same_randomness
from jbrprune.models.timm_models import data_config, image_size

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
"""Endings of file names that count as images in a folder, in upper or lower case."""

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
"""Kinds of data set that ``timm.data.create_dataset`` finds by name: ``torch/cifar10``."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
_BROKEN_NAME = (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError)


def open_data(
    data: object,
    model: nn.Module,
    *,
    batch_size: int = 32,
    workers: int = 0,
    root: str | Path | None = None,
    split: str = "validation",
    skip_corrupt: bool = False,
) -> object:
    """Turn a user's data into something that `jbrprune.data.batches.iterate` reads.

    - A folder: every image below it, in an order that is random and always the same, so that the first few hundred
      are a fair sample; prepared by timm's evaluation transform for this model. Its first-level folders are the
      classes, in natural order, if every image is inside one.
    - A name that begins with one of `PREFIXES`, for ``timm.data.create_dataset``: the same.
    - A data set of PIL images (a ``Dataset``, a Hugging Face data set, a list): in its own order, with that transform.
    - Anything else is returned as it is.

    Labels whose number of classes is not the model's are dropped, which is logged.

    Args:
        data: See above.
        model: Its preprocessing and its number of classes are used.
        batch_size: Images per batch, where the data do not say.
        workers: Processes that read images, 0 for none; streams are read in this process.
        root: Where a named data set is stored.
        split: Which part of a named data set.
        skip_corrupt: Leave out images that cannot be read, and log their names, instead of stopping at the first.
            (timm's own readers, of ``hfds/`` and the like, replace such an image by the next and log it.)

    Returns:
        A `DataLoader` or another iterable.

    Raises:
        DataError: No such folder, no images in it, a named data set that cannot be opened; while reading, an
            unreadable image.
        ModelError: Images need a transform, but nothing says which one this model wants.
    """
    by_name = isinstance(data, str | Path)
    stored = pictures(str(data), model, root=root, split=split) if by_name else data
    if not by_name and not _has_pictures(data, model):
        return data
    prepare = _Prepare(model, labels=_labels_fit(stored, model))
    if isinstance(stored, IterableDataset):
        return _Stream(stored, prepare)
    source = cast("Sequence[object]", stored)
    seeded = torch.Generator().manual_seed(0)
    order = torch.randperm(len(source), generator=seeded).tolist() if by_name else range(len(source))
    # A generator of its own: iterating must not advance the user's random state.
    loader = DataLoader(
        _Prepared(source, order, prepare, skip_corrupt),
        batch_size,
        num_workers=workers,
        generator=torch.Generator(),
        collate_fn=list if skip_corrupt else None,
    )
    return _Intact(loader) if skip_corrupt else loader


def pictures(name: str, model: nn.Module, *, root: str | Path | None = None, split: str = "validation") -> object:
    """Open the pictures of a folder or a named data set, untransformed, with class indices where there are any.

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
    if folder.is_dir():
        return _Folder(folder)
    if folder.exists():
        raise DataError(f"{folder} is a file; expected a folder of images.")
    if name.partition("/")[0].lower() not in PREFIXES or "/" not in name:
        raise DataError(
            f"There is no folder {folder}. Expected a folder of images, or a name that begins with one of "
            f"{', '.join(prefix + '/' for prefix in PREFIXES)}."
        )
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
    image = split_item(item)[0]
    return image if isinstance(image, Image.Image) else None


def label_of(item: object) -> int | None:
    """The class index of an item; None where it has none (timm marks that by -1)."""
    label = split_item(item)[1]
    return int(label) if isinstance(label, int | np.integer) and label >= 0 else None


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


class _Folder(Sequence[tuple[Image.Image, int | None]]):
    """Images below a folder, each with the index of its first-level folder."""

    def __init__(self, folder: Path) -> None:
        self.paths = images_below(folder)
        tops = [path.relative_to(folder).parts[0] for path in self.paths]
        flat = any(path.parent == folder for path in self.paths)
        self.classes = [] if flat else sorted(set(tops), key=_natural)
        index = {name: number for number, name in enumerate(self.classes)}
        self._labels = [index.get(top) for top in tops]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Image.Image, int | None]:  # type: ignore[override]
        with Image.open(self.paths[position]) as image:
            image.load()
            return image, self._labels[position]


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


class _Prepared(Dataset):
    """Prepared images in an order; with ``skip``, an error in the place of one that cannot be read."""

    def __init__(self, source: Sequence[object], order: Sequence[int], prepare: _Prepare, skip: bool) -> None:
        self._source, self._order, self._prepare, self._skip = source, order, prepare, skip

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> object:
        index, source = self._order[position], self._source
        try:
            return self._prepare(source[index])
        except DataError:
            raise
        except _BROKEN_IMAGE as error:
            name = source.paths[index] if isinstance(source, _Folder) else f"Item {index} of {type(source).__name__}"
            corrupt = _CorruptImage(
                f"{name} cannot be read as an image ({type(error).__name__}: {error}). Repair it or take it out, or "
                "open the data with jbrprune.data.images.open_data(..., skip_corrupt=True) (--skip-corrupt)."
            )
            if self._skip:
                return corrupt
            raise corrupt from error


class _Intact(Iterable[object]):
    """The batches of a loader without the images that cannot be read, which are logged where the reader is."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[object]:
        read = False
        for items in self._loader:
            for item in items:
                if isinstance(item, _CorruptImage):
                    logger.warning("Left out: %s", item)
            good = [item for item in items if not isinstance(item, _CorruptImage)]
            if good:
                read = True
                yield default_collate(good)
        if not read:
            raise DataError("None of the images could be read; their names are in the log.")


class _Stream(IterableDataset):
    def __init__(self, source: Iterable[object], prepare: _Prepare) -> None:
        self._source, self._prepare = source, prepare

    def __iter__(self) -> Iterator[object]:
        return map(self._prepare, self._source)


def _has_pictures(data: object, model: nn.Module) -> bool:
    """Whether data yield PIL images; a stream is not read to find out, its items are looked at as they come."""
    if isinstance(data, IterableDataset):
        return image_size(model) is not None
    if isinstance(data, Tensor | Mapping) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return False
    try:
        with same_randomness(torch.device("cpu")):
            return len(data) > 0 and picture_of(data[0]) is not None  # type: ignore[arg-type,index]
    except LookupError:
        return False


def _labels_fit(stored: object, model: nn.Module) -> bool:
    """Whether the data have as many classes as the model, as far as both tell.

    The data tell by ``classes`` (torchvision's data sets) or ``class_to_idx`` (timm's readers).
    """
    known = getattr(stored, "classes", None) or getattr(getattr(stored, "reader", None), "class_to_idx", None)
    found = len(known) if isinstance(known, Sequence | Mapping) else None
    wanted = getattr(model, "num_classes", None)
    if found is None or wanted is None or found == wanted:
        return True
    logger.warning("%d classes of data, %d of the model: the labels mean something else, not used.", found, wanted)
    return False


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: the order of class folders in timm (2 before 10), with the name to break ties."""
    return natural_key(name), name
