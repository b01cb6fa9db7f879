"""What the ops that Python serves refuse at their boundary: raw calls reach the kernels with whatever anyone passes.

Each case runs on the Triton launcher and on the reference, and names the argument in its message.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_kernels import launcher, reference
from torch import Tensor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, HEADS, DIM = 9, 4, 8
CU_SEQLENS = torch.tensor([0, 4, 4, 8], dtype=torch.int32)  # one tail row

Arguments = dict[str, Any]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attention_arguments(*names: str) -> Arguments:
    every = dict(
        grad_out=zeros(T, HEADS, DIM),
        q=zeros(T, HEADS, DIM),
        k=zeros(T, 2, DIM),
        v=zeros(T, 2, DIM),
        out=zeros(T, HEADS, DIM),
        lse=zeros(HEADS, T),
        cu_seqlens=CU_SEQLENS,
        total=T,
        cu_seqlens_q=CU_SEQLENS,
        cu_seqlens_k=CU_SEQLENS.clone(),
        max_seqlen_q=4,
        max_seqlen_k=4,
        tiles_q=torch.tensor([[0, 0], [2, 0], [-1, -1]], dtype=torch.int32),
        tiles_k=torch.tensor([[0, 0], [2, 0], [-1, -1]], dtype=torch.int32),
        causal=False,
        scale=1.0,
        bias_table=zeros(8, HEADS),
        bias_bidirectional=True,
        bias_max_distance=12,
        positions_q=torch.arange(T, dtype=torch.int32),
        positions_k=torch.arange(T, dtype=torch.int32),
        centrality_query_mask=torch.ones(T, dtype=torch.bool),
        query_mask=torch.ones(T, dtype=torch.bool),
        dropout_p=0.5,
        dropout_seed=torch.tensor([7]),
        return_centrality=True,
        **{f"need_{name}": True for name in ("dq", "dk", "dv", "dbias")},
    )
    return {name: every[name] for name in names}


def cross_entropy_arguments(*names: str) -> Arguments:
    every = dict(
        grad_loss=torch.ones(()),
        hidden=zeros(T, DIM),
        weight=zeros(11, DIM),
        targets=torch.full((T, 2), 3),
        bias=zeros(11),
        lse=zeros(2, T),
        step_scale=zeros(2),
        step_weights=None,
        step_weights_tensor=torch.ones(2),
        vocab_ranges=[0, 7, 2, 11],
        ignore_index=-100,
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=30.0,
        reduction=1,
        need_hidden=True,
        need_weight=True,
        need_bias=True,
    )
    return {name: every[name] for name in names}


def pruning_arguments(*names: str) -> Arguments:
    every = dict(
        x=[zeros(T, DIM), torch.arange(T)],
        hidden=zeros(T, DIM),
        importance=zeros(T),
        centrality=zeros(T),
        positions=torch.arange(T, dtype=torch.int32),
        cu_seqlens=CU_SEQLENS,
        max_seqlen=4,
        norm_order=1,
        per_visible_query=True,
        ratio_q32=None,
        keep_count=None,
        keep_counts=torch.tensor([1, 2, 0]),
        min_keep=1,
        protect=torch.zeros(T, dtype=torch.bool),
        codes_per_item=1,
        total_kept=T,
        indices=torch.tensor([0, 3, -1]),
        grad=[zeros(3, DIM)],
        inverse=torch.tensor([0, -1, -1, 1, -1, -1, -1, -1, -1], dtype=torch.int32),
        labels=torch.arange(T),
        steps=2,
        stride=1,
        ignore_index=-100,
    )
    return {name: every[name] for name in names}


OPS: dict[str, Callable[..., Arguments]] = {
    **dict.fromkeys(
        ("packed_attention_forward", "packed_attention_backward", "attention_centrality", "tile_list"),
        attention_arguments,
    ),
    **{f"multi_token_cross_entropy_{x}": cross_entropy_arguments for x in ("forward", "backward", "with_gradients")},
    **dict.fromkeys(
        (
            "token_importance", "select_tokens", "prune", "gather_tokens_forward", "gather_tokens_backward",
            "shift_targets",
        ),
        pruning_arguments,
    ),
}  # fmt: skip


def names_of(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.stamp, op).default._schema.arguments]


def on_device(x: Any) -> Any:
    if isinstance(x, list):
        return [on_device(y) for y in x]
    return x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x


def call(kernel: Callable[..., Any], op: str, **changed: Any) -> Any:
    arguments = OPS[op](*names_of(op))
    assert not changed.keys() - arguments.keys()
    return kernel(op)(*map(on_device, (arguments | changed).values()))


def changed_tensors(op: str, change: Callable[[Tensor], Tensor]) -> list[tuple[str, Arguments]]:
    """(name, changed argument) for every tensor of an op's arguments."""
    changed = []
    for name, x in OPS[op](*names_of(op)).items():
        if isinstance(x, Tensor):
            changed.append((name, {name: change(on_device(x))}))
        elif isinstance(x, list) and isinstance(x[0], Tensor):
            changed.append((name, {name: [change(on_device(x[0])), *x[1:]]}))
    return changed


