"""Cases of the multi-token cross-entropy and an oracle that computes step by step, for the loss's tests."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels.common.steps import REDUCTIONS

RANGES = ((0, 17), (17, 29), (5, 53))


@dataclass(frozen=True)
class Case:
    """Inputs of one loss.

    Attributes:
        per_step: which of hidden, weight and bias each step has for itself; the steps share the others.
        bias: whether there is one.
        options: keyword arguments of `multi_token_cross_entropy`.
        ignored: the share of targets that are ignored.
    """

    per_step: tuple[str, ...] = ()
    bias: bool = False
    options: tuple[tuple[str, object], ...] = ()
    num_rows: int = 37
    num_steps: int = 3
    vocab_size: int = 53
    width: int = 20
    ignored: float = 1 / 3

    def inputs(self, dtype: torch.dtype = torch.float64, bias_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Keyword arguments of `multi_token_cross_entropy`; hidden, weight and bias are leaves. Logits are about 2."""
        options = dict(self.options)
        shapes = {"hidden": (self.num_rows, self.width), "weight": (self.vocab_size, self.width)}
        if self.bias:
            shapes["bias"] = (self.vocab_size,)
        inputs = {}
        for name, shape in shapes.items():
            x = torch.randn((self.num_steps, *shape) if name in self.per_step else shape, dtype=torch.float64)
            if name == "weight":
                x *= 2 / self.width**0.5
            inputs[name] = x.to(bias_dtype or dtype if name == "bias" else dtype).requires_grad_()
        ranges = options.get("vocab_ranges", ((0, self.vocab_size),) * self.num_steps)
        targets = torch.stack([torch.randint(start, end, (self.num_rows,)) for start, end in ranges], dim=1)
        ignored = torch.rand(targets.shape) < self.ignored
        inputs["targets"] = targets.masked_fill(ignored, options.get("ignore_index", -100))
        return inputs | options


CASES = {
    "shared": Case(),
    "hidden_per_step": Case(("hidden",)),
    "weight_per_step": Case(("weight",), bias=True),
    "all_per_step": Case(("hidden", "weight", "bias"), bias=True),
    "bias_per_step": Case(("bias",), bias=True),
    "step_weights": Case(options=(("step_weights", (1.0, 0.0, 0.25)),)),
    "ranges": Case(("hidden",), options=(("vocab_ranges", RANGES),)),
    "ranges_bias": Case(("bias",), bias=True, options=(("vocab_ranges", RANGES), ("label_smoothing", 0.1))),
    "label_smoothing": Case(options=(("label_smoothing", 0.1),)),
    "z_loss": Case(options=(("z_loss", 0.01),)),
    "softcap": Case(options=(("softcap", 2.0),)),
    "ignore_index_in_range": Case(options=(("ignore_index", 7),)),
    "everything": Case(
        ("hidden", "weight", "bias"),
        bias=True,
        options=(
            ("step_weights", (0.5, 2.0, 1.0)),
            ("vocab_ranges", RANGES),
            ("ignore_index", -1),
            ("label_smoothing", 0.2),
            ("z_loss", 0.02),
            ("softcap", 3.0),
        ),
    ),
    "all_ignored": Case(bias=True, ignored=1.0),
    "no_rows": Case(("hidden",), bias=True, num_rows=0),
}


class DenseLoss(NamedTuple):
    """What the forward op returns; without a reduction step_losses and step_scale are empty."""

    loss: Tensor  # a scalar, or [N, K] without a reduction
    step_losses: Tensor  # [K]
    step_scale: Tensor  # [K], the gradient of the loss with respect to the loss of one row
    lse: Tensor  # [K, N], 0 on ignored rows


def dense_cross_entropy(
    hidden, weight, targets, *, bias=None, step_weights=None, vocab_ranges=None, ignore_index=-100,
    label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean",
) -> DenseLoss:  # fmt: skip
    """Step by step with torch's cross-entropy of all logits, the z-loss by its formula."""
    num_steps = targets.shape[1]
    losses, lse = [], []
    is_valid = targets != ignore_index
    for k in range(num_steps):
        start, end = (0, weight.shape[-2]) if vocab_ranges is None else vocab_ranges[k]
        hidden_k, weight_k = (x if x.dim() == 2 else x[k] for x in (hidden, weight))
        bias_k = bias if bias is None or bias.dim() == 1 else bias[k]
        valid = is_valid[:, k]
        hidden_k = hidden_k.masked_fill(~valid[:, None], 0)  # nothing may read it
        logits = F.linear(hidden_k, weight_k[start:end], None if bias_k is None else bias_k[start:end])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        classes = torch.where(valid, targets[:, k] - start, -1)
        lse_k = logits.logsumexp(1).masked_fill(~valid, 0)
        loss = F.cross_entropy(logits, classes, ignore_index=-1, label_smoothing=label_smoothing, reduction="none")
        losses.append(loss + z_loss * lse_k.square())
        lse.append(lse_k.detach())
    losses, lse = torch.stack(losses, dim=1), torch.stack(lse)
    if reduction == "none":
        return DenseLoss(losses, hidden.new_empty(0), hidden.new_empty(0), lse)
    weights = torch.as_tensor((1.0,) * num_steps if step_weights is None else step_weights, dtype=hidden.dtype)
    step_scale = weights / is_valid.sum(0).clamp(min=1) if reduction == "mean" else weights
    step_losses = losses.sum(0) / (is_valid.sum(0).clamp(min=1) if reduction == "mean" else 1)
    return DenseLoss((weights * step_losses).sum(), step_losses.detach(), step_scale, lse)


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    """What has a gradient."""
    return [inputs[name] for name in ("hidden", "weight", "bias") if name in inputs]


