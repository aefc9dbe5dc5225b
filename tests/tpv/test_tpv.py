"""The trace form against values by hand, dense Jacobians and curvlinops; the empirical form against the trace form."""

from __future__ import annotations

import math
import warnings
from typing import Any

import cases
import pytest
import torch
from single import OWN, made
from torch import Tensor, nn
from torch.nn import functional as F
from tpv_nets import attention, bound, crossed, estimated, flat, jacobian, linear, measured, mlp, pixels, trace

from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError
from jbrprune.tpv import (
    Diagonal,
    Isotropic,
    Quantization,
    TPVWarning,
    empirical,
    square_norms,
    taylor_error,
    trace_form,
)
from jbrprune.tpv.estimators import draw_signs

# --- by hand ---------------------------------------------------------------------------------------------------------

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64).view(2, 1, 1, 2)


@pytest.mark.parametrize("method", ["exact", "projection", "jvp"])
def test_a_linear_net_by_hand(method: str) -> None:
    """f = W x: sum over K = 3 outputs of sigma^2 |x|^2, mean over the samples of |x|^2 = 5 and 10."""
    net = linear(torch.ones(3, 2))
    found = estimated(net, X, Isotropic(2.0), method=method, draws=300)
    expected = 4 * 3 * (5 + 10) / 2
    if method == "jvp":
        assert abs(found.value - expected) < 4 * found.standard_error
    else:  # rows of a linear net do not share weights: signs change nothing
        assert found.value == pytest.approx(expected, rel=1e-12)
        assert found.standard_error == pytest.approx(4 * 3 * 2.5, rel=1e-12)  # |5 - 10| / 2


def test_a_quadratic_net_by_hand() -> None:
    """f = (u v x): df/du = v x, df/dv = u x; with u = 2, v = 3: x^2 (9 + 4); and E (du dv)^2 beyond first order."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            self.u.weight.data.fill_(2)
            self.v.weight.data.fill_(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.v(self.u(x.flatten(1)))

    net = Product().double()
    x = torch.tensor([1.0, -2.0], dtype=torch.float64).view(2, 1, 1, 1)
    assert estimated(net, x, Isotropic(0.5)).value == pytest.approx(0.25 * 13 * 2.5, rel=1e-12)
    real = measured(net, x, Isotropic(0.5), draws=300)
    assert real.value == pytest.approx((0.25 * 13 + 0.25**2) * 2.5, abs=4 * real.standard_error)
    assert real.standard_error > 0.5 * real.value / 2**0.5  # two samples that differ by a factor of four


# --- dense Jacobians -------------------------------------------------------------------------------------------------


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "mlp": (mlp(), pixels(6)),
        "cnn": (made(cases.NETS, "concatenation, flattened"), cases.images(3)),
        "attention": attention(),
    }


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_dense_trace(name: str) -> None:
    """Tr(J C J^T) with isotropic, row-wise and entry-wise variances."""
    net, images = nets()[name]
    dense = jacobian(net, images)
    weights = {key: p.detach() for key, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(1)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    rows = {key: drawn((w.shape[0], *(1,) * (w.dim() - 1))) for key, w in weights.items()}
    entries = {key: drawn(tuple(w.shape)) for key, w in weights.items()}
    for variances in ({key: torch.tensor(0.7) for key in weights}, rows, entries):
        found = estimated(net, images, Diagonal(variances, weights), method="exact", batch_size=2)
        assert found.value == pytest.approx(trace(dense, variances), rel=1e-8)
        assert found.method == "exact"
        assert found.samples == len(images)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_projection_is_the_dense_one_with_the_same_signs(name: str) -> None:
    net, images = nets()[name]
    dense = flat(jacobian(net, images), 2)
    found = estimated(net, images, Isotropic(1.0), method="projection", seed=5, batch_size=2)
    drawn = draw_signs(5, 0, len(images), dense.shape[1]).double()
    expected = torch.einsum("nk,nkp->np", drawn, dense).square().sum(1)
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-9)
    assert found.standard_error == pytest.approx(float(expected.std() / len(images) ** 0.5), rel=1e-9)


def test_curvlinops() -> None:
    """A second opinion: the trace of the Gauss-Newton matrix of half the squared error, J^T J / N."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from curvlinops import GGNLinearOperator
    except ImportError as error:
        pytest.skip(f"curvlinops-for-pytorch is not installed: {error}")
    net, images = mlp(), pixels(6)
    parameters = list(net.parameters())
    loss = nn.MSELoss(reduction="sum")  # its Hessian by the outputs is 2 I
    operator = GGNLinearOperator(net, loss, parameters, [(images, torch.zeros(6, 5).double())])
    matrix = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    found = estimated(net, images, Isotropic(1.0), method="exact")
    assert found.value == pytest.approx(float(matrix.trace()) / 2 / 6, rel=1e-8)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("loop", [False, True])
