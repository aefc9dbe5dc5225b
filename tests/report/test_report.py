"""The report: what it prints, what it writes, what it draws."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement
from jbrprune.evaluation.latency import Latency, Timings
from jbrprune.report.figures import plot_sweep
from jbrprune.report.records import LayerRow, Report, Size, StepRow
from jbrprune.report.text import format_sweep

UNREPAIRED = Agreement(500, 0.612, 0.81, 0.9, 0.55, 0.914)
REPAIRED = Agreement(500, 0.934, 0.99, 0.1234, 0.86, 0.914)
TIMES = Latency(45.2, 1.2, 30, 8, 1, "cpu"), Latency(26.1, 0.6, 50, 8, 1, "cpu", "thread")


def layers(number: int, unchanged: int = 0) -> tuple[LayerRow, ...]:
    rows = [LayerRow(f"stage.{i}.conv", "Conv2d", "channel", 64, 16 + i % 32) for i in range(number)]
    return tuple(rows + [LayerRow(f"same.{i}", "Linear", "channel", 10, 10) for i in range(unchanged)])


def made(**changes: object) -> Report:
    report = Report(
        model="resnet50",
        budget={"macs": 0.5},
        settings={"objective": "pseudo_label", "images": 512},
        dense=Size(4_089_184_256, 25_557_032, 102_440_000),
        pruned=Size(2_044_592_128, 12_100_000, 48_500_000),
        layers=(LayerRow("layer1.0.conv1", "Conv2d", "channel", 64, 32), LayerRow("fc", "Linear", "channel", 10, 10)),
        steps=(
            StepRow(1, 0.75, 3_066_888_192, 20_000_000, 3.5, UNREPAIRED, REPAIRED, "batchnorm"),
            StepRow(2, 0.5, 2_044_592_128, 12_100_000, 3.0, None, None),
        ),
        unrepaired=UNREPAIRED,
        repaired=REPAIRED,
        heldout="500 images of eval_data",
        seconds={"scoring": 12.0, "repair": 20.5},
        provenance={"torch": "2.15", "seed": 0},
        notes=("A floor of 8 channels was reached in layer1.0.conv1.",),
        timings=Timings(TIMES, (1.0, 0.577), (0.0, 0.01)),
    )
    return dataclasses.replace(report, **changes)


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


# --- text ---------------------------------------------------------------------------------------


def test_text_says_the_numbers():
    text = str(made())
    assert text.splitlines()[0] == "resnet50: 4.09 -> 2.04 GMACs, 50.0 % kept"
    assert lines_with(text, "parameters", "25.6 -> 12.1 M", "47.3 % kept")
    assert lines_with(text, "size", "102.4 -> 48.5 MB", "47.3 % kept")
    assert lines_with(text, "45.2 ± 0.6 -> 26.1 ± 0.3 ms, 57.7 % of the time")
    assert "batch 8, threads 1, cpu, thread clock" in " ".join(text.split())
    assert "within the spread" not in text
    assert lines_with(text, "Agreement with the dense model on 500 images of eval_data")
    assert lines_with(text, "before", "61.2 %", "56.9 - 65.4", "81.0 %", "0.9", "55.0 %")
    assert lines_with(text, "after", "93.4 %", "90.9 - 95.3", "99.0 %", "0.1234", "86.0 %")
    assert lines_with(text, "dense", "100.0 %", "91.4 %")
    assert lines_with(text, "layer1.0.conv1", "Conv2d", "channel", "64", "32", "50.0 %", "#" * 5)
    assert lines_with(text, "fc", "10", "100.0 %")
    assert lines_with(text, "time", "scoring 12.0 s, repair 20.5 s")
    assert lines_with(text, "- A floor of 8 channels")


@pytest.mark.parametrize("number", [1, 40, 41, 200])
def test_text_is_at_most_80_columns_of_plain_text(number, monkeypatch):
    for name, value in {"COLUMNS": "300", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(name, value)
    long = LayerRow("stages." + "deeper." * 30 + "conv", "Conv2d", "channel", 4096, 2048)
    text = str(made(layers=(*layers(number), long), notes=("word " * 90,), settings={"a": "b" * 300}))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert set(text) - {"±"} <= set(map(chr, range(32, 127))) | {"\n"}


def test_forty_layers_are_listed_in_full_and_of_more_those_that_changed():
    assert "not listed" not in str(made(layers=layers(30, 10)))
    text = str(made(layers=layers(52)))
    assert lines_with(text, "Widths, 12 more layers are not listed")
    assert len(lines_with(text, "Conv2d")) == 40
    text = str(made(layers=layers(35, 20)))
    assert lines_with(text, "Widths, 20 more layers are not listed")
    assert not lines_with(text, "same.0")


def test_names_are_not_markup():
    row = LayerRow("blocks[red]:smile:[/red].fc1", "Linear", "channel", 8, 4)
    assert lines_with(str(made(layers=(row,))), "blocks[red]:smile:[/red].fc1")


def test_text_without_what_was_not_measured():
    size, gone = Size(10, 10, 40), {"steps": (), "layers": (), "notes": (), "seconds": {}, "timings": None}
    text = str(made(dense=size, pruned=size, unrepaired=None, repaired=None, **gone))
    assert "latency" not in text
    assert "Agreement" not in text
    assert "\n\n\n" not in text
    assert text.startswith("resnet50: 10.0 -> 10.0 MACs, 100.0 % kept")


def test_text_without_labels_and_without_repair():
    text = str(made(unrepaired=Agreement(500, 0.612, 0.81, 0.9), repaired=None))
    assert "accuracy" not in text
    assert lines_with(text, "before the last repair", "61.2 %")
    assert not lines_with(text, "after the last repair")


def test_latency_within_the_spread_is_said_to_be_so():
    assert "within the spread" in str(made(timings=Timings(TIMES, (1.0, 0.99), (0.0, 0.02))))


# --- JSON ---------------------------------------------------------------------------------------


def test_round_trip_through_json():
    report = made()
    written = json.dumps(report.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(written)) == report
    assert str(Report.from_dict(json.loads(written))) == str(report)


def test_json_carries_the_interval():
    interval = made().to_dict()["repaired"]["interval"]
    assert interval == pytest.approx(list(REPAIRED.interval))


def test_nan_and_foreign_types_become_plain():
    report = made(
        budget={"macs": np.float32(0.5), 3: np.int64(7)},
        settings={"dtype": torch.float32, "t": torch.tensor([1.5, math.nan]), "flag": np.bool_(True), "p": Path("a")},
        provenance={"inf": math.inf, "nested": ({"x": -math.inf},)},
        repaired=dataclasses.replace(REPAIRED, kl=math.nan),
    )
    data = report.to_dict()
    assert data["budget"] == {"macs": 0.5, "3": 7}
    assert data["settings"] == {"dtype": "torch.float32", "t": [1.5, None], "flag": True, "p": "a"}
    assert data["provenance"] == {"inf": None, "nested": [{"x": None}]}
    assert data["repaired"]["kl"] is None
    again = Report.from_dict(json.loads(json.dumps(data, allow_nan=False)))
    assert again.to_dict() == data
    assert lines_with(str(again), "after the last repair", "93.4 %", " - ", "86.0 %")
    assert str(again) == str(report)
    assert " nan" not in str(report)


def test_from_dict_ignores_what_a_newer_version_adds():
    assert Report.from_dict(made().to_dict() | {"colour": "red"}) == made()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("model",), r"report lacks 'model'"),
        (("dense", "macs"), r"report\.dense lacks 'macs'"),
        (("timings", "latencies", 1, "iqr_ms"), r"report\.timings\.latencies\[1\] lacks 'iqr_ms'"),
        (("layers", 1, "after"), r"report\.layers\[1\] lacks 'after'"),
        (("steps", 0, "repaired", "images"), r"report\.steps\[0\]\.repaired lacks 'images'"),
    ],
)
def test_from_dict_names_what_is_missing(path, message):
    data = made().to_dict()
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ArgumentError, match=message):
        Report.from_dict(data)


def test_from_dict_refuses_another_shape():
    with pytest.raises(ArgumentError, match=r"report\.dense must be a mapping.*int"):
        Report.from_dict(made().to_dict() | {"dense": 3})


# --- tables over ratios -------------------------------------------------------------------------


def test_sweep():
    text = format_sweep([made()], "resnet50 on photographs")
    assert text.splitlines()[0] == "resnet50 on photographs"
    assert lines_with(text, "100.0", "4.09 G", "25.6 M", "dense", "91.4", "45.2 ms")
    (row,) = lines_with(text, "50.0", "2.04 G", "12.1 M", "61.2 -> 93.4", "90.9 - 95.3", "0.123", "86.0")
    assert row.endswith(" 57.7")
    assert max(map(len, text.splitlines())) <= 80
    assert "A time above" not in text


def test_a_row_that_is_slower_than_the_dense_model_is_explained():
    text = format_sweep([made(), made(timings=Timings(TIMES, (1.0, 1.07), (0.0, 0.01)))], "t")
    assert lines_with(text, " 107.0")
    assert "A time above 100 % lies within the spread" in " ".join(text.split())


def test_sweep_leaves_out_what_no_report_knows():
    size = Size(1000, 10, 40)
    bare = made(dense=size, pruned=size, unrepaired=Agreement(10, 0.5, 0.5, 0.1), repaired=None, timings=None)
    text = format_sweep([bare], "t")
    heading = "\n".join(text.splitlines()[:6])
    for name in ("accu", "time"):
        assert name not in heading
    assert lines_with(text, " 50.0 ", "23.7 - 76.3")


# --- frame and figures --------------------------------------------------------------------------


def test_to_frame():
    frame = made().to_frame()
    assert list(frame.columns) == ["name", "type", "kind", "before", "after", "kept"]
    assert frame["kept"].tolist() == [0.5, 1.0]
    assert frame["name"].tolist() == ["layer1.0.conv1", "fc"]


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("pandas", lambda: made().to_frame()),
        ("matplotlib.figure", lambda: made().plot()),
        ("matplotlib.figure", lambda: plot_sweep([made()])),
        ("matplotlib.figure", lambda: made().to_html()),
    ],
)
def test_missing_extra_is_named(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs (pandas|matplotlib),.*pip install 'jbrprune\[report\]'"):
        call()


def drawn(axes):
    """Label -> points of every line."""
    return {line.get_label(): np.asarray(line.lines[0].get_xydata()) for line in axes.containers}


def test_plot_shows_kept_shares_and_the_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = tmp_path / "plot.png"
    figure = made().plot(path)
    bars, curve = figure.axes
    assert [bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)] == [100, 100, 50, 100]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["layer1.0.conv1", "fc"]
    lines = drawn(curve)
    np.testing.assert_allclose(lines["before repair, gate images"], [[100, 100], [75, 61.2]])
    np.testing.assert_allclose(lines["after repair, gate images"], [[100, 100], [75, 93.4]])
    np.testing.assert_allclose(lines["final, held-out images, 95 % interval"], [[50, 93.4]], atol=0.01)
    left, right = curve.get_xlim()
    assert left > 100 > 50 > right  # the cost falls from left to right
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["plot.png"]


@pytest.mark.parametrize(("number", "names"), [(0, 0), (30, 30), (61, 0)])
def test_plot_of_many_layers_names_none(number, names):
    bars, _ = made(layers=layers(number)).plot().axes
    assert len([label for label in bars.get_xticklabels() if "stage" in label.get_text()]) == names


def test_plot_without_measurements_says_so():
    axes = made(steps=(), unrepaired=None, repaired=None).plot().axes[-1]
    assert [text.get_text() for text in axes.texts] == ["not measured"]


def test_failed_plot_leaves_nothing_behind(tmp_path):
    (tmp_path / "plot.xyz").write_text("mine")
    with pytest.raises(ValueError, match="xyz"):
        made().plot(tmp_path / "plot.xyz")
    assert os.listdir(tmp_path) == ["plot.xyz"]
    assert (tmp_path / "plot.xyz").read_text() == "mine"


def test_sweep_is_drawn(tmp_path):
    half = Size(1_022_296_064, 1, 1)
    figure = plot_sweep([made(pruned=half), made()], tmp_path / "sweep.svg")
    agreement, accuracy = map(drawn, figure.axes)
    after = [[100, 100], [50, 93.4], [25, 93.4]]
    np.testing.assert_allclose(agreement["after repair"], after, atol=0.01)
    before = [[100, 91.4], [50, 55], [25, 55]]
    np.testing.assert_allclose(accuracy["before repair"], before, atol=0.01)
    assert (tmp_path / "sweep.svg").read_text().startswith("<?xml")


def test_sweep_without_labels_has_one_panel():
    (axes,) = plot_sweep([made(unrepaired=Agreement(10, 0.5, 0.5, 0.1), repaired=None)]).axes
    assert list(drawn(axes)) == ["before repair"]


def test_error_bars_end_at_the_interval():
    (axes, _) = plot_sweep([made(unrepaired=None)]).axes
    (bars,) = axes.containers[0].lines[2]
    ends = bars.get_segments()[1][:, 1]
    np.testing.assert_allclose(ends, [100 * end for end in REPAIRED.interval])
