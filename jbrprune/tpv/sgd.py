"""Noise of stochastic gradient descent: its stationary covariance, and the trajectory itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.criteria.passes import check_known
from jbrprune.data.batches import Batch, concatenate, materialise
from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.models import preserve
from jbrprune.models.preserve import copy_model, logits_of
from jbrprune.tpv.covariances import Change
from jbrprune.tpv.gradients import Gradients
from jbrprune.tpv.responses import linear_outputs, outputs_of

Loss = Literal["cross_entropy", "mse"]
LOSSES = ("cross_entropy", "mse")


@dataclass(frozen=True)
class Trajectory:
    r"""SGD around w* on the loss + proximity \|w - w*\|^2, in eval mode (norms keep their statistics).

    Attributes:
        momentum: Of SGD; it multiplies the stationary covariance by about 1 / (1 - momentum).
        proximity: Weight of the penalty; without any, directions in which the loss is flat diffuse without end.
        burn_in: Steps before the first draw. Where the loss is flat, the walk becomes stationary after several times
            (1 - momentum) / (2 lr proximity) steps only; a TPV that still drifts is warned of.
        every: Steps from one draw to the next. Draws that are close are alike; the standard error allows for it, by
            the correlation of each with the one before.
    """

    momentum: float = 0.9
    proximity: float = 1e-3
    burn_in: int = 200
    every: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or not self.proximity >= 0:
            raise ArgumentError(
                f"momentum must satisfy 0 <= momentum < 1, proximity be at least 0; got {self.momentum}, "
                f"{self.proximity}."
            )
        if self.burn_in < 0 or self.every < 1:
            raise ArgumentError(f"burn_in must be at least 0, every at least 1; got {self.burn_in}, {self.every}.")


@dataclass(frozen=True, eq=False)
class SGDNoise:
    r"""C = lr / (2 B) G: the stationary covariance of SGD's noise, proportional to the curvature.

    G = (1/N) sum_i J(x_i)^T H_i J(x_i) is the Gauss-Newton matrix of the loss on the N images of ``data``: H_i =
    diag(p_i) - p_i p_i^T with p_i = softmax(f(x_i)) for ``cross_entropy``, the identity for ``mse`` (which is half the
    squared error, summed over outputs). G needs no labels; it is the covariance of the gradients under labels drawn
    from the model. C is what SGD settles in around w* under a restoring force of unit strength (dw = -dw dt + sqrt(lr/B
    G) dW); under the loss' own curvature G it would be lr/(2B) I on the range of G (Mandt et al., JMLR 2017), which is
    ``Isotropic(math.sqrt(lr / (2 * B)))``.

    As a trace form, C is expensive to apply to many gradients, so ``method="auto"`` draws from it.

    Args:
        lr: Learning rate.
        batch_size: B.
        data: Images on which the curvature is taken, and the trajectory runs; labels are used by the trajectory if
            they are there, else they are drawn from the model's own distribution.
        loss: ``cross_entropy`` or ``mse`` (whose targets are the model's own outputs plus unit normal noise).
        trajectory: Run SGD for every draw, in the place of the stationary law: for `empirical`, and for `trace_form`
            by ``jvp``, its default here. It has no covariance in closed form: ``exact`` and ``projection`` refuse it.
        samples: Images to keep, at most.

    Raises:
        ArgumentError: A learning rate or batch size that is not positive, an unknown loss.

    Source:
        Arpit, arXiv 2512.11089 (SGD noise); Gauss-Newton as covariance of gradients: Martens, JMLR 2020.

    Example:
        >>> SGDNoise(0.1, 32, torch.randn(8, 3, 2, 2)).loss
        'cross_entropy'
    """

    lr: float
    batch_size: int
    data: object
    loss: Loss = "cross_entropy"
    trajectory: Trajectory | None = None
    samples: int | None = 512

    def __post_init__(self) -> None:
        check_known("loss", self.loss, LOSSES)
        if not 0 < self.lr < math.inf or self.batch_size < 1:
            raise ArgumentError(f"lr and batch_size must be positive, got {self.lr} and {self.batch_size}.")

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> StationarySGD:
        """The covariance of these weights."""
        batches = materialise(self.data, images=self.samples, batch_size=64)
        stationary = StationarySGD(model, dict(weights), batches, self.lr / (2 * self.batch_size), self.loss)
        return stationary if self.trajectory is None else _Walk(**vars(stationary), how=self, path=self.trajectory)


@dataclass(eq=False)
class StationarySGD:
    """C = scale * G.

    Attributes:
        model: The model at w*.
        weights: What is perturbed.
        batches: The images that G is the mean over.
        scale: lr / (2 B).
        loss: Whose curvature.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    batches: list[Batch]
    scale: float
    loss: str

    by_draws = True

    def quadratic(self, gradients: Gradients) -> Tensor:
        r"""``[B]`` scale / N sum_i \|H_i^(1/2) J(x_i) g\|^2: one Jacobian-vector product per gradient and image."""
        found = [self._curvature({name: gradients[name][n] for name in gradients}) for n in range(gradients.samples)]
        return self.scale * torch.stack(found)

    def sample(self, generator: torch.Generator) -> Change:
        """sqrt(scale / N) sum_i J(x_i)^T H_i^(1/2) e_i with standard normal e_i: one backward over the images."""
        total = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for images in self._images():
            with preserve.inference_state(self.model, gradients=True):
                leaves = dict(self.model.named_parameters())
                outputs = outputs_of(self.model, images)
                noise = torch.randn(outputs.shape, generator=generator).to(outputs)
                product = (outputs * _root(outputs.detach(), noise, self.loss)).sum()
                found = torch.autograd.grad(product, [leaves[name] for name in total], allow_unused=True)
            for name, gradient in zip(total, found):
                if gradient is not None:
                    total[name] += gradient
        factor = math.sqrt(self.scale / sum(map(len, self.batches)))
        return {name: factor * value for name, value in total.items()}

    def _curvature(self, direction: Change) -> Tensor:
        """d^T G d."""
        total = torch.zeros((), dtype=torch.float64)
        for images in self._images():
            with preserve.inference_state(self.model):
                outputs, product = linear_outputs(self.model, images, direction, logits_of)
            total += _root_transposed(outputs, product, self.loss).double().square().sum().cpu()
        return total / sum(map(len, self.batches))

    def _images(self) -> list[Tensor]:
        device = preserve.device_of(self.model)
        return [batch.images.to(device) for batch in self.batches]


def _root(outputs: Tensor, vector: Tensor, loss: str) -> Tensor:
    """``[B, K]`` A v with A A^T = H: A = diag(sqrt p) - p sqrt(p)^T."""
    if loss == "mse":
        return vector
    p = outputs.softmax(1)
    return p.sqrt() * vector - p * (p.sqrt() * vector).sum(1, keepdim=True)


def _root_transposed(outputs: Tensor, vector: Tensor, loss: str) -> Tensor:
    """``[B, K]`` A^T v."""
    if loss == "mse":
        return vector
    p = outputs.softmax(1)
    return p.sqrt() * (vector - (p * vector).sum(1, keepdim=True))


@dataclass(eq=False)
class _Walk(StationarySGD):
    """Draws along a trajectory of SGD."""

    how: SGDNoise
    path: Trajectory
    walker: nn.Module | None = None
    velocity: dict[str, Tensor] = field(default_factory=dict)

    walked = True

    def quadratic(self, gradients: Gradients) -> Tensor:
        """There is none.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "A trajectory of SGD can be drawn from, but its covariance is not known: use method='jvp' (or 'auto'), or "
            "empirical(). The stationary law, which is another covariance, is SGDNoise without trajectory=."
        )

    def sample(self, generator: torch.Generator) -> Change:
        """Where the trajectory is, relative to w*, after the burn-in, then ``every`` steps later."""
        if self.walker is None:
            self.walker = copy_model(self.model).eval()
            self._walk(self.path.burn_in, generator)
        self._walk(self.path.every, generator)
        here = dict(self.walker.named_parameters())
        return {name: here[name].detach() - weight for name, weight in self.weights.items()}

    def _walk(self, steps: int, generator: torch.Generator) -> None:
        walker: nn.Module = self.walker  # type: ignore[assignment]
        whole = concatenate(self.batches)
        device = preserve.device_of(walker)
        leaves = {name: p for name, p in walker.named_parameters() if name in self.weights}
        for _ in range(steps):
            picked = torch.randperm(len(whole), generator=generator)[: self.how.batch_size]
            images = whole.images[picked].to(device)
            labels = None if whole.labels is None else whole.labels[picked].to(device)
            with preserve.inference_state(walker, gradients=True):
                loss = self._loss(outputs_of(walker, images), images, labels, generator)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            if not torch.isfinite(loss):
                value = float(loss.detach())
                raise NonFiniteError(
                    f"SGD around w* diverged: its loss is {value}. Lower lr={self.how.lr}, or the momentum."
                )
            self._step(leaves, found)

    def _step(self, leaves: Mapping[str, Tensor], found: tuple[Tensor | None, ...]) -> None:
        with torch.no_grad():
            for (name, leaf), gradient in zip(leaves.items(), found):
                pull = 2 * self.path.proximity * (leaf - self.weights[name])
                slope = pull if gradient is None else gradient + pull
                self.velocity[name] = self.path.momentum * self.velocity.get(name, 0.0) + slope
                leaf -= self.how.lr * self.velocity[name]

    def _loss(self, outputs: Tensor, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        with preserve.inference_state(self.model):
            dense = outputs_of(self.model, images)
        if self.loss == "mse":
            target = dense + torch.randn(dense.shape, generator=generator).to(dense)
            return 0.5 * (outputs - target).square().sum(1).mean()
        if labels is None:
            labels = torch.multinomial(dense.softmax(1).cpu(), 1, generator=generator)[:, 0].to(dense.device)
        return F.cross_entropy(outputs, labels)
