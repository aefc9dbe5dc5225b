"""What the scripts share: files of JSON lines, arguments of the form KEY=VALUE, the commit."""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from jbrprune.errors import ArgumentError, DataError


def lines(path: Path) -> list[dict]:
    """The lines of a file, none if it does not exist; a last line that was not written to its end is left out.

    Raises:
        DataError: Another line is no JSON object.
    """
    if not path.exists():
        return []
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # nobody is in the middle of a line
        return _parsed(path, _complete(file.read()))


def cut(path: Path) -> int:
    """How many characters there are of a last line that was not written to its end."""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        found = file.read()
    return max(0, len(found) - len(_complete(found)))  # a line that lacks its end of line only is whole


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


def use_threads(number: int | None) -> None:
    """So many threads; None: as many as there are.

    Raises:
        ArgumentError: Fewer than one.
    """
    if number is None:
        return
    if number < 1:
        raise ArgumentError(f"threads must be at least 1, got {number}.")
    torch.set_num_threads(number)


def mend(path: Path) -> None:
    """Cut off a last line that was not written to its end, and say so: its run will be made again."""
    if path.exists():
        append(path, [])


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
            print(
                f"{path}: the last line was cut in the middle ({len(found) - len(complete)} characters); removed, all "
                "others are whole.",
                file=sys.stderr,
                flush=True,
            )
            file.truncate(len(complete.encode()))
        last = {line["key"]: line.get("failed") for line in _parsed(path, complete) if "key" in line}
        new = [record for record in records if _is_new(record, last)]
        file.write(complete[len(found) :] + "".join(json.dumps(record) + "\n" for record in new))


def _is_new(record: Mapping[str, object], last: Mapping[str, object]) -> bool:
    """Whether the key is not there, or was there as another failure than this one."""
    key = record.get("key")
    return key not in last or (last[key] is not None and last[key] != record.get("failed"))  # type: ignore[index]


def _parsed(path: Path, text: str) -> list[dict]:
    return [_object(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), 1)]


def _object(where: str, line: str) -> dict:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} is no JSON object ({error}). Repair it or take it out.") from error


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


def keywords(pairs: Iterable[str]) -> dict[str, object]:
    """What ``--model-arg KEY=VALUE``, given any number of times, says.

    Raises:
        ArgumentError: One is not of that form.
    """
    pairs = list(pairs)
    wrong = next((pair for pair in pairs if "=" not in pair), None)
    if wrong is not None:
        raise ArgumentError(f"--model-arg must be KEY=VALUE, got {wrong!r}.")
    return {key: value_of(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def net_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a benchmark that begins with a net trained on Fashion-MNIST."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--checkpoint", type=Path, help="trained weights")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--fashion-mnist", type=Path, help="folder with the IDX files")
    return parser


def value_of(text: str) -> object:
    """JSON where it is JSON; ``None`` -> None; else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text == "None" else text


def commit() -> str:
    """Short hash of the commit of these scripts; empty where they are not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
