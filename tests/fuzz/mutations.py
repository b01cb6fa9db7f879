"""Ways to spoil an argument of a public function. Each takes the valid value and returns one that is not allowed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz.draw import Draw


class DoesNotApplyError(Exception):
    """This value cannot be spoiled in this way."""


def _of_tensor(spoil: Callable[[Tensor], Tensor]) -> Callable[[Any, Draw], Any]:
    def mutate(x: Any, draw: Draw) -> Any:
        if not isinstance(x, Tensor):
            raise DoesNotApplyError
        return spoil(x.detach())

    return mutate


def _constant(value: Any) -> Callable[[Any, Draw], Any]:
    return lambda x, draw: value


def _needs(condition: bool, x: Any) -> Any:
    if not condition:
        raise DoesNotApplyError
    return x


def _appended(x: Tensor) -> Tensor:
    """One more row."""
    _needs(x.dim() > 0, x)
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])


def _wider(x: Tensor) -> Tensor:
    _needs(x.dim() > 0, x)
    return torch.cat([x, x.new_zeros((*x.shape[:-1], 1))], -1)


def _other_float(x: Tensor) -> Tensor:
    _needs(x.is_floating_point(), x)
    return x.to(torch.float16 if x.dtype == torch.float32 else torch.float32)


def _decreasing(x: Tensor) -> Tensor:
    _needs(len(x) > 2 and int(x[-1]) > 0, x)
    x = x.clone()
    x[1:-1] = x[-1] + 1  # more than the last
    return x


def _with(x: Tensor, i: int, value: int) -> Tensor:
    _needs(x.numel() > abs(i), x)
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[i] = value
    return x


MUTATIONS: dict[str, Callable[[Any, Draw], Any]] = {
    # types
    "none": _constant(None),
    "string": _constant("x"),
    "number": _constant(3),
    "boolean": _constant(True),
    "fraction": _constant(1.5),
    "dictionary": _constant({0: 1.0}),
    "empty_list": _constant([]),
    "tensor": _constant(torch.ones(2, 2)),
    "list": _of_tensor(lambda x: x.tolist() if x.numel() < 1000 else [0.0]),
    "numpy": _of_tensor(lambda x: _needs(x.dtype != torch.bfloat16, x).numpy()),
    # devices, dtypes, shapes
    "meta": _of_tensor(lambda x: x.to("meta")),
    "to_int64": _of_tensor(lambda x: _needs(x.dtype != torch.int64, x).nan_to_num().to(torch.int64)),
    "to_int32": _of_tensor(lambda x: _needs(x.dtype != torch.int32, x).nan_to_num().to(torch.int32)),
    "to_float32": _of_tensor(lambda x: _needs(x.dtype != torch.float32, x).to(torch.float32)),
    "to_float16": _of_tensor(lambda x: _needs(x.dtype != torch.float16, x).to(torch.float16)),
    "to_complex": _of_tensor(lambda x: x.to(torch.complex64)),
    "to_other_float": _of_tensor(_other_float),
    "rank_up": _of_tensor(lambda x: x.unsqueeze(0)),
    "rank_up_twice": _of_tensor(lambda x: x[None, None]),
    "rank_down": _of_tensor(lambda x: x.flatten() if x.dim() > 1 else x.new_zeros(())),
    "longer": _of_tensor(_appended),
    "shorter": _of_tensor(lambda x: _needs(x.dim() > 0 and len(x) > 0, x)[:-1]),
    "wider": _of_tensor(_wider),
    "no_entries": _of_tensor(lambda x: x[:0]),
    "requires_grad": _of_tensor(lambda x: _needs(x.is_floating_point(), x).clone().requires_grad_()),
    # numbers
    "nan": _constant(math.nan),
    "infinite": _constant(math.inf),
    "negative": _constant(-1),
    "zero": _constant(0),
    "above_one": _constant(1.5),
    "one": _constant(1.0),
    "beyond_32_bits": _constant(2**32 + 1),
    # contents
    "starts_at_one": _of_tensor(lambda x: _with(x, 0, 1)),
    "decreasing": _of_tensor(_decreasing),
    "past_the_end": _of_tensor(lambda x: _with(x, -1, 2**30)),
    "negative_entry": _of_tensor(lambda x: _with(x, -1, -5)),
    "huge_entry": _of_tensor(lambda x: _with(x, -1, 2**31 - 1)),
    "entry_beyond_32_bits": _of_tensor(lambda x: _with(_needs(x.dtype == torch.int64, x), -1, 2**32 + 1)),
    # int64 offsets that are right in their lowest 32 bits
    "wrapping": _of_tensor(lambda x: _needs(len(x) > 0, x).to(torch.int64) + 2**32),
    # lists
    "one_more": lambda x, draw: [*_needs(isinstance(x, list | tuple) and len(x) > 0, x), x[-1]],
    "one_fewer": lambda x, draw: _needs(isinstance(x, list | tuple) and len(x) > 1, x)[:-1],
    "flat": lambda x, draw: [bound for pair in _needs(isinstance(x, list), x) for bound in pair],
    "of_strings": lambda x, draw: ["x"] * len(_needs(isinstance(x, list | tuple) and len(x) > 0, x)),
    "inverted": lambda x, draw: [(end, start) for start, end in _needs(isinstance(x, list), x)],
    "empty_ranges": lambda x, draw: [(start, start) for start, _ in _needs(isinstance(x, list), x)],
    "past_the_vocabulary": lambda x, draw: [(start, 2**20) for start, _ in _needs(isinstance(x, list), x)],
    "before_the_vocabulary": lambda x, draw: [(-1, end) for _, end in _needs(isinstance(x, list), x)],
    "fractions": lambda x, draw: [(0.5, end) for _, end in _needs(isinstance(x, list), x)],
}

# Wrong contents may be found by the op, which raises a RuntimeError; everything else by the public function.
OF_CONTENTS = {
    "starts_at_one", "decreasing", "past_the_end", "negative_entry", "huge_entry", "entry_beyond_32_bits",
    "wrapping", "too_small",
}  # fmt: skip
