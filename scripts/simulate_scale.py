"""How jbrprune scales: memory, bytes and time by the number of ranks, from a model and a description of the hardware.

    python scripts/simulate_scale.py                                     # a ViT of 10 billion parameters
    python scripts/simulate_scale.py --model vit_large_patch16_224 --ranks 1 8 64 --format text
    python scripts/simulate_scale.py --measure --model test_vit --size 160   # against real ranks, on this machine

Operations, kept activations, bytes and calls are read off the model and the code (`workload`, `exchanges`); peak,
utilisation, latencies and bandwidths are assumptions and stand on the command line. Layouts and phases: `phases`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

import exchanges
import timm
import torch
from common import keywords
from network import Hardware, Message, total_sent
from phases import LAYOUTS, Job, Phase, Setting, memory, phases
from traffic import counting, on_ranks
from workload import Workload, workload

from jbrprune.budgets.cost import axis_widths
from jbrprune.criteria.relevance import Relevance
from jbrprune.data import distributed
from jbrprune.data.batches import Batch
from jbrprune.evaluation.agreement import compute_logits
from jbrprune.models.preserve import copy_model
from jbrprune.repair.repair import record_targets, repair_model
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import removed_channels
from jbrprune.structure.slicing import remove_units
from jbrprune.tpv import Isotropic, trace_form

RANKS = (1, 2, 8, 16, 64, 128, 512, 2048)
NOTHING = 1e-3
"""Seconds that nobody notices."""
WORTH = 1.5
"""Twice the ranks are worth it if they make a phase this much faster."""


# --- tables ---------------------------------------------------------------------------------------


def lines(setting: Setting) -> Iterator[dict[str, object]]:
    """What is known of every phase."""
    held = memory(setting)
    for phase in phases(setting):
        yield {
            "model": setting.work.name,
            "layout": setting.job.layout,
            "ranks": setting.ranks,
            "shards": setting.shards,
            "phase": phase.name,
            "calls": len(phase.messages) + len(phase.gathers),
            "sent": sent(setting, phase),
            "work": phase.work,
            "alone": phase.alone,
            "exchange": phase.exchange,
            "seconds": phase.seconds,
            "memory": held.get(phase.name),
        }


def sent(setting: Setting, phase: Phase) -> float:
    """Bytes that a rank sends."""
    return total_sent(phase.messages, setting.ranks) + total_sent(phase.gathers, setting.shards)


def tables(settings: Sequence[Setting], *, markdown: bool) -> str:
    """Seconds, bytes and memory by the number of ranks, of one layout."""
    layout = settings[0].job.layout
    found = {setting.ranks: phases(setting) for setting in settings}
    names = [phase.name for phase in next(iter(found.values()))]
    times = [[ranks, *(_times(phase) for phase in own)] for ranks, own in found.items()]
    volumes = [[s.ranks, *(_volume(s, phase) for phase in found[s.ranks])] for s in settings]
    held = [[s.ranks, *(f"{size / 1e9:.1f}" for size in memory(s).values())] for s in settings]
    return "\n\n".join(
        f"{title}\n\n{_table([head, *rows], markdown=markdown)}"
        for title, head, rows in (
            (f"{layout}: seconds (of these waiting for others)", ["ranks", *names], times),
            (f"{layout}: GB that a rank sends (calls)", ["ranks", *names], volumes),
            (f"{layout}: GB of a device", ["ranks", *memory(settings[0])], held),
        )
    )


def _table(rows: Sequence[Sequence[object]], *, markdown: bool) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  ".join(row) for row in padded)
    padded.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _times(phase: Phase) -> str:
    return f"{phase.seconds:.3g} ({phase.exchange:.2g})" if phase.seconds else "-"


def _volume(setting: Setting, phase: Phase) -> str:
    calls = len(phase.messages) + len(phase.gathers)
    return f"{sent(setting, phase) / 1e9:.3g} ({calls})" if calls else "-"


def limits(work: Workload, job: Job, hardware: Hardware) -> Iterator[str]:
    """Where the layout stops to scale, and which part of the time it is."""
    dense = memory(Setting(work, job, 1, hardware))
    for name in dense:
        fits = [n for n in (2**k for k in range(17)) if memory(Setting(work, job, n, hardware))[name] < hardware.memory]
        where = f"fits from {fits[0]} ranks on" if fits else "does not fit, whatever the number of ranks"
        yield f"{job.layout}, memory of {name}: {where}."
    for number, name in enumerate(phase.name for phase in phases(Setting(work, job, 1, hardware))):
        last, after = _last_worth(work, job, hardware, number)
        parts = {"work": after.work, "what every rank does": after.alone, "exchange": after.exchange}
        if after.seconds < NOTHING:
            continue
        largest = max(parts, key=lambda part: parts[part])
        yield (
            f"{job.layout}, {name}: worth more ranks up to {last}; at {2 * last} {after.seconds:.3g} s, of which "
            f"{largest} {parts[largest] / after.seconds:.0%}."
        )


def _last_worth(work: Workload, job: Job, hardware: Hardware, number: int) -> tuple[int, Phase]:
    """The ranks of which twice as many are not worth it, and the phase at twice as many."""
    ranks, now = 1, phases(Setting(work, job, 1, hardware))[number]
    while True:
        after = phases(Setting(work, job, 2 * ranks, hardware))[number]
        if now.seconds < WORTH * after.seconds or ranks >= 2**16:
            return ranks, after
        ranks, now = 2 * ranks, after


# --- against real ranks ---------------------------------------------------------------------------


def simulated(work: Workload, ranks: int, images: int, batches: Sequence[Batch]) -> dict[str, list[Message]]:
    """The messages that `real` should send."""
    return {
        "scoring": exchanges.scoring(work.units, seen=exchanges.checksum(batches)),
        "evaluation": exchanges.evaluation(images, work.classes),
        "selection": exchanges.told(exchanges.pickled(dict(work.selection))),
        "repair": exchanges.repair(work, images, images, ranks),
        "tpv": exchanges.tpv(images, len(batches[0]), ranks, seen=exchanges.checksum(batches)),
    }


def real(model: torch.nn.Module, batches: Sequence[Batch], selection: Mapping[str, torch.Tensor]) -> dict:
    """The phases as `jbrprune.prune` runs them, on whatever ranks there are: phase -> messages."""
    groups = find_groups(model, batches[0].images[:2]).groups
    found = {}
    with counting() as found["scoring"]:
        Relevance()(model, batches, groups)
    with counting() as found["evaluation"]:
        reference = compute_logits(model, batches)
    with counting() as found["selection"]:
        distributed.same(dict(selection))
    gate = [Batch(batch.images, reference=logits) for batch, logits in zip(batches, reference, strict=True)]
    with counting() as found["repair"]:
        full = axis_widths(model, groups)
        targets = record_targets(model, batches, [name for name, side, _ in full if side == "in"])
        kept = {axis: torch.arange(width) for axis, width in full.items()}
        for axis, gone in removed_channels(groups, selection).items():
            kept[axis] = kept[axis][~torch.isin(kept[axis], gone)]
        pruned = copy_model(model)
        remove_units(pruned, groups, selection)
        repair_model(pruned, batches, gate, targets, kept, ("auto",))
    with counting() as found["tpv"]:
        trace_form(
            model, batches, Isotropic(0.01), method="projection", signs=1, rtol=0.0, validity=False, progress=False
        )
    return found


def compared(name: str, size: int, images: int, ranks: Sequence[int]) -> Iterator[dict[str, object]]:
    """Of every number of ranks and phase: calls and bytes as they were sent, and as they were simulated."""
    work = workload(name, (3, size, size))
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batches = [Batch(part) for part in torch.randn(images, 3, size, size).split(2)]
    for number in ranks:
        expected = simulated(work, number, images, batches)
        for rank, (_, found) in enumerate(on_ranks(number, lambda: real(model, batches, work.selection))):
            for phase, messages in found.items():
                yield {
                    "model": name,
                    "ranks": number,
                    "rank": rank,
                    "phase": phase,
                    "calls": len(messages),
                    "bytes": sum(message.size for message in messages),
                    "simulated calls": len(expected[phase]),
                    "simulated bytes": sum(message.size for message in expected[phase]),
                    "equal": Counter(messages) == Counter(expected[phase]),
                }


def timed(name: str, size: int, images: int) -> dict[str, object]:
    """Seconds of a scoring on one core, against its operations at the rate of a large matrix product there."""
    torch.set_num_threads(1)
    work = workload(name, (3, size, size))
    operations = images * (sum(work.dense.forward.values()) + work.dense.backward)
    factor = torch.randn(1024, 1024)
    model = timm.create_model(name).eval()
    data = torch.randn(images, 3, size, size)
    groups = find_groups(model, data[:2]).groups

    def product() -> None:
        torch.mm(factor, factor)

    def scoring() -> None:
        Relevance()(model, data, groups)

    rate = 2 * 1024**3 / min(_seconds(product) for _ in range(10))
    predicted, measured = operations / rate, min(_seconds(scoring) for _ in range(3))
    return {"model": name, "images": images, "rate": rate, "predicted": predicted, "measured": measured,
            "utilisation": predicted / measured}  # fmt: skip


def _seconds(work) -> float:  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- the command ----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Everything that can be said about model, job and hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-10b", help="vit-10b, or a timm name")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--share", type=float, default=0.7, help="units of every group that pruning keeps")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shard", type=int, default=8, help="ranks among which parameters are sharded")
    parser.add_argument("--wire", type=int, default=4, help="bytes of a gathered parameter")
    parser.add_argument("--checkpointing", action="store_true")
    for field in fields(Hardware):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--format", choices=["markdown", "text", "json"], default="markdown")
    parser.add_argument("--measure", action="store_true", help="compare with real ranks, and a real pass, instead")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.measure:
        wrong = 0
        for line in compared(given.model, given.size, 7, [2, 3]):
            wrong += not line["equal"]
            print(json.dumps(line))
        print(json.dumps(timed(given.model, given.size, 16)))
        raise SystemExit(1 if wrong else 0)
    hardware = Hardware(**{field.name: getattr(given, field.name) for field in fields(Hardware)})
    work = workload(given.model, (3, given.size, given.size), arguments=keywords(given.model_arg), share=given.share)
    for layout in given.layouts:
        job = Job(given.images, given.batch, layout, given.shard, given.wire, given.checkpointing)
        settings = [Setting(work, job, ranks, hardware) for ranks in given.ranks]
        if given.format == "json":
            print("\n".join(json.dumps(line) for setting in settings for line in lines(setting)))
            continue
        print(tables(settings, markdown=given.format == "markdown"), end="\n\n")
        print("\n".join(f"- {limit}" for limit in limits(work, job, hardware)), end="\n\n")


if __name__ == "__main__":
    main()
