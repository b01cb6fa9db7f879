"""Checks of tensor contents: always on the CPU, under STAMP_KERNELS_CHECK=1 on other devices, where they cost a sync.

Each raises a RuntimeError that names the argument, what it holds and what is allowed.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from stamp_kernels.common.arguments import Sequences
from stamp_kernels.common.tiles import tile_list


def contents_are_checked(device: torch.device) -> bool:
    if torch.compiler.is_compiling():  # contents are unknown during tracing; an op checks them when it runs
        return False
    return device.type == "cpu" or os.environ.get("STAMP_KERNELS_CHECK") == "1"


def check_cu_seqlens_contents(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> None:
    """`cu_seqlens` starts at 0, never decreases, ends at or before `total`, and no sequence exceeds `max_seqlen`."""
    if not contents_are_checked(cu_seqlens.device):
        return
    offsets = cu_seqlens.cpu()
    lengths = offsets.diff()
    if offsets[0] != 0:
        raise RuntimeError(f"{name}[0] must be 0, got {offsets[0]}")
    if bool((lengths < 0).any()):
        i = int((lengths < 0).nonzero()[0])
        raise RuntimeError(f"{name} must never decrease, got {offsets[i]} then {offsets[i + 1]} at index {i}")
    if max_seqlen is not None and bool((lengths > max_seqlen).any()):
        i = int((lengths > max_seqlen).nonzero()[0])
        raise RuntimeError(f"{name}: sequence {i} has length {lengths[i]}, more than the given max_seqlen {max_seqlen}")
    if offsets[-1] > total:
        raise RuntimeError(f"{name}[-1] must be at most the number of rows {total}, got {offsets[-1]}")


def check_sequences_contents(sequences: Sequences, total_q: int, total_k: int) -> None:
    """The offsets, as `check_cu_seqlens_contents` checks them, and the tile lists made from them."""
    if not contents_are_checked(sequences.cu_seqlens_q.device):
        return
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k = sequences
    check_cu_seqlens_contents("cu_seqlens_q", cu_seqlens_q, total_q, max_seqlen_q)
    if cu_seqlens_k is not None:
        check_cu_seqlens_contents("cu_seqlens_k", cu_seqlens_k, total_k, max_seqlen_k)
    for name, tiles, cu_seqlens, total in (
        ("q", tiles_q, cu_seqlens_q, total_q),
        ("k", tiles_k, sequences.offsets_of_keys, total_k),
    ):
        if tiles is not None and not torch.equal(tiles, tile_list(cu_seqlens, total)):
            raise RuntimeError(f"tiles_{name} must be tile_list(cu_seqlens_{name}, {total}), got that of other offsets")


def check_whole_items(cu_seqlens: Tensor, codes_per_item: int) -> None:
    """Every sequence is a multiple of `codes_per_item` tokens (RuntimeError), where contents are checked."""
    if codes_per_item == 1 or not contents_are_checked(cu_seqlens.device):
        return
    lengths = cu_seqlens.diff()
    broken = lengths[lengths % codes_per_item != 0]
    if broken.numel() > 0:
        raise RuntimeError(
            f"every sequence must be whole items of codes_per_item {codes_per_item} tokens, got a sequence of "
            f"{int(broken[0])}"
        )


def check_keep_counts(keep_counts: Tensor) -> None:
    """No sequence's budget is negative."""
    if contents_are_checked(keep_counts.device) and bool((keep_counts < 0).any()):
        raise RuntimeError(f"keep_count must not be negative, got {int(keep_counts.min())}")


def check_targets_contents(targets: Tensor, ranges: Sequence[tuple[int, int]], ignore_index: int) -> None:
    """Every target is ignore_index or in its step's range."""
    if not contents_are_checked(targets.device):
        return
    for k, (start, end) in enumerate(ranges):
        column = targets[:, k]
        outside = (column != ignore_index) & ((column < start) | (column >= end))
        if bool(outside.any()):
            row = int(outside.to(torch.uint8).argmax())
            raise RuntimeError(
                f"targets[{row}, {k}] is {int(column[row])}, "
                f"which is neither in the range [{start}, {end}) of step {k} nor ignore_index ({ignore_index})"
            )
