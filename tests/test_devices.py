"""Every family on the device at hand, at realistic sizes, against the float64 reference on the CPU.

The other test files say what is right; this one says that a GPU computes the same, bf16 included.
"""

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from stamp_kernels import (
    PackedBatch,
    RelativePositionBias,
    attention_centrality,
    gather_tokens,
    multi_token_cross_entropy,
    packed_attention,
    prepare,
    prune,
    select_tokens,
    shift_targets,
    token_importance,
    use_backend,
)
from stamp_kernels.integrations.transformers import (
    PredictionConfig,
    PruningConfig,
    StampT5ForConditionalGeneration,
    apply_stamp,
    global_target_counts,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = (33, 0, 1, 257, 64, 5, 5, 120)
TAIL = 3


def offsets() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def random_like_trained(*shape: int) -> Tensor:
    """float64 on the CPU; tail rows are NaN, which nothing may read."""
    x = torch.randn(*shape, dtype=torch.float64)
    x[sum(LENGTHS) :] = torch.nan
    return x


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of the step, which has run once before, and what it will write."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())  # that writes the inputs
    with torch.cuda.stream(side_stream):
        step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def assert_replays(graph: torch.cuda.CUDAGraph, captured: list[Tensor], step: Callable[[], list[Tensor]]) -> None:
    """With other inputs in the same memory, the graph gives the bits that the step gives."""
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


# A batch for each way that kernels divide the work, by the longest sequence.
ATTENTION_LENGTHS = {
    "up to 16": (3, 0, 16, 1, 7, 16, 2, 5, 11),
    "up to 32": (32, 5, 0, 17, 32),
    "up to 128": (128, 0, 64, 1, 97, 5),
    "up to 257": LENGTHS,
    "up to 2100": (3, 2100, 700),
}


def attention_step(
    inputs: list[Tensor], lengths: tuple[int, ...], grad: Tensor, max_seqlen: int | None = None, dropout_p: float = 0.1
) -> list[Tensor]:
    """out, lse, centrality twice and all gradients of one attention with bias, dropout and grouped heads."""
    q, k, v, table = (x.detach().requires_grad_() for x in inputs)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32)
    max_seqlen = max_seqlen or max(lengths)
    options = dict(causal=True, relative_bias=RelativePositionBias(table))
    result = packed_attention(
        q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, **options, dropout_p=dropout_p,
        dropout_seed=torch.tensor([7], device=q.device) if dropout_p > 0 else None, return_lse=True,
        return_centrality=True,
    )  # fmt: skip
    centrality = attention_centrality(q, k, result.lse, cu_seqlens, max_seqlen_q=max_seqlen, **options)
    gradients = torch.autograd.grad(result.out, (q, k, v, table), grad)
    return [result.out, result.lse.t(), result.centrality, centrality, *gradients]


def attention_inputs(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v, table and the gradient of out, in float64 but such as `dtype` can hold; tail rows are NaN."""
    total = sum(lengths) + TAIL
    rows = [torch.randn(total, heads, 64, dtype=torch.float64) for heads in (6, 2, 2)]
    for x in rows:
        x[sum(lengths) :] = torch.nan
    inputs = [x.to(dtype).double() for x in (*rows, torch.randn(32, 6, dtype=torch.float64))]
    return inputs, torch.randn(total, 6, 64).to(dtype).double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", ATTENTION_LENGTHS.values(), ids=ATTENTION_LENGTHS)
def test_attention(device, dtype, lengths):
    inputs, grad = attention_inputs(lengths, dtype)
    expected = attention_step(inputs, lengths, grad)
    low, low_grad = [x.to(device, dtype) for x in inputs], grad.to(device, dtype)
    runs = [attention_step(low, lengths, low_grad) for _ in range(2)]
    for out, again, ref in zip(*runs, expected, strict=True):
        assert torch.equal(out, again)
        assert_close(out.cpu(), ref, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", ATTENTION_LENGTHS.values(), ids=ATTENTION_LENGTHS)
def test_attention_of_a_sequence_has_the_same_bits_alone_and_in_a_batch(device, dtype, lengths):
    inputs, grad = attention_inputs(lengths, dtype)
    *rows, table = (x.to(device, dtype) for x in inputs)
    grad = grad.to(device, dtype)
    together = attention_step([*rows, table], lengths, grad, dropout_p=0.0)
    start = 0
    for n in lengths:
        of_sequence = slice(start, start + n)
        start += n
        alone = attention_step(
            [*(x[of_sequence] for x in rows), table], (n,), grad[of_sequence], max(lengths), dropout_p=0.0
        )
        for got, want in zip(alone[:-1], together[:-1], strict=True):  # the table's gradient is the whole batch's
            assert torch.equal(got, want[of_sequence])


@pytest.mark.gpu
def test_attention_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, grad = attention_inputs(LENGTHS, torch.float32)
    results = [
        attention_step([x.to(device, torch.float32) for x in inputs], LENGTHS, grad.to(device, torch.float32))
        for device in ("cuda:0", "cuda:1")
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.cpu(), second.cpu())


@pytest.mark.gpu
def test_attention_in_a_cuda_graph():
    """Captured once, forward and backward, replayed on other contents and other lengths."""
    lengths, other_lengths = (33, 0, 1, 257, 64, 5, 5, 120), (5, 64, 257, 1, 0, 33, 120, 5)
    inputs, _ = attention_inputs(lengths, torch.bfloat16)
    q, k, v, table = (x.nan_to_num().to("cuda", torch.bfloat16).requires_grad_() for x in inputs)
    grad = torch.randn_like(q)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)

    def step() -> list[Tensor]:
        result = packed_attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen_q=257,
            relative_bias=RelativePositionBias(table),
            return_lse=True,
            return_centrality=True,
        )
        return [*result, *torch.autograd.grad(result.out, (q, k, v, table), grad)]

    graph, captured = capture(step)
    with torch.no_grad():
        for x in (q, k, v, table):
            x.normal_()
    cu_seqlens.copy_(torch.tensor([0, *other_lengths]).cumsum(0))
    assert_replays(graph, captured, step)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_selection_and_gather(device, dtype):
    total = sum(LENGTHS) + TAIL
    hidden = random_like_trained(total, 128).to(dtype)
    centrality = torch.rand(total)
    expected = token_importance(hidden.double(), centrality.double(), offsets(), norm="l2")
    importance = token_importance(hidden.to(device), centrality.to(device), offsets().to(device), norm="l2")
    assert_close(importance.cpu(), expected, torch.float32)

    on_host = select_tokens(importance.cpu(), offsets(), max(LENGTHS), keep_ratio=1 / 3)
    selection = select_tokens(
        importance, offsets().to(device), max(LENGTHS), keep_ratio=1 / 3, lengths_cpu=torch.tensor(LENGTHS)
    )
    assert torch.equal(selection.indices.cpu(), on_host.indices)
    assert torch.equal(selection.inverse.cpu(), on_host.inverse)
    rows = gather_tokens(hidden.to(device), selection)
    assert torch.equal(rows.cpu(), hidden[on_host.indices])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(8,) * 600, (2000, 8, 0, 12), (40_000, 4, 12_000)], ids=["many", "long", "huge"])
def test_prune(device, dtype, lengths):
    """Short and long sequences together; scores without near ties, so that every device keeps the same rows."""
    total = sum(lengths) + TAIL
    scores = torch.randperm(total).double() + 1  # whole numbers, exact in float32
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    protect, labels = torch.rand(total) < 0.05, torch.arange(total)
    # The norm of a row is 1 where one number is 1 and the others 0, in every dtype.
    hidden = torch.nn.functional.one_hot(labels % 16, 16).to(dtype)

    def run(device: str) -> list[Tensor]:
        kept = prune(
            [x.to(device) for x in (hidden, labels)], scores.to(device), cu_seqlens.to(device), max(lengths),
            keep_ratio=1 / 3, protect=protect.to(device), codes_per_item=4,
        )  # fmt: skip
        return [kept.selection.cu_seqlens, kept.selection.inverse, *kept.x, kept.positions, kept.selection.indices]

    with use_backend("reference"):
        expected = run("cpu")
    got = run(device)
    for out, ref in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(out.cpu(), ref)
    for out, ref in zip(got[2:], expected[2:], strict=True):  # a GPU has rows to spare
        assert torch.equal(out[: len(ref)].cpu(), ref)


def cross_entropy_step(
    hidden: Tensor, weight: Tensor, targets: Tensor, memory: str = "auto", reduction: str = "mean"
) -> list[Tensor]:
    """Loss and gradients of three steps with all options."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = multi_token_cross_entropy(
        hidden, weight, targets, step_weights=[1.0, 0.5, 0.25], label_smoothing=0.1, z_loss=1e-3, memory=memory,
        reduction=reduction,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))]


