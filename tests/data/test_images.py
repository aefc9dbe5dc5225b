"""Folders, names and data sets of pictures become batches that fit the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from jbrprune.data import images as module
from jbrprune.data.batches import Batch, concatenate, iterate
from jbrprune.data.images import open_data
from jbrprune.errors import DataError, ModelError
from jbrprune.models.timm_models import create, data_config

SIDE = 32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Wants 3 x 32 x 32 and knows three classes."""
    return create("test_vit", pretrained=False, num_classes=3, img_size=SIDE)


@pytest.fixture(scope="module")
def grey_model() -> nn.Module:
    return create("test_vit", pretrained=False, num_classes=3, img_size=SIDE, in_chans=1)


def picture(shade: int, mode: str = "RGB", size: tuple[int, int] = (40, 36)) -> Image.Image:
    return Image.new("RGB", size, (shade, shade, shade)).convert(mode)


def save(path: Path, shade: int = 100, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(shade, mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes 2, 10 and 9 with shades 20, 100 and 90, three images each."""
    for name in ("2", "10", "9"):
        for number in range(3):
            save(tmp_path / "set" / name / f"{number}.png", 10 * int(name))
    return tmp_path / "set"


def read(data: object) -> Batch:
    return concatenate(list(iterate(data)))


def shades(images: Tensor, model: nn.Module) -> list[int]:
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return ((images * std + mean) * 255).mean((1, 2, 3)).round().int().tolist()


# --- folders -------------------------------------------------------------------------------------


def test_class_folders_in_natural_order_give_the_labels(folder: Path, model: nn.Module) -> None:
    batch = read(open_data(folder, model, batch_size=4))
    assert batch.images.shape == (9, 3, SIDE, SIDE)
    assert batch.labels is not None
    assert [(20, 90, 100)[label] for label in batch.labels] == shades(batch.images, model)


def test_the_first_images_are_a_sample_of_all_classes_always_the_same(folder: Path, model: nn.Module) -> None:
    first, again = (read(open_data(folder, model)).labels for _ in range(2))
    assert first is not None
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert first.tolist() != sorted(first.tolist())


def test_the_folder_can_be_text_and_be_read_twice(folder: Path, model: nn.Module) -> None:
    opened = open_data(str(folder), model)
    assert torch.equal(read(opened).images, read(opened).images)


def test_the_transform_is_timms(tmp_path: Path) -> None:
    model = create("test_vit", pretrained=False, img_size=48)
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    transform = timm.data.create_transform(**data_config(model), is_training=False)
    expected = transform(Image.fromarray(noise))  # type: ignore[operator]
    assert torch.equal(read(open_data(tmp_path, model)).images[0], expected)


def test_labels_of_other_classes_are_dropped_and_logged(
    folder: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "9").rename(folder.parent / "away")
    batch = read(open_data(folder, model))
    assert len(batch) == 6
    assert batch.labels is None
    assert "2 classes of data, 3 of the model" in caplog.text


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("a.png", "x/b.png"), ("x/y/a.png", "z/b.png")])
def test_folders_without_classes(
    tmp_path: Path, names: tuple[str, str], model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        save(tmp_path / name)
    batch = read(open_data(tmp_path, model))
    assert len(batch) == 2
    assert batch.labels is None
    assert ("labels mean something else" in caplog.text) == (names[0] == "x/y/a.png")


def test_every_extension_and_mode_in_either_case(tmp_path: Path, model: nn.Module) -> None:
    for number, ending in enumerate(module.EXTENSIONS):
        save(tmp_path / f"{number}{ending.upper() if number % 2 else ending}")
    for mode in ("L", "P", "1", "RGBA", "LA"):
        save(tmp_path / f"{mode}.png", 255, mode)
    batch = read(open_data(tmp_path, model))
    assert batch.images.shape == (len(module.EXTENSIONS) + 5, 3, SIDE, SIDE)


def test_grey_images_for_colour_models_and_the_reverse(tmp_path: Path, model: nn.Module, grey_model: nn.Module) -> None:
    save(tmp_path / "a.png", 60, "L")
    save(tmp_path / "b.png", 60, "RGB")
    for net, channels in ((model, 3), (grey_model, 1)):
        batch = read(open_data(tmp_path, net))
        assert batch.images.shape == (2, channels, SIDE, SIDE)
        assert shades(batch.images, net) == [60, 60]


def test_hidden_files_are_not_looked_at_and_links_are_followed(tmp_path: Path, model: nn.Module) -> None:
    save(tmp_path / "real" / "a.png")
    place = tmp_path / "set"
    save(place / ".hidden" / "b.png")
    save(place / "._c.png")
    (place / "linked").symlink_to(tmp_path / "real")
    (place / "circle").symlink_to(place)
    assert len(read(open_data(place, model))) == 1


def test_files_that_are_not_images_are_passed_over(folder: Path, model: nn.Module) -> None:
    (folder / "2" / "labels.csv").write_text("a,b")
    assert len(read(open_data(folder, model))) == 9


def test_reading_leaves_the_random_state(folder: Path, model: nn.Module) -> None:
    before = torch.get_rng_state()
    read(open_data(folder, model))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_folder(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*absent. Expected a folder of images, or a name.*torch/"):
        open_data(tmp_path / "absent", model)


def test_a_file_instead_of_a_folder(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(DataError, match=r"a\.png is a file; expected a folder"):
        open_data(save(tmp_path / "a.png"), model)


def test_a_folder_without_images(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"No images in .* 1 files, none ending in \.jpg, \.jpeg, \.png"):
        open_data(tmp_path, model)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_an_unreadable_image_is_named(folder: Path, model: nn.Module, damage: str) -> None:
    path = folder / "9" / "bad.png"
    whole = save(path).read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(DataError, match=r"9.bad\.png cannot be read as an image .*Repair it or take it out"):
        read(open_data(folder, model))


def test_an_unreadable_image_is_named_by_a_worker_too(folder: Path, model: nn.Module) -> None:
    (folder / "9" / "bad.jpg").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"bad\.jpg cannot be read"):
        read(open_data(folder, model, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_named_on_request(
    folder: Path, model: nn.Module, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read(open_data(folder, model))
    for name in ("9/bad.jpg", "2/worse.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"hello")
    for batch_size in (1, 4):  # of one: a batch of which nothing is left
        caplog.clear()
        found = read(open_data(folder, model, workers=workers, batch_size=batch_size, skip_corrupt=True))
        assert sorted(shades(found.images, model)) == sorted(shades(whole.images, model))
        assert found.labels is not None
        assert sorted(re.findall(r"Left out: .*?(\w+\.\w+) cannot be read", caplog.text)) == ["bad.jpg", "worse.png"]


def test_a_folder_without_one_readable_image(tmp_path: Path, model: nn.Module) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"hello")
    with pytest.raises(DataError, match="None of the images could be read"):
        read(open_data(tmp_path, model, skip_corrupt=True))


class _Broken(Sequence[Image.Image]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, position: int) -> Image.Image:  # type: ignore[override]
        if position == 1:
            raise OSError("image file is truncated")
        return Image.new("RGB", (40, 40), (7 * position,) * 3)


def test_an_unreadable_item_of_a_data_set_is_named(model: nn.Module) -> None:
    with pytest.raises(DataError, match=r"Item 1 of _Broken cannot be read as an image \(OSError: image file is"):
        read(open_data(_Broken(), model))
    assert shades(read(open_data(_Broken(), model, skip_corrupt=True)).images, model) == [0, 14]


def test_sixteen_bits_are_not_guessed_at(tmp_path: Path, model: nn.Module) -> None:
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"mode I;16.*8 bits"):
        read(open_data(tmp_path, model))


def test_a_model_that_is_not_timms_needs_tensors(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"Linear carries no pretrained_cfg"):
        open_data(folder, nn.Linear(1, 1))


def test_channels_that_no_picture_has(folder: Path) -> None:
    net = create("test_vit", pretrained=False, in_chans=7, img_size=SIDE)
    with pytest.raises(ModelError, match=r"7 channels, pictures have one of \[1, 3, 4\]"):
        open_data(folder, net)


# --- data sets of pictures -----------------------------------------------------------------------

PICTURES = [picture(shade) for shade in (10, 20, 30)]


class Pictures(Dataset):
    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        torch.rand(1)  # as a random transform does
        return PICTURES[position], position


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return iter((image, label) for label, image in enumerate(PICTURES))


class Columns:
    """Like a data set of Hugging Face: rows are dictionaries, it is no ``torch`` data set."""

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, position: int) -> dict[str, object]:
        return {"id": None, "image": PICTURES[position], "label": position}


@pytest.mark.parametrize(
    ("data", "labelled"),
    [(Pictures(), True), (Stream(), True), (Columns(), True), (PICTURES, False), ([(p, -1) for p in PICTURES], False)],
    ids=["data set", "stream", "columns", "list", "list, unlabelled"],
)
def test_pictures_get_the_transform_in_their_own_order(data: object, labelled: bool, model: nn.Module) -> None:
    batch = read(open_data(data, model))
    assert shades(batch.images, model) == [10, 20, 30]
    assert (batch.labels is None) == (not labelled)
    if batch.labels is not None:
        assert batch.labels.tolist() == [0, 1, 2]


def test_a_data_set_with_other_classes_loses_its_labels(caplog: pytest.LogCaptureFixture) -> None:
    net = create("test_vit", pretrained=False, num_classes=5, img_size=SIDE)
    assert read(open_data(Pictures(), net)).labels is None
    assert "3 classes of data, 5 of the model" in caplog.text


def test_looking_at_the_first_item_leaves_the_random_state(model: nn.Module) -> None:
    before = torch.get_rng_state()
    open_data(Pictures(), model)
    assert torch.equal(torch.get_rng_state(), before)


IMAGES = torch.zeros(4, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        list(IMAGES),
        [],
        TensorDataset(IMAGES),
        DataLoader(TensorDataset(IMAGES)),
        (image for image in IMAGES),
        [Batch(IMAGES)],
        {"image": IMAGES},
        {},
        7,
        None,
    ],
    ids=lambda data: type(data).__name__,
)
@pytest.mark.parametrize("known", [True, False], ids=["timm", "other"])
def test_anything_else_is_returned_as_it_is(data: object, known: bool, model: nn.Module) -> None:
    assert open_data(data, model if known else nn.Linear(1, 1)) is data


def test_a_stream_of_tensors_stays_a_stream_of_tensors(model: nn.Module) -> None:
    class Tensors(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(IMAGES.split(3))

    assert [len(batch) for batch in iterate(open_data(Tensors(), model))] == [3, 1]


# --- named data sets -----------------------------------------------------------------------------


def test_a_named_data_set_of_torchvision(folder: Path, model: nn.Module) -> None:
    batch = read(open_data("torch/image_folder", model, root=folder))
    assert batch.labels is not None
    assert [(100, 20, 90)[label] for label in batch.labels] == shades(batch.images, model)
    assert batch.labels.tolist() != sorted(batch.labels.tolist())


def test_a_named_stream(folder: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def found(name: str, **arguments: object) -> Stream:
        asked.update(arguments, name=name)
        return Stream()

    monkeypatch.setattr(module, "create_dataset", found)
    assert len(read(open_data("wds/shards", model, root=folder, split="train"))) == 3
    assert asked == {"name": "wds/shards", "root": str(folder), "split": "train", "input_img_mode": "RGB"}


@pytest.mark.parametrize(
    ("name", "root"),
    [("torch/cifar10", "absent"), ("torch/cifar10", None), ("torch/nothing", "absent"), ("wds/none", "absent")],
)
def test_a_named_data_set_that_is_not_there(name: str, root: str | None, model: nn.Module, tmp_path: Path) -> None:
    place = None if root is None else tmp_path / root
    with pytest.raises(DataError, match=f"timm cannot open the data set '{name}'"):
        open_data(name, model, root=place)


def test_a_folder_goes_before_a_name(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "torch" / "mine" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(read(open_data("torch/mine", model))) == 1


def test_the_module_logs_and_does_not_print(folder: Path, model: nn.Module, capsys: pytest.CaptureFixture) -> None:
    logging.getLogger("jbrprune").setLevel(logging.NOTSET)
    read(open_data(folder, model))
    assert capsys.readouterr() == ("", "")
