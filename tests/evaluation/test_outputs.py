"""What a model returns: which of it counts, and that every number of every kind is what a slow twin says."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jbrprune
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data.batches import Batch, rebatch
from jbrprune.errors import ArgumentError, ModelError
from jbrprune.evaluation import outputs
from jbrprune.evaluation.agreement import Agreement, agreement, compute_logits, measure_drop, wilson_interval
from jbrprune.evaluation.outputs import Output, find_output
from jbrprune.prediction.changes import predict_changes
from jbrprune.prediction.damage import measure_damage
from jbrprune.structure.discovery import find_groups
from jbrprune.structure.slicing import masked_units
from tests import reference

QUIET: dict[str, Any] = {"progress": False}


def block(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU())


class Pyramid(nn.Module):
    """Three levels and what is made of them; ``form`` makes what is returned of (levels, embedding, map, logits)."""

    def __init__(self, form: Callable[[list[Tensor], Tensor, Tensor, Tensor], Any], width: int = 6, classes: int = 4):
        super().__init__()
        self.form = form
        self.one, self.two, self.three = block(3, width), block(width, width), block(width, width)
        self.inner, self.map = nn.Conv2d(width, 5, 1), nn.Conv2d(5, classes, 1)
        self.hidden, self.fc = nn.Linear(width, 7), nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Any:
        levels = [x := stage(x) for stage in (self.one, self.two, self.three)]
        embedding = self.hidden(x.mean((2, 3)))
        maps = F.interpolate(self.map(self.inner(levels[1]).relu()), scale_factor=2.0)
        return self.form(levels, embedding, maps, self.fc(embedding.relu()))


FORMS: dict[str, Callable[[list[Tensor], Tensor, Tensor, Tensor], Any]] = {
    "logits": lambda levels, embedding, maps, logits: logits,
    "embedding": lambda levels, embedding, maps, logits: {"embedding": embedding},
    "features": lambda levels, embedding, maps, logits: levels[1:],
    "dense": lambda levels, embedding, maps, logits: {"out": maps, "aux": levels[1]},
    "binary": lambda levels, embedding, maps, logits: {"binary": logits[:, :1]},
}


def pyramid(kind: str, **options: Any) -> Pyramid:
    torch.manual_seed(0)
    net = Pyramid(FORMS[kind], **options).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def images(n: int = 6, size: int = 16, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator) + torch.randn(n, 3, 1, 1, generator=generator)


def output_of(model: nn.Module, x: Tensor, asked: Any = None) -> Output:
    with torch.no_grad():
        found = find_output(model, model(x), len(x), asked)
    return found.scaled_by(compute_logits(model, [Batch(x)], found))


def flat_rows(kind: str, returned: Any) -> list[Tensor]:
    """The tensors that count, ``[B, V]`` each, taken by hand."""
    parts = {"features": lambda r: r, "embedding": lambda r: [r["embedding"]], "dense": lambda r: [r["out"]]}
    return [part.flatten(1) for part in parts.get(kind, lambda r: [r])(returned)]


# --- what counts ----------------------------------------------------------------------------------

B = torch.zeros(2, 1)
LOGITS, MAP, TOKENS = torch.zeros(2, 4), torch.zeros(2, 4, 6, 6), torch.zeros(2, 9, 4)


def model_with(**attributes: Any) -> nn.Module:
    model = nn.Module()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("returned", "asked", "kind", "names", "guessed"),
    [
        (LOGITS, None, "logits", ("",), True),
        (MAP, None, "features", ("",), True),
        (TOKENS, None, "features", ("",), False),
        (B, None, "embedding", ("",), True),
        (B[:, 0], None, "embedding", ("",), True),
        (B, "binary", "binary", ("",), False),
        (LOGITS, "embedding", "embedding", ("",), False),
        (MAP, "dense", "dense", ("",), False),
        ((LOGITS,), None, "logits", ("",), True),
        ((LOGITS, LOGITS), None, "features", ("0", "1"), False),
        ((LOGITS, MAP), 0, "embedding", ("0",), True),
        ((LOGITS, MAP), "0", "embedding", ("0",), True),
        ({"logits": LOGITS, "boxes": LOGITS}, None, "logits", ("logits",), True),
        ({"logits": LOGITS, "boxes": LOGITS}, "features", "features", ("logits", "boxes"), False),
        ({"logits": LOGITS, "boxes": LOGITS}, "boxes", "embedding", ("boxes",), True),
        ({"logits": MAP, "loss": torch.tensor(1.0)}, None, "dense", ("logits",), False),
        ({"out": MAP, "aux": MAP}, None, "dense", ("out",), True),
        ({"hidden": [MAP, MAP], "pooled": LOGITS}, None, "features", ("hidden.0", "hidden.1", "pooled"), False),
        ({"hidden": [MAP, MAP], "pooled": LOGITS}, "hidden", "features", ("hidden.0", "hidden.1"), True),
        (SimpleNamespace(logits=LOGITS, text="no tensor"), None, "logits", ("logits",), False),
        ((LOGITS, MAP), lambda r: {"logits": r[0]}, "logits", ("logits",), False),
        ((LOGITS, MAP), lambda r: r[1].mean((2, 3)), "embedding", ("",), True),
        ({"x": LOGITS, "anchors": torch.zeros(9, 4)}, None, "logits", ("x",), True),
    ],
)
def test_what_counts_is_found(returned: Any, asked: Any, kind: str, names: tuple[str, ...], guessed: bool) -> None:
    found = find_output(nn.Identity(), returned, 2, asked)
    assert (found.kind, found.names, found.guessed) == (kind, names, guessed)
    assert ("output=" in found.said) == guessed
    assert found(returned).shape[0] == 2


@pytest.mark.parametrize(
    ("model", "kind", "guessed"),
    [
        (model_with(num_classes=4), "logits", False),
        (model_with(num_classes=0), "embedding", False),
        (model_with(fc=nn.Identity()), "embedding", False),
        (model_with(fc=nn.Linear(2, 4)), "logits", True),
    ],
)
def test_the_classifier_tells_logits_from_an_embedding(model: nn.Module, kind: str, guessed: bool) -> None:
    found = find_output(model, LOGITS, 2)
    assert (found.kind, found.guessed) == (kind, guessed)


@pytest.mark.parametrize(
    ("returned", "asked"),
    [
        ({"x": LOGITS}, "y"),
        ((LOGITS, LOGITS), 2),
        (MAP, "logits"),
        ((LOGITS, LOGITS), "embedding"),
        (LOGITS, "dense"),
        ({"x": torch.zeros(2, 4, dtype=torch.long)}, None),
        ("text", None),
    ],
)
def test_what_is_not_there_is_refused_and_output_is_named(returned: Any, asked: Any) -> None:
    with pytest.raises(ModelError, match="output= says what counts: 'logits', 'binary'"):
        find_output(nn.Identity(), returned, 2, asked)


@pytest.mark.parametrize("value", [1.5, torch.zeros(2), ["logits"]])
def test_output_is_checked_with_the_other_options(value: Any) -> None:
    with pytest.raises(ArgumentError, match="output must be"):
        jbrprune.prune(pyramid("logits"), images(), macs=0.5, output=value, **QUIET)


def test_rows_of_every_kind() -> None:
    z, maps = torch.randn(3, 2), torch.randn(3, 4, 2, 5)
    binary = find_output(nn.Identity(), z, 3, "binary")
    two = binary.by_class(binary(z))
    torch.testing.assert_close(two.softmax(1)[:, 1], z.sigmoid())
    assert binary.positions == 2
    dense = find_output(nn.Identity(), maps, 3, "dense")
    assert dense.by_class(dense(maps)).equal(maps.flatten(2))
    assert find_output(nn.Identity(), maps, 3, "features")(maps).equal(maps.flatten(1))
    mask = find_output(nn.Identity(), maps[:, :1], 3, "dense")  # foreground or not
    torch.testing.assert_close(mask.by_class(mask(maps[:, :1])).softmax(1)[:, 1], maps[:, 0].flatten(1).sigmoid())


def test_scales_make_every_tensor_as_large_as_the_others() -> None:
    returned = {"small": 1e-3 * torch.randn(5, 3), "large": 1e3 * torch.randn(5, 4, 6, 6)}
    found = find_output(nn.Identity(), returned, 5)
    scaled = found.scaled_by([found(returned)])
    norms = [math.sqrt(sum(float(x.square().sum()) for x in t.double()) / 5) for t in returned.values()]
    assert scaled.scales == pytest.approx(norms, rel=1e-6)
    for part in scaled(returned).split(scaled.sizes, 1):
        assert float(part.square().sum(1).mean()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(scaled.scale(found(returned)), scaled(returned))


@pytest.mark.parametrize("length", [1 << 16, (1 << 16) + 1, 3 << 17, 65537 * 6])
def test_of_large_tensors_some_values_of_every_channel_count(length: int) -> None:
    where = outputs.thin(torch.arange(length)[None])[0]
    stride = int(where[1]) if len(where) > 1 else 1
    assert len(where) <= outputs.MOST_VALUES
    assert int(where[-1]) + stride >= length
    for channels in (2, 3, 4, 6):
        if length % channels == 0 and stride > 1:
            assert set((where % channels).tolist()) == set(range(channels))


# --- relevance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize("batch_size", [2, 6])
def test_relevance_is_that_of_a_slow_twin(kind: str, batch_size: int) -> None:
    net, x = pyramid(kind).double(), images().double()
    groups, output = find_groups(net, x).groups, output_of(net, x)
    scores = Relevance(seed=5, output=output)(net, rebatch([Batch(x)], batch_size), groups)
    assert scores.settings.objective == ("projection" if kind in ("embedding", "features") else "pseudo_label")

    parts = [t.detach() for t in flat_rows(kind, net(x))] if kind != "binary" else [net(x)["binary"].detach()]
    norms = [math.sqrt(sum(float(row.square().sum()) for row in part) / len(x)) for part in parts]
    form = net.form
    net.form = lambda *made: torch.cat(flat_rows(kind, form(*made)) if kind != "binary" else [form(*made)["binary"]], 1)
    rows = torch.cat(parts, 1)
    if kind in ("embedding", "features"):
        weights = torch.cat(
            [torch.full((part.shape[1],), 1 / norm, dtype=torch.float64) for part, norm in zip(parts, norms)]
        )
        m = reference.signs(len(x), rows.shape[1], 5) * weights
    elif kind == "binary":  # softplus(-|z|), whose slope is the probability of the other answer
        m = -torch.sign(rows) * torch.sigmoid(-rows.abs())
    else:
        by_class = rows.unflatten(1, (4, -1))
        one_hot = F.one_hot(by_class.argmax(1), 4).movedim(-1, 1)
        m = (by_class.softmax(1) - one_hot).flatten(1)
    for name, of_unit in reference.outputs_by_unit(net, x, groups, "consumer").items():
        expected = torch.einsum("nk,nku->nu", m, of_unit).square().mean(0)
        torch.testing.assert_close(scores[name], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["features", "dense"])
def test_relevance_of_single_weights_is_that_of_a_slow_twin(kind: str) -> None:
    net, x = pyramid(kind).double(), images(4).double()
    output = output_of(net, x)
    found = weight_scores(net, [Batch(x)], Relevance("projection", seed=2, output=output))
    parts = [part.detach() for part in flat_rows(kind, net(x))]
    norms = [math.sqrt(float(part.square().sum()) / len(x)) if kind == "features" else 1.0 for part in parts]
    drawn = reference.signs(len(x), sum(part.shape[1] for part in parts), 2)
    expected = torch.zeros_like(net.two[0].weight)
    for image, signs in zip(x, drawn):
        rows = [part[0] / norm for part, norm in zip(flat_rows(kind, net(image[None])), norms)]
        (g,) = torch.autograd.grad((torch.cat(rows) * signs).sum(), net.two[0].weight)
        expected += (g * net.two[0].weight).detach().square() / len(x)
    torch.testing.assert_close(found["two.0.weight"], expected, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        ("embedding", Relevance("pseudo_label")),
        ("features", "jbr_published"),
        ("dense", Relevance(threshold=0.5)),
        ("dense", "jbr_label"),
    ],
)
def test_what_needs_classes_is_refused_where_there_are_none(
    kind: str, criterion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jbrprune.pruning.api.read_calibration", lambda *_, **__: pytest.fail("a pass was made"))
    with pytest.raises(ArgumentError, match=r"needs one decision among classes.*output='logits'"):
        jbrprune.prune(pyramid(kind, width=24), images(20), macs=0.7, criterion=criterion, **QUIET)


# --- agreement ------------------------------------------------------------------------------------


def test_nearest_neighbours_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(30, 8, generator=generator).double()
    pruned = dense + 0.4 * torch.randn(30, 8, generator=generator).double()
    output = Output("embedding", ("",), sizes=(8,))
    found = agreement(pruned, dense, None, output)

    def neighbour(values: Tensor, i: int) -> int:
        similar = {j: float(values[i] @ values[j] / values[i].norm() / values[j].norm()) for j in range(30) if j != i}
        return max(similar, key=lambda j: similar[j])

    kept = sum(neighbour(pruned, i) == neighbour(dense, i) for i in range(30)) / 30
    assert 0.2 < kept < 0.9
    assert found.neighbours == pytest.approx(kept, abs=1e-12)
    assert (found.share, found.of, found.top1) == (found.neighbours, "nearest-neighbour agreement", None)
    assert found.interval == wilson_interval(kept, 30)
    cosines = [float(p @ d / p.norm() / d.norm()) for p, d in zip(pruned, dense)]
    assert found.cosine == pytest.approx(sum(cosines) / 30, rel=1e-12)
    error = math.sqrt(float((pruned - dense).square().sum()) / float(dense.square().sum()))
    assert found.error == pytest.approx(error, rel=1e-12)
    assert found.distance == found.error


def test_relative_errors_of_levels_do_not_depend_on_scales() -> None:
    dense, pruned = torch.randn(7, 3 + 5).double(), torch.randn(7, 3 + 5).double()
    output = Output("features", ("a", "b"), sizes=(3, 5), scales=(1.0, 1.0))
    found = agreement(pruned, dense, None, output)
    for name, some in (("a", slice(0, 3)), ("b", slice(3, 8))):
        squares = [float((p - d).double().square().sum()) for p, d in zip(pruned[:, some], dense[:, some])]
        whole = sum(float(d.double().square().sum()) for d in dense[:, some])
        assert found.errors is not None
        assert found.errors[name] == pytest.approx(math.sqrt(sum(squares) / whole), rel=1e-9)
    assert found.error == pytest.approx(math.sqrt(sum(e**2 for e in found.errors.values()) / 2))
    scale = torch.tensor([10.0] * 3 + [0.1] * 5)
    again = agreement(pruned * scale, dense * scale, None, output)
    assert again.errors == pytest.approx(found.errors, rel=1e-5)
    assert (found.share, found.interval, found.neighbours) == (1 - found.error, None, None)


def test_dense_logits_agree_by_position_and_class() -> None:
    dense, pruned = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    pruned[:, 3] = dense[:, 3] = -9.0  # a class that nobody sees
    output = find_output(nn.Identity(), dense, 3, "dense")
    found = agreement(output(pruned), output(dense), None, output)
    pairs = [
        (int(pruned[i, :, y, x].argmax()), int(dense[i, :, y, x].argmax()))
        for i in range(3)
        for y in range(2)
        for x in range(5)
    ]
    assert found.top1 == pytest.approx(sum(p == d for p, d in pairs) / 30)
    ious = []
    for k in range(3):
        both = sum(p == d == k for p, d in pairs)
        ious.append(both / (sum(p == k for p, _ in pairs) + sum(d == k for _, d in pairs) - both))
    assert found.iou == pytest.approx(sum(ious) / 3)
    kl = 0.0
    for i in range(3):
        for y in range(2):
            for x in range(5):
                p, q = dense[i, :, y, x].double().softmax(0), pruned[i, :, y, x].double().softmax(0)
                kl += float((p * (p / q).log()).sum()) / 30
    assert found.kl == pytest.approx(kl, rel=1e-9)
    labelled = agreement(output(pruned), output(dense), torch.zeros(3, dtype=torch.long), output)
    assert labelled.accuracy is None, "a label of an image says nothing of positions"


def test_binary_logits_agree_by_sign() -> None:
    dense, pruned = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([[1.0], [1.0], [4.0], [-0.1]])
    output = find_output(nn.Identity(), dense, 4, "binary")
    found = agreement(output(pruned), output(dense), torch.tensor([1, 1, 0, 0]), output)
    assert (found.top1, found.accuracy, found.dense_accuracy) == (0.75, 0.75, 0.5)
    p, q = dense.double().sigmoid(), pruned.double().sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-9)


def test_the_drop_of_a_relative_error_has_bounds_of_its_square() -> None:
    dense = torch.randn(200, 6).double()
    pruned = dense + 0.3 * torch.randn(200, 6).double()
    output = Output("features", ("",), sizes=(6,))
    drop = measure_drop(pruned, dense, None, output, confidence=0.95)
    squares = (pruned - dense).double().square().sum(1) / dense.double().square().sum(1).mean()
    error = float(squares.std()) / math.sqrt(200)
    assert (drop.of, drop.lost) == ("relative error", pytest.approx(math.sqrt(float(squares.mean()))))
    assert drop.low == pytest.approx(math.sqrt(float(squares.mean()) - 1.95996 * error), rel=1e-4)
    assert drop.high == pytest.approx(math.sqrt(float(squares.mean()) + 1.95996 * error), rel=1e-4)
    assert drop.upper == pytest.approx(math.sqrt(float(squares.mean()) + 1.64485 * error), rel=1e-4)
    neighbours = measure_drop(pruned, dense, None, Output("embedding", ("",), sizes=(6,)))
    assert neighbours.of == "nearest-neighbour agreement"


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["embedding", "features", "dense", "binary"])
def test_predicted_changes_are_first_order(kind: str) -> None:
    """Small weights of one unit: what is predicted for its removal is what happens, in every number followed."""
    net, x = pyramid(kind).double(), images().double()
    with torch.no_grad():
        net.two[0].weight[:, 1] *= 1e-6
    groups, output = find_groups(net, x).groups, output_of(net, x)
    group = next(group for group in groups if "two.0" in {member.axis[0] for member in group.side("in")})
    cut = {group.name: torch.tensor([1])}
    found = predict_changes(net, [Batch(x)], groups, [cut], output, followed=3)
    (dense,) = compute_logits(net, [Batch(x)], output)
    with masked_units(net, groups, cut):
        (masked,) = compute_logits(net, [Batch(x)], output)
    real = masked - dense
    followed = dense.gather(1, found.classes)
    torch.testing.assert_close(found.top, followed)
    torch.testing.assert_close(found.zeroed[0], real.gather(1, found.classes), rtol=1e-3, atol=1e-14)
    if kind == "dense":  # those of one position, the largest first
        assert (found.classes % output.positions == found.classes[:, :1] % output.positions).all()
        assert len({int(row[0]) % output.positions for row in found.classes}) > 1
        assert (found.top[:, 0] >= found.top[:, 1]).all()
    measured = measure_damage(dense, masked, output)
    assert measured.tpv == pytest.approx(float(real.square().sum(1).mean()))
    assert math.isnan(measured.flips) == (kind in ("embedding", "features"))


def test_flips_of_dense_logits_are_a_share_of_positions() -> None:
    dense, pruned = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    output = find_output(nn.Identity(), dense, 4, "dense")
    flips = (dense.argmax(1) != pruned.argmax(1)).double().mean()
    assert measure_damage(output(dense), output(pruned), output).flips == pytest.approx(float(flips))


@pytest.mark.parametrize("kind", ["embedding", "features", "dense", "binary"])
def test_predict_knows_every_kind(kind: str) -> None:
    pytest.importorskip("pandas")
    table = jbrprune.predict(pyramid(kind, width=24), images(40), macs=[0.9, 0.6], calibrate=True, **QUIET)
    assert (table.predicted_tpv > 0).all()
    assert table.predicted_tpv.is_monotonic_increasing
    assert (table.masked_tpv > 0).all()
    assert table.measured_tpv_repaired.notna().sum() == 1
    assert table.masked_flips.notna().all() == (kind in ("dense", "binary"))


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FORMS))
def test_a_run_of_every_kind(kind: str, tmp_path: Any) -> None:
    net, x = pyramid(kind, width=24), images(60)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = jbrprune.prune(net, x, macs=0.6, steps=3, **QUIET)
    report = result.report
    assert report.kept <= 0.6
    assert report.settings["output"] == kind
    assert any("What counts of the model's output" in note for note in report.notes)
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    final = report.final
    assert final is not None
    assert final.distance > 0
    shown = {"logits": "top-1", "binary": "top-1", "dense": "mean IoU", "embedding": "neighbours", "features": "error"}
    assert shown[kind] in str(report)
    assert ("Relative error of every output" in str(report)) == (kind == "features")
    again = jbrprune.report.records.Report.from_dict(report.to_dict()) if hasattr(jbrprune, "report") else report
    assert again.final == final
    pytest.importorskip("matplotlib")
    assert "<svg" in report.to_html()
    result.save(tmp_path / "pruned", card=True)
    loaded = jbrprune.load(tmp_path / "pruned", model=pyramid(kind, width=24))
    output = output_of(net, x[:4])
    with torch.no_grad():
        assert output(loaded(x[:4])).equal(output(result.model(x[:4])))


@pytest.mark.parametrize("kind", ["embedding", "features", "dense", "binary"])
def test_max_drop_and_sparsify_know_every_kind(kind: str) -> None:
    net, x = pyramid(kind, width=24), images(100)
    result = jbrprune.prune(net, x, max_drop=0.25, macs=0.5, confidence=0.5, **QUIET)
    search = result.report.search
    assert search is not None
    assert search.drop.lost <= 0.25
    names = {"embedding": "nearest-neighbour agreement", "features": "relative error"}
    assert search.drop.of == names.get(kind, "agreement")
    assert search.drop.of in str(result.report).replace("\n", " ").replace("            ", "")
    sparse = jbrprune.sparsify(net, x, sparsity=0.5, **QUIET)
    assert sparse.report.final is not None
    assert sparse.report.final.distance > 0


class Regression(nn.Module):
    """A quantity y of an image; ``twice`` returns (y, -y), which is the same information."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(block(3, 24), block(24, 32), block(32, 32)), nn.Linear(32, 1)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x).mean((2, 3)))
        return torch.cat([y, -y], 1) if self.twice else y


def test_a_regression_is_repaired_by_its_error() -> None:
    """One output as well as two that say the same: the repairs are kept, and the error is what is reported."""
    x, errors = images(100), {}
    for twice in (False, True):
        net = Regression(twice).eval()
        result = jbrprune.prune(net, x, macs=0.4, steps=4, output="embedding", **QUIET)
        final = result.report.final
        assert any(step.repair != "none" for step in result.report.steps)
        fresh = images(200, seed=9)
        with torch.no_grad():
            dense, pruned = net(fresh), result.model(fresh)
        errors[twice] = float((pruned - dense).square().sum() / dense.square().sum())
        assert final is not None
        assert final.top1 is None
        assert final.kl is None
        assert 0 < final.error < 3 * math.sqrt(errors[twice]) + 0.05
    assert errors[False] < 3 * errors[True] + 1e-3


def test_what_is_not_looked_at_is_said_and_can_be_asked_for() -> None:
    net, x = pyramid("logits", width=24), images(40)
    net.form = lambda levels, embedding, maps, logits: {"logits": logits, "boxes": embedding}
    result = jbrprune.prune(net, x, macs=0.6, steps=1, **QUIET)
    assert any("not looked at: boxes" in note and "output=" in note for note in result.report.notes)
    both = jbrprune.prune(net, x, macs=0.6, steps=1, output="features", **QUIET).report.final
    assert both is not None
    assert set(both.errors or ()) == {"logits", "boxes"}
    mine = jbrprune.prune(net, x, macs=0.6, steps=1, output=lambda r: {"logits": r["logits"]}, **QUIET).report.final
    assert mine == result.report.final
    assert "boxes" in jbrprune.info(net, x[:2]).output


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: (image for image in x)], ids=["tensor", "iterator"])
def test_score_says_and_takes_what_counts(batch_size: int, form: Any) -> None:
    """Scales are those of all images, however many there are in a batch."""
    net, x = pyramid("features"), images(8) * torch.linspace(0.1, 4, 8)[:, None, None, None]
    scores = jbrprune.score(net, form(x), batch_size=batch_size, **QUIET)
    assert scores.settings.objective == "projection"
    output = output_of(net, x)
    expected = Relevance(output=output)(net, [Batch(x)], find_groups(net, x).groups)
    for name in scores.sums:
        torch.testing.assert_close(scores[name], expected[name])
    last = jbrprune.score(net, x, output=1, batch_size=8, **QUIET)
    assert not torch.equal(last[next(iter(last.sums))], scores[next(iter(scores.sums))])


def test_agreements_of_every_kind_survive_json() -> None:
    from jbrprune.report.records import plain, record

    for found in (
        Agreement(5, 1.0, 1.0, 0.0),
        Agreement(5, cosine=0.9, neighbours=0.4, error=0.1, errors={"": 0.1}),
        Agreement(5, error=0.1, errors={"0": 0.1, "1": 0.1}),
    ):
        assert record(Agreement, plain(found)) == found
