"""The selection kernels, interpreted where there is no GPU, against the reference: exactly equal."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_kernels import launcher, reference
from pruning_cases import RATIOS, VALUES
from ragged import BATCHES, RaggedBatch
from torch import Tensor

pytest.importorskip("triton")

import stamp_kernels.common.contents as contents
import stamp_kernels.reference.pruning as oracle
from stamp_kernels.common.budget import keep_ratio_to_q32
from stamp_kernels.triton_kernels.pruning import configs, selection
from stamp_kernels.triton_kernels.pruning.configs import SELECTION_CONFIGS, SelectionConfig, selection_config

# Infinities of either sign in one item, added up by numpy.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in add:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def on_device(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def budget_of(ratio: float | None = None, count: int | Tensor | None = None) -> dict[str, Any]:
    """The arguments of the op that say how much stays."""
    return dict(
        ratio_q32=None if ratio is None else keep_ratio_to_q32(float(ratio)),
        keep_count=None if isinstance(count, Tensor) else count,
        keep_counts=count if isinstance(count, Tensor) else None,
    )


def arguments_of(
    batch: RaggedBatch,
    importance: Tensor,
    *,
    min_keep: int = 1,
    protect: Tensor | None = None,
    codes_per_item: int = 1,
    max_seqlen: int | None = None,
    total_kept: int | None = None,
    **budget: Any,
) -> tuple[Any, ...]:
    """The op's arguments; by default with more rows in the result than can be kept."""
    max_seqlen = batch.max_seqlen if max_seqlen is None else max_seqlen
    total_kept = batch.total + 3 if total_kept is None else total_kept
    budget = budget_of(**budget).values()
    return importance, batch.cu_seqlens, max_seqlen, *budget, min_keep, protect, codes_per_item, total_kept


def assert_selects_as_the_reference(*arguments: Any) -> None:
    got = launcher("select_tokens")(*map(on_device, arguments))
    want = reference("select_tokens")(*arguments)
    for name, x, y in zip(("indices", "cu_seqlens", "inverse"), got, want, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.cpu(), y), f"{name}: got {x.tolist()}, want {y.tolist()}"


def random_protect(batch: RaggedBatch, share: float = 0.2) -> Tensor:
    return torch.rand(batch.total) < share


def whole_items(batch: RaggedBatch, codes_per_item: int) -> RaggedBatch:
    return RaggedBatch(tuple(n * codes_per_item for n in batch.lengths), batch.tail)


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """The short kernel for up to 4 items, and blocks of 8 in the long one: a few dozen tokens are a long sequence."""
    patch.setattr(configs, "SELECTION_CONFIGS", (SelectionConfig(2, 2, 1), SelectionConfig(1, 4, 1)))
    patch.setattr(configs, "LONG_SELECTION_CONFIG", SelectionConfig(1, 8, 1))


@pytest.fixture
def small_blocks(monkeypatch):
    use_small_blocks(monkeypatch)


# Selection


@st.composite
def selections(draw) -> tuple[Any, ...]:
    """Arguments of the op: ties everywhere, items of any length, every budget."""
    codes_per_item = draw(st.sampled_from([1, 1, 3, 4]))
    lengths = draw(st.lists(st.integers(0, 12 if codes_per_item == 1 else 5), max_size=5))
    batch = whole_items(RaggedBatch(tuple(lengths), tail=draw(st.integers(0, 3))), codes_per_item)
    importance = draw(st.lists(st.sampled_from(VALUES), min_size=batch.total, max_size=batch.total))
    importance = torch.tensor(importance).to(draw(st.sampled_from(DTYPES)))
    if importance.dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter makes its denormals zero
        importance = torch.where(importance.abs() < 1e-38, 0 * importance, importance)
    protect = draw(st.none() | st.lists(st.booleans(), min_size=batch.total, max_size=batch.total))
    counts = st.lists(st.integers(0, 9), min_size=batch.num_sequences, max_size=batch.num_sequences)
    counts = counts.map(lambda counts: torch.tensor(counts, dtype=draw(st.sampled_from([torch.int32, torch.int64]))))
    budget = draw(
        st.fixed_dictionaries({"ratio": RATIOS}) | st.fixed_dictionaries({"count": st.integers(0, 15) | counts})
    )
    return arguments_of(
        batch,
        importance,
        min_keep=draw(st.integers(0, 3)),
        protect=None if protect is None else torch.tensor(protect, dtype=torch.bool),
        codes_per_item=codes_per_item,
        max_seqlen=batch.max_seqlen + draw(st.sampled_from([0, 0, 1, 70, 300])),
        **budget,
    )


@settings(max_examples=60)
@given(selections())
def test_any_selection(arguments):
    assert_selects_as_the_reference(*arguments)


