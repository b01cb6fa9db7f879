"""`launch` launches what Triton itself would: the same compiled kernel with the same arguments.

`test_launching.py` runs this file in a process of its own, since a session without a GPU interprets all kernels.
"""

import operator
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from stamp_kernels.triton_kernels.aot import launch_nothing
from stamp_kernels.triton_kernels.launching import launch

INT32, INT64 = 2**31, 2**63


class Rows(NamedTuple):
    ptr: torch.Tensor | None
    stride: int
    start: int | None


class Tile(NamedTuple):
    rows: int
    is_wide: bool


@triton.jit(do_not_specialize=["count", "source"])
def kernel(
    out, source: Rows, optional, count, size, several, more, scale, flag, tile: tl.constexpr, BLOCK: tl.constexpr
):
    """Reads every argument in some way; what it computes has no meaning."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source.ptr + i * source.stride, mask=i < count, other=0.0) * scale + size
    if source.start is not None:
        x += source.start
    if optional is not None:
        x += tl.load(optional + i)
    for j in tl.static_range(len(several)):
        x += tl.load(several[j] + i)
    for j in tl.static_range(len(more)):
        x += tl.load(more[j] + i)
    if flag:
        x += tile.rows
    tl.store(out + i, x)


MEMORY = torch.zeros(256, dtype=torch.float32)
BASE: dict[str, Any] = dict(
    out=MEMORY, source=Rows(MEMORY, 16, None), optional=MEMORY, count=5, size=3, several=(MEMORY,), more=(MEMORY,),
    scale=0.5, flag=True, tile=Tile(4, True), BLOCK=16, num_warps=4, num_stages=1, maxnreg=None,
)  # fmt: skip
INTS = (-1, 0, 1, 3, 16, 17, INT32 - 1, INT32, -INT32, -INT32 - 1, 2 * INT32 + 16, INT64 - 16, INT64)
TENSORS = (MEMORY[4:], MEMORY[1:], MEMORY[2:], MEMORY.half()[8:], MEMORY.half()[1:], MEMORY.bfloat16())
CHANGES = {
    "out": (*TENSORS, triton.reinterpret(MEMORY, torch.int32), torch.nn.Parameter(MEMORY)),
    "source": (
        *(Rows(x, 16, None) for x in TENSORS),
        *(Rows(MEMORY, stride, None) for stride in INTS),
        *(Rows(MEMORY, 16, start) for start in (*INTS, True, 2.0)),
    ),
    "optional": (None, *TENSORS),
    "several": ((), (MEMORY, MEMORY), (MEMORY, MEMORY, MEMORY), *((x,) for x in TENSORS), ((MEMORY,),)),
    "more": ((), (MEMORY, MEMORY), (MEMORY, MEMORY[1:]), (triton.reinterpret(MEMORY, torch.int32),)),
    "count": (*INTS, True, 2.0),
    "size": (*INTS, True, 3.0),
    "scale": (1.0, 1, 16, 2),
    "flag": (False, None, 0, 1, 16),
    "tile": (Tile(4, False), Tile(8, True)),
    "BLOCK": (32,),
    "num_warps": (8,),
    "num_stages": (2,),
    "maxnreg": (64,),
}
CALLS = [BASE, *(BASE | {name: value} for name, values in CHANGES.items() for value in values)]


class Launched(NamedTuple):
    """What reached the driver: what the kernel was compiled from and with, the grid, the stream and the arguments."""

    signature: dict[str, Any]
    constants: dict[Any, Any]
    attrs: dict[Any, Any]
    metadata: Any
    grid: tuple[int, ...]
    function: int
    stream: int
    arguments: tuple[Any, ...]
    hooks: tuple[Any, ...]

    @property
    def of_triton(self) -> bool:
        """Whether it came from Triton's own path, which always has hooks."""
        return self.hooks != (None, None)


LAUNCHED: list[Launched] = []


def note(source, x, y, z, stream, function, metadata, launch_metadata, before, after, *arguments):
    LAUNCHED.append(
        Launched(
            source.signature,
            source.constants,
            source.attrs,
            metadata,
            (x, y, z),
            function,
            stream,
            arguments,
            (before, after),
        )
    )


def run(launcher, arguments: dict[str, Any], grid: tuple[int, int, int] = (3, 2, 1)) -> Launched | type[Exception]:
    """What the launcher launches, or the type of its exception."""
    LAUNCHED.clear()
    try:
        launcher(kernel, grid, **arguments)
    except Exception as error:
        return type(error)
    (launched,) = LAUNCHED
    return launched


