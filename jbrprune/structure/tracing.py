"""What torch-pruning's dependency graph says about a model: which channels go along when channels of a layer go."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping
from torch_pruning.ops import OPTYPE, _OutputOp

from jbrprune.errors import UnsupportedModelError
from jbrprune.models import layers, preserve
from jbrprune.models.preserve import logits_of
from jbrprune.structure.groups import Axis

MOST_VISITS = 64
"""So often may a walk find new channels at one node of the dependency graph: a concatenation has fewer parts."""

MOST_STEPS = 2
"""So many steps per node of the graph (and a hundred) may a walk take; those that find their way take less than one."""

UNSHRINKABLE = (nn.MultiheadAttention, nn.RNNBase, nn.Embedding)


def trace_model(model: nn.Module, images: Tensor) -> CouplingGraph:
    """Trace a model.

    An operation that torch-pruning cannot map loses the channels that lead through it, not the graph.

    Args:
        model: The model; left as it was.
        images: ``[B >= 2, C, H, W]`` on the model's device.

    Raises:
        UnsupportedModelError: The model does not run on these images, or torch-pruning cannot trace it.
    """
    runs = False

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        nonlocal runs
        logits = logits_of(model(*inputs))
        runs = True
        return logits

    graph = tp.DependencyGraph()
    with preserve.inference_state(model, gradients=True):
        try:
            graph.build_dependency(model, example_inputs=(images.detach().clone(),), forward_fn=forward, verbose=False)
        except Exception as error:  # whatever a foreign forward, or torch-pruning about it, raises
            if not getattr(graph, "module2node", None):
                raise UnsupportedModelError(
                    f"The dependency graph of {type(model).__name__} cannot be traced with an input of shape "
                    f"{tuple(images.shape)}: {type(error).__name__}: {error}. {_ADVICE[runs]}"
                ) from error
            _map_one_by_one(graph)
    _map_splits(graph)
    return CouplingGraph(graph, model)


_ADVICE = {
    True: "The model runs, but torch-pruning does not understand its operations: it cannot be pruned.",
    False: "Check that the model runs on this input.",
}


def _map_one_by_one(graph: tp.DependencyGraph) -> None:
    """Map the channels of every operation by itself; what leads through one that cannot be mapped is lost."""
    alone = copy.copy(graph)
    for module, node in graph.module2node.items():
        alone.module2node = {module: node}
        try:
            index_mapping.update_index_mapping(alone)
        except Exception:  # whatever torch-pruning raises where it does not know a width
            for dependency in _around(node):
                dependency.index_mapping[0] = _unknown  # type: ignore[call-overload, assignment]


def _around(node: tp.dependency.Node) -> Iterator[tp.dependency.Dependency]:
    """Dependencies from and to a node."""
    yield from node.dependencies
    for other in (*node.inputs, *node.outputs):
        yield from (dependency for dependency in other.dependencies if dependency.target is node)


def _unknown(pairs: list) -> list:
    raise LookupError("it is not known which channels of this operation belong together")


def _map_splits(graph: tp.DependencyGraph) -> None:
    """Map the channels of splits along the last dimension, as in gated MLPs.

    torch-pruning leaves out every split behind a three-dimensional parameter, because it cannot tell a split of
    tokens (behind a position embedding) from one of channels.
    """
    for node in graph.module2node.values():
        sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        if node.type != OPTYPE.SPLIT or node.enable_index_mapping or len(sizes) != 3:
            continue
        if node.grad_fn._saved_dim > 2:  # a negative number, stored without sign
            node.enable_index_mapping = True
            index_mapping.update_split_index_mapping(graph, node)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The channels of one axis that go when channels of a root go.

    Attributes:
        axis: Where the channels are.
        width: Width of that axis.
        channel: ``[p]`` channels there.
        root: ``[p]`` the root's channel that takes each of them along.
        whole: These are all channels of a producer, each under its own number.
    """

    axis: Axis
    width: int
    channel: np.ndarray
    root: np.ndarray
    whole: bool


class _Lost(Exception):
    """A signal: the graph does not tell what happens to the channels of a root."""


