"""Every perturbation: its `sample` has the covariance of its `quadratic`, both are what they are said to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cases
import pytest
import torch
from single import OWN, made
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tpv_nets import (
    attention,
    bound,
    crossed,
    estimated,
    flat,
    jacobian,
    linear,
    measured,
    mlp,
    pixels,
    random_gradients,
    trace,
)

from jbrprune.errors import ArgumentError, NonFiniteError
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import masked_units
from jbrprune.tpv import (
    Covariance,
    Diagonal,
    FiniteRank,
    Isotropic,
    LabelNoise,
    Quantization,
    Removal,
    Retraining,
    SGDNoise,
    TPVWarning,
    Trajectory,
    square_norms,
)
from jbrprune.tpv.covariances import inner

NET, IMAGES = mlp(6, 3, 4), pixels(5, 6)
MASK = {"1.weight": torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.5}
PERTURBATIONS: dict[str, Any] = {
    "isotropic": Isotropic(0.3),
    "quantization by tensor": Quantization(3),
    "quantization by channel": Quantization(3, "channel"),
    "quantization by global range": Quantization(3, "global"),
    "rounding": Quantization(3, rounding=True),
    "sgd, cross-entropy": SGDNoise(0.1, 4, IMAGES),
    "sgd, squared error": SGDNoise(0.1, 4, IMAGES, loss="mse"),
    "labels": LabelNoise(0.2, IMAGES, proximity=0.01),
    "labels, pseudo-inverse": LabelNoise(0.2, IMAGES, proximity=0.0),
    "removal": Removal(MASK),
}


def dense_covariance(perturbation: Any, net: nn.Module, images: Tensor) -> Tensor:
    """C ``[P, P]`` as it is written."""
    j = flat(jacobian(net, images), 2)  # [N, K, P]
    if isinstance(perturbation, SGDNoise):
        outputs = net(images).detach()
        p = outputs.softmax(1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = hessian if perturbation.loss == "cross_entropy" else torch.eye(3).double().expand(len(p), 3, 3)
        return 0.1 / 8 * torch.einsum("nkp,nkl,nlq->pq", j, hessian, j) / len(images)
    if isinstance(perturbation, LabelNoise):
        j = j.flatten(0, 1)
        ridge = len(images) * perturbation.proximity
        normal = j.T @ j + ridge * torch.eye(j.shape[1])
        inverse = torch.linalg.pinv(j) if ridge == 0 else torch.linalg.solve(normal, j.T)
        return 0.04 * inverse @ inverse.T
    if isinstance(perturbation, Removal):
        d = torch.cat([torch.where(MASK["1.weight"], 0.0, net[1].weight.detach()).flatten(), torch.zeros(19)])
        return torch.outer(d, d)
    variances = []
    every = torch.cat([p.detach().flatten() for p in net.parameters()])
    rounded = []
    for p in map(torch.detach, net.parameters()):
        low, high = p.min(), p.max()
        if perturbation == Quantization(3, "global"):
            low, high = every.min(), every.max()
        if perturbation == Quantization(3, "channel") and p.dim() == 2:
            low, high = p.min(1, keepdim=True).values, p.max(1, keepdim=True).values
        step = (high - low) / 7
        rounded.append((((p - low) / step).round() * step + low - p).flatten())
        variances.append((0.09 if isinstance(perturbation, Isotropic) else step**2 / 12 * torch.ones_like(p)) + 0 * p)
    if perturbation == Quantization(3, rounding=True):
        return torch.outer(torch.cat(rounded), torch.cat(rounded))
    return torch.diag(torch.cat([v.flatten() for v in variances]))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_quadratic_is_the_dense_form(name: str) -> None:
    dense = dense_covariance(PERTURBATIONS[name], NET, IMAGES)
    gradients = random_gradients(NET, 6)
    g = flat(gradients, 1)
    expected = torch.einsum("np,pq,nq->n", g, dense, g)
    found = bound(PERTURBATIONS[name], NET).quadratic(gradients)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.max()))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_sample_has_the_covariance_of_quadratic(name: str) -> None:
    """Over many draws, mean (g^T dw)^2 = g^T C g within the error that the draws leave."""
    gradients, covariance = random_gradients(NET, 4), bound(PERTURBATIONS[name], NET)
    generator = torch.Generator().manual_seed(0)
    fixed = name in ("rounding", "removal")
    draws = [inner(gradients, covariance.sample(generator)) for _ in range(2 if fixed else 1500)]
    squares = torch.stack(draws).square()
    expected = covariance.quadratic(gradients)
    if fixed:
        assert torch.allclose(squares, expected.expand(2, -1), rtol=1e-9)
        return
    error = squares.std(0) / len(draws) ** 0.5
    assert ((squares.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.06 * expected).all()
    assert (torch.stack(draws).mean(0).abs() < 4 * (expected / len(draws)).sqrt()).all()  # and mean zero


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_trace_form_is_the_dense_trace_by_every_method(name: str) -> None:
    dense, j = dense_covariance(PERTURBATIONS[name], NET, IMAGES), flat(jacobian(NET, IMAGES), 2)
    expected = float(torch.einsum("nkp,pq,nkq->n", j, dense, j).mean())
    found = estimated(NET, IMAGES, PERTURBATIONS[name], method="exact")
    assert found.value == pytest.approx(expected, rel=1e-8)
    by_default = estimated(NET, IMAGES, PERTURBATIONS[name], draws=200)
    assert by_default.method == ("jvp" if name.startswith(("sgd", "rounding", "removal")) else "exact")
    if name.startswith("sgd"):
        means = by_default.values.mean(0)
        assert abs(by_default.value - expected) < 4 * float(means.std()) / 200**0.5
    else:
        assert by_default.value == pytest.approx(expected, rel=1e-8)


def test_a_covariance_of_ones_own_is_two_methods() -> None:
    class Half:
        def quadratic(self, gradients: Mapping[str, Tensor]) -> Tensor:
            return 0.25 * gradients["3.bias"].square().sum(1) + square_norms(gradients, {"1.bias": 4.0})

        def sample(self, generator: torch.Generator) -> Mapping[str, Tensor]:
            return {
                "3.bias": 0.5 * torch.randn(3, generator=generator, dtype=torch.float64),
                "1.bias": 2 * torch.randn(4, generator=generator, dtype=torch.float64),
            }

    assert isinstance(Half(), Covariance)
    dense = jacobian(NET, IMAGES)
    expected = trace({name: dense[name] for name in ("3.bias", "1.bias")}, {"3.bias": 0.25, "1.bias": 4.0})
    assert estimated(NET, IMAGES, Half(), method="exact").value == pytest.approx(expected, rel=1e-9)
    real = measured(NET, IMAGES, Half(), draws=50)
    assert real.value > 0
    assert real.draws == 50


def test_explicit_gradients_are_those_of_autograd() -> None:
    """Through a covariance that looks at them, on every kind of layer."""

    class Sums:
        def quadratic(self, gradients: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([g.flatten(1).sum(1).square() for g in gradients.values()]).sum(0)

        def sample(self, generator: torch.Generator) -> Mapping[str, Tensor]:
            raise NotImplementedError

    nets = [attention(), (made(OWN, "borrowed and shared"), cases.images(3)), cases.timm_model("convnext")]
    for net, images in nets:
        found = estimated(net, images[:2], Sums(), output=lambda out: out[:, :1])
        expected = sum(
            float(torch.autograd.grad(net(image[None])[0, 0], p, allow_unused=True)[0].sum().square())
            for image in images[:2]
            for p in net.parameters()
            if torch.autograd.grad(net(image[None])[0, 0], p, allow_unused=True)[0] is not None
        )
        assert found.value == pytest.approx(expected / 2, rel=1e-8)


# --- quantization ----------------------------------------------------------------------------------------------------


def test_rounding_by_hand() -> None:
    """Weights 0, 1, 3 on the two-bit grid 0, 1, 2, 3 stay; 1.4 becomes 1, 1.6 becomes 2."""
    net = linear(torch.tensor([[0.0, 1.4, 1.6, 3.0]]))
    change = bound(Quantization(2, rounding=True), net).sample(torch.Generator())["1.weight"]
    assert change.tolist()[0] == pytest.approx([0, -0.4, 0.4, 0])
    images = torch.ones(1, 1, 1, 4).double() * torch.tensor([1.0, 1.0, 3.0, 1.0])
    assert measured(net, images, Quantization(2, rounding=True)).value == pytest.approx((3 * 0.4 - 0.4) ** 2)


def test_equal_weights_have_nothing_to_round() -> None:
    """A norm at its initial values has a range of zero."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3)).double()
    change = bound(Quantization(2, rounding=True), net).sample(torch.Generator())
    assert not change["2.weight"].any()
    assert torch.isfinite(change["1.weight"]).all()
    assert float(bound(Quantization(2), net).variances["2.weight"]) == 0  # type: ignore[attr-defined]


def test_empirical_rounding_is_the_rounded_model() -> None:
    net, images = mlp(), pixels(6)
    change = bound(Quantization(4, "channel", rounding=True), net).sample(torch.Generator())
    moved = {name: p + change[name] for name, p in net.named_parameters()}
    expected = (functional_call(net, moved, (images,)) - net(images)).square().sum(1).mean().detach()
    found = measured(net, images, Quantization(4, "channel", rounding=True))
    assert found.value == pytest.approx(float(expected), rel=1e-9)
    assert found.draws == 1


def test_ranges_by_channel_by_hand() -> None:
    """Two bits: the rows 0 to 3 and 0 to 6 have the steps 1 and 2; the bias from -1 to 2 has one range, the step 1."""
    net = nn.Linear(3, 2).double()
    net.weight.data = torch.tensor([[0.0, 1.0, 3.0], [6.0, 0.0, 1.0]]).double()
    net.bias.data = torch.tensor([-1.0, 2.0]).double()
    variances = bound(Quantization(2, "channel"), net).variances  # type: ignore[attr-defined]
    assert variances["weight"].flatten().tolist() == pytest.approx([1 / 12, 4 / 12], rel=1e-12)
    assert variances["bias"].item() == pytest.approx(1 / 12, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    draws = [bound(Quantization(2, "channel"), net).sample(generator) for _ in range(400)]
    for name, half in (("weight", torch.tensor([[0.5], [1.0]])), ("bias", torch.tensor(0.5))):
        drawn = torch.stack([draw[name] for draw in draws]).abs() / half
        assert 0.98 < float(drawn.max()) <= 1  # uniform in [-step / 2, step / 2]
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.04)
    rounded = bound(Quantization(2, "channel", rounding=True), net).sample(generator)
    assert rounded["weight"].tolist() == [[0, 0, 0], [0, 0, -1]]  # 1 on the grid 0, 2, 4, 6 is halfway: to even, 0
    assert not rounded["bias"].any()  # -1 and 2 are the ends of the grid


