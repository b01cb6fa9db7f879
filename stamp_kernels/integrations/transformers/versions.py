"""What differs between the supported releases of transformers, from 4.47 on. Every other file is the same for all.

| | 4.47 to 4.55 | 4.56, 4.57 | 5.x |
|---|---|---|---|
| attention returns | states, cache, bias | states, bias | states, bias, weights |
| attention functions | eager | eager | named in the config of the attention |
| a block needs positions | yes | yes | no |
| gradient checkpointing | in the loop of the stack | in the block | in the block |
| the cache's name | `past_key_values` | `past_key_values` | `past_key_values`, in the newest `cache` |
| hidden states and maps are recorded | in the loop | in the loop | by hooks, for classes in a table |
| T5's forward takes further arguments | no | no | yes, and hands them to its stacks |
| head masks are before encoder_outputs by place | yes | yes | there are none |
| states are scaled before the head | if embeddings are tied | if embeddings are tied | `config.scale_decoder_outputs` |

The masks reach the attention of a block in the same way everywhere: `attention_mask` of a block is `mask` of its
self-attention, `encoder_attention_mask` that of its cross attention. Packed stacks use this way, see `Packing`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5Stack

try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # before 4.53

    class GradientCheckpointingLayer(nn.Module):  # type: ignore[no-redef]
        """No block is one."""


try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError:  # before 5.0
    _CAN_RECORD_REGISTRY = {}  # type: ignore[assignment]


__all__ = [
    "MODEL_ARGUMENTS",
    "STACK_ARGUMENTS",
    "attention_implementation",
    "attention_outputs",
    "base_parameters",
    "call_block",
    "given_cache",
    "head_scale",
    "in_order_of",
    "let_record",
    "run_block",
]

_Forward = TypeVar("_Forward", bound=Callable[..., Any])

_ATTENTION_PARAMETERS = inspect.signature(T5Attention.forward).parameters
_ATTENTION_RETURNS_CACHE = "past_key_value" in _ATTENTION_PARAMETERS
_ATTENTION_RETURNS_WEIGHTS = "output_attentions" not in _ATTENTION_PARAMETERS
_CACHE_NAMES = ("past_key_values", "cache")
_BLOCKS_HAVE_POSITIONS = "cache_position" in inspect.signature(T5Block.forward).parameters


def attention_outputs(states: Tensor, position_bias: Tensor | None, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What T5Attention.forward returns, without attention maps. Old releases return the cache of its arguments."""
    if _ATTENTION_RETURNS_CACHE:
        return states, arguments.get("past_key_value"), position_bias
    return (states, position_bias, None) if _ATTENTION_RETURNS_WEIGHTS else (states, position_bias)


def attention_implementation(attention: T5Attention) -> str | None:
    """The name of the attention function. Before 5.0 T5's attention has no config, and only eager."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


def let_record(stack_class: type[PreTrainedModel]) -> None:
    """Let Hugging Face's own forward record attention maps and hidden states in stacks of a class that is not theirs.

    From 5.0 on it looks the class up in a table to which the constructor adds.
    """
    # dict's method: that of the newest releases takes a model.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(stack_class), getattr(stack_class, "_can_record_outputs", None))


def call_block(block: nn.Module, *args: Any) -> Any:
    """The output of a block: states, position bias."""
    if not _BLOCKS_HAVE_POSITIONS:
        return block(*args)
    # A decoder's block adds 1 to the last position: the length of padded queries. Packed attention does not read it, so
    # any number will do. On the CPU it costs no kernel.
    return block(*args, cache_position=torch.zeros(1, dtype=torch.int64, device="cpu"))


def run_block(stack: PreTrainedModel, block: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
    """(states, position bias) of a block of the stack, called without a cache and with gradient checkpointing if it is
    on.
    """
    run: Callable[..., Any] = functools.partial(call_block, block)
    # getattr: the attribute is missing before `gradient_checkpointing_enable` in some releases.
    is_checkpointed = getattr(stack, "gradient_checkpointing", False) and stack.training
    if is_checkpointed and not isinstance(block, GradientCheckpointingLayer):
        run = functools.partial(stack._gradient_checkpointing_func, run)
    output = run(*args)
    return output[0], output[1]


def _parameters_and_options(forward: Callable[..., Any]) -> set[str]:
    try:
        from transformers.utils.generic import TransformersKwargs
    except ImportError:  # before 4.54
        options = {"return_dict"}
    else:
        options = {"return_dict", *TransformersKwargs.__annotations__}
    return options | set(inspect.signature(forward).parameters) | {"past_key_values", "use_cache"}


# The keyword arguments that have a meaning for T5's own forward, and for that of its stacks.
MODEL_ARGUMENTS = _parameters_and_options(T5ForConditionalGeneration.forward)
STACK_ARGUMENTS = _parameters_and_options(T5Stack.forward)


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments, or in an output. None if there is none."""
    return next((arguments[name] for name in _CACHE_NAMES if arguments.get(name) is not None), None)


def head_scale(model: T5ForConditionalGeneration) -> float:
    """The factor of the decoder's states before the language-model head."""
    scales = getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings)
    return cast(float, model.model_dim**-0.5) if scales else 1.0


def base_parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a method's parameters in the order of positional arguments, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds][1:]


def in_order_of(base_forward: Callable[..., Any]) -> Callable[[_Forward], _Forward]:
    """Decorator of a forward that takes arguments by name only: positional ones have the base model's order."""
    names = base_parameters(base_forward)

    def decorate(forward: _Forward) -> _Forward:
        @functools.wraps(forward)
        def in_order(self: Any, *args: Any, **kwargs: Any) -> Any:
            """Raises:
            TypeError: as for any function, there are too many arguments, or one is given twice.
            """
            if len(args) > len(names):
                raise TypeError(f"forward takes {len(names)} positional arguments, got {len(args)}")
            by_place = dict(zip(names, args, strict=False))
            twice = by_place.keys() & kwargs.keys()
            if twice:
                raise TypeError(f"forward got multiple values for {', '.join(sorted(twice))}")
            return forward(self, **by_place, **kwargs)

        # Trainer and generate look the names up.
        in_order.__signature__ = _joined_signature(base_forward, forward)  # type: ignore[attr-defined]
        return cast(_Forward, in_order)

    return decorate


def _joined_signature(base_forward: Callable[..., Any], forward: Callable[..., Any]) -> inspect.Signature:
    """The base model's arguments, by place or name, and then what a forward adds to them by name."""
    parameters = dict(inspect.signature(base_forward).parameters)
    added = [each for name, each in inspect.signature(forward).parameters.items() if name not in parameters]
    options = [each for each in parameters.values() if each.kind is each.VAR_KEYWORD]
    named = [each for each in parameters.values() if each.kind is not each.VAR_KEYWORD]
    by_name = [each for each in added if each.kind is each.KEYWORD_ONLY]
    options = options or [each for each in added if each.kind is each.VAR_KEYWORD]
    return inspect.Signature([*named, *by_name, *options])
