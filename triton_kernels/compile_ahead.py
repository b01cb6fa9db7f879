"""Compile the kernels for GPUs that need not be there: `python -m stamp_kernels.triton_kernels.compile_ahead`.

Every module of this package that has `aot_variants(capability)` is compiled for each architecture, and a table says
what came out: registers, shared memory, bytes spilled, matrix instructions. The exit status is 1 if something does not
compile, does not fit the chip, misses the matrix units, or is hot and spills. `--hot` takes only the variants that
users train on, `--json` prints a list for a program.

Must run without TRITON_INTERPRET, which makes kernels that cannot be compiled.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from stamp_kernels import triton_kernels
from stamp_kernels.triton_kernels._aot import AotVariant

# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    """What the compiler made of one variant for one architecture.

    Attributes:
        name: module and variant.
        arch: 80, 90 or 100.
        registers: of a thread.
        shared: bytes of a block.
        spilled: bytes of a thread in local memory.
        matrix_instructions: how many stand in the machine code, by mnemonic.
        wanted_instructions: mnemonics of which one must be there; empty where no product has 16-bit inputs.
        error: the compiler's message, or empty.
    """

    name: str
    arch: int
    hot: bool
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    matrix_instructions: dict[str, int] = {}  # noqa: RUF012  (never changed)
    wanted_instructions: tuple[str, ...] = ()
    error: str = ""

    def problems(self) -> list[str]:
        """What `make aot` and the tests refuse."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, the chip has {SHARED_MEMORY[self.arch]}")
        if self.hot and self.spilled > 0:
            found.append(f"spills {self.spilled} bytes")
        if self.wanted_instructions and not any(self.matrix_instructions.get(x) for x in self.wanted_instructions):
            found.append(f"no {' or '.join(self.wanted_instructions)} but {self.matrix_instructions}")
        return found


def kernel_modules() -> list[str]:
    """Names of the package's modules that have kernels to compile."""
    names = [module.name for module in pkgutil.iter_modules(triton_kernels.__path__) if module.name != "compile_ahead"]
    return [name for name in names if hasattr(_module(name), "aot_variants")]


def _module(name: str):
    return importlib.import_module(f"{triton_kernels.__name__}.{name}")


def variants(arch: int, only_hot: bool) -> Iterator[tuple[str, AotVariant]]:
    """(name with its module, variant) of everything that is compiled for an architecture."""
    for module in kernel_modules():
        for variant in _module(module).aot_variants(divmod(arch, 10)):
            if variant.hot or not only_hot:
                yield f"{module}.{variant.name}", variant


def compile_variant(variant: AotVariant, arch: int) -> CompiledKernel:
    """Compile as the launcher would at run time for tensors of vector-aligned strides."""
    arguments = variant.kernel.arg_names
    # Without these attributes loads would be scalar and unpipelined: a different kernel from the one that runs.
    divisible = [
        i
        for i, name in enumerate(arguments)
        if name in variant.signature and (variant.signature[name].startswith("*") or name.startswith("stride"))
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in arguments},
        constexprs=variant.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)


def _wanted_instructions(ttir: str, arch: int, num_warps: int) -> tuple[str, ...]:
    """Which matrix instructions the products of a kernel ought to become."""
    products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(f16|bf16)> \*", ttir)
    if not products:
        return ()  # none, or of fp32 inputs, which are multiplied exactly
    if arch == 100:
        return "UTCHMMA", "HMMA"
    has_warp_group_tile = num_warps >= 4 and any(int(rows) >= 64 for rows, _ in products)
    return ("HGMMA",) if arch == 90 and has_warp_group_tile else ("HMMA",)


def inspect(name: str, variant: AotVariant, arch: int) -> Compiled:
    """Compile a variant and read its machine code."""
    try:
        kernel = compile_variant(variant, arch)
    except Exception as error:  # whatever the compiler says about one variant, the others are still of interest
        return Compiled(name, arch, variant.hot, error=f"{type(error).__name__}: {error}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    mnemonics = re.findall(r"\b(HGMMA|UTCHMMA|HMMA)\b", code)
    return Compiled(
        name,
        arch,
        variant.hot,
        registers=resources["REG"],
        shared=kernel.metadata.shared,
        spilled=resources["STACK"] + resources["LOCAL"],
        matrix_instructions={mnemonic: mnemonics.count(mnemonic) for mnemonic in sorted(set(mnemonics))},
        wanted_instructions=_wanted_instructions(kernel.asm["ttir"], arch, kernel.metadata.num_warps),
    )


def _inspect_by_index(arch: int, only_hot: bool, index: int) -> Compiled:
    """Kernels cannot be sent to another process, so it finds the variant by its place."""
    return inspect(*list(variants(arch, only_hot))[index], arch)


def inspect_all(arches: list[int], only_hot: bool, processes: int) -> list[Compiled]:
    jobs = [(arch, only_hot, index) for arch in arches for index in range(len(list(variants(arch, only_hot))))]
    if processes == 1:
        return [_inspect_by_index(*job) for job in jobs]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_inspect_by_index, *zip(*jobs, strict=True)))


def table(results: list[Compiled]) -> str:
    width = max((len(result.name) for result in results), default=0)
    lines = [f"{'variant':{width}}  arch  hot  registers  shared  spilled  matrix instructions"]
    for result in results:
        instructions = " ".join(f"{count} {name}" for name, count in result.matrix_instructions.items()) or "-"
        lines.append(
            f"{result.name:{width}}  {result.arch:4}  {'yes' if result.hot else '-':3}  {result.registers:9}  "
            f"{result.shared:6}  {result.spilled:7}  {instructions}"
        )
        lines += [f"    {problem}" for problem in result.problems()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--hot", action="store_true", help="only the variants that users train on")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of the table")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    results = inspect_all(options.arch, options.hot, options.processes)
    print(json.dumps([result._asdict() for result in results]) if options.json else table(results))
    return 1 if any(result.problems() for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
