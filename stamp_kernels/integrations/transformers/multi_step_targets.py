"""The targets of multi-step prediction for an encoder-decoder, and their number over all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stamp_kernels.integrations.transformers.configuration import PredictionConfig
from stamp_kernels.ops._checks import check_tensor

__all__ = ["IGNORE_INDEX", "global_target_counts", "multi_step_targets"]

IGNORE_INDEX = -100


def multi_step_targets(labels: Tensor, future_ids: Tensor, prediction: PredictionConfig) -> Tensor:
    """What each decoder position predicts besides its label: the tokens 1, 2, ... strides further on in the history.

    Args:
        labels: int64 `[B, N]`, whole items; -100 behind a user's last item and on positions that are not trained. These
            positions have no targets.
        future_ids: int64 `[B, M]`, the tokens that follow each user's last item; -100 after the end of the history.

    Returns:
        int64 `[B, N, num_steps]`, -100 where there is no target.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or the labels are not whole items.
    """
    check_tensor("labels", labels, shape=["batch", "num_labels"])
    batch, num_labels = labels.shape
    check_tensor("future_ids", future_ids, shape=[batch, "num_future"], dtypes=[labels.dtype], device=labels.device)
    if num_labels % prediction.codes_per_item != 0:
        raise ValueError(f"labels must be whole items of {prediction.codes_per_item} codes, got {list(labels.shape)}")
    has_label = labels != IGNORE_INDEX
    column = torch.arange(num_labels, device=labels.device)
    last = F.pad(torch.where(has_label, column, -1), (1, 0), value=-1).amax(1)  # [B], -1 without labels
    num_items = last // prediction.codes_per_item + 1  # [B]
    end = (num_items * prediction.codes_per_item)[:, None, None]  # [B, 1, 1], the place where the future begins
    step = torch.arange(1, prediction.num_steps + 1, device=labels.device)
    place = column[:, None] + step * prediction.stride  # [N, K], of the targets, counted from the first label
    # The last column is the target of every place behind the future.
    tokens = F.pad(torch.cat([labels, future_ids], dim=1), (0, 1), value=IGNORE_INDEX)  # [B, N + M + 1]
    source = torch.where(place < end, place, num_labels + place - end).clamp(max=tokens.shape[1] - 1)  # [B, N, K]
    targets = tokens.gather(1, source.flatten(1)).view(batch, num_labels, prediction.num_steps)
    return targets.masked_fill(~has_label[..., None], IGNORE_INDEX)


def global_target_counts(
    labels: Tensor,
    future_ids: Tensor | None = None,
    prediction: PredictionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The numbers of targets in the losses of all ranks together, as arguments of a stamped model's forward.

    Ranks that pack by a token budget have different numbers of sequences, and a mean of the ranks' means would weight
    the ranks equally. With these counts the losses of the ranks add up to the loss of the whole batch. If gradients are
    averaged over the ranks (DDP, FSDP2), multiply the loss by the number of ranks:

        counts = global_target_counts(batch["labels"], batch["future_ids"], prediction)
        loss = model(**batch, **counts).loss * dist.get_world_size()

    Costs one all-reduce of a few integers. Without a process group the counts are those of this batch. With gradient
    accumulation, add up the counts of the steps and give the sum to each step.

    Args:
        labels: int64 `[B, N]`, as given to the model; -100 where a decoder_attention_mask hides a position.
        future_ids, prediction: if the model predicts further steps, its future_ids and its configuration.
        group: the ranks that share the batch. None: all.

    Returns:
        `num_items_in_batch`, an int64 scalar. With prediction also `num_future_targets`, int64
        `[num_steps, codes_per_item]`.

    Raises:
        ValueError: only one of future_ids and prediction is given, or see `multi_step_targets`.
    """
    if (future_ids is None) != (prediction is None):
        missing = "future_ids" if future_ids is None else "prediction"
        raise ValueError(f"future_ids and prediction must be given together, got None for {missing}")
    counts = (labels != IGNORE_INDEX).sum()[None]
    if prediction is not None and future_ids is not None:
        targets = multi_step_targets(labels, future_ids, prediction).unflatten(1, (-1, prediction.codes_per_item))
        counts = torch.cat([counts, (targets != IGNORE_INDEX).sum((0, 1)).t().flatten()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts, group=group)
    result = {"num_items_in_batch": counts[0]}
    if prediction is not None:
        result["num_future_targets"] = counts[1:].view(prediction.num_steps, prediction.codes_per_item)
    return result
