"""The benchmark of quantization: one line per estimator, none twice, and a table that reads it."""

from __future__ import annotations

from pathlib import Path

import bench_tpv
import common
import pytest


@pytest.mark.filterwarnings("ignore::jbrprune.tpv.TPVWarning")  # random weights
def test_every_estimator_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tpv.jsonl"
    arguments = ["--model", "test_resnet", "--data", "digits", "--weights", "random", "--threads", "1"]
    arguments += ["--images", "24", "--empirical-images", "16", "--draws", "2", "--rtol", "0.5", "--batch-size", "8"]
    for estimators in (["trace"], [], []):
        chosen = ["--estimators", *estimators] if estimators else []
        bench_tpv.main([*arguments, *chosen, "--out", str(out)])
    lines = common.lines(out)
    assert [line["estimator"] for line in lines] == ["trace", "noise", "rounding"]
    for line in lines:
        assert line["ratio"] == pytest.approx(line["train"]["value"] / line["test"]["value"], rel=0.5)
    capsys.readouterr()
    bench_tpv.main(["--out", str(out), "--table"])
    assert capsys.readouterr().out.count("| test_resnet |") == 3
