"""Whether a module of a block, such as a feed-forward layer that somebody has replaced, treats every token by itself.

Blocks of packed stacks get the tokens of all histories as one row `[1, T, d_model]`. Attention keeps them apart. Any
other module that looks at its neighbours, such as a convolution, would mix histories.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import (
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerFF,
    T5LayerNorm,
)

__all__ = ["differs_in_parts", "mixes_tokens"]

_TOKENWISE = (T5LayerFF, T5DenseActDense, T5DenseGatedActDense, T5LayerNorm, nn.Linear, nn.Dropout, nn.Identity)
_ALONG_OTHERS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
_TOKENWISE_FILES = ("torch.nn.modules.activation", "transformers.activations", "peft.tuners")


def mixes_tokens(module: nn.Module, like: Tensor) -> bool:
    """Whether the output of a module for a token depends on other tokens. A token is like `like`, `[width]`.

    Known classes do not. Others are run once on random states, see `differs_in_parts`.
    """
    if all(_is_known(each) for each in module.modules()):
        return False
    return differs_in_parts(module, like, lambda states, *lengths: _states(module(states)))


def differs_in_parts(module: nn.Module, like: Tensor, run: Callable[..., Tensor]) -> bool:
    """Whether `run(states, 3, 4)`, on random states `[1, 7, width]`, is not what it gives for 3 and for 4 of them.

    In evaluation, without gradients. A module that cannot be run like that, for example because its parameters are on
    the meta device, is trusted: False.
    """
    if like.is_meta:
        return False
    states = torch.randn(1, 7, *like.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    states = states.to(like.device, like.dtype if like.is_floating_point() else None)
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            whole = run(states, 3, 4)
            parts = torch.cat([run(states[:, :3], 3), run(states[:, 3:], 4)], dim=1)
    except Exception:  # whatever a foreign module raises, it says nothing about tokens
        return False
    finally:
        for each, mode in modes:
            each.training = mode
    tolerance = 0.05 if whole.dtype in (torch.float16, torch.bfloat16) else 1e-3
    is_close = whole.shape == parts.shape and torch.allclose(
        whole, parts, rtol=tolerance, atol=tolerance * float(whole.std())
    )
    return not is_close


def _is_known(module: nn.Module) -> bool:
    if "forward" in vars(module) or isinstance(module, _ALONG_OTHERS):
        return False
    return type(module) in _TOKENWISE or type(module).__module__.startswith(_TOKENWISE_FILES)


def _states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
