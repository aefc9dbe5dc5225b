r"""Scores of single weights: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j, exact per sample.

One backward to the activations. Every use of a scored parameter by a layer function (``F.linear``, ``F.conv2d``, ...)
is seen during the forward pass, with the input as the function itself gets it: behind a padding inside ``forward``,
for a weight that another module reads, for a weight that several modules share. When the gradient D_n of the
function's output arrives, the per-sample weight gradient G_n = D_n A_n^T is formed, squared and added up in blocks that
stay in the cache, and everything is freed before the next layer's gradient arrives.

===================================  ===================================================================
one position (linear on vectors)     G_n^2 = d_n^2 (a_n^2)^T: summed over samples, one product of squared factors
up to `FEW_POSITIONS`                the same over pairs of positions: (sum_t d_t a_t)^2 = sum_ts (d_t d_s)(a_t a_s)
tokens, 1x1 convolutions             one matrix product per sample and block of rows
other convolutions, small maps       the same, on unfolded inputs
other convolutions                   PyTorch's own weight gradient, one sample and a block of rows at a time
norm scales, biases                  sums over positions
===================================  ===================================================================

What is seen is compared with autograd on two images before the pass: a parameter that is used in any way that is not
in this list is refused, and so are samples that influence each other.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from jbrprune import guest, layers
from jbrprune.atomic import replacing
from jbrprune.batches import Batch, iterate
from jbrprune.errors import ArgumentError, CheckpointError, DataError, ModelError, NonFiniteError
from jbrprune.measure import check_weights, logits_of
from jbrprune.objectives import OBJECTIVES, Objective, Target, confident
from jbrprune.relevance import _check_logits, _check_samples_apart, _own, _Question, check_arguments
from jbrprune.scores import Settings

Statistic = Literal["second_moment", "batched", "signed"]
Parameters = Literal["weights", "all"]
STATISTICS = ("second_moment", "batched", "signed")
PARAMETERS = ("weights", "all")

FORMAT = 1
MAX_MEMORY = 256 << 20
"""Bytes of scratch memory unless the user says otherwise."""
CACHE_BYTES = 1 << 21
"""A block of per-sample gradients is about this large on a CPU, so that it is squared where it was formed."""
FEW_POSITIONS = 4
"""Up to here pairs of positions are cheaper than one matrix product per sample."""
SMALL_ELEMENTS = 1 << 15
"""Below, squares of many samples are summed by one call; above, one call per sample moves less memory."""
UNFOLDED_POSITIONS = 64
"""Up to here the inputs of a k x k convolution are unfolded; above, the copy costs more than it brings."""


@dataclass(frozen=True, eq=False)
class WeightScores:
    """s_j = E_x[(w_j g_j(x))^2] for every scored weight, or its batched or signed form.

    Attributes:
        sums: Parameter name (``layer1.0.conv1.weight``, also where the module is masked) -> float64 of the
            parameter's shape, on the CPU: the sum over samples of (w g)^2; for ``signed`` of w g.
        samples: Samples in the sums.
        skipped: Samples that were left out because the dense model was not confident enough.
        settings: Objective and statistic; the site is ``weight``.
    """

    sums: Mapping[str, Tensor]
    samples: int
    skipped: int
    settings: Settings

    def __getitem__(self, name: str) -> Tensor:
        """Scores of one parameter, in its shape: the mean over samples; for ``signed`` its absolute value."""
        mean = self.sums[name] / self.samples
        return mean.abs() if self.settings.statistic == "signed" else mean

    def values(self) -> dict[str, Tensor]:
        """Parameter name -> scores in the parameter's shape."""
        return {name: self[name] for name in self.sums}

    def __add__(self, other: WeightScores) -> WeightScores:
        """Merge the scores of two disjoint sets of samples.

        The sum of the shards is the score of the whole; for ``batched`` if the shards are cut between batches.

        Raises:
            ArgumentError: They were made with other settings, or for other parameters.
        """
        if not isinstance(other, WeightScores):
            return NotImplemented
        if self.settings != other.settings:
            raise ArgumentError(f"Cannot add scores made with {self.settings} and {other.settings}.")
        shapes = [{name: tuple(total.shape) for name, total in s.sums.items()} for s in (self, other)]
        if shapes[0] != shapes[1]:
            name = next(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
            raise ArgumentError(
                f"Cannot add scores of different parameters: {name} has shapes {shapes[0].get(name)} and "
                f"{shapes[1].get(name)}. Score both shards with the same model and the same `ignore`."
            )
        return replace(
            self,
            sums={name: total + other.sums[name] for name, total in self.sums.items()},
            samples=self.samples + other.samples,
            skipped=self.skipped + other.skipped,
        )

    def importance_scores(self, model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
        """The dictionary that ``torch.nn.utils.prune.global_unstructured(importance_scores=...)`` takes.

        A weight that several modules share appears once for each of them.

        Args:
            model: The scored model, or one of the same architecture (masked or not).

        Returns:
            ``(module, "weight")`` -> scores in the weight's shape, on its device.

        Raises:
            ArgumentError: The model lacks a scored parameter, or has it in another shape.

        Example:
            >>> from torch.nn.utils import prune
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
            >>> scores = weight_scores(net, torch.randn(8, 3, 2, 2), progress=False)
            >>> prune.global_unstructured(
            ...     [(net[1], "weight")], prune.L1Unstructured, scores.importance_scores(net), amount=0.5
            ... )
            >>> int((net[1].weight == 0).sum())
            24
        """
        canonical = {id(_stored(module, kind)): name for name, module, kind in _slots(model)[::-1]}
        found: dict[tuple[nn.Module, str], Tensor] = {}
        missing = set(self.sums)
        for name, module, kind in _slots(model):
            key = name if name in self.sums else canonical[id(_stored(module, kind))]
            if key not in self.sums:
                continue
            tensor = _stored(module, kind)
            if self.sums[key].shape != tensor.shape:
                raise ArgumentError(
                    f"{name} has shape {tuple(tensor.shape)}, but its scores {tuple(self.sums[key].shape)}: they are "
                    "of another model. Score this model."
                )
            found[module, kind] = self[key].to(tensor.device, _wide(tensor.device))
            missing.discard(key)
        if missing:
            raise ArgumentError(
                f"The model has no parameter {min(missing)!r} (and {len(missing) - 1} more that are scored): the "
                "scores are of another model. Score this model."
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (atomically)."""
        header = {
            "format": FORMAT,
            "kind": "weights",
            "settings": vars(self.settings),
            "samples": self.samples,
            "skipped": self.skipped,
        }
        own = {f"sums/{name}": total.detach().clone().contiguous() for name, total in self.sums.items()}
        with replacing(path) as temporary:
            save_file(own, temporary, metadata={"jbrprune": json.dumps(header)})

    @staticmethod
    def load(path: str | Path) -> WeightScores:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, or does not hold scores of weights in a known format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["jbrprune"])
                if header["format"] != FORMAT or header.get("kind") != "weights":
                    raise CheckpointError(
                        f"{path} holds {header.get('kind', 'scores of units')} in format {header['format']}; expected "
                        f"scores of weights in format {FORMAT}. Use the class that wrote it, or upgrade jbrprune."
                    )
                sums = {name.removeprefix("sums/"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return WeightScores(sums, header["samples"], header["skipped"], Settings(**header["settings"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a file of weight scores, or is damaged ({type(error).__name__}: {error}). Score again."
            ) from error


def weight_scores(
    model: nn.Module,
    data: object,
    *,
    objective: str = "projection",
    statistic: Statistic = "second_moment",
    batch: int = 128,
    parameters: Parameters = "weights",
    ignore: Sequence[str] = (),
    confidence: float = 0.0,
    autocast: torch.dtype | None = None,
    batch_size: int = 32,
    max_memory: int = MAX_MEMORY,
    seed: int = 0,
    progress: bool = True,
) -> WeightScores:
    r"""Score every single weight: s_j = w_j^2 E_x[g_j(x)^2], g_j(x) = m(x)^T df/dw_j.

    Args:
        model: Any module that maps ``[B, C, H, W]`` to logits ``[B, K]``, also one that ``torch.nn.utils.prune`` has
            masked: w is then the effective weight, and masked weights score 0. Left as it was.
        data: Anything that yields images (`jbrprune.batches.iterate`). Read once, streaming.
        objective: Name in `jbrprune.objectives.OBJECTIVES`; it gives m(x).
        statistic: ``second_moment``: E[(w g)^2] per sample. ``batched``: E[(mean over ``batch`` samples of w g)^2], as
            in the published code. ``signed``: \|E[w g]\|, the form of SNIP. The last two need no per-sample gradient:
            they cost one backward per batch.
        batch: Number of samples whose mean is squared by ``batched``, whatever the data's batch size.
        parameters: ``weights`` of convolutions and linear layers, or ``all``: their biases, and the scales and biases
            of norms, as well.
        ignore: Globs of modules or parameters that are left out (a module covers its submodules).
        confidence: Leave out samples whose largest dense probability is not above this (published code: 0.9).
        autocast: Low-precision dtype of the forward pass, e.g. ``torch.bfloat16``.
        batch_size: Images per pass where the data do not say.
        max_memory: Bytes for per-sample gradients and copies of activations, on top of what a forward and a backward
            to the activations take, of the sums (8 bytes per weight), and of what PyTorch's own kernels take for
            one sample. It bounds memory, not the result.
        seed: Seeds the signs of ``projection``; give every shard of the data another one.
        progress: Show a progress bar.

    Returns:
        `WeightScores`. Blocks are squared and summed in float32 (float64 models: float64) over a few samples, and
        added to float64 sums.

    Raises:
        ArgumentError: Unknown objective or statistic, a combination without meaning, a glob that matches nothing, or
            ``max_memory`` too small for one row of one sample.
        DataError: No data, or no sample above the confidence threshold; no labels where the objective needs them.
        ModelError: A weight is transformed before it is used, or used in a way that is not known; samples influence
            each other, or the first dimension of an activation is not the batch.
        NonFiniteError: NaN or Inf in weights, images, logits or gradients.

    Source:
        Arpit, arXiv 2512.11089 (relevance); squares of single per-sample gradients: Dangel et al., BackPACK, ICLR 2020;
        ``signed``: Lee et al., SNIP, ICLR 2019.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> scores = weight_scores(net, torch.randn(8, 3, 2, 2), progress=False)
        >>> scores["1.weight"].shape
        torch.Size([4, 12])
    """
    function = _checked(objective, statistic, batch, parameters, confidence, max_memory)
    check_weights(model)
    scored = _scored_parameters(model, parameters, ignore)
    if statistic == "second_moment":
        collector = _Squares(model, scored, max_memory)
    else:
        collector = _Means(scored, batch if statistic == "batched" else None)
    question = _Question(function, confidence, autocast, torch.Generator().manual_seed(seed))
    batches = tqdm(iterate(data, batch_size=batch_size), "scoring", unit="batch", disable=not progress, leave=False)
    samples, skipped = _collect(model, batches, collector, question)
    if samples == 0:
        raise DataError(
            f"No sample was left: the dense model's largest probability exceeds confidence={confidence} on none "
            f"of {skipped} images. Lower the threshold."
        )
    settings = Settings(objective, "weight", statistic, batch if statistic == "batched" else None, confidence)
    sums = collector.finish()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"The scores of {name} contain NaN or Inf although the logits are finite: the gradient is not. A "
                "square root of zero or an overflow in half precision does that; try float32."
            )
    return WeightScores(sums, samples, skipped, settings)


# --- one loop over the data ------------------------------------------------------------------------------------------


def _collect(
    model: nn.Module, batches: Iterable[Batch], collector: _Squares | _Means, question: _Question
) -> tuple[int, int]:
    """Numbers of samples scored, and left out."""
    device = guest.device_of(model)
    samples = skipped = 0
    for number, batch in enumerate(batches):
        with guest.visiting(model, gradients=collector.gradients), _fresh_masks(model):
            batch = batch.to(device).map(_own)
            if number == 0:
                collector.check(batch.images)
            amp = torch.autocast(device.type, question.autocast, enabled=question.autocast is not None)
            with torch.enable_grad(), collector.recording(len(batch)), amp:
                logits = logits_of(model(batch.images.clone()))  # a clone, for a model that changes its input in place
            _check_logits(model, batch, number, logits, question.autocast)
            losses = _losses(batch, logits, question)
            samples += len(losses)
            skipped += len(batch) - len(losses)
            if len(losses):
                collector.backward(losses)
    return samples, skipped


def _losses(batch: Batch, logits: Tensor, question: _Question) -> Tensor:
    """``[kept]`` the objective on every sample that the dense model is confident about."""
    with torch.enable_grad():
        # A sample's scalar is formed in float32 at least: a cross-entropy of half precision loses confident samples.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        reference = logits.detach() if batch.reference is None else batch.reference
        losses = question.objective(logits, Target(reference, batch.labels, question.generator))
        losses = losses[confident(reference, question.confidence)] if question.confidence > 0 else losses
    if not losses.requires_grad:
        raise ModelError("No scored parameter takes part in the logits: there is nothing to differentiate.")
    return losses


# --- which parameters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scored:
    """A parameter that is scored: where it is, and under which name."""

    name: str
    module: nn.Module
    kind: str

    @property
    def leaf(self) -> Tensor:
        """The parameter itself: ``weight``, or ``weight_orig`` where it is masked."""
        return _stored(self.module, self.kind)

    @property
    def mask(self) -> Tensor | None:
        """The mask of `torch.nn.utils.prune`, if there is one."""
        return self.module._buffers.get(f"{self.kind}_mask")

    @property
    def effective(self) -> Tensor:
        """The tensor that the module's function gets."""
        return getattr(self.module, self.kind)


def _stored(module: nn.Module, kind: str) -> Tensor:
    parameter = module._parameters.get(kind)
    return module._parameters[f"{kind}_orig"] if parameter is None else parameter  # type: ignore[return-value]


def _is_masked(module: nn.Module, kind: str) -> bool:
    return module._parameters.get(f"{kind}_orig") is not None and module._buffers.get(f"{kind}_mask") is not None


@contextmanager
def _fresh_masks(model: nn.Module) -> Iterator[None]:
    """Make effective weights anew, as torch.nn.utils.prune does when it is the module that is called.

    A weight that another function reads is as old as its mask, with the graph of that time. Afterwards the user's
    tensors are back.
    """
    masked = [(module, kind) for _, module, kind in _slots(model) if _is_masked(module, kind)]
    before = [getattr(module, kind) for module, kind in masked]
    try:
        for module, kind in masked:
            weight = _stored(module, kind)
            setattr(module, kind, weight * module._buffers[f"{kind}_mask"].to(weight))  # type: ignore[union-attr]
        yield
    finally:
        for (module, kind), tensor in zip(masked, before):
            setattr(module, kind, tensor)


def _slots(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """``(name, module, "weight" | "bias")`` of every plain or masked parameter; shared ones several times."""
    return [
        (f"{name}.{kind}".removeprefix("."), module, kind)
        for name, module in model.named_modules()
        for kind in ("weight", "bias")
        if module._parameters.get(kind) is not None or _is_masked(module, kind)
    ]


def _scored_parameters(model: nn.Module, parameters: Parameters, ignore: Sequence[str]) -> list[_Scored]:
    ignored = _ignored(model, ignore)
    found: dict[int, _Scored] = {}
    for name, module in model.named_modules():
        for kind in _kinds(module, parameters):
            full = f"{name}.{kind}".removeprefix(".")
            if name in ignored or full in ignored or getattr(module, kind, None) is None:
                continue
            if module._parameters.get(kind) is None and not _is_masked(module, kind):
                raise ModelError(
                    f"{full} ({type(module).__name__}) is not a plain parameter (a parametrization or a weight norm "
                    "computes it), so a single weight has no meaning there. Remove the parametrization, or put it into "
                    "`ignore`."
                )
            found.setdefault(id(_stored(module, kind)), _Scored(full, module, kind))
    if not found:
        raise ModelError("The model has no convolution or linear layer left to score. Is everything in `ignore`?")
    return list(found.values())


def _kinds(module: nn.Module, parameters: Parameters) -> tuple[str, ...]:
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return ("weight",) if parameters == "weights" else ("weight", "bias")
    return ("weight", "bias") if parameters == "all" and layers.channel_dim(module) is not None else ()


def _ignored(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of modules and parameters that a glob matches, with everything inside of them."""
    if isinstance(patterns, str):
        raise ArgumentError(f"ignore must be a list of globs, got the string {patterns!r}: write [{patterns!r}].")
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _, _ in _slots(model)]
    ignored: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise ArgumentError(
                f"ignore: {pattern!r} matches no module and no parameter. Names look like {', '.join(names[:3])}; list "
                "them with `[name for name, _ in model.named_modules()]`."
            )
        ignored |= hits | {name for name in names if any(name.startswith(hit + ".") for hit in hits)}
    return ignored


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _zeros(like: Tensor, least: torch.dtype | None = None) -> Tensor:
    dtype = _wide(like.device) if least is None else torch.promote_types(like.dtype, least)
    with torch.inference_mode(False):  # a tensor of inference mode could not be added to later
        return torch.zeros(like.shape, dtype=dtype, device=like.device)


# --- means over batches: plain autograd ------------------------------------------------------------------------------


class _Means:
    """Sums the gradient of consecutive samples; squares it batch by batch, or keeps the sum (``signed``)."""

    gradients = True

    def __init__(self, scored: Sequence[_Scored], batch: int | None) -> None:
        self.scored = scored
        self.batch = batch
        self.filled = 0
        self.sums = [_zeros(s.leaf) for s in scored]
        self.open = self.sums if batch is None else [_zeros(s.leaf, torch.float32) for s in scored]

    def check(self, images: Tensor) -> None:
        """Nothing to check: autograd sees every use of a parameter, and a mean needs no samples apart."""

    def recording(self, samples: int) -> AbstractContextManager[object]:
        """Nothing to record."""
        return nullcontext()

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of ``[n]`` losses, cut where a batch is full."""
        start = 0
        while start < len(losses):
            stop = len(losses) if self.batch is None else min(len(losses), start + self.batch - self.filled)
            leaves = [s.leaf for s in self.scored]
            more = stop < len(losses)
            found = torch.autograd.grad(losses[start:stop].sum(), leaves, retain_graph=more, allow_unused=True)
            for total, gradient in zip(self.open, found):
                if gradient is not None:
                    total += gradient
            self.filled += stop - start
            start = stop
            if self.filled == self.batch:
                self._close()

    def finish(self) -> dict[str, Tensor]:
        """Name -> sum over batches of n_b (mean w g)^2, or for ``signed`` the sum of w g."""
        if self.batch is not None and self.filled:
            self._close()  # a last, smaller batch counts by its size
        power = 1 if self.batch is None else 2
        # The gradient of weight_orig carries the mask already.
        pairs = zip(self.scored, self.sums)
        return {s.name: (total * s.leaf.detach().to(total) ** power).cpu() for s, total in pairs}

    def _close(self) -> None:
        for sums, total in zip(self.sums, self.open):
            sums += total.square_().div_(self.filled)
            total.zero_()
        self.filled = 0


# --- squares per sample ----------------------------------------------------------------------------------------------


class _Squares:
    """Collects sum_n g_j(x_n)^2 of every scored parameter, layer by layer, while the backward runs."""

    gradients = False

    def __init__(self, model: nn.Module, scored: Sequence[_Scored], max_memory: int) -> None:
        self.model = model
        self.scored = scored
        self.max_memory = max_memory
        self.sums = {s.name: _zeros(s.leaf) for s in scored}
        self.seen: set[str] = set()
        self._recorder: _Recorder | None = None

    @contextmanager
    def recording(self, samples: int) -> Iterator[None]:
        """Context of a forward pass over ``samples`` images."""
        recorder = self._recorder = _Recorder(self, samples)
        masked = [s.name.rpartition(".")[0] for s in self.scored if s.mask is not None]
        # Behind the hook of torch.nn.utils.prune, which makes the effective weight anew in every forward pass.
        with guest.hooked(self.model, forward_pre=dict.fromkeys(masked, recorder.identify_again)), recorder:
            yield

    def backward(self, losses: Tensor) -> None:
        """Add the squares of the gradients of ``losses`` that the recorded forward pass has led to."""
        recorder, self._recorder = self._recorder, None
        with torch.enable_grad():
            total = losses.sum()
        total.backward()
        recorder.finish()  # type: ignore[union-attr]

    def add(self, name: str, uses: Sequence[_Use], samples: int) -> None:
        """Add what all uses of a parameter contribute: the sum of their gradients per sample, squared."""
        _add_squares(self.sums[name], uses, samples, _Place(name, self.max_memory))

    def finish(self) -> dict[str, Tensor]:
        """Name -> sum over samples of (w g)^2, w the effective weight."""
        return {s.name: (self.sums[s.name] * _effective(s).to(self.sums[s.name]).square()).cpu() for s in self.scored}

    def check(self, images: Tensor) -> None:
        """Compare with autograd on two images, through random directions of the logits.

        Raises:
            ModelError: They differ, or autograd cannot differentiate by the weights at all.
        """
        _check_samples_apart(self.model, images, ())
        pair = _two_images(images)
        with torch.enable_grad(), self.recording(2):
            logits = logits_of(self.model(pair.clone()))
        if len(logits) != 2:
            raise ModelError(f"2 images went in, {len(logits)} rows of logits came out.")
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        if not logits.requires_grad or not torch.isfinite(logits).all():
            return  # the pass itself says what is wrong
        with torch.enable_grad():
            losses = (logits * direction).sum(1)
        self.backward(losses)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(logits.dtype, 0.3)
        found = list(self._differences(pair, direction))
        # A gradient that is zero but for rounding, such as that of a bias of attention keys, has no digits to compare.
        floor = (100 * torch.finfo(logits.dtype).eps) ** 2 * sum(expected for _, expected, _ in found)
        wrong = [s for s, expected, difference in found if not difference <= tolerance * expected + floor]  # or NaN
        if wrong:
            raise ModelError(_refusal(wrong, self.seen))
        for total in self.sums.values():
            total.zero_()

    def _differences(self, pair: Tensor, direction: Tensor) -> Iterable[tuple[_Scored, float, float]]:
        """Parameter, sum of its squared gradients, and sum of the absolute differences to what was collected."""
        with guest.requiring_grad(self.model, True), torch.enable_grad(), _fresh_masks(self.model):
            logits = logits_of(self.model(pair.clone()))
            expected = [0.0] * len(self.scored)
            for sample in range(2):
                product = (logits[sample] * direction[sample]).sum()
                try:
                    found = torch.autograd.grad(
                        product, [s.leaf for s in self.scored], retain_graph=sample == 0, allow_unused=True
                    )
                except RuntimeError as error:
                    raise ModelError(f"The model cannot be differentiated by its weights: {error}") from error
                for i, (scored, gradient) in enumerate(zip(self.scored, found)):
                    if sample == 0 and scored.mask is not None:
                        self.sums[scored.name] *= scored.mask
                    if gradient is not None:
                        square = gradient.to(self.sums[scored.name]).square_()
                        expected[i] += float(square.sum())
                        self.sums[scored.name] -= square
        return [(s, e, float(self.sums[s.name].abs().sum())) for s, e in zip(self.scored, expected)]


def _effective(scored: _Scored) -> Tensor:
    weight = scored.leaf.detach()
    return weight if scored.mask is None else weight * scored.mask.to(weight)


def _two_images(images: Tensor) -> Tensor:
    """The first image, and one made from it that is different everywhere."""
    one = images[:1]
    ramp = torch.linspace(-1, 1, one.shape[-1], device=one.device, dtype=one.dtype)
    return torch.cat([one, one.flip(-1) + one.std(correction=0).clamp_min(1e-3) * ramp])


def _refusal(wrong: Sequence[_Scored], seen: set[str]) -> str:
    first = next((s for s in wrong if s.name not in seen), wrong[0])
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    what = f"{first.name} ({type(first.module).__name__}){more}"
    if first.name not in seen:
        return (
            f"{what}: the parameter takes part in the logits, but not as it is: its class transforms it first (as "
            "weight standardisation does), or uses it in a function that is not known here. Squares per sample "
            "would not be exact. Put it into `ignore`."
        )
    return (
        f"{what}: squares per sample differ from those of autograd on two images. Samples influence each other (a "
        "batch norm without stored statistics?), or the first dimension of this layer's input is not the batch, or the "
        "parameter is used a second time in another way, or the forward pass is random in eval mode. Put it into "
        "`ignore`, or make the model treat samples apart."
    )


# --- what a layer function does with its parameters ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a layer function.

    Attributes:
        input: What the function reads.
        weight: Its weight, if any.
        bias: Its bias, if any.
        channels_first: Whether dimension 1, not the last ones, holds the channels of the output.
        convolution: Geometry of a convolution.
        plain: The norm without scale and bias: input -> output.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    channels_first: bool = True
    convolution: _Convolution | None = None
    plain: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Convolution:
    """Geometry: ``small`` (fewer positions) has one position per place of the kernel on the padded ``big`` one.

    For a convolution ``big`` is the input and ``small`` the output, for a transposed one the other way round; the
    weight is ``[channels of small, channels of big / groups, *kernel]`` for both.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call:
    return _Call(input, weight, bias, channels_first=False)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> _Call:
    kernel = tuple(weight.shape[2:])
    spread = _each(dilation, kernel)
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(spread, kernel)]
        pads = tuple((w // 2, w - w // 2) for w in whole)
    else:
        pads = tuple((p, p) for p in _each(0 if isinstance(padding, str) else padding, kernel))
    geometry = _Convolution(kernel, _each(stride, kernel), pads, spread, groups, transposed=False)
    return _Call(input, weight, bias, convolution=geometry)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> _Call:
    kernel = tuple(weight.shape[2:])
    # The extra rows of output_padding lie behind the last place of the kernel: less padding there.
    pads = tuple((p, p - extra) for p, extra in zip(_each(padding, kernel), _each(output_padding, kernel)))
    geometry = _Convolution(kernel, _each(stride, kernel), pads, _each(dilation, kernel), groups, transposed=True)
    return _Call(input, weight, bias, convolution=geometry)


def _each(value: int | Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(like) if len(values) == 1 else values


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # type: ignore[no-untyped-def]
    def plain(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, None, None, training, 0.0, eps)

    return _Call(input, weight, bias, plain=plain)


def _instance_norm(  # type: ignore[no-untyped-def]
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    def plain(x: Tensor) -> Tensor:
        return F.instance_norm(x, running_mean, running_var, None, None, use_input_stats, 0.0, eps)

    return _Call(input, weight, bias, plain=plain)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    return _Call(input, weight, bias, plain=lambda x: F.group_norm(x, num_groups, None, None, eps))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
    def plain(x: Tensor) -> Tensor:
        return F.layer_norm(x, normalized_shape, None, None, eps)

    return _Call(input, weight, bias, channels_first=False, plain=plain)


def _rms_norm(input, normalized_shape, weight=None, eps=None):  # type: ignore[no-untyped-def]
    return _Call(input, weight, None, channels_first=False, plain=lambda x: F.rms_norm(x, normalized_shape, None, eps))


FUNCTIONS: dict[Callable[..., Tensor], Callable[..., _Call]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
"""Every function whose use of a parameter is understood -> what reads its arguments."""


class _Use:
    """One call that reads scored parameters; holds its input until all of them have been dealt with."""

    def __init__(self, call: _Call, kinds: Mapping[str, str]) -> None:
        self.call: _Call | None = replace(call, input=call.input.detach())
        self.kinds = kinds  # parameter name -> "weight" or "bias"
        self.version = call.input._version
        self.gradient: Tensor | None = None
        self.left = set(kinds)

    def done(self, name: str) -> None:
        """Forget the tensors when the last parameter has been dealt with."""
        self.left.discard(name)
        if not self.left:
            self.call = self.gradient = None


class _Recorder(TorchFunctionMode):
    """Sees every call of a layer function during one forward pass, and its gradient during the backward."""

    def __init__(self, squares: _Squares, samples: int) -> None:
        super().__init__()
        self.squares = squares
        self.samples = samples
        self.uses: dict[str, list[_Use]] = defaultdict(list)
        self.arrived: dict[str, list[_Use]] = defaultdict(list)
        self.tensors: dict[int, tuple[str, Tensor]] = {}
        self.identify(squares.scored)

    def identify(self, scored: Iterable[_Scored]) -> None:
        """Remember parameters by identity; the tensor is kept, so that its identity is not used again."""
        for s in scored:
            self.tensors[id(s.effective)] = (s.name, s.effective)

    def identify_again(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward-pre hook of masked modules."""
        self.identify(s for s in self.squares.scored if s.module is module)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        read = FUNCTIONS.get(func)
        if read is None or not torch.is_grad_enabled():
            return output
        call = read(*args, **(kwargs or {}))
        parameters = {"weight": call.weight, "bias": call.bias}
        kinds = {self.tensors[id(t)][0]: kind for kind, t in parameters.items() if id(t) in self.tensors}
        return self._watched(call, kinds, output) if kinds else output

    def _watched(self, call: _Call, kinds: Mapping[str, str], output: Tensor) -> Tensor:
        batched = call.convolution is None or call.input.dim() == 2 + len(call.convolution.kernel)
        if not batched or len(call.input) % self.samples or len(output) % self.samples:
            raise ModelError(
                f"{next(iter(kinds))}: the first dimension of the input {tuple(call.input.shape)} of this layer is "
                f"not the batch of {self.samples}; squares per sample are not defined there. Put it into `ignore`."
            )
        use = _Use(call, kinds)
        for name in kinds:
            self.uses[name].append(use)
        self.squares.seen |= set(kinds)
        if not output.requires_grad:  # a clone, because a leaf may not be changed in place
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: self._arrive(use, gradient))
        return output

    def _arrive(self, use: _Use, gradient: Tensor) -> None:
        if use.call is not None and use.call.input._version != use.version:
            raise ModelError(
                f"{next(iter(use.kinds))}: the input of this layer is changed in place after the layer has read it. "
                "Put the layer into `ignore`, or make that change out of place."
            )
        use.gradient = gradient
        for name in use.kinds:
            self.arrived[name].append(use)
            if len(self.arrived[name]) == len(self.uses[name]):
                self._settle(name)

    def _settle(self, name: str) -> None:
        uses = self.arrived.pop(name)
        self.squares.add(name, uses, self.samples)
        for use in uses:
            use.done(name)

    def finish(self) -> None:
        """Settle parameters of which some uses have no part in the logits."""
        for name in list(self.arrived):
            self._settle(name)
        self.uses.clear()


# --- squares in blocks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """For whom memory is planned, and how much there is."""

    name: str
    max_memory: int


@dataclass(frozen=True)
class _Plan:
    """Block sizes: ``chunk`` samples are copied, ``samples`` of them form ``rows`` rows of G_n at once."""

    chunk: int
    samples: int
    rows: int
    bytes: int


def _plan(
    place: _Place, samples: int, rows: int, sample_bytes: int, row_bytes: int, cache: int, together: int
) -> _Plan:
    """Choose block sizes.

    Scratch memory is chunk * sample_bytes + (samples + 3) * rows * row_bytes: the copies, the block, its sum over
    samples, and that sum in float64.

    Args:
        place: Name of the parameter, and the cap.
        samples: Samples in the batch.
        rows: Rows of G_n.
        sample_bytes: Copies made of one sample's activations and gradients, at most.
        row_bytes: One row of one G_n.
        cache: Wanted size of a block.
        together: Samples in one block, at most.

    Raises:
        ArgumentError: Not even one row of one sample fits.
    """
    free = place.max_memory - sample_bytes
    fitting = free // (4 * row_bytes)
    if fitting < 1:
        raise ArgumentError(
            f"max_memory={place.max_memory} is too small: {place.name} needs {sample_bytes + 4 * row_bytes} bytes for "
            "one row of the gradient of one sample. Raise max_memory, or put this parameter into `ignore`."
        )
    taken = max(1, min(rows, cache // row_bytes, fitting))
    taken = taken // 16 * 16 if 16 < taken < rows else taken  # vector kernels like whole multiples
    block = taken * row_bytes
    most = min(samples, together, cache // block, (free - 3 * block) // (block + sample_bytes))
    block_samples = max(1, most) if taken == rows else 1
    copies = min(32 * cache, place.max_memory - (block_samples + 3) * block)
    chunk = max(block_samples, min(samples, copies // max(1, sample_bytes)))
    return _Plan(chunk, block_samples, taken, chunk * sample_bytes + (block_samples + 3) * block)


def _add_squares(sums: Tensor, uses: Sequence[_Use], samples: int, place: _Place) -> None:
    """``sums += sum_n (sum over uses of G_n)^2``."""
    calls: list[tuple[_Call, Tensor]] = [(use.call, use.gradient) for use in uses]  # type: ignore[misc]
    kinds = [use.kinds[place.name] for use in uses]
    if "bias" in kinds or any(call.plain for call, _ in calls):
        _add_vector_squares(sums, calls, kinds, samples, place)
        return
    for part, factors in _by_group(sums, [_factors(*call, samples) for call in calls], place):
        _add_matrix_squares(part, factors, samples, place)


def _add_vector_squares(
    sums: Tensor, calls: Sequence[tuple[_Call, Tensor]], kinds: Sequence[str], samples: int, place: _Place
) -> None:
    """Norm scales and biases: a parameter's gradient is a sum over positions."""
    sample_bytes = 4 * max(_bytes(gradient, samples) for _, gradient in calls)
    plan = _plan(place, samples, 1, sample_bytes, 8 * sums.numel(), _cache(sums, place), samples)
    for start in range(0, samples, plan.chunk):
        stop = min(samples, start + plan.chunk)
        total = sums.new_zeros(stop - start, *sums.shape)
        for (call, gradient), kind in zip(calls, kinds):
            values = _taken(gradient, samples, start, stop)
            if kind == "weight":
                values = values * call.plain(_taken(call.input, samples, start, stop)).to(values.dtype)  # type: ignore[misc]
            total += _over_positions(values, stop - start, sums.shape, call.channels_first)
        sums += total.square_().sum(0)


def _over_positions(values: Tensor, samples: int, shape: torch.Size, channels_first: bool) -> Tensor:
    """``[samples, *shape]`` sums over positions."""
    if channels_first:
        return values.reshape(samples, len(values) // samples, shape[0], -1).sum((1, 3))
    return values.reshape(samples, -1, *shape).sum(1)


@dataclass(frozen=True, eq=False)
class _Factors:
    """What the gradients G_n of ``samples`` samples are made from: gradient and input of the function, or vice versa.

    Attributes:
        left: ``[samples * q, rows, *positions]``; for a linear layer ``[samples * q, *positions, rows]``.
        right: ``[samples * q, columns, *positions]``; for a linear layer with channels last.
        geometry: None for a linear layer.
        samples: Samples in both.
    """

    left: Tensor
    right: Tensor
    geometry: _Convolution | None
    samples: int

    @property
    def groups(self) -> int:
        return 1 if self.geometry is None else self.geometry.groups

    @property
    def taps(self) -> int:
        return 1 if self.geometry is None else math.prod(self.geometry.kernel)

    @property
    def positions(self) -> int:
        """Positions per sample over which a product of factors is summed."""
        return self.left.numel() // self.left.shape[1 if self.geometry else -1] // self.samples

    @property
    def pointwise(self) -> bool:
        """Every position of the output reads one position of the input."""
        return self.geometry is None or (self.taps == 1 and not any(map(any, self.geometry.padding)))

    def part(self, start: int, stop: int) -> _Factors:
        """Some of the samples, in the dtype of the arithmetic."""
        left, right = (_taken(t, self.samples, start, stop) for t in (self.left, self.right))
        return replace(self, left=left, right=right, samples=stop - start)

    def group(self, index: int) -> _Factors:
        """One group of a grouped convolution, as an ungrouped one."""
        left, right = (t.chunk(self.groups, 1)[index] for t in (self.left, self.right))
        return replace(self, left=left, right=right, geometry=replace(self.geometry, groups=1))  # type: ignore[type-var]


def _factors(call: _Call, gradient: Tensor, samples: int) -> _Factors:
    swapped = call.convolution is not None and call.convolution.transposed
    left, right = (call.input, gradient) if swapped else (gradient, call.input)
    return _Factors(left, right, call.convolution, samples)


def _by_group(sums: Tensor, factors: Sequence[_Factors], place: _Place) -> Iterable[tuple[Tensor, Sequence[_Factors]]]:
    """The sums as a matrix: its rows are those of the weight, or the groups of a grouped convolution.

    A convolution with large groups is taken apart, group by group.
    """
    groups = factors[0].groups
    if groups == 1:
        return [(sums.view(len(sums), -1), factors)]
    each = sums.view(groups, -1)
    if each.shape[1] * _width(factors[0].left) <= _cache(sums, place) // 4:
        return [(each, factors)]
    rows = len(sums) // groups
    return [(each[i].view(rows, -1), [f.group(i) for f in factors]) for i in range(groups)]


def _add_matrix_squares(sums: Tensor, factors: Sequence[_Factors], samples: int, place: _Place) -> None:
    """``sums [rows, columns] += sum_n G_n^2``, G_n the sum over ``factors``, in blocks."""
    width, cache = _width(factors[0].left), _cache(sums, place)
    flat = all(f.groups == 1 and (f.pointwise or f.positions <= UNFOLDED_POSITIONS) for f in factors)
    positions = sum(f.positions for f in factors)
    few = flat and positions <= FEW_POSITIONS
    sample_bytes = sum(_copied(f, flat) for f in factors) * min(2, len(factors))  # twice where several are joined
    together = samples
    if few:
        sample_bytes += positions * (positions + 1) * sum(sums.shape) * width
    elif not flat:  # samples become groups of one convolution; worth it only while their maps stay in the cache
        together = cache // sample_bytes if factors[0].groups > 1 else 1
    plan = _plan(place, samples, len(sums), sample_bytes, sums.shape[1] * width, cache, together)
    for start in range(0, samples, plan.chunk):
        parts = [f.part(start, min(samples, start + plan.chunk)) for f in factors]
        blocks = (_Pairs if few else _Products if flat else _Kernels)(parts, plan)
        for row in range(0, len(sums), plan.rows):
            some = sums[row : row + plan.rows]
            some += blocks.squares(row, row + len(some))


class _Pairs:
    """Few positions: (sum_t d_t a_t)^2 = sum_ts (d_t d_s)(a_t a_s), one product over samples and pairs."""

    def __init__(self, factors: Sequence[_Factors], plan: _Plan) -> None:
        left, right = _matrices(factors)
        t, s = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
        times = torch.where(t == s, 1, 2).to(left)
        self.left = left[:, :, t].mul_(left[:, :, s]).mul_(times).permute(1, 0, 2).flatten(1)
        self.right = right[:, t].mul_(right[:, s]).flatten(0, 1)

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows."""
        return torch.mm(self.left[start:stop], self.right).clamp_min_(0)  # rounding may fall below zero


class _Products:
    """Matrix products G_n = left_n right_n."""

    def __init__(self, factors: Sequence[_Factors], plan: _Plan) -> None:
        self.left, self.right = _matrices(factors)
        self.together = plan.samples
        self.scratch = self.left.new_empty(plan.samples * plan.rows * self.right.shape[2])

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows."""
        left = self.left[:, start:stop]
        total = left.new_zeros(stop - start, self.right.shape[2])
        for d, a in zip(left.split(self.together), self.right.split(self.together)):
            out = self.scratch[: len(d) * total.numel()].view(len(d), *total.shape)
            _accumulate(total, torch.bmm(d, a, out=out))
        return total


class _Kernels:
    """Weight gradients of convolutions; the samples of a block become groups of one call."""

    def __init__(self, factors: Sequence[_Factors], plan: _Plan) -> None:
        self.factors = [_evenly_padded(f) for f in factors]  # and contiguous, so that the gradients are
        self.together = plan.samples

    def squares(self, start: int, stop: int) -> Tensor:
        """``[stop - start, columns]`` sum_n G_n^2 of some rows (or groups)."""
        total: Tensor | None = None
        samples = self.factors[0].samples
        for n in range(0, samples, self.together):
            first, *others = (f.part(n, min(samples, n + self.together)) for f in self.factors)
            block = _kernel_gradients(first, start, stop)
            for other in others:
                block += _kernel_gradients(other, start, stop)
            total = block.new_zeros(block.shape[1:]) if total is None else total
            _accumulate(total, block)
        return total  # type: ignore[return-value]


def _accumulate(total: Tensor, block: Tensor) -> None:
    """``total += sum_n block_n^2``; the block is overwritten."""
    if total.numel() < SMALL_ELEMENTS < block.numel():
        total += block.square_().sum(0)
        return
    for gradient in block.unbind():
        total.addcmul_(gradient, gradient)


_KERNEL_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def _kernel_gradients(factors: _Factors, start: int, stop: int) -> Tensor:
    """``[samples, stop - start, columns]`` some rows (or groups, where there are several) of every G_n."""
    geometry: _Convolution = factors.geometry  # type: ignore[assignment]
    samples, small, big, running = factors.samples, factors.left, factors.right, 1
    if geometry.groups == 1:
        small = small[:, start:stop]
    else:
        small, big = (_groups_of(t, geometry.groups, start, stop) for t in (small, big))
        running = stop - start
    small, big = (t.unflatten(0, (samples, -1)).transpose(0, 1).flatten(1, 2) for t in (small, big))
    shape = (small.shape[1], big.shape[1] // (samples * running), *geometry.kernel)
    padding = [before for before, _ in geometry.padding]
    gradient = _KERNEL_GRADIENTS[len(geometry.kernel)]
    found = gradient(big, shape, small, geometry.stride, padding, geometry.dilation, samples * running)  # type: ignore[arg-type]
    return found.reshape(samples, stop - start, -1)


def _groups_of(tensor: Tensor, groups: int, start: int, stop: int) -> Tensor:
    each = tensor.shape[1] // groups
    return tensor[:, start * each : stop * each]


def _matrices(factors: Sequence[_Factors]) -> tuple[Tensor, Tensor]:
    """``[n, rows, K]`` and ``[n, K, columns]`` with G_n their product; several uses lie side by side in K."""
    left, right = zip(*map(_matrix_pair, factors))
    return (left[0], right[0]) if len(factors) == 1 else (torch.cat(left, 2), torch.cat(right, 1))


def _matrix_pair(factors: _Factors) -> tuple[Tensor, Tensor]:
    n, left, right = factors.samples, factors.left, factors.right
    if factors.geometry is None:
        return left.reshape(n, -1, left.shape[-1]).mT, right.reshape(n, -1, right.shape[-1])
    right = _unfolded(right, factors.geometry, tuple(left.shape[2:]))
    left, right = (t.unflatten(0, (n, -1)).transpose(1, 2).flatten(2) for t in (left, right))
    return left, right.mT


def _unfolded(big: Tensor, geometry: _Convolution, positions: tuple[int, ...]) -> Tensor:
    """``[N, C * taps, *positions]`` what the kernel reads at every position."""
    big = _padded(big, geometry.padding)
    steps = list(zip(geometry.stride, geometry.dilation, positions))
    taps = [
        big[(..., *(slice(o * d, o * d + s * (p - 1) + 1, s) for o, (s, d, p) in zip(offsets, steps)))]
        for offsets in itertools.product(*map(range, geometry.kernel))
    ]
    return taps[0] if len(taps) == 1 else torch.stack(taps, 2).flatten(1, 2)


def _evenly_padded(factors: _Factors) -> _Factors:
    """Pad here what PyTorch's gradient cannot: it pads both sides alike."""
    geometry: _Convolution = factors.geometry  # type: ignore[assignment]
    right = factors.right
    if any(before != behind for before, behind in geometry.padding):
        right = _padded(right, geometry.padding)
        geometry = replace(geometry, padding=tuple((0, 0) for _ in geometry.padding))
    return replace(factors, left=factors.left.contiguous(), right=right.contiguous(), geometry=geometry)


def _padded(big: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    """Zeros around the map; negative padding crops."""
    return F.pad(big, [p for pair in padding[::-1] for p in pair]) if any(map(any, padding)) else big


def _taken(tensor: Tensor, samples: int, start: int, stop: int) -> Tensor:
    """The rows of some samples, in the dtype of the arithmetic: float64 stays, all else becomes float32."""
    rows = len(tensor) // samples
    return tensor[start * rows : stop * rows].to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _copied(factors: _Factors, flat: bool) -> int:
    """Bytes of copies per sample, at most: in another dtype, in another layout, padded, unfolded."""
    left, right = (_bytes(t, factors.samples) for t in (factors.left, factors.right))
    if factors.geometry is None or factors.pointwise:
        return 2 * (left + right)
    sizes = factors.right.shape[2:]
    padded = math.prod(n + sum(p) for n, p in zip(sizes, factors.geometry.padding)) * right // math.prod(sizes)
    unfolded = factors.right.shape[1] * _width(factors.right) * factors.taps * factors.positions
    return 2 * (left + right + unfolded) + padded if flat else 3 * left + 2 * right + padded


def _width(tensor: Tensor) -> int:
    """Bytes of a number in the dtype of the arithmetic."""
    return 8 if tensor.dtype == torch.float64 else 4


def _bytes(tensor: Tensor, samples: int) -> int:
    return tensor.numel() // samples * _width(tensor)


def _cache(tensor: Tensor, place: _Place) -> int:
    """Wanted size of a block: what stays in the cache of a CPU; elsewhere, fewer and larger calls."""
    return CACHE_BYTES if tensor.device.type == "cpu" else max(CACHE_BYTES, place.max_memory // 16)


def _checked(
    objective: str, statistic: str, batch: int, parameters: str, confidence: float, max_memory: int
) -> Objective:
    for what, value, known in (("statistic", statistic, STATISTICS), ("parameters", parameters, PARAMETERS)):
        if value not in known:
            raise ArgumentError(f"{what} must be one of {', '.join(known)}, got {value!r}.")
    check_arguments(objective, "consumer", "batched" if statistic == "batched" else "second_moment", batch, confidence)
    if max_memory < 1:
        raise ArgumentError(f"max_memory must be a positive number of bytes, got {max_memory}.")
    return OBJECTIVES[objective]
