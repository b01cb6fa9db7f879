"""Every peer computes the results and gradients of packed_attention: otherwise their times would not compare."""

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from stamp_kernels import RelativePositionBias, packed_attention
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

LENGTHS = (5, 0, 1, 37, 2, 13)
NUM_BUCKETS = 16  # the exact distances, the logarithmic ranges and the shared last bucket all occur
MAX_DISTANCE = 20

Peer = Callable[[AttentionProblem], PreparedAttention]


def make_problem(*, causal: bool = False, bias: bool = False) -> AttentionProblem:
    """float64, values that bf16 holds exactly; scaled by 0.5 with a bias, and by the default without."""
    q, k, v = (torch.randn(sum(LENGTHS), 3, 16).bfloat16().double() for _ in range(3))
    table = torch.randn(NUM_BUCKETS, 3).bfloat16().double() if bias else None
    return AttentionProblem(q, k, v, LENGTHS, causal, 0.5 if bias else None, table, MAX_DISTANCE)


def moved(problem: AttentionProblem, device: str, dtype: torch.dtype) -> AttentionProblem:
    q, k, v, table = (
        None if x is None else x.to(device, dtype) for x in (problem.q, problem.k, problem.v, problem.bias_table)
    )
    return AttentionProblem(q, k, v, problem.lengths, problem.causal, problem.scale, table, problem.max_distance)


def ours(problem: AttentionProblem) -> dict[str, Tensor]:
    """Output, centrality and gradients, by name."""
    inputs = problem.leaves(padded=False)
    bias = None
    if problem.bias_table is not None:
        bias = RelativePositionBias(inputs[3], bidirectional=not problem.causal, max_distance=problem.max_distance)
    result = packed_attention(
        *inputs[:3],
        problem.cu_seqlens,
        max_seqlen_q=problem.max_seqlen,
        causal=problem.causal,
        scale=problem.scale,
        relative_bias=bias,
        return_centrality=True,
    )
    gradients = torch.autograd.grad(result.out, inputs, incoming_gradient(problem))
    return {"out": result.out, "centrality": result.centrality, **named_gradients(gradients)}


def incoming_gradient(problem: AttentionProblem) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-4, 5, problem.q.shape, generator=generator).to(problem.q)


def named_gradients(gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("dq", "dk", "dv", "dbias_table"), gradients, strict=False))


def forward(peer: Peer, problem: AttentionProblem) -> dict[str, Tensor]:
    prepared = peer(problem)
    out = prepared.attend(*(x.detach() for x in prepared.inputs))
    return {"out": out[problem.valid] if prepared.padded else out}


def forward_and_backward(peer: Peer, problem: AttentionProblem) -> dict[str, Tensor]:
    """Output and gradients in the packed layout; padding receives no gradient, as with a masked loss."""
    prepared = peer(problem)
    grad_out = incoming_gradient(problem)
    out = prepared.attend(*prepared.inputs)
    gradients = list(torch.autograd.grad(out, prepared.inputs, problem.pad(grad_out) if prepared.padded else grad_out))
    if prepared.padded:
        out = out[problem.valid]
        for i in range(3):
            assert not gradients[i][~problem.valid].any()
            gradients[i] = gradients[i][problem.valid]
    return {"out": out, **named_gradients(gradients)}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, result in got.items():
        assert_close(result.detach().cpu(), expected[name].detach(), dtype)


with_and_without = pytest.mark.parametrize(
    ("causal", "bias"), [(False, False), (True, False), (False, True), (True, True)]
)


@with_and_without
@pytest.mark.parametrize("peer", [padded_eager, padded_sdpa, sdpa_loop])
def test_peers_of_a_cpu(peer, causal, bias):
    problem = make_problem(causal=causal, bias=bias)
    assert_same(forward_and_backward(peer, problem), ours(problem), torch.float64)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's, of this peer
def test_nested_sdpa():
    problem = make_problem()
    assert_same(forward_and_backward(nested_sdpa, problem), ours(problem), torch.float64)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # torch's, of this peer
@with_and_without
def test_flex_forward_without_a_compiler(causal, bias):
    problem = make_problem(causal=causal, bias=bias)
    assert_same(forward(flex, moved(problem, "cpu", torch.float32)), ours(problem), torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_eager_centrality(bias):
    problem = make_problem(bias=bias)
    prepared = centrality_eager(problem)
    out, centrality = prepared.attend(*prepared.inputs)
    assert_same({"out": out[problem.valid], "centrality": centrality[problem.valid]}, ours(problem), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centrality_by_a_second_attention(dtype):
    """A single bf16 lse would be off by 1 %; with three parts the sums are as exact as the attention's own scores."""
    problem = make_problem()
    prepared = centrality_by_second_attention(moved(problem, "cpu", dtype))
    out, centrality = prepared.attend(*prepared.inputs)
    assert_same({"out": out}, ours(problem), dtype)
    assert_same({"centrality": centrality}, ours(problem), torch.float32)


@pytest.mark.parametrize(
    ("peer", "problem", "reason"),
    [
        (nested_sdpa, dict(bias=True), "nested SDPA has no relative-position bias"),
        (nested_sdpa, dict(causal=True), "nested SDPA has no causal order on a CPU"),
        (varlen, dict(bias=True), "varlen_attn has no relative-position bias"),
        (varlen, dict(), "varlen_attn needs a GPU"),
        (turbo_t5, dict(), "TurboT5 is only compared with a bias"),
        (turbo_t5, dict(bias=True), "TurboT5 needs a GPU"),
        (centrality_by_second_attention, dict(bias=True), "the second attention has no relative-position bias"),
        (centrality_by_second_attention, dict(causal=True), "no mask for an exchanged causal order"),
    ],
)
def test_peers_say_why_they_are_unavailable(peer, problem, reason):
    with pytest.raises(PeerUnavailableError, match=reason):
        peer(make_problem(**problem))


@pytest.mark.gpu
@with_and_without
@pytest.mark.parametrize("peer", [padded_eager, padded_sdpa, sdpa_loop, nested_sdpa, varlen, flex, turbo_t5])
def test_peers_of_a_gpu(peer, causal, bias):
    """In fp16, which all of them take, to the bound of bf16, since some round their maps."""
    problem = make_problem(causal=causal, bias=bias)
    on_gpu = moved(problem, "cuda", torch.float16)
    try:
        got = forward_and_backward(peer, on_gpu)
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    assert_same(got, ours(problem), torch.bfloat16)


@pytest.mark.gpu
def test_centrality_by_a_second_varlen_attention():
    problem = make_problem()
    prepared = centrality_by_second_attention(moved(problem, "cuda", torch.bfloat16))
    out, centrality = prepared.attend(*prepared.inputs)
    assert_same({"out": out}, ours(problem), torch.bfloat16)
    assert_same({"centrality": centrality}, ours(problem), torch.float32)
