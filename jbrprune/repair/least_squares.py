"""Refitting a consumer: its kept weights and its bias reproduce the dense model's outputs on the same images."""

from __future__ import annotations

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


def gather_inputs(module: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """The inputs that a consumer reads for its outputs at some positions.

    Args:
        module: A layer that `can_refit` accepts.
        x: Its input.
        positions: ``[p]`` flat output positions.

    Returns:
        ``[n * p, fan_in]``, in the order of the flattened weight's columns.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].flatten(0, 1)
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = module.kernel_size, module.stride, module.dilation, module.padding  # type: ignore[misc]
    width = (x.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1  # type: ignore[operator]
    padded = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x  # type: ignore[arg-type]
    top = positions.div(width, rounding_mode="floor") * sh
    left = positions % width * sw
    taps_y = (torch.arange(kh, device=x.device) * dh).repeat_interleave(kw)  # type: ignore[arg-type]
    taps_x = (torch.arange(kw, device=x.device) * dw).repeat(kh)  # type: ignore[arg-type]
    patches = padded[:, :, top[:, None] + taps_y, left[:, None] + taps_x]
    return patches.permute(0, 2, 1, 3).reshape(len(x) * len(positions), -1)


def refit(
    module: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    ridge: float | None,
    mask: Tensor | None = None,
    bias_mask: Tensor | None = None,
) -> None:
    r"""Fit a consumer's weights and bias to outputs, in place.

    .. math:: W' = \arg\min_W \|(Y - \bar Y) - (A - \bar A) W^T\|^2 + \lambda \|W - W_{now}\|^2, \quad
              b' = \bar Y - W' \bar A, \quad \lambda = ridge \cdot \overline{diag((A - \bar A)^T (A - \bar A))}

    Args:
        module: The consumer.
        inputs: ``[n, fan_in]`` A, from `gather_inputs`.
        outputs: ``[n, C_out]`` Y that it should have.
        ridge: Positive; None: the weights stay as they are, the bias alone takes over the mean (a mean shift).
        mask: Shape of the weight, False where a weight is zero and stays so: every row is fitted on its support.
        bias_mask: Shape of the bias, the same for the bias.
    """
    weight = module.weight.flatten(1)  # type: ignore[union-attr, operator]
    input_mean, output_mean = inputs.mean(0), outputs.mean(0)
    if ridge is not None:
        centred = inputs - input_mean
        residual = (outputs - output_mean) - centred @ weight.t()
        if mask is None:
            weight = weight + solve_ridge(centred, residual, ridge).t()
        else:
            weight = weight + solve_masked_ridge(centred, residual, ridge, mask.flatten(1).to(weight))
        module.weight.copy_(weight.view_as(module.weight))  # type: ignore[union-attr, operator, arg-type]
    if module.bias is not None:
        bias = output_mean - weight @ input_mean
        module.bias.copy_(bias if bias_mask is None else bias * bias_mask.to(bias))  # type: ignore[union-attr, operator]


def solve_ridge(a: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """argmin_D ||residual - a D||^2 + lambda ||D||^2, lambda = ridge * mean diagonal of a^T a.

    Through the smaller of the two normal equations: (a^T a + lambda)^-1 a^T r = a^T (a a^T + lambda)^-1 r.

    Args:
        a: ``[n, d]``.
        residual: ``[n, outputs]``.
        ridge: Positive.

    Returns:
        ``[d, outputs]``.
    """
    n, d = a.shape
    penalty = ridge * float(a.square().sum()) / d + torch.finfo(a.dtype).tiny
    # in double precision on the CPU: not every accelerator has it
    small = (a.t() @ a if d <= n else a @ a.t()).cpu().double()
    small.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(small)
    if d <= n:
        return torch.cholesky_solve((a.t() @ residual).cpu().double(), factor).to(a)
    return a.t() @ torch.cholesky_solve(residual.cpu().double(), factor).to(a)


def solve_masked_ridge(a: Tensor, residual: Tensor, ridge: float, mask: Tensor) -> Tensor:
    """argmin_D ||residual - a D^T||^2 + lambda ||D||^2 over D that are zero where the mask is.

    Every row is a problem of its own, because its support is; all are solved together by conjugate gradients on
    (a^T a + lambda) restricted to the supports. Each iteration is one matrix product (two thin ones where there are
    fewer rows than inputs), and none makes the fit worse.

    Args:
        a: ``[n, d]``.
        residual: ``[n, outputs]``.
        ridge: Positive; lambda is as in `solve_ridge`.
        mask: ``[outputs, d]`` of ones and zeros.

    Returns:
        ``[outputs, d]``.
    """
    n, d = a.shape
    tiny = torch.finfo(a.dtype).tiny
    penalty = ridge * float(a.square().sum()) / d + tiny
    gram = a.t() @ a if d <= n else None
    solution = torch.zeros_like(mask)
    left = (residual.t() @ a) * mask
    direction = left.clone()
    square = left.square().sum(1, keepdim=True)
    enough = square * CONVERGED**2
    for _ in range(ITERATIONS):
        product = (direction @ a.t()) @ a if gram is None else direction @ gram
        image = product.add_(direction, alpha=penalty).mul_(mask)
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
