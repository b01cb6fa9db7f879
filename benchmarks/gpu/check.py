"""Everything that needs a GPU, in two short runs on a machine without a network: `make gpu-check STAGE=1`, then 2.

    python benchmarks/gpu/check.py --stage 1|2 [--data FILE] [--output DIR] [--only PART,PART] [--rehearse]
    python benchmarks/gpu/check.py --convert FILE [--output DIR]

Each part is a process with its own time limit. Every measurement becomes a line of DIR/stage-N.jsonl immediately. A
part that runs out of time is interrupted. A part that dies is started again after the case that killed it. The other
parts run in any case, and a summary comes last, even if the whole run is interrupted.

`--rehearse` runs the same on a CPU with small inputs, except for `warm`, which `make gpu-bundle` has already run.
`--convert` makes a file for benchmarks/results from the lines, and prints their summary again.

Seconds on an H100 with 16 cores. They are estimates, from counts and from what the cases take on two CPU cores apart
from arithmetic. A whole stage ends after 200 or 240 seconds, whatever its parts have left.

    stage  part          expected  limit  where the time goes
    1      environment         12     25  Python and torch start twice, 4 s each; CUDA starts
    1      warm                15     45  153 recordings: 8 s on two cores with everything in Triton's cache
    1      correctness         37     70  4 s to start; 81 cases, 0.4 s each: up to six runs, a reference, a graph
    1      sanitizer           20     40  torch starts under two tools at once
    1      timings             75     90  7 s to start; 29 workloads and 36 peers, 1 s each for two graphs
    2      environment         12     25
    2      warm                15     45
    2      training            90    110  10 s to start; 12 configurations of 28 steps, their model and two profiles
    2      alternatives        60     90  4 s to start; 44 variants, 1.3 s each for two graphs
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple, NoReturn

from records import KEYS_OF_ALL, Record, Results, read_records
from summary import summary_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCHEMA = "stamp-gpu-check/1"
PACKAGES = ("stamp_kernels", "torch", "triton", "transformers", "numpy")
# Files, by package, that decide whether Triton's cache is valid or that are under test. Patterns.
HASHED = {"stamp_kernels": ("*.so",), "triton": ("_C/libtriton.so", "backends/nvidia/bin/ptxas")}
GPU_FACTS = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
STAGE_SECONDS = {1: 200, 2: 240}
REHEARSAL_FACTOR = 4  # multiplies all limits: a rehearsal shares its two cores with other programs
RESTART = 75  # equals cases.RESTART, which cannot be imported without torch
MAX_RESTARTS = 10
# Seconds between SIGINT, SIGTERM and SIGKILL. A process that hangs in the driver may survive all three.
GRACE_SECONDS = 5


class Part(NamedTuple):
    """A script in this folder with its arguments, and its time limit."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


WARM = Part("warm", ("bundle.py", "warm"), 45)
STAGES = {
    1: (
        Part("environment", ("environment.py",), 25),
        WARM,
        Part("correctness", ("correctness.py",), 70),
        Part("sanitizer", ("sanitizer.py",), 40),
        Part("timings", ("timings.py",), 90),
    ),
    2: (
        Part("environment", ("environment.py",), 25),
        WARM,
        Part("training", ("training.py",), 110),
        Part("alternatives", ("alternatives.py",), 90),
    ),
}


# The machine


def head(stage: int, rehearse: bool) -> Record:
    """The first line of the results."""
    return {
        "schema": SCHEMA,
        "stage": stage,
        "rehearsal": rehearse,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["check.py", *sys.argv[1:]]),
        "commit": commit(),
        "gpu": {"name": "cpu"} if rehearse else gpu_facts(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "sha256": hashes(),
    }


def commit() -> str | None:
    """The commit that is checked out; None without git."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def gpu_facts() -> dict[str, str]:
    """What the driver reports about the first GPU."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        lines = []
    values = lines[0].split(", ") if lines else ["unknown"]
    return dict(zip(GPU_FACTS, values, strict=False))


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def hashes() -> dict[str, str]:
    """The first 16 hex digits of each file's SHA-256, by path."""
    found = {}
    for package, patterns in HASHED.items():
        spec = importlib.util.find_spec(package)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            for file in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
                found[f"{package}/{file.relative_to(folder)}"] = sha256(file)[:16]
    return found


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# Parts


