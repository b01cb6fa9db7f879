"""Selection family: the choice of tokens and the gather of their rows, forward and backward.

    pytest benchmarks/micro/bench_selection.py --benchmark-only --benchmark-json=selection.json
    python benchmarks/table.py selection.json

A third of the tokens is kept, as in the paper's setting. Peers of the selection get what they need on the host, and
scores padded and ready where they want them padded: that is not in their time.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernel_work import KernelWork
from lengths import fixed_lengths, lognormal_lengths, long_tail_lengths
from torch import Tensor

from stamp_kernels import TokenSelection, gather_tokens, select_tokens
from stamp_kernels.profiling.peers.pruning import num_kept, padded_topk, sort_within_sequences, topk_per_sequence

RATIO = 1 / 3
LENGTHS = {
    "512 lognormal": lognormal_lengths(512),
    "4096 lognormal": lognormal_lengths(4096),
    "512 long tail": long_tail_lengths(512),
    "8 of 16384": fixed_lengths(8, 16_384),
}
# Of the gathers: wide rows come in fewer sequences, so that every implementation's results fit into memory.
TOKENS, FEWER_TOKENS = LENGTHS["512 lognormal"], lognormal_lengths(64)


def offsets_of(lengths: Tensor, device: torch.device) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)


def make_selection(lengths: Tensor, device: torch.device) -> TokenSelection:
    importance = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(0)).to(device)
    return select_tokens(
        importance, offsets_of(lengths, device), int(lengths.max()), keep_ratio=RATIO, lengths_cpu=lengths
    )


# Selection


def selections(lengths: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    importance = torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(0)).to(device)
    cu_seqlens, longest = offsets_of(lengths, device), int(lengths.max())
    on_host = lengths.tolist()
    padded = torch.full((len(on_host), longest), -torch.inf, device=device)
    padded[torch.arange(longest, device=device) < lengths.to(device)[:, None]] = importance
    kept = torch.tensor([num_kept(n, RATIO) for n in on_host])
    sequence = torch.arange(len(on_host)).repeat_interleave(lengths).to(device)
    select = partial(select_tokens, importance, cu_seqlens, longest, keep_ratio=RATIO)
    return {
        "select_tokens": select,
        "select_tokens, lengths_cpu": partial(select, lengths_cpu=lengths),
        "padded topk + sort": partial(padded_topk, padded, int(kept.max())),
        "one sort, packed": partial(
            sort_within_sequences, importance, sequence, cu_seqlens.long(), kept.to(device), int(kept.sum())
        ),
        "topk per sequence": partial(topk_per_sequence, importance, on_host, RATIO),
    }


@pytest.mark.parametrize(
    "implementation",
    ["select_tokens", "select_tokens, lengths_cpu", "padded topk + sort", "one sort, packed", "topk per sequence"],
)
@pytest.mark.parametrize("distribution", LENGTHS)
def test_selection(measured, device, distribution, implementation):
    lengths = LENGTHS[distribution]
    tokens = int(lengths.sum())
    kept = sum(num_kept(n, RATIO) for n in lengths.tolist())
    measured(
        selections(lengths, device)[implementation],
        case=f"selection, {distribution}",
        implementation=implementation,
        kernels=[KernelWork(0, 4 * tokens + 8 * kept + 4 * tokens + 8 * len(lengths))],
        tokens=tokens,
        is_baseline=implementation == "select_tokens",
    )


# Gather


def index_select(x: Tensor, selection: TokenSelection) -> Tensor:
    return x.index_select(0, selection.indices)


def boolean_mask(x: Tensor, selection: TokenSelection) -> Tensor:
    return x[selection.inverse >= 0]


GATHERS = {"gather_tokens": gather_tokens, "index_select": index_select, "boolean mask": boolean_mask}
# Bytes of a row: a mask, a position, the states of TIGER's trunk and of wider models.
ROW_BYTES = [1, 4, 512, 4096, 16_384]


def make_rows(row_bytes: int, device: torch.device) -> tuple[TokenSelection, Tensor]:
    """A selection, and what its rows are taken of."""
    lengths = TOKENS if row_bytes <= 4096 else FEWER_TOKENS
    tokens = int(lengths.sum())
    selection = make_selection(lengths, device)
    if row_bytes == 1:
        return selection, torch.rand(tokens, device=device) < 0.5
    if row_bytes == 4:
        return selection, torch.arange(tokens, dtype=torch.int32, device=device)
    return selection, torch.randn(tokens, row_bytes // 4, device=device)


@pytest.mark.parametrize("implementation", GATHERS)
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_gather(measured, device, row_bytes, implementation):
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
@pytest.mark.parametrize("row_bytes", [width for width in ROW_BYTES if width >= 512])
def test_gather_and_its_gradient(measured, device, row_bytes, implementation):
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
def test_gather_of_all_that_belongs_to_a_token(measured, device, dtype, implementation):
    """States, positions, labels, a cosine and a sine, a mask: in one call, or one after the other."""
    selection = make_selection(TOKENS, device)
    tokens = int(TOKENS.sum())
    x = [
        torch.randn(tokens, 128, device=device).to(dtype),
        torch.arange(tokens, dtype=torch.int32, device=device),
        torch.arange(tokens, device=device),
        *(torch.randn(tokens, 64, device=device).to(dtype) for _ in range(2)),
        torch.rand(tokens, device=device) < 0.5,
    ]
    gathers = {
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
