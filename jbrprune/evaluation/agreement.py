"""What a model does and costs: its logits, its agreement with a reference, its latency and its size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, ModelError, NonFiniteError
from jbrprune.evaluation.portions import Portions
from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of


@dataclass(frozen=True)
class Agreement:
    """How far a model decides as its reference does.

    Attributes:
        images: Number of samples N.
        top1: Share of samples whose argmax equals the reference's argmax.
        top5: Share of samples whose reference argmax is among the ``min(5, K)`` largest logits.
        kl: Mean of ``KL(softmax(reference) || softmax(logits))``, in nats.
        accuracy: Share of samples whose argmax equals the label; None without labels.
        dense_accuracy: The same of the reference; None without labels.
    """

    images: int
    top1: float
    top5: float
    kl: float
    accuracy: float | None = None
    dense_accuracy: float | None = None

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of `top1` (Wilson, JASA 1927): what N samples can resolve."""
        from scipy.stats import binomtest  # takes longer to import than the rest of the module

        interval = binomtest(round(self.top1 * self.images), self.images).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def compute_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Logits of every batch, in eval mode, without gradients, on the device of the model.

    The model is left as it was, also after an exception.

    Args:
        model: The model.
        batches: Images ``[B, C, H, W]`` in the dtype that the model takes.
        autocast_dtype: Run under ``torch.autocast`` in this dtype; None: as the model is.
        progress: Show a progress bar.

    Returns:
        One ``[B, K]`` per batch on the CPU, float32 (float64 stays float64).

    Raises:
        ModelError: The output is not one row of logits per image.
        NonFiniteError: NaN or Inf in the logits; names the batch, and the weight or module they come from.
    """
    portions = Portions()

    def own_part() -> tuple[list[int], dict[int, Tensor]]:
        sizes: list[int] = []
        found: dict[int, Tensor] = {}
        with preserve.inference_state(model), _autocast(preserve.device_of(model), autocast_dtype):
            for number, batch in enumerate(
                tqdm(batches, desc="logits", unit="batch", leave=False, disable=None if progress else True)
            ):
                sizes.append(len(batch))
                if number % distributed.size() == distributed.rank():
                    parts = portions.run(
                        batch, lambda part, _, number=number: _logits(model, part, number, autocast_dtype)
                    )
                    found[number] = torch.cat(parts)
        return sizes, found

    sizes, found = distributed.together(own_part)
    return _of_all_ranks(sizes, found)


def _logits(model: nn.Module, batch: Batch, number: int, autocast_dtype: torch.dtype | None) -> Tensor:
    images = batch.images.to(preserve.device_of(model), non_blocking=True)
    out = logits_of(model(images))
    if len(out) != len(images):
        raise ModelError(f"Batch {number}: {len(images)} images went in, {len(out)} rows of logits came out.")
    if not _finite(out):
        raise_nonfinite(model, images, f"Batch {number}: the logits", autocast_dtype=autocast_dtype)
    return out.to("cpu", torch.promote_types(out.dtype, torch.float32))


def _of_all_ranks(sizes: Sequence[int], found: Mapping[int, Tensor]) -> list[Tensor]:
    """The logits of every batch: each rank puts its own into zeros, and the sum is the whole."""
    if distributed.size() == 1:
        return list(found.values())
    whole = {}
    for number, own in found.items():
        whole.setdefault("logits", own.new_zeros(sum(sizes), own.shape[1]))
        start = sum(sizes[:number])
        whole["logits"][start : start + len(own)] = own
    summed = distributed.all_sum(whole)
    return list(summed["logits"].split(list(sizes))) if summed else []


def agreement(logits: Tensor, reference: Tensor, labels: Tensor | None = None) -> Agreement:
    """Compare logits with those of a reference on the same images.

    Among equal logits the lower class index ranks first, as in `torch.argmax`.

    Args:
        logits: ``[N, K]`` of the model.
        reference: ``[N, K]`` of the dense model.
        labels: ``[N]`` class indices.

    Returns:
        Shares in [0, 1] and the mean divergence in nats, accumulated in float64.

    Raises:
        DataError: No samples, shapes that do not fit, a label outside of ``[0, K)``.
        NonFiniteError: NaN or Inf in either logits.

    Example:
        >>> agreement(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).top1
        0.5
    """
    _check_pair(logits, reference, labels)
    expected = reference.argmax(1)
    ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
    log_q, log_p = (F.log_softmax(values.double(), dim=1) for values in (logits, reference))
    return Agreement(
        images=len(logits),
        top1=_share(ranked[:, 0] == expected),
        top5=_share((ranked == expected[:, None]).any(1)),
        # rounding can leave the mean of equal distributions an ulp below zero
        kl=max(0.0, float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))),
        accuracy=None if labels is None else _share(ranked[:, 0] == labels.to(ranked.device)),
        dense_accuracy=None if labels is None else _share(expected == labels.to(expected.device)),
    )


def combine(parts: Sequence[Agreement]) -> Agreement:
    """The agreement on all images together, of agreements on parts of them; accuracies only where every part has them.

    Args:
        parts: At least one.

    Example:
        >>> combine([Agreement(1, 1.0, 1.0, 0.0), Agreement(3, 0.0, 1.0, 0.4)]).top1
        0.25
    """
    images = sum(part.images for part in parts)

    def mean(name: str, *, of_counts: bool = True) -> float | None:
        values = [getattr(part, name) for part in parts]
        if None in values:
            return None
        sums = [value * part.images for value, part in zip(values, parts)]
        return sum(round(value) for value in sums) / images if of_counts else math.fsum(sums) / images

    shares = {name: mean(name) for name in ("top1", "top5", "accuracy", "dense_accuracy")}
    return Agreement(images=images, kl=mean("kl", of_counts=False), **shares)  # type: ignore[arg-type]


def agreement_on(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Agreement:
    """`compute_logits`, then `agreement` with the references (and labels, if every batch has them) of the batches.

    Raises:
        DataError: A batch without reference, or no batch.
    """
    batches = list(batches)
    if not batches or any(batch.reference is None for batch in batches):
        raise DataError(
            f"Agreement needs the dense model's logits: {sum(b.reference is None for b in batches)} of {len(batches)} "
            "batches have no reference. Attach it with jbrprune.data.batches.attach_reference."
        )
    logits = compute_logits(model, batches, autocast_dtype=autocast_dtype, progress=progress)
    reference = torch.cat([batch.reference for batch in batches if batch.reference is not None])
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return agreement(torch.cat(logits), reference.cpu(), torch.cat(labels) if len(labels) == len(batches) else None)


@dataclass(frozen=True)
class Drop:
    """A measured loss.

    Attributes:
        of: ``accuracy`` where there are labels, else ``agreement`` with the dense model.
        images: Number of samples N.
        lost: Share of samples, the fall of the accuracy or of the agreement; an accuracy may rise.
        low: Lower end of its 95 % interval.
        high: Upper end.
        models: Measured on the same images, to choose this one of them: the interval is that of Bonferroni, so that
            those of all of them together are right with 95 %.
    """

    of: str
    images: int
    lost: float
    low: float
    high: float
    models: int = 1

    def within(self, allowed: float) -> bool:
        """Whether no more than the allowed share is lost, as counts: 0.01 of 100 images is one image."""
        return round(self.lost * self.images) <= math.floor(allowed * self.images + 1e-9)


def measure_drop(logits: Tensor, reference: Tensor, labels: Tensor | None = None, *, models: int = 1) -> Drop:
    r"""The fall of accuracy, or of agreement without labels, from the dense model to a pruned one.

    With labels, (n10 - n01) / N, where n10 samples only the dense model gets right and n01 only the pruned one; the
    interval is the adjusted one for paired shares (half a sample added to each of the four cells). Without,
    1 - top-1 agreement with Wilson's interval.

    Args:
        logits: ``[N, K]`` of the pruned model.
        reference: ``[N, K]`` of the dense model on the same samples.
        labels: ``[N]`` class indices, or None.
        models: See `Drop`.

    Raises:
        DataError: No samples, or shapes or labels that do not fit.
        NonFiniteError: NaN or Inf.

    Example:
        >>> measure_drop(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).lost
        0.5

    Source:
        Agresti and Min, Statistics in Medicine 24 (2005), 729-740; Wilson, JASA 22 (1927).
    """
    from scipy.stats import binomtest

    found = agreement(logits, reference, labels)
    level = 1 - 0.05 / models
    if labels is None:
        kept = binomtest(round(found.top1 * found.images), found.images).proportion_ci(level, method="wilson")
        return Drop("agreement", found.images, 1 - found.top1, 1 - float(kept.high), 1 - float(kept.low), models)
    dense, pruned = (values.argmax(1) == labels.to(values.device) for values in (reference, logits))
    lost, won, n = int((dense & ~pruned).sum()), int((~dense & pruned).sum()), found.images
    return Drop("accuracy", n, (lost - won) / n, *paired_interval(lost, won, n, level), models)


def paired_interval(one: int, other: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two shares of the same n samples.

    Args:
        one: Samples that count for the first share alone.
        other: Samples that count for the second alone.
        n: All samples.
        level: Confidence.

    Source:
        Agresti and Min, Statistics in Medicine 24 (2005), 729-740.
    """
    from scipy.stats import norm

    difference = (one - other) / (n + 2)
    width = float(norm.ppf((1 + level) / 2)) * math.sqrt((one + other + 1) / (n + 2) - difference**2) / math.sqrt(n + 2)
    return difference - width, difference + width


