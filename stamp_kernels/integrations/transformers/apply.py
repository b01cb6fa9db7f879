"""apply_stamp and remove_stamp: from a base model to a stamped one and back, for every registered class."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from torch import nn
from transformers import PreTrainedModel

from stamp_kernels.integrations.transformers.classes import (
    StampedModule,
    forget_forward,
    own_class,
    patched_forward,
    stamped_class,
)
from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig, to_dict
from stamp_kernels.modules.prediction import MultiStepPrediction

if TYPE_CHECKING:
    from transformers import T5EncoderModel, T5ForConditionalGeneration, T5Model

    from stamp_kernels.integrations.transformers.t5 import (
        StampT5EncoderModel,
        StampT5ForConditionalGeneration,
        StampT5Model,
    )

    _Base = PreTrainedModel
else:
    _Base = object  # stamped classes inherit from a base model's class, which is a PreTrainedModel

__all__ = ["StampStatus", "StampedModel", "Stamping", "apply_stamp", "register", "remove_stamp", "stamp_status"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class StampStatus:
    """What of a stamped model runs packed.

    Attributes:
        packed: the names of the stacks that run packed, "" for the model itself.
        padded: the names of the others, each with the reason.
        own_forward: the model's own forward, such as "Mine.forward", if it does not call super().forward: its stacks
            run packed, its loss is its own.
    """

    packed: tuple[str, ...] = ()
    padded: dict[str, str] = field(default_factory=dict)
    own_forward: str | None = None

    def __str__(self) -> str:
        lines = [f"{name or 'the model'}: packed" for name in self.packed]
        lines += [f"{name or 'the model'}: padded, because {reason}" for name, reason in self.padded.items()]
        if self.own_forward is not None:
            lines.append(f"the loss: as in {self.own_forward}, with logits")
        return "\n".join(lines)


@dataclass(frozen=True)
class Stamping:
    """How STAMP is put into the models of one class and its subclasses.

    Attributes:
        base_class: the class of the models, or that of which theirs are subclasses.
        packed_class: of a model, the class that goes between its own and base_class, see `stamped_class`.
        check: what would run packed; raises ValueError if the config of the model does not fit the kernels or the
            configurations.
        pack: changes the classes of the stacks that can run packed, and sets the pruning of the trunk.
        unpack: undoes pack.
    """

    base_class: type[PreTrainedModel]
    packed_class: Callable[[Any], type[StampedModule]]
    check: Callable[[Any, PruningConfig | None, PredictionConfig | None], StampStatus]
    pack: Callable[[Any, StampStatus, PruningConfig | None], None]
    unpack: Callable[[Any], None]


_STAMPINGS: list[Stamping] = []


def register(stamping: Stamping) -> None:
    """Let `apply_stamp` take the models of a class and its subclasses. More special classes are registered first."""
    _STAMPINGS.append(stamping)


class StampedModel(StampedModule, _Base):
    """Mixin for stamped classes: models that `apply_stamp` made, or that are built from a checkpoint's config.

    Attributes:
        stamp_prediction: the heads, None without prediction.
        stamp_prediction_config: their configuration.
    """

    stamp_prediction: MultiStepPrediction | None
    stamp_prediction_config: PredictionConfig | None

    def post_init(self) -> None:
        """Stamp a model at the end of its constructor, as its config says.

        Every Hugging Face model calls this then, and a subclass that adds modules calls it once more.
        """
        super().post_init()
        description = getattr(self.config, "stamp", None) or {}
        pruning, prediction = description.get("pruning"), description.get("prediction")
        if self.get_output_embeddings() is None:
            prediction = None  # the checkpoint of an encoder-decoder describes the heads of its decoder
        _stamp(
            self,
            None if pruning is None else PruningConfig(**pruning),
            None if prediction is None else PredictionConfig(**prediction),
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize parameters that a checkpoint lacks. The base model would draw the heads' layers at random.

        The base model calls this and makes sure that loaded parameters are not overwritten.
        """
        prediction = getattr(self, "stamp_prediction", None)
        heads = [] if prediction is None else [prediction, *prediction.heads]
        # The base model asks only for the layers of a head. The innermost owner of the layer is reset.
        owners = [head for head in heads if any(module is part for part in head.modules())]
        if owners:
            owners[-1].reset_parameters()
        else:
            super()._init_weights(module)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """The base model's, which resizes an unembedding of the heads' own too."""
        embeddings: nn.Embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        prediction = getattr(self, "stamp_prediction", None)
        if prediction is None or prediction.unembedding is None:
            return embeddings
        unembedding = prediction.unembedding
        num_tokens = cast(nn.Linear, self.get_output_embeddings()).weight.shape[0]
        if unembedding.shape[0] != num_tokens:
            # The base model resizes layers.
            layer = nn.Linear(unembedding.shape[1], unembedding.shape[0], bias=False, device="meta")
            layer.weight = unembedding
            resized = self._get_resized_lm_head(layer, num_tokens, mean_resizing=mean_resizing).weight
            prediction.unembedding = resized.requires_grad_(unembedding.requires_grad)
        return embeddings


@overload
def apply_stamp(
    model: "T5ForConditionalGeneration",
    *,
    pruning: PruningConfig | None = None,
    prediction: PredictionConfig | None = None,
) -> "StampT5ForConditionalGeneration": ...


@overload
def apply_stamp(
    model: "T5EncoderModel", *, pruning: PruningConfig | None = None, prediction: None = None
) -> "StampT5EncoderModel": ...


@overload
def apply_stamp(
    model: "T5Model", *, pruning: PruningConfig | None = None, prediction: None = None
) -> "StampT5Model": ...


@overload
def apply_stamp(
    model: _Model, *, pruning: PruningConfig | None = None, prediction: PredictionConfig | None = None
) -> _Model: ...


def apply_stamp(
    model: PreTrainedModel, *, pruning: PruningConfig | None = None, prediction: PredictionConfig | None = None
) -> PreTrainedModel:
    """Run a Hugging Face model on packed sequences, prune them (SAP), and predict further items in training (MAP).

    In place; `remove_stamp` undoes it. Parameters, their names and the model's inputs do not change. Without pruning
    and prediction, outputs and gradients do not change either, with three exceptions: states on padding are 0; the
    decoder attends to nothing of a history without tokens (an attention_mask row of zeros), where the base model
    attends uniformly to its padding; and labels that a decoder_attention_mask hides have no loss.

    The heads of the prediction are `model.stamp_prediction`; only their parameters are new. Both configurations are
    stored in `model.config.stamp`, so that `save_pretrained` writes them and `from_pretrained` of the stamped class
    restores them. The base model's own class loads such a checkpoint too, as a model that is not pruned.

    Subclasses keep what they override: the stamped class goes below them in the method resolution order, so that
    `super().forward` reaches it. A forward that does not call it keeps its loss, and its stacks run packed. A stack
    that has a forward of its own, or an attention with one, stays padded with a warning. `stamp_status(model)` says
    which parts run packed.

    Applied again it replaces the configurations. Heads whose configuration does not change keep their weights. Call it
    before anything that wraps the model or replaces its class or parameters: an optimizer (which must know the heads),
    `torch.compile`, `fully_shard`, `DistributedDataParallel`, Accelerate's `prepare`, PEFT
    (`modules_to_save=["stamp_prediction"]` trains the heads).

    Args:
        model: a T5ForConditionalGeneration, T5EncoderModel, T5Model or another model with T5's stacks, a T5Stack
            itself, or a subclass of these.
        pruning: None: not pruned. Only for models with an encoder, and for every encoder that a model has.
        prediction: None: no auxiliary loss. Only for T5ForConditionalGeneration.

    Returns:
        The same model.

    Raises:
        ValueError: the model is of another class, nothing of it can run packed, what is asked for cannot (pruning of an
            encoder with a forward of its own, prediction with a loss of its own), an instance has a forward of its own,
            its head dimension is not a multiple of 8 up to 256, or the schedule has a block that the trunk does not
            have.
    """
    status = _stamp(model, pruning, prediction)
    if status.padded:
        warnings.warn(f"{type(model).__name__} is stamped in part:\n{status}", stacklevel=2)
    return model


