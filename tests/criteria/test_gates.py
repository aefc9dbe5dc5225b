"""Gates: derivatives with respect to z and y in x + z a + y, against autograd through that very sum."""

from __future__ import annotations

import copy

import cases
import pytest
import torch
from reference import layer_groups
from torch import Tensor, nn

from jbrprune.criteria.gates import Key, differentiate, effects, gated_logits
from jbrprune.criteria.relevance import Relevance, relevances
from jbrprune.data.batches import Batch
from jbrprune.errors import ModelError
from jbrprune.models import layers, preserve


def inputs_of(model: nn.Module) -> list[Key]:
    return [(m.axis[0], "in") for group in layer_groups(model) for m in group.side("in")]


def slow(model: nn.Module, images: Tensor, axes: list[Key], output: int) -> dict[Key, Tensor]:
    """Axis -> ``[2, n, C]``, by autograd, one sample after the other."""
    found: dict[Key, list[Tensor]] = {key: [] for key in axes}
    for image in images:
        twin, leaves = copy.deepcopy(model), {}

        def multiplied(module: nn.Module, args: tuple, key: Key, leaves: dict = leaves) -> tuple:
            x, dim = args[0], layers.channel_dim(module)
            width = x.shape[dim]
            z, y = leaves.setdefault(key, [torch.zeros(width, dtype=x.dtype, requires_grad=True) for _ in range(2)])
            shape = (-1,) + (1,) * (x.dim() - 2) if dim == 1 else (-1,)
            return (x * (1 + z.view(shape)) + y.view(shape),)

        for key in axes:
            twin.get_submodule(key[0]).register_forward_pre_hook(
                lambda module, args, key=key: multiplied(module, args, key)
            )
        (logit,) = twin(image[None])[:, output]
        for key in axes:
            gradients = torch.autograd.grad(logit, leaves[key], retain_graph=True)
            found[key].append(torch.stack(gradients))
    return {key: torch.stack(rows, 1) for key, rows in found.items()}


@pytest.mark.parametrize(
    "case", ["called twice", "sum in place", "concatenation, flattened", "windows", "channels last"]
)
def test_every_output_of_one_graph(case: str) -> None:
    torch.manual_seed(0)
    model, images = cases.randomised(cases.NETS[case]()), cases.images(3)
    axes = inputs_of(model)
    outputs = torch.eye(cases.CLASSES, dtype=torch.float64)

    def run() -> list[dict[Key, Tensor]]:
        logits, gates = gated_logits(model, images, axes, constants=True)
        return [effects(logits, m, gates, again=True) for m in outputs]

    with preserve.inference_state(model):
        found, _ = differentiate(run, False)
        logits, gates = gated_logits(model, images, axes)
        alone = effects(logits, outputs[0], gates)
    for output, by_axis in enumerate(found):
        for key, expected in slow(model, images, axes, output).items():
            torch.testing.assert_close(by_axis[key], expected, rtol=1e-10, atol=1e-13)
    for key, gradient in alone.items():
        torch.testing.assert_close(gradient, found[0][key][:1], rtol=1e-12, atol=0)


class Scaling(nn.Module):
    """Changes a part of what a layer gave, in place."""

    def __init__(self, part: slice, in_place: bool) -> None:
        super().__init__()
        self.one, self.two, self.part, self.in_place = nn.Linear(12, 6), nn.Linear(6, 4), part, in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.flatten(1))
        if self.in_place:
            x[:, self.part].mul_(3)
        else:
            x = x * (1 + 2 * torch.zeros(6).index_fill(0, torch.arange(6)[self.part], 1)).to(x)
        return self.two(x)


@pytest.mark.parametrize("part", [slice(0, 6), slice(0, 2), slice(3, 5)], ids=str)
def test_what_is_overwritten_is_copied_or_refused(part: slice) -> None:
    images = torch.randn(3, 3, 2, 2)
    model = Scaling(part, in_place=True)
    twin = Scaling(part, in_place=False)
    twin.load_state_dict(model.state_dict())

    def score(one: nn.Module) -> dict[str, Tensor]:
        return next(relevances(one, [(0, Batch(images))], layer_groups(one), Relevance(site="all")))[0]

    expected = score(twin)
    if part.start:
        with pytest.raises(ModelError, match=r"^(one|two): the model overwrites a part of its activation"):
            score(model)
    else:
        torch.testing.assert_close(score(model), expected)


def test_errors_of_the_model_are_not_taken_for_overwriting() -> None:
    calls = []

    def run() -> None:
        calls.append(1)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        differentiate(run, False)
    assert len(calls) == 1
