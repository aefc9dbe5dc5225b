r"""One gate on every axis that is scored: relevance is the derivative with respect to it.

A gate stands where a layer reads its input (side ``in``) or gives its output (side ``out``). It is the identity,
x -> x + z a + y at z = y = 0, with one z and one y for every sample and channel; a is the activation x itself. For a
layer that is affine in its parameters (out = W a + b), with L(x) any scalar of sample x:

* over all weights that *consume* input channel c:      sum_p w_p dL/dw_p = sum over positions of a * dL/da = dL/dz
* over all parameters that *produce* output channel c:  sum_p w_p dL/dw_p = sum over positions of out * dL/dout = dL/dz

where dL/da is the gradient through this layer only: others may read the same input, each through a gate of its own.
dL/dy = sum over positions of dL/da is what a constant in the channel's place contributes, so dL/dz - mean(a) dL/dy is
the part of the relevance that goes when the channel's mean stays. No gradient of a weight is formed, and the
backward stops at the first gate. W is the weight as the layer applies it: where a class standardises its weight first
(StdConv2d), that is the standardised one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from jbrprune.errors import ModelError
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.models import layers, preserve

log = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, str]
"""(qualified name of a layer, ``in`` or ``out``): where a gate stands."""

CACHE_ELEMENTS = 1 << 18
"""Products of activation and gradient are formed in pieces of this size, which stay in the cache."""


class Gate(torch.autograd.Function):
    """The identity; its backward gives dL/dz, and dL/dy if asked for, in the gradient of ``gate``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, line: tuple[Tensor, Tensor] | None, gate: Tensor, dim: int, name: str
    ) -> Tensor:
        """Pass ``x`` on.

        Args:
            ctx: Of autograd.
            x: Any activation; dimension ``dim`` (1 or -1) holds its channels.
            a: What z multiplies, of the same shape: x, or
            line: what x is made from, with ``[C]`` slope and intercept: x = slope * a + intercept.
            gate: ``[1, n, C]`` zeros (z) or ``[2, n, C]`` (z and y).
            dim: 1 or -1.
            name: Of the layer, for messages.
        """
        ctx.save_for_backward(a)
        ctx.version = a.data_ptr(), a._version
        ctx.line, ctx.shape, ctx.dtype, ctx.dim, ctx.name = line, gate.shape, gate.dtype, dim, name
        return x.detach()  # the same memory, but no view for autograd: an in-place operation may follow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor, None, None]:  # type: ignore
        """Sum over positions, in pieces of a few samples."""
        (a,), (kinds, samples, _) = ctx.saved_tensors, ctx.shape
        if a.data_ptr() == ctx.version[0] and a._version != ctx.version[1]:  # neither as it was, nor a copy
            raise ModelError(
                f"{ctx.name}: the model overwrites a part of its activation in place, so that no relevance can be read "
                "from it. Write the forward without that, or put the layer into `ignore`."
            )
        a, g = (by_sample(tensor, samples, ctx.dim) for tensor in (a, gradient))
        rows = max(1, CACHE_ELEMENTS // max(1, a[0].numel()))
        pairs = list(zip(a.split(rows), g.split(rows), strict=True))
        z = torch.cat([(x.to(ctx.dtype) * y.to(ctx.dtype)).sum((1, 3)) for x, y in pairs])
        if kinds == 1 and ctx.line is None:
            return gradient, None, None, z[None], None, None
        y = torch.cat([part.sum((1, 3), dtype=ctx.dtype) for _, part in pairs])
        if ctx.line is not None:
            z = ctx.line[0] * z + ctx.line[1] * y
        return gradient, None, None, torch.stack([z, y][:kinds]), None, None


def by_sample(x: Tensor, samples: int, dim: int) -> Tensor:
    """``[n, positions, C, positions]`` view of an activation that may hold several rows of each sample."""
    if dim == 1:
        return x.reshape(samples, len(x) // samples, x.shape[1], -1)
    return x.reshape(samples, -1, x.shape[-1], 1)


def gated_logits(
    model: nn.Module,
    images: Tensor,
    axes: Iterable[Key],
    output: Output = LOGITS,
    *,
    constants: bool = False,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, dict[Key, Tensor]]:
    """Logits, or other rows that count, with their graph, and the gates to differentiate them by.

    Args:
        model: In `preserve.inference_state`.
        images: ``[n, C, H, W]`` on the model's device; left as they are.
        axes: Where gates stand.
        output: What of the model's output counts.
        constants: Every gate has a y beside its z.
        autocast: Low-precision dtype of the forward pass.

    Returns:
        ``[n, V]`` rows, and axis -> ``[1, n, C]`` gates z, or ``[2, n, C]`` z and y, of every layer that was called.

    Raises:
        ModelError: A layer runs without gradients.
    """
    gates: dict[Key, Tensor] = {}
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    samples, dtype = len(images), torch.float64 if images.dtype == torch.float64 else torch.float32

    def gated(name: str, side: str, layer: nn.Module, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise ModelError(
                f"{name} runs without gradients: the model's forward has a torch.no_grad() around it, or a reentrant "
                "checkpoint. Its relevance would be zero. Switch that off while scoring, or put it into `ignore`."
            )
        dim = layers.channel_dim(layer) or 1
        if (name, side) not in gates:  # a layer that is called twice has one gate twice, so that its effects add up
            shape = (1 + constants, samples, x.shape[dim])
            gates[name, side] = torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)
        a, line = x.detach(), None
        if inputs[name]:
            a = inputs[name].pop()
            if layers.adds_input(layer):
                a = x.detach() - a
            else:
                line = _line_of(layer, dtype)
        return Gate.apply(x, a, line, gates[name, side], dim, name)

    def on_input(name: str, side: str, layer: nn.Module) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = gated(name, side, layer, preserve.input_of(args, kwargs))
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

        return hook

    before: dict[str, preserve.Hook] = {}
    after: dict[str, preserve.Hook] = {}
    for name, side in axes:
        layer = model.get_submodule(name)
        if side == "in":
            before[name] = on_input(name, side, layer)
            continue
        if layers.has_running_statistics(layer) or layers.adds_input(layer):
            before[name] = lambda _, args, kw, name=name: inputs[name].append(preserve.input_of(args, kw).detach())
        part = layers.affine_part(layer)
        if part is None:
            after[name] = lambda _, args, kw, output, at=(name, side, layer): gated(*at, output)  # type: ignore
        else:  # an activation follows: the affine output is the input of a part of the layer
            before[f"{name}.{part}".removeprefix(".")] = on_input(name, side, layer)
    amp = torch.autocast(images.device.type, autocast, enabled=autocast is not None)
    with torch.enable_grad(), preserve.hooked(model, after, before), amp:
        return output(model(images.clone())), gates  # a clone, for a model that changes its input in place


def _line_of(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slope and intercept of a batch norm, whose input autograd keeps, while its output is often overwritten."""
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (None if (t := getattr(norm, n)) is None else t.to(dtype) for n in names)
    slope = weight * torch.rsqrt(variance + norm.eps)  # type: ignore[reportOperatorIssue, reportOptionalOperand]
    return slope, (0 if bias is None else bias) - mean * slope


def effects(
    logits: Tensor, direction: Tensor, gates: Mapping[Key, Tensor], *, again: bool = False
) -> dict[Key, Tensor]:
    """Derivatives of sum_k m_k(x) f_k(x) with respect to every gate, for every sample, from one backward.

    Args:
        logits: ``[n, K]`` f from `gated_logits`.
        direction: ``[n, K]`` m.
        gates: From `gated_logits`.
        again: Keep the graph for another direction.

    Returns:
        Axis -> ``[1, n, C]`` dL/dz, or ``[2, n, C]`` dL/dz and dL/dy; zero where the axis takes no part in the logits.

    Raises:
        ModelError: No gate takes part in the logits.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
        >>> logits, gates = gated_logits(net, torch.randn(5, 3, 2, 2), [("1", "in")])
        >>> one_hot = nn.functional.one_hot(logits.argmax(1), 4)
        >>> found = effects(logits, one_hot, gates)["1", "in"][0]  # what every input adds to the predicted logit
        >>> torch.testing.assert_close(found.sum(1), logits.amax(1))
    """
    if not logits.requires_grad:
        raise ModelError("No scored layer takes part in the logits: there is nothing to differentiate.")
    with torch.enable_grad():
        total = (logits * direction).sum()
    leaves = list(gates.values())
    found = torch.autograd.grad(total, leaves, retain_graph=again, allow_unused=True, materialize_grads=True)
    return dict(zip(gates, found, strict=True))


def differentiate(run: Callable[[], T], copying: bool) -> tuple[T, bool]:
    """Run a forward and its backward passes, also where the model overwrites in place what a backward reads.

    Args:
        run: What to run; it may be run twice.
        copying: Copy what is overwritten from the start: what this function returned for the batch before.

    Returns:
        What ``run`` returns, and whether anything had to be copied.
    """
    if not copying:
        try:
            return run(), False
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            log.debug("What the model overwrites in place is copied from now on: %s", error)
    with allow_mutation_on_saved_tensors():
        return run(), True
