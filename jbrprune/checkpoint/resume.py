"""The log of a run: the result of every finished step, so that an interrupted run continues after the last one.

A directory with two kinds of files, each written under a temporary name and renamed, never a pickle:

* ``step-0003.safetensors``: facts and small tensors of step 3. The step is finished when this file exists.
* ``model-0003.safetensors``: the tensors of the model after step 3. Kept for the last step, and for each step that asks
  for it.

The loop of a run uses three names::

    log = open_log(directory, fingerprint_run(options, model, batches))
    for number in range(1, steps + 1):
        if number <= log.finished:
            facts, units, tensors = log.read(number)
        else:
            ...
            log.write(number, facts, units, tensors)
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.data.files import tensor_file, write_tensors
from jbrprune.errors import CheckpointError
from jbrprune.report.records import plain

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(step|model)-\d{4,}\.safetensors|\..*")
"""Names in the directory of a log; hidden files are what a process that died was writing."""
_PACKAGES = ("jbrprune", "torch", "timm", "torch-pruning")


@dataclass(frozen=True, eq=False)
class ResumeLog:
    """The finished steps of one run; `open_log` makes it.

    Attributes:
        directory: Where they are.
        fingerprint: What the run depends on, from `fingerprint_run`.
        finished: Number of steps that an earlier run with this fingerprint has finished.
    """

    directory: Path
    fingerprint: Mapping[str, Any]
    finished: int = 0

    def read(self, number: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor] | None]:
        """Read a finished step.

        Args:
            number: From 1 to `finished`.

        Returns:
            Facts, units, and the tensors of the model as `write` got them; None for the last where a later step
            follows and the step was not written with ``keep``.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        facts, units = self._read_file("step", number)
        wanted = number == self.finished or self._path("model", number).exists()
        return facts, units, self._read_file("model", number)[1] if wanted else None

    def write(
        self,
        number: int,
        facts: Mapping[str, Any],
        units: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        *,
        keep: bool = False,
    ) -> None:
        """Write a finished step; rank 0 does so for all ranks.

        Args:
            number: From 1, one after the other.
            facts: What JSON can hold.
            units: Small tensors that `read` returns for every step, such as the units that were removed.
            tensors: The model as the step leaves it.
            keep: Keep the tensors after the next step as well, because this model is handed over.

        Raises:
            CheckpointError: The files cannot be written; the steps before stay as they are.
        """
        if distributed.rank() > 0:
            return
        header = {"sha256": hash_tensors(tensors), "facts": {}}
        write_tensors(self._path("model", number), "model", header, tensors)
        header = {"sha256": hash_tensors(units), "facts": facts, "keep": keep, "fingerprint": self.fingerprint}
        write_tensors(self._path("step", number), "step", header, units)
        if number > 1:
            with tensor_file(self._path("step", number - 1), "step") as (header, _):
                if not header["keep"]:
                    self._path("model", number - 1).unlink(missing_ok=True)

    def _read_file(self, kind: str, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with tensor_file(self._path(kind, number), kind) as (header, tensors):
            if header["sha256"] != hash_tensors(tensors):
                raise ValueError("its tensors do not match their own SHA-256")
            return header["facts"], tensors

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / f"{kind}-{number:04}.safetensors"


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """Check that a log can be kept there, before anything expensive; make the directory.

    Raises:
        CheckpointError: A file, a directory that cannot be written, or one that holds something else.
    """
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in path.iterdir() if not _NAME.fullmatch(entry.name))
    except OSError as error:
        raise CheckpointError(f"resume={str(path)!r}: cannot be used as a directory: {error}.") from error
    if others:
        raise CheckpointError(
            f"resume={str(path)!r} holds other files, such as {others[0]!r}. Choose a directory for this run alone."
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(f"resume={str(path)!r} cannot be written. Choose a directory that you may write to.")
    return path


def fingerprint_run(options: Mapping[str, object], model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """Collect what a run depends on, as JSON: options, versions of the libraries, hashes of model and images.

    Args:
        options: Name -> value of whatever changes the result. A dataclass counts by its fields, scores by their
            tensors, a function by its name: a warning says that its code is not compared.
        model: The model as the user gave it.
        batches: All images of the run, with labels and reference.
    """
    tensors = {
        f"{number} {name}": tensor
        for number, batch in enumerate(batches)
        for name, tensor in vars(batch).items()
        if tensor is not None
    }
    return {
        **{name: _describe(name, value) for name, value in options.items()},
        "the model (SHA-256 of its tensors)": hash_tensors(model.state_dict()),
        "the images (SHA-256, with labels and reference)": hash_tensors(tensors),
        **{f"the version of {package}": version(package) for package in _PACKAGES},
    }


def open_log(directory: Path, fingerprint: Mapping[str, Any]) -> ResumeLog:
    """Open the log of a run, with the steps that a run of the same fingerprint has finished.

    Two processes at the same run write the same files, each as a whole.

    Args:
        directory: From `check_directory`.
        fingerprint: From `fingerprint_run`.

    Raises:
        CheckpointError: The steps there are of another run (says in what it differs), or damaged.
    """
    log, finished = ResumeLog(directory, fingerprint), 0
    with distributed.fail_together():
        while (path := log._path("step", finished + 1)).exists():
            with tensor_file(path, "step") as (header, _):
                before = header["fingerprint"]
            for name in before | fingerprint:
                if before.get(name) != fingerprint.get(name):
                    raise CheckpointError(
                        f"resume={str(directory)!r} belongs to another run: {name} was {before.get(name)!r} there and "
                        f"is {fingerprint.get(name)!r} now. Pass what that run was begun with, or another directory."
                    )
            finished += 1
    if distributed.broadcast(finished) != finished:
        raise CheckpointError(
            f"resume={str(directory)!r} holds {finished} steps for rank {distributed.rank()}, and another number "
            "for rank 0: the directory must be on a file system that all ranks see."
        )
    return replace(log, finished=finished)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _describe(name: str, value: object) -> Any:
    """An option as JSON that is the same in every process."""
    if hasattr(value, "sums"):
        return [type(value).__name__, hash_tensors(value.sums)]  # type: ignore[attr-defined]
    if is_dataclass(value):
        return [type(value).__name__, plain(value)]
    if isinstance(value, partial):
        return [_describe(name, value.func), plain(value.args), plain(value.keywords)]
    if not callable(value):
        return plain(value)
    known = getattr(value, "__qualname__", type(value).__qualname__)
    logger.warning("resume= compares %s=%s by its name alone: see that its code is the same.", name, known)
    return known
