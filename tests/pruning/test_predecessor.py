"""The padded pruning of the paper's predecessor (RASTP, arXiv 2511.16943) from our ops, and where ours differs.

The predecessor keeps k = max(1, int(S * ratio)) tokens of every row, S being the padded length, by column sums in which
padded rows count as queries. In ours only valid tokens count, and each budget comes from the sequence's own length.
Everything is in float64, so rounding decides no choice between random importances.
"""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from stamp_kernels import (
    PackedBatch,
    RelativePositionBias,
    SemanticAdaptivePruning,
    attention_centrality,
    gather_tokens,
    packed_attention,
    prune,
    select_tokens,
    token_importance,
)

pytest.importorskip("transformers", reason="the padded peers are written on Hugging Face's T5")
from transformers.models.t5.modeling_t5 import T5Attention

from stamp_kernels.profiling.peers.padded_t5 import padded_topk_prune

HEADS, HEAD_DIM, WIDTH = 3, 8, 12
NUM_BUCKETS, MAX_DISTANCE = 16, 20
# Rows longer and shorter than any budget here, a full one, a single token.
LENGTHS_OF_150 = (150, 149, 61, 51, 50, 49, 7, 1)
LENGTHS_OF_40 = (40, 29, 15, 14, 13, 12, 2, 1)


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """A T5 block's attention inputs and output states, padded on the right; padding holds values like any other row.

    Attributes:
        q, k, v: `[B, S, H, D]`.
        hidden: `[B, S, W]`, the block's output.
        lengths: int64 `[B]`.
        bias: of the attention, over the positions 0 to S - 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    lengths: Tensor
    bias: RelativePositionBias

    @property
    def padded_length(self) -> int:
        return self.hidden.shape[1]

    @property
    def mask(self) -> Tensor:
        """int64 `[B, S]`, as a tokenizer gives it."""
        return (torch.arange(self.padded_length) < self.lengths[:, None]).long()

    def pack(self, x: Tensor) -> PackedBatch:
        return PackedBatch.from_padded(x, self.mask)

    def with_more_padding(self, columns: int) -> "PaddedBatch":
        """The same tokens; new padding has states of its own, as the embedding of a padding token has."""

        def pad(x: Tensor) -> Tensor:
            return torch.cat([x, torch.randn(x.shape[0], columns, *x.shape[2:], dtype=x.dtype)], dim=1)

        padded = {name: pad(getattr(self, name)) for name in ("q", "k", "v", "hidden")}
        return dataclasses.replace(self, **padded)


def make_batch(lengths: tuple[int, ...], padded_length: int) -> PaddedBatch:
    q, k, v = torch.randn(3, len(lengths), padded_length, HEADS, HEAD_DIM, dtype=torch.float64)
    hidden = torch.randn(len(lengths), padded_length, WIDTH, dtype=torch.float64)
    table = torch.randn(NUM_BUCKETS, HEADS, dtype=torch.float64)
    bias = RelativePositionBias(table, bidirectional=True, max_distance=MAX_DISTANCE)
    # T5 does not scale its scores: its queries come out smaller.
    return PaddedBatch(q * HEAD_DIM**-0.5, k, v, hidden, torch.tensor(lengths), bias)


# The predecessor, dense


def attention_map(batch: PaddedBatch) -> Tensor:
    """`[B, H, S, S]`: padding is masked as a key, but not as a query."""
    position = torch.arange(batch.padded_length)
    buckets = T5Attention._relative_position_bucket(
        position - position[:, None], bidirectional=True, num_buckets=NUM_BUCKETS, max_distance=MAX_DISTANCE
    )
    scores = torch.einsum("bihd,bjhd->bhij", batch.q, batch.k) + batch.bias.table[buckets].permute(2, 0, 1)
    return scores.masked_fill(batch.mask[:, None, None, :] == 0, -torch.inf).softmax(-1)


def predecessor(batch: PaddedBatch, keep_ratio: float) -> tuple[Tensor, list[int]]:
    """States of the kept valid tokens `[T', W]`, and how many there are of each row."""
    hidden, mask = padded_topk_prune(batch.hidden, batch.mask, attention_map(batch), keep_ratio)
    return hidden[mask.bool()], mask.sum(1).tolist()


# The same from packed keys


def centrality_from_padded_queries(
    batch: PaddedBatch, *, op: str = "packed_attention", query_mask: Tensor | None = None
) -> Tensor:
    """`[T]`: cross attention from all S rows of each sequence, padding too, to its valid tokens.

    query_mask: bool `[B * S]`, the queries that count. None: all, as in the predecessor.
    """
    rows, length = batch.lengths.numel(), batch.padded_length
    q, k, v = batch.q.flatten(0, 1), batch.pack(batch.k), batch.pack(batch.v)
    every_row = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    lengths = (every_row, k.cu_seqlens, length, k.max_seqlen)
    options = dict(scale=1.0, relative_bias=batch.bias)
    if op == "packed_attention":
        return packed_attention(
            q, k.values, v.values, *lengths, **options, centrality_query_mask=query_mask, return_centrality=True
        ).centrality
    lse = packed_attention(q, k.values, v.values, *lengths, **options, return_lse=True).lse
    return attention_centrality(q, k.values, lse, *lengths, **options, query_mask=query_mask)


def centrality_of_valid_queries(batch: PaddedBatch) -> Tensor:
    """`[T]`: plain self-attention over the packed batch, as a packed model runs it."""
    q, k, v = (batch.pack(x) for x in (batch.q, batch.k, batch.v))
    return packed_attention(
        q.values, k.values, v.values, q.cu_seqlens, max_seqlen_q=q.max_seqlen, scale=1.0, relative_bias=batch.bias,
        return_centrality=True,
    ).centrality  # fmt: skip


def op_by_op(batch: PaddedBatch, centrality: Tensor, **budget: object) -> tuple[Tensor, list[int]]:
    """As `predecessor`, for any centrality. max_seqlen is the padded length, so a ratio may refer to it."""
    hidden = batch.pack(batch.hidden)
    importance = token_importance(hidden.values, centrality, hidden.cu_seqlens)
    selection = select_tokens(importance, hidden.cu_seqlens, batch.padded_length, **budget)
    return gather_tokens(hidden.values, selection), selection.cu_seqlens.diff().tolist()


def assert_same_tokens(got: tuple[Tensor, list[int]], want: tuple[Tensor, list[int]]) -> None:
    """Random states are all different: equal rows in equal order are the same tokens."""
    assert got[1] == want[1]
    assert torch.equal(got[0], want[0])


# What the predecessor computes


def test_predecessor_is_its_formula():
    """One row at a time, in Python: k from the padded length, all query rows in the sum, padding last."""
    batch = make_batch((12, 9, 4, 3, 1), padded_length=12)
    weights = attention_map(batch)
    assert_close(weights.sum((1, 2, 3)), torch.full((5,), 12.0 * HEADS, dtype=torch.float64))  # padded rows count
    k = max(1, int(12 * 0.4))
    want, lengths = [], []
    for hidden, weights_of_row, n in zip(batch.hidden, weights, batch.lengths.tolist(), strict=True):
        scores = [float(weights_of_row[:, :, i].sum() * hidden[i].abs().sum()) for i in range(n)]
        kept = sorted(sorted(range(n), key=lambda i: -scores[i])[:k])
        want.append(hidden[kept])
        lengths.append(len(kept))
    assert_same_tokens(predecessor(batch, 0.4), (torch.cat(want), lengths))


@pytest.mark.parametrize("op", ["packed_attention", "attention_centrality"])
def test_column_sums_with_padded_queries(backend, op):
    batch = make_batch(LENGTHS_OF_40, padded_length=40)
    want = attention_map(batch).sum((1, 2))[batch.mask.bool()]
    assert_close(centrality_from_padded_queries(batch, op=op), want)


@pytest.mark.parametrize("op", ["packed_attention", "attention_centrality"])
@pytest.mark.parametrize(
    ("lengths", "padded_length", "keep_ratio", "k"),
    [
        (LENGTHS_OF_150, 150, 1 / 3, 50),  # the published setting
        (LENGTHS_OF_150, 160, 1 / 2, 80),  # no row is full
        (LENGTHS_OF_40, 40, 3 / 8, 15),
    ],
)
def test_same_tokens_where_the_share_is_whole(backend, op, lengths, padded_length, keep_ratio, k):
    batch = make_batch(lengths, padded_length)
    want = predecessor(batch, keep_ratio)
    assert want[1] == [min(n, k) for n in lengths]  # rows of at most k tokens lose nothing
    centrality = centrality_from_padded_queries(batch, op=op)
    assert_same_tokens(op_by_op(batch, centrality, keep_ratio=keep_ratio, budget="max_seqlen"), want)
    assert_same_tokens(op_by_op(batch, centrality, keep_count=k), want)


@pytest.mark.parametrize(
    ("lengths", "padded_length", "keep_ratio", "floor", "ceiling"),
    [
        (LENGTHS_OF_40, 40, 1 / 3, 13, 14),
        (LENGTHS_OF_150, 151, 1 / 3, 50, 51),
        # A whole share, but the product of floats falls short of it: 28.999999999999996.
        ((100, 30, 29, 28), 100, 0.29, 28, 29),
    ],
)
def test_keep_count_gives_the_predecessors_floor(backend, lengths, padded_length, keep_ratio, floor, ceiling):
    batch = make_batch(lengths, padded_length)
    want = predecessor(batch, keep_ratio)
    assert want[1] == [min(n, floor) for n in lengths]
    centrality = centrality_from_padded_queries(batch)
    assert_same_tokens(op_by_op(batch, centrality, keep_count=int(padded_length * keep_ratio)), want)

    states, kept = op_by_op(batch, centrality, keep_ratio=keep_ratio, budget="max_seqlen")
    assert kept == [min(n, ceiling) for n in lengths]
    # The ceiling keeps one token more, and all that the floor keeps.
    rows, fewer_rows = (x.split(sizes) for x, sizes in ((states, kept), want))
    for more, fewer in zip(rows, fewer_rows, strict=True):
        assert {tuple(row) for row in fewer.tolist()} <= {tuple(row) for row in more.tolist()}


def test_at_least_one_token_stays(backend):
    """The predecessor's max(1, ...) is min_keep, whose default is 1."""
    batch = make_batch((2, 1), padded_length=2)
    want = predecessor(batch, 1 / 3)
    assert want[1] == [1, 1]
    centrality = centrality_from_padded_queries(batch)
    assert_same_tokens(op_by_op(batch, centrality, keep_count=int(2 / 3)), want)


