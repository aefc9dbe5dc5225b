"""Training that can be interrupted after any epoch: the same weights come out as without the interruption."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from jbrprune.data.files import replacing
from jbrprune.errors import ArgumentError, CheckpointError, NonFiniteError
from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(logits, images, labels)`` -> the mean over a batch."""


@dataclass(frozen=True)
class Recipe:
    """How to train, in the words of timm's factories.

    Attributes:
        opt: Optimiser of ``timm.optim.create_optimizer_v2``.
        sched: Schedule of ``timm.scheduler.create_scheduler_v2``, stepped at every update.
        warmup_epochs: Of them the learning rate rises to ``lr``.
        min_lr: Where the schedule ends.
        clip: Largest norm of the gradient; None: any.
        autocast: ``bfloat16`` for mixed precision; None: as the model is.
        channels_last: Memory layout, faster for convolutions on most hardware.
    """

    epochs: int
    batch_size: int = 128
    opt: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    sched: str = "cosine"
    warmup_epochs: float = 0.5
    min_lr: float = 0.0
    clip: float | None = None
    autocast: str | None = None
    channels_last: bool = True
    workers: int = 0
    seed: int = 0


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    loss: Loss,
    checkpoint: Path,
    identity: Mapping[str, object],
    report: Callable[[str], None] = log.info,
) -> list[dict[str, float]]:
    """Train a model in place, from the last epoch in the checkpoint on.

    Every epoch begins with random generators that depend on seed and epoch alone, so that what is drawn in it (order,
    augmentation, dropout) does not depend on whether the epochs before ran in the same process.

    Args:
        model: Left in eval mode.
        data: ``(image, label)``; the last, incomplete batch of an epoch is left out.
        recipe: How to train.
        loss: What is minimised.
        checkpoint: Written after every epoch, atomically.
        identity: What else makes two trainings the same; a checkpoint of another one is refused.
        report: Told one line per epoch.

    Returns:
        For every epoch its mean loss and last learning rate.

    Raises:
        ArgumentError: An argument has no meaning, or there are fewer images than a batch holds.
        CheckpointError: The checkpoint is of another training, or damaged.
        NonFiniteError: The loss is NaN or Inf.
    """
    updates = len(data) // recipe.batch_size  # type: ignore[arg-type]
    _check(recipe, updates, len(data))  # type: ignore[arg-type]
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, scheduler = _machinery(model, recipe, updates)
    described = json.loads(json.dumps({**identity, "recipe": vars(recipe)}))
    history = _resume(checkpoint, described, model, optimizer, scheduler)
    for epoch in range(len(history), recipe.epochs):
        _seed(recipe.seed, epoch)
        loader = DataLoader(data, recipe.batch_size, True, num_workers=recipe.workers, drop_last=True)
        mean = _epoch(model, loader, recipe, loss, optimizer, lambda n, e=epoch: scheduler.step_update(e * updates + n))
        scheduler.step(epoch + 1)
        history.append({"loss": mean, "lr": optimizer.param_groups[0]["lr"]})
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        with replacing(checkpoint) as temporary:
            torch.save({"identity": described, "history": history, **state}, temporary)
        report(f"epoch {epoch + 1}/{recipe.epochs}: loss {mean:.4f}")
    model.eval()
    return history


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


def _check(recipe: Recipe, updates: int, images: int) -> None:
    if recipe.epochs < 1 or recipe.batch_size < 2:
        raise ArgumentError(
            f"epochs must be at least 1 and batch_size at least 2, got {recipe.epochs} and {recipe.batch_size}."
        )
    if updates < 1:
        raise ArgumentError(f"There are {images} training images, fewer than one batch of {recipe.batch_size}.")
    if recipe.autocast not in (None, "bfloat16"):
        raise ArgumentError(f"autocast must be bfloat16 or nothing, got {recipe.autocast!r}.")


def _machinery(model: nn.Module, recipe: Recipe, updates: int) -> tuple[torch.optim.Optimizer, Any]:
    optimiser = {name: getattr(recipe, name) for name in ("opt", "lr", "weight_decay", "momentum")}
    schedule: dict[str, Any] = {"warmup_epochs": recipe.warmup_epochs, "warmup_lr": recipe.lr / 25}
    schedule |= {"sched": recipe.sched, "num_epochs": recipe.epochs, "min_lr": recipe.min_lr}
    try:
        optimizer = create_optimizer_v2(model, **optimiser)
        scheduler, _ = create_scheduler_v2(optimizer, step_on_epochs=False, updates_per_epoch=updates, **schedule)
    except (AssertionError, ValueError, TypeError) as error:
        raise ArgumentError(
            f"timm cannot make optimiser {recipe.opt!r} with schedule {recipe.sched!r}: {error}"
        ) from error
    if scheduler is None:
        raise ArgumentError("A schedule is needed; a constant one is sched='step'.")
    scheduler.step_update(0)
    return optimizer, scheduler


def _resume(
    checkpoint: Path, described: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> list[dict[str, float]]:
    """Fill everything from a checkpoint, if there is one; its history."""
    if not checkpoint.exists():
        return []
    try:
        found = torch.load(checkpoint, map_location=preserve.device_of(model), weights_only=True)
        other = sorted(key for key in described if found["identity"].get(key) != described[key])
    except Exception as error:  # whatever a damaged zip file or a foreign pickle raises
        raise CheckpointError(
            f"{checkpoint} cannot be read as a checkpoint of a training ({type(error).__name__}): remove it."
        ) from error
    if other:
        raise CheckpointError(
            f"{checkpoint} is of another training: {', '.join(other)} differ. Choose another --out, or remove it."
        )
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    scheduler.load_state_dict(found["scheduler"])
    return list(found["history"])


def _seed(seed: int, epoch: int) -> None:
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def _epoch(
    model: nn.Module,
    loader: Sequence[Any] | DataLoader,
    recipe: Recipe,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    advance: Callable[[int], None],
) -> float:
    """One pass over the data; its mean loss."""
    model.train()
    device = preserve.device_of(model)
    total = 0.0
    for number, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device), labels.to(device)
        if recipe.channels_last:
            images = images.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast is not None):
            logits = logits_of(model(images))
            value = loss(logits.float(), images, labels)
        if not torch.isfinite(value):
            raise NonFiniteError(f"The loss is {value.item()} at update {number} of an epoch: lower the learning rate.")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        advance(number)
        total += value.item()
    return total / number
