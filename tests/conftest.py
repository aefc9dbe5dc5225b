"""One thread, a fixed seed, global switches as before, and `fingerprint`: what a call must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from jbrprune.evaluation import latency
from jbrprune.evaluation.agreement import parameters_of

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where torch keeps the hooks of a module: dictionaries by the id of the hook."""


torch.set_num_threads(1)  # tests are tiny: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed; what all tests share is as it was afterwards."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    before = _switches()
    yield
    torch.set_num_threads(threads)
    assert _switches() == before, "a switch that all tests share was left changed"


@pytest.fixture(autouse=True, scope="session")
def _no_clock() -> Iterator[None]:
    """A pass takes 1 microsecond and 1 nanosecond per parameter: tests neither depend on a clock nor wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "time_pass", lambda model, images, passes=1: 1e-6 + 1e-9 * parameters_of(model))
        yield


def _switches() -> dict[str, object]:
    return {
        "timm's fused attention": bool(timm.layers.use_fused_attn()),
        "attention kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "default dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture
def fingerprint() -> Callable[[nn.Module], dict[str, Any]]:
    """The function of the same name."""
    return _fingerprint


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a user's that a call must not change; compare with ``==``."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    tensors = parameters | dict(model.named_buffers())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, table)) for table in HOOK_TABLES] for name, module in modules.items()},
        "flags": {name: _flags(module) for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "grad": {name: (id(p.grad), None if p.grad is None else _bits(p.grad)) for name, p in parameters.items()},
        "objects": {name: (id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()},
        "values": {name: _bits(tensor) for name, tensor in tensors.items()},
        "random": (_bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def _flags(module: nn.Module) -> dict[str, object]:
    plain = bool | int | float | str | tuple | None
    return {name: value for name, value in vars(module).items() if isinstance(value, plain)}


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
