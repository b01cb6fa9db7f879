"""T5 on padded batches: what a user would run instead of this package, written at its best."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.t5.modeling_t5 import T5Stack


def set_base_attention(model: T5ForConditionalGeneration, implementation: str) -> None:
    """Choose the base model's attention in both stacks; setting it only on the model does not change the stacks.

    Raises:
        RuntimeError: a stack of the base model runs another attention.
    """
    for stack in (model.encoder, model.decoder):
        stack.set_attn_implementation(implementation)
        if stack.config._attn_implementation != implementation:
            raise RuntimeError(
                f"the base model's attention must be {implementation!r}, got {stack.config._attn_implementation!r}"
            )


def padded_topk_prune(
    hidden: Tensor, attention_mask: Tensor, attention_weights: Tensor, keep_ratio: float
) -> tuple[Tensor, Tensor]:
    """Pruning as in the padded trainers (RASTP, arXiv 2511.16943): one k for all rows, from the padded length.

    The centrality also sums over padded queries, over the weights after dropout, and rows shorter than k keep padding.

    Args:
        hidden: `[B, S, D]` output of the block.
        attention_mask: `[B, S]`, 0 on padding.
        attention_weights: `[B, H, S, S]` of the same block.

    Returns:
        hidden `[B, k, D]` and mask `[B, k]` of the kept tokens in their original order.
    """
    k = max(1, int(hidden.shape[1] * keep_ratio))
    centrality = attention_weights.sum(dim=(1, 2))
    importance = (centrality * hidden.abs().sum(-1)).masked_fill(attention_mask == 0, -torch.inf)
    kept = importance.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1])), attention_mask.gather(1, kept)


def encode_padded_pruned(
    encoder: T5Stack, input_ids: Tensor, attention_mask: Tensor, pruning: Mapping[int, float]
) -> tuple[Tensor, Tensor, list[int]]:
    """T5's encoder on a padded batch with eager attention, pruned after the given blocks.

    As in the predecessor's code, the blocks after the first pruning have no position bias: only block 0 has the table.

    Args:
        encoder: of the base model, with eager attention.
        input_ids, attention_mask: `[B, S]`.
        pruning: keep_ratio by the number of the block after which to prune; blocks count from 1.

    Returns:
        states `[B, S', D]`, their mask `[B, S']`, and the number of padded tokens that entered each block.
    """
    hidden = encoder.dropout(encoder.embed_tokens(input_ids))
    position_bias = None
    tokens_per_block = []
    for block_number, block in enumerate(encoder.block, start=1):
        tokens_per_block.append(hidden.shape[0] * hidden.shape[1])
        mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=attention_mask)
        attention_weights: list[Tensor] = []
        if block_number in pruning:
            # The block does not return its attention map, but the layer inside it does.
            handle = block.get_submodule("layer.0").register_forward_hook(
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
