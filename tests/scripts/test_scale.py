"""The simulation of scale: collectives by hand, messages and memory against real runs, and what must grow or fall."""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import exchanges
import simulate_scale
import workload as workloads
from network import Hardware, Message, overlapped, seconds, sent, total_sent
from phases import Job, Setting, memory, passes, phases

from jbrprune.budgets.cost import count_macs
from jbrprune.criteria.gates import _Watched
from jbrprune.criteria.objectives import OBJECTIVES, Target
from jbrprune.criteria.relevance import Relevance
from jbrprune.structure.discovery import find_groups

IMAGE = (3, 160, 160)
SIMPLE = Hardware(
    peak=1000.0, utilisation=0.5, intra_latency=1.0, intra_bandwidth=10.0, inter_latency=2.0, inter_bandwidth=5.0,
    per_host=4, algorithm="ring",
)  # fmt: skip


@pytest.fixture(scope="module")
def vit() -> workloads.Workload:
    return workloads.workload("test_vit", IMAGE)


@pytest.fixture(scope="module")
def resnet() -> workloads.Workload:
    return workloads.workload("test_resnet", IMAGE)


# --- collectives, by hand -------------------------------------------------------------------------


def test_bytes_of_a_ring_of_four() -> None:
    """120 bytes: pieces of 30 go round twice, 3 times each; or every rank's 30 go round 3 times."""
    assert sent(Message("all_reduce", 120), 4) == 2 * 3 * 30 == 2 * (4 - 1) / 4 * 120
    assert sent(Message("all_gather", 30), 4) == 3 * 30 == (4 - 1) / 4 * 120
    assert 4 * sent(Message("broadcast", 120), 4) == 3 * 120  # three of the four pass it on
    assert all(sent(Message(kind, 120), 1) == 0 for kind in ("all_reduce", "all_gather", "broadcast"))


def test_seconds_of_a_ring_of_four_within_a_host_and_between() -> None:
    assert seconds(Message("all_reduce", 120), 4, SIMPLE) == 6 * (1.0 + 30 / 10)
    assert seconds(Message("all_gather", 30), 4, SIMPLE) == 3 * (1.0 + 30 / 10)
    assert seconds(Message("all_reduce", 120), 6, SIMPLE) == pytest.approx(10 * (2.0 + 20 / 5))  # slowest hop
    assert seconds(Message("broadcast", 120), 4, SIMPLE) == 3 * 1.0 + 120 / 10
    assert seconds(Message("all_reduce", 120), 1, SIMPLE) == 0


def test_a_tree_for_small_messages() -> None:
    tree, best = (replace(SIMPLE, algorithm=name) for name in ("tree", "best"))
    small, large = Message("all_reduce", 1), Message("all_reduce", 10**6)
    assert seconds(small, 64, tree) == 2 * 6 * (2.0 + 1 / 5)
    assert seconds(small, 64, best) == seconds(small, 64, tree) < seconds(small, 64, SIMPLE)
    assert seconds(large, 64, best) == seconds(large, 64, SIMPLE) < seconds(large, 64, tree)


def test_overlap_by_hand() -> None:
    assert overlapped([3.0, 1.0, 2.0], [0.5, 2.0, 4.0]) == 0.5 + 3 + 4 + 2
    assert overlapped([3.0, 1.0], [0.0, 0.0]) == 4.0
    assert overlapped([], []) == 0.0


# --- against the code that it speaks of -----------------------------------------------------------


