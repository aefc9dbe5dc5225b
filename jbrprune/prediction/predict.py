"""predict() and degradation(): the effect of a pruning before anything is cut, compared with measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import Floors
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.data.batches import Batch, concatenate, count, rebatch
from jbrprune.errors import ArgumentError, BudgetError, DataError, check_known
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.evaluation.outputs import LOGITS, Output
from jbrprune.prediction.changes import predict_changes
from jbrprune.prediction.damage import Correction, Damage, check, measure_damage, warn_if_constant
from jbrprune.pruning.api import PruneResult
from jbrprune.pruning.channels import find_channels, find_units
from jbrprune.pruning.loop import run
from jbrprune.pruning.options import ChannelOptions, RunOptions, between, whole
from jbrprune.pruning.prepare import open_problem, read_calibration
from jbrprune.report.records import Report, import_optional
from jbrprune.structure.groups import Group
from jbrprune.structure.slicing import masked_units
from jbrprune.tpv.covariances import check_units

if TYPE_CHECKING:
    from pandas import DataFrame

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
CALIBRATED_AT = 0.15
"""Predicted flips, or relative error (without repair) next to which the calibrated budget lies."""


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def predict(
    model: nn.Module | str,
    data: object,
    *,
    macs: Sequence[float] | None = None,
    params: Sequence[float] | None = None,
    channels: Sequence[float] | None = None,
    calibrate: bool = False,
    checked: int | None = 64,
    structure: Literal["auto", "channels", "directions"] = "auto",
    repair: str | Sequence[str] | None = "auto",
    criterion: str | Relevance | Scores | Callable[..., Any] = "jbr",
    ignore: Sequence[str] = (),
    output: str | int | Callable[[Any], Any] | None = None,
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
    every step cannot be foreseen: without ``calibrate`` these columns are a rough upper bound on the damage.

    Of more than ten classes, the ten largest logits of every sample are followed one by one: a flip to another class is
    not seen; the other logits enter the TPV through random signs. Of dense logits the flips are those of one position,
    drawn for every image; of what is no decision they are NaN, and the TPV is the sum of the relative squared errors of
    all tensors that count.

    Args:
        model: As for `jbrprune.prune`.
        data: As for `jbrprune.prune`; labels are not looked at (but by a criterion that needs them).
        macs: Shares of the multiply-accumulates to keep. Give at most one of macs, params, channels; default: macs
            0.9, 0.8, ..., 0.2, as far as the floors allow.
        params: Shares of the parameters to keep.
        channels: Shares of the channels to keep.
        calibrate: Really prune to one budget (as `jbrprune.prune` would, and without repair in one step), that with
            about 15 % predicted flips (or relative error), and bend the curves through what was measured there, which
            stands in the ``measured`` columns.
        checked: Number of images on which every budget is looked at by running the dense model with the units masked
            (nothing is cut): it measures the error of the first order, and the ``masked`` columns. None: all images.
        structure: As for `jbrprune.prune`: what goes; ``auto`` means channels and heads.
        repair: As for `jbrprune.prune`; whether least squares is among what is tried. None: the ``_repaired`` columns
            are NaN.
        criterion: As for `jbrprune.prune`.
        ignore: As for `jbrprune.prune`.
        output: As for `jbrprune.prune`.
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
        ``masked_tpv``, ``masked_flips``, the relative errors of the change of the followed logits, to plain first order
        (``taylor_error``) and as it is predicted here (``prediction_error``), and ``valid``: whether the latter is at
        most .3, predicted and masked TPV differ by no more than a factor of 1.3, predicted and masked flips by no more
        than that factor, a point or one image, and the 95 % interval of their difference lies within 10 points of 0
        (which fewer than 18 images cannot tell: then nothing is valid); with ``calibrate`` also ``measured_tpv``,
        ``measured_flips`` and the same ``_repaired``, NaN where nothing was pruned.

    Raises:
        ArgumentError: An argument has no meaning.
        BudgetError: Several kinds of budgets, none, equal ones, or one below what the floors allow.
        DataError: The images cannot be used, or are too few to calibrate.
        ModelError: The model cannot be pruned as it is.
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
    check_known("structure", structure, ("auto", "channels", "directions"))
    given: dict[str, Any] = {"macs": macs, "params": params, "channels": channels}
    given = {kind: wanted for kind, wanted in given.items() if wanted is not None}
    kind, wanted = next(iter(given.items()), ("macs", SHARES))
    wanted = [wanted] if isinstance(wanted, Real) else wanted
    for share in wanted:
        between(0, 1)(kind, share)
    shares = sorted(map(float, wanted), reverse=True)
    if len(given) > 1 or not shares or len(set(shares)) < len(shares):
        raise BudgetError(f"Give one or more different shares of one kind: macs, params or channels; got {given}.")
    whole(1, optional=True)("checked", checked)
    least: Any = {kind: shares[-1] if given else shares[0]}
    common = criterion, ignore, output, batch_size, progress, repair, images, None, seed
    options = ChannelOptions(
        *common, **least, floors=floors, structure="channels" if structure == "auto" else structure
    )
    problem = open_problem(model, data, batch_size, output)
    state = find_channels(problem, options, (*least.values(),))
    shares = [share for share in shares if share >= state.least]
    read = read_calibration(problem, options)
    state.output = counts = read.output
    if calibrate and not read.gate:
        raise DataError(f"calibrate= prunes and repairs, which {count(read.score)} images are too few for.")
    scores = state.score(read.score, 1)
    cuts = [state.plan(scores, share) for share in shares]
    every = rebatch([*read.heldout, *read.score], batch_size)
    reference, units = _references(every), [cut.units for cut in cuts]
    how: dict[str, Any] = {"refits": options.refits, "seed": seed, "progress": progress}
    changes = predict_changes(state.model, every, state.groups, units, counts, **how)
    damages = [changes.damage(number) for number in range(len(cuts))]
    curve = curve_repaired = Correction()
    measured: dict[int, tuple[Damage, Damage]] = {}
    if calibrate:  # the deepest of equals
        point = min(range(len(cuts)), key=lambda cut: (abs(changes.lost(cut) - CALIBRATED_AT), -cut))
        stopping = replace(state.copy(), stops=(cuts[point].target,))
        pruned = next(run(stopping, read)).model
        found = torch.cat(compute_logits(pruned, read.heldout, counts))
        real = measure_damage(_references(read.heldout), found, counts)
        found = compute_masked_logits(state.model, every, state.groups, units[point], counts)
        masked = measure_damage(reference, found, counts)
        measured[point] = masked, real
        curve = Correction.through(damages[point].tpv, masked.tpv)
        heldout = changes.first(count(read.heldout))
        curve_repaired = Correction.through(heldout.damage(point, repaired=True).tpv, real.tpv)
    warn_if_constant(reference)
    few = every if checked is None else rebatch([concatenate(every).map(lambda t: t[:checked])], batch_size)
    rows = []
    for number, cut in enumerate(cuts):
        row: dict[str, Any] = {"target": cut.target, "macs": cut.macs, "params": cut.params}
        for suffix, bent in (("", curve), ("_repaired", curve_repaired)):
            tpv = changes.damage(number, repaired=bool(suffix)).tpv
            found = changes.damage(number, repaired=bool(suffix), scale=bent.scale(tpv))
            row |= {f"predicted_{name}{suffix}": value for name, value in vars(found).items()}
        logits = compute_masked_logits(state.model, few, state.groups, cut.units, counts)
        seen = check(changes, number, logits, reference, scale=curve.scale(damages[number].tpv))
        row |= {name: getattr(seen, name) for name in ("taylor_error", "prediction_error", "valid")}
        row |= {"masked_tpv": seen.masked.tpv, "masked_flips": seen.masked.flips}
        for suffix, one in zip(("", "_repaired"), measured.get(number, (None, None))):
            row |= {f"measured_{name}{suffix}": getattr(one, name, math.nan) for name in ("tpv", "flips")}
        if not options.methods:
            row |= {name: math.nan for name in row if name.endswith("_repaired")}
        rows.append(row)
    return pandas.DataFrame(rows)


def compute_masked_logits(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    units: Mapping[str, Tensor],
    output: Output = LOGITS,
) -> Tensor:
    """``[N, V]`` outputs of the whole model with some units masked; nothing is cut."""
    with masked_units(model, groups, units):
        return torch.cat(compute_logits(model, batches, output))


def _references(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.reference for batch in batches if batch.reference is not None])


@dataclass(frozen=True)
class Degradation:
    """Predicted and measured effect of removing units.

    Attributes:
        images: Number of samples.
        predicted: TPV and flips without repair, from one pass over the dense model.
        measured: The same with the units masked in the dense model, which is what removal alone does.
        predicted_repaired: With repair.
        measured_repaired: Of the pruned model itself; None where it is not known.
        taylor_error: Relative error of the plain first-order change of the logits, without repair.
        prediction_error: The same of the change that is predicted.
        valid: Whether the prediction without repair agrees with what is measured (as in `jbrprune.predict`).
    """

    images: int
    predicted: Damage
    measured: Damage
    predicted_repaired: Damage
    measured_repaired: Damage | None
    taylor_error: float
    prediction_error: float
    valid: bool


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def degradation(
    model: nn.Module,
    removed: PruneResult | Report | Mapping[str, Sequence[int] | Tensor],
    data: object,
    *,
    pruned: nn.Module | None = None,
    output: str | int | Callable[[Any], Any] | None = None,
    images: int | None = 512,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Degradation:
    r"""Predict how the removal of given units changes the outputs, and measure it on the same images.

    TPV = E_x \|\|f'(x) - f(x)\|\|^2, and the share of samples whose top-1 flips; predicted as by `jbrprune.predict`.

    Args:
        model: The dense model; left as it was.
        removed: What went, by any criterion: a result or a report of `jbrprune.prune`, or group -> units of the dense
            model (as in ``report.removed``; groups as in `jbrprune.score`).
        data: Images to predict and to measure on; labels are not looked at.
        pruned: The pruned model, where ``removed`` does not have it.
        output: What of the model's output counts, as for `jbrprune.prune`.
        images: Images to read; None: all.
        batch_size: Images per pass.
        seed: Seeds the order of the images and the random signs.
        progress: Show progress bars.

    Raises:
        ArgumentError: No channel or head was removed, or the units are not those of this model.
        DataError: The images cannot be used.
        ModelError: The model cannot be scored as it is.
        NonFiniteError: NaN or Inf.

    Example:
        >>> import timm, torch
        >>> net = timm.create_model("resnet10t", zero_init_last=False).eval()
        >>> found = degradation(net, {"layer1.0.conv1": [0, 1]}, torch.randn(4, 3, 32, 32), progress=False)
        >>> found.measured.tpv > 0
        True

    Source:
        Arpit, arXiv 2512.11089.
    """
    if isinstance(removed, PruneResult):
        removed, pruned = removed.report, removed.model if pruned is None else pruned
    units, how = (removed.removed, removed.settings) if isinstance(removed, Report) else (removed, {})
    repair = how.get("repair", "auto")
    options = RunOptions(images=images, batch_size=batch_size, seed=seed, progress=progress, repair=repair)
    problem = open_problem(model, data, batch_size, output)
    _, found = find_units(problem.dense, problem.example, (), width=True)  # whatever the run left out
    cut = check_units(units, found.groups)
    if not cut:
        raise ArgumentError("removed= names no channel or head. (Directions: jbrprune.predict; weights: jbrprune.tpv.)")
    read = read_calibration(problem, options)
    batches = [*read.heldout, *read.score]  # in one order for all passes
    reference = _references(batches)
    passed: dict[str, Any] = {"refits": options.refits, "seed": seed, "progress": progress}
    changes = predict_changes(problem.dense, batches, found.groups, [cut], read.output, **passed)
    masked = compute_masked_logits(problem.dense, batches, found.groups, cut, read.output)
    seen = check(changes, 0, masked, reference)
    warn_if_constant(reference)
    real = None
    if pruned is not None:
        logits = torch.cat(compute_logits(pruned, batches, read.output))
        if logits.shape != reference.shape:
            raise DataError(
                f"The pruned model gives logits {list(logits.shape)}, the dense one {list(reference.shape)}."
            )
        real = measure_damage(reference, logits, read.output)
    return Degradation(
        images=count(batches),
        predicted=changes.damage(0),
        measured=seen.masked,
        predicted_repaired=changes.damage(0, repaired=True),
        measured_repaired=real,
        taylor_error=seen.taylor_error,
        prediction_error=seen.prediction_error,
        valid=seen.valid,
    )
