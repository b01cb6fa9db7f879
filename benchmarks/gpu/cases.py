"""What the parts of the check share: their arguments, and the loop over their cases."""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from device import CaptureError, Device, open_device
from records import Record, Results

# Exit status of a part that needs a new process because CUDA no longer works in this one.
RESTART = 75


class Case(NamedTuple):
    """`run` yields measurements one after the other."""

    name: str
    run: Callable[[], Iterator[Record]]


class SkipError(Exception):
    """This case cannot run here; the text says why."""


def arguments_of_part(description: str | None, *options: str) -> argparse.Namespace:
    """The arguments that check.py gives to every part. Each further option takes a file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file that JSON lines are appended to")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small inputs")
    for option in options:
        parser.add_argument(option, type=Path)
    return parser.parse_args()


def run_part(part: str, arguments: argparse.Namespace, cases_on: Callable[[Device], Iterable[Case]]) -> int:
    """Run the cases that no earlier process has begun. Returns the exit status of the part.

    The status is 0 even if cases fail, since a failed case does not stop the others. It is RESTART if the next cases
    need a new process: after an error that leaves CUDA unusable, or after a failed capture, from which the allocator
    may not recover.
    """
    results = Results(arguments.results, part)
    device = open_device(arguments.rehearse)
    begun = results.begun()
    gc.collect()
    gc.freeze()  # imported objects are skipped by the collections before measurements
    for case in cases_on(device):
        if case.name in begun:
            continue
        end = _run_case(results, case)
        device.free_memory()
        if end["needs_restart"] or (end["status"] == "failed" and not device.is_healthy()):
            print(f"{case.name}: continues in a new process", flush=True)
            return RESTART
    return 0


def _run_case(results: Results, case: Case) -> dict[str, Any]:
    results.add(case=case.name, status="begun")
    start = time.monotonic()
    end: dict[str, Any] = {"status": "ok", "needs_restart": False}
    try:
        for record in case.run():
            results.add(case=case.name, **record)
    except SkipError as error:
        end |= {"status": "skipped", "reason": str(error)}
    except Exception as error:  # the other cases still run
        end |= {"status": "failed", "reason": message_of(error), "needs_restart": isinstance(error, CaptureError)}
    seconds = round(time.monotonic() - start, 3)
    results.add(case=case.name, seconds=seconds, **{key: end[key] for key in ("status", "reason") if key in end})
    print(f"{case.name}: {end['status']} {end.get('reason', '')}".rstrip(), f"{seconds} s", flush=True)
    return end


def message_of(error: BaseException) -> str:
    """The type and the first two lines of the text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def leave(status: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which aborts or hangs after CUDA has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
