"""MultiStepPrediction against a weighted sum of F.cross_entropy, and its heads and options."""

import doctest
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from prediction_cases import BATCH, HEADS, NUM_STEPS, VOCAB, WIDTH, module, packed_inputs
from ragged import RaggedBatch

from stamp_kernels.modules import prediction
from stamp_kernels.modules.prediction import LinearDecay, MultiStepPrediction
from stamp_kernels.modules.pruning import SemanticAdaptivePruning
from stamp_kernels.ops.cross_entropy.shift_targets import shift_targets
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.packed import PackedBatch


def transformer_block(head, hidden, batch):
    """The transformer head in torch's own functions, one sequence at a time."""

    def norm(x, module):
        return F.rms_norm(x, (WIDTH,), module.weight, 1e-6)

    after_attention = hidden.clone()
    for rows in batch.slices():
        x = hidden[rows]
        q, k, v = (
            y.unflatten(1, (head.num_attention_heads, -1)).transpose(0, 1)
            for y in head.query_key_value(norm(x, head.attention_norm)).chunk(3, dim=1)
        )
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=head.causal)[0]
        after_attention[rows] = x + head.attention_out(attended.transpose(0, 1).flatten(1))
    mlp = head.mlp_out(F.silu(head.mlp_in(norm(after_attention, head.mlp_norm))))
    return after_attention + mlp


def head_output(head, hidden, batch):
    if isinstance(head, prediction.LinearHead):
        return F.linear(hidden, head.weight, head.bias)
    if isinstance(head, prediction.ResidualHead):
        return hidden + F.silu(F.linear(hidden, head.linear.weight, head.linear.bias))
    return transformer_block(head, hidden, batch)


# The loss


@pytest.mark.core
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_is_weighted_cross_entropy(head, causal):
    weights = (1.0, 0.5, 0.25)
    aux = module(head, step_weights=weights, lambda_=0.3, causal=causal)
    hidden, targets, others = packed_inputs()
    loss = aux(hidden, targets, **others)
    expected = 0.3 * sum(
        weight * F.cross_entropy(head_output(head, hidden, BATCH) @ others["unembedding"].T, targets[:, k])
        for k, (weight, head) in enumerate(zip(weights, aux.heads, strict=True))
    )
    assert_close(loss, expected)
    wrt = [hidden, *aux.parameters()]
    for got, want in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt), strict=True):
        assert_close(got, want)


@pytest.mark.core
def test_step_losses():
    aux = module(step_weights=(1.0, 0.0, 2.0), lambda_=0.3)
    hidden, targets, others = packed_inputs()
    loss, step_losses = aux(hidden, targets, **others, return_step_losses=True)
    assert step_losses.shape == (NUM_STEPS,)
    assert not step_losses.requires_grad
    assert_close(loss, 0.3 * (step_losses[0] + 2 * step_losses[2]))


def test_options_reach_the_loss():
    hidden, targets, others = packed_inputs()
    targets[targets == -100] = -1
    aux = module("linear", label_smoothing=0.1, softcap=2.0, ignore_index=-1)
    bias = torch.randn(VOCAB, dtype=torch.float64)
    expected = 0.0
    for k, head in enumerate(aux.heads):
        logits = 2.0 * torch.tanh(F.linear(head_output(head, hidden, BATCH), others["unembedding"], bias) / 2.0)
        expected += 0.3 * F.cross_entropy(logits, targets[:, k], ignore_index=-1, label_smoothing=0.1)
    assert_close(aux(hidden, targets, bias=bias, **others), expected)


def test_range_per_step():
    """With codes_per_item=1 each step has one range: all codes of an item are predicted from one state."""
    ranges = [(0, 10), (10, 25), (25, 40)]
    aux = module("linear", vocab_ranges=ranges)
    hidden, _, others = packed_inputs()
    targets = torch.stack([torch.randint(start, end, (BATCH.total,)) for start, end in ranges], dim=1)
    rows = slice(BATCH.valid)  # the others are tail rows
    expected = sum(
        0.3 * F.cross_entropy((head(hidden[rows]) @ others["unembedding"].T)[:, start:end], targets[rows, k] - start)
        for k, (head, (start, end)) in enumerate(zip(aux.heads, ranges, strict=True))
    )
    assert_close(aux(hidden, targets, **others), expected)


