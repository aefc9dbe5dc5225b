"""Golden values: scores, selections and pruned models of seven nets in float64, written by a code that is trusted.

``python tests/golden.py --write`` (in the root of the repository) writes ``tests/golden_values/`` anew. Every call into
jbrprune is in the functions of the first part. Weights, statistics and images come from seeded generators, not from
timm's initialisation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import jbrprune
from jbrprune.budgets.budget import Floors, select
from jbrprune.budgets.cost import cost_model
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.groups import Group, Selection
from jbrprune.structure.slicing import remove_units
from jbrprune.structure.verification import verify_groups

Batches = list[tuple[Tensor, Tensor]]
"""Images ``[B, 3, 32, 32]`` and labels ``[B]``."""
Part = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, which are close or not, and facts, which are equal or not."""

# Every call into jbrprune.


def groups_of(model: nn.Module, images: Tensor) -> tuple[Group, ...]:
    """Units that can be removed, residual width included."""
    return verify_groups(model, images, find_groups(model, images, width=True)).groups


def channel_scores(
    model: nn.Module, batches: Batches, groups: Sequence[Group], objective: str, site: str, statistic: str
) -> Mapping[str, Tensor]:
    """Group name -> ``[units]`` scores; ``batched`` takes the mean of 8 samples."""
    return Relevance(objective, site, statistic, batch=8)(model, batches, groups).values()


def select_units(
    model: nn.Module, images: Tensor, groups: Sequence[Group], scores: Mapping[str, Tensor], macs: float
) -> Selection:
    """Group name -> units to remove, for a share of the multiply-accumulates."""
    account = cost_model("macs", model, images, groups)
    return select(scores, groups, account, macs * account.total, floors=Floors(channels=1))


def remove(model: nn.Module, groups: Sequence[Group], selection: Selection) -> None:
    """Remove units in place."""
    remove_units(model, groups, selection)


def prune_channels(model: nn.Module, images: Tensor, seed: int) -> tuple[nn.Module, dict[str, list[int]], list[str]]:
    """A pruned copy, group name -> units of the dense model that are gone, and the repair of every step."""
    result = jbrprune.prune(model, images, macs=0.6, steps=3, floors=Floors(width=True), seed=seed, progress=False)
    repairs = [step.repair if step.unrepaired.kl > 1e-12 else "nothing to repair" for step in result.report.steps]  # type: ignore[union-attr]
    return result.model, dict(result.report.removed), repairs


def sparsify_weights(
    model: nn.Module, images: Tensor, goal: float | str, repair: str | None, seed: int
) -> tuple[nn.Module, list[str]]:
    """A copy with zeros, and the repair of every step; the goal is a sparsity or a pattern."""
    target = {"pattern": goal} if isinstance(goal, str) else {"sparsity": goal}
    result = jbrprune.sparsify(model, images, **target, repair=repair, seed=seed, progress=False)  # type: ignore[arg-type]
    return result.model, [step.repair for step in result.report.steps]


def scores_of_weights(model: nn.Module, batches: Batches, objective: str, statistic: str) -> Mapping[str, Tensor]:
    """Parameter name -> scores in the parameter's shape; ``batched`` takes the mean of 8 samples."""
    return weight_scores(model, batches, Relevance(objective, statistic=statistic, batch=8)).values()


# Nets and images.

NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: timm.create_model("resnet10t", num_classes=10, channels=(16, 24, 32, 48)),
    "depthwise": lambda: timm.create_model("mobilenetv2_050", num_classes=10),
    "excited": lambda: timm.create_model("test_efficientnet", num_classes=10),  # depthwise as well, and fast
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=4
    ),
    "grouped": lambda: timm.create_model("regnetx_002", num_classes=10),
    "resnet50": lambda: timm.create_model("resnet50", num_classes=10),
}
SEEDS = (0, 1, 2)
SMALL = [("residual", 0), ("excited", 0), ("convnext", 0), ("vit", 0)]
WEIGHTS_OF = ("residual", "convnext", "vit")
FOLDER = Path(__file__).parent / "golden_values"

OBJECTIVES = ("pseudo_label", "predicted_logit", "margin", "label", "projection")
WAYS = [(site, statistic) for site in ("consumer", "all") for statistic in ("second_moment", "batched")]
WAYS.append(("consumer", "mean_replaced"))


