"""The command line: prune, score, eval, info, demo."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from torch import nn

from jbrprune import checkpoint as files
from jbrprune import data as loading
from jbrprune import guest, zoo
from jbrprune.batches import count, materialise, with_reference
from jbrprune.cost import count_macs
from jbrprune.errors import ArgumentError, CheckpointError, JBRError
from jbrprune.inventory import Inventory, inventory
from jbrprune.measure import agreement_on, bytes_of, latency, parameters_of, predict
from jbrprune.pruning import prune
from jbrprune.relevance import Site
from jbrprune.scoring import score

app = typer.Typer(
    help="Make trained timm models smaller, without labels and without training.\n\n"
    "Start with `jbrprune demo`, then `jbrprune info MODEL`, then "
    "`jbrprune prune MODEL --data FOLDER --macs 0.5 --out DIR`.\n\n"
    "Exit codes: 0 done, 1 the model, data or files cannot be used, 2 wrong arguments, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


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
BatchSize = Annotated[int, typer.Option(help="Images per pass.")]
Device = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`, ...; default: cuda if there is one.")]


@app.command("prune")
def prune_command(
    model: TimmName,
    data: Data,
    macs: Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep, such as 0.5.")] = None,
    params: Annotated[float | None, typer.Option(help="Share of the parameters to keep.")] = None,
    channels: Annotated[float | None, typer.Option(help="Share of the channels to keep.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of the single weights to set to zero.")] = None,
    structure: Annotated[
        str | None, typer.Option(help="`channels`, `unstructured`, or N:M such as `2:4`. Default: as the budget says.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the pruned model.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that was saved there.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a figure here (.png, .svg, .pdf).")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Measure the agreement on these images instead of a fifth of --data.")
    ] = None,
    images: Annotated[int, typer.Option(help="Calibration images to read.")] = 512,
    eval_images: Annotated[int | None, typer.Option(help="Images to read from --eval-data; default: all.")] = None,
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
    ridge: Annotated[float, typer.Option(help="Ridge of the least-squares repair.")] = 0.1,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Glob of module names that keep their width. Repeatable.")
    ] = None,
    width: Annotated[bool, typer.Option(help="Also prune the residual width under LayerNorms.")] = False,
    floor: Annotated[
        float | None, typer.Option(help="Share of every layer's width (0) or of its weights (0.001) that stays.")
    ] = None,
    min_channels: Annotated[int | None, typer.Option(help="Channels of every layer that stay (8).")] = None,
    round_to: Annotated[int | None, typer.Option(help="Kept widths are multiples of this (1).")] = None,
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
    max_memory: Annotated[int | None, typer.Option(help="MiB of scratch memory to score single weights (256).")] = None,
    checkpoint: Weights = None,
    model_arg: ModelArguments = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prune a timm model to a budget and say what it cost.

    Example: `jbrprune prune resnet50 --data photos/ --macs 0.5 --out pruned/`; single weights with `--sparsity 0.9`
    or `--structure 2:4` in the place of `--macs`.
    """
    if out is not None:
        files.check_target(out, overwrite=overwrite)
    _check_file(plot)
    result = prune(
        model,
        data,
        macs=macs,
        params=params,
        channels=channels,
        sparsity=sparsity,
        structure=structure,
        scope=scope,
        remainder=remainder,
        shrink=shrink or None,
        permanent=False if keep_masks else None,
        max_memory=_mebibytes(max_memory),
        steps=steps,
        repair=None if repair == "none" else repair,
        objective=objective,
        site=site,
        statistic=statistic,
        batch=batch,
        confidence=confidence,
        ridge=ridge,
        ignore=ignore or (),
        width=width or None,
        floor=floor,
        min_channels=min_channels,
        round_to=round_to,
        images=images,
        eval_data=eval_data,
        eval_images=eval_images,
        batch_size=batch_size,
        seed=seed,
        device=_device(device),
        progress=_interactive(as_json),
        checkpoint=checkpoint,
        pretrained=pretrained,
        **_arguments(model_arg),
    )
    if out is not None:
        result.save(out, overwrite=overwrite)
    saved = {"out": str(out)} if out is not None else {}
    _say(as_json, result.report.to_dict() | saved, str(result.report) + (f"\n\nSaved to {out}" if out else ""))
    if plot is not None:
        result.report.plot(plot)


