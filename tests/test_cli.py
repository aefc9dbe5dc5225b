"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import jbrprune
from jbrprune import cli
from jbrprune.commands.options import model_arguments
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, JBRError
from jbrprune.report.records import Report

COMMANDS = ("prune", "score", "eval", "info", "tpv", "demo")
ARGUMENTS = {"num_classes": 4, "img_size": 32, "depth": 2}
NET = ["test_vit", *(word for key, value in ARGUMENTS.items() for word in ("--model-arg", f"{key}={value}"))]
RANDOM = [*NET, "--no-pretrained"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in four class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        (folder / "abcd"[number % 4]).mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (24, 20, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "abcd"[number % 4] / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(timm.create_model("test_vit", **ARGUMENTS).state_dict(), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `main` as the shell would: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jbrprune", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expensive part is not to be reached."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("scored before the arguments were checked")

    monkeypatch.setattr("jbrprune.criteria.relevance.Relevance.__call__", reached)
    monkeypatch.setattr("jbrprune.pruning.weights.weight_scores", reached)
    monkeypatch.setattr("jbrprune.pruning.scoring.weight_scores", reached)


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"Example: jbrprune {command}" in result.output


def test_help_of_the_whole_names_the_commands_and_the_exit_codes() -> None:
    result = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    for word in (*COMMANDS, "0 done", "2 wrong arguments", "jbrprune prune MODEL --data FOLDER --macs 0.5 --out DIR"):
        assert word in result.output


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "prune",
            ["--data", "--macs", "--params", "--channels", "--out", "--ignore", "--steps", "--repair", "--round-to"],
        ),
        (
            "prune",
            ["--min-channels", "--eval-data", "--model-arg", "--no-pretrained", "--checkpoint", "--json", "--seed"],
        ),
        (
            "prune",
            ["--sparsity", "--structure", "--scope", "--remainder", "--shrink", "--keep-masks"],
        ),
        (
            "score",
            [
                "--granularity",
                "--data",
                "--out",
                "--objective",
                "--site",
                "--statistic",
                "--model-arg",
                "--no-pretrained",
                "--json",
            ],
        ),
        ("eval", ["--data", "--reference", "--images", "--model-arg", "--no-pretrained", "--json"]),
        ("info", ["--ignore", "--width", "--min-channels", "--model-arg", "--json"]),
        ("demo", ["--out", "--seed"]),
    ],
)
def test_options_have_these_names(command: str, options: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    for option in options:
        assert f"{option} " in result.output, option


# --- what the commands do ------------------------------------------------------------------------


def test_prune_eval_and_load(run: Run, pictures: Path, weights: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "pruned", tmp_path / "plot.png"
    common = [*NET, "--checkpoint", weights]
    budget = ["--data", pictures, "--macs", 0.85, "--steps", 1, "--ignore", "blocks.0.attn", "--ignore", "blocks.1.m*"]
    code, text, _ = run("prune", *common, *budget, "--out", out, "--plot", plot)
    assert code == 0
    assert "MACs" in text
    assert text.endswith(f"Saved to {out}\n")
    assert plot.stat().st_size > 1000
    assert jbrprune.load(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)

    page = tmp_path / "report.html"
    code, text, err = run("prune", *common, *budget, "--json", "--report", page)
    assert (code, err) == (0, "")
    for drawn in ("predicted, without repair", "predicted, with repair", "measured, after repair", "<h2>Widths</h2>"):
        assert drawn in page.read_text(encoding="utf-8")
    report = Report.from_dict(json.loads(text))
    assert report.kept <= 0.85
    assert report.settings["ignore"] == ["blocks.0.attn", "blocks.1.m*"]
    assert report.final is not None
    assert report.final.accuracy is not None

    code, text, err = run("eval", out, "--data", pictures, "--reference", "test_vit", *common[1:], "--json")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert facts["macs"] == report.pruned.macs
    assert facts["params"] == report.pruned.params
    assert facts["images"] == 12
    assert 0 <= facts["accuracy"] <= 1
    assert facts["kl"] > 0
    assert facts["reference"] == "test_vit"

    code, text, _ = run("eval", out, "--data", pictures, "--images", 5)
    assert code == 0
    assert "accuracy" in text
    assert "kl" not in text
    assert "latency_ms" in text


def test_a_model_agrees_with_itself(run: Run, pictures: Path, weights: Path) -> None:
    named = [*NET, "--checkpoint", weights]
    code, text, _ = run("eval", *named, "--data", pictures, "--reference", "test_vit", "--json")
    assert code == 0
    assert json.loads(text)["top1_agreement"] == 1


def test_eval_of_random_weights(run: Run, pictures: Path) -> None:
    code, text, _ = run("eval", *RANDOM, "--data", pictures, "--json")
    assert code == 0
    model = timm.create_model("test_vit", **ARGUMENTS)
    assert json.loads(text)["params"] == sum(p.numel() for p in model.parameters())


def test_score(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    options = ["--data", pictures, "--objective", "margin", "--site", "all"]
    code, text, err = run("score", *RANDOM, *options, "--out", path)
    assert (code, err) == (0, "")
    assert "test_vit: scores of 12 images, margin, all" in text
    scores = Scores.load(path)
    assert (scores.samples, scores.settings.objective, scores.settings.site) == (12, "margin", "all")

    code, text, err = run("score", *RANDOM, *options, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert facts["samples"] == 12
    assert {row["group"]: row["units"] for row in facts["groups"]} == {g.name: g.size for g in scores.groups}


def zeros(model: torch.nn.Module) -> list[int]:
    """Of every layer that is pruned, in order."""
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    return [int((layer.weight == 0).sum()) for layer in layers]


@pytest.mark.parametrize("options", [[], ["--keep-masks"], ["--scope", "layer", "--floor", 0]])
def test_prune_single_weights(options: list[object], run: Run, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    asked = ["--data", pictures, "--sparsity", 0.8, "--repair", "none", "--out", out, "--json", *options]
    code, text, err = run("prune", *RANDOM, *asked)
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert facts["budget"] == {"sparsity": 0.8}
    sizes = [row["before"] for row in facts["layers"]]
    assert sum(row["before"] - row["after"] for row in facts["layers"]) == pytest.approx(0.8 * sum(sizes), abs=5)
    model = jbrprune.load(out).eval()
    assert torch.nn.utils.prune.is_pruned(model) == ("--keep-masks" in options)
    assert zeros(model) == [row["before"] - row["after"] for row in facts["layers"]]
    if "layer" in options:
        assert zeros(model) == [round(0.8 * size) for size in sizes]
        assert facts["settings"]["floor"] == 0


def test_prune_a_pattern_and_shrink(run: Run, pictures: Path, tmp_path: Path) -> None:
    pattern = ["--data", pictures, "--structure", "2:4", "--objective", "margin", "--steps", 2]
    code, text, err = run("prune", *RANDOM, *pattern, "--remainder", "pad", "--plot", tmp_path / "plot.png")
    assert (code, err) == (0, "")
    assert "weights are zero" in text
    assert "structure=2:4" in text
    assert "remainder=pad" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000
    code, text, _ = run("prune", *RANDOM, "--data", pictures, "--sparsity", 0.5, "--shrink", "--repair", "none")
    assert code == 0
    assert "channels that contributed nothing were removed from" in text


def test_options_of_single_weights_reach_prune(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stopped(*_: object, **options: object) -> None:
        asked.update(options)
        raise ArgumentError("stop")

    monkeypatch.setattr("jbrprune.commands.prune.prune", stopped)
    given = ["--shrink", "--keep-masks"]
    assert run("prune", *RANDOM, "--data", pictures, "--sparsity", 0.5, *given)[0] == 2
    assert (asked["shrink"], asked["permanent"]) == (True, False)
    assert run("prune", *RANDOM, "--data", pictures, "--macs", 0.5)[0] == 2
    said = {"shrink", "permanent", "scope", "remainder", "structure", "sparsity", "floor", "width"}
    assert not [name for name in said if asked[name] is not None]  # an option that is not given has no meaning


def test_score_single_weights(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    options = ["--data", pictures, "--granularity", "weight"]
    code, text, err = run("score", *RANDOM, *options, "--statistic", "signed", "--out", path)
    assert (code, err) == (0, "")
    assert "test_vit: scores of 12 images, projection, weight" in text
    scores = WeightScores.load(path)
    assert (scores.samples, scores.settings.statistic) == (12, "signed")
    code, text, _ = run("score", *RANDOM, *options, "--json")
    assert code == 0
    assert {row["group"]: row["units"] for row in json.loads(text)["groups"]} == {
        name: total.numel() for name, total in scores.sums.items()
    }


def test_info(run: Run) -> None:
    code, text, err = run("info", *NET)
    assert (code, err) == (0, "")
    assert "test_vit: " in text
    assert "It can go down to" in text
    assert "head: the classifier" in text
    code, text, _ = run("info", *NET, "--ignore", "*.mlp", "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["input_size"] == [3, 32, 32]
    assert [row["group"] for row in facts["rows"]] == ["blocks.0.attn", "blocks.1.attn"]
    assert facts["kept"]["blocks.0.mlp.fc1"] == "ignored on request"
    assert 0 < facts["least_macs"] < 1


def test_the_demo_is_called(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []
    monkeypatch.setattr("jbrprune.demo.run_demo", lambda out, seed, say: (called.append((out, seed)), say("here")))
    assert run("demo", "--out", tmp_path, "--seed", 3) == (0, "here\n", "")
    assert called == [(tmp_path, 3)]


def test_a_command_in_a_process_of_its_own(pictures: Path, tmp_path: Path) -> None:
    """Standard output holds the JSON and nothing else; the model is there."""
    command = [sys.executable, "-c", "from jbrprune.cli import main; main()", "prune", *RANDOM]
    options = ["--data", str(pictures), "--params", "0.9", "--steps", "1", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["budget"] == {"params": 0.9}
    assert facts["out"] == str(tmp_path / "out")
    assert "Traceback" not in done.stderr
    jbrprune.load(tmp_path / "out")


def test_an_interrupt_ends_with_130(run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jbrprune.pruning.loop._step", interrupted)
    out = ["--data", pictures, "--macs", 0.5, "--out", tmp_path / "out"]
    assert run("prune", *RANDOM, *out)[0] == 130
    assert not (tmp_path / "out").exists()


def environment() -> dict[str, str]:
    root = str(Path(jbrprune.__file__).parents[1])
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }


# --- how they fail -------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], int, str]] = {
    "no command": (["pruen"], 2, "No such command 'pruen'"),
    "no data": (["prune", *RANDOM, "--macs", "0.5"], 2, "Missing option '--data'"),
    "no budget": (["prune", *RANDOM, "--data", "{data}"], 2, "exactly one budget"),
    "two budgets": (
        ["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--params", "0.5"],
        2,
        "macs=0.5 and params=0.5",
    ),
    "a budget of 1": (["prune", *RANDOM, "--data", "{data}", "--macs", "1"], 2, "0 < macs < 1"),
    "half": (["prune", *RANDOM, "--data", "{data}", "--macs", "half"], 2, "Invalid value for '--macs'"),
    "out of reach": (["prune", *RANDOM, "--data", "{data}", "--macs", "0.0001"], 2, "with every group at its floor"),
    "unknown model": (["prune", "resnet5O", "--data", "{data}", "--macs", "0.5"], 2, "Nearest names: .*resnet50"),
    "unknown objective": (["score", *RANDOM, "--data", "{data}", "--objective", "label2"], 2, "pseudo_label"),
    "no such folder": (["prune", *RANDOM, "--data", "{tmp}/none", "--macs", "0.5"], 1, "There is no folder"),
    "an empty folder": (["score", *RANDOM, "--data", "{tmp}"], 1, "No images in"),
    "not a key": (["info", "test_vit", "--model-arg", "classes"], 2, "--model-arg must be key=value, got 'classes'"),
    "unknown key": (["info", "test_vit", "--model-arg", "clases=3"], 2, "timm cannot make 'test_vit' with clases=3"),
    "an option as key": (
        ["prune", *RANDOM, "--model-arg", "macs=0.5", "--data", "{data}"],
        2,
        "macs=0.5 is not an argument",
    ),
    "twice": (
        ["score", *RANDOM, "--model-arg", "pretrained=true", "--data", "{data}"],
        2,
        "pretrained=true is not an arg",
    ),
    "no checkpoint": (
        ["prune", *NET, "--checkpoint", "{tmp}/w.pth", "--data", "{data}", "--macs", ".5"],
        1,
        "no checkpoint file",
    ),
    "a pickle": (["score", *NET, "--checkpoint", "{pickle}", "--data", "{data}"], 1, "It was not executed"),
    "out is a file": (
        ["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--out", "{pickle}"],
        1,
        "is a file|not a directory",
    ),
    "out exists": (["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--out", "{data}"], 1, "exists"),
    "scores to a directory": (["score", *RANDOM, "--data", "{data}", "--out", "{tmp}"], 1, "cannot be written"),
    "scores nowhere": (
        ["score", *RANDOM, "--data", "{data}", "--out", "{tmp}/no/s.safetensors"],
        1,
        "cannot be written",
    ),
    "plot nowhere": (
        ["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--plot", "{tmp}/no/p.png"],
        1,
        "cannot be written",
    ),
    "no images": (
        ["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--images", "0"],
        2,
        "images must be at least 1",
    ),
    "no batch": (["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--batch-size", "0"], 2, "batch_size must be"),
    "no device": (["score", *RANDOM, "--data", "{data}", "--device", "gpu"], 2, "--device 'gpu' cannot be used"),
    "no saved model": (["eval", "{tmp}", "--data", "{data}"], 1, "jbrprune.json"),
    "sparsity of everything": (
        ["prune", *RANDOM, "--data", "{data}", "--sparsity", "1"],
        2,
        r"0 < sparsity < 1 \(the share of weights to set to zero\), got 1.0",
    ),
    "no pattern": (["prune", *RANDOM, "--data", "{data}", "--structure", "4:2"], 2, "such as '2:4', got '4:2'"),
    "pattern and sparsity": (
        ["prune", *RANDOM, "--data", "{data}", "--structure", "2:4", "--sparsity", "0.5"],
        2,
        "no budget has a meaning beside it; got sparsity=",
    ),
    "shrink channels": (
        ["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--shrink"],
        2,
        "shrink= has no meaning for channels",
    ),
    "masks of channels": (
        ["prune", *RANDOM, "--data", "{data}", "--macs", "0.5", "--keep-masks"],
        2,
        "permanent= has no meaning for channels",
    ),
    "width of weights": (
        ["prune", *RANDOM, "--data", "{data}", "--sparsity", "0.5", "--width"],
        2,
        "width= has no meaning for single weights",
    ),
    "scope": (
        ["prune", *RANDOM, "--data", "{data}", "--sparsity", "0.5", "--scope", "net"],
        2,
        "Invalid value for '--scope'",
    ),
    "granularity": (
        ["score", *RANDOM, "--data", "{data}", "--granularity", "bit"],
        2,
        "Invalid value for '--granularity'",
    ),
    "site of weights": (
        ["score", *RANDOM, "--data", "{data}", "--granularity", "weight", "--site", "all"],
        2,
        "site= has no meaning for single weights",
    ),
    "no such glob": (["info", *NET, "--ignore", "nowhere"], 2, "nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("no_scoring")
def test_wrong_input_is_one_sentence_and_an_exit_code(case: str, run: Run, pictures: Path, tmp_path: Path) -> None:
    arguments, code, message = WRONG[case]
    loaded = tmp_path / "evil.pth"
    (tmp_path / "empty").mkdir()
    with loaded.open("wb") as file:
        pickle.dump(Evil(tmp_path / "executed"), file, protocol=2)
    places = {"data": str(pictures), "tmp": str(tmp_path / "empty"), "pickle": str(loaded)}
    got, out, err = run(*(a.format(**places) for a in arguments))
    assert got == code, err
    assert out == ""
    assert re.search(message, " ".join(err.replace("│", " ").split())), err
    assert not (tmp_path / "executed").exists()


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.usefixtures("no_scoring")
def test_a_directory_that_cannot_be_written_is_refused_first(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the permission: the owner of this process may be allowed everything."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    out = ["--data", pictures, "--macs", 0.5, "--out", tmp_path / "new"]
    code, _, err = run("prune", *RANDOM, *out)
    assert code == 1
    assert "Choose another path" in " ".join(err.split())
    code, _, err = run("score", *RANDOM, "--data", pictures, "--out", tmp_path / "scores.safetensors")
    assert code == 1
    assert "cannot be written" in " ".join(err.split())


def test_out_is_checked_before_the_model_is_made(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "jbrprune.checkpoint.checkpoint.check_target", lambda path, *, overwrite: asked.append((path, overwrite))
    )
    monkeypatch.setattr(
        "jbrprune.commands.prune.prune",
        lambda *_, **__: (_ for _ in ()).throw(ArgumentError(f"asked {len(asked)} times")),
    )
    code, _, err = run("prune", *RANDOM, "--data", pictures, "--macs", 0.5, "--out", tmp_path, "--overwrite")
    assert (code, asked) == (2, [(tmp_path, True)])
    assert "asked 1 times" in err


@pytest.mark.parametrize(
    ("error", "code"), [(ArgumentError("a"), 2), (JBRError("b"), 1), (ImportError("c"), 1), (OSError("d"), 1)]
)
def test_exit_codes(error: Exception, code: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("jbrprune.models.timm_models.create", failing)
    assert run("info", "test_vit") == (code, "", f"jbrprune: {error}\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("num_classes=10", 10),
        ("img_size=[32, 48]", [32, 48]),
        ("global_pool=avg", "avg"),
        ("drop_rate=0.1", 0.1),
        ("a=", ""),
    ],
)
def test_values_of_model_arguments_are_read_as_json_where_they_are(text: str, value: object) -> None:
    assert model_arguments([text]) == {text.partition("=")[0]: value}
