"""Builds the two compiled libraries of stamp_kernels on LibTorch's stable ABI, with one ninja file.

`_cpu` is always built, `_cuda<major version of CUDA>` where nvcc is found. Neither uses the CPython API, so one wheel
(py3-none-<platform>) serves every Python. TORCH_TARGET_VERSION lets it load under every torch from 2.11 on.

Environment variables:
    STAMP_KERNELS_CUDA      1: a missing nvcc is an error. 0: no CUDA library.
    STAMP_KERNELS_SANITIZE  1: `_cpu` with AddressSanitizer and UndefinedBehaviorSanitizer, and no CUDA library.
    CXX, CXXFLAGS           The C++ compiler, and flags after those chosen here, such as -Werror.
    CUDA_HOME               Where nvcc is looked for first (/usr/local/cuda).

Every build writes compile_commands.json, from which clangd learns the flags of each file under csrc/cpu.
"""

import json
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
OLDEST_TORCH = "0x020b000000000000"  # 2.11, in the form of TORCH_TARGET_VERSION
# The architectures that nvcc compiles for, and the code that it keeps. Machine code runs on its own compute capability
# and on later ones of the same major version; with an "a" only on its own.
#   sm_80         8.0 (A100), 8.6 (A10, RTX 30), 8.7 (Orin), 8.9 (L4, L40S, RTX 40)
#   sm_90a        9.0 (H100, H200)
#   sm_100        10.0 (B200), 10.3 (B300)
#   compute_100   11.0 (Thor), 12.0 and 12.1 (RTX 50, RTX PRO 6000, GB10), and GPUs to come: PTX, which the driver
#                 compiles at the first launch. The driver must not be older than the nvcc that wrote the PTX.
CUDA_CODE = {"compute_80": "sm_80", "compute_90a": "sm_90a", "compute_100": "sm_100,compute_100"}
COMMON_FLAGS = ["-std=c++17", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
CXX_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# csrc/cpu/<family>/kernels.cpp is compiled once for each instruction set (csrc/cpu/core/dispatch.h describes how the
# program chooses one). Every other file is compiled for the baseline of the platform. An instruction set has a name,
# the number of floats in a vector, and the compiler's flags.
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
    "-O3",
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=0",
    *(f"'-gencode=arch={arch},code=[{code}]'" for arch, code in CUDA_CODE.items()),  # quoted for the shell
]


