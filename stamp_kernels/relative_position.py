"""T5's relative-position bias: its table, and the bucket of a distance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stamp_kernels.common.exported import exported_dataclass


def relative_position_bucket(
    relative_position: Tensor, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> Tensor:
    """The bucket of each distance, exactly as in Hugging Face's T5 (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each; the other half hold logarithmically growing ranges up to `max_distance`.
    All distances beyond share the last bucket. If bidirectional, keys after the query have buckets of their own;
    otherwise they share the bucket of distance 0.

    Args:
        relative_position: integers of any shape, position of the key minus position of the query.

    Returns:
        int64 buckets in [0, num_buckets), of the same shape.
    """
    offset = torch.zeros_like(relative_position, dtype=torch.int64)
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0).to(torch.int64) * num_buckets
        distance = relative_position.abs()
    else:
        distance = (-relative_position).clamp(min=0)
    num_exact = num_buckets // 2
    # The logarithm is in fp32, as in Hugging Face's T5: another precision puts some distances into other buckets.
    octaves = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (octaves * (num_buckets - num_exact)).to(torch.int64)
    return offset + torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))


# eq=False: comparing tensors gives tensors, so biases compare by identity.
@exported_dataclass(options=("bidirectional", "max_distance"))
@dataclass(frozen=True, eq=False)
class RelativePositionBias:
    """T5's learned bias on attention scores, by the bucket of `positions_k - positions_q`.

    It is a pytree with the table as its only leaf, for torch.export too.

    Attributes:
        table: `[num_buckets, num_heads_q]`, any floating dtype. Its gradient is exact: accumulated in fp32 and cast to
            the table's dtype at the end.
        bidirectional: True for encoders. False for causal decoders, where later keys share bucket 0.
        max_distance: all distances from this one on share the last bucket.

    Raises:
        ValueError: the table is not a floating matrix, num_buckets is too small for one exact and one logarithmic
            bucket per direction, or max_distance is not beyond the exact buckets.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor):
            raise ValueError(f"relative_bias.table must be a tensor, got {type(self.table).__name__}")
        if self.table.dim() != 2 or not self.table.is_floating_point():
            raise ValueError(
                "relative_bias.table must be a floating tensor [num_buckets, num_heads], got "
                f"{list(self.table.shape)} of {self.table.dtype}"
            )
        directions = 2 if self.bidirectional else 1
        num_exact = self.table.shape[0] // directions // 2
        if num_exact < 1 or self.table.shape[0] % directions != 0:
            raise ValueError(
                f"relative_bias.table must have at least {2 * directions} rows in {directions} equal parts, got "
                f"{self.table.shape[0]}"
            )
        if isinstance(self.max_distance, bool) or not isinstance(self.max_distance, int | torch.SymInt):
            raise ValueError(f"relative_bias.max_distance must be an int, got {type(self.max_distance).__name__}")
        if self.max_distance <= num_exact:
            raise ValueError(
                f"relative_bias.max_distance must exceed the {num_exact} exact distances, got {self.max_distance}"
            )
