"""The benchmark from the command line to the figure: runs, resuming, shards, tables at equal cost, areas."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

import benchmark  # noqa: E402
import common  # noqa: E402
import curves  # noqa: E402
import plan  # noqa: E402
import plot  # noqa: E402
import protocols  # noqa: E402
import sources  # noqa: E402
import table  # noqa: E402

from baselines.torch_pruning_shipped import KNOWN_FAULTS  # noqa: E402
from jbrprune.demo import crops, digits, lite0  # noqa: E402
from jbrprune.errors import ArgumentError, DataError  # noqa: E402

FEW = ["--data", "digits", "--weights", "random", "--images", "32", "--eval-images", "40"]
TINY = ["--model", "test_resnet", "--model-arg", "zero_init_last=false", *FEW]  # each block has a part in the logits
TINY_VIT = ["--model", "test_vit", "--model-arg", "img_size=32", *FEW]
NEEDED = (
    *("model", "data", "protocol", "criterion", "budget", "seed", "macs", "params", "accuracy", "dense_accuracy"),
    *("agreement", "kl", "seconds", "scoring_seconds", "images", "eval_images", "versions", "hardware", "threads"),
    *("commit", "command"),
)


def run(out: Path, *extra: str, base: list[str] = TINY) -> list[dict]:
    benchmark.main([*base, *extra, "--out", str(out)])
    return common.lines(out)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two criteria, two budgets, two seeds."""
    out = tmp_path_factory.mktemp("benchmark") / "lines.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(out, "--criterion", "jbr", "tp_taylor", "--budgets", "0.8", "0.6", "--steps", "1", "--seeds", "0", "1")
    torch.set_num_threads(threads)
    return out


# --- lines -----------------------------------------------------------------------------------------


def test_a_line_for_every_run_and_budget(measured: Path) -> None:
    lines = common.lines(measured)
    found = {(line["criterion"], line["seed"], line["budget"]) for line in lines}
    assert len(lines) == len({line["key"] for line in lines}) == 8
    assert found == {(name, seed, b) for name in ("jbr", "tp_taylor") for seed in (0, 1) for b in (0.8, 0.6)}
    for line in lines:
        assert set(NEEDED) <= line.keys()
        assert 0.5 * line["budget"] < line["macs"] / line["dense_macs"] <= line["budget"]
        assert line["images"] == 32
        assert line["eval_images"] == 40
        assert line["labels"] == (line["criterion"] == "tp_taylor")
        assert 0 < line["scoring_seconds"] < line["seconds"]
        assert line["scorings"] == (1 if line["budget"] == 0.8 else 2)  # from one budget to the next


def test_a_kill_in_the_middle_loses_and_doubles_nothing(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    arguments = ["--criterion", "l1", "l2", "random", "fpgm", "--budgets", "0.8", "--steps", "1", "--seeds", "0"]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *TINY, *arguments, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(common.lines(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = out.read_bytes()
    assert len(common.lines(out)) >= 2
    with out.open("ab") as file:
        file.write(b'{"key": "half a li')  # had it been killed while it wrote
    after = run(out, *arguments)
    assert out.read_bytes().startswith(before)
    assert [line["criterion"] for line in after] == ["l1", "l2", "random", "fpgm"]
    table.main([str(out)])
    plot.main([str(out), "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_resuming_adds_nothing_and_repairs_a_half_line(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    whole = measured.read_bytes()
    arguments = ("--criterion", "jbr", "tp_taylor", "--budgets", "0.8", "0.6", "--steps", "1", "--seeds", "0", "1")
    out.write_bytes(whole)
    run(out, *arguments)
    assert out.read_bytes() == whole
    rows = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:-1]) + rows[-1][:-40])  # killed while the last line was written
    assert len(common.lines(out)) == 7
    again = run(out, *arguments)
    assert len(again) == 8
    assert again[:7] == [json.loads(row) for row in rows[:7]]
    last, before = again[7], json.loads(rows[7])
    same = ("key", "criterion", "budget", "seed", "macs", "params", "accuracy", "agreement")
    assert {name: last[name] for name in same} == {name: before[name] for name in same}


def test_what_was_cut_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "c')
    common.mend(path)
    assert path.read_text() == '{"key": "a"}\n'
    assert "the last line was cut in the middle (15 characters)" in capsys.readouterr().err
    common.mend(path)
    common.mend(tmp_path / "none")
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "none").exists()
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(DataError, match="line 2 is no JSON object"):
        common.lines(path)
    with pytest.raises(DataError, match="line 2 is no JSON object"):
        common.append(path, [{"key": "c"}])


def test_one_key_one_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    failed, other, made = {"key": "a", "failed": "x"}, {"key": "a", "failed": "y"}, {"key": "a", "accuracy": 1}
    for record in (failed, failed, other, made, made, failed, {"no": 1}, {"no": 1}):
        common.append(path, [record])
    assert common.lines(path) == [failed, other, made, {"no": 1}, {"no": 1}]


WRITER = """
import sys, time
sys.path.insert(0, {scripts!r})
import common
other, until = "ba"["ab".index(sys.argv[1])], time.monotonic() + 60
for number in range(150):
    # not before the other has begun as well, so that both really write at the same time
    while number == 1 and time.monotonic() < until and not any(
        line["key"] == f"{{other}}-0-0" for line in common.lines(__import__("pathlib").Path({path!r}))
    ):
        time.sleep(0.01)
    common.append(__import__("pathlib").Path({path!r}), [
        {{"key": f"{{sys.argv[1]}}-{{number}}-{{part}}", "text": "x" * (50 * part)}} for part in range(3)
    ] + [{{"key": f"shared-{{number}}"}}])
    common.lines(__import__("pathlib").Path({path!r}))
"""


def test_two_processes_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = WRITER.format(scripts=str(ROOT / "scripts"), path=str(path))
    writers = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT, stderr=subprocess.PIPE) for name in "ab"]
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]  # nobody saw half a line
    keys = [line["key"] for line in common.lines(path)]
    wanted = {f"{name}-{number}-{part}" for name in "ab" for number in range(150) for part in range(3)}
    assert len(keys) == len(set(keys))
    assert set(keys) == wanted | {f"shared-{number}" for number in range(150)}
    first = [keys.index(f"{name}-0-0") < keys.index(f"{other}-149-2") for name, other in ("ab", "ba")]
    assert all(first)  # they really wrote at the same time


