"""Criteria that see labels: how the loss with labels changes when a unit goes.

Taylor, Group Fisher and the Jacobian criterion are forms of relevance, and stand in `baselines.CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from baselines.common import Part, Values, check_labels, label_losses, mean_gradients, multiply, sum_parts
from jbrprune.criteria.relevance import Relevance, relevances
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch
from jbrprune.data.distributed import number_batches
from jbrprune.errors import ModelError
from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Group


def taylor_abs(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = \|E_x[sum of g w]\|, over all images (the degree of Molchanov et al., ICLR 2017, arXiv 1611.06440).

    Departs from it as `taylor_per_sample` does, and in that all images are one batch, where the paper takes the
    absolute value for each image. torch-pruning's `tp_taylor` sees one batch as well.

    Raises:
        DataError: The batches have no labels.
    """
    return {name: mean.abs() for name, mean in _mean("taylor_abs", model, batches, groups, lambda v: v).items()}


def taylor_per_sample(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = E_x[\|sum of g w\|] over all parameters of u (Molchanov et al., ICLR 2017, arXiv 1611.06440, per sample).

    Departs from it in that the sum runs over parameters of producers, norms and consumers instead of one feature map,
    and that scores are neither divided by the positions of a map nor normalised layer by layer.

    Raises:
        DataError: The batches have no labels.
    """
    return _mean("taylor_per_sample", model, batches, groups, torch.abs)


def _mean(
    name: str, model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], of: Callable[[Tensor], Tensor]
) -> Values:
    """The mean over samples of a function of the relevances."""
    check_labels(name, batches)
    sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for values, _ in relevances(model, number_batches(batches), groups, Relevance("label", "all")):
        for group, v in values.items():
            sums[group] += of(v).cpu().double().sum(0)
    return {group: total / sum(map(len, batches)) for group, total in sums.items()}


def fisher(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = sum of w^2 E_x[g(x)^2] over the weights of u (Optimal Brain Damage, LeCun et al., NeurIPS 1989).

    Departs from it in that the Hessian's diagonal is that of the empirical Fisher matrix, per sample and over all
    samples (as in Theis et al., arXiv 1801.05787), that weights are added up to units, and that the factor 1/2 is left
    out. Layer scales, global response norms and bare parameters do not count.

    Raises:
        DataError: The batches have no labels.
        ModelError: A layer transforms its weight before it is used, as standardised convolutions do.
    """
    check_labels("fisher", batches)
    transformed = [name for name, module in model.named_modules() if layers.adds_input(module)]
    single = weight_scores(model, batches, Relevance("label"), parameters="all", ignore=transformed).values()
    names = {parameter: name for name, parameter in model.named_parameters()}

    def quantity(part: Part) -> Tensor:
        square = single.get(names[part.parameter])
        return torch.zeros(len(part.member.channel)) if square is None else part.rows(square).sum(1)

    return sum_parts(model, groups, quantity)


def snip(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    r"""s_u = sum of \|w E_x[dL/dw]\| over all parameters of u (SNIP, Lee et al., ICLR 2019, arXiv 1810.02340).

    Departs from it in that connections are added up to units, that the net is trained, that all images are one batch
    (the paper takes one minibatch), and that scores are not divided by their sum, which changes no ranking.

    Raises:
        DataError: The batches have no labels.
    """
    gradients = mean_gradients(model, batches, "snip")
    return sum_parts(model, groups, lambda part: multiply(part, gradients).abs().sum(1))


def grasp(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> Values:
    """s_u = sum of w (H g) over all parameters of u (GraSP, Wang et al., ICLR 2020, arXiv 2002.07376).

    g and H are gradient and Hessian of the mean cross-entropy. What lowers the gradient flow least when it goes (or
    raises it) has the lowest score and goes first. The score is signed; so that a score per cost keeps its meaning, the
    lowest score of all units is subtracted from each. Departs from it in that the net is trained, that weights are
    added up to units, and that logits have no temperature.

    Raises:
        DataError: The batches have no labels.
        ModelError: An operation has no second derivative (a hard sigmoid, for instance).
    """
    flow = _hessian_times(model, batches, mean_gradients(model, batches, "grasp"))
    values = sum_parts(model, groups, lambda part: multiply(part, flow).sum(1))
    lowest = min(float(value.min()) for value in values.values())
    return {name: value - lowest for name, value in values.items()}


def _hessian_times(model: nn.Module, batches: Sequence[Batch], direction: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Parameter -> H times the direction, H the Hessian of the mean cross-entropy over all images."""
    leaves, count = list(direction), sum(map(len, batches))
    weights = [direction[leaf].to(leaf) for leaf in leaves]
    found = {leaf: torch.zeros_like(direction[leaf]) for leaf in leaves}
    # Fused attention has no second derivative.
    with preserve.inference_state(model, gradients=True), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            first = torch.autograd.grad(label_losses(model, batch).sum(), leaves, create_graph=True)
            along = torch.stack([(g * d).sum() for g, d in zip(first, weights, strict=True)]).sum()
            try:
                seconds = torch.autograd.grad(along, leaves, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise ModelError(
                    "Criterion 'grasp' needs second derivatives, which an operation of this model has not: "
                    f"{error}. Choose another criterion for this model."
                ) from error
            for leaf, second in zip(leaves, seconds, strict=True):
                if second is not None:
                    found[leaf] += second.cpu().double() / count
    return found
