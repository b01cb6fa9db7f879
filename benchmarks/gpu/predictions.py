"""Predicted times on an H100, from the machine code: how the table predictions.csv is made and read.

A launch takes a start and the longest of four times:

- instructions: those that its programs execute (`rounds.py`), on the multiprocessor with most programs, at the rate
  that four schedulers reach with as many resident warps;
- memory: the bytes of its tensors at the rate of a copy;
- products: the FLOPs of its tiles at the rate of a large product;
- latency: the loads of its longest program that wait for each other, in kernels of few programs.

A matrix product or another operator of torch between the launches takes a start and the longer one of memory and
products.

`make aot WRITE=1` writes the table, so that its difference in git shows what a change of a kernel does. Nothing in it
was measured; expect errors of 40 %.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rounds import Execution, Rounds, execution
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workloads import Workload

from stamp_kernels.ops._served_by_triton import ServedByTriton
from stamp_kernels.profiling.measure import H100_RATES
from stamp_kernels.triton_kernels.aot import NUM_SCHEDULERS, TARGETS, Launch, compile_only, specialisation
from stamp_kernels.triton_kernels.machine_code import MachineCode, machine_code

TABLE = Path(__file__).parent / "predictions.csv"
ARCH = 90
CLOCK = 1.7e9
# Instructions that a scheduler issues in a cycle, by the number of its resident warps; no more with more warps.
ISSUE_RATES = (0.0, 0.35, 0.5, 0.6, 0.68)
START_SECONDS = 2e-6
LOAD_SECONDS = 0.8e-6


class Prediction(NamedTuple):
    """A line of the table, all as text: a kernel of a workload and direction, or their total.

    Attributes:
        direction: "forward", "backward", or "both" where the backward has no launches of its own: the forward without
            gradients is then another one.
        kernel: a kernel's name, "torch" for torch's operators, or "total".
        launches: launches with this grid and machine code.
        loop_instructions, loop_barriers, loop_rounds: of each innermost loop of at least 32 instructions. The rounds
            are the average of a program.
        programs: that have work, of one launch.
        instructions: millions of warp instructions that one launch executes.
        limit: which of the four times is the longest.
        predicted_us: of all launches.
        not_modelled: loops and kernels that `rounds.py` does not know; such a loop is counted once.
    """

    workload: str
    direction: str
    kernel: str
    launches: str
    tile: str = ""
    warps: str = ""
    registers: str = ""
    blocks_per_multiprocessor: str = ""
    loop_instructions: str = ""
    loop_barriers: str = ""
    loop_rounds: str = ""
    programs: str = ""
    instructions: str = ""
    limit: str = ""
    predicted_us: str = ""
    floor_us: str = ""
    percent_of_floor: str = ""
    not_modelled: str = ""


# The model


class Cost(NamedTuple):
    """What one launch is predicted to take.

    Attributes:
        loop_rounds: of each loop of the machine code, how often an average program comes through it.
        instructions: of all warps.
        times: seconds by name of the limit.
        not_modelled: names of loops that the execution does not have.
    """

    loop_rounds: tuple[float, ...]
    instructions: float
    times: dict[str, float]
    not_modelled: tuple[str, ...]

    @property
    def limit(self) -> str:
        """The name of the longest time."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def seconds(self) -> float:
        return START_SECONDS + self.times[self.limit]


def issue_rate(warps: float) -> float:
    """Instructions a cycle of a scheduler with this many resident warps, between ISSUE_RATES in a straight line."""
    below = min(int(warps), len(ISSUE_RATES) - 1)
    above = min(below + 1, len(ISSUE_RATES) - 1)
    return ISSUE_RATES[below] + (warps - below) * (ISSUE_RATES[above] - ISSUE_RATES[below])


