"""The task loops of the CPU kernels under the thread sanitizer, and that it sees them broken."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
RACE = "WARNING: ThreadSanitizer: data race"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the thread sanitizer of g++ needs Linux")


def build_task_loops(folder: Path, csrc: Path) -> list[str]:
    """Compile the program against the header in `csrc`; the command that runs it."""
    program = folder / "task_loops"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    includes = [f"-I{csrc}", f"-I{HERE / 'stubs'}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, *includes, HERE / "task_loops.cpp", "-o", program], check=True)
    setarch = shutil.which("setarch")  # older sanitizers cannot place their memory among random addresses
    return [str(program)] if setarch is None else [setarch, "-R", str(program)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}  # a broken loop may not end
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_task_loops_have_no_race(tmp_path):
    done = run(build_task_loops(tmp_path, CSRC))
    assert done.returncode == 0, done.stdout + done.stderr


# What the threads share, and the same as a plain number. To count down in a plain number can also stop the loop.
BROKEN = {
    "next task": (r"std::atomic<int64_t> next\{0\}", "int64_t next{0}"),
    "next task of a round": (r"std::atomic<uint64_t> next\{0\}", "uint64_t next{0}"),
    "order of rounds": (r"next = static_cast<uint64_t>\(round\)(.*);", r"next.store(static_cast<uint64_t>(round)\1, "
                        "std::memory_order_relaxed);"),
}  # fmt: skip


@pytest.mark.parametrize("shared", BROKEN)
def test_broken_task_loop_is_seen(tmp_path, shared):
    shutil.copytree(CSRC / "cpu" / "core", tmp_path / "cpu" / "core")
    source = (CSRC / "cpu" / "core" / "tasks.h").read_text()
    broken, count = re.subn(*BROKEN[shared], source)
    assert count == 1
    (tmp_path / "cpu" / "core" / "tasks.h").write_text(broken)
    command = build_task_loops(tmp_path, tmp_path)
    # Whether a run shows the race depends on how its threads meet.
    failures = (done.stderr for done in (run(command) for _ in range(50)) if done.returncode != 0)
    assert RACE in next(failures, "no race in 50 runs")
