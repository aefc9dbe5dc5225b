"""prune() and sweep(): the budget, the guest, the data, the report, the files."""

from __future__ import annotations

import copy
import functools
import itertools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import jbrprune
from jbrprune import PruneResult, create, prune, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint import checkpoint
from jbrprune.criteria.relevance import Relevance
from jbrprune.errors import ArgumentError, BudgetError, CheckpointError
from jbrprune.evaluation import latency
from jbrprune.models import timm_models
from jbrprune.pruning import channels, loop
from jbrprune.structure.groups import Group

CLASSES = 4
QUICK: dict[str, Any] = {"progress": False, "steps": 2}
IMAGES = cases.images(40, 32).float()
LABELS = torch.arange(40) % CLASSES


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(timm.create_model("test_resnet", num_classes=CLASSES)).float()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(timm.create_model("test_vit", num_classes=CLASSES, img_size=32, depth=2)).float()


class Own(nn.Module):
    """Not from timm: two convolutions under a shortcut, batch norms, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12)
        self.a, self.bn1 = nn.Conv2d(12, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.b, self.bn2 = nn.Conv2d(20, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.b(F.relu(self.bn1(self.a(x))))))
        return self.fc(x.mean((2, 3)))


def own() -> nn.Module:
    torch.manual_seed(0)
    return cases.randomised(Own()).float()


MODELS = {"resnet": resnet, "vit": vit, "own": own}


@functools.cache
def pruned(name: str) -> PruneResult:
    """What the options of most tests give; not to be changed."""
    return prune(MODELS[name](), IMAGES, macs=0.6, **QUICK)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """The same names, shapes and bits."""
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def macs_of(model: nn.Module) -> int:
    """By torch's counter alone: there is no fused attention in the nets it is used for."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(IMAGES[:1])
    return counter.get_total_flops() // 2


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- the budget ----------------------------------------------------------------------------------


