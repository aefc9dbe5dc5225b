"""The command line: prune, predict, score, eval, info, tpv, card, demo."""

from __future__ import annotations

import contextlib
import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler

from jbrprune.commands.card import card_command
from jbrprune.commands.demo import demo_command
from jbrprune.commands.evaluate import eval_command
from jbrprune.commands.info import info_command
from jbrprune.commands.predict import predict_command
from jbrprune.commands.prune import prune_command
from jbrprune.commands.score import score_command
from jbrprune.commands.tpv import tpv_command
from jbrprune.data import distributed
from jbrprune.errors import ArgumentError, JBRError

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

COMMANDS = {
    "prune": prune_command,
    "predict": predict_command,
    "score": score_command,
    "eval": eval_command,
    "info": info_command,
    "tpv": tpv_command,
    "card": card_command,
    "demo": demo_command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command line; known errors become one sentence and an exit code."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    try:
        with distributed.joined() if distributed.launched() else contextlib.nullcontext():
            app()
    except JBRError as error:
        typer.secho(f"jbrprune: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except (ImportError, OSError) as error:
        typer.secho(f"jbrprune: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)
