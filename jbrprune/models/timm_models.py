"""timm models by name: make them, describe how they were made, say which images they want.

They read what timm leaves on a model: ``pretrained_cfg``, and in ``_model_args`` the arguments of
``timm.create_model``. A model that is not timm's has no recipe and no preferred image size: the functions return None
or say so.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import pickle
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict, get_pretrained_cfg
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, CheckpointError, ModelError
from jbrprune.models import layers

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which a file holds weights beside other things, as in timm: averaged weights first."""

PREPROCESSING = ("input_size", "fixed_input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Recipe:
    """How to make an untrained copy of a timm model; both fields can be written to JSON.

    Attributes:
        name: timm's name, with the pretrained tag (``resnet50.a1_in1k``) that carries the preprocessing.
        arguments: Keyword arguments of ``timm.create_model``.
    """

    name: str
    arguments: dict[str, object] = field(default_factory=dict)


def create(name: str, *, pretrained: bool = True, checkpoint: str | Path | None = None, **arguments: Any) -> nn.Module:
    """Make a timm model with pretrained weights, weights from a local file, or random weights.

    Args:
        name: A name from ``timm.list_models()``, with or without a pretrained tag, or ``hf-hub:...``.
        pretrained: Fetch timm's weights; ignored if ``checkpoint`` is given.
        checkpoint: A local file of weights, see `load_weights`.
        **arguments: Passed to ``timm.create_model`` (``num_classes``, ``in_chans``, ``img_size``, ...).

    Returns:
        The model, in training mode as timm makes it.

    Raises:
        ArgumentError: Unknown name or pretrained tag, or an argument that this model does not take.
        ModelError: The pretrained weights cannot be had (no connection, none published).
        CheckpointError: The file is missing, damaged, holds more than weights, or does not fit.

    Example:
        >>> create("resnet10t", pretrained=False, num_classes=10).num_classes
        10
    """
    check_name(name)
    fetch = pretrained and checkpoint is None
    try:
        model = timm.create_model(name, pretrained=fetch, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise ArgumentError(f"timm cannot make {name!r} with {shown}: {_shorten(error)}.") from error
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        if not fetch and ":" not in name:
            raise
        raise ModelError(
            f"The pretrained weights of {name!r} cannot be had ({type(error).__name__}: {_shorten(error)}). Without a "
            "connection, pass a local file: checkpoint='weights.safetensors' in Python, --checkpoint "
            "weights.safetensors in the shell."
        ) from error
    if not hasattr(model, "_model_args"):  # timm before 1.0.28 does not record them
        placement = ("device", "dtype", "cache_dir")
        model._model_args = {key: value for key, value in arguments.items() if key not in placement}  # type: ignore[assignment]
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a local file into a model.

    Args:
        model: The model to fill.
        path: A ``.safetensors`` file, or a ``.pth`` file that holds nothing but weights, bare or, as timm's trainer
            writes them, under one of `WRAPPERS`. The weights are converted to the model's own dtype.

    Raises:
        CheckpointError: The file is missing, damaged, holds more than weights, or does not fit.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            stored: object = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training script
                stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds more than weights: {blocked[1] if blocked else 'an unknown pickle'}. It was not executed. "
            "If you trust its origin, write its weights to a .safetensors file where the file was made, and pass that."
        ) from error
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as weights ({type(error).__name__}: {_shorten(error)})."
        ) from error
    if isinstance(stored, Mapping):
        stored = next((stored[key] for key in WRAPPERS if isinstance(stored.get(key), Mapping)), stored)
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        keys = textwrap.shorten(", ".join(map(str, stored)) or "none", 200) if isinstance(stored, Mapping) else "none"
        raise CheckpointError(
            f"{path} does not hold weights: expected names with tensors, bare or under one of {', '.join(WRAPPERS)}; "
            f"got a {type(stored).__name__} with the keys: {keys}."
        )
    try:
        keys = model.load_state_dict(clean_state_dict(dict(stored)), strict=False)
        found = {"missing from the file": keys.missing_keys, "unknown to the model": keys.unexpected_keys}
        problems = [f"{textwrap.shorten(', '.join(names), 200)} {what}" for what, names in found.items() if names]
    except RuntimeError as error:  # of other shapes
        problems = [_shorten(error)]
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. Make the model with the arguments "
            "that the file was made with (num_classes=, in_chans=, img_size=, ...)."
        )


