"""Which models can be pruned: the smallest model of every module of timm, and ten models of other libraries.

    python scripts/compatibility.py --out results/compatibility.jsonl --table docs/compatibility.md

A model of timm runs as an encoder (`num_classes=0`), as a backbone (`features_only=True`) and as a classifier. One line
for each; what has a line is not run again. Every model runs in a process of its own with a limit of time and memory, so
that nothing it does stops the others. torch-pruning's example recipe runs on the same classifiers.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import multiprocessing
import platform
import re
import resource
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from common import append, commit, lines, make_parser, markdown
from torch import Tensor, nn

import jbrprune
from baselines.torch_pruning_shipped import find_permuted, prune_by_recipe
from jbrprune.budgets.budget import Floors, select
from jbrprune.budgets.cost import cost_model, count_macs
from jbrprune.errors import JBRError
from jbrprune.models import layers, timm_models
from jbrprune.models.preserve import copy_model, flatten_returned
from jbrprune.pruning.api import Info
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import masked_units, remove_units
from jbrprune.structure.verification import TOLERANCE

SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
CLASSES = 10
KINDS = {"encoder": {"num_classes": 0}, "features": {"features_only": True}, "classifier": {"num_classes": CLASSES}}
"""What a model of timm is made as, with which arguments."""
TARGET = 0.7
FLOORS = Floors(channels=1)
"""Small nets have layers of few channels."""
SATURATED = 1e4
"""Logits beyond it have a softmax without gradient."""
PACKAGES = ("torch", "timm", "torch-pruning")
PATIENCE = 20
"""Wall time in units of the processor time that a process may take: others may be using the machine."""
WORKS = ("budget", "deepest")
"""Statuses of a model that was pruned, and passed every check."""

Stage = Callable[[str], None]


# --- models ----------------------------------------------------------------------------------------


def find_smallest(module: str) -> str:
    """The model of a timm module with the fewest parameters."""

    def size(name: str) -> int:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=CLASSES)
        except Exception:  # some compute with values while they are made
            model = timm.create_model(name, num_classes=CLASSES)
        return sum(parameter.numel() for parameter in model.parameters())

    return min(timm.list_models(module=module), key=lambda name: (size(name), name))


def make(name: str, kind: str = "classifier") -> tuple[nn.Module, int]:
    """A model in eval mode with perturbed parameters, for the smallest images that it accepts; their size."""
    if kind == "foreign":
        torch.manual_seed(0)
        model = make_foreign()[name]().eval()
        perturb(model)
        return model, SIZES[0]
    try:
        timm.create_model(name, **KINDS[kind])
    except Exception as error:  # whatever timm raises where a module has no such models
        raise EndedError("not offered", f"{type(error).__name__}: {error}") from error
    why = []
    for size in SIZES:
        for options in ({"img_size": size}, {}):
            try:
                torch.manual_seed(0)
                model = jbrprune.create(name, pretrained=False, **KINDS[kind], **options).eval()
                with torch.no_grad():
                    model(torch.zeros(2, 3, size, size))
            except Exception as error:  # whatever a foreign constructor or forward raises: not this size
                why.append(f"{size} px: {type(error).__name__}: {error}"[:120])
                continue
            perturb(model)
            with torch.no_grad():
                largest = float(run(model, draw_images(size)).abs().max())
                for parameter in nn.ModuleList(layers.get_heads(model)).parameters() if kind == "classifier" else ():
                    parameter.div_(max(1, largest / SATURATED))  # huge logits saturate any softmax
            return model, size
    raise RuntimeError(f"{name} accepts no input: {'; '.join(why[-2:])}")


def make_foreign() -> dict[str, Callable[[], nn.Module]]:
    """Small models of other libraries, by distribution and name: segmenters, backbones, encoders, auxiliary heads."""
    import open_clip
    import transformers as hf
    from torchvision import models

    plain = {"weights": None, "weights_backbone": None}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "image_size": 64, "patch_size": 16}
    swin = {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 2, 4, 8], "window_size": 2, "image_size": 64}
    tower = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=16, image_size=64)

    segmenters = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    configurations = {
        "ViTForImageClassification": hf.ViTConfig(**sizes),
        "SwinForImageClassification": hf.SwinConfig(**swin),
        "Dinov2Model": hf.Dinov2Config(**sizes),
        "SegformerForSemanticSegmentation": hf.SegformerConfig(depths=[1] * 4, hidden_sizes=[16, 32, 48, 64]),
    }
    return {
        **{f"torchvision {name}": partial(getattr(models.segmentation, name), **plain) for name in segmenters},
        "torchvision fasterrcnn_resnet50_fpn": lambda: models.detection.fasterrcnn_resnet50_fpn(**plain).backbone,
        "torchvision googlenet": partial(models.googlenet, init_weights=False),
        **{f"transformers {name}": partial(getattr(hf, name), c) for name, c in configurations.items()},
        "open_clip_torch CLIP": lambda: open_clip.CLIP(32, tower, open_clip.CLIPTextCfg(layers=1)).visual,
    }


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Norms, scales, biases and statistics apart from ones and zeros; nothing is all but zero."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator) - 0.5

    for parameter in model.parameters():
        if parameter.dim() <= 1:
            parameter.add_(0.4 * noise(parameter))
        elif parameter.abs().max() < 1e-2:
            parameter.add_(0.2 * noise(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1 + noise(buffer))
        elif name.endswith("running_mean"):
            buffer.add_(0.2 * noise(buffer))


def draw_images(size: int, count: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, images: Tensor) -> Tensor:
    """``[B, V]`` all that a model returns."""
    return flatten_returned(model(images), len(images))


class EndedError(Exception):
    """Status and reason: a result that is not what it should be, or models that a module of timm does not offer."""


class Walk:
    """Where we are, what is known, how long each stage took.

    Attributes:
        known: What a line will hold.
        current: The stage.
    """

    def __init__(self, stage: Stage = lambda name: None) -> None:
        self.say, self.current, self.began = stage, "", time.perf_counter()
        self.known: dict[str, Any] = {}
        self.stages: dict[str, float] = {}

    def to(self, stage: str) -> None:
        """Go to the next stage."""
        now = time.perf_counter()
        if self.current:
            self.stages[self.current] = round(now - self.began, 1)
        self.current, self.began = stage, now
        self.say(stage)

    def outcome(self, status: str, reason: str = "") -> dict:
        """What became of the model."""
        stage = self.current
        self.stages[stage] = round(time.perf_counter() - self.began, 1)
        return {"status": status, "stage": stage, "reason": reason[:600], **self.known, "stages": self.stages}

    def finish(self, steps: Callable[[], dict], failed: str = "failed") -> dict:
        """The outcome of all steps, or of the error that ended them."""
        try:
            return steps()
        except EndedError as error:
            return self.outcome(*error.args)
        except Exception as error:  # it is this that is looked for
            refused = isinstance(error, JBRError) and self.current == "info"
            return self.outcome("refused" if refused else failed, f"{self.current}: {type(error).__name__}: {error}")


# --- jbrprune --------------------------------------------------------------------------------------


def prune_and_check(name: str, stage: Stage, kind: str = "classifier") -> dict:
    """Everything a user does with a model, checked on the way."""
    walk = Walk(stage)

    def steps() -> dict:
        walk.to("make")
        model, size = make(name, kind)
        walk.known["pixels"] = size
        return _walk_through(model, draw_images(size), walk, lean=kind in ("encoder", "features"))

    return walk.finish(steps)


def check(model: nn.Module, images: Tensor) -> dict:
    """The same for any model."""
    walk = Walk()
    return walk.finish(lambda: _walk_through(model, images, walk))


def _walk_through(model: nn.Module, images: Tensor, walk: Walk, *, lean: bool = False) -> dict:
    walk.to("info")
    listed = jbrprune.info(model, images[:2], floors=FLOORS)
    share = max(TARGET, listed.least_macs + 0.002)
    walk.known |= {"least": round(listed.least_macs, 4), "groups": len(listed.rows), "kept": _count_reasons(listed)}
    walk.known["output"] = listed.output.partition(": ")[2]
    if share >= 1:
        why = "what can be removed costs no more than 0.2 % of the MACs"
        return walk.outcome("refused", f"{why}. {_summarise(listed)}")
    options: dict = {"macs": share, "floors": FLOORS, "batch_size": 4, "progress": False}
    if not lean:
        walk.to("score")
        scores = jbrprune.score(model, images[:8], batch_size=4, progress=False)
        _check(all(bool(values.isfinite().all()) for values in scores.values().values()), "scores are not finite")
        _check(any(float(values.max()) > 0 for values in scores.values().values()), "every score is zero")
        cost = cost_model("macs", model, images[:2], scores.groups)  # the choice that `prune` makes is made here
        chosen = select(scores.values(), scores.groups, cost, share * cost.total, floors=FLOORS)
    walk.to("prune")
    result = jbrprune.prune(model, images, **({"steps": 1} if lean else {"criterion": scores}), **options)
    before, after = (count_all(m, images) for m in (model, result.model))
    walk.known["reached"] = round(after / before, 4)
    _check(after <= share * before * 1.0001, f"asked for {share:.4f} of the MACs, {after / before:.4f} are left")
    agreement = result.report.final
    walk.known["measured"] = agreement.of
    _check(agreement.distance < float("inf"), f"the report says {agreement}")
    walk.to("mask")
    if not lean:
        removed = {group: sorted(units.tolist()) for group, units in chosen.items() if len(units)}
        _check(removed == result.report.removed, "other units are gone than those of the lowest scores")
    _check_removal(model, result, images[:2])
    walk.to("load")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "model")
        loaded = jbrprune.load(Path(folder) / "model", model=None if timm_models.recipe(model) else model)
        _check_same_tensors(loaded, result.model, "saved and loaded")
        _check(torch.equal(run(loaded, images[:2]), run(result.model, images[:2])), "the loaded model's outputs differ")
    if not lean:
        walk.to("backward")
        missing = [_find_missing_gradients(copy_model(m), images[:2]) for m in (model, result.model)]
        _check(missing[0] == missing[1], f"no gradient reaches {sorted(missing[1] - missing[0])[:3]}")
        walk.to("export")
        walk.known["export"] = check_export(model, result.model, images[:2])
        walk.to("steps")
        result = jbrprune.prune(model, images, repair=None, steps=2, **options)
        twin = _check_removal(model, result, images[:2])
        _check_same_tensors(twin, result.model, "prune() and the removal of the same units")
        _check(result.report.kept <= share * 1.0001, f"in steps: {result.report.kept:.4f} of the MACs are left")
    return walk.outcome("budget") if listed.least_macs <= TARGET else walk.outcome("deepest", _summarise(listed))


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EndedError("wrong", otherwise)


def count_all(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one image."""
    return sum(count_macs(model, images[:1]).values())


