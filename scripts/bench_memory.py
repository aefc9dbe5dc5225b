"""Peak memory of `score` by the number of images, each in a process of its own.

The images are random and come from a generator of batches (``stream``), or from PNG files in a temporary folder
(``folder``), as a user would give them; files are made before the process that is measured starts.

python scripts/bench_memory.py --images 100 1000 10000 --out results/memory.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import append, commit
from PIL import Image
from torch import Tensor

import jbrprune


def stream(images: int, size: int, batch: int = 20) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, images, batch):
        yield torch.randn(min(batch, images - start), 3, size, size, generator=generator)


def files(folder: Path, images: int, size: int) -> None:
    """Random PNG files."""
    generator = torch.Generator().manual_seed(0)
    for number in range(images):
        pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png", compress_level=0)


def measured(model: str, granularity: str, images: int, size: int, folder: Path | None) -> dict[str, object]:
    """One line: the peak of this process, and how long the scoring took."""
    began = time.perf_counter()
    data = stream(images, size) if folder is None else folder
    net = jbrprune.create(model, pretrained=False)
    scores = jbrprune.score(net, data, granularity=granularity, batch_size=20, progress=False)
    assert scores.samples == images
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": model,
        "granularity": granularity,
        "source": "stream" if folder is None else "folder",
        "images": images,
        "size": size,
        "peak_mib": round(peak / 1024, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "commit": commit(),
        "torch": torch.__version__,
    }


def apart(model: str, granularity: str, images: int, size: int, source: str) -> dict[str, object]:
    """`measured` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        one = ["--one", model, granularity, str(images), "--size", str(size)]
        if source == "folder":
            files(Path(folder), images, size)
            one += ["--folder", folder]
        done = subprocess.run(
            [sys.executable, __file__, *one], check=True, stdout=subprocess.PIPE, text=True, env=os.environ
        )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["test_resnet", "test_vit"])
    parser.add_argument("--images", nargs="+", type=int, default=[100, 1000, 10000])
    parser.add_argument("--granularity", nargs="+", default=["unit", "weight"])
    parser.add_argument("--sources", nargs="+", choices=["stream", "folder"], default=["stream", "folder"])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        model, granularity, images = options.one
        print(json.dumps(measured(model, granularity, int(images), options.size, options.folder)))
        return
    for model, granularity, source, images in itertools.product(
        options.models, options.granularity, options.sources, options.images
    ):
        line = apart(model, granularity, images, options.size, source)
        print(json.dumps(line), flush=True)
        if options.out:
            append(options.out, [line])


if __name__ == "__main__":
    main()
