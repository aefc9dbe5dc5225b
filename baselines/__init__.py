"""Criteria to compare relevance with: each a function that returns scores, all else being equal.

Pass one as ``criterion=`` to `jbrprune.prune` (of `WEIGHT_CRITERIA` to `jbrprune.sparsify`): budget, selection, repair,
images and report stay the same. What draws random numbers is a dataclass with a seed, as `Relevance` is:
``Random(seed=1)``.

Where budgets are costs, score per cost ranks, and there a score and its root rank differently. By its degree (the power
of t that scores gain as all weights are multiplied by t, activations and gradients held) a criterion is

- of degree 2, as relevance is, unless named here;
- of degree 1: ``l1``, ``l2``, ``l1_grouped``, ``bn_scale``, ``fpgm``, ``synflow``, ``wanda``, ``taylor_abs``,
  ``taylor_per_sample``, ``snip``, ``grasp``;
- of degree 0, a rank, a draw, or relative to the mean or sum of its group: ``random``, ``hrank``, ``lamp``,
  ``l2_normalised``, ``l2_isomorphic``, ``tp_*``; and ``variance``, which is of degree 2 in the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baselines import activations, labels, low_rank, single_weights, weights_only
from baselines import torch_pruning_shipped as shipped
from jbrprune.criteria.relevance import PRESETS, Relevance

CRITERIA: dict[str, Relevance | Callable[..., Any]] = {
    **{name: preset for name, preset in PRESETS.items() if name != "jbr_label"},  # that is `group_fisher`
    # weights only
    "random": weights_only.Random(),
    "l1": weights_only.l1,
    "l2": weights_only.l2,
    "l1_grouped": weights_only.l1_grouped,
    "l2_grouped": weights_only.l2_grouped,
    "l2_normalised": weights_only.l2_normalised,
    "l2_isomorphic": weights_only.l2_isomorphic,
    "lamp": weights_only.lamp,
    "bn_scale": weights_only.bn_scale,
    "fpgm": weights_only.fpgm,
    "whc": weights_only.whc,
    "synflow": weights_only.synflow,
    # activations
    "wanda": activations.wanda,
    "variance": activations.variance,
    "hrank": activations.hrank,
    # labels
    # Molchanov et al., CVPR 2019, arXiv 1906.10771, eq. 9: squares of means over minibatches, of 128 images unless
    # `batch` says otherwise; but that the parameters of producers, norms and consumers count together (theirs: one
    # gate behind the batch norm), and that nothing is trained and no score kept between two removals
    "taylor": Relevance("label", "all", "batched"),
    "taylor_abs": labels.taylor_abs,
    "taylor_per_sample": labels.taylor_per_sample,
    "fisher": labels.fisher,
    # Liu et al., ICML 2021, arXiv 2108.00708, eq. 4, without the factor 1/2 and the division by the memory saved
    "group_fisher": Relevance("label"),
    # Chen et al., arXiv 2508.05521, but that a unit of several channels is squared as a whole and nothing is normalised
    "jacobian": Relevance("label", "layers", "batched"),
    "snip": labels.snip,
    "grasp": labels.grasp,
    # torch-pruning's own, with their faults (`baselines.torch_pruning_shipped.KNOWN_FAULTS`)
    "tp_magnitude": shipped.tp_magnitude,
    "tp_bn_scale": shipped.tp_bn_scale,
    "tp_lamp": shipped.tp_lamp,
    "tp_fpgm": shipped.tp_fpgm,
    "tp_random": shipped.ShippedRandom(),
    "tp_taylor": shipped.tp_taylor,
    "tp_hessian": shipped.tp_hessian,
}
"""Name -> relevance, or ``criterion(model, batches, groups)`` -> group -> scores of its units."""

LOW_RANK: dict[str, Callable[..., Any]] = {"svd": low_rank.svd, "balf": low_rank.balf}
"""The same, of directions only: for ``structure="directions"``."""

WEIGHT_CRITERIA: dict[str, Relevance | Callable[..., Any]] = {
    **{n: preset for n, preset in PRESETS.items() if preset.statistic == "second_moment" and n != "jbr_label"},
    "magnitude": single_weights.magnitude,
    "lamp": single_weights.lamp,
    "random": single_weights.RandomWeights(),
    # Lee et al., ICLR 2019, arXiv 1810.02340, but that the net is trained, and that the mean is over all images
    "snip": Relevance("label", statistic="signed"),
    # Optimal Brain Damage (LeCun et al., NeurIPS 1989) with the diagonal of the empirical Fisher matrix, per sample
    "fisher": Relevance("label"),
}
"""Name -> relevance, or ``criterion(model, batches, names)`` -> name of a weight -> scores in its shape."""

LABELS = (
    *("taylor", "taylor_abs", "taylor_per_sample", "fisher", "group_fisher", "jacobian", "snip", "grasp"),
    *("tp_taylor", "tp_hessian"),
)
"""Criteria that need labels."""
