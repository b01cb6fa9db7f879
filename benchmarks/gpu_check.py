"""Everything that wants a GPU, in one command for a machine without a network: `make gpu-check`.

Parts, each of which may fail without stopping the others:

    build          installs the wheel from dist/ into build/gpu-check/site, or builds it there first
    tests          the tests marked `gpu`, but for the cross-entropy's
    cross-entropy  those
    micro          benchmarks/micro, every op family's file
    train          `stamp-profile train`

Results are JSON files (and a log for each part) in one folder named by device and date; a summary comes last. Commit
the JSON files under benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-check" / "site"
# Seconds that each part may take. The tests compile several hundred specialisations of the Triton kernels: where a
# command may run for ten minutes, PARTS=build,tests is one, PARTS=cross-entropy another and PARTS=micro,train the last.
TIME_LIMITS = {"build": 70, "tests": 480, "cross-entropy": 480, "micro": 330, "train": 190}
TESTS = {"tests": "not cross_entropy", "cross-entropy": "cross_entropy"}


def device_name() -> str:
    """The device as a file name: "h100-80gb-hbm3", or "cpu" for a dry run."""
    query = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    name = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def commit() -> str | None:
    """The commit that is checked out, None where there is no git."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def build_commands() -> list[list[str]]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    dist = ROOT / "dist"
    commands = []
    if not list(dist.glob("stamp_kernels-*.whl")):
        commands.append([*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(dist), str(ROOT)])
    from_dist = ["--no-index", "--find-links", str(dist), "--no-deps", "--upgrade", "--target", str(SITE)]
    return [*commands, [*pip, "install", *from_dist, "stamp_kernels"]]


def commands_of(part: str, output: Path, device: str, data: Path | None) -> list[list[str]]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    if part == "build":
        return build_commands()
    if part in TESTS:
        return [[*pytest, "-m", "gpu", "-k", TESTS[part], f"--junitxml={output / part}.xml", str(ROOT / "tests")]]
    if part == "micro":
        results = f"--benchmark-json={output / 'micro.json'}"
        return [[*pytest, "--benchmark-only", results, str(ROOT / "benchmarks" / "micro")]]
    run = "import sys; sys.argv[0] = 'stamp-profile'; from stamp_kernels.profiling.cli import app; app()"
    options = ["--device", device, "--output", str(output / "train")]
    return [[sys.executable, "-c", run, "train", *options, *(["--data", str(data)] if data is not None else [])]]


def run_command(command: list[str], log: object, seconds: float) -> str:
    """Run it from a folder without the package's sources; "ok", or how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=SITE.parent, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too: a compiler, workers
        process.wait()
        return "out of time"
    return "ok" if code == 0 else f"exit status {code}"


def run_part(part: str, output: Path, device: str, data: Path | None) -> dict[str, object]:
    """Run one part, its output into a log; the record says how it ended and how long it took."""
    start = time.monotonic()
    status = "ok"
    with open(output / f"{part}.log", "w") as log:
        for command in commands_of(part, output, device, data):
            status = run_command(command, log, TIME_LIMITS[part] - (time.monotonic() - start))
            if status != "ok":
                break
    lines = (output / f"{part}.log").read_text().strip().splitlines()
    record = {"status": status, "seconds": round(time.monotonic() - start, 1), "last_line": lines[-1] if lines else ""}
    if part in TESTS and (output / f"{part}.xml").exists():
        suite = ElementTree.parse(output / f"{part}.xml").getroot().find("testsuite")
        record |= {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(TIME_LIMITS), help="comma-separated, default all")
    parser.add_argument("--data", type=Path, help="data file for the train part; default MovieLens-100K from recbole")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder for the results")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    unknown = sorted(set(parts) - set(TIME_LIMITS))
    if unknown:
        parser.error(f"--parts must be among {', '.join(TIME_LIMITS)}, got {', '.join(unknown)}")
    data = arguments.data.resolve() if arguments.data else None
    if data is not None and not data.exists():
        parser.error(f"--data: there is no file {data}")

    name = device_name()
    output = (arguments.output / f"{name}-{datetime.date.today():%Y-%m-%d}").resolve()
    output.mkdir(parents=True, exist_ok=True)
    SITE.mkdir(parents=True, exist_ok=True)
    summary_file = output / "summary.json"
    # Parts may be run one by one: what other parts left today stays.
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {"parts": {}}
    summary |= {"device": name, "commit": commit()}
    for part in parts:
        print(f"== {part}", flush=True)
        summary["parts"][part] = run_part(part, output, "cpu" if name == "cpu" else "cuda", data)
    summary_file.write_text(json.dumps(summary, indent=1) + "\n")

    print(f"\n{'part':<14}{'seconds':>8}  status  (logs and JSON in {output})")
    for part in parts:
        record = summary["parts"][part]
        print(f"{part:<14}{record['seconds']:>8}  {record['status']}: {record['last_line'][:100]}")
    return 0 if all(summary["parts"][part]["status"] == "ok" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
