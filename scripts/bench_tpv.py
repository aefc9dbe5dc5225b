"""Time to a relative standard error of 2 %: the trace form beside the published code's estimator, in one run.

    python scripts/bench_tpv.py --case resnet50_32 --checkpoint resnet50.safetensors --fashion-mnist FOLDER \
        --out results/tpv.jsonl

Both estimate sigma^2 E_x |J(x)|^2 over all parameters. ``published`` takes one image and one vector of random signs per
backward, makes the gradient of every parameter and adds up the squares; ``ours`` is `jbrprune.tpv.trace_form`. Each is
also timed under autocast to bfloat16.

Seconds per draw: processor time of this process, in turn in every round (what disturbs the machine disturbs all), the
median of the rounds. A draw of both is a random image with random signs, so that both need (relative standard deviation
of a draw / 0.02)^2 draws to 2 %. Without ``--fashion-mnist`` images are random; cases at 224 have random weights as
well: there the time per draw says something, the variance little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import append, commit
from fashion_mnist import fashion_mnist
from safetensors.torch import load_file
from torch import Tensor, nn

from jbrprune.tpv import Estimate, Isotropic, trace_form

GOAL = 0.02
SMALL = {"in_chans": 1, "num_classes": 10}
CASES = {
    "resnet50_32": ("resnet50", SMALL, 128),
    "vit_32": ("vit_tiny_patch16_224", SMALL | {"img_size": 32, "patch_size": 8, "depth": 6}, 128),
    "resnet50_224": ("resnet50", {}, 8),
    "vit_small_224": ("vit_small_patch16_224", {}, 8),
}


def main() -> None:
    args = arguments()
    name, options, batch = CASES[args.case]
    torch.manual_seed(args.seed)
    net = timm.create_model(name, **options)
    if args.checkpoint:
        net.load_state_dict({key: value.float() for key, value in load_file(args.checkpoint).items()})
    net.eval()
    images = shuffled(args)
    size = args.batch_size or batch
    spread = ours(net, images, size, None, args.seed).relative_error * len(images) ** 0.5
    draws = (spread / GOAL) ** 2
    seconds = {method: statistics.median(each) for method, each in timed(net, images, size, args).items()}
    facts = {
        "case": args.case,
        "images": len(images),
        "batch_size": size,
        "seed": args.seed,
        "draws_to_2_percent": draws,
    }
    facts |= {"weights": "trained" if args.checkpoint else "random", "rounds": args.rounds, "commit": commit()}
    facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "relative_deviation": spread}
    for method, each in seconds.items():
        line = facts | {"method": method, "cpu_seconds_per_draw": each, "seconds_to_2_percent": draws * each}
        line |= {"times_faster": seconds["published"] / each}
        append(args.out, [line])
        print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--images", type=int, default=1024, help="images on which the deviation of a draw is measured")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=8, help="draws of the published estimator in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def shuffled(args: argparse.Namespace) -> Tensor:
    """Fashion-MNIST's training images in random order, or random images."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.fashion_mnist is None:
        shape = (1, 32, 32) if args.case.endswith("32") else (3, 224, 224)
        return torch.randn(args.images, *shape, generator=generator)
    images, _ = fashion_mnist(args.fashion_mnist, train=True)
    return images[torch.randperm(len(images), generator=generator)[: args.images]]


def timed(net: nn.Module, images: Tensor, batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Method -> processor seconds per draw, in every round."""
    seconds: dict[str, list[float]] = {}
    low = torch.bfloat16
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "published": (lambda: published(net, images[: args.draws], None), args.draws),
        "ours": (lambda: ours(net, images[:batch], batch, None, 0), batch),
        "published_bf16": (lambda: published(net, images[: args.draws], low), args.draws),
        "ours_bf16": (lambda: ours(net, images[:batch], batch, low, 0), batch),
    }
    for number in range(args.rounds + 1):
        for method, (step, draws) in steps.items():
            start = time.process_time()
            step()
            if number:  # the first round is a warm-up
                seconds.setdefault(method, []).append((time.process_time() - start) / draws)
    return seconds


def published(net: nn.Module, images: Tensor, low: torch.dtype | None) -> float:
    """One image and one vector of signs per backward; all gradients are made, squared and added up."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    total = 0.0
    for image in images:
        with torch.autocast("cpu", low, enabled=low is not None):
            outputs = net(image[None])[0]
        v = torch.randint(0, 2, outputs.shape).float() * 2 - 1
        gradients = torch.autograd.grad((v * outputs).sum(), parameters)
        total += sum(g.pow(2).sum().item() for g in gradients)
    return total / len(images)


def ours(net: nn.Module, images: Tensor, batch: int, low: torch.dtype | None, seed: int) -> Estimate:
    """The trace form of all images."""
    options = {"method": "projection", "rtol": 0.0, "validity": False, "progress": False, "autocast": low}
    return trace_form(net, images, Isotropic(1.0), batch_size=batch, seed=seed, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
