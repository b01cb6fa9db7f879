"""Copies the constants that kernels read on a device there before the first call."""

from collections.abc import Sequence

import torch

from stamp_kernels.ops._checks import check_vocab_ranges
from stamp_kernels.relative_position import RelativePositionBias


def prepare(
    device: torch.device | str,
    *,
    relative_bias: RelativePositionBias | None = None,
    vocab_ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Copy the constants of later calls to a GPU, so that these calls can be captured in a CUDA graph.

    Kernels look up the bucket of a distance and the range of a step in small tensors on the device. The first call
    that needs one copies it there, waits for the copy and keeps it for the life of the process. During the capture of a
    CUDA graph that is impossible and raises a RuntimeError: before a capture, either run the step once or call this
    function. Nothing else needs it. On a CPU it does nothing.

    Step weights are not constants: kernels write those given as floats, and a graph replays the values of its capture.

    Args:
        device: of the tensors of the later calls; `"cuda"` is the current GPU.
        relative_bias: the bias of the later calls of `packed_attention` and `attention_centrality`. Tables with equal
            numbers of buckets share their constants.
        vocab_ranges: the ranges of the later calls of `multi_token_cross_entropy` or `MultiStepPrediction`.

    Raises:
        ValueError: an argument has a wrong value.
        RuntimeError: there is no such device, or a CUDA graph is being captured.

    Example:
        >>> bias = RelativePositionBias(torch.zeros(32, 8))
        >>> prepare("cpu", relative_bias=bias, vocab_ranges=[(0, 256), (256, 512)])
    """
    if relative_bias is not None and not isinstance(relative_bias, RelativePositionBias):
        raise ValueError(f"relative_bias must be a RelativePositionBias or None, got {type(relative_bias).__name__}")
    ranges = () if vocab_ranges is None else check_vocab_ranges(vocab_ranges)
    device = torch.empty(0, device=device).device  # now it has its index
    if device.type == "cpu":
        return
    # These import Triton.
    from stamp_kernels.triton_kernels.attention.bias_gradient import distance_ranges
    from stamp_kernels.triton_kernels.attention.relative_bias import distance_buckets
    from stamp_kernels.triton_kernels.cross_entropy.softmaxes import ranges_on_device

    if relative_bias is not None:
        of_bias = relative_bias.table.shape[0], relative_bias.max_distance, relative_bias.bidirectional
        distance_buckets(*of_bias, device)
        distance_ranges(*of_bias, device)
    if len(set(ranges)) > 1:  # a range that all steps share is an argument of the kernels
        ranges_on_device(ranges, device)
