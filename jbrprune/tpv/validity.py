"""Where first order holds, and warnings that name what went wrong."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.passes import own
from jbrprune.data.batches import iterate
from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.evaluation.agreement import check_weights
from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of
from jbrprune.tpv.gradients import checked_direction
from jbrprune.tpv.responses import Output, changed_outputs, linear_outputs

TOLERANCE = 0.1
"""Relative error of the first-order change up to which it is called valid."""


ROUNDING = 0.1
"""Share of a change that may be lost in the rounding of the weights without a warning."""


class TPVWarning(UserWarning):
    """A number was computed, and there is a reason not to trust it."""


@dataclass(frozen=True)
class Validity:
    r"""How far the first-order change of the outputs is from the real one.

    Attributes:
        scales: Multiples t of the direction d, ascending.
        errors: For every t, sqrt(sum \|f(w + t d) - f(w) - t J d\|^2 / sum \|f(w + t d) - f(w)\|^2), sums over samples
            and outputs. 0 where neither changes anything; inf where only the first-order change is not zero.
        largest_valid: Largest t up to which all errors are at most the tolerance; 0 where there is none. Small t whose
            error is larger than that of the next t do not count: what falls as t grows is rounding, not curvature.
        tolerance: That tolerance.
        samples: Samples looked at.
    """

    scales: tuple[float, ...]
    errors: tuple[float, ...]
    largest_valid: float
    tolerance: float
    samples: int

    @property
    def valid(self) -> bool:
        """Whether first order holds at the size of the direction itself, t = 1."""
        return self.largest_valid >= 1

    def at(self, scale: float) -> float:
        """The error at one of the scales."""
        return self.errors[self.scales.index(scale)]

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types; an infinite error is None."""
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return facts | {"errors": [error if _finite(error) else None for error in self.errors]}


def taylor_error(
    model: nn.Module,
    data: object,
    direction: Mapping[str, Tensor],
    scales: Sequence[float] = (0.125, 0.25, 0.5, 1.0),
    *,
    tolerance: float = TOLERANCE,
    samples: int | None = None,
    batch_size: int = 32,
    output: Output = logits_of,
    progress: bool = True,
) -> Validity:
    r"""Relative error of the first-order change of the outputs against the real one, for every scale of a direction.

    e(t) = sqrt(sum \|f(w + t d) - f(w) - t J d\|^2 / sum \|f(w + t d) - f(w)\|^2) over samples and outputs.

    Args:
        model: Any module; left as it was.
        data: Anything that yields images (`jbrprune.data.batches.iterate`); read once, streaming.
        direction: Parameter name -> d of the parameter's shape.
        scales: Multiples t of the direction.
        tolerance: Error up to which first order is called valid.
        samples: Images to look at, at most.
        batch_size: Images per pass where the data do not say.
        output: What the model returns -> ``[B, K]``; default: the logits.
        progress: Show a progress bar.

    Raises:
        ArgumentError: No scales, scales or a tolerance that are not positive, a direction of another model.
        NonFiniteError: NaN or Inf in weights or outputs.
        ModelError: An operation has no forward-mode derivative.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> change = {"1.weight": torch.ones(4, 12)}
        >>> taylor_error(net, torch.randn(8, 3, 2, 2), change, [1.0, 2.0], progress=False).largest_valid  # it is linear
        2.0
    """
    ordered = _checked_scales(scales, tolerance)
    check_weights(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    change = checked_direction(direction, shapes)
    device = preserve.device_of(model)
    wrong, real, seen = [0.0] * len(ordered), [0.0] * len(ordered), 0
    batches = iterate(data, batch_size=batch_size)
    for batch in tqdm(batches, "first order", unit="batch", disable=not progress, leave=False):
        images = own(batch.images.to(device))[: None if samples is None else samples - seen]
        with preserve.inference_state(model):
            outputs, product = linear_outputs(model, images, change, output)
            for i, scale in enumerate(ordered):
                scaled = {name: scale * d for name, d in change.items()}
                difference = changed_outputs(model, images, scaled, output).double() - outputs.double()
                wrong[i] += float((difference - scale * product.double()).square().sum())
                real[i] += float(difference.square().sum())
        seen += len(images)
        if seen == samples:
            break
    if not all(map(_finite, wrong + real)):
        raise NonFiniteError("The outputs of the changed model contain NaN or Inf: the direction is too long for it.")
    errors = tuple(_ratio(a, b) for a, b in zip(wrong, real))
    return Validity(ordered, errors, _largest_valid(ordered, errors, tolerance), tolerance, seen)


def warn_if_invalid(validity: Validity | None) -> None:
    """Warn where first order does not hold at the size of the perturbation itself."""
    if validity is not None and not validity.valid and 1.0 in validity.scales:
        fails = (
            f"First order is not valid at this size of the perturbation: the real change of the outputs differs from "
            f"the predicted one by {validity.at(1.0):.0%} (tolerance {validity.tolerance:.0%})."
        )
        cure = (
            f"It is valid up to {validity.largest_valid:g} times this size. Make the perturbation smaller, or measure "
            "with jbrprune.tpv.empirical."
        )
        if _rounded(validity.errors):
            cure = (
                "The error does not grow with the size, as that of rounding: the real change may be too small to be "
                "seen in this dtype. Make the perturbation larger, or use a model in float64."
            )
        warnings.warn(f"{fails} {cure}", TPVWarning, stacklevel=3)


def warn_if_rounded(lost: float) -> None:
    """Warn where adding a change to the weights makes another change of it."""
    if lost > ROUNDING:
        warnings.warn(
            f"The perturbation is too small for the dtype of the weights: added to them, it is rounded to something "
            f"that is off by {lost:.0%}, and what is measured is the rounding. Use the model in "
            "float32 or float64, a larger perturbation, or trace_form.",
            TPVWarning,
            stacklevel=3,
        )


def _checked_scales(scales: Sequence[float], tolerance: float) -> tuple[float, ...]:
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise ArgumentError(f"scales must be positive numbers, at least one, got {list(scales)}.")
    if not tolerance > 0:
        raise ArgumentError(f"tolerance must be positive, got {tolerance}.")
    return tuple(sorted({float(scale) for scale in scales}))


def _finite(value: float) -> bool:
    return value == value and value != float("inf")


def _ratio(wrong: float, real: float) -> float:
    if real == 0:
        return 0.0 if wrong == 0 else float("inf")
    return (wrong / real) ** 0.5


def _rounded(errors: Sequence[float]) -> bool:
    """Whether errors fall as the scale grows, or are infinite: rounding does that, curvature the opposite."""
    return len(errors) > 1 and (errors[-1] < errors[0] or not _finite(errors[0]))


def _largest_valid(scales: Sequence[float], errors: Sequence[float], tolerance: float) -> float:
    largest, seen = 0.0, 0
    while seen + 1 < len(errors) and errors[seen] > max(tolerance, errors[seen + 1]):
        seen += 1  # lost in rounding
    for scale, error in zip(scales[seen:], errors[seen:]):
        if not error <= tolerance:
            break
        largest = scale
    return largest
