"""predict(): what a pruning would cost, for every budget, before anything is cut."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import KINDS, Budget
from jbrprune.budgets.selection import Floors
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch, concatenate, count, rebatch
from jbrprune.errors import ArgumentError, BudgetError, DataError
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.prediction.checking import FLIPS, TOLERANCE, Check, check, constant, tpvs_agree
from jbrprune.prediction.correction import Correction, corrected
from jbrprune.prediction.damage import Damage, measured_damage
from jbrprune.prediction.forecast import Forecast, forecast
from jbrprune.pruning.channels import Channels, find_channels
from jbrprune.pruning.loop import run
from jbrprune.pruning.options import ChannelOptions
from jbrprune.pruning.prepare import Calibration, Problem, open_problem, read_calibration
from jbrprune.report.records import import_optional
from jbrprune.structure.groups import Group
from jbrprune.structure.slicing import masked_units
from jbrprune.tpv.validity import TPVWarning

if TYPE_CHECKING:
    from pandas import DataFrame

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
CALIBRATED_AT = {1: (0.15,), 2: (0.05, 0.2), 3: (0.03, 0.1, 0.25)}
"""Number of points -> predicted flips (without repair) next to which they lie."""


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def predict(
    model: nn.Module | str,
    data: object,
    *,
    macs: Sequence[float] | None = None,
    params: Sequence[float] | None = None,
    channels: Sequence[float] | None = None,
    calibrate: int = 0,
    checked: int | None = 64,
    saturate: bool = True,
    tolerance: float = TOLERANCE,
    repair: str | Sequence[str] | None = "auto",
    criterion: str | Relevance | Scores | Callable[..., Any] = "jbr",
    ignore: Sequence[str] = (),
    floors: Floors = Floors(),  # noqa: B008
    images: int | None = 512,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> DataFrame:
    r"""Predict what pruning to each budget would do to the outputs; nothing is cut.

    The units that one step of `jbrprune.prune` would remove are ranked on the dense model (same criterion, cost,
    floors), and their first-order effect on the logits of every sample, -J(x) w_S, is read off one pass, for all
    budgets together. It saturates where it grows as large as the logits: change (1 - exp(-n)) / n, n = ||change|| /
    ||f - mean f||. With it TPV = E_x ||change||^2 and the share of samples whose top-1 flips.

    With repair (``..._repaired``), the means of what goes are taken over, and of the rest every layer keeps the share
    of the amplitude that least squares on the kept inputs cannot reproduce. That a run repairs and ranks anew after
    every step cannot be foreseen: without ``calibrate`` these columns are a rough, mostly too dark picture.

    Of more than ten classes, the ten largest logits of every sample are followed one by one: a flip to another class is
    not seen; the other logits enter the TPV through random signs.

    Args:
        model: As for `jbrprune.prune`.
        data: As for `jbrprune.prune`; labels are not looked at (but by a criterion that needs them).
        macs: Shares of the multiply-accumulates to keep. Give at most one of macs, params, channels; default: macs
            0.9, 0.8, ..., 0.2, as far as the floors allow.
        params: Shares of the parameters to keep.
        channels: Shares of the channels to keep.
        calibrate: Number of budgets, up to 3, at which it really prunes (as `jbrprune.prune` would, and without repair
            in one step), to correct the curves. What was measured there stands in the ``measured`` columns.
        checked: Number of images on which every budget is looked at by running the dense model with the units masked
            (nothing is cut): it measures the error of the first order, and the ``masked`` columns. None: all images.
        saturate: False: plain first order, exact for a linear network.
        tolerance: Relative error of the predicted change up to which a row is called valid.
        repair: As for `jbrprune.prune`; whether least squares is among what is tried. None: the ``_repaired`` columns
            are NaN.
        criterion: As for `jbrprune.prune`.
        ignore: As for `jbrprune.prune`.
        floors: As for `jbrprune.prune`.
        images: Images to read; None: all. They are kept in memory.
        batch_size: Images per pass.
        seed: Seeds the split of the images and everything random.
        progress: Show progress bars.

    Returns:
        One row per budget, largest first. ``target``; ``macs`` and ``params``, the shares that would stay;
        ``predicted_tpv`` (summed over outputs, mean over samples) with its standard error ``predicted_tpv_se``,
        ``predicted_flips`` with its 95 % interval ``predicted_flips_low`` and ``_high`` (both of the choice of images
        alone), the same with ``_repaired``; measured with the units masked, no repair, on the images that are checked:
        ``masked_tpv``, ``masked_flips``, the relative errors of the change of the followed logits, to plain first
        order (``taylor_error``) and as it is predicted here (``prediction_error``), and ``valid``: whether the latter
        is within the tolerance, predicted and masked TPV differ by no more than a factor of 1 + tolerance, and
        the 95 % interval of predicted minus masked flips lies within 10 points of 0 (which fewer than 18
        images cannot tell: then nothing is valid); ``valid_repaired``: whether the pruned points next to the row are
        each predicted right by the other ones, NA outside of two pruned points; with ``calibrate`` also
        ``measured_tpv``, ``measured_flips`` and the same ``_repaired``, NaN where nothing was pruned.

    Raises:
        ArgumentError: An argument has no meaning.
        BudgetError: Several kinds of budgets, none, equal ones, or one below what the floors allow.
        DataError: The images cannot be used, or are too few to calibrate.
        ModelError: The model cannot be pruned as it is, or has a single output.
        NonFiniteError: NaN or Inf in weights, images, logits or gradients.
        ImportError: pandas is not installed.

    Example:
        >>> import torch
        >>> from jbrprune.models.timm_models import create
        >>> net = create("resnet10t", pretrained=False, zero_init_last=False)  # at zero, blocks would do nothing
        >>> table = predict(net, torch.randn(8, 3, 32, 32), macs=[0.9, 0.7], progress=False)
        >>> bool(table.predicted_tpv[0] < table.predicted_tpv[1])
        True

    Source:
        Arpit, arXiv 2512.11089 (TPV as the cost of a removal).
    """
    pandas = import_optional("pandas")
    given_shares = {"macs": macs, "params": params, "channels": channels}
    kind, shares = _shares(given_shares)
    by_default = not any(share is not None for share in given_shares.values())
    _check(calibrate, checked, tolerance)
    if calibrate > 1 and isinstance(criterion, Scores):
        raise ArgumentError("Scores made before hold for one step: calibrate at one budget, or pass a function.")
    least = shares[0 if by_default else -1]
    options = ChannelOptions(
        criterion=criterion,
        ignore=ignore,
        batch_size=batch_size,
        progress=progress,
        repair=repair,
        images=images,
        seed=seed,
        floors=floors,
        **{kind: least},
    )
    problem = open_problem(model, data, batch_size)
    problem.check_classes("predict")
    state = find_channels(problem, options, (least,))
    shares = [share for share in shares if share >= state.least]
    how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    read = read_calibration(problem.dense, problem.data, images=images, **how)
    if calibrate and not read.gate:
        raise DataError(f"calibrate= prunes and repairs, which {count(read.score)} images are too few for.")
    scores = state.score(read.score, options, 1)
    cuts = [state.plan(scores, share) for share in shares]
    every = rebatch([*read.heldout, *read.score], batch_size)
    predicted = forecast(
        state.model,
        every,
        state.groups,
        [cut.units for cut in cuts],
        refits=_refits(options),
        saturate=saturate,
        seed=seed,
        progress=progress,
    )
    chosen = _chosen(predicted, len(cuts), calibrate)
    seen = [
        masked_logits(state.model, every if number in chosen else first(every, checked), state.groups, cut.units)
        for number, cut in enumerate(cuts)
    ]
    reference = _references(every)
    measured = {number: measured_damage(reference, seen[number]) for number in chosen}
    repaired = _really_pruned(problem, state, read, options, {number: cuts[number].target for number in chosen})
    bent = corrected((predicted.damage(number).tpv, measured[number].tpv) for number in chosen)
    heldout = predicted.first(count(read.heldout))
    bent_repaired = corrected((heldout.damage(i, repaired=True).tpv, repaired[i].tpv) for i in chosen)
    found = [
        check(predicted, n, masked, reference, scale=bent.scale(predicted.damage(n).tpv), tolerance=tolerance)
        for n, masked in enumerate(seen)
    ]
    warn_if_constant(reference)
    supported = _supported(heldout, repaired, tolerance)
    rows = []
    for number, cut in enumerate(cuts):
        row: dict[str, Any] = {"target": cut.target, "macs": cut.macs, "params": cut.params}
        row |= _predicted(predicted, number, bent) | _predicted(predicted, number, bent_repaired, repaired=True)
        row |= _checked(found[number]) | {"valid_repaired": supported.get(number, pandas.NA)}
        row |= _measured(measured.get(number)) | _measured(repaired.get(number), "_repaired")
        rows.append(row if options.methods else row | dict.fromkeys(_of_repair(row), math.nan))
    return pandas.DataFrame(rows)


def masked_logits(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[Group], units: Mapping[str, Tensor]
) -> Tensor:
    """``[N, K]`` what the whole model computes without some units; nothing is cut."""
    with masked_units(model, groups, units):
        return torch.cat(compute_logits(model, batches))


def first(batches: Sequence[Batch], number: int | None) -> list[Batch]:
    """The first so many images; None: all."""
    if number is None:
        return list(batches)
    whole = concatenate(list(batches)).map(lambda tensor: tensor[:number])
    return rebatch([whole], len(batches[0]))


def warn_if_constant(logits: Tensor) -> None:
    """Warn where the dense model tells no image from another: whatever is removed, that is no damage to go by."""
    if len(logits) > 1 and constant(logits):
        warnings.warn(
            "All images have the same logits: nothing can be learnt from them about what removal does, and nothing is "
            "called valid. Are the images all alike, or is the head zero?",
            TPVWarning,
            stacklevel=3,
        )


def _shares(given: Mapping[str, Sequence[float] | None]) -> tuple[str, list[float]]:
    """The kind of budget, and its shares, falling."""
    kinds = [kind for kind, shares in given.items() if shares is not None] or ["macs"]
    if len(kinds) > 1:
        raise BudgetError(f"Give shares of one kind: {', '.join(KINDS)}; got {' and '.join(kinds)}.")
    wanted = given[kinds[0]]
    wanted = list(SHARES if wanted is None else wanted) if not isinstance(wanted, Real) else [float(wanted)]
    shares = sorted((Budget.of(**{kinds[0]: share}).share for share in wanted), reverse=True)
    if not shares or len(set(shares)) < len(shares):
        raise BudgetError(f"{kinds[0]} must be one or more different shares, got {wanted}.")
    return kinds[0], shares


def _check(calibrate: int, checked: int | None, tolerance: float) -> None:
    if calibrate not in (0, *CALIBRATED_AT) or isinstance(calibrate, bool):
        raise ArgumentError(f"calibrate must be 0, 1, 2 or 3 (budgets to really prune to), got {calibrate!r}.")
    if checked is not None and (not isinstance(checked, Integral) or checked < 1):
        raise ArgumentError(f"checked must be a number of images of at least 1, or None for all, got {checked!r}.")
    if not 0 < tolerance < math.inf:
        raise ArgumentError(f"tolerance must satisfy 0 < tolerance < inf, got {tolerance!r}.")


def _refits(options: ChannelOptions) -> bool:
    return "auto" in options.methods or "least_squares" in options.methods


def _references(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.reference for batch in batches if batch.reference is not None])


def _chosen(predicted: Forecast, cuts: int, number: int) -> list[int]:
    """The cuts to prune really to: those with predicted flips next to `CALIBRATED_AT`, the deepest of equals."""
    flips = [predicted.damage(cut).flips for cut in range(cuts)]
    chosen: list[int] = []
    for wanted in CALIBRATED_AT.get(number, ()):
        left = [cut for cut in range(cuts) if cut not in chosen]
        if left:
            chosen.append(min(left, key=lambda cut, wanted=wanted: (abs(flips[cut] - wanted), -cut)))
    return sorted(chosen)


def _really_pruned(
    problem: Problem, state: Channels, read: Calibration, options: ChannelOptions, targets: Mapping[int, float]
) -> dict[int, Damage]:
    """Number of a cut -> what pruning to its target did to held-out images, with all steps and repairs."""
    if not targets:
        return {}
    stopping = replace(state.copy(), stops=tuple(targets.values()))
    reference = _references(read.heldout)
    pruned = run(problem, read, stopping, options)
    return {
        number: measured_damage(reference, torch.cat(compute_logits(delivery.model, read.heldout)))
        for number, (delivery, _) in zip(targets, pruned, strict=True)
    }


def _predicted(predicted: Forecast, cut: int, bent: Correction, *, repaired: bool = False) -> dict[str, float]:
    scale = bent.scale(predicted.damage(cut, repaired=repaired).tpv)
    found = predicted.damage(cut, repaired=repaired, scale=scale)
    return {f"predicted_{name}{'_repaired' * repaired}": value for name, value in vars(found).items()}


def _checked(found: Check) -> dict[str, float | bool]:
    errors = {"taylor_error": found.taylor_error, "prediction_error": found.prediction_error, "valid": found.valid}
    return errors | {"masked_tpv": found.masked.tpv, "masked_flips": found.masked.flips}


def _supported(predicted: Forecast, measured: Mapping[int, Damage], tolerance: float) -> dict[int, bool]:
    """Cut -> whether the curve with repair holds there, for cuts from the first of several pruned ones to the last.

    At a pruned cut it does if that is predicted right, TPV and flips, from all pruned ones but itself; between two of
    them, if both are. Elsewhere nothing is known.
    """
    if len(measured) < 2:
        return {}
    points = {number: (predicted.damage(number, repaired=True).tpv, real.tpv) for number, real in measured.items()}
    right = {}
    for number, real in measured.items():
        bent = corrected(pair for other, pair in points.items() if other != number)
        found = predicted.damage(number, repaired=True, scale=bent.scale(points[number][0]))
        right[number] = tpvs_agree(found.tpv, real.tpv, tolerance) and abs(found.flips - real.flips) <= FLIPS
    between = {
        number: right[before] and right[after]
        for before, after in pairwise(sorted(right))
        for number in range(before + 1, after)
    }
    return right | between


def _of_repair(row: Mapping[str, Any]) -> list[str]:
    """Columns that mean nothing where nothing is repaired."""
    return [name for name in row if name.endswith("_repaired") and name != "valid_repaired"]


def _measured(found: Damage | None, suffix: str = "") -> dict[str, float]:
    tpv, flips = (math.nan, math.nan) if found is None else (found.tpv, found.flips)
    return {f"measured_tpv{suffix}": tpv, f"measured_flips{suffix}": flips}
