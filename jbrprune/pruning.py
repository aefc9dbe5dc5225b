"""prune(): the one call."""

from __future__ import annotations

import copy
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jbrprune import architectures, guest, layers, zoo
from jbrprune import checkpoint as files
from jbrprune import data as loading
from jbrprune.batches import Batch, concatenated, count, materialise, rebatched, with_reference
from jbrprune.budget import Budget
from jbrprune.cost import axis_widths, count_macs
from jbrprune.errors import ArgumentError, BudgetError, DataError, ModelError
from jbrprune.groups import Axis, Group, Selection, removed_channels
from jbrprune.measure import Agreement, agreement_on, bytes_of, check_weights, latency, parameters_of, predict
from jbrprune.relevance import check_arguments, relevance_scores
from jbrprune.removal import remove_units, tried
from jbrprune.repair import METHODS, Targets, dense_targets, repaired
from jbrprune.report import LayerRow, Report, Size, StepRow
from jbrprune.scoring import resolved
from jbrprune.selection import Floors, reachable, select
from jbrprune.units import Found, find_groups

log = logging.getLogger(__name__)

FEWEST_TO_HOLD_BACK = 10
"""With fewer images nothing is held back, so nothing is repaired and no agreement is measured."""


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What `prune` hands over.

    Attributes:
        model: The smaller model, plain PyTorch, in eval mode.
        report: What was done and what it cost; print it.
        recipe: How timm makes the dense model; None for other models.
        config: timm's preprocessing for this model; None for other models.
    """

    model: nn.Module
    report: Report
    recipe: zoo.Recipe | None = None
    config: Mapping[str, object] | None = None

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model into a directory (safetensors and JSON); see `jbrprune.checkpoint.save`."""
        files.save(
            path,
            self.model,
            recipe=self.recipe,
            config=self.config,
            provenance=self.report.provenance,
            report=self.report.to_dict(),
            overwrite=overwrite,
        )


@dataclass(frozen=True)
class Settings:
    """The arguments of `prune`, checked."""

    budget: Budget
    schedule: tuple[float, ...]
    repair: tuple[str, ...]
    objective: str
    site: str
    statistic: str
    batch: int
    confidence: float
    ignore: tuple[str, ...]
    width: bool
    floors: Floors
    ridge: float
    batch_size: int
    seed: int
    autocast: torch.dtype | None
    progress: bool

    def described(self) -> dict[str, object]:
        """What of it belongs into a report."""
        shown = {
            "steps": len(self.schedule),
            "repair": list(self.repair),
            "objective": self.objective,
            "site": self.site,
            "statistic": self.statistic,
            "confidence": self.confidence,
            "ignore": list(self.ignore),
            "width": self.width,
            **asdict(self.floors),
            "ridge": self.ridge,
        }
        return shown | ({"batch": self.batch} if self.statistic == "batched" else {})


@dataclass(frozen=True, eq=False)
class _Images:
    """Calibration images with the dense model's logits, by what they are for.

    Attributes:
        score: Units are scored on these (repair and gate together).
        repair: The repair is fitted on these.
        gate: A repair is kept only if it helps on these.
        heldout: Agreement is reported on these and on nothing else.
        described: Which images the held-out ones are.
    """

    score: list[Batch]
    repair: list[Batch]
    gate: list[Batch]
    heldout: list[Batch]
    described: str


@dataclass(eq=False)
class _State:
    """The model on its way.

    Attributes:
        model: Shrinks.
        example: Two images on the model's device.
        found: The units of the dense model.
        groups: The units that are left.
        kept: Axis -> channels of the dense model that are left.
        dense_sizes: Group -> units in the dense model.
        whole: Cost of the dense model in the unit of the budget.
        targets: What repairs aim at.
        seconds: Part of the work -> time spent.
    """

    model: nn.Module
    example: Tensor
    found: Found
    groups: tuple[Group, ...]
    kept: dict[Axis, Tensor]
    dense_sizes: dict[str, int]
    whole: float
    targets: Targets | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part of the work."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def remove(self, selection: Selection) -> None:
        """Remove units, and remember which channels of the dense model are left."""
        for axis, gone in removed_channels(self.groups, selection).items():
            stays = torch.ones(len(self.kept[axis]), dtype=torch.bool)
            stays[gone] = False
            self.kept[axis] = self.kept[axis][stays]
        self.groups = remove_units(self.model, self.groups, selection)


