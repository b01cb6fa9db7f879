"""What kernels read on a device besides the tensors of a call, put there before the call."""

from collections.abc import Sequence

import torch

from stamp_kernels.relative_position import RelativePositionBias


def prepare(
    device: torch.device | str,
    *,
    relative_bias: RelativePositionBias | None = None,
    vocab_ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Put the constants of some calls onto a GPU, so that no such call has to wait for it.

    Kernels look up the bucket of a distance and the range of a step in small tensors on the device. The first call
    that needs one copies it there, waits for the copy and keeps it for the life of the process. While a CUDA graph is
    captured that is impossible and raises a RuntimeError: before a capture, either run the step once or call this. It
    is not needed elsewhere. On a CPU it does nothing.

    Weights of steps are no constants: as floats they are written by kernels, which a graph replays with the values of
    its capture.

    Args:
        device: of the calls' tensors; `"cuda"` is the current GPU.
        relative_bias: what `packed_attention` and `attention_centrality` will be given. Of its table only the number of
            buckets matters: tables of one shape share their constants.
        vocab_ranges: what `multi_token_cross_entropy` or `MultiStepPrediction` will be given.

    Raises:
        ValueError: an argument has a wrong value.
        RuntimeError: there is no such device, or a CUDA graph is being captured.

    Example:
        >>> bias = RelativePositionBias(torch.zeros(32, 8))
        >>> prepare("cpu", relative_bias=bias, vocab_ranges=[(0, 256), (256, 512)])
    """
    if relative_bias is not None and not isinstance(relative_bias, RelativePositionBias):
        raise ValueError(f"relative_bias must be a RelativePositionBias or None, got {type(relative_bias).__name__}")
    try:
        ranges = tuple((start, end) for start, end in vocab_ranges or ())
    except (TypeError, ValueError):
        raise ValueError(f"vocab_ranges must be pairs (start, end), got {vocab_ranges}") from None
    for start, end in ranges:
        if not 0 <= start < end:
            raise ValueError(f"vocab_ranges must satisfy 0 <= start < end, got {(start, end)}")
    device = torch.empty(0, device=device).device  # with its index
    if device.type == "cpu":
        return
    # These import Triton.
    from stamp_kernels.triton_kernels.attention.bias_gradient import distance_ranges
    from stamp_kernels.triton_kernels.attention.relative_bias import distance_buckets
    from stamp_kernels.triton_kernels.cross_entropy.tiles import ranges_on_device

    if relative_bias is not None:
        of_bias = relative_bias.table.shape[0], relative_bias.max_distance, relative_bias.bidirectional
        distance_buckets(*of_bias, device)
        distance_ranges(*of_bias, device)
    if len(set(ranges)) > 1:  # a range that all steps have is an argument of the kernels
        ranges_on_device(ranges, device)
