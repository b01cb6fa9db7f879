"""Read a compiled kernel's machine code: registers, shared memory, spills, matrix instructions and loops."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

from stamp_kernels.triton_kernels.aot import TARGETS

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shorter loops are searches and prefix sums of a few rounds.
_MIN_LOOP_INSTRUCTIONS = 32


class MachineCode(NamedTuple):
    """What the compiler made of one specialisation.

    Attributes:
        registers: registers of a thread.
        shared: bytes of shared memory of a block.
        spilled: bytes of local memory of a thread.
        matrix_instructions: the number of matrix instructions by mnemonic.
        loops: the number of instructions of each innermost loop, in the order of the code; loops of fewer than 32
            instructions are left out.
        num_warps: warps of a block.
        expected: mnemonics, one of which must occur; empty where no product has 16-bit factors.
    """

    registers: int
    shared: int
    spilled: int
    matrix_instructions: dict[str, int]
    loops: tuple[int, ...]
    num_warps: int
    expected: tuple[str, ...]

    def problems(self, arch: int) -> list[str]:
        """Why a GPU of this architecture cannot run the kernel, or runs it slowly."""
        found = []
        if self.shared > TARGETS[arch].shared_memory:
            found.append(f"{self.shared} bytes of shared memory, a block may have {TARGETS[arch].shared_memory}")
        if self.spilled > 0:
            found.append(f"spills {self.spilled} bytes")
        if self.expected and not any(self.matrix_instructions.get(mnemonic) for mnemonic in self.expected):
            found.append(f"no {' or '.join(self.expected)} but {self.matrix_instructions}")
        return found


@functools.cache  # launches of one specialisation share a kernel, and disassembly takes half a second
def machine_code(kernel: CompiledKernel) -> MachineCode:
    """Read a compiled kernel's resources and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        instructions = _instructions(_run("cuobjdump", "--dump-sass", file.name))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    mnemonics = [text.partition(".")[0].partition(" ")[0] for _, text in instructions]
    matrix = ("HGMMA", "UTCHMMA", "HMMA")
    return MachineCode(
        registers=resources["REG"],
        shared=kernel.metadata.shared,
        spilled=resources["STACK"] + resources["LOCAL"],
        matrix_instructions={name: mnemonics.count(name) for name in matrix if name in mnemonics},
        loops=_innermost_loops(instructions),
        num_warps=kernel.metadata.num_warps,
        expected=_expected_instructions(kernel),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(disassembly: str) -> list[tuple[int, str]]:
    """(address, text without the predicate) of every instruction."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", disassembly, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def _innermost_loops(instructions: list[tuple[int, str]]) -> tuple[int, ...]:
    """The number of instructions of each loop that contains no other loop. A backward branch ends a loop."""
    spans = set()
    for address, text in instructions:
        target = re.match(r"BRA.*?(?:0x|`\()([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.add((int(target[1], 16), address))
    innermost = [
        (low, high)
        for low, high in spans
        if not any(low <= a and b <= high and (a, b) != (low, high) for a, b in spans)
    ]
    sizes = [sum(low <= address <= high for address, _ in instructions) for low, high in sorted(innermost)]
    return tuple(size for size in sizes if size >= _MIN_LOOP_INSTRUCTIONS)


def _expected_instructions(kernel: CompiledKernel) -> tuple[str, ...]:
    """The matrix instructions that the compiler should make of a kernel's products."""
    products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(f16|bf16)> \*", kernel.asm["ttir"])
    if not products:
        return ()  # no products, or products of fp32 factors, which are exact and use no matrix units
    arch = kernel.metadata.target.arch
    if arch // 10 == 10:
        return "UTCHMMA", "HMMA"
    has_warp_group_tile = kernel.metadata.num_warps >= 4 and any(int(rows) >= 64 for rows, _ in products)
    return ("HGMMA",) if arch == 90 and has_warp_group_tile else ("HMMA",)
