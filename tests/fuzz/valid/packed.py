"""Round trips of PackedBatch: padded, nested and jagged layouts."""

import types
from typing import Any

import torch
from ragged import RaggedBatch
from torch import Tensor

from fuzz.calls import Call
from fuzz.draw import Draw, offsets
from fuzz.judge import Case
from fuzz.valid.pruning import _any_rows


def from_padded(draw: Draw) -> Case:
    batch, padded_length = draw.randint(0, 6), draw.randint(0, 12)
    x = _any_rows(draw, batch * padded_length).unflatten(0, (batch, padded_length))
    lengths = torch.randint(0, padded_length + 1, (batch,))
    mask = torch.arange(padded_length) < lengths.unsqueeze(1)
    if draw.chance(0.5):
        arguments = dict(x=x, lengths=lengths.to(draw.choice([torch.int32, torch.int64])))
    else:
        if draw.chance(0.5):  # scattered padding
            mask = torch.rand(batch, padded_length) < 0.6
        arguments = dict(x=x, mask=mask.to(draw.choice([torch.bool, torch.int64, torch.uint8])))
    call = Call("stamp_kernels.PackedBatch.from_padded", arguments)
    counts = [sum(row) for row in mask.tolist()]

    def run() -> dict[str, Any]:
        packed = call.make()
        return {name: getattr(packed, name) for name in ("values", "cu_seqlens", "max_seqlen", "positions")}

    def want() -> dict[str, Any]:
        rows = [x[i, j] for i in range(batch) for j in range(padded_length) if bool(mask[i, j])]
        values = torch.stack(rows) if rows else x.new_empty(0, *x.shape[2:])
        max_seqlen = max(counts, default=0)
        return dict(values=values, cu_seqlens=offsets(counts), max_seqlen=max_seqlen, positions=None)

    return Case(call, run, want)


def _packed(draw: Draw) -> tuple[RaggedBatch, Call]:
    batch = draw.batch()
    arguments = dict(
        values=_any_rows(draw, batch.total),
        cu_seqlens=draw.offsets(batch),
        max_seqlen=draw.upper_bound(batch.max_seqlen),
        positions=draw.maybe(0.3, draw.positions(batch)),
        lengths_cpu=draw.maybe(0.5, torch.tensor(batch.lengths, dtype=torch.int64)),
    )
    return batch, Call("stamp_kernels.PackedBatch", arguments)


def to_padded(draw: Draw) -> Case:
    batch, packed = _packed(draw)
    values, max_seqlen = packed.arguments["values"], packed.arguments["max_seqlen"]
    side, total_length = draw.choice(["right", "left"]), draw.maybe(0.4, max_seqlen + draw.randint(0, 3))
    value = draw.choice([0, 1])
    call = Call("to_padded", dict(total_length=total_length, padding_side=side, padding_value=value), on=packed)
    values.requires_grad_(values.is_floating_point() and draw.chance(0.6))
    width = max_seqlen if total_length is None else total_length
    grad = torch.randn(batch.num_sequences, width, *values.shape[1:]).to(values.dtype)

    def columns(rows: slice) -> slice:
        n = rows.stop - rows.start
        return slice(0, n) if side == "right" else slice(width - n, width)

    def run() -> dict[str, Any]:
        padded = call.make()
        parts = dict(padded=padded.detach())
        if values.requires_grad:
            parts["grad"] = torch.autograd.grad(padded, values, grad)[0]
        return parts

    def want() -> dict[str, Any]:
        padded = values.new_full((batch.num_sequences, width, *values.shape[1:]), value).detach()
        of_values = torch.zeros(values.shape, dtype=values.dtype)
        for i, rows in enumerate(batch.slices()):
            padded[i, columns(rows)] = values.detach()[rows]
            of_values[rows] = grad[i, columns(rows)]
        return dict(padded=padded) | (dict(grad=of_values) if values.requires_grad else {})

    return Case(call, run, want)


def to_nested(draw: Draw) -> Case:
    """And back: the rows of every sequence, then the same batch without its tail."""
    batch, packed = _packed(draw)
    values: Tensor = packed.arguments["values"].contiguous()  # from_nested refuses other layouts
    call = Call("to_nested", on=packed.replace(values=values))

    def run() -> dict[str, Any]:
        nested = call.make()
        again = Call("stamp_kernels.PackedBatch.from_nested", dict(nested=nested)).make()
        rows = {f"row{i}": x for i, x in enumerate(nested.unbind())}
        return rows | dict(values=again.values, cu_seqlens=again.cu_seqlens)

    def want() -> dict[str, Any]:
        rows = {f"row{i}": values[part] for i, part in enumerate(batch.slices())}
        return rows | dict(values=values[: batch.valid], cu_seqlens=batch.cu_seqlens)

    return Case(call, run, want)


def from_jagged(draw: Draw) -> Case:
    """Of anything with `values()` and `offsets()`, as TorchRec's JaggedTensor has them."""
    batch = draw.batch()
    values = _any_rows(draw, batch.valid)
    dtype = draw.choice([torch.int32, torch.int64])
    jagged = types.SimpleNamespace(values=lambda: values, offsets=lambda: batch.cu_seqlens.to(dtype))
    call = Call("stamp_kernels.PackedBatch.from_jagged", dict(jagged=jagged))

    def run() -> dict[str, Any]:
        packed = call.make()
        return {name: getattr(packed, name) for name in ("values", "cu_seqlens", "max_seqlen", "lengths_cpu")}

    def want() -> dict[str, Any]:
        lengths = torch.tensor(batch.lengths, dtype=torch.int32)
        cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
        return dict(values=values, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, lengths_cpu=lengths)

    return Case(call, run, want)


def materialized_positions(draw: Draw) -> Case:
    batch, packed = _packed(draw)
    call = Call("materialized_positions", on=packed)

    def want() -> dict[str, Any]:
        counted = torch.tensor([i for n in batch.lengths for i in range(n)] + [0] * batch.tail, dtype=torch.int32)
        positions = packed.arguments["positions"]
        return dict(positions=counted if positions is None else positions)

    return Case(call, lambda: dict(positions=call.make()), want)


SUBJECTS = {
    f"PackedBatch.{function.__name__}": function
    for function in (from_padded, to_padded, to_nested, from_jagged, materialized_positions)
}
