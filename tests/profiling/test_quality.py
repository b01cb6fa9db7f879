"""Runs over seeds, continued runs, and the references: fakes and made data, then a rule that real models learn."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_interactions import HISTORIES, make_interactions, random_interactions

from stamp_kernels.profiling.commands import quality as quality_module
from stamp_kernels.profiling.commands import trainee as trainee_module
from stamp_kernels.profiling.commands.quality import finished_results, measure_quality
from stamp_kernels.profiling.commands.references import reference_metrics
from stamp_kernels.profiling.commands.report import SeedResult, write_json
from stamp_kernels.profiling.commands.settings import QualitySettings
from stamp_kernels.profiling.commands.training_data import TrainingData, prepare_data
from stamp_kernels.profiling.recommender.recommender import RecommenderSettings

CODES_PER_ITEM, CODEBOOK_SIZE = 3, 4
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


def make_settings(**changes: object) -> QualitySettings:
    values = {
        "configurations": ("padded-eager", "packed"),
        "seeds": 3,
        "epochs": 2,
        "batch_size": 8,
        "dtype": "float32",
        "device": torch.device("cpu"),
        "max_items": 5,
        "model": RecommenderSettings(num_layers=2, d_model=16, num_heads=2, d_kv=8, d_ff=32),
    }
    return QualitySettings(**(values | changes))


def make_data(interactions, settings: QualitySettings, semantic_ids: np.ndarray | None = None) -> TrainingData:
    if semantic_ids is None:
        semantic_ids = np.stack(
            np.unravel_index(np.arange(interactions.num_items), (CODEBOOK_SIZE,) * CODES_PER_ITEM), axis=1
        )
    object.__setattr__(interactions, "semantic_ids", semantic_ids)
    return prepare_data(interactions, settings)


class FakeRecommender(torch.nn.Module):
    """Learns how often each first code is the next one. Keeps the labels and the random seed of every step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.logits = torch.nn.Parameter(torch.randn(1 + CODES_PER_ITEM * 256))
        self.initial = self.logits.detach().clone()
        self.labels: list[torch.Tensor] = []
        self.random_seeds: list[int] = []

    def forward(self, batch) -> SimpleNamespace:
        self.labels.append(batch.labels)
        self.random_seeds.append(torch.initial_seed())
        loss = -self.logits.log_softmax(-1)[batch.labels[:, 0]].mean()
        return SimpleNamespace(loss=loss, next_item_loss=loss, tokens_per_block=[1])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecommender]:
    """The recommenders built in this test, which are fakes; their metrics are functions of their weights."""
    recommenders = []

    def build(name: str, settings, *, seed: int) -> FakeRecommender:
        torch.manual_seed(seed)
        recommenders.append(FakeRecommender(name))
        return recommenders[-1]

    def evaluate(recommender: FakeRecommender, *_: object, **__: object) -> dict[str, float]:
        return {metric: float(recommender.logits[i].detach().sigmoid()) for i, metric in enumerate(METRICS)}

    monkeypatch.setattr(trainee_module, "build_recommender", build)
    monkeypatch.setattr(trainee_module, "evaluate", evaluate)
    return recommenders


def runs_of(report: dict) -> list[tuple[str, int]]:
    return [(c["name"], seed["seed"]) for c in report["configurations"] for seed in c["seeds"]]


def without_times(report: dict) -> dict:
    """A report without the values that depend on when it was made."""
    report = json.loads(json.dumps(report))
    del report["date"]
    for configuration in report["configurations"]:
        for values in (*configuration["seeds"], configuration["summary"]):
            values.pop("training_s", None)
            values.pop("evaluation_s", None)
    return report


# ---- references ----------------------------------------------------------------------------------------------------


def expected_metrics(rank_of_users: list[float]) -> dict[str, float]:
    hits = {k: [rank for rank in rank_of_users if rank < k] for k in (5, 10)}
    recall = {f"recall@{k}": len(hits[k]) / len(rank_of_users) for k in hits}
    return recall | {f"ndcg@{k}": sum(1 / math.log2(r + 2) for r in hits[k]) / len(rank_of_users) for k in hits}


