"""The benchmark from the command line to its lines: runs, resuming, shards."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import benchmark
import common
import numpy as np
import protocols
import pytest
import sources
import tables
import torch
from runs import MEASURED, QUICK, TINY, TINY_VIT, run, setup, wanted
from torch import nn

from jbrprune.demo import digits
from jbrprune.errors import ArgumentError, DataError

ROOT = Path(__file__).parents[2]
NEEDED = (
    *("model", "data", "protocol", "criterion", "budget", "seed", "macs", "params", "accuracy", "dense_accuracy"),
    *("agreement", "kl", "seconds", "scoring_seconds", "images", "eval_images", "versions", "hardware", "threads"),
    *("commit", "command"),
)


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
    tables.main([str(out), "--figure", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_resuming_adds_nothing_and_repairs_a_half_line(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    whole = measured.read_bytes()
    out.write_bytes(whole)
    run(out, *MEASURED)
    assert out.read_bytes() == whole
    rows = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:-1]) + rows[-1][:-40])  # killed while the last line was written
    assert len(common.lines(out)) == 7
    again = run(out, *MEASURED)
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


ROUNDS = 60


def write(path: Path, name: str) -> None:
    """Lines of its own and shared ones, not before the other has begun as well: so that both really write at once."""
    other, until = "ba"["ab".index(name)], time.monotonic() + 60
    for number in range(ROUNDS):
        while number == 1 and time.monotonic() < until and f'"{other}-0-0"' not in path.read_text():
            time.sleep(0.01)
        own = [{"key": f"{name}-{number}-{part}", "text": "x" * (50 * part)} for part in range(3)]
        common.append(path, [*own, {"key": f"shared-{number}"}])
        common.lines(path)  # nobody sees half a line


def test_two_processes_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    writers = [multiprocessing.get_context("fork").Process(target=write, args=(path, name)) for name in "ab"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; there are none that work
        for writer in writers:
            writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    keys = [line["key"] for line in common.lines(path)]
    wanted = {f"{name}-{number}-{part}" for name in "ab" for number in range(ROUNDS) for part in range(3)}
    assert len(keys) == len(set(keys))
    assert set(keys) == wanted | {f"shared-{number}" for number in range(ROUNDS)}
    first = [keys.index(f"{name}-0-0") < keys.index(f"{other}-{ROUNDS - 1}-2") for name, other in ("ab", "ba")]
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


# --- runs ------------------------------------------------------------------------------------------


def test_arguments_of_a_model_that_is_trained_here_and_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vision transformer that is made for 160 pixels is trained on 32, not refused or made without its arguments."""
    some = [part[:64] for part in digits()]
    monkeypatch.setattr("jbrprune.demo.digits", lambda: some)
    given = {"model": ["test_vit"], "weights": "trained", "model_args": {"img_size": 32, "depth": 2}, "seeds": [0]}
    model = benchmark.create(setup(**given, criterion=["random"]))
    assert len(model.blocks) == 2
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_shards_are_disjoint_and_complete() -> None:
    every = wanted(protocol=["budget", "unstructured"], seeds=[0, 1])
    parts = [protocols.shard(every, f"{number}/4") for number in range(1, 5)]
    keys = [key for part in parts for run in part for key in run.keys().values()]
    assert sorted(keys) == sorted(key for run in every for key in run.keys().values())
    assert len(keys) == len(set(keys))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ArgumentError, match="i/n"):
        protocols.shard(every, "0/4")


def test_shards_write_into_one_file(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    common_part = ("--criterion", "l1", "random", *QUICK)
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
    (one,), (other,) = wanted(**base), wanted(**base | change)
    assert not set(one.keys().values()) & set(other.keys().values())


def test_budgets_that_start_from_the_dense_model_stand_alone() -> None:
    def keys(name: str, budgets: list[float]) -> dict[float, str]:
        (only,) = wanted(protocol=[name], budgets=budgets, criterion=["random"], seeds=[0])
        return only.keys()

    assert keys("one_shot", [0.8, 0.6])[0.6] == keys("one_shot", [0.6])[0.6]
    assert keys("budget", [0.8, 0.6])[0.6] != keys("budget", [0.6])[0.6]


def test_the_order_of_budgets_does_not_matter() -> None:
    (one,), (other,) = (
        wanted(budgets=budgets, criterion=["l1"], seeds=[0]) for budgets in ([0.5, 0.9], [0.9, 0.5, 0.9])
    )
    assert one.keys() == other.keys()
    assert list(one.keys()) == [0.9, 0.5]  # as they are reached


def test_data_are_known_by_what_they_are(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(data: str, root: Path | None = None) -> str:
        given = {"data": [data], "root": root and str(root), "criterion": ["l1"], "seeds": [0], "budgets": [0.5]}
        (only,) = wanted(**given)
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
        (only,) = wanted(**given)
        return only.keys()[0.5]

    assert key("a", b"1") == key("b", b"1") != key("c", b"2")


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_every_protocol_runs(name: str, tmp_path: Path) -> None:
    base = TINY_VIT if name.startswith("vit") else TINY
    budgets = ["0.7", "0.5"] if name == "unstructured" else ["0.9", "0.85"]
    criteria = ("--criterion", "jbr_projection", "random")
    lines = run(tmp_path / "out", "--protocol", name, *criteria, "--budgets", *budgets, "--seeds", "3", base=base)
    assert [line["criterion"] for line in lines] == ["jbr_projection"] * 2 + ["random"] * 2
    assert [line["budget"] for line in lines] == ([0.5, 0.7] if name == "unstructured" else [0.9, 0.85]) * 2
    protocol = protocols.PROTOCOLS[name]
    for line in lines:
        assert (line["protocol"], line["kind"]) == (name, protocol.kind)
        assert line["repair"] == protocols.name_repair(protocol.repair)
        assert line["dense_accuracy"] == lines[0]["dense_accuracy"]
        if name == "unstructured":
            assert line["sparsity"] == pytest.approx(line["budget"], abs=1e-4)
            assert line["macs"] == line["dense_macs"]
        elif protocol.kind == "macs":
            assert line["macs"] <= line["budget"] * line["dense_macs"]
    if name.startswith("paper"):
        assert {line["repaired_by"] for line in lines} == {"none"}


def test_the_paper_takes_eighteen_equal_steps() -> None:
    paper, imagenet = (protocols.PROTOCOLS[f"paper_{name}"] for name in ("cifar", "imagenet"))
    assert np.allclose(-np.diff([1.0, *imagenet.budgets]), 0.5 / 18)
    assert (len(imagenet.budgets), imagenet.budgets[-1], imagenet.images, imagenet.batch) == (18, 0.5, 12800, 256)
    chosen = benchmark.choose_criterion(imagenet.known, "jbr_published", 3, imagenet.batch)
    assert (chosen.batch, chosen.seed, chosen.statistic, chosen.threshold) == (256, 3, "batched", 0.9)
    assert np.allclose(-np.diff([1.0, *paper.budgets]), 0.05)
    assert (len(paper.budgets), paper.budgets[-1], paper.steps, paper.images) == (18, 0.1, 1, 6400)
    assert not {"jbr", "jbr_predicted_logit", "jbr_mean_replaced"} & set(paper.criteria)  # not batched


def test_ways_of_ranking_are_compared_in_one_table(tmp_path: Path) -> None:
    """Without `--scope` a line is as it was before there was such an option."""
    lines = run(tmp_path / "out", *QUICK, "--criterion", "l1", "--scope", "global", "layer")
    lines += run(tmp_path / "out", *QUICK, "--criterion", "l1")[2:]
    assert [line["options"] for line in lines] == [{"scope": "global"}, {"scope": "layer"}, {}]
    assert lines[0]["macs"] == lines[2]["macs"] != lines[1]["macs"]
    frame, _ = tables.read([tmp_path / "out"])
    assert frame["criterion"].tolist() == ["l1, global", "l1, layer", "l1"]
    assert len(list(tables.contexts(frame))) == 1
    with pytest.raises(SystemExit, match="scope must be one of global, raw, layer, got 'net'"):
        run(tmp_path / "other", *QUICK, "--criterion", "l1", "--scope", "net")


def test_other_arguments_of_prune_can_be_given(tmp_path: Path) -> None:
    free, rounded = (
        run(tmp_path / "out", *QUICK, "--criterion", "l1", *more)[-1] for more in ([], ["--prune-arg", "round_to=4"])
    )
    assert free["options"] == {}
    assert rounded["options"]["floors"]["round_to"] == 4
    assert rounded["macs"] < free["macs"]
    for argument, reason in (("round=4", "prune-arg 'round'"), ("seed=2", "prune-arg 'seed'"), ("x", "KEY=VALUE")):
        with pytest.raises(SystemExit, match=reason):
            run(tmp_path / "other", *QUICK, "--criterion", "l1", "--prune-arg", argument)


def test_criteria_of_protocols_exist() -> None:
    for protocol in protocols.PROTOCOLS.values():
        assert set(protocol.criteria) <= set(protocol.known)


def test_only_criteria_that_need_labels_see_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def spy(name: str) -> None:
        real = protocols.CRITERIA[name]

        def watched(model: nn.Module, batches: list, groups: list) -> object:
            seen[name] = [batch.labels is not None for batch in batches]
            return real(model, batches, groups)

        monkeypatch.setitem(protocols.CRITERIA, name, watched)

    spy("l1")
    spy("snip")
    run(tmp_path / "out", "--criterion", "l1", "snip", *QUICK)
    assert not any(seen["l1"])
    assert all(seen["snip"])


def test_one_shot_scores_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    real = protocols.CRITERIA["l1"]

    def counted(model: nn.Module, batches: list, groups: list) -> object:
        calls.append(sum(parameter.numel() for parameter in model.parameters()))
        return real(model, batches, groups)

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
        run(out, *criteria, *QUICK, base=TINY_VIT)
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
    arguments = ("--criterion", "l1", "random", *QUICK)
    real = protocols.CRITERIA["l1"]

    def broken(model: nn.Module, batches: list, groups: list) -> object:
        scores = real(model, batches, groups)
        next(iter(scores.values()))[0] = float("nan")
        return scores

    monkeypatch.setitem(protocols.CRITERIA, "l1", broken)
    for _ in range(2):  # the same failure twice is one line
        with pytest.raises(SystemExit, match="1 of 2 runs failed"):
            run(out, *arguments)
    assert [line.get("failed", "")[:14] for line in common.lines(out)] == ["NonFiniteError", ""]
    assert len(tables.read([out])[0]) == 1
    tables.main([str(out)])
    shown = capsys.readouterr()
    assert "| random |" in shown.out
    assert "| l1" not in shown.out
    for text in (shown.out, shown.err):
        assert "Left out, it failed: l1 on test_resnet, budget, seed 0: NonFiniteError" in text
    monkeypatch.setitem(protocols.CRITERIA, "l1", real)
    assert [line["criterion"] for line in run(out, *arguments)] == ["l1", "random", "l1"]
    tables.main([str(out)])
    shown = capsys.readouterr()
    assert "| l1 [1] |" in shown.out
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
    real = benchmark.measure
    monkeypatch.setattr(benchmark, "measure", lambda report: real(report) | {"kl": float("inf")})
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        run(tmp_path / "out", "--criterion", "random", *QUICK)
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
    """One NaN among its weights: every run of it says so, the next model is measured."""
    made = benchmark.create

    def broken(setup: protocols.Setup) -> nn.Module:
        model = made(setup)
        if setup.model == "test_vit":
            next(model.parameters()).data.view(-1)[0] = float("nan")
        return model

    monkeypatch.setattr(benchmark, "create", broken)
    base = ["--model", "test_vit", "test_resnet", "--data", "photographs", "--weights", "random", "--images", "4"]
    monkeypatch.setattr(sources, "CROPS", 8)
    few = ["--eval-images", "2", "--criterion", "l1", "random", "--budgets", "0.8", "--steps", "1", "--seeds", "0"]
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        run(tmp_path / "out", *few, base=base)
    first, second, *others = common.lines(tmp_path / "out")
    assert first["failed"] == second["failed"]
    assert first["failed"].startswith("NonFiniteError: ")
    assert capsys.readouterr().err.count(first["failed"]) == 2
    assert [line["model"] for line in others] == ["test_resnet"] * 2
    assert not any("failed" in line for line in others)


def test_missing_labels_are_found_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CROPS", 8)
    monkeypatch.setattr(benchmark, "compute_logits", lambda *_: pytest.fail("the model ran"))
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
    with pytest.raises(SystemExit, match=r"--device 'cuda' cannot be used: [^\n]*$"):
        run(tmp_path / "out", "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "paper_cifr"], "did you mean 'paper_cifar'"),
        (["--criterion", "tailor"], "did you mean 'taylor'"),
        (
            ["--protocol", "unstructured", "--criterion", "hrank"],
            "'hrank' ranks channels, protocol 'unstructured' prunes",
        ),
        (["--protocol", "unstructured", "--criterion", "hrank"], "single weights. It takes jbr, "),
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
        protocols.configure(path, {})
    path.write_text("- 1\n")
    with pytest.raises(ArgumentError, match="names and values"):
        protocols.configure(path, {})


def test_the_command_line_goes_before_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: resnet18\nseeds: 7\nrepair: none\n")
    found = protocols.configure(path, {"model": ["test_resnet"], "data": ["digits"]})
    assert (found["model"], found["seeds"], found["repair"]) == (["test_resnet"], [7], ["none"])
    assert {run.protocol.repair for run in protocols.list_runs(found)} == {None}


@pytest.mark.parametrize("name", ["resnet50_imagenet", "deit_small_imagenet"])
def test_configurations_for_imagenet(name: str, pictures: Path, tmp_path: Path) -> None:
    """As they stand, but for a tiny net and few images."""
    config = ROOT / "scripts" / "configs" / f"{name}.yaml"
    real = protocols.list_runs(protocols.configure(config, {"data": [str(pictures)]}))
    assert {run.setup.eval_images for run in real} == {10_000}
    tiny = "test_vit" if "deit" in name else "test_resnet"
    arguments = ["--config", str(config), "--data", str(pictures), "--model", tiny, "--weights", "random"]
    arguments += ["--model-arg", "num_classes=3", "--images", "12", "--eval-images", "12", "--workers", "0"]
    few = ["--criterion", "taylor", "--budgets", "0.8", "--steps", "1", "--seeds", "0"]
    lines = run(tmp_path / "out", *few, base=arguments)
    assert {line["protocol"] for line in lines} == {run.name for run in real}
    assert all(line["accuracy"] is not None for line in lines)