def test_lines_are_cut_and_completed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    common.append(path, [{"a": 1}])
    path.write_text('{"a": 1}\n{"a": 2}')  # whole but for its end of line
    assert common.lines(path) == [{"a": 1}, {"a": 2}]
    common.append(path, [{"a": 3}])
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    path.write_text('{"a": 1}\n{"a": 2')
    common.append(path, [{"a": 3}, {"a": 4}])
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n{"a": 4}\n'


def test_arguments_of_the_older_scripts() -> None:
    assert common.parsed("a=1,b=x,c=None,d=0.5,e=true") == {"a": 1, "b": "x", "c": None, "d": 0.5, "e": True}
    assert common.parsed("default") == {}


# --- runs ------------------------------------------------------------------------------------------


def wanted(**given: object) -> dict:
    return plan.configured(None, {"model": ["test_resnet"], "data": ["digits"], **given})


def test_arguments_of_a_model_that_is_trained_here_and_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vision transformer that is made for 160 pixels is trained on 32, not refused or made without its arguments."""
    some = [part[:64] for part in digits()]
    monkeypatch.setattr("jbrprune.demo.digits", lambda: some)
    given = {"model": ["test_vit"], "weights": "trained", "model_args": {"img_size": 32, "depth": 2}, "seeds": [0]}
    model = benchmark.created(plan.runs(wanted(**given, criterion=["random"]))[0].setup)
    assert len(model.blocks) == 2
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_shards_are_disjoint_and_complete() -> None:
    every = plan.runs(wanted(protocol=["budget", "unstructured"], seeds=[0, 1]))
    parts = [plan.shard(every, f"{number}/4") for number in range(1, 5)]
    keys = [key for part in parts for run in part for key in run.keys().values()]
    assert sorted(keys) == sorted(key for run in every for key in run.keys().values())
    assert len(keys) == len(set(keys))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ArgumentError, match="i/n"):
        plan.shard(every, "0/4")


def test_shards_write_into_one_file(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    common_part = ("--criterion", "l1", "random", "--budgets", "0.8", "--steps", "1", "--seeds", "0")
    assert [line["criterion"] for line in run(out, *common_part, "--shard", "2/2")] == ["random"]
    assert [line["criterion"] for line in run(out, *common_part, "--shard", "1/2")] == ["random", "l1"]


@pytest.mark.parametrize(
    "change",
    [
        *({"seeds": [1]}, {"images": 31}, {"eval_images": 9}, {"repair": ["none"]}, {"steps": [2]}, {"batch_size": 8}),
        *({"model": ["test_vit"]}, {"weights": "random"}, {"model_args": {"in_chans": 3}}, {"budgets": [0.9, 0.5]}),
        *({"criterion": ["l2"]}, {"protocol": ["one_shot"]}),
    ],
    ids=str,
)
def test_whatever_changes_the_result_changes_the_key(change: dict) -> None:
    base = {"seeds": [0], "criterion": ["l1"], "budgets": [0.9, 0.6]}
    (one,), (other,) = plan.runs(wanted(**base)), plan.runs(wanted(**base | change))
    assert not set(one.keys().values()) & set(other.keys().values())


def test_budgets_that_start_from_the_dense_model_stand_alone() -> None:
    def keys(name: str, budgets: list[float]) -> dict[float, str]:
        (only,) = plan.runs(wanted(protocol=[name], budgets=budgets, criterion=["random"], seeds=[0]))
        return only.keys()

    assert keys("one_shot", [0.8, 0.6])[0.6] == keys("one_shot", [0.6])[0.6]
    assert keys("budget", [0.8, 0.6])[0.6] != keys("budget", [0.6])[0.6]


def test_the_order_of_budgets_does_not_matter() -> None:
    (one,), (other,) = (
        plan.runs(wanted(budgets=budgets, criterion=["l1"], seeds=[0])) for budgets in ([0.5, 0.9], [0.9, 0.5, 0.9])
    )
    assert one.keys() == other.keys()
    assert list(one.keys()) == [0.9, 0.5]  # as they are reached


def test_data_are_known_by_what_they_are(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(data: str, root: Path | None = None) -> str:
        given = {"data": [data], "root": root and str(root), "criterion": ["l1"], "seeds": [0], "budgets": [0.5]}
        (only,) = plan.runs(wanted(**given))
        return only.keys()[0.5]

    monkeypatch.chdir(pictures.parent)
    here = key(str(pictures))
    assert here == key(pictures.name) == key(f"./{pictures.name}/")
    copied, other = (Path(shutil.copytree(pictures, tmp_path / name)) for name in "ab")
    next((other / "val").rglob("*.png")).write_bytes(b"another size")
    (copied / "notes.txt").write_text("no image")
    (copied / "train.tar").write_text("not read either")
    assert key("imagenet", pictures) == key("imagenet", copied) != key("imagenet", other)
    for number, folder in enumerate((tmp_path / "c", tmp_path / "d", tmp_path / "e")):
        folder.mkdir()
        for name in sources.IDX:
            content = name.encode() + bytes([number // 2])
            packed = gzip.compress(content) if number else content
            (folder / f"{name}{'.gz' if number else ''}").write_bytes(packed)
    assert key("fashion_mnist", tmp_path / "c") == key("fashion_mnist", tmp_path / "d")
    assert key("fashion_mnist", tmp_path / "c") != key("fashion_mnist", tmp_path / "e")
    assert key("torch/cifar10", tmp_path / "c") != key("torch/cifar10", tmp_path / "d")
    assert key("digits") == key("digits", tmp_path)
    with pytest.raises(DataError, match="holds no train-images"):
        key("fashion_mnist", pictures)


def test_weights_in_a_file_are_known_by_their_content(tmp_path: Path) -> None:
    def key(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        given = {"weights": str(tmp_path / name), "criterion": ["l1"], "seeds": [0], "budgets": [0.5]}
        (only,) = plan.runs(wanted(**given))
        return only.keys()[0.5]

    assert key("a", b"1") == key("b", b"1") != key("c", b"2")


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_every_protocol_runs(name: str, tmp_path: Path) -> None:
    base = TINY_VIT if name.startswith("vit") else TINY
    budgets = ["0.7", "0.5"] if name == "unstructured" else ["0.8", "0.7"]
    criteria = ("--criterion", "jbr_projection", "random")
    lines = run(tmp_path / "out", "--protocol", name, *criteria, "--budgets", *budgets, "--seeds", "3", base=base)
    assert [line["criterion"] for line in lines] == ["jbr_projection"] * 2 + ["random"] * 2
    assert [line["budget"] for line in lines] == ([0.5, 0.7] if name == "unstructured" else [0.8, 0.7]) * 2
    protocol = protocols.PROTOCOLS[name]
    for line in lines:
        assert (line["protocol"], line["kind"]) == (name, protocol.kind)
        assert line["repair"] == plan.repair_named(protocol.repair)
        assert line["dense_accuracy"] == lines[0]["dense_accuracy"]
        if name == "unstructured":
            assert line["sparsity"] == pytest.approx(line["budget"], abs=1e-4)
            assert line["macs"] == line["dense_macs"]
        elif protocol.kind == "macs":
            assert line["macs"] <= line["budget"] * line["dense_macs"]
    if name == "paper":
        assert {line["repaired_by"] for line in lines} == {"none"}


def test_the_paper_takes_eighteen_equal_steps() -> None:
    paper = protocols.PROTOCOLS["paper"]
    assert np.allclose(-np.diff([1.0, *paper.budgets]), 0.05)
    assert (len(paper.budgets), paper.budgets[-1], paper.steps, paper.images) == (18, 0.1, 1, 6400)
    assert not {"jbr", "jbr_predicted_logit", "jbr_mean_replaced"} & set(paper.criteria)  # not batched


def test_criteria_of_protocols_exist() -> None:
    for protocol in protocols.PROTOCOLS.values():
        assert set(protocol.criteria) <= set(protocol.known)
        assert protocol.labelled <= set(protocol.known)


def test_only_criteria_that_need_labels_see_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def spy(name: str) -> None:
        real = protocols.CRITERIA[name]

        def watched(model: nn.Module, batches: list, groups: list, **how: object) -> object:
            seen[name] = [batch.labels is not None for batch in batches]
            return real(model, batches, groups, **how)

        monkeypatch.setitem(protocols.CRITERIA, name, watched)

    spy("l1")
    spy("taylor")
    run(tmp_path / "out", "--criterion", "l1", "taylor", "--budgets", "0.8", "--steps", "1", "--seeds", "0")
    assert not any(seen["l1"])
    assert all(seen["taylor"])


def test_one_shot_scores_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    real = protocols.CRITERIA["l1"]

    def counted(model: nn.Module, batches: list, groups: list, **how: object) -> object:
        calls.append(sum(parameter.numel() for parameter in model.parameters()))
        return real(model, batches, groups, **how)

    monkeypatch.setitem(protocols.CRITERIA, "l1", counted)
    lines = run(
        tmp_path / "out", "--protocol", "one_shot", "--criterion", "l1", "--budgets", "0.6", "0.8", "--seeds", "0"
    )
    assert calls == [lines[0]["dense_params"]]
    assert [line["scoring_seconds"] for line in lines] == [lines[0]["scoring_seconds"]] * 2
    again = run(tmp_path / "alone", "--protocol", "one_shot", "--criterion", "l1", "--budgets", "0.6", "--seeds", "0")
    assert [again[0][name] for name in ("key", "macs", "accuracy")] == [
        lines[1][name] for name in ("key", "macs", "accuracy")
    ]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lines.jsonl"
    criteria = ("--criterion", "bn_scale", "l1")  # a vision transformer has no batch norm
    with pytest.raises(SystemExit, match="1 of 2 runs failed") as stopped:
        run(out, *criteria, "--budgets", "0.8", "--steps", "1", "--seeds", "0", base=TINY_VIT)
    assert isinstance(stopped.value.code, str)  # Python's exit code 1
    failed, made = common.lines(out)
    assert (failed["criterion"], made["criterion"]) == ("bn_scale", "l1")
    assert failed["failed"].startswith("ModelError: Criterion 'bn_scale'")
    assert {"key", "seed", "budget", "commit", "command"} <= failed.keys()
    assert "accuracy" not in failed
    assert "bn_scale" in capsys.readouterr().err


def test_nan_is_a_failure_that_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.jsonl"
    arguments = ("--criterion", "l1", "random", "--budgets", "0.8", "--steps", "1", "--seeds", "0")
    real = protocols.CRITERIA["l1"]

    def broken(model: nn.Module, batches: list, groups: list, **how: object) -> object:
        scores = real(model, batches, groups, **how)
        next(iter(scores.sums.values()))[0] = float("nan")
        return scores

    monkeypatch.setitem(protocols.CRITERIA, "l1", broken)
    for _ in range(2):  # the same failure twice is one line
        with pytest.raises(SystemExit, match="1 of 2 runs failed"):
            run(out, *arguments)
    assert [line.get("failed", "")[:14] for line in common.lines(out)] == ["NonFiniteError", ""]
    assert len(curves.read([out])) == 1
    table.main([str(out)])
    shown = capsys.readouterr()
    assert "| random |" in shown.out
    assert "| l1 |" not in shown.out
    for text in (shown.out, shown.err):
        assert "Left out, it failed: l1 on test_resnet, budget, seed 0: NonFiniteError" in text
    monkeypatch.setitem(protocols.CRITERIA, "l1", real)
    assert [line["criterion"] for line in run(out, *arguments)] == ["l1", "random", "l1"]
    table.main([str(out)])
    shown = capsys.readouterr()
    assert "| l1 |" in shown.out
    assert "Left out" not in shown.out + shown.err


def test_what_was_measured_before_a_failure_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark.prune

    def fails(model: nn.Module, batches: list, **how: object) -> object:
        if how["macs"] == 0.6:
            raise IndexError("a foreign error")
        return real(model, batches, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "prune", fails)
    out = tmp_path / "lines.jsonl"
    arguments = ("--protocol", "one_shot", "--criterion", "random", "--budgets", "0.8", "0.6", "--seeds", "0")
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        run(out, *arguments)
    assert [(line["budget"], line.get("failed")) for line in common.lines(out)] == [
        (0.8, None),
        (0.6, "IndexError: a foreign error"),
    ]
    monkeypatch.setattr(benchmark, "prune", real)
    lines = run(out, *arguments)
    assert [(line["budget"], "failed" in line) for line in lines] == [(0.8, False), (0.6, True), (0.6, False)]


def test_a_measurement_that_is_not_finite_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark.measured
    monkeypatch.setattr(benchmark, "measured", lambda report: real(report) | {"kl": float("inf")})
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        run(tmp_path / "out", "--criterion", "random", "--budgets", "0.8", "--steps", "1", "--seeds", "0")
    (line,) = common.lines(tmp_path / "out")
    assert line["failed"] == "NonFiniteError: kl is inf at budget 0.8."


def test_labels_that_are_missing(pictures: Path, tmp_path: Path) -> None:
    """A folder without classes: what needs labels fails and says so, what needs none goes on."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((pictures / "train").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    base = ["--model", "test_resnet", "--data", str(flat), "--weights", "random", "--images", "8", "--seeds", "0"]
    base += ["--model-arg", "zero_init_last=false", "--model-arg", "num_classes=3", "--budgets", "0.8", "--steps", "1"]
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        run(tmp_path / "out", "--criterion", "taylor", "jbr", base=base)
    failed, made = common.lines(tmp_path / "out")
    assert failed["failed"] == f"DataError: The data '{flat}' have no labels, which criterion 'taylor' needs."
    assert (made["criterion"], made["accuracy"]) == ("jbr", None)
    assert made["agreement"] is not None


