r"""TPV of a model under a perturbation of its weights, to first order and really.

    TPV = E_x E_dw sum_k (f_k(w + dw; x) - f_k(w; x))^2   (`empirical`)
        ~ E_x sum_k J_k(x) C J_k(x)^T                      (`trace_form`)

Sum over outputs, mean over samples. The outputs are the logits unless ``output`` says otherwise. Inside of
`jbrprune.distributed.joined` the ranks share the images, see the same perturbations and return the estimate of one
process.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from jbrprune.data import distributed
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError, check_known
from jbrprune.evaluation.agreement import check_weights, raise_nonfinite
from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of
from jbrprune.sparsity.masks import masks_of
from jbrprune.structure.groups import match_names
from jbrprune.tpv.covariances import Change, Covariance, Perturbation, check_change
from jbrprune.tpv.estimate import Estimate, Sums
from jbrprune.tpv.validity import (
    Output,
    Validity,
    changed_outputs,
    linear_outputs,
    outputs_of,
    taylor_error,
    warn_if_invalid,
    warn_if_rounded,
)

METHODS = ("auto", "exact", "projection", "jvp")
EXACT_OUTPUTS = 4
"""Up to here ``auto`` takes one backward per output, and has no variance from signs."""
MOST_EXACT = 4096
"""Outputs beyond which ``exact`` is refused."""
LEAST_SAMPLES = 64
"""Samples before which no standard error is trusted enough to stop."""
LEAST_DRAWS = 16
"""Draws before which none is, unless that is all there are: a few may be alike by chance."""
CHUNK_BYTES = 1 << 27
"""Bytes of per-sample gradients that are formed at a time; one sample's at least."""


