"""What apply_stamp does to a T5: which stacks can run packed, and the classes that they and their model become."""

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration, T5PreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from stamp_kernels.integrations.transformers.apply import Stamping, StampStatus, register
from stamp_kernels.integrations.transformers.classes import (
    StampedModule,
    lost_forward,
    own_class,
    patched_forward,
    stamped_class,
)
from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig
from stamp_kernels.integrations.transformers.packed_trunk import CrossPacking, Packing, check_consumed
from stamp_kernels.integrations.transformers.t5 import (
    StampT5EncoderModel,
    StampT5ForConditionalGeneration,
    StampT5Model,
    StampT5PreTrainedModel,
)
from stamp_kernels.integrations.transformers.t5_stacks import PackedT5Attention, PackedT5Decoder, PackedT5Encoder
from stamp_kernels.integrations.transformers.tokenwise import differs_in_parts, mixes_tokens
from stamp_kernels.integrations.transformers.versions import attention_implementation, call_block, let_record
from stamp_kernels.packed import PackedBatch

__all__: list[str] = []  # importing it registers T5's classes

_BIAS_METHODS = ("compute_bias", "_relative_position_bucket")  # that packed attention computes itself
_KNOWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")  # computes the same as packed attention


def _check(model: T5PreTrainedModel, pruning: PruningConfig | None, prediction: PredictionConfig | None) -> StampStatus:
    if prediction is not None and not isinstance(model, T5ForConditionalGeneration):
        raise ValueError(f"prediction needs a T5ForConditionalGeneration, got a {own_class(type(model)).__name__}")
    d_kv = model.config.d_kv
    if d_kv % 8 != 0 or not 8 <= d_kv <= 256:
        raise ValueError(f"model.config.d_kv must be a multiple of 8 from 8 to 256, got {d_kv}")
    stacks = _stacks(model)
    padded = {name: reason for name, stack in stacks.items() if (reason := _why_padded(name, stack)) is not None}
    if len(padded) == len(stacks):
        found = "; ".join(padded.values()) or "it has no T5Stack"
        raise ValueError(f"model must be a T5 whose stacks can run packed, got {type(model).__name__}: {found}")
    encoders = [name for name, stack in stacks.items() if not stack.is_decoder]
    if pruning is not None:
        if not encoders:
            raise ValueError(f"pruning needs an encoder, got a {own_class(type(model)).__name__} that is a decoder")
        for name in encoders:
            if name in padded:
                raise ValueError(f"pruning needs an encoder that runs packed: {padded[name]}")
            pruning.check_blocks(len(stacks[name].block))
    own_forward = None
    if isinstance(model, T5ForConditionalGeneration):
        own_forward = lost_forward(own_class(type(model)), T5ForConditionalGeneration)
        if own_forward is not None and prediction is not None:
            raise ValueError(
                f"prediction needs the loss of super().forward, which {own_forward} does not call: call it, or compute "
                "the auxiliary loss with MultiStepPrediction in your forward"
            )
    return StampStatus(tuple(name for name in stacks if name not in padded), padded, own_forward)


def _stacks(model: nn.Module) -> dict[str, T5Stack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, T5Stack)}


def _attentions(stack: nn.Module) -> dict[str, T5Attention]:
    return {name: module for name, module in stack.named_modules() if isinstance(module, T5Attention)}


def _why_padded(name: str, stack: T5Stack) -> str | None:
    """The reason why a stack cannot run packed without losing what somebody has changed in it."""
    lost = lost_forward(own_class(type(stack)), T5Stack)
    if lost is not None:
        return f"{lost} does not call super().forward (with inputs_embeds, if it changes the embeddings)"
    for inner, module in {"": stack, **_attentions(stack)}.items():
        # What replaces the forward of a stamped module runs around it.
        if patched_forward(module) and not isinstance(module, StampedModule):
            place = ".".join(part for part in (name, inner) if part) or f"the {type(module).__name__}"
            return f"{place} has a forward of its own on the instance, as hooks of Accelerate put there"
    for inner, attention in _attentions(stack).items():
        lost = lost_forward(own_class(type(attention)), T5Attention, _BIAS_METHODS)
        if lost is not None:
            return f"{lost} is not T5's, and packed sequences would not run it (a forward may call super().forward)"
        patched = [method for method in _BIAS_METHODS if method in vars(attention)]
        if patched:
            return f"{name}.{inner} has a {patched[0]} of its own on the instance, which packed sequences would not run"
        implementation = attention_implementation(attention)
        if implementation not in _KNOWN_ATTENTION and not str(implementation).startswith("flash_attention"):
            return f'attn_implementation="{implementation}" is not T5\'s, and packed sequences would not run it'
    like = next(stack.block.parameters()).new_empty(stack.config.d_model)  # a state
    if mixes_tokens(stack.final_layer_norm, like):
        return f"final_layer_norm, a {type(stack.final_layer_norm).__name__}, mixes tokens, and would mix histories"
    for number, block in enumerate(stack.block, start=1):
        expected = 2 if stack.is_decoder else 1
        found = sum(isinstance(module, T5Attention) for module in block.modules())
        if found != expected:
            return f"block {number}, a {type(block).__name__}, has {found} T5Attention where T5 has {expected}"
        for inner, module in block.named_modules():
            # The layers and norms around the attention.
            is_probed = inner.endswith(("layer_norm", "layer.1", "layer.2")) and not _attentions(module)
            if is_probed and mixes_tokens(module, like):
                return f"{inner} of block {number}, a {type(module).__name__}, mixes tokens, and would mix histories"
        foreign = [
            module for module in (block, *getattr(block, "layer", ())) if _attentions(module) and not _is_t5(module)
        ]
        if foreign and _mixes_histories(stack, block, like):
            return f"block {number} mixes histories, or counts their tokens, in {type(foreign[0]).__name__}.forward"
    return None