def remove_stamp(model: PreTrainedModel) -> None:
    """Restore the base model, with its present weights and without the heads. Does nothing to a base model.

    Raises:
        ValueError: the model is of another class, a subclass of a stamped class, which has no other, or a module has a
            forward on the instance. Give the model inside a wrapper.
    """
    stamping = _stamping_of(model)
    if not isinstance(model, StampedModule):
        return
    own = own_class(type(model))
    if issubclass(own, StampedModule):
        raise ValueError(f"model must be stamped by apply_stamp, but {own.__name__} is a subclass of a stamped class")
    for name, module in model.named_modules():
        if isinstance(module, StampedModule) and patched_forward(module):
            raise ValueError(
                f"{name or 'the model'} has a forward on the instance, which calls the stamped class's: first remove "
                "what put it there, such as Accelerate's hooks with remove_hook_from_module(recurse=True)"
            )
    for module in model.modules():
        forget_forward(module)
    stamping.unpack(model)
    if isinstance(model, StampedModel):
        del model.stamp_prediction, model.stamp_prediction_config
        _forget_description(model)
    model.__class__ = own


def stamp_status(model: PreTrainedModel) -> StampStatus:
    """Which parts of a stamped model run packed, and why the others do not.

    Raises:
        ValueError: the model is not stamped.
    """
    stamping = _stamping_of(model)
    if not isinstance(model, StampedModule):
        raise ValueError(f"model must be stamped, got {type(model).__name__}: call apply_stamp(model)")
    status = stamping.check(model, None, None)
    for name in status.padded:
        if isinstance(model.get_submodule(name), StampedModule):
            status.padded[name] += ", but was changed after apply_stamp and still runs packed: call it again"
    new = [name for name in status.packed if not isinstance(model.get_submodule(name), StampedModule)]
    if not new:
        return status
    packed = tuple(name for name in status.packed if name not in new)
    reason = "it was put there after apply_stamp, which can be called again"
    return replace(status, packed=packed, padded={**status.padded, **dict.fromkeys(new, reason)})


def _stamping_of(model: nn.Module) -> Stamping:
    for stamping in _STAMPINGS:
        if isinstance(model, stamping.base_class):
            return stamping
    names = " or ".join(stamping.base_class.__name__ for stamping in _STAMPINGS)
    found = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ValueError(f"model must be a {names} of transformers or a subclass, not wrapped or sharded, got {found}")


def _check_not_patched(model: nn.Module) -> None:
    if patched_forward(model):
        raise ValueError(
            f"model must be stamped before Accelerate replaces its forward, but the {type(model).__name__} has "
            "a forward on the instance, which would run instead of that of its class"
        )


def _stamp(model: PreTrainedModel, pruning: PruningConfig | None, prediction: PredictionConfig | None) -> StampStatus:
    stamping = _stamping_of(model)
    _check_not_patched(model)
    status = stamping.check(model, pruning, prediction)
    heads = _prediction_heads(model, prediction)
    # Nothing fails from here on, so that a model is either changed completely or not at all.
    for module in model.modules():
        forget_forward(module)
    model.__class__ = stamped_class(type(model), stamping.packed_class(model))
    stamping.pack(model, status, pruning)
    if isinstance(model, StampedModel):
        model.stamp_prediction = heads
        model.stamp_prediction_config = prediction
        _forget_description(model)
        model.config.stamp = {"pruning": to_dict(pruning), "prediction": to_dict(prediction)}
    return status


def _prediction_heads(model: PreTrainedModel, prediction: PredictionConfig | None) -> MultiStepPrediction | None:
    """New heads, or those that the model has if their configuration does not change."""
    if prediction is None:
        return None
    if prediction == getattr(model, "stamp_prediction_config", None):
        return cast(MultiStepPrediction, model.stamp_prediction)
    weight = cast(nn.Linear, model.get_output_embeddings()).weight
    heads = prediction.build_module(model.config.hidden_size, weight.shape[0]).to(weight.device, weight.dtype)
    return heads.train(model.training)


def _forget_description(model: PreTrainedModel) -> None:
    """Delete `stamp` from the model's config and from the copies of it that the stacks of a loaded model have."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "stamp"):
            del module.config.stamp