def gradients(loss: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of the leaves, for a fixed random gradient of the loss."""
    grad = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return torch.autograd.grad(loss, leaves(inputs), grad.to(loss.device, loss.dtype))


def converted(inputs: dict[str, Any], dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Any]:
    """The same values as new leaves, in `dtype` (None: their own) on `device`."""
    moved = {name: x.to(device) for name, x in inputs.items() if isinstance(x, Tensor)}
    for name in ("hidden", "weight", "bias"):
        if name in moved:
            moved[name] = moved[name].detach().to(dtype or moved[name].dtype).requires_grad_()
    return inputs | moved


def _named(loss: Tensor, step_losses: Tensor | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
    names = [f"d{name}" for name in ("hidden", "weight", "bias") if name in inputs]
    results = {"loss": loss.detach()} | ({} if step_losses is None else {"step_losses": step_losses})
    return results | dict(zip(names, gradients(loss, inputs), strict=True))


def expected_results(inputs: dict[str, Any], reduction: str = "mean") -> dict[str, Tensor]:
    """loss, step_losses (with a reduction) and gradients of the same values in float64 on the CPU, by the oracle."""
    exact = converted(inputs, torch.float64)
    options = {name: x for name, x in exact.items() if name != "memory"}
    dense = dense_cross_entropy(**options, reduction=reduction)
    return _named(dense.loss, None if reduction == "none" else dense.step_losses, exact)


def results(inputs: dict[str, Any], reduction: str = "mean") -> dict[str, Tensor]:
    """The same by `multi_token_cross_entropy`."""
    if reduction == "none":
        return _named(multi_token_cross_entropy(**inputs, reduction=reduction), None, inputs)
    output = multi_token_cross_entropy(**inputs, reduction=reduction, return_step_losses=True)
    assert not output.step_losses.requires_grad
    return _named(*output, inputs)


def assert_results_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Every part by relative norm, to the bound of its dtype."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        try:
            assert_close(got[name].cpu(), expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_matches_dense(inputs: dict[str, Any], reduction: str = "mean") -> None:
    """Losses and gradients of `multi_token_cross_entropy` are the oracle's and have the right dtypes."""
    got = results(inputs, reduction)
    loss_dtype = torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32
    assert got["loss"].dtype == got.get("step_losses", got["loss"]).dtype == loss_dtype
    for name in ("hidden", "weight", "bias"):
        assert name not in inputs or got[f"d{name}"].dtype == inputs[name].dtype
    assert_results_close(got, expected_results(inputs, reduction))


# Arguments of the raw ops


def forward_arguments(inputs: dict[str, Any], reduction: str = "mean") -> tuple:
    """Of `multi_token_cross_entropy_forward`, in the order of its schema."""
    ranges, weights = inputs.get("vocab_ranges"), inputs.get("step_weights")
    given_as_tensor = isinstance(weights, Tensor)
    return (
        *(inputs[name].detach() for name in ("hidden", "weight", "targets")),
        inputs["bias"].detach() if "bias" in inputs else None,
        None if given_as_tensor else weights,
        weights if given_as_tensor else None,
        None if ranges is None else list(itertools.chain(*ranges)),
        inputs.get("ignore_index", -100),
        inputs.get("label_smoothing", 0.0),
        inputs.get("z_loss", 0.0),
        inputs.get("softcap"),
        REDUCTIONS[reduction],
    )


def backward_arguments(inputs: dict[str, Any], needs: tuple[bool, ...], reduction: str = "mean") -> tuple:
    """Of `multi_token_cross_entropy_backward`, after a forward pass of the op."""
    hidden, weight, targets, bias, _, _, *options, _ = arguments = forward_arguments(inputs, reduction)
    loss, _, step_scale, lse = torch.ops.stamp.multi_token_cross_entropy_forward(*arguments)
    return torch.ones_like(loss), hidden, weight, targets, bias, lse, step_scale, *options, *needs
