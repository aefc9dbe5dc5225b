"""score(): the criterion for a model and images, without removing anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores, weight_scores
from jbrprune.data import images as loading
from jbrprune.data.batches import Batch, iterate
from jbrprune.errors import ArgumentError, ModelError
from jbrprune.evaluation.agreement import check_weights
from jbrprune.models import preserve, timm_models
from jbrprune.models.preserve import copy_model
from jbrprune.pruning.calibration import check_runs
from jbrprune.pruning.defaults import CHANNELS, WEIGHTS, complete
from jbrprune.sparsity.masks import fresh
from jbrprune.structure.discovery import find_groups, layer_groups
from jbrprune.structure.groups import Group
from jbrprune.structure.verification import verify_groups

GRANULARITIES = ("unit", "layer", "weight")


@torch.inference_mode(False)  # copies that are made in inference mode cannot be differentiated
def score(
    model: nn.Module | str,
    data: object,
    *,
    objective: str | None = None,
    site: str | None = None,
    statistic: str | None = None,
    granularity: str = "unit",
    parameters: str = "weights",
    batch: int | None = None,
    confidence: float | None = None,
    ignore: Sequence[str] = (),
    width: bool | None = None,
    autocast: torch.dtype | None = None,
    batch_size: int = 32,
    skip_corrupt: bool = False,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    **model_arguments: object,
) -> Scores | WeightScores:
    r"""Score what could be removed from a model: s_u = E_x[v_u(x)^2], v_u(x) = m(x)^T J_u(x) w_u.

    A unit u is a channel, a head or a single weight, w_u its parameters, J_u the Jacobian of the logits by them.

    Reads the data once, streaming, whatever their number; memory does not grow.

    Args:
        model: A timm name or any module ``[B, C, H, W] -> [B, K]``. Left as it was.
        data: As for `jbrprune.prune`; all of it is read.
        objective: ``pseudo_label`` (default for channels), ``projection`` (default for single weights),
            ``predicted_logit``, ``margin`` or ``label``.
        site: ``consumer`` (default) or ``all``; see `jbrprune.criteria.relevance.Relevance`.
        statistic: ``second_moment`` (default), ``batched``, ``mean_replaced`` (channels) or ``signed`` (weights).
        granularity: ``unit``: removable units, coupled channels together. ``layer``: every channel of every known
            layer by itself, inputs and outputs (of ``site="all"``) apart; works for models whose graph cannot be
            traced. ``weight``: every single weight, s_j = w_j^2 E_x[(m(x)^T df/dw_j)^2]; the model may be masked.
        parameters: Of ``weight``: ``weights`` of convolutions and linear layers, or ``all``, with biases and norms.
        batch: Samples per batch of ``statistic="batched"``; default 128.
        confidence: Score only on images whose largest probability exceeds this; default 0.
        ignore: Globs of module names that are left out.
        width: Include the residual width under LayerNorms.
        autocast: Low-precision dtype, such as ``torch.bfloat16``.
        batch_size: Images per pass where the data do not say.
        skip_corrupt: Leave out images of a folder or data set that cannot be read, and log their names.
        seed: Seeds ``projection``.
        progress: Show a progress bar.
        checkpoint: Local weights for a timm name.
        **model_arguments: For a timm name, passed to ``timm.create_model``.

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
        >>> scores = score("resnet10t", torch.randn(4, 3, 32, 32), pretrained=False, progress=False)
        >>> scores["layer1.0.conv1"].shape
        torch.Size([64])
    """
    arguments = dict(locals())
    if granularity not in GRANULARITIES:
        raise ArgumentError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
    weights = granularity == "weight"
    known = complete(arguments, WEIGHTS if weights else CHANNELS, "single weights" if weights else "channels")
    names = ("objective", "statistic", "batch", "confidence", "autocast", "seed")
    relevance = Relevance(site=known["site"] or "consumer", **{name: known[name] for name in names})
    relevance.check("weights" if weights else "units")
    how = {"batch_size": batch_size, "progress": progress}
    made = resolved(model, checkpoint, model_arguments)
    check_model(made, masked=weights)
    opened = loading.open_data(data, made, batch_size=batch_size, skip_corrupt=skip_corrupt)
    first, batches = peeked(opened, batch_size)
    with fresh(made):  # running a masked model would replace its weights by others without a graph
        check_runs(made, first.images)
    if weights:
        return weight_scores(made, batches, relevance, parameters=parameters, ignore=ignore, **how)  # type: ignore[arg-type]
    return relevance(made, batches, _groups(made, first, granularity, known["site"], ignore, known["width"]), **how)  # type: ignore[arg-type]


def resolved(model: nn.Module | str, weights: str | Path | None, arguments: dict[str, object]) -> nn.Module:
    """The model that is meant: a timm name is created, a module is taken as it is.

    Raises:
        ArgumentError: Neither a name nor a module, or arguments for a module that is made already.
    """
    if isinstance(model, str):
        with preserve.same_randomness(torch.device("cpu")):  # initial weights are drawn
            return timm_models.create(model, checkpoint=weights, **arguments)  # type: ignore[arg-type]
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a timm name or an nn.Module, got {type(model).__name__}.")
    if arguments or weights:
        names = ", ".join([*arguments, *(["checkpoint"] if weights else [])])
        raise ArgumentError(f"Unknown for a model that is made already: {names}. (A timm name would take it.)")
    return model


def check_model(model: nn.Module, *, masked: bool = False) -> None:
    """Refuse a model that cannot be scored or pruned as it is.

    Args:
        model: The model.
        masked: Whether masks of `torch.nn.utils.prune` are welcome.

    Raises:
        ModelError: Masked by `torch.nn.utils.prune`, or in half precision.
        NonFiniteError: NaN or Inf in the weights.
    """
    if not masked:
        preserve.refuse_masked(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: relevances and repairs need full precision. "
                "Call model.float(), then this, and .half() afterwards; autocast=torch.bfloat16 makes scoring cheap."
            )
    check_weights(model)


def example_of(model: nn.Module, batch: Batch) -> Tensor:
    """``[2, C, H, W]``: two images on the model's device, the same one twice if there is one only."""
    images = batch.images.to(preserve.device_of(model))
    parameter = preserve.first_tensor(model)
    images = images if parameter is None else images.to(parameter.dtype)
    return (images if len(images) > 1 else images.repeat(2, 1, 1, 1))[:2]


def peeked(data: object, batch_size: int) -> tuple[Batch, object]:
    """The first batch, and data that still yield it."""
    with preserve.same_randomness(torch.device("cpu")):  # a loader draws when it is iterated
        batches = iterate(data, batch_size=batch_size)
        first = next(batches)
    return first, itertools.chain([first], batches) if isinstance(data, Iterator) else data


def _groups(
    model: nn.Module, first: Batch, granularity: str, site: str, ignore: Sequence[str], width: bool
) -> tuple[Group, ...]:
    if granularity == "layer":
        return tuple(group for group in layer_groups(model, ignore=ignore) if site != "consumer" or group.side("in"))
    example = example_of(model, first)
    work = copy_model(model)
    return verify_groups(work, example, find_groups(work, example, ignore=ignore, width=width)).groups
