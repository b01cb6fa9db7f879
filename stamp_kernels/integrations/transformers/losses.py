"""The losses of a language-model head on packed states, without logits where possible."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from stamp_kernels.integrations.transformers.multi_step_targets import IGNORE_INDEX
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import multi_token_cross_entropy

__all__ = ["loss_of_logits", "next_token_loss", "shared_unembedding"]


def next_token_loss(lm_head: nn.Module, states: Tensor, labels: Tensor, num_labels: Tensor) -> Tensor:
    """The mean cross-entropy of states `[T, d_model]`, 0 without labels."""
    # A module in place of the head (an adapter, a quantized layer) or a hook on it needs the head to be called.
    if _is_plain_linear(lm_head):
        head = cast(nn.Linear, lm_head)
        return multi_token_cross_entropy(states, head.weight, labels[:, None], bias=head.bias)
    return loss_of_logits(lm_head(states), labels, num_labels)


def loss_of_logits(logits: Tensor, labels: Tensor, num_labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits `[T, vocab_size]`, 0 without labels."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / num_labels.clamp(min=1)


def shared_unembedding(lm_head: nn.Module) -> Tensor:
    """The weight of the language-model head, for prediction heads with unembedding="shared".

    Raises:
        ValueError: the head does more than multiply by its weight.
    """
    if not _is_plain_linear(lm_head):
        found = f"{type(lm_head).__module__}.{type(lm_head).__qualname__}"
        raise ValueError(
            f'unembedding="shared" needs an nn.Linear without hooks as lm_head, got {found}: choose unembedding="own"'
        )
    return cast(nn.Linear, lm_head).weight


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is the product with its weight and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is nn.Linear and not any(hooks) and "forward" not in vars(module)
