"""degradation(): predicted against measured damage, for something concrete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data.batches import Batch, count
from jbrprune.errors import ArgumentError, DataError
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.prediction.checking import TOLERANCE, check
from jbrprune.prediction.damage import Damage, measured_damage
from jbrprune.prediction.forecast import forecast
from jbrprune.prediction.predict import masked_logits, warn_if_constant
from jbrprune.pruning.api import PruneResult
from jbrprune.pruning.channels import find_units
from jbrprune.pruning.prepare import open_problem, read_calibration
from jbrprune.report.records import Report
from jbrprune.structure.groups import Group


@dataclass(frozen=True)
class Degradation:
    """What removing units was predicted to do to the outputs, and what it does.

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

    def __str__(self) -> str:
        """A small table."""
        rows = [("without repair", self.predicted, self.measured)]
        rows += [("with repair", self.predicted_repaired, self.measured_repaired)]
        lines = [f"{self.images} images{'TPV predicted':>22}{'measured':>12}{'flips predicted':>18}{'measured':>12}"]
        for name, predicted, measured in rows:
            real = ("-", "-") if measured is None else (f"{measured.tpv:.4g}", f"{measured.flips:.2%}")
            lines.append(f"{name:14}{predicted.tpv:>19.4g}{real[0]:>12}{predicted.flips:>18.2%}{real[1]:>12}")
        verdict = "valid" if self.valid else "not valid here"
        errors = f"relative error {self.prediction_error:.2f}, of the plain first order {self.taylor_error:.2f}"
        return "\n".join([*lines, f"{errors}: {verdict}"])


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def degradation(
    model: nn.Module,
    removed: PruneResult | Report | Mapping[str, Sequence[int] | Tensor],
    data: object,
    *,
    pruned: nn.Module | None = None,
    saturate: bool = True,
    tolerance: float = TOLERANCE,
    refits: bool = True,
    ignore: Sequence[str] | None = None,
    width: bool | None = None,
    images: int | None = 512,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Degradation:
    r"""Predict what removing given units does to the outputs, and measure it on the same images.

    TPV = E_x \|\|f'(x) - f(x)\|\|^2, and the share of samples whose top-1 flips; predicted as by `jbrprune.predict`.

    Args:
        model: The dense model; left as it was.
        removed: What went, by any criterion: a result or a report of `jbrprune.prune`, or group -> units of the dense
            model (as in ``report.removed``; groups as in `jbrprune.score`).
        data: Images to predict and to measure on; labels are not looked at.
        pruned: The pruned model, where ``removed`` does not have it.
        saturate: As for `jbrprune.predict`.
        tolerance: Relative error of the predicted change up to which it is called valid.
        refits: Whether the repair refits weights by least squares.
        ignore: As it was when the units were found; a report knows it.
        width: As it was when the units were found; a report knows it.
        images: Images to read; None: all.
        batch_size: Images per pass.
        seed: Seeds the order of the images and the random signs.
        progress: Show progress bars.

    Raises:
        ArgumentError: Nothing was removed, or the units are not those of this model.
        DataError: The images cannot be used.
        ModelError: The model cannot be scored as it is, or has a single output.
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
    left_out: Any = how.get("ignore", ()) if ignore is None else ignore
    widths = bool(how.get("width", False) if width is None else width)
    problem = open_problem(model, data, batch_size)
    problem.check_classes("degradation")
    _, found = find_units(problem.dense, problem.example, left_out, widths)
    cut = checked_units(units, found.groups)
    batches = _read(problem.dense, problem.data, images, batch_size, seed, progress)
    predicted = forecast(
        problem.dense,
        batches,
        found.groups,
        [cut],
        refits=refits,
        saturate=saturate,
        seed=seed,
        progress=progress,
    )
    reference = torch.cat([batch.reference for batch in batches if batch.reference is not None])
    masked = masked_logits(problem.dense, batches, found.groups, cut)
    seen = check(predicted, 0, masked, reference, tolerance=tolerance)
    warn_if_constant(reference)
    return Degradation(
        images=count(batches),
        predicted=predicted.damage(0),
        measured=seen.masked,
        predicted_repaired=predicted.damage(0, repaired=True),
        measured_repaired=None if pruned is None else _of(pruned, batches, reference),
        taylor_error=seen.taylor_error,
        prediction_error=seen.prediction_error,
        valid=seen.valid,
    )


def checked_units(units: Mapping[str, Sequence[int] | Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
    """Group -> units, ascending, that exist in these groups.

    Raises:
        ArgumentError: None, an unknown group, or a unit that a group does not have.
    """
    sizes = {group.name: group.size for group in groups}
    checked = {}
    for name, given in units.items():
        chosen = torch.as_tensor(given, dtype=torch.long).flatten().unique()
        if name not in sizes:
            raise ArgumentError(
                f"The model has no removable group {name!r} (it has {', '.join(list(sizes)[:5])}, ...). Were the units "
                "found with another ignore= or width=, or on another model?"
            )
        if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < sizes[name]:
            raise ArgumentError(
                f"{name} has units 0 to {sizes[name] - 1}, got {int(chosen[0])} to {int(chosen[-1])}. Units are "
                "counted in the dense model."
            )
        if len(chosen) == sizes[name]:
            raise ArgumentError(f"All {sizes[name]} units of {name} would go: one must stay.")
        if len(chosen):
            checked[name] = chosen
    if not checked:
        raise ArgumentError("Nothing was removed: there is nothing to predict. (Single weights: see jbrprune.tpv.)")
    return checked


def _read(
    model: nn.Module, data: object, images: int | None, batch_size: int, seed: int, progress: bool
) -> list[Batch]:
    """The images in one order for both passes, with the dense model's logits."""
    parts = read_calibration(model, data, images=images, batch_size=batch_size, seed=seed, progress=progress)
    return [*parts.heldout, *parts.score]


def _of(pruned: nn.Module, batches: Sequence[Batch], reference: Tensor) -> Damage:
    logits = torch.cat(compute_logits(pruned, batches))
    if logits.shape != reference.shape:
        raise DataError(f"The pruned model gives logits {list(logits.shape)}, the dense one {list(reference.shape)}.")
    return measured_damage(reference, logits)