def test_every_layer(loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if loop:
        monkeypatch.setattr("jbrprune.criteria.weight_relevance.CHUNK_NUMBERS", 1)
    for case in OWN:
        net = made(OWN, case)
        check_against_autograd(net, cases.images(2), case)


@pytest.mark.parametrize("case", ["resnet18", "resnext", "mobilenetv3", "convnext", "vit", "deit distilled"])
def test_models(case: str) -> None:
    check_against_autograd(*cases.timm_model(case), case)


def check_against_autograd(net: nn.Module, images: Tensor, what: str) -> None:
    images = images[:2]
    leaves = [p.requires_grad_() for p in net.parameters()]
    outputs = net(images)
    total = 0.0
    for row in (outputs * (1 + torch.arange(outputs.shape[1]))).sum(1):
        found = torch.autograd.grad(row, leaves, retain_graph=True, allow_unused=True)
        total += sum(float(g.square().sum()) for g in found if g is not None)

    def weighted(output: Tensor) -> Tensor:
        return (output * (1 + torch.arange(output.shape[1]))).sum(1, keepdim=True)

    found = estimated(net, images, Isotropic(1.0), output=weighted)
    assert found.value == pytest.approx(total / 2, rel=1e-9), what
    assert found.unit == "squared outputs"


# --- the empirical form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_empirical_tends_to_the_trace_form(name: str) -> None:
    """The difference falls with sigma^2, and is within three standard errors when sigma is small."""
    net, images = nets()[name]
    dense = trace(jacobian(net, images))
    small, large = (measured(net, images, Isotropic(sigma), draws=300, seed=2) for sigma in (1e-4, 1.0))
    draws_only = small.standard_error if len(images) < 2 else _error_over_draws(small)
    assert abs(small.value / 1e-8 - dense) < 3 * draws_only / 1e-8
    assert draws_only / small.value < 0.1
    assert abs(large.value - dense) > 0.1 * dense


def _error_over_draws(found: Any) -> float:
    """The images are all there are here: only the draws are uncertain."""
    means = found.values.mean(0)
    return float(means.std() / len(means) ** 0.5)


def test_standard_error_is_the_spread_over_other_samples_and_other_draws() -> None:
    """(value - truth) / standard error has a standard deviation of about 1, for every estimator."""
    net, images = mlp(width=3), pixels(30_000)  # 200 samples: enough blocks of signs that depend on each other
    truth = estimated(net, images, Isotropic(1e-3), method="exact", batch_size=1000).value
    found: dict[str, list[float]] = {"projection": [], "jvp": [], "empirical": []}
    for trial, some in enumerate(images.split(200)):
        for name in found:
            options: dict[str, Any] = {"draws": 8, "seed": trial, "batch_size": 200}
            form = measured if name == "empirical" else estimated
            if name != "empirical":
                options["method"] = name
            one = form(net, some, Isotropic(1e-3), **options)
            found[name].append((one.value - truth) / one.standard_error)
    spreads = {name: float(torch.tensor(z).std()) for name, z in found.items()}
    assert all(0.84 < spread < 1.19 for spread in spreads.values()), spreads


def test_standard_error_of_crossed_values_that_are_drawn() -> None:
    """v_nr = a_n b_r c_nr: the interaction of samples and draws is a good part of it."""
    generator = torch.Generator().manual_seed(0)
    normal = [
        torch.randn(shape, generator=generator).double() for shape in ((4000, 30, 1), (4000, 1, 10), (4000, 30, 10))
    ]
    values = (0.5 * normal[0]).exp() * (0.3 * normal[1]).exp() * (0.7 * normal[2]).exp()
    truth = math.exp((0.5**2 + 0.3**2 + 0.7**2) / 2)
    found = [crossed(each) for each in values]
    errors = torch.tensor([one.value - truth for one in found])
    variance = torch.tensor([one.standard_error**2 for one in found]).mean()
    assert float(errors.square().mean() / variance) == pytest.approx(1, abs=0.06)


# --- running, stopping, sharding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "projection"])
def test_batches_do_not_matter(method: str) -> None:
    net, images = mlp(), pixels(50)
    whole = estimated(net, images, Isotropic(0.3), method=method, seed=3)
    for size in (1, 7, 50):
        other = estimated(net, images, Isotropic(0.3), method=method, seed=3, batch_size=size)
        assert (other.value, other.standard_error) == pytest.approx((whole.value, whole.standard_error), rel=1e-12)


def test_signs_are_independent_and_depend_on_the_number_of_the_sample() -> None:
    signs = draw_signs(7, 0, 4000, 10).double()
    assert (signs.abs() == 1).all()
    assert ((signs.T @ signs / 4000 - torch.eye(10)).abs() < 4 / 4000**0.5).all()
    assert ((signs[1:] * signs[:-1]).mean(0).abs() < 4 / 4000**0.5).all()
    assert (signs.mean(0).abs() < 4 / 4000**0.5).all()
    assert torch.equal(draw_signs(7, 11, 30, 5), draw_signs(7, 0, 41, 5)[11:])
    assert not torch.equal(draw_signs(8, 0, 30, 5), draw_signs(7, 0, 30, 5))


def test_stops_at_the_relative_error_and_says_so() -> None:
    net, images = mlp(), pixels(4000)
    found = estimated(net, images, Isotropic(0.3), rtol=0.05, batch_size=50)
    assert found.stopped == "rtol"
    assert found.relative_error <= 0.05
    assert found.samples < 4000
    short = estimated(net, images, Isotropic(0.3), rtol=0.001, samples=130, batch_size=50)
    assert (short.stopped, short.samples) == ("budget", 130)
    assert short.relative_error > 0.001
    assert "budget" in str(short)
    real = measured(net, images[:2000], Isotropic(0.3), rtol=0.1, draws=500, batch_size=1000)
    assert real.stopped == "rtol"
    assert 2 <= real.draws < 500
    assert real.to_dict()["validity"] is None


def test_standard_error_of_crossed_samples_and_draws() -> None:
    """v_nr = a_n + b_r: s_a^2/N + s_b^2/R exactly, without an interaction."""
    a, b = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 10.0])
    found = crossed(a[:, None] + b)
    assert found.value == pytest.approx(8)
    assert found.standard_error**2 == pytest.approx(float(a.var() / 3 + b.var() / 2))
    assert crossed(a[:, None], shared=False).standard_error ** 2 == pytest.approx(float(a.var() / 3))
    assert math.isnan(crossed(a[:, None]).standard_error)


