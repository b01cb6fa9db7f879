"""PruningConfig and PredictionConfig: round trips through JSON, the modules they build, and errors."""

import json

import numpy as np
import pytest

from stamp_kernels.integrations.transformers.configuration import PredictionConfig, PruningConfig, to_dict
from stamp_kernels.modules.prediction import LinearDecay


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig([(1, 0.5), (3, 0.25)], norm="l2", protect_first=1, codes_per_item=4, min_keep=2),
        PruningConfig(positions="none", layout="original", voters="padded"),
        PredictionConfig(),
        PredictionConfig(
            2, 2, vocab_ranges=[(0, 5), (5, 9)], step_weights=[1, 0.5], lambda_=LinearDecay(0.3, 0.1, 100)
        ),
        PredictionConfig(2, 2, vocab_ranges=[(2, 5), (5, 9)], eos_token_id=np.int64(1)),
        PredictionConfig(1, unit="token", head="transformer", num_attention_heads=2, unembedding="own"),
        PruningConfig([(np.int64(1), np.float32(0.5))], protect_last=np.int64(2), min_keep=np.int32(1)),
        PredictionConfig(np.int64(2), step_weights=np.array([1, 0.5]), lambda_=np.float32(0.5)),
    ],
)
def test_survives_json(config):
    restored = type(config)(**json.loads(json.dumps(to_dict(config))))
    assert restored == config
    assert hash(restored) == hash(config)


def test_modules_follow_the_schedule():
    config = PruningConfig([(1, 0.5), (3, 0.25)], norm="l2", min_keep=2, protect_first=1, protect_last=3)
    modules = config.build_modules()
    assert {block: module.keep_ratio for block, module in modules.items()} == {1: 0.5, 3: 0.25}
    assert all(module.norm == "l2" and module.min_keep == 2 for module in modules.values())
    assert all(module.protected_ends == (1, 3) for module in modules.values())
    for positions, of_modules in (("original", "original"), ("compact", "compact"), ("none", "original")):
        assert PruningConfig(positions=positions).build_modules()[2].positions == of_modules


