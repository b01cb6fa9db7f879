"""The host cost of ops is measured on a machine without a GPU."""

import pytest
from gpu_scripts import run_script

pytest.importorskip("triton")


def test_costs_of_a_forward_and_a_backward():
    run = run_script("host_cost.py", "--workloads", "gather.128", "--calls", "20")
    assert run.returncode == 0, run.stdout + run.stderr
    _, forward, backward = run.stdout.splitlines()
    assert forward.split()[:3] == ["gather.128", "forward", "gather_tokens_forward"]
    assert backward.split()[:3] == ["gather.128", "backward", "gather_tokens_backward"]
    assert "(1)" in forward and "(1)" in backward  # launches


def test_interpreted_kernels_are_refused():
    run = run_script("host_cost.py", TRITON_INTERPRET="1")
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr
