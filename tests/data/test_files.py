"""Replacing a file: the old one or the new one, nothing beside it, permissions as for any new file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from jbrprune.checkpoint.checkpoint import DESCRIPTION, WEIGHTS, save
from jbrprune.data.files import replacing


@pytest.mark.parametrize("there", [True, False])
def test_the_new_file_appears_at_the_end(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if there:
        path.write_text("old")
    with replacing(str(path)) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert (path.read_text() if path.exists() else "old") == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_disk_has_the_contents_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves the old file or the new one; the same for every file of a saved model."""
    done: list[object] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert done == [(tmp_path / "file").stat().st_ino, "rename"]

    done.clear()
    save(nn.Linear(1, 1), tmp_path / "model")
    files = [tmp_path / "model" / name for name in (WEIGHTS, DESCRIPTION)]
    assert done.pop() == "rename"
    assert set(done) == {path.stat().st_ino for path in files}


class _Crash(BaseException):
    pass


def _fail(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


@pytest.mark.parametrize("error", [OSError("disk full"), _Crash("disk full")])
def test_a_failure_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error), match="disk full"), replacing(path) as temporary:
        _fail(temporary, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_failure_to_replace_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"), replacing(tmp_path / "directory") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["directory"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask_whatever_the_writer_does(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "scores") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "scores").stat().st_mode & 0o777 == 0o666 & ~umask
