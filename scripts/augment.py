"""Images to train on, by name: augmented by timm, checked by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from fashion_mnist import fashion_mnist, idx_file, unpacked
from PIL import Image
from sources import ALIASES, NORMALISED, check_source, idx_folder, names_digest, train_folder
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from jbrprune.data.images import label_of, picture_of, pictures
from jbrprune.demo import digits
from jbrprune.errors import DataError
from jbrprune.models.timm_models import data_config

FASHION_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
)
"""Name of a file of Fashion-MNIST -> SHA-256 of what it holds uncompressed."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, by transforms of timm and torchvision.

    Attributes:
        padding: A random crop of the image padded by so many pixels; 0: timm's random crop, resized.
        scale: Share of the area that a resized crop covers, at least.
        hflip: Probability of a mirror image.
        color_jitter: Strength.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``.
        re_prob: Probability of random erasing.
    """

    padding: int = 0
    scale: float = 0.35
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0


AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "digits": Augmentation(padding=2, hflip=0.0),
        "fashion_mnist": Augmentation(padding=2),
        "cifar10": Augmentation(padding=4),
        "cifar100": Augmentation(padding=4),
    }
)
"""Name of data -> its usual augmentation; what is not here gets the default."""


class Augmented(Dataset):
    """``(image, label)`` from pictures, augmented anew whenever one is read (by the global generators)."""

    def __init__(self, stored: Sequence[Any], transform: transforms.Compose, mode: str) -> None:
        self._stored, self._transform, self._mode = stored, transform, mode

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        item = self._stored[position]
        picture, label = picture_of(item), label_of(item)
        if picture is None or label is None:
            raise DataError(f"Training item {position} is no picture with a class index: training needs labels.")
        return self._transform(picture.convert(self._mode)), label


class _OfTensors(Sequence[tuple[Image.Image, int]]):
    """Pictures of 8 bits from normalised tensors ``[N, 1, H, W]``."""

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float) -> None:
        self._pixels = (images * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:  # type: ignore[override]
        return to_pil_image(self._pixels[position]), self._labels[position]


def open_training(name: str, root: str | None, model: nn.Module, how: Augmentation) -> tuple[Augmented, str]:
    """Training images of named data or of a folder, and a digest of them.

    Args:
        name: As for `sources.open_source`.
        root: Where named data are stored.
        model: timm's; pictures are prepared for it.
        how: What is done to each image.

    Raises:
        ArgumentError: No such data.
        DataError: They cannot be read, or are known and damaged.
    """
    check_source(name)
    folder = None if name in NORMALISED else train_folder(name, root)
    if name in NORMALISED:
        mean, std = NORMALISED[name]
        images, labels = _fashion(root) if name == "fashion_mnist" else digits()[:2]
        facts = {"input_size": tuple(images.shape[1:]), "mean": (mean,), "std": (std,)}
        stored: Any = _OfTensors(images, labels, mean, std)
    else:
        facts = data_config(model)
        stored = pictures(ALIASES.get(name, name) if folder is None else str(folder), model, root=root, split="train")
        if not isinstance(stored, Sequence) and not hasattr(stored, "__getitem__"):
            raise DataError(f"{name} is a stream; training here needs data that can be shuffled: store it in a folder.")
    digest = _of_items(stored) if folder is None else names_digest(folder)
    return Augmented(stored, _transform(facts, how), "L" if facts["input_size"][0] == 1 else "RGB"), digest


def _transform(facts: Mapping[str, Any], how: Augmentation) -> transforms.Compose:
    size = facts["input_size"]
    made: Any = create_transform(
        input_size=size,
        is_training=True,
        scale=(how.scale, 1.0),
        hflip=how.hflip,
        color_jitter=how.color_jitter,
        auto_augment=how.auto_augment,
        re_prob=how.re_prob,
        interpolation=facts.get("interpolation", "bilinear"),
        mean=facts["mean"],
        std=facts["std"],
    )
    if how.padding:  # small pictures are shifted, not scaled, as DeiT and others do on CIFAR
        made.transforms[:1] = [transforms.Resize(size[-1]), transforms.RandomCrop(size[-2:], padding=how.padding)]
    return made


def _fashion(root: str | None) -> tuple[Tensor, Tensor]:
    folder = idx_folder(root)
    images, labels = fashion_mnist(folder, train=True)
    check_fashion(folder)
    return images, labels


def check_fashion(folder: str | Path) -> None:
    """Compare the IDX files with the known hashes.

    Raises:
        DataError: A file differs: it is damaged, or something else.
    """
    for name, known in FASHION_SHA256.items():
        path = idx_file(folder, name)
        found = hashlib.sha256(unpacked(path)).hexdigest()
        if found != known:
            raise DataError(
                f"{path} is not Fashion-MNIST's {name}: its content has SHA-256 {found[:16]}..., expected "
                f"{known[:16]}.... Fetch it again; data of your own belong into a folder of pictures."
            )


def _of_items(stored: Sequence[Any]) -> str:
    """Of pixels and labels."""
    digest = hashlib.sha256()
    for position in range(len(stored)):
        picture, label = picture_of(stored[position]), label_of(stored[position])
        digest.update(b"" if picture is None else picture.tobytes())
        digest.update(str(label).encode())
    return f"items:{digest.hexdigest()[:16]}"
