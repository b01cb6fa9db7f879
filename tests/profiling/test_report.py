"""The layout of the reports, their files, the tables and the picture."""

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from stamp_kernels.profiling.commands import picture as picture_module
from stamp_kernels.profiling.commands.picture import draw_picture
from stamp_kernels.profiling.commands.report import (
    ConfigurationResult,
    SeedResult,
    build_quality_report,
    build_report,
    write_json,
)
from stamp_kernels.profiling.commands.tables import render_quality_table, render_table

METRICS = {"recall@5": 0.0123, "recall@10": 0.02, "ndcg@5": 0.0101, "ndcg@10": 0.0143}


def make_result(name: str, ms: float, **changes: object) -> ConfigurationResult:
    values = {
        "step_ms": {"median": ms, "p20": 0.9 * ms, "p80": 1.2 * ms},
        "sequences_per_s": 128e3 / ms,
        "tokens_per_block": [15360, 15360, 5120, 5120],
        "peak_bytes": round(2e6 * ms),
        "loss": 6.125,
        "metrics": None,
    }
    return ConfigurationResult(name, **(values | changes))


def make_report(*results: ConfigurationResult) -> dict:
    return build_report(
        results,
        command="stamp-profile train",
        device="a machine, 2 threads",
        versions={"torch": "2.13"},
        data={"name": "shop$1$", "source": "shop.npz: 3 users, 9 items, 20 interactions"},
        settings={"batch_size": 128, "dtype": "float32", "steps": 20},
    )


def as_text(report: dict) -> list[str]:
    console = Console(width=160)
    with console.capture() as capture:
        console.print((render_quality_table if "quality" in report["schema"] else render_table)(report))
    return capture.get().splitlines()


def row_of(report: dict, name: str) -> list[str]:
    return next(line.split() for line in as_text(report) if line.strip().startswith(f"{name} "))


