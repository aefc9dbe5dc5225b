"""Fine-tuning and export of pruned models, from the command line to the lines and files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import common
import export
import finetune

import jbrprune
from jbrprune.demo_data import digits, train_digits
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
        assert line["accuracy_before"] < 0.8 < line["accuracy"] <= 1
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
    how = {"sparsity": 0.5, "repair": None, "progress": False, "measure_latency": False}
    jbrprune.prune(train_digits(name="test_resnet", epochs=1), images, **how).save(tmp_path / "sparse")  # type: ignore[arg-type]
    places = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "l")]
    with pytest.raises(SystemExit, match="training would fill them"):
        finetune.main([*SETUP, "--pruned", str(tmp_path / "sparse"), *TRAINING, *places])


# --- export ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_exports_give_the_outputs_of_the_model(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    saved = next((done / "runs").glob("taylor-*"))
    onnx, program = tmp_path / "a.onnx", tmp_path / "a.pt2"
    export.main([str(saved), "--onnx", str(onnx), "--program", str(program), "--size", "1", "32", "32"])
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in printed if line.startswith("{")]
    assert [line["file"] for line in lines] == [str(onnx), str(program)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.pt2"]
    images = digits()[2][:11]  # neither traced nor verified with so many
    with torch.no_grad():
        wanted = jbrprune.load(saved)(images)
        found = torch.export.load(program).module()(images)
    assert torch.allclose(found, wanted, atol=1e-4)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(["logits"], {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(outputs), wanted, atol=1e-4)
    assert all(0 <= line["largest_difference"] < 1e-4 for line in lines)
    assert onnx.stat().st_size == lines[0]["bytes"]


def test_an_export_that_is_wrong_leaves_nothing(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()

    def wrong(model: torch.nn.Module, example: torch.Tensor, path: Path):
        path.write_text("x")
        return lambda images: model(images) + 1e-2

    def misshapen(model: torch.nn.Module, example: torch.Tensor, path: Path):
        return lambda images: model(images[:2])  # as if the batch size were fixed

    def broken(model: torch.nn.Module, example: torch.Tensor, path: Path):
        raise KeyError("aten.what")

    for write, words in ((wrong, "outputs differ by"), (misshapen, "gave outputs of shape"), (broken, "KeyError")):
        with pytest.raises(ModelError, match=words):
            export.exported(net, (1, 2, 2), tmp_path / "a.onnx", write, 1e-4)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write(done: Path) -> None:
    with pytest.raises(SystemExit, match="Say what to write"):
        export.main([str(next((done / "runs").glob("l1-*")))])
    with pytest.raises(SystemExit, match=r"export\.py: .*missing"):
        export.main(["missing", "--onnx", "a.onnx"])
