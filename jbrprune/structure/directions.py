r"""Directions of what a linear layer gives: two layers in the place of one, whose hidden channels are directions.

A layer y = W x + b need not lose channels of y, it can lose directions. With mu the mean of y over samples and
positions, and V the eigenvectors of its covariance,

    y = V z + mu,    z = V^T (W x + b - mu)

are two layers, and z_k has mean zero: to remove its channel is to remove v_k and to keep the mean, dw = -v_k v_k^T W.
So what is known of channels holds of directions, above all the relevance at the consumer,

    v_k(x) = sum over positions of z_k dL/dz_k = sum over positions of (v_k^T (y - mu)) (v_k^T dL/dy).

With r directions left the two layers cost r (in + out) multiply-accumulates per position in the place of in * out.

V spans the same subspaces as the singular vectors of W weighted by the covariance of its inputs ("whitened" SVD): both
are the eigenvectors of W cov(x) W^T.

Sources: eigenvectors of outputs as in AAFM (Yu and Wu, AAAI 2023); ranked by relevance here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.models import layers, preserve
from jbrprune.structure.discovery import Found
from jbrprune.structure.groups import Group, Member, Side, match_names
from jbrprune.structure.verification import find_culprits


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean ``[C]`` and covariance ``[C, C]`` of the channels of a tensor over samples and positions (float64, CPU)."""

    mean: Tensor
    covariance: Tensor


def measure_moments(model: nn.Module, batches: Sequence[Batch], names: Iterable[str], side: Side) -> dict[str, Moments]:
    """Layer -> moments of the channels that it reads (side ``in``) or gives (``out``), from one forward pass.

    Products are formed in float32 about the mean over one image, and added up in float64, so that a large mean does not
    cost small variances their digits.

    Args:
        model: The model; left as it was.
        batches: Images; the same on every rank, of which each reads its own part.
        names: Linear layers and convolutions, or two of them in the place of one.
        side: ``in`` or ``out``.
    """
    shifts: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        rows = x.flatten(2).transpose(1, 2) if layers.channel_dim(module) == 1 and x.dim() > 2 else x
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - shifts.setdefault(name, rows.mean(0))
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        grams[name] = grams.get(name, 0) + (rows.t() @ rows).cpu().double()

    def record(name: str) -> preserve.Hook:
        module = model.get_submodule(layers.end_of(model, name, side))
        if side == "in":
            return lambda _, args, kwargs: add(name, module, preserve.input_of(args, kwargs))
        return lambda _, args, kwargs, output: add(name, module, output)

    hooks = {name: record(name) for name in names}
    both = (None, hooks) if side == "in" else (hooks, None)
    with preserve.inference_state(model), preserve.hooked(model, *both):
        device = preserve.device_of(model)
        model(batches[0].images[:1].to(device))  # every rank takes the same values off
        grams.clear()
        for _, batch in distributed.Parts(batches, batch_size=len(batches[0])):
            model(batch.to(device).images.clone())
    found = {}
    for name, gram in distributed.all_sum(grams).items():
        gram = gram / gram[-1, -1]
        mean = gram[-1, :-1]
        found[name] = Moments(shifts[name].cpu().double() + mean, gram[:-1, :-1] - torch.outer(mean, mean))
    return found


def find_directions(model: nn.Module, images: Tensor, *, ignore: Sequence[str] = ()) -> tuple[nn.Module, Found]:
    """Put two layers in the place of every linear layer that can lose directions; the outputs are the same.

    These are linear layers, and convolutions that read every pixel once (patch embeddings). The basis is that of the
    channels until `rotate` turns it.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` an example input on the model's device.
        ignore: Globs of module names that stay whole (a name covers its submodules).

    Returns:
        A copy, and one group of directions for every such layer, under its name; what stays whole, and why.

    Raises:
        ArgumentError: A glob in ``ignore`` matches no module.
        ModelError: The model cannot be copied.
    """
    ignored = match_names([name for name, _ in model.named_modules() if name], ignore, "module")
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    called: dict[str, Tensor] = {}

    def note(name: str) -> preserve.Hook:
        return lambda module, args, kwargs, output: called.update({name: output})

    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) or layers.is_factorable(module)]
    with preserve.inference_state(model), preserve.hooked(model, {name: note(name) for name in linear}):
        returned = {tensor.data_ptr() for tensor in preserve.tensors_of(model(images)).values()}
    classifiers = {name for name, output in called.items() if output.data_ptr() in returned}
    classifiers.update(layers.classifiers(model))
    found, skipped = {}, {}
    for name in linear:
        module = model.get_submodule(name)
        if name.rpartition(".")[0] in found:  # one of two
            continue
        if name in ignored:
            skipped[name] = "ignored on request"
        elif name in classifiers:
            skipped[name] = "the classifier"
        elif name not in called or not layers.is_factorable(module):
            skipped[name] = "another module reads its weights"
        elif any(owners[id(parameter)] > 1 for parameter in module.parameters()):
            skipped[name] = "its weights are shared"
        else:
            index = torch.arange(len((module[0] if layers.is_pair(module) else module).weight))  # type: ignore[arg-type]
            members = Member((f"{name}.0", "out", 0), index, index), Member((f"{name}.1", "in", 0), index, index)
            found[name] = Group(name, "direction", len(index), members)

    def failure(groups: Sequence[Group]) -> str | None:
        try:
            with torch.no_grad():
                split_layers(preserve.copy_model(model), groups)(images)
        except Exception as error:  # whatever a foreign forward raises is the answer
            return f"two layers do not fit in its place: {type(error).__name__}: {error}"
        return None

    failed = find_culprits(tuple(found.values()), failure)
    groups = tuple(group for name, group in found.items() if name not in failed)
    return split_layers(preserve.copy_model(model), groups), Found(groups, skipped | failed)


