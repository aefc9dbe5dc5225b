"""Noise of training: of stochastic gradient descent around the weights, and of the labels of a regression."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.criteria.weight_relevance import sample_gradients
from jbrprune.data.batches import Batch, attach_reference, class_indices, concatenate, materialise
from jbrprune.errors import ArgumentError, NonFiniteError, check_known
from jbrprune.models.preserve import copy_model, device_of, inference_state, logits_of
from jbrprune.tpv.covariances import Change, Gradients
from jbrprune.tpv.validity import TPVWarning, linear_outputs, outputs_of

Loss = Literal["cross_entropy", "mse"]
MOST_ENTRIES = 1 << 27
"""Entries of the Jacobian of all samples, outputs and weights beyond which the closed form is refused."""


# --- SGD -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    r"""SGD around w* on the loss + proximity \|w - w*\|^2, in eval mode (norms keep their statistics).

    Attributes:
        momentum: Momentum of SGD; it multiplies the stationary covariance by about 1 / (1 - momentum).
        proximity: Weight of the penalty; with 0, directions in which the loss is flat diffuse without end.
        burn_in: Steps before the first draw. Where the loss is flat, the walk becomes stationary only after several
            times (1 - momentum) / (2 lr proximity) steps; a TPV that still drifts is warned of.
        every: Steps from one draw to the next. Close draws are alike; the standard error allows for it by the
            correlation of each draw with the one before.
    """

    momentum: float = 0.9
    proximity: float = 1e-3
    burn_in: int = 200
    every: int = 20


@dataclass(frozen=True, eq=False)
class SGDNoise:
    r"""C = lr / (2 B) G: the stationary covariance of SGD's noise, proportional to the curvature.

    G = (1/N) sum_i J(x_i)^T H_i J(x_i) is the Gauss-Newton matrix of the loss on the N images of ``data``: H_i =
    diag(p_i) - p_i p_i^T with p_i = softmax(f(x_i)) for ``cross_entropy``, the identity for ``mse`` (half the squared
    error, summed over outputs). G needs no labels; it is the covariance of the gradients under labels drawn from the
    model. SGD around w* has the covariance C under a restoring force of unit strength (dw = -dw dt + sqrt(lr/B G) dW);
    under the loss' own curvature G it has lr/(2B) I on the range of G (Mandt et al., JMLR 2017), which is
    ``Isotropic(math.sqrt(lr / (2 * B)))``.

    The trace form has to apply C to many gradients, which is expensive, so ``method="auto"`` draws from C.

    Args:
        lr: Learning rate.
        batch_size: B.
        data: Images on which the curvature is taken, and the trajectory runs; the trajectory uses their labels, or
            draws labels from the model's own distribution where there are none.
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
        check_known("loss", self.loss, get_args(Loss))
        if not 0 < self.lr < math.inf or self.batch_size < 1:
            raise ArgumentError(f"lr and batch_size must be positive, got {self.lr} and {self.batch_size}.")

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> TrainingNoise:
        """The covariance of these weights."""
        batches = materialise(self.data, images=self.samples, batch_size=64)
        batches = [batch.to(device_of(model)) for batch in batches]
        with inference_state(model):
            batches = attach_reference(batches, [outputs_of(model, batch.images) for batch in batches])
        return TrainingNoise(model, weights, batches, self)


