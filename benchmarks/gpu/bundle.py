"""What a GPU machine without a network needs for `make gpu-check`, made on a machine without a GPU: `make gpu-bundle`.

    bundle.py build --python python3.12 --wheel FILE [--data FILE] [--output FILE] [--processes 2]
    bundle.py run [--bundle FILE] -- COMMAND ...
    bundle.py warm [--processes 16] [--results FILE]

`build` packs the wheel, the data file and a Triton cache of everything that `recordable` lists. The cache's keys
depend on the version of Triton, on its binary (one per version of Python), and on the kernels. Therefore the cache is
made with the GPU machine's versions of Python, torch and triton, for that machine's architecture. It contains the
compiled kernels and the C launchers that Triton would otherwise build at the first launch.

`run` unpacks the bundle and runs a command with the package on PYTHONPATH, the cache in TRITON_CACHE_DIR and the data
file in STAMP_KERNELS_DATA. `warm` compiles what the cache lacks, in as many processes as there are cores, and reports
what the cache had. On the GPU machine it should have everything.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLE = ROOT / "build" / "gpu-bundle.tar.gz"
# The versions on the GPU machine; `--python` names its version of Python.
PACKAGES = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy")
DEFAULT_ARCH = 90


# Build


def build(python: str, wheel: Path, data: Path | None, output: Path, processes: int) -> None:
    folder = output.parent / "gpu-bundle"
    contents = folder / "contents"
    shutil.rmtree(contents, ignore_errors=True)
    contents.mkdir(parents=True)
    shutil.copy(wheel, contents)
    if data is not None:
        shutil.copy(data, contents / f"data{data.suffix}")

    environment = folder / "environment"
    pip = [environment / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not environment.exists():
        _run([python, "-m", "venv", environment])
    _run([*pip, "install", *PACKAGES])
    site = folder / "site"
    _install(pip, wheel, site)
    variables = {"PYTHONPATH": str(site), "TRITON_CACHE_DIR": str(contents / "triton_cache")}
    with _empty_libcuda() as libcuda:
        variables |= {"TRITON_LIBCUDA_PATH": libcuda, "TRITON_STORE_BINARY_ONLY": "1"}
        _run([environment / "bin" / "python", __file__, "warm", "--processes", str(processes)], variables)
    with tarfile.open(output, "w:gz") as archive:
        archive.add(contents, arcname=".")
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


def _run(command: list[str | Path], variables: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env={**os.environ, **(variables or {})})


def _install(pip: list[str | Path], wheel: Path, site: Path) -> None:
    """Only the wheel: its dependencies are already installed."""
    shutil.rmtree(site, ignore_errors=True)
    _run([*pip, "install", "--no-index", "--no-deps", "--target", site, wheel])


@contextmanager
def _empty_libcuda() -> Iterator[str]:
    """A folder with a libcuda.so.1 to link launchers to on a machine without a driver."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.c")
        source.write_text("int stamp_kernels_empty;\n")
        library = Path(folder, "libcuda.so.1")
        _run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source])
        yield folder


# Run


def unpack(bundle: Path, folder: Path) -> dict[str, str]:
    """Unpack the bundle into a folder. Returns the environment variables that point to its contents."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(bundle) as archive:
        archive.extractall(folder, filter="data")
    relocate(folder / "triton_cache")
    wheel = next(folder.glob("*.whl"))
    _install([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"], wheel, folder / "site")
    variables = {"PYTHONPATH": str(folder / "site"), "TRITON_CACHE_DIR": str(folder / "triton_cache")}
    data = next(folder.glob("data.*"), None)
    return variables if data is None else variables | {"STAMP_KERNELS_DATA": str(data)}


def relocate(cache: Path) -> None:
    """Triton lists the files of each kernel with absolute paths: change them to the paths in this folder."""
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        paths = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": paths}))


def run(bundle: Path, command: list[str]) -> int:
    """Run a command with the bundle's contents. Returns its exit status."""
    variables = unpack(bundle, Path(tempfile.gettempdir(), "stamp-kernels-gpu-check"))
    return subprocess.run(command, env={**os.environ, **variables}).returncode


# Warm


