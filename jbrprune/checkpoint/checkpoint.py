"""Saving and loading a pruned model as ``model.safetensors`` + ``jbrprune.json``; never a pickle.

The JSON says how to build the dense model and what is left of each of its tensors. It carries the size and
SHA-256 of the weights and a SHA-256 of itself, so that a truncated or edited file is noticed before anything
is built. These sums protect against accidents, not against somebody who can compute them anew; against that
one, nothing in the files can run code, open another file, or make a layer larger than the dense model's.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jbrprune.checkpoint.description import Description, bitmap_name, from_bytes, tampered, to_text
from jbrprune.checkpoint.hub import fetched, is_snapshot_link
from jbrprune.checkpoint.packing import check_bitmap
from jbrprune.checkpoint.rebuilding import (
    check_fits,
    check_loadable,
    copied,
    created,
    filled,
    stored_masks,
    taken_apart,
)
from jbrprune.data.files import flush, replacing
from jbrprune.errors import ArgumentError, CheckpointError
from jbrprune.models import timm_models
from jbrprune.report.text import CARD, is_card, make_card
from jbrprune.sparsity.masks import put_masks

WEIGHTS = "model.safetensors"
DESCRIPTION = "jbrprune.json"

_LARGEST_DESCRIPTION = 64 * 2**20
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
_PICKLE_MAGIC, _ZIP_MAGIC = b"\x80", b"PK\x03\x04"


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    recipe: timm_models.Recipe | None,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    card: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model into a directory of its own, all or nothing.

    A parameter that ``torch.nn.utils.prune`` has masked is stored as the values where its mask is 1, and one bit per
    entry. The values under the mask are not kept: after loading, ``weight_orig`` is 0 there. A floating parameter
    without a mask is stored in the same way if that is smaller, which takes about one zero among 32 values of float32;
    every bit of it comes back, so -0.0, which ``torch.nn.utils.prune.remove`` leaves of a negative weight, is no zero
    here (``weight.add_(0.0)`` makes it one). Anything else is stored as it is.

    With a recipe, the dense model is created once to make sure that `load` will be able to rebuild this one.

    Args:
        path: The directory; missing parents are created.
        model: The pruned model, with or without masks.
        recipe: How to create the dense model, or None: then `load` needs ``model=``.
        config: timm's data configuration (``timm.data.resolve_data_config``).
        provenance: Anything that JSON can hold.
        report: Anything that JSON can hold.
        card: Write a model card as well, ``README.md``, for the Hugging Face Hub.
        overwrite: Replace a model that was saved there. At every moment `load` finds the old or the new one.

    Raises:
        CheckpointError: The target exists or cannot be written, the model holds something that cannot be saved
            (such as a mask of something else than weight and bias, or a shared parameter that is masked in one
            place only), or the recipe does not lead to it. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    try:
        _recover(target)
        _check_target(target, overwrite)
        body, state = taken_apart(model, recipe, config, provenance, report)
        check_loadable(body)
        with _directory_in_the_making(target) as directory:
            _write(directory, body, state)
            if card:
                write_card(directory)
            _publish(directory, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: could not be written: {error}. Free some space, or choose another path."
        ) from error


def load(
    path: str | os.PathLike[str], *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Rebuild a saved model, in eval mode, with its masks.

    Everything is verified before anything is built. No code is read from the files.

    Args:
        path: The directory that `save` wrote, or ``hf-hub:user/name`` (``@revision``) of one on the Hugging Face Hub.
        model: A dense model, without masks, of the architecture that was pruned, for models saved without a
            recipe. It is copied, not changed; its weights do not matter.
        device: Where the model goes.

    Returns:
        The model; its outputs are those of the model that was saved. What was masked is masked again, so that
        pruning can go on, or end with ``jbrprune.make_permanent``. ``pretrained_cfg`` holds the data
        configuration for ``timm.data.resolve_data_config``, `jbrprune.models.timm_models.recipe` reads its recipe.

    Raises:
        CheckpointError: Missing, truncated, tampered with, a pickle, of an unknown format, or not of this
            architecture.
    """
    device = torch.device(device)
    description, state = _read(fetched(path, (WEIGHTS, DESCRIPTION)))
    dense = created(description.recipe, description) if model is None else copied(model)
    check_fits(description, dense)
    loaded = filled(dense, description, state).to(device).eval()
    # Last: a masked weight is a plain attribute, which .to() would leave behind.
    put_masks(loaded, stored_masks(loaded, description, state))
    return loaded


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """See that `save` could write there, before anything expensive.

    Raises:
        CheckpointError: The target exists, is a file, or its parent cannot be written.
    """
    target = Path(os.path.realpath(path))
    _check_target(target, overwrite)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target}: {parent} is not a directory that can be written. Choose another path.")


