"""What the published code (arXiv 2512.11089) does with the gradients of a batch, for the time that it takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jbrprune.models import preserve


@torch.no_grad()
def square_channels(model: nn.Module, gradients: Mapping[Tensor, Tensor]) -> None:
    """The published score of every input and output channel of one batch."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            products = (module.weight * gradients[module.weight]).reshape(*module.weight.shape[:2], -1).sum(-1)
            products.sum(1).square(), products.sum(0).square()


def draw_as_published(model: nn.Module, images: Tensor) -> float:
    """One image and one vector of signs per backward; all gradients are made, squared and added up."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, generator = 0.0, torch.Generator().manual_seed(0)
    for image in images.to(preserve.device_of(model)):
        outputs = model(image[None])[0]
        signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        gradients = torch.autograd.grad((signs * outputs).sum(), parameters, allow_unused=True)
        total += sum(gradient.pow(2).sum().item() for gradient in gradients if gradient is not None)
    return total / len(images)
