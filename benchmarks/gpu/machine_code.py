"""The machine code of every kernel that T5, Qwen and the benchmarks launch: `make aot`.

    python benchmarks/gpu/machine_code.py [--arch 90 ...] [--workloads NAME ...] [--processes 2] [--write]

The public functions run on `meta` tensors of the workloads' shapes, forward and backward. So does a training step of
the T5 recommender. Each launch is compiled for every architecture with its launcher's arguments, and no kernel runs. A
specialisation that several workloads launch is listed with the first one. What the timed workloads take on an H100 is
predicted from the machine code (predictions.py).

The exit status is 1 if a kernel does not compile, does not fit the chip, spills, does not use the matrix units, or
differs from the committed table machine_code.csv (registers, shared memory, instructions of the loops), so that a
regression shows in review. It is also 1 if the predictions meet a loop or a kernel that rounds.py does not know.
--write updates the table, and that of the predictions, predictions.csv. This needs no GPU, and a process without
TRITON_INTERPRET.
"""

import argparse
import csv
import io
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import predictions
import torch
import triton
from predictions import Prediction, predictions_of, record
from workloads import COMPILED, TIMED, Workload
from workloads.training_step import TRAINING_STEPS

from stamp_kernels.triton_kernels.aot import TARGETS, specialisation
from stamp_kernels.triton_kernels.machine_code import machine_code

TABLE = Path(__file__).parent / "machine_code.csv"
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
    blocks_per_multiprocessor: str
    spilled: str
    matrix_instructions: str
    loop_instructions: str
    loop_barriers: str
    specialisation: str
    problems: str


class Compiled(NamedTuple):
    """What a workload launches on one architecture.

    Attributes:
        rows: by kernel and specialisation, in the order of first launches; one row with the error if the workload does
            not compile.
        predictions: of a timed workload on the architecture that predictions are for.
    """

    rows: dict[str, Row]
    predictions: list[Prediction]


def compiled(workload: Workload, arch: int) -> Compiled:
    try:
        directions = record(workload, DTYPE, arch)
    except Exception as error:  # the other workloads still compile
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Compiled({workload.name: Row(workload.name, "", str(arch), *[""] * 9, message)}, [])
    rows = {}
    for launch in itertools.chain.from_iterable(recorded.launches for recorded in directions.values()):
        name = specialisation(launch.kernel)
        if f"{launch.name} {name}" in rows:
            continue
        code = machine_code(launch.kernel)
        rows[f"{launch.name} {name}"] = Row(
            workload=workload.name,
            kernel=launch.name,
            arch=str(arch),
            warps=str(code.num_warps),
            registers=str(code.registers),
            shared=str(code.shared),
            blocks_per_multiprocessor=str(code.blocks_per_multiprocessor(arch)),
            spilled=str(code.spilled),
            matrix_instructions=" ".join(f"{count} {name}" for name, count in code.matrix_instructions.items()),
            loop_instructions=" ".join(str(loop.instructions) for loop in code.main_loops.values()),
            loop_barriers=" ".join(str(loop.barriers) for loop in code.main_loops.values()),
            specialisation=name,
            problems="; ".join(code.problems(arch)),
        )
    is_predicted = arch == predictions.ARCH and workload in TIMED
    return Compiled(rows, predictions_of(workload, DTYPE, directions) if is_predicted else [])


def _compiled_index(index: int, arch: int) -> Compiled:
    """Takes the workload's index, so that no workload is sent to another process."""
    return compiled(WORKLOADS[index], arch)


def compile_all(arches: list[int], names: list[str], processes: int) -> Iterator[tuple[list[Row], list[Prediction]]]:
    """What each workload launches on each architecture, in the table's order. Each specialisation comes once."""
    indices = [i for i, workload in enumerate(WORKLOADS) if workload.name in names]
    jobs = list(itertools.product(indices, arches))
    seen = set()
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(_compiled_index, *zip(*jobs, strict=True))
        for (_, arch), (rows, lines) in zip(jobs, results, strict=True):
            new = {key: row for key, row in rows.items() if (arch, key) not in seen}
            seen |= {(arch, key) for key in new}
            yield _numbered(list(new.values())), lines


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


def print_predictions(lines: list[Prediction]) -> None:
    print(f"\n{'predicted for an H100, us':<62}{'predicted':>10}{'floor':>10}{'% of floor':>12}")
    for line in lines:
        name = f"{line.workload} {line.direction}" if line.kernel == "total" else f"  {line.kernel} x {line.launches}"
        print(f"{name:<62}{line.predicted_us:>10}{line.floor_us:>10}{line.percent_of_floor:>12}")


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
    rows: list[Row] = []
    lines: list[Prediction] = []
    print(" ".join(f"{name:<{width}}" for name, width in zip(Row._fields, _WIDTHS, strict=True)))
    for some, some_lines in compile_all(options.arch, options.workloads, options.processes):
        for row in some:
            print(" ".join(f"{value:<{width}}" for value, width in zip(row, _WIDTHS, strict=True)).rstrip(), flush=True)
        rows += some
        lines += some_lines
    print_predictions(lines)
    problems = [row for row in rows if row.problems]
    unknown = [f"{line.workload} {line.kernel}: {line.not_modelled}" for line in lines if line.not_modelled]
    print(f"\n{len(rows)} kernels in {time.monotonic() - start:.0f} s, {len(problems)} with problems")
    print("\n".join([f"{len(unknown)} launches have loops that rounds.py does not know", *unknown]))
    is_whole = options.arch == list(TARGETS) and options.workloads == _NAMES
    if options.write:
        if not is_whole:
            parser.error("--write needs all architectures and workloads")
        write_table(rows)
        predictions.write_table(lines, compiler())
        return bool(problems or unknown)
    made_by, committed = read_table()
    if made_by != compiler():
        print(f"{TABLE.name} was made by {made_by}, but this is {compiler()}: not compared")
        return bool(problems or unknown)
    changed = differences(rows, committed, is_whole)
    print("\n".join([f"{len(changed)} differ from {TABLE.name}; --write updates it", *changed]))
    return bool(problems or unknown or changed)


_NAMES = [workload.name for workload in WORKLOADS]
_WIDTHS = (30, 40, 4, 5, 9, 7, 25, 7, 19, 30, 20, 14, 8)

if __name__ == "__main__":
    sys.exit(main())
