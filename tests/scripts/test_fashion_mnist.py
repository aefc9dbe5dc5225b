"""Fashion-MNIST: IDX files by hand, gzipped or not; every wrong form is named."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from fashion_mnist import fashion_mnist

from jbrprune.errors import ArgumentError, DataError


def idx(values: np.ndarray, magic: int | None = None) -> bytes:
    head = 0x800 + values.ndim if magic is None else magic
    return struct.pack(f">{1 + values.ndim}I", head, *values.shape) + values.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
CLASSES = np.array([7, 0, 9], np.uint8)


def store(folder: Path, *, part: str = "t10k", packed: bool = True, images: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"images-idx3": idx(PIXELS) if images is None else images, "labels-idx1": idx(CLASSES)}
    for what, content in contents.items():
        path = folder / f"{part}-{what}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_fashion_mnist_by_hand(tmp_path: Path, below: str, packed: bool) -> None:
    store(tmp_path / below, packed=packed)
    images, labels = fashion_mnist(tmp_path, train=False)
    assert images.shape == (3, 1, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [7, 0, 9]
    assert images[1, 0, 2 + 5, 2 + 11].item() == pytest.approx((PIXELS[1, 5, 11] / 255 - 0.2860) / 0.3530, rel=1e-5)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert images[:, 0, border].unique().tolist() == pytest.approx([-0.2860 / 0.3530])


def test_fashion_mnist_reads_the_part_that_was_asked_for(tmp_path: Path) -> None:
    store(tmp_path, part="train")
    assert len(fashion_mnist(tmp_path, train=True)[0]) == 3
    with pytest.raises(DataError, match=r"holds no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte\.gz"):
        fashion_mnist(tmp_path, train=False)


@pytest.mark.parametrize("size", [28, 31])
def test_fashion_mnist_of_another_size(tmp_path: Path, size: int) -> None:
    images, _ = fashion_mnist(store(tmp_path), train=False, size=size)
    assert images.shape == (3, 1, size, size)
    start = (size - 28) // 2
    inner = images[:, 0, start : start + 28, start : start + 28] * 0.3530 + 0.2860
    assert torch.allclose(inner, torch.from_numpy(PIXELS).float() / 255, atol=1e-6)


def test_fashion_mnist_is_not_cut(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"size must be at least 28, the stored size, got 27"):
        fashion_mnist(store(tmp_path), train=False, size=27)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(PIXELS, magic=0x801), r"begins with 0x00000801, expected 0x00000803"),
        (b"", r"begins with 0x00000000"),
        (idx(PIXELS)[:10], r"says 3 x \d+ x 0 values|holds 0"),
        (idx(PIXELS)[:-1], r"says 3 x 28 x 28 values and holds 2351"),
        (idx(PIXELS) + b"x", r"and holds 2353"),
        (idx(PIXELS[:2]), r"2 t10k images but 3 labels"),
    ],
    ids=["magic", "empty", "header", "short", "long", "fewer"],
)
def test_fashion_mnist_of_the_wrong_form(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fashion_mnist(store(tmp_path, images=content), train=False)


@pytest.mark.parametrize("cut", [5, 60])
def test_a_damaged_archive_is_named(tmp_path: Path, cut: int) -> None:
    store(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be read \(EOFError"):
        fashion_mnist(tmp_path, train=False)
