"""Valid calls of token_importance, select_tokens, gather_tokens and prune."""

from typing import Any

import torch
from ragged import RaggedBatch
from torch import Tensor

from fuzz import pruning_oracle as oracle
from fuzz.calls import Call
from fuzz.draw import Draw
from fuzz.judge import Case, Near
from stamp_kernels import TokenSelection
from stamp_kernels.common.precision import compute_dtype

ROW_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip


def token_importance(draw: Draw) -> Case:
    batch = draw.batch()
    dtype = draw.dtype()
    has_offsets = draw.chance(0.7)
    centrality = torch.rand(batch.total, dtype=draw.choice([torch.float32, torch.float64]))
    hidden = draw.rows(batch, draw.choice([0, 1, 8, 65, 300]), dtype=dtype)
    if not has_offsets:
        hidden = hidden.nan_to_num()
    arguments: dict[str, Any] = dict(
        hidden=hidden,
        centrality=draw.strided(centrality),
        cu_seqlens=draw.offsets(batch) if has_offsets else None,
        norm=draw.choice(["l1", "l2"]),
        normalize=draw.choice(["none", "visible_queries"]) if has_offsets else "none",
    )
    call = Call("stamp_kernels.token_importance", arguments)
    precision = torch.float64 if dtype == torch.float64 else torch.float32  # the norm is computed in it
    return Case(
        call,
        run=lambda: dict(importance=call.make()),
        want=lambda: dict(importance=Near(oracle.importance(**arguments), compute_dtype(dtype), precision=precision)),
    )


def options_of_selection(draw: Draw, batch: RaggedBatch, codes: int | None) -> dict[str, Any]:
    """The arguments of select_tokens and prune after max_seqlen."""
    options: dict[str, Any] = {}
    if draw.chance(0.6):
        n = draw.randint(1, 12)
        options["keep_ratio"] = draw.choice([0.0, 1.0, 1 / 3, 0.5, draw.randint(0, n) / n, draw.random()])
        if draw.chance(0.3):
            options["budget"] = "max_seqlen"
    elif draw.chance(0.5):
        options["keep_count"] = draw.choice([0, 1, 5, 1000])
    else:
        counts = torch.randint(0, 9, (batch.num_sequences,), dtype=draw.choice([torch.int32, torch.int64]))
        options["keep_count"] = draw.strided(counts)
    if draw.chance(0.5):
        options["min_keep"] = draw.choice([0, 1, 3])
    if codes is not None:
        options["codes_per_item"] = codes
    if draw.chance(0.4):
        options["protect"] = draw.strided(torch.rand(batch.total) < 0.2)
    if draw.chance(0.3):
        options["lengths_cpu"] = torch.tensor(batch.lengths, dtype=draw.choice([torch.int32, torch.int64]))
    return options


def of_oracle(options: dict[str, Any]) -> dict[str, Any]:
    return {"budget_of" if name == "budget" else name: x for name, x in options.items() if name != "lengths_cpu"}


def select_tokens(draw: Draw) -> Case:
    codes = draw.choice([None, None, 1, 3, 4])
    batch = draw.batch(codes or 1)
    # Multiples of 1/8, so that the sum over an item is exact and ties occur, and numbers that are special in an order.
    values = torch.randint(-16, 17, (batch.total,)) / 8.0
    special = torch.rand(batch.total) < draw.choice([0.0, 0.2])
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])[torch.randint(5, (batch.total,))]
    scores = torch.where(special, specials, values).to(draw.dtype())
    options = options_of_selection(draw, batch, codes)
    max_seqlen = draw.upper_bound(batch.max_seqlen)
    truth = oracle.select(scores, batch.cu_seqlens, max_seqlen, **of_oracle(options))
    if draw.chance(0.3) or draw.backend == "triton":
        extra = (codes or 1) * draw.randint(0, 3)
        options["total_kept"] = min(batch.total // (codes or 1) * (codes or 1), sum(truth.lengths) + extra)
        truth = oracle.select(scores, batch.cu_seqlens, max_seqlen, **of_oracle(options))
    call = Call(
        "stamp_kernels.select_tokens",
        dict(importance=draw.strided(scores), cu_seqlens=draw.offsets(batch), max_seqlen=max_seqlen, **options),
    )

    def run() -> dict[str, Any]:
        selection = call.make()
        is_bound = selection.max_seqlen >= max(truth.lengths, default=0)
        parts = dict(indices=selection.indices, cu_seqlens=selection.cu_seqlens, inverse=selection.inverse)
        return parts | dict(max_seqlen_is_a_bound=is_bound, total_source=selection.total_source)

    def want() -> dict[str, Any]:
        parts = dict(indices=truth.indices, cu_seqlens=truth.cu_seqlens, inverse=truth.inverse)
        return parts | dict(max_seqlen_is_a_bound=True, total_source=batch.total)

    return Case(call, run, want)


def _any_rows(draw: Draw, total: int) -> Tensor:
    dtype = draw.choice(ROW_DTYPES)
    shape = (total, *draw.choice([(), (1,), (7,), (64,), (3, 5), (0,)]))
    if dtype.is_floating_point:
        return draw.strided(draw.floats(*shape, dtype=dtype))
    return draw.strided(torch.randint(0, 2 if dtype == torch.bool else 100, shape, dtype=torch.int64).to(dtype))


def _gradients(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    pairs = [(y, grad) for y, x, grad in zip(outputs, inputs, grads, strict=True) if x.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]
    return list(torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs])) if leaves else []


