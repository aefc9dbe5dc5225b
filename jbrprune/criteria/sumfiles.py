"""Files of sums: a header and tensors in one safetensors file, written atomically and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jbrprune.data.atomic import advice_on, replacing
from jbrprune.errors import CheckpointError

FORMAT = 1


def write(path: str | Path, kind: str, header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write one file of ``kind``: scores of ``units`` or ``weights``, or a ``step`` or ``model`` of a run.

    Raises:
        CheckpointError: It cannot be written; what was there before is still there.
    """
    # safetensors refuses tensors that share memory, as the members of a layer's own channels do.
    alone = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    whole = {"format": FORMAT, "kind": kind, **header}
    try:
        with replacing(path) as temporary:
            save_file(alone, temporary, metadata={"jbrprune": json.dumps(whole)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be written: {error}. {advice_on(error)}") from error


@contextmanager
def reading(path: str | Path, kind: str, *, tensors: bool = True) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """Header and tensors of what `write` wrote; what their reader stumbles over in the context is damage, too.

    Args:
        path: The file.
        kind: As in `write`.
        tensors: Read them; else there are none.

    Raises:
        CheckpointError: The file is missing, damaged, or is not of this kind in a known format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["jbrprune"])
            found = header.get("kind", "units")  # the first files of units did not say so
            if header["format"] != FORMAT or found != kind:
                raise CheckpointError(
                    f"{path} holds {_what(found)} in format {header['format']}; expected {_what(kind)} in format "
                    f"{FORMAT}. Use the class that wrote it, or upgrade jbrprune."
                )
            names = list(file.keys()) if tensors else []
            stored = {name: file.get_tensor(name) for name in names}
        yield header, stored
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is not a file of {_what(kind)}, or is damaged ({type(error).__name__}: {error}). {_ADVICE[kind]}"
        ) from error


_DAMAGE = (OSError, SafetensorError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_ADVICE = {
    "units": "Score again.",
    "weights": "Score again.",
    "step": "Begin the run again in another directory.",
    "model": "Begin the run again in another directory.",
}


def _what(kind: str) -> str:
    return f"a {kind} of a run" if kind in ("step", "model") else f"scores of {kind}"
