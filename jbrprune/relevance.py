"""The streaming pass for channels: exact per-sample relevances from one forward and one backward.

For a layer that is affine in its parameters (out = W a + b), with L(x) the objective on sample x:

* over all weights that *consume* input channel c:      sum_p w_p dL/dw_p = sum over positions of a * dL/da
* over all parameters that *produce* output channel c:  sum_p w_p dL/dw_p = sum over positions of out * dL/dout

where dL/da is the gradient through this layer only. No weight gradient is formed. Parameters are frozen
during the pass, so the backward stops at the first activation that is scored.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune import guest, layers
from jbrprune.batches import Batch, iterate
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError
from jbrprune.groups import Group, Member
from jbrprune.measure import check_weights, first_nonfinite, logits_of
from jbrprune.objectives import OBJECTIVES, Objective, Target, confident
from jbrprune.scores import Accumulator, Scores, Settings

log = logging.getLogger(__name__)

Site = Literal["consumer", "all"]
Statistic = Literal["second_moment", "batched", "mean_replaced"]
SITES = ("consumer", "all")
STATISTICS = ("second_moment", "batched", "mean_replaced")

CACHE_ELEMENTS = 1 << 18
"""Products of activation and gradient are formed in pieces of this size, which stay in the cache."""


class _Overwritten(Exception):  # noqa: N818 - a signal, not an error
    """An activation was changed in place after the layer had used it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


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
            norms as well (the sum over layers of the paper, taken before the square).
        statistic: ``second_moment``: E[v^2] per sample. ``batched``: E[(mean over ``batch`` samples of v)^2],
            as in the published code. ``mean_replaced``: E[(sum (a - mean a) dL/da)^2], the effect of replacing
            a channel by its mean (site ``consumer`` only).
        batch: Number of samples whose mean is squared by ``batched``, whatever the data's batch size.
        confidence: Leave out samples whose largest dense probability is not above this (published code: 0.9).
        autocast: Low-precision dtype of the forward pass, e.g. ``torch.bfloat16``.
        batch_size: Images per pass where the data do not say.
        seed: Seeds the signs of ``projection``.
        progress: Show a progress bar.

    Returns:
        `Scores`; sums are float64 on the CPU.

    Raises:
        ArgumentError: Unknown objective, site or statistic, or a combination without meaning.
        DataError: No data, or no sample above the confidence threshold.
        ModelError: The first dimension of an activation is not the batch, or samples influence each other.
        NonFiniteError: NaN or Inf in weights, images or logits.

    Source:
        Arpit, arXiv 2512.11089 (relevance, TPV); the consumer form with labels is Group Fisher, Liu et al.,
        ICML 2021, eq. 4.
    """
    function = _checked(objective, site, statistic, batch, confidence)
    groups = tuple(groups)
    check_weights(model)
    means = None
    if statistic == "mean_replaced":
        _require_two_passes(data)
        means = channel_means(model, data, groups, batch_size=batch_size)
    accumulator = Accumulator(groups, batch if statistic == "batched" else None)
    skipped = 0
    for relevances, left_out in per_sample_relevances(
        model,
        tqdm(iterate(data, batch_size=batch_size), "scoring", unit="batch", disable=not progress, leave=False),
        groups,
        objective=function,
        site=site,
        means=means,
        confidence=confidence,
        autocast=autocast,
        seed=seed,
    ):
        skipped += left_out
        if len(next(iter(relevances.values()))):
            accumulator.add(relevances)
    if accumulator.samples == 0:
        raise DataError(
            f"No sample was left: the dense model's largest probability exceeds confidence={confidence} on none "
            f"of {skipped} images. Lower the threshold."
        )
    settings = Settings(objective, site, statistic, batch if statistic == "batched" else None, confidence)
    return Scores(accumulator.finish(), groups, accumulator.samples, skipped, settings)


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
    device = guest.device_of(model)
    generator = torch.Generator().manual_seed(seed)
    tape = _Tape(model, groups, site, means)
    with ExitStack() as visit:
        # Everything is undone between two batches as well, because a generator may be left unfinished.
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            visit.enter_context(guest.visiting(model))
            if number == 0:
                _check_samples_apart(model, batch.images, tape.names)
            result = _relevances(model, batch, tape, objective, confidence, autocast, generator)
            visit.close()
            yield result


def channel_means(
    model: nn.Module, data: object, groups: Sequence[Group], *, batch_size: int = 32
) -> dict[str, Tensor]:
    """Module name -> ``[C_in]`` mean over samples and positions of each consumer's input (float64, CPU)."""
    names = sorted({m.axis[0] for g in groups for m in g.side("in")})
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def record(name: str) -> guest.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0].detach()
            dim = layers.channel_dim(module) % x.dim()  # type: ignore[operator]
            total = x.double().sum([d for d in range(x.dim()) if d != dim]).cpu()
            totals[name] = totals.get(name, 0) + total
            counts[name] += x.numel() // x.shape[dim]

        return hook

    device = guest.device_of(model)
    with guest.visiting(model), guest.hooked(model, forward_pre={name: record(name) for name in names}):
        for batch in iterate(data, batch_size=batch_size):
            model(batch.images.to(device))
    return {name: totals[name] / counts[name] for name in totals}