def gather_tokens(draw: Draw) -> Case:
    total = draw.choice([0, 1, 5, 33, 200])
    kept = sorted(draw.sample(range(total), draw.randint(0, total)))
    tail = draw.choice([0, 0, 2])
    inverse = torch.full((total,), -1, dtype=torch.int32)
    inverse[kept] = torch.arange(len(kept), dtype=torch.int32)
    cu_seqlens = torch.tensor([0, len(kept)], dtype=torch.int32)
    selection = TokenSelection(torch.tensor(kept + [-1] * tail, dtype=torch.int64), cu_seqlens, total, inverse, total)
    tensors = [_any_rows(draw, total) for _ in range(draw.randint(1, 3))]
    for x in tensors:
        x.requires_grad_(x.is_floating_point() and draw.chance(0.6))
    is_list = len(tensors) > 1 or draw.chance(0.3)
    grads = [draw.strided(torch.randn(len(kept) + tail, *x.shape[1:]).to(x.dtype)) for x in tensors]
    fills = [draw.choice([0, 1, -1] if x.dtype.is_signed else [0, 1]) for x in tensors]
    arguments = dict(x=tensors if is_list else tensors[0], selection=selection)
    call = Call("stamp_kernels.gather_tokens", arguments | dict(fill_value=fills if is_list else fills[0]))

    def run() -> dict[str, Any]:
        result = call.make()
        rows = result if is_list else [result]
        found = _gradients(rows, tensors, grads)
        return {f"x{i}": y.detach() for i, y in enumerate(rows)} | {f"grad{i}": g for i, g in enumerate(found)}

    def want() -> dict[str, Any]:
        rows = {f"x{i}": oracle.take_rows(x, selection.indices, fills[i]) for i, x in enumerate(tensors)}
        needed = [grad for x, grad in zip(tensors, grads, strict=True) if x.requires_grad]
        return rows | {f"grad{i}": oracle.take_rows(g, inverse) for i, g in enumerate(needed)}

    return Case(call, run, want)


def exact_rows(draw: Draw, batch: RaggedBatch, norm: str, dtype: torch.dtype) -> Tensor:
    """Hidden states whose norm is exact in every dtype and order of summation: sums and hypotenuses of integers."""
    width = draw.choice([1, 8, 33])
    x = torch.randint(-3, 4, (batch.total, width)).double()
    if norm == "l2":  # one element each
        x = torch.where(torch.arange(width) == torch.randint(width, (batch.total, 1)), x, 0.0)
    x = x.to(dtype)
    x[batch.valid :] = torch.nan
    return draw.strided(x)


def drawn_pruning(draw: Draw) -> tuple[RaggedBatch, Tensor, Tensor, str]:
    """A batch, its hidden states, their centrality and the norm, with products that are exact."""
    batch = draw.batch(draw.choice([1, 1, 2, 4]))
    norm = draw.choice(["l1", "l2"])
    hidden = exact_rows(draw, batch, norm, draw.dtype())
    centrality = (torch.randint(0, 33, (batch.total,)) / 8).to(draw.choice([torch.float32, torch.float64]))
    return batch, hidden, draw.strided(centrality), norm


def prune(draw: Draw) -> Case:
    batch, hidden, centrality, norm = drawn_pruning(draw)
    codes = draw.maybe(0.3, 2) if all(n % 2 == 0 for n in batch.lengths) else None
    options = options_of_selection(draw, batch, codes)
    positions = draw.maybe(0.5, draw.positions(batch))
    tensors = [hidden, *(_any_rows(draw, batch.total) for _ in range(draw.choice([0, 0, 1, 2])))]
    for x in tensors:
        x.requires_grad_(x.is_floating_point() and draw.chance(0.6))
    is_list = len(tensors) > 1 or draw.chance(0.3)
    max_seqlen = draw.upper_bound(batch.max_seqlen)
    scores = oracle.importance(hidden, centrality, batch.cu_seqlens, norm, "none")
    truth = oracle.select(scores, batch.cu_seqlens, max_seqlen, **of_oracle(options))
    if draw.backend == "triton":
        options["total_kept"] = len(truth.indices)
    grads = [draw.strided(torch.randn(len(truth.indices), *x.shape[1:]).to(x.dtype)) for x in tensors]
    call = Call(
        "stamp_kernels.prune",
        dict(
            x=tensors if is_list else hidden, centrality=centrality, cu_seqlens=draw.offsets(batch),
            max_seqlen=max_seqlen, positions=positions, norm=norm, **options,
        ),
    )  # fmt: skip

    def run() -> dict[str, Any]:
        result = call.make()
        rows = result.x if is_list else [result.x]
        found = _gradients(rows, tensors, grads)
        selection = result.selection
        parts = dict(indices=selection.indices, cu_seqlens=selection.cu_seqlens, inverse=selection.inverse)
        parts |= dict(positions=result.positions)
        return parts | {f"x{i}": y.detach() for i, y in enumerate(rows)} | {f"grad{i}": g for i, g in enumerate(found)}

    def want() -> dict[str, Any]:
        index = torch.cat([torch.arange(n) for n in (*batch.lengths, batch.tail)]).to(torch.int32)
        of_rows = index if positions is None else positions
        parts = dict(indices=truth.indices, cu_seqlens=truth.cu_seqlens, inverse=truth.inverse)
        parts |= dict(positions=oracle.take_rows(of_rows, truth.indices))
        needed = [grad for x, grad in zip(tensors, grads, strict=True) if x.requires_grad]
        return (
            parts
            | {f"x{i}": oracle.take_rows(x, truth.indices) for i, x in enumerate(tensors)}
            | {f"grad{i}": oracle.take_rows(g, truth.inverse) for i, g in enumerate(needed)}
        )

    return Case(call, run, want)


SUBJECTS = {function.__name__: function for function in (token_importance, select_tokens, gather_tokens, prune)}
