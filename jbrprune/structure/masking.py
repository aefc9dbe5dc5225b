"""Letting the whole model compute what it would compute without some channels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from jbrprune.models import layers
from jbrprune.models.preserve import Hook, hooked
from jbrprune.structure.channels import Sides, refresh, tensor_cuts, width_after
from jbrprune.structure.cuts import kept, planned, shrunk
from jbrprune.structure.groups import Axis


@contextlib.contextmanager
def masked(model: nn.Module, gone: Mapping[Axis, Tensor]) -> Iterator[None]:
    """Let the same, un-shrunk model compute what it would compute without the channels.

    Consumers (``in`` axes) see zeros in these channels; a norm over channels (``out`` of LayerNorm, RMSNorm,
    GroupNorm and their relatives) is computed over the channels that stay and gives zeros elsewhere. Nothing
    is removed, and the hooks are gone afterwards.

    Args:
        model: The model; its parameters are not changed.
        gone: As for `remove_channels`.

    Raises:
        ModelError: As for `remove_channels`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        >>> _ = [torch.nn.init.ones_(weight) for weight in net.parameters()]
        >>> with torch.no_grad(), masked(net, {("0", "out", 0): torch.tensor([0]), ("1", "in", 0): torch.tensor([0])}):
        ...     print(net(torch.tensor([[3.0]])))
        tensor([[3.]])
    """
    plan = planned(model, gone)
    before: dict[str, Hook] = {}
    after: dict[str, Hook] = {}
    for name, sides in plan.sides.items():
        module = model.get_submodule(name)
        if "in" in sides:
            before[name] = partial(_zero_input, gone=sides["in"], dim=1 - module.weight.dim())  # type: ignore[union-attr]
        if "out" in sides and _mixes_channels(module):
            after[name] = partial(_norm_over_kept, gone=sides["out"], smaller=_smaller_copy(module, sides, name))
    with hooked(model, forward=after, forward_pre=before):
        yield


def _smaller_copy(module: nn.Module, sides: Sides, where: str) -> nn.Module:
    """A shallow copy with smaller tensors; the original keeps its own."""
    smaller = copy.copy(module)
    cuts = tensor_cuts(module, sides, where)
    for attribute in ("_parameters", "_buffers"):
        owned = dict(getattr(module, attribute))
        for (name, dim), gone in cuts.items():
            if owned.get(name) is not None:
                owned[name] = shrunk(owned[name], {dim: gone})
        smaller.__dict__[attribute] = owned
    refresh(smaller, width=width_after(module, sides))
    return smaller


def _zero_input(module: nn.Module, args: tuple, kwargs: dict, *, gone: Tensor, dim: int) -> tuple[tuple, dict]:
    """Zeros in the channels that are gone; exact also where they hold Inf."""
    if args:
        return (args[0].index_fill(dim, gone.to(args[0].device), 0), *args[1:]), kwargs
    return args, kwargs | {"input": kwargs["input"].index_fill(dim, gone.to(kwargs["input"].device), 0)}


def _norm_over_kept(
    module: nn.Module, args: tuple, kwargs: dict, output: Tensor, *, gone: Tensor, smaller: nn.Module
) -> Tensor:
    """The norm over the channels that stay, scattered back among zeros."""
    inputs = args[0] if args else next(iter(kwargs.values()))
    dim = layers.channel_dim(module) or -1  # unknown where several dimensions are normalised: then the last
    stays = kept(inputs.shape[dim], gone).to(inputs.device)
    return torch.zeros_like(output).index_copy(dim, stays, smaller.forward(inputs.index_select(dim, stays)))


def _mixes_channels(module: nn.Module) -> bool:
    """Does a channel of the output depend on the other channels of the input?

    Known by their attributes: a norm over ``normalized_shape``, and global response normalisation.
    """
    return isinstance(module, nn.GroupNorm) or hasattr(module, "normalized_shape") or hasattr(module, "channel_dim")
