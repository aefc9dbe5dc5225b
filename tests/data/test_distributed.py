"""Several ranks give the numbers of one process, whatever the shares; a rank that fails or dies ends the others."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import layer_groups
from test_resume import QUICK, own
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from jbrprune import Scores, prune, score, sparsify, sweep
from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint.resume import hash_tensors
from jbrprune.cli import measure_agreement
from jbrprune.criteria.relevance import Relevance
from jbrprune.criteria.weight_relevance import weight_scores
from jbrprune.data import distributed
from jbrprune.data.batches import Batch, iterate
from jbrprune.errors import ArgumentError, CheckpointError, DataError, NonFiniteError, RankError
from jbrprune.evaluation.agreement import Agreement, agreement, compute_logits
from jbrprune.prediction import max_drop as search
from jbrprune.repair import least_squares, repair
from jbrprune.repair.repair import record_targets, repair_model

IMAGES = cases.images(23, 16)


class Pairs(Dataset):
    """Images with labels, one by one."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.images[position], position % 4


def batches(images: Tensor) -> Iterator[Batch]:
    return iterate(images, batch_size=3)


DATA: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda images: images,
    "data set": Pairs,
    "loader": lambda images: DataLoader(Pairs(images), batch_size=5),
    "loader with a process": lambda images: DataLoader(Pairs(images), batch_size=5, num_workers=1),
    "list": lambda images: list(batches(images)),
    "stream": batches,
    "uneven batches": lambda images: list(images.split([1, 7, 2, 9, 4])),
}


def model() -> nn.Module:
    return own().double()


def units(data: object, **options: Any) -> dict[str, Any]:
    net = model()
    groups = [group for group in layer_groups(net) if options.get("site") == "all" or group.side("in")]
    found = Relevance(**options)(net, data, groups, batch_size=4)
    return {"samples": found.samples, "skipped": found.skipped, **found.values()}


def weights(data: object, **options: Any) -> dict[str, Any]:
    parameters = options.pop("parameters", "weights")
    relevance = Relevance(**{"objective": "projection"} | options)
    found = weight_scores(model(), data, relevance, parameters=parameters, batch_size=4)
    return {"samples": found.samples, "skipped": found.skipped, **found.values()}


def assert_as_one(work: Callable[[], dict[str, Any]], size: int, rtol: float = 1e-10, atol: float = 1e-14) -> None:
    one = work()
    for found in on_ranks(size, work):
        assert isinstance(found, dict), found
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_is_dealt_out(kind: str) -> None:
    """Random signs: every sample must keep its own, whoever works on it."""
    make = DATA[kind]
    assert_as_one(lambda: units(make(IMAGES), objective="projection", seed=3), 2)


@pytest.mark.parametrize("images", [1, 4, 9])
def test_uneven_shares_and_empty_ranks(images: int) -> None:
    """One image, or one batch, of three ranks: two have nothing to do."""

    def both() -> dict[str, Any]:
        part = IMAGES[:images]
        found = units(part, objective="projection") | units(list(iterate(part, batch_size=4)), objective="margin")
        return {f"{name}'": value for name, value in weights(part).items()} | found

    assert_as_one(both, 3)


CHOICES: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "all": (units, {"site": "all"}),
    "batched": (units, {"statistic": "batched", "batch": 6}),
    "batched, not of whole batches": (units, {"statistic": "batched", "batch": 5, "objective": "projection"}),
    "mean replaced": (units, {"statistic": "mean_replaced"}),
    "threshold": (units, {"threshold": 0.345}),
    "weights": (weights, {"parameters": "all"}),
    "weights, batched": (weights, {"statistic": "batched", "batch": 6}),
    "weights, signed": (weights, {"statistic": "signed", "objective": "margin"}),
    "weights, threshold": (weights, {"threshold": 0.345, "objective": "pseudo_label"}),
}


