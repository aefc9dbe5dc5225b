"""One run on single weights: score, mask, repair, until the sparsity is reached."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from tqdm import tqdm

from jbrprune.budgets.cost import count_macs
from jbrprune.checkpoint.description import packed_bytes
from jbrprune.checkpoint.resume import ResumeLog
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import check_some
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.data import distributed
from jbrprune.data.batches import Batch, count
from jbrprune.errors import ArgumentError, BudgetError, ModelError, NonFiniteError, UnsupportedModelError
from jbrprune.evaluation.agreement import Agreement, bytes_of, parameters_of
from jbrprune.models import preserve
from jbrprune.pruning.calibration import Calibration
from jbrprune.pruning.runs import (
    Clock,
    facts_of,
    mend,
    notes_on_images,
    provenance,
    recall,
    size_of,
    with_latency,
)
from jbrprune.repair.repair import Targets, record_targets
from jbrprune.report.records import LayerRow, Report, Size, StepRow
from jbrprune.sparsity.dead_channels import shrink
from jbrprune.sparsity.masks import ignored, is_weight_layer, slots, weights_of
from jbrprune.sparsity.patterns import Pattern, Remainder, Scope, at_floor, keep_most_important, keep_pattern, schedule

Criterion = Callable[..., WeightScores]
"""``criterion(model, batches, *, ignore, seed, progress)`` -> scores of single weights."""
Goal = float | Pattern


@dataclass(frozen=True)
class Settings:
    """How to prune single weights; see the arguments of `jbrprune.prune`.

    Attributes:
        stops: Sparsities (rising) or the one pattern at which a model is handed over.
        criterion: Scores the weights of the model as it is, or scores made before that hold for all steps.
    """

    stops: tuple[Goal, ...]
    steps: int
    scope: Scope
    remainder: Remainder
    floor: float
    ignore: tuple[str, ...]
    repair: tuple[str, ...]
    ridge: float
    criterion: Criterion | Relevance | WeightScores
    shrink: bool
    seed: int
    measure_latency: bool
    progress: bool
    described: Mapping[str, object]

    def goals(self, start: float = 0.0) -> list[Goal]:
        """Sparsities or patterns to reach, step by step, from a share that is masked already."""
        goals: list[Goal] = []
        for stop in self.stops:
            if isinstance(stop, Pattern):
                goals += stop.schedule(self.steps)
            else:
                goals += schedule(stop, self.steps, start)
                start = stop
        return list(dict.fromkeys(goals))  # a stop is reached once, also by a model that is there already


@dataclass(eq=False)
class State:
    """The model on its way.

    Attributes:
        model: Plain; what is pruned is zero.
        example: Two images on the model's device.
        masks: Weight name -> boolean mask on the CPU, False where it is pruned.
        given: The masks that the model came with.
        skipped: Weights that an N:M pattern does not fit.
        targets: What repairs aim at; None without images to check them on.
        unrepaired: Held-out agreement at the last stop, before its repair.
        repaired: The same, after it.
        clock: Time spent on each part of the work.
    """

    model: nn.Module
    example: Tensor
    masks: dict[str, Tensor]
    given: dict[str, Tensor]
    skipped: tuple[str, ...] = ()
    targets: Targets | None = None
    unrepaired: Agreement | None = None
    repaired: Agreement | None = None
    clock: Clock = field(default_factory=Clock)

    def put(self, masks: Mapping[str, Tensor]) -> None:
        """Set the weights that are masked to zero."""
        found = weights_of(self.model)
        with torch.no_grad():
            for name, mask in masks.items():
                weight = found[name].stored
                weight.masked_fill_(~mask.to(weight.device), 0)
        self.masks = dict(masks)


@dataclass(frozen=True, eq=False)
class Thinned:
    """A model with zeros, at a stop.

    Attributes:
        model: A plain copy of its own.
        masks: Weight name -> boolean mask in the model's shapes.
        report: What was done and what it cost.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: Report


