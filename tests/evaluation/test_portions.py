"""Out of memory: smaller portions, the same scores, and words where even one image is too much."""

from __future__ import annotations

import logging
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from test_resume import own
from torch import Tensor, nn

from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch
from jbrprune.errors import MemoryLimitError
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.evaluation.portions import Portions, is_out_of_memory
from jbrprune.structure.discovery import layer_groups

IMAGES = cases.images(22, 16)


class Limited(nn.Module):
    """Runs out of memory above some images, in the forward or, later, in the backward."""

    def __init__(self, most: int, error: Callable[[], Exception], late: bool) -> None:
        super().__init__()
        self.net, self.most, self.error, self.late = own().double(), most, error, late
        self.met = 0

    def forward(self, x: Tensor) -> Tensor:
        def fail(*_: Any) -> None:
            self.met += 1
            raise self.error()

        out = self.net.bn(self.net.stem(x)).relu()  # type: ignore[operator]
        if len(x) > self.most and not (self.late and torch.is_grad_enabled() and out.requires_grad):
            fail()
        if len(x) > self.most:
            out.register_hook(fail)  # type: ignore[arg-type]
        out = out + self.net.b(self.net.bn1(self.net.a(out)).relu())  # type: ignore[operator]
        return self.net.fc(out.relu().mean((2, 3)))  # type: ignore[operator]


ERRORS: dict[str, Callable[[], Exception]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
}


def units(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    groups = [group for group in layer_groups(model) if group.side("in")]
    return dict(Relevance(**options)(model, IMAGES, groups, batch_size=11).values())


def weights(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return weight_scores(model, IMAGES, Relevance(**{"objective": "projection"} | options), batch_size=11).values()


CASES: dict[str, tuple[Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "units": (units, {}),
    "random signs": (units, {"objective": "projection"}),
    "batched": (units, {"statistic": "batched", "batch": 7}),
    "weights": (weights, {}),
    "weights, batched": (weights, {"statistic": "batched", "batch": 7}),
    "weights, signed": (weights, {"statistic": "signed", "objective": "margin"}),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_scores_are_those_of_whole_batches(case: str, late: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the portion that failed is left in the sums, also where the backward had begun to add."""
    work, options = CASES[case]
    expected = work(Limited(100, ERRORS["cpu"], late), **options)
    model = Limited(3, ERRORS["cpu"], late)
    with caplog.at_level(logging.WARNING):
        found = work(model, **options)
    assert model.met >= 2  # 11, 5 and no more: 2 is remembered
    assert "going on with 2" in caplog.text
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ERRORS)
def test_predictions_in_portions(kind: str) -> None:
    batches = [Batch(IMAGES[:11]), Batch(IMAGES[11:])]
    expected = compute_logits(Limited(100, ERRORS[kind], False), batches)
    model = Limited(4, ERRORS[kind], False)
    for found, wanted in zip(compute_logits(model, batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert model.met == 2


def test_a_single_image_that_is_too_much() -> None:
    with pytest.raises(
        MemoryLimitError, match=r"Memory ran out with a single image: CUDA out of memory.*smaller images"
    ):
        compute_logits(Limited(0, ERRORS["accelerator"], False), [Batch(IMAGES)])


def test_sums_that_cannot_be_undone_are_not_used() -> None:
    """As many images went through before, so nothing was marked: the next failure may have left half a sum."""
    portions, calls = Portions(), 0

    def work(part: Batch, start: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ERRORS["cpu"]()

    portions.run(Batch(IMAGES), work, lambda: lambda: None)
    with pytest.raises(MemoryLimitError, match="as many went through before"):
        portions.run(Batch(IMAGES), work, lambda: lambda: None)


def test_other_errors_are_passed_on() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for the matmul primitive"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN without scratch memory


# --- memory that really runs out ------------------------------------------------------------------

MEBIBYTES = 100
"""Too little for sixteen images (150), enough for eight (80)."""
QUIET_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""What is freed is free: no holes that a later tensor fits into, or does not, by chance."""
LARGE = cases.images(16, 64)


def wide() -> nn.Module:
    """Its second convolution unfolds: 7 MiB for an image of 64 x 64 in float64."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    second = [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return cases.randomised(nn.Sequential(*first, *second, nn.Linear(24, 4)))


def of_units(images: Tensor) -> dict[str, Tensor]:
    model = wide()
    groups = [group for group in layer_groups(model) if group.side("in")]
    return dict(Relevance()(model, images, groups, batch_size=16).values())


def of_weights(images: Tensor) -> dict[str, Tensor]:
    return weight_scores(wide(), images, batch_size=16).values()


def of_predictions(images: Tensor) -> dict[str, Tensor]:
    return dict(enumerate(compute_logits(wide(), [Batch(images)])))  # type: ignore[arg-type]


def with_little_memory(work: Callable[[Tensor], dict[str, Tensor]], path: Path) -> None:
    """Saves what a process with so much more memory than it has gives, and what it logs.

    One image goes through first: libraries and threads take their memory before the limit.
    """
    torch.set_num_threads(1)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("jbrprune.evaluation.portions").addHandler(handler)
    work(LARGE[:1])
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (MEBIBYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    torch.save((work(LARGE), said), path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of the address space are Linux's")
@pytest.mark.parametrize("work", [of_units, of_weights, of_predictions])
def test_memory_that_really_runs_out(
    work: Callable[[Tensor], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET_MALLOC.items():
        monkeypatch.setenv(name, value)
    # Not a fork: what the tests before gave back to the allocator would be memory beyond the limit.
    child = multiprocessing.get_context("spawn").Process(target=with_little_memory, args=(work, tmp_path / "found"))
    child.start()
    child.join()
    assert child.exitcode == 0
    found, said = torch.load(tmp_path / "found")
    assert "Memory ran out with 16 images at once" in said[0]
    assert is_out_of_memory(RuntimeError(said[0]))  # of the allocator, or of oneDNN where it needs scratch memory
    for name, value in work(LARGE).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)
