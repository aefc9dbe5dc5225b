"""What torch-pruning's dependency graph says about a model: which channels go along when channels of a layer go."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import Dependency, index_mapping
from torch_pruning.ops import OPTYPE, _OutputOp

from jbrprune.errors import UnsupportedModelError
from jbrprune.models import layers, preserve
from jbrprune.structure.groups import Axis, Side

MOST_VISITS = 64
"""So often may a walk find new channels at one node of the dependency graph: a concatenation has fewer parts."""

MOST_STEPS = 2
"""So many steps per node of the graph (and a hundred) may a walk take; those that find their way take less than one."""

UNSHRINKABLE = (nn.MultiheadAttention, nn.RNNBase, nn.Embedding)
"""Classes whose outputs keep their width; recurrent layers may lose inputs."""

_UNKNOWN: Any = object()
"""Stands for the rule of an operation of which it is not known which channels belong together."""


class _Lost(Exception):
    """A signal: the graph does not tell what happens to the channels of a root."""


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


class CouplingGraph:
    """torch-pruning's graph of a model, read as couplings of axes by name."""

    def __init__(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        self._graph = graph
        self._modules = dict(model.named_modules())
        self._parameters = {parameter: name for name, parameter in model.named_parameters()}
        self.names = {module: name for name, module in self._modules.items()}
        widths = [layers.width_of(module, side) or 1 for module in self.names for side in ("out", "in")]
        self._widest = max(widths)

    def roots(self) -> list[nn.Module]:
        """Layers that produce channels of their own."""
        return [m for m in self._graph.module2node if m in self.names and isinstance(m, nn.Linear | _ConvNd)]

    def coupled_axes(self, root: nn.Module, width: int) -> tuple[list[Coupling], str | None]:
        """Axes that shrink with a root, and why all of them must stay as they are (if they must)."""
        if width == 1:  # it cannot go; what it is multiplied with is broadcast, not coupled
            return [], None
        couplings, reason = [], None
        try:
            for dependency, channel, source in self._walk(root, width):
                module, out = dependency.target.module, self._graph.is_out_channel_pruning_fn(dependency.handler)
                if isinstance(module, _OutputOp):
                    reason = "reaches the model's output"
                elif isinstance(module, UNSHRINKABLE) and (out or not isinstance(module, nn.RNNBase)):
                    shown = f"{self.names[module]} ({type(module).__name__})"
                    reason = reason or f"{shown} is of a class that cannot be shrunk"
                place = self._place(dependency)
                if place is None or place[1] == 1:
                    continue
                axis, full, times = place
                if channel.max() * times >= full:
                    channel, source = (side[channel * times < full] for side in (channel, source))
                    reason = reason or f"the dependency graph does not follow its channels to {axis[0]}"
                whole = out and times == 1 and len(channel) == full and np.array_equal(channel, source)
                couplings.append(Coupling(axis, full, channel * times, source, whole))
        except _Lost:
            reason = reason or "the dependency graph does not follow its channels"
        return couplings, reason

    def _place(self, dependency: Dependency) -> tuple[Axis, int, int] | None:
        """Axis that a dependency prunes, its width, and how many of its channels stand for one index."""
        module, dim = dependency.target.module, dependency.target.pruning_dim
        name = self.names.get(module)
        if isinstance(module, nn.PReLU):
            name, module, dim = None, module.weight, 0
        if isinstance(module, nn.Parameter):
            name, width = self._parameters[module], module.shape[dim]
            owner = name.rpartition(".")[0]
            if layers.channel_dim(self._modules[owner]) is not None:  # per channel, but unknown to torch-pruning
                return (owner, "out", 0), width, 1
            return (name, "param", dim), width, 1
        if name is None:
            return None
        out = self._graph.is_out_channel_pruning_fn(dependency.handler)
        times = module.out_channels // module.groups if layers.is_depthwise(module) and not out else 1
        side: Side = "out" if out or layers.is_depthwise(module) else "in"  # of its inputs, a multiple comes out
        width = layers.width_of(module, side)
        return None if width is None else ((name, side, 0), width, times)

    def _walk(self, root: nn.Module, width: int) -> Iterator[tuple[Dependency, np.ndarray, np.ndarray]]:
        """Walk from all output channels of a root: dependency, channels at its target, channels at the root.

        Every pair of channels is followed once per node. torch-pruning's own walk compares whole lists (which need
        not end where a product of features is reshaped) and forgets all but one root of a channel.
        """
        start, every = self._graph.module2node[root], np.arange(width)
        prune = self._graph.get_pruner_of_module(root).prune_out_channels  # type: ignore[union-attr]
        seen: dict[tuple, np.ndarray] = defaultdict(lambda: np.arange(0))
        seen[start, prune] = every * width + every
        visits: Counter[tuple] = Counter()
        steps = 0
        waiting = [(Dependency(prune, prune, start, start), every, every)]
        while waiting:
            step = waiting.pop()
            yield step
            done, channel, source = step
            for dependency in done.target.dependencies:
                if not dependency.is_triggered_by(done.handler):
                    continue
                there, origin = _map_channels(dependency, channel, source)
                key, pairs = (dependency.target, dependency.handler), there * width + origin
                new = ~np.isin(pairs, seen[key])
                if not new.any():
                    continue
                there, origin = there[new], origin[new]
                if there.max() >= 2 * self._widest:
                    raise _Lost  # as in a product of features that is reshaped, there is no end to it
                known = np.sort(np.concatenate([seen[key], pairs]))  # np.union1d hashes, and such numbers collide
                seen[key] = known[np.diff(known, prepend=-1) > 0]
                steps, visits[key] = steps + 1, visits[key] + 1
                most = 100 + MOST_STEPS * len(self._graph.module2node)
                if len(seen[key]) > 4 * self._widest or visits[key] > MOST_VISITS or steps > most:
                    raise _Lost
                waiting.append((dependency, there, origin))


class _PerChannel(tp.function.BasePruningFunc):
    """Tells torch-pruning of layers that keep what belongs to a channel in buffers, such as frozen batch norms."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Never called: only the couplings are read."""
        raise NotImplementedError

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int | None:
        """Width of the layer."""
        return layers.width_of(layer, "out")

    get_in_channels = get_out_channels


class _OneNode(torch.autograd.Function):
    """One node of the graph in the place of all that a recurrent layer does, step by step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        """The output."""
        return output.clone()


def _as_one_node(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
    return (_OneNode.apply(preserve.input_of(args, kwargs), output[0].detach()), *output[1:])


def trace_model(model: nn.Module, images: Tensor) -> CouplingGraph:
    """Trace a model.

    An operation that torch-pruning cannot map loses the channels that lead through it, not the graph.

    Args:
        model: The model; left as it was.
        images: ``[B >= 2, C, H, W]`` on the model's device.

    Raises:
        UnsupportedModelError: The model does not run on these images, or torch-pruning cannot trace it.
    """
    advice = "Check that the model runs on this input."

    def forward(model: nn.Module, inputs: Any) -> list[Tensor]:
        nonlocal advice
        outputs = [tensor for tensor in preserve.tensors_of(model(*inputs)).values() if tensor.requires_grad]
        advice = "The model runs, but torch-pruning does not understand its operations: it cannot be pruned."
        return outputs

    graph = tp.DependencyGraph()
    fixed: dict[Any, tp.function.BasePruningFunc] = {
        type(module): _PerChannel()
        for module in model.modules()
        if not module._parameters and module._buffers and layers.channel_tensors(module, "out")
    }
    fixed |= {kind: tp.function.LSTMPruner() for kind in (nn.GRU, nn.RNN)}
    recurrent = {name: _as_one_node for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    with preserve.inference_state(model, gradients=True), preserve.hooked(model, recurrent):
        try:
            inputs = (images.detach().clone(),)
            graph.build_dependency(model, inputs, cast(Any, forward), customized_pruners=fixed, verbose=False)
        except Exception as error:  # whatever a foreign forward, or torch-pruning about it, raises
            if not getattr(graph, "module2node", None):
                raise UnsupportedModelError(
                    f"The dependency graph of {type(model).__name__} cannot be traced with an input of shape "
                    f"{tuple(images.shape)}: {type(error).__name__}: {error}. {advice}"
                ) from error
            _map_one_by_one(graph)
    _map_splits(graph)
    return CouplingGraph(graph, model)


def _map_one_by_one(graph: tp.DependencyGraph) -> None:
    """Map the channels of every operation by itself; what leads through one that cannot be mapped is lost."""
    alone = copy.copy(graph)
    for module, node in graph.module2node.items():
        alone.module2node = {module: node}
        try:
            index_mapping.update_index_mapping(alone)
        except Exception:  # whatever torch-pruning raises where it does not know a width
            others = [d for other in (*node.inputs, *node.outputs) for d in other.dependencies if d.target is node]
            for dependency in (*node.dependencies, *others):
                dependency.index_mapping[0] = _UNKNOWN  # type: ignore[call-overload]


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


def _map_channels(dependency: Dependency, channel: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channels on the other side of a dependency, by torch-pruning's rules for concat, split, slice and flatten.

    The commonest rules, those of a part and its whole and of flattening, are applied to arrays: a walk applies them
    thousands of times, and to millions of pairs where it goes astray.
    """
    rules: Any = dependency.index_mapping
    for rule in rules:
        kind = type(rule)
        if rule is None:
            continue
        each = getattr(rule, "_stride", 0)  # negative where torch-pruning is wrong about a width
        if kind is index_mapping._FlattenIndexMapping and not rule.reverse and each > 0:
            channel, source = (channel[:, None] * each + np.arange(each)).flatten(), np.repeat(source, each)
            continue
        if kind in (index_mapping._SplitIndexMapping, index_mapping._ConcatIndexMapping):
            if len(rule.offset) < 2:  # torch-pruning counts fewer parts than there are
                raise _Lost
            begin, end = rule.offset
            if rule.reverse == (kind is index_mapping._SplitIndexMapping):  # from the part to the whole
                channel = channel + begin
            else:
                inside = (channel >= begin) & (channel < end)
                channel, source = channel[inside] - begin, source[inside]
            continue
        try:
            pairs = rule(
                [_HybridIndex(idx=i, root_idx=r) for i, r in zip(channel.tolist(), source.tolist(), strict=True)]
            )
            table = np.array([(pair.idx, pair.root_idx) for pair in pairs], dtype=np.int64).reshape(-1, 2)
        except Exception as error:  # unknown, or whatever torch-pruning raises where it is wrong about a width
            raise _Lost from error
        channel, source = table.T
    return channel, source
