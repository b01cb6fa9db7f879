"""The CUDA kernels of csrc/cuda, run on the CPU by a small emulator (cuda_on_host.h), against the reference.

The tests marked `gpu` cover what only a GPU shows: timing, real concurrency, and the ops around the kernels.
"""

import ctypes
import math
import mmap

import pytest
import torch
from emulator import Arguments, Guarded, address
from hypothesis import given, settings
from hypothesis import strategies as st
from op_kernels import reference
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

from stamp_kernels.common.budget import keep_ratio_to_q32
from stamp_kernels.reference.pruning import token_importance

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Few distinct values, for many ties, with both ends of the order and their neighbours.
VALUES = [-math.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3.4e38, math.inf, math.nan]


def budget_arguments(
    ratio_q32: int | None, keep_count: int | None, keep_counts: Tensor | None, min_keep: int
) -> dict[str, int | Tensor | None]:
    if keep_counts is not None:
        kind = 2 if keep_counts.dtype == torch.int32 else 3
    else:
        kind = 0 if ratio_q32 is not None else 1
    return dict(
        budget_kind=kind,
        ratio_q32=ratio_q32 or 0,
        keep_count=keep_count or 0,
        keep_counts=keep_counts,
        min_keep=min_keep,
    )


def assert_selects_like_reference(
    kernels,
    batch: RaggedBatch,
    importance: Tensor,
    *,
    ratio: float | None = None,
    keep_count: int | None = None,
    keep_counts: Tensor | None = None,
    min_keep: int = 1,
    protect: Tensor | None = None,
    codes_per_item: int = 1,
    total_kept: int | None = None,
    max_seqlen: int | None = None,
    small_tiling: bool = True,
) -> None:
    """`total_kept` None is the exact number. A smaller one drops the last tokens, as on a GPU."""
    ratio_q32 = None if ratio is None else keep_ratio_to_q32(ratio)
    cu_seqlens = batch.cu_seqlens
    max_seqlen = batch.max_seqlen if max_seqlen is None else max_seqlen
    arguments = (cu_seqlens, max_seqlen, ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item)
    expected_indices, expected_offsets, expected_inverse = reference("select_tokens")(importance, *arguments, None)
    if total_kept is None:
        total_kept = len(expected_indices)
    tail = max(0, total_kept - len(expected_indices))
    expected_indices = torch.cat([expected_indices[:total_kept], torch.full((tail,), -1)])
    expected_offsets = expected_offsets.clamp(max=total_kept)
    expected_inverse = expected_inverse.where(expected_inverse < total_kept, -1)

    indices = Guarded(total_kept, torch.int64)
    offsets = Guarded(batch.num_sequences + 1, torch.int32)
    inverse = Guarded(batch.total, torch.int32)
    num_protected = None if protect is None else Guarded(batch.num_sequences, torch.int32)
    kernels.run_select_tokens(
        Arguments(
            dtype=DTYPES.index(importance.dtype),
            small_tiling=small_tiling,
            importance=importance,
            cu_seqlens=cu_seqlens,
            num_sequences=batch.num_sequences,
            total=batch.total,
            max_seqlen=max_seqlen,
            **budget_arguments(ratio_q32, keep_count, keep_counts, min_keep),
            protect=protect,
            num_protected=None if num_protected is None else num_protected.tensor,
            codes_per_item=codes_per_item,
            total_kept=total_kept,
            cu_seqlens_kept=offsets.tensor,
            indices=indices.tensor,
            inverse=inverse.tensor,
        )
    )
    assert torch.equal(offsets.check(), expected_offsets)
    assert torch.equal(indices.check(), expected_indices)
    assert torch.equal(inverse.check(), expected_inverse)
    if num_protected is not None:
        num_protected.check()


def whole_items(batch: RaggedBatch, codes_per_item: int) -> RaggedBatch:
    return RaggedBatch(tuple(codes_per_item * n for n in batch.lengths), codes_per_item * batch.tail)


