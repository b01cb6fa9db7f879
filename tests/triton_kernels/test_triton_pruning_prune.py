"""Pruning through the Triton kernels, interpreted where there is no GPU, against the reference."""

from typing import Any

import pytest
import torch
from op_kernels import launcher, reference
from ragged import BATCHES, RaggedBatch
from torch import Tensor

pytest.importorskip("triton")

from guarded import checked_accesses

from stamp_kernels.common.budget import keep_ratio_to_q32
from stamp_kernels.triton_kernels.pruning import configs, selection
from stamp_kernels.triton_kernels.pruning.configs import SelectionConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(x: Any) -> Any:
    return [y.to(DEVICE) for y in x] if isinstance(x, list) else x.to(DEVICE) if isinstance(x, Tensor) else x


def exact_inputs(batch: RaggedBatch) -> tuple[list[Tensor], Tensor]:
    """Small integers with ties, whose importance has the same bits in every backend; NaN in the tail rows."""
    hidden, centrality = torch.randint(-2, 3, (batch.total, 8)).float(), torch.randint(0, 4, (batch.total,)).float()
    hidden[batch.valid :], centrality[batch.valid :] = torch.nan, torch.nan
    return [hidden, torch.arange(batch.total), torch.rand(batch.total, 3, 2) < 0.5], centrality


def assert_prunes_as_the_reference(
    batch: RaggedBatch,
    *,
    positions: Tensor | None = None,
    norm_order: int = 1,
    per_visible_query: bool = False,
    budget: tuple[int | None, int | None, Tensor | None] = (keep_ratio_to_q32(0.4), None, None),
    protect: Tensor | None = None,
    codes_per_item: int = 1,
    max_seqlen: int | None = None,
) -> None:
    x, centrality = exact_inputs(batch)
    max_seqlen = batch.max_seqlen if max_seqlen is None else max_seqlen
    arguments = (x, centrality, positions, batch.cu_seqlens, max_seqlen, norm_order, per_visible_query, *budget, 1)
    arguments = (*arguments, protect, codes_per_item, batch.total + 2)
    rows, *rest = launcher("prune")(*map(on_device, arguments))
    rows_wanted, *rest_wanted = reference("prune")(*arguments)
    names = ("positions", "indices", "cu_seqlens", "inverse")
    for name, got, want in zip((*("x",) * 3, *names), (*rows, *rest), (*rows_wanted, *rest_wanted), strict=True):
        assert got.dtype == want.dtype, name
        assert torch.equal(got.cpu(), want), f"{name}: got {got.tolist()}, want {want.tolist()}"


@pytest.mark.parametrize("with_positions", [False, True], ids=["", "positions"])
@pytest.mark.parametrize("name", BATCHES)
def test_named_batches(name, with_positions):
    batch = BATCHES[name]
    positions = batch.positions() if with_positions else None
    assert_prunes_as_the_reference(batch, positions=positions)
    assert_prunes_as_the_reference(batch, positions=positions, protect=torch.rand(batch.total) < 0.3)


@pytest.mark.parametrize(
    ("codes_per_item", "kernel", "with_positions"),
    [(1, "short", False), (3, "short", True), (1, "long", True), (3, "long", False)],
)
def test_items(codes_per_item, kernel, with_positions, monkeypatch):
    if kernel == "long":
        monkeypatch.setattr(configs, "SELECTION_CONFIGS", ())
        monkeypatch.setattr(configs, "LONG_SELECTION_CONFIG", SelectionConfig(1, 4, 1))
    batch = RaggedBatch(tuple(codes_per_item * n for n in (5, 0, 1, 13, 7)), tail=3)
    assert_prunes_as_the_reference(
        batch,
        positions=batch.positions() if with_positions else None,
        protect=torch.rand(batch.total) < 0.1,
        codes_per_item=codes_per_item,
    )


@pytest.mark.parametrize("norm_order", [1, 2])
def test_budgets_and_norms(norm_order):
    batch = BATCHES["ragged"]
    for budget in ((None, 3, None), (None, None, torch.tensor([1, 0, 2, 20, 1, 0], dtype=torch.int32))):
        assert_prunes_as_the_reference(batch, budget=budget, norm_order=norm_order, max_seqlen=300)


def test_importance_per_visible_query():
    """Sequences of up to four tokens, whose importances are multiples of 1 / 12 and differ by more than rounding."""
    batch = RaggedBatch((4, 2, 0, 3, 1, 4), tail=1)
    assert_prunes_as_the_reference(batch, per_visible_query=True, budget=(None, 2, None))


def test_offsets_of_several_blocks_of_sequences(monkeypatch):
    monkeypatch.setattr(selection, "_OFFSETS_BLOCK", 16)
    batch = RaggedBatch(tuple(torch.randint(0, 9, (50,)).tolist()), tail=1)
    assert_prunes_as_the_reference(batch)
    assert_prunes_as_the_reference(batch, protect=torch.rand(batch.total) < 0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("protect", [False, True])
def test_number_of_launches(protect):
    batch = BATCHES["ragged"]
    with checked_accesses() as launches:
        assert_prunes_as_the_reference(batch, protect=torch.rand(batch.total) < 0.2 if protect else None)
    assert launches.total() == (4 if protect else 3), launches


def test_two_runs_give_the_same_bits():
    batch = BATCHES["ragged"]
    hidden, centrality = torch.randn(batch.total, 40), torch.rand(batch.total)
    arguments = ([hidden], centrality, None, batch.cu_seqlens, 13, 2, True, 2**31, None, None, 1, None, 1, 20)
    runs = [launcher("prune")(*map(on_device, arguments)) for _ in range(2)]
    (first, *first_rest), (second, *second_rest) = runs
    for x, y in zip((*first, *first_rest), (*second, *second_rest), strict=True):
        assert torch.equal(x, y)
