"""The examples of T5 models from the wild: the stamped model does what the base model does, and pruning prunes."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stamp_kernels.integrations.transformers import PruningConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["t5_tiger", "t5_own_loss", "t5_per_level_heads", "t5_contrastive", "t5_dense_retrieval"]
SIZES = dict(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, dropout_rate=0.0)
NUM_ITEMS, LEVELS, CODES = 30, 3, 4


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """40 users with 3 to 11 of 30 items, whose semantic IDs have three levels of 4 codes."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 40)
    items = np.arange(NUM_ITEMS)
    path = tmp_path_factory.mktemp("data") / "made.npz"
    np.savez(
        path,
        seq_items=rng.integers(0, NUM_ITEMS, lengths.sum()),
        seq_offsets=np.concatenate(([0], lengths.cumsum())),
        sids=np.stack([items // 8, items // 2 % 4, items % 2], axis=1),
    )
    return str(path)


@pytest.fixture(params=NAMES)
def example(request, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module(request.param)
    torch.set_default_device(None)  # the examples choose a GPU
    for name in ["histories", *NAMES]:  # other folders may have modules of these names
        sys.modules.pop(name, None)


def recommender_class(example):
    (found,) = (
        value
        for value in vars(example).values()
        if isinstance(value, type)
        and value.__module__ == example.__name__
        and hasattr(value, "recommend")
        and hasattr(value, "stamp")
    )
    return found


def built(example, data_file, dtype=torch.float64):
    """The histories, and a recommender with the weights of a fixed seed."""
    histories = importlib.import_module("histories").Histories(data_file, max_items=8)
    torch.manual_seed(0)
    return histories, recommender_class(example)(histories, **SIZES).to(dtype).train()


def batch_of(histories, size=12):
    return next(histories.batches(histories.training, size))


def pruning(example, histories, keep_ratio=0.5):
    return PruningConfig([(1, keep_ratio)], **example.pruning_options(histories))


def test_runs_from_the_command_line(example, data_file, capsys):
    """As a user runs it, for a few steps."""
    arguments = ["--data", data_file, "--steps", "3", "--batch-size", "12", "--layers", "2", "--d-model", "16"]
    result = example.main([*arguments, "--keep-ratio", "0.5", "--beams", "3"])
    losses = result["losses"]
    assert losses["stamped"][0] == pytest.approx(losses["base"][0], rel=1e-6)
    assert losses["stamped and pruned"][0] != pytest.approx(losses["base"][0], rel=1e-6)
    assert all(np.isfinite(values).all() and len(values) == 3 for values in losses.values())
    assert result["same_beams"]
    assert result["beams"]["stamped and pruned"].shape == (12, 3, LEVELS)
    printed = capsys.readouterr().out
    assert [line.split("  ")[0].strip() for line in printed.splitlines()[:3]] == list(losses)
    assert "same beams: yes" in printed


def test_loss_and_gradients_are_those_of_the_base_model(example, data_file):
    """In float64, for every parameter."""
    histories, base = built(example, data_file)
    _, stamped = built(example, data_file)
    stamped.stamp(None)
    batch = batch_of(histories)
    want, got = base.loss(batch), stamped.loss(batch)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    want.backward()
    got.backward()
    names, parameters = zip(*base.named_parameters(), strict=True)
    for name, parameter, other in zip(names, parameters, stamped.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_pruned_models_train_and_find_items(example, data_file):
    """With keep_ratio 1 nothing changes; with less the loss does, and the beams are still items that exist."""
    histories, base = built(example, data_file)
    _, whole = built(example, data_file)
    _, pruned = built(example, data_file)
    whole.stamp(pruning(example, histories, 1.0))
    pruned.stamp(pruning(example, histories, 0.4))
    batch = batch_of(histories)
    torch.testing.assert_close(whole.loss(batch), base.loss(batch), rtol=1e-10, atol=0)
    assert abs(pruned.loss(batch) - base.loss(batch)) > 1e-6
    pruned.loss(batch).backward()
    items = {tuple(codes) for codes in histories.codes_of_item.tolist()}
    found = pruned.eval().recommend(batch, 4)
    assert found.shape == (12, 4, LEVELS)
    assert {tuple(codes) for codes in found.flatten(0, 1).tolist()} <= items
    for beams in found.tolist():
        assert len({tuple(codes) for codes in beams}) == 4


def test_beams_are_those_of_the_base_model(example, data_file):
    histories, base = built(example, data_file)
    _, stamped = built(example, data_file)
    stamped.stamp(None)
    batch = batch_of(histories)
    assert torch.equal(stamped.eval().recommend(batch, 5), base.eval().recommend(batch, 5))


def test_recommendations_of_one_user_do_not_depend_on_the_others(example, data_file):
    """Padding and other histories have no influence, pruned or not."""
    histories, stamped = built(example, data_file)
    stamped.stamp(pruning(example, histories))
    stamped.eval()
    rows = histories.training
    together = stamped.recommend(histories.batch(rows, np.arange(8)), 4)
    for row in range(8):
        alone = stamped.recommend(histories.batch(rows, np.arange(row, row + 1)), 4)
        assert torch.equal(alone[0], together[row])
