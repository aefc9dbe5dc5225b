"""Saving and loading a pruned model as ``model.safetensors`` + ``jbrprune.json``; never a pickle.

The JSON says how to build the dense model and what is left of each of its tensors. It carries the size and
SHA-256 of the weights and a SHA-256 of itself, so that a truncated or edited file is noticed before anything
is built. These sums protect against accidents, not against somebody who can compute them anew; against that
one, nothing in the files can run code, open another file, or make a layer larger than the dense model's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jbrprune import zoo
from jbrprune.architectures import refuse_masked
from jbrprune.errors import CheckpointError, JBRError, ModelError
from jbrprune.guest import same_randomness

FORMAT_VERSION = 1
KNOWN_VERSIONS = (1,)
WEIGHTS = "model.safetensors"
DESCRIPTION = "jbrprune.json"

ATTRIBUTES = frozenset(
    (
        *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "normalized_shape"),
        *("num_channels", "num_groups", "num_embeddings", "embedding_dim", "channels", "num_parameters"),
        *("num_heads", "head_dim", "attn_dim", "head_hidden_size", "embed_dim"),
    )
)
"""Attributes, integers or tuples of integers, that a loaded model may be given."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
}

_FORBIDDEN_ARGUMENTS = frozenset(
    ("model_name", "name", "pretrained", "pretrained_cfg", "checkpoint", "checkpoint_path", "cache_dir")
)
"""Arguments by which creating a model would read a file or the network."""

_LARGEST_DESCRIPTION = 64 * 2**20
_LARGEST_ARGUMENT = 2**20
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
_PICKLE_MAGIC = (b"\x80", b"PK\x03\x04")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of one tensor without reading it.

    Attributes:
        shape: Its shape in the pruned model.
        dtype: Name of its dtype, such as ``float32``.
        persistent: False for a buffer that is not part of ``state_dict()``.
        channels_last: Whether its memory is laid out channels last.
    """

    shape: tuple[int, ...]
    dtype: str
    persistent: bool
    channels_last: bool


@dataclass(frozen=True)
class Description:
    """The contents of ``jbrprune.json``.

    Attributes:
        recipe: How to create the dense model, or None if the user has to.
        tensors: Qualified name -> what is stored under this name.
        aliases: Qualified name -> name under which the same, shared, tensor is stored.
        attributes: Qualified name of a module -> attribute -> integer or tuple of integers.
        data_config: timm's data configuration, or None.
        provenance: Where the model comes from.
        report: What pruning it cost, as by ``Report.to_dict``.
        versions: Package -> version that saved the model.
        size: Bytes of the weights.
        sha256: Of the weights.
    """

    recipe: zoo.Recipe | None
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    data_config: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    size: int
    sha256: str


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    recipe: zoo.Recipe | None,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model into a directory of its own, all or nothing.

    With a recipe, the dense model is created once to make sure that `load` will be able to rebuild this one.

    Args:
        path: The directory; missing parents are created.
        model: The pruned model.
        recipe: How to create the dense model, or None: then `load` needs ``model=``.
        config: timm's data configuration (``timm.data.resolve_data_config``).
        provenance: Anything that JSON can hold.
        report: Anything that JSON can hold.
        overwrite: Replace a model that was saved there. At every moment `load` finds the old or the new one.

    Raises:
        CheckpointError: The target exists or cannot be written, the model is masked or holds something that
            cannot be saved, or the recipe does not lead to it. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    try:
        _recover(target)
        _check_target(target, overwrite)
        body, state = _described(model, recipe, config, provenance, report)
        _check_loadable(body)
        with _directory_in_the_making(target) as directory:
            _write(directory, body, state)
            _publish(directory, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written: {error}. {_advice(error)}") from error


def load(
    path: str | os.PathLike[str], *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Rebuild a saved model, in eval mode.

    Everything is verified before anything is built. No code is read from the files.

    Args:
        path: The directory that `save` wrote.
        model: A dense model of the architecture that was pruned, for models saved without a recipe. It is
            copied, not changed; its weights do not matter.
        device: Where the model goes.

    Returns:
        The model; its outputs are those of the model that was saved. ``pretrained_cfg`` holds the data
        configuration for ``timm.data.resolve_data_config``, ``jbrprune_recipe`` the recipe.

    Raises:
        CheckpointError: Missing, truncated, tampered with, a pickle, of an unknown format, or not of this
            architecture.
    """
    device = torch.device(device)
    directory = _existing(Path(path))
    description = _read_description(directory)
    state = _read_weights(directory, description)
    dense = _created(description.recipe) if model is None else deepcopy(model)
    _check_fits(description, dense)
    return _filled(dense, description, state).to(device).eval()


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


