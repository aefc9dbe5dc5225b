"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import jbrprune
from jbrprune import cli
from jbrprune.budgets.budget import Floors
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, JBRError
from jbrprune.pruning.options import ChannelOptions, ScoreOptions, WeightOptions
from jbrprune.report.records import Report

COMMANDS = ("prune", "sparsify", "predict", "score", "eval", "info", "export", "demo")
ARGUMENTS = {"num_classes": 4, "img_size": 32, "depth": 2}
NET = ["test_vit", *(word for key, value in ARGUMENTS.items() for word in ("--model-arg", f"{key}={value}"))]
RANDOM = [*NET, "--random"]
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

    monkeypatch.setattr(Relevance, "__call__", reached)
    for place in ("jbrprune.pruning.weights.weight_scores", "jbrprune.pruning.api.weight_scores"):
        monkeypatch.setattr(place, reached)


# --- options and help ----------------------------------------------------------------------------


def flags(table: type) -> Iterator[tuple[str, str]]:
    """Flag and first words of the help of every option that a table asks for."""
    special = {(Floors, "share"): "floor", (Floors, "channels"): "min_channels"}
    for item in fields(table):
        if item.metadata["panel"] is None:
            continue
        if is_dataclass(item.default):
            yield from flags(type(item.default))
        else:
            name = special.get((table, item.name), item.name).replace("_", "-")
            yield f"--no-{name}" if item.default is True else f"--{name}", item.metadata["help"]
        if item.name == "criterion":
            yield from flags(Relevance)


TABLES: dict[str, tuple[type, ...]] = {
    "prune": (ChannelOptions, cli.Source, cli.Output),
    "sparsify": (WeightOptions, cli.Source, cli.Output),
    "score": (ScoreOptions, cli.Source, cli.Writing),
    "predict": (cli.Shares, cli.Predicting, cli.Source, cli.Writing),
    "eval": (cli.Comparing, cli.Source, cli.Printing),
    "info": (cli.Listing, cli.ModelSource, cli.Printing),
}


@pytest.mark.parametrize("command", TABLES)
def test_every_field_of_a_table_is_an_option_and_every_option_is_a_field(command: str) -> None:
    wanted = [flag for table in TABLES[command] for flag, _ in flags(table)]
    assert len(wanted) == len(set(wanted))
    found = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    given = {flag for each in found for flag in (*each.opts, *each.secondary_opts) if flag.startswith("--")}
    assert given == set(wanted)


def help_of(*command: str, columns: int = 80) -> str:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": str(columns), "TERM": "dumb"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_80_columns_and_says_what_options_mean(command: str) -> None:
    output = help_of(command)
    assert max(map(len, output.splitlines())) <= 80
    assert f"Example: jbrprune {command}" in " ".join(output.split())
    for flag, text in (pair for table in TABLES.get(command, ()) for pair in flags(table)):
        start = re.escape(" ".join(text.split()[:3]))
        assert re.search(rf"{flag} +<[\w\[\]]+> +{start}", output.replace("`", "")), flag
    words = re.findall(r"│ *(?:\S+ +)?(?:<[\w\[\]]+> +)?(.*?) *│", output)
    assert not [line for line in words if 0 < len(line) < 4 and line.endswith("-")]


def test_panels_group_options_by_topic() -> None:
    panels = re.findall(r"╭─ (\w+) ─", help_of("prune"))
    assert panels == ["Arguments", "Options", "Budget", "Criterion", "Repair", "Data", "Model", "Output"]


def test_help_of_the_whole_names_the_commands_and_the_exit_codes() -> None:
    output = help_of(columns=160)
    for word in (*COMMANDS, "0 done", "2 wrong arguments", "jbrprune prune MODEL --data FOLDER --macs 0.5 --out DIR"):
        assert word in output


