"""What a run starts from: a dense model, images that fit it, and the split of these images by purpose."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import cast

import torch
from torch import Tensor, nn

from jbrprune.data import distributed
from jbrprune.data.batches import Batch, class_indices, concatenate, iterate, materialise, rebatch
from jbrprune.data.images import open_data
from jbrprune.errors import ArgumentError, DataError, JBRError, ModelError
from jbrprune.evaluation.agreement import check_weights, compute_logits, explain_out_of_memory
from jbrprune.evaluation.latency import describe_hardware
from jbrprune.evaluation.outputs import LOGITS, Asked, Output, find_output
from jbrprune.models import preserve, timm_models
from jbrprune.pruning.options import RunOptions
from jbrprune.sparsity.masks import fresh, make_permanent, masks_of

logger = logging.getLogger(__name__)

FEWEST_TO_HOLD_BACK = 10
"""With fewer images none is held back, so nothing is repaired and no agreement is measured."""
MOST_JUDGES = 4096
"""Images beyond those for calibration that decide how far to prune; kept in memory."""

MOST_WAYS = 8
"""So many ways through the modules of a model are tried."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A dense model and images that are known to fit it.

    Attributes:
        given: The user's model, or what was made from a name; it is only read.
        dense: The same; of a masked model a copy with zeros in the place of masks.
        example: ``[2, C, H, W]`` on the model's device: the first two images (the first one twice if there is one).
        data: What the images are read from.
        output: What of the model's output counts.
        name: What reports call the model.
        wrapper: What was taken off it, such as ``OptimizedModule`` of `torch.compile`; empty where nothing was.
    """

    given: nn.Module
    dense: nn.Module
    example: Tensor
    data: object
    output: Output
    name: str
    wrapper: str = ""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration images with the dense model's logits, or other rows that count, by purpose.

    Attributes:
        score: Units are scored on these (``repair`` and ``gate`` together).
        repair: The repair is fitted on these.
        gate: A repair is kept only if it helps on these.
        heldout: Agreement is reported on these, which are used for nothing else; with ``max_drop`` they also
            decide how far to prune.
        described: Which images the held-out ones are.
        output: What of the model's output counts, with the scales that these images give.
        ways: Images of one batch for every way through the modules of the model, where there are several.
    """

    score: list[Batch]
    repair: list[Batch]
    gate: list[Batch]
    heldout: list[Batch]
    described: str
    output: Output = LOGITS
    ways: tuple[Tensor, ...] = ()

    def notes(self, wants_repair: bool) -> list[str]:
        """What the number of images did not allow."""
        few = f"fewer than {FEWEST_TO_HOLD_BACK} images"
        unrepaired = f"Nothing was repaired: with {few} none can be held back to check it."
        unmeasured = f"No agreement was measured: {few}."
        return [unrepaired] * (wants_repair and not self.gate) + [unmeasured] * (not self.heldout)


