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

from augment import open_training
from benchmark import calibrated, described_here, loaded, opened, reason
from common import append, done, keywords, mend, use_threads
from plan import Setup, digest, setup_named
from torch import nn
from train_reference import add_training_arguments, augmentation_of, recipe_of
from training import Loss, cross_entropy, distillation, train

from baselines import CRITERIA, LABELS
from jbrprune import load, prune
from jbrprune.budgets.budget import Budget
from jbrprune.budgets.cost import count_macs
from jbrprune.checkpoint import checkpoint as files
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, BudgetError, JBRError, unknown
from jbrprune.evaluation.agreement import agreement_on, parameters_of
from jbrprune.models import preserve
from jbrprune.pruning.prepare import provenance
from jbrprune.report.records import plain
from jbrprune.sparsity.masks import masks_of

HOW = ("plain", "distil")


def models(args: argparse.Namespace, setup: Setup) -> list[tuple[Path, dict[str, Any]]]:
    """Directories of pruned models, of which those of criteria may not be there yet, with what a line says of each.

    Raises:
        CheckpointError: One that should be there is not.
    """
    found = []
    for path in args.pruned or ():
        report = files.describe(path).report or {}
        how = report.get("settings", {})
        found.append((path, {"criterion": how.get("criterion", how.get("objective")), "budget": report.get("budget")}))
    for name in args.criterion or ():
        what = {"criterion": name, "budget": {"macs": args.macs}, "images": args.images, "repair": args.repair}
        what |= {"prune_seed": args.prune_seed}
        found.append((args.work / f"{name}-{digest([setup_named(setup), what])}", what))
    return found


def make(args: argparse.Namespace, setup: Setup, path: Path, name: str) -> None:
    """Prune by a criterion, and save."""
    batches = calibrated(setup, args.images, args.prune_seed)
    prune(
        opened(setup).model,
        batches if name in LABELS else [Batch(batch.images) for batch in batches],
        macs=args.macs,
        criterion=CRITERIA[name],
        repair=None if args.repair == "none" else args.repair,
        images=None,
        seed=args.prune_seed,
        progress=False,
    ).save(path)


def finetuned(
    args: argparse.Namespace, setup: Setup, path: Path, what: dict[str, Any], how: str, key: str
) -> dict[str, Any]:
    """Fine-tune one pruned model in one way; its line."""
    began = time.perf_counter()
    dense, model = opened(setup), load(path).to(args.device)
    refuse_lost_zeros(model, path)
    before = agreement_on(model, dense.test)
    recipe, augmentation = recipe_of(args), augmentation_of(args)
    data, data_digest = open_training(setup.data, setup.root, dense.model, augmentation)
    settings = {"how": how, **loss_named(args, how), "augmentation": asdict(augmentation)}
    history = train(
        model,
        data,
        recipe,
        loss=loss_of(args, how, dense.model),
        checkpoint=args.work / f"{key}.training",
        identity={"key": key, **settings, "data_sha256": data_digest},
        report=lambda line: print(f"{what['criterion']} {how}: {line}", flush=True),
    )
    after = agreement_on(model, dense.test)
    described = files.describe(path)
    files.save(args.work / f"{key}", model, recipe=described.recipe, config=described.data_config, overwrite=True)
    example = dense.test[0].images[:1].to(preserve.device_of(model))
    return plain(
        {
            **{"key": key, **setup_named(setup), **what, **settings, "recipe": asdict(recipe), "history": history},
            **{"macs": sum(count_macs(model, example).values()), "params": parameters_of(model)},
            **{"dense_macs": sum(count_macs(dense.model, example).values())},
            **{"dense_accuracy": after.dense_accuracy, "accuracy_before": before.accuracy, "accuracy": after.accuracy},
            **{"agreement_before": before.top1, "agreement": after.top1, "kl": after.kl, "eval_images": after.images},
            **{"saved": key, "seconds": time.perf_counter() - began, "data_sha256": data_digest, **described_here()},
            **provenance(recipe.seed, preserve.device_of(model)),
        }
    )


def loss_named(args: argparse.Namespace, how: str) -> dict[str, float]:
    """The numbers in a loss."""
    if how == "plain":
        return {"smoothing": args.smoothing}
    return {"weight": args.weight, "temperature": args.temperature}


def loss_of(args: argparse.Namespace, how: str, teacher: nn.Module) -> Loss:
    """What is minimised."""
    if how == "plain":
        return cross_entropy(args.smoothing)
    return distillation(teacher, weight=args.weight, temperature=args.temperature)


