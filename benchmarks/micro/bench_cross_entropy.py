"""Cross-entropy family: loss and gradients of hidden and weight, against what a user would run instead.

    pytest benchmarks/micro/bench_cross_entropy.py --benchmark-only --benchmark-json=cross_entropy.json
    python benchmarks/table.py cross_entropy.json

The floor counts three products, for the logits and the two gradients, and no logits in memory. Logits that all targets
share count once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_work import KernelWork

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels.profiling.peers import cross_entropy as peers
from stamp_kernels.profiling.peers.availability import PeerUnavailableError
from stamp_kernels.profiling.peers.cross_entropy import CrossEntropyProblem, LossFunction

ON_GPU = torch.cuda.is_available()
ROWS = 32_768 if ON_GPU else 4096
LARGE_FLOPS = 1e11  # from here on a step takes about a second on a CPU


class Case(NamedTuple):
    """Rows, width and vocabulary; the steps, and what each of them has for itself."""

    rows: int
    width: int
    vocabulary: int
    steps: int = 1
    hidden_per_step: bool = False
    codebooks: bool = False


CASES = {
    "vocabulary 1,024": Case(ROWS, 128, 1024),
    "vocabulary 4,096": Case(ROWS, 128, 4096),
    "vocabulary 32,768": Case(ROWS, 128, 32_768),
    "vocabulary 32,000": Case(ROWS, 512, 32_000),
    "wide, vocabulary 4,096": Case(ROWS, 1024, 4096),
    "4 steps, hidden states of their own": Case(ROWS, 128, 1024, steps=4, hidden_per_step=True),
    "4 targets of one softmax": Case(ROWS, 128, 1024, steps=4),
    "4 levels of 256": Case(ROWS, 128, 1024, steps=4, hidden_per_step=True, codebooks=True),
    "4 tiny heads": Case(256, 128, 256, steps=4, hidden_per_step=True),
}
if ON_GPU:
    CASES["a language model's head"] = Case(16_384, 1024, 152_960)


def auto(problem: CrossEntropyProblem) -> LossFunction:
    ranges = problem.vocab_ranges
    return lambda hidden, weight: multi_token_cross_entropy(hidden, weight, problem.targets, vocab_ranges=ranges)


def minimal(problem: CrossEntropyProblem) -> LossFunction:
    ranges = problem.vocab_ranges
    return lambda hidden, weight: multi_token_cross_entropy(
        hidden, weight, problem.targets, vocab_ranges=ranges, memory="minimal"
    )


def whole_vocabulary(problem: CrossEntropyProblem) -> LossFunction:
    """Without known codebooks: another loss, whose softmax also has the codes of the other codebooks."""
    if problem.codebook_sizes is None:
        raise PeerUnavailableError("the case has no codebooks")
    return peers.full_logits(dataclasses.replace(problem, codebook_sizes=None))


IMPLEMENTATIONS = {
    "multi_token_cross_entropy": auto,
    'memory="minimal"': minimal,
    "F.cross_entropy": peers.full_logits,
    "F.cross_entropy, all codebooks": whole_vocabulary,
    "F.linear_cross_entropy, chunks": peers.linear_cross_entropy,
    "chunked torch, recomputed": peers.chunked_recomputed,
    "chunked torch, in place": peers.chunked,
}
if ON_GPU:
    IMPLEMENTATIONS |= {
        "compiled F.cross_entropy": peers.compiled_full_logits,
        "compiled chunked torch": peers.compiled_chunked,
        "Liger": peers.liger,
        "cut_cross_entropy": peers.cut_cross_entropy,
    }
COMPILED = ("compiled F.cross_entropy", "compiled chunked torch")
# Compilation takes longer than all other cases: one case for each way to divide the work.
CASES_TO_COMPILE = ("vocabulary 1,024", "vocabulary 32,000", "4 tiny heads", "a language model's head")


def make_problem(case: Case, device: torch.device, dtype: torch.dtype) -> CrossEntropyProblem:
    torch.manual_seed(0)
    rows, width, vocabulary, steps, hidden_per_step, codebooks = case
    hidden = torch.randn(*([steps] if hidden_per_step else []), rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    num_classes = vocabulary // steps if codebooks else vocabulary
    targets = torch.randint(num_classes, (rows, steps), device=device)
    if codebooks:
        targets += num_classes * torch.arange(steps, device=device)
    return CrossEntropyProblem(hidden, weight, targets, (num_classes,) * steps if codebooks else None)


def prepare(implementation: str, name: str, problem: CrossEntropyProblem) -> LossFunction:
    is_large = CASES[name].vocabulary > 4096
    if implementation in COMPILED and name not in CASES_TO_COMPILE:
        pytest.skip("compilation takes longer than all other cases")
    if implementation == "chunked torch, recomputed" and is_large:
        pytest.skip("the weight's gradient, computed again for every row chunk, takes longer than all other cases")
    if implementation == "cut_cross_entropy":  # one child process probes all cases
        problems = (make_problem(case, torch.device("meta"), problem.hidden.dtype) for case in CASES.values())
        peers.probe_cut_cross_entropy([shape for other in problems for shape in other.shapes()])
    try:
        return IMPLEMENTATIONS[implementation](problem)
    except PeerUnavailableError as error:
        pytest.skip(str(error))


# In stacked decorators the first parameter varies fastest: the implementations of one case run next to each other.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_cross_entropy(
    measured: Callable[..., None], device: torch.device, dtype: torch.dtype, name: str, implementation: str
) -> None:
    case = CASES[name]
    problem = make_problem(case, device, dtype)
    loss_of, inputs = prepare(implementation, name, problem), problem.leaves()
    flops = sum(6 * rows * width * classes for rows, width, classes, _ in problem.shapes())
    measured(
        lambda: torch.autograd.grad(loss_of(*inputs), inputs),
        case=f"cross-entropy, {case.rows:,} rows, width {case.width}, {name}, forward+backward",
        implementation=implementation,
        kernels=[KernelWork(flops, 2 * sum(x.nbytes for x in inputs))],
        tokens=problem.targets.numel(),
        is_baseline=implementation == "multi_token_cross_entropy",
        min_rounds=2 if flops > LARGE_FLOPS and not ON_GPU else 3,
    )
