"""Multi-step Auxiliary Prediction: heads on a trunk's hidden states that predict several future tokens or items."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.rows import is_tail_row
from stamp_kernels.modules._arguments import as_tuple
from stamp_kernels.ops._checks import (
    FLOATING_DTYPES,
    check_choice,
    check_count,
    check_int,
    check_range,
    check_tensor,
    check_vocab_ranges,
    checked_cu_seqlens,
)
from stamp_kernels.ops.attention.packed_attention import packed_attention
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import MultiTokenLoss, multi_token_cross_entropy
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection

__all__ = ["LinearDecay", "LinearHead", "MultiStepPrediction", "ResidualHead", "TransformerHead"]


class LinearDecay(NamedTuple):
    """A lambda that goes linearly from `start` to `end` over `steps` training steps and then stays at `end`."""

    start: float
    end: float
    steps: int

    def __call__(self, training_step: int) -> float:
        return self.start + (self.end - self.start) * min(training_step / max(self.steps, 1), 1.0)


class LinearHead(nn.Linear):
    """A linear map, initialized to the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size)

    def reset_parameters(self) -> None:
        # eye_ makes its result on the default device, and then refuses a weight on another one.
        with self.weight.device:
            nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        return super().forward(input)


class ResidualHead(nn.Module):
    """`x + SiLU(W x + b)` (Medusa, arXiv 2401.10774), initialized to the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        return hidden + F.silu(self.linear(hidden))


class TransformerHead(nn.Module):
    """A pre-norm transformer block (Gloeckle et al. 2024) within each packed sequence, initialized to the identity.

    It adds no position encoding: the trunk's states already carry the positions.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.causal = causal
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attention_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp_in = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.mlp_out = nn.Linear(4 * hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.attention_norm, self.query_key_value, self.mlp_norm, self.mlp_in):
            module.reset_parameters()
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        qkv = self.query_key_value(self.attention_norm(hidden))
        q, k, v = qkv.unflatten(1, (3, self.num_attention_heads, -1)).unbind(1)
        attended = packed_attention(q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, causal=self.causal)
        hidden = hidden + self.attention_out(attended.flatten(1))
        return hidden + self.mlp_out(F.silu(self.mlp_in(self.mlp_norm(hidden))))


def _checked_weights(step_weights: Sequence[float], num_steps: int) -> tuple[float, ...]:
    weights = as_tuple("step_weights", step_weights, "numbers")
    if len(weights) != num_steps:
        raise ValueError(f"step_weights must have one weight for each of the {num_steps} steps, got {step_weights}")
    return tuple(float(check_range(f"step_weights[{i}]", weight, 0.0)) for i, weight in enumerate(weights))


def _checked_ranges(vocab_ranges: Sequence[tuple[int, int]], num_ranges: int) -> tuple[tuple[int, int], ...]:
    ranges = check_vocab_ranges(vocab_ranges)
    if len(ranges) != num_ranges:
        raise ValueError(
            f"vocab_ranges must have num_steps * codes_per_item = {num_ranges} pairs (start, end), got {len(ranges)}"
        )
    return ranges


_Head: TypeAlias = LinearHead | ResidualHead | TransformerHead


