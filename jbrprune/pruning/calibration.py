"""Calibration images: read once, seen once by the dense model, and split by what they are for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from jbrprune.data import distributed
from jbrprune.data import images as loading
from jbrprune.data.batches import Batch, attach_reference, concatenate, materialise, rebatch
from jbrprune.errors import ArgumentError, DataError, JBRError
from jbrprune.evaluation.agreement import agreement, compute_logits
from jbrprune.models import preserve, timm_models

FEWEST_TO_HOLD_BACK = 10
"""With fewer images nothing is held back, so nothing is repaired and no agreement is measured."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration images with the dense model's logits, by what they are for.

    Attributes:
        score: Units are scored on these (``repair`` and ``gate`` together).
        repair: The repair is fitted on these.
        gate: A repair is kept only if it helps on these.
        heldout: Agreement is reported on these, which are used for nothing else.
        described: Which images the held-out ones are.
        judge: How far to prune is decided on these; none unless asked for.
        judged: Which images these are.
    """

    score: list[Batch]
    repair: list[Batch]
    gate: list[Batch]
    heldout: list[Batch]
    described: str
    judge: list[Batch] = field(default_factory=list)
    judged: str = ""


def calibration(
    model: nn.Module,
    data: object,
    *,
    images: int | None,
    eval_data: object = None,
    eval_images: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    skip_corrupt: bool = False,
    judged: bool = False,
) -> Calibration:
    """Read the images, let the dense model look at them, and split them at random.

    A fifth is held out for the report, unless ``eval_data`` is given; another fifth gates the repair. With ``judged``,
    two fifths decide how far to prune; without ``eval_data`` the report is about these, and says so.

    Args:
        model: The dense model.
        data: As for `jbrprune.prune`; batches that carry the dense model's logits as reference keep them.
        images: Images to read; None: all.
        eval_data: Images to report the agreement on.
        eval_images: Images to read from ``eval_data``; None: all.
        batch_size: Images per pass.
        seed: Seeds the split.
        progress: Show a progress bar.
        skip_corrupt: Leave out images that cannot be read.
        judged: Set images aside that decide how far to prune.

    Raises:
        ArgumentError: A number of images below 1.
        DataError: The images cannot be used, or the model does not run on them.
        NonFiniteError: NaN or Inf in images or logits.
    """
    for what, number in (("images", images), ("eval_images", eval_images)):
        if number is not None and number < 1:
            raise ArgumentError(f"{what} must be at least 1, got {number}.")
    whole = _read(model, data, images, batch_size, progress, skip_corrupt)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    whole = whole.map(lambda tensor: tensor[order])
    fifth = len(whole) // 5 if len(whole) >= FEWEST_TO_HOLD_BACK else 0
    apart = 2 * fifth if judged else fifth if eval_data is None else 0
    aside, whole = _part(whole, 0, apart), _part(whole, apart, len(whole))
    if eval_data is None:
        heldout, purpose = aside, "also decided how far to prune" if judged else "were used for nothing else"
        described = f"{apart} calibration images that {purpose}"
    else:
        heldout = _read(model, eval_data, eval_images, batch_size, progress, skip_corrupt)
        described = f"{len(heldout)} images of eval_data"
    cut = len(whole) - fifth
    parts = (whole, _part(whole, 0, cut), _part(whole, cut, len(whole)), heldout, _part(aside, 0, apart * judged))
    score, repair, gate, rest, judge = (rebatch([part], batch_size) if len(part) else [] for part in parts)
    deciding = f"{apart} calibration images that neither score, repair nor gate" if judged else ""
    return Calibration(score, repair, gate, rest, described, judge, deciding)


def _part(batch: Batch, start: int, stop: int) -> Batch:
    return batch.map(lambda tensor: tensor[start:stop])


def _read(
    model: nn.Module, data: object, images: int | None, batch_size: int, progress: bool, skip_corrupt: bool
) -> Batch:
    """Images in the model's precision, with the dense model's logits."""
    opened = loading.open_data(data, model, batch_size=batch_size, skip_corrupt=skip_corrupt)
    with preserve.same_randomness(torch.device("cpu")):  # a loader draws when it is iterated
        batches = distributed.together(lambda: materialise(opened, images=images, batch_size=batch_size))
    batches = distributed.same(batches)  # a loader that shuffles gives every rank others
    parameter = preserve.first_tensor(model)
    if parameter is not None:
        batches = [replace(batch, images=batch.images.to(parameter.dtype)) for batch in batches]
    check_runs(model, batches[0].images)
    if any(batch.reference is None for batch in batches):
        batches = attach_reference(batches, compute_logits(model, batches, progress=progress))
    whole = concatenate(batches)
    if whole.reference is not None:
        agreement(whole.reference, whole.reference, whole.labels)  # refuses labels that are not the model's classes
    return whole


def check_runs(model: nn.Module, images: Tensor) -> int:
    """The number of outputs K of a model that accepts such images, by running it on the first one.

    Raises:
        DataError: It does not; says what it was made for, if it tells.
        ModelError: It does, but what comes out is not logits.
        NonFiniteError: NaN or Inf come out.
    """
    size = timm_models.image_size(model)
    wanted = f" It was made for {' x '.join(map(str, size))} (channels, height, width)." if size else ""
    if size and images.shape[1] != size[0]:
        raise DataError(f"The images have {images.shape[1]} channels, shape {tuple(images.shape)}.{wanted}")
    try:
        with distributed.alone():
            return compute_logits(model, [Batch(images[:1])])[0].shape[1]
    except JBRError:
        raise
    except Exception as error:  # whatever a foreign forward raises is the answer
        raise DataError(
            f"{type(model).__name__} does not run on {str(images.dtype).removeprefix('torch.')} images of shape "
            f"{tuple(images.shape)}: {str(error).rstrip('.')}.{wanted}"
        ) from error
