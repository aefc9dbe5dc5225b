"""The studies: tiny versions end to end, resuming, and their formulas a second time."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call, jacrev

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "studies"))

import common
import first_order
import fitting
import frame
import kernel
import label_noise
import stability

from jbrprune.errors import ArgumentError
from jbrprune.tpv import LabelNoise, trace_form

NAMES = ("label_noise", "stability", "first_order")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Nets of one test are not those of another."""
    yield
    label_noise.trained.cache_clear()
    fitting.on_digits.cache_clear()


# --- end to end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_version_gives_lines_a_table_and_a_figure(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study, out = importlib.import_module(name).STUDY, tmp_path / f"{name}.jsonl"
    frame.main(study, ["--out", str(out), "--quick"])
    lines = common.lines(out)
    wanted = [s for s in study.settings(True) if s.get("data") != "fashion_mnist"]
    assert [line["key"] for line in lines] == [common.key_of([name, s]) for s in wanted]
    for line, settings in zip(lines, wanted, strict=True):
        assert settings.items() <= line.items()
        assert {"seconds", "versions", "hardware", "commit", "command"} <= line.keys()
        assert all(value is not None for value in line.values())  # nothing was infinite
    whole = out.read_bytes()
    frame.main(study, ["--out", str(out), "--quick"])
    assert out.read_bytes() == whole
    capsys.readouterr()
    frame.main(study, ["--out", str(out), "--show", str(tmp_path / "shown")])
    text = (tmp_path / "shown" / f"{name}.md").read_text()
    assert capsys.readouterr().out == text
    assert text.count("\n| --- |") == len(study.tables(frame.read(out)))
    assert (tmp_path / "shown" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", NAMES)
def test_settings_tell_runs_apart_and_say_the_seed(name: str) -> None:
    study = importlib.import_module(name).STUDY
    for quick in (True, False):
        keys = [common.key_of([name, settings]) for settings in study.settings(quick)]
        assert len(keys) == len(set(keys))
    seeds = {settings["seed"] for settings in study.settings(False)}
    assert len(seeds) == 3


def counting(broken: list[int]) -> frame.Study:
    """A study of five runs; those whose number is in the list are interrupted."""

    def measure(settings: frame.Settings, folder: Path | None) -> dict[str, int]:
        if settings["number"] in broken:
            raise KeyboardInterrupt
        return {"square": settings["number"] ** 2}

    def table(lines: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        return [("squares", lines[["number", "square"]])]

    return frame.Study(
        "counting",
        "",
        lambda quick: ({"number": n, "seed": 0} for n in range(5)),
        measure,
        table,
        lambda lines: frame.panels(1)[0],
    )


def test_an_interrupted_study_loses_no_line_and_doubles_none(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt):
        frame.main(counting([3]), ["--out", str(out)])
    assert [line["number"] for line in common.lines(out)] == [0, 1, 2]
    out.write_bytes(out.read_bytes()[:-20])  # killed while the third line was written
    frame.main(counting([]), ["--out", str(out)])
    assert sorted(line["number"] for line in common.lines(out)) == [0, 1, 2, 3, 4]
    assert len(out.read_text().splitlines()) == 5


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def measure(settings: frame.Settings, folder: Path | None) -> dict[str, int]:
        if settings["number"] == 1:
            raise ArgumentError("no such number")
        return {"square": 0}

    study, out = counting([]), tmp_path / "lines.jsonl"
    study = frame.Study(study.name, study.about, study.settings, measure, study.tables, study.figure)
    with pytest.raises(SystemExit, match="1 of 5 runs failed"):
        frame.main(study, ["--out", str(out)])
    assert [line["number"] for line in common.lines(out)] == [0, 2, 3, 4]
    assert "no such number" in capsys.readouterr().err


def test_showing_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run the study first"):
        frame.main(counting([]), ["--out", str(tmp_path / "none.jsonl"), "--show", str(tmp_path)])


# --- statistics ------------------------------------------------------------------------------------


def test_rank_correlation_is_scipys_and_its_interval_covers() -> None:
    drawing = np.random.default_rng(1)
    covered = []
    for number in range(30):
        x, y = drawing.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 40).T
        rho, low, high = frame.rank_correlation(x, y, seed=number)
        assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
        assert low < rho < high
        covered.append(low < 6 / np.pi * np.arcsin(0.3) < high)  # Spearman's rho of a normal pair
    assert np.mean(covered) > 0.8
    assert frame.rank_correlation(range(10), [n**3 for n in range(10)]) == pytest.approx((1, 1, 1))
    assert np.isnan(frame.rank_correlation(range(9), range(9))[1:]).all()
    assert np.isnan(frame.rank_correlation([1, 2], [1, 2])).all()


def test_of_few_pairs_the_exact_p_is_given() -> None:
    """Of the 24 pairings of four, one rises and one falls throughout: 2 / 24; of five with one swap: 10 / 120."""
    assert frame.permutation_p([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(2 / 24)
    swapped = [1, 2, 3, 5, 4]
    every = [stats.spearmanr(range(5), pairing).statistic for pairing in itertools.permutations(range(5))]
    expected = np.mean(np.abs(every) >= stats.spearmanr(range(5), swapped).statistic - 1e-9)
    assert frame.permutation_p(range(5), swapped) == pytest.approx(expected)
    assert frame.correlated([1, 2, 3, 4], [4, 3, 2, 1]) == "-1.00 (n = 4, p = 0.083)"
    assert frame.correlated(range(12), range(12)) == "+1.00 (+1.00 to +1.00)"
    assert frame.correlated([1, 2], [1, 2]) == ""


def test_warnings_are_held_against_what_is_off() -> None:
    """Of three runs at 10 samples two are off, one of them with a warning; the third is warned of for nothing."""
    lines = pd.DataFrame({"train": 10, "isotropic": [1.5, 1.3, 1.22], "isotropic_warned": [True, False, True]})
    ((_, table),) = stability.flags(lines)
    counts = table.drop(columns=["perturbation", "n_train"]).iloc[0].to_dict()
    assert counts == {"runs": 3, "off": 2, "off, warned": 1, "off, not warned": 1, "not off, warned": 1}
    assert stability.flags(lines.drop(columns="isotropic_warned")) == []


# --- data and training -----------------------------------------------------------------------------


def test_synthetic_data_are_the_teachers_and_fewer_samples_are_the_first_of_more() -> None:
    many, few = (fitting.synthetic("linear", dimension=6, train=n, test=7, seed=3) for n in (50, 20))
    assert torch.equal(many.images[:20], few.images)
    assert torch.equal(many.targets[:20], few.targets)
    assert torch.equal(many.test_images, few.test_images)
    x = many.images.flatten(1)
    weights = torch.linalg.lstsq(x, many.targets).solution
    assert torch.allclose(many.test_images.flatten(1) @ weights, many.test_targets, atol=1e-5)
    assert fitting.synthetic("relu", dimension=6, train=5000, test=1, seed=0).targets.std() == pytest.approx(1, abs=0.1)
    with pytest.raises(ArgumentError, match="teacher"):
        fitting.synthetic("cubic", dimension=6, train=5, test=1, seed=0)


def test_the_same_seed_gives_the_same_net_whatever_ran_before() -> None:
    data = fitting.synthetic("relu", dimension=4, train=40, test=5, seed=0)
    found = []
    for _ in range(2):
        torch.rand(7)
        model = fitting.mlp(4, 8, 1, seed=5)
        state = torch.get_rng_state()
        fitting.fit(model, data.images, data.targets, fitting.squared, steps=7, batch_size=16, seed=2)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(fitting.outputs(model, data.test_images))
    assert torch.equal(*found)


def test_squared_sums_over_outputs_and_averages_over_samples() -> None:
    found, wanted = torch.randn(5, 3), torch.randn(5, 3)
    slow = sum((found[n, k] - wanted[n, k]) ** 2 for n in range(5) for k in range(3)) / 5
    assert fitting.squared(found, wanted).item() == pytest.approx(float(slow), rel=1e-6)


# --- label noise in closed form --------------------------------------------------------------------


def jacobian(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """``[N, P]`` of a net with one output."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = jacrev(lambda moved: functional_call(model, moved, (inputs,))[:, 0])(weights)
    return torch.cat([part.flatten(1) for part in rows.values()], 1)


def test_the_kernel_is_the_jacobians_and_label_noise_the_textbook_formula() -> None:
    data = fitting.synthetic("relu", dimension=3, train=12, test=9, seed=0)
    model = fitting.mlp(3, 7, 1, layers=3).double()
    train, test = data.images.double(), data.test_images.double()
    rows, test_rows = jacobian(model, train), jacobian(model, test)
    assert torch.allclose(kernel.kernel(model, test, train), test_rows @ rows.T, atol=1e-12)
    seen = kernel.spectrum(model, train, (train, test))
    for penalty in (0.3, 1e-3):
        inverse = torch.linalg.inv(rows.T @ rows / 12 + penalty * torch.eye(rows.shape[1], dtype=torch.float64))
        to_weights = inverse @ rows.T / 12  # noise -> dw
        for points, found in zip((rows, test_rows), seen.label_noise(penalty), strict=True):
            assert found == pytest.approx(float((points @ to_weights).square().sum() / len(points)), rel=1e-8)
        noise = torch.randn(12, dtype=torch.float64)
        for points, found in zip((rows, test_rows), seen.response(noise, penalty), strict=True):
            assert torch.allclose(found, points @ to_weights @ noise, atol=1e-10)
        share = torch.trace(rows @ to_weights)
        assert seen.dimension(penalty) == pytest.approx(float(share), rel=1e-8)
    assert seen.label_noise(0.0)[0] == pytest.approx(1.0, rel=1e-6)  # more parameters than samples: noise is repeated
    with pytest.raises(ArgumentError, match="one output"):
        kernel.kernel(fitting.mlp(3, 7, 2), data.images, data.images)


def test_the_kernel_says_what_the_trace_form_says() -> None:
    data = fitting.synthetic("relu", dimension=3, train=12, test=9, seed=0)
    model = fitting.mlp(3, 7, 1, layers=3)
    seen = kernel.spectrum(model, data.images, (data.images, data.test_images))
    noise = LabelNoise(0.1, data.images, proximity=0.02)
    how = {"rtol": 0.0, "method": "exact", "validity": False, "progress": False}
    for points, found in zip((data.images, data.test_images), seen.label_noise(0.02), strict=True):
        assert 0.01 * found == pytest.approx(trace_form(model, points, noise, **how).value, rel=1e-4)


def test_label_noise_of_least_squares_is_rank_over_n() -> None:
    data = fitting.synthetic("linear", dimension=5, train=30, test=400, seed=1)
    model = fitting.mlp(5, 0, 1, layers=1)
    seen = kernel.spectrum(model, data.images, (data.images, data.test_images))
    train, test = seen.label_noise(0.0)
    assert train == pytest.approx(6 / 30, rel=1e-9)  # five weights and a bias
    x, test_x = (
        torch.cat([part.flatten(1), torch.ones(len(part), 1)], 1).double() for part in (data.images, data.test_images)
    )
    leverage = torch.einsum("nd,de,ne->n", test_x, torch.linalg.inv(x.T @ x), test_x)
    assert test == pytest.approx(leverage.mean().item(), rel=1e-6)


def test_relearning_finds_the_ridge_solution_for_several_outputs() -> None:
    data = fitting.synthetic("linear", dimension=5, train=30, test=8, seed=1)
    model = fitting.mlp(5, 0, 3, layers=1).double()
    x = torch.cat([data.images.flatten(1), torch.ones(30, 1)], 1).double()
    noise, penalty = torch.randn(30, 3, dtype=torch.float64), 0.2
    before = fitting.outputs(model, data.images.double())
    learner = fitting.relearn(model, data.images.double(), before + noise, penalty)
    step = torch.linalg.solve(x.T @ x / 30 + penalty * torch.eye(6, dtype=torch.float64), x.T @ noise / 30)
    moved = fitting.change(model, learner)
    assert torch.allclose(moved["1.weight"], step[:5].T, atol=1e-6)
    assert torch.allclose(moved["1.bias"], step[5], atol=1e-6)


@pytest.mark.parametrize("layers, tolerance", [(1, 5e-3), (3, 0.05)])
def test_retraining_does_what_the_trace_form_says_where_first_order_holds(layers: int, tolerance: float) -> None:
    data = fitting.synthetic("relu", dimension=4, train=25, test=40, seed=2)
    model = fitting.mlp(4, 64, 1, layers=layers)
    seen = kernel.spectrum(model, data.images, (data.images, data.test_images))
    penalty = 0.05 * seen.values.mean().item()
    found = label_noise.retrained(model, data, seen, penalty, {"seed": 0, "draws": 60, "sigma": 1e-2})
    for side, expected in zip(("train", "test"), seen.label_noise(penalty), strict=True):
        assert found[f"error_{side}"] < tolerance
        assert found[f"paired_{side}"] == pytest.approx(found[f"empirical_{side}"], rel=2 * tolerance)
        assert found[f"empirical_{side}"] == pytest.approx(1e-4 * expected, rel=0.4)  # 60 draws


# --- perturbations and signals ---------------------------------------------------------------------


def test_relative_noise_by_hand() -> None:
    model = fitting.mlp(3, 0, 2, layers=1)
    x = torch.randn(20, 1, 1, 3)
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    square = x.square().flatten(1).sum(1).mean()
    by_hand = 0.01 * 2 * (weight.square().mean() * square + bias.square().mean())
    how = {"rtol": 0.0, "method": "exact", "validity": False, "progress": False}
    assert trace_form(model, x, fitting.Relative(0.1), **how).value == pytest.approx(by_hand.item(), rel=1e-5)


def test_perturbations_are_what_they_say() -> None:
    data = fitting.images("digits", None, train=64, test=20, seed=0)
    model = fitting.mlp(1024, 16, 10)
    dw = first_order.removal(model, data, 0.25, 0)
    weights = dict(model.named_parameters())
    gone = (dw["5.weight"].abs().sum(0) > 0).nonzero().flatten()
    assert len(gone) == 4
    assert torch.equal(dw["5.weight"][:, gone], -weights["5.weight"][:, gone])
    dw = first_order.removal_of_weights(model, data, 0.5, 0)
    removed = dw["1.weight"] != 0
    assert removed.double().mean() == pytest.approx(0.5, abs=0.01)
    assert weights["1.weight"][removed].abs().max() <= weights["1.weight"][~removed].abs().min()
    rounded = weights["1.weight"] + first_order.quantization(model, data, 3, 0)["1.weight"]
    assert len(rounded.detach().unique()) <= 8


def test_the_error_of_first_order_by_hand() -> None:
    """Of a product of two layers the second order is the product of the changes."""
    settings = {"net": "mlp", "perturbation": "isotropic", "size": 0.2, "seed": 0, "steps": 3, "train": 64, "test": 20}
    found = first_order.measure(settings, None)
    model, data = fitting.on_digits("mlp", 0, 3, 64, 20)
    dw = first_order.isotropic(model, data, 0.2, 0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tiny = 1e-3
    before = fitting.outputs(model, data.test_images)
    after, near = (
        functional_call(model, {name: w + t * dw[name] for name, w in weights.items()}, (data.test_images,)).detach()
        for t in (1.0, tiny)
    )
    first = (near - before) / tiny
    error = ((after - before - first).square().sum() / (after - before).square().sum()).sqrt()
    assert found["error"] == pytest.approx(error.item(), rel=0.05)
    assert found["tpv"] == pytest.approx((after - before).square().sum(1).mean().item(), rel=1e-4)
    assert found["flips"] == (after.argmax(1) != before.argmax(1)).double().mean().item()
