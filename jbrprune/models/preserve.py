"""What a user's model may be, and contexts that leave it as it was: mode, hooks, flags, requires_grad, gradients, RNG.

The only file of the project that switches modes or registers hooks on a model.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jbrprune.errors import ModelError

logger = logging.getLogger(__name__)

Hook = Callable[..., object]


@contextlib.contextmanager
def restored(objects: Iterable[object], attribute: str) -> Iterator[None]:
    """Give every object its own value of an attribute back afterwards, also after an exception."""
    before = [(thing, getattr(thing, attribute)) for thing in objects]
    try:
        yield
    finally:
        for thing, value in before:
            setattr(thing, attribute, value)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode; restore each module's own mode afterwards."""
    with restored(model.modules(), "training"):
        model.eval()
        yield


@contextlib.contextmanager
def requiring_grad(model: nn.Module, flag: bool) -> Iterator[None]:
    """Set ``requires_grad`` of every parameter; restore each parameter's own flag afterwards."""
    parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    with restored(parameters, "requires_grad"):
        for parameter in parameters:
            parameter.requires_grad_(flag)
        yield


@contextlib.contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Restore the global random state of the CPU and of one accelerator."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        yield


@contextlib.contextmanager
def inference_state(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode, frozen (or all trainable) parameters, untouched ``.grad`` and random state, no autocast from outside.

    Activation checkpointing (``grad_checkpointing`` of timm) is off: it would run modules and their hooks twice. So is
    compilation in place (``module.compile()``), which runs without hooks.
    """
    device = device_of(model)
    learning = list(model.parameters()) if gradients else []
    checkpointed = [module for module in model.modules() if getattr(module, "grad_checkpointing", None) is True]
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    autocast = torch.amp.is_autocast_available(device.type)
    with (
        evaluating(model),
        requiring_grad(model, gradients),
        restored(learning, "grad"),
        restored(checkpointed, "grad_checkpointing"),
        restored(compiled, "_compiled_call_impl"),
        same_randomness(device),
        torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext(),
        torch.inference_mode(False),  # also leaves an inference mode around the call, where autograd is off
        torch.set_grad_enabled(gradients),
    ):
        for parameter in learning:
            parameter.grad = None
        for module in checkpointed:
            module.grad_checkpointing = False  # type: ignore[assignment]
        for module in compiled:
            module._compiled_call_impl = None
        yield


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
def recorded_calls(model: nn.Module) -> Iterator[list[str]]:
    """The qualified names of the modules that are called meanwhile, in order."""
    called: list[str] = []
    with hooked(
        model, forward_pre={name: lambda *_, name=name: called.append(name) for name, _ in model.named_modules()}
    ):
        yield called


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


def input_of(args: tuple, kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a hook sees as a layer's one input, by position or by whatever name its forward gives it."""
    return args[0] if args else next(iter(kwargs.values()))


def copy_model(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy of a model; ``share`` parameters and buffers, and it costs next to no memory.

    Raises:
        ModelError: The model holds something that cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if share else {}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. If a module caches what it "
            "computed with gradients, make the model anew and run it under torch.no_grad() only."
        ) from error


def refuse_masked(model: nn.Module) -> None:
    """Refuse a model that `torch.nn.utils.prune` has wrapped.

    Raises:
        ModelError: Names the parameters.
    """
    masked = [name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")]
    masked = [name for name in masked if f"{name}_orig" in dict(model.named_parameters())]
    if masked:
        raise ModelError(
            f"{masked[0]} (and {len(masked) - 1} more) is masked by torch.nn.utils.prune; such a model cannot be "
            "copied or shrunk. Make the masks permanent first: torch.nn.utils.prune.remove(module, name)."
        )


def tensors_of(returned: object, name: str = "") -> dict[str, Tensor]:
    """The floating-point tensors in whatever a model returned, by key, attribute or position, such as ``hidden.0``.

    Scalars are left out.

    Example:
        >>> list(tensors_of({"logits": torch.zeros(2, 10), "maps": [torch.zeros(2, 4, 8, 8)]}))
        ['logits', 'maps.0']
    """
    if isinstance(returned, Tensor):
        wanted = returned.is_floating_point() and returned.dim() > 0
        return {name: returned if returned.dim() > 1 else returned[:, None]} if wanted else {}
    items = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
    if isinstance(returned, list | tuple):
        keys = getattr(returned, "_fields", range(len(returned))) if name or len(returned) > 1 else [""]
        items = dict(zip(keys, returned))
    parts = [tensors_of(value, f"{name}.{key}".strip(".")) for key, value in items.items()]
    return {key: tensor for part in parts for key, tensor in part.items()}


def flatten_returned(returned: object, images: int) -> Tensor:
    """``[B, V]`` all that a model returned for its images, in any form.

    Raises:
        ModelError: There is no floating-point tensor with one row per image.
    """
    rows = [tensor.reshape(images, -1) for tensor in tensors_of(returned).values() if len(tensor) == images]
    if not rows:
        raise ModelError(f"The model returned {describe_returned(returned)}, no tensor with one row per image.")
    return torch.cat(rows, 1)


def logits_of(output: object) -> Tensor:
    """The logits in whatever a model returned.

    Args:
        output: A tensor, an object with ``.logits``, a mapping with the key ``logits``, or one of
            these alone in a tuple or list.

    Returns:
        ``[B, K]`` floating point.

    Raises:
        ModelError: Several outputs, none that is known to be the logits, or another rank or dtype.

    Example:
        >>> logits_of({"logits": torch.zeros(2, 10)}).shape
        torch.Size([2, 10])
    """
    found = tensors_of(output)
    value = found.get("logits", found.get(""))
    if value is None:
        raise ModelError(
            f"The model returned {describe_returned(output)}, of which none is known to be the logits. Wrap it in a "
            "module whose forward returns the logits [B, K] alone."
        )
    if value.dim() != 2:
        raise ModelError(
            f"Logits must be [B, K], the model returned {describe_returned(value)}. Give the model a "
            "classifier that pools over positions, or wrap it in a module that returns one row of logits per image."
        )
    return value


def describe_returned(value: object) -> str:
    """What a model returned, or data yielded, in words, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        shown = [*map(describe_returned, value[:4]), *["..."][: len(value) > 4]]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(shown)})"
    return f"a {type(value).__name__}" + (f" with the keys {list(value)}" if isinstance(value, Mapping) else "")


# --- plain modules with plain tensors are what can be pruned ---------------------------------------

WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    **dict.fromkeys(["DataParallel", "DistributedDataParallel", "AveragedModel", "ModelEmaV2", "ModelEmaV3"], "module"),
}
"""Class -> where it keeps the module that it wraps."""

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.q", "torchao.quantization")
OBSERVERS = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`, `DataParallel`, `DistributedDataParallel` and the like; it is logged.

    Example:
        >>> unwrap(nn.DataParallel(nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    while type(model).__name__ in WRAPPERS:
        inner = getattr(model, WRAPPERS[type(model).__name__])
        logger.info("%s is a wrapper: the %s inside is worked on.", type(model).__name__, type(inner).__name__)
        model = inner
    return model


def refuse_unusual(model: nn.Module) -> None:
    """Refuse modules and tensors that cannot be copied, differentiated or cut.

    Raises:
        ModelError: Names the first one, says what it is, and what to do.
    """
    for name, module in model.named_modules():
        place, kind = type(module).__module__, type(module).__name__
        hooks = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
        problem = None
        if isinstance(module, torch.jit.ScriptModule):
            problem = "is TorchScript, which cannot change: prune the module it was made from, and script the result"
        elif kind == "OptimizedModule":
            problem = f"is compiled: put back what is inside, model.{name} = model.{name}._orig_mod, compile afterwards"
        elif place.startswith(QUANTIZED):
            problem = "is quantized, or prepared for it: prune the floating-point model, and quantize the result"
        elif place.startswith(OBSERVERS):
            problem = "observes for quantization: prune the model before prepare() or prepare_qat()"
        for norm, call in {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}.items():
            if norm in hooks:
                problem = f"computes its weight in a hook: call torch.nn.utils.{call}(module) first"
        if problem:
            raise ModelError(f"{name or 'The model'} ({kind}) {problem}.")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        kind, problem = type(tensor), None
        if is_lazy(tensor):
            problem = "has no shape yet: run the model on an image once, model(images)"
        elif tensor.is_meta:
            problem = "is on the meta device and has no values: call model.to_empty(device='cpu') and load weights"
        elif tensor.is_inference():
            problem = "was made in inference mode: pass copy.deepcopy(model), made outside of torch.inference_mode()"
        elif tensor.is_quantized or not (kind is Tensor or issubclass(kind, nn.Parameter)):
            problem = f"is a {kind.__name__}, quantized or sharded: prune the plain model, and convert the result"
        if problem:
            raise ModelError(f"{name} {problem}.")
