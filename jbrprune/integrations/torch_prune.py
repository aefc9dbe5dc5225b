"""The seam to ``torch.nn.utils.prune``: its classes and functions, with relevance in the place of magnitude."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, ModelError, NonFiniteError
from jbrprune.sparsity.masks import Slot, slots
from jbrprune.sparsity.patterns import smallest


class JBRUnstructured(prune.BasePruningMethod):
    """Prune the weights with the smallest scores, exactly as many as asked for, ties included.

    For ``torch.nn.utils.prune.global_unstructured``, beside ``importance_scores=scores.importance_scores(model)``.
    The scores are taken as they are; where none are given torch hands over the weights themselves, which are refused
    if one of them is negative.

    Args:
        amount: Share in [0, 1), or an absolute number below the number of weights.

    Raises:
        ArgumentError: Another amount.

    Example:
        >>> from jbrprune.criteria.weight_relevance import weight_scores
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> scores = weight_scores(net, torch.randn(8, 3, 2, 2))
        >>> prune.global_unstructured([(net[1], "weight")], JBRUnstructured, scores.importance_scores(net), amount=0.5)
        >>> int((net[1].weight == 0).sum())
        24
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float | int) -> None:
        _check_amount(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The mask of `BasePruningMethod`: zeros at the smallest of the scores ``t``, and where it was zero before."""
        _check_values(t, "importance_scores")
        count = _count(self.amount, t.numel())
        gone = smallest(t.detach().double().flatten(), count).view(t.shape)
        return default_mask.clone(memory_format=torch.contiguous_format).masked_fill_(gone, 0)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float | int, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Add the mask and the hook to a module, as all methods of ``torch.nn.utils.prune`` do."""
        found = {slot.kind: slot for slot in slots(module) if slot.module is module}
        if name in found:  # torch takes the hook of an earlier mask away before it asks for the new one
            _check_values(found[name].effective if importance_scores is None else importance_scores, name)
            _check_left(_left(found[name]), amount, name)
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


def jbr_unstructured(
    module: nn.Module, name: str, amount: float | int, scores: WeightScores | Tensor, *, parameter: str | None = None
) -> nn.Module:
    """Prune one parameter by relevance, as ``torch.nn.utils.prune.l1_unstructured`` does by magnitude.

    Args:
        module: The module, possibly pruned before: then the amount counts what is left.
        name: ``weight`` or ``bias``.
        amount: Share in [0, 1), or an absolute number of weights.
        scores: Scores in the parameter's shape, or those of a whole model together with ``parameter``.
        parameter: Qualified name under which ``scores`` have this parameter, such as ``layer1.0.conv1.weight``.

    Returns:
        The same module, with ``weight_orig``, ``weight_mask`` and the hook that multiplies them.

    Raises:
        ArgumentError: No such parameter, an amount out of range, scores of another shape or of other units.
        ModelError: The parameter is fully pruned already.
        NonFiniteError: NaN or Inf in the scores.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> int(jbr_unstructured(layer, "weight", 3, torch.rand(2, 4)).weight_mask.sum())
        5
    """
    found = {slot.kind: slot for slot in slots(module) if slot.module is module}
    if name not in found:
        raise ArgumentError(
            f"{type(module).__name__} has no parameter {name!r} of its own that can be pruned; it has {sorted(found)}."
        )
    values = _values(scores, parameter)
    slot = found[name]
    if values.shape != slot.stored.shape:
        raise ArgumentError(
            f"The scores have shape {tuple(values.shape)}, but {name} has {tuple(slot.stored.shape)}: they are of "
            "another parameter."
        )
    _check_values(values, parameter or name)
    _check_left(_left(slot), amount, parameter or name)
    JBRUnstructured.apply(module, name, amount, values.to(slot.stored.device))
    return module


def jbr_global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    amount: float | int,
    importance_scores: Mapping[tuple[nn.Module, str], Tensor],
) -> None:
    """``torch.nn.utils.prune.global_unstructured`` by relevance, with everything checked before the first mask.

    Args:
        parameters: ``(module, "weight")`` pairs; any iterable (torch's own function needs a list, it walks it thrice).
            A weight that several modules share counts once, and is masked in all of them.
        amount: Share in [0, 1), or an absolute number, of all their weights that are left.
        importance_scores: From `WeightScores.importance_scores`.

    Raises:
        ArgumentError: No parameters, one that has no scores or other ones, or an amount out of range.
        ModelError: They are fully pruned already.
        NonFiniteError: NaN or Inf in the scores.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> jbr_global_unstructured(((m, "weight") for m in [layer]), 0.5, {(layer, "weight"): torch.rand(2, 4)})
        >>> int(layer.weight_mask.sum())
        4
    """
    pairs = list(parameters)
    if not pairs:
        raise ArgumentError("parameters is empty: give (module, 'weight') pairs.")
    first: dict[int, tuple[nn.Module, str]] = {}
    owners: dict[tuple[nn.Module, str], Slot] = {}
    left = 0
    for module, name in pairs:
        if (module, name) not in importance_scores:
            raise ArgumentError(f"{type(module).__name__}.{name} has no scores. Score it, or leave it out.")
        stored = next((slot for slot in slots(module) if slot.module is module and slot.kind == name), None)
        values = importance_scores[module, name]
        if stored is None or values.shape != stored.stored.shape:
            raise ArgumentError(
                f"{type(module).__name__}.{name}: scores of shape {tuple(values.shape)} do not fit. They are of "
                "another parameter."
            )
        _check_values(values, f"{type(module).__name__}.{name}")
        if first.setdefault(id(stored.stored), (module, name)) == (module, name):
            left += _left(stored)
            owners[module, name] = stored
    _check_left(left, amount, f"{len(owners)} parameters")
    prune.global_unstructured(list(owners), JBRUnstructured, dict(importance_scores), amount=amount)
    for module, name in pairs:  # a shared weight counts once, and all its modules get the same mask
        owner = owners.get((module, name))
        if owner is None:
            mask = owners[first[id(_slot(module, name).stored)]].mask
            prune.custom_from_mask(module, name, mask)