def test_a_model_that_is_not_finite_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One NaN among its weights: every run of it says so after one look, the next model is measured."""
    made, seen = benchmark.created, []

    def broken(setup: plan.Setup) -> nn.Module:
        seen.append(setup.model)
        model = made(setup)
        if setup.model == "test_vit":
            next(model.parameters()).data.view(-1)[0] = float("nan")
        return model

    monkeypatch.setattr(benchmark, "created", broken)
    base = ["--model", "test_vit", "test_resnet", "--data", "photographs", "--weights", "random", "--images", "4"]
    monkeypatch.setattr(sources, "CROPS", 8)
    few = ["--eval-images", "2", "--criterion", "l1", "random", "--budgets", "0.8", "--steps", "1", "--seeds", "0"]
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        run(tmp_path / "out", *few, base=base)
    assert seen == ["test_vit", "test_resnet"]
    first, second, *others = common.lines(tmp_path / "out")
    assert first["failed"] == second["failed"]
    assert first["failed"].startswith("NonFiniteError: ")
    assert capsys.readouterr().err.count(first["failed"]) == 2
    assert [line["model"] for line in others] == ["test_resnet"] * 2
    assert not any("failed" in line for line in others)


def test_missing_labels_are_found_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CROPS", 8)
    monkeypatch.setattr(benchmark, "predict", lambda *_: pytest.fail("the model ran"))
    base = ["--model", "test_resnet", "--data", "photographs", "--weights", "random", "--images", "5", "--seeds", "0"]
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        run(tmp_path / "out", "--criterion", "taylor", "--budgets", "0.8", base=base)
    (line,) = common.lines(tmp_path / "out")
    assert line["failed"] == "DataError: The data 'photographs' have no labels, which criterion 'taylor' needs."


def test_a_file_of_other_lines_is_not_added_to(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    for text, number in (
        ('{"model": "a"}\n', 1),
        ('{"key": "a", "protocol": "b"}\n{"key": "c", "how": "plain"}\n{"h', 2),
    ):
        out.write_text(text)
        with pytest.raises(SystemExit, match=f"line {number} is of another script.*Choose another --out"):
            run(out, "--criterion", "l1")
        assert out.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--device 'cuda' cannot be used: [^\n]*Devices here: cpu\.$"):
        run(tmp_path / "out", "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "papper"], "did you mean 'paper'"),
        (["--criterion", "tailor"], "did you mean 'taylor'"),
        (
            ["--protocol", "unstructured", "--criterion", "hrank"],
            "'hrank' ranks channels, protocol 'unstructured' prunes",
        ),
        (["--protocol", "unstructured", "--criterion", "hrank"], "single weights. It takes magnitude, lamp, "),
        (["--criterion", "magnitude"], "ranks single weights, protocol 'budget' prunes channels. It takes jbr, "),
        (["--protocol", "unstructured", "--criterion", "magnitud"], "did you mean 'magnitude'"),
        (["--data", "imagnet"], "Unknown data 'imagnet'; did you mean 'imagenet'"),
        (["--data", "imagenet"], "pass it as root"),
        (["--data", "fashon_mnist"], "did you mean 'fashion_mnist'"),
        (["--criterion", "jbr_publised"], "did you mean 'jbr_published'"),
        (["--repair", "batchnorm"], "did you mean 'batch_norm'"),
        (["--model", "resnet10x"], "resnet10"),
        (["--model", "test_resnet", "resnet10x"], "resnet10"),  # before the first one's runs
        (["--model", "test_resnet", "test_vit"], "timm cannot make 'test_vit' with"),
        (["--weights", "trained", "--data", "photographs"], "'trained' are there for digits only"),
        (["--weights", "missing.pth"], "weights must be"),
        (["--data", "cifar10"], "torch/cifar10"),
        (["--data", "fashion_mnist"], "pass their folder as root"),
        (["--shard", "3/2"], "--shard must be i/n"),
        (["--images", "0"], "images must be at least 1, got 0"),
        (["--images", "999999"], "digits has 1297 images for calibration, 999999 were asked for"),
        (["--eval-images", "501"], "digits has 500 images for evaluation, 501 were asked for"),
        (["--budgets", "0.5", "1.5"], "macs must satisfy 0 < macs < 1"),
        (["--budgets", "0.0", "--protocol", "unstructured"], "sparsity must satisfy 0 < sparsity < 1"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--device", "nonsense"], "--device 'nonsense' cannot be used: "),
        (["--config", "missing.yaml"], "cannot be read as YAML"),
    ],
)
def test_unknown_names_are_one_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "out", *arguments)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_entry_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("modle: resnet50\n")
    with pytest.raises(ArgumentError, match="did you mean 'model'"):
        plan.configured(path, {})
    path.write_text("- 1\n")
    with pytest.raises(ArgumentError, match="names and values"):
        plan.configured(path, {})


def test_the_command_line_goes_before_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: resnet18\nseeds: 7\nrepair: none\n")
    found = plan.configured(path, {"model": ["test_resnet"], "data": ["digits"]})
    assert (found["model"], found["seeds"], found["repair"]) == (["test_resnet"], [7], ["none"])
    assert {run.protocol.repair for run in plan.runs(found)} == {None}


# --- data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout: train and val, a folder per class; pixels say which class and which part."""
    root = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                grey = 40 + 60 * label + 20 * (part == "val") + number
                Image.new("RGB", (40, 48), (grey, grey, grey)).save(root / part / name / f"{number}.png")
    return root