def tied(total: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(VALUES)[torch.randint(len(VALUES), (total,))].to(dtype)


@st.composite
def budgets(draw, batch: RaggedBatch) -> dict[str, int | float | Tensor]:
    kind = draw(st.sampled_from(["ratio", "keep_count", "keep_counts"]))
    if kind == "ratio":
        return {kind: draw(st.sampled_from([0.0, 1.0, 1 / 3, 2 / 3, 0.5, 3 / 7, 0.999]))}
    if kind == "keep_count":
        return {kind: draw(st.integers(0, 15))}
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return {
        kind: torch.tensor(
            draw(st.lists(st.integers(0, 15), min_size=batch.num_sequences, max_size=batch.num_sequences)), dtype=dtype
        )
    }


@settings(max_examples=150)
@given(data=st.data())
def test_selection_of_small_batches(kernels, data):
    codes_per_item = data.draw(st.sampled_from([1, 3, 4]))
    batch = whole_items(data.draw(ragged_batches()), codes_per_item)
    importance = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=batch.total, max_size=batch.total)))
    importance = importance.to(data.draw(st.sampled_from(DTYPES)))
    protect = data.draw(st.none() | st.lists(st.booleans(), min_size=batch.total, max_size=batch.total))
    kernels.set_thread_order(int(data.draw(st.booleans())))
    assert_selects_like_reference(
        kernels,
        batch,
        importance,
        **data.draw(budgets(batch)),
        min_keep=data.draw(st.integers(0, 3)),
        protect=None if protect is None else torch.tensor(protect, dtype=torch.bool),
        codes_per_item=codes_per_item,
        total_kept=data.draw(st.none() | st.integers(0, batch.total + 5)),
        max_seqlen=batch.max_seqlen + data.draw(st.sampled_from([0, 5, 3000])),
        small_tiling=data.draw(st.booleans()),
    )


