"""`prepare` puts onto a device exactly what the launchers read there."""

import doctest
import inspect

import pytest
import torch
from pairwise import pairwise
from torch import Tensor

from stamp_kernels import (
    MultiStepPrediction,
    RelativePositionBias,
    attention_centrality,
    multi_token_cross_entropy,
    packed_attention,
    prepare,
)

META = torch.device("meta")
RANGES = [(1, 9), (9, 25), (25, 40)]


@pytest.fixture
def constants(monkeypatch) -> dict:
    """The constants that one test makes. Launches run nothing, so `meta` tensors take the place of a GPU's."""
    pytest.importorskip("triton")
    from triton.runtime.jit import KernelInterface

    from stamp_kernels.triton_kernels import constants

    made: dict = {}
    monkeypatch.setattr(constants, "_CONSTANTS", made)
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    return made


def served_by_triton():
    from stamp_kernels.ops._served_by_triton import ServedByTriton  # imports no Triton, but its launchers do

    return ServedByTriton()


def bias(num_buckets: int = 32, **options) -> RelativePositionBias:
    return RelativePositionBias(torch.empty(num_buckets, 4, device=META, requires_grad=True), **options)


def attend(relative_bias: RelativePositionBias, max_seqlen: int) -> None:
    """Forward, backward and centrality."""
    q, k, v = (torch.empty(64, 4, 32, device=META, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.empty(3, device=META, dtype=torch.int32)
    with served_by_triton():
        result = packed_attention(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen_q=max_seqlen,
            relative_bias=relative_bias,
            return_lse=True,
            return_centrality=True,
        )
        attention_centrality(q, k, result.lse, cu_seqlens, max_seqlen_q=max_seqlen, relative_bias=relative_bias)
        result.out.sum().backward()


def predict(vocab_ranges: list[tuple[int, int]] | None, memory: str, per_step: bool) -> None:
    """Loss and gradients."""
    shape = (3, 10, 16) if per_step else (10, 16)
    hidden, weight = (torch.empty(s, device=META, requires_grad=True) for s in (shape, (40, 16)))
    targets = torch.empty(10, 3, device=META, dtype=torch.int64)
    with served_by_triton():
        multi_token_cross_entropy(
            hidden, weight, targets, vocab_ranges=vocab_ranges, memory=memory, step_weights=[1.0, 0.5, 0.25]
        ).backward()


@pytest.mark.parametrize("max_seqlen", [16, 32, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": False}, {"max_distance": 64}, {"num_buckets": 16}], ids=lambda x: str(x) or "T5"
)
def test_attention_finds_all_constants(constants, options, max_seqlen):
    prepare("meta", relative_bias=bias(**options))
    prepared = dict(constants)
    attend(bias(**options), max_seqlen)
    assert prepared and constants == prepared


def test_attention_makes_the_same_constants(constants):
    attend(bias(), 1000)
    made = set(constants)
    constants.clear()
    prepare("meta", relative_bias=bias())
    assert set(constants) == made


@pairwise(vocab_ranges=[None, RANGES, [(0, 40)] * 3, [(3, 30)] * 3], memory=["auto", "minimal"], per_step=[False, True])
def test_cross_entropy_finds_all_constants(constants, monkeypatch, vocab_ranges, memory, per_step):
    from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers

    for min_logits in (0, launchers.MIN_LOGITS_IN_CHUNKS):
        monkeypatch.setattr(launchers, "MIN_LOGITS_IN_CHUNKS", min_logits)
        prepare(META, vocab_ranges=vocab_ranges)
        prepared = set(constants)
        predict(vocab_ranges, memory, per_step)
        assert set(constants) == prepared and len(prepared) == (vocab_ranges == RANGES)


def test_cross_entropy_makes_the_same_constants(constants):
    predict(RANGES, "minimal", False)
    made = set(constants)
    constants.clear()
    prepare("meta", vocab_ranges=RANGES)
    assert made and set(constants) == made


def test_multi_step_prediction_finds_all_constants(constants):
    ranges = [(1, 9), (9, 25), (25, 40)] * 2
    prepare("meta", vocab_ranges=ranges)
    prepared = set(constants)
    with META:
        prediction = MultiStepPrediction(
            16, 2, codes_per_item=3, vocab_size=40, vocab_ranges=ranges, step_weights=[1.0, 0.5]
        )
        hidden, targets = torch.empty(30, 16), torch.empty(30, 2, dtype=torch.int64)
    with served_by_triton():
        prediction(hidden, targets).backward()
    assert prepared and set(constants) == prepared


def test_constants_hold_what_they_name(constants):
    prepare("meta", vocab_ranges=RANGES)
    from stamp_kernels.triton_kernels.cross_entropy.softmaxes import ranges_on_device

    on_cpu: Tensor = ranges_on_device(tuple(RANGES), torch.device("cpu"))
    assert on_cpu.tolist() == [list(span) for span in RANGES] and on_cpu.dtype == torch.int32
    assert [x.shape for x in constants.values()] == [on_cpu.shape] * 2


def test_lists_serve_as_pairs(constants):
    prepare("meta", vocab_ranges=[list(span) for span in RANGES])
    prepared = set(constants)
    predict(RANGES, "minimal", True)
    assert set(constants) == prepared


def test_nothing_happens_on_a_cpu(constants):
    prepare("cpu", relative_bias=bias(), vocab_ranges=RANGES)
    assert not constants


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(relative_bias=torch.zeros(32, 4)), "relative_bias must be a RelativePositionBias or None, got Tensor"),
        (dict(vocab_ranges=[(0, 4), (4, 4)]), r"vocab_ranges must satisfy 0 <= start < end, got \(4, 4\)"),
        (dict(vocab_ranges=[(-1, 4)]), r"vocab_ranges must satisfy 0 <= start < end, got \(-1, 4\)"),
        (dict(vocab_ranges=[0, 4]), r"vocab_ranges must be pairs \(start, end\) of ints, got \[0, 4\]"),
        (dict(vocab_ranges=[(0, 4, 8)]), r"vocab_ranges must be pairs \(start, end\) of ints, got \[\(0, 4, 8\)\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments_are_named(constants, device, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(device, **arguments)
    assert not constants


def test_too_many_steps_are_refused(constants):
    """Triton would skip such a launch silently."""
    hidden, weight = torch.empty(2**16, 2, 8, device=META, requires_grad=True), torch.empty(4, 8, device=META)
    targets = torch.empty(2, 2**16, device=META, dtype=torch.int64)
    with served_by_triton(), pytest.raises(ValueError, match="too large for one launch"):
        multi_token_cross_entropy(hidden, weight, targets, memory="minimal")


def test_the_example_runs():
    examples = doctest.DocTestFinder().find(prepare, "prepare", globs=dict(globals()))
    assert sum(doctest.DocTestRunner().run(example).attempted for example in examples) == 2
    assert inspect.signature(prepare).return_annotation is None


@pytest.mark.gpu
def test_prepared_calls_never_wait_for_the_gpu():
    prepare("cuda", vocab_ranges=RANGES, relative_bias=RelativePositionBias(torch.zeros(30, 2)))
    hidden = torch.randn(10, 16, device="cuda", requires_grad=True)
    weight = torch.randn(40, 16, device="cuda", requires_grad=True)
    targets = torch.stack([torch.randint(*span, (10,)) for span in RANGES], dim=1).to("cuda")
    q = torch.randn(20, 2, 32, device="cuda", requires_grad=True)
    table = torch.randn(30, 2, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = multi_token_cross_entropy(hidden, weight, targets, vocab_ranges=RANGES, step_weights=[1.0, 0.5, 0.25])
        out = packed_attention(q, q, q, cu_seqlens, max_seqlen_q=20, relative_bias=RelativePositionBias(table))
        (loss + out.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