class MultiStepPrediction(nn.Module):
    """MAP: the auxiliary loss `lambda * sum_k w_k CE(step k)` over K future tokens or items (arXiv 2604.05329).

    Every step has its own head on the trunk's hidden states, and all steps share one unembedding. The caller adds the
    loss to the model's own next-token loss. The module is for training only: in evaluation forward runs no head and
    returns 0, and a deployed model leaves it out.

    A decoder-only model predicts tokens past the next one. The first column of targets belongs to the main loss:

        >>> hidden, unembedding = torch.randn(7, 64), torch.randn(768, 64)
        >>> tokens, cu_seqlens = torch.randint(768, (7,)), torch.tensor([0, 4, 7], dtype=torch.int32)
        >>> prediction = MultiStepPrediction(64, num_steps=2, head="residual")
        >>> targets = shift_targets(tokens, cu_seqlens, steps=1 + 2)
        >>> loss = multi_token_cross_entropy(hidden, unembedding, targets[:, :1])
        >>> loss = loss + prediction(hidden, targets[:, 1:], unembedding=unembedding)

    With items of L codes it can instead predict the same code as the next token's, 1, 2, ... items further on:

        >>> items = shift_targets(targets[:, 0], cu_seqlens, steps=2, stride=3)
        >>> loss = loss + prediction(hidden, items, unembedding=unembedding)

    If the sequences are pruned, the targets are pruned with them. A pruned token emits no loss, and a kept one keeps
    its true targets:

        >>> prune, centrality = SemanticAdaptivePruning(1 / 3), torch.rand(7)
        >>> packed, _, kept_targets = prune(PackedBatch(hidden, cu_seqlens, 4), centrality, targets=targets)
        >>> loss = prediction(packed.values, kept_targets[:, 1:], unembedding=unembedding)

    An encoder-decoder over semantic IDs of L codes has L decoder states per user, one for each code of the next item.
    The head of step k turns the state of code h into a prediction of code h of the item k further on. With
    codes_per_item=L each item is L consecutive rows, and vocab_ranges gives each (step, level) the slice of the
    vocabulary that is its codebook:

        >>> codebooks = [(0, 256), (256, 512), (512, 768)]
        >>> prediction = MultiStepPrediction(64, num_steps=2, codes_per_item=3, vocab_ranges=codebooks * 2)
        >>> states = torch.randn(8, 3, 64)  # [users, codes_per_item, D]
        >>> codes = torch.randint(256, (8, 3, 2)) + torch.tensor([0, 256, 512]).view(3, 1)  # [users, 3, steps]
        >>> codes[0, :, 1] = -100  # user 0 has no second item after the next
        >>> loss = prediction(states.flatten(0, 1), codes.flatten(0, 1), unembedding=unembedding)

    Args:
        hidden_size: D, width of the hidden states.
        num_steps: K, the number of auxiliary steps.
        head: see LinearHead, ResidualHead and TransformerHead. Each is initialized to the identity, so that training
            starts from the trunk's own states.
        vocab_size: rows of the module's own unembedding. None: forward is given the model's (tied) unembedding.
        step_weights: w_k, K floats. None: all 1.
        lambda_: a float, or a function of the training step such as LinearDecay(0.3, 0.1, 10_000).
        codes_per_item: L, how many consecutive rows make an item. The loss of a step is the mean of its levels' losses.
            If sequences are pruned, whole items must be kept: `SemanticAdaptivePruning(codes_per_item=...)`.
        vocab_ranges: K * codes_per_item pairs (start, end), one for each (step, level), the levels of step 1 first.
            None: the whole vocabulary for all.
        num_attention_heads: for head="transformer". The head dimension must be a multiple of 8.
        causal: for head="transformer": a row attends only to itself and to earlier rows of its sequence.
        label_smoothing, softcap, ignore_index: as in `multi_token_cross_entropy`.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        hidden_size: int,
        num_steps: int,
        *,
        head: Literal["linear", "residual", "transformer"] = "residual",
        vocab_size: int | None = None,
        step_weights: Sequence[float] | None = None,
        lambda_: float | LinearDecay | Callable[[int], float] = 0.3,
        codes_per_item: int = 1,
        vocab_ranges: Sequence[tuple[int, int]] | None = None,
        num_attention_heads: int | None = None,
        causal: bool = True,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.hidden_size = check_count("hidden_size", hidden_size, 1)
        self.num_steps = check_count("num_steps", num_steps, 1)
        self.codes_per_item = check_count("codes_per_item", codes_per_item, 1)
        check_choice("head", head, ("linear", "residual", "transformer"))
        self.head = head
        if (head == "transformer") != (num_attention_heads is not None):
            raise ValueError(
                f'num_attention_heads goes with head="transformer", got head={head!r} and '
                f"num_attention_heads={num_attention_heads}"
            )
        if num_attention_heads is not None:
            num_attention_heads = check_count("num_attention_heads", num_attention_heads, 1)
            if hidden_size % (8 * num_attention_heads) != 0:
                raise ValueError(
                    f"num_attention_heads must divide hidden_size {hidden_size} into multiples of 8, "
                    f"got {num_attention_heads}"
                )
        self.step_weights = None if step_weights is None else _checked_weights(step_weights, self.num_steps)
        self.lambda_ = lambda_ if callable(lambda_) else float(check_range("lambda_", lambda_, 0.0))
        self.vocab_ranges = (
            None if vocab_ranges is None else _checked_ranges(vocab_ranges, self.num_steps * self.codes_per_item)
        )
        self.label_smoothing = check_range("label_smoothing", label_smoothing, 0.0, 1.0)
        self.softcap = None if softcap is None else check_range("softcap", softcap, 0.0)
        self.ignore_index = check_int("ignore_index", ignore_index)

        self.heads = nn.ModuleList(self._new_head(head, num_attention_heads, causal) for _ in range(num_steps))
        if vocab_size is not None:
            vocab_size = check_count("vocab_size", vocab_size, 1)
        self.unembedding = None if vocab_size is None else nn.Parameter(torch.empty(vocab_size, self.hidden_size))
        self.reset_parameters()

    def _new_head(self, kind: str, num_attention_heads: int | None, causal: bool) -> _Head:
        if kind == "linear":
            return LinearHead(self.hidden_size)
        if num_attention_heads is None:
            return ResidualHead(self.hidden_size)
        return TransformerHead(self.hidden_size, num_attention_heads, causal)

    def reset_parameters(self) -> None:
        for head in self.heads:
            cast(_Head, head).reset_parameters()
        if self.unembedding is not None:
            nn.init.normal_(self.unembedding, std=self.hidden_size**-0.5)

    @overload
    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        unembedding: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        item_rows: TokenSelection | None = None,
        target_counts: Tensor | None = None,
        training_step: int | None = None,
        return_step_losses: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        unembedding: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        item_rows: TokenSelection | None = None,
        target_counts: Tensor | None = None,
        training_step: int | None = None,
        return_step_losses: Literal[True],
    ) -> MultiTokenLoss: ...

    def forward(
        self,
        hidden: Tensor,  # [N, D]
        targets: Tensor,  # [N, K] int64
        *,
        unembedding: Tensor | None = None,  # [V, D]
        bias: Tensor | None = None,  # [V]
        cu_seqlens: Tensor | None = None,  # [B + 1] int32 or int64
        max_seqlen: int | None = None,
        item_rows: TokenSelection | None = None,
        target_counts: Tensor | None = None,  # [K, L]
        training_step: int | None = None,
        return_step_losses: bool = False,
    ) -> Tensor | MultiTokenLoss:
        """The auxiliary loss of a batch; 0 in evaluation.

        Args:
            hidden: `[N, D]`, the trunk's last hidden states. N = items * codes_per_item, the rows of an item together.
                Rows without a target are not read and may hold NaN. With head="transformer", whose rows attend to each
                other, that holds only for tail rows.
            targets: int64 `[N, K]`, what step k predicts from each row, or ignore_index. See `shift_targets`, and for
                pruned sequences `SemanticAdaptivePruning`. Without cu_seqlens tail rows must have ignore_index.
            unembedding: `[V, D]`, the model's. Only if the module has none of its own (vocab_size).
            bias: added to the logits, as in `multi_token_cross_entropy`.
            cu_seqlens: int32 or int64 `[B + 1]`, offsets of the packed sequences. The targets of tail rows (those from
                `cu_seqlens[-1]` on) are then ignored.
            max_seqlen: the longest length, or an upper bound. head="transformer" needs both.
            item_rows: for hidden states that are not whole items, such as those of packed positions of which some are
                hidden or belong to no item: the selection that gathers the rows of the items, M rows with index -1 for
                a code that has none. targets are then `[M, K]`, ignore_index on those. None: all rows, in their order.
            target_counts: how many valid targets each (step, level) has in a larger batch that this one is a part of
                (several ranks, or accumulated steps). The losses are then sums over this part divided by these counts,
                so that the losses of all parts add up to the loss of the whole batch. None: this batch is the whole.
            training_step: the argument of lambda_ where that is a function. torch.compile does not recompile for it.
            return_step_losses: return MultiTokenLoss(loss, step_losses `[K]`). The step losses are means over this
                batch, detached, without step_weights and lambda.

        Returns:
            A scalar, fp32 (fp64 for fp64 hidden states), or MultiTokenLoss.

        Raises:
            ValueError: an argument has a wrong shape, dtype, device or value, is missing, or is not allowed here.
            RuntimeError: contents are wrong, see `multi_token_cross_entropy` and `packed_attention`.
        """
        check_tensor("hidden", hidden, shape=["N", self.hidden_size], dtypes=FLOATING_DTYPES)
        num_rows = hidden.shape[0]
        num_codes = num_rows
        if item_rows is not None:
            num_codes = item_rows.indices.shape[0]
            check_tensor("item_rows.inverse", item_rows.inverse, shape=[num_rows], device=hidden.device)
        check_tensor("targets", targets, shape=[num_codes, self.num_steps], dtypes=[torch.int64], device=hidden.device)
        if num_codes % self.codes_per_item != 0:
            raise ValueError(
                f"{'hidden' if item_rows is None else 'item_rows'} must have rows for whole items of "
                f"{self.codes_per_item} codes, got {num_codes} rows"
            )
        weight = unembedding if self.unembedding is None else self.unembedding
        if weight is None or (unembedding is not None and self.unembedding is not None):
            raise ValueError(
                "exactly one of the argument unembedding and the module's own (vocab_size) must exist, got "
                + ("neither" if weight is None else "both")
            )
        if self.head == "transformer" and (cu_seqlens is None or max_seqlen is None):
            raise ValueError('head="transformer" needs cu_seqlens and max_seqlen')
        if cu_seqlens is not None:
            cu_seqlens = checked_cu_seqlens("cu_seqlens", cu_seqlens, hidden.device)
            max_seqlen = None if max_seqlen is None else check_count("max_seqlen", max_seqlen)
        if callable(self.lambda_) and training_step is None:
            raise ValueError("training_step must be given if lambda_ is a function of it, got None")
        if not self.training:
            dtype = compute_dtype(hidden.dtype)
            zero = torch.zeros((), dtype=dtype, device=hidden.device)
            return MultiTokenLoss(zero, zero.new_zeros(self.num_steps)) if return_step_losses else zero

        # An index of -1, for a code without a row or a row without a code, finds the entry that is added.
        if cu_seqlens is not None:
            check_cu_seqlens_contents("cu_seqlens", cu_seqlens, num_rows, max_seqlen)
            is_tail = is_tail_row(cu_seqlens, num_rows)
            is_tail_target = is_tail if item_rows is None else F.pad(is_tail, (0, 1), value=True)[item_rows.indices]
            targets = targets.masked_fill(is_tail_target[:, None], self.ignore_index)
        # In the gradients of the heads' weights, a row of NaN times its gradient of 0 would be NaN.
        if self.head == "transformer":
            never_read = is_tail
        else:
            never_read = (targets == self.ignore_index).all(1)
            if item_rows is not None:
                never_read = F.pad(never_read, (0, 1), value=True)[item_rows.inverse]
        hidden = hidden.masked_fill(never_read[:, None], 0.0)
        # Every (step, level) is one step of the cross-entropy, whose rows are the items.
        items_and_levels = (num_codes // self.codes_per_item, self.codes_per_item)
        by_step = [head(hidden, cu_seqlens, max_seqlen) for head in self.heads]
        if item_rows is not None:
            by_step = gather_tokens(by_step, item_rows)
        states = torch.cat([x.unflatten(0, items_and_levels).transpose(0, 1) for x in by_step])  # [K * L, items, D]
        targets = targets.unflatten(0, items_and_levels).transpose(1, 2).flatten(1)  # [items, K * L]
        step_weights = (1.0,) * self.num_steps if self.step_weights is None else self.step_weights
        weights: list[float] | Tensor  # of the K * L steps of the cross-entropy
        if target_counts is None:
            weights = [weight / self.codes_per_item for weight in step_weights for _ in range(self.codes_per_item)]
        else:
            check_tensor("target_counts", target_counts, shape=[self.num_steps, self.codes_per_item])
            counts = (targets != self.ignore_index).sum(0).to(compute_dtype(hidden.dtype))
            shares = counts.view_as(target_counts) / (self.codes_per_item * target_counts.clamp(min=1))
            # Step by step, because copying a tensor of all weights to a GPU would wait for the GPU.
            weights = torch.cat([weight * share for weight, share in zip(step_weights, shares, strict=True)])
        loss, step_losses = multi_token_cross_entropy(
            states,
            weight,
            targets,
            bias=bias,
            step_weights=weights,
            vocab_ranges=self.vocab_ranges,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            return_step_losses=True,
        )
        lambda_ = self.lambda_(cast(int, training_step)) if callable(self.lambda_) else self.lambda_
        loss = lambda_ * loss
        if not return_step_losses:
            return loss
        return MultiTokenLoss(loss, step_losses.unflatten(0, (self.num_steps, self.codes_per_item)).mean(1))

    def extra_repr(self) -> str:
        unembedding = "tied" if self.unembedding is None else f"own, vocab_size={self.unembedding.shape[0]}"
        return (
            f"hidden_size={self.hidden_size}, num_steps={self.num_steps}, head={self.head}, unembedding={unembedding}, "
            f"step_weights={self.step_weights}, lambda_={self.lambda_}, codes_per_item={self.codes_per_item}"
        )
