"""The arguments of prune(), checked before anything is read or created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from jbrprune.budgets.budget import BUDGETS, TIMED, Budget
from jbrprune.budgets.selection import Floors
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, BudgetError, unknown
from jbrprune.pruning import loop as engine
from jbrprune.pruning import weights as thinning
from jbrprune.pruning.defaults import CHANNELS, WEIGHTS, complete
from jbrprune.pruning.runs import called
from jbrprune.repair.repair import METHODS
from jbrprune.sparsity.patterns import REMAINDERS, SCOPES, Pattern


def structure_of(structure: str | None, given: Mapping[str, object]) -> str | Pattern:
    """What is pruned: ``channels``, ``unstructured`` or a pattern.

    Args:
        structure: What the user says; None: what the budget is of.
        given: Budget -> share, None where it is not given; ``sparsity`` is one of them.

    Raises:
        ArgumentError: Not a structure.
        BudgetError: The structure and the budget do not go together.
    """
    budgets = [name for name, share in given.items() if share is not None]
    chosen = structure or ("unstructured" if budgets == ["sparsity"] else "channels")
    if not isinstance(chosen, str):
        raise ArgumentError(f"structure must be 'channels', 'unstructured' or 'N:M' such as '2:4', got {structure!r}.")
    if chosen == "channels":
        if "sparsity" in budgets:
            raise BudgetError("sparsity= counts single weights: pass structure='unstructured', or macs= for channels.")
        return chosen
    pattern = None if chosen == "unstructured" else Pattern.of_text(chosen)
    if pattern and budgets:
        raise BudgetError(
            f"structure='{pattern}' says how many weights stay, so no budget has a meaning beside it; got "
            f"{', '.join(f'{name}=' for name in budgets)}."
        )
    if pattern is None and budgets != ["sparsity"]:
        raise BudgetError(
            "structure='unstructured' needs sparsity= (the share of weights to set to zero) and no other budget; got "
            f"{', '.join(f'{name}=' for name in budgets) or 'none'}."
        )
    return pattern or chosen


def check_drop(drop: Any, arguments: Mapping[str, Any], budgets: Mapping[str, object]) -> None:
    """Refuse a ``max_drop``, or something beside it, that has no meaning.

    Raises:
        ArgumentError: Arguments that belong to a fixed budget.
        BudgetError: Not a number in [0, 1), or not of channels.
    """
    if not isinstance(drop, Real) or isinstance(drop, bool) or not 0 <= float(drop) < 1:
        raise BudgetError(f"max_drop must satisfy 0 <= max_drop < 1 (a share of the images), got {drop!r}.")
    if budgets["sparsity"] is not None or arguments["structure"] not in (None, "channels"):
        raise BudgetError("max_drop= finds how many channels can go; single weights need sparsity= or N:M.")
    if any(budgets[name] is not None for name in TIMED):
        raise BudgetError(
            "max_drop= finds how far MACs, parameters or channels can go; latency needs a budget of its own."
        )
    if arguments["steps"] is not None:
        raise ArgumentError("steps= has no meaning beside max_drop=, which chooses its own: leave it out.")
    if arguments["resume"] is not None:
        raise ArgumentError("resume= cannot follow the steps back and forth of max_drop=: leave one of them out.")
    if isinstance(arguments["criterion"], Scores):
        raise ArgumentError("Scores made before hold for one step, max_drop= takes many: pass a function.")


def sparsity_of(value: Any) -> float:
    """A share of zeros.

    Raises:
        BudgetError: Not a number in (0, 1).
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < 1:
        raise BudgetError(
            f"sparsity must satisfy 0 < sparsity < 1 (the share of weights to set to zero), got {value!r}."
        )
    return float(value)


def channel_settings(budget: Budget, stops: tuple[float, ...], arguments: Mapping[str, Any]) -> engine.Settings:
    """Settings of a run on channels.

    Raises:
        ArgumentError: An argument has no meaning.
    """
    given = arguments["round_to"]
    choose = given is None and budget.timed if not isinstance(given, str) else _is_auto(given)
    kinds = ", ".join(f"{kind}=" for kind in BUDGETS)
    known = complete({**arguments, "round_to": None if choose else given}, CHANNELS, f"channels (a budget of {kinds})")
    names = ("objective", "site", "statistic", "batch", "confidence", "autocast")
    Relevance(**{name: known[name] for name in names}).check("units")
    criterion = _criterion(known["criterion"])
    steps = known["steps"]
    if isinstance(criterion, Scores):
        if len(stops) > 1 or steps not in (None, 1):
            raise ArgumentError(
                "Scores made before hold for one step: the channels of the next step are others. Pass a function as "
                "criterion=, or steps=1."
            )
        steps = 1
    elif criterion is not None:
        _check_criterion(criterion, "Scores")
    settings = engine.Settings(
        budget=budget,
        stops=stops,
        steps=steps,
        repair=_methods(known["repair"]),
        floors=Floors(known["floor"], known["min_channels"], known["round_to"], known["width"]),
        ignore=_globs(known["ignore"]),
        criterion=criterion,
        choose_multiple=choose,
        **{name: known[name] for name in ("objective", "site", "statistic", "batch", "confidence", "width", "ridge")},
        **{name: known[name] for name in ("seed", "autocast", "measure_latency", "progress")},
    )
    settings.schedule()
    return settings


