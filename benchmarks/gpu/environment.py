"""The machine as torch sees it, and which backend serves each op on it.

python benchmarks/gpu/environment.py --results FILE [--rehearse]
"""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from cases import Case, arguments_of_part, leave, run_part
from device import Device
from records import Record

from stamp_kernels.ops._library import served_by

IMPORT = """
import time, torch
start = time.perf_counter()
import stamp_kernels
print(round(time.perf_counter() - start, 3))
"""


def import_seconds() -> Iterator[Record]:
    """Seconds to import the package after torch, in a new process."""
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    if run.returncode != 0:
        raise ImportError(run.stderr.strip().rpartition("\n")[2])
    yield {"import_seconds": float(run.stdout)}


def facts(device: Device) -> Iterator[Record]:
    yield device.facts()


def servers(device: Device) -> Iterator[Record]:
    """The backend of each op: Triton, or in a rehearsal the compiled library."""
    yield {"served_by": served_by("CUDA" if device.device.type == "cuda" else "CPU")}


def cases_on(device: Device) -> Iterator[Case]:
    yield Case("import", import_seconds)
    yield Case("device", partial(facts, device))
    yield Case("served by", partial(servers, device))


if __name__ == "__main__":
    leave(run_part("environment", arguments_of_part(__doc__), cases_on))
