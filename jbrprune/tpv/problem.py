"""What a TPV is estimated of: a model and how it is perturbed, on which images, and for how long."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune.criteria.passes import own
from jbrprune.data import distributed
from jbrprune.errors import ArgumentError, DataError, ModelError
from jbrprune.evaluation.agreement import check_weights
from jbrprune.sparsity.masks import masks_of
from jbrprune.structure.groups import match_names
from jbrprune.tpv.covariances import Covariance, Perturbation
from jbrprune.tpv.responses import Output


@dataclass(frozen=True)
class Settings:
    """How long to go on, and from where the randomness comes."""

    rtol: float
    samples: int | None
    draws: int
    signs: int
    first: int
    seed: int
    progress: bool

    @staticmethod
    def checked(
        rtol: float, samples: int | None, draws: int, signs: int, first: int, seed: int, progress: bool
    ) -> Settings:
        """Settings that have a meaning.

        Raises:
            ArgumentError: They have none.
        """
        if not 0 <= rtol < 1:
            raise ArgumentError(f"rtol must satisfy 0 <= rtol < 1, got {rtol}.")
        for name, value, least in (
            ("samples", samples, 1),
            ("draws", draws, 1),
            ("signs", signs, 1),
            ("first", first, 0),
        ):
            if value is not None and value < least:
                raise ArgumentError(f"{name} must be at least {least}, got {value}.")
        return Settings(rtol, samples, draws, signs, first, seed, progress)


@dataclass(frozen=True, eq=False)
class Bound:
    """A model, what is perturbed of it, and how."""

    model: nn.Module
    covariance: Covariance
    shapes: Mapping[str, torch.Size]
    output: Output


def bound_to(model: nn.Module, covariance: Covariance | Perturbation, ignore: Sequence[str], output: Output) -> Bound:
    """The model with the covariance of its weights, but for those that are ignored.

    Raises:
        ArgumentError: What was given is no covariance, or was made for another model.
        ModelError: No parameter is left, or one is masked.
        NonFiniteError: NaN or Inf in the weights.
    """
    check_weights(model)
    if masks_of(model):
        raise ModelError(
            f"{next(iter(masks_of(model)))} is masked by torch.nn.utils.prune, so that its parameter is not what the "
            "model computes with. Call jbrprune.make_permanent(model) first (on a copy, if the masks are still needed)."
        )
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    if ignore:
        modules = [name for name, _ in model.named_modules() if name]
        left_out = match_names(modules + names, ignore, "module and no parameter")
        names = [name for name in names if name not in left_out]
    if not names:
        raise ModelError(f"{type(model).__name__} has no parameter that can be perturbed. Is everything in `ignore`?")
    weights = {name: p.detach() for name, p in model.named_parameters() if name in set(names)}
    if isinstance(covariance, Perturbation):
        covariance = covariance.of(model, weights)
    if not isinstance(covariance, Covariance):
        raise ArgumentError(
            f"{type(covariance).__name__} is not a covariance: it needs the methods quadratic(gradients) and "
            "sample(generator), see jbrprune.tpv.covariances."
        )
    return Bound(model, covariance, {name: w.shape for name, w in weights.items()}, output)


@dataclass(eq=False)
class Stream:
    """The images, on the device, limited in number, and known to be the same in every pass; ranks share them."""

    data: object
    batch_size: int
    device: torch.device
    samples: int | None
    progress: bool
    prints: list[int] = field(default_factory=list)
    head: Tensor | None = None

    def visited(self, what: str, work: Callable[[int, int, Tensor], Tensor]) -> Iterator[Tensor]:
        """What ``work(number of the batch, of its first image, images)`` gives for every batch, in the data's order.

        Of several ranks each works on its own batches (and numbers them), and all get the results of all: whoever
        stops, or goes on, does so on every rank.

        Args:
            what: What a progress bar says.
            work: Gives ``[n]`` values, one per image, on the CPU.

        Raises:
            DataError: These are not the images of the first pass, or there are none.
        """
        parts = distributed.Parts(self.data, batch_size=self.batch_size)
        mine = self._read(parts, what)
        waiting: dict[int, Tensor] = {}
        position = 0

        def one() -> tuple[int, Tensor] | None:
            batch = next(mine, None)
            return None if batch is None else (batch[1], work(*batch))

        while answers := [found for found in distributed.gathered(distributed.together(one)) if found is not None]:
            waiting.update(answers)
            while position in waiting:
                values = waiting.pop(position)
                position += len(values)
                yield values
        if self.samples is None:  # else the ranks stop reading at different places
            parts.check()
        if position == 0:
            raise DataError(f"The data ({type(self.data).__name__}) hold no image for any rank.")

    def _read(self, parts: distributed.Parts, what: str) -> Iterator[tuple[int, int, Tensor]]:
        """One pass over the own part: the number of each batch, that of its first image, and the images."""
        again, number = bool(self.prints), -1
        shown = tqdm(parts, what, unit="batch", disable=not self.progress, leave=False)
        for number, (start, batch) in enumerate(shown):
            images = own(batch.images)[: None if self.samples is None else max(0, self.samples - start)]
            if not len(images):
                number -= 1
                break
            self._compare(number, _fingerprint(images), again)
            images = images.to(self.device)
            self.head = images if self.head is None else self.head
            yield number, start, images
            if start + len(images) == self.samples:
                break
        if again and number + 1 != len(self.prints):
            raise DataError(
                f"The data gave {len(self.prints)} batches in the first pass and {number + 1} in a later one."
            )

    def _compare(self, number: int, found: int, again: bool) -> None:
        if not again:
            self.prints.append(found)
        elif number >= len(self.prints) or self.prints[number] != found:
            raise DataError(
                f"Batch {number} is not the one of the first pass: the data are shuffled (or augmented at random) anew "
                "every time they are read, but the changed and the unchanged model must see the same images. Use "
                "shuffle=False, or pass a tensor or a list of batches."
            )


def _fingerprint(images: Tensor) -> int:
    return zlib.crc32(images.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
