"""Attention family: packed_attention and what a user would run instead, on three distributions of lengths.

    pytest benchmarks/micro/bench_attention.py --benchmark-only --benchmark-json=attention.json
    python benchmarks/table.py attention.json

Padded implementations get padded q, k, v and mask, as in a padded model: padding is not in their time. T5's bias is
computed in every step, since it has a gradient. All inputs have the layout of a model's projections, `[B, S, H, D]` or
`[T, H, D]`. They are fp32 on a CPU and bf16 on a GPU.

The floor counts the query-key pairs of the sequences. Forward: q, k, v are read, output and lse written; two products.
Backward: q, k, v, out, its gradient and lse are read, three gradients written; five products. The share of the floor
may exceed 100 % in a case that fits into the caches. In a case bound by arithmetic it cannot, unless the rate is wrong.
"""

from collections.abc import Callable

import pytest
import torch
from kernel_work import KernelWork
from lengths import fixed_lengths, lognormal_lengths, long_tail_lengths
from torch import Tensor

from stamp_kernels import RelativePositionBias, attention_centrality, packed_attention
from stamp_kernels.profiling.peers.attention import (
    AttentionProblem,
    PreparedAttention,
    centrality_by_second_attention,
    centrality_eager,
    flex,
    nested_sdpa,
    padded_eager,
    padded_sdpa,
    sdpa_loop,
    turbo_t5,
    varlen,
)
from stamp_kernels.profiling.peers.availability import PeerUnavailableError

NUM_HEADS, HEAD_DIM = 6, 64
NUM_BUCKETS = 32
ON_GPU = torch.cuda.is_available()
# The padded maps of a batch have to fit into memory. On a CPU the padded peers should finish a batch in a second.
LENGTHS = {
    "lognormal 8-400": lognormal_lengths(512 if ON_GPU else 64),
    "long tail to 1024": long_tail_lengths(256 if ON_GPU else 8),
    "fixed 512": fixed_lengths(128 if ON_GPU else 8, 512),
}
SWEEP_TOKENS = 65_536 if ON_GPU else 8_192
SWEEP_LENGTHS = [2**i for i in range(13)]
DIRECTIONS = ["forward", "forward+backward"]


def packed(problem: AttentionProblem) -> PreparedAttention:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        bias = None
        if bias_table is not None:
            bias = RelativePositionBias(bias_table, not problem.causal, problem.max_distance)
        return packed_attention(
            q,
            k,
            v,
            problem.cu_seqlens,
            max_seqlen_q=problem.max_seqlen,
            causal=problem.causal,
            scale=problem.scale,
            relative_bias=bias,
        )

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def packed_with_centrality(problem: AttentionProblem) -> PreparedAttention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = packed_attention(q, k, v, problem.cu_seqlens, max_seqlen_q=problem.max_seqlen, return_centrality=True)
        return result.out, result.centrality

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def packed_then_centrality(problem: AttentionProblem) -> PreparedAttention:
    """The separate op, for attention that another kernel has computed."""
    lengths = dict(cu_seqlens_q=problem.cu_seqlens, max_seqlen_q=problem.max_seqlen)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = packed_attention(q, k, v, **lengths, return_lse=True)
        return result.out, attention_centrality(q, k, result.lse, **lengths)

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


WITHOUT_BIAS = {
    "packed_attention": packed,
    "padded SDPA, mask": padded_sdpa,
    "SDPA per sequence": sdpa_loop,
    "nested SDPA": nested_sdpa,
    "varlen_attn": varlen,
    "flex_attention": flex,
}
WITH_BIAS = {
    "packed_attention": packed,
    "padded eager (HF T5)": padded_eager,
    "padded SDPA, bias + mask": padded_sdpa,
    "SDPA per sequence, bias": sdpa_loop,
    "flex_attention, bias": flex,
    "TurboT5": turbo_t5,
}
CENTRALITY = {
    "packed_attention": packed,
    "packed_attention, return_centrality": packed_with_centrality,
    "packed_attention + attention_centrality": packed_then_centrality,
    "padded eager map, column sums": centrality_eager,
    "second attention, q and k exchanged": centrality_by_second_attention,
}


