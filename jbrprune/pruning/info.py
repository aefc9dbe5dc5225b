"""What can be pruned in a model, and what it costs: `jbrprune info`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from jbrprune.budgets.cost import cost_model
from jbrprune.budgets.selection import Floors, reduce_to_floors
from jbrprune.errors import ArgumentError
from jbrprune.models import preserve, timm_models
from jbrprune.models.preserve import copy_model
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.verification import verify_groups


@dataclass(frozen=True)
class Row:
    """One group: how many units, and what one of them costs.

    Attributes:
        group: Name of the group (its first producer).
        kind: ``channel``, ``head``, ``group`` or ``width``.
        units: Number of units.
        macs_per_unit: Multiply-accumulates that go with one unit.
        params_per_unit: Parameters that go with one unit.
        layers: Layers that shrink.
    """

    group: str
    kind: str
    units: int
    macs_per_unit: int
    params_per_unit: int
    layers: int


@dataclass(frozen=True)
class Inventory:
    """What can be removed from a model.

    Attributes:
        input_size: Channels, height and width that the costs are for.
        macs: Multiply-accumulates of one image.
        params: Parameters.
        least_macs: Share of the MACs that is left with every group at its floor.
        least_params: The same for parameters.
        rows: The groups.
        kept: Layer -> why it keeps its width.
    """

    input_size: tuple[int, ...]
    macs: int
    params: int
    least_macs: float
    least_params: float
    rows: tuple[Row, ...]
    kept: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Pure JSON types."""
        return asdict(self)


def inventory(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    ignore: Sequence[str] = (),
    width: bool = False,
    min_channels: int = 8,
) -> Inventory:
    """List what can be removed from a model.

    Args:
        model: The model; left as it was. Its weights do not matter.
        images: ``[B, C, H, W]`` example input; default: noise of the size that a timm model wants.
        ignore: Globs of module names that keep their width.
        width: Also offer the residual width under LayerNorms.
        min_channels: Channels of every group that stay.

    Raises:
        ArgumentError: ``images`` is needed: the model does not say what it wants.
        UnsupportedModelError: Nothing can be removed safely.

    Example:
        >>> from jbrprune.models.timm_models import create
        >>> inventory(create("resnet10t", pretrained=False)).rows[0].kind
        'channel'
    """
    if images is None:
        size = timm_models.image_size(model)
        if size is None:
            raise ArgumentError(f"{type(model).__name__} does not say which images it wants: pass images=.")
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    work = copy_model(model).eval()
    images = images.to(preserve.device_of(work))
    found = verify_groups(work, images, find_groups(work, images, ignore=ignore, width=width))
    macs, params = (cost_model(kind, work, images, found.groups) for kind in ("macs", "params"))
    rows = tuple(
        Row(g.name, g.kind, g.size, round(macs.saving(g.name)), round(params.saving(g.name)), _layers(g.members))
        for g in found.groups
    )
    totals = macs.total, params.total
    floors = Floors(channels=min_channels)
    dense = {group.name: group.size for group in found.groups}
    return Inventory(
        input_size=tuple(images.shape[1:]),
        macs=round(totals[0]),
        params=round(totals[1]),
        least_macs=reduce_to_floors(macs, found.groups, floors, dense) / totals[0],
        least_params=reduce_to_floors(params, found.groups, floors, dense) / totals[1],
        rows=rows,
        kept=found.skipped,
    )


def _layers(members: Sequence) -> int:
    return len({member.axis[0] for member in members})