def test_standard_error_with_an_interaction_by_hand() -> None:
    """Means of samples 1.5, 5.5 (variance 8), of draws 2, 5 (4.5), residuals +-1 (4 / 1): 8/2 + 4.5/2 - 4/4."""
    found = crossed(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    assert found.value == 3.5
    assert found.standard_error == pytest.approx(5.25**0.5)


@pytest.mark.parametrize("form", [estimated, measured])
def test_where_it_stops_by_chance_does_not_make_the_error_larger(form: Any) -> None:
    """Four outputs, one weight each: a draw is chi squared with 4 degrees of freedom, 12.5 of them give 20 %."""
    net, images = linear(torch.ones(4, 1)), torch.ones(64, 1, 1, 1).double()
    options: dict[str, Any] = {"method": "jvp"} if form is estimated else {}
    found = [form(net, images, Isotropic(0.5), rtol=0.2, draws=200, seed=seed, **options) for seed in range(100)]
    errors = torch.tensor([one.value / 1.0 - 1 for one in found])
    assert all(one.stopped == "rtol" and 16 <= one.draws < 200 for one in found)
    assert float(errors.square().mean().sqrt()) < 0.22  # with the fourth draw as the first at which to stop: 0.27
    hits = sum(abs(one.value - 1) <= 1.96 * one.standard_error for one in found)
    assert hits >= 88  # with the fourth draw as the first at which to stop: 83


def test_all_draws_that_there_are_may_be_few() -> None:
    net, images = linear(torch.ones(1, 40)), torch.ones(64, 1, 1, 40).double()
    few = measured(net, images, Isotropic(0.5), rtol=0.5, draws=6)
    assert (few.draws, few.stopped) == (6, "rtol")


def test_changes_that_the_dtype_rounds_away() -> None:
    """bf16 has 8 bits: a hundred-thousandth of a weight is nothing, or far too much."""
    net, images = mlp().bfloat16(), pixels(64).bfloat16()
    with pytest.warns(TPVWarning, match="too small for the dtype of the weights"):
        measured(net, images, Isotropic(3e-4), draws=2, validity=True)


def test_a_norm_in_low_precision() -> None:
    """The statistics of the norm have the dtype of its input, the arithmetic of gradients is wider."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    images = torch.randn(16, 3, 2, 2)
    full = estimated(net, images, Isotropic(1.0), method="exact")
    low = estimated(net.bfloat16(), images.bfloat16(), Isotropic(1.0), method="exact")
    assert low.value == pytest.approx(full.value, rel=0.05)


def test_a_perturbation_without_variance_is_named() -> None:
    net = linear(torch.ones(2, 12))
    for form in (estimated, measured):
        with pytest.warns(TPVWarning, match="changes nothing"):
            assert form(net, pixels(8), Quantization(8)).value == 0


def test_the_model_is_a_guest() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(5))
    images = cases.images(8).float()
    net(images)
    net.train()
    net[0].weight.requires_grad_(False)
    net[0].bias.grad = torch.ones(4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    for run in (trace_form, empirical):
        run(net, images, Isotropic(1e-3), progress=False, rtol=0)
    with pytest.raises(ArgumentError):
        trace_form(net, images, Diagonal({"0.weight": torch.ones(9, 9)}, {}), progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert not net[0].weight.requires_grad
    assert net[3 + 1].weight.requires_grad
    assert torch.equal(net[0].bias.grad, torch.ones(4))
    assert not any(module._forward_hooks for module in net.modules())


def test_frozen_parameters_and_ignored_ones() -> None:
    net, images = mlp(), pixels(6)
    dense = jacobian(net, images)
    for p in net.parameters():
        p.requires_grad_(False)
    assert estimated(net, images, Isotropic(1.0), method="exact").value == pytest.approx(trace(dense), rel=1e-9)
    kept = {name: j for name, j in dense.items() if name.startswith("3")}
    found = estimated(net, images, Isotropic(1.0), method="exact", ignore=["1"])
    assert found.value == pytest.approx(trace(kept), rel=1e-9)


def test_labels_and_references_in_the_data_do_not_matter() -> None:
    net, images = mlp(), pixels(6)
    batches = [Batch(images, torch.zeros(6, dtype=torch.long))]
    assert estimated(net, batches, Isotropic(1.0)).value == estimated(net, images, Isotropic(1.0)).value


def test_probabilities_in_the_place_of_logits() -> None:
    net, images = mlp(), pixels(6)
    found = estimated(net, images, Isotropic(1.0), method="exact", output=lambda out: out.softmax(1))
    dense = jacobian(nn.Sequential(net, nn.Softmax(1)), images)
    assert found.value == pytest.approx(trace(dense), rel=1e-9)


# --- validity --------------------------------------------------------------------------------------------------------


def test_taylor_error_by_hand() -> None:
    """f = u^2 x at u = 1 along du = 1: real 2t + t^2, first order 2t, error t / (2 + t)."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(1, 1, bias=False)
            self.one.weight.data.fill_(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x.flatten(1)))

    net, direction = Square().double(), {"one.weight": torch.ones(1, 1).double()}
    x = torch.tensor([1.0, 5.0]).double().view(2, 1, 1, 1)
    found = taylor_error(net, x, direction, [1.0, 0.1, 0.2], progress=False)
    assert found.scales == (0.1, 0.2, 1.0)
    assert found.errors == pytest.approx([t / (2 + t) for t in found.scales], rel=1e-9)
    assert (found.largest_valid, found.valid, found.samples) == (0.2, False, 2)
    assert taylor_error(net, x, direction, [0.3], progress=False).largest_valid == 0
    assert taylor_error(net, x, direction, [0.3], tolerance=0.2, samples=1, progress=False).samples == 1


def test_predictions_carry_their_validity_and_warn() -> None:
    net, images = mlp(), pixels(64)
    fine = trace_form(net, images, Isotropic(1e-3), progress=False)
    assert fine.validity is not None
    assert fine.validity.valid
    with pytest.warns(TPVWarning, match="First order is not valid at this size"):
        bad = empirical(net, images, Isotropic(2.0), draws=2, progress=False)
    assert bad.validity is not None
    assert not bad.validity.valid
    assert bad.to_dict()["validity"]["largest_valid"] < 1


def test_quantization_of_a_convolution_by_channel() -> None:
    net, images = made(cases.NETS, "concatenation, flattened"), cases.images(3)
    covariance = bound(Quantization(4, "channel"), net)
    dense = jacobian(net, images)
    found = estimated(net, images, Quantization(4, "channel"), method="exact")
    assert found.value == pytest.approx(trace(dense, covariance.variances), rel=1e-8)  # type: ignore[attr-defined]


def test_attention_of_timm_by_forward_mode() -> None:
    """The fused kernel has no forward-mode derivative."""
    net, images = cases.timm_model("vit")
    direction = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    found = taylor_error(net, images[:2], direction, [1e-6], tolerance=1e-3, progress=False)
    assert found.largest_valid == 1e-6


def test_weight_standardisation() -> None:
    """A weight that is transformed before it is used."""
    from timm.layers.std_conv import StdConv2d

    torch.manual_seed(0)
    net = nn.Sequential(StdConv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5)).double().eval()
    check_against_autograd(net, cases.images(2), "weight standardisation")
    assert estimated(net, cases.images(3), Isotropic(1e-3), method="jvp", draws=2).value > 0