def make_net(name: str, seed: int) -> nn.Module:
    """A net in float64 and eval mode, in which no scale, bias or statistic is trivial and logits are of order one."""
    torch.manual_seed(seed)
    model = NETS[name]().double().eval()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode()))

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_mean"):
                tensor.copy_(0.1 * normal(tensor))
            elif key.endswith("running_var"):
                tensor.copy_(1 + 0.2 * normal(tensor).clamp(-2, 2))
            elif tensor.dim() > 1:
                tensor.copy_(normal(tensor) * math.sqrt(2 / tensor[0].numel()))
            elif tensor.is_floating_point():
                tensor.copy_(0.1 * normal(tensor) if key.endswith("bias") else 1 + 0.2 * normal(tensor))
        scale = float(model(make_images(40, seed)).std())
        for parameter in model.get_classifier().parameters():  # type: ignore[operator]
            parameter.mul_(2.0 ** -round(math.log2(scale)))  # a power of two: exact
    return model


def make_images(count: int, seed: int) -> Tensor:
    """``[count, 3, 32, 32]`` coarse shapes and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.5 * noise


def make_batches(seed: int, batch_size: int) -> Batches:
    """12 images with labels."""
    labels = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(seed))
    return list(zip(make_images(12, seed).split(batch_size), labels.split(batch_size), strict=True))


# What is kept. Keys that end in ``digest`` hold ``[names, 3]``.


def digest(values: Mapping[str, Tensor]) -> Tensor:
    """``[names, 3]``: sum, sum with fixed random factors in [0.5, 1.5), and largest entry of every tensor."""
    rows = []
    for name, value in values.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        factors = 0.5 + torch.rand(value.numel(), generator=generator, dtype=torch.float64)
        flat = value.detach().double().flatten()
        rows.append(torch.stack([flat.sum(), (flat * factors).sum(), flat.max()]))
    return torch.stack(rows)


def scores_part(net: str, seed: int, batch_size: int = 5) -> Part:
    """Scores of channels."""
    model, batches = make_net(net, seed), make_batches(seed, batch_size)
    groups = groups_of(model, batches[0][0][:2])
    tensors: dict[str, Tensor] = {}
    for objective in OBJECTIVES:
        for site, statistic in WAYS:
            scores = channel_scores(model, batches, groups, objective, site, statistic)
            scores = {group.name: scores[group.name] for group in groups}
            tensors[f"{objective}/{site}/{statistic}/digest"] = digest(scores)
            if (net, seed) == ("residual", 0):
                tensors[f"{objective}/{site}/{statistic}/scores"] = torch.cat(list(scores.values()))
    kinds = {group.name: group.kind for group in groups}
    return tensors, {"kinds": kinds, "sizes": {group.name: group.size for group in groups}}


def channels_part(net: str, seed: int, batch_size: int = 5) -> Part:
    """Selections of one step, and a whole run of three steps."""
    batches, images = make_batches(seed, batch_size), make_images(40, seed)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    dense, example = make_net(net, seed), images[:2]
    groups = groups_of(dense, example)
    scores = channel_scores(dense, batches, groups, "pseudo_label", "consumer", "second_moment")
    for macs in (0.7, 0.4):
        model = copy.deepcopy(dense)
        selection = select_units(model, example, groups, scores, macs)
        remove(model, groups, selection)
        tensors[f"{macs}/logits"] = logits_of(model, seed)
        removed = {name: units.tolist() for name, units in selection.items()}
        facts[str(macs)] = {"removed": bits(removed), "shapes": shapes(model)}
    model, removed, repairs = prune_channels(dense, images, seed)
    tensors["run/logits"] = logits_of(model, seed)
    facts["run"] = {"removed": bits(removed), "shapes": shapes(model), "repairs": repairs}
    return tensors, facts


def weights_part(net: str, seed: int, batch_size: int = 5) -> Part:
    """Scores of single weights, and runs that set them to zero."""
    model, batches, images = make_net(net, seed), make_batches(seed, batch_size), make_images(40, seed)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for objective in ("projection", "pseudo_label"):
        for statistic in ("second_moment", "batched", "signed"):
            scores = scores_of_weights(model, batches, objective, statistic)
            facts["sizes"] = {name: scores[name].numel() for name in sorted(scores)}
            tensors[f"{objective}/{statistic}/digest"] = digest({name: scores[name] for name in sorted(scores)})
    for goal, repair in ((0.8, None), ("2:4", None), (0.8, "auto")):
        run = f"{goal}/{repair or 'plain'}"
        sparse, repairs = sparsify_weights(model, images, goal, repair, seed)
        zeros = {name: (sparse.get_parameter(name) == 0).double() for name in sorted(scores)}
        tensors[f"{run}/logits"] = logits_of(sparse, seed)
        tensors[f"{run}/zeros/digest"] = digest(zeros)
        facts[run] = {"zeros": {name: int(zero.sum()) for name, zero in zeros.items()}, "repairs": repairs}
    return tensors, facts


PARTS = {"scores": scores_part, "channels": channels_part, "weights": weights_part}
CASES = {
    (part, net, seed): (net, seed) in SMALL and (part, net) != ("weights", "convnext")
    for net in NETS
    for seed in SEEDS
    for part in PARTS
    if part != "weights" or net in WEIGHTS_OF
}
"""Part, net, seed -> whether it is quick."""


def bits(removed: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Group name -> hexadecimal number with bit u set where unit u is gone; sorted by name."""
    return {name: f"{sum(1 << int(unit) for unit in removed[name]):x}" for name in sorted(removed) if removed[name]}


