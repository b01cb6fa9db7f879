"""PaddedQueries: padding that takes part in attention as queries, as in padded implementations that mask only keys."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stamp_kernels.common.exported import exported_dataclass
from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout, pack_padded
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.packed import PackedBatch

__all__ = ["PaddedQueries"]


@exported_dataclass()
@dataclass(frozen=True, eq=False, kw_only=True)
class PaddedQueries(PackedBatch):
    """All columns of a padded batch, as B sequences of equal lengths. In self-attention only the tokens are keys.

    So the centrality, one number for each token, adds up the attention of padding too. The states of padding reach no
    token, and get no gradient.

    Attributes:
        positions: `[B * S]`, counted from the first token of each history, so negative on padding in front of it.
        tokens: the batch without its padding. Its values are not read.
        selection: for gather_tokens, the tokens among the columns.
    """

    tokens: PackedBatch
    selection: TokenSelection

    @classmethod
    def of(cls, inputs: Tensor, tokens: PackedBatch, layout: PaddedLayout) -> "PaddedQueries":
        """The inputs `[B, S]` or `[B, S, d_model]`, whose `tokens` were packed with this layout, which has padding."""
        columns, _ = pack_padded(inputs, None)
        return cls(
            columns.values,
            columns.cu_seqlens,
            columns.max_seqlen,
            layout.positions().flatten(),
            columns.lengths_cpu,
            tokens=tokens.with_tiles(),
            selection=layout.selection_of_tokens(),
        )

    def take_tokens(self, values: Tensor) -> Tensor:
        """`[B * S, ...]`, a row for each column, to `[T, ...]`."""
        return gather_tokens(values, self.selection)

    def key_arguments(self) -> dict[str, Any]:
        """What packed_attention needs to know about the keys, beside themselves."""
        tokens = self.tokens
        return dict(
            cu_seqlens_k=tokens.cu_seqlens,
            max_seqlen_k=tokens.max_seqlen,
            positions_k=tokens.positions,
            tiles_k=tokens.tiles,
        )

    def without_padding(self) -> PackedBatch:
        return replace(self.tokens, values=self.take_tokens(self.values))
