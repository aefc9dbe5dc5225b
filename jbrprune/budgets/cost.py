"""What a model costs, and what each removal saves.

Multiply-accumulates (MACs) are half of what `torch.utils.flop_counter.FlopCounterMode` counts, per image, with
attention computed by its plain products, recurrent layers and deformable convolutions added. The cost of
a partly pruned model is a sum of terms, each proportional to the kept shares of some axes, so a plan can be priced
without carrying it out.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Axis, Group

UNCOUNTED = ("_trilinear", "_fft_r2c", "_fft_c2c", "_fft_c2r", "_cdist_forward", "miopen_rnn")
"""Operators of torch itself that multiply and are not counted; those of other libraries are all looked for."""


def recurrent_flops(inputs: Sequence[int], *shapes: Any, **_: object) -> int:
    """FLOPs of recurrent layers, from shapes: every matrix is applied once at every position of every sequence.

    Args:
        inputs: ``[..., features]``.
        *shapes: The matrices of inputs and of states, or a list of all weights with the biases among them.
        **_: What the counter passes besides.
    """
    weights: Any = shapes[0] if isinstance(shapes[0], list) else shapes[:2]
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


def deformable_flops(inputs: object, weight: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    """FLOPs of a deformable convolution, from shapes: those of a plain one, interpolation apart."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _formulas() -> dict:
    """FLOPs of what torch has no formula for, by operator; that of torchvision exists where it is imported."""
    found = {torch.ops.aten.mkldnn_rnn_layer: recurrent_flops, torch.ops.aten._cudnn_rnn: recurrent_flops}
    deformable = getattr(torch.ops.torchvision, "deform_conv2d", None)
    return found | ({deformable: deformable_flops} if deformable else {})


