"""The check for GPU machines, rehearsed on the CPU: every line but those that ask CUDA itself."""

import argparse
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from gpu_scripts import SCRIPTS

sys.path.append(str(SCRIPTS))
import alternatives
import check
import timings
from cases import Case, SkipError, run_part
from correctness import WrongError, error_of
from correctness import check as check_workload
from device import Captured, CaptureError, Gpu, StandIn
from recordable import CHECKED_DTYPES, recordable
from records import Results, read_records
from summary import summary_of
from workloads import CHECKED, TIMED, Workload

from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS

CPU = torch.device("cpu")


def start_check(output: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPTS / "check.py"), *arguments, "--rehearse", "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# The rehearsal


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory):
    """By stage: exit status, output and results file. Both stages at once, as there are two cores."""
    folder = tmp_path_factory.mktemp("check")
    runs = {stage: start_check(folder, "--stage", str(stage)) for stage in check.STAGES}
    return {
        stage: (run.communicate(timeout=600)[0], run.returncode, folder / f"stage-{stage}.jsonl")
        for stage, run in runs.items()
    }


def measured(file: Path, part: str) -> list[dict]:
    return [record for record in read_records(file) if record["part"] == part and not record["status"]]


@pytest.mark.parametrize("stage", check.STAGES)
def test_every_part_is_ok_and_ends_in_the_summary(rehearsals, stage):
    output, status, file = rehearsals[stage]
    parts = [part.name for part in check.STAGES[stage] if part.name != "warm"]
    ends = {r["part"]: r["status"] for r in read_records(file) if r["status"] and not r["case"]}
    assert ends == dict.fromkeys(parts, "ok"), output
    assert status == 0
    assert output.strip().endswith(summary_of(read_records(file)).rpartition("\n")[2])
    assert len(output) < 12_000  # what the reply of a GPU machine carries


def test_every_checked_workload_has_a_line_in_every_dtype(rehearsals):
    """In fp16, which Triton's interpreter serves, those that differ when they are small."""
    output, _, file = rehearsals[1]
    lines = measured(file, "correctness")
    assert {line["dtype"] for line in lines} == {"bfloat16", "float16", "float32"}
    for workload in CHECKED:
        assert workload.name in output
        for dtype in ("bfloat16", "float32"):
            assert any(line["workload"] == workload.name and line["dtype"] == dtype for line in lines)


def test_every_timed_workload_has_its_lines(rehearsals):
    output, _, file = rehearsals[1]
    ours = [line for line in measured(file, "timings") if line.get("implementation") == "ours"]
    for workload in TIMED:
        assert workload.name in output
        lines = {line["direction"]: line for line in ours if line["workload"] == workload.name}
        assert set(lines) == {"forward", "both", "backward"}
        assert all(line["floor_us"] > 0 for line in lines.values())
    peers = {line["implementation"] for line in measured(file, "timings") if "implementation" in line}
    assert peers >= {"padded SDPA", "padded eager", "full logits", "index_select", "copy", "sort, index_select"}


def test_every_configuration_and_question_has_lines(rehearsals):
    output, _, file = rehearsals[2]
    assert [line["configuration"] for line in measured(file, "training")] == list(CONFIGURATIONS)
    for question in alternatives.rehearsed_questions(StandIn()):
        lines = [line for line in measured(file, "alternatives") if line["question"] == question.name]
        assert [line["variant"] for line in lines] == [v.name for v in (*question.variants, question.variants[0])]
        assert question.name in output


@pytest.mark.parametrize("stage", check.STAGES)
def test_results_convert(rehearsals, tmp_path, stage):
    file = rehearsals[stage][2]
    target = check.convert(file, tmp_path)
    content = json.loads(target.read_text())
    assert target.name == f"{content['date'][:10]}-cpu-gpu-check-stage-{stage}.json"
    assert content["schema"] == check.SCHEMA and content["versions"]["torch"] == importlib.metadata.version("torch")
    assert content["failures"] == []
    for part in content["parts"]:
        assert len(content[part]) == len(measured(file, part)) > 0


# What goes wrong


