"""Saved models on the Hugging Face Hub: ``hf-hub:user/name``, or ``hf-hub:user/name@revision``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jbrprune.errors import CheckpointError

PREFIX = "hf-hub:"
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def fetched(path: str | os.PathLike[str], files: Sequence[str]) -> Path:
    """A local directory: the path itself, or a snapshot of what is on the hub, with these files only.

    Args:
        path: A path, or an id with the prefix ``hf-hub:``.
        files: Names of the files to fetch; nothing else is.

    Raises:
        CheckpointError: Not an id, or it cannot be fetched and is not in the cache.
    """
    name = str(path)
    if not name.startswith(PREFIX):
        return Path(path)
    if not _NAME.fullmatch(name.removeprefix(PREFIX)):
        raise CheckpointError(f"{name}: not an id of the hub. Write {PREFIX}user/name or {PREFIX}user/name@revision.")
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    from huggingface_hub import snapshot_download  # takes longer to import than the rest
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} cannot be fetched: {first} Check the name, the connection and, for a private model, "
            "`huggingface-cli login`."
        ) from error


def is_snapshot_link(link: Path, target: Path) -> bool:
    """Whether a link is one that the hub's cache makes: from ``snapshots/REVISION`` to ``blobs`` beside it."""
    snapshot = link.parent
    return snapshot.parent.name == "snapshots" and target.parent == Path(
        os.path.realpath(snapshot.parent.parent / "blobs")
    )
