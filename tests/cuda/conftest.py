"""The CUDA kernels of csrc/cuda, compiled for the CPU with the emulator of cuda_on_host.h."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from emulator import Arguments


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, c++")
    source = Path(__file__).parent / "kernels_on_host.cpp"
    library = tmp_path_factory.mktemp("cuda_on_host") / "kernels_on_host.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = ["-I", str(Path(__file__).parents[2] / "csrc")]
    subprocess.run([compiler, *flags, *include, "-fPIC", "-shared", "-o", str(library), str(source)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.launches_so_far.restype = ctypes.c_int64
    arguments = ctypes.POINTER(Arguments)
    loaded.run_token_importance.argtypes = loaded.run_select_tokens.argtypes = [arguments]
    loaded.run_prune.argtypes = [arguments, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64]
    return loaded


@pytest.fixture(params=[False, True], ids=["rising", "falling"])
def thread_order(request, kernels) -> bool:
    """The order in which the emulator resumes threads: a missing barrier shows in one of the two orders."""
    kernels.set_thread_order(int(request.param))
    return request.param
