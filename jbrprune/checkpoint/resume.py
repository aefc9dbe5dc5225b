"""The journal of a run: what every finished step left, so that a run that was interrupted goes on behind it.

A directory with two kinds of files, each written atomically and never a pickle:

* ``step-0003.safetensors``: what step 3 decided (which units went) and reported. The step is finished when it exists.
* ``model-0003.safetensors``: the tensors of the model after step 3. Kept for the last step, and for every step at
  which a model is handed over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from jbrprune.checkpoint.fingerprint import described, digest
from jbrprune.criteria import sumfiles
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.errors import CheckpointError
from jbrprune.evaluation.agreement import Agreement
from jbrprune.pruning.calibration import Calibration
from jbrprune.pruning.runs import Clock
from jbrprune.report.records import StepRow, plain, record

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

STEP, MODEL = "step", "model"
_NAME = re.compile(r"(step|model)-\d{4,}\.safetensors|\..*\.part")
_UNIMPORTANT = ("progress", "measure_latency")
"""Settings that do not change what is pruned."""


@dataclass(frozen=True, eq=False)
class Journal:
    """The finished steps of one run.

    Attributes:
        directory: Where they are; None: nothing is written or read.
        identity: What the run depends on: settings, and digests of the model and the images.
        finished: Number of steps that were there when the journal was opened.
    """

    directory: Path | None
    identity: Mapping[str, Any]
    finished: int = 0

    def write(
        self,
        number: int,
        facts: Mapping[str, Any],
        decided: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        *,
        stays: bool,
    ) -> None:
        """Note a finished step.

        Args:
            number: From 1.
            facts: What JSON can hold.
            decided: Small tensors that every later run reads again.
            tensors: The model as the step leaves it.
            stays: Whether the model is needed after the next step as well.

        Raises:
            CheckpointError: The files cannot be written.
        """
        if self.directory is None or distributed.rank() > 0:
            return
        sumfiles.write(_path(self.directory, MODEL, number), MODEL, {"stays": stays, **_sum(tensors)}, tensors)
        header = {"identity": self.identity, "facts": facts, **_sum(decided)}
        sumfiles.write(_path(self.directory, STEP, number), STEP, header, decided)
        before = _path(self.directory, MODEL, number - 1)
        if before.exists():
            with sumfiles.reading(before, MODEL, tensors=False) as (header, _):
                needed = header["stays"]
            if not needed:
                before.unlink()

    @contextmanager
    def step(self, number: int) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """What was noted of a finished step: facts, and what was decided; both are checked as they are used.

        Raises:
            CheckpointError: The file is damaged.
        """
        assert self.directory is not None
        with sumfiles.reading(_path(self.directory, STEP, number), STEP) as (header, tensors):
            _check_sum(header, tensors)
            yield header["facts"], tensors

    @contextmanager
    def model(self, number: int) -> Iterator[dict[str, Tensor]]:
        """The tensors of the model after a finished step.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        assert self.directory is not None
        with sumfiles.reading(_path(self.directory, MODEL, number), MODEL) as (header, tensors):
            _check_sum(header, tensors)
            yield tensors


NOTHING = Journal(None, {})
"""Of a run that keeps none."""


class Progress(Protocol):
    """What the state of every run remembers of its last step."""

    unrepaired: Agreement | None
    repaired: Agreement | None
    clock: Clock


def facts_of(state: Progress, row: StepRow) -> dict[str, Any]:
    """What is noted of the last step of any run."""
    agreed = {"unrepaired": plain(state.unrepaired), "repaired": plain(state.repaired)}
    return {"row": plain(row), "seconds": dict(state.clock.seconds), **agreed}


def recall(state: Progress, facts: Mapping[str, Any]) -> StepRow:
    """Undo `facts_of`: set the state as the step left it."""
    state.unrepaired, state.repaired = (
        None if facts[name] is None else record(Agreement, facts[name]) for name in ("unrepaired", "repaired")
    )
    state.clock.seconds.update(facts["seconds"])
    return record(StepRow, facts["row"])


