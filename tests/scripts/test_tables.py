"""Tables and figures of benchmark lines: cells at equal cost, areas, what is not averaged."""

from __future__ import annotations

import io
from pathlib import Path

import common
import numpy as np
import pandas as pd
import pytest
import tables
from PIL import Image
from runs import run

from baselines.torch_pruning_shipped import KNOWN_FAULTS
from jbrprune.errors import ArgumentError


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
    return tables.read([path])[0]


def test_cells_at_equal_macs(tmp_path: Path) -> None:
    rows = [("a", 0, 0.798, 0.8), ("a", 1, 0.8, 0.7), ("a", 0, 0.4, 0.6), ("a", 1, 0.55, 0.5), ("a", 1, 0.35, 0.3)]
    (made,) = tables.tables(synthetic(tmp_path / "l", rows), "macs", "accuracy", [0.8, 0.4, 0.36])
    cells = made.cells.set_index("macs")
    assert cells.loc[0.8, "mean"] == pytest.approx(0.75)
    assert cells.loc[0.8, "deviation"] == pytest.approx(0.1 / 2**0.5)
    assert not cells.loc[0.8, "interpolated"]  # 0.798 counts as 0.8
    assert cells.loc[0.4, "mean"] == pytest.approx((0.6 + 0.35) / 2)  # 0.3 + (0.4 - 0.35) / (0.55 - 0.35) * 0.2
    assert cells.loc[0.4, "interpolated"]
    assert np.isnan(cells.loc[0.36, "mean"])  # the first seed ends at 0.4
    whole = pd.read_csv(io.StringIO(tables.csv([made], "accuracy")))
    assert whole["mean"].tolist()[:2] == pytest.approx([0.75, 0.475])
    assert whole["departure"].isna().all()
    text = tables.markdown([made], "accuracy")
    assert "| a | 75.00 ± 7.07 | ~47.50 ± 17.68 |  |" in text
    assert "interpolated linearly" in text


def test_cells_at_equal_parameters_and_sparsity(tmp_path: Path) -> None:
    rows = [("a", 0, 0.8, 0.8), ("a", 0, 0.5, 0.6)]
    (made,) = tables.tables(synthetic(tmp_path / "l", rows), "params", "accuracy", [0.64, 0.25])
    assert made.cells["mean"].tolist() == pytest.approx([0.8, 0.6])
    sparse = synthetic(tmp_path / "s", rows[:1], nonzero=30, sparsity=0.75, kind="sparsity", budget=0.75)
    (made,) = tables.tables(sparse, "sparsity", "accuracy", None)
    assert made.cells[["sparsity", "mean"]].to_numpy().tolist() == [[0.75, 0.8]]
    (made,) = tables.tables(sparse, None, "accuracy", None)
    assert list(made.cells.columns[:2]) == ["criterion", "sparsity"]
    for show in (tables.tables, lambda *args: tables.figure(*args[:3])):
        with pytest.raises(ArgumentError, match="do not change the MACs: pick --at sparsity"):
            show(sparse, "macs", "accuracy", None)
    assert {axes.get_xlabel() for axes in tables.figure(sparse, None, "accuracy").axes} >= {tables.COSTS["sparsity"]}
    (made,) = tables.tables(sparse, "params", "accuracy", [0.3, 0.65])  # between it and the dense model
    assert made.cells["mean"].tolist() == pytest.approx([0.85, 0.8])


def test_equal_time(tmp_path: Path) -> None:
    """Every run is timed; a budget of time is met as measured in the run."""
    out = tmp_path / "lines.jsonl"
    few = ("--criterion", "l1", "--budgets", "0.7", "--seeds", "0")
    for protocol in ("latency", "budget"):
        run(out, "--protocol", protocol, *few)
    by_time, by_macs = common.lines(out)
    assert by_time["kind"] == "latency"
    assert by_time["macs"] < by_time["dense_macs"]
    rows = tables.read([out])[0]
    for line, share in zip((by_time, by_macs), rows["at_latency"], strict=True):
        assert share == line["latency_ms"] / line["dense_latency_ms"] > 0
    assert by_time["latency_ms"] <= 0.7 * by_time["dense_latency_ms"]
    assert [found.cells.columns[1] for found in tables.tables(rows, "latency", "accuracy", None)] == ["latency"] * 2
    untimed = synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    with pytest.raises(ArgumentError, match="nothing about accuracy at latency"):
        tables.tables(untimed, "latency", "accuracy", None)