@pytest.mark.parametrize("name", ["resnet50_imagenet", "deit_small_imagenet"])
def test_configurations_for_imagenet(name: str, pictures: Path, tmp_path: Path) -> None:
    """As they stand, but for a tiny net and few images."""
    config = ROOT / "scripts" / "configs" / f"{name}.yaml"
    real = plan.runs(plan.configured(config, {"data": [str(pictures)]}))
    assert {run.setup.eval_images for run in real} == {10_000}
    tiny = "test_vit" if "deit" in name else "test_resnet"
    arguments = ["--config", str(config), "--data", str(pictures), "--model", tiny, "--weights", "random"]
    arguments += ["--model-arg", "num_classes=3", "--images", "12", "--eval-images", "12", "--workers", "0"]
    lines = run(tmp_path / "out", "--criterion", "taylor", "--budgets", "0.8", "--seeds", "0", base=arguments)
    assert {line["protocol"] for line in lines} == {run.name for run in real}
    assert all(line["accuracy"] is not None for line in lines)


def test_folders_are_read_apart(pictures: Path) -> None:
    model = benchmark.created(
        plan.runs(wanted(model_args={"num_classes": 3, "in_chans": 3}, weights="random"))[0].setup
    )
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
    assert [sources.train_folder(name, name) for name in named] == [None] * len(named)


