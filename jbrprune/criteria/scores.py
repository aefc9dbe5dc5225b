"""Scores of removable units, as sums over samples that can be added, saved and ranked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from jbrprune.data.files import tensor_file, write_tensors
from jbrprune.errors import ArgumentError, DataError
from jbrprune.structure.groups import Group, Member

KIND = "units"


@dataclass(frozen=True)
class Settings:
    """What a score means: two scores may be added only if these agree."""

    objective: str
    site: str
    statistic: str
    batch: int | None = None
    confidence: float = 0.0


@dataclass(frozen=True, eq=False)
class Scores:
    """s_u = E_x[v_u(x)^2] (or its batched or mean-replaced form) for every unit of every group.

    Attributes:
        sums: Group name -> ``[units]`` float64, the sum over samples (unit: squared change of the
            objective, times samples).
        groups: The units that are scored, with their members.
        samples: Samples in the sums.
        skipped: Samples that were left out because the dense model was not confident enough.
        settings: Objective, site and statistic.
    """

    sums: Mapping[str, Tensor]
    groups: tuple[Group, ...]
    samples: int
    skipped: int
    settings: Settings

    def __getitem__(self, name: str) -> Tensor:
        """``[units]`` scores of one group: the mean over samples."""
        return self.sums[name] / self.samples

    def values(self) -> dict[str, Tensor]:
        """Group name -> ``[units]`` scores."""
        return {name: self[name] for name in self.sums}

    def __add__(self, other: Scores) -> Scores:
        """Merge the scores of two disjoint sets of samples.

        The sum of the shards is the score of the whole; for ``batched`` if the shards are cut between batches,
        and for the random signs of ``projection`` in expectation.

        Raises:
            ArgumentError: They were made with other settings, or for other units.
        """
        if self.settings != other.settings:
            raise ArgumentError(f"Cannot add scores made with {self.settings} and {other.settings}.")
        if list(map(_described, self.groups)) != list(map(_described, other.groups)):
            raise ArgumentError(
                "Cannot add scores of different units: the groups or their members differ. Score both shards with the "
                "groups of one call of find_groups."
            )
        return replace(
            self,
            sums={name: total + other.sums[name] for name, total in self.sums.items()},
            samples=self.samples + other.samples,
            skipped=self.skipped + other.skipped,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (atomically)."""
        tensors = {f"sums/{name}": total for name, total in self.sums.items()}
        for number, group in enumerate(self.groups):
            for position, member in enumerate(group.members):
                tensors[f"members/{number}/{position}/channel"] = member.channel
                tensors[f"members/{number}/{position}/unit"] = member.unit
        header = {
            "settings": vars(self.settings),
            "samples": self.samples,
            "skipped": self.skipped,
            "groups": [
                {"name": g.name, "kind": g.kind, "size": g.size, "axes": [list(m.axis) for m in g.members]}
                for g in self.groups
            ],
        }
        write_tensors(path, KIND, header, tensors)

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, or does not hold scores of units in a known format.
        """
        with tensor_file(path, KIND) as (header, tensors):
            groups = tuple(_group(number, entry, tensors) for number, entry in enumerate(header["groups"]))
            return Scores(
                sums={group.name: tensors[f"sums/{group.name}"] for group in groups},
                groups=groups,
                samples=header["samples"],
                skipped=header["skipped"],
                settings=Settings(**header["settings"]),
            )


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
            "pass objective='projection' or 'margin', which do without it."
        )


def _described(group: Group) -> tuple:
    members = [(member.axis, member.channel.tolist(), member.unit.tolist()) for member in group.members]
    return group.name, group.kind, group.size, members


def _group(number: int, entry: dict, tensors: Mapping[str, Tensor]) -> Group:
    members = tuple(
        Member(tuple(axis), tensors[f"members/{number}/{p}/channel"], tensors[f"members/{number}/{p}/unit"])
        for p, axis in enumerate(entry["axes"])
    )
    return Group(entry["name"], entry["kind"], entry["size"], members)


class Accumulator:
    """Adds up per-sample relevances into the sums of a statistic.

    ``second_moment``: sum of v^2. ``batched``: consecutive samples are gathered to batches of ``batch``
    whatever the size they arrive in, n_b * mean_b(v)^2 is summed; a last, smaller batch counts by its size.
    """

    def __init__(self, groups: tuple[Group, ...], batch: int | None) -> None:
        self.batch = batch
        self.samples = 0
        self.sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        self._open = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        self._filled = 0

    def add(self, relevances: Mapping[str, Tensor]) -> None:
        """Add ``[n, units]`` relevances of n samples, one tensor per group."""
        n = len(next(iter(relevances.values())))
        self.samples += n
        if self.batch is None:
            for name, v in relevances.items():
                self.sums[name] += v.cpu().double().square().sum(0)  # on the CPU: not every accelerator has float64
            return
        start = 0
        while start < n:
            stop = min(n, start + self.batch - self._filled)
            for name, v in relevances.items():
                self._open[name] += v[start:stop].cpu().double().sum(0)
            self._filled += stop - start
            start = stop
            if self._filled == self.batch:
                self._close()

    def finish(self) -> dict[str, Tensor]:
        """The sums, with what is left of an open batch."""
        if self._filled:
            self._close()
        return self.sums

    def _close(self) -> None:
        for name, total in self._open.items():
            self.sums[name] += total.square() / self._filled
            total.zero_()
        self._filled = 0
