"""Raw cases: calls of `torch.ops.stamp.*`, recorded from valid ones, with one to three arguments replaced."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stamp_kernels  # noqa: F401  (defines the ops)
from fuzz.calls import Call
from fuzz.draw import Draw
from fuzz.valid import SUBJECTS as VALID
from stamp_kernels.ops._library import REFERENCES

# The op, and the valid case in which it is called.
SUBJECTS = {
    "packed_attention_forward": "packed_attention",
    "packed_attention_backward": "packed_attention",
    "attention_centrality": "attention_centrality",
    "token_importance": "token_importance",
    "select_tokens": "select_tokens",
    "gather_tokens_forward": "gather_tokens",
    "gather_tokens_backward": "gather_tokens",
    "tile_list": "tile_list",
    "prune": "prune",
    "multi_token_cross_entropy_forward": "multi_token_cross_entropy",
    "multi_token_cross_entropy_backward": "multi_token_cross_entropy",
    "multi_token_cross_entropy_with_gradients": "multi_token_cross_entropy",
    "shift_targets": "shift_targets",
}

# Ranges of numbers, by the names of the schemas: (smallest, largest). A number outside must raise.
_RANGES: dict[str, tuple[float, float]] = {
    "dropout_p": (0.0, math.nextafter(1.0, 0.0)),
    "label_smoothing": (0.0, 1.0),
    "z_loss": (0.0, math.inf),
    "softcap": (math.nextafter(0.0, 1.0), math.inf),
    "norm_order": (1, 2),
    "reduction": (0, 2),
    "codes_per_item": (1, math.inf),
    "max_seqlen": (0, math.inf),
    "max_seqlen_q": (0, math.inf),
    "max_seqlen_k": (0, math.inf),
    "min_keep": (0, math.inf),
    "keep_count": (0, math.inf),
    "total_kept": (0, math.inf),
    "total": (0, 2**31 - 1),
    "steps": (1, math.inf),
    "stride": (1, math.inf),
    "ratio_q32": (0, 2**32),
}

_INTEGERS = (-1, 0, 1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
_NUMBERS = (0.0, -1.0, 0.5, 1.0, 2.0, 5.0, 1e-50, 1e30, math.nan, math.inf, -math.inf)
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Keeps the calls of the package's ops, with the tensors as they are at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in REFERENCES:
            self.calls.append((func, tuple(args)))
        return func(*args, **(kwargs or {}))


class RawCase:
    """
    Attributes:
        label: which arguments became what.
        call: the call of the op.
        must_raise: whether an argument is outside its documented range, or cannot be read at all.
    """

    def __init__(self, subject: str, draw: Draw) -> None:
        func, arguments = _recorded_call(subject, draw)
        names = [argument.name for argument in func._schema.arguments]
        changed = list(arguments)
        labels = []
        self.must_raise = False
        for i in draw.sample(range(len(names)), min(len(names), draw.choice([1, 1, 1, 2, 3]))):
            label, changed[i] = _mutated(changed[i], names[i], draw)
            labels.append(f"{names[i]}: {label}")
            self.must_raise |= _must_raise(names[i], changed[i], label)
        self.label = ", ".join(sorted(labels))
        self.call = Call(f"torch.ops.stamp.{subject}", positional=tuple(changed))


def _recorded_call(subject: str, draw: Draw) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The arguments of the op in a valid case: of the first of some cases that calls it."""
    op = getattr(torch.ops.stamp, subject).default
    while True:
        recorder = _Recorder()
        case = VALID[SUBJECTS[subject]](draw)
        with recorder:
            case.run()
        for func, arguments in recorder.calls:
            if func == op:
                return func, tuple(_detached(x) for x in arguments)


def _detached(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_detached(y) for y in x]
    return x.detach() if isinstance(x, Tensor) else x


def _must_raise(name: str, value: Any, label: str) -> bool:
    if isinstance(value, int | float) and name in _RANGES:
        low, high = _RANGES[name]
        return not low <= value <= high
    return label in ("storage freed", "storage cut")


def _mutated(x: Any, name: str, draw: Draw) -> tuple[str, Any]:
    if isinstance(x, Tensor):
        return _mutated_tensor(x, draw)
    if isinstance(x, bool):
        return "flipped", not x
    if isinstance(x, int):
        value = draw.choice([*_INTEGERS, x + 1, x - 1])
        return ("negative" if value < 0 else "huge" if value >= 2**31 - 1 else "other number"), value
    if isinstance(x, float):
        value = draw.choice(_NUMBERS)
        return f"{value}", value
    if isinstance(x, list) and x and isinstance(x[0], Tensor):
        i = draw.randrange(len(x))
        label, changed = draw.choice([lambda: _mutated_tensor(x[i], draw), lambda: ("none left", None)])()
        return label, [] if changed is None else [*x[:i], changed, *x[i + 1 :]]
    if isinstance(x, list):
        return _mutated_list(x, draw)
    return _instead_of_none(name, draw)