def _check_removal(dense: nn.Module, result: jbrprune.PruneResult, images: Tensor) -> nn.Module:
    """Without the units that went the dense model computes what it does with them masked; returns it."""
    groups = find_groups(dense, images).groups
    chosen = {group: torch.tensor(units) for group, units in result.report.removed.items()}
    smaller = copy_model(dense)
    remove_units(smaller, groups, chosen)
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (smaller, result.model)]
    _check(shapes[0] == shapes[1], "prune() leaves other shapes than the removal of the same units")
    dense, twin, images = copy_model(dense).double(), copy_model(smaller).double(), images.double()
    with torch.no_grad():
        got = run(twin, images)
        with masked_units(dense, groups, chosen):
            masked = run(dense, images)
    apart = float((masked - got).abs().max() / masked.abs().max())
    _check(apart <= TOLERANCE, f"mask and removal differ by {apart:.1e}")
    return smaller


def _check_same_tensors(one: nn.Module, other: nn.Module, what: str) -> None:
    first, second = one.state_dict(), other.state_dict()
    _check(first.keys() == second.keys(), f"{what}: other tensors")
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    _check(not unequal, f"{what}: {', '.join(unequal[:3])} differ")


def _find_missing_gradients(model: nn.Module, images: Tensor) -> set[str]:
    run(model, images).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    _check(all(g is None or bool(g.isfinite().all()) for g in gradients.values()), "a gradient is not finite")
    return {name for name, gradient in gradients.items() if gradient is None}


