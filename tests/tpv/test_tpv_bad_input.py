"""What trace_form, empirical and their relatives say about input that has no meaning."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from test_cli import Run, pictures, run  # noqa: F401  (fixtures)
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from tpv_nets import estimated, linear, measured, mlp, pixels

from jbrprune.errors import ArgumentError, DataError, ModelError, NonFiniteError
from jbrprune.tpv import Diagonal, FiniteRank, Isotropic, TPVWarning, square_norms, taylor_error, train_test_ratio

NET, IMAGES = mlp(), pixels(6)


class Output(nn.Module):
    """A model whose output goes through a function."""

    def __init__(self, function: Any, inputs: int = 12) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(inputs, 3).double(), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer(x.flatten(1)))


def test_gradients_that_are_not_finite() -> None:
    """sqrt(0): the logits are finite, their derivative is not."""
    net = Output(lambda y: (0 * y).sqrt())
    with pytest.raises(NonFiniteError, match=r"NaN or Inf.*gradients g by \['layer\.weight'"):
        estimated(net, IMAGES, Isotropic(1.0), method="exact")
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        estimated(net, IMAGES, Isotropic(1.0), method="jvp", draws=2)


def test_weights_and_outputs_that_are_not_finite() -> None:
    net = mlp()
    net[1].weight.data[0, 0] = torch.nan
    for run_ in (estimated, measured):
        with pytest.raises(NonFiniteError, match=r"1\.weight"):
            run_(net, IMAGES, Isotropic(1.0))
    with pytest.raises(NonFiniteError):
        estimated(Output(lambda y: y / 0), IMAGES, Isotropic(1.0))
    with pytest.raises(NonFiniteError, match="changed outputs"):
        measured(Output(lambda y: y.exp()), IMAGES, Isotropic(1e4), draws=2)


def test_tens_of_thousands_of_outputs() -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(12, 20_000, bias=False))
    with pytest.raises(ArgumentError, match=r"20,000 outputs.*'projection'"):
        estimated(wide, IMAGES.float(), Isotropic(1.0), method="exact")
    found = estimated(wide, IMAGES.float(), Isotropic(1.0))
    assert found.method == "projection"
    assert found.value == pytest.approx(20_000 * float(IMAGES.flatten(1).square().sum(1).mean()), rel=1e-5)


def test_nothing_that_can_be_perturbed() -> None:
    bare = nn.Sequential(nn.Flatten(), nn.ReLU()).double()
    for run_ in (estimated, measured):
        with pytest.raises(ModelError, match="no parameter that can be perturbed"):
            run_(bare, IMAGES, Isotropic(1.0))
        with pytest.raises(ModelError, match="no parameter that can be perturbed"):
            run_(NET, IMAGES, Isotropic(1.0), ignore=["1", "3"])
        with pytest.raises(ArgumentError, match="'head' matches no module"):
            run_(NET, IMAGES, Isotropic(1.0), ignore=["head"])
    with pytest.warns(TPVWarning, match="outputs not depend on what is perturbed"):
        estimated(Output(lambda y: y.detach()), IMAGES, Isotropic(1.0))


def test_a_masked_model() -> None:
    net = mlp()
    prune.random_unstructured(net[1], "weight", 0.5)
    with pytest.raises(ModelError, match=r"1\.weight .* is masked by torch"):
        estimated(net, IMAGES, Isotropic(1.0))


@pytest.mark.parametrize(
    "covariance, match",
    [
        (Diagonal({"9.weight": torch.tensor(1.0)}, {}), "Unknown parameter '9.weight'"),
        (Diagonal({"1.weight": torch.ones(3, 3)}, {}), r"shape \[3, 3\] for 1.weight, which is \[7, 12\]"),
        (object(), "not a covariance"),
    ],
)
def test_a_covariance_of_another_model(covariance: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        estimated(NET, IMAGES, covariance)


def test_variances_that_are_none() -> None:
    for value in (-1.0, math.nan):
        with pytest.raises(ArgumentError, match=r"negative \(or NaN\) variances for 1\.weight"):
            Diagonal({"1.weight": torch.tensor([1.0, value])}, {})


def test_a_direction_of_another_model() -> None:
    for direction, match in (({"x": torch.ones(1)}, "'x'"), ({"1.weight": torch.ones(1)}, r"\[1\] for 1.weight")):
        for run_ in (estimated, measured):
            with pytest.raises(ArgumentError, match=match):
                run_(NET, IMAGES, FiniteRank([direction], fixed=True))
        with pytest.raises(ArgumentError, match=match):
            taylor_error(NET, IMAGES, direction, progress=False)


def test_a_quadratic_form_of_the_wrong_shape() -> None:
    class Wrong:
        def quadratic(self, gradients: dict[str, Tensor]) -> Tensor:
            return square_norms(gradients, {"1.weight": 1.0}).sum()

        def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
            return {}

    with pytest.raises(ArgumentError, match=r"must give \[6\], got \[\]"):
        estimated(NET, IMAGES, Wrong())


def test_no_variance_between_samples_and_one_sample() -> None:
    same = pixels(1).expand(100, -1, -1, -1)
    found = estimated(linear(torch.ones(3, 12)), same, Isotropic(1.0), rtol=0.02, batch_size=10)
    assert found.standard_error == pytest.approx(0, abs=1e-6 * found.value)
    assert (found.stopped, found.samples) == ("rtol", 70)
    one = estimated(NET, IMAGES[:1], Isotropic(1.0), rtol=0.02)
    assert math.isnan(one.standard_error)
    assert (one.stopped, one.samples) == ("budget", 1)
    json.dumps(one.to_dict(), allow_nan=False)
    assert math.isnan(measured(NET, IMAGES, Isotropic(1.0), draws=1).standard_error)
    with pytest.warns(TPVWarning, match="changes nothing"):
        nothing = estimated(NET, IMAGES, Diagonal({"1.weight": torch.tensor(0.0)}, {}))
    assert (nothing.value, nothing.relative_error) == (0, 0)


def test_data_that_are_shuffled_between_passes() -> None:
    loader = DataLoader(TensorDataset(pixels(40)), batch_size=10, shuffle=True)
    with pytest.raises(DataError, match=r"shuffled.*shuffle=False"):
        measured(NET, loader, Isotropic(1.0), draws=2)
    assert measured(NET, DataLoader(TensorDataset(pixels(40)), batch_size=10), Isotropic(1.0), draws=2).samples == 40
    assert estimated(NET, loader, Isotropic(1.0)).samples == 40  # one pass: any order
    with pytest.raises(DataError, match="no batch"):
        measured(NET, iter([pixels(4)]), Isotropic(1.0), draws=2)

    class Shrinking:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([pixels(4), pixels(4, seed=1)][: 3 - self.passes])

    with pytest.raises(DataError, match="The 1 batches are not those of the first pass"):
        measured(NET, Shrinking(), Isotropic(1.0), draws=2)


def test_several_outputs_and_regressions() -> None:
    both = Output(lambda y: (y, y.square()))
    for run_ in (estimated, measured):
        with pytest.raises(ModelError, match="a tuple of 2"):
            run_(both, IMAGES, Isotropic(1.0))
        with pytest.raises(ModelError, match="logits"):
            run_(Output(lambda y: {"a": y, "b": y}), IMAGES, Isotropic(1.0))
    first = estimated(both, IMAGES, Isotropic(1.0), output=lambda out: out[0])
    assert first.value == pytest.approx(3 * float(IMAGES.flatten(1).square().sum(1).mean() + 1), rel=1e-9)
    number = Output(lambda y: y[:, 0])
    with pytest.raises(ModelError, match=r"`output=` must give \[B, K\].*6 images; it gave \[6\]"):
        estimated(number, IMAGES, Isotropic(1.0), output=lambda out: out)
    for run_ in (estimated, measured):
        assert run_(number, IMAGES, Isotropic(1.0), output=lambda y: y[:, None]).samples == 6
    with pytest.raises(ModelError, match=r"6 images; it gave \[3, 5\]"):
        estimated(NET, IMAGES, Isotropic(1.0), output=lambda out: out[:3])


def test_samples_that_influence_each_other() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Flatten(), nn.Linear(16, 3))
    noisy = Output(lambda y: y + torch.rand(1))
    for model, images in ((net, torch.randn(4, 3, 2, 2)), (noisy, IMAGES)):
        with pytest.raises(ModelError, match=r"influence each other.*or the forward pass is random"):
            estimated(model, images, Isotropic(1.0))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rtol": -0.1}, "rtol"),
        ({"rtol": 1.0}, "rtol"),
        ({"samples": 0}, "samples"),
        ({"draws": 0}, "draws"),
        ({"method": "guess"}, "method"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        estimated(NET, IMAGES, Isotropic(1.0), **options)


@pytest.mark.parametrize("scales, tolerance", [([], 0.1), ([0.0], 0.1), ([-1.0], 0.1), ([math.inf], 0.1), ([1.0], 0)])
def test_scales_without_meaning(scales: list[float], tolerance: float) -> None:
    with pytest.raises(ArgumentError):
        taylor_error(NET, IMAGES, {"1.weight": torch.ones(7, 12)}, scales, tolerance=tolerance, progress=False)


def test_training_and_test_images_that_disagree() -> None:
    net = linear(torch.ones(3, 12))
    train, test, other = (estimated(net, f * pixels(200, seed=s), Isotropic(1.0)) for s, f in enumerate((1, 1, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train_test_ratio(train, test).value == pytest.approx(1, abs=0.2)
    with pytest.warns(TPVWarning, match="disagree.*too few training samples"):
        ratio = train_test_ratio(train, other)
    assert abs(ratio.value - 0.25) < 3 * ratio.standard_error < 0.25
    with pytest.raises(ArgumentError, match="Cannot compare"):
        train_test_ratio(train, measured(net, pixels(6), Isotropic(1.0)))
