"""Fixtures of the tests of Hugging Face models."""

import pytest

from stamp_kernels.integrations.transformers import t5_stacks


@pytest.fixture
def packed_calls(monkeypatch) -> list[str]:
    """The kinds of packed attention that ran."""
    calls = []
    run = t5_stacks.packed_attention

    def counted(q, k, v, cu_seqlens_q, cu_seqlens_k=None, *args, **kwargs):
        calls.append("self" if cu_seqlens_k is None else "cross")
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, *args, **kwargs)

    monkeypatch.setattr(t5_stacks, "packed_attention", counted)
    return calls
