"""STAMP in Hugging Face T5 by one line: packed, pruned, with several steps predicted.

    model = T5ForConditionalGeneration(config)
    apply_stamp(model, pruning=PruningConfig(), prediction=PredictionConfig(codes_per_item=4))
    model(input_ids=..., attention_mask=..., labels=..., future_ids=...).loss.backward()
    model.generate(input_ids=..., attention_mask=..., num_beams=10)

Inputs, outputs and checkpoints stay the host's; `model.encoder` and `model.decoder` run packed sequences through the
host's own blocks (see `_t5_packed`). Tested with transformers 5.17 and 5.24.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack
from transformers.utils.generic import can_return_tuple

from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig, to_dict
from stamp_kernels.integrations.transformers.multi_step_targets import (
    IGNORE_INDEX,
    global_target_counts,
    multi_step_targets,
)
from stamp_kernels.integrations.transformers.packed_trunk import (
    INTERMEDIATE_OUTPUTS,
    EncoderOutput,
    PackedT5Attention,
    PackedT5Decoder,
    PackedT5Encoder,
    PaddedLayout,
    check_one_given,
    pack_padded,
    refuse_intermediate_outputs,
)
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import multi_token_cross_entropy
from stamp_kernels.packed import PackedBatch

__all__ = [
    "EncoderOutput",
    "PredictionConfig",
    "PruningConfig",
    "Seq2SeqOutput",
    "StampT5EncoderModel",
    "StampT5ForConditionalGeneration",
    "apply_stamp",
    "global_target_counts",
    "remove_stamp",
]


@dataclass
class Seq2SeqOutput(Seq2SeqLMOutput):
    """The host's output, and what pruning and prediction add to it.

    Attributes:
        loss: what training minimises: next_token_loss, plus the auxiliary one while training with a PredictionConfig.
        logits: `[B, N, vocab_size]`; None where they are skipped.
        encoder_last_hidden_state: `[B, S', d_model]` states of the tokens that pruning kept, see EncoderOutput; None
            where logits are skipped.
        encoder_attention_mask, encoder_positions: `[B, S']`, which of these rows are tokens, and which tokens they are,
            see EncoderOutput.
        encoder_packed: the same states packed, where logits are skipped.
        next_token_loss, prediction_loss: the two parts of the loss, without gradient.
    """

    encoder_attention_mask: Tensor | None = None
    encoder_positions: Tensor | None = None
    encoder_packed: PackedBatch | None = None
    next_token_loss: Tensor | None = None
    prediction_loss: Tensor | None = None


class _Stamped:
    """What the stamped classes share: they are made by `apply_stamp`, or from a checkpoint's config."""

    def __init__(self, config: T5Config, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        description = getattr(config, "stamp", None) or {}
        pruning, prediction = description.get("pruning"), description.get("prediction")
        if isinstance(self, T5EncoderModel):
            prediction = None  # what a whole model's checkpoint says of its decoder
        apply_stamp(
            self,
            pruning=None if pruning is None else PruningConfig(**pruning),
            prediction=None if prediction is None else PredictionConfig(**prediction),
        )

    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks: the host would draw the heads' layers at random. What is loaded is not overwritten,
        the host sees to that while it calls this."""
        prediction = getattr(self, "stamp_prediction", None)
        heads = [] if prediction is None else [prediction, *prediction.heads]
        # The innermost one: the host asks for a head's layers alone.
        owners = [head for head in heads if any(module is part for part in head.modules())]
        if owners:
            owners[-1].reset_parameters()
        else:
            super()._init_weights(module)


class StampT5EncoderModel(_Stamped, T5EncoderModel):
    """T5EncoderModel after `apply_stamp`; its forward takes the arguments of the encoder, see PackedT5Encoder."""


class StampT5ForConditionalGeneration(_Stamped, T5ForConditionalGeneration):
    """T5ForConditionalGeneration after `apply_stamp`, or from a checkpoint of one:
    `StampT5ForConditionalGeneration.from_pretrained(directory)` has the pruning, the heads and their weights."""

    accepts_loss_kwargs = True  # for Hugging Face's Trainer: forward divides by num_items_in_batch

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        decoder_input_ids: Tensor | None = None,  # [B, N]
        decoder_attention_mask: Tensor | None = None,  # [B, N]
        encoder_outputs: EncoderOutput | None = None,
        *,
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        decoder_inputs_embeds: Tensor | None = None,  # [B, N, d_model]
        labels: Tensor | None = None,  # [B, N]
        use_cache: bool | None = None,
        packed_inputs: PackedBatch | None = None,
        future_ids: Tensor | None = None,  # [B, M]
        num_items_in_batch: Tensor | int | None = None,
        num_future_targets: Tensor | None = None,  # [num_steps, codes_per_item]
        training_step: int | None = None,
        skip_logits: bool | None = None,
        **kwargs: object,
    ) -> Seq2SeqOutput:
        """The host's forward on packed sequences. With labels the decoder is packed too, and the loss builds no logits
        unless they are asked for; without labels the host's own decoder runs, with its cache, on the kept tokens.

        Args:
            input_ids, attention_mask, inputs_embeds: as the host takes them, padded anywhere.
            packed_inputs: in their place, packed token ids `[T]` or embeddings `[T, d_model]`.
            encoder_outputs: in their place, what `model.encoder` returned.
            decoder_input_ids, decoder_inputs_embeds: None: labels, shifted right.
            decoder_attention_mask: nonzero on tokens. With labels, the positions outside have no loss.
            labels: int64 token ids, -100 where there is none.
            use_cache: for decoding without labels.
            future_ids: int64, the tokens that follow the labels in the user's history (M tokens at most, later items of
                the training part), -100 after their end. Needed for training with a PredictionConfig.
            num_items_in_batch, num_future_targets: numbers of labels, and of targets of each (step, level), of the
                whole batch that this one is a part of (several ranks, accumulated steps): the losses are then sums
                divided by them, see `global_target_counts`. None: this batch is all. Hugging Face's Trainer gives the
                first one alone; the auxiliary means are then those of the part, in proportion to its labels.
            training_step: for a PredictionConfig whose lambda_ depends on it.
            skip_logits: leave logits and padded encoder states out. None: while training with labels.

        Raises:
            ValueError: an argument has a wrong shape or dtype, is missing, or has no meaning here.
            RuntimeError: contents are wrong, such as a label outside the vocabulary.
        """
        refuse_intermediate_outputs(self.config, kwargs)
        if encoder_outputs is None:
            check_one_given(input_ids=input_ids, inputs_embeds=inputs_embeds, packed_inputs=packed_inputs)
        if labels is None:
            if self.training and future_ids is not None:
                # The Trainer's label_smoothing_factor takes the labels away, to make a loss of its own from logits.
                raise ValueError("future_ids go with labels in training: without them nothing further is predicted")
            if encoder_outputs is None:
                encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, packed_inputs).padded()
            return self._decode_padded(
                encoder_outputs,
                attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

        unknown = [name for name, value in kwargs.items() if value is not None and name not in INTERMEDIATE_OUTPUTS]
        if unknown:
            raise ValueError(f"forward takes no {', '.join(unknown)} with labels")
        if skip_logits is None:
            skip_logits = self.training
        layout = None
        if encoder_outputs is not None:
            source = _packed_source(encoder_outputs, attention_mask)
            batch = len(source.cu_seqlens) - 1
        else:
            if packed_inputs is None:
                packed_inputs, layout = pack_padded(
                    input_ids if inputs_embeds is None else inputs_embeds, attention_mask
                )
            batch = len(packed_inputs.cu_seqlens) - 1
        check_tensor("labels", labels, shape=[batch, "num_labels"], dtypes=[torch.int64])
        if decoder_input_ids is not None:
            check_tensor("decoder_input_ids", decoder_input_ids, shape=[*labels.shape])
        if decoder_inputs_embeds is not None:
            check_tensor("decoder_inputs_embeds", decoder_inputs_embeds, shape=[*labels.shape, self.config.d_model])
        if encoder_outputs is None:
            source = self.encoder(packed_inputs=packed_inputs).packed

        decoder_inputs = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        if decoder_inputs is None:
            decoder_inputs = self._shift_right(labels) if labels.shape[1] > 0 else labels
        packed_decoder_inputs, decoder_layout = pack_padded(decoder_inputs, decoder_attention_mask)
        states = self.decoder(packed_inputs=packed_decoder_inputs, packed_source=source).packed
        states = replace(states, values=head_inputs(self, states.values))

        packed_labels = decoder_layout.pack(labels)
        num_labels = (packed_labels != IGNORE_INDEX).sum()
        logits = None if skip_logits else self.lm_head(states.values)
        next_token_loss = self._next_token_loss(states.values, logits, packed_labels, num_labels)
        share = 1.0
        if num_items_in_batch is not None:
            share = num_labels.to(next_token_loss.dtype) / torch.as_tensor(num_items_in_batch).clamp(min=1)
        next_token_loss = share * next_token_loss
        prediction_loss = None
        if self.training and self.stamp_prediction is not None:
            prediction_loss = self._prediction_loss(
                states, decoder_layout, labels, future_ids, num_future_targets, training_step
            )
            if num_future_targets is None:
                prediction_loss = share * prediction_loss

        states_of_encoder = {"encoder_packed": source}
        if not skip_logits:
            if encoder_outputs is None:
                encoder_outputs = self.encoder.padded_output(source, layout)
            names = ("encoder_last_hidden_state", "encoder_attention_mask", "encoder_positions")
            states_of_encoder = dict(zip(names, _padded_states(encoder_outputs, attention_mask), strict=True))
        return Seq2SeqOutput(
            loss=next_token_loss if prediction_loss is None else next_token_loss + prediction_loss,
            logits=None if skip_logits else decoder_layout.pad(logits),
            next_token_loss=next_token_loss.detach(),
            prediction_loss=None if prediction_loss is None else prediction_loss.detach(),
            **states_of_encoder,
        )

    def _decode_padded(
        self, encoder_outputs: EncoderOutput, attention_mask: Tensor | None, **kwargs: object
    ) -> Seq2SeqOutput:
        """The host's decoder on encoded histories; they bring the mask of the tokens that are left of them."""
        states, mask, positions = _padded_states(encoder_outputs, attention_mask)
        output = super().forward(
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqOutput(**output, encoder_attention_mask=mask, encoder_positions=positions)

    def _next_token_loss(self, states: Tensor, logits: Tensor | None, labels: Tensor, num_labels: Tensor) -> Tensor:
        """The mean cross-entropy of `[T, d_model]` states, from logits where these exist; 0 without labels."""
        # What has taken the head's place or hangs on it (an adapter, a quantized layer, a hook) is asked for logits.
        if logits is None and _is_plain_linear(self.lm_head):
            return multi_token_cross_entropy(states, self.lm_head.weight, labels[:, None], bias=self.lm_head.bias)
        logits = self.lm_head(states) if logits is None else logits
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / num_labels.clamp(min=1)

    def _prediction_loss(
        self,
        states: PackedBatch,
        layout: PaddedLayout,
        labels: Tensor,
        future_ids: Tensor | None,
        num_future_targets: Tensor | None,
        training_step: int | None,
    ) -> Tensor:
        if future_ids is None:
            raise ValueError("future_ids must be given while training with a PredictionConfig, got None")
        targets = multi_step_targets(labels, future_ids, self.stamp_prediction_config)
        return self.stamp_prediction(
            states.values,
            layout.pack(targets),
            unembedding=self._shared_unembedding(),
            cu_seqlens=states.cu_seqlens,
            max_seqlen=states.max_seqlen,
            target_counts=num_future_targets,
            training_step=training_step,
        )

    def _shared_unembedding(self) -> Tensor | None:
        if self.stamp_prediction.unembedding is not None:
            return None
        if not _is_plain_linear(self.lm_head):
            found = f"{type(self.lm_head).__module__}.{type(self.lm_head).__qualname__}"
            raise ValueError(
                f'unembedding="shared" needs an nn.Linear without hooks as lm_head, got {found}: '
                'choose unembedding="own"'
            )
        return self.lm_head.weight


# `save_pretrained` writes the name of the class into config.json: a checkpoint is one of the host's.
StampT5EncoderModel.__name__ = T5EncoderModel.__name__
StampT5ForConditionalGeneration.__name__ = T5ForConditionalGeneration.__name__

_STAMPED_CLASSES = {
    T5EncoderModel: StampT5EncoderModel,
    T5ForConditionalGeneration: StampT5ForConditionalGeneration,
}


def apply_stamp(
    model: T5ForConditionalGeneration | T5EncoderModel,
    *,
    pruning: PruningConfig | None = None,
    prediction: PredictionConfig | None = None,
) -> StampT5ForConditionalGeneration | StampT5EncoderModel:
    """Run a T5 on packed sequences, prune its encoder (SAP) and let it predict further items in training (MAP).

    In place, and undone by `remove_stamp`. Parameters, their names and the model's inputs stay the host's; with neither
    pruning nor prediction so do its outputs and gradients. The heads of the prediction are `model.stamp_prediction`,
    and their parameters the only new ones. What was asked for is kept in `model.config.stamp`, so that
    `save_pretrained` writes it and `StampT5ForConditionalGeneration.from_pretrained` has it again; the host's own class
    loads such a checkpoint too, as a model that is not pruned.

    Applied again it replaces the configurations; heads whose configuration stays keep their weights. Call it before
    what wraps or replaces the model's class or parameters: an optimizer (which has to know the heads), `torch.compile`,
    `fully_shard`, `DistributedDataParallel`, PEFT (`modules_to_save=["stamp_prediction"]` trains the heads).

    Args:
        model: a T5ForConditionalGeneration or T5EncoderModel; no subclass, whose forward would be lost.
        pruning: None: not pruned.
        prediction: None: no auxiliary loss. For T5ForConditionalGeneration alone.

    Returns:
        The same model.

    Raises:
        ValueError: the model is of another class, its d_kv is no multiple of 8 up to 256, the schedule names a block
            that the encoder does not have, or prediction is asked of an encoder.
    """
    host_class = _host_class(model)
    if prediction is not None and host_class is T5EncoderModel:
        raise ValueError("prediction needs a decoder, got a T5EncoderModel")
    d_kv = model.config.d_kv
    if d_kv % 8 != 0 or not 8 <= d_kv <= 256:
        raise ValueError(f"model.config.d_kv must be a multiple of 8 from 8 to 256, got {d_kv}")
    if pruning is not None:
        pruning.check_blocks(model.config.num_layers)
    _stamp(model, pruning, prediction)
    return model


def remove_stamp(model: T5ForConditionalGeneration | T5EncoderModel) -> None:
    """The host again, with the weights as they are now and without the heads; nothing happens to a host.

    Raises:
        ValueError: the model is of another class: give the one inside a wrapper.
    """
    host_class = _host_class(model)
    if host_class is type(model):
        return
    for module in model.modules():
        if isinstance(module, PackedT5Attention):
            module.__class__ = T5Attention
    for stack in _stacks(model):
        stack.__class__ = T5Stack
    del model.encoder.stamp_pruning, model.encoder.stamp_protected_ends
    del model.stamp_prediction, model.stamp_prediction_config
    _forget_description(model)
    model.__class__ = host_class


def _host_class(model: nn.Module) -> type:
    """The host's class of a model, stamped or not; ValueError for any other."""
    for host, stamped in _STAMPED_CLASSES.items():
        if type(model) in (host, stamped):
            return host
    raise ValueError(
        f"model must be a {' or '.join(host.__name__ for host in _STAMPED_CLASSES)} itself, "
        f"not wrapped or sharded, got {type(model).__name__}"
    )


def _stacks(model: nn.Module) -> list[T5Stack]:
    return [stack for stack in (model.encoder, getattr(model, "decoder", None)) if stack is not None]


def _stamp(model: nn.Module, pruning: PruningConfig | None, prediction: PredictionConfig | None) -> None:
    heads = getattr(model, "stamp_prediction", None)
    if prediction is None:
        heads = None
    elif prediction != getattr(model, "stamp_prediction_config", None):
        weight = model.lm_head.weight
        heads = prediction.build_module(model.config.d_model, weight.shape[0]).to(weight.device, weight.dtype)
        heads.train(model.training)
    # From here on nothing fails, so that a model is changed as a whole or not at all.
    model.__class__ = _STAMPED_CLASSES[_host_class(model)]
    for stack, packed_class in zip(_stacks(model), (PackedT5Encoder, PackedT5Decoder), strict=False):
        stack.__class__ = packed_class
        for module in stack.modules():
            if type(module) is T5Attention:
                module.__class__ = PackedT5Attention
    model.encoder.set_pruning(pruning)
    model.stamp_prediction = heads
    model.stamp_prediction_config = prediction
    _forget_description(model)
    model.config.stamp = {"pruning": to_dict(pruning), "prediction": to_dict(prediction)}


def _forget_description(model: nn.Module) -> None:
    """In the model's config and in the copies of it that the stacks of a loaded model have."""
    for config in (model.config, *(stack.config for stack in _stacks(model))):
        if hasattr(config, "stamp"):
            del config.stamp


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling it is the product with its weight, and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is nn.Linear and not any(hooks) and "forward" not in vars(module)


def head_inputs(model: T5ForConditionalGeneration, states: Tensor) -> Tensor:
    """Decoder states as the language-model head takes them: T5 scales them where its embeddings are tied."""
    return states * model.model_dim**-0.5 if model.config.scale_decoder_outputs else states


def _padded_states(
    encoder_outputs: BaseModelOutput | tuple, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """States `[B, S', d_model]`, their mask, and their positions where they are known."""
    if isinstance(encoder_outputs, EncoderOutput):
        padded = encoder_outputs.padded()
        return padded.last_hidden_state, padded.attention_mask, padded.positions
    return encoder_outputs[0], attention_mask, None


def _packed_source(encoder_outputs: BaseModelOutput | tuple, attention_mask: Tensor | None) -> PackedBatch:
    if isinstance(encoder_outputs, EncoderOutput) and encoder_outputs.packed is not None:
        return encoder_outputs.packed
    states, mask, _ = _padded_states(encoder_outputs, attention_mask)
    return pack_padded(states, mask)[0]
