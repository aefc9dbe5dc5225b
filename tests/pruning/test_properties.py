"""What must hold for every net, tried on random ones: few in the normal suite, many of them where it is slow."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, reject, settings
from hypothesis import strategies as st
from random_nets import RECIPES, Recipe
from single import products
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import jbrprune
from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint.checkpoint import save
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import BudgetError, DataError, UnsupportedModelError
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.slicing import masked_units, remove_units
from jbrprune.structure.verification import verify_groups

TOLERANCE = 1e-10
"""In float64, relative to the largest logit, or to the largest score of a group."""
Untouched = Callable[[nn.Module], AbstractContextManager[None]]
OBJECTIVES = ("pseudo_label", "predicted_logit", "margin")
FEW, MANY = 10, 500
few_and_many = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def on_nets(examples: int, check: Callable[..., None], **drawn: st.SearchStrategy) -> None:
    """Run a check on so many random nets, always the same ones."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples,
        phases=[Phase.generate],  # the nets are small as they are; shrinking takes minutes
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=slow,
    )
    chosen(given(recipe=RECIPES, **drawn)(check))()


@pytest.fixture
def untouched(fingerprint: Callable[[nn.Module], dict[str, Any]]) -> Untouched:
    """See that a model, as a user may have left it, is the same before and after."""

    @contextmanager
    def watched(model: nn.Module) -> Iterator[None]:
        parameters = list(model.parameters())
        parameters[0].grad = torch.ones_like(parameters[0])
        parameters[-1].requires_grad_(False)
        handle = model.register_forward_hook(lambda module, args, output: None)
        before = fingerprint(model)
        yield
        assert fingerprint(model) == before
        handle.remove()

    return watched


def alive(recipe: Recipe) -> nn.Module:
    """The net, unless all of its ReLUs are dead: then it gives the same logits for every image."""
    model = recipe.build()
    with torch.no_grad():
        assume(float(model(recipe.images(4)).std(0).max()) > 1e-6)
    return model


def units(recipe: Recipe, model: nn.Module) -> tuple[Group, ...]:
    """The removable units; nothing that the graph offers may fail the trial but where it is known to be wrong."""
    images = recipe.images(2)
    found = find_groups(model, images)
    try:
        passed = verify_groups(model, images, found)
    except UnsupportedModelError:
        assert not recipe.followed
        reject()
    assert passed.skipped == found.skipped or not recipe.followed
    return passed.groups


def some(groups: Sequence[Group], keep: float, seed: int) -> Selection:
    """Random units to remove; at most the share ``keep`` stays, and one unit."""
    generator = torch.Generator().manual_seed(seed)
    stay = {group.name: max(1, int(keep * group.size)) for group in groups}
    return {g.name: torch.randperm(g.size, generator=generator)[stay[g.name] :].sort().values for g in groups}


# --- mask equals removal --------------------------------------------------------------------------


@contextmanager
def unread(model: nn.Module, groups: Sequence[Group], selection: Selection) -> Iterator[None]:
    """The slow twin of a mask: whoever reads a unit that is gone reads zeros."""
    with ExitStack() as hooks:
        for group in groups:
            for member in group.side("in"):
                gone = member.channel[torch.isin(member.unit, selection[group.name])]
                module = model.get_submodule(member.axis[0])
                dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1

                def zeroed(module: nn.Module, args: tuple, gone: Tensor = gone, dim: int = dim) -> tuple:
                    return (args[0].index_fill(dim, gone, 0),)

                hooks.callback(module.register_forward_pre_hook(zeroed).remove)
        yield


def as_said(model: nn.Module, groups: Sequence[Group]) -> bool:
    """Whether every layer is as wide as the groups that are left say."""
    for group in groups:
        for name, side, _ in {member.axis for member in group.members}:
            weight = getattr(model.get_submodule(name), "weight", None)
            if side == "out" and weight is not None and weight.dim() > 1 and group.members[0].axis[0] == name:
                said = sum(len(member.channel) for member in group.members if member.axis == (name, "out", 0))
                if len(weight) != said:
                    return False
    return True


@few_and_many
def test_masked_and_smaller_models_agree(examples: int, untouched: Untouched) -> None:
    @torch.no_grad()
    def check(recipe: Recipe, keep: float, seed: int) -> None:
        model, images = alive(recipe), recipe.images(3)
        groups = units(recipe, model)
        selection = some(groups, keep, seed)
        event(f"{recipe.family}: {'some' if selection else 'nothing'} removed")
        smaller = copy.deepcopy(model)
        left = remove_units(smaller, groups, selection)
        assert [group.size for group in left] == [group.size - len(selection[group.name]) for group in groups]
        assert as_said(smaller, left)
        with untouched(model):
            with masked_units(model, groups, selection):
                masked = model(images)
            with unread(model, groups, selection):
                expected = model(images)
        for found in (masked, smaller(images)):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))

    on_nets(examples, check, keep=st.floats(0, 0.3), seed=st.integers(0, 99))


# --- budgets --------------------------------------------------------------------------------------


