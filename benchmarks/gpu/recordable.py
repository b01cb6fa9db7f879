"""Everything that the GPU check launches, so that bundle.py can compile its kernels on a machine without a GPU."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from alternatives import QUESTIONS, Question, Variant
from workloads import CHECKED, TIMED, Workload

CHECKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of the check
TIMED_DTYPE = torch.bfloat16


def recordable() -> Iterator[tuple[str, Callable[[torch.device], object]]]:
    """Yields (name, run(device)) for each workload in its dtypes and for each alternative, without the training."""
    for workload in TIMED:
        yield f"{workload.name} timed", partial(_run_both, workload, TIMED_DTYPE)
    for dtype in CHECKED_DTYPES:
        for workload in CHECKED:
            yield f"{workload.name} {dtype}", partial(_run, workload, dtype)
    for question in QUESTIONS:
        for variant in question.variants:
            yield f"{question.name}: {variant.name}", partial(_run_variant, question, variant)


def _run(workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
    workload.run(workload.inputs(device, dtype))


def _run_both(workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
    """Runs the forward separately too: without gradients a cross-entropy may launch other kernels."""
    x = workload.inputs(device, dtype)
    workload.forward(x)
    workload.run(x)


def _run_variant(question: Question, variant: Variant, device: torch.device) -> None:
    with variant.applied():
        _run_both(question.workload, TIMED_DTYPE, device)