def run_part(part: Part, results: Results, log: IO[str], seconds: float, extra: list[str], rehearse: bool) -> str:
    """Run a part, and restart it after each case that ends its process.

    Returns:
        How the part ended: "finished", or why it did not finish.
    """
    command = [sys.executable, str(HERE / part.arguments[0]), *part.arguments[1:], "--results", str(results.file)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONUNBUFFERED": "1", **({"TRITON_INTERPRET": "1"} if rehearse else {})}
    end = time.monotonic() + seconds
    for _ in range(MAX_RESTARTS):
        begun = len(results.begun())
        process = subprocess.Popen(
            [*command, *extra], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            return "time limit"
        except KeyboardInterrupt:
            stop(process)
            raise
        if code == 0:
            return "finished"
        if code != RESTART and len(results.begun()) == begun:
            return f"exit status {code}"
    return f"started {MAX_RESTARTS} times"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children: by SIGINT, then SIGTERM, then SIGKILL."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def end_of(part: Part, ended: str, seconds: float, file: Path) -> Record:
    """The last record of a part."""
    records = [record for record in read_records(file) if record["part"] == part.name and record["case"]]
    statuses = {record["case"]: record["status"] for record in records if record["status"]}  # the last of each case
    counts = {status: list(statuses.values()).count(status) for status in ("ok", "failed", "skipped", "begun")}
    is_ok = ended == "finished" and not (counts["failed"] or counts["begun"])
    return {"status": "ok" if is_ok else "failed", "ended": ended, "seconds": round(seconds, 1), "cases": counts}


def run_stage(
    stage: int, parts: list[Part], file: Path, log: IO[str], extra: dict[str, list[str]], rehearse: bool
) -> bool:
    """Run the parts one after the other. Returns whether all of them are ok."""
    factor = REHEARSAL_FACTOR if rehearse else 1
    deadline = time.monotonic() + factor * STAGE_SECONDS[stage]
    all_ok = True
    for part in parts:
        results = Results(file, part.name)
        start = time.monotonic()
        print(f"== {part.name}", flush=True)
        ended = "interrupted"
        try:
            seconds = min(factor * part.seconds, deadline - start)
            ended = run_part(part, results, log, seconds, extra.get(part.name, []), rehearse)
        finally:
            end = end_of(part, ended, time.monotonic() - start, file)
            results.add(**end)
        all_ok = all_ok and end["status"] == "ok"
    return all_ok


# Results


def convert(file: Path, folder: Path) -> Path:
    """One file for benchmarks/results from the lines: the head, the parts, and their measurements."""
    first, *records = read_records(file)
    content = {key: value for key, value in first.items() if key not in KEYS_OF_ALL}
    content["parts"] = {
        record["part"]: {key: record[key] for key in ("status", "ended", "seconds", "cases")}
        for record in records
        if record["status"] and not record["case"]
    }
    content["failures"] = [
        {key: record[key] for key in ("part", "case", "reason")}
        for record in records
        if record["status"] == "failed" and record["case"]
    ]
    for record in records:
        if not record["status"]:
            measurement = {key: value for key, value in record.items() if key not in KEYS_OF_ALL}
            content.setdefault(record["part"], []).append(measurement)
    slug = re.sub(r"[^a-z0-9]+", "-", first["gpu"]["name"].lower()).strip("-")
    target = folder / f"{first['date'][:10]}-{slug}-gpu-check-stage-{first['stage']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    return target


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", type=int, choices=STAGES)
    what.add_argument("--convert", type=Path, metavar="FILE", help="make a file for benchmarks/results from FILE")
    parser.add_argument("--data", type=Path, help="training data; default: STAMP_KERNELS_DATA, else random")
    parser.add_argument("--output", type=Path, help="folder; default: build/gpu-check or benchmarks/results")
    parser.add_argument("--only", help="comma-separated parts; default: all")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small inputs")
    arguments = parser.parse_args()

    if arguments.convert is not None:
        print(summary_of(read_records(arguments.convert)))
        print(convert(arguments.convert, arguments.output or ROOT / "benchmarks" / "results"))
        return 0

    names = [part.name for part in STAGES[arguments.stage]]
    chosen = arguments.only.split(",") if arguments.only else names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--only: stage {arguments.stage} has {', '.join(names)}, but not {', '.join(unknown)}")
    parts = [part for part in STAGES[arguments.stage] if part.name in chosen]
    if arguments.rehearse:
        parts = [part for part in parts if part.name != WARM.name]
    flags = ["--rehearse"] if arguments.rehearse else []
    extra = {part.name: list(flags) for part in parts if part.name != WARM.name}
    data = arguments.data or (Path(os.environ["STAMP_KERNELS_DATA"]) if "STAMP_KERNELS_DATA" in os.environ else None)
    if data is not None and "training" in extra:
        extra["training"] += ["--data", str(data.resolve())]

    output = arguments.output or ROOT / "build" / "gpu-check"
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"stage-{arguments.stage}.jsonl"
    file.unlink(missing_ok=True)
    Results(file, "head").add(**head(arguments.stage, arguments.rehearse))
    signal.signal(signal.SIGTERM, interrupt)
    status = 130
    try:
        with open(output / f"stage-{arguments.stage}.log", "w") as log:
            status = int(not run_stage(arguments.stage, parts, file, log, extra, arguments.rehearse))
    except KeyboardInterrupt:
        print("interrupted")
    print(summary_of(read_records(file)), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
