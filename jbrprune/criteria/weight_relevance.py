r"""Relevance of single weights: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j.

g is the gradient of sum_k m_k(x) f_k(x), sample by sample: `torch.func.vmap` of `torch.func.grad`, some samples at a
time. Where a model cannot be mapped so (in-place operations, branches on values), one backward after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from jbrprune.criteria.gates import differentiate
from jbrprune.criteria.objectives import Directions
from jbrprune.criteria.relevance import Relevance, check_finite, count_samples, share_pass
from jbrprune.criteria.scores import Accumulator, Settings, SummedScores
from jbrprune.data import distributed
from jbrprune.errors import ArgumentError, ModelError, check_known
from jbrprune.evaluation.agreement import check_rows, check_weights, explain_out_of_memory
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model
from jbrprune.sparsity.masks import find_ignored, fresh, make_permanent, refuse_computed_weights, slots, weights_of
from jbrprune.structure.verification import check_samples_apart

log = logging.getLogger(__name__)

Parameters = Literal["weights", "all"]
CHUNK_NUMBERS = 1 << 25
"""Gradients of so many samples are formed at once that they are no more numbers than this, but of one at least."""


@dataclass(frozen=True, eq=False)
class WeightScores(SummedScores):
    """s_j = E_x[(w_j g_j(x))^2] for every scored weight, or its batched or signed form.

    Attributes:
        sums: Parameter name (``layer1.0.conv1.weight``, also where the module is masked) -> float64 of the
            parameter's shape, on the CPU: the sum over samples of (w g)^2; for ``signed`` of w g.
        samples: Samples in the sums.
        skipped: Samples that were left out because the dense model was not confident enough.
        settings: Objective and statistic; the site is ``weight``.
    """

    KIND = "weights"
    sums: Mapping[str, Tensor]
    samples: int
    skipped: int
    settings: Settings

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
        shapes = {slot.name: tuple(slot.stored.shape) for slot in slots(model)}
        for name, total in self.sums.items():
            if shapes.get(name) != tuple(total.shape):
                raise ArgumentError(
                    f"{name} has shape {shapes.get(name)} in the model, but {tuple(total.shape)} in the scores, which "
                    "are of another model. Score this model."
                )
        names = {id(slot.stored): slot.name for slot in slots(model) if slot.name in self.sums}
        return {
            (slot.module, slot.kind): self[names[id(slot.stored)]].to(slot.stored.device, _wide(slot.stored.device))
            for slot in slots(model)
            if id(slot.stored) in names
        }


@torch.inference_mode(False)  # sums that are made in inference mode could not be added to
def weight_scores(
    model: nn.Module,
    batches: object,
    relevance: Relevance = Relevance("projection"),  # noqa: B008
    *,
    ignore: Sequence[str] = (),
    parameters: Parameters = "weights",
    batch_size: int = 32,
    progress: bool = False,
) -> WeightScores:
    r"""Score every single weight: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j.

    Args:
        model: Any module that maps ``[B, C, H, W]`` to what the output of ``relevance`` reads, also one that
            ``torch.nn.utils.prune`` has masked: w is then the effective weight, and masked weights score 0. Left as it
            was.
        batches: Anything that yields images (`jbrprune.data.batches.iterate`). Read once, streaming.
        relevance: Objective, statistic and how samples are chosen; the site has no meaning for single weights.
            ``second_moment``: E[(w g)^2] per sample. ``batched``: E[(mean over ``batch`` samples of w g)^2], as
            in the published code. ``signed``: \|E[w g]\|, the form of SNIP. The last two need no gradient of a single
            sample: they cost one backward per batch.
        ignore: Globs of modules or parameters that are left out (a module covers its submodules).
        parameters: ``weights`` of convolutions, linear layers and `nn.MultiheadAttention`, or ``all``: their biases,
            and the scales and biases of norms, as well.
        batch_size: Images per pass where the data do not say.
        progress: Show a progress bar.

    Returns:
        `WeightScores`; sums over samples are float64.

    Raises:
        ArgumentError: The statistic is of units, or a glob matches nothing.
        DataError: No data, or no sample above the threshold; no labels where the objective needs them.
        ModelError: A weight is computed from others, or samples influence each other.
        NonFiniteError: NaN or Inf in weights, images, logits or gradients.

    Source:
        Arpit, arXiv 2512.11089 (relevance); ``signed``: Lee et al., SNIP, ICLR 2019.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> scores = weight_scores(net, torch.randn(8, 3, 2, 2))
        >>> scores["1.weight"].shape
        torch.Size([4, 12])
    """
    check_known("parameters", parameters, get_args(Parameters))
    relevance.check("weights")
    check_weights(model)
    with preserve.inference_state(model), fresh(model):
        masked = any(slot.masked for slot in slots(model))
        work = make_permanent(copy_model(model)) if masked else model
    weights = _scored_weights(work, parameters, ignore)
    directions = Directions(relevance.objective, relevance.threshold, relevance.seed, relevance.output)
    squared, kept = relevance.statistic == "second_moment", []
    wide = _wide(preserve.device_of(work))
    accumulator = Accumulator({name: weight.to(wide) for name, weight in weights.items()}, relevance.block)

    def logits_with(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, relevance.autocast, enabled=relevance.autocast is not None):
            return relevance.output(functional_call(work, dict(weights), (images.clone(),)))  # which may be overwritten

    with share_pass(batches, relevance, batch_size, progress) as numbered:
        for number, (start, batch) in enumerate(numbered):
            with preserve.inference_state(work), explain_out_of_memory(len(batch)):
                batch = batch.to(preserve.device_of(work))
                if number == 0 and squared:
                    check_samples_apart(work, batch.images, ())
                logits = logits_with({}, batch.images)
                check_rows(logits, work, batch.images, number, relevance.autocast)
                m, stays = directions(logits, batch, start)
                x, m = batch.images[stays], m[stays]

                def contribute(some: slice, x: Tensor = x, m: Tensor = m) -> Iterator[dict[str, Tensor]]:
                    for found, _ in sample_gradients(logits_with, weights, x[some], m[some], summed=not squared):
                        yield {name: (g.square() if squared else g).sum(0, dtype=wide) for name, g in found.items()}

                accumulator.add(len(x), contribute)
            kept.append(stays)
    samples, skipped = count_samples(kept, relevance.threshold)
    power = 1 if relevance.statistic == "signed" else 2
    sums = {name: (total * weights[name].to(total) ** power).cpu() for name, total in accumulator.finish().items()}
    totals = distributed.all_sum(sums)
    check_finite(totals, "The scores of")
    return WeightScores(totals, samples, skipped, relevance.settings("weight"))


def sample_gradients(
    outputs_of: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    images: Tensor,
    m: Tensor,
    *,
    summed: bool = False,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield gradients by the weights of sum_k m_k f_k for every sample, some samples at a time, and the outputs f.

    By ``vmap(grad)`` of as many samples as `CHUNK_NUMBERS` allow; one backward after the other where that is one, or
    where vmap does not take the model.

    Args:
        outputs_of: Weights and images ``[n, C, H, W]`` -> outputs ``[n, K]``.
        weights: Name -> parameter by which the outputs are differentiated.
        images: ``[B, C, H, W]``.
        m: ``[B, K]`` directions.
        summed: Yield once, for all samples together, the gradient of their sum, from one backward.

    Yields:
        Name -> ``[n, *shape]`` gradients (``summed``: ``[1, *shape]``), and ``[n, K]`` outputs.

    Raises:
        ModelError: No weight takes part in the outputs.
    """

    def product(weights: Mapping[str, Tensor], x: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = outputs_of(weights, x)
        return (outputs * of_x).sum(), outputs.detach()

    def together() -> tuple[dict[str, Tensor], Tensor]:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            total, outputs = product(leaves, x, of_x)
        if not total.requires_grad:
            raise ModelError("No weight takes part in the outputs: there is nothing to differentiate.")
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {name: g[None] for name, g in zip(leaves, found, strict=True)}, outputs

    size = max(1, CHUNK_NUMBERS // sum(weight.numel() for weight in weights.values()))
    start, copying = 0, False
    while start < len(images):
        stop = len(images) if summed else start + size
        x, of_x = images[start:stop], m[start:stop]
        if summed or size == 1:
            found, copying = differentiate(together, copying)
        else:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be mapped
                    mapped = vmap(grad(product, has_aux=True), in_dims=(None, 0, 0))
                    gradients, outputs = mapped(dict(weights), x[:, None], of_x[:, None])
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = str(error).partition("\n")[0]
                log.info("Samples are differentiated one by one: torch.func.vmap does not take the model (%s).", why)
                size = 1
                continue
            found = gradients, outputs[:, 0]
        yield found
        start = stop


def _scored_weights(model: nn.Module, parameters: Parameters, ignore: Sequence[str]) -> dict[str, Tensor]:
    refuse_computed_weights(model, ignore)
    found = list(weights_of(model, ignore).values())
    if parameters == "all":
        left_out = find_ignored(model, ignore)
        attention = nn.MultiheadAttention
        known = (s for s in slots(model) if layers.channel_dim(s.module) is not None or isinstance(s.module, attention))
        found = [slot for slot in known if not {slot.name, slot.name.rpartition(".")[0]} & left_out]
    if not found:
        raise ModelError("The model has no convolution or linear layer left to score. Is everything in `ignore`?")
    first = {id(slot.stored): slot.name for slot in found[::-1]}  # of a shared parameter
    return {slot.name: slot.stored.detach() for slot in found if first[id(slot.stored)] == slot.name}


def _wide(device: torch.device) -> torch.dtype:
    """The widest dtype for sums that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
