"""The phases of a pruning by number of ranks: work, waiting, messages, memory.

Two layouts. ``replicated`` is what jbrprune does: every rank holds the model, images are dealt out, sums are added up.
``sharded`` is a plan: parameters lie in FSDP2 shards and are gathered block by block in forward and backward; there are
no weight gradients, so nothing is reduced; least squares are solved by rows, where the weights lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import exchanges
from network import Hardware, Message, overlapped, seconds, total_seconds
from workload import REST, Consumer, Workload

LAYOUTS = ("replicated", "sharded")
PREDICTED_ROWS = 11
"""Backward passes of a prediction: ten logits one by one, the others under random signs."""


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        images: Calibration images, all together.
        batch: Images that go through the model at once.
        layout: One of `LAYOUTS`.
        shard: Ranks among which parameters are sharded; more ranks are replicas of that.
        wire: Bytes of a parameter that is gathered.
        checkpointing: Whether the blocks' activations are computed twice.
    """

    images: int = 512
    batch: int = 8
    layout: str = "replicated"
    shard: int = 8
    wire: int = 4
    checkpointing: bool = False

    @property
    def parts(self) -> tuple[int, int, int]:
        """Images that score, that repair, and that gate (as many are held out), as calibration divides."""
        fifth = self.images // 5
        return self.images - fifth, self.images - 2 * fifth, fifth


@dataclass(frozen=True)
class Setting:
    """One model, one job, one number of ranks."""

    work: Workload
    job: Job
    ranks: int
    hardware: Hardware

    @property
    def sharded(self) -> bool:
        """Whether this is the plan."""
        return self.job.layout == "sharded"

    @property
    def shards(self) -> int:
        """Ranks that hold the parameters together."""
        return min(self.ranks, self.job.shard) if self.sharded else 1


@dataclass(frozen=True)
class Phase:
    """One phase on the busiest rank.

    Attributes:
        name: What is done.
        messages: Collective calls among all ranks.
        gathers: Those among the ranks that share parameters; they run beside the work.
        work: Seconds of work that more ranks share.
        alone: Seconds of work that they do not.
        exchange: Seconds of waiting for others.
    """

    name: str
    messages: Sequence[Message]
    gathers: Sequence[Message]
    work: float
    alone: float
    exchange: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.work + self.alone + self.exchange


def phases(setting: Setting) -> list[Phase]:
    """One step of `jbrprune.prune`, in order, and what `jbrprune.predict` and `jbrprune.tpv.trace_form` do.

    Every pass is counted as one through the dense model; later steps are cheaper.
    """
    scored, repairing, gate = setting.job.parts
    return [
        _phase(setting, "scoring", exchanges.scoring(setting.work.units), [_dealt(setting, scored, 1)]),
        _phase(setting, "selection", exchanges.told(exchanges.pickled(dict(setting.work.selection)))),
        _repair(setting, exchanges.repair_images(repairing, setting.work.image), gate),
        _phase(setting, "evaluation", exchanges.evaluation(gate, setting.work.classes), [_dealt(setting, gate, 0)]),
        _phase(setting, "writing", alone=_writing(setting)),
        _prediction(setting),
        _tpv(setting),
    ]


@dataclass(frozen=True)
class Passes:
    """Passes through the model: seconds of work, seconds of waiting for parameters, and their messages."""

    work: float
    waiting: float
    gathers: Sequence[Message]


def _dealt(setting: Setting, images: int, backward: int) -> Passes:
    """Batches dealt out among the ranks; with sharded parameters all make as many as the busiest."""
    rounds = math.ceil(math.ceil(images / setting.job.batch) / setting.ranks)
    return passes(setting, min(images, rounds * setting.job.batch), rounds, backward)


def passes(setting: Setting, images: int, rounds: int, backward: int) -> Passes:
    """One rank's images in some rounds, each a forward pass and ``backward`` backward passes to the activations."""
    forward = setting.work.dense.forward
    factor = setting.work.dense.backward / sum(forward.values()) + setting.job.checkpointing
    names = [REST, *(name for name in forward if name != REST)]
    ahead = [forward[name] * images / rounds / setting.hardware.rate for name in names]
    stages = ahead + [time * factor for time in reversed(ahead)] * backward
    total = rounds * sum(stages)
    if setting.shards == 1:
        return Passes(total, 0.0, [])
    gather = {name: gathering(setting, setting.work.parameters[name]) for name in names}
    waits = {name: seconds(gather[name], setting.shards, setting.hardware) for name in names}
    back = [waits[name] if name != REST else 0.0 for name in reversed(names)]  # the rest stays after the forward pass
    waiting = overlapped(stages * rounds, ([waits[name] for name in names] + back * backward) * rounds) - total
    messages = [gather[name] for name in names] + [gather[name] for name in names if name != REST] * backward
    return Passes(total, waiting, messages * rounds)


def gathering(setting: Setting, parameters: int) -> Message:
    """The all-gather of a block's parameters."""
    return Message("all_gather", math.ceil(parameters * setting.job.wire / setting.shards))