def test_every_statistic_of_units_and_weights() -> None:
    def every() -> dict[str, Any]:
        return {f"{case}: {name}": v for case, (f, o) in CHOICES.items() for name, v in f(IMAGES, **o).items()}

    assert_as_one(every, 2)
    assert 0 < every()["threshold: skipped"] < len(IMAGES)


def test_float32_scores_agree_to_a_millionth() -> None:
    """The whole call, units found by every rank for itself."""

    def both() -> list[dict[str, Tensor]]:
        return [
            score(own(), IMAGES.float(), granularity=granularity, batch_size=4, progress=False).values()
            for granularity in ("unit", "weight")
        ]

    one = both()
    for found in on_ranks(2, both):
        for values, expected in zip(found, one, strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-6 * float(value.max()))


def test_predictions_are_those_of_one_process() -> None:
    parts = list(iterate(IMAGES, batch_size=4))
    one = compute_logits(model(), parts)
    for found in on_ranks(3, lambda: compute_logits(model(), iter(parts))):
        assert all(torch.equal(a, b) for a, b in zip(found, one, strict=True))


class Counted(Pairs):
    """Remembers how many images were read."""

    read = 0

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        self.read += 1
        return super().__getitem__(position)


@pytest.mark.parametrize("images", [None, 1, 9])
def test_evaluation_reads_a_share_and_measures_the_whole(images: int | None) -> None:
    def work() -> tuple[Agreement, int]:
        data, other = Counted(IMAGES), model()
        with torch.no_grad():
            other.get_parameter("a.weight")[:, ::2] = 0
        return measure_agreement([model(), other], data, images, 4)[0], data.read

    one, read = work()
    dense = compute_logits(model(), [Batch(IMAGES[:images])])[0]
    thin = model()
    with torch.no_grad():
        thin.get_parameter("a.weight")[:, ::2] = 0
    labels = torch.arange(len(IMAGES))[:images] % 4
    whole = agreement(compute_logits(thin, [Batch(IMAGES[:images])])[0], dense, labels)
    ranks = on_ranks(2, work)
    for found in (one, *(found for found, _ in ranks)):
        assert vars(found) | {"kl": 0} == vars(whole) | {"kl": 0}
        assert found.kl == pytest.approx(whole.kl, rel=1e-10)
    if images is None:
        assert (read, *(count for _, count in ranks)) == (23, 12, 11)


def with_repair(images: int) -> dict[str, Tensor]:
    """A thinned net after its repair on so many images, and its divergence."""
    parts = [Batch(IMAGES[:images])]
    dense, thin = model(), model()
    with torch.no_grad():
        thin.get_parameter("a.weight")[:, ::2] = 0
    masks = {"a.weight": thin.get_parameter("a.weight") != 0}
    gate = [Batch(IMAGES, reference=compute_logits(dense, [Batch(IMAGES)])[0])]
    targets = record_targets(dense, parts, ["a", "b"])
    with pytest.MonkeyPatch.context() as patch:  # to the solution: where it stops early, rounding shows
        patch.setattr(least_squares, "CONVERGED", 1e-14)
        patch.setattr(least_squares, "ITERATIONS", 2000)
        outcome = repair_model(thin, targets, gate, {}, ("batch_norm", "least_squares"), masks=masks)
    assert images == 1 or outcome.kept == "batch_norm+least_squares"
    return {**thin.state_dict(), "kl": torch.tensor(outcome.after.kl)}


