"""Variants of relevance by name: what a name stands for, in `prune` and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jbrprune import PruneResult, cli, prune, sparsify
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.data.batches import Batch
from jbrprune.errors import ArgumentError
from jbrprune.structure.discovery import find_groups

QUIET = {"progress": False}


def _images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Module:
    """Confident about most images."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 20, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 30), nn.ReLU(), nn.Linear(30, 5)),
    )
    with torch.no_grad():
        net[-1].weight.mul_(60)
    return net.eval()


def _kept(call: Callable[..., PruneResult], **how: object) -> dict[str, Tensor]:
    return call(_net(), _images(), repair=None, **QUIET, **how).model.state_dict()


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("jbr", {"objective": "pseudo_label"}),
        ("jbr_predicted_logit", {"objective": "predicted_logit"}),
        ("jbr_projection", {"objective": "projection"}),
        ("jbr_mean_replaced", {"statistic": "mean_replaced"}),
        ("jbr_batched", {"statistic": "batched", "batch": 128}),
        ("jbr_published", {"statistic": "batched", "site": "all", "threshold": 0.9}),
    ],
)
def test_a_name_is_the_sum_of_its_parts(name: str, same: dict) -> None:
    named, spelled = (_kept(prune, channels=0.6, steps=2, criterion=how) for how in (name, Relevance(**same)))
    assert named.keys() == spelled.keys()
    assert all(torch.equal(tensor, spelled[key]) for key, tensor in named.items())


def test_every_name_scores_something_of_its_own() -> None:
    model = _net()
    groups = find_groups(model, _images(2)).groups
    labels = torch.arange(24) % 5
    batches = [Batch(_images(6), labels[:6]), Batch(_images(18), labels[6:])]
    found = {name: torch.cat([*one(model, batches, groups).values().values()]) for name, one in PRESETS.items()}
    for name, scores in found.items():
        assert not any(torch.allclose(scores, other) for key, other in found.items() if key != name), name


def test_names_for_single_weights() -> None:
    by_name, spelled = (_kept(sparsify, sparsity=0.5, criterion=how) for how in ("jbr_margin", Relevance("margin")))
    assert all(torch.equal(tensor, spelled[key]) for key, tensor in by_name.items())


def test_names_that_are_none() -> None:
    with pytest.raises(ArgumentError, match="Unknown criterion 'jbr_publised'; did you mean 'jbr_published'"):
        _kept(prune, channels=0.6, criterion="jbr_publised")
    with pytest.raises(ArgumentError, match="known are jbr, "):
        _kept(prune, channels=0.6, criterion="taylor")
    with pytest.raises(ArgumentError, match="did you mean 'jbr_margin'"):
        _kept(sparsify, sparsity=0.6, criterion="jbr_margn")


def test_the_report_says_the_name() -> None:
    result = prune(_net(), _images(), channels=0.7, criterion="jbr_batched", steps=1, **QUIET)
    assert result.report.settings["criterion"] == "jbr_batched"


def test_the_command_line_takes_a_name(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 90, 255 - 20 * number)).save(tmp_path / f"{number}.png")
    net = ["test_vit", "--model-arg", "img_size=32", "--model-arg", "depth=2", "--random"]
    base = ["jbrprune", "prune", *net, "--data", str(tmp_path), "--macs", "0.8", "--steps", "1", "--json"]
    monkeypatch.setattr("sys.argv", [*base, "--criterion", "jbr_mean_replacd"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "did you mean 'jbr_mean_replaced'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*base, "--criterion", "jbr_mean_replaced"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["settings"]["criterion"] == "jbr_mean_replaced"


def test_published_is_not_ours() -> None:
    """The published form squares a mean, so opposite effects cancel in it and not in ours."""
    model, batches = _net(), [Batch(_images(12))]
    groups = find_groups(model, _images(2)).groups
    ours = PRESETS["jbr"](model, batches, groups)
    batched = Relevance(statistic="batched")(model, batches, groups)
    assert all(bool((batched[g.name] <= ours[g.name] * (1 + 1e-9)).all()) for g in groups)
