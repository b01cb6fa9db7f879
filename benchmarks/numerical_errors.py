"""The rounding errors of every op beside those of PyTorch's own, on the same inputs: docs/numerical_errors.md.

    python benchmarks/numerical_errors.py [--device cpu] [--output docs/numerical_errors.md]

The truth is PyTorch in float64 on the inputs as the dtype has rounded them. An error is the largest difference from it
as a part of the largest element of the truth. Takes two minutes on two cores.
"""

import argparse
import datetime
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stamp_kernels import (
    MultiStepPrediction,
    RelativePositionBias,
    multi_token_cross_entropy,
    packed_attention,
    token_importance,
)
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.profiling.measure.machine import describe_device, describe_versions
from stamp_kernels.relative_position import relative_position_bucket

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOSS_SCALES = (1.0, 65_536.0)

# Sequences of a recommender's history: many short ones, few long ones.
LENGTHS = (1, 7, 24, 24, 31, 60, 97, 120, 240, 500)
HEADS, HEAD_DIM = 6, 64
NUM_ROWS, VOCABULARY, WIDTH = 16_384, 1_024, 64
NUM_STEPS = 3

Results = dict[str, Tensor]


class Comparison(NamedTuple):
    """
    Attributes:
        title: what is computed.
        peer: what PyTorch's own is.
        ours: the results by name, of inputs in some dtype.
        theirs: the same from PyTorch's own functions; in float64 it is the truth.
    """

    title: str
    peer: str
    ours: Callable[[Any], Results]
    theirs: Callable[[Any], Results]
    inputs: Callable[[torch.device], dict[str, Tensor]]


def with_gradients(result: Results, output: Tensor, upstream: Tensor, leaves: dict[str, Tensor]) -> Results:
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
    return result | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def leaves_of(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: inputs[name].detach().requires_grad_() for name in names}


# Attention


def attention_inputs(device: torch.device) -> dict[str, Tensor]:
    rows = sum(LENGTHS), HEADS, HEAD_DIM
    inputs = {name: torch.randn(rows, dtype=torch.float64) for name in ("q", "k", "v", "grad_out")}
    inputs["table"] = torch.randn(32, HEADS, dtype=torch.float64)
    return {name: x.to(device) for name, x in inputs.items()}


def fused_attention(inputs: dict[str, Tensor], *, causal: bool, has_bias: bool) -> Results:
    leaves = leaves_of(inputs, "q", "k", "v", *(["table"] if has_bias else []))
    cu_seqlens = torch.tensor([0, *LENGTHS], device=inputs["q"].device).cumsum(0).to(torch.int32)
    bias = RelativePositionBias(leaves["table"], bidirectional=not causal) if has_bias else None
    result = packed_attention(
        leaves["q"], leaves["k"], leaves["v"], cu_seqlens, max_seqlen_q=max(LENGTHS), causal=causal,
        relative_bias=bias, return_centrality=True,
    )  # fmt: skip
    parts = dict(out=result.out, centrality=result.centrality)
    return with_gradients(parts, result.out, inputs["grad_out"], leaves)


def attention_by_sequence(inputs: dict[str, Tensor], *, causal: bool, has_bias: bool) -> Results:
    leaves = leaves_of(inputs, "q", "k", "v", *(["table"] if has_bias else []))
    outputs, votes = [], []
    for q, k, v in zip(*(leaves[name].split(LENGTHS) for name in ("q", "k", "v")), strict=True):
        n = len(q)
        index = torch.arange(n, device=q.device)
        mask = torch.zeros(HEADS, n, n, dtype=q.dtype, device=q.device)
        if has_bias:
            bucket = relative_position_bucket(
                index - index.unsqueeze(1), num_buckets=32, max_distance=128, bidirectional=not causal
            )
            mask = F.embedding(bucket, leaves["table"]).permute(2, 0, 1)
        if causal:
            mask = mask.masked_fill(index > index.unsqueeze(1), -torch.inf)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        has_mask = causal or has_bias
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask if has_mask else None).transpose(0, 1))
        with torch.no_grad():
            votes.append((q @ k.mT * HEAD_DIM**-0.5 + mask).softmax(-1).sum((0, 1)))
    parts = dict(out=torch.cat(outputs), centrality=torch.cat(votes))
    return with_gradients(parts, parts["out"], inputs["grad_out"], leaves)


