"""The cross-entropy kernels, interpreted where there is no GPU, against the reference in float64.

test_cross_entropy.py checks what the loss is. These tests reach the kernels' own code paths: tiles, splits, lists of
rows, row chunks.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from closeness import assert_close, relative_error
from cross_entropy_cases import CASES, Case, forward_arguments
from op_kernels import launcher, reference
from torch import Tensor

pytest.importorskip("triton")

from stamp_kernels.common.arguments import LossNeeds, LossOptions
from stamp_kernels.common.steps import REDUCTIONS
from stamp_kernels.triton_kernels import constants
from stamp_kernels.triton_kernels.cross_entropy import backward, chunked, forward
from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers
from stamp_kernels.triton_kernels.cross_entropy.row_lists import list_rows
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import softmaxes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# bf16 products are wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture(autouse=True)
def chunks_of_few_logits_too(monkeypatch):
    monkeypatch.setattr(launchers, "MIN_LOGITS_IN_CHUNKS", 0)


@pytest.fixture(autouse=True)
def products_of_half_precision_on_a_cpu(monkeypatch):
    """torch multiplies 16-bit factors into fp32 only on a GPU."""

    def set_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)

    if DEVICE == "cpu":
        monkeypatch.setattr(chunked, "_set_product", set_product)


def arguments_in(dtype: torch.dtype, device: str, arguments: tuple) -> list:
    """Arguments of an op with the floating tensors in another dtype."""
    return [
        x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x for x in arguments
    ]


Layout = Callable[[Tensor], Tensor]


def assert_matches_reference(
    arguments: tuple,
    dtype: torch.dtype,
    ways: tuple[str, ...] = ("twice", "chunked"),
    layouts: tuple[Layout | None, ...] = (),
) -> None:
    """Losses, lse and gradients equal the reference's, both ways that the kernels compute them.

    Args:
        arguments: the arguments of the forward op, in float64; floating tensors must be exact in `dtype`.
        ways: "twice": the backward computes the logits again; "chunked": the gradients come with the loss.
        layouts: how the first arguments, hidden, weight, targets and bias, are in memory.
    """
    arguments = arguments_in(torch.float64, "cpu", arguments)
    given = arguments_in(dtype, DEVICE, arguments)
    for i, layout in enumerate(layouts):
        given[i] = given[i] if layout is None else layout(given[i])
    options, reduction = arguments[6:11], arguments[-1]
    needs = (True, True, arguments[3] is not None)
    loss, step_losses, step_scale, lse = reference("multi_token_cross_entropy_forward")(*arguments)
    grad_loss = torch.rand(loss.shape, dtype=torch.float64) + 0.5
    grads = reference("multi_token_cross_entropy_backward")(
        grad_loss, *arguments[:4], lse, step_scale, *options, *needs
    )
    if "twice" in ways:
        got = launcher("multi_token_cross_entropy_forward")(*given)
        for out, ref in zip(got, (loss, step_losses, step_scale, lse), strict=True):
            assert out.dtype == torch.float32
            assert_close(out.cpu(), ref, dtype)
        got = launcher("multi_token_cross_entropy_backward")(
            grad_loss.to(DEVICE, torch.float32), *given[:4], got[3], got[2], *options, *needs
        )
        for out, ref in zip(got, grads, strict=True):
            assert out.dtype == dtype
            assert_close(out.cpu(), ref)
    if "chunked" in ways and reduction != REDUCTIONS["none"]:
        got = launcher("multi_token_cross_entropy_with_gradients")(*given, *needs)
        for out, ref in zip(got[:2], (loss, step_losses), strict=True):
            assert_close(out.cpu(), ref, dtype)
        for out, ref in zip(got[2:], grads, strict=True):
            assert out.dtype == torch.float32
            assert_close(out.cpu(), ref / grad_loss, dtype)


def inputs_of(
    rows: int, width: int, classes: int, steps: int = 1, per_step: tuple[str, ...] = ("hidden",), **options: object
) -> tuple:
    """Arguments of the forward op with a bias, exact in every dtype; a quarter of the targets is ignored."""
    ranges = options.get("vocab_ranges", ((0, classes),) * steps)
    shapes = {"hidden": (rows, width), "weight": (classes, width), "bias": (classes,)}
    inputs = {
        name: torch.randn((steps, *shape) if name in per_step else shape).bfloat16().double()
        for name, shape in shapes.items()
    }
    inputs["weight"] = (inputs["weight"] / width**0.5).bfloat16().double()
    targets = torch.stack([torch.randint(start, end, (rows,)) for start, end in ranges], dim=1)
    targets = targets.masked_fill(torch.rand(rows, steps) < 0.25, -100)
    return forward_arguments(inputs | {"targets": targets} | options)


def with_alternating_dtypes(*values: tuple) -> list[tuple]:
    """Every combination of the values, each with the next of DTYPES."""
    return [(*x, dtype) for x, dtype in zip(itertools.product(*values), itertools.cycle(DTYPES), strict=False)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, dtype) for name in ("everything", "all_per_step", "ranges_bias") for dtype in DTYPES[1:]],
    ids=str,
)
def test_contract(name, dtype):
    assert_matches_reference(forward_arguments(CASES[name].inputs(dtype)), dtype)


@pytest.mark.parametrize(
    ("name", "reduction", "dtype"),
    with_alternating_dtypes(("shared", "everything", "all_ignored", "no_rows"), ("sum", "none")),
    ids=str,
)
def test_reductions(name, reduction, dtype):
    assert_matches_reference(forward_arguments(CASES[name].inputs(dtype), reduction), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "classes"),
    [
        (1, 1, 1),
        (140, 20, 255),
        (33, 33, 256),
        (40, 128, 257),
        (140, 200, 150),
        (70, 300, 80),
        (5, 16, 31),
        (65, 257, 64),
    ],
)
def test_tiles(rows, width, classes, dtype):
    """More rows and classes than a tile has, and widths of more than one block."""
    assert_matches_reference(inputs_of(rows, width, classes, steps=2), dtype)


@pytest.mark.parametrize(
    ("steps", "per_step"),
    [(1, ()), (8, ("hidden",)), *((4, x) for x in ((), ("hidden",), ("weight", "bias"), ("hidden", "weight", "bias")))],
    ids=str,
)
def test_steps(steps, per_step):
    assert_matches_reference(inputs_of(20, 16, 50, steps, per_step, label_smoothing=0.1, z_loss=0.01), torch.float32)


@pytest.mark.parametrize("per_step", [(), ("hidden",)], ids=str)
def test_classes_split_among_programs(monkeypatch, per_step):
    monkeypatch.setattr(forward, "CLASSES_PER_SPLIT", 96)
    arguments = inputs_of(70, 16, 500, 3, per_step, label_smoothing=0.1, z_loss=0.01)
    assert_matches_reference(arguments, torch.float32, ("twice",))
    # Ranges of fewer classes than there are splits
    ranges = ((0, 500), (3, 40), (400, 500))
    assert_matches_reference(inputs_of(40, 16, 500, 3, per_step, vocab_ranges=ranges), torch.float32, ("twice",))


@pytest.mark.parametrize(
    ("number", "per_step"), [(1, ()), (3, ("hidden", "weight")), (3, ()), (7, ("hidden", "weight"))], ids=str
)
def test_sums_of_gradients_split_among_programs(monkeypatch, number, per_step):
    monkeypatch.setattr(backward, "num_splits", lambda *_: number)
    assert_matches_reference(inputs_of(150, 40, 170, 2, per_step), torch.float32, ("twice",))
    assert_matches_reference(inputs_of(3, 40, 5, 2, per_step), torch.float16, ("twice",))


@pytest.mark.parametrize(("per_step", "dtype"), with_alternating_dtypes(((), ("hidden",), ("weight", "bias"))), ids=str)
def test_row_chunks(monkeypatch, per_step, dtype):
    monkeypatch.setattr(chunked, "row_chunk_size", lambda *_: 16)
    for options in ({}, {"vocab_ranges": ((0, 40), (0, 77), (5, 6))}):
        assert_matches_reference(inputs_of(39, 24, 77, 3, per_step, **options), dtype, ("chunked",))


@pytest.mark.parametrize("name", ["shared", "everything", "all_ignored", "no_rows"])
def test_few_logits_are_not_chunked(monkeypatch, name):
    monkeypatch.undo()
    monkeypatch.delattr(chunked, "stamp_cross_entropy_chunk_kernel")
    assert_matches_reference(forward_arguments(CASES[name].inputs(torch.float32)), torch.float32, ("chunked",))


@pytest.mark.parametrize("classes", [4097, 9000])
def test_rows_of_several_blocks_in_place(classes):
    """Gradients of 16 bits over logits of 32, block after block."""
    assert_matches_reference(inputs_of(5, 8, classes), torch.float16, ("chunked",))


# Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ways", ["twice", "chunked"])
def test_nan_in_ignored_rows_reaches_nothing(ways, dtype):
    arguments = inputs_of(75, 16, 40, 2)
    hidden, _, targets, _ = arguments[:4]
    targets[20:60] = -100
    hidden[:, 20:50], hidden[:, 50:60] = torch.nan, torch.inf
    assert_matches_reference(arguments, dtype, (ways,))
    shared = inputs_of(75, 16, 40, 2, per_step=())
    shared[2][20:60] = -100
    shared[0][20:60] = torch.nan
    assert_matches_reference(shared, dtype, (ways,))


def test_nan_in_a_valid_row_shows():
    arguments = inputs_of(40, 16, 40)
    arguments[2][3] = 1
    arguments[0][:, 3] = torch.nan
    given = arguments_in(torch.float32, DEVICE, arguments)
    assert launcher("multi_token_cross_entropy_forward")(*given)[0].isnan()
    assert launcher("multi_token_cross_entropy_with_gradients")(*given, True, True, True)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_classes_ruled_out_by_their_bias(dtype):
    """Whole tiles of them: the largest logit so far is -inf, and the difference of two such logits is NaN."""
    arguments = inputs_of(40, 8, 600)
    targets, bias = arguments[2:4]
    bias[:200], bias[400:500] = -torch.inf, -torch.inf
    targets[targets >= 0] = 200 + targets[targets >= 0] % 200
    assert_matches_reference(arguments, dtype)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_logits_far_from_zero(shift):
    """A masked class, whose logit is 0, must not overflow beside an lse of -195; nor a row without a valid target."""
    arguments = inputs_of(40, 8, 50, steps=2)
    arguments[3][:] += shift
    assert_matches_reference(arguments, torch.float32)


def test_targets_outside_the_range_are_not_read():
    """On a GPU only STAMP_KERNELS_CHECK=1 finds them. Without it they must not lead outside the weight."""
    arguments = list(inputs_of(40, 8, 50))
    arguments[2][5], arguments[2][6] = 10**12, -(10**12)
    given = arguments_in(torch.float32, "cpu", arguments)
    softmaxes = softmaxes_of(*(x.to(DEVICE) for x in given[:4]), [(0, 50)])
    lists = list_rows(softmaxes, -100)
    options, needs = LossOptions(None, -100, 0.0, 0.0, None), LossNeeds(True, True, True)
    loss, _, scale, lse = forward.forward(softmaxes, lists, None, options, REDUCTIONS["mean"])
    grads = backward.backward(softmaxes, lists, lse, scale, options, needs, dtype=torch.float32)
    by_chunks = chunked.with_gradients(softmaxes, scale, options, needs)
    assert all(torch.isfinite(x).all() for x in (loss, *grads, *by_chunks))


def test_contents_are_checked_where_asked(monkeypatch):
    monkeypatch.setenv("STAMP_KERNELS_CHECK", "1")
    arguments = inputs_of(40, 8, 50)
    arguments[2][5, 0] = 50
    given = arguments_in(torch.float32, DEVICE, arguments)
    message = r"targets\[5, 0\] is 50, .*range \[0, 50\) of step 0 nor ignore_index \(-100\)"
    with pytest.raises(RuntimeError, match=message):
        launcher("multi_token_cross_entropy_forward")(*given)
    with pytest.raises(RuntimeError, match=message):
        launcher("multi_token_cross_entropy_with_gradients")(*given, True, True, True)


# Scales


@pytest.mark.parametrize("ways", ["twice", "chunked"])
def test_small_probabilities_in_half_precision(ways):
    """Below 1e-6, where fp16 has steps of 6e-8. Hidden states are large, so that the gradient is a normal number."""
    hidden, weight, targets, bias, *rest = inputs_of(260, 8, 300)
    bias[150:] = -10.0
    targets[targets >= 150] -= 150
    arguments = (64 * hidden, weight / 64, targets, bias, *rest[:-1], REDUCTIONS["sum"])
    given, exact = arguments_in(torch.float16, DEVICE, arguments), arguments_in(torch.float64, "cpu", arguments)
    _, _, _, want, _ = reference("multi_token_cross_entropy_with_gradients")(*exact, True, True, True)
    if ways == "chunked":
        got = launcher("multi_token_cross_entropy_with_gradients")(*given, False, True, False)[3]
    else:
        _, _, scale, lse = launcher("multi_token_cross_entropy_forward")(*given)
        one = torch.ones((), device=DEVICE)
        _, got, _ = launcher("multi_token_cross_entropy_backward")(
            one, *given[:4], lse, scale, *given[6:11], False, True, False
        )
    assert_close(got[150:].cpu(), want[150:], torch.float16)


def test_half_precision_gradients_scale_with_the_loss():
    """The gradient of a mean over many rows, times a small step weight, is far below what fp16 holds."""
    arguments = arguments_in(torch.float16, DEVICE, inputs_of(70, 8, 60, steps=2))
    _, _, scale, lse = launcher("multi_token_cross_entropy_forward")(*arguments)
    small, large = (
        launcher("multi_token_cross_entropy_backward")(
            torch.tensor(grad, device=DEVICE), *arguments[:4], lse, scale, *arguments[6:11], False, False, True
        )[2]
        for grad in (2.0**-12, 1.0)
    )
    assert_close(small * 2.0**12, large.double())


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
@pytest.mark.parametrize("min_logits", [0, 10**9], ids=["chunks", "few logits"])
def test_gradients_that_wait_are_not_rounded(monkeypatch, min_logits, loss_scale):
    """Of a mean over many rows they are far below what fp16 holds, until the gradient of the loss scales them."""
    monkeypatch.setattr(launchers, "MIN_LOGITS_IN_CHUNKS", min_logits)
    arguments = inputs_of(70, 8, 60, steps=2, per_step=(), step_weights=(2.0**-12, 2.0**-14))
    given, exact = arguments_in(torch.float16, DEVICE, arguments), arguments_in(torch.float64, "cpu", arguments)
    grads = launcher("multi_token_cross_entropy_with_gradients")(*given, True, True, True)[2:]
    want = reference("multi_token_cross_entropy_with_gradients")(*exact, True, True, True)[2:]
    in_reference = reference("multi_token_cross_entropy_with_gradients")(
        *arguments_in(torch.float16, "cpu", arguments), True, True, True
    )[2:]
    _, _, scale, lse = launcher("multi_token_cross_entropy_forward")(*given)
    recomputed = launcher("multi_token_cross_entropy_backward")(
        torch.tensor(loss_scale, device=DEVICE), *given[:4], lse, scale, *given[6:11], True, True, True
    )
    for kept, of_reference, again, ref in zip(grads, in_reference, recomputed, want, strict=True):
        assert kept.dtype == of_reference.dtype == torch.float32
        assert_close(kept.cpu(), ref, torch.float16)
        assert_close(of_reference, ref, torch.float16)
        returned = (kept * loss_scale).to(torch.float16).cpu()
        assert relative_error(returned, ref * loss_scale) < 1.2 * relative_error(again.cpu(), ref * loss_scale)


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_of_row_chunks_are_rounded_as_linear_does(dtype, spread):
    """No worse than PyTorch's own loss on logits of 16 bits, also if they are large: at 16 bf16 has steps of 1/8."""
    allowed = 1.5 if (dtype, DEVICE) == (torch.bfloat16, "cpu") else 1.1  # the interpreter truncates to bf16
    inputs = dict(
        hidden=(spread * torch.randn(300, 64)).to(dtype).double(),
        weight=(torch.randn(700, 64) / 8).to(dtype).double(),
        targets=torch.randint(700, (300, 1)),
    )
    arguments = forward_arguments(inputs)
    given = arguments_in(dtype, DEVICE, arguments)
    loss, _, *grads, _ = launcher("multi_token_cross_entropy_with_gradients")(*given, True, True, False)
    exact = reference("multi_token_cross_entropy_with_gradients")(*arguments, True, True, False)
    hidden, weight = (x.detach().requires_grad_() for x in given[:2])
    logits = torch.nn.functional.linear(hidden, weight).float()
    peer = torch.nn.functional.cross_entropy(logits, given[2][:, 0])
    peer_grads = torch.autograd.grad(2.0**16 * peer, (hidden, weight))
    assert_close(loss.cpu(), exact[0], dtype)
    assert (loss.cpu() - exact[0]).abs() <= 1.1 * (peer.cpu() - exact[0]).abs() + 1e-6 * exact[0]
    for got, of_peer, ref in zip(grads, peer_grads, exact[2:4], strict=True):
        assert_close(got.cpu(), ref, dtype)
        assert relative_error(got.cpu(), ref) <= allowed * relative_error(of_peer.cpu() / 2.0**16, ref)


