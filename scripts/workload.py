"""What a model asks of ranks, read off the model itself: no weight of it has to exist.

Units come from the dependency graph on the meta device, floating-point operations and what autograd keeps from a pass
over fake tensors, widths after pruning from really removing units on the meta device.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from jbrprune.criteria.members import scored_members
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import copy_model
from jbrprune.repair.least_squares import can_refit
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group
from jbrprune.structure.slicing import remove_units

VIT_10B = {"img_size": 224, "patch_size": 14, "embed_dim": 4096, "depth": 50, "num_heads": 32, "mlp_ratio": 4.0}
"""A plain ViT of 10.08 billion parameters: 50 blocks of width 4096, 257 tokens."""
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
FUSED = {
    getattr(torch.ops.aten, _ATTENTION): lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    getattr(torch.ops.aten, f"{_ATTENTION}_backward"): lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
"""The CPU's fused attention, which the counter does not know: as it counts those of accelerators."""
REST = ""
"""Name of what belongs to no block."""


@dataclass(frozen=True)
class Pass:
    """One image through a model, forward and backward to the activations.

    Attributes:
        forward: Block -> floating-point operations; `REST` for everything else.
        backward: Of the whole backward pass.
        kept: Block -> bytes that are kept for the backward pass, by autograd and for the scores.
        passed: Bytes that blocks hand on: what checkpointing keeps.
        largest: Bytes of the largest tensor among the kept ones.
    """

    forward: Mapping[str, int]
    backward: int
    kept: Mapping[str, int]
    passed: int
    largest: int

    @property
    def checkpointed(self) -> int:
        """Bytes that are kept where every block is computed twice: its inputs, and one block at a time."""
        blocks = [kept for name, kept in self.kept.items() if name != REST]
        return min(sum(self.kept.values()), self.kept[REST] + self.passed + max(blocks, default=0))


@dataclass(frozen=True)
class Consumer:
    """A layer that the repair fits anew.

    Attributes:
        fan_in: Values that it reads for one output.
        outputs: Its outputs.
        positions: Output positions of one image.
    """

    fan_in: int
    outputs: int
    positions: int


@dataclass(frozen=True)
class Workload:
    """A model, and what is left of it.

    Attributes:
        name: What to call it.
        image: ``(C, H, W)``.
        classes: Logits.
        parameters: Block -> its parameters; `REST` for everything else.
        units: Group -> removable units.
        dense: One image through the dense model.
        pruned_state: Bytes of every tensor of the pruned model's state.
        selection: What one pruning removes.
        consumers: What the repair fits.
        norms: Channels of every batch norm before and after.
    """

    name: str
    image: tuple[int, int, int]
    classes: int
    parameters: Mapping[str, int]
    units: Mapping[str, int]
    dense: Pass
    pruned_state: tuple[int, ...]
    selection: Mapping[str, Tensor]
    consumers: tuple[Consumer, ...]
    norms: tuple[tuple[int, int], ...]


def meta_model(name: str, arguments: Mapping[str, object]) -> nn.Module:
    """``vit-10b`` or a timm name, without any weights."""
    with torch.device("meta"):
        if name == "vit-10b":
            return VisionTransformer(**{**VIT_10B, **arguments}).eval()  # type: ignore[arg-type]
        return timm.create_model(name, **arguments).eval()  # type: ignore[arg-type]


def workload(
    name: str, image: tuple[int, int, int], *, arguments: Mapping[str, object] | None = None, share: float = 0.7
) -> Workload:
    """Everything that a simulation needs to know.

    Read in a process of its own: fake tensors bring a stand-in for a GPU into a process, after which autograd refuses
    to be forked.

    Args:
        name: ``vit-10b`` or a timm name.
        image: ``(C, H, W)``.
        arguments: Of the model.
        share: Share of the units of every group that pruning keeps.
    """
    return _apart().submit(_workload, name, image, dict(arguments or {}), share).result()


@functools.cache
def _apart() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _workload(name: str, image: tuple[int, int, int], arguments: Mapping[str, object], share: float) -> Workload:
    model = meta_model(name, arguments)
    example = torch.zeros(2, *image, device="meta")
    groups = find_groups(model, example).groups
    dense = one_pass(model, groups, image)
    full = {name: _fan_in(module) for name, module in model.named_modules() if can_refit(module)}
    norms = _norm_widths(model)
    pruned = copy_model(model)
    selection = {g.name: torch.arange(g.size - max(1, round(share * g.size))) for g in groups}
    selection = {name: units for name, units in selection.items() if len(units)}
    remove_units(pruned, groups, selection)
    return Workload(
        name,
        image,
        _classes(model, example),
        _parameters(model),
        {group.name: group.size for group in groups},
        dense,
        tuple(t.numel() * t.element_size() for t in pruned.state_dict().values()),
        selection,
        tuple(_consumers(pruned, full, example)),
        tuple((norms[name], width) for name, width in _norm_widths(pruned).items()),
    )


