"""Wrappers are taken off, and said; what cannot be pruned as it is is refused with the call that helps."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from jbrprune import info, prune, score, sparsify
from jbrprune.budgets.budget import Floors
from jbrprune.errors import ModelError

IMAGES = cases.images(12, 16).float()


def net(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3) if first is None else first,
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def run(model: nn.Module, **options: Any) -> Any:
    return prune(model, IMAGES, macs=0.7, steps=1, floors=Floors(channels=2), progress=False, **options)


def _compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "wrap", [_compile, nn.DataParallel, AveragedModel, ModelEmaV3, lambda model: nn.DataParallel(_compile(model))]
)
def test_what_is_inside_of_a_wrapper_is_pruned_and_said(
    wrap: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain, wrapped = run(net()), wrap(net())
    result = run(wrapped)
    kind = type(wrapped).__name__
    assert type(result.model) is nn.Sequential
    assert result.report.removed == plain.report.removed
    assert f"{kind} is a wrapper: the" in caplog.text
    assert [note for note in result.report.notes if note.startswith(f"The model was wrapped in {kind};")]
    assert not [note for note in plain.report.notes if "wrapped" in note]
    assert score(wrapped, IMAGES, progress=False).groups[0].name == "0"
    assert info(wrapped, IMAGES).rows[0].group == "0"


def test_inside_of_ddp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With one process, which is not its business: the run asks torch.distributed nothing."""
    caplog.set_level(logging.INFO)
    plain = run(net())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        result = run(wrapped)
        assert run(wrapped, inplace=True).model is wrapped.module
    finally:
        torch.distributed.destroy_process_group()
    assert type(result.model) is nn.Sequential
    assert result.report.removed == plain.report.removed
    assert "DistributedDataParallel is a wrapper: the Sequential inside is worked on." in caplog.text
    assert [note for note in result.report.notes if "was wrapped in DistributedDataParallel" in note]


def test_inside_of_a_wrapper_in_place() -> None:
    wrapped = nn.DataParallel(net())
    assert run(wrapped, inplace=True).model is wrapped.module
    assert wrapped(IMAGES).shape == (12, 4)


def test_a_model_that_is_compiled_in_place() -> None:
    model = net()
    model.compile(backend="eager")
    model[2].compile(backend="eager")
    before = model._compiled_call_impl
    assert run(model).report.removed == run(net()).report.removed
    assert model._compiled_call_impl is before


def _inference() -> nn.Module:
    with torch.inference_mode():
        return net()


def _meta() -> nn.Module:
    with torch.device("meta"):
        return net()


def _normed(norm: Callable[..., nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return net(norm(nn.Conv2d(3, 16, 3)))


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net().eval(), IMAGES)


def _part_scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net(torch.jit.script(nn.Conv2d(3, 16, 3)))


def _dynamic() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)


def _prepared() -> nn.Module:
    model = net().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


def _observed() -> nn.Module:
    model = net().eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    return torch.ao.quantization.prepare(model)


def _torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = net()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "inference": (_inference, r"0.weight was made in inference mode: pass copy.deepcopy\(model\)"),
    "meta": (_meta, r"0.weight is on the meta device .* model.to_empty\(device='cpu'\)"),
    "lazy": (lambda: net(nn.LazyConv2d(16, 3)), r"0.weight has no shape yet: .* model\(images\)"),
    "weight norm": (lambda: _normed(torch.nn.utils.weight_norm), "0 .Conv2d. .*torch.nn.utils.remove_weight_norm"),
    "spectral norm": (lambda: _normed(torch.nn.utils.spectral_norm), "0 .Conv2d. .*utils.remove_spectral_norm"),
    "traced": (_scripted, "The model .* is TorchScript"),
    "scripted part": (_part_scripted, "0 .* is TorchScript"),
    "compiled part": (lambda: net(_compile(nn.Conv2d(3, 16, 3))), "0 .OptimizedModule. .* = model.0._orig_mod"),
    "dynamic": (_dynamic, "6 .Linear. is quantized"),
    "quantization-aware": (_prepared, r"is quantized, or prepared for it|before prepare\(\) or prepare_qat"),
    "observed": (_observed, r"before prepare\(\) or prepare_qat"),
    "torchao": (_torchao, "weight is a .*, quantized or sharded"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_cannot_be_pruned_is_refused_with_the_call_that_helps(name: str) -> None:
    make, message = UNUSUAL[name]
    for call in (run, lambda model: sparsify(model, IMAGES, sparsity=0.5), lambda model: info(model, IMAGES)):
        with pytest.raises(ModelError, match=message):
            call(make())


def test_the_advice_helps() -> None:
    model = _normed(torch.nn.utils.weight_norm)
    torch.nn.utils.remove_weight_norm(model[0])
    lazy = net(nn.LazyConv2d(16, 3))
    lazy(IMAGES)
    empty = _meta().to_empty(device="cpu")
    empty.load_state_dict(net().state_dict())
    for usable in (model, copy.deepcopy(_inference()), lazy, empty):
        assert run(usable).report.kept <= 0.7


def test_quantizable_models_and_parametrizations_are_not_refused() -> None:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), net(), torch.ao.quantization.DeQuantStub())
    assert run(model).report.kept <= 0.7
    torch.nn.utils.parametrizations.weight_norm(model[1][0])
    assert "weight norm" not in str(info(model, IMAGES).skipped)
    assert info(timm.create_model("test_resnet", num_classes=4)).rows
