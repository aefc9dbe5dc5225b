"""A model that was pruned, saved and loaded is plain PyTorch to everybody else. What is absent is skipped."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import timm
import torch
from torch import Tensor, nn

import jbrprune

IMAGES = cases.images(24, 32).float()
NAMES = ("test_resnet", "test_vit")
FOREIGN = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Pruned, saved, loaded."""
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2} if request.param == "test_vit" else {}
    dense = cases.randomised(timm.create_model(request.param, num_classes=4, **options)).float()
    result = jbrprune.prune(dense, IMAGES, macs=0.7, steps=1, progress=False)
    path = tmp_path_factory.mktemp("saved") / "m"
    result.save(path)
    return jbrprune.load(path)


@pytest.fixture
def model(loaded: nn.Module) -> nn.Module:
    return copy.deepcopy(loaded)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES[:2])


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@FOREIGN
def test_torch_export(model: nn.Module) -> None:
    exported = torch.export.export(model, (IMAGES[:2],))
    assert_close(outputs(exported.module()), outputs(model))


@FOREIGN
@pytest.mark.slow
def test_torch_compile(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, or, where there is no compiler for C++, traced and run by the same graphs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what another process left half-written
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
        backend = "inductor"
    except Exception:  # whatever the search for a compiler raises
        backend = "aot_eager"
    assert_close(outputs(torch.compile(model, backend=backend)), outputs(model))  # type: ignore[arg-type]


@FOREIGN
@pytest.mark.slow
def test_onnx(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (IMAGES[:2],), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:2].numpy()})
    assert_close(torch.from_numpy(found), outputs(model))


def step(model: nn.Module, backward=Tensor.backward) -> float:
    """One step of a plain loop; the loss before it."""
    labels = torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(model(IMAGES[:8]), labels)
    optimizer.zero_grad()
    backward(loss)
    optimizer.step()
    return float(loss.detach())


def test_a_plain_loop_trains_it(model: nn.Module) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.train()
    assert step(model) > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()) if b.grad is not None and b.grad.any())
    assert all(parameter.grad is not None for parameter in model.parameters())


@FOREIGN
def test_accelerate_trains_it(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = copy.deepcopy(model).train()
    prepared = accelerator.prepare(model.train())
    assert step(prepared, accelerator.backward) == pytest.approx(step(plain), rel=1e-5)
    for (name, one), other in zip(accelerator.unwrap_model(prepared).named_parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@FOREIGN
def test_ddp_trains_it(model: nn.Module, one_rank: None) -> None:
    plain = copy.deepcopy(model).train()
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    assert step(wrapped) == pytest.approx(step(plain), rel=1e-5)
    for one, other in zip(wrapped.module.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@FOREIGN
def test_torchao_quantizes_it(model: nn.Module) -> None:
    """Weights of the linear layers in int8: close, and really quantized."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    expected = outputs(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    kinds = {type(m.weight).__name__ for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds - {"Parameter"}
    found = outputs(model)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.05
