"""multi_token_cross_entropy against float64 loops of F.cross_entropy, shift_targets against a loop over sequences."""

import dataclasses
import doctest
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from op_kernels import reference
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch.utils.flop_counter import FlopCounterMode

import stamp_kernels.flops  # noqa: F401  (registers the formulas)
from stamp_kernels._backend import use_backend
from stamp_kernels.common.steps import REDUCTIONS
from stamp_kernels.ops import cross_entropy
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import MultiTokenLoss, multi_token_cross_entropy
from stamp_kernels.ops.cross_entropy.shift_targets import shift_targets
from stamp_kernels.reference import cross_entropy as oracle

FORWARD = torch.ops.stamp.multi_token_cross_entropy_forward.default
BACKWARD = torch.ops.stamp.multi_token_cross_entropy_backward.default
WITH_GRADIENTS = torch.ops.stamp.multi_token_cross_entropy_with_gradients.default

NUM_ROWS, NUM_STEPS, VOCAB, WIDTH = 37, 3, 53, 20
RANGES = ((0, 17), (17, 29), (5, 53))


@dataclass(frozen=True)
class Case:
    """What is per step rather than shared, and the options."""

    per_step: tuple[str, ...] = ()
    bias: bool = False
    options: tuple[tuple[str, object], ...] = ()
    num_rows: int = NUM_ROWS
    all_ignored: bool = False

    def inputs(self, dtype=torch.float64, bias_dtype=None):
        """The arguments, those to be differentiated as leaves. A third of the targets is ignored."""
        options = dict(self.options)
        shapes = {"hidden": (self.num_rows, WIDTH), "weight": (VOCAB, WIDTH)} | (
            {"bias": (VOCAB,)} if self.bias else {}
        )
        inputs = {}
        for name, shape in shapes.items():
            x = torch.randn((NUM_STEPS, *shape) if name in self.per_step else shape, dtype=torch.float64)
            x_dtype = bias_dtype or dtype if name == "bias" else dtype
            inputs[name] = (x * 0.5 if name == "weight" else x).to(x_dtype).requires_grad_()
        ranges = options.get("vocab_ranges", ((0, VOCAB),) * NUM_STEPS)
        targets = torch.stack([torch.randint(start, end, (self.num_rows,)) for start, end in ranges], dim=1)
        ignored = (torch.rand(targets.shape) < 1 / 3) | self.all_ignored
        inputs["targets"] = targets.masked_fill(ignored, options.get("ignore_index", -100))
        return inputs | options


CASES = {
    "shared": Case(),
    "hidden_per_step": Case(("hidden",)),
    "weight_per_step": Case(("weight",), bias=True),
    "all_per_step": Case(("hidden", "weight", "bias"), bias=True),
    "bias_per_step": Case(("bias",), bias=True),
    "step_weights": Case(options=(("step_weights", (1.0, 0.0, 0.25)),)),
    "ranges": Case(("hidden",), options=(("vocab_ranges", RANGES),)),
    "ranges_bias": Case(("bias",), bias=True, options=(("vocab_ranges", RANGES), ("label_smoothing", 0.1))),
    "label_smoothing": Case(options=(("label_smoothing", 0.1),)),
    "z_loss": Case(options=(("z_loss", 0.01),)),
    "softcap": Case(options=(("softcap", 2.0),)),
    "ignore_index_in_range": Case(options=(("ignore_index", 7),)),
    "everything": Case(
        ("hidden", "weight", "bias"),
        bias=True,
        options=(
            ("step_weights", (0.5, 2.0, 1.0)),
            ("vocab_ranges", RANGES),
            ("ignore_index", -1),
            ("label_smoothing", 0.2),
            ("z_loss", 0.02),
            ("softcap", 3.0),
        ),
    ),
    "all_ignored": Case(bias=True, all_ignored=True),
    "no_rows": Case(("hidden",), bias=True, num_rows=0),
}


