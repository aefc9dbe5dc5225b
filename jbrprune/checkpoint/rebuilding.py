"""Taking a model apart into a description and tensors, and building it again from them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from jbrprune.checkpoint.description import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    Description,
    TensorInfo,
    WildValue,
    as_json,
    bitmap_name,
    parsed,
)
from jbrprune.checkpoint.packing import packed, packed_bytes, set_bits, unpacked, unpacked_mask
from jbrprune.checkpoint.tensors import Place, places, unmasked
from jbrprune.errors import CheckpointError, JBRError, ModelError
from jbrprune.models import timm_models
from jbrprune.models.layers import set_size_attributes, size_attributes
from jbrprune.models.preserve import refuse_masked, same_randomness
from jbrprune.sparsity.masks import slots

# --- taking apart ---------------------------------------------------------------------------------


def taken_apart(
    model: nn.Module,
    recipe: timm_models.Recipe | None,
    config: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The body of the description, without size and sum of the weights, and the tensors to write.

    Args:
        model: The model.
        recipe: How to create the dense model, or None.
        config: timm's data configuration, or None.
        provenance: Anything that JSON can hold.
        report: Anything that JSON can hold.

    Raises:
        CheckpointError: The model holds something that cannot be saved.
    """
    found = places(model)
    _check_savable(model, found)
    found = unmasked(found)
    first: dict[int, str] = {}
    aliases = {}
    for name, place in found.items():
        if first.setdefault(id(place.tensor), name) != name:
            aliases[name] = first[id(place.tensor)]
    parts = {name: _parts(found[name]) for name in first.values()}
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": None if recipe is None else {"name": recipe.name, "arguments": dict(recipe.arguments)},
        "tensors": {name: _info(found[name], *parts[name]) for name in first.values()},
        "aliases": aliases,
        "attributes": _attributes(model),
        "data_config": None if config is None else dict(config),
        "provenance": dict(provenance or {}),
        "report": dict(report or {}),
        "versions": _versions(),
    }
    state = {name: values for name, (values, _) in parts.items()}
    state |= {bitmap_name(name): bitmap for name, (_, bitmap) in parts.items() if bitmap is not None}
    return {key: as_json(value, key) for key, value in body.items()}, state


def check_loadable(body: Mapping[str, Any]) -> None:
    """See that the model can be built again: better now than when it is needed.

    Raises:
        CheckpointError: Its recipe leads elsewhere, or the description holds what `load` refuses.
    """
    try:
        description = parsed({**body, "weights": {"bytes": 0, "sha256": ""}})
        if description.recipe is not None:
            check_fits(description, created(description.recipe, description))
    except (WildValue, CheckpointError) as error:
        raise CheckpointError(
            f"The model would not load again: {error} If it was changed after it was created, or its recipe cannot be "
            "stored, save it with recipe=None and rebuild it with load(path, model=...)."
        ) from error


def _check_savable(model: nn.Module, found: Mapping[str, Place]) -> None:
    for name, place in found.items():
        tensor = place.tensor
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name}: cannot save a tensor of {tensor.dtype}, {tensor.layout} on device {tensor.device}. "
                f"Convert it to a dense tensor of {', '.join(DTYPES)}."
            )
    other = sorted(model.state_dict().keys() - {name for name, place in found.items() if place.persistent})
    if other:
        raise CheckpointError(
            f"{other[0]}: this entry of state_dict() is neither a parameter nor a buffer and cannot be rebuilt. "
            "Remove the module's extra state or its state_dict hook before saving."
        )


