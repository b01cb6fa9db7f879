"""The ops of the cross-entropy: what they save and compute, memory, FLOPs, torch.compile, and what is refused."""

import itertools
import math

import pytest
import torch
from closeness import assert_close
from cross_entropy_cases import (
    CASES,
    RANGES,
    Case,
    backward_arguments,
    dense_cross_entropy,
    forward_arguments,
    gradients,
    leaves,
)
from torch.utils.flop_counter import FlopCounterMode

import stamp_kernels.flops  # noqa: F401  (registers the formulas)
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import multi_token_cross_entropy
from stamp_kernels.ops.cross_entropy.shift_targets import shift_targets

FORWARD = torch.ops.stamp.multi_token_cross_entropy_forward.default
BACKWARD = torch.ops.stamp.multi_token_cross_entropy_backward.default
WITH_GRADIENTS = torch.ops.stamp.multi_token_cross_entropy_with_gradients.default

STEPS, VOCAB, WIDTH = Case.num_steps, Case.vocab_size, Case.width


# What the ops compute


def test_what_the_forward_saves():
    inputs = CASES["step_weights"].inputs()
    want = dense_cross_entropy(**inputs)
    _, _, step_scale, lse = FORWARD(*forward_arguments(inputs))
    assert_close(lse, want.lse)
    assert_close(step_scale, want.step_scale)
    for empty in FORWARD(*forward_arguments(inputs, "none"))[1:3]:
        assert empty.shape == (0,)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_backward_computes_what_is_needed(needs):
    inputs = CASES["everything"].inputs()
    wanted = BACKWARD(*backward_arguments(inputs, (True, True, True)))
    got = BACKWARD(*backward_arguments(inputs, needs))
    for got_x, want_x, needed in zip(got, wanted, needs, strict=True):
        assert torch.equal(got_x, want_x) if needed else got_x.shape == (0,)


def test_frozen_weight_gets_no_gradient(backend):
    inputs = CASES["weight_per_step"].inputs()
    inputs["weight"].requires_grad_(False)
    multi_token_cross_entropy(**inputs).backward()
    assert inputs["weight"].grad is None
    assert inputs["hidden"].grad is not None


def test_logits_never_exist_whole():
    num_rows, vocab = 2_048, 1_536
    hidden = torch.randn(num_rows, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(vocab, (num_rows, 2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        multi_token_cross_entropy(hidden, weight, targets).backward()
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert 0 < largest < 4 * num_rows * vocab / 2


@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=2)), ids=str)
def test_flop_count(needed, memory):
    """Minimal memory computes the logits a second time; otherwise all products are in the forward pass."""
    inputs = CASES["ranges"].inputs()
    for x, need in zip(leaves(inputs), needed, strict=True):
        x.requires_grad_(need)
    product = 2 * len(inputs["targets"]) * sum(end - start for start, end in RANGES) * WIDTH
    with FlopCounterMode(display=False) as counter:
        loss = multi_token_cross_entropy(**inputs, memory=memory)
    of_gradients = sum(needed) * product
    assert counter.get_total_flops() == product + (of_gradients if memory == "auto" else 0)
    if any(needed):
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == (product + of_gradients if memory == "minimal" else 0)


# opcheck, torch.compile


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["shared", "everything", "no_rows"])
def test_opcheck(name, reduction):
    inputs = CASES[name].inputs()
    torch.library.opcheck(FORWARD, forward_arguments(inputs, reduction))
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, (True, True, "bias" in inputs), reduction))
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, (False, True, False), reduction))
    if reduction != "none":
        torch.library.opcheck(WITH_GRADIENTS, (*forward_arguments(inputs), True, True, "bias" in inputs))
        torch.library.opcheck(WITH_GRADIENTS, (*forward_arguments(inputs), True, False, False))


