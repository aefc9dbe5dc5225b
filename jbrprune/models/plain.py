"""Plain modules with plain tensors are what can be pruned: wrappers are taken off, anything else is refused."""

from __future__ import annotations

import itertools
import logging

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jbrprune.errors import ModelError

logger = logging.getLogger(__name__)

WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    **dict.fromkeys(["DataParallel", "DistributedDataParallel", "AveragedModel"], "module"),
}
"""Class -> where it keeps the module that it wraps."""

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.q", "torchao.quantization")
OBSERVERS = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`, `DataParallel`, `DistributedDataParallel` or `AveragedModel`; it is logged.

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
            problem = (
                "is TorchScript, which cannot change: prune the module that it was made from, and script the result"
            )
        elif kind == "OptimizedModule":
            problem = (
                f"is compiled: put back what is inside, model.{name} = model.{name}._orig_mod, and compile the result"
            )
        elif place.startswith(QUANTIZED):
            problem = (
                "is quantized, or prepared for it: prune the model of floating-point numbers, and quantize the result"
            )
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
