"""Tile lists in a stamped T5, on tensors without contents: kernels for the CPU have lists of their own."""

from dataclasses import replace

import torch
from t5_cases import LENGTHS, packed_batch, padded_batch, stamped, tiny_t5
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stamp_kernels.integrations.transformers import PruningConfig


class _AttentionTiles(TorchDispatchMode):
    """The names of the ops that are called, and the tile lists that attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.forward: list[tuple[Tensor | None, Tensor | None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func._schema.name)
        if self.ops[-1] == "stamp::packed_attention_forward":
            self.forward.append(args[7:9])
        return func(*args, **(kwargs or {}))


def test_blocks_between_prunings_share_tiles():
    model = stamped(tiny_t5(), pruning=PruningConfig(schedule=[(2, 0.5)])).to("meta")
    with _AttentionTiles() as called:
        model(packed_inputs=packed_batch().to("meta"), labels=padded_batch()["labels"].to("meta"))
    assert called.ops.count("stamp::tile_list") == 3  # before and after pruning, and for the decoder
    (first, _), (second, _), (pruned, _) = called.forward[:3]
    assert first is second and first.shape == (sum(LENGTHS) // 64 + len(LENGTHS), 2)
    assert pruned.shape != first.shape
    decoder_tiles = called.forward[3:]
    assert [q for q, _ in decoder_tiles] == [None] * 6  # four tokens each
    _, (_, source), *_ = decoder_tiles
    assert source.shape == pruned.shape
    assert [k is source for _, k in decoder_tiles] == [False, True] * 3


def test_long_decoder_sequences_have_tiles():
    decoder = stamped(tiny_t5()).to("meta").decoder
    source, queries = (packed_batch().to("meta") for _ in range(2))
    source = replace(source, values=torch.zeros(sum(LENGTHS), 24, device="meta"))
    with _AttentionTiles() as called:
        decoder(packed_inputs=queries, packed_source=source)
    (self_q, _), (cross_q, cross_k) = called.forward[:2]
    assert self_q is cross_q and cross_q is not cross_k
    assert all(tiles is not None for tiles in (self_q, cross_k))
    with _AttentionTiles() as called:  # several queries of each encoded sequence have other offsets
        decoder(packed_inputs=queries, packed_source=source, cu_seqlens_cross=queries.cu_seqlens, max_seqlen_cross=200)
    assert called.forward[1][0] is None
