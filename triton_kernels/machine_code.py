"""Read a compiled kernel's machine code: registers, shared memory, spills, matrix instructions, loops and barriers."""

import ast
import functools
import re
import subprocess
import tempfile
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

from stamp_kernels.triton_kernels.aot import TARGETS, blocks_per_multiprocessor

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SOURCES = Path(__file__).parent
# Shorter loops are searches and prefix sums of a few rounds.
_MIN_LOOP_INSTRUCTIONS = 32
# Waits for other warps, for asynchronous copies, or for the other threads of a warp.
_BARRIERS = ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC")


class Instruction(NamedTuple):
    """One instruction of a disassembly.

    Attributes:
        text: mnemonic and operands, without the predicate.
        target: the address that a branch goes to.
        file, line: where the instruction comes from.
    """

    address: int
    text: str
    target: int | None
    file: str
    line: int

    @property
    def mnemonic(self) -> str:
        return re.split(r"[. ]", self.text, maxsplit=1)[0]


class Loop(NamedTuple):
    """A loop in the machine code.

    Attributes:
        name: the loop of the source that it comes from, `function.variable` or `function.while`. Loops of one name are
            copies, for instance where a function is inlined twice. Empty if the loop is not in this package.
        instructions, barriers: the number of both in the loop and the loops within it.
        own_instructions: without those of the loops within it.
        parent: the place in `MachineCode.loops` of the smallest loop around it, or None.
        is_innermost: whether no other loop is within it.
    """

    name: str
    instructions: int
    barriers: int
    own_instructions: int
    parent: int | None
    is_innermost: bool


class MachineCode(NamedTuple):
    """What the compiler made of one specialisation.

    Attributes:
        registers: registers of a thread.
        shared: bytes of shared memory of a block.
        spilled: bytes of local memory of a thread.
        matrix_instructions: the number of matrix instructions by mnemonic.
        loops: all loops, in the order of the code.
        instructions_outside: the number of instructions in no loop.
        num_warps: warps of a block.
        expected: mnemonics, one of which must occur; empty where no product has 16-bit factors.
        repeated: products of which several warps compute the same part, in words.
    """

    registers: int
    shared: int
    spilled: int
    matrix_instructions: dict[str, int]
    loops: tuple[Loop, ...]
    instructions_outside: int
    num_warps: int
    expected: tuple[str, ...]
    repeated: tuple[str, ...] = ()

    @property
    def main_loops(self) -> dict[int, Loop]:
        """The innermost loops of at least 32 instructions, by their place in `loops`."""
        return {
            place: loop
            for place, loop in enumerate(self.loops)
            if loop.is_innermost and loop.instructions >= _MIN_LOOP_INSTRUCTIONS
        }

    def blocks_per_multiprocessor(self, arch: int) -> int:
        return blocks_per_multiprocessor(arch, self.registers, self.shared, self.num_warps)

    def problems(self, arch: int) -> list[str]:
        """Why a GPU of this architecture cannot run the kernel, or runs it slowly."""
        found = []
        if self.shared > TARGETS[arch].shared_memory:
            found.append(f"{self.shared} bytes of shared memory, a block may have {TARGETS[arch].shared_memory}")
        if self.spilled > 0:
            found.append(f"spills {self.spilled} bytes")
        if self.expected and not any(self.matrix_instructions.get(mnemonic) for mnemonic in self.expected):
            found.append(f"no {' or '.join(self.expected)} but {self.matrix_instructions}")
        found += self.repeated
        return found


