"""Criteria to compare relevance with: each a function that returns scores, all else being equal.

Pass one as ``criterion=`` to `jbrprune.prune`: budget, selection, repair, images and report stay the same.

Where budgets are costs, score per cost ranks, and there a score and its root rank differently. By its degree (the power
of t that scores gain as all weights are multiplied by t, activations and gradients held) a criterion is

- of degree 2, as relevance is, unless named here;
- of degree 1: ``l1``, ``l2``, ``l1_grouped``, ``bn_scale``, ``fpgm``, ``synflow``, ``wanda``, ``taylor_abs``,
  ``taylor_per_sample``, ``snip``, ``grasp``;
- of degree 0, a rank, a draw, or relative to the mean or sum of its group: ``random``, ``hrank``, ``lamp``,
  ``l2_normalised``, ``tp_*``; and ``variance``, which is of degree 2 in the activations.
"""

from __future__ import annotations

from baselines import (
    bn_scale,
    fisher,
    fpgm,
    grasp,
    group_fisher,
    hrank,
    jacobian,
    lamp,
    magnitude,
    random,
    snip,
    synflow,
    taylor,
    variance,
    wanda,
    whc,
)
from baselines import torch_pruning_shipped as shipped
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.pruning.channels import Criterion

CRITERIA: dict[str, Relevance | Criterion] = {
    **{name: preset for name, preset in PRESETS.items() if name != "jbr_label"},  # that is `group_fisher`
    # weights only
    "random": random.random,
    "l1": magnitude.l1,
    "l2": magnitude.l2,
    "l1_grouped": magnitude.l1_grouped,
    "l2_grouped": magnitude.l2_grouped,
    "l2_normalised": magnitude.l2_normalised,
    "lamp": lamp.lamp,
    "bn_scale": bn_scale.bn_scale,
    "fpgm": fpgm.fpgm,
    "whc": whc.whc,
    "synflow": synflow.synflow,
    # activations
    "wanda": wanda.wanda,
    "variance": variance.variance,
    "hrank": hrank.hrank,
    # labels
    "taylor": taylor.taylor,
    "taylor_abs": taylor.taylor_abs,
    "taylor_per_sample": taylor.taylor_per_sample,
    "fisher": fisher.fisher,
    "group_fisher": group_fisher.group_fisher,
    "jacobian": jacobian.jacobian,
    "snip": snip.snip,
    "grasp": grasp.grasp,
    # torch-pruning's own, with their faults (`baselines.torch_pruning_shipped.KNOWN_FAULTS`)
    "tp_magnitude": shipped.tp_magnitude,
    "tp_bn_scale": shipped.tp_bn_scale,
    "tp_lamp": shipped.tp_lamp,
    "tp_fpgm": shipped.tp_fpgm,
    "tp_random": shipped.tp_random,
    "tp_taylor": shipped.tp_taylor,
    "tp_hessian": shipped.tp_hessian,
}
"""Name -> relevance, or ``criterion(model, batches, groups, *, seed, progress)``."""

LABELS = (
    *("taylor", "taylor_abs", "taylor_per_sample", "fisher", "group_fisher", "jacobian", "snip", "grasp"),
    *("tp_taylor", "tp_hessian"),
)
"""Criteria that need labels."""
