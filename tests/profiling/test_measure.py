"""Step times are interleaved, and peak memory is what was allocated, to the byte if that is known."""

import gc
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import select_tokens
from stamp_kernels.profiling.measure import (
    Rates,
    describe_device,
    describe_versions,
    interleaved_step_times,
    measured_rates,
    peak_bytes,
    resident_bytes,
    summarize,
)
from stamp_kernels.profiling.measure import machine as machine_module

CPU = torch.device("cpu")
MIB = 2**20


def mebibytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB // 4)


@contextmanager
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_rounds_rotate_and_continue_after_the_warmup():
    calls = []
    steps = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    ticks = []
    times = interleaved_step_times(steps, num_steps=3, warmup=1, device=CPU, on_step=lambda: ticks.append(len(calls)))
    rounds = [calls[first : first + 3] for first in range(0, 12, 3)]
    assert [[name for name, _ in calls] for calls in rounds] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert [{i for _, i in calls} for calls in rounds] == [{0}, {1}, {2}, {3}]
    assert ticks == list(range(1, 13))
    assert list(times) == ["a", "b", "c"]
    assert all(len(t) == 3 and min(t) >= 0 for t in times.values())


def test_no_garbage_collection_during_steps():
    states = []
    interleaved_step_times({"a": lambda i: states.append(gc.isenabled())}, num_steps=2, warmup=0, device=CPU)
    assert states == [False, False]
    assert gc.isenabled()

    def fail(i: int) -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        interleaved_step_times({"a": fail}, num_steps=1, warmup=0, device=CPU)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("num_steps", "warmup", "message"),
    [(0, 0, r"num_steps must be in \[1, inf\), got 0"), (1, -1, r"warmup must be in \[0, inf\), got -1")],
)
def test_step_counts_are_checked(num_steps: int, warmup: int, message: str):
    with pytest.raises(ValueError, match=message):
        interleaved_step_times({"a": print}, num_steps=num_steps, warmup=warmup, device=CPU)


