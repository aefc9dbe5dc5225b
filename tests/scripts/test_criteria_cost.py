"""The benchmark of what criteria cost: ratios within a round, lines, failures, resuming."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import bench_criteria
import common

from baselines import CRITERIA
from jbrprune.data.batches import Batch

TINY = ["--model", "test_resnet", "--model-arg", "zero_init_last=false", "--data", "digits", "--images", "8"]


def test_the_yardstick_is_a_whole_training_step(fingerprint) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    seen: list[Tensor] = []
    handles = [module.weight.register_hook(seen.append) for module in (model[1], model[3])]
    batches = [Batch(torch.randn(2, 1, 2, 2), torch.tensor([0, 1])), Batch(torch.randn(1, 1, 2, 2), torch.tensor([1]))]
    before = fingerprint(model)
    bench_criteria.training(model, batches)
    assert sorted(tuple(gradient.shape) for gradient in seen) == [(2, 3), (2, 3), (3, 4), (3, 4)]  # two batches
    assert fingerprint(model) == before
    for handle in handles:
        handle.remove()


def test_the_yardstick_runs_where_the_model_is() -> None:
    """Batches stay on the CPU; every pass takes them to the model's device."""
    seen: list[torch.device] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, device="meta"))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.device))
    bench_criteria.training(model, [Batch(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))])
    assert seen == [torch.device("meta")]


def test_ratios_are_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, the second on a machine that is twice as slow, the yardstick drifting within each."""
    model, batches = nn.Linear(1, 1), [Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long))]
    clock = iter([1.0, 6.0, 0.5, 3.0, 2.0, 12.0, 1.0, 6.0])
    monkeypatch.setattr(bench_criteria, "timed", lambda step: next(clock))
    monkeypatch.setattr(bench_criteria, "training", lambda *_: None)
    for name in ("l1", "random"):
        monkeypatch.setitem(CRITERIA, name, lambda *_, **__: None)
    found = bench_criteria.measured(model, batches, (), ["l1", "random"], 2)
    assert found["found"] == {"l1": [(3.0, 6.0), (3.0, 12.0)], "random": [(0.25, 0.5), (0.25, 1.0)]}
    assert found["training"] == 3.0  # the median of 2 and 4


def test_lines_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "criteria.jsonl"
    arguments = [*TINY, "--rounds", "1", "--threads", "1", "--out", str(out)]
    names = ["--criterion", "l1", "taylor", "jbr_published"]  # random weights are confident about nothing
    bench_criteria.main([*arguments, *names])
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
    bench_criteria.main([*arguments, "--criterion", "l1", "taylor"])  # all there
    assert out.read_bytes() == before
    with pytest.raises(SystemExit, match="did you mean 'taylor'"):
        bench_criteria.main([*arguments, "--criterion", "tailor"])
    with pytest.raises(SystemExit, match="Say which data"):
        bench_criteria.main(["--model", "test_resnet", "--out", str(out)])
