"""What every base model shares on packed sequences: its blocks' attention, pruning between blocks, and checks.

`apply_stamp` changes the class of modules that the base model has made (`module.__class__ = ...`), so parameters,
submodules and hooks stay as they are. Blocks run on hidden states `[1, T, d_model]` and are called like any module, so
that what is attached to them (hooks, gradient checkpointing, FSDP2, LoRA) works. The attention of a block gets the
packing as a keyword argument.
"""

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from stamp_kernels.integrations.transformers.configuration import PruningConfig
from stamp_kernels.integrations.transformers.outputs import EncoderOutput
from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout, pack_padded
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.modules.pruning import PrunedBatch, SemanticAdaptivePruning
from stamp_kernels.packed import PackedBatch

__all__ = [
    "INTERMEDIATE_OUTPUTS",
    "CrossAttention",
    "PackedTrunk",
    "Packing",
    "check_at_most_one_given",
    "check_one_given",
    "packed_embeddings",
    "refuse_intermediate_outputs",
    "replace_class",
    "with_empty_tail",
]

INTERMEDIATE_OUTPUTS = ("output_attentions", "output_hidden_states")  # options of Hugging Face's models


class CrossAttention(NamedTuple):
    """What cross attention reads.

    Attributes:
        source: the encoded sequences.
        cu_seqlens_q, max_seqlen_q: the offsets of the queries of each encoded sequence, and the most queries of one.
        tiles_q: the tile list of the queries, if there is one.
    """

    source: PackedBatch
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    tiles_q: Tensor | None


class Packing:
    """What the attention of a block needs to know about the batch.

    Not a dataclass: FSDP2 rebuilds the dataclasses among a block's arguments, and the attention would then write
    centrality to the copy.

    Attributes:
        queries: the sequences that the block runs on. Their values are not read.
        cross: for blocks with cross attention.
        wants_centrality: whether the self-attention has to compute the centrality of its keys.
        centrality: `[T]`, the result, written by the self-attention.
    """

    def __init__(
        self,
        queries: PackedBatch,
        *,
        cross: CrossAttention | None = None,
        wants_centrality: bool = False,
    ) -> None:
        self.queries = queries
        self.cross = cross
        self.wants_centrality = wants_centrality
        self.centrality: Tensor | None = None