# --- describing a model ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a tensor is kept: ``module._parameters[name]`` or ``module._buffers[name]``."""

    module: nn.Module
    owned: dict[str, Tensor | None]
    name: str
    persistent: bool

    @property
    def tensor(self) -> Tensor:
        tensor = self.owned[self.name]
        assert tensor is not None
        return tensor


def _places(model: nn.Module) -> dict[str, _Place]:
    """Every name of every parameter and buffer; shared ones have several."""
    places = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    persistent = name not in module._non_persistent_buffers_set
                    places[f"{prefix}.{name}" if prefix else name] = _Place(module, owned, name, persistent)  # type: ignore[arg-type]
    return places


def _described(
    model: nn.Module,
    recipe: zoo.Recipe | None,
    config: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON body, without the weights' sums, and the tensors to write."""
    places = _places(model)
    _check_savable(model, places)
    first: dict[int, str] = {}
    aliases = {}
    for name, place in places.items():
        if first.setdefault(id(place.tensor), name) != name:
            aliases[name] = first[id(place.tensor)]
    body = {
        "format": "jbrprune",
        "format_version": FORMAT_VERSION,
        "recipe": None if recipe is None else {"name": recipe.name, "arguments": dict(recipe.arguments)},
        "tensors": {name: _info(places[name]) for name in first.values()},
        "aliases": aliases,
        "attributes": _attributes(model),
        "data_config": None if config is None else dict(config),
        "provenance": dict(provenance or {}),
        "report": dict(report or {}),
        "versions": _versions(),
    }
    return {key: _as_json(value, key) for key, value in body.items()}, {
        name: _writable(places[name].tensor) for name in first.values()
    }


def _info(place: _Place) -> dict[str, Any]:
    tensor = place.tensor
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "persistent": place.persistent,
        "channels_last": _is_channels_last(tensor),
    }


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {}
    for name, module in model.named_modules():
        values = {key: vars(module)[key] for key in sorted(ATTRIBUTES & vars(module).keys())}
        values = {key: value for key, value in values.items() if _is_size(value)}
        if values:
            found[name] = values
    return found


def _is_size(value: object) -> bool:
    """A natural number, or a tuple of such."""
    items = value if isinstance(value, tuple) and value else (value,)
    return all(type(item) is int and item >= 0 for item in items)


def _check_savable(model: nn.Module, places: Mapping[str, _Place]) -> None:
    try:
        refuse_masked(model)
    except ModelError as error:
        raise CheckpointError(f"The model cannot be saved: {error}") from None
    for name, place in places.items():
        tensor = place.tensor
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name}: cannot save a tensor of {tensor.dtype}, {tensor.layout} on device {tensor.device}. "
                f"Convert it to a dense tensor of {', '.join(DTYPES)}."
            )
    other = sorted(model.state_dict().keys() - {name for name, place in places.items() if place.persistent})
    if other:
        raise CheckpointError(
            f"{other[0]}: this entry of state_dict() is neither a parameter nor a buffer and cannot be rebuilt. "
            "Remove the module's extra state or its state_dict hook before saving."
        )


def _writable(tensor: Tensor) -> Tensor:
    """Dense, on the CPU, and alone in its storage: safetensors refuses tensors that overlap."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _as_json(value: object, where: str) -> Any:
    """The value as it will be read back: tuples become lists, keys become strings."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        advice = (
            "Pass recipe=None and rebuild with load(path, model=...)."
            if where == "recipe"
            else "Use strings, finite numbers, lists and dicts."
        )
        raise CheckpointError(f"{where}: JSON cannot hold this: {error}. {advice}") from None


