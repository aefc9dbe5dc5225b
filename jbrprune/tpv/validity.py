"""The change of the outputs with the weights, exact and to first order, and the range in which the two agree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from jbrprune.data.batches import iterate
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError
from jbrprune.evaluation.agreement import check_weights
from jbrprune.models.preserve import device_of, inference_state, logits_of
from jbrprune.tpv.covariances import Change, check_change

ReadRows = Callable[[object], Tensor]
"""What a model returns -> ``[B, K]``."""


class TPVWarning(UserWarning):
    """A number was computed, and there is a reason not to trust it."""


def outputs_of(
    model: nn.Module, images: Tensor, output: ReadRows = logits_of, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``[B, K]`` outputs; ``weights`` stand in for the model's parameters of the same names.

    Raises:
        ModelError: The outputs are not one row of floating-point numbers for every image.
    """
    returned = functional_call(model, dict(weights or {}), (images.clone(),))  # a model may change its input in place
    outputs = output(returned)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(images):
        got = f"{list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(f"`output=` must give [B, K], one row for each of {len(images)} images; it gave {got}.")
    return outputs


def change_outputs(model: nn.Module, images: Tensor, change: Change, output: ReadRows) -> Tensor:
    """``[B, K]`` f(w + dw), in the model's dtype. The model keeps its weights."""
    weights = dict(model.named_parameters())
    moved = {name: weights[name].detach() + d.to(weights[name]) for name, d in change.items()}
    return outputs_of(model, images, output, moved)


def linear_outputs(model: nn.Module, images: Tensor, change: Change, output: ReadRows) -> tuple[Tensor, Tensor]:
    """``[B, K]`` f(w) and the first-order change J(x) dw, by forward-mode differentiation.

    Raises:
        ModelError: An operation has no forward-mode derivative.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if name in change}
    tangents = {name: change[name].to(weight) for name, weight in weights.items()}
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            found = jvp(lambda moved: outputs_of(model, images, output, moved), (weights,), (tangents,))
    except NotImplementedError as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"No forward-mode derivative: {why} Use method='projection' and validity=False.") from error
    return found[0], found[1]


@dataclass(frozen=True)
class Validity:
    r"""Error of the first-order change of the outputs against the real one.

    Attributes:
        scales: Multiples t of the direction d, ascending.
        errors: For every t, sqrt(sum \|f(w + t d) - f(w) - t J d\|^2 / sum \|f(w + t d) - f(w)\|^2), sums over samples
            and outputs. 0 where neither changes anything; inf where only the first-order change is not zero.
        largest_valid: Largest t up to which all errors are at most the tolerance; 0 where there is none. Small t whose
            error is larger than that of the next t do not count: an error that falls as t grows is rounding, not
            curvature.
        tolerance: That tolerance.
        samples: Number of samples.
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

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types; an infinite error is None."""
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return facts | {"errors": [error if math.isfinite(error) else None for error in self.errors]}

    def warn(self) -> None:
        """Warn where first order does not hold at the size of the perturbation itself, t = 1."""
        if self.valid or 1.0 not in self.scales:
            return
        cure = f"It is valid up to {self.largest_valid:g} times this size. Make the perturbation smaller, or measure."
        if len(self.errors) > 1 and (self.errors[-1] < self.errors[0] or not math.isfinite(self.errors[0])):
            cure = (
                "The error does not grow with the size, as that of rounding: the perturbation may be too small for the "
                "dtype of the weights. Make it larger, or use a model in float64."
            )
        warnings.warn(
            f"First order is not valid at this size of the perturbation: the real change of the outputs differs from "
            f"the predicted one by {self.errors[self.scales.index(1.0)]:.0%} (tolerance {self.tolerance:.0%}). {cure}",
            TPVWarning,
            stacklevel=4,
        )


def taylor_error(
    model: nn.Module,
    data: object,
    direction: Change,
    scales: Sequence[float] = (0.125, 0.25, 0.5, 1.0),
    *,
    tolerance: float = 0.1,
    samples: int | None = None,
    batch_size: int = 32,
    output: ReadRows = logits_of,
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
    if not scales or not all(0 < scale < math.inf for scale in scales) or not tolerance > 0:
        raise ArgumentError(f"scales and tolerance must be positive numbers, got {list(scales)} and {tolerance}.")
    ordered = tuple(sorted({float(scale) for scale in scales}))
    check_weights(model)
    check_change(direction, dict(model.named_parameters()))
    wrong, real, seen = [0.0] * len(ordered), [0.0] * len(ordered), 0
    batches = iterate(data, batch_size=batch_size)
    for batch in tqdm(batches, "first order", unit="batch", disable=not progress, leave=False):
        images = batch.images.to(device_of(model))[: None if samples is None else samples - seen]
        with inference_state(model):
            outputs, product = linear_outputs(model, images, direction, output)
            for i, scale in enumerate(ordered):
                scaled = {name: scale * d for name, d in direction.items()}
                difference = change_outputs(model, images, scaled, output).double() - outputs.double()
                wrong[i] += float((difference - scale * product.double()).square().sum())
                real[i] += float(difference.square().sum())
        seen += len(images)
        if seen == samples:
            break
    if not all(map(math.isfinite, wrong + real)):
        raise NonFiniteError("The outputs of the changed model contain NaN or Inf: the direction is too long for it.")
    errors = tuple((a / b) ** 0.5 if b > 0 else math.inf if a > 0 else 0.0 for a, b in zip(wrong, real))
    known = list(zip(errors, ordered))
    while len(known) > 1 and known[0][0] > max(tolerance, known[1][0]):
        known.pop(0)  # lost in rounding
    largest = max((scale for _, scale in takewhile(lambda one: one[0] <= tolerance, known)), default=0.0)
    return Validity(ordered, errors, largest, tolerance, seen)
