"""Collectives between ranks: what they send and how long they take, by the alpha-beta model.

A message of s bytes over one link takes alpha + s / bandwidth. Of n ranks in a ring:

* all-gather, every rank contributes s: n - 1 rounds of s, each rank sends (n - 1) s;
* all-reduce of s: a reduce-scatter and an all-gather of pieces s / n, each rank sends 2 (n - 1) / n s;
* broadcast of s, pipelined: all ranks but the last pass s on, (n - 1) / n s per rank on average.

Libraries take a tree where messages are small: ceil(log2 n) rounds of the whole message in the place of n - 1 rounds of
a part. ``best`` takes whichever is faster, for each message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "broadcast"]
ALGORITHMS = ("ring", "tree", "best")


@dataclass(frozen=True, order=True)
class Message:
    """One collective call.

    Attributes:
        kind: The collective.
        size: Bytes of the tensor; of an all-gather, of what one rank contributes.
    """

    kind: Kind
    size: int


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on.

    Attributes:
        peak: FLOP/s of a device.
        utilisation: Share of the peak that is reached.
        memory: Bytes of a device.
        per_host: Devices in a host.
        intra_bandwidth: Bytes/s of a device to others in its host.
        intra_latency: Seconds.
        inter_bandwidth: Bytes/s of a device to others outside of its host.
        inter_latency: Seconds.
        host_flops: FLOP/s of the CPU that belongs to a rank, in double precision.
        disk: Bytes/s that one rank writes.
        disks: Bytes/s that all ranks write together at most.
        algorithm: One of `ALGORITHMS`.
    """

    peak: float = 495e12
    utilisation: float = 0.4
    memory: float = 80e9
    per_host: int = 8
    intra_bandwidth: float = 450e9
    intra_latency: float = 3e-6
    inter_bandwidth: float = 50e9
    inter_latency: float = 10e-6
    host_flops: float = 100e9
    disk: float = 2e9
    disks: float = 50e9
    algorithm: str = "best"

    @property
    def rate(self) -> float:
        """FLOP/s that are reached."""
        return self.peak * self.utilisation

    def link(self, ranks: int) -> tuple[float, float]:
        """Latency and bandwidth of the slowest hop of a ring of that many ranks."""
        if ranks <= self.per_host:
            return self.intra_latency, self.intra_bandwidth
        return max(self.intra_latency, self.inter_latency), min(self.intra_bandwidth, self.inter_bandwidth)


def sent(message: Message, ranks: int) -> float:
    """Bytes that a rank of a ring sends, the mean over ranks.

    Example:
        >>> [sent(Message(kind, 120), 4) for kind in ("all_reduce", "all_gather", "broadcast")]
        [180.0, 360.0, 90.0]
    """
    if message.kind == "all_gather":
        return float((ranks - 1) * message.size)
    return (2 if message.kind == "all_reduce" else 1) * (ranks - 1) / ranks * message.size


def seconds(message: Message, ranks: int, hardware: Hardware) -> float:
    """Time of a call; nothing for one rank."""
    if ranks == 1:
        return 0.0
    latency, bandwidth = hardware.link(ranks)
    twice = 2 if message.kind == "all_reduce" else 1
    volume = message.size if message.kind == "broadcast" else sent(message, ranks)
    ring = twice * (ranks - 1) * latency + volume / bandwidth
    if message.kind == "all_gather" or hardware.algorithm == "ring":
        return ring
    rounds = twice * math.ceil(math.log2(ranks))
    tree = rounds * (latency + message.size / bandwidth)
    return tree if hardware.algorithm == "tree" else min(ring, tree)


def total_sent(messages: Iterable[Message], ranks: int) -> float:
    """Bytes that a rank sends for all of them."""
    return sum(sent(message, ranks) for message in messages)


def total_seconds(messages: Iterable[Message], ranks: int, hardware: Hardware) -> float:
    """Time of all of them, one behind the other."""
    return sum(seconds(message, ranks, hardware) for message in messages)


def overlapped(work: list[float], fetch: list[float]) -> float:
    """Time of stages that each need something fetched, while the stage before works: a prefetch of one.

    fetch_1 + max(work_1, fetch_2) + ... + max(work_{n-1}, fetch_n) + work_n

    Example:
        >>> overlapped([3.0, 1.0, 2.0], [0.5, 2.0, 4.0])  # 0.5 + max(3, 2) + max(1, 4) + 2
        9.5
    """
    if not work:
        return 0.0
    return fetch[0] + sum(max(w, f) for w, f in zip(work[:-1], fetch[1:], strict=True)) + work[-1]