def cross_entropy_inputs(width: int, dtype: torch.dtype, hidden_steps: int = 1) -> list[Tensor]:
    """hidden, weight and targets; so many classes that wide states are worked through in chunks."""
    labels = torch.randint(0, 2200, (sum(LENGTHS) + TAIL,))
    hidden = torch.stack([random_like_trained(len(labels), width) for _ in range(hidden_steps)])
    weight = torch.randn(2200, width, dtype=torch.float64) / width**0.5
    hidden = hidden[0] if hidden_steps == 1 else hidden
    return [hidden.to(dtype).double(), weight.to(dtype).double(), shift_targets(labels, offsets(), steps=3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize(("width", "hidden_steps"), [(64, 1), (64, 3), (200, 1), (512, 1), (512, 3)])
def test_cross_entropy(device, dtype, memory, width, hidden_steps):
    hidden, weight, targets = cross_entropy_inputs(width, dtype, hidden_steps)
    with use_backend("reference"):
        expected = cross_entropy_step(hidden, weight, targets)
    given = hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)
    runs = [cross_entropy_step(*given, memory) for _ in range(2)]
    for out, again, ref in zip(*runs, expected, strict=True):
        assert torch.equal(out, again)
        assert_close(out.cpu(), ref, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [64, 512])
def test_shifted_targets_and_losses_of_a_row_are_the_same_alone_and_in_a_batch(device, width):
    hidden, weight, targets = cross_entropy_inputs(width, torch.float32)
    labels = torch.arange(len(targets))
    on_device = shift_targets(labels.to(device), offsets().to(device), steps=3, stride=4)
    assert torch.equal(on_device.cpu(), shift_targets(labels, offsets(), steps=3, stride=4))
    hidden, weight, targets = hidden.to(device, torch.float32), weight.to(device, torch.float32), targets.to(device)
    losses = multi_token_cross_entropy(hidden, weight, targets, reduction="none")
    for rows in (slice(0, 1), slice(33, 34), slice(40, 300)):
        alone = multi_token_cross_entropy(hidden[rows], weight, targets[rows], reduction="none")
        assert torch.equal(alone, losses[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 512], ids=["computed again", "chunked"])
def test_cross_entropy_in_a_cuda_graph(width):
    """Captured once with its targets, forward and backward, replayed on other contents, lengths and ignored rows."""
    hidden, weight, _ = cross_entropy_inputs(width, torch.bfloat16)
    hidden, weight = (x.nan_to_num().to("cuda", torch.bfloat16).requires_grad_() for x in (hidden, weight))
    labels, cu_seqlens = torch.randint(0, 2200, (len(hidden),), device="cuda"), offsets().to("cuda")
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
    cu_seqlens.copy_(torch.tensor([0, *reversed(LENGTHS)]).cumsum(0))
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
    """hidden, weight and integers for targets; so many rows that wide states are worked through in chunks."""
    rows = [torch.randn(n, width, device="cuda").bfloat16().requires_grad_() for n in (1000, 2200)]
    return [*rows, torch.randint(0, 10_000, (1000, len(RANGES)), device="cuda")]


BOTH_WAYS = pytest.mark.parametrize("width", [64, 320], ids=["computed again", "chunked"])


@pytest.mark.gpu
@BOTH_WAYS
def test_a_cuda_graph_outlives_other_ranges_and_step_weights(width):
    """What it reads on the device is neither evicted nor overwritten by 100 calls with other arguments."""
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


@pytest.mark.gpu
@BOTH_WAYS
def test_a_cuda_graph_keeps_the_step_weights_of_its_capture(width):
    """As floats they are part of the graph; other ones take another capture."""
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


@pytest.mark.gpu
def test_a_capture_that_lacks_a_constant_says_what_to_call():
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
    """As in a process whose first calls are compiled ones."""
    from stamp_kernels.triton_kernels import constants

    monkeypatch.setattr(constants, "_CONSTANTS", {})


def assert_reduced_overhead_changes_nothing(
    function: Callable[..., list[Tensor]], batches: list[tuple[Tensor, ...]], differentiate: bool
) -> None:
    """With mode="reduce-overhead", which warms up, captures a CUDA graph and replays it, as without compilation.

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


@pytest.mark.gpu
@pytest.mark.parametrize("differentiate", [False, True])
def test_attention_compiled_to_cuda_graphs(no_constants, differentiate):
    cu_seqlens = offsets().to("cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> list[Tensor]:
        bias = RelativePositionBias(table)
        return list(
            packed_attention(
                q,
                k,
                v,
                cu_seqlens,
                max_seqlen_q=max(LENGTHS),
                relative_bias=bias,
                return_lse=True,
                return_centrality=True,
            )
        )

    def batch() -> tuple[Tensor, ...]:
        shapes = (*[(sum(LENGTHS), 4, 32)] * 3, (32, 4))
        return tuple(torch.randn(*shape, device="cuda").bfloat16().requires_grad_(differentiate) for shape in shapes)

    assert_reduced_overhead_changes_nothing(attend, [batch() for _ in range(4)], differentiate)


@pytest.mark.gpu
@BOTH_WAYS
def test_cross_entropy_compiled_to_cuda_graphs(no_constants, width):
    """Ranges and step weights as numbers."""

    def loss_of(hidden: Tensor, weight: Tensor, integers: Tensor) -> list[Tensor]:
        targets = targets_in_ranges(integers)
        return [multi_token_cross_entropy(hidden, weight, targets, vocab_ranges=RANGES, step_weights=[1.0, 0.5, 0.25])]

    batches = [tuple(gpu_inputs_of_ranges(width)) for _ in range(4)]
    assert_reduced_overhead_changes_nothing(loss_of, batches, differentiate=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["auto", "minimal"], ids=["chunked", "computed again"])
@pytest.mark.parametrize("num_classes", [50_257, 50_264])
def test_cross_entropy_of_a_large_odd_vocabulary(dtype, memory, num_classes):
    """GPT-2's: no row of logits ends where a vector does."""
    hidden = torch.randn(130, 320, dtype=torch.float64).to(dtype).double()
    weight = (torch.randn(num_classes, 320, dtype=torch.float64) / 320**0.5).to(dtype).double()
    targets = torch.randint(0, num_classes, (130, 3))
    targets[::7] = -100
    targets[1] = num_classes - 1
    with use_backend("reference"):
        expected = cross_entropy_step(hidden, weight, targets)
    given = hidden.to("cuda", dtype), weight.to("cuda", dtype), targets.to("cuda")
    runs = [cross_entropy_step(*given, memory) for _ in range(2)]
    for out, again, ref in zip(*runs, expected, strict=True):
        assert torch.equal(out, again)
        assert_close(out.cpu(), ref, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "offset", "memory"),
    [(100, 0, "auto"), (200, 1, "auto"), (129, 3, "auto"), (64, 5, "auto"), (24, 7, "auto"), (320, 1, "auto"),
     (320, 1, "minimal")],
)  # fmt: skip
def test_cross_entropy_of_rows_that_begin_anywhere(width, offset, memory):
    hidden, weight, targets = cross_entropy_inputs(width, torch.bfloat16)
    hidden = hidden.nan_to_num()
    with use_backend("reference"):
        expected = cross_entropy_step(hidden, weight, targets)

    def placed(x: Tensor) -> Tensor:
        storage = torch.empty(x.numel() + offset, dtype=torch.bfloat16, device="cuda")
        return storage[offset:].view(x.shape).copy_(x)

    got = cross_entropy_step(placed(hidden), placed(weight), targets.to("cuda"), memory)
    for out, ref in zip(got, expected, strict=True):
        assert_close(out.cpu(), ref, torch.bfloat16)


