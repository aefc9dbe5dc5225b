"""The streaming pass for channels: exact per-sample relevances from one forward and one backward.

For a layer that is affine in its parameters (out = W a + b), with L(x) the objective on sample x:

* over all weights that *consume* input channel c:      sum_p w_p dL/dw_p = sum over positions of a * dL/da
* over all parameters that *produce* output channel c:  sum_p w_p dL/dw_p = sum over positions of out * dL/dout

where dL/da is the gradient through this layer only. No weight gradient is formed. Parameters are frozen
during the pass, so the backward stops at the first activation that is scored. W is the weight as the layer applies
it: where a class standardises its weight first (StdConv2d), that is the standardised one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune import distributed, guest, layers
from jbrprune.batches import Batch
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError
from jbrprune.groups import Group, Member, Side
from jbrprune.measure import check_weights, logits_of
from jbrprune.objectives import OBJECTIVES, Objective
from jbrprune.passes import (
    Draws,
    Question,
    check_known,
    check_logits,
    check_samples,
    check_samples_apart,
    check_sampling,
    losses_of,
    mixing,
    own,
)
from jbrprune.portions import Portions
from jbrprune.scores import Accumulator, Scores, Settings

log = logging.getLogger(__name__)

Site = Literal["consumer", "all"]
Statistic = Literal["second_moment", "batched", "mean_replaced"]
_Relevances = tuple[dict[str, Tensor], int]
"""Group name -> ``[n, units]`` relevances, and the number of samples left out."""
SITES = ("consumer", "all")
STATISTICS = ("second_moment", "batched", "mean_replaced")

CACHE_ELEMENTS = 1 << 18
"""Products of activation and gradient are formed in pieces of this size, which stay in the cache."""


def relevance_scores(
    model: nn.Module,
    data: object,
    groups: Sequence[Group],
    *,
    objective: str = "pseudo_label",
    site: Site = "consumer",
    statistic: Statistic = "second_moment",
    batch: int = 128,
    confidence: float = 0.0,
    autocast: torch.dtype | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    r"""Score every unit of every group: s_u = E_x[v_u(x)^2], v_u(x) = m(x)^T J_u(x) w_u.

    Args:
        model: Any module that maps ``[B, C, H, W]`` to logits ``[B, K]``. Left as it was.
        data: Anything that yields images (`jbrprune.batches.iterate`). Read once, streaming;
            ``mean_replaced`` reads it twice.
        groups: The units (`jbrprune.units.find_groups` or `layer_groups`).
        objective: Name in `jbrprune.objectives.OBJECTIVES`; it gives m(x).
        site: ``consumer``: w_u are the weights that read the unit's channels, summed over all layers that
            read them: the first-order effect of removing the unit. ``all``: the parameters of producers and
            norms as well (the sum over layers of the paper, taken before the square). Bare parameters that belong
            to no layer class, such as a position embedding, have no term of their own.
        statistic: ``second_moment``: E[v^2] per sample. ``batched``: E[(mean over ``batch`` samples of v)^2],
            as in the published code. ``mean_replaced``: E[(sum (a - mean a) dL/da)^2], the effect of replacing
            a channel by its mean (site ``consumer`` only).
        batch: Number of samples whose mean is squared by ``batched``, whatever the data's batch size.
        confidence: Leave out samples whose largest dense probability is not above this (published code: 0.9).
        autocast: Low-precision dtype of the forward pass, e.g. ``torch.bfloat16``.
        batch_size: Images per pass where the data do not say.
        seed: Seeds the signs of ``projection``; give every shard of the data another one.
        progress: Show a progress bar.

    Returns:
        `Scores`; sums are float64 on the CPU.

    Raises:
        ArgumentError: Unknown objective, site or statistic, a combination without meaning, no groups, or groups of
            another model.
        DataError: No data, or no sample above the confidence threshold; no labels where the objective needs them.
        ModelError: The first dimension of an activation is not the batch, samples influence each other, or the
            weights of a layer are used although the layer is never called.
        NonFiniteError: NaN or Inf in weights, images, logits or gradients.

    Source:
        Arpit, arXiv 2512.11089 (relevance, TPV); the consumer form with labels is Group Fisher, Liu et al.,
        ICML 2021, eq. 4.
    """
    groups = tuple(groups)
    function = _checked(groups, objective, site, statistic, batch, confidence)
    check_weights(model)
    means = None
    if statistic == "mean_replaced":
        _require_two_passes(data)
        means = channel_means(model, data, groups, batch_size=batch_size)
    accumulator = Accumulator(groups, batch if statistic == "batched" else None)
    parts = distributed.Parts(data, batch_size=batch_size, block=accumulator.batch)
    shown = tqdm(parts, "scoring", unit="batch", disable=None if progress else True, leave=False)
    question = Question(function, confidence, autocast, Draws(seed))

    def added() -> int:
        skipped = 0
        for relevances, left_out in _visited(model, shown, _Tape(model, groups, site, means), question):
            skipped += left_out
            if len(next(iter(relevances.values()))):
                accumulator.add(relevances)
        return skipped

    skipped = distributed.together(added)
    parts.check()
    samples, skipped = distributed.total(accumulator.samples, skipped)
    check_samples(samples, skipped, confidence)
    sums = distributed.all_sum(accumulator.finish())
    settings = Settings(objective, site, statistic, batch if statistic == "batched" else None, confidence)
    return Scores(sums, groups, samples, skipped, settings)


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

    The primitive under `relevance_scores`; arguments as there, ``means`` from `channel_means`.
    """
    question = Question(objective, confidence, autocast, Draws(seed))
    return _visited(model, distributed.numbered(batches), _Tape(model, groups, site, means), question)