def start(plain: nn.Module, example: Tensor, given: Mapping[str, Tensor], settings: Settings) -> State:
    """See that the goal can be reached, before any image is read.

    Args:
        plain: The model with its masks, if it came with any, as zeros; changed by `run`.
        example: ``[2, C, H, W]`` on the model's device.
        given: Weight name -> mask that the model came with.
        settings: How to prune.

    Raises:
        ArgumentError: A glob matches nothing, or the scores are of another model.
        BudgetError: The sparsity cannot be reached, or is exceeded already.
        UnsupportedModelError: There is no weight to prune.
    """
    found = weights_of(plain, settings.ignore)
    if not found:
        raise UnsupportedModelError("The model has no convolution or linear layer left to prune. Is all in `ignore`?")
    _refuse_computed(plain, settings.ignore)
    shapes = {name: slot.stored.shape for name, slot in found.items()}
    ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    state = State(plain, example, {name: given.get(name, mask).cpu() for name, mask in ones.items()}, dict(given))
    if isinstance(settings.criterion, WeightScores):
        _checked(settings.criterion, shapes)
    equal = {name: mask.float() for name, mask in state.masks.items()}
    for goal in settings.stops:
        _next(state, equal, goal, settings)
    return state


def run(
    state: State,
    dense: nn.Module,
    images: Calibration,
    settings: Settings,
    name: str,
    log: ResumeLog = ResumeLog(),  # noqa: B008
) -> Iterator[Thinned]:
    """Prune step by step; hand over a copy with a report at every stop.

    Args:
        state: From `start`.
        dense: The model as it was given, plain, in eval mode; left as it was.
        images: What to score, repair and report on.
        settings: How to prune.
        name: What to call the model in reports.
        log: Steps that are finished already; the others are added.

    Raises:
        CheckpointError: A finished step cannot be read, or a new one not be written.
        DataError: The objective needs labels, or no image is left to score.
        NonFiniteError: NaN or Inf on the way, or in the scores.
    """
    began = time.perf_counter()
    if images.gate and settings.repair:
        with state.clock.timed("repair"):
            consumers = [weight.rpartition(".")[0] for weight in state.masks]
            state.targets = record_targets(dense, images.repair, consumers)
    size = _with_zeros(size_of(dense, state.example), dense, state.given)
    rows: list[StepRow] = []
    masked = _zeros(state.masks) / sum(mask.numel() for mask in state.masks.values())
    shown = tqdm(
        settings.goals(masked), "pruning", unit="step", disable=None if settings.progress else True, leave=False
    )
    for number, goal in enumerate(shown, 1):
        stops = goal in settings.stops
        if number > log.finished:
            rows.append(_step(state, images, settings, number, goal))
            tensors = {f"model/{key}": value for key, value in state.model.state_dict().items()}
            tensors |= {f"masks/{key}": value for key, value in state.masks.items()}
            facts = {"skipped": list(state.skipped), **facts_of(state, rows[-1])}
            log.write(number, facts, {}, tensors, keep=stops)
        else:
            rows.append(_again(state, log, number))
        if stops:
            done = _handed_over(state, size, images, settings, name, rows, began)
            if settings.measure_latency:
                done = replace(done, report=with_latency(done.report, dense, done.model, state.example))
            yield done


def _step(state: State, images: Calibration, settings: Settings, number: int, goal: Goal) -> StepRow:
    """Score, mask, repair."""
    clock = time.perf_counter()
    with state.clock.timed("scoring"):
        scores = _scores(state, images.score, settings, number)
    with state.clock.timed("selection"):
        masks = distributed.same(_next(state, scores, goal, settings))
        state.skipped = tuple(name for name in state.masks if name not in masks)
        state.put({name: masks.get(name, mask) for name, mask in state.masks.items()})
    masked = state.masks | _others(state)
    outcome = mend(state, images, {}, settings.repair, ridge=settings.ridge, stops=goal in settings.stops, masks=masked)
    params = parameters_of(state.model)
    return StepRow(
        step=number,
        target=_density(goal),
        macs=sum(count_macs(state.model, state.example).values()),
        params=params,
        seconds=time.perf_counter() - clock,
        unrepaired=outcome.before if outcome else None,
        repaired=outcome.after if outcome else None,
        repair=outcome.kept if outcome else "none",
        nonzero=params - _zeros(masked),
    )


