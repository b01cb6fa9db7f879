"""Cross-entropy family: loss and gradients of hidden and weight, against what a user would run instead.

    pytest benchmarks/micro/bench_cross_entropy.py --benchmark-only --benchmark-json=cross_entropy.json
    python benchmarks/table.py cross_entropy.json

The floor counts three products for the logits and the two gradients, and no logits in memory.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_work import KernelWork
from torch import Tensor

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels.profiling.cross_entropy_peers import chunked, full_logits, linear_cross_entropy


class Shape(NamedTuple):
    """Rows, width, vocabulary, and steps, each with hidden states of its own."""

    rows: int
    width: int
    vocabulary: int
    steps: int = 1


ON_GPU = torch.cuda.is_available()
ROWS = 32_768 if ON_GPU else 4096
SHAPES = [
    Shape(ROWS, 128, 1024),
    Shape(ROWS, 128, 4096),
    Shape(ROWS, 128, 32_768),
    Shape(ROWS, 128, 1024, steps=4),
    Shape(ROWS, 512, 32_000),
]
LEVELS = [(256 * level, 256 * (level + 1)) for level in range(4)]


def auto(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return multi_token_cross_entropy(hidden, weight, targets)


def minimal(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return multi_token_cross_entropy(hidden, weight, targets, memory="minimal")


def by_level(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return multi_token_cross_entropy(hidden, weight, targets, vocab_ranges=LEVELS)


PEERS = {
    "multi_token_cross_entropy": auto,
    'memory="minimal"': minimal,
    "F.cross_entropy": full_logits,
    "F.linear_cross_entropy": linear_cross_entropy,
    "chunked, recomputed": chunked,
}


def run(measured, peers, implementation, hidden, weight, targets, case, classes_per_step) -> None:
    if implementation == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    rows, steps = targets.shape
    flops = 6 * rows * steps * classes_per_step * weight.shape[1]
    measured(
        lambda: torch.autograd.grad(peers[implementation](hidden, weight, targets), (hidden, weight)),
        case=case,
        implementation=implementation,
        kernels=[KernelWork(flops, 2 * (hidden.nbytes + weight.nbytes))],
        tokens=rows * steps,
        is_baseline=implementation == "multi_token_cross_entropy",
        min_rounds=3,
    )


@pytest.mark.parametrize("implementation", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_cross_entropy(measured, device, dtype, shape, implementation):
    rows, width, vocabulary, steps = shape
    hidden = torch.randn(steps, rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows, steps), device=device)
    case = f"cross-entropy, {rows} rows x {steps}, width {width}, vocabulary {vocabulary}, forward+backward"
    run(measured, PEERS, implementation, hidden, weight, targets, case, vocabulary)


@pytest.mark.parametrize("implementation", ["multi_token_cross_entropy", "F.cross_entropy", "F.linear_cross_entropy"])
def test_levels_of_a_semantic_id(measured, device, dtype, implementation):
    """Four codebooks of 256: ours computes each level's own, the others all 1,024."""
    hidden = torch.randn(ROWS, 128, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(1024, 128, device=device) / 128**0.5).to(dtype).requires_grad_()
    targets = torch.stack([torch.randint(*level, (ROWS,), device=device) for level in LEVELS], dim=1)
    peers = PEERS | {"multi_token_cross_entropy": by_level}
    case = f"cross-entropy, {ROWS} rows, 4 levels of 256, width 128, forward+backward"
    run(measured, peers, implementation, hidden, weight, targets, case, 256)