@app.command("score")
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
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score what could be removed, without removing anything.

    Example: `jbrprune score resnet50 --data photos/ --out scores.safetensors`
    """
    _check_file(out)
    module = zoo.create(model, checkpoint=checkpoint, pretrained=pretrained, **_arguments(model_arg)).to(
        _device(device)
    )
    scores = score(
        module,
        data,
        granularity=granularity,
        objective=objective,
        site=site,
        statistic=statistic,
        batch_size=batch_size,
        seed=seed,
        progress=_interactive(as_json),
    )
    if out is not None:
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
    _say(as_json, facts, _table(rows, f"{model}: scores of {scores.samples} images, {how.objective}, {how.site}"))


@app.command("eval")
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
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved (or timm) model: accuracy if the folder has classes, agreement with a reference, cost, latency.

    Example: `jbrprune eval pruned/ --data validation/ --reference resnet50`
    """
    module = _loaded(model, checkpoint, pretrained, model_arg).to(_device(device))
    batches = materialise(loading.open_data(data, module, batch_size=batch_size), images=images, batch_size=batch_size)
    other = _loaded(reference, checkpoint, pretrained, model_arg).to(_device(device)) if reference else module
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
    _say(as_json, facts, "\n".join(f"{key:16} {_shown(value)}" for key, value in facts.items() if value is not None))


@app.command("info")
def info_command(
    model: TimmName,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Glob of module names that keep their width. Repeatable.")
    ] = None,
    width: Annotated[bool, typer.Option(help="Also offer the residual width under LayerNorms.")] = False,
    min_channels: Annotated[int, typer.Option(help="Channels of every layer that stay.")] = 8,
    model_arg: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """What can be pruned in this model, what it costs, and how far it can go. Needs no weights.

    Example: `jbrprune info vit_small_patch16_224`
    """
    module = zoo.create(model, pretrained=False, **_arguments(model_arg))
    found = inventory(module, ignore=ignore or (), width=width, min_channels=min_channels)
    _say(as_json, {"model": model} | found.to_dict(), _inventory_text(model, found))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Directory for the models, tables and figures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Prune a real ImageNet model on photographs, and a small ResNet on digits, without a network connection.

    Example: `jbrprune demo --out demo`
    """
    from jbrprune.demo import run_demo  # needs the extra `demo`

    run_demo(out, seed=seed, say=typer.echo)


def main() -> None:
    """Run the command line; known errors become one sentence and an exit code."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    try:
        app()
    except JBRError as error:
        typer.secho(f"jbrprune: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except (ImportError, OSError) as error:
        typer.secho(f"jbrprune: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)


def _loaded(name: str, checkpoint: Path | None, pretrained: bool, model_arg: Sequence[str] | None) -> nn.Module:
    if Path(name).is_dir():
        return files.load(name)
    return zoo.create(name, checkpoint=checkpoint, pretrained=pretrained, **_arguments(model_arg)).eval()


_OWN_ARGUMENTS = frozenset(("name", "pretrained", *inspect.signature(prune).parameters))


def _arguments(pairs: Sequence[str] | None) -> dict[str, Any]:
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


def _mebibytes(number: int | None) -> int | None:
    return None if number is None else number << 20


def _check_file(path: Path | None) -> None:
    """Refuse a file that cannot be written before the expensive part."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
        raise CheckpointError(
            f"{path} cannot be written: expected a file in a directory that exists and can be written."
        )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _interactive(as_json: bool) -> bool:
    return not as_json and sys.stderr.isatty() and "NO_PROGRESS" not in os.environ


def _say(as_json: bool, facts: Mapping[str, Any], text: str) -> None:
    typer.echo(json.dumps(facts) if as_json else text)


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    table = Table(title=title, title_justify="left", box=None, header_style="")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console = Console(width=100, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _inventory_text(model: str, found: Inventory) -> str:
    head = (
        f"{model}: {found.macs / 1e6:,.1f} MMACs, {found.params / 1e6:,.2f} M parameters at "
        f"{' x '.join(map(str, found.input_size))}.\n"
        f"It can go down to {found.least_macs:.1%} of the MACs and {found.least_params:.1%} of the parameters.\n"
    )
    kept = "\n".join(f"  {name}: {reason}" for name, reason in found.kept.items())
    return (
        head
        + "\n"
        + _table([vars(row) for row in found.rows], "What can be removed")
        + f"\n\nWhat keeps its width\n{kept}"
    )
