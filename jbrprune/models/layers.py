"""The one table of what is known of layer classes and of the widths that models keep of themselves.

Classes are named by strings and looked up over the whole inheritance line, so that timm's subclasses are covered
without importing timm. A new quirk is one row, and what a row names as a width is set when channels go, saved with the
model and restored with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Layer:
    """What is known of a class of layers; a field that is None is looked up in the next base class.

    Attributes:
        channel_dim: Dimension of input and output that holds the channels: 1 or -1.
        tensors: Side (``out``, ``in``) -> own tensor -> dimension that holds the channels of that side. Not every
            module of a class has all of these tensors.
        widths: Side -> attribute that says how many channels there are, or a tuple that ends with their number.
        groups: Attribute that says in how many groups the channels come.
        mixes_channels: Whether a channel of the output depends on the other channels of the input.
        affine_part: Submodule whose input is the layer's affine output, where an activation is fused behind it.
        adds_input: Whether the output is the input plus a function of the parameters: out = a + W n(a) + b.
        standardises: Whether a convolution standardises its weights over the inputs of each filter.
    """

    channel_dim: int | None = None
    tensors: Mapping[str, Mapping[str, int]] | None = None
    widths: Mapping[str, str] | None = None
    groups: str | None = None
    mixes_channels: bool | None = None
    affine_part: str | None = None
    adds_input: bool | None = None
    standardises: bool | None = None


_WEIGHT_AND_BIAS = {"out": {"weight": 0, "bias": 0}}
_STATISTICS = {"out": {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}}
_TOKEN_NORM = Layer(-1, {"out": {"weight": -1, "bias": -1}}, {"out": "normalized_shape"}, mixes_channels=True)

LAYERS: dict[str, Layer] = {
    "_ConvNd": Layer(
        1,
        {"out": {"weight": 0, "bias": 0, "gain": 0}, "in": {"weight": 1}},
        {"out": "out_channels", "in": "in_channels"},
        groups="groups",
    ),
    "_ConvTransposeNd": Layer(None, {"out": {"weight": 1, "bias": 0}, "in": {"weight": 0}}),
    "Linear": Layer(-1, _WEIGHT_AND_BIAS | {"in": {"weight": 1}}, {"out": "out_features", "in": "in_features"}),
    "RNNBase": Layer(
        -1, {"in": {"weight_ih_l0": 1, "weight_ih_l0_reverse": 1}}, {"in": "input_size"}
    ),  # not its states
    "PReLU": Layer(None, {"out": {"weight": 0}}, {"out": "num_parameters"}),
    "_NormBase": Layer(1, _STATISTICS, {"out": "num_features"}),  # BatchNorm, SyncBatchNorm, InstanceNorm
    "GroupNorm": Layer(1, _WEIGHT_AND_BIAS, {"out": "num_channels"}, groups="num_groups", mixes_channels=True),
    **dict.fromkeys(["LayerNorm", "RMSNorm"], _TOKEN_NORM),
    # timm: norms and scales that inherit from nothing, or from the channels-last ones
    **dict.fromkeys(["RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"], _TOKEN_NORM),
    **dict.fromkeys(["LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d"], replace(_TOKEN_NORM, channel_dim=1)),
    **dict.fromkeys(["RmsNorm2d", "RmsNorm2dFp32"], replace(_TOKEN_NORM, channel_dim=1)),
    **dict.fromkeys(["SimpleNorm2d", "SimpleNorm2dFp32"], replace(_TOKEN_NORM, channel_dim=1)),
    **dict.fromkeys(["FrozenBatchNorm2d", "FrozenBatchNormAct2d"], Layer(None, _STATISTICS)),
    "GlobalResponseNorm": Layer(-1, _WEIGHT_AND_BIAS, mixes_channels=True, adds_input=True),
    "LayerScale": Layer(-1, {"out": {"gamma": 0}}),
    "LayerScale2d": Layer(1, {"out": {"gamma": 0}}),
    "BlurPool2d": Layer(None, {"out": {"filt": 0}}, {"out": "channels"}),
    # timm: an activation is fused behind the norm, which is affine up to the input of its `drop`
    **dict.fromkeys(["BatchNormAct2d", "SyncBatchNormAct", "GroupNormAct"], Layer(affine_part="drop")),
    **dict.fromkeys(["LayerNormAct", "RmsNormAct", "RmsNormAct2d"], Layer(affine_part="drop")),
    **dict.fromkeys(["GroupNorm1Act", "LayerNormActFp32", "RmsNormActFp32"], Layer(affine_part="drop")),
    **dict.fromkeys(["LayerNormAct2d", "LayerNormAct2dFp32"], Layer(1, affine_part="drop")),
    "RmsNormAct2dFp32": Layer(affine_part="drop"),
    **dict.fromkeys(["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"], Layer(standardises=True)),
}


@dataclass(frozen=True)
class HeadLayout:
    """How an attention class lays out its heads.

    Attributes:
        producers: Linear submodules whose output rows are ``[blocks, heads, head_dim]``, and their blocks.
        consumer: Linear submodule whose input columns are ``[heads, head_dim]``.
        count: Attribute that holds the number of heads.
        size: Attribute that holds head_dim.
        widths: Attributes that hold heads * head_dim.
        mixed: Submodules that mix the heads unless they are `nn.Identity`: heads cannot go then.
    """

    producers: tuple[tuple[str, int], ...]
    consumer: str
    count: str
    size: str
    widths: tuple[str, ...]
    mixed: tuple[str, ...]


# Exact classes: a subclass may have another forward.
HEADS: dict[str, HeadLayout] = {
    "timm.layers.attention.Attention": HeadLayout(
        (("qkv", 3), ("gate", 1)), "proj", "num_heads", "head_dim", ("attn_dim",), ("norm",)
    ),
}

FEATURE_WIDTHS = ("num_features", "head_hidden_size")
"""Attributes in which a timm model, or its head, keeps the width of the features that its classifier reads."""

STREAM_WIDTHS = ("embed_dim",)
"""Attributes in which a timm model keeps the width of its residual stream."""

BLOCK_WIDTHS = {"in_chs": "in", "out_chs": "out", "dim": "in", "groups": "in"}
"""Attributes from which a timm block whose branches merge makes the one layer; the side of a layer inside."""

SIZE_ATTRIBUTES = frozenset(
    (
        *(attribute for row in LAYERS.values() for attribute in (row.widths or {}).values()),
        *(row.groups for row in LAYERS.values() if row.groups),
        *(name for row in HEADS.values() for name in (row.count, row.size, *row.widths)),
        *FEATURE_WIDTHS,
        *STREAM_WIDTHS,
        *BLOCK_WIDTHS,
    )
)
"""Attributes that say how wide a module is: integers, or tuples of integers."""


# --- widths that are kept beside the tensors ------------------------------------------------------


def is_size(value: object) -> bool:
    """Whether it is a natural number, or a tuple of such."""
    items = value if isinstance(value, tuple) and value else (value,)
    return all(type(item) is int and item >= 0 for item in items)


def size_attributes(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """What a module says of its own widths, by attribute, in the order of the names: to be saved with its tensors.

    Example:
        >>> size_attributes(nn.Linear(4, 3))
        {'in_features': 4, 'out_features': 3}
    """
    own = vars(module)
    return {name: own[name] for name in sorted(SIZE_ATTRIBUTES & own.keys()) if is_size(own[name])}


def set_size_attributes(module: nn.Module, values: Mapping[str, int | tuple[int, ...]]) -> None:
    """Give a module the widths that `size_attributes` read from a smaller one."""
    layout: Any = head_layout(module)
    for name, value in values.items():
        if layout and name == layout.size:  # as in fused kernels, which know of no other scale
            module.scale *= math.sqrt(getattr(module, name) / max(1, value))  # type: ignore[reportOperatorIssue]
        setattr(module, name, value)


@torch.no_grad()
def narrow_heads(attention: Any) -> None:
    """Set the size of every head from the shapes of its tensors; what it computes keeps the old scale of the softmax.

    That scale is one over the root of the size of a head, so that the queries are to make up for its change.
    """
    inner = attention.proj.in_features
    size = inner // attention.num_heads
    for tensor in attention.qkv.parameters():
        tensor[:inner] *= math.sqrt(size / attention.head_dim)
    set_size_attributes(attention, {"head_dim": size, "attn_dim": inner})


def has_free_heads(module: nn.Module) -> bool:
    """Whether the queries and keys, and the values, of every head may be turned without a change of what comes out."""
    if head_layout(module) is None:
        return False
    norms = (getattr(module, name) for name in ("q_norm", "k_norm"))
    linear = all(type(layer) is nn.Linear and layer.bias is not None for layer in (module.qkv, module.proj))
    return linear and module.gate is None and all(type(norm) is nn.Identity for norm in norms)


def refresh(module: nn.Module, *, width: int | None = None) -> None:
    """Set the attributes that say how wide a layer is from the shapes of its tensors.

    Grouped convolutions and GroupNorm keep the number of channels per group they had, attention the size of a head.

    Args:
        module: The module, its tensors already replaced.
        width: Number of channels of a layer that has no tensors.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 3)
        >>> layer.weight = torch.nn.Parameter(torch.zeros(3, 2))
        >>> refresh(layer)
        >>> layer.in_features
        2
    """
    own, groups = own_tensors(module), group_count(module)
    sizes: dict[str, int] = {}
    for side, dims in (_fact(type(module), "tensors") or {}).items():
        size = next((own[name].shape[dim] for name, dim in dims.items() if name in own), width)
        if size is not None:
            sizes[side] = size
    if groups > 1 and sizes:
        grouped = "in" if getattr(module, "transposed", False) else "out"  # weight [out, in / groups, ...] or turned
        left = sizes[grouped] // (width_of(module, grouped) // groups)  # type: ignore[operator]
        setattr(module, _fact(type(module), "groups"), left)
        sizes = {side: size if side == grouped else size * left for side, size in sizes.items()}
    for side, name in (_fact(type(module), "widths") or {}).items():
        before = getattr(module, name, None)
        if side in sizes and before is not None:
            setattr(module, name, (*before[:-1], sizes[side]) if isinstance(before, tuple) else sizes[side])
    layout = head_layout(module)
    if layout is not None:
        inner = width_of(module.get_submodule(end_of(module, layout.consumer, "in")), "in")
        setattr(module, layout.count, inner // getattr(module, layout.size))  # type: ignore[operator]
        for name in layout.widths:
            setattr(module, name, inner)


# --- channels -------------------------------------------------------------------------------------


@cache
def _fact(kind: type, field: str) -> Any:
    """What the table says of a class of modules: the row of the nearest base that says anything."""
    names = [re.sub(".*FrozenBatchNorm2d", "FrozenBatchNorm2d", cls.__name__) for cls in kind.__mro__]
    rows = (LAYERS[name] for name in names if name in LAYERS)  # transformers has a frozen norm of each detector
    return next((value for row in rows if (value := getattr(row, field)) is not None), None)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself, by their own names."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def channel_tensors(module: nn.Module, side: str) -> dict[str, int]:
    """Own tensor -> dimension that holds the channels of a side, of those that a class may have.

    Example:
        >>> channel_tensors(nn.Linear(4, 3), "out")
        {'weight': 0, 'bias': 0}
    """
    return (_fact(type(module), "tensors") or {}).get(side, {})


def width_of(module: nn.Module, side: str) -> int | None:
    """Number of channels on a side of a layer, of heads, or size of each; None where it has none or is not known.

    Example:
        >>> width_of(nn.Linear(4, 3), "in")
        4
    """
    layout = head_layout(module)
    if side in ("heads", "head_dim") and layout is not None:
        return getattr(module, layout.count if side == "heads" else layout.size)
    width = getattr(module, (_fact(type(module), "widths") or {}).get(side, ""), None)
    if width is not None:
        return width[-1] if isinstance(width, tuple) else width
    own = own_tensors(module)
    return next((own[name].shape[dim] for name, dim in channel_tensors(module, side).items() if name in own), None)


def head_layout(module: nn.Module) -> HeadLayout | None:
    """How an attention module lays out its heads; None for any other module, or where something mixes the heads."""
    layout = HEADS.get(f"{type(module).__module__}.{type(module).__qualname__}")
    apart = layout and all(type(getattr(module, part)) is nn.Identity for part in layout.mixed)
    return layout if apart else None


def group_count(module: nn.Module) -> int:
    """In how many groups the channels come that can go only together."""
    attribute = _fact(type(module), "groups")
    return getattr(module, attribute) if attribute else 1


def channel_dim(module: nn.Module) -> int | None:
    """Dimension of a layer's input and output that holds channels: 1, -1, or None if unknown.

    Unknown too: a norm over several dimensions, whose parameters do not belong to channels.
    """
    if len(getattr(module, "normalized_shape", ())) > 1:
        return None
    known = _fact(type(module), "channel_dim")
    own = getattr(module, "channel_dim", None)  # of global response normalisation
    return own if known is not None and isinstance(own, int) else known


def affine_part(module: nn.Module) -> str | None:
    """Submodule whose input is the layer's affine output, where an activation is fused behind it."""
    return _fact(type(module), "affine_part")