def _versions() -> dict[str, str]:
    found = {}
    for package in ("jbrprune", "timm", "torch", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _check_loadable(body: Mapping[str, Any]) -> None:
    """Better now than when the model is needed."""
    try:
        description = _parsed_body({**body, "weights": {"bytes": 0, "sha256": ""}})
        if description.recipe is not None:
            _check_fits(description, _created(description.recipe))
    except (_WildValue, CheckpointError) as error:
        raise CheckpointError(
            f"The model would not load again: {error} If it was changed after it was created, or its recipe cannot be "
            "stored, save it with recipe=None and rebuild it with load(path, model=...)."
        ) from error


# --- writing ------------------------------------------------------------------------------------


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: this is a file. A model is saved into a directory: choose another path.")
    entries = {entry.name for entry in target.iterdir()}
    if entries and not overwrite:
        raise CheckpointError(f"{target} exists already. Choose another path, or pass overwrite=True to replace it.")
    others = sorted(entries - {WEIGHTS, DESCRIPTION})
    if others:
        raise CheckpointError(
            f"{target} holds other files, such as {others[0]!r}, and would be replaced as a whole. "
            "Choose a directory for the model alone."
        )


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
    whole = {**body, "weights": sums}
    text = json.dumps({**whole, "sha256": _sha256_of_body(whole)}, indent=1, sort_keys=True)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    weights.chmod(stat.S_IMODE((directory / DESCRIPTION).stat().st_mode))  # safetensors ignores the umask
    for path in (weights, directory / DESCRIPTION, directory):
        _flush(path)


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
    _flush(target.parent)
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


def _flush(path: Path) -> None:
    """Wait until the disk has it; not every system can do so for a directory."""
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


def _advice(error: Exception) -> str:
    text = str(error).lower()
    if "no space" in text or "os error 28" in text or "quota" in text:
        return "The disk is full: free some space or choose another path."
    if "denied" in text or "read-only" in text or "not permitted" in text:
        return "Choose a directory that you may write to."
    return "Choose another path."


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of_body(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# --- reading ------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    """The directory to read, which may have stepped aside for a `save` that died."""
    if path.is_dir():
        return path
    if path.exists():
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
        start = file.read(4)
    if path.suffix.lower() in _PICKLE_SUFFIXES or start.startswith(_PICKLE_MAGIC):
        raise CheckpointError(
            f"{path}: this looks like a pickle, which can run code when it is read; it was not. If you trust it, "
            "convert it: load_state_dict(torch.load(path, weights_only=True)) into the model, then save the model here."
        )


def _read_file(directory: Path, name: str, largest: int) -> bytes:
    """One of the two files, whole; a symbolic link may not lead out of the directory."""
    path = directory / name
    if not path.exists():
        raise CheckpointError(f"{path}: missing. A saved model is a directory with {WEIGHTS} and {DESCRIPTION}.")
    real = Path(os.path.realpath(path))
    if real.parent != Path(os.path.realpath(directory)):
        raise CheckpointError(
            f"{path}: a link that leads out of the directory, to {real}. Copy the file there instead."
        )
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file.")
    _refuse_pickle(real)
    if real.stat().st_size > largest:
        _tampered(path, f"{real.stat().st_size} bytes, expected at most {largest}")
    return real.read_bytes()


def _read_description(directory: Path) -> Description:
    path = directory / DESCRIPTION
    try:
        body = _parsed_json(_read_file(directory, DESCRIPTION, _LARGEST_DESCRIPTION), path)
        _check_version(body, path)
        stated = body.pop("sha256", None)
        if stated != _sha256_of_body(body):
            _tampered(path, "its contents do not match its own SHA-256")
        return _parsed_body(body)
    except _WildValue as error:
        raise CheckpointError(f"{path}: {error} It was not written by save and is not used.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error}.") from error


def _parsed_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _tampered(path, f"not valid JSON: {error}")
    if not isinstance(body, dict) or body.get("format") != "jbrprune":
        raise CheckpointError(f"{path}: not the description of a model saved by jbrprune.")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_version(body: Mapping[str, Any], path: Path) -> None:
    version = body.get("format_version")
    if type(version) is not int or version not in KNOWN_VERSIONS:
        known = ", ".join(str(known) for known in KNOWN_VERSIONS)
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this version of jbrprune knows {known}. "
            "Upgrade jbrprune to read it."
        )


def _read_weights(directory: Path, description: Description) -> dict[str, Tensor]:
    """The stored tensors: the bytes that are parsed are those whose SHA-256 was compared."""
    path = directory / WEIGHTS
    try:
        data = _read_file(directory, WEIGHTS, description.size)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error}.") from error
    if len(data) != description.size:
        _tampered(path, f"{len(data)} bytes instead of {description.size}")
    if hashlib.sha256(data).hexdigest() != description.sha256:
        _tampered(path, f"its SHA-256 is not the one in {DESCRIPTION}")
    try:
        state = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        _tampered(path, f"not a safetensors file: {error}")
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    if stored != {name: (info.shape, DTYPES[info.dtype]) for name, info in description.tensors.items()}:
        _tampered(path, f"its names, shapes or dtypes are not those in {DESCRIPTION}")
    return state


