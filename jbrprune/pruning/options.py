"""The table of options: every option of scoring and pruning with its default, its help and its check.

Keyword arguments, the command line and the settings in a report are made from these dataclasses. An instance is
checked when it is made, so before anything is read or created. The metadata of a field are

* ``help``: one or two sentences,
* ``panel``: the heading under which the command line lists it; None: it is not on the command line,
* ``check``: a function ``(name, value)`` that raises `ArgumentError` or `BudgetError`; None where any value will do.

A type such as ``str | object`` begins with what the command line can read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from jbrprune.budgets.selection import Floors
from jbrprune.criteria.scores import Scores
from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.repair.repair import METHODS
from jbrprune.sparsity.patterns import Pattern, Remainder, Scope

PANELS = ("Budget", "Criterion", "Repair", "Data", "Output")
BUDGETS = ("macs", "params", "channels", "latency", "latency_ms")
Check = Callable[[str, Any], None]


def option(default: Any, text: str, panel: str | None, check: Check | None = None) -> Any:
    """A field of a table of options."""
    return field(default=default, metadata={"help": text, "panel": panel, "check": check})


def check_share(name: str, value: object) -> None:
    """Accept a number in (0, 1)."""
    if not _is_number(value) or not 0 < value < 1:
        raise BudgetError(f"{name} must satisfy 0 < {name} < 1, got {value!r}.")


def check_milliseconds(name: str, value: object) -> None:
    """Accept a positive, finite number."""
    if not _is_number(value) or not 0 < value < float("inf"):
        raise BudgetError(f"{name} must satisfy 0 < {name} < inf, got {value!r}.")


def check_part(name: str, value: object) -> None:
    """Accept a number in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ArgumentError(f"{name} must satisfy 0 <= {name} < 1, got {value!r}.")


def check_integer(name: str, value: object) -> None:
    """Accept an integer."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ArgumentError(f"{name} must be an integer, got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Accept an integer of at least 1."""
    check_integer(name, value)
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value!r}.")


def check_images(name: str, value: object) -> None:
    """Accept a count, or None for all."""
    if value is not None:
        check_count(name, value)


def check_choice(*known: str) -> Check:
    """Accept one of several words."""

    def check(name: str, value: object) -> None:
        if value not in known:
            raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}.")

    return check


def check_repair(name: str, value: Any) -> None:
    """Accept ``"auto"``, one or several methods, or None."""
    methods = repair_methods(value)
    if any(method not in (*METHODS, "auto") for method in methods) or ("auto" in methods and len(methods) > 1):
        raise ArgumentError(f"{name} must be 'auto', None, or some of {', '.join(METHODS)}; got {value!r}.")


def check_pattern(name: str, value: str) -> None:
    """Accept N:M."""
    Pattern.of_text(value)


