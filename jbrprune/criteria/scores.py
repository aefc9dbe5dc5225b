"""Scores as sums over samples, which can be added up, saved and ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from jbrprune.data.files import tensor_file, write_tensors
from jbrprune.errors import ArgumentError, DataError
from jbrprune.structure.groups import Group, Member

S = TypeVar("S", bound="SummedScores")


@dataclass(frozen=True)
class Settings:
    """What a score means: two scores may be added only if these agree."""

    objective: str
    site: str
    statistic: str
    batch: int | None = None
    threshold: float = 0.0


class SummedScores:
    """What scores of units and of single weights have in common."""

    KIND: ClassVar[str]
    sums: Mapping[str, Tensor]
    samples: int
    skipped: int
    settings: Settings

    def __getitem__(self, name: str) -> Tensor:
        """Scores of one group or parameter: the mean over samples; for ``signed`` its absolute value."""
        mean = self.sums[name] / self.samples
        return mean.abs() if self.settings.statistic == "signed" else mean

    def values(self) -> dict[str, Tensor]:
        """Name -> scores."""
        return {name: self[name] for name in self.sums}

    def __add__(self: S, other: S) -> S:
        """Merge the scores of two disjoint sets of samples.

        The sum of the shards is the score of the whole; for ``batched`` if the shards are cut between batches,
        and for the random signs of ``projection`` in expectation.

        Raises:
            ArgumentError: They were made with other settings, or of something else.
        """
        if type(other) is not type(self):
            return NotImplemented
        if self.settings != other.settings:
            raise ArgumentError(f"Cannot add scores made with {self.settings} and {other.settings}.")
        mine, theirs = self._scored(), other._scored()
        if list(mine.items()) != list(theirs.items()):
            name = next((n for n in [*mine, *theirs] if mine.get(n) != theirs.get(n)), "their order")
            raise ArgumentError(
                f"Cannot add scores of different {self.KIND}: they differ in {name}. Score both shards with the same "
                "model, the same groups (of one call of find_groups) and the same `ignore`."
            )
        sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        counts = {"samples": self.samples + other.samples, "skipped": self.skipped + other.skipped}
        return replace(self, sums=sums, **counts)  # type: ignore[type-var]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (atomically)."""
        header = {"settings": vars(self.settings), "samples": self.samples, "skipped": self.skipped}
        write_tensors(path, self.KIND, header | {"scored": self._scored()}, self.sums)

    @classmethod
    def load(cls: type[S], path: str | Path) -> S:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, or does not hold such scores in a known format.
        """
        with tensor_file(path, cls.KIND) as (header, tensors):
            sums = {name: tensors[name] for name in header["scored"]}
            counts = {"samples": header["samples"], "skipped": header["skipped"]}
            return cls(sums=sums, **counts, settings=Settings(**header["settings"]), **cls._read(header["scored"]))  # type: ignore

    def _scored(self) -> dict[str, Any]:
        """Name -> what is scored, as JSON."""
        return {name: list(total.shape) for name, total in self.sums.items()}

    @staticmethod
    def _read(scored: Mapping[str, Any]) -> dict[str, Any]:
        """What else is made from it."""
        return {}


@dataclass(frozen=True, eq=False)
class Scores(SummedScores):
    """s_u = E_x[v_u(x)^2] (or its batched or mean-replaced form) for every unit of every group.

    Attributes:
        sums: Group name -> ``[units]`` float64, the sum over samples (unit: squared change of the
            objective, times samples).
        groups: The units that are scored, with their members.
        samples: Samples in the sums.
        skipped: Samples that were left out because the dense model was not confident enough.
        settings: Objective, site and statistic.
    """

    KIND = "units"
    sums: Mapping[str, Tensor]
    groups: tuple[Group, ...]
    samples: int
    skipped: int
    settings: Settings

    def _scored(self) -> dict[str, Any]:
        return {
            group.name: [group.kind, group.size]
            + [[list(member.axis), member.channel.tolist(), member.unit.tolist()] for member in group.members]
            for group in self.groups
        }

    @staticmethod
    def _read(scored: Mapping[str, Any]) -> dict[str, Any]:
        groups = [
            Group(name, kind, size, tuple(Member(tuple(axis), *map(torch.tensor, rest)) for axis, *rest in members))
            for name, (kind, size, *members) in scored.items()
        ]
        return {"groups": tuple(groups)}


def check_some(sums: Iterable[Tensor]) -> None:
    """Refuse scores that rank nothing.

    Raises:
        DataError: All of them are zero.
    """
    if not any(bool(values.any()) for values in sums):
        raise DataError(
            "Every score is zero, so nothing can be ranked: what the criterion looks at does not depend on any unit. "
            "Look at the model's logits on these images: where they do not differ from image to image, the images or "
            "the weights are not the right ones; where they are huge, the softmax is saturated and its gradient zero: "
            "choose the objective 'projection' or 'margin', which do without it."
        )


class Accumulator:
    """Adds up what samples contribute, in float64.

    Without a ``batch``, contributions are added. With one, those of consecutive samples are gathered to batches of
    ``batch``, whatever the size they arrive in, and n_b * mean_b(v)^2 is added; a last, smaller batch counts by its
    size.
    """

    def __init__(self, like: Mapping[str, Tensor], batch: int | None) -> None:
        self.batch = batch
        self.sums = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._open = {name: torch.zeros_like(tensor) for name, tensor in like.items()} if batch else self.sums
        self._filled = 0

    def add(self, samples: int, of: Callable[[slice], Iterable[Mapping[str, Tensor]]]) -> None:
        """Add samples; what ``of`` gives for some of them adds up to their contributions."""
        start = 0
        while start < samples:
            stop = samples if self.batch is None else min(samples, start + self.batch - self._filled)
            for totals in of(slice(start, stop)):
                for name, total in totals.items():
                    self._open[name] += total
            self._filled += stop - start
            start = stop
            if self._filled == self.batch:
                self._close()

    def finish(self) -> dict[str, Tensor]:
        """The sums, with what is left of an open batch."""
        if self.batch and self._filled:
            self._close()
        return self.sums

    def _close(self) -> None:
        for name, total in self._open.items():
            self.sums[name] += total.square() / self._filled
            total.zero_()
        self._filled = 0
