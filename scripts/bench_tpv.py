"""Time to a relative standard error of 2 %: the trace form beside the published code's estimator, in one run.

    python scripts/bench_tpv.py --case resnet50_32 --checkpoint resnet50.safetensors --fashion-mnist FOLDER \
        --out results/tpv.jsonl

Both estimate sigma^2 E_x |J(x)|^2 over all parameters. ``published`` takes one image and one vector of random signs per
backward, makes the gradient of every parameter and adds up the squares; ``ours`` is `jbrprune.tpv.trace_form`. Each is
also timed under autocast to bfloat16.

Seconds per draw: processor time of this process, in turn in every round (what disturbs the machine disturbs all), the
median of the rounds. Draws to 2 %: (relative standard deviation of a draw / 0.02)^2. A draw of ``published`` is a
random image with random signs, so its deviation is that of ``ours`` with independent signs, measured on all images;
``ours`` has that of its own standard error, which knows about balanced signs. Cases at 224 have random weights and
random images: there the time per draw says something, the variance little. The comparison with autograd on two images,
which `trace_form` makes once per call, is timed apart (``check_seconds``) and is part of ``seconds_to_2_percent``.
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
from jbrprune.tpv.recorded import check_recording, recorded
from safetensors.torch import load_file
from torch import Tensor, nn

from jbrprune.models import preserve
from jbrprune.models.preserve import logits_of
from jbrprune.tpv import Isotropic, signs, trace_form

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
    deviations = {way: deviation(net, images, way, batch, args.seed) for way in ("independent", "balanced")}
    seconds = timed(net, images, args.batch_size or batch, args)
    check = seconds.pop("check")
    facts = {"case": args.case, "images": len(images), "batch_size": args.batch_size or batch, "seed": args.seed}
    facts |= {"weights": "trained" if args.checkpoint else "random", "rounds": args.rounds, "commit": commit()}
    facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    needed = {}
    for method, rounds in seconds.items():
        spread = deviations["balanced" if method.startswith("ours") else "independent"]
        draws = (spread / GOAL) ** 2
        each = statistics.median(rounds)
        needed[method] = draws * each + (statistics.median(check) if method.startswith("ours") else 0.0)
        line = {
            "method": method,
            "cpu_seconds_per_draw": each,
            "relative_deviation": spread,
            "draws_to_2_percent": draws,
        }
        line |= {"seconds_to_2_percent": needed[method], "check_seconds": statistics.median(check)}
        line |= {"times_faster": needed["published"] / needed[method]}
        line |= {"times_faster_per_draw": statistics.median(seconds["published"]) / each}
        append(args.out, [facts | line])
        print(facts | line, flush=True)


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
    """Fashion-MNIST's training images in random order, or random images of 224 x 224."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.fashion_mnist is None:
        return torch.randn(args.images, 3, 224, 224, generator=generator)
    images, _ = fashion_mnist(args.fashion_mnist, train=True)
    return images[torch.randperm(len(images), generator=generator)[: args.images]]


def deviation(net: nn.Module, images: Tensor, way: str, batch: int, seed: int) -> float:
    """Relative standard deviation of one draw: that of independent draws with the same standard error."""
    most = signs.MOST_BALANCED
    signs.MOST_BALANCED = most if way == "balanced" else 1
    try:
        options = {"rtol": 0.0, "validity": False, "method": "projection", "progress": False}
        found = trace_form(net, images, Isotropic(1.0), batch_size=batch, seed=seed, **options)  # type: ignore[arg-type]
    finally:
        signs.MOST_BALANCED = most
    return found.relative_error * len(images) ** 0.5


def timed(net: nn.Module, images: Tensor, batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Method -> processor seconds per draw, in every round."""
    seconds: dict[str, list[float]] = {}
    low = torch.bfloat16
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "published": (lambda: published(net, images[: args.draws], None), args.draws),
        "ours": (lambda: ours(net, images[:batch], None), batch),
        "published_bf16": (lambda: published(net, images[: args.draws], low), args.draws),
        "ours_bf16": (lambda: ours(net, images[:batch], low), batch),
        "check": (lambda: check(net, images[:batch]), 1),
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


def ours(net: nn.Module, images: Tensor, low: torch.dtype | None) -> float:
    """One batch as `trace_form` runs it."""
    names = [name for name, _ in net.named_parameters()]
    with preserve.inference_state(net):
        run = recorded(net, images, names, logits_of, low)
        drawn = signs.Signs(run.outputs.shape[1], 1, 0, 0).take(len(images))[:, 0]
        return float(run.gradients(drawn).square_norms(dict.fromkeys(names, 1.0)).mean())


def check(net: nn.Module, images: Tensor) -> None:
    """What `trace_form` does once per call."""
    with preserve.inference_state(net):
        check_recording(net, images, [name for name, _ in net.named_parameters()], logits_of)


if __name__ == "__main__":
    main()