def _tampered(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: truncated or tampered with: {what}. Copy it again from where it came from.")


# --- the JSON body, value by value ----------------------------------------------------------------


class _WildValue(Exception):
    """A value of the JSON that `save` never writes."""


def _require(condition: bool, where: str, value: object) -> None:
    if not condition:
        raise _WildValue(f"{where} makes no sense: {str(value)[:80]!r}.")


def _entry(body: Mapping[str, Any], key: str, kind: type[Any], where: str = "") -> Any:
    value = body.get(key)
    _require(type(value) is kind, f"{where}{key}", value)
    return value


def _parsed_body(body: Mapping[str, Any]) -> Description:
    weights = _entry(body, "weights", dict)
    size = _entry(weights, "bytes", int, "weights.")
    _require(size >= 0, "weights.bytes", size)
    tensors = {name: _parsed_tensor(name, info) for name, info in _entry(body, "tensors", dict).items()}
    aliases = _entry(body, "aliases", dict)
    for name, stored in aliases.items():
        _require(isinstance(stored, str) and stored in tensors and name not in tensors, f"aliases.{name}", stored)
    return Description(
        recipe=_parsed_recipe(body.get("recipe")),
        tensors=tensors,
        aliases=aliases,
        attributes={name: _parsed_attributes(name, v) for name, v in _entry(body, "attributes", dict).items()},
        data_config=_parsed_config(body.get("data_config")),
        provenance=_entry(body, "provenance", dict),
        report=_entry(body, "report", dict),
        versions=_entry(body, "versions", dict),
        size=size,
        sha256=_entry(weights, "sha256", str, "weights."),
    )


def _parsed_tensor(name: str, info: object) -> TensorInfo:
    _require(type(info) is dict, f"tensors.{name}", info)
    assert isinstance(info, dict)
    where = f"tensors.{name}."
    shape = tuple(_entry(info, "shape", list, where))
    _require(_is_size(shape or 0), f"{where}shape", shape)
    dtype = _entry(info, "dtype", str, where)
    _require(dtype in DTYPES, f"{where}dtype", dtype)
    flags = (_entry(info, "persistent", bool, where), _entry(info, "channels_last", bool, where))
    _require(not flags[1] or len(shape) == 4, f"{where}channels_last", flags[1])
    return TensorInfo(shape, dtype, *flags)


def _parsed_attributes(module: str, values: object) -> dict[str, int | tuple[int, ...]]:
    where = f"attributes.{module}"
    _require(type(values) is dict, where, values)
    assert isinstance(values, dict)
    parsed = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        _require(name in ATTRIBUTES, where, name)
        _require(_is_size(value), f"{where}.{name}", value)
        parsed[name] = value
    return parsed


def _parsed_recipe(recipe: object) -> zoo.Recipe | None:
    if recipe is None:
        return None
    _require(type(recipe) is dict, "recipe", recipe)
    assert isinstance(recipe, dict)
    name = _entry(recipe, "name", str, "recipe.")
    # No colon, no slash: timm would read a file or the network.
    _require(re.fullmatch(r"\w[\w.-]{0,200}", name, re.ASCII) is not None, "recipe.name", name)
    arguments = _entry(recipe, "arguments", dict, "recipe.")
    for key, value in arguments.items():
        _require(key.isidentifier() and key not in _FORBIDDEN_ARGUMENTS, "recipe.arguments", key)
        _check_argument(value, f"recipe.arguments.{key}")
    overlay = arguments.get("pretrained_cfg_overlay", {})
    _require(type(overlay) is dict, "recipe.arguments.pretrained_cfg_overlay", overlay)
    _check_config({key: value for key, value in overlay.items() if key != "fixed_input_size"}, "recipe.arguments.")
    return zoo.Recipe(name, arguments)


def _check_argument(value: object, where: str) -> None:
    """No number so large that building the dense model would exhaust the machine."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _check_argument(part, where)
    if isinstance(value, int | float):
        _require(abs(value) <= _LARGEST_ARGUMENT, where, value)


def _parsed_config(config: object) -> dict[str, Any] | None:
    """Only the keys of timm's data configuration, with values that a transform can use."""
    if config is None:
        return None
    _require(type(config) is dict, "data_config", config)
    assert isinstance(config, dict)
    _check_config(config, "data_config.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _check_config(config: Mapping[str, object], where: str) -> None:
    for key, value in config.items():
        _require(key in _CONFIG and _CONFIG[key](value), where + key, value)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", value) is not None


def _is_image_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 < v <= 2**16 for v in value)


def _is_statistics(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 2**16 and all(_is_number(v) for v in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < value <= 10  # type: ignore[operator]


_CONFIG = {
    "input_size": _is_image_size,
    "interpolation": _is_word,
    "mean": _is_statistics,
    "std": _is_statistics,
    "crop_pct": _is_share,
    "crop_mode": _is_word,
}


# --- rebuilding ---------------------------------------------------------------------------------


def _created(recipe: zoo.Recipe | None) -> nn.Module:
    if recipe is None:
        raise CheckpointError(
            "This model was saved without a recipe (it was not created by name). Create the dense model and pass it: "
            "load(path, model=...)."
        )
    try:
        with same_randomness(torch.device("cpu")):
            return zoo.build(recipe)
    except (JBRError, RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"The dense model {recipe.name!r} with {dict(recipe.arguments)} could not be created: {error} "
            f"Installed: {_versions()}."
        ) from error


def _check_fits(description: Description, dense: nn.Module) -> None:
    """Every stored tensor has its place in the dense model, and none is larger than there."""
    places = _places(dense)
    stored = {name: description.tensors[description.aliases.get(name, name)] for name in _names(description)}
    missing, unknown = sorted(places.keys() - stored.keys()), sorted(stored.keys() - places.keys())
    if missing or unknown:
        raise CheckpointError(
            f"This is not the architecture that was saved: the dense model has {_few(missing)} and lacks "
            f"{_few(unknown)}. Saved with {dict(description.versions)}, installed are {_versions()}."
        )
    for name, info in stored.items():
        place = places[name]
        shape = tuple(place.tensor.shape)
        smaller = len(shape) == len(info.shape) and all(a <= b for a, b in zip(info.shape, shape, strict=True))
        alike = place.persistent == info.persistent and _kind(place.tensor.dtype) == _kind(DTYPES[info.dtype])
        if not smaller or not alike:
            raise CheckpointError(
                f"{name}: stored as {info.dtype} of shape {info.shape}, but the dense model has {place.tensor.dtype} "
                f"of shape {shape}. Pruning only makes tensors smaller: this is not the model that was saved."
            )
    _check_attributes(description, dense)


def _check_attributes(description: Description, dense: nn.Module) -> None:
    modules = dict(dense.named_modules())
    for name, values in description.attributes.items():
        if name not in modules:
            raise CheckpointError(
                f"attributes: the dense model has no module {name!r}. It is not the one that was saved."
            )
        for attribute, value in values.items():
            before = vars(modules[name]).get(attribute)
            if not _is_size(before) or not _at_most(value, before):
                raise CheckpointError(
                    f"{name}.{attribute}: stored as {value}, but the dense model has {before}. Pruning only makes "
                    "layers smaller: this is not the model that was saved."
                )


def _at_most(value: int | tuple[int, ...], limit: Any) -> bool:
    if isinstance(value, tuple) and isinstance(limit, tuple):
        return len(value) == len(limit) and all(a <= b for a, b in zip(value, limit, strict=True))
    return isinstance(value, int) and isinstance(limit, int) and value <= limit


def _filled(dense: nn.Module, description: Description, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the dense model the stored shapes, attributes and values."""
    made: dict[str, Tensor] = {}
    places = _places(dense)
    for name, place in places.items():
        stored = description.aliases.get(name, name)
        if stored not in made:
            made[stored] = _empty_like(place.tensor, description.tensors[stored])
        place.owned[place.name] = made[stored]
    modules = dict(dense.named_modules())
    for name, values in description.attributes.items():
        for attribute, value in values.items():
            setattr(modules[name], attribute, value)
    whole = {name: state[description.aliases.get(name, name)] for name in _names(description)}
    dense.load_state_dict({name: tensor for name, tensor in whole.items() if places[name].persistent}, strict=True)
    for name, place in places.items():
        if not place.persistent:
            place.tensor.copy_(whole[name])
    _attach(dense, description)
    return dense


def _empty_like(tensor: Tensor, info: TensorInfo) -> Tensor:
    layout = torch.channels_last if info.channels_last else torch.contiguous_format
    empty = torch.empty(info.shape, dtype=DTYPES[info.dtype], memory_format=layout)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _attach(model: nn.Module, description: Description) -> None:
    """What timm and the next `save` look for on the model."""
    if description.recipe is not None:
        model.jbrprune_recipe = description.recipe  # type: ignore[assignment]
    if description.data_config is not None:
        old = getattr(model, "pretrained_cfg", None) or {}
        # Sizes for testing would win over the stored ones where a caller asks for them.
        kept = {key: value for key, value in dict(old).items() if key not in ("test_input_size", "test_crop_pct")}
        model.pretrained_cfg = model.default_cfg = kept | dict(description.data_config)  # type: ignore[assignment]


def _names(description: Description) -> list[str]:
    return [*description.tensors, *description.aliases]


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])} ({len(names)} in all)" if names else "nothing"
