"""STAMP in Hugging Face's models: `apply_stamp` for every supported class. Importing this registers them all."""

from stamp_kernels.integrations.transformers.apply import apply_stamp, remove_stamp
from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig
from stamp_kernels.integrations.transformers.multi_step_targets import global_target_counts
from stamp_kernels.integrations.transformers.outputs import EncoderOutput, Seq2SeqOutput
from stamp_kernels.integrations.transformers.t5 import StampT5EncoderModel, StampT5ForConditionalGeneration

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
