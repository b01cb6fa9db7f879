"""The packed T5 trunk against the untouched host, and the pruned one against a loop over single sequences."""

import copy

import pytest
import torch
from closeness import assert_close, relative_error
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from stamp_kernels.integrations.transformers_t5 import (
    decode_packed,
    encode_packed,
    head_inputs,
    next_token_loss,
    use_packed_attention,
)
from stamp_kernels.modules.pruning import SemanticAdaptivePruning
from stamp_kernels.packed import PackedSequence

LENGTHS = (7, 1, 30, 2, 13, 200)  # the last one reaches beyond the exact and the logarithmic buckets
LABELS_PER_SEQUENCE = 4
KEEP_RATIO = 1 / 3


def tiny_t5(dtype: torch.dtype, **config) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    settings = dict(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3, dropout_rate=0.0)
    settings |= dict(decoder_start_token_id=0, pad_token_id=0, use_cache=False)
    model = T5ForConditionalGeneration(T5Config(**{**settings, **config}))
    for stack in (model.encoder, model.decoder):
        stack.set_attn_implementation("eager")
        assert stack.config._attn_implementation == "eager"
    return model.to(dtype)


def random_batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids [B, S], attention_mask [B, S], labels [B, L]."""
    torch.manual_seed(1)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(1, 61, attention_mask.shape) * attention_mask
    return input_ids, attention_mask, torch.randint(1, 61, (len(lengths), LABELS_PER_SEQUENCE))


def packed_loss(model, inputs: PackedSequence, labels: Tensor, pruning=None) -> Tensor:
    encoded = encode_packed(model.encoder, inputs, pruning=pruning)
    batch, length = labels.shape
    cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    decoder_ids = PackedSequence(model._shift_right(labels).flatten(), cu_seqlens, length)
    return next_token_loss(model, decode_packed(model.decoder, decoder_ids, encoded.packed), labels.flatten())


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_training_step(host, host_loss, model, loss):
    """float64: loss and each gradient to 1e-9; fp32: loss and the whole gradient vector to 1e-5.

    In fp32 single gradients differ more between any two orders of summation: a ReLU flips.
    """
    expected, got = gradients(host, host_loss), gradients(model, loss)
    assert expected.keys() == got.keys()
    bound = 1e-9 if loss.dtype == torch.float64 else 1e-5
    assert relative_error(loss, host_loss) < bound
    if loss.dtype == torch.float64:
        for name in expected:
            assert relative_error(got[name], expected[name]) < bound, name
    whole = [torch.cat([g.flatten() for g in grads.values()]) for grads in (got, expected)]
    assert relative_error(*whole) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    "config", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=["t5", "v1.1"]
)
def test_unpruned_equals_padded_eager(dtype, padding_side, config):
    host = tiny_t5(dtype, **config)
    model = copy.deepcopy(host)
    use_packed_attention(model)
    input_ids, attention_mask, labels = random_batch()
    inputs = PackedSequence.from_padded(input_ids, attention_mask)
    if padding_side == "left":
        input_ids, attention_mask = input_ids.flip(1), attention_mask.flip(1)
        inputs = PackedSequence.from_padded(input_ids, attention_mask)
    host_loss = host(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    assert_same_training_step(host, host_loss, model, packed_loss(model, inputs, labels))


def test_ignored_labels():
    host = tiny_t5(torch.float64)
    model = copy.deepcopy(host)
    use_packed_attention(model)
    input_ids, attention_mask, labels = random_batch()
    labels[0, 1:], labels[2] = -100, -100
    host_loss = host(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    inputs = PackedSequence.from_padded(input_ids, attention_mask)
    assert_same_training_step(host, host_loss, model, packed_loss(model, inputs, labels))


def obvious_pruned_states(model, input_ids: Tensor, keep_ratio: float, prune_after: int) -> Tensor:
    """STAMP's encoder for one sequence `[n]`, by the formulas, in the host's layers: `[kept, D]`."""
    encoder = model.encoder
    attention = encoder.block[0].layer[0].SelfAttention
    n = len(input_ids)
    kept = torch.arange(n)
    bias = attention.compute_bias(n, n)  # [1, H, n, n]
    hidden = encoder.embed_tokens(input_ids)[None]
    for number, block in enumerate(encoder.block, start=1):
        layer, feed_forward = block.layer[0], block.layer[1]
        attended, _, weights = layer(hidden, position_bias=bias[:, :, kept][:, :, :, kept])
        hidden = feed_forward(attended)
        if number == prune_after:
            importance = hidden[0].norm(p=1, dim=-1) * weights[0].sum(dim=(0, 1))
            count = max(1, -int(-n * keep_ratio // 1))
            chosen = importance.topk(count).indices.sort().values
            hidden, kept = hidden[:, chosen], kept[chosen]
    return encoder.final_layer_norm(hidden)[0]


@pytest.mark.parametrize("prune_after", [1, 2, 3])
def test_pruned_equals_a_loop_over_sequences(prune_after):
    host = tiny_t5(torch.float64)
    model = copy.deepcopy(host)
    use_packed_attention(model)
    input_ids, attention_mask, labels = random_batch()

    losses = []
    for ids, mask, label in zip(input_ids, attention_mask, labels, strict=True):
        states = obvious_pruned_states(host, ids[mask.bool()], KEEP_RATIO, prune_after)
        decoder_states = host.decoder(input_ids=host._shift_right(label[None]), encoder_hidden_states=states[None])[0]
        losses.append(F.cross_entropy(host.lm_head(head_inputs(host, decoder_states[0])), label, reduction="sum"))
    host_loss = torch.stack(losses).sum() / labels.numel()

    inputs = PackedSequence.from_padded(input_ids, attention_mask)
    loss = packed_loss(model, inputs, labels, pruning={prune_after: SemanticAdaptivePruning(KEEP_RATIO)})
    assert_same_training_step(host, host_loss, model, loss)


def test_tokens_per_block_and_positions_follow_the_schedule():
    model = tiny_t5(torch.float32)
    use_packed_attention(model)
    input_ids, attention_mask, _ = random_batch()
    inputs = PackedSequence.from_padded(input_ids, attention_mask)
    encoded = encode_packed(
        model.encoder, inputs, pruning={1: SemanticAdaptivePruning(0.5), 2: SemanticAdaptivePruning(0.5)}
    )
    halves = [-(-n // 2) for n in LENGTHS]
    quarters = [-(-n // 2) for n in halves]
    assert encoded.tokens_per_block == [sum(LENGTHS), sum(halves), sum(quarters)]
    assert encoded.packed.cu_seqlens.diff().tolist() == quarters
    assert encoded.packed.max_seqlen == max(quarters)
    first_positions = encoded.packed.positions[: quarters[0]]
    assert bool((first_positions.diff() > 0).all()) and int(first_positions[-1]) < LENGTHS[0]


def test_tail_rows_change_nothing():
    model = tiny_t5(torch.float64)
    use_packed_attention(model)
    input_ids, attention_mask, labels = random_batch()
    inputs = PackedSequence.from_padded(input_ids, attention_mask)
    pruning = {2: SemanticAdaptivePruning(KEEP_RATIO)}
    expected = gradients(model, packed_loss(model, inputs, labels, pruning))
    values = torch.cat([inputs.values, torch.full((5,), -100)])
    got = gradients(
        model, packed_loss(model, PackedSequence(values, inputs.cu_seqlens, inputs.max_seqlen), labels, pruning)
    )
    for name in expected:
        assert_close(got[name], expected[name])


def test_shared_source_sequences_serve_several_decoder_sequences():
    """The beams of a search read one history: the same states as with the history repeated."""
    model = tiny_t5(torch.float64)
    use_packed_attention(model)
    input_ids, attention_mask, _ = random_batch((5, 3))
    source = encode_packed(model.encoder, PackedSequence.from_padded(input_ids, attention_mask)).packed
    num_beams, length = 3, 2
    decoder_ids = torch.randint(1, 61, (2 * num_beams * length,))
    cu_seqlens = torch.arange(0, 13, length, dtype=torch.int32)
    states = decode_packed(
        model.decoder,
        PackedSequence(decoder_ids, cu_seqlens, length),
        source,
        cu_seqlens_cross=torch.tensor([0, 6, 12], dtype=torch.int32),
        max_seqlen_cross=num_beams * length,
    )
    repeated = PackedSequence.from_padded(
        input_ids.repeat_interleave(num_beams, 0), attention_mask.repeat_interleave(num_beams, 0)
    )
    expected = decode_packed(
        model.decoder, PackedSequence(decoder_ids, cu_seqlens, length), encode_packed(model.encoder, repeated).packed
    )
    assert_close(states, expected)


def test_dropout_is_drawn_anew_and_reproducible():
    model = tiny_t5(torch.float32, dropout_rate=0.2)
    use_packed_attention(model)
    input_ids, attention_mask, labels = random_batch()
    inputs = PackedSequence.from_padded(input_ids, attention_mask)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return packed_loss(model, inputs, labels).item()

    assert loss(0) == loss(0) != loss(1)


def test_errors_say_what_to_do():
    model = tiny_t5(torch.float32)
    input_ids, attention_mask, _ = random_batch()
    inputs = PackedSequence.from_padded(input_ids, attention_mask)
    with pytest.raises(ValueError, match=r"the stack runs attention 'eager': call use_packed_attention\(model\) first"):
        encode_packed(model.encoder, inputs)
    use_packed_attention(model)
    with pytest.raises(ValueError, match=r"pruning: blocks are numbered 1 to 3, got 4"):
        encode_packed(model.encoder, inputs, pruning={4: SemanticAdaptivePruning(0.5)})
    with pytest.raises(ValueError, match=r"int64 token ids \[T\], got torch.float32 \[3, 2\]"):
        encode_packed(model.encoder, PackedSequence(torch.zeros(3, 2), torch.tensor([0, 3], dtype=torch.int32), 3))
    with pytest.raises(RuntimeError, match=r"'stamp' runs packed sequences alone: call encode_packed"):
        model.encoder(input_ids=input_ids, attention_mask=attention_mask)
