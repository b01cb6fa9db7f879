"""Builds the two compiled libraries of stamp_kernels on LibTorch's stable ABI, with one ninja file.

`_cpu` is always built. `_cuda<major version of CUDA>` is built where nvcc is found; STAMP_KERNELS_CUDA=1 makes a
missing nvcc an error and STAMP_KERNELS_CUDA=0 leaves the library out. Neither uses the CPython API, so one wheel
(py3-none-<platform>) serves every Python, and TORCH_TARGET_VERSION makes it load under every torch from 2.11 on.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = "0x020b000000000000"  # 2.11, as TORCH_TARGET_VERSION wants it
# What nvcc compiles for, and the code that it keeps. Machine code runs on its own compute capability and on later ones
# of the same major version; with an "a" on its own only.
#   sm_80         8.0 (A100), 8.6 (A10, RTX 30), 8.7 (Orin), 8.9 (L4, L40S, RTX 40)
#   sm_90a        9.0 (H100, H200)
#   sm_100        10.0 (B200), 10.3 (B300)
#   compute_100   11.0 (Thor), 12.0 and 12.1 (RTX 50, RTX PRO 6000, GB10), and GPUs to come: PTX, which the driver
#                 compiles at the first launch. The driver must be as new as the nvcc that wrote the PTX.
CUDA_CODE = {"compute_80": "sm_80", "compute_90a": "sm_90a", "compute_100": "sm_100,compute_100"}
COMMON_FLAGS = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
CXX_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# csrc/cpu/<family>/kernels.cpp is compiled once for each instruction set (csrc/cpu/core/dispatch.h says how the sets
# become tables); every other file may assume no more than the platform's baseline. By name: the floats of a vector, and
# the compiler's flags.
PORTABLE = {"portable": (4, [])}
X86_INSTRUCTION_SETS = {
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (
        16,
        [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
            "-mprefer-vector-width=512",
        ],
    ),
}
NVCC_FLAGS = [
    *COMMON_FLAGS,
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=0",
    *(f"'-gencode=arch={arch},code=[{code}]'" for arch, code in CUDA_CODE.items()),  # quoted for the shell
]


def find_nvcc() -> str | None:
    """The CUDA compiler to build the CUDA library with, or None where that library is not to be built."""
    wanted = os.environ.get("STAMP_KERNELS_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"STAMP_KERNELS_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit(
            f"STAMP_KERNELS_CUDA=1 asks for the CUDA library, but nvcc is neither in {home}/bin nor on PATH"
        )
    return nvcc


def cuda_major(nvcc: str) -> int:
    """The major version of the CUDA toolkit that the compiler belongs to."""
    banner = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", banner)
    if release is None:
        raise SystemExit(f"{nvcc} --version names no release of CUDA: {banner!r}")
    return int(release[1])


def host_compiler() -> str:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"stamp_kernels compiles C++ and found no compiler {compiler!r}: install one (Debian: apt-get install g++) "
            "or name it in the environment variable CXX"
        )
    return compiler


def instruction_sets() -> dict[str, tuple[int, list[str]]]:
    """Those of this platform's processors."""
    return PORTABLE | (X86_INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {})


def compilations(source: str) -> dict[str, str]:
    """The object files that a C++ or CUDA source becomes, each with the flags that it needs beyond the common ones."""
    if Path(source).name != "kernels.cpp":
        return {f"{source}.o": ""}
    return {
        f"{source}.{name}.o": " ".join(
            [*flags, f"-DSTAMP_INSTRUCTION_SET={name}", f"-DSTAMP_FLOATS_PER_VECTOR={floats}"]
        )
        for name, (floats, flags) in instruction_sets().items()
    }


class StableLibrary(Extension):
    """A shared library of registered ops: everything under csrc/<folder>, loaded by torch.ops.load_library."""

    def __init__(self, name: str, folder: str) -> None:
        suffix = ".cu" if folder == "cuda" else ".cpp"
        sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).rglob(f"*{suffix}"))
        super().__init__(name, sources)
        self.folder = folder


