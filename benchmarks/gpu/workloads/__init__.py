"""Named inputs of the public ops: compiled ahead of time, checked on a GPU, and timed there.

A workload makes its inputs on any device and runs one public function on them, forward or with its gradients:

- on `meta` tensors, to record what the launchers would compile (machine_code.py);
- on a GPU, to compare with the reference (correctness.py) and to measure time (timings.py);
- on a CPU, to rehearse these scripts.

One file per family; `training_step` has whole training steps of the T5 recommender.
"""

from . import attention, cross_entropy, pruning
from .attention import Attention, TileList
from .base import Workload, offsets
from .cross_entropy import CrossEntropy, ShiftTargets
from .pruning import KEEP_RATIO, Gather, ImportanceAndSelection, Prune

__all__ = [
    "CHECKED",
    "COMPILED",
    "KEEP_RATIO",
    "TIMED",
    "Attention",
    "CrossEntropy",
    "Gather",
    "ImportanceAndSelection",
    "Prune",
    "ShiftTargets",
    "TileList",
    "Workload",
    "offsets",
]

_FAMILIES = (attention, cross_entropy, pruning)

# Timed on a GPU, and compiled.
TIMED: tuple[Workload, ...] = tuple(workload for family in _FAMILIES for workload in family.TIMED)
# What else T5, Qwen and the benchmarks launch: compiled, not timed.
COMPILED: tuple[Workload, ...] = tuple(workload for family in _FAMILIES for workload in family.COMPILED)
# Small, ragged, with tail rows: every kernel once, compared with float64.
CHECKED: tuple[Workload, ...] = tuple(workload for family in _FAMILIES for workload in family.CHECKED)
