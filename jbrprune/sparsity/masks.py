"""Parameters whose single entries can be pruned: plain ones, and those that ``torch.nn.utils.prune`` has masked.

A masked parameter ``weight`` is three things on its module: the parameter ``weight_orig``, the buffer ``weight_mask``
and, as a plain attribute, their product, made anew by a hook in every forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from jbrprune.errors import ModelError
from jbrprune.structure.groups import match_names

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights of `nn.MultiheadAttention`, whose last projection is a linear layer of its own."""
PRUNABLE = ("weight", "bias", *PROJECTIONS, "in_proj_bias")
"""Names of the parameters of a module whose entries can be masked."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A place of a parameter, such as ``module.weight`` or ``module.bias``; a shared parameter has several.

    Attributes:
        name: Qualified name, such as ``layer1.0.conv1.weight``, also where the module is masked.
        module: The module that owns it.
        kind: One of `PRUNABLE`.
    """

    name: str
    module: nn.Module
    kind: str

    @property
    def stored(self) -> nn.Parameter:
        """The parameter itself: ``weight``, or ``weight_orig`` where it is masked."""
        parameter = self.module._parameters.get(self.kind)
        return self.module._parameters[f"{self.kind}_orig"] if parameter is None else parameter  # type: ignore[return-value]

    @property
    def mask(self) -> Tensor | None:
        """The mask of ``torch.nn.utils.prune``, if there is one."""
        there = self.module._parameters.get(f"{self.kind}_orig") is not None
        return self.module._buffers.get(f"{self.kind}_mask") if there else None

    @property
    def masked(self) -> bool:
        """Whether ``torch.nn.utils.prune`` has masked it."""
        return self.mask is not None

    @property
    def used(self) -> Tensor:
        """The tensor that the module's forward reads."""
        return getattr(self.module, self.kind)

    @property
    def is_weight(self) -> bool:
        """Whether it is a matrix or a kernel: of a convolution, a linear layer or an attention."""
        attention = isinstance(self.module, nn.MultiheadAttention) and self.kind in PROJECTIONS
        return attention or (self.kind == "weight" and isinstance(self.module, nn.modules.conv._ConvNd | nn.Linear))

    def renew(self) -> None:
        """Recompute the effective values of a masked parameter, as its hook does when the module is called."""
        setattr(self.module, self.kind, self.stored * self.mask.to(self.stored))  # type: ignore[union-attr]


def slots(model: nn.Module) -> list[Slot]:
    """Every plain or masked parameter of one of `PRUNABLE`."""
    return [slot for slot in _places(model) if slot.module._parameters.get(slot.kind) is not None or slot.masked]


def _places(model: nn.Module) -> Iterator[Slot]:
    """All places where a prunable parameter may be."""
    for name, module in model.named_modules():
        yield from (Slot(f"{name}.{kind}".removeprefix("."), module, kind) for kind in PRUNABLE)


def weights_of(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, Slot]:
    """Weights of all convolutions, linear layers and attentions by name, a shared one under its first name.

    A shared weight that is ignored in one place is left out everywhere: it is one tensor.

    Args:
        model: The model.
        ignore: Globs of modules or parameters that are left out.

    Raises:
        ArgumentError: A glob matches nothing.
    """
    left_out = find_ignored(model, ignore)
    every = slots(model)
    stays = {id(slot.stored) for slot in every if {slot.name, slot.name.rpartition(".")[0]} & left_out}
    found: dict[int, Slot] = {}
    for slot in every:
        if slot.is_weight and id(slot.stored) not in stays:
            found.setdefault(id(slot.stored), slot)
    return {slot.name: slot for slot in found.values()}


def refuse_computed_weights(model: nn.Module, ignore: Sequence[str]) -> None:
    """Refuse layers whose weight is computed from other parameters: there are no single weights.

    Args:
        model: A model without masks.
        ignore: Globs of modules or parameters that are let through.

    Raises:
        ModelError: Names the first that is not ignored.
    """
    left_out = find_ignored(model, ignore)
    for slot in _places(model):
        own = slot.module._parameters.get(slot.kind)
        computed = own is None and isinstance(getattr(slot.module, slot.kind, None), Tensor)
        if slot.is_weight and computed and not {slot.name, slot.name.rpartition(".")[0]} & left_out:
            raise ModelError(
                f"{slot.name} ({type(slot.module).__name__}) is not a plain parameter (a parametrization or a weight "
                "norm computes it), so a single weight has no meaning there. Remove the parametrization, or put it "
                "into `ignore`."
            )