@given(st.lists(st.lists(st.integers(0, 14), min_size=3, max_size=12), min_size=2, max_size=8), st.integers(1, 4))
def test_popularity_equals_the_loop(histories: list[list[int]], shared: int) -> None:
    histories = [*histories, list(range(15))]
    ids = [(item // shared, 0, 0) for item in range(15)]  # each ID has `shared` items
    settings = make_settings(batch_size=1)
    references = reference_metrics(make_data(make_interactions(histories), settings, np.array(ids)))

    counts = Counter(ids[item] for history in histories for item in history[:-2])
    ranking = sorted(set(ids), key=lambda code: (-counts[code], code))
    plain, unseen = [], []
    for history in histories:
        had = {ids[item] for item in history[:-1]}
        target = ids[history[-1]]
        left = [code for code in ranking if code not in had]
        plain.append(ranking.index(target))
        unseen.append(left.index(target) if target in left else math.inf)
    assert references["popularity"] == pytest.approx(expected_metrics(plain))
    assert references["popularity, unseen"] == pytest.approx(expected_metrics(unseen))
    assert list(references) == ["chance", "popularity", "popularity, unseen"]


def test_references_by_hand() -> None:
    # In the training part item 0 occurs three times, 1 twice, 2 to 19 once. The targets are 1, which the user did not
    # have before, and 0, which the user had.
    histories = [[0, 0, *range(2, 20), 19, 1], [0, 1, 1, 5, 0]]
    references = reference_metrics(make_data(make_interactions(histories), make_settings()))
    discount = 1 / math.log2(3)
    assert references["popularity"] == pytest.approx(dict(zip(METRICS, (1, 1, *2 * [(1 + discount) / 2]), strict=True)))
    assert references["popularity, unseen"] == pytest.approx(dict(zip(METRICS, 4 * [0.5], strict=True)))
    assert references["chance"]["recall@5"] == pytest.approx(5 / 20)
    assert references["chance"]["ndcg@10"] == pytest.approx(sum(1 / math.log2(2 + i) for i in range(10)) / 20)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_every_configuration_runs_from_every_seed(built: list[FakeRecommender]) -> None:
    settings = make_settings()
    data = make_data(random_interactions(0, users=20), settings)
    reports = []
    report = measure_quality(data, settings, command="stamp-profile quality", on_report=reports.append)

    order = [(name, seed) for seed in range(3) for name in ("padded-eager", "packed")]  # all of a seed, then the next
    assert [recommender.name for recommender in built] == [name for name, _ in order]
    assert [len(runs_of(report)) for report in reports] == [1, 2, 3, 4, 5, 6]
    assert set(runs_of(reports[2])) == set(order[:3])
    assert runs_of(report) == sorted(order, key=lambda run: (run[0] != "padded-eager", run[1]))
    assert without_times(reports[-1]) == without_times(report)

    steps = 2 * (len(data.training_set) // 8)
    for first, second in zip(built[::2], built[1::2], strict=True):  # one seed: same weights, batches, random numbers
        assert torch.equal(first.initial, second.initial) and first.random_seeds == second.random_seeds
        assert all(torch.equal(a, b) for a, b in zip(first.labels, second.labels, strict=True))
        assert len(first.labels) == steps
    for first, second in zip(built[::2], built[2::2], strict=False):  # one seed and the next
        assert not torch.equal(first.initial, second.initial)
        assert not all(torch.equal(a, b) for a, b in zip(first.labels, second.labels, strict=True))
    assert len({seed for recommender in built for seed in recommender.random_seeds}) == 3 * steps
    first_epoch, second_epoch = (
        torch.cat(built[0].labels[half]) for half in (slice(steps // 2), slice(steps // 2, None))
    )
    assert not torch.equal(first_epoch, second_epoch)

    for configuration, recommenders in zip(report["configurations"], (built[::2], built[1::2]), strict=True):
        for seed, recommender in zip(configuration["seeds"], recommenders, strict=True):
            assert seed["metrics"]["ndcg@5"] == pytest.approx(float(recommender.logits[2].detach().sigmoid()))
            assert len(seed["epoch_losses"]) == 2 and seed["epoch_losses"][1] < seed["epoch_losses"][0]
            assert seed["training_s"] > 0 and seed["evaluation_s"] > 0
        values = [seed["metrics"]["recall@10"] for seed in configuration["seeds"]]
        assert configuration["summary"]["recall@10"]["mean"] == pytest.approx(sum(values) / 3)
    assert report["command"] == "stamp-profile quality"
    assert report["settings"] | {"seeds": 3, "epochs": 2, "rows": None} == report["settings"]
    assert (
        report["settings"]["model"]["codes_per_item"] == CODES_PER_ITEM and report["settings"]["model"]["d_model"] == 16
    )
    assert [reference["name"] for reference in report["references"]] == ["chance", "popularity", "popularity, unseen"]


def test_losses_of_an_epoch_are_its_mean(built: list[FakeRecommender], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(configurations=("packed",), seeds=1)
    data = make_data(random_interactions(0, users=20), settings)
    losses = []
    forward = FakeRecommender.forward

    def remembered(self: FakeRecommender, batch) -> SimpleNamespace:
        output = forward(self, batch)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(FakeRecommender, "forward", remembered)
    report = measure_quality(data, settings)
    half = len(losses) // 2
    expected = [np.mean(losses[:half]), np.mean(losses[half:])]
    assert report["configurations"][0]["seeds"][0]["epoch_losses"] == pytest.approx(expected)
    assert report["configurations"][0]["summary"]["loss"] == {
        "mean": pytest.approx(expected[1]),
        "std": None,
        "min": pytest.approx(expected[1]),
        "max": pytest.approx(expected[1]),
    }


def test_the_learning_rate_is_used(built: list[FakeRecommender]) -> None:
    settings = make_settings(learning_rate=0.0123, configurations=("packed",), seeds=1, epochs=1, batch_size=100)
    data = make_data(random_interactions(0, users=20), settings)
    assert len(data.training_set) // 100 == 1
    measure_quality(data, settings)
    # Adam's first step is the learning rate long in each direction that has a gradient.
    change = (built[0].logits - built[0].initial).abs()
    assert change.max().item() == pytest.approx(0.0123, rel=1e-2)


def test_all_train_on_one_sample_of_rows(built: list[FakeRecommender]) -> None:
    histories = [list(range(63))]  # each row has another target
    settings = make_settings(rows=16, epochs=1, seeds=2)
    data = make_data(make_interactions(histories), settings)
    measure_quality(data, settings)
    assert len(data.training_set) == 16
    samples = [sorted(map(tuple, torch.cat(recommender.labels).tolist())) for recommender in built]
    assert len(set(samples[0])) == 16
    assert samples == [samples[0]] * 4


def test_progress_counts_all_seeds(built: list[FakeRecommender]) -> None:
    settings = make_settings(seeds=2, configurations=("packed",))
    data = make_data(random_interactions(0, users=20), settings)
    steps = 2 * (len(data.training_set) // 8)
    calls = []
    measure_quality(data, settings, on_progress=lambda *call: calls.append(call))
    training = [done for stage, done, total in calls if stage == "training packed" and total == 2 * steps]
    assert sorted(set(training)) == list(range(1, 2 * steps + 1)) and training == sorted(training)
    assert calls[-1] == ("evaluating packed", 2, 2)
    calls.clear()
    results = {"packed": {0: SeedResult(0, dict.fromkeys(METRICS, 0.5), [1.0], 1.0, 1.0)}}
    measure_quality(data, settings, finished=results, on_progress=lambda *call: calls.append(call))
    assert calls[0] == ("training packed", steps, 2 * steps)  # finished seeds count as done


# ---- continued runs ------------------------------------------------------------------------------------------------


class OutOfPower(Exception):
    pass


def stop_after(runs: int, path: Path) -> Callable[[dict], None]:
    """A callback that writes reports, and ends the run when they have this many results."""

    def on_report(report: dict) -> None:
        write_json(report, path)
        if len(runs_of(report)) == runs:
            raise OutOfPower

    return on_report


@pytest.fixture
def stopped(tmp_path: Path, built: list[FakeRecommender]) -> tuple[Path, TrainingData]:
    """A run of two configurations and three seeds that ended after three of the six, and its data."""
    settings = make_settings()
    data = make_data(random_interactions(0, users=20), settings)
    path = tmp_path / "quality.json"
    with pytest.raises(OutOfPower):
        measure_quality(data, settings, on_report=stop_after(3, path))
    built.clear()
    return path, data


def test_a_continued_run_equals_one_run(stopped: tuple[Path, TrainingData], built: list[FakeRecommender]) -> None:
    path, data = stopped
    settings = make_settings()
    left = json.loads(path.read_text())
    finished = finished_results(path, data, settings)
    assert {name: sorted(by_seed) for name, by_seed in finished.items()} == {"padded-eager": [0, 1], "packed": [0]}
    report = measure_quality(data, settings, finished=finished, on_report=lambda report: write_json(report, path))
    assert [recommender.name for recommender in built] == ["packed", "padded-eager", "packed"]
    # Finished results stay the same to the last bit, including their seconds.
    for before, after in zip(left["configurations"], report["configurations"], strict=True):
        assert after["seeds"][: len(before["seeds"])] == before["seeds"]
    assert without_times(report) == without_times(measure_quality(data, settings))
    assert json.loads(path.read_text())["configurations"] == report["configurations"]

    built.clear()
    again = measure_quality(data, settings, finished=finished_results(path, data, settings), on_report=pytest.fail)
    assert built == []
    assert without_times(again) == without_times(report)


def test_more_seeds_and_configurations(stopped: tuple[Path, TrainingData], built: list[FakeRecommender]) -> None:
    path, data = stopped
    settings = make_settings(configurations=("packed+sap", "packed", "padded-eager"), seeds=4)
    finished = finished_results(path, data, settings)
    report = measure_quality(data, settings, finished=finished)
    assert len(built) == 3 * 4 - 3
    assert runs_of(report) == [(name, seed) for name in settings.configurations for seed in range(4)]
    assert without_times(report) == without_times(measure_quality(data, settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, r"made with other settings \(batch_size was 8, is 7\); choose another output folder, or"),
        ({"epochs": 3, "max_items": 4}, r"\(epochs was 2, is 3; max_items was 5, is 4\)"),
        ({"learning_rate": 0.01}, r"\(learning_rate was 0.001, is 0.01\)"),
        ({"model": RecommenderSettings()}, r"\(num_layers was 2, is 4; d_model was 16, is 128; "),
        ({"dtype": "bfloat16"}, "dtype was float32, is bfloat16"),
        ({"rows": 20}, r"\(rows was None, is 20\)"),
        ({"seeds": 1}, "has padded-eager from seed 1, which the settings do not have; choose another"),
        ({"configurations": ("padded-eager",)}, "has packed from seed 0, which the settings do not have"),
    ],
)
def test_other_settings(stopped: tuple[Path, TrainingData], changes: dict, message: str) -> None:
    path, data = stopped
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        finished_results(path, data, make_settings(**changes))
    assert "quality.json: " in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_other_data_versions_and_devices(stopped: tuple[Path, TrainingData], monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = stopped
    settings = make_settings()
    items = data.interactions.items
    items[0], items[1] = items[1], items[0]  # as many users, items and rows as before
    with pytest.raises(ValueError, match=r"\(checksum was \w{16}, is \w{16}\)"):
        finished_results(path, data, settings)
    items[0], items[1] = items[1], items[0]
    assert finished_results(path, data, settings) != {}
    data.semantic_ids[[0, 1]] = data.semantic_ids[[1, 0]]
    with pytest.raises(ValueError, match=r"\(checksum was \w{16}, is \w{16}\)"):
        finished_results(path, data, settings)
    data.semantic_ids[[0, 1]] = data.semantic_ids[[1, 0]]
    monkeypatch.setattr(quality_module, "describe_device", lambda device: "an abacus")
    with pytest.raises(ValueError, match=r"\(device was .*, is an abacus\)"):
        finished_results(path, data, settings)
    monkeypatch.setattr(quality_module, "describe_versions", lambda: {"torch": "0.1"})
    with pytest.raises(ValueError, match=r"torch was .*, is 0\.1"):
        finished_results(path, data, settings)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "stamp-profile-quality/1"}', "\udcff"])
def test_another_file(tmp_path: Path, content: str) -> None:
    settings = make_settings()
    data = make_data(random_interactions(0, users=20), settings)
    path = tmp_path / "quality.json"
    assert finished_results(path, data, settings) == {}
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=r"quality.json: not a report of this version of `stamp-profile quality`; choose another"
    ):
        finished_results(path, data, settings)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, r"seeds must be in \[1, inf\), got 0"),
        ({"epochs": 0}, r"epochs must be in \[1, inf\), got 0"),
        ({"configurations": ("packed", "packed")}, r"configurations must be .* different names, got \('packed', "),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"model": RecommenderSettings(num_layers=0)}, r"num_layers must be in \[1, inf\), got 0"),
        ({"model": RecommenderSettings(num_heads=0)}, r"num_heads must be in \[1, inf\), got 0"),
        ({"model": RecommenderSettings(d_kv=12)}, "d_kv must be a multiple of 8 up to 256, got 12"),
        ({"model": RecommenderSettings(d_kv=264)}, "d_kv must be a multiple of 8 up to 256, got 264"),
        (
            {"model": RecommenderSettings(prune_after_block=5)},
            "prune_after_block must be at most the number of layers, 4, got 5",
        ),
        ({"model": RecommenderSettings(prune_after_block=0)}, r"prune_after_block must be in \[1, inf\), got 0"),
        ({"model": RecommenderSettings(keep_ratio=0.0)}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"model": RecommenderSettings(keep_ratio=1.5)}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"model": RecommenderSettings(dropout=1.0)}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(**changes)


def test_min_items_and_too_few_rows() -> None:
    interactions = make_interactions(HISTORIES)  # histories in training rows: 1 to 4, none, 1, 1 to 7 items
    assert len(make_data(interactions, make_settings(batch_size=3, min_items=3)).training_set) == 7
    for changes, message in (
        ({"min_items": 3}, "batch_size must be at most .* of made with a history of at least 3 items, 7, got 8"),
        ({"min_items": 9, "max_items": 10}, "batch_size must be at most .* at least 9 items, 0, got 8"),
        ({"min_items": 6}, "min_items must be at most max_items, 5, got 6"),
        ({"rows": 7}, "batch_size must be at most the number of training rows of made, 7, got 8"),
        ({"rows": 99}, "rows must be at most the number of training rows, 12, got 99"),
    ):
        with pytest.raises(ValueError, match=message):
            make_data(interactions, make_settings(**changes))


# ---- the real ones -------------------------------------------------------------------------------------------------


def test_a_rule_is_learned() -> None:
    """The next item is the next one in a ring of 12: popularity does not help, and a model finds every target."""
    rng = np.random.default_rng(0)
    histories = [[(first + i) % 12 for i in range(8)] for first in rng.permutation(np.arange(48) % 12).tolist()]
    model = RecommenderSettings(
        num_layers=1, d_model=32, num_heads=2, d_kv=16, d_ff=32, dropout=0.0, prune_after_block=1
    )
    settings = make_settings(seeds=1, epochs=5, max_items=3, learning_rate=0.005, model=model)
    report = measure_quality(make_data(make_interactions(histories), settings), settings)
    references = {reference["name"]: reference["metrics"] for reference in report["references"]}
    assert references["popularity"]["recall@5"] < 0.5
    padded, packed = (configuration["seeds"][0] for configuration in report["configurations"])
    assert packed["metrics"]["recall@5"] == padded["metrics"]["recall@5"] == 1.0
    assert packed["metrics"]["ndcg@5"] > 0.9
    assert packed["epoch_losses"][0] == pytest.approx(padded["epoch_losses"][0], rel=1e-3)  # the same mathematics
