"""Small benchmarks that tests run."""

from __future__ import annotations

from pathlib import Path

import benchmark
import common
import protocols

FEW = ["--data", "digits", "--weights", "random", "--images", "32", "--eval-images", "40"]
TINY = ["--model", "test_resnet", "--model-arg", "zero_init_last=false", *FEW]  # each block has a part in the logits
TINY_VIT = ["--model", "test_vit", "--model-arg", "img_size=32", *FEW]
QUICK = ("--budgets", "0.8", "--steps", "1", "--seeds", "0")
MEASURED = ("--criterion", "jbr", "tp_taylor", "--budgets", "0.8", "0.6", "--steps", "1", "--seeds", "0", "1")


def run(out: Path, *extra: str, base: list[str] = TINY) -> list[dict]:
    """The lines that benchmark.py writes."""
    benchmark.main([*base, *extra, "--out", str(out)])
    return common.lines(out)


def setup(**given: object) -> protocols.Setup:
    """That of the first run of a configuration."""
    return wanted(**given)[0].setup


def wanted(**given: object) -> list[protocols.Run]:
    """The runs of a configuration."""
    return protocols.list_runs(protocols.configure(None, {"model": ["test_resnet"], "data": ["digits"], **given}))
