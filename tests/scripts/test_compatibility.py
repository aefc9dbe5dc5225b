"""The whole way, from `info` to an exported program, on small models of timm, torchvision and transformers."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import compatibility
import pytest
import torch
from torch import Tensor, nn

NAMES = ["test_convnext", "test_efficientnet", "test_vit", "test_byobnet", "test_mambaout", "test_resnet"]
NAMES += ["test_coatnet", "test_vit_relpos", "test_nfnet", "ghostnet_050", "mobilevit_xxs", "efficientformerv2_s0"]


def test_a_small_model_of_timm_is_pruned_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are among the slow tests."""
    monkeypatch.setattr(compatibility, "check_export", lambda dense, smaller, images: "left to the slow tests")
    said: list[str] = []
    outcome = compatibility.prune_and_check("test_efficientnet", said.append)
    assert outcome["status"] == "budget", outcome["reason"]
    assert 0 < outcome["reached"] <= compatibility.TARGET
    assert said == ["make", "info", "score", "prune", "mask", "load", "backward", "export", "steps"]


@pytest.mark.parametrize(
    ("kind", "name", "output"), [("encoder", "test_vit", "embedding: "), ("features", "test_resnet", "features: 0 ")]
)
def test_encoders_and_backbones_of_timm_are_pruned_to_the_budget(kind: str, name: str, output: str) -> None:
    said: list[str] = []
    outcome = compatibility.prune_and_check(name, said.append, kind)
    assert outcome["status"] == "budget", outcome["reason"]
    assert outcome["output"].startswith(output)
    assert said == ["make", "info", "prune", "mask", "load"]


def test_what_timm_does_not_offer_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, **options: Any) -> nn.Module:
        raise RuntimeError(f"{name} has no features_only")

    monkeypatch.setattr(compatibility.timm, "create_model", create)
    outcome = compatibility.prune_and_check("test_vit", lambda stage: None, "features")
    assert (outcome["status"], outcome["stage"]) == ("not offered", "make")
    assert outcome["reason"] == "RuntimeError: test_vit has no features_only"


def test_a_model_of_another_library_is_made_by_name() -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed: pip install jbrprune[dev]")
    name = "transformers SegformerForSemanticSegmentation"
    outcome = compatibility.prune_and_check(name, lambda stage: None, "foreign")
    assert outcome["status"] == "budget", outcome["reason"]
    assert outcome["output"].startswith("dense: logits ")
    assert len(compatibility.make_foreign()) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_timm_goes_the_whole_way(name: str) -> None:
    outcome = compatibility.prune_and_check(name, lambda stage: None)
    assert outcome["status"] in (*compatibility.WORKS, "refused"), outcome["reason"]
    assert outcome.get("export", "equal") == "equal"


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    if name == "resnet":
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    if name == "vit":
        sizes = {"hidden_dim": 16, "mlp_dim": 40, "num_classes": 4}
        return models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, **sizes)
    blocks = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(blocks, num_classes=4)


def _transformers(name: str) -> nn.Module:
    library = pytest.importorskip("transformers", reason="transformers is not installed: pip install jbrprune[dev]")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = library.ViTConfig(image_size=32, patch_size=8, num_labels=4, **sizes)
    return library.ViTForImageClassification(config)


FOREIGN = [(_torchvision, "resnet"), (_torchvision, "vit"), (_torchvision, "convnext"), (_transformers, "vit")]


@pytest.mark.parametrize(("library", "name"), FOREIGN)
def test_models_of_other_libraries_go_the_whole_way(library: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "check_export", lambda dense, smaller, images: "left to the slow tests")
    model = library(name).eval()
    compatibility.perturb(model)
    outcome = compatibility.check(model, compatibility.draw_images(32))
    assert outcome["status"] in compatibility.WORKS, outcome["reason"]
    assert outcome["reached"] < 0.9


# --- the checks fail where they should --------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)
        self.broken = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        smaller = self.first.out_channels < 8 or self.second.out_channels < 12
        if smaller and self.broken == "crash":
            raise RuntimeError("late")
        if smaller and self.broken == "nan":
            x = x / 0
        return self.head(x)


