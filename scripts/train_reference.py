"""Train a timm model to have something to prune: weights as safetensors, and beside them how they were made.

    python scripts/train_reference.py --model resnet10t --data digits --epochs 5 --out resnet10t_digits.safetensors
    python scripts/train_reference.py --model mobilenetv2_100 --model-arg output_stride=16 --data fashion_mnist \
        --root FOLDER --epochs 4 --out mobilenetv2_fashion_mnist.safetensors
    python scripts/train_reference.py --model resnet18 --data cifar10 --root FOLDER --epochs 30 --out resnet.safetensors

Training starts from random weights unless ``--weights`` is given. Optimiser, schedule and augmentation are timm's, by
their names there. The state is kept after every epoch (OUT.training): called again, an interrupted training goes on and
ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import check_least, commit, exit_on_error, make_parser
from protocols import Setup, add_setup_arguments, read_setup
from safetensors.torch import save_file
from sources import ALIASES, NORMALISED, folder_of, measured_folder, open_source
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from jbrprune.data.batches import attach_reference
from jbrprune.data.files import replacing
from jbrprune.data.images import label_of, picture_of, pictures
from jbrprune.errors import ArgumentError, CheckpointError, DataError, NonFiniteError
from jbrprune.evaluation.agreement import agreement_on, compute_logits
from jbrprune.models import preserve, timm_models
from jbrprune.models.preserve import logits_of
from jbrprune.pruning.prepare import provenance

INITIAL = ("random", "pretrained")
"""Weights to start from that are no file."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(logits, images, labels)`` -> the mean over a batch."""


# --- images ----------------------------------------------------------------------------------------


def option(default: Any, text: str, **more: Any) -> Any:
    """A field that the command line explains."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, by transforms of timm and torchvision."""

    padding: int = option(0, "shift images by up to so many pixels; 0: timm's random crops, resized")
    scale: float = option(0.35, "least share of the area that a resized crop covers")
    hflip: float = option(0.5, "probability of a mirror image")
    color_jitter: float = option(0.0, "strength")
    auto_augment: str | None = option(None, "timm's name of a policy, such as rand-m9-mstd0.5-inc1")
    re_prob: float = option(0.0, "probability of random erasing")


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "digits": Augmentation(padding=2, hflip=0.0),
    "fashion_mnist": Augmentation(padding=2),
    "cifar10": Augmentation(padding=4),
    "cifar100": Augmentation(padding=4),
}
"""Name of data -> its usual augmentation; what is not here gets the default."""


class Augmented(Dataset):
    """``(image, label)``, augmented anew whenever one is read (by the global generators).

    Attributes:
        name: What the data are called.
        stored: Pictures, or normalised tensors, with labels.
        transform: From a picture to a tensor.
        mode: PIL's name of the colours.
    """

    def __init__(self, name: str, stored: Any, transform: Callable[[Any], Tensor], mode: str) -> None:
        self.name, self.stored, self.transform, self.mode = name, stored, transform, mode

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        item = self.stored[position]
        if self.name in NORMALISED:
            mean, std = NORMALISED[self.name]
            picture, label = to_pil_image((item[0] * std + mean).mul(255).round().to(torch.uint8)), int(item[1])
        else:
            picture, label = picture_of(item), label_of(item)
        if picture is None or label is None:
            raise DataError(f"Training item {position} is no picture with a class index: training needs labels.")
        return self.transform(picture.convert(self.mode)), label


