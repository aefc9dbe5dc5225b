"""JBR scores inside torch-pruning's own pruners, for people who already use them.

`jbrprune.prune` does not need this: it removes explicit units itself. Here the scores become a
`torch_pruning.importance.Importance`, so that an unmodified `torch_pruning.pruner.BasePruner` ranks by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from jbrprune.criteria.scores import Scores
from jbrprune.errors import ArgumentError
from jbrprune.structure.groups import Axis


class JBRImportance(tp.importance.Importance):
    r"""Importance of channel c of a torch-pruning group: s_u / n, u the unit that c belongs to, n its channels there.

    A unit of several channels on the axis that torch-pruning ranks (an attention head, a group of a grouped
    convolution) shares its score among them, so that the sum over its channels is the unit's score;
    torch-pruning ranks heads and groups by the mean. Scores are E[v^2] (unit: squared change of the objective).

    Groups that `jbrprune.structure.discovery.find_groups` or the trial kept (the classifier, for instance) get None:
    `BasePruner` leaves them as they are. Scores are of one model at one time: after a step, score again and set
    `BasePruner.importance` to a new instance, or use `jbrprune.prune`, which does so.

    What torch-pruning 1.6.1 needs to be told, because an importance cannot see it:

    * Its LayerNorm pruner may permute the weights that stay: pass ``customized_pruners=layer_norm_pruner(model)``.
    * ``isomorphic=True`` is right only together with ``global_pruning=True``; alone it prunes wrong channels, silently.
    * Its default dictionaries are shared between pruners of one process: pass fresh ``in_channel_groups={}``,
      ``out_channel_groups={}`` and ``num_heads={...}``.
    * Channels of equal importance go together, past the target if they must; a layer keeps one at least.
    * Parameters without ``requires_grad`` are not pruned.
    * For heads pass ``prune_num_heads=True, prune_head_dims=False``, and set ``num_heads`` and ``attn_dim`` of the
      attention modules afterwards: torch-pruning changes the layers only.

    Args:
        scores: Scores of the model as it is now, of coupled units (`jbrprune.score`).

    Example:
        >>> import timm, torch
        >>> from jbrprune.criteria.relevance import Relevance
        >>> from jbrprune.structure.discovery import find_groups
        >>> model = timm.create_model("resnet10t").eval()
        >>> images = torch.randn(4, 3, 32, 32)
        >>> scores = Relevance()(model, images, find_groups(model, images).groups)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, (images,), JBRImportance(scores), pruning_ratio=0.5, global_pruning=True,
        ...     in_channel_groups={}, out_channel_groups={}, num_heads={},
        ... )
        >>> pruner.step()
        >>> sum(p.numel() for p in model.parameters()) < 5_000_000
        True

    Source:
        Arpit, arXiv 2512.11089 (the criterion); Fang et al., CVPR 2023 (torch-pruning).
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self._by_channel = _share_scores(scores)
        self._whole = {group.members[0].axis for group in scores.groups}

    @torch.no_grad()
    def __call__(self, group: tp.dependency.Group) -> Tensor | None:  # type: ignore[override]
        """One score per index of the group's root, in the order of these indices.

        Args:
            group: What torch-pruning asks about.

        Returns:
            ``[len(idxs)]`` float64 on the CPU, or None where the group must stay.

        Raises:
            ArgumentError: The widths of the model do not fit the scores.
        """
        graph: tp.DependencyGraph = group._DG  # type: ignore[assignment]
        dependency, indices = group[0]
        modules = {name: module for module, name in graph._module2name.items()}
        for axis, table in self._by_channel.items():
            name, side, _ = axis
            module = modules.get(name)
            pruner = None if module is None else graph.get_pruner_of_module(module)
            if pruner is None:
                raise ArgumentError(f"There are scores for {name}, which this model does not have: score this model.")
            width = pruner.get_out_channels(module) if side == "out" else pruner.get_in_channels(module)
            # Consumers may be wider than what is scored (part of a concatenation stays); what names a group may not.
            if width is not None and (width < len(table) or (axis in self._whole and width != len(table))):
                raise ArgumentError(
                    f"{name}: there are scores for {len(table)} channels (side '{side}'), but the module has {width}. "
                    "The model was pruned since, or is another one: score again."
                )
        side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        known = self._by_channel.get((graph._module2name.get(dependency.target.module, ""), side, 0))
        if known is None:
            return None
        index = torch.as_tensor(indices, dtype=torch.long)
        stays = known.new_full((max(0, int(index.max()) + 1 - len(known)),), torch.inf)
        return torch.cat([known, stays])[index]


def layer_norm_pruner(model: nn.Module) -> dict[type[nn.Module], tp.pruner.function.BasePruningFunc]:
    """What to pass as ``customized_pruners``: a pruner of LayerNorm that keeps the order, for each class in the model.

    torch-pruning's own collects the indices that stay in a set and does not sort them.

    Args:
        model: The model to be pruned; its LayerNorms and their subclasses are looked up.

    Example:
        >>> [cls.__name__ for cls in layer_norm_pruner(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))]
        ['LayerNorm']
    """
    classes = {type(module): None for module in model.modules() if isinstance(module, nn.LayerNorm)}
    return {cls: _LayerNormPruner() for cls in classes}


class _LayerNormPruner(tp.pruner.function.BasePruningFunc):
    """Prunes the last dimension of a LayerNorm; what stays keeps its order."""

    TARGET_MODULES = nn.LayerNorm

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        kept = [c for c in range(layer.normalized_shape[-1]) if c not in gone]
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), kept, -1))
        layer.normalized_shape = (*layer.normalized_shape[:-1], len(kept))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.normalized_shape[-1]

    get_in_channels = get_out_channels


def _share_scores(scores: Scores) -> dict[Axis, Tensor]:
    """Axis -> ``[c]`` each channel's share of its unit's score; infinite where a channel belongs to no unit."""
    tables: dict[Axis, Tensor] = {}
    for group in scores.groups:
        for member in group.members:
            if member.axis[1] not in ("in", "out"):
                continue
            known = tables.get(member.axis, torch.empty(0, dtype=torch.float64))
            missing = max(0, int(member.channel.max()) + 1 - len(known))
            table = torch.cat([known, known.new_full((missing,), torch.inf)])
            table[member.channel] = (scores[group.name][member.unit] * group.size / len(member.channel)).double()
            tables[member.axis] = table
    return tables
