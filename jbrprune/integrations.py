"""The seams to other tools: relevance inside of torch-pruning, and 2:4 layers for hardware.

`jbrprune.WeightScores.importance_scores` is the seam to ``torch.nn.utils.prune``. `jbrprune.prune` needs none of these:
it removes explicit units itself.
"""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor, nn

from jbrprune.criteria.scores import Scores
from jbrprune.errors import ArgumentError, ModelError
from jbrprune.models import preserve
from jbrprune.structure.groups import Axis


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Store the 2:4 sparse weights of linear layers as ``torch.sparse.to_sparse_semi_structured`` does, in place.

    The model must be on a CUDA device of compute capability 8.0 or later, in a dtype of its sparse kernels (float16,
    bfloat16). It computes the same, up to rounding, and can no longer be trained or saved: do this last.

    Args:
        model: A plain model, as ``jbrprune.sparsify(..., pattern="2:4")`` gives it; `jbrprune.make_permanent` makes
            one of a masked model.

    Returns:
        Name of a linear layer -> why it stays dense; empty where all were converted.

    Raises:
        ModelError: The device has no such kernels, the model is masked, or no linear layer is 2:4 sparse.

    Source:
        Mishra et al., arXiv 2104.08378.
    """
    preserve.refuse_masked(model)
    device = preserve.device_of(model)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 0):  # Ampere: the first whose tensor cores know 2:4 sparsity
        raise ModelError(
            f"The model is on {device} (compute capability {capability[0]}.{capability[1]}), which has no 2:4 sparse "
            "kernels: that takes a CUDA device of compute capability 8.0 or later. The zeros are in the plain weights "
            "already; move the model there first."
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {name: "its weight is not 2:4 sparse" for name, m in linear.items() if not is_two_to_four(m.weight)}
    if len(left) == len(linear):
        raise ModelError(
            f"None of {len(linear)} linear layers is 2:4 sparse (at most two of every four weights along the inputs). "
            "Prune with pattern='2:4' first; convolutions have no such kernels."
        )
    for name in [name for name in linear if name not in left]:
        try:
            weight = torch.sparse.to_sparse_semi_structured(linear[name].weight.detach())
        except (RuntimeError, ValueError) as error:  # noqa: PERF203 (shapes and dtypes that the kernels do not know)
            left[name] = str(error).splitlines()[0]
        else:
            linear[name].weight = nn.Parameter(weight, requires_grad=False)
    return left


def is_two_to_four(weight: Tensor) -> bool:
    """Whether of every four weights along the inputs at most two are not zero.

    Args:
        weight: ``[outputs, inputs]``.

    Example:
        >>> is_two_to_four(torch.tensor([[0.0, 1.0, 2.0, 0.0]])), is_two_to_four(torch.ones(1, 4))
        (True, False)
    """
    if weight.shape[1] % 4:
        return False
    return bool((weight.detach().unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all())


class JBRImportance(tp.importance.Importance):
    r"""Importance of channel c of a torch-pruning group: s_u / n, u the unit that c belongs to, n its channels there.

    A unit of several channels on the axis that torch-pruning ranks (an attention head, a group of a grouped
    convolution) shares its score among them, so that the sum over its channels is the unit's score;
    torch-pruning ranks heads and groups by the mean. Scores are E[v^2] (unit: squared change of the objective).

    Groups that `jbrprune.structure.discovery.find_groups` or the trial kept (the classifier, for instance) get None:
    `BasePruner` leaves them as they are. Scores are of one model at one time: after a step, score again and set
    `BasePruner.importance` to a new instance, or use `jbrprune.prune`, which does so.

    What torch-pruning 1.6.1 needs to be told, because an importance cannot see it:

    * Its LayerNorm pruner may permute the weights that stay: leave the residual width to `jbrprune.prune`.
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
