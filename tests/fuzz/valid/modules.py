"""Valid calls of SemanticAdaptivePruning and MultiStepPrediction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz import pruning_oracle
from fuzz.calls import Call
from fuzz.draw import Draw, slices
from fuzz.judge import Case, Near
from fuzz.valid.pruning import drawn_pruning
from stamp_kernels import PackedBatch
from stamp_kernels.common.precision import compute_dtype


def semantic_adaptive_pruning(draw: Draw) -> Case:
    batch, hidden, centrality, norm = drawn_pruning(draw)
    codes = draw.maybe(0.3, 2) if all(n % 2 == 0 for n in batch.lengths) else None
    options: dict[str, Any] = dict(
        keep_ratio=draw.choice([0.0, 1 / 3, 0.5, 1.0, draw.random()]), min_keep=draw.choice([0, 1, 3]),
        codes_per_item=codes, budget=draw.choice(["sequence", "max_seqlen"]),
    )  # fmt: skip
    made = Call(
        "stamp_kernels.SemanticAdaptivePruning",
        options | dict(norm=norm, positions=draw.choice(["original", "compact"])),
    )
    hidden.requires_grad_(draw.chance(0.7))
    packed = PackedBatch(
        hidden, draw.offsets(batch), draw.upper_bound(batch.max_seqlen), draw.maybe(0.5, draw.positions(batch)),
        draw.maybe(0.5, torch.tensor(batch.lengths, dtype=torch.int64)),
    )  # fmt: skip
    protect = draw.maybe(0.4, torch.rand(batch.total) < 0.2)
    call = Call("", dict(packed=packed, centrality=centrality, protect=protect), on=made)
    scores = pruning_oracle.importance(hidden, centrality, batch.cu_seqlens, norm, "none")
    truth = pruning_oracle.select(
        scores, batch.cu_seqlens, packed.max_seqlen, protect=protect, keep_ratio=options["keep_ratio"],
        min_keep=options["min_keep"], codes_per_item=codes, budget_of=options["budget"],
    )  # fmt: skip
    grad = torch.randn(len(truth.indices), hidden.shape[1]).to(hidden.dtype)

    def run() -> dict[str, Any]:
        pruned, selection, _ = call.make()
        parts = dict(values=pruned.values.detach(), cu_seqlens=pruned.cu_seqlens, positions=pruned.positions)
        parts |= dict(indices=selection.indices, is_bound=pruned.max_seqlen >= max(truth.lengths, default=0))
        if hidden.requires_grad:
            parts["grad"] = torch.autograd.grad(pruned.values, hidden, grad)[0]
        return parts

    def want() -> dict[str, Any]:
        index = torch.cat([torch.arange(n) for n in (*batch.lengths, batch.tail)]).to(torch.int32)
        positions = pruning_oracle.take_rows(index if packed.positions is None else packed.positions, truth.indices)
        parts = dict(
            values=pruning_oracle.take_rows(hidden, truth.indices), cu_seqlens=truth.cu_seqlens,
            positions=positions if made.arguments["positions"] == "original" else None, indices=truth.indices,
            is_bound=True,
        )  # fmt: skip
        return parts | (dict(grad=pruning_oracle.take_rows(grad, truth.inverse)) if hidden.requires_grad else {})

    return Case(call, run, want)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _head(kind: str, x: Tensor, p: dict[str, Tensor], cu_seqlens: Tensor, heads: int, causal: bool) -> Tensor:
    """A head's state, differentiable in float64, from the equations in the docstrings of `modules.prediction`."""
    if kind == "linear":
        return x @ p["weight"].T + p["bias"]
    if kind == "residual":
        return x + F.silu(x @ p["linear.weight"].T + p["linear.bias"])
    qkv = _rms_norm(x, p["attention_norm.weight"]) @ p["query_key_value.weight"].T
    attended = torch.zeros_like(x)
    for rows in slices(cu_seqlens):
        q, k, v = qkv[rows].unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # [heads, n, D]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        attended = attended.index_add(
            0, torch.arange(rows.start, rows.stop), (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        )
    x = x + attended @ p["attention_out.weight"].T
    return x + F.silu(_rms_norm(x, p["mlp_norm.weight"]) @ p["mlp_in.weight"].T) @ p["mlp_out.weight"].T


def multi_step_prediction(draw: Draw) -> Case:
    dtype = torch.float32
    kind = draw.choice(["linear", "residual", "transformer"])
    codes, num_steps, heads, width, vocab = draw.choice([1, 1, 3]), draw.randint(1, 3), 2, 16, draw.choice([5, 60])
    batch = draw.batch(codes)
    num_rows = batch.total - batch.tail % codes  # whole items
    causal = draw.chance(0.5)
    owns = draw.chance(0.5)
    ranges = None
    if draw.chance(0.3):
        ranges = [(start := draw.randint(0, vocab - 1), draw.randint(start + 1, vocab))] * (num_steps * codes)
    options: dict[str, Any] = dict(
        hidden_size=width, num_steps=num_steps, head=kind, vocab_size=vocab if owns else None, codes_per_item=codes,
        vocab_ranges=ranges, lambda_=draw.choice([1.0, 0.3]), label_smoothing=draw.choice([0.0, 0.1]),
        softcap=draw.choice([None, 5.0]), step_weights=draw.maybe(0.5, [1.0, 0.5, 0.25][:num_steps]),
    )  # fmt: skip
    if kind == "transformer":
        options |= dict(num_attention_heads=heads, causal=causal)
    module: nn.Module = Call("stamp_kernels.MultiStepPrediction", options).make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    targets = torch.randint(*(ranges[0] if ranges else (0, vocab)), (num_rows, num_steps), dtype=torch.int64)
    targets[torch.rand(targets.shape) < draw.choice([0.0, 0.4, 1.0])] = -100
    hidden = draw.floats(num_rows, width, dtype=dtype)
    hidden[batch.valid :] = torch.nan  # and there are targets
    arguments: dict[str, Any] = dict(
        hidden=draw.strided(hidden).requires_grad_(), targets=draw.strided(targets),
        unembedding=None if owns else draw.strided(draw.floats(vocab, width, dtype=dtype, scale=0.3)).requires_grad_(),
        cu_seqlens=draw.offsets(batch), max_seqlen=draw.upper_bound(batch.max_seqlen),
    )  # fmt: skip
    call = Call("", arguments, on=Call("stamp_kernels.MultiStepPrediction", options))
    leaves = dict(module.named_parameters()) | {
        name: arguments[name] for name in ("hidden", "unembedding") if arguments[name] is not None
    }

    def run() -> dict[str, Any]:
        loss = module(**arguments)
        found = torch.autograd.grad(loss, list(leaves.values()))
        return dict(loss=loss) | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}

    def want() -> dict[str, Any]:
        exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(num_steps):
            prefix = f"heads.{k}."
            p = {name.removeprefix(prefix): x for name, x in exact.items() if name.startswith(prefix)}
            states = _head(kind, exact["hidden"][: batch.valid], p, batch.cu_seqlens, heads, causal)
            weight = (options["step_weights"] or [1.0] * num_steps)[k] / codes
            for level in range(codes):
                column = targets[: batch.valid][level::codes, k]
                start, end = ranges[0] if ranges else (0, vocab)
                valid = (column != -100).nonzero().flatten()
                logits = states[level::codes][valid] @ exact["unembedding"][start:end].T
                if options["softcap"] is not None:
                    logits = options["softcap"] * torch.tanh(logits / options["softcap"])
                if len(valid) > 0:
                    loss = loss + weight * F.cross_entropy(
                        logits, column[valid] - start, label_smoothing=options["label_smoothing"]
                    )
        loss = options["lambda_"] * loss + 0.0 * sum(x.nan_to_num().sum() for x in exact.values())
        found = torch.autograd.grad(loss, list(exact.values()))
        size = loss.detach().abs() + 1
        parts = dict(loss=Near(loss.detach(), compute_dtype(dtype), size))
        # Sums of several layers, of which parts cancel: their sizes are not followed one by one.
        largest = max((float(x.abs().max()) for x in found if x.numel() > 0), default=0.0) + 0.1
        return parts | {
            f"d{name}": Near(x, dtype, torch.full_like(x, largest)) for name, x in zip(exact, found, strict=True)
        }

    return Case(call, run, want)


SUBJECTS = {
    "SemanticAdaptivePruning": semantic_adaptive_pruning,
    "MultiStepPrediction": multi_step_prediction,
}