@pytest.mark.parametrize(("broken", "status"), [("", "budget"), ("crash", "refused"), ("nan", "refused")])
def test_a_model_that_cannot_be_smaller_is_refused_early(broken: str, status: str) -> None:
    model = Plain().eval()
    model.broken = broken
    outcome = compatibility.check(model, compatibility.draw_images(16))
    assert (outcome["status"], outcome["stage"]) == (status, "info" if broken else "steps"), outcome["reason"]


def test_a_result_that_is_not_the_chosen_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compatibility.jbrprune.prune

    def prune(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        with torch.no_grad():
            result.model.first.weight.add_(1e-6 if options.get("repair", 1) is None else 0)
        return result

    monkeypatch.setattr(compatibility.jbrprune, "prune", prune)
    outcome = compatibility.check(Plain().eval(), compatibility.draw_images(16))
    assert (outcome["status"], outcome["stage"]) == ("wrong", "steps")
    assert "first.weight" in outcome["reason"]


def test_other_units_than_those_of_the_lowest_scores_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compatibility.select

    def select(scores: Any, *arguments: Any, **options: Any) -> Any:
        return real({name: -values for name, values in scores.items()}, *arguments, **options)

    monkeypatch.setattr(compatibility, "select", select)
    outcome = compatibility.check(Plain().eval(), compatibility.draw_images(16))
    assert (outcome["status"], outcome["stage"]) == ("wrong", "mask")
    assert "other units" in outcome["reason"]


def test_a_crash_after_scoring_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(compatibility.jbrprune, "prune", fail)
    outcome = compatibility.check(Plain().eval(), compatibility.draw_images(16))
    assert (outcome["status"], outcome["stage"]) == ("failed", "prune")


# --- torch-pruning's recipe -----------------------------------------------------------------------


def test_the_recipe_runs_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility.timm.layers, "set_fused_attn", lambda enable: None)  # it is global
    outcome = compatibility.run_recipe("test_efficientnet", lambda stage: None)
    assert outcome["status"] == "works"
    assert 0.3 < outcome["reached"] < 0.7


def test_permuted_norms_are_seen() -> None:
    dense, smaller = nn.Sequential(nn.LayerNorm(5)), nn.Sequential(nn.LayerNorm(3))
    compatibility.perturb(dense)
    kept = dense[0].weight.detach()[[1, 2, 4]]
    smaller[0].weight.data, smaller[0].bias.data = kept.clone(), dense[0].bias.detach()[[1, 2, 4]].clone()
    assert compatibility.find_permuted(dense, smaller) == []
    with torch.no_grad():  # two channels of the same weight: not permuted, whichever of them stayed
        dense[0].weight[0] = dense[0].weight[2]
    assert compatibility.find_permuted(dense, smaller) == []
    smaller[0].weight.data = kept[[0, 2, 1]].clone()
    assert compatibility.find_permuted(dense, smaller) == ["0.weight"]


# --- the run and its table ------------------------------------------------------------------------


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--kinds", "classifier", *arguments])
    compatibility.main()


def test_a_module_is_run_once_and_the_table_is_made_from_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compatibility, "find_smallest", lambda module: "test_" + module)
    monkeypatch.setattr(
        compatibility, "prune_and_check", lambda *_: {"status": "deepest", "reason": "a | b", "reached": 0.8}
    )
    monkeypatch.setattr(
        compatibility, "run_recipe", lambda model, stage: {"status": "fails", "reason": "prune: IndexError: 3"}
    )
    out, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    page.write_text("a\n\n<!-- timm -->\n| old |\n| --- |\n\n<!-- recipe -->\n\nb\n")
    arguments = ["--out", str(out), "--table", str(page), "--modules", "resnet", "--memory", "64"]
    _run(monkeypatch, *arguments)
    assert "resnet: deepest" in capsys.readouterr().out
    _run(monkeypatch, *arguments)
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert (line["model"], line["recipe_status"]) == ("test_resnet", "fails")
    assert line["versions"]["torch-pruning"]
    text = page.read_text()
    row = "| `resnet` | `test_resnet` |  | not run |  | not run |  | deepest | 0.80 | fails |  | classifier: a / b;"
    assert f"{row} recipe: prune: IndexError: 3 |\n\n" in text
    assert "| status | modules |\n| --- | --- |\n| fails | 1 |\n\nb\n" in text
    assert text.startswith("a\n\n<!-- timm -->\n| timm module ")
    assert "old" not in text


