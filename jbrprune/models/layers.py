"""What is known about layer classes: which dimension of their input and output holds the channels.

Classes are named by string and looked up over the whole inheritance line, so that timm's subclasses are
covered without importing timm here.
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNEL_DIM: dict[str, int] = {
    "_ConvNd": 1,
    "_NormBase": 1,  # BatchNorm, SyncBatchNorm, InstanceNorm
    "GroupNorm": 1,
    "Linear": -1,
    "LayerNorm": -1,
    "RMSNorm": -1,
    "LayerScale": -1,
    # timm: norms and scales over NCHW that inherit from, or stand beside, the channels-last ones
    "LayerNorm2d": 1,
    "LayerNorm2dFp32": 1,
    "LayerNormExp2d": 1,
    "LayerNormAct2d": 1,
    "LayerNormAct2dFp32": 1,
    "RmsNorm": -1,
    "RmsNormFp32": -1,
    "RmsNorm2d": 1,
    "RmsNorm2dFp32": 1,
    "SimpleNorm": -1,
    "SimpleNormFp32": -1,
    "SimpleNorm2d": 1,
    "SimpleNorm2dFp32": 1,
    "LayerScale2d": 1,
    "GlobalResponseNorm": -1,  # unless the module says otherwise, see channel_dim
}

# timm's norm-activation layers are affine up to the input of this submodule, not up to their output.
AFFINE_PART: dict[str, str] = {
    "BatchNormAct2d": "drop",
    "SyncBatchNormAct": "drop",
    "GroupNormAct": "drop",
    "GroupNorm1Act": "drop",
    "LayerNormAct": "drop",
    "LayerNormActFp32": "drop",
    "LayerNormAct2d": "drop",
    "LayerNormAct2dFp32": "drop",
    "RmsNormAct": "drop",
    "RmsNormActFp32": "drop",
    "RmsNormAct2d": "drop",
    "RmsNormAct2dFp32": "drop",
}

# Layers that add a function of their parameters to their input: out = a + W n(a) + b.
ADDS_INPUT = ("GlobalResponseNorm",)

# Convolutions of timm that standardise their weights over the inputs of each filter.
STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def _looked_up(module: nn.Module, table: dict) -> object:
    return next((table[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in table), None)


def channel_dim(module: nn.Module) -> int | None:
    """Dimension of a layer's input and output that holds channels: 1, -1, or None if unknown.

    Unknown too: a norm over several dimensions, whose parameters do not belong to channels.
    """
    if len(getattr(module, "normalized_shape", ())) > 1:
        return None
    known = _looked_up(module, CHANNEL_DIM)
    own = getattr(module, "channel_dim", None)
    return own if known is not None and isinstance(own, int) else known  # type: ignore[return-value]


def affine_part(module: nn.Module) -> str | None:
    """Submodule whose input is the layer's affine output, where an activation is fused behind it."""
    return _looked_up(module, AFFINE_PART)  # type: ignore[return-value]


def adds_input(module: nn.Module) -> bool:
    """Whether only the difference of output and input is affine in the layer's parameters."""
    return any(cls.__name__ in ADDS_INPUT for cls in type(module).__mro__)


def has_parameters(module: nn.Module) -> bool:
    """Whether a layer has parameters of its own: a norm may be without."""
    return any(isinstance(getattr(module, name, None), Tensor) for name in ("weight", "bias", "gamma"))


def is_consumer(module: nn.Module) -> bool:
    """Whether the layer mixes input channels: Linear, or a convolution that is not depthwise."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return not is_depthwise(module)
    return isinstance(module, nn.Linear)


def standardises_inputs(module: nn.Module) -> bool:
    """Whether the weights that a consumer applies to an input depend on its weights for the other inputs."""
    named = any(cls.__name__ in STANDARDISED for cls in type(module).__mro__)
    return named and is_consumer(module) and not is_grouped(module)


def is_depthwise(module: nn.Module) -> bool:
    """Whether every output channel reads one input channel only."""
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def is_grouped(module: nn.Module) -> bool:
    """Whether a convolution has several groups of several input channels."""
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.in_channels


def has_running_statistics(module: nn.Module) -> bool:
    """Whether the layer is a batch norm that normalises with stored statistics in eval mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def out_channels(module: nn.Module) -> int | None:
    """Width of a layer's output, where the class is known."""
    for name in ("out_channels", "out_features", "num_features", "num_channels"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    weight = next((p for p in (getattr(module, name, None) for name in ("weight", "gamma")) if p is not None), None)
    return None if weight is None or channel_dim(module) is None else weight.shape[0]


def in_channels(module: nn.Module) -> int | None:
    """Width of a consumer's input."""
    return getattr(module, "in_channels", getattr(module, "in_features", None))


def is_normalisation(module: nn.Module) -> bool:
    """Whether the layer only rescales its channels: a norm, a scale, a depthwise convolution."""
    return channel_dim(module) is not None and not is_consumer(module)