def test_the_module_and_its_gradient(backend):
    """SemanticAdaptivePruning and prune with budget="max_seqlen"; states get only the gradient of the gather."""
    batch = make_batch(LENGTHS_OF_150, padded_length=150)
    batch.hidden.requires_grad_()
    states, kept = predecessor(batch, 1 / 3)
    grad = torch.randn_like(states)
    (want_grad,) = torch.autograd.grad(states, batch.hidden, grad)

    packed = dataclasses.replace(batch.pack(batch.hidden), max_seqlen=150)
    centrality = centrality_from_padded_queries(batch)
    pruned, selection, _ = SemanticAdaptivePruning(1 / 3, budget="max_seqlen")(packed, centrality)
    assert_same_tokens((pruned.values, pruned.cu_seqlens.diff().tolist()), (states, kept))
    assert torch.equal(torch.autograd.grad(pruned.values, batch.hidden, grad)[0], want_grad)
    # The predecessor drops positions; ours keep the original ones.
    column = torch.arange(150, dtype=torch.int32).repeat(len(kept), 1)[batch.mask.bool()]
    assert torch.equal(pruned.positions, column[selection.indices])

    by_op = prune(packed.values, centrality, packed.cu_seqlens, 150, keep_ratio=1 / 3, budget="max_seqlen")
    assert_same_tokens((by_op.x, by_op.selection.cu_seqlens.diff().tolist()), (states, kept))


