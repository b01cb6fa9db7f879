"""Arguments of every raw op, `torch.ops.stamp.*`: good ones, and the ways in which each can be wrong."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import stamp_kernels  # noqa: F401  (defines the ops)

Arguments = dict[str, Any]

TOTAL, STEPS, CLASSES, WIDTH, HEADS = 12, 3, 10, 8, 4


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _attention() -> Arguments:
    """What the three ops of attention share, in the order of their schemas. Cross attention, with every option."""
    return dict(
        cu_seqlens_q=_int32(0, 5, 5, 11),
        cu_seqlens_k=_int32(0, 4, 6, 9),
        max_seqlen_q=6,
        max_seqlen_k=4,
        tiles_q=_int32(0, 0, 2, 0, -1, -1).view(3, 2),
        tiles_k=_int32(0, 0, 1, 0, 2, 0).view(3, 2),
        causal=True,
        scale=0.5,
        bias_table=torch.randn(8, HEADS),
        bias_bidirectional=True,
        bias_max_distance=20,
        positions_q=torch.arange(TOTAL, dtype=torch.int32),
        positions_k=torch.arange(10, dtype=torch.int32),
    )


def _budget() -> Arguments:
    return dict(
        ratio_q32=None,
        keep_count=None,
        keep_counts=torch.tensor([1, 0, 3]),
        min_keep=1,
        protect=torch.arange(TOTAL) % 5 == 0,
        codes_per_item=1,
        total_kept=TOTAL,
    )


def _loss_options() -> Arguments:
    return dict(
        vocab_ranges=[0, CLASSES, 0, CLASSES, 2, CLASSES],
        ignore_index=-100,
        label_smoothing=0.1,
        z_loss=0.01,
        softcap=3.0,
    )


def _loss_tensors() -> Arguments:
    return dict(
        hidden=torch.randn(TOTAL, WIDTH),
        weight=torch.randn(CLASSES, WIDTH),
        targets=torch.randint(2, CLASSES, (TOTAL, STEPS)),
        bias=torch.randn(CLASSES),
    )


def good_arguments() -> dict[str, Arguments]:
    """By the name of the op, in the order of its schema."""
    torch.manual_seed(0)
    rows, rows_k = torch.randn(TOTAL, HEADS, 8), torch.randn(10, 2, 8)
    lse, mask = torch.randn(HEADS, TOTAL), torch.arange(TOTAL) % 2 == 0
    offsets = _int32(0, 5, 5, 11)
    weights = dict(step_weights=None, step_weights_tensor=torch.rand(STEPS))
    needs = dict(need_hidden=True, need_weight=True, need_bias=True)
    dropout = dict(dropout_p=0.5, dropout_seed=torch.tensor([7]))
    return {
        "packed_attention_forward": dict(
            q=rows, k=rows_k, v=rows_k, **_attention(), centrality_query_mask=mask, **dropout, return_centrality=True
        ),
        "packed_attention_backward": dict(
            grad_out=rows, q=rows, k=rows_k, v=rows_k, out=rows, lse=lse, **_attention(), **dropout,
            need_dq=True, need_dk=True, need_dv=True, need_dbias=True,
        ),
        "attention_centrality": dict(q=rows, k=rows_k, lse=lse, **_attention(), query_mask=mask),
        "tile_list": dict(cu_seqlens=offsets, total=TOTAL),
        "token_importance": dict(
            hidden=torch.randn(TOTAL, WIDTH), centrality=torch.rand(TOTAL), cu_seqlens=offsets, norm_order=1,
            per_visible_query=True,
        ),
        "select_tokens": dict(importance=torch.rand(TOTAL), cu_seqlens=offsets, max_seqlen=6, **_budget()),
        "prune": dict(
            x=[torch.randn(TOTAL, WIDTH), torch.randn(TOTAL)], centrality=torch.rand(TOTAL),
            positions=torch.arange(TOTAL, dtype=torch.int32), cu_seqlens=offsets, max_seqlen=6, norm_order=2,
            per_visible_query=False, **_budget(),
        ),
        "gather_tokens_forward": dict(x=[torch.randn(TOTAL, WIDTH)], indices=torch.tensor([0, 4, 11, -1])),
        "gather_tokens_backward": dict(grad=[torch.randn(4, WIDTH)], inverse=_int32(0, -1, 3)),
        "multi_token_cross_entropy_forward": dict(**_loss_tensors(), **weights, **_loss_options(), reduction=1),
        "multi_token_cross_entropy_with_gradients": dict(
            **_loss_tensors(), **weights, **_loss_options(), reduction=1, **needs
        ),
        "multi_token_cross_entropy_backward": dict(
            grad_loss=torch.tensor(1.0), **_loss_tensors(), lse=torch.randn(STEPS, TOTAL), step_scale=torch.rand(STEPS),
            **_loss_options(), **needs,
        ),
        "shift_targets": dict(labels=torch.arange(TOTAL), cu_seqlens=offsets, steps=2, stride=1, ignore_index=-100),
    }  # fmt: skip


GOOD = good_arguments()


def run(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.stamp, op)(*arguments.values())


# Wrong tensors

# Arguments whose sizes decide those of the others, which an error would name instead.
_DECIDE_SIZES = {
    "q", "k", "hidden", "weight", "targets", "importance", "labels", "cu_seqlens", "cu_seqlens_q", "indices", "inverse",
    "x", "grad",
}  # fmt: skip
# Arguments that may have any of the dtypes below.
_ANY_FLOAT = {
    "bias", "bias_table", "centrality", "step_weights_tensor", "grad_loss", "step_scale", "importance", "hidden", "q",
    "targets",
}  # fmt: skip
_OTHER_DTYPE = {
    torch.float32: torch.float64,
    torch.int32: torch.int64,
    torch.int64: torch.int32,
    torch.bool: torch.float32,
}


def _with_storage(x: Tensor, num_bytes: int) -> Tensor:
    """A copy of x at an offset of x.nbytes in a storage that was resized afterwards."""
    copy = torch.stack([x, x])[1]
    copy.untyped_storage().resize_(num_bytes)
    return copy


def wrong_storages(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "freed", _with_storage(x, 0)
    yield "storage of its size, but not from its offset", _with_storage(x, x.nbytes)
    yield "storage a byte too small", _with_storage(x, 2 * x.nbytes - 1)


def _wrong_sizes(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dim in range(x.dim()):
        yield f"dimension {dim} too short", x.narrow(dim, 1, x.shape[dim] - 1)
        yield f"dimension {dim} too long", torch.cat([x, x.narrow(dim, 0, 1)], dim)
        if name != "step_scale":  # empty where the losses are not reduced
            yield f"dimension {dim} of size 0", x.narrow(dim, 0, 0)


def wrong_tensors(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(what is wrong, the tensor) for a good tensor of an argument."""
    yield "complex", x.to(torch.complex64)
    other = _OTHER_DTYPE[x.dtype]
    if name not in _ANY_FLOAT | {"keep_counts", "labels"}:
        yield str(other), x.to(other)
    if not (name in ("hidden", "weight", "bias") and x.dim() < 3):  # they may have one more dimension, for the steps
        yield "a dimension more", x[None]
    yield "two dimensions more", x[None, None]
    if x.dim() > 0:
        yield "scalar", x.reshape(-1)[0]
    if x.dim() > 1 and name not in ("bias", "lse"):
        yield "flat", x.reshape(-1)
    if name not in _DECIDE_SIZES:
        yield from _wrong_sizes(name, x)
    yield from wrong_storages(x)


