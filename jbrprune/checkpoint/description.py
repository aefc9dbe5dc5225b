"""The description of a saved model, ``jbrprune.json``, and how sparse tensors are packed beside it.

Every value of the JSON is compared with a form, unknown keys are refused, and a SHA-256 of the contents shows whether
the file was truncated or edited. No name, argument or number in it can run code, open another file, or exhaust the
machine: the dense model is built on the meta device, where it takes no memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from jbrprune.errors import CheckpointError
from jbrprune.models.timm_models import Recipe

FORMAT = "jbrprune 1"
"""Name and version of the format."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

_FORBIDDEN = frozenset(("pretrained", "pretrained_cfg", "checkpoint", "checkpoint_path", "cache_dir"))
"""Arguments by which creating a model would read a file or the network."""
_LARGEST_NUMBER = 2**20
"""Of the numbers in a recipe."""
LARGEST_IMAGE = 2**22
"""Of the values of the image that a loaded model is tried on."""


@dataclass(frozen=True)
class TensorInfo:
    """Properties of one stored tensor.

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
    values: int | None
    masked: bool


@dataclass(frozen=True)
class Example:
    """Outputs of a saved model for two images of noise, see `jbrprune.checkpoint.rebuild.compute_outputs`.

    Attributes:
        size: Channels, height and width of the images.
        outputs: Some values of its outputs.
    """

    size: tuple[int, ...]
    outputs: tuple[float, ...]


@dataclass(frozen=True)
class Description:
    """The contents of ``jbrprune.json``.

    Attributes:
        recipe: How to create the dense model, or None if the user has to.
        tensors: Qualified name -> what is stored under this name.
        aliases: Qualified name -> name under which the same, shared, tensor is stored.
        attributes: Qualified name of a module -> attribute -> integer or tuple of integers.
        data_config: timm's data configuration, or None.
        report: What pruning it cost, as by ``Report.to_dict``.
        versions: Package -> version that saved the model.
        weights: ``bytes`` and ``sha256`` of the file of the weights.
        pairs: Qualified name of a layer that stands as two linear layers -> channels between them.
        example: What the model computes, or None where no size of images was known.
        no_recipe: Why there is no recipe, or None.
    """

    recipe: Recipe | None
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    data_config: Mapping[str, Any] | None
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    weights: Mapping[str, Any]
    pairs: Mapping[str, int]
    example: Example | None
    no_recipe: str | None

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
                found[bitmap_name(name)] = ((-(-math.prod(info.shape) // 8),), torch.uint8)
        return found


# --- the JSON -------------------------------------------------------------------------------------


def checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of a body, whatever its spaces and the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_text(body: Mapping[str, Any]) -> str:
    """The text of the file: the body with its format and its checksum."""
    whole = {"format": FORMAT, **body}
    return json.dumps({**whole, "sha256": checksum(whole)}, indent=1, sort_keys=True) + "\n"


def from_bytes(data: bytes, path: Path) -> Description:
    """Verify and parse the contents of the file.

    Args:
        data: Contents of the file.
        path: Its name, for messages.

    Raises:
        CheckpointError: Not JSON, of an unknown format, not what its checksum says, or holding a value that is
            never written.
    """
    try:
        body = dict(json.loads(data))
        stated, found = body.pop("sha256", None), checksum(body)
    except (ValueError, TypeError, RecursionError) as error:
        refuse_damage(path, f"not valid JSON: {error}")
    if body.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{path} is not of the format {FORMAT!r}: another version of jbrprune wrote it. Load the model with that "
            "version, and save it again from here as a model of your own."
        )
    if stated != found:
        refuse_damage(path, "its contents do not match its own SHA-256")
    try:
        return parse(body)
    except (CheckpointError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error} It was not written by save and is not used.") from None


def refuse_damage(path: Path, what: str) -> NoReturn:
    """Raise the error for a file that differs from what was written.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(f"{path}: truncated or tampered with: {what}. Copy it again from where it came from.")