class CouplingGraph:
    """Names and widths of what torch-pruning's graph is made of."""

    def __init__(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.parameters = {parameter: name for name, parameter in model.named_parameters()}
        widths = [w for m in self.names for w in (layers.width_of(m, "out"), layers.width_of(m, "in")) if w]
        self.widest = max(widths, default=1)

    def roots(self) -> list[nn.Module]:
        """Layers that produce channels of their own."""
        return [m for m in self.graph.module2node if m in self.names and isinstance(m, nn.Linear | _ConvNd)]

    def place(self, dependency: tp.dependency.Dependency) -> tuple[Axis, int, int] | None:
        """Axis that a dependency prunes, its width, and how many of its channels stand for one index."""
        node = dependency.target
        module = node.module
        if isinstance(module, nn.Parameter):
            return self._parameter(self.parameters[module], module, node.pruning_dim)
        if module not in self.names:
            return None
        if isinstance(module, nn.PReLU):
            return self._parameter(f"{self.names[module]}.weight", module.weight, 0)
        out = self.graph.is_out_channel_pruning_fn(dependency.handler)
        if not out and layers.is_depthwise(module):  # a multiple of its inputs comes out
            width = layers.width_of(module, "out")
            return (self.names[module], "out", 0), width, width // module.groups  # type: ignore[operator, return-value]
        width = layers.width_of(module, "out") if out else layers.width_of(module, "in")
        return None if width is None else ((self.names[module], "out" if out else "in", 0), width, 1)

    def _parameter(self, name: str, parameter: Tensor, dim: int) -> tuple[Axis, int, int]:
        owner = name.rpartition(".")[0]
        width = parameter.shape[dim]
        if layers.channel_dim(self.modules[owner]) is not None:  # a per-channel layer that torch-pruning does not know
            return (owner, "out", 0), width, 1
        return (name, "param", dim), width, 1


def coupled_axes(graph: CouplingGraph, root: nn.Module, width: int) -> tuple[list[Coupling], str | None]:
    """Axes that shrink with a root, and why all of them must stay as they are (if they must)."""
    if width == 1:  # it cannot go; what it is multiplied with is broadcast, not coupled
        return [], None
    places, reason = [], None
    try:
        for dependency, channel, source in _followed(graph, root, width):
            module = dependency.target.module
            if isinstance(module, _OutputOp):
                reason = "reaches the model's output"
            elif isinstance(module, UNSHRINKABLE):
                name = graph.names[module]
                reason = reason or f"{name} ({type(module).__name__}) is of a class that cannot be shrunk"
            place = graph.place(dependency)
            if place is None or place[1] == 1:
                continue
            axis, full, times = place
            if channel.max() * times >= full:
                channel, source = (side[channel * times < full] for side in (channel, source))
                reason = reason or f"the dependency graph does not follow its channels to {axis[0]}"
            out = times == 1 and graph.graph.is_out_channel_pruning_fn(dependency.handler)
            whole = out and len(channel) == full and np.array_equal(channel, source)
            places.append(Coupling(axis, full, channel * times, source, whole))
    except _Lost:
        reason = reason or "the dependency graph does not follow its channels"
    return places, reason


_Step = tuple[tp.dependency.Dependency, np.ndarray, np.ndarray]


def _followed(graph: CouplingGraph, root: nn.Module, width: int) -> Iterator[_Step]:
    """Walk the graph from all output channels of a root: dependency, channels at its target, channels at the root.

    Every pair of channels is followed once per node. torch-pruning's own walk compares whole lists (which need
    not end where a product of features is reshaped) and forgets all but one root of a channel.
    """
    start, every = graph.graph.module2node[root], np.arange(width)
    prune = graph.graph.get_pruner_of_module(root).prune_out_channels  # type: ignore[union-attr]
    seen = {(start, prune): every * width + every}
    visits: Counter[tuple] = Counter()
    steps = 0
    waiting: list[_Step] = [(tp.dependency.Dependency(prune, prune, start, start), every, every)]
    while waiting:
        step = waiting.pop()
        yield step
        done, channel, source = step
        for dependency in done.target.dependencies:
            if not dependency.is_triggered_by(done.handler):
                continue
            there, origin = _mapped(dependency, channel, source)
            key, pairs = (dependency.target, dependency.handler), there * width + origin
            known = seen.get(key)
            if known is None or not len(known):
                seen[key] = np.unique(pairs)
            else:
                new = known[np.searchsorted(known[:-1], pairs)] != pairs
                if not new.any():
                    continue
                pairs, there, origin = pairs[new], there[new], origin[new]
                seen[key] = np.union1d(known, pairs)
            if len(pairs):
                steps, visits[key] = steps + 1, visits[key] + 1
                if there.max() >= 2 * graph.widest or len(seen[key]) > 4 * graph.widest:
                    raise _Lost  # as in a product of features that is reshaped, there is no end to it
                if visits[key] > MOST_VISITS or steps > 100 + MOST_STEPS * len(graph.graph.module2node):
                    raise _Lost
                waiting.append((dependency, there, origin))


def _mapped(
    dependency: tp.dependency.Dependency, channel: np.ndarray, source: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Channels on the other side of a dependency, by torch-pruning's rules for concat, split, slice and flatten."""
    rules: list[Callable | None] = dependency.index_mapping  # type: ignore[assignment]
    for rule in rules:
        if rule is not None:
            known = _RULES.get(type(rule))
            channel, source = (known or _as_listed)(rule, channel, source)
    return channel, source


_Pairs = tuple[np.ndarray, np.ndarray]


def _as_listed(rule: Any, channel: np.ndarray, source: np.ndarray) -> _Pairs:
    """What a rule of torch-pruning says, on lists as it wants them."""
    pairs = [_HybridIndex(idx=i, root_idx=r) for i, r in zip(channel.tolist(), source.tolist(), strict=True)]
    try:
        pairs = rule(pairs)
    except Exception as error:  # whatever torch-pruning raises where it is wrong about a width
        raise _Lost from error
    if any(pair.root_idx is None for pair in pairs):
        raise _Lost
    first, second = (np.array([getattr(p, name) for p in pairs], dtype=np.int64) for name in ("idx", "root_idx"))
    return first, second


def _part(rule: Any, channel: np.ndarray, source: np.ndarray, *, into: bool) -> _Pairs:
    """One part of several: its channels are numbered from where it begins in the whole."""
    if len(rule.offset) < 2:  # torch-pruning counts fewer parts than there are
        raise _Lost
    begin, end = rule.offset
    if into:
        return channel + begin, source
    inside = (channel >= begin) & (channel < end)
    return channel[inside] - begin, source[inside]


def _split(rule: Any, channel: np.ndarray, source: np.ndarray) -> _Pairs:
    return _part(rule, channel, source, into=rule.reverse)


def _concatenated(rule: Any, channel: np.ndarray, source: np.ndarray) -> _Pairs:
    return _part(rule, channel, source, into=not rule.reverse)


_RULES: dict[type, Callable[[Any, np.ndarray, np.ndarray], _Pairs]] = {
    index_mapping._SplitIndexMapping: _split,
    index_mapping._ConcatIndexMapping: _concatenated,
}
"""The commonest rules of torch-pruning, on arrays: a walk applies them thousands of times."""
