"""The forward kernels of packed attention, interpreted where there is no GPU, against the float64 oracle."""

import bisect
import itertools

import pytest
import torch
from attention_cases import (
    BAD_CONTENTS,
    BAD_INPUT_CASE,
    CASES,
    DROPOUT_SEED,
    FEW_QUERIES,
    KEYS_OF_FEW_QUERIES,
    KEYS_OF_RAGGED,
    AttentionCase,
    assert_results_close,
    dense_attention,
    detached,
    in_float64,
    refusals,
    shared_op_arguments,
)
from op_kernels import launcher
from pairwise import pairwise
from ragged import BATCHES, RaggedBatch
from row_layouts import LAYOUTS, MIXES

pytest.importorskip("triton")

import triton
import triton.language as tl

from stamp_kernels.ops.attention.tile_list import tile_list
from stamp_kernels.reference.dropout import attention_keep_mask
from stamp_kernels.relative_position import relative_position_bucket
from stamp_kernels.triton_kernels.aot import TARGETS
from stamp_kernels.triton_kernels.attention.configs import forward_config, heads_of_tile
from stamp_kernels.triton_kernels.attention.dropout import Dropout, dropout_threshold, groups_of, keep_tile
from stamp_kernels.triton_kernels.attention.relative_bias import distance_buckets
from stamp_kernels.triton_kernels.attention.tiles import (
    Grid,
    TileOrder,
    locate_tile,
    rows_with_vector_strides,
    sequence_rows,
)
from stamp_kernels.triton_kernels.device import H100

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# A bound max_seqlen that selects each kernel, if no sequence is longer.
KERNELS = {"slots of 16": 0, "slots of 32": 32, "general": 100}
every_kernel = pytest.mark.parametrize("max_seqlen", KERNELS.values(), ids=KERNELS)


def run(inputs, max_seqlen=0, return_centrality=True):
    """The launcher's results by name. `max_seqlen` raises the bounds that `inputs` has."""
    inputs = detached(inputs)
    cu_q, cu_k, max_q, max_k, *rest = shared_op_arguments(inputs)
    arguments = (
        *(inputs[name] for name in ("q", "k", "v")), cu_q, cu_k, max(max_q, max_seqlen), max(max_k, max_seqlen), *rest,
        inputs.get("centrality_query_mask"), inputs.get("dropout_p", 0.0), inputs.get("dropout_seed"),
        return_centrality,
    )  # fmt: skip
    arguments = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
    out, lse, centrality = (x.cpu() for x in launcher("packed_attention_forward")(*arguments))
    return dict(out=out, lse=lse, centrality=centrality)


def oracle(inputs):
    want = dense_attention(**detached(in_float64(inputs)))
    return want._asdict()


def test_bounds_select_their_kernels():
    for name, max_seqlen in KERNELS.items():
        for element_size in (2, 4):
            config = forward_config(
                H100, 16, max_seqlen, max_seqlen, element_size=element_size, has_bias=True, has_dropout=False,
                has_positions=False,
            )  # fmt: skip
            assert config.slot == {"slots of 16": 16, "slots of 32": 32, "general": 0}[name]