def one_pass(model: nn.Module, groups: tuple[Group, ...], image: tuple[int, int, int]) -> Pass:
    """What one image costs while it is scored.

    Args:
        model: On the meta device; left as it was.
        groups: Its units.
        image: ``(C, H, W)``.
    """
    blocks = block_names(model)
    consumers = [name for name, _ in scored_members(model, groups, "consumer")]
    fake = copy_model(model)
    with FakeTensorMode(allow_non_fake_inputs=True):  # knows which attention kernel a device takes; meta does not
        fake.to_empty(device="cpu")
        record = _Kept({p.untyped_storage()._cdata for p in fake.parameters()})
        before = {name: record.entering(name) for name in blocks} | {name: record.reading() for name in consumers}
        after = {name: record.leaving() for name in blocks}
        with preserve.inference_state(fake), preserve.hooked(fake, after, before), torch.enable_grad():
            with FlopCounterMode(display=False, custom_mapping=FUSED) as forward, record.saving():
                logits = fake(torch.zeros(1, *image))
            with FlopCounterMode(display=False, custom_mapping=FUSED) as backward:
                logits.sum().backward()
    per_module = forward.get_flop_counts()
    flops = {name: sum(per_module.get(f"{type(fake).__name__}.{name}", {}).values()) for name in blocks}
    flops[REST] = forward.get_total_flops() - sum(flops.values())
    sizes = [size for size, _, _ in record.kept.values()]
    kept: Counter[str] = Counter(dict.fromkeys((*blocks, REST), 0))
    for size, block, _ in record.kept.values():
        kept[block] += size
    return Pass(flops, backward.get_total_flops(), dict(kept), record.passed, max(sizes, default=0))


class _Kept:
    """Storages that a pass keeps: bytes, the block that was running, and a tensor that keeps the address taken."""

    def __init__(self, parameters: set[int]) -> None:
        self.kept: dict[int, tuple[int, str, Tensor]] = {}
        self.parameters = parameters
        self.block = REST
        self.passed = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters:
            self.kept.setdefault(storage._cdata, (storage.nbytes(), self.block, tensor))
        return tensor

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)

    def reading(self) -> preserve.Hook:
        """Of a scored consumer: its input is kept, and differentiated from here on (`jbrprune.criteria.relevance`)."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = preserve.input_of(args, kwargs)
            self.note(x)
            seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return (seen, *args[1:]), kwargs

        return hook

    def entering(self, name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.block = name

        return hook

    def leaving(self) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            self.block = REST
            self.passed += output.untyped_storage().nbytes()

        return hook


def block_names(model: nn.Module) -> list[str]:
    """The modules in lists and sequences of the model, in order: what is usually sharded as one unit."""

    def inside(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                yield from inside(child, f"{prefix}{name}.")
            elif prefix:
                yield prefix + name

    found = list(inside(model, ""))
    large = {name for name in found if any(True for _ in model.get_submodule(name).parameters())}
    return [name for name in found if name in large]


def _fan_in(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[1]


def _parameters(model: nn.Module) -> dict[str, int]:
    count: Callable[[nn.Module], int] = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    found = {name: count(model.get_submodule(name)) for name in block_names(model)}
    return {**found, REST: count(model) - sum(found.values())}


def _norm_widths(model: nn.Module) -> dict[str, int]:
    """Batch norm -> channels."""
    return {
        name: len(module.running_mean)  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if layers.has_running_statistics(module)
    }


def _classes(model: nn.Module, example: Tensor) -> int:
    with preserve.inference_state(model):
        return model(example).shape[1]


def _consumers(pruned: nn.Module, full: Mapping[str, int], example: Tensor) -> Iterator[Consumer]:
    """The layers that have lost inputs, with what they read."""
    places: dict[str, list[int]] = defaultdict(list)

    def seen(name: str) -> preserve.Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            places[name].append(output.numel() // (len(example) * len(module.get_parameter("weight"))))

        return hook

    thinner = [name for name, width in full.items() if _fan_in(pruned.get_submodule(name)) < width]
    with preserve.inference_state(pruned), preserve.hooked(pruned, {name: seen(name) for name in thinner}):
        pruned(example)
    for name, found in places.items():
        if len(found) == 1:  # one correction cannot serve several inputs
            weight = pruned.get_parameter(f"{name}.weight").flatten(1)
            yield Consumer(weight.shape[1], weight.shape[0], found[0])
