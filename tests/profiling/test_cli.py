"""The command from end to end on a tiny data file, with fake recommenders; two tests train the real ones."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from stamp_kernels.profiling.commands import trainee as trainee_module
from stamp_kernels.profiling.commands.cli import app, quality
from stamp_kernels.profiling.commands.settings import LEARNING_RATE, TrainSettings
from stamp_kernels.profiling.commands.train import profile_training
from stamp_kernels.profiling.commands.training_data import prepare_data
from stamp_kernels.profiling.data.interactions import load_interactions
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, RecommenderSettings

CODES_PER_ITEM, CODEBOOK_SIZE, NUM_ITEMS = 3, 4, 20
SMALL = ("--steps", "3", "--warmup", "1", "--batch-size", "8", "--device", "cpu", "--threads", "1")


class FakeRecommender(torch.nn.Module):
    """Next codes from the mean of the history's embeddings. The configuration "padded-prune" breaks at a step."""

    step_that_breaks = 4

    def __init__(self, name: str, vocabulary_size: int) -> None:
        super().__init__()
        self.name = name
        self.embedding = torch.nn.Embedding(vocabulary_size, 8)
        self.dropout = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(8, vocabulary_size)
        self.seen: list[torch.Tensor] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, batch) -> SimpleNamespace:
        if self.name == "padded-prune" and len(self.seen) + 1 == self.step_that_breaks:
            raise RuntimeError("the cat sat on the keyboard")
        packed = batch.packed_inputs
        self.seen.append(packed.values)
        ids = batch.input_ids if self.name.startswith("padded") else packed.values
        means = torch.segment_reduce(self.embedding(packed.values), "mean", lengths=packed.lengths_cpu)
        logits = self.head(self.dropout(means))
        self.dtypes.add(logits.dtype)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[:, 0])
        return SimpleNamespace(loss=2 * loss, next_item_loss=loss, tokens_per_block=[ids.numel(), ids.numel() // 2])


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecommender]:
    """The recommenders built in this test, which are fakes."""
    recommenders = []

    def build(name: str, settings, *, seed: int) -> FakeRecommender:
        torch.manual_seed(seed)
        recommenders.append(FakeRecommender(name, 1 + settings.codes_per_item * settings.codebook_size))
        return recommenders[-1]

    def evaluate(recommender, dataset, *, batch_size, device) -> dict[str, float]:
        return {"recall@5": len(recommender.seen) / 100, "recall@10": 0.5, "ndcg@5": 0.1, "ndcg@10": 0.2}

    monkeypatch.setattr(trainee_module, "build_recommender", build)
    monkeypatch.setattr(trainee_module, "evaluate", evaluate)
    return recommenders


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """12 users with 3 to 9 interactions, and semantic IDs."""
    rng = np.random.default_rng(0)
    lengths = 3 + np.arange(12) % 7
    np.savez(
        tmp_path / "shop.npz",
        seq_items=rng.integers(0, NUM_ITEMS, lengths.sum()),
        seq_offsets=np.concatenate(([0], np.cumsum(lengths))),
        sids=np.stack(np.unravel_index(np.arange(NUM_ITEMS), (CODEBOOK_SIZE,) * CODES_PER_ITEM), axis=1),
    )
    return tmp_path / "shop.npz"


def run(*arguments: object, subcommand: str = "train") -> Result:
    return CliRunner().invoke(app, [subcommand, *map(str, arguments)])


def error_of(*arguments: object, subcommand: str = "train") -> str:
    """The one line that a run with bad input prints."""
    result = run(*arguments, subcommand=subcommand)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    return lines[0]


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_report_table_and_picture(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    result = run("--data", shop, *SMALL, "--configurations", "padded-eager,packed", "--output", tmp_path / "a" / "b")
    assert result.exit_code == 0, result.output
    table = result.stdout
    assert re.search(r"padded-eager .* 1\.00x", table) and re.search(r"packed .*x", table)
    assert "shop.npz: 12 users" in table and "3 interleaved steps" in table
    assert "timing steps" in result.stderr and "train.json" in result.stderr
    assert "timing" not in table

    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["train.json", "train.png"]
    assert (tmp_path / "a" / "b" / "train.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "a" / "b" / "train.json").read_text())
    assert set(report) == {
        *("schema", "date", "command", "device", "versions", "data", "settings", "configurations"),
    }
    assert (
        report["data"] | {"users": 12, "items": NUM_ITEMS, "codes_per_item": CODES_PER_ITEM, "name": "shop"}
        == report["data"]
    )
    assert report["data"]["semantic_ids"] == "given"
    settings = report["settings"]
    assert settings | {"steps": 3, "warmup": 1, "batch_size": 8, "device": "cpu", "dtype": "float32"} == settings
    assert report["device"].endswith(", 1 thread")
    assert settings["model"]["codes_per_item"] == CODES_PER_ITEM and settings["max_items"] == 30
    assert [c["name"] for c in report["configurations"]] == ["padded-eager", "packed"]
    for configuration in report["configurations"]:
        assert set(configuration) == {
            *("name", "step_ms", "sequences_per_s", "tokens_per_block", "peak_bytes", "loss", "metrics"),
        }
        ms = configuration["step_ms"]
        assert 0 < ms["p20"] <= ms["median"] <= ms["p80"]
        assert configuration["sequences_per_s"] == pytest.approx(8e3 / ms["median"])
        weights = sum(p.nbytes for p in built[0].parameters())
        assert 4 * weights < configuration["peak_bytes"] < 8 * weights  # weights, gradients, two moments and the rest
        assert configuration["metrics"] is None
    padded, packed = report["configurations"]
    assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-6)
    assert padded["tokens_per_block"][0] > packed["tokens_per_block"][0]


def test_all_have_the_same_batches_and_weights(shop: Path, built: list[FakeRecommender]):
    names = ("packed", "packed+sap", "padded-eager")
    result = run("--data", shop, *SMALL, "--configurations", "packed, packed+sap", "--configurations", names[2])
    assert result.exit_code == 0, result.output
    assert [recommender.name for recommender in built] == list(names)
    first, *others = built
    # Warm-up, timed steps and the one for the memory: more steps than an epoch has batches.
    assert len(first.seen) == 5
    assert len({tuple(ids.tolist()) for ids in first.seen[:4]}) == 4
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first.seen, other.seen, strict=True))
        for x, y in zip(first.parameters(), other.parameters(), strict=True):
            assert torch.equal(x, y)


def test_loss_does_not_depend_on_other_configurations(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    losses = []
    for i, names in enumerate(("packed", "padded-eager,packed+sap,packed")):
        run("--data", shop, *SMALL, "--configurations", names, "--output", tmp_path / str(i), "--seed", "5")
        report = json.loads((tmp_path / str(i) / "train.json").read_text())
        losses.append(next(c["loss"] for c in report["configurations"] if c["name"] == "packed"))
    assert losses[0] == losses[1]


def test_epochs_and_metrics(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    result = run(
        *("--data", shop, *SMALL, "--configurations", "packed,padded-sdpa", "--output", tmp_path / "out"),
        *("--epochs", "2", "--evaluate", "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "train.json").read_text())
    steps_per_epoch = report["data"]["training_rows"] // 8
    assert steps_per_epoch > 1
    timed, trained = built[:2], built[2:]
    assert [recommender.name for recommender in trained] == ["packed", "padded-sdpa"]
    for recommender in trained:
        assert len(recommender.seen) == 2 * steps_per_epoch
        assert torch.equal(recommender.seen[0], timed[0].seen[0])
        assert recommender.dtypes == {torch.bfloat16}
    for configuration in report["configurations"]:
        assert configuration["metrics"]["recall@5"] == pytest.approx(2 * steps_per_epoch / 100)
    assert re.search(r"packed .*0\.5000 +0\.1000 +0\.2000", result.stdout)
    assert all(f"{what} packed" in result.stderr for what in ("training", "evaluating"))


def test_metrics_without_epochs_are_of_the_timed_steps(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    run("--data", shop, *SMALL, "--configurations", "packed", "--output", tmp_path / "out", "--evaluate")
    report = json.loads((tmp_path / "out" / "train.json").read_text())
    assert len(built) == 1
    assert report["configurations"][0]["metrics"]["recall@5"] == pytest.approx(0.05)


def test_text_file_gets_semantic_ids(tmp_path: Path, built: list[FakeRecommender], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(1)
    lines = (f"{user} {' '.join(map(str, rng.integers(0, 30, 6)))}" for user in range(10))
    (tmp_path / "shop.txt").write_text("\n".join(lines))
    result = run(
        *("--data", tmp_path / "shop.txt", *SMALL, "--configurations", "packed", "--output", tmp_path / "out"),
        *("--max-items", "2"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "train.json").read_text())
    assert report["data"]["semantic_ids"] == "residual k-means"
    assert report["configurations"][0]["tokens_per_block"][0] <= 8 * 2 * 4


def test_only_rows_with_long_histories(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    arguments = ("--configurations", "packed", "--min-items", "4", "--max-items", "5", "--output", tmp_path / "out")
    result = run("--data", shop, *SMALL, *arguments, "--batch-size", "4")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "train.json").read_text())
    assert report["settings"]["min_items"] == 4 and report["settings"]["max_items"] == 5
    # Users with 7, 8 and 9 interactions train on 5, 6 and 7, from the fifth item on. 12 users: lengths 3 to 9, 3 to 7.
    assert report["data"]["training_rows"] == (1 + 2 + 3) + 1
    lengths = torch.tensor([len(ids) for ids in built[0].seen]) / CODES_PER_ITEM
    assert len(lengths) == 5 and (lengths >= 4 * 4).all() and (lengths <= 4 * 5).all()
    assert report["configurations"][0]["tokens_per_block"][0] >= 4 * 4 * CODES_PER_ITEM


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--configurations", "packed,padded"), "configuration must be one of ('padded-eager', "),
        (("--configurations", "packed,packed"), "configurations must be one or several different names, got ('packed'"),
        (("--configurations", ","), "configurations must be one or several different names, got ()"),
        (("--steps", "0"), "steps must be in [1, inf), got 0"),
        (("--warmup", "-1"), "warmup must be in [0, inf), got -1"),
        (("--batch-size", "0"), "batch_size must be in [1, inf), got 0"),
        (
            ("--batch-size", "1000"),
            "batch_size must be at most the number of training rows of shop, 31, got 1000",
        ),
        (("--epochs", "-1"), "epochs must be in [0, inf), got -1"),
        (("--seed", "-1"), "seed must be in [0, inf), got -1"),
        (("--max-items", "0"), "max_items must be in [1, inf), got 0"),
        (("--min-items", "0"), "min_items must be in [1, inf), got 0"),
        (("--min-items", "7", "--max-items", "6"), "min_items must be at most max_items, 6, got 7"),
        (("--min-items", "5"), "training rows of shop with a history of at least 5 items, 3, got 8"),
        (("--min-items", "30"), "training rows of shop with a history of at least 30 items, 0, got 8"),
        (("--threads", "0"), "threads must be in [1, inf), got 0"),
        (("--dtype", "float16"), "dtype must be one of ('float32', 'bfloat16'), got 'float16'"),
        (("--device", "tpu"), "device must be cpu, cuda or cuda:<index>, got 'tpu'"),
        (("--device", "meta"), "device must be cpu, cuda or cuda:<index>, got 'meta'"),
        (("--device", "cuda:99"), "GPUs that torch finds, got 'cuda:99'"),
    ],
)
def test_bad_options(shop: Path, built: list[FakeRecommender], arguments: tuple[str, ...], message: str):
    assert message in error_of("--data", shop, "--batch-size", "8", *arguments)
    assert built == []


def test_an_unknown_configuration_lists_all(shop: Path):
    message = error_of("--data", shop, "--configurations", "padded")
    assert message.endswith(f"must be one of {CONFIGURATIONS}, got 'padded'")


def test_bad_data(tmp_path: Path):
    assert "nothing.npz: no such file" in error_of("--data", tmp_path / "nothing.npz")
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: the file is empty" in error_of("--data", tmp_path / "empty.txt")
    np.savez(tmp_path / "negative.npz", seq_items=[0, -1, 2], seq_offsets=[0, 3])
    assert "found item -1" in error_of("--data", tmp_path / "negative.npz")


def test_output_is_tried_before_the_run(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    (tmp_path / "file").touch()
    message = error_of("--data", shop, *SMALL, "--output", tmp_path / "file")
    assert "file: cannot be written (" in message
    assert built == []


def test_a_failed_run_leaves_the_old_results(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("train.json", "train.png"):
        (output / name).write_text("the old one")
    result = run("--data", shop, *SMALL, "--configurations", "packed,padded-prune", "--output", output)
    assert isinstance(result.exception, RuntimeError) and "the cat" in str(result.exception)  # no bug is hidden
    assert result.exit_code == 1 and result.stdout == ""
    assert {path.name: path.read_text() for path in output.iterdir()} == {
        "train.json": "the old one",
        "train.png": "the old one",
    }


def test_an_infinite_loss_is_an_error(shop: Path, built: list[FakeRecommender], monkeypatch: pytest.MonkeyPatch):
    settings = TrainSettings(
        configurations=("packed",),
        steps=1,
        warmup=0,
        batch_size=8,
        dtype="float32",
        device=torch.device("cpu"),
        seed=0,
        epochs=0,
        evaluate=False,
        max_items=30,
    )
    data = prepare_data(load_interactions(shop), settings)
    forward = FakeRecommender.forward

    def diverged(self: FakeRecommender, batch) -> SimpleNamespace:
        output = forward(self, batch)
        output.next_item_loss = output.loss * float("inf")
        return output

    monkeypatch.setattr(FakeRecommender, "forward", diverged)
    with pytest.raises(RuntimeError, match="packed: the mean training loss is inf"):
        profile_training(data, settings)


def test_help_lists_the_subcommands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "train" in result.stdout and "quality" in result.stdout


def test_real_recommenders(shop: Path, tmp_path: Path):
    names = ["padded-eager", "packed+sap+map"]
    arguments = ("--steps", "1", "--warmup", "0", "--max-items", "4", "--evaluate")
    result = run("--data", shop, *SMALL, *arguments, "--configurations", ",".join(names), "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    configurations = json.loads((tmp_path / "out" / "train.json").read_text())["configurations"]
    assert [configuration["name"] for configuration in configurations] == names
    padded, packed = (configuration["tokens_per_block"] for configuration in configurations)
    assert padded[0] == padded[1] == padded[2] == padded[3] > packed[0]
    assert packed[0] == packed[1] > packed[2] == packed[3]
    for configuration in configurations:
        assert set(configuration["metrics"]) == {"recall@5", "recall@10", "ndcg@5", "ndcg@10"}
        assert all(0 <= value <= 1 for value in configuration["metrics"].values())


# ---- quality -------------------------------------------------------------------------------------------------------

QUALITY = ("--batch-size", "8", "--device", "cpu", "--threads", "1", "--epochs", "1", "--seeds", "2")


def test_quality_report_and_table(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    output = tmp_path / "a" / "b"
    arguments = ("--rows", "16", "--max-items", "4", "--min-items", "2", "--learning-rate", "0.01", "--layers", "3")
    result = run("--data", shop, *QUALITY, *arguments, "--output", output, subcommand="quality")
    assert result.exit_code == 0, result.output
    names = ["padded-eager", "packed", "packed+sap", "packed+sap+map"]
    assert [recommender.name for recommender in built] == 2 * names
    assert all(len(recommender.seen) == 2 for recommender in built)  # one epoch of 16 rows, 8 a step
    assert re.search(r"packed\+sap\+map +0 ", result.stdout) and "popularity, unseen" in result.stdout
    assert "training" in result.stderr and "quality.json" in result.stderr
    assert [path.name for path in output.iterdir()] == ["quality.json"]
    report = json.loads((output / "quality.json").read_text())
    assert [c["name"] for c in report["configurations"]] == names
    assert all([seed["seed"] for seed in c["seeds"]] == [0, 1] for c in report["configurations"])
    assert report["configurations"][0]["summary"]["recall@5"]["mean"] == pytest.approx(0.02)
    settings = report["settings"]
    assert settings | {"rows": 16, "max_items": 4, "min_items": 2, "epochs": 1, "seeds": 2, "batch_size": 8} == settings
    assert settings["optimizer"]["learning_rate"] == 0.01
    assert settings["model"]["num_layers"] == 3 and settings["model"]["prune_after_block"] == 2
    assert report["data"]["training_rows"] == 16


def test_quality_defaults_are_those_of_the_recommender():
    defaults = dict(zip(quality.__code__.co_varnames, quality.__defaults__, strict=False))
    model = RecommenderSettings()
    assert defaults["layers"] == model.num_layers
    for name in ("d_model", "num_heads", "d_kv", "d_ff", "prune_after_block", "keep_ratio", "dropout"):
        assert defaults[name] == getattr(model, name), name
    assert defaults["learning_rate"] == LEARNING_RATE


def test_a_failed_quality_run_continues(
    shop: Path, tmp_path: Path, built: list[FakeRecommender], monkeypatch: pytest.MonkeyPatch
):
    arguments = ("--data", shop, *QUALITY, "--configurations", "packed,padded-prune,packed+sap", "--output", tmp_path)
    path = tmp_path / "quality.json"
    monkeypatch.setattr(FakeRecommender, "step_that_breaks", 1)
    result = run(*arguments, "--epochs", "2", subcommand="quality")
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1
    before = json.loads(path.read_text())["configurations"]
    assert [len(configuration["seeds"]) for configuration in before] == [1, 0, 0]

    message = error_of(*arguments, "--epochs", "3", subcommand="quality")
    assert "quality.json: made with other settings (epochs was 2, is 3); choose another output folder" in message
    built.clear()
    monkeypatch.setattr(FakeRecommender, "step_that_breaks", None)
    result = run(*arguments, "--epochs", "2", subcommand="quality")
    assert result.exit_code == 0, result.output
    assert [recommender.name for recommender in built] == [
        *("padded-prune", "packed+sap", "packed", "padded-prune", "packed+sap"),
    ]
    after = json.loads(path.read_text())["configurations"]
    assert after[0]["seeds"][0] == before[0]["seeds"][0]
    assert all(len(configuration["seeds"]) == 2 for configuration in after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "seeds must be in [1, inf), got 0"),
        (("--epochs", "0"), "epochs must be in [1, inf), got 0"),
        (("--configurations", "padded"), "configuration must be one of ('padded-eager', "),
        (("--rows", "32"), "rows must be at most the number of training rows, 31, got 32"),
        (("--rows", "7"), "batch_size must be at most the number of training rows of shop, 7, got 8"),
        (("--d-kv", "12"), "d_kv must be a multiple of 8 up to 256, got 12"),
        (("--layers", "1"), "prune_after_block must be at most the number of layers, 1, got 2"),
        (("--learning-rate", "-1"), "learning_rate must be a finite number above 0, got -1.0"),
        (("--threads", "0"), "threads must be in [1, inf), got 0"),
        (("--min-items", "31"), "min_items must be at most max_items, 30, got 31"),
        (("--device", "tpu"), "device must be cpu, cuda or cuda:<index>, got 'tpu'"),
    ],
)
def test_bad_quality_options(shop: Path, built: list[FakeRecommender], arguments: tuple[str, ...], message: str):
    assert message in error_of("--data", shop, *QUALITY, *arguments, subcommand="quality")
    assert built == []


def test_quality_does_not_overwrite_another_file(shop: Path, tmp_path: Path, built: list[FakeRecommender]):
    (tmp_path / "quality.json").write_text("my thesis")
    message = error_of("--data", shop, *QUALITY, "--output", tmp_path, subcommand="quality")
    assert (
        "quality.json: not a report of this version of `stamp-profile quality`; choose another output folder" in message
    )
    assert (tmp_path / "quality.json").read_text() == "my thesis"
    assert built == []


def test_real_recommenders_of_a_quality_run(shop: Path, tmp_path: Path):
    size = ("--layers", "2", "--prune-after-block", "1", "--d-model", "16", "--num-heads", "2", "--d-kv", "8")
    arguments = (*size, "--d-ff", "16", "--dropout", "0", "--keep-ratio", "0.5", "--seeds", "1", "--max-items", "4")
    result = run("--data", shop, *QUALITY, *arguments, "--output", tmp_path, subcommand="quality")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "quality.json").read_text())
    chosen = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16, "dropout": 0.0, "keep_ratio": 0.5}
    model = report["settings"]["model"]
    assert model | chosen | {"prune_after_block": 1, "codes_per_item": CODES_PER_ITEM} == model
    padded, packed, pruned, predicted = (c["seeds"][0] for c in report["configurations"])
    assert packed["epoch_losses"] == pytest.approx(padded["epoch_losses"], rel=1e-4)
    assert len({round(run["epoch_losses"][0], 4) for run in (packed, pruned, predicted)}) == 3
    for run_of_seed in (padded, packed, pruned, predicted):
        assert all(0 <= value <= 1 for value in run_of_seed["metrics"].values())
