"""prune against token_importance, select_tokens and gather_tokens one after the other, and its own promises."""

import math
import re

import pytest
import torch
import torch._dynamo.testing
from devices import every_device
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

import stamp_kernels.ops.pruning.budget as budget_ops
from stamp_kernels import PrunedTokens, gather_tokens, prune, select_tokens, token_importance


def inputs(batch: RaggedBatch, width: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and centralities, NaN in the tail rows."""
    hidden, centrality = torch.randn(batch.total, width, dtype=dtype), torch.rand(batch.total)
    hidden[batch.valid :], centrality[batch.valid :] = math.nan, math.nan
    return hidden, centrality


def one_after_the_other(
    x: list[Tensor],
    centrality: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    positions: Tensor | None = None,
    norm: str = "l1",
    normalize: str = "none",
    **budget,
) -> PrunedTokens:
    importance = token_importance(x[0], centrality, cu_seqlens, norm=norm, normalize=normalize)
    selection = select_tokens(importance, cu_seqlens, max_seqlen, **budget)
    if positions is None:
        lengths = cu_seqlens.diff()
        positions = torch.arange(len(importance), device=cu_seqlens.device, dtype=torch.int32)
        tail = len(importance) - int(cu_seqlens[-1])
        starts = torch.cat([cu_seqlens[:-1].repeat_interleave(lengths), cu_seqlens.new_zeros(tail)])
        positions = positions - starts
    *rows, kept_positions = gather_tokens([*x, positions], selection)
    return PrunedTokens(rows, kept_positions, selection, selection.cu_seqlens.diff().long().cpu())


def assert_same(got: PrunedTokens, want: PrunedTokens) -> None:
    for x, y in zip(got.x, want.x, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype
    assert torch.equal(got.positions, want.positions) and got.positions.dtype == torch.int32
    for field, expected in zip(got.selection, want.selection, strict=True):
        assert torch.equal(field, expected) if isinstance(field, Tensor) else field == expected
    assert got.lengths_cpu is None or torch.equal(got.lengths_cpu, want.lengths_cpu)


@pytest.mark.core
@every_device
@settings(max_examples=60)
@given(
    items=ragged_batches(max_length=6),
    codes_per_item=st.sampled_from([1, 1, 2, 4]),
    ratio=st.sampled_from([0.0, 1 / 3, 0.5, 1.0]),
    min_keep=st.integers(0, 2),
    norm=st.sampled_from(["l1", "l2"]),
    normalize=st.sampled_from(["none", "visible_queries"]),
    budget=st.sampled_from(["sequence", "max_seqlen"]),
    with_positions=st.booleans(),
    protecting=st.booleans(),
    ties=st.booleans(),
)
def test_is_the_three_ops_in_one(
    device, items, codes_per_item, ratio, min_keep, norm, normalize, budget, with_positions, protecting, ties
):
    batch = RaggedBatch(tuple(n * codes_per_item for n in items.lengths), items.tail)
    hidden, centrality = inputs(batch)
    if ties:
        hidden, centrality = hidden.sign(), torch.ones(batch.total)
    x = [hidden.to(device), torch.arange(batch.total, device=device), torch.rand(batch.total, 2, 3, device=device)]
    options = dict(
        positions=batch.positions().to(device) if with_positions else None, norm=norm, normalize=normalize,
        keep_ratio=ratio, min_keep=min_keep, budget=budget, codes_per_item=codes_per_item,
        protect=(torch.rand(batch.total) < 0.2).to(device) if protecting else None,
    )  # fmt: skip
    arguments = (x, centrality.to(device), batch.cu_seqlens.to(device), batch.max_seqlen)
    assert_same(prune(*arguments, **options), one_after_the_other(*arguments, **options))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_device
def test_dtypes_and_named_batches(device, dtype, name):
    batch = BATCHES[name]
    hidden, centrality = inputs(batch, width=33, dtype=dtype)
    arguments = ([hidden.to(device)], centrality.to(device), batch.cu_seqlens.to(device), batch.max_seqlen)
    assert_same(prune(*arguments, keep_ratio=1 / 3), one_after_the_other(*arguments, keep_ratio=1 / 3))
    keep_counts = torch.arange(batch.num_sequences, device=device) % 3
    assert_same(prune(*arguments, keep_count=keep_counts), one_after_the_other(*arguments, keep_count=keep_counts))


@every_device
def test_strided_hidden_states(device):
    batch = BATCHES["ragged"]
    hidden, centrality = torch.randn(batch.total, 3, 10, device=device), torch.rand(batch.total, 2, device=device)
    cu_seqlens = batch.cu_seqlens.to(device)
    for x in (hidden[:, 1], hidden[:, :, 4], hidden[:1, 0].expand(batch.total, 10), hidden.flatten(1).t().t()):
        arguments = ([x], centrality[:, 1], cu_seqlens, batch.max_seqlen)
        assert_same(prune(*arguments, keep_ratio=0.5), one_after_the_other(*arguments, keep_ratio=0.5))


@every_device
def test_rows_beyond_the_kept_ones_are_empty(device):
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch)
    arguments = ([hidden.to(device)], centrality.to(device), batch.cu_seqlens.to(device), batch.max_seqlen)
    got = prune(*arguments, keep_ratio=0.5, total_kept=batch.total)
    assert_same(got, one_after_the_other(*arguments, keep_ratio=0.5, total_kept=batch.total))
    kept = int(got.selection.cu_seqlens[-1])
    assert kept < batch.total
    assert not got.x[0][kept:].any() and not got.positions[kept:].any()
    assert (got.selection.indices[kept:] == -1).all()


@every_device
def test_tail_rows_take_the_fill_values(device, backend):
    batch = BATCHES["ragged"]
    hidden, centrality = (x.to(device) for x in inputs(batch))
    targets = torch.randint(9, (batch.total, 2), device=device)
    arguments = (centrality, batch.cu_seqlens.to(device), batch.max_seqlen)
    options = dict(keep_ratio=0.5, total_kept=batch.total)
    got = prune([hidden, targets], *arguments, **options, fill_value=[0, -100])
    kept = int(got.selection.cu_seqlens[-1])
    assert kept < batch.total
    assert torch.equal(got.x[1][:kept], targets[got.selection.indices[:kept]])
    assert (got.x[1][kept:] == -100).all() and not got.x[0][kept:].any() and not got.positions[kept:].any()
    assert (prune(hidden, *arguments, **options, fill_value=2.5).x[kept:] == 2.5).all()


def test_one_tensor_in_one_tensor_out():
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch)
    kept = prune(hidden, centrality, batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5)
    assert torch.equal(kept.x, hidden[kept.selection.indices])


@pytest.mark.core
@every_device
def test_gradients_reach_the_kept_rows(device, backend):
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch)
    hidden, other, constant = (x.to(device) for x in (hidden, torch.randn(batch.total, 2), torch.randn(batch.total)))
    hidden.requires_grad_(), other.requires_grad_(), centrality.requires_grad_()
    kept = prune(
        [hidden, constant, other], centrality.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=0.5
    )
    assert not kept.x[1].requires_grad and not kept.positions.requires_grad
    weights = [torch.randn_like(kept.x[0]), torch.randn_like(kept.x[2])]
    gradients = torch.autograd.grad((kept.x[0], kept.x[2]), (hidden, other), weights, retain_graph=True)
    stays = kept.selection.indices[kept.selection.indices >= 0]
    for gradient, x, weight in zip(gradients, (hidden, other), weights, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x).index_copy(0, stays, weight[: len(stays)]))
    assert torch.autograd.grad(kept.x[2].sum(), (hidden, other), allow_unused=True)[0] is None
    assert not torch.autograd.grad(kept.x[0].sum(), centrality, allow_unused=True)[0]


def test_gradcheck():
    batch = BATCHES["ragged"]
    hidden = torch.randn(batch.total, 3, dtype=torch.float64)
    other = torch.randn(batch.total, dtype=torch.float64, requires_grad=True)
    centrality = torch.rand(batch.total)

    def kept_rows(weight: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        # One weight scales all tokens, so gradcheck's steps do not change their order.
        return tuple(prune([hidden * weight, other], centrality, batch.cu_seqlens, 13, keep_ratio=0.5).x)

    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kept_rows, (weight, other))


def test_lengths_on_the_host():
    batch = BATCHES["ragged"]
    kept = prune(*inputs(batch), batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5)
    assert kept.lengths_cpu.tolist() == [math.ceil(n / 2) for n in batch.lengths]
    assert kept.lengths_cpu.dtype == torch.int64


def test_capacity_for_lengths_on_the_device(monkeypatch):
    batch = BATCHES["ragged"]
    arguments = (*inputs(batch), batch.cu_seqlens, batch.max_seqlen)
    exact = prune(*arguments, keep_ratio=1 / 3)
    monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
    roomy = prune(*arguments, keep_ratio=1 / 3)
    assert roomy.lengths_cpu is None
    assert roomy.x.shape[0] == batch.total // 3 + batch.num_sequences
    rows = len(exact.x)
    assert torch.equal(roomy.x[:rows], exact.x) and not roomy.x[rows:].any()
    known = prune(*arguments, keep_ratio=1 / 3, lengths_cpu=torch.tensor(batch.lengths))
    assert torch.equal(known.x, exact.x) and torch.equal(known.lengths_cpu, exact.lengths_cpu)


@pytest.mark.parametrize("name", ["ragged", "no_sequences"])
def test_opcheck(name):
    batch = BATCHES[name]
    hidden, centrality = torch.randn(batch.total, 4), torch.rand(batch.total)
    arguments = (
        [hidden, torch.arange(batch.total)], centrality, batch.positions(), batch.cu_seqlens, batch.max_seqlen, 2,
        True, 2**31, None, None, 1, torch.rand(batch.total) < 0.2, 1, batch.total,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.stamp.prune.default, arguments)


def test_items_compile_once_for_all_sizes():
    """Also where the rows are no multiple of codes_per_item, because of tail rows."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(hidden, centrality, cu_seqlens, max_seqlen):
        kept = prune(hidden, centrality, cu_seqlens, max_seqlen, keep_ratio=0.5, codes_per_item=2)
        return kept.x, kept.selection.cu_seqlens

    for lengths, tail in (((4, 6), 2), ((4, 2, 4), 3), ((8, 2, 10, 2), 1), ((20, 16), 0)):
        batch = RaggedBatch(lengths, tail)
        hidden, centrality = inputs(batch, width=24)
        kept = prune(hidden, centrality, batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5, codes_per_item=2)
        values, cu_seqlens = compiled(hidden, centrality, batch.cu_seqlens, batch.max_seqlen)
        assert torch.equal(cu_seqlens, kept.selection.cu_seqlens)
        assert torch.equal(values[: len(kept.x)], kept.x) and not values[len(kept.x) :].any()
    assert counter.frame_count == 1


def test_compiles_once_for_all_sizes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(hidden, labels, centrality, cu_seqlens, max_seqlen):
        kept = prune([hidden, labels], centrality, cu_seqlens, max_seqlen, keep_ratio=1 / 3)
        return kept.x[0] * 2, kept.x[1], kept.positions, kept.selection.cu_seqlens

    compilations = None
    for lengths, tail in (((3, 4), 2), ((5, 0, 9, 21), 0), ((2, 2, 2, 2, 2, 80), 11)):
        batch = RaggedBatch(lengths, tail)
        hidden, centrality = inputs(batch, width=24)
        labels = torch.arange(batch.total)
        hidden.requires_grad_()
        values, kept_labels, positions, cu_seqlens = compiled(
            hidden, labels, centrality, batch.cu_seqlens, batch.max_seqlen
        )
        want = prune([hidden.detach(), labels], centrality, batch.cu_seqlens, batch.max_seqlen, keep_ratio=1 / 3)
        rows = len(want.positions)
        assert torch.equal(values[:rows], 2 * want.x[0]) and not values[rows:].any()
        assert torch.equal(kept_labels[:rows], want.x[1]) and torch.equal(positions[:rows], want.positions)
        assert torch.equal(cu_seqlens, want.selection.cu_seqlens)
        values.sum().backward()
        assert torch.equal(hidden.grad[:, 0], 2.0 * (want.selection.inverse >= 0))
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations


def test_compiled_without_gradients():
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch)
    x, arguments = [hidden, torch.arange(batch.total)], (centrality, batch.cu_seqlens, batch.max_seqlen)
    want = prune(x, *arguments, keep_ratio=0.5)
    got = torch.compile(prune, fullgraph=True, backend="aot_eager")(x, *arguments, keep_ratio=0.5)
    rows = len(want.positions)
    assert all(torch.equal(a[:rows], b) and not a[rows:].any() for a, b in zip(got.x, want.x, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": []}, "x must be a tensor or a non-empty list of tensors, got an empty list"),
        ({"x": torch.zeros(5)}, "x must have shape [total, width], got [5]"),
        ({"x": [torch.zeros(5, 2).long()]}, "x[0] must have dtype torch.float32, torch.float16"),
        ({"x": [torch.zeros(5, 2), torch.zeros(4)]}, "x[1] must have 5 rows (as many as x[0]), got shape [4]"),
        ({"x": [torch.zeros(5, 2), None]}, "x[1] must be a tensor, got NoneType"),
        ({"centrality": torch.zeros(4)}, "centrality must have shape [5], got [4]"),
        ({"positions": torch.zeros(5)}, "positions must have dtype torch.int32, got torch.float32"),
        ({"norm": "l3"}, "norm must be one of ('l1', 'l2'), got 'l3'"),
        ({"keep_count": 2}, "exactly one of keep_ratio and keep_count must be given, got 0.5 and 2"),
        ({"codes_per_item": 0}, "codes_per_item must be in [1, inf), got 0"),
        ({"x": [torch.zeros(5, 2)], "fill_value": [0, -100]}, "one for each of the 1 tensors, got [0, -100]"),
        ({"x": [torch.zeros(5, 2), torch.zeros(5).bool()], "fill_value": [0, 2]}, "fill_value[1] must be False or"),
    ],
    ids=str,
)
def test_names_the_bad_argument(arguments, message):
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    good = dict(x=torch.zeros(5, 2), centrality=torch.zeros(5), cu_seqlens=cu_seqlens, max_seqlen=3, keep_ratio=0.5)
    with pytest.raises(ValueError, match=re.escape(message)):
        prune(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seqlen": 2}, "cu_seqlens: sequence 0 has length 3, more than the given max_seqlen 2"),
        ({"codes_per_item": 3}, "every sequence must be whole items of codes_per_item 3 tokens, got a sequence of 2"),
        ({"total_kept": 2}, "total_kept is 2, but the sequences keep 3 tokens"),
        ({"lengths_cpu": torch.tensor([2, 3])}, "lengths_cpu must be the lengths that cu_seqlens gives, and is not"),
    ],
    ids=str,
)
def test_reports_bad_contents(backend, arguments, message):
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    good = dict(x=torch.zeros(5, 2), centrality=torch.zeros(5), cu_seqlens=cu_seqlens, max_seqlen=3, keep_ratio=0.5)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        prune(**good | arguments)
