"""The contents of ``jbrprune.json``: how they are written, and the checks that they say nothing else when read.

The JSON carries a SHA-256 of itself, so that a truncated or edited file is noticed. Every value is checked one by
one: no name, argument or number in it can run code, open another file, or exhaust the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from jbrprune.checkpoint.packing import bitmap_bytes
from jbrprune.errors import CheckpointError
from jbrprune.models import timm_models
from jbrprune.models.layers import SIZE_ATTRIBUTES, is_size
from jbrprune.sparsity.masks import KINDS

FORMAT = "jbrprune"
FORMAT_VERSION = 2
KNOWN_VERSIONS = (1, 2)
"""Version 1 knew dense tensors only."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}

_FORBIDDEN_ARGUMENTS = frozenset(
    ("model_name", "name", "pretrained", "pretrained_cfg", "checkpoint", "checkpoint_path", "cache_dir")
)
"""Arguments by which creating a model would read a file or the network."""

_LARGEST_NUMBER = 2**20
_MOST_DIMENSIONS, _LARGEST_TENSOR = 8, 2**60  # the file bounds neither a packed tensor nor an empty one

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of one tensor without reading it.

    Attributes:
        shape: Its shape in the pruned model.
        dtype: Name of its dtype, such as ``float32``.
        persistent: False for a buffer that is not part of ``state_dict()``.
        channels_last: Whether its memory is laid out channels last.
        values: Number of values that are stored, beside one bit per entry, or None if it is stored dense.
        masked: Whether ``torch.nn.utils.prune`` masks it where no value is stored.
    """

    shape: tuple[int, ...]
    dtype: str
    persistent: bool
    channels_last: bool
    values: int | None = None
    masked: bool = False


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

    recipe: timm_models.Recipe | None
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    data_config: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    size: int
    sha256: str

    @property
    def names(self) -> dict[str, str]:
        """Qualified name of every tensor -> name under which it is stored."""
        return {name: name for name in self.tensors} | dict(self.aliases)

    @property
    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name of every tensor in the file of the weights -> its shape and dtype there."""
        found = {}
        for name, info in self.tensors.items():
            found[name] = (info.shape if info.values is None else (info.values,), DTYPES[info.dtype])
            if info.values is not None:
                found[bitmap_name(name)] = ((bitmap_bytes(math.prod(info.shape)),), torch.uint8)
        return found


def bitmap_name(name: str) -> str:
    """Under which a packed tensor's bitmap is stored; no parameter has parameters of its own."""
    return f"{name}.bitmap"


class WildValue(Exception):
    """A value of the JSON that `save` never writes."""


def as_json(value: object, where: str) -> Any:
    """The value as it will be read back: tuples become lists, keys become strings.

    Raises:
        CheckpointError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        advice = (
            "Pass recipe=None and rebuild with load(path, model=...)."
            if where == "recipe"
            else "Use strings, finite numbers, lists and dicts."
        )
        raise CheckpointError(f"{where}: JSON cannot hold this: {error}. {advice}") from None


def checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of a body, whatever its spaces and the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_text(body: Mapping[str, Any]) -> str:
    """What is written into the file: the body with its checksum."""
    return json.dumps({**body, "sha256": checksum(body)}, indent=1, sort_keys=True) + "\n"


def from_bytes(data: bytes, path: Path) -> Description:
    """Verify what was read from the file.

    Args:
        data: Contents of the file.
        path: Its name, for messages.

    Raises:
        CheckpointError: Not JSON, of an unknown format, not what its checksum says, or holding a value that is
            never written.
    """
    body = _parsed_json(data, path)
    version = body.get("format_version")
    if type(version) is not int or version not in KNOWN_VERSIONS:
        known = ", ".join(str(known) for known in KNOWN_VERSIONS)
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this version of jbrprune knows {known}. "
            "Upgrade jbrprune to read it."
        )
    if body.pop("sha256", None) != checksum(body):
        tampered(path, "its contents do not match its own SHA-256")
    try:
        return parsed(body)
    except WildValue as error:
        raise CheckpointError(f"{path}: {error} It was not written by save and is not used.") from None


def tampered(path: Path, what: str) -> NoReturn:
    """A file is not what was written.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(f"{path}: truncated or tampered with: {what}. Copy it again from where it came from.")


def _parsed_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        tampered(path, f"not valid JSON: {error}")
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the description of a model saved by jbrprune.")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# --- value by value -------------------------------------------------------------------------------


def _require(condition: bool, where: str, value: object) -> None:
    if not condition:
        raise WildValue(f"{where} makes no sense: {str(value)[:80]!r}.")


def _typed(value: object, kind: type[_Kind], where: str) -> _Kind:
    if type(value) is not kind:  # a bool is no int here
        _require(False, where, value)
    return value  # type: ignore[return-value]


