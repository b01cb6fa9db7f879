"""The check for GPU machines, rehearsed on the CPU: every line except those that call CUDA."""

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
from typing import NamedTuple, NoReturn
from unittest.mock import create_autospec

import pytest
import torch
from gpu_scripts import SCRIPTS
from torch import Tensor

sys.path.append(str(SCRIPTS))
import alternatives
import check
import timings
from alternatives import Question, Variant
from cases import Case, SkipError, run_part
from correctness import WrongError, error_of
from correctness import check as check_workload
from device import Captured, CaptureError, Gpu, StandIn
from recordable import CHECKED_DTYPES, recordable
from records import Record, Results, read_records
from summary import summary_of
from workloads import CHECKED, TIMED, Workload

from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS

# What a rehearsal of each stage runs here. The environment is the same in both stages.
REHEARSED = {1: ("environment", "correctness", "sanitizer", "timings"), 2: ("training", "alternatives")}


def start_check(output: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPTS / "check.py"), *arguments, "--rehearse", "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# The rehearsal


class Rehearsal(NamedTuple):
    """A finished rehearsal of one stage."""

    output: str
    status: int
    file: Path


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Rehearsal]:
    """The rehearsal of each stage. Both stages run at the same time."""
    folder = tmp_path_factory.mktemp("check")
    runs = {
        stage: start_check(folder, "--stage", str(stage), "--only", ",".join(parts))
        for stage, parts in REHEARSED.items()
    }
    return {
        stage: Rehearsal(run.communicate(timeout=600)[0], run.returncode, folder / f"stage-{stage}.jsonl")
        for stage, run in runs.items()
    }


def measured(file: Path, part: str) -> list[Record]:
    return [record for record in read_records(file) if record["part"] == part and not record["status"]]


def test_rehearsals_cover_every_part():
    """Every part of the check except `warm`, which needs a bundle, runs in one of the two rehearsals."""
    parts = {part.name for stage in check.STAGES.values() for part in stage}
    assert {name for names in REHEARSED.values() for name in names} == parts - {"warm"}


@pytest.mark.parametrize("stage", check.STAGES)
def test_every_part_ends_ok_with_summary(rehearsals, stage):
    """The output ends with the summary and fits into the reply of a GPU machine."""
    output, status, file = rehearsals[stage]
    ends = {r["part"]: r["status"] for r in read_records(file) if r["status"] and not r["case"]}
    assert ends == dict.fromkeys(REHEARSED[stage], "ok"), output
    assert status == 0
    assert output.strip().endswith(summary_of(read_records(file)).rpartition("\n")[2])
    assert len(output) < 12_000


def test_checked_workloads_have_lines_in_every_dtype(rehearsals):
    """In fp16, which Triton's interpreter serves, workloads that become equal in a rehearsal run once."""
    output, _, file = rehearsals[1]
    lines = measured(file, "correctness")
    assert {line["dtype"] for line in lines} == {"bfloat16", "float16", "float32"}
    for workload in CHECKED:
        assert workload.name in output
        for dtype in ("bfloat16", "float32"):
            assert any(line["workload"] == workload.name and line["dtype"] == dtype for line in lines)


def test_timed_workloads_have_lines_in_each_direction(rehearsals):
    output, _, file = rehearsals[1]
    ours = [line for line in measured(file, "timings") if line.get("implementation") == "ours"]
    for workload in TIMED:
        assert workload.name in output
        lines = {line["direction"]: line for line in ours if line["workload"] == workload.name}
        assert set(lines) == {"forward", "both", "backward"}
        assert all(line["floor_us"] > 0 for line in lines.values())
        predicted = {direction: line["predicted_us"] for direction, line in lines.items() if line["predicted_us"]}
        assert predicted == timings.PREDICTIONS[workload.name]
    peers = {line["implementation"] for line in measured(file, "timings") if "implementation" in line}
    assert peers >= {"padded SDPA", "padded eager", "full logits", "index_select", "copy", "sort, index_select"}


def test_configurations_and_questions_have_lines(rehearsals):
    output, _, file = rehearsals[2]
    assert [line["configuration"] for line in measured(file, "training")] == list(CONFIGURATIONS)
    for question in alternatives.rehearsed_questions(StandIn()):
        lines = [line for line in measured(file, "alternatives") if line["question"] == question.name]
        assert [line["variant"] for line in lines] == [v.name for v in (*question.variants, question.variants[0])]
        assert question.name in output


@pytest.mark.parametrize("stage", check.STAGES)
def test_converted_results_have_every_measurement(rehearsals, tmp_path, stage):
    file = rehearsals[stage].file
    target = check.convert(file, tmp_path)
    content = json.loads(target.read_text())
    assert target.name == f"{content['date'][:10]}-cpu-gpu-check-stage-{stage}.json"
    assert content["schema"] == check.SCHEMA and content["versions"]["torch"] == importlib.metadata.version("torch")
    assert content["failures"] == []
    for part in content["parts"]:
        assert len(content[part]) == len(measured(file, part)) > 0


# Interruptions and failures


def test_interruption_keeps_measurements(tmp_path):
    """The results file and the summary have every measurement that came before the interrupt."""
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
    """Runs a part with this code and a limit of three seconds: (how it ended, its results, its seconds)."""
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
def test_part_restarts_after_fatal_case(tmp_path, monkeypatch, death):
    """A part whose process dies continues with the next case in a new process."""
    ended, results, _ = part_of(tmp_path, monkeypatch, BEGIN_CASES.format(death=death))
    assert ended == "finished"
    end = check.end_of(check.Part("made", (), 3), ended, 1.0, results.file)
    assert end["status"] == "failed"
    assert (end["cases"]["ok"], end["cases"]["begun"]) == (2, 1)


