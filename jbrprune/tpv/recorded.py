"""Per-sample gradients of a whole batch from one forward pass: norms without the gradients, by one backward each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from jbrprune.errors import NonFiniteError
from jbrprune.factors import wide
from jbrprune.norms import Used, per_sample, square_norms
from jbrprune.recording import Use
from jbrprune.tpv.bare import BareRecorder, BareUse
from jbrprune.tpv.gradients import Gradients, checked_direction


class RecordedGradients(Gradients):
    """Gradients of recorded outputs; every question is answered by one backward to the activations.

    Args:
        recorder: Has seen the forward pass.
        directions: ``[B, K]`` m of every sample.
        outputs: ``[B, K]`` with their graph.
        shapes: Name -> shape of the parameters that are perturbed.
        linear: Change of the weights -> ``[B, K]`` J(x) d.
    """

    def __init__(
        self,
        recorder: BareRecorder,
        outputs: Tensor,
        directions: Tensor,
        shapes: Mapping[str, torch.Size],
        linear: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        super().__init__({})
        self._recorder = recorder
        self._outputs = outputs
        self._directions = directions
        self._shapes = dict(shapes)
        self._linear = linear

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
        known = {name: value.to(device) for name, value in self.checked(variances).items()}
        total = torch.zeros(self.samples, dtype=wide(device), device=device)

        def settle(name: str, uses: Sequence[Use]) -> None:
            if name in known:
                found = square_norms(_used(name, uses, self.samples), self.samples, known[name], self._shapes[name])
                _check_finite(name, found)
                total.add_(found)

        self._backward(settle)
        return total

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``[B]`` g^T d = m^T J d, without a backward."""
        product = self._linear(checked_direction(direction, self._shapes))
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
        self._recorder.settle = settle
        with torch.enable_grad():
            self._recorder.backward((self._outputs * self._directions).sum(1))


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