def _visited(
    model: nn.Module, numbered: Iterable[tuple[int, Batch]], tape: _Tape, question: Question
) -> Iterator[_Relevances]:
    device = guest.device_of(model)
    portions = Portions()
    with ExitStack() as visit:
        # Everything is undone between two batches as well, because a generator may be left unfinished.
        for number, (start, batch) in enumerate(numbered):
            visit.enter_context(guest.visiting(model))
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

    def record(name: str) -> guest.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = guest.input_of(args, kwargs)
            x = x.flatten(2) if layers.channel_dim(module) == 1 else x.reshape(len(x), -1, x.shape[-1]).mT
            by_row = x.sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) if x.dim() == 3 else x
            totals[name] = totals.get(name, 0) + by_row.cpu().double().sum(0)
            counts[name] += x.numel() // x.shape[1]

        return hook

    device = guest.device_of(model)
    parts = distributed.Parts(data, batch_size=batch_size)

    def looked() -> None:
        with ExitStack() as visit:
            for _, batch in parts:
                visit.enter_context(guest.visiting(model))
                visit.enter_context(guest.hooked(model, forward_pre={name: record(name) for name in names}))
                model(batch.to(device).map(own).images.clone())
                visit.close()

    distributed.together(looked)
    parts.check()
    sums, numbers = distributed.all_sum(totals), distributed.all_sum(counts)
    return {name: sums[name] / numbers[name] for name in sums}


@dataclass(frozen=True, eq=False)
class _Watched:
    """An activation until its gradient arrives."""

    name: str
    kept: list[Tensor]
    version: int

    @property
    def overwritten(self) -> bool:
        """Whether the activation was changed in place after the layer had seen it."""
        return self.kept[0]._version != self.version