def test_part_without_cases_is_not_restarted(tmp_path, monkeypatch):
    """A part that dies before its first case would die again."""
    assert part_of(tmp_path, monkeypatch, "sys.exit(1)")[0] == "exit status 1"


def test_part_that_ignores_interrupts_is_killed(tmp_path, monkeypatch):
    code = "import signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)"
    ended, _, seconds = part_of(tmp_path, monkeypatch, code)
    assert ended == "time limit" and seconds < 10


def statuses_of(tmp_path: Path, cases: list[Case]) -> dict[str, str]:
    """Runs the cases in this process. Returns the last status of each."""
    arguments = argparse.Namespace(results=tmp_path / "results.jsonl", rehearse=True)
    assert run_part("made", arguments, lambda device: cases) == 0
    return {r["case"]: r["status"] for r in read_records(arguments.results) if r["status"]}


def test_failed_case_does_not_stop_others(tmp_path):
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
class Double(Workload):
    """Doubles its input, with a fault."""

    fault: str = ""

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        return {"x": torch.arange(1, 5, device=device).to(dtype) + seed}

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
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

    def work(self, element_size: int) -> NoReturn:
        raise NotImplementedError


def outcome(fault: str) -> str:
    """The message of the error that the check raises for this fault."""
    workload = Double("double", fault=fault)
    records = check_workload(StandIn(), workload, torch.bfloat16, nullcontext())
    next(records)
    with pytest.raises(WrongError) as error:
        next(records)
    return str(error.value)


def test_finds_wrong_output():
    assert outcome("wrong") == "out is off by 0.091"


def test_finds_unwritten_output():
    assert "out is off by inf" in outcome("unwritten")


def test_finds_nondeterministic_output():
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


# Alternatives


def failing() -> NoReturn:
    raise ValueError("this tile does not compile")


def test_question_times_first_variant_twice():
    """The second time of the first variant shows the noise."""
    variants = tuple(Variant(name, nullcontext) for name in ("one", "two", "three"))
    records = list(alternatives.time_question(StandIn(), Question("made", Double("double"), variants), rehearse=True))
    assert [record["variant"] for record in records] == ["one", "two", "three", "one"]
    assert all(record["forward_us"] > 0 and record["both_us"] > 0 for record in records)


def test_failed_variant_does_not_stop_others():
    variants = (Variant("good", nullcontext), Variant("bad", failing))
    records = alternatives.time_question(StandIn(), Question("made", Double("double"), variants), rehearse=True)
    assert [next(records)["variant"] for _ in range(2)] == ["good", "good"]
    with pytest.raises(RuntimeError, match="bad: ValueError: this tile does not compile"):
        next(records)


# What calls CUDA


class FakeEvent:
    """Each event comes a millisecond after the one before it."""

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
    """A fake torch.cuda with the same functions, which needs no device."""
    fake = create_autospec(torch.cuda)
    fake.Event = FakeEvent
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_capture_warms_up_after_current_stream(cuda):
    """The step runs once on the side stream, after the current stream has written the inputs."""
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


def test_failed_capture_names_cause_and_restores_stream(cuda):
    """The error of the step is reported, not the later one that the end of the capture raises."""

    def end(*args):
        raise RuntimeError("the capture has failed")

    cuda.graph.return_value.__exit__.side_effect = end
    calls = []

    def step():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("copies from the CPU")

    with pytest.raises(CaptureError, match="ValueError: copies from the CPU"):
        Gpu().capture(step)
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)


def test_replay_times_are_between_consecutive_events(cuda):
    replays = []
    times = Gpu().replay_times(Captured(lambda: replays.append(None), None), seconds=0.02)
    assert times == [1000.0] * 20  # as many replays of a millisecond as fit
    assert len(replays) == 23  # two more for the estimate, and one that keeps the device busy
    assert Gpu().replay_times(Captured(lambda: None, None), seconds=0) == [1000.0] * 5


def test_broken_gpu_is_not_healthy(cuda):
    cuda.synchronize.side_effect = RuntimeError("illegal memory access")
    gpu = Gpu()
    assert not gpu.is_healthy()
    cuda.empty_cache.side_effect = RuntimeError("illegal memory access")
    assert gpu.free_memory() == 0


# Names that the scripts share


def test_predictions_name_timed_workloads():
    names = {workload.name for workload in TIMED}
    assert timings.PREDICTIONS.keys() == names and set(timings.FIRST) <= names
    for directions in timings.PREDICTIONS.values():
        assert "forward" in directions and directions.keys() <= {"forward", "backward", "both"}


def test_recordable_lists_everything_once():
    names = [name for name, _ in recordable()]
    assert len(names) == len(set(names))
    variants = sum(len(question.variants) for question in alternatives.QUESTIONS)
    assert len(names) == len(TIMED) + len(CHECKED) * len(CHECKED_DTYPES) + variants


def test_variants_replace_existing_names():
    """Every name that a variant replaces exists. A variant that nothing calls raises."""
    for question in alternatives.QUESTIONS:
        for variant in question.variants:
            try:
                with variant.applied():
                    pass
            except RuntimeError as error:
                assert "nothing called" in str(error)
