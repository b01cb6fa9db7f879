"""Compile what the launchers launch, for a GPU that this machine does not need to have.

Within `compile_only` a launch compiles its kernel for the target, with exactly the specialisation that the launcher
asks for, and runs nothing: a stand-in answers what Triton asks its driver. Tensors are on the `meta` device, which has
shapes, strides and offsets but no memory. `machine_code.py` reads what the compiler made.

Needs a process without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from stamp_kernels.triton_kernels.device import H100, DeviceProperties, stand_in

# One GPU for each architecture, by the number of its compute capability. The architectures differ for the kernels in
# shared memory: a block has 99 KB on sm_86, sm_89 and sm_120 (A10, L4, RTX 4090 and 5090).
TARGETS = {
    80: DeviceProperties((8, 0), 163 * 1024, 108),  # A100
    86: DeviceProperties((8, 6), 99 * 1024, 72),  # A10
    90: H100,
    100: DeviceProperties((10, 0), 227 * 1024, 148),  # B200
    120: DeviceProperties((12, 0), 99 * 1024, 170),  # RTX 5090
}


class Multiprocessor(NamedTuple):
    """What the blocks on one multiprocessor share, besides its 65,536 registers.

    Attributes:
        shared_memory: bytes of shared memory for all blocks; each block takes 1 KB more than it asks for.
        warps, blocks: the most that can be resident.
    """

    shared_memory: int
    warps: int
    blocks: int


# By architecture, as in the table of compute capabilities in the CUDA C++ Programming Guide.
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, warps=64, blocks=32),
    86: Multiprocessor(100 * 1024, warps=48, blocks=16),
    90: Multiprocessor(228 * 1024, warps=64, blocks=32),
    100: Multiprocessor(228 * 1024, warps=64, blocks=32),
    120: Multiprocessor(100 * 1024, warps=48, blocks=24),
}
# A quarter of a multiprocessor has a scheduler and a quarter of the registers.
NUM_SCHEDULERS = 4
_REGISTERS_PER_SCHEDULER = 65536 // NUM_SCHEDULERS
# The units in which a warp gets registers and a block gets shared memory.
_REGISTER_UNIT, _SHARED_UNIT = 256, 128
_RESERVED_SHARED_MEMORY = 1024


def blocks_per_multiprocessor(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """How many blocks fit a multiprocessor at once (the occupancy), by the rules of CUDA's occupancy calculator.

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a block.
    """
    limits = MULTIPROCESSORS[arch]
    registers_of_warp = triton.cdiv(32 * registers, _REGISTER_UNIT) * _REGISTER_UNIT
    warps = min(limits.warps, _REGISTERS_PER_SCHEDULER // registers_of_warp * NUM_SCHEDULERS)
    shared_of_block = triton.cdiv(shared + _RESERVED_SHARED_MEMORY, _SHARED_UNIT) * _SHARED_UNIT
    return min(limits.blocks, warps // num_warps, limits.shared_memory // shared_of_block)


class Launch(NamedTuple):
    """One launch that `compile_only` has turned into a compilation.

    Attributes:
        name: the name of the kernel's function.
        kernel: the compiled kernel; launches of one specialisation share it.
        grid: the number of programs in each of three dimensions.
        arguments: the kernel's arguments by name, and the launch options.
        is_hit: whether Triton's cache on disk had the kernel.
    """

    name: str
    kernel: CompiledKernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    is_hit: bool


class _CompileOnlyDriver:
    """Answers what Triton asks its driver for a compilation.

    The device number is the architecture, so that every architecture has its own cache of compiled kernels.
    """

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


class _NoBinary:
    """What Triton asks the driver's utilities for before the first launch of a kernel."""

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        return None, device, 0, 0, 1024  # module, function, registers, spills, threads of the largest block

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": TARGETS[device].shared_memory}


class _LaunchNothingDriver(_CompileOnlyDriver):
    """Takes launches and does nothing, so that all of Triton's own path runs up to its C launcher."""

    utils = _NoBinary()

    def __init__(self, arch: int, launched: Callable[..., None]) -> None:
        super().__init__(arch)
        self.launched = launched

    @staticmethod
    def launcher_cls(source: ASTSource, metadata: Any) -> Callable[..., None]:
        # A compiled kernel keeps its launcher, also for another driver of the same architecture.
        return lambda *args: driver.active.launched(source, *args)


class _ProductsInto(TorchDispatchMode):
    """Answers `addmm` into an fp32 output of 16-bit factors: torch 2.11's `meta` kernel raises a TypeError."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)


@contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Compile every launch in the block for `arch` (a key of TARGETS) and append it to the list that is yielded."""
    launches: list[Launch] = []
    hits: list[bool] = []
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        hits.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, kernel, tuple(grid), arguments, all(hits)))
        return kernel

    def note_cache_use(*, cache_hit: bool, **_: Any) -> None:
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


@contextmanager
def launch_nothing(arch: int, launched: Callable[..., None] = lambda *_: None) -> Iterator[None]:
    """Within the block, kernels are compiled for `arch` and handed to `launched` instead of the GPU.

    Args:
        launched: takes what the kernel was compiled from, and what Triton gives to its C launcher: three grid
            dimensions, the stream, the function (here the architecture), two sets of metadata, two hooks, and the
            kernel's arguments.
    """
    before = driver._active
    driver.set_active(_LaunchNothingDriver(arch, launched))
    try:
        with stand_in(TARGETS[arch]):
            yield
    finally:
        driver._active = before


def specialisation(kernel: CompiledKernel) -> str:
    """A hash of what the kernel was compiled with: equal specialisations have the same on every machine."""
    source = kernel.src
    parts = (source.signature, source.constants, source.attrs, kernel.metadata.num_warps, kernel.metadata.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
