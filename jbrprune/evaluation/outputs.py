"""What a model returns, and what of it counts: one row of numbers per image, whatever the model returns.

Relevance, repair, prediction and agreement work on rows ``[B, V]``. `Output` makes them:

* ``logits`` ``[B, K]``: the logits.
* ``binary`` ``[B, L]``, L decisions by the sign of a logit z each: the two logits -z/2 and z/2, whose softmax is the
  sigmoid of z.
* ``dense`` ``[B, K, H, W]``: the logits of every position; with K = 1 as of ``binary``.
* ``embedding`` ``[B, D]``, also a regression, and ``features``, one or several tensors of any shape: the values, each
  tensor divided by sqrt(E ||f||^2), the root mean square of its norm over the calibration images. A squared difference
  of rows is then a relative squared error, and all levels of a pyramid count alike.

Of a tensor with more than `MOST_VALUES` values per image every s-th one counts (of ``dense``, every s-th position).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jbrprune.errors import ArgumentError, ModelError
from jbrprune.models.preserve import describe_returned, logits_of, tensors_of

DIMENSIONS = {"logits": 2, "binary": 2, "embedding": 2, "dense": 4, "features": None}
"""Kinds, and how many dimensions such a tensor has; None: any number."""
MOST_VALUES = 1 << 16
"""Values per image of one tensor, or positions, that count."""
OTHERWISE = (
    f"output= says what counts: {', '.join(map(repr, DIMENSIONS))}, a key, an index, or a function of what is returned"
)

Asked = str | int | Callable[[object], object] | None
"""What ``output=`` may be."""


@dataclass(frozen=True)
class Output:
    """What of the things that a model returns counts; it turns them into rows.

    Attributes:
        kind: A key of `DIMENSIONS`.
        names: Which of the tensors count, by key or position (`jbrprune.models.preserve.tensors_of`); empty: whatever
            is known to be logits.
        function: Applied to what the model returns before anything else.
        positions: Decisions per image, each by logits of its own.
        sizes: Numbers in a row that belong to each tensor.
        scales: Their divisors, of ``embedding`` and ``features``; empty: not known yet.
        note: What counts and why, for people.
        guessed: Whether the model does not tell what it is, or returns more.

    Example:
        >>> found = find_output(nn.Identity(), {"x": torch.ones(2, 3), "y": torch.ones(2, 4, 2, 2)}, 2)
        >>> found.kind, found.names, found.sizes
        ('features', ('x', 'y'), (3, 16))
    """

    kind: str = "logits"
    names: tuple[str, ...] = ()
    function: Callable[[object], object] | None = None
    positions: int = 1
    sizes: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    note: str = ""
    guessed: bool = False

    @property
    def decides(self) -> bool:
        """Whether there are classes, among which the largest logit decides."""
        return self.kind in ("logits", "binary", "dense")

    @property
    def objective(self) -> str:
        """What counts as damage where nothing else is asked for; see `jbrprune.criteria.objectives`."""
        return "pseudo_label" if self.decides else "projection"

    @property
    def said(self) -> str:
        """What counts, for people, and how to say otherwise where the model does not tell."""
        return f"What counts of the model's output: {self.note}." + f" {OTHERWISE}." * self.guessed

    def __call__(self, returned: object) -> Tensor:
        """Rows ``[B, V]`` of what the model returned.

        Raises:
            ModelError: The tensors that count are not there.
        """
        if not self.names:
            return logits_of(returned)
        tensors = tensors_of(returned if self.function is None else self.function(returned))
        if missing := [name for name in self.names if name not in tensors]:
            raise ModelError(f"The model returned {describe_returned(returned)}, without {missing[0]!r}. {OTHERWISE}.")
        chosen = [tensors[name] for name in self.names]
        if self.kind == "logits":
            return chosen[0]
        if self.decides:
            return decisions(self.kind, chosen[0]).flatten(1)
        return self.scale(torch.cat([thin(tensor.reshape(len(tensor), -1)) for tensor in chosen], 1))

    def scale(self, rows: Tensor) -> Tensor:
        """Rows ``[N, V]`` divided by the scales, if there are any."""
        parts = zip(rows.split(self.sizes, 1), self.scales, strict=True) if self.scales else ()
        return torch.cat([part / scale for part, scale in parts], 1) if self.scales else rows

    def by_class(self, rows: Tensor) -> Tensor:
        """``[N, K]`` rows of logits, or ``[N, K, P]`` of P positions."""
        return rows if self.positions == 1 else rows.unflatten(1, (-1, self.positions))

    def classes(self, rows: Tensor) -> int | None:
        """Number of classes among which an image has one label; None where labels have no meaning."""
        return rows.shape[1] if self.decides and self.positions == 1 else None

    def centre(self, rows: Tensor) -> Tensor:
        """``[N, V]`` logits without their mean over classes, which no decision depends on; other rows as they are."""
        logits = self.by_class(rows)
        return (logits - logits.mean(1, keepdim=True)).flatten(1) if self.decides else rows

    def follow(self, rows: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The largest numbers of every row, of one position drawn for each: ``[N, R <= most]``, falling, and where."""
        values, at = self.by_class(rows.detach()), 0
        if self.positions > 1:
            at = torch.randint(self.positions, (len(rows), 1), generator=generator).to(rows.device)
            values = self.at(values, at)
        top, classes = values.sort(dim=1, descending=True, stable=True)
        return top[:, :most], classes[:, :most] * self.positions + at

    def at(self, logits: Tensor, position: Tensor) -> Tensor:
        """``[N, K]`` logits of position ``[N, 1]`` of ``[N, K, P]``; with one position, all."""
        if self.positions == 1:
            return logits
        return logits.gather(2, position[:, None].expand(-1, logits.shape[1], 1))[..., 0]

    def scaled_by(self, batches: Iterable[Tensor]) -> Output:
        """The same with the scales of rows ``[N, V]``, batch by batch, that were made without."""
        if self.decides:
            return self
        squares = [torch.stack([p.double().square().sum(1) for p in rows.split(self.sizes, 1)]) for rows in batches]
        return replace(self, scales=tuple(float(norm) or 1.0 for norm in torch.cat(squares, 1).mean(1).sqrt()))


