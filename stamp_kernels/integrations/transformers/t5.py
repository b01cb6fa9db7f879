"""STAMP in Hugging Face's T5: packed, pruned, with several steps predicted.

    model = T5ForConditionalGeneration(config)
    apply_stamp(model, pruning=PruningConfig(), prediction=PredictionConfig(codes_per_item=4))
    model(input_ids=..., attention_mask=..., labels=..., future_ids=...).loss.backward()
    model.generate(input_ids=..., attention_mask=..., num_beams=10)  # or packed_inputs=...

Inputs, outputs and checkpoints are those of Hugging Face's classes. `model.encoder` and `model.decoder` run packed
sequences through T5's own blocks, see `t5_stacks`. Tested with transformers 4.47, 4.51, 4.57, 5.17 and 5.24; what
differs between them is in `versions`.
"""

import inspect
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import T5EncoderModel, T5ForConditionalGeneration, T5Model, T5PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers.apply import StampedModel
from stamp_kernels.integrations.transformers.classes import (
    own_class,
    packs,
)
from stamp_kernels.integrations.transformers.configuration import PredictionConfig
from stamp_kernels.integrations.transformers.encoded import PackedStates, states_behind
from stamp_kernels.integrations.transformers.generation import (
    PackedGeneration,
    SharedEncoderOutput,
    has_static_cache,
)
from stamp_kernels.integrations.transformers.losses import loss_of_logits, next_token_loss, shared_unembedding
from stamp_kernels.integrations.transformers.multi_step_targets import IGNORE_INDEX, item_rows, multi_step_targets
from stamp_kernels.integrations.transformers.outputs import (
    EncoderOutput,
    Seq2SeqOutput,
    Seq2SeqStates,
    check_layers,
    has_cache,
    returns_tuple,
)
from stamp_kernels.integrations.transformers.packed_trunk import check_at_most_one_given, check_one_given
from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout, pack_padded
from stamp_kernels.integrations.transformers.t5_stacks import (
    PackedT5Decoder,
    PackedT5Encoder,
    options_of_base,
)
from stamp_kernels.integrations.transformers.versions import (
    MODEL_ARGUMENTS,
    base_parameters,
    given_cache,
    head_scale,
    in_order_of,
)
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.modules.prediction import MultiStepPrediction
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.packed import PackedBatch

__all__ = [
    "StampT5EncoderModel",
    "StampT5ForConditionalGeneration",
    "StampT5Model",
    "StampT5PreTrainedModel",
    "head_inputs",
]

_FORWARD_PARAMETERS = base_parameters(T5ForConditionalGeneration.forward)


@packs(T5PreTrainedModel, named="T5PreTrainedModel")
class StampT5PreTrainedModel(StampedModel, T5PreTrainedModel):
    """Any other model with T5's stacks: its own forward calls them, and they pack what they are given."""


