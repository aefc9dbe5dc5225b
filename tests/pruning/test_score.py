"""score(): the same scores from every form of data and model, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import reference
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as masks
from torch.utils.data import DataLoader, TensorDataset

from jbrprune import Scores, prune, score
from jbrprune.criteria.relevance import Relevance
from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError
from jbrprune.structure.discovery import find_groups

IMAGES = cases.images(12, 32)
LABELS = torch.arange(12) % cases.CLASSES


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cases.randomised(timm.create_model("test_vit", num_classes=cases.CLASSES, img_size=32, depth=1))


def own() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(cases.Concat())


def assert_equal(one: Scores, other: Scores, rtol: float = 1e-9) -> None:
    assert one.values().keys() == other.values().keys()
    for name, values in one.values().items():
        torch.testing.assert_close(values, other[name], rtol=rtol, atol=0)


def test_it_is_the_mean_square_of_the_slow_twin() -> None:
    model, images = own(), cases.images(5)
    scores = score(model, images, criterion="jbr_predicted_logit", progress=False)
    groups = find_groups(model, images).groups
    with torch.no_grad():
        m = reference.directions("predicted_logit", model(images))
    for name, by_output in reference.outputs_by_unit(own(), images, groups, "consumer").items():
        v = (by_output * m[:, :, None]).sum(1)
        torch.testing.assert_close(scores[name], v.square().mean(0), rtol=1e-9, atol=1e-15)


FORMS: dict[str, Callable[[], object]] = {
    "a list of batches": lambda: list(IMAGES.split(5)),
    "images one by one": lambda: list(IMAGES),
    "a generator": lambda: (part for part in IMAGES.split(7)),
    "tuples": lambda: list(zip(IMAGES.split(4), LABELS.split(4), strict=True)),
    "dicts": lambda: [{"image": x} for x in IMAGES.split(4)],
    "a Dataset": lambda: TensorDataset(IMAGES, LABELS),
    "a shuffled DataLoader": lambda: DataLoader(TensorDataset(IMAGES), batch_size=5, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_images_gives_the_same_scores(form: str) -> None:
    assert_equal(score(vit(), FORMS[form](), progress=False), score(vit(), IMAGES, progress=False))


def test_a_generator_is_read_once_and_to_its_end() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for part in IMAGES.split(5):
            read.append(len(part))
            yield part

    assert score(vit(), batches(), progress=False).samples == 12
    assert read == [5, 5, 2]


def test_a_statistic_that_reads_twice_refuses_a_generator() -> None:
    with pytest.raises(DataError, match="twice"):
        score(vit(), iter(IMAGES.split(5)), criterion="jbr_mean_replaced", progress=False)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
@pytest.mark.parametrize("make", [vit, own])
def test_the_model_is_left_as_it_was(
    make: Callable[[], nn.Module], granularity: str, fingerprint: Callable[[nn.Module], dict]
) -> None:
    model = make().train()
    before = fingerprint(model)
    score(model, IMAGES if make is vit else cases.images(4), granularity=granularity, progress=False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context: Callable[[], Any]) -> None:
    expected, model = score(own(), cases.images(4), progress=False), own()
    with context():
        assert_equal(score(model, cases.images(4), progress=False), expected)


def test_ignored_layers_are_left_out() -> None:
    whole, rest = (score(vit(), IMAGES, ignore=ignore, progress=False) for ignore in ((), ("*.mlp",)))
    assert whole.values().keys() - rest.values().keys() == {"blocks.0.mlp.fc1"}
    torch.testing.assert_close(rest["blocks.0.attn"], whole["blocks.0.attn"])
    wide = score(vit(), IMAGES, width=True, progress=False)
    assert any(group.kind == "width" for group in wide.groups)
    assert not any(group.kind == "width" for group in whole.groups)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "margin"},
        {"objective": "projection", "seed": 3},
        {"site": "all"},
        {"statistic": "batched", "batch": 5},
        {"threshold": 0.3},
    ],
    ids=str,
)
def test_arguments_reach_the_pass(options: dict[str, Any]) -> None:
    model = vit()
    expected = Relevance(**options)(model, IMAGES, find_groups(model, IMAGES).groups)
    got = score(model, IMAGES, criterion=Relevance(**options), progress=False)
    assert_equal(got, expected)
    assert (got.settings, got.skipped) == (expected.settings, expected.skipped)


def test_one_image_is_enough() -> None:
    assert score(vit(), IMAGES[:1], progress=False).samples == 1


def test_single_weights_are_scored_as_sparsify_ranks_them() -> None:
    assert score(vit(), IMAGES, granularity="weight", progress=False).settings.objective == "projection"
    assert score(vit(), IMAGES, progress=False).settings.objective == "pseudo_label"


# --- errors, before the pass ---------------------------------------------------------------------


def masked() -> nn.Module:
    model = own()
    masks.l1_unstructured(model.fc, "weight", amount=0.5)  # type: ignore[arg-type]
    return model


def with_nan() -> nn.Module:
    model = own()
    model.mix.weight.data[0, 1] = torch.nan  # type: ignore[union-attr, index]
    return model


SMALL = cases.images(3)
WRONG: dict[str, tuple[Callable[[], Any], object, dict[str, Any], type[Exception], str]] = {
    "no model": (lambda: None, SMALL, {}, ArgumentError, "timm name or an nn.Module, got NoneType"),
    "a class": (lambda: cases.Concat, SMALL, {}, ArgumentError, "timm name or an nn.Module, got type"),
    "a name": (lambda: "resnet5O", SMALL, {}, ArgumentError, "Nearest names: .*resnet50"),
    "criterion": (own, SMALL, {"criterion": "jbr_loss"}, ArgumentError, "Unknown criterion 'jbr_loss'"),
    "function": (own, SMALL, {"criterion": len}, ArgumentError, "must be a preset or a Relevance, got len"),
    "statistic": (own, SMALL, {"criterion": Relevance(statistic="signed")}, ArgumentError, "not defined for units"),
    "granularity": (
        own,
        SMALL,
        {"granularity": "row"},
        ArgumentError,
        "granularity must be one of unit, weight, got",
    ),
    "glob": (own, SMALL, {"ignore": ["nowhere"]}, ArgumentError, "nowhere"),
    "batch size": (own, SMALL, {"batch_size": 0}, ArgumentError, "batch_size must be"),
    "empty": (own, [], {}, DataError, "yielded no batch"),
    "exhausted": (own, iter(()), {}, DataError, "exhausted generator"),
    "size": (own, cases.images(3, 9), {}, DataError, r"Concat does not run on float64 images of shape \(3, 3, 9, 9\)"),
    "precision": (own, SMALL.float(), {}, DataError, "does not run on float32 images"),
    "channels": (vit, torch.zeros(2, 1, 32, 32), {}, DataError, r"does not run on.*made for 3 x 32 x 32"),
    "image": (own, SMALL / 0, {}, NonFiniteError, "image 0 contains NaN or Inf"),
    "masked": (masked, SMALL, {}, ModelError, r"fc.weight \(and 0 more\) is masked by torch.nn.utils.prune"),
    "half": (lambda: own().half(), SMALL.half(), {}, ModelError, r"stem.weight|one.weight is float16.*model.float\(\)"),
    "bfloat16": (lambda: own().bfloat16(), SMALL.bfloat16(), {}, ModelError, "is bfloat16: .*full precision"),
    "weight": (with_nan, SMALL, {}, NonFiniteError, "Parameter 'mix.weight' contains NaN or Inf"),
    "nothing to cut": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double(),
        SMALL,
        {},
        ModelError,
        "nothing can be removed safely",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_come_before_the_pass_and_leave_the_model_as_it_was(
    case: str, fingerprint: Callable[[nn.Module], dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, data, options, error, message = WRONG[case]
    model, passes = make(), []
    monkeypatch.setattr(Relevance, "__call__", lambda *_, **__: passes.append(1))
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        score(model, data, progress=False, **options)
    assert not passes
    assert before is None or fingerprint(model) == before


def test_whole_numbers_as_scores_and_seeds_of_a_relevance() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, 4)
    )
    images = torch.randn(20, 3, 10, 10)

    def widths(criterion: Any) -> list[torch.Tensor]:
        found = prune(model, images, macs=0.5, steps=1, repair=None, progress=False, criterion=criterion)
        return list(found.model.parameters())

    ranked = {g: torch.arange(24) for g in ("0", "2")}
    whole, floating = widths(lambda *_: ranked), widths(lambda *_: {g: v.double() for g, v in ranked.items()})
    assert all(map(torch.equal, whole, floating))
    one, again, other = (widths(Relevance("projection", seed=seed)) for seed in (1, 1, 12345))
    assert all(map(torch.equal, one, again))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True))
