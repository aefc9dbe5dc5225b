"""What the scripts share: files of JSON lines, arguments, tables of Markdown, the commit."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from jbrprune.errors import ArgumentError, DataError, JBRError
from jbrprune.report.records import plain

# --- files of JSON lines ---------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    """The lines of a file, none if it does not exist; a last line that was not written to its end is left out.

    Raises:
        DataError: Another line is no JSON object.
    """
    if not path.exists():
        return []
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # nobody is in the middle of a line
        return _parse(path, _complete(file.read()))


def done(path: Path, field: str) -> set[str]:
    """Keys of the lines of a file that did not fail.

    Args:
        path: The file.
        field: What all lines have that the calling script writes, and those of others have not.

    Raises:
        DataError: A line is of another script, or no JSON object.
    """
    found = lines(path)
    for number, line in enumerate(found, 1):
        if not {"key", field} <= line.keys():
            raise DataError(
                f"{path}, line {number} is of another script: it has no key or no {field!r}. Choose another --out."
            )
    return {line["key"] for line in found if "failed" not in line}


def append(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Add lines as a whole; cut off a last line that was not written to its end, and say so.

    Several processes may append to one file: it is locked meanwhile. Of lines with a ``key``, one that is there already
    is not added again; a ``failed`` line is added if the last line of its key is not the same failure.

    Raises:
        DataError: Another line is no JSON object.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = file.read()
        complete = _complete(found)
        if len(complete) < len(found):
            print(f"{_say_cut(path, len(found) - len(complete))}; removed.", file=sys.stderr, flush=True)
            file.truncate(len(complete.encode()))
        last = {line["key"]: line.get("failed") for line in _parse(path, complete) if "key" in line}
        new = [r for r in records if (key := r.get("key")) not in last or last[key] not in (None, r.get("failed"))]
        file.write(complete[len(found) :] + "".join(json.dumps(record) + "\n" for record in new))


def mend(path: Path) -> None:
    """Cut off a last line that was not written to its end, and say so: its run will be made again."""
    if path.exists():
        append(path, [])


def describe_cuts(paths: Iterable[Path]) -> list[str]:
    """A sentence for every file whose last line was not written to its end."""
    found = {path: path.read_text() for path in paths}
    sizes = {path: len(text) - len(_complete(text)) for path, text in found.items()}  # -1: only its end of line is not
    return [f"{_say_cut(path, number)}; left out." for path, number in sizes.items() if number > 0]


def _say_cut(path: Path, number: int) -> str:
    return f"{path}: the last line was cut in the middle ({number} characters)"


def _parse(path: Path, text: str) -> list[dict]:
    return [_read_object(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), 1)]


def _read_object(where: str, line: str) -> dict:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} is no JSON object ({error}). Repair it or take it out.") from error


def _complete(text: str) -> str:
    """The text up to the last whole line."""
    head, newline, last = text.rpartition("\n")
    if not last:
        return text
    try:
        json.loads(last)
    except json.JSONDecodeError:
        return head + newline
    return text + "\n"


def key_of(value: object) -> str:
    """What two equal values have in common."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def describe_call() -> dict[str, str]:
    """The commit and the command, which every line holds."""
    return {"commit": commit(), "command": shlex.join(["python", *sys.argv])}


def commit() -> str:
    """Short hash of the commit of these scripts; empty where they are not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


# --- arguments -------------------------------------------------------------------------------------


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the docstring of a script as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def exit_on_error(script: str) -> Iterator[None]:
    """End the script with one sentence where the library refuses something."""
    try:
        yield
    except JBRError as error:
        raise SystemExit(f"{script}: {error}") from error


def keywords(pairs: Iterable[str]) -> dict[str, object]:
    """What an option ``KEY=VALUE``, given any number of times, says; values are JSON where they can be.

    Raises:
        ArgumentError: One is not of that form.
    """
    found: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ArgumentError(f"Arguments must be given as KEY=VALUE, got {pair!r}.")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = None if text == "None" else text
    return found


def use_threads(number: int | None) -> None:
    """So many threads; None: as many as there are.

    Raises:
        ArgumentError: Fewer than one.
    """
    if number is not None:
        check_least("threads", number, 1)
        torch.set_num_threads(number)


def check_least(what: str, number: int | None, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ArgumentError: It is.
    """
    if number is not None and number < least:
        raise ArgumentError(f"{what} must be at least {least}, got {number}.")


# --- tables ----------------------------------------------------------------------------------------


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    grid = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in grid)
