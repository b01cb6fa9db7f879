"""The tuples that functions return: pytrees that tree_map may change to anything, and torch.export can save."""

import io

import pytest
import torch
from packed_cases import packed_of
from ragged import BATCHES
from torch.utils import _pytree as pytree

from stamp_kernels import AttentionOutput, MultiTokenLoss, PrunedTokens, SemanticAdaptivePruning, prune

PACKED = packed_of(BATCHES["ragged"], 4)
CENTRALITY = PACKED.values.abs().sum(1)
PRUNED = prune(PACKED.values, CENTRALITY, PACKED.cu_seqlens, PACKED.max_seqlen, keep_ratio=0.5)
TUPLES = {
    "AttentionOutput": AttentionOutput(PACKED.values, None, CENTRALITY),
    "MultiTokenLoss": MultiTokenLoss(torch.tensor(1.0), torch.ones(2)),
    "PrunedTokens": PRUNED,
    "TokenSelection": PRUNED.selection,
    "PrunedBatch": SemanticAdaptivePruning(0.5)(PACKED, CENTRALITY),
    "PrunedBatch of everything": SemanticAdaptivePruning(0.5, prune_in_eval=False).eval()(PACKED, CENTRALITY),
}


@pytest.mark.parametrize("name", TUPLES)
def test_tree_map_keeps_the_type_and_the_names(name):
    given = TUPLES[name]
    types = pytree.tree_map(type, given)
    assert type(types) is type(given)
    assert types._fields == given._fields
    leaves, spec = pytree.tree_flatten(given)
    back = pytree.tree_unflatten(leaves, spec)
    assert all(x is y for x, y in zip(pytree.tree_leaves(back), leaves, strict=True))
    assert all(leaf is None for leaf in pytree.tree_leaves(pytree.tree_map(lambda _: None, given)))


def test_nested_tuples_keep_their_types():
    shapes = pytree.tree_map_only(torch.Tensor, lambda x: tuple(x.shape), PRUNED)
    assert isinstance(shapes, PrunedTokens)
    assert shapes.x == tuple(PRUNED.x.shape)
    assert shapes.selection.inverse == (PRUNED.selection.total_source,)


class Same(torch.nn.Module):
    def forward(self, given):
        return given


@pytest.mark.parametrize("name", TUPLES)
def test_exported_programs_take_and_return_them(name):
    given = TUPLES[name]
    file = io.BytesIO()
    torch.export.save(torch.export.export(Same(), (given,)), file)
    file.seek(0)
    back = torch.export.load(file).module()(given)
    assert type(back) is type(given)
    for x, y in zip(pytree.tree_leaves(back), pytree.tree_leaves(given), strict=True):
        assert torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y