def row_losses(inputs):
    """[N, K] float64: F.cross_entropy of each step's logits, and the z-loss by its formula."""
    columns = []
    for k in range(NUM_STEPS):
        hidden, weight, bias = (
            None if (x := inputs.get(name)) is None else x.double() if x.dim() == dims else x[k].double()
            for name, dims in (("hidden", 2), ("weight", 2), ("bias", 1))
        )
        start, end = inputs.get("vocab_ranges", ((0, VOCAB),) * NUM_STEPS)[k]
        logits = F.linear(hidden, weight, bias)[:, start:end]
        if "softcap" in inputs:
            logits = inputs["softcap"] * torch.tanh(logits / inputs["softcap"])
        targets = inputs["targets"][:, k]
        valid = targets != inputs.get("ignore_index", -100)
        losses = F.cross_entropy(
            logits,
            torch.where(valid, targets - start, -1),
            ignore_index=-1,
            label_smoothing=inputs.get("label_smoothing", 0.0),
            reduction="none",
        )
        columns.append(losses + inputs.get("z_loss", 0.0) * logits.logsumexp(1).square() * valid)
    return torch.stack(columns, dim=1)


def expected_loss(inputs, reduction):
    losses = row_losses(inputs)
    if reduction == "none":
        return losses, None
    num_valid = (inputs["targets"] != inputs.get("ignore_index", -100)).sum(0)
    step_losses = losses.sum(0) / (num_valid.clamp(min=1) if reduction == "mean" else 1)
    weights = torch.as_tensor(inputs.get("step_weights", (1.0,) * NUM_STEPS), dtype=torch.float64)
    return (weights * step_losses).sum(), step_losses


def leaves(inputs):
    return [inputs[name] for name in ("hidden", "weight", "bias") if name in inputs]


def gradients(loss, inputs):
    """Of the leaves, for a fixed random gradient of the loss."""
    grad = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return torch.autograd.grad(loss, leaves(inputs), grad.to(loss.dtype))


def assert_matches_loop(inputs, reduction="mean"):
    want, want_steps = expected_loss(inputs, reduction)
    if reduction == "none":
        got = multi_token_cross_entropy(**inputs, reduction=reduction)
    else:
        got, step_losses = multi_token_cross_entropy(**inputs, reduction=reduction, return_step_losses=True)
        assert not step_losses.requires_grad
        assert_close(step_losses, want_steps)
    assert got.dtype == (torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32)
    assert_close(got, want)
    for x, got_grad, want_grad in zip(leaves(inputs), gradients(got, inputs), gradients(want, inputs), strict=True):
        assert got_grad.dtype == x.dtype
        # The loop differentiates a bf16 leaf through its float64 copy and rounds at the end too: exact to bf16.
        assert_close(got_grad, want_grad)


def forward_arguments(inputs, reduction="mean"):
    ranges = inputs.get("vocab_ranges")
    weights = inputs.get("step_weights")
    return (
        *(
            None if inputs.get(name) is None else inputs[name].detach()
            for name in ("hidden", "weight", "targets", "bias")
        ),
        None if isinstance(weights, torch.Tensor) else weights,
        weights if isinstance(weights, torch.Tensor) else None,
        None if ranges is None else list(itertools.chain(*ranges)),
        inputs.get("ignore_index", -100),
        inputs.get("label_smoothing", 0.0),
        inputs.get("z_loss", 0.0),
        inputs.get("softcap"),
        REDUCTIONS[reduction],
    )


def backward_arguments(inputs, needs, reduction="mean"):
    hidden, weight, targets, bias, _, _, *options, _ = arguments = forward_arguments(inputs, reduction)
    loss, _, step_scale, lse = FORWARD(*arguments)
    return torch.ones_like(loss), hidden, weight, targets, bias, lse, step_scale, *options, *needs