def test_what_is_not_comparable_is_in_another_table(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    synthetic(tmp_path / "k", [("b", 0, 0.5, 0.6)], images=9, key="x")
    made = tables.tables(tables.read([tmp_path / "l", tmp_path / "k"])[0], "macs", "accuracy", None)
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
    frame = tables.read([tmp_path / "l", tmp_path / "k"])[0]
    with pytest.raises(ArgumentError, match=words):
        tables.tables(frame, "macs", "accuracy", None)
    with pytest.raises(ArgumentError, match=words):
        tables.figure(frame, "macs", "accuracy")


def test_ways_through_different_budgets_are_not_averaged(tmp_path: Path) -> None:
    """The same budget, reached directly or through another, is in two tables that say so."""
    out = tmp_path / "lines.jsonl"
    paper = ("--protocol", "paper_cifar", "--criterion", "random")
    run(out, *paper, "--seeds", "0", "--budgets", "0.7")
    lines = run(out, *paper, "--seeds", "1", "--budgets", "0.7", "0.8")
    assert [line["budgets"] for line in lines] == [[0.7], [0.8, 0.7], [0.8, 0.7]]
    made = tables.tables(tables.read([out])[0], "macs", "accuracy", [0.9])
    assert [one.cells["seeds"].tolist() for one in made] == [[1], [1]]
    assert "through budgets 0.7, 32 calibration" in made[0].title
    assert "through budgets 0.8, 0.7, 32 calibration" in made[1].title
    assert "budgets ([0.7], [0.8, 0.7])" in made[0].notes[-1]


def test_ways_from_the_dense_model_and_from_budget_to_budget_are_not_averaged(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    synthetic(tmp_path / "k", [("a", 1, 0.5, 0.6)], key="x", from_dense=False, budgets=[0.5])
    one, other = tables.tables(tables.read([tmp_path / "l", tmp_path / "k"])[0], "macs", "accuracy", None)
    assert "each budget from the dense model" in one.title
    assert "through budgets 0.5," in other.title


def test_a_line_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    synthetic(tmp_path / "l", [("a", 0, 0.5, 0.6)])
    assert len(tables.read([tmp_path / "l", tmp_path / "l"])[0]) == 1


def test_departures_stand_beside_the_numbers(tmp_path: Path) -> None:
    rows = [(name, 0, 0.5, 0.6) for name in ("l1, layer", "random, layer", "taylor", "tp_lamp, raw", "no criterion")]
    text = tables.markdown(tables.tables(synthetic(tmp_path / "l", rows), "macs", "accuracy", [0.5]), "accuracy")
    assert "| l1, layer [1] | 60.00 |" in text
    assert "[1] l1, layer: several producers are summed; the paper follows the shortcut's." in text
    assert "| random, layer | 60.00 |" in text
    assert "[2] taylor: the parameters of producers, norms and consumers count together" in text
    assert f"[3] tp_lamp, raw: {KNOWN_FAULTS['tp_lamp']}" in text
    rows = [("lamp", 0, 0.5, 0.6), ("snip", 0, 0.5, 0.6), ("magnitude", 0, 0.5, 0.6)]
    frame = synthetic(tmp_path / "w", rows, kind="sparsity", sparsity=0.5)
    (table,) = tables.tables(frame, None, "accuracy", [0.5])
    assert table.departures == {
        "lamp": "equal weights share what the paper breaks by their order.",
        "snip": "the net is trained, and all images are one batch.",
    }


def test_formats(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in tables.FORMATS:
        tables.main([str(measured), "--format", form])
        text = capsys.readouterr().out
        assert KNOWN_FAULTS["tp_taylor"][:40] in text
        if form == "csv":
            frame = pd.read_csv(io.StringIO(text))
            assert len(frame) == 4
            lines = [line for line in common.lines(measured) if line["criterion"] == "jbr" and line["budget"] == 0.6]
            assert all(abs(line["macs"] / line["dense_macs"] - 0.6) < 0.2 for line in lines)
        if form == "latex":
            assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
            assert r"tp\_taylor (L) [1]" in text
        if form == "markdown":
            assert "| tp_taylor (L) [1] |" in text


def test_area_is_a_mean_over_the_common_range(tmp_path: Path) -> None:
    rows = [("a", 0, 0.5, 0.5), ("a", 0, 0.2, 0.1), ("b", 0, 0.4, 0.3)]
    frame = synthetic(tmp_path / "l", rows)
    made = tables.areas(frame, "macs", "accuracy")
    low, high = 0.4, 1.0  # b ends at 0.4; the dense model, 0.9, is at 1
    at_low = 0.1 + (0.4 - 0.2) / (0.5 - 0.2) * (0.5 - 0.1)
    first = ((at_low + 0.5) / 2 * 0.1 + (0.5 + 0.9) / 2 * 0.5) / (high - low)
    assert made.loc["a", "area"] == pytest.approx(first)
    assert made.loc["b", "area"] == pytest.approx(0.6)
    assert made.loc["a", "scoring_seconds"] == pytest.approx(1.5)  # 3 seconds for 2 scorings
    assert first > 0.6  # so that
    assert list(made.index) == ["a", "b"]


def test_the_best_way_of_each_criterion(tmp_path: Path) -> None:
    rows = [("a, raw", 0, 0.5, 0.3), ("a, layer", 0, 0.5, 0.4), ("b", 0, 0.5, 0.2)]
    frame = synthetic(tmp_path / "l", rows)
    for metric, kept in (("accuracy", ["a, layer", "b"]), ("kl", ["a, raw", "b"])):
        (made,) = tables.tables(frame.assign(kl=frame["accuracy"]), None, metric, None, best=True)
        assert made.cells["criterion"].unique().tolist() == kept


def test_a_table_with_areas(tmp_path: Path) -> None:
    frame = synthetic(tmp_path / "l", [("worse", 0, 0.5, 0.5), ("better", 0, 0.5, 0.8), ("better", 1, 0.5, 0.6)])
    (only,) = tables.tables(frame, "macs", "accuracy", None, area=True)
    shown = tables.wide(only, "accuracy").set_index("criterion")
    assert list(shown.index) == ["better", "worse"]
    assert shown.loc["better", ["area", "seeds"]].tolist() == ["80.00 ± 7.07", "2"]  # (.85 + .75) / 2, over 0.5 to 1
    assert shown.loc["worse", ["area", "seeds"]].tolist() == ["70.00", "1"]
    assert any("macs from 0.500 to 1.000" in note for note in only.notes)


def test_the_figure(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.main([str(measured), "--area", "--figure", str(tmp_path / "a.png")])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "| jbr |" in shown.out
    assert "| seconds of a scoring |" in shown.out
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000
    (axes,) = tables.figure(tables.read([measured])[0], "macs", "accuracy").axes
    assert axes.xaxis_inverted()
    assert {text.get_text().split()[0] for text in axes.get_legend().get_texts()} == {"jbr", "tp_taylor"}


@pytest.mark.parametrize("at", tables.COSTS)
def test_a_figure_at_every_cost(at: str, tmp_path: Path) -> None:
    timed = {"latency_ms": 3.0, "dense_latency_ms": 6.0, "sparsity": 0.4, "nonzero": 60, "kind": "sparsity"}
    timed |= {"kind": "macs"} if at == "macs" else {}
    frame = synthetic(tmp_path / "l", [("a", 0, 0.5, 0.5), ("b", 0, 0.5, 0.6)], **timed)
    left = tables.figure(frame, at, "accuracy").axes[0]
    assert left.get_xlabel() == tables.COSTS[at]
    assert left.xaxis_inverted() == (at != "sparsity")


def test_a_half_line_is_told(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "lines.jsonl", ["--out", str(tmp_path / "out.png")]
    half = '{"key": "half a li'
    path.write_text(measured.read_text() + half)
    tables.main([str(path), *out])
    assert (
        capsys.readouterr().err == f"{path}: the last line was cut in the middle ({len(half)} characters); left out.\n"
    )
    path.write_text(measured.read_text().rstrip("\n"))  # whole but for its end of line
    tables.main([str(path), *out])
    assert capsys.readouterr().err == ""
    path.write_text(half)
    with pytest.raises(SystemExit, match=r"no whole line yet\. .*cut in the middle \(18 characters\)"):
        tables.main([str(path), *out])
    path.write_text("")
    with pytest.raises(SystemExit, match=r"no whole line yet\.$"):
        tables.main([str(path), *out])
    path.write_text('{"key": "a", "how": "plain"}\n')
    with pytest.raises(SystemExit, match=r"expected lines written by benchmark\.py"):
        tables.main([str(path), *out])


def test_files_that_are_none(measured: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit, match="There is no file"):
        tables.main([str(tmp_path / "missing"), *out])
    with pytest.raises(SystemExit, match=r"No line of l1; there are jbr, tp_taylor\."):
        tables.main([str(measured), "--criterion", "l1", *out])
    with pytest.raises(SystemExit, match="pick another --at"):
        tables.main([str(measured), "--at", "sparsity", *out])