def loop_rounds(code: MachineCode, rounds: Mapping[str, Rounds]) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """(how often a program comes through each loop, loops that `rounds` does not have): those count once."""
    copies: dict[str, list[int]] = {}
    for place, loop in enumerate(code.loops):
        copies.setdefault(loop.name, []).append(place)
    of_entry: list[float] = []
    not_modelled = []
    for place, loop in enumerate(code.loops):
        of_loop = rounds.get(loop.name)
        if isinstance(of_loop, tuple):
            is_complete = len(of_loop) == len(copies[loop.name])
            of_loop = of_loop[copies[loop.name].index(place)] if is_complete else None
        if of_loop is None:
            not_modelled.append(loop.name)
            of_loop = 1.0
        of_entry.append(of_loop)

    def total(place: int | None) -> float:
        return 1.0 if place is None else of_entry[place] * total(code.loops[place].parent)

    return tuple(total(place) for place in range(len(code.loops))), tuple(not_modelled)


def predicted_cost(code: MachineCode, executed: Execution, num_bytes: float) -> Cost:
    """Args: num_bytes: the memory traffic where the execution does not say it."""
    rounds, not_modelled = loop_rounds(code, executed.rounds)
    of_warp = code.instructions_outside * executed.outside
    of_warp += sum(n * loop.own_instructions for n, loop in zip(rounds, code.loops, strict=True))
    of_program = of_warp * code.num_warps
    programs = ceil(executed.programs / TARGETS[ARCH].num_processors)  # of the fullest multiprocessor
    resident = min(programs, code.blocks_per_multiprocessor(ARCH))
    rate = NUM_SCHEDULERS * issue_rate(resident * code.num_warps / NUM_SCHEDULERS)
    times = {
        "instructions": programs * of_program / rate / CLOCK,
        "memory": H100_RATES.floor_seconds(0, num_bytes if executed.num_bytes is None else executed.num_bytes),
        "products": H100_RATES.floor_seconds(executed.flops, 0),
        "latency": executed.dependent_rounds * LOAD_SECONDS,
    }
    return Cost(rounds, executed.programs * of_program, times, not_modelled)


# What a workload launches


class Operators(TorchDispatchMode):
    """Records (FLOPs, bytes) of each operator of torch that would launch something, on `meta` tensors.

    Views and allocations launch nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[float, float]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = ([x for x in tree_leaves(of) if isinstance(x, Tensor) and x.is_meta] for of in (args, result))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and "empty" not in name and outputs:
            if name.startswith("new_") or name.endswith("_like"):  # only the shape is read
                inputs = []
            elif kwargs.get("beta") == 0:  # a product that is not added to anything
                inputs = inputs[1:]
            flops = 2 * inputs[-2].numel() * inputs[-1].shape[-1] if name in ("mm", "addmm") else 0
            self.recorded.append((flops, sum(x.nbytes for x in (*inputs, *outputs))))
        return result


class Recorded(NamedTuple):
    """What one direction launches: the kernels, and (FLOPs, bytes) of torch's operators."""

    launches: list[Launch]
    operators: list[tuple[float, float]]


def record(workload: Workload, dtype: torch.dtype, arch: int) -> dict[str, Recorded]:
    """Compiles what each direction launches.

    The backward is what comes after the forward. If the forward launches something else where gradients are needed,
    there is "both" instead.
    """
    x = workload.inputs(torch.device("meta"), dtype)
    with compile_only(arch) as launches, Operators() as operators, ServedByTriton():
        workload.forward(x)
        forward = Recorded(launches.copy(), operators.recorded.copy())
        if not workload.leaves:
            return {"forward": forward}
        workload.run(x)
    end, end_of_operators = len(forward.launches), len(forward.operators)
    both = Recorded(launches[end:], operators.recorded[end_of_operators:])
    if [_key(launch) for launch in both.launches[:end]] != [_key(launch) for launch in forward.launches]:
        return {"forward": forward, "both": both}
    backward = Recorded(both.launches[end:], both.operators[end_of_operators:])
    return {"forward": forward, "backward": backward}


def _key(launch: Launch) -> tuple[str, str, tuple[int, ...]]:
    return launch.name, specialisation(launch.kernel), launch.grid


# The table


