"""What the compiler makes of the kernels on five GPU architectures: they fit, do not spill, use the matrix units."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gpu_scripts import SCRIPTS, run_script
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(SCRIPTS))
from machine_code import WORKLOADS, Row, differences, read_table

from stamp_kernels import triton_kernels
from stamp_kernels.triton_kernels.aot import TARGETS, blocks_per_multiprocessor, compile_only
from stamp_kernels.triton_kernels.attention import centrality
from stamp_kernels.triton_kernels.machine_code import (
    Loop,
    MachineCode,
    find_loops,
    parse_disassembly,
    repeated_products,
)

MODULES = [module.name for module in pkgutil.walk_packages(triton_kernels.__path__, f"{triton_kernels.__name__}.")]
# One for each kernel and for what changes its code most; `make aot` compiles all.
COMPILED_HERE = (
    "L120.bias.dropout.centrality", "L240.bias.dropout", "L2048.GQA.d128.causal", "L24.bias", "L240.d72",
    "CE.D128.V4096", "CE.K4.shared", "CE.D768.V50257", "prune.256x240",
)  # fmt: skip


def test_kernels_are_as_in_the_table():
    """No problem on any architecture, and the figures of the committed table. The output says what differs."""
    run = run_script("machine_code.py", "--workloads", *COMPILED_HERE)
    assert run.returncode == 0, run.stdout + run.stderr


def test_table_has_every_kernel_and_no_problem():
    _, rows = read_table()
    assert {row.arch for row in rows} == {str(arch) for arch in TARGETS}
    assert {row.problems for row in rows} == {""}
    assert {row.spilled for row in rows} == {"0"}
    assert {row.workload for row in rows} <= {workload.name for workload in WORKLOADS}
    modules = map(importlib.import_module, MODULES)
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {row.kernel.partition(".")[0] for row in rows} == kernels


class AddmmRaises(TorchDispatchMode):
    """Like torch 2.11's `meta` kernel where the output has another dtype than the factors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.dtype_out:
            raise TypeError("addmm() got multiple values for argument 'beta'")
        return func(*args, **(kwargs or {}))


def test_products_into_an_output_need_no_meta_kernel():
    factor = torch.empty(3, 3, dtype=torch.bfloat16, device="meta")
    out = torch.empty(3, 3, device="meta")
    with AddmmRaises(), compile_only(90):
        assert torch.addmm(out, factor, factor, out_dtype=torch.float32, beta=0, out=out) is out


REPEATED = "2 warps compute each part of a 64x64 product"
GOOD = MachineCode(
    registers=128, shared=32768, spilled=0, matrix_instructions={"HGMMA": 12}, loops=(), instructions_outside=100,
    num_warps=4, expected=("HGMMA",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "changed", "problems"),
    [
        (90, dict(), []),
        (90, dict(shared=233_472), ["233472 bytes of shared memory, a block may have 232448"]),
        (86, dict(shared=131_072), ["131072 bytes of shared memory, a block may have 101376"]),
        (90, dict(spilled=8), ["spills 8 bytes"]),
        (90, dict(matrix_instructions={"HMMA": 24}), ["no HGMMA but {'HMMA': 24}"]),
        (90, dict(matrix_instructions={}, expected=()), []),
        (90, dict(repeated=(REPEATED,)), [REPEATED]),
    ],
    ids=str,
)
def test_problems(arch, changed, problems):
    assert GOOD._replace(**changed).problems(arch) == problems


def mma(version, warps, instruction):
    return (
        f"nvidia_mma<{{versionMajor = {version}, versionMinor = 0, warpsPerCTA = {warps}, instrShape = {instruction}}}>"
    )


def linear(*warps):
    """Layouts of results in tensor memory; the vectors are those of the bits of the warp's number."""
    warp = [list(vector) for vector in warps]
    return f"linear<{{register = [[0, 1], [0, 2]], lane = [[1, 0], [2, 0]], warp = {warp}, block = []}}>"


@pytest.mark.parametrize(
    ("operator", "shape", "layout", "warps"),
    [
        ("ttng.warp_group_dot", "64x64", mma(3, [8, 1], [16, 64, 16]), 2),  # both warp groups of a 64-row tile
        ("ttng.warp_group_dot", "128x64", mma(3, [8, 1], [16, 64, 16]), 1),
        ("ttng.warp_group_dot", "64x128", mma(3, [4, 2], [16, 64, 16]), 1),
        ("ttng.warp_group_dot", "64x64", mma(3, [4, 2], [16, 64, 16]), 2),
        ("tt.dot", "64x64", mma(2, [4, 2], [16, 8]), 1),
        ("tt.dot", "64x64", mma(2, [8, 1], [16, 8]), 2),
        ("tt.dot", "16x16", mma(2, [1, 4], [16, 8]), 2),
        ("tt.dot", "16x16", mma(2, [4, 4], [16, 8]), 8),
        ("tt.dot", "4x16x16", mma(2, [4, 1, 1], [1, 16, 8]), 1),
        ("ttng.tmem_load", "64x64", linear((16, 0), (32, 0), (0, 32)), 1),
        ("ttng.tmem_load", "64x16", linear((16, 0), (32, 0), (0, 0)), 2),
        ("tt.dot", "32x32", "blocked<{sizePerThread = [4, 4], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1]}>", 2),
    ],
)
def test_warps_that_repeat_a_product(operator, shape, layout, warps):
    ttgir = (
        f"#mma = #ttg.{layout}\n      %z = {operator} %a, %b : !ttg.memdesc<64x64xbf16> -> tensor<{shape}xf32, #mma>\n"
    )
    assert repeated_products(ttgir) == ((f"{warps} warps compute each part of a {shape} product",) if warps > 1 else ())