def test_softcap_is_exact_for_every_logit():
    """A cap far above the logits changes them little, and must not add an error of its own."""
    for softcap in (0.5, 3.0, 30.0, 3000.0):
        z = softcap * torch.logspace(-6, 1, 1001, dtype=torch.float64)
        z = torch.cat([-z, z, torch.zeros(1)]).float().double()
        targets = torch.zeros(len(z), 1, dtype=torch.int64)
        arguments = forward_arguments(
            dict(hidden=z[:, None], weight=torch.ones(1, 1), targets=targets, softcap=softcap)
        )
        lse = launcher("multi_token_cross_entropy_forward")(*arguments_in(torch.float32, DEVICE, arguments))[3]
        want = softcap * torch.tanh(z / softcap)  # the lse of one class is its logit
        assert ((lse[0].cpu().double() - want).abs() <= 5e-7 * want.abs()).all()


@pytest.mark.parametrize("kernel", [launcher, reference])
def test_z_loss_of_one_class(kernel):
    """The gradient is 2 zeta lse: 1 + 2 zeta lse - 1 would lose its digits."""
    arguments = inputs_of(40, 8, 1, z_loss=1e-4)
    op = "multi_token_cross_entropy_with_gradients"
    got = kernel(op)(*arguments_in(torch.float32, DEVICE, arguments), True, True, True)[2:]
    want = reference(op)(*arguments_in(torch.float64, "cpu", arguments), True, True, True)[2:]
    for out, ref in zip(got, want, strict=True):
        assert relative_error(out.cpu(), ref) < 1e-6


