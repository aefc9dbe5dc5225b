"""prune() and sweep() on single weights: exact zeros, masks, the guest, the report, the files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import jbrprune
from baselines import WEIGHT_CRITERIA
from jbrprune import PruneResult, Report, WeightScores, make_permanent, prune, score, sparsify, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Settings
from jbrprune.errors import ArgumentError, BudgetError, DataError, JBRError, NonFiniteError
from jbrprune.evaluation.outputs import LOGITS
from jbrprune.models import timm_models
from jbrprune.pruning import loop
from jbrprune.pruning import weights as weights_module
from jbrprune.sparsity.masks import masks_of, weights_of

CLASSES = 4
QUICK: dict[str, Any] = {"progress": False}
IMAGES = cases.images(40, 32).float()
LABELS = torch.arange(40) % CLASSES


class Own(nn.Module):
    """Two convolutions with batch norms, a transposed one, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16)
        self.a, self.bn1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.up = nn.ConvTranspose2d(24, 8, 2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn1(self.a(x)))
        return self.fc(F.relu(self.up(x)).mean((2, 3)))


def own() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(Own()).float()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(timm.create_model("test_vit", num_classes=CLASSES, img_size=32, depth=2)).float()


def thin(model: nn.Module, **options: Any) -> PruneResult:
    return sparsify(model, options.pop("data", IMAGES), **{**QUICK, **options})


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((cases.effective(slot) == 0).sum()) for name, slot in weights_of(model).items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


# --- zeros and the report --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [own, vit])
@pytest.mark.parametrize("repair", ["auto", None])
@pytest.mark.parametrize(("sparsity", "steps"), [(0.5, 1), (0.813, 3), (0.95, 2)])
def test_the_number_of_zeros_is_exact_and_reported(
    make: Callable[[], nn.Module], repair: str | None, sparsity: float, steps: int
) -> None:
    model = make()
    result = thin(model, sparsity=sparsity, steps=steps, repair=repair)
    report, found = result.report, zeros(result.model)
    sizes = {name: slot.stored.numel() for name, slot in weights_of(model).items()}
    total, gone = sum(sizes.values()), round(sparsity * sum(sizes.values()))
    assert sum(found.values()) == gone
    assert report.sparsity == pytest.approx(gone / total, abs=1e-12)
    assert {f"{row.name}.weight": (row.before, row.before - row.after) for row in report.layers} == {
        name: (sizes[name], found[name]) for name in sizes
    }
    assert report.pruned.params == report.dense.params == report.dense.nonzero
    assert report.pruned.nonzero == report.dense.nonzero - gone  # type: ignore[operator]
    assert report.pruned.packed < report.dense.packed  # type: ignore[operator]
    assert len(report.steps) == steps
    assert report.steps[-1].nonzero == report.pruned.nonzero
    assert report.kept == 1.0