def _slot(module: nn.Module, name: str) -> Slot:
    return next(slot for slot in slots(module) if slot.module is module and slot.kind == name)


def _left(slot: Slot) -> int:
    return slot.stored.numel() if slot.mask is None else int(slot.mask.sum())


def _values(scores: WeightScores | Tensor, parameter: str | None) -> Tensor:
    if isinstance(scores, Tensor):
        return scores
    if not isinstance(scores, WeightScores):
        raise ArgumentError(
            f"scores must be a tensor or scores of single weights (granularity='weight'), got {type(scores).__name__}."
        )
    if parameter is None or parameter not in scores.sums:
        raise ArgumentError(
            f"parameter={parameter!r} is not scored; give its name in the scored model, such as "
            f"{next(iter(scores.sums))!r}."
        )
    return scores[parameter]


def _check_amount(amount: float | int) -> None:
    whole = isinstance(amount, Integral) and not isinstance(amount, bool)
    if not (whole and amount >= 0) and not (isinstance(amount, float) and 0 <= amount < 1):
        raise ArgumentError(f"amount must be a share in [0, 1) or a number of weights >= 0, got {amount!r}.")


def _count(amount: float | int, size: int) -> int:
    if isinstance(amount, Integral) and amount > size:
        raise ArgumentError(f"amount={amount} is more than the {size} weights that are left.")
    return int(amount) if isinstance(amount, Integral) else round(amount * size)


def _check_left(left: int, amount: float | int, where: str) -> None:
    _check_amount(amount)
    if left == 0:
        raise ModelError(f"{where}: fully pruned already, nothing is left.")
    _count(amount, left)


def _check_values(values: Tensor, where: str) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"The scores of {where} contain NaN or Inf: nothing can be ranked by them. Score again.")
    if (values < 0).any():
        raise ArgumentError(
            f"The scores of {where} are negative in places: relevances are not. Pass "
            "importance_scores=scores.importance_scores(model); without it torch hands over the weights themselves."
        )