class NinjaBuild(build_ext):
    """Compiles and links all libraries in one ninja run."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no CPython tag: these are not Python modules

    def copy_extensions_to_source(self) -> None:
        self.remove_other_cuda_libraries(ROOT / "stamp_kernels")
        super().copy_extensions_to_source()

    def remove_other_cuda_libraries(self, folder: Path) -> None:
        """Remove those of earlier builds, by another CUDA version or under an older name."""
        built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for library in folder.glob("_cuda*.so"):
            if library.name not in built:
                library.unlink()

    def build_extensions(self) -> None:
        import torch
        from ninja import BIN_DIR, ninja_syntax

        torch_root = Path(torch.__file__).parent
        includes = [
            *("-I", str(ROOT / "csrc")),
            "-isystem",
            f"{torch_root}/include",
            "-isystem",
            f"{torch_root}/include/torch/csrc/api/include",
        ]
        build_dir = ROOT / "build" / "ninja"  # the same for every kind of install, so that only changes are compiled
        build_dir.mkdir(parents=True, exist_ok=True)
        self.remove_other_cuda_libraries(Path(self.build_lib) / "stamp_kernels")
        with open(build_dir / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file, width=200)
            ninja.variable("torch_lib", str(torch_root / "lib"))
            ninja.rule(
                "cxx",
                [
                    *(host_compiler(), "-MMD", "-MF", "$out.d", *CXX_FLAGS, *includes),
                    *("$flags", "-c", "$in", "-o", "$out"),
                ],
                depfile="$out.d",
                deps="gcc",
            )
            ninja.rule("link", [host_compiler(), "-shared", "$in", "-o", "$out", "-L$torch_lib", "-ltorch_cpu"])
            stub = str(build_dir / "stubs" / "libtorch_cuda.so")
            if any(extension.folder == "cuda" for extension in self.extensions):
                nvcc = find_nvcc()
                ninja.rule("stub", [host_compiler(), "-shared", "-x c++ /dev/null", "-Wl,-soname,$soname -o $out"])
                ninja.build(stub, "stub", variables={"soname": Path(stub).name})
                ninja.rule(
                    "nvcc",
                    [nvcc, "-MD", "-MF", "$out.d", *NVCC_FLAGS, *includes, "-c", "$in", "-o", "$out"],
                    depfile="$out.d",
                    deps="gcc",
                )
                # The library links where torch is CPU only: nvcc adds the static CUDA runtime, and an empty stub
                # replaces libtorch_cuda.so. The linker would drop the stub, since it has no symbol, and must keep it:
                # aoti_torch_get_current_cuda_stream is in the real library. `import torch` has loaded that one at run
                # time, and the dynamic linker finds it by the stub's soname.
                ninja.rule(
                    "nvcc_link",
                    [
                        *(nvcc, "-shared", "$in", "-o", "$out", "-L$torch_lib", "-ltorch_cpu"),
                        f"-Xlinker --push-state,--no-as-needed,{stub},--pop-state",
                    ],
                )
            for extension in self.extensions:
                compiler, linker = ("nvcc", "nvcc_link") if extension.folder == "cuda" else ("cxx", "link")
                objects = [
                    ninja.build(str(build_dir / name), compiler, str(ROOT / source), variables={"flags": flags})[0]
                    for source in extension.sources
                    for name, flags in compilations(source).items()
                ]
                library = str(Path(self.get_ext_fullpath(extension.name)).resolve())
                ninja.build(library, linker, objects, implicit=[stub] if extension.folder == "cuda" else None)
        subprocess.run([Path(BIN_DIR) / "ninja", "-C", build_dir], check=True, stdout=sys.stderr)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for its platform and for every Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


libraries = [StableLibrary("stamp_kernels._cpu", "cpu")]
if (nvcc := find_nvcc()) is not None:
    libraries.append(StableLibrary(f"stamp_kernels._cuda{cuda_major(nvcc)}", "cuda"))

setup(
    # stamp_kernels/triton_kernels is a link to triton_kernels/, so that one folder serves the installed package and,
    # in an editable install, type checkers and editors. (A package of that name at the top level of an installation
    # would collide with the one that ships with Triton's own repository.)
    packages=find_packages(include=["stamp_kernels", "stamp_kernels.*"]),
    # An editable install is then one line in a .pth file, which every tool reads, instead of an import hook.
    package_dir={"": "."},
    package_data={"stamp_kernels": ["py.typed"]},
    ext_modules=libraries,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
)
