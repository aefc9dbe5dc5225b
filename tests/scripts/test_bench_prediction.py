"""The benchmark of predictions: lines of every kind, what is there is not made again, tables."""

from __future__ import annotations

from pathlib import Path

import bench_prediction
import common
import pytest

TINY = ["--model", "test_resnet", "--data", "digits", "--weights", "trained"]
KINDS = {
    "cuts": (["--criteria", "jbr", "taylor", "--ratios", "0.05", "0.5", "0.999"], 4),
    "max_drop": (["--drops", "0.3", "--deciding", "45"], 1),
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prediction")
    for what, (arguments, _) in KINDS.items():
        few = ["--images", "60", "--eval-images", "50", "--threads", "1", "--out", str(folder / what)]
        bench_prediction.main([what, *TINY, *arguments, *few])
    return {what: folder / what for what in KINDS}


@pytest.mark.parametrize("what", KINDS)
def test_every_kind_has_lines_and_a_table(
    what: str, lines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, number = KINDS[what]
    found = common.lines(lines[what])
    assert len(found) == number  # 0.999 is below the floors
    assert {"commit", "command", "threads", "seed", "weights"} <= found[0].keys()
    before = lines[what].read_bytes()
    few = ["--images", "60", "--eval-images", "50", "--out", str(lines[what])]
    bench_prediction.main([what, *TINY, *arguments, *few])
    assert lines[what].read_bytes() == before
    capsys.readouterr()
    figure = ["--plot", str(tmp_path / "a.png")] if what == "cuts" else []
    bench_prediction.main([what, "--table", "--out", str(lines[what]), *figure])
    assert "| --- |" in capsys.readouterr().out
    assert not figure or (tmp_path / "a.png").stat().st_size > 5000


def test_a_prediction_is_of_the_cut_that_is_made(lines: dict[str, Path]) -> None:
    """The smallest cut of a trained net: what is predicted, masked and done is nearly the same."""
    for line in common.lines(lines["cuts"]):
        if line["ratio"] == 0.05:
            assert line["predicted"]["tpv"] == pytest.approx(line["masked"]["tpv"], rel=1.0)
            assert line["test"]["tpv"] == pytest.approx(line["masked"]["tpv"], rel=1.0)


def test_of_a_search_the_drop_is_what_was_allowed(lines: dict[str, Path]) -> None:
    (line,) = common.lines(lines["max_drop"])
    assert line["kept"] < 1
    assert line["search"]["drop"]["lost"] <= 0.3
    assert line["test"]["images"] == 50
    assert line["search"]["drop"]["images"] == 45