class Branch(nn.Module):
    """A branch that depends on values, and an in-place operation on a tensor that has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(1))
        y = y.tanh() if bool((y.detach().sum() > 0).all()) else y.sin()
        total = torch.zeros(1, 5, dtype=y.dtype)
        total += y[:1]
        return y


def test_models_that_vmap_refuses_are_differentiated_sample_by_sample() -> None:
    torch.manual_seed(0)
    net, images = Branch().double(), pixels(2)
    found = [estimated(net, one[None], Isotropic(1.0), method="exact") for one in images]
    dense = [trace(jacobian(nn.Sequential(nn.Flatten(), net.layer, f), one[None])) for one, f in zip(images, wave(net))]
    assert [one.value for one in found] == pytest.approx(dense, rel=1e-9)


def wave(net: Branch) -> list[nn.Module]:
    images = pixels(2)
    return [nn.Tanh() if float(net.layer(one.flatten()).detach().sum()) > 0 else Sine() for one in images]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def test_softmax_cross_entropy_is_not_what_is_measured() -> None:
    """The sum runs over outputs: twice the same output counts twice."""
    net, images = mlp(outputs=1), pixels(6)
    once = estimated(net, images, Isotropic(1.0))
    twice = estimated(net, images, Isotropic(1.0), output=lambda out: torch.cat([out, out], 1))
    assert twice.value == pytest.approx(2 * once.value, rel=1e-12)
    assert F.softmax(net(images), 1).shape == (6, 1)


def test_rounding_is_not_taken_for_curvature() -> None:
    """Changes of 1e-6 in float32: a thousandth of them is lost in rounding, the whole is not."""
    net, images = mlp().float(), pixels(64).float()
    direction = {name: 1e-6 * torch.ones_like(p) for name, p in net.named_parameters()}
    found = taylor_error(net, images, direction, [1e-3, 1e-2, 1.0, 10.0], progress=False)
    assert found.errors[0] > 1 / 2
    assert found.errors[-1] < 0.1
    assert found.largest_valid == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn()


def test_a_change_too_small_to_be_seen_is_called_so() -> None:
    net, images = mlp().float(), pixels(4).float()
    direction = {"1.weight": torch.full((7, 12), 1e-15)}
    found = taylor_error(net, images, direction, progress=False)
    assert (found.errors[-1], found.largest_valid) == (math.inf, 0)
    assert found.to_dict()["errors"] == [None] * 4
    with pytest.warns(TPVWarning, match="rounding.*larger"):
        found.warn()


def test_two_draws_that_are_alike_by_chance_do_not_stop() -> None:
    """One weight, draws of its noise: two of them have nearly the same square."""

    class Drawn:
        def __init__(self) -> None:
            self.left = iter([1.0, -1.001, 3.0, 0.1, 2.0, 0.5])

        def quadratic(self, gradients: dict[str, Tensor]) -> Tensor:
            return square_norms(gradients, {"1.weight": 1.0})

        def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
            return {"1.weight": torch.full((1, 1), next(self.left), dtype=torch.float64)}

    net, images = linear(torch.ones(1, 1)), torch.ones(100, 1, 1, 1).double()
    found = measured(net, images, Drawn(), draws=6, rtol=0.02)
    assert (found.draws, found.stopped) == (6, "budget")
