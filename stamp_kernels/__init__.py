"""Fused ops that make STAMP (arXiv 2604.05329) cheap for generative recommenders, on packed sequences.

SAP keeps the most important tokens of each sequence. MAP predicts several future tokens or items through a fused linear
cross-entropy. Importing this package loads neither Triton nor a model library, and queries no device.
"""

from stamp_kernels._backend import use_backend
from stamp_kernels.modules.per_level import per_level_cross_entropy
from stamp_kernels.modules.prediction import LinearDecay, MultiStepPrediction
from stamp_kernels.modules.pruning import PrunedBatch, SemanticAdaptivePruning
from stamp_kernels.ops.attention.attention_centrality import attention_centrality
from stamp_kernels.ops.attention.packed_attention import AttentionOutput, packed_attention
from stamp_kernels.ops.attention.tile_list import tile_list
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import MultiTokenLoss, multi_token_cross_entropy
from stamp_kernels.ops.cross_entropy.shift_targets import shift_targets
from stamp_kernels.ops.prepare import prepare
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.importance import token_importance
from stamp_kernels.ops.pruning.prune import PrunedTokens, prune
from stamp_kernels.ops.pruning.selection import TokenSelection, select_tokens
from stamp_kernels.packed import PackedBatch
from stamp_kernels.relative_position import RelativePositionBias

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "LinearDecay",
    "MultiStepPrediction",
    "MultiTokenLoss",
    "PackedBatch",
    "PrunedBatch",
    "PrunedTokens",
    "RelativePositionBias",
    "SemanticAdaptivePruning",
    "TokenSelection",
    "attention_centrality",
    "gather_tokens",
    "multi_token_cross_entropy",
    "packed_attention",
    "per_level_cross_entropy",
    "prepare",
    "prune",
    "select_tokens",
    "shift_targets",
    "tile_list",
    "token_importance",
    "use_backend",
]
