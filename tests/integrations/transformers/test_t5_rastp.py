"""RASTP's implementation, which pads, and the PruningConfig that says the same."""

import pytest
import torch
from closeness import relative_error
from padded_stamp import FEW_BUCKETS, RASTP, decode_padded, encode_padded, encode_rastp
from t5_cases import assert_same_training_step, padded_batch, tiny_t5
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers import PruningConfig


def rastp_t5() -> T5ForConditionalGeneration:
    return tiny_t5(torch.float64, num_layers=4, **FEW_BUCKETS)


def rastp_batch(padded_length: int = 30) -> dict[str, Tensor]:
    """Histories below, at and above a third of the padded length, and at the padded length."""
    return padded_batch((7, 10, 30, 11, 23, padded_length))


@pytest.mark.parametrize("padded_length", [30, 36])
def test_masking_equals_the_gathered_columns(padded_length):
    """Two truths, made in different ways: nothing is gathered in the first, and RASTP's columns in the second."""
    base, batch = rastp_t5(), rastp_batch(padded_length)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected, remaining = encode_rastp(base, ids, mask)
    got = encode_padded(base, ids, mask, RASTP)
    assert torch.equal(got.kept, expected.kept)
    assert expected.kept.sum(1).tolist() == [min(n, padded_length // 3) for n in mask.sum(1).tolist()]
    assert relative_error(got.states, expected.states) < 1e-9
    # RASTP's decoder reads the first columns of the mask from before the pruning: right for padding on the right.
    assert torch.equal(remaining, mask[:, : remaining.shape[1]].bool())


def test_training_equals_training_on_the_gathered_columns():
    base, other, batch = rastp_t5(), rastp_t5(), rastp_batch()
    ids, mask, labels = batch.values()
    encoded, remaining = encode_rastp(base, ids, mask)
    # The decoder gets the columns that are left, with their own mask, as in RASTP.
    columns = encoded.kept.int().argsort(dim=1, descending=True, stable=True)[:, : remaining.shape[1]]
    states = encoded.states.gather(1, columns[..., None].expand(-1, -1, encoded.states.shape[2]))
    outputs = BaseModelOutput(last_hidden_state=states)
    expected = base(encoder_outputs=outputs, attention_mask=remaining.long(), labels=labels)
    got = decode_padded(other, encode_padded(other, ids, mask, RASTP), labels=labels)
    assert relative_error(got.logits, expected.logits) < 1e-9
    assert_same_training_step(base, expected.loss, other, got.loss)


@pytest.mark.parametrize(
    "other",
    [
        PruningConfig(RASTP.schedule, budget="max_seqlen", voters="padded"),
        PruningConfig(RASTP.schedule, budget="max_seqlen", positions="none"),
        PruningConfig(RASTP.schedule, positions="none", voters="padded"),
    ],
    ids=["positions", "voters", "budget"],
)
def test_every_setting_changes_the_states(other):
    """So that a comparison with RASTP tests each of them."""
    base, batch = rastp_t5(), rastp_batch()
    rastp, without = (
        encode_padded(base, batch["input_ids"], batch["attention_mask"], pruning) for pruning in (RASTP, other)
    )
    assert relative_error(without.states, rastp.states) > 1e-3
