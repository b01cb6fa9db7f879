"""multi_token_cross_entropy over its sizes, against a loop of F.cross_entropy in float64: steps, vocabularies, rows.

test_cross_entropy.py has the options; here the numbers of steps, classes and ignored rows lie at and around the edges
of what kernels take at a time, in the four ways to share hidden states and weights.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from stamp_kernels import multi_token_cross_entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
WIDTH = 24
# The rows of 0 to N - 1 that have no target.
PATTERNS = {
    "none": lambda row: row < 0,
    "all": lambda row: row >= 0,
    "a prefix": lambda row: row < 70,
    "a suffix": lambda row: row >= 131,
    "every other row": lambda row: row % 2 == 1,
    "whole blocks": lambda row: row // 64 % 2 == 0,
    "all but one row": lambda row: row != 133,
}


class Sharing(NamedTuple):
    """What each step has of its own."""

    hidden: bool = False
    weight: bool = False
    ranges: bool = False


SHARINGS = {
    "weight shared, hidden per step": Sharing(hidden=True),
    "hidden shared, ranges": Sharing(ranges=True),
    "both per step": Sharing(hidden=True, weight=True),
    "all shared": Sharing(),
}


class Problem(NamedTuple):
    """In float64 on the CPU, hidden and weight such as the dtype under test holds them."""

    hidden: Tensor  # [N, D] or [K, N, D]
    weight: Tensor  # [V, D] or [K, V, D]
    targets: Tensor  # [N, K]
    ranges: list[tuple[int, int]] | None  # K


def make_problem(
    dtype: torch.dtype, *, rows: int, steps: int, classes: int, sharing: Sharing = SHARINGS["all shared"]
) -> Problem:
    """All targets are valid, the first and last class among them. Ranges are `classes` wide, one after another."""

    def random(size: int, per_step: bool) -> Tensor:
        return torch.randn(*([steps] if per_step else []), size, WIDTH).to(dtype).double()

    ranges = [(k * classes, (k + 1) * classes) for k in range(steps)] if sharing.ranges else None
    targets = torch.randint(classes, (rows, steps))
    targets[0], targets[-1] = 0, classes - 1
    if sharing.ranges:
        targets += classes * torch.arange(steps)
    weight = random(steps * classes if sharing.ranges else classes, sharing.weight) / 4  # exact: logits of about 1
    return Problem(random(rows, sharing.hidden), weight, targets, ranges)


def ignoring(problem: Problem, pattern: str, steps: slice = slice(None)) -> Problem:
    """Without the targets that the pattern has for these steps; a row without any target is NaN: nothing reads it."""
    ignored = PATTERNS[pattern](torch.arange(len(problem.targets)))
    targets = problem.targets.clone()
    targets[ignored, steps] = -100
    hidden = problem.hidden.masked_fill((targets == -100).all(1, keepdim=True), torch.nan)
    return problem._replace(hidden=hidden, targets=targets)


def reduce(losses: list[Tensor], targets: Tensor, reduction: str) -> Tensor:
    """losses: `[N]` of each step, 0 where ignored."""
    if reduction == "none":
        return torch.stack(losses, dim=1)
    counts = (targets != -100).sum(0).clamp(min=1) if reduction == "mean" else torch.ones(targets.shape[1])
    return sum(loss.sum() / count for loss, count in zip(losses, counts, strict=True))


def gradient_of_loss(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


def by_loop(problem: Problem, reduction: str) -> list[Tensor]:
    """Loss and gradients of hidden and weight."""
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden.nan_to_num(), problem.weight))
    losses = []
    for k in range(problem.targets.shape[1]):
        x, of_step = hidden if hidden.dim() == 2 else hidden[k], weight if weight.dim() == 2 else weight[k]
        start, end = (0, len(of_step)) if problem.ranges is None else problem.ranges[k]
        labels = torch.where(problem.targets[:, k] == -100, -100, problem.targets[:, k] - start)
        losses.append(F.cross_entropy(x @ of_step[start:end].T, labels, reduction="none"))
    loss = reduce(losses, problem.targets, reduction)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), gradient_of_loss(loss.shape))]


def by_op(problem: Problem, reduction: str, device: str, dtype: torch.dtype, memory: str) -> list[Tensor]:
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (problem.hidden, problem.weight))
    loss = multi_token_cross_entropy(
        hidden, weight, problem.targets.to(device), vocab_ranges=problem.ranges, reduction=reduction, memory=memory
    )
    grad = gradient_of_loss(loss.shape).to(device, loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad)]


def check(problem: Problem, device: str, dtype: torch.dtype, reduction: str = "mean", memory: str = "auto") -> None:
    got, want = by_op(problem, reduction, device, dtype, memory), by_loop(problem, reduction)
    for name, out, ref in zip(("loss", "gradient of hidden", "gradient of weight"), got, want, strict=True):
        assert not out.isnan().any(), name
        assert_close(out.cpu(), ref, torch.float32 if name == "loss" else dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", SHARINGS.values(), ids=SHARINGS)
@pytest.mark.parametrize("steps", range(1, 9))
def test_steps(steps, sharing, dtype, device):
    check(make_problem(dtype, rows=70, steps=steps, classes=67, sharing=sharing), device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_per_step", [False, True], ids=["all shared", "hidden per step"])
@pytest.mark.parametrize("classes", [1, 255, 256, 1025, 32_000, 152_960])
def test_vocabularies(classes, hidden_per_step, dtype, memory, device):
    sharing = Sharing(hidden=hidden_per_step)
    check(make_problem(dtype, rows=9, steps=2, classes=classes, sharing=sharing), device, dtype, memory=memory)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sharing", SHARINGS.values(), ids=SHARINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ignored_rows(pattern, sharing, reduction, dtype, device):
    problem = make_problem(dtype, rows=300, steps=3, classes=130, sharing=sharing)
    check(ignoring(problem, pattern), device, dtype, reduction)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("sharing", SHARINGS.values(), ids=SHARINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_ignored_by_one_step_alone(pattern, sharing, memory, device):
    """The other steps' targets of these rows count, also where all steps share a softmax."""
    problem = make_problem(torch.float32, rows=300, steps=3, classes=130, sharing=sharing)
    check(ignoring(problem, pattern, steps=slice(1, 2)), device, torch.float32, memory=memory)
