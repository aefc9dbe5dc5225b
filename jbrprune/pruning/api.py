"""The calls: prune and sweep to budgets, sparsify single weights, score what could go, list what can go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jbrprune.budgets.budget import Floors, reduce_to_floors
from jbrprune.budgets.cost import cost_model, find_uncounted
from jbrprune.checkpoint.checkpoint import save
from jbrprune.checkpoint.resume import check_directory, fingerprint_run, open_log
from jbrprune.criteria.objectives import Directions
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.errors import ArgumentError, BudgetError, check_known
from jbrprune.models import preserve, timm_models
from jbrprune.pruning.channels import find_channels, find_units
from jbrprune.pruning.loop import run
from jbrprune.pruning.options import BUDGETS, ChannelOptions, ScoreOptions, WeightOptions, check_floors, describe
from jbrprune.pruning.prepare import check_runs, create_model, open_problem, read_calibration
from jbrprune.pruning.weights import find_weights
from jbrprune.report.records import Report
from jbrprune.sparsity.masks import make_permanent, put_masks, refuse_hidden_sharing, slots
from jbrprune.sparsity.patterns import Pattern
from jbrprune.structure.directions import replace_module

create = timm_models.create


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What `prune` and `sparsify` hand over.

    Attributes:
        model: The smaller model, plain PyTorch, in eval mode (with ``inplace=True`` the given one, in its own mode).
        report: What was done and what it cost; print it.
        size: Channels, height and width of the images.
    """

    model: nn.Module
    report: Report
    size: tuple[int, ...]

    def save(self, path: str | Path, *, card: bool = False, overwrite: bool = False) -> None:
        """Write the model as it is now into a directory, with its report; see `jbrprune.save`."""
        save(self.model, path, size=self.size, report=self.report.to_dict(), card=card, overwrite=overwrite)


@describe(ChannelOptions)
def prune(  # noqa: D417
    model: nn.Module | str,
    data: object,
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    max_drop: float | None = None,
    confidence: float = 0.9,
    scope: Literal["global", "raw", "layer"] = "global",
    structure: Literal["auto", "channels", "directions", "mixed"] = "auto",
    criterion: str | Relevance | Scores | Callable[..., Any] = "jbr",
    repair: str | Sequence[str] | None = "auto",
    steps: int | None = None,
    ignore: Sequence[str] = (),
    output: str | int | Callable[[Any], Any] | None = None,
    floors: Floors = Floors(),  # noqa: B008
    images: int | None = 512,
    eval_data: object = None,
    batch_size: int = 32,
    seed: int = 0,
    resume: str | Path | None = None,
    inplace: bool = False,
    progress: bool = True,
) -> PruneResult:
    r"""Remove channels, heads or directions from a trained model, without labels and without training.

    Units are ranked by relevance per cost, s_u / cost_u with s_u = E_x[(m(x)^T J_u(x) w_u)^2], and removed in steps;
    after every step the model is repaired without training and scored again, until the budget is met. A counted
    budget is overshot by less than one unit. A budget of ``channels`` ranks by score alone, as the paper does. With
    ``scope="layer"`` every layer loses the same share of its units, as many baselines are published.

    * ``latency``, ``latency_ms``: units are ranked per multiply-accumulate. After every step the whole model is timed
      in turns with the dense one, on one image and with one thread; that ratio decides when the budget is met.
    * ``max_drop``: prediction proposes and measurement decides, on images that neither score, repair nor gate: those of
      ``eval_data``, else those of ``data`` beyond ``images``, else two fifths. At ``confidence``, and allowing for the
      choice, an upper bound of what is lost lies at or below ``max_drop``. Without a budget beside it, MACs are reduced
      as far as the floors allow.
      What may be lost: accuracy (with labels), agreement of decisions, of an embedding that of nearest neighbours, else
      the relative error.
    * ``output``: logits are compared by their divergence, anything else by relative squared error, and the report says
      which; see `jbrprune.evaluation.outputs`.
    * ``structure``: ``directions`` puts two thin linear layers in the place of one, and narrows the heads of attentions
      (`jbrprune.structure.directions`); ``mixed`` cuts channels and heads first, to the share of the budget to the
      power of 0.3 or as far as it takes. ``auto`` is ``mixed`` where linear layers of tokens hold most of the MACs and
      less than half of MACs or parameters is to stay, else ``channels``; the report says which, and why.
    * ``criterion``: a function ``(model, batches, groups)`` returns the scores of the units of every group by its name;
      the lowest go first. It is called before every step. Scores made before hold for one step.
    * ``repair``: ``auto`` tries what applies and keeps what brings the model closer to the dense one on images held
      back; otherwise one or several of ``batch_norm``, ``mean_shift``, ``least_squares``, or None.
    * ``resume``: a directory for this run alone. The same call with the same model, images and versions goes on behind
      the last finished step, to the same weights and numbers. A function as ``criterion`` is compared by its name.
    * ``inplace``: until the very end, and after an exception, the model is untouched. Its parameters are new objects
      then: make a new optimizer.

    Args:
        model: A timm name (its pretrained weights are fetched; see `create`) or any module of images ``[B, C, H, W]``,
            whatever it returns. Left as it was.
        data: Unlabelled images: a folder, a tensor, a Dataset, a DataLoader, or any iterable of batches. Labels, if
            there are any, are used to report accuracy (and by ``Relevance("label")``), for nothing else.
        {options}

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
        >>> net = create("resnet10t", pretrained=False)
        >>> result = prune(net, torch.randn(20, 3, 32, 32), macs=0.7, progress=False)
        >>> result.report.kept <= 0.7
        True

    Source:
        Arpit, arXiv 2512.11089.
    """
    shared = criterion, ignore, output, batch_size, progress, repair, images, eval_data, seed, resume, inplace
    budgets = macs, params, channels, latency, latency_ms, max_drop, confidence
    options = ChannelOptions(*shared, *budgets, scope, steps, floors, structure)
    return carry_out(model, data, options, tuple(options.budgets.values()))[0]


