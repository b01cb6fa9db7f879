"""Constants on a device: made once, outside the modes of the caller, and never while a graph is captured."""

import threading

import pytest
import torch

from stamp_kernels.triton_kernels import constants
from stamp_kernels.triton_kernels.constants import device_constant

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_constants(monkeypatch):
    monkeypatch.setattr(constants, "_CONSTANTS", {})


def three() -> torch.Tensor:
    return torch.tensor([3])


def test_a_constant_is_made_once():
    first = device_constant("three", CPU, three)
    others = [device_constant(("other", i), CPU, lambda i=i: torch.tensor([i])) for i in range(200)]
    assert device_constant("three", CPU, three) is first
    assert [int(x) for x in others] == list(range(200))


def test_every_device_has_its_own():
    on_meta = device_constant("three", torch.device("meta"), three)
    assert on_meta.device.type == "meta" and device_constant("three", CPU, three).device == CPU


def test_no_mode_of_the_caller_reaches_a_constant():
    """Default devices, inference mode and torch.compile's private memory pools belong to the thread."""
    threads = []

    def make() -> torch.Tensor:
        threads.append(threading.get_ident())
        return three()

    with torch.device("meta"), torch.inference_mode():
        constant = device_constant("three", CPU, make)
    assert constant.device == CPU and not constant.is_inference()
    assert threads != [threading.get_ident()]


def test_one_constant_is_made_of_another():
    constant = device_constant("six", CPU, lambda: 2 * device_constant("three", CPU, three))
    assert constant.tolist() == [6]


def test_a_failure_leaves_nothing_behind():
    def fail() -> torch.Tensor:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        device_constant("three", CPU, fail)
    assert device_constant("three", CPU, three).tolist() == [3]


def test_threads_that_come_at_once_share_a_constant():
    both_are_there = threading.Barrier(2, timeout=30)
    got = []

    def make() -> torch.Tensor:
        both_are_there.wait()
        return three()

    threads = [threading.Thread(target=lambda: got.append(device_constant("three", CPU, make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and got[0] is got[1]


def test_none_is_made_while_a_graph_is_captured(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"captured.*'three'.*cuda:0.*stamp_kernels\.prepare"):
        device_constant("three", gpu, three)
    constants._CONSTANTS["three", gpu] = there = three()
    assert device_constant("three", gpu, three) is there