@pytest.mark.parametrize("arch", TARGETS)
def test_tiles_suit_the_architecture(arch):
    for head_dim, (max_seqlen_q, max_seqlen_k), element_size, has_bias, has_dropout, has_positions in itertools.product(
        (8, 64, 72, 128, 256),
        [*((n, n) for n in (16, 32, 64, 120, 240, 4096)), (4, 120), (24, 120), (120, 4)],
        (2, 4), (False, True), (False, True), (False, True),
    ):  # fmt: skip
        config = forward_config(
            TARGETS[arch], head_dim, max_seqlen_q, max_seqlen_k, element_size=element_size, has_bias=has_bias,
            has_dropout=has_dropout, has_positions=has_positions,
        )  # fmt: skip
        assert config.slot == 0 or config.slot >= max(max_seqlen_q, max_seqlen_k)
        if element_size == 4:
            continue
        few = {4: (16,), 16: (16,), 24: (32,)}.get(max_seqlen_q) if config.slot == 0 else None
        assert config.block_m in (few or (64, 128))
        if arch == 90 and config.block_m >= 64 and config.slot == 0:
            assert config.num_warps * 16 == config.block_m  # more warps compute the same rows again


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        (dict(gqa_group_size=4, max_seqlen_q=4), 4),
        (dict(gqa_group_size=7, max_seqlen_q=8), 7),
        (dict(gqa_group_size=16, max_seqlen_q=4), 16),
        (dict(gqa_group_size=7, max_seqlen_q=9), 1),  # 8 * 16 rows
        (dict(gqa_group_size=17, max_seqlen_q=1), 1),
        (dict(gqa_group_size=1, max_seqlen_q=4), 1),
        (dict(gqa_group_size=0, max_seqlen_q=4), 1),  # no heads at all
        (dict(gqa_group_size=4, max_seqlen_q=4, max_seqlen_k=32), 1),  # several sequences share a tile
        (dict(gqa_group_size=4, max_seqlen_q=4, has_bias=True), 1),
        (dict(gqa_group_size=4, max_seqlen_q=4, has_dropout=True), 1),
    ],
)
def test_heads_of_tiles(options, heads):
    assert heads_of_tile(**dict(max_seqlen_k=240, has_bias=False, has_dropout=False) | options) == heads


# Values


def _kernels_of_cases():
    """(case, kernel): every kernel that takes a case's lengths; the two sizes of slots take turns."""
    for i, (name, case) in enumerate(CASES.items()):
        longest = max(case.batch.max_seqlen, (case.batch_k or case.batch).max_seqlen)
        slots = "slots of 16" if i % 2 and longest <= 16 else "slots of 32"
        for kernel in (slots, "general"):
            if longest <= max(KERNELS[kernel], 16):
                yield name, kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 16), ((5, 1), 72), ((16, 1), 8), ((14, 2), 40)])
def test_tiles_of_several_heads(heads, head_dim, causal, dtype):
    case = AttentionCase(FEW_QUERIES, KEYS_OF_FEW_QUERIES, heads, head_dim, causal, query_mask=True)
    inputs = case.inputs(dtype)
    assert_results_close(run(inputs), oracle(inputs), dtype)


