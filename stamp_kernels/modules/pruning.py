"""Semantic Adaptive Pruning: a trunk's block hands its hidden states in and gets the shorter sequences back."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stamp_kernels.ops._checks import check_choice, check_range, check_tensor
from stamp_kernels.ops.importance import token_importance
from stamp_kernels.ops.selection import gather_tokens, select_tokens
from stamp_kernels.packed import PackedSequence
from stamp_kernels.reference._contents import contents_are_checked
from stamp_kernels.reference.selection import TokenSelection, keep_ratio_to_q32, kept_lengths


class PrunedSequence(NamedTuple):
    """What `SemanticAdaptivePruning` returns.

    Attributes:
        packed: the kept tokens.
        selection: which tokens they are, for `gather_tokens` of labels and whatever else belongs to a token. None where
            nothing was pruned (evaluation with prune_in_eval=False).
    """

    packed: PackedSequence
    selection: TokenSelection | None


class SemanticAdaptivePruning(nn.Module):
    """SAP: keep the most important tokens of every sequence, in their original order (arXiv 2604.05329).

    Scores every token by `||h_i|| * centrality_i`, keeps the best `max(min_keep, ceil(keep_ratio * n))` of each
    sequence's n unprotected tokens and all protected ones, and gathers their hidden states. It has no parameters, the
    scores get no gradient, and nothing syncs with the host. A model calls one after the block where it prunes; the
    later blocks run on the shorter sequences:

        out = packed_attention(q, k, v, packed.cu_seqlens, packed.max_seqlen, return_centrality=True)
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
        item_length: tokens per item, for unit="item". Every sequence must be whole items.

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
        item_length: int | None = None,
    ) -> None:
        super().__init__()
        check_range("keep_ratio", keep_ratio, 0.0, 1.0)
        check_choice("norm", norm, ("l1", "l2"))
        check_choice("positions", positions, ("original", "compact"))
        check_choice("normalize", normalize, ("none", "visible_queries"))
        check_range("min_keep", min_keep, 0)
        check_choice("unit", unit, ("token", "item"))
        if (unit == "item") != (item_length is not None):
            raise ValueError(f'item_length goes with unit="item", got unit={unit!r} and item_length={item_length}')
        if item_length is not None:
            check_range("item_length", item_length, 1)
        self.keep_ratio = keep_ratio
        self.norm = norm
        self.positions = positions
        self.normalize = normalize
        self.prune_in_eval = prune_in_eval
        self.min_keep = min_keep
        self.unit = unit
        self.item_length = item_length

    @property
    def is_active(self) -> bool:
        """Whether forward prunes: in training, and in evaluation unless prune_in_eval=False."""
        return self.training or self.prune_in_eval

    def forward(
        self,
        packed: PackedSequence,
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
        importance = token_importance(
            packed.values, centrality, packed.cu_seqlens, norm=self.norm, normalize=self.normalize
        )
        budget = {
            "keep_ratio": self.keep_ratio,
            "min_keep": self.min_keep,
            "protect": protect,
            "num_protected": num_protected,
            "lengths_cpu": packed.lengths_cpu,
        }
        if self.unit == "item":
            selection = select_items(importance, packed.cu_seqlens, packed.max_seqlen, self.item_length, **budget)
        else:
            selection = select_tokens(importance, packed.cu_seqlens, packed.max_seqlen, **budget)
        if self.positions == "original":
            values, positions = gather_tokens([packed.values, packed.materialized_positions()], selection)
        else:
            values, positions = gather_tokens(packed.values, selection), None
        pruned = dataclasses.replace(
            packed,
            values=values,
            cu_seqlens=selection.cu_seqlens,
            max_seqlen=selection.max_seqlen,
            positions=positions,
            lengths_cpu=self._kept_lengths_on_host(packed, selection, protect, num_protected),
        )
        return PrunedSequence(pruned, selection)

    def _kept_lengths_on_host(
        self,
        packed: PackedSequence,
        selection: TokenSelection,
        protect: Tensor | None,
        num_protected: int | Tensor | None,
    ) -> Tensor | None:
        if torch.compiler.is_compiling():  # sizes cannot depend on them there
            return None
        if packed.lengths_cpu is not None and (protect is None or isinstance(num_protected, Tensor)):
            item_length = 1 if self.item_length is None else self.item_length
            kept_items = kept_lengths(
                packed.lengths_cpu.to(torch.int64) // item_length,
                0 if num_protected is None else num_protected,
                ratio_q32=keep_ratio_to_q32(self.keep_ratio),
                keep_count=None,
                keep_counts=None,
                min_keep=self.min_keep,
            )
            return kept_items * item_length
        return selection.cu_seqlens.diff() if selection.cu_seqlens.device.type == "cpu" else None

    def extra_repr(self) -> str:
        unit = self.unit if self.item_length is None else f"{self.unit}, item_length={self.item_length}"
        return (
            f"keep_ratio={self.keep_ratio}, norm={self.norm}, positions={self.positions}, normalize={self.normalize}, "
            f"prune_in_eval={self.prune_in_eval}, min_keep={self.min_keep}, unit={unit}"
        )


def select_items(
    importance: Tensor,  # [T] floating
    cu_seqlens: Tensor,  # [B + 1] int32
    max_seqlen: int,
    item_length: int,
    *,
    protect: Tensor | None = None,  # [T] bool
    lengths_cpu: Tensor | None = None,  # [B] integers on the CPU
    **budget: float | int | Tensor | None,
) -> TokenSelection:
    """`select_tokens` of whole items: arguments and result are of tokens, except `budget`, which counts items.

    An item scores the sum of its tokens and is protected where one of them is. `budget` is keep_ratio, min_keep,
    num_protected and so on.
    """
    total = importance.shape[0]
    if protect is not None:
        check_tensor("protect", protect, shape=[total], dtypes=[torch.bool], device=importance.device)
    _check_whole_items(cu_seqlens, item_length)
    num_items = total // item_length  # what is left over is less than an item, so tail rows
    shape, left_over = (num_items, item_length), total - num_items * item_length
    in_items = slice(0, num_items * item_length)
    items = select_tokens(
        importance[in_items].unflatten(0, shape).sum(1),
        cu_seqlens // item_length,
        max_seqlen // item_length,
        protect=None if protect is None else protect[in_items].unflatten(0, shape).any(1),
        lengths_cpu=None if lengths_cpu is None else lengths_cpu // item_length,
        **budget,
    )
    return TokenSelection(
        indices=_rows_of_items(items.indices, item_length),
        cu_seqlens=items.cu_seqlens * item_length,
        max_seqlen=items.max_seqlen * item_length,
        inverse=nn.functional.pad(_rows_of_items(items.inverse, item_length), (0, left_over), value=-1),
        total_source=total,
    )


def _rows_of_items(item_map: Tensor, item_length: int) -> Tensor:
    """Item numbers (or -1) `[N]` to the numbers of their tokens (or -1) `[N * item_length]`."""
    item = item_map.unsqueeze(1)
    token = item * item_length + torch.arange(item_length, device=item_map.device, dtype=item_map.dtype)
    return torch.where(item < 0, -1, token).flatten()


def _check_whole_items(cu_seqlens: Tensor, item_length: int) -> None:
    if contents_are_checked(cu_seqlens.device):
        lengths = cu_seqlens.diff()
        broken = lengths[lengths % item_length != 0]
        if broken.numel() > 0:
            raise RuntimeError(
                f'unit="item": every sequence must be whole items of item_length {item_length} tokens, got a sequence '
                f"of {int(broken[0])}"
            )
