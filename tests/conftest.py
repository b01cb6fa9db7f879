"""Settings of the whole test session: poisoned uninitialised memory, hypothesis, the `gpu` marker."""

import os

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from stamp_kernels._backend import use_backend
from stamp_kernels.ops._library import served_by

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


# Files of Triton kernels that the compiled CUDA library replaces, each with the test whose first case still runs on a
# GPU where it does. All of them would compile 424 specialisations for kernels that nobody launches there; these 14.
REPLACED_ON_A_GPU = {
    "test_gather.py": "test_rows_of_any_width",
    "test_token_importance.py": "test_named_batches",
    "test_token_pruning.py": "test_named_batches",
    "test_token_selection.py": "test_named_batches",
}


def all_but_one_of_each_replaced(items):
    """Of the items in those files, what is not the first case of its file's test."""
    kept = set()
    left = []
    for item in items:
        file = item.path.name
        if file not in REPLACED_ON_A_GPU:
            continue
        if file not in kept and item.originalname == REPLACED_ON_A_GPU[file]:
            kept.add(file)
        else:
            left.append(item)
    return left


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        of_triton = [item for item in items if item.path.parent.name == "triton_kernels"]
        for item in of_triton:  # interpreted elsewhere, compiled here
            item.add_marker(pytest.mark.gpu)
        if served_by("CUDA")["prune"] == "compiled":
            for item in all_but_one_of_each_replaced(of_triton):
                item.add_marker(pytest.mark.skip(reason="interpreted elsewhere: the compiled CUDA library serves it"))
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