@torch.no_grad()
def split_layers(model: nn.Module, groups: Iterable[Group]) -> nn.Module:
    """Put two layers, both with a bias, in the place of each layer, in place; return the model."""
    for group in groups:
        layer: Any = model.get_submodule(group.name)
        pair: Any = make_pair(layer, group.size, bias=True)
        first, second = layer if layers.is_pair(layer) else (layer, None)
        pair[0].weight.copy_(first.weight)
        pair[0].bias.copy_(first.bias) if first.bias is not None else nn.init.zeros_(pair[0].bias)
        if second is None:
            pair[1].weight.copy_(torch.eye(group.size).view_as(pair[1].weight))
            nn.init.zeros_(pair[1].bias)
        else:
            pair[1].load_state_dict(second.state_dict())
        replace_module(model, group.name, pair)
    return model


def make_pair(layer: Any, size: int, *, bias: bool = False) -> nn.Sequential:
    """Two layers in the place of one (or of two), with so many channels between them and values yet to be set.

    Args:
        layer: A linear layer or a convolution.
        size: Directions.
        bias: Whether the first of the two has a bias; the second has one.

    Example:
        >>> make_pair(nn.Linear(8, 6), 2)
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=6, bias=True)
        )
    """
    first, last = layer if layers.is_pair(layer) else (layer, layer)
    how = {"device": first.weight.device, "dtype": first.weight.dtype}
    if isinstance(first, nn.Linear):
        kind, window = nn.Linear, {}
        inputs, outputs = first.in_features, last.out_features
    else:
        kind, window = nn.Conv2d, {"kernel_size": first.kernel_size, "stride": first.stride}
        inputs, outputs = first.in_channels, last.out_channels
    one = {"kernel_size": 1} if window else {}
    pair = nn.Sequential(
        nn.utils.skip_init(kind, inputs, size, bias=bias, **window, **how),
        nn.utils.skip_init(kind, size, outputs, **one, **how),
    )
    return pair.requires_grad_(bool(first.weight.requires_grad)).train(layer.training)


@torch.no_grad()
def rotate(pair: Any, moments: Moments) -> None:
    """Turn the channels between two layers into the eigenvectors of the covariance of what comes out, largest first.

    The function stays the same. The new channels have mean zero, and the eigenvalues as variances.

    Args:
        pair: Two layers, both with a bias; changed in place.
        moments: Of the output.

    Example:
        >>> pair = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        >>> x = torch.randn(50, 3)
        >>> before = pair(x)
        >>> rotate(pair, Moments(before.mean(0).double(), torch.cov(before.double().t(), correction=0)))
        >>> torch.testing.assert_close(pair(x), before)
    """
    first, second = pair
    matrices = [layer.weight.cpu().double().flatten(1) for layer in pair]
    biases = [layer.bias.cpu().double() for layer in pair]
    span = torch.linalg.qr(matrices[1]).Q  # what can come out, whatever the covariance has seen of it
    basis = span @ torch.linalg.eigh(span.t() @ moments.covariance @ span).eigenvectors.flip(1)
    turned = basis.t() @ matrices[1]
    first.weight.copy_((turned @ matrices[0]).view_as(first.weight))
    first.bias.copy_(turned @ biases[0] + basis.t() @ (biases[1] - moments.mean))
    second.weight.copy_(basis.view_as(second.weight))
    second.bias.copy_(moments.mean)


@torch.no_grad()
def fold_bias(pair: Any) -> None:
    """Move the bias of the first of two layers into that of the second, in place; the function stays the same."""
    first, second = pair
    second.bias.add_((second.weight.double().flatten(1) @ first.bias.double()).to(second.bias))
    first.bias = None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
