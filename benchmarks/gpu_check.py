"""Everything that wants a GPU, in one command for a machine without a network: `make gpu-check`.

Parts, each of which may fail without stopping the others:

    build   installs the wheel from dist/ into build/gpu-check/site, or builds it there first
    tests   the tests marked `gpu`
    micro   benchmarks/micro, every op family's file
    train   `stamp-profile train --device cuda`

All results are JSON files (and logs) in one folder named by device and date; a summary comes last. Commit the JSON
files under benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-check" / "site"
PARTS = ("build", "tests", "micro", "train")
# Seconds a part may take; together under nine minutes.
TIME_LIMITS = {"build": 120, "tests": 150, "micro": 120, "train": 140}


def device_name() -> str:
    """The device as a file name: "h100-80gb-hbm3", or "cpu" for a dry run."""
    query = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    name = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def environment() -> dict[str, str]:
    """Programs see the installed package, never the source tree beside them."""
    return {**os.environ, "PYTHONPATH": str(SITE), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def build_commands() -> list[list[str]]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    dist = ROOT / "dist"
    commands = []
    if not list(dist.glob("stamp_kernels-*.whl")):
        commands.append([*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(dist), str(ROOT)])
    find_wheel = ["--no-index", "--find-links", str(dist), "--no-deps", "--upgrade", "--target", str(SITE)]
    return [*commands, [*pip, "install", *find_wheel, "stamp_kernels"]]


def commands_of(part: str, output: Path, data: Path | None) -> list[list[str]]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if part == "build":
        return build_commands()
    if part == "tests":
        return [[*pytest, "-m", "gpu", f"--junitxml={output / 'tests.xml'}", "tests"]]
    if part == "micro":
        return [[*pytest, "--benchmark-only", f"--benchmark-json={output / 'micro.json'}", "benchmarks/micro"]]
    train = ["from stamp_kernels.profiling.cli import app; app()", "train", "--output", str(output / "train")]
    if data is not None:
        train += ["--data", str(data)]
    return [[sys.executable, "-c", *train]]


def run_part(part: str, output: Path, data: Path | None) -> dict[str, object]:
    """Run one part, its output into a log; the record says how it ended and how long it took."""
    start = time.monotonic()
    status = "ok"
    with open(output / f"{part}.log", "w") as log:
        for command in commands_of(part, output, data):
            left = TIME_LIMITS[part] - (time.monotonic() - start)
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, timeout=left
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"stopped after its {TIME_LIMITS[part]} s"
                break
            if code != 0:
                status = f"exit status {code}"
                break
    lines = (output / f"{part}.log").read_text().strip().splitlines()
    return {
        "part": part,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "last_line": lines[-1] if lines else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, default all")
    parser.add_argument("--data", type=Path, help="data file for the train part; default MovieLens-100K from recbole")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder for the results")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    data = arguments.data.resolve() if arguments.data else None
    if data is not None and not data.exists():
        parser.error(f"--data: there is no file {data}")

    output = (arguments.output / f"{device_name()}-{datetime.date.today():%Y-%m-%d}").resolve()
    output.mkdir(parents=True, exist_ok=True)
    records = []
    for part in parts:
        print(f"== {part}", flush=True)
        records.append(run_part(part, output, data))
    (output / "summary.json").write_text(json.dumps(records, indent=1) + "\n")

    print(f"\n{'part':<8}{'seconds':>8}  status  (logs and JSON in {output})")
    for record in records:
        print(f"{record['part']:<8}{record['seconds']:>8}  {record['status']}: {record['last_line'][:100]}")
    return 0 if all(record["status"] == "ok" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
