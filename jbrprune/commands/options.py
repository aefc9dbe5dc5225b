"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from jbrprune.checkpoint import checkpoint as files
from jbrprune.criteria.relevance import PRESETS, Relevance, Site
from jbrprune.errors import ArgumentError, CheckpointError, unknown
from jbrprune.models import timm_models
from jbrprune.pruning.api import prune, sparsify

Objective = Annotated[
    Literal["pseudo_label", "predicted_logit", "margin", "label", "projection"] | None,
    typer.Option(help="What counts as damage. Default: pseudo_label for channels, projection for single weights."),
]
SiteName = Annotated[Site | None, typer.Option(help="Which cut counts; channels only. Default: consumer.")]
StatisticName = Annotated[
    Literal["second_moment", "batched", "mean_replaced", "signed"] | None,
    typer.Option(
        help="How samples are combined (`mean_replaced`: channels, `signed`: weights). Default: second_moment."
    ),
]
Repair = Annotated[
    Literal["auto", "none", "batch_norm", "mean_shift", "least_squares"],
    typer.Option(help="How to repair after every step."),
]

Model = Annotated[str, typer.Argument(help="A timm name (`resnet50`) or a directory written by `--out`.")]
TimmName = Annotated[str, typer.Argument(help="A timm name, such as `resnet50` or `vit_small_patch16_224`.")]
Data = Annotated[
    str, typer.Option(help="Folder of images, with or without class folders, or a timm data set (`hfds/...`).")
]
Weights = Annotated[Path | None, typer.Option(help="Local weights (.safetensors, or a .pth that holds weights only).")]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", help="Argument of timm.create_model, such as `num_classes=10`. Repeatable."),
]
Pretrained = Annotated[bool, typer.Option(help="Fetch timm's pretrained weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")]
SkipCorrupt = Annotated[bool, typer.Option(help="Leave out images that cannot be read, and say which.")]
BatchSize = Annotated[int, typer.Option(help="Images per pass.")]
Device = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`, ...; default: cuda if there is one.")]


def loaded_model(name: str, checkpoint: Path | None, pretrained: bool, model_arg: Sequence[str] | None) -> nn.Module:
    """A model that was saved to a directory, or a timm model in eval mode."""
    if Path(name).is_dir():
        return files.load(name)
    return timm_models.create(name, checkpoint=checkpoint, pretrained=pretrained, **model_arguments(model_arg)).eval()


_OWN_ARGUMENTS = frozenset(
    ("name", "pretrained", *inspect.signature(prune).parameters, *inspect.signature(sparsify).parameters)
)


def model_arguments(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` with the value read as JSON where it is JSON."""
    arguments = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ArgumentError(f"--model-arg must be key=value, got {pair!r}.")
        if key in _OWN_ARGUMENTS:
            raise ArgumentError(
                f"--model-arg {pair} is not an argument of the model: there may be an option of that name."
            )
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
    return arguments


def relevance_of(preset: str, **changes: Any) -> Relevance:
    """A preset of relevance with what was said on the command line."""
    if preset not in PRESETS:
        raise unknown("criterion", preset, PRESETS)
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


def check_file(path: Path | None) -> None:
    """Refuse a file that cannot be written before the expensive part."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
        raise CheckpointError(
            f"{path} cannot be written: expected a file in a directory that exists and can be written."
        )


def device_named(name: str | None) -> torch.device:
    """The device that was asked for, else CUDA if there is one (each rank its own); refuses what cannot be used."""
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name or (cuda if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ArgumentError(
            f"--device {name!r} cannot be used: {str(error).splitlines()[0]} Devices here: {there}."
        ) from error
    return device