def _again(state: State, log: ResumeLog, number: int) -> StepRow:
    """What a finished step left."""
    facts, _, tensors = log.read(number)
    row = recall(state, facts)
    state.skipped = tuple(facts["skipped"])
    if tensors is not None:
        state.masks = {name: tensors[f"masks/{name}"] for name in state.masks}
        stored = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        state.model.load_state_dict(stored)
    return row


def _scores(state: State, batches: Sequence[Batch], settings: Settings, number: int) -> dict[str, Tensor]:
    scores = settings.criterion
    if not isinstance(scores, WeightScores):
        how: dict[str, Any] = {"ignore": settings.ignore, "progress": settings.progress}
        seed = settings.seed + number
        if isinstance(scores, Relevance):
            made = weight_scores(state.model, batches, replace(scores, seed=seed), **how)
        else:
            made = scores(state.model, batches, seed=seed, **how)
        scores = _checked(made, {name: mask.shape for name, mask in state.masks.items()})
    return {name: scores[name].cpu() for name in state.masks}


def _checked(scores: WeightScores, shapes: Mapping[str, torch.Size]) -> WeightScores:
    """Refuse scores that are not of this model's weights, or rank nothing."""
    if not isinstance(scores, WeightScores):
        raise ArgumentError(
            f"criterion gave {type(scores).__name__}; single weights need scores made with granularity='weight'."
        )
    for name, shape in shapes.items():
        found = tuple(scores.sums[name].shape) if name in scores.sums else "no score"
        if found != tuple(shape):
            raise ArgumentError(
                f"{name} has shape {tuple(shape)}, but in the scores {found}: they are of another model, or were made "
                "with another `ignore`. Score this model, or put the parameter into `ignore`."
            )
        if not torch.isfinite(scores[name]).all():
            raise NonFiniteError(f"The scores of {name} contain NaN or Inf: nothing can be ranked by them.")
        if (scores[name] < 0).any():
            raise ArgumentError(f"The scores of {name} are negative in places: the least important weight has 0.")
    check_some(scores.sums[name] for name in shapes)
    return scores


def _next(state: State, scores: Mapping[str, Tensor], goal: Goal, settings: Settings) -> dict[str, Tensor]:
    """The masks of the next step, without those of weights that a pattern does not fit."""
    if isinstance(goal, Pattern):
        found = weights_of(state.model)
        masks = {
            name: _patterned(score, state.masks[name], goal, found[name].module, settings.remainder)
            for name, score in scores.items()
        }
        fitting = {name: mask for name, mask in masks.items() if mask is not None}
        if not fitting:
            raise BudgetError(
                f"No weight has a number of inputs that {goal.of} divides, so nothing can be pruned {goal}. Pass "
                "remainder='pad', or another pattern."
            )
        return fitting
    on_the_way = goal not in settings.stops
    return keep_most_important(scores, state.masks, goal, scope=settings.scope, floor=settings.floor, passed=on_the_way)


def _patterned(score: Tensor, mask: Tensor, pattern: Pattern, module: nn.Module, remainder: Remainder) -> Tensor | None:
    if not isinstance(module, _ConvTransposeNd):
        return keep_pattern(score, mask, pattern, 1, remainder)
    # [inputs, ...], and the inputs of different groups of the convolution never meet in an output
    score, mask = (tensor.unflatten(0, (module.groups, -1)) for tensor in (score, mask))
    kept = keep_pattern(score, mask, pattern, 1, remainder)
    return None if kept is None else kept.flatten(0, 1)


def _density(goal: Goal) -> float:
    return goal.keep / goal.of if isinstance(goal, Pattern) else 1 - goal


