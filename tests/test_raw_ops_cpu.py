"""What the compiled CPU ops refuse when they are called as `torch.ops.stamp.*`, without the public functions' checks.

A case that is not refused may crash the process: the kernels read and write by these sizes.
"""

import pytest
import torch
from raw_op_cases import GOOD, run, wrong_tensors, wrong_values

pytestmark = pytest.mark.core


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_are_accepted(op):
    run(op, GOOD[op])


TENSOR_ARGUMENTS = [(op, name) for op in GOOD for name, value in GOOD[op].items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("op", "name"), TENSOR_ARGUMENTS)
def test_wrong_tensor_is_named(op, name):
    """Of another dtype, rank or size, or in a storage that was freed or is too small."""
    for what, tensor in wrong_tensors(name, GOOD[op][name]):
        with pytest.raises(RuntimeError, match=rf"\b{name} must "):
            run(op, GOOD[op] | {name: tensor})
            pytest.fail(f"{op} accepts {name}: {what}")


@pytest.mark.parametrize("op", GOOD)
def test_wrong_value_is_named(op):
    cases = [(changes, message) for of_op, changes, message in wrong_values() if of_op == op]
    assert cases
    for changes, message in cases:
        with pytest.raises(RuntimeError, match=message):
            run(op, GOOD[op] | changes)
            pytest.fail(f"{op} accepts {changes}")


def test_empty_list_of_rows():
    """It has no tensor, so the dispatcher finds the op by the other arguments."""
    for op, name in (("gather_tokens_forward", "x"), ("gather_tokens_backward", "grad"), ("prune", "x")):
        with pytest.raises(RuntimeError, match=f"{name} must have at least one tensor, got an empty list"):
            run(op, GOOD[op] | {name: []})


def test_views_within_a_storage_are_accepted():
    """Strided, expanded and offset views need no more memory than they reach."""
    x = torch.arange(40.0).view(10, 4)[1::2, 1:3]
    (rows,) = torch.ops.stamp.gather_tokens_forward([x], torch.tensor([4, 0]))
    assert torch.equal(rows, x[[4, 0]])
    (rows,) = torch.ops.stamp.gather_tokens_forward([torch.ones(1).expand(2**40)], torch.tensor([2**40 - 1, -1]))
    assert rows.tolist() == [1.0, 0.0]
