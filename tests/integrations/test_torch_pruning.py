"""JBR scores inside an unmodified BasePruner: what it removes is what scores lowest."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import nets
import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from jbrprune.budgets.budget import Floors, select
from jbrprune.budgets.cost import cost_model
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.errors import ArgumentError
from jbrprune.integrations import JBRImportance
from jbrprune.structure.discovery import find_groups

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def numbered(model: nn.Module) -> nn.Module:
    """Every vector of parameters counts its own elements, so that what is left tells what has gone."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.arange(1.0, len(parameter) + 1)
    return model.eval()


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=4, zero_init_last=False).eval()


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=4, num_classes=4
    ).eval()


def scored(model: nn.Module, width: bool = False) -> Scores:
    """Real scores without ties (dead channels score zero); then the model's vectors are numbered."""
    scores = Relevance()(model, IMAGES, find_groups(model, IMAGES, width=width).groups)
    numbered(model)
    return replace(scores, sums={name: total + 1e-12 * torch.rand(len(total)) for name, total in scores.sums.items()})


def pruner(model: nn.Module, importance: JBRImportance, **options: Any) -> tp.pruner.BasePruner:
    fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "channel_groups": {}, "num_heads": {}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")
        return tp.pruner.BasePruner(model, (IMAGES,), importance, **(fresh | options))


def gone(model: nn.Module, scores: Scores) -> dict[str, list[int]]:
    """Group -> units that are gone, read off the numbered norm (or bias) that goes with its name."""
    found = {}
    for group in scores.groups:
        names = [m.axis[0] for m in group.side("out")]
        norms = [n for n in names if isinstance(model.get_submodule(n), nn.BatchNorm2d)]
        module = model.get_submodule(norms[0] if norms else group.name)
        tensor = module.weight if norms else module.bias
        left = {int(value) - 1 for value in tensor.tolist()}
        found[group.name] = sorted(set(range(group.size)) - left)
    return found


def lowest(values: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda c: float(values[c]))[:count])


def test_local_pruning_takes_the_lowest_of_each_group() -> None:
    model = resnet()
    scores = scored(model)
    pruner(model, JBRImportance(scores), pruning_ratio=0.25).step()
    expected = {g.name: lowest(scores[g.name], g.size - int(g.size * 0.75)) for g in scores.groups}
    assert gone(model, scores) == expected
    assert model(IMAGES).shape == (4, 4)


def test_global_pruning_takes_what_our_own_ranking_takes() -> None:
    model = resnet()
    scores = scored(model)
    cost = cost_model("channels", model, IMAGES, scores.groups)
    whole = cost.total
    pruner(model, JBRImportance(scores), pruning_ratio=0.3, global_pruning=True).step()
    taken = gone(model, scores)
    own = select(
        scores.values(),
        scores.groups,
        cost,
        whole - sum(map(len, taken.values())),
        floors=Floors(channels=1),
        scope="raw",
    )
    assert taken == {g.name: own[g.name].tolist() if g.name in own else [] for g in scores.groups}
    everything = torch.cat([scores[g.name] for g in scores.groups]).sort().values
    assert sum(map(len, taken.values())) == len(everything) - int(len(everything) * 0.7)
    assert len({len(units) for units in taken.values()}) > 2


def test_isomorphic_pruning_takes_the_lowest_of_each_group() -> None:
    model = resnet()
    scores = scored(model)
    pruner(model, JBRImportance(scores), pruning_ratio=0.3, global_pruning=True, isomorphic=True).step()
    taken = gone(model, scores)
    assert taken == {g.name: lowest(scores[g.name], len(taken[g.name])) for g in scores.groups}
    assert sum(map(len, taken.values())) > 0


def test_hidden_widths_of_a_vit_while_the_rest_stays() -> None:
    model = vit()
    scores = scored(model)
    pruner(
        model,
        JBRImportance(scores),
        pruning_ratio=0.5,
        num_heads={b.attn.qkv: 4 for b in model.blocks},
        prune_head_dims=False,
    ).step()
    hidden = replace(scores, groups=tuple(g for g in scores.groups if g.kind == "channel"))
    assert gone(model, hidden) == {g.name: lowest(scores[g.name], 96) for g in hidden.groups}
    assert (model.patch_embed.proj.out_channels, model.head.out_features) == (48, 4)
    assert (model.blocks[0].attn.qkv.out_features, model.blocks[0].attn.proj.in_features) == (144, 48)
    assert model(IMAGES).shape == (4, 4)