def macs_of(model: nn.Module, images: Tensor) -> int:
    """By torch's counter alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images[:1])
    return counter.get_total_flops() // 2


def with_one_more(recipe: Recipe, model: nn.Module, images: Tensor, removed: dict[str, list[int]]) -> list[int]:
    """MACs of the pruned model with one of its lost units back, for each group that lost any."""
    groups = units(recipe, model)
    costs = []
    for name in removed:
        selection = {g.name: torch.tensor(removed.get(g.name, [])[g.name == name :], dtype=torch.int64) for g in groups}
        larger = copy.deepcopy(model)
        remove_units(larger, groups, selection)
        costs.append(macs_of(larger, images))
    return costs


QUICK: dict[str, Any] = {"repair": None, "progress": False, "floors": Floors(channels=1)}


@few_and_many
def test_budgets_are_met_and_overshot_by_less_than_one_unit_or_refused(examples: int, untouched: Untouched) -> None:
    """What is refused is possible at the share that the error names."""

    def check(recipe: Recipe, share: float, steps: int) -> None:
        model, images = alive(recipe), recipe.images(12)
        units(recipe, model)
        whole = macs_of(model, images)
        with untouched(model):
            try:
                result = jbrprune.prune(model, images, macs=share, steps=steps, structure="channels", **QUICK)
            except DataError as error:  # the last step left nothing that depends on the images
                if "Every score is zero" not in str(error):
                    raise
                event("dead")
                reject()
            except BudgetError as error:
                event("refused")
                (least,) = re.findall(r"Ask for at least ([\d.]+),", str(error))
                assert float(least) > share
                share = float(least)
                result = jbrprune.prune(model, images, macs=share, steps=steps, structure="channels", **QUICK)
            else:
                event("met")
        assert not result.report.notes or "overshot" not in " ".join(result.report.notes)
        macs = macs_of(result.model, images)
        assert result.report.pruned.macs == macs
        assert macs <= share * whole * (1 + 1e-9)
        assert max(with_one_more(recipe, model, images, result.report.removed)) > share * whole

    on_nets(examples, check, share=st.floats(0.05, 0.95), steps=st.integers(1, 3))


# --- scores ---------------------------------------------------------------------------------------


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float) -> None:
    """Relative to the largest score of the group; one that is zero but for rounding must stay so."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = TOLERANCE * (float(value.max()) + 1e-14 * scale)
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@few_and_many
def test_scores_are_those_of_a_slow_twin_and_do_not_depend_on_how_the_images_come(
    examples: int, untouched: Untouched
) -> None:
    def check(recipe: Recipe, objective: str, site: str, batch_size: int, seed: int) -> None:
        model, images = alive(recipe), recipe.images(5)
        groups = units(recipe, model)
        event(f"{recipe.family}, {site}")

        def scored(data: object, size: int = 5) -> Scores:
            return Relevance(objective, site)(model, data, groups, batch_size=size)  # type: ignore[arg-type]

        with torch.no_grad():
            m = reference.directions(objective, model(images))
        by_output = reference.outputs_by_unit(copy.deepcopy(model), images, groups, site)
        expected = {name: torch.einsum("nku,nk->nu", v, m).square().mean(0) for name, v in by_output.items()}
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        cut = 1 + seed % 4
        with untouched(model):
            found = {
                "whole": scored(images),
                "smaller batches": scored(images, batch_size),
                "another order": scored(images[order]),
                "uneven batches": scored([Batch(images[:cut]), Batch(images[cut:])]),
                "shards": scored(images[order[:cut]]) + scored(images[order[cut:]]),
            }
        scale = max(float(value.max()) for value in expected.values())
        for scores in found.values():
            assert scores.samples == 5
            assert_close(scores.values(), expected, scale)

    on_nets(
        examples,
        check,
        objective=st.sampled_from(OBJECTIVES),
        site=st.sampled_from(["consumer", "all"]),
        batch_size=st.integers(1, 4),
        seed=st.integers(0, 99),
    )


@few_and_many
def test_scores_of_single_weights(examples: int, untouched: Untouched) -> None:
    """Against vmap(grad); in batches, in another order, in shards."""

    def check(recipe: Recipe, objective: str, batch_size: int, seed: int) -> None:
        model, images = alive(recipe), recipe.images(4)
        event(recipe.family)

        def scored(data: object, size: int = 4) -> Any:
            return weight_scores(model, data, Relevance(objective), batch_size=size)

        with untouched(model):
            whole = scored(images)
            order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
            cut = 1 + seed % 3
            shards = scored(images[order[:cut]]) + scored(images[order[cut:]])
            found = [whole, scored(images, batch_size), scored(images[order]), shards]
        with torch.no_grad():
            m = reference.directions(objective, model(images))
        expected = {n: v.square().mean(0) for n, v in products(model, images, m, list(whole.sums)).items()}
        scale = max(float(value.max()) for value in expected.values())
        for scores in found:
            assert_close(scores.values(), expected, scale)

    on_nets(
        examples,
        check,
        objective=st.sampled_from(OBJECTIVES),
        batch_size=st.integers(1, 3),
        seed=st.integers(0, 99),
    )


# --- files ----------------------------------------------------------------------------------------


@few_and_many
def test_what_is_saved_comes_back_to_the_bit(examples: int, untouched: Untouched) -> None:
    """Channels or single weights removed, in either precision; into another net of the same architecture."""

    def check(recipe: Recipe, keep: float, seed: int, weights: bool, dtype: torch.dtype) -> None:
        model, images = alive(recipe).to(dtype), recipe.images(16).to(dtype)
        if weights:
            pruned = jbrprune.sparsify(model, images, sparsity=1 - keep, progress=False).model
        else:
            groups = units(recipe, recipe.build())
            pruned = copy.deepcopy(model)
            remove_units(pruned, groups, some(groups, keep, seed))
        other = replace(recipe, seed=recipe.seed + 1).build().to(dtype)
        with tempfile.TemporaryDirectory() as folder, untouched(pruned), untouched(other):
            save(pruned, Path(folder, "m"))
            loaded = jbrprune.load(Path(folder, "m"), model=other)
        expected, found = pruned.state_dict(), loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        with torch.no_grad():
            assert torch.equal(loaded(images), pruned.eval()(images))

    on_nets(
        examples,
        check,
        keep=st.floats(0.05, 0.5),
        seed=st.integers(0, 99),
        weights=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