@pytest.mark.parametrize("grad", [0.0, torch.inf, torch.nan])
def test_zero_and_infinite_gradients_of_the_loss(grad):
    arguments = inputs_of(40, 8, 50, steps=2)
    given = arguments_in(torch.float32, DEVICE, arguments)
    _, _, scale, lse = launcher("multi_token_cross_entropy_forward")(*given)
    grads = launcher("multi_token_cross_entropy_backward")(
        torch.tensor(grad, device=DEVICE), *given[:4], lse, scale, *given[6:11], True, True, True
    )
    for x in grads:
        assert not x.any() if grad == 0 else not torch.isfinite(x[x != 0]).any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_needed(needs):
    arguments = arguments_in(torch.float32, DEVICE, inputs_of(40, 8, 50, steps=2))
    _, _, scale, lse = launcher("multi_token_cross_entropy_forward")(*arguments)
    one = torch.ones((), device=DEVICE)
    every, some = (
        launcher("multi_token_cross_entropy_backward")(one, *arguments[:4], lse, scale, *arguments[6:11], *wanted)
        for wanted in ((True,) * 3, needs)
    )
    by_chunks = launcher("multi_token_cross_entropy_with_gradients")(*arguments, *needs)[2:]
    for want, got, chunk, is_needed in zip(every, some, by_chunks, needs, strict=True):
        if is_needed:
            assert torch.equal(got, want)
            assert_close(chunk, want.double())
        else:
            assert got.shape == chunk.shape == (0,)


