"""The demo: a real ImageNet model on photographs, and a small ResNet on digits, without a network connection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from jbrprune import demo_data
from jbrprune.pruning.api import PruneResult, sweep
from jbrprune.report.figures import plot_sweep
from jbrprune.report.text import format_sweep

log = logging.getLogger(__name__)

PHOTOGRAPH_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7)
DIGIT_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
CROPS = 256


def run_demo(out: Path, *, seed: int = 0, say: Callable[[str], object]) -> None:
    """Prune both models to several shares of their MACs, show the tables, write models and figures.

    Args:
        out: Directory for ``lite0/``, ``digits/`` (the saved models), ``lite0.png`` and ``digits.png``.
        seed: Seed of crops, training and pruning.
        say: Receives the text.
    """
    out.mkdir(parents=True, exist_ok=True)
    say(
        f"1. tf_efficientnet_lite0 with its ImageNet weights: {CROPS} unlabelled crops of "
        f"{len(demo_data.CALIBRATION)} photographs to calibrate, {CROPS} crops of {len(demo_data.HELD_OUT)} other "
        "photographs to measure. A compact net with 1,000 classes and few photographs: a hard case.\n"
    )
    photographs = sweep(
        demo_data.lite0(),
        demo_data.crops("calibration", count=CROPS, seed=seed),
        PHOTOGRAPH_SHARES,
        eval_data=demo_data.crops("heldout", count=CROPS, seed=seed),
        objective="projection",  # a thousand classes, most of them live: all outputs count, not the first alone
        seed=seed,
    )
    _show(photographs, out, "lite0", "tf_efficientnet_lite0, ImageNet weights, no labels, no training", say)
    say("\n2. timm's resnet10t, trained on scikit-learn's digits just now. Labels are used to report accuracy only.\n")
    images, _, test_images, test_labels = demo_data.digits()
    digits = sweep(
        demo_data.train_digits(seed=seed),
        images,
        DIGIT_SHARES,
        eval_data=[(test_images, test_labels)],
        seed=seed,
    )
    _show(digits, out, "digits", "resnet10t on digits, no labels, no training", say)


def _show(results: Sequence[PruneResult], out: Path, name: str, title: str, say: Callable[[str], object]) -> None:
    reports = [result.report for result in results]
    say(format_sweep(reports, title))
    results[-1].save(out / name, overwrite=True)
    plot_sweep(reports, out / f"{name}.png")
    where = out / name
    say(f"\nThe smallest model is in {where}, the plot in {where}.png. Load it: jbrprune.load({str(where)!r})")
