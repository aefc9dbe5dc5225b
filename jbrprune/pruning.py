"""prune(), the one call, and sweep(), the same for several budgets in one run."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor, nn

from jbrprune import checkpoint as files
from jbrprune import data as loading
from jbrprune import guest, zoo
from jbrprune.budget import KINDS, Budget
from jbrprune.calibration import calibration, check_runs
from jbrprune.engine import Settings, run, start
from jbrprune.errors import ArgumentError, BudgetError, JBRError
from jbrprune.relevance import check_arguments
from jbrprune.repair import METHODS
from jbrprune.report import Report
from jbrprune.scoring import check_model, example_of, peeked, resolved
from jbrprune.selection import Floors
from jbrprune.units import copied

log = logging.getLogger(__name__)

WHOLE = ("batch", "batch_size", "seed")


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
    ridge: float = 0.1,
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
        channels: Share of the removable channels to keep, a head counted as one (ranked by score alone, as in the
            paper).
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
        min_channels: Channels of every group that stay, where it has as many; of heads, one stays.
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
            Its parameters are new objects then: make a new optimiser.
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
    arguments = dict(locals())
    for name in ("model", "data", *KINDS, "inplace"):
        del arguments[name]
    budget = Budget.of(macs=macs, params=params, channels=channels)
    result = _pruned(model, data, budget, (budget.share,), **arguments)[0]
    if inplace and isinstance(model, nn.Module):
        _transplant(result.model, model)
        return PruneResult(model, result.report, result.recipe, result.config)
    return result


def sweep(
    model: nn.Module | str, data: object, shares: Iterable[float], *, budget: str = "macs", **options: object
) -> list[PruneResult]:
    """Prune to several budgets in one run: each model is the one before, pruned further.

    Args:
        model: As for `prune`.
        data: As for `prune`.
        shares: Shares of the dense model to keep.
        budget: ``macs``, ``params`` or ``channels``.
        **options: Other arguments of `prune`; ``steps`` counts the steps from one share to the next.

    Returns:
        One result per share, largest first.

    Raises:
        BudgetError: No shares, equal ones, or one outside of (0, 1).

    Example:
        >>> import torch
        >>> results = sweep("resnet10t", torch.randn(20, 3, 32, 32), [0.9, 0.8], pretrained=False, progress=False)
        >>> [result.report.kept <= share for result, share in zip(results, [0.9, 0.8])]
        [True, True]
    """
    others = sorted(options.keys() & set(KINDS))
    if budget not in KINDS or others:
        got = "".join(f" and {name}=" for name in others)
        raise BudgetError(f"Give shares and, as budget=, one of {', '.join(KINDS)}; got budget={budget!r}{got}.")
    stops = sorted((Budget.of(**{budget: share}).share for share in shares), reverse=True)
    if not stops or len(set(stops)) < len(stops):
        raise BudgetError(f"shares must be one or more different numbers, got {stops}.")
    bound = inspect.signature(prune).bind(model, data, **options)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if arguments["inplace"]:
        raise ArgumentError("inplace=True has no meaning for several budgets: call prune() for one.")
    for name in ("model", "data", *KINDS, "inplace"):
        del arguments[name]
    return _pruned(model, data, Budget(budget, stops[-1]), tuple(stops), **arguments)


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def _pruned(
    model: nn.Module | str,
    data: object,
    budget: Budget,
    stops: tuple[float, ...],
    *,
    images: int | None,
    eval_data: object,
    eval_images: int | None,
    device: str | torch.device | None,
    checkpoint: str | Path | None,
    model_arguments: dict[str, object],
    **options: object,
) -> list[PruneResult]:
    settings = _settings(budget, stops, **options)  # type: ignore[arg-type]
    given = resolved(model, checkpoint, model_arguments)
    check_model(given)
    dense = copied(given).to(device or guest.device_of(given)).eval()
    opened = loading.open_data(data, dense, batch_size=settings.batch_size)
    first, opened = peeked(opened, settings.batch_size)
    example = example_of(dense, first)
    check_runs(dense, first.images.to(example.dtype))
    state = start(dense, example, settings)
    prepared = calibration(
        dense,
        opened,
        images=images,
        eval_data=eval_data,
        eval_images=eval_images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=settings.progress,
    )
    recipe = _recipe(dense)
    config = zoo.data_config(dense) if zoo.recipe(dense) else None
    name = recipe.name if recipe else type(dense).__name__
    several = len(stops) > 1
    return [
        PruneResult(copy.deepcopy(pruned) if several else pruned, report, recipe, config)
        for pruned, report in run(dense, state, prepared, settings, name)
    ]


def _recipe(dense: nn.Module) -> zoo.Recipe | None:
    """How timm makes this very model; None if it was changed by hand, so that a file of it needs ``load(model=)``."""
    recipe = zoo.recipe(dense)
    if recipe is None:
        return None
    try:
        with guest.same_randomness(torch.device("cpu")):
            made = zoo.build(recipe)
    except JBRError as error:
        log.warning("timm cannot make this model again (%s): a saved copy needs load(..., model=).", error)
        return None
    if _within(dense.state_dict(), made.state_dict()):
        return recipe
    log.warning("This is not timm's %s as it was made: a saved copy needs load(..., model=).", recipe.name)
    return None


def _within(smaller: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> bool:
    """The same tensors, none of them larger."""
    return smaller.keys() == dense.keys() and all(
        tensor.dim() == dense[name].dim() and all(n <= most for n, most in zip(tensor.shape, dense[name].shape))
        for name, tensor in smaller.items()
    )


def _settings(
    budget: Budget,
    stops: tuple[float, ...],
    *,
    steps: int | None,
    repair: str | Sequence[str] | None,
    floor: float,
    min_channels: int,
    round_to: int,
    ignore: Sequence[str],
    ridge: float,
    **same: object,
) -> Settings:
    """The arguments, checked before anything is read or created."""
    for name, number in (("min_channels", min_channels), ("round_to", round_to), *((n, same[n]) for n in WHOLE)):
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ArgumentError(f"{name} must be a whole number, got {number!r}.")
    for name, value in (("ridge", ridge), ("floor", floor), ("confidence", same["confidence"])):
        if not isinstance(value, Real):
            raise ArgumentError(f"{name} must be a number, got {value!r}.")
    if not isinstance(same["autocast"], torch.dtype | None):
        raise ArgumentError(f"autocast must be a torch.dtype such as torch.bfloat16, got {same['autocast']!r}.")
    if not 0 < ridge < math.inf:
        raise ArgumentError(f"ridge must satisfy 0 < ridge < inf, got {ridge}.")
    check_arguments(*(same[name] for name in ("objective", "site", "statistic", "batch", "confidence")))  # type: ignore[arg-type]
    settings = Settings(
        budget=budget,
        stops=stops,
        steps=steps,
        repair=_methods(repair),
        floors=Floors(floor, min_channels, round_to),
        ridge=ridge,
        ignore=ignore if isinstance(ignore, str) else tuple(ignore),  # type: ignore[arg-type]
        **same,  # type: ignore[arg-type]
    )
    settings.schedule()
    return settings


def _methods(repair: str | Sequence[str] | None) -> tuple[str, ...]:
    wanted = () if repair is None else (repair,) if isinstance(repair, str) else tuple(repair)
    unknown = [method for method in wanted if method not in (*METHODS, "auto")]
    if unknown or ("auto" in wanted and len(wanted) > 1):
        raise ArgumentError(f"repair must be 'auto', None, or some of {', '.join(METHODS)}; got {repair!r}.")
    return wanted


def _transplant(source: nn.Module, target: nn.Module) -> None:
    """Give a model the tensors and sizes of its pruned copy; its hooks and modes stay.

    Everything is prepared first, so that nothing can fail between the first change and the last.
    """
    modules = dict(source.to(guest.device_of(target)).named_modules())
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
