"""What multi_token_cross_entropy is compared with computes the same loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels.profiling.cross_entropy_peers import chunked, full_logits, linear_cross_entropy


@pytest.mark.parametrize("per_step", [False, True], ids=["hidden shared", "hidden per step"])
@pytest.mark.parametrize("peer", [full_logits, linear_cross_entropy, chunked])
def test_peers_agree(peer, per_step):
    if peer is linear_cross_entropy and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    hidden = torch.randn(*([2] if per_step else []), 600, 12, requires_grad=True)
    weight = torch.randn(30, 12, requires_grad=True)
    targets = torch.randint(0, 30, (600, 2))
    want = multi_token_cross_entropy(hidden.double(), weight.double(), targets)
    got = peer(hidden, weight, targets)
    assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)), strict=True):
        assert_close(x, y.double())
