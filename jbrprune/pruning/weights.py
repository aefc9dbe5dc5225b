"""Single weights as the structure of a run: which of them are masked, and the model with zeros in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from jbrprune.budgets.cost import count_macs
from jbrprune.checkpoint.description import packed_bytes
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import check_some
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, BudgetError, ModelError, NonFiniteError, UnsupportedModelError
from jbrprune.evaluation.agreement import bytes_of, parameters_of
from jbrprune.models import preserve
from jbrprune.pruning.loop import Delivery, Structure
from jbrprune.pruning.options import RunOptions, WeightOptions
from jbrprune.pruning.prepare import Problem
from jbrprune.report.records import LayerRow, Size
from jbrprune.sparsity.dead_channels import shrink
from jbrprune.sparsity.masks import ignored, is_weight_layer, masks_of, slots, weights_of
from jbrprune.sparsity.patterns import Pattern, at_floor, keep_most_important, keep_pattern, schedule

Criterion = Callable[[nn.Module, Sequence[Batch], Sequence[str]], Mapping[str, Any] | WeightScores]
"""``criterion(model, batches, names)`` -> weight name -> scores in its shape; the lowest goes first."""
Goal = float | Pattern


@dataclass(eq=False, kw_only=True)
class Weights(Structure):
    """The weights that may be pruned, and the model with zeros in the place of those that are; `find_weights` makes it.

    Attributes:
        options: How to prune.
        shapes: Name of a weight that may be pruned -> its shape.
        macs: Multiply-accumulates of the model, which zeros do not change.
        skipped: Weights that an N:M pattern does not fit.
    """

    options: WeightOptions
    shapes: dict[str, torch.Size]
    macs: int
    skipped: tuple[str, ...] = ()
    _stop: Goal = 0.0

    def goals(self) -> Iterator[Goal]:
        """Sparsities or patterns to reach, from the share that is masked already."""
        start = 1 - sum(row.after for row in self.layers()) / sum(row.before for row in self.layers())
        for stop in self.stops:
            self._stop = stop
            if isinstance(stop, Pattern):
                yield from stop.schedule(self.options.steps)
            else:  # a stop is reached once, also by a model that is there already
                yield from dict.fromkeys(schedule(stop, self.options.steps, start))
                start = stop

    def share(self, goal: Goal) -> float:
        """The share of the weights that is left."""
        return goal.keep / goal.of if isinstance(goal, Pattern) else 1 - goal

    def is_stop(self, goal: Goal) -> bool:
        """Whether the goal is a stop."""
        return goal in self.stops

    def score(self, batches: Sequence[Batch], options: RunOptions, number: int) -> Mapping[str, Tensor]:
        """Score every weight that may be pruned: name -> scores in its shape, on the CPU."""
        criterion = options.ranking
        if isinstance(criterion, Relevance):
            criterion = replace(criterion, seed=options.seed + number)
            scores = weight_scores(self.model, batches, criterion, ignore=options.ignore, progress=options.progress)
        else:
            known = isinstance(criterion, WeightScores)
            scores = criterion if known else criterion(self.model, batches, list(self.shapes))
        return check_weight_scores(scores, self.shapes)

    def select(self, scores: Mapping[str, Tensor], goal: Goal) -> Mapping[str, Tensor]:
        """The masks that reach a goal, without those of weights that a pattern does not fit."""
        masks, how = {name: self.masks[name] for name in scores}, self.options
        if not isinstance(goal, Pattern):
            passed = goal not in self.stops
            return keep_most_important(scores, masks, goal, scope=how.scope, floor=how.floor, passed=passed)
        found = weights_of(self.model)
        fitting = {}
        for name, score in scores.items():
            module, mask = found[name].module, masks[name]
            transposed = isinstance(module, _ConvTransposeNd)
            if transposed:  # [inputs, ...]; inputs of different groups of the convolution never meet in an output
                score, mask = (tensor.unflatten(0, (module.groups, -1)) for tensor in (score, mask))
            kept = keep_pattern(score, mask, goal, 1, how.remainder)
            if kept is not None:
                fitting[name] = kept.flatten(0, 1) if transposed else kept
        if not fitting:
            raise BudgetError(
                f"No weight has a number of inputs that {goal.of} divides, so nothing can be pruned {goal}. Pass "
                "remainder='pad', or another pattern."
            )
        return fitting

    def apply(self, chosen: Mapping[str, Tensor]) -> None:
        """Set the weights that are masked to zero."""
        found = weights_of(self.model)
        self.skipped = tuple(name for name in self.shapes if name not in chosen)
        with torch.no_grad():
            for name, mask in chosen.items():
                weight = found[name].stored
                weight.masked_fill_(~mask.to(weight.device), 0)
        self.masks |= chosen

    def size(self) -> Size:
        """What the model costs, time apart."""
        return size_with_masks(self.model, self.masks, self.macs)

    def consumers(self) -> list[str]:
        """Layers whose weights may be pruned."""
        return [name.rpartition(".")[0] for name in self.shapes]

    def deliver(self) -> Delivery:
        """A model with zeros, without the channels that contribute nothing if that was asked for."""
        stop, options = self._stop, self.options
        budget = {"pattern": str(stop)} if isinstance(stop, Pattern) else {"sparsity": stop}
        model = preserve.copy_model(self.model) if len(self.stops) > 1 else self.model
        if not options.shrink:
            return Delivery(model, budget, self.size(), dict(self.masks))
        parameters = {slot.name for slot in slots(model)}  # removing channels knows nothing smaller than modules
        left_out = {n.rpartition(".")[0] if n in parameters else n for n in ignored(model, options.ignore)} - {""}
        with self.clock.timed("shrinking"):
            shrunk = shrink(model, self.example, masks=self.masks, ignore=sorted(left_out), seed=options.seed)
        note = (
            f"{sum(shrunk.removed.values())} channels that contributed nothing were removed from "
            f"{len(shrunk.removed)} groups; {sum(shrunk.constant.values())} that are constant but not zero stay. The "
            "layers are listed as they were before that."
        )
        size = size_with_masks(model, shrunk.masks, sum(count_macs(model, self.example).values()))
        return Delivery(model, budget, size, shrunk.masks, (note, *shrunk.notes))

    def layers(self) -> tuple[LayerRow, ...]:
        """One row per weight that may be pruned."""
        rows = []
        for name in self.shapes:
            layer, mask = name.rpartition(".")[0], self.masks[name]
            kind = type(self.model.get_submodule(layer)).__name__
            rows.append(LayerRow(layer, kind, "weight", mask.numel(), int(mask.sum())))
        return tuple(rows)

    def removed(self) -> dict[str, list[int]]:
        """No units: single weights were pruned."""
        return {}

    def notes(self) -> list[str]:
        """Which weights a pattern does not fit, and of which only the floor is left."""
        notes = []
        if self.skipped:
            notes.append(
                f"Not pruned, because {self._stop} does not divide the number of their inputs "
                f"(remainder='pad' prunes them): {', '.join(name.rpartition('.')[0] for name in self.skipped)}."
            )
        own, floor = {name: self.masks[name] for name in self.shapes}, self.options.floor
        floored = [] if isinstance(self._stop, Pattern) else at_floor(own, floor)
        if floored:
            shown = ", ".join(name.rpartition(".")[0] for name in floored[:8])
            more = f" and {len(floored) - 8} more" if len(floored) > 8 else ""
            notes.append(f"Only the floor ({floor:g} of the weights, at least one) is left of {shown}{more}.")
        return notes


def find_weights(problem: Problem, options: WeightOptions, stops: Sequence[Goal]) -> Weights:
    """Find the weights that may be pruned, and see that the goals can be reached.

    Args:
        problem: The dense model, which may be masked by `torch.nn.utils.prune` already; left as it was.
        options: How to prune.
        stops: Sparsities (rising) or the one pattern at which a model is handed over.

    Raises:
        ArgumentError: A glob matches nothing, or the scores are of another model.
        BudgetError: The sparsity cannot be reached, or is exceeded already.
        UnsupportedModelError: There is no weight to prune.
    """
    model = preserve.copy_model(problem.dense).eval()
    found = weights_of(model, options.ignore)
    if not found:
        raise UnsupportedModelError("The model has no convolution or linear layer left to prune. Is all in `ignore`?")
    left_out = ignored(model, options.ignore)
    for name, module in model.named_modules():
        full = f"{name}.weight".removeprefix(".")
        computed = module._parameters.get("weight") is None and isinstance(getattr(module, "weight", None), Tensor)
        if is_weight_layer(module) and computed and not {name, full} & left_out:
            raise ModelError(
                f"{full} ({type(module).__name__}) is not a plain parameter (a parametrization or a weight norm "
                "computes it), so a single weight has no meaning there. Remove the parametrization, or put it into "
                "`ignore`."
            )
    shapes = {name: slot.stored.shape for name, slot in found.items()}
    given = {name: mask.cpu() for name, mask in masks_of(problem.given).items()}
    weights = Weights(
        model=model,
        example=problem.example,
        stops=tuple(stops),
        masks={name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()} | given,
        options=options,
        shapes=shapes,
        macs=sum(count_macs(model, problem.example).values()),
    )
    if isinstance(options.criterion, WeightScores):
        check_weight_scores(options.criterion, shapes)
    for stop in stops:
        weights.select({name: weights.masks[name].float() for name in shapes}, stop)
    return weights


def check_weight_scores(scores: object, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Refuse scores that are not of these weights, or rank nothing; name -> scores on the CPU.

    Raises:
        ArgumentError: Not scores of single weights, of other ones, or negative.
        NonFiniteError: NaN or Inf in them.
        DataError: All are zero.
    """
    values = scores.values() if isinstance(scores, WeightScores) else scores
    if not isinstance(values, Mapping):
        raise ArgumentError(
            f"criterion gave {type(scores).__name__}; single weights need a mapping from the name of each weight to "
            "scores in its shape, or scores made with granularity='weight'."
        )
    checked = {}
    for name, shape in shapes.items():
        found = tuple(values[name].shape) if name in values else "no score"
        if found != tuple(shape):
            raise ArgumentError(
                f"{name} has shape {tuple(shape)}, but in the scores {found}: they are of another model, or were made "
                "with another `ignore`. Score this model, or put the parameter into `ignore`."
            )
        checked[name] = values[name].cpu()
        if not torch.isfinite(checked[name]).all():
            raise NonFiniteError(f"The scores of {name} contain NaN or Inf: nothing can be ranked by them.")
        if (checked[name] < 0).any():
            raise ArgumentError(f"The scores of {name} are negative in places: the least important weight has 0.")
    check_some(checked.values())
    return checked


def size_with_masks(model: nn.Module, masks: Mapping[str, Tensor], macs: int) -> Size:
    """The size with the parameters that are not masked, and the bytes of a file that leaves out what is."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    zeros = saved = 0
    for name, mask in masks.items():
        tensor, left = parameters[name], int(mask.sum())
        zeros += mask.numel() - left
        saved += tensor.numel() * tensor.element_size() - packed_bytes(tensor, left)
    params, size = parameters_of(model), bytes_of(model)
    return Size(macs, params, size, nonzero=params - zeros, packed=size - saved)
