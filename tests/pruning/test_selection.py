"""select_tokens and gather_tokens, against a stable sort in Python and against autograd of index_select."""

import math
import re
from fractions import Fraction

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

import stamp_kernels.ops.pruning.budget as budget_ops
from stamp_kernels.common.budget import ceil_of_ratio, keep_ratio_to_q32
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection, select_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Few distinct values, so that ties are everywhere; the largest float and its neighbours of the order's ends too.
VALUES = [-math.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3.4e38, math.inf, math.nan]


def oracle(batch: RaggedBatch, importance: Tensor, protect: Tensor | None, budgets: list[int]) -> list[list[int]]:
    """Rows that each sequence keeps; `budgets` are the unprotected tokens that it may keep."""
    scores = importance.tolist()
    kept = []
    for rows, budget in zip(batch.slices(), budgets, strict=True):
        always = [i for i in range(rows.start, rows.stop) if protect is not None and protect[i]]
        others = [i for i in range(rows.start, rows.stop) if i not in set(always)]
        others.sort(key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i))
        kept.append(sorted(always + others[:budget]))
    return kept


def unprotected_lengths(batch: RaggedBatch, protect: Tensor | None) -> list[int]:
    return [rows.stop - rows.start - (0 if protect is None else int(protect[rows].sum())) for rows in batch.slices()]


def exact_ceil(ratio: Fraction, n: int) -> int:
    return math.ceil(ratio * n)


def assert_selects(selection: TokenSelection, batch: RaggedBatch, kept: list[list[int]]) -> None:
    """The selection names exactly the rows `kept`, and its fields agree with one another."""
    rows = [row for sequence in kept for row in sequence]
    offsets = torch.tensor([0, *(len(sequence) for sequence in kept)]).cumsum(0)
    assert selection.cu_seqlens.dtype == torch.int32
    assert selection.cu_seqlens.tolist() == offsets.tolist()
    assert selection.indices.dtype == torch.int64
    assert selection.indices.shape[0] >= len(rows)
    assert selection.indices.tolist() == rows + [-1] * (selection.indices.shape[0] - len(rows))
    inverse = [-1] * batch.total
    for kept_row, row in enumerate(rows):
        inverse[row] = kept_row
    assert selection.inverse.dtype == torch.int32
    assert selection.inverse.tolist() == inverse
    assert selection.total_source == batch.total
    assert max((len(sequence) for sequence in kept), default=0) <= selection.max_seqlen <= batch.max_seqlen


@st.composite
def scored_batches(draw) -> tuple[RaggedBatch, Tensor, Tensor | None]:
    batch = draw(ragged_batches())
    importance = torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=batch.total, max_size=batch.total)))
    importance = importance.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))
    protect = draw(st.none() | st.lists(st.booleans(), min_size=batch.total, max_size=batch.total))
    return batch, importance, None if protect is None else torch.tensor(protect, dtype=torch.bool)


RATIOS = st.sampled_from([Fraction(0), Fraction(1), Fraction(1, 3), Fraction(2, 3), Fraction(1, 2), Fraction(3, 7)])


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(scored=scored_batches(), ratio=RATIOS, min_keep=st.integers(0, 3))
def test_keeps_the_best_share_of_each_sequence(device, scored, ratio, min_keep):
    batch, importance, protect = scored
    selection = select_tokens(
        importance.to(device),
        batch.cu_seqlens.to(device),
        batch.max_seqlen,
        keep_ratio=float(ratio),
        min_keep=min_keep,
        protect=None if protect is None else protect.to(device),
    )
    budgets = [max(min_keep, exact_ceil(ratio, n)) for n in unprotected_lengths(batch, protect)]
    assert_selects(selection, batch, oracle(batch, importance, protect, budgets))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(scored=scored_batches(), data=st.data(), min_keep=st.integers(0, 2), as_tensor=st.booleans())
