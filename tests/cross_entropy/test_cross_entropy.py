"""multi_token_cross_entropy against torch's cross-entropy in float64: losses, gradients, what counts for nothing."""

import dataclasses

import pytest
import torch
from closeness import assert_close
from cross_entropy_cases import (
    CASES,
    RANGES,
    Case,
    assert_matches_dense,
    assert_results_close,
    dense_cross_entropy,
    expected_results,
    forward_arguments,
    gradients,
    leaves,
    results,
)
from op_kernels import reference
from pairwise import pairwise

from stamp_kernels._backend import use_backend
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import MultiTokenLoss, multi_token_cross_entropy
from stamp_kernels.reference import cross_entropy as plain_pytorch

# The backend, and the setting of memory, which the reference ignores.
WAYS = {"ops": ("auto", "auto"), "minimal memory": ("auto", "minimal"), "reference": ("reference", "auto")}


# Values and gradients


@pytest.mark.core
@pairwise(name=CASES, dtype=[torch.float64, torch.float32, torch.float16, torch.bfloat16], way=WAYS)
def test_matches_dense(name, dtype, way):
    backend, memory = WAYS[way]
    with use_backend(backend):
        assert_matches_dense(CASES[name].inputs(dtype) | {"memory": memory})


@pytest.mark.core
@pairwise(
    indirect=["backend"],
    name=["shared", "everything", "all_ignored", "no_rows"],
    reduction=["sum", "none"],
    backend=["auto", "reference"],
)
def test_reductions(backend, name, reduction):
    assert_matches_dense(CASES[name].inputs(), reduction)


@pytest.mark.parametrize("name", CASES)
def test_reference_of_the_forward_op_matches_dense(name):
    """All that the forward op returns."""
    inputs = CASES[name].inputs()
    detached = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    got = reference("multi_token_cross_entropy_forward")(*forward_arguments(inputs))
    for out, want in zip(got, dense_cross_entropy(**detached), strict=True):
        assert_close(out, want)


@pytest.mark.parametrize("tile", [(5, 3), (64, 8), (7, 100)], ids=str)
@pytest.mark.parametrize("name", ["all_per_step", "everything"])
def test_many_tiles_of_the_reference(monkeypatch, name, tile):
    """Its kernels serve devices that have no other."""
    tile_rows, tile_classes = tile
    monkeypatch.setattr(plain_pytorch, "TILE_CLASSES", tile_classes)
    monkeypatch.setattr(plain_pytorch, "TILE_BYTES", 8 * tile_rows * tile_classes)
    inputs = CASES[name].inputs()
    loss, step_losses, *grads = reference("multi_token_cross_entropy_with_gradients")(
        *forward_arguments(inputs), True, True, True
    )
    dense = dense_cross_entropy(**inputs)
    assert_close(loss, dense.loss)
    assert_close(step_losses, dense.step_losses)
    for got, want in zip(grads, torch.autograd.grad(dense.loss, leaves(inputs)), strict=True):
        assert_close(got, want)


def test_fp32_bias_beside_bf16_weight(backend):
    assert_matches_dense(CASES["all_per_step"].inputs(torch.bfloat16, bias_dtype=torch.float32))


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


def test_named_tuple_only_with_step_losses(backend):
    inputs = CASES["shared"].inputs()
    assert isinstance(multi_token_cross_entropy(**inputs, return_step_losses=True), MultiTokenLoss)
    assert isinstance(multi_token_cross_entropy(**inputs), torch.Tensor)


@pytest.mark.parametrize("name", ["shared", "everything"])
def test_non_contiguous_inputs(backend, name):
    inputs = CASES[name].inputs()
    want = results(inputs)
    strided = {}
    for key in ("hidden", "weight", "targets"):
        x = inputs[key].detach()
        wider = torch.cat([x.transpose(-1, -2), x.transpose(-1, -2)], dim=-1)[..., : x.shape[-2]]
        strided[key] = wider.transpose(-1, -2).requires_grad_(x.is_floating_point())
        assert not strided[key].is_contiguous()
    assert_results_close(results(inputs | strided), want)


def test_two_runs_give_the_same_bits():
    inputs = CASES["everything"].inputs(torch.float32)
    first, second = results(inputs), results(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    inputs = dataclasses.replace(CASES["everything"], num_rows=4).inputs()
    others = {name: x for name, x in inputs.items() if name not in ("hidden", "weight", "bias")}

    def loss(hidden, weight, bias):
        return multi_token_cross_entropy(hidden, weight, bias=bias, **others, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves(inputs), fast_mode=True)


# Rows and classes that count for nothing


@pytest.mark.core
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
    inputs = CASES["all_ignored"].inputs(torch.float32)
    with torch.no_grad():
        inputs["bias"] += 200.0  # exp(200) is infinite in fp32
    loss = multi_token_cross_entropy(**inputs)
    assert loss == 0
    assert all(grad.count_nonzero() == 0 for grad in gradients(loss, inputs))


def test_large_logits_do_not_overflow(backend):
    inputs = CASES["z_loss"].inputs(torch.float32)
    with torch.no_grad():
        inputs["hidden"] *= 1e3
    assert_matches_dense(inputs)


def test_class_ruled_out_by_its_bias(backend):
    inputs = CASES["all_per_step"].inputs()
    inputs["targets"].clamp_(max=40)
    with torch.no_grad():
        inputs["bias"][:, 41:] = -torch.inf
    assert_matches_dense(inputs)


def test_only_the_ranges_get_gradient(backend):
    inputs = Case(bias=True, options=(("vocab_ranges", ((10, 20), (30, 31), (12, 25))),)).inputs()
    _, grad_weight, grad_bias = gradients(multi_token_cross_entropy(**inputs), inputs)
    touched = torch.zeros(len(inputs["weight"]), dtype=torch.bool)
    touched[10:25] = True
    assert torch.equal(grad_weight.abs().sum(1) > 0, touched)
    assert torch.equal(grad_bias != 0, touched)


# Autocast


def test_autocast_casts_only_hidden_and_weight(backend):
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


def test_autocast_unifies_dtypes(backend):
    """hidden and weight may come in different ones."""
    inputs = CASES["shared"].inputs(torch.float32)
    inputs["hidden"] = inputs["hidden"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(multi_token_cross_entropy(**inputs))


def test_autocast_leaves_float64_alone(backend):
    inputs = CASES["everything"].inputs()
    want = expected_results(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_results_close(results(inputs), want)


# Targets that are no class


@pytest.mark.parametrize("target", [16, 29, -5])
def test_target_outside_its_range(backend, target):
    inputs = CASES["ranges"].inputs()
    assert inputs["vocab_ranges"] == RANGES
    inputs["targets"][4, 1] = target
    message = rf"targets\[4, 1\] is {target}, .*range \[17, 29\) of step 1 nor ignore_index \(-100\)"
    with pytest.raises(RuntimeError, match=message):
        multi_token_cross_entropy(**inputs)


def test_target_outside_the_vocabulary(backend):
    inputs = CASES["shared"].inputs()
    inputs["targets"][-1, 2] = 53
    with pytest.raises(RuntimeError, match=r"targets\[36, 2\] is 53, .*range \[0, 53\)"):
        multi_token_cross_entropy(**inputs)
