"""Contexts that leave a user's model as it was: mode, hooks, flags, requires_grad, gradients, RNG.

The only file of the project that switches modes or registers hooks on a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

Hook = Callable[..., object]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode; restore each module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def requiring_grad(model: nn.Module, flag: bool) -> Iterator[None]:
    """Set ``requires_grad`` of every parameter; restore each parameter's own flag afterwards."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(flag)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextlib.contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Switch off the ``inplace`` flag of every module that has one; restore it afterwards."""
    before = {m: m.inplace for m in model.modules() if isinstance(getattr(m, "inplace", None), bool)}
    try:
        for module in before:
            module.inplace = False  # type: ignore[assignment]
        yield
    finally:
        for module, flag in before.items():
            module.inplace = flag  # type: ignore[assignment]


@contextlib.contextmanager
def hooked(
    model: nn.Module,
    forward: Mapping[str, Hook] | None = None,
    forward_pre: Mapping[str, Hook] | None = None,
) -> Iterator[None]:
    """Register forward hooks by qualified name; remove them afterwards, also after an exception.

    Args:
        model: The model.
        forward: Name of a submodule to ``hook(module, args, kwargs, output)``.
        forward_pre: Name of a submodule to ``hook(module, args, kwargs)``.
    """
    handles = []
    try:
        for name, hook in (forward_pre or {}).items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name, hook in (forward or {}).items():
            handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def no_new_hooks(model: nn.Module) -> Iterator[None]:
    """Remove forward hooks that foreign code leaves behind when it raises."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, ids in before.items():
            for key in set(module._forward_hooks) - ids:
                del module._forward_hooks[key]


@contextlib.contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Restore the global random state of the CPU and of one accelerator."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        yield


@contextlib.contextmanager
def visiting(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode, frozen (or all trainable) parameters, untouched ``.grad`` and random state."""
    with (
        evaluating(model),
        requiring_grad(model, gradients),
        same_randomness(device_of(model)),
        torch.set_grad_enabled(gradients),
    ):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a model without any."""
    tensor = first_tensor(model)
    return torch.device("cpu") if tensor is None else tensor.device


def first_tensor(model: nn.Module) -> Tensor | None:
    """The first floating-point parameter, or buffer, of a model."""
    for source in (model.parameters(), model.buffers()):
        for tensor in source:
            if tensor.is_floating_point():
                return tensor
    return None