@functools.cache  # launches of one specialisation share a kernel, and disassembly takes half a second
def machine_code(kernel: CompiledKernel) -> MachineCode:
    """Read a compiled kernel's resources and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        instructions = parse_disassembly(_run("nvdisasm", "--print-code", "--print-line-info", file.name))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    mnemonics = [instruction.mnemonic for instruction in instructions]
    matrix = ("HGMMA", "UTCHMMA", "HMMA")
    loops, instructions_outside = find_loops(instructions)
    return MachineCode(
        registers=resources["REG"],
        shared=kernel.metadata.shared,
        spilled=resources["STACK"] + resources["LOCAL"],
        matrix_instructions={name: mnemonics.count(name) for name in matrix if name in mnemonics},
        loops=loops,
        instructions_outside=instructions_outside,
        num_warps=kernel.metadata.num_warps,
        expected=_expected_instructions(kernel),
        repeated=repeated_products(kernel.asm["ttgir"]),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def parse_disassembly(disassembly: str) -> list[Instruction]:
    """The instructions of a kernel, from `nvdisasm --print-code --print-line-info`."""
    labels: dict[str, int] = {}
    new_labels: list[str] = []
    file, line = "", 0
    found = []
    for text in disassembly.splitlines():
        if match := re.match(r'\s*//## File "(.*?)", line (\d+)', text):
            file, line = match[1], int(match[2])
        elif match := re.match(r"(\.L_x_\d+):", text):
            new_labels.append(match[1])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text):
            address = int(match[1], 16)
            labels |= dict.fromkeys(new_labels, address)
            new_labels = []
            found.append((address, match[2], file, line))
    instructions = []
    for address, text, file, line in found:
        branch = re.match(r"BRA.*`\((\.L_x_\d+)\)", text)
        instructions.append(Instruction(address, text, labels.get(branch[1]) if branch else None, file, line))
    return instructions


def find_loops(instructions: list[Instruction]) -> tuple[tuple[Loop, ...], int]:
    """(loops, number of instructions in no loop). A backward branch ends a loop.

    What follows the end of the program, a branch to itself and NOPs, is not counted.
    """
    body = list(instructions)
    while body and (body[-1].mnemonic == "NOP" or body[-1].target == body[-1].address):
        body.pop()
    ends = {(x.target, x.address): x for x in body if x.target is not None and x.target < x.address}
    spans = sorted(ends)
    loops = []
    for low, high in spans:
        within = [(a, b) for a, b in spans if low <= a and b <= high and (a, b) != (low, high)]
        # Code that is moved behind the end jumps back into a loop, so that two loops may overlap.
        around = [(a, b) for a, b in spans if a <= low and high <= b and (a, b) != (low, high)]
        of_loop = [x for x in body if low <= x.address <= high]
        loops.append(
            Loop(
                name=_source_loop(ends[low, high]),
                instructions=len(of_loop),
                barriers=sum(x.mnemonic in _BARRIERS for x in of_loop),
                own_instructions=sum(not any(a <= x.address <= b for a, b in within) for x in of_loop),
                parent=spans.index(min(around, key=lambda span: span[1] - span[0])) if around else None,
                is_innermost=not within,
            )
        )
    outside = sum(not any(low <= x.address <= high for low, high in spans) for x in body)
    return tuple(loops), outside


def _source_loop(branch: Instruction) -> str:
    """The name of the source's innermost loop around a branch, from `ast` of the file that it comes from.

    The path in a kernel from Triton's cache is that of the checkout that compiled it, of the same source.
    """
    _, package, path = branch.file.rpartition("/triton_kernels/")
    loops = _loops_of(_SOURCES / path) if package else []
    around = [(end - start, name) for start, end, name in loops if start <= branch.line <= end]
    return min(around)[1] if around else ""


@functools.cache
def _loops_of(file: Path) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of every loop in a file."""
    loops = []
    for function in ast.walk(ast.parse(file.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.For):
                loops.append((node.lineno, node.end_lineno, f"{function.name}.{ast.unparse(node.target)}"))
            elif isinstance(node, ast.While):
                loops.append((node.lineno, node.end_lineno, f"{function.name}.while"))
    return loops


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


def repeated_products(ttgir: str) -> tuple[str, ...]:
    """The products of which several warps compute the same part, from a kernel in Triton's GPU dialect.

    The layout of a result says which warp has which part of it. The result of tcgen05 is in tensor memory, and its
    layout is that of the load from there.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(\w+<\{.*\}>)$", ttgir, re.MULTILINE))
    results = re.findall(
        r"= (?:tt\.dot|ttng\.warp_group_dot|ttng\.tmem_load) .*-> \(?tensor<([\dx]+)x\w+, (#\w+)>", ttgir
    )
    found = []
    for shape, name in dict.fromkeys(results):
        copies = _warps_of_each_part([int(size) for size in shape.split("x")], layouts[name])
        if copies > 1:
            found.append(f"{copies} warps compute each part of a {shape} product")
    return tuple(dict.fromkeys(found))


def _warps_of_each_part(shape: list[int], layout: str) -> int:
    """How many warps have the same part of a result. `layout` is a definition of ttgir without its name."""
    kind, _, text = layout.partition("<")
    fields = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+) = (\[[^=]*\]|\d+)(?:,|\})", text)}
    if kind == "linear":  # one vector for each bit of the warp's number: where the part of the warp is
        return 2 ** sum(not any(vector) for vector in fields["warp"])
    if kind == "nvidia_mma":
        of_warp = fields["instrShape"]
        if fields["versionMajor"] == 3:  # wgmma: rows of a warp, columns, and the length of the sums
            of_warp = of_warp[:-1]
        of_warp = [1] * (len(shape) - len(of_warp)) + of_warp
    else:  # blocked
        of_warp = [a * b for a, b in zip(fields["sizePerThread"], fields["threadsPerWarp"], strict=True)]
    warps = zip(shape, of_warp, fields["warpsPerCTA"], strict=True)
    return prod(max(1, count // ceil(size / part)) for size, part, count in warps)
