"""prune(), the one call, and sweep(), the same for several budgets in one run."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import BUDGETS, KINDS, Budget
from jbrprune.checkpoint import checkpoint as files
from jbrprune.checkpoint.resume import check_directory, fingerprint_run, open_log
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.models import preserve, timm_models
from jbrprune.models.preserve import copy_model
from jbrprune.prediction import max_drop as search
from jbrprune.pruning import loop as engine
from jbrprune.pruning import weights as thinning
from jbrprune.pruning.arguments import channel_settings, check_drop, sparsity_of, structure_of, weight_settings
from jbrprune.pruning.calibration import Calibration
from jbrprune.pruning.prepare import opened_with
from jbrprune.pruning.scoring import check_model, resolved
from jbrprune.pruning.weights import Thinned
from jbrprune.report.records import Report
from jbrprune.sparsity.masks import fresh, make_permanent, masks_of, put_masks, refuse_hidden_sharing, slots
from jbrprune.sparsity.patterns import Pattern

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What `prune` hands over.

    Attributes:
        model: The smaller model, plain PyTorch, in eval mode (with ``inplace=True`` the given one, in its own mode).
        report: What was done and what it cost; print it.
        recipe: How timm makes the dense model; None for other models.
        config: timm's preprocessing for this model; None for other models.
    """

    model: nn.Module
    report: Report
    recipe: timm_models.Recipe | None = None
    config: Mapping[str, object] | None = None

    def save(self, path: str | Path, *, card: bool = False, overwrite: bool = False) -> None:
        """Write the model into a directory (``card``: a model card as well); see `jbrprune.checkpoint`."""
        files.save(
            path,
            self.model,
            recipe=self.recipe,
            config=self.config,
            provenance=self.report.provenance,
            report=self.report.to_dict(),
            card=card,
            overwrite=overwrite,
        )


def prune(
    model: nn.Module | str,
    data: object,
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    sparsity: float | None = None,
    max_drop: float | None = None,
    structure: str | None = None,
    scope: str | None = None,
    steps: int | None = None,
    repair: str | Sequence[str] | None = "auto",
    criterion: str | Callable[..., Scores | WeightScores] | Scores | WeightScores | None = None,
    objective: str | None = None,
    site: str | None = None,
    statistic: str | None = None,
    batch: int | None = None,
    confidence: float | None = None,
    ignore: Sequence[str] = (),
    width: bool | None = None,
    floor: float | None = None,
    min_channels: int | None = None,
    round_to: int | str | None = None,
    remainder: str | None = None,
    shrink: bool | None = None,
    permanent: bool | None = None,
    images: int | None = 512,
    eval_data: object = None,
    eval_images: int | None = None,
    ridge: float = 0.1,
    batch_size: int = 32,
    skip_corrupt: bool = False,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    measure_latency: bool = True,
    inplace: bool = False,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    resume: str | Path | None = None,
    **model_arguments: object,
) -> PruneResult:
    r"""Make a trained model smaller, without labels and without training.

    Channels: units (channels, heads) are ranked by relevance per cost,
    s_u / cost_u with s_u = E_x[(m(x)^T J_u(x) w_u)^2], and removed in steps; after every step the model is
    repaired without training and scored again.

    Single weights (``sparsity=`` or an N:M ``structure=``): ranked by s_j = w_j^2 E_x[(m(x)^T df/dw_j)^2] and set to
    zero; repaired likewise. Zeros make a model smaller on disk, and faster only where hardware knows the pattern.

    Args:
        model: A timm name (its pretrained weights are fetched) or any module ``[B, C, H, W] -> [B, K]``. For single
            weights it may be masked by ``torch.nn.utils.prune`` already; what is masked stays so.
        data: Unlabelled images: a folder, a tensor, a Dataset, a DataLoader, or any iterable of batches. Labels, if
            there are any, are used to report accuracy (and by ``objective="label"``), for nothing else.
        macs: Share of the multiply-accumulates to keep. Give exactly one of macs, params, channels, latency,
            latency_ms, sparsity, an N:M structure, or max_drop.
        params: Share of the parameters to keep.
        channels: Share of the removable channels to keep, a head counted as one (ranked by score alone, as in the
            paper).
        latency: Share of the time of a forward pass of one image to keep, on this machine, with as many threads as
            torch uses now. Layers are timed over their widths (kept on disk, see `jbrprune.budgets.timing_cache`),
            units ranked by score per time saved, and after every step the whole model is timed in turns with the dense
            one: that ratio decides when the budget is met.
        latency_ms: The same in milliseconds; the dense model is timed at the start and is what one share means.
        sparsity: Share of the weights of convolutions and linear layers to set to zero, reached exactly.
        max_drop: Prune channels as far as the accuracy, or without labels the agreement with the dense model, falls by
            no more than this on two fifths of the images, which neither score, repair nor gate. macs, params or
            channels beside it is then the least to keep; without one, MACs are reduced as far as the floors allow.
        structure: ``channels``, ``unstructured``, or N:M such as ``"2:4"``: of every M weights that follow each other
            along the inputs, N stay. Default: what the budget is of.
        scope: ``global`` (default): rank all weights together. ``layer``: each layer by itself.
        steps: Number of steps; default for channels one for every 5 % of the dense cost, for single weights one.
        repair: ``"auto"`` (try what applies, keep what helps on images held back), one or several of
            ``"batch_norm"``, ``"mean_shift"``, ``"least_squares"``, or None.
        criterion: Something else to rank by: the name of a variant of relevance such as ``"jbr_published"`` (in
            `jbrprune.criteria.relevance.PRESETS`), scores made before with `jbrprune.score` (for channels, in
            one step), or a function ``(model, batches, groups, *, seed, progress) -> Scores`` for channels,
            ``(model, batches, *, ignore, seed, progress) -> WeightScores`` for single weights.
        objective: ``pseudo_label`` (default for channels), ``projection`` (default for single weights),
            ``predicted_logit``, ``margin`` or ``label``.
        site: ``consumer`` (default) or ``all``, for channels; see `jbrprune.criteria.relevance.Relevance`.
        statistic: ``second_moment`` (default), ``batched``, ``mean_replaced`` (channels) or ``signed`` (weights).
        batch: Samples per batch of ``statistic="batched"``; default 128.
        confidence: Score only on images whose largest dense probability exceeds this; default 0.
        ignore: Globs of module names that keep their width, or (of modules or parameters) their weights. The
            repair of ``batch_norm`` corrects statistics everywhere.
        width: Also prune the residual width of transformers and ConvNeXt. A LayerNorm over fewer channels
            computes other statistics: its output changes even if the removed channels were zero.
        floor: Share of every group's width (default 0) or of every layer's weights (default 0.001, and one weight)
            that stays.
        min_channels: Channels of every group that stay (default 8), where it has as many; of heads, one stays.
        round_to: Kept widths are multiples of this; default 1. ``"auto"``, the default for a budget of latency: the
            smallest multiple that loses no time here, by timing the most expensive layers at many widths.
        remainder: Where M does not divide a layer's inputs: ``skip`` the layer (default), or ``pad`` its last group.
        shrink: Remove the channels that contribute nothing once their weights are zero; the outputs stay equal. Not
            with N:M, whose groups would shift.
        permanent: True (default): zeros in plain parameters. False: masks of ``torch.nn.utils.prune``, with the
            values from before under the mask (zero in layers that ``shrink`` has cut), to train on.
        images: Calibration images to read from ``data``; None: all. They are kept in memory.
        eval_data: Images to measure the agreement on; default: a fifth of the calibration images is held out.
        eval_images: Images to read from ``eval_data``; None: all.
        ridge: Strength of the ridge of ``least_squares``, relative to the mean square of the inputs.
        batch_size: Images per pass.
        skip_corrupt: Leave out images of a folder or data set that cannot be read, and log their names.
        seed: Seeds the split of the images and everything random.
        autocast: Low-precision dtype for scoring, such as ``torch.bfloat16``.
        device: Where to work; default: where the model is.
        measure_latency: Time the dense and the pruned model.
        inplace: Change the given model itself, at the very end; until then, and after an exception, it is untouched.
            Its parameters are new objects then: make a new optimiser.
        progress: Show progress bars.
        checkpoint: Local weights for a timm name, instead of the pretrained ones.
        resume: Directory for this run alone. Every finished step is noted there; a later call with the same model,
            images, settings and versions goes on behind the last one, to the same weights and numbers. (A function
            as ``criterion`` counts as the same if its name, source and attributes are; what it closes over, and
            what an object keeps in ``__slots__``, does not count.)
        **model_arguments: For a timm name, passed to ``timm.create_model``.

    Returns:
        `PruneResult`.

    Raises:
        ArgumentError: An argument has no meaning.
        BudgetError: No budget, two budgets, or one that the floors do not allow.
        CheckpointError: ``resume`` cannot be written, is damaged, or belongs to another run.
        DataError: The images cannot be used.
        ModelError: The model cannot be pruned as it is.
        NonFiniteError: NaN or Inf in weights, images or logits.

    Example:
        >>> import torch
        >>> images = torch.randn(20, 3, 32, 32)
        >>> result = prune("resnet10t", images, macs=0.7, pretrained=False, progress=False)
        >>> result.report.kept <= 0.7
        True
        >>> sparse = prune("resnet10t", images, sparsity=0.8, pretrained=False, progress=False)
        >>> round(sparse.report.sparsity, 6)
        0.8

    Source:
        Arpit, arXiv 2512.11089.
    """
    arguments = dict(locals())
    budgets = {name: arguments.pop(name) for name in (*BUDGETS, "sparsity")}
    drop = arguments.pop("max_drop")
    for name in ("model", "data", "inplace"):
        del arguments[name]
    if drop is not None:
        check_drop(drop, arguments, budgets)
    chosen = structure_of(arguments.pop("structure"), budgets)
    target = model if inplace and isinstance(model, nn.Module) else None
    if chosen == "channels":
        if drop is None:
            budget = Budget.of(**{name: budgets[name] for name in BUDGETS})
            result = _pruned(model, data, budget, (budget.share,), arguments)[0]
        else:
            shares = {name: budgets[name] for name in KINDS}
            result = _searched(model, data, shares, float(drop), arguments)
        if target is not None:
            _transplant(result.model, target)
            return PruneResult(target, result.report, result.recipe, result.config)
        return result
    goal = chosen if isinstance(chosen, Pattern) else sparsity_of(sparsity)
    return _thinned(model, data, (goal,), arguments, target)[0]


def sweep(
    model: nn.Module | str, data: object, shares: Iterable[float], *, budget: str = "macs", **options: object
) -> list[PruneResult]:
    """Prune to several budgets in one run: each model is the one before, pruned further.

    Args:
        model: As for `prune`.
        data: As for `prune`.
        shares: Shares of the dense model to keep; of ``sparsity``, to set to zero.
        budget: ``macs``, ``params``, ``channels``, ``latency``, ``latency_ms`` or ``sparsity``.
        **options: Other arguments of `prune`; ``steps`` counts the steps from one share to the next.

    Returns:
        One result per share, the largest model first.

    Raises:
        BudgetError: No shares, equal ones, or one outside of (0, 1).

    Example:
        >>> import torch
        >>> results = sweep("resnet10t", torch.randn(20, 3, 32, 32), [0.9, 0.8], pretrained=False, progress=False)
        >>> [result.report.kept <= share for result, share in zip(results, [0.9, 0.8])]
        [True, True]
    """
    kinds = (*BUDGETS, "sparsity")
    others = sorted(options.keys() & {*kinds, "structure"})
    if budget not in kinds or others:
        got = "".join(f" and {name}=" for name in others)
        raise BudgetError(f"Give shares and, as budget=, one of {', '.join(kinds)}; got budget={budget!r}{got}.")
    sparse = budget == "sparsity"
    stops = sorted(
        (sparsity_of(share) if sparse else Budget.of(**{budget: share}).share for share in shares), reverse=not sparse
    )
    if not stops or len(set(stops)) < len(stops):
        raise BudgetError(f"shares must be one or more different numbers, got {stops}.")
    bound = inspect.signature(prune).bind(model, data, **options)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if arguments["inplace"]:
        raise ArgumentError("inplace=True has no meaning for several budgets: call prune() for one.")
    if arguments["max_drop"] is not None:
        raise BudgetError("max_drop= finds one size by itself, shares say several: call prune() for it.")
    for name in ("model", "data", "inplace", "structure", "max_drop", *kinds):
        del arguments[name]
    if sparse:
        return _thinned(model, data, tuple(stops), arguments, None)
    return _pruned(model, data, Budget(budget, stops[-1]), tuple(stops), arguments)


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def _pruned(
    model: nn.Module | str, data: object, budget: Budget, stops: tuple[float, ...], arguments: Mapping[str, Any]
) -> list[PruneResult]:
    settings = channel_settings(budget, stops, arguments)
    directory = check_directory(arguments["resume"])
    given = resolved(model, arguments["checkpoint"], arguments["model_arguments"])
    check_model(given)
    opened = opened_with(copy_model(given), data, arguments)
    asked, settings = settings, engine.settled(settings, opened.dense, opened.example)
    state = engine.start(opened.dense, opened.example, settings)
    images = opened.read(arguments)
    several = len(stops) > 1
    with open_log(directory, _fingerprint(asked, given, images) if directory else {}) as steps:
        return [
            PruneResult(copy.deepcopy(pruned) if several else pruned, report, opened.recipe, opened.config)
            for pruned, report in engine.run(opened.dense, state, images, settings, opened.name, steps)
        ]


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def _searched(
    model: nn.Module | str, data: object, shares: Mapping[str, float | None], drop: float, arguments: Mapping[str, Any]
) -> PruneResult:
    bounded = any(share is not None for share in shares.values())
    budget = Budget.of(**shares) if bounded else Budget("macs", 1.0)
    settings = channel_settings(budget, (budget.share,) * bounded, arguments)
    given = resolved(model, arguments["checkpoint"], arguments["model_arguments"])
    check_model(given)
    opened = opened_with(copy_model(given), data, arguments)
    opened.check_classes("max_drop=")
    settings = engine.settled(settings, opened.dense, opened.example)
    state = engine.start(opened.dense, opened.example, settings)
    images = opened.read(arguments, judged=True)
    pruned, report = search.run(opened.dense, state, images, settings, opened.name, drop)
    return PruneResult(pruned, report, opened.recipe, opened.config)


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def _thinned(
    model: nn.Module | str,
    data: object,
    goals: tuple[thinning.Goal, ...],
    arguments: Mapping[str, Any],
    target: nn.Module | None,
) -> list[PruneResult]:
    settings = weight_settings(goals, arguments)
    directory = check_directory(arguments["resume"])
    given = resolved(model, arguments["checkpoint"], arguments["model_arguments"])
    check_model(given, masked=True)
    masks = masks_of(given)
    originals = None
    if arguments["permanent"] is False:
        originals = {slot.name: slot.stored.detach().clone() for slot in slots(given)}
    opened = opened_with(_plain(given), data, arguments)
    state = thinning.start(copy_model(opened.dense), opened.example, masks, settings)
    if originals is not None:
        refuse_hidden_sharing(given, state.masks)
    images = opened.read(arguments)
    results = []
    with open_log(directory, _fingerprint(settings, given, images) if directory else {}) as steps:
        for thinned in thinning.run(state, opened.dense, images, settings, opened.name, steps):
            finished = _finished(thinned, originals, target)
            results.append(PruneResult(finished, thinned.report, opened.recipe, opened.config))
    return results


