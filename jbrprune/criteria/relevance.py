"""The streaming pass for channels: exact per-sample relevances from one forward and one backward.

For a layer that is affine in its parameters (out = W a + b), with L(x) the objective on sample x:

* over all weights that *consume* input channel c:      sum_p w_p dL/dw_p = sum over positions of a * dL/da
* over all parameters that *produce* output channel c:  sum_p w_p dL/dw_p = sum over positions of out * dL/dout

where dL/da is the gradient through this layer only. No weight gradient is formed. Parameters are frozen
during the pass, so the backward stops at the first activation that is scored. W is the weight as the layer applies
it: where a class standardises its weight first (StdConv2d), that is the standardised one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria import members as scoring
from jbrprune.criteria.gates import Tape, recorded
from jbrprune.criteria.objectives import OBJECTIVES, Objective
from jbrprune.criteria.passes import (
    Draws,
    Question,
    check_logits,
    check_samples,
    losses_of,
    own,
)
from jbrprune.criteria.scores import Accumulator, Scores, Settings
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError, check_known
from jbrprune.evaluation.agreement import check_weights
from jbrprune.evaluation.portions import Portions
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.structure.groups import Group
from jbrprune.structure.verification import check_samples_apart

Site = Literal["consumer", "all", "layers"]
Statistic = Literal["second_moment", "batched", "mean_replaced", "signed"]
_Relevances = tuple[dict[str, Tensor], int]
"""Group name -> ``[n, units]`` relevances, and the number of samples left out."""


@dataclass(frozen=True)
class Relevance:
    r"""Scores units (when called) or single weights (`weight_scores`): s_u = E_x[v_u(x)^2], v_u(x) = m(x)^T J_u(x) w_u.

    Attributes:
        objective: Name in `jbrprune.criteria.objectives.OBJECTIVES`; it gives m(x).
        site: ``consumer``: w_u are the weights that read the unit's channels, summed over all layers that
            read them: the first-order effect of removing the unit. ``all``: the parameters of producers and
            norms as well (the sum over layers of the paper, taken before the square). ``layers``: as ``all``, but every
            layer is squared by itself and the squares are added up (the published code). Bare parameters that belong
            to no layer class, such as a position embedding, have no term of their own. Single weights have no site.
        statistic: ``second_moment``: E[v^2] per sample. ``batched``: E[(mean over ``batch`` samples of v)^2],
            as in the published code. ``mean_replaced``: E[(sum (a - mean a) dL/da)^2], the effect of replacing
            a channel by its mean (units at site ``consumer`` only). ``signed``: \|E[v]\|, the form of SNIP (single
            weights only).
        batch: Number of samples whose mean is squared by ``batched``, whatever the data's batch size.
        confidence: Leave out samples whose largest dense probability is not above this (published code: 0.9).
        autocast: Low-precision dtype of the forward pass, e.g. ``torch.bfloat16``.
        seed: Seeds the signs of ``projection``; give every shard of the data another one.

    Raises:
        ArgumentError: Unknown objective, site or statistic, or a combination without meaning.

    Source:
        Arpit, arXiv 2512.11089 (relevance, TPV); the consumer form with labels is Group Fisher, Liu et al.,
        ICML 2021, eq. 4.

    Example:
        >>> from jbrprune.structure.discovery import find_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
        >>> images = torch.randn(8, 3, 4, 4)
        >>> scores = Relevance("margin")(net, images, find_groups(net, images).groups)
        >>> scores["0"].shape
        torch.Size([6])
    """

    objective: str = field(default="pseudo_label", metadata={"help": "What counts as damage.", "panel": "Criterion"})
    site: Site = field(
        default="consumer",
        metadata={"help": "Which weights of a unit count: those that read it, or all.", "panel": "Criterion"},
    )
    statistic: Statistic = field(
        default="second_moment", metadata={"help": "How samples are combined.", "panel": "Criterion"}
    )
    batch: int = field(
        default=128, metadata={"help": "Samples whose mean the statistic `batched` squares.", "panel": "Criterion"}
    )
    confidence: float = field(
        default=0.0,
        metadata={"help": "Score only on images whose largest dense probability exceeds this.", "panel": "Criterion"},
    )
    autocast: torch.dtype | None = field(
        default=None,
        metadata={"help": "Low-precision dtype of the scoring pass, such as bfloat16.", "panel": "Criterion"},
    )
    seed: int = field(
        default=0, metadata={"help": "Seeds the random signs of the objective `projection`.", "panel": "Criterion"}
    )

    def __post_init__(self) -> None:
        check_known("objective", self.objective, OBJECTIVES)
        check_known("site", self.site, get_args(Site))
        check_known("statistic", self.statistic, get_args(Statistic))
        if self.statistic == "mean_replaced" and self.site != "consumer":
            raise ArgumentError(
                "statistic 'mean_replaced' is defined at site 'consumer' only: a mean replaces an input."
            )
        for name, least in (("batch", 1), ("seed", None)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ArgumentError(f"{name} must be a whole number, got {value!r}.")
            if least is not None and value < least:
                raise ArgumentError(f"{name} must be at least {least}, got {value}.")
        if not isinstance(self.confidence, Real) or not 0 <= self.confidence < 1:
            raise ArgumentError(f"confidence must satisfy 0 <= confidence < 1, got {self.confidence!r}.")
        if not isinstance(self.autocast, torch.dtype | None):
            raise ArgumentError(f"autocast must be a torch.dtype such as torch.bfloat16, got {self.autocast!r}.")

    def __call__(
        self,
        model: nn.Module,
        batches: object,
        groups: Sequence[Group],
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Scores:
        """Score every unit of every group.

        Args:
            model: Any module that maps ``[B, C, H, W]`` to logits ``[B, K]``. Left as it was.
            batches: Anything that yields images (`jbrprune.data.batches.iterate`). Read once, streaming;
                ``mean_replaced`` reads it twice.
            groups: The units (`jbrprune.structure.discovery.find_groups` or `layer_groups`).
            batch_size: Images per pass where the data do not say.
            progress: Show a progress bar.

        Returns:
            `Scores`; sums are float64 on the CPU.

        Raises:
            ArgumentError: The statistic is of single weights, no groups, or groups of another model.
            DataError: No data, or no sample above the confidence threshold; no labels where the objective needs them.
            ModelError: The first dimension of an activation is not the batch, samples influence each other, or the
                weights of a layer are used although the layer is never called.
            NonFiniteError: NaN or Inf in weights, images, logits or gradients.
        """
        groups = tuple(groups)
        self.check("units")
        if not groups:
            raise ArgumentError("groups is empty, nothing to score. See `jbrprune.structure.discovery.find_groups`.")
        if len({group.name for group in groups}) < len(groups):
            raise ArgumentError("Two groups have the same name; the scores of one would overwrite those of the other.")
        if self.site == "layers":
            single = scoring.single_members(model, groups)
            every = [one for ones in single.values() for one in ones]
            scores = replace(self, site="all")(model, batches, every, batch_size=batch_size, progress=progress)
            sums = {name: torch.stack([scores.sums[one.name] for one in ones]).sum(0) for name, ones in single.items()}
            return replace(scores, sums=sums, groups=groups, settings=self.settings(self.site))
        check_weights(model)
        means = None
        if self.statistic == "mean_replaced":
            _require_two_passes(batches)
            means = channel_means(model, batches, groups, batch_size=batch_size)
        accumulator = Accumulator(groups, self.batch if self.statistic == "batched" else None)
        parts = distributed.Parts(batches, batch_size=batch_size, block=accumulator.batch)
        shown = tqdm(parts, "scoring", unit="batch", disable=None if progress else True, leave=False)
        question = Question(OBJECTIVES[self.objective], self.confidence, self.autocast, Draws(self.seed))

        def added() -> int:
            skipped = 0
            for relevances, left_out in _visited(model, shown, Tape(model, groups, self.site, means), question):  # type: ignore[arg-type]
                skipped += left_out
                if len(next(iter(relevances.values()))):
                    accumulator.add(relevances)
            return skipped

        skipped = distributed.together(added)
        parts.check()
        samples, skipped = distributed.total(accumulator.samples, skipped)
        check_samples(samples, skipped, self.confidence)
        return Scores(distributed.all_sum(accumulator.finish()), groups, samples, skipped, self.settings(self.site))

    def settings(self, site: str) -> Settings:
        """What scores made at a site mean."""
        batch = self.batch if self.statistic == "batched" else None
        return Settings(self.objective, site, self.statistic, batch, self.confidence)

    def check(self, what: Literal["units", "weights"]) -> None:
        """Refuse what has no meaning for units, or for single weights, or on several ranks.

        Raises:
            ArgumentError: The statistic is of the other kind, or batches would be formed from samples of several ranks.
        """
        if self.statistic == {"units": "signed", "weights": "mean_replaced"}[what]:
            raise ArgumentError(f"statistic {self.statistic!r} is not defined for {what}.")
        if self.statistic == "batched" and self.confidence > 0 and distributed.size() > 1:
            raise ArgumentError(
                "statistic='batched' with confidence > 0 forms its batches from the samples that are left, which no "
                "rank knows of the others. Use confidence=0, or one process."
            )


PRESETS: Mapping[str, Relevance] = MappingProxyType(
    {
        "jbr": Relevance(),
        "jbr_predicted_logit": Relevance("predicted_logit"),
        "jbr_margin": Relevance("margin"),
        "jbr_label": Relevance("label"),
        "jbr_projection": Relevance("projection"),
        "jbr_mean_replaced": Relevance(statistic="mean_replaced"),
        "jbr_batched": Relevance(statistic="batched"),
        "jbr_published": Relevance(site="all", statistic="batched", confidence=0.9),
        "jbr_published_code": Relevance(site="layers", statistic="batched", confidence=0.9),
    }
)
"""Name -> relevance, for ``criterion=`` of `jbrprune.prune`. All are of Arpit, arXiv 2512.11089.