@pytest.mark.parametrize("everywhere", [False, True])
def test_heads_of_a_vit(everywhere: bool) -> None:
    model = vit()
    scores = scored(model)
    qkv = {block.attn.qkv: 4 for block in model.blocks}
    options = {"num_heads": qkv, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    pruner(model, JBRImportance(scores), pruning_ratio=0.25, global_pruning=everywhere, **options).step()
    heads = torch.stack([scores[f"blocks.{i}.attn"] for i in range(2)])
    threshold = heads.flatten().sort().values[3]
    for i, block in enumerate(model.blocks):
        out = (heads[i] <= threshold).nonzero().flatten().tolist() if everywhere else lowest(heads[i], 2)
        left = [h for h in range(4) if h not in out]
        expected = [float(part * 48 + h * 12 + c + 1) for part in range(3) for h in left for c in range(12)]
        assert block.attn.qkv.bias.tolist() == expected
        block.attn.num_heads = qkv[block.attn.qkv]
        block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
    assert model(IMAGES).shape == (4, 4)


def test_a_unit_of_several_channels_shares_its_score() -> None:
    model = timm.create_model("regnety_002", num_classes=4, zero_init_last=False).eval()
    scores = Relevance()(model, IMAGES, find_groups(model, IMAGES).groups)
    importance = JBRImportance(scores)
    graph = tp.DependencyGraph().build_dependency(model, (IMAGES,), verbose=False)
    (group,) = (g for g in scores.groups if g.name == "s3.b2.conv1.conv")
    root = model.get_submodule(group.name)
    width = root.out_channels
    whole = importance(graph.get_pruning_group(root, tp.prune_conv_out_channels, list(range(width))))
    assert group.kind == "group"
    assert whole is not None
    assert width > group.size
    assert (scores[group.name] > 0).all()
    torch.testing.assert_close(whole.view(group.size, -1).sum(1), scores[group.name])
    assert (whole.view(group.size, -1) == whole[:: width // group.size, None]).all()


def test_the_order_is_that_of_the_indices_asked_for() -> None:
    model = resnet()
    scores = scored(model)
    graph = tp.DependencyGraph().build_dependency(model, (IMAGES,), verbose=False)
    asked = [7, 2, 40]
    group = graph.get_pruning_group(model.layer4[0].conv1, tp.prune_conv_out_channels, asked)
    answer = JBRImportance(scores)(group)
    assert answer is not None
    assert answer.tolist() == scores["layer4.0.conv1"][asked].tolist()
    assert list(group[0].idxs) == asked


def test_what_is_not_scored_gets_none() -> None:
    model = resnet()
    scores = scored(model)
    graph = tp.DependencyGraph().build_dependency(model, (IMAGES,), verbose=False)
    assert JBRImportance(scores)(graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, [0, 1])) is None


def test_channels_that_belong_to_no_unit_are_infinitely_important() -> None:
    model = nets.CASES["dense"].make().eval()
    images = nets.example()
    groups = find_groups(model, images, ignore=["b"]).groups
    scores = Relevance()(model, images, groups)
    graph = tp.DependencyGraph().build_dependency(model, (images,), verbose=False)
    answer = JBRImportance(scores)(graph.get_pruning_group(model.fc, tp.prune_linear_in_channels, list(range(15))))
    assert answer is not None
    assert answer.isinf().tolist() == [True] * 10 + [False] * 5


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_second_step_with_the_same_scores_is_refused(everywhere: bool) -> None:
    model = resnet()
    steps = pruner(model, JBRImportance(scored(model)), pruning_ratio=0.5, iterative_steps=2, global_pruning=everywhere)
    steps.step()
    with pytest.raises(
        ArgumentError, match=r"there are scores for \d+ channels .*, but the module has \d+.*score again"
    ):
        steps.step()
    steps.importance = JBRImportance(Relevance()(model, IMAGES, find_groups(model, IMAGES).groups))
    steps.current_step = 1
    steps.step()
    assert model(IMAGES).shape == (4, 4)


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"There are scores for layer3\.0\.conv1, which this model does not have"):
        pruner(nets.TwoBlocks(), _only(scored(resnet()), "layer3.0.conv1"), pruning_ratio=0.5).step()


@pytest.mark.parametrize(("mine", "theirs"), [(6, 8), (8, 6)])
def test_scores_of_a_wider_or_narrower_model_are_refused(mine: int, theirs: int) -> None:
    one, other = (nets.layered(nn.BatchNorm2d(width), width).eval() for width in (mine, theirs))
    scores = Relevance()(one, IMAGES, find_groups(one, IMAGES).groups)
    with pytest.raises(
        ArgumentError,
        match=rf"scores for {mine} channels .* but the module has {theirs}\. .* is another one: score again",
    ):
        pruner(other, JBRImportance(scores), pruning_ratio=0.5).step()


def _only(scores: Scores, name: str) -> JBRImportance:
    return JBRImportance(replace(scores, groups=tuple(g for g in scores.groups if g.name == name)))
