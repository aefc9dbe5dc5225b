"""From masks to smaller shapes: channels that are dead after single weights were pruned go for good, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from jbrprune.errors import UnsupportedModelError
from jbrprune.models import layers, preserve
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Side, removed_channels
from jbrprune.structure.slicing import plan_cuts, remove_units, shrink_tensor
from jbrprune.structure.verification import verify_groups


@dataclass(frozen=True, eq=False)
class Shrunk:
    """What `shrink` did.

    Attributes:
        removed: Name of a group -> units that went; only groups that lost some.
        masks: The masks that were passed, in the new shapes.
        notes: What else there is to say.
    """

    removed: dict[str, int]
    masks: dict[str, Tensor]
    notes: tuple[str, ...]


def shrink(
    model: nn.Module,
    images: Tensor,
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
        images: ``[2, C, H, W]`` two example images.
        ignore: Globs of module names that stay as wide as they are (a name covers its submodules).
        masks: Name of a parameter -> boolean mask of its shape, to be cut as the parameter is. They do not decide
            what is dead: a weight of 0.0 is one, masked or not.
        seed: Seeds the trial of `jbrprune.structure.verification.verify_groups` and the noise.

    Returns:
        `Shrunk`. Where nothing can be removed safely (the graph cannot be traced, say), its notes tell why.

    Raises:
        ArgumentError: A glob that matches nothing.
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
    left = dict(masks or {})
    try:
        found = verify_groups(model, images, find_groups(model, images, ignore=ignore), seed=seed)
    except UnsupportedModelError as error:
        return Shrunk({}, left, (str(error),))
    # Global response normalisation compares each channel with the mean over all, also with those nobody reads.
    groups = tuple(
        group
        for group in found.groups
        if not any(hasattr(model.get_submodule(member.axis[0]), "channel_dim") for member in group.side("out"))
    )
    weighted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    sizes = {group.name: group.size for group in groups}
    while True:
        idle = {
            group.name: _find_units(model, group, {}) for group in groups
        }  # nobody reads them, by the weights alone
        if not any(_leave_one(units).any() for units in idle.values()):
            zero = _find_zero_inputs(model, weighted, images, seed)
            idle = {group.name: _find_units(model, group, zero) for group in groups}
        selection = {name: _leave_one(units).nonzero().flatten() for name, units in idle.items()}
        selection = {name: units for name, units in selection.items() if len(units)}
        if not selection:
            break
        gone = {axis: gone for axis, gone in removed_channels(groups, selection).items() if axis[1] != "heads"}
        cuts, parameters = plan_cuts(model, gone).gone, dict(model.named_parameters(remove_duplicate=False))
        left = {name: shrink_tensor(mask, cuts.get(id(parameters[name]), {})) for name, mask in left.items()}
        groups = remove_units(model, groups, selection)
    alone = (name for name, units in idle.items() if units.all())
    return Shrunk(
        removed={g.name: sizes[g.name] - g.size for g in groups if g.size < sizes[g.name]},
        masks=left,
        notes=tuple(f"{name}: the unit that is left contributes nothing; a layer keeps one." for name in alone),
    )


def _leave_one(units: Tensor) -> Tensor:
    """The same units; if these are all units of the group, without the first."""
    return units & (torch.arange(len(units)) > 0) if units.all() else units


def _find_units(model: nn.Module, group: Group, zero: Mapping[str, Tensor]) -> Tensor:
    """``[size]`` units whose every channel is not read, or zero, wherever it is consumed.

    The inputs of a grouped convolution do not count: its outputs belong to the same unit and have their own readers.

    Args:
        model: The model.
        group: The units.
        zero: Name of a consumer -> ``[in]`` which of its input channels are zero.
    """
    units = torch.ones(group.size, dtype=torch.bool)
    for member in group.side("in"):
        name = member.axis[0]
        module = model.get_submodule(name)
        if not layers.is_grouped(module):
            read = _nonzero(module, "in")
            counts = read & ~zero[name] if name in zero else read
            units[member.unit[counts[member.channel]]] = False
    return units


def _nonzero(module: nn.Module, side: Side) -> Tensor:
    """``[in]`` or ``[out]`` channels of a layer with a weight that is not zero."""
    weights = [getattr(module, name) for name in layers.channel_tensors(module, "in") if hasattr(module, name)]
    table = torch.cat(weights).detach().cpu() != 0
    table = table.flatten(2).any(2) if table.dim() > 2 else table  # [out, in / groups], or the other way round
    if layers.channel_tensors(module, side).get("weight") == 0:
        return table.any(1)
    # channels of one group stand in its rows only
    return table.unflatten(0, (layers.group_count(module), -1)).any(1).flatten()


def _find_zero_inputs(
    model: nn.Module, weighted: Mapping[str, nn.Module], images: Tensor, seed: int
) -> dict[str, Tensor]:
    """Consumer -> ``[in]`` mask of its inputs that are exactly zero at every position, for every image.

    They are so on the example, and when all that depends on the image is NaN, or noise. NaN is passed on by whatever
    computes with it, also by what adds one channel to all; but a function may decide (``torch.where(x > 0, x, 0)``)
    that it is zero, which noise of both signs is not. Behind a depthwise convolution of a constant the noise stands for
    the values that other image sizes would show.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    seen = _find_largest(model, weighted, images, None)
    unknown = _find_largest(model, weighted, torch.full_like(images, torch.nan), lambda out: out)
    noisy = _find_largest(model, weighted, draw(images), draw)
    return {name: (seen[name] == 0) & (unknown[name] == 0) & (noisy[name] == 0) for name in seen}


def _find_largest(
    model: nn.Module,
    weighted: Mapping[str, nn.Module],
    images: Tensor,
    mark: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Run the model once: name of a layer -> ``[in]`` largest absolute value of each input channel, over all calls.

    Args:
        model: The model.
        weighted: Its convolutions and linear layers by name.
        images: ``[B, C, H, W]``.
        mark: Output of a layer -> what goes on in the channels that depend on an input that is not zero; the other
            channels show what they are without an input, because NaN times a row of zeros is NaN. None: no marks.
    """
    largest: dict[str, Tensor] = {}

    def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor, *, name: str) -> Tensor:
        into, order = preserve.input_of(args, kwargs), layer.weight.dim()  # type: ignore[union-attr,operator]
        value = into.abs().movedim(into.dim() + 1 - order, 0).flatten(1).amax(1).cpu()  # NaN if one is NaN
        largest[name] = torch.maximum(largest[name], value) if name in largest else value
        if mark is None:
            return output
        signal = _nonzero(layer, "out")
        if layers.is_depthwise(layer):
            signal = signal & (value != 0).repeat_interleave(len(signal) // len(value))
        signal = signal.to(output.device).view(-1, *[1] * (order - 2))
        return torch.where(signal, mark(output), layer.forward(torch.zeros_like(into)))  # not through hooks

    hooks = {name: partial(hook, name=name) for name in weighted}
    with preserve.inference_state(model), preserve.hooked(model, hooks):
        model(images)
    return largest