@pytest.mark.parametrize(("name", "kernel"), list(_kernels_of_cases()))
def test_matches_dense_attention(name, kernel, dtype=torch.float16):
    inputs = CASES[name].inputs(dtype)
    got = run(inputs, KERNELS[kernel])
    assert got["out"].dtype == dtype and got["lse"].dtype == got["centrality"].dtype == torch.float32
    assert_results_close(got, oracle(inputs), dtype)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("gqa", "slots of 16"), ("causal_bias_positions", "general"), ("gqa", "general")]
    + [("dropout_everything", kernel) for kernel in KERNELS],
)
def test_matches_dense_attention_in_fp32(name, kernel):
    test_matches_dense_attention(name, kernel, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "head_dim"),
    [
        ("slots of 16", 8), ("slots of 16", 80), ("slots of 32", 40), ("slots of 32", 64), ("general", 64),
        ("general", 80),
    ],
)  # fmt: skip
def test_head_dims(kernel, head_dim):
    """In each kernel one that fills its columns and one that does not."""
    case = AttentionCase(heads=(2, 1), head_dim=head_dim, causal=True, bias="unidirectional", query_mask=True)
    inputs = case.inputs(torch.float16)
    assert_results_close(run(inputs, KERNELS[kernel]), oracle(inputs), torch.float16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_several_blocks_of_queries_and_keys(causal, cross):
    """Full blocks and blocks on the diagonal or at the end; tiles whose distances share one bucket.

    Cross and causal: the first query sees one key less than a block, and the last query of a block the first key of a
    block.
    """
    batch_k = RaggedBatch((105, 65, 64), tail=1) if cross else None
    case = AttentionCase(
        RaggedBatch((75, 64, 128), tail=70), batch_k, heads=(1, 1), causal=causal, bias="bidirectional",
        positions=True, query_mask=True, dropout_p=0.25,
    )  # fmt: skip
    inputs = case.inputs(torch.float16)
    assert_results_close(run(inputs), oracle(inputs), torch.float16)


@pytest.mark.parametrize("causal", [False, True])
def test_few_queries(causal):
    """At most 16 queries, the tile of a decoder's cross attention, against several blocks of keys."""
    case = AttentionCase(
        RaggedBatch((4, 0, 16, 1, 7), tail=3), RaggedBatch((105, 65, 0, 64, 33), tail=1), heads=(2, 1), causal=causal,
        bias="bidirectional", positions=True, query_mask=True, dropout_p=0.25,
    )  # fmt: skip
    inputs = case.inputs(torch.float16)
    assert_results_close(run(inputs), oracle(inputs), torch.float16)


@every_kernel
def test_views_of_one_projection(max_seqlen):
    batch = BATCHES["ragged"]
    q, k, v = torch.randn(batch.total, 3, 2, 16).unbind(1)
    views = dict(
        q=q, k=k, v=v, cu_seqlens_q=batch.cu_seqlens, max_seqlen_q=batch.max_seqlen, causal=False, scale=None
    )  # fmt: skip
    assert_results_close(run(views, max_seqlen), oracle(views), torch.float32)


@pytest.mark.parametrize(
    ("kernel", "layouts"), list(zip(2 * list(KERNELS), itertools.cycle(MIXES), strict=False)), ids=str
)
def test_rows_anywhere_in_memory(kernel, layouts):
    """Two mixes of layouts in each kernel; `promises_are_kept` checks what the compiler is promised."""
    inputs = detached(AttentionCase(RaggedBatch((5, 0, 9), tail=1), head_dim=24).inputs(torch.float16))
    views = {name: layout(inputs[name]) for name, layout in zip(("q", "k", "v"), MIXES[layouts], strict=False)}
    assert_results_close(run(inputs | views, KERNELS[kernel]), oracle(inputs), torch.float16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_off_the_grid_are_copied(name, dtype, device):
    """Rows that start on 16-byte boundaries, with strides that are multiples of 8 elements, are not copied."""
    x = torch.randn(5, 2, 24).to(dtype)
    view = LAYOUTS[name](x.to(device))
    is_on_grid = ("elements into" in name and view.storage_offset() * dtype.itemsize % 16 == 0) or name in (
        "rows 8 elements apart", "rows 24 elements apart", "heads 8 elements apart", "heads before rows"
    )  # fmt: skip
    rows = rows_with_vector_strides(view)
    assert (rows is view) == is_on_grid
    assert rows.data_ptr() % 16 == 0 and rows.stride(0) % 8 == 0 and rows.stride(1) % 8 == 0 and rows.stride(2) == 1
    assert device == "meta" or torch.equal(rows, x)


def test_a_single_row_off_the_grid_is_copied():
    """Torch ignores the strides of dimensions of size 1, and calls it contiguous."""
    row = torch.randn(100)[3:27].as_strided((1, 1, 24), (33, 17, 1), 3)
    copy = rows_with_vector_strides(row)
    assert torch.equal(copy, row) and copy.stride() == (24, 24, 1) and copy.data_ptr() % 16 == 0


def every_other(x):
    return torch.stack([x, torch.zeros_like(x)], dim=1)[:, 0]


@pytest.mark.parametrize("max_seqlen", [0, 300], ids=["slots", "general"])
def test_strided_offsets_positions_and_mask(max_seqlen):
    """All kernels get them from one launcher; the general one passes them on to the centrality kernel."""
    inputs = AttentionCase(bias="bidirectional", positions=True, query_mask=True).inputs(torch.float32)
    views = inputs | {
        name: every_other(inputs[name]) for name in ("cu_seqlens_q", "positions_q", "centrality_query_mask")
    }
    assert_results_close(run(views, max_seqlen), oracle(inputs), torch.float32)


@pytest.mark.parametrize("max_seqlen", [200, 300], ids=["general", "longer"])
def test_bucket_that_hides_its_keys(max_seqlen):
    """A bias of -inf: whole tiles of scores are -inf before a query sees a key."""
    inputs = AttentionCase(RaggedBatch((150,), tail=1), heads=(1, 1), bias="bidirectional").inputs(torch.float32)
    with torch.no_grad():
        inputs["relative_bias"].table[[3, 7]] = -torch.inf  # all that is far before and after
    assert_results_close(run(inputs, max_seqlen), oracle(inputs), torch.float32)


@every_kernel
def test_nan_stays_in_its_sequence(max_seqlen):
    case = AttentionCase(RaggedBatch((5, 7, 4), tail=1))
    inputs = detached(case.inputs(torch.float32))
    want = run(inputs, max_seqlen)
    for name in ("q", "k"):
        poisoned = inputs[name].clone()
        poisoned[6] = torch.nan
        got = run(inputs | {name: poisoned}, max_seqlen)
        assert got["out"][5:12].isnan().any()
        for rows in (slice(0, 5), slice(12, 17)):
            assert torch.equal(got["out"][rows], want["out"][rows])
            assert torch.equal(got["lse"][:, rows], want["lse"][:, rows])
            assert torch.equal(got["centrality"][rows], want["centrality"][rows])


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32], ids=str)
def test_bias_table_of_another_dtype_and_stride(table_dtype):
    inputs = CASES["bias"].inputs(torch.float16)
    bias = inputs["relative_bias"]
    table = bias.table.detach().to(table_dtype).t().contiguous().t()
    inputs["relative_bias"] = type(bias)(table, bias.bidirectional, bias.max_distance)
    assert_results_close(run(inputs), oracle(inputs), torch.float16)


# Tail rows, empty batches, bits


@every_kernel
def test_tail_longer_than_everything_else(max_seqlen):
    case = AttentionCase(RaggedBatch((3, 0, 5), tail=150), heads=(2, 1), query_mask=True)
    got = run(case.inputs(torch.float16), max_seqlen)
    assert not got["out"][8:].any() and not got["lse"][:, 8:].any() and not got["centrality"][8:].any()


@pairwise(kernel=KERNELS, lengths=[(), (0,)], tail=[0, 3])
def test_batch_without_a_token(kernel, lengths, tail):
    got = run(AttentionCase(RaggedBatch(lengths, tail)).inputs(torch.float32), KERNELS[kernel])
    assert got["out"].shape == (tail, 2, 16) and got["lse"].shape == (2, tail) and got["centrality"].shape == (tail,)
    assert not any(x.any() for x in got.values())


def test_no_centrality_unless_asked_for():
    for kernel in ("slots of 16", "general"):
        inputs, max_seqlen = CASES["plain"].inputs(torch.float32), KERNELS[kernel]
        got, with_centrality = run(inputs, max_seqlen, False), run(inputs, max_seqlen)
        assert got["centrality"].shape == (0,) and got["centrality"].dtype == torch.float32
        assert torch.equal(got["out"], with_centrality["out"])


@every_kernel
def test_same_bits_alone_and_in_a_batch(max_seqlen):
    case = AttentionCase(
        RaggedBatch((5, 3, 0, 11, 16, 7), tail=2), heads=(2, 1), causal=True, bias="bidirectional", positions=True,
        query_mask=True,
    )  # fmt: skip
    inputs = detached(case.inputs(torch.float32))
    # Exact products: the interpreter multiplies with BLAS, whose last bits depend on the place in the tile.
    inputs["q"], inputs["k"] = (torch.randint(-3, 4, inputs[name].shape).float() for name in ("q", "k"))
    for rows in case.batch.slices():
        inputs["v"][rows] = torch.eye(16)[: rows.stop - rows.start, None]
    batch, again = run(inputs, max_seqlen), run(inputs, max_seqlen)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    for rows in case.batch.slices():
        alone = {name: inputs[name][rows] for name in ("q", "k", "v", "positions_q", "centrality_query_mask")}
        length = rows.stop - rows.start
        alone = run(
            inputs | alone | dict(cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32)), max(max_seqlen, 16)
        )  # fmt: skip
        assert torch.equal(alone["out"], batch["out"][rows])
        assert torch.equal(alone["lse"], batch["lse"][:, rows])
        assert torch.equal(alone["centrality"], batch["centrality"][rows])