def find_ignored(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of modules and parameters that a glob matches, with everything inside of them.

    Raises:
        ArgumentError: A string instead of a list, or a glob that matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    return match_names(names + [slot.name for slot in slots(model)], patterns, "module and no parameter")


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> boolean mask (False: pruned) of every parameter that ``torch.nn.utils.prune`` has masked.

    A shared parameter appears under its first name.

    Raises:
        ModelError: Modules that share a parameter mask it differently, so that no single tensor stands for both. Or a
            mask of something else than `PRUNABLE`, or of other values than 0 and 1.
    """
    _refuse_foreign(model)
    refuse_hidden_sharing(model, [slot.name for slot in slots(model) if slot.masked])
    first: dict[int, Slot] = {}
    for slot in slots(model):
        other = first.setdefault(id(slot.stored), slot)
        if slot.mask is not None and not ((slot.mask == 0) | (slot.mask == 1)).all():
            raise ModelError(
                f"{slot.name}: its mask must hold nothing but 0 and 1. Make it permanent: "
                "torch.nn.utils.prune.remove(module, name)."
            )
        one, two = other.mask, slot.mask
        if (one is None) != (two is None) or (one is not None and not torch.equal(one.bool(), two.bool())):  # type: ignore[union-attr]
            raise ModelError(
                f"{other.name} and {slot.name} are one shared parameter, but their masks differ. Mask both alike "
                "(torch.nn.utils.prune.custom_from_mask), or make the masks permanent: "
                "torch.nn.utils.prune.remove(module, name)."
            )
    return {slot.name: slot.mask.bool() for slot in first.values() if slot.mask is not None}


def refuse_hidden_sharing(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to mask a parameter that is also used under a name that is none of `PRUNABLE`: it would not see it.

    Raises:
        ModelError: Names both places.
    """
    found = {slot.name: slot for slot in slots(model)}
    seen = {id(slot.stored) for slot in found.values()}
    hidden = {
        id(parameter): f"{prefix}.{kind}".removeprefix(".")
        for prefix, module in model.named_modules()
        for kind, parameter in module._parameters.items()
        if id(parameter) in seen and kind.removesuffix("_orig") not in PRUNABLE
    }
    for name in names:
        other = hidden.get(id(found[name].stored))
        if other is not None:
            raise ModelError(
                f"{name} and {other} are one shared parameter, and a mask on the first is unknown to the second. Put "
                "it into `ignore`, or prune with permanent=True."
            )


def put_masks(model: nn.Module, masks: Mapping[str, Tensor], originals: Mapping[str, Tensor] | None = None) -> None:
    """Mask parameters in place, as ``torch.nn.utils.prune.custom_from_mask`` does, wherever they are used.

    Args:
        model: The model; the named parameters must be plain.
        masks: Name -> mask of the parameter's shape, False (or 0) where it is pruned.
        originals: Name -> values that ``weight_orig`` takes where the mask is zero; default: what is there.
    """
    places: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots(model):
        places[id(slot.stored)].append(slot)
    found = {slot.name: slot for slot in slots(model)}
    for name, mask in masks.items():
        stored = found[name].stored
        if originals is not None and name in originals:
            with torch.no_grad():
                stored.copy_(torch.where(mask.to(stored.device).bool(), stored, originals[name].to(stored)))
        for slot in places[id(stored)]:  # a shared parameter would be whole again in a module without the mask
            if not slot.masked:
                prune.custom_from_mask(slot.module, slot.kind, mask.to(stored))
    for module in model.modules():
        read = any(slot.masked for child in module.children() if isinstance(child, nn.Linear) for slot in slots(child))
        if read and renew_children not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(renew_children)


def renew_children(module: nn.Module, args: object) -> None:
    """Recompute the masked weights of a module's linear layers before its forward.

    `nn.MultiheadAttention` reads the weight of its last projection, and timm's BEiT, EVA and Swin-v2 that of ``qkv``,
    without calling the layer: the hook that masks it never runs.
    """
    for child in module.children():
        for slot in slots(child) if isinstance(child, nn.Linear) else ():
            if slot.masked:
                slot.renew()


def make_permanent(model: nn.Module) -> nn.Module:
    """Turn the masks of ``torch.nn.utils.prune`` into zeros of plain parameters, in place.

    Unlike a masked model, the result can be copied with ``copy.deepcopy``, exported and saved as any other. The
    parameters stay the same objects, so an optimiser goes on with them.

    Args:
        model: Any model; parts that are not masked stay as they are.

    Returns:
        The same model.

    Raises:
        ModelError: A mask of something else than `PRUNABLE`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prune.l1_unstructured(net[0], "weight", amount=0.5)
        >>> sorted(make_permanent(net).state_dict())
        ['0.bias', '0.weight']
    """
    _refuse_foreign(model)
    for slot in slots(model):
        mask = slot.mask
        if mask is not None:
            prune.remove(slot.module, slot.kind)
            slot.stored.data.masked_fill_(mask == 0, 0)  # torch leaves -0.0, a value like any other in a file
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is renew_children]:
            del module._forward_pre_hooks[key]
    return model


@contextmanager
def fresh(model: nn.Module) -> Iterator[None]:
    """Recompute effective weights, as the hooks of torch.nn.utils.prune do when a module is called.

    A weight that another function reads is as old as its mask, with the graph of that time. Afterwards the user's
    tensors are back.
    """
    masked = [slot for slot in slots(model) if slot.masked]
    before = [slot.used for slot in masked]
    try:
        for slot in masked:
            slot.renew()
        yield
    finally:
        for slot, tensor in zip(masked, before):
            setattr(slot.module, slot.kind, tensor)


def _refuse_foreign(model: nn.Module) -> None:
    """Refuse a mask of a parameter outside of `PRUNABLE`, which the other functions would not see."""
    masked = [name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")]
    parameters = dict(model.named_parameters())
    for name in masked:
        if f"{name}_orig" in parameters and name.rpartition(".")[2] not in PRUNABLE:
            raise ModelError(
                f"{name} is masked by torch.nn.utils.prune and is neither a weight nor a bias: call "
                "torch.nn.utils.prune.remove(module, name) for it."
            )
