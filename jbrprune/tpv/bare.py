"""Parameters that no layer function reads: position embeddings, class tokens, scales of residual branches.

They enter by an operation that broadcasts them over the batch. In its place a copy that is already as large as the
result takes part, so that its gradient has one part for every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vjp, vmap

from jbrprune.criteria.recording import Recorder, Use

BROADCASTING = {
    function
    for name in ("add", "sub", "mul", "div")
    for owner in (torch, Tensor)
    for function in (getattr(owner, name), getattr(owner, f"{name}_", None))
    if function is not None
} | {getattr(Tensor, f"__{side}{name}__") for name in ("add", "sub", "mul") for side in ("", "r", "i")}
"""Functions of two tensors that broadcast."""
RESHAPING = {
    getattr(Tensor, name)
    for name in ("reshape", "view", "unsqueeze", "squeeze", "flatten", "permute", "transpose", "to", "type_as", "float")
} | {torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten, torch.permute, torch.transpose}
"""Functions that only move the entries of a parameter, or change their dtype."""
EXPANDING = {Tensor.expand, Tensor.expand_as, torch.broadcast_to}

Pull = Callable[[Tensor], Tensor]
"""``[B, *shape of a derived tensor]`` gradients -> those of the parameter."""


class BareUse(Use):
    """A use of a parameter by broadcasting."""

    def __init__(self, name: str, like: Tensor, pull: Pull) -> None:
        self.call = None
        self.kinds = {name: "bare"}
        self.left = {name}
        self.gradient: Tensor | None = None
        self.shape = like.shape
        self.pull = pull

    def per_sample(self, samples: int) -> Tensor:
        """``[samples, *shape]`` the gradient of the parameter."""
        gradient: Tensor = self.gradient  # type: ignore[assignment]
        rows = gradient.unflatten(0, (samples, -1)).sum(1) if len(gradient) > samples else gradient
        shape = (1,) * (rows.dim() - 1 - len(self.shape)) + tuple(self.shape)
        if rows.dim() == len(shape):  # the parameter has a dimension for the batch, of size one
            rows = rows.unsqueeze(1)
        lost = [dim for dim, size in enumerate(shape, 1) if size == 1 < rows.shape[dim]]
        rows = rows.sum(lost, keepdim=True) if lost else rows
        return self.pull(rows.reshape(samples, *self.shape))


class BareRecorder(Recorder):
    """Sees parameters enter by broadcasting as well."""

    def identify(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember parameters by identity, and that they are made of themselves."""
        super().identify(tensors)
        self.derived: dict[int, tuple[Tensor, str, Pull]] = {
            id(tensor): (tensor, name, lambda gradient: gradient) for name, tensor in tensors.items()
        }

    def other(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Put an expanded copy in the place of a parameter, or remember what is made of it."""
        if torch.is_grad_enabled() and any(id(arg) in self.derived for arg in args):
            if func in RESHAPING:
                return self._reshaped(func, args, kwargs)
            if func in EXPANDING:
                return self._expanded(func(args[0].detach(), *args[1:], **kwargs), *self.derived[id(args[0])])
            if func in BROADCASTING and len(args) == 2:
                return self._broadcast(func, args, kwargs)
        return func(*args, **kwargs)

    def _reshaped(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        before, name, pull = self.derived[id(args[0])]
        output, back = vjp(lambda tensor: func(tensor, *args[1:], **kwargs), before.detach())  # type: ignore[misc]
        self.derived[id(output)] = (output, name, lambda gradient: pull(vmap(back)(gradient)[0]))
        return output

    def _broadcast(self, func: Callable, args: tuple, kwargs: dict) -> object:
        place = 0 if id(args[0]) in self.derived else 1
        tensor, partner = args[place], args[1 - place]
        batched = isinstance(partner, Tensor) and partner.dim() > 0 and id(partner) not in self.derived
        if not batched or torch.broadcast_shapes(partner.shape, tensor.shape)[0] != len(partner):
            return func(*args, **kwargs)
        shape = torch.broadcast_shapes(partner.shape, tensor.shape)
        copy = self._expanded(tensor.detach().expand(shape), *self.derived[id(tensor)])
        return func(*((copy, partner) if place == 0 else (partner, copy)), **kwargs)

    def _expanded(self, copy: Tensor, tensor: Tensor, name: str, pull: Pull) -> Tensor:
        """The copy, watched; or as it is where it does not lie over the batch."""
        if copy.dim() == 0 or len(copy) % self.samples:
            return copy
        use = BareUse(name, tensor, pull)
        self.uses[name].append(use)
        self.seen.add(name)
        copy = copy.requires_grad_()
        copy.register_hook(lambda gradient: self._arrive(use, gradient))
        self.leaves.append(copy)
        return copy