class _Tape:
    """Collects, during one backward, the relevance of every member into ``[B, units]`` per group."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], site: Site, means: Mapping[str, Tensor] | None
    ) -> None:
        self.model = model
        self.groups = tuple(groups)
        self.means = means or {}
        self.copied: set[str] = set()
        self.totals: dict[str, Tensor] = {}
        self.samples = 0
        self.dtype = torch.float32
        self._members: dict[tuple[str, str], list[tuple[str, Member, bool]]] = defaultdict(list)
        wanted = ("in",) if site == "consumer" else ("in", "out")
        for group in self.groups:
            members = [member for side in wanted for member in group.side(side)]  # type: ignore[arg-type]
            members = [m for m in members if layers.channel_dim(model.get_submodule(m.axis[0])) is not None]
            if not members:
                raise ModelError(f"Group {group.name} has no layer to score at site '{site}'.")
            for member in members:
                whole = len(member.unit) == group.size and bool((member.unit == torch.arange(group.size)).all())
                self._members[member.axis[0], member.axis[1]].append((group.name, member, whole))
        self.names = sorted({name for name, _ in self._members})

    def start(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> None:
        self.samples = len(batch)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.totals = {
            g.name: torch.zeros(self.samples, g.size, dtype=self.dtype, device=device) for g in self.groups
        }

    def hooks(self) -> tuple[dict[str, guest.Hook], dict[str, guest.Hook]]:
        """Forward hooks and forward-pre hooks by module name."""
        forward: dict[str, guest.Hook] = {}
        before: dict[str, guest.Hook] = {}
        for name, side in self._members:
            module = self.model.get_submodule(name)
            if side == "in":
                before[name] = self._consumer(name)
            elif layers.has_running_statistics(module):
                before[name], late = self._batch_norm(name)
                part = layers.affine_part(module)
                if part:
                    before[f"{name}.{part}"] = _on_input(late)
                else:
                    forward[name] = _on_output(late)
            else:
                late = self._producer(name)
                part = layers.affine_part(module)
                if part:
                    before[f"{name}.{part}"] = _on_input(late)
                else:
                    forward[name] = _on_output(late)
        return forward, before

    def _consumer(self, name: str) -> guest.Hook:
        module = self.model.get_submodule(name)
        mean = self.means.get(name)

        def finish(activation: Tensor, gradient: Tensor) -> None:
            v = self._products(name, module, activation, gradient)
            if mean is not None:
                v = v - mean.to(v) * self._sums(name, module, gradient)
            self._add(name, "in", v)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            key = None if args else "input"
            x = kwargs["input"] if key else args[0]
            seen = x.detach().requires_grad_() if not x.requires_grad else x.view_as(x)
            self._watch(name, x, seen, finish)
            return ((seen, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: seen})

        return hook

    def _producer(self, name: str) -> Callable[[Tensor], Tensor]:
        module = self.model.get_submodule(name)

        def finish(activation: Tensor, gradient: Tensor) -> None:
            self._add(name, "out", self._products(name, module, activation, gradient))

        def late(output: Tensor) -> Tensor:
            output = _started(output)
            self._watch(name, output, output, finish)
            return output

        return late

    def _batch_norm(self, name: str) -> tuple[guest.Hook, Callable[[Tensor], Tensor]]:
        # From the input, which autograd keeps anyway: the output is often overwritten in place.
        module = self.model.get_submodule(name)
        inputs: list[Tensor] = []

        def early(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.append(args[0])

        def finish(x: Tensor, gradient: Tensor) -> None:
            inverse = torch.rsqrt(module.running_var.to(self.dtype) + module.eps)  # type: ignore[operator, union-attr]
            total = self._sums(name, module, gradient)
            centred = self._products(name, module, x, gradient) - module.running_mean.to(self.dtype) * total  # type: ignore[union-attr, operator]
            if module.affine:
                v = module.weight.to(self.dtype) * inverse * centred + module.bias.to(self.dtype) * total  # type: ignore[union-attr, operator]
            else:
                v = torch.zeros_like(total)
            self._add(name, "out", v)

        def late(output: Tensor) -> Tensor:
            output = _started(output)
            self._watch(name, inputs.pop(), output, finish)
            return output

        return early, late

    def _watch(self, name: str, kept: Tensor, seen: Tensor, finish: Callable[[Tensor, Tensor], None]) -> None:
        kept = kept.detach().clone() if name in self.copied else kept.detach()
        version = kept._version
        cell = [kept]

        def backward(gradient: Tensor) -> None:
            activation = cell.pop()
            if activation._version != version:
                raise _Overwritten(name)
            finish(activation, gradient)

        seen.register_hook(backward)

    def _products(self, name: str, module: nn.Module, activation: Tensor, gradient: Tensor) -> Tensor:
        a, g = (self._by_sample(name, module, t) for t in (activation, gradient))
        rows = max(1, CACHE_ELEMENTS // max(1, a[0].numel()))
        positions = (1, 3)
        pieces = [
            (x.to(self.dtype) * y.to(self.dtype)).sum(positions)
            for x, y in zip(a.split(rows), g.split(rows), strict=True)
        ]
        return torch.cat(pieces)

    def _sums(self, name: str, module: nn.Module, gradient: Tensor) -> Tensor:
        return self._by_sample(name, module, gradient).sum((1, 3), dtype=self.dtype)

    def _by_sample(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """``[n, positions, channels, positions]`` view, whatever the layout."""
        if tensor.shape[0] % self.samples:
            raise ModelError(
                f"{name}: the first dimension of its activation {tuple(tensor.shape)} is not a multiple of the "
                f"batch size {self.samples}; per-sample relevances are not defined. Put this layer into `ignore`."
            )
        n = self.samples
        if layers.channel_dim(module) == 1:
            return tensor.reshape(n, tensor.shape[0] // n, tensor.shape[1], -1)
        return tensor.reshape(n, -1, tensor.shape[-1], 1)

    def _add(self, name: str, side: str, v: Tensor) -> None:
        for group, member, whole in self._members[name, side]:
            if whole:
                self.totals[group] += v if len(member.channel) == v.shape[1] else v[:, member.channel]
            else:
                self.totals[group].index_add_(1, member.unit.to(v.device), v[:, member.channel.to(v.device)])


def _relevances(
    model: nn.Module,
    batch: Batch,
    tape: _Tape,
    objective: Objective,
    confidence: float,
    autocast: torch.dtype | None,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], int]:
    state = generator.get_state()
    while True:
        try:
            return _one_pass(model, batch, tape, objective, confidence, autocast, generator)
        except _Overwritten as overwritten:
            # The layer's activation is changed in place later on: keep a copy from now on.
            log.debug("%s is overwritten in place; its activation is copied.", overwritten.name)
            tape.copied.add(overwritten.name)
            generator.set_state(state)


def _one_pass(
    model: nn.Module,
    batch: Batch,
    tape: _Tape,
    objective: Objective,
    confidence: float,
    autocast: torch.dtype | None,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], int]:
    images = batch.images
    tape.start(batch, images.device, images.dtype)
    forward, before = tape.hooks()
    amp = torch.autocast(images.device.type, autocast, enabled=autocast is not None)
    with torch.enable_grad(), guest.hooked(model, forward, before), amp:
        logits = logits_of(model(images))
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"The logits contain NaN or Inf; the first module is {first_nonfinite(model, images)}.")
    reference = logits.detach() if batch.reference is None else batch.reference
    keep = confident(reference, confidence) if confidence > 0 else None
    with torch.enable_grad():
        loss = objective(logits.float() if autocast else logits, Target(reference, batch.labels, generator))
        loss = (loss if keep is None else loss * keep).sum()
        if not loss.requires_grad:
            raise ModelError("No scored layer takes part in the logits: nothing to differentiate.")
        loss.backward()
    totals, tape.totals = tape.totals, {}
    if keep is None:
        return totals, 0
    return {name: v[keep] for name, v in totals.items()}, int((~keep).sum())


def _on_output(late: Callable[[Tensor], Tensor]) -> guest.Hook:
    return lambda module, args, kwargs, output: late(output)


def _on_input(late: Callable[[Tensor], Tensor]) -> guest.Hook:
    return lambda module, args, kwargs: ((late(args[0]), *args[1:]), kwargs)


def _started(tensor: Tensor) -> Tensor:
    """A tensor that autograd tracks; cloned, because a leaf may not be changed in place."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_().clone()