``jbr`` to ``jbr_batched`` take the consumer side, where the paper sums over producers and norms as well.
``jbr_published`` adds a unit's layers up before the square, as the paper's formula does, ``jbr_published_code`` after
it, as the paper's code does, but for units of several channels (heads), which are squared as a whole; both need samples
on which the dense model is more than 0.9 confident.
"""


def per_sample_relevances(
    model: nn.Module,
    batches: Iterable[Batch],
    groups: Sequence[Group],
    *,
    objective: Objective,
    site: Site = "consumer",
    means: Mapping[str, Tensor] | None = None,
    confidence: float = 0.0,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield, batch by batch, group name -> ``[n, units]`` relevances v_u(x), and how many samples were left out.

    The primitive under `Relevance`; arguments as there, ``means`` from `channel_means`.
    """
    question = Question(objective, confidence, autocast, Draws(seed))
    return _visited(model, distributed.numbered(batches), Tape(model, groups, site, means), question)


def _visited(
    model: nn.Module, numbered: Iterable[tuple[int, Batch]], tape: Tape, question: Question
) -> Iterator[_Relevances]:
    device = preserve.device_of(model)
    portions = Portions()
    with ExitStack() as visit:
        # Everything is undone between two batches as well, because a generator may be left unfinished.
        for number, (start, batch) in enumerate(numbered):
            visit.enter_context(preserve.inference_state(model))
            batch = batch.to(device).map(own)
            if number == 0:
                called = check_samples_apart(model, batch.images, tape.names)
                _check_unused(model, batch.images, [name for name in tape.names if name not in called])

            def one(
                part: Batch, before: int, number: int = number, start: int = start
            ) -> tuple[dict[str, Tensor], int]:
                return _relevances(model, part, number, start + before, tape, question)

            found = portions.run(batch, one)
            visit.close()
            yield _together(found)