def test_the_global_range_by_hand() -> None:
    net = nn.Linear(1, 2).double()
    net.weight.data, net.bias.data = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([-1.0, 2.0]).double()
    variances = bound(Quantization(2, "global"), net).variances  # type: ignore[attr-defined]
    assert [v.item() for v in variances.values()] == pytest.approx([1 / 12, 1 / 12], rel=1e-12)
    by_tensor = bound(Quantization(2), net).variances  # type: ignore[attr-defined]
    assert [v.item() for v in by_tensor.values()] == pytest.approx([1 / 108, 1 / 12], rel=1e-12)


# --- removal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["resnet18", "vit", "resnext"])
def test_removal_of_units(case: str) -> None:
    """To first order the Jacobian times -w_S; really the masked model."""
    net, images = cases.timm_model(case)
    images = images[:2]
    groups = [g for g in find_groups(net, images).groups if g.kind != "width"]
    units = {groups[0].name: torch.tensor([0, 1]), groups[-1].name: torch.tensor([0])}
    removal = Removal(units, groups)
    with torch.no_grad():
        whole = net(images)
        with masked_units(net, groups, units):
            masked = net(images)
    expected = float((masked - whole).square().sum(1).mean())
    assert measured(net, images, removal).value == pytest.approx(expected, rel=1e-9)
    change = bound(removal, net).sample(torch.Generator())
    moved = {name: p + change.get(name, 0) for name, p in net.named_parameters()}
    assert torch.allclose(functional_call(net, moved, (images,)), masked, atol=1e-9)
    dense = jacobian(net, images, list(change))
    product = torch.stack([(j * change[name]).flatten(2).sum(2) for name, j in dense.items()]).sum(0)
    found = estimated(net, images, removal)
    assert found.method == "jvp"
    assert found.value == pytest.approx(float(product.detach().square().sum(1).mean()), rel=1e-8)


