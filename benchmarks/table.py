"""Show the results of the micro-benchmarks as tables: python benchmarks/table.py <JSON of pytest-benchmark> ..."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

CAPTION = (
    "time: median (first to third quartile). ratio: to the case's baseline, above 1 is slower. floor: the least time "
    "for its FLOPs and bytes as a share of the time taken. peak: memory allocated in a call, including its results."
)


def render_table(results: dict[str, Any]) -> Table:
    """The benchmarks grouped by case, in the order in which they ran.

    Args:
        results: the JSON of pytest-benchmark, with the additions of benchmarks/micro/conftest.py.
    """
    machine = results["measured_on"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    table = Table(
        title=f"{machine['device']}, {machine['dtype']}, {results['datetime'][:10]}\n{versions}{_rates(machine)}",
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for header in ("ms", "ratio", "ns per\ntoken", "% of\nfloor", "peak\nMB"):
        table.add_column(header, justify="right", no_wrap=True)
    cases: dict[str, list[dict[str, Any]]] = {}
    for benchmark in results["benchmarks"]:
        cases.setdefault(benchmark["group"], []).append(benchmark)
    for case, benchmarks in cases.items():
        table.add_row(f"[bold]{case}")
        baseline = next((b["stats"]["median"] for b in benchmarks if b["extra_info"]["is_baseline"]), None)
        for benchmark in benchmarks:
            table.add_row(*_cells(benchmark["stats"], benchmark["extra_info"], baseline))
        table.add_section()
    return table


def _rates(machine: dict[str, Any]) -> str:
    if "flops_per_second" not in machine:
        return ""
    gigaflops, gigabytes = machine["flops_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    return f"\nfloor of {gigaflops:,.0f} GFLOP/s and {gigabytes:,.0f} GB/s"


def _cells(stats: dict[str, float], info: dict[str, Any], baseline: float | None) -> tuple[str, ...]:
    milliseconds = [_three_digits(1e3 * stats[name]) for name in ("median", "q1", "q3")]
    return (
        f"  {info['implementation']}",
        "{} ({}-{})".format(*milliseconds),
        "-" if baseline is None else f"{stats['median'] / baseline:.2f}",
        _three_digits(1e9 * stats["median"] / info["tokens"]),
        f"{info['floor_seconds'] / stats['median']:.0%}",
        _three_digits(info["peak_bytes"] / 1e6),
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files written with --benchmark-json")
    console = Console()
    for path in parser.parse_args().results:
        table = render_table(json.loads(path.read_text()))
        # Whole rows, also in a file or a narrow terminal: truncated numbers are worse than lines that wrap.
        unbounded = console.options.update(max_width=1000)
        console.width = max(console.width, console.measure(table, options=unbounded).maximum)
        console.print(table)


if __name__ == "__main__":
    main()
