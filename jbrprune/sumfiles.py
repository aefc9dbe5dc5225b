"""Files of sums: a header and tensors in one safetensors file, written atomically and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jbrprune.atomic import replacing
from jbrprune.errors import CheckpointError

FORMAT = 1


def write(path: str | Path, kind: str, header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write one file of scores of ``kind`` (``units`` or ``weights``)."""
    # safetensors refuses tensors that share memory, as the members of a layer's own channels do.
    alone = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    whole = {"format": FORMAT, "kind": kind, **header}
    with replacing(path) as temporary:
        save_file(alone, temporary, metadata={"jbrprune": json.dumps(whole)})


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """Header and tensors of what `write` wrote; what their reader stumbles over in the context is damage, too.

    Raises:
        CheckpointError: The file is missing, damaged, or does not hold scores of this kind in a known format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["jbrprune"])
            found = header.get("kind", "units")  # the first files of units did not say so
            if header["format"] != FORMAT or found != kind:
                raise CheckpointError(
                    f"{path} holds scores of {found} in format {header['format']}; expected scores of {kind} in format "
                    f"{FORMAT}. Use the class that wrote it, or upgrade jbrprune."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield header, tensors
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a file of scores of {kind}, or is damaged ({type(error).__name__}: {error}). Score again."
        ) from error
