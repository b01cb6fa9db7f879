"""Semantic Adaptive Pruning: a trunk's block hands its hidden states in and gets the shorter sequences back."""

import dataclasses
from typing import NamedTuple

from torch import Tensor, nn

from stamp_kernels.ops._checks import check_choice, check_count, check_range
from stamp_kernels.ops.pruning.prune import prune
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.packed import PackedBatch


class PrunedSequence(NamedTuple):
    """What `SemanticAdaptivePruning` returns.

    Attributes:
        packed: the kept tokens.
        selection: which tokens they are, for `gather_tokens` of labels and whatever else belongs to a token. None where
            nothing was pruned (evaluation with prune_in_eval=False).
    """

    packed: PackedBatch
    selection: TokenSelection | None


class SemanticAdaptivePruning(nn.Module):
    """SAP: keep the most important tokens of every sequence, in their original order (arXiv 2604.05329).

    Scores every token by `||h_i|| * centrality_i`, keeps the best `max(min_keep, ceil(keep_ratio * n))` of each
    sequence's n unprotected tokens and all protected ones, and gathers their hidden states. It has no parameters, the
    scores get no gradient, and nothing syncs with the host. A model calls one after the block where it prunes; the
    later blocks run on the shorter sequences:

        out = packed_attention(q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, return_centrality=True)
        ...  # the rest of the block makes packed.values
        packed, selection = prune(packed, out.centrality)
        targets = gather_tokens(targets, selection)

    Args:
        keep_ratio: share of tokens that stays, in [0, 1].
        norm: of the hidden states, `"l1"` or `"l2"`.
        positions: `"original"` keeps every token's index in its original sequence, so that position biases and rotary
            embeddings see the true distances; `"compact"` counts the kept tokens anew.
        normalize: `"visible_queries"` corrects the scores of causal attention, see `token_importance`; `"none"`.
        prune_in_eval: whether to prune in evaluation too.
        min_keep: how many unprotected tokens (items) of a sequence stay at least.
        unit: `"token"`; or `"item"` to keep or drop the tokens of an item together. An item then scores the sum of its
            tokens, it is protected where one of its tokens is, and keep_ratio and min_keep count items.
        codes_per_item: tokens per item, for unit="item". Every sequence must be whole items.
        budget: `"sequence"` takes keep_ratio of each sequence's own length; `"max_seqlen"` of the batch's max_seqlen,
            as padded implementations do, so that published settings can be reproduced.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        keep_ratio: float,
        *,
        norm: str = "l1",
        positions: str = "original",
        normalize: str = "none",
        prune_in_eval: bool = True,
        min_keep: int = 1,
        unit: str = "token",
        codes_per_item: int | None = None,
        budget: str = "sequence",
    ) -> None:
        super().__init__()
        check_range("keep_ratio", keep_ratio, 0.0, 1.0)
        check_choice("norm", norm, ("l1", "l2"))
        check_choice("positions", positions, ("original", "compact"))
        check_choice("normalize", normalize, ("none", "visible_queries"))
        check_count("min_keep", min_keep)
        check_choice("unit", unit, ("token", "item"))
        check_choice("budget", budget, ("sequence", "max_seqlen"))
        if (unit == "item") != (codes_per_item is not None):
            raise ValueError(
                f'codes_per_item goes with unit="item", got unit={unit!r} and codes_per_item={codes_per_item}'
            )
        if codes_per_item is not None:
            check_count("codes_per_item", codes_per_item, minimum=1)
        self.keep_ratio = keep_ratio
        self.norm = norm
        self.positions = positions
        self.normalize = normalize
        self.prune_in_eval = prune_in_eval
        self.min_keep = min_keep
        self.unit = unit
        self.codes_per_item = codes_per_item
        self.budget = budget

    @property
    def is_active(self) -> bool:
        """Whether forward prunes: in training, and in evaluation unless prune_in_eval=False."""
        return self.training or self.prune_in_eval

    def forward(
        self,
        packed: PackedBatch,
        centrality: Tensor,  # [T] fp32 or fp64
        *,
        protect: Tensor | None = None,  # [T] bool
        num_protected: int | Tensor | None = None,
    ) -> PrunedSequence:
        """Prune `packed`, whose values `[T, D]` are the block's hidden states.

        Args:
            packed: the batch. With lengths_cpu the result has no tail rows.
            centrality: `[T]`, the attention that each token receives in the block.
            protect: bool `[T]`, tokens that always stay and stand outside the budget.
            num_protected: what is known on the host of the protected tokens (items, for unit="item"): their total, or
                `[B]` numbers on the CPU. On a GPU the result of a batch with protect has T rows without it.

        Returns:
            PrunedSequence. Its lengths_cpu is set where the kept lengths are known on the host.

        Raises:
            ValueError: an argument has a wrong shape, dtype, device or value.
            RuntimeError: contents are wrong, see `select_tokens`, or a sequence is not whole items (on the CPU, or
                under STAMP_KERNELS_CHECK=1).
        """
        if not self.is_active:
            return PrunedSequence(packed, None)
        kept = prune(
            packed.values,
            centrality,
            packed.cu_seqlens,
            packed.max_seqlen,
            positions=packed.positions,
            norm=self.norm,
            normalize=self.normalize,
            keep_ratio=self.keep_ratio,
            min_keep=self.min_keep,
            protect=protect,
            lengths_cpu=packed.lengths_cpu,
            num_protected=num_protected,
            budget=self.budget,
            codes_per_item=1 if self.codes_per_item is None else self.codes_per_item,
        )
        pruned = dataclasses.replace(
            packed,
            values=kept.x,
            cu_seqlens=kept.selection.cu_seqlens,
            max_seqlen=kept.selection.max_seqlen,
            positions=kept.positions if self.positions == "original" else None,
            lengths_cpu=kept.lengths_cpu,
        )
        return PrunedSequence(pruned, kept.selection)

    def extra_repr(self) -> str:
        unit = self.unit if self.codes_per_item is None else f"{self.unit}, codes_per_item={self.codes_per_item}"
        return (
            f"keep_ratio={self.keep_ratio}, norm={self.norm}, positions={self.positions}, normalize={self.normalize}, "
            f"prune_in_eval={self.prune_in_eval}, min_keep={self.min_keep}, unit={unit}, budget={self.budget}"
        )