class Watch:
    """Checks every selection: the last block that went was needed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.select, self.calls = channels.select, 0
        monkeypatch.setattr(channels, "select", self)

    def __call__(
        self, scores: dict[str, Tensor], groups: tuple[Group, ...], account: Any, target: float, **options: Any
    ) -> dict[str, Tensor]:
        costs = {g.name: account.saving(g.name) if options["scope"] == "global" else 1.0 for g in groups}
        chosen = self.select(scores, groups, account, target, **options)
        assert account.total <= target * (1 + 1e-9)
        blocks = []
        for group in groups:
            gone = chosen.get(group.name, torch.empty(0))
            if len(gone):
                last = scores[group.name][gone].sort().values[-self.last_block(group, len(gone), options["floors"]) :]
                blocks.append((float(last.mean()) / costs[group.name], group.name, len(last)))
        if blocks:
            _, name, units = max(blocks)
            account.remove(name, -units)
            assert account.total > target
            account.remove(name, units)
        self.calls += 1
        return chosen

    @staticmethod
    def last_block(group: Group, gone: int, floors: Floors) -> int:
        step = 1 if group.kind in ("head", "group") else floors.round_to
        first = group.size % step or step
        return first if gone == first else step


SHARES = [("macs", 0.6), ("params", 0.71), ("channels", 0.55)]
WAYS: list[dict[str, Any]] = [{"steps": 1}, {"steps": 3}, {"steps": 2, "floors": Floors(channels=1, round_to=8)}]
PAIRED = [  # every pair of a model, a kind and options
    (name, *SHARES[row], WAYS[(row + column) % 3]) for column, name in enumerate(MODELS) for row in range(3)
]


@pytest.mark.parametrize(("name", "kind", "share", "options"), PAIRED, ids=str)
def test_the_budget_is_met_and_overshot_by_less_than_one_unit(
    name: str, kind: str, share: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, model = Watch(monkeypatch), MODELS[name]()
    options = {"floors": Floors(channels=1), **options}
    result = prune(model, IMAGES, **{**QUICK, **options}, **{kind: share}, repair=None)
    assert watch.calls == options["steps"]
    report = result.report
    kept = {
        "macs": report.pruned.macs / report.dense.macs,
        "params": params_of(result.model) / params_of(model),
        "channels": removable(result.model, report) / removable(model, report),
    }
    assert kept[kind] <= share
    assert kept[kind] > share - (
        0.3 if options["floors"].round_to > 1 else 0.15
    )  # no more than one of the larger blocks
    for step in report.steps:
        value = {"macs": step.macs / report.dense.macs, "params": step.params / report.dense.params}.get(kind, 0.0)
        assert value <= step.target + 1e-12
    assert report.steps[-1].target == share


def removable(model: nn.Module, report: jbrprune.Report) -> int:
    """Width of every group on the layer that names it."""
    if isinstance(model, Own):
        return model.a.out_channels + model.stem.out_channels
    if hasattr(model, "blocks"):
        return sum(b.attn.num_heads + b.mlp.fc1.out_features for b in model.blocks)  # type: ignore[union-attr]
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    tied = ("layer1.0.conv2", "layer2.0.downsample.1", "layer3.0.downsample.1", "layer4.0.downsample.1")
    return sum(convs[row.name].out_channels for row in report.layers if row.name not in tied)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_widths_are_multiples(name: str) -> None:
    model = MODELS[name]()
    report = prune(model, IMAGES, macs=0.5, floors=Floors(round_to=8), **QUICK).report
    rows = [row for row in report.layers if row.kind == "channel"]
    assert all(row.after % 8 == 0 for row in rows)
    assert any(row.after < row.before for row in rows)


def test_widths_that_are_no_multiples_become_some() -> None:
    rows = {row.name: row for row in prune(own(), IMAGES, macs=0.5, floors=Floors(round_to=8), **QUICK).report.layers}
    assert (rows["a"].before, rows["a"].after % 8) == (20, 0)


@pytest.mark.parametrize(
    ("floors", "least"),
    [
        (Floors(channels=1), lambda before: 1),
        (Floors(channels=10), lambda before: min(before, 10)),
        (Floors(0.4, 1), lambda before: -(-before * 2 // 5)),
    ],
)
def test_floors_are_kept(floors: Floors, least: Callable[[int], int]) -> None:
    report = prune(own(), IMAGES, macs=0.6 if floors.share else 0.5, floors=floors, **QUICK).report
    assert all(row.after >= least(row.before) for row in report.layers)
    with pytest.raises(BudgetError, match="cannot be reached: with every group at its floor") as caught:
        prune(own(), IMAGES, macs=1e-4, floors=floors, **QUICK)
    share = float(str(caught.value).partition("at its floor ")[2].split()[0])
    report = prune(own(), IMAGES, macs=share + 0.001, floors=floors, **{**QUICK, "steps": 3}).report
    assert report.kept <= share + 0.001
    assert all(row.after >= least(row.before) for row in report.layers)


def test_what_is_ignored_keeps_its_width() -> None:
    report = prune(resnet(), IMAGES, macs=0.8, ignore=["layer1", "layer3.*.conv[12]"], **QUICK).report
    rows = {row.name: row for row in report.layers}
    assert rows["layer4.0.conv1"].after < 96
    assert not [name for name in rows if name.startswith("layer1") or name.startswith("layer3.0.conv1")]
    with pytest.raises(ArgumentError, match="nowhere"):
        prune(resnet(), IMAGES, macs=0.8, ignore=["nowhere.*"], **QUICK)
    with pytest.raises(ArgumentError, match=r"write \['layer1'\]"):
        prune(resnet(), IMAGES, macs=0.8, ignore="layer1", **QUICK)


def test_residual_width_of_a_transformer_goes_only_when_asked_for() -> None:
    narrow = prune(vit(), IMAGES, macs=0.5, floors=Floors(width=True), **QUICK)
    assert narrow.model.embed_dim == narrow.model.norm.weight.shape[0] < 64  # type: ignore[union-attr]
    assert narrow.model(IMAGES).shape == (40, CLASSES)
    assert any("changes the norm's statistics" in note for note in narrow.report.notes)
    wide = prune(vit(), IMAGES, macs=0.5, **QUICK)
    assert wide.model.embed_dim == 64
    assert any("pass width=True" in note for note in wide.report.notes)


def test_heads_go_whole() -> None:
    model = prune(vit(), IMAGES, params=0.6, **QUICK).model
    for block in model.blocks:  # type: ignore[union-attr]
        assert block.attn.qkv.out_features == 3 * 32 * block.attn.num_heads  # type: ignore[union-attr, operator]
    assert min(block.attn.num_heads for block in model.blocks) == 1  # type: ignore[union-attr, type-var]


# --- the guest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_given_model_is_left_as_it_was(name: str, fingerprint: Callable[[nn.Module], dict]) -> None:
    model = MODELS[name]().train()
    before = fingerprint(model)
    result = prune(model, IMAGES, macs=0.7, **QUICK)
    assert fingerprint(model) == before
    assert result.model is not model
    assert not any(module.training for module in result.model.modules())
    mine = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert not mine & {id(tensor) for tensor in (*result.model.parameters(), *result.model.buffers())}


@pytest.mark.parametrize("name", MODELS)
def test_in_place_the_given_model_becomes_the_result(name: str) -> None:
    expected = pruned(name).model
    model = MODELS[name]().train()
    modules, seen = list(model.modules()), []
    model.register_forward_hook(lambda *_: seen.append(1))
    result = prune(model, IMAGES, macs=0.6, inplace=True, **QUICK)
    assert result.model is model
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert_same(model, expected)
    seen.clear()
    assert torch.equal(model.eval()(IMAGES), expected(IMAGES))
    assert seen == [1]


@pytest.mark.parametrize("inplace", [False, True])
def test_frozen_parameters_stay_frozen(inplace: bool, fingerprint: Callable[[nn.Module], dict]) -> None:
    model = resnet().requires_grad_(False)
    model.fc.requires_grad_(True)  # type: ignore[union-attr]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = fingerprint(model)
    result = prune(model, IMAGES, macs=0.6, inplace=inplace, **QUICK)
    assert {name: p.requires_grad for name, p in result.model.named_parameters()} == flags
    assert inplace or fingerprint(model) == before
    assert_same(result.model, pruned("resnet").model)


class Counted(Own):
    """Raises on the n-th call of forward, counted over all copies."""

    left = 0
    error: BaseException = RuntimeError("out of luck")

    def forward(self, x: Tensor) -> Tensor:
        Counted.left -= 1
        if Counted.left == 0:
            raise Counted.error
        return super().forward(x)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_forward_that_raises_leaves_the_model_as_it_was(
    error: BaseException, fingerprint: Callable[[nn.Module], dict]
) -> None:
    model = cases.randomised(Counted()).float().train()
    options = {**QUICK, "steps": 1, "macs": 0.6, "inplace": True}
    Counted.left, Counted.error = 10**9, error
    prune(copy.deepcopy(model), IMAGES, **options)
    calls = 10**9 - Counted.left
    raised = []
    tried = range(1, calls + 1, 1 if type(error) is RuntimeError else 3)
    for n in tried:
        mine, Counted.left = copy.deepcopy(model), n
        before = fingerprint(mine)
        try:
            prune(mine, IMAGES, **options)
        except (RuntimeError, ValueError, KeyboardInterrupt) as caught:
            assert fingerprint(mine) == before, n
            raised.append(type(caught))
    assert type(error) in raised
    assert len(raised) > 0.8 * len(
        tried
    )  # while units are tried one by one, a failure only takes a group from the list


PLACES = ("hand_over", "repair_and_evaluate", "remove_units", "repair_model", "record_targets", "agreement_on")
INTERRUPTED = [  # every pair of a place, an error and inplace
    (where, error, inplace == (number % 2 == 0))
    for number, where in enumerate(PLACES)
    for error, inplace in ((RuntimeError("no"), False), (KeyboardInterrupt("no"), True))
]


@pytest.mark.parametrize(("where", "error", "inplace"), INTERRUPTED)
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(
    where: str,
    error: BaseException,
    inplace: bool,
    monkeypatch: pytest.MonkeyPatch,
    fingerprint: Callable[[nn.Module], dict],
) -> None:
    place = channels if where == "remove_units" else loop
    model, original, calls = own().train(), getattr(place, where), itertools.count(1)
    model.bn.eval()  # type: ignore[union-attr]
    before = fingerprint(model)

    def interrupted(*arguments: Any, **options: Any) -> object:
        if where in ("hand_over", "record_targets") or next(calls) == 2:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(place, where, interrupted)
    with pytest.raises(type(error), match="no"):
        prune(model, IMAGES, macs=0.6, inplace=inplace, **QUICK)
    assert fingerprint(model) == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt("no")])
def test_data_that_raise_leave_the_model_as_it_was(
    error: BaseException, fingerprint: Callable[[nn.Module], dict]
) -> None:
    def broken() -> Iterator[Tensor]:
        yield IMAGES
        raise error

    model = own().train()
    before = fingerprint(model)
    with pytest.raises(type(error), match="no"):
        prune(model, broken(), macs=0.6, inplace=True, **QUICK)
    assert fingerprint(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context: Callable[[], Any]) -> None:
    model = own()
    with context():
        got = prune(model, IMAGES, macs=0.6, **QUICK).model
    assert_same(got, pruned("own").model)


# --- the same in, the same out -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_model(name: str) -> None:
    torch.manual_seed(1)
    one = prune(MODELS[name](), IMAGES, macs=0.6, seed=3, criterion="jbr_projection", **QUICK)
    torch.manual_seed(2)
    other = prune(MODELS[name](), IMAGES, macs=0.6, seed=3, criterion="jbr_projection", **QUICK)
    assert_same(one.model, other.model)
    assert (one.report.layers, one.report.repaired) == (other.report.layers, other.report.repaired)


def test_every_step_draws_its_own_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seeds = Relevance.__call__, []
    monkeypatch.setattr(Relevance, "__call__", lambda *a, **k: (seeds.append(a[0].seed), original(*a, **k))[1])
    prune(own(), IMAGES, macs=0.6, seed=10, criterion="jbr_projection", **QUICK)
    assert seeds == [11, 12]


def test_nothing_changes_when_nothing_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "select", lambda *_, **__: {})
    for make in MODELS.values():
        model = make()
        result = prune(model, IMAGES, macs=0.99, **QUICK)
        assert_same(result.model, model)
        assert torch.equal(result.model(IMAGES), model(IMAGES))
        agreed = result.report.final
        assert agreed is not None
        assert (agreed.top1, agreed.top5) == (1, 1)
        assert agreed.kl < 1e-12
        assert [step.repair for step in result.report.steps] == ["none", "none"]


def test_a_share_just_below_one_takes_one_unit() -> None:
    report = prune(own(), IMAGES, macs=0.9999, floors=Floors(channels=1), progress=False).report
    assert sorted(row.before - row.after for row in report.layers)[-1] == 1
    assert len(report.steps) == 1


@pytest.mark.parametrize("name", MODELS)
def test_labels_change_nothing_but_the_accuracy(name: str) -> None:
    model = MODELS[name]()
    silent = pruned(name)
    wrong = torch.randint(0, CLASSES, (40,))
    for labels in (LABELS, wrong):
        told = prune(model, [(IMAGES, labels)], macs=0.6, **QUICK)
        assert_same(told.model, silent.model)
        assert told.report.final is not None
        assert told.report.final.accuracy is not None
    assert silent.report.final is not None
    assert silent.report.final.accuracy is None


def test_labels_count_where_the_objective_asks_for_them() -> None:
    one, other = (
        prune(resnet(), [(IMAGES, labels)], macs=0.6, criterion="jbr_label", repair=None, **QUICK).model.state_dict()
        for labels in (LABELS, LABELS * 0)
    )
    assert any(one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in one)


def test_a_sweep_ends_where_one_run_with_the_same_steps_ends() -> None:
    options = {"progress": False}
    model = own()
    results = sweep(model, IMAGES, [0.8, 0.9, 0.7], **options)
    assert [result.report.steps[-1].target for result in results] == [0.9, 0.8, 0.7]
    assert [len(result.report.steps) for result in results] == [2, 4, 6]
    for result, share in zip(results, [0.9, 0.8, 0.7], strict=True):
        alone = prune(model, IMAGES, macs=share, **options)
        assert_same(result.model, alone.model)
        assert result.report.final == alone.report.final
        assert result.report.budget == {"macs": share}
        assert result.report.pruned == alone.report.pruned


def test_models_of_a_sweep_share_nothing() -> None:
    one, other = sweep(vit(), IMAGES, [0.9, 0.8], budget="params", **QUICK)
    assert not {id(p) for p in one.model.parameters()} & {id(p) for p in other.model.parameters()}
    assert params_of(one.model) > params_of(other.model)
    assert one.report.kept > other.report.kept
    assert [len(result.report.steps) for result in (one, other)] == [2, 4]


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ([], {}, r"one or more different numbers, got \[\]"),
        ([0.5, 0.5], {}, "one or more different numbers"),
        ([0.5, 1.2], {}, r"macs must satisfy 0 < macs < 1.*got 1\.2"),
        ([0.5, "half"], {}, "macs must satisfy 0 < macs < 1.*got 'half'"),
        (
            [0.5],
            {"budget": "flops"},
            "one of macs, params, channels, latency, latency_ms, sparsity; got budget='flops'",
        ),
        ([0.5], {"params": 0.3}, "got budget='macs' and params="),
        ([0.5], {"inplace": True}, "got budget='macs' and inplace="),
    ],
)
def test_a_sweep_refuses(shares: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sweep(own(), IMAGES, shares, **options)


# --- data ----------------------------------------------------------------------------------------


FORMS: dict[str, Callable[[], object]] = {
    "a list of batches": lambda: list(IMAGES.split(7)),
    "images one by one": lambda: list(IMAGES),
    "a generator": lambda: (part for part in IMAGES.split(16)),
    "tuples": lambda: list(zip(IMAGES.split(8), LABELS.split(8), strict=True)),
    "dicts": lambda: [{"pixel_values": x, "labels": y} for x, y in zip(IMAGES.split(8), LABELS.split(8), strict=True)],
    "a Dataset": lambda: TensorDataset(IMAGES, LABELS),
    "a Dataset without labels": lambda: TensorDataset(IMAGES),
    "a DataLoader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_images_gives_the_same_model(form: str) -> None:
    assert_same(prune(own(), FORMS[form](), macs=0.6, **QUICK).model, pruned("own").model)


def test_a_shuffled_loader() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6, shuffle=True)
    result = prune(own(), loader, macs=0.6, **QUICK)
    assert result.report.kept <= 0.6
    assert result.report.settings["images"] == 32


@pytest.mark.parametrize("classes", [(), ("a", "b", "c", "d"), ("a", "b")])
def test_a_folder_of_pictures(classes: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        folder = tmp_path / (classes[number % len(classes)] if classes else ".")
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    report = prune(model, tmp_path, macs=0.7, ignore=["layer4"], **{**QUICK, "steps": 1}, repair=None).report
    assert report.settings["images"] == 10
    assert report.final is not None
    assert (report.final.accuracy is not None) == (len(classes) == CLASSES)
    assert report.final.images == 2
    assert report.kept <= 0.7
    assert ("the labels mean something else" in caplog.text) == (len(classes) == 2)


def test_a_created_model_gives_what_its_module_gives(tmp_path: Path) -> None:
    module = resnet()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    named = prune(
        create("test_resnet", checkpoint=tmp_path / "weights.safetensors", num_classes=CLASSES),
        IMAGES,
        macs=0.6,
        **QUICK,
    )
    given = pruned("resnet")
    assert_same(named.model, given.model)
    assert named.report.model == given.report.model == "test_resnet.r160_in1k"
    assert timm_models.recipe(named.model) == timm_models.recipe(given.model) == timm_models.recipe(module)


def test_few_images_prune_without_repair_and_say_so() -> None:
    report = prune(own(), IMAGES[:1], macs=0.6, **QUICK).report
    assert report.kept <= 0.6
    assert report.final is None
    assert any("Nothing was repaired" in note and "fewer than 10 images" in note for note in report.notes)
    assert any("No agreement was measured" in note for note in report.notes)
    assert "Nothing was repaired" in str(report)


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [resnet, own])
def test_the_report_says_what_can_be_measured(make: Callable[[], nn.Module]) -> None:
    model, test, labels = make(), cases.images(30, 32, seed=9).float(), torch.arange(30) % CLASSES
    result = prune(model, IMAGES, macs=0.6, eval_data=[(test, labels)], **QUICK)
    report = result.report
    for size, net in ((report.dense, model), (report.pruned, result.model)):
        assert size.macs == macs_of(net)
        assert size.params == params_of(net)
        assert size.bytes == sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))
    assert [round(t.median_ms, 6) for t in report.timings.latencies] == [
        round(1e-3 + 1e-6 * params_of(net), 6) for net in (model, result.model)
    ]  # of the clock in conftest
    with torch.no_grad():
        p, q = model.eval()(test).double().softmax(1), result.model(test).double().softmax(1)
    agreed = report.final
    assert agreed is not None
    assert agreed.images == 30
    assert agreed.top1 == int((p.argmax(1) == q.argmax(1)).sum()) / 30
    assert agreed.kl == pytest.approx(float((p * (p / q).log()).sum() / 30), rel=1e-4)
    assert agreed.accuracy == int((q.argmax(1) == labels).sum()) / 30
    assert agreed.dense_accuracy == int((p.argmax(1) == labels).sum()) / 30
    assert report.heldout == "30 images of eval_data"
    last = report.steps[-1]
    assert (last.macs, last.params) == (report.pruned.macs, report.pruned.params)
    assert (report.settings["steps"], report.settings["images"]) == (2, 40)
    for row in report.layers:
        layers = [net.get_submodule(row.name) for net in (model, result.model)]
        assert (row.before, row.after) == tuple(layer.out_channels for layer in layers)
        assert row.type == type(layers[0]).__name__
    assert report.seconds["total"] >= report.seconds["scoring"] > 0
    assert report.provenance["seed"] == 0
    assert report.provenance["versions"]["timm"] == timm.__version__  # type: ignore[index]


def test_widths_of_a_transformer_in_the_report() -> None:
    result = pruned("vit")
    rows = {row.name: row for row in result.report.layers}
    for number, block in enumerate(result.model.blocks):  # type: ignore[arg-type]
        assert rows[f"blocks.{number}.attn"].after == block.attn.num_heads
        assert rows[f"blocks.{number}.mlp.fc1"].after == block.mlp.fc1.out_features


def test_both_sides_of_the_last_repair_are_reported() -> None:
    repaired = prune(vit(), IMAGES, macs=0.5, **{**QUICK, "steps": 1})
    bare = prune(vit(), IMAGES, macs=0.5, repair=None, **{**QUICK, "steps": 1})
    assert repaired.report.steps[0].repair != "none"
    assert repaired.report.unrepaired == bare.report.final == bare.report.unrepaired
    assert repaired.report.repaired != bare.report.repaired
    assert bare.report.steps[0].repair == "none"


@pytest.mark.parametrize("name", MODELS)
def test_without_repair_what_stays_is_untouched(name: str) -> None:
    model = MODELS[name]()
    result = prune(model, IMAGES, macs=0.6, repair=None, **QUICK)
    assert not result.report.seconds.get("repaired")
    for part, tensor in result.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.isin(tensor, model.state_dict()[part]).all(), part


@pytest.mark.parametrize("repair", ["least_squares", ("batch_norm", "mean_shift"), ["auto"], "mean_shift", ()])
def test_repairs_can_be_chosen(repair: Any) -> None:
    report = prune(own(), IMAGES, macs=0.6, repair=repair, **QUICK).report
    named = "+".join([repair] if isinstance(repair, str) else repair)
    allowed = {"none", named} if named != "auto" else {"none", "batch_norm", "batch_norm+least_squares"}
    assert {step.repair for step in report.steps} <= allowed


def test_latency_is_measured_by_default() -> None:
    report = prune(own(), IMAGES[:4], macs=0.6, steps=1, progress=False).report
    assert report.timings is not None
    assert all(one.median_ms > 0 for one in report.timings.latencies)
    assert "latency" in str(report)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_what_is_saved_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model, result = MODELS[name](), pruned(name)
    result.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["jbrprune.json", "model.safetensors"]
    loaded = jbrprune.load(tmp_path / "out")
    assert_same(loaded, result.model)
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert type(loaded) is type(model)
    wanted = timm.data.resolve_data_config({}, model=model)
    found = timm.data.resolve_data_config({}, model=loaded)
    assert {key: found[key] for key in ("mean", "std", "interpolation", "crop_pct")} == {
        key: wanted[key] for key in ("mean", "std", "interpolation", "crop_pct")
    }
    described = checkpoint.describe(tmp_path / "out")
    assert described.report["budget"] == {"macs": 0.6}
    assert described.report["provenance"]["seed"] == 0
    assert described.report["settings"]["criterion"] == "jbr"


def test_the_image_size_a_model_was_made_for_is_saved(tmp_path: Path) -> None:
    pruned("vit").save(tmp_path / "out")
    loaded = jbrprune.load(tmp_path / "out")
    assert timm.data.resolve_data_config({}, model=loaded)["input_size"] == (3, 32, 32)


def test_a_model_that_is_not_timms_is_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    result = pruned("own")
    assert (result.size, result.report.model) == ((3, 32, 32), "Own")
    result.save(tmp_path / "out")
    loaded = jbrprune.load(tmp_path / "out", model=Own())
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    with pytest.raises(CheckpointError, match="model="):
        jbrprune.load(tmp_path / "out")


def test_a_pruned_model_can_be_pruned_and_saved_again(tmp_path: Path) -> None:
    """The second budget is a share of the model it is given."""
    first = pruned("resnet")
    first.save(tmp_path / "one")
    for again in (first.model, jbrprune.load(tmp_path / "one")):
        second = prune(again, IMAGES, macs=0.7, **QUICK)
        assert second.report.dense.macs == first.report.pruned.macs
        assert second.report.pruned.macs <= 0.7 * first.report.pruned.macs
        second.save(tmp_path / "two", overwrite=True)
        assert torch.equal(jbrprune.load(tmp_path / "two")(IMAGES), second.model(IMAGES))


def test_results_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    result: PruneResult = prune(own(), IMAGES[:3], macs=0.6, **QUICK)
    result.save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)


def test_without_repair_nothing_is_recorded_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "record_targets", lambda *_, **__: pytest.fail("recorded for no repair"))
    report = prune(own(), IMAGES, macs=0.7, repair=None, **QUICK).report
    assert "repair" not in report.seconds
    assert {step.repair for step in report.steps} == {"none"}
    assert report.final.images == 8


def test_the_processor_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel\t\t: 167\nmodel name\t: Some CPU (R) 9\n\nmodel name\t: Some CPU (R) 9\n")
    monkeypatch.setattr(latency, "CPUINFO", facts)
    assert prune(own(), IMAGES, macs=0.7, **QUICK).report.provenance["hardware"] == "Some CPU (R) 9"
    facts.unlink()
    assert latency.describe_hardware(torch.device("cpu")) == (platform.processor() or platform.machine())
