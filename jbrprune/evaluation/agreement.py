"""What a model computes: its logits, how far they agree with a reference, and where NaN or Inf come from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, MemoryLimitError, ModelError, NonFiniteError
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
        return wilson_interval(self.top1, self.images)


@dataclass(frozen=True)
class Drop:
    """A measured loss of accuracy or agreement.

    Attributes:
        of: ``accuracy`` where there are labels, else ``agreement`` with the dense model.
        images: Number of samples N.
        lost: Share of samples, the fall of the accuracy or of the agreement; an accuracy may rise.
        low: Lower end of its 95 % interval.
        high: Upper end.
        models: Number of models measured on the same images, of which this one was chosen: the interval is that of
            Bonferroni, so that with 95 % the intervals of all of them together are right.
        upper: Upper bound at the confidence that was asked for, one-sided; at 0.5 what was lost itself.
    """

    of: str
    images: int
    lost: float
    low: float
    high: float
    models: int = 1
    upper: float = 1.0

    def within(self, allowed: float) -> bool:
        """Whether no more than the allowed share is lost, at the confidence that was asked for."""
        return self.upper <= allowed + 1e-12


def compute_logits(model: nn.Module, batches: Iterable[Batch], *, progress: bool = False) -> list[Tensor]:
    """Logits of every batch, in eval mode, without gradients, on the device of the model.

    Each of several ranks computes its share of the batches; every rank gets the logits of all.

    Args:
        model: The model; left as it was, also after an exception.
        batches: Images ``[B, C, H, W]`` in the dtype that the model takes.
        progress: Show a progress bar.

    Returns:
        One ``[B, K]`` per batch on the CPU, float32 (float64 stays float64).

    Raises:
        MemoryLimitError: A batch does not fit into memory.
        ModelError: The output is not one row of logits per image.
        NonFiniteError: NaN or Inf in the logits; names the batch, and the weight or module they come from.
    """
    own = {}
    bar = tqdm(batches, desc="logits", unit="batch", leave=False, disable=None if progress else True)
    with distributed.fail_together(), preserve.inference_state(model):
        for number, batch in enumerate(bar):
            if number % distributed.size() != distributed.rank():
                continue
            images = batch.images.to(preserve.device_of(model), non_blocking=True)
            with explain_out_of_memory(len(images)):
                out = logits_of(model(images))
            if len(out) != len(images):
                raise ModelError(f"Batch {number}: {len(images)} images gave {len(out)} rows of logits.")
            if not _finite(out):
                raise_nonfinite(model, images, f"Batch {number}: the logits")
            own[number] = out.to("cpu", torch.promote_types(out.dtype, torch.float32))
    found = {number: logits for share in distributed.gather(own) for number, logits in share.items()}
    return [found[number] for number in range(len(found))]


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
    if logits.dim() != 2 or logits.shape != reference.shape or logits.numel() == 0:
        raise DataError(
            f"Logits and reference must both be [N, K] of the same images, with N and K at least 1; got "
            f"{list(logits.shape)} and {list(reference.shape)}."
        )
    for name, values in (("logits", logits), ("reference", reference)):
        if not _finite(values):
            raise NonFiniteError(f"The {name} contain NaN or Inf in {int((~values.isfinite()).any(1).sum())} samples.")
    if labels is not None and labels.shape != logits.shape[:1]:
        raise DataError(f"Labels must be [{len(logits)}] class indices, got shape {list(labels.shape)}.")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise DataError(
            f"Labels must lie in [0, {logits.shape[1]}), the classes of the model; got {int(labels.min())} to "
            f"{int(labels.max())}. Map the labels of the data to the model's classes, or leave them out."
        )

    def share(hits: Tensor) -> float:
        return int(hits.sum()) / len(hits)

    expected = reference.argmax(1)
    ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
    log_q, log_p = (F.log_softmax(values.double(), dim=1) for values in (logits, reference))
    return Agreement(
        images=len(logits),
        top1=share(ranked[:, 0] == expected),
        top5=share((ranked == expected[:, None]).any(1)),
        # rounding can leave the mean of equal distributions an ulp below zero
        kl=max(0.0, float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))),
        accuracy=None if labels is None else share(ranked[:, 0] == labels.to(ranked.device)),
        dense_accuracy=None if labels is None else share(expected == labels.to(expected.device)),
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
    shares = {}
    for name in ("top1", "top5", "accuracy", "dense_accuracy"):
        values = [getattr(part, name) for part in parts]
        counts = [round(value * part.images) for value, part in zip(values, parts) if value is not None]
        shares[name] = sum(counts) / images if len(counts) == len(parts) else None
    return Agreement(images=images, kl=math.fsum(part.kl * part.images for part in parts) / images, **shares)  # type: ignore[arg-type]


def agreement_on(model: nn.Module, batches: Iterable[Batch]) -> Agreement:
    """`compute_logits`, then `agreement` with the references (and labels, if every batch has them) of the batches.

    Raises:
        DataError: A batch without reference, or no batch.
    """
    batches = list(batches)
    references = [batch.reference for batch in batches if batch.reference is not None]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    if not batches or len(references) < len(batches):
        raise DataError(
            f"Agreement needs the dense model's logits: {len(batches) - len(references)} of {len(batches)} batches "
            "have no reference. Attach it with jbrprune.data.batches.attach_reference."
        )
    logits = torch.cat(compute_logits(model, batches))
    return agreement(logits, torch.cat(references).cpu(), torch.cat(labels) if len(labels) == len(batches) else None)


def measure_drop(
    logits: Tensor, reference: Tensor, labels: Tensor | None = None, *, models: int = 1, confidence: float = 0.5
) -> Drop:
    r"""The fall of accuracy, or of agreement without labels, from the dense model to a pruned one.

    With labels, (n10 - n01) / N, where n10 samples only the dense model gets right and n01 only the pruned one, with
    `paired_interval`. Without, 1 - top-1 agreement with `wilson_interval`; the upper bound is exact (Clopper and
    Pearson, Biometrika 26, 1934).

    Args:
        logits: ``[N, K]`` of the pruned model.
        reference: ``[N, K]`` of the dense model on the same samples.
        labels: ``[N]`` class indices, or None.
        models: See `Drop`.
        confidence: Of the upper bound.

    Raises:
        DataError: No samples, or shapes or labels that do not fit.
        NonFiniteError: NaN or Inf.

    Example:
        >>> measure_drop(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).lost
        0.5
    """
    from scipy.stats import binomtest  # takes longer to import than the rest of the module

    found = agreement(logits, reference, labels)
    n, level = found.images, 1 - 0.05 / models
    if labels is None:
        low, high = wilson_interval(found.top1, n, level)
        flips = binomtest(n - round(found.top1 * n), n, alternative="less")
        upper = float(flips.proportion_ci(confidence, method="exact").high) if confidence > 0.5 else 1 - found.top1
        return Drop("agreement", n, 1 - found.top1, 1 - high, 1 - low, models, upper)
    dense, pruned = (values.argmax(1) == labels.to(values.device) for values in (reference, logits))
    lost, won = int((dense & ~pruned).sum()), int((~dense & pruned).sum())
    upper = paired_interval(lost, won, n, 2 * confidence - 1)[1] if confidence > 0.5 else (lost - won) / n
    return Drop("accuracy", n, (lost - won) / n, *paired_interval(lost, won, n, level), models, upper)


def wilson_interval(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share of n samples.

    Source:
        Wilson, JASA 22 (1927), 209-212.
    """
    from scipy.stats import binomtest  # takes longer to import than the rest of the module

    interval = binomtest(round(share * n), n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(one: int, other: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two shares of the same n samples, adjusted by half a sample in each of four cells.

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
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def explain_out_of_memory(images: int) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to change.

    Args:
        images: Number of images that were at work.

    Raises:
        MemoryLimitError: Memory ran out, on an accelerator or on the CPU.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
        if not known or isinstance(error, MemoryLimitError):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MemoryLimitError(
            f"Memory ran out with {images} images at once ({reason}). Pass a smaller batch_size=, smaller images, or "
            "use a device with more memory; other programs may hold memory as well."
        ) from error


def check_weights(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in its weights.

    -Inf in a buffer is let through: that is how attention masks are stored.

    Raises:
        NonFiniteError: Names the first such parameter or buffer.
    """
    for kind, tensors in (("Parameter", model.named_parameters()), ("Buffer", model.named_buffers())):
        for name, tensor in tensors:
            if not _finite(tensor.masked_fill(tensor == -math.inf, 0) if kind == "Buffer" else tensor):
                raise NonFiniteError(
                    f"{kind} {name!r} contains NaN or Inf. Load the weights again, or go back to an earlier checkpoint."
                )


def raise_nonfinite(
    model: nn.Module, images: Tensor, what: str, *, autocast_dtype: torch.dtype | None = None
) -> NoReturn:
    """Say where NaN or Inf come from: the images, a weight, or the first module that makes them.

    A module is done when its children are: a parent is named only if it made NaN or Inf itself.

    Args:
        model: The model.
        images: ``[B, C, H, W]`` on the device of the model, the batch that failed.
        what: Subject of the message, such as ``Batch 3: the logits``.
        autocast_dtype: Run under ``torch.autocast`` in this dtype; None: as the model is.

    Raises:
        NonFiniteError: Always.
    """
    if not _finite(images):
        raise NonFiniteError(f"{what} contain NaN or Inf, and so do the images. Check the transform that made them.")
    check_weights(model)
    found: list[str] = []

    def watch(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            if not all(_finite(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
                found.append(name)

        return hook

    hooks = {name: watch(name) for name, _ in model.named_modules()}
    autocast = torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    with preserve.inference_state(model), preserve.hooked(model, hooks), autocast:
        model(images)
    if not found:
        raise NonFiniteError(f"{what} contain NaN or Inf, though every module's output was finite on a second pass.")
    where = f"module {found[0]!r}" if found[0] else "the model itself"
    raise NonFiniteError(
        f"{what} contain NaN or Inf. Images and weights are finite; the first output that is not is that of "
        f"{where} ({type(model.get_submodule(found[0])).__name__}). If half precision overflows, use bfloat16 or "
        "float32."
    )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
