"""What every base model shares on packed sequences: its blocks' attention, pruning between blocks, and checks.

`apply_stamp` changes the class of modules that the base model has made (`module.__class__ = ...`), so parameters,
submodules and hooks stay as they are. Blocks run on hidden states `[1, T, d_model]` and are called like any module, so
that what is attached to them (hooks, gradient checkpointing, FSDP2, LoRA) works. The attention of a block gets the
packing in the place of its mask.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.integrations.transformers.configuration import PruningConfig
from stamp_kernels.integrations.transformers.outputs import EncoderOutput
from stamp_kernels.integrations.transformers.padded_layout import (
    PaddedLayout,
    layout_in_columns,
    layout_on_the_left,
    pack_padded,
)
from stamp_kernels.integrations.transformers.padded_queries import PaddedQueries
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.modules.pruning import PrunedBatch, SemanticAdaptivePruning
from stamp_kernels.packed import PackedBatch

__all__ = [
    "CrossPacking",
    "PackedTrunk",
    "Packing",
    "check_at_most_one_given",
    "check_consumed",
    "check_one_given",
    "packed_embeddings",
    "with_empty_tail",
]


class Packing:
    """What the self-attention of a block needs to know about the batch, in the place of its attention mask.

    The mask is the one argument that every release, block and layer hands to its attention. An attention that does not
    know a Packing cannot add it to its scores either, and fails instead of mixing the sequences.

    Not a dataclass: FSDP2 rebuilds the dataclasses among a block's arguments, and the attention would then write to the
    copy.

    Attributes:
        queries: the sequences that the block runs on. Their values are not read. Keys are the same, but without the
            padding of PaddedQueries.
        wants_centrality: whether the self-attention has to compute the centrality of its keys.
        has_bias: whether the relative-position bias is added.
        centrality: `[T]`, the result, written by the self-attention.
        is_watched: whether is_consumed is written.
        is_consumed: whether a packed attention has read it.
    """

    def __init__(
        self,
        queries: PackedBatch,
        *,
        wants_centrality: bool = False,
        has_bias: bool = True,
        is_watched: bool = True,
    ) -> None:
        self.queries = queries
        self.wants_centrality = wants_centrality
        self.has_bias = has_bias
        self.centrality: Tensor | None = None
        self.is_watched = is_watched
        self.is_consumed = False


class CrossPacking:
    """What the cross attention of a block needs to know, in the place of its attention mask, see Packing.

    Attributes:
        source: the encoded sequences.
        cu_seqlens_q, max_seqlen_q: the offsets of the queries of each encoded sequence, and the most queries of one.
        tiles_q: the tile list of the queries, if there is one.
    """

    def __init__(
        self,
        source: PackedBatch,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        tiles_q: Tensor | None,
        *,
        is_watched: bool = True,
    ) -> None:
        self.source = source
        self.cu_seqlens_q = cu_seqlens_q
        self.max_seqlen_q = max_seqlen_q
        self.tiles_q = tiles_q
        self.is_watched = is_watched
        self.is_consumed = False


def check_consumed(block: nn.Module, block_number: int, *packings: Packing | CrossPacking | None) -> None:
    """After a block has run, see `Packing.is_consumed`.

    Raises:
        RuntimeError: an attention of the block did not run packed, so that sequences may have been mixed.
    """
    if all(packing is None or packing.is_consumed or not packing.is_watched for packing in packings):
        return
    if any(_is_compiled(module) for module in block.modules()):
        return
    raise RuntimeError(
        f"block {block_number}, a {type(block).__name__}, did not give its attention_mask (encoder_attention_mask) to "
        "its T5Attention as `mask`, which packed sequences need: hand it on, or leave this model unstamped"
    )


def _is_compiled(module: nn.Module) -> bool:
    """Compiled by `module.compile()` or by `torch.compile(module)`."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


