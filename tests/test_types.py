"""What a type checker sees of the package: exact types of every public function, and the Triton kernels too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

SCRIPT = """
import torch
from torch import Tensor
from typing_extensions import assert_type

from stamp_kernels import (
    AttentionOutput,
    MultiTokenLoss,
    PackedBatch,
    RelativePositionBias,
    TokenSelection,
    attention_centrality,
    gather_tokens,
    multi_token_cross_entropy,
    packed_attention,
    per_level_cross_entropy,
    prune,
    select_tokens,
    shift_targets,
    token_importance,
)
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties

q = torch.randn(70, 6, 64)
cu_seqlens = torch.tensor([0, 40, 47, 70], dtype=torch.int32)
bias = RelativePositionBias(torch.randn(32, 6))

assert_type(packed_attention(q, q, q, cu_seqlens, max_seqlen_q=40), Tensor)
assert_type(packed_attention(q, q, q, cu_seqlens, cu_seqlens, 40, 40, return_lse=True), AttentionOutput)
output = packed_attention(q, q, q, cu_seqlens, max_seqlen_q=40, relative_bias=bias, return_centrality=True)
assert_type(output, AttentionOutput)
lse = packed_attention(q, q, q, cu_seqlens, max_seqlen_q=40, return_lse=True).lse
assert lse is not None
centrality = attention_centrality(q, q, lse, cu_seqlens, max_seqlen_q=40)
assert_type(centrality, Tensor)

hidden = q.flatten(1)
importance = token_importance(hidden, centrality, cu_seqlens, norm="l2")
assert_type(importance, Tensor)
selection = select_tokens(importance, cu_seqlens, 40, keep_ratio=1 / 3)
assert_type(selection, TokenSelection)
assert_type(gather_tokens(hidden, selection), Tensor)
assert_type(gather_tokens([hidden, importance], selection), list[Tensor])
assert_type(prune(hidden, centrality, cu_seqlens, 40, keep_count=3).x, Tensor)
assert_type(prune([hidden, importance], centrality, cu_seqlens, 40, keep_count=3).x, list[Tensor])

targets = shift_targets(torch.randint(99, (70,)), cu_seqlens, steps=2)
assert_type(targets, Tensor)
weight = torch.randn(99, 384)
assert_type(multi_token_cross_entropy(hidden, weight, targets), Tensor)
assert_type(multi_token_cross_entropy(hidden, weight, targets, return_step_losses=True), MultiTokenLoss)
heads = torch.nn.ModuleList([torch.nn.Linear(64, 256)] * 6)
assert_type(per_level_cross_entropy(q, heads, targets), Tensor)
assert_type(per_level_cross_entropy(q, list(heads), targets, return_step_losses=True), MultiTokenLoss)

packed = PackedBatch.from_padded(torch.randn(3, 40, 384), lengths=torch.tensor([40, 7, 23]))
assert_type(packed, PackedBatch)
assert_type(packed.to_padded(), Tensor)
assert_type(device_properties(q.device), DeviceProperties)
"""

WRONG = """
import torch

from stamp_kernels import multi_token_cross_entropy, packed_attention, token_importance

x = torch.randn(7, 2, 8)
packed_attention(x, x, x, x, query_mask=x)
token_importance(x, x, norm="l3")
multi_token_cross_entropy(x, x, x, reduction="average")
"""


def errors_of(directory: Path, script: str) -> list[str]:
    """What pyright reports, as `line: message`, run on a file outside the sources as a user would."""
    pytest.importorskip("pyright", reason="needs pyright, of the extra `dev`")
    file = directory / "user.py"
    file.write_text(script)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=directory, check=False)
    report = json.loads(run.stdout)
    return [f"{found['range']['start']['line'] + 1}: {found['message']}" for found in report["generalDiagnostics"]]


def test_user_script_type_checks(tmp_path):
    assert errors_of(tmp_path, SCRIPT) == []


def test_wrong_arguments_are_reported(tmp_path):
    errors = errors_of(tmp_path, WRONG)
    assert {error.partition(":")[0] for error in errors} == {"7", "8", "9"}, errors