def test_interruption_keeps_what_was_measured(tmp_path):
    run = start_check(tmp_path, "--stage", "1", "--only", "correctness")
    file = tmp_path / "stage-1.jsonl"
    deadline = time.monotonic() + 120
    while len(measured(file, "correctness")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted" in output
    lines = measured(file, "correctness")
    assert len(lines) >= 3
    assert all(line["workload"] in output for line in lines)
    (end,) = (r for r in read_records(file) if r["part"] == "correctness" and not r["case"])
    assert (end["status"], end["ended"]) == ("failed", "interrupted")


def part_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[str, Results, float]:
    """How a part with this code ends that may take three seconds, its results, and how long it took."""
    script = tmp_path / "part.py"
    script.write_text(f"import sys\nsys.path.append({str(SCRIPTS)!r})\n{code}")
    monkeypatch.setattr(check, "GRACE_SECONDS", 0.5)
    results = Results(tmp_path / "results.jsonl", "made")
    start = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        ended = check.run_part(check.Part("made", (str(script),), 3), results, log, 3, [], rehearse=True)
    return ended, results, time.monotonic() - start


BEGIN_CASES = """
import os, pathlib, signal
from records import Results
results = Results(pathlib.Path(sys.argv[2]), "made")
for case in ("first", "second", "third"):
    if case not in results.begun():
        results.add(case=case, status="begun")
        if case == "second":
            {death}
        results.add(case=case, status="ok")
"""


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGSEGV)", f"os._exit({check.RESTART})"])
def test_a_part_goes_on_behind_the_case_that_killed_it(tmp_path, monkeypatch, death):
    ended, results, _ = part_of(tmp_path, monkeypatch, BEGIN_CASES.format(death=death))
    assert ended == "finished"
    end = check.end_of(check.Part("made", (), 3), ended, 1.0, results.file)
    assert end["status"] == "failed"
    assert (end["cases"]["ok"], end["cases"]["begun"]) == (2, 1)


def test_a_part_that_dies_before_its_cases_is_not_repeated(tmp_path, monkeypatch):
    assert part_of(tmp_path, monkeypatch, "sys.exit(1)")[0] == "exit status 1"


def test_a_part_that_ignores_interrupts_ends_all_the_same(tmp_path, monkeypatch):
    code = "import signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)"
    ended, _, seconds = part_of(tmp_path, monkeypatch, code)
    assert ended == "time limit" and seconds < 10


def statuses_of(tmp_path: Path, cases: list[Case]) -> dict[str, str]:
    """By case, after a run through them in this process."""
    arguments = argparse.Namespace(results=tmp_path / "results.jsonl", rehearse=True)
    assert run_part("made", arguments, lambda device: cases) == 0
    return {r["case"]: r["status"] for r in read_records(arguments.results) if r["status"]}


def test_a_case_that_fails_does_not_stop_the_others(tmp_path):
    def good():
        yield {"us": 1.0}

    def bad():
        yield {"us": 2.0}
        raise ValueError("no such kernel")

    def absent():
        raise SkipError("no such peer")
        yield

    cases = [Case("bad", bad), Case("absent", absent), Case("good", good)]
    assert statuses_of(tmp_path, cases) == {"bad": "failed", "absent": "skipped", "good": "ok"}
    records = read_records(tmp_path / "results.jsonl")
    assert [r["us"] for r in records if "us" in r] == [2.0, 1.0]
    assert "ValueError: no such kernel" in [r.get("reason") for r in records]


# What correctness finds


@dataclass(frozen=True)
class Made(Workload):
    """Doubles its input, but for the fault."""

    fault: str = ""

    def inputs(self, device, dtype, seed=0):
        return {"x": torch.arange(1, 5, device=device).to(dtype) + seed}

    def forward(self, x):
        out = 2 * x["x"]
        if x["x"].dtype == torch.float64:  # the reference
            return {"out": out}
        if self.fault == "unwritten":
            out = torch.empty_like(out)
        elif self.fault == "random":
            out = out + torch.rand(4)
        elif self.fault == "wrong":
            out[0] += 1
        return {"out": out}

    def work(self, element_size):
        raise NotImplementedError


def outcome(fault: str) -> str:
    workload = Made("made", fault=fault)
    records = check_workload(StandIn(), workload, torch.bfloat16, nullcontext())
    next(records)
    with pytest.raises(WrongError) as error:
        next(records)
    return str(error.value)