def attention(title: str, *, causal: bool = False, has_bias: bool = False) -> Comparison:
    options = dict(causal=causal, has_bias=has_bias)
    return Comparison(
        f"packed_attention, {title}",
        "scaled_dot_product_attention on every sequence; the centrality is the sum of a softmax",
        lambda inputs: fused_attention(inputs, **options),
        lambda inputs: attention_by_sequence(inputs, **options),
        attention_inputs,
    )


# Importance


def importance_inputs(device: torch.device) -> dict[str, Tensor]:
    return dict(
        hidden=torch.randn(4_096, 768, dtype=torch.float64).to(device),
        centrality=torch.rand(4_096, dtype=torch.float64).to(device),
    )


def importance(order: int) -> Comparison:
    return Comparison(
        f"token_importance, L{order}",
        "hidden.norm() * centrality",
        lambda x: dict(importance=token_importance(x["hidden"], x["centrality"].float(), norm=f"l{order}")),
        lambda x: dict(importance=x["hidden"].norm(p=order, dim=-1) * x["centrality"]),
        importance_inputs,
    )


# Losses


def loss_inputs(device: torch.device) -> dict[str, Tensor]:
    targets = torch.randint(VOCABULARY, (NUM_ROWS, NUM_STEPS))
    return dict(
        hidden=torch.randn(NUM_ROWS, WIDTH, dtype=torch.float64).to(device),
        weight=(torch.randn(VOCABULARY, WIDTH, dtype=torch.float64) * WIDTH**-0.5).to(device),
        targets=targets.to(device),
    )


def scaled_loss(loss: Tensor, leaves: dict[str, Tensor], loss_scale: float) -> Results:
    return with_gradients(dict(loss=loss), loss, torch.tensor(loss_scale, device=loss.device), leaves)


def fused_loss(inputs: dict[str, Tensor], loss_scale: float, memory: Any) -> Results:
    leaves = leaves_of(inputs, "hidden", "weight")
    loss = multi_token_cross_entropy(leaves["hidden"], leaves["weight"], inputs["targets"][:, :1], memory=memory)
    return scaled_loss(loss, leaves, loss_scale)


def plain_logits(leaves: dict[str, Tensor]) -> Tensor:
    """In fp32 for the loss, as autocast would have them; cross_entropy in fp16 overflows."""
    logits = F.linear(leaves["hidden"], leaves["weight"])
    return logits.to(compute_dtype(logits.dtype))


def plain_loss(inputs: dict[str, Tensor], loss_scale: float) -> Results:
    leaves = leaves_of(inputs, "hidden", "weight")
    loss = F.cross_entropy(plain_logits(leaves), inputs["targets"][:, 0])
    return scaled_loss(loss, leaves, loss_scale)


def cross_entropy(memory: str, loss_scale: float) -> Comparison:
    return Comparison(
        f'multi_token_cross_entropy, memory="{memory}", loss scale {loss_scale:,.0f}',
        "cross_entropy(linear(...).float())",
        lambda inputs: fused_loss(inputs, loss_scale, memory),
        lambda inputs: plain_loss(inputs, loss_scale),
        loss_inputs,
    )


def prediction_loss(inputs: dict[str, Tensor], loss_scale: float) -> Results:
    leaves = leaves_of(inputs, "hidden", "weight")
    prediction = MultiStepPrediction(WIDTH, NUM_STEPS, head="residual", lambda_=0.3).to(leaves["hidden"])
    loss = prediction(leaves["hidden"], inputs["targets"], unembedding=leaves["weight"])
    return scaled_loss(loss, leaves, loss_scale)


def plain_prediction_loss(inputs: dict[str, Tensor], loss_scale: float) -> Results:
    """The heads begin as the identity, so that every step predicts from the hidden states themselves."""
    leaves = leaves_of(inputs, "hidden", "weight")
    logits = plain_logits(leaves)
    loss = 0.3 * sum(F.cross_entropy(logits, inputs["targets"][:, k]) for k in range(NUM_STEPS))
    return scaled_loss(loss, leaves, loss_scale)