def test_packed_bytes_are_values_and_a_bit_for_each_place() -> None:
    report = thin(own(), sparsity=0.5, scope="layer", floor=0).report
    dense = sum(n * 4 for n in (16, 16, 16, 16, 24, 24, 24, 24, 8, 4)) + 2 * 8  # norms, biases, batches tracked
    rows = [row.before for row in report.layers]
    packed = dense + sum(4 * (n - round(0.5 * n)) + -(-n // 8) for n in rows)
    assert report.pruned.packed == packed
    assert report.dense.packed == report.dense.bytes == dense + 4 * sum(rows)


def test_a_report_is_said_and_kept(tmp_path: Path) -> None:
    report = thin(own(), sparsity=0.9, eval_data=[(IMAGES, LABELS)]).report
    text = str(report)
    assert text.startswith("Own: 90.0 % of 4.69 k weights are zero")
    for words in (
        "parameters that are not masked",
        "without what is masked",
        "sparsity=0.9",
        "criterion=jbr_projection",
    ):
        assert words in text
    assert Report.from_dict(report.to_dict()) == report
    assert list(report.to_frame()["kind"]) == ["weight"] * 4
    figure = report.plot(tmp_path / "plot.png")
    labels = " ".join(f"{axes.get_xlabel()} {axes.get_ylabel()}" for axes in figure.axes)
    assert "weights kept" in labels
    assert "effective parameters kept" in labels
    assert report.repaired is not None
    assert report.repaired.dense_accuracy is not None


def magnitudes(model: nn.Module) -> WeightScores:
    found = WEIGHT_CRITERIA["magnitude"](model, (), list(weights_of(model)))
    return WeightScores(found, 1, 0, Settings("magnitude", "weight", ""))


def test_layers_at_their_floor_are_named() -> None:
    def dull(model: nn.Module, batches: object, *_: object) -> WeightScores:
        made = magnitudes(model)
        return WeightScores({**made.sums, "fc.weight": made.sums["fc.weight"] * 0}, 1, 0, made.settings)

    result = thin(own(), sparsity=0.8, criterion=dull, floor=0.1)
    assert zeros(result.model)["fc.weight"] == 32 - 4
    assert "Only the floor (0.1 of the weights, at least one) is left of a, fc." in result.report.notes
    assert result.report.settings["criterion"] == "dull"


def test_each_layer_by_itself() -> None:
    found = zeros(thin(own(), sparsity=0.4, scope="layer").model)
    assert found == {"stem.weight": round(0.4 * 432), "a.weight": round(0.4 * 3456), "up.weight": 307, "fc.weight": 13}


def test_the_least_relevant_weights_go() -> None:
    model = own()
    scores = score(model, IMAGES[:32], granularity="weight", progress=False)
    result = thin(model, sparsity=0.7, criterion=scores, repair=None, floor=0)
    flat = torch.cat([scores[name].flatten() for name in scores.sums])
    gone = torch.cat([(cases.effective(weights_of(result.model)[name]) == 0).flatten() for name in scores.sums])
    assert flat[gone].max() <= flat[~gone].min()
    assert torch.equal(
        result.model.fc.weight[result.model.fc.weight != 0], model.fc.weight[result.model.fc.weight != 0]
    )


def test_ignored_layers_stay() -> None:
    result = thin(own(), sparsity=0.6, ignore=["stem", "fc"])
    assert zeros(result.model) == {"stem.weight": 0, "fc.weight": 0} | {
        name: n for name, n in zeros(result.model).items() if name in ("a.weight", "up.weight")
    }
    assert [row.name for row in result.report.layers] == ["a", "up"]
    assert sum(zeros(result.model).values()) == round(0.6 * (3456 + 768))


def test_parameters_can_be_ignored_beside_shrink() -> None:
    result = thin(own(), sparsity=0.9, ignore=["fc.weight"], shrink=True)
    assert (result.model.fc.weight != 0).all()


def test_computed_weights_are_refused() -> None:
    model = own()
    nn.utils.parametrizations.weight_norm(model.fc)
    with pytest.raises(JBRError, match=r"fc\.weight \(.*\) is not a plain parameter"):
        thin(model, data=unread(), sparsity=0.5, criterion=WEIGHT_CRITERIA["magnitude"])


def test_a_weight_that_is_known_under_two_names() -> None:
    model = own()
    model.register_parameter("prototype", model.fc.weight)
    assert sum(zeros(thin(model, sparsity=0.5).model).values()) == 2344
    with pytest.raises(JBRError, match=r"fc\.weight and prototype are one shared parameter"):
        thin(model, data=unread(), sparsity=0.5, permanent=False)


# --- patterns --------------------------------------------------------------------------------------------------------


def most_in_a_group(weight: Tensor, dim: int, of: int) -> int:
    grouped = (weight != 0).movedim(dim, -1).unflatten(-1, (-1, of))
    return int(grouped.sum(-1).max())


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("steps", [1, 2])
def test_n_of_every_m(pattern: str, keep: int, of: int, steps: int) -> None:
    result = thin(own(), pattern=pattern, steps=steps)
    model, found = result.model, zeros(result.model)
    assert most_in_a_group(model.a.weight, 1, of) == keep
    assert most_in_a_group(model.up.weight, 0, of) == keep  # the inputs of a transposed convolution come first
    assert most_in_a_group(model.fc.weight, 1, of) == keep
    sizes = {"a.weight": 3456, "up.weight": 768, "fc.weight": 32}
    assert found == {"stem.weight": 0} | {name: size * (of - keep) // of for name, size in sizes.items()}
    skipped = [note for note in result.report.notes if note.startswith(f"Not pruned, because {pattern} does not div")]
    assert len(skipped) == 1
    assert skipped[0].endswith("stem.")
    assert result.report.budget == {"pattern": pattern}


def test_a_pattern_that_fits_nowhere() -> None:
    with pytest.raises(BudgetError, match="No weight has a number of inputs that 7 divides"):
        thin(own(), pattern="1:7", data=unread())


# --- masks -----------------------------------------------------------------------------------------------------------


def test_masks_in_place_hold_the_values_from_before() -> None:
    model = own()
    permanent = thin(model, sparsity=0.8)
    masked = thin(model, sparsity=0.8, permanent=False)
    assert torch_prune.is_pruned(masked.model)
    assert torch.equal(logits(masked.model), logits(permanent.model))
    for name, slot in weights_of(masked.model).items():
        original = cases.effective(weights_of(model)[name])
        assert slot.mask is not None
        assert torch.equal(slot.stored[slot.mask == 0], original[slot.mask == 0])
        assert not (original[slot.mask == 0] == 0).any()
    assert not torch_prune.is_pruned(model)


def premasked() -> nn.Module:
    model = own()
    torch_prune.l1_unstructured(model.a, "weight", 0.5)
    torch_prune.l1_unstructured(model.fc, "bias", 1)
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_a_masked_model_is_pruned_further(inplace: bool) -> None:
    model = premasked()
    logits(model)
    before, original = masks_of(model), model.a.weight_orig.detach().clone()
    result = thin(model, sparsity=0.7, permanent=False, inplace=inplace)
    assert (result.model is model) == inplace
    after = masks_of(result.model)
    assert not (after["a.weight"] & ~before["a.weight"]).any()
    assert torch.equal(after["fc.bias"], before["fc.bias"])
    gone = ~after["a.weight"]
    assert torch.equal(result.model.a.weight_orig[gone], original[gone])  # also where it was masked before
    assert sum(zeros(result.model).values()) == round(0.7 * 4688)
    assert result.report.dense.nonzero == result.report.dense.params - 1728 - 1
    assert type(next(iter(result.model.a._forward_pre_hooks.values()))) is not torch_prune.PruningContainer


def test_in_place_and_permanent() -> None:
    model, expected = premasked().train(), thin(premasked(), sparsity=0.7)
    result = thin(model, sparsity=0.7, inplace=True)
    assert result.model is model
    assert model.training
    assert not torch_prune.is_pruned(model)
    assert torch.equal(logits(model), logits(expected.model))


def test_a_masked_model_can_be_copied_after_make_permanent() -> None:
    model = thin(own(), sparsity=0.5, permanent=False).model.train()
    model(IMAGES)  # leaves weights with a graph
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(make_permanent(model))), expected)


def test_a_shared_weight_is_pruned_once_for_all() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, CLASSES)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.two(F.relu(self.one(x[:, :, :4, :4].flatten(1))))))

    for permanent in (True, False):
        model = thin(Tied(), sparsity=0.5, permanent=permanent).model
        assert model.one._parameters.keys() == model.two._parameters.keys()
        assert torch.equal(model.one.weight, model.two.weight)
        assert int((model.one.weight == 0).sum()) + int((model.fc.weight == 0).sum()) == (48 * 48 + 48 * CLASSES) // 2