def test_a_line_is_run_again_on_another_commit_and_takes_the_recipe_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter(["failed", "budget"])
    monkeypatch.setattr(compatibility, "find_smallest", lambda module: "test_" + module)
    monkeypatch.setattr(compatibility, "run_recipe", lambda model, stage: {"status": "works", "reason": "once"})
    monkeypatch.setattr(compatibility, "_run_apart", lambda task, args, died="": task(lambda stage: None))
    monkeypatch.setattr(compatibility, "prune_and_check", lambda *_: {"status": next(outcomes), "reason": ""})
    arguments = ["--out", str(tmp_path / "lines.jsonl"), "--modules", "resnet", "--again", "failed"]
    _run(monkeypatch, *arguments)
    monkeypatch.setattr(compatibility, "run_recipe", None)
    _run(monkeypatch, *arguments)
    assert len(compatibility.lines(tmp_path / "lines.jsonl")) == 1
    monkeypatch.setattr(compatibility, "commit", lambda: "another")
    _run(monkeypatch, *arguments)
    first, second = compatibility.lines(tmp_path / "lines.jsonl")
    assert (first["status"], second["status"], second["model"]) == ("failed", "budget", "test_resnet")
    assert (second["recipe_status"], second["recipe_reason"]) == ("works", "once")


def _held() -> float:
    """GiB of data that this process has, and its children begin with: more after other tests."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the limit of memory is one of Linux")
    return int(re.search(r"VmData:\s+(\d+) kB", status.read_text())[1]) / 2**20  # type: ignore[index]


def test_a_process_that_takes_too_much_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(model: str, stage: compatibility.Stage, kind: str) -> dict:
        stage("score")
        torch.ones(2**31)
        return {"status": "budget", "reason": ""}

    def endless(model: str, stage: compatibility.Stage) -> dict:
        stage("prune")
        while True:
            pass

    monkeypatch.setattr(compatibility, "find_smallest", lambda module: "test_" + module)
    monkeypatch.setattr(compatibility, "prune_and_check", greedy)
    monkeypatch.setattr(compatibility, "run_recipe", endless)
    out = tmp_path / "lines.jsonl"
    _run(monkeypatch, "--out", str(out), "--modules", "resnet", "--memory", str(_held() + 2), "--seconds", "1")
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert (line["status"], line["stage"]) == ("failed", "score")
    assert (line["recipe_status"], line["recipe_stage"]) == ("fails", "prune")
    assert "1.0 s of processor time" in line["recipe_reason"]


def test_an_unknown_module_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no module resnot"):
        _run(monkeypatch, "--out", str(tmp_path / "x"), "--modules", "resnot")


def test_a_module_whose_models_cannot_be_made_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def smallest(module: str) -> str:
        if module == "densenet":
            os._exit(3)
        return "test_" + module

    outcome = {"status": "budget", "reason": ""}
    monkeypatch.setattr(compatibility, "find_smallest", smallest)
    monkeypatch.setattr(compatibility, "prune_and_check", lambda *_: outcome)
    monkeypatch.setattr(compatibility, "run_recipe", lambda model, stage: outcome)
    out = tmp_path / "lines.jsonl"
    _run(monkeypatch, "--out", str(out), "--modules", "densenet", "vgg", "--memory", "64")
    first, second = [json.loads(text) for text in out.read_text().splitlines()]
    assert (first["module"], first["status"], first["recipe_status"]) == ("densenet", "failed", "failed")
    assert "ended with code 3" in first["reason"]
    assert (second["model"], second["status"]) == ("test_vgg", "budget")