def test_compiled_training_step():
    def step(hidden, weight, bias, labels, cu_seqlens, step_weights):
        targets = shift_targets(labels, cu_seqlens, steps=STEPS)
        return multi_token_cross_entropy(
            hidden, weight, targets, bias=bias, step_weights=step_weights, z_loss=0.01, label_smoothing=0.1,
            return_step_losses=True,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # No batch of 2: cu_seqlens would have one entry for each step, and torch would use one symbol for both.
        for lengths in ([5, 2, 1], [4, 0, 3, 9], [3, 3, 3, 8, 2, 1]):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            total = sum(lengths) + 1
            inputs = {
                "hidden": torch.randn(total, WIDTH, requires_grad=True),
                "weight": torch.randn(VOCAB, WIDTH, requires_grad=True),
                "bias": torch.randn(VOCAB, requires_grad=True),
            }
            others = (torch.randint(VOCAB, (total,)), cu_seqlens, torch.rand(STEPS))
            results = []
            for function in (compiled, step):
                loss, step_losses = function(*inputs.values(), *others)
                results.append([loss, step_losses, *gradients(loss, inputs)])
            assert all(map(torch.equal, *results))


def test_compiled_with_ranges_and_float_weights():
    def step(hidden, weight, targets):
        return multi_token_cross_entropy(
            hidden, weight, targets, step_weights=(1.0, 0.5, 0.25), vocab_ranges=RANGES, softcap=3.0, reduction="sum"
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows in (5, 8):
            case = Case(("hidden",), options=(("vocab_ranges", RANGES),), num_rows=num_rows)
            inputs = case.inputs(torch.float32)
            arguments = [inputs[name] for name in ("hidden", "weight", "targets")]
            got, want = compiled(*arguments), step(*arguments)
            assert torch.equal(got, want)
            assert all(map(torch.equal, gradients(got, inputs), gradients(want, inputs)))


# Refusals


BAD_ARGUMENTS = {
    "targets_dtype": ({"targets": torch.zeros(37, 3, dtype=torch.int32)}, r"targets must have dtype torch\.int64"),
    "targets_shape": ({"targets": torch.zeros(37, dtype=torch.int64)}, r"targets must have shape \[N, K\], got \[37\]"),
    "no_steps": ({"targets": torch.zeros(37, 0, dtype=torch.int64)}, r"targets must have at least one step"),
    "hidden_rank": ({"hidden": torch.zeros(20)}, r"hidden must have shape \[37, D\] or \[3, 37, D\], got \[20\]"),
    "hidden_rows": ({"hidden": torch.zeros(36, 20)}, r"hidden must have shape \[37, D\], got \[36, 20\]"),
    "hidden_steps": ({"hidden": torch.zeros(2, 37, 20)}, r"hidden must have shape \[3, 37, D\], got \[2, 37, 20\]"),
    "hidden_dtype": (
        {"hidden": torch.zeros(37, 20).int()},
        r"hidden must have dtype torch\.float32, .*got torch\.int32",
    ),
    "hidden_type": ({"hidden": [1.0]}, r"hidden must be a tensor, got list"),
    "hidden_device": ({"hidden": torch.zeros(37, 20, device="meta")}, r"hidden must be on cpu, got meta"),
    "weight_width": ({"weight": torch.zeros(53, 19)}, r"weight must have shape \[V, 20\], got \[53, 19\]"),
    "weight_steps": ({"weight": torch.zeros(2, 53, 20)}, r"weight must have shape \[3, V, 20\], got \[2, 53, 20\]"),
    "weight_rank": ({"weight": torch.zeros(20)}, r"weight must have shape \[V, 20\] or \[3, V, 20\], got \[20\]"),
    "weight_dtype": (
        {"weight": torch.zeros(53, 20).half()},
        r"weight must have dtype torch\.float32, got torch\.float16",
    ),
    "weight_empty": ({"weight": torch.zeros(0, 20)}, r"weight must have at least one row, got shape \[0, 20\]"),
    "bias_shape": ({"bias": torch.zeros(52)}, r"bias must have shape \[53\], got \[52\]"),
    "bias_dtype": ({"bias": torch.zeros(53).half()}, r"bias must have dtype torch\.float32, .*got torch\.float16"),
    "step_weights_length": ({"step_weights": [1.0]}, r"step_weights must have one weight for each of the 3 steps"),
    "step_weights_shape": ({"step_weights": torch.ones(2)}, r"step_weights must have shape \[3\], got \[2\]"),
    "step_weights_mapping": ({"step_weights": {0: 1.0}}, r"step_weights must be floats or a tensor, got dict"),
    "step_weights_text": ({"step_weights": "one"}, r"step_weights must be a number \(not a tensor\), got str"),
    "step_weights_grad": ({"step_weights": torch.ones(3, requires_grad=True)}, r"step_weights must not require grad"),
    "ranges_length": ({"vocab_ranges": [(0, 5)]}, r"vocab_ranges must have one \(start, end\) for each of the 3 steps"),
    "ranges_flat": (
        {"vocab_ranges": [0, 5, 5, 8, 8, 9]},
        r"vocab_ranges must be pairs \(start, end\) of ints, got \[0",
    ),
    "ranges_empty": ({"vocab_ranges": [(0, 5), (5, 5), (0, 1)]}, r"0 <= start < end <= 53 .*got \(5, 5\)"),
    "ranges_outside": ({"vocab_ranges": [(0, 5), (5, 54), (0, 1)]}, r"0 <= start < end <= 53 .*got \(5, 54\)"),
    "label_smoothing": ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0\.0, 1\.0\], got 1\.5"),
    "z_loss": ({"z_loss": -0.1}, r"z_loss must be in \[0\.0, inf\), got -0\.1"),
    "softcap": ({"softcap": 0.0}, r"softcap must be None \(or inf\), or a positive number .* got 0\.0"),
    "softcap_too_small": ({"softcap": 1e-50}, r"softcap must be .* torch\.float32 logits .* 1\.2e-38 .* got 1e-50"),
    "softcap_text": ({"softcap": "none"}, r"softcap must be None \(or inf\), or a positive number .* got 'none'"),
    "reduction": ({"reduction": "max"}, r"reduction must be one of \('none', 'mean', 'sum'\), got 'max'"),
    "memory": ({"memory": "maximal"}, r"memory must be one of \('auto', 'minimal'\), got 'maximal'"),
    "step_losses": (
        {"reduction": "none", "return_step_losses": True},
        r'return_step_losses goes with reduction "mean" or "sum", got "none"',
    ),
}


@pytest.mark.core
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    arguments, message = BAD_ARGUMENTS[name]
    inputs = CASES["shared"].inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        multi_token_cross_entropy(**inputs | arguments)


def test_padded_sequences_are_no_steps():
    """[B, T, D] with targets [B, T] and B == T has the shapes of one state for each step."""
    hidden, weight, targets = torch.randn(3, 3, 4), torch.randn(5, 4), torch.zeros(3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden \[3, 3, 4\] with targets \[3, 3\] could be padded sequences"):
        multi_token_cross_entropy(hidden, weight, targets)
    by_step = multi_token_cross_entropy(hidden, weight, targets, step_weights=[1.0] * 3)
    losses = [torch.nn.functional.cross_entropy(hidden[k] @ weight.T, targets[:, k]) for k in range(3)]
    torch.testing.assert_close(by_step, torch.stack(losses).sum())


def test_infinite_softcap_is_no_cap():
    inputs = CASES["shared"].inputs()
    capped, plain = (multi_token_cross_entropy(**inputs, softcap=softcap) for softcap in (math.inf, None))
    assert torch.equal(capped, plain)
