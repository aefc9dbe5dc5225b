"""Contexts that leave a user's model as it was, on success and on failure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jbrprune.errors import ModelError
from jbrprune.models import preserve

Fingerprint = Callable[[nn.Module], dict[str, Any]]


def model() -> nn.Module:
    """Mixed modes, a frozen parameter, a gradient, hooks, in-place flags."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten())
    net.register_parameter("index", nn.Parameter(torch.arange(3), requires_grad=False))
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[0].bias.grad = torch.ones(4)
    net[2].register_forward_hook(lambda module, args, output: None)
    net[2].grad_checkpointing = True
    return net


def seen(net: nn.Module) -> list[tuple]:
    return []


CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "evaluating": preserve.evaluating,
    "requiring_grad": lambda net: preserve.requiring_grad(net, True),
    "not requiring_grad": lambda net: preserve.requiring_grad(net, False),
    "restored": lambda net: preserve.restored(net.modules(), "training"),
    "same_randomness": lambda net: preserve.same_randomness(torch.device("cpu")),
    "inference_state": preserve.inference_state,
    "inference_state with gradients": lambda net: preserve.inference_state(net, gradients=True),
    "hooked": lambda net: preserve.hooked(
        net, forward={"0": lambda *a: None}, forward_pre={"": lambda *a: None, "2": lambda *a: None}
    ),
}


@pytest.mark.parametrize("raises", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("context", CONTEXTS)
def test_everything_is_restored(context: str, raises: type[BaseException] | None, fingerprint: Fingerprint) -> None:
    net = model()
    before = fingerprint(net)
    if raises is None:
        with CONTEXTS[context](net):
            pass
    else:
        with pytest.raises(raises), CONTEXTS[context](net):
            raise raises
    assert fingerprint(net) == before


def test_evaluating() -> None:
    net = model()
    with preserve.evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net] == [True, False, True, True, True]


def test_a_mode_that_cannot_be_switched_is_restored() -> None:
    class Stubborn(nn.Identity):
        def train(self, mode: bool = True) -> nn.Module:
            raise RuntimeError("no")

    net = nn.Sequential(nn.Dropout(), Stubborn())
    with pytest.raises(RuntimeError, match="no"), preserve.evaluating(net):
        pass
    assert all(module.training for module in net.modules())


def test_inference_state_freezes() -> None:
    net = model()
    with preserve.inference_state(net):
        assert not torch.is_grad_enabled()
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert net[0].bias.grad is not None
        assert net[2].grad_checkpointing is False


def test_inference_state_with_gradients_leaves_the_users_gradient() -> None:
    net = model()
    kept = net[0].bias.grad
    with preserve.inference_state(net, gradients=True):
        net(torch.randn(2, 3, 4, 4)).sum().backward()
        assert net[0].weight.grad is not None
    assert net[0].bias.grad is kept
    assert kept.tolist() == [1.0] * 4
    assert net[0].weight.grad is None


def test_inference_state_leaves_inference_mode() -> None:
    net = model()
    with torch.inference_mode():
        with preserve.inference_state(net, gradients=True):
            assert net(torch.ones(2, 3, 4, 4)).requires_grad
        assert torch.is_inference_mode_enabled()


def test_same_randomness() -> None:
    state = torch.get_rng_state()
    with preserve.same_randomness(torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_hooked_passes_keywords_and_replaces() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    found: dict[str, object] = {}

    def forward(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        found["kwargs"] = kwargs
        return output * 0 + 1

    with preserve.hooked(net, forward={"0": forward}):
        assert net[0](input=torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]
    assert list(found["kwargs"]) == ["input"]  # type: ignore[call-overload]


def test_hooked_with_an_unknown_name_leaves_no_hook(fingerprint: Fingerprint) -> None:
    net = model()
    before = fingerprint(net)
    hooks = {"0": lambda *a: None, "nowhere": lambda *a: None}
    with pytest.raises(AttributeError, match="nowhere"), preserve.hooked(net, forward=hooks):
        pass
    assert fingerprint(net) == before


def test_the_fingerprint_sees_what_it_must(fingerprint: Fingerprint) -> None:
    changes: list[Callable[[nn.Module], object]] = [
        lambda net: net[1].train(),
        lambda net: net[0].weight.requires_grad_(),
        lambda net: setattr(net[0].bias, "grad", torch.ones(4)),
        lambda net: net[0].register_forward_pre_hook(lambda *a: None),
        lambda net: setattr(net[2], "inplace", False),
        lambda net: net[1].running_mean.add_(1),
        lambda net: net[0].weight.data.view(-1)[0].add_(1e-7),
        lambda net: torch.rand(1),
    ]
    for change in changes:
        net = model()
        before = fingerprint(net)
        change(net)
        assert fingerprint(net) != before, change


def test_device_and_first_tensor() -> None:
    assert preserve.device_of(nn.Identity()) == torch.device("cpu")
    assert preserve.first_tensor(nn.Identity()) is None
    assert preserve.first_tensor(nn.BatchNorm2d(3, affine=False)).shape == (3,)  # type: ignore[union-attr]
    assert preserve.first_tensor(nn.Embedding(2, 3)).shape == (2, 3)  # type: ignore[union-attr]


# --- logits_of ----------------------------------------------------------------------------------


class WithLogits:
    """What many libraries return."""

    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("wrap", [lambda x: x, WithLogits, lambda x: {"logits": x, "loss": 1}, lambda x: (x,)])
def test_logits_of_accepts_what_models_return(wrap):
    logits = torch.randn(2, 5)
    assert preserve.logits_of(wrap(logits)) is logits
    assert preserve.logits_of((wrap(logits),) if not isinstance(wrap(logits), tuple) else [logits]) is logits


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(2, 7)), r"a tuple of 2 \(float32 \[2, 5\], float32 \[2, 7\]\).*Wrap it"),
        ((), "a tuple of 0"),
        ({"out": torch.zeros(2, 5)}, r"dict with the keys \['out'\]"),
        (None, "returned a NoneType, of which none"),
        (WithLogits(None), "returned a WithLogits, of which"),
        (torch.zeros(2, 5, 7), r"\[B, K\].*float32 \[2, 5, 7\]"),
        (torch.zeros(2, 5, dtype=torch.int64), r"int64 \[2, 5\], of which none"),
    ],
)
def test_logits_of_says_what_came(output, message):
    with pytest.raises(ModelError, match=message):
        preserve.logits_of(output)