@describe(WeightOptions)
def sparsify(  # noqa: D417
    model: nn.Module | str,
    data: object,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    criterion: str | Relevance | WeightScores | Callable[..., Any] = "jbr_projection",
    scope: Literal["global", "layer"] = "global",
    steps: int = 1,
    repair: str | Sequence[str] | None = "auto",
    floor: float = 0.001,
    shrink: bool = False,
    permanent: bool = True,
    ignore: Sequence[str] = (),
    output: str | int | Callable[[Any], Any] | None = None,
    images: int | None = 512,
    eval_data: object = None,
    batch_size: int = 32,
    seed: int = 0,
    resume: str | Path | None = None,
    inplace: bool = False,
    progress: bool = True,
) -> PruneResult:
    """Set single weights to zero, without labels and without training.

    Weights are ranked by s_j = w_j^2 E_x[(m(x)^T df/dw_j)^2]; those that stay are repaired without training. A sparsity
    is reached exactly. Zeros make a model smaller on disk, and faster only where hardware knows the pattern.

    * ``criterion``: a function ``(model, batches, names)`` returns scores in the shape of every named weight, none of
      them negative; the lowest go first.
    * ``shrink``: channels that contribute nothing once their weights are zero are removed; the outputs stay equal.
    * ``permanent=False``: masks of `torch.nn.utils.prune` stay, with the values from before under them (zero in layers
      that ``shrink`` has cut), to train on.
    * ``repair``, ``resume``, ``inplace``: as for `prune`.

    Args:
        model: As for `prune`; it may be masked by `torch.nn.utils.prune` already, and what is masked stays so.
        data: As for `prune`.
        {options}

    Returns:
        `PruneResult`.

    Raises:
        ArgumentError: An argument has no meaning.
        BudgetError: Neither or both of sparsity and pattern, or one that cannot be reached.
        CheckpointError: ``resume`` cannot be written, is damaged, or belongs to another run.
        DataError: The images cannot be used.
        ModelError: The model cannot be pruned as it is.
        NonFiniteError: NaN or Inf in weights, images or logits.

    Example:
        >>> import torch
        >>> net = create("resnet10t", pretrained=False)
        >>> result = sparsify(net, torch.randn(20, 3, 32, 32), sparsity=0.8, progress=False)
        >>> round(result.report.sparsity, 6)
        0.8

    Source:
        Arpit, arXiv 2512.11089.
    """
    shared = criterion, ignore, output, batch_size, progress, repair, images, eval_data, seed, resume, inplace
    options = WeightOptions(*shared, sparsity, pattern, scope, steps, floor, shrink, permanent)
    return carry_out(model, data, options, (sparsity if pattern is None else Pattern.of_text(pattern),))[0]


