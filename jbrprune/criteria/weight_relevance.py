r"""Scores of single weights: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j, exact per sample.

One backward to the activations. `jbrprune.criteria.collectors` sees every use of a scored parameter by a layer
function, `jbrprune.criteria.squares` forms the squares.

What is seen is compared with autograd on two images before the pass: a parameter that is used in any way that is not
in this list is refused, and so are samples that influence each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.collectors import Means, Squares
from jbrprune.criteria.factors import wide
from jbrprune.criteria.objectives import OBJECTIVES
from jbrprune.criteria.passes import (
    Draws,
    Question,
    check_logits,
    check_samples,
    losses_of,
    own,
)
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Settings
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.data.files import tensor_file, write_tensors
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError, check_known
from jbrprune.evaluation.agreement import check_weights
from jbrprune.evaluation.portions import Portions
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.sparsity.masks import Slot, fresh, ignored, is_weight_layer, slots

Parameters = Literal["weights", "all"]
PARAMETERS = ("weights", "all")

KIND = "weights"
MAX_MEMORY = 256 << 20
"""Bytes of scratch memory unless the user says otherwise."""


@dataclass(frozen=True, eq=False)
class WeightScores:
    """s_j = E_x[(w_j g_j(x))^2] for every scored weight, or its batched or signed form.

    Attributes:
        sums: Parameter name (``layer1.0.conv1.weight``, also where the module is masked) -> float64 of the
            parameter's shape, on the CPU: the sum over samples of (w g)^2; for ``signed`` of w g.
        samples: Samples in the sums.
        skipped: Samples that were left out because the dense model was not confident enough.
        settings: Objective and statistic; the site is ``weight``.
    """

    sums: Mapping[str, Tensor]
    samples: int
    skipped: int
    settings: Settings

    def __getitem__(self, name: str) -> Tensor:
        """Scores of one parameter, in its shape: the mean over samples; for ``signed`` its absolute value."""
        mean = self.sums[name] / self.samples
        return mean.abs() if self.settings.statistic == "signed" else mean

    def values(self) -> dict[str, Tensor]:
        """Parameter name -> scores in the parameter's shape."""
        return {name: self[name] for name in self.sums}

    def __add__(self, other: WeightScores) -> WeightScores:
        """Merge the scores of two disjoint sets of samples.

        The sum of the shards is the score of the whole; for ``batched`` if the shards are cut between batches.

        Raises:
            ArgumentError: They were made with other settings, or for other parameters.
        """
        if not isinstance(other, WeightScores):
            return NotImplemented
        if self.settings != other.settings:
            raise ArgumentError(f"Cannot add scores made with {self.settings} and {other.settings}.")
        shapes = [{name: tuple(total.shape) for name, total in s.sums.items()} for s in (self, other)]
        if shapes[0] != shapes[1]:
            name = next(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
            raise ArgumentError(
                f"Cannot add scores of different parameters: {name} has shapes {shapes[0].get(name)} and "
                f"{shapes[1].get(name)}. Score both shards with the same model and the same `ignore`."
            )
        return replace(
            self,
            sums={name: total + other.sums[name] for name, total in self.sums.items()},
            samples=self.samples + other.samples,
            skipped=self.skipped + other.skipped,
        )

    def importance_scores(self, model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
        """The dictionary that ``torch.nn.utils.prune.global_unstructured(importance_scores=...)`` takes.

        A weight that several modules share appears once for each of them.

        Args:
            model: The scored model, or one of the same architecture (masked or not).

        Returns:
            ``(module, "weight")`` -> scores in the weight's shape, on its device.

        Raises:
            ArgumentError: The model lacks a scored parameter, or has it in another shape.

        Example:
            >>> from torch.nn.utils import prune
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
            >>> scores = weight_scores(net, torch.randn(8, 3, 2, 2))
            >>> prune.global_unstructured(
            ...     [(net[1], "weight")], prune.L1Unstructured, scores.importance_scores(net), amount=0.5
            ... )
            >>> int((net[1].weight == 0).sum())
            24
        """
        canonical = {id(slot.stored): slot.name for slot in slots(model)[::-1]}
        found: dict[tuple[nn.Module, str], Tensor] = {}
        missing = set(self.sums)
        for slot in slots(model):
            key = slot.name if slot.name in self.sums else canonical[id(slot.stored)]
            if key not in self.sums:
                continue
            tensor = slot.stored
            if self.sums[key].shape != tensor.shape:
                raise ArgumentError(
                    f"{slot.name} has shape {tuple(tensor.shape)}, but its scores {tuple(self.sums[key].shape)}: they "
                    "are of another model. Score this model."
                )
            found[slot.module, slot.kind] = self[key].to(tensor.device, wide(tensor.device))
            missing.discard(key)
        if missing:
            raise ArgumentError(
                f"The model has no parameter {min(missing)!r} (and {len(missing) - 1} more that are scored): the "
                "scores are of another model. Score this model."
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (atomically)."""
        header = {"settings": vars(self.settings), "samples": self.samples, "skipped": self.skipped}
        write_tensors(path, KIND, header, {f"sums/{name}": total for name, total in self.sums.items()})

    @staticmethod
    def load(path: str | Path) -> WeightScores:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, or does not hold scores of weights in a known format.
        """
        with tensor_file(path, KIND) as (header, tensors):
            sums = {name.removeprefix("sums/"): tensor for name, tensor in tensors.items()}
            return WeightScores(sums, header["samples"], header["skipped"], Settings(**header["settings"]))


def weight_scores(
    model: nn.Module,
    batches: object,
    relevance: Relevance = Relevance("projection"),  # noqa: B008
    *,
    ignore: Sequence[str] = (),
    parameters: Parameters = "weights",
    batch_size: int = 32,
    max_memory: int = MAX_MEMORY,
    progress: bool = False,
) -> WeightScores:
    r"""Score every single weight: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j.

    Args:
        model: Any module that maps ``[B, C, H, W]`` to logits ``[B, K]``, also one that ``torch.nn.utils.prune`` has
            masked: w is then the effective weight, and masked weights score 0. Left as it was.
        batches: Anything that yields images (`jbrprune.data.batches.iterate`). Read once, streaming.
        relevance: Objective, statistic and how samples are chosen; the site has no meaning for single weights.
            ``second_moment``: E[(w g)^2] per sample. ``batched``: E[(mean over ``batch`` samples of w g)^2], as
            in the published code. ``signed``: \|E[w g]\|, the form of SNIP. The last two need no per-sample gradient:
            they cost one backward per batch.
        ignore: Globs of modules or parameters that are left out (a module covers its submodules).
        parameters: ``weights`` of convolutions and linear layers, or ``all``: their biases, and the scales and biases
            of norms, as well.
        batch_size: Images per pass where the data do not say.
        max_memory: Bytes for per-sample gradients and copies of activations, on top of what a forward and a backward
            to the activations take, of the sums (8 bytes per weight), and of what PyTorch's own kernels take for
            one sample. It bounds memory, not the result.
        progress: Show a progress bar.

    Returns:
        `WeightScores`. Blocks are squared and summed in float32 (float64 models: float64) over a few samples, and
        added to float64 sums.

    Raises:
        ArgumentError: The statistic is of units, a glob matches nothing, or ``max_memory`` is too small for one row of
            one sample.
        DataError: No data, or no sample above the confidence threshold; no labels where the objective needs them.
        ModelError: A weight is transformed before it is used, or used in a way that is not known; samples influence
            each other, or the first dimension of an activation is not the batch.
        NonFiniteError: NaN or Inf in weights, images, logits or gradients.

    Source:
        Arpit, arXiv 2512.11089 (relevance); squares of single per-sample gradients: Dangel et al., BackPACK, ICLR 2020;
        ``signed``: Lee et al., SNIP, ICLR 2019.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> scores = weight_scores(net, torch.randn(8, 3, 2, 2))
        >>> scores["1.weight"].shape
        torch.Size([4, 12])
    """
    check_known("parameters", parameters, PARAMETERS)
    relevance.check("weights")
    if max_memory < 1:
        raise ArgumentError(f"max_memory must be a positive number of bytes, got {max_memory}.")
    check_weights(model)
    scored = _scored_slots(model, parameters, ignore)
    batch = relevance.batch if relevance.statistic == "batched" else None
    collector = Squares(model, scored, max_memory) if relevance.statistic == "second_moment" else Means(scored, batch)
    question = Question(
        OBJECTIVES[relevance.objective], relevance.confidence, relevance.autocast, Draws(relevance.seed)
    )
    parts = distributed.Parts(batches, batch_size=batch_size, block=batch)
    shown = tqdm(parts, "scoring", unit="batch", disable=not progress, leave=False)
    samples, skipped = distributed.fail_together(lambda: _collect(model, shown, collector, question))
    parts.check()
    samples, skipped = distributed.total(samples, skipped)
    check_samples(samples, skipped, relevance.confidence)
    settings = relevance.settings("weight")
    sums = distributed.all_sum(collector.finish())
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"The scores of {name} contain NaN or Inf although the logits are finite: the gradient is not. A "
                "square root of zero or an overflow in half precision does that; try float32."
            )
    return WeightScores(sums, samples, skipped, settings)


def _collect(
    model: nn.Module, numbered: Iterable[tuple[int, Batch]], collector: Squares | Means, question: Question
) -> tuple[int, int]:
    """Numbers of samples scored, and left out."""
    device = preserve.device_of(model)
    portions = Portions()
    scored = seen = 0
    for number, (start, batch) in enumerate(numbered):
        with preserve.inference_state(model, gradients=collector.gradients), fresh(model):
            batch = batch.to(device).map(own)
            if number == 0:
                collector.check(batch.images)

            def one(part: Batch, before: int, number: int = number, start: int = start) -> int:
                return _added(model, part, number, start + before, collector, question)

            scored += sum(portions.run(batch, one, collector.mark))
        seen += len(batch)
    return scored, seen - scored


def _added(
    model: nn.Module, batch: Batch, number: int, start: int, collector: Squares | Means, question: Question
) -> int:
    """Add a batch to the sums; the number of samples that were."""
    amp = torch.autocast(batch.images.device.type, question.autocast, enabled=question.autocast is not None)
    with torch.enable_grad(), collector.recording(len(batch)), amp:
        logits = logits_of(model(batch.images.clone()))  # a clone, for a model that changes its input in place
    check_logits(model, batch, number, logits, question.autocast)
    losses, _ = losses_of(batch, logits, question, start)
    if len(losses):
        collector.backward(losses)
    return len(losses)


def _scored_slots(model: nn.Module, parameters: Parameters, ignore: Sequence[str]) -> list[Slot]:
    left_out = ignored(model, ignore)
    found: dict[int, Slot] = {}
    for name, module in model.named_modules():
        for kind in _kinds(module, parameters):
            slot = Slot(f"{name}.{kind}".removeprefix("."), module, kind)
            if {name, slot.name} & left_out or getattr(module, kind, None) is None:
                continue
            if module._parameters.get(kind) is None and not slot.masked:
                raise ModelError(
                    f"{slot.name} ({type(module).__name__}) is not a plain parameter (a parametrization or a weight "
                    "norm computes it), so a single weight has no meaning there. Remove the parametrization, or put it "
                    "into `ignore`."
                )
            found.setdefault(id(slot.stored), slot)
    if not found:
        raise ModelError("The model has no convolution or linear layer left to score. Is everything in `ignore`?")
    return list(found.values())


def _kinds(module: nn.Module, parameters: Parameters) -> tuple[str, ...]:
    if is_weight_layer(module):
        return ("weight",) if parameters == "weights" else ("weight", "bias")
    return ("weight", "bias") if parameters == "all" and layers.channel_dim(module) is not None else ()
