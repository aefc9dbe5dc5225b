"""Where the tensors of a model are kept, by plain names: a parameter that is masked goes by the name it had before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jbrprune.errors import CheckpointError
from jbrprune.sparsity.masks import KINDS


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor is kept: ``module._parameters[name]`` or ``module._buffers[name]``.

    Attributes:
        owned: Parameters or buffers of the module.
        name: Its name among them.
        persistent: Whether it is part of ``state_dict()``.
        mask: The mask of ``torch.nn.utils.prune`` that belongs to it.
    """

    owned: dict[str, Tensor | None]
    name: str
    persistent: bool
    mask: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """What is kept there."""
        tensor = self.owned[self.name]
        assert tensor is not None
        return tensor


def places(model: nn.Module) -> dict[str, Place]:
    """Every name of every parameter and buffer; shared ones have several."""
    return {
        f"{prefix}.{name}" if prefix else name: Place(owned, name, name not in module._non_persistent_buffers_set)  # type: ignore[arg-type]
        for prefix, module in model.named_modules(remove_duplicate=False)
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if tensor is not None
    }


def unmasked(found: Mapping[str, Place]) -> dict[str, Place]:
    """The same places with every ``X_orig`` and ``X_mask`` as one, ``X``, that has a mask.

    Raises:
        CheckpointError: A mask that cannot be put back: of something else than ``weight`` or ``bias``, of
            other values than 0 and 1, or of a tensor that is shared with one that is masked otherwise.
    """
    masks = {name: f"{name.removesuffix('_orig')}_mask" for name, place in found.items() if _is_original(name, place)}
    masks = {name: mask for name, mask in masks.items() if mask in found}
    hidden = set(masks.values())
    plain = {}
    for name, place in found.items():
        if name in masks:
            stem, mask = name.removesuffix("_orig"), found[masks[name]].tensor.detach()
            _check_mask(stem, place, mask)
            plain[stem] = replace(place, mask=mask)
        elif name not in hidden:
            plain[name] = place
    _check_shared(plain)
    return plain


def _is_original(name: str, place: Place) -> bool:
    return name.endswith("_orig") and isinstance(place.tensor, nn.Parameter)


def _check_mask(name: str, place: Place, mask: Tensor) -> None:
    if name.rpartition(".")[2] not in KINDS:
        raise CheckpointError(
            f"{name} is masked by torch.nn.utils.prune and is neither a weight nor a bias: its mask cannot be saved. "
            "Make it permanent: torch.nn.utils.prune.remove(module, name)."
        )
    if mask.shape != place.tensor.shape or not ((mask == 0) | (mask == 1)).all():
        raise CheckpointError(
            f"{name}: a mask of shape {tuple(mask.shape)}, {mask.dtype}, for a tensor of shape "
            f"{tuple(place.tensor.shape)} cannot be saved. It must have that shape and hold nothing but 0 and 1; "
            "otherwise make it permanent: torch.nn.utils.prune.remove(module, name)."
        )


def _check_shared(found: Mapping[str, Place]) -> None:
    """A tensor is stored once: what a mask hides from one of its users, no other may see."""
    first: dict[int, str] = {}
    for name, place in found.items():
        other = first.setdefault(id(place.tensor), name)
        if not _same_mask(place.mask, found[other].mask):
            raise CheckpointError(
                f"{other} and {name} are one shared tensor, but their masks differ: it cannot be saved. Mask both "
                "alike, or make the masks permanent: torch.nn.utils.prune.remove(module, name)."
            )


def _same_mask(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left.bool(), right.bool())
