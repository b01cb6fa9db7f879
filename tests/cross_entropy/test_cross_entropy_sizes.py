"""multi_token_cross_entropy over its sizes: steps, vocabularies and patterns of ignored rows.

test_cross_entropy.py has the options. Here the numbers of steps, classes and ignored rows are at and around the edges
of the kernels' tiles, in the four ways to share hidden states and weights.
"""

from typing import Any

import torch
from cross_entropy_cases import Case, assert_results_close, converted, expected_results, results
from devices import every_device
from pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16]
MEMORY = ["auto", "minimal"]
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
# What each step has for itself.
SHARINGS = {
    "weight shared, hidden per step": ("hidden",),
    "hidden shared, ranges": ("ranges",),
    "both per step": ("hidden", "weight"),
    "all shared": (),
}


def make_inputs(dtype: torch.dtype, *, rows: int, steps: int, classes: int, per_step: tuple[str, ...]) -> dict:
    """All targets are valid, the first and last class among them. Ranges are `classes` wide, one after another."""
    options, vocab_size = (), classes
    if "ranges" in per_step:
        vocab_size = steps * classes
        options = (("vocab_ranges", [(k * classes, (k + 1) * classes) for k in range(steps)]),)
    case = Case(per_step, options=options, num_rows=rows, num_steps=steps, vocab_size=vocab_size, width=24, ignored=0)
    inputs = case.inputs(dtype)
    first = torch.tensor([start for start, _ in dict(options).get("vocab_ranges", [(0, classes)] * steps)])
    inputs["targets"][0], inputs["targets"][-1] = first, first + classes - 1
    return inputs


def ignoring(inputs: dict[str, Any], pattern: str, steps: slice = slice(None)) -> dict[str, Any]:
    """The steps ignore the pattern's rows; a row without any target is NaN, because nothing may read it."""
    targets = inputs["targets"].clone()
    targets[PATTERNS[pattern](torch.arange(len(targets))), steps] = -100
    hidden = inputs["hidden"].detach().masked_fill((targets == -100).all(1, keepdim=True), torch.nan)
    return inputs | {"hidden": hidden.requires_grad_(), "targets": targets}


def check(inputs: dict[str, Any], device: str, reduction: str = "mean", memory: str = "auto") -> None:
    got = results(converted(inputs, device=device) | {"memory": memory}, reduction)
    assert_results_close(got, expected_results(inputs, reduction))


@every_device
@pairwise(steps=range(1, 9), sharing=SHARINGS, dtype=DTYPES)
def test_steps(steps, sharing, dtype, device):
    check(make_inputs(dtype, rows=70, steps=steps, classes=67, per_step=SHARINGS[sharing]), device)


@every_device
@pairwise(classes=[1, 255, 256, 1025, 32_000, 152_960], per_step=[(), ("hidden",)], dtype=DTYPES, memory=MEMORY)
def test_vocabularies(classes, per_step, dtype, memory, device):
    inputs = make_inputs(dtype, rows=9, steps=2, classes=classes, per_step=per_step)
    check(inputs, device, memory=memory)


@every_device
@pairwise(pattern=PATTERNS, sharing=SHARINGS, reduction=["mean", "sum", "none"], dtype=DTYPES, memory=MEMORY)
def test_ignored_rows(pattern, sharing, reduction, dtype, memory, device):
    inputs = make_inputs(dtype, rows=300, steps=3, classes=130, per_step=SHARINGS[sharing])
    check(ignoring(inputs, pattern), device, reduction, memory)


@every_device
@pairwise(pattern=PATTERNS, sharing=SHARINGS, memory=MEMORY)
def test_rows_that_one_step_ignores(pattern, sharing, memory, device):
    """The other steps' targets of these rows count, also where all steps share a softmax."""
    inputs = make_inputs(torch.float32, rows=300, steps=3, classes=130, per_step=SHARINGS[sharing])
    check(ignoring(inputs, pattern, steps=slice(1, 2)), device, memory=memory)
