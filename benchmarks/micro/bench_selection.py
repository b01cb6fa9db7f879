"""Selection family: gather of kept rows, forward and backward, against index_select.

pytest benchmarks/micro/bench_selection.py --benchmark-only
"""

import pytest
import torch
from kernel_work import KernelWork
from lengths import lognormal_lengths

import stamp_kernels

# (sequences, mean length, row width): the TIGER trunk's states, and a wide model's.
SHAPES = [(512, 94, 128), (512, 94, 1024)]


def ragged_batch(num_sequences: int, mean_length: int, width: int, device: torch.device):
    """A third of the tokens kept, as in the paper's setting."""
    lengths = lognormal_lengths(num_sequences, mean_length)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32).to(device)
    total = int(lengths.sum())
    generator = torch.Generator().manual_seed(0)
    selection = stamp_kernels.select_tokens(
        torch.randn(total, generator=generator).to(device),
        cu_seqlens,
        int(lengths.max()),
        keep_ratio=1 / 3,
        lengths_cpu=lengths,
    )
    x = torch.randn(total, width, generator=generator).to(device).requires_grad_()
    return x, selection


def index_select(x, selection):
    return x.index_select(0, selection.indices)


@pytest.mark.parametrize("gather", [stamp_kernels.gather_tokens, index_select], ids=["gather_tokens", "index_select"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
class TestGather:
    def test_forward(self, measured, device, shape, gather):
        x, selection = ragged_batch(*shape, device)
        kept_bytes = len(selection.indices) * x[0].nbytes

        @torch.no_grad()
        def step():
            gather(x, selection)

        self.record(measured, step, "forward", shape, gather, [KernelWork(0, 2 * kept_bytes)], len(x))

    def test_forward_backward(self, measured, device, shape, gather):
        x, selection = ragged_batch(*shape, device)
        grad = torch.randn(len(selection.indices), shape[2], device=device)
        kernels = [KernelWork(0, 2 * grad.nbytes), KernelWork(0, grad.nbytes + x.nbytes)]

        def step():
            torch.autograd.grad(gather(x, selection), x, grad)

        self.record(measured, step, "forward+backward", shape, gather, kernels, len(x))

    @staticmethod
    def record(measured, step, direction, shape, gather, kernels, tokens):
        measured(
            step,
            case=f"gather, {'x'.join(map(str, shape))}, {direction}",
            implementation=gather.__name__,
            kernels=kernels,
            tokens=tokens,
            is_baseline=gather is stamp_kernels.gather_tokens,
        )
