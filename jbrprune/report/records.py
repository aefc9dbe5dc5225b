"""What one pruning run did, as plain records that survive JSON."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement, Drop
from jbrprune.evaluation.latency import Latency

Record = TypeVar("Record")


@dataclass(frozen=True)
class LayerRow:
    """Width of one layer before and after.

    Attributes:
        name: Qualified name.
        type: Class of the module.
        kind: What its units are: ``channel``, ``head``, ``group``, ``width`` or, of single weights, ``weight``.
        before: Output channels (heads of an attention, entries of the weight) of the dense model.
        after: The same of the pruned model.
    """

    name: str
    type: str
    kind: str
    before: int
    after: int

    @property
    def kept(self) -> float:
        """Share of the width that stayed, in [0, 1]."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        macs: Multiply-accumulates for one image.
        params: Number of parameters.
        bytes: Bytes of parameters and buffers.
        latency: Wall time of a forward pass, or None where it was not measured.
        nonzero: Effective parameters: those that are not masked; None where no single weights were pruned.
        packed: Bytes of a file that leaves out what is masked (one bit per entry says where); None as above.
    """

    macs: int
    params: int
    bytes: int
    latency: Latency | None = None
    nonzero: int | None = None
    packed: int | None = None


@dataclass(frozen=True)
class StepRow:
    """One step of removal and repair.

    Attributes:
        step: Number of the step, from 1.
        target: Cost the step was to reach, in the unit of the budget.
        macs: Multiply-accumulates after the step.
        params: Parameters after the step.
        seconds: Duration of the step.
        unrepaired: Agreement after removal, on the images that gate the repair; None where it was not measured.
        repaired: The same of the model as the step leaves it.
        repair: Name of the repair that was kept, or ``none``.
        nonzero: Parameters that are not masked after the step; None where no single weights were pruned.
        relative_latency: Time of one image relative to the dense model's; None where the budget is not one of time.
    """

    step: int
    target: float
    macs: int
    params: int
    seconds: float
    unrepaired: Agreement | None = None
    repaired: Agreement | None = None
    repair: str = "none"
    nonzero: int | None = None
    relative_latency: float | None = None


@dataclass(frozen=True)
class Trial:
    """One model that was measured on the way to the smallest one that loses no more than allowed.

    Attributes:
        share: Share of the dense model's cost that it was to keep.
        macs: Its multiply-accumulates for one image.
        drop: What it lost.
        accepted: Whether that was allowed.
        predicted: Share of samples whose top-1 was predicted to change before it was made.
    """

    share: float
    macs: int
    drop: Drop
    accepted: bool
    predicted: float | None = None


@dataclass(frozen=True)
class Search:
    """How the smallest model that loses no more than allowed was found.

    Attributes:
        allowed: Largest share that may be lost on the images that decide.
        images: Which images these are.
        trials: Every model that was measured on them, in order.
        drop: What the model that was handed over lost on them, with an interval that allows for the choice among all
            that were measured.
        limit: Why it did not go further.
    """

    allowed: float
    images: str
    trials: tuple[Trial, ...]
    drop: Drop
    limit: str


@dataclass(frozen=True)
class Run:
    """Everything one pruning run has to say; `jbrprune.report.report.Report` says it.

    Attributes:
        model: Name of the model.
        budget: What was asked for.
        settings: How it was done.
        dense: Cost before.
        pruned: Cost after.
        layers: Width of every layer, in order of execution.
        steps: Trajectory of the run.
        unrepaired: Held-out agreement of the final model before the last repair.
        repaired: Held-out agreement of the final model after the last repair.
        heldout: Which images the held-out agreement was measured on, such as ``last 500 images of the folder``.
        seconds: Part of the run -> seconds.
        provenance: Versions, seed, hardware.
        notes: What a reader ought to know.
        removed: Group of units -> the units of the dense model that are gone; empty where single weights were pruned.
        search: With ``max_drop``, how the size was found; else None.
    """

    model: str
    budget: dict[str, Any]
    settings: dict[str, Any]
    dense: Size
    pruned: Size
    layers: tuple[LayerRow, ...]
    steps: tuple[StepRow, ...] = ()
    unrepaired: Agreement | None = None
    repaired: Agreement | None = None
    heldout: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    removed: dict[str, list[int]] = field(default_factory=dict)
    search: Search | None = None

    @property
    def final(self) -> Agreement | None:
        """Held-out agreement of the model that was handed over."""
        return self.unrepaired if self.repaired is None else self.repaired

    @property
    def kept(self) -> float:
        """Share of the multiply-accumulates that stayed, in [0, 1]."""
        return self.pruned.macs / self.dense.macs

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the weights that could be pruned one by one; None where channels were."""
        rows = [layer for layer in self.layers if layer.kind == "weight"]
        return 1 - sum(row.after for row in rows) / sum(row.before for row in rows) if rows else None


@functools.singledispatch
def plain(value: Any) -> Any:
    """Pure JSON types; arrays and tensors become lists, anything foreign its string."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    listed = getattr(value, "tolist", None)
    return str(value) if listed is None else plain(listed())


@plain.register(str)
@plain.register(int)
@plain.register(type(None))
def _(value: Any) -> Any:
    return value


@plain.register
def _(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@plain.register(Mapping)
def _(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): plain(item) for key, item in value.items()}


@plain.register(list)
@plain.register(tuple)
def _(value: Sequence[Any]) -> list[Any]:
    return [plain(item) for item in value]


@plain.register
def _(value: Agreement) -> dict[str, Any]:
    """With the interval, for those who read the file with something else."""
    own = {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    return own | {"top1_interval": plain(value.top1_interval)}


def record(kind: type[Record], data: object, where: str = "report") -> Record:
    """Undo `plain`; keys that are not known are ignored.

    Args:
        kind: The dataclass to make.
        data: What `plain` made of one.
        where: Its name, for messages.

    Raises:
        ArgumentError: A required key is missing, or a record is not a mapping.
    """
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{where} must be a mapping, as Report.to_dict makes it; got {type(data).__name__}.")
    values: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in data:
            build, value = _NESTED.get(item.name), data[item.name]
            values[item.name] = build(value, f"{where}.{item.name}") if build and value is not None else value
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ArgumentError(f"{where} lacks {item.name!r}; it holds {sorted(data)}. Was it made by Report.to_dict?")
    return kind(**values)


def _records(kind: type[Record], data: Sequence[object], where: str) -> tuple[Record, ...]:
    return tuple(record(kind, row, f"{where}[{number}]") for number, row in enumerate(data))


_NESTED: dict[str, Callable[[Any, str], object]] = {
    "dense": functools.partial(record, Size),
    "pruned": functools.partial(record, Size),
    "latency": functools.partial(record, Latency),
    "unrepaired": functools.partial(record, Agreement),
    "repaired": functools.partial(record, Agreement),
    "layers": functools.partial(_records, LayerRow),
    "steps": functools.partial(_records, StepRow),
    "notes": lambda notes, where: tuple(notes),
    "drop": functools.partial(record, Drop),
    "trials": functools.partial(_records, Trial),
    "search": functools.partial(record, Search),
}
