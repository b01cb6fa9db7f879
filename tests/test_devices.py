"""Every family on each device at realistic sizes, bf16 included, against float64 on the CPU.

The other test files say what is right; this one says that a GPU computes the same.
"""

import pytest
import torch
from closeness import assert_close
from cross_entropy_cases import assert_results_close, converted, expected_results, results
from device_cases import BATCH, attention_inputs, cross_entropy_inputs, random_rows, stamped_t5, t5_batch
from devices import every_device
from pairwise import pairwise
from ragged import RaggedBatch
from torch import Tensor

from stamp_kernels import (
    RelativePositionBias,
    attention_centrality,
    gather_tokens,
    multi_token_cross_entropy,
    packed_attention,
    prune,
    select_tokens,
    shift_targets,
    token_importance,
    use_backend,
)

# A batch for each way in which kernels divide the work, by the longest sequence.
ATTENTION_BATCHES = {
    "up to 16": RaggedBatch((3, 0, 16, 1, 7, 16, 2, 5, 11), tail=3),
    "up to 32": RaggedBatch((32, 5, 0, 17, 32), tail=3),
    "up to 128": RaggedBatch((128, 0, 64, 1, 97, 5), tail=3),
    "up to 257": BATCH,
    "up to 2100": RaggedBatch((3, 2100, 700), tail=3),
}


def attention_step(
    inputs: list[Tensor], batch: RaggedBatch, grad: Tensor, max_seqlen: int | None = None, dropout_p: float = 0.1
) -> list[Tensor]:
    """out, lse, centrality twice and all gradients of one attention with bias, dropout and grouped heads."""
    q, k, v, table = (x.detach().requires_grad_() for x in inputs)
    cu_seqlens = batch.cu_seqlens.to(q.device)
    max_seqlen = max_seqlen or batch.max_seqlen
    options = dict(causal=True, relative_bias=RelativePositionBias(table))
    result = packed_attention(
        q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, **options, dropout_p=dropout_p,
        dropout_seed=torch.tensor([7], device=q.device) if dropout_p > 0 else None, return_lse=True,
        return_centrality=True,
    )  # fmt: skip
    centrality = attention_centrality(q, k, result.lse, cu_seqlens, max_seqlen_q=max_seqlen, **options)
    gradients = torch.autograd.grad(result.out, (q, k, v, table), grad)
    return [result.out, result.lse.t(), result.centrality, centrality, *gradients]


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", ATTENTION_BATCHES.values(), ids=ATTENTION_BATCHES)
def test_attention(device, dtype, batch):
    inputs, grad = attention_inputs(batch, dtype)
    expected = attention_step(inputs, batch, grad)
    low, low_grad = [x.to(device, dtype) for x in inputs], grad.to(device, dtype)
    runs = [attention_step(low, batch, low_grad) for _ in range(2)]
    for out, again, ref in zip(*runs, expected, strict=True):
        assert torch.equal(out, again)
        assert_close(out.cpu(), ref, dtype)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", ATTENTION_BATCHES.values(), ids=ATTENTION_BATCHES)
def test_attention_has_same_bits_in_any_batch(device, dtype, batch):
    """A sequence alone gives the bits that it gives in the batch."""
    inputs, grad = attention_inputs(batch, dtype)
    *rows, table = (x.to(device, dtype) for x in inputs)
    grad = grad.to(device, dtype)
    together = attention_step([*rows, table], batch, grad, dropout_p=0.0)
    for n, of_sequence in zip(batch.lengths, batch.slices(), strict=True):
        own_rows = [x[of_sequence] for x in rows]
        alone = attention_step(
            [*own_rows, table], RaggedBatch((n,), tail=0), grad[of_sequence], batch.max_seqlen, dropout_p=0.0
        )
        for got, want in zip(alone[:-1], together[:-1], strict=True):  # the table's gradient is the whole batch's
            assert torch.equal(got, want[of_sequence])


@pytest.mark.gpu
def test_attention_on_another_than_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, grad = attention_inputs(BATCH, torch.float32)
    results = [
        attention_step([x.to(device, torch.float32) for x in inputs], BATCH, grad.to(device, torch.float32))
        for device in ("cuda:0", "cuda:1")
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.cpu(), second.cpu())


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_importance_selection_and_gather(device, dtype):
    hidden, centrality = random_rows(BATCH, 128, dtype=dtype), torch.rand(BATCH.total)
    cu_seqlens = BATCH.cu_seqlens
    expected = token_importance(hidden, centrality.double(), cu_seqlens, norm="l2")
    hidden = hidden.to(dtype)
    importance = token_importance(hidden.to(device), centrality.to(device), cu_seqlens.to(device), norm="l2")
    assert_close(importance.cpu(), expected, torch.float32)

    on_cpu = select_tokens(importance.cpu(), cu_seqlens, BATCH.max_seqlen, keep_ratio=1 / 3)
    selection = select_tokens(
        importance, cu_seqlens.to(device), BATCH.max_seqlen, keep_ratio=1 / 3, lengths_cpu=torch.tensor(BATCH.lengths)
    )
    assert torch.equal(selection.indices.cpu(), on_cpu.indices)
    assert torch.equal(selection.inverse.cpu(), on_cpu.inverse)
    rows = gather_tokens(hidden.to(device), selection)
    assert torch.equal(rows.cpu(), hidden[on_cpu.indices])