def test_removal_from_a_report() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    images = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    groups = find_groups(net, images[:2]).groups
    by_report = measured(net, images, Removal(type("Report", (), {"removed": {groups[0].name: [0, 2]}})(), groups))
    by_units = measured(net, images, Removal({groups[0].name: torch.tensor([0, 2])}, groups))
    assert by_report.value == by_units.value > 0


@pytest.mark.parametrize(
    "what, match",
    [
        (lambda groups: Removal({}), "nothing to remove"),
        (lambda groups: Removal({"0": [1]}), "groups="),
        (lambda groups: Removal({"nowhere": [1]}, groups), "Unknown group 'nowhere'"),
        (lambda groups: Removal({groups[0].name: [4]}, groups), r"units 0 to 3, got \[4\]"),
        (lambda groups: Removal({"0.weight": torch.ones(3, 3)}), r"shape \[3, 3\]"),
        (lambda groups: Removal({"9.weight": torch.ones(3, 3)}), "Unknown parameter"),
    ],
)
def test_removal_of_what_is_not_there(what: Any, match: str) -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), torch.randn(2, 3, 2, 2)
    with pytest.raises(ArgumentError, match=match):
        estimated(net, images, what(find_groups(net, images).groups))


# --- trained noise ---------------------------------------------------------------------------------------------------


def test_trajectory_of_sgd_on_a_quadratic() -> None:
    """f = W x, squared error, targets f* + noise: dw' = (1 - lr (H + 2 c)) dw + lr g, variance in closed form."""
    net = linear(torch.zeros(1, 1))
    images = torch.tensor([1.0, -1.0, 1.0, -1.0]).double().view(4, 1, 1, 1)
    path = Trajectory(momentum=0.0, proximity=0.25, burn_in=20, every=10)
    noise = SGDNoise(0.1, 2, images, loss="mse", trajectory=path)
    covariance, generator = bound(noise, net), torch.Generator().manual_seed(0)
    draws = torch.tensor([float(covariance.sample(generator)["1.weight"]) for _ in range(400)])
    keep = 1 - 0.1 * (1 + 0.5)
    expected = 0.1**2 / 2 / (1 - keep**2)  # each gradient's noise is x times a unit normal, averaged over B = 2
    assert float(draws.square().mean()) == pytest.approx(expected, rel=0.3)
    for method in ("exact", "projection"):
        with pytest.raises(ArgumentError, match="covariance of a trajectory of SGD is not known"):
            estimated(net, images, noise, method=method, validity=True)
    assert estimated(net, images, noise, draws=3).method == "jvp"
    stationary = bound(SGDNoise(0.1, 2, images, loss="mse"), net)
    assert float(stationary.quadratic({"1.weight": torch.ones(1, 1, 1)})) == pytest.approx(0.1 / 4)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_trajectory_step_by_step(loss: Any) -> None:
    """Gradient, momentum and the pull 2 c (w - w*) of the penalty, from the same random numbers."""
    net, images = linear(torch.tensor([[0.5, -1.0], [2.0, 0.3], [0.1, 0.7]])), pixels(6)[:, :2, :1, :1]
    path = Trajectory(momentum=0.5, proximity=0.8, burn_in=3, every=2)
    covariance, generator = bound(SGDNoise(0.2, 4, images, loss=loss, trajectory=path), net), torch.Generator()
    found = [covariance.sample(generator.manual_seed(3)), covariance.sample(generator)]
    x, start = images.flatten(1), net[1].weight.detach()
    weight, speed, places = start.clone(), torch.zeros_like(start), []
    generator.manual_seed(3)
    for step in range(7):
        some = x[torch.randperm(6, generator=generator)[:4]]
        if loss == "mse":
            residual = some @ weight.T - some @ start.T - torch.randn(4, 3, generator=generator)
        else:
            labels = torch.multinomial((some @ start.T).softmax(1), 1, generator=generator)[:, 0]
            residual = (some @ weight.T).softmax(1) - F.one_hot(labels, 3)
        speed = 0.5 * speed + residual.T @ some / 4 + 2 * 0.8 * (weight - start)
        weight = weight - 0.2 * speed
        places += [weight - start] * (step in (4, 6))
    for one, other in zip(found, places):
        assert torch.allclose(one["1.weight"], other, rtol=1e-10)