def prune(
    model: nn.Module | str,
    data: object,
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    steps: int | None = None,
    repair: str | Sequence[str] | None = "auto",
    objective: str = "pseudo_label",
    site: str = "consumer",
    statistic: str = "second_moment",
    batch: int = 128,
    confidence: float = 0.0,
    ignore: Sequence[str] = (),
    width: bool = False,
    floor: float = 0.0,
    min_channels: int = 8,
    round_to: int = 1,
    images: int | None = 512,
    eval_data: object = None,
    eval_images: int | None = None,
    ridge: float = 1e-2,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    measure_latency: bool = True,
    inplace: bool = False,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    **model_arguments: object,
) -> PruneResult:
    r"""Make a trained model smaller, without labels and without training.

    Units (channels, heads) are ranked by relevance per cost,
    s_u / cost_u with s_u = E_x[(m(x)^T J_u(x) w_u)^2], and removed in steps; after every step the model is
    repaired without training and scored again.

    Args:
        model: A timm name (its pretrained weights are fetched) or any module ``[B, C, H, W] -> [B, K]``.
        data: Unlabelled images: a folder, a tensor, a Dataset, a DataLoader, or any iterable of batches. Labels, if
            there are any, are used to report accuracy (and by ``objective="label"``), for nothing else.
        macs: Share of the multiply-accumulates to keep. Give exactly one of macs, params, channels.
        params: Share of the parameters to keep.
        channels: Share of the removable channels to keep (ranked by score alone, as in the paper).
        steps: Number of steps; default one for every 5 % of the dense cost.
        repair: ``"auto"`` (try what applies, keep what helps on images held back), one or several of
            ``"batch_norm"``, ``"mean_shift"``, ``"least_squares"``, or None.
        objective: ``pseudo_label``, ``predicted_logit``, ``margin``, ``label`` or ``projection``.
        site: ``consumer`` or ``all``; see `jbrprune.relevance.relevance_scores`.
        statistic: ``second_moment``, ``batched`` or ``mean_replaced``.
        batch: Samples per batch of ``statistic="batched"``.
        confidence: Score only on images whose largest dense probability exceeds this.
        ignore: Globs of module names that keep their width.
        width: Also prune the residual width of transformers and ConvNeXt. A LayerNorm over fewer channels
            computes other statistics: its output changes even if the removed channels were zero.
        floor: Share of every group's width that stays.
        min_channels: Channels of every group that stay, where it has as many.
        round_to: Kept widths are multiples of this.
        images: Calibration images to read from ``data``; None: all. They are kept in memory.
        eval_data: Images to measure the agreement on; default: a fifth of the calibration images is held out.
        eval_images: Images to read from ``eval_data``; None: all.
        ridge: Strength of the ridge of ``least_squares``, relative to the mean square of the inputs.
        batch_size: Images per pass.
        seed: Seeds the split of the images and everything random.
        autocast: Low-precision dtype for scoring, such as ``torch.bfloat16``.
        device: Where to work; default: where the model is.
        measure_latency: Time the dense and the pruned model.
        inplace: Shrink the given model itself, at the very end; until then, and after an exception, it is untouched.
        progress: Show progress bars.
        checkpoint: Local weights for a timm name, instead of the pretrained ones.
        **model_arguments: For a timm name, passed to ``timm.create_model``.

    Returns:
        `PruneResult`.

    Raises:
        ArgumentError: An argument has no meaning.
        BudgetError: No budget, two budgets, or one that the floors do not allow.
        DataError: The images cannot be used.
        ModelError: The model cannot be pruned as it is.
        NonFiniteError: NaN or Inf in weights, images or logits.

    Example:
        >>> import torch
        >>> images = torch.randn(20, 3, 32, 32)
        >>> result = prune("resnet10t", images, macs=0.7, pretrained=False, progress=False)
        >>> result.report.kept <= 0.7
        True

    Source:
        Arpit, arXiv 2512.11089.
    """
    budget = Budget.of(macs=macs, params=params, channels=channels)
    settings = Settings(
        budget=budget,
        schedule=tuple(budget.schedule(steps)),
        repair=_methods(repair),
        objective=objective,
        site=site,
        statistic=statistic,
        batch=batch,
        confidence=confidence,
        ignore=tuple(ignore),
        width=width,
        floors=Floors(floor, min_channels, round_to),
        ridge=ridge,
        batch_size=batch_size,
        seed=seed,
        autocast=autocast,
        progress=progress,
    )
    check_arguments(objective, site, statistic, batch, confidence)
    dense = resolved(model, checkpoint, model_arguments)
    _check_model(dense)
    started = time.perf_counter()
    dense = copy.deepcopy(dense).to(device or guest.device_of(dense)).eval()
    prepared = _prepared(dense, data, eval_data, images, eval_images, settings)
    state = _start(dense, prepared, settings)
    rows = [
        _step(state, prepared, settings, number, share)
        for number, share in enumerate(tqdm(settings.schedule, "pruning", unit="step", disable=not progress, leave=False), 1)
    ]
    report = _report(_name(dense), dense, state, prepared, settings, rows, measure_latency)
    report = replace(report, seconds={**state.seconds, "total": time.perf_counter() - started})
    recipe = zoo.recipe(dense)
    config = zoo.data_config(dense) if recipe else None
    if inplace and isinstance(model, nn.Module):
        _transplant(state.model, model)
        return PruneResult(model, report, recipe, config)
    return PruneResult(state.model, report, recipe, config)


