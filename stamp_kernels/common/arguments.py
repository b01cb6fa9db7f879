"""Arguments that belong together, as references and launchers take them.

The schema of an op lists its arguments one by one. `define_op` collects those that follow one another under the names
of such a group, so the fields here are the schemas' names.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Sequences(NamedTuple):
    """Where the sequences of queries and keys are in the packed rows.

    Attributes:
        cu_seqlens_q: int32 `[B + 1]`, offsets of the query sequences.
        cu_seqlens_k: int32 `[B + 1]`, offsets of the key sequences. None: self-attention, keys have the offsets and
            the positions of the queries.
        max_seqlen_q, max_seqlen_k: the longest query and key sequence, or upper bounds.
        tiles_q, tiles_k: the tile lists of both, int32 `[N, 2]`. None: there is none; tiles_k None in self-attention:
            that of the queries.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    tiles_q: Tensor | None
    tiles_k: Tensor | None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def offsets_of_keys(self) -> Tensor:
        """int32 `[B + 1]`: cu_seqlens_k, or cu_seqlens_q in self-attention."""
        return self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k


class BiasArguments(NamedTuple):
    """T5's relative-position bias.

    Attributes:
        bias_table: `[num_buckets, Hq]`. None: no bias.
        bias_bidirectional, bias_max_distance: see `RelativePositionBias`.
        positions_q, positions_k: int32 `[Tq]` and `[Tk]`, original positions. None: 0, 1, ... in each sequence;
            positions_k None in self-attention: positions_q.
    """

    bias_table: Tensor | None
    bias_bidirectional: bool
    bias_max_distance: int
    positions_q: Tensor | None
    positions_k: Tensor | None


class DropoutArguments(NamedTuple):
    """Dropout of attention weights with probability `dropout_p`, drawn from `dropout_seed`, int64 `[1]` or None."""

    dropout_p: float
    dropout_seed: Tensor | None


class AttentionNeeds(NamedTuple):
    """Which gradients the backward of attention computes."""

    need_dq: bool
    need_dk: bool
    need_dv: bool
    need_dbias: bool


class BudgetArguments(NamedTuple):
    """How many items of each sequence stay; exactly one of the first three is given.

    Attributes:
        ratio_q32: the keep ratio in units of 2**-32, see `common.budget`.
        keep_count: the budget of every sequence.
        keep_counts: `[B]`, the budget of each sequence.
        min_keep: the smallest budget.
        protect: bool `[T]`, tokens that always stay.
        codes_per_item: tokens of an item, which stay or go together.
        total_kept: T', rows of the result. None: as many as the sequences keep (on the CPU only).
    """

    ratio_q32: int | None
    keep_count: int | None
    keep_counts: Tensor | None
    min_keep: int
    protect: Tensor | None
    codes_per_item: int
    total_kept: int | None


class StepWeights(NamedTuple):
    """The weight of each prediction step, as floats or as a tensor `[K]`; both None: all 1."""

    step_weights: Sequence[float] | None
    step_weights_tensor: Tensor | None


class LossOptions(NamedTuple):
    """Options of the cross-entropy, see `multi_token_cross_entropy`; vocab_ranges is flat: start, end, start, ..."""

    vocab_ranges: Sequence[int] | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None


class LossNeeds(NamedTuple):
    """Which gradients the backward of the cross-entropy computes."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool


def with_keys(sequences: Sequences, bias: BiasArguments) -> tuple[Sequences, BiasArguments]:
    """The same arguments with what self-attention leaves out: the keys' offsets, positions and tiles."""
    if sequences.cu_seqlens_k is not None:
        return sequences, bias
    cu_seqlens, _, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k = sequences
    sequences = Sequences(
        cu_seqlens, cu_seqlens, max_seqlen_q, max_seqlen_k, tiles_q, tiles_q if tiles_k is None else tiles_k
    )
    if bias.positions_k is None and bias.positions_q is not None:
        bias = bias._replace(positions_k=bias.positions_q)
    return sequences, bias
