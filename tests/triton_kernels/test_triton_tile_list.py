"""The kernel of the tile list against plain PyTorch."""

import pytest
import torch
from op_kernels import launcher, reference
from ragged import BATCHES, RaggedBatch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tail", [0, 5, 1000])
@pytest.mark.parametrize("num_sequences", [1, 64, 65, 200])
def test_matches_the_reference(num_sequences, tail):
    lengths = torch.randint(0, 4, (num_sequences,)) * 50 + 300 * (torch.arange(num_sequences) % 30 == 7)
    batch = RaggedBatch(tuple(lengths.tolist()), tail)
    got = launcher("tile_list")(batch.cu_seqlens.to(DEVICE), batch.total).cpu()
    assert torch.equal(got, reference("tile_list")(batch.cu_seqlens, batch.total))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_ragged_batches(batch):
    got = launcher("tile_list")(batch.cu_seqlens.to(DEVICE), batch.total).cpu()
    assert torch.equal(got, reference("tile_list")(batch.cu_seqlens, batch.total))
