"""Settings of the whole test session: poisoned uninitialised memory, hypothesis, the `gpu` marker."""

import os

import hypothesis
import pytest
import torch

# Without a GPU, Triton interprets its kernels. It reads the variable when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from devices import CAPABILITIES

from stamp_kernels._backend import use_backend
from stamp_kernels.ops._capability import use_capability

hypothesis.settings.register_profile("stamp", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("stamp")


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialized_memory():
    """Fill empty tensors with NaN (integers: the largest value), also those of C++, so that unwritten elements show."""
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


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """Run the test once with the CPU kernels of each instruction set that this processor has."""
    with use_capability(request.param):
        yield request.param


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
        return
    for item in items:
        if item.path.parent.name == "triton_kernels":  # interpreted elsewhere, compiled here
            item.add_marker(pytest.mark.gpu)
