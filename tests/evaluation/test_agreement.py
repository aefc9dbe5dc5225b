"""Logits, agreement, latency, size: against values worked out by hand."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch
from jbrprune.errors import DataError, MemoryLimitError, ModelError, NonFiniteError
from jbrprune.evaluation import agreement as measure
from jbrprune.evaluation.agreement import Agreement


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def net(third: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        third or nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 6),
    ).to(dtype)


def images(number: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that measuring must leave as it was."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "values": [value.tolist() for value in model.state_dict().values()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def unusual(model: nn.Module) -> nn.Module:
    """A state that a careless restore would flatten."""
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones_like(model[5].bias)
    return model


# --- compute_logits -------------------------------------------------------------------------------


def test_compute_logits_is_the_eval_forward_batch_by_batch():
    model, x = net(), images(5)
    out = measure.compute_logits(model, [Batch(x[:2]), Batch(x[2:])])
    assert [tuple(part.shape) for part in out] == [(2, 6), (3, 6)]
    assert all(part.dtype == torch.float64 and not part.requires_grad for part in out)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(out), copy.deepcopy(model).eval()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_logits_widens_to_float32(dtype):
    (out,) = measure.compute_logits(net(dtype=dtype), [Batch(images(dtype=dtype))])
    assert out.dtype == torch.float32


def test_compute_logits_leaves_the_model_as_it_was():
    model = unusual(net())
    before = state_of(model)
    measure.compute_logits(model, [Batch(images())])
    assert state_of(model) == before


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_compute_logits_restores_also_after_an_exception(error):
    def fail(x):
        torch.rand(1)
        raise error

    model = unusual(net(Apply(fail)))
    before = state_of(model)
    with pytest.raises(type(error)):
        measure.compute_logits(model, [Batch(images())])
    assert state_of(model) == before


def test_compute_logits_refuses_another_number_of_rows():
    model = nn.Sequential(nn.Flatten(), Apply(lambda x: x.reshape(-1, 4)))
    with pytest.raises(ModelError, match="Batch 0: 3 images gave 81 rows"):
        measure.compute_logits(model, [Batch(images())])


def test_compute_logits_shows_progress_only_when_asked_and_on_a_terminal(capsys, monkeypatch):
    measure.compute_logits(net(), [Batch(images())], progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measure.compute_logits(net(), [Batch(images())])
    assert capsys.readouterr().err == ""
    measure.compute_logits(net(), [Batch(images())], progress=True)
    assert "logits" in capsys.readouterr().err


# --- NaN and Inf --------------------------------------------------------------------------------


def divide_by_zero(x: Tensor) -> Tensor:
    return x / torch.zeros_like(x)


def test_compute_logits_names_batch_and_module_that_divides_by_zero():
    model = unusual(net(Apply(lambda x: divide_by_zero(x) if len(x) == 2 else x)))
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"Batch 1: the logits contain NaN.*module '2' \(Apply\)"):
        measure.compute_logits(model, [Batch(images(3)), Batch(images(2))])
    assert state_of(model) == before


def test_the_culprit_is_named_not_its_parent():
    nested = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), Apply(divide_by_zero)), nn.Flatten())
    with pytest.raises(NonFiniteError, match=r"that of module '1\.1' \(Apply\)"):
        measure.raise_nonfinite(nested, images(), "The scores")


def test_a_parent_that_divides_itself_is_named():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.ReLU()

        def forward(self, x):
            return {"logits": [divide_by_zero(self.child(x))]}

    with pytest.raises(NonFiniteError, match=r"that of module '0' \(Parent\)"):
        measure.raise_nonfinite(nn.Sequential(Parent()), images(), "The scores")
    with pytest.raises(NonFiniteError, match=r"that of the model itself \(Parent\)"):
        measure.raise_nonfinite(Parent(), images(), "The scores")


def test_the_second_pass_runs_under_the_autocast_of_the_first():
    class Overflows(nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x.flatten(1), 3e4 * torch.ones(2, 108))

    model, ones = Overflows(), torch.ones(2, 3, 6, 6)
    with pytest.raises(NonFiniteError, match="though every module's output was finite"):
        measure.raise_nonfinite(model, ones, "The scores")
    with pytest.raises(NonFiniteError, match="the model itself"):
        measure.raise_nonfinite(model, ones, "The scores", autocast_dtype=torch.float16)


@pytest.mark.parametrize("error", [NonFiniteError, RuntimeError])
def test_raise_nonfinite_leaves_no_hook(error):
    def fail(x):
        raise RuntimeError("boom")

    model = unusual(net(Apply(divide_by_zero if error is NonFiniteError else fail)))
    before = state_of(model)
    with pytest.raises(error):
        measure.raise_nonfinite(model, images(), "The scores")
    assert state_of(model) == before


def test_compute_logits_blames_the_weight_before_the_module():
    model = net()
    model[5].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"Parameter '5\.weight'"):
        measure.compute_logits(model, [Batch(images())])


def test_compute_logits_blames_the_images_before_the_weights():
    with pytest.raises(NonFiniteError, match="so do the images"):
        measure.compute_logits(net(), [Batch(images() * math.nan)])


def test_raise_nonfinite_when_nothing_is_found_the_second_time():
    with pytest.raises(NonFiniteError, match="The scores contain NaN or Inf, though"):
        measure.raise_nonfinite(net(), images(), "The scores")


def test_check_weights():
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf, math.inf]))
    model.register_buffer("index", torch.arange(3))
    model.register_buffer("flags", torch.tensor([True, False]))
    measure.check_weights(model)
    model[1].running_var[2] = math.inf
    with pytest.raises(NonFiniteError, match=r"Buffer '1\.running_var'"):
        measure.check_weights(model)
    model[1].running_var[2] = 1.0
    model.mask[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"Buffer 'mask'"):
        measure.check_weights(model)
    model[0].bias.data[1] = -math.inf
    with pytest.raises(NonFiniteError, match=r"Parameter '0\.bias'"):
        measure.check_weights(model)


# --- agreement ----------------------------------------------------------------------------------


def test_agreement_by_hand():
    log = math.log
    reference = torch.tensor([[log(0.5), log(0.25), log(0.25)], [0.0, 0.0, log(2.0)]], dtype=torch.float64)
    logits = torch.tensor([[log(0.25), log(0.5), log(0.25)], [0.0, 0.0, log(2.0)]], dtype=torch.float64) + 7.0
    row = measure.agreement(logits, reference, torch.tensor([1, 0]))
    # sample 0: .5 log(.5/.25) + .25 log(.25/.5) + 0 = .25 log 2; sample 1: equal up to a constant
    assert row.kl == pytest.approx(0.25 * log(2) / 2, abs=1e-15)
    assert (row.images, row.top1, row.top5, row.accuracy, row.dense_accuracy) == (2, 0.5, 1.0, 0.5, 0.0)


def test_kl_is_not_symmetric_and_has_this_direction():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert measure.agreement(q.log(), p.log()).kl == pytest.approx(forward, abs=1e-6)


def test_kl_of_confident_logits_is_finite():
    reference, logits = torch.tensor([[2000.0, 0.0]]), torch.tensor([[0.0, 2000.0]])
    assert measure.agreement(logits, reference).kl == pytest.approx(2000.0)
    assert measure.agreement(reference, reference).kl == 0.0


def slow_top5(logits: Tensor, reference: Tensor) -> float:
    hits = 0
    for row, dense in zip(logits.tolist(), reference.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda k: -row[k])[:5]
        hits += dense.index(max(dense)) in best
    return hits / len(logits)


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 6, 40])
def test_top5_against_sorting(classes):
    generator = torch.Generator().manual_seed(classes)
    logits, reference = torch.randn(2, 50, classes, generator=generator).unbind()
    row = measure.agreement(logits, reference)
    assert row.top5 == slow_top5(logits, reference)
    assert row.top1 <= row.top5
    assert (row.top5 == 1.0) == (classes <= 5)


def test_a_dead_model_does_not_count_as_agreeing():
    reference = torch.eye(20)
    row = measure.agreement(torch.zeros(20, 20), reference)
    assert (row.top1, row.top5) == (1 / 20, 5 / 20)


def test_accuracy_is_none_without_labels():
    row = measure.agreement(torch.eye(3), torch.eye(3))
    assert (row.accuracy, row.dense_accuracy) == (None, None)


@pytest.mark.parametrize(("hits", "number"), [(0, 10), (10, 10), (7, 10), (401, 500), (1, 1), (29, 100)])
def test_interval_is_wilsons(hits, number):
    p, n, z = hits / number, number, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = Agreement(number, p, 1.0, 0.0).interval  # 29 / 100 * 100 is less than 29
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "reference", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), None, DataError, r"\[2, 3\] and \[2, 4\]"),
        (torch.zeros(0, 3), torch.zeros(0, 3), None, DataError, "at least 1"),
        (torch.zeros(3), torch.zeros(3), None, DataError, r"\[N, K\]"),
    ],
)
def test_agreement_refuses(logits, reference, labels, error, message):
    with pytest.raises(error, match=message):
        measure.agreement(logits, reference, labels)


def test_agreement_on_equals_compute_logits_and_compare():
    model, x = net(), images(6)
    reference, labels = torch.randn(6, 6, dtype=torch.float64), torch.arange(6)
    batches = [Batch(x[i : i + 2], labels[i : i + 2], reference[i : i + 2]) for i in (0, 2, 4)]
    expected = measure.agreement(torch.cat(measure.compute_logits(model, batches)), reference, labels)
    assert measure.agreement_on(model, batches) == expected
    unlabelled = [Batch(batch.images, None, batch.reference) for batch in batches[:1]] + batches[1:]
    assert measure.agreement_on(model, iter(unlabelled)).accuracy is None


# --- drop ---------------------------------------------------------------------------------------


def test_the_drop_of_an_accuracy_by_hand():
    reference = torch.eye(2)[[0, 0, 0, 1, 1]]
    logits = torch.eye(2)[[1, 1, 0, 1, 0]]
    drop = measure.measure_drop(logits, reference, torch.tensor([0, 0, 0, 1, 0]))
    assert (drop.of, drop.lost) == ("accuracy", pytest.approx(0.2))  # two lost, one won, of five
    difference = (2.5 - 1.5) / 7
    error = ((2.5 + 1.5 - (2.5 - 1.5) ** 2 / 7) / 49) ** 0.5
    assert drop.high == pytest.approx(difference + 1.959963984540054 * error)
    assert drop.low == pytest.approx(difference - 1.959963984540054 * error)
    chosen = measure.measure_drop(logits, reference, torch.tensor([0, 0, 0, 1, 0]), models=5)
    assert chosen.high == pytest.approx(difference + 2.5758293035489004 * error)  # 99 %


def test_the_drop_of_an_agreement_is_wilsons():
    reference, flips = torch.eye(2)[[0] * 100], 29
    drop = measure.measure_drop(torch.eye(2)[[1] * flips + [0] * (100 - flips)], reference, models=2)
    p, n, z = flips / 100, 100, 2.241402727604947  # 97.5 %
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (drop.of, drop.images, drop.lost, drop.models) == ("agreement", 100, pytest.approx(0.29), 2)
    assert (drop.low, drop.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize(
    ("lost", "allowed", "within"),
    [
        (1, 0.01, True),
        (2, 0.01, False),
        (3, 0.03, True),
        (29, 0.29, True),
        (29, 0.285, False),
        (7, 0.07, True),
        (-1, 0.0, True),
    ],
)
def test_counts_decide_not_rounded_shares(lost, allowed, within):
    """0.29 * 100 is 28.999999999999996, 0.07 * 100 is 7.000000000000001; 28.5 images allow 28."""
    assert measure.Drop("accuracy", 100, lost / 100, 0.0, 1.0, upper=lost / 100).within(allowed) is within


@pytest.mark.parametrize(("one", "other", "n"), [(0, 0, 5), (3, 1, 10), (10, 0, 10), (40, 60, 1000)])
def test_the_paired_interval_adds_half_a_sample_to_every_cell(one, other, n):
    a, b, total = one + 0.5, other + 0.5, n + 2
    error = math.sqrt((a + b) / total - ((a - b) / total) ** 2) / math.sqrt(total)
    for level, z in ((0.95, 1.959963984540054), (0.99, 2.5758293035489004)):
        expected = ((a - b) / total - z * error, (a - b) / total + z * error)
        assert measure.paired_interval(one, other, n, level) == pytest.approx(expected)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 2 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_says_what_to_change(error):
    def fail(x):
        raise error

    model = unusual(net(Apply(fail)))
    before = state_of(model)
    with pytest.raises(MemoryLimitError, match=r"ran out with 3 images at once \(.+\)\. Pass a smaller batch_size="):
        measure.compute_logits(model, [Batch(images(3))])
    assert state_of(model) == before


def test_memory_limits_are_explained_once():
    message = r"^Memory ran out with 2 images at once \(MemoryError\)"
    with (
        pytest.raises(MemoryLimitError, match=message),
        measure.explain_out_of_memory(5),
        measure.explain_out_of_memory(2),
    ):
        raise MemoryError


# --- cost ---------------------------------------------------------------------------------------


def test_size_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert measure.parameters_of(model) == 6 + 2 + 2 + 2
    # running mean and variance in float32, one int64 counter
    assert measure.bytes_of(model) == 4 * 12 + 4 * 4 + 8
    assert measure.bytes_of(model.half()) == 2 * 12 + 2 * 4 + 8


def test_shared_weights_count_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert (measure.parameters_of(model), measure.bytes_of(model)) == (9, 36)
