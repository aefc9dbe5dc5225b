"""From masks to smaller shapes: channels that are dead after single weights were pruned go for good, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, UnsupportedModelError
from jbrprune.models import layers, preserve
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Selection, removed_channels
from jbrprune.structure.slicing import plan_cuts, remove_units, shrink_tensor
from jbrprune.structure.verification import verify_groups


@dataclass(frozen=True, eq=False)
class Shrunk:
    """What `shrink` did.

    Attributes:
        removed: Name of a group -> units that went; only groups that lost some.
        constant: Name of a group -> units that send the same for every image, but not zero, and so stayed.
        widths: Name of a convolution or linear layer -> output channels before and after; only where they changed.
        kept: Name of a layer -> why its channels were not looked at.
        masks: The masks that were passed, in the new shapes.
        notes: What else there is to say.
    """

    removed: dict[str, int] = field(default_factory=dict)
    constant: dict[str, int] = field(default_factory=dict)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Observed:
    """What arrives at the consumers: name -> ``[in]``, one value per input channel.

    Attributes:
        zero: Exactly zero everywhere, whatever the image shows.
        constant: The same for every image of this size.
    """

    zero: Mapping[str, Tensor] = field(default_factory=dict)
    constant: Mapping[str, Tensor] = field(default_factory=dict)


def shrink(
    model: nn.Module,
    example: Tensor,
    *,
    ignore: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Shrunk:
    r"""Remove the channels, heads and groups that contribute nothing, in place; the outputs stay the same.

    A unit u goes if each layer that reads one of its channels c has only zeros for it, or only zeros from it::

        W[:, c] = 0   or   a_c(x) = 0 at every position, for every image x

    The second is not read off one image: rows of zeros cut the image off, what depends on it is marked (by NaN, and
    by noise), and the marks are followed to the readers. A function that swallows
    NaN and both inputs can hide them. A channel that is constant but not zero stays: zero padding
    makes it depend on the position. Some removals make others possible; it ends when there is nothing left to remove.
    One unit of each group stays, and channels under a LayerNorm do.

    Args:
        model: A plain model; `jbrprune.make_permanent` makes one of a masked model. If nothing is dead,
            it keeps its very tensors.
        example: ``[B, C, H, W]`` an example input; the first two images are used.
        ignore: Globs of module names that stay as wide as they are (a name covers its submodules).
        masks: Name of a parameter -> boolean mask of its shape, to be cut as the parameter is. They do not decide
            what is dead: a weight of 0.0 is one, masked or not.
        seed: Seeds the trial of `jbrprune.structure.verification.verify_groups` and the noise.

    Returns:
        `Shrunk`. Where nothing can be removed safely (the graph cannot be traced, say), its notes tell why.

    Raises:
        ArgumentError: A glob that matches nothing, or a mask that fits no parameter.
        ModelError: The model is masked by `torch.nn.utils.prune`, or cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        >>> with torch.no_grad():
        ...     _ = net[3].weight[:, 9:18].zero_()  # nobody reads channel 1
        >>> shrink(net, torch.randn(2, 3, 5, 5)).removed
        {'0': 1}
        >>> net[0].weight.shape
        torch.Size([3, 3, 3, 3])
    """
    preserve.refuse_masked(model)
    left_masks = _checked(model, masks or {})
    images = _two(model, example)
    try:
        found = verify_groups(model, images, find_groups(model, images, ignore=ignore), seed=seed)
    except UnsupportedModelError as error:
        return Shrunk(masks=left_masks, notes=(str(error),))
    mixed = {group.name: why for group in found.groups if (why := _mixed(model, group))}
    groups = tuple(group for group in found.groups if group.name not in mixed)
    before, sizes = _widths(model), {group.name: group.size for group in groups}
    while True:
        observed = _Observed()  # what nobody reads is known from the weights alone
        selection = _removable(model, groups, observed)
        if not selection:
            observed = _observed(model, images, seed)
            selection = _removable(model, groups, observed)
        if not selection:
            break
        left_masks = _cut(model, left_masks, groups, selection)
        groups = remove_units(model, groups, selection)
    return Shrunk(
        removed={g.name: sizes[g.name] - g.size for g in groups if g.size < sizes[g.name]},
        constant={g.name: count for g in groups if (count := _constant(model, g, observed))},
        widths={name: (old, new) for name, new in _widths(model).items() if (old := before[name]) != new},
        kept=found.skipped | mixed,
        masks=left_masks,
        notes=tuple(
            f"{g.name}: the unit that is left contributes nothing; a layer keeps one."
            for g in groups
            if _idle(model, g, observed).all()
        ),
    )


def _checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks, after checking that each fits its parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise ArgumentError(f"masks: the model has no parameter {name!r}. Names are those of named_parameters().")
        if mask.shape != parameters[name].shape:
            raise ArgumentError(
                f"masks: {name} has shape {tuple(parameters[name].shape)}, its mask {tuple(mask.shape)}. Pass masks of "
                "the model as it is before it shrinks."
            )
    return dict(masks)


def _two(model: nn.Module, example: Tensor) -> Tensor:
    """Two images on the model's device and of its dtype; the same one twice if there is one only."""
    images = example[:2].to(preserve.device_of(model))
    tensor = preserve.first_tensor(model)
    images = images if tensor is None else images.to(tensor.dtype)
    return images if len(images) > 1 else images.repeat(2, 1, 1, 1)


