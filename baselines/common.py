"""What the criteria share: the tensors of a unit, sums over its members, gradients by the label, activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from jbrprune.data.batches import Batch
from jbrprune.errors import DataError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.structure.groups import Group, Member

Values = dict[str, Tensor]
"""Group name -> ``[units]`` float64."""

# --- the tensors of a unit -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """One parameter that shrinks when units of a group go.

    Attributes:
        parameter: The parameter.
        kind: Its name in its module: ``weight``, ``bias``, ...
        module: The module; None for a bare parameter.
        member: The channels on the axis.
    """

    parameter: Tensor
    kind: str
    module: nn.Module | None
    member: Member

    @property
    def produces(self) -> bool:
        """Whether these are the filters that make the channels."""
        return self._of_consumer and self.member.axis[1] == "out" and self.kind == "weight"

    @property
    def consumes(self) -> bool:
        """Whether these are the weights that read the channels."""
        return self._of_consumer and self.member.axis[1] == "in"

    @property
    def _of_consumer(self) -> bool:
        return self.module is not None and layers.is_consumer(self.module)

    def rows(self, tensor: Tensor | None = None) -> Tensor:
        """``[c, n]`` the entries of each of the member's channels, of the parameter or of a tensor of its shape."""
        tensor = self.parameter.detach() if tensor is None else tensor
        _, side, dim = self.member.axis
        if isinstance(self.module, _ConvNd) and self.kind == "weight":  # [out, in / groups, ...]; transposed: swapped
            if (side == "in") == self.module.transposed:
                table = tensor.flatten(1)
            else:
                table = torch.cat([block.transpose(0, 1).flatten(1) for block in tensor.chunk(self.module.groups)])
        else:
            dim = dim if self.module is None else layers.channel_tensors(self.module, side)[self.kind]
            table = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
        return table[self.member.channel.to(tensor.device)].cpu().double()

    def vectors(self, units: int) -> Tensor:
        """``[units, n]`` all entries of each unit."""
        return self.rows()[self.member.unit.argsort(stable=True)].reshape(units, -1)


def parts(model: nn.Module, group: Group) -> list[Part]:
    """All parameters that shrink with a group; heads themselves hold none."""
    found = []
    for member in group.members:
        name, side, _ = member.axis
        if side == "param":
            found.append(Part(model.get_parameter(name), name.rpartition(".")[2], None, member))
        elif side != "heads":
            module = model.get_submodule(name)
            tensors = {kind: module._parameters.get(kind) for kind in layers.channel_tensors(module, side)}
            found += [Part(tensor, kind, module, member) for kind, tensor in tensors.items() if tensor is not None]
    return found


def sum_members(group: Group, pairs: Sequence[tuple[Member, Tensor]]) -> Tensor:
    """``[units]`` the sum of ``[c]`` numbers per channel over members."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member, value in pairs:
        total.index_add_(0, member.unit, value.cpu().double())
    return total


def sum_parts(
    model: nn.Module,
    groups: Sequence[Group],
    quantity: Callable[[Part], Tensor],
    keep: Callable[[Part], bool] = lambda part: True,
) -> Values:
    """For every unit, the sum of ``quantity(part)``, ``[c]`` one number per channel, over the parts that are kept."""
    return {
        group.name: sum_members(group, [(part.member, quantity(part)) for part in parts(model, group) if keep(part)])
        for group in groups
    }


def sum_powers(model: nn.Module, groups: Sequence[Group], p: int) -> Values:
    r"""For every unit, the sum of \|w\|^p over all that goes with it, but biases."""
    return sum_parts(model, groups, lambda part: part.rows().abs().pow(p).sum(1), lambda part: part.kind != "bias")


def sum_filters(model: nn.Module, groups: Sequence[Group], score: Callable[[Tensor], Tensor]) -> Values:
    """For every unit, the sum over its producers of ``score([units, n] filters) -> [units]``."""
    found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for group in groups:
        for part in parts(model, group):
            if part.produces:
                found[group.name] += score(part.vectors(group.size))
    return found


def multiply(part: Part, gradients: Mapping[Any, Tensor]) -> Tensor:
    """``[c, n]`` w times whatever belongs to it."""
    gradient = gradients.get(part.parameter)
    return torch.zeros(len(part.member.channel), 1) if gradient is None else part.rows() * part.rows(gradient)


# --- the data --------------------------------------------------------------------------------------


def check_labels(name: str, batches: Sequence[Batch]) -> None:
    """Refuse batches without labels.

    Raises:
        DataError: A batch has no labels, or there is no batch.
    """
    check_images(name, batches)
    for number, batch in enumerate(batches):
        if batch.labels is None:
            raise DataError(
                f"Criterion {name!r} needs labels, but batch {number} has images only. Yield (image, label) tuples, or "
                "choose a criterion without labels, such as 'jbr'."
            )


def check_images(name: str, batches: Sequence[Batch]) -> None:
    """Refuse to go without images.

    Raises:
        DataError: There is no batch.
    """
    if not batches:
        raise DataError(f"Criterion {name!r} needs images, but there is no batch.")


def label_losses(model: nn.Module, batch: Batch) -> Tensor:
    """``[B]`` cross-entropy with the label, with its graph."""
    batch = batch.to(preserve.device_of(model)).map(torch.clone)  # what inference mode made cannot be differentiated
    return F.cross_entropy(logits_of(model(batch.images)), batch.labels, reduction="none")


def mean_gradients(model: nn.Module, batches: Sequence[Batch], name: str) -> dict[Tensor, Tensor]:
    """Parameter -> gradient of the mean cross-entropy over all images; parameters that take no part are absent.

    Whatever the size of the batches: samples are weighted alike.
    """
    check_labels(name, batches)
    count = sum(map(len, batches))
    found: dict[Tensor, Tensor] = {}
    with preserve.inference_state(model, gradients=True):
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for batch in batches:
            gradients = torch.autograd.grad(label_losses(model, batch).sum(), leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    found[leaf] = found.get(leaf, 0) + gradient.cpu().double() / count
    return found


def read_inputs(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], note: Callable[[str, Tensor], None]
) -> None:
    """Call ``note(name, x)`` with what every consumer of the groups reads, channels first: ``[B, C, ...]``."""

    def reader(name: str, dim: int) -> preserve.Hook:
        return lambda module, args, kwargs: note(name, preserve.input_of(args, kwargs).movedim(dim, 1))

    names = {member.axis[0] for group in groups for member in group.side("in")}
    hooks = {name: reader(name, layers.channel_dim(model.get_submodule(name)) or 1) for name in names}
    device = preserve.device_of(model)
    with preserve.inference_state(model), preserve.hooked(model, forward_pre=hooks):
        for batch in batches:
            model(batch.to(device).images.clone())


def input_moments(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Consumer -> mean over samples and positions of x and of x^2, ``[C_in]`` each, of what it reads."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        for row in x:  # one by one: float64 of a whole batch would take much memory
            row = row.cpu().double().reshape(len(row), -1)
            totals[name] = totals.get(name, 0) + torch.stack([row.sum(1), row.square().sum(1)])
            counts[name] = counts.get(name, 0) + row.shape[1]

    read_inputs(model, batches, groups, note)
    return {name: tuple(total / counts[name]) for name, total in totals.items()}
