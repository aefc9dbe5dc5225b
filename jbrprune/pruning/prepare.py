"""A dense model and images that are known to fit it: what every run starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data import images as loading
from jbrprune.errors import JBRError, ModelError
from jbrprune.models import preserve, timm_models
from jbrprune.pruning.calibration import Calibration, calibration, check_runs
from jbrprune.pruning.scoring import example_of, peeked

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Opened:
    """The dense model, and images that are known to fit it."""

    dense: nn.Module
    example: Tensor
    images: object
    recipe: timm_models.Recipe | None
    config: Mapping[str, object] | None
    name: str
    outputs: int

    def check_classes(self, what: str) -> None:
        """Refuse a model with one output for what asks whether the top-1 stays.

        Raises:
            ModelError: It has one output K.
        """
        if self.outputs < 2:
            raise ModelError(
                f"{what} asks whether the largest of several logits stays the largest, but {self.name} has one output: "
                "that never changes, whatever is removed. For a regression, prune to a budget (macs=, params=) and "
                "measure its error; jbrprune.tpv knows how far one output moves."
            )

    def read(self, arguments: Mapping[str, Any], *, judged: bool = False) -> Calibration:
        """All calibration images; with ``judged``, some of them to decide how far to prune."""
        names = ("images", "eval_data", "eval_images", "batch_size", "seed", "progress", "skip_corrupt")
        read = {name: arguments[name] for name in names}
        return calibration(self.dense, self.images, judged=judged, **read)


def opened_with(dense: nn.Module, data: object, arguments: Mapping[str, Any]) -> Opened:
    """See that the model runs on the first images; nothing else is read yet.

    Args:
        dense: A copy of the user's model; moved to the device, in eval mode.
        data: As for `jbrprune.prune`.
        arguments: Those of `jbrprune.prune`.

    Raises:
        DataError: The images cannot be used.
    """
    dense = dense.to(arguments["device"] or preserve.device_of(dense)).eval()
    images = loading.open_data(data, dense, batch_size=arguments["batch_size"], skip_corrupt=arguments["skip_corrupt"])
    first, images = peeked(images, arguments["batch_size"])
    example = example_of(dense, first)
    outputs = check_runs(dense, first.images.to(example.dtype))
    recipe = _recipe(dense)
    config = timm_models.data_config(dense) if timm_models.recipe(dense) else None
    return Opened(dense, example, images, recipe, config, recipe.name if recipe else type(dense).__name__, outputs)


def _recipe(dense: nn.Module) -> timm_models.Recipe | None:
    """How timm makes this very model; None if it was changed by hand, so that a file of it needs ``load(model=)``."""
    recipe = timm_models.recipe(dense)
    if recipe is None:
        return None
    try:
        with preserve.same_randomness(torch.device("cpu")):
            made = timm_models.build(recipe)
    except JBRError as error:
        log.warning("timm cannot make this model again (%s): a saved copy needs load(..., model=).", error)
        return None
    if _within(dense.state_dict(), made.state_dict()):
        return recipe
    log.warning("This is not timm's %s as it was made: a saved copy needs load(..., model=).", recipe.name)
    return None


def _within(smaller: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> bool:
    """The same tensors, none of them larger."""
    return smaller.keys() == dense.keys() and all(
        tensor.dim() == dense[name].dim() and all(n <= most for n, most in zip(tensor.shape, dense[name].shape))
        for name, tensor in smaller.items()
    )