def test_summarize():
    assert summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx({"median": 3.5, "p20": 2.0, "p80": 5.0})
    assert summarize([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


# ---- rates ---------------------------------------------------------------------------------------------------------


def test_floor_is_the_larger_of_two_times():
    """Arithmetic and memory traffic overlap completely."""
    rates = Rates(flops_per_second=100.0, bytes_per_second=10.0)
    assert rates.floor_seconds(flops=200, num_bytes=10) == 2.0
    assert rates.floor_seconds(flops=200, num_bytes=50) == 5.0


def test_rates_of_the_device_at_hand():
    rates = measured_rates(CPU, torch.float32)
    assert 1e8 < rates.flops_per_second < 1e15
    assert 1e8 < rates.bytes_per_second < 1e14


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_faster_product_makes_the_rate(monkeypatch):
    """On some CPUs torch.mm is far below the machine's rate, and kernels would beat a floor made of it."""
    times = {"product": [20.0, 10.0], "oneDNN product": [5.0, 8.0], "copy": [100.0]}  # milliseconds

    def recorded_times(steps, **options):
        assert list(steps) == list(times)
        for step in steps.values():
            step(0)
        return times

    monkeypatch.setattr(machine_module, "interleaved_step_times", recorded_times)
    rates = measured_rates(CPU, torch.float32)
    assert rates.flops_per_second == pytest.approx(2 * 2048**3 / 5e-3)
    assert rates.bytes_per_second == pytest.approx(2 * 2**28 / 0.1)


def test_rates_of_an_h100_are_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert measured_rates(torch.device("cuda"), torch.bfloat16) == Rates(798e12, 3.0e12)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_peak_of_what_is_made_and_freed():
    def step() -> None:
        first = mebibytes(64)
        del first
        second = mebibytes(24)
        third = mebibytes(48)
        del second, third

    assert peak_bytes(step, CPU) == 72 * MIB
    assert peak_bytes(step, CPU, resident_bytes=1000) == 72 * MIB + 1000
    assert peak_bytes(lambda: None, CPU) == 0


def test_peak_counts_what_outlives_the_step():
    kept = []
    assert peak_bytes(lambda: kept.append(mebibytes(8)), CPU) == 8 * MIB


def test_peak_sees_inside_an_operator():
    """`median` makes a copy that Python does not see, and returns a scalar."""
    x = mebibytes(16)
    assert 16 * MIB <= peak_bytes(lambda: x.median(), CPU) < 17 * MIB


def test_peak_sees_the_output_of_a_compiled_op():
    x = torch.ones(1000, MIB // 1000, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 400, 1000], dtype=torch.int32)
    selection = select_tokens(torch.rand(1000), cu_seqlens, 600, keep_ratio=0.5)
    kept = gather_tokens(x, selection)
    assert kept.shape[0] == 500
    assert peak_bytes(lambda: gather_tokens(x, selection), CPU) == kept.nbytes


def test_peak_counts_what_autograd_holds():
    """exp saves its output for the backward pass: four outputs exist at the sum, and then a gradient."""
    x = torch.zeros(MIB // 4, requires_grad=True)

    def step() -> None:
        y = x
        for _ in range(4):
            y = (0.1 * y).exp()
        y.sum().backward()
        x.grad = None

    def step_without_gradient() -> None:
        with torch.no_grad():
            y = x
            for _ in range(4):
                y = (0.1 * y).exp()

    assert 5 * MIB <= peak_bytes(step, CPU) < 8 * MIB
    assert 2 * MIB <= peak_bytes(step_without_gradient, CPU) < 4 * MIB


def test_peak_does_not_depend_on_the_threads():
    w = torch.randn(512, 512, requires_grad=True)

    def step() -> None:
        torch.softmax(w @ w, dim=-1).square().sum().backward()
        w.grad = None

    many = peak_bytes(step, CPU)
    with single_thread():
        assert peak_bytes(step, CPU) == many
    assert many >= 3 * w.nbytes


def test_peak_ignores_frees_of_what_was_there_before():
    """The allocator's table keeps an entry for a block that is made in one profile and freed outside: the next profile
    then reports a free of the old size at that address, although this step did not make the block."""
    held = []
    peak_bytes(lambda: held.append(mebibytes(64)), CPU)

    def step() -> None:
        held.clear()
        held.append(mebibytes(16))
        held.append(mebibytes(32))

    assert peak_bytes(step, CPU) == 48 * MIB


def test_peak_raises_errors_and_ends_the_profile():
    def fail() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        peak_bytes(fail, CPU)
    assert peak_bytes(lambda: mebibytes(1), CPU) == MIB


@pytest.mark.gpu
def test_peak_on_the_gpu():
    device = torch.device("cuda")
    other = torch.ones(64 * MIB // 4, device=device)

    def step() -> None:
        first = torch.ones(32 * MIB // 4, device=device)
        second = torch.ones(16 * MIB // 4, device=device)
        del first, second

    assert peak_bytes(step, device, resident_bytes=1000) == 48 * MIB + 1000
    assert interleaved_step_times({"a": lambda i: other.add_(1)}, num_steps=2, warmup=1, device=device)["a"][0] > 0


def test_resident_bytes():
    module = torch.nn.Sequential(torch.nn.Linear(10, 20, bias=False), torch.nn.BatchNorm1d(20))
    module.append(torch.nn.Linear(10, 20, bias=False))
    module[2].weight = module[0].weight  # tied: counts once
    weights, buffers = 4 * (200 + 2 * 20), 4 * 2 * 20 + 8
    optimizer = torch.optim.AdamW(module.parameters())
    assert resident_bytes(module, optimizer) == weights + buffers
    module[1](module[0](torch.rand(4, 10))).sum().backward()
    assert resident_bytes(module, optimizer) == 2 * weights + buffers
    optimizer.step()
    counters = 4 * len(optimizer.state)
    assert resident_bytes(module, optimizer) == 4 * weights + buffers + counters
    optimizer.zero_grad(set_to_none=True)
    assert resident_bytes(module, optimizer) == 3 * weights + buffers + counters


# ---- where it ran --------------------------------------------------------------------------------------------------


def test_describe():
    with single_thread():
        assert describe_device(CPU).endswith(", 1 thread")
    assert len(describe_device(CPU).split(",")[0]) > 2
    versions = describe_versions()
    assert {"stamp_kernels", "python", "torch", "numpy"} <= set(versions)
    assert versions["torch"] == torch.__version__
    assert ("cuda" in versions) == (torch.version.cuda is not None)


def test_freed_memory_can_be_kept_with_glibc():
    """In a child process, since the options stay set."""
    code = "from stamp_kernels.profiling.measure import keep_freed_memory; print(keep_freed_memory())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
