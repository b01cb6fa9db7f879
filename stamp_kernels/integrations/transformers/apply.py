"""apply_stamp and remove_stamp: from a base model to a stamped one and back, for every registered class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, overload

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig, to_dict
from stamp_kernels.modules.prediction import MultiStepPrediction

if TYPE_CHECKING:
    from transformers import T5EncoderModel, T5ForConditionalGeneration

    from stamp_kernels.integrations.transformers.t5 import StampT5EncoderModel, StampT5ForConditionalGeneration

    _Base = PreTrainedModel
else:
    _Base = object  # stamped classes inherit from a base model's class, which is a PreTrainedModel

__all__ = ["StampedModel", "Stamping", "apply_stamp", "register", "remove_stamp"]


@dataclass(frozen=True)
class Stamping:
    """How STAMP is put into the models of one class.

    Attributes:
        stamped_class: the class that such a model becomes, a StampedModel and a subclass of the base class.
        check: raises ValueError if the model's config does not fit the kernels or the configurations.
        pack: changes the classes of the model's stacks and attention modules, and sets the pruning of its trunk.
        unpack: undoes pack.
    """

    stamped_class: "type[StampedModel]"
    check: Callable[[Any, PruningConfig | None, PredictionConfig | None], None]
    pack: Callable[[Any, PruningConfig | None], None]
    unpack: Callable[[Any], None]


_STAMPINGS: dict[type[PreTrainedModel], Stamping] = {}


def register(base_class: type[PreTrainedModel], stamping: Stamping) -> None:
    """Let `apply_stamp` take the models of a class (not of its subclasses, whose forward would be lost)."""
    # `save_pretrained` writes the name of the class into config.json: a checkpoint is one of the base model.
    stamping.stamped_class.__name__ = base_class.__name__
    _STAMPINGS[base_class] = stamping


class StampedModel(_Base):
    """Mixin for stamped classes: models that `apply_stamp` made, or that are built from a checkpoint's config.

    Attributes:
        stamp_prediction: the heads, None without prediction.
        stamp_prediction_config: their configuration.
    """

    stamp_prediction: MultiStepPrediction | None
    stamp_prediction_config: PredictionConfig | None

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        description = getattr(config, "stamp", None) or {}
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


def apply_stamp(
    model: PreTrainedModel, *, pruning: PruningConfig | None = None, prediction: PredictionConfig | None = None
) -> PreTrainedModel:
    """Run a Hugging Face model on packed sequences, prune them (SAP), and predict further items in training (MAP).

    In place; `remove_stamp` undoes it. Parameters, their names and the model's inputs do not change. Without pruning
    and prediction, outputs and gradients do not change either. The heads of the prediction are
    `model.stamp_prediction`; only their parameters are new. Both configurations are stored in `model.config.stamp`, so
    that `save_pretrained` writes them and `from_pretrained` of the stamped class restores them. The base model's own
    class loads such a checkpoint too, as a model that is not pruned.

    Applied again it replaces the configurations. Heads whose configuration does not change keep their weights. Call it
    before anything that wraps the model or replaces its class or parameters: an optimizer (which must know the heads),
    `torch.compile`, `fully_shard`, `DistributedDataParallel`, PEFT (`modules_to_save=["stamp_prediction"]` trains the
    heads).

    Args:
        model: a T5ForConditionalGeneration or T5EncoderModel, not a subclass, whose forward would be lost.
        pruning: None: not pruned.
        prediction: None: no auxiliary loss. Only for models with a decoder.

    Returns:
        The same model.

    Raises:
        ValueError: the model is of another class, its head dimension is not a multiple of 8 up to 256, the schedule has
            a block that the trunk does not have, or prediction is given for a model without a decoder.
    """
    _stamp(model, pruning, prediction)
    return model


def remove_stamp(model: PreTrainedModel) -> None:
    """Restore the base model, with its present weights and without the heads. Does nothing to a base model.

    Raises:
        ValueError: the model is of another class. Give the model inside a wrapper.
    """
    base_class = _base_class(model)
    if base_class is type(model):
        return
    _STAMPINGS[base_class].unpack(model)
    del model.stamp_prediction, model.stamp_prediction_config
    _forget_description(model)
    model.__class__ = base_class


def _base_class(model: nn.Module) -> type[PreTrainedModel]:
    """The base class of a model, stamped or not."""
    for base_class, stamping in _STAMPINGS.items():
        if type(model) in (base_class, stamping.stamped_class):
            return base_class
    raise ValueError(
        f"model must be a {' or '.join(base_class.__name__ for base_class in _STAMPINGS)} itself, "
        f"not wrapped or sharded, got {type(model).__name__}"
    )


def _stamp(model: PreTrainedModel, pruning: PruningConfig | None, prediction: PredictionConfig | None) -> None:
    stamping = _STAMPINGS[_base_class(model)]
    stamping.check(model, pruning, prediction)
    heads = _prediction_heads(model, prediction)
    # Nothing fails from here on, so that a model is either changed completely or not at all.
    model.__class__ = stamping.stamped_class
    stamping.pack(model, pruning)
    stamped = cast(StampedModel, model)
    stamped.stamp_prediction = heads
    stamped.stamp_prediction_config = prediction
    _forget_description(model)
    model.config.stamp = {"pruning": to_dict(pruning), "prediction": to_dict(prediction)}


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
