"""What launchers compute on the host, and launching_cases.py in a process where kernels are not interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from stamp_kernels.triton_kernels.rows import ceil_div, next_power_of_2

CASES = Path(__file__).with_name("launching_cases.py")


def test_launches_of_compiled_kernels():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:xdist", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_rounding_is_that_of_triton():
    for n in (*range(70), 1000, 2**20, 2**20 + 1, 2**40 - 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [ceil_div(n, b) for b in (1, 3, 64)] == [triton.cdiv(n, b) for b in (1, 3, 64)]
