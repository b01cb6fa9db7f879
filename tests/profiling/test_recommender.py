"""The configurations of `stamp-profile train`: same weights, same loss if nothing is pruned, real batches."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import relative_error
from torch.nn import functional as F

from stamp_kernels.profiling.data.batches import Batch, NextItemDataset, batches
from stamp_kernels.profiling.data.interactions import Interactions, load_interactions
from stamp_kernels.profiling.data.rows import TrainingRows
from stamp_kernels.profiling.data.vocabulary import Vocabulary
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, RecommenderSettings, build_recommender

WITHOUT_DROPOUT = RecommenderSettings(dropout=0.0)


def random_interactions(num_items: int = 300) -> Interactions:
    """Users with skewed history lengths, as in the public data sets."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(1.8, 0.8, size=60).astype(np.int64).clip(3, 80)
    return Interactions(
        name="random",
        items=generator.integers(0, num_items, size=lengths.sum()),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        num_items=num_items,
        semantic_ids=generator.integers(0, 256, size=(num_items, 4)),
        source="random",
    )


def training_batches(batch_size: int, count: int) -> list[Batch]:
    """Batches of the data file in STAMP_KERNELS_DATA, or of random interactions."""
    path = os.environ.get("STAMP_KERNELS_DATA")
    interactions = load_interactions(Path(path)) if path else random_interactions()
    dataset = NextItemDataset(TrainingRows(interactions), Vocabulary(4, 256), interactions.semantic_ids)
    epoch = batches(dataset, batch_size, seed=0, auxiliary_steps=3)
    return [batch for batch, _ in zip(epoch, range(count), strict=False)]


