"""No kernel reads or writes outside the tensors of its launch, whatever the lengths, widths and strides."""

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from attention_cases import (
    FEW_QUERIES,
    KEYS_OF_FEW_QUERIES,
    KEYS_OF_RAGGED,
    AttentionCase,
    detached,
    shared_op_arguments,
)
from op_kernels import launcher
from ragged import BATCHES, RaggedBatch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from guarded import checked_accesses
from triton.runtime.errors import InterpreterError

import stamp_kernels.common.contents as contents
from stamp_kernels import triton_kernels
from stamp_kernels.triton_kernels import constants
from stamp_kernels.triton_kernels.attention import relative_bias
from stamp_kernels.triton_kernels.cross_entropy import backward, chunked, forward, row_lists
from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as losses
from stamp_kernels.triton_kernels.pruning import configs, gather, selection

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")

# Without tail rows, what follows the last sequence is outside.
FULL = RaggedBatch((5, 0, 1, 13, 2, 7), tail=0)
FULL_KEYS = RaggedBatch((3, 4, 0, 11, 2, 9), tail=0)
LONG = RaggedBatch((67, 3, 0, 130, 33), tail=0)
LONG_KEYS = RaggedBatch((130, 2, 5, 0, 70), tail=0)

# What the tests of each family launch together
ATTENTION = {
    *(f"stamp_attention_fwd_{x}_kernel" for x in ("slots", "general", "centrality")),
    *(f"stamp_attention_bwd_{x}_kernel" for x in ("query", "key", "bias")),
    "stamp_attention_bias_kernel",
    "stamp_attention_centrality_kernel",
}
CROSS_ENTROPY = {
    *(f"stamp_cross_entropy_fwd{x}_kernel" for x in ("", "_combine", "_reduce")),
    *(f"stamp_cross_entropy_bwd_{x}_kernel" for x in ("row_terms", "hidden", "weight")),
    *(f"stamp_cross_entropy_{x}_rows_kernel" for x in ("count", "list")),
    "stamp_cross_entropy_chunk_kernel",
}
PRUNING = {
    "stamp_token_importance_kernel",
    "stamp_protected_items_kernel",
    "stamp_kept_offsets_kernel",
    "stamp_prune_importance_and_offsets_kernel",
    "stamp_gather_rows_kernel",
}
SELECTION = {"short": "stamp_select_tokens_short_kernel", "long": "stamp_select_tokens_long_kernel"}


@pytest.fixture(autouse=True)
def accesses(monkeypatch):
    """Checks the accesses of a test. Constants are made anew, since their memory is checked too."""
    monkeypatch.setattr(constants, "_CONSTANTS", {})
    with checked_accesses() as launches:
        yield launches


def test_every_kernel_is_here():
    names = [module.name for module in pkgutil.walk_packages(triton_kernels.__path__, f"{triton_kernels.__name__}.")]
    kernels = {name for module in map(importlib.import_module, names) for name in vars(module)}
    listed = ATTENTION | CROSS_ENTROPY | PRUNING | set(SELECTION.values())
    listed |= {"stamp_shift_targets_kernel", "stamp_tile_list_kernel"}
    assert {name for name in kernels if name.endswith("_kernel")} == listed


# The harness itself


@triton.jit
def _copy_with_halo(y_ptr, x_ptr, n, halo, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane + halo, mask=lane < n, other=0.0)
    tl.store(y_ptr + lane - halo, x, mask=lane < n)


def test_accesses_inside_pass(accesses):
    x, y = torch.randn(5), torch.empty(5)
    _copy_with_halo[(1,)](y, x, 5, 0, BLOCK=8)
    assert torch.equal(x, y) and accesses == {"_copy_with_halo": 1}