def _name(model: nn.Module) -> str:
    recipe = zoo.recipe(model)
    return recipe.name if recipe else type(model).__name__


def _check_model(model: nn.Module) -> None:
    architectures.refuse_masked(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: relevances and repairs need full precision. Call "
                "model.float(), prune, and call .half() afterwards; autocast=torch.bfloat16 makes scoring cheap."
            )
    check_weights(model)


def _methods(repair: str | Sequence[str] | None) -> tuple[str, ...]:
    wanted = () if repair is None else (repair,) if isinstance(repair, str) else tuple(repair)
    unknown = [method for method in wanted if method not in (*METHODS, "auto")]
    if unknown or ("auto" in wanted and len(wanted) > 1):
        raise ArgumentError(f"repair must be 'auto', None, or some of {', '.join(METHODS)}; got {repair!r}.")
    return wanted


def _prepared(
    model: nn.Module, data: object, eval_data: object, images: int | None, eval_images: int | None, settings: Settings
) -> _Images:
    """Read the images once, let the dense model look at them, and say what each is for."""
    for what, number in (("images", images), ("eval_images", eval_images)):
        if number is not None and number < 1:
            raise ArgumentError(f"{what} must be at least 1, got {number}.")
    calibration = _read(model, data, images, settings)
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(settings.seed))
    calibration = calibration.map(lambda tensor: tensor[order])
    fifth = len(calibration) // 5 if len(calibration) >= FEWEST_TO_HOLD_BACK else 0
    heldout = [] if eval_data is None else [_read(model, eval_data, eval_images, settings)]
    described = f"{len(heldout[0])} images of eval_data" if heldout else f"{fifth} calibration images held out, unused otherwise"
    if eval_data is None and fifth:
        heldout = [calibration.map(lambda tensor: tensor[:fifth])]
        calibration = calibration.map(lambda tensor: tensor[fifth:])
    cut = len(calibration) - fifth
    parts = (calibration, calibration.map(lambda t: t[:cut]), calibration.map(lambda t: t[cut:]))
    score, repair, gate = (rebatched([part], settings.batch_size) if len(part) else [] for part in parts)
    return _Images(score, repair, gate, rebatched(heldout, settings.batch_size) if heldout else [], described)


