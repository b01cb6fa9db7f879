"""What a user would run instead of this package, each written at its best."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.t5.modeling_t5 import T5Stack


def set_base_attention(model: T5ForConditionalGeneration, implementation: str) -> None:
    """Choose Hugging Face's attention for both stacks; setting it on the model alone leaves the stacks as they are."""
    for stack in (model.encoder, model.decoder):
        stack.set_attn_implementation(implementation)
        if stack.config._attn_implementation != implementation:
            raise RuntimeError(
                f"asked for attention {implementation!r}, the host runs {stack.config._attn_implementation!r}"
            )


def padded_topk_prune(
    hidden: Tensor, attention_mask: Tensor, attention_weights: Tensor, keep_ratio: float
) -> tuple[Tensor, Tensor]:
    """Pruning as the padded trainers do it (RASTP, arXiv 2511.16943): one k for all rows, from the padded length.

    Padded query rows vote, the weights are those after dropout, and rows shorter than k keep padding.

    Args:
        hidden: `[B, S, D]` output of the block.
        attention_mask: `[B, S]`, 0 on padding.
        attention_weights: `[B, H, S, S]` of the same block.

    Returns:
        hidden `[B, k, D]` and mask `[B, k]` of the kept tokens in their original order.
    """
    k = max(1, int(hidden.shape[1] * keep_ratio))
    importance = attention_weights.sum(dim=(1, 2)) * hidden.abs().sum(-1)
    kept = (
        importance.masked_fill(attention_mask == 0, -torch.inf).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    )
    return hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1])), attention_mask.gather(1, kept)


def encode_padded_pruned(
    encoder: T5Stack, input_ids: Tensor, attention_mask: Tensor, pruning: Mapping[int, float]
) -> tuple[Tensor, Tensor, list[int]]:
    """T5's encoder on a padded batch, eager, pruned after the given blocks.

    As in the predecessor's code the blocks after a pruning point have no position bias: only block 0 owns the table.

    Args:
        input_ids, attention_mask: `[B, S]`.
        pruning: block number, counted from 1, to keep ratio.

    Returns:
        states `[B, S', D]`, their mask `[B, S']`, and the padded tokens that entered each block.
    """
    hidden = encoder.dropout(encoder.embed_tokens(input_ids))
    position_bias = None
    tokens_per_block = []
    for block_number, block in enumerate(encoder.block, start=1):
        tokens_per_block.append(hidden.shape[0] * hidden.shape[1])
        mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=attention_mask)
        attention_weights: list[Tensor] = []
        if block_number in pruning:
            # The block does not return its attention map, the layer inside it does.
            handle = block.layer[0].register_forward_hook(
                lambda module, inputs, outputs, kept=attention_weights: kept.append(outputs[-1])
            )
        hidden, position_bias, _ = block(hidden, mask, position_bias)
        if block_number in pruning:
            handle.remove()
            hidden, attention_mask = padded_topk_prune(
                hidden, attention_mask, attention_weights.pop(), pruning[block_number]
            )
            position_bias = None
    return encoder.dropout(encoder.final_layer_norm(hidden)), attention_mask, tokens_per_block