def _check_samples_apart(model: nn.Module, images: Tensor, names: Sequence[str]) -> None:
    """Change one of three samples: only its rows may change, in the middle third of every activation."""
    one = images[:1]
    other = one.flip(-1) + one.std().clamp_min(1e-3) * torch.linspace(-1, 1, one.shape[-1]).to(one)
    sums: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str) -> guest.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["input"]
            sums[name].append(x.reshape(x.shape[0], -1).double().abs().sum(1).cpu())

        return hook

    with torch.no_grad(), guest.hooked(model, forward_pre={name: record(name) for name in names}):
        model(torch.cat([one, one, one]))
        calls = {name: len(rows) for name, rows in sums.items()}
        model(torch.cat([one, other, one]))
    for name, rows in sums.items():
        for first, second in zip(rows[: calls[name]], rows[calls[name] :], strict=True):
            _check_rows(name, first, second)


def _check_rows(name: str, first: Tensor, second: Tensor) -> None:
    third = len(first) // 3
    changed = (first - second).abs() > 1e-3 * first.abs().clamp_min(1e-12)
    if len(first) % 3 or changed[:third].any() or changed[2 * third :].any():
        raise ModelError(
            f"{name}: the first dimension of its input ({len(first)} rows for 3 images) is not the batch, or samples "
            "influence each other (a batch norm without stored statistics?). Per-sample relevances are not "
            "defined there. Put this layer into `ignore`, or make the model treat samples apart in eval mode."
        )


def _checked(objective: str, site: str, statistic: str, batch: int, confidence: float) -> Objective:
    for what, value, known in (
        ("objective", objective, tuple(OBJECTIVES)),
        ("site", site, SITES),
        ("statistic", statistic, STATISTICS),
    ):
        if value not in known:
            raise ArgumentError(f"{what} must be one of {', '.join(known)}, got {value!r}.")
    if statistic == "mean_replaced" and site != "consumer":
        raise ArgumentError("statistic 'mean_replaced' is defined at site 'consumer' only: a mean replaces an input.")
    if statistic == "batched" and batch < 1:
        raise ArgumentError(f"batch must be at least 1, got {batch}.")
    if not 0 <= confidence < 1:
        raise ArgumentError(f"confidence must satisfy 0 <= confidence < 1, got {confidence}.")
    return OBJECTIVES[objective]


def _require_two_passes(data: object) -> None:
    if isinstance(data, Iterator):
        raise DataError(
            "statistic 'mean_replaced' reads the data twice, but an iterator can be read only once: pass a list, a "
            "tensor, a Dataset or a DataLoader."
        )
