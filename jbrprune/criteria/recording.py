"""Seeing every use of a parameter by a layer function during a forward pass, and its gradient during the backward.

The input is the one that the function itself gets: behind a padding inside ``forward``, for a weight that another
module reads, for a weight that several modules share. When the gradients of all uses of a parameter have arrived it is
settled, and everything is freed before the next layer's gradient arrives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jbrprune.criteria.functions import FUNCTIONS, Call
from jbrprune.errors import ModelError


class Use:
    """One call that reads scored parameters; holds its input until all of them have been dealt with."""

    def __init__(self, call: Call, kinds: Mapping[str, str]) -> None:
        self.call: Call | None = replace(call, input=call.input.detach())
        self.kinds = kinds  # parameter name -> "weight" or "bias"
        self.version = call.input._version
        self.gradient: Tensor | None = None
        self.left = set(kinds)

    def done(self, name: str, keep: bool) -> None:
        """Forget the tensors (to keep: the gradient only) when the last parameter has been dealt with."""
        self.left.discard(name)
        if not self.left:
            self.gradient = None
            if keep:
                self.left = set(self.kinds)
            else:
                self.call = None


Settle = Callable[[str, Sequence[Use]], None]
"""Name of a parameter, and all its uses with the gradients of their outputs."""


class Recorder(TorchFunctionMode):
    """Sees every call of a layer function during one forward pass, and its gradient during the backward.

    Args:
        tensors: Name -> the very tensor that functions get.
        samples: Samples in the batch.
        settle: What to do with a parameter when all its gradients have arrived.
        keep: Keep everything for another backward.
    """

    def __init__(self, tensors: Mapping[str, Tensor], samples: int, settle: Settle, *, keep: bool = False) -> None:
        super().__init__()
        self.samples = samples
        self.settle = settle
        self.keep = keep
        self.seen: set[str] = set()
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.arrived: dict[str, list[Use]] = defaultdict(list)
        self.leaves: list[Tensor] = []
        self.tensors: dict[int, tuple[str, Tensor]] = {}
        self.identify(tensors)

    def identify(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember parameters by identity; the tensor is kept, so that its identity is not used again."""
        for name, tensor in tensors.items():
            self.tensors[id(tensor)] = (name, tensor)

    def backward(self, losses: Tensor) -> None:
        """Ask for the gradients of ``losses``, sample by sample; every parameter is settled on the way."""
        with torch.enable_grad():
            total = losses.sum()
        total.backward(retain_graph=self.keep)
        for leaf in self.leaves:
            leaf.grad = None
        self._finish()

    def other(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Call a function that is not known to read parameters."""
        return func(*args, **kwargs)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        read = FUNCTIONS.get(func)
        if read is None or not torch.is_grad_enabled():
            return self.other(func, args, kwargs or {})
        output = func(*args, **(kwargs or {}))
        call = read(*args, **(kwargs or {}))
        parameters = {"weight": call.weight, "bias": call.bias}
        kinds = {self.tensors[id(t)][0]: kind for kind, t in parameters.items() if id(t) in self.tensors}
        return self._watched(call, kinds, output) if kinds else output

    def _watched(self, call: Call, kinds: Mapping[str, str], output: Tensor) -> Tensor:
        batched = call.convolution is None or call.input.dim() == 2 + len(call.convolution.kernel)
        if not batched or len(call.input) % self.samples or len(output) % self.samples:
            raise ModelError(
                f"{next(iter(kinds))}: the first dimension of the input {tuple(call.input.shape)} of this layer is "
                f"not the batch of {self.samples}; squares per sample are not defined there. Put it into `ignore`."
            )
        use = Use(call, kinds)
        for name in kinds:
            self.uses[name].append(use)
        self.seen |= set(kinds)
        if not output.requires_grad:  # a clone, because a leaf may not be changed in place
            self.leaves.append(output.detach().requires_grad_())
            output = self.leaves[-1].clone()
        output.register_hook(lambda gradient: self._arrive(use, gradient))
        return output

    def _arrive(self, use: Use, gradient: Tensor) -> None:
        if use.call is not None and use.call.input._version != use.version:
            raise ModelError(
                f"{next(iter(use.kinds))}: the input of this layer is changed in place after the layer has read it. "
                "Put the layer into `ignore`, or make that change out of place."
            )
        use.gradient = gradient
        for name in use.kinds:
            self.arrived[name].append(use)
            if len(self.arrived[name]) == len(self.uses[name]):
                self._settle(name)

    def _settle(self, name: str) -> None:
        uses = self.arrived.pop(name)
        self.settle(name, uses)
        for use in uses:
            use.done(name, self.keep)

    def _finish(self) -> None:
        """Settle parameters of which some uses have no part in the logits."""
        for name in list(self.arrived):
            self._settle(name)
        if not self.keep:
            self.uses.clear()
