"""What a forward and a backward leave behind: the relevance of every unit on every sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jbrprune.criteria.members import Site, scored_members
from jbrprune.errors import ModelError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.structure.groups import Group

log = logging.getLogger(__name__)

CACHE_ELEMENTS = 1 << 18
"""Products of activation and gradient are formed in pieces of this size, which stay in the cache."""


@dataclass(frozen=True, eq=False)
class _Watched:
    """An activation until its gradient arrives."""

    name: str
    kept: list[Tensor]
    version: int

    @property
    def overwritten(self) -> bool:
        """Whether the activation was changed in place after the layer had seen it."""
        return self.kept[0]._version != self.version


class Tape:
    """Collects, during one backward, the relevance of every member into ``[B, units]`` per group."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], site: Site, means: Mapping[str, Tensor] | None
    ) -> None:
        self.model = model
        self.groups = tuple(groups)
        self.means = means or {}
        self.copied: set[str] = set()
        self.watched: list[_Watched] = []
        self.totals: dict[str, Tensor] = {}
        self.samples = 0
        self.dtype = torch.float32
        self._members = scored_members(model, self.groups, site)
        self.names = sorted({name for name, _ in self._members})

    def start(self, images: Tensor) -> None:
        """Zero the totals for a batch of images."""
        self.samples = len(images)
        self.dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.watched = []
        self.totals = {g.name: images.new_zeros(self.samples, g.size, dtype=self.dtype) for g in self.groups}

    def hooks(self) -> tuple[dict[str, preserve.Hook], dict[str, preserve.Hook]]:
        """Forward hooks and forward-pre hooks by module name."""
        forward: dict[str, preserve.Hook] = {}
        before: dict[str, preserve.Hook] = {}
        for name, side in self._members:
            module = self.model.get_submodule(name)
            if side == "in":
                before[name] = self._consumer(name, module)
                continue
            if layers.has_running_statistics(module):
                before[name], late = self._batch_norm(name, module)
            elif layers.adds_input(module):
                before[name], late = self._adding(name, module)
            else:
                late = self._producer(name, module)
            part = layers.affine_part(module)
            if part:
                before[f"{name}.{part}".removeprefix(".")] = _on_input(late)
            else:
                forward[name] = _on_output(late)
        return forward, before

    def keep_copies(self) -> bool:
        """Find activations that the model has overwritten in place; copy them from now on. Whether there are any."""
        overwritten = {watched.name for watched in self.watched if watched.overwritten}
        self.watched = []
        if again := overwritten & self.copied:
            raise ModelError(f"{min(again)} overwrites its own input; per-sample relevances are not defined there.")
        if overwritten:
            log.debug("Overwritten in place, copied from now on: %s", ", ".join(sorted(overwritten)))
        self.copied |= overwritten
        return bool(overwritten)

    def _consumer(self, name: str, module: nn.Module) -> preserve.Hook:
        mean = self.means.get(name)

        def finish(activation: Tensor, gradient: Tensor) -> None:
            if mean is None:
                v = self._products(name, module, activation, gradient)
            else:
                v, total = self._moments(name, module, activation, gradient)
                v -= mean.to(v) * total
            self._add(name, "in", v)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # A view, because others may read the same input: only the gradient through this layer counts.
            x = preserve.input_of(args, kwargs)
            x = x.clone() if name in self.copied else x
            seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self._watch(name, x, seen, finish)
            return _with_input(seen, args, kwargs)

        return hook

    def _producer(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def finish(activation: Tensor, gradient: Tensor) -> None:
            self._add(name, "out", self._products(name, module, activation, gradient))

        def late(output: Tensor) -> Tensor:
            seen = _started(output, apart=name in self.copied)
            self._watch(name, output, seen, finish)
            return seen

        return late

    def _adding(self, name: str, module: nn.Module) -> tuple[preserve.Hook, Callable[[Tensor], Tensor]]:
        inputs: list[Tensor] = []

        def early(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.append(preserve.input_of(args, kwargs).detach())

        def finish(added: Tensor, gradient: Tensor) -> None:
            self._add(name, "out", self._products(name, module, added, gradient))

        def late(output: Tensor) -> Tensor:
            # What is kept is not the output, so nobody would notice a view that is overwritten: its hook is lost.
            output = _started(output, apart=output._is_view())
            self._watch(name, output.detach() - inputs.pop(), output, finish)
            return output

        return early, late

    def _batch_norm(self, name: str, module: nn.Module) -> tuple[preserve.Hook, Callable[[Tensor], Tensor]]:
        # From the input, which autograd keeps anyway: the output is often overwritten in place.
        inputs: list[Tensor] = []

        def early(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = preserve.input_of(args, kwargs)
            inputs.append(x.clone() if name in self.copied else x)
            return _with_input(inputs[-1], args, kwargs)

        def finish(x: Tensor, gradient: Tensor) -> None:
            products, total = self._moments(name, module, x, gradient)
            mean, variance, weight, bias = _batch_norm_tensors(module, self.dtype)
            v = weight * torch.rsqrt(variance + module.eps) * (products - mean * total)  # type: ignore[operator]
            self._add(name, "out", v if bias is None else v + bias * total)

        def late(output: Tensor) -> Tensor:
            # What is kept is not the output, so nobody would notice a view that is overwritten: its hook is lost.
            output = _started(output, apart=output._is_view())
            self._watch(name, inputs.pop(), output, finish)
            return output

        return early, late

    def _watch(self, name: str, activation: Tensor, seen: Tensor, finish: Callable[[Tensor, Tensor], None]) -> None:
        if not torch.is_grad_enabled():
            raise ModelError(
                f"{name} runs without gradients: the model's forward has a torch.no_grad() around it, or a reentrant "
                "checkpoint. Its relevance would be zero. Switch that off while scoring, or put it into `ignore`."
            )
        activation = activation.detach()
        watched = _Watched(name, [activation], activation._version)
        self.watched.append(watched)
        # The activation is dropped when its gradient has come, as autograd does with what it keeps.
        seen.register_hook(lambda gradient: finish(watched.kept.pop(), gradient))

    def _products(self, name: str, module: nn.Module, activation: Tensor, gradient: Tensor) -> Tensor:
        """``[n, channels]`` sums of activation * gradient over positions."""
        a, g = (self._by_sample(name, module, t) for t in (activation, gradient))
        return torch.cat([_product(x, y, self.dtype).sum((1, 3)) for x, y in _pieces(a, g)])

    def _moments(self, name: str, module: nn.Module, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, channels]`` sums of activation * gradient, and of the gradient, over positions."""
        a, g = (self._by_sample(name, module, t) for t in (activation, gradient))
        pairs = [(_product(x, y, self.dtype).sum((1, 3)), y.sum((1, 3), dtype=self.dtype)) for x, y in _pieces(a, g)]
        products, sums = zip(*pairs, strict=True)
        return torch.cat(products), torch.cat(sums)

    def _by_sample(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """``[n, positions, channels, positions]`` view, whatever the layout."""
        n = self.samples
        if tensor.shape[0] % n:
            raise ModelError(
                f"{name}: the first dimension of its activation {tuple(tensor.shape)} is not a multiple of the "
                f"batch size {n}; per-sample relevances are not defined. Put this layer into `ignore`."
            )
        if layers.channel_dim(module) == 1:
            return tensor.reshape(n, tensor.shape[0] // n, tensor.shape[1], -1)
        return tensor.reshape(n, -1, tensor.shape[-1], 1)

    def _add(self, name: str, side: str, v: Tensor) -> None:
        for group, member, in_order in self._members[name, side]:
            mine = v if len(member.channel) == v.shape[1] else v[:, member.channel.to(v.device)]
            if in_order:
                self.totals[group] += mine
            else:
                self.totals[group].index_add_(1, member.unit.to(v.device), mine)


def recorded(model: nn.Module, images: Tensor, tape: Tape, autocast: torch.dtype | None) -> Tensor:
    """Logits ``[B, K]``, with the activations on the tape as the layers saw them."""
    while True:
        forward, before = tape.hooks()
        amp = torch.autocast(images.device.type, autocast, enabled=autocast is not None)
        with torch.enable_grad(), preserve.hooked(model, forward, before), amp:
            logits = logits_of(model(images.clone()))  # a clone, for a model that changes its input in place
        if not tape.keep_copies():
            return logits


def _with_input(x: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def _on_output(late: Callable[[Tensor], Tensor]) -> preserve.Hook:
    return lambda module, args, kwargs, output: late(output)


def _on_input(late: Callable[[Tensor], Tensor]) -> preserve.Hook:
    return lambda module, args, kwargs: _with_input(late(preserve.input_of(args, kwargs)), args, kwargs)


def _started(tensor: Tensor, *, apart: bool) -> Tensor:
    """The tensor if autograd tracks it; a clone if it is to stay apart, or would be a leaf (not to change in place)."""
    if not tensor.requires_grad:
        return tensor.detach().requires_grad_().clone()
    return tensor.clone() if apart else tensor


def _batch_norm_tensors(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Running mean and variance, weight and bias."""
    names = ("running_mean", "running_var", "weight", "bias")
    return tuple(None if getattr(module, n) is None else getattr(module, n).to(dtype) for n in names)  # type: ignore[return-value]


def _pieces(a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in pieces of a few samples, whose product stays in the cache."""
    rows = max(1, CACHE_ELEMENTS // max(1, a[0].numel()))
    return zip(a.split(rows), g.split(rows), strict=True)


def _product(a: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) * g.to(dtype)
