"""Training of reference models: the same weights after an interruption, data that are what they should be."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_reference
from PIL import Image
from safetensors.torch import load_file
from sources import fashion_mnist
from torch import Tensor, nn
from torch.nn import functional as F
from train_reference import Recipe

from jbrprune.demo import digits
from jbrprune.errors import ArgumentError, CheckpointError, DataError, NonFiniteError
from jbrprune.models import timm_models

TINY = ["--model", "test_resnet", "--data", "digits", "--batch-size", "64", "--threads", "1"]


class Killed(Exception):
    """In the place of a signal."""


def _net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def _few(count: int = 24) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 8, 8, generator=generator), number % 3) for number in range(count)]


def _train(net: nn.Module, recipe: Recipe, path: Path) -> list[dict[str, float]]:
    return train_reference.train(net, _few(), recipe, train_reference.cross_entropy(), path, {"net": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_an_interruption_changes_nothing(
    opt: str, autocast: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(line: str, **_: object) -> None:
        if line.startswith("epoch 2/"):
            raise Killed

    recipe = Recipe(epochs=4, batch_size=5, opt=opt, lr=0.01, autocast=autocast)
    whole, parted, resumed = _net(), _net(), _net()
    one = _train(whole, recipe, tmp_path / "whole")
    monkeypatch.setattr(train_reference, "print", say, raising=False)
    with pytest.raises(Killed):
        _train(parted, recipe, tmp_path / "parted")
    monkeypatch.undo()
    torch.rand(7)  # another process has drawn other numbers
    other = _train(resumed, recipe, tmp_path / "parted")
    assert one == other
    assert len(one) == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not torch.equal(whole[1].weight, parted[1].weight)  # it was really interrupted


def test_a_step_by_hand(tmp_path: Path) -> None:
    """Two updates of Nesterov's momentum with weight decay on the weights alone, against the formula."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    data = [(image.double(), label) for image, label in _few(8)]
    weight, bias = (p.detach().clone().requires_grad_() for p in net.parameters())
    recipe = Recipe(
        epochs=2, batch_size=8, lr=0.1, weight_decay=0.01, momentum=0.5, warmup_epochs=0, channels_last=False
    )
    history = train_reference.train(net, data, recipe, train_reference.cross_entropy(), tmp_path / "c", {})  # type: ignore[arg-type]
    images, labels = torch.stack([image for image, _ in data]).flatten(1), torch.tensor([label for _, label in data])
    moments, losses = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for rate in (0.1, 0.1 * 0.5):  # cosine over two updates: (1 + cos(pi n / 2)) / 2
        loss = F.cross_entropy((images @ weight.T + bias).float(), labels)
        gradients = list(torch.autograd.grad(loss, [weight, bias]))
        losses.append(loss.item())
        with torch.no_grad():
            gradients[0] += 0.01 * weight  # timm does not decay biases
            for place, tensor in enumerate((weight, bias)):
                moments[place] = gradients[place] if rate == 0.1 else 0.5 * moments[place] + gradients[place]
                tensor -= rate * (gradients[place] + 0.5 * moments[place])
    assert [epoch["loss"] for epoch in history] == pytest.approx(losses)
    assert torch.allclose(net[1].weight, weight, atol=1e-7)
    assert torch.allclose(net[1].bias, bias, atol=1e-7)