@packs(T5EncoderModel, named="T5EncoderModel")
class StampT5EncoderModel(StampedModel, T5EncoderModel):
    """T5EncoderModel after `apply_stamp`. Its forward takes the arguments of the encoder, see PackedT5Encoder."""

    encoder: PackedT5Encoder

    @in_order_of(T5EncoderModel.forward)
    def forward(
        self,
        *,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        packed_inputs: PackedBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        """T5's forward, which also takes packed_inputs."""
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        if packed_inputs is None:
            return super().forward(**inputs, **kwargs)
        return self.encoder(**inputs, packed_inputs=packed_inputs, **kwargs)


@packs(T5Model, named="T5Model")
class StampT5Model(StampedModel, T5Model):
    """T5Model after `apply_stamp`: T5's own forward, whose stacks pack what they are given."""

    @in_order_of(T5Model.forward)
    def forward(self, **kwargs: Any) -> Any:
        """T5's forward, see PackedT5Decoder for when the decoder runs packed."""
        wants_tuple = returns_tuple(kwargs.get("return_dict"), self.config)
        wants_cache = _wants_cache(self.config, kwargs)
        kwargs["use_cache"] = _use_cache(self, kwargs, wants_tuple)
        output = super().forward(**kwargs)
        if wants_tuple:
            return output
        states = Seq2SeqStates(**output)
        states.lacks_cache = wants_cache and not has_cache(output)
        return states


class _Histories(NamedTuple):
    """The histories of a batch, in one of four ways, see `StampT5ForConditionalGeneration.forward`."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    inputs_embeds: Tensor | None
    packed_inputs: PackedBatch | None
    encoder_outputs: Any


class _Targets(NamedTuple):
    """What the losses are computed from, see `StampT5ForConditionalGeneration.forward`."""

    labels: Tensor
    future_ids: Tensor | None
    num_items_in_batch: Tensor | int | None
    num_future_targets: Tensor | None
    training_step: int | None


@packs(T5ForConditionalGeneration, named="T5ForConditionalGeneration")
class StampT5ForConditionalGeneration(PackedGeneration, StampedModel, T5ForConditionalGeneration):
    """T5ForConditionalGeneration after `apply_stamp`, or from a checkpoint of one.

    `StampT5ForConditionalGeneration.from_pretrained(directory)` restores the pruning, the heads and their weights.
    """

    encoder: PackedT5Encoder
    decoder: PackedT5Decoder

    @in_order_of(T5ForConditionalGeneration.forward)
    def forward(
        self,
        *,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        decoder_input_ids: Tensor | None = None,  # [B, N]
        decoder_attention_mask: Tensor | None = None,  # [B, N]
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        decoder_inputs_embeds: Tensor | None = None,  # [B, N, d_model]
        labels: Tensor | None = None,  # [B, N]
        packed_inputs: PackedBatch | None = None,
        future_ids: Tensor | None = None,  # [B, M]
        num_items_in_batch: Tensor | int | None = None,
        num_future_targets: Tensor | None = None,  # [num_steps, codes_per_item]
        training_step: int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """T5's forward on packed sequences.

        In training with labels the decoder is packed too, and the loss needs no logits unless they are requested; in
        evaluation with labels it is with use_cache=False, skip_logits=True or packed_inputs. Otherwise T5's own forward
        runs, on states of the packed encoder: without labels, and where kwargs ask for what packed stacks do not have
        (a cache, which is T5's default in evaluation, attention maps, all hidden states, a tuple).

        Args:
            input_ids, attention_mask, inputs_embeds: as for T5, padded anywhere.
            packed_inputs: in their place, packed token ids `[T]` or embeddings `[T, d_model]`.
            encoder_outputs: in their place, what `model.encoder` returned. An attention_mask beside an EncoderOutput,
                which has its own, is not read.
            decoder_input_ids, decoder_inputs_embeds: one of them. None: the labels, shifted right.
            decoder_attention_mask: nonzero on tokens. With labels, positions outside the mask have no loss.
            labels: int64 token ids, -100 where there is none.
            future_ids: int64, the tokens that follow the labels in the user's history (at most M tokens, later items of
                the training part), -100 after their end. Required in training with a PredictionConfig.
            num_items_in_batch, num_future_targets: the numbers of labels, and of targets of each (step, level), in a
                larger batch that this one is a part of (several ranks, accumulated steps). The losses are then sums
                divided by these numbers, see `global_target_counts`. None: this batch is the whole. Hugging Face's
                Trainer gives only num_items_in_batch. The auxiliary losses are then means over this part, weighted by
                its share of the labels.
            training_step: for a PredictionConfig whose lambda_ depends on it.
            skip_logits: leave out logits and padded encoder states, only with labels. None: in training with labels,
                unless a subclass has a forward of its own, which may read them.
            kwargs: T5's other arguments. Positional arguments have T5's order.

        Returns:
            Seq2SeqOutput, or T5's tuple with return_dict=False.

        Raises:
            ValueError: an argument has a wrong shape or dtype, is missing, is not allowed here, or excludes another
                one that is given.
            RuntimeError: contents are wrong, such as a label outside the vocabulary.
        """
        check_one_given(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            packed_inputs=packed_inputs,
            encoder_outputs=encoder_outputs,
        )
        check_at_most_one_given(attention_mask=attention_mask, packed_inputs=packed_inputs)
        check_at_most_one_given(decoder_input_ids=decoder_input_ids, decoder_inputs_embeds=decoder_inputs_embeds)
        histories = _Histories(input_ids, attention_mask, inputs_embeds, packed_inputs, encoder_outputs)
        options = self._options_of_base(kwargs)
        if labels is None:
            if skip_logits:
                raise ValueError("skip_logits=True needs labels: without labels the logits are the result")
            if self.training and future_ids is not None:
                # The Trainer's label_smoothing_factor removes the labels and makes its own loss from logits.
                raise ValueError("future_ids needs labels in training: without labels no further steps are predicted")
        elif options and (needing := self._only_packed(skip_logits=skip_logits, packed_inputs=packed_inputs)):
            found = ", ".join(options)
            raise ValueError(f"{found}: packed stacks do not have this, and {needing} with labels needs them")
        # In evaluation T5 returns a cache by default.
        wants_cache = not self.training and _wants_cache(self.config, kwargs)
        if labels is None or options or (wants_cache and not skip_logits and packed_inputs is None):
            return self._forward_of_base(
                histories,
                num_items_in_batch,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_inputs_embeds=decoder_inputs_embeds,
                labels=labels,
                **kwargs,
            )
        if skip_logits is None:
            # A subclass may read the logits of super().forward.
            skip_logits = self.training and type(self).forward is StampT5ForConditionalGeneration.forward
        return self._forward_packed(
            histories,
            decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds,
            decoder_attention_mask,
            _Targets(labels, future_ids, num_items_in_batch, num_future_targets, training_step),
            skip_logits,
            kwargs,
        )

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For Hugging Face's Trainer: forward divides by num_items_in_batch. A subclass's own may not take it."""
        parameters = inspect.signature(type(self).forward).parameters
        return "num_items_in_batch" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    @property
    def is_pruned(self) -> bool:
        """Whether the encoder prunes in the current mode."""
        return getattr(self.encoder, "is_pruned", False)

    @property
    def trains_heads(self) -> bool:
        """Whether forward computes the auxiliary loss in the current mode."""
        return self.training and self.stamp_prediction is not None

    def shares_sources(self) -> bool:
        """Whether the beams of a search may share their history. A forward of a subclass may read the states."""
        is_own = type(self).forward is StampT5ForConditionalGeneration.forward
        return is_own and bool(getattr(self.decoder, "takes_packed", False)) and not torch.compiler.is_compiling()

    def _wants_hidden_states(self, kwargs: dict[str, Any]) -> bool:
        requested = kwargs.get("output_hidden_states")
        return bool(getattr(self.config, "output_hidden_states", False) if requested is None else requested)

    def _options_of_base(self, kwargs: dict[str, Any]) -> list[str]:
        """What only T5's own forward can do of what is asked for.

        Raises:
            ValueError: an argument is unknown.
        """
        options = options_of_base(self.config, **kwargs)
        unknown = [name for name, value in kwargs.items() if value is not None and name not in MODEL_ARGUMENTS]
        if unknown and getattr(self.encoder, "takes_packed", False):  # an encoder with a forward of its own may know it
            raise ValueError(f"forward takes no {', '.join(unknown)}")
        if returns_tuple(kwargs.get("return_dict"), self.config):
            options.append("return_dict=False")
        if not getattr(self.decoder, "takes_packed", False):
            options.append(f"a decoder of class {own_class(type(self.decoder)).__name__}")
        if self.trains_heads or self.is_pruned:
            check_layers(kwargs.get("output_hidden_states"))
        elif self._wants_hidden_states(kwargs):
            options.append("output_hidden_states")  # of all blocks
        return options

    def _only_packed(self, **arguments: Any) -> str:
        """What is asked for that only packed stacks can do with labels."""
        asked_for = ["prediction"] if self.trains_heads else []
        return " and ".join(asked_for + [name for name, value in arguments.items() if value not in (None, False)])

    def _encode(self, histories: _Histories, kwargs: dict[str, Any]) -> Any:
        """The encoder's output with T5's options, and with arguments that T5's forward does not know."""
        shared = ("output_attentions", "output_hidden_states", "head_mask")
        options = {k: v for k, v in kwargs.items() if k in shared or k not in _FORWARD_PARAMETERS}
        options = {k: v for k, v in options.items() if v is not None} | dict(return_dict=True)
        if histories.packed_inputs is not None:
            options["packed_inputs"] = histories.packed_inputs
        return self.encoder(
            input_ids=histories.input_ids,
            attention_mask=histories.attention_mask,
            inputs_embeds=histories.inputs_embeds,
            **options,
        )

    def _forward_of_base(self, histories: _Histories, num_items_in_batch: Tensor | int | None, **kwargs: Any) -> Any:
        """T5's own forward on encoded histories, with the mask of their kept tokens."""
        encoder_outputs = histories.encoder_outputs
        if encoder_outputs is None:
            encoder_outputs = self._encode(histories, kwargs)
        needs_copies = kwargs.get("output_attentions") or has_static_cache(given_cache(kwargs))
        if needs_copies and isinstance(encoder_outputs, SharedEncoderOutput):
            encoder_outputs = encoder_outputs.repeated()
        if isinstance(encoder_outputs, SharedEncoderOutput):
            given = kwargs.get("decoder_input_ids")
            given = kwargs.get("decoder_inputs_embeds") if given is None else given
            states, mask, positions = encoder_outputs.states(cast(Tensor, given).shape[0]), None, None
        else:
            states, mask, positions = _padded_states(encoder_outputs, histories.attention_mask)
        names = ("last_hidden_state", "hidden_states", "attentions")
        fields = (
            encoder_outputs if isinstance(encoder_outputs, dict) else dict(zip(names, encoder_outputs, strict=False))
        )
        wants_tuple = returns_tuple(kwargs.get("return_dict"), self.config)
        wants_cache = _wants_cache(self.config, kwargs)
        kwargs |= dict(return_dict=True, use_cache=_use_cache(self, kwargs, wants_tuple))
        labels, seen = kwargs.get("labels"), kwargs.get("decoder_attention_mask")
        if labels is not None and seen is not None and seen.dim() == 2:
            if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
                kwargs["decoder_input_ids"] = self._shift_right(labels)
            kwargs["labels"] = labels = labels.masked_fill(seen == 0, IGNORE_INDEX)
        output = super().forward(
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(
                last_hidden_state=states,
                hidden_states=fields.get("hidden_states"),
                attentions=fields.get("attentions"),
            ),
            **kwargs,
        )
        if labels is not None and num_items_in_batch is not None:
            output.loss = _share((labels != IGNORE_INDEX).sum(), num_items_in_batch, output.loss) * output.loss
        if wants_tuple:
            return output.to_tuple()
        lacks_cache = wants_cache and not has_cache(output)
        return Seq2SeqOutput.of_base(
            output, lacks_cache=lacks_cache, encoder_attention_mask=mask, encoder_positions=positions
        )

    def _forward_packed(
        self,
        histories: _Histories,
        decoder_inputs: Tensor | None,
        decoder_attention_mask: Tensor | None,
        targets: _Targets,
        skip_logits: bool,
        kwargs: dict[str, Any],
    ) -> Seq2SeqOutput:
        """Both stacks and the losses on packed sequences, without a cache."""
        labels, encoder_outputs, packed_inputs, layout = targets.labels, histories.encoder_outputs, None, None
        if encoder_outputs is None and not getattr(self.encoder, "takes_packed", False):
            encoder_outputs = self._encode(histories, kwargs)
        if encoder_outputs is not None:
            source = _packed_source(encoder_outputs, histories.attention_mask)
            batch = source.cu_seqlens.shape[0] - 1
        else:
            packed_inputs = histories.packed_inputs
            if packed_inputs is None:
                inputs = self.encoder.padded_inputs(histories.input_ids, histories.inputs_embeds)
                packed_inputs, layout = self.encoder.pack_inputs(inputs, histories.attention_mask)
            check_packed("packed_inputs", packed_inputs)
            batch = packed_inputs.cu_seqlens.shape[0] - 1
        check_tensor("labels", labels, shape=[batch, "num_labels"], dtypes=[torch.int64])
        if decoder_inputs is None:
            decoder_inputs = self._shift_right(labels) if labels.shape[1] > 0 else labels
        if decoder_inputs.is_floating_point():
            check_tensor("decoder_inputs_embeds", decoder_inputs, shape=[*labels.shape, self.config.d_model])
        else:
            check_tensor("decoder_input_ids", decoder_inputs, shape=[*labels.shape])
            decoder_inputs = self.decoder.padded_inputs(decoder_inputs, None)
        if packed_inputs is not None:
            source = cast(PackedBatch, self.encoder(packed_inputs=packed_inputs).packed)
        packed_decoder_inputs, decoder_layout = pack_padded(decoder_inputs, decoder_attention_mask)
        decoded: PackedBatch = self.decoder(packed_inputs=packed_decoder_inputs, packed_source=source).packed
        states = replace(decoded, values=head_inputs(self, decoded.values))

        logits = None
        packed_labels = decoder_layout.pack(labels, IGNORE_INDEX)
        num_labels = (packed_labels != IGNORE_INDEX).sum()
        if skip_logits:
            loss = next_token_loss(self.lm_head, states.values, packed_labels, num_labels)
        else:
            # From the logits that are returned, so that they have a gradient.
            logits = decoder_layout.pad(self.lm_head(states.values))
            seen_labels = labels.masked_fill(~decoder_layout.mask, IGNORE_INDEX)
            loss = loss_of_logits(logits.flatten(0, 1), seen_labels.flatten(), num_labels)
        share: float | Tensor = 1.0
        if targets.num_items_in_batch is not None:
            share = _share(num_labels, targets.num_items_in_batch, loss)
        loss = share * loss
        prediction_loss = None
        if self.trains_heads:
            prediction_loss = self._prediction_loss(states, decoder_layout, targets)
            if targets.num_future_targets is None:
                prediction_loss = share * prediction_loss

        padded_states, mask, positions = None, None, None
        wants_states = self._wants_hidden_states(kwargs)
        if logits is not None or wants_states:
            if encoder_outputs is None:
                encoder_outputs = self.encoder.padded_output(source, layout)
            padded_states, mask, positions = _padded_states(encoder_outputs, histories.attention_mask)
        return Seq2SeqOutput(
            loss=loss if prediction_loss is None else loss + prediction_loss,
            logits=logits,
            decoder_hidden_states=(decoder_layout.pad(decoded.values),) if wants_states else None,
            encoder_last_hidden_state=padded_states,
            encoder_hidden_states=(cast(Tensor, padded_states),) if wants_states else None,
            encoder_attention_mask=mask,
            encoder_positions=positions,
            encoder_packed=source if padded_states is None else None,
            next_token_loss=loss.detach(),
            prediction_loss=None if prediction_loss is None else prediction_loss.detach(),
        )

    def _prediction_loss(self, states: PackedBatch, layout: PaddedLayout, targets: _Targets) -> Tensor:
        prediction = cast(MultiStepPrediction, self.stamp_prediction)
        config = cast(PredictionConfig, self.stamp_prediction_config)
        if targets.future_ids is None:
            raise ValueError("future_ids must be given in training with a PredictionConfig, got None")
        steps = multi_step_targets(targets.labels, targets.future_ids, config)
        num_columns = steps.shape[1]
        is_hidden = ~layout.mask[:, :num_columns, None]
        loss: Tensor = prediction(
            states.values,
            steps.masked_fill(is_hidden, IGNORE_INDEX).flatten(0, 1),
            item_rows=item_rows(layout, num_columns),
            unembedding=shared_unembedding(self.lm_head) if prediction.unembedding is None else None,
            cu_seqlens=states.cu_seqlens,
            max_seqlen=states.max_seqlen,
            target_counts=targets.num_future_targets,
            training_step=targets.training_step,
        )
        return loss


def head_inputs(model: T5ForConditionalGeneration, states: Tensor) -> Tensor:
    """The inputs of the language-model head: decoder states, which T5 scales if its embeddings are tied."""
    scale = head_scale(model)
    return states if scale == 1.0 else states * scale


def _wants_cache(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the base model's output would have a cache."""
    return bool(getattr(config, "use_cache", True) if kwargs.get("use_cache") is None else kwargs["use_cache"])


def _use_cache(model: T5PreTrainedModel, kwargs: dict[str, Any], wants_tuple: bool) -> bool | None:
    """use_cache for T5's own forward. None leaves it to the decoder, and before 5.0 to the config."""
    given: bool | None = kwargs.get("use_cache")
    if given is not None:
        return given
    if wants_tuple:
        return model.config.use_cache  # a tuple has the base model's length
    packs = model.training and given_cache(kwargs) is None and getattr(model.decoder, "takes_packed", False)
    return False if packs else None


def _share(num_labels: Tensor, num_items_in_batch: Tensor | int, loss: Tensor) -> Tensor:
    """The part of a larger batch's labels that a batch has."""
    return num_labels.to(loss.dtype) / torch.as_tensor(num_items_in_batch).clamp(min=1)


def _padded_states(
    encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """States `[B, S', d_model]`, their mask, and their positions if they are known."""
    if isinstance(encoder_outputs, EncoderOutput):
        padded = encoder_outputs.padded()
        return cast(Tensor, padded.last_hidden_state), padded.attention_mask, padded.positions
    states = encoder_outputs[0]
    behind = states_behind(states)
    return states, behind.mask_beside(attention_mask) if isinstance(behind, PackedStates) else attention_mask, None


def _packed_source(encoder_outputs: BaseModelOutput | tuple[Tensor, ...], attention_mask: Tensor | None) -> PackedBatch:
    if isinstance(encoder_outputs, EncoderOutput) and encoder_outputs.packed is not None:
        return encoder_outputs.packed
    states, mask, _ = _padded_states(encoder_outputs, attention_mask)
    behind = states_behind(states)
    is_known = isinstance(behind, PackedStates) and behind.mask_beside(mask) is behind.layout.mask
    return cast(PackedStates, behind).read(states) if is_known else pack_padded(states, mask)[0]