def adds_input(module: nn.Module) -> bool:
    """Whether only the difference of output and input is affine in the layer's parameters."""
    return bool(_fact(type(module), "adds_input"))


def mixes_channels(module: nn.Module) -> bool:
    """Whether a channel of the output depends on the other channels of the input, without weights between them."""
    return bool(_fact(type(module), "mixes_channels"))


def standardises_inputs(module: nn.Module) -> bool:
    """Whether the weights that a consumer applies to an input depend on its weights for the other inputs."""
    return bool(_fact(type(module), "standardises")) and is_consumer(module) and not is_grouped(module)


def has_parameters(module: nn.Module) -> bool:
    """Whether a layer has parameters of its own: a norm may be without."""
    return any(isinstance(getattr(module, name, None), Tensor) for name in ("weight", "bias", "gamma", "weight_ih_l0"))


def is_consumer(module: nn.Module) -> bool:
    """Whether the layer mixes input channels: Linear, recurrent, or a convolution that is not depthwise."""
    return isinstance(module, nn.Linear | nn.RNNBase | _ConvNd) and not is_depthwise(module)


def is_depthwise(module: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether every output channel reads one input channel only."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels


def is_grouped(module: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether a convolution has several groups of several input channels."""
    return isinstance(module, _ConvNd) and 1 < module.groups < module.in_channels


def is_normalisation(module: nn.Module) -> bool:
    """Whether the layer only rescales its channels: a norm, a scale, a depthwise convolution."""
    return channel_dim(module) is not None and not is_consumer(module)


def is_factorable(module: nn.Module) -> bool:
    """Whether two layers can stand in the place of this one: linear, a patch embedding, or two already."""
    patches = type(module) is nn.Conv2d and set(module.kernel_size) != {1}
    return is_pair(module) or ((patches or type(module) is nn.Linear) and _is_linear(module))


def is_pair(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether two linear layers, of which the second reads single positions, stand in the place of one."""
    parts = list(module.children()) if type(module) is nn.Sequential else []
    fits = len(parts) == 2 and all(map(_is_linear, parts)) and type(parts[0]) is type(parts[1])
    return fits and width_of(parts[0], "out") == width_of(parts[1], "in") and parts[1].weight[0, 0].numel() == 1  # type: ignore[index]


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, or a convolution that reads every pixel once."""
    if type(module) is nn.Conv2d:
        once = module.kernel_size == module.stride and set(module.padding) == {0} and set(module.dilation) == {1}
        return once and module.groups == 1 and "weight" in module._parameters
    return type(module) is nn.Linear and "weight" in module._parameters


def end_of(module: nn.Module, name: str, side: str) -> str:
    """Name of the layer that reads the input of a submodule (side ``in``) or gives its output: it may stand as two.

    Example:
        >>> end_of(nn.ModuleDict({"proj": nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))}), "proj", "out")
        'proj.1'
    """
    return f"{name}.{'01'[side == 'out']}" if is_pair(module.get_submodule(name)) else name


def has_running_statistics(module: nn.Module) -> bool:
    """Whether the layer is a batch norm that normalises with stored statistics in eval mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


