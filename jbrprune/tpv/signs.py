"""Random signs over the outputs: Rademacher vectors, balanced over blocks of samples where the outputs are few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_BALANCED = 32
"""Rows of a block, at most; with more outputs the signs of different samples are independent."""


class Signs:
    r"""Sign vectors s with E s s^T = I, in the order of the samples.

    s^T M s has the variance 2 sum_{k != l} M_kl^2. Over a block of m samples the rows of a Hadamard matrix, its columns
    flipped at random, have sum s s^T = m I: what M has in common among the samples of the block adds nothing to the
    variance. Every single vector is uniform, so nothing is biased; vectors of one block depend on each other, so a
    standard error is taken over blocks.

    Args:
        outputs: K.
        each: Vectors per sample.
        first: Number of the first sample.
        seed: Of the flips.
    """

    def __init__(self, outputs: int, each: int, first: int, seed: int) -> None:
        self.outputs = outputs
        self.each = each
        self.generator = torch.Generator().manual_seed(seed)
        rows = 1 << max(0, math.ceil(math.log2(outputs)))
        self.rows = rows if rows <= MOST_BALANCED else 1
        self.base = _hadamard(self.rows)[:, :outputs] if self.rows > 1 else torch.ones(1, outputs, dtype=torch.int8)
        self.number = 0
        self.flips = torch.empty(0)
        self.skip(first)

    @property
    def block(self) -> int:
        """Samples in a block."""
        return self.rows // math.gcd(self.rows, self.each)

    def skip(self, samples: int) -> None:
        """Let those of so many samples pass."""
        last = self.number + samples * self.each
        for _ in range(math.ceil(last / self.rows) - math.ceil(self.number / self.rows)):
            self._flip()
        self.number = last

    def take(self, samples: int) -> Tensor:
        """``[samples, each, K]`` int8, the next ones."""
        taken = []
        for _ in range(samples * self.each):
            if self.number % self.rows == 0:
                self._flip()
            taken.append(self.base[self.number % self.rows] * self.flips)
            self.number += 1
        return torch.stack(taken).view(samples, self.each, self.outputs)

    def _flip(self) -> None:
        self.flips = 2 * torch.randint(0, 2, (self.outputs,), generator=self.generator, dtype=torch.int8) - 1


def _hadamard(rows: int) -> Tensor:
    """Sylvester's matrix of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < rows:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
