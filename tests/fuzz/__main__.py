"""The command line: see the package's docstring."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

from fuzz import __doc__ as description
from fuzz.calls import PRELUDE
from fuzz.cases import BAD, Settings, drawn, names, run
from fuzz.draw import BACKENDS
from fuzz.pool import run_all
from fuzz.report import Report
from fuzz.worker import prepare_process


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="how many cases")
    parser.add_argument("--minutes", type=float, help="how long; 3 if neither this nor --cases is given")
    parser.add_argument("--only", action="append", default=[], help="a kind, or kind/subject; may be repeated")
    parser.add_argument("--case", help="run this case alone, in this process, and print its call")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="from which each case draws its own")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args()


def _for_minutes(minutes: float, every: Iterator[str]) -> Iterator[str]:
    end = time.monotonic() + 60 * minutes
    return itertools.takewhile(lambda _: time.monotonic() < end, every)


def _run_one(name: str, settings: Settings) -> int:
    prepare_process()
    case = drawn(name, settings)
    print(PRELUDE + case.call.snippet() + f"\n# {case.backend}, {case.label}", flush=True)  # before it may crash
    outcome = run(case)
    print(f"# {outcome.how} {outcome.details}")
    return outcome.how in BAD


def main() -> int:
    arguments = _arguments()
    settings = Settings(arguments.seed, tuple(arguments.backends.split(",")))
    if arguments.case is not None:
        return _run_one(arguments.case, settings)
    chosen = names(arguments.only)
    if arguments.cases is not None:
        chosen = itertools.islice(chosen, arguments.cases)
    if arguments.minutes is not None or arguments.cases is None:
        chosen = _for_minutes(arguments.minutes or 3.0, chosen)
    report = Report(settings)
    for name, outcome in run_all(chosen, settings, arguments.workers):
        report.add(name, outcome)
    if report.failed:
        print(report.faults() + "\n")
    print(report.table())
    return report.failed


if __name__ == "__main__":
    sys.exit(main())
