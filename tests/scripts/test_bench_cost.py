"""The benchmark of what criteria cost: ratios within a round, lines, failures, resuming."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import bench_cost
import bench_latency
import common
import pytest
import timm
import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch
from jbrprune.structure.discovery import find_groups

TINY = ["--model", "test_resnet", "--model-arg", "zero_init_last=false", "--data", "digits", "--images", "8"]


def test_the_yardstick_is_a_whole_training_step(fingerprint) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    seen: list[Tensor] = []
    handles = [module.weight.register_hook(seen.append) for module in (model[1], model[3])]
    batches = [Batch(torch.randn(2, 1, 2, 2), torch.tensor([0, 1])), Batch(torch.randn(1, 1, 2, 2), torch.tensor([1]))]
    before = fingerprint(model)
    bench_cost.train_once(model, batches)
    assert sorted(tuple(gradient.shape) for gradient in seen) == [(2, 3), (2, 3), (3, 4), (3, 4)]  # two batches
    assert fingerprint(model) == before
    for handle in handles:
        handle.remove()


def test_the_yardstick_runs_where_the_model_is() -> None:
    """Batches stay on the CPU; every pass takes them to the model's device."""
    seen: list[torch.device] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, device="meta"))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.device))
    bench_cost.train_once(model, [Batch(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))])
    assert seen == [torch.device("meta")]


def test_ratios_are_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, the second on a machine that is twice as slow, the yardstick drifting within each."""
    clock = iter([1.0, 6.0, 0.5, 3.0, 2.0, 12.0, 1.0, 6.0])
    monkeypatch.setattr(bench_cost, "time_step", lambda step: next(clock))
    found, training = bench_cost.time_in_rounds({"l1": print, "random": print}, print, 2)
    assert found == {"l1": [(3.0, 6.0), (3.0, 12.0)], "random": [(0.25, 0.5), (0.25, 1.0)]}
    assert training == 3.0  # the median of 2 and 4


@pytest.mark.parametrize(
    "name", ["published", "weights/magnitude", "weights/jbr_projection", "prune", "tp_prune", "tpv", "tpv_published"]
)
def test_what_is_no_criterion_of_channels_runs_and_leaves_the_model(name: str, fingerprint) -> None:
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1, zero_init_last=False).eval()
    batches = [Batch(torch.randn(12, 1, 32, 32), torch.arange(12) % 4)]
    before = fingerprint(model)
    bench_cost.make_step(name, model, batches, ())()
    assert fingerprint(model) == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_peaks_of_memory(tmp_path: Path) -> None:
    out = tmp_path / "memory.jsonl"
    bench_cost.main([*TINY, "--rounds", "1", "--threads", "1", "--memory", "--what", "l1", "jbr", "--out", str(out)])
    for line in common.lines(out):
        assert 0 <= line["peak_mib"] == pytest.approx(line["peak_ratio"] * line["training_peak_mib"])


def test_lines_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "criteria.jsonl"
    arguments = [*TINY, "--rounds", "1", "--threads", "1", "--out", str(out)]
    names = ["--what", "l1", "taylor", "jbr_published"]  # random weights are confident about nothing
    bench_cost.main([*arguments, *names])
    text = capsys.readouterr().out
    lines = {line["criterion"]: line for line in common.lines(out)}
    assert set(lines) == {"l1", "taylor", "jbr_published"}
    assert "No sample was left" in lines["jbr_published"]["failed"]
    assert lines["taylor"]["labels"]
    for name in ("l1", "taylor"):
        line = lines[name]
        assert line["ratio"] == pytest.approx(line["seconds"] / line["training_seconds"])
        assert {"hardware", "threads", "versions", "commit", "command", "images", "batch_size"} <= line.keys()
        assert f"| {name} | {'yes' if name == 'taylor' else ''} | {line['ratio']:.2f}" in text
    assert "jbr_published: DataError" in text
    before = out.read_bytes()
    bench_cost.main([*arguments, "--what", "l1", "taylor"])  # all there
    assert out.read_bytes() == before
    with pytest.raises(SystemExit, match="2"):
        bench_cost.main([*arguments, "--what", "tailor"])
    assert "invalid choice: 'tailor'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="Say which data"):
        bench_cost.main(["--model", "test_resnet", "--out", str(out)])


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # torch-pruning's
def test_all_is_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cost, "MODELS", ("test_vit",))
    whole = {"latency=0.5": None, "half": {"macs": 0.9}, "2:4": bench_latency.SETTINGS["2:4"]}  # it is too small for .5
    monkeypatch.setattr(bench_latency, "SETTINGS", whole)
    compiled: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(1) or model)
    monkeypatch.setattr(bench_latency, "to_semi_structured", lambda model: None)  # only a GPU has these kernels
    few = ["--images", "20", "--size", "160", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    bench_cost.main([*few, "--all", "--out", str(tmp_path / "out.jsonl")])
    lines = common.lines(tmp_path / "out.jsonl")
    assert not [line["failed"] for line in lines if "failed" in line]
    assert {(line["model"], line["criterion"], line["autocast"]) for line in lines} == {
        *itertools.product(bench_cost.MODELS, bench_cost.PASSES, (False, True)),
        *itertools.product(bench_cost.MODELS, bench_cost.WHOLE, (False,)),
    }
    parts = next(line["parts"] for line in lines if line["criterion"] == "prune")
    assert 0 < parts["scoring"] + parts["repair"] <= parts["total"]
    shown = capsys.readouterr().out
    assert f"{parts['total'] / parts['scoring']:.2f} times its scoring" in shown
    assert "| test_vit | 20 | jbr, bfloat16 |" in shown
    times = common.lines(tmp_path / "out_latency.jsonl")
    assert not [line["failed"] for line in times if "failed" in line]
    cells = [*itertools.product(("eager",), (1, 32, 128)), ("compile", 32)]
    assert {(line["model"], line["setting"], (line["mode"], line["batch"])) for line in times} == set(
        itertools.product(bench_cost.MODELS, ("half", "2:4"), cells)
    )
    assert len(compiled) == 2 * 2  # dense and pruned, of both settings


def test_passes_in_bfloat16() -> None:
    """The yardstick and relevance are computed in bfloat16; the model stays in float32."""
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1, zero_init_last=False).eval()
    seen: list[torch.dtype] = []
    model.conv1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    batches = [Batch(torch.randn(4, 1, 32, 32), torch.arange(4))]
    groups = find_groups(copy.deepcopy(model), batches[0].images).groups
    for name in (bench_cost.YARDSTICK, *bench_cost.PASSES):
        seen.clear()
        bench_cost.make_step(name, model, batches, groups, autocast=torch.bfloat16)()
        assert torch.bfloat16 in seen, name
        seen.clear()
        bench_cost.make_step(name, model, batches, groups)()
        assert set(seen) == {torch.float32}, name
