"""Relevance of removable units: what is squared, for whom, and by what name."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.gates import Key, by_sample, differentiate, effects, gated_logits
from jbrprune.criteria.objectives import OBJECTIVES, Directions, Objective
from jbrprune.criteria.scores import Accumulator, Scores, Settings
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError, check_known
from jbrprune.evaluation.agreement import check_rows, check_weights, explain_out_of_memory
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Group, Member
from jbrprune.structure.verification import check_samples_apart

Numbered = Iterable[tuple[int, Batch]]
"""Batches, each with the position of its first sample in the data (`jbrprune.data.distributed.number_batches`)."""
Site = Literal["consumer", "all", "layers"]
Statistic = Literal["second_moment", "batched", "mean_replaced", "signed"]


def _about(text: str, panel: str | None = "Criterion") -> dict[str, str | None]:
    return {"help": text, "panel": panel}


@dataclass(frozen=True)
class Relevance:
    r"""Scores units (when called) or single weights (`weight_scores`): s_u = E_x[v_u(x)^2], v_u(x) = m(x)^T J_u(x) w_u.

    Attributes:
        objective: Name in `jbrprune.criteria.objectives.OBJECTIVES`; it gives m(x). None: ``pseudo_label`` of logits,
            ``projection`` of anything else.
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
        threshold: Leave out samples whose largest dense probability is not above this (published code: 0.9).
        autocast: Low-precision dtype of the forward pass, e.g. ``torch.bfloat16``; never set by itself. A CPU without
            instructions for bfloat16 (AVX-512 BF16, AMX) is slower with it than with float32.
        seed: Seeds the signs of ``projection``; give every shard of the data another one.
        output: What of the model's output counts (`jbrprune.evaluation.outputs.find_output`).

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

    objective: str | None = field(default=None, metadata=_about("What counts as damage."))
    site: Site = field(default="consumer", metadata=_about("Which weights count: those that read a unit, or all."))
    statistic: Statistic = field(default="second_moment", metadata=_about("How samples are combined."))
    batch: int = field(default=128, metadata=_about("Samples whose mean the statistic `batched` squares."))
    threshold: float = field(default=0.0, metadata=_about("Leave out images whose largest probability is not above."))
    autocast: torch.dtype | None = field(default=None, metadata=_about("Low-precision dtype, such as bfloat16."))
    seed: int = field(default=0, metadata=_about("Seeds the random signs of the objective `projection`.", None))
    output: Output = field(default=LOGITS, metadata=_about("What of the model's output counts.", None))

    def __post_init__(self) -> None:
        if self.objective is not None:
            check_known("objective", self.objective, OBJECTIVES)
        check_known("site", self.site, get_args(Site))
        check_known("statistic", self.statistic, get_args(Statistic))
        if self.statistic == "mean_replaced" and self.site != "consumer":
            raise ArgumentError("statistic 'mean_replaced' is defined at site 'consumer' only.")
        if self.statistic == "mean_replaced" and self.threshold:
            raise ArgumentError("threshold= has no meaning for 'mean_replaced', whose means are those of all images.")
        if self.batch < 1:
            raise ArgumentError(f"batch must be at least 1, got {self.batch}.")
        if not isinstance(self.threshold, Real) or not 0 <= self.threshold < 1:
            raise ArgumentError(f"threshold must satisfy 0 <= threshold < 1, got {self.threshold!r}.")
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
            model: Any module that maps ``[B, C, H, W]`` to what ``output`` reads. Left as it was.
            batches: Anything that yields images (`jbrprune.data.batches.iterate`). Read once, streaming;
                ``mean_replaced`` reads it twice.
            groups: The units (`jbrprune.structure.discovery.find_groups`).
            batch_size: Images per pass where the data do not say.
            progress: Show a progress bar.

        Returns:
            `Scores`; sums are float64 on the CPU.

        Raises:
            ArgumentError: The statistic is of single weights, no groups, or groups of another model.
            DataError: No data, or no sample above the threshold; no labels where the objective needs them.
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
        check_weights(model)
        means = None
        if self.statistic == "mean_replaced":
            if isinstance(batches, Iterator):
                raise DataError(
                    "statistic 'mean_replaced' reads the data twice, but an iterator can be read only once: pass a "
                    "list, a tensor, a Dataset or a DataLoader."
                )
            means = channel_means(model, batches, groups, self, batch_size, progress)
        # What is squared by itself: a unit, or a unit's share in one layer.
        parts = {group.name: split_by_layer(model, group) if self.site == "layers" else [group] for group in groups}
        squared = [part for own in parts.values() for part in own]
        accumulator = Accumulator({p.name: torch.zeros(p.size, dtype=torch.float64) for p in squared}, self.block)
        power, kept = 2 if self.block is None else 1, []
        with share_pass(batches, self, batch_size, progress) as numbered:
            for values, stays in relevances(model, numbered, squared, self, means=means):
                rows = {name: v[stays].cpu().double() for name, v in values.items()}
                accumulator.add(
                    int(stays.sum()), lambda some, rows=rows: [{n: (v[some] ** power).sum(0) for n, v in rows.items()}]
                )
                kept.append(stays)
        samples, skipped = count_samples(kept, self.threshold)
        totals = distributed.all_sum(accumulator.finish())
        sums = {name: torch.stack([totals[part.name] for part in own]).sum(0) for name, own in parts.items()}
        return Scores(sums, groups, samples, skipped, self.settings(self.site))

    @property
    def block(self) -> int | None:
        """Samples whose mean is squared; None: every sample counts by itself."""
        return self.batch if self.statistic == "batched" else None

    def settings(self, site: str) -> Settings:
        """What scores made at a site mean."""
        return Settings(self.objective or self.output.objective, site, self.statistic, self.block, self.threshold)

    def check(self, what: Literal["units", "weights"]) -> None:
        """Refuse what has no meaning for units, or for single weights, or on several ranks.

        Raises:
            ArgumentError: The statistic is of the other kind, or batches would be formed from samples of several ranks.
        """
        if self.statistic == {"units": "signed", "weights": "mean_replaced"}[what]:
            raise ArgumentError(f"statistic {self.statistic!r} is not defined for {what}.")
        if self.statistic == "batched" and self.threshold > 0 and distributed.size() > 1:
            raise ArgumentError(
                "statistic='batched' with threshold > 0 forms its batches from the samples that are left, which no "
                "rank knows of the others. Use threshold=0, or one process."
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
        "jbr_published": Relevance("pseudo_label", site="all", statistic="batched", threshold=0.9),
        "jbr_published_code": Relevance("pseudo_label", site="layers", statistic="batched", threshold=0.9),
    }
)
"""Name -> relevance, for ``criterion=`` of `jbrprune.prune`. All are of Arpit, arXiv 2512.11089.

``jbr`` to ``jbr_batched`` take the consumer side, where the paper sums over producers and norms as well.
``jbr_published`` adds a unit's layers up before the square, as the paper's formula does, ``jbr_published_code`` after
it, as the paper's code does, but for units of several channels (heads), which are squared as a whole; both need samples
on which the dense model is more than 0.9 confident.
"""


