"""The machine code of every kernel that T5, Qwen and the benchmarks launch: `make aot`.

    python benchmarks/gpu/machine_code.py [--arch 90 ...] [--workloads NAME ...] [--processes 2] [--write]

The public functions run on `meta` tensors of the workloads' shapes, forward and backward. So does a training step of
the T5 recommender. Each launch is compiled for every architecture with its launcher's arguments, and no kernel runs. A
specialisation that several workloads launch is listed with the first one.

The exit status is 1 if a kernel does not compile, does not fit the chip, spills, does not use the matrix units, or
differs from the committed table machine_code.csv (registers, shared memory, instructions of the loops), so that a
regression shows in review. --write updates the table. This needs no GPU, and a process without TRITON_INTERPRET.
"""

import argparse
import csv
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from workloads import COMPILED, TIMED, Workload
from workloads.training_step import TRAINING_STEPS

from stamp_kernels.ops._served_by_triton import ServedByTriton
from stamp_kernels.triton_kernels.aot import TARGETS, Launch, compile_only, specialisation
from stamp_kernels.triton_kernels.machine_code import machine_code

TABLE = Path(__file__).parent / "machine_code.csv"
META = torch.device("meta")
DTYPE = torch.bfloat16
# The step with SAP and MAP also launches all kernels of the steps without them. Larger batches launch the same kernels,
# and longer histories those of L200 and L240.
_STEPS = [step for step in TRAINING_STEPS if step.name == "T5.packed+sap+map.30x256"]
WORKLOADS: tuple[Workload, ...] = (*TIMED, *COMPILED, *_STEPS)


class Row(NamedTuple):
    """One specialisation on one architecture: the table's columns in order, all as text."""

    workload: str
    kernel: str
    arch: str
    warps: str
    registers: str
    shared: str
    spilled: str
    matrix_instructions: str
    loop_instructions: str
    specialisation: str
    problems: str


def launches_of(run: Callable[[], object], arch: int) -> list[Launch]:
    """Compiles every launch of `run`. Each specialisation comes once, in the order of first launches."""
    with compile_only(arch) as launches, ServedByTriton():
        run()
    return list({(launch.name, specialisation(launch.kernel)): launch for launch in launches}.values())


def rows_of(workload: Workload, arch: int) -> dict[str, Row]:
    """The table's rows of a workload by specialisation; one row with the error if it does not compile."""
    try:
        launches = launches_of(lambda: workload.run(workload.inputs(META, DTYPE)), arch)
    except Exception as error:  # the other workloads still compile
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return {workload.name: Row(workload.name, "", str(arch), *[""] * 7, message)}
    rows = {}
    for launch in launches:
        code = machine_code(launch.kernel)
        name = specialisation(launch.kernel)
        rows[f"{launch.name} {name}"] = Row(
            workload=workload.name,
            kernel=launch.name,
            arch=str(arch),
            warps=str(code.num_warps),
            registers=str(code.registers),
            shared=str(code.shared),
            spilled=str(code.spilled),
            matrix_instructions=" ".join(f"{count} {name}" for name, count in code.matrix_instructions.items()),
            loop_instructions=" ".join(map(str, code.loops)),
            specialisation=name,
            problems="; ".join(code.problems(arch)),
        )
    return rows


def _rows_of_index(index: int, arch: int) -> dict[str, Row]:
    """Takes the workload's index, so that no workload is sent to another process."""
    return rows_of(WORKLOADS[index], arch)


def all_rows(arches: list[int], names: list[str], processes: int) -> Iterator[list[Row]]:
    """The rows of each workload and architecture in the table's order. Each specialisation comes once."""
    indices = [i for i, workload in enumerate(WORKLOADS) if workload.name in names]
    jobs = list(itertools.product(indices, arches))
    seen = set()
    with ProcessPoolExecutor(processes) as pool:
        for (_, arch), rows in zip(jobs, pool.map(_rows_of_index, *zip(*jobs, strict=True)), strict=True):
            new = {key: row for key, row in rows.items() if (arch, key) not in seen}
            seen |= {(arch, key) for key in new}
            yield _numbered(list(new.values()))


def _numbered(rows: list[Row]) -> list[Row]:
    """Names a kernel's second specialisation in a workload `kernel.2`, the third `kernel.3`, and so on."""
    counts: dict[str, int] = {}
    numbered = []
    for row in rows:
        counts[row.kernel] = counts.get(row.kernel, 0) + 1
        number = counts[row.kernel]
        numbered.append(row if number == 1 else row._replace(kernel=f"{row.kernel}.{number}"))
    return numbered


def compiler() -> str:
    """The compiler version, which the table depends on too."""
    return f"triton {triton.__version__}"


def read_table() -> tuple[str, list[Row]]:
    """The committed table: (compiler, rows)."""
    with open(TABLE, newline="") as file:
        made_by = file.readline().removeprefix("# ").strip()
        return made_by, [Row(*row) for row in csv.reader(file)][1:]


def write_table(rows: list[Row]) -> None:
    text = io.StringIO(newline="")
    text.write(f"# {compiler()}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    TABLE.write_text(text.getvalue())


def differences(rows: list[Row], committed: list[Row], is_whole: bool) -> list[str]:
    """Rows that are new or changed since the committed table and, if `is_whole`, those that are missing."""

    def by_specialisation(some: list[Row]) -> dict[tuple[str, ...], Row]:
        return {(row.arch, row.kernel.partition(".")[0], row.specialisation): row for row in some}

    now, before = by_specialisation(rows), by_specialisation(committed)
    found = []
    for key in now if not is_whole else sorted(now.keys() | before.keys()):
        figures, committed_figures = _figures(now.get(key)), _figures(before.get(key))
        if figures != committed_figures:
            row = now.get(key) or before[key]
            found.append(f"{row.workload} {row.kernel} sm_{row.arch}: {committed_figures} -> {figures}")
    return found


def _figures(row: Row | None) -> str:
    if row is None:
        return "none"
    return f"{row.registers} registers, {row.shared} B shared, {row.spilled} B spilled, loops {row.loop_instructions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--workloads", nargs="+", choices=_NAMES, default=_NAMES, metavar="NAME")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="update the committed table")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")

    start = time.monotonic()
    rows = []
    print(" ".join(f"{name:<{width}}" for name, width in zip(Row._fields, _WIDTHS, strict=True)))
    for some in all_rows(options.arch, options.workloads, options.processes):
        for row in some:
            print(" ".join(f"{value:<{width}}" for value, width in zip(row, _WIDTHS, strict=True)).rstrip(), flush=True)
        rows += some
    problems = [row for row in rows if row.problems]
    print(f"\n{len(rows)} kernels in {time.monotonic() - start:.0f} s, {len(problems)} with problems")
    is_whole = options.arch == list(TARGETS) and options.workloads == _NAMES
    if options.write:
        if not is_whole:
            parser.error("--write needs all architectures and workloads")
        write_table(rows)
        return bool(problems)
    made_by, committed = read_table()
    if made_by != compiler():
        print(f"{TABLE.name} was made by {made_by}, but this is {compiler()}: not compared")
        return bool(problems)
    changed = differences(rows, committed, is_whole)
    print("\n".join([f"{len(changed)} differ from {TABLE.name}; --write updates it", *changed]))
    return bool(problems or changed)


_NAMES = [workload.name for workload in WORKLOADS]
_WIDTHS = (30, 34, 4, 5, 9, 7, 7, 19, 30, 14, 8)

if __name__ == "__main__":
    sys.exit(main())
