"""Invalid cases: a valid call of a public function with one argument that is not allowed.

Only what is certain to be invalid is here. One more row of `hidden`, for example, is a tail row where nothing else has
that many rows.
"""

import re
from collections.abc import Iterator

from fuzz.calls import Call
from fuzz.draw import Draw
from fuzz.mutations import MUTATIONS, OF_CONTENTS, DoesNotApplyError
from fuzz.valid import SUBJECTS as VALID

_NOT_A_TENSOR = ("string", "list", "number", "numpy")
_REQUIRED = ("none", *_NOT_A_TENSOR, "meta")
_OPTIONAL = (*_NOT_A_TENSOR, "meta")
_FLOATS = (*_REQUIRED, "to_int64", "to_complex")
_OFFSETS = (
    *_REQUIRED, "to_float32", "rank_up", "rank_down", "no_entries", "starts_at_one", "decreasing", "past_the_end",
    "negative_entry", "wrapping",
)  # fmt: skip
_PER_ROW = (*_OPTIONAL, "rank_up", "rank_down", "longer", "shorter", "to_float32")
_MASK = (*_PER_ROW, "to_int64", "to_int32")
_POSITIONS = (*_PER_ROW, "to_int64")
_COUNT = ("none", "string", "fraction", "boolean", "negative", "tensor", "nan")
_FROM_ONE = (*_COUNT, "zero")
_CHOICE = ("none", "string", "number", "tensor")
_FLAG = ("string",)
_NUMBER = ("none", "string", "tensor", "nan")
_SHARE = (*_NUMBER, "negative", "above_one", "infinite")

_Table = dict[str, tuple[str, ...]]

_ATTENTION: _Table = {
    "q": (*_FLOATS, "to_other_float", "rank_up", "rank_down", "wider"),
    "k": (*_FLOATS, "to_other_float", "rank_up", "rank_down", "wider"),
    "cu_seqlens_q": _OFFSETS,
    "max_seqlen_q": (*_COUNT, "too_small"),
    "causal": _FLAG,
    "scale": ("string", "tensor"),
    "relative_bias": ("string", "tensor", "number"),
    "positions_q": _POSITIONS,
    "positions_k": _POSITIONS,
    "tiles_q": (*_PER_ROW, "to_int64", "wider"),
    "tiles_k": (*_PER_ROW, "to_int64", "wider"),
}
_SELECTION: _Table = {
    "cu_seqlens": _OFFSETS,
    "max_seqlen": (*_COUNT, "too_small"),
    "keep_ratio": ("none", "string", "tensor", "nan", "negative", "above_one", "infinite"),
    "keep_count": ("none", "string", "fraction", "boolean", "negative", "to_float32", "longer", "rank_up", "meta"),
    "min_keep": _COUNT,
    "protect": _MASK,
    "total_kept": ("string", "fraction", "boolean", "negative", "tensor", "too_small"),
    "lengths_cpu": (*_OPTIONAL, "longer", "shorter", "to_float32", "rank_up", "negative_entry", "entry_beyond_32_bits"),
    "num_protected": ("number", "string"),
    "budget": _CHOICE,
    "codes_per_item": ("string", "fraction", "boolean", "negative", "zero", "tensor"),
}
_IMPORTANCE: _Table = {
    "centrality": (*_REQUIRED, "to_int64", "to_float16", "rank_up", "rank_down", "longer", "shorter"),
    "norm": _CHOICE,
    "normalize": _CHOICE,
}

