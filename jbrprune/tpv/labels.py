"""Noise in the labels of a regression onto the model's own outputs: closed form, and retrained copies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from jbrprune.criteria.passes import own
from jbrprune.data.batches import concatenate, materialise
from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.tpv.covariances import Change
from jbrprune.tpv.gradients import Gradients
from jbrprune.tpv.recorded import recorded
from jbrprune.tpv.responses import outputs_of
from jbrprune.tpv.validity import TPVWarning

MOST_ENTRIES = 1 << 27
"""Entries of the Jacobian of all samples, outputs and weights beyond which the closed form is refused."""

Train = Callable[[nn.Module, Tensor, Tensor], object]
"""``train(model, images, targets)`` changes the model in place."""


@dataclass(frozen=True)
class Retraining:
    r"""Adam on (1/N) sum_i \|f(x_i) - y_i\|^2 + proximity \|w - w*\|^2, all images in every step, in eval mode.

    Attributes:
        steps: Number of steps.
        lr: Learning rate; it falls to zero along a half cosine.
    """

    steps: int = 300
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf:
            raise ArgumentError(f"steps must be at least 1 and lr positive, got {self.steps} and {self.lr}.")


@dataclass(frozen=True, eq=False)
class LabelNoise:
    r"""Training on noisy labels: w + dw minimises (1/N) sum_i \|f(x_i; w) - f(x_i; w*) - e_i\|^2 + proximity \|dw\|^2.

    To first order dw = M e with M = J^T (J J^T + N proximity I)^+, the regularised pseudo-inverse of J ``[N K, P]`` on
    all images: C = sigma^2 M M^T. It needs J as a matrix, so small nets only.

    Args:
        sigma: Standard deviation of the noise e on every output.
        data: The training images; labels are not looked at, the targets are the model's own outputs plus noise.
        proximity: Weight of the penalty; 0: the pseudo-inverse.
        retrain: What `empirical` does for every draw. None: the closed form. A `Retraining`, or a function
            ``train(model, images, targets)`` that trains the copy it gets, in place and in eval mode. Gradients are
            on, what is perturbed requires them, and torch's global randomness is seeded from the draw.
        samples: Images to keep, at most.

    Raises:
        ArgumentError: sigma that is not positive, a negative proximity; a Jacobian that is too large for the closed
            form; a training function that does not move the weights.

    Source:
        Arpit, arXiv 2512.11089 (label noise).

    Example:
        >>> LabelNoise(0.1, torch.randn(8, 3, 2, 2)).proximity
        0.001
    """

    sigma: float
    data: object
    proximity: float = 1e-3
    retrain: Retraining | Train | None = None
    samples: int | None = 1000

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf or not 0 <= self.proximity < math.inf:
            raise ArgumentError(
                f"sigma must be positive and proximity at least 0, got {self.sigma} and {self.proximity}."
            )

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Relabelled:
        """The covariance of these weights."""
        images = concatenate(materialise(self.data, images=self.samples)).images
        return Relabelled(model, dict(weights), images, self)


@dataclass(frozen=True, eq=False)
class Relabelled:
    """C = sigma^2 M M^T.

    Attributes:
        model: The model at w*.
        weights: What is perturbed.
        images: The training images.
        how: The noise, and what is done with it.
        warned: What has been said already.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    images: Tensor
    how: LabelNoise
    warned: set[str] = field(default_factory=set)

    def quadratic(self, gradients: Gradients) -> Tensor:
        r"""``[B]`` sigma^2 \|(J J^T + N proximity I)^+ J g\|^2."""
        jacobian, inverse = self._solved
        g = torch.cat([gradients[name].flatten(1) for name in self.weights], 1).double().to(jacobian.device)
        return self.how.sigma**2 * (inverse @ (jacobian @ g.T)).square().sum(0)

    def sample(self, generator: torch.Generator) -> Change:
        """M e, or how the retrained copy differs from w*."""
        if self.how.retrain is not None:
            return self._retrained(self.how.retrain, generator)
        jacobian, inverse = self._solved
        flat = jacobian.T @ (inverse @ self._noise(torch.Size([len(inverse)]), generator).to(inverse))
        parts = flat.split([w.numel() for w in self.weights.values()])
        return {name: part.view_as(w).to(w) for (name, w), part in zip(self.weights.items(), parts)}

    def _noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return self.how.sigma * torch.randn(shape, generator=generator, dtype=torch.float64)

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        """J ``[N K, P]`` and (J J^T + N proximity I)^+, in float64."""
        images = self.images.to(preserve.device_of(self.model))
        with preserve.inference_state(self.model):
            run = recorded(self.model, images, list(self.weights), logits_of)
            n, outputs = run.outputs.shape
            size = sum(w.numel() for w in self.weights.values())
            if n * outputs * size > MOST_ENTRIES:
                raise ArgumentError(
                    f"The closed form of label noise needs a Jacobian of {n * outputs:,} x {size:,} entries. Use fewer "
                    "images (`samples=`), a smaller net, or empirical() with retrain=Retraining()."
                )
            rows = [self._rows(run.gradients(m.expand(n, -1))) for m in torch.eye(outputs)]
        jacobian = torch.stack(rows, 1).flatten(0, 1)
        values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
        ridge = n * self.how.proximity
        least = torch.finfo(torch.float32).eps * values.max() if ridge == 0 else -ridge
        inverted = torch.where(values > least, 1 / (values + ridge), 0.0)
        return jacobian, vectors * inverted @ vectors.T

    def _rows(self, gradients: Gradients) -> Tensor:
        return torch.cat([gradients[name].flatten(1) for name in self.weights], 1).double()

    @torch.inference_mode(False)  # copies that are made in inference mode cannot be trained
    def _retrained(self, retrain: Retraining | Train, generator: torch.Generator) -> Change:
        copy = copy_model(self.model).eval()
        for name, p in copy.named_parameters():
            p.requires_grad_(name in self.weights)
        images = own(self.images.to(preserve.device_of(copy)))
        with preserve.inference_state(self.model):
            targets = outputs_of(self.model, images)
        targets = targets + self._noise(targets.shape, generator).to(targets)
        before, buffers = self._loss(copy, images, targets), {n: b.clone() for n, b in copy.named_buffers()}
        if isinstance(retrain, Retraining):
            self._train(copy, images, targets, retrain)
        else:
            seed = int(torch.randint(1 << 62, (), generator=generator))
            with preserve.same_randomness(preserve.device_of(copy)), torch.enable_grad():
                torch.manual_seed(seed)
                retrain(copy, images, targets)
        self._check_buffers(copy, buffers)
        after = self._loss(copy, images, targets)
        here = dict(copy.named_parameters())
        change = {name: here[name].detach() - weight for name, weight in self.weights.items()}
        self._check(change, before, after)
        return change

    def _loss(self, copy: nn.Module, images: Tensor, targets: Tensor) -> float:
        with preserve.inference_state(copy):
            return float((outputs_of(copy, images) - targets).square().sum(1).mean())

    def _train(self, copy: nn.Module, images: Tensor, targets: Tensor, how: Retraining) -> None:
        leaves = {name: p for name, p in copy.named_parameters() if name in self.weights}
        optimiser = torch.optim.Adam(leaves.values(), lr=how.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how.steps)
        with torch.enable_grad():
            for _ in range(how.steps):
                optimiser.zero_grad()
                loss = (outputs_of(copy, images) - targets).square().sum(1).mean()
                for name, leaf in leaves.items():
                    loss = loss + self.how.proximity * (leaf - self.weights[name]).square().sum()
                loss.backward()
                optimiser.step()
                schedule.step()

    def _check(self, change: Change, before: float, after: float) -> None:
        if not math.isfinite(after):
            raise NonFiniteError("Retraining diverged: the loss is not finite. Lower the learning rate.")
        if not any(bool(d.any()) for d in change.values()):
            raise ArgumentError("The training function does not move the weights: no perturbation, nothing to measure.")
        if not after < before:
            self._warn(
                "loss",
                f"The loss of retraining on noisy labels does not fall: {before:.4g} before, {after:.4g} after. The "
                "learning rate is too large, or a batch norm was trained in train mode. The TPV is not that of label "
                "noise.",
            )

    def _check_buffers(self, copy: nn.Module, before: Mapping[str, Tensor]) -> None:
        moved = [name for name, value in copy.named_buffers() if not torch.equal(value, before[name])]
        if moved:
            self._warn(
                "buffers",
                f"The training function moved buffers: {moved[0]} (and {len(moved) - 1} more). A batch norm that is in "
                "train mode, even for a while, moves its statistics with the weights, which is no perturbation of the "
                "weights, and is not seen here. Train in eval mode.",
            )

    def _warn(self, what: str, text: str) -> None:
        if what not in self.warned:  # every draw would say the same
            self.warned.add(what)
            warnings.warn(text, TPVWarning, stacklevel=4)
