"""What predictions are worth: damage predicted from one pass, and how far `max_drop` may go.

    python scripts/bench_prediction.py cuts --model resnet50 --weights resnet50.safetensors --data fashion_mnist \
        --root FOLDER --out results/prediction.jsonl
    python scripts/bench_prediction.py max_drop ... --drops 0.01 0.03 --seeds 0 1 2 --out results/max_drop.jsonl
    python scripts/bench_prediction.py cuts --out results/prediction.jsonl --table --plot prediction.png

``cuts``: criteria x shares of the channels, cut in one step without repair. `jbrprune.predict` says what each would do
to the calibration images, and measures it there with the units masked; beside it stands what the pruned model does on
test images. ``max_drop``: how far a run goes, and what was lost on test images that no decision has seen. TPV is summed
over outputs and averaged over images; a flip is an image whose top-1 class changes. Lines that are there are not made
again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import Dense, choose_criterion, load_calibration, load_dense, show_labels
from common import append, describe_call, exit_on_error, key_of, lines, make_parser, markdown
from protocols import add_setup_arguments, read_setup
from scipy.stats import spearmanr

from baselines import CRITERIA
from jbrprune import predict, prune
from jbrprune.data.batches import Batch
from jbrprune.errors import BudgetError
from jbrprune.evaluation.agreement import agreement_on, compute_logits
from jbrprune.report.records import plain

Records = Iterator[dict[str, Any]]


# --- runs ------------------------------------------------------------------------------------------


def predict_cuts(args: argparse.Namespace, dense: Dense, batches: list[Batch], seed: int) -> Records:
    """One line per criterion and share of the channels that goes."""
    reference = torch.cat([batch.reference for batch in dense.test])
    for name in args.criteria:
        data = show_labels(name, batches)
        shared = {"criterion": choose_criterion(CRITERIA, name, seed), "repair": None, "images": None, "seed": seed}
        shared |= {"progress": False, "batch_size": 64}
        kept = sorted((round(1 - ratio, 6) for ratio in args.ratios), reverse=True)
        for row in predict_within_floors(dense, data, kept, shared):
            result = prune(dense.model, data, channels=row["target"], steps=1, **shared)
            change = torch.cat(compute_logits(result.model, dense.test)) - reference
            flips = (change + reference).argmax(1) != reference.argmax(1)
            test = {"tpv": change.square().sum(1).mean().item(), "flips": flips.double().mean().item()}
            predicted, masked = ({what: row[f"{of}_{what}"] for what in test} for of in ("predicted", "masked"))
            line = {"criterion": name, "ratio": round(1 - row["target"], 6)}
            line |= {"macs": row["macs"], "params": row["params"]}
            line |= {"predicted": predicted, "masked": masked, "test": test}
            yield line | {error: row[error] for error in ("taylor_error", "prediction_error", "valid")}


def predict_within_floors(dense: Dense, data: list[Batch], kept: list[float], how: dict[str, Any]) -> list[dict]:
    """Rows for the shares that the floors allow."""
    try:
        return predict(dense.model, data, channels=kept, checked=None, **how).to_dict("records")
    except BudgetError:
        if len(kept) == 1:
            raise
        return predict_within_floors(dense, data, kept[:-1], how)


def search(args: argparse.Namespace, dense: Dense, batches: list[Batch], seed: int) -> Records:
    """One line per drop that is allowed."""
    data = batches if args.labels else show_labels("jbr", batches)
    for drop in args.drops:
        how = {"max_drop": drop, "confidence": args.confidence, "seed": seed, "images": args.images, "batch_size": 64}
        result = prune(dense.model, data, progress=False, **how)
        report = result.report
        yield {
            **{"max_drop": drop, "labels": args.labels, "kept": report.kept, "params": report.pruned.params},
            **{"evaluations": len(report.search.trials), "steps": len(report.steps)},
            **{"search": plain(report.search), "test": plain(agreement_on(result.model, dense.test))},
        }


# --- tables ----------------------------------------------------------------------------------------


def show_cuts(found: Sequence[dict[str, Any]]) -> str:
    """What the predictions are worth, and every cut."""
    parts = []
    for title, group in _by_setting(found).items():
        tpv, real = [line["predicted"]["tpv"] for line in group], [line["test"]["flips"] for line in group]
        row: list[object] = [f"{spearmanr(tpv, real).statistic:.3f}"]
        for by, limit in (("test", 0.1), ("test", 0.3), ("predicted", 0.1), ("predicted", 0.3)):
            row.append(_worst([line for line in group if line[by]["flips"] <= limit]))
        row += [_worst([line for line in group if line["valid"]], by) for by in ("test", "masked")]
        limits = ["<= 10 % measured", "<= 30 %", "<= 10 % predicted", "<= 30 %", "called valid", "valid, masked"]
        parts.append(f"{title}: points of flips (TPV) that the prediction is off by at most\n")
        parts.append(markdown(["Spearman of TPV with flips on test images", *limits], [row]) + "\n")
        rows = []
        for line in group:
            tpvs = [f"{line[what]['tpv']:.3g}" for what in ("predicted", "masked", "test")]
            flips = [f"{line[what]['flips']:.3f}" for what in ("predicted", "masked", "test")]
            rows.append([line["criterion"], line["ratio"], f"{line['macs']:.3f}", " / ".join(tpvs), " / ".join(flips)])
        parts.append(markdown(["criterion", "ratio", "MACs", "TPV predicted / masked / test", "flips"], rows) + "\n")
    return "\n".join(parts)


def _worst(found: Sequence[dict[str, Any]], by: str = "test") -> str:
    """Largest error of the flips on test images, or on the images of the prediction, in points, of TPV as a factor."""
    if not found:
        return "-"
    flips = max(abs(line["predicted"]["flips"] - line[by]["flips"]) for line in found)
    factor = max(math.exp(abs(math.log(line["predicted"]["tpv"] / line[by]["tpv"]))) for line in found)
    return f"{100 * flips:.1f} (x {factor:.2f}), {len(found)} cuts"


def show_search(found: Sequence[dict[str, Any]]) -> str:
    """What was allowed, kept and lost; intervals allow for choosing among all evaluated models."""
    rows = []
    for line in sorted(found, key=lambda line: (line["model"], line["max_drop"], line["seed"])):
        drop, test = line["search"]["drop"], line["test"]
        decided = f"{drop['lost']:.4f} ({drop['low']:.3f} to {drop['high']:.3f}) of {drop['images']}"
        lost = [f"{1 - test['top1']:.4f}", f"{test['dense_accuracy'] - test['accuracy']:+.4f}"]
        cells = [line["model"], drop["of"], line["max_drop"], line["seed"], f"{line['kept']:.3f}", line["evaluations"]]
        rows.append([*cells, decided, *lost])
    head = ["model", "decided by", "max_drop", "seed", "MACs kept", "evaluations", "drop where it was decided (95 %)"]
    return markdown([*head, "agreement drop, test", "accuracy drop, test"], rows)


def _by_setting(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in found:
        groups[f"{line['model']}, seed {line['seed']}, {line['images']} images"].append(line)
    return groups


def plot(found: Sequence[dict[str, Any]], out: Path) -> None:
    """Predicted against measured flips of cuts, one panel per model."""
    from matplotlib.figure import Figure

    models = sorted({line["model"] for line in found})
    figure = Figure(figsize=(5 * len(models), 4.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for criterion in dict.fromkeys(line["criterion"] for line in found):
            mine = [line for line in found if (line["model"], line["criterion"]) == (model, criterion)]
            x, y = ([line[what]["flips"] for line in mine] for what in ("test", "predicted"))
            axes.plot(x, y, "o", markersize=4, label=criterion)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        axes.set(title=model, xlabel="measured on test images", ylabel="predicted share of flips")
        axes.legend(frameon=False)
    figure.savefig(out)


WHAT = {
    "cuts": (predict_cuts, show_cuts, ("criteria", "ratios")),
    "max_drop": (search, show_search, ("drops", "labels", "confidence", "deciding")),
}
"""Name -> what makes lines, what shows them, and the arguments that tell its runs apart."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=WHAT)
    add_setup_arguments(parser)
    parser.add_argument("--criteria", nargs="+", default=["jbr", "l1", "l2_grouped", "taylor", "random"], help="cuts")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], help="cuts")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.01, 0.03], help="max_drop")
    parser.add_argument("--confidence", type=float, default=0.9, help="max_drop: with which it holds")
    parser.add_argument("--deciding", type=int, default=0, help="max_drop: images that decide; 0: two fifths")
    parser.add_argument("--labels", action="store_true", help="max_drop: let the accuracy decide, not the agreement")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--eval-images", type=int, help="test images, which decide nothing; default: all")
    parser.add_argument("--table", action="store_true", help="print what is in the file, run nothing")
    parser.add_argument("--plot", type=Path, help="with --table, of cuts: a figure")
    args = parser.parse_args(argv)
    make, show, names = WHAT[args.what]
    if args.table:
        print(show(lines(args.out)))
        if args.plot:
            plot(lines(args.out), args.plot)
        return
    with exit_on_error("bench_prediction.py"):
        setup = read_setup(args)
        for seed in args.seeds:
            shared = setup.described() | {"seed": seed, "images": args.images, "eval_images": args.eval_images}
            run = key_of([args.what, shared, {name: getattr(args, name) for name in names}])
            if run in {line.get("run") for line in lines(args.out)}:
                continue
            began = time.process_time()
            made = list(make(args, load_dense(setup), load_calibration(setup, args.images + args.deciding, seed), seed))
            facts = {"run": run, "cpu_seconds": round(time.process_time() - began, 1), **describe_call()}
            append(args.out, [plain(shared | line | facts | {"threads": torch.get_num_threads()}) for line in made])
            print(f"{args.model} {args.what} seed {seed}: {facts['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
