"""`jbrprune info`."""

from __future__ import annotations

from typing import Annotated

import typer

from jbrprune.budgets.selection import Floors
from jbrprune.commands.options import AsJson, ModelArguments, TimmName, model_arguments
from jbrprune.commands.output import say, table_of
from jbrprune.models import timm_models
from jbrprune.pruning.api import Info, info


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
    module = timm_models.create(model, pretrained=False, **model_arguments(model_arg))
    found = info(module, ignore=ignore or (), floors=Floors(channels=min_channels, width=width))
    say(as_json, {"model": model} | found.to_dict(), _info_text(model, found))


def _info_text(model: str, found: Info) -> str:
    head = (
        f"{model}: {found.macs / 1e6:,.1f} MMACs, {found.params / 1e6:,.2f} M parameters at "
        f"{' x '.join(map(str, found.input_size))}.\n"
        f"It can go down to {found.least_macs:.1%} of the MACs and {found.least_params:.1%} of the parameters.\n"
    )
    kept = "\n".join(f"  {name}: {reason}" for name, reason in found.skipped.items())
    return (
        head
        + "\n"
        + table_of([vars(row) for row in found.rows], "What can be removed")
        + f"\n\nWhat keeps its width\n{kept}"
    )
