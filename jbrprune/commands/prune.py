"""`jbrprune prune`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from torch import nn

from jbrprune.budgets.selection import Floors
from jbrprune.checkpoint import checkpoint as files
from jbrprune.commands.options import (
    AsJson,
    BatchSize,
    Data,
    Device,
    ModelArguments,
    Objective,
    Pretrained,
    Repair,
    SiteName,
    SkipCorrupt,
    StatisticName,
    TimmName,
    Weights,
    check_file,
    device_named,
    model_arguments,
    relevance_of,
)
from jbrprune.commands.output import interactive, say
from jbrprune.data import distributed
from jbrprune.data.images import open_data
from jbrprune.errors import BudgetError, JBRError
from jbrprune.models import timm_models
from jbrprune.prediction.predict import predict
from jbrprune.pruning.api import prune, sparsify
from jbrprune.report.records import Report

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)


def prune_command(
    model: TimmName,
    data: Data,
    macs: Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep, such as 0.5.")] = None,
    params: Annotated[float | None, typer.Option(help="Share of the parameters to keep.")] = None,
    channels: Annotated[float | None, typer.Option(help="Share of the channels to keep.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Share of the time of a forward pass of one image, on this machine.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds of a forward pass of one image.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of the single weights to set to zero.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="As small as possible while accuracy (or agreement, without labels) falls by no more than this on "
            "images set aside, such as 0.01. A share beside it is the least to keep."
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M such as `2:4`: of every M weights along the inputs, N stay.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the pruned model.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that was saved there.")] = False,
    card: Annotated[bool, typer.Option(help="Write a model card beside the model, for the Hugging Face Hub.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a figure here (.png, .svg, .pdf).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained page here (.html).")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Measure the agreement on these images instead of a fifth of --data.")
    ] = None,
    images: Annotated[int, typer.Option(help="Calibration images to read.")] = 512,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps; default: one for every 5 %, for single weights one.")
    ] = None,
    repair: Repair = "auto",
    objective: Objective = None,
    site: SiteName = None,
    statistic: StatisticName = None,
    batch: Annotated[int | None, typer.Option(help="Samples per batch of `--statistic batched` (128).")] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Score only on images above this dense probability (0).")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="Variant of relevance to rank by, such as `jbr_published`, instead of its parts."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Glob of module names that keep their width. Repeatable.")
    ] = None,
    width: Annotated[bool, typer.Option(help="Also prune the residual width under LayerNorms.")] = False,
    floor: Annotated[
        float | None, typer.Option(help="Share of every layer's width (0) or of its weights (0.001) that stays.")
    ] = None,
    min_channels: Annotated[int, typer.Option(help="Channels of every layer that stay.")] = 8,
    round_to: Annotated[int, typer.Option(help="Kept widths are multiples of this.")] = 1,
    scope: Annotated[
        Literal["global", "layer"] | None, typer.Option(help="Rank single weights together (default) or by layer.")
    ] = None,
    remainder: Annotated[
        Literal["skip", "pad"] | None, typer.Option(help="What N:M does where M does not divide the inputs (skip).")
    ] = None,
    shrink: Annotated[bool, typer.Option(help="Remove channels that contribute nothing any more.")] = False,
    keep_masks: Annotated[
        bool, typer.Option(help="Leave the masks of torch.nn.utils.prune in place, to train on.")
    ] = False,
    checkpoint: Weights = None,
    model_arg: ModelArguments = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 32,
    skip_corrupt: SkipCorrupt = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Note every finished step in this directory, and go on behind the last one.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prune a timm model to a budget and say what it cost.

    Example: `jbrprune prune resnet50 --data photos/ --macs 0.5 --out pruned/`; single weights with `--sparsity 0.9`
    or `--pattern 2:4` in the place of `--macs`.
    """
    if out is not None:
        files.check_target(out, overwrite=overwrite)
    for file in (plot, report):
        check_file(file)
    sparse = sparsity is not None or pattern is not None
    module = timm_models.create(model, checkpoint=checkpoint, pretrained=pretrained, **model_arguments(model_arg))
    relevance: dict[str, Any] = {"objective": objective, "site": site, "statistic": statistic, "batch": batch}
    preset = criterion or ("jbr_projection" if sparse else "jbr")
    changed = any(value is not None for value in (*relevance.values(), confidence))
    opened = open_data(data, module, batch_size=batch_size, skip_corrupt=skip_corrupt)
    shared: dict[str, Any] = {
        "criterion": relevance_of(preset, **relevance, confidence=confidence) if changed else preset,
        "repair": None if repair == "none" else repair,
        "ignore": ignore or (),
        "images": images,
        "eval_data": eval_data,
        "batch_size": batch_size,
        "seed": seed,
        "resume": resume,
        "progress": interactive(as_json),
    }
    budgets = {"macs": macs, "params": params, "channels": channels, "latency": latency, "latency_ms": latency_ms}
    budgets |= {"max_drop": max_drop}
    floors = Floors(0.0 if sparse else floor or 0.0, min_channels, round_to, width)
    module = module.to(device_named(device))
    if sparse:
        others = [name for name, value in budgets.items() if value is not None]
        if others:
            raise BudgetError(f"--sparsity and --pattern are of single weights, --{others[0]} is not: leave one out.")
        own = {"scope": scope, "remainder": remainder, "floor": floor, "steps": steps}
        own = {name: value for name, value in own.items() if value is not None}
        how = {"sparsity": sparsity, "pattern": pattern, "shrink": shrink, "permanent": not keep_masks}
        result = sparsify(module, opened, **how, **own, **shared)
    else:
        result = prune(module, opened, **budgets, steps=steps, floors=floors, **shared)
    one = distributed.rank() == 0
    if out is not None and one:
        result.save(out, card=card, overwrite=overwrite)
    saved = {"out": str(out)} if out is not None else {}
    say(as_json, result.report.to_dict() | saved, str(result.report) + (f"\n\nSaved to {out}" if out else ""))
    if report is not None and one:
        result.report.to_html(report)  # should the prediction not come to its end
        own = ("criterion", "repair", "ignore", "images", "batch_size", "seed", "progress")
        how = {name: shared[name] for name in own} | {"floors": floors}
        result.report.to_html(report, predicted=_foreseen(result.report, module, opened, how))
    if plot is not None and one:
        result.report.plot(plot)


def _foreseen(report: Report, model: nn.Module, data: object, options: Mapping[str, Any]) -> DataFrame | None:
    """What is predicted for the shares of MACs that the steps reached, to be drawn beside what was measured.

    None, with a warning unless it has no meaning there, where nothing can be predicted.
    """
    shares = sorted({step.macs / report.dense.macs for step in report.steps} - {1.0})
    if report.sparsity is not None or not shares:
        return None
    if distributed.size() > 1:
        log.warning("The page shows no prediction: it is made by one process only.")
        return None
    margin = 1 + 1e-9  # a step may have reached the floors
    try:
        return predict(model, data, macs=[share * margin for share in shares], checked=1, **options)
    except (JBRError, ImportError) as error:
        log.warning("The page shows no prediction: %s", error)
        return None
