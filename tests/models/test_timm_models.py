"""Models by name: made, filled from files, described and made again."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from jbrprune.errors import ArgumentError, CheckpointError, ModelError
from jbrprune.models import layers, timm_models

TINY = "test_resnet"


def tiny(**arguments: object) -> nn.Module:
    return timm_models.create(TINY, pretrained=False, **arguments)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(1)
    return timm_models.create(TINY, pretrained=False, num_classes=5)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in one.state_dict().items())


# --- names ---------------------------------------------------------------------------------------


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"no model named 'resnet5O'. Nearest names: .*resnet50"):
        timm_models.create("resnet5O")


def test_a_tag_does_not_hide_the_misspelt_name() -> None:
    with pytest.raises(ArgumentError, match=r"Nearest names: .*vit_small_patch16_224"):
        timm_models.create("vit_smal_patch16_224.augreg_in1k")


def test_a_name_like_no_other_is_answered_with_the_list() -> None:
    with pytest.raises(ArgumentError, match=r"timm.list_models\(\)"):
        timm_models.create("%%%%%%%%")


def test_an_unknown_tag_is_answered_with_the_known() -> None:
    with pytest.raises(ArgumentError, match=r"resnet50 has no weights tagged 'nothing'.*a1_in1k"):
        timm_models.create("resnet50.nothing")


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"'test_resnet' with classes=3: .*classes"):
        tiny(classes=3)


def test_an_impossible_argument_is_named() -> None:
    with pytest.raises(ArgumentError, match="img_size=7, class_token=False"):
        timm_models.create("vit_tiny_patch16_224", pretrained=False, img_size=7, class_token=False)


# --- weights from afar ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError("cannot find the requested files\nin the cache"),
        FileNotFoundError("no such entry"),
        ConnectionError("refused"),
        RuntimeError("No pretrained weights exist for test_resnet. Use `pretrained=False`."),
        pickle.UnpicklingError("truncated"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_weights_out_of_reach_ask_for_a_file(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> nn.Module:
        raise error

    monkeypatch.setattr(timm, "create_model", failing)
    message = rf"'test_resnet' cannot be had \({type(error).__name__}: .*checkpoint='.*--checkpoint"
    with pytest.raises(ModelError, match=message) as caught:
        timm_models.create(TINY)
    assert "\n" not in str(caught.value)


def test_other_failures_of_timm_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timm, "create_model", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        timm_models.create(TINY, pretrained=False)


def test_a_checkpoint_makes_fetching_needless(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **k: (asked.append(pretrained), real(*a, **k))[1])
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    timm_models.create(TINY, checkpoint=tmp_path / "w.safetensors", num_classes=5)
    assert asked == [False]


# --- weights from a file -------------------------------------------------------------------------

WRAPPED = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "lr": 0.1},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_only_files(source: nn.Module, tmp_path: Path, wrap: object) -> None:
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")  # type: ignore[operator]
    assert same_weights(timm_models.create(TINY, checkpoint=tmp_path / "w.pth", num_classes=5), source)


def test_safetensors_given_as_text(source: nn.Module, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert same_weights(timm_models.create(TINY, checkpoint=str(tmp_path / "w.safetensors"), num_classes=5), source)


def test_half_precision_is_widened(source: nn.Module, tmp_path: Path) -> None:
    halved = {name: v.half() if v.is_floating_point() else v for name, v in source.state_dict().items()}
    save_file(halved, tmp_path / "w.safetensors")
    model = timm_models.create(TINY, checkpoint=tmp_path / "w.safetensors", num_classes=5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.fc.weight, source.fc.weight.half().float())  # type: ignore[union-attr]


def test_batch_counters_may_be_missing(source: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in source.state_dict().items() if "num_batches_tracked" not in name}
    save_file(state, tmp_path / "w.safetensors")
    assert same_weights(timm_models.create(TINY, checkpoint=tmp_path / "w.safetensors", num_classes=5), source)


def test_other_shapes_are_named(source: nn.Module, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit ResNet: .*fc\.weight.*\[5, .*\[7, .*num_classes="):
        tiny(num_classes=7, checkpoint=tmp_path / "w.safetensors")


def test_other_names_are_named_the_first_of_them(source: nn.Module, tmp_path: Path) -> None:
    state = source.state_dict()
    state["stem.weight"] = state.pop("conv1.0.weight")
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight missing from the file; stem\.weight unknown"):
        tiny(num_classes=5, checkpoint=tmp_path / "one.safetensors")
    save_file({f"w{i}": torch.zeros(1) for i in range(999)}, tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match=r"w0, w1, w10, .*\[...\] unknown to the model") as caught:
        tiny(checkpoint=tmp_path / "many.safetensors")
    assert len(str(caught.value)) < 900


def test_averaged_weights_of_a_training_run_come_first(source: nn.Module, tmp_path: Path) -> None:
    raw = {name: torch.zeros_like(value) for name, value in source.state_dict().items()}
    content = {"state_dict": raw, "state_dict_ema": source.state_dict(), "args": argparse.Namespace(lr=1), "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    assert same_weights(tiny(num_classes=5, checkpoint=tmp_path / "w.pth"), source)


class Runs:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {}, "x": Runs(tmp_path / "made")}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than weights: .*mkdir.* It was not executed"):
        tiny(checkpoint=tmp_path / "w.pth")
    assert not (tmp_path / "made").exists()


def test_a_pickle_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": nn.Linear(1, 1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear. It was not executed"):
        tiny(checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello world" * 10, b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip"]
)
def test_a_damaged_file_is_named(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"w{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.\w+ (cannot be read as weights|holds more than weights)"):
        tiny(checkpoint=path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"epoch": 1}, "a dict with the keys: epoch"),
        ({}, "a dict with the keys: none"),
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
    ],
)
def test_a_file_without_weights_is_described(tmp_path: Path, content: object, what: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"does not hold weights: .*got {what}"):
        tiny(checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"There is no checkpoint file"):
        tiny(checkpoint=tmp_path / name)


# --- recipes -------------------------------------------------------------------------------------


def rebuilt(model: nn.Module) -> nn.Module:
    found = timm_models.recipe(model)
    assert found is not None
    return timm_models.build(timm_models.Recipe(**json.loads(json.dumps(asdict(found)))))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


MADE = {
    "defaults": ("test_resnet", {}),
    "channels and classes": ("test_resnet", {"in_chans": 1, "num_classes": 3}),
    "tagged": ("test_vit.r160_in1k", {}),
    "resized": ("test_vit", {"img_size": (48, 32), "patch_size": 8, "depth": 3, "num_classes": 4, "in_chans": 2}),
    "no classifier": ("test_vit", {"num_classes": 0}),
    "pooling": ("test_vit", {"global_pool": "avg"}),
    "windows": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1), "embed_dim": 24}),
    "dropout": ("test_resnet", {"drop_rate": 0.1}),
    "overlay": ("test_resnet", {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3), "input_size": (3, 64, 64)}}),
}


@pytest.mark.parametrize("make", [timm_models.create, timm.create_model], ids=["ours", "timm's"])
@pytest.mark.parametrize(("name", "arguments"), MADE.values(), ids=MADE.keys())
def test_a_recipe_makes_the_same_model(make: object, name: str, arguments: dict[str, object]) -> None:
    if make is timm.create_model and not hasattr(timm.models, "get_model_args"):
        pytest.skip("this timm does not record the arguments of create_model")
    model = make(name, pretrained=False, **arguments)  # type: ignore[operator]
    other = rebuilt(model)
    other.load_state_dict(model.state_dict())
    assert shapes(other) == shapes(model)
    assert timm_models.image_size(other) == timm_models.image_size(model)
    assert timm_models.data_config(other) == timm_models.data_config(model)
    x = torch.randn(2, *timm_models.image_size(model))  # type: ignore[misc]
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


def test_a_recipe_can_be_read_without_timms_records() -> None:
    model = timm.create_model("test_vit", img_size=32, in_chans=1, num_classes=6)
    for name in ("_model_args", "_traits"):
        model.__dict__.pop(name, None)
    assert shapes(rebuilt(model)) == shapes(model)


def test_a_recipe_sees_a_classifier_replaced_afterwards() -> None:
    by_timm, by_hand = tiny(num_classes=5), tiny(num_classes=5)
    by_timm.reset_classifier(9)  # type: ignore[operator]
    by_hand.fc = nn.Linear(by_hand.num_features, 9)  # type: ignore[arg-type]
    for model in (by_timm, by_hand):
        assert timm_models.recipe(model).arguments["num_classes"] == 9  # type: ignore[union-attr]
        assert shapes(rebuilt(model)) == shapes(model)


def test_a_recipe_keeps_the_tag_and_names_only_what_differs() -> None:
    found = timm_models.recipe(timm.create_model("vit_tiny_patch16_224.augreg_in21k"))
    assert found is not None
    assert found.name == "vit_tiny_patch16_224.augreg_in21k"
    assert "pretrained_cfg_overlay" not in found.arguments


def test_a_tag_that_timm_does_not_register_is_left_out() -> None:
    model = tiny()
    model.pretrained_cfg = model.pretrained_cfg | {"tag": "mine", "mean": (0.1, 0.2, 0.3)}  # type: ignore[operator]
    found = timm_models.recipe(model)
    assert found is not None
    assert found.name == "test_resnet"
    assert found.arguments["pretrained_cfg_overlay"] == {"mean": [0.1, 0.2, 0.3]}
    assert timm_models.data_config(rebuilt(model))["mean"] == (0.1, 0.2, 0.3)


def test_a_copy_keeps_its_recipe() -> None:
    import copy

    model = tiny(num_classes=4)
    assert timm_models.recipe(copy.deepcopy(model)) == timm_models.recipe(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 1))], ids=["layer", "sequence"])
def test_no_recipe_for_other_models(model: nn.Module) -> None:
    assert timm_models.recipe(model) is None
    assert timm_models.image_size(model) is None
    with pytest.raises(ModelError, match=r"carries no pretrained_cfg.*DataLoader"):
        timm_models.data_config(model)


def test_an_argument_that_json_cannot_hold_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert timm_models.recipe(tiny(act_layer=nn.SiLU)) is None
    assert "act_layer" in caplog.text


def test_a_wrong_recipe_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match="no model named"):
        timm_models.build(timm_models.Recipe("resnet_of_tomorrow", {}))


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("test_resnet", {}, (3, 160, 160)),
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("test_vit", {"img_size": 32, "in_chans": 4}, (4, 32, 32)),
        ("test_vit", {"img_size": (32, 64)}, (3, 32, 64)),
        ("efficientformerv2_s0", {"img_size": 64}, (3, 64, 64)),
        ("tresnet_m", {"in_chans": 1}, (1, 224, 224)),
    ],
)
def test_image_size(name: str, arguments: dict[str, object], expected: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        assert timm_models.image_size(timm_models.create(name, pretrained=False, **arguments)) == expected


def test_image_size_follows_a_resize() -> None:
    model = timm_models.create("test_vit", pretrained=False)
    model.set_input_size(img_size=64)  # type: ignore[operator]
    assert timm_models.image_size(model) == (3, 64, 64)
    assert shapes(rebuilt(model)) == shapes(model)


def test_image_size_follows_a_replaced_first_convolution() -> None:
    model = tiny()
    model.conv1[0] = nn.Conv2d(1, 16, 3)  # type: ignore[index,operator]
    assert timm_models.image_size(model) == (1, 160, 160)


def test_data_config_is_timms_where_nothing_changed() -> None:
    model = timm.create_model("test_vit")
    assert timm_models.data_config(model) == timm.data.resolve_model_data_config(model)


def test_data_config_averages_over_channels() -> None:
    config = timm_models.data_config(timm_models.create("resnet10t", pretrained=False, in_chans=1))
    assert config["input_size"] == (1, 176, 176)
    assert config["mean"] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert config["std"] == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))


def test_a_model_that_looks_for_its_classifier_in_what_took_its_place_has_none() -> None:
    model = timm_models.create("shvit_s1", pretrained=False, num_classes=0)
    with pytest.raises(AttributeError):  # head.l, but the head is an Identity
        model.get_classifier()
    assert layers.classifiers(model) == ()
    assert timm_models.count_classes(model) == 0
    assert layers.classifiers(timm_models.create("test_vit", pretrained=False)) == ("head",)
