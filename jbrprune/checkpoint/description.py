"""A model and its description: what ``jbrprune.json`` says, how tensors are stored, and the way back.

Every value of the JSON is compared with a form, unknown keys are refused, and a SHA-256 of the contents shows whether
the file was truncated or edited. No name, argument or number in it can run code, open another file, or exhaust the
machine: the dense model is built on the meta device, where it takes no memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves

from jbrprune.errors import CheckpointError
from jbrprune.models import preserve, timm_models
from jbrprune.models.layers import (
    is_factorable,
    is_pair,
    is_size,
    repeated_widths,
    set_size_attributes,
    size_attributes,
    width_of,
)
from jbrprune.sparsity.masks import KINDS, fresh, masks_of, put_masks
from jbrprune.structure.directions import make_pair, replace_module

logger = logging.getLogger(__name__)

FORMAT = "jbrprune"
FORMAT_VERSION = 3
KNOWN_VERSIONS = (1, 2, 3)
"""Version 1 knew dense tensors only, version 2 no outputs to compare with and no layers that stand as two."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the same size, through which the bits of a floating tensor are read."""
_FORBIDDEN = frozenset(("pretrained", "pretrained_cfg", "checkpoint", "checkpoint_path", "cache_dir"))
"""Arguments by which creating a model would read a file or the network."""
_LARGEST_NUMBER = 2**20
"""Of the numbers in a recipe."""
_LARGEST_IMAGE = 2**22
"""Of the values of the image that a loaded model is tried on."""
_LEAST_MODULES, _MODULES_EACH = 8192, 64
"""The dense model of a recipe may have this many modules, and so many more for each tensor that is stored."""
_OUTPUTS = 256
"""Of the outputs so many values are stored, evenly spaced."""
SAME, CLOSE = 1e-5, 1e-4
"""Largest relative difference of the outputs of one function: in one process, and on another machine."""


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
class Example:
    """What a saved model computes for two images of noise, see `compute_outputs`.

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
        provenance: Where the model comes from.
        report: What pruning it cost, as by ``Report.to_dict``.
        versions: Package -> version that saved the model.
        weights: ``bytes`` and ``sha256`` of the file of the weights.
        pairs: Qualified name of a layer that stands as two linear layers -> channels between them.
        format: Name of the format.
        format_version: Version of the format.
        example: What the model computes, or None where no size of images was known.
        no_recipe: Why there is no recipe, or None.
    """

    recipe: timm_models.Recipe | None
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    data_config: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    weights: Mapping[str, Any]
    format: str
    format_version: int
    pairs: Mapping[str, int] = field(default_factory=dict)
    example: Example | None = None
    no_recipe: str | None = None

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
    """What is written into the file: the body with its checksum."""
    return json.dumps({**body, "sha256": checksum(body)}, indent=1, sort_keys=True) + "\n"


def from_bytes(data: bytes, path: Path) -> Description:
    """Verify the contents of the file.

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
    if body.get("format_version") not in KNOWN_VERSIONS:
        raise CheckpointError(
            f"{path}: format_version is {body.get('format_version')!r}, this version of jbrprune knows "
            f"{KNOWN_VERSIONS}. Upgrade jbrprune to read it."
        )
    if stated != found:
        refuse_damage(path, "its contents do not match its own SHA-256")
    try:
        return parse(body)
    except (CheckpointError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error} It was not written by save and is not used.") from None


def refuse_damage(path: Path, what: str) -> NoReturn:
    """Say that a file is not what was written.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(f"{path}: truncated or tampered with: {what}. Copy it again from where it came from.")


