"""Timings of layers, kept on disk from one run to the next.

One JSON file per machine and software: the CPU or accelerator, the number of threads, the version of torch. The
directory is ``$JBRPRUNE_CACHE``, else ``$XDG_CACHE_HOME/jbrprune``, else ``~/.cache/jbrprune``; it can be deleted at
any time. What cannot be read is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from jbrprune.data.files import replacing
from jbrprune.evaluation.latency import describe_hardware

log = logging.getLogger(__name__)

FORMAT = 1


def cache_directory() -> Path:
    """Where timings are kept."""
    own = os.environ.get("JBRPRUNE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jbrprune"


def machine(device: torch.device) -> dict[str, object]:
    """What timings depend on, beside the layer."""
    return {
        "format": FORMAT,
        "device": device.type,
        "hardware": describe_hardware(device),
        "capability": torch.backends.cpu.get_cpu_capability(),  # a virtual machine may hide the model of its CPU
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
    }


def read(device: torch.device) -> dict[str, float]:
    """Layer at a width -> seconds, as measured before on this machine; empty if there is nothing to be read."""
    path = _file(device)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["machine"] != machine(device):
            raise ValueError("it is of another machine")
        return {str(key): _positive(value) for key, value in kept["seconds"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be used (%s): layers are timed again.", path, error)
        return {}


def add(device: torch.device, seconds: Mapping[str, float]) -> None:
    """Keep timings beside those that are there; a directory that cannot be written is no reason to fail."""
    if not seconds:
        return
    path = _file(device)
    body = {"machine": machine(device), "seconds": {**read(device), **seconds}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(body, sort_keys=True), encoding="utf-8")
    except OSError as error:
        log.warning("%s cannot be written (%s): layers will be timed again next time.", path, error)


def _file(device: torch.device) -> Path:
    key = json.dumps(machine(device), sort_keys=True)
    return cache_directory() / "latency" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _positive(value: object) -> float:
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no time")
    return value
