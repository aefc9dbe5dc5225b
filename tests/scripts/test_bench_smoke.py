"""`make bench-smoke` as it stands in the Makefile, killed in the middle and called again."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("make"), reason="there is no make")]
RUNS, BUDGETS = 8, 3


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """``make bench-smoke`` in an empty directory, by this Python, without an installation."""
    for name in ("scripts", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    installed = tmp_path / "venv" / ".installed"
    installed.touch()
    return ["make", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "-o", str(installed), "bench-smoke",
            f"VENV={tmp_path / 'venv'}"]  # fmt: skip


def test_a_kill_loses_and_doubles_nothing(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "bench-smoke" / "lines.jsonl"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 600
    while len(common.lines(out)) < 2 * BUDGETS + 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # make and what it runs
    process.communicate()
    before = out.read_text()
    assert 2 * BUDGETS < len(common.lines(out)) < RUNS * BUDGETS
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert again.returncode == 0, again.stderr
    assert out.read_text().startswith(before[: before.rindex("\n") + 1])
    found = [(line["criterion"], line["seed"], line["budget"]) for line in common.lines(out)]
    assert len({line["key"] for line in common.lines(out)}) == len(found) == RUNS * BUDGETS
    assert len(set(found)) == RUNS * BUDGETS
    assert f"1/{RUNS}" not in again.stdout  # it had been made
    assert f"{RUNS}/{RUNS}" in again.stdout
    assert "| jbr |" in again.stdout
    assert out.with_name("lines.png").stat().st_size > 10_000