def test_no_rows_and_no_features():
    for rows, width in ((0, 8), (5, 0)):
        assert_matches_reference(inputs_of(rows, width, 30, steps=2), torch.float32)


# Inputs in memory


def at_offset(offset: int) -> Layout:
    return lambda x: x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)


def rows_apart(extra: int) -> Layout:
    """Each row followed by `extra` elements of something else."""
    return lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] + extra)[..., : x.shape[-1]].copy_(x)


def swapped(i: int, j: int) -> Layout:
    return lambda x: x.transpose(i, j).contiguous().transpose(i, j)


LAYOUTS = {f"{offset} elements into the storage": at_offset(offset) for offset in range(1, 9)}
LAYOUTS |= {f"rows {extra} elements apart": rows_apart(extra) for extra in (1, 2, 4, 8, 24)}
LAYOUTS |= {"features apart": swapped(-1, -2), "steps inside": swapped(0, 1)}


@pytest.mark.parametrize(
    ("name", "sizes"),
    list(zip(LAYOUTS, itertools.cycle([(24, 49, torch.float16), (17, 50, torch.float32)]), strict=False)),
    ids=str,
)
def test_strided_inputs(name, sizes):
    """Even and odd widths, and odd numbers of classes, such as GPT-2's 50,257."""
    width, classes, dtype = sizes
    arguments = inputs_of(20, width, classes, steps=2, per_step=("hidden", "weight", "bias"))
    assert_matches_reference(arguments, dtype, layouts=(LAYOUTS[name], LAYOUTS[name], swapped(0, 1), swapped(0, 1)))


