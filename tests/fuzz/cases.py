"""The names of cases, and how one case is run."""

import dataclasses
import itertools
import os
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from fuzz import invalid, raw, valid
from fuzz.calls import Call
from fuzz.draw import BACKENDS, Draw
from fuzz.judge import mistakes
from stamp_kernels import use_backend

KINDS: dict[str, tuple[str, ...]] = {
    "valid": tuple(valid.SUBJECTS),
    "invalid": invalid.SUBJECTS,
    "raw": tuple(raw.SUBJECTS),
}
_TURNS = ("valid", "valid", "invalid", "valid", "raw")  # of five cases
# The shares of the backends. Triton's interpreter takes ten times as long.
_SHARES = {"ops": 0.75, "reference": 0.2, "triton": 0.05}
_IMPOSSIBLE = {("triton", subject) for subject in valid.NOT_ON_TRITON}

GOOD = ("equal", "raised", "accepted")
# wrong: another result. refused: an error for a valid call. unclear: an error of the wrong type, or that names no
# argument. silent: a result for an invalid call.
BAD = ("wrong", "refused", "unclear", "silent", "crashed", "hung")


class Settings(NamedTuple):
    seed: int = 0
    backends: tuple[str, ...] = BACKENDS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        how: one of GOOD or BAD.
        label: what is special in the case; failures of one kind, subject, label and end are reported as one.
        details: what is wrong.
    """

    how: str
    label: str = ""
    details: str = ""


def names(only: Sequence[str] = ()) -> Iterator[str]:
    """The names of all cases, `kind/subject/number`, without end; with `only`, those that start with one of these."""
    numbers = {kind: itertools.count() for kind in KINDS}
    subjects = {
        kind: [x for x in of_kind if not only or any(f"{kind}/{x}/".startswith(prefix) for prefix in only)]
        for kind, of_kind in KINDS.items()
    }
    if not any(subjects.values()):
        raise ValueError(f"no kind or subject starts with one of {list(only)}: there are {KINDS}")
    for kind in itertools.cycle(_TURNS):
        if subjects[kind]:
            number, i = divmod(next(numbers[kind]), len(subjects[kind]))
            yield f"{kind}/{subjects[kind][i]}/{number}"


def _backend(name: str, settings: Settings) -> str:
    kind, subject, _ = name.split("/")
    # Raw calls do not reach the reference where there is a compiled kernel; errors are those of the public functions.
    possible = {"valid": BACKENDS, "invalid": ("ops",), "raw": ("ops", "triton")}[kind]
    allowed = [x for x in settings.backends if x in possible and (x, subject) not in _IMPOSSIBLE]
    return random.Random(f"{settings.seed}/{name}/backend").choices(allowed, [_SHARES[x] for x in allowed])[0]


def _served_by(backend: str) -> AbstractContextManager[object]:
    if backend == "triton":
        from stamp_kernels.ops._served_by_triton import ServedByTriton

        return ServedByTriton()
    return use_backend("reference" if backend == "reference" else "auto")


class Runnable(NamedTuple):
    """A case that was drawn and has not run."""

    label: str
    backend: str
    call: Call
    run: Callable[[], Outcome]


def drawn(name: str, settings: Settings) -> Runnable:
    kind, subject, _ = name.split("/")
    backend = _backend(name, settings)
    draw = Draw(f"{settings.seed}/{name}", backend)
    if kind == "valid":
        case = valid.SUBJECTS[subject](draw)

        def run_valid() -> Outcome:
            try:
                found = mistakes(case)
            except Exception as error:
                return Outcome("refused", backend, _described(error))
            return Outcome("wrong" if found else "equal", backend, "; ".join(found))

        return Runnable(backend, backend, case.call, run_valid)
    if kind == "invalid":
        spoiled = invalid.InvalidCase(subject, draw)

        def run_invalid() -> Outcome:
            try:
                spoiled.call.make()
            except Exception as error:
                complaint = spoiled.complaint(error)
                return Outcome("unclear" if complaint else "raised", spoiled.label, complaint or "")
            return Outcome("silent", spoiled.label, "no error")

        return Runnable(spoiled.label, backend, spoiled.call, run_invalid)
    mutated = raw.RawCase(subject, draw)
    label = f"{backend}, {mutated.label}"

    def run_raw() -> Outcome:
        try:
            with torch.no_grad():
                mutated.call.make()
        except Exception:
            return Outcome("raised", label)
        return Outcome("silent", label, "no error") if mutated.must_raise else Outcome("accepted", label)

    return Runnable(label, backend, mutated.call, run_raw)


def run(case: Runnable) -> Outcome:
    with _served_by(case.backend):
        return case.run()


def _described(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"


def reproduce_command(name: str, settings: Settings) -> str:
    backends = "" if settings.backends == BACKENDS else f" --backends {','.join(settings.backends)}"
    return f"PYTHONPATH=tests python -m fuzz --seed {settings.seed}{backends} --case {name}"
