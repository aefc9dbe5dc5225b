"""`jbrprune predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jbrprune.budgets.selection import Floors
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
    StatisticName,
    TimmName,
    Weights,
    check_file,
    device_named,
    model_arguments,
    relevance_of,
)
from jbrprune.commands.output import interactive, say, table_of
from jbrprune.data.files import replacing
from jbrprune.models import timm_models
from jbrprune.prediction.predict import predict
from jbrprune.report.records import plain

Shares = list[float] | None
SHOWN = {
    "target": "target",
    "macs": "MACs",
    "params": "params",
    "predicted_tpv": "TPV",
    "predicted_flips": "flips",
    "valid": "valid",
    "predicted_tpv_repaired": "TPV repaired",
    "predicted_flips_repaired": "flips repaired",
    "masked_flips": "flips masked",
}
"""Columns that fit on a screen; all of them are in ``--json`` and ``--out``."""


def predict_command(
    model: TimmName,
    data: Data,
    macs: Annotated[Shares, typer.Option(help="Share of the MACs to keep. Repeatable; default 0.9 to 0.2.")] = None,
    params: Annotated[Shares, typer.Option(help="Share of the parameters to keep. Repeatable.")] = None,
    channels: Annotated[Shares, typer.Option(help="Share of the channels to keep. Repeatable.")] = None,
    calibrate: Annotated[int, typer.Option(help="Really prune at so many budgets (up to 3) to correct the curve.")] = 0,
    checked: Annotated[int, typer.Option(help="Images on which every budget is tried by masking.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write all columns here (.csv).")] = None,
    images: Annotated[int, typer.Option(help="Images to read.")] = 512,
    repair: Repair = "auto",
    objective: Objective = None,
    site: SiteName = None,
    statistic: StatisticName = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Glob of module names that keep their width. Repeatable.")
    ] = None,
    min_channels: Annotated[int, typer.Option(help="Channels of every layer that stay.")] = 8,
    checkpoint: Weights = None,
    model_arg: ModelArguments = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Predict what pruning would cost, for every budget, before anything is cut.

    Example: `jbrprune predict resnet50 --data photos/ --macs 0.8 --macs 0.6`
    """
    check_file(out)
    module = timm_models.create(model, checkpoint=checkpoint, pretrained=pretrained, **model_arguments(model_arg))
    frame = predict(
        module.to(device_named(device)),
        data,
        macs=macs or None,
        params=params or None,
        channels=channels or None,
        calibrate=calibrate,
        checked=checked,
        images=images,
        repair=None if repair == "none" else repair,
        criterion=relevance_of("jbr", objective=objective, site=site, statistic=statistic),
        ignore=ignore or (),
        floors=Floors(channels=min_channels),
        batch_size=batch_size,
        seed=seed,
        progress=interactive(as_json),
    )
    if out is not None:
        with replacing(out) as path:
            frame.to_csv(path, index=False)
    rows = frame.to_dict("records")
    shown = [{heading: row[name] for name, heading in SHOWN.items()} for row in rows]
    note = "Predicted from the dense model; `flips masked` is measured, without repair and without a cut."
    say(as_json, {"model": model, "rows": plain(rows)}, f"{table_of(shown, model)}\n\n{note}")
