"""A process that runs the cases that it reads, one name a line, and answers in lines of JSON.

`["label", text]` comes before anything runs that could crash, then `["outcome", how, label, details]`. The cases run in
a forked child. If that dies, the answer is `["died", status]`, and a new child goes on: imports take seconds, a fork
does not. A child ends after a raw case, which may have written where a later case would crash.
"""

import json
import os
import resource
import sys
from typing import Any

import torch

from fuzz.cases import Settings, drawn, run

_MEMORY = 3 * 2**30  # that a case may take
_AFTER_RAW = 99  # the exit status of a child that leaves the next case to another


def prepare_process() -> None:
    """One thread, and NaN in memory that nobody has written."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _limit_memory() -> None:
    """Leave no room for what an absurd size would ask for. The sanitizer reserves terabytes of addresses."""
    if "ASAN_OPTIONS" not in os.environ:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))


def _answer(file: int, *what: Any) -> None:
    os.write(file, (json.dumps(what) + "\n").encode())


def _line(file: int) -> str:
    """The next line, without a buffer that would die with the child; "" at the end."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(file, 1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def _serve(answers: int, settings: Settings) -> None:
    _limit_memory()
    while name := _line(0):
        case = drawn(name, settings)
        _answer(answers, "label", case.label)
        outcome = run(case)
        _answer(answers, "outcome", outcome.how, outcome.label, outcome.details)
        if name.startswith("raw/"):
            os._exit(_AFTER_RAW)


def main() -> None:
    settings = Settings(int(sys.argv[1]), tuple(sys.argv[2].split(",")))
    prepare_process()  # which imports, once and not in every child
    if "triton" in settings.backends:
        import triton.language  # noqa: F401
    answers = os.dup(1)
    os.dup2(2, 1)  # what else is printed is not an answer
    while True:
        child = os.fork()
        if child == 0:
            _serve(answers, settings)
            sys.stderr.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if status != _AFTER_RAW:
            _answer(answers, "died", status)


if __name__ == "__main__":
    main()
