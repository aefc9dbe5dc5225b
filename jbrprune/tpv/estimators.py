r"""TPV of a model under a perturbation of its weights, to first order and really.

    TPV = E_x E_dw sum_k (f_k(w + dw; x) - f_k(w; x))^2   (`empirical`)
        ~ E_x sum_k J_k(x) C J_k(x)^T                      (`trace_form`)

Sum over outputs, mean over samples. The outputs are the logits unless told otherwise. Inside of
`jbrprune.distributed.joined` ranks share the images, see the same perturbations and get the number of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from jbrprune.criteria.passes import check_known
from jbrprune.data import distributed
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError
from jbrprune.evaluation.agreement import raise_nonfinite
from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of
from jbrprune.tpv.covariances import Change, Covariance, Perturbation
from jbrprune.tpv.estimate import Estimate, Sums, reached, warn_of_sums
from jbrprune.tpv.gradients import checked_direction
from jbrprune.tpv.problem import Bound, Settings, Stream, bound_to
from jbrprune.tpv.recorded import Recorded, check_recording, recorded
from jbrprune.tpv.responses import Output, applied, changed_outputs, linear_outputs, outputs_of, rounding_error
from jbrprune.tpv.signs import Signs
from jbrprune.tpv.validity import Validity, taylor_error, warn_if_invalid, warn_if_rounded

Method = Literal["auto", "exact", "projection", "jvp"]
METHODS = ("auto", "exact", "projection", "jvp")
EXACT_OUTPUTS = 4
"""Up to here ``auto`` takes one backward per output, and has no variance from signs."""
MOST_EXACT = 4096
"""Outputs beyond which ``exact`` is refused."""
LEAST_SAMPLES = 64
"""Samples before which no standard error is trusted enough to stop."""
LEAST_DRAWS = 16
"""Draws before which none is, unless that is all there are: a few may be alike by chance."""
MOST_KEPT = 1 << 28
"""Bytes of outputs of the unchanged model that `empirical` keeps from the first draw; beyond, it runs it again."""


def trace_form(
    model: nn.Module,
    data: object,
    covariance: Covariance | Perturbation,
    *,
    method: Method = "auto",
    rtol: float = 0.02,
    samples: int | None = None,
    signs: int = 1,
    draws: int = 8,
    batch_size: int = 32,
    ignore: Sequence[str] = (),
    output: Output = logits_of,
    unit: str | None = None,
    autocast: torch.dtype | None = None,
    first: int = 0,
    validity: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""TPV to first order: Tr(H_eff C) = E_x sum_k J_k(x) C J_k(x)^T.

    Three methods, chosen by ``auto`` as follows:

    * ``jvp``: sum_r \|J(x) d_r\|^2 by forward-mode differentiation, where C = sum_r d_r d_r^T has finite rank, as for
      removal. Asked for by name it works for every covariance: then d is drawn ``draws`` times.
    * ``exact``: one backward per output, g = J_k^T; where there are at most `EXACT_OUTPUTS`.
    * ``projection``: one backward per vector of random signs s, E_s g^T C g with g = J^T s.

    The last two take whole batches: norms of per-sample gradients come from activations and output gradients.

    Args:
        model: Any module that maps images to logits ``[B, K]``; left as it was. All its parameters are perturbed,
            also frozen ones.
        data: Anything that yields images (`jbrprune.data.batches.iterate`); read once, streaming (``jvp`` with
            draws: once per draw, in the same order). Where not all of them are read (``rtol``, ``samples``) the first
            ones stand for the rest: images that are sorted, by class for example, must be shuffled once before.
        covariance: What the perturbation is (`jbrprune.tpv.covariances`).
        method: See above.
        rtol: Stop when standard error / value is at most this, from `LEAST_SAMPLES` samples (and `LEAST_DRAWS` draws,
            two in a row) on; 0: read everything.
        samples: Images to read, at most; default: all.
        signs: Sign vectors per sample.
        draws: Draws of the perturbation for ``jvp`` where C has no finite rank.
        batch_size: Images per pass where the data do not say.
        ignore: Globs of modules or parameters that are not perturbed.
        output: What the model returns -> ``[B, K]``; default: the logits.
        unit: What the squared outputs are measured in; default: ``squared logits``, or ``squared outputs``.
        autocast: Low-precision dtype of the forward pass of ``exact`` and ``projection``.
        first: Number of the first sample, for shards: the signs of a sample depend on the seed and its number, so that
            shards with ``rtol=0`` add up to the run on all samples (the standard error as well, where shards are cut at
            multiples of 32 samples).
        validity: Also compare first order with the real change along one draw, on the first batch (`taylor_error`).
        seed: Seeds signs and draws.
        progress: Show a progress bar.

    Returns:
        `Estimate`; its standard error is over samples and signs (or draws) together.

    Raises:
        ArgumentError: Arguments without meaning; ``exact`` with more than `MOST_EXACT` outputs; a covariance of another
            model.
        DataError: No data; the order of the data changes between passes.
        ModelError: No parameter is perturbed; masks of ``torch.nn.utils.prune``; a parameter whose gradients per
            sample cannot be seen.
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
    settings = Settings.checked(rtol, samples, draws, signs, first, seed, progress)
    began = time.perf_counter()
    bound = bound_to(model, covariance, ignore, output)
    stream = Stream(data, batch_size, preserve.device_of(model), samples, progress)
    ranked = getattr(bound.covariance, "directions", None) is not None
    if method == "jvp" or (method == "auto" and (ranked or getattr(bound.covariance, "by_draws", False))):
        sums, taken, stopped, change = _by_jvp(bound, stream, settings)
        done = "jvp"
    else:
        sums, done, stopped = _by_gradients(bound, stream, settings, method, autocast)
        taken, change = (signs if done == "projection" else 1), None
    return _estimate(
        bound, stream, sums, done, taken, stopped, unit, began, validity=validity, change=change, seed=seed
    )


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
    unit: str | None = None,
    validity: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""TPV as it is: E_x E_dw \|f(w + dw; x) - f(w; x)\|^2, by drawing dw and running the model.

    Args:
        model: As for `trace_form`.
        data: As for `trace_form`; read once per draw, in the same order.
        covariance: What the perturbation is.
        draws: Draws of dw, at most; a fixed perturbation (rounding, removal) is drawn once.
        rtol: Stop after a draw (the `LEAST_DRAWS`-th, at the earliest) when standard error / value is at most this, as
            it was after the draw before; a fixed perturbation: within the only draw, see ``data`` of `trace_form`.
        samples: Images to read, at most; default: all.
        batch_size: Images per pass where the data do not say.
        ignore: Globs of modules or parameters that are not perturbed.
        output: What the model returns -> ``[B, K]``; default: the logits.
        unit: What the squared outputs are measured in; default: ``squared logits``, or ``squared outputs``.
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
    settings = Settings.checked(rtol, samples, draws, 1, 0, seed, progress)
    began = time.perf_counter()
    bound = bound_to(model, covariance, ignore, output)
    stream = Stream(data, batch_size, preserve.device_of(model), samples, progress)
    unchanged = _Unchanged(bound)

    def squared(number: int, images: Tensor, change: Change) -> Tensor:
        dense = unchanged(number, images)
        context = applied(bound.covariance, model)
        if context is None:
            outputs = changed_outputs(model, images, change, output)
        else:
            with context:
                outputs = outputs_of(model, images, output)
        difference = outputs.double().cpu() - dense.double()
        return difference.square().sum(1)

    sums, taken, stopped, change = _by_draws(bound, stream, settings, squared)
    if applied(bound.covariance, model) is None and distributed.rank() == 0:
        warn_if_rounded(rounding_error(model, change))
    return _estimate(
        bound, stream, sums, "empirical", taken, stopped, unit, began, validity=validity, change=change, seed=seed
    )


class _Unchanged:
    """``[n, K]`` outputs of the model as it is, on the CPU; kept from draw to draw up to `MOST_KEPT` bytes."""

    def __init__(self, bound: Bound) -> None:
        self.bound, self.free = bound, MOST_KEPT
        self.kept: dict[int, Tensor] = {}

    def __call__(self, number: int, images: Tensor) -> Tensor:
        if number in self.kept:
            return self.kept[number]
        model = self.bound.model
        found = _finite_outputs(model, images, outputs_of(model, images, self.bound.output), number).cpu()
        if found.nbytes <= self.free:
            self.kept[number] = found
            self.free -= found.nbytes
        return found


def _finite_outputs(model: nn.Module, images: Tensor, outputs: Tensor, number: int) -> Tensor:
    if not torch.isfinite(outputs).all():
        raise_nonfinite(model, images, f"Batch {number}: the outputs")
    return outputs


def _by_gradients(
    bound: Bound, stream: Stream, settings: Settings, method: str, autocast: torch.dtype | None
) -> tuple[Sums, str, str]:
    """Sums of g^T C g, g = J^T m, m the unit vectors or random signs."""
    quadratic = _Quadratic(bound, settings, method, autocast)
    values: list[Tensor] = []
    for found in stream.visited("trace form", quadratic):
        if not values:  # a rank without images has seen no outputs
            quadratic.method, quadratic.block = distributed.same((quadratic.method, quadratic.block))
        values.append(found)
        sums = Sums.of(torch.cat(values)[:, None], shared=False, block=quadratic.block, first=settings.first)
        if reached(sums, settings.rtol, LEAST_SAMPLES):
            return sums, quadratic.method, "rtol"
    return sums, quadratic.method, "budget"  # type: ignore[reportPossiblyUnbound]


class _Quadratic:
    """``[n]`` the sum over outputs of g^T C g for a batch; its method is settled when the outputs have been seen."""

    def __init__(self, bound: Bound, settings: Settings, method: str, autocast: torch.dtype | None) -> None:
        self.bound, self.settings, self.method, self.autocast = bound, settings, method, autocast
        self.block, self.position = 1, 0
        self.signs: Signs | None = None

    def __call__(self, number: int, start: int, images: Tensor) -> Tensor:
        model, names = self.bound.model, list(self.bound.shapes)
        with preserve.inference_state(model):
            if number == 0:
                check_recording(model, images, names, self.bound.output)
            run = recorded(model, images, names, self.bound.output, self.autocast)
            outputs = _finite_outputs(model, images, run.outputs, number)
            if not outputs.requires_grad:
                raise ModelError("No parameter that is perturbed takes part in the outputs: nothing can be predicted.")
            found = torch.stack([_quadratic(self.bound, run, m) for m in self._directions(outputs, start)])
        return found.sum(0) if self.method == "exact" else found.mean(0)

    def _directions(self, outputs: Tensor, start: int) -> Iterator[Tensor]:
        """``[B, K]`` unit vectors, or the random signs of these samples."""
        if self.signs is None:
            self.method = _chosen(self.method, outputs.shape[1])
            self.signs = Signs(outputs.shape[1], self.settings.signs, self.settings.first, self.settings.seed)
            self.block = 1 if self.method == "exact" else self.signs.block
        if self.method == "exact":
            for k in range(outputs.shape[1]):
                yield torch.zeros_like(outputs).index_fill_(1, torch.tensor(k, device=outputs.device), 1)
            return
        self.signs.skip(start - self.position)  # those of other ranks
        self.position = start + len(outputs)
        for drawn in self.signs.take(len(outputs)).unbind(1):
            yield drawn.to(outputs)


def _quadratic(bound: Bound, run: Recorded, directions: Tensor) -> Tensor:
    value = bound.covariance.quadratic(run.gradients(directions))
    if not isinstance(value, Tensor) or value.shape != (len(directions),):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"quadratic() must give one number per sample, [{len(directions)}], got {got}.")
    if not torch.isfinite(value).all():
        raise NonFiniteError("quadratic() gave NaN or Inf: the gradients, or the covariance, are not finite.")
    return value.detach().cpu().double()


def _chosen(method: str, outputs: int) -> str:
    if method == "auto":
        return "exact" if outputs <= EXACT_OUTPUTS else "projection"
    if method == "exact" and outputs > MOST_EXACT:
        raise ArgumentError(
            f"method='exact' takes one backward per output, and there are {outputs:,}: more than {MOST_EXACT:,}. Use "
            "method='projection', which takes one per sign vector."
        )
    return method


def _by_jvp(bound: Bound, stream: Stream, settings: Settings) -> tuple[Sums, int, str, Change]:
    """Sums of squares of J d: over all directions of a finite rank, or over draws."""
    directions = getattr(bound.covariance, "directions", None)

    def squared(number: int, images: Tensor, change: Change) -> Tensor:
        total = torch.zeros(len(images), dtype=torch.float64)
        for d in directions or (change,):
            outputs, product = linear_outputs(bound.model, images, d, bound.output)
            _finite_outputs(bound.model, images, outputs, number)
            total += product.double().square().sum(1).cpu()
        return total

    return _by_draws(bound, stream, settings, squared, once=directions is not None)


def _by_draws(
    bound: Bound,
    stream: Stream,
    settings: Settings,
    squared: Callable[[int, Tensor, Change], Tensor],
    *,
    once: bool = False,
) -> tuple[Sums, int, str, Change]:
    """Sums of what every draw does to every sample; one draw where there is nothing random (any more)."""
    generator = torch.Generator().manual_seed(settings.seed)
    once = once or getattr(bound.covariance, "fixed", False)
    walked = getattr(bound.covariance, "walked", False)
    least, close = 1 if once else min(LEAST_DRAWS, settings.draws), 0
    columns: list[Tensor] = []
    start: Change = {}
    sums: Sums | None = None
    for draw in range(1 if once else settings.draws):
        change = checked_direction(bound.covariance.sample(generator), bound.shapes)
        start = start or change
        parts: list[Tensor] = []

        def one(number: int, start: int, images: Tensor, change: Change = change, draw: int = draw) -> Tensor:
            with preserve.inference_state(bound.model):
                found = squared(number, images, change)
            if not torch.isfinite(found).all():
                raise NonFiniteError(f"Draw {draw + 1}, batch {number}: the changed outputs contain NaN or Inf.")
            return found

        for found in stream.visited(f"draw {draw + 1}", one):
            parts.append(found)
            if once and reached(Sums.of(torch.cat(parts)[:, None], shared=False), settings.rtol, LEAST_SAMPLES):
                break
        columns.append(torch.cat(parts))
        sums = Sums.of(torch.stack(columns, 1), shared=not once, walked=walked)
        close = close + 1 if reached(sums, settings.rtol, LEAST_SAMPLES) else 0
        if draw + 1 >= least and close >= (1 if draw + 1 == settings.draws or once else 2):
            return sums, draw + 1, "rtol", start
    return sums, len(columns), "budget", start  # type: ignore[return-value]


def _estimate(
    bound: Bound,
    stream: Stream,
    sums: Sums,
    method: str,
    draws: int,
    stopped: str,
    unit: str | None,
    began: float,
    *,
    validity: bool,
    change: Change | None,
    seed: int,
) -> Estimate:
    seconds = time.perf_counter() - began

    def looked() -> Validity | None:
        if not validity or stream.head is None or distributed.rank() > 0:
            return None
        with distributed.alone():
            direction = change or bound.covariance.sample(torch.Generator().manual_seed(seed))
            return taylor_error(bound.model, stream.head, direction, output=bound.output, progress=False)

    found = distributed.same(distributed.together(looked))
    if distributed.rank() == 0:
        warn_if_invalid(found)
        warn_of_sums(sums)
    unit = unit or ("squared logits" if bound.output is logits_of else "squared outputs")
    return Estimate.from_sums(
        sums, seconds=seconds, unit=unit, method=method, draws=draws, seed=seed, stopped=stopped, validity=found
    )
