"""The table of options: every option of scoring and pruning with its default, its help and its check.

Keyword arguments, the command line and the settings in a report are made from these dataclasses. An instance is
checked when it is made, so before anything is read or created. The metadata of a field are

* ``help``: one or two sentences,
* ``panel``: the heading under which the command line lists it; None: it is not on the command line,
* ``check``: a function ``(name, value)`` that raises `ArgumentError` or `BudgetError`; None where any value will do.

A type such as ``str | object`` begins with what the command line can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jbrprune.budgets.budget import BUDGETS, Floors, Ranking
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, BudgetError, check_known, unknown
from jbrprune.evaluation.outputs import check_output
from jbrprune.repair.repair import METHODS
from jbrprune.sparsity.patterns import Pattern, Scope

RANK_BY = "Preset of relevance to rank by; in Python also a Relevance, scores made before, or a function."
Check = Callable[[str, Any], None]
Function = TypeVar("Function", bound=Callable[..., Any])


def option(default: Any, text: str, panel: str | None, check: Check | None = None) -> Any:
    """A field of a table of options."""
    return field(default=default, metadata={"help": text, "panel": panel, "check": check})


def describe(table: type) -> Callable[[Function], Function]:
    """Decorator: replace ``{options}`` in a docstring by the help of a table."""

    def decorate(function: Function) -> Function:
        lines = (f"{item.name}: {item.metadata['help']}" for item in fields(table))
        function.__doc__ = (function.__doc__ or "").replace("{options}", "\n        ".join(lines))
        return function

    return decorate


def between(low: float, high: float, error: type[ArgumentError] = BudgetError, *, closed: bool = False) -> Check:
    """Accept a number between two bounds; ``closed``: or the lower bound itself."""

    def check(name: str, value: Any) -> None:
        number: bool = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not (low <= value < high if closed else low < value < high):  # type: ignore
            raise error(f"{name} must satisfy {low} {'<=' if closed else '<'} {name} < {high}, got {value!r}.")

    return check


def whole(least: float, *, optional: bool = False) -> Check:
    """Accept an integer of at least ``least``; ``optional``: or None."""

    def check(name: str, value: Any) -> None:
        integer = isinstance(value, Integral) and not isinstance(value, bool) and value >= least  # type: ignore
        if not integer and not (value is None and optional):
            bound = f" of at least {least}" if least > -math.inf else ""
            raise ArgumentError(f"{name} must be a whole number{bound}, got {value!r}.")

    return check


def check_criterion(name: str, value: Any) -> None:
    """Accept the name of a preset, a function, or scores."""
    if isinstance(value, str) and value not in PRESETS:
        raise unknown(name, value, PRESETS)
    if not isinstance(value, str | Scores | WeightScores) and not callable(value):
        raise ArgumentError(f"{name} must be the name of a preset, a function or scores, got {value!r}.")


def check_repair(name: str, value: Any) -> None:
    """Accept ``"auto"``, one or several methods, or None."""
    methods = list(value or ()) if isinstance(value, tuple | list | None) else [value]
    if methods != ["auto"] and any(method not in METHODS for method in methods):
        raise ArgumentError(f"{name} must be 'auto', None, or some of {', '.join(METHODS)}; got {value!r}.")


def check_floors(name: str, value: Any) -> None:
    """Accept `Floors`."""
    if not isinstance(value, Floors):
        raise ArgumentError(f"{name} must be Floors(share=, channels=, round_to=, width=), got {value!r}.")


def check_pattern(name: str, value: str) -> None:
    """Accept N:M."""
    Pattern.of_text(value)


def criterion_name(criterion: object) -> str:
    """What a report calls a criterion."""
    if isinstance(criterion, str):
        return criterion
    if isinstance(criterion, Relevance):
        chosen = (f"{f.name}={v!r}" for f in fields(criterion) if (v := getattr(criterion, f.name)) != f.default)
        return f"Relevance({', '.join(chosen)})"
    if isinstance(criterion, Scores | WeightScores):
        return f"scores made before ({criterion.settings.objective}, {criterion.settings.statistic})"
    return getattr(criterion, "__name__", type(criterion).__name__)


@dataclass(frozen=True)
class Table:
    """A table of options, which are checked when it is made."""

    def __post_init__(self) -> None:
        """Check every option; one of several words by its type."""
        hints = get_type_hints(type(self))
        for item in fields(self):
            check, value = item.metadata["check"], getattr(self, item.name)
            if get_origin(hints[item.name]) is Literal:
                check_known(item.name, value, get_args(hints[item.name]))
            elif check is not None and not (value is None and item.default is None):
                check(item.name, value)


@dataclass(frozen=True)
class Options(Table):
    """Options of scoring and pruning alike."""

    criterion: str | object = option("jbr", RANK_BY, "Criterion", check_criterion)
    ignore: Sequence[str] = option((), "Globs of modules that keep their width, or their weights.", "Criterion")
    output: str | object = option(
        None,
        "What counts of the model's output: logits, binary, embedding, features, dense, a key, an index or, in Python, "
        "a function of what it returns; default: found, and said.",
        "Criterion",
        check_output,
    )
    batch_size: int = option(32, "Images per pass.", "Data", whole(1))
    progress: bool = option(True, "Show progress bars.", None)

    @property
    def ranking(self) -> Any:
        """The criterion, a preset in the place of its name."""
        return PRESETS[self.criterion] if isinstance(self.criterion, str) else self.criterion

    def check_ranking(self, scores: type, units: Literal["units", "weights"]) -> None:
        """Refuse scores, or a relevance, that are not of these units."""
        if isinstance(self.ranking, Scores | WeightScores) and not isinstance(self.ranking, scores):
            raise ArgumentError(f"criterion holds {criterion_name(self.ranking)} of something else than {units}.")
        if isinstance(self.ranking, Relevance):
            self.ranking.check(units)


@dataclass(frozen=True)
class ScoreOptions(Options):
    """Options of `jbrprune.score`."""

    criterion: str | object = option(None, RANK_BY, "Criterion", check_criterion)
    granularity: Literal["unit", "weight"] = option("unit", "What has a score: units or single weights.", "Criterion")
    parameters: Literal["weights", "all"] = option(
        "weights", "Single weights of convolutions and linear layers, or all parameters.", "Criterion"
    )
    width: bool = option(False, "Include the residual width under LayerNorms.", "Criterion")

    def __post_init__(self) -> None:
        """Check every option."""
        super().__post_init__()
        if not isinstance(self.ranking, Relevance):
            raise ArgumentError(f"criterion must be a preset or a Relevance, got {criterion_name(self.criterion)}.")
        self.ranking.check("weights" if self.granularity == "weight" else "units")

    @property
    def ranking(self) -> Any:
        """The criterion; by default that of `jbrprune.prune`, or for single weights of `jbrprune.sparsify`."""
        default = "jbr_projection" if self.granularity == "weight" else "jbr"
        return PRESETS[default] if self.criterion is None else super().ranking


@dataclass(frozen=True)
class RunOptions(Options):
    """Options of every pruning run."""

    repair: str | Sequence[str] | None = option("auto", "How to repair after every step.", "Repair", check_repair)
    images: int | None = option(512, "Calibration images to read.", "Data", whole(1, optional=True))
    eval_data: str | object = option(None, "Images to report on; default: a fifth of the others.", "Data")
    seed: int = option(0, "Seed of the split of the images and of everything random.", "Data", whole(-math.inf))
    resume: str | Path | None = option(None, "Directory that keeps finished steps, to go on behind the last.", "Output")
    inplace: bool = option(False, "Change the given model itself, at the very end.", None)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods of repair."""
        return (self.repair,) if isinstance(self.repair, str) else tuple(self.repair or ())

    @property
    def refits(self) -> bool:
        """Whether weights may be refitted by least squares."""
        return not {"auto", "least_squares"}.isdisjoint(self.methods)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that a report lists, without the budget and the data."""
        hidden = {"eval_data", "resume", "max_drop", "confidence", "sparsity", "pattern", "floors", *BUDGETS}
        names = [item.name for item in fields(self) if item.metadata["panel"] and item.name not in hidden]
        lists = {"repair": list(self.methods), "ignore": list(self.ignore)}
        return {n: getattr(self, n) for n in names} | lists | {"criterion": criterion_name(self.criterion)}


@dataclass(frozen=True)
class ChannelOptions(RunOptions):
    """Options of `jbrprune.prune`: exactly one budget, or ``max_drop`` with at most one of the first three."""

    macs: float | None = option(None, "Share of the multiply-accumulates to keep.", "Budget", between(0, 1))
    params: float | None = option(None, "Share of the parameters to keep.", "Budget", between(0, 1))
    channels: float | None = option(None, "Share of the removable channels to keep.", "Budget", between(0, 1))
    latency: float | None = option(None, "Share of the time of one image to keep.", "Budget", between(0, 1))
    latency_ms: float | None = option(None, "Milliseconds of one image.", "Budget", between(0, math.inf))
    max_drop: float | None = option(
        None,
        "As far as accuracy (or agreement) falls by no more than this.",
        "Budget",
        between(0, 1, closed=True),
    )
    confidence: float = option(
        0.9,
        "With which max_drop holds, allowing for the choice; 0.5: what the images that decide show, and no more.",
        "Budget",
        between(0.5, 1, ArgumentError, closed=True),
    )
    scope: Ranking = option(
        "global",
        "Rank all units together by score per cost (raw: by score alone), or each layer by itself to the same share.",
        "Budget",
    )
    steps: int | None = option(None, "Number of steps; default: one for every 5 %.", "Budget", whole(1))
    floors: Floors = option(Floors(), "How narrow a group of channels may become.", "Budget", check_floors)
    structure: Literal["auto", "channels", "directions", "mixed"] = option(
        "auto",
        "What goes: channels and heads, directions of linear layers and heads, or both (mixed); auto: both for a "
        "model of tokens below half of the cost, else channels.",
        "Budget",
    )

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are given."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        """Check every option, and that they fit together."""
        super().__post_init__()
        self.check_ranking(Scores, "units")
        given, searched = [f"{name}=" for name in self.budgets], self.max_drop is not None
        timed = "latency=" in given or "latency_ms=" in given
        if len(given) > 1 or not (given or searched):
            kinds = ", ".join(f"{name}=" for name in BUDGETS)
            raise BudgetError(f"Give exactly one of {kinds} or max_drop=; got {' and '.join(given) or 'none'}.")
        if searched and timed:
            raise BudgetError(f"Beside max_drop=, macs=, params= or channels= is the least to keep; got {given[0]}.")
        directed = self.structure in ("directions", "mixed")
        if directed and self.scope != "global":
            raise ArgumentError("scope= has no meaning for directions: one price holds for all layers.")
        if not searched and self.confidence != ChannelOptions.confidence:
            raise ArgumentError("confidence= has no meaning without max_drop=.")
        if self.max_drop == 0 and self.confidence > 0.5:
            raise ArgumentError("No number of images shows that nothing is lost: max_drop=0 needs confidence=0.5.")
        if self.steps is not None and (searched or timed):
            raise ArgumentError("steps= has no meaning beside max_drop= or a latency: the run chooses them.")
        if self.resume is not None and searched:
            raise ArgumentError("resume= cannot follow the steps back and forth of max_drop=: leave one of them out.")
        if directed and (self.channels is not None or isinstance(self.criterion, Scores)):
            raise ArgumentError(
                f"structure={self.structure!r} takes macs=, params= or a latency, and no scores made before: "
                "directions are no channels, and they are found in the run."
            )
        if self.structure == "mixed" and searched:
            raise ArgumentError("max_drop= takes structure='channels' or 'directions', not both in turn.")
        if isinstance(self.criterion, Scores) and (searched or timed or self.steps not in (None, 1)):
            raise ArgumentError(
                "Scores made before hold for one step: the channels of the next step are others. Pass a Relevance or "
                "a function as criterion=, or steps=1."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The options that a report lists, without the budget and the data."""
        return super().settings | {f"floors.{name}": value for name, value in vars(self.floors).items()}


