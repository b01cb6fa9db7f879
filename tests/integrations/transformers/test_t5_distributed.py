"""A stamped T5 trains on two ranks (gloo, on the CPU) as on one, and so does the example."""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from closeness import relative_error
from t5_cases import HAS_KWARGS

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from t5_distributed_worker import (
    SAMPLER_BUDGET,
    SAMPLER_LENGTHS,
    SCENARIOS,
    Scenario,
    Trajectory,
    global_batch,
    make_optimizer,
)

from stamp_kernels.data import TokenBudgetBatchSampler

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[2] / "examples" / "train_t5.py"
LAUNCH_TIMEOUT = 240  # seconds; a launch takes a tenth
MAX_ITEMS, BUDGET = 5, 120  # of the example: items in a history, tokens in a batch of each rank


class Step(NamedTuple):
    """What the example logs after a step."""

    number: int
    epoch: int
    loss: float
    norm: float


def torchrun(script: Path, *arguments: object) -> tuple[int, str]:
    """Run a script on two ranks: (return code, output). A script that hangs is ended together with its ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    search_path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which orphaned ranks would keep open
        process = subprocess.Popen(
            [str(word) for word in (*command, *arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(LAUNCH_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks; a kill would orphan them
            process.wait(60)
            output.write(f"\nended after {LAUNCH_TIMEOUT} seconds")
        output.seek(0)
        return process.returncode, output.read()


def errors_in(output: str) -> str:
    """The last output of the ranks, without the long report of torchrun behind it."""
    of_ranks = [line for line in output.splitlines() if line.startswith("[rank")]
    return "\n".join(of_ranks[-40:]) or output[-5000:]


@pytest.fixture(scope="module")
def result_of_ranks(tmp_path_factory) -> Callable[[str], object]:
    """What rank 0 wrote, by the name of the scenario. One launch runs all, because imports take most of its time."""
    directory = tmp_path_factory.mktemp("ranks")
    _, output = torchrun(HERE / "t5_distributed_worker.py", directory, "sampler", *SCENARIOS, "bfloat16")

    def read(name: str) -> object:
        path = directory / f"{name}.pt"
        if not path.exists():
            pytest.fail(f"the ranks did not get as far as {name}:\n{errors_in(output)}")
        return torch.load(path)

    return read


@cache
def on_one_process(scenario: Scenario) -> Trajectory:
    """The same steps in a loop without ranks, counts, micro-batches and recomputation."""
    model = scenario.build_model()
    optimizer = make_optimizer(model)
    trajectory = Trajectory()
    for step, rows in enumerate(scenario.steps()):
        loss = model(**global_batch(rows), training_step=step).loss
        loss.backward()
        trajectory.losses.append(loss.detach())
        trajectory.gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    trajectory.parameters = {name: p.detach() for name, p in model.named_parameters()}
    return trajectory


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_like_one(result_of_ranks, name):
    scenario = SCENARIOS[name]
    got = Trajectory(**result_of_ranks(name))
    expected = on_one_process(replace(scenario, parallel="none", checkpointing=False))
    assert len(got.losses) == len(scenario.steps())
    for step, (loss, expected_loss) in enumerate(zip(got.losses, expected.losses, strict=True)):
        assert relative_error(loss, expected_loss) < 1e-9, step
    for step, (gradients, expected_gradients) in enumerate(zip(got.gradients, expected.gradients, strict=True)):
        assert gradients.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            assert relative_error(gradients[parameter], gradient) < 1e-9, (step, parameter)
    assert got.parameters.keys() == expected.parameters.keys()
    for parameter, value in expected.parameters.items():
        assert relative_error(got.parameters[parameter], value) < 1e-9, parameter


def test_fsdp2_mixed_precision(result_of_ranks):
    losses, expected = result_of_ranks("bfloat16"), on_one_process(Scenario("none")).losses
    assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(losses, expected, strict=True))


def test_sampler_on_real_ranks(result_of_ranks):
    plans = result_of_ranks("sampler")
    for name in ("epoch 0", "epoch 1"):
        ranks = plans[name]
        assert sorted(itertools.chain(*ranks[0], *ranks[1])) == list(range(len(SAMPLER_LENGTHS)))
        for step in zip(*ranks, strict=True):
            tokens = [sum(SAMPLER_LENGTHS[index] for index in batch) for batch in step]
            assert max(tokens) <= SAMPLER_BUDGET
    assert plans["epoch 0"] != plans["epoch 1"]
    assert plans["epoch 1 from batch 3"] == [batches[3:] for batches in plans["epoch 1"]]


# The example


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_t5", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(example, tmp_path_factory) -> Path:
    """Histories from which two ranks, and one rank with twice their budget, make the same 5 batches in both epochs."""
    rng = np.random.default_rng(4)
    histories = [rng.integers(0, 40, rng.integers(3, 15)) for _ in range(16)]
    path = tmp_path_factory.mktemp("data") / "made.npz"
    np.savez(
        path,
        seq_items=np.concatenate(histories),
        seq_offsets=np.cumsum([0, *map(len, histories)]),
        sids=np.array(list(itertools.product(range(5), range(4), range(2)))),
    )
    lengths = example.NextItems(path, MAX_ITEMS).lengths
    samplers = [TokenBudgetBatchSampler(lengths, 2 * BUDGET)]
    samplers += [TokenBudgetBatchSampler(lengths, BUDGET, num_replicas=2, rank=rank) for rank in (0, 1)]
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for alone, *ranks in zip(*samplers, strict=True):
            assert sorted(alone) == sorted(itertools.chain(*ranks))
        assert len(samplers[0]) == 5
        assert [] in ranks  # The last batch has no sequence for one rank.
    return path


@pytest.fixture
def run_alone(example, capsys) -> Callable[..., list[Step]]:
    def run(*arguments: object, **settings: object) -> list[Step]:
        capsys.readouterr()
        example.main(options(*arguments, **settings))
        return steps_in(capsys.readouterr().out)

    return run


def options(*arguments: object, **settings: object) -> list[str]:
    """Command-line arguments for two epochs of 3 steps with 2, 2 and 1 batches. Every step is logged."""
    settings = dict(max_items=MAX_ITEMS, epochs=2, accumulate=2, log_every=1, workers=0) | settings
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()] + [*map(str, arguments)]


def steps_in(output: str) -> list[Step]:
    return [
        Step(int(step), int(epoch), float(loss), float(norm))
        for step, epoch, loss, norm in re.findall(r"step (\d+) epoch (\d+) loss (\S+) gradient norm (\S+)", output)
    ]


def assert_same_steps(got: list[Step], expected: list[Step]) -> None:
    """Up to the order of summation in float32. AdamW hides the scale of gradients, so the norm is compared too."""
    assert [step[:2] for step in got] == [step[:2] for step in expected]
    for one, other in zip(got, expected, strict=True):
        assert math.isclose(one.loss, other.loss, rel_tol=1e-4), (got, expected)
        assert math.isclose(one.norm, other.norm, rel_tol=1e-3), (got, expected)


def test_example_resumes_from_its_checkpoint(run_alone, data, tmp_path):
    checkpoint = tmp_path / "run.pt"
    settings = dict(data=data, max_tokens=2 * BUDGET, dropout=0.1)
    uninterrupted = run_alone(**settings)
    assert [(step.number, step.epoch) for step in uninterrupted] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    settings["checkpoint"] = checkpoint
    assert run_alone(**settings, steps=2) == uninterrupted[:2]  # within an epoch
    assert run_alone(**settings, steps=3) == uninterrupted[2:3]  # at its end
    assert run_alone(**settings, save_every=2) == uninterrupted[3:]
    assert run_alone(**settings) == run_alone(**settings, steps=2) == []
    assert os.listdir(tmp_path) == [checkpoint.name]


def test_example_on_two_ranks(run_alone, data, tmp_path):
    """DDP on two ranks, then FSDP2, then one process. Each starts from the checkpoint of the previous run."""
    settings = dict(data=data, dropout=0.0)
    expected = run_alone(**settings, max_tokens=2 * BUDGET)
    settings["checkpoint"] = tmp_path / "run.pt"
    got, runs = [], {"ddp": 2, "fsdp2": 4}
    if not HAS_KWARGS:
        # Before 5.0 T5's stacks have the model's own embedding module, under three names. torch does not load it into
        # FSDP2 from whole tensors, with the base model neither.
        del runs["fsdp2"]
    for parallel, steps in runs.items():
        arguments = options(**settings, max_tokens=BUDGET, parallel=parallel, steps=steps, workers=1)
        return_code, output = torchrun(EXAMPLE, *arguments)
        assert return_code == 0, errors_in(output)
        got += steps_in(output)
    got += run_alone(**settings, max_tokens=2 * BUDGET)
    assert_same_steps(got, expected)


def test_example_accumulates(run_alone, data):
    """All histories have one item, so that two batches are the same as one with twice the budget."""
    settings = dict(data=data, dropout=0.0, max_items=1)
    expected = run_alone(**settings, max_tokens=2 * BUDGET, accumulate=1)
    got = run_alone(**settings, max_tokens=BUDGET, accumulate=2)
    assert len(got) > 2
    assert_same_steps(got, expected)


def test_example_in_bfloat16(run_alone, data):
    settings = dict(data=data, max_tokens=2 * BUDGET, dropout=0.0, steps=2)
    expected, got = run_alone(**settings), run_alone("--bf16", **settings)
    assert got != expected
    assert all(math.isclose(one.loss, other.loss, rel_tol=0.02) for one, other in zip(got, expected, strict=True))
