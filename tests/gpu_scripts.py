"""Runs the scripts of benchmarks/gpu as their users do, each in a process of its own, which compiles its kernels."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "gpu"


def run_script(name: str, *arguments: str | Path, **variables: str | Path) -> subprocess.CompletedProcess:
    """`python benchmarks/gpu/<name> <arguments>` without the test session's TRITON_INTERPRET."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {key: str(value) for key, value in variables.items()}
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