@pytest.mark.parametrize("images", [1, 21])
def test_repair_sees_the_images_of_all_ranks(images: int) -> None:
    """Against one process: batch norms follow the same change, least squares solve the same problem.

    One image is seen by both ranks, which have no rows to tell each other.
    """
    assert_as_one(lambda: with_repair(images), 2, 1e-10, 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"macs": 0.7, "steps": 2, "floors": Floors(channels=2)},
        {"macs": 0.7, "steps": 2, "floors": Floors(channels=2), "criterion": "jbr_projection"},
        {"sparsity": 0.8, "steps": 2},
    ],
)
def test_pruning_decides_as_one_process_and_alike_on_all_ranks(options: dict[str, Any]) -> None:
    images = cases.images(40, 16).float()

    def work() -> tuple[str, dict[str, Tensor], Any]:
        call = sparsify if "sparsity" in options else prune
        result = call(own(), images, batch_size=4, **options, **QUICK)
        return hash_tensors(result.model.state_dict()), result.model.state_dict(), result.report.repaired

    _, expected, agreement = work()
    ranks = on_ranks(2, work)
    assert ranks[0][0] == ranks[1][0]  # bit by bit
    for name, value in expected.items():
        torch.testing.assert_close(ranks[0][1][name], value, rtol=1e-3, atol=1e-4)
    assert ranks[0][2].top1 == agreement.top1
    assert ranks[0][2].kl == pytest.approx(agreement.kl, rel=1e-3, abs=1e-6)


def test_ranks_that_predict_otherwise_go_the_same_way() -> None:
    """On another processor a prediction has other bits, and may propose another step."""
    images = cases.images(60, 16).float()
    data = TensorDataset(images, torch.arange(60) % 4)

    def work() -> tuple[list[float], str]:
        if distributed.rank() == 1:
            search.Outlook.propose = lambda *_: math.inf  # type: ignore[method-assign]
        result = prune(own(), data, max_drop=0.1, confidence=0.5, macs=0.7, batch_size=4, **QUICK)
        assert result.report.search is not None
        return [trial.share for trial in result.report.search.trials], hash_tensors(result.model.state_dict())

    alone = work()
    first, second = on_ranks(2, work)
    assert first == second
    assert first[0] == alone[0]


def test_a_loader_that_shuffles_shows_all_ranks_the_same(tmp_path: Path) -> None:
    """Every rank has another random state; each image counts once all the same, and the journal is of one run."""
    images = cases.images(40, 16).float()

    def work() -> tuple[int, list[str], Tensor]:
        net = own()  # which seeds
        torch.manual_seed(distributed.rank())
        loader = DataLoader(TensorDataset(images), batch_size=4, shuffle=True)
        states = distributed.gather(hash_tensors({"state": torch.get_rng_state()}))
        assert len(set(states)) == len(states)
        read = cases.calibration(net, loader)
        orders = distributed.gather([hash_tensors({"images": batch.images}) for batch in read.score])
        assert all(order == orders[0] for order in orders)
        found = score(net, loader, progress=False)
        assert isinstance(found, Scores)
        results = sweep(net, loader, [0.9, 0.8], floors=Floors(channels=2), steps=1, **QUICK, resume=tmp_path)
        return (
            found.samples,
            [hash_tensors(result.model.state_dict()) for result in results],
            found[next(iter(found.sums))],
        )

    (samples, models, scores), (other_samples, other_models, _) = on_ranks(2, work)
    assert samples == other_samples == 40
    assert models == other_models
    expected = next(iter(score(own(), images, progress=False).values().values()))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["model-0001.safetensors", "model-0002.safetensors"]


def test_sums_and_repairs_have_the_same_bits_on_all_ranks() -> None:
    """Also where a backend adds in another order on each, or a processor solves to other bits."""

    def work() -> tuple[Tensor, str]:
        if distributed.rank() == 1:
            reduced, measure = dist.all_reduce, repair.measure_moments

            def other_bits(total: Tensor) -> None:
                reduced(total)
                if total.is_floating_point():
                    total.mul_(1 + 1e-6)

            dist.all_reduce = other_bits  # type: ignore[assignment]
            repair.measure_moments = lambda x: replace(measure(x), a=measure(x).a * (1 + 1e-4))
        total = distributed.all_sum({"a": torch.rand(50)})["a"]
        return total, hash_tensors(with_repair(21))

    (total, model), (other_total, other_model) = on_ranks(2, work)
    assert torch.equal(total, other_total)
    assert model == other_model


