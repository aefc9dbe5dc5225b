"""timm models by name: make them, describe how they were made, say which images they want.

Reads what timm leaves on a model (``pretrained_cfg``, and the arguments of ``timm.create_model`` where the
installed version records them) and what `create` leaves there (``jbrprune_recipe``). A model that is not
timm's has no recipe and no preferred image size: the functions return None or say so.
"""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, CheckpointError, ModelError

logger = logging.getLogger(__name__)

_RECIPE = "jbrprune_recipe"
_WRAPPERS = ("state_dict", "model")
_PREPROCESSING = ("input_size", "fixed_input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_PLACEMENT = ("device", "dtype", "cache_dir", "pretrained_model_args")
_FETCHING_FAILED = (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


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
        checkpoint: A local ``.safetensors`` file, or a ``.pth`` file that holds nothing but weights,
            bare or inside ``{"state_dict": ...}`` or ``{"model": ...}``. Stored in half precision or not,
            the weights are copied into the model's own dtype.
        **arguments: Passed to ``timm.create_model`` (``num_classes``, ``in_chans``, ``img_size``, ...).

    Returns:
        The model, in training mode as timm makes it, with its `Recipe` in ``jbrprune_recipe``.

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
        raise ArgumentError(f"timm cannot make {name!r} with {_shown(arguments)}: {_first_line(error)}.") from error
    except _FETCHING_FAILED as error:
        if not fetch and ":" not in name:
            raise
        raise ModelError(_unreachable(name, error)) from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    setattr(model, _RECIPE, Recipe(name, {k: v for k, v in arguments.items() if k not in _PLACEMENT}))
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a local file into a model, every key or none.

    Args:
        model: The model to fill.
        path: See ``checkpoint`` of `create`.

    Raises:
        CheckpointError: The file is missing, damaged, holds more than weights, or does not fit.
    """
    state = _unwrapped(_read(Path(path).expanduser()), path)
    problems = _misfits(model.state_dict(), state)
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. Make the model with the arguments "
            "that the file was made with (num_classes=, in_chans=, img_size=, ...)."
        )
    model.load_state_dict(state, strict=not _lacks_counters(model, state))


def recipe(model: nn.Module) -> Recipe | None:
    """How to make this model again, weights aside.

    Taken from what `create` recorded, else from the arguments that timm recorded, else from the model itself.
    Class count, input channels and image size are always read from the model as it is now, so a classifier that
    was replaced is seen. Limit: any other part that was replaced by hand after construction is not seen, nor, with
    timm versions that record nothing, are other arguments of a call to ``timm.create_model`` (``depth=6``).

    Args:
        model: Any model.

    Returns:
        The recipe; None for a model that timm did not make, or was given an argument that JSON cannot hold (logged).
    """
    cfg = _config(model)
    if not cfg.get("architecture"):
        return None
    name = _full_name(cfg)
    arguments = {**_recorded(model), **_current(model)}
    overlay = _preprocessing_changes(cfg, name)
    if overlay:
        arguments["pretrained_cfg_overlay"] = overlay
    try:
        return Recipe(name, json.loads(json.dumps(arguments)))
    except (TypeError, ValueError, AssertionError) as error:
        logger.warning("%s cannot be made again from a file: %s in %s.", name, error, _shown(arguments))
        return None


def build(recipe: Recipe) -> nn.Module:
    """Make an untrained model from a recipe; lists become the tuples that timm expects.

    Args:
        recipe: From `recipe`, or read back from JSON.

    Returns:
        The model with random weights.

    Raises:
        ArgumentError: This timm does not know the name or an argument.
    """
    arguments = cast("dict[str, Any]", _tuples(recipe.arguments))
    return create(recipe.name, pretrained=False, checkpoint=None, **arguments)


def image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a timm model wants; None if it is not timm's.

    The size of the pretrained weights, overridden by the channels of the first convolution and by the image size
    that the model was made or resized for.

    Example:
        >>> image_size(create("resnet10t", pretrained=False, in_chans=1))
        (1, 176, 176)
    """
    cfg = _config(model)
    if not cfg.get("input_size"):
        return None
    height, width = _spatial(model) or _stored_size(cfg)[1:]
    return _channels(model), height, width


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


def _unreachable(name: str, error: BaseException) -> str:
    return (
        f"The pretrained weights of {name!r} cannot be had ({type(error).__name__}: {_first_line(error)}). Without a "
        "connection, pass a local file: checkpoint='weights.safetensors' in Python, --checkpoint weights.safetensors "
        "in the shell."
    )


def _read(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights: {_blocked(error)}. It was not executed. If you trust its origin, write "
            "its weights to a .safetensors file where the file was made, and pass that."
        ) from error
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, SafetensorError) as error:
        what = f"{type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(f"{path} cannot be read as weights ({what}).") from error


def _blocked(error: BaseException) -> str:
    told = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    return told[0].split(" was not ")[0].removeprefix("WeightsUnpickler error: ") if told else "an unknown pickle"


def _unwrapped(stored: object, path: str | Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        raise CheckpointError(
            f"{path} does not hold weights: expected names with tensors, bare or under one of "
            f"{', '.join(map(repr, _WRAPPERS))}; got {_described(stored)}."
        )
    return {str(key).removeprefix("module."): value for key, value in stored.items()}


def _described(stored: object) -> str:
    if isinstance(stored, Mapping):
        return f"a dict with keys {_listed(map(str, stored))}" if stored else "an empty dict"
    return type(stored).__name__


def _misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    shapes = [
        f"{key} is {tuple(value.shape)} in the file, {tuple(wanted[key].shape)} in the model"
        for key, value in given.items()
        if key in wanted and wanted[key].shape != value.shape
    ]
    found = {"missing from the file": missing, "unknown to the model": unexpected, "other shapes": shapes}
    return [f"{what}: {_listed(keys)}" for what, keys in found.items() if keys]


def _lacks_counters(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    return any(key not in state for key in model.state_dict())


def _config(model: nn.Module) -> Mapping[str, object]:
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def _stored_size(cfg: Mapping[str, object]) -> tuple[int, int, int]:
    return cast("tuple[int, int, int]", tuple(cast("Iterable[int]", cfg.get("input_size") or (3, 224, 224))))


def _full_name(cfg: Mapping[str, object]) -> str:
    tagged = f"{cfg['architecture']}.{cfg.get('tag')}"
    return tagged if cfg.get("tag") and _registered(tagged) is not None else str(cfg["architecture"])


def _registered(name: str) -> object:
    """What timm registers under a name, None where it registers nothing (weights from a hub have tags of their own)."""
    try:
        return get_pretrained_cfg(name)
    except (RuntimeError, LookupError):
        return None


def _preprocessing_changes(cfg: Mapping[str, object], name: str) -> dict[str, object]:
    """Preprocessing that differs from what timm registers under the name (weights from a hub, an overlay)."""
    registered = _registered(name)
    if registered is None:
        return {}
    return {k: cfg[k] for k in _PREPROCESSING if k in cfg and cfg[k] != getattr(registered, k, None)}


def _recorded(model: nn.Module) -> dict[str, object]:
    """Arguments of the call that made the model, and what timm saw change since (pooling), as far as they are known."""
    made = getattr(model, _RECIPE, None)
    arguments = dict(getattr(model, "_model_args", {}) if made is None else made.arguments)
    if hasattr(model, "_model_args") and hasattr(timm.models, "get_model_args"):
        arguments.update(timm.models.get_model_args(model))
    return {key: value for key, value in arguments.items() if not key.startswith("pretrained_cfg")}


def _current(model: nn.Module) -> dict[str, object]:
    """Arguments that can be read from the model as it is."""
    found: dict[str, object] = {"in_chans": _channels(model)}
    classes = _classes(model)
    if classes is not None:
        found["num_classes"] = classes
    size = _spatial(model)
    if size is not None:
        found["img_size"] = size
    return found


def _classes(model: nn.Module) -> int | None:
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if isinstance(head, tuple | list) and head:
        head = head[0]
    out = getattr(head, "out_features", getattr(head, "out_channels", None))
    return out if isinstance(out, int) else getattr(model, "num_classes", None)


def _channels(model: nn.Module) -> int:
    """Input channels: of the first convolution, unless that sees several pixels folded into channels."""
    cfg = _config(model)
    known = getattr(model, "in_chans", None)
    conv = _first_convolution(model, cfg)
    if isinstance(known, int) and (conv is None or conv.in_channels in (4 * known, 16 * known)):
        return known
    return conv.in_channels if conv is not None else _stored_size(cfg)[0]


def _first_convolution(model: nn.Module, cfg: Mapping[str, object]) -> nn.Conv2d | None:
    names = cfg.get("first_conv") or ()
    name = names if isinstance(names, str) else next(iter(cast("Iterable[str]", names)), None)
    module = dict(model.named_modules()).get(name) if name else None
    return module if isinstance(module, nn.Conv2d) else None


def _spatial(model: nn.Module) -> tuple[int, int] | None:
    """Image size that the model was made or resized for, where it keeps one."""
    recorded = getattr(model, _RECIPE, None)
    candidates = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "_traits", {}).get("img_size"),
        recorded.arguments.get("img_size") if recorded is not None else None,
    )
    size = next((size for size in candidates if size), None)
    if isinstance(size, int):
        return size, size
    return None if size is None else (int(size[0]), int(size[1]))


def _tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _shown(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"


def _listed(items: Iterable[str], most: int = 5) -> str:
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