def weight_settings(stops: tuple[thinning.Goal, ...], arguments: Mapping[str, Any]) -> thinning.Settings:
    """Settings of a run on single weights.

    Raises:
        ArgumentError: An argument has no meaning.
    """
    known = complete(arguments, WEIGHTS, "single weights (sparsity= or an N:M structure)")
    pattern = isinstance(stops[0], Pattern)
    foreign, what = (("scope", "floor"), f"structure='{stops[0]}'") if pattern else (("remainder",), "sparsity=")
    for name in foreign:
        if arguments[name] is not None:
            raise ArgumentError(f"{name}= has no meaning for {what}: leave it out.")
    for name, values in (("scope", SCOPES), ("remainder", REMAINDERS)):
        if known[name] not in values:
            raise ArgumentError(f"{name} must be one of {', '.join(values)}, got {known[name]!r}.")
    if not 0 <= known["floor"] < 1:
        raise ArgumentError(f"floor must satisfy 0 <= floor < 1, got {known['floor']!r}.")
    if known["steps"] is not None and known["steps"] < 1:
        raise BudgetError(f"steps must be a whole number of at least 1, got {known['steps']!r}.")
    relevance = Relevance(
        **{name: known[name] for name in ("objective", "statistic", "batch", "confidence", "autocast")}
    )
    relevance.check("weights")
    shown = ["remainder", "ridge"] if pattern else ["scope", "floor", "ridge"]
    if known["shrink"] and isinstance(stops[0], Pattern):
        raise ArgumentError(
            f"shrink=True would move the inputs of layers out of their groups of {stops[0].of} and end the {stops[0]} "
            "pattern: leave one of them out."
        )
    criterion = _criterion(known["criterion"])
    if criterion is None:
        criterion, shown = relevance, ["objective", "statistic", "confidence", *shown]
    elif not isinstance(criterion, WeightScores):
        _check_criterion(criterion, "WeightScores (granularity='weight')")
    methods = _methods(known["repair"])
    ignore = _globs(known["ignore"])
    described = {} if known["criterion"] is None else {"criterion": called(criterion)}
    described |= {name: known[name] for name in shown} | {"repair": list(methods), "ignore": list(ignore)}
    return thinning.Settings(
        stops=stops,
        steps=known["steps"] or 1,
        repair=methods,
        ignore=ignore,
        criterion=criterion,
        described=described,
        **{name: known[name] for name in ("scope", "remainder", "floor", "ridge", "shrink", "seed")},
        **{name: known[name] for name in ("measure_latency", "progress")},
    )


def _is_auto(round_to: str) -> bool:
    if round_to != "auto":
        raise ArgumentError(f"round_to must be a whole number or 'auto', got {round_to!r}.")
    return True


def _criterion(given: Any) -> Any:
    """What a name stands for; anything else as it is."""
    if isinstance(given, str) and given not in PRESETS:
        raise unknown("criterion", given, PRESETS)
    return PRESETS[given] if isinstance(given, str) else given


def _check_criterion(criterion: object, what: str) -> None:
    if not callable(criterion):
        raise ArgumentError(f"criterion must be a name, a function or {what}, got {called(criterion)}.")


def _globs(ignore: str | Sequence[str]) -> Any:
    return ignore if isinstance(ignore, str) else tuple(ignore)  # a string is refused where globs are matched


def _methods(repair: str | Sequence[str] | None) -> tuple[str, ...]:
    wanted = () if repair is None else (repair,) if isinstance(repair, str) else tuple(repair)
    unknown = [method for method in wanted if method not in (*METHODS, "auto")]
    if unknown or ("auto" in wanted and len(wanted) > 1):
        raise ArgumentError(f"repair must be 'auto', None, or some of {', '.join(METHODS)}; got {repair!r}.")
    return wanted
