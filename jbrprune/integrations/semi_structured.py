"""2:4 sparse linear layers on hardware that computes with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jbrprune.errors import ModelError
from jbrprune.models import preserve
from jbrprune.sparsity.masks import masks_of

LEAST_CAPABILITY = (8, 0)
"""CUDA compute capability from which on tensor cores know 2:4 sparsity (Ampere)."""


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Store the 2:4 sparse weights of linear layers as ``torch.sparse.to_sparse_semi_structured`` does, in place.

    The model must be on a CUDA device of compute capability 8.0 or later, in a dtype of its sparse kernels (float16,
    bfloat16). It computes the same, up to rounding, and can no longer be trained or saved: do this last.

    Args:
        model: A plain model, as ``prune(..., structure="2:4")`` gives it; `jbrprune.make_permanent` makes one.

    Returns:
        Name of a linear layer -> why it stays dense; empty where all were converted.

    Raises:
        ModelError: The device has no such kernels, the model is masked, or no linear layer is 2:4 sparse.

    Source:
        Mishra et al., arXiv 2104.08378.
    """
    masked = masks_of(model)
    if masked:
        raise ModelError(f"{min(masked)} is masked by torch.nn.utils.prune: call jbrprune.make_permanent(model) first.")
    _check_device(preserve.device_of(model))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sparse = {name: module for name, module in linear.items() if is_two_to_four(module.weight)}
    if not sparse:
        raise ModelError(
            f"None of {len(linear)} linear layers is 2:4 sparse (at most two of every four weights along the inputs). "
            "Prune with structure='2:4' first; convolutions have no such kernels."
        )
    left = dict.fromkeys(linear.keys() - sparse.keys(), "its weight is not 2:4 sparse")
    reasons = {name: _converted(module) for name, module in sparse.items()}
    return left | {name: reason for name, reason in reasons.items() if reason}


def _converted(module: nn.Linear) -> str:
    """Convert a layer; why that did not work, or an empty string."""
    try:
        weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())
    except (RuntimeError, ValueError) as error:  # shapes and dtypes that the kernels do not know
        return str(error).splitlines()[0]
    module.weight = nn.Parameter(weight, requires_grad=False)
    return ""


def is_two_to_four(weight: Tensor) -> bool:
    """Whether of every four weights along the inputs at most two are not zero.

    Args:
        weight: ``[outputs, inputs]``.

    Example:
        >>> is_two_to_four(torch.tensor([[0.0, 1.0, 2.0, 0.0]])), is_two_to_four(torch.ones(1, 4))
        (True, False)
    """
    if weight.shape[1] % 4:
        return False
    return bool((weight.detach().unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all())


def _check_device(device: torch.device) -> None:
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < LEAST_CAPABILITY:
        what = str(device) if found is None else f"{device} of compute capability {found[0]}.{found[1]}"
        raise ModelError(
            f"The model is on {what}, which has no 2:4 sparse kernels: that takes a CUDA device of compute capability "
            "8.0 or later. The zeros are in the plain weights already; move the model there first."
        )