def _parts(place: Place) -> tuple[Tensor, Tensor | None]:
    """The values to store and, if it is packed, the bitmap."""
    tensor = _writable(place.tensor)
    if place.mask is not None:
        return packed(tensor, place.mask)
    if not isinstance(place.tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor, None
    kept = set_bits(tensor)
    smaller = packed_bytes(tensor, int(kept.sum())) < tensor.nbytes
    return packed(tensor, kept) if smaller else (tensor, None)


def _info(place: Place, values: Tensor, bitmap: Tensor | None) -> dict[str, Any]:
    tensor = place.tensor
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    packing = {} if bitmap is None else {"values": len(values), "masked": place.mask is not None}
    return packing | {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "persistent": place.persistent,
        "channels_last": last and not tensor.is_contiguous(),
    }


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {name: size_attributes(module) for name, module in model.named_modules()}
    return {name: sizes for name, sizes in found.items() if sizes}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("jbrprune", "timm", "torch", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _writable(tensor: Tensor) -> Tensor:
    """Dense, on the CPU, and alone in its storage: safetensors refuses tensors that overlap."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


# --- building again -------------------------------------------------------------------------------


class _Bounded(TorchDispatchMode):
    """Refuses to make more, or larger, tensors than a dense model of this description can have.

    A recipe is nothing but a name and numbers, but a depth of a million, or a table of all pairs of positions in a
    window of thousands, would fill the memory before anything could be compared.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        stored = sum(math.prod(info.shape) for info in description.tensors.values())
        self.most_values = LEAST_VALUES + max(TIMES * stored, min(TIMES_IF_SMALL * stored, SMALL))
        self.most_calls = LEAST_CALLS + CALLS_EACH * len(description.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count before anything is made."""
        self.most_calls -= 1
        self.most_values -= _new_values(func, args, kwargs or {}) if self.most_calls >= 0 else 0
        if self.most_calls < 0 or self.most_values < 0:
            raise CheckpointError("the recipe makes a model far larger than what is stored")
        return func(*args, **(kwargs or {}))


def _new_values(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many values an operation would make: found on the meta device, where they take no memory."""
    schema = func._schema
    if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return 0  # it writes into, or shows, what is there
    placed = any(argument.name == "device" for argument in schema.arguments)
    there = {**kwargs, **({"device": torch.device("meta")} if placed else {})}
    try:
        made = func(*tree_map(_on_meta, args), **tree_map(_on_meta, there))
    except (NotImplementedError, RuntimeError):
        return 0  # its size depends on values, or it fails in any case
    return sum(tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, Tensor))


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return None
    return value.to("meta") if isinstance(value, Tensor) else value


_MAKING_FAILED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RuntimeError, TypeError, ValueError),
)
TIMES = 8
"""A dense model may have this many times as many values as what is stored of it, ..."""
TIMES_IF_SMALL, SMALL = 256, 1 << 30
"""... or this many times, if that is no more than so many values, ..."""
LEAST_VALUES = 1 << 24
"""... and these as well, ..."""
CALLS_EACH, LEAST_CALLS = 128, 16384
"""... and its making may take this many operations for each tensor that is stored, and these."""


def created(recipe: timm_models.Recipe | None, bound: Description | None = None) -> nn.Module:
    """The dense model; the random state is left as it was.

    Args:
        recipe: From the description.
        bound: The description, where it may be foreign: nothing much larger than it says is made.

    Raises:
        CheckpointError: There is no recipe, or it does not work with what is installed.
    """
    if recipe is None:
        raise CheckpointError(
            "This model was saved without a recipe (it was not created by name). Create the dense model and pass it: "
            "load(path, model=...)."
        )
    try:
        bounded = contextlib.nullcontext() if bound is None else _Bounded(bound)
        with same_randomness(torch.device("cpu")), bounded:
            return timm_models.build(recipe)
    except (JBRError, *_MAKING_FAILED) as error:
        raise CheckpointError(
            f"The dense model {recipe.name!r} with {dict(recipe.arguments)} could not be created: {error} "
            f"Installed: {_versions()}."
        ) from error


def copied(model: nn.Module) -> nn.Module:
    """A copy of the dense model that the user has made.

    Raises:
        CheckpointError: It is masked; the masks come from the files.
    """
    try:
        refuse_masked(model)
    except ModelError as error:
        raise CheckpointError(f"load needs a model without masks; it puts the stored ones on. {error}") from None
    return deepcopy(model)


def check_fits(description: Description, dense: nn.Module) -> None:
    """See that every stored tensor and size has its place in the dense model, and none is larger than there.

    Raises:
        CheckpointError: This is not the architecture that was saved.
    """
    found, names = places(dense), description.names
    missing, unknown = sorted(found.keys() - names.keys()), sorted(names.keys() - found.keys())
    if missing or unknown:
        raise CheckpointError(
            f"This is not the architecture that was saved: the dense model has {_few(missing)} and lacks "
            f"{_few(unknown)}. Saved with {dict(description.versions)}, installed are {_versions()}."
        )
    for name, stored in names.items():
        _check_tensor(name, description.tensors[stored], found[name])
    _check_attributes(description, dense)


def _check_tensor(name: str, info: TensorInfo, place: Place) -> None:
    if info.masked and not isinstance(place.tensor, nn.Parameter):
        raise CheckpointError(f"{name}: stored as masked, but the dense model has no parameter there.")
    dtype, shape = place.tensor.dtype, tuple(place.tensor.shape)
    alike = place.persistent == info.persistent and _kind(dtype) == _kind(DTYPES[info.dtype])
    # What a forward makes anew, such as positions for this size of images, may have grown from a placeholder.
    placeholder = not place.persistent and info.values is None
    limit = tuple(max(n, m) if m == 1 and placeholder else m for n, m in zip(info.shape, shape))
    if not alike or len(info.shape) != len(shape) or not _at_most(info.shape, limit):
        raise CheckpointError(
            f"{name}: stored as {info.dtype} of shape {info.shape}, but the dense model has {dtype} "
            f"of shape {shape}. Pruning only makes tensors smaller: this is not the model that was saved."
        )


def _check_attributes(description: Description, dense: nn.Module) -> None:
    modules = dict(dense.named_modules())
    for name, values in description.attributes.items():
        if name not in modules:
            raise CheckpointError(
                f"attributes: the dense model has no module {name!r}. It is not the one that was saved."
            )
        dense_sizes = size_attributes(modules[name])
        for attribute, value in values.items():
            before = dense_sizes.get(attribute)
            if not _at_most(value, before):
                raise CheckpointError(
                    f"{name}.{attribute}: stored as {value}, but the dense model has {before}. Pruning only makes "
                    "layers smaller: this is not the model that was saved."
                )


def filled(dense: nn.Module, description: Description, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the dense model the stored shapes, attributes and values, in place.

    Args:
        dense: What `check_fits` has accepted.
        description: What is stored.
        state: The tensors in the file, as `Description.entries` says.

    Returns:
        The same model, plain: what is masked is zero and gets its mask from `stored_masks`.
    """
    made: dict[str, Tensor] = {}
    found, names = places(dense), description.names
    for name, stored in names.items():
        place = found[name]
        if stored not in made:
            made[stored] = _empty_like(place.tensor, description.tensors[stored])
        place.owned[place.name] = made[stored]
    modules = dict(dense.named_modules())
    for name, values in description.attributes.items():
        set_size_attributes(modules[name], values)
    whole = {name: _whole(name, info, state) for name, info in description.tensors.items()}
    persistent = {name: whole[stored] for name, stored in names.items() if found[name].persistent}
    dense.load_state_dict(persistent, strict=True)
    for name, place in found.items():
        if not place.persistent:
            place.tensor.copy_(whole[names[name]])
    _attach(dense, description)
    return dense


def stored_masks(model: nn.Module, description: Description, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> boolean mask of every parameter of a `filled` model that was masked, as ``put_masks`` takes them."""
    stored = {slot.name: description.names[slot.name] for slot in slots(model)}
    return {
        name: unpacked_mask(state[bitmap_name(origin)], description.tensors[origin].shape)
        for name, origin in stored.items()
        if description.tensors[origin].masked
    }


def _whole(name: str, info: TensorInfo, state: Mapping[str, Tensor]) -> Tensor:
    if info.values is None:
        return state[name]
    return unpacked(state[name], state[bitmap_name(name)], info.shape, DTYPES[info.dtype])


def _empty_like(tensor: Tensor, info: TensorInfo) -> Tensor:
    layout = torch.channels_last if info.channels_last else torch.contiguous_format
    empty = torch.empty(info.shape, dtype=DTYPES[info.dtype], memory_format=layout)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _attach(model: nn.Module, description: Description) -> None:
    """What timm and the next `save` look for on the model."""
    if description.data_config is not None:
        old = getattr(model, "pretrained_cfg", None) or {}
        # Sizes for testing would win over the stored ones where a caller asks for them.
        kept = {key: value for key, value in dict(old).items() if key not in ("test_input_size", "test_crop_pct")}
        model.pretrained_cfg = model.default_cfg = kept | dict(description.data_config)  # type: ignore[assignment]


def _at_most(value: int | tuple[int, ...], limit: Any) -> bool:
    if isinstance(value, tuple) and isinstance(limit, tuple):
        return len(value) == len(limit) and all(a <= b for a, b in zip(value, limit, strict=True))
    return isinstance(value, int) and isinstance(limit, int) and value <= limit


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])} ({len(names)} in all)" if names else "nothing"