# For each subject its arguments, and how each is spoiled. Where an argument is not in the valid call, it is added.
TABLE: dict[str, _Table] = {
    "packed_attention": _ATTENTION
    | {
        "v": (*_FLOATS, "to_other_float", "rank_up", "rank_down", "wider", "longer", "shorter"),
        "cu_seqlens_k": ("longer", "shorter", "to_float32", "starts_at_one", "decreasing", "past_the_end", "wrapping"),
        "centrality_query_mask": _MASK,
        "dropout_p": ("none", "string", "nan", "negative", "one", "infinite", "tensor"),
    },
    "attention_centrality": _ATTENTION
    | {
        "lse": (*_FLOATS, "to_other_float", "rank_up", "rank_down", "longer", "wider"),
        "query_mask": _MASK,
    },
    "tile_list": {"cu_seqlens": tuple(x for x in _OFFSETS if x not in ("meta", "past_the_end")), "total": _COUNT},
    "token_importance": _IMPORTANCE
    | {"hidden": (*_FLOATS, "rank_up", "rank_down", "longer"), "cu_seqlens": tuple(x for x in _OFFSETS if x != "none")},
    "select_tokens": _SELECTION | {"importance": (*_FLOATS, "rank_up", "rank_down")},
    "gather_tokens": {
        "x": ("none", "string", "number", "empty_list", "dictionary", "of_strings", "longer", "shorter", "meta"),
        "selection": ("none", "string", "number", "tensor"),
    },
    "prune": _SELECTION | _IMPORTANCE | {"x": ("none", "string", "number", "empty_list", "of_strings"),
                                         "positions": _POSITIONS},
    "multi_token_cross_entropy": {
        "hidden": (*_FLOATS, "to_other_float", "rank_up_twice", "rank_down", "wider"),
        "weight": (*_FLOATS, "to_other_float", "rank_up_twice", "rank_down", "wider"),
        "targets": (*_REQUIRED, "to_int32", "to_float32", "rank_up", "rank_down", "longer", "shorter", "huge_entry"),
        "bias": (*_OPTIONAL, "to_int64", "to_complex", "rank_up_twice", "wider"),
        "step_weights": ("string", "number", "dictionary", "one_more", "one_fewer", "of_strings", "longer",
                         "to_int64", "requires_grad", "meta"),
        "vocab_ranges": ("string", "number", "one_more", "one_fewer", "flat", "of_strings", "inverted", "empty_ranges",
                         "past_the_vocabulary", "before_the_vocabulary", "fractions"),
        "ignore_index": ("none", "string", "fraction", "tensor"),
        "label_smoothing": _SHARE,
        "z_loss": (*_NUMBER, "negative"),
        "softcap": ("string", "tensor", "nan", "negative", "zero"),
        "reduction": _CHOICE,
        "memory": _CHOICE,
    },
    "shift_targets": {
        "labels": (*_REQUIRED, "to_float32", "to_complex", "rank_up", "rank_down"),
        "cu_seqlens": _OFFSETS,
        "steps": _FROM_ONE,
        "stride": _FROM_ONE,
        "ignore_index": ("none", "string", "fraction", "tensor"),
    },
    "PackedBatch.from_padded": {
        "x": ("none", "string", "list", "number"),
        "mask": (*_OPTIONAL[:-1], "rank_up", "rank_down", "to_float32", "longer", "wider"),
        "lengths": (*_OPTIONAL[:-1], "rank_up", "rank_down", "to_float32", "longer", "negative_entry", "huge_entry",
                    "entry_beyond_32_bits"),
    },
    "PackedBatch.to_padded": {
        "total_length": ("string", "fraction", "negative", "tensor", "nan"),
        "padding_side": _CHOICE,
        "padding_value": ("none", "string"),
    },
    "SemanticAdaptivePruning": {
        "packed": ("none", "string", "number", "tensor"),
        "centrality": _IMPORTANCE["centrality"],
        "protect": _MASK,
    },
    "MultiStepPrediction": {
        "hidden": (*_FLOATS, "rank_up", "rank_down", "longer", "wider"),
        "targets": (*_REQUIRED, "to_int32", "to_float32", "rank_up", "rank_down", "longer", "wider", "huge_entry"),
    },
}  # fmt: skip
# Arguments with which the object of a method or a module is made.
OF_OBJECT: dict[str, _Table] = {
    "PackedBatch.to_padded": {
        "values": ("none", "string", "list", "number"),
        "cu_seqlens": (*_REQUIRED, "to_float32", "rank_up", "rank_down", "no_entries", "decreasing", "wrapping"),
        "max_seqlen": (*_COUNT, "too_small"),
        "positions": _POSITIONS,
        "lengths_cpu": (*_OPTIONAL, "longer", "shorter", "to_float32", "rank_up"),
    },
    "SemanticAdaptivePruning": {
        "keep_ratio": _SHARE,
        "norm": _CHOICE,
        "positions": _CHOICE,
        "normalize": _CHOICE,
        "min_keep": _COUNT,
        "codes_per_item": ("string", "fraction", "boolean", "negative", "zero", "tensor"),
        "budget": _CHOICE,
    },
    "MultiStepPrediction": {
        "hidden_size": _FROM_ONE,
        "num_steps": _FROM_ONE,
        "head": _CHOICE,
        "vocab_size": ("string", "fraction", "negative", "zero"),
        "step_weights": ("string", "number", "one_more"),
        "lambda_": ("none", "string", "nan"),
        "codes_per_item": _FROM_ONE,
        "vocab_ranges": ("string", "number", "one_more", "flat", "inverted", "empty_ranges", "past_the_vocabulary"),
        "label_smoothing": _SHARE,
        "softcap": ("string", "nan", "negative", "zero"),
    },
}

