"""STAMP in Hugging Face's models: `apply_stamp` for every supported class. Importing this registers them all."""

from stamp_kernels.integrations.transformers import t5_stamping  # noqa: F401  registers T5's classes
from stamp_kernels.integrations.transformers.apply import StampStatus, apply_stamp, remove_stamp, stamp_status
from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig
from stamp_kernels.integrations.transformers.multi_step_targets import global_target_counts
from stamp_kernels.integrations.transformers.outputs import EncoderOutput, Seq2SeqOutput
from stamp_kernels.integrations.transformers.t5 import (
    StampT5EncoderModel,
    StampT5ForConditionalGeneration,
    StampT5Model,
)

__all__ = [
    "EncoderOutput",
    "PredictionConfig",
    "PruningConfig",
    "Seq2SeqOutput",
    "StampStatus",
    "StampT5EncoderModel",
    "StampT5ForConditionalGeneration",
    "StampT5Model",
    "apply_stamp",
    "global_target_counts",
    "remove_stamp",
    "stamp_status",
]