def test_keeps_a_given_count_of_each_sequence(device, scored, data, min_keep, as_tensor):
    batch, importance, protect = scored
    if as_tensor:
        counts = data.draw(st.lists(st.integers(0, 15), min_size=batch.batch, max_size=batch.batch))
        keep_count = torch.tensor(counts, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])), device=device)
    else:
        keep_count = data.draw(st.integers(0, 15))
        counts = [keep_count] * batch.batch
    selection = select_tokens(
        importance.to(device),
        batch.cu_seqlens.to(device),
        batch.max_seqlen,
        keep_count=keep_count,
        min_keep=min_keep,
        protect=None if protect is None else protect.to(device),
    )
    kept = oracle(batch, importance, protect, [max(min_keep, count) for count in counts])
    assert_selects(selection, batch, kept)


@given(scored=scored_batches(), ratio=RATIOS)
def test_budget_of_max_seqlen_is_the_same_for_every_sequence(scored, ratio):
    batch, importance, protect = scored
    max_seqlen = batch.max_seqlen + 4  # an upper bound, as a padded length is
    selection = select_tokens(
        importance, batch.cu_seqlens, max_seqlen, keep_ratio=float(ratio), protect=protect, budget="max_seqlen"
    )
    budget = max(1, exact_ceil(ratio, max_seqlen))
    assert_selects(selection, batch, oracle(batch, importance, protect, [budget] * batch.batch))


@given(denominator=st.integers(1, 64), data=st.data())
def test_ceiling_is_exact_for_ratios_of_small_numbers(denominator, data):
    # The fixed point is off by at most 1.5 n / 2**32, which cannot carry a multiple of 1 / denominator over an integer.
    ratio = Fraction(data.draw(st.integers(0, denominator)), denominator)
    lengths = data.draw(st.lists(st.integers(0, 2**24), min_size=1))
    ratio_q32 = keep_ratio_to_q32(float(ratio))
    expected = [exact_ceil(ratio, n) for n in lengths]
    assert [ceil_of_ratio(ratio_q32, n) for n in lengths] == expected
    assert ceil_of_ratio(ratio_q32, torch.tensor(lengths)).tolist() == expected


def test_ceiling_neither_overflows_nor_wraps_at_the_longest_sequence():
    longest = torch.tensor([2**31 - 1])
    assert ceil_of_ratio(keep_ratio_to_q32(1.0), longest).item() == 2**31 - 1
    assert ceil_of_ratio(keep_ratio_to_q32(0.0), longest).item() == 0


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_named_batches(device, name):
    batch = BATCHES[name]
    importance = torch.rand(batch.total)
    importance[batch.valid :] = math.inf  # tail rows are never chosen, however important
    selection = select_tokens(importance.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=0.5)
    kept = oracle(batch, importance, None, [max(1, exact_ceil(Fraction(1, 2), n)) for n in batch.lengths])
    assert_selects(selection, batch, kept)


@pytest.mark.parametrize("device", DEVICES)
def test_many_sequences(device):
    lengths = tuple(torch.randint(0, 9, (5000,)).tolist())
    batch = RaggedBatch(lengths, tail=7)
    importance = torch.randint(0, 4, (batch.total,)).float()
    selection = select_tokens(importance.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=1 / 3)
    kept = oracle(batch, importance, None, [max(1, exact_ceil(Fraction(1, 3), n)) for n in lengths])
    assert_selects(selection, batch, kept)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_importance(device):
    batch = BATCHES["ragged"]
    importance = torch.rand(batch.total, 3, device=device)
    cu_seqlens = batch.cu_seqlens.to(device)
    selection = select_tokens(importance[:, 1], cu_seqlens, batch.max_seqlen, keep_count=2)
    expected = select_tokens(importance[:, 1].contiguous(), cu_seqlens, batch.max_seqlen, keep_count=2)
    assert torch.equal(selection.indices, expected.indices)


def test_importance_gets_no_gradient():
    batch = BATCHES["ragged"]
    importance = torch.rand(batch.total, requires_grad=True)
    selection = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5)
    assert not selection.indices.requires_grad
    assert not gather_tokens(torch.rand(batch.total, 2), selection).requires_grad


# The number of result rows, T'


@pytest.fixture
def only_the_device_knows(monkeypatch):
    """What a cu_seqlens on a GPU means: the host cannot compute the kept lengths."""
    monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)


RAGGED = BATCHES["ragged"]
RAGGED_PROTECT = torch.arange(RAGGED.total) % 5 == 0


def test_rows_and_max_seqlen_are_exact_where_the_host_knows_the_lengths():
    selection = select_tokens(torch.rand(RAGGED.total), RAGGED.cu_seqlens, 100, keep_ratio=0.5)
    assert selection.indices.shape[0] == selection.cu_seqlens[-1] == sum(math.ceil(n / 2) for n in RAGGED.lengths)
    assert selection.max_seqlen == math.ceil(max(RAGGED.lengths) / 2)


@pytest.mark.parametrize(
    ("arguments", "rows", "max_seqlen"),
    [
        # T = 31 rows, B = 6 sequences of at most 13 tokens
        ({"keep_ratio": 1 / 3}, 10 + 6, 5),
        ({"keep_ratio": 1 / 3, "min_keep": 0}, 10 + 6, 5),
        ({"keep_ratio": 1 / 3, "min_keep": 3}, 10 + 6 * 3, 5),
        ({"keep_ratio": 0.5, "budget": "max_seqlen"}, 31, 7),
        ({"keep_count": 2}, 6 * 2, 2),
        ({"keep_count": 2, "min_keep": 4}, 6 * 4, 4),
        ({"keep_count": 20}, 31, 13),
        ({"keep_count": torch.full((6,), 2)}, 31, 13),
        ({"keep_ratio": 1 / 3, "protect": RAGGED_PROTECT}, 31, 13),
        ({"keep_ratio": 1 / 3, "protect": RAGGED_PROTECT, "num_protected": 7}, 10 + 6 + 7, 5 + 7),
        ({"keep_count": 1, "protect": RAGGED_PROTECT, "num_protected": 7}, 6 + 7, 1 + 7),
        ({"keep_ratio": 1 / 3, "total_kept": 14}, 14, 5),
    ],
)
def test_capacity_where_only_the_device_knows_the_lengths(only_the_device_knows, arguments, rows, max_seqlen):
    importance = torch.rand(RAGGED.total)
    selection = select_tokens(importance, RAGGED.cu_seqlens, RAGGED.max_seqlen, **arguments)
    assert selection.indices.shape[0] == rows
    assert selection.max_seqlen == max_seqlen
    if "keep_count" not in arguments and "budget" not in arguments and "protect" not in arguments:
        budgets = [max(arguments.get("min_keep", 1), exact_ceil(Fraction(1, 3), n)) for n in RAGGED.lengths]
        assert_selects(selection, RAGGED, oracle(RAGGED, importance, None, budgets))


@pytest.mark.parametrize("codes_per_item", [1, 4])
@pytest.mark.parametrize("protecting", [False, True])
@pytest.mark.parametrize("budget", [{"keep_ratio": 1 / 3}, {"keep_count": 2}], ids=str)
def test_sizes_are_exact_with_lengths_on_the_host(only_the_device_knows, codes_per_item, protecting, budget):
    batch = RaggedBatch((12, 0, 4, 28, 8), tail=5)
    importance = torch.rand(batch.total)
    protect = torch.arange(batch.total) % 11 == 0 if protecting else None
    items = [range(rows.start, rows.stop, codes_per_item) for rows in batch.slices()]
    protected = [sum(bool(protecting and protect[i : i + codes_per_item].any()) for i in starts) for starts in items]
    selection = select_tokens(
        importance, batch.cu_seqlens, batch.max_seqlen, **budget, codes_per_item=codes_per_item, protect=protect,
        lengths_cpu=torch.tensor(batch.lengths), num_protected=torch.tensor(protected) if protecting else None,
    )  # fmt: skip
    kept = []
    for starts, always in zip(items, protected, strict=True):
        n = len(starts) - always
        kept.append(codes_per_item * (always + min(n, max(1, budget.get("keep_count", math.ceil(n / 3))))))
    assert selection.cu_seqlens.diff().tolist() == kept
    assert selection.indices.shape[0] == sum(kept)
    assert selection.max_seqlen == max(kept)


