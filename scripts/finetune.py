"""Fine-tune pruned models, plainly or by distillation from the dense one; one JSON line each.

Comparing criteria with training, in one command: prune by each criterion, fine-tune each in each way:

    python scripts/finetune.py --model resnet50 --weights FILE --data fashion_mnist --root FOLDER \
        --criterion jbr taylor l1 --macs 0.1 --epochs 1 --how plain distil --work runs/ --out results/finetune.jsonl

Or models that are pruned already, saved by `PruneResult.save`:

    python scripts/finetune.py --model resnet50 --weights FILE --data fashion_mnist --root FOLDER \
        --pruned a/ b/ --epochs 1 --work runs/ --out results/finetune.jsonl

`--model` and `--weights` are the dense model: the teacher, and what agreement is with. Optimiser, schedule and
augmentation are timm's, as in train_reference.py. ``--work`` holds the pruned models, the state after every epoch, and
the fine-tuned models; a call that is made again goes on where it stopped. What fails leaves a line that says why, is
tried again by the next call, and makes the exit code 1; the others go on. Only criteria that need labels see any while
pruning.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import train_reference as training
from benchmark import choose_criterion, describe_failure, load_calibration, load_dense, show_labels
from benchmark import load as load_setup
from common import append, describe_call, done, exit_on_error, key_of, make_parser, mend
from protocols import Setup, add_setup_arguments, read_setup
from torch import nn

from baselines import CRITERIA
from jbrprune import load, prune
from jbrprune.budgets.cost import count_macs
from jbrprune.checkpoint import checkpoint as files
from jbrprune.errors import ArgumentError, BudgetError, JBRError, unknown
from jbrprune.evaluation.agreement import agreement_on, parameters_of
from jbrprune.models import preserve
from jbrprune.pruning.options import ChannelOptions
from jbrprune.pruning.prepare import provenance
from jbrprune.report.records import plain
from jbrprune.sparsity.masks import masks_of


def list_models(args: argparse.Namespace, setup: Setup) -> list[tuple[Path, dict[str, Any]]]:
    """Directories of pruned models, of which those of criteria may not be there yet, with what a line says of each.

    Raises:
        CheckpointError: One that should be there is not.
    """
    found = []
    for path in args.pruned or ():
        report = files.describe(path).report or {}
        found.append((path, {"criterion": report.get("settings", {}).get("criterion"), "budget": report.get("budget")}))
    for name in args.criterion or ():
        what = {"criterion": name, "budget": {"macs": args.macs}, "images": args.images, "repair": args.repair}
        what |= {"prune_seed": args.prune_seed}
        found.append((args.work / f"{name}-{key_of([setup.described(), what])}", what))
    return found


def make(args: argparse.Namespace, setup: Setup, path: Path, name: str) -> None:
    """Prune by a criterion, and save."""
    prune(
        load_dense(setup).model,
        show_labels(name, load_calibration(setup, args.images, args.prune_seed)),
        macs=args.macs,
        criterion=choose_criterion(CRITERIA, name, args.prune_seed),
        repair=None if args.repair == "none" else args.repair,
        images=None,
        seed=args.prune_seed,
        progress=False,
    ).save(path)


def make_loss(args: argparse.Namespace, how: str, teacher: nn.Module) -> training.Loss:
    """What is minimised."""
    if how == "plain":
        return training.cross_entropy(args.smoothing)
    return training.distillation(teacher, weight=args.weight, temperature=args.temperature)


def describe(args: argparse.Namespace, setup: Setup, path: Path, how: str) -> tuple[str, dict[str, Any]]:
    """What a line is recognised by (a pruned model by its weights), and the settings of a training."""
    numbers = ("smoothing",) if how == "plain" else ("weight", "temperature")
    settings = {"how": how, **{name: getattr(args, name) for name in numbers}}
    settings |= {"augmentation": asdict(training.read_augmentation(args)), "recipe": asdict(training.read_recipe(args))}
    return key_of([setup.described(), files.describe(path).weights["sha256"], settings, args.eval_images]), settings


def finetune(args: argparse.Namespace, setup: Setup, path: Path, how: str) -> dict[str, Any]:
    """Fine-tune one pruned model in one way; its line."""
    began = time.perf_counter()
    key, settings = describe(args, setup, path, how)
    dense, model = load_dense(setup), load(path).to(args.device)
    refuse_lost_zeros(model, path)
    before = agreement_on(model, dense.test)
    data = training.open_training(setup.data, setup.root, dense.model, training.read_augmentation(args))
    loss = make_loss(args, how, dense.model)
    history = training.train(model, data, training.read_recipe(args), loss, args.work / f"{key}.training", {"key": key})
    after = agreement_on(model, dense.test)
    size = dense.test[0].images.shape[1:]
    files.save(model, args.work / key, size=size, report=files.describe(path).report, overwrite=True)
    example = dense.test[0].images[:1].to(preserve.device_of(model))
    return {
        **{"key": key, **setup.described(), **settings, "history": history, "saved": key},
        **{"macs": sum(count_macs(model, example).values()), "params": parameters_of(model)},
        **{"dense_macs": sum(count_macs(dense.model, example).values())},
        **{"dense_accuracy": after.dense_accuracy, "accuracy_before": before.accuracy, "accuracy": after.accuracy},
        **{"agreement_before": before.top1, "agreement": after.top1, "kl": after.kl, "eval_images": after.images},
        **{"seconds": time.perf_counter() - began, **describe_call()},
        **provenance(args.seed, preserve.device_of(model)),
    }


def refuse_lost_zeros(model: nn.Module, path: Path) -> None:
    """Refuse zeros that training would fill: those that no mask of torch.nn.utils.prune holds."""
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name.endswith("weight"))
    if zeros > 0.05 * parameters_of(model) and not masks_of(model):
        raise JBRError(
            f"{path}: {zeros} weights are zero and no masks hold them, so training would fill them. Prune with "
            "permanent=False (--keep-masks)."
        )


def is_done(args: argparse.Namespace, setup: Setup, path: Path, how: str) -> bool:
    """Whether its line is there."""
    there = done(args.out, "how")
    return path.exists() and describe(args, setup, path, how)[0] in there


def run(args: argparse.Namespace) -> int:
    """Make everything that is not in the file yet, and what failed there; return how many failed.

    Raises:
        JBRError: What was asked for is impossible for all of them.
    """
    setup = read_setup(args)
    for name in args.criterion or ():
        if name not in CRITERIA:
            raise unknown("criterion", name, CRITERIA)
    ChannelOptions(macs=args.macs)  # refuses what is no share
    wanted = list(product(list_models(args, setup), args.how))
    args.work.mkdir(parents=True, exist_ok=True)
    if not all(is_done(args, setup, path, how) for (path, _), how in wanted):
        source = load_setup(setup)[1]
        source.check_labels("training")
        source.check_counts(args.images if args.criterion else None, args.eval_images)
    mend(args.out)
    return sum(not add_line(args, setup, path, what, how) for (path, what), how in wanted)


def add_line(args: argparse.Namespace, setup: Setup, path: Path, what: dict[str, Any], how: str) -> bool:
    """Add the line of one model and one way, unless it is there; or one that says why there is none."""
    key = key_of([path.name, how, asdict(training.read_recipe(args))])  # of a failure before there is a pruned model
    try:
        if not path.exists():
            make(args, setup, path, what["criterion"])
        if is_done(args, setup, path, how):
            return True
        key = describe(args, setup, path, how)[0]
        line = finetune(args, setup, path, how)
    except Exception as error:  # a loss that is NaN, a criterion that does not suit the model: the others go on
        if isinstance(error, ArgumentError) and not isinstance(error, BudgetError):
            raise  # of the training: it would fail for all
        line = {"key": key, **setup.described(), "how": how, **describe_call(), "failed": describe_failure(error)}
    append(args.out, [plain(what | line)])
    failed = line.get("failed")
    result = failed or f"{line['accuracy_before']:.4f} -> {line['accuracy']:.4f}"
    print(f"{what['criterion']} {how}: {result}", file=sys.stderr if failed else sys.stdout, flush=True)
    return not failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_setup_arguments(parser)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--pruned", type=Path, nargs="+", help="directories of saved models")
    models.add_argument("--criterion", nargs="+", help="prune by these first")
    parser.add_argument("--macs", type=float, default=0.3, help="share of MACs to keep when pruning")
    parser.add_argument("--images", type=int, default=512, help="calibration images when pruning")
    parser.add_argument("--repair", default="auto", help="when pruning: auto, none, or a method")
    parser.add_argument("--prune-seed", type=int, default=0)
    parser.add_argument("--how", nargs="+", choices=["plain", "distil"], default=["plain"])
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels, plain")
    parser.add_argument("--weight", type=float, default=0.5, help="of the teacher, in distillation")
    parser.add_argument("--temperature", type=float, default=2.0, help="in distillation")
    parser.add_argument("--eval-images", type=int, help="default: all")
    parser.add_argument("--work", type=Path, required=True, help="directory for models and states")
    training.add_training_arguments(parser, lr=0.02)
    args = parser.parse_args(argv)
    with exit_on_error("finetune.py"):
        number = run(args)
    if number:
        raise SystemExit(f"finetune.py: {number} failed; {args.out} says why.")


if __name__ == "__main__":
    main()
