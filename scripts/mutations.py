"""Ways to damage a saved model: in the bytes, in the description, in the tensors, on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from jbrprune.checkpoint.checkpoint import DESCRIPTION, WEIGHTS
from jbrprune.checkpoint.description import checksum

WILD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        3,
        2**20,
        2**31,
        2**40,
        2**63,
        10**400,
        0.5,
        -0.0,
        1e308,
        "",
        "x" * 5000,
        "../../etc/passwd",
    ),
    *([], {}, [[]], [2**40, 2**40], {"": ""}, "\ud7ff", "__class__", "resnet18", "hf-hub:a/b", "local-dir:/tmp"),
    [[[[[[[[[[1]]]]]]]]]],
]
ARGUMENTS: dict[str, list[Any]] = {
    "embed_dim": [2**20, 10**6, 0, -4, 12],
    "depth": [10**6, 2**20, 10**4, 0, -1],
    "img_size": [2**20, [2**15, 2**15], 0, [32], 64],
    "patch_size": [1, 0, -1, 10**6],
    "window_size": [64, 512, 2**12, 2**20, 0],
    "num_classes": [2**20, -5, 0],
    "mlp_ratio": [1e6, -1, 0],
    "num_heads": [0, 2**20, 7],
    "in_chans": [2**20, 0],
    "pretrained": [True],
    "checkpoint_path": ["/etc/passwd"],
    "pretrained_cfg": [{"file": "/etc/passwd"}],
    "pretrained_cfg_overlay": [{"file": "/etc/passwd"}, {"url": "http://localhost/x"}, {"custom_load": True}],
    "norm_layer": ["os.system"],
    "drop_path_rate": [1e9, "x"],
    "cache_dir": ["/tmp"],
    "scriptable": [True],
    "features_only": [True],
}
NAMES = [
    "resnet18",
    "vit_giant_patch14_224",
    "eva_giant_patch14_560",
    "hf-hub:a/b",
    "local-dir:/tmp",
    "/etc/passwd",
    "",
    "x",
]


class Case:
    """A checkpoint in memory, to be changed."""

    def __init__(self, directory: Path, source: random.Random) -> None:
        self.data = (directory / WEIGHTS).read_bytes()
        self.body: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
        self.source = source
        self.text: bytes | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is in the file, always in the same order."""
        return dict(sorted(load_bytes(self.data).items()))

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Other tensors for the file."""
        self.data = save_bytes(tensors)

    def summed(self, weights: bool = True) -> None:
        """Compute both sums anew, as somebody would who knows how."""
        if weights:
            self.body["weights"] = {"bytes": len(self.data), "sha256": hashlib.sha256(self.data).hexdigest()}
        self.body.pop("sha256", None)
        try:
            self.body["sha256"] = checksum(self.body)
        except (TypeError, ValueError):
            self.body["sha256"] = "0" * 64

    def write(self, directory: Path) -> None:
        """Write both files."""
        (directory / WEIGHTS).write_bytes(self.data)
        text = json.dumps(self.body).encode("utf-8", "surrogatepass") if self.text is None else self.text
        (directory / DESCRIPTION).write_bytes(text)

    def some(self, items: Any) -> Any:
        """One of them."""
        return self.source.choice(list(items))


def flipped(data: bytes, source: random.Random, first: int = 0) -> bytes:
    at = source.randrange(first, len(data))
    return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]


def flip(case: Case) -> None:
    if case.source.random() < 0.5:
        case.data = flipped(case.data, case.source)
    else:
        case.text = flipped(json.dumps(case.body).encode(), case.source)


def flip_summed(case: Case) -> None:
    header = int.from_bytes(case.data[:8], "little") + 8
    if case.source.random() < 0.5:
        case.data = flipped(case.data[:header], case.source) + case.data[header:]
    else:
        case.data = flipped(case.data, case.source, header)
    case.summed()


def truncate(case: Case) -> None:
    if case.source.random() < 0.5:
        case.data = case.data[: case.source.randrange(len(case.data))]
        if case.source.random() < 0.5:
            case.summed()
    else:
        text = json.dumps(case.body).encode()
        case.text = text[: case.source.randrange(len(text))]


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *_places(item)]
    return found


def wild_json(case: Case) -> None:
    for _ in range(case.source.randrange(1, 4)):
        holder, key = case.some(_places(case.body))
        try:
            holder[key] = case.some(WILD)
        except (KeyError, IndexError):
            continue
    case.summed(weights=False)


def huge_shapes(case: Case) -> None:
    info = case.some(case.body["tensors"].values())
    info["shape"] = [
        case.source.choice([2**20, 2**31, 2**40, 2**62, 10**30]) for _ in range(case.source.randrange(1, 9))
    ]
    if "values" in info and case.source.random() < 0.5:
        info["values"] = case.source.choice([0, 2**40, 10**18])
    case.summed()


def recipes(case: Case) -> None:
    recipe = case.body["recipe"]
    if case.source.random() < 0.3:
        recipe["name"] = case.some(NAMES)
    for _ in range(case.source.randrange(0, 3)):
        name = case.some(ARGUMENTS)
        recipe["arguments"][name] = case.some(ARGUMENTS[name])
    case.summed()


def attributes(case: Case) -> None:
    module = case.some([name for name, values in case.body["attributes"].items() if values])
    values = case.body["attributes"][module]
    values[case.some([*values, "forward", "__class__", "training", "weight"])] = case.some([*WILD, 2, 7])
    case.summed()


def tensors(case: Case) -> None:
    """Extra, missing, renamed, reshaped, of another dtype; sometimes the description is changed as well."""
    found = case.tensors()
    name = case.some(found)
    how = case.source.randrange(6)
    if how == 0:
        found[case.some(["extra", "../x", "a.b.c", f"{name}.bitmap"])] = torch.zeros(3)
    elif how == 1:
        del found[name]
        if case.source.random() < 0.5:
            case.body["tensors"].pop(name, None)
    elif how == 2:
        found[f"{name}_"] = found.pop(name)
        if name in case.body["tensors"] and case.source.random() < 0.5:
            case.body["tensors"][f"{name}_"] = case.body["tensors"].pop(name)
    elif how == 3:
        found[name] = found[name].to(case.some([torch.float64, torch.float16, torch.int8, torch.bool]))
        if name in case.body["tensors"] and case.source.random() < 0.5:
            case.body["tensors"][name]["dtype"] = str(found[name].dtype).removeprefix("torch.")
    elif how == 4:
        found[name] = torch.cat([found[name].flatten(), torch.zeros(1).to(found[name])])
    else:
        found[name] = found[name].clone()
        found[name].view(-1)[:1] = float("nan") if found[name].is_floating_point() else 1  # some hold nothing
    case.put(found)
    case.summed()


def aliases(case: Case) -> None:
    names = list(case.body["tensors"])
    case.body["aliases"][case.some([*names, "x", "", "head.weight"])] = case.some([*names, "x", None, 3])
    if case.source.random() < 0.5:
        case.body["tensors"].pop(case.some(names))
    case.summed()


def nothing(case: Case) -> None:
    """Only the order and the spaces: loads right."""
    case.text = json.dumps(case.body, indent=case.source.randrange(4)).encode()


def _on_disk(directory: Path, source: random.Random) -> None:
    """Links, directories, pipes and pickles where a file should be."""
    path = directory / source.choice([WEIGHTS, DESCRIPTION])
    inside = path.read_bytes()
    path.unlink()
    how = source.randrange(6)
    if how == 0:
        path.symlink_to("/etc/passwd")
    elif how == 1:
        (directory.parent / "outside").write_bytes(inside)
        path.symlink_to(directory.parent / "outside")
    elif how == 2:
        path.mkdir()
    elif how == 3:
        os.mkfifo(path)
    elif how == 4:
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/fuzzed'\ntR.")


KINDS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        *(flip, flip_summed, truncate, wild_json, huge_shapes, recipes, attributes, tensors, aliases, nothing),
    )
}
ALL = (*KINDS, "paths")


def mutate(base: Path, directory: Path, kind: str, source: random.Random) -> None:
    """Write a damaged copy of a saved model.

    Args:
        base: The saved model.
        directory: Where to; exists and is empty.
        kind: One of `ALL`.
        source: Chooses the damage.
    """
    case = Case(base, source)
    if kind in KINDS:
        KINDS[kind](case)
    case.write(directory)
    if kind == "paths":
        _on_disk(directory, source)
