"""Single weights as the structure of a run: which of them are masked, and the model with zeros in their place."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from jbrprune.budgets.cost import count_macs
from jbrprune.checkpoint.description import packed_bytes
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import BudgetError, UnsupportedModelError
from jbrprune.evaluation.agreement import bytes_of, parameters_of
from jbrprune.models import preserve
from jbrprune.pruning.loop import Structure, check_scores
from jbrprune.pruning.options import WeightOptions
from jbrprune.pruning.prepare import Problem
from jbrprune.report.records import LayerRow, Size
from jbrprune.sparsity.dead_channels import shrink
from jbrprune.sparsity.masks import find_ignored, masks_of, refuse_computed_weights, slots, weights_of
from jbrprune.sparsity.patterns import Pattern, at_floor, keep_most_important, keep_pattern, schedule

logger = logging.getLogger(__name__)

Criterion = Callable[[nn.Module, Sequence[Batch], Sequence[str]], Mapping[str, Any] | WeightScores]
"""``criterion(model, batches, names)`` -> weight name -> scores in its shape; the lowest goes first."""
Goal = float | Pattern


@dataclass(eq=False, kw_only=True)
class Weights(Structure):
    """The weights that may be pruned, and the model with zeros in the place of those that are; `find_weights` makes it.

    Attributes:
        shapes: Name of a weight that may be pruned -> its shape.
        macs: Multiply-accumulates of the model, which zeros do not change.
        skipped: Weights that an N:M pattern does not fit.
    """

    shapes: dict[str, torch.Size]
    macs: int
    skipped: tuple[str, ...] = ()

    def goals(self) -> Iterator[Goal]:
        """Sparsities or patterns to reach, from the share that is masked already."""
        own = [self.masks[name] for name in self.shapes]
        start = 1 - sum(int(mask.sum()) for mask in own) / sum(mask.numel() for mask in own)
        for stop in self.stops:
            self.stop = stop
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

    def score(self, batches: Sequence[Batch], number: int) -> dict[str, Tensor]:
        """Score every weight that may be pruned: name -> scores in its shape, on the CPU."""
        criterion, options = self.options.ranking, self.options
        if isinstance(criterion, Relevance):
            criterion = replace(criterion, seed=criterion.seed + options.seed + number, output=self.output)
            scores = weight_scores(self.model, batches, criterion, ignore=options.ignore, progress=options.progress)
        else:
            known = isinstance(criterion, WeightScores)
            scores = criterion if known else criterion(self.model, batches, list(self.shapes))
        return check_scores(scores, self.shapes, least=0)

    def select(self, scores: Mapping[str, Tensor], goal: Goal) -> dict[str, Tensor]:
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
            kept = keep_pattern(score, mask, goal, 1)
            if kept is not None:
                fitting[name] = kept.flatten(0, 1) if transposed else kept
        if not fitting:
            raise BudgetError(
                f"No weight has a number of inputs that {goal.of} divides: pass another pattern than {goal}."
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

    def deliver(self) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
        """A model with zeros, without the channels that contribute nothing if that was asked for."""
        rows, notes, options, masks = [], list(self.notes()), self.options, dict(self.masks)
        for name, layer in zip(self.shapes, self.consumers):
            kind, mask = type(self.model.get_submodule(layer)).__name__, masks[name]
            rows.append(LayerRow(name.removesuffix(".weight"), kind, "weight", mask.numel(), int(mask.sum())))
        model = preserve.copy_model(self.model) if len(self.stops) > 1 else self.model
        if options.shrink:
            parameters = {slot.name for slot in slots(model)}  # removing channels knows nothing smaller than modules
            named = find_ignored(model, options.ignore)
            left_out = {name.rpartition(".")[0] if name in parameters else name for name in named} - {""}
            with self.timed("shrinking"):
                shrunk = shrink(model, self.problem.example, masks=masks, ignore=sorted(left_out), seed=options.seed)
            removed = (
                f"{sum(shrunk.removed.values())} channels that contributed nothing were removed from "
                f"{len(shrunk.removed)} groups. The layers are listed as they were before that."
            )
            masks, notes = shrunk.masks, [removed, *shrunk.notes, *notes]
        macs = sum(count_macs(model, self.problem.example).values()) if options.shrink else self.macs
        budget = {"pattern": str(self.stop)} if isinstance(self.stop, Pattern) else {"sparsity": self.stop}
        size = size_with_masks(model, masks, macs)
        return model, masks, {"budget": budget, "pruned": size, "layers": tuple(rows), "notes": tuple(notes)}

    def notes(self) -> Iterator[str]:
        """Which weights have adapters, which a pattern does not fit, and of which only the floor is left."""
        if adapted := describe_adapters(self.model, self.shapes):
            yield adapted
        if self.skipped:
            yield (
                f"Not pruned, because {self.stop} does not divide the number of their inputs: "
                f"{', '.join(name.removesuffix('.weight') for name in self.skipped)}."
            )
        own, floor = {name: self.masks[name] for name in self.shapes}, self.options.floor
        floored = [] if isinstance(self.stop, Pattern) else at_floor(own, floor)
        if floored:
            shown = ", ".join(name.removesuffix(".weight") for name in floored[:8])
            more = f" and {len(floored) - 8} more" if len(floored) > 8 else ""
            yield f"Only the floor ({floor:g} of the weights, at least one) is left of {shown}{more}."


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
    shapes = {name: slot.stored.shape for name, slot in weights_of(model, options.ignore).items()}
    if not shapes:
        raise UnsupportedModelError("The model has no convolution or linear layer left to prune. Is all in `ignore`?")
    refuse_computed_weights(model, options.ignore)
    given = {name: mask.cpu() for name, mask in masks_of(problem.given).items()}
    if adapted := describe_adapters(model, shapes):
        logger.warning("%s", adapted)
    consumers = [name.rpartition(".")[0] for name in shapes]
    weights = Weights(
        *(problem, options, model, tuple(stops), consumers),
        masks={name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()} | given,
        shapes=shapes,
        macs=sum(count_macs(model, problem.example).values()),
    )
    if isinstance(options.criterion, WeightScores):
        check_scores(options.criterion, shapes, least=0)
    for stop in stops:
        weights.select({name: weights.masks[name].float() for name in shapes}, stop)
    return weights


def describe_adapters(model: nn.Module, names: Iterable[str]) -> str:
    """Say which weights have an adapter beside them, as LoRA puts it there; nothing if none has.

    An adapter is known by a parameter called ``lora_...``, or by a ``base_layer``, the name that peft gives the layer.

    Args:
        model: The model.
        names: Weights that are pruned.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(4, 1))
        >>> describe_adapters(nn.Sequential(layer), ["0.weight"])[:42]
        '0.weight (and 0 more) has an adapter (LoRA'
    """
    marks = [re.match(r"(.*?)(lora_|base_layer\.)", name, re.IGNORECASE) for name, _ in model.named_parameters()]
    places = tuple({mark[1] for mark in marks if mark})
    found = [name for name in names if name.startswith(places) and "lora_" not in name.lower()]
    if not found:
        return ""
    return (
        f"{found[0]} (and {len(found) - 1} more) has an adapter (LoRA) beside it: merging it adds to the "
        "weight, and its zeros vanish. Merge first (peft: model.merge_and_unload()), then call sparsify."
    )


def size_with_masks(model: nn.Module, masks: Mapping[str, Tensor], macs: int) -> Size:
    """The size with the parameters that are not masked, and the bytes of a file that leaves out what is."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    params, size = parameters_of(model), bytes_of(model)
    nonzero, packed = params, size
    for name, mask in masks.items():
        tensor, left = parameters[name], int(mask.sum())
        nonzero -= mask.numel() - left
        packed -= tensor.numel() * tensor.element_size() - packed_bytes(tensor, left)
    return Size(macs, params, size, nonzero, packed)