def _together(found: Sequence[_Relevances]) -> _Relevances:
    """The portions of a batch as one."""
    if len(found) == 1:
        return found[0]
    names = found[0][0]
    return {name: torch.cat([v[name] for v, _ in found]) for name in names}, sum(skipped for _, skipped in found)


def channel_means(
    model: nn.Module, data: object, groups: Sequence[Group], *, batch_size: int = 32
) -> dict[str, Tensor]:
    """Module name -> ``[C_in]`` mean over samples and positions of each consumer's input (float64, CPU)."""
    names = sorted({m.axis[0] for g in groups for m in g.side("in")})
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.int64))

    def record(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = preserve.input_of(args, kwargs)
            x = x.flatten(2) if layers.channel_dim(module) == 1 else x.reshape(len(x), -1, x.shape[-1]).mT
            by_row = x.sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) if x.dim() == 3 else x
            totals[name] = totals.get(name, 0) + by_row.cpu().double().sum(0)
            counts[name] += x.numel() // x.shape[1]

        return hook

    device = preserve.device_of(model)
    parts = distributed.Parts(data, batch_size=batch_size)

    def looked() -> None:
        with ExitStack() as visit:
            for _, batch in parts:
                visit.enter_context(preserve.inference_state(model))
                visit.enter_context(preserve.hooked(model, forward_pre={name: record(name) for name in names}))
                model(batch.to(device).map(own).images.clone())
                visit.close()

    distributed.together(looked)
    parts.check()
    sums, numbers = distributed.all_sum(totals), distributed.all_sum(counts)
    return {name: sums[name] / numbers[name] for name in sums}


