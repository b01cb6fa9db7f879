"""Token ids of semantic-ID codes."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stamp_kernels.ops._checks import check_count, check_range

MAX_SIZE = 2**24  # of width 128, the embeddings of as many tokens take 8 GiB


@dataclass(frozen=True)
class Vocabulary:
    """One token for each code of each level: `1 + level * codebook_size + code`.

    Token 0 is the padding and the decoder's start token.

    Raises:
        ValueError: `codes_per_item` or `codebook_size` is below 1, or there would be more than 2**24 tokens.
    """

    codes_per_item: int
    codebook_size: int
    pad_id: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_count("codes_per_item", self.codes_per_item, 1)
        check_count("codebook_size", self.codebook_size, 1)
        if self.size > MAX_SIZE:
            raise ValueError(
                f"codes_per_item * codebook_size must be below {MAX_SIZE}, got {self.codes_per_item} * "
                f"{self.codebook_size}: number the codes of each level from 0 without gaps"
            )

    @property
    def size(self) -> int:
        """The number of tokens."""
        return 1 + self.codes_per_item * self.codebook_size

    def level_range(self, level: int) -> tuple[int, int]:
        """The half-open range of the tokens of a level, which counts from 0.

        Raises:
            ValueError: there is no such level.
        """
        check_range("level", level, 0, self.codes_per_item, below_high=True)
        start = 1 + level * self.codebook_size
        return start, start + self.codebook_size

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """Tokens, int64 `[..., codes_per_item]`, of integer codes `[..., codes_per_item]`.

        Raises:
            ValueError: the last dimension is not `codes_per_item`, or a code is outside `[0, codebook_size)`.
        """
        if codes.ndim == 0 or codes.shape[-1] != self.codes_per_item:
            raise ValueError(f"codes must have shape [..., {self.codes_per_item}], got {list(codes.shape)}")
        if codes.size and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise ValueError(f"codes must be in [0, {self.codebook_size}), got {codes.min()} to {codes.max()}")
        tokens: np.ndarray = codes.astype(np.int64) + (1 + np.arange(self.codes_per_item) * self.codebook_size)
        return tokens
