"""Per-sample gradients of a whole batch from one forward pass: norms without the gradients, by one backward each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jbrprune.criteria.factors import wide
from jbrprune.criteria.norms import Used, per_sample, square_norms
from jbrprune.criteria.recording import Use
from jbrprune.errors import ModelError, NonFiniteError
from jbrprune.models import preserve
from jbrprune.structure.verification import two_images
from jbrprune.tpv.bare import BareRecorder, BareUse
from jbrprune.tpv.gradients import Gradients, checked_direction
from jbrprune.tpv.responses import Output, linear_outputs, outputs_of


@dataclass(frozen=True, eq=False)
class Recorded:
    """A forward pass that can be asked for gradients any number of times.

    Attributes:
        recorder: Has seen the forward pass.
        outputs: ``[B, K]`` with their graph.
        shapes: Name -> shape of the parameters that are perturbed.
        linear: Change of the weights -> ``[B, K]`` J(x) d.
    """

    recorder: BareRecorder
    outputs: Tensor
    shapes: Mapping[str, torch.Size]
    linear: Callable[[Mapping[str, Tensor]], Tensor]

    def gradients(self, directions: Tensor) -> RecordedGradients:
        """The gradients J(x_n)^T m_n for ``[B, K]`` directions m."""
        return RecordedGradients(self, directions.to(self.outputs))


def recorded(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    output: Output,
    autocast: torch.dtype | None = None,
) -> Recorded:
    """Run the model on a batch and record where the named parameters are used; frozen parameters, eval mode.

    Args:
        model: The model, as `jbrprune.models.preserve.inference_state` leaves it.
        images: ``[B, C, H, W]`` on the model's device.
        names: Parameters that are perturbed.
        output: What the model returns -> ``[B, K]``.
        autocast: Low-precision dtype of the forward pass.
    """
    tensors = dict(model.named_parameters())
    recorder = BareRecorder({name: tensors[name] for name in names}, len(images), lambda name, uses: None, keep=True)
    amp = torch.autocast(images.device.type, autocast, enabled=autocast is not None)
    with torch.enable_grad(), recorder, amp:
        outputs = outputs_of(model, images, output)
    with torch.enable_grad():
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    shapes = {name: tensors[name].shape for name in names}
    return Recorded(recorder, outputs, shapes, lambda d: linear_outputs(model, images, d, output)[1])


def check_recording(model: nn.Module, images: Tensor, names: Sequence[str], output: Output) -> None:
    """Compare recorded norms with autograd on two images, through random directions of the outputs.

    Raises:
        ModelError: They differ, or autograd cannot differentiate by the weights at all.
    """
    pair = two_images(images)
    run = recorded(model, pair, names, output)
    if not run.outputs.requires_grad or not torch.isfinite(run.outputs).all():
        return  # the pass itself says what is wrong
    directions = torch.randn(run.outputs.shape, generator=torch.Generator().manual_seed(0)).to(run.outputs)
    found = run.gradients(directions).norms_by_name(dict.fromkeys(names, 1.0))
    expected = _norms_of_autograd(model, pair, names, directions, output)
    parameters = dict(model.named_parameters())
    lowest = max((parameters[name].dtype for name in names), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(lowest, 0.3)
    # A gradient that is zero but for rounding, such as that of a bias of attention keys, has no digits to compare.
    rounding = max(100 * torch.finfo(run.outputs.dtype).eps, 2 * torch.finfo(lowest).eps)
    floor = rounding**2 * sum(float(e.sum()) for e in expected.values())
    for name, norm in expected.items():
        difference = float((found[name] - norm).abs().sum()) if name in found else float(norm.sum())
        if not difference <= tolerance * float(norm.sum()) + floor:
            raise ModelError(_refusal(name, name in found))


def _norms_of_autograd(
    model: nn.Module, pair: Tensor, names: Sequence[str], directions: Tensor, output: Output
) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    leaves = [parameters[name] for name in names]
    norms = {name: torch.zeros(2, dtype=wide(pair.device), device=pair.device) for name in names}
    with preserve.requiring_grad(model, True), torch.enable_grad():
        products = (outputs_of(model, pair, output) * directions).sum(1)
        for sample in range(2):
            try:
                found = torch.autograd.grad(products[sample], leaves, retain_graph=sample == 0, allow_unused=True)
            except RuntimeError as error:
                raise ModelError(f"The model cannot be differentiated by its weights: {error}") from error
            for name, gradient in zip(names, found):
                if gradient is not None:
                    norms[name][sample] = gradient.to(norms[name]).square().sum()
    return norms


def _refusal(name: str, seen: bool) -> str:
    instead = "Put it into `ignore`, or use method='jvp', which needs no gradient per sample."
    if not seen:
        return (
            f"{name} takes part in the outputs, but not as it is: it is transformed first (as weight standardisation "
            f"does), or used in a function that is not known here, so its gradient per sample is not seen. {instead}"
        )
    return (
        f"{name}: norms of its gradients per sample differ from those of autograd on two images. Samples influence "
        "each other (a batch norm without stored statistics?), or the first dimension of a layer's input is not the "
        f"batch, or the forward pass is random in eval mode. {instead}"
    )


class RecordedGradients(Gradients):
    """Gradients of recorded outputs; every question is answered by one backward to the activations.

    Args:
        run: The forward pass.
        directions: ``[B, K]`` m of every sample.
    """

    def __init__(self, run: Recorded, directions: Tensor) -> None:
        super().__init__({})
        self._run = run
        self._outputs = run.outputs
        self._directions = directions
        self._shapes = dict(run.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """``[B, *shape]`` the gradients of one parameter; the first time, those of all are formed and kept."""
        if not self._each:
            self._each = self._formed()
        return self._each[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the parameters."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._shapes)

    @property
    def samples(self) -> int:
        """B."""
        return len(self._outputs)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> the parameter's shape."""
        return self._shapes

    def square_norms(self, variances: Mapping[str, float | Tensor]) -> Tensor:
        """``[B]`` sum over names and entries of c_j g_j^2, by one backward; see `Gradients.square_norms`.

        Raises:
            NonFiniteError: Names the parameter whose gradient is not finite.
        """
        device = self._outputs.device
        zero = torch.zeros(self.samples, dtype=wide(device), device=device)
        return sum(self.norms_by_name(variances).values(), zero)

    def norms_by_name(self, variances: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """Name -> ``[B]`` sum over entries of c_j g_j^2; a parameter that takes no part in the outputs is absent."""
        known = {name: value.to(self._outputs.device) for name, value in self.checked(variances).items()}
        found: dict[str, Tensor] = {}

        def settle(name: str, uses: Sequence[Use]) -> None:
            if name in known:
                used = _used(name, uses, self.samples)
                found[name] = square_norms(used, self.samples, known[name], self._shapes[name])
                _check_finite(name, found[name])

        self._backward(settle)
        return found

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``[B]`` g^T d = m^T J d, without a backward."""
        product = self._run.linear(checked_direction(direction, self._shapes))
        return (product * self._directions).sum(1, dtype=wide(product.device))

    def _formed(self) -> dict[str, Tensor]:
        found = {name: self._outputs.new_zeros(self.samples, *shape) for name, shape in self._shapes.items()}

        def settle(name: str, uses: Sequence[Use]) -> None:
            if name in found:
                used = _used(name, uses, self.samples)
                found[name] = per_sample(used, self.samples, self._shapes[name], 0, self.samples)
                _check_finite(name, found[name])

        self._backward(settle)
        return found

    def _backward(self, settle: Callable[[str, Sequence[Use]], None]) -> None:
        self._run.recorder.settle = settle
        with torch.enable_grad():
            self._run.recorder.backward((self._outputs * self._directions).sum(1))


def _used(name: str, uses: Sequence[Use], samples: int) -> list[Used]:
    def used(use: Use) -> Used:
        if isinstance(use, BareUse):
            return Used(None, "bare", use.per_sample(samples))
        return Used(use.call, use.kinds[name], use.gradient)  # type: ignore[arg-type]

    return [used(use) for use in uses]


def _check_finite(name: str, found: Tensor) -> None:
    if not torch.isfinite(found).all():
        raise NonFiniteError(
            f"The gradient by {name} contains NaN or Inf although the outputs are finite. A square root of zero or an "
            "overflow in half precision does that; try float32."
        )