def sweep(
    model: nn.Module | str, data: object, shares: Iterable[float], *, budget: str = "macs", **options: Any
) -> list[PruneResult]:
    """Prune to several budgets in one run: each model is the one before, pruned further.

    With ``structure="mixed"`` channels and heads go once, on the way to the largest share; directions alone from there.

    Args:
        model: As for `prune`.
        data: As for `prune`.
        shares: Shares of the dense model to keep; of ``sparsity``, to set to zero.
        budget: ``macs``, ``params``, ``channels``, ``latency``, ``latency_ms`` or ``sparsity``.
        **options: Other arguments of `prune`, or of `sparsify`; ``steps`` counts the steps from one share to the next.

    Returns:
        One result per share, the largest model first.

    Raises:
        BudgetError: No shares, equal ones, or one outside of (0, 1).

    Example:
        >>> import torch
        >>> net = create("resnet10t", pretrained=False)
        >>> results = sweep(net, torch.randn(20, 3, 32, 32), [0.9, 0.8], progress=False)
        >>> [result.report.kept <= share for result, share in zip(results, [0.9, 0.8])]
        [True, True]
    """
    kinds = (*BUDGETS, "sparsity")
    others = sorted(options.keys() & {*kinds, "pattern", "max_drop", "inplace"})
    if budget not in kinds or others:
        raise BudgetError(
            f"sweep takes shares and, as budget=, one of {', '.join(kinds)}; got budget={budget!r}"
            f"{''.join(f' and {name}=' for name in others)}."
        )
    sparse, stops = budget == "sparsity", list(shares)
    tables = [(WeightOptions if sparse else ChannelOptions)(**{budget: stop}, **options) for stop in stops]
    if not stops or len(set(stops)) < len(stops):
        raise BudgetError(f"shares must be one or more different numbers, got {stops}.")
    if len(stops) > 1 and isinstance(tables[0].criterion, Scores):
        raise ArgumentError("Scores made before hold for one step: the channels of the next one are others.")
    return carry_out(model, data, tables[0], sorted(stops, reverse=not sparse))


