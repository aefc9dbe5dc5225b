"""Train a timm model to have something to prune: weights as safetensors, and beside them how they were made.

    python scripts/train_reference.py resnet10t --data digits --epochs 5 --out resnet10t_digits.safetensors
    python scripts/train_reference.py mobilenetv2_100 --model-arg output_stride=16 --data fashion_mnist --root FOLDER \
        --epochs 4 --out mobilenetv2_fashion_mnist.safetensors
    python scripts/train_reference.py resnet18 --data cifar10 --root FOLDER --epochs 30 --out resnet18.safetensors

Optimiser, schedule and augmentation are timm's, by their names there. The state is kept after every epoch
(OUT.training): called again, an interrupted training goes on and ends with the same weights. What the training images
were is recorded as a hash; the files of Fashion-MNIST must have the known ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from augment import AUGMENTATIONS, Augmentation, open_training
from common import commit, keywords, use_threads
from plan import model_arguments
from safetensors.torch import save_file
from sources import open_source
from torch import nn
from training import Recipe, cross_entropy, train

from jbrprune.commands.options import device_named
from jbrprune.data.batches import attach_reference
from jbrprune.data.files import replacing
from jbrprune.errors import JBRError
from jbrprune.evaluation.agreement import agreement_on, compute_logits
from jbrprune.models import timm_models
from jbrprune.pruning.prepare import provenance


def created(args: argparse.Namespace, arguments: Mapping[str, object]) -> nn.Module:
    """The model with initial weights, the same for the same seed."""
    torch.manual_seed(args.seed)
    if args.weights in ("random", "pretrained"):
        return timm_models.create(args.model, pretrained=args.weights == "pretrained", **arguments)
    return timm_models.create(args.model, checkpoint=args.weights, **arguments)


def trained(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on, and write both files; what the JSON holds."""
    began = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    recipe, how = recipe_of(args), augmentation_of(args)
    arguments = model_arguments(args.data, keywords(args.model_arg))
    model = created(args, arguments).to(args.device)
    data, digest = open_training(args.data, args.root, model, how)
    identity = {
        **{"model": args.model, "model_args": arguments, "weights": args.weights, "data": args.data},
        **{"data_sha256": digest, "augmentation": asdict(how), "smoothing": args.smoothing},
    }
    history = train(
        model,
        data,
        recipe,
        loss=cross_entropy(args.smoothing),
        checkpoint=args.out.with_suffix(".training"),
        identity=identity,
        report=lambda line: print(line, flush=True),
    )
    test = open_source(args.data, args.root, model).measured(None, recipe.workers)
    measured = agreement_on(model, attach_reference(test, compute_logits(model, test)))
    facts = {
        **identity,
        "recipe": asdict(recipe),
        "train_images": len(data),
        "accuracy": measured.accuracy,
        "test_images": measured.images,
        "history": history,
        "seconds_of_this_call": time.perf_counter() - began,
        "commit": commit(),
        **provenance(args.seed, torch.device(args.device)),
    }
    write(model, facts, args.out)
    return facts


def write(model: nn.Module, facts: Mapping[str, object], out: Path) -> None:
    """The weights as safetensors, and the facts as JSON beside them."""
    with replacing(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    with replacing(out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe in the arguments."""
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def augmentation_of(args: argparse.Namespace) -> Augmentation:
    """The usual augmentation of the data, with what was asked for."""
    given = {name: value for name, value in vars(args).items() if name in Augmentation.__annotations__}
    return replace(AUGMENTATIONS.get(args.data, Augmentation()), **{k: v for k, v in given.items() if v is not None})


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Arguments of a recipe and of an augmentation."""
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--opt", help="timm's name of an optimiser")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--sched", help="timm's name of a schedule")
    parser.add_argument("--warmup-epochs", type=float)
    parser.add_argument("--min-lr", type=float)
    parser.add_argument("--clip", type=float, help="largest norm of the gradient")
    parser.add_argument("--autocast", choices=["bfloat16"], help="mixed precision")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    parser.add_argument("--workers", type=int, help="processes that read and augment pictures")
    parser.add_argument("--seed", type=int)
    parser.set_defaults(**{f.name: f.default for f in fields(Recipe) if f.name != "epochs"} | defaults)
    parser.add_argument("--padding", type=int, help="shift images by up to so many pixels; 0: timm's resized crops")
    parser.add_argument("--scale", type=float, help="least share of the area of a resized crop")
    parser.add_argument("--hflip", type=float, help="probability of a mirror image")
    parser.add_argument("--color-jitter", type=float)
    parser.add_argument("--auto-augment", help="timm's name of a policy")
    parser.add_argument("--re-prob", type=float, help="probability of random erasing")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--weights", default="random", help="random, pretrained, or a file to start from")
    parser.add_argument("--data", required=True, help="digits, fashion_mnist, cifar10, cifar100, imagenet, or a folder")
    parser.add_argument("--root", help="where named data are; of fashion_mnist the IDX files")
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="file for the weights (.safetensors)")
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    try:
        use_threads(args.threads)
        device_named(args.device)
        facts = trained(args)
    except JBRError as error:
        raise SystemExit(f"train_reference.py: {error}") from error
    print(f"{facts['accuracy']:.4f} of {facts['test_images']} test images right; {args.out}")


if __name__ == "__main__":
    main()
