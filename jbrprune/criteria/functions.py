"""What a layer function does with its parameters: ``F.linear``, ``F.conv2d``, ... read as a `Call`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a layer function.

    Attributes:
        input: What the function reads.
        weight: Its weight, if any.
        bias: Its bias, if any.
        channels_first: Whether dimension 1, not the last ones, holds the channels of the output.
        convolution: Geometry of a convolution.
        plain: The norm without scale and bias: input -> output.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    channels_first: bool = True
    convolution: Convolution | None = None
    plain: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Convolution:
    """Geometry: ``small`` (fewer positions) has one position per place of the kernel on the padded ``big`` one.

    For a convolution ``big`` is the input and ``small`` the output, for a transposed one the other way round; the
    weight is ``[channels of small, channels of big / groups, *kernel]`` for both.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(input, weight, bias, channels_first=False)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    kernel = tuple(weight.shape[2:])
    spread = _each(dilation, kernel)
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(spread, kernel)]
        pads = tuple((w // 2, w - w // 2) for w in whole)
    else:
        pads = tuple((p, p) for p in _each(0 if isinstance(padding, str) else padding, kernel))
    geometry = Convolution(kernel, _each(stride, kernel), pads, spread, groups, transposed=False)
    return Call(input, weight, bias, convolution=geometry)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Call:
    kernel = tuple(weight.shape[2:])
    # The extra rows of output_padding lie behind the last place of the kernel: less padding there.
    pads = tuple((p, p - extra) for p, extra in zip(_each(padding, kernel), _each(output_padding, kernel)))
    geometry = Convolution(kernel, _each(stride, kernel), pads, _each(dilation, kernel), groups, transposed=True)
    return Call(input, weight, bias, convolution=geometry)


def _each(value: int | Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(like) if len(values) == 1 else values


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # type: ignore[no-untyped-def]
    def plain(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, None, None, training, 0.0, eps)

    return Call(input, weight, bias, plain=plain)


def _instance_norm(  # type: ignore[no-untyped-def]
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    def plain(x: Tensor) -> Tensor:
        return F.instance_norm(x, running_mean, running_var, None, None, use_input_stats, 0.0, eps)

    return Call(input, weight, bias, plain=plain)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    return Call(input, weight, bias, plain=lambda x: F.group_norm(x, num_groups, None, None, eps))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    def plain(x: Tensor) -> Tensor:
        return F.layer_norm(x, normalized_shape, None, None, eps)

    return Call(input, weight, bias, channels_first=False, plain=plain)


def _rms_norm(input, normalized_shape, weight=None, eps=None):  # type: ignore[no-untyped-def]
    return Call(input, weight, None, channels_first=False, plain=lambda x: F.rms_norm(x, normalized_shape, None, eps))


FUNCTIONS: dict[Callable[..., Tensor], Callable[..., Call]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
"""Every function whose use of a parameter is understood -> what reads its arguments."""
