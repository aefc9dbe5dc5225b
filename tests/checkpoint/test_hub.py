"""Model cards, folders of the hub's cache, ids of the hub; nothing is fetched here."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import timm
import torch
import yaml
from torch import nn

import jbrprune
from jbrprune.checkpoint import checkpoint
from jbrprune.errors import CheckpointError
from jbrprune.report.text import CARD, is_card, make_card

IMAGES = cases.images(24, 32).float()


@pytest.fixture(scope="module")
def result() -> jbrprune.PruneResult:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    labelled = torch.utils.data.TensorDataset(IMAGES, torch.arange(len(IMAGES)) % 4)
    return jbrprune.prune(model, labelled, macs=0.6, steps=1, progress=False)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_the_hub_and_a_reader_want(result: jbrprune.PruneResult, tmp_path: Path) -> None:
    result.save(tmp_path / "m", card=True)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(
        [CARD, "jbrprune.json", "model.safetensors"]
    )
    text = (tmp_path / "m" / CARD).read_text(encoding="utf-8")
    facts = front_matter(text)
    assert (facts["library_name"], facts["pipeline_tag"]) == ("jbrprune", "image-classification")
    assert facts["base_model"].startswith("timm/test_resnet")
    assert str(result.report) in text
    stored = jbrprune.Report.from_dict(checkpoint.describe(tmp_path / "m").report)
    assert stored.to_dict() == result.report.to_dict()
    assert is_card(text)


def test_a_card_is_replaced_and_a_readme_of_the_users_is_not(result: jbrprune.PruneResult, tmp_path: Path) -> None:
    target = tmp_path / "m"
    result.save(target, card=True)
    result.save(target, overwrite=True)
    assert not (target / CARD).exists()
    result.save(target, card=True, overwrite=True)
    (target / CARD).write_text("# mine")
    with pytest.raises(CheckpointError, match=r"holds other files, such as 'README.md'"):
        result.save(target, overwrite=True)
    assert (target / CARD).read_text() == "# mine"


def test_names_cannot_break_out_of_the_front_matter() -> None:
    base = 'net"\n---\nlicense: other'
    assert "license" not in front_matter(make_card({}, base))
    assert front_matter(make_card({}, None))["library_name"] == "jbrprune"


def snapshot(saved: Path, cache: Path) -> Path:
    """The folder as the hub's cache keeps it: links to blobs."""
    directory = cache / "models--user--net" / "snapshots" / "abc"
    blobs = directory.parent.parent / "blobs"
    directory.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(saved.iterdir()):
        path.rename(blobs / str(number))
        (directory / path.name).symlink_to(Path("../../blobs") / str(number))
    return directory


def assert_equal(model: nn.Module, result: jbrprune.PruneResult) -> None:
    with torch.no_grad():
        assert torch.equal(model(IMAGES), result.model(IMAGES))


def test_a_snapshot_is_loaded(result: jbrprune.PruneResult, tmp_path: Path) -> None:
    result.save(tmp_path / "m", card=True)
    assert_equal(jbrprune.load(snapshot(tmp_path / "m", tmp_path / "cache")), result)


@pytest.mark.parametrize(("suffix", "revision"), [("", None), ("@v1.0", "v1.0")])
def test_an_id_of_the_hub_is_loaded(
    suffix: str, revision: str | None, result: jbrprune.PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "m")
    directory = snapshot(tmp_path / "m", tmp_path / "cache")
    asked = {}

    def fetch(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, files=allow_patterns)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_equal(jbrprune.load(f"hf-hub:user/net{suffix}"), result)
    assert asked == {"repository": "user/net", "revision": revision, "files": ["model.safetensors", "jbrprune.json"]}


def test_what_cannot_be_fetched_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(CheckpointError, match=r"hf-hub:user/net cannot be fetched: no route to host"):
        jbrprune.load("hf-hub:user/net")
    for name in ("hf-hub:net", "hf-hub:../../etc/passwd", "hf-hub:a/b/c"):
        with pytest.raises(CheckpointError, match="cannot be fetched"):
            jbrprune.load(name)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files open
def test_timm_evaluates_a_loaded_model(result: jbrprune.PruneResult, tmp_path: Path) -> None:
    """As validate.py does: loader from the model's configuration, top-1 and top-5."""
    from PIL import Image
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.utils import accuracy

    result.save(tmp_path / "m")
    model = jbrprune.load(tmp_path / "m")
    for number, image in enumerate(IMAGES[:8]):
        folder = tmp_path / "val" / str(number % 4)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image.sigmoid()).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = resolve_data_config({}, model=model)
    assert config["input_size"][0] == 3
    names = ("input_size", "interpolation", "mean", "std", "crop_pct")
    loader = create_loader(
        create_dataset("", root=str(tmp_path / "val")), batch_size=4, use_prefetcher=False, num_workers=0,
        **{name: config[name] for name in names},
    )  # fmt: skip
    logits, labels = [], []
    with torch.no_grad():
        for images, targets in loader:
            logits.append(model(images))
            labels.append(targets)
    top1, top4 = accuracy(torch.cat(logits), torch.cat(labels), topk=(1, 4))
    expected = (torch.cat(logits).argmax(1) == torch.cat(labels)).double().mean()
    assert float(top1) == pytest.approx(100 * float(expected))
    assert float(top4) == 100
