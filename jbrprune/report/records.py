"""The record of one pruning run, which prints, plots and converts to and from JSON."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement, Drop
from jbrprune.evaluation.latency import Timings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Record = TypeVar("Record")


@dataclass(frozen=True)
class LayerRow:
    """Width of one layer before and after.

    Attributes:
        name: Qualified name.
        type: Class of the module.
        kind: What its units are: ``channel``, ``head``, ``group``, ``width``, ``direction`` or, of single weights,
            ``weight``.
        before: Output channels (heads of an attention, directions, entries of the weight) of the dense model.
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
        nonzero: Parameters that are not masked; None where no single weights were pruned.
        packed: Bytes of a file that leaves out what is masked (one bit per entry says where); None as above.
    """

    macs: int
    params: int
    bytes: int
    nonzero: int | None = None
    packed: int | None = None


@dataclass(frozen=True)
class StepRow:
    """One step of removal and repair.

    Attributes:
        step: Number of the step, from 1.
        target: Share of the dense cost, or of the single weights, that the step was to leave.
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
    """One model that the search for ``max_drop`` measured.

    Attributes:
        share: Share of the dense model's cost that it was to keep.
        macs: Its multiply-accumulates for one image.
        drop: What it lost.
        accepted: Whether that was allowed.
        predicted: Share of samples whose top-1 was predicted to change before the model was made, or relative error.
    """

    share: float
    macs: int
    drop: Drop
    accepted: bool
    predicted: float | None = None


@dataclass(frozen=True)
class Search:
    """The search for the smallest model that loses no more than ``max_drop``.

    Attributes:
        allowed: Largest share that may be lost on the images that decide.
        images: Which images these are.
        trials: Every model that was measured on them, in order.
        drop: What the model that was handed over lost on them, with an interval that allows for the choice among all
            that were measured.
        limit: Why it did not go further.
        confidence: With which no more than allowed is lost; 0.5: what was lost on the images decided, no bound of it.
    """

    allowed: float
    images: str
    trials: tuple[Trial, ...]
    drop: Drop
    limit: str
    confidence: float = 0.5


@dataclass(frozen=True)
class Report:
    """The results of one pruning run.

    Attributes:
        model: Name of the model.
        budget: What was asked for.
        settings: How it was done.
        dense: Cost before.
        pruned: Cost after.
        layers: Width of every layer that could lose some, in the order of ``named_modules()``.
        steps: The steps of the run, in order.
        unrepaired: Held-out agreement of the final model before the last repair.
        repaired: Held-out agreement of the final model after the last repair.
        heldout: Which images the held-out agreement was measured on, such as ``102 calibration images that were
            used for nothing else``.
        seconds: Part of the run -> seconds.
        provenance: Versions, seed, hardware.
        notes: What a reader ought to know.
        removed: Group of units -> the units of the dense model that are gone; empty where single weights were pruned.
        search: With ``max_drop``, how the size was found; else None.
        timings: Time of the dense and of the pruned model for one image, taken in turns; None where not measured.
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
    timings: Timings | None = None

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

    def __str__(self) -> str:
        """Plain text, at most 80 columns."""
        from jbrprune.report.text import format_report

        return format_report(self)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types: tuples become lists, NaN and Inf become None, anything foreign its string."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Undo `to_dict`; unknown keys are ignored.

        Raises:
            ArgumentError: A required key is missing (named), or a record is not a mapping.
        """
        return record(cls, data)

    def to_frame(self) -> DataFrame:
        """One row per layer: name, type, kind, before, after, kept.

        Raises:
            ImportError: pandas is not installed.
        """
        return import_optional("pandas").DataFrame([plain(layer) | {"kept": layer.kept} for layer in self.layers])

    def to_html(self, path: str | os.PathLike[str] | None = None, *, predicted: DataFrame | None = None) -> str:
        """Make one self-contained page: cost, agreement, the figure of `plot`, all layers, all steps, provenance.

        Args:
            path: Write the page here as well.
            predicted: As for `plot`.

        Returns:
            The page.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from jbrprune.report.figures import make_page

        return make_page(self, path, predicted)

    def plot(self, path: str | os.PathLike[str] | None = None, *, predicted: DataFrame | None = None) -> Figure:
        """Draw the kept width of every layer, and the agreement against the cost over the steps.

        Args:
            path: Write the figure here as well; the suffix gives the format (``.png``, ``.svg``, ``.pdf``).
            predicted: A prediction for the same model and images, as a table with the columns ``macs`` (share kept)
                and ``predicted_flips`` and, or, ``predicted_flips_repaired`` (share of images whose top-1 changes).

        Returns:
            The figure; no window is opened and no global state of matplotlib is touched.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from jbrprune.report.figures import plot_report

        return plot_report(self, path, predicted)


def import_optional(module: str, extra: str = "report") -> ModuleType:
    """Import a module that ``jbrprune[report]``, or another extra, installs.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package}, which is not installed: pip install 'jbrprune[{extra}]'") from error


def plain(value: Any) -> Any:
    """Pure JSON types; arrays and tensors become lists, anything foreign its string."""
    if is_dataclass(value):
        own = {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return own | ({"interval": plain(value.interval)} if isinstance(value, Agreement) else {})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    listed = getattr(value, "tolist", None)
    return str(value) if listed is None else plain(listed())


def record(kind: type[Record], data: object, where: str = "report") -> Record:
    """Undo `plain`; unknown keys are ignored.

    Args:
        kind: The dataclass to make; records inside it are found by their type hints.
        data: What `plain` made of one.
        where: Its name, for messages.

    Raises:
        ArgumentError: A required key is missing, or a record is not a mapping.
    """
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{where} must be a mapping, as Report.to_dict makes it; got {type(data).__name__}.")
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in data:
            values[item.name] = read_field(hints[item.name], data[item.name], f"{where}.{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ArgumentError(f"{where} lacks {item.name!r}; it holds {sorted(data)}. Was it made by Report.to_dict?")
    return kind(**values)


def read_field(hint: Any, value: Any, where: str) -> Any:
    """One field of a record: a record, a tuple of records, or a value that JSON has."""
    kind = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
    if get_origin(hint) is tuple:
        rows = enumerate(value)
        return tuple(record(kind, row, f"{where}[{number}]") if kind else row for number, row in rows)  # type: ignore[arg-type]
    return value if kind is None or value is None else record(kind, value, where)  # type: ignore[arg-type]