ROW = Row(
    workload="L120", kernel="stamp_attention_fwd_short_kernel", arch="90", warps="4", registers="161", shared="40960",
    blocks_per_multiprocessor="3", spilled="0", matrix_instructions="38 HGMMA", loop_instructions="809",
    loop_barriers="6", specialisation="abc", problems="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("now", "before", "is_whole", "expected"),
    [
        ([ROW], [ROW], True, []),
        ([ROW._replace(workload="L240")], [ROW], True, []),  # the first to launch it has changed, nothing else
        ([ROW._replace(loop_instructions="900")], [ROW], False, ["loops 809", "loops 900"]),
        ([ROW], [], False, ["none -> 161 registers"]),
        ([], [ROW], True, ["loops 809 -> none"]),
        ([], [ROW], False, []),
    ],
    ids=["same", "moved", "longer loop", "new", "gone", "not looked at"],
)
def test_differences(now, before, is_whole, expected):
    found = differences(now, before, is_whole)
    assert len(found) == bool(expected)
    assert all(text in found[0] for text in expected)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "blocks"),
    [
        (90, 161, 40_960, 4, 3),  # 168 registers: 3 warps of 5,376 on each scheduler's 16,384
        (90, 32, 0, 4, 16),  # 64 warps
        (90, 24, 0, 1, 32),  # 32 blocks
        (90, 216, 7168, 1, 8),  # 2 warps on each scheduler, although 65,536 registers are enough for 9
        (90, 32, 131_072, 8, 1),  # 129 KB of 228
        (90, 128, 37_888, 4, 4),  # 512 threads of 128 registers
        (86, 32, 0, 4, 12),  # 48 warps
        (86, 32, 50_176, 4, 2),  # with the reserved kilobyte exactly half of 100 KB
        (86, 32, 50_177, 4, 1),
        (86, 16, 0, 1, 16),
        (120, 16, 0, 1, 24),
        (80, 255, 0, 8, 1),
        (80, 64, 54_272, 4, 3),  # 54 KB of 164
    ],
)
def test_blocks_per_multiprocessor(arch, registers, shared, num_warps, blocks):
    """By hand, from the table of compute capabilities and the rules of CUDA's occupancy calculator."""
    assert blocks_per_multiprocessor(arch, registers, shared, num_warps) == blocks


def disassembly(
    *, num_instructions: int, branches: dict[int, int], lines: dict[int, str], barriers: Sequence[int] = ()
):
    """nvdisasm's text: FFMAs, `branches` from an instruction to another, and source lines of this package by text."""
    text = Path(centrality.__file__).read_text().splitlines()
    output = ["kernel:", ".text.kernel:"]
    for i in range(num_instructions):
        if i in lines:
            line = next(n for n, source in enumerate(text, 1) if lines[i] in source)
            output.append(f'\t//## File "/elsewhere/stamp_kernels/triton_kernels/attention/centrality.py", line {line}')
        output += [f".L_x_{i}:"] if i in branches.values() else []
        instruction = "BAR.SYNC.DEFER_BLOCKING 0x0" if i in barriers else "FFMA R1, R2, R3, R4"
        if i in branches:
            instruction = f"@!P0 BRA `(.L_x_{branches[i]})"
        output.append(f"        /*{16 * i:04x}*/                   {instruction} ;")
    return "\n".join(output)


def test_loops_of_a_disassembly():
    """An outer loop, the two within it and a short one; forward branches and the end of the program are no loops."""
    text = disassembly(
        num_instructions=128,
        branches={50: 10, 60: 5, 75: 70, 80: 119, 118: 80, 127: 127},
        lines={0: "row = tl.program_id(0)", 50: "for start_q in range(begin_q", 60: "for head in range(num_heads):"},
        barriers=(8, 20, 30, 90),
    )
    loops, outside = find_loops(parse_disassembly(text + "\n        /*0800*/                   NOP ;"))
    outer, heads = "stamp_attention_centrality_kernel.head", "_add_queries.start_q"
    assert loops == (
        Loop(outer, instructions=56, barriers=3, own_instructions=15, parent=None, is_innermost=False),
        Loop(heads, instructions=41, barriers=2, own_instructions=41, parent=0, is_innermost=True),
        Loop(outer, instructions=6, barriers=0, own_instructions=6, parent=None, is_innermost=True),
        Loop(outer, instructions=39, barriers=1, own_instructions=39, parent=None, is_innermost=True),
    )
    assert outside == 127 - 56 - 6 - 39  # up to the branch to itself
    code = GOOD._replace(loops=loops)
    assert list(code.main_loops) == [1, 3]


def test_loops_that_overlap():
    """A jump back from the end into the middle of a loop; the loop within it is the innermost one of both."""
    text = disassembly(num_instructions=100, branches={60: 10, 50: 40, 90: 20}, lines={})
    loops, outside = find_loops(parse_disassembly(text))
    assert [(loop.instructions, loop.own_instructions, loop.is_innermost) for loop in loops] == [
        (51, 40, False), (71, 60, False), (11, 11, True),
    ]  # fmt: skip
    assert [loop.parent for loop in loops] == [None, None, 0]
    assert outside == 10 + 9


def test_loops_of_other_packages_have_no_name():
    text = disassembly(num_instructions=50, branches={40: 2}, lines={0: "for head in range(num_heads):"})
    (loop,), _ = find_loops(parse_disassembly(text.replace("/triton_kernels/", "/triton/language/")))
    assert loop.name == ""


def test_interpreted_kernels_are_refused():
    run = run_script("machine_code.py", TRITON_INTERPRET="1")
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr
