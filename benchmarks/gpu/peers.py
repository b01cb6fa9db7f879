"""The peers of stamp_kernels.profiling on the inputs of the timed workloads.

A peer gets the workload's inputs and brings them into its own layout before the timing starts. No peer has dropout. For
all peers, every target of a cross-entropy is valid.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import SkipError
from device import Device
from torch import Tensor
from workloads import KEEP_RATIO, Attention, CrossEntropy, Gather, Prune, Workload

from stamp_kernels.profiling.peers import attention as attention_peers
from stamp_kernels.profiling.peers import cross_entropy as cross_entropy_peers
from stamp_kernels.profiling.peers.attention import AttentionProblem, PreparedAttention
from stamp_kernels.profiling.peers.cross_entropy import CrossEntropyProblem
from stamp_kernels.profiling.peers.pruning import num_kept, sort_within_sequences

Inputs = dict[str, Tensor]

# One padded attention map. The peers hold several of them, and larger ones would take seconds.
MAX_MAP_BYTES = 4 * 2**30
# The logit, its softmax and the gradients of both, all in 16 bits, and as much again for temporaries.
BYTES_PER_LOGIT = 16


class Steps(NamedTuple):
    """The timed functions. `both` is forward and backward, None if there is no backward."""

    forward: Callable[[], object]
    both: Callable[[], object] | None


Peer = Callable[[Inputs], Steps]


def ours(workload: Workload) -> Peer:
    def prepare(x: Inputs) -> Steps:
        return Steps(lambda: workload.forward(x), (lambda: workload.run(x)) if workload.leaves else None)

    return prepare


def peers_of(workload: Workload, device: Device) -> dict[str, Peer]:
    """Peers by name. A peer raises SkipError if it would not fit into memory."""
    if isinstance(workload, Attention):
        return _attention_peers(workload)
    if isinstance(workload, CrossEntropy):
        return {"full logits": lambda x: _cross_entropy(workload, device, x)}
    if isinstance(workload, Gather):
        return {"index_select": _index_select, "copy": lambda x: _copy(workload, x)}
    if isinstance(workload, Prune):
        return {"sort, index_select": lambda x: _sorted_prune(workload, x)}
    return {}


def _with_backward(loss_or_out: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor | None) -> Steps:
    """The steps of a function of `inputs`, which need gradients."""

    def forward() -> object:
        with torch.no_grad():
            return loss_or_out(*inputs)

    return Steps(forward, lambda: torch.autograd.grad(loss_or_out(*inputs), inputs, grad))


# Attention


def _attention_peers(workload: Attention) -> dict[str, Peer]:
    """Peers for self-attention without positions; they support nothing else."""
    if workload.lengths_q is not None or workload.positions:
        return {}

    def peer(prepare: Callable[[AttentionProblem], PreparedAttention]) -> Peer:
        return lambda x: _attention(workload, prepare, x)

    if workload.centrality != "no":
        return {"padded eager": peer(attention_peers.centrality_eager)}
    if workload.bias:
        return {"padded SDPA": peer(attention_peers.padded_sdpa), "padded eager": peer(attention_peers.padded_eager)}
    return {"varlen_attn": peer(attention_peers.varlen)}


def _attention(workload: Attention, prepare: Callable[[AttentionProblem], PreparedAttention], x: Inputs) -> Steps:
    if workload.bias:
        map_bytes = len(workload.lengths) * workload.num_heads * max(workload.lengths) ** 2 * x["q"].element_size()
        if map_bytes > MAX_MAP_BYTES:
            raise SkipError(f"a padded map takes {map_bytes / 2**30:.1f} GiB")
    problem = AttentionProblem(
        x["q"], x["k"], x["v"], workload.lengths, workload.causal, scale=1.0 if workload.bias else None,
        bias_table=x["bias_table"].to(x["q"].dtype) if workload.bias else None,
    )  # fmt: skip
    prepared = prepare(problem)

    def attend(*inputs: Tensor) -> Tensor:
        result = prepared.attend(*inputs)
        # A peer with centrality returns a tuple; the centrality has no gradient.
        return result[0] if isinstance(result, tuple) else result

    grad = problem.pad(x["grad"]) if prepared.padded else x["grad"]
    return _with_backward(attend, prepared.inputs, grad)


# Cross-entropy


def _cross_entropy(workload: CrossEntropy, device: Device, x: Inputs) -> Steps:
    num_bytes = BYTES_PER_LOGIT * workload.num_softmaxes * workload.rows * workload.num_classes
    free = device.free_memory()
    if num_bytes > free:
        raise SkipError(f"the logits would take {num_bytes / 2**30:.0f} GiB of {free / 2**30:.0f} GiB")
    first_class = workload.num_classes * torch.arange(workload.steps, device=x["targets"].device) * workload.codebooks
    targets = torch.where(x["targets"] < 0, first_class, x["targets"])
    sizes = (workload.num_classes,) * workload.steps if workload.codebooks else None
    problem = CrossEntropyProblem(x["hidden"], x["weight"], targets, sizes)
    return _with_backward(cross_entropy_peers.full_logits(problem), problem.leaves(), None)


# Pruning


def _index_select(x: Inputs) -> Steps:
    leaf = x["x"].detach().requires_grad_()
    return _with_backward(lambda rows: rows.index_select(0, x["indices"]), (leaf,), x["grad"])


def _copy(workload: Gather, x: Inputs) -> Steps:
    """Copies as many contiguous rows: the difference is the cost of the index."""
    return Steps(lambda: x["x"][: workload.num_kept].clone(), None)


def _sorted_prune(workload: Prune, x: Inputs) -> Steps:
    device = x["hidden"].device
    lengths = torch.tensor(workload.lengths)
    kept = torch.tensor([num_kept(n, KEEP_RATIO) for n in workload.lengths])
    total_kept = int(kept.sum())
    sequence, kept = torch.repeat_interleave(lengths).to(device), kept.to(device)
    cu_seqlens = x["cu_seqlens"].long()

    def prune(hidden: Tensor) -> Tensor:
        importance = hidden.detach().abs().sum(-1, dtype=torch.float32) * x["centrality"]
        indices = sort_within_sequences(importance, sequence, cu_seqlens, kept, total_kept).indices
        x["labels"].index_select(0, indices)
        return hidden.index_select(0, indices)

    return _with_backward(prune, (x["hidden"].detach().requires_grad_(),), x["grad"])