@pytest.mark.parametrize("head", HEADS)
def test_levels(head):
    """Decoder state h predicts level h of the item k further on, over the codebook of level h."""
    users, codebooks = 6, [(0, 10), (10, 25), (25, 40), (3, 9)]
    levels, weights = len(codebooks), (1.0, 0.5)
    aux = module(head, num_steps=2, codes_per_item=levels, vocab_ranges=codebooks * 2, step_weights=weights)
    batch = RaggedBatch((levels,) * users, tail=0)
    _, _, others = packed_inputs(batch)
    states = torch.randn(users, levels, WIDTH, dtype=torch.float64)
    codes = torch.stack([torch.randint(start, end, (users, 2)) for start, end in codebooks], dim=1)
    codes[2:, :, 1] = -100  # these users have no second item

    expected = torch.zeros(2, dtype=torch.float64)
    for k, head_of_step in enumerate(aux.heads):
        predicted = head_output(head_of_step, states.flatten(0, 1), batch).unflatten(0, (users, levels))
        for h, (start, end) in enumerate(codebooks):
            logits = predicted[:, h] @ others["unembedding"][start:end].T
            present = codes[:, h, k] != -100
            expected[k] += F.cross_entropy(logits[present], codes[present, h, k] - start) / levels
    got = aux(states.flatten(0, 1), codes.flatten(0, 1), **others, return_step_losses=True)
    assert_close(got.step_losses, expected)
    assert_close(got.loss, 0.3 * (expected[0] + 0.5 * expected[1]))


@pytest.mark.parametrize("head", HEADS)
def test_item_rows_gather_the_codes_of_items(head):
    """Two items of four codes for each of two users. Some codes have no row, and each user has a row behind the items.

    The expected loss is the sum over the valid targets, row by row.
    """
    codebooks = [(0, 10), (10, 25), (25, 31), (31, 40)]
    aux = module(head, num_steps=2, codes_per_item=4, vocab_ranges=codebooks * 2)
    places = [[0, 1, 2, 3, 5, 6, 8], [1, 2, 4, 7, 8]]  # of each row: the code, or 8 behind the items
    batch = RaggedBatch((7, 5), tail=2)
    hidden, _, others = packed_inputs(batch)
    indices, inverse = torch.full((16,), -1), torch.full((batch.total,), -1, dtype=torch.int32)
    for user, (rows, of_user) in enumerate(zip(batch.slices(), places, strict=True)):
        for row, place in zip(range(rows.start, rows.stop), of_user, strict=True):
            if place < 8:
                indices[8 * user + place], inverse[row] = row, 8 * user + place
    item_rows = TokenSelection(indices, torch.tensor([0, 8, 16], dtype=torch.int32), 8, inverse, batch.total)
    targets = torch.stack([torch.randint(*codebooks[place % 4], (2,)) for place in range(16)])
    targets[indices < 0] = -100
    targets[:8, 1] = -100

    expected, losses = 0.0, [[[] for _ in codebooks] for _ in aux.heads]
    for step, head_of_step in enumerate(aux.heads):
        outputs = head_output(head_of_step, hidden, batch)
        for code, row in enumerate(indices.tolist()):
            if targets[code, step] != -100:
                start, end = codebooks[code % 4]
                losses[step][code % 4].append(
                    loss_of_target(outputs[row], others["unembedding"], targets[code, step], (start, end))
                )
        expected = expected + sum(sum(of_level) / len(of_level) / 4 for of_level in losses[step] if of_level)
    dirty = hidden.detach().clone()
    # Rows that are in no item are read only by an attention.
    never_read = torch.arange(batch.total) >= batch.valid if head == "transformer" else inverse < 0
    dirty[never_read] = math.nan
    dirty.requires_grad_()
    loss = aux(dirty, targets, **others, item_rows=item_rows)
    assert_close(loss, 0.3 * expected)
    wrt = list(aux.parameters())
    got, want = torch.autograd.grad(loss, [dirty, *wrt]), torch.autograd.grad(0.3 * expected, [hidden, *wrt])
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)


