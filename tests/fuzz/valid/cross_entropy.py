"""Valid calls of multi_token_cross_entropy and shift_targets."""

from typing import Any

import torch
from torch import Tensor

from fuzz.calls import Call
from fuzz.cross_entropy_oracle import LossTruth, cross_entropy, shifted
from fuzz.draw import Draw
from fuzz.judge import Case, Near
from stamp_kernels.common.precision import compute_dtype

_LARGEST_GRADIENT = 3e4  # below the largest fp16 number


def _arguments(draw: Draw) -> dict[str, Any]:
    is_small = draw.backend == "triton"
    dtype = draw.dtype()
    num_rows = draw.choice([0, 1, 2, 3, 5, 17] if is_small else [0, 1, 2, 3, 17, 64, 150, 400])
    num_steps = draw.randint(1, 3 if is_small else 5)
    vocab = draw.choice([1, 2, 9, 40] if is_small else [1, 2, 9, 100, 333, 900])
    width = draw.choice([8, 16, 20] if is_small else [1, 8, 33, 64, 130, 264])
    ignore_index = draw.choice([-100, -100, -1, 0])
    ranges = None
    if draw.chance(0.4):
        ranges = []
        for _ in range(num_steps):
            start = draw.randint(0, vocab - 1)
            ranges.append((start, draw.randint(start + 1, vocab)))
    columns = [
        torch.randint(*(ranges[k] if ranges else (0, vocab)), (num_rows,), dtype=torch.int64) for k in range(num_steps)
    ]
    targets = torch.stack(columns, 1)
    targets[torch.rand(targets.shape) < draw.choice([0.0, 0.3, 0.9, 1.0])] = ignore_index

    def shared_or_per_step(*shape: int, dtype: torch.dtype, scale: float) -> Tensor:
        steps = (num_steps,) if draw.chance(0.3) else ()
        return draw.strided(draw.floats(*steps, *shape, dtype=dtype, scale=scale))

    hidden = shared_or_per_step(num_rows, width, dtype=dtype, scale=1.0)
    hidden[..., (targets == ignore_index).all(1), :] = torch.nan  # these rows are never read
    arguments: dict[str, Any] = dict(
        hidden=hidden, weight=shared_or_per_step(vocab, width, dtype=dtype, scale=width**-0.5),
        targets=draw.strided(targets), ignore_index=ignore_index, vocab_ranges=ranges,
        reduction=draw.choice(["mean", "mean", "sum", "none"]), memory=draw.choice(["auto", "minimal"]),
    )  # fmt: skip
    if draw.chance(0.4):
        arguments["bias"] = shared_or_per_step(vocab, dtype=draw.choice([dtype, torch.float32]), scale=1.0)
    if draw.chance(0.5) or num_rows == num_steps:  # without weights, states of each step may be padded sequences
        weights = [draw.choice([1.0, 0.3, 0.0, -0.5]) for _ in range(num_steps)]
        arguments["step_weights"] = draw.choice([weights, tuple(weights), torch.tensor(weights)])
    if draw.chance(0.3):
        arguments["label_smoothing"] = draw.choice([0.1, 1.0])
    if draw.chance(0.3):
        arguments["z_loss"] = draw.choice([1e-4, 0.1])
    if draw.chance(0.3):
        arguments["softcap"] = draw.choice([0.7, 30.0, 3000.0])
    if arguments["reduction"] != "none":
        arguments["return_step_losses"] = draw.chance(0.5)
    return arguments


def multi_token_cross_entropy(draw: Draw) -> Case:
    arguments = _arguments(draw)
    names = ("hidden", "weight", "bias")
    leaves = {name: arguments[name] for name in names if name in arguments and draw.chance(0.8)}
    for x in leaves.values():
        x.requires_grad_()
    dtype = compute_dtype(arguments["hidden"].dtype)
    shape = arguments["targets"].shape if arguments["reduction"] == "none" else ()
    grad_loss = torch.randn(shape, dtype=dtype)
    if leaves and draw.chance(0.5):  # a loss scale, as large as the gradients' dtype allows
        truth = cross_entropy(**arguments, grad_loss=grad_loss)
        gradients = [part[0].abs().max() for part in truth[2:] if part[0].numel() > 0]
        largest = max([float(x) for x in gradients], default=0.0)
        loss_scale = 65536.0
        while loss_scale * largest > _LARGEST_GRADIENT:
            loss_scale /= 2
        grad_loss = grad_loss * loss_scale
    grad_loss = draw.strided(grad_loss)
    call = Call("stamp_kernels.multi_token_cross_entropy", arguments)

    def run() -> dict[str, Any]:
        result = call.make()
        parts = dict(loss=result) if isinstance(result, Tensor) else result._asdict()
        if leaves:
            found = torch.autograd.grad(parts["loss"], list(leaves.values()), grad_loss)
            parts |= {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
        return parts

    def want() -> dict[str, Any]:
        truth: LossTruth = cross_entropy(**arguments, grad_loss=grad_loss)
        # fp16 and bf16 inputs are exact as fp32, and so are the products of the logits.
        wanted: dict[str, Any] = dict(loss=Near(truth.loss[0], dtype, truth.loss[1], arguments["hidden"].dtype))
        if arguments.get("return_step_losses"):
            value, magnitude = truth.step_losses
            wanted["step_losses"] = Near(value, dtype, magnitude, arguments["hidden"].dtype)
        for name, x in leaves.items():
            value, magnitude = getattr(truth, f"d{name}")
            wanted[f"d{name}"] = Near(value, x.dtype, magnitude, arguments["hidden"].dtype)
        return wanted

    return Case(call, run, want)


def shift_targets(draw: Draw) -> Case:
    batch = draw.batch()
    dtype = draw.choice([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
    arguments: dict[str, Any] = dict(
        labels=draw.strided(torch.randint(0, 100, (batch.total,), dtype=torch.int64).to(dtype)),
        cu_seqlens=draw.offsets(batch),
        steps=draw.randint(1, 4),
        stride=draw.choice([1, 1, 3, 50]),
        ignore_index=draw.choice([-100, 5, 2**40]),
    )
    call = Call("stamp_kernels.shift_targets", arguments)
    return Case(call, lambda: dict(targets=call.make()), lambda: dict(targets=shifted(**arguments)))


SUBJECTS = {function.__name__: function for function in (multi_token_cross_entropy, shift_targets)}
