"""Files that appear under their name whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
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
        flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the disk has a file or directory; not every system can do so for a directory."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def advice_on(error: Exception) -> str:
    """What to do about a file that could not be written."""
    text = str(error).lower()
    if "no space" in text or "os error 28" in text or "quota" in text:
        return "The disk is full: free some space or choose another path."
    if "denied" in text or "read-only" in text or "not permitted" in text:
        return "Choose a directory that you may write to."
    return "Choose another path."
