"""`jbrprune tpv`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jbrprune.commands.options import (
    AsJson,
    BatchSize,
    Data,
    Device,
    Model,
    ModelArguments,
    Pretrained,
    Weights,
    device_named,
    loaded_model,
)
from jbrprune.commands.output import interactive, say
from jbrprune.data import images as loading
from jbrprune.errors import ArgumentError
from jbrprune.tpv import Isotropic, Quantization, empirical, trace_form


def tpv_command(
    model: Model,
    data: Data,
    sigma: Annotated[float | None, typer.Option(help="Gaussian noise of this size on every weight.")] = None,
    bits: Annotated[int | None, typer.Option(help="Uniform quantization to this many bits.")] = None,
    granularity: Annotated[
        Literal["tensor", "channel", "global"], typer.Option(help="What shares a range of the quantization.")
    ] = "tensor",
    rounding: Annotated[bool, typer.Option(help="Really round, in the place of the noise that models it.")] = False,
    measure: Annotated[bool, typer.Option(help="Also perturb the model and measure (`empirical`).")] = False,
    method: Annotated[
        Literal["auto", "exact", "projection", "jvp"], typer.Option(help="How the trace form is computed.")
    ] = "auto",
    rtol: Annotated[float, typer.Option(help="Stop at this relative standard error.")] = 0.02,
    images: Annotated[int | None, typer.Option(help="Images to read; default: all.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of the perturbation, at most.")] = 16,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Glob of modules or parameters that are not perturbed. Repeatable.")
    ] = None,
    checkpoint: Weights = None,
    model_arg: ModelArguments = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Test prediction variance: what noise on the weights, or quantization, does to the logits. Needs no labels.

    Example: `jbrprune tpv resnet50 --data photos/ --bits 8 --measure`
    """
    if (sigma is None) == (bits is None):
        raise ArgumentError("Say what perturbs the weights: either --sigma or --bits.")
    perturbation = Isotropic(sigma) if sigma is not None else Quantization(bits, granularity, rounding)  # type: ignore[arg-type]
    module = loaded_model(model, checkpoint, pretrained, model_arg).to(device_named(device))
    batches = loading.open_data(data, module, batch_size=batch_size)
    shared = {"rtol": rtol, "samples": images, "draws": draws, "batch_size": batch_size, "seed": seed}
    shared |= {"ignore": ignore or (), "progress": interactive(as_json)}
    found = {"trace_form": trace_form(module, batches, perturbation, method=method, **shared)}  # type: ignore[arg-type]
    if measure:
        found["empirical"] = empirical(module, batches, perturbation, **shared)  # type: ignore[arg-type]
    facts = {"model": model, "perturbation": str(perturbation)} | {name: e.to_dict() for name, e in found.items()}
    text = f"{model}, {perturbation}\n" + "\n".join(f"{name:12} {estimate}" for name, estimate in found.items())
    valid = found["trace_form"].validity
    if valid is not None:
        text += f"\nfirst order  {'valid' if valid.valid else 'not valid'} at this size (error {valid.at(1.0):.1%})"
    say(as_json, facts, text)
