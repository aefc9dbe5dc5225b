"""Gradients of single weights, added up over a pass: their squares per sample, or those of their means over batches.

`Means` asks autograd. `Squares` sees every use of a scored parameter through `jbrprune.criteria.recording`, adds the
squares up when the gradient of the function's output arrives, and everything is freed before that of the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from jbrprune.criteria.factors import wide
from jbrprune.criteria.recording import Recorder, Use
from jbrprune.criteria.squares import Place, add_squares
from jbrprune.errors import ModelError
from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of
from jbrprune.sparsity.masks import Slot, fresh
from jbrprune.structure.verification import check_samples_apart, two_images


class _Undone:
    """The sums as they are now; to call it puts them back. Before anything was added, no copy is needed."""

    def __init__(self, sums: Sequence[Tensor], empty: bool) -> None:
        self._sums = sums
        self._before = None if empty else [total.clone() for total in sums]

    def __call__(self) -> None:
        for number, total in enumerate(self._sums):
            total.zero_() if self._before is None else total.copy_(self._before[number])


def _zeros(like: Tensor, least: torch.dtype | None = None) -> Tensor:
    dtype = wide(like.device) if least is None else torch.promote_types(like.dtype, least)
    with torch.inference_mode(False):  # a tensor of inference mode could not be added to later
        return torch.zeros(like.shape, dtype=dtype, device=like.device)


class Means:
    """Sums the gradient of consecutive samples; squares it batch by batch, or keeps the sum (``signed``)."""

    gradients = True

    def __init__(self, scored: Sequence[Slot], batch: int | None) -> None:
        self.scored = scored
        self.batch = batch
        self.filled = 0
        self.sums = [_zeros(s.stored) for s in scored]
        self.open = self.sums if batch is None else [_zeros(s.stored, torch.float32) for s in scored]
        self.empty = True

    def mark(self) -> Callable[[], None]:
        """Remember the sums; what comes back undoes what is added from now on."""
        filled, undone = self.filled, _Undone([*self.sums, *self.open], self.empty)

        def undo() -> None:
            undone()
            self.filled = filled

        return undo

    def check(self, images: Tensor) -> None:
        """Nothing to check: autograd sees every use of a parameter, and a mean needs no samples apart."""

    def recording(self, samples: int) -> AbstractContextManager[object]:
        """Nothing to record."""
        return nullcontext()

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of ``[n]`` losses, cut where a batch is full."""
        start = 0
        while start < len(losses):
            stop = len(losses) if self.batch is None else min(len(losses), start + self.batch - self.filled)
            leaves = [s.stored for s in self.scored]
            more = stop < len(losses)
            found = torch.autograd.grad(losses[start:stop].sum(), leaves, retain_graph=more, allow_unused=True)
            for total, gradient in zip(self.open, found):
                if gradient is not None:
                    total += gradient
            self.filled += stop - start
            start = stop
            if self.filled == self.batch:
                self._close()
        self.empty = False

    def finish(self) -> dict[str, Tensor]:
        """Name -> sum over batches of n_b (mean w g)^2, or for ``signed`` the sum of w g."""
        if self.batch is not None and self.filled:
            self._close()  # a last, smaller batch counts by its size
        power = 1 if self.batch is None else 2
        # The gradient of weight_orig carries the mask already.
        pairs = zip(self.scored, self.sums)
        return {s.name: (total * s.stored.detach().to(total) ** power).cpu() for s, total in pairs}

    def _close(self) -> None:
        for sums, total in zip(self.sums, self.open):
            sums += total.square_().div_(self.filled)
            total.zero_()
        self.filled = 0


