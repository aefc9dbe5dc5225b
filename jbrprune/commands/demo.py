"""`jbrprune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    out: Annotated[Path, typer.Option(help="Directory for the models, tables and figures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Prune a real ImageNet model on photographs, and a small ResNet on digits, without a network connection.

    Example: `jbrprune demo --out demo`
    """
    from jbrprune.demo import run_demo

    run_demo(out, seed=seed, say=typer.echo)