def parameters_of(model: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory; shared ones count once."""
    return sum(tensor.numel() * tensor.element_size() for source in _tensors(model) for tensor in source.values())


def check_weights(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in its weights.

    -Inf in a buffer is let through: that is how attention masks are stored.

    Raises:
        NonFiniteError: Names the first such parameter or buffer.
    """
    parameters, buffers = _tensors(model)
    bad = next((f"Parameter {name!r}" for name, tensor in parameters.items() if not _finite(tensor)), None) or next(
        (f"Buffer {name!r}" for name, tensor in buffers.items() if not _finite(tensor, masks=True)), None
    )
    if bad is not None:
        raise NonFiniteError(f"{bad} contains NaN or Inf. Load the weights again, or train from a checkpoint before.")


def first_nonfinite(model: nn.Module, images: Tensor, *, autocast_dtype: torch.dtype | None = None) -> str | None:
    """Qualified name of the first module, in order of execution, whose output is not finite.

    A module is done when its children are: a parent is named only if it made NaN or Inf itself.

    Args:
        model: The model.
        images: ``[B, C, H, W]`` on the device of the model.
        autocast_dtype: As in `compute_logits`.

    Returns:
        The name (``""`` is the model itself), or None if every output is finite.
    """
    found: list[str] = []

    def watch(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            if not found and not all(_finite(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
                found.append(name)

        return hook

    hooks = {name: watch(name) for name, _ in model.named_modules()}
    with (
        preserve.inference_state(model),
        preserve.hooked(model, hooks),
        _autocast(preserve.device_of(model), autocast_dtype),
    ):
        model(images)
    return found[0] if found else None


def raise_nonfinite(
    model: nn.Module, images: Tensor, what: str, *, autocast_dtype: torch.dtype | None = None
) -> NoReturn:
    """Say where NaN or Inf come from: the images, a weight, or the first module that makes them.

    Args:
        model: The model.
        images: ``[B, C, H, W]`` on the device of the model, the batch that failed.
        what: Subject of the message, such as ``Batch 3: the logits``.
        autocast_dtype: As in `compute_logits`.

    Raises:
        NonFiniteError: Always.
    """
    if not _finite(images):
        raise NonFiniteError(f"{what} contain NaN or Inf, and so do the images. Check the transform that made them.")
    check_weights(model)
    name = first_nonfinite(model, images, autocast_dtype=autocast_dtype)
    if name is None:
        raise NonFiniteError(f"{what} contain NaN or Inf, though every module's output was finite on a second pass.")
    where = f"module {name!r}" if name else "the model itself"
    raise NonFiniteError(
        f"{what} contain NaN or Inf. Images and weights are finite; the first output that is not is that of "
        f"{where} ({type(model.get_submodule(name)).__name__}). If it is half precision that overflows, use bfloat16 "
        "or float32."
    )


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _finite(tensor: Tensor, *, masks: bool = False) -> bool:
    """No NaN or Inf; with ``masks``, -Inf is allowed."""
    finite = torch.isfinite(tensor)
    return bool((finite | torch.isneginf(tensor) if masks and tensor.is_floating_point() else finite).all())


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and buffers, by qualified name."""
    return dict(model.named_parameters()), dict(model.named_buffers())


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)


def _check_pair(logits: Tensor, reference: Tensor, labels: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape != reference.shape or logits.numel() == 0:
        raise DataError(
            f"Logits and reference must both be [N, K] of the same images, with N and K at least 1; got "
            f"{list(logits.shape)} and {list(reference.shape)}."
        )
    for name, values in (("logits", logits), ("reference", reference)):
        if not _finite(values):
            raise NonFiniteError(f"The {name} contain NaN or Inf in {int((~values.isfinite()).any(1).sum())} samples.")
    if labels is None:
        return
    if labels.shape != logits.shape[:1]:
        raise DataError(f"Labels must be [{len(logits)}] class indices, got shape {list(labels.shape)}.")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise DataError(
            f"Labels must lie in [0, {logits.shape[1]}), the classes of the model; got {int(labels.min())} to "
            f"{int(labels.max())}. Map the labels of the data to the model's classes, or leave them out."
        )
