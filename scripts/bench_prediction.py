"""Damage predicted from one pass against what removal does: criteria x channel ratios; one JSON line per cut.

    python scripts/bench_prediction.py resnet50 --checkpoint resnet50.safetensors --model-arg in_chans=1 \
        --model-arg num_classes=10 --fashion-mnist FOLDER --out results/prediction.jsonl
    python scripts/bench_prediction.py any --out results/prediction.jsonl --table --plot prediction.png

Cuts are made in one step, ranked over all layers by score alone, without repair. Lines that are there already are not
made again. `prediction_error` and `valid` are those of `jbrprune.predict`, by the first 64 images. `--table` also bends
every curve through the one point that `jbrprune.predict(calibrate=True)` would choose.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import append, commit, keywords, lines, make_parser
from protocols import name_weights as weights_named
from scipy.stats import spearmanr
from sources import fashion_mnist
from torch import nn

from baselines import CRITERIA
from jbrprune.data.batches import Batch, attach_reference, rebatch
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.models import timm_models
from jbrprune.prediction.changes import predict_changes
from jbrprune.prediction.damage import Correction, measure_damage
from jbrprune.prediction.predict import CALIBRATED_AT, compute_masked_logits
from jbrprune.prediction.validity import check
from jbrprune.pruning.channels import Channels, Cut, find_channels
from jbrprune.pruning.options import ChannelOptions
from jbrprune.pruning.prepare import open_problem
from jbrprune.report.records import plain

KEY = ("model", "weights", "model_args", "criterion", "ratio", "seed", "images", "eval_images")
"""A line that agrees in these has been made."""
CHECKED = 64
"""Images by which `jbrprune.predict` finds out whether a row is valid, where it is not told otherwise."""
SCALES = torch.logspace(-1, 1, 41, base=10).tolist()
"""Flips are noted for changes that are so many times as large, so that a curve can be bent afterwards."""


def net_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a benchmark that begins with a net trained on Fashion-MNIST."""
    parser = make_parser(description)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--checkpoint", type=Path, help="trained weights")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--fashion-mnist", type=Path, help="folder with the IDX files")
    return parser