# --- whole models ---------------------------------------------------------------------------------


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the layers whose outputs are the logits, as far as the model tells."""
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[head] for head in get_heads(model) if head in names)


def get_heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """What a model calls its classifier, in one or several parts; none where it has none to show."""
    try:
        heads = model.get_classifier()  # type: ignore[operator]
    except AttributeError:  # also of one that looks for a layer in what took the place of its head
        return ()
    return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def repeated_widths(
    model: nn.Module, streams: Iterable[str] = ()
) -> list[tuple[Callable[[int], None], nn.Module, str]]:
    """Where models, heads and blocks repeat the width of a layer: ``reset_classifier`` and decoders build from it.

    Args:
        model: The model, before channels go.
        streams: Names of layers that write to a residual stream.

    Returns:
        What sets such a number, the layer, and the attribute in which the layer says it.
    """
    modules = dict(model.named_modules())
    widths = {module: facts for module in modules.values() if (facts := _fact(type(module), "widths"))}
    heads = [modules[name] for name in (*classifiers(model)[:1], "conv_head") if name in modules]
    readers = [layer for head in heads for layer in head.modules()]
    reading = [(layer, widths[layer]["in"]) for layer in readers if "in" in widths.get(layer, {})]
    found = []
    for module in modules.values():
        if module in widths or head_layout(module):
            continue
        for attribute in sorted(SIZE_ATTRIBUTES & vars(module).keys()):
            inside, value = [layer for layer in module.modules() if layer in widths], getattr(module, attribute)
            same = [(layer, attribute) for layer in inside]
            if attribute in BLOCK_WIDTHS and hasattr(module, "reparameterize"):
                side = BLOCK_WIDTHS[attribute]
                same += [(layer, widths[layer].get(side, widths[layer]["out"])) for layer in inside]
            if attribute in STREAM_WIDTHS:
                same = [(modules[name], widths[modules[name]]["out"]) for name in streams]
            elif attribute in FEATURE_WIDTHS and reading and reading[0][0] in set(module.modules()):
                same = reading
            pair = next((pair for pair in same if is_size(value) and getattr(*pair, None) == value), None)
            if pair is not None:
                found.append((partial(setattr, module, attribute), *pair))
    info = getattr(model, "feature_info", ())
    for feature in info if isinstance(info, list) else ():
        name, own = feature.get("module"), list(modules)
        last = max((i for i, inner in enumerate(own) if f"{inner}.".startswith(f"{name}.")), default=-1)
        before = [(modules[inner], "out") for inner in reversed(own[: last + 1])]
        after = [(modules[inner], "in") for inner in own[last + 1 :]]  # which reads what several layers put together
        for layer, side in before + after:
            if width_of(layer, side) == feature["num_chs"] and side in widths.get(layer, {}):
                found.append((partial(feature.__setitem__, "num_chs"), layer, widths[layer][side]))
                break
    return found
