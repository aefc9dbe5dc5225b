"""`jbrprune eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from torch import nn

from jbrprune.budgets.cost import count_macs
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
from jbrprune.data import distributed
from jbrprune.data import images as loading
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError
from jbrprune.evaluation.agreement import Agreement, agreement, bytes_of, combine, compute_logits, parameters_of
from jbrprune.evaluation.latency import time_in_turns
from jbrprune.models import preserve
from jbrprune.pruning.prepare import peek


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
    if images is not None and images < 1:
        raise ArgumentError(f"--images must be at least 1, got {images}.")
    place = device_named(device)
    module = loaded_model(model, checkpoint, pretrained, model_arg).to(place)
    other = loaded_model(reference, checkpoint, pretrained, model_arg).to(place) if reference else None
    opened = loading.open_data(data, module, batch_size=batch_size, skip_corrupt=skip_corrupt)
    first, opened = peek(opened, batch_size)
    agreed = measured(module, other, opened, images=images, batch_size=batch_size)
    if distributed.rank() > 0:
        return  # the others' work would disturb the timing
    example = first.images[:1].to(preserve.device_of(module))
    (timed,) = time_in_turns([module], example).latencies
    facts: dict[str, Any] = {
        "model": model,
        "images": agreed.images,
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


def measured(
    model: nn.Module, reference: nn.Module | None, data: object, *, images: int | None, batch_size: int
) -> Agreement:
    """The agreement with a reference (None: with itself), batch by batch: no image or logit is kept.

    Each of several ranks reads its own part of the data.
    """
    parts = distributed.Parts(data, batch_size=batch_size)

    def own() -> list[Agreement]:
        found = []
        for start, batch in parts:
            left = len(batch) if images is None else max(0, min(len(batch), images - start))
            if left:
                found.append(_of_batch(model, reference, batch.map(lambda tensor, left=left: tensor[:left])))
            if images is not None and start + len(batch) >= images:
                break
        return found

    everyone = distributed.gathered(distributed.together(own))
    if images is None:  # else the ranks stop reading at different places
        parts.check()
    return combine([part for found in everyone for part in found])


def _of_batch(model: nn.Module, reference: nn.Module | None, batch: Batch) -> Agreement:
    with distributed.alone():
        logits = compute_logits(model, [batch])[0]
        wanted = logits if reference is None else compute_logits(reference, [batch])[0]
    return agreement(logits, wanted, batch.labels)