def parse(body: Mapping[str, Any]) -> Description:
    """Check the body value by value.

    Args:
        body: Contents of the file without ``sha256``.

    Raises:
        CheckpointError: A key is missing or unknown, or a value has another type or range than what is written.
    """
    _check(body, _BODY, "")
    tensors, config, example = body["tensors"], body["data_config"], body.get("example")
    for name, stored in body["aliases"].items():
        if stored not in tensors or name in tensors:
            raise CheckpointError(f"aliases.{name} makes no sense: {stored!r}.")
    made = {
        "recipe": None if body["recipe"] is None else timm_models.Recipe(**body["recipe"]),
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
        for name in [*value, *(name for name in forms if name not in value and name not in _MAY_LACK)]:
            if name not in value or name not in forms:
                why = "unknown" if name in value else "missing"
                raise CheckpointError(f"{where} makes no sense: {name!r} is {why}.")
            _check(value[name], forms[name], f"{where}.{name}".removeprefix("."))
    elif type(value) is not form if isinstance(form, type) else not form(value):  # a bool is no int here
        raise CheckpointError(f"{where} makes no sense: {str(value)[:80]!r}.")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_bounded(value: object) -> bool:
    """Whether it holds no number by which creating a model would exhaust the machine."""
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
    "format": lambda value: value == FORMAT,
    "format_version": int,
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
    "provenance": dict,
    "report": dict,
    "pairs": {"*": _is_count},
    "versions": {"*": str},
    "weights": {"bytes": _is_count, "sha256": str},
    "example": (
        {
            "size": lambda value: _are_counts(value) and len(value) == 3 and 0 < math.prod(value) <= _LARGEST_IMAGE,
            "outputs": lambda value: isinstance(value, list) and all(type(item) is float for item in value),
        },
    ),
    "no_recipe": (str,),
}
_MAY_LACK = frozenset(("values", "masked", "pairs", "example", "no_recipe", *_CONFIG))


# --- sparse tensors -------------------------------------------------------------------------------


def bitmap_name(name: str) -> str:
    """The name of a packed tensor's bitmap in the file of the weights; no parameter has parameters of its own."""
    return f"{name}.bitmap"