def relevances(
    model: nn.Module,
    numbered: Numbered,
    groups: Sequence[Group],
    how: Relevance,
    *,
    objective: Objective | None = None,
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the relevances v_u(x) of every sample, batch by batch.

    Args:
        model: The model; between two batches, and after the last, it is as it was.
        numbered: The batches.
        groups: The units.
        how: Objective, site, threshold, autocast, seed and output.
        objective: A function instead of the objective of ``how``.
        means: Consumer -> ``[C_in]`` what stays of its input (`channel_means`); None: nothing.

    Yields:
        Group name -> ``[n, units]`` v, in float32 or float64, and ``[n]`` which samples stay: v of the others is zero.
    """
    members = scored_members(model, groups, how.site)
    directions = Directions(objective or how.objective, how.threshold, how.seed, how.output)
    copying = False
    for number, (start, batch) in enumerate(numbered):
        with preserve.inference_state(model), explain_out_of_memory(len(batch)):
            batch = batch.to(preserve.device_of(model))
            if number == 0:
                _check_layers(model, batch.images, sorted({name for name, _ in members}), how.output)

            def run(number: int = number, start: int = start, batch: Batch = batch) -> tuple[dict[Key, Tensor], Tensor]:
                logits, gates = gated_logits(
                    model, batch.images, members, how.output, constants=means is not None, autocast=how.autocast
                )
                check_rows(logits, model, batch.images, number, how.autocast)
                m, stays = directions(logits, batch, start)
                return effects(logits, m, gates), stays

            (found, stays), copying = differentiate(run, copying)
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        values = {g.name: batch.images.new_zeros(len(batch), g.size, dtype=dtype) for g in groups}
        for key, effect in found.items():
            v = effect[0] if means is None or key[1] == "out" else effect[0] - means[key[0]].to(effect) * effect[1]
            for name, member in members[key]:
                values[name].index_add_(1, member.unit.to(v.device), v[:, member.channel.to(v.device)])
        check_finite(values, f"Batch {number}: the relevances of group")
        yield values, stays


def scored_members(model: nn.Module, groups: Sequence[Group], site: Site) -> dict[Key, list[tuple[str, Member]]]:
    """(layer, side) -> the members there that count at a site, each with the name of its group.

    At site ``consumer``, grouped convolutions whose outputs go with the unit do not count: what reads those outputs is
    the same cut again. Of an attention that loses directions of its heads, the queries count as well.

    Raises:
        ArgumentError: A group names a module or a channel that the model does not have.
        ModelError: A group has no layer to score.
    """
    modules = dict(model.named_modules())
    found: dict[Key, list[tuple[str, Member]]] = defaultdict(list)
    for group in groups:
        members = [m for m in group.members if m.axis[1] == "in" or (m.axis[1] == "out" and site != "consumer")]
        for member in members:
            name, side, _ = member.axis
            width = layers.width_of(modules[name], side) if name in modules else 0
            if width is not None and len(member.channel) and int(member.channel.max()) >= width:
                raise ArgumentError(
                    f"Group {group.name}: the model has no channel {int(member.channel.max())} on side {side!r} of "
                    f"{name!r}. Find the groups of this very model, and again after every change of it."
                )
        if group.kind == "head_dim" and site == "consumer":  # the keys' share is the same as that of the queries
            for member in group.side("out"):
                queries = slice(len(member.unit) // 3)
                members.append(replace(member, channel=member.channel[queries], unit=member.unit[queries]))
        members = [member for member in members if _has_term(modules[member.axis[0]])]
        if site == "consumer":
            again = {m.axis[0] for m in group.side("out") if layers.is_grouped(modules[m.axis[0]])}
            members = [member for member in members if member.axis[0] not in again] or members
        if not members:
            raise ModelError(
                f"Group {group.name} has no layer to score at site {site!r}. Score it at site 'all', or leave it out."
            )
        for member in members:
            found[member.axis[0], member.axis[1]].append((group.name, member))
    return found


def split_by_layer(model: nn.Module, group: Group) -> list[Group]:
    """The same units with one scored member each."""
    members = [m for side in ("in", "out") for m in group.side(side) if _has_term(model.get_submodule(m.axis[0]))]
    return [replace(group, name=f"{group.name}: {m.axis[1]} {m.axis[0]}", members=(m,)) for m in members] or [group]


def _has_term(layer: nn.Module) -> bool:
    return layers.channel_dim(layer) is not None and layers.has_parameters(layer)


def _check_layers(model: nn.Module, images: Tensor, names: Sequence[str], output: Output) -> None:
    """Refuse layers whose rows are not the samples, or that are never called although their weights are read."""
    for name in set(names) - check_samples_apart(model, images, names):
        layer = model.get_submodule(name)
        with preserve.requiring_grad(layer, True), torch.enable_grad():
            logits = output(model(images[:1].clone()))
            weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            used = weights and logits.requires_grad and torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        if used and any(gradient is not None for gradient in used):
            raise ModelError(
                f"{name} ({type(layer).__name__}): its weights take part in the logits, but the module is never called "
                "(another module reads them directly), so it cannot be scored. Put this layer into `ignore`."
            )


def channel_means(
    model: nn.Module, batches: object, groups: Sequence[Group], how: Relevance, batch_size: int, progress: bool
) -> dict[str, Tensor]:
    """Consumer -> ``[C_in]`` mean over samples and positions of its input (float64, CPU)."""
    totals: dict[str, Tensor] = {}

    def record(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = preserve.input_of(args, kwargs)
            x = by_sample(x, len(x), layers.channel_dim(module) or 1)
            sums = x.sum((1, 3), dtype=torch.promote_types(x.dtype, torch.float32)).cpu().double().sum(0)
            totals[name] = totals.get(name, 0) + torch.cat([sums, sums.new_tensor([x.numel() / len(sums)])])

        return hook

    hooks = {m.axis[0]: record(m.axis[0]) for group in groups for m in group.side("in")}

    with share_pass(batches, how, batch_size, progress) as numbered:
        for _, batch in numbered:
            with preserve.inference_state(model), preserve.hooked(model, forward_pre=hooks):
                model(batch.to(preserve.device_of(model)).images.clone())
    return {name: total[:-1] / total[-1] for name, total in distributed.all_sum(totals).items()}


@contextmanager
def share_pass(batches: object, how: Relevance, batch_size: int, progress: bool) -> Iterator[Numbered]:
    """Context of one pass over this rank's share of the data."""
    share = distributed.Parts(batches, batch_size=batch_size, block=how.block)
    with distributed.fail_together():
        yield tqdm(share, "scoring", unit="batch", disable=None if progress else True, leave=False)
    share.check()


def count_samples(kept: Iterable[Tensor], threshold: float) -> tuple[int, int]:
    """Samples that were scored, and that were left out, of all ranks; ``kept`` says which, batch by batch.

    Raises:
        DataError: None was scored.
    """
    own = [(int(stays.sum()), len(stays)) for stays in kept]
    samples, seen = map(sum, zip((0, 0), *itertools.chain(*distributed.gather(own))))
    if samples == 0:
        raise DataError(
            f"No sample was left: the dense model's largest probability exceeds threshold={threshold} on none of "
            f"{seen} images. Lower the threshold."
        )
    return samples, seen - samples


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse NaN and Inf in what was computed from finite logits."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{what} {name} contain NaN or Inf although the logits are finite: the gradient is not. A square root "
                "of zero or an overflow in half precision does that; try float32."
            )