def _instead_of_none(name: str, draw: Draw) -> tuple[str, Any]:
    """Something where an optional argument was left out."""
    if name in ("softcap",):
        value = draw.choice(_NUMBERS)
        return f"{value}", value
    if name in ("keep_count", "ratio_q32", "total_kept"):
        return "some integer", draw.choice(_INTEGERS)
    if name in ("step_weights", "vocab_ranges"):
        return _mutated_list([1, 2] if name == "vocab_ranges" else [1.0], draw)
    n = draw.choice([0, 1, 3, 8])
    dtype = draw.choice(_DTYPES)
    return f"a tensor {dtype}", torch.zeros(draw.choice([(n,), (n, n), ()]), dtype=dtype)


def _mutated_list(x: list[Any], draw: Draw) -> tuple[str, list[Any]]:
    label = draw.choice(["empty", "longer", "shorter", "entry"])
    if label == "empty":
        return label, []
    if label == "longer":
        return label, [*x, *x]
    if label == "shorter":
        return label, x[:-1]
    i = draw.randrange(len(x))
    value = draw.choice(_INTEGERS if isinstance(x[i], int) else _NUMBERS)
    return f"entry {value}", [*x[:i], value, *x[i + 1 :]]


def _mutated_tensor(x: Tensor, draw: Draw) -> tuple[str, Any]:
    """Another shape, dtype, layout or content, or a storage that is gone."""
    label = draw.choice(
        ["dtype", "dtype", "rank up", "rank down", "longer", "shorter", "wider", "narrower", "no rows", "expanded",
         "overlapping", "contents", "contents", "storage freed", "storage cut"]
    )  # fmt: skip
    if label == "dtype":
        dtype = draw.choice([dtype for dtype in _DTYPES if dtype != x.dtype])
        return f"{dtype}", x.nan_to_num().to(dtype) if not x.is_complex() else x.to(dtype)
    if label == "rank up":
        return label, x.unsqueeze(draw.choice([0, -1]))
    if label == "rank down":
        return label, x.flatten() if x.dim() > 1 else x.new_zeros(())
    if x.dim() == 0:
        return "not a scalar", x.expand(2)
    if label in ("longer", "shorter", "no rows"):
        rows = x.shape[0] + draw.choice([1, 5]) if label == "longer" else max(x.shape[0] - 1, 0)
        return label, x.new_zeros((0 if label == "no rows" else rows, *x.shape[1:]))
    if label in ("wider", "narrower"):
        width = x.shape[-1] + draw.choice([1, 8]) if label == "wider" else max(x.shape[-1] - 1, 0)
        return label, x.new_zeros((*x.shape[:-1], width))
    if label == "expanded":  # every row is the same memory
        return label, x.new_zeros((1, *x.shape[1:])).expand(x.shape)
    if label == "overlapping":
        strides = [draw.choice([0, 1, 2]) for _ in x.shape]
        size = 1 + sum(max(n - 1, 0) * stride for n, stride in zip(x.shape, strides, strict=True))
        return label, x.new_zeros(size).as_strided(x.shape, strides)
    if label == "contents":
        return label, _other_contents(x, draw)
    spoiled = x.clone()
    if spoiled.numel() > 0:
        size = spoiled.untyped_storage().size()
        spoiled.untyped_storage().resize_(0 if label == "storage freed" else size // 2)
    else:
        label = "copied"
    return label, spoiled


def _other_contents(x: Tensor, draw: Draw) -> Tensor:
    if x.dtype == torch.bool:
        return torch.rand(x.shape) < 0.5
    if x.is_floating_point():
        return torch.full_like(x, draw.choice([0.0, -1.0, 1e4, math.nan, math.inf, -math.inf]))
    limits = torch.iinfo(x.dtype)
    low, high = draw.choice([(-3, 10), (limits.min, limits.max), (0, 2), (10**6, 10**6 + 1)])
    low, high = min(max(low, limits.min), limits.max - 1), min(high, limits.max)
    return torch.randint(low, high, x.shape, dtype=torch.int64).to(x.dtype)
