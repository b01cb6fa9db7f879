"""tile_list against a list made sequence by sequence, and what holds for every op."""

import pytest
import torch
from attention_cases import refusals
from ragged import BATCHES, RaggedBatch

from stamp_kernels import tile_list

OP = torch.ops.stamp.tile_list.default
LONG = RaggedBatch((64, 0, 300, 65, 1, 128, 129, 300), tail=200)


@pytest.mark.core
@pytest.mark.parametrize("batch", [*BATCHES.values(), LONG], ids=[*BATCHES, "long"])
def test_all_tiles_longest_sequences_first(backend, batch):
    by_number = sorted(range(batch.num_sequences), key=lambda i: -batch.lengths[i] // 64)
    tiles = [[i, start] for i in by_number for start in range(0, batch.lengths[i], 64)]
    got = tile_list(batch.cu_seqlens, batch.total)
    assert got.dtype == torch.int32
    assert got.tolist() == tiles + [[-1, -1]] * (batch.total // 64 + batch.num_sequences - len(tiles))


def test_opcheck():
    torch.library.opcheck(OP, (LONG.cu_seqlens, LONG.total))


@refusals(
    [
        (dict(cu_seqlens=[0, 3]), "cu_seqlens must be a tensor, got list"),
        (
            dict(cu_seqlens=torch.tensor([0.0, 3.0])),
            "cu_seqlens must have dtype torch.int32, torch.int64, got torch.float32",
        ),
        (dict(total=-1), r"total must be in \[0, inf\), got -1"),
        (dict(total=2**31), r"total must be in \[0, 2147483647\], got 2147483648"),
        (dict(total=3.0), r"total must be an int \(not a tensor\), got float"),
    ]
)
def test_bad_arguments(backend, changed, message):
    with pytest.raises(ValueError, match=message):
        tile_list(**(dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), total=3) | changed))


def test_bad_contents(backend):
    with pytest.raises(RuntimeError, match=r"cu_seqlens\[-1\] must be at most the number of rows 2, got 3"):
        tile_list(torch.tensor([0, 3], dtype=torch.int32), 2)