def recipe(model: nn.Module) -> Recipe | None:
    """How to make this model again, weights aside.

    Taken from the arguments that timm recorded. Class count, input channels and image size are read from the model as
    it is now, so a classifier that was replaced is seen. Limit: any other part that was replaced by hand after
    construction is not seen.

    Args:
        model: Any model.

    Returns:
        The recipe; None for a model that timm did not make, or was given an argument that JSON cannot hold (logged).
    """
    config = _config(model)
    if not config.get("architecture"):
        return None
    name = str(config["architecture"])
    registered = _registered(f"{name}.{config.get('tag')}") if config.get("tag") else None
    if registered is not None:
        name = f"{name}.{config['tag']}"
    arguments = dict(getattr(model, "_model_args", {}))
    if hasattr(timm.models, "get_model_args"):
        arguments |= timm.models.get_model_args(model)
    arguments = {key: value for key, value in arguments.items() if not key.startswith("pretrained_cfg")}
    registered = registered or _registered(name)
    changed = {k: config[k] for k in PREPROCESSING if k in config and config[k] != getattr(registered, k, None)}
    if registered is not None and changed:
        arguments["pretrained_cfg_overlay"] = changed
    current = {"in_chans": _input_channels(model), "num_classes": count_classes(model)}
    current["img_size"] = _spatial_size(model)
    arguments |= {key: value for key, value in current.items() if value is not None}
    try:
        return Recipe(name, json.loads(json.dumps(arguments)))
    except (TypeError, ValueError) as error:
        logger.warning("%s cannot be made again from a file: %s in %s.", name, error, arguments)
        return None


def count_classes(model: nn.Module) -> int | None:
    """Outputs of a model's classifier as it is now; where it has none to look at, what the model says."""
    classifier = next(iter(layers.get_heads(model)), None)
    classes = getattr(classifier, "out_features", getattr(classifier, "out_channels", None))
    return classes if isinstance(classes, int) else getattr(model, "num_classes", None)


def build(recipe: Recipe) -> nn.Module:
    """Make an untrained model from a recipe; lists become the tuples that timm expects.

    Args:
        recipe: From `recipe`, or read back from JSON.

    Returns:
        The model with random weights.

    Raises:
        ArgumentError: This timm does not know the name or an argument.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return create(recipe.name, pretrained=False, checkpoint=None, **tuples(recipe.arguments))


def image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a timm model wants; None if it is not timm's.

    The size of the pretrained weights, overridden by the channels of the first convolution and by the image size
    that the model was made or resized for.

    Example:
        >>> image_size(create("resnet10t", pretrained=False, in_chans=1))
        (1, 176, 176)
    """
    stored = _config(model).get("input_size")
    if not stored:
        return None
    height, width = _spatial_size(model) or stored[1:]
    return _input_channels(model), height, width


def data_config(model: nn.Module) -> dict[str, Any]:
    """Preprocessing for a timm model, as keyword arguments of ``timm.data.create_transform``.

    timm's, with the image size the model wants now. Where the number of channels is not that of timm's mean and
    standard deviation, their averages are used for every channel.

    Args:
        model: A timm model.

    Returns:
        ``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``.

    Raises:
        ModelError: Not a timm model: nothing says how its images are prepared.
    """
    size = image_size(model)
    if size is None:
        raise ModelError(
            f"{type(model).__name__} carries no pretrained_cfg, so its preprocessing is not known. Pass tensors, or a "
            "Dataset or DataLoader that applies the transform the model was trained with."
        )
    config = resolve_data_config({"input_size": size}, model=model)
    for key in ("mean", "std"):
        if len(config[key]) != size[0]:
            config[key] = (sum(config[key]) / len(config[key]),) * size[0]
    return config


def check_name(name: str) -> None:
    """Refuse a name that timm does not know, with or without a tag of weights.

    Raises:
        ArgumentError: Unknown name or tag.
    """
    architecture, _, tag = name.partition(".")
    if ":" in name or (timm.is_model(architecture) and (not tag or _registered(name) is not None)):
        return
    if timm.is_model(architecture):
        known = [n.partition(".")[2] for n in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise ArgumentError(f"timm's {architecture} has no weights tagged {tag!r}. Tags: {', '.join(known) or 'none'}.")
    near = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
    hint = f"Nearest names: {', '.join(near)}." if near else "timm.list_models() lists them."
    raise ArgumentError(f"timm {timm.__version__} has no model named {name!r}. {hint}")


def _config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _registered(name: str) -> object:
    """What timm registers under a name, None where it registers nothing (weights from a hub have tags of their own)."""
    try:
        return get_pretrained_cfg(name)
    except (RuntimeError, LookupError):
        return None


def _input_channels(model: nn.Module) -> int:
    """Input channels: of the first convolution, unless that sees several pixels folded into channels."""
    config = _config(model)
    names = config.get("first_conv") or ""
    convolution = dict(model.named_modules()).get(names if isinstance(names, str) else names[0])
    known = getattr(model, "in_chans", config.get("input_size", (3,))[0])
    folded = (4 * known, 16 * known)
    return known if getattr(convolution, "in_channels", known) in folded else getattr(convolution, "in_channels", known)


def _spatial_size(model: nn.Module) -> tuple[int, int] | None:
    """Image size that the model was made or resized for, where it keeps one."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or getattr(model, "_traits", {}).get("img_size") or getattr(model, "_model_args", {}).get("img_size")
    return timm.layers.to_2tuple(size) if size else None  # type: ignore[return-value]


def _shorten(error: BaseException) -> str:
    """The message of an error on one line."""
    return textwrap.shorten(str(error), 400).rstrip(".") or "no message"