@pytest.mark.parametrize(("name", "ranks"), [("test_vit", 2), pytest.param("test_resnet", 3, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_real_ranks_send_what_is_simulated(name: str, ranks: int) -> None:
    """Every call of scoring, evaluation, selection, repair and TPV, byte by byte, on every rank."""
    found = list(simulate_scale.compared(name, IMAGE[1], 7, [ranks]))
    assert len(found) == 5 * ranks
    assert {line["phase"]: line["calls"] for line in found}["repair"] > 100
    for line in found:
        assert line["equal"], line
        assert line["bytes"] == line["simulated bytes"]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_kept_bytes_are_those_of_a_real_scoring(name: str, request: pytest.FixtureRequest) -> None:
    """What autograd saves, and what the tape watches, at the moment when the loss is formed."""
    work = request.getfixturevalue(name.removeprefix("test_"))
    model = timm.create_model(name).eval()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def loss(logits: Tensor, target: Target) -> Tensor:
        for found in watched():
            if not any(found is other for other in others):
                note(found.kept[0])
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        return logits.sum(1)

    def watched() -> list[_Watched]:
        return [thing for thing in gc.get_objects() if type(thing) is _Watched]

    sizes: list[int] = []
    groups = find_groups(model, torch.zeros(2, *IMAGE)).groups
    others = watched()  # of passes that failed on purpose in other tests
    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        patch.setitem(OBJECTIVES, "pseudo_label", loss)
        Relevance()(model, torch.randn(1, *IMAGE), groups)
    assert sizes == [sum(work.dense.kept.values())]


def test_operations_are_those_that_are_counted_elsewhere(vit: workloads.Workload, resnet: workloads.Workload) -> None:
    """Forward: two per multiply-accumulate. Backward to the activations: as many again, and no weight gradients."""
    for name, work in (("test_vit", vit), ("test_resnet", resnet)):
        forward = sum(work.dense.forward.values())
        assert forward == 2 * sum(count_macs(timm.create_model(name).eval(), torch.zeros(1, *IMAGE)).values())
        assert 0.7 * forward < work.dense.backward < 1.1 * forward  # none for what lies before the first unit


def test_the_large_vit_by_hand() -> None:
    width, blocks, tokens = 4096, 50, 257
    block = 2 * 2 * width + (4 * width * width + 4 * width) + (8 * width * width + 5 * width)
    rest = 3 * 14 * 14 * width + width + width + tokens * width + 2 * width + 1000 * width + 1000
    model = workloads.meta_model("vit-10b", {})
    assert sum(parameter.numel() for parameter in model.parameters()) == blocks * block + rest
    assert 10.0e9 < blocks * block + rest < 10.1e9


# --- what must grow, and what must fall -----------------------------------------------------------


def settings(work: workloads.Workload, layout: str, **job: int) -> list[Setting]:
    return [Setting(work, Job(layout=layout, **job), ranks, Hardware()) for ranks in (1, 2, 4, 8, 16, 32, 64)]


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_more_ranks_work_less_and_send_more(vit: workloads.Workload, layout: str) -> None:
    found = [phases(setting)[0] for setting in settings(vit, layout)]
    works = [phase.work for phase in found]
    assert works == sorted(works, reverse=True)
    assert works[1] == pytest.approx(works[0] / 2, rel=0.05)
    volumes = [total_sent(phase.messages, 2**k) for k, phase in enumerate(found)]
    assert volumes == sorted(volumes)
    assert volumes[0] == 0


def test_more_ranks_than_batches_are_idle(vit: workloads.Workload) -> None:
    """512 images: 410 score, in 52 batches of 8: 64 ranks have one each, and 128 are no faster."""
    found = list(simulate_scale.limits(vit, Job(), Hardware(peak=1e12, inter_latency=0.0, intra_latency=0.0)))
    assert any(line.startswith("replicated, scoring: worth more ranks up to 64") for line in found), found


def test_shards_hold_less(vit: workloads.Workload) -> None:
    held = [memory(setting)["repair"] for setting in settings(vit, "sharded", shard=64)]
    assert held == sorted(held, reverse=True)
    whole, plain = (memory(Setting(vit, Job(checkpointing=c), 1, Hardware()))["scoring"] for c in (False, True))
    assert plain < whole


def test_sharded_parameters_are_gathered_once_forward_and_once_backward(vit: workloads.Workload) -> None:
    """By hand: blocks twice, the rest once, 3/4 of the bytes from other ranks."""
    setting = Setting(vit, Job(layout="sharded", shard=4), 4, replace(Hardware(), algorithm="ring"))
    found = passes(setting, images=8, rounds=1, backward=1)
    blocks = sum(count for name, count in vit.parameters.items() if name)
    expected = 3 / 4 * 4 * (2 * blocks + vit.parameters[""])
    assert total_sent(found.gathers, 4) == pytest.approx(expected, rel=1e-4)
    operations = 8 * (sum(vit.dense.forward.values()) + vit.dense.backward)
    assert found.work == pytest.approx(operations / setting.hardware.rate)


def test_a_faster_network_is_never_slower(vit: workloads.Workload) -> None:
    for layout in ("replicated", "sharded"):
        slow, fast = (
            [phase.seconds for phase in phases(Setting(vit, Job(layout=layout), 16, Hardware(inter_bandwidth=speed)))]
            for speed in (1e9, 1e11)
        )
        assert all(f <= s for f, s in zip(fast, slow, strict=True))
        assert sum(fast) < sum(slow)


def test_rows_by_rank() -> None:
    """7 images, 4096 // 7 = 585 positions each at most; fewer images than ranks are seen by all, nothing is sent."""
    assert exchanges.rows_by_rank(7, 100, 3) == [300, 200, 200]
    assert exchanges.rows_by_rank(7, 1000, 2) == [4 * 585, 3 * 585]
    assert exchanges.rows_by_rank(2, 10, 3) == []
    assert math.prod(exchanges.rows_by_rank(1, 9999, 1)) == 4096


def test_tables(vit: workloads.Workload, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_scale, "workload", lambda *_, **__: vit)
    monkeypatch.setattr(sys, "argv", ["simulate_scale.py", "--ranks", "1", "2"])
    simulate_scale.main()
    said = capsys.readouterr().out
    assert "| ranks |" in said
    assert "sharded: GB that a rank sends (calls)" in said
