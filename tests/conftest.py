"""Settings of the whole test session: poisoned uninitialised memory, hypothesis, the `gpu` marker."""

import os

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from stamp_kernels._backend import use_backend

hypothesis.settings.register_profile("stamp", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("stamp")


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialized_memory():
    """Fill every empty tensor with NaN (integers: the largest value), C++ allocations too: unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["auto", "reference"], ids=["ops", "reference"])
def backend(request):
    """Run the test once on the registered ops and once on the differentiable reference."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["portable", "avx2", "avx512"])
def capability(request, monkeypatch):
    """Run the test once with the CPU kernels of each instruction set that this processor has."""
    if request.param == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    if request.param == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setenv("STAMP_KERNELS_CPU_CAPABILITY", request.param)
    return request.param


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "triton_kernels":  # interpreted elsewhere, compiled here
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
