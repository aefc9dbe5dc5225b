"""From a model to its description and its tensors, and back: the dense model, filled with what is left of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves

from jbrprune.checkpoint.description import (
    DTYPES,
    LARGEST_IMAGE,
    Description,
    Example,
    parse,
    read_tensor,
    store_tensor,
)
from jbrprune.errors import CheckpointError
from jbrprune.models import layers, preserve, timm_models
from jbrprune.sparsity.masks import PRUNABLE, fresh, masks_of, put_masks
from jbrprune.structure.directions import make_pair, replace_module

logger = logging.getLogger(__name__)

_LEAST_MODULES, _MODULES_EACH = 8192, 64
"""The dense model of a recipe may have this many modules, and so many more for each tensor that is stored."""
_OUTPUTS = 256
"""Of the outputs so many values are stored, evenly spaced."""
SAME, CLOSE = 1e-5, 1e-4
"""Largest relative difference of the outputs of one function: in one process, and on another machine."""


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
    model: nn.Module, size: Sequence[int] | None, report: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Make the body of the description (size and checksum of the weights are still missing) and the tensors to write.

    The dense model is built by its recipe, filled, and compared with the model on an example. Where it does not fit or
    computes something else, the body is without a recipe and says why.

    Args:
        model: The model.
        size: Channels, height and width of the example; None: what timm says, if it is known.
        report: What is known of the pruning.

    Raises:
        CheckpointError: The model holds something that cannot be saved, or does not run on the example.
        ModelError: Its masks cannot be put back, see `jbrprune.sparsity.masks.masks_of`.
    """
    masks_of(model)
    recipe, size = timm_models.recipe(model), size or timm_models.image_size(model)
    if size is None:
        logger.warning("load() will not compare outputs: pass size= of the images, (channels, height, width).")
    fits = size is not None and math.prod(size) <= LARGEST_IMAGE
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
            tensors[name], stored = store_tensor(name, place.tensor, place.mask, place.persistent)
            state |= stored
        else:
            aliases[name] = first[id(place.tensor)]
    sizes = {name: layers.size_attributes(module) for name, module in model.named_modules()}
    found = {
        "recipe": recipe and vars(recipe),
        "tensors": tensors,
        "aliases": aliases,
        "attributes": {name: own for name, own in sizes.items() if own},
        "pairs": {n: layers.width_of(pair[0], "out") for n, pair in model.named_modules() if layers.is_pair(pair)},
        "versions": {package: version(package) for package in ("jbrprune", "timm", "torch", "safetensors")},
        "weights": {"bytes": 0, "sha256": ""},
        "example": example and vars(example),
        "no_recipe": None if recipe else "it was not created by name",
        "data_config": recipe and timm_models.data_config(model),
        "report": report,
    }
    try:
        body = json.loads(json.dumps(found, allow_nan=False))  # as it will be read back
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"JSON cannot hold config, report or recipe: {error}. Use strings, finite numbers, lists and dicts."
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
    """Compute some output values for two fixed images of noise, the same on every machine; NaN and Inf count as 0.

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
    """Check that a model computes the same as the saved one: ||f(x) - f_saved(x)|| / ||f_saved(x)|| <= tolerance.

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


def create_on_meta(description: Description) -> nn.Module:
    """Create the dense model of a recipe on the meta device, where a tensor of any size takes no memory.

    It may have so many modules as a model with that many tensors can have: a recipe with a depth of a million would
    fill the memory with modules.
    """
    recipe = description.recipe
    if recipe is None:
        raise CheckpointError(
            "This model was saved without a recipe. Create the dense model and pass it: load(path, model=...). Reason: "
            f"{description.no_recipe}"
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
    """Replace each layer that was saved as two linear layers by such a pair, in place; return the model.

    Raises:
        CheckpointError: There is no such layer, or the two were no smaller.
    """
    for name, size in description.pairs.items():
        layer: Any = dict(dense.named_modules()).get(name)
        if not layers.is_pair(layer):
            if not layers.is_factorable(layer) or not 0 < size <= min(len(layer.weight), layer.weight[0].numel()):
                _refuse_misfit(name, f"two layers with {size} channels between them", layer)
            replace_module(dense, name, make_pair(layer, size))
    return dense


def check_fits(description: Description, dense: nn.Module) -> None:
    """Check that every stored tensor and size has a place in the dense model and is no larger than there.

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
        maskable = isinstance(tensor, nn.Parameter) and place.name in PRUNABLE
        alike = alike and place.persistent == info.persistent and (maskable or not info.masked)
        if not alike or len(limit) != tensor.dim() or not _at_most(info.shape, limit):
            _refuse_misfit(name, info, f"a {type(tensor).__name__} of {tensor.dtype} and shape {tuple(tensor.shape)}")
    modules = dict(dense.named_modules())
    for name, sizes in description.attributes.items():
        own = vars(modules[name]) if name in modules else {}
        for attribute, value in sizes.items():
            if not layers.is_size(own.get(attribute)) or not _at_most(value, own[attribute]):
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
    repeated = layers.repeated_widths(dense)
    for name, place in _places(dense).items():
        stored = description.names[name]
        info = description.tensors[stored]
        if stored not in made:
            values, kept = read_tensor(stored, info, state)
            if info.masked and kept is not None:
                masks[name] = kept
            trained = place.tensor.requires_grad
            made[stored] = nn.Parameter(values, trained) if isinstance(place.tensor, nn.Parameter) else values
        setattr(place.module, place.name, made[stored])
    sizes = [(dense.get_submodule(name), own) for name, own in description.attributes.items()]
    for module, own in sizes:
        layers.set_size_attributes(module, own)
    for set_width, layer, attribute in repeated:
        set_width(getattr(layer, attribute))
    for module, own in sizes:  # what is stored counts, also where it is not what a layer says
        layers.set_size_attributes(module, own)
    put_masks(dense, masks)
    classes = timm_models.count_classes(dense)
    if classes is not None and hasattr(dense, "num_classes"):
        setattr(dense, "num_classes", classes)  # noqa: B010 (to pyright it is a tensor)
    if description.data_config is not None:
        # timm's sizes for testing would win over the stored ones where a caller asks for them.
        old = dict(getattr(dense, "pretrained_cfg", None) or {})
        kept = {key: value for key, value in old.items() if key not in ("test_input_size", "test_crop_pct")}
        dense.pretrained_cfg = dense.default_cfg = kept | dict(description.data_config)  # type: ignore[assignment]
