"""Perturbations that training makes: label noise learnt from w* on, and where SGD wanders to."""

from __future__ import annotations

import copy

import torch
from fitting import Loss, squared
from torch import Tensor, nn


def relearn(
    model: nn.Module, inputs: Tensor, targets: Tensor, penalty: float, *, steps: int = 40, tolerance: float = 0.0
) -> nn.Module:
    """A copy that minimises squared error plus ``penalty ||w - w*||^2`` from w* on, in eval mode, by L-BFGS.

    Args:
        model: With the weights w*.
        inputs: Images.
        targets: ``[N, K]``.
        penalty: On the squared distance to w*.
        steps: At most so many.
        tolerance: Stop once a step lowers the loss by less.
    """
    learner = copy.deepcopy(model).eval()
    centre = [parameter.detach().clone() for parameter in learner.parameters()]
    optimizer = torch.optim.LBFGS(
        learner.parameters(),
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=tolerance,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        away = torch.stack(
            [(now - then).square().sum() for now, then in zip(learner.parameters(), centre, strict=True)]
        )
        loss = squared(learner(inputs), targets) + penalty * away.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return learner


def wander(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    steps: int,
    rate: float,
    batch_size: int,
    momentum: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A copy after so many steps of SGD from w* on, in eval mode, batches drawn with replacement."""
    learner = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(learner.parameters(), rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (batch_size,), generator=generator)
        optimizer.zero_grad()
        loss(learner(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    return learner


def change(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> how far it has moved."""
    moved = dict(after.named_parameters())
    return {name: moved[name].detach() - parameter.detach() for name, parameter in before.named_parameters()}