def _entry(body: Mapping[str, Any], key: str, kind: type[_Kind], where: str = "") -> _Kind:
    return _typed(body.get(key), kind, f"{where}{key}")


def parsed(body: Mapping[str, Any]) -> Description:
    """Check the body value by value.

    Raises:
        WildValue: Something has another type or range than what is written.
    """
    weights = _entry(body, "weights", dict)
    size = _entry(weights, "bytes", int, "weights.")
    _require(size >= 0, "weights.bytes", size)
    tensors = {name: _tensor(info, f"tensors.{name}") for name, info in _entry(body, "tensors", dict).items()}
    aliases = _entry(body, "aliases", dict)
    for name, stored in aliases.items():
        _require(isinstance(stored, str) and stored in tensors and name not in tensors, f"aliases.{name}", stored)
        _require(not tensors[stored].masked or _is_maskable(name), f"aliases.{name}", "shares a masked tensor")
    for name, info in tensors.items():
        _require(not info.masked or _is_maskable(name), f"tensors.{name}.masked", info.masked)
        _require(info.values is None or bitmap_name(name) not in tensors, f"tensors.{bitmap_name(name)}", "a bitmap")
    attributes = _entry(body, "attributes", dict)
    return Description(
        recipe=_recipe(body.get("recipe")),
        tensors=tensors,
        aliases=aliases,
        attributes={name: _attributes(values, f"attributes.{name}") for name, values in attributes.items()},
        data_config=_data_config(body.get("data_config")),
        provenance=_entry(body, "provenance", dict),
        report=_entry(body, "report", dict),
        versions=_entry(body, "versions", dict),
        size=size,
        sha256=_entry(weights, "sha256", str, "weights."),
    )


def _tensor(value: object, where: str) -> TensorInfo:
    info = _typed(value, dict, where)
    shape = tuple(_entry(info, "shape", list, f"{where}."))
    few = is_size(shape or 0) and len(shape) <= _MOST_DIMENSIONS
    _require(few and math.prod(max(n, 1) for n in shape) <= _LARGEST_TENSOR, f"{where}.shape", shape)
    dtype = _entry(info, "dtype", str, f"{where}.")
    _require(dtype in DTYPES, f"{where}.dtype", dtype)
    persistent, channels_last = (_entry(info, flag, bool, f"{where}.") for flag in ("persistent", "channels_last"))
    _require(not channels_last or len(shape) == 4, f"{where}.channels_last", channels_last)
    values, masked = info.get("values"), _typed(info.get("masked", False), bool, f"{where}.masked")
    if values is not None:
        _require(type(values) is int and 0 <= values <= math.prod(shape), f"{where}.values", values)
    _require(values is not None or not masked, f"{where}.masked", masked)
    return TensorInfo(shape, dtype, persistent, channels_last, values, masked)  # type: ignore[arg-type]


def _is_maskable(name: str) -> bool:
    return name.rpartition(".")[2] in KINDS


def _attributes(values: object, where: str) -> dict[str, int | tuple[int, ...]]:
    found = {}
    for name, value in _typed(values, dict, where).items():
        _require(name in SIZE_ATTRIBUTES, where, name)
        found[name] = tuple(value) if isinstance(value, list) else value
        _require(is_size(found[name]), f"{where}.{name}", found[name])
    return found


def _recipe(value: object) -> timm_models.Recipe | None:
    if value is None:
        return None
    recipe = _typed(value, dict, "recipe")
    name = _entry(recipe, "name", str, "recipe.")
    # No colon, no slash: timm would read a file or the network.
    _require(re.fullmatch(r"\w[\w.-]{0,200}", name, re.ASCII) is not None, "recipe.name", name)
    arguments = _entry(recipe, "arguments", dict, "recipe.")
    for key, argument in arguments.items():
        _require(key.isidentifier() and key not in _FORBIDDEN_ARGUMENTS, "recipe.arguments", key)
        _check_argument(argument, f"recipe.arguments.{key}")
    overlay = _typed(arguments.get("pretrained_cfg_overlay", {}), dict, "recipe.arguments.pretrained_cfg_overlay")
    _check_config({key: item for key, item in overlay.items() if key != "fixed_input_size"}, "recipe.arguments.")
    return timm_models.Recipe(name, arguments)


def _check_argument(value: object, where: str) -> None:
    """No number so large that building the dense model would exhaust the machine."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _check_argument(part, where)
    if isinstance(value, int | float):
        _require(abs(value) <= _LARGEST_NUMBER, where, value)


def _data_config(value: object) -> dict[str, Any] | None:
    """Only the keys of timm's data configuration, with values that a transform can use."""
    if value is None:
        return None
    config = _typed(value, dict, "data_config")
    _check_config(config, "data_config.")
    return {key: tuple(item) if isinstance(item, list) else item for key, item in config.items()}


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
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


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