@pytest.mark.parametrize(
    ("n", "halo", "message"),
    [
        (6, 0, "load outside x_ptr: bytes 0 to 24 of 20"),
        (5, 1, "load outside x_ptr: bytes 4 to 24 of 20"),
        (4, 1, "store outside y_ptr: bytes -4 to 12 of 20"),
        (5, -1, "load outside x_ptr: bytes -4 to 16 of 20"),
    ],
)
def test_accesses_outside_are_found(n, halo, message):
    with pytest.raises(InterpreterError, match=message):
        _copy_with_halo[(1,)](torch.empty(5), torch.randn(5), n, halo, BLOCK=8)


# Attention


def run_attention(inputs: dict[str, Any], bounds: tuple[int, ...]) -> None:
    """Every op of attention, the forward with each bound of max_seqlen."""
    inputs = detached(inputs)
    dropout = inputs.get("dropout_p", 0.0), inputs.get("dropout_seed")
    mask = inputs.get("centrality_query_mask")
    q, k, v = (inputs[name].clone() for name in ("q", "k", "v"))
    cu_q, cu_k, max_q, max_k, *rest = shared_op_arguments(inputs)
    for bound in bounds:
        shared = (cu_q, cu_k, max(max_q, bound), max(max_k, bound), *rest)
        out, lse, _ = launcher("packed_attention_forward")(q, k, v, *shared, mask, *dropout, True)
    needs = (True, True, True, "relative_bias" in inputs)
    launcher("packed_attention_backward")(torch.ones_like(q), q, k, v, out, lse, *shared, *dropout, *needs)
    launcher("attention_centrality")(q, k, lse, *shared, mask)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (AttentionCase(FULL, heads=(4, 2), head_dim=24, causal=True, bias="unidirectional", positions=True,
                       query_mask=True, dropout_p=0.3), torch.float16),
        (AttentionCase(FULL, FULL_KEYS, heads=(2, 1), head_dim=8, bias="bidirectional", query_mask=True),
         torch.float32),
        (AttentionCase(batch_k=KEYS_OF_RAGGED, heads=(2, 2), head_dim=72, causal=True), torch.float16),
        (AttentionCase(FULL, FULL_KEYS, heads=(2, 1), head_dim=72, tiles=True), torch.float32),
        (AttentionCase(BATCHES["all_empty"], bias="bidirectional", dropout_p=0.3), torch.float16),
        (AttentionCase(BATCHES["no_sequences"], bias="bidirectional"), torch.float32),
    ],
    ids=["everything", "cross", "wide", "listed", "empty", "none"],
)  # fmt: skip
def test_attention(accesses, case, dtype):
    run_attention(case.inputs(dtype), bounds=(0, 32, 64, 300))
    of_bias = {"stamp_attention_bias_kernel", "stamp_attention_bwd_bias_kernel"}
    assert set(accesses) == (ATTENTION if case.bias else ATTENTION - of_bias)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (AttentionCase(LONG, heads=(2, 1), causal=True, bias="unidirectional", positions=True), torch.float16),
        (AttentionCase(LONG, LONG_KEYS, heads=(1, 1), head_dim=40, bias="bidirectional", dropout_p=0.3), torch.float16),
        (AttentionCase(LONG, LONG_KEYS, heads=(1, 1), head_dim=8, causal=True, query_mask=True), torch.float32),
        (AttentionCase(LONG, LONG_KEYS, heads=(1, 1), head_dim=128, causal=True, tiles=True), torch.float16),
        (AttentionCase(FEW_QUERIES, KEYS_OF_FEW_QUERIES, heads=(6, 2), head_dim=24, causal=True), torch.float16),
    ],
    ids=["causal bias", "cross bias", "cross causal", "cross causal listed", "few queries"],
)  # fmt: skip
def test_attention_of_several_blocks(case, dtype):
    run_attention(case.inputs(dtype), bounds=(0, 1000))