def _mixed(model: nn.Module, group: Group) -> str | None:
    """Why even a channel that nobody reads cannot go: the other channels are compared with it."""
    for name, _, _ in (member.axis for member in group.side("out")):
        if hasattr(model.get_submodule(name), "channel_dim"):  # global response normalisation: the mean over channels
            return f"{name} ({type(model.get_submodule(name)).__name__}) divides by a mean over all channels"
    return None


def _widths(model: nn.Module) -> dict[str, int]:
    """Name of a convolution or linear layer -> output channels."""
    return {name: layers.width_of(module, "out") for name, module in _weighted(model).items()}  # type: ignore[misc]


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if layers.is_consumer(module) or layers.is_depthwise(module)
    }


def _cut(
    model: nn.Module, masks: Mapping[str, Tensor], groups: Sequence[Group], selection: Selection
) -> dict[str, Tensor]:
    """The masks after a removal, along the dimensions in which the parameters shrink."""
    gone = {axis: index for axis, index in removed_channels(groups, selection).items() if axis[1] != "heads"}
    cuts = plan_cuts(model, gone)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: shrink_tensor(mask, cuts.gone.get(id(parameters[name]), {})) for name, mask in masks.items()}


# --- which units ----------------------------------------------------------------------------------


def _removable(model: nn.Module, groups: Sequence[Group], observed: _Observed) -> dict[str, Tensor]:
    """Group -> units that contribute nothing, but one at least stays."""
    selection = {}
    for group in groups:
        idle = _idle(model, group, observed)
        if idle.all():
            idle[0] = False
        if idle.any():
            selection[group.name] = idle.nonzero().flatten()
    return selection


def _idle(model: nn.Module, group: Group, observed: _Observed) -> Tensor:
    """``[size]`` units whose every channel is zero, or not read, wherever it is consumed."""
    return _everywhere(model, group, observed.zero)


def _constant(model: nn.Module, group: Group, observed: _Observed) -> int:
    """Units whose every channel is constant, or not read, and which are not idle."""
    return int((_everywhere(model, group, observed.constant) & ~_idle(model, group, observed)).sum())


def _everywhere(model: nn.Module, group: Group, state: Mapping[str, Tensor]) -> Tensor:
    """``[size]`` units whose channels are all in a state, or not read.

    The inputs of a grouped convolution do not count: its outputs belong to the same unit and have their own readers.
    """
    units = torch.ones(group.size, dtype=torch.bool)
    for member in group.side("in"):
        name = member.axis[0]
        module = model.get_submodule(name)
        if layers.is_grouped(module):
            continue
        fine = ~_reads(module)
        if name in state:
            fine = fine | state[name]
        units[member.unit[~fine[member.channel]]] = False
    return units