def _read(model: nn.Module, data: object, images: int | None, settings: Settings) -> Batch:
    """Images in the model's precision, with the dense model's logits."""
    opened = loading.open_data(data, model, batch_size=settings.batch_size)
    batches = materialise(opened, images=images, batch_size=settings.batch_size)
    parameter = guest.first_tensor(model)
    if parameter is not None:
        batches = [replace(batch, images=batch.images.to(parameter.dtype)) for batch in batches]
    _check_runs(model, batches[0].images)
    return concatenated(with_reference(batches, predict(model, batches, progress=settings.progress)))


def _check_runs(model: nn.Module, images: Tensor) -> None:
    """The model accepts these images."""
    size = zoo.image_size(model)
    wanted = f" It was made for {' x '.join(map(str, size))} (channels, height, width)." if size else ""
    if size and images.shape[1] != size[0]:
        raise DataError(f"The images have {images.shape[1]} channels, shape {tuple(images.shape)}.{wanted}")
    try:
        with guest.visiting(model):
            model(images[:1].to(guest.device_of(model)))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise DataError(
            f"{type(model).__name__} does not run on images of shape {tuple(images.shape)}: {error}.{wanted}"
        ) from error


def _start(dense: nn.Module, prepared: _Images, settings: Settings) -> _State:
    """Find the units, see that the budget can be reached, and record what repairs aim at."""
    work = copy.deepcopy(dense)
    example = prepared.score[0].images
    example = (example if len(example) > 1 else example.repeat(2, 1, 1, 1))[:2].to(guest.device_of(dense))
    clock = time.perf_counter()
    found = tried(work, example, find_groups(work, example, ignore=settings.ignore, width=settings.width), seed=settings.seed)
    dense_sizes = {group.name: group.size for group in found.groups}
    account = settings.budget.account(work, example, found.groups)
    whole = account.total
    _check_reachable(settings, reachable(found.groups, account, settings.floors, dense_sizes) / whole)
    full = axis_widths(work, found.groups)
    state = _State(work, example, found, found.groups, {axis: torch.arange(n) for axis, n in full.items()}, dense_sizes, whole)
    state.seconds["units"] = time.perf_counter() - clock
    if settings.repair and prepared.gate:
        with state.timed("repair"):
            state.targets = dense_targets(dense, prepared.repair, [axis[0] for axis in full if axis[1] == "in"])
    return state


def _check_reachable(settings: Settings, least: float) -> None:
    budget = settings.budget
    if least > budget.share:
        raise BudgetError(
            f"{budget.kind}={budget.share} cannot be reached: with every group at its floor {least:.3f} of the dense "
            f"model's {budget.kind} are left. Ask for at least {least + 0.001:.3f}, lower floor= or min_channels=, or ignore less."
        )


def _step(state: _State, prepared: _Images, settings: Settings, number: int, share: float) -> StepRow:
    """Score, select, remove, repair."""
    clock = time.perf_counter()
    with state.timed("scoring"):
        scores = relevance_scores(
            state.model,
            prepared.score,
            state.groups,
            objective=settings.objective,
            site=settings.site,
            statistic=settings.statistic,
            batch=settings.batch,
            confidence=settings.confidence,
            autocast=settings.autocast,
            seed=settings.seed + number,
            progress=settings.progress,
        )
    with state.timed("selection"):
        account = settings.budget.account(state.model, state.example, state.groups)
        selection = select(
            scores.values(),
            state.groups,
            account,
            share * state.whole,
            floors=settings.floors,
            dense_sizes=state.dense_sizes,
            per_cost=settings.budget.per_cost,
        )
    with state.timed("removal"):
        state.remove(selection)
    with state.timed("evaluation"):
        before = _agreement(state.model, prepared.heldout)
    with state.timed("repair"):
        kept = "none"
        if state.targets is not None:
            kept = repaired(state.model, prepared.repair, prepared.gate, state.targets, state.kept, settings.repair, ridge=settings.ridge)
    with state.timed("evaluation"):
        after = before if kept == "none" else _agreement(state.model, prepared.heldout)
    macs = sum(count_macs(state.model, state.example).values())
    log.info("step %d: %s", number, after)
    return StepRow(number, share, macs, parameters_of(state.model), time.perf_counter() - clock, before, after, kept)


