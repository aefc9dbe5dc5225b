"""Mutated checkpoints: each is refused with a `CheckpointError`, or loads to the tensors and sizes in its files.

    python scripts/fuzz_checkpoints.py --trials 1000 --out results/fuzz.jsonl

One line per kind of damage (`mutations.py`): tried, refused, loaded right, wrong, and the slowest load. Trials run in a
child process with little memory and time, which watches for programs that are started, connections, unpickling and
files opened for writing. ``unaccounted`` are errors of this script itself.
"""

from __future__ import annotations

import argparse
import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import torch
from common import append, commit
from safetensors.torch import load as load_bytes

import jbrprune
from jbrprune.checkpoint.checkpoint import DESCRIPTION, WEIGHTS, load, save
from jbrprune.errors import CheckpointError
from jbrprune.evaluation.portions import is_out_of_memory

MEMORY, SECONDS = 1 << 30, 60
SMALL_SWIN: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4]}
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class")
FORBIDDEN_DONE = 99
OUTCOMES = ("refused", "right", "wrong", "unaccounted")


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


def made(folder: Path) -> list[Path]:
    """Real ones: a ViT, a ResNet and a Swin (tables of positions) with channels removed; a ViT with masked weights."""
    torch.manual_seed(0)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quick: dict[str, Any] = {"repair": None, "progress": False}
    found = []
    sized = {"img_size": 32}
    for name, made_with, call, budget in (
        ("test_vit", sized, jbrprune.prune, {"macs": 0.8, "steps": 1}),
        ("test_resnet", {}, jbrprune.prune, {"macs": 0.8, "steps": 1}),
        ("test_vit", sized, jbrprune.sparsify, {"sparsity": 0.7, "permanent": False}),
        ("swin_tiny_patch4_window7_224", sized | SMALL_SWIN, jbrprune.prune, {"macs": 0.9, "steps": 1}),
    ):
        result = call(jbrprune.create(name, pretrained=False, **made_with), images, **quick, **budget)
        path = folder / f"base-{len(found)}"
        save(path, result.model, recipe=result.recipe, config=result.config)
        found.append(path)
    return found


def tried(base: Path, folder: Path, trial: Trial) -> Outcome:
    """Damage a copy, load it, and judge."""
    directory = folder / "m"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    mutations.mutate(base, directory, trial.kind, random.Random(trial.seed))
    began = time.perf_counter()
    try:
        model = load(directory)
    except CheckpointError as error:
        seconds = time.perf_counter() - began
        if is_out_of_memory(error.__cause__ or error):  # with more memory it would have been taken
            return Outcome("wrong", f"asked for too much memory: {error}"[:900], seconds)
        if len(str(error)) > 20:
            return Outcome("refused", seconds=seconds)
        return Outcome("wrong", f"says only {error}", seconds)
    except BaseException:
        return Outcome("wrong", traceback.format_exc()[-900:], time.perf_counter() - began)
    seconds = time.perf_counter() - began
    why = difference(model, directory)
    return Outcome("wrong" if why else "right", why, seconds)


def difference(model: torch.nn.Module, directory: Path) -> str:
    """Which tensor or size is not the one in the files, decoded here by other means; nothing if all are."""
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
            return f"{name} has another form than in the file"
        if _bytes(found) != _bytes(values):
            return f"{name} has other values than in the file"
    modules = dict(model.named_modules())
    for name, sizes in body["attributes"].items():
        for attribute, size in sizes.items():
            found = getattr(modules[name], attribute)
            if found != (tuple(size) if isinstance(size, list) else size):
                return f"{name}.{attribute} is {found}, but {size} in the file"
    return ""


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def guarded(base: Path, folder: Path, trials: list[Trial]) -> list[Outcome]:
    """The trials in a child process; one that ends it is wrong, and the next one starts another."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(trials):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; there are none that work
            child = os.fork()
        if child == 0:
            os.close(reader)
            _child(base, folder, trials[len(outcomes) :], writer)
        os.close(writer)
        with os.fdopen(reader) as file:
            outcomes += [Outcome(**json.loads(line)) for line in file]
        status = os.waitpid(child, 0)[1]
        if len(outcomes) < len(trials):
            outcomes.append(Outcome("wrong", _ended(status)))
    return outcomes


def _child(base: Path, folder: Path, trials: list[Trial], writer: int) -> None:
    """Write an outcome per line; never returns."""
    try:
        _watch(folder)
        for trial in trials:
            signal.alarm(SECONDS)
            try:
                outcome = tried(base, folder, trial)
            except BaseException:
                outcome = Outcome("unaccounted", traceback.format_exc()[-900:])
            os.write(writer, (json.dumps(vars(outcome)) + "\n").encode())
    finally:
        os._exit(0)


def _ended(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"took longer than {SECONDS} s"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == FORBIDDEN_DONE:
        return f"did one of {', '.join(FORBIDDEN)}, or opened a file for writing"
    return f"the process ended with status {status}"


def _watch(folder: Path) -> None:
    """Little memory; nothing may be started, fetched, unpickled, or written outside of the folder."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        outside = writes and not str(arguments[0]).startswith(str(folder))
        if outside or event in FORBIDDEN:
            os._exit(FORBIDDEN_DONE)

    sys.addaudithook(hook)


def planned(trials: int, bases: int, seed: int) -> list[Trial]:
    """Every kind of damage to every model in turn."""
    kinds = mutations.ALL
    return [Trial(number % bases, kinds[number % len(kinds)], seed + number) for number in range(trials)]


def run(trials: int, seed: int, folder: Path) -> list[tuple[Trial, Outcome]]:
    """Every trial with its outcome."""
    bases = made(folder)
    found = []
    for number, base in enumerate(bases):
        mine = [trial for trial in planned(trials, len(bases), seed) if trial.base == number]
        load(base)  # what is imported lazily is imported
        found += zip(mine, guarded(base, folder, mine), strict=True)
    return found


def counted(kind: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """A line of the results."""
    counts = {what: sum(outcome.what == what for outcome in outcomes) for what in OUTCOMES}
    slowest = max(outcome.seconds for outcome in outcomes)
    return {"kind": kind, "tried": len(outcomes), **counts, "slowest_seconds": round(slowest, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.trials, options.seed, Path(folder))
    for trial, outcome in found:
        if outcome.why:
            print(f"{trial}: {outcome.what}: {outcome.why}", file=sys.stderr)
    kinds = dict.fromkeys(trial.kind for trial, _ in found)
    lines = [counted(kind, [outcome for trial, outcome in found if trial.kind == kind]) for kind in kinds]
    whole = counted("all", [outcome for _, outcome in found])
    lines.append(whole | {"seed": options.seed, "commit": commit(), "torch": torch.__version__})
    for line in lines:
        print(json.dumps(line))
    if options.out:
        append(options.out, lines)
    sys.exit(1 if whole["wrong"] + whole["unaccounted"] else 0)


if __name__ == "__main__":
    main()
