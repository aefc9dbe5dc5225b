"""Refitting a consumer: its kept weights and its bias reproduce the dense model's outputs on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.models import layers

ITERATIONS = 50
"""Conjugate gradients on masked weights stop after at most this many iterations ..."""
CONVERGED = 1e-3
"""... or when the norm of the gradient of every row has fallen to this share of what it was."""


def can_refit(module: nn.Module) -> bool:
    """Whether `gather_inputs` knows how a layer reads its input: exact types, a subclass may pad or scale."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def flatten_positions(module: nn.Module, output: Tensor) -> Tensor:
    """A layer's output as ``[n, positions, C]``."""
    if layers.channel_dim(module) == 1:
        return output.flatten(2).transpose(1, 2)
    return output.reshape(output.shape[0], -1, output.shape[-1])


def gather_inputs(module: nn.Module, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The inputs that a consumer reads for its outputs at some positions.

    Args:
        module: A layer that `can_refit` accepts.
        x: Its input.
        positions: ``[p]`` flat output positions; None: all of them.

    Returns:
        ``[n * p, fan_in]``, in the order of the flattened weight's columns.
    """
    some = slice(None) if positions is None else positions
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, some].flatten(0, 1)
    how = module.kernel_size, module.dilation, module.padding, module.stride
    # image by image: what is laid out is larger than the input, by the size of the kernel
    return torch.cat([F.unfold(image, *how).transpose(1, 2)[:, some] for image in x.split(1)]).flatten(0, 1)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over n pairs of rows (a, y) that a fit, a mean and a variance follow from; ``+`` adds more rows.

    Attributes:
        count: n.
        a: ``[d]`` mean of a.
        y: ``[C]`` mean of y.
        products: ``[d, C]`` sum of the outer products of (a - mean a) and (y - mean y); ``[d]`` where a is y and only
            the squares are kept.
        factored: Whether a is y and ``products`` is F, ``[m, d]`` with m < d, of which F^T F is that sum: a convolution
            of 2048 channels reads 18432 inputs, on a few hundred rows.
    """

    count: int
    a: Tensor
    y: Tensor
    products: Tensor
    factored: bool = False

    @property
    def whole(self) -> Tensor:
        """The sum of the outer products itself."""
        return self.products.t() @ self.products if self.factored else self.products

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both (Chan, Golub and LeVeque, 1983)."""
        a, y, count = other.a - self.a, other.y - self.y, self.count + other.count
        share = other.count / count
        means = self.a + a * share, self.y + y * share
        if self.factored and other.factored and len(self.products) + len(other.products) + 1 < len(a):
            rows = self.products, other.products, a[None] * math.sqrt(self.count * share)
            return Moments(count, *means, torch.cat(rows), factored=True)
        between = a * y if self.products.dim() == 1 else torch.outer(a, y)
        return Moments(count, *means, self.whole + other.whole + between * (self.count * share))


def sum_products(inputs: Tensor, outputs: Tensor, *, means: bool = False) -> tuple[Moments, Moments]:
    """Moments of rows of inputs with themselves and with outputs; float64 on the CPU: not every accelerator has it.

    Args:
        inputs: ``[n, d]`` A.
        outputs: ``[n, C]`` Y.
        means: The means are enough; the products are zero.
    """
    a, y = inputs.mean(0), outputs.mean(0)
    if means:
        a, y, n = a.cpu().double(), y.cpu().double(), len(inputs)
        return Moments(n, a, a, torch.zeros_like(a)), Moments(n, y, y, torch.zeros_like(y))
    inputs, factored = inputs - a, len(inputs) < inputs.shape[1]
    gram, cross = inputs if factored else inputs.t() @ inputs, inputs.t() @ (outputs - y)
    a, y, gram, cross = (tensor.cpu().double() for tensor in (a, y, gram, cross))
    return Moments(len(inputs), a, a, gram, factored), Moments(len(inputs), a, y, cross)


def refit(
    module: nn.Module,
    weight: Tensor,
    gram: Moments,
    cross: Moments,
    ridge: float | None,
    mask: Tensor | None = None,
    bias_mask: Tensor | None = None,
) -> None:
    r"""Fit a consumer's weights and bias to outputs, in place.

    .. math:: W' = \arg\min_W \|(Y - \bar Y) - (A - \bar A) W^T\|^2 + \lambda \|W - W_{now}\|^2, \quad
              b' = \bar Y - W' \bar A, \quad \lambda = ridge \cdot \overline{diag((A - \bar A)^T (A - \bar A))}

    Args:
        module: The consumer.
        weight: Its weight before any repair, W_now.
        gram: Moments of its inputs A with themselves.
        cross: Of its inputs with the outputs Y that it should have.
        ridge: Positive; None: the weights stay as they are, the bias alone takes over the mean (a mean shift).
        mask: Shape of the weight, False where a weight is zero and stays so: every row is fitted on its support.
        bias_mask: Shape of the bias, the same for the bias.
    """
    fitted = weight.flatten(1).cpu().double()
    if ridge is not None:
        rows = gram.products
        squares = rows.square().sum(0) if gram.factored else rows.diagonal()
        penalty = ridge * float(squares.mean()) + torch.finfo(torch.float64).tiny
        if mask is None:
            fitted = solve_ridge(gram, cross.products + penalty * fitted.t(), penalty).t()
        else:
            products = gram.whole
            given = (products, cross.products.t() - fitted @ products, mask.flatten(1))
            products, wanted, support = (tensor.to(weight) for tensor in given)
            fitted = fitted + solve_masked_ridge(products, wanted, penalty, support).cpu().double()
        module.weight.copy_(fitted.view_as(module.weight))  # type: ignore[union-attr, operator, arg-type]
    if module.bias is not None:
        bias = cross.y - fitted @ gram.a
        module.bias.copy_(bias if bias_mask is None else bias * bias_mask.to(bias))  # type: ignore[union-attr, operator]


def solve_ridge(gram: Moments, products: Tensor, penalty: float) -> Tensor:
    """(A^T A + penalty)^-1 A^T R: moments of A and ``[d, outputs]``, both float64, give ``[d, outputs]``.

    Of a factor F with fewer rows it is (1 - F^T (F F^T + penalty)^-1 F) A^T R / penalty (Woodbury's identity).
    """
    rows = gram.products
    regular = rows @ rows.t() if gram.factored else rows.clone()
    regular.diagonal().add_(penalty)
    root = torch.linalg.cholesky(regular)
    if gram.factored:
        return (products - rows.t() @ torch.cholesky_solve(rows @ products, root)) / penalty
    return torch.cholesky_solve(products, root)


def solve_masked_ridge(gram: Tensor, products: Tensor, penalty: float, mask: Tensor) -> Tensor:
    """argmin_D ||R - A D^T||^2 + penalty ||D||^2 over D that are zero where the mask is.

    Every row is a problem of its own, because its support is; all are solved together by conjugate gradients on
    (A^T A + penalty) restricted to the supports. Each iteration is one matrix product, and none makes the fit worse.

    Args:
        gram: ``[d, d]`` A^T A.
        products: ``[outputs, d]`` R^T A.
        penalty: Positive.
        mask: ``[outputs, d]`` of ones and zeros.

    Returns:
        ``[outputs, d]``.
    """
    tiny = torch.finfo(gram.dtype).tiny
    solution = torch.zeros_like(mask)
    left = products * mask
    direction = left.clone()
    square = left.square().sum(1, keepdim=True)
    enough = square * CONVERGED**2
    for _ in range(ITERATIONS):
        image = (direction @ gram).add_(direction, alpha=penalty).mul_(mask)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, square / curvature.clamp_min(tiny), 0)
        solution.addcmul_(step, direction)
        left.addcmul_(step, image, value=-1)
        after = left.square().sum(1, keepdim=True)
        if bool((after <= enough).all()):
            break
        direction = left + direction * torch.where(square > 0, after / square.clamp_min(tiny), 0)
        square = after
    return solution
