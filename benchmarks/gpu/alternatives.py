"""Open choices that only a GPU can decide: variants of one workload, timed one after the other.

    python benchmarks/gpu/alternatives.py --results FILE [--rehearse]

A variant replaces the function or the constant that makes the choice while its graph is captured.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from cases import Case, arguments_of_part, leave, message_of, run_part
from device import CaptureError, Device
from records import Record
from rehearsal import shrunk
from stopwatch import microseconds, num_input_sets
from workloads import TIMED, CrossEntropy, Workload

from stamp_kernels.ops._served_by_triton import ServedByTriton


class Variant(NamedTuple):
    """One answer. Within `applied()` the package uses it."""

    name: str
    applied: Callable[[], AbstractContextManager[Any]]


class Question(NamedTuple):
    """A choice among variants, and the workload that shows the cost of each."""

    name: str
    workload: Workload
    variants: tuple[Variant, ...]


@contextmanager
def changed_result(module: str, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block the module's function returns `change(result)`. Raises if the block does not call it."""
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    calls = []

    @wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return change(original(*args, **kwargs))

    setattr(owner, name, changed)
    try:
        yield
    finally:
        setattr(owner, name, original)
    if not calls:
        raise RuntimeError(f"nothing called {module}.{name}: the variant changes nothing")


@contextmanager
def changed_constant(module: str, name: str, value: object) -> Iterator[None]:
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


_UNCHANGED = Variant("unchanged", nullcontext)
_TRITON = "stamp_kernels.triton_kernels"


def _timed(name: str) -> Workload:
    return next(workload for workload in TIMED if workload.name == name)


def _forward_tile(name: str, **fields: object) -> Variant:
    change = partial(changed_result, f"{_TRITON}.attention.forward", "forward_config", lambda c: c._replace(**fields))
    return Variant(name, change)


def _backward_tile(name: str, *, for_queries: bool, **fields: object) -> Variant:
    """Changes the tile of the query kernel or of the key kernel."""

    def change(configs: tuple[Any, Any]) -> tuple[Any, Any]:
        query_config, key_config = configs
        if for_queries:
            return query_config._replace(**fields), key_config
        return query_config, key_config._replace(**fields)

    return Variant(name, partial(changed_result, f"{_TRITON}.attention.backward", "backward_config", change))


def _cross_entropy_by_width(width: int) -> Question:
    module, name = "stamp_kernels.ops.cross_entropy.multi_token_cross_entropy", "gradients_come_with_the_loss"
    return Question(
        f"cross-entropy of width {width}",
        CrossEntropy(f"CE.D{width}.V32000.N16k", rows=16_384, width=width, vocabulary=32_000),
        (
            Variant("logits recomputed", partial(changed_result, module, name, lambda _: False)),
            Variant("gradients with the loss", partial(changed_result, module, name, lambda _: True)),
        ),
    )


def _chunk_bytes(mebibytes: int) -> Variant:
    change = partial(changed_constant, f"{_TRITON}.cross_entropy.configs", "CHUNK_BYTES", mebibytes * 2**20)
    return Variant(f"{mebibytes} MiB", change)


def _min_chunk_rows(rows: int) -> Variant:
    change = partial(changed_constant, f"{_TRITON}.cross_entropy.configs", "MIN_CHUNK_ROWS", rows)
    return Variant(f"{rows} rows", change)


def _hidden_gradient_stages(num_stages: int) -> Variant:
    module, name = f"{_TRITON}.cross_entropy.backward", "hidden_gradient_config"
    return Variant(
        f"{num_stages} stages", partial(changed_result, module, name, lambda c: c._replace(num_stages=num_stages))
    )


QUESTIONS: tuple[Question, ...] = (
    Question(
        "warps of the short forward with dropout",
        _timed("L120.bias.dropout"),
        (_forward_tile("8 warps", num_warps=8), _forward_tile("4 warps", num_warps=4)),
    ),
    Question(
        "tile of the query kernel",
        _timed("L240.bias.dropout"),
        (
            _UNCHANGED,
            _backward_tile("64 x 32, one stage", for_queries=True, block_m=64, block_n=32, num_warps=4, num_stages=1),
            _backward_tile("64 x 64", for_queries=True, block_m=64, block_n=64, num_warps=4, num_stages=1),
            _backward_tile("128 x 32", for_queries=True, block_m=128, block_n=32, num_warps=8),
        ),
    ),
    Question(
        "tile of the key kernel",
        _timed("L240.bias.dropout"),
        (
            _UNCHANGED,
            _backward_tile("64 keys, one stage", for_queries=False, num_stages=1),
            _backward_tile("128 keys", for_queries=False, block_n=128, num_warps=8),
        ),
    ),
    Question(
        "tile of the key kernel, width 128",
        _timed("L2048.GQA.d128.causal"),
        (_UNCHANGED, _backward_tile("128 keys", for_queries=False, block_n=128, num_warps=8)),
    ),
    *(_cross_entropy_by_width(width) for width in (128, 256, 384, 512)),
    Question("logits of a row chunk, V 32,000", _timed("CE.D512.V32000"), tuple(map(_chunk_bytes, (320, 160)))),
    Question(
        "rows of a row chunk, V 152,960", _timed("CE.D1024.V152960"), tuple(map(_min_chunk_rows, (2048, 1024, 3456)))
    ),
    Question(
        "stages of the hidden gradient", _timed("CE.D128.V4096"), tuple(map(_hidden_gradient_stages, (3, 2)))
    ),
    *(
        Question(f"backend of {name}", _timed(name), (_UNCHANGED, Variant("Triton", ServedByTriton)))
        for name in ("prune.256x240", "gather.128")
    ),
)  # fmt: skip


def time_question(device: Device, question: Question, rehearse: bool) -> Iterator[Record]:
    """Times each variant, then the first one again: the difference between its two times is noise."""
    workload = shrunk(question.workload) if rehearse else question.workload
    dtype = torch.float16 if rehearse else torch.bfloat16  # products in bf16 are wrong in the interpreter
    one = workload.inputs(device.device, dtype)
    inputs = [one, *(workload.inputs(device.device, dtype, i) for i in range(1, num_input_sets(device, one)))]
    failures = []
    for variant in (*question.variants, question.variants[0]):
        record = {"question": question.name, "workload": workload.name, "variant": variant.name}
        try:
            with device.serve(workload, dtype), variant.applied():
                forward = microseconds(device, workload.forward, inputs)
                both = microseconds(device, workload.run, inputs)
        except Exception as error:  # the other tiles may still compile
            if isinstance(error, CaptureError) or not device.is_healthy():
                raise
            failures.append(f"{variant.name}: {message_of(error)}")
            continue
        yield {**record, "forward_us": round(forward.median, 2), "both_us": round(both.median, 2)}
    if failures:
        raise RuntimeError("; ".join(failures))


def cases_on(device: Device, rehearse: bool) -> Iterator[Case]:
    for question in rehearsed_questions(device) if rehearse else QUESTIONS:
        yield Case(question.name, partial(time_question, device, question, rehearse))


def rehearsed_questions(device: Device) -> list[Question]:
    """The last variant of each question that the interpreter can answer. Questions with the same one run once."""
    asked = [q._replace(variants=q.variants[-1:]) for q in QUESTIONS if device.has_launcher(q.workload)]
    return list({q.variants[0].name: q for q in asked}.values())


if __name__ == "__main__":
    arguments = arguments_of_part(__doc__)
    leave(run_part("alternatives", arguments, partial(cases_on, rehearse=arguments.rehearse)))
