"""prune(structure="directions"): budgets, files, exports, a second pruning, the given model, the command line."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import ranks as ranks_of_processes
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from baselines import CRITERIA
from jbrprune import PruneResult, create, degradation, export, info, load, predict, prune, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.budgets.cost import count_macs
from jbrprune.cli import app
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, BudgetError, UnsupportedModelError
from jbrprune.evaluation.agreement import parameters_of
from jbrprune.repair.repair import apply_methods, record_targets
from jbrprune.structure.directions import find_directions, rotate_all

IMAGES = cases.images(24, 32, seed=3).float()
ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
QUIET: dict[str, Any] = {"progress": False, "structure": "directions"}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return create("vit_tiny_patch16_224", pretrained=False, **ARGUMENTS).eval()


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_a_budget_is_met_by_what_is_handed_over(budget: str, share: float) -> None:
    model = vit()
    result = prune(model, IMAGES, **{budget: share}, **QUIET)
    costs = {
        "macs": [sum(count_macs(each, IMAGES).values()) for each in (model, result.model)],
        "params": [parameters_of(each) for each in (model, result.model)],
    }
    assert (result.report.pruned.macs, result.report.pruned.params) == (costs["macs"][1], costs["params"][1])
    whole, left = costs[budget]
    assert left <= share * whole
    one = max(48 + 192, 3 * (4 * 48 + 2 * 17)) * (
        17 if budget == "macs" else 1
    )  # the dearest direction, or of three heads
    assert share * whole - left < one
    for row in result.report.layers:
        layer = result.model.get_submodule(row.name)
        assert isinstance(layer, nn.Sequential) == (row.kind == "direction" and row.after < row.before)
        if row.kind == "head_dim":
            assert (layer.head_dim, layer.qkv.out_features, layer.proj.in_features) == tuple(
                row.after * n for n in (1, 9, 3)
            )
            if row.after == row.before:
                assert torch.equal(layer.qkv.weight, model.get_submodule(row.name).qkv.weight)
        elif row.after < row.before:
            inputs, outputs = layer[0].weight[0].numel(), len(layer[1].weight)
            assert row.after == len(layer[0].weight)
            assert row.after * (inputs + outputs) < inputs * outputs
            assert layer[0].bias is None
        else:
            assert torch.equal(layer.weight, model.get_submodule(row.name).weight)


def test_ranks_are_multiples_on_request() -> None:
    result = prune(vit(), IMAGES, macs=0.5, floors=Floors(round_to=4), **QUIET)
    assert all(row.after % 4 == 0 for row in result.report.layers)
    assert any(row.after < row.before for row in result.report.layers)


def test_saved_and_loaded_exported_and_pruned_again(tmp_path: Path) -> None:
    result = prune(vit(), IMAGES, macs=0.3, **QUIET)
    result.save(tmp_path / "m")
    described = json.loads((tmp_path / "m" / "jbrprune.json").read_text())
    ranks = {row.name: row.after for row in result.report.layers if row.after < row.before}
    kinds = {row.name: row.kind for row in result.report.layers}
    assert set(kinds.values()) == {"direction", "head_dim"}
    assert described["pairs"] == {name: rank for name, rank in ranks.items() if kinds[name] == "direction"}
    assert described["recipe"] is not None
    loaded = load(tmp_path / "m")
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert torch.equal(load(tmp_path / "m", model=vit())(IMAGES), loaded(IMAGES))
    exported = torch.export.export(loaded, (IMAGES[:2],)).module()
    torch.testing.assert_close(exported(IMAGES[:2]), loaded(IMAGES[:2]))
    loaded(IMAGES).sum().backward()  # it can be trained
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    loaded.zero_grad(set_to_none=True)
    rows = {row.group: row for row in info(loaded, IMAGES, structure="directions").rows}
    assert {name: rows[name].units for name in ranks} == ranks
    again = prune(loaded, IMAGES, macs=0.6, **QUIET)
    assert again.report.kept <= 0.6
    assert {row.name: row.before for row in again.report.layers if row.name in ranks} == ranks
    narrower = prune(loaded, IMAGES, macs=0.7, steps=2, progress=False)  # channels and heads of the factored model
    assert narrower.report.kept <= 0.7
    assert {"head", "channel"} <= {row.kind for row in narrower.report.layers}
    narrower.save(tmp_path / "both")
    assert torch.equal(load(tmp_path / "both")(IMAGES), narrower.model(IMAGES))


def test_the_given_model_stays_or_becomes_the_result(fingerprint: Callable) -> None:
    model = vit().train()
    before = fingerprint(model)
    result = prune(model, IMAGES, macs=0.4, **QUIET)
    assert fingerprint(model) == before
    inplace = prune(model, IMAGES, macs=0.4, inplace=True, **QUIET)
    assert inplace.model is model
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(IMAGES), result.model(IMAGES))


def test_the_given_model_stays_after_an_exception(fingerprint: Callable) -> None:
    model, before = (shown := vit()), fingerprint(shown)

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        prune(model, IMAGES, macs=0.4, criterion=fail, inplace=True, **QUIET)
    assert fingerprint(model) == before


def test_ignored_layers_and_the_classifier_stay() -> None:
    model = vit()
    result = prune(model, IMAGES, macs=0.7, ignore=["blocks.0.*", "patch_embed"], **QUIET)
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert all(row.name.startswith("blocks.1.") for row in result.report.layers)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    how = {"macs": 0.3, "steps": 3, **QUIET}
    whole = prune(vit(), IMAGES, **how)
    calls = []

    def relevance(model: nn.Module, batches: Any, groups: Any) -> dict[str, Tensor]:
        from jbrprune.criteria.relevance import PRESETS

        if len(calls) == 2 and not (tmp_path / "on").exists():
            raise KeyboardInterrupt
        calls.append(1)
        return PRESETS["jbr"](model, batches, groups).values()

    with pytest.raises(KeyboardInterrupt):
        prune(vit(), IMAGES, criterion=relevance, resume=tmp_path / "log", **how)
    (tmp_path / "on").touch()
    resumed = prune(vit(), IMAGES, criterion=relevance, resume=tmp_path / "log", **how)
    assert len(calls) == 3
    torch.testing.assert_close(resumed.model(IMAGES), whole.model(IMAGES))


def test_sweep_predict_max_drop_and_latency() -> None:
    model = vit()
    results = sweep(model, IMAGES, [0.6, 0.3], **QUIET)
    shares = [result.report.kept for result in results]
    assert 0.58 < shares[0] <= 0.6
    assert 0.28 < shares[1] <= 0.3
    with pytest.raises(ArgumentError, match=r"names no channel or head.*Directions: jbrprune\.predict"):
        degradation(model, results[0], IMAGES, progress=False)
    table = predict(model, IMAGES, macs=[0.9, 0.5], **QUIET)
    assert bool((table.macs <= table.target).all())
    assert table.predicted_tpv[0] < table.predicted_tpv[1]
    assert abs(table.predicted_tpv[0] / table.masked_tpv[0] - 1) < 0.5
    found = prune(model, cases.images(60, 32).float(), max_drop=0.3, **QUIET).report
    assert found.search is not None
    assert found.search.drop.lost <= 0.3
    assert found.kept < 1
    timed = prune(model, IMAGES, latency=0.99, **QUIET).report
    assert timed.timings is not None


@pytest.mark.parametrize("budget", ["macs", "params", "latency"])
def test_mixed_cuts_channels_first_and_meets_the_budget(budget: str, tmp_path: Path) -> None:
    model, share = vit(), 0.9 if budget == "latency" else 0.3
    steps = {} if budget == "latency" else {"steps": 1}
    result = prune(model, IMAGES, **{budget: share}, **steps, structure="mixed", progress=False)
    report, rows = result.report, result.report.layers
    assert {row.kind for row in rows if row.after < row.before} >= {"channel", "direction"}
    costs = {"macs": (report.pruned.macs, report.dense.macs), "params": (report.pruned.params, report.dense.params)}
    if budget in costs:
        assert share - 0.01 < costs[budget][0] / costs[budget][1] <= share
        assert [step.target for step in report.steps][-2:] == [pytest.approx(share**0.3), share]
    assert report.pruned.macs == sum(count_macs(result.model, IMAGES).values())
    assert report.pruned.params == parameters_of(result.model)
    widths = {row.name: (row.kind, row.before, row.after) for row in rows if row.name.endswith(".qkv")}
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.qkv"):  # less heads, which are narrower as well
        both = (net.get_submodule(name).out_features for net in (model, result.model))
        assert widths[name] == ("head", *both)
    result.save(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(IMAGES), result.model(IMAGES))


@functools.cache
def cut_in_both() -> PruneResult:
    return prune(vit(), IMAGES, macs=0.4, steps=1, structure="mixed", progress=False)


@pytest.mark.parametrize("structure", ["channels", "directions", "mixed"])
def test_what_came_out_of_both_is_pruned_again(structure: str, tmp_path: Path) -> None:
    """Its pairs lose outputs and what is between them; both are repaired on what the given model's pairs give."""
    first = cut_in_both()
    assert any(row.kind == "direction" and row.after < row.before for row in first.report.layers)
    again = prune(first.model, IMAGES, macs=0.7, steps=2, structure=structure, progress=False)
    assert 0.65 < again.report.kept <= 0.7
    assert again.report.pruned.macs == sum(count_macs(again.model, IMAGES).values())
    assert again.report.final.kl < 0.1
    again.save(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(IMAGES), again.model(IMAGES))