@pytest.mark.parametrize("head_dim", [8, 128])
def test_tile_lists_of_anything(monkeypatch, head_dim):
    """As on a GPU, where nothing has looked at the contents: the results are wrong, and no memory is touched."""
    monkeypatch.setattr(contents, "contents_are_checked", lambda device: False)
    case = AttentionCase(LONG, heads=(1, 1), head_dim=head_dim, bias="bidirectional", tiles=True)
    inputs = case.inputs(torch.float16)
    extremes = torch.tensor([-(2**31), -1, 0, 1, 4, 5, 63, 64, 128, 2**30, 2**31 - 64, 2**31 - 1])
    inputs["tiles_q"] = extremes[torch.randint(len(extremes), inputs["tiles_q"].shape)].to(torch.int32)
    run_attention(inputs, bounds=(1000,))


@pytest.mark.parametrize("batch", [*BATCHES.values(), LONG], ids=[*BATCHES, "long"])
def test_tile_list(accesses, batch):
    launcher("tile_list")(batch.cu_seqlens, batch.total)
    assert set(accesses) == {"stamp_tile_list_kernel"}


def test_attention_with_searched_buckets(monkeypatch):
    monkeypatch.setattr(relative_bias, "MAX_TABLE_DISTANCE", 8)
    run_attention(
        AttentionCase(bias="bidirectional", positions=True, head_dim=8).inputs(torch.float32), bounds=(0, 300)
    )


# Cross-entropy


@pytest.fixture
def small_pieces(monkeypatch):
    """Several splits, row chunks and blocks of each kind; torch multiplies 16-bit factors into fp32 only on a GPU."""

    def set_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)

    monkeypatch.setattr(chunked, "_set_product", set_product)
    monkeypatch.setattr(chunked, "row_chunk_size", lambda *_: 16)
    monkeypatch.setattr(row_lists, "_ROWS_PER_BLOCK", 16)
    monkeypatch.setattr(forward, "CLASSES_PER_SPLIT", 128)
    monkeypatch.setattr(backward, "num_splits", lambda *_: 3)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("width", "classes", "dtype", "per_step", "ranges"),
    [
        (20, 257, torch.float16, (), None),
        (33, 49, torch.float32, ("hidden", "weight", "bias"), [0, 17, 17, 29, 5, 49]),
        (100, 150, torch.float16, ("hidden",), [3, 150] * 3),
        (1, 1, torch.float32, (), None),
    ],
    ids=str,
)
def test_cross_entropy(monkeypatch, accesses, width, classes, dtype, per_step, ranges):
    rows, steps = 39, 3

    def made(name: str, *shape: int) -> Tensor:
        return torch.randn(*((steps,) if name in per_step else ()), *shape).to(dtype)

    hidden, weight, bias = made("hidden", rows, width), made("weight", classes, width), made("bias", classes)
    spans = list(zip(ranges[::2], ranges[1::2], strict=True)) if ranges else [(0, classes)] * steps
    targets = torch.stack([torch.randint(start, end, (rows,)) for start, end in spans], dim=1)
    targets[torch.rand(rows, steps) < 0.3] = -100
    inputs = (hidden, weight, targets, bias)
    for options in ((0.0, 0.0, None), (0.1, 0.01, 3.0)):
        for reduction in (0, 1):
            arguments = (*inputs, None, torch.ones(steps), ranges, -100, *options, reduction)
            loss, _, scale, lse = launcher("multi_token_cross_entropy_forward")(*arguments)
            launcher("multi_token_cross_entropy_backward")(
                torch.ones_like(loss), *inputs, lse, scale, *arguments[6:-1], True, True, True
            )
        for min_logits in (0, 10**9):
            monkeypatch.setattr(losses, "MIN_LOGITS_IN_CHUNKS", min_logits)
            launcher("multi_token_cross_entropy_with_gradients")(*arguments, True, True, True)
    has_splits = classes > 128
    assert set(accesses) == (
        CROSS_ENTROPY if has_splits else CROSS_ENTROPY - {"stamp_cross_entropy_fwd_combine_kernel"}
    )


