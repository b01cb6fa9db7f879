"""benchmarks/table.py shows what the micro-benchmarks recorded."""

import importlib.util
from pathlib import Path

from rich.console import Console

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "table.py"


def load_script():
    spec = importlib.util.spec_from_file_location("benchmark_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(case: str, implementation: str, median: float, *, is_baseline: bool = False) -> dict:
    return {
        "group": case,
        "stats": {"median": median, "q1": 0.9 * median, "q3": 1.2 * median},
        "extra_info": {
            "implementation": implementation,
            "is_baseline": is_baseline,
            "tokens": 1000,
            "floor_seconds": 0.5e-3,
            "peak_bytes": 2_500_000,
        },
    }


def test_rows_are_grouped_by_case():
    """Each case is relative to its baseline."""
    results = {
        "datetime": "2026-11-23T22:00:00+00:00",
        "measured_on": {
            "device": "some CPU, 2 threads",
            "versions": {"torch": "2.13.0"},
            "dtype": "float32",
            "flops_per_second": 150e9,
            "bytes_per_second": 20e9,
        },
        "benchmarks": [
            benchmark("forward", "theirs", 4e-3),
            benchmark("backward", "alone", 0.1),
            benchmark("forward", "ours", 1e-3, is_baseline=True),
        ],
    }
    console = Console(width=120)
    with console.capture() as capture:
        console.print(load_script().render_table(results))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "some CPU, 2 threads, float32, 2026-11-23" in lines
    assert "floor of 150 GFLOP/s and 20 GB/s" in lines
    forward = lines.index("forward")
    assert lines[forward + 1 : forward + 3] == [
        "theirs 4.00 (3.60-4.80) 4.00 4,000 12% 2.50",
        "ours 1.00 (0.900-1.20) 1.00 1,000 50% 2.50",
    ]
    assert "alone 100 (90.0-120) - 100,000 0% 2.50" in lines[lines.index("backward") :]
