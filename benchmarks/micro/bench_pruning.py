"""Pruning family: importance, selection, gather, and all of it in `prune`, against what a user would write.

    pytest benchmarks/micro/bench_pruning.py --benchmark-only --benchmark-json=pruning.json
    python benchmarks/table.py pruning.json

A third of the tokens is kept, as in the paper. Peers get ready what they need on the CPU, and padded importances and
states if they need them: this is not in their time. Centrality is in bench_attention.py.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernel_work import KernelWork
from lengths import fixed_lengths, lognormal_lengths, long_tail_lengths, offsets
from torch import Tensor

from stamp_kernels import TokenSelection, gather_tokens, packed_attention, prune, select_tokens, token_importance
from stamp_kernels.profiling.peers.pruning import num_kept, padded_topk, sort_within_sequences, topk_per_sequence

KEEP_RATIO = 1 / 3

# In stacked decorators the first parameter varies fastest: the implementations of one case run next to each other.

# Importance

IMPORTANCE_LENGTHS = lognormal_lengths(512)


def by_token_importance(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor, norm: str) -> Tensor:
    return token_importance(hidden, centrality, cu_seqlens, norm=norm)


def by_vector_norm(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(hidden, {"l1": 1, "l2": 2}[norm], dim=-1, dtype=torch.float32) * centrality


def by_elementwise_ops(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor, norm: str) -> Tensor:
    if norm == "l1":
        return hidden.abs().sum(-1, dtype=torch.float32) * centrality
    return hidden.square().sum(-1, dtype=torch.float32).sqrt() * centrality


IMPORTANCES = {
    "token_importance": by_token_importance,
    "vector_norm": by_vector_norm,
    "elementwise and sum": by_elementwise_ops,
}


@pytest.mark.parametrize("implementation", IMPORTANCES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("width", [128, 512, 1024])
def test_importance(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, width: int, norm: str, implementation: str
) -> None:
    tokens = int(IMPORTANCE_LENGTHS.sum())
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    centrality = torch.rand(tokens, device=device)
    cu_seqlens = offsets(IMPORTANCE_LENGTHS, device)
    measured(
        lambda: IMPORTANCES[implementation](hidden, centrality, cu_seqlens, norm),
        case=f"importance, 512 lognormal, width {width}, {norm}",
        implementation=implementation,
        kernels=[KernelWork(2 * hidden.numel(), hidden.nbytes + 2 * centrality.nbytes)],
        tokens=tokens,
        is_baseline=implementation == "token_importance",
    )


# Selection

SELECTION_LENGTHS = {
    "512 lognormal": lognormal_lengths(512),
    "4096 lognormal": lognormal_lengths(4096),
    "512 long tail": long_tail_lengths(512),
    "8 of 16384": fixed_lengths(8, 16_384),
}
SELECTIONS = (
    "select_tokens",
    "select_tokens, lengths_cpu",
    "padded topk + sort",
    "one sort, packed",
    "topk per sequence",
)


def selections(lengths: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    """One step for each of SELECTIONS, on the same importances."""
    importance = torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(0)).to(device)
    cu_seqlens, max_seqlen = offsets(lengths, device), int(lengths.max())
    lengths_list = lengths.tolist()
    padded = torch.full((len(lengths), max_seqlen), -torch.inf, device=device)
    padded[torch.arange(max_seqlen, device=device) < lengths.to(device)[:, None]] = importance
    kept = torch.tensor([num_kept(n, KEEP_RATIO) for n in lengths_list])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    select = partial(select_tokens, importance, cu_seqlens, max_seqlen, keep_ratio=KEEP_RATIO)
    steps = (
        select,
        partial(select, lengths_cpu=lengths),
        partial(padded_topk, padded, int(kept.max())),
        partial(sort_within_sequences, importance, sequence, cu_seqlens.long(), kept.to(device), int(kept.sum())),
        partial(topk_per_sequence, importance, lengths_list, KEEP_RATIO),
    )
    return dict(zip(SELECTIONS, steps, strict=True))


@pytest.mark.parametrize("implementation", SELECTIONS)
@pytest.mark.parametrize("distribution", SELECTION_LENGTHS)
def test_selection(measured: Callable[..., None], device: torch.device, distribution: str, implementation: str) -> None:
    lengths = SELECTION_LENGTHS[distribution]
    tokens = int(lengths.sum())
    kept = sum(num_kept(n, KEEP_RATIO) for n in lengths.tolist())
    measured(
        selections(lengths, device)[implementation],
        case=f"selection, {distribution}",
        implementation=implementation,
        kernels=[KernelWork(0, 4 * tokens + 8 * kept + 4 * tokens + 8 * len(lengths))],
        tokens=tokens,
        is_baseline=implementation == "select_tokens",
    )


# Gather

# A mask, a position, the states of TIGER's trunk, and the states of wider models.
ROW_BYTES = [1, 4, 512, 4096, 16_384]
# Wide rows come in fewer sequences, so that the results of every implementation fit into memory.
GATHER_LENGTHS, GATHER_LENGTHS_OF_WIDE_ROWS = lognormal_lengths(512), lognormal_lengths(64)


def index_select(x: Tensor, selection: TokenSelection) -> Tensor:
    return x.index_select(0, selection.indices)


def boolean_mask(x: Tensor, selection: TokenSelection) -> Tensor:
    return x[selection.inverse >= 0]


GATHERS = {"gather_tokens": gather_tokens, "index_select": index_select, "boolean mask": boolean_mask}


def make_selection(lengths: Tensor, device: torch.device) -> TokenSelection:
    importance = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(0)).to(device)
    return select_tokens(
        importance, offsets(lengths, device), int(lengths.max()), keep_ratio=KEEP_RATIO, lengths_cpu=lengths
    )


def make_rows(row_bytes: int, device: torch.device) -> tuple[TokenSelection, Tensor]:
    """A selection, and the tensor to gather rows from."""
    lengths = GATHER_LENGTHS if row_bytes <= 4096 else GATHER_LENGTHS_OF_WIDE_ROWS
    tokens = int(lengths.sum())
    selection = make_selection(lengths, device)
    if row_bytes == 1:
        return selection, torch.rand(tokens, device=device) < 0.5
    if row_bytes == 4:
        return selection, torch.arange(tokens, dtype=torch.int32, device=device)
    return selection, torch.randn(tokens, row_bytes // 4, device=device)


@pytest.mark.parametrize("implementation", GATHERS)
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_gather(measured: Callable[..., None], device: torch.device, row_bytes: int, implementation: str) -> None:
    selection, x = make_rows(row_bytes, device)
    measured(
        torch.no_grad()(lambda: GATHERS[implementation](x, selection)),
        case=f"gather, rows of {row_bytes} bytes, forward",
        implementation=implementation,
        kernels=[KernelWork(0, 2 * len(selection.indices) * row_bytes)],
        tokens=len(x),
        is_baseline=implementation == "gather_tokens",
    )


@pytest.mark.parametrize("implementation", GATHERS)
@pytest.mark.parametrize("row_bytes", [row_bytes for row_bytes in ROW_BYTES if row_bytes >= 512])
def test_gather_with_gradient(
    measured: Callable[..., None], device: torch.device, row_bytes: int, implementation: str
) -> None:
    selection, x = make_rows(row_bytes, device)
    x.requires_grad_()
    grad = torch.randn(len(selection.indices), row_bytes // 4, device=device)
    measured(
        lambda: torch.autograd.grad(GATHERS[implementation](x, selection), x, grad),
        case=f"gather, rows of {row_bytes} bytes, forward+backward",
        implementation=implementation,
        kernels=[KernelWork(0, 2 * grad.nbytes), KernelWork(0, grad.nbytes + x.nbytes)],
        tokens=len(x),
        is_baseline=implementation == "gather_tokens",
    )


@pytest.mark.parametrize("implementation", ["gather_tokens", "index_select"])
def test_gather_of_six_tensors(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, implementation: str
) -> None:
    """States, positions, labels, a cosine, a sine and a mask: in one call, or in one call each."""
    selection = make_selection(GATHER_LENGTHS, device)
    tokens = int(GATHER_LENGTHS.sum())
    x = [
        torch.randn(tokens, 128, device=device).to(dtype),
        torch.arange(tokens, dtype=torch.int32, device=device),
        torch.arange(tokens, device=device),
        *(torch.randn(tokens, 64, device=device).to(dtype) for _ in range(2)),
        torch.rand(tokens, device=device) < 0.5,
    ]
    gathers: dict[str, Callable[[], object]] = {
        "gather_tokens": lambda: gather_tokens(x, selection),
        "index_select": lambda: [index_select(tensor, selection) for tensor in x],
    }
    measured(
        torch.no_grad()(gathers[implementation]),
        case="gather of six tensors, forward",
        implementation=implementation,
        kernels=[KernelWork(0, 2 * len(selection.indices) * sum(tensor[0].nbytes for tensor in x))],
        tokens=tokens,
        is_baseline=implementation == "gather_tokens",
    )


# Pruning: from a block's states and centrality to the kept rows of states and positions. The padded way gets the column
# sums of its attention map for free.

NUM_HEADS, HEAD_DIM = 6, 64
# (lengths, width of the states)
PRUNING_SHAPES = {
    "512 lognormal, width 128": (lognormal_lengths(512), 128),
    "256 of 240, width 128": (fixed_lengths(256, 240), 128),
    "256 of 240, width 384": (fixed_lengths(256, 240), 384),
}


class Pruning:
    """One batch, and the ways to prune it. Each returns the kept states of a leaf."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        self.lengths, width = PRUNING_SHAPES[shape]
        self.max_seqlen, self.tokens = int(self.lengths.max()), int(self.lengths.sum())
        self.hidden = torch.randn(self.tokens, width, device=device).to(dtype).requires_grad_()
        self.centrality = torch.rand(self.tokens, device=device)
        self.cu_seqlens = offsets(self.lengths, device)
        self.positions = torch.cat([torch.arange(n) for n in self.lengths.tolist()]).to(device, torch.int32)
        self.kept = torch.tensor([num_kept(n, KEEP_RATIO) for n in self.lengths.tolist()])
        self.total_kept = int(self.kept.sum())
        self.kept_on_device = self.kept.to(device)
        self.sequence = torch.arange(len(self.lengths)).repeat_interleave(self.lengths).to(device)
        self.mask = torch.arange(self.max_seqlen, device=device) < self.lengths.to(device)[:, None]
        self.padded_hidden = torch.zeros(*self.mask.shape, width, device=device, dtype=dtype)
        self.padded_hidden[self.mask] = self.hidden.detach()
        self.padded_hidden.requires_grad_()
        self.padded_centrality = torch.zeros(self.mask.shape, device=device)
        self.padded_centrality[self.mask] = self.centrality

    def by_prune(self) -> Tensor:
        return prune(
            self.hidden, self.centrality, self.cu_seqlens, self.max_seqlen, positions=self.positions,
            keep_ratio=KEEP_RATIO, lengths_cpu=self.lengths,
        ).x  # fmt: skip

    def by_three_ops(self) -> Tensor:
        importance = token_importance(self.hidden, self.centrality, self.cu_seqlens)
        selection = select_tokens(
            importance, self.cu_seqlens, self.max_seqlen, keep_ratio=KEEP_RATIO, lengths_cpu=self.lengths
        )
        return gather_tokens([self.hidden, self.positions], selection)[0]

    def packed_importance(self) -> Tensor:
        """The faster one of torch's ways on each device: test_importance has both."""
        by_norm = by_vector_norm if self.hidden.device.type == "cuda" else by_elementwise_ops
        return by_norm(self.hidden.detach(), self.centrality, self.cu_seqlens, "l1")

    def by_one_sort(self) -> Tensor:
        selection = sort_within_sequences(
            self.packed_importance(), self.sequence, self.cu_seqlens.long(), self.kept_on_device, self.total_kept
        )
        self.positions.index_select(0, selection.indices)
        return self.hidden.index_select(0, selection.indices)

    def by_loop(self) -> Tensor:
        selection = topk_per_sequence(self.packed_importance(), self.lengths.tolist(), KEEP_RATIO)
        self.positions.index_select(0, selection.indices)
        return self.hidden.index_select(0, selection.indices)

    def by_padded_topk(self) -> Tensor:
        importance = self.padded_hidden.detach().abs().sum(-1, dtype=torch.float32) * self.padded_centrality
        kept = padded_topk(importance.masked_fill(~self.mask, -torch.inf), int(self.kept.max()))
        self.mask.gather(1, kept)
        return self.padded_hidden.gather(1, kept[..., None].expand(-1, -1, self.hidden.shape[1]))


