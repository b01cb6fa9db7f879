"""The arguments that `packed_attention` and `attention_centrality` share: their checks, and how the ops take them."""

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import BiasArguments, Sequences
from stamp_kernels.common.tiles import num_listed_tiles
from stamp_kernels.ops._checks import (
    FLOATING_DTYPES,
    INT32,
    INTEGERS,
    check_count,
    check_range,
    check_tensor,
    checked_cu_seqlens,
)
from stamp_kernels.relative_position import RelativePositionBias

MAX_HEAD_DIM = 256
_LARGEST_FLOAT = torch.finfo(torch.float32).max
_NO_BIAS = BiasArguments(None, True, 0, None, None)


def num_query_key_pairs(sequences: Sequences) -> int:
    """Query-key pairs of the batch; an upper bound under fake tensors, which have no contents."""
    cu_seqlens_q = sequences.cu_seqlens_q
    if isinstance(cu_seqlens_q, torch._subclasses.FakeTensor) or cu_seqlens_q.is_meta:
        return sequences.num_sequences * sequences.max_seqlen_q * sequences.max_seqlen_k
    return int((cu_seqlens_q.diff().long() * sequences.offsets_of_keys.diff().long()).sum())


def check_q_and_k(q: Tensor, k: Tensor, *, is_self_attention: bool) -> None:
    # The conditions are those of check_tensor, which knows what to say.
    q_sizes, k_sizes, dtype = q.shape, k.shape, q.dtype
    if len(q_sizes) != 3 or dtype not in FLOATING_DTYPES:
        check_tensor("q", q, shape=("total_q", "num_heads_q", "head_dim"), dtypes=FLOATING_DTYPES)
    total_q, num_heads, head_dim = q_sizes
    if (
        len(k_sizes) != 3 or k_sizes[2] != head_dim or (is_self_attention and k_sizes[0] != total_q)
        or k.dtype != dtype or k.device != q.device
    ):  # fmt: skip
        total_k = total_q if is_self_attention else "total_k"
        check_tensor("k", k, shape=(total_k, "num_heads_kv", head_dim), dtypes=(dtype,), device=q.device)
    num_heads_kv = k_sizes[1]
    if dtype == torch.float64 and q.device.type != "cpu" and not reference_is_forced():
        raise ValueError("q must have dtype float32, float16 or bfloat16 on this device, got torch.float64")
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    if num_heads_kv == 0 or num_heads % num_heads_kv != 0:
        raise ValueError(f"k: num_heads_kv must divide the {num_heads} heads of q, got {num_heads_kv}")


def checked_sequences(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    tiles_q: Tensor | None,
    tiles_k: Tensor | None,
    q: Tensor,
    k: Tensor,
) -> Sequences:
    device = q.device
    cu_seqlens_q = checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
    max_seqlen_q = check_count("max_seqlen_q", max_seqlen_q)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k must be given together")
    if cu_seqlens_k is None:
        max_seqlen_k = max_seqlen_q
    else:
        check_tensor("cu_seqlens_k", cu_seqlens_k, shape=cu_seqlens_q.shape, dtypes=INTEGERS, device=device)
        cu_seqlens_k = checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device)
        max_seqlen_k = check_count("max_seqlen_k", max_seqlen_k)
    num_sequences = cu_seqlens_q.shape[0] - 1
    for name, tiles, rows in (("tiles_q", tiles_q, q), ("tiles_k", tiles_k, k)):
        if tiles is not None:
            shape = (num_listed_tiles(rows.shape[0], num_sequences), 2)
            check_tensor(name, tiles, shape=shape, dtypes=INT32, device=device)
    return Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k)


def checked_bias(
    relative_bias: RelativePositionBias | None,
    positions_q: Tensor | None,
    positions_k: Tensor | None,
    q: Tensor,
    k: Tensor,
) -> BiasArguments:
    if relative_bias is None and positions_q is None and positions_k is None:
        return _NO_BIAS
    device = q.device
    if relative_bias is not None:
        if not isinstance(relative_bias, RelativePositionBias):
            raise ValueError(f"relative_bias must be a RelativePositionBias, got {type(relative_bias).__name__}")
        shape = ("num_buckets", q.shape[1])
        check_tensor("relative_bias.table", relative_bias.table, shape=shape, dtypes=FLOATING_DTYPES, device=device)
    if positions_q is not None:
        check_tensor("positions_q", positions_q, shape=q.shape[:1], dtypes=INT32, device=device)
    if positions_k is not None:
        check_tensor("positions_k", positions_k, shape=k.shape[:1], dtypes=INT32, device=device)
    return bias_arguments(relative_bias, positions_q, positions_k)


def bias_arguments(
    relative_bias: RelativePositionBias | None, positions_q: Tensor | None, positions_k: Tensor | None
) -> BiasArguments:
    """The bias as the ops take it. Only the bias reads positions."""
    if relative_bias is None:
        return _NO_BIAS
    return BiasArguments(
        relative_bias.table, relative_bias.bidirectional, relative_bias.max_distance, positions_q, positions_k
    )


def check_v(v: Tensor, k: Tensor) -> None:
    if isinstance(v, Tensor) and v.shape == k.shape and v.dtype == k.dtype and v.device == k.device:
        return
    check_tensor("v", v)
    if v.dim() == 3 and v.shape[:2] == k.shape[:2] and v.shape[2] != k.shape[2]:
        raise ValueError(
            f"v: head_dim must be that of q and k, {k.shape[2]}, got {v.shape[2]}: pad the smaller ones with zeros, "
            "give the scale of the unpadded q, and cut the output"
        )
    check_tensor("v", v, shape=k.shape, dtypes=[k.dtype], device=k.device)


def checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    return float(check_range("scale", scale, -_LARGEST_FLOAT, _LARGEST_FLOAT))


def check_query_mask(name: str, mask: Tensor | None, q: Tensor) -> None:
    if mask is not None:
        check_tensor(name, mask, shape=[q.shape[0]], dtypes=[torch.bool], device=q.device)