class _Tape:
    """Collects, during one backward, the relevance of every member into ``[B, units]`` per group."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], site: Site, means: Mapping[str, Tensor] | None
    ) -> None:
        self.model = model
        self.groups = tuple(groups)
        self.means = means or {}
        self.copied: set[str] = set()
        self.watched: list[_Watched] = []
        self.totals: dict[str, Tensor] = {}
        self.samples = 0
        self.dtype = torch.float32
        self._members = scored_members(model, self.groups, site)
        self.names = sorted({name for name, _ in self._members})

    def start(self, images: Tensor) -> None:
        """Zero the totals for a batch of images."""
        self.samples = len(images)
        self.dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.watched = []
        self.totals = {g.name: images.new_zeros(self.samples, g.size, dtype=self.dtype) for g in self.groups}

    def hooks(self) -> tuple[dict[str, guest.Hook], dict[str, guest.Hook]]:
        """Forward hooks and forward-pre hooks by module name."""
        forward: dict[str, guest.Hook] = {}
        before: dict[str, guest.Hook] = {}
        for name, side in self._members:
            module = self.model.get_submodule(name)
            if side == "in":
                before[name] = self._consumer(name, module)
                continue
            if layers.has_running_statistics(module):
                before[name], late = self._batch_norm(name, module)
            elif layers.adds_input(module):
                before[name], late = self._adding(name, module)
            else:
                late = self._producer(name, module)
            part = layers.affine_part(module)
            if part:
                before[f"{name}.{part}".removeprefix(".")] = _on_input(late)
            else:
                forward[name] = _on_output(late)
        return forward, before

    def keep_copies(self) -> bool:
        """Find activations that the model has overwritten in place; copy them from now on. Whether there are any."""
        overwritten = {watched.name for watched in self.watched if watched.overwritten}
        self.watched = []
        if again := overwritten & self.copied:
            raise ModelError(f"{min(again)} overwrites its own input; per-sample relevances are not defined there.")
        if overwritten:
            log.debug("Overwritten in place, copied from now on: %s", ", ".join(sorted(overwritten)))
        self.copied |= overwritten
        return bool(overwritten)

    def _consumer(self, name: str, module: nn.Module) -> guest.Hook:
        mean = self.means.get(name)

        def finish(activation: Tensor, gradient: Tensor) -> None:
            if mean is None:
                v = self._products(name, module, activation, gradient)
            else:
                v, total = self._moments(name, module, activation, gradient)
                v -= mean.to(v) * total
            self._add(name, "in", v)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # A view, because others may read the same input: only the gradient through this layer counts.
            x = guest.input_of(args, kwargs)
            x = x.clone() if name in self.copied else x
            seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self._watch(name, x, seen, finish)
            return _with_input(seen, args, kwargs)

        return hook

    def _producer(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def finish(activation: Tensor, gradient: Tensor) -> None:
            self._add(name, "out", self._products(name, module, activation, gradient))

        def late(output: Tensor) -> Tensor:
            seen = _started(output, apart=name in self.copied)
            self._watch(name, output, seen, finish)
            return seen

        return late

    def _adding(self, name: str, module: nn.Module) -> tuple[guest.Hook, Callable[[Tensor], Tensor]]:
        inputs: list[Tensor] = []

        def early(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.append(guest.input_of(args, kwargs).detach())

        def finish(added: Tensor, gradient: Tensor) -> None:
            self._add(name, "out", self._products(name, module, added, gradient))

        def late(output: Tensor) -> Tensor:
            # What is kept is not the output, so nobody would notice a view that is overwritten: its hook is lost.
            output = _started(output, apart=output._is_view())
            self._watch(name, output.detach() - inputs.pop(), output, finish)
            return output

        return early, late

    def _batch_norm(self, name: str, module: nn.Module) -> tuple[guest.Hook, Callable[[Tensor], Tensor]]:
        # From the input, which autograd keeps anyway: the output is often overwritten in place.
        inputs: list[Tensor] = []

        def early(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = guest.input_of(args, kwargs)
            inputs.append(x.clone() if name in self.copied else x)
            return _with_input(inputs[-1], args, kwargs)

        def finish(x: Tensor, gradient: Tensor) -> None:
            products, total = self._moments(name, module, x, gradient)
            mean, variance, weight, bias = _batch_norm_tensors(module, self.dtype)
            v = weight * torch.rsqrt(variance + module.eps) * (products - mean * total)  # type: ignore[operator]
            self._add(name, "out", v if bias is None else v + bias * total)

        def late(output: Tensor) -> Tensor:
            # What is kept is not the output, so nobody would notice a view that is overwritten: its hook is lost.
            output = _started(output, apart=output._is_view())
            self._watch(name, inputs.pop(), output, finish)
            return output

        return early, late

    def _watch(self, name: str, activation: Tensor, seen: Tensor, finish: Callable[[Tensor, Tensor], None]) -> None:
        if not torch.is_grad_enabled():
            raise ModelError(
                f"{name} runs without gradients: the model's forward has a torch.no_grad() around it, or a reentrant "
                "checkpoint. Its relevance would be zero. Switch that off while scoring, or put it into `ignore`."
            )
        activation = activation.detach()
        watched = _Watched(name, [activation], activation._version)
        self.watched.append(watched)
        # The activation is dropped when its gradient has come, as autograd does with what it keeps.
        seen.register_hook(lambda gradient: finish(watched.kept.pop(), gradient))

    def _products(self, name: str, module: nn.Module, activation: Tensor, gradient: Tensor) -> Tensor:
        """``[n, channels]`` sums of activation * gradient over positions."""
        a, g = (self._by_sample(name, module, t) for t in (activation, gradient))
        return torch.cat([_product(x, y, self.dtype).sum((1, 3)) for x, y in _pieces(a, g)])

    def _moments(self, name: str, module: nn.Module, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, channels]`` sums of activation * gradient, and of the gradient, over positions."""
        a, g = (self._by_sample(name, module, t) for t in (activation, gradient))
        pairs = [(_product(x, y, self.dtype).sum((1, 3)), y.sum((1, 3), dtype=self.dtype)) for x, y in _pieces(a, g)]
        products, sums = zip(*pairs, strict=True)
        return torch.cat(products), torch.cat(sums)

    def _by_sample(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """``[n, positions, channels, positions]`` view, whatever the layout."""
        n = self.samples
        if tensor.shape[0] % n:
            raise ModelError(
                f"{name}: the first dimension of its activation {tuple(tensor.shape)} is not a multiple of the "
                f"batch size {n}; per-sample relevances are not defined. Put this layer into `ignore`."
            )
        if layers.channel_dim(module) == 1:
            return tensor.reshape(n, tensor.shape[0] // n, tensor.shape[1], -1)
        return tensor.reshape(n, -1, tensor.shape[-1], 1)

    def _add(self, name: str, side: str, v: Tensor) -> None:
        for group, member, in_order in self._members[name, side]:
            mine = v if len(member.channel) == v.shape[1] else v[:, member.channel.to(v.device)]
            if in_order:
                self.totals[group] += mine
            else:
                self.totals[group].index_add_(1, member.unit.to(v.device), mine)


def scored_members(
    model: nn.Module, groups: Sequence[Group], site: Site
) -> dict[tuple[str, str], list[tuple[str, Member, bool]]]:
    """(module, side) -> the members there: name of the group, member, whether its channels are its units in order."""
    modules = dict(model.named_modules())
    wanted: tuple[Side, ...] = ("in",) if site == "consumer" else ("in", "out")
    found: dict[tuple[str, str], list[tuple[str, Member, bool]]] = defaultdict(list)
    for group in groups:
        members = [member for side in wanted for member in group.side(side)]
        for member in members:
            _check_member(modules.get(member.axis[0]), group, member)
        members = [m for m in members if _is_scored(modules[m.axis[0]])]
        if site == "consumer":
            members = _cut_once(group, members, modules)
        if not members:
            raise ModelError(
                f"Group {group.name} has no layer to score at site {site!r}. Score it at site 'all', or leave it out."
            )
        for member in members:
            in_order = torch.equal(member.unit.cpu(), torch.arange(group.size))
            found[member.axis[0], member.axis[1]].append((group.name, member, in_order))
    return found


def _cut_once(group: Group, members: list[Member], modules: Mapping[str, nn.Module]) -> list[Member]:
    """Leave out grouped convolutions whose outputs go with the unit: what reads those outputs is the same cut again."""
    produced = {member.axis[0] for member in group.side("out")}
    again = {name for name in produced if layers.is_grouped(modules[name])}
    return [member for member in members if member.axis[0] not in again] or members


def _is_scored(module: nn.Module) -> bool:
    return layers.channel_dim(module) is not None and layers.has_parameters(module)


def _check_member(module: nn.Module | None, group: Group, member: Member) -> None:
    name, side, _ = member.axis
    if module is None:
        raise ArgumentError(
            f"Group {group.name}: the model has no module {name!r}. Find the groups of this very model."
        )
    width = layers.in_channels(module) if side == "in" else layers.out_channels(module)
    if width is not None and len(member.channel) and int(member.channel.max()) >= width:
        raise ArgumentError(
            f"Group {group.name}: {name} has {width} channels on side {side!r}, the group names channel "
            f"{int(member.channel.max())}. Find the groups again after every change of the model."
        )


def _relevances(
    model: nn.Module, batch: Batch, number: int, start: int, tape: _Tape, question: Question
) -> tuple[dict[str, Tensor], int]:
    """Relevances ``[n, units]`` of one batch, and the number of samples left out."""
    tape.start(batch.images)
    logits = _recorded(model, batch.images, tape, question.autocast)
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


def _recorded(model: nn.Module, images: Tensor, tape: _Tape, autocast: torch.dtype | None) -> Tensor:
    """Logits ``[B, K]``, with the activations on the tape as the layers saw them."""
    while True:
        forward, before = tape.hooks()
        amp = torch.autocast(images.device.type, autocast, enabled=autocast is not None)
        with torch.enable_grad(), guest.hooked(model, forward, before), amp:
            logits = logits_of(model(images.clone()))  # a clone, for a model that changes its input in place
        if not tape.keep_copies():
            return logits


def _check_relevances(totals: Mapping[str, Tensor], number: int) -> None:
    for name, v in totals.items():
        if not torch.isfinite(v).all():
            raise NonFiniteError(
                f"Batch {number}: the relevances of group {name} contain NaN or Inf although the logits are finite: "
                "the gradient is not. A square root of zero or an overflow in half precision does that; try float32."
            )


def _with_input(x: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def _on_output(late: Callable[[Tensor], Tensor]) -> guest.Hook:
    return lambda module, args, kwargs, output: late(output)


def _on_input(late: Callable[[Tensor], Tensor]) -> guest.Hook:
    return lambda module, args, kwargs: _with_input(late(guest.input_of(args, kwargs)), args, kwargs)


def _started(tensor: Tensor, *, apart: bool) -> Tensor:
    """The tensor if autograd tracks it; a clone if it is to stay apart, or would be a leaf (not to change in place)."""
    if not tensor.requires_grad:
        return tensor.detach().requires_grad_().clone()
    return tensor.clone() if apart else tensor


def _batch_norm_tensors(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Running mean and variance, weight and bias."""
    names = ("running_mean", "running_var", "weight", "bias")
    return tuple(None if getattr(module, n) is None else getattr(module, n).to(dtype) for n in names)  # type: ignore[return-value]


def _pieces(a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in pieces of a few samples, whose product stays in the cache."""
    rows = max(1, CACHE_ELEMENTS // max(1, a[0].numel()))
    return zip(a.split(rows), g.split(rows), strict=True)


def _product(a: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) * g.to(dtype)


def unscorable(model: nn.Module, images: Tensor, groups: Sequence[Group]) -> dict[str, str]:
    """Groups whose channels could go, but whose relevance is not defined per sample.

    Their consumers see no batch, as in a network that computes a position bias.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` example input; only the first image is used.
        groups: The groups.

    Returns:
        Name of a group -> why. Empty where not even the logits of samples are apart: then `relevance_scores` says so.
    """
    members = scored_members(model, groups, "consumer")
    with guest.visiting(model):
        _, reasons = mixing(model, images[:1], sorted({name for name, _ in members}))
    if "the logits" in reasons:
        return {}
    return {group: reasons[name] for (name, _), own in members.items() if name in reasons for group, *_ in own}


def _check_unused(model: nn.Module, images: Tensor, names: Sequence[str]) -> None:
    """Refuse layers that are never called although their weights take part in the logits."""
    for name in names:
        layer = model.get_submodule(name)
        with guest.requiring_grad(layer, True), torch.enable_grad():
            logits = logits_of(model(images[:1].clone()))
            weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            used = weights and logits.requires_grad and torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        if used and any(gradient is not None for gradient in used):
            raise ModelError(
                f"{name} ({type(layer).__name__}): its weights take part in the logits, but the module is never called "
                "(another module reads them directly), so it cannot be scored. Put this layer into `ignore`."
            )


def _checked(
    groups: Sequence[Group], objective: str, site: str, statistic: str, batch: int, confidence: float
) -> Objective:
    check_arguments(objective, site, statistic, batch, confidence)
    if not groups:
        raise ArgumentError("groups is empty: there is nothing to score. See `jbrprune.units.find_groups`.")
    if len({group.name for group in groups}) < len(groups):
        raise ArgumentError("Two groups have the same name; the scores of one would overwrite those of the other.")
    return OBJECTIVES[objective]


def check_arguments(objective: str, site: str, statistic: str, batch: int, confidence: float) -> None:
    """Refuse arguments of `relevance_scores` without meaning, before anything expensive.

    Raises:
        ArgumentError: Unknown objective, site or statistic, or a combination without meaning.
    """
    check_known("objective", objective, OBJECTIVES)
    check_known("site", site, SITES)
    check_known("statistic", statistic, STATISTICS)
    if statistic == "mean_replaced" and site != "consumer":
        raise ArgumentError("statistic 'mean_replaced' is defined at site 'consumer' only: a mean replaces an input.")
    check_sampling(statistic, batch, confidence)


def _require_two_passes(data: object) -> None:
    if isinstance(data, Iterator):
        raise DataError(
            "statistic 'mean_replaced' reads the data twice, but an iterator can be read only once: pass a list, a "
            "tensor, a Dataset or a DataLoader."
        )