def switch(name: str) -> bool | None:
    """The value of an environment variable that is 0, 1 or unset."""
    value = os.environ.get(name)
    if value not in (None, "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value is None else value == "1"


SANITIZE = bool(switch("STAMP_KERNELS_SANITIZE"))


def find_nvcc() -> str | None:
    """The compiler of the CUDA library, or None where that library is not built."""
    wanted = False if SANITIZE else switch("STAMP_KERNELS_CUDA")
    if wanted is False:
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if nvcc is None and wanted:
        raise SystemExit(f"STAMP_KERNELS_CUDA=1 needs nvcc, which is neither in {home}/bin nor on PATH")
    return nvcc


def cuda_major(nvcc: str) -> int:
    """The major version of the compiler's CUDA toolkit."""
    banner = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", banner)
    if release is None:
        raise SystemExit(f"{nvcc} --version does not name a CUDA release: {banner!r}")
    return int(release[1])


def host_compiler() -> str:
    """The C++ compiler of the CPU library, and of nvcc's stub."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"stamp_kernels needs a C++ compiler, and {compiler!r} was not found: install one (Debian: apt-get install "
            "g++), or name another one in the environment variable CXX"
        )
    return compiler


def instruction_sets() -> dict[str, tuple[int, list[str]]]:
    """The instruction sets that the kernels are compiled for on this platform."""
    return PORTABLE | (X86_INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {})


def compilations(source: str) -> dict[str, str]:
    """The object files of a C++ or CUDA source, each with the flags that it needs beyond the common ones."""
    if Path(source).name != "kernels.cpp":
        return {f"{source}.o": ""}
    return {
        f"{source}.{name}.o": " ".join(
            [*flags, f"-DSTAMP_INSTRUCTION_SET={name}", f"-DSTAMP_FLOATS_PER_VECTOR={floats}"]
        )
        for name, (floats, flags) in instruction_sets().items()
    }


class StableLibrary(Extension):
    """A shared library of registered ops, from all sources under csrc/<folder>. torch.ops.load_library loads it."""

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
        """Remove libraries of earlier builds, for another CUDA version or under an older name."""
        built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for library in folder.glob("_cuda*.so"):
            if library.name not in built:
                library.unlink()

    def finalize_options(self) -> None:
        super().finalize_options()
        if SANITIZE and self.inplace:
            raise SystemExit("STAMP_KERNELS_SANITIZE=1 builds into another folder: setup.py build --build-lib FOLDER")

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
        # One folder for every kind of install, so that only changes are compiled.
        build_dir = ROOT / "build" / ("ninja-sanitize" if SANITIZE else "ninja")
        # Error messages name csrc/... and torch/..., not folders of the machine that compiled them.
        prefix_maps = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_root}/include/="]
        optimization = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE_FLAGS] if SANITIZE else ["-O3"]
        extra_flags = os.environ.get("CXXFLAGS", "").split()
        build_dir.mkdir(parents=True, exist_ok=True)
        self.remove_other_cuda_libraries(Path(self.build_lib) / "stamp_kernels")
        with open(build_dir / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file, width=200)
            ninja.variable("torch_lib", str(torch_root / "lib"))
            ninja.rule(
                "cxx",
                [
                    *(host_compiler(), "-MMD", "-MF", "$out.d", *CXX_FLAGS, *optimization, *prefix_maps, *includes),
                    *("$flags", *extra_flags, "-c", "$in", "-o", "$out"),
                ],
                depfile="$out.d",
                deps="gcc",
            )
            linker_flags = ["-L$torch_lib", "-ltorch_cpu", *(SANITIZE_FLAGS if SANITIZE else [])]
            ninja.rule("link", [host_compiler(), "-shared", "$in", "-o", "$out", *linker_flags])
            stub = str(build_dir / "stubs" / "libtorch_cuda.so")
            if any(extension.folder == "cuda" for extension in self.extensions):
                nvcc = find_nvcc()
                host_maps = f"-Xcompiler={','.join(prefix_maps)}"
                ninja.rule("stub", [host_compiler(), "-shared", "-x c++ /dev/null", "-Wl,-soname,$soname -o $out"])
                ninja.build(stub, "stub", variables={"soname": Path(stub).name})
                ninja.rule(
                    "nvcc",
                    [nvcc, "-MD", "-MF", "$out.d", *NVCC_FLAGS, host_maps, *includes, "-c", "$in", "-o", "$out"],
                    depfile="$out.d",
                    deps="gcc",
                )
                # The library must link where torch has no CUDA: nvcc adds the static CUDA runtime, and an empty stub
                # replaces libtorch_cuda.so. The stub defines no symbol, so --no-as-needed keeps the linker from
                # dropping it: the library needs aoti_torch_get_current_cuda_stream from the real libtorch_cuda.so. At
                # run time `import torch` has loaded that one, and the dynamic linker finds it by the stub's soname.
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
        if not SANITIZE:
            self.write_compile_commands([Path(BIN_DIR) / "ninja", "-C", build_dir, "-t", "compdb", "cxx"])

    def write_compile_commands(self, compdb: list[str | Path]) -> None:
        """Write one command for each source, the last where a source is compiled for several instruction sets."""
        commands = json.loads(subprocess.run(compdb, check=True, capture_output=True, text=True).stdout)
        by_source = {command["file"]: command for command in commands}
        (ROOT / "compile_commands.json").write_text(json.dumps(list(by_source.values()), indent=1) + "\n")


class AnyPythonWheel(bdist_wheel):
    """A wheel for its platform and for every Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


libraries = [StableLibrary("stamp_kernels._cpu", "cpu")]
if (nvcc := find_nvcc()) is not None:
    libraries.append(StableLibrary(f"stamp_kernels._cuda{cuda_major(nvcc)}", "cuda"))

setup(
    # stamp_kernels/triton_kernels is a symbolic link to triton_kernels/: the same folder serves the installed package
    # and, in an editable install, type checkers and editors. A top-level package triton_kernels would collide with the
    # one of Triton's own repository.
    packages=find_packages(include=["stamp_kernels", "stamp_kernels.*"]),
    # With package_dir an editable install is one line in a .pth file, which every tool reads, not an import hook.
    package_dir={"": "."},
    package_data={"stamp_kernels": ["py.typed"]},
    ext_modules=libraries,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
)