def _repair(setting: Setting, images: int, gate: int) -> Phase:
    """The dense model's pass, and for every combination a pass with fits and one over the gate."""
    tries = exchanges.combinations(bool(setting.work.norms))
    share = math.ceil(images / setting.ranks) if images >= setting.ranks else images
    spent = [passes(setting, share, 1, 0)] * (1 + len(tries)) + [_dealt(setting, gate, 0)] * (1 + len(tries))
    messages = exchanges.repair(setting.work, images, gate, setting.ranks)
    if setting.sharded:
        messages = list(_of_shards(setting, messages))
    fits = sum("least_squares" in methods for methods in tries)
    alone = fits * sum(fitting(setting, images, consumer) for consumer in setting.work.consumers)
    return _phase(setting, "repair", messages, spent, alone=alone)


def _of_shards(setting: Setting, messages: list[Message]) -> Iterator[Message]:
    """As the plan would say it: rows gathered, not added to zeros and told; tensors in shards need not be told."""
    for message in messages[: len(messages) - len(setting.work.pruned_state)]:
        if message.kind == "all_reduce":
            yield Message("all_gather", math.ceil(message.size / setting.ranks))
        elif message.kind == "all_gather":
            yield message


def fitting(setting: Setting, images: int, consumer: Consumer) -> float:
    """Seconds of one least-squares problem: products on the device, Cholesky on the host in double precision.

    Every rank solves all of it. In the plan the factor as well, but only the outputs whose weights it holds.
    """
    rows = sum(exchanges.rows_by_rank(images, consumer.positions, 1))
    small, large = sorted((rows, consumer.fan_in))
    products = 2.0 * small * small * large + 4.0 * rows * consumer.fan_in * consumer.outputs
    solves = 2.0 * small * small * consumer.outputs / setting.shards
    return products / setting.hardware.rate + (small**3 / 3 + solves) / setting.hardware.host_flops


def _writing(setting: Setting) -> float:
    """The journal's file of the model: by rank 0 alone, or every shard by its rank."""
    hardware = setting.hardware
    return sum(setting.work.pruned_state) / min(hardware.disk * setting.shards, hardware.disks)


def _prediction(setting: Setting) -> Phase:
    """Changes of the logits (`jbrprune.prediction.changes`): all of it on every rank; in the plan its part."""
    images, batch = setting.job.images, setting.job.batch
    if not setting.sharded:
        spent = passes(setting, images, math.ceil(images / batch), PREDICTED_ROWS)
        return _phase(setting, "predict", alone=spent.work)
    messages = [Message("all_gather", math.ceil(images / setting.ranks) * PREDICTED_ROWS * 4)]
    return _phase(setting, "predict", messages, [_dealt(setting, images, PREDICTED_ROWS)])


def _tpv(setting: Setting) -> Phase:
    """`trace_form` with one vector of signs: a backward pass, and as much again for gradients of weights."""
    job = setting.job
    spent = _dealt(setting, job.images, 1)
    forward = sum(setting.work.dense.forward.values())
    weights = spent.work * forward / (forward + setting.work.dense.backward)
    spent = Passes(spent.work + weights, spent.waiting, spent.gathers)
    return _phase(setting, "tpv", exchanges.tpv(job.images, job.batch, setting.ranks), [spent])


def _phase(
    setting: Setting, name: str, messages: Sequence[Message] = (), spent: Sequence[Passes] = (), *, alone: float = 0.0
) -> Phase:
    messages = messages if setting.ranks > 1 else []
    gathers = [message for one in spent for message in one.gathers]
    exchange = sum(one.waiting for one in spent) + total_seconds(messages, setting.ranks, setting.hardware)
    return Phase(name, messages, gathers, sum(one.work for one in spent), alone, exchange)


def memory(setting: Setting) -> dict[str, float]:
    """Phase of `jbrprune.prune` -> bytes that a device holds at its peak, as far as the code tells.

    ``units`` is the search for removable units, with its trial in double precision; the plan does it elsewhere.
    """
    work, job, shards = setting.work, setting.job, setting.shards
    dense, pruned = 4.0 * sum(work.parameters.values()), float(sum(work.pruned_state))
    kept = work.dense.checkpointed if job.checkpointing else sum(work.dense.kept.values())
    two = sum(sorted(work.parameters.values())[-2:])  # the block that works, and the next one
    gathered = float(job.wire * two) if shards > 1 else 0.0
    activations = job.batch * (kept + 2 * work.dense.largest + 4 * sum(work.units.values()))
    images = exchanges.repair_images(job.parts[1], work.image)
    share = math.ceil(images / setting.ranks) if images >= setting.ranks else images
    units = {} if setting.sharded else {"units": 4 * dense + 2 * pruned}  # the user's, ours, a double, a smaller double
    return {
        **units,
        "scoring": 2 * dense / shards + gathered + activations,  # the user's and ours
        "repair": (dense + 3 * pruned) / shards + gathered + 3 * share * work.dense.largest,  # and two snapshots
    }