def test_codes_per_item_without_ranges_changes_nothing():
    hidden, _, others = packed_inputs()
    hidden = hidden[:28]
    targets = torch.randint(VOCAB, (28, NUM_STEPS))
    by_level, plain = module(codes_per_item=4), module()
    plain.load_state_dict(by_level.state_dict())
    assert_close(by_level(hidden, targets, **others), plain(hidden, targets, **others))


@pytest.mark.core
def test_own_unembedding():
    aux = module(vocab_size=VOCAB)
    hidden, targets, others = packed_inputs()
    del others["unembedding"]
    tied = module()
    tied.load_state_dict(aux.state_dict(), strict=False)
    loss = aux(hidden, targets, **others)
    assert_close(loss, tied(hidden, targets, unembedding=aux.unembedding, **others))
    loss.backward()
    assert aux.unembedding.grad.abs().sum() > 0


def test_no_targets_and_no_rows():
    hidden, targets, others = packed_inputs()
    aux = module()
    loss = aux(hidden, torch.full_like(targets, -100), **others)
    assert loss == 0
    loss.backward()
    assert all(parameter.grad.count_nonzero() == 0 for parameter in aux.parameters())
    others["cu_seqlens"] = others["cu_seqlens"][:1]
    assert aux(hidden[:0], targets[:0], **others) == 0


# Targets of pruned batches


LEVELS, CODEBOOKS = 4, [(0, 10), (10, 25), (25, 31), (31, 40)]
ITEMS = RaggedBatch((12, 0, 4, 28, 20), tail=3)  # whole items of four tokens


def trunk_states(batch):
    """Hidden states [T, D], NaN on tail rows, that require a gradient; and a centrality [T]."""
    states = torch.randn(batch.total, WIDTH, dtype=torch.float64)
    states[batch.valid :] = torch.nan
    return states.requires_grad_(), torch.rand(batch.total, dtype=torch.float64)


def pruned_loss(aux, prune, batch, states, centrality, tokens, stride, unembedding):
    """Like a model: shift on the unpruned sequences, prune the states and their targets, predict."""
    targets = shift_targets(tokens, batch.cu_seqlens, steps=aux.num_steps, stride=stride)
    packed = PackedBatch(states, batch.cu_seqlens, batch.max_seqlen)
    pruned, _, kept_targets = prune(packed, centrality, targets=targets)
    return aux(
        pruned.values,
        kept_targets,
        unembedding=unembedding,
        cu_seqlens=pruned.cu_seqlens,
        max_seqlen=pruned.max_seqlen,
    )


def kept_tokens(batch, states, centrality, codes_per_item=1) -> Iterator[tuple[slice, list[int]]]:
    """The rows of each sequence, and which of its tokens belong to the most important third of its items."""
    for rows in batch.slices():
        importance = (states[rows].detach().abs().sum(1) * centrality[rows]).view(-1, codes_per_item).sum(1)
        best = sorted(range(len(importance)), key=lambda item: -importance[item])[: math.ceil(len(importance) / 3)]
        yield rows, [item * codes_per_item + i for item in sorted(best) for i in range(codes_per_item)]


def loss_of_target(state, unembedding, target, codebook=(0, VOCAB)):
    start, end = codebook
    return F.cross_entropy(unembedding[start:end] @ state, target - start)


