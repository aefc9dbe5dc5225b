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
from jbrprune.evaluation.agreement import Agreement
from jbrprune.evaluation.latency import Latency, Timings
from jbrprune.report.records import LayerRow, Size, StepRow


def report(**changes: object) -> Report:
    steps = tuple(
        StepRow(n, share, int(1000 * share), int(500 * share), 1.5, Agreement(50, a - 0.1, 1.0, 0.2),
                Agreement(50, a, 1.0, 0.1), "batch_norm", relative_latency=share + 0.1)
        for n, share, a in ((1, 0.8, 0.98), (2, 0.5, 0.9))
    )  # fmt: skip
    times = Latency(8.0, 0.2, 9, 1, 1, "cpu"), Latency(5.0, 0.2, 9, 1, 1, "cpu")
    full = Report(
        model="net",
        budget={"macs": 0.5},
        settings={"round_to": 8, "repair": ["batch_norm"]},
        dense=Size(1000, 500, 2000),
        pruned=Size(500, 250, 1000),
        layers=(LayerRow("a.conv1", "Conv2d", "channel", 64, 16), LayerRow("a.conv2", "Conv2d", "channel", 64, 64)),
        steps=steps,
        unrepaired=Agreement(200, 0.8, 0.9, 0.3, 0.75, 0.9),
        repaired=Agreement(200, 0.9, 0.95, 0.1, 0.85, 0.9),
        heldout="200 images of eval_data",
        seconds={"total": 12.0},
        provenance={"versions": {"torch": "2"}, "seed": 0},
        notes=("A note.",),
        timings=Timings(times, (1.0, 0.625), (0.0, 0.01)),
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
    for said in ("50.0 %", "62.5 % of the time", "90.0 %", "85.0 %", "a.conv1", "batch_norm", "200 images of eval_data",
                 "A note.", "torch=2"):  # fmt: skip
        assert said in text, said
    (figure,) = re.findall(r"<svg.*</svg>", page, re.S)
    ElementTree.fromstring(figure)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = report().to_html()
    tags = parsed(page)
    assert not {name for _, name, _ in tags.attributes} & {"src", "href", "onload", "onclick", "action"}
    links = [value for _, name, value in tags.attributes if name == "xlink:href"]
    links += re.findall(r"url\((.*?)\)", page)
    assert all(link is not None and link.startswith("#") for link in links)
    assert "<script" not in page
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


SECTIONS = ("Cost", "Agreement", "Widths", "Steps", "Provenance", "Notes")
MISSING: dict[str, tuple[dict[str, object], set[str], str]] = {
    "empty": (
        {"steps": (), "layers": (), "unrepaired": None, "repaired": None, "notes": (), "provenance": {}},
        {"Agreement", "Widths", "Steps", "Provenance", "Notes"},
        "1.00 -> 0.50 kMACs, 50.0 % kept",
    ),
    "nothing pruned": ({"repaired": None, "pruned": Size(1000, 500, 2000), "timings": None}, set(), "100.0 % kept"),
    "nothing known": ({"unrepaired": Agreement(0, math.nan, math.nan, math.nan), "repaired": None}, set(), "-"),
    "no parameters": ({"dense": Size(10, 0, 0), "pruned": Size(10, 0, 0, nonzero=5)}, set(), "0.00 -> 0.00, - kept"),
    "single weights": (
        {"layers": (LayerRow("w", "Linear", "weight", 100, 30),), "pruned": Size(1000, 500, 2000, nonzero=30),
         "dense": Size(1000, 500, 2000, nonzero=100)},
        set(),
        "70.0 % of 100 weights are zero",
    ),
}  # fmt: skip
"""What a report lacks, the sections that its page lacks, and something that the page says."""


@pytest.mark.parametrize("case", MISSING)
def test_parts_may_be_missing(case: str) -> None:
    """What is not there has no section, and no number is made up for it."""
    changes, absent, said = MISSING[case]
    page = report(**changes).to_html()
    assert said in " ".join(parsed(page).text)
    assert not re.search(r"\bnan\b", page, re.I)
    found = [name.partition(" ")[0] for name in re.findall(r"<h2>(.*?)</h2>", page)]
    assert found == [name for name in SECTIONS if name not in absent]


def test_a_prediction_is_drawn_beside_what_was_measured() -> None:
    table = pd.DataFrame(
        {"macs": [0.9, 0.5], "predicted_flips": [0.1, 0.4], "predicted_flips_repaired": [0.0, math.nan]}
    )
    lines = {line.get_label(): line for line in report().plot(predicted=table).axes[1].containers}
    assert [label for label in lines if "predicted" in label] == ["predicted, without repair", "predicted, with repair"]
    assert lines["predicted, without repair"].lines[0].get_xydata().tolist() == [[90, 90], [50, 60]]
    assert len(report().to_html(predicted=table)) > len(report().to_html())
    table["predicted_flips_repaired"] = math.nan  # an embedding flips nothing
    lines = {line.get_label() for line in report().plot(predicted=table).axes[1].containers}
    assert "predicted, without repair" in lines
    assert "predicted, with repair" not in lines