@dataclass(eq=False)
class _Task:
    """What is estimated of which model, and the images, which are the same in every pass; ranks share them."""

    model: nn.Module
    covariance: Covariance
    weights: Mapping[str, Tensor]
    output: Output
    data: object
    batch_size: int
    samples: int | None
    rtol: float
    seed: int
    progress: bool
    began: float = field(default_factory=time.perf_counter)
    prints: list[int] = field(default_factory=list)
    head: Tensor | None = None

    def visit(self, what: str, work: Callable[[int, int, Tensor], Tensor]) -> Iterator[Tensor]:
        """Yield what ``work(number of the batch, number of its first image, images)`` returns, in the data's order.

        Each of several ranks works on its own batches (and numbers them), and all receive the results of all: they
        stop, or go on, together.

        Args:
            what: Text of the progress bar.
            work: Returns ``[n]`` values, one per image, on the CPU.

        Raises:
            DataError: These are not the images of the first pass, or there are none.
        """
        parts = distributed.Parts(self.data, batch_size=self.batch_size)
        mine = self._read(parts, what)
        waiting: dict[int, Tensor] = {}
        position = 0

        def one() -> tuple[int, Tensor] | None:
            batch = next(mine, None)
            return None if batch is None else (batch[1], work(*batch))

        while answers := [found for found in distributed.gathered(distributed.together(one)) if found is not None]:
            waiting.update(answers)
            while position in waiting:
                values = waiting.pop(position)
                position += len(values)
                yield values
        if self.samples is None:  # else the ranks stop reading at different places
            parts.check()
        if position == 0:
            raise DataError(f"The data ({type(self.data).__name__}) hold no image for any rank.")

    def _read(self, parts: distributed.Parts, what: str) -> Iterator[tuple[int, int, Tensor]]:
        """One pass over the own part: the number of each batch, that of its first image, and the images."""
        again, number = bool(self.prints), 0
        for start, batch in tqdm(parts, what, unit="batch", disable=not self.progress, leave=False):
            images = batch.images.detach()[: None if self.samples is None else max(0, self.samples - start)]
            if not len(images):
                break
            found = zlib.crc32(images.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            if not again:
                self.prints.append(found)
            elif number >= len(self.prints) or self.prints[number] != found:
                raise DataError(
                    f"Batch {number} is not the one of the first pass: the data are shuffled (or augmented at random) "
                    "anew every time they are read, but the changed and the unchanged model must see the same images. "
                    "Use shuffle=False, or pass a tensor or a list of batches."
                )
            images = images.to(preserve.device_of(self.model))
            self.head = images if self.head is None else self.head
            yield number, start, images
            number += 1
        if again and number != len(self.prints):
            raise DataError(f"The data gave {len(self.prints)} batches in the first pass and {number} in a later one.")

    def check_finite(self, images: Tensor, outputs: Tensor, number: int) -> None:
        """Raise a NonFiniteError that names the module which makes NaN or Inf."""
        if not torch.isfinite(outputs).all():
            raise_nonfinite(self.model, images, f"Batch {number}: the outputs")


def trace_form(
    model: nn.Module,
    data: object,
    covariance: Covariance | Perturbation,
    *,
    method: Literal["auto", "exact", "projection", "jvp"] = "auto",
    rtol: float = 0.02,
    samples: int | None = None,
    signs: int = 1,
    draws: int = 8,
    batch_size: int = 32,
    ignore: Sequence[str] = (),
    output: Output = logits_of,
    autocast: torch.dtype | None = None,
    first: int = 0,
    validity: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""TPV to first order: Tr(H_eff C) = E_x sum_k J_k(x) C J_k(x)^T.

    Three methods, chosen by ``auto`` as follows:

    * ``jvp``: sum_r \|J(x) d_r\|^2 by forward-mode differentiation, where C = sum_r d_r d_r^T has finite rank, as for
      removal. Named explicitly, it works for every covariance: then d is drawn ``draws`` times.
    * ``exact``: one backward per output, g = J_k^T; where there are at most `EXACT_OUTPUTS`.
    * ``projection``: one backward per vector of random signs s, E_s g^T C g with g = J^T s.

    Args:
        model: Any module that maps images to logits ``[B, K]``; left as it was. All its parameters are perturbed,
            also frozen ones.
        data: Anything that yields images (`jbrprune.data.batches.iterate`); read once, streaming (``jvp`` with
            draws: once per draw, in the same order). Where not all of them are read (``rtol``, ``samples``) the first
            ones stand for the rest: images that are sorted, by class for example, must be shuffled once before.
        covariance: The perturbation (`jbrprune.tpv.covariances`).
        method: See above.
        rtol: Stop when standard error / value is at most this, from `LEAST_SAMPLES` samples (and `LEAST_DRAWS` draws,
            two in a row) on; 0: read everything.
        samples: Images to read, at most; default: all.
        signs: Sign vectors per sample.
        draws: Draws of the perturbation for ``jvp`` where C has no finite rank.
        batch_size: Images per pass where the data do not say.
        ignore: Globs of modules or parameters that are not perturbed.
        output: What the model returns -> ``[B, K]``; default: the logits.
        autocast: Low-precision dtype of the forward pass of ``exact`` and ``projection``.
        first: Number of the first sample, for shards: the signs of a sample depend on the seed and its number, so that
            shards with ``rtol=0`` add up to the run on all samples.
        validity: Also compare first order with the real change along one draw, on the first batch (`taylor_error`).
        seed: Seeds signs and draws.
        progress: Show a progress bar.

    Returns:
        `Estimate`; its standard error is over samples and signs (or draws) together.

    Raises:
        ArgumentError: Arguments without meaning; ``exact`` with more than `MOST_EXACT` outputs; a covariance of another
            model.
        DataError: No data; the order of the data changes between passes.
        ModelError: No parameter is perturbed; masks of ``torch.nn.utils.prune``; samples influence each other.
        NonFiniteError: NaN or Inf in weights, images, outputs or gradients.

    Source:
        Arpit, arXiv 2512.11089 (trace form, sign projections).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
        >>> images = torch.ones(64, 3, 2, 2)
        >>> trace_form(net, images, Isotropic(0.5), progress=False).value  # 0.25 * 4 outputs * 12 inputs
        12.0
    """
    check_known("method", method, METHODS)
    _check_least(signs=(signs, 1), first=(first, 0))
    task = _prepare(model, data, covariance, draws, rtol, samples, batch_size, ignore, output, seed, progress)
    directions = getattr(task.covariance, "directions", None)
    if method != "jvp" and (method != "auto" or not (directions or getattr(task.covariance, "by_draws", False))):
        return _by_gradients(task, method, signs, first, autocast, validity)

    def squared(number: int, images: Tensor, change: Change) -> Tensor:
        total = torch.zeros(len(images), dtype=torch.float64)
        for d in directions or (change,):
            outputs, product = linear_outputs(model, images, d, output)
            task.check_finite(images, outputs, number)
            total += product.double().square().sum(1).cpu()
        return total

    return _by_draws(task, "jvp", squared, draws, validity, once=bool(directions))


def empirical(
    model: nn.Module,
    data: object,
    covariance: Covariance | Perturbation,
    *,
    draws: int = 16,
    rtol: float = 0.02,
    samples: int | None = None,
    batch_size: int = 32,
    ignore: Sequence[str] = (),
    output: Output = logits_of,
    validity: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""TPV as it is: E_x E_dw \|f(w + dw; x) - f(w; x)\|^2, by drawing dw and running the model.

    Args:
        model: As for `trace_form`.
        data: As for `trace_form`; read once per draw, in the same order. The unchanged outputs (``[N, K]``) are kept.
        covariance: The perturbation.
        draws: Draws of dw, at most; a fixed perturbation (rounding, removal) is drawn once.
        rtol: Stop after a draw (the `LEAST_DRAWS`-th, at the earliest) when standard error / value is at most this, as
            it was after the draw before; a fixed perturbation: within the only draw, see ``data`` of `trace_form`.
        samples: Images to read, at most; default: all.
        batch_size: Images per pass where the data do not say.
        ignore: Globs of modules or parameters that are not perturbed.
        output: What the model returns -> ``[B, K]``; default: the logits.
        validity: Also compare first order with the real change along the first draw, on the first batch.
        seed: Seeds the draws; shards with the same seed, the same ``draws`` and ``rtol=0`` add up.
        progress: Show a progress bar.

    Returns:
        `Estimate`; its standard error is over samples and draws together.

    Raises:
        ArgumentError, DataError, ModelError, NonFiniteError: As for `trace_form`.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
        >>> found = empirical(net, torch.ones(64, 3, 2, 2), Isotropic(0.5), draws=400, progress=False)
        >>> abs(found.value - 12) < 3 * found.standard_error
        True
    """
    task = _prepare(model, data, covariance, draws, rtol, samples, batch_size, ignore, output, seed, progress)
    unchanged: dict[int, Tensor] = {}

    def squared(number: int, images: Tensor, change: Change) -> Tensor:
        if number not in unchanged:
            outputs = outputs_of(model, images, output)
            task.check_finite(images, outputs, number)
            unchanged[number] = outputs.cpu()
        applied = getattr(task.covariance, "applied", None)
        if applied is None:
            outputs = changed_outputs(model, images, change, output)
        else:
            with applied(model):
                outputs = outputs_of(model, images, output)
        return (outputs.double().cpu() - unchanged[number].double()).square().sum(1)

    return _by_draws(task, "empirical", squared, draws, validity)


def sample_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    directions: Tensor,
    output: Output = logits_of,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the outputs and gradients J(x_n)^T m_n of every sample, some samples at a time.

    By ``vmap(grad)`` over as many samples as `CHUNK_BYTES` hold; one sample after the other where one fills them, or
    where vmap fails on the model (in-place operations, branches).

    Args:
        model: The model, in `jbrprune.models.preserve.inference_state`.
        weights: The parameters by which the outputs are differentiated.
        images: ``[B, C, H, W]``.
        directions: ``[B, K]`` m.
        output: What the model returns -> ``[B, K]``.
        autocast: Low-precision dtype of the forward pass.

    Yields:
        ``[n, K]`` outputs, in float32 at least, and name -> ``[n, *shape]`` gradients.

    Raises:
        ModelError: Autograd cannot differentiate the outputs by the weights.
    """
    amp = {"enabled": autocast is not None, "cache_enabled": False}

    def product(weights: Mapping[str, Tensor], image: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, autocast, **amp):
            outputs = outputs_of(model, image[None], output, weights)[0]
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return (outputs * direction).sum(), outputs.detach()

    each = vmap(grad(product, has_aux=True), in_dims=(None, 0, 0))
    size = max(1, CHUNK_BYTES // sum(w.nbytes for w in weights.values()))
    start = 0
    while start < len(images):
        part, m = images[start : start + size], directions[start : start + size]
        if size > 1:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
                    gradients, outputs = each(weights, part, m)
            except RuntimeError:
                size = 1
                continue
        else:
            leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
            try:
                with torch.enable_grad():
                    value, outputs = product(leaves, part[0], m[0])
                    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True, allow_unused=True)
            except RuntimeError as error:
                raise ModelError(f"The model cannot be differentiated by its weights: {error}") from error
            gradients, outputs = {name: g[None] for name, g in zip(leaves, found)}, outputs[None]
        yield outputs, gradients
        start += size


def random_signs(seed: int, first: int, samples: int, *shape: int) -> Tensor:
    """``[samples, *shape]`` int8 independent random signs; those of a sample depend on the seed and its number only."""
    generator = torch.Generator()
    rows = []
    for number in range(first, first + samples):
        generator.manual_seed(seed * 1_000_003 + number)
        rows.append(2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1)
    return torch.stack(rows)


def _check_least(**numbers: tuple[int | None, int]) -> None:
    """Refuse numbers, name -> (value, least), that are too small."""
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ArgumentError(f"{name} must be at least {least}, got {value}.")


def _prepare(
    model: nn.Module,
    data: object,
    covariance: Covariance | Perturbation,
    draws: int,
    rtol: float,
    samples: int | None,
    batch_size: int,
    ignore: Sequence[str],
    output: Output,
    seed: int,
    progress: bool,
) -> _Task:
    """The model with the covariance of its weights, except those that are ignored; everything is checked."""
    _check_least(samples=(samples, 1), draws=(draws, 1))
    if not 0 <= rtol < 1:
        raise ArgumentError(f"rtol must satisfy 0 <= rtol < 1, got {rtol}.")
    check_weights(model)
    if masks_of(model):
        raise ModelError(
            f"{next(iter(masks_of(model)))} is masked by torch.nn.utils.prune, so that its parameter is not what the "
            "model computes with. Call jbrprune.make_permanent(model) first (on a copy, if the masks are still needed)."
        )
    weights = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    modules = [name for name, _ in model.named_modules() if name]
    for name in match_names([*modules, *weights], ignore, "module and no parameter") if ignore else ():
        weights.pop(name, None)
    if not weights:
        raise ModelError(f"{type(model).__name__} has no parameter that can be perturbed. Is everything in `ignore`?")
    if isinstance(covariance, Perturbation):
        covariance = covariance.of(model, weights)
    if not isinstance(covariance, Covariance):
        raise ArgumentError(
            f"{type(covariance).__name__} is not a covariance: it needs the methods quadratic(gradients) and "
            "sample(generator), see jbrprune.tpv.covariances."
        )
    return _Task(model, covariance, weights, output, data, batch_size, samples, rtol, seed, progress)


def _by_gradients(
    task: _Task, method: str, signs: int, first: int, autocast: torch.dtype | None, validity: bool
) -> Estimate:
    """Estimate from g^T C g with g = J^T m, m the unit vectors or random signs."""
    count = 0

    def quadratic(number: int, start: int, images: Tensor) -> Tensor:
        nonlocal method, count
        total = torch.zeros(len(images), dtype=torch.float64)
        with preserve.inference_state(task.model):
            if number == 0:
                together = outputs_of(task.model, images, task.output)
                task.check_finite(images, together, number)
                count = together.shape[1]
                method = _choose(method, count)
            if method == "exact":
                directions = torch.eye(count).expand(len(images), -1, -1)
            else:
                directions = random_signs(task.seed, first + start, len(images), signs, count)
            for m in directions.to(images.device).unbind(1):
                done = 0
                for outputs, gradients in sample_gradients(
                    task.model, task.weights, images, m, task.output, autocast
                ):
                    task.check_finite(images, outputs, number)
                    if number == 0:
                        _check_alone(outputs, together[done : done + len(outputs)], autocast)
                    total[done : done + len(outputs)] += _quadratic(task.covariance, gradients, len(outputs))
                    done += len(outputs)
        return total if method == "exact" else total / signs

    values: list[Tensor] = []
    for found in task.visit("trace form", quadratic):
        method = distributed.same(method)  # a rank without images has seen no outputs
        values.append(found)
        sums = Sums.of(torch.cat(values)[:, None], shared=False)
        if sums.reached(task.rtol, LEAST_SAMPLES):
            break
    draws = 1 if method == "exact" else signs
    return _finish(task, sums, method, draws, validity)  # type: ignore[reportPossiblyUnbound]


def _choose(method: str, outputs: int) -> str:
    """The method for so many outputs."""
    if method == "auto":
        return "exact" if outputs <= EXACT_OUTPUTS else "projection"
    if method == "exact" and outputs > MOST_EXACT:
        raise ArgumentError(
            f"method='exact' takes one backward per output, and there are {outputs:,}: more than {MOST_EXACT:,}. Use "
            "method='projection', which takes one per sign vector."
        )
    return method


def _check_alone(alone: Tensor, together: Tensor, autocast: torch.dtype | None) -> None:
    """Refuse a model whose outputs for single images are not those for a batch."""
    tolerance = torch.finfo(autocast or together.dtype).eps ** 0.5
    if not (alone - together).abs().max() <= tolerance * together.abs().max():
        raise ModelError(
            "The outputs of an image alone differ from its outputs in a batch: samples influence each other (a batch "
            "norm without stored statistics?), or the forward pass is random in eval mode. Gradients per sample are "
            "not defined there; use method='jvp', which needs none."
        )


def _quadratic(covariance: Covariance, gradients: Mapping[str, Tensor], samples: int) -> Tensor:
    """``[samples]`` g^T C g on the CPU, checked to be that."""
    value = covariance.quadratic(gradients)
    if not isinstance(value, Tensor) or value.shape != (samples,):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"quadratic() must give one number per sample, [{samples}], got {got}.")
    if not torch.isfinite(value).all():
        for name, g in gradients.items():
            if not torch.isfinite(g).all():
                raise NonFiniteError(
                    f"The gradient by {name} contains NaN or Inf although the outputs are finite. A square root of "
                    "zero or an overflow in half precision does that; try float32."
                )
        raise NonFiniteError("quadratic() gave NaN or Inf although the gradients are finite: the covariance is not.")
    return value.detach().cpu().double()


def _by_draws(
    task: _Task,
    method: str,
    squared: Callable[[int, Tensor, Change], Tensor],
    draws: int,
    validity: bool,
    *,
    once: bool = False,
) -> Estimate:
    """Estimate from what every draw does to every sample; one draw if it is not random, or is not used (``once``)."""
    generator = torch.Generator().manual_seed(task.seed)
    once = once or getattr(task.covariance, "fixed", False)
    draws = 1 if once else draws
    columns: list[Tensor] = []
    first: Change = {}
    close = 0
    for draw in range(1, draws + 1):
        change = task.covariance.sample(generator)
        check_change(change, task.weights)
        first = first or change

        def one(number: int, start: int, images: Tensor, change: Change = change, draw: int = draw) -> Tensor:
            with preserve.inference_state(task.model):
                found = squared(number, images, change)
            if not torch.isfinite(found).all():
                raise NonFiniteError(f"Draw {draw}, batch {number}: the changed outputs contain NaN or Inf.")
            return found

        parts: list[Tensor] = []
        for found in task.visit(f"draw {draw}", one):
            parts.append(found)
            if once and Sums.of(torch.cat(parts)[:, None], shared=False).reached(task.rtol, LEAST_SAMPLES):
                break
        columns.append(torch.cat(parts))
        walked = getattr(task.covariance, "walked", False)
        sums = Sums.of(torch.stack(columns, 1), shared=not once, walked=walked)
        close = close + 1 if sums.reached(task.rtol, LEAST_SAMPLES) else 0
        if draw >= LEAST_DRAWS and close == 2:
            break
    return _finish(task, sums, method, len(columns), validity, first)  # type: ignore[reportPossiblyUnbound]


def _finish(
    task: _Task, sums: Sums, method: str, draws: int, validity: bool, change: Change | None = None
) -> Estimate:
    """The estimate with its validity along the change (default: one draw), and warnings."""
    seconds = time.perf_counter() - task.began

    def look() -> Validity | None:
        if not validity or task.head is None or distributed.rank() > 0:
            return None
        with distributed.alone():
            direction = change or task.covariance.sample(torch.Generator().manual_seed(task.seed))
            return taylor_error(task.model, task.head, direction, output=task.output, progress=False)

    found = distributed.same(distributed.together(look))
    if distributed.rank() == 0:
        if method == "empirical" and change and getattr(task.covariance, "applied", None) is None:
            warn_if_rounded(task.model, change)
        warn_if_invalid(found)
        sums.warn()
    return Estimate.from_sums(
        sums,
        seconds=seconds,
        unit="squared logits" if task.output is logits_of else "squared outputs",
        method=method,
        draws=draws,
        seed=task.seed,
        stopped="rtol" if sums.reached(task.rtol, LEAST_SAMPLES) else "budget",
        validity=found,
    )
