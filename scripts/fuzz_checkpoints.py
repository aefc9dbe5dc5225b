"""Mutated checkpoints: each is refused with a `CheckpointError`, or loads to the tensors that are in its files.

    python scripts/fuzz_checkpoints.py --trials 1000 --out results/fuzz.jsonl

One line per kind of damage: tried, refused, loaded right, wrong. A trial runs in a child process with little memory and
time, which watches for programs that are started, connections, unpickling and files opened for writing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import append, commit
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

import jbrprune
from jbrprune.checkpoint import DESCRIPTION, WEIGHTS, load, save
from jbrprune.description import checksum
from jbrprune.errors import CheckpointError

MEMORY, SECONDS = 1 << 30, 60
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class")
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
        """What is in the file."""
        return load_bytes(self.data)

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
        found[name] = found[name].clone().flatten()
        found[name][0] = float("nan") if found[name].is_floating_point() else 1
        found[name] = found[name].view(case.tensors()[name].shape)
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


def _link(directory: Path, source: random.Random) -> None:
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


def made(folder: Path) -> list[Path]:
    """Three real ones: a ViT and a ResNet with channels removed, and a ViT with masked weights."""
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quick: dict[str, Any] = {"repair": None, "measure_latency": False, "progress": False, "pretrained": False}
    found = []
    for name, arguments in (
        ("test_vit", {"macs": 0.8, "steps": 1, "img_size": 32}),
        ("test_resnet", {"macs": 0.8, "steps": 1}),
        ("test_vit", {"sparsity": 0.7, "permanent": False, "img_size": 32}),
    ):
        result = jbrprune.prune(name, images, **quick, **arguments)
        path = folder / f"base-{len(found)}"
        save(path, result.model, recipe=result.recipe, config=result.config)
        found.append(path)
    return found


def trial(base: Path, folder: Path, kind: str, seed: int) -> str:
    """``refused``, ``right``, or what is wrong."""
    source = random.Random(seed)
    directory = folder / "m"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    case = Case(base, source)
    if kind == "paths":
        case.write(directory)
        _link(directory, source)
    else:
        KINDS[kind](case)
        case.write(directory)
    try:
        model = load(directory)
    except CheckpointError as error:
        return "refused" if len(str(error)) > 20 else f"wrong: says only {error}"
    except BaseException as error:
        return f"wrong: {type(error).__name__}: {error}\n{traceback.format_exc()[-600:]}"
    return judged(model, directory)


def judged(model: torch.nn.Module, directory: Path) -> str:
    """Whether every tensor is the one in the file, decoded here by other means."""
    stored = load_bytes((directory / WEIGHTS).read_bytes())
    body = json.loads((directory / DESCRIPTION).read_text())
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, origin in ({n: n for n in body["tensors"]} | body["aliases"]).items():
        info = body["tensors"][origin]
        values = stored[origin]
        if info.get("values") is not None:
            bits = [stored[f"{origin}.bitmap"].to(torch.int64) >> b & 1 for b in range(8)]
            by_bit = torch.stack(bits, 1).flatten()[: int(torch.tensor(info["shape"]).prod())].bool()
            whole = torch.zeros(len(by_bit), dtype=values.dtype)
            whole[by_bit] = values
            values = whole.view(info["shape"])
        found = state.get(f"{name}_orig", state.get(name))
        if found is None or found.shape != values.shape or found.dtype != values.dtype:
            return f"wrong: {name} has another form than in the file"
        if _bytes(found) != _bytes(values):
            return f"wrong: {name} has other values than in the file"
    return "right"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def guarded(base: Path, folder: Path, trials: list[tuple[str, int]]) -> list[str]:
    """The trials in a child process; one that ends it is wrong, and the next one starts another."""
    outcomes: list[str] = []
    while len(outcomes) < len(trials):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 98
            try:
                os.close(reader)
                _watch(folder)
                for kind, seed in trials[len(outcomes) :]:
                    signal.alarm(SECONDS)
                    os.write(writer, (json.dumps(trial(base, folder, kind, seed)) + "\n").encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as file:
            outcomes += [json.loads(line) for line in file]
        status = os.waitpid(child, 0)[1]
        if len(outcomes) < len(trials):
            outcomes.append(f"wrong: the process ended with status {status}")
    return outcomes


def _watch(folder: Path) -> None:
    """Little memory; nothing may be started, fetched, unpickled, or written outside of the folder."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        outside = writes and not str(arguments[0]).startswith(str(folder))
        if outside or event in FORBIDDEN:
            os._exit(99)

    sys.addaudithook(hook)


def run(trials: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Kind -> how many were tried, refused, loaded right, wrong; says what is wrong."""
    bases = made(folder)
    plan = [
        (number % len(bases), [*KINDS, "paths"][number % (len(KINDS) + 1)], seed + number) for number in range(trials)
    ]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for number, base in enumerate(bases):
        mine = [(kind, own) for at, kind, own in plan if at == number]
        load(base)  # what is imported lazily is imported
        for (kind, own), outcome in zip(mine, guarded(base, folder, mine), strict=True):
            counts[kind][outcome.partition(":")[0]] += 1
            if outcome.startswith("wrong"):
                print(f"{kind} {own} of base {number}: {outcome}", file=sys.stderr)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(options.trials, options.seed, Path(folder))
    lines = [
        {"kind": kind, "tried": sum(c.values()), **{name: c[name] for name in ("refused", "right", "wrong")}}
        for kind, c in counts.items()
    ]
    total = {name: sum(line[name] for line in lines) for name in ("tried", "refused", "right", "wrong")}
    lines.append({"kind": "all", **total, "seed": options.seed, "commit": commit(), "torch": torch.__version__})
    for line in lines:
        print(json.dumps(line))
    if options.out:
        append(options.out, lines)
    sys.exit(1 if total["wrong"] else 0)


if __name__ == "__main__":
    main()