@dataclass(eq=False)
class TrainingNoise:
    """C = lr / (2 B) G, or draws along a trajectory of SGD.

    Attributes:
        model: The model at w*.
        weights: The weights that are perturbed.
        batches: The N images and the model's outputs, on its device.
        noise: Learning rate, batch size, loss and trajectory.
        walker: The copy of the model that moves along the trajectory; None before the first draw.
        velocity: Name -> velocity of the walker.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    batches: list[Batch]
    noise: SGDNoise
    walker: nn.Module | None = None
    velocity: dict[str, Tensor] = field(default_factory=dict)

    by_draws = True

    @property
    def walked(self) -> bool:
        """Whether draws follow from one another."""
        return self.noise.trajectory is not None

    @property
    def scale(self) -> float:
        """Factor of the sum over images: lr / (2 B N)."""
        return self.noise.lr / (2 * self.noise.batch_size) / sum(map(len, self.batches))

    def quadratic(self, gradients: Gradients) -> Tensor:
        r"""``[B]`` scale sum_i \|A_i^T J(x_i) g\|^2, A_i as in `sample`: one Jacobian-vector product per g and x_i.

        Raises:
            ArgumentError: There is a trajectory, whose covariance is not known.
        """
        if self.walked:
            raise ArgumentError("The covariance of a trajectory of SGD is not known: use method='jvp', or empirical().")
        total = torch.zeros(len(next(iter(gradients.values()))), dtype=torch.float64)
        for n in range(len(total)):
            for batch in self.batches:
                with inference_state(self.model):
                    direction = {name: g[n] for name, g in gradients.items()}
                    outputs, product = linear_outputs(self.model, batch.images, direction, logits_of)
                if self.noise.loss == "cross_entropy":
                    p = outputs.softmax(1)
                    product = p.sqrt() * (product - (p * product).sum(1, keepdim=True))
                total[n] += product.double().square().sum().cpu()
        return self.scale * total

    def sample(self, generator: torch.Generator) -> Change:
        """sqrt(scale) sum_i J(x_i)^T A_i e_i with standard normal e_i, one backward over the images; or steps further.

        A_i A_i^T = H_i; A_i = diag(sqrt p_i) - p_i sqrt(p_i)^T for ``cross_entropy``, the identity for ``mse``.
        """
        if self.noise.trajectory is not None:
            return self._walk(self.noise.trajectory, generator)
        change = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for batch in self.batches:
            with inference_state(self.model, gradients=True):
                leaves = dict(self.model.named_parameters())
                outputs = outputs_of(self.model, batch.images)
                e = torch.randn(outputs.shape, generator=generator).to(outputs)
                if self.noise.loss == "cross_entropy":
                    p = outputs.detach().softmax(1)
                    e = p.sqrt() * e - p * (p.sqrt() * e).sum(1, keepdim=True)
                found = torch.autograd.grad((outputs * e).sum(), [leaves[name] for name in change], allow_unused=True)
            for name, gradient in zip(change, found):
                if gradient is not None:
                    change[name] += math.sqrt(self.scale) * gradient
        return change

    def _walk(self, path: Trajectory, generator: torch.Generator) -> Change:
        """The walker's weights minus w*, after the burn-in, then ``every`` steps later."""
        steps = path.every
        if self.walker is None:
            self.walker = copy_model(self.model).eval()
            steps += path.burn_in
        whole = concatenate(self.batches)
        leaves = {name: p for name, p in self.walker.named_parameters() if name in self.weights}
        for _ in range(steps):
            picked = torch.randperm(len(whole), generator=generator)[: self.noise.batch_size]
            batch = whole.map(lambda tensor, picked=picked: tensor[picked])
            dense = cast(Tensor, batch.reference)
            labels = class_indices(batch.labels, (len(batch),), dense.shape[1])
            with inference_state(self.walker, gradients=True):
                outputs = outputs_of(self.walker, batch.images)
                if self.noise.loss == "mse":
                    targets = dense + torch.randn(dense.shape, generator=generator).to(dense)
                    loss = 0.5 * (outputs - targets).square().sum(1).mean()
                else:  # labels that are not there are drawn from the model at w*
                    if labels is None:
                        labels = torch.multinomial(dense.softmax(1).cpu(), 1, generator=generator)[:, 0]
                    loss = F.cross_entropy(outputs, labels.to(outputs.device))
                found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
            if not torch.isfinite(loss):
                raise NonFiniteError(f"SGD around w* diverged. Lower lr={self.noise.lr}, or the momentum.")
            with torch.no_grad():
                for (name, leaf), gradient in zip(leaves.items(), found):
                    slope = gradient + 2 * path.proximity * (leaf - self.weights[name])
                    self.velocity[name] = path.momentum * self.velocity.get(name, 0.0) + slope
                    leaf -= self.noise.lr * self.velocity[name]
        return {name: leaf.detach() - self.weights[name] for name, leaf in leaves.items()}


