"""The fuzzer itself: its cases pass, and what it is there to find is found. `make fuzz` runs many more cases."""

import itertools
import os
from pathlib import Path

import pytest
import torch

import stamp_kernels
from fuzz.calls import PRELUDE, Call
from fuzz.cases import BAD, KINDS, Settings, drawn, names, run
from fuzz.pool import run_all
from fuzz.report import Report

TESTS = Path(__file__).parent.parent
SETTINGS = Settings(seed=0, backends=("ops", "reference"))


def bad_outcomes(prefix: str, number: int) -> list[str]:
    chosen = itertools.islice(names([prefix]), number)
    outcomes = ((name, run(drawn(name, SETTINGS))) for name in chosen)
    return [f"{name}: {x.how}, {x.label}, {x.details}" for name, x in outcomes if x.how in BAD]


@pytest.mark.parametrize("subject", KINDS["valid"])
def test_valid_cases_match_their_oracles(subject):
    assert bad_outcomes(f"valid/{subject}/", 3) == []


@pytest.mark.parametrize("subject", KINDS["invalid"])
def test_invalid_calls_name_an_argument(subject):
    assert bad_outcomes(f"invalid/{subject}/", 6) == []


def test_raw_calls_do_not_crash(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    settings = Settings(seed=0, backends=("ops",))
    ended = run_all(itertools.islice(names(["raw"]), 36), settings, num_workers=1)
    assert [(name, outcome) for name, outcome in ended if outcome.how in BAD] == []


def test_case_is_the_same_every_time():
    first, second = (drawn("valid/packed_attention/3", SETTINGS).call for _ in range(2))
    assert first.snippet() == second.snippet()
    assert torch.equal(first.arguments["q"].nan_to_num(), second.arguments["q"].nan_to_num())


def test_wrong_result_is_reported(monkeypatch):
    right = stamp_kernels.token_importance
    monkeypatch.setattr(stamp_kernels, "token_importance", lambda *args, **options: right(*args, **options) * 1.0001)
    report = Report(SETTINGS)
    for name in itertools.islice(names(["valid/token_importance/"]), 10):
        report.add(name, run(drawn(name, SETTINGS)))
    assert report.failed
    assert "wrong: valid token_importance, ops" in report.faults()
    assert "--case valid/token_importance/" in report.faults()


def test_missing_check_is_reported(monkeypatch):
    monkeypatch.setattr(stamp_kernels, "shift_targets", lambda *args, **options: None)
    assert len(bad_outcomes("invalid/shift_targets/", 5)) == 5


CRASHING_WORKER = """
import os
import fuzz.worker

right = fuzz.worker.run


def run(case):
    if case.call.path.endswith("shift_targets"):
        os.abort()
    return right(case)


fuzz.worker.run = run
fuzz.worker.main()
"""


def test_crash_is_reported_and_survived(tmp_path, monkeypatch):
    (tmp_path / "crashing_worker.py").write_text(CRASHING_WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    cases = ["valid/gather_tokens/0", "valid/shift_targets/0", "valid/gather_tokens/1"]
    ended = dict(run_all(cases, Settings(0, ("ops",)), num_workers=1, worker="crashing_worker"))
    assert [ended[name].how for name in cases] == ["equal", "crashed", "equal"]
    assert ended["valid/shift_targets/0"].details.startswith("SIGABRT")


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no kind or subject starts with one of"):
        next(names(["value"]))


def test_snippets_run():
    x = torch.zeros(3, 8)[:, ::2]
    call = Call("stamp_kernels.token_importance", dict(hidden=x, centrality=torch.ones(3), norm="l2"))
    scope: dict[str, object] = {}
    exec(PRELUDE + "result = " + call.snippet(), scope)
    assert torch.is_tensor(scope["result"])