# Values and gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64_loop(backend, name, dtype):
    assert_matches_loop(CASES[name].inputs(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_minimal_memory_against_float64_loop(name, dtype):
    assert_matches_loop(CASES[name].inputs(dtype) | {"memory": "minimal"})


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["shared", "everything", "all_ignored", "no_rows"])
def test_reductions(backend, name, reduction):
    assert_matches_loop(CASES[name].inputs(), reduction)


@pytest.mark.parametrize("tile", [(5, 3), (64, 8), (7, 100)], ids=str)
@pytest.mark.parametrize("name", ["all_per_step", "everything"])
def test_many_tiles_of_the_reference(monkeypatch, name, tile):
    """The kernels' stand-in on devices that have none."""
    tile_rows, tile_classes = tile
    monkeypatch.setattr(oracle, "TILE_CLASSES", tile_classes)
    monkeypatch.setattr(oracle, "TILE_BYTES", 8 * tile_rows * tile_classes)
    inputs = CASES[name].inputs()
    want, want_steps = expected_loss(inputs, "mean")
    loss, step_losses, *grads = reference("multi_token_cross_entropy_with_gradients")(
        *forward_arguments(inputs), True, True, True
    )
    assert_close(loss, want)
    assert_close(step_losses, want_steps)
    for got, expected in zip(grads, torch.autograd.grad(want, leaves(inputs)), strict=True):
        assert_close(got, expected)


def test_bias_in_fp32_beside_bf16_weight(backend):
    assert_matches_loop(CASES["all_per_step"].inputs(torch.bfloat16, bias_dtype=torch.float32))


def test_step_weights_as_a_tensor(backend):
    inputs = CASES["step_weights"].inputs(torch.float32)
    want = multi_token_cross_entropy(**inputs)
    weights = torch.tensor(inputs["step_weights"], dtype=torch.float64)
    got = multi_token_cross_entropy(**inputs | {"step_weights": weights})
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert all(map(torch.equal, gradients(got, inputs), gradients(want, inputs)))


def test_memory_settings_agree():
    inputs = CASES["everything"].inputs(torch.float32)
    losses = [multi_token_cross_entropy(**inputs, memory=memory) for memory in ("minimal", "auto")]
    assert torch.equal(*losses)
    for minimal, auto in zip(*(gradients(loss, inputs) for loss in losses), strict=True):
        assert_close(auto, minimal.double())


@pytest.mark.parametrize("memory", ["auto", "minimal"])
def test_two_backward_passes_through_one_graph(memory):
    inputs = CASES["everything"].inputs()
    loss = multi_token_cross_entropy(**inputs, memory=memory)
    first = torch.autograd.grad(loss, leaves(inputs), retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves(inputs))
    for once, twice in zip(first, second, strict=True):
        assert_close(twice, 2 * once)


def test_returns_a_named_tuple_where_step_losses_are_asked_for(backend):
    inputs = CASES["shared"].inputs()
    assert isinstance(multi_token_cross_entropy(**inputs, return_step_losses=True), MultiTokenLoss)
    assert isinstance(multi_token_cross_entropy(**inputs), torch.Tensor)


@pytest.mark.parametrize("name", ["shared", "everything"])
def test_non_contiguous_inputs(backend, name):
    inputs = CASES[name].inputs()
    want = multi_token_cross_entropy(**inputs)
    want_grads = gradients(want, inputs)
    strided = {}
    for key in ("hidden", "weight", "targets"):
        x = inputs[key].detach()
        wider = torch.cat([x.transpose(-1, -2), x.transpose(-1, -2)], dim=-1)[..., : x.shape[-2]]
        strided[key] = wider.transpose(-1, -2).requires_grad_(x.is_floating_point())
        assert not strided[key].is_contiguous()
    strided = inputs | strided
    got = multi_token_cross_entropy(**strided)
    assert_close(got, want)
    for got_grad, want_grad in zip(gradients(got, strided), want_grads, strict=True):
        assert_close(got_grad, want_grad)


def test_two_runs_give_the_same_bits():
    inputs = CASES["everything"].inputs(torch.float32)
    runs = []
    for _ in range(2):
        loss = multi_token_cross_entropy(**inputs)
        runs.append([loss, *gradients(loss, inputs)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    inputs = dataclasses.replace(CASES["everything"], num_rows=4).inputs()
    others = {name: x for name, x in inputs.items() if name not in ("hidden", "weight", "bias")}

    def loss(hidden, weight, bias):
        return multi_token_cross_entropy(hidden, weight, bias=bias, **others, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves(inputs), fast_mode=True)


# Rows and classes that count for nothing


def test_nan_in_ignored_rows_reaches_nothing(backend):
    inputs = CASES["everything"].inputs()
    inputs["targets"][10:14] = inputs["ignore_index"]
    want = gradients(multi_token_cross_entropy(**inputs), inputs)
    with torch.no_grad():
        inputs["hidden"][:, 10:12] = torch.nan
        inputs["hidden"][:, 12:14] = torch.inf
    loss = multi_token_cross_entropy(**inputs)
    grads = gradients(loss, inputs)
    assert torch.isfinite(loss)
    assert all(map(torch.equal, grads, want))
    assert grads[0][:, 10:14].count_nonzero() == 0


def test_nan_in_a_valid_row_shows(backend):
    inputs = CASES["shared"].inputs()
    inputs["targets"][3] = 1
    with torch.no_grad():
        inputs["hidden"][3] = torch.nan
    assert multi_token_cross_entropy(**inputs).isnan()


def test_ignored_rows_do_not_overflow():
    inputs = Case(bias=True, all_ignored=True).inputs(torch.float32)
    with torch.no_grad():
        inputs["bias"] += 200.0  # exp(200) is infinite in fp32
    loss = multi_token_cross_entropy(**inputs)
    assert loss == 0
    assert all(grad.count_nonzero() == 0 for grad in gradients(loss, inputs))


def test_large_logits_do_not_overflow(backend):
    inputs = CASES["z_loss"].inputs(torch.float32)
    with torch.no_grad():
        inputs["hidden"] *= 1e3
    assert_matches_loop(inputs)


def test_class_ruled_out_by_its_bias(backend):
    inputs = CASES["all_per_step"].inputs()
    inputs["targets"].clamp_(max=40)
    with torch.no_grad():
        inputs["bias"][:, 41:] = -torch.inf
    assert_matches_loop(inputs)


def test_only_the_range_of_the_weight_gets_gradient(backend):
    inputs = Case(bias=True, options=(("vocab_ranges", ((10, 20), (30, 31), (12, 25))),)).inputs()
    _, grad_weight, grad_bias = gradients(multi_token_cross_entropy(**inputs), inputs)
    touched = torch.zeros(VOCAB, dtype=torch.bool)
    touched[10:25] = True
    assert torch.equal(grad_weight.abs().sum(1) > 0, touched)
    assert torch.equal(grad_bias != 0, touched)


# The ops: what they compute, and memory


def test_what_the_forward_saves():
    """lse [K, N] is 0 on ignored rows, step_scale [K] is the gradient of the loss to a row's loss."""
    inputs = CASES["step_weights"].inputs()
    _, _, step_scale, lse = FORWARD(*forward_arguments(inputs))
    valid = inputs["targets"] != -100
    want = (inputs["hidden"] @ inputs["weight"].T).logsumexp(1, keepdim=True) * valid
    assert_close(lse, want.T)
    assert_close(step_scale, torch.tensor(inputs["step_weights"]).double() / valid.sum(0))
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


def test_gradient_is_not_differentiable_again():
    inputs = CASES["shared"].inputs()
    (grad,) = torch.autograd.grad(multi_token_cross_entropy(**inputs).square(), inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_logits_never_exist_as_a_whole():
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
    product = 2 * NUM_ROWS * sum(end - start for start, end in RANGES) * WIDTH
    with FlopCounterMode(display=False) as counter:
        loss = multi_token_cross_entropy(**inputs, memory=memory)
    of_gradients = sum(needed) * product
    assert counter.get_total_flops() == product + (of_gradients if memory == "auto" else 0)
    if any(needed):
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == (product + of_gradients if memory == "minimal" else 0)


# opcheck, torch.compile, autocast


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
        targets = shift_targets(labels, cu_seqlens, steps=NUM_STEPS)
        return multi_token_cross_entropy(
            hidden, weight, targets, bias=bias, step_weights=step_weights, z_loss=0.01, label_smoothing=0.1,
            return_step_losses=True,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # No batch of 2: its cu_seqlens have as many entries as there are steps, which torch would take for one symbol.
        for lengths in ([5, 2, 1], [4, 0, 3, 9], [3, 3, 3, 8, 2, 1]):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            total = sum(lengths) + 1
            inputs = {
                "hidden": torch.randn(total, WIDTH, requires_grad=True),
                "weight": torch.randn(VOCAB, WIDTH, requires_grad=True),
                "bias": torch.randn(VOCAB, requires_grad=True),
            }
            others = (torch.randint(VOCAB, (total,)), cu_seqlens, torch.rand(NUM_STEPS))
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


def test_autocast_casts_hidden_and_weight_alone(backend):
    inputs = CASES["all_per_step"].inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = multi_token_cross_entropy(**inputs)
        grads = gradients(got, inputs)
    assert got.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads)

    rounded = inputs | {name: inputs[name].bfloat16() for name in ("hidden", "weight")}
    want = multi_token_cross_entropy(**rounded)
    assert torch.equal(got, want)
    for got_grad, want_grad in zip(grads, gradients(want, inputs), strict=True):
        assert_close(got_grad, want_grad, torch.bfloat16)


def test_autocast_unifies_the_dtypes_of_hidden_and_weight(backend):
    inputs = CASES["shared"].inputs(torch.float32)
    inputs["hidden"] = inputs["hidden"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(multi_token_cross_entropy(**inputs))


def test_autocast_leaves_float64_alone(backend):
    inputs = CASES["everything"].inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_matches_loop(inputs)


# Errors


def test_raw_op_refuses_to_lose_a_gradient():
    arguments = list(forward_arguments(CASES["shared"].inputs()))
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"raw op without autograd.*stamp_kernels\.multi_token_cross_entropy"):
        FORWARD(*arguments)
    with torch.no_grad():
        FORWARD(*arguments)


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
    "step_weights_grad": ({"step_weights": torch.ones(3, requires_grad=True)}, r"step_weights must not require grad"),
    "ranges_length": ({"vocab_ranges": [(0, 5)]}, r"vocab_ranges must have one \(start, end\) for each of the 3 steps"),
    "ranges_empty": ({"vocab_ranges": [(0, 5), (5, 5), (0, 1)]}, r"0 <= start < end <= 53 .*got \(5, 5\)"),
    "ranges_outside": ({"vocab_ranges": [(0, 5), (5, 54), (0, 1)]}, r"0 <= start < end <= 53 .*got \(5, 54\)"),
    "label_smoothing": ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0\.0, 1\.0\], got 1\.5"),
    "z_loss": ({"z_loss": -0.1}, r"z_loss must be in \[0\.0, inf\), got -0\.1"),
    "softcap": ({"softcap": 0.0}, r"softcap must be positive or None, got 0\.0"),
    "reduction": ({"reduction": "max"}, r"reduction must be one of \('none', 'mean', 'sum'\), got 'max'"),
    "memory": ({"memory": "maximal"}, r"memory must be one of \('auto', 'minimal'\), got 'maximal'"),
    "step_losses": (
        {"reduction": "none", "return_step_losses": True},
        r'return_step_losses goes with reduction "mean" or "sum", got "none"',
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    arguments, message = BAD_ARGUMENTS[name]
    inputs = CASES["shared"].inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        multi_token_cross_entropy(**inputs | arguments)


@pytest.mark.parametrize("target", [16, 29, -5])
def test_target_outside_its_range(backend, target):
    inputs = CASES["ranges"].inputs()
    inputs["targets"][4, 1] = target
    message = rf"targets\[4, 1\] is {target}, .*range \[17, 29\) of step 1 nor ignore_index \(-100\)"
    with pytest.raises(RuntimeError, match=message):
        multi_token_cross_entropy(**inputs)


def test_target_outside_the_vocabulary(backend):
    inputs = CASES["shared"].inputs()
    inputs["targets"][-1, 2] = VOCAB
    with pytest.raises(RuntimeError, match=r"targets\[36, 2\] is 53, .*range \[0, 53\)"):
        multi_token_cross_entropy(**inputs)


# shift_targets


def shifted_by_loop(batch, labels, steps, stride, ignore_index):
    targets = torch.full((batch.total, steps), ignore_index)
    for rows in batch.slices():
        for row in range(rows.start, rows.stop):
            for k in range(1, steps + 1):
                if row + k * stride < rows.stop:
                    targets[row, k - 1] = int(labels[row + k * stride])
    return targets


@given(batch=ragged_batches(), steps=st.integers(1, 4), stride=st.integers(1, 5))
def test_shift_targets_against_loop(batch, steps, stride):
    labels = torch.arange(batch.total, dtype=torch.int32) + 7
    want = shifted_by_loop(batch, labels, steps, stride, -1)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            got = shift_targets(labels, batch.cu_seqlens, steps=steps, stride=stride, ignore_index=-1)
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_shift_targets_of_any_integer_dtype(dtype):
    batch = BATCHES["ragged"]
    labels = torch.randint(0, 100, (batch.total,)).to(dtype)
    got = shift_targets(labels, batch.cu_seqlens, steps=2)
    assert torch.equal(got, shifted_by_loop(batch, labels, 2, 1, -100))


def test_shift_targets_keeps_labels_that_are_ignored():
    labels = torch.tensor([1, -100, 3])
    got = shift_targets(labels, torch.tensor([0, 3], dtype=torch.int32), steps=1)
    assert got[:, 0].tolist() == [-100, 3, -100]


def test_shift_targets_of_strided_inputs(backend):
    batch = BATCHES["ragged"]
    labels = torch.randint(0, 100, (batch.total, 3))[:, 1]
    cu_seqlens = torch.stack([batch.cu_seqlens, batch.cu_seqlens + 1], dim=1)[:, 0]
    got = shift_targets(labels, cu_seqlens, steps=2)
    assert torch.equal(got, shifted_by_loop(batch, labels, 2, 1, -100))
    one_label = torch.tensor(7).expand(batch.total)
    got = shift_targets(one_label, cu_seqlens, steps=2)
    assert torch.equal(got, shifted_by_loop(batch, one_label, 2, 1, -100))


def test_shift_targets_of_many_rows(backend):
    """Enough for several threads, and a part that begins inside a sequence or among empty ones."""
    batch = RaggedBatch((4001, 0, 0, 7, *range(0, 300, 2), 9001, 0), tail=5)
    labels = torch.arange(batch.total)
    got = shift_targets(labels, batch.cu_seqlens, steps=3, stride=2)
    assert torch.equal(got, shifted_by_loop(batch, labels, 3, 2, -100))


@pytest.mark.parametrize(("steps", "stride"), [(1, 1), (2, 1), (3, 2), (40, 1), (2, 40)])
def test_shift_targets_reads_no_tail_label(backend, steps, stride):
    """Neither as the label ahead of the last sequence's rows, nor for the tail rows themselves."""
    lengths = (4, 0, 6)
    batch = RaggedBatch(lengths, tail=50)
    labels = torch.arange(batch.total)
    labels[batch.valid :] = 999
    got = shift_targets(labels, batch.cu_seqlens, steps=steps, stride=stride)
    assert not (got == 999).any()
    assert (got[batch.valid :] == -100).all()
    for k in range(1, steps + 1):
        assert (got[:, k - 1] != -100).sum() == sum(max(n - k * stride, 0) for n in lengths)


@pytest.mark.parametrize("stride", [98, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1])
def test_shift_targets_past_every_end(backend, stride):
    """`steps * stride` may be more than any integer type holds."""
    batch = BATCHES["long_among_short"]
    got = shift_targets(torch.arange(batch.total), batch.cu_seqlens, steps=5, stride=stride)
    assert got.shape == (batch.total, 5)
    assert (got == -100).all()


@pytest.mark.parametrize(("offsets", "total"), [([0], 0), ([0, 0, 0], 0), ([0], 4), ([0, 0], 4)])
def test_shift_targets_without_rows_in_sequences(backend, offsets, total):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    assert shift_targets(torch.arange(total), cu_seqlens, steps=3).tolist() == [[-100] * 3] * total


def test_loss_of_shifted_targets_is_that_of_padded_labels():
    """A step's loss over a packed batch equals F.cross_entropy of the padded batch's shifted labels."""
    batch = BATCHES["ragged"]
    hidden, weight = torch.randn(batch.total, WIDTH).double(), torch.randn(VOCAB, WIDTH).double()
    labels = torch.randint(VOCAB, (batch.total,))
    targets = shift_targets(labels, batch.cu_seqlens, steps=2)
    got = multi_token_cross_entropy(hidden, weight, targets, return_step_losses=True)

    padded_labels = torch.full((batch.batch, batch.max_seqlen), -100)
    padded_hidden = torch.zeros(batch.batch, batch.max_seqlen, WIDTH).double()
    for i, rows in enumerate(batch.slices()):
        padded_labels[i, : rows.stop - rows.start] = labels[rows]
        padded_hidden[i, : rows.stop - rows.start] = hidden[rows]
    for k in (1, 2):
        logits = (padded_hidden @ weight.T)[:, :-k]
        want = F.cross_entropy(logits.flatten(0, 1), padded_labels[:, k:].flatten())
        assert_close(got.step_losses[k - 1], want)


def test_shift_targets_opcheck():
    for batch in (BATCHES["ragged"], BATCHES["no_sequences"]):
        labels = torch.arange(batch.total)
        torch.library.opcheck(torch.ops.stamp.shift_targets.default, (labels, batch.cu_seqlens, 3, 2, -100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.zeros(5)}, r"labels must have dtype torch\.int64, .*got torch\.float32"),
        ({"labels": torch.zeros(5, 1, dtype=torch.int64)}, r"labels must have shape \[T\], got \[5, 1\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens must have dtype torch\.int32"),
        ({"steps": 0}, r"steps must be in \[1, inf\), got 0"),
        ({"stride": 0}, r"stride must be in \[1, inf\), got 0"),
    ],
)
def test_shift_targets_bad_arguments(arguments, message):
    good = {"labels": torch.arange(5), "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "steps": 1}
    with pytest.raises(ValueError, match=message):
        shift_targets(**good | arguments)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], r"cu_seqlens\[0\] must be 0, got 1"),
        ([0, 3, 2], "cu_seqlens must never decrease, got 3 then 2 at index 1"),
        ([0, 6], r"cu_seqlens\[-1\] must be at most the number of rows 5, got 6"),
    ],
    ids=str,
)
def test_shift_targets_bad_contents(backend, offsets, message):
    with pytest.raises(RuntimeError, match=message):
        shift_targets(torch.arange(5), torch.tensor(offsets, dtype=torch.int32), steps=1)


@pytest.mark.parametrize(
    ("labels", "steps", "stride", "message"),
    [
        (torch.zeros(5, 1, dtype=torch.int64), 1, 1, "labels must have one dimension, got 2"),
        (torch.zeros(5), 1, 1, "labels must be int64, int32, int16, int8 or uint8"),
        (torch.arange(5), 0, 1, "steps and stride must be at least 1, got 0 and 1"),
        (torch.arange(5), 1, -2, "steps and stride must be at least 1, got 1 and -2"),
    ],
)
def test_shift_targets_raw_op_bad_arguments(labels, steps, stride, message):
    """What the public function refuses must not make the op read elsewhere."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stamp.shift_targets(labels, torch.tensor([0, 5], dtype=torch.int32), steps, stride, -100)


def test_examples():
    assert doctest.testmod(cross_entropy, extraglobs={"torch": torch}).failed == 0