# --- the guest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [own, premasked])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Module], fingerprint: Callable[[nn.Module], dict]) -> None:
    model = make().train()
    model(IMAGES)
    before = fingerprint(model)
    thin(model, sparsity=0.7, steps=2, shrink=True)
    thin(model, pattern="2:4", permanent=False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "where", ["repair_and_evaluate", "check_scores", "repair_model", "record_targets", "agreement_on", "hand_over"]
)
def test_an_exception_in_the_middle(
    where: str, inplace: bool, monkeypatch: pytest.MonkeyPatch, fingerprint: Callable[[nn.Module], dict]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt("no")

    model = premasked()
    before = fingerprint(model)
    monkeypatch.setattr(weights_module if where == "check_scores" else loop, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        thin(model, sparsity=0.7, inplace=inplace)
    assert fingerprint(model) == before


def test_under_inference_mode() -> None:
    given = own()
    expected = logits(thin(given, sparsity=0.7).model)
    with torch.inference_mode():
        model = thin(given, sparsity=0.7).model
    assert torch.equal(logits(model), expected)


# --- criteria, steps, sweeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHT_CRITERIA)
def test_other_criteria(name: str) -> None:
    result = thin(own(), sparsity=0.7, criterion=WEIGHT_CRITERIA[name], data=[(IMAGES, LABELS)])
    assert sum(zeros(result.model).values()) == round(0.7 * 4688)


def test_magnitude_is_what_pytorch_prunes() -> None:
    model, other = own(), own()
    result = thin(model, sparsity=0.7, criterion=WEIGHT_CRITERIA["magnitude"], repair=None, floor=0)
    pairs = [(slot.module, "weight") for slot in weights_of(other).values()]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.7)
    assert torch.equal(logits(result.model), logits(other))


def test_every_step_scores_the_model_as_it_is() -> None:
    seen = []

    def watching(model: nn.Module, batches: object, names: Sequence[str]) -> dict[str, Tensor]:
        seen.append((list(names), sum(zeros(model).values())))
        return {name: model.get_parameter(name).detach().abs() for name in names}

    thin(own(), sparsity=0.9, steps=2, criterion=watching, ignore=["fc"])
    names = ["stem.weight", "a.weight", "up.weight"]
    assert seen == [(names, 0), (names, round((1 - 0.1**0.5) * 4656))]


def test_every_step_draws_its_own_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seeds = weights_module.weight_scores, []
    monkeypatch.setattr(
        weights_module, "weight_scores", lambda *a, **k: (seeds.append(a[2].seed), original(*a, **k))[1]
    )
    thin(own(), sparsity=0.9, steps=2, seed=5)
    assert seeds == [6, 7]


def test_a_sweep_is_nested() -> None:
    results = sweep(own(), IMAGES, [0.9, 0.5], budget="sparsity", **QUICK)
    assert [sum(zeros(r.model).values()) for r in results] == [2344, round(0.9 * 4688)]
    for one, other in zip(*(weights_of(r.model).values() for r in results), strict=True):
        assert not ((cases.effective(one) == 0) & (cases.effective(other) != 0)).any()
    assert [r.report.budget for r in results] == [{"sparsity": 0.5}, {"sparsity": 0.9}]


def test_scores_made_before_for_channels() -> None:
    model = own()
    scores = score(model, IMAGES[:32], progress=False)
    result = prune(model, IMAGES, macs=0.7, criterion=scores, repair=None, floors=Floors(channels=1), **QUICK)
    same = prune(
        model,
        IMAGES,
        macs=0.7,
        criterion=lambda *_, **__: scores,
        steps=1,
        repair=None,
        floors=Floors(channels=1),
        **QUICK,
    )
    assert torch.equal(logits(result.model), logits(same.model))
    assert result.report.kept <= 0.7
    weights = score(model, IMAGES[:32], granularity="weight", progress=False)
    for criterion in (weights, lambda *_, **__: weights):
        with pytest.raises(ArgumentError, match=r"of something else than units|needs scores of shape"):
            prune(model, IMAGES, macs=0.7, criterion=criterion, **QUICK)
    with pytest.raises(ArgumentError, match="Scores made before hold for one step"):
        prune(model, IMAGES, macs=0.7, criterion=scores, steps=2, **QUICK)
    other = score(vit(), IMAGES[:4], progress=False)
    with pytest.raises(ArgumentError, match=r"needs scores of shape .*, got none: they are of another model"):
        prune(model, unread(), macs=0.7, criterion=other, **QUICK)


# --- smaller shapes and files ----------------------------------------------------------------------------------------


def test_dead_channels_are_removed_and_the_outputs_stay() -> None:
    def half(model: nn.Module, batches: object, *_: object) -> WeightScores:
        """The last half of the stem's filters is worth nothing."""
        made = magnitudes(model)
        made.sums["a.weight"][:, 8:] = 0
        made.sums["stem.weight"][8:] = 0
        return made

    share = (8 * 27 + 24 * 8 * 9) / 4688
    plain = thin(own(), sparsity=share, criterion=half, repair=None)
    small = thin(own(), sparsity=share, criterion=half, repair=None, shrink=True, permanent=False)
    assert small.model.stem.weight.shape == (8, 3, 3, 3)
    torch.testing.assert_close(logits(small.model), logits(plain.model), rtol=1e-5, atol=1e-6)
    assert small.report.pruned.params == plain.report.pruned.params - 8 * 27 - 24 * 8 * 9 - 16
    assert small.report.pruned.nonzero == plain.report.pruned.nonzero - 16  # type: ignore[operator]
    assert small.report.pruned.macs < plain.report.pruned.macs
    assert "8 channels that contributed nothing were removed from 1 groups" in small.report.notes[1]


@pytest.mark.parametrize("options", [{}, {"permanent": False}, {"shrink": True}, {"shrink": True, "permanent": False}])
@pytest.mark.parametrize("make", [own, vit])
def test_files_hold_sparse_models(make: Callable[[], nn.Module], options: dict[str, bool], tmp_path: Path) -> None:
    model = make()
    result = thin(model, sparsity=0.9, **options)
    result.save(tmp_path / "sparse")
    dense = None if timm_models.recipe(result.model) else make()
    loaded = jbrprune.load(tmp_path / "sparse", model=dense)
    assert torch.equal(logits(loaded), logits(result.model))
    assert masks_of(loaded).keys() == masks_of(result.model).keys()
    assert torch_prune.is_pruned(loaded) == ("permanent" in options)
    size = (tmp_path / "sparse" / "model.safetensors").stat().st_size
    assert size < result.report.pruned.packed * 1.02 + 20_000  # type: ignore[operator]
    assert size < 0.45 * result.report.dense.bytes + 20_000


# --- bad input -------------------------------------------------------------------------------------------------------


def unread() -> object:
    """Images of which only the first batch may be looked at."""

    def batches() -> Any:
        yield IMAGES[:4]
        raise AssertionError("the images were read")

    return batches()


def nan(model: nn.Module, batches: object, *_: object) -> WeightScores:
    made = magnitudes(model)
    made.sums["fc.weight"][0, 0] = torch.nan
    return made


def of_another_model() -> WeightScores:
    return magnitudes(vit())


REFUSED: dict[str, tuple[dict[str, Any], type[JBRError], str]] = {
    "sparsity of everything": ({"sparsity": 1.0}, BudgetError, "sparsity must satisfy 0 < sparsity < 1, got 1.0"),
    "negative sparsity": ({"sparsity": -0.1}, BudgetError, "got -0.1"),
    "sparsity as a flag": ({"sparsity": True}, BudgetError, "got True"),
    "sparsity in words": ({"sparsity": "much"}, BudgetError, "got 'much'"),
    "sparsity beyond the floor": (
        {"sparsity": 0.9, "floor": 0.2},
        BudgetError,
        r"sparsity=0.9 cannot be reached: with floor=0.2 .* 940 of 4,688 weights of 4 parameters stay",
    ),
    "no goal": ({}, BudgetError, "either sparsity= or pattern=, got neither"),
    "two goals": ({"pattern": "2:4", "sparsity": 0.5}, BudgetError, "got both"),
    "no pattern": ({"pattern": "4:2"}, ArgumentError, "with 0 < N < M such as '2:4', got '4:2'"),
    "scope": ({"sparsity": 0.5, "scope": "net"}, ArgumentError, "scope must be one of global, layer, got 'net'"),
    "floor": ({"sparsity": 0.5, "floor": 1.0}, ArgumentError, "0 <= floor < 1, got 1.0"),
    "steps": ({"sparsity": 0.5, "steps": 0}, ArgumentError, "steps must be a whole number of at least 1, got 0"),
    "statistic": (
        {"sparsity": 0.5, "criterion": "jbr_mean_replaced"},
        ArgumentError,
        "'mean_replaced' is not defined for weights",
    ),
    "shrink and pattern": ({"pattern": "2:4", "shrink": True}, ArgumentError, "end the 2:4 pattern"),
    "glob": ({"sparsity": 0.5, "ignore": ["layer9"]}, ArgumentError, "'layer9' matches no module and no parameter"),
    "criterion": (
        {"sparsity": 0.5, "criterion": 3},
        ArgumentError,
        "the name of a preset, a function or scores, got 3",
    ),
    "scores of units": (
        {"sparsity": 0.5, "criterion": score(own(), IMAGES[:4], progress=False)},
        ArgumentError,
        "of something else than weights",
    ),
    "another model": (
        {"sparsity": 0.5, "criterion": of_another_model()},
        ArgumentError,
        r"stem.weight needs scores of shape \(16, 3, 3, 3\), got (none|\()",
    ),
    "everything ignored": ({"sparsity": 0.5, "ignore": ["*"]}, JBRError, "no convolution or linear layer left"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_images_are_read(case: str, fingerprint: Callable[[nn.Module], dict]) -> None:
    options, error, message = REFUSED[case]
    model = own()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        thin(model, data=unread(), **options)
    assert fingerprint(model) == before


def test_reached_already() -> None:
    with pytest.raises(BudgetError, match=r"sparsity=0.2 is reached already: 1,728 of 4,688 weights"):
        thin(premasked(), sparsity=0.2, data=unread())


def test_scores_that_cannot_be_ranked() -> None:
    with pytest.raises(NonFiniteError, match=r"The scores of fc\.weight contain NaN or Inf"):
        thin(own(), sparsity=0.5, criterion=nan)
    with pytest.raises(ArgumentError, match="criterion gave Tensor, not a mapping"):
        thin(own(), sparsity=0.5, criterion=lambda *_, **__: IMAGES)
    units = score(own(), IMAGES[:4], progress=False)
    with pytest.raises(ArgumentError, match=r"stem.weight needs scores of shape .*, got none"):
        thin(own(), sparsity=0.5, criterion=lambda *_, **__: units)


def test_labels_are_asked_for() -> None:
    with pytest.raises(DataError, match="label"):
        thin(own(), sparsity=0.5, criterion=WEIGHT_CRITERIA["snip"])


def test_channels_are_scored_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new arguments change nothing for channels."""
    seen: list[Relevance] = []
    original = Relevance.__call__
    monkeypatch.setattr(Relevance, "__call__", lambda *a, **k: (seen.append(a[0]), original(*a, **k))[1])
    prune(own(), IMAGES, macs=0.8, steps=1, **QUICK)
    assert replace(seen[0], output=LOGITS) == Relevance(None, "consumer", "second_moment", 128, 0.0, seed=1)
    assert seen[0].output.objective == "pseudo_label"


# --- adapters --------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A frozen linear layer and two low-rank matrices, as modules by name, which is peft's form."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merge(self) -> nn.Linear:
        with torch.no_grad():
            self.base_layer.weight += self.lora_B["default"].weight @ self.lora_A["default"].weight  # type: ignore[operator]
        return self.base_layer


class Inherited(nn.Linear):
    """The matrices are parameters of a linear layer's own, which is loralib's form."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Beside(nn.Module):
    """A convolution with one below and one above it, which is the form of diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lora_down, self.lora_up = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 2, 3), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.lora_up(self.lora_down(x))


def adapted(kind: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    stem, pool = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if kind == "beside":
        return nn.Sequential(Beside(), pool, nn.Linear(8, CLASSES)), "0.conv.weight"
    layer = Adapter(nn.Linear(8, CLASSES)) if kind == "adapter" else Inherited(8, CLASSES)
    return nn.Sequential(stem, pool, layer), "2.base_layer.weight" if kind == "adapter" else "2.weight"


@pytest.mark.parametrize("kind", ["adapter", "inherited", "beside"])
def test_zeros_beside_an_adapter_are_warned_of(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, name = adapted(kind)
    result = sparsify(model, IMAGES, sparsity=0.5, **QUICK)
    said = f"{name} (and 0 more) has an adapter (LoRA) beside it"
    assert caplog.text.count(said) == 1
    assert sum(note.startswith(said) for note in result.report.notes) == 1
    assert (result.model.get_parameter(name) == 0).any()
    caplog.clear()
    sparsify(model, IMAGES, sparsity=0.5, ignore=[name], **QUICK)
    assert "adapter" not in caplog.text


def test_a_merged_adapter_is_an_ordinary_layer(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = adapted("adapter")
    outputs = model(IMAGES)
    model[2] = model[2].merge()  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(model(IMAGES), outputs)
    assert not any("adapter" in note for note in sparsify(model, IMAGES, sparsity=0.5, **QUICK).report.notes)
    assert "adapter" not in caplog.text