def test_what_the_host_knows_is_checked(only_the_device_knows):
    importance, lengths_cpu = torch.rand(RAGGED.total), torch.tensor(RAGGED.lengths)
    arguments = dict(keep_ratio=0.5, lengths_cpu=lengths_cpu)
    with pytest.raises(RuntimeError, match="lengths_cpu has a length 13, more than max_seqlen 12"):
        select_tokens(importance, RAGGED.cu_seqlens, 12, **arguments)
    with pytest.raises(RuntimeError, match="total_kept is 3, but the sequences keep 16 tokens"):
        select_tokens(importance, RAGGED.cu_seqlens, 13, **arguments, total_kept=3)


def test_capacity_is_never_more_than_there_is(only_the_device_knows):
    cu_seqlens = torch.arange(0, 201, 2, dtype=torch.int32)
    selection = select_tokens(torch.rand(200), cu_seqlens, 2, keep_ratio=1.0, min_keep=3)
    assert selection.indices.shape[0] == 200


@settings(max_examples=100)
@given(scored=scored_batches(), ratio=st.floats(0, 1), min_keep=st.integers(0, 3))
def test_capacity_always_suffices(scored, ratio, min_keep):
    batch, importance, protect = scored
    num_protected = None if protect is None else int(protect.sum())
    arguments = {"keep_ratio": ratio, "min_keep": min_keep, "protect": protect, "num_protected": num_protected}
    exact = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
        roomy = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, **arguments)
    rows = exact.indices.shape[0]
    assert roomy.indices[:rows].tolist() == exact.indices.tolist()
    assert roomy.indices[rows:].tolist() == [-1] * (roomy.indices.shape[0] - rows)
    assert torch.equal(roomy.inverse, exact.inverse)
    assert torch.equal(roomy.cu_seqlens, exact.cu_seqlens)
    assert roomy.max_seqlen >= exact.max_seqlen


@pytest.mark.gpu
def test_rows_are_exact_on_the_gpu_with_lengths_cpu():
    importance, cu_seqlens = torch.rand(RAGGED.total, device="cuda"), RAGGED.cu_seqlens.cuda()
    lengths_cpu = torch.tensor(RAGGED.lengths)
    protected = torch.tensor([int(RAGGED_PROTECT[rows].sum()) for rows in RAGGED.slices()])
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain = select_tokens(importance, cu_seqlens, 13, keep_ratio=0.5, lengths_cpu=lengths_cpu)
        roomy = select_tokens(importance, cu_seqlens, 13, keep_ratio=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    protecting = select_tokens(
        importance,
        cu_seqlens,
        13,
        keep_ratio=0.5,
        lengths_cpu=lengths_cpu,
        protect=RAGGED_PROTECT.cuda(),
        num_protected=protected,
    )
    assert plain.indices.shape[0] == plain.cu_seqlens[-1].item()
    assert protecting.indices.shape[0] == protecting.cu_seqlens[-1].item()
    assert roomy.indices.shape[0] == 15 + 6


# Gather


def selection_of(batch: RaggedBatch, device: str = "cpu", tail: int = 2) -> TokenSelection:
    """About half of the batch, with tail rows."""
    importance = torch.rand(batch.total)
    exact = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5)
    total_kept = exact.indices.shape[0] + tail
    return select_tokens(
        importance.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=0.5, total_kept=total_kept
    )


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, device=device) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32, device=device).to(dtype)
    return torch.randint(0, 100, shape, device=device).to(dtype)


def expected_rows(x: Tensor, selection: TokenSelection) -> Tensor:
    """index_select of the kept rows, zeros on tail rows."""
    kept = selection.indices[selection.indices >= 0]
    tail = x.new_zeros((selection.indices.shape[0] - kept.shape[0], *x.shape[1:]))
    return torch.cat([x.index_select(0, kept), tail])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_gathers_a_list_of_all_dtypes_and_shapes(device, name):
    selection = selection_of(BATCHES[name], device)
    total = selection.total_source
    x = [
        random_tensor((total, *shape), dtype, device)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64)
        for shape in ((), (1,), (3,), (2, 5), (16,), (0,), (4, 0, 2))
    ]
    for tensor, y in zip(x, gather_tokens(x, selection), strict=True):
        assert y.dtype == tensor.dtype
        assert torch.equal(y, expected_rows(tensor, selection))


