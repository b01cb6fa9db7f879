"""How a decoder finds the packed layout of its encoder's states, whatever the code between the two hands on.

The padded states that a stamped encoder returns carry their layout as an attribute of the tensor. A decoder that is
given the same tensor knows where the tokens are: without reading a mask, which waits for the device, and whatever mask
the caller made before tokens were pruned. It reads the tensor itself, so that gradients flow through it. A tensor that
was changed on the way, in place too, is not recognized, and its mask decides.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout, version_of
from stamp_kernels.packed import PackedBatch

__all__ = ["PackedStates", "SharedSource", "check_mask", "source_behind", "states_behind", "with_states_behind"]


class PackedStates(NamedTuple):
    """The layout of a padded tensor of states.

    Attributes:
        packed: the states packed.
        layout: their places in the tensor.
        inputs: the layout of the inputs, before pruning; None for packed inputs.
    """

    packed: PackedBatch
    layout: PaddedLayout
    inputs: PaddedLayout | None = None

    def read(self, states: Tensor) -> PackedBatch:
        """The packed states, read from the padded tensor."""
        return replace(self.packed, values=self.layout.pack(states, 0))

    def mask_beside(self, mask: Tensor | None) -> Tensor:
        """The bool mask `[B, S']` of the states that a decoder reads if its caller gives this mask: that of the layout
        if it says nothing new.

        Raises:
            ValueError: the mask is neither that of the inputs nor that of the states, and has another shape than these.
        """
        known = [layout for layout in (self.layout, self.inputs) if layout is not None]
        if mask is None or any(layout.is_made_with(mask) for layout in known):
            return self.layout.mask
        check_mask(self.layout.mask.shape, mask)
        return mask.bool() & self.layout.mask

    def are_in(self, states: Tensor) -> bool:
        """Whether the tensor still has these states."""
        return torch.equal(self.read(states).values, self.packed.values)


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
        states.stamp_behind = (behind, version_of(states))  # type: ignore[attr-defined]
    return states


def states_behind(states: Tensor | None) -> PackedStates | SharedSource | None:
    if states is None or torch.compiler.is_compiling():
        return None
    behind, version = getattr(states, "stamp_behind", (None, None))
    if isinstance(behind, PackedStates) and states.is_inference():  # has no version
        return behind if behind.are_in(states) else None
    return behind if version == version_of(states) else None


def source_behind(states: Tensor | None) -> SharedSource | None:
    """The same for a SharedSource only, without reading contents."""
    behind, _ = (None, None) if torch.compiler.is_compiling() else getattr(states, "stamp_behind", (None, None))
    return behind if isinstance(behind, SharedSource) else None


def check_mask(shape: torch.Size, mask: Tensor) -> None:
    """Raises:
    ValueError: the mask of a decoder's encoder states `[B, S', ...]` has another shape, for example that of histories
        before pruning.
    """
    if mask.shape != shape[:2]:
        raise ValueError(
            f"encoder_attention_mask must have shape {list(shape[:2])}, that of the encoder's states, got "
            f"{list(mask.shape)}: with pruning give the attention_mask of the encoder's output, which has the kept "
            "tokens"
        )