def predictions_of(workload: Workload, dtype: torch.dtype, directions: dict[str, Recorded]) -> list[Prediction]:
    """The lines of a workload: for each direction its kernels, torch's operators if there are any, and the total."""
    floors = [H100_RATES.floor_seconds(*work) for work in workload.work(dtype.itemsize)]
    floor_of = {"forward": floors[0], "backward": floors[1], "both": sum(floors)}
    lines = []
    for direction, (launches, operators) in directions.items():
        groups: dict[Any, list[Launch]] = {}
        for launch in launches:
            groups.setdefault(_key(launch), []).append(launch)
        total = 0.0
        for group in groups.values():
            line, seconds = _line(workload, direction, group[0], len(group))
            lines.append(line)
            total += seconds
        if operators:
            seconds = sum(START_SECONDS + H100_RATES.floor_seconds(*work) for work in operators)
            lines.append(Prediction(workload.name, direction, "torch", str(len(operators)), predicted_us=_us(seconds)))
            total += seconds
        lines.append(
            Prediction(
                workload.name,
                direction,
                "total",
                str(len(launches) + len(operators)),
                predicted_us=_us(total),
                floor_us=_us(floor_of[direction]),
                percent_of_floor=f"{100 * floor_of[direction] / total:.0f}",
            )
        )
    return lines


def _line(workload: Workload, direction: str, launch: Launch, count: int) -> tuple[Prediction, float]:
    """The line of `count` equal launches, and their seconds."""
    code = machine_code(launch.kernel)
    executed = execution(launch, workload)
    cost = predicted_cost(code, executed or Execution(prod(launch.grid)), _num_bytes(launch))
    seconds = count * cost.seconds
    line = Prediction(
        workload=workload.name,
        direction=direction,
        kernel=launch.name,
        launches=str(count),
        tile=_tile(launch),
        warps=str(code.num_warps),
        registers=str(code.registers),
        blocks_per_multiprocessor=str(code.blocks_per_multiprocessor(ARCH)),
        loop_instructions=" ".join(str(loop.instructions) for loop in code.main_loops.values()),
        loop_barriers=" ".join(str(loop.barriers) for loop in code.main_loops.values()),
        loop_rounds=" ".join(f"{cost.loop_rounds[place]:.4g}" for place in code.main_loops),
        programs=str(executed.programs if executed else prod(launch.grid)),
        instructions=f"{1e-6 * cost.instructions:.4g}",
        limit=cost.limit,
        predicted_us=_us(seconds),
        not_modelled=" ".join(dict.fromkeys(cost.not_modelled)) if executed else launch.name,
    )
    return line, seconds


def _num_bytes(launch: Launch) -> int:
    """The bytes of all tensors among the arguments. Reinterpreted ones have a `base`."""
    leaves = [getattr(x, "base", x) for x in tree_leaves(list(launch.arguments.values()))]
    return sum(x.nbytes for x in {id(x): x for x in leaves if isinstance(x, Tensor)}.values())


def _tile(launch: Launch) -> str:
    """The sizes of blocks among a launch's constants."""
    tile = launch.arguments.get("tile")
    sizes = launch.arguments if tile is None else tile._asdict()
    return "x".join(_text(sizes[name]) for name in _TILE_SIZES if name in sizes)


def _text(size: int | tuple[int, ...]) -> str:
    """A tuple has the size for each of several tensors."""
    return "+".join(map(str, size)) if isinstance(size, tuple) else str(size)


_TILE_SIZES = (
    "block_m", "block_n", "block_v", "BLOCK_TILES", "BLOCK_BUCKETS", "SEQUENCES", "ITEMS", "ROWS", "COLUMNS", "BLOCK",
)  # fmt: skip


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def write_table(lines: list[Prediction], compiler: str) -> None:
    text = io.StringIO(newline="")
    text.write(f"# predicted, not measured; H100; {compiler}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Prediction._fields)
    writer.writerows(lines)
    TABLE.write_text(text.getvalue())


def read_table() -> list[Prediction]:
    """The committed table."""
    with open(TABLE, newline="") as file:
        file.readline()
        return [Prediction(*line) for line in csv.reader(file)][1:]


def predicted_us(lines: list[Prediction]) -> dict[str, dict[str, float]]:
    """The totals: microseconds by workload and direction."""
    times: dict[str, dict[str, float]] = {}
    for line in lines:
        if line.kernel == "total":
            times.setdefault(line.workload, {})[line.direction] = float(line.predicted_us)
    return times
