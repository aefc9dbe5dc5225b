"""Everything that yields images is read as `Batch` objects.

Accepted: a tensor ``[N, C, H, W]``; a map-style ``Dataset``; a ``DataLoader``; any iterable whose
items are tensors, ``(image, label)`` tuples or dicts, batched ``[B, C, H, W]`` or single ``[C, H, W]``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from jbrprune.errors import DataError, NonFiniteError
from jbrprune.models.preserve import describe_returned

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "fine_label", "cls")
"""Keys of Hugging Face data sets and processors, and of webdataset, among others; the first that is there counts."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of images.

    Attributes:
        images: ``[B, C, H, W]``.
        labels: ``[B]`` class indices, or None.
        reference: ``[B, K]`` logits of the dense model, or None where they have not been computed.
    """

    images: Tensor
    labels: Tensor | None = None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor that is there."""
        return Batch(*(None if t is None else function(t) for t in self._tensors()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Batch:
        """Move to a device and detach. Tensors of inference mode are copied."""

        def move(tensor: Tensor) -> Tensor:
            return (tensor.clone() if tensor.is_inference() else tensor.detach()).to(device, non_blocking=True)

        return self.map(move)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.images, self.labels, self.reference


def iterate(data: object, *, batch_size: int = 32) -> Iterator[Batch]:
    """Yield `Batch` objects from anything that yields images.

    A `DataLoader` and batched items keep their own batch size; single images are gathered.

    Args:
        data: See the module's docstring.
        batch_size: Images per batch where the data do not say.

    Yields:
        Batches; images are checked to be finite floating-point ``[B, C, H, W]``.

    Raises:
        DataError: Nothing to iterate, an item of unknown form, wrong rank or dtype.
        NonFiniteError: NaN or Inf in an image (names the batch).

    Example:
        >>> import torch
        >>> [len(batch) for batch in iterate(torch.zeros(5, 3, 8, 8), batch_size=2)]
        [2, 2, 1]
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}.")
    number = -1
    for number, batch in enumerate(_gather(_items(data, batch_size), batch_size)):
        _check(batch, number)
        yield batch
    if number < 0:
        raise DataError(
            f"The data ({type(data).__name__}) yielded no batch. An exhausted generator cannot be read "
            "again: pass a list, a tensor, a Dataset or a DataLoader."
        )


def materialise(data: object, *, images: int | None, batch_size: int = 32) -> list[Batch]:
    """Read up to ``images`` images once and keep them on the CPU, in batches of ``batch_size``."""
    if images is not None and images < 1:
        raise DataError(f"The number of images must be at least 1, got {images}.")
    taken: list[Batch] = []
    missing = images
    for batch in iterate(data, batch_size=batch_size):
        batch = batch.to(torch.device("cpu"))
        if missing is not None:
            batch = batch.map(lambda tensor, stop=missing: tensor[:stop])
            missing -= len(batch)
        taken.append(batch)
        if missing == 0:
            break
    return rebatch(taken, batch_size)


def rebatch(batches: Iterable[Batch], batch_size: int) -> list[Batch]:
    """Regroup batches: the same images in the same order, ``batch_size`` at a time."""
    whole = concatenate(list(batches))
    return [
        whole.map(lambda tensor, start=start: tensor[start : start + batch_size])
        for start in range(0, len(whole), batch_size)
    ]


def concatenate(batches: list[Batch]) -> Batch:
    """Join batches to one; it has labels and references only if every batch has them."""
    shapes = sorted({tuple(batch.images.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise DataError(f"Images of different shapes cannot be one batch: {shapes}. Resize them to one size first.")
    columns = zip(*(batch._tensors() for batch in batches), strict=True)
    joined = [None if any(t is None for t in column) else torch.cat(column) for column in columns]
    return Batch(*joined)  # type: ignore[arg-type]


def count(batches: Iterable[Batch]) -> int:
    """Number of images."""
    return sum(len(batch) for batch in batches)


def attach_reference(batches: Iterable[Batch], logits: Iterable[Tensor]) -> list[Batch]:
    """Attach the dense model's logits."""
    return [replace(batch, reference=out) for batch, out in zip(batches, logits, strict=True)]


def _items(data: object, batch_size: int) -> Iterator[object]:
    if isinstance(data, Tensor):
        if data.dim() != 4:
            raise DataError(f"A tensor of images must be [N, C, H, W], got shape {tuple(data.shape)}.")
        return iter(data.split(batch_size) if len(data) else ())
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return iter(data[i] for i in range(len(data)))  # type: ignore[arg-type]
    if isinstance(data, Mapping | str | bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"Cannot read images from {type(data).__name__}: pass a folder, a tensor [N, C, H, W], a Dataset, "
            "a DataLoader, or an iterable of tensors, (image, label) tuples or dicts; of one dict, a value: "
            "data['pixel_values'], data['train']."
        )
    return iter(data)


def _gather(items: Iterator[object], batch_size: int) -> Iterator[Batch]:
    waiting: list[Batch] = []
    for item in items:
        batch = _as_batch(item)
        if batch.images.dim() != 3:
            yield batch
            continue
        waiting.append(batch.map(lambda tensor: tensor[None]))
        if len(waiting) == batch_size:
            yield concatenate(waiting)
            waiting = []
    if waiting:
        yield concatenate(waiting)


def _as_batch(item: object) -> Batch:
    """Detached images, and class indices where there is one for every image."""
    images, labels = (item.images, item.labels) if isinstance(item, Batch) else split_item(item)
    if not isinstance(images, Tensor):
        raise DataError(
            f"The data yielded {describe_returned(item)}; expected a tensor, an (image, label) tuple or a dict with a "
            f"tensor under one of the keys {', '.join(IMAGE_KEYS)}. {CONVERSIONS}"
        )
    labels = class_indices(labels, images.shape[:-3])
    return Batch(images.detach(), labels, item.reference if isinstance(item, Batch) else None)


def split_item(item: object) -> tuple[object, object]:
    """Images and labels of an item of data, of any type; None where it has none."""
    if isinstance(item, Mapping):
        images, labels = (next((item[key] for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS))
    else:
        images, labels, *_ = (*item, None, None) if isinstance(item, list | tuple) else (item, None)
    return images, labels


CONVERSIONS = (
    "Of an array (height, width, channel) write torch.from_numpy(array).permute(2, 0, 1) / 255, of a list of images "
    "torch.stack(images), of a webdataset .decode('pil').to_tuple('jpg', 'cls'); of PIL images pass a list, a Dataset "
    "or the folder, or apply a transform."
)


def class_indices(labels: object, shape: Sequence[int], classes: int | None = None) -> Tensor | None:
    """Labels as class indices; None, with one warning, where they are something else: only a report may need them.

    Masks, captions, boxes, one-hot or soft labels are none, nor is -1, which stands for an image without a label.

    Args:
        labels: What the data hold; None: nothing.
        shape: ``(B,)``, or nothing for a single image.
        classes: Number of classes of the model, if it is known.

    Example:
        >>> class_indices([3, 1], (2,)), class_indices([[0.2, 0.8]], (1,))
        (tensor([3, 1]), None)
    """
    if labels is None:
        return None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return warn_of_labels(f"a {type(labels).__name__} of what is no number")
    if found.is_floating_point() or found.is_complex() or found.shape != tuple(shape):
        return warn_of_labels(f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}")
    least, most = (int(found.min()), int(found.max())) if found.numel() else (0, -1)
    if least < 0 or (classes is not None and most >= classes):
        return warn_of_labels(f"values from {least} to {most}" + (f" for {classes} classes" if classes else ""))
    return found.long()


@functools.cache
def warn_of_labels(what: str) -> None:
    """Log once that labels are left out."""
    logger.warning("The labels are left out: they are %s, and not one class index for every image.", what)


def _check(batch: Batch, number: int) -> None:
    images = batch.images
    if images.dim() != 4 or not images.is_floating_point():
        raise DataError(
            f"Batch {number}: images must be floating point [B, C, H, W], got {images.dtype} of shape "
            f"{tuple(images.shape)}. Of 8-bit images write (images / 255 - mean) / std, with mean and std [C, 1, 1] of "
            "timm.data.resolve_data_config({}, model=model), and images.movedim(-1, 1) if channels are last."
        )
    if len(images) == 0:
        raise DataError(f"Batch {number} is empty: shape {tuple(images.shape)}.")
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise NonFiniteError(f"Batch {number}: image {bad} contains NaN or Inf. Check the transform that made it.")