def pack(tensor: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The values that are kept, and where they are.

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
    """The tensor that `pack` got, zero where no value was kept, and where values were kept.

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
    return tensor.detach().view(_INTEGERS[tensor.element_size()]) != 0


def packed_bytes(tensor: Tensor, kept: int) -> int:
    """Bytes of a tensor of which so many entries are kept: packed, or dense where that is not larger.

    Formula: min(entries * itemsize, kept * itemsize + ceil(entries / 8)). A saved mask costs its bit per entry in
    any case.

    Example:
        >>> packed_bytes(torch.empty(64, 100), 640), packed_bytes(torch.empty(64, 100), 6400)
        (3360, 25600)
    """
    return min(tensor.nbytes, kept * tensor.element_size() + -(-tensor.numel() // 8))


# --- from a model to its description, and back -----------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a tensor of a model is kept: ``module.name``, or ``module.name_orig`` where it is masked."""

    module: nn.Module
    name: str
    tensor: Tensor
    persistent: bool
    mask: Tensor | None


def _places(model: nn.Module) -> dict[str, _Place]:
    """Qualified name -> place of every parameter and buffer, a shared one under each of its names.

    A masked parameter goes by the name that it had before, and its mask goes with it.
    """
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            is_mask = name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in module._parameters
            if tensor is None or is_mask:
                continue
            mask = module._buffers.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
            stem = name if mask is None else name.removesuffix("_orig")
            persistent = name not in module._non_persistent_buffers_set
            found[f"{prefix}.{stem}".removeprefix(".")] = _Place(module, stem, tensor, persistent, mask)
    return found


def take_apart(
    model: nn.Module, recipe: timm_models.Recipe | None, size: Sequence[int] | None, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The body of the description, without size and sum of the weights, and the tensors to write.

    The dense model is built by its recipe, filled, and compared with the model on an example. Where it does not fit or
    computes something else, the body is without a recipe and says why.

    Args:
        model: The model.
        recipe: How to create the dense model, or None.
        size: Channels, height and width of the example, or None.
        facts: ``data_config``, ``provenance`` and ``report``.

    Raises:
        CheckpointError: The model holds something that cannot be saved, or does not run on the example.
        ModelError: Its masks cannot be put back, see `jbrprune.sparsity.masks.masks_of`.
    """
    masks_of(model)
    if size is None:
        logger.warning("load() will not compare outputs: pass size= of the images, (channels, height, width).")
    fits = size is not None and math.prod(size) <= _LARGEST_IMAGE
    example = Example(tuple(size), compute_outputs(model, size)) if size is not None and fits else None
    kept = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    lost = sorted(model.state_dict().keys() - kept)
    if lost:
        raise CheckpointError(
            f"{lost[0]}: this entry of state_dict() is neither a parameter nor a buffer and cannot be rebuilt. "
            "Remove the module's extra state or its state_dict hook before saving."
        )
    first: dict[int, str] = {}
    tensors, aliases, state = {}, {}, {}
    for name, place in _places(model).items():
        if first.setdefault(id(place.tensor), name) == name:
            tensors[name], stored = _store(name, place)
            state |= stored
        else:
            aliases[name] = first[id(place.tensor)]
    sizes = {name: size_attributes(module) for name, module in model.named_modules()}
    found = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": None if recipe is None else {"name": recipe.name, "arguments": recipe.arguments},
        "tensors": tensors,
        "aliases": aliases,
        "attributes": {name: own for name, own in sizes.items() if own},
        "pairs": {n: width_of(pair[0], "out") for n, pair in model.named_modules() if is_pair(pair)},
        "versions": {package: version(package) for package in ("jbrprune", "timm", "torch", "safetensors")},
        "weights": {"bytes": 0, "sha256": ""},
        "example": None if example is None else vars(example),
        "no_recipe": None if recipe else "it was not created by name",
        **facts,
    }
    try:
        body = json.loads(json.dumps(found, allow_nan=False))  # as it will be read back
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"JSON cannot hold config, provenance, report or recipe: {error}. Use strings, finite numbers, lists and "
            "dicts."
        ) from None
    try:
        if recipe is not None:
            description = parse(body)
            rebuilt = split_pairs(create_on_meta(description), description)
            check_fits(description, rebuilt)
            fill(rebuilt, description, state)
            check_outputs(description, rebuilt.to(preserve.device_of(model)), SAME)
    except CheckpointError as error:
        logger.warning("load() will need model=: the recipe of %s does not make this model again. %s", recipe, error)
        body |= {"recipe": None, "no_recipe": f"timm's {recipe.name} was changed by hand. {error}"}  # type: ignore[union-attr]
    parse(body)
    return body, state


def compute_outputs(model: nn.Module, size: Sequence[int]) -> tuple[float, ...]:
    """Some values of what a model returns for two images of noise that are the same everywhere; NaN and Inf count as 0.

    The second image has four times the contrast: what saturates or is clipped shows there.

    Args:
        model: The model; left as it was.
        size: Channels, height and width.

    Raises:
        CheckpointError: It does not run on such images.
    """
    # NumPy guarantees the numbers of this generator for all versions.
    noise = torch.from_numpy(np.random.RandomState(0).standard_normal((2, *size)))
    noise[1] *= 4
    tensor = preserve.first_tensor(model)
    tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with preserve.inference_state(model), fresh(model), tf32:
        torch.manual_seed(0)
        try:
            output = model(noise if tensor is None else noise.to(tensor))
        except Exception as error:  # whatever a foreign forward raises is the answer
            raise CheckpointError(
                f"{type(model).__name__} does not run on images of size {tuple(size)}: {str(error).rstrip('.')}. Pass "
                "the size of its images: save(model, path, size=(channels, height, width))."
            ) from error
    leaves = [leaf.flatten().cpu().double() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    values = torch.cat([torch.zeros(0), *leaves]).nan_to_num(0.0, 0.0, 0.0)
    return tuple(values[:: 1 + len(values) // _OUTPUTS].tolist())


def check_outputs(description: Description, model: nn.Module, tolerance: float) -> None:
    """See that a model computes what the saved one does: ||f(x) - f_saved(x)|| / ||f_saved(x)|| <= tolerance.

    Raises:
        CheckpointError: It computes something else, or does not run.
    """
    if description.example is None:
        return
    wanted = torch.tensor(description.example.outputs, dtype=torch.float64)
    found = torch.tensor(compute_outputs(model, description.example.size), dtype=torch.float64)
    apart = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)) if len(found) == len(wanted) else math.inf
    if not apart <= tolerance:  # NaN is not
        raise CheckpointError(
            f"Every tensor fits, but the outputs for two images of noise {description.example.size} differ by "
            f"{apart:.2g} of the saved ones: {type(model).__name__} computes something else. A stride, a pooling, an "
            "activation or another setting differs that no tensor tells."
        )


def _store(name: str, place: _Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the description says of a tensor, and the tensors of the file."""
    tensor, mask = place.tensor, place.mask
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    info = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "persistent": place.persistent,
        "channels_last": last and not tensor.is_contiguous(),
    }
    # A copy, because safetensors refuses tensors that overlap in memory.
    values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if mask is None and not (isinstance(tensor, nn.Parameter) and tensor.is_floating_point()):
        return info, {name: values}
    kept = set_bits(values) if mask is None else mask.detach().cpu().bool()
    if mask is None and packed_bytes(values, int(kept.sum())) == values.nbytes:
        return info, {name: values}
    values, bitmap = pack(values, kept)
    packing = {"values": len(values), "masked": mask is not None}
    return info | packing, {name: values, bitmap_name(name): bitmap}


def create_on_meta(description: Description) -> nn.Module:
    """The dense model of a recipe on the meta device, where a tensor of any size takes no memory.

    It may have so many modules as a model with that many tensors can have: a recipe with a depth of a million would
    fill the memory with modules.
    """
    recipe = description.recipe
    if recipe is None:
        raise CheckpointError(
            "This model was saved without a recipe. Create the dense model and pass it: load(path, model=...). Reason: "
            f"{description.no_recipe or 'it was not created by name, or was changed by hand'}"
        )
    left = _LEAST_MODULES + _MODULES_EACH * len(description.names)

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError("it has far more modules than what is stored")

    handle = register_module_module_registration_hook(count)
    try:
        with preserve.same_randomness(torch.device("cpu")), torch.device("meta"):
            return timm_models.build(recipe)
    except Exception as error:  # whatever the constructor raises is the answer
        raise CheckpointError(
            f"The dense model {recipe.name!r} with {dict(recipe.arguments)} could not be created: {error} "
            f"Saved with {dict(description.versions)}, installed is timm {version('timm')}."
        ) from error
    finally:
        handle.remove()


def split_pairs(dense: nn.Module, description: Description) -> nn.Module:
    """Put two layers in the place of each that was saved as two, in place; return the model.

    Raises:
        CheckpointError: There is no such layer, or the two were no smaller.
    """
    for name, size in description.pairs.items():
        layer: Any = dict(dense.named_modules()).get(name)
        if not is_pair(layer):
            if not is_factorable(layer) or not 0 < size <= min(len(layer.weight), layer.weight[0].numel()):
                _refuse_misfit(name, f"two layers with {size} channels between them", layer)
            replace_module(dense, name, make_pair(layer, size))
    return dense


def check_fits(description: Description, dense: nn.Module) -> None:
    """See that every stored tensor and size has its place in the dense model, and none is larger than there.

    Raises:
        CheckpointError: This is not the architecture that was saved.
    """
    places, names = _places(dense), description.names
    missing, unknown = sorted(places.keys() - names.keys()), sorted(names.keys() - places.keys())
    if missing or unknown:
        raise CheckpointError(
            f"This is not the architecture that was saved: the file lacks {len(missing)} tensors of the dense model "
            f"{missing[:3]}, and the dense model {len(unknown)} of the file {unknown[:3]}. Saved with "
            f"{dict(description.versions)}, installed is timm {version('timm')}."
        )
    for name, stored in names.items():
        info, place = description.tensors[stored], places[name]
        tensor, dtype = place.tensor, DTYPES[info.dtype]
        limit = tuple(tensor.shape)
        if not place.persistent and info.values is None:
            # A forward may have made it anew, such as positions for this size of images, from a placeholder.
            limit = tuple(max(n, most) if most == 1 else most for n, most in zip(info.shape, limit))
        alike = (dtype.is_floating_point, dtype.is_complex) == (tensor.is_floating_point(), tensor.is_complex())
        maskable = isinstance(tensor, nn.Parameter) and place.name in KINDS
        alike = alike and place.persistent == info.persistent and (maskable or not info.masked)
        if not alike or len(limit) != tensor.dim() or not _at_most(info.shape, limit):
            _refuse_misfit(name, info, f"a {type(tensor).__name__} of {tensor.dtype} and shape {tuple(tensor.shape)}")
    modules = dict(dense.named_modules())
    for name, sizes in description.attributes.items():
        own = vars(modules[name]) if name in modules else {}
        for attribute, value in sizes.items():
            if not is_size(own.get(attribute)) or not _at_most(value, own[attribute]):
                _refuse_misfit(f"{name}.{attribute}", value, own.get(attribute))


def _refuse_misfit(name: str, stored: object, found: object) -> NoReturn:
    raise CheckpointError(
        f"{name}: stored as {stored}, but the dense model has {found}. Pruning only makes tensors and layers smaller: "
        "this is not the model that was saved. Where it was given another head, give that to the dense model as well."
    )


def _at_most(size: int | tuple[int, ...], limit: int | tuple[int, ...]) -> bool:
    if isinstance(size, tuple) and isinstance(limit, tuple):
        return len(size) == len(limit) and all(n <= most for n, most in zip(size, limit))
    return isinstance(size, int) and isinstance(limit, int) and size <= limit


def fill(dense: nn.Module, description: Description, state: Mapping[str, Tensor]) -> None:
    """Give a model that `check_fits` has accepted the stored tensors, sizes, masks and configuration, in place."""
    made: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    repeated = repeated_widths(dense)
    for name, place in _places(dense).items():
        stored = description.names[name]
        info = description.tensors[stored]
        if stored not in made:
            values = state[stored]
            if info.values is not None:
                values, kept = unpack(values, state[bitmap_name(stored)], info.shape, stored)
                masks |= {name: kept} if info.masked else {}
            if info.channels_last and values.dim() == 4:
                values = values.to(memory_format=torch.channels_last)
            trained = place.tensor.requires_grad
            made[stored] = nn.Parameter(values, trained) if isinstance(place.tensor, nn.Parameter) else values
        setattr(place.module, place.name, made[stored])
    sizes = [(dense.get_submodule(name), own) for name, own in description.attributes.items()]
    for module, own in sizes:
        set_size_attributes(module, own)
    for set_width, layer, attribute in repeated:
        set_width(getattr(layer, attribute))
    for module, own in sizes:  # what is stored counts, also where it is not what a layer says
        set_size_attributes(module, own)
    put_masks(dense, masks)
    classes = timm_models.count_classes(dense)
    if classes is not None and hasattr(dense, "num_classes"):
        setattr(dense, "num_classes", classes)  # noqa: B010 (to pyright it is a tensor)
    if description.data_config is not None:
        # timm's sizes for testing would win over the stored ones where a caller asks for them.
        old = dict(getattr(dense, "pretrained_cfg", None) or {})
        kept = {key: value for key, value in old.items() if key not in ("test_input_size", "test_crop_pct")}
        dense.pretrained_cfg = dense.default_cfg = kept | dict(description.data_config)  # type: ignore[assignment]
