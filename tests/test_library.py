"""The package as a whole: what its import loads, and the choice of the backend."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from closeness import assert_close
from ragged import BATCHES

from stamp_kernels._backend import reference_is_forced, use_backend
from stamp_kernels.ops._library import _with_groups
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.importance import token_importance
from stamp_kernels.ops.pruning.selection import select_tokens


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_import_is_light():
    heavy = ("triton", "transformers", "torchrec", "matplotlib")
    code = (
        "import sys, stamp_kernels, stamp_kernels.modules, stamp_kernels.packed\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_leaves_cuda_alone():
    """CUDA is not initialised, whatever the build of torch."""
    code = (
        "import pathlib, torch, stamp_kernels\n"
        "print([pathlib.Path(path).name for path in torch.ops.loaded_libraries], torch.cuda.is_initialized())"
    )
    result = run_python(code)
    assert result.stdout.strip() == "['_cpu.so'] False", result.stderr


def test_environment_variable_sets_the_backend():
    code = "from stamp_kernels._backend import reference_is_forced; print(reference_is_forced())"
    result = run_python(code, STAMP_KERNELS_BACKEND="reference")
    assert result.stdout.strip() == "True", result.stderr


def test_environment_variable_is_checked():
    result = run_python("import stamp_kernels._backend", STAMP_KERNELS_BACKEND="cuda")
    assert (
        "ValueError: the environment variable STAMP_KERNELS_BACKEND must be one of ('auto', 'reference'), got 'cuda'"
        in result.stderr
    )


def test_use_backend_holds_only_inside_the_block():
    before = reference_is_forced()
    with use_backend("reference"):
        assert reference_is_forced()
        with use_backend("auto"):
            assert not reference_is_forced()
        assert reference_is_forced()
    assert reference_is_forced() == before
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert reference_is_forced() == before


def test_use_backend_names_what_is_allowed():
    with (
        pytest.raises(ValueError, match=r"use_backend: name must be one of \('auto', 'reference'\), got 'triton'"),
        use_backend("triton"),
    ):
        pass


def test_blocks_that_overlap_leave_no_backend_behind():
    """As two threads would open and close them, in every order."""
    before = reference_is_forced()
    first, second = use_backend("reference"), use_backend("reference")
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="several threads or tasks must not overlap"):
        first.__exit__(None, None, None)
    assert reference_is_forced()
    second.__exit__(None, None, None)
    assert reference_is_forced() == before


def score_and_prune(hidden, centrality, cu_seqlens, max_seqlen):
    importance = token_importance(hidden, centrality, cu_seqlens)
    selection = select_tokens(importance, cu_seqlens, max_seqlen, keep_ratio=1 / 3)
    return importance, selection, gather_tokens(hidden, selection)


def launched_ops(function, *arguments) -> set[str]:
    with torch.profiler.profile() as profile:
        function(*arguments)
    return {event.name for event in profile.events() if event.name.startswith("stamp::")}


@pytest.mark.parametrize("name", BATCHES)
def test_reference_backend_equals_the_ops(name):
    batch = BATCHES[name]
    hidden = torch.randn(batch.total, 24, requires_grad=True)
    arguments = (hidden, torch.rand(batch.total), batch.cu_seqlens, batch.max_seqlen)
    results, gradients = [], []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            results.append(score_and_prune(*arguments))
            gradients.append(torch.autograd.grad(results[-1][2].square().sum(), hidden)[0])
    (importance, selection, values), (importance_ref, selection_ref, values_ref) = results
    assert_close(importance, importance_ref.double())
    for field, expected in zip(selection, selection_ref, strict=True):
        assert torch.equal(field, expected) if isinstance(field, torch.Tensor) else field == expected
    assert torch.equal(values, values_ref)
    assert torch.equal(*gradients)


def test_reference_backend_launches_no_op():
    batch = BATCHES["ragged"]
    arguments = (torch.randn(batch.total, 4), torch.rand(batch.total), batch.cu_seqlens, batch.max_seqlen)
    ops = {"stamp::token_importance", "stamp::select_tokens", "stamp::gather_tokens_forward"}
    assert launched_ops(score_and_prune, *arguments) == ops
    with use_backend("reference"):
        assert launched_ops(score_and_prune, *arguments) == set()


def test_reference_backend_compiles_whole():
    batch = BATCHES["ragged"]
    arguments = (torch.randn(batch.total, 4), torch.rand(batch.total), batch.cu_seqlens, batch.max_seqlen)
    compiled = torch.compile(score_and_prune, fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend("reference"):
        values = compiled(*arguments)[2]
    expected = score_and_prune(*arguments)[2]
    assert torch.equal(values[: expected.shape[0]], expected)


class Factors(NamedTuple):
    mat1: str
    mat2: str


class SwappedFactors(NamedTuple):
    mat2: str
    mat1: str


class MissingFactors(NamedTuple):
    weight: str


def test_arguments_reach_their_group():
    taken = _with_groups(torch.ops.aten.addmm.default, [Factors], lambda *args: args)
    assert taken("self", "left", "right", "beta", "alpha") == ("self", Factors("left", "right"), "beta", "alpha")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (SwappedFactors, r"has the arguments \['mat2', 'beta'\] where SwappedFactors has"),
        (MissingFactors, r"has no argument \['weight'\]"),
    ],
)
def test_group_that_is_not_in_the_schema_is_refused(group, message):
    with pytest.raises(TypeError, match=message):
        _with_groups(torch.ops.aten.addmm.default, [group], lambda *args: args)
