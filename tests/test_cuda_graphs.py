"""CUDA graphs, captured by hand and by torch.compile, and steps that never wait for the GPU."""

from collections.abc import Callable

import pytest
import torch
from device_cases import BATCH, attention_inputs, cross_entropy_inputs, stamped_t5, t5_batch
from ragged import RaggedBatch
from torch import Tensor

from stamp_kernels import (
    PackedBatch,
    RelativePositionBias,
    gather_tokens,
    multi_token_cross_entropy,
    packed_attention,
    prepare,
    prune,
    select_tokens,
    shift_targets,
    token_importance,
)
from stamp_kernels.integrations.transformers import global_target_counts

pytestmark = pytest.mark.gpu


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of the step, captured after one run without a graph, and the tensors that it writes."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())  # which writes the inputs
    with torch.cuda.stream(side_stream):
        step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def assert_replays(graph: torch.cuda.CUDAGraph, captured: list[Tensor], step: Callable[[], list[Tensor]]) -> None:
    """With other inputs in the same memory, the graph gives the same bits as the step."""
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_attention():
    """Captured once, forward and backward, replayed on other contents and other lengths."""
    inputs, _ = attention_inputs(BATCH, torch.bfloat16)
    q, k, v, table = (x.nan_to_num().to("cuda", torch.bfloat16).requires_grad_() for x in inputs)
    grad = torch.randn_like(q)
    cu_seqlens = BATCH.cu_seqlens.to("cuda")

    def step() -> list[Tensor]:
        result = packed_attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen_q=BATCH.max_seqlen,
            relative_bias=RelativePositionBias(table),
            return_lse=True,
            return_centrality=True,
        )
        return [*result, *torch.autograd.grad(result.out, (q, k, v, table), grad)]

    graph, captured = capture(step)
    with torch.no_grad():
        for x in (q, k, v, table):
            x.normal_()
    cu_seqlens.copy_(RaggedBatch(BATCH.lengths[::-1], BATCH.tail).cu_seqlens)
    assert_replays(graph, captured, step)