def describe(path: str | os.PathLike[str]) -> Description:
    """What a saved model's JSON says, verified; the weights are not read.

    Raises:
        CheckpointError: As for `load`.
    """
    return _read_description(_existing(Path(path)))


def write_card(path: str | os.PathLike[str]) -> Path:
    """Write a model card with the report into the directory of a saved model; returns its path.

    Raises:
        CheckpointError: As for `load`; there is a ``README.md`` that was not made here; it cannot be written.
    """
    directory = _existing(Path(path))
    description = _read_description(directory)
    target = directory / CARD
    if target.exists() and not _is_own_card(target):
        raise CheckpointError(f"{target} was not written by jbrprune: move it away, or add to it by hand.")
    base = None if description.recipe is None else description.recipe.name
    try:
        with replacing(target) as temporary:
            temporary.write_text(make_card(description.report, base), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written: {error}. Free some space, or choose another path."
        ) from error
    return target


# --- writing ------------------------------------------------------------------------------------


def _check_target(target: Path, overwrite: bool) -> None:
    there = target if target.exists() else _aside(target)  # what `_recover` will put back
    if not there.exists():
        return
    if not there.is_dir():
        raise CheckpointError(f"{target}: this is a file. A model is saved into a directory: choose another path.")
    entries = {entry.name for entry in there.iterdir()}
    if entries and not overwrite:
        raise CheckpointError(f"{target} exists already. Choose another path, or pass overwrite=True to replace it.")
    own = {WEIGHTS, DESCRIPTION} | ({CARD} if _is_own_card(there / CARD) else set())
    others = sorted(entries - own)
    if others:
        raise CheckpointError(
            f"{target} holds other files, such as {others[0]!r}, and would be replaced as a whole. "
            "Choose a directory for the model alone."
        )


def _is_own_card(path: Path) -> bool:
    return path.is_file() and is_card(path.read_text(encoding="utf-8", errors="replace"))


@contextlib.contextmanager
def _directory_in_the_making(target: Path) -> Iterator[Path]:
    """A new directory beside the target; whatever is still there at the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write(directory: Path, body: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    weights = directory / WEIGHTS
    safetensors.torch.save_file(dict(state), weights)
    sums = {"bytes": weights.stat().st_size, "sha256": _sha256_of_file(weights)}
    (directory / DESCRIPTION).write_text(to_text({**body, "weights": sums}), encoding="utf-8")
    weights.chmod(stat.S_IMODE((directory / DESCRIPTION).stat().st_mode))  # safetensors ignores the umask
    for path in (weights, directory / DESCRIPTION):
        flush(path)


def _publish(directory: Path, target: Path) -> None:
    """Put the finished directory in its place.

    A directory cannot be replaced in one step everywhere, so the old one steps aside first, under a name where
    `load` and the next `save` find it if this process dies in between.
    """
    aside = _aside(target)
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(directory, target)
    except BaseException:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.jbrprune-previous")


def _recover(target: Path) -> None:
    """Finish what a `save` that died in `_publish` left."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        os.replace(aside, target)
    elif aside.exists():
        shutil.rmtree(aside)


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """Both files, of one and the same model: again if a `save` has put another one in its place meanwhile."""
    for _ in range(_READINGS):
        before = _standing(path)
        try:
            directory = _existing(path)
            description = _read_description(directory)
            return description, _read_weights(directory, description)
        except CheckpointError:
            if _standing(path) == before:
                raise
    raise CheckpointError(f"{path}: it is replaced again and again while it is read. Wait until that is done.")