def _relevances(
    model: nn.Module, batch: Batch, number: int, start: int, tape: Tape, question: Question
) -> tuple[dict[str, Tensor], int]:
    """Relevances ``[n, units]`` of one batch, and the number of samples left out."""
    tape.start(batch.images)
    logits = recorded(model, batch.images, tape, question.autocast)
    check_logits(model, batch, number, logits, question.autocast)
    losses, keep = losses_of(batch, logits, question, start)
    if len(losses):
        with torch.enable_grad():
            total = losses.sum()
        total.backward()
    totals, tape.totals = tape.totals, {}
    _check_relevances(totals, number)
    if keep is None:
        return totals, 0
    return {name: v[keep] for name, v in totals.items()}, int((~keep).sum())


def _check_relevances(totals: Mapping[str, Tensor], number: int) -> None:
    for name, v in totals.items():
        if not torch.isfinite(v).all():
            raise NonFiniteError(
                f"Batch {number}: the relevances of group {name} contain NaN or Inf although the logits are finite: "
                "the gradient is not. A square root of zero or an overflow in half precision does that; try float32."
            )


def _check_unused(model: nn.Module, images: Tensor, names: Sequence[str]) -> None:
    """Refuse layers that are never called although their weights take part in the logits."""
    for name in names:
        layer = model.get_submodule(name)
        with preserve.requiring_grad(layer, True), torch.enable_grad():
            logits = logits_of(model(images[:1].clone()))
            weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            used = weights and logits.requires_grad and torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        if used and any(gradient is not None for gradient in used):
            raise ModelError(
                f"{name} ({type(layer).__name__}): its weights take part in the logits, but the module is never called "
                "(another module reads them directly), so it cannot be scored. Put this layer into `ignore`."
            )


def _require_two_passes(data: object) -> None:
    if isinstance(data, Iterator):
        raise DataError(
            "statistic 'mean_replaced' reads the data twice, but an iterator can be read only once: pass a list, a "
            "tensor, a Dataset or a DataLoader."
        )