class PackedTrunk(nn.Module):
    """Mixin for a stack of blocks that runs on packed sequences and prunes between its blocks.

    The loop over the blocks belongs to the base model:

        for block_number, block in enumerate(self.blocks, start=1):
            packing = self.packing_for(block_number, packed)
            hidden = block(packed.values[None], packing=packing)
            packed = self.after_block(block_number, hidden[0], packing)
    """

    stamp_pruning: nn.ModuleDict
    stamp_protected_ends: tuple[int, int]

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune as the configuration says; None: not at all."""
        modules = {} if config is None else config.build_modules()
        # The modules have no parameters. They follow train() and eval(), and add no key to the state dict.
        self.stamp_pruning = nn.ModuleDict({str(block_number): module for block_number, module in modules.items()})
        self.stamp_pruning.train(self.training)
        self.stamp_protected_ends = (0, 0) if config is None else (config.protect_first, config.protect_last)

    def remove_pruning(self) -> None:
        """Undo `set_pruning`: the stack has only its own attributes again."""
        del self.stamp_pruning, self.stamp_protected_ends

    @property
    def is_pruned(self) -> bool:
        """Whether forward prunes in the current mode."""
        return any(cast(SemanticAdaptivePruning, module).is_active for module in self.stamp_pruning.values())

    def pack_inputs(self, inputs: Tensor, attention_mask: Tensor | None) -> tuple[PackedBatch, PaddedLayout]:
        """The inputs of the stack, `[B, S]` or `[B, S, d_model]`, without their padding, see `pack_padded`.

        A keep_ratio of max_seqlen is one of the padded length, as in padded implementations. Otherwise max_seqlen is
        the longest length, for which the kernels are faster.
        """
        packed, layout = pack_padded(inputs, attention_mask)
        modules = [cast(SemanticAdaptivePruning, module) for module in self.stamp_pruning.values()]
        if any(module.is_active and module.budget == "max_seqlen" for module in modules):
            packed = replace(packed, max_seqlen=inputs.shape[1])
        return packed, layout

    def packing_for(self, block_number: int, packed: PackedBatch) -> Packing:
        """The packing for a block, counted from 1, that runs on this batch. The blocks up to a pruning share tiles."""
        return Packing(packed.with_tiles(), wants_centrality=str(block_number) in self.stamp_pruning and self.is_pruned)

    def after_block(self, block_number: int, hidden: Tensor, packing: Packing) -> PackedBatch:
        """The batch for the next block, from the hidden states `[T, d_model]` of this one: pruned if scheduled."""
        packed = replace(packing.queries, values=hidden)
        if not packing.wants_centrality:
            return packed
        prune = cast(SemanticAdaptivePruning, self.stamp_pruning[str(block_number)])
        return cast(PrunedBatch, prune(packed, packing.centrality)).packed

    def padded_output(self, encoded: PackedBatch, layout: PaddedLayout | None) -> EncoderOutput:
        """States in the places that their tokens have in a padded batch; on the left if pruned or without layout."""
        if layout is None or self.is_pruned:
            return EncoderOutput(packed=encoded).padded()
        return EncoderOutput(
            last_hidden_state=layout.pad(encoded.values),
            attention_mask=layout.mask,
            positions=layout.pad(encoded.materialized_positions()),
        )


def packed_embeddings(inputs: PackedBatch, embed_tokens: nn.Module, hidden_size: int) -> Tensor:
    """`[T, hidden_size]`: token ids `[T]` embedded, or embeddings `[T, hidden_size]` unchanged.

    Raises:
        ValueError: inputs are no PackedBatch, or their values are neither.
    """
    check_packed("packed_inputs", inputs)
    values = inputs.values
    found = f"{values.dtype} {list(values.shape)}"
    if values.is_floating_point():
        if values.dim() != 2 or values.shape[1] != hidden_size:
            raise ValueError(
                f"packed_inputs.values must be embeddings [T, {hidden_size}] or token ids [T], got {found}"
            )
        return with_empty_tail(inputs).values
    if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"packed_inputs.values must be int32 or int64 token ids [T], got {found}")
    return cast(Tensor, embed_tokens(with_empty_tail(inputs).values))


def with_empty_tail(packed: PackedBatch) -> PackedBatch:
    """The same batch with values of 0 on tail rows.

    Tail rows may hold anything. The blocks compute on them as on all rows, and in the gradients of their weights NaN
    times a gradient of 0 would be NaN. Costs nothing where the CPU knows that there are no tail rows.
    """
    total, lengths_cpu = packed.values.shape[0], packed.lengths_cpu
    # torch.compile does not know contents. It fuses the pass with the next one.
    if lengths_cpu is not None and not torch.compiler.is_compiling() and int(lengths_cpu.sum()) == total:
        return packed
    is_tail = torch.arange(total, device=packed.values.device) >= packed.cu_seqlens[-1]
    return replace(packed, values=packed.values.masked_fill(is_tail.view(-1, *[1] * (packed.values.dim() - 1)), 0))


def replace_class(root: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Change the class of all modules below `root` whose class is exactly `old`."""
    for module in root.modules():
        if type(module) is old:
            module.__class__ = new


def check_one_given(**arguments: object) -> None:
    """Raises:
    ValueError: none of the arguments is given, or several are.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(arguments)} must be given, got {', '.join(given) or 'none'}")


def check_at_most_one_given(**arguments: object) -> None:
    """Raises:
    ValueError: several of the arguments are given.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"at most one of {', '.join(arguments)} may be given, got {', '.join(given)}")


def refuse_intermediate_outputs(config: object, kwargs: dict[str, object]) -> None:
    """Attention maps are never built, and the tokens differ from block to block, so neither can be returned.

    Raises:
        ValueError: an argument or the model's config asks for them.
    """
    for name in INTERMEDIATE_OUTPUTS:
        requested = kwargs.get(name)
        if requested or (requested is None and getattr(config, name, False)):
            raise ValueError(f"{name}=True: packed stacks do not keep them; use forward hooks, or remove_stamp(model)")