@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 100, 128, 1000, 4096, 16384])
@pytest.mark.parametrize("device", DEVICES)
def test_gathers_rows_of_any_width(device, row_bytes):
    selection = selection_of(BATCHES["long_among_short"], device)
    x = torch.randint(0, 256, (selection.total_source, row_bytes), dtype=torch.uint8, device=device)
    assert torch.equal(gather_tokens(x, selection), expected_rows(x, selection))
    # Rows that start at any byte of memory
    shifted = torch.empty(x.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(x).copy_(x)
    assert torch.equal(gather_tokens(shifted, selection), expected_rows(x, selection))


STRIDED = {
    "columns": lambda x: x[:, 2:5],
    "every_second_row": lambda x: torch.cat([x, x], 1).view(-1, x.shape[1])[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded_rows": lambda x: x[:1].expand_as(x),
    "expanded_columns": lambda x: x[:, :1].expand_as(x),
    "steps_in_columns": lambda x: x[:, ::2],
    "inner_transposed": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("device", DEVICES)
def test_gathers_strided_tensors_and_their_gradients(device, layout):
    selection = selection_of(BATCHES["ragged"], device)
    base = torch.randn(selection.total_source, 8, dtype=torch.float64, device=device)
    leaf, leaf_expected = base.clone().requires_grad_(), base.clone().requires_grad_()
    y, expected = (
        gather_tokens(STRIDED[layout](leaf), selection),
        expected_rows(STRIDED[layout](leaf_expected), selection),
    )
    assert torch.equal(y, expected)
    grad = torch.randn_like(expected)
    y.backward(STRIDED["transposed"](grad) if grad.dim() == 2 else grad)
    expected.backward(grad)
    assert torch.equal(leaf.grad, leaf_expected.grad)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_is_that_of_index_select(device, dtype, name):
    selection = selection_of(BATCHES[name], device)
    x = random_tensor((selection.total_source, 3, 2), dtype, device).requires_grad_()
    x_expected = x.detach().clone().requires_grad_()
    y, expected = gather_tokens(x, selection), expected_rows(x_expected, selection)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, x_expected.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_dropped_rows_and_tail_rows_leak_nothing(device):
    selection = selection_of(BATCHES["ragged"], device)
    dropped = selection.inverse < 0
    x = torch.randn(selection.total_source, 3, device=device)
    x[dropped] = math.nan
    x.requires_grad_()
    y = gather_tokens(x, selection)
    is_tail = selection.indices < 0
    assert is_tail.sum() == 2
    assert not y.isnan().any()
    assert (y[is_tail] == 0).all()
    grad = torch.ones_like(y)
    grad[is_tail] = math.nan
    y.backward(grad)
    assert torch.equal(x.grad, (~dropped).float().unsqueeze(1).expand(-1, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_gathers_more_tensors_than_one_launch_takes(device):
    selection = selection_of(BATCHES["ragged"], device)
    x = [torch.randn(selection.total_source, 1 + i % 7, device=device, requires_grad=i % 3 == 0) for i in range(150)]
    y = gather_tokens(x, selection)
    sum(i * tensor.sum() for i, tensor in enumerate(y)).backward()
    kept = (selection.inverse >= 0).float().unsqueeze(1)
    for i, (tensor, result) in enumerate(zip(x, y, strict=True)):
        assert torch.equal(result, expected_rows(tensor, selection))
        assert result.requires_grad == tensor.requires_grad
        assert tensor.grad is None if i % 3 else torch.equal(tensor.grad, i * kept.expand_as(tensor))


def test_gradient_reaches_only_what_was_used():
    selection = selection_of(BATCHES["ragged"])
    used, unused = (torch.randn(selection.total_source, 2, requires_grad=True) for _ in range(2))
    positions = torch.arange(selection.total_source)
    gather_tokens([positions, used, unused], selection)[1].sum().backward()
    assert used.grad is not None
    assert unused.grad is None


def test_one_tensor_in_one_tensor_out():
    selection = selection_of(BATCHES["ragged"])
    x = torch.randn(selection.total_source, 2)
    (from_list,) = gather_tokens([x], selection)
    assert torch.equal(gather_tokens(x, selection), from_list)


@pytest.mark.parametrize("name", BATCHES)
def test_gradcheck(name):
    selection = selection_of(BATCHES[name])
    x = torch.randn(selection.total_source, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(selection.total_source, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: tuple(gather_tokens(list(x), selection)), (x, scale))


def test_results_do_not_depend_on_the_number_of_threads():
    batch = RaggedBatch(tuple(torch.randint(0, 60, (300,)).tolist()), tail=5)
    importance = torch.randint(0, 9, (batch.total,)).float()
    x = torch.randn(batch.total, 64)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        selection = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, keep_ratio=1 / 3)
        y = gather_tokens(leaf, selection)
        (y * y).sum().backward()
        return [selection.indices, selection.cu_seqlens, selection.inverse, y.detach(), leaf.grad]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        together = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# The dispatcher and torch.compile


@pytest.mark.parametrize("name", ["ragged", "no_sequences"])
def test_opcheck(name):
    batch = BATCHES[name]
    importance, protect = torch.rand(batch.total), torch.rand(batch.total) < 0.2
    counts = torch.full((batch.batch,), 2)
    ops = torch.ops.stamp
    for ratio_q32, count, keep_counts in ((2**31, None, None), (None, 3, None), (None, None, counts)):
        torch.library.opcheck(
            ops.select_tokens.default,
            (importance, batch.cu_seqlens, batch.max_seqlen, ratio_q32, count, keep_counts, 1, protect, 1, batch.total),
        )
    selection = selection_of(batch)
    x = [torch.randn(batch.total, 3), torch.arange(batch.total)]
    torch.library.opcheck(ops.gather_tokens_forward.default, (x, selection.indices))
    grads = gather_tokens(x, selection)
    torch.library.opcheck(ops.gather_tokens_backward.default, (grads, selection.inverse))


COMPILED_BUDGETS = [
    {"keep_ratio": 1 / 3},
    {"keep_ratio": 0.5, "budget": "max_seqlen"},
    {"keep_count": 3, "min_keep": 2},
    {"keep_ratio": 1 / 3, "protected": True},
    {"keep_ratio": 1 / 3, "protected": True, "num_protected": 5},
]


@pytest.mark.parametrize("budget", COMPILED_BUDGETS, ids=str)
def test_compiles_whole_and_once_for_all_sizes(budget):
    budget = dict(budget)
    protected = budget.pop("protected", False)

    def prune(x, importance, cu_seqlens, max_seqlen, protect):
        selection = select_tokens(importance, cu_seqlens, max_seqlen, protect=protect if protected else None, **budget)
        values, positions = gather_tokens([x, torch.arange(x.shape[0])], selection)
        return values * 2, positions, selection

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prune, fullgraph=True, dynamic=True, backend=counter)
    compilations = None
    for lengths, tail in (((3, 4), 2), ((5, 0, 9, 21), 0), ((2, 2, 2, 2, 2, 80), 11), ((97,) * 4, 1)):
        batch = RaggedBatch(lengths, tail)
        importance = torch.rand(batch.total)
        protect = torch.arange(batch.total) % (batch.total // 4) == 1
        x, x_eager = (torch.ones(batch.total, 13, requires_grad=True) for _ in range(2))
        values, positions, selection = compiled(x, importance, batch.cu_seqlens, batch.max_seqlen, protect)
        values.sum().backward()
        expected = prune(x_eager, importance, batch.cu_seqlens, batch.max_seqlen, protect)
        expected[0].sum().backward()
        rows = expected[1].shape[0]
        assert torch.equal(positions[:rows], expected[1])
        assert torch.equal(selection.cu_seqlens, expected[2].cu_seqlens)
        assert torch.equal(values[:rows], expected[0])
        assert (values[rows:] == 0).all()
        assert torch.equal(x.grad, x_eager.grad)
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations


def test_raw_ops_refuse_to_drop_a_gradient():
    selection = selection_of(BATCHES["ragged"])
    x = torch.randn(selection.total_source, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"raw op without autograd.*stamp_kernels\.gather_tokens"):
        torch.ops.stamp.gather_tokens_forward([x], selection.indices)
    with torch.no_grad():
        torch.ops.stamp.gather_tokens_forward([x], selection.indices)


# Errors

T, B = 31, 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": [1.0]}, "importance must be a tensor, got list"),
        ({"importance": torch.zeros(T, 1)}, f"importance must have shape [total], got [{T}, 1]"),
        ({"importance": torch.zeros(T, dtype=torch.int64)}, "importance must have dtype torch.float32, torch.float16"),
        ({"cu_seqlens": torch.zeros(2, 2)}, "cu_seqlens must have shape [batch + 1], got [2, 2]"),
        (
            {"cu_seqlens": torch.zeros(B + 1, dtype=torch.int64)},
            "cu_seqlens must have dtype torch.int32, got torch.int64",
        ),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens must have batch + 1 >= 1 entries"),
        ({"max_seqlen": torch.tensor(3)}, "max_seqlen must be an int (not a tensor), got Tensor"),
        ({"max_seqlen": -1}, "max_seqlen must be in [0, inf), got -1"),
        ({"keep_ratio": None}, "exactly one of keep_ratio and keep_count must be given, got None and None"),
        ({"keep_count": 3}, "exactly one of keep_ratio and keep_count must be given, got 0.5 and 3"),
        ({"keep_ratio": 1.5}, "keep_ratio must be in [0.0, 1.0], got 1.5"),
        ({"keep_ratio": math.nan}, "keep_ratio must be in [0.0, 1.0], got nan"),
        ({"keep_ratio": torch.tensor(0.5)}, "keep_ratio must be a number (not a tensor), got Tensor"),
        ({"keep_ratio": None, "keep_count": -1}, "keep_count must be in [0, inf), got -1"),
        (
            {"keep_ratio": None, "keep_count": torch.ones(2, dtype=torch.int64)},
            f"keep_count must have shape [{B}], got [2]",
        ),
        ({"keep_ratio": None, "keep_count": torch.ones(B)}, "keep_count must have dtype torch.int32, torch.int64, got"),
        ({"min_keep": -1}, "min_keep must be in [0, inf), got -1"),
        ({"protect": torch.zeros(T)}, "protect must have dtype torch.bool, got torch.float32"),
        ({"protect": torch.zeros(2, dtype=torch.bool)}, f"protect must have shape [{T}], got [2]"),
        ({"total_kept": -1}, "total_kept must be in [0, inf), got -1"),
        ({"lengths_cpu": torch.zeros(2, dtype=torch.int64)}, f"lengths_cpu must have shape [{B}], got [2]"),
        ({"lengths_cpu": torch.zeros(B)}, "lengths_cpu must have dtype torch.int32, torch.int64, got torch.float32"),
        ({"num_protected": 3}, "num_protected goes with protect, which is None"),
        ({"protect": RAGGED_PROTECT, "num_protected": -2}, "num_protected must be in [0, inf), got -2"),
        ({"budget": "batch"}, "budget must be one of ('sequence', 'max_seqlen'), got 'batch'"),
        ({"keep_ratio": None, "keep_count": 2, "budget": "max_seqlen"}, 'budget="max_seqlen" goes with keep_ratio'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_select_names_the_bad_argument(arguments, message):
    good = {
        "importance": torch.zeros(T),
        "cu_seqlens": RAGGED.cu_seqlens,
        "max_seqlen": RAGGED.max_seqlen,
        "keep_ratio": 0.5,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        select_tokens(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)}, "cu_seqlens[0] must be 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 3], dtype=torch.int32)}, "cu_seqlens must never decrease, got 5 then 3"),
        ({"cu_seqlens": torch.tensor([0, T + 1], dtype=torch.int32)}, "must be at most the number of rows 31, got 32"),
        ({"max_seqlen": 12}, "sequence 3 has length 13, more than the given max_seqlen 12"),
        ({"lengths_cpu": torch.ones(B, dtype=torch.int64)}, "lengths_cpu must be the lengths that cu_seqlens gives"),
        ({"total_kept": 3}, "total_kept is 3, but the sequences keep"),
        (
            {"keep_ratio": None, "keep_count": torch.tensor([1, 1, 1, -4, 1, 1])},
            "keep_count must not be negative, got -4",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_select_reports_bad_contents(arguments, message):
    good = {"cu_seqlens": RAGGED.cu_seqlens, "max_seqlen": 40, "keep_ratio": 0.5}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        select_tokens(torch.zeros(T), **{**good, **arguments})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "x must be a tensor or a non-empty list of tensors, got an empty list"),
        (torch.zeros(3, 2), f"x must have {T} rows (selection.total_source), got shape [3, 2]"),
        ([torch.zeros(T), torch.tensor(1.0)], f"x[1] must have {T} rows (selection.total_source), got shape []"),
        ([torch.zeros(T), 3], "x[1] must be a tensor, got int"),
        (None, "x must be a tensor or a non-empty list of tensors, got NoneType"),
    ],
)
def test_gather_names_the_bad_argument(x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_tokens(x, selection_of(RAGGED))


def test_gather_checks_the_selection():
    selection = selection_of(RAGGED)
    x = torch.zeros(T, 2)
    with pytest.raises(ValueError, match=r"selection\.indices must have dtype torch\.int64, got torch\.int32"):
        gather_tokens(x, selection._replace(indices=selection.indices.int()))
    with pytest.raises(ValueError, match=rf"selection\.inverse must have shape \[{T}\], got \[{T - 1}\]"):
        gather_tokens(x, selection._replace(inverse=selection.inverse[1:]))
    with pytest.raises(RuntimeError, match=rf"indices\[0\] is {T}, but only -1 \(none\) to {T - 1} are allowed"):
        gather_tokens(x, selection._replace(indices=selection.indices.clamp(min=0) + T))
    with pytest.raises(RuntimeError, match=r"indices\[0\] is -2"):
        gather_tokens(x, selection._replace(indices=torch.full_like(selection.indices, -2)))


@pytest.mark.gpu
def test_devices_must_agree():
    selection = selection_of(RAGGED, "cuda")
    with pytest.raises(ValueError, match="x must be on cuda:0, got cpu"):
        gather_tokens(torch.zeros(T, 2), selection)
    with pytest.raises(ValueError, match="cu_seqlens must be on cuda:0, got cpu"):
        select_tokens(torch.zeros(T, device="cuda"), RAGGED.cu_seqlens, 13, keep_ratio=0.5)


@pytest.mark.parametrize("num_protected", [1, torch.tensor([0, 0])])
def test_num_protected_must_be_what_protect_marks(num_protected):
    protect = torch.tensor([True, True, False, False, False])
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="num_protected must be the tokens that protect marks in the sequences"):
        select_tokens(torch.rand(5), cu_seqlens, 3, keep_ratio=0.5, protect=protect, num_protected=num_protected)


@pytest.mark.parametrize("name", ["keep_count", "min_keep", "total_kept"])
def test_counts_must_be_ints(name):
    arguments = {"keep_count": 1} | {name: 2.5}
    with pytest.raises(ValueError, match=rf"{name} must be an int \(not a tensor\), got float"):
        select_tokens(torch.rand(3), torch.tensor([0, 3], dtype=torch.int32), 3, **arguments)


def test_compiled_gather_of_one_tensor_twice():
    selection = select_tokens(torch.rand(6), torch.tensor([0, 6], dtype=torch.int32), 6, keep_ratio=0.5)
    x = torch.randn(6, 2, requires_grad=True)

    def gather(x):
        return gather_tokens([x, x], selection)

    first, second = torch.compile(gather, fullgraph=True, backend="aot_eager")(x)
    (first + 2 * second).sum().backward()
    assert torch.equal(first, x[selection.indices]) and torch.equal(second, first)
    assert torch.equal(x.grad, 3.0 * (selection.inverse >= 0)[:, None].expand(6, 2))


def test_raw_gather_refuses_a_map_of_two_dimensions():
    with pytest.raises(RuntimeError, match="indices must have one dimension, got 2"):
        torch.ops.stamp.gather_tokens_forward([torch.rand(3, 2)], torch.zeros(2, 2, dtype=torch.int64))