_READINGS = 100


def _standing(path: Path) -> list[tuple[int, int] | None]:
    """Which directories are there under the two names that a model has while it is replaced."""
    return [_stamp(place) for place in (path, _aside(Path(os.path.realpath(path))))]


def _stamp(place: Path) -> tuple[int, int] | None:
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _existing(path: Path) -> Path:
    """The directory to read, which may have stepped aside for a `save` that died."""
    if path.is_dir():
        return path
    if path.is_file():
        _refuse_pickle(path)
        inside = path.name in (WEIGHTS, DESCRIPTION)
        advice = (
            f"Pass the directory that holds it: {path.parent}." if inside else "Pass the directory that save wrote."
        )
        raise CheckpointError(f"{path}: this is a file. {advice}")
    aside = _aside(Path(os.path.realpath(path)))
    if aside.is_dir():
        return aside
    raise CheckpointError(f"{path}: there is no such directory. Pass the directory that save wrote.")


def _refuse_pickle(path: Path) -> None:
    """By its suffix or its first bytes, without unpickling anything."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, whose first byte may be 0x80, and has a brace at byte 8.
    magic = start.startswith(_ZIP_MAGIC) or (start.startswith(_PICKLE_MAGIC) and start[8:] != b"{")
    if path.suffix.lower() in _PICKLE_SUFFIXES or magic:
        raise CheckpointError(
            f"{path}: this looks like a pickle, which can run code when it is read; it was not. If you trust it, "
            "convert it: load_state_dict(torch.load(path, weights_only=True)) into the model, then save the model here."
        )


def _read_file(directory: Path, name: str, largest: int) -> bytes:
    """One of the two files, whole; a symbolic link may not lead out of the directory."""
    path = directory / name
    try:
        return _whole(path, largest)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error}.") from error


def _whole(path: Path, largest: int) -> bytes:
    if not path.exists():
        raise CheckpointError(f"{path}: missing. A saved model is a directory with {WEIGHTS} and {DESCRIPTION}.")
    real = Path(os.path.realpath(path))
    if real.parent != Path(os.path.realpath(path.parent)) and not is_snapshot_link(path, real):
        raise CheckpointError(
            f"{path}: a link that leads out of the directory, to {real}. Copy the file there instead."
        )
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file.")
    _refuse_pickle(real)
    if real.stat().st_size > largest:
        tampered(path, f"{real.stat().st_size} bytes, expected at most {largest}")
    return real.read_bytes()


def _read_description(directory: Path) -> Description:
    return from_bytes(_read_file(directory, DESCRIPTION, _LARGEST_DESCRIPTION), directory / DESCRIPTION)


def _read_weights(directory: Path, description: Description) -> dict[str, Tensor]:
    """The stored tensors: the bytes that are parsed are those whose SHA-256 was compared."""
    path = directory / WEIGHTS
    data = _read_file(directory, WEIGHTS, description.size)
    if len(data) != description.size:
        tampered(path, f"{len(data)} bytes instead of {description.size}")
    if hashlib.sha256(data).hexdigest() != description.sha256:
        tampered(path, f"its SHA-256 is not the one in {DESCRIPTION}")
    try:
        state = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        tampered(path, f"not a safetensors file: {error}")
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    if stored != description.entries:
        tampered(path, f"its names, shapes or dtypes are not those in {DESCRIPTION}")
    for name, info in description.tensors.items():
        if info.values is not None:
            _check_packed(path, name, state[bitmap_name(name)], math.prod(info.shape), info.values)
    return state


def _check_packed(path: Path, name: str, bitmap: Tensor, entries: int, values: int) -> None:
    try:
        check_bitmap(bitmap, entries, values)
    except ArgumentError as error:
        tampered(path, f"{name}: {error}")
