"""Slow twins: every quantity once more, sample by sample, with nothing but autograd and loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from jbrprune.models import layers
from jbrprune.structure.groups import Group, Member, match_names


def outputs_by_unit(model: nn.Module, images: Tensor, groups: Sequence[Group], site: str) -> dict[str, Tensor]:
    """Group name -> ``[N, K, units]``: J_u(x) w_u, from one weight gradient per sample and output."""
    model.eval().requires_grad_(True)
    found: dict[str, list[list[Tensor]]] = {group.name: [] for group in groups}
    for image in images:
        logits = model(image[None])[0]
        for total in found.values():
            total.append([])
        for k in range(len(logits)):
            products = _products(model, logits[k])
            for group in groups:
                found[group.name][-1].append(_of_group(model, group, products, site))
    return {name: torch.stack([torch.stack(rows) for rows in samples]) for name, samples in found.items()}


def directions(objective: str, logits: Tensor, labels: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """``[N, K]`` m(x) = d objective / d logits, written out; the reference is the model itself."""
    n, classes = logits.shape
    m = torch.zeros(n, classes, dtype=logits.dtype)
    for i in range(n):
        p = logits[i].exp() / logits[i].exp().sum()
        ranking = sorted(range(classes), key=lambda k, i=i: -float(logits[i, k]))
        if objective == "predicted_logit":
            m[i, ranking[0]] = 1
        elif objective == "margin":
            m[i, ranking[0]], m[i, ranking[1]] = 1, -1
        elif objective == "pseudo_label":
            m[i] = _cross_entropy(p, ranking[0])
        elif objective == "label":
            assert labels is not None
            m[i] = _cross_entropy(p, int(labels[i]))
        else:
            assert objective == "projection"
            assert signs is not None
            m[i] = signs[i]
    return m


def _cross_entropy(p: Tensor, target: int) -> Tensor:
    """p - onehot(target), without the cancellation of p[target] - 1."""
    m = p.clone()
    m[target] = -sum(p[k] for k in range(len(p)) if k != target)
    return m


def signs(n: int, classes: int, seed: int) -> Tensor:
    """``[n, classes]`` the signs of ``projection``, drawn one sample at a time."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.cat([torch.randint(0, 2, (1, classes), generator=generator, dtype=torch.int8) for _ in range(n)]) * 2 - 1
    )


def mean_replaced(model: nn.Module, images: Tensor, groups: Sequence[Group], m: Tensor) -> dict[str, Tensor]:
    """Group name -> ``[N, units]``: the derivative of m^T f by t at t = 0, where a -> a + t (a - mean a).

    Every consumer's input is mixed with its mean over samples and positions by one t per channel.
    """
    model.eval().requires_grad_(False)
    names = sorted({member.axis[0] for group in groups for member in group.side("in")})
    inputs = {name: [_input_of(model, name, image) for image in images] for name in names}
    means = {name: torch.stack([_rows(model, name, x).mean(0) for x in xs]).mean(0) for name, xs in inputs.items()}
    found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    for image, direction in zip(images, m, strict=True):
        mixed = {name: torch.zeros_like(mean, requires_grad=True) for name, mean in means.items()}
        handles = [_mixing(model.get_submodule(name), mixed[name], means[name]) for name in names]
        gradients = torch.autograd.grad(model(image[None])[0] @ direction, list(mixed.values()))
        for handle in handles:
            handle.remove()
        by_name = dict(zip(mixed, gradients, strict=True))
        for group in groups:
            total = torch.zeros(group.size, dtype=m.dtype)
            for member in group.side("in"):
                if not _cut_behind(model, group, member):
                    _gather(total, member, by_name[member.axis[0]])
            found[group.name].append(total)
    return {name: torch.stack(rows) for name, rows in found.items()}