def test_trajectory_is_a_guest_and_diverges_in_words() -> None:
    net, images = mlp(), pixels(20)
    before = net[1].weight.clone()
    path = Trajectory(burn_in=3, every=2)
    found = measured(net, images, SGDNoise(0.01, 4, images, trajectory=path), draws=3)
    assert found.value > 0
    again = measured(net, images, SGDNoise(0.01, 4, images, trajectory=path), draws=3)
    assert again.value == found.value  # the same seed, the same path
    assert torch.equal(before, net[1].weight)
    from jbrprune.errors import NonFiniteError

    with pytest.raises(NonFiniteError, match=r"diverged.*lr=1e\+200"):
        measured(net, images, SGDNoise(1e200, 4, images, loss="mse", trajectory=path), draws=3)


def test_a_trajectory_that_has_not_arrived_is_named() -> None:
    """dw decays by lr (1 + 2 c) = 0.0006 a step: after 30 steps of burn-in the variance still grows."""
    net = linear(torch.zeros(2, 2))
    images = pixels(40)[:, :2, :1, :1]
    slow = Trajectory(momentum=0.0, proximity=0.1, burn_in=30, every=20)
    with pytest.warns(TPVWarning, match="trajectory drifts.*burn-in is too short"):
        measured(net, images, SGDNoise(5e-4, 4, images, trajectory=slow), draws=16)
    fast = Trajectory(momentum=0.0, proximity=0.5, burn_in=60, every=20)
    measured(net, images, SGDNoise(0.1, 4, images, trajectory=fast), draws=16)


def test_draws_along_a_walk_count_for_less() -> None:
    """Of x' = c x + e, whose variance is 1, the mean over R has the variance (1 + c) / (1 - c) / R."""
    generator = torch.Generator().manual_seed(0)
    errors, states = [], []
    for _ in range(300):
        x = torch.zeros(())
        series = []
        for step in range(220):
            x = 0.8 * x + 0.6 * torch.randn((), generator=generator)
            series += [float(x)] * (step >= 20)
        found = crossed(10 + torch.tensor(series).expand(3, -1), walked=True)
        errors.append(found.value - 10)
        states.append(found.standard_error)
    assert float(torch.tensor(errors).std()) == pytest.approx((9 / 200) ** 0.5, rel=0.12)
    assert float(torch.tensor(states).square().mean().sqrt()) == pytest.approx((9 / 200) ** 0.5, rel=0.1)


def test_small_singular_values_of_the_jacobian_by_hand() -> None:
    """One weight for each image, f = w_i s_i: C = sigma^2 diag(1 / s_i^2); what is lost in float32 is cut."""
    scales = torch.tensor([1.0, 0.05, 1e-3, 1e-5]).double()
    images = torch.diag(scales).view(4, 1, 1, 4)
    covariance = bound(LabelNoise(0.1, images, proximity=0.0), linear(torch.ones(1, 4)))
    each = covariance.quadratic({"1.weight": torch.eye(4).double()[:, None]})
    assert each.tolist() == pytest.approx([0.01, 4.0, 1e4, 0.0], rel=1e-6)
    draw = covariance.sample(torch.Generator().manual_seed(0))["1.weight"][0]
    noise = 0.1 * torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert draw.tolist() == pytest.approx([*(noise / scales)[:3].tolist(), 0.0], rel=1e-6)