def _fingerprint(settings: object, model: nn.Module, images: Calibration) -> dict[str, Any]:
    """What the steps of a run depend on."""
    options = {name: value for name, value in vars(settings).items() if name not in ("progress", "measure_latency")}
    return fingerprint_run(options, model, [*images.score, *images.gate, *images.heldout])


def _plain(model: nn.Module) -> nn.Module:
    """A copy with zeros in the place of masks."""
    with torch.no_grad(), fresh(model):  # deepcopy refuses a tensor with a graph, which a masked weight is
        return make_permanent(copy_model(model))


def _finished(thinned: Thinned, originals: Mapping[str, Tensor] | None, target: nn.Module | None) -> nn.Module:
    """The model to hand over; with originals, masked, and they under the masks."""
    model = thinned.model
    if target is not None:
        make_permanent(target)
        _transplant(model, target)
        model = target
    if originals is not None:
        some = {name: mask for name, mask in thinned.masks.items() if not bool(mask.all())}
        put_masks(model, some, {name: originals[name] for name in some if originals[name].shape == some[name].shape})
    return model


def _transplant(source: nn.Module, target: nn.Module) -> None:
    """Give a model the tensors and sizes of its pruned copy; its hooks and modes stay.

    Everything is prepared first, so that nothing can fail between the first change and the last.
    """
    modules = dict(source.to(preserve.device_of(target)).named_modules())
    changes = [(module, _changed(module, modules[name])) for name, module in target.named_modules()]
    for module, attributes in changes:
        vars(module).update(attributes)


def _changed(module: nn.Module, pruned: nn.Module) -> dict[str, object]:
    """Tensors and sizes in which a module differs from its pruned copy."""
    sizes: dict[str, object] = {
        name: value
        for name, value in vars(pruned).items()
        if isinstance(value, int | tuple) and name != "training" and vars(module).get(name) != value
    }
    return sizes | {"_parameters": pruned._parameters, "_buffers": pruned._buffers}