def open_training(name: str, root: str | None, model: nn.Module, how: Augmentation) -> Augmented:
    """Training images of named data, or of ``train`` in a folder.

    Args:
        name: As for `sources.open_source`.
        root: Where named data are stored.
        model: timm's; pictures are prepared for it.
        how: What is done to each image.

    Raises:
        ArgumentError: No such data.
        DataError: They cannot be read, or nothing is left to measure on.
    """
    folder = folder_of(name, root)
    if folder and not measured_folder(folder):
        raise DataError(f"{folder} has no train/ beside val/, so nothing could be measured that was not trained on.")
    if name in NORMALISED:
        mean, std = NORMALISED[name]
        stored: Any = open_source(name, root, model).train
        facts = {"input_size": tuple(stored[0][0].shape), "mean": (mean,), "std": (std,)}
    else:
        facts = timm_models.data_config(model)
        stored = pictures(str(folder / "train") if folder else ALIASES.get(name, name), model, root=root, split="train")
        if not hasattr(stored, "__getitem__"):
            raise DataError(f"{name} is a stream; training here needs data that can be shuffled: store it in a folder.")
    size = facts["input_size"]
    kept = {key: facts[key] for key in ("mean", "std", "interpolation") if key in facts}
    own = {key: value for key, value in asdict(how).items() if key not in ("padding", "scale")}
    transform: Any = create_transform(size, is_training=True, scale=(how.scale, 1.0), **own, **kept)
    if how.padding:  # small pictures are shifted, not scaled, as DeiT and others do on CIFAR
        transform.transforms[:1] = [transforms.Resize(size[-1]), transforms.RandomCrop(size[-2:], padding=how.padding)]
    return Augmented(name, stored, transform, "L" if size[0] == 1 else "RGB")


# --- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train, in the words of timm's factories."""

    epochs: int
    batch_size: int = 128
    opt: str = option("sgd", "optimiser of timm.optim.create_optimizer_v2")
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    sched: str = option("cosine", "schedule of timm.scheduler.create_scheduler_v2, stepped at every update")
    warmup_epochs: float = option(0.5, "of them the learning rate rises to --lr")
    min_lr: float = option(0.0, "where the schedule ends")
    clip: float | None = option(None, "largest norm of the gradient; default: any")
    autocast: str | None = option(None, "mixed precision", choices=["bfloat16"])
    channels_last: bool = option(True, "memory layout, faster for convolutions on most hardware")
    workers: int = option(0, "processes that read and augment pictures")
    seed: int = 0


def train(
    model: nn.Module, data: Dataset, recipe: Recipe, loss: Loss, checkpoint: Path, identity: Mapping[str, object]
) -> list[dict[str, float]]:
    """Train a model in place, from the last epoch in the checkpoint on; one line is printed per epoch.

    Every epoch begins with random generators that depend on seed and epoch alone, so that what is drawn in it (order,
    augmentation, dropout) does not depend on whether the epochs before ran in the same process.

    Args:
        model: Left in eval mode.
        data: ``(image, label)``; the last, incomplete batch of an epoch is left out.
        recipe: How to train.
        loss: What is minimised.
        checkpoint: Written after every epoch, atomically.
        identity: What else makes two trainings the same; a checkpoint of another one is refused.

    Returns:
        For every epoch its mean loss and last learning rate.

    Raises:
        ArgumentError: An argument has no meaning, or there are fewer images than a batch holds.
        CheckpointError: The checkpoint is of another training, or damaged.
        NonFiniteError: The loss is NaN or Inf.
    """
    check_least("epochs", recipe.epochs, 1)
    check_least("batch_size", recipe.batch_size, 2)
    updates = len(data) // recipe.batch_size
    if updates < 1:
        raise ArgumentError(f"There are {len(data)} training images, fewer than one batch of {recipe.batch_size}.")
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimiser = {name: getattr(recipe, name) for name in ("opt", "lr", "weight_decay", "momentum")}
    schedule: dict[str, Any] = {"warmup_epochs": recipe.warmup_epochs, "warmup_lr": recipe.lr / 25}
    schedule |= {"sched": recipe.sched, "num_epochs": recipe.epochs, "min_lr": recipe.min_lr}
    try:
        optimizer = create_optimizer_v2(model, **optimiser)
        scheduler, _ = create_scheduler_v2(optimizer, step_on_epochs=False, updates_per_epoch=updates, **schedule)
        scheduler.step_update(0)
    except (AssertionError, AttributeError, ValueError, TypeError) as error:
        raise ArgumentError(
            f"timm cannot make optimiser {recipe.opt!r} with schedule {recipe.sched!r}: {error}"
        ) from error
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    described = json.loads(json.dumps({**identity, "recipe": vars(recipe)}))
    history = _resume(checkpoint, described, parts, preserve.device_of(model))
    for epoch in range(len(history), recipe.epochs):
        state = int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0])
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(state)
        loader = DataLoader(data, recipe.batch_size, True, num_workers=recipe.workers, drop_last=True)
        total = 0.0
        for number, (images, labels) in enumerate(loader, 1):
            total += _update(model, images, labels, recipe, loss, optimizer)
            scheduler.step_update(epoch * updates + number)
        scheduler.step(epoch + 1)
        history.append({"loss": total / updates, "lr": optimizer.param_groups[0]["lr"]})
        with replacing(checkpoint) as temporary:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"identity": described, "history": history, **states}, temporary)
        print(f"epoch {epoch + 1}/{recipe.epochs}: loss {total / updates:.4f}", flush=True)
    model.eval()
    return history


def _update(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, loss: Loss, optimizer: torch.optim.Optimizer
) -> float:
    """One update in train mode; its loss."""
    model.train()
    device = preserve.device_of(model)
    images, labels = images.to(device), labels.to(device)
    if recipe.channels_last:
        images = images.to(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast is not None):
        logits = logits_of(model(images))
        value = loss(logits.float(), images, labels)
    if not torch.isfinite(value):
        raise NonFiniteError(f"The loss is {value.item()}: lower the learning rate.")
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return value.item()


def _resume(
    checkpoint: Path, described: dict[str, Any], parts: Mapping[str, Any], device: torch.device
) -> list[dict[str, float]]:
    """Fill everything from a checkpoint, if there is one; its history."""
    if not checkpoint.exists():
        return []
    try:
        found = torch.load(checkpoint, map_location=device, weights_only=True)
        other = sorted(key for key in described if found["identity"].get(key) != described[key])
    except Exception as error:  # whatever a damaged zip file or a foreign pickle raises
        raise CheckpointError(
            f"{checkpoint} cannot be read as a checkpoint of a training ({type(error).__name__}): remove it."
        ) from error
    if other:
        raise CheckpointError(
            f"{checkpoint} is of another training: {', '.join(other)} differ. Choose another --out, or remove it."
        )
    for name, part in parts.items():
        part.load_state_dict(found[name])
    return list(found["history"])


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Cross-entropy with the label."""
    return lambda logits, images, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)


def distillation(teacher: nn.Module, *, weight: float, temperature: float) -> Loss:
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student), both at temperature T.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.
    """

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(logits_of(teacher(images)).float() / temperature, 1)
        found = F.log_softmax(logits / temperature, 1)
        divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * F.cross_entropy(logits, labels) + weight * divergence

    return loss


# --- the command line ------------------------------------------------------------------------------


def train_and_write(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Train, or go on, and write the weights and what the JSON beside them holds, which is returned."""
    began = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    recipe, how = read_recipe(args), read_augmentation(args)
    torch.manual_seed(args.seed)
    pretrained, checkpoint = args.weights == "pretrained", None if args.weights in INITIAL else args.weights
    model = timm_models.create(args.model, pretrained=pretrained, checkpoint=checkpoint, **dict(setup.model_args))
    model = model.to(args.device)
    data = open_training(args.data, args.root, model, how)
    identity = setup.described() | {"augmentation": asdict(how), "smoothing": args.smoothing}
    loss = cross_entropy(args.smoothing)
    history = train(model, data, recipe, loss, args.out.with_suffix(".training"), identity)
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
    with replacing(args.out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    with replacing(args.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def read_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe in the arguments."""
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def read_augmentation(args: argparse.Namespace) -> Augmentation:
    """The usual augmentation of the data, with what was asked for."""
    given = {field.name: getattr(args, field.name) for field in fields(Augmentation)}
    return replace(AUGMENTATIONS.get(args.data, Augmentation()), **{k: v for k, v in given.items() if v is not None})


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Arguments of a recipe and of an augmentation, from their fields."""
    kinds = {"int": int, "float": float, "str": str}
    for item in (*fields(Recipe), *fields(Augmentation)):
        flag, text = "--" + item.name.replace("_", "-"), item.metadata.get("help")
        if item.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            needed, kind = item.default is MISSING, kinds[str(item.type).split(" ")[0]]
            parser.add_argument(flag, type=kind, required=needed, help=text, choices=item.metadata.get("choices"))
    parser.set_defaults(**{f.name: f.default for f in fields(Recipe) if f.default is not MISSING} | defaults)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_setup_arguments(parser, weights="random")
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels")
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    with exit_on_error("train_reference.py"):
        facts = train_and_write(args, read_setup(args))
    print(f"{facts['accuracy']:.4f} of {facts['test_images']} test images right; {args.out}")


if __name__ == "__main__":
    main()