@describe(ScoreOptions)
def score(  # noqa: D417
    model: nn.Module | str,
    data: object,
    *,
    criterion: str | Relevance | None = None,
    granularity: Literal["unit", "weight"] = "unit",
    parameters: Literal["weights", "all"] = "weights",
    ignore: Sequence[str] = (),
    width: bool = False,
    output: str | int | Callable[[Any], Any] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Scores | WeightScores:
    r"""Score what could be removed from a model: s_u = E_x[v_u(x)^2], v_u(x) = m(x)^T J_u(x) w_u.

    A unit u is a channel, a head or a single weight, w_u its parameters, J_u the Jacobian of the outputs by them.
    All data are read, streaming: memory does not grow with their number. Where the output needs scales (see
    `jbrprune.evaluation.outputs`) they are read twice, and an iterator is kept in memory.

    Args:
        model: As for `prune`; with ``granularity="weight"`` it may be masked by `torch.nn.utils.prune`.
        data: As for `prune`.
        {options}

    Returns:
        `Scores`; ``scores["layer1.0.conv1"]`` is the tensor ``[units]`` of one group. Of ``weight`` `WeightScores`;
        ``scores["layer1.0.conv1.weight"]`` has the shape of the weight.

    Raises:
        ArgumentError: An argument has no meaning.
        DataError: The images cannot be used.
        ModelError: The model cannot be scored as it is.
        NonFiniteError: NaN or Inf in weights, images or logits.

    Example:
        >>> import torch
        >>> scores = score(create("resnet10t", pretrained=False), torch.randn(4, 3, 32, 32), progress=False)
        >>> scores["layer1.0.conv1"].shape
        torch.Size([64])
    """
    options = ScoreOptions(criterion, ignore, output, batch_size, progress, granularity, parameters, width)
    weights, relevance = granularity == "weight", options.ranking
    with torch.inference_mode(False):  # copies that are made in inference mode cannot be differentiated
        problem = open_problem(model, data, batch_size, output, masked=weights, as_given=True)
        relevance = replace(relevance, output=problem.output)
        passed: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        if weights:
            passed |= {"ignore": ignore, "parameters": parameters}
            return weight_scores(problem.dense, problem.data, relevance, **passed)
        groups = find_units(problem.dense, problem.example, ignore, width)[1].groups
        return relevance(problem.dense, problem.data, groups, **passed)


@dataclass(frozen=True)
class Info:
    """What can be removed from a model.

    Attributes:
        input_size: Channels, height and width that the costs are for.
        macs: Multiply-accumulates of one image.
        params: Parameters.
        least_macs: Share of the MACs that is left with every group at its floor.
        least_params: The same for parameters.
        rows: The groups.
        skipped: Layer -> why it keeps its width.
        output: What of the model's output counts.
        uncounted: Operator whose multiply-accumulates are not counted -> the module that calls it.
    """

    input_size: tuple[int, ...]
    macs: int
    params: int
    least_macs: float
    least_params: float
    rows: tuple[InfoRow, ...]
    skipped: dict[str, str]
    uncounted: dict[str, str]
    output: str = ""

    def to_dict(self) -> dict[str, object]:
        """Pure JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class InfoRow:
    """One group: how many units, and what one of them costs.

    Attributes:
        group: Name of the group (its first producer).
        kind: ``channel``, ``head``, ``group``, ``width`` or ``direction``.
        units: Number of units.
        macs_per_unit: Multiply-accumulates that go with one unit.
        params_per_unit: Parameters that go with one unit.
        layers: Layers that shrink.
    """

    group: str
    kind: str
    units: int
    macs_per_unit: int
    params_per_unit: int
    layers: int


def info(
    model: nn.Module | str,
    images: Tensor | None = None,
    *,
    structure: Literal["auto", "channels", "directions"] = "auto",
    ignore: Sequence[str] = (),
    output: str | int | Callable[[Any], Any] | None = None,
    floors: Floors = Floors(),  # noqa: B008
) -> Info:
    """List what can be removed from a model, and what it costs.

    Args:
        model: A timm name or a module; left as it was. Its weights do not matter.
        images: ``[B, C, H, W]`` example input; default: noise of the size that a timm model wants.
        structure: What goes, as for `prune`; ``auto`` means channels and heads.
        ignore: Globs of modules that keep their width.
        output: What of the model's output counts, as for `prune`.
        floors: How narrow groups may become, and whether residual widths are offered.

    Raises:
        ArgumentError: ``images`` is needed: the model does not say what it wants.
        UnsupportedModelError: Nothing can be removed safely.

    Example:
        >>> info(create("resnet10t", pretrained=False)).rows[0].kind
        'channel'
    """
    check_known("structure", structure, ("auto", "channels", "directions"))
    check_floors("floors", floors)
    dense = create_model(model)
    if images is None:
        size = timm_models.image_size(dense)
        if size is None:
            raise ArgumentError(f"{type(dense).__name__} does not say which images it wants: pass images=.")
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    preserve.refuse_masked(dense)
    like = preserve.first_tensor(dense)
    images = images if like is None else images.to(like)
    counts = check_runs(dense, images, output)
    found_in, found = find_units(dense, images, ignore, floors.width, structure=structure)
    costs = macs, params = [cost_model(kind, found_in, images, found.groups) for kind in ("macs", "params")]
    whole, sizes, rows = (macs.total, params.total), {group.name: group.size for group in found.groups}, []
    for group in found.groups:
        first = group.size - 2 if group.kind == "direction" else 0  # the first directions save nothing
        saved = []
        for cost in costs:
            cost.remove(group.name, first)
            saved.append(round(cost.saving(group.name)))
            cost.remove(group.name, -first)
        layers = len({member.axis[0] for member in group.members})
        rows.append(InfoRow(group.name, group.kind, group.size, saved[0], saved[1], layers))
    return Info(
        input_size=tuple(images.shape[1:]),
        macs=round(whole[0]),
        params=round(whole[1]),
        least_macs=reduce_to_floors(macs, found.groups, floors, sizes) / whole[0],
        least_params=reduce_to_floors(params, found.groups, floors, sizes) / whole[1],
        rows=tuple(rows),
        skipped=found.skipped,
        output=counts.said,
        uncounted=find_uncounted(dense, images),
    )


def carry_out(
    model: nn.Module | str, data: object, options: ChannelOptions | WeightOptions, stops: Sequence[Any]
) -> list[PruneResult]:
    """Prune to every stop."""
    directory = None if options.resume is None else check_directory(options.resume)
    results, originals, log = [], {}, None
    drop = options.max_drop if isinstance(options, ChannelOptions) else None
    with torch.inference_mode(False):  # what inference mode makes cannot be trained
        asked: Any = options.output
        problem = open_problem(model, data, options.batch_size, asked, masked=isinstance(options, WeightOptions))
        if isinstance(options.ranking, Relevance):  # one that has no meaning for this output is refused here
            Directions(options.ranking.objective, options.ranking.threshold, output=problem.output)
        if isinstance(options, ChannelOptions):
            structure = find_channels(problem, options, stops)
        else:
            structure = find_weights(problem, options, stops)
            if not options.permanent:
                refuse_hidden_sharing(problem.given, structure.masks)
                originals = {slot.name: slot.stored.detach().clone() for slot in slots(problem.given)}
        images = read_calibration(problem, options, judged=drop is not None)
        if images.ways and isinstance(options, ChannelOptions):
            structure = find_channels(problem, options, stops, images.ways)
        if directory is not None:
            unrelated = ("progress", "resume", "inplace", "eval_data")
            depends = {name: value for name, value in vars(options).items() if name not in unrelated}
            depends["stops"] = [str(stop) for stop in stops]
            batches = [*images.score, *images.gate, *images.heldout]
            log = open_log(directory, fingerprint_run(depends, problem.given, batches))
        outcomes = run(structure, images, log=log)
        if drop is not None:
            from jbrprune.prediction import max_drop  # drives the same loop from above

            outcomes = iter([max_drop.search(structure, images)])  # type: ignore[reportArgumentType]
        for stop in outcomes:
            pruned = stop.model
            if options.inplace and isinstance(model, nn.Module):
                pruned = transplant(pruned, problem.given)
            if originals:
                masks = {name: mask for name, mask in stop.masks.items() if not bool(mask.all())}
                before = {name: originals[name] for name in masks if originals[name].shape == masks[name].shape}
                put_masks(pruned, masks, before)
            results.append(PruneResult(pruned, stop.report, tuple(problem.example.shape[1:])))
    return results


def transplant(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give a model the tensors and sizes of its pruned copy; its hooks and modes stay, but of a layer that becomes two.

    Everything is prepared first, so that nothing can fail between the first change and the last.
    """
    pruned, changes, split = dict(source.named_modules()), [], {}
    beside = ("feature_info", "_flat_weights")  # of recurrent layers
    for name, module in target.named_modules():
        if type(pruned[name]) is not type(module):
            split[name] = pruned[name].train(module.training)
            continue
        new = vars(pruned[name])
        sizes = {key: value for key, value in new.items() if isinstance(value, int | tuple) or key in beside}
        sizes.pop("training")
        changes.append((module, sizes | {key: new[key] for key in ("_parameters", "_buffers")}))
    make_permanent(target)
    for module, attributes in changes:
        vars(module).update(attributes)
    for name, pair in split.items():
        replace_module(target, name, pair)
    return target
