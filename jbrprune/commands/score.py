"""`jbrprune score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jbrprune.commands.options import (
    AsJson,
    BatchSize,
    Data,
    Device,
    ModelArguments,
    Objective,
    Pretrained,
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
from jbrprune.commands.output import interactive, say, table_of
from jbrprune.data import distributed
from jbrprune.data.images import open_data
from jbrprune.models import timm_models
from jbrprune.pruning.api import score


def score_command(
    model: TimmName,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="File for the scores (.safetensors).")] = None,
    granularity: Annotated[
        Literal["unit", "layer", "weight"], typer.Option(help="Removable units, channels by layer, or single weights.")
    ] = "unit",
    objective: Objective = None,
    site: SiteName = None,
    statistic: StatisticName = None,
    checkpoint: Weights = None,
    model_arg: ModelArguments = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 32,
    skip_corrupt: SkipCorrupt = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score what could be removed, without removing anything.

    Example: `jbrprune score resnet50 --data photos/ --out scores.safetensors`
    """
    check_file(out)
    module = timm_models.create(model, checkpoint=checkpoint, pretrained=pretrained, **model_arguments(model_arg)).to(
        device_named(device)
    )
    scores = score(
        module,
        open_data(data, module, batch_size=batch_size, skip_corrupt=skip_corrupt),
        criterion=relevance_of(
            "jbr_projection" if granularity == "weight" else "jbr",
            objective=objective,
            site=site,
            statistic=statistic,
            seed=seed,
        ),
        granularity=granularity,
        batch_size=batch_size,
        progress=interactive(as_json),
    )
    if out is not None and distributed.rank() == 0:
        scores.save(out)
    rows = [
        {
            "group": name,
            "units": v.numel(),
            "least": float(v.min()),
            "median": float(v.median()),
            "most": float(v.max()),
        }
        for name, v in scores.values().items()
    ]
    how = scores.settings
    facts = {"model": model, "samples": scores.samples, "settings": vars(how), "groups": rows}
    say(as_json, facts, table_of(rows, f"{model}: scores of {scores.samples} images, {how.objective}, {how.site}"))
