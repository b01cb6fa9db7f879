"""Rows that belong to no sequence: pruned targets in every situation that has tail rows, and NaN on rows of no use."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from devices import every_device
from prediction_cases import BATCH, HEADS, VOCAB, WIDTH, module, packed_inputs
from ragged import RaggedBatch
from torch import Tensor

import stamp_kernels.ops.pruning.budget as budget_ops
from stamp_kernels import (
    PackedBatch,
    SemanticAdaptivePruning,
    gather_tokens,
    multi_token_cross_entropy,
    prune,
    select_tokens,
    shift_targets,
    token_importance,
)

STEPS = 2
RAGGED = RaggedBatch((5, 0, 1, 13, 2, 8), tail=3)

# ---- pruned targets ------------------------------------------------------------------------------------------------


def with_the_module(hidden, targets, centrality, cu_seqlens, max_seqlen, *, protect):
    packed = PackedBatch(hidden, cu_seqlens, max_seqlen)
    pruned, _, kept_targets = SemanticAdaptivePruning(1 / 3)(packed, centrality, targets=targets, protect=protect)
    return pruned.values, kept_targets


def with_prune(hidden, targets, centrality, cu_seqlens, max_seqlen, **budget):
    arguments = (centrality, cu_seqlens, max_seqlen)
    return prune([hidden, targets], *arguments, keep_ratio=1 / 3, **budget, fill_value=[0, -100]).x


def with_single_ops(hidden, targets, centrality, cu_seqlens, max_seqlen, **budget):
    importance = token_importance(hidden, centrality, cu_seqlens)
    selection = select_tokens(importance, cu_seqlens, max_seqlen, keep_ratio=1 / 3, **budget)
    return gather_tokens(hidden, selection), gather_tokens(targets, selection, fill_value=-100)


def loss_of_kept_tokens(
    hidden: Tensor, targets: Tensor, centrality: Tensor, unembedding: Tensor, protect: Tensor | None
) -> Tensor:
    """The truth: one sequence after the other, without tail rows, by torch's own loss."""
    states_of, targets_of = [], []
    for rows in RAGGED.slices():
        importance = (hidden[rows].detach().abs().sum(1) * centrality[rows]).tolist()
        kept = [] if protect is None else protect[rows].nonzero()[:, 0].tolist()
        others = sorted(set(range(len(importance))) - set(kept), key=lambda token: -importance[token])
        kept = sorted(kept + others[: math.ceil(len(others) / 3)])
        states_of.append(hidden[rows][kept])
        targets_of.append(targets[rows][kept])
    logits, kept_targets = torch.cat(states_of) @ unembedding.T, torch.cat(targets_of)
    return sum(F.cross_entropy(logits, of_step, ignore_index=-100) for of_step in kept_targets.T)


SITUATIONS = {
    "all lengths known": {},
    "lengths unknown to the CPU": dict(on_device=True),
    "compiled": dict(compiled=True),
    "total_kept": dict(total_kept=RAGGED.total),
    "compiled with total_kept": dict(compiled=True, total_kept=RAGGED.total),
    "protect without num_protected": dict(protecting=True, on_device=True),
    "compiled with protect without num_protected": dict(protecting=True, compiled=True),
}


# The module has no total_kept.
CASES = [
    pytest.param(recipe, situation, id=f"{recipe.__name__}-{name}")
    for recipe in (with_the_module, with_prune, with_single_ops)
    for name, situation in SITUATIONS.items()
    if not (recipe is with_the_module and "total_kept" in situation)
]


@pytest.mark.core
@pytest.mark.parametrize(("recipe", "situation"), CASES)
@every_device
def test_loss_counts_only_kept_tokens(monkeypatch, device, recipe, situation):
    situation = dict(situation)
    if situation.pop("on_device", False):
        monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
    compiled = situation.pop("compiled", False)
    protect = torch.rand(RAGGED.total) < 0.2 if situation.pop("protecting", False) else None
    hidden = torch.randn(RAGGED.total, WIDTH, dtype=torch.float64)
    hidden[RAGGED.valid :] = math.nan
    unembedding = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    centrality = torch.rand(RAGGED.total, dtype=torch.float64)
    labels = torch.randint(VOCAB, (RAGGED.total,))
    cu_seqlens, max_seqlen = RAGGED.cu_seqlens, RAGGED.max_seqlen

    def loss_of(hidden, unembedding, labels, centrality, cu_seqlens, protect):
        targets = shift_targets(labels, cu_seqlens, steps=STEPS)
        states, kept_targets = recipe(hidden, targets, centrality, cu_seqlens, max_seqlen, protect=protect, **situation)
        return multi_token_cross_entropy(states, unembedding, kept_targets)

    hidden.requires_grad_(), unembedding.requires_grad_()
    targets = shift_targets(labels, cu_seqlens, steps=STEPS)
    expected = loss_of_kept_tokens(hidden, targets, centrality, unembedding, protect)
    expected_gradients = torch.autograd.grad(expected, (hidden, unembedding))

    leaves = [x.detach().to(device).requires_grad_() for x in (hidden, unembedding)]
    others = [None if x is None else x.to(device) for x in (labels, centrality, cu_seqlens, protect)]
    run = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else loss_of
    loss = run(*leaves, *others)
    assert_close(loss.cpu(), expected)
    for got, want in zip(torch.autograd.grad(loss, leaves), expected_gradients, strict=True):
        assert_close(got.cpu(), want)