def loss_and_gradient(recommender, batch: Batch):
    recommender.zero_grad(set_to_none=True)
    loss = recommender(batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in recommender.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_equals_padded_eager_on_batches_of_data(dtype):
    padded = build_recommender("padded-eager", WITHOUT_DROPOUT, seed=0).to(dtype)
    packed = build_recommender("packed", WITHOUT_DROPOUT, seed=0).to(dtype)
    for batch in training_batches(batch_size=32, count=2):
        expected_loss, expected = loss_and_gradient(padded, batch)
        loss, got = loss_and_gradient(packed, batch)
        bound = 1e-9 if dtype == torch.float64 else 1e-5
        assert relative_error(loss, expected_loss) < bound
        if dtype == torch.float64:
            for name in expected:
                assert relative_error(got[name], expected[name]) < bound, name
        whole = [torch.cat([g.flatten() for g in grads.values()]) for grads in (got, expected)]
        assert relative_error(*whole) < bound


def test_one_seed_gives_all_configurations_the_same_weights():
    reference = build_recommender("padded-eager", RecommenderSettings(), seed=3).model.state_dict()
    for name in CONFIGURATIONS:
        weights = build_recommender(name, RecommenderSettings(), seed=3).model.state_dict()
        base_model_keys = {key for key in weights if not key.startswith("stamp_prediction.")}
        assert base_model_keys == reference.keys()
        assert all(torch.equal(weights[key], reference[key]) for key in reference), name
    other_seed = build_recommender("padded-eager", RecommenderSettings(), seed=4).model.state_dict()
    assert not torch.equal(other_seed["shared.weight"], reference["shared.weight"])


def test_baselines_run_the_attention_in_their_names():
    for name, attention in [("padded-eager", "eager"), ("padded-sdpa", "sdpa"), ("padded-prune", "eager")]:
        model = build_recommender(name, RecommenderSettings(), seed=0).model
        assert model.encoder.config._attn_implementation == attention
        assert model.decoder.config._attn_implementation == attention
    batch = training_batches(batch_size=8, count=1)[0]
    losses = [build_recommender(name, WITHOUT_DROPOUT, seed=0)(batch).loss for name in ("padded-eager", "padded-sdpa")]
    assert relative_error(*losses) < 1e-5


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_entering_each_block(name):
    batch = training_batches(batch_size=16, count=1)[0]
    output = build_recommender(name, RecommenderSettings(), seed=0)(batch)
    padded, valid = batch.input_ids.numel(), len(batch.packed_inputs.values)
    kept = sum(-(-n // 3) for n in batch.packed_inputs.lengths_cpu.tolist())
    expected = {
        "padded-eager": [padded] * 4,
        "padded-sdpa": [padded] * 4,
        "padded-prune": [padded] * 2 + [len(batch.labels) * max(1, int(batch.packed_inputs.max_seqlen / 3))] * 2,
        "packed": [valid] * 4,
        "packed+sap": [valid] * 2 + [kept] * 2,
        "packed+sap+map": [valid] * 2 + [kept] * 2,
    }
    assert output.tokens_per_block == expected[name]
    assert output.loss.isfinite()


def test_padded_pruning_keeps_the_predecessors_tokens():
    """RASTP's arithmetic on one layer, in plain torch: column sum of the map times the L1 norm, k = S // 3."""
    batch = training_batches(batch_size=8, count=1)[0]
    recommender = build_recommender("padded-prune", WITHOUT_DROPOUT, seed=0)
    encoder = recommender.model.encoder
    mask = (1.0 - batch.attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    hidden, bias = encoder.embed_tokens(batch.input_ids), None
    for block in encoder.block[:2]:
        _, _, weights = block.layer[0](hidden, attention_mask=mask, position_bias=bias)
        hidden, bias, _ = block(hidden, mask, bias)
    importance = weights.sum(dim=(1, 2)) * hidden.abs().sum(-1)
    importance[batch.attention_mask == 0] = -torch.inf
    k = batch.input_ids.shape[1] // 3
    kept = importance.argsort(dim=1, descending=True)[:, :k].sort(dim=1).values
    hidden = torch.stack([states[rows] for states, rows in zip(hidden, kept, strict=True)])
    kept_mask = torch.stack([m[rows] for m, rows in zip(batch.attention_mask, kept, strict=True)])
    mask = (1.0 - kept_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    zero_bias = torch.zeros(1, 6, k, k)
    for block in encoder.block[2:]:
        hidden = block(hidden, mask, zero_bias)[0]
    states, got_mask, _ = recommender.encode(batch)
    assert torch.equal(got_mask, kept_mask)
    valid = kept_mask.bool()
    assert relative_error(states[valid], encoder.final_layer_norm(hidden)[valid]) < 1e-5


def test_auxiliary_loss_equals_the_loop():
    """The sum over steps of the mean over levels, times the weight."""
    batch = training_batches(batch_size=16, count=1)[0]
    settings = RecommenderSettings(dropout=0.0, auxiliary_weight=0.25)
    with_map = build_recommender("packed+sap+map", settings, seed=0).double()
    states: list[torch.Tensor] = []
    with_map.model.stamp_prediction.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    output = with_map(batch)
    without_map = build_recommender("packed+sap", settings, seed=0).double()(batch).loss
    assert relative_error(output.next_item_loss, without_map) < 1e-9
    auxiliary = output.loss - output.next_item_loss

    embedding = with_map.model.lm_head.weight
    hidden = states[0].view(16, 4, -1)
    expected = 0.0
    for step in range(3):
        head = with_map.model.stamp_prediction.heads[step]
        for level in range(4):
            start, end = 1 + 256 * level, 1 + 256 * (level + 1)
            targets = batch.future_ids.view(16, 3, 4)[:, step, level]
            logits = (head(hidden[:, level], None, None) @ embedding.T)[:, start:end]
            if bool((targets != -100).any()):
                labels = torch.where(targets == -100, -100, targets - start)
                expected = expected + F.cross_entropy(logits, labels) / 4
    assert relative_error(auxiliary, 0.25 * expected) < 1e-9


def test_unknown_configuration():
    with pytest.raises(ValueError, match=r"configuration must be one of \('padded-eager', .*\), got 'padded'"):
        build_recommender("padded", RecommenderSettings(), seed=0)