@pytest.mark.parametrize("codes_per_item", [1, 4])
def test_pruning(codes_per_item):
    """From attention to the kept rows and back, captured once, replayed on other contents and other lengths."""
    lengths, other_lengths = (32, 0, 4, 260, 64, 8, 8, 120), (8, 64, 260, 4, 0, 32, 120, 8)
    total = sum(lengths) + 3
    q, k, v = (torch.randn(total, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    hidden = torch.randn(total, 64, device="cuda", requires_grad=True)
    labels, protect = torch.randint(0, 99, (total,), device="cuda"), torch.rand(total, device="cuda") < 0.1
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)

    def step() -> list[Tensor]:
        centrality = packed_attention(q, k, v, cu_seqlens, max_seqlen_q=260, return_centrality=True).centrality
        kept = prune(
            [hidden, labels], centrality, cu_seqlens, 260, keep_ratio=1 / 3, protect=protect, num_protected=total,
            codes_per_item=codes_per_item,
        )  # fmt: skip
        importance = token_importance(hidden, centrality, cu_seqlens, norm="l2", normalize="visible_queries")
        selection = select_tokens(importance, cu_seqlens, 260, keep_count=5 * cu_seqlens.diff() // 9)
        rows = gather_tokens(hidden, selection)
        (gradient,) = torch.autograd.grad(kept.x[0].square().sum() + rows.sum(), hidden)
        tensors = [x for x in (*kept.selection, *selection) if isinstance(x, Tensor)]
        return [*kept.x, kept.positions, *tensors, rows, gradient]

    graph, captured = capture(step)
    with torch.no_grad():
        for x in (q, k, v, hidden):
            x.normal_()
    protect.copy_(torch.rand(total) < 0.2)
    cu_seqlens.copy_(torch.tensor([0, *other_lengths]).cumsum(0))
    assert_replays(graph, captured, step)


@pytest.mark.parametrize("width", [64, 512], ids=["computed again", "chunked"])
def test_cross_entropy(width):
    """Captured once with its targets, forward and backward, replayed on other contents, lengths and ignored rows."""
    hidden, weight, _ = cross_entropy_inputs(width, torch.bfloat16)
    hidden, weight = (x.nan_to_num().to("cuda", torch.bfloat16).requires_grad_() for x in (hidden, weight))
    labels, cu_seqlens = torch.randint(0, 2200, (len(hidden),), device="cuda"), BATCH.cu_seqlens.to("cuda")
    step_weights = torch.ones(3, device="cuda")

    def step() -> list[Tensor]:
        targets = shift_targets(labels, cu_seqlens, steps=3)
        loss = multi_token_cross_entropy(hidden, weight, targets, step_weights=step_weights)
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    graph, captured = capture(step)
    with torch.no_grad():
        for x in (hidden, weight, step_weights):
            x.normal_()
    labels.copy_(torch.randint(0, 2200, labels.shape)).masked_fill_(torch.rand(labels.shape, device="cuda") < 0.3, -100)
    cu_seqlens.copy_(RaggedBatch(BATCH.lengths[::-1], BATCH.tail).cu_seqlens)
    assert_replays(graph, captured, step)


RANGES = ((1, 257), (257, 513), (700, 2200))


def targets_in_ranges(integers: Tensor) -> Tensor:
    """A target of its step's range from each integer."""
    columns = zip(RANGES, integers.unbind(1), strict=True)
    return torch.stack([start + column % (end - start) for (start, end), column in columns], dim=1)


def cross_entropy_of_ranges(
    hidden: Tensor, weight: Tensor, integers: Tensor, step_weights: list[float]
) -> list[Tensor]:
    """Loss and gradients of a step for each of RANGES."""
    loss = multi_token_cross_entropy(
        hidden, weight, targets_in_ranges(integers), vocab_ranges=RANGES, step_weights=step_weights
    )
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def gpu_inputs_of_ranges(width: int = 64) -> list[Tensor]:
    """hidden, weight and integers for targets; with so many rows wide states are computed in chunks."""
    rows = [torch.randn(n, width, device="cuda").bfloat16().requires_grad_() for n in (1000, 2200)]
    return [*rows, torch.randint(0, 10_000, (1000, len(RANGES)), device="cuda")]


BOTH_WAYS = pytest.mark.parametrize("width", [64, 320], ids=["computed again", "chunked"])


@BOTH_WAYS
def test_graph_outlives_other_ranges_and_weights(width):
    """100 calls with other arguments neither evict nor overwrite what it reads on the device."""
    hidden, weight, integers = gpu_inputs_of_ranges(width)
    prepare("cuda", vocab_ranges=RANGES)

    def step() -> list[Tensor]:
        return cross_entropy_of_ranges(hidden, weight, integers, [1.0, 0.5, 0.25])

    graph, captured = capture(step)
    targets = torch.tensor([[0, 800]], device="cuda").expand(len(hidden), 2)
    for i in range(100):
        multi_token_cross_entropy(
            hidden, weight, targets, vocab_ranges=((0, 10 + i), (800, 811 + i)), step_weights=[1.0, 1 / (i + 2)]
        )
    with torch.no_grad():
        hidden.normal_()
    integers.random_(0, 10_000)
    assert_replays(graph, captured, step)


@BOTH_WAYS
def test_graph_keeps_step_weights_of_its_capture(width):
    """Floats are part of the graph; other weights need another capture."""
    hidden, weight, integers = gpu_inputs_of_ranges(width)
    graphs = []
    for step_weights in ([1.0, 0.5, 0.25], [0.0, 2.0, 2.0], [1.0, 1.0, 1.0]):

        def step(step_weights: list[float] = step_weights) -> list[Tensor]:
            return cross_entropy_of_ranges(hidden, weight, integers, step_weights)

        graphs.append((*capture(step), step))
    with torch.no_grad():
        hidden.normal_()
    for graph, captured, step in graphs:
        assert_replays(graph, captured, step)


def test_capture_without_constants_names_prepare():
    hidden, weight, integers = gpu_inputs_of_ranges()
    targets = (integers[:, :2] % 3) + torch.tensor([5, 9], device="cuda")
    options = dict(vocab_ranges=((5, 8), (9, 12)), memory="minimal")  # of no other test

    def step() -> Tensor:
        return multi_token_cross_entropy(hidden, weight, targets, **options)

    multi_token_cross_entropy(hidden, weight, targets, vocab_ranges=((5, 9), (9, 13)), memory="minimal")  # compiles
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"stamp_kernels\.prepare"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
    torch.cuda.synchronize()
    prepare("cuda", vocab_ranges=options["vocab_ranges"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured, step())


@pytest.fixture
def no_constants(monkeypatch):
    """As in a process whose first calls are compiled."""
    from stamp_kernels.triton_kernels import constants

    monkeypatch.setattr(constants, "_CONSTANTS", {})


def assert_reduced_overhead_changes_nothing(
    function: Callable[..., list[Tensor]], batches: list[tuple[Tensor, ...]], differentiate: bool
) -> None:
    """mode="reduce-overhead" warms up, captures a CUDA graph and replays it, and gives the bits of the eager function.

    The first call makes constants while torch sends allocations to the graphs' memory pool, where nothing may stay.
    """
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for batch in batches:
        results = []
        for run in (compiled, function):
            torch.compiler.cudagraph_mark_step_begin()
            outputs = run(*batch)
            if differentiate:
                inputs = [x for x in batch if x.requires_grad]
                outputs = [*outputs, *torch.autograd.grad(outputs[0], inputs, torch.ones_like(outputs[0]))]
            results.append([x.detach().clone() for x in outputs])  # the next replay overwrites them
        for out, want in zip(*results, strict=True):
            assert torch.equal(out, want)


@pytest.mark.parametrize("differentiate", [False, True])
def test_compiled_attention(no_constants, differentiate):
    cu_seqlens = BATCH.cu_seqlens.to("cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> list[Tensor]:
        bias = RelativePositionBias(table)
        return list(
            packed_attention(
                q,
                k,
                v,
                cu_seqlens,
                max_seqlen_q=BATCH.max_seqlen,
                relative_bias=bias,
                return_lse=True,
                return_centrality=True,
            )
        )

    def batch() -> tuple[Tensor, ...]:
        shapes = (*[(BATCH.valid, 4, 32)] * 3, (32, 4))
        return tuple(torch.randn(*shape, device="cuda").bfloat16().requires_grad_(differentiate) for shape in shapes)

    assert_reduced_overhead_changes_nothing(attend, [batch() for _ in range(4)], differentiate)


@BOTH_WAYS
def test_compiled_cross_entropy(no_constants, width):
    """With ranges and step weights as numbers."""

    def loss_of(hidden: Tensor, weight: Tensor, integers: Tensor) -> list[Tensor]:
        targets = targets_in_ranges(integers)
        return [multi_token_cross_entropy(hidden, weight, targets, vocab_ranges=RANGES, step_weights=[1.0, 0.5, 0.25])]

    batches = [tuple(gpu_inputs_of_ranges(width)) for _ in range(4)]
    assert_reduced_overhead_changes_nothing(loss_of, batches, differentiate=True)


def test_training_step_never_waits_for_the_gpu():
    model, batch = stamped_t5().to("cuda"), t5_batch()
    packed = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"]).to("cuda")
    labels, future_ids = batch["labels"].to("cuda"), batch["future_ids"].to("cuda")
    counts = global_target_counts(labels, future_ids, model.stamp_prediction_config)
    inputs = dict(packed_inputs=packed, labels=labels, future_ids=future_ids, **counts)
    model(**inputs).loss.backward()  # the first call compiles kernels and copies constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
