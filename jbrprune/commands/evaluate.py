"""`jbrprune eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jbrprune import data as loading
from jbrprune import guest
from jbrprune.batches import count, materialise, with_reference
from jbrprune.commands.options import (
    AsJson,
    BatchSize,
    Data,
    Device,
    Model,
    ModelArguments,
    Pretrained,
    SkipCorrupt,
    Weights,
    device_named,
    loaded_model,
)
from jbrprune.commands.output import say, shown
from jbrprune.cost import count_macs
from jbrprune.measure import agreement_on, bytes_of, latency, parameters_of, predict


def eval_command(
    model: Model,
    data: Data,
    reference: Annotated[
        str | None, typer.Option(help="Timm name or directory to agree with, such as the dense model.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images to read; default: all.")] = None,
    checkpoint: Weights = None,
    model_arg: ModelArguments = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 32,
    skip_corrupt: SkipCorrupt = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved (or timm) model: accuracy if the folder has classes, agreement with a reference, cost, latency.

    Example: `jbrprune eval pruned/ --data validation/ --reference resnet50`
    """
    module = loaded_model(model, checkpoint, pretrained, model_arg).to(device_named(device))
    opened = loading.open_data(data, module, batch_size=batch_size, skip_corrupt=skip_corrupt)
    batches = materialise(opened, images=images, batch_size=batch_size)
    other = loaded_model(reference, checkpoint, pretrained, model_arg).to(device_named(device)) if reference else module
    agreed = agreement_on(module, with_reference(batches, predict(other, batches)))
    example = batches[0].images[:1].to(guest.device_of(module))
    timed = latency(module, example)
    facts: dict[str, Any] = {
        "model": model,
        "images": count(batches),
        "macs": sum(count_macs(module, example).values()),
        "params": parameters_of(module),
        "bytes": bytes_of(module),
        "latency_ms": timed.median_ms,
        "latency_iqr_ms": timed.iqr_ms,
        "accuracy": agreed.accuracy,
    }
    if reference:
        facts |= {"reference": reference, "top1_agreement": agreed.top1, "top5_agreement": agreed.top5, "kl": agreed.kl}
    say(as_json, facts, "\n".join(f"{key:16} {shown(value)}" for key, value in facts.items() if value is not None))