def assert_same_gradients(loss, expected, leaves):
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("stride", [1, LEVELS], ids=["next tokens", "next items"])
@pytest.mark.parametrize("head", HEADS)
def test_kept_tokens_keep_their_true_targets(head, stride):
    """Targets are counted in the unpruned sequence, and pruned tokens have none. The head attends to kept tokens."""
    weights, batch = (1.0, 0.5, 0.25), RaggedBatch((9, 0, 1, 24, 5, 16), tail=3)
    aux = module(head, step_weights=weights)
    states, centrality = trunk_states(batch)
    tokens = torch.randint(VOCAB, (batch.total,))
    unembedding = (torch.randn(VOCAB, WIDTH, dtype=torch.float64) * 0.3).requires_grad_()

    losses = [[] for _ in weights]
    for rows, kept in kept_tokens(batch, states, centrality):
        sequence, labels = states[rows][kept], tokens[rows]
        for k, head_of_step in enumerate(aux.heads):
            outputs = head_output(head_of_step, sequence, RaggedBatch((len(kept),), tail=0))
            for token, output in zip(kept, outputs, strict=True):
                ahead = token + (k + 1) * stride
                if ahead < len(labels):
                    losses[k].append(loss_of_target(output, unembedding, labels[ahead]))
    assert all(losses)
    expected = 0.3 * sum(weight * torch.stack(of_step).mean() for weight, of_step in zip(weights, losses, strict=True))

    prune = SemanticAdaptivePruning(1 / 3)
    loss = pruned_loss(aux, prune, batch, states, centrality, tokens, stride, unembedding)
    assert_close(loss, expected)
    assert_same_gradients(loss, expected, [states, unembedding, *aux.parameters()])


@pytest.mark.parametrize("head", HEADS)
def test_kept_items_keep_their_levels(head):
    """After pruning whole items, every row predicts its own level of the next items over the level's codebook."""
    aux = module(head, num_steps=2, codes_per_item=LEVELS, vocab_ranges=CODEBOOKS * 2)
    states, centrality = trunk_states(ITEMS)
    starts, ends = (torch.tensor(bounds).repeat(ITEMS.total)[: ITEMS.total] for bounds in zip(*CODEBOOKS, strict=True))
    tokens = starts + (torch.rand(ITEMS.total) * (ends - starts)).long()
    unembedding = (torch.randn(VOCAB, WIDTH, dtype=torch.float64) * 0.3).requires_grad_()

    losses = [[[] for _ in CODEBOOKS] for _ in aux.heads]
    for rows, kept in kept_tokens(ITEMS, states, centrality, codes_per_item=LEVELS):
        sequence, labels = states[rows][kept], tokens[rows]
        for k, head_of_step in enumerate(aux.heads):
            outputs = head_output(head_of_step, sequence, RaggedBatch((len(kept),), tail=0))
            for token, output in zip(kept, outputs, strict=True):
                ahead, level = token + (k + 1) * LEVELS, token % LEVELS
                if ahead < len(labels):
                    losses[k][level].append(loss_of_target(output, unembedding, labels[ahead], CODEBOOKS[level]))
    expected = 0.3 * sum(torch.stack(of_level).mean() / LEVELS for of_step in losses for of_level in of_step)

    prune = SemanticAdaptivePruning(1 / 3, codes_per_item=LEVELS)
    loss = pruned_loss(aux, prune, ITEMS, states, centrality, tokens, LEVELS, unembedding)
    assert_close(loss, expected)
    assert_same_gradients(loss, expected, [states, unembedding, *aux.parameters()])


# lambda


def test_lambda_decays_linearly():
    decay = LinearDecay(0.3, 0.1, 1_000)
    assert [decay(step) for step in (0, 500, 1_000, 5_000)] == pytest.approx([0.3, 0.2, 0.1, 0.1])


def test_decaying_lambda_scales_the_loss():
    hidden, targets, others = packed_inputs()
    decaying, constant = module(lambda_=LinearDecay(0.3, 0.1, 10)), module(lambda_=1.0)
    constant.load_state_dict(decaying.state_dict())
    whole = constant(hidden, targets, **others)
    for training_step, lambda_ in ((0, 0.3), (5, 0.2), (20, 0.1)):
        assert_close(decaying(hidden, targets, **others, training_step=training_step), lambda_ * whole)


