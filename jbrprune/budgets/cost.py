"""What a model costs, and what each removal saves.

Multiply-accumulates (MACs) are half of what `torch.utils.flop_counter.FlopCounterMode` counts, per image,
with attention computed by its plain products. The cost of a partly pruned model is a sum of terms, each a
function of the kept shares of some axes (what is counted: a constant times their product; what is timed: an
interpolated table); so a plan can be priced without carrying it out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Axis, Group


def count_macs(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Qualified module name -> MACs of one image spent in this module itself, submodules apart.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]``; only the first image is used.

    Returns:
        Own MACs by module, where there are any; the model itself is ``""``. Their sum is the model's total.

    Example:
        >>> import torch
        >>> sum(count_macs(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 5, 5)).values())
        300
    """
    own = dict.fromkeys((name for name, _ in model.named_modules()), 0)
    counter = FlopCounterMode(display=False)
    running: list[str] = []
    counted = 0

    def settle() -> None:
        nonlocal counted
        total = counter.get_total_flops() // 2
        if running:
            own[running[-1]] += total - counted
        counted = total

    def entering(name: str) -> preserve.Hook:
        def hook(*_: object) -> None:
            settle()
            running.append(name)

        return hook

    def leaving(*_: object) -> None:
        settle()
        running.pop()

    before = {name: entering(name) for name in own}
    with (
        preserve.inference_state(model),
        preserve.hooked(model, dict.fromkeys(own, leaving), before),
        _plain_attention(),
        counter,
    ):
        model(images[:1])
    return {name: macs for name, macs in own.items() if macs or not name}


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Fused kernels have no formula in the counter: compute attention by matrix products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Priced(Protocol):
    """A part of the cost that depends on how much of some axes is kept."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes it depends on."""
        ...

    def price(self, shares: Sequence[float]) -> float:
        """Its cost with these shares of the axes' present widths, each in [0, 1]."""
        ...


@dataclass(frozen=True)
class Term:
    """``amount`` times the kept share of each axis."""

    amount: float
    axes: tuple[Axis, ...]

    def price(self, shares: Sequence[float]) -> float:
        """Their product."""
        return self.amount * math.prod(shares)


def mac_terms(model: nn.Module, images: Tensor) -> list[Term]:
    """The MACs of a model as terms."""
    terms = []
    for name, macs in count_macs(model, images).items():
        if macs:
            terms.append(Term(macs, mixing_axes(name, model.get_submodule(name))))
    return terms


def parameter_terms(model: nn.Module) -> list[Term]:
    """The number of parameters of a model as terms; a shared parameter counts once."""
    terms, seen = [], set()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                terms.append(Term(parameter.numel(), _parameter_axes(name, module, own, parameter)))
    return terms


def channel_terms(groups: Iterable[Group]) -> list[Term]:
    """The channels of all removable units, each unit counted by its width on the axis that names its group."""
    return [Term(g.size * g.channels_per_unit()[g.members[0].axis], (_units(g),)) for g in groups]


def cost_model(kind: str, model: nn.Module, images: Tensor, groups: Sequence[Group]) -> CostModel:
    """The cost of a model as it is now, and what each removal saves.

    Args:
        kind: ``macs``, ``params`` or ``channels``; a budget of ``latency`` or ``latency_ms`` is priced by MACs.
        model: The model; left as it was.
        images: ``[B, C, H, W]``; the first image counts.
        groups: The units that may go.
    """
    if kind == "params":
        terms = parameter_terms(model)
    else:
        terms = channel_terms(groups) if kind == "channels" else mac_terms(model, images)
    return CostModel(terms, groups, axis_widths(model, groups))


class CostModel:
    """The running cost of a plan: units are removed, the total follows.

    Args:
        terms: The cost of the whole model.
        groups: The units that may go; all other channels stay.
        full: Width of every axis that the groups have members on (`axis_widths`).
        spread: How well the total is known: half the interquartile range of what was timed, 0 of what was counted.
    """

    def __init__(
        self, terms: Sequence[Priced], groups: Sequence[Group], full: Mapping[Axis, int], *, spread: float = 0.0
    ) -> None:
        self.spread = spread
        self._full = {**full, **{_units(group): group.size for group in groups}}
        self._gone = dict.fromkeys(self._full, 0)
        self._per_unit = {group.name: {**group.channels_per_unit(), _units(group): 1} for group in groups}
        self._terms = list(terms)
        of_axis: dict[Axis, set[int]] = {axis: set() for axis in self._full}
        for number, term in enumerate(self._terms):
            for axis in term.axes:
                if axis in of_axis:
                    of_axis[axis].add(number)
        self._of_group = {
            name: sorted({number for axis in axes for number in of_axis[axis]}) for name, axes in self._per_unit.items()
        }
        self._value = [self._priced(term) for term in self._terms]
        self.total = math.fsum(self._value)

    def remove(self, group: str, units: int = 1) -> None:
        """Take the cost of ``units`` units of a group off the total; a negative number puts them back."""
        for axis, n in self._per_unit[group].items():
            self._gone[axis] += n * units
        for number in self._of_group[group]:
            new = self._priced(self._terms[number])
            self.total += new - self._value[number]
            self._value[number] = new

    def saving(self, group: str) -> float:
        """What one more unit of a group would save now."""
        before = self.total
        self.remove(group)
        saved = before - self.total
        self.remove(group, -1)
        self.total = before
        return saved

    def _priced(self, term: Priced) -> float:
        return term.price(
            [1 - self._gone[axis] / self._full[axis] if axis in self._full else 1.0 for axis in term.axes]
        )


def axis_widths(model: nn.Module, groups: Iterable[Group]) -> dict[Axis, int]:
    """Axis -> its whole width in the model, for every axis that the groups have members on."""
    return {axis: _width(model, axis) for group in groups for axis in (member.axis for member in group.members)}


def _width(model: nn.Module, axis: Axis) -> int:
    name, side, dim = axis
    if side == "param":
        return model.get_parameter(name).shape[dim]
    module = model.get_submodule(name)
    width = layers.width_of(module, side)
    assert width is not None, axis
    return width


def mixing_axes(name: str, module: nn.Module) -> tuple[Axis, ...]:
    """The axes of a layer that multiplies: its MACs are proportional to them; none for any other module."""
    if layers.is_depthwise(module) or layers.is_grouped(module):
        return ((name, "out", 0),)
    if layers.is_consumer(module):
        return ((name, "out", 0), (name, "in", 0))
    if layers.head_layout(module):
        return ((name, "heads", 0),)
    return ()


def _parameter_axes(name: str, module: nn.Module, own: str, parameter: Tensor) -> tuple[Axis, ...]:
    if layers.channel_dim(module) is None:
        prefix = f"{name}." if name else ""
        return tuple((prefix + own, "param", dim) for dim in range(parameter.dim()))
    mixes = own == "weight" and layers.is_consumer(module) and not layers.is_grouped(module)
    return ((name, "out", 0), (name, "in", 0)) if mixes else ((name, "out", 0),)


def _units(group: Group) -> Axis:
    """A name for the units of a group themselves; no tensor has this axis."""
    return group.name, "units", 0  # type: ignore[return-value]
