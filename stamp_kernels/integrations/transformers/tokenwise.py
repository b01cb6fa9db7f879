"""Whether a module of a block, such as a feed-forward layer that somebody has replaced, treats every token by itself.

Blocks of packed stacks get the tokens of all histories as one row `[1, T, d_model]`. Attention keeps them apart. Any
other module that looks at its neighbours, such as a convolution, would mix histories.
"""

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import (
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerFF,
    T5LayerNorm,
)

__all__ = ["mixes_tokens"]

_TOKENWISE = (T5LayerFF, T5DenseActDense, T5DenseGatedActDense, T5LayerNorm, nn.Linear, nn.Dropout, nn.Identity)
_TOKENWISE_FILES = ("torch.nn.modules.activation", "transformers.activations", "peft.tuners")


def mixes_tokens(module: nn.Module, width: int) -> bool:
    """Whether the output of a module for a token `[1, 1, width]` depends on other tokens.

    Known classes do not. Others are run once, in evaluation, on random states: whole, and in two parts. A module that
    cannot be run like that, for example because its parameters are on the meta device, is trusted.
    """
    parameter = next(module.parameters(), None)
    if all(_is_known(each) for each in module.modules()) or parameter is None or parameter.is_meta:
        return False
    states = torch.randn(1, 7, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    states = states.to(parameter.device, parameter.dtype if parameter.is_floating_point() else None)
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            whole = _states(module(states))
            parts = torch.cat([_states(module(states[:, :3])), _states(module(states[:, 3:]))], dim=1)
    except Exception:  # whatever a foreign module raises, it says nothing about tokens
        return False
    finally:
        for each, mode in modes:
            each.training = mode
    return whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=0.05, atol=0.05 * float(whole.std()))


def _is_known(module: nn.Module) -> bool:
    return type(module) in _TOKENWISE or type(module).__module__.startswith(_TOKENWISE_FILES)


def _states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
