"""Saving and loading a pruned model as ``model.safetensors`` + ``jbrprune.json``; never a pickle.

The JSON says how to build the dense model and what is left of each of its tensors. It carries the size and
SHA-256 of the weights and a SHA-256 of itself, so that a truncated or edited file is noticed before anything
is built. These sums protect against accidents, not against somebody who can compute them anew; against that
one, nothing in the files can run code, open another file, or make a layer larger than the dense model's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jbrprune.checkpoint.description import Description, from_bytes, refuse_damage, to_text
from jbrprune.checkpoint.rebuild import CLOSE, check_fits, check_outputs, create_on_meta, fill, split_pairs, take_apart
from jbrprune.data.files import flush
from jbrprune.errors import CheckpointError
from jbrprune.models.preserve import copy_model, first_tensor, unwrap
from jbrprune.report.text import CARD, is_card, make_card
from jbrprune.sparsity.masks import masks_of

WEIGHTS = "model.safetensors"
DESCRIPTION = "jbrprune.json"
HUB = "hf-hub:"

_LARGEST_DESCRIPTION = 64 * 2**20


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    size: Sequence[int] | None = None,
    report: Mapping[str, Any] | None = None,
    card: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a pruned model into a directory of its own, all or nothing.

    For a model that `load` made and that was trained, or given another head; `PruneResult.save` is the same with the
    report of the run.

    A parameter that ``torch.nn.utils.prune`` has masked is stored as the values where its mask is 1, and one bit per
    entry. The values under the mask are not kept: after loading, ``weight_orig`` is 0 there. A floating parameter
    without a mask is stored in the same way if that is smaller, which takes about one zero among 32 values of float32;
    every bit of it comes back, so -0.0, which ``torch.nn.utils.prune.remove`` leaves of a negative weight, is no zero
    here (``weight.add_(0.0)`` makes it one). Anything else is stored as it is.

    A timm model is made again as `load` will make it, and both must compute the same for two images of noise. Where
    they do not, because the model was changed by hand after it was created, or where the model is not timm's, `load`
    needs ``model=``; the file says why, and a warning does. Outputs for these two images are stored, and `load`
    compares them with those of the model it has made.

    Args:
        model: The pruned model, with or without masks; what `torch.compile` or `DistributedDataParallel` has wrapped
            counts, not the wrapper.
        path: The directory; missing parents are created.
        size: Channels, height and width of the images that the outputs are compared on; default: what timm says. Of
            another model nothing is compared without it, which a warning says.
        report: What is known of the pruning, as by ``Report.to_dict``: anything that JSON can hold. That of a saved
            model is ``jbrprune.checkpoint.checkpoint.describe(path).report``.
        card: Write a model card as well, ``README.md``, for the Hugging Face Hub.
        overwrite: Replace a model that was saved there. At every moment `load` finds the old or the new one.

    Raises:
        CheckpointError: The target exists or cannot be written, the model does not run on images of this size or holds
            something that cannot be saved. Nothing is left behind.
        ModelError: A mask of something else than weights and biases, or a shared parameter that is masked in one place
            only.

    Example:
        >>> import tempfile
        >>> from jbrprune.models.timm_models import create
        >>> model = create("resnet10t", pretrained=False, num_classes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/small", size=(3, 32, 32))
        ...     load(f"{folder}/small").num_classes
        3
    """
    target = Path(os.path.realpath(path))
    check_target(target, overwrite=overwrite)
    body, state = take_apart(unwrap(model), size, dict(report or {}))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(parents=True)
        data = safetensors.torch.save(state)
        (temporary / WEIGHTS).write_bytes(data)
        text = to_text(body | {"weights": describe_bytes(data)})
        (temporary / DESCRIPTION).write_text(text, encoding="utf-8")
        if card:
            text = make_card(body["report"], body["recipe"] and body["recipe"]["name"])
            (temporary / CARD).write_text(text, encoding="utf-8")
        for file in temporary.iterdir():
            flush(file)
        _publish(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written: {error}. Free some space, or choose another path."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved model on the CPU, in eval mode, with its masks.

    The files are verified before anything is built, and the dense model is built on the meta device, where it takes no
    memory. No code is read from the files.

    Args:
        path: The directory that `save` wrote, or ``hf-hub:user/name`` (``@revision``) of one on the Hugging Face Hub.
        model: A dense model, without masks, of the architecture that was pruned, for models saved without a
            recipe. It is copied, not changed; its weights do not matter.

    Returns:
        The model; its outputs are those of the model that was saved, which is checked on two images of noise where the
        file holds outputs for them. What was masked is masked again, so that
        pruning can go on, or end with ``jbrprune.make_permanent``. ``pretrained_cfg`` holds the data
        configuration for ``timm.data.resolve_data_config``, `jbrprune.models.timm_models.recipe` reads its recipe.

    Raises:
        CheckpointError: Missing, truncated, tampered with, of an unknown format, not of this architecture, or with
            other outputs than the model that was saved.
    """
    directory = _find(path)
    description = describe(directory)
    state = _read_weights(directory, description)
    if model is None:
        loaded = create_on_meta(description)
    elif masks_of(model):
        raise CheckpointError("load needs a model without masks, it puts the stored ones on: jbrprune.make_permanent.")
    else:
        loaded = copy_model(model)
    split_pairs(loaded, description)
    check_fits(description, loaded)
    fill(loaded, description, state)
    tensor = first_tensor(loaded)
    check_outputs(description, loaded, CLOSE if tensor is None else max(CLOSE, 8 * torch.finfo(tensor.dtype).eps))
    return loaded.eval()


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Check that `save` can write there, before anything expensive.

    Raises:
        CheckpointError: The target exists, is a file, or its parent cannot be written.
    """
    target = Path(os.path.realpath(path))
    there = target if target.exists() else _aside(target)
    if there.exists():
        if not there.is_dir():
            raise CheckpointError(f"{target}: this is a file. A model is saved into a directory: choose another path.")
        names = {entry.name for entry in there.iterdir()}
        if names and not overwrite:
            raise CheckpointError(
                f"{target} exists already. Choose another path, or pass overwrite=True to replace it."
            )
        own_card = CARD in names and is_card((there / CARD).read_text(encoding="utf-8", errors="replace"))
        others = sorted(names - {WEIGHTS, DESCRIPTION} - ({CARD} if own_card else set()))
        if others:
            raise CheckpointError(
                f"{target} holds other files, such as {others[0]!r}, and would be replaced as a whole. "
                "Choose a directory for the model alone."
            )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target}: {parent} is not a directory that can be written. Choose another path.")


def describe(path: str | os.PathLike[str]) -> Description:
    """Read and verify what a saved model's JSON says; the weights are not read.

    Raises:
        CheckpointError: As for `load`.
    """
    directory = _find(path)
    return from_bytes(_read_file(directory / DESCRIPTION, _LARGEST_DESCRIPTION), directory / DESCRIPTION)


def describe_bytes(data: bytes) -> dict[str, Any]:
    """Size and SHA-256 of the weights' file, as the description stores them."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# --- directories ----------------------------------------------------------------------------------


def _aside(target: Path) -> Path:
    """Path of the replaced model between the two renames of `_publish`."""
    return target.with_name(f".{target.name}.jbrprune-previous")


def _publish(directory: Path, target: Path) -> None:
    """Put the finished directory in its place.

    A directory cannot be replaced in one step everywhere, so the old one steps aside first, under a name where
    `load` and the next `save` find it if this process dies in between.
    """
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)  # of a save that died before it removed the old model
        os.replace(target, aside)
    try:
        os.replace(directory, target)
    except BaseException:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _find(path: str | os.PathLike[str]) -> Path:
    """Find the directory to read: by its name, on the hub, or the model that an interrupted save set aside."""
    name = str(path)
    if name.startswith(HUB):
        from huggingface_hub import snapshot_download  # takes longer to import than the rest

        repository, _, revision = name.removeprefix(HUB).partition("@")
        try:
            found = snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, DESCRIPTION])
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name} cannot be fetched: {error} Check the name ({HUB}user/name or {HUB}user/name@revision), the "
                "connection and, for a private model, `huggingface-cli login`."
            ) from error
        return Path(found)
    for directory in (Path(path), _aside(Path(os.path.realpath(path)))):
        if directory.is_dir():
            return directory
    raise CheckpointError(
        f"{path}: there is no such directory. Pass the directory that save wrote; jbrprune.create(name, "
        "checkpoint=file) reads weights from a file."
    )


def _read_file(path: Path, largest: int) -> bytes:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing, or not a regular file. A saved model is a directory with {WEIGHTS} and {DESCRIPTION}."
        )
    try:
        if path.stat().st_size > largest:
            refuse_damage(path, f"{path.stat().st_size} bytes, expected at most {largest}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error}.") from error


def _read_weights(directory: Path, description: Description) -> dict[str, Tensor]:
    """Read the stored tensors; the bytes that are parsed are those whose SHA-256 was compared."""
    path = directory / WEIGHTS
    data = _read_file(path, description.weights["bytes"])
    if describe_bytes(data) != description.weights:
        refuse_damage(path, f"its size or its SHA-256 is not the one in {DESCRIPTION}")
    try:
        state = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        refuse_damage(path, f"not a safetensors file: {error}")
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} != description.entries:
        refuse_damage(path, f"its names, shapes or dtypes are not those in {DESCRIPTION}")
    return state
