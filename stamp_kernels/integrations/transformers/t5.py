"""STAMP in Hugging Face's T5: packed, pruned, with several steps predicted.

    model = T5ForConditionalGeneration(config)
    apply_stamp(model, pruning=PruningConfig(), prediction=PredictionConfig(codes_per_item=4))
    model(input_ids=..., attention_mask=..., labels=..., future_ids=...).loss.backward()
    model.generate(input_ids=..., attention_mask=..., num_beams=10)  # or packed_inputs=...

Inputs, outputs and checkpoints are those of Hugging Face's classes. `model.encoder` and `model.decoder` run packed
sequences through T5's own blocks, see `t5_stacks`. Tested with transformers 5.17 and 5.24.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel, T5ForConditionalGeneration, T5Model, T5PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from stamp_kernels.integrations.transformers.apply import StampedModel, Stamping, StampStatus, register
from stamp_kernels.integrations.transformers.classes import (
    StampedModule,
    lost_forward,
    own_class,
    packs,
    patched_forward,
    stamped_class,
)
from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig
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
    PackedT5Attention,
    PackedT5Decoder,
    PackedT5Encoder,
    options_of_base,
)
from stamp_kernels.integrations.transformers.tokenwise import mixes_tokens
from stamp_kernels.integrations.transformers.versions import (
    MODEL_ARGUMENTS,
    arguments_by_name,
    base_parameters,
    head_scale,
    let_record,
)
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.modules.prediction import MultiStepPrediction
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.packed import PackedBatch

__all__ = ["StampT5EncoderModel", "StampT5ForConditionalGeneration", "StampT5Model", "head_inputs"]

_FORWARD_PARAMETERS = base_parameters(T5ForConditionalGeneration.forward)
_ENCODER_PARAMETERS = base_parameters(T5EncoderModel.forward)
_BIAS_METHODS = ("compute_bias", "_relative_position_bucket")  # that packed attention computes itself
_KNOWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")  # computes the same as packed attention


@packs(T5PreTrainedModel, named="T5PreTrainedModel")
class StampT5PreTrainedModel(StampedModel, T5PreTrainedModel):
    """Any other model with T5's stacks: its own forward calls them, and they pack what they are given."""