# Bad contents


@pytest.mark.parametrize("op", ["packed_attention_forward", "packed_attention_backward", "attention_centrality"])
@refusals(
    [
        *BAD_CONTENTS,
        (dict(tiles_q=torch.zeros(6, 2, dtype=torch.int32)), r"tiles_q must be tile_list\(cu_seqlens_q, 31\)"),
        (dict(tiles_k=torch.zeros(6, 2, dtype=torch.int32)), r"tiles_k must be tile_list\(cu_seqlens_k, 31\)"),
    ]
)
def test_bad_contents(monkeypatch, op, changed, message):
    """On a GPU the check is asked for, and costs a sync."""
    monkeypatch.setenv("STAMP_KERNELS_CHECK", "1")
    inputs = detached(BAD_INPUT_CASE.inputs(torch.float32) | changed)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    lse = torch.zeros(q.shape[1], q.shape[0])
    shared = shared_op_arguments(inputs)
    arguments = {
        "packed_attention_forward": (q, k, v, *shared, None, 0.0, None, False),
        "packed_attention_backward": (q, q, k, v, q, lse, *shared, 0.0, None, True, True, True, False),
        "attention_centrality": (q, k, lse, *shared, None),
    }[op]
    with pytest.raises(RuntimeError, match=message):
        launcher(op)(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments))


# Parts of the kernels