def test_no_difference_without_padding(backend):
    """For full rows and a whole share, ours with its defaults gives the predecessor's tokens."""
    batch = make_batch((30, 30, 30), padded_length=30)
    centrality = centrality_of_valid_queries(batch)
    assert_same_tokens(op_by_op(batch, centrality, keep_ratio=1 / 3), predecessor(batch, 1 / 3))
    pruned, *_ = SemanticAdaptivePruning(1 / 3)(batch.pack(batch.hidden), centrality)
    assert_same_tokens((pruned.values, pruned.cu_seqlens.diff().tolist()), predecessor(batch, 1 / 3))


# Where ours differs


def test_padding_changes_only_the_predecessors_choice(backend):
    """k is the same with and without the additional padding, so only centrality can make a difference."""
    ratio, ratio_of_twice = 1 / 3, 1 / 6
    assert int(30 * ratio) == int(60 * ratio_of_twice) == 10
    predecessor_changes = 0
    for _ in range(5):
        batch = make_batch((30, 25, 18, 11), padded_length=30)
        more_padding = batch.with_more_padding(30)
        choice, choice_with_more = predecessor(batch, ratio), predecessor(more_padding, ratio_of_twice)
        assert choice[1] == choice_with_more[1] == [10] * 4
        predecessor_changes += not torch.equal(choice[0], choice_with_more[0])

        # Ours from the padded rows, with a mask of the valid ones as queries, and from packed rows.
        ours = op_by_op(batch, centrality_of_valid_queries(batch), keep_ratio=ratio)
        assert ours[1] == [10, 9, 6, 4]
        for padded in (batch, more_padding):
            masked = centrality_from_padded_queries(padded, query_mask=padded.mask.bool().flatten())
            assert_same_tokens(op_by_op(padded, masked, keep_ratio=ratio), ours)
            assert_same_tokens(op_by_op(padded, centrality_of_valid_queries(padded), keep_ratio=ratio), ours)
    assert predecessor_changes > 0


def test_short_rows_are_pruned_too(backend):
    """The predecessor's budget grows with the padding until nothing is pruned; ours is a share of each sequence."""
    batch = make_batch(LENGTHS_OF_40, padded_length=40)
    ours = op_by_op(batch, centrality_of_valid_queries(batch), keep_ratio=1 / 3)
    assert ours[1] == [14, 10, 5, 5, 5, 4, 1, 1]  # ceil(n / 3)
    assert predecessor(batch, 1 / 3)[1] == [13, 13, 13, 13, 13, 12, 2, 1]

    more_padding = batch.with_more_padding(80)
    assert predecessor(more_padding, 1 / 3)[1] == list(LENGTHS_OF_40)
    assert_same_tokens(op_by_op(more_padding, centrality_of_valid_queries(more_padding), keep_ratio=1 / 3), ours)
