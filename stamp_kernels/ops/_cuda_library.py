"""Whether the compiled CUDA library serves this process: the facts, the choice, the loading.

The library's file name carries the major version of the CUDA runtime that is linked into it: `_cuda13.so`.
"""

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_OLDEST_CAPABILITY = (8, 0)  # of the machine code in the library, see CUDA_CODE in setup.py
_BUILD_COMMAND = "`pip install --no-build-isolation .` in the sources"


class CudaFacts(NamedTuple):
    """What the choice depends on.

    Attributes:
        torch_cuda: `torch.version.cuda`, None if torch was built without CUDA.
        built_for: major versions of CUDA for which a library is installed.
        driver: the newest CUDA version that the driver supports, 13020 for 13.2. None: there is no driver.
        capabilities: the compute capability of each visible GPU.
    """

    torch_cuda: str | None
    built_for: tuple[int, ...]
    driver: int | None
    capabilities: tuple[tuple[int, int], ...]


class CudaChoice(NamedTuple):
    """Who serves CUDA.

    Attributes:
        major: the CUDA version of the library that serves. None: no library serves, Triton serves every op.
        reason: why an installed library does not serve, and what to do. None: it serves, or none is installed.
    """

    major: int | None
    reason: str | None = None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def choose_cuda_library(facts: CudaFacts) -> CudaChoice:
    """The library that serves; depends only on the facts."""
    if facts.torch_cuda is None or not facts.built_for:
        return CudaChoice(None)
    wanted = int(facts.torch_cuda.partition(".")[0])
    if wanted not in facts.built_for:
        found = [str(major) for major in facts.built_for]
        return CudaChoice(
            None,
            f"it was built for CUDA {' and '.join(found)}, and torch for CUDA {wanted}. Install a torch for CUDA "
            f"{' or '.join(found)}, or build stamp_kernels with nvcc of CUDA {wanted} ({_BUILD_COMMAND})",
        )
    # A driver serves every CUDA runtime of its own and of earlier major versions.
    if facts.driver is not None and facts.driver // 1000 < wanted:
        supported = _dotted((facts.driver // 1000, facts.driver % 1000 // 10))
        return CudaChoice(
            None,
            f"it was built for CUDA {wanted}, and the driver supports CUDA {supported} at most. Update the driver",
        )
    oldest = min(facts.capabilities, default=_OLDEST_CAPABILITY)
    if oldest < _OLDEST_CAPABILITY:
        return CudaChoice(
            None,
            f"it needs GPUs of compute capability {_dotted(_OLDEST_CAPABILITY)} or higher, and a visible one has "
            f"{_dotted(oldest)}. If there are newer ones, make only them visible with CUDA_VISIBLE_DEVICES",
        )
    return CudaChoice(wanted)


def _library_file(major: int) -> Path:
    return _PACKAGE / f"_cuda{major}.so"


def _built_for() -> tuple[int, ...]:
    names = (re.fullmatch(r"_cuda(\d+)\.so", path.name) for path in _PACKAGE.glob("_cuda*.so"))
    return tuple(sorted(int(name[1]) for name in names if name is not None))


def _driver_version() -> int | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def cuda_facts() -> CudaFacts:
    """The facts of this process. Initialises CUDA if there is a GPU."""
    capabilities = tuple(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return CudaFacts(torch.version.cuda, _built_for(), _driver_version(), capabilities)


def load_cuda_library(choice: CudaChoice) -> CudaChoice:
    """Load the chosen library, which registers its kernels. If that fails, the choice is Triton."""
    if choice.major is None:
        return choice
    file = _library_file(choice.major)
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return CudaChoice(
            None,
            f"{file} could not be loaded: {error.__cause__ or error}. Build stamp_kernels again ({_BUILD_COMMAND})",
        )
    return choice