def make_problem(
    lengths: Tensor, device: torch.device, dtype: torch.dtype, *, causal: bool = False, bias: bool = False
) -> AttentionProblem:
    generator = torch.Generator().manual_seed(0)
    total = int(lengths.sum())
    q, k, v = (torch.randn(total, NUM_HEADS, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(3))
    if not bias:
        return AttentionProblem(q, k, v, tuple(lengths.tolist()), causal=causal)
    bias_table = torch.randn(NUM_BUCKETS, NUM_HEADS, generator=generator).to(device, dtype)
    # T5 does not scale q.k, so its queries are smaller.
    return AttentionProblem(q * HEAD_DIM**-0.5, k, v, tuple(lengths.tolist()), causal, scale=1.0, bias_table=bias_table)


def work(problem: AttentionProblem, direction: str) -> list[KernelWork]:
    pairs = sum(n * (n + 1) // 2 if problem.causal else n * n for n in problem.lengths)
    product = 2 * pairs * NUM_HEADS * HEAD_DIM
    rows, lse = problem.q.nbytes, 4 * problem.q.shape[0] * NUM_HEADS
    forward = KernelWork(2 * product, 4 * rows + lse)
    backward = KernelWork(5 * product, 8 * rows + lse)
    return [forward] if direction == "forward" else [forward, backward]


def prepare(peer: Callable[[AttentionProblem], PreparedAttention], problem: AttentionProblem) -> PreparedAttention:
    if problem.q.device.type == "cpu" and peer in (nested_sdpa, flex):
        pytest.skip("on a CPU torch pads or does not compile it: several times slower than the loop")
    try:
        return peer(problem)
    except PeerUnavailableError as error:
        pytest.skip(str(error))


def make_step(problem: AttentionProblem, prepared: PreparedAttention, direction: str) -> Callable[[], object]:
    attend, inputs = prepared.attend, prepared.inputs
    if direction == "forward":
        return torch.no_grad()(lambda: attend(*inputs))
    grad_out = torch.randn_like(problem.q)
    grad_out = problem.pad(grad_out) if prepared.padded else grad_out
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad_out)


def run(
    measured: Callable[..., None],
    problem: AttentionProblem,
    peers: dict[str, Callable[[AttentionProblem], PreparedAttention]],
    implementation: str,
    case: str,
    direction: str,
) -> None:
    measured(
        make_step(problem, prepare(peers[implementation], problem), direction),
        case=f"{case}, {direction}",
        implementation=implementation,
        kernels=work(problem, direction),
        tokens=len(problem.q),
        is_baseline=implementation == "packed_attention",
    )


# In stacked decorators the first parameter varies fastest: the implementations of one case run next to each other.


@pytest.mark.parametrize("implementation", WITHOUT_BIAS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distribution", LENGTHS)
def test_attention(
    measured: Callable[..., None],
    device: torch.device,
    dtype: torch.dtype,
    distribution: str,
    direction: str,
    implementation: str,
) -> None:
    if implementation == "flex_attention" and distribution != "lognormal 8-400":
        pytest.skip("it compiles again for every batch, which takes longer than all other cases: one is enough")
    problem = make_problem(LENGTHS[distribution], device, dtype)
    run(measured, problem, WITHOUT_BIAS, implementation, f"attention, {distribution}", direction)


@pytest.mark.parametrize("implementation", [name for name in WITHOUT_BIAS if name != "flex_attention"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_causal(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, direction: str, implementation: str
) -> None:
    problem = make_problem(LENGTHS["lognormal 8-400"], device, dtype, causal=True)
    run(measured, problem, WITHOUT_BIAS, implementation, "causal attention, lognormal 8-400", direction)


@pytest.mark.parametrize("implementation", WITH_BIAS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distribution", LENGTHS)
def test_bias(
    measured: Callable[..., None],
    device: torch.device,
    dtype: torch.dtype,
    distribution: str,
    direction: str,
    implementation: str,
) -> None:
    if implementation == "flex_attention, bias" and distribution != "lognormal 8-400":
        pytest.skip("it compiles again for every batch, which takes longer than all other cases: one is enough")
    problem = make_problem(LENGTHS[distribution], device, dtype, bias=True)
    run(measured, problem, WITH_BIAS, implementation, f"T5 bias, {distribution}", direction)


@pytest.mark.parametrize("implementation", CENTRALITY)
def test_centrality(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, implementation: str
) -> None:
    """The baseline is a forward without centrality, so the ratio shows the cost of centrality."""
    problem = make_problem(LENGTHS["lognormal 8-400"], device, dtype)
    run(measured, problem, CENTRALITY, implementation, "centrality, lognormal 8-400", "forward")


@pytest.mark.parametrize("length", SWEEP_LENGTHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_length_sweep(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, direction: str, length: int
) -> None:
    """The same number of tokens in sequences of one length: the time per token should have no jump."""
    problem = make_problem(fixed_lengths(SWEEP_TOKENS // length, length), device, dtype)
    measured(
        make_step(problem, packed(problem), direction),
        case=f"packed_attention, {SWEEP_TOKENS:,} tokens in equal lengths, {direction}",
        implementation=f"length {length}",
        kernels=work(problem, direction),
        tokens=len(problem.q),
        is_baseline=length == 64,
        min_rounds=3,
    )