def test_layout():
    report = make_report(make_result("padded-eager", 100.0), make_result("packed", 25.0, metrics=METRICS))
    assert list(report) == [
        *("schema", "date", "command", "device", "versions", "data", "settings", "configurations"),
    ]
    assert report["schema"] == "stamp-profile-train/2"
    assert report["configurations"][1] == {
        "name": "packed",
        "step_ms": {"median": 25.0, "p20": 22.5, "p80": 30.0},
        "sequences_per_s": 5120.0,
        "tokens_per_block": [15360, 15360, 5120, 5120],
        "peak_bytes": 50_000_000,
        "loss": 6.125,
        "metrics": METRICS,
    }
    assert report["configurations"][0]["metrics"] is None
    assert json.loads(json.dumps(report)) == report


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "train.json"
    report = make_report(make_result("packed", 25.0))
    write_json(report, path)
    assert json.loads(path.read_text()) == report

    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(make_report(make_result("packed", 25.0, loss=float("nan"))), path)
    with pytest.raises(TypeError):
        write_json({"schema": object()}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "train.png"
    path.write_bytes(b"the old one")

    def write_half(self: object, file, **_: object) -> None:
        file.write(b"half of the new one")
        raise OSError("disk full")

    monkeypatch.setattr(picture_module.Figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        draw_picture(make_report(make_result("packed", 25.0)), path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_table_is_relative_to_the_first_padded_configuration():
    report = make_report(
        make_result("packed", 25.0), make_result("padded-sdpa", 75.0), make_result("padded-eager", 150.0)
    )
    assert row_of(report, "packed") == [
        *("packed", "25.0", "(22.5-30.0)", "3.00x", "5,120", "15360/5120", "50.0", "33%", "6.125"),
    ]
    assert row_of(report, "padded-sdpa")[3] == "1.00x"
    assert row_of(report, "padded-eager")[1:4] == ["150", "(135-180)", "0.50x"]
    slow = make_report(make_result("padded-eager", 64e3), make_result("packed", 5e3))
    assert [row_of(slow, name)[4] for name in ("padded-eager", "packed")] == ["2.00", "25.6"]
    text = "\n".join(as_text(report))
    assert "shop.npz: 3 users" in text and "20 interleaved steps" in text
    assert "128 sequences, float32, a machine, 2 threads" in text
    assert "Recall" not in text


def test_table_without_a_baseline_and_with_metrics():
    report = make_report(make_result("packed", 25.0, metrics=METRICS))
    row = row_of(report, "packed")
    assert row[3] == "-" and row[7] == "-"
    assert row[-4:] == ["0.0123", "0.0200", "0.0101", "0.0143"]
    header = " ".join(" ".join(as_text(report)[:5]).split())
    assert "Recall Recall NDCG NDCG" in header and "@5 @10 @5 @10" in header


@pytest.mark.parametrize("names", [("padded-eager", "packed", "packed+sap"), ("packed",)])
def test_picture(tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    figures = []
    savefig = picture_module.Figure.savefig
    monkeypatch.setattr(
        picture_module.Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    path = tmp_path / "train.png"
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    draw_picture(make_report(*(make_result(name, 100.0 / (i + 1)) for i, name in enumerate(names))), path)
    assert list(tmp_path.iterdir()) == [path]
    assert "matplotlib.pyplot" not in sys.modules  # no window system, no global figures

    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert width > 1000 and height > 300
    for half in (image[:, : width // 2], image[:, width // 2 :]):
        assert len(np.unique(half.reshape(-1, half.shape[-1]), axis=0)) > 20

    (figure,) = figures
    time_axes, memory_axes = figure.axes
    assert [label.get_text() for label in time_axes.get_yticklabels()] == list(names)
    assert time_axes.yaxis_inverted()  # the first on top
    assert [bar.get_width() for bar in time_axes.patches] == [100.0 / (i + 1) for i in range(len(names))]
    assert [bar.get_width() for bar in memory_axes.patches] == pytest.approx(
        [200.0 / (i + 1) for i in range(len(names))]
    )
    labels = [text.get_text() for text in time_axes.texts]
    assert labels == (["100  (1.00x)", "50.0  (2.00x)", "33.3  (3.00x)"] if len(names) == 3 else ["100"])
    assert "milliseconds" in time_axes.get_xlabel() and "megabytes" in memory_axes.get_xlabel()


# ---- quality -------------------------------------------------------------------------------------------------------


def make_quality_report(**recalls: list[float]) -> dict:
    """One configuration for each argument, with the recall@10 of its seeds."""
    results = {
        name: [
            SeedResult(seed, METRICS | {"recall@10": recall}, [7.0, 6.0 + seed], 20.0 + seed, 4.0)
            for seed, recall in enumerate(values)
        ]
        for name, values in recalls.items()
    }
    return build_quality_report(
        results,
        references={"popularity": METRICS},
        command="stamp-profile quality",
        device="a machine, 1 thread",
        versions={"torch": "2.13"},
        data={"name": "shop", "source": "shop.npz: 3 users, 9 items, 20 interactions", "training_rows": 1234},
        settings={"epochs": 2, "model": {"num_layers": 4, "d_model": 64}},
    )


def test_quality_layout():
    report = make_quality_report(packed=[0.1, 0.2, 0.6], padded=[0.3])
    assert list(report) == [
        *("schema", "date", "command", "device", "versions", "data", "settings", "references", "configurations"),
    ]
    assert report["schema"] == "stamp-profile-quality/2"
    assert report["references"] == [{"name": "popularity", "metrics": METRICS}]
    packed, padded = report["configurations"]
    assert packed["name"] == "packed" and [seed["seed"] for seed in packed["seeds"]] == [0, 1, 2]
    assert packed["seeds"][1] == {
        "seed": 1,
        "metrics": METRICS | {"recall@10": 0.2},
        "epoch_losses": [7.0, 7.0],
        "training_s": 21.0,
        "evaluation_s": 4.0,
    }
    assert list(packed["summary"]) == [*METRICS, "loss", "training_s", "evaluation_s"]
    # Deviations from the mean 0.3: -0.2, -0.1, 0.3; their squares sum to 0.14, over n - 1 = 2.
    assert packed["summary"]["recall@10"] == pytest.approx({"mean": 0.3, "std": 0.07**0.5, "min": 0.1, "max": 0.6})
    assert packed["summary"]["loss"] == pytest.approx({"mean": 7.0, "std": 1.0, "min": 6.0, "max": 8.0})
    assert padded["summary"]["recall@10"] == {"mean": 0.3, "std": None, "min": 0.3, "max": 0.3}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_quality_report_without_all_results():
    """As it is written after the first configuration and seed."""
    report = make_quality_report(packed=[0.1], padded=[])
    assert report["configurations"][1] == {"name": "padded", "seeds": [], "summary": {}}
    assert any(line.strip().startswith("packed") for line in as_text(report))


def test_quality_table():
    report = make_quality_report(packed=[0.1, 0.2, 0.6], padded=[0.3])
    lines = [" ".join(line.split()) for line in as_text(report)]
    assert "Quality on the test split, 2 epochs of 1,234 rows, a machine, 1 thread" in lines
    assert "popularity 0.0123 0.0200 0.0101 0.0143" in lines
    first = lines.index("packed 0 0.0123 0.1000 0.0101 0.0143 6.000 20.0 4.0")
    assert lines[first + 1] == "1 0.0123 0.2000 0.0101 0.0143 7.000 21.0 4.0"
    assert lines[first + 3].startswith("mean 0.0123 \u00b1 0.0000 0.3000 \u00b1 0.2646 ")
    assert lines[first + 3].endswith(" 7.000 \u00b1 1.000 21.0 \u00b1 1.0 4.0 \u00b1 0.0")
    assert lines[first + 4].startswith("range 0.0123-0.0123 0.1000-0.6000 ")
    assert lines[first + 6] == "padded 0 0.0123 0.3000 0.0101 0.0143 6.000 20.0 4.0"
    assert sum(line.startswith("mean") for line in lines) == 1  # none of a single seed
    assert any("shop.npz: 3 users" in line for line in lines)
    assert any("4 + 4 blocks of width 64; mean \u00b1 sample standard deviation" in line for line in lines)