def refuse_lost_zeros(model: nn.Module, path: Path) -> None:
    """Training would fill zeros that no mask holds; masks of torch.nn.utils.prune stay zero."""
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name.endswith("weight"))
    if zeros > 0.05 * parameters_of(model) and not masks_of(model):
        raise JBRError(
            f"{path}: {zeros} weights are zero and no masks hold them, so training would fill them. Prune with "
            "permanent=False (--keep-masks)."
        )


def key_of(args: argparse.Namespace, setup: Setup, path: Path, how: str) -> str:
    """What a line is recognised by; a pruned model by its weights."""
    weights = files.describe(path).weights["sha256"]
    settings = [asdict(recipe_of(args)), asdict(augmentation_of(args)), how, loss_named(args, how)]
    return digest([setup_named(setup), weights, settings, args.eval_images])


def is_done(args: argparse.Namespace, setup: Setup, path: Path, how: str) -> bool:
    """Whether its line is there."""
    there = done(args.out, "how")
    return path.exists() and key_of(args, setup, path, how) in there


def run(args: argparse.Namespace) -> int:
    """Everything that is not in the file yet, and what failed there; returns how many failed.

    Raises:
        JBRError: What was asked for is impossible for all of them.
    """
    given = keywords(args.model_arg)
    places = {"weights": args.weights, "root": args.root, "eval_images": args.eval_images, "device": args.device}
    setup = Setup.of(args.model, args.data, given, **places, workers=args.workers)
    for name in args.criterion or ():
        if name not in CRITERIA:
            raise unknown("criterion", name, CRITERIA)
    Budget.of(macs=args.macs)
    wanted = list(product(models(args, setup), args.how))
    args.work.mkdir(parents=True, exist_ok=True)
    if not all(is_done(args, setup, path, how) for (path, _), how in wanted):
        source = loaded(setup)[1]
        source.check_labels("training")
        source.check_counts(args.images if args.criterion else None, args.eval_images)
    mend(args.out)
    return sum(not tried(args, setup, path, what, how) for (path, what), how in wanted)


def tried(args: argparse.Namespace, setup: Setup, path: Path, what: dict[str, Any], how: str) -> bool:
    """Add the line of one model and one way, unless it is there; or one that says why there is none."""
    key = digest([path.name, how, asdict(recipe_of(args))])  # of a failure before there is a pruned model
    try:
        if not path.exists():
            make(args, setup, path, what["criterion"])
        if is_done(args, setup, path, how):
            return True
        key = key_of(args, setup, path, how)
        line = finetuned(args, setup, path, what, how, key)
    except Exception as error:  # a loss that is NaN, a criterion that does not suit the model: the others go on
        if isinstance(error, ArgumentError) and not isinstance(error, BudgetError):
            raise  # of the training: it would fail for all
        shared = {**setup_named(setup), **what, "how": how, **described_here()}
        append(args.out, [plain({"key": key, **shared, "failed": reason(error)})])
        print(f"{what['criterion']} {how}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    append(args.out, [line])
    print(f"{what['criterion']} {how}: {line['accuracy_before']:.4f} -> {line['accuracy']:.4f}", flush=True)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="timm name of the dense model")
    parser.add_argument("--weights", default="pretrained", help="pretrained, trained (on digits) or a file")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", required=True, help="as for train_reference.py")
    parser.add_argument("--root", help="where named data are stored")
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--pruned", type=Path, nargs="+", help="directories of saved models")
    models.add_argument("--criterion", nargs="+", help="prune by these first")
    parser.add_argument("--macs", type=float, default=0.3, help="share of MACs to keep when pruning")
    parser.add_argument("--images", type=int, default=512, help="calibration images when pruning")
    parser.add_argument("--repair", default="auto", help="when pruning: auto, none, or a method")
    parser.add_argument("--prune-seed", type=int, default=0)
    parser.add_argument("--how", nargs="+", choices=HOW, default=["plain"])
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels, plain")
    parser.add_argument("--weight", type=float, default=0.5, help="of the teacher, in distillation")
    parser.add_argument("--temperature", type=float, default=2.0, help="in distillation")
    parser.add_argument("--eval-images", type=int, help="default: all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="directory for models and states")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    add_training_arguments(parser, lr=0.02)
    args = parser.parse_args(argv)
    try:
        use_threads(args.threads)
        number = run(args)
    except JBRError as error:
        raise SystemExit(f"finetune.py: {error}") from error
    if number:
        raise SystemExit(f"finetune.py: {number} failed; {args.out} says why.")


if __name__ == "__main__":
    main()
