"""What a run depends on, as JSON that is the same in every process: values, sources and digests, never an address."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jbrprune.pruning.runs import called
from jbrprune.report.records import plain

_DEEPEST = 6
"""How far the state of a criterion is followed; below that only types count."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def described(value: object) -> Any:
    """A setting as JSON; criteria by name, source and state, or by their sums."""
    sums = getattr(value, "sums", None)
    if sums is not None:
        return [called(value), digest(sums)]
    return _stable(value, 0) if callable(value) else plain(value)


@functools.singledispatch
def _stable(value: Any, depth: int) -> Any:
    """A function or an object: its name, its source, and its attributes down to a depth."""
    name = called(value) if callable(value) else f"{type(value).__module__}.{type(value).__qualname__}"
    if depth > _DEEPEST:
        return name
    return [name, _source(value), _stable(getattr(value, "__dict__", {}), depth + 1)]


@_stable.register(type(None))
@_stable.register(str)
@_stable.register(int)
@_stable.register(float)
def _(value: Any, depth: int) -> Any:
    return value


@_stable.register
def _(value: Tensor, depth: int) -> str:
    return digest({"": value})


@_stable.register
def _(value: np.ndarray, depth: int) -> str:
    return hashlib.sha256(repr(value.tolist()).encode()).hexdigest()


@_stable.register
def _(value: nn.Module, depth: int) -> list[Any]:
    own = {name: item for name, item in vars(value).items() if not name.startswith("_")}
    return [called(value), _source(value), _stable(own, depth + 1), digest(value.state_dict())]


@_stable.register(Mapping)
def _(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    return {str(key): _stable(item, depth + 1) for key, item in value.items()}


@_stable.register(list)
@_stable.register(tuple)
def _(value: Sequence[Any], depth: int) -> list[Any]:
    return [_stable(item, depth + 1) for item in value]


@_stable.register(set)
@_stable.register(frozenset)
def _(value: set[Any] | frozenset[Any], depth: int) -> list[str]:
    return sorted(repr(_stable(item, depth + 1)) for item in value)


@_stable.register
def _(value: functools.partial, depth: int) -> list[Any]:
    return [_stable(part, depth + 1) for part in (value.func, value.args, value.keywords)]


@_stable.register
def _(value: MethodType, depth: int) -> list[Any]:
    return [_stable(part, depth + 1) for part in (value.__func__, value.__self__)]


def _source(criterion: object) -> str | None:
    """SHA-256 of the source of a function (not of what it wraps) or of an object's class, where there is one."""
    code = getattr(criterion, "__code__", criterion)
    try:
        source = inspect.getsource(code if inspect.isroutine(criterion) else type(criterion))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()
