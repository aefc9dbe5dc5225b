"""Mutated checkpoints: each is refused with a `CheckpointError`, or loads to the tensors and sizes in its files.

    python scripts/fuzz_checkpoints.py --trials 1000 --out results/fuzz.jsonl

One line per kind of damage (in the bytes, in the description, in the tensors, on the disk): tried, refused, loaded
right, wrong, and the slowest load. Trials run in a child process with little memory and time, which watches for
programs that are started, connections, unpickling and files opened for writing. ``unaccounted`` are errors of this
script itself.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import append, commit, lines, make_parser
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

import jbrprune
from jbrprune.checkpoint.checkpoint import DESCRIPTION, WEIGHTS, load, save
from jbrprune.checkpoint.description import checksum
from jbrprune.errors import CheckpointError

MEMORY, SECONDS = 1 << 30, 60
SMALL_SWIN: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4]}
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class")
FORBIDDEN_DONE = 99
OUTCOMES = ("refused", "right", "wrong", "unaccounted")

# --- damage ----------------------------------------------------------------------------------------

WILD: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**20, 2**31, 2**40, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x" * 5000),
    *([], {}, [[]], [2**40, 2**40], {"": ""}, "\ud7ff", "__class__", "resnet18", "hf-hub:a/b", "local-dir:/tmp"),
    *("../../etc/passwd", [[[[[[[[[[1]]]]]]]]]]),
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
    *("resnet18", "vit_giant_patch14_224", "eva_giant_patch14_560", "hf-hub:a/b", "local-dir:/tmp", "/etc/passwd"),
    *("", "x"),
]


class Case:
    """A checkpoint in memory, to be changed.

    Attributes:
        data: The file of the weights.
        body: The description.
        text: What stands in the place of the description; None: the description.
        source: Chooses the damage.
    """

    def __init__(self, directory: Path, source: random.Random) -> None:
        self.data = (directory / WEIGHTS).read_bytes()
        self.body: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
        self.source = source
        self.text: bytes | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is in the file, always in the same order."""
        return dict(sorted(load_bytes(self.data).items()))

    def sum_anew(self, weights: bool = True) -> None:
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

    def half(self) -> bool:
        """True in half of the cases."""
        return self.source.random() < 0.5


def _flip_bit(data: bytes, source: random.Random, first: int = 0) -> bytes:
    at = source.randrange(first, len(data))
    return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]


def flip(case: Case) -> None:
    if case.half():
        case.data = _flip_bit(case.data, case.source)
    else:
        case.text = _flip_bit(json.dumps(case.body).encode(), case.source)


def flip_summed(case: Case) -> None:
    header = int.from_bytes(case.data[:8], "little") + 8
    if case.half():
        case.data = _flip_bit(case.data[:header], case.source) + case.data[header:]
    else:
        case.data = _flip_bit(case.data, case.source, header)
    case.sum_anew()


def truncate(case: Case) -> None:
    if case.half():
        case.data = case.data[: case.source.randrange(len(case.data))]
        if case.half():
            case.sum_anew()
    else:
        text = json.dumps(case.body).encode()
        case.text = text[: case.source.randrange(len(text))]


def _places(value: Any) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *_places(item))]


def wild_json(case: Case) -> None:
    for _ in range(case.source.randrange(1, 4)):
        holder, key = case.some(_places(case.body))
        holder[key] = case.some(WILD)
    case.sum_anew(weights=False)


def huge_shapes(case: Case) -> None:
    info = case.some(case.body["tensors"].values())
    info["shape"] = [case.some([2**20, 2**31, 2**40, 2**62, 10**30]) for _ in range(case.source.randrange(1, 9))]
    if "values" in info and case.half():
        info["values"] = case.some([0, 2**40, 10**18])
    case.sum_anew()


def recipes(case: Case) -> None:
    recipe = case.body["recipe"]
    if case.source.random() < 0.3:
        recipe["name"] = case.some(NAMES)
    for _ in range(case.source.randrange(0, 3)):
        name = case.some(ARGUMENTS)
        recipe["arguments"][name] = case.some(ARGUMENTS[name])
    case.sum_anew()


def attributes(case: Case) -> None:
    module = case.some([name for name, values in case.body["attributes"].items() if values])
    values = case.body["attributes"][module]
    values[case.some([*values, "forward", "__class__", "training", "weight"])] = case.some([*WILD, 2, 7])
    case.sum_anew()


def tensors(case: Case) -> None:
    """Extra, missing, renamed, of another dtype, reshaped, of other values; sometimes described so."""
    found, listed = case.tensors(), case.body["tensors"]
    name, how = case.some(found), case.source.randrange(6)
    tensor, info = found.pop(name), listed.get(name, {})
    if how == 0:
        found |= {name: tensor, case.some(["extra", "../x", "a.b.c", f"{name}.bitmap"]): torch.zeros(3)}
    elif how == 1 and case.half():
        listed.pop(name, None)
    elif how == 2:
        found[f"{name}_"] = tensor
        if name in listed and case.half():
            listed[f"{name}_"] = listed.pop(name)
    elif how == 3:
        found[name] = tensor.to(case.some([torch.float64, torch.float16, torch.int8, torch.bool]))
        if case.half():
            info["dtype"] = str(found[name].dtype).removeprefix("torch.")
    elif how == 4:
        found[name] = torch.cat([tensor.flatten(), torch.zeros(1).to(tensor)])
    elif how == 5:
        found[name] = tensor.clone()
        found[name].view(-1)[:1] = float("nan") if tensor.is_floating_point() else 1  # some hold nothing
    case.data = save_bytes(found)
    case.sum_anew()


def aliases(case: Case) -> None:
    names = list(case.body["tensors"])
    case.body["aliases"][case.some([*names, "x", "", "head.weight"])] = case.some([*names, "x", None, 3])
    if case.half():
        case.body["tensors"].pop(case.some(names))
    case.sum_anew()


def examples(case: Case) -> None:
    """Images that are huge, or of no size, and outputs that are others."""
    sizes = [[3, 1024, 1365], [1, 2**11, 2**11], [2**20, 2, 2], [3, 2**40, 2**40], [0, 8, 8], [3, -8, 8], [3], [], None]
    outputs = case.body["example"]["outputs"]
    wild = [[], outputs[:-1], [*outputs, 0.0], [0.0] * len(outputs), [1e308] * len(outputs), [1] * len(outputs), ["x"]]
    if case.half():
        case.body["example"]["size"] = case.some(sizes)
    else:
        case.body["example"]["outputs"] = case.some(wild)
    if case.source.random() < 0.2:
        case.body |= {"example": None, "no_recipe": case.some([None, "x", 3])}
    case.sum_anew()


def nothing(case: Case) -> None:
    """Only the spaces: loads right."""
    case.text = json.dumps(case.body, indent=case.source.randrange(4)).encode()


def _on_disk(directory: Path, source: random.Random) -> None:
    """Links, directories, pipes and pickles where a file should be."""
    path, outside = directory / source.choice([WEIGHTS, DESCRIPTION]), directory.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    how = source.randrange(6)
    if how == 3:
        path.mkdir()
    elif how == 4:
        os.mkfifo(path)
    elif how == 5:
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/fuzzed'\ntR.")
    else:
        path.symlink_to(("/etc/passwd", outside, path.name)[how])


KINDS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        *(
            flip,
            flip_summed,
            truncate,
            wild_json,
            huge_shapes,
            recipes,
            attributes,
            tensors,
            aliases,
            examples,
            nothing,
        ),
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


# --- trials ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: one of `OUTCOMES`, why (of the last two), and how long it took."""

    what: str
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A kind of damage to one of the models, and the seed that it is drawn with."""

    base: int
    kind: str
    seed: int


def make_bases(folder: Path) -> list[Path]:
    """Real ones: a ViT, a ResNet and a Swin (tables of positions) with channels removed; a ViT with masked weights."""
    torch.manual_seed(0)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quick: dict[str, Any] = {"repair": None, "progress": False}
    small, found = {"img_size": 32}, []
    for name, arguments, call, budget in (
        ("test_vit", small, jbrprune.prune, {"macs": 0.8, "steps": 1}),
        ("test_resnet", {}, jbrprune.prune, {"macs": 0.8, "steps": 1}),
        ("test_vit", small, jbrprune.sparsify, {"sparsity": 0.7, "permanent": False}),
        ("swin_tiny_patch4_window7_224", small | SMALL_SWIN, jbrprune.prune, {"macs": 0.9, "steps": 1}),
    ):
        result = call(jbrprune.create(name, pretrained=False, **arguments), images, **quick, **budget)
        found.append(folder / f"base-{len(found)}")
        save(result.model, found[-1], size=result.size)
    return found


def try_once(base: Path, folder: Path, trial: Trial) -> Outcome:
    """Damage a copy, load it, and judge."""
    directory = folder / "m"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    mutate(base, directory, trial.kind, random.Random(trial.seed))
    began = time.perf_counter()
    try:
        model = load(directory)
    except CheckpointError as error:
        seconds = time.perf_counter() - began
        cause = error.__cause__ or error
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return Outcome("wrong", f"asked for too much memory: {error}"[:900], seconds)  # more would have been taken
        if len(str(error)) > 20:
            return Outcome("refused", seconds=seconds)
        return Outcome("wrong", f"says only {error}", seconds)
    except BaseException:
        return Outcome("wrong", traceback.format_exc()[-900:], time.perf_counter() - began)
    seconds = time.perf_counter() - began
    why = find_difference(model, directory)
    return Outcome("wrong" if why else "right", why, seconds)


def find_difference(model: torch.nn.Module, directory: Path) -> str:
    """Which tensor or size is not the one in the files, decoded here by other means; nothing if all are."""
    stored = load_bytes((directory / WEIGHTS).read_bytes())
    body = json.loads((directory / DESCRIPTION).read_text())
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, origin in ({n: n for n in body["tensors"]} | body["aliases"]).items():
        info, values = body["tensors"][origin], stored[origin]
        if info.get("values") is not None:
            bits = [stored[f"{origin}.bitmap"].to(torch.int64) >> b & 1 for b in range(8)]
            by_bit = torch.stack(bits, 1).flatten()[: int(torch.tensor(info["shape"]).prod())].bool()
            whole = torch.zeros(len(by_bit), dtype=values.dtype)
            whole[by_bit] = values
            values = whole.view(info["shape"])
        found = state.get(f"{name}_orig", state.get(name))
        if found is None or found.shape != values.shape or found.dtype != values.dtype:
            return f"{name} has another form than in the file"
        one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, values))
        if not torch.equal(one, other):  # bit by bit: NaN as well
            return f"{name} has other values than in the file"
    modules = dict(model.named_modules())
    for name, sizes in body["attributes"].items():
        for attribute, size in sizes.items():
            found = getattr(modules[name], attribute)
            if found != (tuple(size) if isinstance(size, list) else size):
                return f"{name}.{attribute} is {found}, but {size} in the file"
    return ""


def try_guarded(base: Path, folder: Path, trials: list[Trial]) -> list[Outcome]:
    """The trials in a child process; one that ends it is wrong, and the next one starts another."""
    said = folder / "said.jsonl"
    said.unlink(missing_ok=True)
    reasons = {
        -signal.SIGALRM: f"took longer than {SECONDS} s",
        FORBIDDEN_DONE: f"did one of {', '.join(FORBIDDEN)}, or opened a file for writing",
    }
    while (done := len(lines(said))) < len(trials):
        child = multiprocessing.get_context("fork").Process(target=_try_all, args=(base, folder, trials[done:], said))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; there are none that work
            child.start()
        child.join()
        if len(lines(said)) < len(trials):
            why = reasons.get(child.exitcode, f"the process ended with code {child.exitcode}")
            append(said, [vars(Outcome("wrong", why))])
    return [Outcome(**line) for line in lines(said)]


def _try_all(base: Path, folder: Path, trials: list[Trial], said: Path) -> None:
    """Write an outcome per line, in a process with little memory that ends when something forbidden happens."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or (writes and not str(arguments[0]).startswith(str(folder))):
            os._exit(FORBIDDEN_DONE)

    sys.addaudithook(hook)
    for trial in trials:
        signal.alarm(SECONDS)
        try:
            outcome = try_once(base, folder, trial)
        except BaseException:
            outcome = Outcome("unaccounted", traceback.format_exc()[-900:])
        append(said, [vars(outcome)])
    os._exit(0)


def run(trials: int, seed: int, folder: Path) -> list[tuple[Trial, Outcome]]:
    """Every kind of damage to every model in turn, with its outcome."""
    bases = make_bases(folder)
    planned = [Trial(number % len(bases), ALL[number % len(ALL)], seed + number) for number in range(trials)]
    found = []
    for number, base in enumerate(bases):
        mine = [trial for trial in planned if trial.base == number]
        load(base)  # what is imported lazily is imported
        found += zip(mine, try_guarded(base, folder, mine), strict=True)
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file of JSON lines, added to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.trials, args.seed, Path(folder))
    for trial, outcome in found:
        if outcome.why:
            print(f"{trial}: {outcome.what}: {outcome.why}", file=sys.stderr)
    made = []
    for kind in (*ALL, "all"):
        own = [outcome for trial, outcome in found if kind in (trial.kind, "all")]
        counts = {what: sum(outcome.what == what for outcome in own) for what in OUTCOMES}
        slowest = round(max((outcome.seconds for outcome in own), default=0.0), 2)
        made.append({"kind": kind, "tried": len(own), **counts, "slowest_seconds": slowest})
    made[-1] |= {"seed": args.seed, "commit": commit(), "torch": torch.__version__}
    for line in made:
        print(json.dumps(line))
    if args.out:
        append(args.out, made)
    sys.exit(1 if made[-1]["wrong"] + made[-1]["unaccounted"] else 0)


if __name__ == "__main__":
    main()
