"""Semantic Adaptive Pruning: a block's hidden states go in, the shorter sequences come out."""

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stamp_kernels.common.budget import ceil_of_ratio, keep_ratio_to_q32
from stamp_kernels.common.exported import exported
from stamp_kernels.common.rows import is_tail_row
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.modules._protected_ends import ProtectedEnds
from stamp_kernels.ops._checks import check_choice, check_count, check_int, check_range, check_tensor
from stamp_kernels.ops.pruning.importance import token_importance
from stamp_kernels.ops.pruning.prune import prune
from stamp_kernels.ops.pruning.selection import TokenSelection, select_tokens
from stamp_kernels.packed import PackedBatch

__all__ = ["PrunedBatch", "SemanticAdaptivePruning"]


@exported
class PrunedBatch(NamedTuple):
    """What `SemanticAdaptivePruning` returns.

    Attributes:
        packed: the kept tokens.
        selection: which tokens were kept. Give it to `gather_tokens` with other per-token tensors. None where nothing
            was pruned (evaluation with prune_in_eval=False).
        targets: those of the kept tokens, ignore_index on tail rows. None if none were given.
    """

    packed: PackedBatch
    selection: TokenSelection | None
    targets: Tensor | None


class _Choice(NamedTuple):
    """The arguments of `prune` that say what is kept."""

    keep_ratio: float | None
    keep_count: int | None
    min_keep: int
    protect: Tensor | None
    num_protected: int | Tensor | None
    budget: Literal["sequence", "max_seqlen"] = "sequence"
    codes_per_item: int = 1


