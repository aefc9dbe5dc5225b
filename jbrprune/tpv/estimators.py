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
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.weight_relevance import sample_gradients
from jbrprune.data import distributed
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError, check_known
from jbrprune.evaluation.agreement import check_weights, raise_nonfinite
from jbrprune.models.preserve import device_of, inference_state, logits_of, refuse_masked
from jbrprune.structure.groups import match_names
from jbrprune.structure.verification import check_samples_apart
from jbrprune.tpv.covariances import Change, Covariance, Perturbation, check_change
from jbrprune.tpv.estimate import Estimate
from jbrprune.tpv.validity import ReadRows, change_outputs, linear_outputs, outputs_of, taylor_error

Method = Literal["auto", "exact", "projection", "jvp"]
"""How the trace form is computed; see `trace_form`."""
EXACT_OUTPUTS = 4
"""Up to here ``auto`` takes one backward per output, and has no variance from signs."""
MOST_EXACT = 4096
"""Outputs beyond which ``exact`` is refused."""
LEAST_SAMPLES = 64
"""Samples before which no standard error is trusted enough to stop."""
LEAST_DRAWS = 16
"""Draws before which none is, unless that is all there are: a few may be alike by chance."""


def trace_form(
    model: nn.Module,
    data: object,
    covariance: Covariance | Perturbation,
    *,
    method: Method = "auto",
    rtol: float = 0.02,
    samples: int | None = None,
    draws: int = 8,
    batch_size: int = 32,
    ignore: Sequence[str] = (),
    output: ReadRows = logits_of,
    validity: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""TPV to first order: Tr(H_eff C) = E_x sum_k J_k(x) C J_k(x)^T.

    Three methods, chosen by ``auto`` as follows:

    * ``jvp``: sum_r \|J(x) d_r\|^2 by forward-mode differentiation, where C = sum_r d_r d_r^T has finite rank, as for
      removal. Named explicitly, it works for every covariance: then d is drawn ``draws`` times.
    * ``exact``: one backward per output, g = J_k^T; where there are at most `EXACT_OUTPUTS`.
    * ``projection``: one backward, for a vector of random signs s of every sample: E_s g^T C g with g = J^T s.

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
        draws: Draws of the perturbation for ``jvp`` where C has no finite rank.
        batch_size: Images per pass where the data do not say.
        ignore: Globs of modules or parameters that are not perturbed.
        output: What the model returns -> ``[B, K]``; default: the logits.
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
        >>> from jbrprune.tpv import Isotropic
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
        >>> images = torch.ones(64, 3, 2, 2)
        >>> trace_form(net, images, Isotropic(0.5), progress=False).value  # 0.25 * 4 outputs * 12 inputs
        12.0
    """
    check_known("method", method, get_args(Method))
    common = (model, data, covariance, ignore, output, draws, rtol, samples, batch_size, validity, seed, progress)
    task = _Task(*common, method)
    directions = getattr(task.covariance, "directions", None)
    if task.method == "auto" and (directions or getattr(task.covariance, "by_draws", False)):
        task.method = "jvp"
    if task.method != "jvp":
        return task.estimate(task.quadratic, once=True)

    def square_product(change: Change, number: int, start: int, images: Tensor) -> Tensor:
        total = torch.zeros(len(images), dtype=torch.float64)
        for d in directions or (change,):
            outputs, product = linear_outputs(model, images, d, output)
            task.check_finite(number, images, outputs)
            total += product.double().square().sum(1).cpu()
        return total

    return task.estimate(square_product, once=bool(directions))


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
    output: ReadRows = logits_of,
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
        seed: Seeds the draws.
        progress: Show a progress bar.

    Returns:
        `Estimate`; its standard error is over samples and draws together.

    Raises:
        ArgumentError, DataError, ModelError, NonFiniteError: As for `trace_form`.

    Example:
        >>> from jbrprune.tpv import Isotropic
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
        >>> found = empirical(net, torch.ones(64, 3, 2, 2), Isotropic(0.5), draws=400, progress=False)
        >>> abs(found.value - 12) < 3 * found.standard_error
        True
    """
    common = (model, data, covariance, ignore, output, draws, rtol, samples, batch_size, validity, seed, progress)
    task = _Task(*common, "empirical")
    applied = getattr(task.covariance, "applied", None)
    unchanged: dict[int, Tensor] = {}

    def square_change(change: Change, number: int, start: int, images: Tensor) -> Tensor:
        if number not in unchanged:
            unchanged[number] = outputs_of(model, images, output).cpu()
            task.check_finite(number, images, unchanged[number])
        if applied is None:
            outputs = change_outputs(model, images, change, output)
        else:
            with applied(model):
                outputs = outputs_of(model, images, output)
        return (outputs.double().cpu() - unchanged[number].double()).square().sum(1)

    return task.estimate(square_change)


def draw_signs(seed: int, first: int, samples: int, outputs: int) -> Tensor:
    """``[samples, outputs]`` int8 random signs; those of a sample depend on the seed and its number only."""
    generator, rows = torch.Generator(), []
    for number in range(first, first + samples):
        generator.manual_seed(seed * 1_000_003 + number)
        rows.append(2 * torch.randint(0, 2, (outputs,), generator=generator, dtype=torch.int8) - 1)
    return torch.stack(rows)


@dataclass(eq=False)
class _Task:
    """Arguments of both estimators, checked; the images, known to be the same in every pass, are shared by the ranks.

    After construction ``covariance`` knows its model, and ``weights`` are those that are perturbed.
    """

    model: nn.Module
    data: object
    covariance: Any
    ignore: Sequence[str]
    output: ReadRows
    draws: int
    rtol: float
    samples: int | None
    batch_size: int
    validity: bool
    seed: int
    progress: bool
    method: str
    outputs: int = 0
    seen: int | None = None
    head: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("draws", self.draws)):
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}.")
        if not 0 <= self.rtol < 1:
            raise ArgumentError(f"rtol must satisfy 0 <= rtol < 1, got {self.rtol}.")
        check_weights(self.model)
        refuse_masked(self.model)
        self.weights = {name: p.detach() for name, p in self.model.named_parameters() if p.is_floating_point()}
        modules = [name for name, _ in self.model.named_modules() if name]
        for name in match_names([*modules, *self.weights], self.ignore, "module and no parameter"):
            self.weights.pop(name, None)
        if not self.weights:
            raise ModelError(f"{type(self.model).__name__} has no parameter that can be perturbed. All in `ignore`?")
        if hasattr(self.covariance, "of"):
            self.covariance = self.covariance.of(self.model, self.weights)
        if not isinstance(self.covariance, Covariance):
            kind = type(self.covariance).__name__
            raise ArgumentError(f"{kind} is not a covariance: it needs quadratic(gradients) and sample(generator).")

    def estimate(self, work: Callable[[Change, int, int, Tensor], Tensor], *, once: bool = False) -> Estimate:
        """Estimate from what ``work`` finds for every sample under every draw; ``once``: the samples share no draws."""
        began, generator = time.perf_counter(), torch.Generator().manual_seed(self.seed)
        once = once or getattr(self.covariance, "fixed", False)
        unit = "squared logits" if self.output is logits_of else "squared outputs"
        walked = getattr(self.covariance, "walked", False)
        make = partial(Estimate, shared=not once, walked=walked, method=self.method, seed=self.seed, unit=unit)
        columns: list[Tensor] = []
        found, first, close = make(torch.empty(0, 1), draws=0), {}, 0
        for draw in range(1, (1 if once else self.draws) + 1):
            change = self.covariance.sample(generator) if self.method in ("jvp", "empirical") else {}
            check_change(change, self.weights)
            first = first or change
            parts: list[Tensor] = []
            for values in self.visit(f"Draw {draw}", partial(work, change)):
                parts.append(values)
                if once and self.has_converged(make(torch.cat(parts)[:, None], draws=1)):
                    break
            columns.append(torch.cat(parts))
            found = make(torch.stack(columns, 1), draws=draw)
            close = close + 1 if self.has_converged(found) else 0
            if draw >= LEAST_DRAWS and close >= 2:
                break
        method = distributed.broadcast(self.method)  # a rank without images has not chosen it
        stopped = "rtol" if close else "budget"
        found = replace(found, method=method, seconds=time.perf_counter() - began, stopped=stopped)
        head = distributed.broadcast(self.head) if self.validity else None
        if head is not None:
            direction = first or self.covariance.sample(torch.Generator().manual_seed(self.seed))
            valid = taylor_error(self.model, head, direction, output=self.output, progress=False)
            found = replace(found, validity=valid)
        if distributed.rank() == 0:
            found.warn()
        return found

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
        mine, position = self._read_images(parts, what), 0
        waiting: dict[int, Tensor] = {}
        while True:
            own: dict[int, Tensor] = {}
            with distributed.fail_together():
                for number, start, images in islice(mine, 1):
                    with inference_state(self.model):
                        own[start] = work(number, start, images)
                    if not torch.isfinite(own[start]).all():
                        raise NonFiniteError(f"{what}, batch {number}: the changed outputs contain NaN or Inf.")
            answers = {start: values for found in distributed.gather(own) for start, values in found.items()}
            if not answers:
                break
            waiting |= answers
            while position in waiting:
                values = waiting.pop(position)
                position += len(values)
                yield values
        if self.samples is None:  # else the ranks stop reading at different places
            parts.check()
        if position == 0:
            raise DataError(f"The data ({type(self.data).__name__}) hold no image for any rank.")

    def _read_images(self, parts: distributed.Parts, what: str) -> Iterator[tuple[int, int, Tensor]]:
        """One pass over the own part: the number of each batch, that of its first image, and the images."""
        number = seen = 0
        for start, batch in tqdm(parts, what, unit="batch", disable=not self.progress, leave=False):
            images = batch.images.detach()[: None if self.samples is None else max(0, self.samples - start)]
            if not len(images):
                break
            seen = zlib.crc32(images.cpu().contiguous().view(torch.uint8).numpy().tobytes(), seen)
            images = images.to(device_of(self.model))
            self.head = images if self.head is None else self.head
            yield number, start, images
            number += 1
        if self.seen not in (None, seen):
            raise DataError(
                f"The {number} batches are not those of the first pass: the data are shuffled or augmented anew every "
                "time they are read. Use shuffle=False, or pass a tensor or a list of batches."
            )
        self.seen = seen

    def has_converged(self, found: Estimate) -> bool:
        """Whether the relative standard error is small enough to stop."""
        return self.rtol > 0 and found.samples >= LEAST_SAMPLES and found.relative_error <= self.rtol

    def check_finite(self, number: int, images: Tensor, outputs: Tensor) -> None:
        """Raise a NonFiniteError that names the module which makes NaN or Inf."""
        if not torch.isfinite(outputs).all():
            raise_nonfinite(self.model, images, f"Batch {number}: the outputs")

    def quadratic(self, change: Change, number: int, start: int, images: Tensor) -> Tensor:
        """``[n]`` sum over outputs of g^T C g with g = J^T m, m the unit vectors or random signs."""
        if number == 0:
            outputs = outputs_of(self.model, images, self.output)
            self.check_finite(number, images, outputs)
            if self.output is logits_of:
                check_samples_apart(self.model, images, ())
            self.outputs = outputs.shape[1]
            if self.method == "auto":
                self.method = "exact" if self.outputs <= EXACT_OUTPUTS else "projection"
            if self.method == "exact" and self.outputs > MOST_EXACT:
                raise ArgumentError(f"'exact' takes a backward for each of {self.outputs:,} outputs. Use 'projection'.")

        def run(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
            outputs = outputs_of(self.model, images, self.output, weights)
            return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

        if self.method == "exact":
            directions = torch.eye(self.outputs).expand(len(images), -1, -1)
        else:
            directions = draw_signs(self.seed, start, len(images), self.outputs)[:, None]
        total = torch.zeros(len(images), dtype=torch.float64)
        for m in directions.to(images.device).unbind(1):
            parts = []
            for gradients, outputs in sample_gradients(run, self.weights, images, m):
                self.check_finite(number, images, outputs)
                value = self.covariance.quadratic(gradients)
                if value.shape != outputs.shape[:1]:
                    raise ArgumentError(f"quadratic() must give {list(outputs.shape[:1])}, got {list(value.shape)}.")
                if not torch.isfinite(value).all():
                    wrong = [name for name, g in gradients.items() if not torch.isfinite(g).all()]
                    raise NonFiniteError(
                        f"g^T C g contains NaN or Inf, and so do the gradients g by {wrong[:3]}; the outputs do not. A "
                        "square root of zero or an overflow in half precision does that; try float32."
                    )
                parts.append(value.cpu().double())
            total += torch.cat(parts)
        return total