@pytest.mark.parametrize(
    ("batch", "dtype"), [(BATCHES["ragged"], torch.int64), (BATCHES["all_empty"], torch.uint8), (FULL, torch.int16)]
)
def test_shift_targets(batch, dtype):
    labels = torch.randint(0, 50, (batch.total,)).to(dtype)
    for steps, stride in ((1, 1), (3, 4), (2, 10**6)):
        launcher("shift_targets")(labels, batch.cu_seqlens, steps, stride, -100)
    strided = torch.stack([labels, labels], dim=1)[:, 1]
    launcher("shift_targets")(strided, batch.cu_seqlens, 2, 1, -100)


# Pruning


@pytest.fixture
def unchecked(monkeypatch):
    """As on a GPU, where nothing has looked at the contents."""
    for module in (contents, selection, gather):
        monkeypatch.setattr(module, "contents_are_checked", lambda device: False)


@pytest.mark.parametrize("width", [1, 5, 24, 1030])
def test_token_importance(width):
    for batch, dtype in zip((FULL, BATCHES["ragged"]), (torch.float16, torch.float32), strict=True):
        hidden = torch.randn(batch.total, width).to(dtype)
        for norm_order, cu_seqlens in ((1, None), (2, batch.cu_seqlens)):
            launcher("token_importance")(
                hidden, torch.rand(batch.total), cu_seqlens, norm_order, cu_seqlens is not None
            )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["ragged", "no_tail", "one_sequence", "no_sequences"])
@pytest.mark.parametrize("codes_per_item", [1, 3])
@pytest.mark.parametrize("kernel", ["short", "long"])
def test_pruning(monkeypatch, accesses, name, codes_per_item, kernel):
    """Also if the last item is incomplete or the result has too few rows for what stays."""
    batch = BATCHES[name]
    if kernel == "long":
        monkeypatch.setattr(configs, "SELECTION_CONFIGS", ())
        monkeypatch.setattr(configs, "LONG_SELECTION_CONFIG", configs.SelectionConfig(1, 8, 1))
    importance, positions = torch.rand(batch.total), torch.arange(batch.total, dtype=torch.int32)
    protect = torch.rand(batch.total) < 0.3
    counts = torch.randint(0, 5, (batch.num_sequences,))
    x = [torch.randn(batch.total, 5), torch.randint(0, 9, (batch.total, 3), dtype=torch.int16)]
    for budget, min_keep, mask, of_tokens, total_kept in (
        ((2**31, None, None), 1, None, None, 4),
        ((None, 0, None), 0, protect, positions, 0),
        ((None, None, counts), 2, protect, None, batch.total + 3),
    ):
        arguments = (batch.cu_seqlens, batch.max_seqlen, *budget, min_keep, mask, codes_per_item, total_kept)
        launcher("token_importance")(x[0], importance, batch.cu_seqlens, 1, True)
        launcher("select_tokens")(importance, *arguments)
        launcher("prune")(x, importance, of_tokens, *arguments[:2], 1, True, *arguments[2:])
    if batch.total > 0:
        assert set(accesses) == PRUNING | {SELECTION[kernel]}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), torch.bool), ((1,), torch.float16), ((5,), torch.complex64), ((3, 24), torch.float16), ((2100,), torch.int16),
     ((0,), torch.float64)],
    ids=str,
)  # fmt: skip
def test_gather(shape, dtype):
    x = torch.ones(9, *shape, dtype=dtype)
    wide = torch.ones(9, 2, *shape, dtype=dtype)[:, 1]
    for row_map in ([0, 3, 8, -1], [], [8] * (300 if x[0].numel() < 100 else 3)):  # more rows than a program has
        launcher("gather_tokens_forward")([x, wide], torch.tensor(row_map, dtype=torch.int64))
        launcher("gather_tokens_backward")([x, wide], torch.tensor(row_map, dtype=torch.int32))