def parse(body: Mapping[str, Any]) -> Description:
    """Check the body value by value.

    Args:
        body: Contents of the file without ``format`` and ``sha256``.

    Raises:
        CheckpointError: A key is missing or unknown, or a value has another type or range than what is written.
    """
    _check(body, _BODY, "")
    tensors, config, example = body["tensors"], body["data_config"], body["example"]
    for name, stored in body["aliases"].items():
        if stored not in tensors or name in tensors:
            raise CheckpointError(f"aliases.{name} makes no sense: {stored!r}.")
    made = {
        "recipe": None if body["recipe"] is None else Recipe(**body["recipe"]),
        "tensors": {name: TensorInfo(**_with_tuples(info)) for name, info in tensors.items()},
        "attributes": {name: _with_tuples(sizes) for name, sizes in body["attributes"].items()},
        "data_config": None if config is None else _with_tuples(config),
        "example": None if example is None else Example(**_with_tuples(example)),
    }
    return Description(**{**body, **made})


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _check(value: Any, form: Any, where: str) -> None:
    """Compare a value with a form.

    Args:
        value: From JSON.
        form: A type; a function that says whether the value is right; a dict of the forms of its keys, or of ``*`` for
            all keys; a tuple of one form for what may be null.
        where: Name of the value, for messages.
    """
    if isinstance(form, tuple):
        if value is not None:
            _check(value, form[0], where)
    elif isinstance(form, dict):
        _check(value, dict, where)
        forms = dict.fromkeys(value, form["*"]) if "*" in form else form
        for name in [*value, *forms]:
            if name not in value or name not in forms:
                why = "unknown" if name in value else "missing"
                raise CheckpointError(f"{where} makes no sense: {name!r} is {why}.")
        for name, item in value.items():
            _check(item, forms[name], f"{where}.{name}".removeprefix("."))
    elif type(value) is not form if isinstance(form, type) else not form(value):  # a bool is no int here
        raise CheckpointError(f"{where} makes no sense: {str(value)[:80]!r}.")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_bounded(value: object) -> bool:
    """Whether no number in it is so large that creating the model would exhaust the machine."""
    if isinstance(value, dict | list):
        return all(map(_is_bounded, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) <= _LARGEST_NUMBER


def _are_arguments(value: object) -> bool:
    """Whether creating a model with these arguments reads no file."""
    if not isinstance(value, dict) or not _is_bounded(value) or not _FORBIDDEN.isdisjoint(value):
        return False
    overlay = value.get("pretrained_cfg_overlay", {})
    return isinstance(overlay, dict) and overlay.keys() <= _CONFIG.keys() | {"fixed_input_size"}


_CONFIG = {
    "input_size": _are_counts,
    "interpolation": str,
    "mean": list,
    "std": list,
    "crop_pct": lambda value: type(value) in (int, float),
    "crop_mode": str,
}
_BODY = {
    # No colon, no slash: timm would read a file or the network.
    "recipe": ({"name": lambda value: re.fullmatch(r"\w[\w.-]*", str(value)), "arguments": _are_arguments},),
    "tensors": {
        "*": {
            "shape": _are_counts,
            "dtype": lambda value: str(value) in DTYPES,
            "persistent": bool,
            "channels_last": bool,
            "values": (_is_count,),
            "masked": bool,
        }
    },
    "aliases": {"*": str},
    "attributes": {"*": {"*": lambda value: _is_count(value) or _are_counts(value)}},
    "data_config": (_CONFIG,),
    "report": dict,
    "pairs": {"*": _is_count},
    "versions": {"*": str},
    "weights": {"bytes": _is_count, "sha256": str},
    "example": (
        {
            "size": lambda value: _are_counts(value) and len(value) == 3 and 0 < math.prod(value) <= LARGEST_IMAGE,
            "outputs": lambda value: isinstance(value, list) and all(type(item) is float for item in value),
        },
    ),
    "no_recipe": (str,),
}


# --- sparse tensors -------------------------------------------------------------------------------


def bitmap_name(name: str) -> str:
    """The name of a packed tensor's bitmap in the file of the weights; no parameter has parameters of its own."""
    return f"{name}.bitmap"


def pack(tensor: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a tensor into the values that are kept and a bitmap of their positions.

    Args:
        tensor: Any tensor on the CPU.
        kept: Boolean, of its shape, on the CPU.

    Returns:
        The values in row-major order ``[kept]``, and a bitmap ``[ceil(entries / 8)]`` of uint8, entry 0 in the lowest
        bit of byte 0, zero beyond the last entry.

    Example:
        >>> tensor = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> [part.tolist() for part in pack(tensor, tensor != 0)]
        [[2.0, 3.0], [6]]
    """
    flat = kept.flatten()
    return tensor.detach().flatten()[flat], torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def unpack(values: Tensor, bitmap: Tensor, shape: Sequence[int], name: str = "") -> tuple[Tensor, Tensor]:
    """Undo `pack`: the tensor, zero where no value was kept, and the mask of the kept entries.

    Args:
        values: ``[kept]``.
        bitmap: ``[ceil(entries / 8)]`` uint8.
        shape: Of the tensor.
        name: Of the tensor, for the message.

    Raises:
        CheckpointError: The bitmap marks another number of entries than there are values, or one beyond the last.

    Example:
        >>> unpack(torch.tensor([2.0, 3.0]), torch.tensor([6], dtype=torch.uint8), (2, 2))[0]
        tensor([[0., 2.],
                [3., 0.]])
    """
    entries = math.prod(shape)
    bits = np.unpackbits(bitmap.numpy(), bitorder="little").view(np.bool_)
    if len(bits) < entries or bits[entries:].any() or bits.sum() != len(values):
        raise CheckpointError(
            f"{name}: the bitmap marks {bits.sum()} entries, but there are {entries} entries and {len(values)} values. "
            "The file was tampered with: copy it again from where it came from."
        )
    kept = torch.from_numpy(bits[:entries]).reshape(tuple(shape))
    # Assigning a single value by index goes through a Python number, which loses the payload of a NaN.
    return torch.zeros(tuple(shape), dtype=values.dtype).masked_scatter_(kept, values), kept


def set_bits(tensor: Tensor) -> Tensor:
    """Where any bit of a floating tensor is set: everywhere but at +0.0; -0.0 and NaN are values like any other."""
    return (tensor.detach().unsqueeze(-1).view(torch.uint8) != 0).any(-1)


def packed_bytes(tensor: Tensor, kept: int) -> int:
    """Stored bytes of a tensor with this many kept entries: the smaller of packed and dense.

    Formula: min(entries * itemsize, kept * itemsize + ceil(entries / 8)). A saved mask costs its bit per entry in
    any case.

    Example:
        >>> packed_bytes(torch.empty(64, 100), 640), packed_bytes(torch.empty(64, 100), 6400)
        (3360, 25600)
    """
    return min(tensor.nbytes, kept * tensor.element_size() + -(-tensor.numel() // 8))


def store_tensor(
    name: str, tensor: Tensor, mask: Tensor | None, persistent: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe a tensor, and make the entries of the weights' file for it: packed if that is smaller.

    Args:
        name: Qualified name.
        tensor: A parameter or a buffer.
        mask: Where its values are kept, if ``torch.nn.utils.prune`` masks it.
        persistent: Whether it is part of ``state_dict()``.
    """
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    info = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "persistent": persistent,
        "channels_last": last and not tensor.is_contiguous(),
        "values": None,
        "masked": mask is not None,
    }
    # A copy, because safetensors refuses tensors that overlap in memory.
    values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if mask is None and not (isinstance(tensor, nn.Parameter) and tensor.is_floating_point()):
        return info, {name: values}
    kept = set_bits(values) if mask is None else mask.detach().cpu().bool()
    if mask is None and packed_bytes(values, int(kept.sum())) == values.nbytes:
        return info, {name: values}
    values, bitmap = pack(values, kept)
    return info | {"values": len(values)}, {name: values, bitmap_name(name): bitmap}


def read_tensor(name: str, info: TensorInfo, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Undo `store_tensor`: the tensor and, if it is packed, the mask of its kept entries.

    Raises:
        CheckpointError: The bitmap does not fit the values.
    """
    values, kept = state[name], None
    if info.values is not None:
        values, kept = unpack(values, state[bitmap_name(name)], info.shape, name)
    if info.channels_last and values.dim() == 4:
        values = values.to(memory_format=torch.channels_last)
    return values, kept