# Lengths in items around the limits of the small tiling: one key in a lane up to 32 items, four up to 128, eight up to
# 256. Longer sequences are for blocks, whose shared memory has room for 320 keys.
LENGTHS = (31, 32, 33, 127, 128, 129, 0, 255, 256, 257, 1, 320, 321, 500)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["distinct", "tied", "equal", "nan"])
@pytest.mark.parametrize("codes_per_item", [1, 3])
def test_selection_at_the_limits_of_its_paths(kernels, thread_order, dtype, values, codes_per_item):
    batch = whole_items(RaggedBatch(LENGTHS, tail=70), codes_per_item)
    importance = {
        "distinct": torch.randn(batch.total).to(dtype),
        "tied": tied(batch.total, dtype),
        "equal": torch.full((batch.total,), 2.5, dtype=dtype),
        "nan": torch.full((batch.total,), math.nan, dtype=dtype),
    }[values]
    importance[batch.valid :] = math.inf
    options = dict(codes_per_item=codes_per_item)
    assert_selects_like_reference(kernels, batch, importance, ratio=1 / 3, **options)
    assert_selects_like_reference(kernels, batch, importance, ratio=0.9, total_kept=batch.valid // 2 + 1, **options)
    assert_selects_like_reference(kernels, batch, importance, keep_count=1, total_kept=batch.total + 99, **options)
    protect = torch.rand(batch.total) < 0.2
    assert_selects_like_reference(kernels, batch, importance, ratio=0.25, protect=protect, **options)
    protect[:] = True
    assert_selects_like_reference(kernels, batch, importance, keep_count=0, min_keep=0, protect=protect, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_selection_of_nothing_and_of_everything(kernels, thread_order, dtype, ratio):
    batch = RaggedBatch(LENGTHS, tail=2)
    assert_selects_like_reference(kernels, batch, tied(batch.total, dtype), ratio=ratio, min_keep=0)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_of_named_batches(kernels, name, dtype):
    batch = BATCHES[name]
    for small_tiling in (False, True):
        for max_seqlen in (batch.max_seqlen, 2000):
            assert_selects_like_reference(
                kernels, batch, tied(batch.total, dtype), ratio=0.5, max_seqlen=max_seqlen, small_tiling=small_tiling
            )


def test_selection_of_no_rows(kernels):
    for batch in (RaggedBatch((), 0), RaggedBatch((0, 0, 0), 0)):
        assert_selects_like_reference(kernels, batch, torch.empty(0), ratio=0.5)
        assert_selects_like_reference(kernels, batch, torch.empty(0), keep_count=3, total_kept=200)


def test_selection_of_nothing_but_a_tail(kernels):
    assert_selects_like_reference(kernels, RaggedBatch((), 5000), torch.rand(5000), ratio=0.5, total_kept=3000)


def test_selection_of_many_sequences(kernels, thread_order):
    # More than the 4,096 sequences of one round of kept_offsets_kernel.
    batch = RaggedBatch(tuple(torch.randint(0, 9, (4500,)).tolist()), tail=7)
    importance = torch.randint(0, 4, (batch.total,)).float()
    protect = torch.rand(batch.total) < 0.1
    assert_selects_like_reference(kernels, batch, importance, ratio=1 / 3, protect=protect, small_tiling=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_seqlen", [1024, 4000])  # without and with blocks for long sequences
def test_selection_with_the_real_tilings(kernels, thread_order, dtype, max_seqlen):
    batch = RaggedBatch((257, 1024, 511, 0, 512, 513, 256, 1023, 140, 700), tail=3)
    for importance in (torch.randn(batch.total).to(dtype), tied(batch.total, dtype)):
        options = dict(max_seqlen=max_seqlen, small_tiling=False)
        assert_selects_like_reference(kernels, batch, importance, ratio=1 / 3, **options)
        protect = torch.rand(batch.total) < 0.05
        assert_selects_like_reference(kernels, batch, importance, ratio=0.6, protect=protect, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_within_long_sequences(kernels, thread_order, dtype):
    # 9,001 keys do not fit into the shared memory of the real tiling, which has room for 8,192 keys (4,096 of fp64).
    batch = RaggedBatch((5000, 3, 9001 if dtype != torch.float64 else 4500, 700), tail=5)
    importance = torch.randn(batch.total).to(dtype)
    protect = torch.rand(batch.total) < 0.05
    for options in (dict(), dict(protect=protect)):
        assert_selects_like_reference(kernels, batch, importance, ratio=1 / 3, small_tiling=False, **options)


def test_long_sequences_that_share_a_block(kernels, thread_order):
    # 128 blocks look for the long ones among 300 sequences, so the sequences 5, 133 and 261 are in one block.
    lengths = torch.randint(0, 4, (300,))
    lengths[[5, 133, 134, 261]] = torch.tensor([258, 300, 400, 310])
    batch = RaggedBatch(tuple(lengths.tolist()), tail=1)
    assert_selects_like_reference(kernels, batch, torch.randn(batch.total), ratio=1 / 3)


def test_incomplete_last_item_is_dropped(kernels, monkeypatch):
    """Contents are not checked here, as on a GPU."""
    for module in ("common.contents", "reference.pruning"):
        monkeypatch.setattr(f"stamp_kernels.{module}.contents_are_checked", lambda device: False)
    batch = RaggedBatch((2, 10, 0, 3, 31, 800, 1000), tail=3)
    protect = torch.rand(batch.total) < 0.3
    for options in (dict(), dict(protect=protect)):
        assert_selects_like_reference(
            kernels, batch, tied(batch.total, torch.float32), ratio=0.5, codes_per_item=3, **options
        )


@pytest.mark.parametrize("protected", [0, 1])
def test_launches(kernels, protected):
    batch = BATCHES["ragged"]
    protect = torch.zeros(batch.total, dtype=torch.bool) if protected else None
    before = kernels.launches_so_far()
    assert_selects_like_reference(kernels, batch, torch.rand(batch.total), ratio=0.5, protect=protect)
    assert kernels.launches_so_far() - before == 2 + protected
    before = kernels.launches_so_far()
    assert_prunes_like_reference(kernels, batch, [torch.rand(batch.total, 8)], ratio=0.5, protect=protect)
    assert kernels.launches_so_far() - before == 3 + protected + 1  # the last one is that of importance_of


# Importance


def importance_arguments(
    hidden: Tensor,
    centrality: Tensor,
    batch: RaggedBatch,
    *,
    norm_order: int = 1,
    per_visible_query: bool = False,
    cu_seqlens: Tensor | None = None,
) -> dict[str, int | bool | Tensor | None]:
    return dict(
        dtype=DTYPES.index(hidden.dtype),
        hidden=hidden,
        row_stride=hidden.stride(0) * hidden.element_size(),
        row_bytes=hidden.shape[1] * hidden.element_size(),
        element_bytes=hidden.element_size(),
        centrality=centrality,
        centrality_is_double=centrality.dtype == torch.float64,
        norm_order=norm_order,
        per_visible_query=per_visible_query,
        cu_seqlens=cu_seqlens,
        num_sequences=batch.num_sequences,
        total=batch.total,
    )


def importance_of(kernels, hidden: Tensor, centrality: Tensor, batch: RaggedBatch, **options) -> Tensor:
    """What the kernel computes, with the options of `importance_arguments`."""
    importance = Guarded(batch.total, torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    arguments = importance_arguments(hidden, centrality, batch, **options)
    kernels.run_token_importance(Arguments(**arguments, importance=importance.tensor))
    return importance.check()


def assert_close(importance: Tensor, expected: Tensor) -> None:
    expected = expected.double()
    bound = 1e-12 if importance.dtype == torch.float64 else 1e-6
    assert (importance.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_order", [1, 2])
@pytest.mark.parametrize("width", [0, 1, 2, 3, 7, 8, 20, 31, 64, 100, 128, 257, 384])
def test_importance(kernels, dtype, norm_order, width):
    batch = RaggedBatch((5, 0, 1, 63, 2, 0, 7), tail=3)
    hidden = torch.randn(batch.total, width).to(dtype)
    centrality = torch.rand(batch.total, dtype=torch.float64 if width % 2 else torch.float32)
    expected = token_importance(hidden.double(), centrality.double(), None, norm_order, False)
    assert_close(importance_of(kernels, hidden, centrality, batch, norm_order=norm_order), expected)

    hidden[batch.valid :] = math.nan
    centrality[batch.valid :] = math.nan
    options = dict(norm_order=norm_order, per_visible_query=True)
    expected = token_importance(hidden.double(), centrality.double(), batch.cu_seqlens, **options)
    importance = importance_of(kernels, hidden, centrality, batch, cu_seqlens=batch.cu_seqlens, **options)
    assert_close(importance, expected)
    assert (importance[batch.valid :] == 0).all()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("per_visible_query", [False, True])
def test_importance_of_named_batches(kernels, name, per_visible_query):
    batch = BATCHES[name]
    hidden, centrality = torch.randn(batch.total, 16), torch.rand(batch.total)
    expected = token_importance(hidden, centrality, batch.cu_seqlens, 2, per_visible_query)
    options = dict(norm_order=2, per_visible_query=per_visible_query, cu_seqlens=batch.cu_seqlens)
    assert_close(importance_of(kernels, hidden, centrality, batch, **options), expected)


@pytest.mark.parametrize("width", [3, 8, 300])
def test_tail_rows_are_never_read(kernels, width):
    """They are in a page without access: reading it would end the process."""
    batch = RaggedBatch((5, 61, 0), tail=40)
    page = mmap.PAGESIZE
    pages = -(-batch.valid * width * 4 // page)
    tail_pages = -(-batch.tail * width * 4 // page)
    memory = mmap.mmap(-1, (pages + tail_pages) * page)
    numbers = torch.frombuffer(memory, dtype=torch.float32)
    hidden = numbers[pages * page // 4 - batch.valid * width :][: batch.total * width].view(batch.total, width)
    hidden[: batch.valid] = torch.randn(batch.valid, width)
    centrality = torch.rand(batch.total)
    expected = importance_of(kernels, hidden, centrality, batch, cu_seqlens=batch.cu_seqlens)
    libc = ctypes.CDLL(None, use_errno=True)
    tail = ctypes.c_void_p(numbers.data_ptr() + pages * page)
    prot_none = 0
    assert libc.mprotect(tail, ctypes.c_size_t(tail_pages * page), prot_none) == 0
    importance = importance_of(kernels, hidden, centrality, batch, cu_seqlens=batch.cu_seqlens)
    libc.mprotect(tail, ctypes.c_size_t(tail_pages * page), mmap.PROT_READ | mmap.PROT_WRITE)
    assert torch.equal(importance, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 257])
def test_importance_bits_depend_only_on_the_row(kernels, dtype, width):
    """They are the same for a row alone and in a batch, and at any alignment."""
    batch = RaggedBatch((300,), tail=0)
    centrality = torch.rand(batch.total)
    rows = torch.randn(batch.total, width + 9).to(dtype)
    aligned = rows[:, 1 : width + 1].contiguous()
    expected = importance_of(kernels, aligned, centrality, batch, norm_order=2)
    assert torch.equal(importance_of(kernels, rows[:, 1 : width + 1], centrality, batch, norm_order=2), expected)
    for row in (0, 7, 299):
        alone = slice(row, row + 1)
        one_row = importance_of(kernels, aligned[alone], centrality[alone], RaggedBatch((1,), 0), norm_order=2)
        assert torch.equal(one_row, expected[alone])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_correctly(kernels, dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    importance = importance_of(kernels, numbers[:, None], torch.ones(2**16), RaggedBatch((2**16,), 0))
    assert torch.equal(importance.nan_to_num(nan=-1.0), numbers.float().abs().nan_to_num(nan=-1.0))
    assert_selects_like_reference(
        kernels, RaggedBatch((2**16,), 0), numbers, keep_count=1000, small_tiling=False
    )  # the importance above is without sign


# Pruning


def assert_prunes_like_reference(
    kernels,
    batch: RaggedBatch,
    x: list[Tensor],
    *,
    ratio: float | None = None,
    keep_count: int | None = None,
    keep_counts: Tensor | None = None,
    min_keep: int = 1,
    protect: Tensor | None = None,
    positions: Tensor | None = None,
    norm_order: int = 1,
    per_visible_query: bool = False,
    codes_per_item: int = 1,
    extra_rows: int = 0,
) -> None:
    hidden, centrality, cu_seqlens = x[0], torch.rand(batch.total), batch.cu_seqlens
    compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    ratio_q32 = None if ratio is None else keep_ratio_to_q32(ratio)
    options = dict(norm_order=norm_order, per_visible_query=per_visible_query, cu_seqlens=cu_seqlens)
    # The reference selects by the kernel's own importance, since a sum in another order could swap close tokens.
    expected_importance = importance_of(kernels, hidden, centrality, batch, **options)
    arguments = (ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item)
    total_kept = (
        len(reference("select_tokens")(expected_importance, cu_seqlens, batch.max_seqlen, *arguments, None)[0])
        + extra_rows
    )
    # Hidden states of ones with an L1 norm give the importance back.
    ones = torch.ones(batch.total, 1, dtype=compute_dtype)
    rows, *expected = reference("prune")(
        [ones, *x], expected_importance, positions, cu_seqlens, batch.max_seqlen, 1, False, *arguments, total_kept
    )

    kept_positions, indices = Guarded(total_kept, torch.int32), Guarded(total_kept, torch.int64)
    offsets, inverse = Guarded(batch.num_sequences + 1, torch.int32), Guarded(batch.total, torch.int32)
    importance = Guarded(batch.total, compute_dtype)
    num_protected = torch.empty(batch.num_sequences, dtype=torch.int32)
    copies, destinations = [], []
    for tensor in x:
        row_bytes = math.prod(tensor.shape[1:]) * tensor.element_size()
        destination = Guarded(total_kept * math.prod(tensor.shape[1:]), tensor.dtype)
        destinations.append(destination)
        copies += [address(tensor), address(destination.tensor), tensor.stride(0) * tensor.element_size(), row_bytes]
    kernels.run_prune(
        Arguments(
            **importance_arguments(hidden, centrality, batch, **options),
            importance=importance.tensor,
            max_seqlen=batch.max_seqlen,
            **budget_arguments(ratio_q32, keep_count, keep_counts, min_keep),
            protect=protect,
            num_protected=None if protect is None else num_protected,
            codes_per_item=codes_per_item,
            total_kept=total_kept,
            positions=positions,
            cu_seqlens_kept=offsets.tensor,
            indices=indices.tensor,
            inverse=inverse.tensor,
            kept_positions=kept_positions.tensor,
        ),
        (ctypes.c_int64 * len(copies))(*copies),
        len(x),
    )
    assert torch.equal(importance.check(), expected_importance)
    got = [output.check() for output in (kept_positions, indices, offsets, inverse)]
    for output, want in zip(got, expected, strict=True):
        assert torch.equal(output, want)
    for destination, want in zip(destinations, rows[1:], strict=True):
        assert torch.equal(destination.check(), want.flatten())


@settings(max_examples=60)
@given(data=st.data())
def test_pruning_of_small_batches(kernels, data):
    batch = data.draw(ragged_batches())
    dtype = data.draw(st.sampled_from(DTYPES))
    hidden = torch.randn(batch.total, data.draw(st.integers(0, 12))).to(dtype)
    x = [hidden, torch.arange(batch.total), torch.rand(batch.total, 3, 5), torch.rand(batch.total, 1) < 0.5]
    kernels.set_thread_order(int(data.draw(st.booleans())))
    protect = data.draw(st.none() | st.lists(st.booleans(), min_size=batch.total, max_size=batch.total))
    assert_prunes_like_reference(
        kernels,
        batch,
        x[: data.draw(st.integers(1, 4))],
        **data.draw(budgets(batch)),
        min_keep=data.draw(st.integers(0, 2)),
        protect=None if protect is None else torch.tensor(protect, dtype=torch.bool),
        positions=data.draw(st.sampled_from([None, batch.positions()])),
        norm_order=data.draw(st.sampled_from([1, 2])),
        per_visible_query=data.draw(st.booleans()),
        extra_rows=data.draw(st.integers(0, 4)),
    )


@pytest.mark.parametrize("codes_per_item", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_pruning_of_long_sequences(kernels, thread_order, dtype, codes_per_item):
    batch = whole_items(RaggedBatch((300, 0, 17, 40, 258, 33), tail=9), codes_per_item)
    x = [torch.randn(batch.total, 48).to(dtype), torch.randn(batch.total, 5)]
    options = dict(ratio=1 / 3, positions=batch.positions(), codes_per_item=codes_per_item, extra_rows=11)
    assert_prunes_like_reference(kernels, batch, x, protect=torch.rand(batch.total) < 0.1, **options)


def test_pruning_of_many_sequences(kernels, thread_order):
    # More than the 1,024 sequences of one round of importance_and_offsets_kernel.
    batch = RaggedBatch(tuple(torch.randint(0, 4, (1500,)).tolist()), tail=2)
    assert_prunes_like_reference(kernels, batch, [torch.randn(batch.total, 4)], keep_count=2)


def test_pruning_of_more_tensors_than_one_launch_takes(kernels):
    batch = BATCHES["ragged"]
    assert_prunes_like_reference(kernels, batch, [torch.rand(batch.total, 1 + i % 3) for i in range(70)], ratio=0.5)