@settings(max_examples=40)
@given(selections())
def test_any_selection_in_several_blocks(arguments):
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        assert_selects_as_the_reference(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_order_of_any_two_values(dtype):
    pairs = torch.tensor(list(itertools.product(VALUES, VALUES)), dtype=dtype)
    batch = RaggedBatch((2,) * len(pairs), tail=0)
    assert_selects_as_the_reference(*arguments_of(batch, pairs.flatten(), count=1))


@pytest.mark.parametrize(("name", "ratio"), list(zip(BATCHES, itertools.cycle([1 / 3, 1.0, 0.7, 0.0]), strict=False)))
def test_named_batches(name, ratio):
    batch = BATCHES[name]
    importance = torch.rand(batch.total)
    importance[batch.valid :] = torch.inf  # tail rows are never chosen, however important
    protect = random_protect(batch)
    protect[batch.valid :] = True
    assert_selects_as_the_reference(*arguments_of(batch, importance, ratio=ratio))
    assert_selects_as_the_reference(*arguments_of(batch, importance, ratio=ratio, protect=protect))


@pytest.mark.parametrize(
    ("config", "codes_per_item"), [(0, 4), (1, 1), (2, 4), (3, 1), (4, 1), (5, 1), (5, 4)], ids=str
)
def test_sequences_that_fill_a_block(config, codes_per_item):
    """And sequences of one item less, for every size of block; with the last config a sequence takes several blocks."""
    full = [*(config.items for config in SELECTION_CONFIGS), 3 * configs.LONG_SELECTION_CONFIG.items][config]
    batch = whole_items(RaggedBatch((full, 3, 0, full - 1), tail=2), codes_per_item)
    _, is_long = selection_config(batch.max_seqlen // codes_per_item)
    assert is_long == (config == len(SELECTION_CONFIGS))
    importance = torch.randint(-50, 50, (batch.total,)).float()  # ties, more than one block of them
    importance[5] = torch.nan
    protect = random_protect(batch, 0.1)
    assert_selects_as_the_reference(
        *arguments_of(batch, importance, ratio=0.3, protect=protect, codes_per_item=codes_per_item)
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("count", "dtype"), [(0, torch.float64), (8, torch.float32), (21, torch.float64), (40, torch.float32)], ids=str
)
def test_all_alike_in_several_blocks(count, dtype):
    """The first items of equal importance stay, wherever the blocks end."""
    batch = RaggedBatch((40, 9, 40), tail=1)
    for value in (1.5, torch.nan):
        importance = torch.full((batch.total,), value, dtype=dtype)
        assert_selects_as_the_reference(*arguments_of(batch, importance, count=count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_seqlen", [100, 10**6], ids=["short", "long"])
def test_importance_that_differs_in_the_last_bit(max_seqlen, dtype):
    batch = RaggedBatch((97, 80), tail=0)
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    bits = torch.randperm(batch.total).to(integers)
    for start in (0.0, 1.0, -1.0):  # denormals among them
        importance = (bits + torch.tensor(start, dtype=dtype).view(integers)).view(dtype)
        assert_selects_as_the_reference(*arguments_of(batch, importance, ratio=0.4, max_seqlen=max_seqlen))


@pytest.mark.parametrize("share", [0.7, 1.0])
@pytest.mark.parametrize("max_seqlen", [97, 10**6], ids=["short", "long"])
def test_more_protected_than_the_budget(max_seqlen, share):
    batch = BATCHES["long_among_short"]
    importance = torch.full((batch.total,), torch.inf)  # the greatest importance there is
    protect = random_protect(batch, share)
    for budget in (dict(ratio=0.1), dict(count=0), dict(count=5)):
        assert_selects_as_the_reference(
            *arguments_of(batch, importance, min_keep=0, protect=protect, max_seqlen=max_seqlen, **budget)
        )


def test_items_add_up_from_the_first_token():
    """The order of a sum decides its bits: 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1."""
    batch = RaggedBatch((9,), tail=0)
    importance = torch.tensor([1e8, 1.0, -1e8, 1e8, -1e8, 1.0, 0.5, 0.0, 0.0])
    assert_selects_as_the_reference(*arguments_of(batch, importance, count=2, codes_per_item=3))


@pytest.mark.parametrize("max_seqlen", [8, 10**6], ids=["short", "long"])
def test_many_short_sequences(max_seqlen):
    """More sequences than a program takes, and longer tails than a program fills."""
    batch = RaggedBatch(tuple(torch.randint(0, 9, (40 if max_seqlen > 8 else 250,)).tolist()), tail=3000)
    importance = torch.randint(0, 4, (batch.total,)).float()
    protect = random_protect(batch)
    assert_selects_as_the_reference(*arguments_of(batch, importance, ratio=1 / 3, max_seqlen=max_seqlen))
    counts = torch.randint(0, 6, (batch.num_sequences,))
    assert_selects_as_the_reference(
        *arguments_of(batch, importance, count=counts, protect=protect, max_seqlen=max_seqlen)
    )


def test_offsets_of_several_blocks_of_sequences(monkeypatch):
    monkeypatch.setattr(selection, "_OFFSETS_BLOCK", 16)
    batch = RaggedBatch(tuple(torch.randint(0, 9, (50,)).tolist()), tail=1)
    importance = torch.rand(batch.total)
    assert_selects_as_the_reference(*arguments_of(batch, importance, ratio=0.5))
    assert_selects_as_the_reference(*arguments_of(batch, importance, ratio=0.5, protect=random_protect(batch)))


@pytest.mark.parametrize("max_seqlen", [13, 10**6], ids=["short", "long"])
def test_a_result_with_no_row_to_spare(max_seqlen):
    batch = BATCHES["ragged"]
    importance, protect = torch.rand(batch.total), random_protect(batch)
    roomy = arguments_of(batch, importance, ratio=0.5, protect=protect, max_seqlen=max_seqlen)
    total_kept = int(reference("select_tokens")(*roomy)[1][-1])
    assert_selects_as_the_reference(*roomy[:-1], total_kept)


@pytest.fixture
def unchecked(monkeypatch):
    """Contents on a GPU are not checked."""
    for module in (contents, oracle, selection):
        monkeypatch.setattr(module, "contents_are_checked", lambda device: False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("max_seqlen", [0, 10**6], ids=["short", "long"])
@pytest.mark.parametrize("codes_per_item", [1, 3])
def test_a_too_small_result_is_cut_off(codes_per_item, max_seqlen):
    batch = whole_items(BATCHES["ragged"], codes_per_item)
    importance, protect = torch.rand(batch.total), random_protect(batch)
    for total_kept in (0, 1, 4, 9, 16):
        assert_selects_as_the_reference(
            *arguments_of(
                batch, importance, ratio=0.5, protect=protect, codes_per_item=codes_per_item, total_kept=total_kept,
                max_seqlen=max(batch.max_seqlen, max_seqlen),
            )
        )  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("max_seqlen", [17, 10**6], ids=["short", "long"])
def test_tokens_of_an_incomplete_item_are_dropped(max_seqlen):
    batch = RaggedBatch((5, 0, 1, 13, 2, 17, 8), tail=2)
    importance, protect = torch.rand(batch.total), random_protect(batch, 0.4)
    for codes_per_item in (2, 3, 4, 20):
        arguments = arguments_of(batch, importance, ratio=0.5, codes_per_item=codes_per_item, max_seqlen=max_seqlen)
        assert_selects_as_the_reference(*arguments)
        arguments = arguments_of(
            batch, importance, ratio=0.5, codes_per_item=codes_per_item, max_seqlen=max_seqlen, protect=protect
        )
        assert_selects_as_the_reference(*arguments)


@pytest.mark.parametrize("ratio_q32", [0, 1, 2, 3, 2**31 + 1, 2**32 - 1, 2**32])
def test_ceiling_to_the_last_bit(ratio_q32):
    batch = RaggedBatch((0, 1, 2, 3, 4, 5, 16), tail=0)
    arguments = arguments_of(batch, torch.rand(batch.total), ratio=ratio_q32 / 2**32, min_keep=0)
    assert arguments[3] == ratio_q32
    assert_selects_as_the_reference(*arguments)


def test_counts_beyond_32_bits():
    batch = BATCHES["ragged"]
    importance = torch.rand(batch.total)
    assert_selects_as_the_reference(*arguments_of(batch, importance, count=2**40))
    assert_selects_as_the_reference(*arguments_of(batch, importance, count=0, min_keep=2**40))
    assert_selects_as_the_reference(*arguments_of(batch, importance, count=torch.full((batch.num_sequences,), 2**40)))


def test_strided_arguments():
    def every_other(x):
        return torch.stack([x, torch.zeros_like(x)], dim=1)[:, 0]

    batch = BATCHES["ragged"]
    importance, protect = torch.rand(batch.total), random_protect(batch)
    importance, cu_seqlens, *rest = arguments_of(
        batch, importance, count=torch.randint(0, 4, (batch.num_sequences,)), protect=protect
    )
    views = [every_other(x) if isinstance(x, Tensor) else x for x in rest]
    assert_selects_as_the_reference(every_other(importance), every_other(cu_seqlens), *views)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(total_kept=3), "total_kept is 3, but the sequences keep 19 tokens"),
        (dict(max_seqlen=12), "cu_seqlens: sequence 3 has length 13, more than the given max_seqlen 12"),
        (dict(codes_per_item=5), "every sequence must be whole items of codes_per_item 5 tokens, got a sequence of 1"),
        (dict(ratio=None, count=torch.tensor([1, -2, 0, 0, 0, 0])), "keep_count must not be negative, got -2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contents_are_checked_where_asked(monkeypatch, changed, message):
    monkeypatch.setenv("STAMP_KERNELS_CHECK", "1")
    arguments = arguments_of(BATCHES["ragged"], torch.rand(31), **{"ratio": 0.6, **changed})
    with pytest.raises(RuntimeError, match=message):
        launcher("select_tokens")(*map(on_device, arguments))
