"""What the criteria share: the tensors of a unit, sums over its members, gradients by the label, activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from jbrprune.criteria.objectives import Target, label
from jbrprune.criteria.scores import Scores, Settings
from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, NonFiniteError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.structure.groups import Group, Member

Values = dict[str, Tensor]
"""Group name -> ``[units]`` float64."""

# --- results ---------------------------------------------------------------------------------------


def made(
    name: str, values: Mapping[str, Tensor], groups: Sequence[Group], *, site: str, statistic: str, samples: int = 1
) -> Scores:
    """Scores out of one value per unit.

    Raises:
        NonFiniteError: A value is NaN or Inf.
    """
    for group, value in values.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"Criterion {name!r}: the scores of group {group} contain NaN or Inf. Check the weights, and the "
                "gradients of the loss on these images; float64 helps where a product over all layers overflows."
            )
    sums = {group: value.cpu().double() * samples for group, value in values.items()}
    return Scores(sums, tuple(groups), samples, 0, Settings(name, site, statistic))


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
        if isinstance(self.module, _ConvNd) and self.kind == "weight":
            table = _filters(self.module, side == "in", tensor)
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


def _filters(module: _ConvNd, into: bool, weight: Tensor) -> Tensor:
    """``[channels, n]`` of a convolution's weight ``[out, in / groups, ...]`` (transposed: out and in swapped)."""
    if into == module.transposed:
        return weight.flatten(1)
    return torch.cat([block.transpose(0, 1).flatten(1) for block in weight.chunk(module.groups)])


def unit_sums(
    model: nn.Module,
    groups: Sequence[Group],
    quantity: Callable[[Part], Tensor],
    keep: Callable[[Part], bool] = lambda part: True,
) -> Values:
    """For every unit, the sum of ``quantity(part)``, ``[c]`` one number per channel, over the parts that are kept."""
    return {
        group.name: summed(group, [(part.member, quantity(part)) for part in parts(model, group) if keep(part)])
        for group in groups
    }


def summed(group: Group, pairs: Sequence[tuple[Member, Tensor]]) -> Tensor:
    """``[units]`` the sum of ``[c]`` numbers per channel over members."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member, value in pairs:
        total.index_add_(0, member.unit, value.cpu().double())
    return total


def products(part: Part, gradients: Mapping[Any, Tensor]) -> Tensor:
    """``[c, n]`` w times whatever belongs to it."""
    gradient = gradients.get(part.parameter)
    return torch.zeros(len(part.member.channel), 1) if gradient is None else part.rows() * part.rows(gradient)


def filter_sums(model: nn.Module, groups: Sequence[Group], score: Callable[[Tensor], Tensor]) -> Values:
    """For every unit, the sum over its producers of ``score([units, n] filters) -> [units]``."""
    found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for group in groups:
        for part in parts(model, group):
            if part.produces:
                found[group.name] += score(part.vectors(group.size))
    return found


# --- the data --------------------------------------------------------------------------------------


def shown(batches: Sequence[Batch], name: str, progress: bool) -> tqdm[Batch]:
    """Batches with a progress bar."""
    return tqdm(batches, name, unit="batch", disable=None if progress else True, leave=False)


def check_labels(name: str, batches: Sequence[Batch]) -> None:
    """Refuse batches without labels.

    Raises:
        DataError: A batch has no labels, or there is no batch.
    """
    if not batches:
        raise DataError(f"Criterion {name!r} needs images, but there is no batch.")
    for number, batch in enumerate(batches):
        if batch.labels is None:
            raise DataError(
                f"Criterion {name!r} needs labels, but batch {number} has images only. Yield (image, label) tuples, or "
                "choose a criterion without labels, such as 'jbr'."
            )


def label_losses(model: nn.Module, batch: Batch) -> Tensor:
    """``[B]`` cross-entropy with the label, with its graph."""
    batch = batch.to(preserve.device_of(model))
    logits = logits_of(model(batch.images.clone()))
    return label(logits, Target(logits.detach(), batch.labels, torch.Generator()))


def mean_gradients(model: nn.Module, batches: Sequence[Batch], name: str, progress: bool) -> dict[Tensor, Tensor]:
    """Parameter -> gradient of the mean cross-entropy over all images; parameters that take no part are absent.

    Whatever the size of the batches: samples are weighted alike.
    """
    check_labels(name, batches)
    count = sum(map(len, batches))
    found: dict[Tensor, Tensor] = {}
    with preserve.inference_state(model, gradients=True):
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for batch in shown(batches, name, progress):
            gradients = torch.autograd.grad(label_losses(model, batch).sum(), leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    found[leaf] = found.get(leaf, 0) + gradient.cpu().double() / count
    return found


def read_inputs(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    note: Callable[[str, Tensor], None],
    *,
    progress: bool,
) -> None:
    """Call ``note(name, x)`` with what every consumer of the groups reads, channels first: ``[B, C, ...]``."""

    def reader(name: str, dim: int) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            note(name, preserve.input_of(args, kwargs).movedim(dim, 1))

        return hook

    names = {member.axis[0] for group in groups for member in group.side("in")}
    hooks = {name: reader(name, layers.channel_dim(model.get_submodule(name)) or 1) for name in names}
    device = preserve.device_of(model)
    with preserve.inference_state(model), preserve.hooked(model, forward_pre=hooks):
        for batch in shown(batches, "activations", progress):
            model(batch.to(device).images.clone())


def squared_inputs(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    means: Mapping[str, Tensor] | None = None,
    *,
    progress: bool,
) -> Values:
    """Consumer -> ``[C_in]`` mean over samples and positions of ``(x - mean)^2`` (mean 0 where not given)."""
    totals: Values = {}
    counts: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        for row in x:  # one by one: float64 of a whole batch would take much memory
            row = row.cpu().double().reshape(len(row), -1)
            row = row if means is None else row - means[name][:, None]
            totals[name] = totals.get(name, 0) + row.square().sum(1)
            counts[name] = counts.get(name, 0) + row.shape[1]

    read_inputs(model, batches, groups, note, progress=progress)
    return {name: total / counts[name] for name, total in totals.items()}