def _is_t5(module: nn.Module) -> bool:
    """Whether the forward of a block or layer is Hugging Face's."""
    return "forward" not in vars(module) and inspect.unwrap(type(module).forward).__module__ == T5Stack.__module__


def _mixes_histories(stack: T5Stack, block: nn.Module, like: Tensor) -> bool:
    """Runs a packed copy of the block on two histories, together and one by one."""
    block = copy.deepcopy(block)
    for attention in _attentions(block).values():
        attention.__class__ = stamped_class(type(attention), PackedT5Attention)
    config = stack.config
    bias_table = torch.linspace(-1, 1, config.relative_attention_num_buckets * config.num_heads, device="cpu")
    bias_table = bias_table.view(-1, config.num_heads)

    def run(states: Tensor, *lengths: int) -> Tensor:
        starts = [0, *itertools.accumulate(lengths)]
        offsets = torch.tensor(starts, dtype=torch.int32, device=states.device)
        batch = PackedBatch(states[0], offsets, max(lengths))
        packing, bias = Packing(batch), bias_table.to(states)
        if not stack.is_decoder:
            output: Tensor = call_block(block, states, packing, bias)[0]
            check_consumed(block, 0, packing)  # an attention without its mask fails here, as it will when it runs
            return output
        cross = CrossPacking(batch, offsets, max(lengths), None)
        output = call_block(block, states, packing, bias, states, cross)[0]  # a history reads itself as its source
        check_consumed(block, 0, packing, cross)
        return output

    return differs_in_parts(block, like, run)


def _skip_dropped_states(model: nn.Module, pruning: PruningConfig | None) -> None:
    """With layout="original" a decoder ignores encoder states of 0, whatever mask it is given."""
    for stack in _stacks(model).values():
        if isinstance(stack, PackedT5Decoder):
            stack.stamp_skips_zeros = pruning is not None and pruning.layout == "original"


def _pack(model: nn.Module, status: StampStatus, pruning: PruningConfig | None) -> None:
    for name, stack in _stacks(model).items():
        if name not in status.packed:
            _unpack_stack(stack)  # it may have been packed before somebody changed it
            continue
        stack.__class__ = stamped_class(type(stack), _packed_stack(stack))
        let_record(type(stack))
        for attention in _attentions(stack).values():
            attention.__class__ = stamped_class(type(attention), PackedT5Attention)
        if isinstance(stack, PackedT5Encoder):
            stack.set_pruning(pruning)
    _skip_dropped_states(model, pruning)


def _unpack(model: nn.Module) -> None:
    for stack in _stacks(model).values():
        _unpack_stack(stack)


def _unpack_stack(stack: T5Stack) -> None:
    if isinstance(stack, PackedT5Encoder):
        stack.remove_pruning()
    if isinstance(stack, PackedT5Decoder):
        del stack.stamp_skips_zeros
    for module in (*_attentions(stack).values(), stack):
        module.__class__ = own_class(type(module))


def _packed_stack(stack: T5Stack) -> type[StampedModule]:
    return PackedT5Decoder if stack.is_decoder else PackedT5Encoder


def _always(packed_class: type[StampedModule]) -> Callable[[Any], type[StampedModule]]:
    return lambda model: packed_class


def _register() -> None:
    register(Stamping(T5Stack, _packed_stack, _check, _pack, _unpack))
    packed_classes = (StampT5ForConditionalGeneration, StampT5EncoderModel, StampT5Model, StampT5PreTrainedModel)
    for packed_class in packed_classes:
        base_class = cast(type[T5PreTrainedModel], own_class(packed_class))
        register(Stamping(base_class, _always(packed_class), _check, _pack, _unpack))


_register()
