"""Which direction in output space matters: (logits, reference) -> one scalar per sample.

Dense logits ``[B, K, P]`` have one at each of P positions; they are added up.
The gradient of the scalar with respect to the logits is m(x) in the relevance
v_u(x) = m(x)^T J_u(x) w_u. Every objective sees one sample at a time, so the sum over a batch has the
gradient of each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError, DataError
from jbrprune.evaluation.outputs import LOGITS, Output


@dataclass(frozen=True, eq=False)
class Target:
    """What an objective may look at besides the logits.

    Attributes:
        reference: ``[B, K]`` logits of the dense model, frozen before pruning.
        labels: ``[B]`` class indices, or None.
        generator: Source of randomness (CPU).
    """

    reference: Tensor
    labels: Tensor | None
    generator: torch.Generator


def pseudo_label(logits: Tensor, target: Target) -> Tensor:
    """Cross-entropy against the dense model's own prediction: m = softmax(f) - onehot(argmax f_dense)."""
    _need_classes("pseudo_label", logits)
    return _cross_entropy(logits, target.reference.argmax(1))


def predicted_logit(logits: Tensor, target: Target) -> Tensor:
    """The logit of the class the dense model predicts: m = onehot(argmax f_dense). The paper's formula."""
    return _at(logits, target.reference.argmax(1))


def margin(logits: Tensor, target: Target) -> Tensor:
    """The logit of the dense model's prediction less that of its runner-up."""
    _need_classes("margin", logits)
    first, second = target.reference.topk(2, dim=1).indices.unbind(1)
    return _at(logits, first) - _at(logits, second)


def label(logits: Tensor, target: Target) -> Tensor:
    """Cross-entropy against the true label: m = softmax(f) - onehot(y)."""
    if target.labels is None:
        raise DataError(
            "objective 'label' needs labels, but the data yield none that are class indices. Yield (image, label) "
            "tuples, or choose a label-free objective such as 'pseudo_label'."
        )
    _need_classes("label", logits)
    most, classes = int(target.labels.max()), logits.shape[1]
    if most >= classes:
        raise DataError(f"Labels must be below {classes}, the number of the model's classes; got {most}.")
    return _cross_entropy(logits, target.labels)


def projection(logits: Tensor, target: Target) -> Tensor:
    """Random signs over the logits: E[v^2] = ||J_u w_u||^2 over all K outputs, without bias.

    The signs are drawn sample by sample in the order of the data, so the batch size does not matter.
    """
    signs = torch.randint(0, 2, logits.shape, generator=target.generator, dtype=torch.int8)
    return (logits * (2 * signs - 1).to(logits)).sum(1)


Objective = Callable[[Tensor, Target], Tensor]

OBJECTIVES: dict[str, Objective] = {
    function.__name__: function for function in (pseudo_label, predicted_logit, margin, label, projection)
}


class Directions:
    """m(x), the gradient of an objective with respect to the logits, for the batches of one pass over the data.

    The random numbers of a sample depend on the seed and on its position in the data only: they are those that one
    generator draws sample by sample, whoever looks at which batch, and in which order.

    Args:
        objective: Its name, or a function; None: what the output asks for.
        threshold: Samples whose largest dense probability is not above this are left out.
        seed: Seeds the generator.
        output: What made the logits, or other rows.

    Raises:
        ArgumentError: The objective, or the threshold, needs classes, or one decision per image, and there are none.
    """

    def __init__(
        self, objective: str | Objective | None, threshold: float = 0.0, seed: int = 0, output: Output = LOGITS
    ) -> None:
        name = output.objective if objective is None else objective
        self.objective = OBJECTIVES[name] if isinstance(name, str) else name
        if (output.positions > 1 and (threshold > 0 or name == "label")) or (
            not output.decides and (threshold > 0 or name in OBJECTIVES.keys() - {"projection"})
        ):
            raise ArgumentError(
                f"objective {name!r} with threshold={threshold:g} needs one decision among classes, but what counts is "
                f"{output.note}. Leave both out, or choose 'projection'; output='logits' says that it is logits."
            )
        self.threshold, self.seed, self.output = threshold, seed, output
        self._generator = torch.Generator().manual_seed(seed)
        self._position = 0

    def __call__(self, logits: Tensor, batch: Batch, start: int) -> tuple[Tensor, Tensor]:
        """Directions of one batch.

        Args:
            logits: ``[n, V]`` of the model.
            batch: The samples.
            start: Position of the first of them in the data.

        Returns:
            ``[n, V]`` m, in float32 or wider, and ``[n]`` which samples stay; m of the others is zero.

        Raises:
            DataError: No labels where the objective needs them, or a reference of another shape.
        """
        if batch.reference is not None and batch.reference.shape != logits.shape:
            raise DataError(
                f"Image {start} and later: the reference logits are {list(batch.reference.shape)}, the model's are "
                f"{list(logits.shape)}. Attach the logits of the dense model on the same images."
            )
        # A cross-entropy of half precision would lose confident samples.
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
        reference = logits.detach() if batch.reference is None else batch.reference
        generator = self._generator_at(start, len(logits), logits.shape[1])
        with torch.enable_grad():
            target = Target(self.output.by_class(reference), batch.labels, generator)
            total = self.objective(self.output.by_class(logits), target).sum()
        (m,) = torch.autograd.grad(total, logits)
        stays = reference.softmax(1).amax(1) > self.threshold  # always, where the threshold is 0
        return m.masked_fill(~stays[:, None], 0), stays

    def _generator_at(self, start: int, count: int, each: int) -> torch.Generator:
        """Ready to draw ``each`` numbers for each of ``count`` samples from ``start`` on."""
        if start < self._position:
            self._generator.manual_seed(self.seed)
            self._position = 0
        some = max(1, min(1024, (1 << 22) // each))
        for first in range(self._position, start, some):  # to let numbers pass is cheap beside a forward pass
            torch.randint(0, 2, (min(some, start - first), each), generator=self._generator, dtype=torch.int8)
        self._position = start + count
        return self._generator


def _cross_entropy(logits: Tensor, index: Tensor) -> Tensor:
    """-log softmax, as log(1 + exp(others - own)): its gradient is exact where p - 1 would cancel."""
    others = logits.scatter(1, index[:, None], -torch.inf).logsumexp(1)
    return F.softplus(others - _at(logits, index), threshold=40)  # exp(-40) is nothing even in float64; no overflow


def _need_classes(objective: str, logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ArgumentError(
            f"objective {objective!r} needs at least two classes, the model has {logits.shape[1]}: its scores would "
            "all be zero. Choose 'predicted_logit' or 'projection'."
        )


def _at(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[:, None])[:, 0]
