"""Pruning under compute-sanitizer: accesses out of bounds (memcheck), races in shared memory (racecheck).

    python benchmarks/gpu/sanitizer.py --results FILE [--rehearse]

Each tool runs sanitized.py, which launches the kernels of pruning, whose addresses depend on the data, on short, long
and odd shapes. Both tools run at the same time, since most of their time is the start of torch.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cases import Case, SkipError, arguments_of_part, leave, run_part
from device import Device
from records import Record

TOOLS = ("memcheck", "racecheck")
SCRIPT = Path(__file__).with_name("sanitized.py")
NAME = "compute-sanitizer"
# Only our kernels, since torch has many. API errors are off: some of torch's calls fail without harm.
OPTIONS = ("--kernel-name", "kernel_substring=stamp", "--report-api-errors", "no", "--error-exitcode", "9")
SHOWN_CHARACTERS = 2000
# Each tensor gets its own allocation, so that the tool knows its bounds.
VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class FoundError(Exception):
    """The tool found an error, or did not finish."""


def command_of(tool: str, rehearse: bool) -> list[str]:
    script = [sys.executable, str(SCRIPT)]
    if rehearse:
        return [*script, "--rehearse"]
    program = shutil.which(NAME) or shutil.which(NAME, path="/usr/local/cuda/bin")
    if program is None:
        raise SkipError(f"{NAME} is not installed")
    return [program, "--tool", tool, *OPTIONS, *script]


def run_tools(rehearse: bool) -> Iterator[Record]:
    """Yields one measurement per tool, then raises if a tool found an error."""
    tools = TOOLS[:1] if rehearse else TOOLS  # without the tools both runs would be the same
    found = []
    with ThreadPoolExecutor(len(tools)) as pool:
        for record in pool.map(partial(run_tool, rehearse=rehearse), tools):
            yield record
            if record["exit_status"] != 0 or not (record["summary"] or rehearse):
                found.append(f"{record['tool']}: {record['summary'] or 'no summary'}")
    if found:
        raise FoundError("; ".join(found))


def run_tool(tool: str, rehearse: bool) -> Record:
    start = time.monotonic()
    run = subprocess.run(
        command_of(tool, rehearse), env=os.environ | VARIABLES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    record = {
        "tool": tool,
        "seconds": round(time.monotonic() - start, 1),
        "exit_status": run.returncode,
        "runs": len(re.findall("^ran ", run.stdout, re.MULTILINE)),
        "summary": " ".join(re.findall("SUMMARY: .*", run.stdout)),
    }
    if run.returncode != 0:
        record["output"] = run.stdout[:SHOWN_CHARACTERS]
    return record


def cases_on(device: Device, rehearse: bool) -> Iterator[Case]:
    yield Case("tools", partial(run_tools, rehearse))


if __name__ == "__main__":
    arguments = arguments_of_part(__doc__)
    leave(run_part("sanitizer", arguments, partial(cases_on, rehearse=arguments.rehearse)))