def find_uncounted(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Operator of unknown cost, such as one of another library -> the module that first calls it.

    Args:
        model: The model; left as it was.
        images: ``[B, C, H, W]``; only the first image is used.
    """
    found: dict[str, str] = {}
    running: list[str] = []
    counted = {*flop_registry, *_formulas()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            operator = getattr(func, "_overloadpacket", func)
            foreign = getattr(func, "namespace", "") not in ("aten", "prims", "prim")
            if operator not in counted and (foreign or operator.__name__ in UNCOUNTED):
                found.setdefault(str(operator), running[-1])
            return func(*args, **(kwargs or {}))

    def leave(*_: object) -> None:
        running.pop()

    before = {name: lambda *_, name=name: running.append(name) for name, _ in model.named_modules()}
    hooks = preserve.hooked(model, dict.fromkeys(before, leave), before)
    with preserve.inference_state(model), hooks, Watch():
        model(images[:1])
    return found


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
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    running: list[str] = []
    counted = 0

    def settle() -> None:
        nonlocal counted
        total = counter.get_total_flops() // 2
        if running:
            own[running[-1]] += total - counted
        counted = total

    def enter(name: str) -> preserve.Hook:
        def hook(*_: object) -> None:
            settle()
            running.append(name)

        return hook

    def leave(*_: object) -> None:
        settle()
        running.pop()

    before = {name: enter(name) for name in own}
    hooks = preserve.hooked(model, dict.fromkeys(own, leave), before)
    with preserve.inference_state(model), hooks, _plain_attention(), counter:
        model(images[:1])
    return {name: macs for name, macs in own.items() if macs or not name}


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Compute attention by matrix products: the counter has no formula for fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class Term:
    """A part of a cost: ``amount``, proportional to the kept share of each axis; or ``pair``, where that is less.

    ``name`` is the module that it is the cost of.
    """

    amount: float
    axes: tuple[Axis, ...]
    pair: tuple[Term, ...] = ()
    name: str = ""


def mac_terms(model: nn.Module, images: Tensor, groups: Iterable[Group] = ()) -> list[Term]:
    """The MACs of a model as terms; two layers in the place of one, which lose directions, are one term."""
    terms = []
    for name, macs in count_macs(model, images).items():
        module = model.get_submodule(name)
        if layers.is_depthwise(module) or layers.is_grouped(module):
            axes: tuple[Axis, ...] = ((name, "out", 0),)
        elif layers.is_consumer(module):
            axes = ((name, "out", 0), (name, "in", 0))
            if isinstance(module, nn.RNNBase):  # what the states cost stays
                sizes = {own: w.numel() for own, w in module.named_parameters() if "weight" in own}
                share = sum(sizes.get(own, 0) for own in layers.channel_tensors(module, "in")) / sum(sizes.values())
                terms, macs = [*terms, Term(macs * (1 - share), (), name=name)], macs * share
        else:
            axes = ((name, "heads", 0), (name, "head_dim", 0)) if layers.head_layout(module) else ()
        terms.append(Term(macs, axes, name=name))
    return join_pairs(terms, model, groups)


def parameter_terms(model: nn.Module, groups: Iterable[Group] = ()) -> list[Term]:
    """The number of parameters of a model as terms; a shared parameter counts once."""
    terms, seen = [], set()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(name, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            axes: tuple[Axis, ...] = ((name, "out", 0),)
            if layers.channel_dim(module) is None:
                axes = tuple((own, "param", dim) for dim in range(parameter.dim()))
            elif layers.is_consumer(module) and not layers.is_grouped(module):
                reads = own.rpartition(".")[2] in layers.channel_tensors(module, "in")
                axes = (*axes, (name, "in", 0)) if reads else axes
            terms.append(Term(parameter.numel(), axes, name=name))
    return join_pairs(terms, model, groups)


def join_pairs(terms: Iterable[Term], model: nn.Module, groups: Iterable[Group]) -> list[Term]:
    """Let two layers in the place of one cost what the one would, where that is less.

    The bias of the first, which moves into that of the second in the end, costs nothing.
    """
    terms = list(terms)
    for name in [group.name for group in groups if group.kind == "direction"]:
        first, second = (tuple((f"{name}.{part}", side, 0) for side in ("out", "in")) for part in (0, 1))
        pair = tuple(term for term in terms if term.axes in (first, second))
        sizes = [layers.width_of(model.get_submodule(f"{name}.{part}"), "out") or 0 for part in (0, 1)]
        whole = pair[0].amount * sizes[1] / sizes[0]
        terms = [term for term in terms if term.axes not in (first, first[:1], second)]
        terms.append(Term(whole, (second[0], first[1]), pair, name))  # type: ignore[arg-type]
    return terms


def channel_terms(groups: Iterable[Group]) -> list[Term]:
    """The channels of all removable units, each unit counted by its width on the axis that names its group."""
    return [Term(g.size * g.channels_per_unit()[g.members[0].axis], (_unit_axis(g),), name=g.name) for g in groups]


def axis_widths(model: nn.Module, groups: Iterable[Group]) -> dict[Axis, int]:
    """Axis -> its whole width in the model, for every axis that the groups have members on."""
    widths: dict[Axis, int] = {}
    for axis in (member.axis for group in groups for member in group.members):
        name, side, dim = axis
        if side == "param":
            widths[axis] = model.get_parameter(name).shape[dim]
        else:
            widths[axis] = layers.width_of(model.get_submodule(name), side)  # type: ignore[assignment]
    return widths


def cost_model(kind: str, model: nn.Module, images: Tensor, groups: Sequence[Group]) -> CostModel:
    """The cost of a model as it is now, and what each removal saves.

    Args:
        kind: ``macs``, ``params`` or ``channels``; a budget of ``latency`` or ``latency_ms`` is priced by MACs.
        model: The model; left as it was.
        images: ``[B, C, H, W]``; only the first image is used.
        groups: The units that may go.
    """
    if kind == "params":
        terms = parameter_terms(model, groups)
    else:
        terms = channel_terms(groups) if kind == "channels" else mac_terms(model, images, groups)
    return CostModel(terms, groups, axis_widths(model, groups))


class CostModel:
    """The running cost of a plan: units are removed, the total follows.

    Args:
        terms: The cost of the whole model.
        groups: The units that may go; all other channels stay.
        full: Width of every axis that the groups have members on (`axis_widths`).
    """

    def __init__(self, terms: Sequence[Term], groups: Sequence[Group], full: Mapping[Axis, int]) -> None:
        self._full = {**full, **{_unit_axis(group): group.size for group in groups}}
        self._gone = dict.fromkeys(self._full, 0)
        self._per_unit = {group.name: {**group.channels_per_unit(), _unit_axis(group): 1} for group in groups}
        self._terms = list(terms)
        self._of_group = {
            name: [n for n, term in enumerate(terms) if any(axes.keys() & one.axes for one in (term, *term.pair))]
            for name, axes in self._per_unit.items()
        }
        self._value = [self._price(term) for term in terms]
        self.total = math.fsum(self._value)

    def remove(self, group: str, units: int = 1) -> None:
        """Take the cost of ``units`` units of a group off the total; a negative number puts them back."""
        for axis, channels in self._per_unit[group].items():
            self._gone[axis] += channels * units
        for number in self._of_group[group]:
            new = self._price(self._terms[number])
            self.total += new - self._value[number]
            self._value[number] = new

    def saving(self, group: str) -> float:
        """What the removal of one more unit of a group would save now."""
        before = self.total
        self.remove(group)
        saved = before - self.total
        self.remove(group, -1)
        self.total = before
        return saved

    def shares(self) -> dict[str, float]:
        """Module -> its share of what is left, the largest first."""
        found: Counter[str] = Counter()
        for term, value in zip(self._terms, self._value):
            found[term.name] += value / self.total  # type: ignore[assignment]
        return dict(found.most_common())

    def _price(self, term: Term) -> float:
        left = [1 - self._gone[axis] / self._full[axis] for axis in term.axes if axis in self._full]
        amount = term.amount * math.prod(left)
        return min(amount, sum(map(self._price, term.pair))) if term.pair else amount


def _unit_axis(group: Group) -> Axis:
    """A name for the units of a group themselves; no tensor has this axis."""
    return group.name, "units", 0  # type: ignore[return-value]
