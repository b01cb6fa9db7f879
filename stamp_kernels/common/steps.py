"""The prediction steps of a cross-entropy: the reductions of their losses, and the classes of each."""

from collections.abc import Sequence

# By the numbers of at::Reduction.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def step_ranges(vocab_ranges: Sequence[int] | None, num_steps: int, vocab_size: int) -> list[tuple[int, int]]:
    """(start, end) of every step, from the ops' flat list; the whole vocabulary where that is None."""
    if vocab_ranges is None:
        return [(0, vocab_size)] * num_steps
    return list(zip(vocab_ranges[::2], vocab_ranges[1::2], strict=True))
