"""What a user would run instead of `packed_attention`, each written at its best.

A peer is a function that prepares an `AttentionProblem` in the layout that it needs and returns what solves it there.
What a model has anyway is prepared, and is not timed: a padded model's q, k and v are padded already, and its mask is
built once per batch, so padding and masks cost these peers nothing. What changes in every step, such as T5's bias with
its gradient, is part of the solution.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward

from stamp_kernels.profiling.peers.availability import PeerUnavailableError


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Self-attention over sequences of different lengths, the problem that every implementation solves.

    Attributes:
        q, k, v: `[T, H, D]`, the sequences end to end.
        lengths: the number of tokens of each sequence, T in total.
        causal: key j is visible to query i iff j <= i.
        scale: factor on q k^T. None: 1/sqrt(D).
        bias_table: `[num_buckets, H]`, T5's relative-position bias, bidirectional unless causal; or None.
        max_distance: of the bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]
    causal: bool = False
    scale: float | None = None
    bias_table: Tensor | None = None
    max_distance: int = 128

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 `[B + 1]`."""
        return torch.tensor([0, *self.lengths], device="cpu").cumsum(0).to(self.q.device, torch.int32)

    @cached_property
    def valid(self) -> Tensor:
        """bool `[B, S]`: True for tokens, False for the padding on the right."""
        device = self.q.device
        return torch.arange(self.max_seqlen, device=device) < torch.tensor(self.lengths, device=device)[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """`[T, ...]` as `[B, S, ...]`, zeros on padding."""
        padded = x.new_zeros(*self.valid.shape, *x.shape[1:])
        padded[self.valid] = x
        return padded

    def leaves(self, *, padded: bool) -> tuple[Tensor, ...]:
        """q, k, v and the bias table if there is one: new leaves that require a gradient."""
        rows = [self.pad(x) if padded else x for x in (self.q.detach(), self.k.detach(), self.v.detach())]
        tables = [] if self.bias_table is None else [self.bias_table.detach()]
        return tuple(x.clone().requires_grad_() for x in (*rows, *tables))

    def additive_mask(self) -> Tensor:
        """`[B, 1, 1 or S, S]` in q's dtype: 0 for visible keys, else the smallest number, as in the base model."""
        visible = self.valid[:, None, None, :]
        if self.causal:
            visible = visible & _causal_order(self.max_seqlen, self.q.device)
        return self.q.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(self.q.dtype).min)

    def relative_position_bucket(self, relative_position: Tensor) -> Tensor:
        """The base model's buckets of distances, key minus query."""
        assert self.bias_table is not None
        buckets: Tensor = T5Attention._relative_position_bucket(
            relative_position,
            bidirectional=not self.causal,
            num_buckets=self.bias_table.shape[0],
            max_distance=self.max_distance,
        )
        return buckets


@dataclass(frozen=True, eq=False)
class PreparedAttention:
    """An `AttentionProblem` in the layout of one implementation.

    Attributes:
        attend: called with `inputs`, returns the output in their layout (`centrality_...`: output and centrality).
        inputs: leaves that require a gradient: q, k, v and, if there is one, the bias table.
        padded: True: the rows are `[B, S, H, D]`, as a model's projections return them. False: `[T, H, D]`.
    """

    attend: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    padded: bool


def padded_eager(problem: AttentionProblem) -> PreparedAttention:
    """Hugging Face T5's own eager attention, which keeps its maps for the backward pass."""
    mask = problem.additive_mask()
    scale = _scale(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        return _base_model_eager(problem, q, k, v, mask, scale, bias_table)[0]

    return PreparedAttention(attend, problem.leaves(padded=True), padded=True)


def padded_sdpa(problem: AttentionProblem) -> PreparedAttention:
    """`scaled_dot_product_attention` with the batch's mask; a bias is added to it, as Hugging Face's SDPA path does."""
    mask = problem.additive_mask()

    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        attn_mask = mask if bias_table is None else _position_bias(problem, bias_table) + mask
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=problem.scale).transpose(1, 2)

    return PreparedAttention(attend, problem.leaves(padded=True), padded=True)


