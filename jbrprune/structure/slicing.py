"""Making a model physically smaller: channels of its modules are removed for good, in ascending order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from jbrprune.structure.channels import is_generic, refresh, width_after
from jbrprune.structure.cuts import planned, shrunk
from jbrprune.structure.groups import Axis
from jbrprune.structure.masking import masked

__all__ = ["masked", "refresh", "remove_channels"]


def remove_channels(model: nn.Module, gone: Mapping[Axis, Tensor]) -> None:
    """Remove channels in place.

    What stays keeps its order. Parameters are replaced by new ones of the same dtype, device and
    ``requires_grad``, without gradient; a tensor that several modules share stays shared. Everything is
    checked, and every smaller tensor is made, before the first one is put into the model.

    Args:
        model: The model to shrink.
        gone: Axis -> ``[k]`` integer indices that go, without repetition. ``out`` of a grouped convolution
            takes whole groups together with their inputs; an ``in`` axis named as well must agree.

    Raises:
        ModelError: A name does not exist, a module has no such side, indices are out of range, repeated or
            all there are, part of a group would go, or two places that share a tensor disagree. The model
            is unchanged.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> remove_channels(net, {("0", "out", 0): torch.tensor([1]), ("1", "in", 0): torch.tensor([1])})
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    plan = planned(model, gone)
    smaller = {key: shrunk(plan.tensor[key], dims) for key, dims in plan.gone.items()}
    touched = _replace(model, smaller)
    for name, sides in plan.sides.items():
        module = model.get_submodule(name)
        touched.discard(module)
        refresh(module, width=width_after(module, sides))
    for module in touched:
        if not is_generic(module):
            refresh(module)


def _replace(model: nn.Module, smaller: Mapping[int, Tensor]) -> set[nn.Module]:
    """Put the new tensors wherever the old ones are; returns the modules that own one."""
    places = [
        (module, owned, name, smaller[id(tensor)])
        for module in model.modules()
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if id(tensor) in smaller
    ]
    for _, owned, name, tensor in places:
        owned[name] = tensor  # type: ignore[assignment]
    return {module for module, *_ in places}