def test_a_mixed_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    how: dict[str, Any] = {"macs": 0.3, "steps": 2, "structure": "mixed", "progress": False}
    whole = prune(vit(), IMAGES, resume=tmp_path / "log", **how)
    steps = sorted((tmp_path / "log").glob("step-*"))
    assert len(steps) == 4
    resumed = prune(vit(), IMAGES, resume=tmp_path / "log", **how)
    assert torch.equal(resumed.model(IMAGES), whole.model(IMAGES))
    assert resumed.report.layers == whole.report.layers


@pytest.mark.parametrize(
    ("how", "structure", "why"),
    [
        ({"macs": 0.45}, "mixed", "linear layers of tokens, and less than half stay"),
        ({"params": 0.4}, "mixed", "linear layers of tokens, and less than half stay"),
        ({"macs": 0.5}, "channels", "down to half of the cost"),
        ({"macs": 0.45, "criterion": "l1"}, "channels", ""),
        ({"macs": 0.45, "scope": "layer"}, "channels", ""),
        ({"latency": 0.99}, "channels", ""),
    ],
)
def test_the_structure_is_chosen_and_the_report_says_why(how: dict[str, Any], structure: str, why: str) -> None:
    how = how | ({"criterion": CRITERIA["l1"]} if "criterion" in how else {})
    how = how | ({} if "latency" in how else {"steps": 1})
    report = prune(vit(), IMAGES, progress=False, **how).report
    assert report.settings["structure"] == structure
    notes = [note for note in report.notes if note.startswith("structure=")]
    assert len(notes) == bool(why)
    assert all(f"structure='{structure}' was chosen" in note and why in note for note in notes)
    assert (structure == "mixed") == any(row.kind == "direction" for row in report.layers)


