"""The peers of multi_token_cross_entropy compute the same loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels.profiling.peers import cross_entropy as peers
from stamp_kernels.profiling.peers.availability import PeerUnavailableError
from stamp_kernels.profiling.peers.cross_entropy import CrossEntropyProblem

ROWS, WIDTH, VOCABULARY, STEPS = 300, 16, 48, 3
RANGES = [(0, 5), (5, 35), (35, 48)]
CODEBOOKS = (5, 30, 13)
SHARINGS = {
    "all shared": (False, False),
    "hidden per step": (True, False),
    "codebooks": (False, True),
    "hidden per step, codebooks": (True, True),
}
ON_CPU = [peers.full_logits, peers.linear_cross_entropy, peers.chunked_recomputed, peers.chunked]
ON_GPU = [*ON_CPU, peers.compiled_full_logits, peers.compiled_chunked, peers.liger, peers.cut_cross_entropy]


def make_problem(sharing: str = "all shared") -> CrossEntropyProblem:
    """float64, values that bf16 holds exactly."""
    per_step, by_codebook = SHARINGS[sharing]
    hidden = torch.randn(*([STEPS] if per_step else []), ROWS, WIDTH).bfloat16().double()
    weight = torch.randn(VOCABULARY, WIDTH).bfloat16().double()
    ranges = RANGES if by_codebook else [(0, VOCABULARY)] * STEPS
    targets = torch.stack([torch.randint(start, end, (ROWS,)) for start, end in ranges], dim=1)
    return CrossEntropyProblem(hidden, weight, targets, CODEBOOKS if by_codebook else None)


def moved(problem: CrossEntropyProblem, device: str, dtype: torch.dtype) -> CrossEntropyProblem:
    hidden, weight = (x.to(device, dtype) for x in (problem.hidden, problem.weight))
    return CrossEntropyProblem(hidden, weight, problem.targets.to(device), problem.codebook_sizes)


def loss_and_gradients(problem: CrossEntropyProblem, peer) -> list[Tensor]:
    """The loss is multiplied by three, so that a gradient made in the forward pass has to be scaled."""
    loss_of, inputs = peer(problem), problem.leaves()
    loss = loss_of(*inputs)
    return [loss.detach(), *torch.autograd.grad(3 * loss, inputs)]


def by_loop(problem: CrossEntropyProblem):
    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = []
        for k, (start, end) in enumerate(RANGES if problem.codebook_sizes else [(0, VOCABULARY)] * STEPS):
            logits = (hidden if hidden.dim() == 2 else hidden[k]) @ weight[start:end].T
            losses.append(F.cross_entropy(logits, problem.targets[:, k] - start))
        return sum(losses)

    return loss_of


def assert_same(got: list[Tensor], want: list[Tensor], dtype: torch.dtype | None = None) -> None:
    for x, y in zip(got, want, strict=True):
        assert_close(x.cpu(), y, dtype)


@pytest.fixture
def small_row_chunks(monkeypatch):
    """Several row chunks, the last one smaller."""
    monkeypatch.setattr(peers, "MIN_ROW_CHUNK", 128)
    monkeypatch.setattr(peers, "RECOMPUTED_ROW_CHUNK", 128)
    monkeypatch.setattr(peers, "ROW_CHUNK_BYTES", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("peer", ON_CPU)
def test_peers_of_a_cpu(small_row_chunks, peer, sharing):
    if peer is peers.linear_cross_entropy and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    problem = make_problem(sharing)
    assert_same(loss_and_gradients(moved(problem, "cpu", torch.float32), peer), loss_and_gradients(problem, by_loop))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_op_solves_the_same_problem(sharing):
    def ours(problem: CrossEntropyProblem):
        ranges = problem.vocab_ranges
        return lambda *inputs: multi_token_cross_entropy(*inputs, problem.targets, vocab_ranges=ranges)

    problem = make_problem(sharing)
    assert_same(loss_and_gradients(problem, ours), loss_and_gradients(problem, by_loop))


def test_row_chunks_are_powers_of_two():
    assert peers._row_chunk(torch.empty(1024, 128)) == 2048
    assert peers._row_chunk(torch.empty(1000, 128)) == 2048
    assert peers._row_chunk(torch.empty(32_000, 1)) == peers.MIN_ROW_CHUNK


def test_all_steps_can_share_one_softmax():
    shared, per_step = make_problem("all shared"), make_problem("codebooks")
    assert shared.shapes() == [(ROWS, WIDTH, VOCABULARY, torch.float64)]
    assert [shape.classes for shape in per_step.shapes()] == list(CODEBOOKS)


# Peers that need a GPU


@pytest.mark.parametrize("peer", [peers.liger, peers.cut_cross_entropy])
def test_peers_say_why_they_are_unavailable(peer):
    with pytest.raises(PeerUnavailableError, match=f"{peer.__name__}.* needs a GPU"):
        peer(make_problem())


# A child that hangs is not waited for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("code", "output", "ending"),
    [
        ("print('returned')", "returned\n", "ended with 0"),
        (
            "print('returned', flush=True); raise ValueError('no such shape')",
            "returned\n",
            "ended with 1: ValueError: no",
        ),
        ("import time; print('returned', flush=True); time.sleep(60)", "returned\n", "did not return within 1 s"),
    ],
    ids=["returns", "fails", "hangs"],
)
def test_a_child_process_may_fail_or_hang(code, output, ending):
    got, got_ending = peers.run_in_child(code, seconds=1)
    assert got == output
    assert got_ending.startswith(ending)


def test_shapes_that_were_not_reached_are_unavailable(monkeypatch):
    """One child process tries all unknown shapes, and no shape is tried twice."""
    calls = []

    def child(code: str, seconds: float) -> tuple[str, str]:
        calls.append(code)
        return "returned\nreturned\n", "did not return within 60 s"

    monkeypatch.setattr(peers, "run_in_child", child)
    monkeypatch.setattr(peers, "_why_not_cut_cross_entropy", {})
    shapes = [peers.SoftmaxShape(8, 16, classes, torch.bfloat16) for classes in (10, 20, 20, 30)]
    peers.probe_cut_cross_entropy(shapes)
    peers.probe_cut_cross_entropy(shapes)
    assert len(calls) == 1
    assert "[(8, 16, 10, 'bfloat16'), (8, 16, 20, 'bfloat16'), (8, 16, 30, 'bfloat16')]" in calls[0]
    assert list(peers._why_not_cut_cross_entropy.values()) == [
        None,
        None,
        "cut_cross_entropy in a child process did not return within 60 s",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("peer", ON_GPU)
def test_peers_of_a_gpu(peer, sharing):
    """In bf16, to its bound, since they differ in what they sum in fp32."""
    problem = make_problem(sharing)
    try:
        got = loss_and_gradients(moved(problem, "cuda", torch.bfloat16), peer)
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    assert_same(got, loss_and_gradients(problem, by_loop), torch.bfloat16)