# Evaluation, initialisation, bf16, torch.compile


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_gives_zero_and_runs_no_head(head):
    aux = module(head).eval()
    hidden, targets, others = packed_inputs()
    for used in aux.heads:
        used.register_forward_hook(lambda *_: pytest.fail("a head ran in evaluation"))
    loss, step_losses = aux(hidden, targets, **others, return_step_losses=True)
    assert loss == 0
    assert not loss.requires_grad
    assert step_losses.tolist() == [0] * NUM_STEPS
    assert torch.equal(aux(hidden, targets, **others), loss)


@pytest.mark.parametrize("head", HEADS)
def test_heads_start_as_the_identity_and_learn(head):
    options = {"num_attention_heads": 2} if head == "transformer" else {}
    aux = MultiStepPrediction(WIDTH, NUM_STEPS, head=head, vocab_size=VOCAB, **options)
    hidden, targets, others = packed_inputs(dtype=torch.float32)
    del others["unembedding"]
    for k in range(NUM_STEPS):
        assert torch.equal(aux.heads[k](hidden, BATCH.cu_seqlens, BATCH.max_seqlen), hidden)
    optimizer = torch.optim.Adam(aux.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(aux(hidden, targets, **others))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_reset_parameters_restores_the_identity():
    aux = module("transformer")
    aux.reset_parameters()
    hidden, _, others = packed_inputs()
    assert torch.equal(aux.heads[0](hidden, others["cu_seqlens"], others["max_seqlen"]), hidden)


@pytest.mark.parametrize("head", HEADS)
def test_reset_parameters_leaves_the_device(head):
    """A module is made on "meta", given memory elsewhere, and initialized there, all under one default device."""
    with torch.device("meta"):
        aux = module(head)
        assert all(parameter.is_meta for parameter in aux.parameters())
        aux.to_empty(device="cpu").reset_parameters()
    hidden, targets, others = packed_inputs()
    for of_step in aux.heads:
        assert torch.equal(of_step(hidden, others["cu_seqlens"], others["max_seqlen"]), hidden)
    assert aux(hidden, targets, **others).isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_autocast(head):
    aux = module(head).float()
    hidden, targets, others = packed_inputs(dtype=torch.float32)
    want = aux(hidden, targets, **others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = aux(hidden, targets, **others)
    assert got.dtype == torch.float32
    assert_close(got, want, torch.bfloat16)
    got.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in aux.parameters())


def test_compiled_training_step():
    aux = module("transformer", lambda_=LinearDecay(0.3, 0.1, 10)).float()
    torch._dynamo.reset()
    compiled = torch.compile(aux, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for training_step, lengths in ((2, (5, 6, 3, 2)), (3, (7, 0, 4, 9, 4)), (14, (3, 8, 3, 5, 5, 4))):
            hidden, targets, others = packed_inputs(RaggedBatch(lengths, tail=2), torch.float32)
            got = compiled(hidden, targets, **others, training_step=training_step)
            want = aux(hidden, targets, **others, training_step=training_step)
            assert_close(got, want)
            for got_grad, want_grad in zip(
                torch.autograd.grad(got, [hidden, *aux.parameters()]),
                torch.autograd.grad(want, [hidden, *aux.parameters()]),
                strict=True,
            ):
                assert_close(got_grad, want_grad)


def test_state_dict_holds_only_parameters():
    assert set(module(lambda_=LinearDecay(0.3, 0.1, 10), vocab_size=VOCAB).state_dict()) == {
        "unembedding",
        *(f"heads.{k}.linear.{name}" for k in range(NUM_STEPS) for name in ("weight", "bias")),
    }


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "mlp"}, r"head must be one of \('linear', 'residual', 'transformer'\), got 'mlp'"),
        ({"num_steps": 0}, r"num_steps must be in \[1, inf\), got 0"),
        ({"codes_per_item": 0}, r"codes_per_item must be in \[1, inf\), got 0"),
        ({"hidden_size": 0}, r"hidden_size must be in \[1, inf\), got 0"),
        ({"head": "transformer"}, r'num_attention_heads goes with head="transformer".*num_attention_heads=None'),
        ({"num_attention_heads": 4}, r"num_attention_heads goes with head=\"transformer\", got head='residual'"),
        ({"head": "transformer", "num_attention_heads": 3}, r"num_attention_heads must divide hidden_size 32 .*got 3"),
        ({"head": "transformer", "num_attention_heads": 0}, r"num_attention_heads must be in \[1, inf\), got 0"),
        ({"step_weights": [1.0]}, r"step_weights must have one weight for each of the 2 steps, got \[1\.0\]"),
        (
            {"codes_per_item": 3, "vocab_ranges": [(0, 5)] * 3},
            r"vocab_ranges must have num_steps \* codes_per_item = 6 pairs .*got 3",
        ),
        ({"hidden_size": "32"}, r"hidden_size must be an int \(not a tensor\), got str"),
        ({"num_steps": 2.0}, r"num_steps must be an int \(not a tensor\), got float"),
        ({"codes_per_item": None}, r"codes_per_item must be an int \(not a tensor\), got NoneType"),
        ({"vocab_size": 0}, r"vocab_size must be in \[1, inf\), got 0"),
        ({"vocab_size": torch.tensor(9)}, r"vocab_size must be an int \(not a tensor\), got Tensor"),
        ({"head": "transformer", "num_attention_heads": "2"}, r"num_attention_heads must be an int .*, got str"),
        ({"step_weights": 0.5}, r"step_weights must be a sequence of numbers, got 0\.5"),
        ({"step_weights": {1.0, 0.5}}, r"step_weights must be a sequence of numbers, got \{"),
        ({"step_weights": [1.0, "0.5"]}, r"step_weights\[1\] must be a number \(not a tensor\), got str"),
        ({"step_weights": [1.0, -0.5]}, r"step_weights\[1\] must be in \[0\.0, inf\), got -0\.5"),
        ({"lambda_": "0.3"}, r"lambda_ must be a number \(not a tensor\), got str"),
        ({"lambda_": -1}, r"lambda_ must be in \[0\.0, inf\), got -1"),
        (
            {"vocab_ranges": [0, 5, 5, 9]},
            r"vocab_ranges must be pairs \(start, end\) of ints, got \[0, 5, 5, 9\]",
        ),
        ({"vocab_ranges": [(0, 5), (5, 5)]}, r"vocab_ranges must satisfy 0 <= start < end, got \(5, 5\)"),
        (
            {"vocab_ranges": [(0, 5), (5, 9.0)]},
            r"vocab_ranges must be pairs \(start, end\) of ints, got \[\(0, 5\), \(5, 9\.0\)\]",
        ),
        ({"vocab_ranges": {(0, 5): 1, (5, 9): 2}}, r"vocab_ranges must be pairs \(start, end\) of ints, got \{"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0\.0, 1\.0\], got 1\.5"),
        ({"ignore_index": "-100"}, r"ignore_index must be an int \(not a tensor\), got str"),
        ({"softcap": "30"}, r"softcap must be a number \(not a tensor\), got str"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiStepPrediction(**{"hidden_size": WIDTH, "num_steps": 2} | options)


def test_numpy_numbers_count_as_numbers():
    """Also arrays in place of lists."""
    ranges = np.array([[0, 10], [10, 40]])
    aux = MultiStepPrediction(np.int64(WIDTH), np.int32(2), step_weights=np.ones(2), vocab_ranges=ranges)
    hidden, targets, others = packed_inputs(dtype=torch.float32)
    targets = targets[:, :2].clone()
    targets[:, 0] %= 10
    targets[:, 1] = 10 + targets[:, 1] % 30
    expected = MultiStepPrediction(WIDTH, 2, step_weights=(1.0, 1.0), vocab_ranges=[(0, 10), (10, 40)])
    assert repr(aux) == repr(expected)
    assert torch.equal(aux(hidden, targets, **others), expected(hidden, targets, **others))


SELECTION = TokenSelection(torch.zeros(8).long(), BATCH.cu_seqlens, 8, torch.zeros(31).int(), 31)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"hidden": torch.zeros(31, 8)}, r"hidden must have shape \[N, 32\], got \[31, 8\]"),
        ({}, {"targets": torch.zeros(31, 2).long()}, r"targets must have shape \[31, 3\], got \[31, 2\]"),
        ({}, {"targets": torch.zeros(31, 3)}, r"targets must have dtype torch.int64, got torch.float32"),
        ({"codes_per_item": 4}, {}, r"hidden must have rows for whole items of 4 codes, got 31 rows"),
        (
            {"codes_per_item": 4},
            {"item_rows": SELECTION._replace(indices=torch.zeros(6).long()), "targets": torch.zeros(6, 3).long()},
            r"item_rows must have rows for whole items of 4 codes, got 6 rows",
        ),
        ({}, {"item_rows": SELECTION}, r"targets must have shape \[8, 3\], got \[31, 3\]"),
        (
            {},
            {"item_rows": SELECTION._replace(inverse=torch.zeros(7).int())},
            r"item_rows.inverse must have shape \[31\], got \[7\]",
        ),
        ({}, {"unembedding": None}, r"exactly one of .*unembedding.* got neither"),
        ({"vocab_size": VOCAB}, {}, r"exactly one of .*unembedding.* got both"),
        ({"head": "transformer"}, {"cu_seqlens": None}, r'head="transformer" needs cu_seqlens and max_seqlen'),
        ({"lambda_": LinearDecay(0.3, 0.1, 10)}, {}, r"training_step must be given if lambda_ is a function"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments(options, arguments, message, training):
    hidden, targets, others = packed_inputs()
    inputs = {"hidden": hidden, "targets": targets} | others | arguments
    with pytest.raises(ValueError, match=message):
        module(**options).train(training)(**inputs)


def test_examples():
    names = dict(shift_targets=shift_targets, PackedBatch=PackedBatch, SemanticAdaptivePruning=SemanticAdaptivePruning)
    assert doctest.testmod(prediction, extraglobs=names).failed == 0


@pytest.mark.parametrize("vocab_ranges", [None, [(0, 10), (10, 25), (25, 40)]])
def test_losses_of_parts_add_up(vocab_ranges):
    """With target_counts of the whole batch. A part may have no target, or more of one step than of another."""
    items, levels = 11, 3
    predict = module(codes_per_item=levels, vocab_ranges=None if vocab_ranges is None else vocab_ranges * NUM_STEPS)
    hidden = torch.randn(items * levels, WIDTH, dtype=torch.float64, requires_grad=True)
    starts, ends = zip(*(vocab_ranges or [(0, VOCAB)] * levels), strict=True)
    codes = torch.stack([torch.randint(a, b, (items, NUM_STEPS)) for a, b in zip(starts, ends, strict=True)], dim=1)
    codes[:4, :, 2] = codes[5] = -100
    targets = codes.flatten(0, 1)
    unembedding = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    counts = (codes != -100).sum(0).t()
    whole = predict(hidden, targets, unembedding=unembedding)
    (expected,) = torch.autograd.grad(whole, hidden)
    parts = [
        predict(hidden[rows], targets[rows], unembedding=unembedding, target_counts=counts)
        for rows in (slice(0, 12), slice(12, 12), slice(12, 18), slice(18, None))
    ]
    assert_close(sum(parts), whole)
    assert_close(torch.autograd.grad(sum(parts), hidden)[0], expected)
    with pytest.raises(ValueError, match=r"target_counts must have shape \[3, 3\], got \[3\]"):
        predict(hidden, targets, unembedding=unembedding, target_counts=counts[0])
