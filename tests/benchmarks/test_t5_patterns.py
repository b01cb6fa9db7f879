"""The benchmark of T5 patterns on small models and made histories."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_t5_patterns.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds the folder of the examples
    known = set(sys.modules)
    spec = importlib.util.spec_from_file_location("bench_t5_patterns", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SIZES = dict(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    module.PRUNE_AFTER_BLOCK = 1
    yield module
    for name in set(sys.modules) - known:
        if name == "histories" or name.startswith("t5_"):
            del sys.modules[name]


@pytest.fixture
def histories(bench, tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 40)
    items = np.arange(30)
    np.savez(
        tmp_path / "made.npz",
        seq_items=rng.integers(0, 30, lengths.sum()),
        seq_offsets=np.concatenate(([0], lengths.cumsum())),
        sids=np.stack([items // 8, items // 2 % 4, items % 2], axis=1),
    )
    return bench.Histories(str(tmp_path / "made.npz"), max_items=8)


def test_every_pattern_is_measured(bench, histories):
    """Base and stamped models have the same loss and beams, and the report can be written as JSON."""
    arguments = argparse.Namespace(
        batch_size=12, steps=1, searches=1, warmup=0, users=6, beams=3, keep_ratio=0.5, dropout=0.1
    )
    results = {name: bench.measure(pattern, histories, arguments) for name, pattern in bench.PATTERNS.items()}
    for result in results.values():
        assert result["relative_loss_difference"] < 1e-5
        assert result["first_loss"]["pruned"] != result["first_loss"]["base"]
        assert result["users_with_the_same_beams"] == result["users"] == 6
        assert set(result["step_ms"]) == set(result["peak_bytes"]) == set(result["search_ms"]) == set(bench.MODES)
    json.dumps(results, allow_nan=False)
    lines = bench.markdown(results).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(bench.PATTERNS)


def test_data_are_described(bench, histories):
    described = bench.describe_data(histories, 12)
    assert (described["codes_per_item"], described["codebook_size"]) == (3, 4)
    assert 0 < described["share_of_padding"] < 1
    assert torch.get_default_device() == histories.device