@triton.jit(do_not_specialize=["num_sequences"])
def _locate(located_ptr, tiles_ptr, order: TileOrder, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    index, block = locate_tile(tl.load(tiles_ptr + i), order, cu_seqlens_ptr, num_sequences, BLOCK)
    first, length = sequence_rows(index, cu_seqlens_ptr)
    tl.store(located_ptr + i * 4, index)
    tl.store(located_ptr + i * 4 + 1, block)
    tl.store(located_ptr + i * 4 + 2, first)
    tl.store(located_ptr + i * 4 + 3, length)


def _located(batch, order, tiles, block):
    """(sequence, block, first, length) of each of the tiles."""
    located = torch.empty(len(tiles), 4, dtype=torch.int32, device=DEVICE)
    if len(tiles) > 0:
        tiles = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
        cu_seqlens = batch.cu_seqlens.to(DEVICE)
        _locate[(len(tiles),)](located, tiles, order, cu_seqlens, batch.num_sequences, BLOCK=block)
    return located.tolist()


@pytest.mark.parametrize("num_sequences", [0, 1, 3, 128, 200])
@pytest.mark.parametrize("order", ["by sequence", "search"])
def test_tiles_cover_every_row_of_a_sequence_once(order, num_sequences):
    lengths = torch.randint(0, 9, (num_sequences,)).tolist()
    batch = RaggedBatch(lengths, tail=5)
    max_seqlen = 8 if order == "by sequence" else 400
    grid = Grid.of(batch.total, batch.num_sequences, max_seqlen, 4)
    if num_sequences > 0:
        assert grid.order == TileOrder(2 if order == "by sequence" else None, None)
    covered = torch.zeros(batch.total, dtype=torch.int32)
    for sequence, block, first, length in _located(batch, grid.order, range(grid.num_tiles), 4):
        assert first == batch.cu_seqlens[sequence] and first + length == batch.cu_seqlens[sequence + 1]
        covered[first + 4 * block : first + min(4 * block + 4, length)] += 1
    assert (covered == (torch.arange(batch.total) < batch.cu_seqlens[-1])).all()


@pytest.mark.parametrize("block", [32, 64, 128])
def test_listed_tiles_cover_every_row_once(block):
    batch = RaggedBatch((64, 0, 300, 65, 1, 128, 129), tail=200)
    entries = tile_list(batch.cu_seqlens, batch.total)
    grid = Grid.of(batch.total, batch.num_sequences, 1000, block, entries.to(DEVICE))
    assert grid.order.tile_list is not None
    covered = torch.zeros(batch.total, dtype=torch.int32)
    for _, tile, first, length in _located(batch, grid.order, range(grid.num_tiles), block):
        if block * tile < length:
            covered[first + block * tile : first + min(block * (tile + 1), length)] += 1
    assert (covered == (torch.arange(batch.total) < batch.cu_seqlens[-1])).all()


@pytest.mark.parametrize("causal", [False, True])
def test_order_of_tiles_changes_no_bit(causal):
    batch = RaggedBatch((128, 100, 120, 65, 128), tail=100)
    case = AttentionCase(batch, bias="unidirectional", causal=causal, query_mask=True, tiles=True)
    inputs = case.inputs(torch.float16)
    listed = run(inputs, max_seqlen=1000)
    del inputs["tiles_q"]
    searched = run(inputs, max_seqlen=1000)
    for name, x in run(inputs).items():  # by sequence
        assert torch.equal(listed[name], x) and torch.equal(searched[name], x), name


@pytest.mark.parametrize("num_sequences", [5000, 20_000])
def test_search_among_thousands_of_sequences(num_sequences):
    batch = RaggedBatch(tuple((torch.arange(num_sequences) % 7).tolist()), tail=5)
    starts = [start // 4 + i for i, start in enumerate(batch.cu_seqlens[:-1].tolist())]
    tiles = [0, 1, *range(2, starts[-1], starts[-1] // 40), starts[-1] - 1, *range(starts[-1], starts[-1] + 2)]
    for tile, (sequence, block, _, _) in zip(tiles, _located(batch, TileOrder(None, None), tiles, 4), strict=True):
        want = bisect.bisect_right(starts, tile) - 1
        assert (sequence, block) == (want, tile - starts[want])


@triton.jit
def _keep(kept_ptr, seed_ptr, threshold, start_q, start_k, num_queries, num_keys, BY_KEYS: tl.constexpr):
    head, index = tl.program_id(0), tl.program_id(1)
    query, key = start_q + tl.arange(0, 16), start_k + tl.arange(0, 32)
    dropout = Dropout(seed=seed_ptr, threshold=threshold, keep_scale=1.0)
    kept = keep_tile(dropout, index, head, groups_of(start_q, 16), groups_of(start_k, 32), BY_KEYS)
    kept_ptr += (index * tl.num_programs(0) + head) * num_queries * num_keys
    if BY_KEYS:
        tl.store(kept_ptr + query[None, :] * num_keys + key[:, None], kept.to(tl.int8))
    else:
        tl.store(kept_ptr + query[:, None] * num_keys + key[None, :], kept.to(tl.int8))


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("p", [1e-3, 0.3, 0.75])
def test_dropout_mask_is_the_documented_one(p, by_keys):
    seed = torch.tensor([DROPOUT_SEED], device=DEVICE)
    kept = torch.empty(3, 2, 48, 64, dtype=torch.int8, device=DEVICE)
    for start_q, start_k in itertools.product((0, 16, 32), (0, 32)):
        _keep[(2, 3)](kept, seed, dropout_threshold(p), start_q, start_k, 48, 64, BY_KEYS=by_keys)
    assert torch.equal(kept.cpu().bool(), attention_keep_mask(p, seed.cpu(), torch.arange(3), 2, 48, 64))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12), (4, 100), (64, 77), (16, 9)])
def test_buckets_of_all_distances(num_buckets, max_distance, bidirectional):
    """Distances beyond max_distance have the bucket of max_distance, so a clamped look-up is exact."""
    distances = torch.arange(-4 * max_distance, 4 * max_distance + 1)
    radius = max_distance + 256
    buckets = distance_buckets(num_buckets, max_distance, bidirectional, torch.device("cpu"))
    want = relative_position_bucket(
        distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    assert torch.equal(buckets[distances.clamp(-radius, radius) + radius].long(), want)


def test_queries_that_see_no_key():
    case = AttentionCase(batch_k=KEYS_OF_RAGGED, causal=True)
    for max_seqlen in KERNELS.values():
        got = run(case.inputs(torch.float16), max_seqlen)
        sees_none = got["lse"][0].isneginf()
        assert sees_none.any() and not got["out"][sees_none].any()