def test_turned_queries_are_not_fitted_to_what_the_dense_layer_gave() -> None:
    """Where the residual width goes as well, `qkv` reads fewer channels, but the dense outputs are in another basis."""
    model = vit()
    images = [Batch(IMAGES)]
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "head"]
    smaller, found = find_directions(model, IMAGES)
    rotate_all(smaller, images, found.groups)
    qkv = smaller.blocks[0].attn.qkv
    qkv.weight, qkv.in_features = nn.Parameter(qkv.weight[:, :40].detach().clone()), 40
    qkv.register_forward_pre_hook(lambda _, args: (args[0][..., :40],))
    before = copy.deepcopy(smaller.state_dict())
    kept = {member.axis: member.channel for group in found.groups for member in group.members}
    apply_methods({("least_squares",): smaller}, record_targets(model, images, names), kept, {}, quick=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


def test_the_structure_of_a_net_without_tokens_is_channels() -> None:
    net = create("resnet10t", pretrained=False, channels=[16, 24, 32, 48])
    report = prune(net, IMAGES, macs=0.4, steps=1, progress=False).report
    assert report.settings["structure"] == "channels"
    flat = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
    )
    result = prune(flat, IMAGES, macs=0.4, steps=1, progress=False)
    assert result.report.settings["structure"] == "channels"
    assert all(type(layer) is nn.Linear for layer in result.model[1::2])
    with pytest.raises(UnsupportedModelError):
        prune(nn.Sequential(nn.Flatten()), IMAGES, macs=0.4, progress=False)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ArgumentError, match="directions"):
        prune(vit(), IMAGES, channels=0.5, **QUIET)
    with pytest.raises(ArgumentError, match=r"structure .*rows"):
        prune(vit(), IMAGES, macs=0.5, structure="rows", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_drop= takes"):
        prune(vit(), IMAGES, max_drop=0.1, structure="mixed", progress=False)
    with pytest.raises(ArgumentError, match=r"structure .*mixed"):
        predict(vit(), IMAGES, structure="mixed", progress=False)  # type: ignore[arg-type]


def test_a_vit_of_hugging_face() -> None:
    library = pytest.importorskip("transformers", reason="transformers is not installed: pip install jbrprune[dev]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    model = library.ViTForImageClassification(library.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes))
    result = prune(model.eval(), IMAGES, macs=0.4, **QUIET)
    assert result.report.kept <= 0.4
    assert len(result.report.layers) == 12  # its patch embedding is asked for its weight's dtype
    assert type(result.model.classifier) is nn.Linear
    assert all(isinstance(result.model.get_submodule(r.name), nn.Sequential) for r in result.report.layers)


SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "deit_tiny_distilled_patch16_224": (32, {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}),
    "vit_small_patch14_reg4_dinov2": (28, {"embed_dim": 24, "num_heads": 2, "depth": 2}),
    "eva02_tiny_patch14_224": (32, {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}),
    "swin_tiny_patch4_window7_224": (32, SWIN),
    "convnext_atto": (32, {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20], "conv_mlp": False}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_saved_loaded_exported_and_trained(name: str, tmp_path: Path) -> None:
    size, arguments = OTHERS[name]
    sized = {} if name == "convnext_atto" else {"img_size": size}
    torch.manual_seed(0)
    model = create(name, pretrained=False, num_classes=5, **sized | arguments).eval()
    images = cases.images(12, size).float()
    result = prune(model, images, macs=0.7, **QUIET)
    assert result.report.kept <= 0.7
    narrowed = [row for row in result.report.layers if row.after < row.before]
    pairs = [row.name for row in narrowed if row.kind == "direction"]
    assert (len(pairs) < len(narrowed)) == name.startswith(("deit", "vit"))
    assert all(isinstance(result.model.get_submodule(pair), nn.Sequential) for pair in pairs)
    result.save(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert torch.equal(loaded(images), result.model(images))
    export(loaded, tmp_path / "net.pt2", size=(3, size, size))  # it is read back, and its outputs are compared
    nn.functional.cross_entropy(loaded.train()(images), torch.arange(12) % 5).backward()
    factors = [layer for pair in pairs for layer in loaded.get_submodule(pair)]
    assert all(bool(layer.weight.grad.abs().sum() > 0) for layer in factors)
    again = prune(loaded.eval(), images, macs=0.9, **QUIET)
    assert again.report.kept <= 0.9


@pytest.mark.slow  # other models to ONNX: checkpoint/test_export.py; pairs through torch.export: above
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_gives_the_outputs_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install jbrprune[export]")
    result = prune(vit(), IMAGES, macs=0.3, **QUIET)
    export(result.model, tmp_path / "net.onnx", size=(3, 32, 32))  # it is read back, and its outputs are compared
    assert (tmp_path / "net.onnx").is_file()


def test_two_ranks_are_one() -> None:
    def work() -> tuple[dict, Tensor]:
        found = prune(vit(), IMAGES, macs=0.4, batch_size=4, **QUIET)
        return {row.name: row.after for row in found.report.layers}, found.model(IMAGES).detach()

    ranks, logits = work()
    for found in ranks_of_processes.on_ranks(2, work):
        assert found[0] == ranks
        torch.testing.assert_close(found[1], logits, rtol=1e-3, atol=1e-4)


def test_a_net_without_linear_layers_is_refused_before_anything_else() -> None:
    torch.manual_seed(0)
    net = create("resnet10t", pretrained=False, num_classes=5)
    for structure in ("directions", "mixed"):
        with pytest.raises(UnsupportedModelError, match="nothing can be removed"):
            prune(net, IMAGES, macs=0.5, structure=structure, criterion=lambda *_: 1 / 0, progress=False)


@pytest.mark.parametrize("structure", ["directions", "mixed"])
def test_a_budget_out_of_reach_is_refused_before_anything_is_scored(structure: str) -> None:
    with pytest.raises(BudgetError, match=r"Ask for at least 0\.\d+") as caught:
        prune(vit(), IMAGES, macs=0.001, structure=structure, criterion=lambda *_: 1 / 0, progress=False)
    least = float(re.search(r"at least (0\.\d+)", str(caught.value))[1])
    assert "mlp.fc1 (" not in str(caught.value) or "at its floor" in str(caught.value)
    result = prune(vit(), IMAGES, macs=1.1 * least, steps=1, batch_size=4, **QUIET | {"structure": structure})
    assert result.report.kept <= 1.1 * least


def test_mixed_reaches_the_share_it_names_where_products_of_attention_cost_the_most() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return create("vit_tiny_patch16_224", pretrained=False, **ARGUMENTS | {"patch_size": 2, "num_heads": 6}).eval()

    how: dict[str, Any] = {"structure": "mixed", "steps": 1, "progress": False}
    with pytest.raises(BudgetError, match=r"Ask for at least 0\.\d+") as caught:
        prune(net(), IMAGES[:10], macs=0.001, **how)
    least = float(re.search(r"at least (0\.\d+)", str(caught.value))[1])
    for share in (least, 1.5 * least):  # channels to the share to the power of 0.3 leave more than that in attention
        assert prune(net(), IMAGES[:10], macs=share, **how).report.kept <= share


def test_command_line(tmp_path: Path) -> None:
    from torchvision.utils import save_image

    for number, image in enumerate(IMAGES[:12]):
        save_image(image, tmp_path / f"{number}.png")
    arguments = [text for key, value in ARGUMENTS.items() for text in ("--model-arg", f"{key}={value}")]
    call = ["prune", "vit_tiny_patch16_224", "--random", *arguments, "--data", str(tmp_path), "--macs", "0.5"]
    done = CliRunner().invoke(app, [*call, "--structure", "directions", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["settings"]["structure"] == "directions"
    assert facts["pruned"]["macs"] <= 0.5 * facts["dense"]["macs"]
    assert copy.deepcopy(facts)["layers"][0]["kind"] == "direction"