@pytest.mark.parametrize(
    ("width", "dtype"), [(1, DTYPES[1]), (7, torch.float32), (8, DTYPES[1]), (100, torch.float32)], ids=str
)
def test_slices_of_a_shared_weight_and_bias(width, dtype):
    """In a model with one flat buffer of parameters they begin at any element."""
    weight, bias = at_offset(3), at_offset(5)
    arguments = inputs_of(20, width, 49, steps=2, per_step=(), vocab_ranges=((3, 40), (16, 49)))
    assert_matches_reference(arguments, dtype, layouts=(None, weight, None, bias))


@pytest.mark.parametrize(
    ("classes", "dtype"), [(17, torch.float32), *((n, DTYPES[1]) for n in (1, 15, 16, 17, 33))], ids=str
)
def test_rows_of_logits_that_end_within_a_vector(classes, dtype):
    """What is in memory past the last class of a row has no effect."""
    arguments = inputs_of(20, 8, classes, steps=2, label_smoothing=0.1, z_loss=0.01, softcap=3.0)
    assert_matches_reference(arguments, dtype, ("chunked",))


@pytest.mark.parametrize(
    ("span", "per_step"),
    [((0, 150), ("hidden",)), ((16, 150), ()), ((3, 40), ("hidden", "weight", "bias")), ((67, 150), ()),
     ((16, 120), ("hidden",))],
    ids=str,
)  # fmt: skip
def test_one_range_for_all_steps(span, per_step):
    """The range is an argument of the kernels, not a tensor on the device."""
    arguments = inputs_of(70, 16, 150, 2, per_step, vocab_ranges=(span,) * 2, label_smoothing=0.1)
    assert softmaxes_of(*arguments[:4], [span] * 2).range_arguments()["ranges_ptr"] is None
    assert_matches_reference(arguments, torch.float32)


# Step weights and other dtypes


def test_changing_step_weights_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(constants, "_CONSTANTS", {})
    arguments = arguments_in(torch.float32, DEVICE, inputs_of(4, 8, 9, steps=2, vocab_ranges=((0, 9), (2, 9))))
    losses = {}
    for weight in (0.5, 1.0, 2.0):
        arguments[4] = [1.0, weight]
        loss, step_losses, _, _ = launcher("multi_token_cross_entropy_forward")(*arguments)
        losses[weight] = loss, step_losses
    for weight, (loss, step_losses) in losses.items():
        assert_close(loss.cpu(), (step_losses[0] + weight * step_losses[1]).double().cpu(), torch.float32)
    assert [name for name, _ in constants._CONSTANTS] == [("vocab_ranges", ((0, 9), (2, 9)))]


def test_fp64_goes_to_the_reference():
    arguments = forward_arguments(Case(("hidden",), bias=True).inputs(torch.float64))
    got = launcher("multi_token_cross_entropy_forward")(*arguments)
    for out, want in zip(got, reference("multi_token_cross_entropy_forward")(*arguments), strict=True):
        assert out.dtype == torch.float64 and torch.equal(out, want)
