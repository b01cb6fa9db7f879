"""What the compiler makes of the kernels on five GPU architectures: they fit, do not spill, use the matrix units."""

import importlib
import pkgutil
import sys

import pytest
import torch
from gpu_scripts import SCRIPTS, run_script
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(SCRIPTS))
from machine_code import WORKLOADS, Row, differences, read_table

from stamp_kernels import triton_kernels
from stamp_kernels.triton_kernels.aot import TARGETS, compile_only
from stamp_kernels.triton_kernels.machine_code import MachineCode, _innermost_loops, _instructions

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


GOOD = MachineCode(
    registers=128, shared=32768, spilled=0, matrix_instructions={"HGMMA": 12}, loops=(100,), num_warps=4,
    expected=("HGMMA",),
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
    ],
    ids=str,
)
def test_problems(arch, changed, problems):
    assert GOOD._replace(**changed).problems(arch) == problems


ROW = Row("L120", "stamp_attention_fwd_short_kernel", "90", "4", "161", "40960", "0", "38 HGMMA", "809", "abc", "")


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


def test_innermost_loops_are_counted_by_instructions():
    """Outer loops, loops of fewer than 32 instructions and forward branches are not counted."""
    body = [f"        /*{16 * i:04x}*/                   FFMA R1, R2, R3, R4 ;" for i in range(120)]

    def branch(at: int, to: int) -> None:
        body[at] = f"        /*{16 * at:04x}*/               @!P0 BRA 0x{16 * to:x} ;"

    branch(50, 10)  # 41 instructions
    branch(60, 5)  # around it
    branch(75, 70)  # a few
    branch(80, 119)  # forwards
    branch(118, 80)  # 39
    assert _innermost_loops(_instructions("\n".join(body))) == (41, 39)


def test_interpreted_kernels_are_refused():
    run = run_script("machine_code.py", TRITON_INTERPRET="1")
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr
