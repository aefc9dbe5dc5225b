"""What a model computes: its logits, how far they agree with a reference, and where NaN or Inf come from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
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
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.models import preserve


@dataclass(frozen=True)
class Agreement:
    """How far a model decides, or computes, as its reference does; None where the output has no such number.

    Attributes:
        images: Number of samples N.
        top1: Share of samples whose argmax equals the reference's argmax; with several decisions per sample, of these.
        top5: Share of samples whose reference argmax is among the ``min(5, K)`` largest logits.
        kl: Mean of ``KL(softmax(reference) || softmax(logits))``, in nats.
        accuracy: Share of samples whose argmax equals the label; None without labels.
        dense_accuracy: The same of the reference; None without labels.
        iou: Mean over classes of intersection over union with the reference's map, of dense logits; a class that
            neither has is left out.
        cosine: Mean cosine similarity with the reference's embedding.
        neighbours: Share of samples whose nearest other sample, by cosine similarity, is the reference's.
        error: Root mean square over tensors of their relative errors.
        errors: Tensor -> its relative error sqrt(E ||f' - f||^2 / E ||f||^2).
    """

    images: int
    top1: float | None = None
    top5: float | None = None
    kl: float | None = None
    accuracy: float | None = None
    dense_accuracy: float | None = None
    iou: float | None = None
    cosine: float | None = None
    neighbours: float | None = None
    error: float | None = None
    errors: dict[str, float] | None = None

    @property
    def of(self) -> str:
        """What `share` is the share of."""
        if self.top1 is not None:
            return "agreement"
        return "relative error" if self.neighbours is None else "nearest-neighbour agreement"

    @property
    def share(self) -> float:
        """The number by which models are compared: share of decisions or neighbours kept, or 1 - `error`."""
        found = self.neighbours if self.top1 is None else self.top1
        return 1 - (self.error or 0.0) if found is None else found

    @property
    def distance(self) -> float:
        """What a repair must lower: `kl`, or `error`."""
        return (self.error or 0.0) if self.kl is None else self.kl

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson score interval of `share` (Wilson, JASA 1927): what N samples can resolve.

        With several decisions per sample it is too wide, because samples vary less than coins do.
        """
        return None if self.of == "relative error" else wilson_interval(self.share, self.images)


@dataclass(frozen=True)
class Drop:
    """A measured loss of accuracy or agreement.

    Attributes:
        of: ``accuracy`` where there are labels, else what agrees with the dense model (`Agreement.of`).
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


def compute_logits(
    model: nn.Module, batches: Iterable[Batch], output: Output = LOGITS, *, progress: bool = False
) -> list[Tensor]:
    """Logits, or other rows that count, of every batch, in eval mode, without gradients, on the device of the model.

    Each of several ranks computes its share of the batches; every rank gets the logits of all.

    Args:
        model: The model; left as it was, also after an exception.
        batches: Images ``[B, C, H, W]`` in the dtype that the model takes.
        output: What of the model's output counts.
        progress: Show a progress bar.

    Returns:
        One ``[B, V]`` per batch on the CPU, float32 (float64 stays float64).

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
                out = output(model(images))
            check_rows(out, model, images, number)
            own[number] = out.to("cpu", torch.promote_types(out.dtype, torch.float32))
    found = {number: logits for share in distributed.gather(own) for number, logits in share.items()}
    return [found[number] for number in range(len(found))]


def check_rows(
    rows: Tensor, model: nn.Module, images: Tensor, number: int, autocast: torch.dtype | None = None
) -> None:
    """Refuse rows, such as logits, that do not belong to the images of batch ``number``, or are not finite.

    Raises:
        ModelError: Another number of rows than of images.
        NonFiniteError: See `raise_nonfinite`.
    """
    if len(rows) != len(images):
        raise ModelError(f"Batch {number}: {len(images)} images gave {len(rows)} rows of logits.")
    if not _finite(rows):
        raise_nonfinite(model, images, f"Batch {number}: the logits", autocast_dtype=autocast)


def agreement(logits: Tensor, reference: Tensor, labels: Tensor | None = None, output: Output = LOGITS) -> Agreement:
    """Compare logits, or other rows, with those of a reference on the same images.

    Among equal logits the lower class index ranks first, as in `torch.argmax`.

    Args:
        logits: ``[N, V]`` of the model.
        reference: ``[N, V]`` of the dense model.
        labels: ``[N]`` class indices.
        output: What made the rows.

    Returns:
        Shares in [0, 1] and the mean divergence in nats, or errors, accumulated in float64.

    Raises:
        DataError: No samples, or shapes that do not fit.

    Example:
        >>> agreement(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).top1
        0.5
    """
    if logits.dim() != 2 or logits.shape != reference.shape or logits.numel() == 0:
        raise DataError(
            f"Logits and reference must both be [N, K] of the same images, with N and K at least 1; got "
            f"{list(logits.shape)} and {list(reference.shape)}."
        )
    if not output.decides:
        return _agreement_of_values(logits, reference, output)
    pruned, dense = output.by_class(logits), output.by_class(reference)
    labels = labels if output.positions == 1 else None

    def share(hits: Tensor) -> float:
        return int(hits.sum()) / hits.numel()

    expected, predicted, index = dense.argmax(1), pruned.argmax(1), torch.arange(dense.shape[1])
    own = pruned.gather(1, expected[:, None])
    before = (index if output.positions == 1 else index[:, None]).to(expected.device) < expected[:, None]
    rank = ((pruned > own) | ((pruned == own) & before)).sum(1)
    divergence = 0.0
    for parts in zip(pruned.split(rows := max(1, (1 << 26) // logits.shape[1])), dense.split(rows)):
        log_q, log_p = (F.log_softmax(values.double(), dim=1) for values in parts)
        divergence += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return Agreement(
        images=len(logits),
        top1=share(predicted == expected),
        top5=share(rank < 5) if output.kind == "logits" else None,
        # rounding can leave the mean of equal distributions an ulp below zero
        kl=max(0.0, divergence / expected.numel()),
        accuracy=None if labels is None else share(predicted == labels.to(predicted.device)),
        dense_accuracy=None if labels is None else share(expected == labels.to(expected.device)),
        iou=mean_iou(predicted, expected, dense.shape[1]) if output.kind == "dense" else None,
    )


def mean_iou(predicted: Tensor, expected: Tensor, classes: int) -> float:
    """Mean over classes of intersection over union of two maps of class indices; absent classes are left out."""
    both, own, other = (
        torch.bincount(part.flatten(), minlength=classes)
        for part in (expected[predicted == expected], predicted, expected)
    )
    union = own + other - both
    return float((both[union > 0] / union[union > 0]).double().mean())


def nearest(values: Tensor) -> Tensor:
    """``[N]`` for every row the index of the nearest other one by cosine similarity."""
    unit, found = F.normalize(values.double(), dim=1), []
    for start in range(0, len(unit), 1024):
        similar = unit[start : start + 1024] @ unit.t()
        similar.diagonal(start).fill_(-math.inf)  # itself
        found.append(similar.argmax(1))
    return torch.cat(found)


def squared_errors(values: Tensor, reference: Tensor, output: Output) -> dict[str, Tensor]:
    """Tensor -> ``[N]`` squared error of every sample, relative to the mean square of the reference's norm."""
    tiny, parts = torch.finfo(torch.float64).tiny, zip(*(x.split(output.sizes, 1) for x in (values, reference)))
    return {
        name: (f.double() - g.double()).square().sum(1) / g.double().square().sum(1).mean().clamp_min(tiny)
        for name, (f, g) in zip(output.names, parts, strict=True)
    }


def _agreement_of_values(values: Tensor, reference: Tensor, output: Output) -> Agreement:
    squares = {name: float(square.mean()) for name, square in squared_errors(values, reference, output).items()}
    cosine = neighbours = None
    if output.kind == "embedding" and values.shape[1] > 1:
        cosine = float(F.cosine_similarity(values.double(), reference.double(), dim=1).mean())
        neighbours = float((nearest(values) == nearest(reference)).double().mean())
    errors = {name or output.kind: math.sqrt(square) for name, square in squares.items()}
    error = math.sqrt(math.fsum(squares.values()) / len(squares))
    return Agreement(len(values), cosine=cosine, neighbours=neighbours, error=error, errors=errors)


def agreement_on(model: nn.Module, batches: Iterable[Batch], output: Output = LOGITS) -> Agreement:
    """`compute_logits`, then `agreement` with the references (and labels, if every batch has them) of the batches."""
    batches = list(batches)
    references = [batch.reference for batch in batches if batch.reference is not None]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    known = torch.cat(labels) if len(labels) == len(batches) else None
    return agreement(torch.cat(compute_logits(model, batches, output)), torch.cat(references).cpu(), known, output)


def measure_drop(
    logits: Tensor,
    reference: Tensor,
    labels: Tensor | None = None,
    output: Output = LOGITS,
    *,
    models: int = 1,
    confidence: float = 0.5,
) -> Drop:
    r"""The fall of accuracy, or of agreement without labels, from the dense model to a pruned one.

    With labels, (n10 - n01) / N, where n10 samples only the dense model gets right and n01 only the pruned one, with
    `paired_interval`. Without, 1 - agreement (`Agreement.share`) with `wilson_interval`; the upper bound is exact
    (Clopper and Pearson, Biometrika 26, 1934). The square of a relative error has bounds of a normal distribution.

    Args:
        logits: ``[N, K]`` of the pruned model.
        reference: ``[N, K]`` of the dense model on the same samples.
        labels: ``[N]`` class indices, or None.
        output: What made the rows.
        models: See `Drop`.
        confidence: Of the upper bound.

    Raises:
        DataError: No samples, or shapes or labels that do not fit.
        NonFiniteError: NaN or Inf.

    Example:
        >>> measure_drop(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).lost
        0.5
    """
    from scipy.stats import binomtest, norm  # takes longer to import than the rest of the module

    found = agreement(logits, reference, labels, output)
    n, level = found.images, 1 - 0.05 / models
    if found.of == "relative error":
        squares = torch.stack(list(squared_errors(logits, reference, output).values())).mean(0)
        deviation = float(squares.std(correction=min(1, n - 1))) / math.sqrt(n)
        bounds = [found.error**2 + norm.ppf(p) * deviation for p in ((1 - level) / 2, (1 + level) / 2, confidence)]  # type: ignore[operator]
        low, high, upper = (math.sqrt(max(0.0, bound)) for bound in bounds)
        return Drop(found.of, n, 1 - found.share, low, high, models, upper)
    if labels is None:
        lost = 1 - found.share
        low, high = wilson_interval(found.share, n, level)
        flips = binomtest(n - round(found.share * n), n, alternative="less")
        upper = float(flips.proportion_ci(confidence, method="exact").high) if confidence > 0.5 else lost
        return Drop(found.of, n, lost, 1 - high, 1 - low, models, upper)
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

    Inf in a buffer that is no statistic of a norm is let through: that is how masks and bounds are stored.

    Raises:
        NonFiniteError: Names the first such parameter or buffer.
    """
    for kind, tensors in (("Parameter", model.named_parameters()), ("Buffer", model.named_buffers())):
        for name, tensor in tensors:
            bounds = kind == "Buffer" and not name.endswith(("running_mean", "running_var"))
            if not _finite(tensor.masked_fill(tensor.isinf(), 0) if bounds else tensor):
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
