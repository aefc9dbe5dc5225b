r"""Directions of what a linear layer gives: two layers in the place of one, whose hidden channels are directions.

An attention whose heads are plain loses directions of its heads instead (below): no layer is added.

A layer y = W x + b need not lose channels of y, it can lose directions. With mu the mean of y over samples and
positions, and V the eigenvectors of its covariance,

    y = V z + mu,    z = V^T (W x + b - mu)

are two layers, and z_k has mean zero: to remove its channel is to remove v_k and to keep the mean, dw = -v_k v_k^T W.
So what is known of channels holds of directions, above all the relevance at the consumer,

    v_k(x) = sum over positions of z_k dL/dz_k = sum over positions of (v_k^T (y - mu)) (v_k^T dL/dy).

With r directions left the two layers cost r (in + out) multiply-accumulates per position in the place of in * out.

V spans the same subspaces as the singular vectors of W weighted by the covariance of its inputs ("whitened" SVD): both
are the eigenvectors of W cov(x) W^T.

A head reads its queries q and keys k only by q^T k, and gives o^T z, where z is the mean of its values that attention
makes. Both products are sums over as many directions as a head is wide, and the same in every basis:

    q^T k = sum_j (l_j^T q) (r_j^T k),    l = A^(-1/2) U S^(1/2),  r = B^(-1/2) V S^(1/2),  A^(1/2) B^(1/2) = U S V^T,
    o^T z = sum_j (o'_j) (t_j^T z),       t = C^(-1/2) P,  o' = P^T C^(1/2) o,               C^(1/2) o = P T Q^T,

with A = E[q q^T], B and C the covariances of k and z (softmax does not see the mean of the keys, and its rows sum to
one, so that the mean of z moves into the bias): truncated, each is the best fit of its rank to the logits of attention
and to the output, for independent q and k. Direction j of all heads goes together, l_j, r_j, t_j and o'_j: the heads
get narrower, and stay as wide as each other. Its relevance is

    v_j(x) = sum over heads and positions of (l_j^T q) (dL/dq)_j + (t_j^T z) (dL/dz)_j.

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
from jbrprune.structure.groups import Group, Member, match_names
from jbrprune.structure.verification import find_culprits

End = tuple[str, str]
"""(qualified name, ``in`` or ``out``) of a layer."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean ``[C]`` and covariance ``[C, C]`` of the channels of a tensor over samples and positions (float64, CPU)."""

    mean: Tensor
    covariance: Tensor


def measure_moments(model: nn.Module, batches: Sequence[Batch], ends: Sequence[End]) -> dict[End, Moments]:
    """Moments of the channels that layers read (side ``in``) or give (``out``), from one forward pass.

    Products are formed in float32 about the mean over one image, and added up in float64, so that a large mean does not
    cost small variances their digits.

    Args:
        model: The model; left as it was.
        batches: Images; the same on every rank, of which each reads its own part.
        ends: (name, side) of linear layers and convolutions, or of two of them in the place of one.
    """
    shifts: dict[End, Tensor] = {}
    grams: dict[End, Tensor] = {}

    def add(end: End, module: nn.Module, x: Tensor) -> None:
        rows = x.flatten(2).transpose(1, 2) if layers.channel_dim(module) == 1 and x.dim() > 2 else x
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - shifts.setdefault(end, rows.mean(0))
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        grams[end] = grams.get(end, 0) + (rows.t() @ rows).cpu().double()

    def record(end: End) -> preserve.Hook:
        module = model.get_submodule(layers.end_of(model, *end))
        if end[1] == "in":
            return lambda _, args, kwargs: add(end, module, preserve.input_of(args, kwargs))
        return lambda _, args, kwargs, output: add(end, module, output)

    after, before = ({end[0]: record(end) for end in ends if end[1] == side} for side in ("out", "in"))
    with preserve.inference_state(model), preserve.hooked(model, after, before):
        device = preserve.device_of(model)
        model(batches[0].images[:1].to(device))  # every rank takes the same values off
        grams.clear()
        for _, batch in distributed.Parts(batches, batch_size=len(batches[0])):
            model(batch.to(device).images.clone())
    found = {}
    for end, gram in distributed.all_sum(grams).items():
        gram = gram / gram[-1, -1]
        mean = gram[-1, :-1]
        found[end] = Moments(shifts[end].cpu().double() + mean, gram[:-1, :-1] - torch.outer(mean, mean))
    return found


def find_directions(model: nn.Module, images: Tensor, *, ignore: Sequence[str] = ()) -> tuple[nn.Module, Found]:
    """Put two layers in the place of every linear layer that can lose directions; the outputs are the same.

    These are linear layers, and convolutions that read every pixel once (patch embeddings). An attention whose heads
    may be turned stays one, and its heads have the directions. The basis is that of the channels until `rotate_all`
    turns it.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]`` an example input on the model's device.
        ignore: Globs of module names that stay whole (a name covers its submodules).

    Returns:
        A copy, and one group for every such layer and attention, under its name; what stays whole, and why.

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
    for name, attention in model.named_modules():
        parts = [f"{name}.qkv", f"{name}.proj"]
        if layers.has_free_heads(attention) and found.keys() >= set(parts):
            inner, size = attention.num_heads * attention.head_dim, int(attention.head_dim)  # type: ignore[operator]
            wide = [(name, "head_dim", size), (parts[0], "out", 3 * inner), (parts[1], "in", inner)]
            units = torch.arange(size)
            members = tuple(Member((n, side, 0), torch.arange(c), units.repeat(c // size)) for n, side, c in wide)
            found = {n: group for n, group in found.items() if n not in parts} | {
                name: Group(name, "head_dim", size, members)
            }

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
    for group in (group for group in groups if group.kind == "direction"):
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


def rotate_all(model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]) -> None:
    """Turn every group of directions into the basis that belongs to the model as it is now, in place.

    Args:
        model: With two layers in the place of each.
        batches: Images.
        groups: Of `find_directions`.
    """
    ends = {group.name: ends_of(group) for group in groups}
    moments = measure_moments(model, batches, [end for both in ends.values() for end in both])
    for group in groups:
        rotate_any: Any = rotate_heads if group.kind == "head_dim" else rotate
        rotate_any(model.get_submodule(group.name), *(moments[end] for end in ends[group.name]))


def ends_of(group: Group) -> list[End]:
    """Where a group's moments are taken: what two layers give; of heads, what ``qkv`` gives and ``proj`` reads."""
    heads: list[End] = [member.axis[:2] for member in group.members[1:]]
    return heads if group.kind == "head_dim" else [(group.name, "out")]


@torch.no_grad()
def rotate_heads(attention: Any, given: Moments, read: Moments) -> Tensor:
    """Turn queries and keys, and values, of every head into their directions, largest first; the function stays.

    Args:
        attention: With layers ``qkv`` and ``proj``, both with a bias; changed in place.
        given: Of what ``qkv`` gives.
        read: Of what ``proj`` reads.

    Returns:
        ``[2, head_dim]`` variance of the logits of attention, and of the output, that each direction holds, summed over
        heads (of independent queries and keys; scale apart).
    """
    qkv, proj, shape = attention.qkv, attention.proj, (attention.num_heads, attention.head_dim)
    weight, bias = (tensor.cpu().double().unflatten(0, (3, *shape)) for tensor in (qkv.weight, qkv.bias))
    out = proj.weight.cpu().double().t().unflatten(0, shape)  # [heads, head_dim, outputs]
    mean, centre = given.mean.unflatten(0, (3, *shape)), read.mean.unflatten(0, shape)

    def roots(moments: Moments, first: int) -> tuple[Tensor, Tensor]:
        wide = moments.covariance.unflatten(0, (-1, *shape)).unflatten(3, (-1, *shape))[first, :, :, first]
        own = wide.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [heads, head_dim, head_dim]
        own = own + mean[0, :, :, None] * mean[0, :, None] if (moments, first) == (given, 0) else own
        values, vectors = torch.linalg.eigh(own)
        values = values.clamp_min(1e-10 * values.amax(-1, keepdim=True)).clamp_min(1e-30).sqrt()[:, None]
        return vectors * values @ vectors.mT, vectors / values @ vectors.mT

    (a, of_q), (b, of_k), (c, of_v) = roots(given, 0), roots(given, 1), roots(read, 0)
    u, held, v = torch.linalg.svd(a @ b)
    seen = c @ out
    energy, p = (part.flip(-1) for part in torch.linalg.eigh(seen @ seen.mT))
    half = held.sqrt()[:, None]
    bases = torch.stack([of_q @ u * half, of_k @ v.mT * half, of_v @ p])
    shift = torch.stack([torch.zeros_like(centre), mean[1], centre])
    proj.bias.add_((centre.flatten() @ out.flatten(0, 1)).to(proj.bias))
    qkv.weight.copy_((bases.mT @ weight).flatten(0, 2))
    qkv.bias.copy_((bases.mT @ (bias - shift)[..., None]).flatten())
    proj.weight.copy_((p.mT @ seen).flatten(0, 1).t())
    return torch.stack([held.square().sum(0), energy.clamp_min(0).sum(0)])


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
