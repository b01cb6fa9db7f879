"""The compiled cross-entropy of the CPU: every instruction set, many tiles and row chunks, bits, memory.

test_cross_entropy.py checks what the loss is; here is what only these kernels could get wrong.
"""

from typing import Any

import pytest
import torch
from closeness import assert_close
from cross_entropy_cases import (
    Case,
    assert_matches_dense,
    assert_results_close,
    converted,
    dense_cross_entropy,
    expected_results,
    forward_arguments,
    gradients,
    leaves,
    results,
)
from devices import CAPABILITIES
from pairwise import pairwise

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels.profiling.measure import peak_bytes

SIZES = [(1, 1, 1), (300, 20, 255), (33, 33, 256), (290, 128, 1025), (70, 16, 3000), (5, 100, 31)]
MEMORY = ["auto", "minimal"]


def make_inputs(
    rows: int, width: int, classes: int, steps: int = 1, dtype: torch.dtype = torch.float32, **options: object
) -> dict[str, Any]:
    """Hidden states of each step, a shared weight and bias; a quarter of the targets is ignored."""
    case = Case(("hidden",), True, tuple(options.items()), rows, steps, classes, width, ignored=0.25)
    return case.inputs(dtype)


@pytest.mark.core
@pairwise(
    indirect=["capability"],
    size=SIZES,
    dtype=[torch.float32, torch.float16, torch.bfloat16, torch.float64],
    capability=CAPABILITIES,
)
def test_every_instruction_set(capability, size, dtype):
    rows, width, classes = size
    assert_matches_dense(make_inputs(rows, width, classes, steps=2, dtype=dtype))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_steps(steps, memory):
    assert_matches_dense(make_inputs(150, 24, 300, steps, memory=memory))


def test_a_large_vocabulary():
    assert_matches_dense(make_inputs(260, 32, 32_000))


@pairwise(
    indirect=["capability"],
    options=[{}, {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 1e-3}],
    memory=MEMORY,
    capability=CAPABILITIES,
)
def test_many_tiles(capability, options, memory):
    """Several row chunks and class chunks, and rows whose first targets are ignored, with shared hidden states."""
    case = Case((), True, tuple(options.items()), 700, 3, 4500, 24, ignored=0.25)
    inputs = case.inputs(torch.float32) | {"memory": memory}
    inputs["targets"][:200, :2] = -100
    assert_matches_dense(inputs)


@pytest.mark.parametrize("width", [1000, 4100])
def test_wide_rows(width):
    """Chunks hold fewer rows and classes."""
    assert_matches_dense(make_inputs(150, width, 1500))


def test_chunks_of_classes_ruled_out_by_bias(capability):
    """The largest logit of such a chunk is -inf, and the difference of two is NaN."""
    inputs = make_inputs(40, 8, 600)
    with torch.no_grad():
        inputs["bias"][:200], inputs["bias"][400:500] = -torch.inf, -torch.inf
    targets = inputs["targets"]
    targets[targets >= 0] = 200 + targets[targets >= 0] % 200
    assert_matches_dense(inputs)


def test_no_valid_target_anywhere():
    inputs = make_inputs(40, 8, 50, steps=2)
    inputs["targets"].fill_(-100)
    got = results(inputs)
    assert not any(x.any() for x in got.values())


def test_chunks_of_ignored_rows_are_not_read():
    """They are between valid ones and hold NaN."""
    inputs = make_inputs(700, 16, 40)
    inputs["targets"][100:650] = -100
    is_ignored = inputs["targets"][:, 0] == -100
    with torch.no_grad():
        inputs["hidden"][0, is_ignored] = torch.nan
    got = results(inputs)
    assert not got["dhidden"][:, is_ignored].any()
    assert_results_close(got, expected_results(inputs))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("classes", [700, 5000])
def test_thread_count_does_not_change_bits(classes, memory):
    inputs = make_inputs(500, 40, classes, steps=2, memory=memory)
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            runs.append(results(inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.parametrize(("classes", "share"), [(4096, 8), (32_768, 16)])
def test_peak_memory_beyond_inputs_and_gradients(classes, share):
    inputs = Case(num_rows=4096, num_steps=1, vocab_size=classes, width=32).inputs(torch.float32)

    def step() -> None:
        gradients(multi_token_cross_entropy(**inputs), inputs)

    beyond = peak_bytes(step, torch.device("cpu")) - sum(x.nbytes for x in leaves(inputs))
    assert beyond < 4 * 4096 * classes / share


def test_few_rows_of_a_huge_vocabulary():
    """All their logits together are 69 MB, so they are computed twice and never kept."""
    inputs = make_inputs(64, 8, 270_000, memory="auto")
    assert_matches_dense(inputs)

    def step() -> None:
        gradients(multi_token_cross_entropy(**inputs), inputs)

    beyond = peak_bytes(step, torch.device("cpu")) - sum(x.nbytes for x in leaves(inputs))
    assert beyond < 4 * 64 * 270_000 / 2


@pytest.mark.parametrize("width", [20, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kept_gradients_are_not_rounded(dtype, width):
    """They wait for the upstream gradient. A rounding before that product is one too many, and small ones vanish."""
    case = Case(bias=True, options=(("step_weights", (1e-6, 1e-4, 1e-5)),), width=width)
    inputs = case.inputs(dtype)
    _, _, *kept = torch.ops.stamp.multi_token_cross_entropy_with_gradients(*forward_arguments(inputs), *[True] * 3)
    exact = converted(inputs, torch.float64)
    loss = dense_cross_entropy(**exact).loss
    for gradient, want in zip(kept, torch.autograd.grad(loss, leaves(exact)), strict=True):
        assert gradient.dtype == torch.float32
        assert gradient.is_contiguous()
        assert_close(gradient, want)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_gradient_of_the_only_class(z_loss, memory):
    """Its probability is 1: only the z-loss has a gradient, and the rest must not leave rounding errors in it."""
    options = (("vocab_ranges", ((3, 4), (0, 1))), ("label_smoothing", 0.1), ("z_loss", z_loss))
    inputs = Case(bias=True, options=options, num_steps=2, ignored=0.0).inputs(torch.float32) | {"memory": memory}
    want, got = expected_results(inputs), results(inputs)
    for name in ("dhidden", "dweight", "dbias"):
        if z_loss == 0:
            assert not got[name].any()
        else:
            difference = torch.linalg.vector_norm(got[name].double() - want[name])
            assert difference < 1e-6 * torch.linalg.vector_norm(want[name])