@every_device
@pairwise(
    lengths=[(8,) * 600, (2000, 8, 0, 12), (40_000, 4, 12_000)],
    dtype=[torch.float32, torch.float16, torch.bfloat16, torch.float64],
)
def test_prune(device, dtype, lengths):
    """Short and long sequences together; importances without near ties, so that every device keeps the same rows."""
    batch = RaggedBatch(lengths, tail=3)
    centrality = torch.randperm(batch.total).double() + 1  # whole numbers, exact in float32
    protect, labels = torch.rand(batch.total) < 0.05, torch.arange(batch.total)
    # One number of a row is 1 and the others are 0, so its norm is 1 in every dtype.
    hidden = torch.nn.functional.one_hot(labels % 16, 16).to(dtype)

    def run(device: str) -> list[Tensor]:
        kept = prune(
            [x.to(device) for x in (hidden, labels)], centrality.to(device), batch.cu_seqlens.to(device),
            batch.max_seqlen, keep_ratio=1 / 3, protect=protect.to(device), codes_per_item=4,
        )  # fmt: skip
        return [kept.selection.cu_seqlens, kept.selection.inverse, *kept.x, kept.positions, kept.selection.indices]

    with use_backend("reference"):
        expected = run("cpu")
    got = run(device)
    for out, ref in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(out.cpu(), ref)
    for out, ref in zip(got[2:], expected[2:], strict=True):  # a GPU has rows to spare
        assert torch.equal(out[: len(ref)].cpu(), ref)


def check_cross_entropy(inputs: dict, want: dict[str, Tensor]) -> None:
    """Losses and gradients are the oracle's, and the same bits in two runs."""
    got, again = results(inputs), results(inputs)
    assert_results_close(got, want)
    assert all(torch.equal(got[name], again[name]) for name in got)


def cross_entropy_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, device: str, memory: str
) -> tuple[dict, dict[str, Tensor]]:
    """Keyword arguments with weights and options on a device, and what they must give."""
    options = dict(step_weights=[1.0, 0.5, 0.25], label_smoothing=0.1, z_loss=1e-3)
    inputs = dict(hidden=hidden, weight=weight, targets=targets, **options)
    return converted(inputs, dtype, device) | {"memory": memory}, expected_results(inputs)


@every_device
@pairwise(
    size=[(64, 1), (64, 3), (200, 1), (512, 1), (512, 3)],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    memory=["auto", "minimal"],
)
def test_cross_entropy(device, dtype, memory, size):
    width, hidden_steps = size
    inputs = cross_entropy_inputs(width, dtype, hidden_steps)
    check_cross_entropy(*cross_entropy_arguments(*inputs, dtype, device, memory))


@every_device
@pytest.mark.parametrize("width", [64, 512])
def test_row_losses_are_the_same_alone(device, width):
    """A row's targets and losses have the same bits alone and in a batch."""
    hidden, weight, targets = cross_entropy_inputs(width, torch.float32)
    labels, cu_seqlens = torch.arange(len(targets)), BATCH.cu_seqlens
    on_device = shift_targets(labels.to(device), cu_seqlens.to(device), steps=3, stride=4)
    assert torch.equal(on_device.cpu(), shift_targets(labels, cu_seqlens, steps=3, stride=4))
    hidden, weight, targets = hidden.to(device, torch.float32), weight.to(device, torch.float32), targets.to(device)
    losses = multi_token_cross_entropy(hidden, weight, targets, reduction="none")
    for rows in (slice(0, 1), slice(33, 34), slice(40, 300)):
        alone = multi_token_cross_entropy(hidden[rows], weight, targets[rows], reduction="none")
        assert torch.equal(alone, losses[rows])


@pytest.mark.gpu
@pairwise(num_classes=[50_257, 50_264], dtype=[torch.float16, torch.bfloat16], memory=["auto", "minimal"])
def test_cross_entropy_of_large_odd_vocabularies(dtype, memory, num_classes):
    """GPT-2's: no row of logits ends where a vector does."""
    hidden = torch.randn(130, 320, dtype=torch.float64).to(dtype).double()
    weight = (torch.randn(num_classes, 320, dtype=torch.float64) / 320**0.5).to(dtype).double()
    targets = torch.randint(0, num_classes, (130, 3))
    targets[::7] = -100
    targets[1] = num_classes - 1
    check_cross_entropy(*cross_entropy_arguments(hidden, weight, targets, dtype, "cuda", memory))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "offset", "memory"),
    [(100, 0, "auto"), (200, 1, "auto"), (129, 3, "auto"), (64, 5, "auto"), (24, 7, "auto"), (320, 1, "auto"),
     (320, 1, "minimal")],
)  # fmt: skip
def test_cross_entropy_of_rows_at_any_address(width, offset, memory):
    hidden, weight, targets = cross_entropy_inputs(width, torch.bfloat16)
    inputs, want = cross_entropy_arguments(hidden.nan_to_num(), weight, targets, torch.bfloat16, "cuda", memory)
    for name in ("hidden", "weight"):
        x = inputs[name].detach()
        storage = torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda")
        inputs[name] = storage[offset:].view(x.shape).copy_(x).requires_grad_()
    assert_results_close(results(inputs), want)


@every_device
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
