"""Builds the compiled library of stamp_kernels on LibTorch's stable ABI, with ninja.

The library does not use the CPython API, so one wheel (py3-none-<platform>) serves every Python. TORCH_TARGET_VERSION
lets it load under every torch from 2.11 on.

Environment variables:
    STAMP_KERNELS_SANITIZE  1: with AddressSanitizer and UndefinedBehaviorSanitizer.
    CXX, CXXFLAGS           The C++ compiler, and flags after those chosen here, such as -Werror.

Every build writes compile_commands.json, from which clangd learns the flags of each file under csrc.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc"
OLDEST_TORCH = "0x020b000000000000"  # 2.11, in the form of TORCH_TARGET_VERSION
CXX_FLAGS = [
    *("-std=c++17", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter"),
]
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


def switch(name: str) -> bool | None:
    """The value of an environment variable that is 0, 1 or unset."""
    value = os.environ.get(name)
    if value not in (None, "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value is None else value == "1"


SANITIZE = bool(switch("STAMP_KERNELS_SANITIZE"))


def cxx_compiler() -> str:
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
    """The object files of a source, each with the flags that it needs beyond the common ones."""
    if Path(source).name != "kernels.cpp":
        return {f"{source}.o": ""}
    return {
        f"{source}.{name}.o": " ".join(
            [*flags, f"-DSTAMP_INSTRUCTION_SET={name}", f"-DSTAMP_FLOATS_PER_VECTOR={floats}"]
        )
        for name, (floats, flags) in instruction_sets().items()
    }


class NinjaBuild(build_ext):
    """Compiles and links the library in one ninja run."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no CPython tag: it is not a Python module

    def finalize_options(self) -> None:
        super().finalize_options()
        if SANITIZE and self.inplace:
            raise SystemExit("STAMP_KERNELS_SANITIZE=1 builds into another folder: setup.py build --build-lib FOLDER")

    def build_extensions(self) -> None:
        import torch
        from ninja import BIN_DIR, ninja_syntax

        torch_root = Path(torch.__file__).parent
        includes = [
            *("-I", str(SOURCES)),
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
        with open(build_dir / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file, width=200)
            ninja.variable("torch_lib", str(torch_root / "lib"))
            ninja.rule(
                "cxx",
                [
                    *(cxx_compiler(), "-MMD", "-MF", "$out.d", *CXX_FLAGS, *optimization, *prefix_maps, *includes),
                    *("$flags", *extra_flags, "-c", "$in", "-o", "$out"),
                ],
                depfile="$out.d",
                deps="gcc",
            )
            linker_flags = ["-L$torch_lib", "-ltorch_cpu", *(SANITIZE_FLAGS if SANITIZE else [])]
            ninja.rule("link", [cxx_compiler(), "-shared", "$in", "-o", "$out", *linker_flags])
            (extension,) = self.extensions
            objects = [
                ninja.build(str(build_dir / name), "cxx", str(ROOT / source), variables={"flags": flags})[0]
                for source in extension.sources
                for name, flags in compilations(source).items()
            ]
            ninja.build(str(Path(self.get_ext_fullpath(extension.name)).resolve()), "link", objects)
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


setup(
    # stamp_kernels/triton_kernels is a symbolic link to triton_kernels/: the same folder serves the installed package
    # and, in an editable install, type checkers and editors. A top-level package triton_kernels would collide with the
    # one of Triton's own repository.
    packages=find_packages(include=["stamp_kernels", "stamp_kernels.*"]),
    # With package_dir an editable install is one line in a .pth file, which every tool reads, not an import hook.
    package_dir={"": "."},
    package_data={"stamp_kernels": ["py.typed"]},
    ext_modules=[Extension("stamp_kernels._cpu", sorted(str(p.relative_to(ROOT)) for p in SOURCES.rglob("*.cpp")))],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
)