@dataclass(frozen=True)
class WeightOptions(RunOptions):
    """Options of `jbrprune.sparsify`: either ``sparsity`` or ``pattern``."""

    criterion: str | object = option("jbr_projection", RANK_BY, "Criterion", check_criterion)
    sparsity: float | None = option(None, "Share of the weights to set to zero.", "Budget", between(0, 1))
    pattern: str | None = option(
        None, "N:M such as 2:4: N of every M weights along the inputs stay.", "Budget", check_pattern
    )
    scope: Scope = option("global", "Rank all weights together, or each layer by itself.", "Budget")
    steps: int = option(1, "Number of steps.", "Budget", whole(1))
    floor: float = option(
        0.001, "Share of every layer's weights that stays.", "Budget", between(0, 1, ArgumentError, closed=True)
    )
    shrink: bool = option(False, "Remove the channels that contribute nothing any more.", "Output")
    permanent: bool = option(True, "Zeros in plain parameters, not masks of torch.nn.utils.prune.", "Output")

    def __post_init__(self) -> None:
        """Check every option, and that they fit together."""
        super().__post_init__()
        self.check_ranking(WeightScores, "weights")
        if (self.sparsity is None) == (self.pattern is None):
            raise BudgetError(f"Give either sparsity= or pattern=, got {'both' if self.pattern else 'neither'}.")
        for item in fields(self):
            if self.pattern and item.name in ("scope", "floor") and getattr(self, item.name) != item.default:
                raise ArgumentError(f"{item.name}= has no meaning for pattern=.")
        if self.shrink and self.pattern:
            raise ArgumentError(f"shrink=True would end the {self.pattern} pattern: leave one of them out.")
