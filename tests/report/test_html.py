"""The report as a page: well-formed, self-contained, escaped, and with the numbers of the run."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from jbrprune import Report
from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement
from jbrprune.evaluation.latency import Latency
from jbrprune.report.charts import HEIGHT, WIDTH, Series, line_chart
from jbrprune.report.records import LayerRow, Size, StepRow

VOID = {"meta", "i", "br"}


def report(**changes: object) -> Report:
    steps = tuple(
        StepRow(n, share, int(1000 * share), int(500 * share), 1.5, Agreement(50, a - 0.1, 1.0, 0.2),
                Agreement(50, a, 1.0, 0.1), "batch_norm", relative_latency=share + 0.1)
        for n, share, a in ((1, 0.8, 0.98), (2, 0.5, 0.9))
    )  # fmt: skip
    full = Report(
        model="net",
        budget={"macs": 0.5},
        settings={"round_to": 8, "repair": ["batch_norm"]},
        dense=Size(1000, 500, 2000, Latency(8.0, 0.2, 9, 1, 1, "cpu")),
        pruned=Size(500, 250, 1000, Latency(5.0, 0.2, 9, 1, 1, "cpu")),
        layers=(LayerRow("a.conv1", "Conv2d", "channel", 64, 16), LayerRow("a.conv2", "Conv2d", "channel", 64, 64)),
        steps=steps,
        unrepaired=Agreement(200, 0.8, 0.9, 0.3, 0.75, 0.9),
        repaired=Agreement(200, 0.9, 0.95, 0.1, 0.85, 0.9),
        heldout="a fifth",
        seconds={"total": 12.0},
        provenance={"versions": {"torch": "2"}, "seed": 0},
        notes=("A note.",),
    )
    return dataclasses.replace(full, **changes)


class Tags(HTMLParser):
    """Every tag that opens is closed; collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    page = report().to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    text = " ".join(parsed(page).text)
    for said in ("50.0 %", "1.60 times", "90.0 %", "85.0 %", "a.conv1", "batch_norm", "a fifth", "A note.", "torch 2"):
        assert said in text, said
    widths = [value for _, name, value in parsed(page).attributes if name == "style"]
    assert widths == ["width:25.0%", "width:100.0%"]
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = report().to_html()
    tags = parsed(page)
    assert not {name for _, name, _ in tags.attributes} & {"src", "href", "onload", "onclick", "action"}
    assert "<script" not in page
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in tags.attributes


def test_what_comes_from_outside_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    wild = report(
        model=evil,
        budget={evil: evil},
        settings={evil: [evil]},
        layers=(LayerRow(evil, evil, evil, 4, 2),),
        heldout=evil,
        provenance={evil: {evil: evil}},
        notes=(evil,),
        steps=(dataclasses.replace(report().steps[0], repair=evil),),
        seconds={evil: 1.0},
    )
    page = wild.to_html()
    assert "<script" not in page
    assert evil in "".join(parsed(page).text)


SECTIONS = ("Cost", "Agreement with the dense model", "What was measured, step by step", "Widths", "Steps", "Settings",
            "Provenance", "Notes")  # fmt: skip
MISSING: dict[str, tuple[dict[str, object], set[str], dict[str, str]]] = {
    "empty": (
        {"steps": (), "layers": (), "unrepaired": None, "repaired": None, "notes": (), "provenance": {}},
        {"Agreement with the dense model", "What was measured, step by step", "Widths", "Steps", "Notes"},
        {"of the multiply-accumulates kept": "50.0 %", "of the parameters kept": "50.0 %", "as fast": "1.60 times"},
    ),
    "nothing pruned": (
        {"repaired": None, "dense": Size(1000, 500, 2000), "pruned": Size(1000, 500, 2000)},
        set(),
        {"of the multiply-accumulates kept": "100.0 %", "top-1 agreement on 200": "80.0 %", "as fast": ""},
    ),
    "nothing known": (
        {"unrepaired": Agreement(0, math.nan, math.nan, math.nan), "repaired": None},
        set(),
        {"top-1 agreement on 0": "-"},
    ),
    "no parameters": (
        {"dense": Size(10, 0, 0), "pruned": Size(10, 0, 0, nonzero=5)},
        set(),
        {"of the parameters kept": "-", "of the multiply-accumulates kept": "100.0 %"},
    ),
    "single weights": (
        {"layers": (LayerRow("w", "Linear", "weight", 100, 30),), "pruned": Size(1000, 500, 2000, nonzero=30),
         "dense": Size(1000, 500, 2000, nonzero=100)},
        set(),
        {"of the weights are zero": "70.0 %", "of the multiply-accumulates kept": "100.0 %"},
    ),
}  # fmt: skip
"""What a report lacks, the sections that its page lacks, and what some tiles say ("": there is none)."""


@pytest.mark.parametrize("case", MISSING)
def test_parts_may_be_missing(case: str) -> None:
    """What is not there has no section, and no number is made up for it."""
    changes, absent, tiles = MISSING[case]
    page = report(**changes).to_html()
    assert parsed(page).text
    assert not re.search(r"\bnan\b", page, re.I)
    found = re.findall(r"<h2>(.*?)</h2>", page)
    assert found == [name for name in SECTIONS if name not in absent]
    shown = {label: value for value, label in re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>', page)}
    for start, value in tiles.items():
        assert [v for label, v in shown.items() if label.startswith(start)] == ([value] if value else [])


def test_a_prediction_is_drawn_beside_what_was_measured() -> None:
    table = pd.DataFrame(
        {"macs": [0.9, 0.5], "predicted_flips": [0.1, 0.4], "predicted_flips_repaired": [0.0, math.nan]}
    )
    page = report().to_html(predicted=table)
    assert "predicted, without repair" in page
    assert "predicted, with repair" in page
    assert "predicted, " not in report().to_html()
    (line,) = re.findall(r'<g class="foreseen"><polyline points="([^"]*)"', page)
    assert len(line.split()) == 2


def test_a_prediction_of_something_else_is_refused() -> None:
    table = pd.DataFrame({"macs": [0.5], "predicted_flips": [0.4]})
    weights = report(dense=Size(1000, 500, 2000, nonzero=100), pruned=Size(1000, 500, 2000, nonzero=30))
    with pytest.raises(ArgumentError, match="this is a report on single weights"):
        weights.to_html(predicted=table)
    with pytest.raises(ArgumentError, match=r"needs the columns 'macs' and .*; got a, b"):
        report().to_html(predicted=pd.DataFrame({"a": [], "b": []}))


# --- charts --------------------------------------------------------------------------------------


def test_points_are_where_they_belong() -> None:
    chart = line_chart([Series("a", "measured", ((100.0, 100.0), (50.0, 0.0), (75.0, math.nan)))], "x", "y")
    (points,) = re.findall(r'polyline points="([^"]*)"', chart)
    (left, top), (right, bottom) = (map(float, point.split(",")) for point in points.split())
    assert 0 < left < right < WIDTH  # the cost falls from left to right
    assert 0 < top < bottom < HEIGHT
    middle = re.search(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">75<', line_chart(
        [Series("a", "measured", ((100.0, 1.0), (75.0, 1.0)))], "x", "y"
    ))  # fmt: skip
    assert middle is not None


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart([], "x", "y") == ""
    assert line_chart([Series("a", "measured", ((math.nan, 1.0),))], "x", "y") == ""
    assert "&lt;b&gt;" in line_chart([Series("<b>", "measured", ((100.0, 1.0),))], "x", "y")
