"""The whole of SAP, from a block's states and centrality to the kept rows, against what a user would write.

    pytest benchmarks/micro/bench_pruning.py --benchmark-only --benchmark-json=pruning.json
    python benchmarks/table.py pruning.json

A third of the tokens is kept, of states and positions. The padded way gets the column sums of its attention map for
free. An attention forward of the same batch, 6 heads of 64, stands beside them: pruning should cost little next to it.
"""

from collections.abc import Callable

import pytest
import torch
from kernel_work import KernelWork
from lengths import fixed_lengths, lognormal_lengths
from torch import Tensor

from stamp_kernels import gather_tokens, packed_attention, prune, select_tokens, token_importance
from stamp_kernels.profiling.peers.pruning import num_kept, sort_within_sequences, topk_per_sequence

RATIO = 1 / 3
HEADS, HEAD_DIM = 6, 64
# (lengths, width of the states)
SHAPES = {
    "512 lognormal, width 128": (lognormal_lengths(512), 128),
    "256 of 240, width 128": (fixed_lengths(256, 240), 128),
    "256 of 240, width 384": (fixed_lengths(256, 240), 384),
}


class Pruning:
    """One batch, and the ways to prune it: each gives the kept states of a leaf."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        self.lengths, width = SHAPES[shape]
        self.longest, self.tokens = int(self.lengths.max()), int(self.lengths.sum())
        self.hidden = torch.randn(self.tokens, width, device=device).to(dtype).requires_grad_()
        self.centrality = torch.rand(self.tokens, device=device)
        self.cu_seqlens = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)]).to(device, torch.int32)
        self.positions = torch.cat([torch.arange(n) for n in self.lengths.tolist()]).to(device, torch.int32)
        self.kept = torch.tensor([num_kept(n, RATIO) for n in self.lengths.tolist()])
        self.total_kept = int(self.kept.sum())
        self.kept_on_device = self.kept.to(device)
        self.sequence = torch.arange(len(self.lengths)).repeat_interleave(self.lengths).to(device)
        mask = torch.arange(self.longest, device=device) < self.lengths.to(device)[:, None]
        self.padded_hidden = torch.zeros(*mask.shape, width, device=device, dtype=dtype)
        self.padded_hidden[mask] = self.hidden.detach()
        self.padded_hidden.requires_grad_()
        self.padded_centrality = torch.zeros(mask.shape, device=device)
        self.padded_centrality[mask] = self.centrality
        self.mask = mask

    def fused(self) -> Tensor:
        return prune(
            self.hidden, self.centrality, self.cu_seqlens, self.longest, positions=self.positions, keep_ratio=RATIO,
            lengths_cpu=self.lengths,
        ).x  # fmt: skip

    def one_after_the_other(self) -> Tensor:
        importance = token_importance(self.hidden, self.centrality, self.cu_seqlens)
        selection = select_tokens(importance, self.cu_seqlens, self.longest, keep_ratio=RATIO, lengths_cpu=self.lengths)
        return gather_tokens([self.hidden, self.positions], selection)[0]

    def packed_scores(self) -> Tensor:
        """By the faster of torch's ways: bench_importance.py has them both."""
        hidden = self.hidden.detach()
        if hidden.device.type == "cuda":
            return torch.linalg.vector_norm(hidden, 1, dim=-1, dtype=torch.float32) * self.centrality
        return hidden.abs().sum(-1, dtype=torch.float32) * self.centrality

    def one_sort(self) -> Tensor:
        selection = sort_within_sequences(
            self.packed_scores(), self.sequence, self.cu_seqlens.long(), self.kept_on_device, self.total_kept
        )
        self.positions.index_select(0, selection.indices)
        return self.hidden.index_select(0, selection.indices)

    def loop(self) -> Tensor:
        selection = topk_per_sequence(self.packed_scores(), self.lengths.tolist(), RATIO)
        self.positions.index_select(0, selection.indices)
        return self.hidden.index_select(0, selection.indices)

    def padded(self) -> Tensor:
        importance = self.padded_hidden.detach().abs().sum(-1, dtype=torch.float32) * self.padded_centrality
        importance = importance.masked_fill(~self.mask, -torch.inf)
        kept = importance.topk(int(self.kept.max()), dim=1, sorted=False).indices.sort(dim=1).values
        self.mask.gather(1, kept)
        return self.padded_hidden.gather(1, kept[..., None].expand(-1, -1, self.hidden.shape[1]))


IMPLEMENTATIONS = {
    "prune": Pruning.fused,
    "the three ops": Pruning.one_after_the_other,
    "one sort, packed": Pruning.one_sort,
    "topk per sequence": Pruning.loop,
    "padded topk": Pruning.padded,
}


def make_step(pruning: Pruning, implementation: str, direction: str) -> Callable[[], object]:
    way = IMPLEMENTATIONS[implementation]
    if direction == "forward":
        return torch.no_grad()(lambda: way(pruning))
    leaf = pruning.padded_hidden if implementation == "padded topk" else pruning.hidden
    grad = torch.randn_like(way(pruning))
    return lambda: torch.autograd.grad(way(pruning), leaf, grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pruning(measured, device, dtype, shape, direction, implementation):
    pruning = Pruning(shape, device, dtype)
    row = pruning.hidden[0].nbytes
    # States, centrality and kept positions read; inverse, indices, kept rows and positions, offsets written.
    forward = KernelWork(
        2 * pruning.hidden.numel(),
        pruning.tokens * (row + 4 + 4) + pruning.total_kept * (4 + 8 + row + 4) + 8 * len(pruning.lengths),
    )
    backward = KernelWork(0, (pruning.total_kept + pruning.tokens) * row)
    measured(
        make_step(pruning, implementation, direction),
        case=f"pruning, {shape}, {direction}",
        implementation=implementation,
        kernels=[forward] if direction == "forward" else [forward, backward],
        tokens=pruning.tokens,
        is_baseline=implementation == "prune",
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_beside_it(measured, device, dtype, shape):
    pruning = Pruning(shape, device, dtype)
    q, k, v = (torch.randn(pruning.tokens, HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(3))
    pairs = int(pruning.lengths.square().sum())
    measured(
        torch.no_grad()(lambda: packed_attention(q, k, v, pruning.cu_seqlens, max_seqlen_q=pruning.longest)),
        case=f"pruning, {shape}, forward",
        implementation="(one attention forward)",
        kernels=[KernelWork(4 * pairs * HEADS * HEAD_DIM, 4 * q.nbytes + 4 * pruning.tokens * HEADS)],
        tokens=pruning.tokens,
    )
