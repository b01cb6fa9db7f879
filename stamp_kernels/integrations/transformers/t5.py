"""STAMP in Hugging Face's T5: packed, pruned, with several steps predicted.

    model = T5ForConditionalGeneration(config)
    apply_stamp(model, pruning=PruningConfig(), prediction=PredictionConfig(codes_per_item=4))
    model(input_ids=..., attention_mask=..., labels=..., future_ids=...).loss.backward()
    model.generate(input_ids=..., attention_mask=..., num_beams=10)  # or packed_inputs=...

Inputs, outputs and checkpoints are those of Hugging Face's classes. `model.encoder` and `model.decoder` run packed
sequences through T5's own blocks, see `t5_stacks`. Tested with transformers 5.17 and 5.24.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack
from transformers.utils.generic import can_return_tuple

from stamp_kernels.integrations.transformers.apply import StampedModel, Stamping, register
from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig
from stamp_kernels.integrations.transformers.losses import next_token_loss, shared_unembedding
from stamp_kernels.integrations.transformers.multi_step_targets import IGNORE_INDEX, item_rows, multi_step_targets
from stamp_kernels.integrations.transformers.outputs import EncoderOutput, Seq2SeqOutput
from stamp_kernels.integrations.transformers.packed_trunk import (
    INTERMEDIATE_OUTPUTS,
    check_at_most_one_given,
    check_one_given,
    refuse_intermediate_outputs,
    replace_class,
)
from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout, pack_padded
from stamp_kernels.integrations.transformers.t5_stacks import PackedT5Attention, PackedT5Decoder, PackedT5Encoder
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.modules.prediction import MultiStepPrediction
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.packed import PackedBatch

__all__ = ["StampT5EncoderModel", "StampT5ForConditionalGeneration", "head_inputs"]


class StampT5EncoderModel(StampedModel, T5EncoderModel):
    """T5EncoderModel after `apply_stamp`. Its forward takes the arguments of the encoder, see PackedT5Encoder."""


class StampT5ForConditionalGeneration(StampedModel, T5ForConditionalGeneration):
    """T5ForConditionalGeneration after `apply_stamp`, or from a checkpoint of one.

    `StampT5ForConditionalGeneration.from_pretrained(directory)` restores the pruning, the heads and their weights.
    """

    encoder: PackedT5Encoder
    decoder: PackedT5Decoder
    accepts_loss_kwargs = True  # for Hugging Face's Trainer: forward divides by num_items_in_batch

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        decoder_input_ids: Tensor | None = None,  # [B, N]
        decoder_attention_mask: Tensor | None = None,  # [B, N]
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
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
        **kwargs: Any,
    ) -> Seq2SeqOutput:
        """T5's forward on packed sequences.

        With labels the decoder is packed too, and the loss needs no logits unless they are requested. Without labels
        Hugging Face's own decoder runs, with its cache, on the kept tokens.

        Args:
            input_ids, attention_mask, inputs_embeds: as for T5, padded anywhere.
            packed_inputs: in their place, packed token ids `[T]` or embeddings `[T, d_model]`.
            encoder_outputs: in their place, what `model.encoder` returned. An attention_mask beside an EncoderOutput,
                which has its own, is not read.
            decoder_input_ids, decoder_inputs_embeds: one of them. None: the labels, shifted right.
            decoder_attention_mask: nonzero on tokens. With labels, positions outside the mask have no loss.
            labels: int64 token ids, -100 where there is none.
            use_cache: for decoding without labels.
            future_ids: int64, the tokens that follow the labels in the user's history (at most M tokens, later items of
                the training part), -100 after their end. Required in training with a PredictionConfig.
            num_items_in_batch, num_future_targets: the numbers of labels, and of targets of each (step, level), in a
                larger batch that this one is a part of (several ranks, accumulated steps). The losses are then sums
                divided by these numbers, see `global_target_counts`. None: this batch is the whole. Hugging Face's
                Trainer gives only num_items_in_batch. The auxiliary losses are then means over this part, weighted by
                its share of the labels.
            training_step: for a PredictionConfig whose lambda_ depends on it.
            skip_logits: leave out logits and padded encoder states, only with labels. None: in training with labels.

        Raises:
            ValueError: an argument has a wrong shape or dtype, is missing, is not allowed here, or excludes another
                one that is given.
            RuntimeError: contents are wrong, such as a label outside the vocabulary.
        """
        refuse_intermediate_outputs(self.config, kwargs)
        check_one_given(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            packed_inputs=packed_inputs,
            encoder_outputs=encoder_outputs,
        )
        check_at_most_one_given(attention_mask=attention_mask, packed_inputs=packed_inputs)
        check_at_most_one_given(decoder_input_ids=decoder_input_ids, decoder_inputs_embeds=decoder_inputs_embeds)
        if labels is None:
            if skip_logits:
                raise ValueError("skip_logits=True needs labels: without labels the logits are the result")
            if self.training and future_ids is not None:
                # The Trainer's label_smoothing_factor removes the labels and makes its own loss from logits.
                raise ValueError("future_ids needs labels in training: without labels no further steps are predicted")
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
                inputs = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
                packed_inputs, layout = self.encoder.pack_inputs(inputs, attention_mask)
            check_packed("packed_inputs", packed_inputs)
            batch = len(packed_inputs.cu_seqlens) - 1
        check_tensor("labels", labels, shape=[batch, "num_labels"], dtypes=[torch.int64])
        if decoder_input_ids is not None:
            check_tensor("decoder_input_ids", decoder_input_ids, shape=[*labels.shape])
        if decoder_inputs_embeds is not None:
            check_tensor("decoder_inputs_embeds", decoder_inputs_embeds, shape=[*labels.shape, self.config.d_model])
        if encoder_outputs is None:
            source = cast(PackedBatch, self.encoder(packed_inputs=packed_inputs).packed)

        decoder_inputs = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        if decoder_inputs is None:
            decoder_inputs = self._shift_right(labels) if labels.shape[1] > 0 else labels
        states, decoder_layout = self._decode_packed(decoder_inputs, decoder_attention_mask, source)

        packed_labels = decoder_layout.pack(labels)
        num_labels = (packed_labels != IGNORE_INDEX).sum()
        logits = None if skip_logits else self.lm_head(states.values)
        loss = next_token_loss(self.lm_head, states.values, logits, packed_labels, num_labels)
        share: float | Tensor = 1.0
        if num_items_in_batch is not None:
            share = num_labels.to(loss.dtype) / torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss = share * loss
        prediction_loss = None
        if self.training and self.stamp_prediction is not None:
            prediction_loss = self._prediction_loss(
                states, decoder_layout, labels, future_ids, num_future_targets, training_step
            )
            if num_future_targets is None:
                prediction_loss = share * prediction_loss

        padded_states, mask, positions = None, None, None
        if logits is not None:
            if encoder_outputs is None:
                encoder_outputs = self.encoder.padded_output(source, layout)
            padded_states, mask, positions = _padded_states(encoder_outputs, attention_mask)
        return Seq2SeqOutput(
            loss=loss if prediction_loss is None else loss + prediction_loss,
            logits=None if logits is None else decoder_layout.pad(logits),
            encoder_last_hidden_state=padded_states,
            encoder_attention_mask=mask,
            encoder_positions=positions,
            encoder_packed=source if logits is None else None,
            next_token_loss=loss.detach(),
            prediction_loss=None if prediction_loss is None else prediction_loss.detach(),
        )

    def generate(self, *args: Any, packed_inputs: PackedBatch | None = None, **kwargs: Any) -> Any:
        """T5's generate, which also takes packed histories.

        Args:
            args, kwargs: of `transformers.GenerationMixin.generate`.
            packed_inputs: packed token ids `[T]` or embeddings `[T, d_model]`, in place of input_ids, attention_mask,
                inputs_embeds and encoder_outputs. They are encoded once. A row of the result is one sequence.

        Raises:
            ValueError: packed_inputs are given with other inputs.
        """
        if packed_inputs is not None:
            names = ("input_ids", "attention_mask", "inputs_embeds", "encoder_outputs")
            others = {name: kwargs.get(name) for name in names}
            check_one_given(packed_inputs=packed_inputs, inputs=args[0] if args else kwargs.get("inputs"), **others)
            with torch.no_grad():
                kwargs["encoder_outputs"] = self.encoder(packed_inputs=packed_inputs)
        encoder_outputs = kwargs.get("encoder_outputs")
        if isinstance(encoder_outputs, EncoderOutput):
            kwargs["encoder_outputs"] = encoder_outputs.padded()
        return super().generate(*args, **kwargs)

    def _decode_packed(
        self, decoder_inputs: Tensor, decoder_attention_mask: Tensor | None, source: PackedBatch
    ) -> tuple[PackedBatch, PaddedLayout]:
        """The inputs of the language-model head, and the padded layout of the decoder's inputs."""
        packed_inputs, layout = pack_padded(decoder_inputs, decoder_attention_mask)
        states: PackedBatch = self.decoder(packed_inputs=packed_inputs, packed_source=source).packed
        return replace(states, values=head_inputs(self, states.values)), layout

    def _decode_padded(
        self, encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None, **kwargs: Any
    ) -> Seq2SeqOutput:
        """Hugging Face's decoder on encoded histories, with the mask of their kept tokens."""
        states, mask, positions = _padded_states(encoder_outputs, attention_mask)
        output = super().forward(
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqOutput(**output, encoder_attention_mask=mask, encoder_positions=positions)

    def _prediction_loss(
        self,
        states: PackedBatch,
        layout: PaddedLayout,
        labels: Tensor,
        future_ids: Tensor | None,
        num_future_targets: Tensor | None,
        training_step: int | None,
    ) -> Tensor:
        prediction = cast(MultiStepPrediction, self.stamp_prediction)
        if future_ids is None:
            raise ValueError("future_ids must be given in training with a PredictionConfig, got None")
        targets = multi_step_targets(labels, future_ids, cast(PredictionConfig, self.stamp_prediction_config))
        num_columns = targets.shape[1]
        is_hidden = ~layout.mask[:, :num_columns, None]
        loss: Tensor = prediction(
            states.values,
            targets.masked_fill(is_hidden, IGNORE_INDEX).flatten(0, 1),
            item_rows=item_rows(layout, num_columns),
            unembedding=shared_unembedding(self.lm_head) if prediction.unembedding is None else None,
            cu_seqlens=states.cu_seqlens,
            max_seqlen=states.max_seqlen,
            target_counts=num_future_targets,
            training_step=training_step,
        )
        return loss


def head_inputs(model: T5ForConditionalGeneration, states: Tensor) -> Tensor:
    """The inputs of the language-model head: decoder states, which T5 scales if its embeddings are tied."""
    return states * model.model_dim**-0.5 if model.config.scale_decoder_outputs else states


def _padded_states(
    encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """States `[B, S', d_model]`, their mask, and their positions if they are known."""
    if isinstance(encoder_outputs, EncoderOutput):
        padded = encoder_outputs.padded()
        return cast(Tensor, padded.last_hidden_state), padded.attention_mask, padded.positions
    return encoder_outputs[0], attention_mask, None


def _packed_source(encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None) -> PackedBatch:
    if isinstance(encoder_outputs, EncoderOutput) and encoder_outputs.packed is not None:
        return encoder_outputs.packed
    states, mask, _ = _padded_states(encoder_outputs, attention_mask)
    return pack_padded(states, mask)[0]


# ---- what apply_stamp does to a T5 ---------------------------------------------------------------------------------


def _check(
    model: T5EncoderModel | T5ForConditionalGeneration,
    pruning: PruningConfig | None,
    prediction: PredictionConfig | None,
) -> None:
    if prediction is not None and isinstance(model, T5EncoderModel):
        raise ValueError("prediction needs a decoder, got a T5EncoderModel")
    d_kv = model.config.d_kv
    if d_kv % 8 != 0 or not 8 <= d_kv <= 256:
        raise ValueError(f"model.config.d_kv must be a multiple of 8 from 8 to 256, got {d_kv}")
    if pruning is not None:
        pruning.check_blocks(model.config.num_layers)


def _pack(model: nn.Module, pruning: PruningConfig | None) -> None:
    for stack, packed_class in zip(_stacks(model), (PackedT5Encoder, PackedT5Decoder), strict=False):
        stack.__class__ = packed_class
        replace_class(stack, T5Attention, PackedT5Attention)
    cast(PackedT5Encoder, model.encoder).set_pruning(pruning)


def _unpack(model: nn.Module) -> None:
    cast(PackedT5Encoder, model.encoder).remove_pruning()
    for stack in _stacks(model):
        stack.__class__ = T5Stack
        replace_class(stack, PackedT5Attention, T5Attention)


def _stacks(model: nn.Module) -> list[nn.Module]:
    """The encoder, and the decoder if there is one."""
    return [module for module in (model.encoder, getattr(model, "decoder", None)) if isinstance(module, T5Stack)]


register(T5EncoderModel, Stamping(StampT5EncoderModel, _check, _pack, _unpack))
register(T5ForConditionalGeneration, Stamping(StampT5ForConditionalGeneration, _check, _pack, _unpack))
