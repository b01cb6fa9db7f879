"""Valid cases: for each public function and module a drawn call, how to make it, and what it must give."""

from collections.abc import Callable

from fuzz.draw import Draw
from fuzz.judge import Case
from fuzz.valid import attention, cross_entropy, modules, packed, pruning

SUBJECTS: dict[str, Callable[[Draw], Case]] = {
    **attention.SUBJECTS,
    **pruning.SUBJECTS,
    **cross_entropy.SUBJECTS,
    **packed.SUBJECTS,
    **modules.SUBJECTS,
}

# Triton is given the number of kept tokens, which this module cannot be told.
NOT_ON_TRITON = ("SemanticAdaptivePruning",)