@packs(T5EncoderModel, named="T5EncoderModel")
class StampT5EncoderModel(StampedModel, T5EncoderModel):
    """T5EncoderModel after `apply_stamp`. Its forward takes the arguments of the encoder, see PackedT5Encoder."""

    encoder: PackedT5Encoder

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        *args: Any,
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        packed_inputs: PackedBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        """T5's forward, which also takes packed_inputs. Positional arguments have T5's order."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if packed_inputs is None:
            return super().forward(input_ids, attention_mask, *args, **kwargs)
        kwargs |= dict(zip(_ENCODER_PARAMETERS[2:], args, strict=False))
        return self.encoder(input_ids, attention_mask, packed_inputs=packed_inputs, **kwargs)


@packs(T5Model, named="T5Model")
class StampT5Model(StampedModel, T5Model):
    """T5Model after `apply_stamp`: T5's own forward, whose stacks pack what they are given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """T5's forward, see PackedT5Decoder for when the decoder runs packed."""
        wants_tuple = returns_tuple(kwargs.get("return_dict"), self.config)
        names = base_parameters(T5Model.forward)
        arguments = arguments_by_name(names, args, kwargs)
        if arguments.get("use_cache") is None and wants_tuple:
            arguments["use_cache"] = self.config.use_cache  # a tuple has the base model's length
        output = super().forward(**arguments)
        if wants_tuple:
            return output
        states = Seq2SeqStates(**output)
        states.lacks_cache = _wants_cache(self.config, arguments) and not has_cache(output)
        return states


@packs(T5ForConditionalGeneration, named="T5ForConditionalGeneration")
class StampT5ForConditionalGeneration(PackedGeneration, StampedModel, T5ForConditionalGeneration):
    """T5ForConditionalGeneration after `apply_stamp`, or from a checkpoint of one.

    `StampT5ForConditionalGeneration.from_pretrained(directory)` restores the pruning, the heads and their weights.
    """

    encoder: PackedT5Encoder
    decoder: PackedT5Decoder

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        decoder_input_ids: Tensor | None = None,  # [B, N]
        decoder_attention_mask: Tensor | None = None,  # [B, N]
        *args: Any,
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
            args, kwargs: T5's other arguments. Positional ones have T5's order.

        Returns:
            Seq2SeqOutput, or T5's tuple with return_dict=False.

        Raises:
            ValueError: an argument has a wrong shape or dtype, is missing, is not allowed here, or excludes another
                one that is given.
            RuntimeError: contents are wrong, such as a label outside the vocabulary.
        """
        if args:
            named = dict(
                encoder_outputs=encoder_outputs,
                inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds,
                labels=labels,
                packed_inputs=packed_inputs,
                future_ids=future_ids,
                num_items_in_batch=num_items_in_batch,
                num_future_targets=num_future_targets,
                training_step=training_step,
                skip_logits=skip_logits,
            )
            given = {name: value for name, value in named.items() if value is not None} | kwargs
            # Not self.forward, which may be that of a subclass.
            return StampT5ForConditionalGeneration.forward(
                self,
                input_ids,
                attention_mask,
                decoder_input_ids,
                decoder_attention_mask,
                **arguments_by_name(_FORWARD_PARAMETERS[4:], args, given),
            )
        check_one_given(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            packed_inputs=packed_inputs,
            encoder_outputs=encoder_outputs,
        )
        check_at_most_one_given(attention_mask=attention_mask, packed_inputs=packed_inputs)
        check_at_most_one_given(decoder_input_ids=decoder_input_ids, decoder_inputs_embeds=decoder_inputs_embeds)
        wants_tuple = returns_tuple(kwargs.get("return_dict"), self.config)
        options = options_of_base(self.config, **kwargs) + ["return_dict=False"] * wants_tuple
        unknown = [name for name in options if re.split("[= ]", name)[0] not in MODEL_ARGUMENTS]
        if unknown and getattr(self.encoder, "takes_packed", False):  # an encoder with a forward of its own may know it
            raise ValueError(f"forward takes no {', '.join(unknown)}")
        if labels is None:
            if skip_logits:
                raise ValueError("skip_logits=True needs labels: without labels the logits are the result")
            if self.training and future_ids is not None:
                # The Trainer's label_smoothing_factor removes the labels and makes its own loss from logits.
                raise ValueError("future_ids needs labels in training: without labels no further steps are predicted")
        trains_heads = self.training and self.stamp_prediction is not None
        wants_states = self.wants_hidden_states(kwargs)
        if trains_heads or self.is_pruned:
            check_layers(kwargs.get("output_hidden_states"))
        # In evaluation T5 returns a cache by default, and all hidden states exist if nothing is pruned.
        wants_cache = not self.training and kwargs.get("use_cache") is None and self.config.use_cache
        runs_base = bool(options) or (wants_states and not (trains_heads or self.is_pruned))
        runs_base = runs_base or (wants_cache and not skip_logits and packed_inputs is None)
        if labels is None or runs_base or not getattr(self.decoder, "takes_packed", False):
            if labels is not None and (trains_heads or skip_logits or packed_inputs is not None):
                only_packed = dict(prediction=trains_heads, skip_logits=skip_logits, packed_inputs=packed_inputs)
                needing = " and ".join(
                    name for name, given in only_packed.items() if given is not None and given is not False
                )
                found = ", ".join(options) or f"a decoder of class {type(self.decoder).__name__}"
                raise ValueError(f"{found}: packed stacks do not have this, and {needing} with labels needs them")
            return self._forward_of_base(
                input_ids,
                attention_mask,
                inputs_embeds,
                packed_inputs,
                encoder_outputs,
                wants_tuple,
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
        layout = None
        if encoder_outputs is None and not getattr(self.encoder, "takes_packed", False):
            encoder_outputs = self._encode(input_ids, attention_mask, inputs_embeds, packed_inputs, kwargs)
        if encoder_outputs is not None:
            source = _packed_source(encoder_outputs, attention_mask)
            batch = source.cu_seqlens.shape[0] - 1
        else:
            if packed_inputs is None:
                inputs = self.encoder.padded_inputs(input_ids, inputs_embeds)
                packed_inputs, layout = self.encoder.pack_inputs(inputs, attention_mask)
            check_packed("packed_inputs", packed_inputs)
            batch = packed_inputs.cu_seqlens.shape[0] - 1
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
        if decoder_inputs.dtype in (torch.int32, torch.int64):
            decoder_inputs = self.decoder.padded_inputs(decoder_inputs, None)
        packed_decoder_inputs, decoder_layout = pack_padded(decoder_inputs, decoder_attention_mask)
        decoded: PackedBatch = self.decoder(packed_inputs=packed_decoder_inputs, packed_source=source).packed
        states = replace(decoded, values=head_inputs(self, decoded.values))

        packed_labels = decoder_layout.pack(labels, IGNORE_INDEX)
        num_labels = (packed_labels != IGNORE_INDEX).sum()
        logits = None
        if skip_logits:
            loss = next_token_loss(self.lm_head, states.values, packed_labels, num_labels)
        else:
            # The loss is a function of the logits that are returned, whose gradient somebody may want.
            logits = decoder_layout.pad(self.lm_head(states.values))
            seen_labels = labels.masked_fill(~decoder_layout.mask, IGNORE_INDEX)
            loss = loss_of_logits(logits.flatten(0, 1), seen_labels.flatten(), num_labels)
        share: float | Tensor = 1.0
        if num_items_in_batch is not None:
            share = _share(num_labels, num_items_in_batch, loss)
        loss = share * loss
        prediction_loss = None
        if self.training and self.stamp_prediction is not None:
            prediction_loss = self._prediction_loss(
                states, decoder_layout, labels, future_ids, num_future_targets, training_step
            )
            if num_future_targets is None:
                prediction_loss = share * prediction_loss

        padded_states, mask, positions = None, None, None
        if logits is not None or wants_states:
            if encoder_outputs is None:
                encoder_outputs = self.encoder.padded_output(source, layout)
            padded_states, mask, positions = _padded_states(encoder_outputs, attention_mask)
        decoder_states = (decoder_layout.pad(decoded.values),) if wants_states else None
        return Seq2SeqOutput(
            loss=loss if prediction_loss is None else loss + prediction_loss,
            logits=logits,
            decoder_hidden_states=decoder_states,
            encoder_last_hidden_state=padded_states,
            encoder_hidden_states=(cast(Tensor, padded_states),) if wants_states else None,
            encoder_attention_mask=mask,
            encoder_positions=positions,
            encoder_packed=source if padded_states is None else None,
            next_token_loss=loss.detach(),
            prediction_loss=None if prediction_loss is None else prediction_loss.detach(),
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

    def wants_hidden_states(self, kwargs: dict[str, Any]) -> bool:
        requested = kwargs.get("output_hidden_states")
        return bool(getattr(self.config, "output_hidden_states", False) if requested is None else requested)

    def shares_sources(self) -> bool:
        """Whether the beams of a search may share their history, which a subclass's own forward may want to read."""
        is_own = type(self).forward is StampT5ForConditionalGeneration.forward
        return is_own and bool(getattr(self.decoder, "takes_packed", False)) and not torch.compiler.is_compiling()

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        packed_inputs: PackedBatch | None,
        kwargs: dict[str, Any],
    ) -> BaseModelOutput:
        """The encoder's output with T5's options, and with arguments that T5's forward does not know."""
        shared = ("output_attentions", "output_hidden_states", "head_mask")
        options = {k: v for k, v in kwargs.items() if k in shared or k not in _FORWARD_PARAMETERS}
        options = {k: v for k, v in options.items() if v is not None} | dict(return_dict=True)
        if packed_inputs is not None:
            options["packed_inputs"] = packed_inputs
        return cast(
            BaseModelOutput,
            self.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **options),
        )

    def _forward_of_base(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        packed_inputs: PackedBatch | None,
        encoder_outputs: Any,
        wants_tuple: bool,
        num_items_in_batch: Tensor | int | None,
        **kwargs: Any,
    ) -> Any:
        """T5's own forward on encoded histories, with the mask of their kept tokens."""
        if encoder_outputs is None:
            encoder_outputs = self._encode(input_ids, attention_mask, inputs_embeds, packed_inputs, kwargs)
        if isinstance(encoder_outputs, SharedEncoderOutput):
            cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
            if kwargs.get("output_attentions") or has_static_cache(cache):
                encoder_outputs = encoder_outputs.repeated()
        if isinstance(encoder_outputs, SharedEncoderOutput):
            given = kwargs.get("decoder_input_ids")
            given = kwargs.get("decoder_inputs_embeds") if given is None else given
            states, mask, positions = encoder_outputs.states(cast(Tensor, given).shape[0]), None, None
        else:
            states, mask, positions = _padded_states(encoder_outputs, attention_mask)
        fields = {} if isinstance(encoder_outputs, tuple) else dict(encoder_outputs)
        if wants_tuple and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = self.config.use_cache  # a tuple has the base model's length
        kwargs["return_dict"] = True
        output = super().forward(
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(
                last_hidden_state=states,
                hidden_states=fields.get("hidden_states"),
                attentions=fields.get("attentions"),
            ),
            **kwargs,
        )
        labels = kwargs.get("labels")
        if labels is not None and num_items_in_batch is not None:
            output.loss = _share((labels != IGNORE_INDEX).sum(), num_items_in_batch, output.loss) * output.loss
        if wants_tuple:
            return output.to_tuple()
        lacks_cache = _wants_cache(self.config, kwargs) and not has_cache(output)
        return Seq2SeqOutput.of_base(
            output, lacks_cache=lacks_cache, encoder_attention_mask=mask, encoder_positions=positions
        )

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
    scale = head_scale(model)
    return states if scale == 1.0 else states * scale