def test_options_become_the_arguments_of_the_call(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stopped(*_: object, **options: object) -> None:
        asked.update(options)
        raise ArgumentError("stop")

    for name in ("prune", "sparsify"):
        monkeypatch.setattr(cli, name, stopped)
    nested = ["--floor", 0.2, "--min-channels", 4, "--round-to", 8, "--width", "--ignore", "a", "--ignore", "b"]
    changed = ["--criterion", "jbr_margin", "--statistic", "batched", "--batch", 7, "--autocast", "bfloat16"]
    repairs = ["--repair", "batch_norm", "--repair", "mean_shift"]
    assert run("prune", *RANDOM, "--data", pictures, "--macs", 0.5, *nested, *changed, *repairs)[0] == 2
    assert (asked["macs"], asked["params"], asked["inplace"], asked["progress"]) == (0.5, None, False, False)
    assert asked["floors"] == Floors(0.2, 4, 8, True)
    assert asked["ignore"] == ("a", "b")
    assert asked["repair"] == ("batch_norm", "mean_shift")
    relevance = asked["criterion"]
    assert (relevance.objective, relevance.statistic, relevance.batch) == ("margin", "batched", 7)
    assert relevance.autocast is torch.bfloat16

    assert run("prune", *RANDOM, "--data", pictures, "--macs", 0.5, "--repair", "none")[0] == 2
    assert (asked["repair"], asked["criterion"], asked["floors"]) == (None, "jbr", Floors())
    assert run("sparsify", *RANDOM, "--data", pictures, "--sparsity", 0.5, "--no-permanent", "--shrink")[0] == 2
    assert (asked["permanent"], asked["shrink"], asked["criterion"]) == (False, True, "jbr_projection")
    assert run("sparsify", *RANDOM, "--data", pictures, "--sparsity", 0.5, "--statistic", "signed")[0] == 2
    assert (asked["criterion"].objective, asked["criterion"].statistic) == ("projection", "signed")


# --- what the commands do ------------------------------------------------------------------------


def test_an_encoder_is_pruned_and_compared(run: Run, pictures: Path, tmp_path: Path) -> None:
    named, out = (*RANDOM, "--model-arg", "num_classes=0"), tmp_path / "encoder"
    asked = ("--data", pictures, "--macs", 0.8, "--steps", 1, "--min-channels", 1)
    code, text, err = run("prune", *named, *asked, "--out", out)
    assert (code, err) == (0, "")
    assert "output=embedding" in text
    asked = ("--data", pictures, "--reference", *named, "--json")
    code, text, _ = run("eval", out, *asked)
    assert code == 0
    found = json.loads(text)
    assert 0 < found["error"] < 1
    assert found.keys() >= {"cosine", "neighbour_agreement"}
    assert "top1_agreement" not in found
    code, text, _ = run("info", *named)
    assert code == 0
    assert "What counts of the model's output: embedding: [B, 64]." in text


def test_prune_eval_and_load(run: Run, pictures: Path, weights: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "pruned", tmp_path / "report.html"
    common = [*NET, "--checkpoint", weights]
    budget = ["--data", pictures, "--macs", 0.85, "--steps", 1, "--ignore", "blocks.0.attn", "--ignore", "blocks.1.m*"]
    code, text, _ = run("prune", *common, *budget, "--out", out)
    assert code == 0
    assert "MACs" in text
    assert text.endswith(f"Saved to {out}\n")
    assert jbrprune.load(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)

    code, text, err = run("prune", *common, *budget, "--json", "--report", page, "--eval-data", pictures)
    assert (code, err) == (0, "")
    assert "<h2>Widths</h2>" in page.read_text(encoding="utf-8")
    report = Report.from_dict(json.loads(text))
    assert report.kept <= 0.85
    assert report.settings["ignore"] == ["blocks.0.attn", "blocks.1.m*"]
    assert report.final is not None
    assert report.final.images == 12
    assert report.final.accuracy is not None

    code, text, err = run("eval", out, "--data", pictures, "--reference", "test_vit", *common[1:], "--json")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert (facts["macs"], facts["reference_macs"]) == (report.pruned.macs, report.dense.macs)
    assert (facts["params"], facts["reference_params"]) == (report.pruned.params, report.dense.params)
    assert facts["images"] == 12
    assert 0 <= facts["accuracy"] <= 1
    assert facts["kl"] > 0
    assert 0 < facts["relative_latency"] < 1

    code, text, _ = run("eval", out, "--data", pictures, "--images", 5)
    assert code == 0
    assert re.search(r"images +5\n", text)
    assert "accuracy" in text
    assert "kl" not in text
    assert "latency_ms" in text


def test_a_model_agrees_with_itself(run: Run, pictures: Path, weights: Path) -> None:
    named = [*NET, "--checkpoint", weights]
    code, text, _ = run("eval", *named, "--data", pictures, "--reference", "test_vit", "--json")
    assert code == 0
    assert json.loads(text)["top1_agreement"] == 1


def test_agreement_is_measured_batch_by_batch(pictures: Path) -> None:
    """As on all images at once, and of no more images than asked for."""
    torch.manual_seed(0)
    images, labels = torch.randn(11, 3, 32, 32), torch.arange(11) % 4
    models = [timm.create_model("test_vit", **ARGUMENTS).eval() for _ in range(2)]
    with torch.no_grad():
        dense, pruned = (model(images) for model in models)
    for count in (11, 6):
        wanted = cli.agreement(pruned[:count], dense[:count], labels[:count])
        limit = None if count == 11 else count
        found, first = cli.measure_agreement(models, [(images[:4], labels[:4]), (images[4:], labels[4:])], limit, 4)
        assert (found.images, found.top1, found.accuracy) == (count, wanted.top1, wanted.accuracy)
        assert found.kl == pytest.approx(wanted.kl, rel=1e-5)
        assert first.shape == (1, 3, 32, 32)


def test_random_weights_are_the_same_every_time(run: Run, pictures: Path) -> None:
    first, second = (run("score", *RANDOM, "--data", pictures, "--json") for _ in range(2))
    assert first == second


def test_score(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    options = ["--data", pictures, "--objective", "margin", "--site", "all"]
    code, text, err = run("score", *RANDOM, *options, "--out", path)
    assert (code, err) == (0, "")
    assert "test_vit: scores of 12 images, margin" in text
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


@pytest.mark.parametrize("options", [[], ["--no-permanent"], ["--scope", "layer", "--floor", 0]])
def test_single_weights(options: list[object], run: Run, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    asked = ["--data", pictures, "--sparsity", 0.8, "--repair", "none", "--out", out, "--json", *options]
    code, text, err = run("sparsify", *RANDOM, *asked)
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert facts["budget"] == {"sparsity": 0.8}
    sizes = [row["before"] for row in facts["layers"]]
    assert sum(row["before"] - row["after"] for row in facts["layers"]) == pytest.approx(0.8 * sum(sizes), abs=5)
    model = jbrprune.load(out).eval()
    assert torch.nn.utils.prune.is_pruned(model) == ("--no-permanent" in options)
    assert zeros(model) == [row["before"] - row["after"] for row in facts["layers"]]
    if "layer" in options:
        assert zeros(model) == [round(0.8 * size) for size in sizes]
        assert facts["settings"]["floor"] == 0


def test_a_pattern_and_shrinking(run: Run, pictures: Path) -> None:
    pattern = ["--data", pictures, "--pattern", "2:4", "--objective", "margin", "--steps", 2]
    code, text, err = run("sparsify", *RANDOM, *pattern)
    assert (code, err) == (0, "")
    assert "weights are zero" in text
    assert "pattern=2:4" in text
    code, text, _ = run("sparsify", *RANDOM, "--data", pictures, "--sparsity", 0.5, "--shrink", "--repair", "none")
    assert code == 0
    assert "channels that contributed nothing were removed from" in " ".join(text.split())


def test_score_single_weights(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    options = ["--data", pictures, "--granularity", "weight"]
    code, text, err = run("score", *RANDOM, *options, "--statistic", "signed", "--out", path)
    assert (code, err) == (0, "")
    assert "test_vit: scores of 12 images, projection, signed" in text
    scores = WeightScores.load(path)
    assert (scores.samples, scores.settings.statistic) == (12, "signed")
    code, text, _ = run("score", *RANDOM, *options, "--json")
    assert code == 0
    assert {row["group"]: row["units"] for row in json.loads(text)["groups"]} == {
        name: total.numel() for name, total in scores.sums.items()
    }


def test_predict(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    options = ["--data", pictures, "--macs", 0.95, "--macs", 0.9, "--checked", 4]
    code, text, _ = run("predict", *RANDOM, *options, "--out", path)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert "flips: share of images" in text
    assert len(path.read_text().splitlines()) == 3
    code, text, _ = run("predict", *RANDOM, "--output", "embedding", *options)
    assert code == 0
    assert "flips" not in text
    code, text, _ = run("predict", *RANDOM, *options, "--json")
    assert code == 0
    assert [row["target"] for row in json.loads(text)["rows"]] == [0.95, 0.9]


def test_info(run: Run) -> None:
    code, text, err = run("info", *NET)
    assert (code, err) == (0, "")
    assert "test_vit: " in text
    assert "It can go down to" in text
    assert re.search("head +the classifier", text)
    code, text, _ = run("info", *NET, "--ignore", "*.mlp", "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["input_size"] == [3, 32, 32]
    assert [row["group"] for row in facts["rows"]] == ["blocks.0.attn", "blocks.1.attn"]
    assert facts["skipped"]["blocks.0.mlp.fc1"] == "ignored on request"
    assert 0 < facts["least_macs"] < 1


def test_the_demo_is_called(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []
    monkeypatch.setattr("jbrprune.demo.run_demo", lambda out, seed, say: (called.append((out, seed)), say("here")))
    assert run("demo", "--out", tmp_path, "--seed", 3) == (0, "here\n", "")
    assert called == [(tmp_path, 3)]


def test_a_command_in_a_process_of_its_own(pictures: Path, tmp_path: Path) -> None:
    """Standard output holds the JSON and nothing else; the model is there."""
    command = [sys.executable, "-m", "jbrprune", "prune", *RANDOM]
    options = ["--data", str(pictures), "--params", "0.9", "--steps", "1", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["budget"] == {"params": 0.9}
    assert facts["out"] == str(tmp_path / "out")
    assert "Traceback" not in done.stderr
    jbrprune.load(tmp_path / "out")


def environment() -> dict[str, str]:
    root = str(Path(jbrprune.__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def test_a_card_is_written(run: Run, pictures: Path, tmp_path: Path) -> None:
    saved = ["--params", 0.9, "--steps", 1, "--repair", "none", "--quiet", "--card", "--out", tmp_path / "out"]
    assert run("prune", *RANDOM, "--data", pictures, *saved) == (0, "", "")
    assert "## Report" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["--images", "--batch-size"])
def test_eval_needs_images(option: str, run: Run, pictures: Path) -> None:
    code, _, message = run("eval", *RANDOM, "--data", pictures, option, 0)
    assert code == 2
    assert "must be a whole number of at least 1, got 0" in " ".join(message.split())


def test_an_interrupt_ends_with_130(run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Relevance, "__call__", interrupted)
    out = ["--data", pictures, "--macs", 0.5, "--out", tmp_path / "out"]
    assert run("prune", *RANDOM, *out)[0] == 130
    assert not (tmp_path / "out").exists()


# --- how they fail -------------------------------------------------------------------------------

PRUNE = ["prune", *RANDOM, "--data", "{data}"]
SPARSIFY = ["sparsify", *RANDOM, "--data", "{data}"]
SCORE = ["score", *RANDOM, "--data", "{data}"]
WRONG: dict[str, tuple[list[str], int, str]] = {
    "no command": (["pruen"], 2, "No such command 'pruen'"),
    "no data": (["prune", *RANDOM, "--macs", "0.5"], 2, "Missing option '--data'"),
    "no budget": (PRUNE, 2, "exactly one of macs="),
    "two budgets": ([*PRUNE, "--macs", "0.5", "--params", "0.5"], 2, "macs= and params="),
    "a budget of 1": ([*PRUNE, "--macs", "1"], 2, "0 < macs < 1"),
    "half": ([*PRUNE, "--macs", "half"], 2, "Invalid value for '--macs'"),
    "out of reach": ([*PRUNE, "--macs", "0.0001"], 2, "with every group at its floor"),
    "unknown model": (
        ["prune", "resnet5O", "--data", "{data}", "--macs", "0.5"], 2, "(Nearest names|did you mean).*resnet50"
    ),
    "unknown objective": ([*SCORE, "--objective", "label2"], 2, "objective must be one of .* got 'label2'"),
    "unknown criterion": ([*PRUNE, "--macs", "0.5", "--criterion", "jrb"], 2, "criterion 'jrb'"),
    "no such folder": (["prune", *RANDOM, "--data", "{tmp}/none", "--macs", "0.5"], 1, "There is no folder"),
    "an empty folder": (["score", *RANDOM, "--data", "{tmp}"], 1, "No images in"),
    "not a key": (["info", "test_vit", "--model-arg", "classes"], 2, "--model-arg must be key=value, got 'classes'"),
    "unknown key": (["info", "test_vit", "--model-arg", "clases=3"], 2, "timm cannot make 'test_vit' with .*clases=3"),
    "no checkpoint": (
        ["prune", *NET, "--checkpoint", "{tmp}/w.pth", "--data", "{data}", "--macs", ".5"], 1, "no checkpoint file"
    ),
    "a pickle": (["score", *NET, "--checkpoint", "{pickle}", "--data", "{data}"], 1, "It was not executed"),
    "out is a file": ([*PRUNE, "--macs", "0.5", "--out", "{pickle}"], 1, "is a file|not a directory"),
    "out exists": ([*PRUNE, "--macs", "0.5", "--out", "{data}"], 1, "exists"),
    "scores to a directory": ([*SCORE, "--out", "{tmp}"], 1, "cannot be written"),
    "scores nowhere": ([*SCORE, "--out", "{tmp}/no/s.safetensors"], 1, "cannot be written"),
    "page nowhere": ([*PRUNE, "--macs", "0.5", "--report", "{tmp}/no/p.html"], 1, "cannot be written"),
    "no images": ([*PRUNE, "--macs", "0.5", "--images", "0"], 2, "images must be .*at least 1"),
    "no batch": ([*PRUNE, "--macs", "0.5", "--batch-size", "0"], 2, "batch_size must be .*at least 1"),
    "no device": ([*SCORE, "--device", "gpu"], 2, "--device 'gpu' cannot be used"),
    "no saved model": (["eval", "{tmp}", "--data", "{data}"], 1, "jbrprune.json"),
    "sparsity of everything": ([*SPARSIFY, "--sparsity", "1"], 2, "0 < sparsity < 1, got 1.0"),
    "no pattern": ([*SPARSIFY, "--pattern", "4:2"], 2, "such as '2:4', got '4:2'"),
    "pattern and sparsity": ([*SPARSIFY, "--pattern", "2:4", "--sparsity", "0.5"], 2, "got both"),
    "shrink channels": ([*PRUNE, "--macs", "0.5", "--shrink"], 2, "No such option.*--shrink"),
    "width of weights": ([*SPARSIFY, "--sparsity", "0.5", "--width"], 2, "No such option.*--width"),
    "scope": ([*SPARSIFY, "--sparsity", "0.5", "--scope", "net"], 2, "scope must be one of global, layer, got 'net'"),
    "granularity": ([*SCORE, "--granularity", "bit"], 2, "granularity must be one of unit, weight"),
    "signed channels": ([*SCORE, "--statistic", "signed"], 2, "statistic 'signed' is not defined for units"),
    "no such glob": (["info", *NET, "--ignore", "nowhere"], 2, "nowhere"),
}  # fmt: skip


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
    monkeypatch.setattr(cli, "check_target", lambda path, *, overwrite: asked.append((path, overwrite)))
    monkeypatch.setattr(
        cli, "create", lambda *_, **__: (_ for _ in ()).throw(ArgumentError(f"asked {len(asked)} times"))
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

    monkeypatch.setattr(cli, "create", failing)
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
def test_values_of_model_arguments_are_read_as_json_where_they_are(
    text: str, value: object, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def stopped(name: str, **arguments: object) -> None:
        asked.update(arguments)
        raise ArgumentError("stop")

    monkeypatch.setattr(cli, "create", stopped)
    assert run("info", "test_vit", "--model-arg", text)[0] == 2
    assert asked[text.partition("=")[0]] == value
