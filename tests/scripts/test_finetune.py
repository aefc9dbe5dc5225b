"""Fine-tuning and export of pruned models, from the command line to the lines and files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import common
import finetune
import pytest
import sources
import torch

import jbrprune
from jbrprune.demo import digits, train_digits
from jbrprune.errors import ModelError

SETUP = ["--model", "test_resnet", "--weights", "trained", "--data", "digits", "--threads", "1", "--eval-images", "300"]
TRAINING = ["--epochs", "2", "--batch-size", "64", "--lr", "0.02"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two criteria, one of them with labels, pruned without repair to a fifth of the MACs, fine-tuned both ways."""
    work = tmp_path_factory.mktemp("finetune")
    threads = torch.get_num_threads()
    finetune.main(_arguments(work))
    torch.set_num_threads(threads)
    return work


def _arguments(work: Path, *more: str) -> list[str]:
    pruning = ["--criterion", "l1", "taylor", "--macs", "0.2", "--images", "64", "--repair", "none"]
    places = ["--work", str(work / "runs"), "--out", str(work / "lines.jsonl")]
    return [*SETUP, *pruning, "--how", "plain", "distil", *TRAINING, *places, *more]


def test_training_brings_back_what_pruning_took(done: Path) -> None:
    lines = common.lines(done / "lines.jsonl")
    assert [(line["criterion"], line["how"]) for line in lines] == [
        *(("l1", "plain"), ("l1", "distil"), ("taylor", "plain"), ("taylor", "distil")),
    ]
    assert len({line["key"] for line in lines}) == 4
    for line in lines:
        assert line["macs"] <= 0.2 * line["dense_macs"]
        assert line["accuracy_before"] < 0.7 < line["accuracy"] <= 1
        assert len(line["history"]) == 2
        assert {"versions", "hardware", "commit", "command", "params", "kl", "budget"} <= line.keys()
    assert lines[0]["accuracy_before"] == lines[1]["accuracy_before"]
    assert "temperature" in lines[1]
    assert "smoothing" in lines[0]


def test_the_model_that_is_saved_is_the_one_that_was_measured(done: Path) -> None:
    line = common.lines(done / "lines.jsonl")[1]
    model = jbrprune.load(done / "runs" / line["saved"])
    images, labels = digits()[2:]
    with torch.no_grad():
        right = (model(images[:300]).argmax(1) == labels[:300]).double().mean().item()
    assert line["accuracy"] == pytest.approx(right)


def test_nothing_is_made_twice(done: Path) -> None:
    before = (done / "lines.jsonl").read_bytes()
    finetune.main(_arguments(done))
    assert (done / "lines.jsonl").read_bytes() == before


def test_saved_models_are_taken(done: Path, tmp_path: Path) -> None:
    (pruned,) = (done / "runs").glob("l1-*")
    out = tmp_path / "lines.jsonl"
    arguments = [*SETUP, "--pruned", str(pruned), *TRAINING, "--work", str(tmp_path / "w"), "--out", str(out)]
    finetune.main(arguments)
    (line,) = common.lines(out)
    same = common.lines(done / "lines.jsonl")[0]
    assert {name: line[name] for name in ("key", "accuracy", "history", "criterion")} == {
        name: same[name] for name in ("key", "accuracy", "history", "criterion")
    }  # whoever pruned it, and whenever
    assert line["budget"]["macs"] == pytest.approx(0.2)


def test_zeros_that_training_would_fill_are_refused(tmp_path: Path) -> None:
    images = digits()[0][:64]
    how = {"sparsity": 0.5, "repair": None, "progress": False}
    jbrprune.sparsify(train_digits(name="test_resnet", epochs=1), images, **how).save(tmp_path / "sparse")  # type: ignore[arg-type]
    places = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "l")]
    with pytest.raises(SystemExit, match="1 failed"):
        finetune.main([*SETUP, "--pruned", str(tmp_path / "sparse"), *TRAINING, *places])
    (line,) = common.lines(tmp_path / "l")
    assert "training would fill them" in line["failed"]


def test_what_fails_does_not_stop_the_others(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A criterion that cannot rank, then a loss that is NaN; the next call makes what is missing, and nothing twice."""
    work = tmp_path / "work"
    shutil.copytree(next((done / "runs").glob("l1-*")), work / "runs" / next((done / "runs").glob("l1-*")).name)
    real = finetune.make_loss

    def nan(args: object, how: str, teacher: torch.nn.Module) -> Callable:
        return (lambda logits, *_: logits.sum() * torch.nan) if how == "plain" else real(args, how, teacher)

    def cannot(*_: object, **__: object) -> None:
        raise ModelError("it cannot rank this")

    monkeypatch.setattr(finetune, "make_loss", nan)
    monkeypatch.setitem(finetune.CRITERIA, "taylor", cannot)
    with pytest.raises(SystemExit, match="3 failed") as stopped:
        finetune.main(_arguments(work))
    assert isinstance(stopped.value.code, str)  # Python's exit code 1
    found = [
        (line["criterion"], line["how"], line.get("failed", "")[:27]) for line in common.lines(work / "lines.jsonl")
    ]
    assert found == [
        *(("l1", "plain", "NonFiniteError: The loss is"), ("l1", "distil", "")),
        *(("taylor", how, "ModelError: it cannot rank ") for how in ("plain", "distil")),
    ]
    assert capsys.readouterr().err.count("it cannot rank this") == 2
    monkeypatch.undo()
    finetune.main([*_arguments(work), "--criterion", "l1"])
    lines = common.lines(work / "lines.jsonl")
    assert [(line["criterion"], line["how"]) for line in lines[4:]] == [("l1", "plain")]
    assert lines[4]["key"] == lines[0]["key"]
    assert lines[4]["accuracy"] == common.lines(done / "lines.jsonl")[0]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "1298"], "digits has 1297 images for calibration"),
        (["--macs", "1.5"], "macs must satisfy"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--device", "nonsense"], "--device 'nonsense' cannot be used"),
        (["--weights", "random", "--data", "photographs"], "'photographs' have no labels, which training needs"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_is_made(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CROPS", 8)
    monkeypatch.setattr(finetune, "make", lambda *_: pytest.fail("it pruned"))
    with pytest.raises(SystemExit, match=words):
        finetune.main(_arguments(tmp_path, *arguments))
    assert not (tmp_path / "lines.jsonl").exists()


def test_an_impossible_training_is_not_recorded_for_each_model(done: Path, tmp_path: Path) -> None:
    (pruned,) = (done / "runs").glob("l1-*")
    places = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "l")]
    with pytest.raises(SystemExit, match="timm cannot make optimiser 'sgdd'"):
        finetune.main([*SETUP, "--pruned", str(pruned), *TRAINING, "--opt", "sgdd", *places])
    assert common.lines(tmp_path / "l") == []


def test_a_file_of_other_lines_is_not_added_to(done: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"model": "a"}\n')
    with pytest.raises(SystemExit, match="line 1 is of another script"):
        finetune.main(_arguments(tmp_path))
    assert (tmp_path / "lines.jsonl").read_text() == '{"model": "a"}\n'