def test_distillation_by_hand() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    logits = torch.randn(4, 3)
    found = train_reference.distillation(teacher, weight=0.25, temperature=2.0)(logits, images, labels)
    p, q = (teacher(images) / 2).softmax(1), (logits / 2).softmax(1)
    by_hand = sum((p[i, k] * (p[i, k] / q[i, k]).log()).item() for i in range(4) for k in range(3)) / 4 * 4
    right = -sum(logits.softmax(1)[i, labels[i]].log().item() for i in range(4)) / 4
    assert found.item() == pytest.approx(0.75 * right + 0.25 * by_hand, rel=1e-5)


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    good = Recipe(epochs=1, batch_size=8)
    for change, words in (
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 25}, "24 training images, fewer than one batch of 25"),
        ({"opt": "sgdd"}, "optimiser 'sgdd'"),
        ({"sched": "none"}, "schedule 'none'"),
        ({"sched": "cosin"}, "schedule 'cosin'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            _train(_net(), replace(good, **change), tmp_path / "c")
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        _train(_net(), replace(good, epochs=9, lr=1e20), tmp_path / "c")


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "c"
    _train(_net(), Recipe(epochs=1, batch_size=8), path)
    with pytest.raises(CheckpointError, match="another training: recipe differ"):
        _train(_net(), Recipe(epochs=2, batch_size=8), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        _train(_net(), Recipe(epochs=1, batch_size=8), path)


def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "net.safetensors"
    train_reference.main([*TINY, "--epochs", "2", "--lr", "0.1", "--out", str(out)])
    facts = json.loads(out.with_suffix(".json").read_text())
    images, labels = digits()[2:]
    model = timm_models.create("test_resnet", checkpoint=out, **facts["model_args"]).eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean().item()
    assert facts["accuracy"] == pytest.approx(right)
    assert right > 0.5
    assert facts["data"] == "digits"
    assert len(facts["history"]) == 2
    assert "epoch 2/2" in capsys.readouterr().out
    before = load_file(out)
    train_reference.main([*TINY, "--epochs", "2", "--lr", "0.1", "--out", str(out)])  # nothing is trained again
    assert "epoch" not in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(out).items())
    with pytest.raises(SystemExit, match="another training"):
        train_reference.main([*TINY, "--epochs", "2", "--lr", "0.2", "--out", str(out)])


# --- images ----------------------------------------------------------------------------------------


def idx_files(folder: Path, *, zipped: bool = False) -> None:
    """Small files of the form of Fashion-MNIST's."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        images, labels = generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = (
                np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes() + values.astype(np.uint8).tobytes()
            )
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
def test_stored_tensors_are_augmented_as_pictures(zipped: bool, tmp_path: Path) -> None:
    idx_files(tmp_path / "FashionMNIST" / "raw", zipped=zipped)  # torchvision's layout
    net = timm_models.create("test_resnet", pretrained=False, in_chans=1, num_classes=10)
    how = train_reference.Augmentation(padding=1, hflip=0.0)
    data = train_reference.open_training("fashion_mnist", str(tmp_path), net, how)
    assert len(data) == 30
    exact, labels = fashion_mnist(tmp_path, train=True)
    torch.manual_seed(0)
    for number in range(30):
        image, label = data[number]
        assert label == labels[number]
        shifted = [
            F.pad(exact[number], (1, 1, 1, 1), value=-0.2860 / 0.3530)[:, y : y + 32, x : x + 32]
            for y in range(3)
            for x in range(3)
        ]
        assert min(float((image - one).abs().max()) for one in shifted) < 1e-5  # one of nine shifts, exactly


def test_pictures_in_folders_are_augmented_by_timm(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (40, 48), (90, 90, 90)).save(tmp_path / part / label / "a.png")
    net = timm_models.create("test_resnet", pretrained=False, num_classes=2)
    how = train_reference.Augmentation(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, color_jitter=0.2)
    data = train_reference.open_training(str(tmp_path), None, net, how)
    assert len(data) == 2
    assert sorted(label for _, label in (data[0], data[1])) == [0, 1]
    assert data[0][0].shape == (3, 160, 160)
    with pytest.raises(DataError, match="nothing could be measured that was not trained on"):
        train_reference.open_training(str(tmp_path / "train"), None, net, how)
    for part in ("train", "val"):
        (tmp_path / "flat" / part).mkdir(parents=True)
        Image.new("RGB", (40, 48), (90, 90, 90)).save(tmp_path / "flat" / part / "a.png")
    unlabelled = train_reference.open_training(str(tmp_path / "flat"), None, net, how)
    with pytest.raises(DataError, match="training needs labels"):
        unlabelled[0]
