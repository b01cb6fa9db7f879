"""torch.compile of stamped T5s: one graph, eager's results, and no recompilation from batch to batch."""

import copy
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from closeness import assert_close
from t5_cases import VOCAB_SIZE, gradients, padded_batch, tiny_t5
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from stamp_kernels.integrations.transformers import PredictionConfig, PruningConfig, apply_stamp
from stamp_kernels.packed import PackedBatch

NUM_STEPS, LEVELS = 2, 4
PRUNING = PruningConfig(schedule=[(1, 0.5)], protect_last=1)
PREDICTION = PredictionConfig(NUM_STEPS, LEVELS)
# All batches have different numbers of users, longest histories and numbers of tokens. The second batch shows
# torch.compile that these sizes vary.
BATCHES = ((7, 1, 30, 2, 13, 200), (5, 4, 40), (9, 11, 3, 2, 8), (64, 2))


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    """Every test starts without compiled code and leaves none."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def small_t5(dropout: float = 0.0, **configs) -> nn.Module:
    return apply_stamp(tiny_t5(torch.float64, num_layers=2, num_decoder_layers=1, dropout_rate=dropout), **configs)


def inputs_of(kind: str, lengths: tuple[int, ...]) -> dict[str, Tensor | PackedBatch]:
    batch = padded_batch(lengths)
    inputs = dict(labels=batch["labels"], future_ids=torch.randint(1, VOCAB_SIZE, (len(lengths), NUM_STEPS * LEVELS)))
    if kind == "packed":
        return inputs | dict(packed_inputs=PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"]))
    inputs |= dict(input_ids=batch["input_ids"])
    return inputs | (dict(attention_mask=batch["attention_mask"]) if kind == "padded" else {})


def assert_same_step(compiled: nn.Module, model: nn.Module, eager: nn.Module, inputs: dict) -> None:
    """Loss and gradients of the model, run as `compiled`, are those of its copy `eager`."""
    loss, expected_loss = compiled(**inputs).loss, eager(**inputs).loss
    assert_close(loss, expected_loss)
    got, expected = gradients(model, loss), gradients(eager, expected_loss)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name])


def test_packed_batches_are_one_graph():
    """In training, in evaluation, and in training again."""
    model = small_t5(pruning=PRUNING, prediction=PREDICTION)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, lengths in enumerate(BATCHES):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            assert_same_step(compiled, model, eager, inputs_of("packed", lengths))
    assert counter.frame_count == 2

    # Compiled code sizes pruned batches by their capacity, so that there are tail rows.
    inputs = inputs_of("packed", BATCHES[0])
    packed, expected = compiled(**inputs).encoder_packed, eager(**inputs).encoder_packed
    assert torch.equal(packed.cu_seqlens, expected.cu_seqlens)
    num_kept = len(expected.values)
    assert len(packed.values) > num_kept == int(packed.cu_seqlens[-1])
    assert_close(packed.values[:num_kept], expected.values)

    model.eval(), eager.eval()
    for i, lengths in enumerate(BATCHES):
        inputs = inputs_of("packed", lengths)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2), torch.no_grad():
            output, expected = compiled(**inputs), eager(**inputs)
        assert_close(output.loss, expected.loss)
        assert_close(output.logits, expected.logits)
        width = expected.encoder_attention_mask.shape[1]  # the compiled one may be wider
        assert torch.equal(output.encoder_attention_mask[:, :width], expected.encoder_attention_mask)
        assert not output.encoder_attention_mask[:, width:].any()
        assert torch.equal(output.encoder_positions[:, :width], expected.encoder_positions)
        assert_close(output.encoder_last_hidden_state[:, :width], expected.encoder_last_hidden_state)

    model.train(), eager.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_step(compiled, model, eager, inputs_of("packed", (2, 33, 8)))


def test_a_mask_is_read_at_one_break():
    model = small_t5(pruning=PRUNING, prediction=PREDICTION)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for i, lengths in enumerate(BATCHES):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            assert_same_step(compiled, model, eager, inputs_of("padded", lengths))
        if i == 0:
            # The calling functions are resumed and meet the same break.
            assert {where for where, _ in graph_breaks()} == {"_pack_by_mask"}
            reason = "the number of tokens in a mask is a size that the CPU has to read"
            assert all(f"torch.compiler.disable` (reason: {reason})" in text for _, text in graph_breaks())
            assert counter.frame_count == 2  # before it, the arguments; after it, the model
    assert counter.frame_count == 4


def test_padding_that_votes_adds_no_break():
    voters = dict(budget="max_seqlen", positions="none", voters="padded")
    model = small_t5(pruning=PruningConfig(schedule=[(1, 0.5)], **voters), prediction=PREDICTION)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for i, lengths in enumerate(BATCHES):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            assert_same_step(compiled, model, eager, inputs_of("padded", lengths))
    assert {where for where, _ in graph_breaks()} == {"_pack_by_mask"}


def graph_breaks() -> list[tuple[str, str]]:
    """Of every break since the last reset: the function that caused it, if named, and the reason."""
    reasons = torch._dynamo.utils.counters["graph_break"]
    return [((re.findall(r"<function (\w+)", reason) or [""])[0], reason) for reason in reasons]


def test_input_ids_without_a_mask_are_one_graph():
    model = small_t5()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for i, lengths in enumerate(BATCHES):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            assert_same_step(compiled, model, eager, inputs_of("without a mask", lengths))


# torch.compile reads the attribute of an activation while it traces the checkpointed block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("configs", [{}, dict(pruning=PRUNING)], ids=["plain", "SAP"])
def test_gradient_checkpointing(configs):
    """Dropout is only in the attention. Elsewhere compiled code would draw it for tail rows too.

    With pruning the graph breaks at each block that prunes, because the attention returns centrality by a side effect,
    which a checkpointed region of a graph may not have.
    """
    model = small_t5(**configs)
    for module in model.modules():
        if isinstance(module, T5Attention):
            module.dropout = 0.2
    eager = copy.deepcopy(model)
    compiled = torch.compile(checkpointed(model), backend="aot_eager", fullgraph=not configs)
    inputs = inputs_of("packed", BATCHES[0])
    losses, grads = [], []
    for each, run in ((model, compiled), (eager, eager)):
        torch.manual_seed(3)
        losses.append(run(**inputs).loss)
        grads.append(gradients(each, losses[-1]))
    assert_close(*losses)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[1]:
        assert_close(grads[0][name], grads[1][name])


def checkpointed(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # by the name that both ends of the supported range have
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return model
