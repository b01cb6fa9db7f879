"""STAMP in Hugging Face models."""

from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig
from stamp_kernels.integrations.transformers.multi_step_targets import global_target_counts
from stamp_kernels.integrations.transformers.packed_trunk import EncoderOutput
from stamp_kernels.integrations.transformers.t5 import (
    Seq2SeqOutput,
    StampT5EncoderModel,
    StampT5ForConditionalGeneration,
    apply_stamp,
    remove_stamp,
)

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