def triton_launch(kernel, grid, **arguments):
    kernel[grid](**arguments)


def assert_same(launched: Launched | type[Exception], expected: Launched | type[Exception]) -> None:
    if not isinstance(expected, Launched):
        assert launched is expected
        return
    assert launched._replace(arguments=(), hooks=()) == expected._replace(arguments=(), hooks=())
    assert len(launched.arguments) == len(expected.arguments)
    assert all(map(operator.is_, launched.arguments, expected.arguments))


@pytest.fixture(autouse=True)
def nothing_is_launched():
    with launch_nothing(90, note):
        yield


def test_launches_are_those_of_triton():
    """Any two calls that Triton tells apart have two keys, and the second launch of a call takes the fast way."""
    expected = [run(triton_launch, call) for call in CALLS]
    assert sum(isinstance(one, Launched) for one in expected) > 60
    for call, one in zip(CALLS, expected, strict=True):
        assert_same(run(launch, call), one)
    for call, one in zip(CALLS, expected, strict=True):
        again = run(launch, call)
        assert_same(again, one)
        assert not (isinstance(again, Launched) and again.of_triton)


def test_devices_have_their_own_kernels(monkeypatch):
    for arch in (80, 90, 80, 90):
        monkeypatch.setattr(driver.active, "arch", arch)
        launched = run(launch, BASE)
        assert launched.function == arch
        assert_same(launched, run(triton_launch, BASE))


def test_drivers_have_their_own_kernels(monkeypatch):
    """Two drivers may give the same number to two devices."""
    run(launch, BASE)
    with launch_nothing(90, note):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        assert run(launch, BASE).of_triton


def test_grid_and_stream_are_those_of_the_call(monkeypatch):
    run(launch, BASE)
    for stream in (7, 0):
        monkeypatch.setattr(driver.active, "get_current_stream", lambda _, stream=stream: stream)
        for grid in ((1, 1, 1), (2, 3, 4)):
            launched = run(launch, BASE, grid)
            assert (launched.stream, launched.grid, launched.of_triton) == (stream, grid, False)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("is_chain", [True, False])
def test_hooks_get_their_launches(monkeypatch, name, is_chain):
    """Profilers set them."""
    run(launch, BASE)
    hooks = getattr(triton.knobs.runtime, name)
    if is_chain:
        monkeypatch.setattr(hooks, "calls", [lambda _: None])
    else:
        monkeypatch.setattr(triton.knobs.runtime, name, lambda _: None)
    launched = run(launch, BASE)
    assert getattr(triton.knobs.runtime, name) in launched.hooks


def test_hooks_before_runs_are_called(monkeypatch):
    run(launch, BASE)
    called = []
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: called.append(kwargs["count"])])
    run(launch, BASE)
    assert called == [5]


def test_replaced_run_sees_every_launch(monkeypatch):
    run(launch, BASE)
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda self, **arguments: seen.append(arguments["grid"]))
    launch(kernel, (3, 2, 1), **BASE)
    assert seen == [(3, 2, 1)]


def test_debug_setting_is_compiled_for(monkeypatch):
    run(launch, BASE)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    assert run(launch, BASE).of_triton
    assert not run(launch, BASE).of_triton


@pytest.mark.parametrize(
    "arguments",
    [
        {name: value for name, value in BASE.items() if name != "size"},
        BASE | {"no_option": 1},
        BASE | {"size": "3"},
        BASE | {"size": SimpleNamespace()},
        BASE | {"source": "rows"},
    ],
    ids=["missing", "unknown", "text", "object", "no tuple"],
)
def test_wrong_arguments_are_refused_by_triton(arguments):
    expected = run(triton_launch, arguments)
    assert not isinstance(expected, Launched)
    assert run(launch, arguments) is expected
    assert run(launch, arguments) is expected


def test_threads_launch_their_own_arguments():
    calls = [BASE | {"size": size, "optional": optional} for size in range(20) for optional in (None, MEMORY)]
    LAUNCHED.clear()
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda call: launch(kernel, (1, 1, 1), **call), calls * 5))
    for launched in LAUNCHED:
        size = launched.arguments[4]
        assert (launched.constants.get((4,)) == 1) == (size == 1)
        assert ((2,) in launched.constants) == (launched.arguments[2] is None)
        assert bool(launched.attrs.get((4,))) == (size % 16 == 0)
    assert len(LAUNCHED) == len(calls) * 5
