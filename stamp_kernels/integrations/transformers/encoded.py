"""How a decoder finds the packed states of its encoder, whatever the code between the two hands on.

A padded encoder output carries its packed states as an attribute of the tensor. A decoder that is given the same
tensor reads the packed states: without packing them again, and without the mask that the caller made before tokens were
pruned. A tensor that was changed on the way has no attribute, and its mask decides.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.packed import PackedBatch

__all__ = ["PackedStates", "SharedSource", "states_behind", "with_states_behind"]


class PackedStates(NamedTuple):
    """The packed states of a padded tensor, and the bool mask `[B, S']` of their places in it."""

    packed: PackedBatch
    mask: Tensor


class SharedSource:
    """Encoded histories that several decoder sequences read: the beams of a search.

    Attributes:
        packed: the states, one sequence for each history. Decoder row `r` of `R` reads sequence `r * B // R`.
        keys_and_values: what the cross attentions have made of them, by the identity of the module.
    """

    def __init__(self, packed: PackedBatch) -> None:
        self.packed = packed
        self.keys_and_values: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_sequences(self) -> int:
        return self.packed.cu_seqlens.shape[0] - 1

    def offsets(self, num_rows: int) -> Tensor:
        """int32 `[B + 1]`: the decoder's rows of each history."""
        batch = self.num_sequences
        steps = torch.arange(batch + 1, dtype=torch.int32, device=self.packed.values.device)
        return steps * (num_rows // max(batch, 1))


def with_states_behind(states: Tensor, behind: PackedStates | SharedSource) -> Tensor:
    """The same tensor, which a decoder recognizes. Graphs of torch.compile do not know attributes of tensors."""
    if not torch.compiler.is_compiling():
        states.stamp_behind = behind  # type: ignore[attr-defined]
    return states


def states_behind(states: Tensor | None) -> PackedStates | SharedSource | None:
    return None if states is None or torch.compiler.is_compiling() else getattr(states, "stamp_behind", None)