def without_memory(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def with_half_the_memory(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes // 2)
    return x


every_kernel = pytest.mark.parametrize("kernel", [launcher, reference])
every_op = pytest.mark.parametrize("op", OPS)


@every_kernel
@every_op
def test_right_arguments_pass(kernel, op):
    call(kernel, op)


def test_every_op_is_here():
    """But for internal ones, which begin with an underscore."""
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert {name for name in schemas if re.match("stamp::[^_]", name)} == {f"stamp::{name}" for name in OPS}


@every_kernel
@every_op
@pytest.mark.parametrize("change", [without_memory, with_half_the_memory])
def test_storage_that_is_gone(kernel, op, change):
    """FSDP frees parameters by resizing their storage."""
    for name, changed in changed_tensors(op, change):
        with pytest.raises(RuntimeError, match=rf"^{name}(\[0\])? must have memory for shape .*resized or freed"):
            call(kernel, op, **changed)


@every_kernel
@every_op
def test_memory_of_a_view_that_is_gone(kernel, op):
    """The end of the storage, not its start, decides for a view with an offset or strides."""

    def end_is_gone(x: Tensor) -> Tensor:
        memory = torch.zeros(2 * x.numel() + 1, dtype=x.dtype, device=x.device)
        view = memory[1:].view(*x.shape, 2)[..., 0]
        memory.untyped_storage().resize_(2 * x.nbytes - x.itemsize)
        return view

    for name, changed in changed_tensors(op, end_is_gone):
        with pytest.raises(RuntimeError, match=rf"^{name}(\[0\])? must have memory for shape"):
            call(kernel, op, **changed)


@every_kernel
@every_op
def test_wrong_dtypes(kernel, op):
    for name, changed in changed_tensors(op, lambda x: x.to(torch.complex64)):
        if name in ("x", "grad") and op.startswith("gather"):
            continue  # of any dtype
        with pytest.raises(RuntimeError, match=rf"^{name}(\[0\])? must have dtype .*, got complex64"):
            call(kernel, op, **changed)


@every_kernel
@every_op
def test_wrong_ranks(kernel, op):
    for name, changed in changed_tensors(op, lambda x: x[None]):
        if name in ("x", "grad") and op.startswith("gather"):
            continue  # of any rank
        with pytest.raises(RuntimeError, match=r"must have (shape|tensors with the same number of rows)"):
            call(kernel, op, **changed)


@every_kernel
@every_op
def test_tensors_on_another_device(kernel, op):
    for _, changed in changed_tensors(op, lambda x: x.to("meta")):
        if op.startswith("gather") or len(changed_tensors(op, torch.clone)) > 1:
            with pytest.raises(RuntimeError, match=r" on (cpu|meta|cuda:0), got "):
                call(kernel, op, **changed)


_ATTENTION = ("packed_attention_forward", "packed_attention_backward", "attention_centrality")
_WITH_DROPOUT = _ATTENTION[:2]
_LOSSES = tuple(f"multi_token_cross_entropy_{part}" for part in ("forward", "backward", "with_gradients"))
_FORWARD_LOSSES = (_LOSSES[0], _LOSSES[2])
_BACKWARD_LOSS = (_LOSSES[1],)
_SELECTIONS = ("select_tokens", "prune")
_EMPTY = torch.zeros(0, dtype=torch.int32)
_FLOATING = "float32, float16, bfloat16, float64"
_RANGES = "vocab_ranges must satisfy 0 <= start < end <= 11 (rows of weight), got "

CASES: list[tuple[tuple[str, ...], Arguments, str]] = [
    (_ATTENTION, dict(q=zeros(T + 1, HEADS, DIM)), "positions_q must have shape [10], got [9]"),
    (_ATTENTION, dict(cu_seqlens_k=None, k=zeros(8, 2, DIM)), "k must have shape [9, num_heads_kv, 8], got [8, 2, 8]"),
    (_ATTENTION, dict(k=zeros(T, 2, 16)), "k must have shape [total_k, num_heads_kv, 8], got [9, 2, 16]"),
    (_ATTENTION, dict(k=zeros(T, 3, DIM)), "k: num_heads_kv must divide the 4 heads of q, got 3"),
    (_ATTENTION, dict(k=zeros(T, 0, DIM)), "k: num_heads_kv must divide the 4 heads of q, got 0"),
    *((_ATTENTION, dict(q=zeros(T, HEADS, d), k=zeros(T, 2, d)),
       f"q: head_dim must be a multiple of 8 from 8 to 256, got {d}") for d in (0, 7, 12, 264)),
    (_ATTENTION, dict(k=zeros(T, 2, DIM, dtype=torch.float16)), "k must have dtype float32, got float16"),
    (_ATTENTION, dict(cu_seqlens_q=_EMPTY), "cu_seqlens_q must have num_sequences + 1 >= 1 entries, got 0"),
    (_ATTENTION, dict(cu_seqlens_k=CU_SEQLENS[:2]), "cu_seqlens_k must have shape [4], got [2]"),
    (_ATTENTION, dict(cu_seqlens_q=CU_SEQLENS.long()), "cu_seqlens_q must have dtype int32, got int64"),
    (_ATTENTION, dict(max_seqlen_q=-1), "max_seqlen_q must be at least 0, got -1"),
    (_ATTENTION, dict(max_seqlen_k=-1), "max_seqlen_k must be at least 0, got -1"),
    (_ATTENTION, dict(tiles_q=zeros(4, 2, dtype=torch.int32)), "tiles_q must have shape [3, 2], got [4, 2]"),
    (_ATTENTION, dict(tiles_k=zeros(3, 2)), "tiles_k must have dtype int32, got float32"),
    (("tile_list",), dict(cu_seqlens=_EMPTY), "cu_seqlens must have num_sequences + 1 >= 1 entries, got 0"),
    (("tile_list",), dict(cu_seqlens=CU_SEQLENS.long()), "cu_seqlens must have dtype int32, got int64"),
    (("tile_list",), dict(total=-1), "total must be at least 0, got -1"),
    (("tile_list",), dict(total=2**31), "total must have at most 2147483647 rows, got 2147483648"),
    *((_ATTENTION, dict(scale=x), f"scale must be finite, got {x}") for x in (float("nan"), float("inf"), 1e39)),
    (_ATTENTION, dict(positions_q=torch.arange(T)), "positions_q must have dtype int32, got int64"),
    (_ATTENTION, dict(positions_k=torch.arange(T - 1, dtype=torch.int32)), "positions_k must have shape [9], got [8]"),
    (_ATTENTION, dict(bias_table=zeros(8, 3)), "bias_table must have shape [num_buckets, 4], got [8, 3]"),
    (_ATTENTION, dict(bias_table=zeros(2, HEADS)), "bias_table must have at least 4 rows in 2 equal parts, got 2"),
    (_ATTENTION, dict(bias_table=zeros(9, HEADS)), "bias_table must have at least 4 rows in 2 equal parts, got 9"),
    (_ATTENTION, dict(bias_table=zeros(1, HEADS), bias_bidirectional=False),
     "bias_table must have at least 2 rows in 1 equal parts, got 1"),
    *((_ATTENTION, dict(bias_max_distance=x), f"bias_max_distance must exceed the 2 exact distances, got {x}")
      for x in (2, 0, -5)),
    (_WITH_DROPOUT, dict(v=zeros(T, 2, 16)), "v must have shape [9, 2, 8], got [9, 2, 16]"),
    (_WITH_DROPOUT, dict(v=zeros(T - 1, 2, DIM)), "v must have shape [9, 2, 8], got [8, 2, 8]"),
    *((_WITH_DROPOUT, dict(dropout_p=p), f"dropout_p must be in [0, 1), got {p}")
      for p in (-0.1, 1.0, 2.0, float("nan"))),
    (_WITH_DROPOUT, dict(dropout_seed=None), "dropout_p 0.5 needs a dropout_seed"),
    (_WITH_DROPOUT, dict(dropout_seed=torch.tensor([1, 2])), "dropout_seed must have shape [1], got [2]"),
    (_WITH_DROPOUT, dict(dropout_seed=torch.tensor([1], dtype=torch.int32)),
     "dropout_seed must have dtype int64, got int32"),
    (_ATTENTION[:1], dict(centrality_query_mask=torch.ones(3, dtype=torch.bool)),
     "centrality_query_mask must have shape [9], got [3]"),
    (_ATTENTION[2:], dict(query_mask=torch.ones(T)), "query_mask must have dtype bool, got float32"),
    (_ATTENTION[1:2], dict(out=zeros(T, 2, DIM)), "out must have shape [9, 4, 8], got [9, 2, 8]"),
    (_ATTENTION[1:2], dict(grad_out=zeros(T, HEADS, 16)), "grad_out must have shape [9, 4, 8], got [9, 4, 16]"),
    (_ATTENTION[1:2], dict(bias_table=None), "need_dbias needs a bias_table"),
    (_ATTENTION[1:], dict(lse=zeros(T, HEADS)), "lse must have shape [4, 9], got [9, 4]"),
    (_ATTENTION[1:], dict(lse=zeros(HEADS, T, dtype=torch.float64)), "lse must have dtype float32, got float64"),
    (_LOSSES, dict(targets=zeros(T, 0, dtype=torch.int64)), "targets must have at least one step (column), got shape"),
    (_LOSSES, dict(targets=zeros(T, 2, dtype=torch.int32)), "targets must have dtype int64, got int32"),
    (_LOSSES, dict(hidden=zeros(T - 1, DIM)), "hidden must have shape [9, D], got [8, 8]"),
    (_LOSSES, dict(hidden=zeros(3, T, DIM)), "hidden must have shape [2, 9, D], got [3, 9, 8]"),
    (_LOSSES, dict(weight=zeros(11, 7)), "weight must have shape [V, 8], got [11, 7]"),
    (_LOSSES, dict(weight=zeros(11, DIM, dtype=torch.float16)), "weight must have dtype float32, got float16"),
    (_LOSSES, dict(weight=zeros(0, DIM)), "weight must have at least one class (row), got shape [0, 8]"),
    (_LOSSES, dict(bias=zeros(10)), "bias must have shape [11], got [10]"),
    (_LOSSES, dict(bias=zeros(3, 11)), "bias must have shape [2, 11], got [3, 11]"),
    (_LOSSES, dict(bias=zeros(11, dtype=torch.int64)), f"bias must have dtype {_FLOATING}, got int64"),
    (_LOSSES, dict(vocab_ranges=[0, 7]),
     "vocab_ranges must have a start and an end for each of the 2 steps, got 2 numbers"),
    (_LOSSES, dict(vocab_ranges=[0, 7, 2]), "vocab_ranges must have a start and an end for each of the 2 steps, got 3"),
    (_LOSSES, dict(vocab_ranges=[]), "vocab_ranges must have a start and an end for each of the 2 steps, got 0"),
    *((_LOSSES, dict(vocab_ranges=[0, 7, *span]), _RANGES + f"({span[0]}, {span[1]})")
      for span in ((3, 12), (-1, 5), (4, 4), (7, 4))),
    *((_LOSSES, dict(label_smoothing=x), f"label_smoothing must be in [0, 1], got {x}")
      for x in (-0.1, 1.5, 5.0, float("nan"))),
    *((_LOSSES, dict(z_loss=x), f"z_loss must be in [0, inf), got {x}")
      for x in (-1.0, 1e39, float("inf"), float("nan"))),
    *((_LOSSES, dict(softcap=x), f"softcap must be in (0, inf) in the compute dtype, got {x}")
      for x in (0.0, -3.0, 1e-50, 1e39, float("inf"), float("nan"))),
    *((_LOSSES[:1], dict(reduction=x), "reduction must be 0 (none), 1 (mean) or 2 (sum), got ") for x in (-1, 3)),
    *((_LOSSES[2:], dict(reduction=x), "reduction must be 1 (mean) or 2 (sum) for gradients in the forward pass")
      for x in (-1, 0, 3)),
    (_FORWARD_LOSSES, dict(step_weights_tensor=torch.ones(3)), "step_weights_tensor must have shape [2], got [3]"),
    (_FORWARD_LOSSES, dict(step_weights=[1.0, 1.0]),
     "at most one of step_weights and step_weights_tensor may be given"),
    (_FORWARD_LOSSES, dict(step_weights=[1.0], step_weights_tensor=None),
     "step_weights must have one weight for each of the 2 steps, got 1"),
    (_BACKWARD_LOSS, dict(grad_loss=torch.ones(1)), "grad_loss must have shape [], got [1]"),
    (_BACKWARD_LOSS, dict(step_scale=zeros(0)), "grad_loss must have shape [9, 2], got []"),
    (_BACKWARD_LOSS, dict(step_scale=zeros(3)),
     "step_scale must have one entry for each of the 2 steps, or none, got 3"),
    (_BACKWARD_LOSS, dict(lse=zeros(T, 2)), "lse must have shape [2, 9], got [9, 2]"),
    (_LOSSES[1:], dict(bias=None), "need_bias needs a bias"),
    (("shift_targets",), dict(labels=zeros(T)), "labels must have dtype int64, int32, int16, int8, uint8, got float32"),
    (("shift_targets",), dict(cu_seqlens=_EMPTY), "cu_seqlens must have num_sequences + 1 >= 1 entries, got 0"),
    (("shift_targets",), dict(steps=0), "steps must be at least 1, got 0"),
    (("shift_targets",), dict(stride=-1), "stride must be at least 1, got -1"),
    (("token_importance", "prune"), dict(norm_order=3), "norm_order must be 1 or 2, got 3"),
    (("token_importance", "prune"), dict(centrality=zeros(T - 1)), "centrality must have shape [9], got [8]"),
    (("token_importance", "prune"), dict(centrality=zeros(T, dtype=torch.float16)),
     "centrality must have dtype float32, float64"),
    (("token_importance",), dict(cu_seqlens=None), "per_visible_query needs cu_seqlens"),
    ((*_SELECTIONS, "token_importance"), dict(cu_seqlens=_EMPTY),
     "cu_seqlens must have num_sequences + 1 >= 1 entries"),
    (_SELECTIONS, dict(max_seqlen=-1), "max_seqlen must be at least 0, got -1"),
    *((_SELECTIONS, dict(ratio_q32=x, keep_counts=None), f"ratio_q32 must be in [0, 4294967296], got {x}")
      for x in (-1, 2**32 + 1)),
    (_SELECTIONS, dict(keep_count=-1, keep_counts=None), "keep_count must be at least 0, got -1"),
    (_SELECTIONS, dict(keep_count=1), "exactly one of ratio_q32, keep_count and keep_counts must be given"),
    (_SELECTIONS, dict(keep_counts=None), "exactly one of ratio_q32, keep_count and keep_counts must be given"),
    (_SELECTIONS, dict(keep_counts=torch.ones(4, dtype=torch.int64)), "keep_counts must have shape [3], got [4]"),
    (_SELECTIONS, dict(keep_counts=zeros(3)), "keep_counts must have dtype int32, int64, got float32"),
    (_SELECTIONS, dict(min_keep=-1), "min_keep must be at least 0, got -1"),
    (_SELECTIONS, dict(codes_per_item=0), "codes_per_item must be at least 1, got 0"),
    (_SELECTIONS, dict(total_kept=-1), "total_kept must be at least 0, got -1"),
    (_SELECTIONS, dict(protect=torch.ones(3, dtype=torch.bool)), "protect must have shape [9], got [3]"),
    (("select_tokens",), dict(importance=zeros(T, dtype=torch.int64)),
     f"importance must have dtype {_FLOATING}, got int64"),
    (("prune",), dict(positions=torch.arange(T)), "positions must have dtype int32, got int64"),
    (("prune",), dict(x=[zeros(T)]), "x[0] must have shape [total, width], got [9]"),
    (("prune", "gather_tokens_forward"), dict(x=[zeros(T, DIM), zeros(T - 1)]),
     "x must have tensors with the same number of rows, got 8 and 9"),
    (("prune", "gather_tokens_forward"), dict(x=[]), "x must have at least one tensor, got an empty list"),
    (("prune", "gather_tokens_forward"), dict(x=[torch.zeros(())]),
     "x must have tensors with at least one dimension, got a scala"),
    (("gather_tokens_backward",), dict(grad=[]), "grad must have at least one tensor, got an empty list"),
    (("gather_tokens_forward",), dict(indices=torch.zeros(2, dtype=torch.int32)),
     "indices must have dtype int64, got int32"),
    (("gather_tokens_backward",), dict(inverse=torch.zeros(2, dtype=torch.int64)),
     "inverse must have dtype int32, got int64"),
]  # fmt: skip


@every_kernel
@pytest.mark.parametrize(("ops", "changed", "message"), CASES, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_arguments(kernel, ops, changed, message):
    for op in ops:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
            call(kernel, op, **changed)


def test_float64_holds_what_float32_cannot():
    changed = {name: x.double() for name, x in cross_entropy_arguments("hidden", "weight", "bias").items()}
    call(reference, "multi_token_cross_entropy_forward", **changed, softcap=1e-50, z_loss=1e39)
