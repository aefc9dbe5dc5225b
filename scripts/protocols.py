"""What is compared with what, as data: named protocols, and the criteria by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from baselines import CRITERIA, LABELS
from baselines.weights import WEIGHT_CRITERIA
from jbrprune.budgets.selection import Floors
from jbrprune.criteria.relevance import PRESETS

BY_WEIGHT: Mapping[str, Callable] = {
    **WEIGHT_CRITERIA,
    **{name: preset for name, preset in PRESETS.items() if preset.statistic == "second_moment"},
}
"""Criteria for single weights."""
NEED_LABELS = {"channels": frozenset(LABELS), "weights": frozenset({"snip", "fisher", "jbr_label"})}
NEED_BATCH_NORM = ("bn_scale", "tp_bn_scale")


@dataclass(frozen=True)
class Protocol:
    """How a comparison is made.

    Attributes:
        about: One line.
        kind: What the budgets are shares of: ``macs``, ``params``, ``latency`` or ``channels`` to keep, ``sparsity`` to
            set to zero.
        budgets: Shares at which a model is measured.
        criteria: What is compared unless something else is asked for.
        steps: Steps to each budget; None: one for every 5 % of the dense cost.
        repair: What `jbrprune.prune` takes.
        from_dense: Each budget starts from the dense model; else from the model of the budget before.
        images: Calibration images.
        options: Other arguments of `jbrprune.prune`.
    """

    about: str
    kind: str
    budgets: tuple[float, ...]
    criteria: tuple[str, ...]
    steps: int | None
    repair: str | tuple[str, ...] | None
    from_dense: bool = False
    images: int = 512
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def known(self) -> Mapping[str, Callable]:
        """Name -> criterion for what is pruned here."""
        return BY_WEIGHT if self.kind == "sparsity" else CRITERIA

    @property
    def labelled(self) -> frozenset[str]:
        """Names of the criteria that are shown labels."""
        return NEED_LABELS["weights" if self.kind == "sparsity" else "channels"]


PROTOCOLS: dict[str, Protocol] = {
    "paper": Protocol(
        about="18 steps of 5 % of the channels each, ranked globally by score alone, no repair (arXiv 2512.11089)",
        kind="channels",
        budgets=tuple(round(1 - 0.05 * step, 2) for step in range(1, 19)),
        criteria=(
            # of relevance those that square the mean over 128 images, as published
            *("jbr_published_code", "jbr_published", "jbr_batched"),
            *("jacobian", "taylor", "taylor_per_sample", "fisher", "group_fisher", "snip", "grasp"),
            *("l1", "l2", "l2_normalised", "lamp", "bn_scale", "fpgm", "whc", "synflow", "random"),
            *("wanda", "variance", "hrank"),
            *("tp_magnitude", "tp_bn_scale", "tp_lamp", "tp_fpgm", "tp_random", "tp_taylor", "tp_hessian"),
        ),
        steps=1,
        repair=None,
        images=50 * 128,
        options=MappingProxyType({"floors": Floors(channels=1)}),
    ),
    "budget": Protocol(
        about="budgets of MACs in steps of 5 %, ranked by score per MAC, repaired without labels after every step",
        kind="macs",
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
        criteria=tuple(CRITERIA),
        steps=None,
        repair="auto",
    ),
    "latency": Protocol(
        about="budgets of measured time, in the same steps, ranked by score per MAC, the whole model timed",
        kind="latency",
        budgets=(0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        criteria=("jbr",),
        steps=None,
        repair="auto",
    ),
    "one_shot": Protocol(
        about="budgets of MACs, each cut in one step from the dense model, ranked by score per MAC, then repaired",
        kind="macs",
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        criteria=tuple(CRITERIA),
        steps=1,
        repair="auto",
        from_dense=True,
    ),
    "unstructured": Protocol(
        about="single weights, ranked globally, each sparsity cut in one step from the dense model, BatchNorm repaired",
        kind="sparsity",
        budgets=(0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
        criteria=tuple(name for name in BY_WEIGHT if name != "jbr_label"),  # `fisher`
        steps=1,
        repair="batch_norm",
        from_dense=True,
    ),
    "vit_mlp_heads": Protocol(
        about="vision transformers: MLP channels and heads, budgets of MACs in steps of 5 %, score per MAC, repaired",
        kind="macs",
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
        criteria=tuple(name for name in CRITERIA if name not in NEED_BATCH_NORM),
        steps=None,
        repair="auto",
    ),
    "vit_mlp": Protocol(
        about="vision transformers: MLP channels only, shares of them cut in one step, their mean put in their place",
        kind="channels",
        budgets=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45),
        criteria=("variance", "jbr", "jbr_mean_replaced", "jbr_projection", "snip", "l2_grouped", "random"),
        steps=1,
        repair="mean_shift",
        from_dense=True,
        options=MappingProxyType({"ignore": ("*.attn", "*.attn.*"), "floors": Floors(channels=1)}),
    ),
}
