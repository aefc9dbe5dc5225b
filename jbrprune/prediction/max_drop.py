"""The smallest model that loses no more than allowed: the prediction proposes, measurement decides.

The loop walks down step by step; a generator tells it where to. At the shares that the prediction proposes, and at
the latest every `FARTHEST` steps, the model is measured on images that neither score nor repair nor gate. If it lost
too much, the walk goes back: to the models in between by bisection, then from the last good one with smaller steps.

With ``confidence`` above 0.5 an upper bound of the loss decides. Where smaller models lose more, the walk measures at
most `CHANCES` models that lose more than is allowed before it ends: one that ends the way down, those of the bisection
and those of the smaller steps. Each bound holds with 1 - (1 - confidence) / `CHANCES` (Bonferroni), so what is handed
over loses no more than allowed with the confidence asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import torch

from jbrprune.budgets.budget import STEP
from jbrprune.data import distributed
from jbrprune.data.batches import Batch, count
from jbrprune.errors import BudgetError, DataError
from jbrprune.evaluation.agreement import Drop, compute_logits, measure_drop
from jbrprune.prediction.changes import Changes, predict_changes
from jbrprune.prediction.damage import measure_damage
from jbrprune.pruning.channels import Channels
from jbrprune.pruning.loop import Stop, run
from jbrprune.pruning.prepare import Calibration
from jbrprune.report.records import Search, Trial

log = logging.getLogger(__name__)

FARTHEST = 4
"""Steps between two measurements; models in between are kept to go back to."""
RESOLUTION = 0.0125
"""The walk ends when a model that is smaller by this share of the dense cost loses too much."""
CHANCES = 1 + math.ceil(math.log2(FARTHEST)) + math.ceil(math.log2(STEP / RESOLUTION))
"""Models that may be taken for good by mistake."""
FOLLOWED = 4
"""Logits of every sample that the proposals look at."""


@dataclass(eq=False)
class Outlook:
    """Predicted flips, or relative errors, at the shares of the walk; corrected by what is measured on the way."""

    shares: Sequence[float]
    changes: Changes
    repaired: bool
    scale: float = 1.0

    def lost(self, share: float) -> float:
        """Predicted loss at a share, interpolated linearly between planned shares and the dense model."""
        lost = [self._lost(number) for number in range(len(self.shares))]
        return float(np.interp(share, [*reversed(self.shares), 1.0], [*reversed(lost), 0.0]))

    def propose(self, allowed: float, below: float) -> float:
        """The smallest planned share below a share up to which all are predicted to be allowed; inf if none is."""
        last = math.inf
        for number, share in enumerate(self.shares):
            if share < below - 1e-9:
                if self._lost(number) > allowed:
                    break
                last = share
        return last

    def correct(self, share: float, tpv: float) -> None:
        """Scale all predictions so that the one at a share has the TPV that was measured there."""
        number = next((i for i, planned in enumerate(self.shares) if abs(planned - share) < 1e-9), None)
        if number is not None:
            predicted = self.changes.damage(number, repaired=self.repaired).tpv
            if predicted > 0 and tpv > 0:
                self.scale = math.sqrt(tpv / predicted)

    def _lost(self, number: int) -> float:
        return self.changes.lost(number, repaired=self.repaired, scale=self.scale)


def search(state: Channels, images: Calibration) -> Stop:
    """Prune a copy of the dense model as far as no more than ``max_drop`` is lost, by the images that decide.

    Args:
        state: The units, before any step; a budget in its options is the least to keep.
        images: Read with ``judged=True``.

    Returns:
        The model, which is the dense one if no smaller one is allowed, and the report.

    Raises:
        BudgetError: Every group is at its floor.
        DataError: Too few images to set some aside, or too few of them for ``max_drop``.
        NonFiniteError: NaN or Inf on the way.
    """
    allowed, confidence = float(state.options.max_drop), state.options.confidence
    state.output = images.output
    if not images.heldout:
        raise DataError(f"max_drop needs images that decide, but there are only {count(images.score)}: pass more.")
    level = 0.5 if confidence == 0.5 else 1 - (1 - confidence) / CHANCES
    if images.output.decides or images.output.kind == "embedding":  # which are counted
        check_resolution(count(images.heldout), allowed, level)
    if not (shares := _grid(state)):
        raise BudgetError("Nothing can go: every group is at its floor. Pass floors=Floors(channels=...) with fewer.")
    walk = _Walk(state, images.heldout, allowed, level, _outlook(state, images, shares))
    stop = next(run(state, images, goals=walk.shares()))
    decided = f"{count(images.heldout)} images that neither score, repair nor gate"
    found = Search(allowed, decided, tuple(walk.trials), walk.measure_chosen(), walk.limit, confidence)
    notes = stop.report.notes
    if not any(trial.accepted for trial in found.trials):
        notes = (*notes, "Nothing was removed: the smallest step already lost more than max_drop allows.")
    return replace(stop, report=replace(stop.report, search=found, notes=notes))


def check_resolution(deciding: int, allowed: float, level: float) -> None:
    """Refuse a drop that is too small to be shown on this many images, at this level, even if nothing is lost on them.

    Raises:
        DataError: Says how many it takes. A drop of 0 can always be seen.
    """
    if allowed > 0 and deciding < (needed := count_needed(0, allowed, level)):
        some = "" if level == 0.5 else f", and {count_needed(allowed / 2, allowed, level):,} if half of it is lost"
        raise DataError(
            f"max_drop={allowed:g} cannot be seen on the {deciding} images that decide: it takes {needed:,} even if "
            f"nothing is lost on them{some}. Pass others as eval_data=, pass more (two fifths decide, or those beyond "
            "`images=`), allow more, or ask for less confidence=."
        )


def count_needed(lost: float, allowed: float, level: float) -> int:
    """Number of images at which the upper bound of a lost share falls to the allowed one."""
    if level == 0.5:
        return math.ceil(1 / allowed - 1e-9)
    none = math.ceil(math.log(1 - level) / math.log1p(-allowed))
    return max(none, math.ceil(NormalDist().inv_cdf(level) ** 2 * lost * (1 - lost) / (allowed - lost) ** 2))


def _grid(state: Channels) -> list[float]:
    """Shares in steps, falling; the last is the least that the floors, or the user, allow."""
    least = state.stops[0] if state.stops else min(1.0, state.least + 0.001)
    steps = math.ceil((1 - least) / STEP - 1e-9)
    return [1 - STEP * number for number in range(1, steps)] + [least] * (least < 1)


def _outlook(state: Channels, images: Calibration, shares: Sequence[float]) -> Outlook:
    options = state.options
    scores = state.score(images.score, 1)
    cuts = [state.plan(scores, share) for share in shares]
    predicted = predict_changes(
        state.model,
        images.score,
        state.groups,
        [cut.units for cut in cuts],
        state.output,
        refits=options.refits,
        followed=FOLLOWED,
        seed=options.seed,
        progress=options.progress,
    )
    return Outlook(shares, predicted, repaired=bool(options.methods) and bool(images.gate))


@dataclass(eq=False)
class _Walk:
    """The state of the search: models to go back to, trials, and the next share."""

    state: Channels
    judge: Sequence[Batch]
    allowed: float
    level: float
    outlook: Outlook
    trials: list[Trial] = field(default_factory=list)
    limit: str = "the floors or the share asked for were reached"

    def __post_init__(self) -> None:
        self.reference = torch.cat([batch.reference for batch in self.judge if batch.reference is not None])
        labels = [batch.labels for batch in self.judge if batch.labels is not None]
        self.labels = torch.cat(labels) if len(labels) == len(self.judge) else None
        self.logits = self.reference

    def measure_chosen(self) -> Drop:
        """Measure the drop of the chosen model, with an interval for the choice among all measured ones."""
        how = {"models": max(1, len(self.trials)), "confidence": self.level}
        return measure_drop(self.logits, self.reference, self.labels, self.state.output, **how)

    def shares(self) -> Iterator[float]:
        """Yield shares to the loop, which has carried out each one when the next is asked for."""
        at, good, failed = 1.0, self.state.copy(), None
        while failed is None and (ahead := self._ahead(at)):
            passed: list[tuple[float, Channels]] = []
            for share in ahead:
                yield share
                passed.append((share, self.state.copy()))
            if self._accept(ahead[-1]):
                at, good = passed[-1]
                continue
            best, failed = self._bisect(passed)
            at, good = best or (at, good)
        while failed is not None and at - failed > RESOLUTION + 1e-9:
            self.state.restore(good)
            middle = (at + failed) / 2
            yield middle
            if self._accept(middle):
                at, good = middle, self.state.copy()
            else:
                failed = middle
        self.state.restore(good)

    def _ahead(self, at: float) -> list[float]:
        """The next steps, up to the one that is measured."""
        below = [share for share in self.outlook.shares if share < at - 1e-9][:FARTHEST]
        wanted = distributed.broadcast(self.outlook.propose(self.allowed, at))  # another processor predicts other bits
        return [share for share in below if share >= wanted - 1e-9] or below[:1]

    def _bisect(self, passed: Sequence[tuple[float, Channels]]) -> tuple[tuple[float, Channels] | None, float]:
        """The smallest model that is allowed of those on the way to one that is not, and the share that failed."""
        low, high = -1, len(passed) - 1
        while high - low > 1:
            middle = (low + high) // 2
            self.state.restore(passed[middle][1])
            if self._accept(passed[middle][0]):
                low = middle
            else:
                high = middle
        return passed[low] if low >= 0 else None, passed[high][0]

    def _accept(self, share: float) -> bool:
        """Measure the model as it is; return whether what it lost is allowed."""
        predicted = self.outlook.lost(share)
        with self.state.timed("judging"):
            logits = torch.cat(compute_logits(self.state.model, self.judge, self.state.output))
        drop = measure_drop(logits, self.reference, self.labels, self.state.output, confidence=self.level)
        accepted = drop.within(self.allowed)
        self.trials.append(Trial(share, self.state.steps[-1].macs, drop, accepted, predicted))
        log.info("Share %.4f: %s falls by %.4f, %s", share, drop.of, drop.lost, "kept" if accepted else "too much")
        if accepted:
            self.logits = logits
            self.outlook.correct(share, measure_damage(self.reference, logits, self.state.output).tpv)
        else:
            self.limit = f"at a share of {share:.4f} the {drop.of} fell by {drop.lost:.2%}"
            if drop.lost < self.allowed:
                needed = count_needed(max(drop.lost, 0.0), self.allowed, self.level)
                self.limit += f", which may be {drop.upper:.2%}; it takes some {needed:,} images to know that it is not"
        return accepted
