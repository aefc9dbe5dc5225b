"""Peak memory of `score` by the number of images, each in a process of its own.

python scripts/bench_memory.py --images 100 1000 10000 --out results/memory.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import append, commit
from torch import Tensor

import jbrprune


def stream(images: int, size: int, batch: int = 20) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, images, batch):
        yield torch.randn(min(batch, images - start), 3, size, size, generator=generator)


def measured(model: str, granularity: str, images: int, size: int) -> dict[str, object]:
    began = time.perf_counter()
    jbrprune.score(model, stream(images, size), granularity=granularity, pretrained=False, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": model,
        "granularity": granularity,
        "images": images,
        "size": size,
        "peak_mib": round(peak / 1024, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "commit": commit(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["test_resnet", "test_vit"])
    parser.add_argument("--images", nargs="+", type=int, default=[100, 1000, 10000])
    parser.add_argument("--granularity", nargs="+", default=["unit", "weight"])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        model, granularity, images = options.one
        print(json.dumps(measured(model, granularity, int(images), options.size)))
        return
    for model in options.models:
        for granularity in options.granularity:
            for images in options.images:
                one = ["--one", model, granularity, str(images), "--size", str(options.size)]
                done = subprocess.run(
                    [sys.executable, __file__, *one], check=True, stdout=subprocess.PIPE, text=True, env=os.environ
                )
                print(done.stdout, end="")
                if options.out:
                    append(options.out, [json.loads(done.stdout)])


if __name__ == "__main__":
    main()