def _wants_cache(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the base model's output would have a cache."""
    return bool(getattr(config, "use_cache", True) if kwargs.get("use_cache") is None else kwargs["use_cache"])


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
    is_known = isinstance(behind, PackedStates) and mask is behind.layout.mask
    return cast(PackedStates, behind).read(states) if is_known else pack_padded(states, mask)[0]


# ---- what apply_stamp does to a T5 ---------------------------------------------------------------------------------


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
        implementation = getattr(attention.config, "_attn_implementation", None)
        if implementation not in _KNOWN_ATTENTION and not str(implementation).startswith("flash_attention"):
            return f'attn_implementation="{implementation}" is not T5\'s, and packed sequences would not run it'
    for number, block in enumerate(stack.block, start=1):
        expected = 2 if stack.is_decoder else 1
        found = sum(isinstance(module, T5Attention) for module in block.modules())
        if found != expected:
            return f"block {number}, a {type(block).__name__}, has {found} T5Attention where T5 has {expected}"
        for inner, module in block.named_modules():
            # The layers and norms around the attention.
            is_probed = inner.endswith(("layer_norm", "layer.1", "layer.2")) and not _attentions(module)
            if is_probed and mixes_tokens(module, stack.config.d_model):
                return f"{inner} of block {number}, a {type(module).__name__}, mixes tokens, and would mix histories"
    return None


def _pack(model: nn.Module, status: StampStatus, pruning: PruningConfig | None) -> None:
    for name, stack in _stacks(model).items():
        if name in status.packed:
            stack.__class__ = stamped_class(type(stack), _packed_stack(stack))
            let_record(type(stack))
            for attention in _attentions(stack).values():
                attention.__class__ = stamped_class(type(attention), PackedT5Attention)
            if isinstance(stack, PackedT5Encoder):
                stack.set_pruning(pruning)


def _unpack(model: nn.Module) -> None:
    for stack in _stacks(model).values():
        if isinstance(stack, PackedT5Encoder):
            stack.remove_pruning()
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