def test_prediction_module_follows_the_configuration():
    module = PredictionConfig(2, 2, vocab_ranges=[(0, 5), (5, 9)], unembedding="own", lambda_=0.5).build_module(8, 9)
    assert module.vocab_ranges == ((0, 5), (5, 9), (0, 5), (5, 9))
    assert module.unembedding.shape == (9, 8)
    assert (module.num_steps, module.codes_per_item, module.lambda_) == (2, 2, 0.5)
    assert PredictionConfig(3, 4).stride == 4 and PredictionConfig(3, 4, unit="token").stride == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PruningConfig([(2, 0.5), (2, 0.3)]),
            r"schedule must have blocks from 1 on, each once, got \(\(2, 0.5\)",
        ),
        (lambda: PruningConfig([(0, 0.5)]), r"schedule must have blocks from 1 on"),
        (lambda: PruningConfig([(1, 1.5)]), r"schedule\[0\]\[1\] must be in \[0.0, 1.0\], got 1.5"),
        (lambda: PruningConfig((2, 1 / 3)), r"schedule must be a sequence of pairs \(block, keep_ratio\), got \(2, 0"),
        (lambda: PruningConfig({2: 1 / 3}), r"schedule must be a sequence of pairs \(block, keep_ratio\), got \{2: 0"),
        (lambda: PruningConfig([(2.5, 1 / 3)]), r"schedule\[0\]\[0\] must be an int \(not a tensor\), got float"),
        (lambda: PruningConfig([(2, "1/3")]), r"schedule\[0\]\[1\] must be a number \(not a tensor\), got str"),
        (lambda: PruningConfig(protect_first=None), r"protect_first must be an int \(not a tensor\), got NoneType"),
        (lambda: PruningConfig(norm="l3"), r"norm must be one of \('l1', 'l2'\), got 'l3'"),
        (
            lambda: PruningConfig(positions="rotary"),
            r"positions must be one of \('original', 'compact', 'none'\), got 'rotary'",
        ),
        (lambda: PruningConfig(layout="left"), r"layout must be one of \('compact', 'original'\), got 'left'"),
        (
            lambda: PruningConfig(layout="original", positions="compact"),
            r'layout="original" needs the original positions, got positions="compact"',
        ),
        (lambda: PruningConfig(voters="all"), r"voters must be one of \('tokens', 'padded'\), got 'all'"),
        (lambda: PruningConfig(budget="batch"), r"budget must be one of \('sequence', 'max_seqlen'\), got 'batch'"),
        (lambda: PruningConfig(min_keep=-1), r"min_keep must be in \[0, inf\), got -1"),
        (lambda: PruningConfig(codes_per_item=0), r"codes_per_item must be in \[1, inf\), got 0"),
        (lambda: PruningConfig(protect_last=1.5), r"protect_last must be an int \(not a tensor\), got float"),
        (lambda: PruningConfig(protect_first=-1), r"protect_first must be in \[0, inf\), got -1"),
        (lambda: PruningConfig().check_blocks(1), r"schedule must have blocks from 1 to 1, got 2"),
        (lambda: PredictionConfig(0), r"num_steps must be in \[1, inf\), got 0"),
        (lambda: PredictionConfig(None), r"num_steps must be an int \(not a tensor\), got NoneType"),
        (
            lambda: PredictionConfig(lambda_=[0.3, 0.1]),
            r"lambda_ must be a number or LinearDecay\(start, end, steps\)",
        ),
        (lambda: PredictionConfig(lambda_=[0.3, "0", 9]), r"lambda_\[1\] must be a number \(not a tensor\), got str"),
        (
            lambda: PredictionConfig(lambda_=float),
            r"lambda_ must be a number or a LinearDecay, which JSON can store",
        ),
        (lambda: PredictionConfig(lambda_="0.3"), r"lambda_ must be a number \(not a tensor\), got str"),
        (
            lambda: PredictionConfig(1, 2, vocab_ranges=[0, 5, 5, 9]),
            r"vocab_ranges must be pairs \(start, end\) of ints, got \[0, 5, 5, 9\]",
        ),
        (
            lambda: PredictionConfig(1, 1, vocab_ranges=[(0, 5.5)]),
            r"vocab_ranges must be pairs \(start, end\) of ints, got \[\(0, 5\.5\)\]",
        ),
        (lambda: PredictionConfig(eos_token_id=-1), r"eos_token_id must be in \[0, inf\), got -1"),
        (lambda: PredictionConfig(eos_token_id="1"), r"eos_token_id must be an int \(not a tensor\), got str"),
        (
            lambda: PredictionConfig(1, 2, vocab_ranges=[(0, 5), (5, 9)], eos_token_id=5),
            r"eos_token_id must be outside of vocab_ranges, got 5",
        ),
        (lambda: PredictionConfig(1, 0), r"codes_per_item must be in \[1, inf\), got 0"),
        (lambda: PredictionConfig(unit="step"), r"unit must be one of"),
        (
            lambda: PredictionConfig(head="mlp"),
            r"head must be one of .*'transformer'\), got 'mlp'",
        ),
        (
            lambda: PredictionConfig(2, step_weights=[1.0]),
            r"step_weights must have one weight for each of the 2 steps",
        ),
        (lambda: PredictionConfig(head="transformer"), r'num_attention_heads goes with head="transformer"'),
        (lambda: PredictionConfig(num_attention_heads=2), r'num_attention_heads goes with head="transformer"'),
        (lambda: PredictionConfig(unembedding="tied"), r"unembedding must be one of"),
        (
            lambda: PredictionConfig(1, 2, vocab_ranges=[(0, 5)]),
            r"vocab_ranges must have one \(start, end\) for each of the 2",
        ),
        (
            lambda: PredictionConfig(1, 1, unit="token", vocab_ranges=[(0, 5)]),
            r'needs unit="item", got \(\(0, 5\),\) and unit=\'token\'',
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
