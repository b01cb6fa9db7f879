"""Programs that torch.export makes of modules with parameters: they run, train, decompose and compile ahead of time."""

import pytest
import torch
from torch import nn

import stamp_kernels as sk

NUM_HEADS, HEAD_DIM, VOCAB = 2, 8, 11
WIDTH = NUM_HEADS * HEAD_DIM


class Recommender(nn.Module):
    """Attention with a bias, pruning, and both ways of the loss; every op has parameters or their results as inputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(32, NUM_HEADS))
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.embedding = nn.Parameter(torch.randn(VOCAB, WIDTH))

    def forward(self, x, cu_seqlens, labels):
        q, k, v = self.projection(x).view(-1, 3, NUM_HEADS, HEAD_DIM).unbind(1)
        bias = sk.RelativePositionBias(self.table)
        out, _, centrality = sk.packed_attention(
            q, k, v, cu_seqlens, max_seqlen_q=8, relative_bias=bias, return_centrality=True
        )
        targets = sk.shift_targets(labels, cu_seqlens, steps=2)
        kept = sk.prune([out.flatten(1), targets], centrality, cu_seqlens, 8, keep_ratio=0.5, fill_value=[0, -100])
        hidden, targets = kept.x
        importance = sk.token_importance(hidden, kept.positions.float(), kept.selection.cu_seqlens)
        again = sk.select_tokens(importance, kept.selection.cu_seqlens, 8, keep_count=2)
        hidden, targets = sk.gather_tokens([hidden, targets], again, fill_value=[0, -100])
        loss = sk.multi_token_cross_entropy(hidden, self.embedding, targets, memory="minimal")
        return loss + sk.multi_token_cross_entropy(hidden, self.embedding, targets)


@pytest.fixture
def recommender():
    return Recommender()


@pytest.fixture
def inputs():
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    return torch.randn(9, WIDTH), cu_seqlens, torch.randint(VOCAB, (9,))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # torch, on its own classes
@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_exported_program_equals_the_module(recommender, inputs, decompose):
    program = torch.export.export(recommender, inputs)
    if decompose:
        program = program.run_decompositions()
    assert torch.equal(program.module()(*inputs), recommender(*inputs))


def test_exported_program_trains(recommender, inputs):
    exported = torch.export.export(recommender, inputs).module()
    exported(*inputs).backward()
    recommender(*inputs).backward()
    for name, parameter in recommender.named_parameters():
        assert torch.equal(exported.get_parameter(name).grad, parameter.grad), name


@pytest.mark.filterwarnings("ignore")  # of inductor
def test_exported_program_compiles_ahead_of_time(recommender, inputs, tmp_path):
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(recommender, inputs), package_path=str(tmp_path / "recommender.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(compiled(*inputs), recommender(*inputs))
