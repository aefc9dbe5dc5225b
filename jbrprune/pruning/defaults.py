"""Defaults of score() and prune() for channels and for single weights, and what has no meaning for one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from jbrprune.errors import ArgumentError

CHANNELS = {
    "objective": "pseudo_label",
    "site": "consumer",
    "statistic": "second_moment",
    "batch": 128,
    "confidence": 0.0,
    "width": False,
    "floor": 0.0,
    "min_channels": 8,
    "round_to": 1,
    "autocast": None,
}
"""Defaults of what has a meaning for channels."""
WEIGHTS = {
    "objective": "projection",
    "statistic": "second_moment",
    "batch": 128,
    "confidence": 0.0,
    "floor": 0.001,
    "autocast": None,
    "scope": "global",
    "remainder": "skip",
    "shrink": False,
    "permanent": True,
}
"""Defaults of what has a meaning for single weights."""
CRITERION = ("objective", "site", "statistic", "batch", "confidence", "autocast")
"""What only relevance knows; a criterion that is passed does not."""
WHOLE = ("batch", "batch_size", "seed", "min_channels", "round_to", "steps")
REAL = ("ridge", "floor", "confidence")


def complete(arguments: Mapping[str, Any], defaults: Mapping[str, object], what: str) -> dict[str, Any]:
    """The arguments with the defaults of what is scored or pruned; numbers are checked.

    Args:
        arguments: Name -> value, None where the user said nothing.
        defaults: `CHANNELS` or `WEIGHTS`.
        what: What they are for, for messages.

    Raises:
        ArgumentError: An argument of the other kind is given, one beside a criterion that replaces it, or one that is
            no number.
    """
    own = {*CHANNELS, *WEIGHTS}
    foreign = [name for name in own - defaults.keys() if arguments.get(name) is not None]
    if foreign:
        raise ArgumentError(f"{min(foreign)}= has no meaning for {what}: leave it out.")
    given = {name: arguments[name] for name in own if arguments.get(name) is not None}
    unknown = sorted(given.keys() & set(CRITERION)) if arguments.get("criterion") is not None else []
    if unknown:
        raise ArgumentError(f"{unknown[0]}= belongs to relevance, but criterion= replaces it: leave one of them out.")
    known = {**arguments, **defaults, **given}
    for name in WHOLE:
        value = known.get(name)
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ArgumentError(f"{name} must be a whole number, got {value!r}.")
    for name in REAL:
        if name in known and not isinstance(known[name], Real):
            raise ArgumentError(f"{name} must be a number, got {known[name]!r}.")
    if not isinstance(known["autocast"], torch.dtype | None):
        raise ArgumentError(f"autocast must be a torch.dtype such as torch.bfloat16, got {known['autocast']!r}.")
    if not 0 < known.get("ridge", 1) < math.inf:
        raise ArgumentError(f"ridge must satisfy 0 < ridge < inf, got {known['ridge']}.")
    return known
