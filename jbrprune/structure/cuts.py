"""Which indices of which tensors of a model go with channels, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jbrprune.errors import ModelError
from jbrprune.structure.channels import channels, is_generic, own_tensors, tensor_cuts
from jbrprune.structure.groups import Axis, Side


@dataclass
class Plan:
    """What goes where.

    Attributes:
        tensor: id of a tensor -> the tensor.
        gone: id of a tensor -> dimension -> indices that go, ascending.
        sides: Name of a module -> side -> channels that go, ascending.
    """

    tensor: dict[int, Tensor] = field(default_factory=dict)
    gone: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    sides: dict[str, dict[Side, Tensor]] = field(default_factory=dict)

    def cut(self, tensor: Tensor, dim: int, gone: Tensor, where: str) -> None:
        """Note that indices of a tensor go; another place may say the same, but nothing else."""
        dims = self.gone.setdefault(id(tensor), {})
        if dim in dims and not torch.equal(dims[dim], gone):
            raise ModelError(
                f"{where}: dimension {dim} of this tensor is named twice (it is shared, or given by module and by "
                "parameter) with different indices. Remove the same indices everywhere."
            )
        dims[dim] = gone
        self.tensor[id(tensor)] = tensor

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape after the removal."""
        dims = self.gone.get(id(tensor), {})
        return tuple(size - (len(dims[dim]) if dim in dims else 0) for dim, size in enumerate(tensor.shape))


def planned(model: nn.Module, gone: Mapping[Axis, Tensor]) -> Plan:
    """Check everything; change nothing.

    Args:
        model: The model.
        gone: As for `jbrprune.structure.slicing.remove_channels`.

    Raises:
        ModelError: As there.
    """
    plan = Plan()
    for (name, side, dim), indices in gone.items():
        if indices.numel() == 0:
            continue
        if side == "param":
            _plan_tensor(plan, model, name, dim, indices)
        else:
            _plan_side(plan, model, name, side, indices)
    for name, sides in plan.sides.items():
        module = model.get_submodule(name)
        for (tensor, dim), indices in tensor_cuts(module, sides, name).items():
            plan.cut(own_tensors(module)[tensor], dim, indices, f"{name}.{tensor}")
    _check_agreement(plan, model)
    return plan


def _plan_tensor(plan: Plan, model: nn.Module, name: str, dim: int, indices: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    tensor = own_tensors(_submodule(model, owner, name)).get(own)
    if tensor is None:
        raise ModelError(f"{name}: the model has no parameter or buffer of this name.")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ModelError(f"{name}: there is no dimension {dim}, the shape is {tuple(tensor.shape)}.")
    dim %= tensor.dim()
    plan.cut(tensor, dim, _checked(indices, tensor.shape[dim], f"{name}, dimension {dim}"), name)


def _plan_side(plan: Plan, model: nn.Module, name: str, side: Side, indices: Tensor) -> None:
    module = _submodule(model, name, name)
    where = f"{name} ({type(module).__name__}), side {side!r}"
    known = channels(module).get(side)
    if known is None or (not known.dims and known.width is None):
        raise ModelError(f"{where}: this module has no channels of its own on that side.")
    for tensor in known.dims:
        if tensor not in own_tensors(module) and isinstance(getattr(module, tensor, None), Tensor):
            raise ModelError(
                f"{where}: {tensor!r} is computed from other tensors (parametrized, or masked by "
                "torch.nn.utils.prune). Make it permanent first: torch.nn.utils.prune.remove or "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
    plan.sides.setdefault(name, {})[side] = _checked(indices, known.width, where)


def _checked(indices: Tensor, size: int | None, where: str) -> Tensor:
    """Indices in ascending order on the CPU."""
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ModelError(
            f"{where}: indices must be a one-dimensional integer tensor, got {indices.dtype} of shape "
            f"{tuple(indices.shape)}."
        )
    ordered = indices.detach().cpu().long().sort().values
    if (ordered[1:] == ordered[:-1]).any():
        twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        raise ModelError(f"{where}: index {twice} is given more than once.")
    if ordered[0] < 0 or (size is not None and ordered[-1] >= size):
        wrong = int(ordered[0] if ordered[0] < 0 else ordered[-1])
        raise ModelError(f"{where}: index {wrong} is out of range, there are {size} channels.")
    if len(ordered) == size:
        raise ModelError(f"{where}: all {size} channels would go. At least one must stay.")
    return ordered


def _check_agreement(plan: Plan, model: nn.Module) -> None:
    """Tensors of one module still fit together, also where only some of them are shared."""
    for name, module in model.named_modules():
        own = own_tensors(module)
        touched = any(id(tensor) in plan.gone for tensor in own.values())
        if not touched or is_generic(module) or getattr(module, "groups", 1) != 1:
            continue
        for side, known in channels(module).items():
            sizes = {tensor: plan.shape(own[tensor])[dim] for tensor, dim in known.dims.items() if tensor in own}
            if len(set(sizes.values())) > 1:
                raise ModelError(
                    f"{name} ({type(module).__name__}), side {side!r}: its tensors would no longer fit "
                    f"together: {sizes}. It shares a tensor that shrinks; name its channels as well."
                )


def shrunk(tensor: Tensor, gone: Mapping[int, Tensor]) -> Tensor:
    """What is left of a tensor, in ascending order; a parameter stays a parameter."""
    left = tensor.detach()
    for dim, indices in gone.items():
        left = left.index_select(dim, kept(left.shape[dim], indices).to(left.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        left = left.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def kept(size: int, gone: Tensor) -> Tensor:
    """Indices below ``size`` that stay, ascending.

    Example:
        >>> kept(4, torch.tensor([0, 2])).tolist()
        [1, 3]
    """
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def _submodule(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{where}: the model has no module {name!r}. Names are those of named_modules().") from None