def warm(processes: int, results: Path | None) -> int:
    """Compile everything that `recordable` lists into Triton's cache, and report what was already there."""
    start = time.monotonic()
    jobs = list(range(len(_recordable())))
    # Fresh processes: a fork must not inherit an initialised CUDA. Each one lists the kernels itself.
    with ProcessPoolExecutor(processes) as pool:
        done = list(pool.map(_warm_one, jobs))
    record: dict[str, object] = {"part": "warm", "seconds": round(time.monotonic() - start, 1)}
    for what in ("kernels", "launchers"):
        hits = all_hits([one[what] for one in done])
        record |= {f"{what}_found": sum(hits.values()), f"{what}_compiled": len(hits) - sum(hits.values())}
    record["errors"] = [one["error"] for one in done if one["error"]]
    line = json.dumps(record)
    print(line)
    if results is not None:
        with open(results, "a") as file:
            file.write(line + "\n")
    return 1 if record["errors"] else 0


def all_hits(done: list[dict[str, bool]]) -> dict[str, bool]:
    """Whether the cache had each key. A key that any entry had to compile counts as missing."""
    hits: dict[str, bool] = {}
    for one in done:
        for key, hit in one.items():
            hits[key] = hits.get(key, True) and hit
    return hits


def _recordable() -> list[tuple[str, object]]:
    """(name, run(device)) of everything that the check launches."""
    from workloads.training_step import TRAINING_STEPS

    steps = [(step.name, lambda device, step=step: step.run({})) for step in TRAINING_STEPS]
    return [*importlib.import_module("recordable").recordable(), *steps]


def _warm_one(index: int) -> dict[str, Any]:
    """The kernels and launchers that one entry needs, and whether the cache had each of them."""
    import torch

    from stamp_kernels.ops._served_by_triton import ServedByTriton
    from stamp_kernels.triton_kernels.aot import compile_only

    name, step = _recordable()[index]
    launches = []
    error = ""
    try:
        with compile_only(_architecture()) as launches, ServedByTriton():
            step(torch.device("meta"))
    except Exception as exception:  # the other entries still compile
        error = f"{name}: {type(exception).__name__}: {str(exception).splitlines()[0] if str(exception) else ''}"
    kernels: dict[str, bool] = {}
    for launch in launches:  # the first launch shows whether the cache had it
        kernels.setdefault(launch.kernel.hash, launch.is_hit)
    unique = {launch.kernel.hash: launch.kernel for launch in launches}
    launchers = dict([_store_utilities(), *map(_store_launcher, unique.values())])
    return {"kernels": kernels, "launchers": launchers, "error": error}


def _architecture() -> int:
    """That of this machine's GPU; without a GPU, the one that bundles are made for."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _store_launcher(kernel: "CompiledKernel") -> tuple[str, bool]:
    """Compile the C function that passes a kernel's arguments to the driver: (key, whether the cache had it)."""
    from triton.backends.nvidia.driver import CudaLauncher

    return _store_module(lambda: CudaLauncher(kernel.src, kernel.metadata))


def _store_utilities() -> tuple[str, bool]:
    """The same for the C module that loads Triton's kernels."""
    from triton.backends.nvidia import driver

    source = Path(driver.dirname, "driver.c").read_text()
    options = dict(library_dirs=driver.library_dirs(), include_dirs=driver.include_dirs, libraries=driver.libraries)
    return _store_module(lambda: driver.compile_module_from_src(src=source, name="cuda_utils", **options))


def _store_module(compile_module: Callable[[], object]) -> tuple[str, bool]:
    """Compile a module without loading it, which needs a driver: (key, whether the cache had it)."""
    from triton.runtime import build

    asked: list[tuple[str, bool]] = []
    load, get_cache_manager = build._load_module_from_path, build.get_cache_manager

    def note(key: str) -> object:
        cache = get_cache_manager(key)
        asked.append((key, any(name.endswith(".so") for name in os.listdir(cache.cache_dir))))
        return cache

    build.get_cache_manager = note
    build._load_module_from_path = lambda name, path: SimpleNamespace(launch=None)
    try:
        compile_module()
    finally:
        build._load_module_from_path, build.get_cache_manager = load, get_cache_manager
    return asked[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("--python", required=True, help="the GPU machine's version of Python")
    building.add_argument("--wheel", type=Path, required=True)
    building.add_argument("--data", type=Path)
    building.add_argument("--output", type=Path, default=BUNDLE)
    building.add_argument("--processes", type=int, default=os.cpu_count())
    running = commands.add_parser("run")
    running.add_argument("--bundle", type=Path, default=BUNDLE)
    running.add_argument("words", nargs="+", metavar="COMMAND")
    warming = commands.add_parser("warm")
    warming.add_argument("--processes", type=int, default=os.cpu_count())
    warming.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.command == "build":
        build(options.python, options.wheel.resolve(), options.data, options.output.resolve(), options.processes)
        return 0
    if options.command == "run":
        return run(options.bundle, options.words)
    return warm(options.processes, options.results)


if __name__ == "__main__":
    sys.exit(main())
