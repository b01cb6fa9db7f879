"""Ragged batches for the tests of every family: empty sequences, single tokens, primes, a long one, tail rows."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """Offsets of a packed batch of `total` rows; those past `cu_seqlens[-1]` are tail rows."""

    lengths: tuple[int, ...]
    tail: int

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths], dtype=torch.int64).cumsum(0).to(torch.int32)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def valid(self) -> int:
        return sum(self.lengths)

    @property
    def total(self) -> int:
        return self.valid + self.tail

    def slices(self) -> list[slice]:
        """Rows of each sequence."""
        starts = [sum(self.lengths[:i]) for i in range(self.num_sequences)]
        return [slice(start, start + n) for start, n in zip(starts, self.lengths, strict=True)]

    def positions(self) -> Tensor:
        """int32 [total]: increasing original positions with gaps, as after pruning; 0 on tail rows."""
        steps = torch.randint(1, 4, (self.total,))
        positions = torch.zeros(self.total, dtype=torch.int32)
        for rows in self.slices():
            positions[rows] = (steps[rows].cumsum(0) - 1).to(torch.int32)
        return positions


# Named batches for parametrised tests.
BATCHES = {
    "ragged": RaggedBatch((5, 0, 1, 13, 2, 7), tail=3),
    "no_tail": RaggedBatch((4, 4, 4), tail=0),
    "one_sequence": RaggedBatch((17,), tail=0),
    "long_among_short": RaggedBatch((1, 2, 97, 3, 1), tail=1),
    "all_empty": RaggedBatch((0, 0), tail=2),
    "no_sequences": RaggedBatch((), tail=0),
}


def ragged_batches(max_batch: int = 6, max_length: int = 12) -> st.SearchStrategy[RaggedBatch]:
    """Hypothesis: any batch of up to `max_batch` sequences of up to `max_length` tokens, with tail rows."""
    lengths = st.lists(st.integers(0, max_length), max_size=max_batch).map(tuple)
    return st.builds(RaggedBatch, lengths, tail=st.integers(0, 3))
