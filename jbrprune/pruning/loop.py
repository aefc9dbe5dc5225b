"""One run: score, select, remove, repair, until the budget is met."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.budgets import pricing
from jbrprune.budgets.budget import Budget, check_reachable
from jbrprune.budgets.cost import CostModel, axis_widths, count_macs
from jbrprune.budgets.pricing import Pricer
from jbrprune.budgets.selection import Floors, reduce_to_floors
from jbrprune.checkpoint.resume import ResumeLog
from jbrprune.criteria.relevance import Relevance, Site, Statistic
from jbrprune.criteria.scores import Scores, check_some
from jbrprune.data import distributed
from jbrprune.data.batches import Batch, count
from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.evaluation.agreement import Agreement, parameters_of
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model
from jbrprune.pruning.calibration import Calibration
from jbrprune.pruning.runs import (
    Clock,
    called,
    facts_of,
    heldout_agreement,
    mend,
    notes_on_images,
    provenance,
    recall,
    size_of,
    with_latency,
)
from jbrprune.repair.repair import Targets, record_targets
from jbrprune.report.records import LayerRow, Report, Size, StepRow
from jbrprune.structure.discovery import Found, find_groups
from jbrprune.structure.groups import Axis, Group, Selection, removed_channels
from jbrprune.structure.slicing import remove_units
from jbrprune.structure.verification import verify_groups

logger = logging.getLogger(__name__)

Criterion = Callable[..., Scores]
"""``criterion(model, batches, groups, *, seed, progress)`` -> scores of units."""


@dataclass(frozen=True)
class Settings:
    """How to prune; see the arguments of `jbrprune.prune`.

    Attributes:
        budget: What is to be reached in the end.
        stops: Shares of the budget's kind at which a model is handed over, falling; the last is the budget's.
        steps: Steps to each stop; None: one for every 5 % of the dense cost.
        criterion: Scores the units of the model as it is, or scores made before; None: relevance.
        choose_multiple: Choose ``floors.round_to`` for the machine; see `settled`.
    """

    budget: Budget
    stops: tuple[float, ...]
    steps: int | None
    repair: tuple[str, ...]
    objective: str
    site: Site
    statistic: Statistic
    batch: int
    confidence: float
    ignore: tuple[str, ...]
    width: bool
    floors: Floors
    ridge: float
    seed: int
    autocast: torch.dtype | None
    measure_latency: bool
    progress: bool
    criterion: Criterion | Scores | None = None
    choose_multiple: bool = False

    def schedule(self) -> list[float]:
        """Shares to reach, step by step."""
        starts = (1.0, *self.stops[:-1])
        legs = (
            replace(self.budget, share=stop).schedule(self.steps, start=start)
            for start, stop in zip(starts, self.stops)
        )
        return [share for leg in legs for share in leg]

    def described(self) -> dict[str, object]:
        """What of it belongs into a report."""
        names = ["width", "ridge"]
        if self.criterion is None:
            names = ["objective", "site", "statistic", "confidence", *names]
            names += ["batch"] if self.statistic == "batched" else []
        shown: dict[str, object] = {} if self.criterion is None else {"criterion": called(self.criterion)}
        shown |= {name: getattr(self, name) for name in names}
        return shown | asdict(self.floors) | {"repair": list(self.repair), "ignore": list(self.ignore)}


@dataclass(eq=False)
class State:
    """The model on its way.

    Attributes:
        model: Shrinks.
        example: Two images on the model's device.
        found: The units of the dense model.
        groups: The units that are left.
        full: Axis -> width in the dense model.
        kept: Axis -> channels of the dense model that are left.
        dense_sizes: Group -> units in the dense model.
        whole: Cost of the dense model in the unit of the budget.
        least: Share of it that is left with every group at its floor.
        price: What the model costs, at any width.
        gone: Units that the last step removed.
        after: What the model costs after the last step; None if that was read from a journal.
        targets: What repairs aim at; None where nothing is to be repaired, or without images to check it on.
        mispriced: How much more the plan of a step expected the model to cost than it does, as a share.
        unrepaired: Held-out agreement at the last stop, before its repair.
        repaired: The same, after it.
        rows: The steps that led here.
        clock: Time spent on each part of the work.
    """

    model: nn.Module
    example: Tensor
    found: Found
    groups: tuple[Group, ...]
    full: dict[Axis, int]
    kept: dict[Axis, Tensor]
    dense_sizes: dict[str, int]
    whole: float
    least: float
    price: Pricer
    gone: Selection = field(default_factory=dict)
    after: CostModel | None = None
    targets: Targets | None = None
    mispriced: float = 0.0
    unrepaired: Agreement | None = None
    repaired: Agreement | None = None
    rows: list[StepRow] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def copy(self) -> State:
        """The same on a model of its own, for `restore`; the clock is shared."""
        return replace(self, model=copy_model(self.model), kept=dict(self.kept), rows=list(self.rows))

    def restore(self, saved: State) -> None:
        """Go back to a copy, which stays as it is."""
        vars(self).update(vars(saved.copy()))

    def removed(self) -> dict[str, Tensor]:
        """Group -> units of the dense model that are gone; groups that lost nothing are absent."""
        gone = {}
        for group in self.found.groups:
            member = group.members[0]
            lost = ~torch.isin(member.channel, self.kept[member.axis])
            if bool(lost.any()):
                gone[group.name] = member.unit[lost].unique()
        return gone

    def remove(self, selection: Selection) -> None:
        """Remove units, and remember which channels of the dense model are left."""
        for axis, gone in removed_channels(self.groups, selection).items():
            stays = torch.ones(len(self.kept[axis]), dtype=torch.bool)
            stays[gone] = False
            self.kept[axis] = self.kept[axis][stays]
        self.groups = remove_units(self.model, self.groups, selection)
        self.gone = selection


def run(
    dense: nn.Module,
    state: State,
    images: Calibration,
    settings: Settings,
    name: str,
    log: ResumeLog = ResumeLog(),  # noqa: B008
    shares: Iterable[float] | None = None,
) -> Iterator[tuple[nn.Module, Report]]:
    """Prune a copy of the dense model; yield it with a report at every stop.

    The model that is yielded is the one that shrinks further when the next is asked for: copy it.

    Args:
        dense: The dense model, in eval mode; left as it was.
        state: From `start`.
        images: What to score, repair and report on.
        settings: How to prune.
        name: What to call the model in reports.
        log: Steps that are finished already; the others are added.
        shares: Shares to reach instead of those of the settings. Each is asked for when the step before is done, and
            the state may be restored meanwhile; when there are no more, what is left is yielded.

    Raises:
        CheckpointError: A finished step cannot be read, or a new one not be written.
        DataError: The objective needs labels, or no image is left to score.
        NonFiniteError: NaN or Inf on the way.
    """
    began = time.perf_counter()
    if images.gate and settings.repair:
        with state.clock.timed("repair"):
            consumers = [axis[0] for axis in state.full if axis[1] == "in"]
            state.targets = record_targets(dense, images.repair, consumers)
    size = size_of(dense, state.example)
    planned = settings.schedule() if shares is None else shares

    def report() -> Report:
        seconds = {**state.clock.seconds, "total": time.perf_counter() - began}
        made = _report(name, size, state, images, settings, seconds)
        return with_latency(made, dense, state.model, state.example) if settings.measure_latency else made

    for share in tqdm(planned, "pruning", unit="step", disable=None if settings.progress else True, leave=False):
        stops = shares is None and share in settings.stops
        number = len(state.rows) + 1
        if number <= log.finished:
            state.rows.append(_again(state, log, number))
        else:
            state.rows.append(_step(state, images, settings, number, share, stops))
            facts = {"mispriced": state.mispriced, **facts_of(state, state.rows[-1])}
            log.write(number, facts, state.gone, state.model.state_dict(), keep=stops)
        if stops:
            yield state.model, report()
    if shares is not None:
        with state.clock.timed("evaluation"):
            state.repaired = heldout_agreement(state.model, images.heldout)
        yield state.model, report()


def settled(settings: Settings, dense: nn.Module, example: Tensor) -> Settings:
    """The settings with what has to be timed first: the multiple that widths are rounded to, milliseconds as shares.

    Raises:
        BudgetError: The dense model is as fast as the budget asks for.
    """
    budget, floors = pricing.settled(settings.budget, settings.floors, settings.choose_multiple, dense, example)
    stops = tuple(stop / budget.unit for stop in settings.stops)
    return replace(settings, budget=budget, floors=floors, stops=stops, choose_multiple=False)


def start(dense: nn.Module, example: Tensor, settings: Settings) -> State:
    """Find the units and see that the budget can be reached, from a model and two images.

    Args:
        dense: The dense model, in eval mode; left as it was.
        example: ``[2, C, H, W]`` on the model's device.
        settings: How to prune.

    Raises:
        ArgumentError: A glob in ``ignore`` matches nothing.
        BudgetError: The budget lies below what the floors allow.
        UnsupportedModelError: Nothing can be removed safely.
    """
    work = copy_model(dense)
    clock = time.perf_counter()
    found = verify_groups(
        work, example, find_groups(work, example, ignore=settings.ignore, width=settings.width), seed=settings.seed
    )
    dense_sizes = {group.name: group.size for group in found.groups}
    price = pricing.pricer(settings.budget, dense, example, found.groups, settings.floors)
    account = price(work, found.groups)
    whole = account.total
    if isinstance(settings.criterion, Scores):
        check_units(settings.criterion, found.groups)
    least = reduce_to_floors(account, found.groups, settings.floors, dense_sizes) / whole
    check_reachable(settings.budget, least)
    full = axis_widths(work, found.groups)
    state = State(
        work,
        example,
        found,
        found.groups,
        full,
        {axis: torch.arange(n) for axis, n in full.items()},
        dense_sizes,
        whole,
        least,
        price,
    )
    state.clock.seconds["units"] = time.perf_counter() - clock
    return state


def _step(state: State, images: Calibration, settings: Settings, number: int, share: float, stops: bool) -> StepRow:
    """Score, select, remove, repair; at a stop, measure on the held-out images as well."""
    clock = time.perf_counter()
    with state.clock.timed("scoring"):
        scores = scored(state, images.score, settings, number)
    with state.clock.timed("selection"):
        plan = pricing.planned(
            state.model,
            state.groups,
            scores.values(),
            state.price,
            share * state.whole,
            floors=settings.floors,
            dense_sizes=state.dense_sizes,
            per_cost=settings.budget.per_cost,
        )
        selection = distributed.same(plan.selection)
    missed = settings.budget.timed and plan.after.total > share * state.whole * (1 + 1e-9)
    if stops and missed and distributed.rank() == 0:
        logger.warning(
            "The budget of %s=%g is missed: %.3f of the dense model's time are left.",
            *(settings.budget.kind, share * settings.budget.unit, plan.after.total),
        )
    with state.clock.timed("removal"):
        state.remove(selection)
        state.after = plan.after
        state.mispriced = max(state.mispriced, plan.foreseen / plan.after.total - 1)
    outcome = mend(state, images, state.kept, settings.repair, ridge=settings.ridge, stops=stops)
    return StepRow(
        step=number,
        target=share,
        macs=sum(count_macs(state.model, state.example).values()),
        params=parameters_of(state.model),
        seconds=time.perf_counter() - clock,
        unrepaired=outcome.before if outcome else None,
        repaired=outcome.after if outcome else None,
        repair=outcome.kept if outcome else "none",
        relative_latency=plan.after.total if settings.budget.timed else None,
    )


def _again(state: State, log: ResumeLog, number: int) -> StepRow:
    """Do what a finished step did."""
    facts, gone, tensors = log.read(number)
    row = recall(state, facts)
    state.remove(gone)
    state.mispriced = facts["mispriced"]
    if tensors is not None:
        state.model.load_state_dict(tensors)
    return row


def scored(state: State, batches: Sequence[Batch], settings: Settings, number: int) -> Scores:
    """The criterion on the model as it is."""
    seed, progress = settings.seed + number, settings.progress
    if isinstance(settings.criterion, Scores):
        return check_units(settings.criterion, state.groups)
    criterion = settings.criterion or Relevance(
        settings.objective, settings.site, settings.statistic, settings.batch, settings.confidence, settings.autocast
    )
    if isinstance(criterion, Relevance):
        criterion = replace(criterion, seed=seed)
        return check_units(criterion(state.model, batches, state.groups, progress=progress), state.groups)
    return check_units(criterion(state.model, batches, state.groups, seed=seed, progress=progress), state.groups)


def check_units(scores: Scores, groups: Sequence[Group]) -> Scores:
    """Refuse scores that are not of these units.

    Raises:
        ArgumentError: Not scores of units, or of other ones.
        NonFiniteError: NaN or Inf in them.
        DataError: All are zero.
    """
    if not isinstance(scores, Scores):
        raise ArgumentError(
            f"criterion gave {type(scores).__name__}; channels need scores made with granularity='unit'."
        )
    for group in groups:
        found = len(scores.sums[group.name]) if group.name in scores.sums else "no"
        if found != group.size:
            raise ArgumentError(
                f"{group.name} has {group.size} units, but {found} scores: they are of another model, or made with "
                "another `ignore` or `width`. Score this model."
            )
        if not torch.isfinite(scores.sums[group.name]).all():
            raise NonFiniteError(f"The scores of {group.name} contain NaN or Inf: nothing can be ranked by them.")
    check_some(scores.sums[group.name] for group in groups)
    return scores


def _report(
    name: str,
    dense: Size,
    state: State,
    images: Calibration,
    settings: Settings,
    seconds: dict[str, float],
) -> Report:
    return Report(
        model=name,
        budget={settings.budget.kind: (state.rows[-1].target if state.rows else 1.0) * settings.budget.unit},
        settings=settings.described() | {"steps": len(state.rows), "images": count(images.score)},
        dense=dense,
        pruned=size_of(state.model, state.example),
        layers=_layer_rows(state),
        steps=tuple(state.rows),
        unrepaired=state.unrepaired,
        repaired=state.repaired,
        heldout=images.described,
        seconds=seconds,
        provenance=provenance(settings.seed, preserve.device_of(state.model)),
        notes=_notes(state, images, settings),
        removed={name: units.tolist() for name, units in state.removed().items()},
    )


def _layer_rows(state: State) -> tuple[LayerRow, ...]:
    """One row per layer whose output is as wide as its units say: producers, and the heads of attentions."""
    kinds = {member.axis: group.kind for group in state.found.groups for member in group.members}
    rows: list[LayerRow] = []
    for name, module in state.model.named_modules():
        heads: Axis = (name, "heads", 0)
        out: Axis = (name, "out", 0)
        axes = (heads,) if layers.is_normalisation(module) else (heads, out)
        rows += [
            LayerRow(name, type(module).__name__, kinds[axis], state.full[axis], len(state.kept[axis]))
            for axis in axes
            if axis in kinds
        ]
    return tuple(rows)


def _notes(state: State, images: Calibration, settings: Settings) -> tuple[str, ...]:
    notes = [
        f"{name} keeps its width: {reason}." for name, reason in state.found.skipped.items() if reason not in _EXPECTED
    ]
    notes += notes_on_images(images, bool(settings.repair))
    if any(group.kind == "width" for group in state.groups):
        notes.append(
            "Residual width under a LayerNorm was offered: removing a channel there changes the norm's statistics."
        )
    if settings.budget.timed:
        after = state.after or state.price(state.model, state.groups)
        notes.append(pricing.note(settings.budget, after, settings.floors))
    elif state.mispriced > 1e-6:
        notes.append(
            f"The budget is overshot by up to {state.mispriced:.1%}: products of activations outside of known layers "
            "shrank as well, which the plan did not foresee."
        )
    return tuple(notes)


_EXPECTED = ("the classifier", "reaches the model's output", "ignored on request")