# --- labels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retraining:
    r"""Adam on (1/N) sum_i \|f(x_i) - y_i\|^2 + proximity \|w - w*\|^2, all images in every step, in eval mode.

    Attributes:
        steps: Number of steps.
        lr: Learning rate; it falls to zero along a half cosine.
    """

    steps: int = 300
    lr: float = 1e-3

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, proximity: float) -> None:
        """Train the parameters that require gradients, in place."""
        start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        optimiser = torch.optim.Adam(start, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        for _ in range(self.steps):
            optimiser.zero_grad()
            loss = (outputs_of(model, images) - targets).square().sum(1).mean()
            for p, before in start.items():
                loss = loss + proximity * (p - before).square().sum()
            loss.backward()
            optimiser.step()
            schedule.step()


@dataclass(frozen=True, eq=False)
class LabelNoise:
    r"""Training on noisy labels: w + dw minimises (1/N) sum_i \|f(x_i; w) - f(x_i; w*) - e_i\|^2 + proximity \|dw\|^2.

    To first order dw = M e with M = J^T (J J^T + N proximity I)^+, the regularised pseudo-inverse of J ``[N K, P]`` on
    all images: C = sigma^2 M M^T. It needs J as a matrix, so small nets only.

    Args:
        sigma: Standard deviation of the noise e on every output.
        data: The training images; labels are not looked at, the targets are the model's own outputs plus noise.
        proximity: Weight of the penalty; 0: the pseudo-inverse.
        retrain: How `empirical` retrains a copy for every draw. None: the closed form.
        samples: Images to keep, at most.

    Raises:
        ArgumentError: A Jacobian that is too large for the closed form.

    Source:
        Arpit, arXiv 2512.11089 (label noise).

    Example:
        >>> LabelNoise(0.1, torch.randn(8, 3, 2, 2)).proximity
        0.001
    """

    sigma: float
    data: object
    proximity: float = 1e-3
    retrain: Retraining | None = None
    samples: int | None = 1000

    def of(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Relabelled:
        """The covariance of these weights."""
        images = concatenate(materialise(self.data, images=self.samples)).images
        return Relabelled(model, weights, images.to(device_of(model)), self)


@dataclass(frozen=True, eq=False)
class Relabelled:
    """C = sigma^2 M M^T.

    Attributes:
        model: The model at w*.
        weights: The weights that are perturbed.
        images: The training images, on the model's device.
        noise: The noise, and what is done with it.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    images: Tensor
    noise: LabelNoise

    def quadratic(self, gradients: Gradients) -> Tensor:
        r"""``[B]`` sigma^2 \|(J J^T + N proximity I)^+ J g\|^2."""
        jacobian, inverse = self._pseudo_inverse
        return self.noise.sigma**2 * (inverse @ (jacobian @ self._flat(gradients).T)).square().sum(0)

    def sample(self, generator: torch.Generator) -> Change:
        """M e, or the difference of the retrained copy from w*."""
        if self.noise.retrain is not None:
            return self._retrain(self.noise.retrain, generator)
        jacobian, inverse = self._pseudo_inverse
        flat = jacobian.T @ (inverse @ self._draw(torch.Size([len(inverse)]), generator).to(inverse))
        parts = flat.split([w.numel() for w in self.weights.values()])
        return {name: part.view_as(w).to(w) for (name, w), part in zip(self.weights.items(), parts)}

    def _flat(self, gradients: Gradients) -> Tensor:
        """``[n, P]``."""
        return torch.cat([gradients[name].flatten(1) for name in self.weights], 1).double().to(self.images.device)

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return self.noise.sigma * torch.randn(shape, generator=generator, dtype=torch.float64)

    @cached_property
    def _pseudo_inverse(self) -> tuple[Tensor, Tensor]:
        """J ``[N K, P]`` and (J J^T + N proximity I)^+, in float64."""
        samples, size = len(self.images), sum(w.numel() for w in self.weights.values())
        with inference_state(self.model):
            outputs = outputs_of(self.model, self.images[:1]).shape[1]
            if samples * outputs * size > MOST_ENTRIES:
                raise ArgumentError(
                    f"The closed form needs a Jacobian of {samples * outputs:,} x {size:,} entries. Use fewer images "
                    "(`samples=`), a smaller net, or empirical() with retrain=Retraining()."
                )

            def run(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
                return outputs_of(self.model, images, weights=weights)

            rows = []
            for m in torch.eye(outputs, device=self.images.device):
                found = sample_gradients(run, self.weights, self.images, m.expand(samples, -1))
                rows.append(torch.cat([self._flat(gradients) for gradients, _ in found]))
        jacobian = torch.stack(rows, 1).flatten(0, 1)
        values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
        ridge = samples * self.noise.proximity
        least = torch.finfo(torch.float32).eps * values.max() if ridge == 0 else -ridge
        inverted = torch.where(values > least, 1 / (values + ridge), 0.0)
        return jacobian, vectors * inverted @ vectors.T

    @torch.inference_mode(False)  # copies that are made in inference mode cannot be trained
    def _retrain(self, retrain: Retraining, generator: torch.Generator) -> Change:
        copy, images = copy_model(self.model).eval(), self.images.clone()
        for name, p in copy.named_parameters():
            p.requires_grad_(name in self.weights)
        with inference_state(self.model):
            outputs = outputs_of(self.model, images)
        targets = outputs + self._draw(outputs.shape, generator).to(outputs)
        with torch.enable_grad():
            retrain(copy, images, targets, self.noise.proximity)
        with inference_state(copy):
            before, after = (float((found - targets).square().mean()) for found in (outputs, outputs_of(copy, images)))
        if not math.isfinite(after):
            raise NonFiniteError("Retraining diverged: the loss is not finite. Lower the learning rate.")
        if not after < before:
            text = "Retraining did not lower the loss: the TPV is not that of label noise. Lower the learning rate."
            warnings.warn(text, TPVWarning, stacklevel=4)
        return {name: p.detach() - self.weights[name] for name, p in copy.named_parameters() if name in self.weights}
