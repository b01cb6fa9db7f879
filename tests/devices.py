"""The devices and instruction sets of this machine, for tests that hold on each of them."""

import pytest
import torch

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)

# Instruction sets that the CPU kernels are compiled for and that this processor has.
_OF_PROCESSOR = torch.backends.cpu.get_cpu_capability()
CAPABILITIES = [
    "portable",
    *(["avx2"] if _OF_PROCESSOR.startswith("AVX") else []),
    *(["avx512"] if _OF_PROCESSOR == "AVX512" else []),
]