def _mixing(module: nn.Module, t: Tensor, mean: Tensor) -> RemovableHandle:
    def mix(module: nn.Module, args: tuple) -> tuple:
        shape = (-1,) + (1,) * (args[0].dim() - 2) if _is_conv(module) else (-1,)
        return (args[0] + t.view(shape) * (args[0] - mean.view(shape)),)

    return module.register_forward_pre_hook(mix)


def batched(v: Tensor, batch: int) -> Tensor:
    """``[units]``: E over batches of (mean over the batch of v)^2, each batch weighted by its size."""
    total = torch.zeros(v.shape[1], dtype=v.dtype)
    for start in range(0, len(v), batch):
        part = v[start : start + batch]
        mean = sum(part) / len(part)
        total += len(part) * mean * mean
    return total / len(v)


def _products(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """Parameter name -> w * d scalar / d w."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(scalar, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else (p * g).detach()
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def _of_group(model: nn.Module, group: Group, products: dict[str, Tensor], site: str) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        name, side, _ = member.axis
        if site == "consumer" and _cut_behind(model, group, member):
            continue
        if side == "in" or (side == "out" and site == "all"):
            _gather(total, member, _by_channel(model.get_submodule(name), name, side, products))
    return total


def _cut_behind(model: nn.Module, group: Group, member: Member) -> bool:
    """Is this the input of a grouped convolution whose outputs, cut where they are read, are of the same unit?"""
    if member.axis[1] != "in":
        return False
    module = model.get_submodule(member.axis[0])
    outputs = any(other.axis[:2] == (member.axis[0], "out") for other in group.members)
    return outputs and getattr(module, "groups", 1) > 1


def _gather(total: Tensor, member: Member, by_channel: Tensor) -> None:
    total.index_add_(0, member.unit, by_channel[member.channel])


def _by_channel(module: nn.Module, name: str, side: str, products: dict[str, Tensor]) -> Tensor:
    """``[channels]`` the sum of w * g over the weights that read an input channel, or that make an output channel."""
    named = {key: f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
    own = {key: products[full] for key, full in named.items() if full in products}
    if not _is_conv(module) and not isinstance(module, nn.Linear):
        return sum(value.reshape(-1) for value in own.values())  # type: ignore[return-value]
    weight = own["weight"].flatten(2) if own["weight"].dim() > 2 else own["weight"][:, :, None]
    parts = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # [in, out / parts, k] -> [out, in / parts, k]
        weight = torch.cat([block.transpose(0, 1) for block in weight.chunk(parts)])
    if side == "out":
        return weight.sum((1, 2)) + own.get("bias", 0)
    return torch.cat([block.sum((0, 2)) for block in weight.chunk(parts)])


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _input_of(model: nn.Module, name: str, image: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(image[None])
    handle.remove()
    return seen[0].clone()


def _rows(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """``[positions, channels]``."""
    if _is_conv(model.get_submodule(name)):
        return x.flatten(2)[0].T
    return x.reshape(-1, x.shape[-1])


def layer_groups(model: nn.Module, *, ignore: Sequence[str] = ()) -> tuple[Group, ...]:
    """One group per layer and side, uncoupled: each channel of each known layer is its own unit.

    For scoring layer by layer, of any module whatever its graph; not for removal. Names are
    ``<layer>:in`` and ``<layer>:out``.

    Args:
        model: The model.
        ignore: Globs of module names that are left out (a name covers its submodules).

    Raises:
        ArgumentError: A glob in ``ignore`` matches no module.
    """
    ignored = match_names([name for name, _ in model.named_modules() if name], ignore, "module")
    groups = []
    for name, module in model.named_modules():
        if name in ignored or layers.channel_dim(module) is None or not layers.has_parameters(module):
            continue
        widths = {"out": layers.width_of(module, "out")}
        if layers.is_consumer(module):
            widths["in"] = layers.width_of(module, "in")
        for side, width in widths.items():
            if width:
                index = torch.arange(width)
                groups.append(Group(f"{name}:{side}", "channel", width, (Member((name, side, 0), index, index),)))  # type: ignore[arg-type]
    return tuple(groups)