PRUNINGS = {
    "prune": Pruning.by_prune,
    "the three ops": Pruning.by_three_ops,
    "one sort, packed": Pruning.by_one_sort,
    "topk per sequence": Pruning.by_loop,
    "padded topk": Pruning.by_padded_topk,
}


def make_pruning_step(pruning: Pruning, implementation: str, direction: str) -> Callable[[], object]:
    kept_states = PRUNINGS[implementation]
    if direction == "forward":
        return torch.no_grad()(lambda: kept_states(pruning))
    leaf = pruning.padded_hidden if implementation == "padded topk" else pruning.hidden
    grad = torch.randn_like(kept_states(pruning))
    return lambda: torch.autograd.grad(kept_states(pruning), leaf, grad)


@pytest.mark.parametrize("implementation", PRUNINGS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", PRUNING_SHAPES)
def test_pruning(
    measured: Callable[..., None],
    device: torch.device,
    dtype: torch.dtype,
    shape: str,
    direction: str,
    implementation: str,
) -> None:
    pruning = Pruning(shape, device, dtype)
    row = pruning.hidden[0].nbytes
    # States, centrality and kept positions read; inverse, indices, kept rows and positions, offsets written.
    forward = KernelWork(
        2 * pruning.hidden.numel(),
        pruning.tokens * (row + 4 + 4) + pruning.total_kept * (4 + 8 + row + 4) + 8 * len(pruning.lengths),
    )
    backward = KernelWork(0, (pruning.total_kept + pruning.tokens) * row)
    measured(
        make_pruning_step(pruning, implementation, direction),
        case=f"pruning, {shape}, {direction}",
        implementation=implementation,
        kernels=[forward] if direction == "forward" else [forward, backward],
        tokens=pruning.tokens,
        is_baseline=implementation == "prune",
    )


@pytest.mark.parametrize("shape", PRUNING_SHAPES)
def test_attention_for_comparison(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, shape: str
) -> None:
    """An attention forward of the same batch: pruning should cost little next to it."""
    pruning = Pruning(shape, device, dtype)
    q, k, v = (torch.randn(pruning.tokens, NUM_HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(3))
    pairs = int(pruning.lengths.square().sum())
    measured(
        torch.no_grad()(lambda: packed_attention(q, k, v, pruning.cu_seqlens, max_seqlen_q=pruning.max_seqlen)),
        case=f"pruning, {shape}, forward",
        implementation="(one attention forward)",
        kernels=[KernelWork(4 * pairs * NUM_HEADS * HEAD_DIM, 4 * q.nbytes + 4 * pruning.tokens * NUM_HEADS)],
        tokens=pruning.tokens,
    )
