"""Tiny T5s with random weights, ragged batches for them, and a comparison of training steps."""

import copy
import inspect
import io
import pickle
import textwrap

import torch
import transformers
from closeness import relative_error
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, T5PreTrainedModel
from transformers.models.t5 import modeling_t5

from stamp_kernels.integrations.transformers import (
    PredictionConfig,
    PruningConfig,
    StampT5ForConditionalGeneration,
    apply_stamp,
)
from stamp_kernels.packed import PackedBatch

VOCAB_SIZE = 61
LEVELS = 4
LENGTHS = (7, 1, 30, 2, 13, 200)  # the last one reaches beyond the exact and the logarithmic buckets

HAS_SDPA = T5PreTrainedModel._supports_sdpa

PRUNING = PruningConfig(schedule=[(1, 0.5)])
PREDICTION = PredictionConfig(num_steps=2, codes_per_item=LEVELS)
HEADS = {
    "linear": dict(head="linear"),
    "residual": dict(head="residual"),
    "transformer": dict(head="transformer", num_attention_heads=3),
    "own unembedding": dict(unembedding="own"),
}

# Before 5.0 attention returns its weights only if asked.
WITH_WEIGHTS = {} if HAS_SDPA else {"output_attentions": True}


# Whether T5's forward hands further arguments to its stacks, from 5.0 on.
HAS_KWARGS = "kwargs" in inspect.signature(T5ForConditionalGeneration.forward).parameters

# Whether output_hidden_states may be indices of layers. 5.17 takes some, and leaves others out of the tuple.
HAS_SELECTION = hasattr(getattr(transformers.utils, "output_capturing", None), "selected_hidden_states")

# The name of the cache in T5's forward and its output, and in that of its layers.
CACHE = "cache" if "cache" in inspect.signature(T5ForConditionalGeneration.forward).parameters else "past_key_values"
_ATTENTION_ARGUMENTS = inspect.signature(modeling_t5.T5Attention.forward).parameters
_NEEDED_BY_ATTENTION = ("cache", "past_key_values", "past_key_value", "cache_position", "query_length", *WITH_WEIGHTS)


def needed_by_attention(kwargs: dict) -> dict:
    """Of a layer's keyword arguments those that every forward hands to the attention: the cache, and before 5.0
    positions.
    """
    names = set(_NEEDED_BY_ATTENTION).intersection(_ATTENTION_ARGUMENTS)
    return {name: value for name, value in kwargs.items() if name in names}


def positions_of(states: Tensor) -> dict[str, Tensor]:
    """What a loop over the blocks gives each of them besides states, mask and bias: before 5.0 positions."""
    return {} if HAS_KWARGS else {"cache_position": torch.arange(states.shape[1])}


def positional(model_class: type[torch.nn.Module], **named) -> tuple:
    """The arguments by place, in the order of this release's forward."""
    parameters = list(inspect.signature(model_class.forward).parameters)[1:]
    last = max(map(parameters.index, named))
    return tuple(named.get(name) for name in parameters[: last + 1])


# from_pretrained's name of the dtype. The one before 4.56 is deprecated now.
DTYPE = "dtype" if hasattr(T5Config(), "dtype") else "torch_dtype"


def let_t5_be_exact() -> None:
    """Before 5.0 T5 computes every softmax in fp32. In float64 it then is no more exact, and no truth for 1e-9."""
    source = textwrap.dedent(inspect.getsource(modeling_t5.T5Attention.forward))
    exact = source.replace("scores.float()", "(scores if scores.dtype == torch.float64 else scores.float())")
    if exact != source:
        found = {}
        exec(compile(exact, modeling_t5.__file__, "exec"), vars(modeling_t5), found)
        modeling_t5.T5Attention.forward = found["forward"]


let_t5_be_exact()


def tiny_t5(dtype: torch.dtype = torch.float32, *, attention: str = "eager", **config) -> T5ForConditionalGeneration:
    """A base model in training mode without dropout.

    Both stacks use this attention: eager, or sdpa, which T5 has and prefers from transformers 5.0 on. Earlier releases
    have only eager, and use that.
    """
    torch.manual_seed(0)
    settings = dict(vocab_size=VOCAB_SIZE, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3, dropout_rate=0.0)
    settings |= dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    model = T5ForConditionalGeneration(T5Config(**{**settings, **config}))
    set_attention(model, attention)
    return model.to(dtype).train()


def set_attention(model: torch.nn.Module, attention: str) -> None:
    """Of every stack, see tiny_t5."""
    for stack in (each for each in model.modules() if isinstance(each, modeling_t5.T5Stack)):
        if HAS_SDPA:
            stack.set_attn_implementation(attention)
        assert stack.config._attn_implementation == (attention if HAS_SDPA else "eager")


def padded_batch(lengths: tuple[int, ...] = LENGTHS, *, padding_side: str = "right") -> dict[str, Tensor]:
    """input_ids and attention_mask `[B, S]`, labels `[B, LEVELS]`, of random tokens."""
    torch.manual_seed(1)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(1, VOCAB_SIZE, attention_mask.shape) * attention_mask
    labels = torch.randint(1, VOCAB_SIZE, (len(lengths), LEVELS))
    if padding_side == "left":
        input_ids, attention_mask = input_ids.flip(1), attention_mask.flip(1)
    return dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def stamped(base: T5ForConditionalGeneration, **configs) -> StampT5ForConditionalGeneration:
    return apply_stamp(copy.deepcopy(base), **configs)


def future_batch() -> dict[str, Tensor]:
    batch = padded_batch()
    return batch | dict(future_ids=torch.randint(1, VOCAB_SIZE, (len(LENGTHS), 2 * LEVELS)))


def packed_batch() -> PackedBatch:
    batch = padded_batch()
    return PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])


def trained_heads(model: StampT5ForConditionalGeneration) -> StampT5ForConditionalGeneration:
    """Heads that are not the identity."""
    with torch.no_grad():
        for p in model.stamp_prediction.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training_step(base, base_loss: Tensor, model, loss: Tensor) -> None:
    """float64: loss and each gradient to 1e-9. fp32: loss and the whole gradient vector to 1e-5.

    In fp32 single gradients differ more between two orders of summation, because a ReLU flips.
    """
    expected, got = gradients(base, base_loss), gradients(model, loss)
    assert expected.keys() == got.keys()
    bound = 1e-9 if loss.dtype == torch.float64 else 1e-5
    assert relative_error(loss, base_loss) < bound
    if loss.dtype == torch.float64:
        for name in expected:
            assert relative_error(got[name], expected[name]) < bound, name
    whole = [torch.cat([g.flatten() for g in grads.values()]) for grads in (got, expected)]
    assert relative_error(*whole) < bound


def pickled(model: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved_whole]
