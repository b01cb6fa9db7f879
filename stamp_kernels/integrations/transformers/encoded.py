"""How a decoder finds the packed states of its encoder, whatever the code between the two hands on.

A padded encoder output carries its packed states as an attribute of the tensor. A decoder that is given the same
tensor reads the packed states: without packing them again, and without the mask that the caller made before tokens were
pruned. A tensor that was changed on the way, in place too, is not recognized, and its mask decides.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.packed import PackedBatch

__all__ = [
    "PackedStates",
    "SharedSource",
    "check_mask",
    "mask_as_given",
    "source_behind",
    "states_behind",
    "with_states_behind",
]


class PackedStates(NamedTuple):
    """The packed states of a padded tensor.

    Attributes:
        packed: the states.
        mask: bool `[B, S']`, their places in the tensor.
        inputs_mask: bool `[B, S]`, the mask of the inputs before pruning; None for packed inputs.
        given: the mask of the inputs as the caller gave it, with its version. The same tensor is recognized without
            reading its contents.
    """

    packed: PackedBatch
    mask: Tensor
    inputs_mask: Tensor | None = None
    given: tuple[Tensor, int | None] | None = None

    def mask_beside(self, mask: Tensor | None) -> Tensor:
        """The places that a decoder reads if its caller gives this mask: self.mask if it says nothing new.

        Raises:
            ValueError: the mask is neither that of the inputs nor that of the states, and has another shape than these.
        """
        if mask is None or mask is self.mask or (mask.dim() == 2 and self._is_given(mask)):
            return self.mask
        for known in (self.mask, self.inputs_mask):
            if known is not None and mask.shape == known.shape and torch.equal(mask.bool(), known):
                return self.mask
        check_mask(self.mask.shape, mask)
        return mask.bool() & self.mask

    def are_in(self, states: Tensor) -> bool:
        """Whether the tensor still has these states: inference tensors do not count how often they are changed."""
        return torch.equal(states[self.mask], self.packed.values[: int(self.packed.cu_seqlens[-1])])

    def _is_given(self, mask: Tensor) -> bool:
        return self.given is not None and mask is self.given[0] and _version(mask) == self.given[1]


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
        states.stamp_behind = (behind, _version(states))  # type: ignore[attr-defined]
    return states


def states_behind(states: Tensor | None) -> PackedStates | SharedSource | None:
    if states is None or torch.compiler.is_compiling():
        return None
    behind, version = getattr(states, "stamp_behind", (None, None))
    if isinstance(behind, PackedStates) and states.is_inference():
        return behind if behind.are_in(states) else None
    return behind if version == _version(states) else None


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


def mask_as_given(mask: Tensor) -> tuple[Tensor, int | None]:
    """For `PackedStates.given`."""
    return mask, _version(mask)


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place. Inference tensors do not count it."""
    return None if x.is_inference() else x._version
