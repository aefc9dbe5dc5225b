"""What the scripts share: files of JSON lines, arguments of the form KEY=VALUE, the commit."""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path


def lines(path: Path) -> list[dict]:
    """The lines of a file, none if it does not exist; a last line that was not written to its end is left out."""
    return [json.loads(line) for line in _complete(path.read_text()).splitlines()] if path.exists() else []


def append(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Add lines as a whole; cut off a last line that was not written to its end.

    Several processes may append to one file: it is locked meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    added = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = file.read()
        complete = _complete(found)
        if len(complete) < len(found):
            file.truncate(len(complete))
        file.write(complete[len(found) :] + added)


def _complete(text: str) -> str:
    head, newline, last = text.rpartition("\n")
    if not last:
        return text
    try:
        json.loads(last)
    except json.JSONDecodeError:
        return head + newline
    return text + "\n"


def parsed(pairs: str) -> dict[str, object]:
    """``a=1,b=x`` -> {"a": 1, "b": "x"}; ``default`` -> {}."""
    return {
        key: value_of(value) for key, _, value in (pair.partition("=") for pair in pairs.split(",")) if key != "default"
    }


def value_of(text: str) -> object:
    """JSON where it is JSON; ``None`` -> None; else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text == "None" else text


def commit() -> str:
    """Short hash of the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
