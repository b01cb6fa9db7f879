"""Compile what the launchers launch, for a GPU that need not be there, and read the machine code.

`compile_only` stands in for Triton's driver: within it a launch compiles its kernel for the target, with exactly the
specialisation that the launcher asks for, and runs nothing. Tensors are on the `meta` device, which has shapes, strides
and offsets but no memory. `machine_code` says what the compiler made: registers, shared memory, spills, matrix
instructions and the instructions of each loop.

Needs a process without TRITON_INTERPRET, which makes kernels that cannot be compiled.
"""

import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from stamp_kernels.triton_kernels.device import H100, DeviceProperties, stand_in

# Architectures by the number of their compute capability, each as a GPU that has it. What differs for the kernels is
# shared memory: sm_86, sm_89 and sm_120 (A10, L4, RTX 4090 and 5090) have 99 KB for a block.
TARGETS = {
    80: DeviceProperties((8, 0), 163 * 1024, 108),  # A100
    86: DeviceProperties((8, 6), 99 * 1024, 72),  # A10
    90: H100,
    100: DeviceProperties((10, 0), 227 * 1024, 148),  # B200
    120: DeviceProperties((12, 0), 99 * 1024, 170),  # RTX 5090
}

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Loops of fewer instructions are searches and prefix sums, of a few rounds.
_SMALLEST_LOOP = 32


class Launch(NamedTuple):
    """One launch that `compile_only` has turned into a compilation.

    Attributes:
        name: of the kernel's function.
        kernel: the compiled kernel; launches of one specialisation share it.
        grid: programs, three numbers.
        is_hit: whether Triton's cache on disk had it.
    """

    name: str
    kernel: CompiledKernel
    grid: tuple[int, ...]
    is_hit: bool


class _CompileOnlyDriver:
    """What Triton asks its driver when it compiles. The device's number is the architecture: each has its own cache."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _ProductsInto(TorchDispatchMode):
    """`addmm` into an fp32 output of 16-bit factors: torch 2.11's own kernel for `meta` raises a TypeError."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)


@contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Within the block, launches are compiled for `arch` (a key of TARGETS) and appended to the list that it gives."""
    launches: list[Launch] = []
    hits: list[bool] = []
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        hits.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.fn.__name__, kernel, tuple(grid), all(hits)))
        return kernel

    def note_cache_use(*, cache_hit: bool, **about: Any) -> None:
        hits.append(cache_hit)

    before = driver._active
    listener = triton.knobs.compilation.listener
    driver.set_active(_CompileOnlyDriver(arch))
    JITFunction.run = compile_instead
    triton.knobs.compilation.listener = note_cache_use
    try:
        with stand_in(TARGETS[arch]), _ProductsInto():
            yield launches
    finally:
        JITFunction.run = launch
        triton.knobs.compilation.listener = listener
        driver._active = before


class MachineCode(NamedTuple):
    """What the compiler made of one specialisation.

    Attributes:
        registers: of a thread.
        shared: bytes of a block.
        spilled: bytes of a thread in local memory.
        matrix_instructions: how many there are, by mnemonic.
        loops: instructions of each innermost loop of at least 32, in the order of the code.
        num_warps: of a block.
        wants: matrix instructions of which one must be there; empty where no product has 16-bit factors.
    """

    registers: int
    shared: int
    spilled: int
    matrix_instructions: dict[str, int]
    loops: tuple[int, ...]
    num_warps: int
    wants: tuple[str, ...]

    def problems(self, arch: int) -> list[str]:
        """What makes it unfit for such a GPU."""
        found = []
        if self.shared > TARGETS[arch].shared_memory:
            found.append(f"{self.shared} bytes of shared memory, a block may have {TARGETS[arch].shared_memory}")
        if self.spilled > 0:
            found.append(f"spills {self.spilled} bytes")
        if self.wants and not any(self.matrix_instructions.get(mnemonic) for mnemonic in self.wants):
            found.append(f"no {' or '.join(self.wants)} but {self.matrix_instructions}")
        return found


@functools.cache  # disassembling takes half a second, and launches of one specialisation share their kernel
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
        wants=_wanted_instructions(kernel),
    )


def specialisation(kernel: CompiledKernel) -> str:
    """A name for what the kernel was compiled with: equal for equal specialisations, on any machine."""
    source = kernel.src
    parts = (source.signature, source.constants, source.attrs, kernel.metadata.num_warps, kernel.metadata.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(disassembly: str) -> list[tuple[int, str]]:
    """(address, text without the predicate) of each instruction."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", disassembly, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def _innermost_loops(instructions: list[tuple[int, str]]) -> tuple[int, ...]:
    """How many instructions each loop without a loop in it has; a loop is what a branch backwards repeats."""
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
    return tuple(size for size in sizes if size >= _SMALLEST_LOOP)


def _wanted_instructions(kernel: CompiledKernel) -> tuple[str, ...]:
    """Which matrix instructions the products of a kernel ought to become."""
    products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(f16|bf16)> \*", kernel.asm["ttir"])
    if not products:
        return ()  # none, or of fp32 factors, which are multiplied exactly
    arch = kernel.metadata.target.arch
    if arch // 10 == 10:
        return "UTCHMMA", "HMMA"
    has_warp_group_tile = kernel.metadata.num_warps >= 4 and any(int(rows) >= 64 for rows, _ in products)
    return ("HGMMA",) if arch == 90 and has_warp_group_tile else ("HMMA",)
