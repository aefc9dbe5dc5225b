"""The table of options: described, checked, and the same as the signatures made from it."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from jbrprune import prune, score, sparsify
from jbrprune.cli import PANELS
from jbrprune.criteria.relevance import Relevance
from jbrprune.errors import ArgumentError, BudgetError
from jbrprune.pruning import api
from jbrprune.pruning.options import ChannelOptions, ScoreOptions, WeightOptions

TABLES = (ScoreOptions, ChannelOptions, WeightOptions)


@pytest.mark.parametrize("table", TABLES)
def test_every_option_is_described(table: type) -> None:
    for option in dataclasses.fields(table):
        text = option.metadata["help"]
        assert text.endswith("."), option.name
        assert len(text) < 230, option.name
        assert option.metadata["panel"] in (*PANELS, None), option.name


@pytest.mark.parametrize(("call", "table"), [(prune, ChannelOptions), (sparsify, WeightOptions), (score, ScoreOptions)])
def test_signatures_are_those_of_the_table(call: Callable[..., Any], table: type) -> None:
    parameters = dict(inspect.signature(call).parameters)
    assert [parameters.pop(name).kind.name for name in ("model", "data")] == ["POSITIONAL_OR_KEYWORD"] * 2
    assert {parameter.kind.name for parameter in parameters.values()} == {"KEYWORD_ONLY"}
    options = {option.name: option for option in dataclasses.fields(table)}
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        name: option.default for name, option in options.items()
    }
    assert len(parameters) <= 22
    for name, option in options.items():
        assert f"        {name}: {option.metadata['help']}" in (call.__doc__ or "")


@pytest.mark.parametrize(("call", "table"), [(prune, ChannelOptions), (sparsify, WeightOptions), (score, ScoreOptions)])
def test_every_argument_becomes_its_option(
    call: Callable[..., Any], table: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def record(*values: object, **named: object) -> None:
        raise Seen(dict(zip([option.name for option in dataclasses.fields(table)], values, strict=True)) | named)

    monkeypatch.setattr(api, table.__name__, record)
    given = {option.name: f"the {option.name}" for option in dataclasses.fields(table)}
    with pytest.raises(Seen) as caught:
        call("model", "data", **given)
    assert caught.value.args[0] == given


def test_what_a_report_lists() -> None:
    shown = ChannelOptions(macs=0.5, criterion=Relevance("margin"), repair=None, seed=3).settings
    assert shown["criterion"] == "Relevance(objective='margin')"
    assert (shown["repair"], shown["seed"]) == ([], 3)
    assert (shown["floors.share"], shown["floors.channels"], shown["floors.width"]) == (0.0, 8, False)
    assert not {"macs", "floors", "eval_data", "progress"} & shown.keys()
    json.dumps(shown)


WRONG: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    (ChannelOptions, {}, BudgetError, "Give exactly one of macs=, params=.*or max_drop=; got none"),
    (ChannelOptions, {"macs": 0.5, "params": 0.5}, BudgetError, "got macs= and params="),
    *[
        (ChannelOptions, {"macs": value}, BudgetError, "macs must satisfy 0 < macs < 1, got")
        for value in (0, 1, -0.5, float("nan"), float("inf"), "half", True, [0.5], 1 + 2j)
    ],
    *[
        (ChannelOptions, {"latency_ms": value}, BudgetError, "latency_ms must satisfy 0 < latency_ms < inf, got")
        for value in (0.0, -1.0, float("nan"), float("inf"), True, "3")
    ],
    (ChannelOptions, {"max_drop": 1}, ArgumentError, "max_drop must satisfy 0 <= max_drop < 1, got 1"),
    (
        ChannelOptions,
        {"max_drop": 0.1, "latency": 0.5},
        BudgetError,
        "Beside max_drop=, macs=, .*; got latency=",
    ),
    (ChannelOptions, {"max_drop": 0.1, "macs": 0.5, "params": 0.5}, BudgetError, "got macs= and params="),
    (ChannelOptions, {"macs": 0.5, "confidence": 0.95}, ArgumentError, "confidence= has no meaning without max_drop="),
    (ChannelOptions, {"max_drop": 0.1, "confidence": 0.4}, ArgumentError, "0.5 <= confidence < 1, got 0.4"),
    (ChannelOptions, {"max_drop": 0}, ArgumentError, "max_drop=0 needs confidence=0.5"),
    (ChannelOptions, {"macs": 0.5, "scope": "net"}, ArgumentError, "scope must be one of global, raw, layer"),
    (ChannelOptions, {"max_drop": 0.1, "steps": 3}, ArgumentError, "steps= has no meaning"),
    (ChannelOptions, {"latency": 0.5, "steps": 3}, ArgumentError, "steps= has no meaning"),
    (ChannelOptions, {"max_drop": 0.1, "resume": "there"}, ArgumentError, "resume= cannot follow"),
    (ChannelOptions, {"macs": 0.5, "steps": 0}, ArgumentError, "steps must be a whole number of at least 1, got 0"),
    (ChannelOptions, {"macs": 0.5, "steps": 2.0}, ArgumentError, "steps must be a whole number of at least 1, got 2.0"),
    (ChannelOptions, {"macs": 0.5, "images": 0}, ArgumentError, "images must be a whole number of at least 1, got 0"),
    (
        ChannelOptions,
        {"macs": 0.5, "batch_size": None},
        ArgumentError,
        "batch_size must be a whole number of at least 1, got None",
    ),
    (ChannelOptions, {"macs": 0.5, "seed": "a"}, ArgumentError, "seed must be a whole number, got 'a'"),
    (ChannelOptions, {"macs": 0.5, "repair": "batchnorm"}, ArgumentError, "repair must be 'auto', None, or some of"),
    (ChannelOptions, {"macs": 0.5, "repair": ["auto", "batch_norm"]}, ArgumentError, "repair must be 'auto', None"),
    (ChannelOptions, {"macs": 0.5, "repair": True}, ArgumentError, "repair must be 'auto', None.*got True"),
    (ChannelOptions, {"macs": 0.5, "floors": None}, ArgumentError, r"floors must be Floors\(share=.*got None"),
    (WeightOptions, {"pattern": (2, 4)}, ArgumentError, r"such as '2:4', got \(2, 4\)"),
    (WeightOptions, {}, BudgetError, "either sparsity= or pattern=, got neither"),
    (WeightOptions, {"sparsity": 0.5, "pattern": "2:4"}, BudgetError, "got both"),
    (WeightOptions, {"sparsity": 1.5}, BudgetError, "0 < sparsity < 1, got 1.5"),
    (WeightOptions, {"pattern": "4:2"}, ArgumentError, "with 0 < N < M such as '2:4', got '4:2'"),
    (WeightOptions, {"sparsity": 0.5, "scope": "net"}, ArgumentError, "scope must be one of global, layer, got 'net'"),
    (WeightOptions, {"pattern": "2:4", "scope": "layer"}, ArgumentError, "scope= has no meaning for pattern="),
    (WeightOptions, {"pattern": "2:4", "floor": 0.1}, ArgumentError, "floor= has no meaning for pattern="),
    (WeightOptions, {"pattern": "2:4", "shrink": True}, ArgumentError, "end the 2:4 pattern"),
    (WeightOptions, {"sparsity": 0.5, "floor": 1.0}, ArgumentError, "0 <= floor < 1, got 1.0"),
    (ChannelOptions, {"macs": 0.5, "criterion": "jbr_publised"}, ArgumentError, "did you mean 'jbr_published'"),
    (
        ChannelOptions,
        {"macs": 0.5, "criterion": 3},
        ArgumentError,
        "must be the name of a preset, a function",
    ),
    (ChannelOptions, {"macs": 0.5, "criterion": Relevance(statistic="signed")}, ArgumentError, "not defined for units"),
    (ScoreOptions, {"criterion": len}, ArgumentError, "must be a preset or a Relevance, got len"),
    (ScoreOptions, {"granularity": "row"}, ArgumentError, "granularity must be one of unit, weight, got 'row'"),
    (ScoreOptions, {"parameters": "biases"}, ArgumentError, "parameters must be one of weights, all, got 'biases'"),
]


@pytest.mark.parametrize(("table", "options", "error", "message"), WRONG, ids=str)
def test_what_has_no_meaning_is_refused(
    table: type, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        table(**options)