class Squares:
    """Collects sum_n g_j(x_n)^2 of every scored parameter, layer by layer, while the backward runs."""

    gradients = False

    def __init__(self, model: nn.Module, scored: Sequence[Slot], max_memory: int) -> None:
        self.model = model
        self.scored = scored
        self.max_memory = max_memory
        self.sums = {s.name: _zeros(s.stored) for s in scored}
        self.seen: set[str] = set()
        self._recorder: Recorder | None = None
        self.empty = True

    def mark(self) -> Callable[[], None]:
        """Remember the sums; what comes back undoes what is added from now on."""
        undone = _Undone(list(self.sums.values()), self.empty)

        def undo() -> None:
            undone()
            self._recorder = None

        return undo

    @contextmanager
    def recording(self, samples: int) -> Iterator[None]:
        """Context of a forward pass over ``samples`` images."""
        recorder = self._recorder = Recorder(
            {s.name: s.used for s in self.scored}, samples, lambda name, uses: self.add(name, uses, samples)
        )
        masked = [s for s in self.scored if s.mask is not None]

        def identify_again(module: nn.Module, args: tuple, kwargs: dict) -> None:
            recorder.identify({s.name: s.used for s in masked if s.module is module})

        names = [s.name.rpartition(".")[0] for s in masked]
        # Behind the hook of torch.nn.utils.prune, which makes the effective weight anew in every forward pass.
        with preserve.hooked(self.model, forward_pre=dict.fromkeys(names, identify_again)), recorder:
            yield
        self.seen |= recorder.seen

    def backward(self, losses: Tensor) -> None:
        """Add the squares of the gradients of ``losses`` that the recorded forward pass has led to."""
        recorder, self._recorder = self._recorder, None
        recorder.backward(losses)  # type: ignore[union-attr]
        self.empty = False

    def add(self, name: str, uses: Sequence[Use], samples: int) -> None:
        """Add what all uses of a parameter contribute: the sum of their gradients per sample, squared."""
        calls = [(use.call, use.gradient) for use in uses]
        kinds = [use.kinds[name] for use in uses]
        add_squares(self.sums[name], calls, kinds, samples, Place(name, self.max_memory))  # type: ignore[arg-type]

    def finish(self) -> dict[str, Tensor]:
        """Name -> sum over samples of (w g)^2, w the effective weight."""
        return {s.name: (self.sums[s.name] * s.effective.to(self.sums[s.name]).square()).cpu() for s in self.scored}

    def check(self, images: Tensor) -> None:
        """Compare with autograd on two images, through random directions of the logits.

        Raises:
            ModelError: They differ, or autograd cannot differentiate by the weights at all.
        """
        check_samples_apart(self.model, images, ())
        pair = two_images(images)
        with torch.enable_grad(), self.recording(2):
            logits = logits_of(self.model(pair.clone()))
        if len(logits) != 2:
            raise ModelError(f"2 images went in, {len(logits)} rows of logits came out.")
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        if not logits.requires_grad or not torch.isfinite(logits).all():
            return  # the pass itself says what is wrong
        with torch.enable_grad():
            losses = (logits * direction).sum(1)
        self.backward(losses)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(logits.dtype, 0.3)
        found = list(self._differences(pair, direction))
        # A gradient that is zero but for rounding, such as that of a bias of attention keys, has no digits to compare.
        floor = (100 * torch.finfo(logits.dtype).eps) ** 2 * sum(expected for _, expected, _ in found)
        wrong = [s for s, expected, difference in found if not difference <= tolerance * expected + floor]  # or NaN
        if wrong:
            raise ModelError(_refusal(wrong, self.seen))
        for total in self.sums.values():
            total.zero_()

    def _differences(self, pair: Tensor, direction: Tensor) -> Iterable[tuple[Slot, float, float]]:
        """Parameter, sum of its squared gradients, and sum of the absolute differences to what was collected."""
        with preserve.requiring_grad(self.model, True), torch.enable_grad(), fresh(self.model):
            logits = logits_of(self.model(pair.clone()))
            expected = [0.0] * len(self.scored)
            for sample in range(2):
                product = (logits[sample] * direction[sample]).sum()
                try:
                    found = torch.autograd.grad(
                        product, [s.stored for s in self.scored], retain_graph=sample == 0, allow_unused=True
                    )
                except RuntimeError as error:
                    raise ModelError(f"The model cannot be differentiated by its weights: {error}") from error
                for i, (scored, gradient) in enumerate(zip(self.scored, found)):
                    if sample == 0 and scored.mask is not None:
                        self.sums[scored.name] *= scored.mask
                    if gradient is not None:
                        square = gradient.to(self.sums[scored.name]).square_()
                        expected[i] += float(square.sum())
                        self.sums[scored.name] -= square
        return [(s, e, float(self.sums[s.name].abs().sum())) for s, e in zip(self.scored, expected)]


def _refusal(wrong: Sequence[Slot], seen: set[str]) -> str:
    first = next((s for s in wrong if s.name not in seen), wrong[0])
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    what = f"{first.name} ({type(first.module).__name__}){more}"
    if first.name not in seen:
        return (
            f"{what}: the parameter takes part in the logits, but not as it is: its class transforms it first (as "
            "weight standardisation does), or uses it in a function that is not known here. Squares per sample "
            "would not be exact. Put it into `ignore`."
        )
    return (
        f"{what}: squares per sample differ from those of autograd on two images. Samples influence each other (a "
        "batch norm without stored statistics?), or the first dimension of this layer's input is not the batch, or the "
        "parameter is used a second time in another way, or the forward pass is random in eval mode. Put it into "
        "`ignore`, or make the model treat samples apart."
    )
