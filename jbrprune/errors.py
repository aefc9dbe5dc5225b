"""What can go wrong, by name.

Every message says what is wrong, where (qualified name), what was received and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JBRError(Exception):
    """Base of all errors that jbrprune raises on purpose."""


class ArgumentError(JBRError, ValueError):
    """An argument, or a combination of arguments, has no meaning."""


class DataError(JBRError, ValueError):
    """The images or labels cannot be used: empty, exhausted, wrong shape, not finite."""


class ModelError(JBRError, ValueError):
    """The model cannot be scored or pruned as it is."""


class NonFiniteError(JBRError, ArithmeticError):
    """NaN or Inf appeared in weights, activations or logits."""


class UnsupportedModelError(ModelError):
    """Nothing in this architecture can be removed safely, or removal changed its function."""


class BudgetError(ArgumentError):
    """The budget is malformed or cannot be reached."""


class CheckpointError(JBRError):
    """A saved model is missing, truncated, tampered with, or of an unknown format."""


class RankError(JBRError):
    """Another rank of a distributed job has failed, ended, or does something else."""


class MemoryLimitError(JBRError, MemoryError):
    """A batch of images does not fit into memory."""


def check_known(what: str, value: str, known: Iterable[str]) -> None:
    """Refuse a choice that does not exist.

    Raises:
        ArgumentError: It names the choices.
    """
    if value not in known:
        raise ArgumentError(f"{what} must be one of {', '.join(known)}, got {value!r}.")


def unknown(what: str, name: str, known: Iterable[str]) -> ArgumentError:
    """The error about a name that is not known: it names the nearest, or all.

    Example:
        >>> print(unknown("fruit", "appel", ["apple", "pear"]))
        Unknown fruit 'appel'; did you mean 'apple'?
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return ArgumentError(
        f"Unknown {what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}.")
    )
