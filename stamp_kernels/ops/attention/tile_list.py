"""The tile list: which tile each program of attention's kernels takes, made once for many calls."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common import tiles
from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.ops._checks import check_count, check_range, check_tensor, checked_cu_seqlens
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.attention import _boundary

_INT32_MAX = 2**31 - 1


def _reference(cu_seqlens: Tensor, total: int) -> Tensor:
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total)
    return tiles.tile_list(cu_seqlens, total)


def _fake(cu_seqlens: Tensor, total: int) -> Tensor:
    return cu_seqlens.new_empty((tiles.num_listed_tiles(total, cu_seqlens.shape[0] - 1), 2))


@imported_once
def _triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.attention.tile_list import tile_list  # imports Triton

    return tile_list


_tile_list = define_op(
    "tile_list(Tensor cu_seqlens, SymInt total) -> Tensor",
    check=_boundary.check_tile_list,
    reference=_reference,
    triton=_triton,
    fake=_fake,
)


def tile_list(cu_seqlens: Tensor, total: int) -> Tensor:
    """The tiles of 64 rows of all sequences, those of the longest sequences first.

    For the arguments `tiles_q` and `tiles_k` of `packed_attention` and `attention_centrality`, whose programs on a GPU
    then look up what they would otherwise search, and the long sequences do not start last. All layers, heads and
    directions share a list. `PackedBatch.with_tiles` makes one where it pays. Nothing waits for the GPU, which compares
    all sequences with each other: that takes long only beyond 100,000 of them.

    Args:
        cu_seqlens: int32 or int64 `[B + 1]`, offsets of the sequences.
        total: T, the rows of the packed tensors.

    Returns:
        int32 `[T // 64 + B, 2]`: the sequence of each tile and the tile's first row in it; (-1, -1) in the entries that
        are left, at the end.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
        RuntimeError: cu_seqlens does not rise from 0 to at most T (on the CPU, or under STAMP_KERNELS_CHECK=1).

    Example:
        >>> tile_list(torch.tensor([0, 3, 70], dtype=torch.int32), 70)
        tensor([[ 1,  0],
                [ 1, 64],
                [ 0,  0]], dtype=torch.int32)
    """
    check_tensor("cu_seqlens", cu_seqlens)
    cu_seqlens = checked_cu_seqlens("cu_seqlens", cu_seqlens, cu_seqlens.device)
    total = check_count("total", total)
    check_range("total", total, 0, _INT32_MAX)
    make = _reference if reference_is_forced() else _tile_list
    entries: Tensor = make(cu_seqlens, total)
    return entries