def test_photographs_for_the_model_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged net sees what the demo shows it, another model its own mean and deviation; without labels."""
    monkeypatch.setattr(sources, "CROPS", 8)
    given = {"model": ["tf_efficientnet_lite0"], "data": ["photographs"], "weights": "packaged", "criterion": ["l1"]}
    model = benchmark.created(plan.runs(wanted(**given, seeds=[0]))[0].setup)
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
        plan.runs(wanted(weights="packaged"))


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
    (only,) = plan.runs(wanted(data=["cifar10"], root=str(tmp_path), weights="random", criterion=["l1"], seeds=[0]))
    model = benchmark.created(only.setup)
    assert benchmark.opened(only.setup) is benchmark.opened(only.setup)  # kept: a setup can be looked up
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
    net = benchmark.created(plan.runs(wanted(weights="random"))[0].setup)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    base = ["--model", "test_resnet", "--data", "fashion_mnist", "--root", str(tmp_path), "--images", "30"]
    base += ["--weights", str(tmp_path / "net.pth")]
    (line,) = run(tmp_path / "out", "--criterion", "l1", "--budgets", "0.8", "--steps", "1", "--seeds", "0", base=base)
    assert (line["images"], line["eval_images"]) == (30, 20)
    assert line["weights"].startswith("sha256:")
    assert line["model_args"] == {"in_chans": 1, "num_classes": 10}


# --- tables and figures ----------------------------------------------------------------------------


def synthetic(path: Path, rows: list[tuple[str, int, float, float]], **more: object) -> pd.DataFrame:
    """Lines of (criterion, seed, share of MACs, accuracy); the parameters are the square of the share."""
    base = {
        **{"model": "m", "weights": "w", "model_args": {}, "data": "d", "protocol": "budget", "kind": "macs"},
        **{"repair": "auto", "steps": None, "options": {}, "images": 8, "eval_images": 8, "batch_size": 4},
        **{"from_dense": True, "budgets": None, "data_digest": None, "labels": False},
        **{"dense_accuracy": 0.9, "dense_macs": 1000, "dense_params": 100, "nonzero": None, "sparsity": None},
        **{"agreement": 1.0, "kl": 0.0, "unrepaired_accuracy": 0.5, "unrepaired_agreement": 0.5, "commit": "c"},
    }
    made = [
        base
        | {"key": f"{number}", "criterion": name, "seed": seed, "budget": round(share, 1), "accuracy": accuracy}
        | {"macs": 1000 * share, "params": 100 * share**2, "scoring_seconds": 3.0, "scorings": 2, **more}
        for number, (name, seed, share, accuracy) in enumerate(rows)
    ]
    common.append(path, made)
    return curves.read([path])


def test_cells_at_equal_macs(tmp_path: Path) -> None:
    rows = [("a", 0, 0.798, 0.8), ("a", 1, 0.8, 0.7), ("a", 0, 0.4, 0.6), ("a", 1, 0.55, 0.5), ("a", 1, 0.35, 0.3)]
    (made,) = table.tables(synthetic(tmp_path / "l", rows), "macs", "accuracy", [0.8, 0.4, 0.36])
    cells = made.cells.set_index("macs")
    assert cells.loc[0.8, "mean"] == pytest.approx(0.75)
    assert cells.loc[0.8, "deviation"] == pytest.approx(0.1 / 2**0.5)
    assert not cells.loc[0.8, "interpolated"]  # 0.798 counts as 0.8
    assert cells.loc[0.4, "mean"] == pytest.approx((0.6 + 0.35) / 2)  # 0.3 + (0.4 - 0.35) / (0.55 - 0.35) * 0.2
    assert cells.loc[0.4, "interpolated"]
    assert np.isnan(cells.loc[0.36, "mean"])  # the first seed ends at 0.4
    whole = pd.read_csv(io.StringIO(table.csv([made], "accuracy")))
    assert whole["mean"].tolist()[:2] == pytest.approx([0.75, 0.475])
    assert whole["fault"].isna().all()
    text = table.markdown([made], "accuracy")
    assert "| a | 75.00 ± 7.07 | ~47.50 ± 17.68 |  |" in text
    assert "interpolated linearly" in text


def test_cells_at_equal_parameters_and_sparsity(tmp_path: Path) -> None:
    rows = [("a", 0, 0.8, 0.8), ("a", 0, 0.5, 0.6)]
    (made,) = table.tables(synthetic(tmp_path / "l", rows), "params", "accuracy", [0.64, 0.25])
    assert made.cells["mean"].tolist() == pytest.approx([0.8, 0.6])
    sparse = synthetic(tmp_path / "s", rows[:1], nonzero=30, sparsity=0.75, kind="sparsity", budget=0.75)
    (made,) = table.tables(sparse, "sparsity", "accuracy", None)
    assert made.cells[["sparsity", "mean"]].to_numpy().tolist() == [[0.75, 0.8]]
    (made,) = table.tables(sparse, None, "accuracy", None)
    assert list(made.cells.columns[:2]) == ["criterion", "sparsity"]
    for show in (table.tables, lambda *args: plot.figure(*args[:3])):
        with pytest.raises(ArgumentError, match="do not change the MACs: pick --at sparsity"):
            show(sparse, "macs", "accuracy", None)
    assert plot.LABEL["sparsity"] in plot.text(sparse, None, "accuracy")
    assert {axes.get_xlabel() for axes in plot.figure(sparse, None, "accuracy").axes} >= {plot.LABEL["sparsity"]}
    (made,) = table.tables(sparse, "params", "accuracy", [0.3, 0.65])  # between it and the dense model
    assert made.cells["mean"].tolist() == pytest.approx([0.85, 0.8])


def test_equal_time(tmp_path: Path) -> None:
    """Budgets of time are met as measured in the run; runs to other budgets are timed when asked to."""
    out = tmp_path / "lines.jsonl"
    few = ("--criterion", "l1", "--budgets", "0.7", "--steps", "1", "--seeds", "0")
    (by_time,) = run(out, "--protocol", "latency", *few)
    assert by_time["kind"] == "latency"
    assert by_time["macs"] < by_time["dense_macs"]
    *_, by_macs = run(out, "--protocol", "budget", "--time", *few)
    rows = curves.read([out])
    for line, share in zip((by_time, by_macs), rows["at_latency"], strict=True):
        assert share == line["latency_ms"] / line["dense_latency_ms"] > 0
    assert [found.cells.columns[1] for found in table.tables(rows, "latency", "accuracy", None)] == ["latency"] * 2
    (untimed,) = run(tmp_path / "untimed.jsonl", "--protocol", "budget", *few)
    assert untimed["latency_ms"] is None
    assert untimed["key"] == by_macs["key"]
    with pytest.raises(ArgumentError, match="nothing about accuracy at latency"):
        table.tables(curves.read([tmp_path / "untimed.jsonl"]), "latency", "accuracy", None)


def test_what_is_not_comparable_is_in_another_table(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    synthetic(tmp_path / "k", [("b", 0, 0.5, 0.6)], images=9, key="x")
    made = table.tables(curves.read([tmp_path / "l", tmp_path / "k"]), "macs", "accuracy", None)
    assert [list(one.cells["criterion"]) for one in made] == [["a"], ["b"]]
    for one in made:
        assert one.notes[-1] == "Not averaged with the other tables of these files, which differ in: images (8, 9)."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dense_accuracy": 0.8, "seed": 1}, r"different dense_accuracy \(0.9, 0.8\).*not averaged"),
        ({"dense_macs": 900, "seed": 1}, "different dense_macs"),
        ({}, "a, seed 0, budget 0.5 was measured twice in the same settings.*not averaged"),
    ],
)
def test_what_would_be_averaged_without_meaning_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    synthetic(tmp_path / "k", [("a", 0, 0.5, 0.7)], key="x", **change)
    frame = curves.read([tmp_path / "l", tmp_path / "k"])
    with pytest.raises(ArgumentError, match=words):
        table.tables(frame, "macs", "accuracy", None)
    with pytest.raises(ArgumentError, match=words):
        plot.figure(frame, "macs", "accuracy")


def test_ways_through_different_budgets_are_not_averaged(tmp_path: Path) -> None:
    """The same budget, reached directly or through another, is in two tables that say so."""
    out = tmp_path / "lines.jsonl"
    paper = ("--protocol", "paper", "--criterion", "random")
    run(out, *paper, "--seeds", "0", "--budgets", "0.7")
    lines = run(out, *paper, "--seeds", "1", "--budgets", "0.7", "0.8")
    assert [line["budgets"] for line in lines] == [[0.7], [0.8, 0.7], [0.8, 0.7]]
    made = table.tables(curves.read([out]), "macs", "accuracy", [0.9])
    assert [one.cells["seeds"].tolist() for one in made] == [[1], [1]]
    assert "through budgets 0.7, 32 calibration" in made[0].title
    assert "through budgets 0.8, 0.7, 32 calibration" in made[1].title
    assert "budgets ([0.7], [0.8, 0.7])" in made[0].notes[-1]


def test_ways_from_the_dense_model_and_from_budget_to_budget_are_not_averaged(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    synthetic(tmp_path / "k", [("a", 1, 0.5, 0.6)], key="x", from_dense=False, budgets=[0.5])
    one, other = table.tables(curves.read([tmp_path / "l", tmp_path / "k"]), "macs", "accuracy", None)
    assert "each budget from the dense model" in one.title
    assert "through budgets 0.5," in other.title


def test_lines_that_do_not_say_their_budgets_are_refused(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    (line,) = common.lines(tmp_path / "l")
    (tmp_path / "l").write_text(json.dumps({name: value for name, value in line.items() if name != "budgets"}) + "\n")
    with pytest.raises(ArgumentError, match=r"older benchmark\.py.*Measure them again"):
        curves.read([tmp_path / "l"])


def test_a_line_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    assert len(curves.read([tmp_path / "l", tmp_path / "l"])) == 1


def test_formats(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in table.FORMATS:
        table.main([str(measured), "--format", form])
        text = capsys.readouterr().out
        assert KNOWN_FAULTS["tp_taylor"][:40] in text
        if form == "csv":
            frame = pd.read_csv(io.StringIO(text))
            assert len(frame) == 4
            lines = [line for line in common.lines(measured) if line["criterion"] == "jbr" and line["budget"] == 0.6]
            assert all(abs(line["macs"] / line["dense_macs"] - 0.6) < 0.2 for line in lines)
        if form == "latex":
            assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
            assert r"tp\_taylor (L) [1]" in text
        if form == "markdown":
            assert "| tp_taylor (L) [1] |" in text


def test_area_is_a_mean_over_the_common_range(tmp_path: Path) -> None:
    rows = [("a", 0, 0.5, 0.5), ("a", 0, 0.2, 0.1), ("b", 0, 0.4, 0.3)]
    frame = synthetic(tmp_path / "l", rows)
    made = curves.areas(frame, "macs", "accuracy")
    low, high = 0.4, 1.0  # b ends at 0.4; the dense model, 0.9, is at 1
    at_low = 0.1 + (0.4 - 0.2) / (0.5 - 0.2) * (0.5 - 0.1)
    first = ((at_low + 0.5) / 2 * 0.1 + (0.5 + 0.9) / 2 * 0.5) / (high - low)
    assert made.loc["a", "area"] == pytest.approx(first)
    assert made.loc["b", "area"] == pytest.approx(0.6)
    assert made.loc["a", "scoring_seconds"] == pytest.approx(1.5)  # 3 seconds for 2 scorings
    assert first > 0.6  # so that
    assert list(made.index) == ["a", "b"]


def test_a_table_with_areas(tmp_path: Path) -> None:
    frame = synthetic(tmp_path / "l", [("worse", 0, 0.5, 0.5), ("better", 0, 0.5, 0.8), ("better", 1, 0.5, 0.6)])
    (only,) = table.tables(frame, "macs", "accuracy", None, area=True)
    shown = table.wide(only, "accuracy").set_index("criterion")
    assert list(shown.index) == ["better", "worse"]
    assert shown.loc["better", ["area", "seeds"]].tolist() == ["80.00 ± 7.07", "2"]  # (.85 + .75) / 2, over 0.5 to 1
    assert shown.loc["worse", ["area", "seeds"]].tolist() == ["70.00", "1"]
    assert any("macs from 0.500 to 1.000" in note for note in only.notes)


def test_the_figure(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot.main([str(measured), "--out", str(tmp_path / "a.png")])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "jbr" in shown.out
    assert "scoring_seconds" in shown.out
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000
    left, middle, right = plot.figure(curves.read([measured]), "macs", "accuracy").axes
    assert left.xaxis_inverted()
    assert {label.get_text() for label in middle.get_yticklabels()} == {"jbr", "tp_taylor"}
    assert right.get_xscale() == "log"


@pytest.mark.parametrize("at", curves.COSTS)
def test_a_figure_at_every_cost(at: str, tmp_path: Path) -> None:
    timed = {"latency_ms": 3.0, "dense_latency_ms": 6.0, "sparsity": 0.4, "nonzero": 60, "kind": "sparsity"}
    timed |= {"kind": "macs"} if at == "macs" else {}
    frame = synthetic(tmp_path / "l", [("a", 0, 0.5, 0.5), ("b", 0, 0.5, 0.6)], **timed)
    left = plot.figure(frame, at, "accuracy").axes[0]
    assert left.get_xlabel() == plot.LABEL[at]
    assert left.xaxis_inverted() == (at != "sparsity")
    assert plot.LABEL[at] in plot.text(frame, at, "accuracy")


@pytest.mark.parametrize("main", [table.main, plot.main])
def test_a_half_line_is_told(
    main: Callable, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "lines.jsonl", ["--out", str(tmp_path / "out.png")]
    half = '{"key": "half a li'
    path.write_text(measured.read_text() + half)
    main([str(path), *out])
    assert (
        capsys.readouterr().err == f"{path}: the last line was cut in the middle ({len(half)} characters); left out.\n"
    )
    path.write_text(measured.read_text().rstrip("\n"))  # whole but for its end of line
    main([str(path), *out])
    assert capsys.readouterr().err == ""
    path.write_text(half)
    with pytest.raises(SystemExit, match=r"no whole line yet\. .*cut in the middle \(18 characters\)"):
        main([str(path), *out])
    path.write_text("")
    with pytest.raises(SystemExit, match=r"no whole line yet\.$"):
        main([str(path), *out])
    path.write_text('{"key": "a", "how": "plain"}\n')
    with pytest.raises(SystemExit, match=r"expected lines written by benchmark\.py"):
        main([str(path), *out])


@pytest.mark.parametrize("main", [table.main, plot.main])
def test_files_that_are_none(main: object, measured: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit, match="There is no file"):
        main([str(tmp_path / "missing"), *out])
    with pytest.raises(SystemExit, match=r"No line of l1; there are jbr, tp_taylor\."):
        main([str(measured), "--criterion", "l1", *out])
    with pytest.raises(SystemExit, match="pick another --at"):
        main([str(measured), "--at", "sparsity", *out])
