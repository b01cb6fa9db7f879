"""What the parts of the check share: their arguments, and the run through their cases."""

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

# Exit status of a part that asks for a fresh process: CUDA lets this one do nothing more.
RESTART = 75


class Case(NamedTuple):
    """Gives measurements one after the other."""

    name: str
    run: Callable[[], Iterator[Record]]


class SkipError(Exception):
    """A case that does not run here; the text says why."""


def arguments_of_part(description: str | None, *options: str) -> argparse.Namespace:
    """The arguments that check.py gives to every part, and further ones that name files."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines are appended to this file")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small inputs")
    for option in options:
        parser.add_argument(option, type=Path)
    return parser.parse_args()


def run_part(part: str, arguments: argparse.Namespace, cases_on: Callable[[Device], Iterable[Case]]) -> int:
    """Run the cases that no process before this one has begun. The exit status of the part: 0, whatever they gave.

    A case that fails does not stop the others. After an error that leaves CUDA unusable the next ones need a process
    of their own, and so does a capture that failed, which the allocator may not get over.
    """
    results = Results(arguments.results, part)
    device = open_device(arguments.rehearse)
    begun = results.begun()
    gc.collect()
    gc.freeze()  # what was imported: collections before measurements are then quick
    for case in cases_on(device):
        if case.name in begun:
            continue
        end = _run_case(results, case)
        device.free_memory()
        if end["needs_restart"] or (end["status"] == "failed" and not device.is_healthy()):
            print(f"{case.name}: a fresh process goes on", flush=True)
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
    except Exception as error:  # whatever one does, the next are still worth running
        end |= {"status": "failed", "reason": message_of(error), "needs_restart": isinstance(error, CaptureError)}
    seconds = round(time.monotonic() - start, 3)
    results.add(case=case.name, seconds=seconds, **{key: end[key] for key in ("status", "reason") if key in end})
    print(f"{case.name}: {end['status']} {end.get('reason', '')}".rstrip(), f"{seconds} s", flush=True)
    return end


def message_of(error: BaseException) -> str:
    """The type and the first lines of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def leave(status: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which aborts or hangs once CUDA has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