LOGITS = Output()
"""Whatever is known to be the logits, ``[B, K]``: what counts where nobody looked at the model."""


def thin(x: Tensor) -> Tensor:
    """Every s-th entry of the last dimension, s prime to its length, where one image has too many."""
    stride = max(1, -(-x.shape[-1] // MOST_VALUES))
    while math.gcd(stride, x.shape[-1]) > 1:
        stride += 1
    return x[..., ::stride]


def decisions(kind: str, logits: Tensor) -> Tensor:
    """``[B, K, P]`` logits of decisions, of ``[B, L]`` or ``[B, K, H, W]``; of a lone logit z they are -z/2 and z/2."""
    logits = logits[:, None] if kind == "binary" else logits.flatten(2)
    return thin(torch.cat([logits / -2, logits / 2], 1) if logits.shape[1] == 1 else logits)


def check_output(name: str, value: object) -> None:
    """Accept what ``output=`` may be."""
    if not isinstance(value, str | int) and not callable(value):
        raise ArgumentError(
            f"{name} must be one of {', '.join(DIMENSIONS)}, a key, an index or a function; got {value!r}."
        )


def find_output(model: nn.Module, returned: object, images: int, asked: Asked = None) -> Output:
    """What counts of the things that a model returns: as asked for, or as far as the model tells.

    A tensor under the key of a kind is of this kind, also in what a function returns.

    Args:
        model: Asked whether it has a classifier.
        returned: What it returned.
        images: For how many images.
        asked: A kind, a key (``"boxes"``, ``"hidden.0"``), an index, a function of what the model returns, or None.

    Raises:
        ModelError: What is asked for is not there, or not of its kind.
    """
    function = asked if callable(asked) else None
    found = tensors_of(returned if function is None else function(returned))
    tensors = {name: tensor for name, tensor in found.items() if len(tensor) == images}
    kind = asked if isinstance(asked, str) and asked in DIMENSIONS else None
    names = [name for name in tensors if f"{name}.".startswith(f"{asked}.")]
    if not names and (kind is not None or asked is None or function is not None):
        wanted = DIMENSIONS.get(kind or "features")
        names = [name for name, tensor in tensors.items() if wanted in (None, tensor.dim())]
        main = "logits" if "logits" in names else "out" if "out" in names and tensors["out"].dim() == 4 else None
        names = [main] if main and kind in (None, "logits", "dense") else names
    alone, guessed = tensors[names[0]] if len(names) == 1 else None, False
    if kind is None and alone is not None:
        kind, guessed = _tell_kind(model, names[0].rpartition(".")[2], alone, asked)
    kind = "dense" if kind == "logits" and alone is not None and alone.dim() == 4 else kind or "features"
    wanted = DIMENSIONS[kind]
    if not names or (wanted and (alone is None or alone.dim() != wanted)):
        none = "no floating-point tensor has a row for each image" if asked is None else f"{asked!r} is none of them"
        what = f"{kind!r} is one tensor of {wanted} dimensions" if names else none
        raise ModelError(f"The model returned {describe_returned(returned)}; {what}. {OTHERWISE}.")
    chosen, left = [tensors[name] for name in names], [name for name in found if name not in names]
    shown = ", ".join(f"{name} [B, {', '.join(map(str, t.shape[1:]))}]".strip() for name, t in zip(names, chosen))
    note = f"{kind}: {shown}" + f"; not looked at: {', '.join(left)}" * bool(left)
    if kind == "embedding" and chosen[0].shape[1] == 1:
        note += "; with output='binary' its sign would decide"
    positions = decisions(kind, chosen[0]).shape[2] if kind in ("binary", "dense") else 1
    sizes = tuple(thin(tensor.reshape(images, -1)).shape[1] for tensor in chosen)
    return Output(kind, tuple(names), function, positions, sizes, note=note, guessed=guessed or bool(left))


def _tell_kind(model: nn.Module, name: str, tensor: Tensor, asked: Asked) -> tuple[str, bool]:
    """The kind of the one tensor that counts, and whether that is a guess."""
    if name in DIMENSIONS:
        return name, False
    if tensor.dim() != 2:
        return ("dense", False) if name == "out" and tensor.dim() == 4 else ("features", tensor.dim() == 4)
    heads = [getattr(model, name, None) for name in ("fc", "classifier", "head", "heads")]
    classes = getattr(model, "num_classes", 0 if any(isinstance(head, nn.Identity) for head in heads) else None)
    if tensor.shape[1] == 1 or classes == 0 or asked is not None:
        return "embedding", tensor.shape[1] == 1 or classes != 0
    return "logits", not isinstance(classes, int)