def sdpa_loop(problem: AttentionProblem) -> PreparedAttention:
    """`scaled_dot_product_attention` on one sequence after another, without a mask.

    It uses `split` and `cat`, since each slice would fill a full-size gradient. For the same reason a sequence's bias
    is not a slice of the full map: it is a strided view of the row with the bias of every distance.
    """
    lengths = problem.lengths
    longest = problem.max_seqlen
    distances = torch.arange(1 - longest, longest, device=problem.q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        masks: list[Tensor | None] = [None] * len(lengths)
        if bias_table is not None:
            bias = F.embedding(problem.relative_position_bucket(distances), bias_table).t().contiguous()  # [H, 2S - 1]
            masks = [_bias_of_distances(bias[:, longest - n : longest + n - 1], n, problem.causal) for n in lengths]
        outs = []
        sequences = zip(_split(q, lengths), _split(k, lengths), _split(v, lengths), masks, strict=True)
        for q_n, k_n, v_n, mask in sequences:
            is_causal = problem.causal and mask is None
            out = F.scaled_dot_product_attention(
                q_n, k_n, v_n, attn_mask=mask, is_causal=is_causal, scale=problem.scale
            )
            outs.append(out.transpose(1, 2))
        return torch.cat(outs, dim=1)[0]

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def nested_sdpa(problem: AttentionProblem) -> PreparedAttention:
    """`scaled_dot_product_attention` on nested tensors of jagged layout, which takes no mask.

    Empty sequences are left out, because torch does not run its fused kernels with them.
    """
    _refuse_bias("nested SDPA", problem)
    if problem.causal and problem.q.device.type == "cpu":
        raise PeerUnavailableError("nested SDPA has no causal order on a CPU")
    lengths = [n for n in problem.lengths if n > 0]
    offsets = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(problem.q.device)
    shortest, longest = min(lengths), max(lengths)

    def nested(x: Tensor) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
        return jagged.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            nested(q), nested(k), nested(v), is_causal=problem.causal, scale=problem.scale
        )
        return out.transpose(1, 2).values()

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def varlen(problem: AttentionProblem) -> PreparedAttention:
    """torch's own packed attention: FlashAttention-2 in fp16 and bf16 on a GPU, without a bias."""
    _refuse_bias("varlen_attn", problem)
    varlen_attn, _ = _import_varlen(problem)
    cu_seqlens, longest = problem.cu_seqlens, problem.max_seqlen
    window_size = (-1, 0) if problem.causal else (-1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=problem.scale, window_size=window_size
        )
        return out

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def flex(problem: AttentionProblem) -> PreparedAttention:
    """`flex_attention` with a document mask and the bias in its score function; compiled on a GPU.

    The mask is built once per batch, so it is not timed. On a CPU this runs uncompiled and has no backward pass.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total, longest = problem.q.device, len(problem.q), problem.max_seqlen
    causal, scale = problem.causal, problem.scale
    sequence = torch.repeat_interleave(torch.tensor(problem.lengths, device="cpu")).to(device, torch.int32)

    def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_sequence = sequence[i] == sequence[j]
        return same_sequence & (i >= j) if causal else same_sequence

    block_mask = create_block_mask(is_visible, None, None, total, total, device, _compile=device.type == "cuda")
    buckets = None
    if problem.bias_table is not None:
        buckets = problem.relative_position_bucket(torch.arange(1 - longest, longest, device=device))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        score_mod = None
        if bias_table is not None and buckets is not None:

            def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                distance = (j - i).clamp(1 - longest, longest - 1)  # pairs that the mask hides get here too
                return score + bias_table[buckets[distance + longest - 1], h]

            score_mod = add_bias
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        out = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
        return out.transpose(1, 2)[0]

    if device.type == "cuda":
        torch.compiler.reset()  # every problem is compiled, and torch keeps only a few versions of a function
        attend = torch.compile(attend, fullgraph=True, dynamic=False)
    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def turbo_t5(problem: AttentionProblem) -> PreparedAttention:
    """TurboT5's packed attention with T5's bias, whose gradient it sums with atomics.

    It is called as its users call it: a loop on the CPU reads every sequence's length from the device, three times a
    step.
    """
    if problem.bias_table is None:
        raise PeerUnavailableError("TurboT5 is only compared with a bias")
    if problem.q.device.type != "cuda":
        raise PeerUnavailableError("TurboT5 needs a GPU")
    spec = importlib.util.find_spec("turbot5")
    if spec is None or not spec.submodule_search_locations:
        raise PeerUnavailableError("turbot5 is not installed")
    # Only the file of the kernels: the package imports parts of transformers that version 5 no longer has.
    path = Path(spec.submodule_search_locations[0]) / "ops" / "varlen_fused_bias_attn.py"
    file_spec = importlib.util.spec_from_file_location("turbot5_varlen", path)
    assert file_spec is not None and file_spec.loader is not None
    turbo = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(turbo)
    cu_seqlens, longest = problem.cu_seqlens, problem.max_seqlen

    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor) -> Tensor:
        out: Tensor = turbo.flash_attention_with_fusing_bias_varlen(
            q, k, v, bias_table, cu_seqlens, cu_seqlens, longest, longest,
            causal=problem.causal, sm_scale=_scale(problem),
            NUM_BUCKETS=len(bias_table), MAX_DISTANCE=problem.max_distance,
        )  # fmt: skip
        return out

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def centrality_eager(problem: AttentionProblem) -> PreparedAttention:
    """Column sums of the eager attention map, `[B, S]`, as the padded trainers take them, but over valid queries."""
    mask = problem.additive_mask()
    scale = _scale(problem)
    queries_that_count = problem.valid[:, None, None, :].to(problem.q.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, weights = _base_model_eager(problem, q, k, v, mask, scale, bias_table)
        return out, (queries_that_count @ weights).sum((1, 2))

    return PreparedAttention(attend, problem.leaves(padded=True), padded=True)


def centrality_by_second_attention(problem: AttentionProblem) -> PreparedAttention:
    """Column sums, `[T]`, from any attention that returns its lse, by a second attention with q and k exchanged.

    `log sum_i exp(s_ij - lse_i)` is the lse of key j as a query that attends to the queries as keys, if each score has
    lse_i subtracted. Further columns of the exchanged k, which hold -lse_i and meet ones in the exchanged q, do that.
    The attention is `varlen_attn` on a GPU and torch's CPU kernel, one sequence after another, on a CPU.
    """
    _refuse_bias("the second attention", problem)
    if problem.causal:
        raise PeerUnavailableError("the second attention has no mask for an exchanged causal order")
    scale = _scale(problem)
    attend_with_lse = _varlen_with_lse(problem) if problem.q.device.type == "cuda" else _loop_with_lse(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend_with_lse(q, k, v)
        rest = lse.t() / scale  # [T, H]
        parts: list[Tensor] = []
        for _ in range(3):  # three parts hold 24 bits even in bf16
            parts.append(rest.to(q.dtype))
            rest = rest - parts[-1].to(lse.dtype)
        columns = F.pad(torch.stack(parts, dim=-1), (0, 5))  # the head dimension stays a multiple of 8
        ones = F.pad(q.new_ones(3), (0, 5)).expand_as(columns)
        exchanged_q, exchanged_k = torch.cat([k, ones], dim=-1), torch.cat([q, -columns], dim=-1)
        _, log_sums = attend_with_lse(exchanged_q, exchanged_k, exchanged_k)
        return out, log_sums.exp().sum(0)

    return PreparedAttention(attend, problem.leaves(padded=False), padded=False)


def _causal_order(n: int, device: torch.device) -> Tensor:
    """bool `[n, n]`: which keys each query sees."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def _scale(problem: AttentionProblem) -> float:
    return problem.q.shape[-1] ** -0.5 if problem.scale is None else problem.scale