SUBJECTS = tuple(TABLE)


def _spoiled(call: Call, name: str, mutation: str, draw: Draw) -> Call:
    value = call.arguments.get(name)
    if mutation == "too_small":
        return call.replace(**{name: _below_what_is_needed(call, name)})
    if name == "num_protected" and call.arguments.get("protect") is not None:
        raise DoesNotApplyError  # it may be right
    if mutation == "none" and name in ("keep_ratio", "keep_count") and value is None:
        raise DoesNotApplyError
    if isinstance(value, list) and name == "x" and mutation in ("longer", "shorter", "meta"):
        return call.replace(x=[*value[:-1], MUTATIONS[mutation](value[-1], draw)])
    return call.replace(**{name: MUTATIONS[mutation](value, draw)})


def _below_what_is_needed(call: Call, name: str) -> int:
    """A max_seqlen below the longest length, or a total_kept below what stays."""
    offsets = call.arguments["cu_seqlens_q" if name == "max_seqlen_q" else "cu_seqlens"]
    if name == "total_kept":
        return _kept(call) - 1
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    if longest == 0:
        raise DoesNotApplyError
    return longest - 1


def _kept(call: Call) -> int:
    result = call.replace(total_kept=None).make()
    kept = int(getattr(result, "selection", result).cu_seqlens[-1])
    if kept == 0:
        raise DoesNotApplyError
    return kept


def _candidates(subject: str, call: Call) -> Iterator[tuple[str, str, bool]]:
    """(argument, mutation, whether the argument is the object's)."""
    for is_of_object, table in ((False, TABLE), (True, OF_OBJECT)):
        for name, names in table.get(subject, {}).items():
            yield from ((name, mutation, is_of_object) for mutation in names)


class InvalidCase:
    """
    Attributes:
        label: the argument and what it became.
        call: the call, which must raise.
    """

    def __init__(self, subject: str, draw: Draw) -> None:
        valid = VALID[subject](draw).call
        candidates = list(_candidates(subject, valid))
        while True:  # some mutation applies to every call
            self.argument, self.mutation, is_of_object = draw.choice(candidates)
            try:
                if is_of_object:
                    made = _spoiled(valid.on, self.argument, self.mutation, draw)
                    self.call = Call(valid.path, valid.arguments, made)
                else:
                    self.call = _spoiled(valid, self.argument, self.mutation, draw)
                break
            except DoesNotApplyError:
                continue
        self.label = f"{self.argument}: {self.mutation}"

    def complaint(self, error: Exception) -> str | None:
        """What is wrong with the error that the call raised. None: it is a ValueError that names the argument."""
        allowed = (ValueError, RuntimeError) if self.mutation in OF_CONTENTS else (ValueError,)
        text = f"{type(error).__name__}: {error}"
        if type(error) not in allowed:
            return text
        # A shape, dtype or device is wrong relative to others, so the message may name one of those.
        names = {self.argument, *self.call.arguments, *(self.call.on.arguments if self.call.on else ())}
        if not any(re.search(rf"\b{name}", str(error)) for name in names):
            return f"names no argument: {text}"
        return None
