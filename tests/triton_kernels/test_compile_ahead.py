"""Hot variants of every Triton kernel, compiled for three architectures: they fit, do not spill, use matrix units."""

import json
import os
import subprocess
import sys

import pytest

from stamp_kernels.triton_kernels.compile_ahead import SHARED_MEMORY, Compiled, variants

HOT = [(name, arch) for arch in SHARED_MEMORY for name, _ in variants(arch, only_hot=True)]
COMPILE = [sys.executable, "-m", "stamp_kernels.triton_kernels.compile_ahead"]


def environment(**variables: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], Compiled]:
    """In a process of its own: this one may interpret its kernels, which cannot be compiled then."""
    run = subprocess.run(
        [*COMPILE, "--hot", "--json", "--processes", "2"], env=environment(), capture_output=True, text=True
    )
    assert run.returncode in (0, 1), run.stderr  # 1: there are problems, for the tests to name
    results = [Compiled(**result) for result in json.loads(run.stdout)]
    return {(result.name, result.arch): result for result in results}


@pytest.mark.parametrize(("name", "arch"), HOT, ids=[f"{name}-sm{arch}" for name, arch in HOT])
def test_hot_variant(compiled, name, arch):
    assert compiled[name, arch].problems() == []


def test_there_are_hot_variants_for_every_architecture():
    assert {arch for _, arch in HOT} == {80, 90, 100}
    assert len(set(HOT)) == len(HOT) <= 120


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (dict(), None),
        (dict(error="no such thing"), "does not compile: no such thing"),
        (dict(shared=228 * 1024), "233472 bytes of shared memory, the chip has 232448"),
        (dict(spilled=8), "spills 8 bytes"),
        (dict(spilled=8, hot=False), None),
        (dict(matrix_instructions={"HMMA": 24}), "no HGMMA but {'HMMA': 24}"),
        (dict(matrix_instructions={}, wanted_instructions=()), None),
    ],
    ids=str,
)
def test_problems(changed, problem):
    good = Compiled("kernel", 90, True, 128, 32768, 0, {"HGMMA": 12}, ("HGMMA",))
    assert good._replace(**changed).problems() == ([problem] if problem else [])


def test_interpreted_kernels_are_refused():
    run = subprocess.run(COMPILE, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr
