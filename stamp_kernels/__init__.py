"""Fused ops that make STAMP (arXiv 2604.05329) cheap for generative recommenders, on packed sequences.

SAP scores tokens and keeps the best of each sequence; MAP predicts several future tokens or items through a fused
linear cross-entropy. Importing this package loads no Triton, no model library, and asks no device anything.
"""

from stamp_kernels._backend import use_backend
from stamp_kernels.modules.prediction import LinearDecay, MultiStepPrediction
from stamp_kernels.modules.pruning import PrunedSequence, SemanticAdaptivePruning
from stamp_kernels.ops.attention import AttentionOutput, packed_attention
from stamp_kernels.ops.cross_entropy import MultiTokenLoss, multi_token_cross_entropy, shift_targets
from stamp_kernels.ops.importance import attention_centrality, token_importance
from stamp_kernels.ops.prepare import prepare
from stamp_kernels.ops.pruning import PrunedTokens, prune
from stamp_kernels.ops.selection import TokenSelection, gather_tokens, select_tokens
from stamp_kernels.packed import PackedSequence
from stamp_kernels.relative_position import RelativePositionBias

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "LinearDecay",
    "MultiStepPrediction",
    "MultiTokenLoss",
    "PackedSequence",
    "PrunedSequence",
    "PrunedTokens",
    "RelativePositionBias",
    "SemanticAdaptivePruning",
    "TokenSelection",
    "attention_centrality",
    "gather_tokens",
    "multi_token_cross_entropy",
    "packed_attention",
    "prepare",
    "prune",
    "select_tokens",
    "shift_targets",
    "token_importance",
    "use_backend",
]