def _handed_over(
    state: State,
    dense: Size,
    images: Calibration,
    settings: Settings,
    name: str,
    rows: Sequence[StepRow],
    began: float,
) -> Thinned:
    model, masks, removed = copy.deepcopy(state.model).eval(), state.masks | _others(state), ()
    layers = _layer_rows(state)
    if settings.shrink:
        with state.clock.timed("shrinking"):
            shrunk = shrink(
                model, state.example, masks=masks, ignore=_modules(model, settings.ignore), seed=settings.seed
            )
        masks = shrunk.masks
        removed = (
            f"{sum(shrunk.removed.values())} channels that contributed nothing were removed from "
            f"{len(shrunk.removed)} groups; {sum(shrunk.constant.values())} that are constant but not zero stay. The "
            "layers are listed as they were before that.",
            *shrunk.notes,
        )
    seconds = {**state.clock.seconds, "total": time.perf_counter() - began}
    report = Report(
        model=name,
        budget=_asked(settings, rows[-1]),
        settings=dict(settings.described) | {"steps": len(rows), "images": count(images.score)},
        dense=dense,
        pruned=_with_zeros(size_of(model, state.example), model, masks),
        layers=layers,
        steps=tuple(rows),
        unrepaired=state.unrepaired,
        repaired=state.repaired,
        heldout=images.described,
        seconds=seconds,
        provenance=provenance(settings.seed, preserve.device_of(model)),
        notes=(*removed, *_notes(state, settings), *notes_on_images(images, bool(settings.repair))),
    )
    return Thinned(model, masks, report)


def _asked(settings: Settings, row: StepRow) -> dict[str, object]:
    pattern = settings.stops[0]
    return {"structure": str(pattern)} if isinstance(pattern, Pattern) else {"sparsity": round(1 - row.target, 12)}


def _refuse_computed(model: nn.Module, ignore: Sequence[str]) -> None:
    """Refuse layers whose weight is computed from other parameters: there are no single weights to prune."""
    left_out, plain = ignored(model, ignore), {slot.name for slot in slots(model)}
    for name, module in model.named_modules():
        full = f"{name}.weight".removeprefix(".")
        if is_weight_layer(module) and full not in plain and not {name, full} & left_out:
            raise ModelError(
                f"{full} ({type(module).__name__}) is not a plain parameter (a parametrization or a weight norm "
                "computes it), so a single weight has no meaning there. Remove the parametrization, or put it into "
                "`ignore`."
            )


def _modules(model: nn.Module, ignore: Sequence[str]) -> list[str]:
    """Globs of modules and parameters as names of modules: removing channels knows nothing smaller."""
    parameters = {slot.name for slot in slots(model)}
    names = (name.rpartition(".")[0] if name in parameters else name for name in ignored(model, ignore))
    return sorted({name for name in names if name})


def _others(state: State) -> dict[str, Tensor]:
    """Masks of what is not pruned here, such as ignored layers and biases."""
    return {name: mask for name, mask in state.given.items() if name not in state.masks}


def _zeros(masks: Mapping[str, Tensor]) -> int:
    return sum(mask.numel() - int(mask.sum()) for mask in masks.values())


def _with_zeros(size: Size, model: nn.Module, masks: Mapping[str, Tensor]) -> Size:
    """The size with the parameters that are not masked, and the bytes of a file that leaves out what is."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    saved = sum(
        bytes_of_tensor(parameters[name]) - packed_bytes(parameters[name], int(mask.sum()))
        for name, mask in masks.items()
    )
    return replace(size, nonzero=size.params - _zeros(masks), packed=bytes_of(model) - saved)


def bytes_of_tensor(tensor: Tensor) -> int:
    """Bytes of one tensor, stored densely."""
    return tensor.numel() * tensor.element_size()


def _layer_rows(state: State) -> tuple[LayerRow, ...]:
    found = weights_of(state.model)
    return tuple(
        LayerRow(name.rpartition(".")[0], type(found[name].module).__name__, "weight", mask.numel(), int(mask.sum()))
        for name, mask in state.masks.items()
    )


def _notes(state: State, settings: Settings) -> list[str]:
    notes = []
    if state.skipped:
        notes.append(
            f"Not pruned, because {settings.stops[0]} does not divide the number of their inputs "
            f"(remainder='pad' prunes them): {', '.join(name.rpartition('.')[0] for name in state.skipped)}."
        )
    floored = [] if isinstance(settings.stops[0], Pattern) else at_floor(state.masks, settings.floor)
    if floored:
        shown = ", ".join(name.rpartition(".")[0] for name in floored[:8])
        more = f" and {len(floored) - 8} more" if len(floored) > 8 else ""
        notes.append(f"Only the floor ({settings.floor:g} of the weights, at least one) is left of {shown}{more}.")
    return notes