def test_one_rank_writes_and_all_must_see_it(tmp_path: Path) -> None:
    """A directory for each rank, as on machines that share no file system."""
    images = cases.images(40, 16).float()

    def work() -> object:
        directory = tmp_path / str(distributed.rank())
        return prune(own(), images, macs=0.7, steps=2, **QUICK, resume=directory).report.kept

    first, second = on_ranks(2, work)
    assert first == second <= 0.7
    assert len(list((tmp_path / "0").iterdir())) == 3
    assert list((tmp_path / "1").iterdir()) == []
    _, second = on_ranks(2, work)
    assert isinstance(second, CheckpointError)
    assert "holds 0 steps for rank 1, and another number for rank 0" in str(second)


# --- what is refused, and who ends ----------------------------------------------------------------


def test_data_that_differ_by_rank_are_noticed() -> None:
    def work() -> object:
        return units(iter([Batch(IMAGES[distributed.rank() :][:8]), Batch(IMAGES[:4])]))

    for error in on_ranks(2, work):
        assert isinstance(error, RankError)
        assert "read different images" in str(error)


def test_data_that_are_sharded_already_are_refused() -> None:
    def work() -> object:
        data = TensorDataset(IMAGES)
        return units(DataLoader(data, sampler=DistributedSampler(data), batch_size=4))

    for error in on_ranks(2, work):
        assert isinstance(error, ArgumentError)
        assert "DistributedSampler, which repeats samples" in str(error)


def test_batched_with_confidence_is_refused() -> None:
    for error in on_ranks(2, lambda: units(IMAGES, statistic="batched", threshold=0.5)):
        assert isinstance(error, ArgumentError)
        assert "no rank knows of the others" in str(error)


def test_an_error_on_one_rank_is_an_error_on_all() -> None:
    """The bad image lies in the share of rank 1."""
    images = IMAGES.clone()
    images[5] = torch.nan
    first, second = on_ranks(2, lambda: units(images))
    assert isinstance(first, NonFiniteError)
    assert str(first).startswith("On rank 1: Batch 0: image 1 contains NaN")
    assert isinstance(second, NonFiniteError)
    assert str(second).startswith("Batch 0: image 1 contains NaN")


def test_no_data_at_all() -> None:
    for error in on_ranks(2, lambda: units(iter([]))):
        assert isinstance(error, DataError)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_rank_that_dies_ends_the_others_with_words_and_soon(how: str) -> None:
    """Rank 1 dies after its part of the work began; the others wait for its sums, and not for the timeout."""

    def data() -> Iterator[Tensor]:
        for number, part in enumerate(IMAGES.split(4)):
            if number == 3 and distributed.rank() == 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(3)
            yield part

    began = time.monotonic()
    first, second, third = on_ranks(3, lambda: units(data()), timeout=600)
    assert second is None
    for error in (first, third):
        assert isinstance(error, RankError)
        assert "lost the others" in str(error)
    assert time.monotonic() - began < 60


def test_a_rank_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    def work() -> object:
        if distributed.rank() == 1:
            time.sleep(8)
        return units(IMAGES)

    first, _ = on_ranks(2, work, timeout=2)
    assert isinstance(first, RankError)
    assert "did not answer in time" in str(first)


def test_outside_of_joined_there_is_one_rank() -> None:
    assert (distributed.rank(), distributed.size()) == (0, 1)
    with pytest.raises(RankError, match="RANK is not set: start the program with torchrun"), distributed.joined():
        pass
    assert not distributed.launched()
    tensors = {"a": torch.ones(2)}
    assert distributed.all_sum(tensors)["a"] is tensors["a"]


def test_a_program_that_shares_its_gradients_may_call_on_one_rank_only() -> None:
    """A group that somebody else has initialised is left alone outside of `joined`."""

    def work() -> object:
        with distributed.alone():
            return units(IMAGES) if os.environ["RANK"] == "0" else None

    one = units(IMAGES)
    first, second = on_ranks(2, work)
    assert second is None
    assert all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(value)) for name, value in one.items())