# Wrong numbers, lists and combinations

NAN, INF = math.nan, math.inf
_ATTENTION = ("packed_attention_forward", "packed_attention_backward", "attention_centrality")
_LOSS = tuple(op for op in GOOD if op.startswith("multi_token"))
_SELECTION = ("select_tokens", "prune")


def wrong_values() -> Iterator[tuple[str, Arguments, str]]:
    """(op, changes to its good arguments, what the error says)."""
    no_keys = dict(cu_seqlens_k=None, positions_k=None)
    for op in _ATTENTION:
        for scale in (NAN, INF, 1e300):
            yield op, dict(scale=scale), "scale must be finite"
        for head_dim in (0, 7, 12, 264):
            of_size = {
                name: GOOD[op][name][..., :1].repeat(1, 1, head_dim)
                for name in ("q", "k", "v", "out", "grad_out")
                if name in GOOD[op]
            }
            yield op, of_size, f"q: head_dim must be a multiple of 8 from 8 to 256, got {head_dim}"
        yield op, dict(q=torch.randn(TOTAL, 3, 8)), "k: num_heads_kv must divide the 3 heads of q, got 2"
        yield op, dict(k=torch.randn(10, 0, 8)), "k: num_heads_kv must divide the 4 heads of q, got 0"
        yield op, no_keys, r"k must have shape \[12, num_heads_kv, 8\], got \[10, 2, 8\]"
        yield op, dict(cu_seqlens_q=_int32()), "cu_seqlens_q must have num_sequences \\+ 1 >= 1 entries"
        yield op, dict(cu_seqlens_k=_int32()), r"cu_seqlens_k must have shape \[4\], got \[0\]"
        yield op, dict(cu_seqlens_k=_int32(0, 4)), r"cu_seqlens_k must have shape \[4\], got \[2\]"
        outside = dict(cu_seqlens_k=_int32(0, 4, 6, 11), max_seqlen_k=5)
        yield op, outside, r"cu_seqlens_k\[-1\] must be at most the number of rows 10, got 11"
        yield op, dict(max_seqlen_q=-1), "max_seqlen_q must be at least 0, got -1"
        yield op, dict(tiles_q=torch.zeros(4, 2, dtype=torch.int32)), r"tiles_q must have shape \[3, 2\], got \[4, 2\]"
        yield op, dict(tiles_k=torch.zeros(3, 2)), "tiles_k must have dtype int32, got float32"
        for rows in (0, 1, 2, 7):
            yield op, dict(bias_table=torch.randn(8, HEADS)[:rows]), f"bias_table must have at least 4 rows.*got {rows}"
        for distance in (-(2**62), -1, 0, 2):
            yield op, dict(bias_max_distance=distance), f"bias_max_distance must exceed the 2 exact.*got {distance}"
        far = torch.full((TOTAL,), -(2**31), dtype=torch.int32)
        yield op, dict(positions_q=far), "positions_q and positions_k must lie at most 1073741823 apart"
    yield "tile_list", dict(cu_seqlens=_int32()), "cu_seqlens must have num_sequences \\+ 1 >= 1 entries"
    yield "tile_list", dict(total=-1), "total must be at least 0, got -1"
    yield "tile_list", dict(total=10), r"cu_seqlens\[-1\] must be at most the number of rows 10, got 11"
    for op in _ATTENTION[:2]:
        for p in (-0.1, 1.0, 2.0, NAN, INF):
            yield op, dict(dropout_p=p), r"dropout_p must be in \[0, 1\)"
        yield op, dict(dropout_seed=None), "dropout_p 0.5 needs a dropout_seed"
    yield "packed_attention_backward", dict(bias_table=None), "need_dbias needs a bias_table"

    for op in _SELECTION:
        others = dict(keep_counts=None)
        for ratio in (-1, 2**32 + 1, -(2**62), 2**62):
            yield op, others | dict(ratio_q32=ratio), r"ratio_q32 must be in \[0, 4294967296\]"
        yield op, others | dict(keep_count=-3), "keep_count must be at least 0, got -3"
        yield op, dict(keep_counts=torch.tensor([1, -2, 1])), "keep_count must not be negative, got -2"
        yield op, others, "exactly one of ratio_q32, keep_count and keep_counts"
        yield op, dict(keep_count=1), "exactly one of ratio_q32, keep_count and keep_counts"
        yield op, dict(min_keep=-1), "min_keep must be at least 0, got -1"
        for count in (-5, 0, -(2**62)):
            yield op, dict(codes_per_item=count), f"codes_per_item must be at least 1, got {count}"
        yield op, dict(codes_per_item=2**62), "codes_per_item 4611686018427387904 tokens"
        yield op, dict(total_kept=-1), "total_kept must be at least 0, got -1"
        yield op, dict(total_kept=1), "total_kept is 1, but the sequences keep"
        yield op, dict(cu_seqlens=_int32()), "cu_seqlens must have num_sequences \\+ 1 >= 1 entries"
    yield "select_tokens", dict(importance=torch.zeros(1).expand(2**31)), "importance must have at most 2147483647 rows"
    for op in ("token_importance", "prune"):
        for order in (-1, 0, 3):
            yield op, dict(norm_order=order), f"norm_order must be 1 or 2, got {order}"
    yield "token_importance", dict(cu_seqlens=None), "per_visible_query needs cu_seqlens"
    yield "token_importance", dict(cu_seqlens=_int32()), "cu_seqlens must have num_sequences \\+ 1 >= 1 entries"
    yield "prune", dict(x=[torch.randn(TOTAL, WIDTH), torch.randn(5)]), "x must have tensors with the same number of r"
    for op, name in (("gather_tokens_forward", "x"), ("gather_tokens_backward", "grad"), ("prune", "x")):
        rows = GOOD[op][name][0]
        yield op, {name: [rows, torch.tensor(1.0)]}, f"{name} must have tensors with at least one dimension"
        yield op, {name: [rows, rows[1:]]}, f"{name} must have tensors with the same number of rows"
        for _, tensor in wrong_storages(rows):
            yield op, {name: [rows, tensor]}, f"{name} must have memory for shape"
    yield "gather_tokens_forward", dict(indices=torch.tensor([0, 12])), r"indices\[1\] is 12"
    yield "gather_tokens_backward", dict(inverse=_int32(0, -2)), r"inverse\[1\] is -2"

    for op in _LOSS:
        for bounds in ([], [0, 5], [0, 5, 0, 5, 0], [0, 10] * 4):
            yield op, dict(vocab_ranges=bounds), f"vocab_ranges must have .* for each of the 3 steps, got {len(bounds)}"
        for start, end in ((-1, 10), (0, 11), (4, 4), (5, 2), (0, 2**62), (-(2**62), 0)):
            yield op, dict(vocab_ranges=[0, 10, start, end, 0, 10]), rf"vocab_ranges must .*got \({start}, {end}\)"
        for smoothing in (-0.1, 5.0, NAN):
            yield op, dict(label_smoothing=smoothing), r"label_smoothing must be in \[0, 1\]"
        for z_loss in (-1.0, NAN, INF):
            yield op, dict(z_loss=z_loss), r"z_loss must be in \[0, inf\)"
        for softcap in (0.0, -3.0, NAN, INF, 1e-50, 1e50):
            yield op, dict(softcap=softcap), r"softcap must be in \(0, inf\) in the compute dtype"
        yield op, dict(targets=torch.zeros(TOTAL, 0, dtype=torch.int64)), "targets must have at least one step"
        yield op, dict(weight=torch.zeros(0, WIDTH)), "weight must have at least one class"
        yield op, dict(targets=torch.full((TOTAL, STEPS), 10)), r"targets\[0, 0\] is 10"
        yield op, dict(hidden=torch.randn(2, TOTAL, WIDTH)), r"hidden must have shape \[3, 12, D\], got \[2, 12, 8\]"
        yield op, dict(weight=torch.randn(2, CLASSES, WIDTH)), r"weight must have shape \[3, V, 8\], got \[2, 10, 8\]"
        yield op, dict(bias=torch.randn(2, CLASSES)), r"bias must have shape \[3, 10\], got \[2, 10\]"
    for op in _LOSS[:2]:
        for reduction in (-1, 3, 2**40):
            yield op, dict(reduction=reduction), f"reduction must be .*, got {reduction}"
        for count in (0, 2, 4):
            weights = dict(step_weights=[1.0] * count, step_weights_tensor=None)
            yield op, weights, f"step_weights must have one weight for each of the 3 steps, got {count}"
        yield op, dict(step_weights=[1.0] * STEPS), "at most one of step_weights and step_weights_tensor"
    for op in _LOSS[1:]:
        yield op, dict(bias=None), "need_bias needs a bias"
    yield _LOSS[1], dict(reduction=0), "reduction must be 1 .*, got 0"
    unreduced = dict(step_scale=torch.zeros(0))
    yield _LOSS[2], unreduced, r"grad_loss must have shape \[12, 3\], got \[\]"
    yield _LOSS[2], unreduced | dict(grad_loss=torch.randn(STEPS, TOTAL)), r"grad_loss must have shape \[12, 3\]"

    for steps in (0, -1):
        yield "shift_targets", dict(steps=steps), f"steps and stride must be at least 1, got {steps} and 1"
    for stride in (0, -(2**62)):
        yield "shift_targets", dict(stride=stride), f"steps and stride must be at least 1, got 2 and {stride}"
    for steps in (2**62, 2**63 - 1, 2**60 + 1):
        yield "shift_targets", dict(steps=steps), f"steps must be at most .* for 12 labels, got {steps}"
