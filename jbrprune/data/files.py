"""Files that are written whole or not at all: under a temporary name, then renamed. Tensors are never pickled."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jbrprune.errors import CheckpointError

FORMAT = 1
CONTENTS = {
    "units": ("scores of units", "Score again."),
    "weights": ("scores of weights", "Score again."),
    "step": ("a step of a run", "Begin the run again in another directory."),
    "model": ("a model of a run", "Begin the run again in another directory."),
}
"""Kind of a file of tensors -> what it holds, and what to do about a damaged one."""

_DAMAGE = (OSError, SafetensorError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file in the same directory, which takes the place of ``path`` if the block succeeds.

    Its permissions are those of any new file (the umask), also where a writer such as safetensors sets its own.

    Args:
        path: The file to write or replace.

    Yields:
        The temporary file, empty; it is gone afterwards, also after an exception.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with replacing(Path(directory) / "note") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     print(os.listdir(directory))
        ['note']
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    temporary.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: Path | None) -> None:
    """Refuse a file that cannot be written, before the expensive part.

    Raises:
        CheckpointError: The path is a directory, or its directory is not there or cannot be written.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
        raise CheckpointError(f"{path} cannot be written: expected a file in a directory that can be written.")


def flush(path: Path) -> None:
    """Wait until the disk holds the contents of a file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_tensors(path: str | Path, kind: str, header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and a header that JSON can hold.

    Args:
        path: The file to write or replace.
        kind: One of `CONTENTS`.
        header: Stored as JSON, beside the kind and the format.
        tensors: Name -> tensor.

    Raises:
        CheckpointError: The file cannot be written; what was there before is still there.
    """
    # safetensors refuses tensors that share memory, as the members of a layer's own channels do.
    alone = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            text = json.dumps({"format": FORMAT, "kind": kind, **header})
            save_file(alone, temporary, metadata={"jbrprune": text})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be written: {error}. Free some space, or choose another path."
        ) from error


@contextmanager
def tensor_file(path: str | Path, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read what `write_tensors` wrote; an error in the block counts as damage of the file as well.

    Args:
        path: The file.
        kind: One of `CONTENTS`.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind or of an unknown format.
    """
    what, advice = CONTENTS[kind]
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["jbrprune"])
            found = header.get("kind", "units")  # the first files of units did not say so
            if header["format"] != FORMAT or found != kind:
                raise CheckpointError(
                    f"{path} holds {CONTENTS.get(found, (found,))[0]} in format {header['format']}; expected {what} in "
                    f"format {FORMAT}. Use the class that wrote it, or upgrade jbrprune."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield header, tensors
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is not a file of {what}, or is damaged ({type(error).__name__}: {error}). {advice}"
        ) from error