def _refuse_bias(name: str, problem: AttentionProblem) -> None:
    if problem.bias_table is not None:
        raise PeerUnavailableError(f"{name} has no relative-position bias")


def _position_bias(problem: AttentionProblem, bias_table: Tensor) -> Tensor:
    """`[1, H, S, S]`, computed as in the base model's compute_bias."""
    position = torch.arange(problem.max_seqlen, device=bias_table.device)
    buckets = problem.relative_position_bucket(position[None, :] - position[:, None])
    return F.embedding(buckets, bias_table).permute(2, 0, 1)[None]


def _base_model_eager(
    problem: AttentionProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    bias_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The base model's eager attention: output `[B, S, H, D]` and map `[B, H, S, S]`, without dropout."""
    position_bias = None if bias_table is None else _position_bias(problem, bias_table)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    without_dropout = torch.nn.Identity().eval()  # the function only reads whether its module is in training
    out, weights = eager_attention_forward(without_dropout, q, k, v, mask, scaling=scale, position_bias=position_bias)
    return out, weights


def _split(x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`[T, H, D]` as one `[1, H, n, D]` for each sequence."""
    sequences: tuple[Tensor, ...] = x[None].transpose(1, 2).split(lengths, dim=2)
    return sequences


def _bias_of_distances(bias: Tensor, n: int, causal: bool) -> Tensor:
    """`[1, H, n, n]` from the bias of the distances 1 - n to n - 1, `[H, 2n - 1]`."""
    mask = bias.unfold(1, n, 1).flip(1)[None] if n > 0 else bias[None, :, None, :0]
    if causal:
        mask = mask.masked_fill(~_causal_order(n, bias.device), -torch.inf)
    return mask


def _import_varlen(problem: AttentionProblem) -> tuple[Callable[..., Any], type]:
    """The function `varlen_attn`, and the class `AuxRequest` that asks it for the lse."""
    if problem.q.device.type != "cuda":
        raise PeerUnavailableError("varlen_attn needs a GPU")
    if problem.q.dtype not in (torch.float16, torch.bfloat16):
        raise PeerUnavailableError(f"varlen_attn needs fp16 or bf16, got {problem.q.dtype}")
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError as error:
        raise PeerUnavailableError(f"this torch has no varlen_attn: {error}") from error
    return varlen_attn, AuxRequest


def _varlen_with_lse(problem: AttentionProblem) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    varlen_attn, aux_request = _import_varlen(problem)
    lengths = (problem.cu_seqlens, problem.cu_seqlens, problem.max_seqlen, problem.max_seqlen)
    options = dict(scale=_scale(problem), return_aux=aux_request(lse=True))
    return lambda q, k, v: varlen_attn(q, k, v, *lengths, **options)  # lse [H, T], unlike its docstring says


def _loop_with_lse(problem: AttentionProblem) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        sequences = zip(*(_split(x, lengths) for x in (q, k, v)), strict=True)
        outs, lses = zip(*(kernel(*rows, scale=scale) for rows in sequences), strict=True)
        return torch.cat([out.transpose(1, 2) for out in outs], dim=1)[0], torch.cat(lses, dim=-1)[0]

    lengths = tuple(n for n in problem.lengths if n > 0)  # the kernel refuses empty sequences
    scale = _scale(problem)
    return attend
