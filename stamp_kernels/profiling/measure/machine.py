"""The machine that a measurement ran on: its name, its versions, and the rates that bound every kernel."""

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.mkldnn import to_mkldnn

import stamp_kernels
from stamp_kernels.profiling.measure.timing import interleaved_step_times


class Rates(NamedTuple):
    """What a device reaches when nothing else slows it down; bytes are those read plus those written."""

    flops_per_second: float
    bytes_per_second: float

    def floor_seconds(self, flops: float, num_bytes: float) -> float:
        """The least time for this work, if arithmetic and memory traffic overlap completely."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


# Measured on an H100 SXM, in half precision.
H100_RATES = Rates(flops_per_second=798e12, bytes_per_second=3.0e12)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a large matrix product in `dtype` and of a copy much larger than the caches, the best of five.

    A CPU uses as many threads as torch does. Its fp32 rate is that of the faster of torch's two libraries: on an AMD
    EPYC with AVX-512 the BLAS behind `torch.mm` (MKL) reaches half the rate of oneDNN, so a kernel could beat a floor
    made of it. For an H100 (SXM) the rates are constants, so that all runs on it have the same floor.
    """
    if device.type == "cuda" and torch.cuda.get_device_name(device) == "NVIDIA H100 80GB HBM3" and dtype.itemsize == 2:
        return H100_RATES
    size, num_bytes = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    products: dict[str, Callable[[int], Tensor]] = {"product": lambda i: torch.mm(left, right, out=product)}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = to_mkldnn(torch.nn.Linear(size, size, bias=False).eval())
        rows = left.to_mkldnn()
        products["oneDNN product"] = torch.no_grad()(lambda i: linear(rows))
    steps = {**products, "copy": lambda i: target.copy_(source)}
    times = interleaved_step_times(steps, num_steps=5, warmup=1, device=device)
    seconds = {name: 1e-3 * min(milliseconds) for name, milliseconds in times.items()}
    return Rates(2 * size**3 / min(seconds[name] for name in products), 2 * num_bytes / seconds["copy"])


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    # ARM has no such line, other systems no such file.
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def describe_versions() -> dict[str, str]:
    """Versions of the packages that a measurement depends on; a package that is not installed is left out."""
    versions = {"stamp_kernels": stamp_kernels.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions
