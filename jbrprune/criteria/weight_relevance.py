r"""Relevance of single weights: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j.

g is the gradient of sum_k m_k(x) f_k(x), sample by sample: `torch.func.vmap` of `torch.func.grad`, some samples at a
time. Where a model cannot be mapped so (in-place operations, branches on values), one backward after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from jbrprune.criteria.gates import differentiate
from jbrprune.criteria.objectives import OBJECTIVES, Directions
from jbrprune.criteria.relevance import Relevance, check_logits, run_pass
from jbrprune.criteria.scores import Accumulator, Settings, SummedScores
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError, check_known
from jbrprune.evaluation.agreement import check_weights, explain_out_of_memory
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.sparsity.masks import Slot, fresh, ignored, is_weight_layer, make_permanent, slots
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
            found[slot.module, slot.kind] = self[key].to(tensor.device, _wide(tensor.device))
            missing.discard(key)
        if missing:
            raise ArgumentError(
                f"The model has no parameter {min(missing)!r} (and {len(missing) - 1} more that are scored): the "
                "scores are of another model. Score this model."
            )
        return found


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
        model: Any module that maps ``[B, C, H, W]`` to logits ``[B, K]``, also one that ``torch.nn.utils.prune`` has
            masked: w is then the effective weight, and masked weights score 0. Left as it was.
        batches: Anything that yields images (`jbrprune.data.batches.iterate`). Read once, streaming.
        relevance: Objective, statistic and how samples are chosen; the site has no meaning for single weights.
            ``second_moment``: E[(w g)^2] per sample. ``batched``: E[(mean over ``batch`` samples of w g)^2], as
            in the published code. ``signed``: \|E[w g]\|, the form of SNIP. The last two need no gradient of a single
            sample: they cost one backward per batch.
        ignore: Globs of modules or parameters that are left out (a module covers its submodules).
        parameters: ``weights`` of convolutions and linear layers, or ``all``: their biases, and the scales and biases
            of norms, as well.
        batch_size: Images per pass where the data do not say.
        progress: Show a progress bar.

    Returns:
        `WeightScores`; sums over samples are float64.

    Raises:
        ArgumentError: The statistic is of units, or a glob matches nothing.
        DataError: No data, or no sample above the confidence threshold; no labels where the objective needs them.
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
    weights = {slot.name: slot.stored.detach() for slot in scored_slots(work, parameters, ignore)}
    directions = Directions(OBJECTIVES[relevance.objective], relevance.confidence, relevance.seed)
    squared = relevance.statistic == "second_moment"
    gradients = _Gradients(work, weights, relevance.autocast, squared)
    accumulator = Accumulator({name: w.to(_wide(w.device)) for name, w in weights.items()}, relevance.block)

    def visit(numbered: Iterable[tuple[int, Batch]]) -> Iterator[Tensor]:
        for number, (start, batch) in enumerate(numbered):
            with preserve.inference_state(work), explain_out_of_memory(len(batch)):
                batch = batch.to(preserve.device_of(work))
                if number == 0 and squared:
                    check_samples_apart(work, batch.images, ())
                logits = gradients.logits({}, batch.images)
                check_logits(work, batch, number, logits, relevance.autocast)
                m, stays = directions(logits, batch, start)
                x, of_x = batch.images[stays], m[stays]
                accumulator.add(len(x), lambda some, x=x, of_x=of_x: gradients(x[some], of_x[some]))
            yield stays

    samples, skipped = run_pass(batches, relevance, visit, batch_size=batch_size, progress=progress)
    power = 1 if relevance.statistic == "signed" else 2
    sums = {name: (total * weights[name].to(total) ** power).cpu() for name, total in accumulator.finish().items()}
    totals = distributed.all_sum(sums)
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"The scores of {name} contain NaN or Inf although the logits are finite: the gradient is not. A "
                "square root of zero or an overflow in half precision does that; try float32."
            )
    return WeightScores(totals, samples, skipped, relevance.settings("weight"))


def sample_gradients(
    outputs_of: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    images: Tensor,
    m: Tensor,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield gradients by the weights of sum_k m_k f_k for every sample, some samples at a time, and the outputs f.

    By ``vmap(grad)`` of as many samples as `CHUNK_NUMBERS` allow; one backward after the other where that is one, or
    where vmap does not take the model.

    Args:
        outputs_of: Weights and images ``[n, C, H, W]`` -> outputs ``[n, K]``.
        weights: Name -> parameter by which the outputs are differentiated.
        images: ``[B, C, H, W]``.
        m: ``[B, K]`` directions.

    Yields:
        Name -> ``[n, *shape]`` gradients, and ``[n, K]`` outputs.
    """

    def scalar(weights: Mapping[str, Tensor], image: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        outputs = outputs_of(weights, image[None])[0]
        return (outputs * m).sum(), outputs.detach()

    def one() -> tuple[dict[str, Tensor], Tensor]:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            value, outputs = scalar(leaves, x[0], of_x[0])
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {name: g[None] for name, g in zip(leaves, found, strict=True)}, outputs[None]

    size = max(1, CHUNK_NUMBERS // sum(weight.numel() for weight in weights.values()))
    start, copying = 0, False
    while start < len(images):
        x, of_x = images[start : start + size], m[start : start + size]
        if size > 1:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be mapped
                    found = vmap(grad(scalar, has_aux=True), in_dims=(None, 0, 0))(weights, x, of_x)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.debug(
                    "Samples are differentiated one by one: torch.func.vmap does not take this model (%s).", error
                )
                size = 1
                continue
        else:
            found, copying = differentiate(one, copying)
        yield found
        start += len(x)


class _Gradients:
    """Gradients by single weights, summed over samples, or squared and then summed."""

    def __init__(
        self, model: nn.Module, weights: dict[str, Tensor], autocast: torch.dtype | None, squared: bool
    ) -> None:
        self.model, self.weights, self.autocast = model, weights, autocast
        self.squared, self.copying = squared, False

    def __call__(self, images: Tensor, m: Tensor) -> dict[str, Tensor]:
        """Name -> sum over samples of the gradient of sum_k m_k f_k, or of its square."""
        return self._squares(images, m) if self.squared else self._gradient(images, m)

    def logits(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """``[n, K]`` with other weights."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return logits_of(functional_call(self.model, dict(weights), (images.clone(),)))

    def _squares(self, images: Tensor, m: Tensor) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for found, _ in sample_gradients(self.logits, self.weights, images, m):
            for name, g in found.items():
                total[name] = total.get(name, 0) + g.square().sum(0, dtype=_wide(images.device))
        return total

    def _gradient(self, images: Tensor, m: Tensor) -> dict[str, Tensor]:
        """Parameters that take no part are absent."""

        def run() -> tuple[Tensor | None, ...]:
            leaves = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
            with torch.enable_grad():
                total = (self.logits(leaves, images) * m).sum()
            return torch.autograd.grad(total, list(leaves.values()), allow_unused=True)

        found, self.copying = differentiate(run, self.copying)
        return {name: g for name, g in zip(self.weights, found, strict=True) if g is not None}


def scored_slots(model: nn.Module, parameters: Parameters, ignore: Sequence[str]) -> list[Slot]:
    """The parameters that have scores, a shared one once.

    Raises:
        ArgumentError: A glob in ``ignore`` matches nothing.
        ModelError: A parametrization computes a weight, or none is left.
    """
    left_out = ignored(model, ignore)
    found: dict[int, Slot] = {}
    for name, module in model.named_modules():
        kinds: tuple[str, ...] = ("weight",) if is_weight_layer(module) else ()
        if parameters == "all" and layers.channel_dim(module) is not None:
            kinds = ("weight", "bias")
        for kind in kinds:
            slot = Slot(f"{name}.{kind}".removeprefix("."), module, kind)
            if {name, slot.name} & left_out or getattr(module, kind, None) is None:
                continue
            if module._parameters.get(kind) is None:
                raise ModelError(
                    f"{slot.name} ({type(module).__name__}) is not a plain parameter (a parametrization or a weight "
                    "norm computes it), so a single weight has no meaning there. Remove the parametrization, or put it "
                    "into `ignore`."
                )
            found.setdefault(id(slot.stored), slot)
    if not found:
        raise ModelError("The model has no convolution or linear layer left to score. Is everything in `ignore`?")
    return list(found.values())


def _wide(device: torch.device) -> torch.dtype:
    """The widest dtype for sums that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