def check_directory(directory: str | os.PathLike[str] | None) -> Path | None:
    """See that a journal can be kept there, before anything expensive; make the directory.

    Raises:
        CheckpointError: A file, a directory that cannot be written, or one that holds something else.
    """
    if directory is None:
        return None
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


@contextmanager
def opened(directory: Path | None, settings: object, model: nn.Module, images: Calibration) -> Iterator[Journal]:
    """The journal of a run, with the steps that a run of the same settings, model and images has finished.

    No other process of this machine can open it meanwhile.

    Args:
        directory: From `check_directory`.
        settings: A dataclass, of the run.
        model: The model as it was given.
        images: With the dense model's logits.

    Raises:
        CheckpointError: The steps there are of another run (says in what it differs), or damaged, or another process
            is at work on them.
    """
    if directory is None:
        yield NOTHING
        return
    with _locked(directory):
        yield _of(directory, _identity(settings, model, images))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes of this machine out, by rank 0; a process that dies gives the lock back."""
    descriptor = os.open(directory, os.O_RDONLY) if fcntl is not None else None
    try:
        distributed.together(lambda: _lock(directory, descriptor))
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(directory: Path, descriptor: int | None) -> None:
    if fcntl is None or descriptor is None or distributed.rank() > 0:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"resume={str(directory)!r} is in use by another process. Wait for its end, or choose another directory."
        ) from error
    except OSError:  # a file system without locks
        log.warning("%s cannot be locked: see that no other process uses it.", directory)


def _of(directory: Path, identity: Mapping[str, Any]) -> Journal:
    finished = 0
    while (path := _path(directory, STEP, finished + 1)).exists():
        with sumfiles.reading(path, STEP, tensors=False) as (header, _):
            _check_identity(directory, header["identity"], identity)
        finished += 1
    if distributed.same(finished) != finished:
        raise CheckpointError(
            f"resume={str(directory)!r} holds {finished} steps for rank {distributed.rank()}, and another number for "
            "rank 0: the directory must be on a file system that all ranks see."
        )
    return Journal(directory, identity, finished)


def _path(directory: Path, kind: str, number: int) -> Path:
    return directory / f"{kind}-{number:04}.safetensors"


def _sum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {"sha256": digest(tensors)}


def _check_sum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if header["sha256"] != digest(tensors):
        raise ValueError("its tensors do not match their own SHA-256")


def _identity(settings: object, model: nn.Module, images: Calibration) -> dict[str, Any]:
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _UNIMPORTANT}  # type: ignore[arg-type]
    parts = {part: _of_batches(getattr(images, part)) for part in ("score", "gate", "heldout")}
    packages = ("jbrprune", "torch", "timm", "torch-pruning")
    return {
        "settings": {name: described(value) for name, value in chosen.items()},
        "model": digest(model.state_dict()),
        "images": hashlib.sha256(repr(parts).encode()).hexdigest(),
        "versions": {package: version(package) for package in packages},
    }


def _of_batches(batches: list[Batch]) -> list[str]:
    return [digest({name: value for name, value in vars(batch).items() if value is not None}) for batch in batches]


def _check_identity(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found == wanted:
        return
    before, now = (_flat(identity) for identity in (found, wanted))
    name = next(name for name in before | now if before.get(name) != now.get(name))
    advice = "Pass what the run was begun with, or another directory for a new run."
    if name in ("model", "images"):
        raise CheckpointError(f"resume={str(directory)!r} belongs to a run with other {_WORDS[name]}. {advice}")
    raise CheckpointError(
        f"resume={str(directory)!r} belongs to another run: {name} was {before.get(name)!r} there and is "
        f"{now.get(name)!r} now. {advice}"
    )


_WORDS = {"model": "weights of the model", "images": "images (or labels, or logits of the dense model on them)"}


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    nested = {part: values for part, values in identity.items() if isinstance(values, Mapping)}
    flat = {part: value for part, value in identity.items() if part not in nested}
    return {f"{part}.{name}": value for part, values in nested.items() for name, value in values.items()} | flat