def arguments() -> argparse.Namespace:
    parser = net_parser(__doc__)
    parser.add_argument("--criteria", nargs="+", default=["jbr", "l1", "l2_grouped", "taylor", "random"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=512, help="training images to predict on")
    parser.add_argument("--eval-images", type=int, default=10_000, help="test images to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path, help="with --table: a figure")
    return parser.parse_args()


def cuts_of(
    model: nn.Module, batches: Sequence[Batch], wanted: Iterable[tuple[str, float]], seed: int
) -> tuple[Channels, dict[tuple[str, float], Cut]]:
    """(criterion, ratio) -> what goes; a ratio that the floors do not allow is left out."""
    by_criterion: dict[str, list[float]] = defaultdict(list)
    for criterion, ratio in wanted:
        by_criterion[criterion].append(ratio)
    found = {}
    problem = open_problem(model, batches, len(batches[0]))
    state = find_channels(problem, ChannelOptions(channels=0.99, seed=seed), ())
    for criterion, ratios in by_criterion.items():
        options = replace(state.options, criterion=CRITERIA[criterion], progress=False)
        scores = replace(state, options=options).score(batches, 0)
        allowed = [ratio for ratio in ratios if 1 - ratio >= state.least]
        print(f"{criterion}: {len(allowed)} of {len(ratios)} ratios are within the floors", flush=True)
        cuts = [state.plan(scores, 1 - ratio) for ratio in allowed]
        found |= {(criterion, ratio): cut for ratio, cut in zip(allowed, cuts, strict=True)}
    return state, found


def run(
    model: nn.Module,
    calibration: Sequence[Batch],
    test: Sequence[Batch],
    wanted: Sequence[tuple[str, float]],
    seed: int,
) -> Iterable[dict[str, Any]]:
    """One record per cut, predicted together, measured one by one."""
    began = time.process_time()
    state, cuts = cuts_of(model, calibration, wanted, seed)
    units = [cut.units for cut in cuts.values()]
    predicted = predict_changes(model, calibration, state.groups, units, refits=False, seed=seed)
    seconds = time.process_time() - began
    plainly = replace(predicted, saturate=False)
    dense, dense_test = (torch.cat(compute_logits(model, batches)) for batches in (calibration, test))
    for number, ((criterion, ratio), cut) in enumerate(cuts.items()):
        masked = compute_masked_logits(model, calibration, state.groups, cut.units)
        seen = check(predicted, number, masked[:CHECKED], dense)
        tested = compute_masked_logits(model, test, state.groups, cut.units)
        yield {
            "criterion": criterion,
            "ratio": ratio,
            "macs": round(cut.macs, 5),
            "params": round(cut.params, 5),
            "predicted": plain(predicted.damage(number)),
            "first_order": plain(plainly.damage(number)),
            "flips_by_scale": [round(predicted.damage(number, scale=scale).flips, 5) for scale in SCALES],
            "taylor_error": check(predicted, number, masked, dense).taylor_error,
            "prediction_error": seen.prediction_error,
            "valid": seen.valid,
            "masked": plain(measure_damage(dense, masked)),
            "test": plain(measure_damage(dense_test, tested)),
            "cpu_seconds_of_all_predictions": round(seconds, 1),
        }


def bent(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of one criterion with ``calibrated`` TPV and flips; None at the point itself, which is measured."""
    point = min(found, key=lambda line: abs(line["predicted"]["flips"] - CALIBRATED_AT))
    curve = Correction.through(point["predicted"]["tpv"], point["masked"]["tpv"])
    result = []
    for line in found:
        scale = curve.scale(line["predicted"]["tpv"])
        nearest = min(range(len(SCALES)), key=lambda i: abs(torch.tensor(SCALES[i] / scale).log().item()))
        calibrated = {"tpv": line["predicted"]["tpv"] * scale**2, "flips": line["flips_by_scale"][nearest]}
        result.append(line | {"calibrated": None if line is point else calibrated})
    return result


def summary(found: Sequence[dict[str, Any]], what: str) -> str:
    """Rank correlation, and the largest errors: by measured flips, by predicted ones, of what is valid."""
    known = [line for line in found if line[what] is not None]
    tpv, real = [line[what]["tpv"] for line in known], [line["test"]["flips"] for line in known]
    below = [i for i, flips in enumerate(real) if flips < 0.8]
    cells = [f"{spearmanr(tpv, real).statistic:.3f}"]
    cells.append(f"{spearmanr([tpv[i] for i in below], [real[i] for i in below]).statistic:.3f}")
    for by in ("test", what):
        cells += [worst([line for line in known if line[by]["flips"] <= limit], what) for limit in (0.1, 0.3)]
    return " | ".join([*cells, worst([line for line in known if line.get("valid")], what)])


def worst(found: Sequence[dict[str, Any]], what: str) -> str:
    """Largest error of the flips on test images (on the images of the prediction) in points, of the TPV as a factor."""
    if not found:
        return "-"
    test, same = (max(abs(line[what]["flips"] - line[real]["flips"]) for line in found) for real in ("test", "masked"))
    factor = max(math.exp(abs(math.log(line[what]["tpv"] / line["test"]["tpv"]))) for line in found)
    return f"{100 * test:.1f} ({100 * same:.1f}), TPV x {factor:.2f}, {len(found)} cuts"


def table(path: Path) -> str:
    """Every cut, and what the predictions are worth."""
    groups: dict[tuple, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines(path):
        key = tuple(str(line.get(name)) for name in KEY if name not in ("criterion", "ratio"))
        groups[key][line["criterion"]].append(line)
    texts = []
    for key, by_criterion in groups.items():
        found = [line for each in by_criterion.values() for line in bent(sorted(each, key=lambda line: line["ratio"]))]
        one = dict(zip([name for name in KEY if name not in ("criterion", "ratio")], key, strict=True))
        texts.append(
            f"{one['model']}, seed {one['seed']}, {one['images']} images, measured on {one['eval_images']} test "
            "images\n"
        )
        texts.append(
            "| prediction | Spearman, all | below 80 % | points of flips, <= 10 % measured | <= 30 % | <= 10 % "
            "predicted | <= 30 % | called valid |\n|---|---|---|---|---|---|---|---|"
        )
        names = {"first_order": "first order", "predicted": "saturating", "calibrated": "one point measured"}
        names["masked"] = "(measured TPV and flips of the same images)"
        texts += [f"| {shown} | {summary(found, what)} |" for what, shown in names.items()]
        texts.append(
            "\n| criterion | ratio | MACs | TPV first order / saturating / measured | flips | same images | test |"
        )
        texts.append("|---|---|---|---|---|---|---|")
        for line in found:
            tpvs = " / ".join(f"{line[what]['tpv']:.3g}" for what in ("first_order", "predicted", "masked"))
            flips = " | ".join(f"{line[what]['flips']:.3f}" for what in ("predicted", "masked", "test"))
            texts.append(f"| {line['criterion']} | {line['ratio']} | {line['macs']:.3f} | {tpvs} | {flips} |")
    return "\n".join(texts)


def plot(path: Path, out: Path) -> None:
    """Predicted against measured flips, one panel per model."""
    from matplotlib.figure import Figure

    models = sorted({line["model"] for line in lines(path)})
    figure = Figure(figsize=(5 * len(models), 4.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        found = [line for line in lines(path) if line["model"] == model]
        for criterion in sorted({line["criterion"] for line in found}):
            mine = [line for line in found if line["criterion"] == criterion]
            x, y = [line["test"]["flips"] for line in mine], [line["predicted"]["flips"] for line in mine]
            axes.plot(x, y, "o", markersize=4, label=criterion)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        axes.set(title=model, xlabel="measured on test images", ylabel="predicted share of flips")
        axes.legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.out))
        if args.plot:
            plot(args.out, args.plot)
        return
    train, labels = fashion_mnist(args.fashion_mnist, train=True)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    tests = fashion_mnist(args.fashion_mnist, train=False)[0][: args.eval_images]
    own = keywords(args.model_arg)
    model = timm_models.create(args.model, checkpoint=args.checkpoint, pretrained=False, **own).eval()
    calibration = rebatch([Batch(train[chosen], labels[chosen])], 64)
    calibration = attach_reference(calibration, compute_logits(model, calibration))
    shared = {"model": args.model, "weights": weights_named(str(args.checkpoint)), "model_args": own}
    shared |= {"data": "fashion_mnist", "seed": args.seed, "images": args.images}
    shared |= {"eval_images": args.eval_images, "threads": torch.get_num_threads(), "commit": commit()}
    made = [{name: line.get(name) for name in KEY} for line in lines(args.out)]
    same = {name: shared[name] for name in KEY if name in shared}
    wanted = [
        (criterion, ratio)
        for criterion in args.criteria
        for ratio in args.ratios
        if same | {"criterion": criterion, "ratio": ratio} not in made
    ]
    if wanted:
        for record in run(model, calibration, rebatch([Batch(tests)], 100), wanted, args.seed):
            append(args.out, [shared | record])
            print(f"{args.model} {record['criterion']} {record['ratio']} done", flush=True)


if __name__ == "__main__":
    main()