# ---- targets that nobody cleared on tail rows -----------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("counted", [False, True], ids=["", "target_counts"])
@pytest.mark.parametrize("codes_per_item", [1, 2])
@pytest.mark.parametrize("head", HEADS)
def test_targets_on_tail_rows_have_no_loss(backend, head, codes_per_item, counted, compiled):
    """Where cu_seqlens is given: loss and gradients are those of the batch without its tail rows, which hold NaN."""
    if compiled and backend == "reference":
        pytest.skip("the reference reads lengths, which is no single graph")
    batch = RaggedBatch((4, 0, 2, 12, 2, 8), tail=4)
    aux = module(head, STEPS, vocab_size=VOCAB, codes_per_item=codes_per_item)
    hidden = torch.randn(batch.total, WIDTH, dtype=torch.float64)
    hidden[batch.valid :] = math.nan
    targets = torch.randint(VOCAB, (batch.total, STEPS))  # on tail rows too
    targets[1] = -100
    others = dict(cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, return_step_losses=True)
    if counted:
        others["target_counts"] = torch.full((STEPS, codes_per_item), 100)

    def run(rows, aux):
        states = hidden[rows].clone().requires_grad_()
        result = aux(states, targets[rows], **others)
        return result, torch.autograd.grad(result.loss, (states, *aux.parameters()))

    (loss, step_losses), (grad_hidden, *grads) = run(slice(batch.valid), aux)
    torch._dynamo.reset()  # these tests together compile more often than torch allows
    called = torch.compile(aux, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else aux
    got, (got_hidden, *got_grads) = run(slice(batch.total), called)
    assert_close(got.loss, loss)
    assert_close(got.step_losses, step_losses)
    assert_close(got_hidden[: batch.valid], grad_hidden)
    assert not got_hidden[batch.valid :].any()
    for x, y in zip(got_grads, grads, strict=True):
        assert_close(x, y)


def test_prediction_checks_its_offsets():
    aux = module()
    hidden, targets, others = packed_inputs()
    with pytest.raises(ValueError, match=r"cu_seqlens must have dtype .*, got torch.float64"):
        aux(hidden, targets, **others | {"cu_seqlens": BATCH.cu_seqlens.double()})
    with pytest.raises(RuntimeError, match=r"cu_seqlens\[-1\] must be at most the number of rows 30, got 31"):
        aux(hidden[:30], targets[:30], **others | {"cu_seqlens": BATCH.cu_seqlens + (BATCH.cu_seqlens > 27).int() * 3})


@pytest.mark.parametrize("shape", [(), (STEPS,), (2, STEPS)])
def test_targets_of_tail_rows_are_ignored_without_pruning(shape):
    prune = SemanticAdaptivePruning(1 / 3, prune_in_eval=False).eval()
    packed = PackedBatch(torch.randn(RAGGED.total, WIDTH), RAGGED.cu_seqlens, RAGGED.max_seqlen)
    targets = torch.randint(VOCAB, (RAGGED.total, *shape))
    unpruned = prune(packed, torch.rand(RAGGED.total), targets=targets, ignore_index=-7)
    assert unpruned.packed is packed
    assert torch.equal(unpruned.targets[: RAGGED.valid], targets[: RAGGED.valid])
    assert (unpruned.targets[RAGGED.valid :] == -7).all()


# ---- rows that are never read --------------------------------------------------------------------------------------

NEVER_READ = [math.nan, math.inf, 1e300]


@pytest.mark.parametrize("value", NEVER_READ)
@pytest.mark.parametrize("head", HEADS)
def test_heads_never_read_rows_without_targets(head, value):
    """Bit for bit the results of zeros there. The rows of the transformer attend to each other: only tail rows then."""
    aux = module(head, vocab_size=VOCAB)
    hidden, targets, others = packed_inputs()
    del others["unembedding"]
    rows = (targets == -100).all(1)
    if head == "transformer":
        rows = torch.arange(BATCH.total) >= BATCH.valid
    assert BATCH.total - BATCH.valid <= rows.sum() < BATCH.total
    results = []
    for content in (0.0, value):
        states = hidden.detach().clone().masked_fill(rows[:, None], content).requires_grad_()
        loss, step_losses = aux(states, targets, **others, return_step_losses=True)
        results.append([loss, step_losses, *torch.autograd.grad(loss, [states, *aux.parameters()])])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected) and got.isfinite().all()
    assert not results[1][2][rows].any()


@pytest.mark.parametrize("value", NEVER_READ)
@pytest.mark.parametrize("head", HEADS)
def test_pruning_and_prediction_never_read_tail_rows(head, value):
    """From NaN states, centralities and positions of tail rows to every gradient."""
    aux = module(head, vocab_size=VOCAB)
    hidden, targets, _ = packed_inputs()
    hidden, is_tail = hidden.detach(), torch.arange(BATCH.total) >= BATCH.valid
    centrality, positions = torch.rand(BATCH.total, dtype=torch.float64), BATCH.positions()
    results = []
    for content in (0.0, value):
        states = hidden.masked_fill(is_tail[:, None], content).requires_grad_()
        positions = positions.masked_fill(is_tail, 0 if content == 0 else 2**31 - 1)
        packed = PackedBatch(states, BATCH.cu_seqlens, BATCH.max_seqlen, positions)
        pruned, _, kept_targets = SemanticAdaptivePruning(1 / 3)(
            packed, centrality.masked_fill(is_tail, content), targets=targets
        )
        loss = aux(pruned.values, kept_targets, cu_seqlens=pruned.cu_seqlens, max_seqlen=pruned.max_seqlen)
        results.append([loss, pruned.values, pruned.positions, *torch.autograd.grad(loss, [states, *aux.parameters()])])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected) and got.isfinite().all()