def stamped_t5() -> StampT5ForConditionalGeneration:
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    prediction = PredictionConfig(2, 4, vocab_ranges=[(1, 16), (16, 31), (31, 46), (46, 61)])
    return apply_stamp(T5ForConditionalGeneration(config), pruning=PruningConfig([(2, 0.5)]), prediction=prediction)


def t5_batch() -> dict[str, Tensor]:
    codes = torch.stack([torch.randint(start, start + 15, (len(LENGTHS), 3)) for start in (1, 16, 31, 46)], dim=2)
    codes[:3, 2] = -100
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 61, mask.shape) * mask
    return dict(input_ids=ids, attention_mask=mask, labels=codes[:, 0], future_ids=codes[:, 1:].flatten(1))


@pytest.mark.parametrize("device", DEVICES)
def test_stamped_t5(device):
    """Loss, gradients and beams of padded batches."""
    model, batch = stamped_t5(), t5_batch()

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        model.to(device, dtype).train().zero_grad()
        inputs = {name: x.to(device) for name, x in batch.items()}
        loss = model(**inputs).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        generated = model.eval().generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], num_beams=3, max_new_tokens=4
        )
        return loss.detach(), gradient, generated

    expected_loss, expected_gradient, expected_beams = run("cpu", torch.float64)
    loss, gradient, beams = run(device, torch.float32)
    assert_close(loss.cpu(), expected_loss)
    assert_close(gradient.cpu(), expected_gradient)
    assert torch.equal(beams.cpu(), expected_beams)


@pytest.mark.gpu
def test_a_training_step_on_packed_inputs_never_waits_for_the_gpu():
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


@pytest.mark.gpu
@pytest.mark.parametrize("codes_per_item", [1, 4])
def test_pruning_in_a_cuda_graph(codes_per_item):
    """From attention to the kept rows and back, captured once, replayed on other contents and other lengths."""
    lengths, other_lengths = (32, 0, 4, 260, 64, 8, 8, 120), (8, 64, 260, 4, 0, 32, 120, 8)
    total = sum(lengths) + TAIL
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
