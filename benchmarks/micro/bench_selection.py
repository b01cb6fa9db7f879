"""Selection family: gather of kept rows, forward and backward, against index_select.

pytest benchmarks/micro/bench_selection.py --benchmark-only
"""

import pytest
import torch

import stamp_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (sequences, mean length, row width): the TIGER trunk's states, and a wide model's.
SHAPES = [(512, 94, 128), (512, 94, 1024)]


def ragged_batch(num_sequences: int, mean_length: int, width: int):
    """Lognormal lengths around the mean, a third of the tokens kept, as in the paper's setting."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_sequences).log_normal_(0, 0.5, generator=generator)
    lengths = (lengths * mean_length / lengths.mean()).round().clamp(8, 400).long()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32).to(DEVICE)
    total = int(lengths.sum())
    selection = stamp_kernels.select_tokens(
        torch.randn(total, generator=generator).to(DEVICE),
        cu_seqlens,
        int(lengths.max()),
        keep_ratio=1 / 3,
        lengths_cpu=lengths,
    )
    x = torch.randn(total, width, generator=generator).to(DEVICE).requires_grad_()
    return x, selection


def index_select(x, selection):
    return x.index_select(0, selection.indices)


def measured(function):
    """The call with the device finished, so that its time is the device's too."""

    def run():
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("gather", [stamp_kernels.gather_tokens, index_select], ids=["gather_tokens", "index_select"])
class TestGather:
    def test_forward(self, benchmark, gather, shape):
        x, selection = ragged_batch(*shape)
        benchmark.group = f"gather forward {shape} {DEVICE.type}"
        with torch.no_grad():
            y = benchmark(measured(lambda: gather(x, selection)))
        benchmark.extra_info["bytes"] = 2 * y.numel() * y.element_size()

    def test_forward_backward(self, benchmark, gather, shape):
        x, selection = ragged_batch(*shape)
        grad = torch.randn(len(selection.indices), shape[2], device=DEVICE)
        benchmark.group = f"gather forward+backward {shape} {DEVICE.type}"
        benchmark(measured(lambda: torch.autograd.grad(gather(x, selection), x, grad)))
        kept, source = grad.numel() * grad.element_size(), x.numel() * x.element_size()
        benchmark.extra_info["bytes"] = 2 * kept + kept + source