def multi_step_prediction(loss_scale: float) -> Comparison:
    return Comparison(
        f"MultiStepPrediction, {NUM_STEPS} steps, loss scale {loss_scale:,.0f}",
        "the same with cross_entropy(linear(...).float())",
        lambda inputs: prediction_loss(inputs, loss_scale),
        lambda inputs: plain_prediction_loss(inputs, loss_scale),
        loss_inputs,
    )


COMPARISONS = [
    attention("plain"),
    attention("causal", causal=True),
    attention("T5 bias", has_bias=True),
    importance(1),
    importance(2),
    *(cross_entropy(memory, loss_scale) for loss_scale in LOSS_SCALES for memory in ("auto", "minimal")),
    *(multi_step_prediction(loss_scale) for loss_scale in LOSS_SCALES),
]


# The table


def max_norm_error(x: Tensor, truth: Tensor) -> float:
    """NaN or infinite where x is not finite."""
    x, truth = x.detach().double(), truth.detach()
    return float((x - truth).abs().max() / truth.abs().max())


def errors(comparison: Comparison, device: torch.device) -> dict[str, list[float]]:
    """By result: ours and PyTorch's, for each dtype."""
    torch.manual_seed(0)
    exact = comparison.inputs(device)
    found: dict[str, list[float]] = {}
    for dtype in DTYPES.values():
        rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in exact.items()}
        doubled = {name: x.double() if x.is_floating_point() else x for name, x in rounded.items()}
        truth, ours, theirs = comparison.theirs(doubled), comparison.ours(rounded), comparison.theirs(rounded)
        for name, value in truth.items():
            found.setdefault(name, []).extend(max_norm_error(x[name], value) for x in (ours, theirs))
    return found


def table(comparison: Comparison, found: dict[str, list[float]]) -> list[str]:
    columns = [f"{name}, {whose}" for name in DTYPES for whose in ("ours", "PyTorch")]
    return [
        f"## {comparison.title}",
        "",
        f"PyTorch: {comparison.peer}.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {name} | " + " | ".join(f"{x:.1e}" for x in values) + " |" for name, values in found.items()),
        "",
    ]


INTRODUCTION = """\
# Numerical errors

How far the results of each op are from the exact ones, beside PyTorch's own functions on the same inputs.

The inputs are random, in the dtype of the column. The exact result is that of PyTorch in float64 on these rounded
inputs. An error is the largest difference from the exact result, as a part of the largest element of the exact result
(max norm). fp16 keeps 11 bits, so that rounding an exact result to it gives up to 4.9e-04 of an element; for bf16 with
8 bits this is 3.9e-03, for fp32 6.0e-08. A result is good if it is near these numbers. `inf` and `nan` mean that a
result is not finite.

- Attention: sequences of {lengths} tokens, {heads} heads of {head_dim} features.
  `centrality` is in fp32 for every dtype of the inputs; PyTorch's sum is in the dtype of the inputs.
- Losses: {num_rows:,} rows, {vocabulary:,} classes, width {width}, reduction "mean". The gradients are those of the
  loss times the loss scale, as `torch.amp.GradScaler` multiplies it. Without a scale the gradients of fp16 are so small
  that they lose bits in any implementation.
"""


def document(device: torch.device, sections: Sequence[str]) -> str:
    introduction = INTRODUCTION.format(
        lengths=", ".join(map(str, LENGTHS)), heads=HEADS, head_dim=HEAD_DIM, num_rows=NUM_ROWS, vocabulary=VOCABULARY,
        width=WIDTH,
    )  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in describe_versions().items() if name != "transformers")
    made = f"Made by `make errors` on {datetime.date.today()}: {describe_device(device)}; {versions}."
    return "\n".join([introduction, textwrap.fill(made, 120), "", *sections]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, default=Path("docs/numerical_errors.md"))
    arguments = parser.parse_args()
    sections = [line for x in COMPARISONS for line in table(x, errors(x, arguments.device))]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(document(arguments.device, sections))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
