"""How the outputs of a model answer to a change of its weights: really, and to first order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from jbrprune.errors import ModelError
from jbrprune.models.preserve import logits_of

Output = Callable[[object], Tensor]
"""What a model returns -> ``[B, K]``."""


def outputs_of(model: nn.Module, images: Tensor, output: Output = logits_of) -> Tensor:
    """``[B, K]`` the outputs, checked to be one row for every image."""
    return _rows(model(images.clone()), images, output)  # a clone, for a model that changes its input in place


def changed_outputs(model: nn.Module, images: Tensor, change: Mapping[str, Tensor], output: Output) -> Tensor:
    """``[B, K]`` f(w + dw), in the model's dtype. The model keeps its weights."""
    weights = dict(model.named_parameters())
    moved = {name: weights[name].detach() + d.to(weights[name]) for name, d in change.items()}
    return _rows(functional_call(model, moved, (images.clone(),)), images, output)


def rounding_error(model: nn.Module, change: Mapping[str, Tensor]) -> float:
    r"""\|((w + dw) - w) - dw\| / \|dw\|: how far what the dtype of the weights makes of a change is from it."""
    weights = dict(model.named_parameters())
    lost = meant = 0.0
    for name, d in change.items():
        weight = weights[name].detach()
        wide = d.double().to(weight.device)
        lost += float(((weight + d.to(weight)).double() - weight.double() - wide).square().sum())
        meant += float(wide.square().sum())
    return (lost / meant) ** 0.5 if meant > 0 else 0.0


def linear_outputs(
    model: nn.Module, images: Tensor, change: Mapping[str, Tensor], output: Output
) -> tuple[Tensor, Tensor]:
    """``[B, K]`` f(w), and the first-order change J(x) dw, by forward-mode differentiation.

    Raises:
        ModelError: An operation has no forward-mode derivative.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if name in change}
    tangents = {name: change[name].to(weight) for name, weight in weights.items()}

    def function(moved: dict[str, Tensor]) -> Tensor:
        return _rows(functional_call(model, moved, (images.clone(),)), images, output)

    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            found = jvp(function, (weights,), (tangents,))
    except NotImplementedError as error:
        raise ModelError(
            f"The model has no forward-mode derivative: {str(error).splitlines()[0]} Use method='projection' (or "
            "'exact'), and validity=False."
        ) from error
    return found[0], found[1]


def _rows(returned: object, images: Tensor, output: Output) -> Tensor:
    """``[B, K]`` in what the model returned."""
    try:
        outputs = output(returned)
    except ModelError as error:
        hint = "output=lambda out: out[0], or for a regression to one number output=lambda y: y[:, None]"
        raise ModelError(f"{error} Or say with `output=` which of it counts: {hint}.") from error
    return checked(outputs, images)


def checked(outputs: Tensor, images: Tensor) -> Tensor:
    """Refuse outputs that are not one row of numbers for every image."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or not outputs.is_floating_point():
        what = f"{list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(
            f"The outputs must be floating point [B, K], got {what}. Say with `output=` which tensor of what the model "
            "returns counts; for a regression to one number, output=lambda y: y[:, None]."
        )
    if len(outputs) != len(images):
        raise ModelError(f"{len(images)} images went in, {len(outputs)} rows of outputs came out.")
    return outputs


def applied(covariance: object, model: nn.Module) -> AbstractContextManager[object] | None:
    """The context in which a covariance really perturbs the model, if it has one of its own."""
    context = getattr(covariance, "applied", None)
    return None if context is None else context(model)
