"""Importance family: the score of every token. Centrality is in bench_attention.py, beside the attention that it is of.

pytest benchmarks/micro/bench_importance.py --benchmark-only --benchmark-json=importance.json
python benchmarks/table.py importance.json
"""

import pytest
import torch
from kernel_work import KernelWork
from lengths import lognormal_lengths
from torch import Tensor

from stamp_kernels import token_importance

LENGTHS = lognormal_lengths(512)


def fused(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor, norm: str) -> Tensor:
    return token_importance(hidden, centrality, cu_seqlens, norm=norm)


def vector_norm(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(hidden, {"l1": 1, "l2": 2}[norm], dim=-1, dtype=torch.float32) * centrality


def elementwise(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor, norm: str) -> Tensor:
    if norm == "l1":
        return hidden.abs().sum(-1, dtype=torch.float32) * centrality
    return hidden.square().sum(-1, dtype=torch.float32).sqrt() * centrality


IMPLEMENTATIONS = {"token_importance": fused, "vector_norm": vector_norm, "elementwise and sum": elementwise}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("width", [128, 512, 1024])
def test_importance(measured, device, dtype, width, norm, implementation):
    tokens = int(LENGTHS.sum())
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    centrality = torch.rand(tokens, device=device)
    cu_seqlens = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)]).to(device, torch.int32)
    measured(
        lambda: IMPLEMENTATIONS[implementation](hidden, centrality, cu_seqlens, norm),
        case=f"importance, 512 lognormal, width {width}, {norm}",
        implementation=implementation,
        kernels=[KernelWork(2 * hidden.numel(), hidden.nbytes + 2 * centrality.nbytes)],
        tokens=tokens,
        is_baseline=implementation == "token_importance",
    )
