"""Predicted times: how often loops run, what that costs, and the committed table."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_scripts import SCRIPTS

sys.path.append(str(SCRIPTS))
import machine_code
import predictions
from predictions import (
    START_SECONDS,
    Operators,
    Recorded,
    issue_rate,
    loop_rounds,
    predicted_cost,
    predictions_of,
    read_table,
)
from rounds import Execution, execution
from workloads import TIMED, Attention, CrossEntropy, Gather

from stamp_kernels.triton_kernels.aot import Launch
from stamp_kernels.triton_kernels.attention.tiles import Tile
from stamp_kernels.triton_kernels.cross_entropy.tiles import Layout
from stamp_kernels.triton_kernels.cross_entropy.tiles import Tile as LossTile
from stamp_kernels.triton_kernels.machine_code import Loop, MachineCode


def launch(name: str, grid: tuple[int, ...] = (1, 1, 1), **arguments: Any) -> Launch:
    return Launch(name, SimpleNamespace(), grid, arguments, is_hit=True)


def code(*loops: Loop, outside: int = 0, registers: int = 161) -> MachineCode:
    """Of 4 warps: with 161 registers three blocks fit a multiprocessor, three warps on each scheduler."""
    return MachineCode(registers, 40_960, 0, {"HGMMA": 26}, loops, outside, num_warps=4, expected=("HGMMA",))


def loop(name: str, instructions: int, parent: int | None = None, own: int | None = None) -> Loop:
    return Loop(name, instructions, 0, instructions if own is None else own, parent, is_innermost=own is None)


# How often loops run


def visible_pairs(num_queries: int, num_keys: int, causal: bool) -> torch.Tensor:
    """bool [num_queries, num_keys], aligned bottom-right."""
    pairs = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return pairs.tril(num_keys - num_queries) if causal else pairs


LENGTHS = dict(lengths=(100, 64, 33, 1, 200, 17, 78), lengths_q=(100, 64, 33, 1, 70, 40, 64))


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_scores_are_those_with_a_visible_pair(causal):
    """Forward and query kernel run a tile if one pair is visible; the first copy of their loop if all are."""
    workload = Attention("made", **LENGTHS, causal=causal)
    tile = Tile(64, 64, 1, causal, block_m=32, block_n=16)
    programs = some = every = 0
    for num_queries, num_keys in zip(workload.lengths_q, workload.lengths, strict=True):
        pairs = visible_pairs(num_queries, num_keys, causal)
        for rows in pairs.split(32, 0):
            programs += 1
            some += sum(bool(x.any()) for x in rows.split(16, 1))
            every += sum(bool(x.all()) and x.shape[1] == 16 for x in rows.split(16, 1))
    forward = execution(launch("stamp_attention_fwd_general_kernel", tile=tile, num_heads=3), workload)
    assert forward.programs == 3 * programs
    assert forward.rounds["_attend_keys.start_k"] == pytest.approx((every / programs, (some - every) / programs))
    assert forward.flops == pytest.approx(3 * some * 2 * 2 * 32 * 16 * 64)
    for has_whole_blocks, rounds in ((False, some / programs), (True, (every / programs, (some - every) / programs))):
        tile = tile._replace(has_whole_blocks=has_whole_blocks)
        query = execution(launch("stamp_attention_bwd_query_kernel", tile=tile, num_heads=3), workload)
        assert query.programs == 3 * programs
        assert query.rounds["_add_keys.start_k"] == pytest.approx(rounds)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_the_key_kernel(causal):
    """A tile runs if one of its queries sees its first key, the one that most queries see."""
    workload = Attention("made", **LENGTHS, causal=causal)
    tile = Tile(64, 64, 2, causal, block_m=32, block_n=16)
    programs = rounds = 0
    for num_queries, num_keys in zip(workload.lengths_q, workload.lengths, strict=True):
        for columns in visible_pairs(num_queries, num_keys, causal).split(16, 1):
            programs += 1
            rounds += sum(bool(x[:, 0].any()) for x in columns.split(32, 0))
    found = execution(launch("stamp_attention_bwd_key_kernel", tile=tile, num_heads_kv=3), workload)
    assert found.programs == 3 * programs
    assert found.rounds["stamp_attention_bwd_key_kernel.start_q"] == pytest.approx(rounds / programs)
    assert found.flops == pytest.approx(3 * 2 * rounds * 4 * 2 * 32 * 16 * 64)


@pytest.mark.parametrize(
    ("num_sequences", "rounds"), [(1, 0), (2, 1), (128, 1), (129, 2), (4096, 2), (16_384, 2), (16_385, 3)]
)
def test_rounds_of_the_search_for_a_tile(num_sequences, rounds):
    workload = Attention("made", lengths=(1,) * num_sequences)
    tile = Tile(64, 64, 1, False, block_m=64, block_n=64)
    found = execution(launch("stamp_attention_fwd_general_kernel", tile=tile, num_heads=1), workload)
    assert found.rounds["_search_tile.while"] == rounds


def test_rounds_of_the_cross_entropy():
    """1,000 rows, of which 900 have a target; 300 classes in tiles of 128: two whole ones and one masked."""
    workload = CrossEntropy("made", rows=1000, width=128, vocabulary=300)
    layout = Layout(1, False, 128, 16, 16, 1.0)
    arguments = dict(tile=LossTile(128, 128, 128, 64), layout=layout, num_softmaxes=1)
    forward = execution(
        launch("stamp_cross_entropy_fwd_kernel", (8, 1, 1), CLASSES_PER_SPLIT=4096, **arguments), workload
    )
    assert forward.programs == 8
    assert forward.rounds["_add_classes.start"] == (2, 1)
    assert forward.flops == 8 * 3 * 2 * 128 * 128 * 128
    hidden = execution(launch("stamp_cross_entropy_bwd_hidden_kernel", (8, 1, 1), **arguments), workload)
    assert hidden.rounds["_add_hidden_gradient.start"] == (2, 1)
    weight = launch(
        "stamp_cross_entropy_bwd_weight_kernel", (3, 1, 2), **arguments, WEIGHT_PER_STEP=False, ALL_CLASSES=True
    )
    assert execution(weight, workload).programs == 6
    assert execution(weight, workload).rounds["stamp_cross_entropy_bwd_weight_kernel.start"] == 4


def test_gather_reads_only_rows_that_it_writes():
    x, y = torch.empty(3000, 64, device="meta"), torch.empty(1000, 64, device="meta")
    row_map = torch.empty(1000, dtype=torch.int64, device="meta")
    arguments = dict(x=(SimpleNamespace(base=x),) * 2, y=(SimpleNamespace(base=y),) * 2, row_map_ptr=row_map)
    found = execution(launch("stamp_gather_rows_kernel", (32, 1, 1), **arguments), Gather("made", rows=3000))
    assert found == Execution(32, num_bytes=2 * 2 * 1000 * 64 * 4 + 8000)


def test_offsets_share_the_launch_of_the_importance():
    """4 programs for the importance, of three rounds each; one for the offsets, of two rounds."""
    arguments = dict(WIDTH=3000, COLUMNS=1024, num_sequences=1500, BLOCK=1024)
    found = execution(launch("stamp_prune_importance_and_offsets_kernel", (5, 1, 1), **arguments), TIMED[0])
    assert found.programs == 5 and found.dependent_rounds == 2
    assert found.rounds == {"importance_of_rows.start": 3 * 4 / 5, "write_kept_offsets.start": 2 / 5}


@pytest.mark.parametrize("name", ["stamp_new_kernel", "stamp_attention_fwd_general_kernel"])
def test_unknown_kernel_or_arguments_are_not_modelled(name):
    assert execution(launch(name, block=64), TIMED[0]) is None


# What that costs


def test_rounds_multiply_along_the_nest():
    """Copies have rounds of their own, in the order of the code."""
    loops = (
        loop("f.head", 150, own=50),
        loop("f.key", 100, parent=0),
        loop("g.copy", 40),
        loop("g.copy", 60),
        loop("g.every", 7),
        loop("g.every", 8),
    )
    rounds = {"f.head": 3, "f.key": 4.5, "g.copy": (2, 0), "g.every": 5}
    assert loop_rounds(code(*loops), rounds) == ((3, 13.5, 2, 0, 5, 5), ())


def test_loops_without_rounds_count_once_and_are_named():
    """So do loops with other copies than the execution knows."""
    loops = (loop("f.new", 100), loop("g.copy", 40), loop("", 10))
    assert loop_rounds(code(*loops), {"g.copy": (2, 3)}) == ((1, 1, 1), ("f.new", "g.copy", ""))


@pytest.mark.parametrize(
    ("warps", "rate"), [(0.25, 0.0875), (1, 0.35), (1.5, 0.425), (2, 0.5), (3, 0.6), (4, 0.68), (16, 0.68)]
)
def test_issue_rate(warps, rate):
    assert issue_rate(warps) == pytest.approx(rate)


def test_cost_by_hand():
    """Six programs on each of 132 multiprocessors, three at a time: twelve warps, so three on each scheduler.

    A warp executes 50 + 10 * 100 instructions, and the multiprocessor 6 * 4 * 1,050 at 4 * 0.6 a cycle: 10,500 cycles.
    """
    found = predicted_cost(code(loop("f.i", 100), outside=100), Execution(6 * 132, {"f.i": 10}, outside=0.5), 3_000_000)
    assert found.instructions == 6 * 132 * 4 * 1050
    assert found.times == pytest.approx(dict(instructions=10_500 / 1.7e9, memory=1e-6, products=0, latency=0))
    assert (found.limit, found.seconds) == ("instructions", pytest.approx(START_SECONDS + 10_500 / 1.7e9))


@pytest.mark.parametrize(
    ("executed", "limit", "seconds"),
    [
        (Execution(1, num_bytes=3e9), "memory", 1e-3),
        (Execution(1, flops=798e9), "products", 1e-3),
        (Execution(1, dependent_rounds=79), "latency", 79 * 0.8e-6),
    ],
)
def test_longest_time_is_the_limit(executed, limit, seconds):
    found = predicted_cost(code(outside=10), executed, 300)
    assert (found.limit, found.times[limit]) == (limit, pytest.approx(seconds))


def test_few_programs_leave_multiprocessors_idle():
    """One program of four warps: one warp on each scheduler, whatever would fit."""
    found = predicted_cost(code(outside=700), Execution(24), 0)
    assert found.times["instructions"] == pytest.approx(700 / 0.35 / 1.7e9)


def test_operators_that_launch_something_are_recorded():
    """(FLOPs, bytes) in fp32; views and allocations launch nothing, and what only gives the shape is not read."""
    a, b, out = (torch.empty(*shape, device="meta") for shape in [(8, 4), (4, 2), (8, 2)])
    with Operators() as operators:
        torch.mm(a, b)
        torch.addmm(out, a, b, out=out)
        torch.addmm(out, a, b, beta=0, out=out)
        a.t()[1:].new_empty(3)
        a.new_zeros(5)
        a.mul_(b.sum())
        torch.zeros(7)  # on the CPU
    product = 2 * 8 * 4 * 2
    assert operators.recorded == [
        (product, 4 * (32 + 8 + 16)),
        (product, 4 * (16 + 32 + 8 + 16)),
        (product, 4 * (32 + 8 + 16)),
        (0, 4 * 5),
        (0, 4 * (8 + 1)),
        (0, 4 * (32 + 1 + 32)),
    ]


def test_workload_by_hand(monkeypatch):
    """The biased forward of 256 sequences of 120 tokens and 6 heads.

    A program has 64 queries, a round of 64 keys and one of the masked rest: 400 + 436 + 515 = 1,351 instructions of
    each of 4 warps. 3,072 programs are 24 on a multiprocessor, three at a time: 24 * 4 * 1,351 / 2.4 = 54,040 cycles,
    31.8 us, and 2 us to start. q, k, v and out of 23.6 MB take 31.5 us.
    """
    loops = (loop("_attend_keys.start_k", n) for n in (436, 515))
    made = code(*loops, outside=400)
    monkeypatch.setattr(predictions, "machine_code", lambda kernel: made)
    monkeypatch.setattr(predictions, "_key", lambda launch: launch.name)
    workload = next(workload for workload in TIMED if workload.name == "L120.bias")
    rows = torch.empty(256 * 120, 6, 64, dtype=torch.bfloat16, device="meta")
    forward = launch(
        "stamp_attention_fwd_general_kernel", (4422, 1, 1), num_heads=6, tile=Tile(64, 64, 1, False, 64, 64),
        q_rows=(rows, 384, 64), others=[torch.empty_like(rows) for _ in range(3)],
    )  # fmt: skip
    kernel, total = predictions_of(workload, torch.bfloat16, {"forward": Recorded([forward], [])})
    assert kernel.limit == "instructions" and total.predicted_us == kernel.predicted_us == "33.8"
    assert (kernel.tile, kernel.programs, kernel.blocks_per_multiprocessor) == ("64x64", "3072", "3")
    assert (kernel.loop_instructions, kernel.loop_rounds) == ("436 515", "1 1")
    assert kernel.instructions == f"{3072 * 4 * 1351e-6:.4g}"
    assert total.floor_us == f"{1e6 * (4 * rows.nbytes + 4 * 256 * 120 * 6) / 3e12:.1f}" == "31.7"
    assert total.percent_of_floor == "94"
    assert kernel.not_modelled == ""


# The committed table


def test_table_predicts_every_timed_workload():
    """Each direction has a total, which is the sum of its lines; every loop is modelled."""
    lines = read_table()
    assert {line.not_modelled for line in lines} == {""}
    totals = {(line.workload, line.direction): line for line in lines if line.kernel == "total"}
    for workload in TIMED:
        directions = {direction for name, direction in totals if name == workload.name}
        # The gradients of wide hidden states come with the loss, which is another forward than that without gradients.
        is_chunked = isinstance(workload, CrossEntropy) and workload.width >= 512
        assert directions == {"forward", "both" if is_chunked else "backward"}
    for key, total in totals.items():
        of_direction = [x for x in lines if (x.workload, x.direction) == key and x is not total]
        times = [float(line.predicted_us) for line in of_direction]
        assert float(total.predicted_us) == pytest.approx(sum(times), abs=0.1 * len(times))
        assert int(total.launches) == sum(int(line.launches) for line in of_direction)
        share = 100 * float(total.floor_us) / float(total.predicted_us)
        assert float(total.percent_of_floor) == pytest.approx(share, abs=3)
        assert share < 101


def test_tables_agree():
    """The machine code of a predicted kernel is in machine_code.csv."""
    _, rows = machine_code.read_table()
    known = {
        (row.kernel.partition(".")[0], row.registers, row.loop_instructions, row.loop_barriers)
        for row in rows
        if row.arch == "90"
    }
    predicted = {
        (line.kernel, line.registers, line.loop_instructions, line.loop_barriers)
        for line in read_table()
        if line.registers
    }
    assert predicted and predicted <= known