def open_problem(
    model: nn.Module | str,
    data: object,
    batch_size: int,
    asked: Asked = None,
    *,
    masked: bool = False,
    as_given: bool = False,
) -> Problem:
    """See that a model can be worked on and runs on the first image; no other image is read.

    Args:
        model: A timm name or a module; left as it was.
        data: As for `jbrprune.prune`.
        batch_size: Images per pass.
        asked: What of the model's output counts; None: find it.
        masked: Whether masks of `torch.nn.utils.prune` are welcome.
        as_given: Whether the images are used as they are: they must have the model's precision already, and all of
            them are read once more where the output needs scales. Otherwise they are converted.

    Raises:
        ArgumentError: Neither a name nor a module.
        DataError: The images cannot be used.
        ModelError: The model is masked, in half precision, or does not return what is asked for.
        NonFiniteError: NaN or Inf in weights or logits.
    """
    passed = model
    given = model = create_model(model)
    for name, parameter in given.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: relevances and repairs need full precision. "
                "Call model.float(), then this, and .half() afterwards; Relevance(autocast=torch.bfloat16) makes "
                "scoring cheap."
            )
    check_weights(given)
    if not masked:
        preserve.refuse_masked(given)
    elif masks_of(given):
        with torch.no_grad(), fresh(given):  # deepcopy refuses a tensor with a graph, which a masked weight is
            model = make_permanent(preserve.copy_model(given))
    opened = data if isinstance(data, Tensor) else open_data(data, model, batch_size=batch_size)
    with preserve.same_randomness(torch.device("cpu")):  # a loader draws when it is iterated
        batches = iterate(opened, batch_size=batch_size)
        batch = next(batches)
    whole = itertools.chain([batch], batches) if isinstance(opened, Iterator) else opened
    first, parameter = batch.images, preserve.first_tensor(model)
    converted = first if parameter is None else first.to(parameter.dtype)
    recipe = timm_models.recipe(model)
    output = check_runs(model, first if as_given else converted, asked)
    if output.guessed:
        logger.info("%s", output.said)
    if as_given and not output.decides:
        whole = list(whole) if isinstance(whole, Iterator) else whole
        with preserve.same_randomness(torch.device("cpu")):
            rows = (compute_logits(model, [each], output)[0] for each in iterate(whole, batch_size=batch_size))
            output = output.scaled_by(rows)
    return Problem(
        given=given,
        dense=model,
        example=(converted if len(first) > 1 else converted.repeat(2, 1, 1, 1))[:2].to(preserve.device_of(model)),
        data=whole,
        output=output,
        name=recipe.name if recipe else type(model).__name__,
        wrapper="" if isinstance(passed, str) or passed is given else type(passed).__name__,
    )


def create_model(model: nn.Module | str) -> nn.Module:
    """The model of a timm name, or the model itself without what wraps it.

    Raises:
        ArgumentError: Neither a name nor a module.
        ModelError: It holds modules or tensors that cannot be worked on.
    """
    if isinstance(model, str):
        with preserve.same_randomness(torch.device("cpu")):  # initial weights are drawn
            return timm_models.create(model)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a timm name or an nn.Module, got {type(model).__name__}.")
    model = preserve.unwrap(model)
    preserve.refuse_unusual(model)
    return model


def check_runs(model: nn.Module, images: Tensor, asked: Asked | Output = None) -> Output:
    """What counts of the output of a model that accepts such images, by running it on the first one.

    Raises:
        DataError: It does not; says what it was made for, if it tells.
        ModelError: It does, but what comes out is not what is asked for.
        NonFiniteError: NaN or Inf come out.
    """
    size = timm_models.image_size(model)
    wanted = f" It was made for {' x '.join(map(str, size))} (channels, height, width)." if size else ""
    try:
        with distributed.alone(), preserve.inference_state(model), explain_out_of_memory(1):
            returned = model(images[:1].to(preserve.device_of(model)))
            output = asked if isinstance(asked, Output) else find_output(model, returned, 1, asked)
            compute_logits(model, [Batch(images[:1])], output)
        return output
    except JBRError:
        raise
    except Exception as error:  # whatever a foreign forward raises is the answer
        raise DataError(
            f"{type(model).__name__} does not run on {str(images.dtype).removeprefix('torch.')} images of shape "
            f"{tuple(images.shape)}: {str(error).rstrip('.')}.{wanted}"
        ) from error


def read_calibration(problem: Problem, options: RunOptions, *, judged: bool = False) -> Calibration:
    """Read the images, compute the dense model's logits on them, and split them at random.

    A fifth is held out for the report, unless ``eval_data`` is given; another fifth gates the repair. With ``judged``,
    images decide how far to prune, and the report is about these, and says so: those of ``eval_data``; without, those
    beyond ``images`` (at most `MOST_JUDGES`), or two fifths where these are more.

    Args:
        problem: The dense model, and the images; batches that carry its logits as reference keep them.
        options: How many images, others to report on (all of which are read), images per pass, seed of the split.
        judged: Set images aside that decide how far to prune.

    Raises:
        DataError: The images cannot be used, or the model does not run on them.
        NonFiniteError: NaN or Inf in images or logits.
    """
    own = judged and options.eval_data is None
    most = options.images if options.images is None or not own else options.images + MOST_JUDGES
    whole, ways = _read_images(problem, problem.data, most, options)
    assert whole.reference is not None
    output = problem.output.scaled_by([whole.reference])
    whole = replace(whole, reference=output.scale(whole.reference))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(options.seed))
    whole = whole.map(lambda tensor: tensor[order])
    fifth = len(whole) // 5 if len(whole) >= FEWEST_TO_HOLD_BACK else 0
    apart = max(2 * fifth, len(whole) - (options.images or len(whole))) if own else fifth
    apart, fifth = apart if options.eval_data is None else 0, min(fifth, (options.images or len(whole)) // 5)

    def part(start: int, stop: int) -> list[Batch]:
        batch = whole.map(lambda tensor: tensor[start:stop])
        return rebatch([batch], options.batch_size) if stop > start else []

    purpose = "also decided how far to prune" if judged else "were used for nothing else"
    if options.eval_data is None:
        heldout, described = part(0, apart), f"{apart} calibration images that {purpose}"
    else:
        opened = open_data(options.eval_data, problem.dense, batch_size=options.batch_size)
        others, more = _read_images(problem, opened, None, options)
        ways |= more
        others = replace(others, reference=output.scale(cast(Tensor, others.reference)))
        heldout, described = (
            rebatch([others], options.batch_size),
            f"{len(others)} images of eval_data{f' that {purpose}' if judged else ''}",
        )
    cut = len(whole) - fifth
    return Calibration(
        score=part(apart, len(whole)),
        repair=part(apart, cut),
        gate=part(cut, len(whole)),
        heldout=heldout,
        described=described,
        output=output,
        ways=tuple(ways.values())[:MOST_WAYS] if len(ways) > 1 else (),
    )


def _read_images(
    problem: Problem, data: object, images: int | None, options: RunOptions
) -> tuple[Batch, dict[frozenset[str], Tensor]]:
    """Images in the model's precision, with the dense model's logits, or other rows without scales.

    And, for every set of modules that a batch runs, the images of such a batch.
    """
    model, output = problem.dense, problem.output
    # a loader draws when it is iterated
    with distributed.fail_together(), preserve.same_randomness(torch.device("cpu")):
        batches = materialise(data, images=images, batch_size=options.batch_size)
    batches = distributed.broadcast(batches)  # a loader that shuffles gives every rank others
    parameter = preserve.first_tensor(model)
    if parameter is not None:
        batches = [replace(batch, images=batch.images.to(parameter.dtype)) for batch in batches]
    check_runs(model, batches[0].images, output)
    ran: list[frozenset[str]] = []
    if any(batch.reference is None for batch in batches):
        with preserve.recorded_calls(model) as called:

            def each() -> Iterator[Batch]:
                for batch in batches:
                    called.clear()
                    yield batch
                    ran.append(frozenset(called))

            logits = compute_logits(model, each(), output, progress=options.progress)
        ran = [max(of_ranks, key=len) for of_ranks in zip(*distributed.gather(ran))]  # one rank has run each batch
        batches = [replace(batch, reference=reference) for batch, reference in zip(batches, logits)]
    whole = concatenate(batches)
    assert whole.reference is not None
    classes = output.classes(whole.reference)
    ways = {names: batch.images for names, batch in zip(ran, batches)}
    return replace(whole, labels=class_indices(whole.labels, whole.images.shape[:1], classes)), ways


def provenance(seed: int, device: torch.device) -> dict[str, object]:
    """Versions, seed and hardware."""
    packages = ("jbrprune", "torch", "timm", "torch-pruning")
    return {
        "versions": {package: version(package) for package in packages},
        "seed": seed,
        "device": str(device),
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