def test_retraining_tends_to_the_closed_form() -> None:
    """Small noise and a convex problem: the copies reach the closed form's minimum, draw by draw."""
    net, images = linear(torch.ones(2, 6)), pixels(8, 6)
    closed, retrained = (
        bound(LabelNoise(0.1, images, proximity=0.1, retrain=how), net) for how in (None, Retraining(300, 0.02))
    )
    for seed in range(2):
        one, other = (c.sample(torch.Generator().manual_seed(seed))["1.weight"] for c in (closed, retrained))
        assert torch.allclose(one, other, atol=0.02 * float(one.abs().max()))
    value = measured(net, images, LabelNoise(0.1, images, proximity=0.1, retrain=Retraining(50, 0.05)), draws=2).value
    assert value > 0


def test_retraining_that_fails_is_named() -> None:
    net, images = linear(torch.ones(2, 6)), pixels(8, 6)
    with pytest.warns(TPVWarning, match="did not lower the loss"):
        measured(net, images, LabelNoise(0.1, images, retrain=Retraining(1, 1e3)), draws=2)
    with pytest.raises(NonFiniteError, match="Retraining diverged"):
        measured(net, images, LabelNoise(0.1, images, retrain=Retraining(1, 1e200)), draws=2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_retraining_of_frozen_models_and_where_gradients_are_off(context: Any) -> None:
    net, retrain = mlp(), Retraining(3)
    expected = measured(net, pixels(20), LabelNoise(0.1, pixels(20), retrain=retrain), draws=2).value
    for p in net.parameters():
        p.requires_grad_(False)
    with context():
        images = pixels(20)
        found = measured(net, images, LabelNoise(0.1, images, retrain=retrain), draws=2).value
    assert found == expected
    assert not any(p.requires_grad for p in net.parameters())
    kept = measured(net, pixels(20), LabelNoise(0.1, pixels(20), retrain=retrain), draws=2, ignore=["1"])
    assert 0 < kept.value < expected * 10


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Isotropic(0.0), "sigma must be a positive number, got 0.0"),
        (lambda: Isotropic(float("nan")), "sigma"),
        (lambda: Quantization(0), "bits"),
        (lambda: Quantization(8, "row"), "granularity"),  # type: ignore[arg-type]
        (lambda: SGDNoise(0.0, 4, IMAGES), "lr"),
        (lambda: SGDNoise(0.1, 0, IMAGES), "batch_size"),
        (lambda: SGDNoise(0.1, 4, IMAGES, loss="hinge"), "loss"),  # type: ignore[arg-type]
    ],
)
def test_arguments_without_meaning(make: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        make()


def test_a_jacobian_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jbrprune.tpv.noise.MOST_ENTRIES", 10)
    with pytest.raises(ArgumentError, match="Jacobian of 15 x 43 entries"):
        estimated(NET, IMAGES, LabelNoise(0.1, IMAGES))


def test_finite_rank() -> None:
    ones = torch.ones(4, 6).double()
    directions = [{"1.weight": ones}, {"1.weight": ones, "3.bias": torch.ones(3).double()}]
    covariance = FiniteRank(directions)
    j = jacobian(NET, IMAGES)
    first = j["1.weight"].flatten(2).sum(2)
    expected = (first.square() + (first + j["3.bias"].flatten(2).sum(2)).square()).sum(1).mean()
    for method in ("auto", "exact"):
        assert estimated(NET, IMAGES, covariance, method=method).value == pytest.approx(float(expected), rel=1e-9)
    assert set(covariance.sample(torch.Generator())) == {"1.weight", "3.bias"}
    assert isinstance(bound(Isotropic(1.0), NET), Diagonal)


def test_a_weight_that_two_layers_share_goes_once() -> None:
    """First order is exact in a linear net, so that both forms are one number."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 5), nn.Linear(8, 5)
            self.c.weight = self.b.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x.flatten(1))
            return self.b(hidden) + self.c(hidden)

    net, images = Tied().double().eval(), torch.randn(20, 3, 2, 2, dtype=torch.float64)
    removal = Removal({"a": [0, 1]}, find_groups(net, images).groups)
    lost = 2 * net.a(images.flatten(1))[:, :2] @ net.b.weight[:, :2].t()
    value = lost.square().sum(1).mean().item()
    assert estimated(net, images, removal).value == pytest.approx(value, rel=1e-12)
    assert measured(net, images, removal).value == pytest.approx(value, rel=1e-12)
