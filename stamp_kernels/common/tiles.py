"""The tile list of a packed batch, which attention's kernels share."""

import torch
from torch import Tensor

# Rows of a listed tile.
TILE_ROWS = 64


def num_listed_tiles(total: int, num_sequences: int) -> int:
    """Entries of a tile list: an upper bound of the number of tiles that is known from shapes alone."""
    return total // TILE_ROWS + num_sequences


def lengths_are_alike(total: int, num_sequences: int, max_seqlen: int, block: int = TILE_ROWS) -> bool:
    """Whether every sequence may get as many tiles of `block` rows as the longest.

    They are then no more than the tiles of a list or search, and a program needs neither.
    """
    return -(-max_seqlen // block) * num_sequences <= total // block + num_sequences


def tile_list(cu_seqlens: Tensor, total: int) -> Tensor:
    """The op `stamp::tile_list`, in plain PyTorch."""
    num_sequences = cu_seqlens.shape[0] - 1
    num_tiles = (cu_seqlens.diff() + TILE_ROWS - 1) // TILE_ROWS  # [B]
    order = num_tiles.argsort(descending=True, stable=True)
    index = order.repeat_interleave(num_tiles[order])  # of each tile
    first = num_tiles[order].cumsum(0) - num_tiles[order]  # place of the first tile of each sequence
    start = torch.arange(len(index), device=index.device) - first.repeat_interleave(num_tiles[order])
    entries = cu_seqlens.new_full((num_listed_tiles(total, num_sequences), 2), -1)
    entries[: len(index)] = torch.stack([index, start * TILE_ROWS], dim=1)
    return entries