def _reads(module: nn.Module) -> Tensor:
    """``[in]`` input channels of a convolution or linear layer with a weight that is not zero."""
    return _nonzero(module, "in")


def _nonzero(module: nn.Module, side: str) -> Tensor:
    """``[in]`` or ``[out]`` channels with a weight that is not zero."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    table = weight.detach().cpu() != 0
    table = table.flatten(2).any(2) if table.dim() > 2 else table  # [out, in / groups], or the other way round
    if layers.channel_tensors(module, side)["weight"] == 0:  # type: ignore[index]
        return table.any(1)
    groups = getattr(module, "groups", 1)
    return table.unflatten(0, (groups, -1)).any(1).flatten()  # channels of one group stand in its rows only


# --- what arrives ---------------------------------------------------------------------------------

_Mark = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(layer, its input, its output) -> the output to go on with."""


def _observed(model: nn.Module, images: Tensor, seed: int) -> _Observed:
    """What arrives at each consumer on the example, and when all that depends on the image is NaN, or noise.

    NaN is passed on by whatever computes with it, also by what adds one channel to all; but a function may decide
    (``torch.where(x > 0, x, 0)``) that it is zero, which noise of both signs is not. Behind a depthwise convolution
    of a constant the noise stands for the values that other image sizes would show.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = partial(_drawn, generator=generator)
    seen = _largest(model, images, lambda layer, into, out: out)
    unknown = _largest(model, torch.full_like(images, torch.nan), _keep_constants)
    noisy = _largest(model, noise(images), partial(_replace_signals, noise=noise))
    return _Observed(
        zero={name: (seen[name] == 0) & (unknown[name] == 0) & (noisy[name] == 0) for name in seen},
        constant={name: ~unknown[name].isnan() for name in unknown},
    )


def _drawn(like: Tensor, *, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _largest(model: nn.Module, images: Tensor, mark: _Mark) -> dict[str, Tensor]:
    """One forward pass; name of a layer -> ``[in]`` largest absolute value of each input channel, over all calls."""
    largest: dict[str, Tensor] = {}

    def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor, *, name: str) -> Tensor:
        into = preserve.input_of(args, kwargs)
        value = _size(layer, into).cpu()
        largest[name] = torch.maximum(largest[name], value) if name in largest else value  # NaN if one is NaN
        return mark(layer, into, output)

    with (
        preserve.inference_state(model),
        preserve.hooked(model, {name: partial(hook, name=name) for name in _weighted(model)}),
    ):
        model(images)
    return largest


def _size(layer: nn.Module, values: Tensor) -> Tensor:
    """``[c]`` largest absolute value in each channel; NaN where there is one."""
    dim = values.dim() + _channel_dim(layer)
    return values.abs().movedim(dim, 0).flatten(1).amax(1)


def _channel_dim(layer: nn.Module) -> int:
    return 1 - layer.weight.dim()  # type: ignore[union-attr,operator]


def _where(layer: nn.Module, channel: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """One in the given output channels, the other elsewhere."""
    shape = (-1, *[1] * (-1 - _channel_dim(layer)))
    return torch.where(channel.to(one.device).view(shape), one, other)


def _without_input(layer: nn.Module, into: Tensor) -> Tensor:
    """The output where no weight counts; not through hooks."""
    return layer.forward(torch.zeros_like(into))


def _keep_constants(layer: nn.Module, into: Tensor, out: Tensor) -> Tensor:
    """NaN times a row of zeros is what it is without an input."""
    return _where(layer, _nonzero(layer, "out"), out, _without_input(layer, into))


def _replace_signals(layer: nn.Module, into: Tensor, out: Tensor, *, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """Noise wherever a row has weights; of a depthwise convolution: where there is something to weigh, too."""
    signal = _nonzero(layer, "out")
    if layers.is_depthwise(layer):
        sent = _size(layer, into).cpu() != 0
        signal = signal & sent.repeat_interleave(len(signal) // len(sent))
    return _where(layer, signal, noise(out), _without_input(layer, into))
