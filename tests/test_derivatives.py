"""What autograd, torch.func and vmap may ask of every differentiable op, and what is refused."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from closeness import assert_close

import stamp_kernels as sk

CU_SEQLENS = torch.tensor([0, 3, 7], dtype=torch.int32)
TOTAL, MAX_SEQLEN = 8, 4  # with one tail row


class DifferentiableOp(NamedTuple):
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    loss: Callable[..., torch.Tensor]  # a scalar, not linear in the op's result


def _attention(q, k, v, table):
    return sk.packed_attention(
        q, k, v, CU_SEQLENS, max_seqlen_q=MAX_SEQLEN, relative_bias=sk.RelativePositionBias(table)
    )  # fmt: skip


def _cross_entropy(memory):
    targets = torch.tensor([[1, 2], [0, -100], [4, 4], [3, 1], [2, 2], [-100, -100], [0, 1], [-100, -100]])
    return lambda *inputs: sk.multi_token_cross_entropy(
        inputs[0], inputs[1], targets, bias=inputs[2], memory=memory
    ).exp()  # fmt: skip


def _selection():
    return sk.select_tokens(torch.arange(float(TOTAL)), CU_SEQLENS, MAX_SEQLEN, keep_ratio=0.5)


OPS = {
    "attention": DifferentiableOp(
        lambda: (*(torch.randn(TOTAL, 2, 8) for _ in range(3)), torch.randn(8, 2)),
        lambda *inputs: _attention(*inputs).square().sum(),
    ),
    "cross_entropy_auto": DifferentiableOp(
        lambda: (torch.randn(TOTAL, 6), torch.randn(5, 6), torch.randn(5)), _cross_entropy("auto")
    ),
    "cross_entropy_minimal": DifferentiableOp(
        lambda: (torch.randn(TOTAL, 6), torch.randn(5, 6), torch.randn(5)), _cross_entropy("minimal")
    ),
    "gather": DifferentiableOp(
        lambda: (torch.randn(TOTAL, 6),), lambda x: sk.gather_tokens(x, _selection()).exp().sum()
    ),
    "prune": DifferentiableOp(
        lambda: (torch.randn(TOTAL, 6),),
        lambda x: sk.prune(x, torch.arange(float(TOTAL)), CU_SEQLENS, MAX_SEQLEN, keep_ratio=0.5).x.exp().sum(),
    ),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def leaves_of(op):
    return [x.requires_grad_() for x in op.inputs()]


def penalty_of(op, inputs):
    """A loss, and the penalty on the gradient of its first input."""
    loss = op.loss(*inputs)
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    return loss, grad.square().sum()


# Second derivatives


FIRST_ORDER_ONLY = "has derivatives of first order only"


def test_gradient_penalty_raises(op):
    inputs = leaves_of(op)
    _, penalty = penalty_of(op, inputs)
    with pytest.raises(RuntimeError, match=FIRST_ORDER_ONLY):
        penalty.backward()


def test_penalty_that_is_a_part_of_the_loss_raises(op):
    """The derivative of one input alone: autograd then skips the nodes that do not lead to it."""
    for wanted in range(len(op.inputs())):
        inputs = leaves_of(op)
        loss, penalty = penalty_of(op, inputs)
        with pytest.raises(RuntimeError, match=FIRST_ORDER_ONLY):
            torch.autograd.grad(loss + penalty, inputs[wanted])


def test_nested_transforms_raise(op):
    inputs = op.inputs()
    for wanted in range(len(inputs)):

        def penalty(*inputs):
            return torch.func.grad(op.loss)(*inputs).square().sum()

        with pytest.raises(RuntimeError, match=FIRST_ORDER_ONLY):
            torch.func.grad(penalty, argnums=wanted)(*inputs)


def test_recorded_gradient_may_be_left_alone(op):
    inputs = leaves_of(op)
    loss, _ = penalty_of(op, inputs)
    recorded = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, recorded, torch.autograd.grad(op.loss(*inputs), inputs)))


def test_reference_has_second_derivatives(op):
    inputs = [x.double().requires_grad_() for x in op.inputs()]
    with sk.use_backend("reference"):
        assert torch.autograd.gradgradcheck(op.loss, inputs)


# torch.func


def test_func_grad_equals_autograd(op):
    inputs = leaves_of(op)
    want = torch.autograd.grad(op.loss(*inputs), inputs)
    got = torch.func.grad(op.loss, argnums=tuple(range(len(inputs))))(*(x.detach() for x in inputs))
    assert all(map(torch.equal, got, want))


def test_vmap_equals_a_loop(op):
    if op.loss is OPS["prune"].loss:
        pytest.skip("the CPU sizes the result of prune by its contents, which vmap does not allow")
    first, *others = op.inputs()
    examples = torch.stack([first, torch.randn_like(first), 2 * first])
    in_dims = (0, *[None] * len(others))
    for function in (op.loss, torch.func.grad(op.loss)):
        got = torch.vmap(function, in_dims=in_dims)(examples, *others)
        assert torch.equal(got, torch.stack([function(x, *others) for x in examples]))


def test_vmap_of_ops_without_gradient():
    hidden, centrality = torch.randn(3, TOTAL, 4), torch.rand(3, TOTAL)
    got = torch.vmap(lambda h, c: sk.token_importance(h, c, CU_SEQLENS))(hidden, centrality)
    want = [sk.token_importance(h, c, CU_SEQLENS) for h, c in zip(hidden, centrality, strict=True)]
    assert torch.equal(got, torch.stack(want))


# Raw ops


def test_raw_gather_has_the_gradient_of_the_public_one():
    selection = _selection()
    x = torch.randn(TOTAL, 6, requires_grad=True)
    (raw,) = torch.ops.stamp.gather_tokens_forward([x], selection.indices)
    public = sk.gather_tokens(x, selection)
    got, want = (torch.autograd.grad(y.exp().sum(), x)[0] for y in (raw, public))
    assert torch.equal(got, want)


def test_raw_gather_adds_up_repeated_rows():
    x = torch.randn(3, 2, requires_grad=True)
    (y,) = torch.ops.stamp.gather_tokens_forward([x], torch.tensor([2, -1, 2, 0]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.tolist() == [[1, 1], [0, 0], [2, 2]]


def test_raw_ops_without_gradient_give_none():
    hidden = torch.randn(TOTAL, 4, requires_grad=True)
    assert not torch.ops.stamp.token_importance(hidden, torch.rand(TOTAL), CU_SEQLENS, 1, False).requires_grad


# Half precision


@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("loss_scale", [1.0, 1 / 3, 65_536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_with_loss_scale(dtype, loss_scale, memory):
    """Gradients wait for the upstream gradient in fp32: a scale neither overflows them nor rounds them twice."""
    num_rows, width, vocab = 4_096, 32, 64
    hidden, weight = torch.randn(num_rows, width).to(dtype), torch.randn(vocab, width).to(dtype)
    bias, targets = torch.randn(vocab).to(dtype), torch.randint(vocab, (num_rows, 1))
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = sk.multi_token_cross_entropy(hidden, weight, targets, bias=bias, memory=memory)
    got = torch.autograd.grad(loss * loss_scale, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits = torch.nn.functional.linear(*exact)
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets[:, 0]) * loss_scale, exact)
    for x, reference in zip(got, want, strict=True):
        if dtype == torch.float16 and loss_scale < 1 and x.shape == hidden.shape:
            continue  # 1 / N is below what fp16 holds without a loss scale
        rounded = reference.to(dtype).double()
        # As close as rounding the exact gradient once.
        assert (x.double() - reference).norm() < 1.05 * (rounded - reference).norm() + 1e-6 * reference.norm()
        assert_close(x, reference)
