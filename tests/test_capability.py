"""The choice of the CPU kernels' instruction set, by the environment and in a process."""

import os
import re
import subprocess
import sys

import pytest
import torch
from devices import CAPABILITIES

from stamp_kernels import token_importance
from stamp_kernels.ops._capability import use_capability


@pytest.mark.parametrize("name", ["sse", "", "AVX2"])
def test_unknown_instruction_set(name):
    message = re.escape(f"the instruction set must be portable, avx2 or avx512, got {name}")
    with pytest.raises(RuntimeError, match=message), use_capability(name):
        pass


def test_instruction_set_is_restored():
    """Also after an error. What runs meanwhile shows in the bits: the sets add in another order."""
    hidden, centrality = torch.randn(50, 1000), torch.rand(50)
    before = token_importance(hidden, centrality)
    by_name = {}
    for name in CAPABILITIES:
        with pytest.raises(KeyError), use_capability(name):
            by_name[name] = token_importance(hidden, centrality)
            raise KeyError
    assert torch.equal(before, token_importance(hidden, centrality))
    if len(CAPABILITIES) > 1:
        assert not torch.equal(by_name["portable"], by_name[CAPABILITIES[-1]])


READS_AT_LOAD = """
import os, torch, stamp_kernels
os.environ["STAMP_KERNELS_CPU_CAPABILITY"] = "portable"
hidden, offsets = torch.ones(6000, 4), torch.tensor([0, 6000], dtype=torch.int32)
calls = [
    lambda: stamp_kernels.token_importance(hidden, hidden[:, 0]),
    lambda: stamp_kernels.select_tokens(hidden[:, 0], offsets, 6000, keep_ratio=0.5),
    lambda: stamp_kernels.prune(hidden, hidden[:, 0], offsets, 6000, keep_ratio=0.5),
    lambda: stamp_kernels.packed_attention(*[torch.ones(6000, 1, 8)] * 3, offsets // 200, max_seqlen_q=30),
    lambda: stamp_kernels.multi_token_cross_entropy(hidden, hidden[:9], offsets[:1, None].long().expand(6000, 1)),
]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(("name", "num_errors"), [("sse", 5), ("portable", 0)])
def test_environment_is_read_at_load(name, num_errors):
    """getenv beside a write of os.environ in another thread is a data race, so ops do not call it.

    A wrong value does not end the process: every op says what is wrong, whichever thread looks its kernels up.
    """
    environment = os.environ | {"STAMP_KERNELS_CPU_CAPABILITY": name}
    printed = subprocess.run(
        [sys.executable, "-c", READS_AT_LOAD], env=environment, check=True, capture_output=True, text=True
    ).stdout
    message = f"STAMP_KERNELS_CPU_CAPABILITY must be portable, avx2 or avx512, got {name}\n"
    assert printed.count(message) == printed.count("\n") == num_errors