class SemanticAdaptivePruning(nn.Module):
    """SAP: keep the most important tokens of every sequence, in their original order (arXiv 2604.05329).

    The importance of a token is `||h_i|| * centrality_i`. Of each sequence's n unprotected tokens the best
    `max(min_keep, ceil(keep_ratio * n))` are kept, and all protected ones. Their hidden states are gathered. The module
    has no parameters, the importance gets no gradient, and nothing syncs with the CPU. A model calls one module after
    the block where it prunes, and its later blocks run on the shorter sequences:

        out = packed_attention(q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, return_centrality=True)
        ...  # the rest of the block makes packed.values
        packed, selection, targets = prune(packed, out.centrality, targets=targets)

    Args:
        keep_ratio: share of the tokens to keep, in [0, 1].
        norm: the norm of the hidden states.
        positions: `"original"` keeps every token's index in its original sequence, so that position biases and rotary
            embeddings see the true distances. `"compact"` renumbers the kept tokens 0, 1, 2, ...
        normalize: `"visible_queries"` corrects the importance under causal attention, see `token_importance`.
        prune_in_eval: whether to prune in evaluation too.
        min_keep: the fewest unprotected tokens (items) to keep of a sequence.
        codes_per_item: keep or drop all codes of an item together. The importance of an item is the sum over its
            tokens, an item is protected if one of its tokens is, and keep_ratio and min_keep count items. Every
            sequence must consist of whole items, apart from its ends that protect_first and protect_last keep. None:
            tokens are kept or dropped one by one.
        budget: `"sequence"` takes keep_ratio of the number of unprotected tokens (items) of each sequence.
            `"max_seqlen"` takes it of the batch's max_seqlen (of the items that fit into it), as padded implementations
            do, so that published settings can be reproduced: max_seqlen is then the padded length. That of the result
            is the padded length after pruning, whatever the CPU knows of the lengths: the largest number of tokens that
            a sequence of max_seqlen tokens may keep (with protect, max_seqlen itself).
        protect_first, protect_last: how many tokens at each end of a sequence are always kept, such as a user token in
            front or an end-of-sequence token behind. They do not count towards the budget and need not be whole items.
            Sequences that are not longer than both are kept whole.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        keep_ratio: float,
        *,
        norm: Literal["l1", "l2"] = "l1",
        positions: Literal["original", "compact"] = "original",
        normalize: Literal["none", "visible_queries"] = "none",
        prune_in_eval: bool = True,
        min_keep: int = 1,
        codes_per_item: int | None = None,
        budget: Literal["sequence", "max_seqlen"] = "sequence",
        protect_first: int = 0,
        protect_last: int = 0,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("l1", "l2"))
        check_choice("positions", positions, ("original", "compact"))
        check_choice("normalize", normalize, ("none", "visible_queries"))
        check_choice("budget", budget, ("sequence", "max_seqlen"))
        self.keep_ratio = float(check_range("keep_ratio", keep_ratio, 0.0, 1.0))
        self.norm = norm
        self.positions = positions
        self.normalize = normalize
        self.prune_in_eval = prune_in_eval
        self.min_keep = check_count("min_keep", min_keep)
        self.codes_per_item = None if codes_per_item is None else check_count("codes_per_item", codes_per_item, 1)
        self.budget = budget
        self.protected_ends = ProtectedEnds(
            check_count("protect_first", protect_first), check_count("protect_last", protect_last)
        )

    @property
    def is_active(self) -> bool:
        """Whether forward prunes: in training, and in evaluation unless prune_in_eval=False."""
        return self.training or self.prune_in_eval

    def forward(
        self,
        packed: PackedBatch,
        centrality: Tensor,  # [T] fp32 or fp64
        *,
        targets: Tensor | None = None,  # [T, ...] int64
        ignore_index: int = -100,
        protect: Tensor | None = None,  # [T] bool
        num_protected: int | Tensor | None = None,
    ) -> PrunedBatch:
        """Prune `packed`, whose values `[T, D]` are the block's hidden states.

        Args:
            packed: the batch. If it has lengths_cpu, the result has no tail rows, except under torch.compile and with
                protect but without num_protected.
            centrality: `[T]`, the attention that each token receives in the block.
            targets: int64 `[T, ...]`, what each token predicts, see `shift_targets`. A kept token keeps its targets.
            ignore_index: the targets of tail rows, which have no loss.
            protect: bool `[T]`, tokens that are always kept. They do not count towards the budget. Not for modules with
                protect_first or protect_last.
            num_protected: how many tokens (items, with codes_per_item) are protected: the total, or `[B]` numbers on
                the CPU. On a GPU a batch with protect and without num_protected gives T rows.

        Returns:
            PrunedBatch. Its lengths_cpu is set where the kept lengths are known on the CPU.

        Raises:
            ValueError: an argument has a wrong shape, dtype, device or value.
            RuntimeError: contents are wrong, see `select_tokens`, or a sequence does not consist of whole items
                between its protected ends (checked on the CPU, or under STAMP_KERNELS_CHECK=1).
        """
        check_packed("packed", packed)
        if targets is not None:
            ignore_index = check_int("ignore_index", ignore_index)
            check_tensor("targets", targets, dtypes=[torch.int64], device=packed.values.device)
            if targets.dim() == 0 or targets.shape[0] != packed.values.shape[0]:
                raise ValueError(
                    f"targets must have a row for each of the {packed.values.shape[0]} rows of packed, "
                    f"got shape {list(targets.shape)}"
                )
        if not self.is_active:
            if targets is not None:
                is_tail = is_tail_row(packed.cu_seqlens, packed.values.shape[0])
                targets = targets.masked_fill(is_tail.view(-1, *[1] * (targets.dim() - 1)), ignore_index)
            return PrunedBatch(packed, None, targets)
        chosen = _Choice(
            keep_ratio=self.keep_ratio,
            keep_count=None,
            min_keep=self.min_keep,
            protect=protect,
            num_protected=num_protected,
            budget=self.budget,
            codes_per_item=1 if self.codes_per_item is None else self.codes_per_item,
        )
        if any(self.protected_ends):
            if protect is not None:
                raise ValueError("protect goes with protect_first=0 and protect_last=0, got both")
            chosen = self._protecting_ends(packed, centrality, chosen)
        kept = prune(
            [packed.values] if targets is None else [packed.values, targets],
            centrality,
            packed.cu_seqlens,
            packed.max_seqlen,
            positions=packed.positions,
            norm=self.norm,
            normalize=self.normalize,
            keep_ratio=chosen.keep_ratio,
            keep_count=chosen.keep_count,
            min_keep=chosen.min_keep,
            protect=chosen.protect,
            lengths_cpu=packed.lengths_cpu,
            num_protected=chosen.num_protected,
            budget=chosen.budget,
            codes_per_item=chosen.codes_per_item,
            fill_value=0 if targets is None else [0, ignore_index],
        )
        max_seqlen = kept.selection.max_seqlen
        if self.budget == "max_seqlen":
            max_seqlen = packed.max_seqlen if protect is not None else self.most_kept(packed.max_seqlen)
        elif any(self.protected_ends):
            max_seqlen = torch.sym_min(max_seqlen, self.most_kept(packed.max_seqlen))
        pruned = dataclasses.replace(
            packed,
            values=kept.x[0],
            cu_seqlens=kept.selection.cu_seqlens,
            max_seqlen=max_seqlen,
            positions=kept.positions if self.positions == "original" else None,
            lengths_cpu=kept.lengths_cpu,
            tiles=None,
        )
        return PrunedBatch(pruned, kept.selection, None if targets is None else kept.x[1])

    def most_kept(self, length: int) -> int:
        """The most tokens that a sequence of up to `length` tokens may keep, without `protect`."""
        codes_per_item, ends = self.codes_per_item or 1, sum(self.protected_ends)
        counted = length if self.budget == "max_seqlen" else torch.sym_max(length - ends, 0)
        budget = ceil_of_ratio(keep_ratio_to_q32(self.keep_ratio), counted // codes_per_item)
        most: int = torch.sym_min(length, codes_per_item * torch.sym_max(self.min_keep, budget) + ends)
        return most

    def _protecting_ends(self, packed: PackedBatch, centrality: Tensor, chosen: "_Choice") -> "_Choice":
        """The choice with both ends of every sequence protected."""
        ends, num_sequences = self.protected_ends, packed.cu_seqlens.shape[0] - 1
        lengths_cpu = None if torch.compiler.is_compiling() else packed.lengths_cpu
        if chosen.codes_per_item == 1:
            num_protected = num_sequences * sum(ends) if lengths_cpu is None else lengths_cpu.clamp(max=sum(ends))
            return chosen._replace(protect=ends.mask(packed), num_protected=num_protected)

        # The kernels group tokens to items from the first token on. So the items are chosen among the tokens between
        # the ends, packed by themselves, and the chosen ones are protected, as the ends are. Nothing else is kept.
        importance = token_importance(
            packed.values, centrality, packed.cu_seqlens, norm=self.norm, normalize=self.normalize
        )
        cu_seqlens = ends.middles(packed, chosen.codes_per_item)
        selection = select_tokens(
            ends.take_middles(importance, packed, cu_seqlens),
            cu_seqlens,
            packed.max_seqlen,
            keep_ratio=self.keep_ratio,
            min_keep=self.min_keep,
            lengths_cpu=None if lengths_cpu is None else (lengths_cpu - sum(ends)).clamp(min=0),
            budget=self.budget,
            codes_per_item=self.codes_per_item,
        )
        if lengths_cpu is None:
            num_protected = num_sequences * sum(ends) + selection.indices.shape[0]  # an upper bound
        else:
            num_protected = self._kept_lengths(lengths_cpu.to(torch.int64), packed.max_seqlen)
        protect = ends.with_middles(selection.inverse >= 0, packed, cu_seqlens)
        return _Choice(keep_ratio=None, keep_count=0, min_keep=0, protect=protect, num_protected=num_protected)

    def _kept_lengths(self, lengths: Tensor, max_seqlen: int) -> Tensor:
        """int64 `[B]`: how many tokens of each sequence are kept, without `protect`."""
        codes_per_item, ends = self.codes_per_item or 1, sum(self.protected_ends)
        num_items = (lengths - ends).clamp(min=0) // codes_per_item
        counted = torch.full_like(num_items, max_seqlen // codes_per_item) if self.budget == "max_seqlen" else num_items
        budget = ceil_of_ratio(keep_ratio_to_q32(self.keep_ratio), counted).clamp(min=self.min_keep)
        return lengths.clamp(max=ends) + codes_per_item * torch.minimum(num_items, budget)

    def extra_repr(self) -> str:
        return (
            f"keep_ratio={self.keep_ratio}, norm={self.norm}, positions={self.positions}, normalize={self.normalize}, "
            f"prune_in_eval={self.prune_in_eval}, min_keep={self.min_keep}, codes_per_item={self.codes_per_item}, "
            f"budget={self.budget}, protect_first={self.protected_ends.first}, "
            f"protect_last={self.protected_ends.last}"
        )
