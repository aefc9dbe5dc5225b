"""Per-sample gradients as a covariance sees them: questions about g, and g itself for who needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from jbrprune.errors import ArgumentError


class Gradients(Mapping[str, Tensor]):
    """Gradients g_n = J(x_n)^T m_n of a batch: parameter name -> ``[B, *shape]``.

    A covariance that asks `square_norms` or `inner` never sees the gradients themselves, which
    `jbrprune.tpv.recorded.RecordedGradients` then never forms. Here both are computed as they are written.

    Args:
        each: Parameter name -> ``[B, *shape]``.

    Example:
        >>> gradients = Gradients({"w": torch.tensor([[3.0, 4.0]])})
        >>> gradients.square_norms({"w": 2.0})
        tensor([50.], dtype=torch.float64)
    """

    def __init__(self, each: Mapping[str, Tensor]) -> None:
        self._each = each

    def __getitem__(self, name: str) -> Tensor:
        """``[B, *shape]`` the gradients of one parameter."""
        return self._each[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the parameters."""
        return iter(self._each)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._each)

    @property
    def samples(self) -> int:
        """B."""
        return len(next(iter(self._each.values())))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> the parameter's shape."""
        return {name: g.shape[1:] for name, g in self._each.items()}

    def square_norms(self, variances: Mapping[str, float | Tensor]) -> Tensor:
        """``[B]`` sum over names and entries of c_j g_j^2.

        Args:
            variances: Name -> c: a number, or a tensor that broadcasts to the parameter's shape. One number, or one
                per row (``[out, 1, ...]``), is the fast case. Parameters without a name here do not vary.

        Raises:
            ArgumentError: A name is not a parameter's, or a shape does not broadcast to it.
        """
        total = 0.0
        for name, variance in self.checked(variances).items():
            g = self[name].double()
            total = total + (g.square() * variance.to(g)).flatten(1).sum(1)
        return total if isinstance(total, Tensor) else torch.zeros(self.samples, dtype=torch.float64)

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        """``[B]`` g^T d.

        Raises:
            ArgumentError: A name is not a parameter's, or a shape is another.
        """
        total = torch.zeros(self.samples, dtype=torch.float64)
        for name, d in checked_direction(direction, self.shapes).items():
            total = total + (self[name].double() * d.double()).flatten(1).sum(1).cpu()
        return total

    def checked(self, variances: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """The variances as tensors; refuses names and shapes that are not the model's, and negative numbers."""
        shapes = self.shapes
        _check_names(variances, shapes)
        found = {name: torch.as_tensor(value) for name, value in variances.items()}
        for name, value in found.items():
            try:
                fits = torch.broadcast_shapes(value.shape, shapes[name]) == shapes[name]
            except RuntimeError:
                fits = False
            if not fits:
                raise ArgumentError(
                    f"The covariance has variances of shape {list(value.shape)} for {name}, which is "
                    f"{list(shapes[name])}. It was made for another model."
                )
            if not bool((value >= 0).all()):
                raise ArgumentError(f"The covariance has negative (or NaN) variances for {name}.")
        return found


def checked_direction(direction: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A change of weights whose names and shapes are the model's.

    Raises:
        ArgumentError: They are not.
    """
    _check_names(direction, shapes)
    for name, change in direction.items():
        if change.shape != shapes[name]:
            raise ArgumentError(
                f"The change of weights has shape {list(change.shape)} for {name}, which is {list(shapes[name])}. It "
                "was made for another model."
            )
    return dict(direction)


def _check_names(given: Mapping[str, object], shapes: Mapping[str, torch.Size]) -> None:
    unknown = next((name for name in given if name not in shapes), None)
    if unknown is not None:
        raise ArgumentError(
            f"The covariance speaks of {unknown!r}, which is not a parameter that is perturbed here. Names look like "
            f"{', '.join(list(shapes)[:3])}; was it made for another model, or is the parameter in `ignore`?"
        )