@torch.no_grad()
def check_export(dense: nn.Module, smaller: nn.Module, images: Tensor) -> str:
    """``equal``, or why the dense model cannot be exported either."""
    try:
        program = torch.export.export(smaller, (images,))
    except Exception as error:  # if the dense model fails as well, pruning has no part in it
        try:
            torch.export.export(copy_model(dense), (images,))
        except Exception:
            return f"the dense model cannot be exported either: {type(error).__name__}"
        raise
    expected, got = run(smaller, images), run(program.module(), images)
    apart = float((expected - got).abs().max() / expected.abs().max())
    _check(apart < 1e-4, f"the exported program differs by {apart:.1e}")
    return "equal"


def _count_reasons(listed: Info) -> dict[str, int]:
    """Reason -> how many groups of channels it keeps; numbers and names left out."""
    plain = (re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", reason)) for reason in listed.skipped.values())
    return dict(Counter(reason[:160] for reason in plain).most_common())


def _summarise(listed: Info) -> str:
    expected = ("the classifier", "reaches the model's output")
    reasons = [f"{why} ({n})" for why, n in _count_reasons(listed).items() if why not in expected]
    can = f"{len(listed.rows)} groups can shrink, which leaves {listed.least_macs:.3f} of the MACs"
    return f"{can}; kept: {'; '.join(reasons[:3]) or 'what they cannot reach'}"


# --- torch-pruning ---------------------------------------------------------------------------------


def run_recipe(name: str, stage: Stage) -> dict:
    """torch-pruning's example for timm models, with the attributes set that its examples mean to set."""
    walk = Walk(stage)

    def steps() -> dict:
        walk.to("make")
        timm.layers.set_fused_attn(False)  # as in the examples; the process has nothing else to do
        model, size = make(name)
        images = draw_images(size, 2)
        before, dense = count_all(model, images), copy.deepcopy(model)
        walk.to("prune")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            next(prune_by_recipe(model, images))
        walk.to("forward")
        logits = run(model, images)
        walk.to("backward")
        logits.square().sum().backward()
        walk.to("count")
        walk.known["reached"] = round(count_all(model, images) / before, 4)
        if permuted := find_permuted(dense, model):
            raise EndedError("wrong", f"the weights of {permuted[0]} (and {len(permuted) - 1} more) are permuted")
        return walk.outcome("works" if walk.known["reached"] < 1 else "unchanged")

    return walk.finish(steps, failed="fails")


# --- lines -----------------------------------------------------------------------------------------


def run_module(kind: str, module: str, args: argparse.Namespace) -> dict:
    """Run one model, and torch-pruning's recipe if it is a classifier of timm, and say what happened."""
    began = time.perf_counter()
    versions = {name: version(name) for name in ((module.split()[0], "torch") if kind == "foreign" else PACKAGES)}
    known = {r["kind"]: r for r in lines(args.out) if (r["module"], r["versions"]) == (module, versions)}
    found = {"model": module if kind == "foreign" else next((r["model"] for r in known.values()), "")}
    if not found["model"]:
        found = _run_apart(lambda stage: {"model": find_smallest(module)}, args)
    model = found.get("model", "")
    ours = _run_apart(lambda stage: prune_and_check(model, stage, kind), args) if model else found
    recipe = {key: value for key, value in known.get(kind, {}).items() if key.startswith("recipe_")}
    if kind == "classifier" and not recipe:
        said = _run_apart(lambda stage: run_recipe(model, stage), args, died="fails") if model else found
        recipe = {f"recipe_{key}": value for key, value in said.items()}
    return {
        "kind": kind,
        "module": module,
        "model": model,
        **ours,
        **recipe,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _run_apart(task: Callable[[Stage], dict], args: argparse.Namespace, *, died: str = "failed") -> dict:
    """What a process of its own says; where it died or was stopped, how far it came."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.jsonl"
        child = multiprocessing.get_context("fork").Process(target=_run_limited, args=(task, said, args))
        child.start()
        child.join(PATIENCE * args.seconds)
        if child.is_alive():
            child.kill()
            child.join()
        records = lines(said)
    if records and records[-1].keys() != {"stage"}:
        return records[-1]
    stage = records[-1]["stage"] if records else "start"
    limits = f"limits: {args.seconds} s of processor time, {args.memory} GiB"
    return {"status": died, "stage": stage, "reason": f"ended with code {child.exitcode} in {stage}; {limits}"}


def _run_limited(task: Callable[[Stage], dict], said: Path, args: argparse.Namespace) -> None:
    """One JSON line for every stage, then one for the outcome."""
    memory, seconds = int(args.memory * 2**30), int(args.seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    torch.set_num_threads(1)
    append(said, [task(lambda stage: append(said, [{"stage": stage}]))])


# --- the page --------------------------------------------------------------------------------------


def latest(records: Iterable[dict]) -> dict[tuple[str, str], dict]:
    """The last line of every kind and module."""
    return {(record["kind"], record["module"]): record for record in records}


def make_tables(found: dict[tuple[str, str], dict]) -> dict[str, str]:
    """The tables of the page, by name."""
    kinds = {kind: [r for (k, _), r in sorted(found.items()) if k == kind] for kind in ("foreign", *KINDS)}
    statuses, counted = [*WORKS, "refused", "not offered", "failed", "wrong"], []
    for kind, records in kinds.items():
        counts = Counter(r["status"] for r in records)
        runs = sorted({f"{r['date']} ({r['commit']})" for r in records})
        versions = sorted({", ".join(map(" ".join, r["versions"].items())) for r in records})
        counted.append(
            [kind, len(records), *(counts[status] for status in statuses), ", ".join(runs), "; ".join(versions)]
        )
    others = [
        [r["model"], r["status"], _left(r), _plain(r), _plain(r, "output").partition(". ")[0]] for r in kinds["foreign"]
    ]
    recipe = Counter(r["recipe_status"] for r in kinds["classifier"])
    modules = sorted({module for kind, module in found if kind in KINDS})
    rows = [_row(module, [found.get((kind, module), {}) for kind in KINDS]) for module in modules]
    columns = [name for kind in (*KINDS, "recipe") for name in (kind, "left")]
    return {
        "summary": markdown(["what", "lines", *statuses, "run", "with"], counted),
        "other libraries": markdown(["model", "status", "left", "why no deeper, or what happened", "output"], others),
        "timm": markdown(["timm module", "model", "px", *columns, "why no deeper, or what happened"], rows),
        "recipe": markdown(["status", "modules"], recipe.most_common()),
    }


def fill_in(page: str, tables: dict[str, str]) -> str:
    """A page with tables behind the comments that name them, in the place of what stood there."""
    for name, table in tables.items():
        page = re.sub(rf"(<!-- {name} -->\n)(\|.*\n)*", lambda found, table=table: f"{found[1]}{table}\n", page)
    return page


def _left(record: dict) -> str:
    return f"{record['reached']:.2f}" if "reached" in record else ""


def _plain(record: dict, field: str = "reason", length: int = 240) -> str:
    text = record.get(field, "").replace("|", "/").replace("<", "(").replace(">", ")")
    return textwrap.shorten(text, length, placeholder="…")


def _row(module: str, records: Sequence[dict]) -> list[str]:
    """One module as encoder, backbone and classifier, and after the recipe; one reason for several is said once."""
    known = [r for r in records if r]
    recipe = {key.removeprefix("recipe_"): value for key, value in records[-1].items() if key.startswith("recipe_")}
    cells = [f"`{module}`", f"`{known[0]['model']}`", str(max(r.get("pixels", 0) for r in known) or "")]
    for record in (*records, recipe):
        cells += [record.get("status", "not run"), _left(record)]
    why = {_plain(r): r["kind"] for r in known if r["reason"]}
    why |= {_plain(recipe, length=110): "recipe"} if recipe.get("status") == "fails" else {}
    return [*cells, "; ".join(f"{kind}: {text}" for text, kind in why.items())]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/compatibility.jsonl"), help="file of JSON lines")
    parser.add_argument("--table", type=Path, help="fill the tables of this page from the lines")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--kinds", nargs="*", default=["foreign", *KINDS], help="what is run; what took least first")
    parser.add_argument("--modules", nargs="*", default=[], help="modules of timm, or other models; default: all")
    parser.add_argument("--again", nargs="*", default=[], help="statuses that are run again, on another commit")
    parser.add_argument("--seconds", type=float, default=300, help="processor time of each process")
    parser.add_argument("--memory", type=float, default=4, help="limit of each process in GiB")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of foreign models
    torch.set_num_threads(1)  # before the first process is forked
    modules = {kind: timm.list_modules() if kind in KINDS else list(make_foreign()) for kind in args.kinds}
    if unknown := sorted(set(args.modules) - {module for known in modules.values() for module in known}):
        raise SystemExit(f"timm has no module {', '.join(unknown)}; see timm.list_modules().")
    old = latest(lines(args.out))
    done = {key for key, r in old.items() if r["status"] not in args.again or r["commit"] == commit()}
    took = {module: sum(r.get("stages", {}).values()) for (_, module), r in old.items()}
    todo = [(kind, module) for kind, known in modules.items() for module in known]
    for kind, module in sorted(todo, key=lambda pair: took.get(pair[1], 0)) if not args.table_only else ():
        if (kind, module) not in done and module in (args.modules or [module]):
            line = run_module(kind, module, args)
            append(args.out, [line])
            print(f"{kind} {module}: {line['status']} ({line['seconds']:.0f} s) {line['reason'][:150]}", flush=True)
    if args.table:
        args.table.write_text(fill_in(args.table.read_text(), make_tables(latest(lines(args.out)))))


if __name__ == "__main__":
    main()