def shapes(model: nn.Module) -> dict[str, str]:
    """Name -> shape of every tensor with more than one dimension."""
    return {name: "x".join(map(str, t.shape)) for name, t in model.state_dict().items() if t.dim() > 1}


def logits_of(model: nn.Module, seed: int) -> Tensor:
    """``[4, 10]``, on images that nothing else sees."""
    with torch.no_grad():
        return model(make_images(4, seed + 100))


# Comparing and writing.


def part_of(case: str, kept: Part) -> Part:
    """The tensors and facts of one case, such as ``residual/0/scores``."""
    tensors, facts = kept
    return {key.removeprefix(f"{case}/"): t for key, t in tensors.items() if key.startswith(f"{case}/")}, facts[case]


def compare(case: str, found: Part, kept: Part) -> list[str]:
    """What differs: scores by more than 1e-12, logits by more than 1e-6 of the largest, facts at all.

    Logits of repaired sparse weights may differ by 1e-2: conjugate gradients stop early there, and rounding (another
    number of threads) moves where they are then.
    """
    golden, facts = part_of(case, kept)
    problems = [
        f"{case}: {name} is {value}, golden {facts.get(name)}"
        for name, value in found[1].items()
        if value != facts.get(name)
    ]
    if found[0].keys() != golden.keys() or found[1].keys() != facts.keys():
        problems.append(f"{case}: other keys")
    sizes: dict[str, int] = facts.get("sizes", {})
    for key in found[0].keys() & golden.keys():
        limit = 1e-2 if key == "0.8/auto/logits" else 1e-6 if key.endswith("logits") else 1e-12
        error = relative_error(found[0][key], golden[key], list(sizes.values()) if key.endswith("digest") else None)
        if not error <= limit:
            problems.append(f"{case}/{key}: differs by {error:.1e}, allowed are {limit:.0e}")
    return problems


def relative_error(found: Tensor, golden: Tensor, sizes: Sequence[int] | None = None) -> float:
    """Largest difference, relative to the largest entry.

    Args:
        found: As computed.
        golden: As kept.
        sizes: Of a digest, the entries of every tensor in it: rounding in a sum of n grows with sqrt(n).
    """
    if found.shape != golden.shape:
        return math.inf
    scale = golden.abs().max()
    if sizes is not None:
        largest, root = golden[:, 2:], torch.tensor(sizes, dtype=torch.float64).sqrt()[:, None]
        scale = torch.cat([largest * root, largest * root, largest], 1)
    return float(((found - golden).abs() / scale.clamp_min(1e-300)).max())


def read() -> Part:
    """The tensors and facts that are kept."""
    return load_file(FOLDER / "values.safetensors"), json.loads((FOLDER / "facts.json").read_text())


def write() -> None:
    """Compute everything and keep it."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, object] = {"versions": {"torch": torch.__version__, "timm": timm.__version__}}
    for part, net, seed in CASES:
        case = f"{net}/{seed}/{part}"
        values, facts[case] = PARTS[part](net, seed)
        tensors |= {f"{case}/{key}": value.contiguous() for key, value in values.items()}
        print(case, flush=True)
    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / "values.safetensors")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    (FOLDER / "facts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="replace tests/golden_values/")
    parser.parse_args()
    write()
