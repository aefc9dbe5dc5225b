"""GraSP: what keeps the gradient flowing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from baselines.common import label_losses, made, mean_gradients, products, shown, unit_sums
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch
from jbrprune.errors import ModelError
from jbrprune.models import preserve
from jbrprune.structure.groups import Group


def grasp(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], *, seed: int = 0, progress: bool = False
) -> Scores:
    """s_u = sum of w (H g) over all parameters of u (GraSP, Wang et al., ICLR 2020, arXiv 2002.07376).

    g and H are gradient and Hessian of the mean cross-entropy. What lowers the gradient flow least when it goes (or
    raises it) has the lowest score and goes first. The score is signed; so that a score per cost keeps its meaning, the
    lowest score of all units is subtracted from each. Departs from it in that the net is trained, that weights are
    added up to units, and that logits have no temperature.

    Raises:
        DataError: The batches have no labels.
        ModelError: An operation has no second derivative (a hard sigmoid, for instance).
    """
    gradients = mean_gradients(model, batches, "grasp", progress)
    flow = _hessian_times(model, batches, gradients, progress)
    values = unit_sums(model, groups, lambda part: products(part, flow).sum(1))
    lowest = min(float(value.min()) for value in values.values())
    values = {name: value - lowest for name, value in values.items()}
    return made(
        "grasp", values, groups, site="all", statistic="signed, above the lowest", samples=sum(map(len, batches))
    )


def _hessian_times(
    model: nn.Module, batches: Sequence[Batch], direction: dict[Tensor, Tensor], progress: bool
) -> dict[Tensor, Tensor]:
    """Parameter -> H times the direction, H the Hessian of the mean cross-entropy over all images."""
    leaves, count = list(direction), sum(map(len, batches))
    weights = [direction[leaf].to(leaf) for leaf in leaves]
    found = {leaf: torch.zeros_like(direction[leaf]) for leaf in leaves}
    # Fused attention has no second derivative.
    with preserve.inference_state(model, gradients=True), sdpa_kernel(SDPBackend.MATH):
        for batch in shown(batches, "grasp", progress):
            loss = label_losses(model, batch).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            along = sum((g * d).sum() for g, d in zip(first, weights, strict=True))
            for leaf, second in zip(leaves, _second(along, leaves), strict=True):  # type: ignore[arg-type]
                if second is not None:
                    found[leaf] += second.cpu().double() / count
    return found


def _second(along: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(along, leaves, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise ModelError(
            f"Criterion 'grasp' needs second derivatives, which an operation of this model has not: {error}. Choose "
            "another criterion for this model."
        ) from error