def repair_methods(repair: str | Sequence[str] | None) -> tuple[str, ...]:
    """The methods that ``repair=`` names."""
    return () if repair is None else (repair,) if isinstance(repair, str) else tuple(repair)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of scoring and pruning alike."""

    criterion: str | object = option(
        "jbr",
        "What to rank by: the name of a preset of relevance, a Relevance, scores made before, or a function.",
        "Criterion",
    )
    ignore: Sequence[str] = option((), "Globs of modules that keep their width, or their weights.", "Criterion")
    batch_size: int = option(32, "Images per pass.", "Data", check_count)
    progress: bool = option(True, "Show progress bars.", None)

    def __post_init__(self) -> None:
        """Check every option."""
        for item in fields(self):
            check, value = item.metadata["check"], getattr(self, item.name)
            if check is not None and not (value is None and item.default is None):
                check(item.name, value)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """Options of `jbrprune.score`."""

    granularity: Literal["unit", "layer", "weight"] = option(
        "unit",
        "Score removable units, every channel of every layer by itself, or every single weight.",
        "Criterion",
        check_choice("unit", "layer", "weight"),
    )
    parameters: Literal["weights", "all"] = option(
        "weights",
        "With granularity weight: the weights of convolutions and linear layers, or all parameters.",
        "Criterion",
        check_choice("weights", "all"),
    )
    width: bool = option(False, "Include the residual width under LayerNorms.", "Criterion")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Options of every pruning run."""

    repair: str | Sequence[str] | None = option(
        "auto",
        "Repair after every step: auto (try what applies, keep what helps on images held back), batch_norm, "
        "mean_shift, least_squares, several of these, or none.",
        "Repair",
        check_repair,
    )
    images: int | None = option(512, "Calibration images to read; they are kept in memory.", "Data", check_images)
    eval_data: str | object = option(
        None, "Images to measure the agreement on; default: a fifth of the calibration images.", "Data"
    )
    seed: int = option(0, "Seed of the split of the images and of everything random.", "Data", check_integer)
    resume: str | Path | None = option(
        None,
        "Directory for this run alone: every finished step is written there, and the same call goes on behind the "
        "last one.",
        "Output",
    )
    inplace: bool = option(
        False,
        "Change the given model itself, at the very end. Its parameters are new objects then: make a new optimizer.",
        None,
    )

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods of repair."""
        return repair_methods(self.repair)


@dataclass(frozen=True, kw_only=True)
class ChannelOptions(RunOptions):
    """Options of `jbrprune.prune`: exactly one budget, or ``max_drop`` with at most one of the first three."""

    macs: float | None = option(None, "Share of the multiply-accumulates to keep.", "Budget", check_share)
    params: float | None = option(None, "Share of the parameters to keep.", "Budget", check_share)
    channels: float | None = option(None, "Share of the removable channels to keep.", "Budget", check_share)
    latency: float | None = option(
        None,
        "Share of the time of a forward pass of one image to keep: the whole model is timed in turns with the dense "
        "one after every step.",
        "Budget",
        check_share,
    )
    latency_ms: float | None = option(
        None, "Milliseconds of a forward pass of one image.", "Budget", check_milliseconds
    )
    max_drop: float | None = option(
        None,
        "Prune as far as accuracy (without labels: agreement with the dense model) falls by no more than this on "
        "images set aside; macs, params or channels beside it is the least to keep.",
        "Budget",
        check_part,
    )
    steps: int | None = option(
        None, "Number of steps; default: one for every 5 % of the dense cost.", "Budget", check_count
    )
    floors: Floors = option(Floors(channels=8), "How narrow a group of channels may become.", "Budget")

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are given."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        """Check every option, and that they fit together."""
        super().__post_init__()
        names = [f"{name}=" for name in self.budgets]
        if self.max_drop is None and len(names) != 1:
            raise BudgetError(
                f"Give exactly one of {', '.join(f'{name}=' for name in BUDGETS)} or max_drop=; got "
                f"{' and '.join(names) or 'none'}."
            )
        timed = self.latency is not None or self.latency_ms is not None
        if self.max_drop is not None and (timed or len(names) > 1):
            raise BudgetError(
                "max_drop= takes at most one of macs=, params=, channels= beside it, the least to keep; got "
                f"{', '.join(names)}."
            )
        if self.steps is not None and (timed or self.max_drop is not None):
            raise ArgumentError(
                "steps= has no meaning beside max_drop= or a latency, which choose their own: leave it out."
            )
        if self.max_drop is not None and self.resume is not None:
            raise ArgumentError("resume= cannot follow the steps back and forth of max_drop=: leave one of them out.")
        if isinstance(self.criterion, Scores) and (self.max_drop is not None or timed or self.steps not in (None, 1)):
            raise ArgumentError(
                "Scores made before hold for one step: the channels of the next step are others. Pass a Relevance or "
                "a function as criterion=, or steps=1."
            )


@dataclass(frozen=True, kw_only=True)
class WeightOptions(RunOptions):
    """Options of `jbrprune.sparsify`: either ``sparsity`` or ``pattern``."""

    criterion: str | object = option(
        "jbr_projection",
        "What to rank by: the name of a preset of relevance, a Relevance, scores made before, or a function.",
        "Criterion",
    )
    sparsity: float | None = option(
        None, "Share of the weights of convolutions and linear layers to set to zero.", "Budget", check_share
    )
    pattern: str | None = option(
        None, "N:M such as 2:4: of every M weights in a row along the inputs, N stay.", "Budget", check_pattern
    )
    scope: Scope = option(
        "global",
        "Rank all weights together, or each layer by itself.",
        "Budget",
        check_choice("global", "layer"),
    )
    steps: int = option(1, "Number of steps.", "Budget", check_count)
    remainder: Remainder = option(
        "skip",
        "Where M does not divide a layer's inputs: skip the layer, or pad its last group.",
        "Budget",
        check_choice("skip", "pad"),
    )
    floor: float = option(
        0.001, "Share of every layer's weights that stays, at least one weight.", "Budget", check_part
    )
    shrink: bool = option(False, "Remove the channels that contribute nothing once their weights are zero.", "Output")
    permanent: bool = option(
        True, "Zeros in plain parameters; otherwise masks of torch.nn.utils.prune, to train on.", "Output"
    )

    def __post_init__(self) -> None:
        """Check every option, and that they fit together."""
        super().__post_init__()
        if (self.sparsity is None) == (self.pattern is None):
            raise BudgetError(
                f"Give either sparsity= or pattern=, got {'neither' if self.sparsity is None else 'both'}."
            )
        foreign = ("scope", "floor") if self.pattern else ("remainder",)
        defaults = {item.name: item.default for item in fields(self)}
        for name in foreign:
            if getattr(self, name) != defaults[name]:
                raise ArgumentError(f"{name}= has no meaning for {'pattern=' if self.pattern else 'sparsity='}.")
        if self.shrink and self.pattern:
            raise ArgumentError(
                f"shrink=True would move the inputs of layers out of their groups and end the {self.pattern} pattern: "
                "leave one of them out."
            )
