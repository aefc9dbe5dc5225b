"""Fashion-MNIST from its IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, DataError

FASHION_MEAN, FASHION_STD = 0.2860, 0.3530

_BROKEN_FILE = (OSError, EOFError, zlib.error)
_RAW_FOLDERS = ("", "raw", "FashionMNIST/raw")
"""Where below a folder IDX files are looked for; the last is torchvision's layout."""
_IDX_MAGIC = {1: 0x00000801, 3: 0x00000803}


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
    padded = nn.functional.pad(
        images, ((size - width) // 2, (size - width + 1) // 2, (size - height) // 2, (size - height + 1) // 2)
    )
    return padded[:, None].float().div_(255).sub_(FASHION_MEAN).div_(FASHION_STD), labels.long()


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
