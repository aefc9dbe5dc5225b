"""`jbrprune card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jbrprune.checkpoint import checkpoint as files


def card_command(
    directory: Annotated[Path, typer.Argument(help="Directory that was written by `--out` or `save`.")],
) -> None:
    """Write a model card (README.md) into the directory of a saved model, for the Hugging Face Hub.

    Example: `jbrprune card pruned/`
    """
    typer.echo(f"Wrote {files.write_card(directory)}")