class PackedTrunk(nn.Module):
    """Mixin for a stack of blocks that runs on packed sequences and prunes between its blocks.

    The loop over the blocks belongs to the base model:

        for block_number, block in enumerate(self.blocks, start=1):
            packing = self.packing_for(block_number, packed)
            hidden = block(packed.values[None], packing)
            check_consumed(block, block_number, packing)
            packed = self.after_block(block_number, hidden[0], packing)
    """

    stamp_pruning: nn.ModuleDict
    stamp_drops_bias: bool  # after the first pruning
    stamp_keeps_places: bool  # of the kept tokens in padded outputs
    stamp_padding_votes: bool  # at the first pruning

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune as the configuration says; None: not at all."""
        modules = {} if config is None else config.build_modules()
        # The modules have no parameters. They follow train() and eval(), and add no key to the state dict.
        self.stamp_pruning = nn.ModuleDict({str(block_number): module for block_number, module in modules.items()})
        self.stamp_pruning.train(self.training)
        self.stamp_drops_bias = config is not None and config.positions == "none"
        self.stamp_keeps_places = config is not None and config.layout == "original"
        self.stamp_padding_votes = config is not None and config.voters == "padded"

    def remove_pruning(self) -> None:
        """Undo `set_pruning`: the stack has only its own attributes again."""
        del self.stamp_pruning, self.stamp_drops_bias, self.stamp_keeps_places, self.stamp_padding_votes

    @property
    def is_pruned(self) -> bool:
        """Whether forward prunes in the current mode."""
        return any(cast(SemanticAdaptivePruning, module).is_active for module in self.stamp_pruning.values())

    def pack_inputs(self, inputs: Tensor, attention_mask: Tensor | None) -> tuple[PackedBatch, PaddedLayout]:
        """The inputs of the stack, `[B, S]` or `[B, S, d_model]`, without their padding, see `pack_padded`; with it, as
        PaddedQueries, if it votes at the first pruning.

        A keep_ratio of max_seqlen is one of the padded length, as in padded implementations. Otherwise max_seqlen is
        the longest length, for which the kernels are faster.
        """
        packed, layout = pack_padded(inputs, attention_mask)
        modules = [cast(SemanticAdaptivePruning, module) for module in self.stamp_pruning.values()]
        if any(module.is_active and module.budget == "max_seqlen" for module in modules):
            packed = replace(packed, max_seqlen=inputs.shape[1])
        if self.stamp_padding_votes and self.is_pruned and layout.selection is not None:
            packed = PaddedQueries.of(inputs, packed, layout)
        return packed, layout

    def packing_for(self, block_number: int, packed: PackedBatch) -> Packing:
        """The packing for a block, counted from 1, that runs on this batch. The blocks up to a pruning share tiles."""
        prunes_before = any(int(pruned_block) < block_number for pruned_block in self.stamp_pruning)
        return Packing(
            packed.with_tiles(),
            wants_centrality=str(block_number) in self.stamp_pruning and self.is_pruned,
            has_bias=not (self.stamp_drops_bias and prunes_before and self.is_pruned),
        )

    def after_block(self, block_number: int, hidden: Tensor, packing: Packing) -> PackedBatch:
        """The batch for the next block, from the hidden states `[T, d_model]` of this one: pruned if scheduled."""
        packed = replace(packing.queries, values=hidden)
        if not packing.wants_centrality:
            return packed
        if isinstance(packed, PaddedQueries):
            packed = packed.without_padding()
        prune = cast(SemanticAdaptivePruning, self.stamp_pruning[str(block_number)])
        return cast(PrunedBatch, prune(packed, packing.centrality)).packed

    def padded_output(self, encoded: PackedBatch, layout: PaddedLayout | None) -> EncoderOutput:
        """States in the places that their tokens have in a padded batch; on the left if they were pruned (unless the
        configuration keeps places) or without layout.
        """
        if layout is None:
            return EncoderOutput(packed=encoded).padded()
        length = layout.mask.shape[1]
        if not self.is_pruned:
            kept = layout
        elif self.stamp_keeps_places:
            first_column = F.pad(layout.first_columns(), (0, 1))  # the last one is for tail rows
            sequence = sequence_of_row(encoded.cu_seqlens, encoded.values.shape[0])
            kept = layout_in_columns(encoded, first_column[sequence] + encoded.materialized_positions(), length)
        else:
            kept = layout_on_the_left(encoded, max(encoded.max_seqlen, 1))
        return EncoderOutput.in_layout(encoded, kept, layout)


def packed_embeddings(inputs: PackedBatch, embed_tokens: nn.Module | None, hidden_size: int) -> Tensor:
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
    if embed_tokens is None:
        raise ValueError(f"packed_inputs.values must be embeddings [T, {hidden_size}] for a stack without embed_tokens")
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
