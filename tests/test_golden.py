"""The code computes what it computed when `golden_values/` was written; see `golden`."""

from __future__ import annotations

import golden
import pytest
import torch

CASES = [pytest.param(*case, marks=[] if quick else [pytest.mark.slow]) for case, quick in golden.CASES.items()]


@pytest.fixture(scope="module")
def kept() -> tuple[dict, dict]:
    return golden.read()


@pytest.mark.parametrize("part, net, seed", CASES)
def test_values_are_golden(kept: tuple[dict, dict], part: str, net: str, seed: int) -> None:
    assert not golden.compare(f"{net}/{seed}/{part}", golden.PARTS[part](net, seed), kept)


def test_a_change_is_seen(kept: tuple[dict, dict]) -> None:
    """One score that is off by 1e-9, scores in another order, logits that are off by 1e-5, another unit."""
    tensors, facts = golden.part_of("residual/0/scores", kept)
    assert not golden.compare("residual/0/scores", (tensors, facts), kept)
    for key in ("pseudo_label/consumer/second_moment/digest", "projection/all/batched/digest"):
        for entry in range(tensors[key].numel()):
            changed = tensors[key].clone()
            changed.view(-1)[entry] *= 1 + 1e-9
            assert golden.compare("residual/0/scores", (tensors | {key: changed}, facts), kept), (key, entry)
    changed = tensors["margin/all/second_moment/scores"].clone()
    changed[changed.argmax()] *= 1 + 1e-9
    assert golden.compare("residual/0/scores", (tensors | {"margin/all/second_moment/scores": changed}, facts), kept)

    scores = {"a": torch.rand(512, dtype=torch.float64), "b": torch.rand(8, dtype=torch.float64)}
    good, sizes = golden.digest(scores), [512, 8]
    one = int(scores["a"].argmax())
    for other in (scores["a"].index_put((torch.tensor(one),), scores["a"][one] * (1 + 1e-9)), scores["a"].flip(0)):
        assert golden.relative_error(golden.digest(scores | {"a": other}), good, sizes) > 1e-12

    tensors, facts = golden.part_of("residual/0/channels", kept)
    off = tensors | {"run/logits": tensors["run/logits"] * (1 + 1e-5)}
    assert golden.compare("residual/0/channels", (off, facts), kept)
    run = facts["run"]
    name, number = next(iter(run["removed"].items()))
    other = {**run, "removed": {**run["removed"], name: f"{int(number, 16) ^ 1:x}"}}
    assert golden.compare("residual/0/channels", (tensors, {**facts, "run": other}), kept)
