"""What every pruning run notes of itself: time, agreement, cost, versions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jbrprune.budgets.cost import count_macs
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.data.batches import Batch
from jbrprune.evaluation.agreement import Agreement, agreement_on, bytes_of, parameters_of
from jbrprune.evaluation.latency import describe_hardware, time_in_turns
from jbrprune.pruning.calibration import FEWEST_TO_HOLD_BACK, Calibration
from jbrprune.repair.repair import Outcome, Targets, repair_model
from jbrprune.report.records import Report, Size, StepRow, plain, record
from jbrprune.structure.groups import Axis


@dataclass(eq=False)
class Clock:
    """Seconds spent on each part of the work.

    Attributes:
        seconds: Part -> seconds.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


class Underway(Protocol):
    """A model on its way, as `mend` finds and leaves it.

    Attributes:
        model: Has just lost something.
        targets: What repairs aim at; None where nothing is to be repaired, or without images to check it on.
        unrepaired: Held-out agreement at the last stop, before its repair.
        repaired: The same, after it.
        clock: Time spent on each part of the work.
    """

    model: nn.Module
    targets: Targets | None
    unrepaired: Agreement | None
    repaired: Agreement | None
    clock: Clock


def mend(
    state: Underway,
    images: Calibration,
    kept: Mapping[Axis, Tensor],
    methods: Sequence[str],
    *,
    ridge: float,
    stops: bool,
    masks: Mapping[str, Tensor] | None = None,
) -> Outcome | None:
    """Repair the model; at a stop, measure on the held-out images before and after; see `jbrprune.repair`."""
    with state.clock.timed("evaluation"):
        state.unrepaired = heldout_agreement(state.model, images.heldout) if stops else None
    outcome = None
    if state.targets is not None:
        with state.clock.timed("repair"):
            outcome = repair_model(state.model, images.repair, images.gate, state.targets, kept, methods, masks=masks)
    with state.clock.timed("evaluation"):
        changed = outcome is not None and outcome.kept != "none"
        state.repaired = heldout_agreement(state.model, images.heldout) if stops and changed else state.unrepaired
    return outcome


def heldout_agreement(model: nn.Module, batches: Sequence[Batch]) -> Agreement | None:
    """Agreement with the dense model; None without images."""
    return agreement_on(model, batches) if batches else None


def size_of(model: nn.Module, example: Tensor) -> Size:
    """What a model costs on the first example image, time apart."""
    return Size(sum(count_macs(model, example).values()), parameters_of(model), bytes_of(model))


def with_latency(report: Report, dense: nn.Module, pruned: nn.Module, example: Tensor) -> Report:
    """The report with the time of both models on the first example image, taken in turns."""
    return replace(report, timings=time_in_turns([dense, pruned], example[:1]))


def provenance(seed: int, device: torch.device) -> dict[str, object]:
    """Versions, seed and hardware."""
    packages = ("jbrprune", "torch", "timm", "torch-pruning")
    return {
        "versions": {package: version(package) for package in packages},
        "seed": seed,
        "device": str(device),
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def notes_on_images(images: Calibration, wants_repair: bool) -> list[str]:
    """What the number of images did not allow."""
    notes = []
    if wants_repair and not images.gate:
        notes.append(
            f"Nothing was repaired: with fewer than {FEWEST_TO_HOLD_BACK} images none can be held back to check it."
        )
    if not images.heldout:
        notes.append(f"No agreement was measured: fewer than {FEWEST_TO_HOLD_BACK} images.")
    return notes


def facts_of(state: Underway, row: StepRow) -> dict[str, Any]:
    """What is noted of the last step of any run."""
    agreed = {"unrepaired": plain(state.unrepaired), "repaired": plain(state.repaired)}
    return {"row": plain(row), "seconds": dict(state.clock.seconds), **agreed}


def recall(state: Underway, facts: Mapping[str, Any]) -> StepRow:
    """Undo `facts_of`: set the state as the step left it."""
    state.unrepaired, state.repaired = (
        None if facts[name] is None else record(Agreement, facts[name]) for name in ("unrepaired", "repaired")
    )
    state.clock.seconds.update(facts["seconds"])
    return record(StepRow, facts["row"])


def called(criterion: object) -> str:
    """What a report calls a criterion: the name of a function, or the objective of scores that were made before."""
    if isinstance(criterion, Relevance):
        return next((name for name, preset in PRESETS.items() if preset == criterion), repr(criterion))
    settings = getattr(criterion, "settings", None)
    name = getattr(criterion, "__name__", type(criterion).__name__)
    return name if settings is None else f"scores made before ({settings.objective}, {settings.statistic})"
