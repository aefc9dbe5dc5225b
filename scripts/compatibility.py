"""Which timm models can be pruned: the smallest model of every module of timm, from `info` to an exported file.

    python scripts/compatibility.py --out results/compatibility.jsonl --table docs/compatibility.md

One line per module; modules that have a line are not run again. Every model runs in a process of its own with a limit
of time and memory, so that nothing it does stops the others. torch-pruning's example recipe runs on the same list.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import families
import timm
import torch
from common import append, commit, lines
from families import Stage

PACKAGES = ("torch", "timm", "torch-pruning")
PATIENCE = 20
"""Wall time in units of the processor time that a process may take: others may be using the machine."""
WORKS = ("budget", "deepest")
"""Statuses of a model that was pruned, and passed every check."""


def main() -> None:
    """Run what has no line yet; write the table."""
    arguments = _arguments()
    warnings.simplefilter("ignore")  # of foreign models
    torch.set_num_threads(1)  # before the first process is forked
    for module in [] if arguments.table_only else _waiting(arguments):
        line = _line(module, arguments)
        append(arguments.out, [line])
        print(f"{module}: {line['status']} ({line['seconds']:.0f} s) {line['reason'][:150]}", flush=True)
    if arguments.table:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(table(latest(lines(arguments.out))))


def latest(records: list[dict]) -> list[dict]:
    """The last line of every module, by name."""
    return sorted({record["module"]: record for record in records}.values(), key=lambda record: record["module"])


def table(records: list[dict]) -> str:
    """The page made from the lines."""
    ours, theirs = (Counter(record[key] for record in records) for key in ("status", "recipe_status"))
    works = sum(ours[status] for status in WORKS)
    dates = sorted({record["date"] for record in records})
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    rows = [_HEAD, *(_row(record) for record in records)]
    return _PAGE.format(
        modules=len(records),
        works=works,
        share=works / max(1, len(records)),
        counts=_counted(ours),
        recipe_works=theirs["works"],
        recipe_counts=_counted(theirs),
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "never",
        versions="; ".join(versions),
        rows="\n".join(rows),
    )


_HEAD = """| timm module | model | px | jbrprune | left | why no deeper, or what happened | torch-pruning | left |
|---|---|--:|---|--:|---|---|--:|"""

_PAGE = """# Which timm models can be pruned

Measured, not claimed: made by `python scripts/compatibility.py --out results/compatibility.jsonl --table
docs/compatibility.md`, {dates}, with {versions}.

The smallest model of every module of timm (`timm.list_modules()`: {modules}), random weights with perturbed norms and
scales, ten classes, the smallest input from 64 px on that it accepts. For each: `info`, `score`, `prune` to 0.7 of the
MACs (or, where that cannot be reached, to the deepest share that can; one channel of every group may be all that is
left), forward, comparison with the masked dense model in float64, backward, save, load, bit-equal, `torch.export`, and
once more with the default steps and repairs of `prune`.

* **jbrprune: {works} of {modules} ({share:.1%}) pruned and passed every check**: {counts}. *budget*: 0.7 of the MACs;
  *deepest*: as far as it goes, with the reason; *refused*: an error with the reason before anything was scored.
* **torch-pruning's example recipe** (`MagnitudeImportance`, ratio 0.3 everywhere, the classifier ignored, heads counted
  as its examples do and `num_heads`, `head_dim`, `attn_dim` set afterwards): {recipe_works} of {modules} run forward
  and backward afterwards and keep the order of their norms' weights: {recipe_counts}. *unchanged*: no MAC less than
  before; *wrong*: it runs, but the weights of a norm are not those of the channels that stayed.

Every model runs within limits of processor time and memory (`--seconds`, `--memory`; results/README.md says which);
what ran out of them fails.

{rows}
"""


def _row(record: dict) -> str:
    reached, left = record.get("reached"), record.get("recipe_reached")
    recipe = record["recipe_status"] + (f": {record['recipe_reason']}" if record["recipe_status"] == "fails" else "")
    cells = [
        f"`{record['module']}`",
        f"`{record['model']}`",
        str(record.get("pixels") or ""),
        record["status"],
        "" if reached is None else f"{reached:.2f}",
        _plain(record["reason"], 240),
        _plain(recipe, 110),
        "" if left is None else f"{left:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _plain(text: str, length: int) -> str:
    text = " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _counted(counts: Counter) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.most_common())


def _waiting(arguments: argparse.Namespace) -> list[str]:
    """The modules to run."""
    known = timm.list_modules()
    unknown = sorted(set(arguments.modules) - set(known))
    if unknown:
        raise SystemExit(f"timm has no module {', '.join(unknown)}; see timm.list_modules().")
    done = {r["module"] for r in latest(lines(arguments.out)) if r["status"] not in arguments.again}
    return [module for module in arguments.modules or known if module not in done]


def _line(module: str, arguments: argparse.Namespace) -> dict:
    """Run one module, ours and the recipe, and say what happened."""
    began = time.perf_counter()
    known = {r["module"]: r["model"] for r in lines(arguments.out) if r["versions"]["timm"] == version("timm")}
    found = {"model": known[module]} if known.get(module) else _outcome(lambda stage: _smallest(module), arguments)
    model = found.get("model", "")
    ours = _outcome(lambda stage: families.pruned(model, stage), arguments) if model else found
    recipe = _outcome(lambda stage: families.recipe(model, stage), arguments, died="fails") if model else found
    return {
        "module": module,
        "model": model,
        **ours,
        **{f"recipe_{key}": value for key, value in recipe.items()},
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _smallest(module: str) -> dict:
    return {"model": families.smallest(module)}


def _outcome(task: Callable[[Stage], dict], arguments: argparse.Namespace, *, died: str = "failed") -> dict:
    """What a process of its own says; where it died or was stopped, how far it came."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.jsonl"
        child = multiprocessing.get_context("fork").Process(target=_child, args=(task, said, arguments))
        child.start()
        child.join(PATIENCE * arguments.seconds)
        if child.is_alive():
            child.kill()
            child.join()
        records = lines(said)
    if records and records[-1].keys() != {"stage"}:
        return records[-1]
    stage = records[-1]["stage"] if records else "start"
    limits = f"limits: {arguments.seconds} s of processor time, {arguments.memory} GiB"
    return {"status": died, "stage": stage, "reason": f"ended with code {child.exitcode} in {stage}; {limits}"}


def _child(task: Callable[[Stage], dict], said: Path, arguments: argparse.Namespace) -> None:
    """One JSON line for every stage, then one for the outcome."""
    memory, seconds = int(arguments.memory * 2**30), int(arguments.seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    torch.set_num_threads(1)
    append(said, [task(lambda stage: append(said, [{"stage": stage}]))])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/compatibility.jsonl"))
    parser.add_argument("--table", type=Path, help="write this page from the lines")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--modules", nargs="*", default=[], help="modules of timm; default: all")
    parser.add_argument("--again", nargs="*", default=[], help="statuses whose modules are run again")
    parser.add_argument("--seconds", type=float, default=300, help="processor time of each process")
    parser.add_argument("--memory", type=float, default=4, help="limit of each process in GiB")
    return parser.parse_args()


if __name__ == "__main__":
    main()