def _agreement(model: nn.Module, batches: list[Batch]) -> Agreement | None:
    return agreement_on(model, batches) if batches else None


def _report(
    name: str,
    dense: nn.Module,
    state: _State,
    prepared: _Images,
    settings: Settings,
    rows: Sequence[StepRow],
    measure_latency: bool,
) -> Report:
    last = rows[-1]
    return Report(
        model=name,
        budget={settings.budget.kind: settings.budget.share},
        settings=settings.described() | {"images": count(prepared.score)},
        dense=_size(dense, state.example, measure_latency),
        pruned=_size(state.model, state.example, measure_latency),
        layers=_layer_rows(dense, state),
        steps=tuple(rows),
        unrepaired=last.unrepaired,
        repaired=last.repaired,
        heldout=prepared.described,
        provenance=_provenance(settings.seed, guest.device_of(dense)),
        notes=_notes(state, prepared, settings),
    )


def _size(model: nn.Module, example: Tensor, timed: bool) -> Size:
    macs = sum(count_macs(model, example).values())
    return Size(macs, parameters_of(model), bytes_of(model), latency(model, example[:1]) if timed else None)


def _layer_rows(dense: nn.Module, state: _State) -> tuple[LayerRow, ...]:
    """One row per layer whose output is as wide as its units say: producers, and the heads of attentions."""
    before = {axis: n for axis, n in axis_widths(dense, state.found.groups).items()}
    kinds = {member.axis: group.kind for group in state.found.groups for member in group.members}
    rows = []
    for name, module in dense.named_modules():
        for side in ("heads", "out"):
            axis: Axis = (name, side, 0)  # type: ignore[assignment]
            if axis in before and (side == "heads" or not layers.is_normalisation(module)):
                rows.append(LayerRow(name, type(module).__name__, kinds[axis], before[axis], len(state.kept[axis])))
    return tuple(rows)


def _provenance(seed: int, device: torch.device) -> dict[str, object]:
    packages = ("jbrprune", "torch", "timm", "torch-pruning")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {package: version(package) for package in packages},
        "seed": seed,
        "device": str(device),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _notes(state: _State, prepared: _Images, settings: Settings) -> tuple[str, ...]:
    notes = [f"{name} keeps its width: {reason}." for name, reason in state.found.kept.items() if reason not in _EXPECTED]
    if settings.repair and not prepared.gate:
        notes.append(f"Nothing was repaired: fewer than {FEWEST_TO_HOLD_BACK} images, so none could be held back to check it.")
    if not prepared.heldout:
        notes.append(f"No agreement was measured: fewer than {FEWEST_TO_HOLD_BACK} images.")
    if any(group.kind == "width" for group in state.groups):
        notes.append("Residual width under a LayerNorm was offered: there, removing a channel also changes the norm's statistics.")
    return tuple(notes)


_EXPECTED = ("the classifier", "reaches the model's output", "ignored on request")


def _transplant(source: nn.Module, target: nn.Module) -> None:
    """Give a model the tensors and sizes of its pruned copy; its hooks and modes stay."""
    modules = dict(source.named_modules())
    device = guest.device_of(target)
    source.to(device)
    for name, module in target.named_modules():
        pruned = modules[name]
        module._parameters, module._buffers = pruned._parameters, pruned._buffers
        for attribute, value in vars(pruned).items():
            if isinstance(value, int | tuple) and attribute != "training" and vars(module).get(attribute) != value:
                setattr(module, attribute, value)
