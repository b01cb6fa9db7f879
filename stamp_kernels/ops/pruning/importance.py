"""Token importance: the norm of a hidden state times the attention that its token receives."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_choice, check_tensor, checked_cu_seqlens
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.pruning import _boundary
from stamp_kernels.reference import pruning as reference

Norm = Literal["l1", "l2"]
Normalize = Literal["none", "visible_queries"]

NORM_ORDERS = {"l1": 1, "l2": 2}


def _fake(
    hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm_order: int, per_visible_query: bool
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))


@imported_once
def _triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.pruning.importance import token_importance  # imports Triton

    return token_importance


_token_importance = define_op(
    "token_importance(Tensor hidden, Tensor centrality, Tensor? cu_seqlens, int norm_order, bool per_visible_query) "
    "-> Tensor",
    check=_boundary.check_token_importance,
    reference=reference.token_importance,
    triton=_triton,
    fake=_fake,
)


def token_importance(
    hidden: Tensor,  # [T, D] floating
    centrality: Tensor,  # [T] fp32 or fp64
    cu_seqlens: Tensor | None = None,  # [B + 1] int32 or int64
    *,
    norm: Norm = "l1",
    normalize: Normalize = "none",
) -> Tensor:
    """The importance of every token: the norm of its hidden state times the attention it receives.

    `importance[i] = ||hidden[i]|| * centrality[i]` (arXiv 2604.05329, section SAP), in one pass over `hidden`. The norm
    is computed in fp32 (fp64 for fp64) for every dtype of hidden, under autocast too. Not differentiable.

    Args:
        hidden: `[T, D]`, the output of the block after which tokens are pruned.
        centrality: `[T]` in fp32 or fp64, the attention that each token receives in that block, summed over heads and
            queries: from `packed_attention(return_centrality=True)` or `attention_centrality`.
        cu_seqlens: int32 or int64 `[B + 1]` on the same device. Rows from `cu_seqlens[-1]` on are tail rows of
            importance 0. None: every row is a token.
        norm: `"l1"` or `"l2"`.
        normalize: `"none"` for the paper's sum. `"visible_queries"` divides it by the number of queries that see the
            token in causal attention, n - i for token i of the n in its packed sequence: in the plain sum early tokens
            collect more because more queries see them. Needs cu_seqlens.

    Returns:
        `[T]` in fp32; in fp64 if hidden is fp64.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens does not rise from 0 to at most T (on the CPU, or under STAMP_KERNELS_CHECK=1).
    """
    check_importance_arguments(hidden, centrality, norm, normalize)
    if cu_seqlens is not None:
        cu_seqlens = checked_cu_seqlens("cu_seqlens", cu_seqlens, hidden.device)
    elif normalize == "visible_queries":
        raise ValueError('normalize="visible_queries" counts the queries of each sequence: cu_seqlens must be given')
    compute = reference.token_importance if reference_is_forced() else _token_importance
    result: Tensor = compute(
        hidden.detach(), centrality.detach(), cu_seqlens, NORM_ORDERS[norm], normalize == "visible_queries"
    )
    return result


def check_importance_arguments(
    hidden: Tensor, centrality: Tensor, norm: str, normalize: str, name: str = "hidden"
) -> int:
    """The arguments of `token_importance` but cu_seqlens; returns T. Error messages call the hidden states `name`."""
    check_tensor(name, hidden, shape=["total", "width"], dtypes=FLOATING_DTYPES)
    total, device = hidden.shape[0], hidden.device
    check_tensor("centrality", centrality, shape=[total], dtypes=[torch.float32, torch.float64], device=device)
    check_choice("norm", norm, tuple(NORM_ORDERS))
    check_choice("normalize", normalize, ("none", "visible_queries"))
    return total