def test_a_wrong_output_is_found():
    assert outcome("wrong") == "out is off by 0.091"


def test_an_unwritten_output_is_found():
    assert "out is off by inf" in outcome("unwritten")


def test_an_output_that_differs_from_run_to_run_is_found():
    assert "out differs in a second run; out differs in a graph" in outcome("random")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("out", "ref", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([NAN], [NAN], INF),
        ([-INF, 1.0], [-INF, 1.0], 0.0),
        ([0.0, 1.0], [-INF, 1.0], INF),
        ([INF, 1.0], [2.0, 1.0], INF),
        ([1, 2], [1, 2], 0.0),
        ([1, 3], [1, 2], INF),
        ([1.0], [1.0, 1.0], INF),
        ([1.0], [0.0], INF),
    ],
    ids=str,
)
def test_error_of(out, ref, expected):
    assert error_of(torch.tensor(out), torch.tensor(ref)) == pytest.approx(expected)


# What asks CUDA


class FakeEvent:
    """Each comes a millisecond after the one before it."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.count += 1
        self.milliseconds = FakeEvent.count

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.milliseconds - self.milliseconds


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for torch.cuda in device.py, without a device; what does not exist there does not exist in it."""
    fake = create_autospec(torch.cuda)
    fake.Event = FakeEvent
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_capture_warms_up_behind_the_current_stream(cuda):
    steps = []
    cuda.graph.return_value.__enter__.side_effect = lambda: steps.append("capture")
    captured = Gpu().capture(lambda: steps.append("step") or "outputs")
    assert steps == ["step", "capture", "step"] and captured.outputs == "outputs"
    side, current = cuda.Stream.return_value, cuda.current_stream.return_value
    side.wait_stream.assert_called_once_with(current)
    current.wait_stream.assert_called_once_with(side)
    cuda.stream.assert_called_once_with(side)
    assert cuda.graph.call_args.kwargs == {"stream": side}
    captured.replay()
    cuda.CUDAGraph.return_value.replay.assert_called_once_with()


def test_a_capture_that_fails_says_why_and_leaves_the_stream(cuda):
    def end(*args):
        raise RuntimeError("the capture has failed")

    cuda.graph.return_value.__exit__.side_effect = end
    calls = []

    def step():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("copies from the host")

    with pytest.raises(CaptureError, match="ValueError: copies from the host"):
        Gpu().capture(step)
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)


def test_times_of_replays_are_between_events_in_a_row(cuda):
    replays = []
    times = Gpu().replay_times(Captured(lambda: replays.append(None), None), seconds=0.02)
    assert times == [1000.0] * 20  # as many as fit, a millisecond each
    assert len(replays) == 23  # and two before, and one so that the device is busy
    assert Gpu().replay_times(Captured(lambda: None, None), seconds=0) == [1000.0] * 5


def test_a_broken_gpu_is_seen(cuda):
    cuda.synchronize.side_effect = RuntimeError("illegal memory access")
    gpu = Gpu()
    assert not gpu.is_healthy()
    cuda.empty_cache.side_effect = RuntimeError("illegal memory access")
    assert gpu.free_memory() == 0


# What the other scripts rely on


def test_predictions_are_of_timed_workloads():
    names = {workload.name for workload in TIMED}
    assert timings.PREDICTIONS.keys() <= names and set(timings.FIRST) <= names
    for directions in timings.PREDICTIONS.values():
        assert directions.keys() <= {"forward", "backward", "both"}


def test_recordable_has_everything_once():
    names = [name for name, _ in recordable()]
    assert len(names) == len(set(names))
    variants = sum(len(question.variants) for question in alternatives.QUESTIONS)
    assert len(names) == len(TIMED) + len(CHECKED) * len(CHECKED_DTYPES) + variants


def test_variants_change_what_there_is():
    """Every name that a variant replaces exists; one that nobody asks is an error."""
    for question in alternatives.QUESTIONS:
        for variant in question.variants:
            try:
                with variant.applied():
                    pass
            except RuntimeError as error:
                assert "nothing called" in str(error)
