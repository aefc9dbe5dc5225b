"""Bad input to prune() and load(): a sentence that helps, before the expensive pass, and nothing broken."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import timm.models._builder
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as masks

import jbrprune
from jbrprune import create, prune, sparsify
from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint import checkpoint
from jbrprune.criteria.relevance import Relevance
from jbrprune.errors import (
    ArgumentError,
    BudgetError,
    CheckpointError,
    DataError,
    JBRError,
    ModelError,
    NonFiniteError,
    UnsupportedModelError,
)
from jbrprune.pruning import weights

IMAGES = cases.images(12, 32).float()
QUICK: dict[str, Any] = {"progress": False, "steps": 1}
Fingerprint = Callable[[nn.Module], dict]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every expensive pass."""
    count: list[int] = []
    original = Relevance.__call__
    monkeypatch.setattr(Relevance, "__call__", lambda *a, **k: (count.append(1), original(*a, **k))[1])
    return count


class Net(nn.Module):
    """Two convolutions and a classifier; ``spoil`` says how its forward goes wrong."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12)
        self.neck = nn.Conv2d(12, 16, 3, stride=2)
        self.act, self.fc = Spoiled(spoil), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.neck(F.relu(self.bn(self.stem(x))))).mean((2, 3)))


class Spoiled(nn.Module):
    def __init__(self, spoil: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.spoil is None else self.spoil(x)


def net(spoil: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(Net(spoil)).float().train()


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=4, img_size=32, depth=1)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


def raising(x: Tensor) -> Tensor:
    raise LookupError("no such row")


def masked() -> nn.Module:
    model = net()
    masks.l1_unstructured(model.neck, "weight", amount=0.5)  # type: ignore[arg-type]
    masks.random_unstructured(model.fc, "bias", amount=1)  # type: ignore[arg-type]
    return model


def with_nan(name: str, value: float = math.nan) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net()
        model.state_dict()[name].view(-1)[3] = value
        return model

    return make


def broken_after(number: int) -> Iterator[Tensor]:
    yield from IMAGES.split(4)[:number]
    raise OSError("the disk is gone")


def images_with(value: float) -> list[Tensor]:
    batches = list(IMAGES.clone().split(4))
    batches[1][2, 0, 5, 5] = value
    return batches


WRONG: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], type[Exception], str]] = {
    # models
    "unknown name": (
        lambda: "resnet5O",
        IMAGES,
        {},
        ArgumentError,
        "no model named 'resnet5O'.*Nearest names: .*resnet50",
    ),
    "unknown tag": (
        lambda: "resnet50.mine",
        IMAGES,
        {},
        ArgumentError,
        "resnet50 has no weights tagged 'mine'. Tags: .*a1_in1k",
    ),
    "no name": (lambda: 50, IMAGES, {}, ArgumentError, "must be a timm name or an nn.Module, got int"),
    "masked": (masked, IMAGES, {}, ModelError, r"neck.weight \(and 1 more\) is masked.*prune.remove\(module, name\)"),
    "half": (lambda: net().half(), IMAGES.half(), {}, ModelError, r"stem.weight is float16: .* Call model.float\(\)"),
    "bfloat16": (lambda: net().bfloat16(), IMAGES, {}, ModelError, "stem.weight is bfloat16"),
    "half in part": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 4).half()),
        IMAGES,
        {},
        ModelError,
        "1.weight is float16",
    ),
    "NaN in a weight": (
        with_nan("neck.weight"),
        IMAGES,
        {},
        NonFiniteError,
        "Parameter 'neck.weight' contains NaN or Inf",
    ),
    "Inf in a buffer": (
        with_nan("bn.running_var", math.inf),
        IMAGES,
        {},
        NonFiniteError,
        "Buffer 'bn.running_var' contains NaN",
    ),
    "NaN in the logits": (
        lambda: net(lambda x: (x - 1e9).log()),
        IMAGES,
        {},
        NonFiniteError,
        r"Batch 0: the logits contain NaN or Inf. Images and weights are finite; .* module 'act' \(Spoiled\)",
    ),
    "forward raises": (
        lambda: net(raising),
        IMAGES,
        {},
        DataError,
        r"Net does not run on float32 images of shape \(12, 3, 32, 32\): no such row\.$",
    ),
    "no logits": (
        lambda: nn.Conv2d(3, 4, 1),
        IMAGES,
        {"output": "logits"},
        ModelError,
        r"returned float32 \[1, 4, 32, 32\]; 'logits' is none of them\. output= says what counts",
    ),
    "nothing to cut": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)),
        IMAGES,
        {},
        UnsupportedModelError,
        "nothing can be removed safely.*1: ",
    ),
    # budgets
    "no budget": (
        net,
        IMAGES,
        {"macs": None},
        BudgetError,
        "exactly one of macs=, params=, channels=.*got none",
    ),
    "two budgets": (net, IMAGES, {"params": 0.5}, BudgetError, "exactly one of.*got macs= and params="),
    **{
        f"budget {value!r}": (
            net,
            IMAGES,
            {"macs": value},
            BudgetError,
            "macs must satisfy 0 < macs < 1, got",
        )
        for value in (0, 1, -0.5, math.nan, math.inf, "half", True)
    },
    "floors": (
        net,
        IMAGES,
        {"macs": 0.3, "floors": Floors(channels=10)},
        BudgetError,
        r"macs=0.3 cannot be reached: with every group at its floor 0\.\d+ of .*at least 0\.\d+, lower floors=",
    ),
    "ignored": (vit, IMAGES, {"ignore": ["*.mlp"]}, BudgetError, "macs=0.5 cannot be reached: .*change structure="),
    "all ignored": (net, IMAGES, {"ignore": ["*"]}, UnsupportedModelError, "Why layers are kept: .*ignored on request"),
    "glob": (net, IMAGES, {"ignore": ["layer9.*"]}, ArgumentError, "layer9"),
    # other arguments
    "steps": (net, IMAGES, {"steps": 0}, ArgumentError, "steps must be a whole number of at least 1, got 0"),
    "repair": (
        net,
        IMAGES,
        {"repair": "batchnorm"},
        ArgumentError,
        "repair must be 'auto', None, or some of batch_norm.*'batchnorm'",
    ),
    "repairs": (net, IMAGES, {"repair": ["auto", "batch_norm"]}, ArgumentError, "repair must be 'auto', None, or"),
    "repair in a list in a list": (
        net,
        IMAGES,
        {"repair": [["auto"]]},
        ArgumentError,
        "repair must be 'auto', None, or",
    ),
    "repair of a number": (net, IMAGES, {"repair": 5}, ArgumentError, "repair must be 'auto', None, or.*got 5"),
    "criterion": (net, IMAGES, {"criterion": "jbr_loss"}, ArgumentError, "Unknown criterion 'jbr_loss'"),
    # data
    "empty": (net, [], {}, DataError, "list.* yielded no batch"),
    "empty tensor": (net, IMAGES[:0], {}, DataError, "yielded no batch"),
    "empty batch": (net, [IMAGES[:0]], {}, DataError, "Batch 0 is empty"),
    "exhausted": (net, iter(()), {}, DataError, "An exhausted generator cannot be read again: pass a list"),
    "a number": (net, 3, {}, DataError, "Cannot read images from int: pass a folder"),
    "no folder": (net, "/no/such/folder", {}, DataError, "There is no folder /no/such/folder"),
    "one image without batch": (net, IMAGES[0], {}, DataError, r"must be \[N, C, H, W\], got shape \(3, 32, 32\)"),
    "bytes": (net, IMAGES.byte(), {}, DataError, "Of 8-bit images write"),
    "size": (vit, F.pad(IMAGES, (0, 8, 0, 8)), {}, DataError, r"\(12, 3, 40, 40\).*made for 3 x 32 x 32"),
    "channels": (resnet, IMAGES[:, :1], {}, DataError, r"does not run on .*It was made for 3 x 160 x 160"),
    "size, own model": (
        net,
        IMAGES[..., :4, :4],
        {},
        DataError,
        r"Net does not run on float32 images of shape \(12, 3, 4, 4\)",
    ),
    "mixed sizes": (net, [IMAGES, IMAGES[..., 1:]], {}, DataError, "different shapes cannot be one batch"),
    "NaN": (net, images_with(math.nan), {}, NonFiniteError, "Batch 1: image 2 contains NaN or Inf"),
    "Inf": (net, images_with(-math.inf), {}, NonFiniteError, "Batch 1: image 2 contains NaN or Inf"),
    "eval NaN": (net, IMAGES, {"eval_data": images_with(math.nan)}, NonFiniteError, "Batch 1: image 2 contains NaN"),
    "no images wanted": (
        net,
        IMAGES,
        {"images": 0},
        ArgumentError,
        "images must be a whole number of at least 1, got 0",
    ),
    "batch size": (net, IMAGES, {"batch_size": 0}, ArgumentError, "batch_size must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_come_before_the_pass_and_leave_the_model_as_it_was(
    case: str, passes: list[int], fingerprint: Fingerprint
) -> None:
    make, data, options, error, message = WRONG[case]
    model = make()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message) as caught:
        prune(model, data, **{**QUICK, "macs": 0.5, **options}, inplace=True)
    assert isinstance(caught.value, JBRError)
    assert not passes
    assert before is None or fingerprint(model) == before


def test_data_that_fail_while_they_are_read(passes: list[int], fingerprint: Fingerprint) -> None:
    model = net()
    before = fingerprint(model)
    with pytest.raises(OSError, match="the disk is gone"):
        prune(model, broken_after(2), macs=0.5, inplace=True, **QUICK)
    assert not passes
    assert fingerprint(model) == before


def test_data_without_labels_where_they_are_needed(fingerprint: Fingerprint) -> None:
    model = net()
    before = fingerprint(model)
    with pytest.raises(
        DataError, match="objective 'label' needs labels, but the data yield none that are class indices"
    ):
        prune(model, IMAGES, macs=0.5, criterion="jbr_label", inplace=True, **QUICK)
    assert fingerprint(model) == before


def test_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    for name in ("load_pretrained", "load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(timm.models._builder, name, unreachable)
    message = r"weights of 'test_resnet' cannot be had \(OSError: We couldn't connect.*checkpoint='weights.safetensors'"
    with pytest.raises(ModelError, match=message):
        prune("test_resnet", IMAGES, macs=0.5, **QUICK)
    assert not passes


# --- what looks bad and is not -------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [IMAGES[:1], [IMAGES[:1]], list(IMAGES.split(1))], ids=["one", "a list of one", "ones"]
)
@pytest.mark.parametrize("make", [net, vit])
def test_batches_of_one(make: Callable[[], nn.Module], data: Any) -> None:
    result = prune(make(), data, macs=0.7, batch_size=1, **QUICK)
    assert result.report.kept <= 0.7
    assert result.model(IMAGES[:1]).isfinite().all()


def test_a_model_in_training_mode_is_scored_in_eval_mode(fingerprint: Fingerprint) -> None:
    model = net()
    before = fingerprint(model)
    got = prune(model, IMAGES, macs=0.6, **QUICK).model
    assert fingerprint(model) == before
    expected = prune(net().eval(), IMAGES, macs=0.6, **QUICK).model
    assert torch.equal(got(IMAGES), expected(IMAGES))


def test_a_model_pruned_before(fingerprint: Fingerprint) -> None:
    once = prune(net(), IMAGES, macs=0.7, floors=Floors(channels=1), **QUICK).model
    before = fingerprint(once)
    again = prune(once, IMAGES, macs=0.7, floors=Floors(channels=1), **QUICK)
    assert again.report.kept <= 0.7
    assert again.report.layers[0].before == once.stem.out_channels  # type: ignore[union-attr]
    assert fingerprint(once) == before


def test_a_mask_made_permanent_is_no_obstacle() -> None:
    model = masked()
    masks.remove(model.neck, "weight")  # type: ignore[arg-type]
    masks.remove(model.fc, "bias")  # type: ignore[arg-type]
    assert prune(model, IMAGES, macs=0.6, **QUICK).report.kept <= 0.6


def test_gradients_and_hooks_of_the_user_stay(fingerprint: Fingerprint) -> None:
    model, seen = net(), []
    model(IMAGES).sum().backward()
    model.neck.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    model.neck.register_full_backward_hook(lambda *_: None)  # type: ignore[union-attr]
    before = fingerprint(model)
    result = prune(model, IMAGES, macs=0.6, **QUICK)
    assert fingerprint(model) == before
    assert result.report.kept <= 0.6


def test_constant_images() -> None:
    result = prune(net(), torch.zeros(12, 3, 32, 32), macs=0.6, **QUICK)
    assert result.model(IMAGES).isfinite().all()


def test_double_precision_stays_double() -> None:
    result = prune(net().double(), IMAGES, macs=0.6, **QUICK)
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}


# --- single weights ------------------------------------------------------------------------------


def foreign_mask() -> nn.Module:
    model = net()
    model.register_parameter("gain", nn.Parameter(torch.ones(4)))
    masks.random_unstructured(model, "gain", amount=2)
    return model


def parametrized() -> nn.Module:
    model = net()
    nn.utils.parametrizations.weight_norm(model.fc)  # type: ignore[arg-type]
    return model


def masked_with_nan() -> nn.Module:
    model = masked()
    model.neck.weight_orig.data[0, 0, 0, 0] = math.nan  # type: ignore[union-attr, index]
    return model


WRONG_FOR_WEIGHTS: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "half": (lambda: net().half(), IMAGES.half(), ModelError, r"stem.weight is float16: .* Call model.float\(\)"),
    "NaN in a weight": (with_nan("neck.weight"), IMAGES, NonFiniteError, "'neck.weight' contains NaN or Inf"),
    "NaN under a mask or not": (masked_with_nan, IMAGES, NonFiniteError, "'neck.weight_orig' contains NaN or Inf"),
    "a mask of something else": (foreign_mask, IMAGES, ModelError, "gain is masked by .* neither a weight nor a bias"),
    "no layer": (lambda: nn.Flatten(), IMAGES, UnsupportedModelError, "no convolution or linear layer left to prune"),
    "forward raises": (lambda: net(raising), IMAGES, DataError, "Net does not run on float32 images .*no such row"),
    "NaN in an image": (net, images_with(math.nan), NonFiniteError, "Batch 1: image 2 contains NaN or Inf"),
    "empty": (net, [], DataError, "yielded no batch"),
    "no folder": (net, "/no/such/folder", DataError, "There is no folder /no/such/folder"),
    "no name": (lambda: 50, IMAGES, ArgumentError, "must be a timm name or an nn.Module, got int"),
}


@pytest.mark.parametrize("case", WRONG_FOR_WEIGHTS)
def test_the_same_for_single_weights(case: str, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, error, message = WRONG_FOR_WEIGHTS[case]
    model, scored = make(), []
    monkeypatch.setattr(weights, "weight_scores", lambda *_, **__: scored.append(1))
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message) as caught:
        sparsify(model, data, sparsity=0.5, inplace=True, **QUICK)
    assert isinstance(caught.value, JBRError)
    assert not scored
    assert before is None or fingerprint(model) == before


def test_a_computed_weight_is_refused_or_ignored(fingerprint: Fingerprint) -> None:
    model = parametrized()
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"fc.weight \(.*Linear\) is not a plain parameter .* put it into `ignore`"):
        sparsify(model, IMAGES, sparsity=0.5, inplace=True, **QUICK)
    assert fingerprint(model) == before
    result = sparsify(model, IMAGES, sparsity=0.5, ignore=["fc"], **QUICK)
    assert [row.name for row in result.report.layers] == ["stem", "neck"]


@pytest.mark.parametrize("data", [IMAGES[:1], list(IMAGES.split(1))], ids=["one", "ones"])
def test_few_images_for_single_weights(data: Any) -> None:
    result = sparsify(masked(), data, sparsity=0.8, batch_size=1, **QUICK)
    assert result.report.sparsity == pytest.approx(0.8, abs=1e-3)
    assert result.model(IMAGES[:1]).isfinite().all()
    assert any("Nothing was repaired" in note for note in result.report.notes) == (len(data) == 1)


def test_double_precision_stays_double_with_zeros() -> None:
    result = sparsify(net().double(), IMAGES, sparsity=0.7, permanent=False, **QUICK)
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}
    assert result.model.neck.weight_mask.dtype == torch.float64  # type: ignore[union-attr]


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("saved") / "model"
    prune(vit(), IMAGES, macs=0.7, **QUICK).save(path)
    return path


def copied(saved: Path, to: Path) -> Path:
    to.mkdir()
    for path in saved.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def truncated(path: Path) -> None:
    weights = path / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])


def flipped(path: Path) -> None:
    weights = path / checkpoint.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)


def edited(path: Path) -> None:
    description = path / checkpoint.DESCRIPTION
    description.write_text(description.read_text().replace('"seed": 0', '"seed": 1'))


def newer(path: Path) -> None:
    description = path / checkpoint.DESCRIPTION
    description.write_text(json.dumps(json.loads(description.read_text()) | {"format": "jbrprune 99"}))


def without_weights(path: Path) -> None:
    (path / checkpoint.WEIGHTS).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "model.safetensors"),
    "one bit flipped": (flipped, "model.safetensors"),
    "edited": (edited, "jbrprune.json"),
    "a newer format": (newer, r"is not of the format 'jbrprune 1'"),
    "half of it missing": (without_weights, "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage: str, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, tmp_path / "copy")
    jbrprune.load(path)
    harm, message = DAMAGES[damage]
    harm(path)
    with pytest.raises(CheckpointError, match=message):
        jbrprune.load(path)


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["a file", "the weights"])
def test_a_pickle_is_refused_unread(place: str, zipped: bool, saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    content = pickle.dumps(Evil(trace), protocol=2)
    path = copied(saved, tmp_path / "copy")
    target = tmp_path / "model.pth" if place == "a file" else path / checkpoint.WEIGHTS
    if zipped:
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    else:
        target.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pickle|directory"):
        jbrprune.load(target if place == "a file" else path)
    with pytest.raises(CheckpointError, match=r"executed|cannot be read as weights|holds more than weights"):
        create("test_vit", checkpoint=target, num_classes=4)
    assert not trace.exists()


@pytest.mark.parametrize("case", ["exists", "is a file", "below a file"])
def test_a_place_that_is_taken(case: str, saved: Path, tmp_path: Path) -> None:
    result = prune(net(), IMAGES[:2], macs=0.7, **QUICK)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    target = {"exists": "full", "is a file": "file", "below a file": "file/below"}[case]
    with pytest.raises(CheckpointError, match=target):
        result.save(tmp_path / target, overwrite=case != "exists")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    result = prune(net(), IMAGES[:2], macs=0.7, **QUICK)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            result.save(tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"Choose another path"):
            checkpoint.check_target(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for whoever may write everywhere."""
    result = prune(net(), IMAGES[:2], macs=0.7, **QUICK)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(CheckpointError, match=r"out: could not be written: .*Permission denied"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_scores_that_rank_nothing(fingerprint: Fingerprint) -> None:
    """Huge logits saturate the softmax: every gradient is exactly zero. Nothing is cut by chance."""
    model = Net().eval()
    with torch.no_grad():
        model.fc.weight.mul_(1e12)
    before = fingerprint(model)
    with pytest.raises(DataError, match=r"Every score is zero.*'projection' or 'margin'"):
        prune(model, IMAGES, macs=0.7, **QUICK)
    with pytest.raises(DataError, match="Every score is zero"):
        sparsify(model, IMAGES, sparsity=0.5, criterion="jbr", **QUICK)
    assert fingerprint(model) == before
    assert prune(model, IMAGES, macs=0.7, criterion="jbr_margin", repair=None, **QUICK).report.kept <= 0.7
