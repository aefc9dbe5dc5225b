"""TPV of 8-bit quantization over the global range: trace form, empirical with noise and with real rounding.

    python scripts/tpv_quantization.py resnet50 --checkpoint resnet50.safetensors --model-arg in_chans=1 \
        --model-arg num_classes=10 --fashion-mnist FOLDER --out results/tpv_quantization.jsonl

One line per estimator, of training and test images and the ratio of both (`jbrprune.tpv.train_test_ratio`: both have
seen the same draws); lines that are there are not measured again. ``--table`` prints values with standard errors; lines
without a ratio, from earlier versions, are left out and made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import append, commit, keywords, lines
from fashion_mnist import fashion_mnist
from plan import weights_named
from torch import Tensor, nn

from jbrprune.models import timm_models
from jbrprune.report.records import plain
from jbrprune.tpv import Estimate, Quantization, empirical, trace_form, train_test_ratio

ESTIMATORS = ("trace", "noise", "rounding")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--model-arg", action="append", default=[])
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8])
    parser.add_argument("--granularity", nargs="+", default=["global"])
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=ESTIMATORS)
    parser.add_argument("--images", type=int, default=10_000, help="images of a split that may be read")
    parser.add_argument("--empirical-images", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--rtol", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def estimate(net: nn.Module, images: Tensor, cell: dict, args: argparse.Namespace) -> Estimate:
    perturbation = Quantization(cell["bits"], cell["granularity"], rounding=cell["estimator"] == "rounding")
    if cell["estimator"] == "trace":
        return trace_form(net, images, perturbation, rtol=args.rtol, batch_size=128, seed=args.seed)
    some = images[: args.empirical_images]
    return empirical(net, some, perturbation, draws=args.draws, rtol=args.rtol, batch_size=250, seed=args.seed)


def table(path: Path) -> str:
    found = {(r["bits"], r["granularity"], r["estimator"]): r for r in lines(path) if "ratio" in r}
    rows = ["| bits, range | estimator | training images | test images | training / test |", "|---|---|---|---|---|"]
    for (bits, granularity, estimator), line in found.items():
        cells = [f"{r['value']:.4g} +- {r['standard_error']:.2g}" for r in (line["train"], line["test"])]
        cells.append(f"{line['ratio']:.3f} +- {line['ratio_error']:.3f}")
        rows.append(f"| {bits}, {granularity} | {estimator} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.out))
        return
    extra = keywords(args.model_arg)
    net = timm_models.create(args.model, checkpoint=args.checkpoint, pretrained=False, **extra).float().eval()
    shared = {"model": args.model, "weights": weights_named(str(args.checkpoint)), "model_args": extra}
    shared |= {name: getattr(args, name) for name in ("seed", "images", "rtol")}
    done = lines(args.out)
    splits = {}
    for split in ("train", "test"):
        images, _ = fashion_mnist(args.fashion_mnist, split == "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        splits[split] = images[order[: args.images]]
    for bits, granularity, name in ((b, g, e) for b in args.bits for g in args.granularity for e in args.estimators):
        cell = shared | {"bits": bits, "granularity": granularity, "estimator": name}
        cell |= {} if name == "trace" else {"empirical_images": args.empirical_images, "most_draws": args.draws}
        if any("ratio" in line and all(line.get(key) == value for key, value in cell.items()) for line in done):
            continue
        found = {split: estimate(net, images, cell, args) for split, images in splits.items()}
        ratio = train_test_ratio(**found)
        line = cell | {split: one.to_dict() for split, one in found.items()}
        line |= {"ratio": ratio.value, "ratio_error": ratio.standard_error, "commit": commit()}
        append(args.out, [plain(line)])
        print(cell, ratio, *found.values(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
