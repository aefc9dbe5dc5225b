"""Images by name: digits, Fashion-MNIST, CIFAR, photographs, folders and streams."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import benchmark
import numpy as np
import pytest
import sources
import timm
import torch
from PIL import Image
from runs import run, setup, wanted
from sources import fashion_mnist
from torch import nn
from torch.utils.data import IterableDataset

from jbrprune.demo import crops, lite0
from jbrprune.errors import ArgumentError, DataError


def test_folders_are_read_apart(pictures: Path) -> None:
    model = benchmark.create(setup(model_args={"num_classes": 3, "in_chans": 3}, weights="random"))
    source = sources.open_source(str(pictures), None, model)
    assert len(source.train) == 18
    assert len(source.test) == 12
    one, same, other = (torch.cat([b.images for b in source.calibration(9, seed, 0)]) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    by_name = sources.open_source("imagenet", str(pictures), model)
    assert (by_name.name, len(by_name.train), len(by_name.test)) == ("imagenet", 18, 12)
    halves = sources.open_source(str(pictures / "train"), None, model)
    batches = [*halves.calibration(9, 0, 0), *halves.measured(None, 0)]
    greys = [round(grey, 4) for batch in batches for grey in batch.images.mean((1, 2, 3)).tolist()]
    assert len(set(greys)) == 18  # all different: disjoint
    with pytest.raises(ArgumentError, match="12 images for evaluation, 13 were asked for"):
        source.measured(13, 0)


def test_a_folder_called_like_a_data_set_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the one that is given as root."""
    named = [*sources.SMALL, sources.PHOTOGRAPHS]
    for name in named:
        (tmp_path / name / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [sources.folder_of(name, name) for name in named] == [None] * len(named)


def test_photographs_for_the_model_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged net sees what the demo shows it, another model its own mean and deviation; without labels."""
    monkeypatch.setattr(sources, "CROPS", 8)
    given = {"model": ["tf_efficientnet_lite0"], "data": ["photographs"], "weights": "packaged", "criterion": ["l1"]}
    model = benchmark.create(setup(**given, seeds=[0]))
    dense, source = lite0(), sources.open_source("photographs", None, model)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), dense.parameters()))
    (batch,) = source.calibration(8, 0, 0)
    shown = crops("calibration", count=8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert batch.labels is None
    assert torch.allclose(batch.images, shown[order], atol=1e-6)
    (batch,) = sources.open_source("photographs", None, timm.create_model("resnet10t")).measured(None, 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(batch.images, (crops("heldout", count=4) * 0.5 + 0.5 - mean) / std, atol=1e-5)
    with pytest.raises(ArgumentError, match="'packaged' are there for tf_efficientnet_lite0 only, not for test_resnet"):
        wanted(weights="packaged")


def test_photographs_of_a_folder_are_split_by_file(tmp_path: Path) -> None:
    """Transparent ones on a plain ground; drawings and mirrored files are left out; three choices of a split."""
    names = [f"animals/{number}.png" for number in range(13)]
    for name in (*names, "animals/0_mirror.png", "town/flags/a.png", "symbols/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("LA", (30, 20), (0, 0)).save(tmp_path / name)
    model, parts = timm.create_model("resnet10t"), []
    for split in sources.SPLITS:
        source = sources.open_source(split, str(tmp_path), model)
        assert (len(source.train), len(source.test), source.labelled) == (48, 15, False)
        parts.append(frozenset(source.test.paths))
        assert sorted({*source.train.paths, *source.test.paths}) == sorted(tmp_path / name for name in names)
        assert not parts[-1] & set(source.train.paths)
    assert len(set(parts)) == 3
    (batch,) = source.measured(None, 0)
    assert batch.images.shape == (15, 3, 160, 160)
    assert torch.equal(batch.images[3], source.test[3])
    colours = {
        tuple(((image[:, 0, 0] * source.test.std[:, 0, 0]) + source.test.mean[:, 0, 0]).tolist())
        for image in batch.images
    }
    whole = {tuple(round(255 * value) for value in colour) for colour in colours}
    assert whole <= {(255, 255, 255), (128, 128, 128), (0, 128, 0), (0, 0, 255)}
    assert len(whole) > 2
    with pytest.raises(ArgumentError, match="photographs/0 is read from a folder of photographs: pass it as root"):
        sources.open_source("photographs/0", None, model)


def test_cifar_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels, labels = generator.integers(0, 256, (6, 3072), dtype=np.uint8), [number % 10 for number in range(6)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # these are not the real files
    (only,) = wanted(data=["cifar10"], root=str(tmp_path), weights="random", criterion=["l1"], seeds=[0])
    model = benchmark.create(only.setup)
    assert benchmark.load_dense(only.setup) is benchmark.load_dense(only.setup)  # kept: a setup can be looked up
    source = sources.open_source("cifar10", str(tmp_path), model)
    (batch,) = source.measured(None, 0)
    assert (len(source.train), len(source.test)) == (30, 6)
    assert batch.images.shape == (6, 3, 32, 32)  # not enlarged to what ImageNet's weights want
    assert sorted(batch.labels.tolist()) == [0, 1, 2, 3, 4, 5]
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"].reshape(6, 3, 32, 32) / 255
    wanted_images = (torch.from_numpy(stored) - torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]) / torch.tensor(
        [0.2470, 0.2435, 0.2616]
    )[:, None, None]
    assert torch.allclose(batch.images[batch.labels.argsort()].double(), wanted_images, atol=1e-5)


def test_images_are_drawn_from_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return ((torch.full((1, 4, 4), float(number)), number % 3) for number in range(200))

    monkeypatch.setattr(sources, "open_data", lambda *_, **__: Stream())
    source = sources.open_source("wds/some", None, nn.Identity())

    def numbers(seed: int) -> list[float]:
        batches = source.calibration(8, seed, 0)
        assert all(batch.labels is not None for batch in batches)
        return torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()

    assert numbers(0) == numbers(0) != numbers(1)
    every = [number for seed in range(300) for number in numbers(seed)]
    assert len(set(numbers(0))) == 8
    assert max(every) < 80  # ten times eight
    assert abs(np.mean(every) - 39.5) < 2  # uniform: the mean of 2,400 draws has deviation 0.5
    assert [len(batch) for batch in source.measured(70, 0)] == [64, 6]
    with pytest.raises(DataError, match="200 images for calibration, 201 were asked for"):
        source.calibration(201, 0, 0)


def test_fashion_mnist_and_weights_in_a_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        images, labels = generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes()
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    net = benchmark.create(setup(weights="random"))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    base = ["--model", "test_resnet", "--data", "fashion_mnist", "--root", str(tmp_path), "--images", "30"]
    base += ["--weights", str(tmp_path / "net.pth")]
    (line,) = run(tmp_path / "out", "--criterion", "l1", "--budgets", "0.8", "--steps", "1", "--seeds", "0", base=base)
    assert (line["images"], line["eval_images"]) == (30, 20)
    assert line["weights"].startswith("sha256:")
    assert line["model_args"] == {"in_chans": 1, "num_classes": 10}


# --- IDX files ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(PIXELS, magic=0x801), "is no IDX file of images of 28 x 28 bytes, or is damaged"),
        (b"", "is no IDX file"),
        (idx(PIXELS)[:10], "is no IDX file"),
        (idx(PIXELS)[:-1], "is no IDX file"),
        (idx(PIXELS) + b"x", "is no IDX file"),
        (idx(PIXELS[:, 1:]), "is no IDX file"),
        (idx(PIXELS[:2]), r"2 t10k images but 3 labels"),
    ],
    ids=["magic", "empty", "header", "short", "long", "size", "fewer"],
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
